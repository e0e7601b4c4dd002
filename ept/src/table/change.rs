//! Changing what is mapped: rights, flags, and the size of pages.

use testudo_arch::{FrameAlloc, FrameMem, Hpa, PageSize};

use super::map::Spare;
use super::{EditError, Found, PageTable, place};
use crate::Flush;
use crate::format::{Format, Leaf, Rights, level_of, shift_of};

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// Gives everything that is mapped in the range these rights; what is absent stays so.
    ///
    /// A larger page that lies partly in the range is split first.
    ///
    /// # Errors
    ///
    /// The range is bad, the format cannot express the rights ([`EditError::Flags`]), or there is
    /// no frame to split a large page: the table is as before.
    pub fn protect(
        &self,
        start: F::Input,
        len: u64,
        rights: Rights,
    ) -> Result<Flush<'_, M>, EditError> {
        let flags = self.format.flags(rights);
        let flags = flags.ok_or(EditError::Flags(u64::from(rights.bits())))?;
        let offset = self.range(start, len)?;
        let mut flush = self.token(());
        let _editor = self.lock.exclusive();
        // Executable pages may have to be smaller than others.
        let readable = self.format.flags(Rights::READ).unwrap_or(flags);
        let to = self.format.largest_level(flags);
        if to < self.format.largest_level(readable) {
            self.split_range(&mut flush, offset, len, to)?;
        }
        self.cut(&mut flush, [offset, offset + len])?;
        // Every format sets and clears certain bits, whatever the others are: these.
        let probe = |entry| {
            let old = self.format.leaf(entry, 1).flags;
            let new = self.format.with_rights(old, rights).unwrap_or(old);
            let encode = |flags| self.format.leaf_entry(Hpa(0), 1, flags);
            (encode(old), encode(new))
        };
        let ((zeros, with), (ones, without)) = (probe(0), probe(!self.format.address_mask()));
        let (set, clear) = (with & !zeros, ones & !without);
        self.rewrite(&mut flush, offset, len, &|entry, _, _| {
            (entry & !clear) | set
        });
        Ok(flush)
    }

    /// Sets the flags of everything that is mapped in the range to what `change` makes of them, which
    /// must depend on nothing else; what is absent stays so. Accessed and dirty bits that hardware
    /// sets meanwhile are not lost.
    ///
    /// # Errors
    ///
    /// The range is bad, `change` makes flags of some page's that hardware reserves or that only a
    /// smaller page may have, or there is no
    /// frame to split a large page: the table is as before.
    pub fn update(
        &self,
        start: F::Input,
        len: u64,
        change: impl Fn(F::Flags) -> F::Flags,
    ) -> Result<Flush<'_, M>, EditError> {
        let offset = self.range(start, len)?;
        let mut flush = self.token(());
        let _editor = self.lock.exclusive();
        for (_, leaf) in self.leaves(start, len)? {
            let flags = change(leaf.flags);
            let largest = shift_of(self.format.largest_level(flags));
            let too_large = !F::SIZED_PAGES && leaf.shift > largest;
            if !self.format.is_valid(flags) || too_large {
                let entry = self.format.leaf_entry(Hpa(0), 1, flags);
                return Err(EditError::Flags(entry));
            }
        }
        self.cut(&mut flush, [offset, offset + len])?;
        self.rewrite(&mut flush, offset, len, &|entry, level, offset| {
            let leaf = self.slot(entry, level, offset);
            self.format
                .leaf_entry(leaf.frame, level, change(leaf.flags))
        });
        Ok(flush)
    }

    /// Replaces every leaf entry of the range by what `change` makes of it, and returns how many
    /// were changed. The caller excludes other editors and has cut the range out.
    pub(super) fn rewrite<T>(
        &self,
        flush: &mut Flush<'_, M, T>,
        offset: u64,
        len: u64,
        change: &impl Fn(u64, u8, u64) -> u64,
    ) -> u64 {
        self.rewrite_table(self.root, self.format.levels(), offset, len, change, flush)
    }

    fn rewrite_table<T>(
        &self,
        table: Hpa,
        level: u8,
        mut offset: u64,
        mut len: u64,
        change: &impl Fn(u64, u8, u64) -> u64,
        flush: &mut Flush<'_, M, T>,
    ) -> u64 {
        let span = 1u64 << shift_of(level);
        let mut changed = 0;
        if level == 1 {
            changed = self.rewrite_row(place(table, 1, offset), offset, len >> 12, change);
            if changed != 0 {
                flush.cover(offset, offset + (len - 1), true);
            }
            return changed;
        }
        while len > 0 {
            let at = place(table, level, offset);
            let piece = len.min(span - (offset & (span - 1)));
            let entry = self.frames.load(at);
            if !self.format.is_present(entry) {
                // Nothing to change.
            } else if self.format.is_leaf(entry, level) {
                if self.rewrite_leaf(at, level, offset, change) {
                    changed += 1;
                    flush.cover(offset, offset | (span - 1), true);
                }
            } else {
                let (child, below) = self.format.child(entry, level);
                changed += self.rewrite_table(child, below, offset, piece, change, flush);
            }
            offset += piece;
            len -= piece;
        }
        changed
    }

    /// Rewrites `count` entries of a table of level 1 from `at` on.
    #[inline]
    fn rewrite_row(
        &self,
        at: Hpa,
        offset: u64,
        count: u64,
        change: &impl Fn(u64, u8, u64) -> u64,
    ) -> u64 {
        let settled = self.format.accessed_bit() | self.format.dirty_bit();
        let (mut index, mut changed) = (0, 0);
        while index < count {
            let first = at.wrapping_add(index << 3);
            let page = |index: u64| offset.wrapping_add(index << 12);
            if count - index >= 8 {
                // Mostly, entries that lie together are alike.
                let entries: [u64; 8] =
                    core::array::from_fn(|n| self.frames.load(first.wrapping_add(n as u64 * 8)));
                let any = entries.iter().fold(0, |sum, entry| sum | entry);
                let all = entries.iter().fold(!0, |sum, entry| sum & entry);
                // Hardware has nothing left to write then, and other editors are out.
                let quiet = all & settled == settled && any & Self::SHARED == 0;
                if quiet && self.format.is_present(all) {
                    for (n, entry) in (0..).zip(entries) {
                        let new = change(entry, 1, page(index + n));
                        self.frames.store(first.wrapping_add(n * 8), new);
                        changed += u64::from(new != entry);
                    }
                    index += 8;
                    continue;
                }
            }
            let end = count.min(index + 8);
            while index < end {
                let at = at.wrapping_add(index << 3);
                changed += u64::from(self.rewrite_leaf(at, 1, page(index), change));
                index += 1;
            }
        }
        changed
    }

    /// Whether the entry has changed.
    #[inline]
    fn rewrite_leaf(
        &self,
        at: Hpa,
        level: u8,
        offset: u64,
        change: &impl Fn(u64, u8, u64) -> u64,
    ) -> bool {
        let settled = self.format.accessed_bit() | self.format.dirty_bit();
        let mut entry = self.frames.load(at);
        loop {
            if !self.format.is_present(entry) {
                return false;
            }
            let new = self.keep_shared(entry, change(self.alone(entry), level, offset));
            if new == entry {
                return false;
            }
            // With A and D set hardware has nothing left to write, and other editors are out.
            if entry & settled == settled {
                self.frames.store(at, new);
                return true;
            }
            match self.frames.compare_exchange(at, entry, new) {
                Ok(_) => return true,
                Err(now) => entry = now,
            }
        }
    }

    /// Sets the flags of the page that holds `address` to what `change` makes of them, in parallel
    /// with other edits of pages. The old leaf comes out, or `None` if nothing is mapped or `change`
    /// makes what hardware reserves, another size, or flags that only a smaller page may have.
    #[allow(clippy::type_complexity, reason = "a token around an optional page")]
    pub fn change_page(
        &self,
        address: F::Input,
        change: impl Fn(Leaf<F::Flags>) -> Leaf<F::Flags>,
    ) -> Flush<'_, M, Option<Leaf<F::Flags>>> {
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
            let old = self.format.leaf(found.entry, found.level);
            let new = change(self.format.leaf(self.alone(found.entry), found.level));
            if new.shift != old.shift
                || found.level > self.format.largest_level(new.flags)
                || !self.format.is_valid(new.flags)
                || new.frame.0 & !self.format.address_mask() != 0
                || new.frame.0 & (old.bytes() - 1) != 0
            {
                return flush;
            }
            let entry = self.format.leaf_entry(new.frame, found.level, new.flags);
            let entry = self.keep_shared(found.entry, entry);
            let swapped = self.frames.compare_exchange(found.at, found.entry, entry);
            if swapped.is_ok() {
                if entry != found.entry {
                    let first = offset & !(old.bytes() - 1);
                    flush.cover(first, first | (old.bytes() - 1), true);
                }
                *flush.value_mut() = Some(old);
                return flush;
            }
        }
    }

    /// Splits every page of the range that is larger than `size`. Nothing that software can see
    /// changes, but processors must not hold both sizes of an executable page for long (machine
    /// check on page-size change, CVE-2018-12207), hence the token.
    ///
    /// # Errors
    ///
    /// The range is bad, or there are not enough frames: the table is as before.
    pub fn split(
        &self,
        start: F::Input,
        len: u64,
        size: PageSize,
    ) -> Result<Flush<'_, M>, EditError> {
        let offset = self.range(start, len)?;
        let mut flush = self.token(());
        let _editor = self.lock.exclusive();
        self.split_range(&mut flush, offset, len, level_of(size))?;
        Ok(flush)
    }

    fn split_range(
        &self,
        flush: &mut Flush<'_, M>,
        offset: u64,
        len: u64,
        to: u8,
    ) -> Result<(), EditError> {
        let levels = self.format.levels();
        let needed = self.count_splits(self.root, levels, offset, len, to);
        let mut spare = Spare::new(&self.frames, needed)?;
        self.split_below(self.root, levels, offset, len, to, &mut spare, flush);
        Ok(())
    }

    /// The tables that splitting the range needs.
    fn count_splits(&self, table: Hpa, level: u8, mut offset: u64, mut len: u64, to: u8) -> usize {
        let span = 1u64 << shift_of(level);
        let mut needed = 0;
        while len > 0 && level > to {
            let entry = self.frames.load(place(table, level, offset));
            let piece = len.min(span - (offset & (span - 1)));
            if self.format.is_present(entry) {
                if self.format.is_leaf(entry, level) {
                    // One table at each level between, for each page on the way that is touched.
                    needed += (to + 1..=level)
                        .map(|l| {
                            let first = offset >> shift_of(l);
                            let last = (offset + (piece - 1)) >> shift_of(l);
                            (last - first + 1) as usize
                        })
                        .sum::<usize>();
                } else {
                    let (child, below) = self.format.child(entry, level);
                    needed += self.count_splits(child, below, offset, piece, to);
                }
            }
            offset += piece;
            len -= piece;
        }
        needed
    }

    #[allow(clippy::too_many_arguments, reason = "a recursion's whole state")]
    fn split_below(
        &self,
        table: Hpa,
        level: u8,
        mut offset: u64,
        mut len: u64,
        to: u8,
        spare: &mut Spare<'_, M>,
        flush: &mut Flush<'_, M>,
    ) {
        let span = 1u64 << shift_of(level);
        while len > 0 && (level > to || F::SIZED_PAGES) {
            let at = place(table, level, offset);
            let entry = self.frames.load(at);
            let piece = len.min(span - (offset & (span - 1)));
            if level <= to {
                let found = Found { at, level, entry };
                if self.is_sized(&found) {
                    self.single(flush, offset);
                }
            } else if self.format.is_present(entry) {
                let (child, below) = if self.format.is_leaf(entry, level) {
                    let child = spare.take();
                    self.break_up(at, level, offset, child);
                    let first = offset & !(span - 1);
                    flush.cover(first, first | (span - 1), false);
                    (child, level - 1)
                } else {
                    self.format.child(entry, level)
                };
                self.split_below(child, below, offset, piece, to, spare, flush);
            }
            offset += piece;
            len -= piece;
        }
    }

    /// Replaces the leaf at `at` by `table`, a frame, filled with leaves that say the same.
    pub(super) fn break_up(&self, at: Hpa, level: u8, offset: u64, table: Hpa) {
        let mut entry = self.frames.load(at);
        loop {
            let leaf = self.slot(entry, level, offset);
            let first = self.format.leaf_entry(leaf.frame, level - 1, leaf.flags);
            let step = 1 << shift_of(level - 1);
            self.frames.fill(table, 512, first, step);
            let link = self.format.table_entry(table, level);
            // Hardware may have set A or D since the load.
            match self.frames.compare_exchange(at, entry, link) {
                Ok(_) => return,
                Err(now) => entry = now,
            }
        }
    }

    /// Puts a larger page wherever a whole table of the range maps consecutive pages with equal
    /// flags, accessed and dirty apart, up to pages of `size`. The number of tables that were
    /// replaced comes out.
    ///
    /// Where hardware sets dirty bits, a larger page that is writable counts as dirty: hardware may
    /// have set one of its parts' bits at the last moment.
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn merge(
        &self,
        start: F::Input,
        len: u64,
        size: PageSize,
    ) -> Result<Flush<'_, M, usize>, EditError> {
        let offset = self.range(start, len)?;
        let mut flush = self.token(0);
        let _editor = self.lock.exclusive();
        let levels = self.format.levels();
        self.merge_below(self.root, levels, offset, len, level_of(size), &mut flush);
        Ok(flush)
    }

    fn merge_below(
        &self,
        table: Hpa,
        level: u8,
        mut offset: u64,
        mut len: u64,
        largest: u8,
        flush: &mut Flush<'_, M, usize>,
    ) {
        let span = 1u64 << shift_of(level);
        while len > 0 && level > 1 {
            let at = place(table, level, offset);
            let entry = self.frames.load(at);
            let piece = len.min(span - (offset & (span - 1)));
            if self.format.is_present(entry) && !self.format.is_leaf(entry, level) {
                let (child, below) = self.format.child(entry, level);
                self.merge_below(child, below, offset, piece, largest, flush);
                if piece == span
                    && level <= largest
                    && below == level - 1
                    && let Some(large) = self.uniform(child, below)
                {
                    self.frames.store(at, large);
                    flush.cover(offset, offset | (span - 1), false);
                    flush.retire_replaced(child);
                    *flush.value_mut() += 1;
                }
            }
            offset += piece;
            len -= piece;
        }
    }

    /// The entry of the level above that maps what all of this table maps, if there is one.
    fn uniform(&self, table: Hpa, level: u8) -> Option<u64> {
        let ignored = self.format.accessed_bit() | self.format.dirty_bit();
        let first = self.frames.load(table);
        let span = 1u64 << shift_of(level);
        // Pages that are shared are given back one by one.
        let alone = first & Self::SHARED == 0;
        if !alone || !self.format.is_present(first) || !self.format.is_leaf(first, level) {
            return None;
        }
        let leaf = self.format.leaf(first, level);
        if leaf.frame.0 & ((span << 9) - 1) != 0 || level >= self.format.largest_level(leaf.flags) {
            return None;
        }
        let mut union = 0;
        for index in 0..512 {
            let entry = self.frames.load(Hpa(table.0 | index << 3));
            let expected = first.wrapping_add(index << shift_of(level));
            if (entry ^ expected) & !ignored != 0 {
                return None;
            }
            union |= entry;
        }
        let mut large = self.format.leaf_entry(leaf.frame, level + 1, leaf.flags);
        let [accessed, dirty] = [self.format.accessed_bit(), self.format.dirty_bit()];
        large |= union & (accessed | dirty);
        if large & self.format.write_bit() != 0 {
            large |= accessed | dirty;
        }
        Some(large)
    }
}
