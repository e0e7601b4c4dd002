//! Frames for tables, from the runtime's memory.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Hpa, PAGE_SIZE};
use testudo_rt::memory;

/// The machine's memory, which is mapped where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames;

// SAFETY: the runtime hands out each frame once, zeroed and mapped.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        memory::alloc_frame().map(Hpa)
    }

    fn free(&self, frame: Hpa) {
        // SAFETY: `alloc` gave it out, and its owner is done with it.
        unsafe { memory::release(frame.0, PAGE_SIZE) };
    }
}

impl Frames {
    fn entry(entry: Hpa) -> &'static AtomicU64 {
        // SAFETY: entries are aligned and lie in frames that `alloc` gave out, which are mapped and
        // which only atomic accesses touch.
        unsafe { AtomicU64::from_ptr(entry.0 as *mut u64) }
    }
}

impl FrameMem for Frames {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        Self::entry(entry).load(Ordering::Acquire)
    }

    #[inline]
    fn store(&self, entry: Hpa, value: u64) {
        Self::entry(entry).store(value, Ordering::Release);
    }

    #[inline]
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        let entry = Self::entry(entry);
        entry.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
}
