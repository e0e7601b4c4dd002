//! Guest memory that this program has mapped: the one place where it is dereferenced.

use super::*;

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
    fn locate_part(&self, gpa: Gpa, len: u64, write: bool) -> Result<(*mut u8, u64), MemoryFault> {
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

#[cfg(test)]
mod tests;
