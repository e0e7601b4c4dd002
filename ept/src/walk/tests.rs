#![allow(unsafe_code)]

use core::cell::Cell;
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use testudo_arch::memory::GuestRam;

use super::*;

/// 64 KiB of guest memory at zero.
struct Memory {
    _bytes: Vec<u64>,
    ram: GuestRam,
}

impl Memory {
    fn new() -> Self {
        let mut bytes = vec![0u64; 0x2000];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives as long as the structure and is not touched otherwise.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), 0x1_0000, true) }.unwrap();
        Self { _bytes: bytes, ram }
    }

    fn set(&self, at: u64, entry: u64) -> &Self {
        self.ram.store_u64(Gpa(at), entry).unwrap();
        self
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.load_u64(Gpa(at)).unwrap()
    }
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const NX: u64 = 1 << 63;

const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const LA57: u64 = 1 << 12;
const PKS: u64 = 1 << 24;

const USER_READ: Access = Access::new(AccessKind::Read, Privilege::User);
const USER_WRITE: Access = Access::new(AccessKind::Write, Privilege::User);
const USER_FETCH: Access = Access::new(AccessKind::Fetch, Privilege::User);
const IMPLICIT_READ: Access = Access::new(AccessKind::Read, Privilege::Implicit);

fn long() -> PagingState {
    PagingState {
        cr0: 0x8000_0001 | WP,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0xD00,
        physical_bits: 40,
        ..PagingState::default()
    }
}

/// Four levels at 0x1000 to 0x4000 that map linear page 0 with the given leaf entry.
fn four_levels(leaf: u64) -> Memory {
    let memory = Memory::new();
    for table in [0x1000, 0x2000, 0x3000] {
        memory.set(table, (table + 0x1000) | P | W | U);
    }
    memory.set(0x4000, leaf);
    memory
}

fn code(memory: &Memory, state: &PagingState, gva: u64, access: Access) -> Option<u32> {
    match walk(&memory.ram, state, Gva(gva), access) {
        Ok(_) => None,
        Err(WalkError::Fault(fault)) => {
            assert_eq!(fault.address, Gva(gva));
            Some(fault.code.bits())
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn without_paging_addresses_are_physical_and_have_32_bits() {
    let memory = Memory::new();
    let state = PagingState::default();
    let found = walk(&memory.ram, &state, Gva(0x1_0000_1234), USER_WRITE).unwrap();
    assert_eq!((found.gpa, found.steps.len()), (Gpa(0x1234), 0));
}

#[test]
fn four_levels_translate_and_set_accessed_and_dirty() {
    let memory = four_levels(0x5000 | P | W | U);
    let found = walk(&memory.ram, &long(), Gva(0x123), Access::READ).unwrap();
    assert_eq!((found.gpa, found.shift), (Gpa(0x5123), 12));
    let levels: Vec<u8> = found.steps.iter().map(|step| step.level).collect();
    assert_eq!(levels, [4, 3, 2, 1]);
    assert_eq!(memory.get(0x1000), 0x2000 | P | W | U | A);
    assert_eq!(memory.get(0x4000), 0x5000 | P | W | U | A);
    walk(&memory.ram, &long(), Gva(0), Access::WRITE).unwrap();
    assert_eq!(memory.get(0x3000) & D, 0);
    assert_eq!(memory.get(0x4000) & D, D);
}

#[test]
fn a_fault_sets_no_bit() {
    let memory = four_levels(0x5000 | P | U);
    assert_eq!(code(&memory, &long(), 0, Access::WRITE), Some(3));
    assert_eq!(memory.get(0x1000) & A, 0);
    assert_eq!(memory.get(0x4000) & (A | D), 0);
}

#[test]
fn looking_up_changes_nothing() {
    let memory = four_levels(0x5000 | P | W);
    look_up(&memory.ram, &long(), Gva(0), Access::WRITE, |gpa, _| {
        Ok::<_, Infallible>(gpa)
    })
    .unwrap();
    assert_eq!(memory.get(0x4000), 0x5000 | P | W);
}

#[test]
fn five_levels() {
    let memory = Memory::new();
    let state = PagingState {
        cr4: 0x20 | LA57,
        ..long()
    };
    for table in [0x1000, 0x2000, 0x3000, 0x4000] {
        memory.set(table + 8, (table + 0x1000) | P | W | U);
    }
    memory.set(0x5008, 0x6000 | P);
    let gva = 1 << 48 | 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;
    let found = walk(&memory.ram, &state, Gva(gva | 7), Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa(0x6007));
    assert!(!found.user && !found.writable && found.executable);
    let four = walk(&memory.ram, &long(), Gva(gva), Access::READ);
    assert_eq!(four, Err(WalkError::NonCanonical(Gva(gva))));
}

#[test]
fn not_present_at_each_level() {
    for missing in [0x1000, 0x2000, 0x3000, 0x4000] {
        let memory = four_levels(0x5000 | P | W | U);
        // All other bits set, the reserved ones too: absent is absent.
        memory.set(missing, !P);
        assert_eq!(code(&memory, &long(), 0, USER_WRITE), Some(0b110));
        assert_eq!(code(&memory, &long(), 0, Access::READ), Some(0));
        assert_eq!(code(&memory, &long(), 0, USER_FETCH), Some(0b1_0100));
    }
}

#[test]
fn rights_are_those_of_every_level() {
    for level in [0x1000, 0x2000, 0x3000, 0x4000] {
        let memory = four_levels(0x5000 | P | W | U);
        let entry = memory.get(level);
        memory.set(level, entry & !U);
        assert_eq!(code(&memory, &long(), 0, USER_READ), Some(0b101));
        assert_eq!(code(&memory, &long(), 0, Access::READ), None);
        memory.set(level, entry & !W);
        assert_eq!(code(&memory, &long(), 0, USER_WRITE), Some(0b111));
        assert_eq!(code(&memory, &long(), 0, USER_READ), None);
        memory.set(level, entry | NX);
        assert_eq!(code(&memory, &long(), 0, USER_FETCH), Some(0b1_0101));
        assert_eq!(code(&memory, &long(), 0, Access::FETCH), Some(0b1_0001));
        assert_eq!(code(&memory, &long(), 0, USER_READ), None);
    }
}

#[test]
fn write_protect_binds_the_supervisor() {
    let memory = four_levels(0x5000 | P | U);
    assert_eq!(code(&memory, &long(), 0, Access::WRITE), Some(0b11));
    let lax = PagingState {
        cr0: 0x8000_0001,
        ..long()
    };
    assert_eq!(code(&memory, &lax, 0, Access::WRITE), None);
    assert_eq!(code(&memory, &lax, 0, USER_WRITE), Some(0b111));
}

#[test]
fn supervisor_mode_execution_prevention() {
    let memory = four_levels(0x5000 | P | W | U);
    let smep = PagingState {
        cr4: 0x20 | SMEP,
        ..long()
    };
    assert_eq!(code(&memory, &smep, 0, Access::FETCH), Some(0b1_0001));
    assert_eq!(code(&memory, &smep, 0, USER_FETCH), None);
    // One level that is not the user's makes it the supervisor's page.
    let entry = memory.get(0x2000);
    memory.set(0x2000, entry & !U);
    assert_eq!(code(&memory, &smep, 0, Access::FETCH), None);
}

#[test]
fn the_fetch_bit_is_reported_only_where_fetches_can_be_forbidden() {
    let memory = four_levels(0);
    let without = PagingState {
        efer: 0x500,
        ..long()
    };
    assert_eq!(code(&memory, &without, 0, Access::FETCH), Some(0));
    let smep = PagingState {
        cr4: 0x20 | SMEP,
        ..without
    };
    assert_eq!(code(&memory, &smep, 0, Access::FETCH), Some(0b1_0000));
}

#[test]
fn supervisor_mode_access_prevention() {
    let memory = four_levels(0x5000 | P | W | U);
    let smap = PagingState {
        cr4: 0x20 | SMAP,
        ..long()
    };
    let lifted = PagingState {
        alignment_check: true,
        ..smap
    };
    assert_eq!(code(&memory, &smap, 0, Access::READ), Some(0b1));
    assert_eq!(code(&memory, &smap, 0, Access::WRITE), Some(0b11));
    assert_eq!(code(&memory, &smap, 0, Access::FETCH), None);
    assert_eq!(code(&memory, &lifted, 0, Access::WRITE), None);
    assert_eq!(code(&memory, &lifted, 0, IMPLICIT_READ), Some(0b1));
    assert_eq!(code(&memory, &smap, 0, USER_WRITE), None);
}

#[test]
fn protection_keys() {
    let memory = four_levels(0x5000 | P | W | U | 5 << 59);
    let keys = |pkru| PagingState {
        cr4: 0x20 | PKE,
        pkru,
        ..long()
    };
    let (no_access, no_write) = (1 << 10, 1 << 11);
    assert_eq!(
        code(&memory, &keys(no_access), 0, USER_READ),
        Some(0b10_0101)
    );
    assert_eq!(
        code(&memory, &keys(no_access), 0, Access::READ),
        Some(0b10_0001)
    );
    assert_eq!(code(&memory, &keys(no_access), 0, USER_FETCH), None);
    assert_eq!(code(&memory, &keys(no_write), 0, USER_READ), None);
    assert_eq!(
        code(&memory, &keys(no_write), 0, USER_WRITE),
        Some(0b10_0111)
    );
    assert_eq!(
        code(&memory, &keys(no_write), 0, Access::WRITE),
        Some(0b10_0011)
    );
    let lax = PagingState {
        cr0: 0x8000_0001,
        ..keys(no_write)
    };
    assert_eq!(code(&memory, &lax, 0, Access::WRITE), None);
    assert_eq!(code(&memory, &keys(!(3 << 10)), 0, USER_WRITE), None);
    // The supervisor's pages have their own register.
    memory.set(0x4000, 0x5000 | P | W | 5 << 59);
    let supervisor = PagingState {
        cr4: 0x20 | PKS | PKE,
        pkrs: no_access,
        ..long()
    };
    assert_eq!(code(&memory, &supervisor, 0, Access::READ), Some(0b10_0001));
    assert_eq!(code(&memory, &keys(!0), 0, Access::READ), None);
}

#[test]
fn reserved_bits_of_long_mode() {
    let check = |at, entry, state: &PagingState, reserved: bool| {
        let memory = four_levels(0x5000 | P | W | U);
        memory.set(at, entry);
        let expected = reserved.then_some(0b1001);
        assert_eq!(
            code(&memory, state, 0, Access::READ),
            expected,
            "{at:#x} {entry:#x}"
        );
    };
    let state = long();
    for (at, next) in [
        (0x1000, 0x2000),
        (0x2000, 0x3000),
        (0x3000, 0x4000),
        (0x4000, 0x5000),
    ] {
        check(at, next | P | 1 << 40, &state, true);
        check(at, next | P | 1 << 51, &state, true);
        check(at, next | P | 0x7FF << 52, &state, false);
        let no_nx = PagingState {
            efer: 0x500,
            ..state
        };
        check(at, next | P | NX, &state, false);
        check(at, next | P | NX, &no_nx, true);
    }
    check(0x1000, 0x2000 | P | PS, &state, true);
    check(0x2000, P | PS, &state, false);
    check(0x2000, P | PS | 1 << 12, &state, false);
    for bit in 13..30 {
        check(0x2000, P | PS | 1 << bit, &state, true);
    }
    for bit in 13..21 {
        check(0x3000, P | PS | 1 << bit, &state, true);
    }
    let small = PagingState {
        gigabyte_pages: false,
        ..state
    };
    check(0x2000, P | PS, &small, true);
    check(0x3000, P | PS, &small, false);
}

#[test]
fn large_pages_of_long_mode() {
    let memory = four_levels(0);
    memory.set(0x3000, 0x60_0000 | P | PS | 1 << 12);
    let found = walk(&memory.ram, &long(), Gva(0x1F_FFFF), Access::READ).unwrap();
    assert_eq!((found.gpa, found.bytes()), (Gpa(0x7F_FFFF), 2 << 20));
    memory.set(0x2000, 0x80_4000_0000 | P | PS);
    let found = walk(&memory.ram, &long(), Gva(0x1234_5678), Access::READ).unwrap();
    assert_eq!((found.gpa, found.bytes()), (Gpa(0x80_5234_5678), 1 << 30));
}

fn legacy() -> PagingState {
    PagingState {
        cr0: 0x8000_0001 | WP,
        cr3: 0x1000,
        cr4: PSE,
        physical_bits: 36,
        ..PagingState::default()
    }
}

#[test]
fn legacy_paging_uses_32_bit_entries() {
    let memory = Memory::new();
    memory.ram.store_u32(Gpa(0x1000 + 4 * 3), 0x2007).unwrap();
    memory.ram.store_u32(Gpa(0x2000 + 4 * 5), 0x5003).unwrap();
    memory
        .ram
        .store_u32(Gpa(0x2000 + 4 * 6), 0xFFFF_FFFF)
        .unwrap();
    let gva = 3 << 22 | 5 << 12 | 0xABC;
    let found = walk(&memory.ram, &legacy(), Gva(gva), Access::WRITE).unwrap();
    assert_eq!((found.gpa, found.shift), (Gpa(0x5ABC), 12));
    assert_eq!(memory.ram.load_u32(Gpa(0x2000 + 4 * 5)), Ok(0x5063));
    assert_eq!(memory.ram.load_u32(Gpa(0x2000 + 4 * 6)), Ok(0xFFFF_FFFF));
    assert_eq!(code(&memory, &legacy(), gva, USER_READ), Some(0b101));
    // No bit is reserved in a 4 KiB entry, and none forbids fetches.
    let gva = 3 << 22 | 6 << 12;
    let found = walk(&memory.ram, &legacy(), Gva(gva), USER_FETCH).unwrap();
    assert_eq!(found.gpa, Gpa(0xFFFF_F000));
}

#[test]
fn pse_36_pages_reach_above_4_gib() {
    let memory = Memory::new();
    memory.ram.store_u32(Gpa(0x1004), 0x0081_E083).unwrap();
    let found = walk(
        &memory.ram,
        &legacy(),
        Gva(0x40_0000 | 0x12_3456),
        Access::READ,
    )
    .unwrap();
    assert_eq!((found.gpa, found.bytes()), (Gpa(0xF_0092_3456), 4 << 20));
    for bit in 17..22 {
        memory
            .ram
            .store_u32(Gpa(0x1004), 0x80_0083 | 1 << bit)
            .unwrap();
        assert_eq!(
            code(&memory, &legacy(), 0x40_0000, Access::READ),
            Some(0b1001)
        );
    }
    // Without CR4.PSE the size bit is ignored, and the entry refers to a table.
    let without = PagingState { cr4: 0, ..legacy() };
    memory.ram.store_u32(Gpa(0x1004), 0x2083).unwrap();
    memory.ram.store_u32(Gpa(0x2000), 0x7003).unwrap();
    let found = walk(&memory.ram, &without, Gva(0x40_0000), Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa(0x7000));
}

fn pae() -> PagingState {
    PagingState {
        cr0: 0x8000_0001 | WP,
        cr3: 0x1020,
        cr4: 0x20,
        efer: 0x800,
        physical_bits: 40,
        ..PagingState::default()
    }
}

#[test]
fn pae_paging() {
    let memory = Memory::new();
    memory.set(0x1020 + 8 * 3, 0x2001);
    memory.set(0x2000, 0x3007).set(0x3000, 0x80_0000_5007 | NX);
    memory.set(0x2008, 0x60_0087);
    let found = walk(&memory.ram, &pae(), Gva(0xC000_0123), USER_WRITE).unwrap();
    assert_eq!((found.gpa, found.shift), (Gpa(0x80_0000_5123), 12));
    assert!(found.user && found.writable && !found.executable);
    // The pointer table has no accessed bits.
    assert_eq!(memory.get(0x1020 + 8 * 3), 0x2001);
    assert_eq!(memory.get(0x2000), 0x3027);
    let found = walk(&memory.ram, &pae(), Gva(0xC020_0001), Access::READ).unwrap();
    assert_eq!((found.gpa, found.bytes()), (Gpa(0x60_0001), 2 << 20));
    // Bits 62:52 are reserved here, unlike in long mode.
    for bit in 52..63 {
        memory.set(0x2000, 0x3007 | 1 << bit);
        assert_eq!(
            code(&memory, &pae(), 0xC000_0000, Access::READ),
            Some(0b1001)
        );
    }
    memory.set(0x1020 + 8 * 3, 0x2003);
    assert_eq!(
        code(&memory, &pae(), 0xC000_0000, Access::READ),
        Some(0b1001)
    );
}

#[test]
fn pae_pointer_registers_stand_for_the_table() {
    let memory = Memory::new();
    memory.set(0x1020, 0xBAD0_0000 | P);
    memory.set(0x2000, 0x3007).set(0x3000, 0x5007);
    let state = PagingState {
        pdptes: Some([0x2001, 0, 0, 0]),
        ..pae()
    };
    let found = walk(&memory.ram, &state, Gva(0), Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa(0x5000));
    assert_eq!(code(&memory, &state, 0x4000_0000, Access::READ), Some(0));
}

#[test]
fn a_table_outside_memory_is_told() {
    let memory = four_levels(0);
    memory.set(0x2000, 0x20_0000 | P);
    let error = walk(&memory.ram, &long(), Gva(0), Access::READ).unwrap_err();
    assert!(matches!(error, WalkError::NoTable(fault) if fault.gpa == Gpa(0x20_0000)));
}

#[test]
fn tables_that_refer_to_themselves_end() {
    let memory = Memory::new();
    memory.set(0x1000, 0x1000 | P | W | U);
    let found = walk(&memory.ram, &long(), Gva(0x18), Access::WRITE).unwrap();
    assert_eq!(found.gpa, Gpa(0x1018));
    assert_eq!(memory.get(0x1000), 0x1000 | P | W | U | A | D);
}

#[test]
fn the_second_stage_sees_every_entry_and_may_refuse() {
    let memory = Memory::new();
    // The guest's 0x1000 is our 0x8000, and so on.
    for (table, next) in [
        (0x8000, 0x2000),
        (0x9000, 0x3000),
        (0xA000, 0x4000),
        (0xB000, 0x5000),
    ] {
        memory.set(table, next | P | W | U);
    }
    let uses = std::cell::RefCell::new(Vec::new());
    let stage = |gpa: Gpa, table_use| {
        uses.borrow_mut().push((gpa.0, table_use));
        if gpa.0 == 0x6000 {
            Err("no")
        } else {
            Ok(Gpa(gpa.0 + 0x7000))
        }
    };
    let found = walk_nested(&memory.ram, &long(), Gva(0x10), Access::READ, stage).unwrap();
    assert_eq!(found.gpa, Gpa(0x5010));
    let expected = [0x1000, 0x2000, 0x3000, 0x4000];
    let loads = expected.map(|gpa| (gpa, TableUse::Load));
    let updates = expected.map(|gpa| (gpa, TableUse::Update));
    assert_eq!(*uses.borrow(), [loads, updates].concat());
    memory.set(0xA000, 0x6000 | P | W | U);
    let error = walk_nested(&memory.ram, &long(), Gva(0), Access::READ, stage).unwrap_err();
    let gpa = Gpa(0x6000);
    assert_eq!(error, WalkError::SecondStage { gpa, error: "no" });
}

#[test]
fn an_entry_that_changes_under_the_walk_is_read_again() {
    let memory = four_levels(0x5000 | P | W | U);
    let changed = Cell::new(false);
    let stage = |gpa: Gpa, table_use| {
        if table_use == TableUse::Update && !changed.replace(true) {
            memory.set(0x4000, 0x7000 | P | W | U);
        }
        Ok::<_, Infallible>(gpa)
    };
    let found = walk_nested(&memory.ram, &long(), Gva(0), Access::WRITE, stage).unwrap();
    assert_eq!(found.gpa, Gpa(0x7000));
    assert_eq!(memory.get(0x4000) & D, D);
}

#[test]
fn a_guest_that_never_stops_changing_ends_the_walk() {
    let memory = four_levels(0x5000 | P | W | U);
    let count = Cell::new(0u64);
    let stage = |gpa: Gpa, table_use| {
        if table_use == TableUse::Update && gpa.0 == 0x4000 {
            count.set(count.get() + 1);
            memory.set(0x4000, (0x5000 + (count.get() << 12)) | P | W | U);
        }
        Ok::<_, Infallible>(gpa)
    };
    let result = walk_nested(&memory.ram, &long(), Gva(0), Access::WRITE, stage);
    assert_eq!(result, Err(WalkError::Contended));
    assert_eq!(count.get(), u64::from(MAX_RESTARTS));
}

#[test]
fn bits_that_another_processor_sets_do_no_harm() {
    let memory = four_levels(0x5000 | P | W | U);
    let stage = |gpa: Gpa, table_use| {
        if table_use == TableUse::Update {
            memory.set(gpa.0, memory.get(gpa.0) | A | D);
        }
        Ok::<_, Infallible>(gpa)
    };
    let found = walk_nested(&memory.ram, &long(), Gva(0), Access::READ, stage).unwrap();
    assert_eq!(found.leaf().unwrap().entry, 0x5000 | P | W | U);
}

proptest! {
    /// Whatever the guest's registers and tables hold: an answer, the low bits kept, and the
    /// answer of a second walk the same.
    #[test]
    fn any_guest_gets_an_answer(
        entries in prop::collection::vec((0u64..0x2000, any::<u64>(), 0u64..16), 0..64),
        cr0 in any::<u64>(), cr3 in any::<u64>(), cr4 in any::<u64>(), efer in any::<u64>(),
        gva in any::<u64>(), near in any::<bool>(), physical_bits in any::<u8>(),
        kind in 0..3, privilege in 0..3,
    ) {
        let memory = Memory::new();
        for (at, entry, next) in entries {
            // Half of the entries lead to memory.
            let entry = if entry & 2 == 0 { entry } else { (entry & 0xFFF) | next << 12 };
            memory.set(at * 8, entry);
        }
        let state = PagingState {
            cr0: cr0 | 0x8000_0000, cr3: cr3 & 0xF000, cr4, efer, physical_bits,
            ..PagingState::default()
        };
        let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][kind as usize];
        let by = [Privilege::User, Privilege::Supervisor, Privilege::Implicit][privilege as usize];
        let gva = Gva(if near { gva & 0x3FFF_FFFF } else { gva });
        let first = walk(&memory.ram, &state, gva, Access::new(kind, by));
        if let Ok(found) = &first {
            let mask = found.bytes() - 1;
            prop_assert_eq!(found.gpa.0 & mask, gva.0 & mask);
        }
        let strip = |r: Result<GuestTranslation, WalkError>| r.map(|found| found.gpa);
        let again = walk(&memory.ram, &state, gva, Access::new(kind, by));
        // Tables that map themselves may change by their own accessed bits.
        if !matches!(first, Err(WalkError::Contended)) && again.is_ok() {
            prop_assert_eq!(strip(first), strip(again));
        }
    }
}
