//! The engine: one tree of tables, whatever the format of its entries.

mod change;
mod copy;
mod dirty;
mod iter;
mod map;
mod share;
mod unmap;

use core::fmt;

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

use crate::flush::Invalidate;
use crate::format::{Format, Leaf, shift_of};
use crate::lock::EditLock;
use crate::{Flush, Invalidation};

pub use iter::Leaves;
pub use map::MapError;

/// A page table: a root frame, and the tables and pages below it.
///
/// Everything works through `&self`, so that the processors of a machine share one table.
/// [`Self::translate`] and iteration take no lock and never wait. Edits of one page
/// ([`Self::map_page`], [`Self::unmap_page`], [`Self::change_page`]) run in parallel with
/// each other and settle races by compare-exchange; edits of ranges wait for them and exclude one
/// another, but no reader. An edit must not be called from an interrupt handler that may have
/// interrupted another edit of the same table.
///
/// Dropping a table leaks its frames, since hardware may still use them; see [`Self::destroy`].
pub struct PageTable<F: Format, M: FrameAlloc + FrameMem> {
    format: F,
    frames: M,
    root: Hpa,
    lock: EditLock,
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation<Flags> {
    /// The output address.
    pub address: Hpa,
    /// The page it lies in.
    pub leaf: Leaf<Flags>,
}

/// A range that cannot be edited as asked. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// An address or length that is not a multiple of the page size, or a length of zero.
    #[error("{0:#x} is not a multiple of the page size, or zero")]
    Misaligned(u64),
    /// The range is not in the table's input range.
    #[error("{0:#x} is beyond the input addresses of the table")]
    OutOfRange(u64),
    /// The allocator has no frame for a table that must be split off.
    #[error("no frame left for a table")]
    OutOfFrames,
    /// The flags are reserved or contradictory.
    #[error("hardware reserves these flags: {0:#x}")]
    Flags(u64),
}

/// What a walk found for an offset.
pub(crate) struct Found {
    /// The entry's address.
    pub(crate) at: Hpa,
    /// The level of the table it lies in.
    pub(crate) level: u8,
    /// What it held.
    pub(crate) entry: u64,
}

/// The place of the entry for `offset` in a table of `level`.
#[inline]
pub(crate) fn place(table: Hpa, level: u8, offset: u64) -> Hpa {
    Hpa(table.0 | ((offset >> shift_of(level)) & 0x1FF) << 3)
}

/// Makes a zeroed frame a table without entries.
#[inline]
pub(crate) fn blank<F: Format, M: FrameMem>(format: &F, frames: &M, table: Hpa) {
    if format.absent() != 0 {
        frames.fill(table, 512, format.absent(), 0);
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// An empty table, or `None` if there is no frame for its root.
    pub fn new(format: F, frames: M) -> Option<Self> {
        let root = frames.alloc()?;
        blank(&format, &frames, root);
        Some(Self {
            format,
            frames,
            root,
            lock: EditLock::new(),
        })
    }

    /// The root frame: what goes into CR3, nCR3, EPTP or a device's context, with the bits that
    /// these want besides.
    #[inline]
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// The format.
    #[inline]
    pub fn format(&self) -> &F {
        &self.format
    }

    /// The frames that the tables are made of.
    #[inline]
    pub fn frames(&self) -> &M {
        &self.frames
    }

    /// Walks as hardware does, without setting accessed or dirty bits.
    #[inline]
    pub fn translate(&self, address: F::Input) -> Option<Translation<F::Flags>> {
        let offset = self.format.offset(address)?;
        let found = self.find(offset);
        if !self.format.is_present(found.entry) {
            return None;
        }
        let leaf = self.format.leaf(found.entry, found.level);
        let within = offset & ((1 << leaf.shift) - 1);
        Some(Translation {
            address: Hpa(leaf.frame.0 | within),
            leaf,
        })
    }

    /// The leaf or absent entry that decides about `offset`.
    #[inline]
    pub(crate) fn find(&self, offset: u64) -> Found {
        match self.descend(offset) {
            Err(found) => found,
            Ok(table) => {
                let at = place(table, 1, offset);
                let entry = self.frames.load(at);
                Found {
                    at,
                    level: 1,
                    entry,
                }
            }
        }
    }

    /// The table of level 1 for `offset`, or the entry above it at which the walk ends.
    ///
    /// The levels that most tables have are written out, so that each has constants of its own.
    #[inline(always)]
    fn descend(&self, offset: u64) -> Result<Hpa, Found> {
        let levels = self.format.levels();
        let mut table = self.root;
        for level in (5..=levels).rev() {
            table = self.step(table, level, offset)?;
        }
        if levels >= 4 {
            table = self.step(table, 4, offset)?;
        }
        if levels >= 3 {
            table = self.step(table, 3, offset)?;
        }
        if levels >= 2 {
            table = self.step(table, 2, offset)?;
        }
        Ok(table)
    }

    /// The table below the entry for `offset`, or the entry if the walk ends there.
    #[inline(always)]
    fn step(&self, table: Hpa, level: u8, offset: u64) -> Result<Hpa, Found> {
        let at = place(table, level, offset);
        let entry = self.frames.load(at);
        if !self.format.is_present(entry) || self.format.is_leaf(entry, level) {
            return Err(Found { at, level, entry });
        }
        // What the engine links is always one level lower.
        Ok(self.format.child(entry, level).0)
    }

    /// The first offset from `offset` on, before `end`, at which something is mapped. Holes cost a look
    /// at each absent entry, whatever its size.
    pub(crate) fn next_mapped(&self, offset: u64, end: u64) -> Option<u64> {
        self.next_mapped_below(self.root, self.format.levels(), offset, end)
    }

    fn next_mapped_below(&self, table: Hpa, level: u8, mut offset: u64, end: u64) -> Option<u64> {
        let inside = (1u64 << shift_of(level)) - 1;
        while offset < end {
            let entry = self.frames.load(place(table, level, offset));
            let next = (offset | inside).wrapping_add(1);
            if self.format.is_present(entry) {
                if self.format.is_leaf(entry, level) {
                    return Some(offset);
                }
                let (child, below) = self.format.child(entry, level);
                let found = self.next_mapped_below(child, below, offset, next.min(end));
                if found.is_some() {
                    return found;
                }
            }
            offset = next;
        }
        None
    }

    /// The part of a leaf that one entry of `level` maps: all of it, except for pages that fill
    /// several entries.
    #[inline]
    fn slot(&self, entry: u64, level: u8, offset: u64) -> Leaf<F::Flags> {
        let mut leaf = self.format.leaf(entry, level);
        if F::SIZED_PAGES {
            let span = 1u64 << shift_of(level);
            leaf.frame.0 |= offset & (leaf.bytes() - 1) & !(span - 1);
            leaf.shift = shift_of(level);
        }
        leaf
    }

    /// Makes single pages of a page that fills several entries, of which `found` is one.
    fn single<T>(&self, flush: &mut Flush<'_, M, T>, offset: u64) {
        let found = self.find(offset);
        if !F::SIZED_PAGES || !self.format.is_present(found.entry) {
            return;
        }
        let leaf = self.format.leaf(found.entry, found.level);
        let span = 1u64 << shift_of(found.level);
        let first = offset & !(leaf.bytes() - 1);
        let table = Hpa(found.at.0 & !0xFFF);
        for slot in (first..=first | (leaf.bytes() - 1)).step_by(span as usize) {
            let at = place(table, found.level, slot);
            let mut entry = self.frames.load(at);
            while self.format.is_present(entry) {
                let part = self.slot(entry, found.level, slot);
                let new = self.format.leaf_entry(part.frame, found.level, part.flags);
                match self.frames.compare_exchange(at, entry, new) {
                    Ok(_) => break,
                    Err(now) => entry = now,
                }
            }
        }
        flush.cover(first, first | (leaf.bytes() - 1), true);
    }

    /// Whether the page that holds `offset` fills several entries.
    #[inline]
    fn is_sized(&self, found: &Found) -> bool {
        F::SIZED_PAGES
            && self.format.is_present(found.entry)
            && self.format.leaf(found.entry, found.level).shift != shift_of(found.level)
    }

    /// The range as an offset into the table, if it is aligned and lies in one piece.
    fn range(&self, start: F::Input, len: u64) -> Result<u64, EditError> {
        use crate::format::Input;
        let raw = start.as_u64();
        for value in [raw, len] {
            if value & 0xFFF != 0 {
                return Err(EditError::Misaligned(value));
            }
        }
        let more = len.checked_sub(1).ok_or(EditError::Misaligned(len))?;
        let out = EditError::OutOfRange(raw);
        let last = raw.checked_add(more).ok_or(out)?;
        let first = self.format.offset(start).ok_or(out)?;
        let end = self.format.offset(F::Input::from_u64(last));
        // A range across the hole between canonical halves is longer than its addresses differ.
        match end {
            Some(end) if end.wrapping_sub(first) == more => Ok(first),
            _ => Err(EditError::OutOfRange(last)),
        }
    }

    pub(crate) fn token<T>(&self, value: T) -> Flush<'_, M, T> {
        Flush::new(
            &self.frames,
            self.root,
            F::SOFTWARE,
            self.format.absent(),
            value,
        )
    }

    /// Frees the whole table once hardware has forgotten it, and returns the frames' source.
    ///
    /// # Errors
    ///
    /// The hardware's error with the table, which is as before.
    pub fn destroy<I: Invalidate + ?Sized>(self, hardware: &mut I) -> Result<M, (Self, I::Error)> {
        let last = (1 << self.format.input_bits()) - 1;
        let everything = Invalidation {
            root: self.root,
            first: 0,
            last,
            leaves_only: false,
        };
        if let Err(error) = hardware.invalidate(&everything) {
            return Err((self, error));
        }
        self.free_tables(self.root, self.format.levels());
        Ok(self.frames)
    }

    fn free_tables(&self, table: Hpa, level: u8) {
        if level > 1 {
            for index in 0..512 {
                let entry = self.frames.load(Hpa(table.0 | index << 3));
                if self.format.is_present(entry) && !self.format.is_leaf(entry, level) {
                    let (child, level) = self.format.child(entry, level);
                    self.free_tables(child, level);
                }
            }
        }
        self.frames.free(table);
    }

    /// The number of frames the table is made of, the root among them.
    pub fn table_frames(&self) -> usize {
        self.count_tables(self.root, self.format.levels())
    }

    fn count_tables(&self, table: Hpa, level: u8) -> usize {
        let mut count = 1;
        if level > 1 {
            for index in 0..512 {
                let entry = self.frames.load(Hpa(table.0 | index << 3));
                if self.format.is_present(entry) && !self.format.is_leaf(entry, level) {
                    let (child, level) = self.format.child(entry, level);
                    count += self.count_tables(child, level);
                }
            }
        }
        count
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> fmt::Debug for PageTable<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("format", &self.format)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}
