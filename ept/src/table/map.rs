//! Mapping: whole ranges with the largest pages that fit, or one page by compare-exchange.

use arrayvec::ArrayVec;
use testudo_arch::{FrameAlloc, FrameMem, Hpa, PageSize};

use super::{EditError, PageTable, blank, place};
use crate::format::{Format, level_of, shift_of};

/// A mapping that cannot be made. The table is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The range or the flags.
    #[error(transparent)]
    Edit(#[from] EditError),
    /// The output range exceeds the physical addresses of the format.
    #[error("{0:#x} is beyond the physical addresses")]
    TooWide(u64),
    /// The format has no pages of this size, or not with these flags.
    #[error("a page of {0} cannot have these flags")]
    TooLarge(PageSize),
    /// Something is mapped already at this offset of the table's range.
    #[error("{0:#x} is mapped already")]
    Occupied(u64),
}

/// A piece of a range that is to be mapped.
#[derive(Clone, Copy)]
struct Job<Flags> {
    offset: u64,
    len: u64,
    frame: u64,
    flags: Flags,
    largest: u8,
}

impl<Flags> Job<Flags> {
    /// The length of the part that lies in one entry of `level`.
    #[inline]
    fn piece(&self, level: u8) -> u64 {
        let span = 1u64 << shift_of(level);
        self.len.min(span - (self.offset & (span - 1)))
    }

    /// Whether the part in the first entry of `level` is one page of that level.
    #[inline]
    fn fits(&self, level: u8) -> bool {
        let span = 1u64 << shift_of(level);
        level <= self.largest && self.len >= span && (self.offset | self.frame) & (span - 1) == 0
    }

    #[inline]
    fn advance(&mut self, bytes: u64) {
        self.offset += bytes;
        self.frame = self.frame.wrapping_add(bytes);
        self.len -= bytes;
    }
}

/// Frames that an edit has allocated beforehand, so that it cannot fail halfway.
pub(super) struct Spare<'a, M: FrameAlloc + FrameMem> {
    frames: &'a M,
    head: u64,
}

impl<'a, M: FrameAlloc + FrameMem> Spare<'a, M> {
    /// Takes `count` frames, or none.
    pub(super) fn new(frames: &'a M, count: usize) -> Result<Self, EditError> {
        let mut spare = Self { frames, head: 0 };
        for _ in 0..count {
            let frame = frames.alloc_any().ok_or(EditError::OutOfFrames)?;
            frames.store(frame, spare.head);
            spare.head = frame.0;
        }
        Ok(spare)
    }

    /// One frame, which holds anything. The edit that took the frames has counted them.
    #[inline]
    pub(super) fn take(&mut self) -> Hpa {
        let frame = Hpa(self.head);
        self.head = self.frames.load(frame);
        frame
    }
}

impl<M: FrameAlloc + FrameMem> Drop for Spare<'_, M> {
    fn drop(&mut self) {
        while self.head != 0 {
            let frame = self.take();
            self.frames.free(frame);
        }
    }
}

/// A path of new tables down to one entry, built apart and linked with one compare-exchange.
/// What is not linked goes back.
struct Branch<'a, F: Format, M: FrameAlloc + FrameMem> {
    format: &'a F,
    frames: &'a M,
    tables: ArrayVec<Hpa, 6>,
}

impl<'a, F: Format, M: FrameAlloc + FrameMem> Branch<'a, F, M> {
    fn new(format: &'a F, frames: &'a M) -> Self {
        Self {
            format,
            frames,
            tables: ArrayVec::new_const(),
        }
    }

    /// The entry of a table of level `top` that leads to `entry` at level `bottom`. May be called
    /// again with another `top` when linking has failed.
    fn build(&mut self, top: u8, bottom: u8, offset: u64, entry: u64) -> Result<u64, EditError> {
        let mut link = entry;
        for level in bottom..top {
            let number = usize::from(level - bottom);
            if number == self.tables.len() {
                let table = self.frames.alloc().ok_or(EditError::OutOfFrames)?;
                blank(self.format, self.frames, table);
                self.tables.push(table);
            }
            let table = self.tables[number];
            self.frames.store(place(table, level, offset), link);
            link = self.format.table_entry(table, level + 1);
        }
        Ok(link)
    }

    fn linked(&mut self, top: u8, bottom: u8) {
        self.tables.drain(..usize::from(top - bottom));
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> Drop for Branch<'_, F, M> {
    fn drop(&mut self) {
        for &table in &self.tables {
            self.frames.free(table);
        }
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// Maps `len` bytes from `start` to `frame` with the largest pages that fit.
    ///
    /// Nothing may be mapped in the range. No token: hardware caches no absent entries, except
    /// IOMMUs in caching mode (VT-d CAP.CM; AMD-Vi's NpCache), whose driver must flush after this.
    ///
    /// # Errors
    ///
    /// The table is as before in every case: no page of the range is mapped.
    pub fn map(
        &self,
        start: F::Input,
        len: u64,
        frame: Hpa,
        flags: F::Flags,
    ) -> Result<(), MapError> {
        let largest = self.format.largest_level(flags);
        self.map_with(start, len, frame, flags, largest)
    }

    /// As [`Self::map`], with no page larger than `size`.
    ///
    /// # Errors
    ///
    /// As [`Self::map`].
    pub fn map_up_to(
        &self,
        start: F::Input,
        len: u64,
        frame: Hpa,
        flags: F::Flags,
        size: PageSize,
    ) -> Result<(), MapError> {
        let largest = self.format.largest_level(flags).min(level_of(size));
        self.map_with(start, len, frame, flags, largest)
    }

    fn map_with(
        &self,
        start: F::Input,
        len: u64,
        frame: Hpa,
        flags: F::Flags,
        largest: u8,
    ) -> Result<(), MapError> {
        let offset = self.range(start, len)?;
        self.check_output(frame, len, flags)?;
        let job = Job {
            offset,
            len,
            frame: frame.0,
            flags,
            largest,
        };
        let _editor = self.lock.exclusive();
        let levels = self.format.levels();
        let needed = self.plan(Some(self.root), levels, job)?;
        let mut spare = Spare::new(&self.frames, needed)?;
        self.install(self.root, levels, job, false, &mut spare);
        Ok(())
    }

    fn check_output(&self, frame: Hpa, len: u64, flags: F::Flags) -> Result<(), MapError> {
        if frame.0 & 0xFFF != 0 {
            return Err(EditError::Misaligned(frame.0).into());
        }
        let last = frame.0.checked_add(len - 1);
        let mask = self.format.address_mask() | 0xFFF;
        match last {
            Some(last) if last & !mask == 0 && frame.0 & !mask == 0 => {}
            _ => return Err(MapError::TooWide(frame.0)),
        }
        if !self.format.is_valid(flags) {
            let entry = self.format.leaf_entry(Hpa(0), 1, flags);
            return Err(EditError::Flags(entry).into());
        }
        Ok(())
    }

    /// The number of tables that the job needs. `table` is `None` where there is none yet.
    fn plan(
        &self,
        table: Option<Hpa>,
        level: u8,
        mut job: Job<F::Flags>,
    ) -> Result<usize, MapError> {
        let mut needed = 0;
        if table.is_none() && level == 2 && job.largest == 1 {
            // No large page: one table for each entry that is touched.
            let (first, last) = (job.offset, job.offset + (job.len - 1));
            return Ok(((last >> shift_of(2)) - (first >> shift_of(2)) + 1) as usize);
        }
        while job.len > 0 {
            let mut part = job;
            part.len = job.piece(level);
            let entry = table.map_or(0, |t| self.frames.load(place(t, level, job.offset)));
            if self.format.is_present(entry) {
                if self.format.is_leaf(entry, level) {
                    return Err(MapError::Occupied(job.offset));
                }
                let (child, level) = self.format.child(entry, level);
                needed += self.plan(Some(child), level, part)?;
            } else if !part.fits(level) {
                needed += 1;
                // A new table of level 1 needs nothing below it.
                if level > 2 {
                    needed += self.plan(None, level - 1, part)?;
                }
            }
            job.advance(part.len);
        }
        Ok(needed)
    }

    /// Writes the entries that `plan` has found absent. `fresh`: no entry of the table is present.
    fn install(
        &self,
        table: Hpa,
        level: u8,
        mut job: Job<F::Flags>,
        fresh: bool,
        spare: &mut Spare<'_, M>,
    ) {
        let span = 1u64 << shift_of(level);
        while job.len > 0 {
            let at = place(table, level, job.offset);
            let mut part = job;
            part.len = job.piece(level);
            if part.fits(level) {
                // Everything absent: one run. Above level 1, a table may stand in the way.
                if fresh || level == 1 {
                    let room = 512 - ((at.0 >> 3) & 0x1FF);
                    let count = (job.len >> shift_of(level)).min(room);
                    self.fill_run(at, level, count, &job);
                    job.advance(count << shift_of(level));
                    continue;
                }
                let entry = self.frames.load(at);
                if !self.format.is_present(entry) {
                    let entry = self.format.leaf_entry(Hpa(job.frame), level, job.flags);
                    self.frames.store(at, entry);
                    job.advance(span);
                    continue;
                }
            }
            let entry = if fresh { 0 } else { self.frames.load(at) };
            if self.format.is_present(entry) {
                let (child, level) = self.format.child(entry, level);
                self.install(child, level, part, false, spare);
            } else {
                let child = spare.take();
                if part.len == span && part.fits(level - 1) {
                    // Every entry is written, and no other preparation needed.
                    self.fill_run(child, level - 1, 512, &part);
                } else {
                    self.frames.fill(child, 512, self.format.absent(), 0);
                    self.install(child, level - 1, part, true, spare);
                }
                self.frames.store(at, self.format.table_entry(child, level));
            }
            job.advance(part.len);
        }
    }

    /// Writes `count` entries of a table from `at` on.
    #[inline]
    fn fill_run(&self, mut at: Hpa, level: u8, mut count: u64, job: &Job<F::Flags>) {
        let shift = shift_of(level);
        let mut frame = job.frame;
        while F::SIZED_PAGES && count > 0 {
            // The largest power of two that place, frame and count allow, short of a whole table.
            let index = at.0 >> 3 & 0x1FF | 0x100;
            let order = (index | frame >> shift).trailing_zeros().min(count.ilog2());
            let page = self
                .format
                .sized_entry(Hpa(frame), shift + order, job.flags);
            let entry = match page {
                Some(entry) if order > 0 => entry,
                Some(_) => self.format.leaf_entry(Hpa(frame), level, job.flags),
                None => break,
            };
            self.frames.fill(at, 1 << order, entry, 0);
            at.0 += 8 << order;
            frame += 1 << (shift + order);
            count -= 1 << order;
        }
        if count > 0 {
            let first = self.format.leaf_entry(Hpa(frame), level, job.flags);
            self.frames.fill(at, count as usize, first, 1 << shift);
        }
    }

    /// Maps one page, in parallel with others that do the same: the tables that are missing are
    /// built apart, page included, and appear with a single compare-exchange.
    ///
    /// # Errors
    ///
    /// [`MapError::Occupied`] when something is mapped there, perhaps since a moment ago by another
    /// processor that took the same fault: usually as good as success. The table is as before.
    pub fn map_page(
        &self,
        address: F::Input,
        size: PageSize,
        frame: Hpa,
        flags: F::Flags,
    ) -> Result<(), MapError> {
        let offset = self.range(address, size.bytes())?;
        self.check_output(frame, size.bytes(), flags)?;
        let level = level_of(size);
        if (offset | frame.0) & (size.bytes() - 1) != 0 {
            return Err(EditError::Misaligned(offset | frame.0).into());
        }
        if level > self.format.largest_level(flags) {
            return Err(MapError::TooLarge(size));
        }
        let entry = self.format.leaf_entry(frame, level, flags);
        let _editor = self.lock.shared();
        self.insert(offset, level, entry)
    }

    /// Puts `entry` into the place for `offset` at `level` if nothing is mapped there.
    fn insert(&self, offset: u64, level: u8, entry: u64) -> Result<(), MapError> {
        let mut spare = Branch::new(&self.format, &self.frames);
        loop {
            let found = self.find_to(offset, level);
            if self.format.is_present(found.entry) {
                return Err(MapError::Occupied(offset));
            }
            let top = spare.build(found.level, level, offset, entry)?;
            let linked = self.frames.compare_exchange(found.at, found.entry, top);
            if linked.is_ok() {
                spare.linked(found.level, level);
                return Ok(());
            }
        }
    }

    /// As [`Self::map_page`], but replaces a page of the same size or a larger one that holds the
    /// address. Smaller pages below it are in the way.
    #[cfg(feature = "alloc")]
    pub(crate) fn put<T>(
        &self,
        flush: &mut crate::Flush<'_, M, T>,
        address: F::Input,
        size: PageSize,
        frame: Hpa,
        flags: F::Flags,
    ) -> Result<(), MapError> {
        let offset = self.range(address, size.bytes())?;
        self.check_output(frame, size.bytes(), flags)?;
        let level = level_of(size);
        let entry = self.format.leaf_entry(frame, level, flags);
        let _editor = self.lock.shared();
        let mut spare = Branch::new(&self.format, &self.frames);
        loop {
            let found = self.find_to(offset, level);
            let present = self.format.is_present(found.entry);
            if present && !self.format.is_leaf(found.entry, found.level) {
                return Err(MapError::Occupied(offset));
            }
            let top = spare.build(found.level, level, offset, entry)?;
            if top == found.entry {
                return Ok(());
            }
            let linked = self.frames.compare_exchange(found.at, found.entry, top);
            if linked.is_ok() {
                spare.linked(found.level, level);
                if present {
                    let span = 1u64 << shift_of(found.level);
                    let first = offset & !(span - 1);
                    flush.cover(first, first | (span - 1), found.level == level);
                }
                return Ok(());
            }
        }
    }

    /// As [`Self::find`], but stops at `level` at the latest.
    fn find_to(&self, offset: u64, lowest: u8) -> super::Found {
        let mut table = self.root;
        let mut level = self.format.levels();
        loop {
            let at = place(table, level, offset);
            let entry = self.frames.load(at);
            let end = level <= lowest || !self.format.is_present(entry);
            if end || self.format.is_leaf(entry, level) {
                return super::Found { at, level, entry };
            }
            (table, level) = self.format.child(entry, level);
        }
    }
}
