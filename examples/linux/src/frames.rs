//! Frames for tables and for guest memory that comes and goes, from the runtime's memory.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use alloc::vec::Vec;

use spin::Mutex;
use testudo_arch::{FrameAlloc, FrameMem, Hpa, PAGE_SIZE, PageSize};
use testudo_machine::paged::GuestFrames;
use testudo_rt::lock::Lock;
use testudo_rt::memory;

/// The machine's memory, which is mapped where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frames;

/// The memory of a large page.
const BLOCK: u64 = PageSize::Size2M.bytes();

/// Memory that was given back, each piece with the address of the next: guests decide which pieces these
/// are, and the runtime's list of ranges is no place for any number of them.
struct Pieces {
    first: u64,
    count: u64,
}

impl Pieces {
    const fn new() -> Self {
        Self { first: 0, count: 0 }
    }

    fn push(&mut self, piece: u64) {
        Frames.store(Hpa(piece), self.first);
        self.first = piece;
        self.count += 1;
    }

    fn pop(&mut self) -> Option<u64> {
        let piece = self.first;
        if piece == 0 {
            return None;
        }
        self.first = Frames.load(Hpa(piece));
        self.count -= 1;
        Some(piece)
    }
}

struct Returned {
    frames: Pieces,
    blocks: Pieces,
}

static RETURNED: Lock<Returned> = Lock::new(Returned {
    frames: Pieces::new(),
    blocks: Pieces::new(),
});

/// Makes memory that was given back fit to go out again.
fn cleared(piece: u64, bytes: u64) -> Hpa {
    // SAFETY: the memory was taken out of the list and is nobody's but the caller's.
    unsafe { core::ptr::write_bytes(piece as *mut u8, 0, bytes as usize) };
    Hpa(piece)
}

// SAFETY: the runtime hands out each frame once, zeroed and mapped; one that was given back goes out
// again once, zeroed anew if that is asked for.
unsafe impl FrameAlloc for Frames {
    fn alloc(&self) -> Option<Hpa> {
        let single = RETURNED.lock().frames.pop();
        if let Some(frame) = single {
            return Some(cleared(frame, PAGE_SIZE));
        }
        if let Some(frame) = memory::alloc_frame() {
            return Some(Hpa(frame));
        }
        let mut returned = RETURNED.lock();
        let block = returned.blocks.pop()?;
        for frame in (block + PAGE_SIZE..block + BLOCK).step_by(PAGE_SIZE as usize) {
            returned.frames.push(frame);
        }
        drop(returned);
        Some(cleared(block, PAGE_SIZE))
    }

    fn alloc_any(&self) -> Option<Hpa> {
        let single = RETURNED.lock().frames.pop();
        single.map(Hpa).or_else(|| self.alloc())
    }

    fn free(&self, frame: Hpa) {
        RETURNED.lock().frames.push(frame.0);
    }
}

// SAFETY: memory is mapped where it is; as for `FrameAlloc`.
unsafe impl GuestFrames for Frames {
    fn pointer(&self, frame: Hpa) -> NonNull<u8> {
        // Frames are behind the first megabyte.
        NonNull::new(frame.0 as *mut u8).unwrap_or(NonNull::dangling())
    }

    fn alloc_block(&self) -> Option<Hpa> {
        let block = RETURNED.lock().blocks.pop();
        match block {
            Some(block) => Some(cleared(block, BLOCK)),
            None => memory::reserve_zeroed(BLOCK, BLOCK).map(Hpa),
        }
    }

    fn free_block(&self, first: Hpa) {
        RETURNED.lock().blocks.push(first.0);
    }
}

/// How many frames nobody has.
pub(crate) fn free() -> u64 {
    let returned = RETURNED.lock();
    let pieces = returned.frames.count + returned.blocks.count * (BLOCK / PAGE_SIZE);
    drop(returned);
    memory::available() / PAGE_SIZE + pieces
}

impl Frames {
    fn entry(entry: Hpa) -> &'static AtomicU64 {
        // SAFETY: entries are aligned and lie in frames that are tables' or nobody's, which are mapped
        // and which only atomic accesses touch.
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
