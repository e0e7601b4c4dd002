//! Real threads on one table: faults in parallel with range edits and readers, with a flush that
//! waits as a hypervisor waits for its processors.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use testudo_arch::{Gpa, Hpa, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{FramePool, Invalidate, Invalidation, MapError, PageTable, Rights};

const PAGE: u64 = 4096;
const WORKERS: usize = 3;
/// Four tables of the lowest level.
const PAGES: u64 = 2048;
const FRAMES: usize = 64;
const FLAGS: NptFlags = NptFlags::WRITABLE
    .union(NptFlags::ACCESSED)
    .union(NptFlags::DIRTY);

/// Processors that pass a point outside every call again and again. An odd count means that one will
/// not come back.
struct Processors([AtomicU64; WORKERS]);

/// Waits until every processor has passed its point, which it does only between two calls.
struct Kick<'a>(&'a Processors);

// SAFETY: a processor whose count has changed since was between two calls at that time, and holds
// nothing from an earlier one.
unsafe impl Invalidate for Kick<'_> {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        for counter in &self.0.0 {
            let before = counter.load(Ordering::SeqCst);
            while before % 2 == 0 && counter.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
        }
        Ok(())
    }
}

/// A processor's own edits of single pages retire no table, so nobody has to wait for them.
struct Own;

// SAFETY: as above: what is freed after this is nothing.
unsafe impl Invalidate for Own {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

fn frame(page: u64) -> Hpa {
    Hpa((1 << 30) + page * PAGE)
}

/// What a processor does with random pages. Whatever it finds is the page's own frame.
fn work(
    table: &PageTable<Npt, &FramePool>,
    processors: &Processors,
    number: usize,
    stop: &AtomicBool,
) {
    let mut random = number as u64 + 1;
    while !stop.load(Ordering::Relaxed) {
        processors.0[number].fetch_add(2, Ordering::SeqCst);
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let page = (random >> 40) % PAGES;
        let address = Gpa(page * PAGE);
        match (random >> 33) % 8 {
            0..4 => match table.map_page(address, PageSize::Size4K, frame(page), FLAGS) {
                Ok(()) | Err(MapError::Occupied(_)) => {}
                Err(error) => panic!("{error}"),
            },
            4 => {
                if let Some(leaf) = table.unmap_page(address).discharge(&mut Own) {
                    assert_eq!(leaf.frame, frame(page));
                }
            }
            5 => {
                let old = table.change_page(address, |mut leaf| {
                    leaf.flags ^= NptFlags::WRITABLE;
                    leaf
                });
                if let Some(leaf) = old.discharge(&mut Own) {
                    assert_eq!(leaf.frame, frame(page));
                }
            }
            _ => {
                if let Some(found) = table.translate(Gpa(address.0 | 0x123)) {
                    assert_eq!(found.address, Hpa(frame(page).0 | 0x123));
                }
            }
        }
    }
    processors.0[number].fetch_add(1, Ordering::SeqCst);
}

#[test]
fn processors_fault_while_ranges_are_edited() {
    let pool = FramePool::new(FRAMES);
    let table = PageTable::new(Npt::new(48), &pool).unwrap();
    let processors = Processors(std::array::from_fn(|_| AtomicU64::new(0)));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..WORKERS {
            let (table, processors, stop) = (&table, &processors, &stop);
            scope.spawn(move || work(table, processors, number, stop));
        }
        // A worker that fails must not leave the others running.
        let edits = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..60u64 {
                let start = Gpa((round * 331) % PAGES * PAGE);
                let len = ((round * 97) % 700 + 1).min(PAGES - start.0 / PAGE) * PAGE;
                let mut kick = Kick(&processors);
                match round % 4 {
                    0 => table.unmap(start, len).unwrap().discharge(&mut kick),
                    1 => {
                        let flush = table.unmap_into(start, len, Vec::new()).unwrap();
                        for (address, leaf) in flush.discharge(&mut kick) {
                            assert_eq!(leaf.frame, frame(address.0 / PAGE));
                        }
                    }
                    2 => table
                        .protect(start, len, Rights::READ)
                        .unwrap()
                        .discharge(&mut kick),
                    _ => {
                        for (address, leaf) in table.leaves(start, len).unwrap() {
                            assert_eq!(leaf.frame, frame(address.0 / PAGE));
                        }
                    }
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        edits.unwrap();
    });
    assert_eq!(pool.free_frames() + table.table_frames(), FRAMES);
    table.destroy(&mut Own).unwrap();
    assert_eq!(pool.free_frames(), FRAMES);
}
