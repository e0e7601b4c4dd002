//! Composed tables against the two stages that they stand for.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::convert::Infallible;

use proptest::prelude::*;
use testudo_arch::memory::{GuestMemory, GuestRam};
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, PageSize};
use testudo_ept::compose::{ComposeFault, Composed};
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::format::vtd::Vtd;
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::{Format, FramePool, Invalidate, Invalidation, PageTable, Rights};

const PAGE: u64 = 4096;
const ALL: Rights = Rights::all();
const READ: Rights = Rights::READ;
const WRITE: Rights = Rights::READ.union(Rights::WRITE);

struct NoHardware;

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A guest hypervisor that builds its tables in its own memory, with the same engine.
struct Level1 {
    _bytes: Vec<u64>,
    ram: GuestRam,
    free: RefCell<Vec<u64>>,
}

impl Level1 {
    fn new(frames: u64) -> Self {
        let mut bytes = vec![0u64; (frames * 512) as usize];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives as long as the structure and is not touched otherwise.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), frames * PAGE, true) }.unwrap();
        let free = RefCell::new((0..frames).rev().collect());
        Self {
            _bytes: bytes,
            ram,
            free,
        }
    }
}

// SAFETY: `free` hands out each frame once, and it is zeroed here.
unsafe impl FrameAlloc for Level1 {
    fn alloc(&self) -> Option<Hpa> {
        let frame = self.free.borrow_mut().pop()? * PAGE;
        self.ram.write(Gpa(frame), &[0; 4096]).unwrap();
        Some(Hpa(frame))
    }
    fn free(&self, frame: Hpa) {
        self.free.borrow_mut().push(frame.0 / PAGE);
    }
}

impl FrameMem for Level1 {
    fn load(&self, entry: Hpa) -> u64 {
        self.ram.load_u64(Gpa(entry.0)).unwrap()
    }
    fn store(&self, entry: Hpa, value: u64) {
        self.ram.store_u64(Gpa(entry.0), value).unwrap();
    }
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        let swapped = self.ram.compare_exchange_u64(Gpa(entry.0), current, new);
        swapped.unwrap()
    }
}

struct Setup<'a> {
    outer: PageTable<Ept, &'a Level1>,
    inner: PageTable<Ept, &'a FramePool>,
    composed: Composed<Ept, &'a FramePool>,
    level1: &'a Level1,
}

impl<'a> Setup<'a> {
    fn new(level1: &'a Level1, pool: &'a FramePool, outer: Ept, limit: usize) -> Self {
        Self::composed_as(Ept::new(46), level1, pool, outer, limit)
    }

    fn composed_as(
        format: Ept,
        level1: &'a Level1,
        pool: &'a FramePool,
        outer: Ept,
        limit: usize,
    ) -> Self {
        Self {
            outer: PageTable::new(outer, level1).unwrap(),
            inner: PageTable::new(Ept::new(46), pool).unwrap(),
            composed: Composed::new(format, pool, limit).unwrap(),
            level1,
        }
    }

    fn fill(&mut self, address: u64, access: Rights) -> Result<PageSize, ComposeFault> {
        let root = Gpa(self.outer.root().0);
        let outer = GuestTable::new(&self.level1.ram, *self.outer.format(), root);
        let flush = self
            .composed
            .fill(&outer, &self.inner, Gpa(address), access)?;
        let filled = flush.discharge(&mut NoHardware);
        assert!(filled.rights.contains(access));
        Ok(filled.size)
    }

    fn map_outer(&self, l2: u64, l1: u64, len: u64, rights: Rights) {
        let mut flags = self.outer.format().flags(rights).unwrap();
        flags -= EptFlags::ACCESSED | EptFlags::DIRTY;
        self.outer.map(Gpa(l2), len, Hpa(l1), flags).unwrap();
    }

    fn map_inner(&self, l1: u64, host: u64, len: u64, rights: Rights) {
        let flags = self.inner.format().flags(rights).unwrap();
        self.inner.map(Gpa(l1), len, Hpa(host), flags).unwrap();
    }

    /// Every composed page says what the two stages say.
    fn check(&self, end: u64) {
        let mut pages = 0;
        for (start, leaf) in self.composed.table().leaves(Gpa(0), end).unwrap() {
            pages += 1;
            let rights = Ept::new(46).rights(leaf.flags);
            for offset in (0..leaf.bytes()).step_by(PAGE as usize) {
                let first = self.outer.translate(Gpa(start.0 + offset)).unwrap();
                let second = self.inner.translate(Gpa(first.address.0)).unwrap();
                assert_eq!(second.address.0, leaf.frame.0 + offset);
                let outer = self.outer.format().rights(first.leaf.flags);
                let inner = self.inner.format().rights(second.leaf.flags);
                assert!((outer & inner).contains(rights), "{start} {rights:?}");
            }
        }
        let format = self.composed.table().format();
        let executable = format.flags(ALL).unwrap();
        if format.largest_level(executable) > 1 {
            assert_eq!(pages, self.composed.len());
        } else {
            // What is there in pieces is one page.
            assert!(pages >= self.composed.len());
        }
    }

    /// No composed page leads to where the inner stage does not, whatever the outer one has become.
    fn check_frames(&self, end: u64) {
        let inner: std::collections::BTreeSet<u64> = self
            .inner
            .leaves(Gpa(0), end)
            .unwrap()
            .flat_map(|(_, leaf)| {
                (0..leaf.bytes())
                    .step_by(PAGE as usize)
                    .map(move |at| leaf.frame.0 + at)
            })
            .collect();
        for (_, leaf) in self.composed.table().leaves(Gpa(0), end).unwrap() {
            for at in (0..leaf.bytes()).step_by(PAGE as usize) {
                assert!(inner.contains(&(leaf.frame.0 + at)));
            }
        }
    }

    /// Of everything that is there it is known what it is made of.
    fn check_origins(&mut self, end: u64) {
        let gone = self.composed.forget_inner(Gpa(0), end);
        gone.discharge(&mut NoHardware);
        assert!(self.composed.is_empty());
        let left = self.composed.table().leaves(Gpa(0), end).unwrap().count();
        assert_eq!(left, 0);
    }
}

#[test]
fn without_an_outer_table_pages_are_as_the_inner_ones_and_no_larger_than_asked() {
    const LARGE: u64 = 2 << 20;
    let (level1, pool) = (Level1::new(8), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 16);
    setup.map_inner(0, 0x4000_0000, 2 * LARGE, ALL);
    setup.map_inner(2 * LARGE, 0x8000_0000, PAGE, READ);
    let mut fill = |address, access, largest| {
        let inner = &setup.inner;
        let flush = setup
            .composed
            .fill_plain(inner, Gpa(address), access, largest);
        flush.map(|flush| flush.discharge(&mut NoHardware))
    };
    let filled = fill(0x5678, WRITE, PageSize::Size4K).unwrap();
    assert_eq!(
        (filled.size, filled.middle),
        (PageSize::Size4K, Gpa(0x5678))
    );
    assert_eq!((filled.frame, filled.rights), (Hpa(0x4000_5000), ALL));
    let filled = fill(LARGE + 1, READ, PageSize::Size1G).unwrap();
    assert_eq!(
        (filled.size, filled.frame),
        (PageSize::Size2M, Hpa(0x4000_0000 + LARGE))
    );
    let filled = fill(2 * LARGE, READ, PageSize::Size2M).unwrap();
    assert_eq!((filled.size, filled.rights), (PageSize::Size4K, READ));
    let (middle, rights) = (Gpa(2 * LARGE), READ);
    let denied = fill(2 * LARGE, WRITE, PageSize::Size2M);
    assert_eq!(denied, Err(ComposeFault::InnerDenied { middle, rights }));
    let (middle, rights) = (Gpa(4 * LARGE), ALL);
    let absent = fill(4 * LARGE, READ, PageSize::Size2M);
    assert_eq!(absent, Err(ComposeFault::InnerAbsent { middle, rights }));
    // A change of the inner table finds them.
    assert_eq!(setup.composed.len(), 3);
    let gone = setup.composed.forget_inner(Gpa(0), LARGE);
    gone.discharge(&mut NoHardware);
    assert_eq!(setup.composed.len(), 2);
}

#[test]
fn large_pages_stay_where_both_stages_have_them() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x4000_0000, 0x4000_0000, ALL);
    setup.map_inner(0x4000_0000, 0x8000_0000, 0x20_0000, ALL);
    setup.map_inner(0x4020_0000, 0x9000_1000, 0x20_0000, ALL);
    assert_eq!(setup.fill(0x1234, READ), Ok(PageSize::Size2M));
    assert_eq!(setup.fill(0x20_1234, READ), Ok(PageSize::Size4K));
    let found = setup.composed.table().translate(Gpa(0x20_1234)).unwrap();
    assert_eq!(found.address, Hpa(0x9000_2234));
    setup.check(0x4000_0000);
}

/// CVE-2018-12207: a page that a guest's guest fetches from is small, whatever its hypervisor says, and others
/// stay large.
#[test]
fn a_page_becomes_small_by_the_first_fetch() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let format = Ept::new(46).without_large_executable();
    let mut setup = Setup::composed_as(format, &level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x4000_0000, 0x80_0000, ALL);
    setup.map_inner(0x4000_0000, 0x8000_0000, 0x80_0000, ALL);
    let rights = |setup: &Setup<'_>, at| {
        let found = setup.composed.table().translate(Gpa(at));
        found.map(|found| format.rights(found.leaf.flags))
    };
    assert_eq!(setup.fill(0x1234, WRITE), Ok(PageSize::Size2M));
    assert_eq!(rights(&setup, 0x1234), Some(WRITE));
    assert_eq!(setup.fill(0x1234, Rights::EXECUTE), Ok(PageSize::Size4K));
    assert_eq!(rights(&setup, 0x1234), Some(ALL));
    // So can be all the rest of what was large.
    assert_eq!(rights(&setup, 0x1F_F000), Some(ALL));
    assert_eq!(setup.fill(0x2000, WRITE), Ok(PageSize::Size4K));
    assert_eq!(setup.fill(0x20_0000, Rights::EXECUTE), Ok(PageSize::Size4K));
    assert_eq!(rights(&setup, 0x3F_F000), Some(ALL));
    assert_eq!(setup.fill(0x40_0000, READ), Ok(PageSize::Size2M));
    assert_eq!(setup.composed.len(), 3);
    setup.check(0x80_0000);
    // They go together, whichever stage changes.
    let gone = setup.composed.forget_inner(Gpa(0x4000_5000), PAGE);
    gone.discharge(&mut NoHardware);
    assert_eq!(rights(&setup, 0x1F_F000), None);
    let gone = setup.composed.forget_outer(Gpa(0x20_5000), PAGE);
    gone.discharge(&mut NoHardware);
    assert_eq!(rights(&setup, 0x3F_F000), None);
    assert_eq!(setup.composed.len(), 1);
}

/// A page that is there in pieces is never left half known.
#[test]
fn pieces_do_not_outlive_a_change_that_nobody_told_of() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let format = Ept::new(46).without_large_executable();
    let mut setup = Setup::composed_as(format, &level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x4000_0000, 0x20_0000, ALL);
    setup.map_inner(0x4000_0000, 0x8000_0000, 0x40_0000, ALL);
    assert_eq!(setup.fill(0x1234, Rights::EXECUTE), Ok(PageSize::Size4K));
    // Elsewhere, smaller, without the right to fetch.
    for (to, len, rights) in [
        (0x4020_0000, 0x20_0000, ALL),
        (0x4000_0000, PAGE, ALL),
        (0x4000_0000, 0x20_0000, WRITE),
    ] {
        let gone = setup.outer.unmap(Gpa(0), 0x20_0000).unwrap();
        gone.discharge(&mut NoHardware);
        setup.map_outer(0, to, len, rights);
        assert_eq!(setup.fill(0, WRITE), Err(ComposeFault::Stale(Gpa(0))));
        setup.composed.clear().discharge(&mut NoHardware);
        setup.fill(0, WRITE).unwrap();
        setup.check(0x20_0000);
        setup.composed.clear().discharge(&mut NoHardware);
        let gone = setup.outer.unmap(Gpa(0), 0x20_0000).unwrap();
        gone.discharge(&mut NoHardware);
        setup.map_outer(0, 0x4000_0000, 0x20_0000, ALL);
        setup.fill(0, Rights::EXECUTE).unwrap();
    }
    setup.check(0x20_0000);
}

#[test]
fn a_large_page_comes_back_after_small_ones_have_gone() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x4000_0000, 0x20_0000, ALL);
    setup.map_inner(0x4000_0000, 0x8000_1000, 0x20_0000, ALL);
    assert_eq!(setup.fill(0x1234, READ), Ok(PageSize::Size4K));
    assert_eq!(setup.fill(0x5234, READ), Ok(PageSize::Size4K));
    let gone = setup.inner.unmap(Gpa(0x4000_0000), 0x20_0000).unwrap();
    gone.discharge(&mut NoHardware);
    let forgotten = setup.composed.forget_inner(Gpa(0x4000_0000), 0x20_0000);
    forgotten.discharge(&mut NoHardware);
    assert_eq!(setup.composed.table().table_frames(), 1);
    setup.map_inner(0x4000_0000, 0x8000_0000, 0x20_0000, ALL);
    assert_eq!(setup.fill(0x1234, READ), Ok(PageSize::Size2M));
}

#[test]
fn each_fault_names_its_owner() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x1000, PAGE, READ);
    setup.map_outer(PAGE, 0x2000, PAGE, ALL);
    setup.map_inner(0x2000, 0x9000, PAGE, READ);
    let absent = TableFault::Absent { level: 1 };
    assert_eq!(setup.fill(2 * PAGE, READ), Err(ComposeFault::Outer(absent)));
    let denied = TableFault::Denied { rights: READ };
    assert_eq!(setup.fill(0, WRITE), Err(ComposeFault::Outer(denied)));
    let middle = Gpa(0x1004);
    let missing = ComposeFault::InnerAbsent {
        middle,
        rights: READ,
    };
    assert_eq!(setup.fill(4, READ), Err(missing));
    let middle = Gpa(0x2000);
    let refused = ComposeFault::InnerDenied {
        middle,
        rights: READ,
    };
    assert_eq!(setup.fill(PAGE, WRITE), Err(refused));
    assert_eq!(setup.fill(PAGE, READ), Ok(PageSize::Size4K));
    setup.check(1 << 21);
}

#[test]
fn writes_wait_for_the_outer_dirty_bit() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46).with_accessed_dirty(), 100);
    setup.map_outer(0, 0x1000, PAGE, ALL);
    setup.map_inner(0x1000, 0x9000, PAGE, ALL);
    let flags = |s: &Setup<'_>| s.outer.translate(Gpa(0)).unwrap().leaf.flags;
    let composed = |s: &Setup<'_>| s.composed.table().translate(Gpa(0)).unwrap().leaf.flags;
    setup.fill(0, READ).unwrap();
    assert!(flags(&setup).contains(EptFlags::ACCESSED));
    assert!(!flags(&setup).contains(EptFlags::DIRTY));
    assert!(!composed(&setup).contains(EptFlags::WRITE));
    setup.fill(0, WRITE).unwrap();
    assert!(flags(&setup).contains(EptFlags::DIRTY));
    assert!(composed(&setup).contains(EptFlags::WRITE));
    assert_eq!(setup.composed.len(), 1);
}

#[test]
fn a_full_table_says_so_and_clearing_makes_room() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 2);
    setup.map_outer(0, 0x1000, 3 * PAGE, ALL);
    setup.map_inner(0x1000, 0x9000, 3 * PAGE, ALL);
    setup.fill(0, READ).unwrap();
    setup.fill(PAGE, READ).unwrap();
    assert_eq!(setup.fill(2 * PAGE, READ), Err(ComposeFault::Full));
    setup.composed.clear().discharge(&mut NoHardware);
    assert!(setup.composed.is_empty());
    assert_eq!(setup.composed.table().table_frames(), 1);
    setup.fill(2 * PAGE, READ).unwrap();
}

#[test]
fn a_guest_table_outside_its_memory_or_reserved_is_told() {
    let (level1, pool) = (Level1::new(64), FramePool::new(64));
    let mut setup = Setup::new(&level1, &pool, Ept::new(46), 100);
    setup.map_outer(0, 0x1000, PAGE, ALL);
    level1.store(setup.outer.root(), 0x7000_0000 | 7);
    let fault = setup.fill(0, READ);
    assert!(matches!(
        fault,
        Err(ComposeFault::Outer(TableFault::NoTable(_)))
    ));
    level1.store(setup.outer.root(), 0x1000 | 2);
    let reserved = TableFault::Reserved { level: 4 };
    assert_eq!(setup.fill(0, READ), Err(ComposeFault::Outer(reserved)));
    // A table that refers to itself is four levels like any other.
    level1.store(setup.outer.root(), setup.outer.root().0 | 7);
    assert!(setup.fill(0, READ).is_err());
}

/// The same for devices: a guest's I/O table through ours, in the unit's own format.
#[test]
fn io_tables_compose_too() {
    fn check<G, F>(outer_format: G, format: F)
    where
        G: Format<Input = Gpa>,
        F: Format<Input = Gpa>,
    {
        let (level1, pool) = (Level1::new(64), FramePool::new(64));
        let outer = PageTable::new(outer_format.clone(), &level1).unwrap();
        let inner = PageTable::new(format.clone(), &pool).unwrap();
        let mut composed = Composed::new(format.clone(), &pool, 100).unwrap();
        let flags = outer_format.flags(WRITE).unwrap();
        outer
            .map(Gpa(0), 0x1_0000, Hpa(0x4001_0000), flags)
            .unwrap();
        let flags = format.flags(READ).unwrap();
        inner
            .map(Gpa(0x4001_0000), 0x8000, Hpa(0x9000_0000), flags)
            .unwrap();
        let root = Gpa(outer.root().0);
        let table = GuestTable::new(&level1.ram, outer_format, root);
        let filled = composed.fill(&table, &inner, Gpa(0x3123), READ).unwrap();
        let filled = filled.discharge(&mut NoHardware);
        assert_eq!((filled.middle, filled.rights), (Gpa(0x4001_3123), READ));
        let found = composed.table().translate(Gpa(0x3123)).unwrap();
        assert_eq!(found.address, Hpa(0x9000_3123));
        let denied = composed
            .fill(&table, &inner, Gpa(0x3123), WRITE)
            .map(|_| ());
        assert!(matches!(denied, Err(ComposeFault::InnerDenied { .. })));
        let absent = composed.fill(&table, &inner, Gpa(0x9000), READ).map(|_| ());
        assert!(matches!(absent, Err(ComposeFault::InnerAbsent { .. })));
        let fault = composed
            .fill(&table, &inner, Gpa(0x1_0000), READ)
            .map(|_| ());
        assert!(matches!(
            fault,
            Err(ComposeFault::Outer(TableFault::Absent { .. }))
        ));
    }
    check(Vtd::new(3, 46), Vtd::new(4, 46));
    check(AmdVi::new(3, 46).with_sized_pages(), AmdVi::new(4, 46));
    check(Vtd::new(4, 46).with_accessed_dirty(), AmdVi::new(6, 52));
}

/// Both stages in play map within these many pages.
const WINDOW: u64 = 4 << 21;

#[derive(Clone, Debug)]
enum Op {
    Outer {
        at: u64,
        to: u64,
        len: u64,
        rights: Rights,
    },
    OuterGone {
        at: u64,
        len: u64,
    },
    OuterProtect {
        at: u64,
        len: u64,
        rights: Rights,
    },
    Inner {
        at: u64,
        to: u64,
        len: u64,
        rights: Rights,
    },
    InnerGone {
        at: u64,
        len: u64,
    },
    InnerProtect {
        at: u64,
        len: u64,
        rights: Rights,
    },
    Fill {
        at: u64,
        access: Rights,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let at = || {
        let pages = WINDOW / PAGE;
        prop_oneof![
            (0..pages).prop_map(|p| p * PAGE),
            (0..4u64).prop_map(|n| n << 21)
        ]
    };
    let len = || prop_oneof![Just(PAGE), Just(8 * PAGE), Just(1 << 21), Just(2 << 21)];
    let rights = || prop::sample::select(vec![READ, WRITE, ALL]);
    let access = prop::sample::select(vec![READ, WRITE, Rights::EXECUTE]);
    prop_oneof![
        3 => (at(), at(), len(), rights()).prop_map(|(at, to, len, rights)| Op::Outer { at, to, len, rights }),
        1 => (at(), len()).prop_map(|(at, len)| Op::OuterGone { at, len }),
        1 => (at(), len(), rights()).prop_map(|(at, len, rights)| Op::OuterProtect { at, len, rights }),
        3 => (at(), at(), len(), rights()).prop_map(|(at, to, len, rights)| Op::Inner { at, to, len, rights }),
        1 => (at(), len()).prop_map(|(at, len)| Op::InnerGone { at, len }),
        1 => (at(), len(), rights()).prop_map(|(at, len, rights)| Op::InnerProtect { at, len, rights }),
        12 => (at(), access).prop_map(|(at, access)| Op::Fill { at, access }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_composed_table_is_the_product(
        ops in prop::collection::vec(op(), 1..60),
        small in any::<bool>(),
        told in prop::bool::weighted(0.7),
    ) {
        let (level1, pool) = (Level1::new(256), FramePool::new(256));
        let format = match small {
            true => Ept::new(46).without_large_executable(),
            false => Ept::new(46),
        };
        let mut s = Setup::composed_as(format, &level1, &pool, Ept::new(46), 64);
        let mut hardware = NoHardware;
        for op in ops {
            match op {
                Op::Outer { at, to, len, rights } => {
                    let flags = s.outer.format().flags(rights).unwrap();
                    let _ = s.outer.map(Gpa(at), len, Hpa(to), flags);
                }
                Op::OuterGone { at, len } => {
                    s.outer.unmap(Gpa(at), len).unwrap().discharge(&mut hardware);
                    if told {
                        s.composed.forget_outer(Gpa(at), len).discharge(&mut hardware);
                    }
                }
                Op::OuterProtect { at, len, rights } => {
                    s.outer.protect(Gpa(at), len, rights).unwrap().discharge(&mut hardware);
                    if told {
                        s.composed.forget_outer(Gpa(at), len).discharge(&mut hardware);
                    }
                }
                Op::Inner { at, to, len, rights } => {
                    let flags = s.inner.format().flags(rights).unwrap();
                    let _ = s.inner.map(Gpa(at), len, Hpa(to), flags);
                }
                Op::InnerGone { at, len } => {
                    let flush = s.inner.unmap(Gpa(at), len).unwrap();
                    s.composed.forget_inner(Gpa(at), len).discharge(&mut hardware);
                    flush.discharge(&mut hardware);
                }
                Op::InnerProtect { at, len, rights } => {
                    let flush = s.inner.protect(Gpa(at), len, rights).unwrap();
                    s.composed.forget_inner(Gpa(at), len).discharge(&mut hardware);
                    flush.discharge(&mut hardware);
                }
                Op::Fill { at, access } => {
                    let first = s.outer.translate(Gpa(at));
                    let second = first.and_then(|f| s.inner.translate(Gpa(f.address.0)));
                    let allowed = first.zip(second).is_some_and(|(f, g)| {
                        let format = s.outer.format();
                        (format.rights(f.leaf.flags) & format.rights(g.leaf.flags)).contains(access)
                    });
                    match s.fill(at, access) {
                        Ok(_) => prop_assert!(allowed),
                        Err(ComposeFault::Full | ComposeFault::Stale(_)) => s.composed.clear().discharge(&mut hardware),
                        Err(_) => prop_assert!(!allowed),
                    }
                }
            }
            if told {
                s.check(WINDOW * 2);
            }
            s.check_frames(WINDOW * 2);
            let tables = s.inner.table_frames() + s.composed.table().table_frames();
            prop_assert_eq!(pool.free_frames() + tables, 256);
        }
        s.check_origins(WINDOW * 2);
    }
}
