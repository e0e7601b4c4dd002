//! The contract that the engine relies on, for every format.

use proptest::prelude::*;
use testudo_arch::Hpa;
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::Ept;
use testudo_ept::format::long_mode::LongMode;
use testudo_ept::format::npt::Npt;
use testudo_ept::format::vtd::Vtd;
use testudo_ept::{Format, Rights};

/// What an entry says comes back from it.
fn round_trip<F: Format>(
    format: F,
    frame: u64,
    level: u8,
    rights: Rights,
) -> Result<(), TestCaseError> {
    let floor = format.floor(rights);
    prop_assert!(rights.contains(floor), "never more than was asked for");
    prop_assert_eq!(format.floor(floor), floor);
    let table = Hpa(frame & format.address_mask());
    for level in 2..=format.levels() {
        let entry = format.table_entry(table, level);
        prop_assert!(format.is_present(entry) && !format.is_leaf(entry, level));
        prop_assert!(!format.is_reserved(entry, level));
        prop_assert_eq!(format.child(entry, level), (table, level - 1));
        prop_assert!(format.entry_rights(entry, level).contains(floor));
        prop_assert_eq!(entry & F::SOFTWARE, 0);
    }
    prop_assert!(!format.is_present(format.absent()));
    prop_assert!(!format.is_present(format.absent() | (frame & 0x000F_FFFF_FFFF_F000)));
    prop_assert!(F::SOFTWARE.count_ones() >= 4);
    prop_assert_eq!(F::SOFTWARE & format.address_mask(), 0);
    if floor.is_empty() {
        prop_assert_eq!(format.flags(floor), None);
        return Ok(());
    }
    let flags = format.flags(floor).unwrap();
    let level = level.min(format.largest_level(flags));
    let shift = 3 + 9 * u32::from(level);
    let page = Hpa(table.0 & !((1 << shift) - 1));
    let entry = format.leaf_entry(page, level, flags);
    prop_assert!(format.is_valid(flags) && !format.is_reserved(entry, level));
    prop_assert!(format.is_present(entry) && format.is_leaf(entry, level));
    let leaf = format.leaf(entry, level);
    prop_assert_eq!((leaf.frame, leaf.shift, leaf.flags), (page, shift, flags));
    prop_assert_eq!(
        (format.rights(flags), format.entry_rights(entry, level)),
        (floor, floor)
    );
    prop_assert_eq!(format.with_rights(flags, floor), Some(flags));
    // Consecutive pages differ by their size, and software's bits are software's.
    let next = Hpa(page.0 ^ 1 << shift);
    if next.0 & !format.address_mask() == 0 && next > page {
        prop_assert_eq!(format.leaf_entry(next, level, flags), entry + (1 << shift));
    }
    let noted = format.leaf(entry | F::SOFTWARE, level);
    prop_assert_eq!((noted.frame, noted.shift), (page, shift));
    prop_assert!(!format.is_reserved(entry | F::SOFTWARE, level));
    // The write bit is the write right.
    let without = format.entry_rights(entry & !format.write_bit(), level);
    prop_assert_eq!(without, floor - Rights::WRITE);
    let marks = format.accessed_bit() | format.dirty_bit();
    prop_assert_eq!(
        entry & marks,
        marks,
        "ordinary flags leave hardware nothing to write"
    );
    Ok(())
}

proptest! {
    #[test]
    fn every_format_round_trips(frame in any::<u64>(), level in 1..4u8, rights in 0..16u8) {
        let rights = Rights::from_bits_retain(rights);
        let ept = Ept::new(46);
        round_trip(ept, frame, level, rights)?;
        round_trip(ept.with_accessed_dirty().with_mode_based_execute(), frame, level, rights)?;
        round_trip(ept.with_execute_only().with_suppressed_ve(), frame, level, rights)?;
        round_trip(ept.with_five_levels().without_large_executable(), frame, level, rights)?;
        round_trip(Npt::new(52), frame, level, rights)?;
        round_trip(Npt::new(48).with_five_levels().with_c_bit(47, true), frame, level, rights)?;
        round_trip(LongMode::new(52).with_five_levels(), frame, level, rights)?;
        round_trip(LongMode::new(40).without_no_execute(), frame, level, rights)?;
        for levels in 3..=5 {
            let vtd = Vtd::new(levels, 46).with_largest_page(testudo_arch::PageSize::Size1G);
            round_trip(vtd, frame, level, rights)?;
            round_trip(vtd.with_accessed_dirty().with_snoop_control(), frame, level, rights)?;
        }
        for levels in 1..=6 {
            round_trip(AmdVi::new(levels, 52), frame, level, rights)?;
            round_trip(AmdVi::new(levels, 48).with_accessed_dirty(), frame, level, rights)?;
        }
    }
}
