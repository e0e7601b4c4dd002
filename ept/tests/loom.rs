//! Every interleaving of small concurrent scenes, under loom:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p testudo-ept --test loom --release
//! ```
#![cfg(loom)]
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::sync::atomic::AtomicBool;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{Format, Invalidate, Invalidation, MapError, PageBitmap, PageTable, Rights};

const FRAMES: usize = 7;
const FLAGS: NptFlags = NptFlags::WRITABLE;
const PAGE: u64 = 4096;
/// The entries of a frame that the scenes use: loom's memory is dear.
const USED: u64 = 4;

/// Frames of a few entries each; the others are always zero. Touching one that is free panics.
struct Frames {
    entries: Vec<AtomicU64>,
    /// What really is so at each moment: no variable of the model, but the judge of it.
    used: Vec<AtomicBool>,
}

impl Frames {
    fn new() -> Self {
        Self {
            entries: (0..FRAMES * USED as usize)
                .map(|_| AtomicU64::new(0))
                .collect(),
            used: (0..FRAMES).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    fn entry(&self, at: Hpa) -> Option<&AtomicU64> {
        let frame = (at.0 / PAGE - 1) as usize;
        assert!(
            self.used[frame].load(Ordering::Acquire),
            "{at} is in a free frame"
        );
        let index = at.0 % PAGE / 8;
        (index < USED).then(|| &self.entries[frame * USED as usize + index as usize])
    }

    fn in_use(&self) -> usize {
        self.used
            .iter()
            .filter(|used| used.load(Ordering::Acquire))
            .count()
    }
}

// SAFETY: `used` gives each frame to one caller at a time, and it is zeroed.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        let taken = |used: &AtomicBool| !used.swap(true, Ordering::AcqRel);
        let frame = self.used.iter().position(taken)?;
        for index in 0..USED as usize {
            self.entries[frame * USED as usize + index].store(0, Ordering::Relaxed);
        }
        Some(Hpa((frame as u64 + 1) * PAGE))
    }
    fn free(&self, frame: Hpa) {
        let used = &self.used[(frame.0 / PAGE - 1) as usize];
        assert!(used.swap(false, Ordering::AcqRel), "{frame} is freed twice");
    }
}

impl FrameMem for Frames {
    fn load(&self, at: Hpa) -> u64 {
        self.entry(at)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }
    fn store(&self, at: Hpa, value: u64) {
        match self.entry(at) {
            Some(entry) => entry.store(value, Ordering::Release),
            None => assert_eq!(value, 0, "the scenes use the first entries only"),
        }
    }
    fn compare_exchange(&self, at: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        let entry = self
            .entry(at)
            .expect("the scenes use the first entries only");
        entry.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

type Table = PageTable<Npt, Frames>;

fn table() -> Arc<Table> {
    Arc::new(PageTable::new(Npt::new(40), Frames::new()).unwrap())
}

/// A flush that waits for the other processor, as an acknowledged request does.
struct WaitFor(Option<thread::JoinHandle<()>>);

// SAFETY: the only other thread is over when this returns.
unsafe impl Invalidate for WaitFor {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        if let Some(thread) = self.0.take() {
            thread.join().unwrap();
        }
        Ok(())
    }
}

fn check(bound: usize, scene: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(bound);
    model.max_branches = 20_000;
    model.check(scene);
}

/// Two processors take the same fault: one mapping wins, both see it, and no table is lost.
#[test]
fn the_same_page_is_mapped_once() {
    check(6, || {
        let table = table();
        let other = table.clone();
        let map =
            |table: &Table, frame| table.map_page(Gpa(0), PageSize::Size4K, Hpa(frame), FLAGS);
        let thread = thread::spawn(move || {
            let result = map(&other, 0x8000);
            assert!(matches!(
                result,
                Ok(()) | Err(MapError::Occupied(0) | MapError::Edit(_))
            ));
            assert!(other.translate(Gpa(0)).is_some() || result.is_err());
        });
        let result = map(&table, 0x9000);
        thread.join().unwrap();
        let found = table.translate(Gpa(0)).unwrap().address;
        assert_eq!(found == Hpa(0x9000), result.is_ok());
        assert_eq!((table.table_frames(), table.frames().in_use()), (4, 4));
    });
}

/// Two pages of one new table: both are there in the end.
#[test]
fn neighbours_share_the_tables_that_either_builds() {
    check(6, || {
        let table = table();
        let other = table.clone();
        let thread = thread::spawn(move || {
            other
                .map_page(Gpa(PAGE), PageSize::Size4K, Hpa(0x8000), FLAGS)
                .unwrap();
        });
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        thread.join().unwrap();
        assert_eq!(table.translate(Gpa(0)).unwrap().address, Hpa(0x9000));
        assert_eq!(table.translate(Gpa(PAGE)).unwrap().address, Hpa(0x8000));
        assert_eq!((table.table_frames(), table.frames().in_use()), (4, 4));
    });
}

/// A reader walks while the tables under it are retired: it sees the page or nothing, and the frames
/// are freed only after it.
#[test]
fn a_reader_outlives_the_tables_it_walks() {
    check(6, || {
        let table = table();
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        let other = table.clone();
        let thread = thread::spawn(move || {
            let found = other.translate(Gpa(0)).map(|found| found.address);
            assert!(matches!(found, None | Some(Hpa(0x9000))));
        });
        let flush = table.unmap(Gpa(0), 4 * PAGE).unwrap();
        flush.discharge(&mut WaitFor(Some(thread)));
        assert_eq!((table.table_frames(), table.frames().in_use()), (1, 1));
    });
}

/// A processor maps a page while another empties and retires the table it would lie in.
#[test]
fn no_mapping_is_put_into_a_retired_table() {
    check(4, || {
        let table = table();
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        let other = table.clone();
        let thread = thread::spawn(move || {
            // Frames may be short while the old tables wait for the flush.
            let _ = other.map_page(Gpa(PAGE), PageSize::Size4K, Hpa(0x8000), FLAGS);
            other.unmap_page(Gpa(PAGE)).discharge(&mut WaitFor(None));
        });
        let flush = table.unmap(Gpa(0), PAGE).unwrap();
        flush.discharge(&mut WaitFor(Some(thread)));
        assert!(table.translate(Gpa(0)).is_none());
        assert_eq!(table.table_frames(), table.frames().in_use());
    });
}

/// Where the entry of page 0 lies.
fn entry_of(table: &Table) -> Hpa {
    let mut at = table.root();
    for level in (2..=4).rev() {
        at = table.format().child(table.frames().load(at), level).0;
    }
    at
}

/// What a processor does on a write to page 0: a locked update of the entry that it has read, if
/// that allows the write. Whether it has written.
fn hardware_writes(table: &Table, at: Hpa) -> bool {
    loop {
        let entry = table.frames().load(at);
        if entry & 3 != 3 {
            return false;
        }
        let marked = entry | 0x60;
        if marked == entry || table.frames().compare_exchange(at, entry, marked).is_ok() {
            return true;
        }
    }
}

/// A page that hardware writes while dirty bits are harvested is logged, or still dirty.
#[test]
fn no_dirty_bit_is_lost_to_a_harvest() {
    check(4, || {
        let table = table();
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        let (other, at) = (table.clone(), entry_of(&table));
        let thread = thread::spawn(move || assert!(hardware_writes(&other, at)));
        let words = [std::sync::atomic::AtomicU64::new(0)];
        let log = PageBitmap::new(0, &words);
        let harvest = table.harvest_dirty(Gpa(0), PAGE, &log).unwrap();
        let mut processor = WaitFor(Some(thread));
        harvest.discharge(&mut processor);
        // Nothing was dirty, and nothing to wait for: the write comes later then.
        if let Some(thread) = processor.0 {
            thread.join().unwrap();
        }
        let leaf = table.translate(Gpa(0)).unwrap().leaf;
        assert!(log.drain().count() == 1 || leaf.flags.contains(NptFlags::DIRTY));
    });
}

/// Rights that change while hardware writes: its dirty bit stays.
#[test]
fn no_dirty_bit_is_lost_to_a_change_of_rights() {
    check(4, || {
        let table = table();
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        let (other, at) = (table.clone(), entry_of(&table));
        let wrote = Arc::new(AtomicU64::new(0));
        let told = wrote.clone();
        let thread = thread::spawn(move || {
            told.store(u64::from(hardware_writes(&other, at)), Ordering::Release);
        });
        let flush = table.protect(Gpa(0), PAGE, Rights::READ).unwrap();
        flush.discharge(&mut WaitFor(Some(thread)));
        let leaf = table.translate(Gpa(0)).unwrap().leaf;
        let dirty = leaf.flags.contains(NptFlags::DIRTY);
        assert_eq!(dirty, wrote.load(Ordering::Acquire) == 1);
    });
}

/// A page that is taken out while hardware writes comes out dirty, if the write was made.
#[test]
fn no_dirty_bit_is_lost_to_an_unmapping() {
    check(4, || {
        let table = table();
        table
            .map_page(Gpa(0), PageSize::Size4K, Hpa(0x9000), FLAGS)
            .unwrap();
        let (other, at) = (table.clone(), entry_of(&table));
        let wrote = Arc::new(AtomicU64::new(0));
        let told = wrote.clone();
        let thread = thread::spawn(move || {
            told.store(u64::from(hardware_writes(&other, at)), Ordering::Release);
        });
        let flush = table.unmap_into(Gpa(0), PAGE, Vec::new()).unwrap();
        let pages = flush.discharge(&mut WaitFor(Some(thread)));
        let dirty = pages[0].1.flags.contains(NptFlags::DIRTY);
        assert_eq!(dirty, wrote.load(Ordering::Acquire) == 1);
    });
}
