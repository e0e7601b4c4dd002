//! Frames for page tables.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Hpa, PAGE_SIZE};

/// The machine's memory, frame by frame, where the runtime has mapped it: at its own addresses.
#[derive(Clone, Copy, Debug)]
pub struct Frames;

// SAFETY: the runtime hands out each frame once, zeroed and mapped.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        super::alloc_frame().map(Hpa)
    }

    fn free(&self, frame: Hpa) {
        // SAFETY: `frame` came from `alloc`, and nobody refers to it, says the trait.
        unsafe { super::release(frame.0, PAGE_SIZE) };
    }
}

impl FrameMem for Frames {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        at(entry).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, entry: Hpa, value: u64) {
        at(entry).store(value, Ordering::Release);
    }

    #[inline]
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        at(entry).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}

fn at(entry: Hpa) -> &'static AtomicU64 {
    // SAFETY: an aligned entry of a frame from `alloc`, which is mapped there and stays so, and which only
    // atomic accesses touch.
    unsafe { AtomicU64::from_ptr(entry.0 as *mut u64) }
}
