//! Second-stage tables that a guest has written.
#![allow(unsafe_code)]

use proptest::prelude::*;
use testudo_arch::Gpa;
use testudo_arch::memory::{GuestMemory, GuestRam};
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::format::npt::Npt;
use testudo_ept::format::vtd::Vtd;
use testudo_ept::guest_table::{GuestPage, GuestTable, TableFault};
use testudo_ept::{Format, Rights};

const READ: Rights = Rights::READ;
const WRITE: Rights = Rights::READ.union(Rights::WRITE);

/// 64 KiB at zero.
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

    fn set(&self, at: u64, entry: u64) {
        self.ram.store_u64(Gpa(at), entry).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.load_u64(Gpa(at)).unwrap()
    }

    fn translate<F: Format<Input = Gpa>>(
        &self,
        format: F,
        address: u64,
        access: Rights,
    ) -> Result<GuestPage<F::Flags>, TableFault> {
        GuestTable::new(&self.ram, format, Gpa(0x1000)).translate(Gpa(address), access)
    }
}

/// EPT's tables at 0x1000 to 0x4000.
fn extended(leaf: u64) -> Memory {
    let memory = Memory::new();
    for table in [0x1000, 0x2000, 0x3000] {
        memory.set(table, (table + 0x1000) | 7);
    }
    memory.set(0x4000, leaf);
    memory
}

#[test]
fn accessed_and_dirty_are_set_only_where_they_are_enabled() {
    let memory = extended(0x9037);
    let found = memory.translate(Ept::new(40), 0x123, WRITE).unwrap();
    assert_eq!(
        (found.gpa, found.rights, found.dirty),
        (Gpa(0x9123), Rights::all(), true)
    );
    assert_eq!(memory.get(0x4000), 0x9037);
    let marking = Ept::new(40).with_accessed_dirty();
    let found = memory.translate(marking, 0, READ).unwrap();
    assert!(!found.dirty);
    assert_eq!((memory.get(0x1000), memory.get(0x4000)), (0x2107, 0x9137));
    assert!(memory.translate(marking, 0, WRITE).unwrap().dirty);
    assert_eq!((memory.get(0x3000), memory.get(0x4000)), (0x4107, 0x9337));
}

#[test]
fn rights_are_those_of_every_level() {
    let memory = extended(0x9037);
    memory.set(0x2000, 0x3000 | 5);
    assert_eq!(
        memory.translate(Ept::new(40), 0, WRITE),
        Err(TableFault::Denied {
            rights: Rights::all() - Rights::WRITE
        })
    );
    let found = memory.translate(Ept::new(40), 0, READ).unwrap();
    assert!(found.flags.contains(EptFlags::WRITE) && !found.rights.contains(Rights::WRITE));
    // In a nested table, an entry that is not the user's lets nothing through.
    let memory = Memory::new();
    for table in [0x1000, 0x2000, 0x3000] {
        memory.set(table, (table + 0x1000) | 7);
    }
    memory.set(0x4000, 0x9003);
    let denied = TableFault::Denied {
        rights: Rights::empty(),
    };
    assert_eq!(memory.translate(Npt::new(40), 0, READ), Err(denied));
}

#[test]
fn misconfigurations_and_absent_entries_name_their_level() {
    let memory = extended(0x9037);
    memory.set(0x3000, 0x4000 | 6);
    let reserved = |level| Err(TableFault::Reserved { level });
    assert_eq!(memory.translate(Ept::new(40), 0, READ), reserved(2));
    memory.set(0x3000, 0);
    let absent = |level| Err(TableFault::Absent { level });
    assert_eq!(memory.translate(Ept::new(40), 0, READ), absent(2));
    assert_eq!(memory.translate(Ept::new(40), 1 << 48, READ), absent(4));
    memory.set(0x3000, 0x70_2087);
    assert_eq!(memory.translate(Ept::new(40), 0, READ), reserved(2));
}

const AMD_RW: u64 = 3 << 61 | 1;

#[test]
fn amds_entries_may_skip_levels_where_the_address_has_zeros() {
    let memory = Memory::new();
    let format = AmdVi::new(4, 48);
    // From level 4 to a table of level 1 at once.
    memory.set(0x1000, 0x2000 | 1 << 9 | AMD_RW);
    memory.set(0x2028, 0x9000 | AMD_RW);
    let found = memory.translate(format, 0x5678, WRITE).unwrap();
    assert_eq!((found.gpa, found.steps.len()), (Gpa(0x9678), 2));
    let absent = Err(TableFault::Absent { level: 4 });
    for skipped in [1 << 21, 1 << 29, 1 << 30, 1 << 38] {
        assert_eq!(
            memory.translate(format, 0x5678 | skipped, READ),
            absent,
            "{skipped:#x}"
        );
    }
    // Never up again, nor sideways: such a table would go on for ever.
    memory.set(0x1000, 0x1000 | 4 << 9 | AMD_RW);
    assert_eq!(
        memory.translate(format, 0, READ),
        Err(TableFault::Reserved { level: 4 })
    );
}

#[test]
fn amds_pages_have_every_size() {
    let memory = Memory::new();
    let format = AmdVi::new(2, 48);
    memory.set(0x1000, 0x2000 | 1 << 9 | AMD_RW);
    for entry in 0..16 {
        memory.set(0x2000 + entry * 8, 0x10_7000 | 7 << 9 | AMD_RW);
    }
    let found = memory.translate(format, 0xABCD, READ).unwrap();
    assert_eq!((found.gpa, found.shift), (Gpa(0x10_ABCD), 16));
    memory.set(0x1008, 0x40_0000 | AMD_RW);
    let found = memory
        .translate(format, 0x20_0000 | 0x1_2345, READ)
        .unwrap();
    assert_eq!((found.gpa, found.shift), (Gpa(0x41_2345), 21));
}

proptest! {
    /// Whatever a guest writes: an answer that keeps the offset, or a typed fault.
    #[test]
    fn any_table_gets_an_answer(
        entries in prop::collection::vec((0u64..0x2000, any::<u64>(), 0u64..16), 0..64),
        address in any::<u64>(),
        near in any::<bool>(),
        which in 0..4,
    ) {
        let memory = Memory::new();
        for (at, entry, next) in entries {
            let entry = if entry & 2 == 0 { entry } else { entry & 0x6000_0000_0000_0FFF | next << 12 };
            memory.set(at * 8, entry);
        }
        let address = if near { address & 0x3FFF_FFFF } else { address };
        let found = match which {
            0 => memory.translate(Ept::new(40).with_accessed_dirty(), address, READ).map(|p| (p.gpa, p.shift)),
            1 => memory.translate(Npt::new(40), address, READ).map(|p| (p.gpa, p.shift)),
            2 => memory.translate(Vtd::new(5, 40), address, READ).map(|p| (p.gpa, p.shift)),
            _ => memory.translate(AmdVi::new(6, 40), address, READ).map(|p| (p.gpa, p.shift)),
        };
        if let Ok((gpa, shift)) = found {
            let inside = (1u64 << shift) - 1;
            prop_assert_eq!(gpa.0 & inside, address & inside);
            prop_assert_eq!(gpa.0 >> 40, 0);
        }
    }
}
