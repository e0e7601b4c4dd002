//! Table frames for all competitors: one block of memory, one free list.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::{PagingHandler, PagingMetaData};
use testudo_arch::{FrameAlloc, FrameMem, Hpa};
use x86_64::structures::paging::{FrameAllocator, PhysFrame, Size4KiB};

const FRAMES: u64 = 4096;

struct Block {
    base: *mut u8,
    free: RefCell<Vec<u64>>,
}

thread_local! {
    static BLOCK: Block = {
        let layout = Layout::from_size_align((FRAMES * 4096) as usize, 4096).unwrap();
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // Frame 0 stays out: some libraries take its address for none.
        let free = RefCell::new((1..FRAMES).rev().map(|frame| frame * 4096).collect());
        Block { base, free }
    };
}

/// Where frames are in this program.
pub(crate) fn base() -> *mut u8 {
    BLOCK.with(|block| block.base)
}

/// A frame, as it was left.
pub(crate) fn take() -> Option<u64> {
    BLOCK.with(|block| block.free.borrow_mut().pop())
}

pub(crate) fn give(frame: u64) {
    BLOCK.with(|block| block.free.borrow_mut().push(frame));
}

pub(crate) fn free_frames() -> usize {
    BLOCK.with(|block| block.free.borrow().len())
}

/// A zeroed frame.
pub(crate) fn take_zeroed(base: *mut u8) -> Option<u64> {
    let frame = take()?;
    // SAFETY: the frame lies in the block, and nobody else has it.
    unsafe { base.add(frame as usize).write_bytes(0, 4096) };
    Some(frame)
}

/// The block as our engine sees it.
#[derive(Clone, Copy)]
pub(crate) struct Frames(*mut u8);

impl Frames {
    pub(crate) fn new() -> Self {
        Self(base())
    }

    #[inline]
    fn entry(&self, entry: Hpa) -> &AtomicU64 {
        // SAFETY: the engine gives addresses of entries in frames of the block only, which lives as
        // long as the thread.
        unsafe { AtomicU64::from_ptr(self.0.add(entry.0 as usize).cast()) }
    }
}

// SAFETY: the free list hands out each frame once, and it is zeroed.
unsafe impl FrameAlloc for Frames {
    #[inline]
    fn alloc(&self) -> Option<Hpa> {
        take_zeroed(self.0).map(Hpa)
    }
    #[inline]
    fn alloc_any(&self) -> Option<Hpa> {
        take().map(Hpa)
    }
    #[inline]
    fn free(&self, frame: Hpa) {
        give(frame.0);
    }
}

impl FrameMem for Frames {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        self.entry(entry).load(Ordering::Acquire)
    }
    #[inline]
    fn load_eight(&self, first: Hpa) -> [u64; 8] {
        let first: *const AtomicU64 = self.entry(first);
        // SAFETY: all eight lie in the frame.
        let entries = unsafe { &*first.cast::<[AtomicU64; 8]>() };
        core::array::from_fn(|index| entries[index].load(Ordering::Acquire))
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
    #[inline]
    fn fill(&self, first: Hpa, count: usize, value: u64, step: u64) {
        // SAFETY: the entries lie in one frame, and nobody else stores to them.
        let entries = unsafe {
            core::slice::from_raw_parts_mut(self.0.add(first.0 as usize).cast::<u64>(), count)
        };
        let mut value = value;
        for entry in entries {
            *entry = value;
            value = value.wrapping_add(step);
        }
    }
    #[inline]
    fn prefetch(&self, entry: Hpa) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on caches, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(self.0.wrapping_add(entry.0 as usize).cast()) };
    }
}

// SAFETY: as for `Frames`.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        // `x86_64` zeroes new tables itself.
        let frame = x86_64::PhysAddr::new(take()?);
        Some(PhysFrame::containing_address(frame))
    }
}

/// The block as `page_table_multiarch` sees it.
pub(crate) struct Handler;

impl PagingHandler for Handler {
    fn alloc_frames(num: usize, _: usize) -> Option<PhysAddr> {
        assert_eq!(num, 1);
        take().map(|frame| PhysAddr::from(frame as usize))
    }
    fn dealloc_frames(frame: PhysAddr, _: usize) {
        give(frame.as_usize() as u64);
    }
    fn phys_to_virt(frame: PhysAddr) -> VirtAddr {
        VirtAddr::from(base() as usize + frame.as_usize())
    }
}

/// Long-mode tables whose flushes do nothing: a program at CPL 3 must not execute INVLPG.
pub(crate) struct NoFlush;

impl PagingMetaData for NoFlush {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;
    fn flush_tlb(_: Option<VirtAddr>) {}
}
