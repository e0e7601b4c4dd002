#![allow(unsafe_code, reason = "guest memory over the test's own")]

use core::sync::atomic::AtomicU64;
use std::collections::BTreeSet;
use std::sync::Mutex;
use std::vec;

use testudo_arch::memory::{BroughtIn, GuestRam};
use testudo_arch::{FrameAlloc, FrameMem, GuestMemory};
use testudo_ept::Rights;
use testudo_ept::format::npt::{Npt, NptFlags};

use super::*;

mod sharing;

const START: Gpa = Gpa(0x4000_0000);
const LEN: u64 = 4 * BLOCK;

/// Frames of leaked memory, at their own addresses. They hold ones when they are free.
struct Frames {
    all: Range<u64>,
    free: Mutex<BTreeSet<u64>>,
}

impl Frames {
    fn new(blocks: usize) -> &'static Self {
        let words = vec![u64::MAX; (blocks + 1) * BLOCK as usize / 8].leak();
        let first = (words.as_ptr() as u64).next_multiple_of(BLOCK);
        let all = first..first + blocks as u64 * BLOCK;
        let free = all.clone().step_by(PAGE_SIZE as usize).collect();
        std::boxed::Box::leak(std::boxed::Box::new(Self {
            all,
            free: Mutex::new(free),
        }))
    }

    fn count(&self) -> u64 {
        self.free.lock().unwrap().len() as u64
    }

    fn fill(frame: u64, byte: u8) -> Hpa {
        // SAFETY: a frame of the leaked memory that nobody else has.
        unsafe { core::ptr::write_bytes(frame as *mut u8, byte, PAGE_SIZE as usize) };
        Hpa(frame)
    }

    fn entry(&self, at: Hpa) -> &AtomicU64 {
        assert!(self.all.contains(&at.0) && at.0.is_multiple_of(8));
        // SAFETY: aligned, in leaked memory, and accessed atomically only while it is a table.
        unsafe { AtomicU64::from_ptr(at.0 as *mut u64) }
    }
}

// SAFETY: each frame is in the set once, and goes out zeroed.
unsafe impl FrameAlloc for &'static Frames {
    fn alloc(&self) -> Option<Hpa> {
        Some(Frames::fill(self.free.lock().unwrap().pop_first()?, 0))
    }

    fn free(&self, frame: Hpa) {
        assert!(self.all.contains(&frame.0));
        Frames::fill(frame.0, 0xFF);
        assert!(self.free.lock().unwrap().insert(frame.0), "freed twice");
    }
}

impl FrameMem for &'static Frames {
    fn load(&self, entry: Hpa) -> u64 {
        self.entry(entry).load(Ordering::Acquire)
    }
    fn store(&self, entry: Hpa, value: u64) {
        self.entry(entry).store(value, Ordering::Release);
    }
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        let entry = self.entry(entry);
        entry.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

// SAFETY: frames are at their addresses.
unsafe impl GuestFrames for &'static Frames {
    fn pointer(&self, frame: Hpa) -> NonNull<u8> {
        NonNull::new(frame.0 as *mut u8).unwrap()
    }

    fn alloc_block(&self) -> Option<Hpa> {
        let mut free = self.free.lock().unwrap();
        let frames = |first: u64| (first..first + BLOCK).step_by(PAGE_SIZE as usize);
        let mut starts = self.all.clone().step_by(BLOCK as usize);
        let first = starts.find(|first| frames(*first).all(|f| free.contains(&f)))?;
        for frame in frames(first) {
            free.remove(&frame);
            Frames::fill(frame, 0);
        }
        Some(Hpa(first))
    }
}

struct Bench {
    frames: &'static Frames,
    table: &'static PageTable<Npt, &'static Frames>,
    shootdown: Arc<Shootdown>,
    memory: &'static PagedMemory<Npt, &'static Frames>,
    ram: GuestRam,
}

impl Bench {
    fn new(blocks: usize, resident: bool) -> Self {
        Self::on(Frames::new(blocks), LEN, resident, None)
    }

    fn on(frames: &'static Frames, len: u64, resident: bool, shared: Option<SharedPool>) -> Self {
        let format = Npt::new(48);
        let flags = format.flags(Rights::all()).unwrap();
        let first = resident.then(|| {
            let first = frames.alloc_block().unwrap();
            for number in 1..len / BLOCK {
                let next = frames.alloc_block().unwrap();
                assert_eq!(next.0, first.0 + number * BLOCK, "in one piece");
            }
            first
        });
        let table = PageTable::new(format, frames).unwrap();
        let table: &'static _ = std::boxed::Box::leak(std::boxed::Box::new(table));
        let shootdown = Shootdown::new(2);
        let told = shootdown.clone();
        // SAFETY: no processor uses the table, and the frames are this range's.
        let memory = unsafe {
            let memory = match first {
                Some(first) => PagedMemory::resident_at(table, flags, START, len, first, told),
                None => PagedMemory::unplugged(table, flags, START, len, told),
            };
            match shared {
                Some(pool) => memory.unwrap().with_sharing(pool),
                None => memory,
            }
        };
        let memory = memory.unwrap().leak();
        let mut ram = GuestRam::new();
        ram.add_paged(START, len, memory).unwrap();
        Self {
            frames,
            table,
            shootdown,
            memory,
            ram,
        }
    }

    /// Both vCPUs look up.
    fn forget(&self) {
        for vcpu in 0..2 {
            self.shootdown.acknowledge(vcpu, self.shootdown.last());
        }
    }

    fn is_mapped(&self, gpa: Gpa) -> bool {
        self.table.translate(gpa).is_some()
    }
}

#[test]
fn a_reclaimed_page_leaves_the_table_at_once_and_is_free_when_all_have_forgotten_it() {
    let bench = Bench::new(6, true);
    let page = START.wrapping_add(3 * PAGE_SIZE);
    bench.ram.write(page, &[7; 16]).unwrap();
    let before = bench.frames.count();
    assert_eq!(bench.memory.reclaim(page, PAGE_SIZE), 1);
    assert!(!bench.is_mapped(page) && bench.is_mapped(START));
    assert_eq!(bench.memory.resident(), LEN - PAGE_SIZE);
    assert_eq!(bench.memory.in_limbo(), PAGE_SIZE);
    bench.shootdown.acknowledge(0, bench.shootdown.last());
    assert!(bench.frames.count() <= before, "one vCPU may still use it");
    bench.forget();
    assert_eq!(bench.memory.in_limbo(), 0);
    // One frame came back, and one became the table of the page that was split.
    assert_eq!(bench.frames.count(), before);
    // What comes back is zeroed, in the table, and counted.
    assert!(bench.ram.contains(page, PAGE_SIZE) && !bench.is_mapped(page));
    assert_eq!(bench.ram.bring_in(page, false), BroughtIn::Present);
    assert!(bench.is_mapped(page));
    assert_eq!(bench.ram.load_u64(page), Ok(0));
    assert_eq!(bench.memory.resident(), LEN);
}

#[test]
fn a_page_in_limbo_comes_back_as_it_was_and_is_not_freed() {
    let bench = Bench::new(6, true);
    bench.ram.write(START, &[7; 16]).unwrap();
    let frame = bench.table.translate(START).unwrap().address;
    bench.memory.reclaim(START, 2 * PAGE_SIZE);
    // A processor that has not forgotten reads the same bytes as one that has.
    assert_eq!(bench.ram.load_u64(START), Ok(0x0707_0707_0707_0707));
    assert_eq!(bench.table.translate(START).unwrap().address, frame);
    let before = bench.frames.count();
    bench.forget();
    assert_eq!(bench.frames.count(), before + 1, "the other page's");
    assert_eq!(bench.ram.load_u64(START), Ok(0x0707_0707_0707_0707));
    // Gone, back and gone again, before anybody forgets: freed once.
    bench.memory.reclaim(START, PAGE_SIZE);
    assert!(bench.ram.load_u64(START).is_ok());
    bench.memory.reclaim(START, PAGE_SIZE);
    bench.forget();
    assert_eq!(bench.ram.load_u64(START), Ok(0));
}

#[test]
fn many_edits_before_anybody_looks_share_their_obligation() {
    let bench = Bench::new(8, true);
    for page in (0..1024).step_by(2) {
        let at = START.wrapping_add(page * PAGE_SIZE);
        assert_eq!(bench.memory.reclaim(at, PAGE_SIZE), 1);
        assert_eq!(bench.memory.reclaim(at, PAGE_SIZE), 0, "it is away");
    }
    assert!(bench.memory.limbo.lock().pending.len() <= 2);
    let before = bench.frames.count();
    bench.forget();
    assert_eq!(bench.frames.count(), before + 512);
    assert_eq!(bench.memory.in_limbo(), 0);
}

#[test]
fn memory_is_plugged_in_large_pages_and_refused_when_it_is_not() {
    let bench = Bench::new(4, false);
    let free = bench.frames.count();
    assert_eq!(bench.ram.bring_in(START, false), BroughtIn::NothingAway);
    assert!(!bench.ram.contains(START, 1) && bench.ram.load_u64(START).is_err());
    assert!(bench.memory.plug(START, BLOCK));
    assert_eq!(bench.table.translate(START).unwrap().leaf.shift, 21);
    assert_eq!(bench.memory.resident(), BLOCK);
    let last = START.wrapping_add(BLOCK - 8);
    bench.ram.store_u64(last, 5).unwrap();
    assert!(bench.ram.write(last, &[0; 9]).is_err());
    assert_eq!(bench.ram.load_u64(last), Ok(5), "nothing was written");
    assert!(!bench.memory.plug(START, BLOCK), "it is there");
    assert!(bench.memory.unplug(START, BLOCK));
    assert!(!bench.is_mapped(START) && bench.ram.load_u64(last).is_err());
    assert!(
        !bench.memory.plug(START, BLOCK),
        "a processor may still see the old frames"
    );
    bench.forget();
    assert_eq!(bench.frames.count(), free);
    assert!(bench.memory.plug(START, BLOCK));
    assert_eq!(bench.ram.load_u64(last), Ok(0));
    // Nobody's addresses.
    let beyond = START.wrapping_add(LEN);
    assert!(!bench.memory.plug(beyond, BLOCK) && !bench.memory.unplug(beyond, BLOCK));
    assert_eq!(bench.memory.reclaim(START.wrapping_add(1), PAGE_SIZE), 0);
}

#[test]
fn what_left_as_a_whole_comes_back_in_a_large_page() {
    let bench = Bench::new(6, true);
    let block = START.wrapping_add(BLOCK);
    assert_eq!(bench.memory.reclaim(block, BLOCK), 512);
    bench.forget();
    assert_eq!(bench.memory.resident(), LEN - BLOCK);
    let page = block.wrapping_add(5 * PAGE_SIZE);
    assert_eq!(bench.ram.bring_in(page, false), BroughtIn::Present);
    assert_eq!(bench.table.translate(page).unwrap().leaf.shift, 21);
    assert_eq!(bench.memory.resident(), LEN);
    // With one page of it in limbo, the others come alone.
    bench.memory.reclaim(block, BLOCK - PAGE_SIZE);
    bench.forget();
    bench
        .memory
        .reclaim(block.wrapping_add(BLOCK - PAGE_SIZE), PAGE_SIZE);
    assert_eq!(bench.ram.bring_in(page, false), BroughtIn::Present);
    assert_eq!(bench.memory.resident(), LEN - BLOCK + PAGE_SIZE);
}

#[test]
fn memory_that_is_not_plugged_is_not_the_guests_to_give() {
    let bench = Bench::new(4, false);
    assert_eq!(bench.memory.reclaim(START, BLOCK), 0);
    assert_eq!(bench.ram.bring_in(START, false), BroughtIn::NothingAway);
    assert!(bench.memory.plug(START, BLOCK));
    assert_eq!(bench.memory.reclaim(START, PAGE_SIZE), 1);
    assert!(bench.memory.unplug(START, BLOCK));
    assert!(!bench.ram.contains(START, 1));
}

#[test]
fn what_cannot_be_plugged_whole_is_not_plugged() {
    let bench = Bench::new(3, false);
    let free = bench.frames.count();
    assert!(!bench.memory.plug(START, LEN));
    assert_eq!(bench.memory.resident(), 0);
    bench.forget();
    assert_eq!(bench.frames.count(), free);
    assert!(bench.memory.plug(START, BLOCK));
}

#[test]
fn an_empty_host_is_told_from_what_is_no_memory() {
    let bench = Bench::new(5, true);
    bench.memory.reclaim(START, BLOCK);
    bench.forget();
    let mut held = vec![];
    while let Some(frame) = bench.frames.alloc() {
        held.push(frame);
    }
    assert_eq!(bench.ram.bring_in(START, false), BroughtIn::NoneLeft);
    assert!(bench.ram.load_u64(START).is_err());
    for frame in held {
        bench.frames.free(frame);
    }
    assert_eq!(bench.ram.bring_in(START, false), BroughtIn::Present);
}

#[test]
fn accesses_cross_pages_wherever_their_frames_are() {
    let bench = Bench::new(6, true);
    for page in [0, 2] {
        bench
            .memory
            .reclaim(START.wrapping_add(page * PAGE_SIZE), PAGE_SIZE);
    }
    bench.forget();
    let data: vec::Vec<u8> = (0..3 * PAGE_SIZE)
        .map(|i| i as u8 ^ (i >> 8) as u8)
        .collect();
    let at = START.wrapping_add(100);
    bench.ram.write(at, &data).unwrap();
    let mut back = vec![0; data.len()];
    bench.ram.read(at, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(bench.ram.word(START).map(|_| ()), None);
}
