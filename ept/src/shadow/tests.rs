#![allow(unsafe_code)]

use core::convert::Infallible;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use testudo_arch::memory::GuestRam;

use super::*;
use crate::walk::{PageFaultCode, look_up};
use crate::{FramePool, Invalidate, Invalidation};

struct NoHardware;

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

const MEMORY: u64 = 4 << 20;
const HOST: u64 = 1 << 30;
const FRAMES: usize = 96;

const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const ALL: u64 = PRESENT | W | U;

const LONG: PagingState = PagingState {
    cr0: 0x8001_0001,
    cr3: 0x1000,
    cr4: 0x20,
    efer: 0xD00,
    alignment_check: false,
    pkru: 0,
    pkrs: 0,
    physical_bits: 40,
    gigabyte_pages: true,
    pdptes: None,
};
const USER_READ: Access = Access::new(AccessKind::Read, Privilege::User);
const USER_WRITE: Access = Access::new(AccessKind::Write, Privilege::User);

/// Guest memory at 1 GiB of the host, contiguous in 2 MiB; the last 64 KiB are read-only.
struct Ram {
    _bytes: Vec<u64>,
    ram: GuestRam,
}

impl Ram {
    fn new() -> Self {
        let mut bytes = vec![0u64; (MEMORY / 8) as usize];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives as long as the structure and is not touched otherwise.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), MEMORY, true) }.unwrap();
        Self { _bytes: bytes, ram }
    }

    fn race(&self, race: Race) {
        let data = &race.data[..race.bytes];
        self.ram.write(Gpa(race.gpa), data).unwrap();
    }
}

impl Backing for Ram {
    fn find(&self, gpa: Gpa) -> Option<Backed> {
        let writable = gpa.0 < MEMORY - 0x1_0000;
        let shift = if gpa.0 < 2 << 20 { 21 } else { 12 };
        (gpa.0 < MEMORY).then_some(Backed {
            address: Hpa(HOST + gpa.0),
            shift,
            writable,
        })
    }
}

/// What another virtual processor writes to a page that it could write before a call took the right,
/// until the call's token has made it forget.
#[derive(Clone, Copy, Debug)]
struct Race {
    gpa: u64,
    data: [u8; 8],
    bytes: usize,
}

/// A guest with one virtual processor.
struct Guest<'a> {
    memory: Ram,
    pool: &'a FramePool,
    mmu: ShadowMmu<&'a FramePool>,
    processor: ShadowRoot,
    state: PagingState,
    cr3: u64,
    race: Option<Race>,
    /// The guest has written to a table unseen since it loaded CR3.
    stale: bool,
}

impl<'a> Guest<'a> {
    fn new(pool: &'a FramePool, state: PagingState) -> Self {
        let mut guest = Self {
            memory: Ram::new(),
            pool,
            mmu: ShadowMmu::new(pool, 48),
            processor: ShadowRoot::default(),
            state,
            cr3: 0,
            race: None,
            stale: false,
        };
        guest.load();
        guest
    }

    fn load(&mut self) {
        if self.state.mode() == Mode::Pae {
            // The processor has loaded the four pointers with CR3.
            let root = self.state.cr3;
            let pointers =
                [0, 8, 16, 24].map(|at| self.get(root + at) & (0xFF_FFFF_F000 | PRESENT));
            self.state.pdptes = Some(pointers);
        }
        let race = self.race_to_come();
        let loaded = self
            .mmu
            .load(&mut self.processor, &self.memory.ram, &self.state);
        let loaded = loaded.unwrap();
        self.stale = race.is_some() && loaded.scope().is_some();
        if let Some(race) = race.filter(|_| self.stale) {
            self.memory.race(race);
        }
        self.cr3 = loaded.discharge(&mut NoHardware);
    }

    /// The write that another processor makes during the next flush, if it can write there until then.
    fn race_to_come(&mut self) -> Option<Race> {
        let frame = self.race?.gpa >> 12;
        let pages = &self.mmu.pages;
        let watched = pages.is_table(frame) && !pages.is_out_of_step(frame);
        if watched { None } else { self.race.take() }
    }

    fn set(&mut self, gpa: u64, entry: u64) {
        self.memory.ram.store_u64(Gpa(gpa), entry).unwrap();
        self.mmu.written(Gpa(gpa), 8).discharge(&mut NoHardware);
    }

    fn get(&self, gpa: u64) -> u64 {
        self.memory.ram.load_u64(Gpa(gpa)).unwrap()
    }

    fn fault(&mut self, gva: u64, access: Access) -> Outcome {
        let race = self.race_to_come();
        let fault = self.mmu.fault(
            &self.processor,
            &self.memory.ram,
            &self.memory,
            &self.state,
            Gva(gva),
            access,
        );
        let fault = fault.unwrap();
        if let Some(race) = race.filter(|_| fault.scope().is_some()) {
            self.memory.race(race);
            self.stale = true;
        }
        fault.discharge(&mut NoHardware)
    }

    /// What the processor does with the shadow tables: with CR0.WP set whatever the guest has.
    fn hardware(&self, gva: u64, access: Access) -> Option<u64> {
        let long = self.state.mode().is_long();
        let mut level = if long { self.state.mode().levels() } else { 3 };
        let mut table = self.cr3;
        let mut entry = ALL;
        loop {
            let entries = if level == 3 && !long { 4 } else { 512 };
            let shift = 3 + 9 * u32::from(level);
            let index = (gva >> shift) & (entries - 1);
            let next = self.pool.load(Hpa(table + index * 8));
            if next & PRESENT == 0 {
                return None;
            }
            if entries == 4 {
                assert_eq!(next & 0x1E6, 0, "reserved in a pointer of PAE paging");
            } else {
                entry = (entry & next & (W | U)) | ((entry | next) & NO_EXECUTE);
                if level == 1 || next & LARGE != 0 {
                    let inside = (1 << shift) - 1;
                    let frame = next & 0x000F_FFFF_FFFF_F000 & !inside;
                    return self.allows(entry, access).then_some(frame | (gva & inside));
                }
            }
            table = next & 0x000F_FFFF_FFFF_F000;
            level -= 1;
        }
    }

    fn allows(&self, entry: u64, access: Access) -> bool {
        let by_user = access.privilege == Privilege::User;
        let smep = self.state.cr4 & 1 << 20 != 0 && self.state.mode() != Mode::Off;
        (!by_user || entry & U != 0)
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => entry & W != 0,
                AccessKind::Fetch => {
                    entry & NO_EXECUTE == 0 && (by_user || entry & U == 0 || !smep)
                }
            }
    }

    /// An access as the guest makes it, with the faults on the way. `Ok` is where it went.
    fn access(&mut self, gva: u64, access: Access) -> Result<u64, Outcome> {
        for _ in 0..3 {
            if let Some(address) = self.hardware(gva, access) {
                return Ok(address);
            }
            match self.fault(gva, access) {
                Outcome::Resolved => {}
                other => return Err(other),
            }
        }
        panic!("{gva:#x} {access:?}: the fault is never resolved");
    }

    /// Every entry of every shadow: no way to write to a table that is watched, and each
    /// mapping on record.
    fn check(&self) {
        assert_eq!(self.pool.free_frames() + self.mmu.tables(), FRAMES);
        let mut mapped = 0;
        for page in self.mmu.pages.by_age() {
            let page = &self.mmu.pages[page];
            for index in 0..512 {
                let entry = self.pool.load(page.entry(index));
                let slot = page.slot(index);
                assert_eq!(entry & PRESENT != 0, slot.child != Child::Absent);
                if let Child::Memory(frame) = slot.child {
                    mapped += 1;
                    let count = 1 << (9 * (page.key.level - 1));
                    for frame in frame..frame + count {
                        let pages = &self.mmu.pages;
                        let watched = pages.is_table(frame) && !pages.is_out_of_step(frame);
                        assert!(
                            entry & W == 0 || !watched,
                            "table {frame:#x} can be written"
                        );
                    }
                }
            }
        }
        assert_eq!(mapped, self.mmu.mapped());
    }
}

/// Tables at 0x1000 to 0x4000; linear page `n` below 2 MiB has its entry at `0x4000 + 8 * n`.
fn long_guest(pool: &FramePool) -> Guest<'_> {
    let mut guest = Guest::new(pool, LONG);
    for table in [0x1000, 0x2000, 0x3000] {
        guest.set(table, (table + 0x1000) | ALL);
    }
    guest
}

#[test]
fn faults_fill_the_shadow_and_emulate_accessed_and_dirty() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4008, 0x9000 | ALL);
    assert_eq!(guest.access(0x1234, USER_READ), Ok(HOST + 0x9234));
    assert_eq!(guest.get(0x4008), 0x9000 | ALL | A);
    assert_eq!(
        guest.hardware(0x1234, USER_WRITE),
        None,
        "the first write must be seen"
    );
    assert_eq!(guest.access(0x1234, USER_WRITE), Ok(HOST + 0x9234));
    assert_eq!(guest.get(0x4008), 0x9000 | ALL | A | D);
    guest.check();
}

#[test]
fn the_guests_own_faults_and_devices_are_told_apart() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4000, MEMORY | ALL);
    guest.set(0x4008, (MEMORY - 0x1000) | ALL);
    assert_eq!(
        guest.access(0x10, Access::READ),
        Err(Outcome::NotMemory(Gpa(MEMORY + 0x10)))
    );
    assert!(guest.access(0x1000, Access::READ).is_ok());
    let rom = Outcome::ReadOnly(Gpa(MEMORY - 0x1000));
    assert_eq!(guest.access(0x1000, Access::WRITE), Err(rom));
    let fault = PageFault {
        address: Gva(0x2000),
        code: PageFaultCode::WRITE | PageFaultCode::USER,
    };
    assert_eq!(
        guest.access(0x2000, USER_WRITE),
        Err(Outcome::Inject(fault))
    );
    assert_eq!(
        guest.access(1 << 60, USER_WRITE),
        Err(Outcome::NonCanonical)
    );
}

/// One frame, two roles: its shadow under a read-only directory entry must not serve a writable one,
/// nor the other way round.
#[test]
fn a_shadow_is_never_reused_in_another_role() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x3008, 0x4000 | PRESENT | U);
    guest.set(0x3010, 0x4000 | PRESENT | W | NO_EXECUTE);
    guest.set(0x4000, 0x9000 | ALL | D);
    assert_eq!(guest.access(0, USER_WRITE), Ok(HOST + 0x9000));
    assert!(matches!(
        guest.access(2 << 20, USER_WRITE),
        Err(Outcome::Inject(_))
    ));
    assert_eq!(guest.access(2 << 20, USER_READ), Ok(HOST + 0x9000));
    assert!(matches!(
        guest.access(4 << 20, USER_READ),
        Err(Outcome::Inject(_))
    ));
    assert!(matches!(
        guest.access(4 << 20, Access::FETCH),
        Err(Outcome::Inject(_))
    ));
    assert_eq!(guest.access(4 << 20, Access::WRITE), Ok(HOST + 0x9000));
    assert_eq!(guest.hardware(2 << 20, USER_WRITE), None);
    guest.check();
}

#[test]
fn a_frame_at_two_levels_has_two_shadows() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    // The last entry of the top table refers to itself.
    guest.set(0x1FF8, 0x1000 | ALL);
    let top = 0xFFFF_FFFF_FFFF_F000;
    assert_eq!(guest.access(top, Access::READ), Ok(HOST + 0x1000));
    assert_eq!(
        guest.access(top, Access::WRITE),
        Err(Outcome::TableWrite(Gpa(0x1000)))
    );
    guest.set(0x4000, 0x9000 | ALL);
    assert_eq!(guest.access(0, Access::READ), Ok(HOST + 0x9000));
    guest.set(0x1000, 0);
    assert!(matches!(
        guest.access(0, Access::READ),
        Err(Outcome::Inject(_))
    ));
    guest.check();
}

/// Giving up a table must leave the ones above alone, and the root that is in use above all.
#[test]
fn giving_up_a_table_leaves_parents_that_are_in_use() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x3008, 0x4000 | ALL);
    guest.set(0x4000, 0x9000 | ALL);
    guest.access(0, USER_READ).unwrap();
    guest.access(2 << 20, USER_READ).unwrap();
    let tables = guest.mmu.tables();
    // An odd write: the lowest table is no table any more.
    guest.mmu.written(Gpa(0x4001), 2).discharge(&mut NoHardware);
    assert_eq!(guest.mmu.tables(), tables - 1);
    guest.check();
    guest.access(2 << 20, USER_READ).unwrap();
    // The same for the root, which stays because the processor runs on it.
    guest.mmu.written(Gpa(0x1001), 2).discharge(&mut NoHardware);
    guest.check();
    assert_eq!(guest.hardware(0, USER_READ), None);
    assert_eq!(guest.access(0, USER_READ), Ok(HOST + 0x9000));
    guest.mmu.clear().discharge(&mut NoHardware);
    assert_eq!((guest.mmu.tables(), guest.mmu.mapped()), (1, 0));
    assert_eq!(guest.access(0, USER_READ), Ok(HOST + 0x9000));
}

#[test]
fn the_lowest_tables_go_out_of_step_until_the_guest_invalidates() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    // Linear page 2 is the table that maps it.
    guest.set(0x4010, 0x4000 | ALL | D);
    guest.set(0x4008, 0x9000 | ALL | D);
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0x9000));
    assert_eq!(guest.access(0x2008, Access::WRITE), Ok(HOST + 0x4008));
    assert!(guest.mmu.pages.is_out_of_step(4));
    // A silent write: the old translation may be used, and is gone after INVLPG.
    guest
        .memory
        .ram
        .store_u64(Gpa(0x4008), 0xA000 | ALL | D)
        .unwrap();
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0x9000));
    let flush = guest
        .mmu
        .invalidate_page(&guest.processor, &guest.memory.ram, Gva(0x1000));
    assert_eq!(flush.scope(), None, "other processors keep theirs");
    flush.discharge(&mut NoHardware);
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0xA000));
    // So it is after CR3 is loaded. The table has changed and stays writable.
    guest
        .memory
        .ram
        .store_u64(Gpa(0x4008), 0xB000 | ALL | D)
        .unwrap();
    guest.load();
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0xB000));
    assert!(guest.mmu.pages.is_out_of_step(4));
    // Left alone until the next load, it is watched again.
    guest.load();
    assert!(!guest.mmu.pages.is_out_of_step(4));
    assert_eq!(guest.hardware(0x2008, Access::WRITE), None);
    guest.check();
}

#[test]
fn upper_tables_are_never_written_unseen() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4018, 0x3000 | ALL | D);
    let write = Outcome::TableWrite(Gpa(0x3000));
    for _ in 0..2 {
        assert_eq!(guest.access(0x3000, Access::WRITE), Err(write));
    }
    // Many writes without a use: it was a table once.
    for n in 0..u64::from(FLOOD) {
        guest
            .mmu
            .written(Gpa(0x3100 + n * 8), 8)
            .discharge(&mut NoHardware);
    }
    assert!(!guest.mmu.pages.is_table(3));
    guest.check();
}

#[test]
fn a_table_that_is_released_can_be_written_and_is_followed_again() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    // Linear pages 1 and 2 are the directory that maps them and the root.
    for (at, table) in [(0x4008, 0x3000), (0x4010, 0x1000)] {
        guest.set(at, table | ALL | D);
    }
    guest.set(0x4018, 0x9000 | ALL | D);
    assert_eq!(guest.access(0x3000, USER_READ), Ok(HOST + 0x9000));
    for (page, table) in [(0x1000, 0x3000), (0x2000, 0x1000)] {
        let write = Outcome::TableWrite(Gpa(table));
        assert_eq!(guest.access(page, Access::WRITE), Err(write));
        let released = guest.mmu.release(Gpa(table));
        assert!(released.discharge(&mut NoHardware));
        assert_eq!(guest.access(page, Access::WRITE), Ok(HOST + table));
        guest.check();
    }
    assert!(!guest.mmu.release(Gpa(0x9000)).discharge(&mut NoHardware));
    assert_eq!(guest.hardware(0x1000, Access::WRITE), Some(HOST + 0x3000));
    // What the guest writes to its root counts once it invalidates, be it another page.
    assert_eq!(guest.access(0x3000, USER_READ), Ok(HOST + 0x9000));
    guest.memory.ram.store_u64(Gpa(0x1000), 0).unwrap();
    let flush = guest
        .mmu
        .invalidate_page(&guest.processor, &guest.memory.ram, Gva(0x7000));
    flush.discharge(&mut NoHardware);
    assert_eq!(guest.hardware(0x3000, USER_READ), None);
    assert!(matches!(
        guest.access(0x3000, USER_READ),
        Err(Outcome::Inject(_))
    ));
    guest
        .memory
        .ram
        .store_u64(Gpa(0x1000), 0x2000 | ALL)
        .unwrap();
    guest.load();
    assert!(guest.mmu.pages.all_released().is_empty());
    assert_eq!(guest.access(0x3000, USER_READ), Ok(HOST + 0x9000));
    assert_eq!(guest.hardware(0x1000, Access::WRITE), None);
    guest.check();
}

#[test]
fn what_may_linger_is_flushed_before_a_page_is_watched() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4000, 0x5000 | ALL | D);
    assert_eq!(guest.access(0, USER_WRITE), Ok(HOST + 0x5000));
    // Dropped here; another processor may still write to page 5 by what it has cached.
    guest.memory.ram.store_u64(Gpa(0x4000), 0).unwrap();
    let flush = guest
        .mmu
        .invalidate_page(&guest.processor, &guest.memory.ram, Gva(0));
    flush.discharge(&mut NoHardware);
    guest.set(0x3008, 0x5000 | ALL);
    guest
        .memory
        .ram
        .store_u64(Gpa(0x5000), 0x9000 | ALL)
        .unwrap();
    let flush = guest.mmu.fault(
        &guest.processor,
        &guest.memory.ram,
        &guest.memory,
        &guest.state,
        Gva(2 << 20),
        USER_READ,
    );
    let flush = flush.unwrap();
    assert!(flush.scope().is_some(), "page 5 is a table now");
    flush.discharge(&mut NoHardware);
    let flush = guest.mmu.forget(Gpa(0xA000), 0x1000);
    assert_eq!(flush.scope(), None, "nothing lingers any more");
    flush.discharge(&mut NoHardware);
}

/// Another processor writes to a table between the moment at which it is read and write-protected and
/// the end of the flush. Its INVLPG, or this processor's, must find the entry that was read.
#[test]
fn what_is_written_before_the_flush_is_over_is_not_missed() {
    for load in [false, true] {
        let pool = FramePool::new(FRAMES);
        let mut guest = long_guest(&pool);
        // Linear pages 0 and 1: page 5, which then is the table of the second 2 MiB, and itself.
        guest.set(0x4000, 0x5000 | ALL | D);
        assert_eq!(guest.access(0, USER_WRITE), Ok(HOST + 0x5000));
        guest.set(0x3008, 0x5000 | ALL);
        guest.set(0x5000, 0x9000 | ALL | D);
        let silent = |entry: u64| Race {
            gpa: 0x5000,
            data: (entry | ALL | D).to_le_bytes(),
            bytes: 8,
        };
        guest.race = Some(silent(0xA000));
        assert_eq!(guest.access(2 << 20, USER_READ), Ok(HOST + 0x9000));
        assert!(guest.stale && guest.hardware(0, USER_WRITE).is_none());
        let invalidate = |guest: &mut Guest<'_>| {
            if load {
                guest.load();
            } else {
                // Of another page: the processor's own paging-structure caches are gone with it.
                let (processor, memory) = (&guest.processor, &guest.memory.ram);
                let flush = guest.mmu.invalidate_page(processor, memory, Gva(2 << 20));
                flush.discharge(&mut NoHardware);
            }
        };
        invalidate(&mut guest);
        assert_eq!(guest.access(2 << 20, USER_READ), Ok(HOST + 0xA000));
        // The same when a table that was out of step is watched again.
        assert_eq!(guest.access(0, USER_WRITE), Ok(HOST + 0x5000));
        assert!(guest.mmu.pages.is_out_of_step(5));
        guest.race = Some(silent(0xB000));
        guest.load();
        assert!(guest.stale && !guest.mmu.pages.is_out_of_step(5));
        assert_eq!(guest.access(2 << 20, USER_READ), Ok(HOST + 0xA000));
        invalidate(&mut guest);
        assert_eq!(guest.access(2 << 20, USER_READ), Ok(HOST + 0xB000));
        guest.check();
    }
}

#[test]
fn a_page_that_becomes_a_table_is_protected_everywhere() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4000, 0x5000 | ALL | D);
    // The same memory again, through a page of 2 MiB.
    guest.set(0x3008, ALL | LARGE | D);
    assert_eq!(guest.access(0, USER_WRITE), Ok(HOST + 0x5000));
    assert_eq!(
        guest.access((2 << 20) + 0x20_0000 - 8, USER_WRITE),
        Ok(HOST + 0x1F_FFF8)
    );
    guest.check();
    guest.set(0x3010, 0x5000 | ALL);
    guest.set(0x5000, 0x9000 | ALL | D);
    assert_eq!(guest.access(4 << 20, USER_WRITE), Ok(HOST + 0x9000));
    assert_eq!(guest.hardware(0, USER_WRITE), None);
    assert_eq!(guest.hardware((2 << 20) + 0x5000, USER_WRITE), None);
    guest.check();
}

#[test]
fn large_pages_are_used_where_no_table_lies_in_them() {
    let pool = FramePool::new(FRAMES);
    let mut guest = Guest::new(
        &pool,
        PagingState {
            cr3: 0x20_1000,
            ..LONG
        },
    );
    guest.set(0x20_1000, 0x20_2000 | ALL);
    guest.set(0x20_2000, 0x20_3000 | ALL);
    guest.set(0x20_3000, ALL | LARGE | D);
    guest.set(0x20_3008, 0x20_0000 | ALL | LARGE | D);
    guest.access(0x1234, USER_WRITE).unwrap();
    assert_eq!((guest.mmu.mapped(), guest.mmu.tables()), (1, 3));
    assert_eq!(guest.access(0x12_3456, USER_WRITE), Ok(HOST + 0x12_3456));
    assert_eq!(guest.mmu.mapped(), 1);
    // The second one holds the tables, and comes in small pages.
    assert_eq!(guest.access(0x20_4000, USER_WRITE), Ok(HOST + 0x20_4000));
    let table = Outcome::TableWrite(Gpa(0x20_3008));
    assert_eq!(guest.access(0x20_3008, USER_WRITE), Err(table));
    assert_eq!((guest.mmu.mapped(), guest.mmu.tables()), (2, 4));
    guest.check();
}

#[test]
fn without_write_protect_the_supervisor_writes_to_read_only_pages() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4008, 0x9000 | PRESENT | U);
    guest.state.cr0 &= !(1 << 16);
    guest.state.cr4 |= 1 << 20;
    guest.load();
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0x9000));
    assert_eq!(guest.access(0x1000, Access::WRITE), Ok(HOST + 0x9000));
    assert_eq!(guest.hardware(0x1000, USER_WRITE), None);
    assert!(matches!(
        guest.access(0x1000, USER_WRITE),
        Err(Outcome::Inject(_))
    ));
    assert!(matches!(
        guest.access(0x1000, Access::FETCH),
        Err(Outcome::Inject(_))
    ));
    assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0x9000));
    // With protection it is another role.
    guest.state.cr0 |= 1 << 16;
    guest.load();
    assert!(matches!(
        guest.access(0x1000, Access::WRITE),
        Err(Outcome::Inject(_))
    ));
    guest.check();
}

#[test]
fn old_roots_are_kept_and_old_tables_make_room() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4008, 0x9000 | ALL);
    guest.access(0x1000, USER_READ).unwrap();
    guest.set(0x10_0000, 0x2000 | ALL);
    guest.state.cr3 = 0x10_0000;
    guest.load();
    guest.state.cr3 = 0x1000;
    guest.load();
    assert_eq!(guest.hardware(0x1000, USER_READ), Some(HOST + 0x9000));
    for n in 1..60u64 {
        guest.state.cr3 = 0x10_0000 + n * 0x1000;
        guest.set(guest.state.cr3, 0x2000 | ALL);
        guest.load();
        assert_eq!(guest.access(0x1000, USER_READ), Ok(HOST + 0x9000));
        assert!(guest.mmu.tables() <= 48);
        guest.check();
    }
}

#[test]
fn without_frames_nothing_is_lost() {
    let pool = FramePool::new(3);
    let mut guest = long_guest(&pool);
    guest.set(0x4008, 0x9000 | ALL);
    let fault = guest.mmu.fault(
        &guest.processor,
        &guest.memory.ram,
        &guest.memory,
        &guest.state,
        Gva(0x1000),
        USER_READ,
    );
    assert_eq!(fault.map(|_| ()).unwrap_err(), ShadowError::OutOfFrames);
    guest.mmu.clear().discharge(&mut NoHardware);
    assert_eq!((pool.free_frames(), guest.mmu.tables()), (2, 1));
}

#[test]
fn memory_that_is_taken_away_is_forgotten() {
    let pool = FramePool::new(FRAMES);
    let mut guest = long_guest(&pool);
    guest.set(0x4000, 0x9000 | ALL | D);
    guest.set(0x4008, 0xA000 | ALL | D);
    guest.set(0x3008, ALL | LARGE | D);
    guest.access(0, USER_READ).unwrap();
    guest.access(0x1000, USER_READ).unwrap();
    guest.access((2 << 20) + 0xA000, USER_READ).unwrap();
    let flush = guest.mmu.forget(Gpa(0xA000), 0x1000);
    assert!(flush.scope().is_some());
    flush.discharge(&mut NoHardware);
    assert_eq!(guest.hardware(0x1000, USER_READ), None);
    assert_eq!(guest.hardware((2 << 20) + 0xA000, USER_READ), None);
    assert!(guest.hardware(0, USER_READ).is_some());
    guest.check();
}

const MODES: [PagingState; 5] = [
    LONG,
    PagingState {
        cr4: 0x20 | 1 << 12,
        ..LONG
    },
    PagingState {
        efer: 0x800,
        ..LONG
    },
    PagingState {
        cr4: 0x10,
        efer: 0,
        ..LONG
    },
    PagingState {
        cr0: 1,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..LONG
    },
];

#[derive(Clone, Debug)]
enum Op {
    Entry {
        table: u64,
        index: u64,
        to: u64,
        bits: u64,
        large: bool,
    },
    Access {
        gva: u64,
        access: Access,
        invlpg: bool,
    },
    Load {
        root: u64,
    },
    Controls {
        write_protect: bool,
        smep: bool,
    },
    Forget {
        frame: u64,
    },
    Release {
        table: u64,
    },
    Junk {
        table: u64,
        offset: u64,
    },
    Race {
        table: u64,
        index: u64,
        to: u64,
        bits: u64,
    },
}

/// An entry for the guest's mode and where it lies. Legacy tables reach the same addresses with other
/// indices.
fn entry(mode: Mode, (table, index): (u64, u64), (to, bits): (u64, u64), large: bool) -> Race {
    let rights = [PRESENT, W, U, NO_EXECUTE, D];
    let mut entry = to << 12 | PRESENT;
    for (bit, right) in rights.into_iter().enumerate() {
        entry |= if bits >> bit & 1 != 0 { right } else { 0 };
    }
    if mode == Mode::Pae && table < 4 {
        // So that pointers are often valid.
        entry &= !(W | U | A | D | NO_EXECUTE);
    }
    if large {
        entry = entry & !0xF000 | LARGE;
    }
    let legacy = mode == Mode::Legacy;
    let bytes = if legacy { 4 } else { 8 };
    let index = if legacy && index == 3 { 256 } else { index };
    Race {
        gpa: (table << 12) + index * bytes as u64,
        data: entry.to_le_bytes(),
        bytes,
    }
}

fn op() -> impl Strategy<Value = Op> {
    let kinds = vec![AccessKind::Read, AccessKind::Write, AccessKind::Fetch];
    let by = vec![Privilege::User, Privilege::Supervisor];
    let access = (prop::sample::select(kinds), prop::sample::select(by));
    prop_oneof![
        8 => (1..7u64, 0..4u64, 1..12u64, 0..32u64, prop::bool::weighted(0.1))
            .prop_map(|(table, index, to, bits, large)| Op::Entry { table, index, to, bits, large }),
        12 => (0..4u64, 0..4u64, 0..4u64, access, any::<bool>()).prop_map(|(a, b, c, (kind, by), invlpg)| {
            let gva = a << 30 | b << 21 | c << 12 | 0x18;
            Op::Access { gva, access: Access::new(kind, by), invlpg }
        }),
        1 => (1..4u64).prop_map(|root| Op::Load { root }),
        1 => (any::<bool>(), any::<bool>())
            .prop_map(|(write_protect, smep)| Op::Controls { write_protect, smep }),
        1 => (0..12u64).prop_map(|frame| Op::Forget { frame }),
        1 => (1..7u64).prop_map(|table| Op::Release { table }),
        1 => (1..7u64, 0..0xFFEu64).prop_map(|(table, offset)| Op::Junk { table, offset }),
        2 => (1..7u64, 0..4u64, 1..12u64, 0..32u64)
            .prop_map(|(table, index, to, bits)| Op::Race { table, index, to, bits }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the guest does to tables in frames 1 to 6, that refer to one another as they like:
    /// hardware on the shadow goes where the guest's own paging goes, and nowhere else.
    #[test]
    fn the_shadow_does_what_the_guests_tables_say(
        mode in prop::sample::select(MODES.to_vec()),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let pool = FramePool::new(FRAMES);
        let mut guest = Guest::new(&pool, mode);
        for op in ops {
            match op {
                Op::Entry { table, index, to, bits, large } => {
                    let new = entry(mode.mode(), (table, index), (to, bits), large);
                    guest.memory.race(new);
                    // Written unseen wherever hardware would let the guest.
                    let pages = &guest.mmu.pages;
                    if pages.is_table(table) && !pages.is_out_of_step(table) {
                        let written = guest.mmu.written(Gpa(new.gpa), new.bytes as u64);
                        written.discharge(&mut NoHardware);
                    } else {
                        guest.stale |= pages.is_table(table);
                    }
                }
                Op::Race { table, index, to, bits } => {
                    guest.race = Some(entry(mode.mode(), (table, index), (to, bits), false));
                }
                Op::Release { table } => {
                    guest.mmu.release(Gpa(table << 12)).discharge(&mut NoHardware);
                }
                Op::Junk { table, offset } => {
                    let at = (table << 12) + offset;
                    guest.memory.ram.write(Gpa(at), &[0, 0]).unwrap();
                    guest.mmu.written(Gpa(at), 2).discharge(&mut NoHardware);
                }
                Op::Access { gva, access, invlpg } => {
                    if guest.stale && invlpg {
                        let flush = guest.mmu.invalidate_page(&guest.processor, &guest.memory.ram, Gva(gva));
                        flush.discharge(&mut NoHardware);
                    } else {
                        while guest.stale {
                            guest.load();
                        }
                    }
                    let before = look_up(&guest.memory.ram, &guest.state, Gva(gva), access, |gpa, _| {
                        Ok::<_, Infallible>(gpa)
                    });
                    let raced = guest.race.is_some();
                    match (guest.access(gva, access), before) {
                        // Either is right, if a write came in between.
                        _ if raced && guest.race.is_none() => {}
                        (Ok(address), Ok(found)) => prop_assert_eq!(address, HOST + found.gpa.0),
                        (Err(Outcome::Inject(fault)), Err(WalkError::Fault(expected))) => {
                            prop_assert_eq!(fault, expected);
                        }
                        (Err(Outcome::NotMemory(gpa) | Outcome::TableWrite(gpa)), Ok(found)) => {
                            prop_assert_eq!(gpa, found.gpa);
                        }
                        (Err(outcome), Err(_)) => prop_assert!(!matches!(outcome, Outcome::Resolved)),
                        (found, expected) => {
                            prop_assert!(false, "{:#x} {:?}: {:x?} {:x?}", gva, access, found, expected);
                        }
                    }
                }
                Op::Load { root } => {
                    guest.state.cr3 = if mode.mode() == Mode::Off { 0 } else { root << 12 };
                    guest.load();
                }
                Op::Controls { write_protect, smep } => {
                    let bit = |set, bit: u32| if set { 1u64 << bit } else { 0 };
                    guest.state.cr0 = guest.state.cr0 & !(1 << 16) | bit(write_protect, 16);
                    guest.state.cr4 = guest.state.cr4 & !(1 << 20) | bit(smep, 20);
                    guest.load();
                }
                Op::Forget { frame } => {
                    guest.mmu.forget(Gpa(frame << 12), 0x1000).discharge(&mut NoHardware);
                }
            }
            guest.check();
        }
    }
}
