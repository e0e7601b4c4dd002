//! The page scanner beside the memory's own bandwidth.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, Throughput};
use testudo_arch::Hpa;
use testudo_ept::sharing::{PageMemory, hashes, is_equal, is_zero};

/// Much more than the caches hold: those of some servers take hundreds of megabytes.
pub(crate) const BYTES: u64 = 2 << 30;

/// Guest memory as a hypervisor reaches it: at an offset. It is all zeros.
pub(crate) struct Memory(Vec<Frame>);

#[repr(align(4096))]
struct Frame([AtomicU64; 512]);

impl Memory {
    pub(crate) fn new() -> Self {
        let frame = |_| Frame([const { AtomicU64::new(0) }; 512]);
        let mut frames = Vec::with_capacity((BYTES / 4096) as usize);
        want_large_pages(frames.as_ptr() as u64);
        frames.extend((0..BYTES / 4096).map(frame));
        // Every page has been written once: none is the system's page of zeros.
        let memory = Self(frames);
        for page in &memory.0 {
            page.0[0].store(black_box(1), Ordering::Relaxed);
            page.0[0].store(0, Ordering::Relaxed);
        }
        memory
    }

    /// As many pages as there are, all from the first `bytes`.
    fn pages(bytes: u64) -> impl Iterator<Item = Hpa> {
        (0..BYTES / 4096).map(move |page| Hpa(page * 4096 % bytes))
    }

    /// The page after, which is among the first `bytes` too.
    fn next(page: Hpa, bytes: u64) -> Option<Hpa> {
        Some(Hpa((page.0 + 4096) % bytes))
    }

    /// The first `bytes` as plain words.
    fn words(&self, bytes: u64) -> &[u64] {
        // SAFETY: the words are as those of a plain slice, and nobody writes to them.
        unsafe { core::slice::from_raw_parts(self.0.as_ptr().cast::<u64>(), (bytes / 8) as usize) }
    }

    /// A limit: nothing but reads in order, as wide as the compiler makes them.
    pub(crate) fn read(&self, bytes: u64) -> u64 {
        let words = self.words(bytes);
        let round = |_| black_box(words).iter().fold(0, |sum, word| sum | word);
        (0..BYTES / bytes)
            .map(round)
            .fold(0, |sum, word| sum | word)
    }

    /// A higher limit, that of what one processor gets out of memory: reads of a line from each of eight
    /// pages in turn, for which it guesses ahead in all eight.
    pub(crate) fn read_eight(&self, bytes: u64) -> u64 {
        let words = self.words(bytes);
        let mut sum = [0u64; 8];
        for _ in 0..BYTES / bytes {
            for pages in black_box(words).chunks_exact(8 * 512) {
                for line in 0..64 {
                    for page in 0..8 {
                        let at = page * 512 + line * 8;
                        for (sum, word) in sum.iter_mut().zip(&pages[at..at + 8]) {
                            *sum |= word;
                        }
                    }
                }
            }
        }
        sum.iter().fold(0, |sum, word| sum | word)
    }

    pub(crate) fn zeros(&self, bytes: u64) -> usize {
        let zero = |page: &Hpa| is_zero(self, *page, Self::next(*page, bytes));
        Self::pages(bytes).filter(zero).count()
    }

    pub(crate) fn hashes(&self, bytes: u64) -> u64 {
        self.hashes_of(0, bytes, BYTES)
    }

    /// Hashes `total` bytes in groups of four pages, all from `bytes` bytes at `from`.
    fn hashes_of(&self, from: u64, bytes: u64, total: u64) -> u64 {
        let group = |number: u64| {
            let first = from + number * 4 * 4096 % bytes;
            [0, 1, 2, 3].map(|page| Hpa(first + page * 4096))
        };
        (0..total / (4 * 4096)).fold(0, |sum, number| {
            let four = hashes(self, group(number), Some(group(number + 1)));
            four.iter().fold(sum, |sum, hash| sum ^ hash)
        })
    }

    /// As [`Self::hashes`], half by another thread.
    pub(crate) fn hashes_by_two(&self, bytes: u64) -> u64 {
        let half = bytes / 2;
        std::thread::scope(|scope| {
            let other = scope.spawn(|| self.hashes_of(half, half, BYTES / 2));
            self.hashes_of(0, half, BYTES / 2) ^ other.join().unwrap()
        })
    }
}

/// Asks the system for large pages, which a hypervisor has its guests' memory in: `madvise`.
fn want_large_pages(memory: u64) {
    const MADVISE: u64 = 28;
    const HUGEPAGE: u64 = 14;
    // SAFETY: the advice changes nothing but how fast the memory is.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") MADVISE => _,
            in("rdi") memory,
            in("rsi") BYTES,
            in("rdx") HUGEPAGE,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
}

/// Where the pages are: beyond all caches, in a large one, and near.
pub(crate) const PLACES: [(&str, u64); 3] = [
    ("2 GiB", BYTES),
    ("128 MiB", 128 << 20),
    ("64 KiB", 64 << 10),
];

impl PageMemory for Memory {
    #[inline]
    fn load(&self, word: Hpa) -> u64 {
        debug_assert!(word.0 < BYTES);
        // SAFETY: every page that is scanned lies in the vector.
        let word = unsafe {
            &*self
                .0
                .as_ptr()
                .byte_add(word.0 as usize)
                .cast::<AtomicU64>()
        };
        word.load(Ordering::Relaxed)
    }
    #[inline]
    fn any_set(&self, at: Hpa) -> bool {
        debug_assert!(at.0 + 256 <= BYTES);
        // SAFETY: as for `load`. Every processor that this is compiled for has SSE2, and what a guest
        // writes meanwhile comes in pieces at worst.
        unsafe {
            use std::arch::x86_64::{
                __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
            };
            let first = self
                .0
                .as_ptr()
                .cast::<__m128i>()
                .wrapping_add(at.0 as usize / 16);
            let mut sum = _mm_setzero_si128();
            for n in 0..16 {
                sum = _mm_or_si128(sum, first.wrapping_add(n).read_volatile());
            }
            _mm_movemask_epi8(_mm_cmpeq_epi8(sum, _mm_setzero_si128())) != 0xFFFF
        }
    }
    #[inline]
    fn prefetch(&self, line: Hpa) {
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let line = self.0.as_ptr().cast::<i8>().wrapping_add(line.0 as usize);
            _mm_prefetch::<_MM_HINT_T0>(line);
        }
    }
    fn copy(&self, from: Hpa, to: Hpa) {
        for at in (0..4096).step_by(8) {
            let word = self.load(from.wrapping_add(at));
            let to = &self.0[(to.0 / 4096) as usize].0[(at / 8) as usize];
            to.store(word, Ordering::Relaxed);
        }
    }
}

pub(crate) fn scan(c: &mut Criterion) {
    let memory = Memory::new();

    let mut group = c.benchmark_group("scan");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(BYTES / 2));
    group.bench_function("memcpy", |b| {
        let from = vec![1u8; (BYTES / 2) as usize];
        let mut to = vec![0u8; (BYTES / 2) as usize];
        b.iter(|| {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        });
    });
    group.throughput(Throughput::Bytes(BYTES));
    for (place, bytes) in PLACES {
        group.bench_function(format!("bare read, {place}"), |b| {
            b.iter(|| memory.read(bytes));
        });
        group.bench_function(format!("bare read of 8 pages in turn, {place}"), |b| {
            b.iter(|| memory.read_eight(bytes));
        });
        group.bench_function(format!("pages of zeros found, {place}"), |b| {
            b.iter(|| memory.zeros(bytes));
        });
        group.bench_function(format!("pages hashed, {place}"), |b| {
            b.iter(|| memory.hashes(bytes));
        });
        group.bench_function(format!("pages hashed by two threads, {place}"), |b| {
            b.iter(|| memory.hashes_by_two(bytes));
        });
    }
    group.bench_function("pages compared", |b| {
        let half = BYTES / 2;
        b.iter(|| {
            let pairs = (0..half / 4096).map(|page| (Hpa(page * 4096), Hpa(half + page * 4096)));
            pairs.filter(|(x, y)| is_equal(&memory, *x, *y)).count()
        });
    });
    group.finish();
}
