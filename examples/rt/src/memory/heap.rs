//! The global allocator: talc, grown from the frame allocator.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr;

use talc::DefaultBinning;
use talc::base::Talc;
use talc::base::binning::Binning;
use talc::source::Source;

use crate::lock::Lock;

/// Memory is taken in pieces of at least this many bytes.
const PIECE: u64 = 2 << 20;

#[derive(Debug)]
struct Frames;

// SAFETY: `acquire` touches the allocator only through its argument, and `reserve` does not allocate
// from the heap.
unsafe impl Source for Frames {
    fn acquire<B: Binning>(talc: &mut Talc<Self, B>, layout: Layout) -> Result<(), ()> {
        // Room for the request, its alignment and the allocator's own records.
        let wanted = (layout.size() as u64)
            .checked_add(layout.align() as u64)
            .and_then(|bytes| bytes.checked_add(64 << 10))
            .and_then(|bytes| bytes.checked_next_multiple_of(PIECE))
            .ok_or(())?;
        let start = super::reserve(wanted, PIECE).ok_or(())?;
        // SAFETY: the range is mapped and from now on belongs to the heap alone.
        unsafe { talc.claim(start as *mut u8, wanted as usize) }.ok_or(())?;
        Ok(())
    }
}

struct Heap(Lock<Talc<Frames, DefaultBinning>>);

#[cfg_attr(not(test), global_allocator)]
static HEAP: Heap = Heap(Lock::new(Talc::new(Frames)));

// SAFETY: talc keeps the contract of `GlobalAlloc`, and the lock gives one caller at a time.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller gives a layout of non-zero size, which is all that talc asks.
        unsafe { self.0.lock().allocate(layout) }.map_or(ptr::null_mut(), |block| block.as_ptr())
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller returns a block that `alloc` gave for this layout.
        unsafe { self.0.lock().deallocate(block, layout) };
    }
}
