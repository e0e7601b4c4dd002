//! Pages that are shared keep their contents, and frames are neither lost nor freed in use.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use testudo_arch::{FrameAlloc, Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::sharing::{NoFrame, Pace, PageMemory, Sharing, hash, is_equal, is_zero};
use testudo_ept::{FramePool, Invalidate, Invalidation, PageBitmap, PageTable, Rights};

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

struct Guest<'a> {
    data: &'a Data,
    table: PageTable<Npt, &'a FramePool>,
    sharing: Sharing<&'a Data>,
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
        let pages = contents.len() as u64;
        let sharing = Sharing::new(data);
        Self {
            data,
            table,
            sharing,
            pages,
        }
    }

    fn round(&mut self, pages: usize) {
        let range = (Gpa(0), self.pages * PAGE);
        let memory = self.data;
        while !self
            .sharing
            .scan(&self.table, range, pages, &memory, &mut NoHardware(0))
            .unwrap()
        {}
    }

    fn write(&mut self, page: u64, content: u64) -> Result<(), NoFrame> {
        let writable = |guest: &Self| {
            let leaf = guest.table.translate(Gpa(page * PAGE)).unwrap().leaf;
            leaf.flags
                .contains(NptFlags::WRITABLE)
                .then_some(leaf.frame)
        };
        if writable(self).is_none() {
            let memory = self.data;
            let flush = self
                .sharing
                .unshare(&self.table, Gpa(page * PAGE + 9), &memory)?;
            assert!(flush.discharge(&mut NoHardware(0)));
        }
        self.data.fill(
            writable(self).expect("the page is the writer's own"),
            content,
        );
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
        let stats = self.sharing.stats();
        // The page of zeros may be without users for the moment.
        let idle = u64::from(stats.shared > 0 && stats.zero == 0 && self.has_idle_zero(&users));
        let total = self.data.frames.borrow().len() as u64;
        let free = self.data.free.borrow().len() as u64;
        assert_eq!(total - free, users.len() as u64 + idle);
    }

    fn has_idle_zero(&self, users: &BTreeMap<Hpa, Vec<bool>>) -> bool {
        let shared = users
            .values()
            .filter(|users| users.iter().all(|writable| !writable));
        self.sharing.stats().shared > shared.count() as u64
    }
}

#[test]
fn equal_pages_share_and_writers_get_their_own() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 0, 7, 8, 0, 7, 0, 9]);
    guest.round(3);
    // Zeros at once; others when they have stayed the same for a round.
    assert_eq!(
        (guest.sharing.stats().zero, guest.sharing.stats().volatile),
        (3, 5)
    );
    guest.round(3);
    let stats = guest.sharing.stats();
    assert_eq!((stats.sharing, stats.shared, stats.saved()), (6, 2, 4));
    guest.check();
    guest.write(2, 70).unwrap();
    guest.write(4, 40).unwrap();
    let contents: Vec<u64> = (0..8).map(|page| guest.read(page)).collect();
    assert_eq!(contents, [7, 0, 70, 8, 40, 7, 0, 9]);
    assert_eq!(guest.sharing.stats().unshared, 2);
    guest.write(0, 71).unwrap();
    guest.write(5, 72).unwrap();
    assert_eq!(guest.sharing.stats().shared, 1);
    guest.check();
}

#[test]
fn no_edit_gives_a_shared_page_the_write_right() {
    let (data, pool) = (Data::new(32), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    guest.round(8);
    guest.round(8);
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
    guest.round(8);
    guest.round(8);
    let mut hardware = NoHardware(0);
    let protect = |guest: &Guest<'_>, rights| {
        let flush = guest.table.protect(Gpa(0), PAGE, rights).unwrap();
        flush.discharge(&mut NoHardware(0));
    };
    protect(&guest, Rights::READ);
    let memory = &data;
    let flush = guest
        .sharing
        .unshare(&guest.table, Gpa(0), &memory)
        .unwrap();
    assert!(
        !flush.discharge(&mut hardware),
        "the fault is not sharing's"
    );
    assert_eq!(guest.sharing.stats().sharing, 2);
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
    guest.round(8);
    guest.round(8);
    assert_eq!(guest.sharing.stats().sharing, 2);
    assert_eq!(harvest(&guest), [0, PAGE]);
    assert_eq!(harvest(&guest), []);
    // The first fault is the log's, the second one sharing's.
    let memory = &data;
    let flush = guest
        .sharing
        .unshare(&guest.table, Gpa(PAGE), &memory)
        .unwrap();
    assert!(!flush.discharge(&mut NoHardware(0)));
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

/// A frame that is mapped twice was never promised; but it must not be freed.
#[test]
fn a_frame_mapped_twice_is_not_shared_with_itself() {
    let (data, pool) = (Data::new(8), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7]);
    let frame = guest.table.translate(Gpa(0)).unwrap().address;
    let mapped = guest
        .table
        .map_page(Gpa(PAGE), PageSize::Size4K, frame, FLAGS);
    mapped.unwrap();
    guest.pages = 2;
    for _ in 0..3 {
        guest.round(8);
    }
    assert_eq!(data.free.borrow().len(), 7);
    assert_eq!(guest.sharing.stats().sharing, 0);
}

#[test]
fn without_a_frame_the_page_stays_shared() {
    let (data, pool) = (Data::new(3), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7, 7]);
    guest.round(8);
    guest.round(8);
    guest.write(0, 1).unwrap();
    guest.write(1, 2).unwrap();
    // The last user needs no frame.
    guest.write(2, 3).unwrap();
    guest.check();
    let (data, pool) = (Data::new(2), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    guest.round(8);
    guest.round(8);
    let taken = (&data).alloc().unwrap();
    assert_eq!(guest.write(0, 1), Err(NoFrame));
    assert_eq!((guest.read(0), guest.read(1)), (7, 7));
    (&data).free(taken);
    guest.write(0, 1).unwrap();
}

#[test]
fn an_unmapped_page_leaves_its_group() {
    let (data, pool) = (Data::new(8), FramePool::new(16));
    let mut guest = Guest::new(&data, &pool, &[7, 7]);
    guest.round(8);
    guest.round(8);
    for (page, last) in [(0, false), (1, true)] {
        let leaf = guest
            .table
            .unmap_page(Gpa(page * PAGE))
            .discharge(&mut NoHardware(0))
            .unwrap();
        assert_eq!(guest.sharing.unmapped(leaf.frame), last);
        if last {
            (&data).free(leaf.frame);
        }
    }
    assert_eq!(data.free.borrow().len(), 8);
    assert_eq!(guest.sharing.stats().shared, 0);
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
    }

    #[test]
    fn contents_are_what_was_written(
        start in prop::collection::vec(0..4u64, 1..24),
        ops in prop::collection::vec((0..24u64, 0..5u64, 1..9usize), 1..60),
    ) {
        let (data, pool) = (Data::new(40), FramePool::new(16));
        let mut guest = Guest::new(&data, &pool, &start);
        let mut model = start.clone();
        for (page, content, pages) in ops {
            if content == 4 {
                guest.round(pages);
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
