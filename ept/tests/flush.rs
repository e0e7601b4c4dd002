//! Obligations: nothing is reused before hardware has forgotten it, whatever happens to the token.
#![allow(unsafe_code)]

use std::convert::Infallible;

use testudo_arch::{FrameMem, Gpa, Hpa, PageSize};
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::Ept;
use testudo_ept::format::vtd::Vtd;
use testudo_ept::{Format, FramePool, Invalidate, Invalidation, Mixed, PageTable, Rights};

const PAGE: u64 = 4096;
const LARGE: u64 = 512 * PAGE;
const READ_WRITE: Rights = Rights::READ.union(Rights::WRITE);

#[derive(Default)]
struct Recorder(Vec<Invalidation>);

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for Recorder {
    type Error = Infallible;
    fn invalidate(&mut self, what: &Invalidation) -> Result<(), Infallible> {
        self.0.push(*what);
        Ok(())
    }
}

/// An IOTLB whose queue does not drain.
struct Stuck;

// SAFETY: it never says that anything was forgotten.
unsafe impl Invalidate for Stuck {
    type Error = &'static str;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), &'static str> {
        Err("the queue does not drain")
    }
}

fn table<F: Format<Input = Gpa>>(format: F, pool: &FramePool) -> PageTable<F, &FramePool> {
    let flags = format.flags(format.floor(READ_WRITE)).unwrap();
    let table = PageTable::new(format, pool).unwrap();
    table
        .map_up_to(Gpa(0), 2 * LARGE, Hpa(1 << 30), flags, PageSize::Size4K)
        .unwrap();
    table
}

/// A device went on using pages whose IOTLB flush had failed or was skipped.
#[test]
fn a_flush_that_fails_frees_nothing() {
    let pool = FramePool::new(16);
    let table = table(Vtd::new(4, 39), &pool);
    let flush = table.unmap_into(Gpa(0), LARGE, Vec::new()).unwrap();
    assert_eq!(pool.free_frames(), 11);
    let (flush, error) = flush.try_discharge(&mut Stuck).unwrap_err();
    assert_eq!(
        (error, pool.free_frames()),
        ("the queue does not drain", 11)
    );
    // The obligation is still there, and can be discharged later.
    let pages = flush.discharge(&mut Recorder::default());
    assert_eq!((pages.len(), pool.free_frames()), (512, 12));
    let (table, _) = table.destroy(&mut Stuck).unwrap_err();
    assert!(table.translate(Gpa(LARGE)).is_some());
    table.destroy(&mut Recorder::default()).unwrap();
    assert_eq!(pool.free_frames(), 16);
}

#[test]
fn a_dropped_token_loses_frames_rather_than_reuse_them() {
    let pool = FramePool::new(16);
    let table = table(Ept::new(46), &pool);
    drop(table.unmap(Gpa(0), 2 * LARGE).unwrap());
    assert_eq!((table.table_frames(), pool.free_frames()), (1, 11));
}

#[test]
fn joined_obligations_are_discharged_together() {
    let pool = FramePool::new(32);
    let one = table(Ept::new(46), &pool);
    let other = table(Ept::new(46), &pool);
    let first = one.unmap_page(Gpa(5 * PAGE));
    let second = one.protect(Gpa(LARGE), 3 * PAGE, Rights::READ).unwrap();
    let third = one.unmap(Gpa(LARGE), LARGE).unwrap();
    let both = first.join(second).unwrap().join(third).unwrap();
    let foreign = other.unmap_page(Gpa(0));
    let (error, both, foreign) = both.join(foreign).unwrap_err();
    assert_eq!(error, Mixed(one.root(), other.root()));
    let scope = both.scope().unwrap();
    assert_eq!(
        (scope.root, scope.first, scope.last),
        (one.root(), 5 * PAGE, 2 * LARGE - 1)
    );
    assert!(!scope.leaves_only);
    let mut hardware = Recorder::default();
    let free = pool.free_frames();
    let ((leaf, ()), ()) = both.discharge(&mut hardware);
    assert_eq!(leaf.unwrap().frame, Hpa((1 << 30) + 5 * PAGE));
    assert_eq!((hardware.0.len(), pool.free_frames()), (1, free + 1));
    foreign.discharge(&mut hardware);
}

#[test]
fn an_edit_without_effect_needs_no_flush() {
    let pool = FramePool::new(16);
    let table = table(Ept::new(46), &pool);
    let mut hardware = Recorder::default();
    table
        .protect(Gpa(0), LARGE, READ_WRITE)
        .unwrap()
        .discharge(&mut hardware);
    table
        .unmap(Gpa(1 << 40), LARGE)
        .unwrap()
        .discharge(&mut hardware);
    table.unmap_page(Gpa(1 << 41)).discharge(&mut hardware);
    table
        .split(Gpa(0), LARGE, PageSize::Size4K)
        .unwrap()
        .discharge(&mut hardware);
    assert_eq!(hardware.0, []);
}

/// A device cannot take a fault and try again: while pages become a larger one, the table that it
/// may still be walking has to say what it said before.
#[test]
fn a_merged_table_serves_walks_until_it_is_forgotten() {
    fn check<F: Format<Input = Gpa>>(format: F) {
        let pool = FramePool::new(16);
        let table = table(format.clone(), &pool);
        // Where hardware would find the tables of the lowest level.
        let mut entry = table.root().0;
        for level in (2..=format.levels()).rev() {
            let next = pool.load(Hpa(entry));
            entry = format.child(next, level).0.0;
        }
        let flush = table.merge(Gpa(0), 2 * LARGE, PageSize::Size2M).unwrap();
        assert_eq!(table.translate(Gpa(0)).unwrap().leaf.shift, 21);
        for page in 0..512 {
            let stale = pool.load(Hpa(entry + page * 8));
            assert!(format.is_present(stale) && !format.is_reserved(stale, 1));
            assert_eq!(format.leaf(stale, 1).frame, Hpa((1 << 30) + page * PAGE));
        }
        assert_eq!(flush.discharge(&mut Recorder::default()), 2);
        assert_eq!(pool.free_frames(), 16 - table.table_frames());
    }
    check(Vtd::new(3, 39).with_largest_page(PageSize::Size2M));
    check(AmdVi::new(4, 48));
    check(Ept::new(46).with_accessed_dirty());
}

/// What is unmapped is absent for walks that are still in a retired table, too.
#[test]
fn a_retired_table_leads_nowhere_after_its_link_is_written() {
    let pool = FramePool::new(16);
    let format = Ept::new(46).with_suppressed_ve();
    let table = table(format, &pool);
    let mut entry = table.root().0;
    for level in (2..=4).rev() {
        entry = format.child(pool.load(Hpa(entry)), level).0.0;
    }
    let flush = table.unmap(Gpa(0), 2 * LARGE).unwrap();
    let link = pool.load(Hpa(entry));
    assert!(!format.is_present(link));
    assert_eq!(link >> 63, 1, "an absent entry must not become a #VE");
    flush.discharge(&mut Recorder::default());
    assert_eq!(pool.free_frames(), 15);
}
