//! Every operation of the engine against a plain map from page to page.

use std::collections::BTreeMap;
use std::convert::Infallible;

use proptest::prelude::*;
use testudo_arch::{Gpa, Hpa, PageSize};
use testudo_ept::format::amdvi::AmdVi;
use testudo_ept::format::ept::Ept;
use testudo_ept::format::long_mode::LongMode;
use testudo_ept::format::npt::Npt;
use testudo_ept::format::vtd::Vtd;
use testudo_ept::{
    EditError, Format, FramePool, Invalidate, Invalidation, MapError, PageTable, Rights,
};

const PAGE: u64 = 4096;
/// The pages in play: 3 GiB across a boundary of level 3 and, where there is room, of level 4.
const PAGES: u64 = (3 << 30) / PAGE;

/// Records what was asked.
#[derive(Default)]
struct Recorder(Vec<Invalidation>);

#[allow(unsafe_code)]
// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for Recorder {
    type Error = Infallible;
    fn invalidate(&mut self, what: &Invalidation) -> Result<(), Infallible> {
        self.0.push(*what);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        page: u64,
        pages: u64,
        frame: u64,
        flags: u8,
        size: PageSize,
    },
    MapPage {
        page: u64,
        frame: u64,
        flags: u8,
        size: PageSize,
    },
    Unmap {
        page: u64,
        pages: u64,
    },
    UnmapInto {
        page: u64,
        pages: u64,
    },
    UnmapPage {
        page: u64,
    },
    Protect {
        page: u64,
        pages: u64,
        rights: Rights,
    },
    Split {
        page: u64,
        pages: u64,
        size: PageSize,
    },
    Merge {
        page: u64,
        pages: u64,
        size: PageSize,
    },
}

impl Op {
    fn within_the_window(&self) -> Self {
        let mut op = self.clone();
        match &mut op {
            Self::Map { page, pages, .. }
            | Self::Unmap { page, pages }
            | Self::UnmapInto { page, pages }
            | Self::Protect { page, pages, .. }
            | Self::Split { page, pages, .. }
            | Self::Merge { page, pages, .. } => *pages = (*pages).min(PAGES - *page),
            Self::MapPage { page, size, .. } => {
                *page = (*page).min(PAGES - size.bytes() / PAGE);
            }
            Self::UnmapPage { .. } => {}
        }
        op
    }
}

/// One of four sets of flags, accessed and dirty where hardware would set these bits.
fn flags<F: Format>(format: &F, choice: u8) -> F::Flags {
    let rights = match choice & 3 {
        0 => Rights::READ,
        1 => Rights::READ | Rights::WRITE,
        2 => Rights::READ | Rights::EXECUTE | Rights::USER_EXECUTE,
        _ => Rights::all(),
    };
    format.flags(format.floor(rights)).unwrap()
}

/// Offsets and lengths that are often aligned to larger pages.
fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..PAGES,
        (0..PAGES / 512).prop_map(|n| n * 512),
        (0..3u64, 0..3u64).prop_map(|(n, more)| n * (512 * 512) + more),
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        72 => 1..9u64,
        36 => 500..1100u64,
        48 => (1..4u64).prop_map(|n| n * 512),
        1 => Just(512 * 512)
    ]
}

fn size() -> impl Strategy<Value = PageSize> {
    prop::sample::select(PageSize::ALL.to_vec())
}

fn op() -> impl Strategy<Value = Op> {
    let rights = prop::sample::select(vec![
        Rights::READ,
        Rights::READ | Rights::WRITE,
        Rights::READ | Rights::EXECUTE | Rights::USER_EXECUTE,
    ]);
    prop_oneof![
        4 => (pages(), length(), pages(), 0..16u8, size())
            .prop_map(|(page, pages, frame, flags, size)| Op::Map { page, pages, frame, flags, size }),
        2 => (pages(), pages(), 0..16u8, size())
            .prop_map(|(page, frame, flags, size)| Op::MapPage { page, frame, flags, size }),
        2 => (pages(), length()).prop_map(|(page, pages)| Op::Unmap { page, pages }),
        1 => (pages(), length()).prop_map(|(page, pages)| Op::UnmapInto { page, pages }),
        1 => pages().prop_map(|page| Op::UnmapPage { page }),
        2 => (pages(), length(), rights)
            .prop_map(|(page, pages, rights)| Op::Protect { page, pages, rights }),
        1 => (pages(), length(), size()).prop_map(|(page, pages, size)| Op::Split { page, pages, size }),
        1 => (pages(), length(), size()).prop_map(|(page, pages, size)| Op::Merge { page, pages, size }),
    ]
}

type Model<Flags> = BTreeMap<u64, (u64, Flags)>;

/// What the table maps, page by page.
fn contents<F: Format>(table: &PageTable<F, &FramePool>, base: u64) -> Model<F::Flags> {
    let mut model = Model::new();
    let format = table.format();
    for (start, leaf) in table.leaves(format.address(base), PAGES * PAGE).unwrap() {
        let start = format.offset(start).unwrap();
        assert_eq!(start % leaf.bytes(), 0);
        assert_eq!(leaf.frame.0 % leaf.bytes(), 0);
        for n in 0..leaf.bytes() / PAGE {
            let page = (start - base) / PAGE + n;
            model.insert(page, (leaf.frame.0 / PAGE + n, leaf.flags));
        }
    }
    model
}

fn run<F: Format>(format: F, ops: &[Op], frames: usize) {
    let base = if format.levels() > 3 { 511 << 30 } else { 0 };
    run_at(format, base, ops, frames);
}

/// As [`run`], with the pages from this offset of the table on.
fn run_at<F: Format>(format: F, base: u64, ops: &[Op], frames: usize) {
    let pool = FramePool::new(frames);
    let table = PageTable::new(format.clone(), &pool).unwrap();
    let at = |page: u64| format.address(base + page * PAGE);
    let flags = |choice| flags(&format, choice);
    let largest = |choice| PAGE << (9 * (format.largest_level(flags(choice)) - 1));
    let mut model = Model::new();
    for op in ops {
        let op = &op.within_the_window();
        let before = table.table_frames();
        let mut hardware = Recorder::default();
        match *op {
            Op::Map {
                page,
                pages,
                frame,
                flags: f,
                size,
            } => {
                let free = !model.range(page..page + pages).any(|_| true);
                let result =
                    table.map_up_to(at(page), pages * PAGE, Hpa(frame * PAGE), flags(f), size);
                match result {
                    Ok(()) => {
                        assert!(free);
                        model.extend((0..pages).map(|n| (page + n, (frame + n, flags(f)))));
                    }
                    Err(MapError::Occupied(at)) => {
                        assert!(!free && model.contains_key(&((at - base) / PAGE)));
                    }
                    Err(MapError::Edit(EditError::OutOfFrames)) => {
                        assert_eq!(before, table.table_frames());
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Op::MapPage {
                page,
                frame,
                flags: f,
                size,
            } => {
                let pages = size.bytes() / PAGE;
                let free = !model.range(page..page + pages).any(|_| true);
                match table.map_page(at(page), size, Hpa(frame * PAGE), flags(f)) {
                    Ok(()) => {
                        assert!(free);
                        model.extend((0..pages).map(|n| (page + n, (frame + n, flags(f)))));
                    }
                    Err(MapError::Occupied(_)) => assert!(!free || before > 1),
                    Err(MapError::TooLarge(_)) => assert!(size.bytes() > largest(f)),
                    Err(MapError::Edit(EditError::Misaligned(_))) => {
                        let aligned = (base + page * PAGE).is_multiple_of(size.bytes())
                            && Hpa(frame * PAGE).is_aligned(size);
                        assert!(!aligned);
                    }
                    Err(MapError::Edit(EditError::OutOfFrames)) => {
                        assert_eq!(before, table.table_frames());
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Op::Unmap { page, pages } => {
                if let Ok(flush) = table.unmap(at(page), pages * PAGE) {
                    let had = model.range(page..page + pages).any(|_| true);
                    assert!(flush.scope().is_some() || !had);
                    flush.discharge(&mut hardware);
                    model.retain(|p, _| !(page..page + pages).contains(p));
                }
            }
            Op::UnmapInto { page, pages } => {
                if let Ok(flush) = table.unmap_into(at(page), pages * PAGE, Vec::new()) {
                    let out = flush.discharge(&mut hardware);
                    let mut removed = Model::new();
                    for (start, leaf) in out {
                        for n in 0..leaf.bytes() / PAGE {
                            let page = (format.offset(start).unwrap() - base) / PAGE + n;
                            removed.insert(page, (leaf.frame.0 / PAGE + n, leaf.flags));
                        }
                    }
                    let expected = model.range(page..page + pages);
                    assert!(removed.iter().eq(expected));
                    model.retain(|p, _| !(page..page + pages).contains(p));
                }
            }
            Op::UnmapPage { page } => {
                let leaf = table.unmap_page(at(page)).discharge(&mut hardware);
                assert_eq!(leaf.is_some(), model.contains_key(&page));
                if let Some(leaf) = leaf {
                    let pages = leaf.bytes() / PAGE;
                    let first = (base / PAGE + page) / pages * pages - base / PAGE;
                    for page in first..first + pages {
                        assert!(model.remove(&page).is_some());
                    }
                }
            }
            Op::Protect {
                page,
                pages,
                rights,
            } => {
                let rights = format.floor(rights);
                if let Ok(flush) = table.protect(at(page), pages * PAGE, rights) {
                    flush.discharge(&mut hardware);
                    for (_, (_, flags)) in model.range_mut(page..page + pages) {
                        *flags = format.with_rights(*flags, rights).unwrap();
                    }
                }
            }
            Op::Split { page, pages, size } => {
                if let Ok(flush) = table.split(at(page), pages * PAGE, size) {
                    flush.discharge(&mut hardware);
                    for (_, leaf) in table.leaves(at(page), pages * PAGE).unwrap() {
                        assert!(leaf.bytes() <= size.bytes());
                    }
                }
            }
            Op::Merge { page, pages, size } => {
                let flush = table.merge(at(page), pages * PAGE, size).unwrap();
                let replaced = flush.discharge(&mut hardware);
                assert_eq!(table.table_frames(), before - replaced);
            }
        }
        for what in &hardware.0 {
            assert_eq!(what.root, table.root());
            assert!(what.first <= what.last && what.last & 0xFFF == 0xFFF);
        }
        // Every frame is either free or in the table: nothing leaked, nothing freed in use.
        assert_eq!(pool.free_frames() + table.table_frames(), frames);
    }
    let found = contents(&table, base);
    let difference = found.iter().zip(&model).find(|(a, b)| a != b);
    assert_eq!((difference, found.len()), (None, model.len()));
    for (&page, &(frame, flags)) in model.iter().step_by(97) {
        let found = table
            .translate(format.address(base + page * PAGE + 5))
            .unwrap();
        assert_eq!(
            (found.address, found.leaf.flags),
            (Hpa(frame * PAGE + 5), flags)
        );
    }
    table.destroy(&mut Recorder::default()).unwrap();
    assert_eq!(pool.free_frames(), frames);
}

/// Two pages of a thousand at most go into tables, and nothing is left when the memory goes.
#[test]
fn tables_take_a_quarter_of_a_percent() {
    let pool = FramePool::new(700);
    let format = Npt::new(48);
    let flags = flags(&format, 1);
    let limit = |bytes: u64| (bytes / 400 / PAGE) as usize;
    let table = PageTable::new(format, &pool).unwrap();
    let map = |start: u64, len: u64| {
        let mapped = table.map_up_to(Gpa(start), len, Hpa(0), flags, PageSize::Size4K);
        mapped.unwrap();
    };
    map(0, 1 << 30);
    assert!(
        table.table_frames() <= limit(1 << 30),
        "{}",
        table.table_frames()
    );
    let gone = table.unmap(Gpa(0), 1 << 30).unwrap();
    gone.discharge(&mut Recorder::default());
    assert_eq!(table.table_frames(), 1);
    // The same, in 64 pieces over 16 TiB.
    for piece in 0..64 {
        map(piece << 38, 16 << 20);
    }
    assert!(
        table.table_frames() <= limit(1 << 30),
        "{}",
        table.table_frames()
    );
    let gone = table.unmap(Gpa(0), 64 << 38).unwrap();
    gone.discharge(&mut Recorder::default());
    assert_eq!((table.table_frames(), pool.free_frames()), (1, 699));
}

/// In an empty table each page is the largest that its place, its frame and what is left allow.
fn uses_the_largest_pages<F: Format>(format: F, page: u64, pages: u64, frame: u64) {
    let pool = FramePool::new(2100);
    let table = PageTable::new(format.clone(), &pool).unwrap();
    let flags = flags(&format, 3);
    let largest = PAGE << (9 * (format.largest_level(flags) - 1));
    let (start, len) = (page * PAGE, pages * PAGE);
    let mapped = table.map(format.address(start), len, Hpa(frame * PAGE), flags);
    mapped.unwrap();
    let mut next = start;
    for (at, leaf) in table.leaves(format.address(start), len).unwrap() {
        let at = format.offset(at).unwrap();
        assert_eq!((at, leaf.frame.0), (next, frame * PAGE + (at - start)));
        let fits = |bytes: u64| {
            let aligned = (at | leaf.frame.0) & (bytes - 1) == 0;
            bytes <= largest && aligned && start + len - at >= bytes
        };
        let best = [1 << 30, 1 << 21, PAGE]
            .into_iter()
            .find(|bytes| fits(*bytes));
        assert_eq!(Some(leaf.bytes()), best, "{at:#x}");
        next = at + leaf.bytes();
    }
    assert_eq!(next, start + len);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nested_tables_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(Npt::new(48), &ops, 4096);
    }

    #[test]
    fn nested_tables_of_five_levels_with_encryption_are_a_map(
        ops in prop::collection::vec(op(), 1..24),
    ) {
        run(Npt::new(52).with_five_levels().with_c_bit(51, true), &ops, 4096);
    }

    #[test]
    fn intel_io_tables_of_five_levels_with_marks_are_a_map(
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let format = Vtd::new(5, 52).with_largest_page(PageSize::Size1G);
        run(format.with_snoop_control().with_accessed_dirty(), &ops, 4096);
    }

    #[test]
    fn host_tables_are_a_map_in_the_upper_half(ops in prop::collection::vec(op(), 1..24)) {
        run_at(LongMode::new(46), 1 << 47 | 511 << 30, &ops, 4096);
    }

    #[test]
    fn host_tables_of_five_levels_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(LongMode::new(52).with_five_levels(), &ops, 4096);
    }

    #[test]
    fn extended_tables_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(Ept::new(46).with_accessed_dirty().with_mode_based_execute().with_suppressed_ve(), &ops, 4096);
    }

    #[test]
    fn extended_tables_without_large_executable_pages_are_a_map(
        ops in prop::collection::vec(op(), 1..24),
    ) {
        run(Ept::new(46).with_five_levels().without_large_executable(), &ops, 4096);
    }

    #[test]
    fn intel_io_tables_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(Vtd::new(3, 39).with_largest_page(PageSize::Size2M), &ops, 4096);
    }

    #[test]
    fn amd_io_tables_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(AmdVi::new(6, 48), &ops, 4096);
    }

    #[test]
    fn amd_io_tables_with_sized_pages_are_a_map(ops in prop::collection::vec(op(), 1..24)) {
        run(AmdVi::new(4, 48).with_sized_pages().with_accessed_dirty(), &ops, 4096);
    }

    #[test]
    fn a_range_is_mapped_with_the_largest_pages_that_fit(
        page in pages(),
        pages in prop_oneof![length(), (1..3u64).prop_map(|n| n << 18 | 0x301)],
        frame in prop_oneof![pages(), (0..4u64).prop_map(|n| n << 18)],
        near in any::<bool>(),
    ) {
        // Often with the same offset in a large page, and always where there are many pages.
        let frame = if near || pages > 1 << 17 { frame & !0x3FFFF | page & 0x3FFFF } else { frame };
        uses_the_largest_pages(Npt::new(48), page, pages, frame);
        uses_the_largest_pages(Ept::new(46).without_large_executable(), page, pages, frame);
        uses_the_largest_pages(Vtd::new(3, 39).with_largest_page(PageSize::Size2M), page, pages, frame);
        uses_the_largest_pages(LongMode::new(46).with_five_levels(), page, pages, frame);
    }

    #[test]
    fn running_out_of_frames_changes_nothing(
        ops in prop::collection::vec(op(), 1..24),
        frames in 1..12usize,
    ) {
        run(Npt::new(48), &ops, frames);
    }
}
