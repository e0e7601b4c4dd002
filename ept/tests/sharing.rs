//! Pages that are shared keep their contents, and frames are neither lost nor freed in use.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use testudo_arch::{FrameAlloc, Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::sharing::{
    Group, Pace, PageMemory, Scanner, SharedFrames, ZERO, digest, hash, hashes, is_equal, is_zero,
};
use testudo_ept::{FramePool, Invalidate, Invalidation, Leaf, PageBitmap, PageTable, Rights};

const PAGE: u64 = 4096;
const FIRST: u64 = 1 << 30;

struct NoHardware(u32);

// SAFETY: no hardware and no other thread uses the tables of these tests.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        self.0 += 1;
        Ok(())
    }
}

/// Frames of data, each 512 words; freed ones are poisoned.
struct Data {
    frames: RefCell<Vec<Vec<u64>>>,
    free: RefCell<Vec<u64>>,
}

impl Data {
    fn new(count: u64) -> Self {
        Self {
            frames: RefCell::new(vec![vec![0; 512]; count as usize]),
            free: RefCell::new((0..count).rev().collect()),
        }
    }

    fn fill(&self, frame: Hpa, content: u64) {
        let number = ((frame.0 - FIRST) / PAGE) as usize;
        let words = (0..512u64).map(|n| if content == 0 { 0 } else { content * 1000 + n });
        self.frames.borrow_mut()[number] = words.collect();
    }

    fn content(&self, frame: Hpa) -> u64 {
        let number = ((frame.0 - FIRST) / PAGE) as usize;
        assert!(
            !self.free.borrow().contains(&(number as u64)),
            "{frame} is free"
        );
        self.frames.borrow()[number][0] / 1000
    }
}

// SAFETY: `free` hands out each frame once, zeroed.
unsafe impl FrameAlloc for &Data {
    fn alloc(&self) -> Option<Hpa> {
        let number = self.free.borrow_mut().pop()?;
        self.frames.borrow_mut()[number as usize].fill(0);
        Some(Hpa(FIRST + number * PAGE))
    }
    fn free(&self, frame: Hpa) {
        let number = (frame.0 - FIRST) / PAGE;
        assert!(
            !self.free.borrow().contains(&number),
            "{frame} is freed twice"
        );
        self.frames.borrow_mut()[number as usize].fill(0xDEAD_DEAD);
        self.free.borrow_mut().push(number);
    }
}

impl PageMemory for &Data {
    fn load(&self, word: Hpa) -> u64 {
        let at = word.0 - FIRST;
        self.frames.borrow()[(at / PAGE) as usize][(at % PAGE / 8) as usize]
    }
    fn copy(&self, from: Hpa, to: Hpa) {
        let mut frames = self.frames.borrow_mut();
        let page = frames[((from.0 - FIRST) / PAGE) as usize].clone();
        frames[((to.0 - FIRST) / PAGE) as usize] = page;
    }
}

const FLAGS: NptFlags = NptFlags::WRITABLE
    .union(NptFlags::ACCESSED)
    .union(NptFlags::DIRTY);

/// There is no frame for the writer's copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NoFrame;

/// A guest whose pages are shared in the order that [`SharedFrames`] gives, with a flush that waits.
struct Guest<'a> {
    data: &'a Data,
    table: PageTable<Npt, &'a FramePool>,
    frames: SharedFrames,
    scanner: Scanner,
    zero: Hpa,
    last: Vec<u64>,
    groups: Vec<Option<Group>>,
    pages: u64,
}

impl<'a> Guest<'a> {
    fn new(data: &'a Data, pool: &'a FramePool, contents: &[u64]) -> Self {
        let table = PageTable::new(Npt::new(48), pool).unwrap();
        for (page, content) in (0..).zip(contents) {
            let frame = data.alloc().unwrap();
            data.fill(frame, *content);
            table
                .map_page(Gpa(page * PAGE), PageSize::Size4K, frame, FLAGS)
                .unwrap();
        }
        let zero = data.alloc().unwrap();
        let mut frames = SharedFrames::new(zero, 64, [7, 11]);
        Self {
            data,
            table,
            scanner: frames.add_scanner(),
            frames,
            zero,
            last: vec![ZERO; contents.len()],
            groups: vec![None; contents.len()],
            pages: contents.len() as u64,
        }
    }

    fn leaf(&self, page: u64) -> Leaf<NptFlags> {
        self.table.translate(Gpa(page * PAGE)).unwrap().leaf
    }

    /// Looks at `count` pages from `first` on, all of which lose the write right at once if they are
    /// promising.
    fn scan(&mut self, first: u64, count: u64) {
        let memory = &self.data;
        let mut flush = self.table.no_edit();
        let mut frozen = vec![];
        for page in first..(first + count).min(self.pages) {
            let (at, frame) = (Gpa(page * PAGE), self.leaf(page).frame);
            if let Some(group) = self.groups[page as usize] {
                if self.frames.is_lonely(group) {
                    assert_eq!(self.frames.take_over(group), Some(frame));
                    assert!(self.table.thaw_page(at, frame));
                    self.groups[page as usize] = None;
                }
                continue;
            }
            let seen = digest(memory, frame, None);
            let before = std::mem::replace(&mut self.last[page as usize], seen);
            if seen != ZERO && before != seen {
                self.frames.note_volatile();
            } else if self.frames.look(seen, self.scanner, page)
                && self.table.freeze_page(&mut flush, at, frame)
            {
                frozen.push((page, frame, seen));
            }
        }
        flush.discharge(&mut NoHardware(0));
        let (mut flush, mut superfluous) = (self.table.no_edit(), vec![]);
        for (page, frame, seen) in frozen {
            let at = Gpa(page * PAGE);
            let Some(group) = self.frames.group(seen) else {
                self.groups[page as usize] = self.frames.found(seen, frame);
                continue;
            };
            let target = self.frames.join(group).unwrap();
            if is_equal(memory, target, frame)
                && self.table.redirect_page(&mut flush, at, frame, target)
            {
                self.groups[page as usize] = Some(group);
                superfluous.push(frame);
            } else {
                assert_eq!(self.frames.leave(group), None);
                assert!(self.table.thaw_page(at, frame));
            }
        }
        flush.discharge(&mut NoHardware(0));
        for frame in superfluous {
            self.data.free(frame);
        }
    }

    fn round(&mut self) {
        self.scan(0, self.pages);
        self.frames.finish_round(self.scanner);
    }

    /// The page's own frame, which it gets now if it shares one. `false` if the fault is not sharing's.
    fn unshare(&mut self, page: u64) -> Result<bool, NoFrame> {
        let (at, old) = (Gpa(page * PAGE), self.leaf(page).frame);
        let Some(group) = self.groups[page as usize] else {
            return Ok(false);
        };
        if self.frames.take_over(group).is_none() {
            let own = self.data.alloc().ok_or(NoFrame)?;
            (&self.data).copy(old, own);
            let mut flush = self.table.no_edit();
            if !self.table.redirect_page(&mut flush, at, old, own) {
                self.data.free(own);
                return Ok(false);
            }
            flush.discharge(&mut NoHardware(0));
            assert!(self.table.thaw_page(at, own));
            assert_eq!(self.frames.leave(group), None);
        } else if !self.table.thaw_page(at, old) {
            // It is its own again, and not to be written.
            self.groups[page as usize] = None;
            return Ok(false);
        }
        self.groups[page as usize] = None;
        Ok(true)
    }

    fn write(&mut self, page: u64, content: u64) -> Result<(), NoFrame> {
        let writable = |guest: &Self| guest.leaf(page).flags.contains(NptFlags::WRITABLE);
        if !writable(self) {
            assert!(self.unshare(page)?);
        }
        assert!(writable(self), "the page is the writer's own");
        self.data.fill(self.leaf(page).frame, content);
        Ok(())
    }

    fn read(&self, page: u64) -> u64 {
        self.data
            .content(self.table.translate(Gpa(page * PAGE)).unwrap().leaf.frame)
    }

    /// No frame is lost, and none is both shared and writable.
    fn check(&self) {
        let mut users = BTreeMap::<Hpa, Vec<bool>>::new();
        for (_, leaf) in self.table.leaves(Gpa(0), self.pages * PAGE).unwrap() {
            let writable = leaf.flags.contains(NptFlags::WRITABLE);
            users.entry(leaf.frame).or_default().push(writable);
        }
        for (frame, users) in &users {
            assert!(
                users.len() == 1 || users.iter().all(|writable| !writable),
                "{frame}"
            );
        }
        let total = self.data.frames.borrow().len();
        let free = self.data.free.borrow().len();
        let idle = usize::from(!users.contains_key(&self.zero));
        assert_eq!(total - free, users.len() + idle);
        let sharing = self.groups.iter().flatten().count() as u64;
        assert_eq!(self.frames.stats().sharing, sharing);
    }
}

#[test]
fn equal_pages_share_and_writers_get_their_own() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 0, 7, 8, 0, 7, 0, 9]);
    guest.scan(0, 8);
    // Zeros at once; others when they have stayed the same for a round, and there is a frame.
    let stats = guest.frames.stats();
    assert_eq!((stats.zero, stats.volatile, stats.sharing), (3, 5, 3));
    guest.round();
    guest.round();
    let stats = guest.frames.stats();
    assert_eq!((stats.sharing, stats.shared, stats.saved()), (6, 2, 4));
    guest.check();
    guest.write(2, 70).unwrap();
    guest.write(4, 40).unwrap();
    let contents: Vec<u64> = (0..8).map(|page| guest.read(page)).collect();
    assert_eq!(contents, [7, 0, 70, 8, 40, 7, 0, 9]);
    guest.write(0, 71).unwrap();
    guest.write(5, 72).unwrap();
    assert_eq!(guest.frames.stats().shared, 1);
    guest.check();
}

#[test]
fn no_edit_gives_a_shared_page_the_write_right() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    for _ in 0..3 {
        guest.round();
    }
    let mut hardware = NoHardware(0);
    let range = (Gpa(0), 2 * PAGE);
    let write = Rights::READ | Rights::WRITE;
    guest
        .table
        .protect(range.0, range.1, write)
        .unwrap()
        .discharge(&mut hardware);
    guest
        .table
        .update(range.0, range.1, |flags| flags | NptFlags::WRITABLE)
        .unwrap()
        .discharge(&mut hardware);
    guest
        .table
        .track_writes(range.0, range.1)
        .unwrap()
        .discharge(&mut hardware);
    // The write is the log's first, and then sharing's.
    assert!(guest.table.allow_tracked_write(Gpa(0)));
    assert!(!guest.table.allow_tracked_write(Gpa(0)));
    guest
        .table
        .untrack_writes(range.0, range.1)
        .unwrap()
        .discharge(&mut hardware);
    let changed = guest.table.change_page(Gpa(0), |mut leaf| {
        leaf.flags |= NptFlags::WRITABLE;
        leaf
    });
    changed.discharge(&mut hardware);
    for (_, leaf) in guest.table.leaves(range.0, range.1).unwrap() {
        assert!(!leaf.flags.contains(NptFlags::WRITABLE));
    }
    guest.write(0, 8).unwrap();
    assert_eq!((guest.read(0), guest.read(1)), (8, 7));
}

#[test]
fn a_shared_page_that_was_protected_stays_so_when_it_is_shared_no_more() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    for _ in 0..3 {
        guest.round();
    }
    let protect = |guest: &Guest<'_>, rights| {
        let flush = guest.table.protect(Gpa(0), PAGE, rights).unwrap();
        flush.discharge(&mut NoHardware(0));
    };
    protect(&guest, Rights::READ);
    assert_eq!(guest.unshare(0), Ok(false), "the fault is not sharing's");
    assert_eq!(guest.frames.stats().sharing, 2);
    protect(&guest, Rights::READ | Rights::WRITE);
    guest.write(0, 8).unwrap();
    assert_eq!((guest.read(0), guest.read(1)), (8, 7));
    guest.check();
}

/// A page that was written, and then shared before the log was harvested, is in the log; and one that
/// is written while it is shared and logged passes both.
#[test]
fn a_log_by_write_protection_misses_no_page_that_is_shared() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    let range = (Gpa(0), 2 * PAGE);
    let words = [const { AtomicU64::new(0) }; 1];
    let log = PageBitmap::new(0, &words);
    let harvest = |guest: &Guest<'_>| {
        let flush = guest.table.harvest_tracked(range.0, range.1, &log).unwrap();
        flush.discharge(&mut NoHardware(0));
        log.drain().collect::<Vec<_>>()
    };
    let tracked = guest.table.track_writes(range.0, range.1).unwrap();
    assert_eq!(tracked.discharge(&mut NoHardware(0)), 2);
    for page in 0..2 {
        assert!(guest.table.allow_tracked_write(Gpa(page * PAGE)));
    }
    for _ in 0..3 {
        guest.round();
    }
    assert_eq!(guest.frames.stats().sharing, 2);
    assert_eq!(harvest(&guest), [0, PAGE]);
    assert_eq!(harvest(&guest), []);
    // The first fault is the log's, the second one sharing's.
    assert_eq!(guest.unshare(1), Ok(false));
    assert!(guest.table.allow_tracked_write(Gpa(PAGE)));
    assert!(!guest.table.allow_tracked_write(Gpa(PAGE)));
    guest.write(1, 8).unwrap();
    assert_eq!(harvest(&guest), [PAGE]);
    assert_eq!((guest.read(0), guest.read(1)), (7, 8));
    let untracked = guest.table.untrack_writes(range.0, range.1).unwrap();
    untracked.discharge(&mut NoHardware(0));
    guest.write(0, 9).unwrap();
    assert_eq!((guest.read(0), guest.read(1)), (9, 8));
    guest.check();
}

#[test]
fn without_a_frame_the_page_stays_shared() {
    let (data, pool) = (Data::new(3), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    for _ in 0..3 {
        guest.round();
    }
    let taken = (&data).alloc().unwrap();
    assert_eq!(guest.write(0, 1), Err(NoFrame));
    assert_eq!((guest.read(0), guest.read(1)), (7, 7));
    (&data).free(taken);
    guest.write(0, 1).unwrap();
    // The last user needs none.
    guest.write(1, 3).unwrap();
    guest.check();
}

#[test]
fn only_a_page_that_may_be_written_is_frozen_and_only_a_frozen_one_led_elsewhere() {
    let (data, pool) = (Data::new(8), FramePool::new(16));
    let guest = Guest::new(&data, &pool, &[7, 8]);
    let (table, frame) = (&guest.table, guest.leaf(0).frame);
    let mut flush = table.no_edit();
    let at = Gpa(0);
    let other = Hpa(frame.0 + PAGE);
    assert!(
        !table.redirect_page(&mut flush, at, frame, other),
        "it can be written"
    );
    assert!(!table.freeze_page(&mut flush, at, other), "another frame");
    assert!(table.freeze_page(&mut flush, at, frame));
    assert!(!table.freeze_page(&mut flush, at, frame), "twice");
    assert!(!table.redirect_page(&mut flush, at, other, frame));
    for bad in [1 << 52, 8] {
        assert!(!table.redirect_page(&mut flush, at, frame, Hpa(bad)));
    }
    assert!(!table.thaw_page(at, other));
    assert!(table.thaw_page(at, frame) && !table.thaw_page(at, frame));
    // The token of another table would flush that one.
    let second = Guest::new(&data, &pool, &[1]);
    let mut foreign = second.table.no_edit();
    assert!(!table.freeze_page(&mut foreign, at, frame));
    foreign.discharge(&mut NoHardware(0));
    // Nothing there, and no such address.
    assert!(!table.freeze_page(&mut flush, Gpa(5 * PAGE), frame));
    assert!(!table.freeze_page(&mut flush, Gpa(1 << 60), frame));
    flush.discharge(&mut NoHardware(0));
}

#[test]
fn the_pace_is_kept() {
    let mut pace = Pace::new(1000, 50);
    assert_eq!(pace.grant(0), 0);
    assert_eq!(pace.grant(10_500_000), 10);
    assert_eq!(pace.grant(11_000_000), 1);
    assert_eq!(pace.grant(5_000_000), 0);
    assert_eq!(pace.grant(10_000_000_000), 50);
    let total: usize = (1..=1_000_000)
        .step_by(997)
        .map(|n| pace.grant(10_000_000_000 + n * 1000))
        .sum();
    assert!((990..=1000).contains(&total), "{total}");
    assert_eq!(
        Pace::new(u64::MAX, u64::MAX).grant(u64::MAX),
        u64::MAX as usize
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_word_decides(word in 0..512u64, bit in 0..64u32) {
        let data = Data::new(2);
        let memory = &data;
        let (a, b) = (memory.alloc().unwrap(), memory.alloc().unwrap());
        prop_assert!(is_zero(&memory, a, None) && is_equal(&memory, a, b));
        prop_assert_eq!(hash(&memory, a, None), hash(&memory, b, Some(a)));
        data.frames.borrow_mut()[((b.0 - FIRST) / PAGE) as usize][word as usize] = 1 << bit;
        prop_assert!(!is_zero(&memory, b, Some(a)) && !is_equal(&memory, a, b));
        prop_assert_ne!(hash(&memory, a, None), hash(&memory, b, Some(a)));
        // Several at once have the hashes that each has alone.
        let alone = [a, b, b, a].map(|page| hash(&memory, page, None));
        prop_assert_eq!(hashes(&memory, [a, b, b, a], Some([b, a, a, b])), alone);
    }

    #[test]
    fn contents_are_what_was_written(
        start in prop::collection::vec(0..4u64, 1..24),
        ops in prop::collection::vec((0..24u64, 0..5u64, 1..9u64), 1..60),
    ) {
        let (data, pool) = (Data::new(40), FramePool::new(16));
        let mut guest = Guest::new(&data, &pool, &start);
        let mut model = start.clone();
        for (page, content, pages) in ops {
            if content == 4 {
                guest.scan(page % guest.pages, pages * 3);
            } else {
                let page = page % guest.pages;
                guest.write(page, content).unwrap();
                model[page as usize] = content;
            }
            let contents: Vec<u64> = (0..guest.pages).map(|page| guest.read(page)).collect();
            prop_assert_eq!(&contents, &model);
            guest.check();
        }
    }
}
