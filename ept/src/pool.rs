//! Table frames in ordinary memory.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

/// A fixed number of frames in ordinary memory, for tests and for tables that only software reads.
///
/// It checks what hardware would not: touching a frame that is not handed out, or freeing one
/// twice, panics with the address; and a frame that may hold anything holds ones.
#[derive(Debug)]
pub struct FramePool {
    entries: Box<[AtomicU64]>,
    used: Box<[AtomicU64]>,
    free: AtomicUsize,
}

impl FramePool {
    /// The address of the first frame: not zero, so that a forgotten address is found.
    pub const BASE: u64 = 0x10_0000;

    /// A pool of `frames` frames.
    pub fn new(frames: usize) -> Self {
        let zeros = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        Self {
            entries: zeros(frames * 512).into_boxed_slice(),
            used: zeros(frames).into_boxed_slice(),
            free: AtomicUsize::new(frames),
        }
    }

    /// How many frames are not handed out.
    pub fn free_frames(&self) -> usize {
        self.free.load(Ordering::Relaxed)
    }

    fn number(&self, address: Hpa) -> usize {
        let number = address
            .0
            .checked_sub(Self::BASE)
            .map(|o| (o / 4096) as usize);
        match number {
            Some(n) if n < self.used.len() => n,
            _ => panic!("{address} is not in the pool"),
        }
    }

    /// A free frame, filled with `word`.
    fn take(&self, word: u64) -> Option<Hpa> {
        let take = |flag: &AtomicU64| {
            flag.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let number = self.used.iter().position(take)?;
        self.free.fetch_sub(1, Ordering::Relaxed);
        for entry in &self.entries[number * 512..(number + 1) * 512] {
            entry.store(word, Ordering::Relaxed);
        }
        Some(Hpa(Self::BASE + number as u64 * 4096))
    }

    #[inline]
    fn entry(&self, entry: Hpa) -> &AtomicU64 {
        let number = self.number(entry);
        let used = self.used[number].load(Ordering::Relaxed) != 0;
        assert!(used, "{entry} is in a frame that is free");
        assert!(entry.0 & 7 == 0, "{entry} is no entry");
        &self.entries[((entry.0 - Self::BASE) / 8) as usize]
    }
}

#[allow(unsafe_code, reason = "the promise of exclusive frames")]
// SAFETY: `used` gives each frame to one caller at a time, and `take` fills it.
unsafe impl FrameAlloc for FramePool {
    fn alloc(&self) -> Option<Hpa> {
        self.take(0)
    }

    fn alloc_any(&self) -> Option<Hpa> {
        self.take(u64::MAX)
    }

    fn free(&self, frame: Hpa) {
        let number = self.number(frame);
        let was = self.used[number].swap(0, Ordering::Release);
        assert!(was != 0 && frame.0 & 0xFFF == 0, "{frame} is freed twice");
        self.free.fetch_add(1, Ordering::Relaxed);
    }
}

impl FrameMem for FramePool {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        self.entry(entry).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, entry: Hpa, value: u64) {
        self.entry(entry).store(value, Ordering::Release);
    }

    #[inline]
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        self.entry(entry)
            .compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}
