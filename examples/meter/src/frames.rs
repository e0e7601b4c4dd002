//! Memory for the hypervisors that measure: the runtime's frames, which it has mapped at their own addresses.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{FrameAlloc, FrameMem, Hpa};
use testudo_rt::memory;

pub(crate) struct Frames;

// SAFETY: the runtime hands out each frame once, zeroed.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        memory::alloc_frame().map(Hpa)
    }

    fn free(&self, frame: Hpa) {
        // SAFETY: `frame` came from `alloc`, and nobody refers to it, says the trait.
        unsafe { memory::release(frame.0, 4096) };
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

/// One zeroed frame.
pub(crate) fn frame() -> Result<Hpa, &'static str> {
    Frames.alloc().ok_or("no memory")
}

/// How many measurements the command line asks for with `rounds=N`. The lowest counts: the first ones fill
/// tables.
pub(crate) fn rounds(command_line: &str) -> Result<u32, &'static str> {
    let word = command_line
        .split(' ')
        .find_map(|word| word.strip_prefix("rounds="));
    word.map_or(Ok(1000), |number| {
        number.parse().map_err(|_| "`rounds` is no number")
    })
}
