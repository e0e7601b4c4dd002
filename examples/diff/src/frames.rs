//! The runtime's frames, which it has mapped at their own addresses.
#![allow(
    unsafe_code,
    reason = "the promise of exclusive frames, and their entries"
)]

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Hpa, PAGE_SIZE};
use testudo_rt::memory;

/// The machine's memory, frame by frame, where the runtime has mapped it.
#[derive(Clone, Copy, Debug)]
pub struct Frames;

// SAFETY: the runtime hands out each frame once, zeroed.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        memory::alloc_frame().map(Hpa)
    }

    fn free(&self, frame: Hpa) {
        // SAFETY: `frame` came from `alloc`, and nobody refers to it, says the trait.
        unsafe { memory::release(frame.0, PAGE_SIZE) };
    }
}

impl FrameMem for Frames {
    fn load(&self, entry: Hpa) -> u64 {
        at(entry).load(Ordering::Acquire)
    }

    fn store(&self, entry: Hpa, value: u64) {
        at(entry).store(value, Ordering::Release);
    }

    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        at(entry).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

fn at(entry: Hpa) -> &'static AtomicU64 {
    // SAFETY: an aligned entry of a frame from `alloc`, which is identity-mapped and stays so.
    unsafe { AtomicU64::from_ptr(entry.0 as *mut u64) }
}
