//! What a guest has written or touched: by dirty bits, by write protection, or from a hardware log.

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

use super::{EditError, PageTable, place};
use crate::bitmap::PageBitmap;
use crate::format::{Format, shift_of};
use crate::{Flush, format::Input};

/// A harvest holds the lock for this many bytes at a time, so that faults are not kept waiting.
const PORTION: u64 = 64 << 20;

/// Which entries a harvest is after, and what it does with them.
#[derive(Clone, Copy)]
struct Harvest<'a> {
    /// Bits that must all be set.
    wanted: u64,
    /// Bits that are cleared then.
    clear: u64,
    log: &'a PageBitmap<'a>,
}

impl Harvest<'_> {
    /// Whether an entry that has some of these bits may be wanted. One of a shared page keeps its write
    /// right elsewhere.
    #[inline]
    fn may_want<F: Format, M: FrameAlloc + FrameMem>(&self, bits: u64) -> bool {
        (bits & self.wanted == self.wanted) | (bits & PageTable::<F, M>::SHARED != 0)
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// The bit by which a tracked page is known: the lowest one that hardware ignores.
    pub(super) const TRACKED: u64 = F::SOFTWARE & F::SOFTWARE.wrapping_neg();

    /// Begins to log writes by write protection, where hardware sets no dirty bits: takes the write
    /// right from every page of the range and remembers those that had it. Split large pages first
    /// for a finer log. The number of pages that lost the right comes out.
    ///
    /// # Errors
    ///
    /// The range is bad, or there is no frame to split a large page: the table is as before.
    pub fn track_writes(&self, start: F::Input, len: u64) -> Result<Flush<'_, M, u64>, EditError> {
        let write = self.format.write_bit();
        self.rewrite_bits(start, len, |entry| {
            if entry & write == 0 {
                entry
            } else {
                (entry & !write) | Self::TRACKED
            }
        })
    }

    /// Ends the log by write protection: gives the write right back.
    ///
    /// # Errors
    ///
    /// As [`Self::track_writes`].
    pub fn untrack_writes(
        &self,
        start: F::Input,
        len: u64,
    ) -> Result<Flush<'_, M, u64>, EditError> {
        let write = self.format.write_bit();
        self.rewrite_bits(start, len, |entry| {
            if entry & Self::TRACKED == 0 {
                entry
            } else {
                (entry & !Self::TRACKED) | write
            }
        })
    }

    /// Resolves a write fault on a tracked page: gives the right back, which marks the page as
    /// written, in parallel with other edits of pages. `false` if the page is not tracked: the fault
    /// has another cause. A stale translation can only fault again, hence no token.
    pub fn allow_tracked_write(&self, address: F::Input) -> bool {
        let Some(offset) = self.format.offset(address) else {
            return false;
        };
        let _editor = self.lock.shared();
        loop {
            let found = self.find(offset);
            if !self.format.is_present(found.entry) || found.entry & Self::TRACKED == 0 {
                return false;
            }
            let alone = self.alone(found.entry) | self.format.write_bit();
            let new = self.keep_shared(found.entry, alone);
            if new == found.entry {
                // A page that is also shared waits for its copy.
                return new & Self::SHARED == 0;
            }
            let swapped = self.frames.compare_exchange(found.at, found.entry, new);
            if swapped.is_ok() {
                return true;
            }
        }
    }

    /// Marks the pages of the range whose dirty bit is set in `log`, and makes them clean again. A
    /// larger page marks all of its pages. The number of entries that were dirty comes out.
    ///
    /// Writes through stale translations go unseen until the token is discharged: copy the pages
    /// only then.
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn harvest_dirty(
        &self,
        start: F::Input,
        len: u64,
        log: &PageBitmap<'_>,
    ) -> Result<Flush<'_, M, u64>, EditError> {
        let mut flush = self.token(0);
        let dirty = self.format.dirty_bit();
        if dirty != 0 {
            let harvest = Harvest {
                wanted: dirty,
                clear: dirty,
                log,
            };
            self.harvest(start, len, harvest, &mut flush)?;
        }
        Ok(flush)
    }

    /// As [`Self::harvest_dirty`], by write protection: marks the tracked pages that were given the
    /// write right, and takes it again.
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn harvest_tracked(
        &self,
        start: F::Input,
        len: u64,
        log: &PageBitmap<'_>,
    ) -> Result<Flush<'_, M, u64>, EditError> {
        let mut flush = self.token(0);
        let write = self.format.write_bit();
        let harvest = Harvest {
            wanted: write | Self::TRACKED,
            clear: write,
            log,
        };
        self.harvest(start, len, harvest, &mut flush)?;
        Ok(flush)
    }

    /// Marks the pages of the range that have been accessed since the last time in `log`, and makes
    /// them old again. The number of entries that were young comes out.
    ///
    /// There is no token: a page whose translation is cached may look unused once too often, and
    /// nothing worse happens.
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn age(&self, start: F::Input, len: u64, log: &PageBitmap<'_>) -> Result<u64, EditError> {
        let mut flush = self.token(0);
        let accessed = self.format.accessed_bit();
        if accessed != 0 {
            let harvest = Harvest {
                wanted: accessed,
                clear: accessed,
                log,
            };
            self.harvest(start, len, harvest, &mut flush)?;
        }
        Ok(*flush.value_mut())
    }

    /// Marks the pages of a page-modification log in `log` and makes them clean, so that the
    /// processor logs them again (SDM vol. 3C, 31.3.6; the entries are guest-physical addresses).
    pub fn harvest_logged(
        &self,
        addresses: impl IntoIterator<Item = F::Input>,
        log: &PageBitmap<'_>,
    ) -> Flush<'_, M> {
        let mut flush = self.token(());
        let _editor = self.lock.shared();
        let dirty = self.format.dirty_bit();
        for address in addresses {
            let Some(offset) = self.format.offset(address) else {
                continue;
            };
            loop {
                let found = self.find(offset);
                if !self.format.is_present(found.entry) {
                    break;
                }
                let (first, bytes) = self.extent(found.entry, found.level, offset);
                let new = found.entry & !dirty;
                if new != found.entry {
                    let swapped = self.frames.compare_exchange(found.at, found.entry, new);
                    if swapped.is_err() {
                        continue;
                    }
                    flush.cover(first, first | (bytes - 1), true);
                }
                log.mark_range(self.format.address(first).as_u64(), bytes >> 12);
                break;
            }
        }
        flush
    }

    fn rewrite_bits(
        &self,
        start: F::Input,
        len: u64,
        change: impl Fn(u64) -> u64,
    ) -> Result<Flush<'_, M, u64>, EditError> {
        let offset = self.range(start, len)?;
        let mut flush = self.token(0);
        let _editor = self.lock.exclusive();
        self.cut(&mut flush, [offset, offset + len])?;
        let count = self.rewrite(&mut flush, offset, len, &|entry, _, _| change(entry));
        *flush.value_mut() = count;
        Ok(flush)
    }

    fn harvest(
        &self,
        start: F::Input,
        len: u64,
        harvest: Harvest<'_>,
        flush: &mut Flush<'_, M, u64>,
    ) -> Result<(), EditError> {
        let mut offset = self.range(start, len)?;
        let end = offset + len;
        let levels = self.format.levels();
        while let Some(mapped) = self.next_mapped(offset, end) {
            offset = mapped;
            let portion = (end - offset).min(PORTION - offset % PORTION);
            let _editor = self.lock.exclusive();
            self.harvest_table(self.root, levels, offset, portion, harvest, flush);
            offset += portion;
        }
        Ok(())
    }

    fn harvest_table(
        &self,
        table: Hpa,
        level: u8,
        mut offset: u64,
        mut len: u64,
        harvest: Harvest<'_>,
        flush: &mut Flush<'_, M, u64>,
    ) {
        if level == 1 {
            let first = place(table, level, offset);
            return self.harvest_pages(first, offset, len, None, harvest, flush);
        }
        let span = 1u64 << shift_of(level);
        while len > 0 {
            let at = place(table, level, offset);
            let piece = len.min(span - (offset & (span - 1)));
            let entry = self.frames.load(at);
            if !self.format.is_present(entry) {
                // Nothing to harvest.
            } else if self.format.is_leaf(entry, level) {
                if self.wash(at, entry, harvest) {
                    let (first, bytes) = self.extent(entry, level, offset);
                    let address = self.format.address(first).as_u64();
                    harvest.log.mark_range(address, bytes >> 12);
                    flush.cover(first, first | (bytes - 1), true);
                    *flush.value_mut() += 1;
                }
            } else {
                let (child, below) = self.format.child(entry, level);
                if below == 1 {
                    let first = place(child, below, offset);
                    let next = (len > piece).then(|| self.table_after(at, level)).flatten();
                    self.harvest_pages(first, offset, piece, next, harvest, flush);
                } else {
                    self.harvest_table(child, below, offset, piece, harvest, flush);
                }
            }
            offset += piece;
            len -= piece;
        }
    }

    /// The table that the entry after `at` refers to, if it has pages.
    #[inline]
    fn table_after(&self, at: Hpa, level: u8) -> Option<Hpa> {
        if level != 2 || at.0 & 0xFF8 == 0xFF8 {
            return None;
        }
        let entry = self.frames.load(at.wrapping_add(8));
        let is_table = self.format.is_present(entry) && !self.format.is_leaf(entry, level);
        is_table.then(|| self.format.child(entry, level).0)
    }

    /// Harvests entries of one table of level 1, from `first` on. Meanwhile the same part of the table that
    /// comes next is brought into the caches: the processor does not guess across the end of a page.
    fn harvest_pages(
        &self,
        first: Hpa,
        offset: u64,
        len: u64,
        next: Option<Hpa>,
        harvest: Harvest<'_>,
        flush: &mut Flush<'_, M, u64>,
    ) {
        let next = next.map(|next| next.wrapping_add(first.0 & 0xFFF));
        let count = (len >> 12).min(512);
        // Sized pages mark more than their own bits.
        let groups = if F::SIZED_PAGES { 0 } else { count >> 3 };
        let mut wanted = 0u64;
        for group in 0..groups {
            if let Some(next) = next {
                self.frames.prefetch(next.wrapping_add(group << 6));
            }
            let entries = self.frames.load_eight(first.wrapping_add(group << 6));
            // Mostly, entries that lie together are alike, and most are not wanted.
            let any = entries.iter().fold(0, |sum, e| sum | e);
            wanted |= u64::from(harvest.may_want::<F, M>(any)).wrapping_shl(group as u32);
        }
        // One loop over what is wanted of the whole table, and one over the log's words: where each ends is
        // guessed wrong once, and the log's atomic words do not keep the loads above waiting.
        let mut bits = [0u64; 8];
        let mut words = 0u32;
        while wanted != 0 {
            let group = wanted.trailing_zeros();
            let eight = self.harvest_eight(first, u64::from(group), offset, harvest, flush);
            bits[(group >> 3) as usize & 7] |= eight.wrapping_shl((group & 7) << 3);
            words |= 1u32.wrapping_shl(group >> 3);
            wanted &= wanted - 1;
        }
        for index in groups << 3..count {
            let one = self.harvest_one(first, index, offset, harvest, flush);
            bits[(index >> 6) as usize & 7] |= one.wrapping_shl(index as u32 & 63);
            words |= 1u32.wrapping_shl((index >> 6) as u32);
        }
        let index = harvest.log.index(self.format.address(offset).as_u64());
        let mut harvested = 0;
        let mut left = words;
        while left != 0 {
            let word = left.trailing_zeros();
            let bits = bits[word as usize & 7];
            harvest
                .log
                .mark_word(index.wrapping_add(u64::from(word) << 6), bits);
            harvested += u64::from(bits.count_ones());
            left &= left - 1;
        }
        if harvested != 0 {
            let start = |word: u32| offset.wrapping_add(u64::from(word) << 18);
            let end = start(32 - words.leading_zeros()).min(offset.wrapping_add(count << 12));
            flush.cover(start(words.trailing_zeros()), end.wrapping_sub(1), true);
            *flush.value_mut() += harvested;
        }
    }

    /// Harvests a group of eight entries, counted from `first`: eight bits, those that were wanted.
    #[inline]
    fn harvest_eight(
        &self,
        first: Hpa,
        group: u64,
        offset: u64,
        harvest: Harvest<'_>,
        flush: &mut Flush<'_, M, u64>,
    ) -> u64 {
        let settled = harvest.wanted | self.format.accessed_bit() | self.format.dirty_bit();
        let entries = self.frames.load_eight(first.wrapping_add(group << 6));
        let index = group << 3;
        let all = entries.iter().fold(!0, |sum, entry| sum & entry);
        // Hardware has nothing left to write then, and other editors are out.
        if all & settled == settled && self.format.is_present(all) {
            for (n, entry) in (index..).zip(entries) {
                let at = first.wrapping_add(n << 3);
                self.frames.store(at, entry & !harvest.clear);
            }
            return 0xFF;
        }
        let mut some = (0..).zip(entries).fold(0u32, |some, (n, entry)| {
            some | u32::from(!entry & harvest.wanted == 0) << n
        });
        if entries.iter().fold(0, |sum, entry| sum | entry) & Self::SHARED != 0 {
            some = 0xFF;
        }
        let mut bits = 0;
        while some != 0 {
            let n = some.trailing_zeros();
            let one = self.harvest_one(first, index + u64::from(n), offset, harvest, flush);
            bits |= one.wrapping_shl(n);
            some &= some - 1;
        }
        bits
    }

    /// Harvests entry `index` from `first` on: 1 if it was wanted.
    #[inline]
    fn harvest_one(
        &self,
        first: Hpa,
        index: u64,
        offset: u64,
        harvest: Harvest<'_>,
        flush: &mut Flush<'_, M, u64>,
    ) -> u64 {
        let at = first.wrapping_add(index << 3);
        let entry = self.frames.load(at);
        if !(self.format.is_present(entry) && self.wash(at, entry, harvest)) {
            return 0;
        }
        if F::SIZED_PAGES {
            let (first, bytes) = self.extent(entry, 1, offset + (index << 12));
            let address = self.format.address(first).as_u64();
            harvest.log.mark_range(address, bytes >> 12);
            flush.cover(first, first | (bytes - 1), true);
        }
        1
    }

    /// The first offset and the size of the page that a leaf entry belongs to.
    #[inline]
    fn extent(&self, entry: u64, level: u8, offset: u64) -> (u64, u64) {
        let bytes = self.format.leaf(entry, level).bytes();
        (offset & !(bytes - 1), bytes)
    }

    /// Clears the bits if the entry is wanted. The caller excludes other editors.
    #[inline]
    fn wash(&self, at: Hpa, mut entry: u64, harvest: Harvest<'_>) -> bool {
        let settled = self.format.accessed_bit() | self.format.dirty_bit();
        while self.alone(entry) & harvest.wanted == harvest.wanted {
            let new = self.keep_shared(entry, self.alone(entry) & !harvest.clear);
            // With A and D set hardware has nothing left to write.
            if entry & settled == settled {
                self.frames.store(at, new);
                return true;
            }
            match self.frames.compare_exchange(at, entry, new) {
                Ok(_) => return true,
                Err(now) => entry = now,
            }
        }
        false
    }
}
