//! How everything reaches memory: guest memory by copy, table frames by atomic entry.

use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use arrayvec::ArrayVec;
use zerocopy::{FromBytes, IntoBytes};

use crate::{Gpa, Hpa, PAGE_SIZE};

/// The size of a page as the length of an array.
const PAGE: usize = PAGE_SIZE as usize;

/// An access to guest memory that could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest-physical {gpa} + {len:#x} bytes: {kind}")]
pub struct MemoryFault {
    /// Where the access began.
    pub gpa: Gpa,
    /// How many bytes it wanted.
    pub len: u64,
    /// Why it failed.
    pub kind: FaultKind,
}

/// Why an access to guest memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// Not all of it is memory.
    #[error("not guest memory")]
    NotMemory,
    /// The memory may not be written.
    #[error("read-only")]
    ReadOnly,
    /// An atomic access was not naturally aligned.
    #[error("misaligned for an atomic access")]
    Misaligned,
}

/// The memory of a guest, by guest-physical address.
///
/// The guest's processors and devices use it at the same time, so nothing here hands out a
/// reference: bytes are copied in and out, and a copy that was checked stays what it was. An access
/// that touches anything but memory fails as a whole. Copies are not atomic; the `load`, `store` and
/// `compare_exchange` methods are, need natural alignment, and order as their names say: loads
/// acquire, stores release.
pub trait GuestMemory {
    /// Copies `buf.len()` bytes at `gpa` out of guest memory.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault>;

    /// Copies `data` into guest memory at `gpa`.
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault>;

    /// Loads 16 bits with acquire ordering.
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault>;

    /// Stores 16 bits with release ordering.
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault>;

    /// Loads 32 bits with acquire ordering.
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault>;

    /// Stores 32 bits with release ordering.
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault>;

    /// Loads 64 bits with acquire ordering.
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault>;

    /// Stores 64 bits with release ordering.
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault>;

    /// Replaces 32 bits if they still are `current`; the inner `Err` holds what was there instead.
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault>;

    /// Replaces 64 bits if they still are `current`; the inner `Err` holds what was there instead.
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault>;

    /// Whether all of `len` bytes at `gpa` are memory that can be read.
    fn contains(&self, gpa: Gpa, len: u64) -> bool;

    /// Brings in the page at `gpa`, where the guest has memory that is away at the moment; to be written
    /// if it is shared with others until then.
    fn bring_in(&self, gpa: Gpa, write: bool) -> BroughtIn {
        let _ = (gpa, write);
        BroughtIn::NothingAway
    }

    /// The aligned 64-bit word at `gpa`, to be looked at again and again; `None` if there is no
    /// memory, it is misaligned, or this kind of memory has no such words.
    ///
    /// This is the one reference into guest memory that there is. It is no view of contents: the
    /// guest may store at any time, each load is a copy of its own, and only such a copy can be
    /// checked. Nobody stores through it.
    #[inline]
    fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        let _ = gpa;
        None
    }

    /// The `count` aligned 64-bit words from `gpa` on, if they are one piece of memory that may be
    /// written: a table that the owner of this memory shares with the guest, found once and not at
    /// each access. `None` as for [`Self::word`].
    ///
    /// What is said of one such word holds for each of these, but for its last sentence: a device
    /// stores to its rings, with release ordering.
    #[inline]
    fn words(&self, gpa: Gpa, count: usize) -> Option<&[AtomicU64]> {
        let _ = (gpa, count);
        None
    }

    /// Copies `parts` of the 4 KiB at `page` to the same offsets of `buf`, as one [`Self::read`]
    /// for each would; an implementation that finds the page once is faster.
    ///
    /// Parts are ranges of offsets below 4096.
    #[inline]
    fn read_parts(
        &self,
        page: Gpa,
        buf: &mut [u8; PAGE],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        for part in parts {
            let at = page.wrapping_add(part.start as u64);
            self.read(at, &mut buf[part.clone()])?;
        }
        Ok(())
    }

    /// Copies `parts` of `data` to the same offsets of the 4 KiB at `page`, as one
    /// [`Self::write`] for each would. If that fails, some parts may have been written.
    #[inline]
    fn write_parts(
        &self,
        page: Gpa,
        data: &[u8; PAGE],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        for part in parts {
            let at = page.wrapping_add(part.start as u64);
            self.write(at, &data[part.clone()])?;
        }
        Ok(())
    }

    /// Copies a value out of guest memory.
    #[inline]
    fn read_value<T: FromBytes + IntoBytes>(&self, gpa: Gpa) -> Result<T, MemoryFault>
    where
        Self: Sized,
    {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a value into guest memory.
    #[inline]
    fn write_value<T: IntoBytes + zerocopy::Immutable>(
        &self,
        gpa: Gpa,
        value: &T,
    ) -> Result<(), MemoryFault>
    where
        Self: Sized,
    {
        self.write(gpa, value.as_bytes())
    }
}

/// What came of [`GuestMemory::bring_in`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BroughtIn {
    /// No memory of the guest's is away there: what stopped an access is something else.
    NothingAway,
    /// The page is there: an access to it is to be tried again.
    Present,
    /// It is the guest's to use, and the host has none to give.
    NoneLeft,
}

/// Finds the pages of a range of guest memory that come and go: a balloon's, a memory device's.
///
/// # Safety
///
/// What [`Self::page`] returns is the first of [`PAGE_SIZE`] bytes, aligned to as many, which can be read
/// (and written, if it was asked for that) until the processor that asked next says that it has no such
/// address any more (a vCPU's loop says so between two exits, see the machine's `Shootdown`). No
/// reference into the page exists.
#[allow(
    unsafe_code,
    reason = "memory is dereferenced on an implementation's word"
)]
pub unsafe trait Pager: Send + Sync {
    /// Where the page at `gpa` is, which is brought in if it is away, and shared with nobody if it is
    /// to be written. `None` if the guest has no memory there, or the host has none left.
    fn page(&self, gpa: Gpa, write: bool) -> Option<NonNull<u8>>;

    /// Whether the guest has memory at `gpa`, here or away.
    fn is_memory(&self, gpa: Gpa) -> bool;
}

impl<M: GuestMemory + ?Sized> GuestMemory for &M {
    #[inline]
    fn bring_in(&self, gpa: Gpa, write: bool) -> BroughtIn {
        (**self).bring_in(gpa, write)
    }
    #[inline]
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        (**self).read(gpa, buf)
    }
    #[inline]
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        (**self).write(gpa, data)
    }
    #[inline]
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        (**self).load_u16(gpa)
    }
    #[inline]
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        (**self).store_u16(gpa, value)
    }
    #[inline]
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        (**self).load_u32(gpa)
    }
    #[inline]
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        (**self).store_u32(gpa, value)
    }
    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        (**self).load_u64(gpa)
    }
    #[inline]
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        (**self).store_u64(gpa, value)
    }
    #[inline]
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        (**self).compare_exchange_u32(gpa, current, new)
    }
    #[inline]
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        (**self).compare_exchange_u64(gpa, current, new)
    }
    #[inline]
    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        (**self).contains(gpa, len)
    }
    #[inline]
    fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        (**self).word(gpa)
    }
    #[inline]
    fn words(&self, gpa: Gpa, count: usize) -> Option<&[AtomicU64]> {
        (**self).words(gpa, count)
    }
    #[inline(always)]
    fn read_parts(
        &self,
        page: Gpa,
        buf: &mut [u8; PAGE],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        (**self).read_parts(page, buf, parts)
    }
    #[inline(always)]
    fn write_parts(
        &self,
        page: Gpa,
        data: &[u8; PAGE],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        (**self).write_parts(page, data, parts)
    }
}

/// Hands out frames for tables: 4 KiB, aligned, zeroed.
///
/// # Safety
///
/// A frame that `alloc` or `alloc_any` returned belongs to the caller alone until the caller gives it to `free`;
/// it is memory that the matching [`FrameMem`] can reach; and all of it reads as zero (for `alloc_any`,
/// as anything).
#[allow(
    unsafe_code,
    reason = "the promise of exclusive memory that an implementation makes"
)]
pub unsafe trait FrameAlloc {
    /// A zeroed frame, or `None` when there is none left.
    fn alloc(&self) -> Option<Hpa>;

    /// As [`Self::alloc`], for a caller that writes the whole frame before anything reads it: the
    /// frame may hold anything. By default it is zeroed nevertheless.
    #[inline]
    fn alloc_any(&self) -> Option<Hpa> {
        self.alloc()
    }

    /// Takes back a frame that `alloc` returned, once nothing refers to it any more, neither a
    /// table nor a cached translation.
    fn free(&self, frame: Hpa);
}

/// Atomic access to 64-bit table entries by host-physical address.
///
/// The address is always 8-byte aligned and inside a frame that the matching [`FrameAlloc`] handed
/// out; anything else is a defect of the caller, for which an implementation may panic but must
/// not touch other memory.
pub trait FrameMem {
    /// Loads the entry at `entry` with acquire ordering.
    fn load(&self, entry: Hpa) -> u64;

    /// Loads eight consecutive entries, which lie in one frame, from `first` on. Each is loaded as by
    /// [`Self::load`].
    ///
    /// An implementation that finds frames at an offset overrides this to find them once.
    #[inline]
    fn load_eight(&self, first: Hpa) -> [u64; 8] {
        core::array::from_fn(|index| self.load(first.wrapping_add(8 * index as u64)))
    }

    /// Stores the entry at `entry` with release ordering.
    fn store(&self, entry: Hpa, value: u64);

    /// Replaces the entry if it still is `current`; `Err` holds what was there instead.
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64>;

    /// Stores `count` consecutive entries from `first` on: `value`, `value + step`, and so on,
    /// modulo 2^64. They lie in one frame, and nobody else stores to them meanwhile.
    ///
    /// An implementation over plain memory overrides this with a loop that the compiler turns into
    /// vector stores; another observer may then see the entries appear in any order.
    #[inline]
    fn fill(&self, first: Hpa, count: usize, value: u64, step: u64) {
        let mut value = value;
        for index in 0..count as u64 {
            self.store(first.wrapping_add(8 * index), value);
            value = value.wrapping_add(step);
        }
    }

    /// Has the processor bring the entries at `entry` into its caches, if it can be told to: they are
    /// loaded soon.
    #[inline]
    fn prefetch(&self, entry: Hpa) {
        let _ = entry;
    }
}

#[allow(
    unsafe_code,
    reason = "a reference keeps the promise of what it refers to"
)]
// SAFETY: every call goes to the allocator behind the reference, which keeps the promise.
unsafe impl<A: FrameAlloc + ?Sized> FrameAlloc for &A {
    #[inline]
    fn alloc(&self) -> Option<Hpa> {
        (**self).alloc()
    }
    #[inline]
    fn alloc_any(&self) -> Option<Hpa> {
        (**self).alloc_any()
    }
    #[inline]
    fn free(&self, frame: Hpa) {
        (**self).free(frame);
    }
}

impl<M: FrameMem + ?Sized> FrameMem for &M {
    #[inline]
    fn load(&self, entry: Hpa) -> u64 {
        (**self).load(entry)
    }
    #[inline]
    fn load_eight(&self, first: Hpa) -> [u64; 8] {
        (**self).load_eight(first)
    }
    #[inline]
    fn store(&self, entry: Hpa, value: u64) {
        (**self).store(entry, value);
    }
    #[inline]
    fn compare_exchange(&self, entry: Hpa, current: u64, new: u64) -> Result<u64, u64> {
        (**self).compare_exchange(entry, current, new)
    }
    #[inline]
    fn fill(&self, first: Hpa, count: usize, value: u64, step: u64) {
        (**self).fill(first, count, value, step);
    }
    #[inline]
    fn prefetch(&self, entry: Hpa) {
        (**self).prefetch(entry);
    }
}

#[allow(
    unsafe_code,
    reason = "the one place where guest memory is dereferenced"
)]
mod ram;

pub use ram::{AddRegionError, GuestRam};
