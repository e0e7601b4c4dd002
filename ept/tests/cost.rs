//! What operations cost, in accesses to entries: the same on every machine.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{FramePool, Invalidate, Invalidation, PageBitmap, PageTable, Rights};

/// Frames whose every access is counted.
struct Counted {
    pool: FramePool,
    accesses: AtomicU64,
}

impl Counted {
    fn count(&self, accesses: u64) {
        self.accesses.fetch_add(accesses, Ordering::Relaxed);
    }
}

#[allow(unsafe_code)]
// SAFETY: every call goes to the pool, which keeps the promise.
unsafe impl FrameAlloc for Counted {
    fn alloc(&self) -> Option<Hpa> {
        self.pool.alloc()
    }
    fn free(&self, frame: Hpa) {
        self.pool.free(frame);
    }
}

impl FrameMem for Counted {
    fn load(&self, entry: Hpa) -> u64 {
        self.count(1);
        self.pool.load(entry)
    }
    fn store(&self, entry: Hpa, value: u64) {
        self.count(1);
        self.pool.store(entry, value);
    }
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        self.count(1);
        self.pool.compare_exchange(entry, current, new)
    }
    fn fill(&self, first: Hpa, count: usize, value: u64, step: u64) {
        self.count(count as u64);
        self.pool.fill(first, count, value, step);
    }
}

struct NoHardware;

#[allow(unsafe_code)]
// SAFETY: no hardware walks these tables.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

const NAMES: [&str; 5] = ["map", "translate", "protect", "harvest", "unmap"];
const TOTAL: u64 = 1 << 30;

/// The accesses that 1 GiB of small pages take, which lie in `pieces` over `pieces * stride` bytes.
fn accesses(pieces: u64, stride: u64) -> [u64; 5] {
    let frames = Counted {
        pool: FramePool::new(700),
        accesses: AtomicU64::new(0),
    };
    let table = PageTable::new(Npt::new(48), frames).unwrap();
    let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
    let (len, whole) = (TOTAL / pieces, pieces * stride);
    let starts = || (0..pieces).map(|piece| piece * stride);
    // A bit for each of the pages that are there; the holes have none, and mark none.
    let logs: Vec<Vec<AtomicU64>> = starts()
        .map(|_| (0..len >> 18).map(|_| AtomicU64::new(0)).collect())
        .collect();
    let counted = |run: &dyn Fn()| {
        table.frames().accesses.store(0, Ordering::Relaxed);
        run();
        table.frames().accesses.load(Ordering::Relaxed)
    };
    [
        counted(&|| {
            for start in starts() {
                let mapped = table.map_up_to(Gpa(start), len, Hpa(0), flags, PageSize::Size4K);
                mapped.unwrap();
            }
        }),
        counted(&|| {
            for page in starts().flat_map(|start| (start..start + len).step_by(4096)) {
                assert!(table.translate(Gpa(page)).is_some());
            }
        }),
        counted(&|| {
            let flush = table.protect(Gpa(0), whole, Rights::READ).unwrap();
            flush.discharge(&mut NoHardware);
        }),
        counted(&|| {
            for (start, log) in starts().zip(&logs) {
                let end = start + stride;
                let log = PageBitmap::new(start, log);
                let flush = table.harvest_dirty(Gpa(start), end - start, &log).unwrap();
                assert_eq!(flush.discharge(&mut NoHardware), len / 4096);
            }
        }),
        counted(&|| {
            let flush = table.unmap(Gpa(0), whole).unwrap();
            flush.discharge(&mut NoHardware);
        }),
    ]
}

/// Memory with holes of many gigabytes costs what it costs without them.
#[test]
fn a_page_costs_the_same_in_one_gigabyte_and_over_sixteen_terabytes() {
    let dense = accesses(1, TOTAL);
    let sparse = accesses(64, 1 << 38);
    for ((name, dense), sparse) in NAMES.iter().zip(dense).zip(sparse) {
        let pages = TOTAL / 4096;
        println!("{name}: {dense} and {sparse} accesses for {pages} pages");
        assert!(
            // The tables in between, which dense memory has not.
            sparse.saturating_sub(dense) <= pages / 4,
            "{name}: {dense} accesses in one piece, {sparse} over 16 TiB"
        );
    }
}
