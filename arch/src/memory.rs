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

/// One range of guest memory that is contiguous in the program that holds it.
#[derive(Clone, Copy, Debug)]
struct Region {
    gpa: u64,
    len: u64,
    pointer: *mut u8,
    writable: bool,
}

impl Region {
    /// Where `len` bytes at `gpa` begin in this range, if all of them lie in it.
    #[inline]
    fn offset_of(&self, gpa: Gpa, len: u64) -> Option<u64> {
        // Below the range this wraps to a number that no range is as long as.
        let offset = gpa.0.wrapping_sub(self.gpa);
        let room = self.len.checked_sub(len)?;
        (offset <= room && offset < self.len).then_some(offset)
    }
}

/// A range of guest memory whose pages come and go.
#[derive(Clone, Copy)]
struct Paged {
    gpa: u64,
    len: u64,
    pager: &'static dyn Pager,
}

impl fmt::Debug for Paged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paged")
            .field("gpa", &self.gpa)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Guest memory made of a few ranges that this program has mapped, looked up in order, and of
/// others whose pages come and go.
///
/// ```
/// use testudo_arch::memory::{GuestMemory, GuestRam};
/// use testudo_arch::Gpa;
///
/// let mut bytes = vec![0u64; 1024];
/// let mut ram = GuestRam::new();
/// // SAFETY: `bytes` outlives `ram`, and nothing else refers to it.
/// unsafe { ram.add(Gpa(0x1000), bytes.as_mut_ptr().cast(), 8192, true) }.unwrap();
/// ram.store_u32(Gpa(0x1004), 7).unwrap();
/// assert_eq!(ram.load_u64(Gpa(0x1000)), Ok(7 << 32));
/// assert!(ram.load_u64(Gpa(0x3000)).is_err());
/// ```
#[derive(Clone, Debug, Default)]
pub struct GuestRam {
    regions: ArrayVec<Region, { GuestRam::MAX_REGIONS }>,
    paged: ArrayVec<Paged, { GuestRam::MAX_PAGED }>,
}

/// A range that cannot be added to a [`GuestRam`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddRegionError {
    /// All places are taken.
    #[error("more than {} ranges of guest memory", GuestRam::MAX_REGIONS)]
    TooMany,
    /// The range overlaps another one, wraps around, or is empty.
    #[error("the range at {0} overlaps another, wraps around or is empty")]
    Overlap(Gpa),
    /// The range's addresses here and in the guest differ in the low twelve bits.
    #[error("the range at {0} is not aligned alike on both sides")]
    Misaligned(Gpa),
}

#[allow(
    unsafe_code,
    reason = "the one place where guest memory is dereferenced"
)]
mod ram {
    use super::*;

    // SAFETY: a region is plain shared memory for its whole life (see `GuestRam::add`), accessed
    // here by raw copies and atomics only.
    unsafe impl Send for GuestRam {}
    // SAFETY: as above.
    unsafe impl Sync for GuestRam {}

    impl GuestRam {
        /// The largest number of ranges.
        pub const MAX_REGIONS: usize = 8;
        /// The largest number of ranges whose pages come and go.
        pub const MAX_PAGED: usize = 4;

        /// Guest memory without any range.
        pub const fn new() -> Self {
            Self {
                regions: ArrayVec::new_const(),
                paged: ArrayVec::new_const(),
            }
        }

        /// Adds `len` bytes at `pointer` as guest memory at `gpa`.
        ///
        /// # Errors
        ///
        /// The range overlaps another, is empty, wraps, or is not aligned to 8 bytes alike on
        /// both sides; or there are [`Self::MAX_REGIONS`] already.
        ///
        /// # Safety
        ///
        /// The memory stays valid for reads (and writes, if `writable`) of `len` bytes as long as
        /// this value or a clone of it lives, and the program holds no reference into it: guests
        /// and devices change it at any time.
        pub unsafe fn add(
            &mut self,
            gpa: Gpa,
            pointer: *mut u8,
            len: u64,
            writable: bool,
        ) -> Result<(), AddRegionError> {
            self.check_room(gpa, len)?;
            if (pointer as u64 ^ gpa.0) & 7 != 0 {
                return Err(AddRegionError::Misaligned(gpa));
            }
            let region = Region {
                gpa: gpa.0,
                len,
                pointer,
                writable,
            };
            self.regions
                .try_push(region)
                .map_err(|_| AddRegionError::TooMany)
        }

        /// Adds `len` bytes at `gpa` whose pages `pager` finds.
        ///
        /// Accesses take longer than to other ranges, and [`GuestMemory::word`] finds none here.
        ///
        /// # Errors
        ///
        /// The range overlaps another, is empty, wraps, or is not made of whole pages; or there
        /// are [`Self::MAX_PAGED`] already.
        pub fn add_paged(
            &mut self,
            gpa: Gpa,
            len: u64,
            pager: &'static dyn Pager,
        ) -> Result<(), AddRegionError> {
            self.check_room(gpa, len)?;
            if (gpa.0 | len) & (PAGE_SIZE - 1) != 0 {
                return Err(AddRegionError::Misaligned(gpa));
            }
            let range = Paged {
                gpa: gpa.0,
                len,
                pager,
            };
            let added = self.paged.try_push(range);
            added.map_err(|_| AddRegionError::TooMany)
        }

        fn check_room(&self, gpa: Gpa, len: u64) -> Result<(), AddRegionError> {
            let end = gpa.checked_add(len).ok_or(AddRegionError::Overlap(gpa))?.0;
            let fixed = self.regions.iter().map(|r| (r.gpa, r.len));
            let mut all = fixed.chain(self.paged.iter().map(|r| (r.gpa, r.len)));
            if len == 0 || all.any(|(first, len)| gpa.0 < first + len && first < end) {
                return Err(AddRegionError::Overlap(gpa));
            }
            Ok(())
        }

        /// The ranges as (first address, length in bytes, writable), in the order of addition,
        /// without those whose pages come and go.
        pub fn ranges(&self) -> impl Iterator<Item = (Gpa, u64, bool)> + '_ {
            self.regions.iter().map(|r| (Gpa(r.gpa), r.len, r.writable))
        }

        /// How many bytes the guest has, or can have, in all ranges.
        pub fn size(&self) -> u64 {
            let fixed = self.regions.iter().map(|range| range.len);
            fixed.chain(self.paged.iter().map(|range| range.len)).sum()
        }

        /// Where this program has mapped `len` bytes at `gpa`, for handing to hardware (page
        /// tables, DMA). `None` unless all of it is one range, whose pages do not come and go.
        pub fn host_pointer(&self, gpa: Gpa, len: u64) -> Option<*mut u8> {
            self.search_fixed(gpa, len, false).ok()
        }

        #[inline]
        fn locate(&self, gpa: Gpa, len: u64, write: bool) -> Result<*mut u8, MemoryFault> {
            match self.locate_first(gpa, len, write) {
                Some(place) => Ok(place),
                None => self.search(gpa, len, write),
            }
        }

        /// Where an access begins that lies in the first range, as most do; this is on the path of
        /// every exit.
        #[inline]
        fn locate_first(&self, gpa: Gpa, len: u64, write: bool) -> Option<*mut u8> {
            let region = self.regions.first()?;
            let offset = region.offset_of(gpa, len)?;
            let place = region.pointer.wrapping_add(offset as usize);
            (region.writable || !write).then_some(place)
        }

        #[inline(never)]
        fn search(&self, gpa: Gpa, len: u64, write: bool) -> Result<*mut u8, MemoryFault> {
            match self.search_fixed(gpa, len, write) {
                Err(MemoryFault {
                    kind: FaultKind::NotMemory,
                    ..
                }) if !self.paged.is_empty() => match self.locate_part(gpa, len, write)? {
                    (place, part) if part == len => Ok(place),
                    _ => Err(MemoryFault {
                        gpa,
                        len,
                        kind: FaultKind::NotMemory,
                    }),
                },
                found => found,
            }
        }

        fn search_fixed(&self, gpa: Gpa, len: u64, write: bool) -> Result<*mut u8, MemoryFault> {
            let found = self
                .regions
                .iter()
                .find_map(|r| Some((r, r.offset_of(gpa, len)?)));
            match found {
                Some((region, offset)) if region.writable || !write => {
                    Ok(region.pointer.wrapping_add(offset as usize))
                }
                Some(_) => Err(MemoryFault {
                    gpa,
                    len,
                    kind: FaultKind::ReadOnly,
                }),
                None => Err(MemoryFault {
                    gpa,
                    len,
                    kind: FaultKind::NotMemory,
                }),
            }
        }

        #[inline(never)]
        fn search_words(&self, gpa: Gpa, len: u64) -> Option<*mut u8> {
            // What may go must be looked up each time.
            self.search_fixed(gpa, len, true).ok()
        }

        /// The range of pages that come and go in which `gpa` lies.
        fn paged_at(&self, gpa: Gpa) -> Option<&Paged> {
            let mut ranges = self.paged.iter();
            ranges.find(|r| gpa.0.wrapping_sub(r.gpa) < r.len)
        }

        /// Where `len` bytes from `gpa` begin here, and how many of them lie in one range, or in
        /// one page if it comes and goes.
        fn locate_part(
            &self,
            gpa: Gpa,
            len: u64,
            write: bool,
        ) -> Result<(*mut u8, u64), MemoryFault> {
            for region in &self.regions {
                let offset = gpa.0.wrapping_sub(region.gpa);
                if offset < region.len {
                    if write && !region.writable {
                        return Err(MemoryFault {
                            gpa,
                            len,
                            kind: FaultKind::ReadOnly,
                        });
                    }
                    let part = len.min(region.len - offset);
                    return Ok((region.pointer.wrapping_add(offset as usize), part));
                }
            }
            let offset = gpa.0 & (PAGE_SIZE - 1);
            let page = self.paged_at(gpa).map(|range| range.pager);
            if let Some(page) = page.and_then(|pager| pager.page(Gpa(gpa.0 - offset), write)) {
                let part = len.min(PAGE_SIZE - offset);
                return Ok((page.as_ptr().wrapping_add(offset as usize), part));
            }
            Err(MemoryFault {
                gpa,
                len,
                kind: FaultKind::NotMemory,
            })
        }

        /// An access wherever it is: every part is checked before the first byte moves.
        fn for_each_part(
            &self,
            gpa: Gpa,
            len: u64,
            write: bool,
            mut copy: impl FnMut(*mut u8, usize, usize),
        ) -> Result<(), MemoryFault> {
            self.walk(gpa, len, |at, left| {
                self.locate_part(at, left, write).map(|(_, part)| part)
            })?;
            let mut start = 0;
            self.walk(gpa, len, |at, left| {
                let (place, part) = self.locate_part(at, left, write)?;
                copy(place, start as usize, part as usize);
                start += part;
                Ok(part)
            })
        }

        /// Visits an access part by part: `part` is given the rest and says how much of it it took.
        fn walk(
            &self,
            gpa: Gpa,
            len: u64,
            mut part: impl FnMut(Gpa, u64) -> Result<u64, MemoryFault>,
        ) -> Result<(), MemoryFault> {
            let mut done = 0;
            while done < len {
                let at = gpa.checked_add(done).ok_or(MemoryFault {
                    gpa,
                    len,
                    kind: FaultKind::NotMemory,
                })?;
                done += part(at, len - done)?;
            }
            Ok(())
        }

        /// A read that is not all in the first range.
        #[inline(never)]
        fn read_elsewhere(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
            self.for_each_part(gpa, buf.len() as u64, false, |from, start, len| {
                let to = &mut buf[start..start + len];
                // SAFETY: `for_each_part` found that many bytes inside a live range or page, and
                // `to`, a unique reference, cannot overlap memory that nothing has a reference into.
                unsafe { core::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), len) };
            })
        }

        /// A write that is not all in the first range.
        #[inline(never)]
        fn write_elsewhere(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
            self.for_each_part(gpa, data.len() as u64, true, |to, start, len| {
                let from = &data[start..start + len];
                // SAFETY: as for a read, and the range is writable.
                unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, len) };
            })
        }

        #[inline]
        fn atomic<T>(&self, gpa: Gpa, write: bool) -> Result<*mut T, MemoryFault> {
            let len = size_of::<T>() as u64;
            if gpa.0 & (len - 1) != 0 {
                return Err(MemoryFault {
                    gpa,
                    len,
                    kind: FaultKind::Misaligned,
                });
            }
            Ok(self.locate(gpa, len, write)?.cast())
        }
    }

    macro_rules! atomic_access {
        ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
            #[inline]
            fn $load(&self, gpa: Gpa) -> Result<$int, MemoryFault> {
                let pointer = self.atomic::<$int>(gpa, false)?;
                // SAFETY: `atomic` found the whole value inside a live range, and it is aligned
                // there because ranges are aligned alike on both sides.
                Ok(unsafe { <$atomic>::from_ptr(pointer) }.load(Ordering::Acquire))
            }

            #[inline]
            fn $store(&self, gpa: Gpa, value: $int) -> Result<(), MemoryFault> {
                let pointer = self.atomic::<$int>(gpa, true)?;
                // SAFETY: as for the load, and the range is writable.
                unsafe { <$atomic>::from_ptr(pointer) }.store(value, Ordering::Release);
                Ok(())
            }
        };
    }

    macro_rules! atomic_exchange {
        ($name:ident, $int:ty, $atomic:ty) => {
            #[inline]
            fn $name(
                &self,
                gpa: Gpa,
                current: $int,
                new: $int,
            ) -> Result<Result<$int, $int>, MemoryFault> {
                let pointer = self.atomic::<$int>(gpa, true)?;
                // SAFETY: as for a store.
                let place = unsafe { <$atomic>::from_ptr(pointer) };
                Ok(place.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire))
            }
        };
    }

    impl GuestMemory for GuestRam {
        #[inline]
        fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
            if buf.is_empty() {
                return Ok(());
            }
            if let Some(from) = self.locate_first(gpa, buf.len() as u64, false) {
                // SAFETY: `locate_first` found that many bytes inside a live range, and `buf`, a
                // unique reference, cannot overlap memory that nothing has a reference into.
                unsafe { core::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
                return Ok(());
            }
            self.read_elsewhere(gpa, buf)
        }

        #[inline]
        fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
            if data.is_empty() {
                return Ok(());
            }
            if let Some(to) = self.locate_first(gpa, data.len() as u64, true) {
                // SAFETY: as for `read`, and the range is writable.
                unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
                return Ok(());
            }
            self.write_elsewhere(gpa, data)
        }

        atomic_access!(load_u16, store_u16, u16, AtomicU16);
        atomic_access!(load_u32, store_u32, u32, AtomicU32);
        atomic_access!(load_u64, store_u64, u64, AtomicU64);
        atomic_exchange!(compare_exchange_u32, u32, AtomicU32);
        atomic_exchange!(compare_exchange_u64, u64, AtomicU64);

        #[inline]
        fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
            // What may go must be looked up each time.
            if gpa.0 & 7 != 0 {
                return None;
            }
            let pointer = self.search_fixed(gpa, 8, false).ok()?.cast();
            // SAFETY: as for a load, alignment included; the memory stays as long as this value, whose lifetime the
            // reference has.
            Some(unsafe { AtomicU64::from_ptr(pointer) })
        }

        #[inline]
        fn words(&self, gpa: Gpa, count: usize) -> Option<&[AtomicU64]> {
            if gpa.0 & 7 != 0 {
                return None;
            }
            let len = (count as u64).checked_mul(8)?;
            let place = match self.locate_first(gpa, len, true) {
                Some(place) => place,
                None => self.search_words(gpa, len)?,
            };
            // SAFETY: all of the words lie inside a live range, which stays as long as this value,
            // whose lifetime the slice has; they are aligned there because ranges are aligned alike
            // on both sides; and they are accessed as atomics and by raw copies only.
            Some(unsafe { core::slice::from_raw_parts(place.cast(), count) })
        }

        fn bring_in(&self, gpa: Gpa, write: bool) -> BroughtIn {
            let page = Gpa(gpa.0 & !(PAGE_SIZE - 1));
            match self.paged_at(page) {
                Some(range) if range.pager.page(page, write).is_some() => BroughtIn::Present,
                Some(range) if range.pager.is_memory(page) => BroughtIn::NoneLeft,
                _ => BroughtIn::NothingAway,
            }
        }

        fn contains(&self, gpa: Gpa, len: u64) -> bool {
            let parts = self.walk(gpa, len, |at, left| match self.paged_at(at) {
                Some(range) if range.pager.is_memory(Gpa(at.0 & !(PAGE_SIZE - 1))) => {
                    Ok(left.min(PAGE_SIZE - (at.0 & (PAGE_SIZE - 1))))
                }
                _ => self.locate_part(at, left, false).map(|(_, part)| part),
            });
            parts.is_ok()
        }

        #[inline(always)]
        fn read_parts(
            &self,
            page: Gpa,
            buf: &mut [u8; PAGE],
            parts: &[Range<usize>],
        ) -> Result<(), MemoryFault> {
            let Ok(from) = self.locate(page, PAGE_SIZE, false) else {
                return parts.iter().try_for_each(|part| {
                    self.read(page.wrapping_add(part.start as u64), &mut buf[part.clone()])
                });
            };
            for part in parts {
                let to = &mut buf[part.clone()];
                // SAFETY: `locate` found 4096 bytes inside a live range, of which indexing `buf`
                // has shown this part to be some; `buf` overlaps no guest memory.
                unsafe {
                    core::ptr::copy_nonoverlapping(from.add(part.start), to.as_mut_ptr(), to.len());
                }
            }
            Ok(())
        }

        #[inline(always)]
        fn write_parts(
            &self,
            page: Gpa,
            data: &[u8; PAGE],
            parts: &[Range<usize>],
        ) -> Result<(), MemoryFault> {
            let Ok(to) = self.locate(page, PAGE_SIZE, true) else {
                return parts.iter().try_for_each(|part| {
                    self.write(page.wrapping_add(part.start as u64), &data[part.clone()])
                });
            };
            for part in parts {
                let from = &data[part.clone()];
                // SAFETY: as for `read_parts`, and the range is writable.
                unsafe {
                    core::ptr::copy_nonoverlapping(from.as_ptr(), to.add(part.start), from.len());
                }
            }
            Ok(())
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use std::vec;

    #[test]
    fn parts_of_a_page_are_copied_in_place() {
        let (mut first, mut second) = (vec![0u64; 512], vec![0u64; 512]);
        let ram = two_regions(&mut first, &mut second);
        let data: [u8; PAGE] = core::array::from_fn(|i| i as u8 | 1);
        // The page at 0x1800 lies half in each range, the one at 0x1000 in the first.
        for page in [Gpa(0x1000), Gpa(0x1800)] {
            ram.write_parts(page, &data, &[8..24, 0x900..0x910])
                .unwrap();
            let mut back = [0; PAGE];
            ram.read_parts(page, &mut back, &[8..16, 0x908..0x910])
                .unwrap();
            assert_eq!(back[8..16], data[8..16]);
            assert_eq!(back[0x908..0x910], data[0x908..0x910]);
            assert!(back[16..0x908].iter().all(|b| *b == 0));
            let mut whole = [0; PAGE];
            ram.read(page, &mut whole).unwrap();
            assert_eq!(whole[16..24], data[16..24]);
            assert_eq!(whole[0x910], 0);
        }
        let mut back = [0; PAGE];
        assert!(
            ram.read_parts(Gpa(0x9000), &mut back, core::slice::from_ref(&(0..8)))
                .is_err()
        );
        assert!(
            ram.write_parts(Gpa(0x9000), &data, core::slice::from_ref(&(0..8)))
                .is_err()
        );
    }

    fn two_regions(first: &mut [u64], second: &mut [u64]) -> GuestRam {
        let mut ram = GuestRam::new();
        // SAFETY: the tests keep both slices alive and use them through `ram` only.
        unsafe {
            ram.add(
                Gpa(0x1000),
                first.as_mut_ptr().cast(),
                first.len() as u64 * 8,
                true,
            )
            .unwrap();
            let gpa = Gpa(0x1000 + first.len() as u64 * 8);
            ram.add(
                gpa,
                second.as_mut_ptr().cast(),
                second.len() as u64 * 8,
                true,
            )
            .unwrap();
        }
        ram
    }

    #[test]
    fn copies_cross_from_one_region_to_the_next() {
        let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
        let ram = two_regions(&mut a, &mut b);
        let data: [u8; 64] = core::array::from_fn(|i| i as u8);
        ram.write(Gpa(0x1000), &data).unwrap();
        let mut back = [0; 40];
        ram.read(Gpa(0x1010), &mut back).unwrap();
        assert_eq!(back, data[16..56]);
    }

    #[test]
    fn words_lie_in_one_range_that_may_be_written() {
        let (mut a, mut b) = (vec![1; 4], vec![2; 4]);
        let mut ram = two_regions(&mut a, &mut b);
        let mut fixed = vec![3u64; 4];
        // SAFETY: `fixed` outlives `ram`.
        unsafe { ram.add(Gpa(0x8000), fixed.as_mut_ptr().cast(), 32, false) }.unwrap();
        for (gpa, count, value) in [(0x1000, 4, 1), (0x1018, 1, 1), (0x1020, 4, 2)] {
            let words = ram.words(Gpa(gpa), count).unwrap();
            assert_eq!(words.len(), count);
            assert!(words.iter().all(|w| w.load(Ordering::Acquire) == value));
        }
        ram.words(Gpa(0x1020), 2).unwrap()[1].store(7, Ordering::Release);
        assert_eq!(ram.load_u64(Gpa(0x1028)), Ok(7));
        // Across two ranges, past the last, before the first, misaligned, too many, read-only.
        for (gpa, count) in [
            (0x1018, 2),
            (0x1020, 5),
            (0xFF8, 1),
            (0x1004, 1),
            (0x1000, usize::MAX / 8 + 2),
            (0x8000, 1),
        ] {
            assert!(ram.words(Gpa(gpa), count).is_none(), "{gpa:#x}");
        }
        let reference = &ram;
        let through = <&GuestRam as GuestMemory>::words(&reference, Gpa(0x1000), 4);
        assert!(through.is_some());
    }

    #[test]
    fn a_partial_access_changes_nothing() {
        let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
        let ram = two_regions(&mut a, &mut b);
        let fault = ram.write(Gpa(0x1030), &[0xFF; 17]).unwrap_err();
        assert_eq!(fault.kind, FaultKind::NotMemory);
        assert_eq!(ram.load_u64(Gpa(0x1030)), Ok(0));
        assert_eq!(
            ram.read(Gpa(u64::MAX), &mut [0; 2]).unwrap_err().kind,
            FaultKind::NotMemory
        );
        assert!(ram.contains(Gpa(0x1000), 64) && !ram.contains(Gpa(0x1000), 65));
    }

    #[test]
    fn atomics_want_alignment() {
        let (mut a, mut b) = (vec![0; 4], vec![0; 4]);
        let ram = two_regions(&mut a, &mut b);
        assert_eq!(
            ram.load_u32(Gpa(0x1002)).unwrap_err().kind,
            FaultKind::Misaligned
        );
        assert_eq!(ram.compare_exchange_u32(Gpa(0x1004), 0, 5), Ok(Ok(0)));
        assert_eq!(ram.compare_exchange_u32(Gpa(0x1004), 0, 6), Ok(Err(5)));
        assert_eq!(ram.load_u64(Gpa(0x1000)), Ok(5 << 32));
    }

    #[test]
    fn read_only_ranges_refuse_writes() {
        let mut bytes = vec![1u64; 2];
        let mut ram = GuestRam::new();
        // SAFETY: `bytes` outlives `ram`.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), 16, false) }.unwrap();
        assert_eq!(
            ram.store_u16(Gpa(0), 1).unwrap_err().kind,
            FaultKind::ReadOnly
        );
        assert_eq!(
            ram.write(Gpa(0), &[1]).unwrap_err().kind,
            FaultKind::ReadOnly
        );
        assert_eq!(ram.load_u16(Gpa(0)), Ok(1));
        // SAFETY: refused before anything is stored.
        let again = unsafe { ram.add(Gpa(8), bytes.as_mut_ptr().cast(), 16, false) };
        assert_eq!(again, Err(AddRegionError::Overlap(Gpa(8))));
    }
}
