//! Frames for tables, from the runtime's memory.

use core::sync::atomic::{AtomicU64, Ordering};

use alloc::vec::Vec;

use spin::Mutex;
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

/// Frames for tables that come and go often: what is given back is kept for the next.
#[derive(Debug, Default)]
pub(crate) struct FrameStack(Mutex<Vec<Hpa>>);

// SAFETY: a frame comes from `Frames`, zeroed, or from its last owner, and is zeroed again.
unsafe impl FrameAlloc for FrameStack {
    fn alloc(&self) -> Option<Hpa> {
        let frame = match self.0.lock().pop() {
            Some(frame) => frame,
            None => return Frames.alloc(),
        };
        // SAFETY: `Frames` gave it out, and its owner is done with it.
        unsafe { core::ptr::write_bytes(frame.0 as *mut u8, 0, PAGE_SIZE as usize) };
        Some(frame)
    }

    fn free(&self, frame: Hpa) {
        self.0.lock().push(frame);
    }
}

impl FrameMem for FrameStack {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        Frames.load(entry)
    }

    #[inline]
    fn store(&self, entry: Hpa, value: u64) {
        Frames.store(entry, value);
    }

    #[inline]
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        Frames.compare_exchange(entry, current, new)
    }
}
