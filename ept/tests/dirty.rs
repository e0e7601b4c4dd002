//! Logs of written and touched pages, page sizes that flags allow, and copies.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use testudo_arch::{Gpa, Hpa, PageSize};
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{
    EditError, Format, FramePool, Invalidate, Invalidation, PageBitmap, PageTable, Rights,
};

const PAGE: u64 = 4096;

struct Count(u32);

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for Count {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        self.0 += 1;
        Ok(())
    }
}

fn words(pages: u64) -> Vec<AtomicU64> {
    (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

/// What a processor does on a write: sets the dirty bit, if it has the right.
fn write<F: Format<Input = Gpa>>(table: &PageTable<F, &FramePool>, page: u64, dirty: F::Flags)
where
    F::Flags: std::ops::BitOr<Output = F::Flags>,
{
    let marked = table.change_page(Gpa(page * PAGE), |mut leaf| {
        leaf.flags = leaf.flags | dirty;
        leaf
    });
    // SAFETY: no hardware uses the table.
    unsafe { marked.assume_flushed() };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_harvest_finds_each_write_once(
        small in prop::collection::btree_set(1024u64..2000, 0..80),
        again in prop::collection::btree_set(1024u64..2000, 0..80),
        large in prop::collection::btree_set(0u64..2, 0..2),
        accessed in any::<bool>(),
    ) {
        let pool = FramePool::new(16);
        let table = PageTable::new(Npt::new(48), &pool).unwrap();
        // Two large pages, then small ones.
        let mut flags = NptFlags::WRITABLE;
        flags.set(NptFlags::ACCESSED, accessed);
        table.map(Gpa(0), 1024 * PAGE, Hpa(0), flags).unwrap();
        table.map_up_to(Gpa(1024 * PAGE), 1000 * PAGE, Hpa(0), flags, PageSize::Size4K).unwrap();
        let words = words(2048);
        let log = PageBitmap::new(0, &words);
        for page in &small {
            write(&table, *page, NptFlags::DIRTY | NptFlags::ACCESSED);
        }
        for page in &large {
            write(&table, page * 512 + 7, NptFlags::DIRTY | NptFlags::ACCESSED);
        }
        let flush = table.harvest_dirty(Gpa(0), 2048 * PAGE, &log).unwrap();
        prop_assert_eq!(flush.scope().is_some(), !(small.is_empty() && large.is_empty()));
        let count = flush.discharge(&mut Count(0));
        prop_assert_eq!(count as usize, small.len() + large.len());
        let mut expected = small.clone();
        expected.extend(large.iter().flat_map(|page| page * 512..(page + 1) * 512));
        let found: BTreeSet<u64> = log.drain().map(|address| address / PAGE).collect();
        prop_assert_eq!(found, expected);
        for page in &again {
            write(&table, *page, NptFlags::DIRTY);
        }
        table.harvest_dirty(Gpa(0), 2048 * PAGE, &log).unwrap().discharge(&mut Count(0));
        let found: BTreeSet<u64> = log.drain().map(|address| address / PAGE).collect();
        prop_assert_eq!(found, again);
    }

    #[test]
    fn write_protection_finds_each_write_once(
        writes in prop::collection::btree_set(0u64..1500, 0..80),
        again in prop::collection::btree_set(0u64..1500, 0..80),
    ) {
        let pool = FramePool::new(16);
        let ept = Ept::new(46);
        let table = PageTable::new(ept, &pool).unwrap();
        let (read, all) = (ept.flags(Rights::READ).unwrap(), ept.flags(Rights::all()).unwrap());
        table.map_up_to(Gpa(0), 1000 * PAGE, Hpa(0), all, PageSize::Size4K).unwrap();
        table.map_up_to(Gpa(1000 * PAGE), 500 * PAGE, Hpa(0), read, PageSize::Size4K).unwrap();
        let mut hardware = Count(0);
        let tracked = table.track_writes(Gpa(0), 2048 * PAGE).unwrap().discharge(&mut hardware);
        prop_assert_eq!((tracked, hardware.0), (1000, 1));
        let words = words(2048);
        let log = PageBitmap::new(0, &words);
        for round in [writes, again] {
            for page in &round {
                let address = Gpa(page * PAGE);
                let leaf = table.translate(address).unwrap().leaf;
                prop_assert!(!leaf.flags.contains(EptFlags::WRITE));
                // A page that was never writable has no log: its fault has another cause.
                prop_assert_eq!(table.allow_tracked_write(address), *page < 1000);
            }
            let harvest = table.harvest_tracked(Gpa(0), 2048 * PAGE, &log).unwrap();
            harvest.discharge(&mut hardware);
            let found: BTreeSet<u64> = log.drain().map(|address| address / PAGE).collect();
            let writable: BTreeSet<u64> = round.into_iter().filter(|page| *page < 1000).collect();
            prop_assert_eq!(found, writable);
        }
        table.untrack_writes(Gpa(0), 2048 * PAGE).unwrap().discharge(&mut hardware);
        for (start, leaf) in table.leaves(Gpa(0), 2048 * PAGE).unwrap() {
            prop_assert_eq!(leaf.flags, if start.0 < 1000 * PAGE { all } else { read });
        }
    }
}

#[test]
fn a_harvest_begins_and_ends_anywhere() {
    let pool = FramePool::new(16);
    let table = PageTable::new(Npt::new(48), &pool).unwrap();
    let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
    table
        .map_up_to(Gpa(0), 600 * PAGE, Hpa(0), flags, PageSize::Size4K)
        .unwrap();
    let words = words(1024);
    let log = PageBitmap::new(0, &words);
    let flush = table
        .harvest_dirty(Gpa(37 * PAGE), 501 * PAGE, &log)
        .unwrap();
    assert_eq!(flush.discharge(&mut Count(0)), 501);
    let pages: Vec<u64> = log.drain().map(|address| address / PAGE).collect();
    assert_eq!(pages, (37..538).collect::<Vec<_>>());
    for page in 0..600 {
        let leaf = table.translate(Gpa(page * PAGE)).unwrap().leaf;
        let clean = (37..538).contains(&page);
        assert_eq!(leaf.flags.contains(NptFlags::DIRTY), !clean);
    }
}

#[test]
fn a_hardware_log_is_harvested_entry_by_entry() {
    let pool = FramePool::new(16);
    let ept = Ept::new(46).with_accessed_dirty();
    let table = PageTable::new(ept, &pool).unwrap();
    let flags = ept.flags(Rights::all()).unwrap();
    table
        .map_up_to(Gpa(0), 8 * PAGE, Hpa(0), flags, PageSize::Size4K)
        .unwrap();
    let words = words(64);
    let log = PageBitmap::new(0, &words);
    let addresses = [
        Gpa(3 * PAGE),
        Gpa(5 * PAGE),
        Gpa(3 * PAGE),
        Gpa(1 << 40),
        Gpa(u64::MAX),
    ];
    let flush = table.harvest_logged(addresses, &log);
    let scope = flush.scope().unwrap();
    assert_eq!((scope.first, scope.last), (3 * PAGE, 6 * PAGE - 1));
    flush.discharge(&mut Count(0));
    assert_eq!(log.drain().collect::<Vec<_>>(), [3 * PAGE, 5 * PAGE]);
    let dirty = |page| {
        let leaf = table.translate(Gpa(page * PAGE)).unwrap().leaf;
        leaf.flags.contains(EptFlags::DIRTY)
    };
    assert!(!dirty(3) && dirty(4) && !dirty(5));
}

#[test]
fn a_sized_page_marks_all_its_parts() {
    let pool = FramePool::new(16);
    let format = AmdVi::new(4, 48).with_sized_pages().with_accessed_dirty();
    let table = PageTable::new(format, &pool).unwrap();
    let flags = format.flags(Rights::READ | Rights::WRITE).unwrap();
    table
        .map(Gpa(16 * PAGE), 16 * PAGE, Hpa(16 * PAGE), flags)
        .unwrap();
    assert_eq!(table.translate(Gpa(20 * PAGE)).unwrap().leaf.shift, 16);
    let words = words(64);
    let log = PageBitmap::new(0, &words);
    table
        .harvest_dirty(Gpa(0), 64 * PAGE, &log)
        .unwrap()
        .discharge(&mut Count(0));
    assert_eq!(log.drain().count(), 16);
    // An edit of one part makes single pages of it.
    let flush = table.protect(Gpa(20 * PAGE), PAGE, Rights::READ).unwrap();
    flush.discharge(&mut Count(0));
    let leaf = |page: u64| table.translate(Gpa(page * PAGE)).unwrap().leaf;
    assert_eq!((leaf(20).shift, leaf(20).frame), (12, Hpa(20 * PAGE)));
    assert_eq!((leaf(21).shift, leaf(21).frame), (12, Hpa(21 * PAGE)));
    assert_ne!(leaf(20).flags, leaf(21).flags);
}

#[test]
fn ages_are_counted_from_the_last_look() {
    let pool = FramePool::new(16);
    let table = PageTable::new(Npt::new(48), &pool).unwrap();
    let flags = NptFlags::WRITABLE | NptFlags::ACCESSED;
    table
        .map_up_to(Gpa(0), 100 * PAGE, Hpa(0), flags, PageSize::Size4K)
        .unwrap();
    let words = words(128);
    let log = PageBitmap::new(0, &words);
    assert_eq!(table.age(Gpa(0), 128 * PAGE, &log), Ok(100));
    assert_eq!(log.drain().count(), 100);
    write(&table, 42, NptFlags::ACCESSED);
    assert_eq!(table.age(Gpa(0), 128 * PAGE, &log), Ok(1));
    assert_eq!(log.drain().collect::<Vec<_>>(), [42 * PAGE]);
}

/// CVE-2018-12207: a processor that holds an executable page in two sizes can stop with a machine
/// check. No edit makes a large executable page where the format forbids it.
#[test]
fn cve_2018_12207_no_executable_page_is_ever_large() {
    let pool = FramePool::new(2048);
    let ept = Ept::new(46).without_large_executable();
    let table = PageTable::new(ept, &pool).unwrap();
    let data = ept.flags(Rights::READ | Rights::WRITE).unwrap();
    let code = ept.flags(Rights::all()).unwrap();
    let two_mib = 512 * PAGE;
    table.map(Gpa(0), 2 * two_mib, Hpa(0), data).unwrap();
    assert_eq!(table.table_frames(), 3);
    assert!(
        table
            .map_page(Gpa(4 * two_mib), PageSize::Size2M, Hpa(0), code)
            .is_err()
    );
    let refused = table.update(Gpa(0), two_mib, |flags| flags | EptFlags::EXECUTE);
    assert!(matches!(refused, Err(EditError::Flags(_))));
    let changed = table.change_page(Gpa(0), |mut leaf| {
        leaf.flags |= EptFlags::EXECUTE;
        leaf
    });
    assert!(changed.scope().is_none());
    table
        .protect(Gpa(0), PAGE, Rights::all())
        .unwrap()
        .discharge(&mut Count(0));
    table
        .protect(Gpa(two_mib), two_mib, Rights::all())
        .unwrap()
        .discharge(&mut Count(0));
    table
        .merge(Gpa(0), 2 * two_mib, PageSize::Size1G)
        .unwrap()
        .discharge(&mut Count(0));
    for (_, leaf) in table.leaves(Gpa(0), 2 * two_mib).unwrap() {
        assert!(leaf.shift == 12 || !leaf.flags.contains(EptFlags::EXECUTE));
    }
    assert_eq!(table.translate(Gpa(two_mib)).unwrap().leaf.shift, 12);
}

#[test]
fn a_copy_is_a_table_of_its_own() {
    let (pool, other) = (FramePool::new(64), FramePool::new(64));
    let table = PageTable::new(Npt::new(48), &pool).unwrap();
    let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
    table.map(Gpa(0), 1030 * PAGE, Hpa(1 << 30), flags).unwrap();
    table.map(Gpa(1 << 40), PAGE, Hpa(0), flags).unwrap();
    let copy = table
        .duplicate(&other, |leaf| leaf.flags - NptFlags::WRITABLE)
        .unwrap();
    table
        .unmap(Gpa(0), 512 * PAGE)
        .unwrap()
        .discharge(&mut Count(0));
    let here = table.leaves(Gpa(0), 1 << 41).unwrap().count();
    let there: Vec<_> = copy.leaves(Gpa(0), 1 << 41).unwrap().collect();
    assert_eq!((here, there.len()), (8, 9));
    assert!(
        there
            .iter()
            .all(|(_, leaf)| !leaf.flags.contains(NptFlags::WRITABLE))
    );
    let free = other.free_frames();
    assert_eq!(free, 64 - copy.table_frames());
    copy.destroy(&mut Count(0)).unwrap();
    assert_eq!(other.free_frames(), 64);
    let small = FramePool::new(4);
    assert!(table.duplicate(&small, |leaf| leaf.flags).is_err());
    assert_eq!(small.free_frames(), 4);
}
