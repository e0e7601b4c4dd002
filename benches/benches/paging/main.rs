//! Page tables beside `x86_64`, `page_table_multiarch` and the bare loop that stores the same entries.
//!
//! Every competitor uses the same frames. A range is 1 GiB in pages of 4 KiB unless its name says
//! otherwise; times are for the whole range, and criterion divides them by its pages.
#![allow(unsafe_code, reason = "the frames are plain memory")]

mod arena;
mod ratios;
mod scan;

use std::convert::Infallible;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arena::{Frames, Handler, NoFlush};
use criterion::{Criterion, Throughput, criterion_group};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{MappingFlags, PageTable64};
use testudo_arch::{Gva, Hpa, PageSize};
use testudo_ept::format::long_mode::{LongMode, LongModeFlags};
use testudo_ept::{Invalidate, Invalidation, PageBitmap, PageTable, Rights};
use x86_64::structures::paging::mapper::{Mapper, OffsetPageTable, Translate};
use x86_64::structures::paging::{
    Page, PageTable as RawTable, PageTableFlags, PhysFrame, Size4KiB,
};

const LEN: u64 = 1 << 30;
const PAGES: u64 = LEN / 4096;
const FIRST: u64 = 1 << 39;
const FRAME: u64 = 1 << 32;
const FLAGS: LongModeFlags = LongModeFlags::WRITABLE
    .union(LongModeFlags::ACCESSED)
    .union(LongModeFlags::DIRTY);
const ENTRY: u64 = 0x63;

type Ours = PageTable<LongMode, Frames>;
type Multiarch = PageTable64<NoFlush, X64PTE, Handler>;

struct NoHardware;

// SAFETY: no hardware walks these tables, and one thread uses them.
unsafe impl Invalidate for NoHardware {
    type Error = Infallible;
    fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The time that `run` takes on what `prepare` makes, summed over `rounds`.
fn timed<T>(
    rounds: u64,
    mut prepare: impl FnMut() -> T,
    mut run: impl FnMut(&mut T),
    done: impl Fn(T),
) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        let mut subject = prepare();
        let start = Instant::now();
        run(&mut subject);
        total += start.elapsed();
        done(subject);
    }
    total
}

// Ours.

fn ours() -> Ours {
    PageTable::new(LongMode::new(46), Frames::new()).unwrap()
}

fn map_ours(table: &mut Ours) {
    table
        .map_up_to(Gva(FIRST), LEN, Hpa(FRAME), FLAGS, PageSize::Size4K)
        .unwrap();
}

fn ours_mapped() -> Ours {
    let mut table = ours();
    map_ours(&mut table);
    table
}

fn protect_ours(table: &Ours, writable: bool) {
    let rights = match writable {
        true => Rights::READ | Rights::WRITE,
        false => Rights::READ,
    };
    let flush = table.protect(Gva(FIRST), LEN, rights).unwrap();
    flush.discharge(&mut NoHardware);
}

fn translate_ours(table: &Ours, addresses: &[u64]) -> u64 {
    addresses.iter().fold(0, |sum, a| {
        sum ^ table.translate(Gva(*a)).unwrap().address.0
    })
}

fn ours_large() -> Ours {
    let table = ours();
    table
        .map_up_to(Gva(FIRST), LEN, Hpa(FRAME), FLAGS, PageSize::Size2M)
        .unwrap();
    table
}

fn split_ours(table: &mut Ours) {
    let flush = table.split(Gva(FIRST), LEN, PageSize::Size4K).unwrap();
    flush.discharge(&mut NoHardware);
}

fn merge_ours(table: &mut Ours) {
    let flush = table.merge(Gva(FIRST), LEN, PageSize::Size2M).unwrap();
    assert_eq!(flush.discharge(&mut NoHardware), 512);
}

/// 64 pieces of 16 MiB over 16 TiB.
fn map_sparse(table: &mut Ours) {
    for piece in 0..64u64 {
        let start = Gva(FIRST + (piece << 38));
        table
            .map_up_to(start, LEN / 64, Hpa(FRAME), FLAGS, PageSize::Size4K)
            .unwrap();
    }
}

fn ours_clean() -> Ours {
    let table = ours_mapped();
    let clean = |flags| flags - LongModeFlags::DIRTY;
    let flush = table.update(Gva(FIRST), LEN, clean).unwrap();
    flush.discharge(&mut NoHardware);
    table
}

/// Marks every `every`th page as hardware would; 0 for none. Every entry is looked at, as by [`dirty_bare`]:
/// what is to be harvested is in the same caches.
fn dirty_ours(table: &Ours, every: u64) {
    black_box(table.leaves(Gva(FIRST), LEN).unwrap().count());
    for number in (0..PAGES).filter(|n| is_dirty(*n, every)) {
        let marked = table.change_page(Gva(FIRST + number * 4096), |mut leaf| {
            leaf.flags |= LongModeFlags::DIRTY;
            leaf
        });
        marked.discharge(&mut NoHardware);
    }
}

fn harvest_ours(table: &Ours, log: &PageBitmap<'_>) {
    let flush = table.harvest_dirty(Gva(FIRST), LEN, log).unwrap();
    black_box(flush.discharge(&mut NoHardware));
}

fn ours_done(table: Ours) {
    let destroyed = table.destroy(&mut NoHardware);
    assert!(destroyed.is_ok());
}

// `x86_64`.

struct Peer(OffsetPageTable<'static>, u64);

fn peer() -> Peer {
    let base = arena::base();
    let root = arena::take_zeroed(base).unwrap();
    // SAFETY: the frame is ours until `peer_done`, and the offset leads to the block.
    let table = unsafe {
        let root = &mut *base.add(root as usize).cast::<RawTable>();
        OffsetPageTable::new(root, x86_64::VirtAddr::from_ptr(base))
    };
    Peer(table, root)
}

fn peer_page(number: u64) -> Page<Size4KiB> {
    Page::containing_address(x86_64::VirtAddr::new(FIRST + number * 4096))
}

fn map_peer(peer: &mut Peer) {
    let flags = PageTableFlags::from_bits_retain(ENTRY);
    let mut frames = Frames::new();
    for number in 0..PAGES {
        let frame = PhysFrame::containing_address(x86_64::PhysAddr::new(FRAME + number * 4096));
        // SAFETY: nothing runs on the table.
        unsafe {
            peer.0
                .map_to(peer_page(number), frame, flags, &mut frames)
                .unwrap()
                .ignore();
        };
    }
}

fn peer_mapped() -> Peer {
    let mut peer = peer();
    map_peer(&mut peer);
    peer
}

fn unmap_peer(peer: &mut Peer) {
    for number in 0..PAGES {
        peer.0.unmap(peer_page(number)).unwrap().1.ignore();
    }
}

fn protect_peer(peer: &mut Peer, writable: bool) {
    let flags = PageTableFlags::from_bits_retain(if writable { 0x63 } else { 0x61 });
    for number in 0..PAGES {
        // SAFETY: nothing runs on the table.
        unsafe {
            peer.0
                .update_flags(peer_page(number), flags)
                .unwrap()
                .ignore();
        };
    }
}

fn translate_peer(peer: &Peer, addresses: &[u64]) -> u64 {
    addresses.iter().fold(0, |sum, a| {
        let found = peer.0.translate_addr(x86_64::VirtAddr::new(*a));
        sum ^ found.unwrap().as_u64()
    })
}

fn peer_done(peer: Peer) {
    fn free(base: *mut u8, table: u64, level: u8) {
        for index in 0..512 {
            // SAFETY: the table lies in the block.
            let entry = unsafe { *base.add(table as usize).cast::<u64>().add(index) };
            if level > 1 && entry & 1 != 0 {
                free(base, entry & 0xF_FFFF_FFFF_F000, level - 1);
            }
        }
        arena::give(table);
    }
    free(arena::base(), peer.1, 4);
}

// `page_table_multiarch`.

fn multiarch() -> Multiarch {
    PageTable64::try_new().unwrap()
}

fn map_multiarch(table: &mut Multiarch) {
    let frame =
        |address: VirtAddr| PhysAddr::from(address.as_usize() - FIRST as usize + FRAME as usize);
    let flags = MappingFlags::READ | MappingFlags::WRITE;
    table
        .cursor()
        .map_region(
            VirtAddr::from(FIRST as usize),
            frame,
            LEN as usize,
            flags,
            false,
        )
        .unwrap();
}

fn multiarch_mapped() -> Multiarch {
    let mut table = multiarch();
    map_multiarch(&mut table);
    table
}

fn unmap_multiarch(table: &mut Multiarch) {
    let start = VirtAddr::from(FIRST as usize);
    table.cursor().unmap_region(start, LEN as usize).unwrap();
}

fn protect_multiarch(table: &mut Multiarch, writable: bool) {
    let start = VirtAddr::from(FIRST as usize);
    let flags = match writable {
        true => MappingFlags::READ | MappingFlags::WRITE,
        false => MappingFlags::READ,
    };
    let mut cursor = table.cursor();
    cursor.protect_region(start, LEN as usize, flags).unwrap();
}

fn translate_multiarch(table: &Multiarch, addresses: &[u64]) -> u64 {
    addresses.iter().fold(0, |sum, a| {
        let found = table.query(VirtAddr::from(*a as usize)).unwrap();
        sum ^ found.0.as_usize() as u64
    })
}

// The bare loop.

/// The 512 lowest tables of the range, one after another.
struct Bare(Vec<u64>);

fn bare() -> Bare {
    Bare(vec![0; PAGES as usize])
}

fn store_entries(bare: &mut Bare) {
    for (number, entry) in (0u64..).zip(bare.0.iter_mut()) {
        *entry = (FRAME + number * 4096) | ENTRY;
    }
    black_box(&mut bare.0);
}

fn bare_mapped() -> Bare {
    let mut bare = bare();
    store_entries(&mut bare);
    bare
}

fn flip_entries(bare: &mut Bare) {
    for entry in &mut bare.0 {
        *entry ^= 2;
    }
    black_box(&mut bare.0);
}

fn harvest_bare(bare: &mut Bare, log: &mut Vec<u64>) {
    for (word, entries) in log.iter_mut().zip(bare.0.chunks_exact_mut(64)) {
        for (index, entry) in entries.iter_mut().enumerate() {
            if *entry & 0x40 != 0 {
                *entry &= !0x40;
                *word |= 1 << index;
            }
        }
    }
    black_box(log);
}

fn dirty_bare(bare: &mut Bare, every: u64) {
    for (number, entry) in (0..).zip(bare.0.iter_mut()) {
        *entry = *entry & !0x40 | if is_dirty(number, every) { 0x40 } else { 0 };
    }
}

fn is_dirty(number: u64, every: u64) -> bool {
    every != 0 && number.is_multiple_of(every)
}

/// What is dirty at a harvest: a name, and every how manieth page.
const HARVESTS: [(&str, u64); 4] = [("0 %", 0), ("0.1 %", 1000), ("1 %", 100), ("100 %", 1)];

/// A permutation of all pages, with an offset.
fn random() -> Vec<u64> {
    (0..PAGES)
        .map(|n| FIRST + (n.wrapping_mul(0x9E37_79B1) % PAGES) * 4096 + (n & 0xFF8))
        .collect()
}

fn sequential() -> Vec<u64> {
    (0..PAGES).map(|n| FIRST + n * 4096 + 8).collect()
}

fn ranges(c: &mut Criterion) {
    let mut group = c.benchmark_group("map 1 GiB");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    group.bench_function("testudo", |b| {
        b.iter_custom(|n| timed(n, ours, map_ours, ours_done));
    });
    group.bench_function("x86_64", |b| {
        b.iter_custom(|n| timed(n, peer, map_peer, peer_done));
    });
    group.bench_function("multiarch", |b| {
        b.iter_custom(|n| timed(n, multiarch, map_multiarch, drop));
    });
    group.bench_function("bare", |b| {
        let mut entries = bare();
        b.iter(|| store_entries(&mut entries));
    });
    group.bench_function("bare with tables", |b| {
        // The same, in frames that are taken and zeroed as the allocator promises.
        let base = arena::base();
        let run = |tables: &mut Vec<u64>| {
            for number in 0..512 {
                let table = arena::take_zeroed(base).unwrap();
                // SAFETY: the frame is in the block, and ours.
                let entries = unsafe {
                    core::slice::from_raw_parts_mut(base.add(table as usize).cast::<u64>(), 512)
                };
                for (index, entry) in (0u64..).zip(entries) {
                    *entry = (FRAME + (number * 512 + index) * 4096) | ENTRY;
                }
                tables.push(table);
            }
        };
        let done = |tables: Vec<u64>| tables.into_iter().rev().for_each(arena::give);
        b.iter_custom(|n| timed(n, || Vec::with_capacity(512), run, done));
    });
    group.finish();

    let mut group = c.benchmark_group("unmap 1 GiB");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    group.bench_function("testudo", |b| {
        let run = |table: &mut Ours| {
            table
                .unmap(Gva(FIRST), LEN)
                .unwrap()
                .discharge(&mut NoHardware);
        };
        b.iter_custom(|n| timed(n, ours_mapped, run, ours_done));
    });
    group.bench_function("testudo, pages collected", |b| {
        let run = |table: &mut Ours| {
            let pages = Vec::with_capacity(PAGES as usize);
            let flush = table.unmap_into(Gva(FIRST), LEN, pages).unwrap();
            black_box(flush.discharge(&mut NoHardware));
        };
        b.iter_custom(|n| timed(n, ours_mapped, run, ours_done));
    });
    group.bench_function("x86_64", |b| {
        b.iter_custom(|n| timed(n, peer_mapped, unmap_peer, peer_done));
    });
    group.bench_function("multiarch", |b| {
        b.iter_custom(|n| timed(n, multiarch_mapped, unmap_multiarch, drop));
    });
    group.finish();

    let mut group = c.benchmark_group("protect 1 GiB");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    group.bench_function("testudo", |b| {
        let table = ours_mapped();
        let mut writable = true;
        b.iter(|| {
            writable = !writable;
            protect_ours(&table, writable);
        });
        ours_done(table);
    });
    group.bench_function("x86_64", |b| {
        let mut peer = peer_mapped();
        let mut writable = true;
        b.iter(|| {
            writable = !writable;
            protect_peer(&mut peer, writable);
        });
        peer_done(peer);
    });
    group.bench_function("multiarch", |b| {
        let mut table = multiarch_mapped();
        let mut writable = true;
        b.iter(|| {
            writable = !writable;
            protect_multiarch(&mut table, writable);
        });
    });
    group.bench_function("bare", |b| {
        let mut bare = bare_mapped();
        b.iter(|| flip_entries(&mut bare));
    });
    group.finish();
}

fn translate(c: &mut Criterion) {
    for (name, addresses) in [
        ("translate, sequential", sequential()),
        ("translate, random", random()),
    ] {
        let mut group = c.benchmark_group(name);
        group
            .throughput(Throughput::Elements(PAGES))
            .sample_size(20);
        group.bench_function("testudo", |b| {
            let table = ours_mapped();
            b.iter(|| translate_ours(&table, &addresses));
            ours_done(table);
        });
        group.bench_function("x86_64", |b| {
            let peer = peer_mapped();
            b.iter(|| translate_peer(&peer, &addresses));
            peer_done(peer);
        });
        group.bench_function("multiarch", |b| {
            let table = multiarch_mapped();
            b.iter(|| translate_multiarch(&table, &addresses));
        });
        group.finish();
    }
}

fn sizes(c: &mut Criterion) {
    let mut group = c.benchmark_group("page sizes, 512 of 2 MiB");
    group.throughput(Throughput::Elements(512)).sample_size(20);
    group.bench_function("split", |b| {
        b.iter_custom(|n| timed(n, ours_large, split_ours, ours_done));
    });
    group.bench_function("merge", |b| {
        b.iter_custom(|n| timed(n, ours_mapped, merge_ours, ours_done));
    });
    group.finish();

    // What one piece of 1 GiB costs, in 64 pieces.
    let mut group = c.benchmark_group("map 1 GiB over 16 TiB");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    group.bench_function("testudo", |b| {
        b.iter_custom(|n| timed(n, ours, map_sparse, ours_done));
    });
    group.finish();
}

fn harvest(c: &mut Criterion) {
    let mut group = c.benchmark_group("harvest 1 GiB");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    for (name, every) in HARVESTS {
        let words: Vec<AtomicU64> = (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect();
        group.bench_function(format!("testudo, {name} dirty"), |b| {
            let table = ours_clean();
            let prepare = || {
                dirty_ours(&table, every);
                words
                    .iter()
                    .for_each(|word| word.store(0, Ordering::Relaxed));
            };
            let log = PageBitmap::new(FIRST, &words);
            let run = |(): &mut ()| harvest_ours(&table, &log);
            b.iter_custom(|n| timed(n, prepare, run, drop));
            ours_done(table);
        });
        group.bench_function(format!("bare, {name} dirty"), |b| {
            let bare = std::cell::RefCell::new(bare_mapped());
            let mut log = vec![0u64; (PAGES / 64) as usize];
            let mut run = |(): &mut ()| harvest_bare(&mut bare.borrow_mut(), &mut log);
            let mark = || dirty_bare(&mut bare.borrow_mut(), every);
            b.iter_custom(|n| timed(n, mark, &mut run, drop));
        });
    }
    group.finish();
    assert_eq!(arena::free_frames(), 4095, "a competitor has kept frames");
}

criterion_group!(benches, ranges, translate, sizes, harvest, scan::scan);

fn main() {
    if std::env::args().any(|argument| argument == "ratios") {
        return ratios::print();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
