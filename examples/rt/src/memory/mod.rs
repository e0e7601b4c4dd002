//! Physical memory: the frame allocator over the firmware's map, the identity map, and the heap.

use alloc::vec::Vec;
use core::ops::Range;

mod frames;
mod heap;
pub mod paging;
mod ranges;

use crate::boot::{MemoryKind, Raw};
use crate::lock::Lock;
use ranges::FreeRanges;

pub use frames::Frames;

/// Bytes in a frame.
pub const FRAME: u64 = 4096;

/// Below this, memory is left to firmware structures and to the start code of the other processors.
const LOW: u64 = 0x10_0000;

static FREE: Lock<FreeRanges> = Lock::new(FreeRanges::new());
/// All that was free when the program started.
static STOCK: Lock<FreeRanges> = Lock::new(FreeRanges::new());

unsafe extern "C" {
    static rt_image_start: u8;
    static rt_image_end: u8;
    static rt_boot_stack_guard: u8;
}

/// Takes stock of the memory: what is usable and holds neither the program nor what it was given.
pub(crate) fn init(raw: &Raw) {
    paging::init();
    stock(raw, LOW, paging::mapped_end());
    // The tables for the rest come from what is mapped already.
    let (old, new) = paging::extend(raw);
    stock(raw, old, new);
}

/// Frees what is usable between two addresses.
fn stock(raw: &Raw, from: u64, to: u64) {
    let mut fresh = FreeRanges::new();
    for range in raw
        .memory_map
        .iter()
        .filter(|range| range.kind == MemoryKind::Usable)
    {
        let end = range.start.saturating_add(range.len).min(to);
        fresh.give(
            range.start.max(from).next_multiple_of(FRAME),
            end & !(FRAME - 1),
        );
    }
    // Firmware maps may overlap; what any entry calls unusable is.
    for range in raw
        .memory_map
        .iter()
        .filter(|range| range.kind != MemoryKind::Usable)
    {
        fresh.remove(
            range.start & !(FRAME - 1),
            range.start.saturating_add(range.len),
        );
    }
    let image = (&raw const rt_image_start as u64)..(&raw const rt_image_end as u64);
    for range in raw.occupied.iter().chain([&image]) {
        fresh.remove(
            range.start & !(FRAME - 1),
            range.end.saturating_add(FRAME - 1) & !(FRAME - 1),
        );
    }
    let mut free = FREE.lock();
    let mut all = STOCK.lock();
    for (start, end) in fresh.iter() {
        free.give(start, end);
        all.give(start, end);
    }
}

/// The most pieces that [`confine`] leaves the program.
const PIECES: usize = 32;

/// Keeps `bytes` in one piece for later requests and gives up all other free memory, for whoever is to
/// have the machine besides this program.
///
/// Returns what is the program's from now on, in order: its image, what it has taken until now, and that
/// piece. `None`, and nothing has changed but for the piece, if there is none so large or the program's
/// memory is scattered all over the machine.
pub fn confine(bytes: u64) -> Option<Vec<Range<u64>>> {
    let mut own = Vec::with_capacity(PIECES);
    let bytes = bytes.checked_next_multiple_of(FRAME)?;
    let piece = reserve(bytes, FRAME)?;
    let mut free = FREE.lock();
    let mut taken = FreeRanges::new();
    for (start, end) in STOCK.lock().iter() {
        taken.give(start, end);
    }
    for (start, end) in free.iter() {
        taken.remove(start, end);
    }
    taken.give(
        &raw const rt_image_start as u64,
        &raw const rt_image_end as u64,
    );
    if taken.iter().count() > PIECES {
        return None;
    }
    own.extend(taken.iter().map(|(start, end)| start..end));
    *free = FreeRanges::new();
    free.give(piece, piece + bytes);
    Some(own)
}

/// Takes the rights that nobody needs from the mapped memory, and the page below the first stack.
#[cfg(not(test))]
pub(crate) fn protect(start_page: u64) {
    paging::protect(start_page);
    // SAFETY: the entry code keeps the page empty.
    unsafe { paging::guard(&raw const rt_boot_stack_guard as u64) };
}

/// Takes contiguous memory of at least `bytes`, aligned to `align` (a power of two), with whatever it
/// holds.
///
/// Returns its physical address, at which the identity map also has it. It is never given back by itself;
/// see [`release`].
pub fn reserve(bytes: u64, align: u64) -> Option<u64> {
    let bytes = bytes.checked_next_multiple_of(FRAME)?;
    FREE.lock().take(bytes, align.max(FRAME))
}

/// As [`reserve`], with the memory zeroed.
pub fn reserve_zeroed(bytes: u64, align: u64) -> Option<u64> {
    let start = reserve(bytes, align)?;
    // SAFETY: the range is mapped writable, and the allocator has just given up all claim to it.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0, bytes as usize) };
    Some(start)
}

/// Gives back what [`reserve`] or [`alloc_frame`] handed out.
///
/// # Safety
/// The range must have come from there, and nobody may use it any longer.
pub unsafe fn release(start: u64, bytes: u64) {
    FREE.lock()
        .give(start, start + bytes.next_multiple_of(FRAME));
}

/// Takes one zeroed frame.
pub fn alloc_frame() -> Option<u64> {
    reserve_zeroed(FRAME, FRAME)
}

/// Bytes that are neither handed out nor part of the heap.
pub fn available() -> u64 {
    FREE.lock().total()
}

/// The longest contiguous run that [`reserve`] could hand out at this alignment, in bytes.
pub fn largest(align: u64) -> u64 {
    FREE.lock().largest(align.max(FRAME))
}
