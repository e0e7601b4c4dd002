//! The page scanner beside the memory's own bandwidth.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, Throughput};
use testudo_arch::Hpa;
use testudo_ept::sharing::{PageMemory, hash, is_equal, is_zero};

/// More than the caches hold.
const BYTES: u64 = 128 << 20;

/// Guest memory as a hypervisor reaches it: at an offset.
struct Memory(Vec<AtomicU64>);

impl PageMemory for Memory {
    #[inline]
    fn load(&self, word: Hpa) -> u64 {
        debug_assert!(word.0 < BYTES);
        // SAFETY: every page that is scanned lies in the vector.
        let word = unsafe { self.0.get_unchecked((word.0 / 8) as usize) };
        word.load(Ordering::Relaxed)
    }
    fn copy(&self, from: Hpa, to: Hpa) {
        for at in (0..4096).step_by(8) {
            let word = self.load(from.wrapping_add(at));
            self.0[((to.0 + at) / 8) as usize].store(word, Ordering::Relaxed);
        }
    }
}

pub(crate) fn scan(c: &mut Criterion) {
    let memory = Memory((0..BYTES / 8).map(|_| AtomicU64::new(0)).collect());
    let pages = || (0..BYTES / 4096).map(|page| Hpa(page * 4096));

    let mut group = c.benchmark_group("scan");
    group.throughput(Throughput::Bytes(BYTES)).sample_size(10);
    group.bench_function("memcpy", |b| {
        let from = vec![1u8; BYTES as usize];
        let mut to = vec![0u8; BYTES as usize];
        b.iter(|| {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        });
    });
    group.bench_function("bare read", |b| {
        let words = vec![0u64; (BYTES / 8) as usize];
        b.iter(|| black_box(&words).iter().fold(0, |sum, word| sum | word));
    });
    group.bench_function("pages of zeros found", |b| {
        b.iter(|| pages().filter(|page| is_zero(&memory, *page)).count());
    });
    group.bench_function("pages hashed", |b| {
        b.iter(|| pages().fold(0, |sum, page| sum ^ hash(&memory, page)));
    });
    group.bench_function("pages hashed that the caches hold", |b| {
        // As many pages, but a few of them again and again: what computing takes without memory.
        b.iter(|| pages().fold(0, |sum, page| sum ^ hash(&memory, Hpa(page.0 % (64 << 10)))));
    });
    group.bench_function("pages compared", |b| {
        let half = BYTES / 2;
        b.iter(|| {
            let pairs = (0..half / 4096).map(|page| (Hpa(page * 4096), Hpa(half + page * 4096)));
            pairs.filter(|(x, y)| is_equal(&memory, *x, *y)).count()
        });
    });
    group.finish();
}
