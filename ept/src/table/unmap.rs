//! Unmapping: whole ranges, or one page.

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

use super::map::Spare;
use super::{EditError, PageTable, place};
use crate::Flush;
use crate::format::{Format, Leaf, shift_of};

/// Where the pages go that an edit takes out.
pub(super) trait Sink<F: Format> {
    /// Whether anybody wants them: if not, whole tables leave unread.
    const WANTED: bool;
    fn take(&mut self, address: F::Input, leaf: Leaf<F::Flags>);
}

impl<F: Format> Sink<F> for () {
    const WANTED: bool = false;
    #[inline]
    fn take(&mut self, _: F::Input, _: Leaf<F::Flags>) {}
}

struct Collect<C>(C);

impl<F: Format, C: Extend<(F::Input, Leaf<F::Flags>)>> Sink<F> for Collect<C> {
    const WANTED: bool = true;
    fn take(&mut self, address: F::Input, leaf: Leaf<F::Flags>) {
        self.0.extend([(address, leaf)]);
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// Removes everything from `len` bytes at `start`, and the tables that become empty.
    ///
    /// What is absent already stays so. A larger page that lies partly in the range is split first.
    ///
    /// # Errors
    ///
    /// The range is bad, or there is no frame to split a large page: the table is as before.
    pub fn unmap(&self, start: F::Input, len: u64) -> Result<Flush<'_, M>, EditError> {
        self.remove(start, len, ())
    }

    /// As [`Self::unmap`], and collects the pages with their final accessed and dirty bits. The
    /// collection can be had once the flush is discharged.
    ///
    /// # Errors
    ///
    /// As [`Self::unmap`].
    pub fn unmap_into<C: Extend<(F::Input, Leaf<F::Flags>)>>(
        &self,
        start: F::Input,
        len: u64,
        pages: C,
    ) -> Result<Flush<'_, M, C>, EditError> {
        let flush = self.remove(start, len, Collect(pages))?;
        Ok(flush.map(|pages| pages.0))
    }

    /// Removes the page that holds `address`, whatever its size, in parallel with other
    /// edits of pages. `None` comes out if nothing was mapped.
    #[allow(clippy::type_complexity, reason = "a token around an optional page")]
    pub fn unmap_page(&self, address: F::Input) -> Flush<'_, M, Option<Leaf<F::Flags>>> {
        let mut flush = self.token(None);
        let Some(offset) = self.format.offset(address) else {
            return flush;
        };
        let _editor = self.lock.shared();
        loop {
            let found = self.find(offset);
            if !self.format.is_present(found.entry) {
                return flush;
            }
            if self.is_sized(&found) {
                self.single(&mut flush, offset);
                continue;
            }
            let replaced =
                self.frames
                    .compare_exchange(found.at, found.entry, self.format.absent());
            if replaced.is_ok() {
                let leaf = self.format.leaf(found.entry, found.level);
                let first = offset & !(leaf.bytes() - 1);
                flush.cover(first, first | (leaf.bytes() - 1), true);
                *flush.value_mut() = Some(leaf);
                return flush;
            }
        }
    }

    /// Removes whole pages, and tables that become empty, into a token that covers more already.
    /// `len` of `None` means everything.
    #[cfg(feature = "alloc")]
    pub(crate) fn drop_pages<'t>(
        &'t self,
        flush: &mut Flush<'t, M>,
        offset: u64,
        len: Option<u64>,
    ) {
        let _editor = self.lock.exclusive();
        let len = len.unwrap_or(1 << self.format.input_bits());
        self.clear(self.root, self.format.levels(), offset, len, flush);
    }

    fn remove<S: Sink<F>>(
        &self,
        start: F::Input,
        len: u64,
        sink: S,
    ) -> Result<Flush<'_, M, S>, EditError> {
        let offset = self.range(start, len)?;
        let mut flush = self.token(sink);
        let _editor = self.lock.exclusive();
        self.cut(&mut flush, [offset, offset + len])?;
        let levels = self.format.levels();
        self.clear(self.root, levels, offset, len, &mut flush);
        Ok(flush)
    }

    /// Splits large pages so that none straddles one of the offsets.
    pub(super) fn cut<T>(
        &self,
        flush: &mut Flush<'_, M, T>,
        offsets: [u64; 2],
    ) -> Result<(), EditError> {
        let end = 1u64 << self.format.input_bits();
        let steps = |offset: u64| {
            if offset >= end {
                return 0;
            }
            let found = self.find(offset);
            let present = self.format.is_present(found.entry);
            // The levels above the first at which the offset is a page's start.
            let aligned = (offset.trailing_zeros().saturating_sub(3) / 9).max(1) as u8;
            usize::from(present) * usize::from(found.level.saturating_sub(aligned))
        };
        let needed = offsets.map(steps);
        if !F::SIZED_PAGES && needed == [0, 0] {
            return Ok(());
        }
        let mut spare = Spare::new(&self.frames, needed[0] + needed[1])?;
        for offset in offsets.into_iter().filter(|offset| *offset < end) {
            loop {
                let found = self.find(offset);
                if self.is_sized(&found) {
                    self.single(flush, offset);
                    continue;
                }
                let span = 1u64 << shift_of(found.level);
                if !self.format.is_present(found.entry) || offset & (span - 1) == 0 {
                    break;
                }
                let first = offset & !(span - 1);
                self.break_up(found.at, found.level, offset, spare.take());
                flush.cover(first, first | (span - 1), false);
            }
        }
        Ok(())
    }

    fn clear<S: Sink<F>>(
        &self,
        table: Hpa,
        level: u8,
        mut offset: u64,
        mut len: u64,
        flush: &mut Flush<'_, M, S>,
    ) {
        let span = 1u64 << shift_of(level);
        while len > 0 {
            let at = place(table, level, offset);
            let piece = len.min(span - (offset & (span - 1)));
            let entry = self.frames.load(at);
            if !self.format.is_present(entry) {
                // Nothing to remove.
            } else if self.format.is_leaf(entry, level) {
                self.clear_leaf(at, level, offset, flush);
            } else {
                let (child, below) = self.format.child(entry, level);
                if piece == span {
                    self.frames.store(at, self.format.absent());
                    self.retire(child, below, offset, flush);
                    flush.cover(offset, offset | (span - 1), false);
                } else {
                    self.clear(child, below, offset, piece, flush);
                    if self.is_empty(child) {
                        self.frames.store(at, self.format.absent());
                        flush.retire(child);
                        let first = offset & !(span - 1);
                        flush.cover(first, first | (span - 1), false);
                    }
                }
            }
            offset += piece;
            len -= piece;
        }
    }

    #[inline]
    fn clear_leaf<S: Sink<F>>(&self, at: Hpa, level: u8, offset: u64, flush: &mut Flush<'_, M, S>) {
        if S::WANTED {
            let leaf = self.slot(self.take_entry(at), level, offset);
            flush.value_mut().take(self.format.address(offset), leaf);
        } else {
            self.frames.store(at, self.format.absent());
        }
        flush.cover(offset, offset | ((1 << shift_of(level)) - 1), true);
    }

    /// Hands a table that is unlinked, and all below it, to the token.
    fn retire<S: Sink<F>>(&self, table: Hpa, level: u8, first: u64, flush: &mut Flush<'_, M, S>) {
        if level > 1 || S::WANTED {
            for index in 0..512u64 {
                let at = Hpa(table.0 | index << 3);
                let entry = self.frames.load(at);
                let offset = first | index << shift_of(level);
                if !self.format.is_present(entry) {
                    continue;
                }
                if !self.format.is_leaf(entry, level) {
                    let (child, below) = self.format.child(entry, level);
                    self.retire(child, below, offset, flush);
                } else if S::WANTED {
                    let leaf = self.slot(self.take_entry(at), level, offset);
                    flush.value_mut().take(self.format.address(offset), leaf);
                }
            }
        }
        flush.retire(table);
    }

    /// Makes an entry absent and returns what it held, with every bit that hardware has set.
    #[inline]
    fn take_entry(&self, at: Hpa) -> u64 {
        let settled = self.format.accessed_bit() | self.format.dirty_bit();
        let mut old = self.frames.load(at);
        loop {
            // With A and D set hardware has nothing left to write, and other editors are out.
            if old & settled == settled {
                self.frames.store(at, self.format.absent());
                return old;
            }
            match self.frames.compare_exchange(at, old, self.format.absent()) {
                Ok(_) => return old,
                Err(now) => old = now,
            }
        }
    }

    fn is_empty(&self, table: Hpa) -> bool {
        (0..512).all(|index| {
            let entry = self.frames.load(Hpa(table.0 | index << 3));
            !self.format.is_present(entry)
        })
    }
}
