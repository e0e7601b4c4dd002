//! Who gets which part of guest memory while a kernel is loaded.

use core::ops::Range;

use alloc::vec::Vec;
use testudo_arch::{Gpa, GuestMemory};

use super::LoadError;
use crate::layout::{EBDA, LOW_RAM_LIMIT, MemoryRange, MemoryType};

/// The first page is the real-mode interrupt table and the BIOS data area.
const FIRST_FREE: u64 = 0x1000;

/// Usable memory, and what of it is taken.
pub(super) struct Space<'m, M: ?Sized> {
    memory: &'m M,
    map: &'m [MemoryRange],
    /// All memory of the machine.
    ram: u64,
    taken: Vec<Range<u64>>,
}

impl<'m, M: GuestMemory + ?Sized> Space<'m, M> {
    /// The usable memory of `map` without what is `taken` already, in a machine with `ram` bytes.
    pub(super) fn new(
        memory: &'m M,
        (map, ram): (&'m [MemoryRange], u64),
        taken: &[Range<u64>],
    ) -> Self {
        Self {
            memory,
            map,
            ram,
            taken: taken.to_vec(),
        }
    }

    pub(super) fn memory(&self) -> &'m M {
        self.memory
    }

    /// The memory map as the kernel is told.
    pub(super) fn map(&self) -> &'m [MemoryRange] {
        self.map
    }

    fn usable(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + use<'m, M> {
        self.map
            .iter()
            .filter(|range| range.kind == MemoryType::Usable)
            .map(|range| range.start.0.max(FIRST_FREE)..range.end())
            .filter(|range| !range.is_empty())
    }

    /// The end of usable memory below the windows of devices.
    pub(super) fn low_ram_end(&self) -> u64 {
        let ends = self.usable().map(|range| range.end.min(LOW_RAM_LIMIT));
        ends.max().unwrap_or(0)
    }

    /// Some taken range that `range` overlaps.
    fn conflict(&self, range: &Range<u64>) -> Option<&Range<u64>> {
        let overlaps = |taken: &&Range<u64>| taken.start < range.end && range.start < taken.end;
        self.taken.iter().find(overlaps)
    }

    fn take(&mut self, range: Range<u64>) -> Gpa {
        let start = Gpa(range.start);
        if !range.is_empty() {
            self.taken.push(range);
        }
        start
    }

    /// Takes exactly this range, for something that cannot be moved.
    pub(super) fn place_at(
        &mut self,
        what: &'static str,
        start: Gpa,
        len: u64,
    ) -> Result<(), LoadError> {
        let end = start.checked_add(len);
        let end = end.ok_or(LoadError::NotMemory { what, start, len })?.0;
        if !self
            .usable()
            .any(|usable| usable.start <= start.0 && end <= usable.end)
        {
            return Err(LoadError::NotMemory { what, start, len });
        }
        if self.conflict(&(start.0..end)).is_some() {
            return Err(LoadError::Overlap { what, start, len });
        }
        self.take(start.0..end);
        Ok(())
    }

    /// The lowest free place in `within`, aligned to a power of two.
    pub(super) fn find_low(&self, len: u64, align: u64, within: Range<u64>) -> Option<Gpa> {
        for usable in self.usable() {
            let limit = usable.end.min(within.end);
            let mut start = usable.start.max(within.start);
            // Every round passes one taken range for good, or ends.
            for _ in 0..=self.taken.len() {
                start = match start.checked_next_multiple_of(align) {
                    Some(start) if start.checked_add(len).is_some_and(|end| end <= limit) => start,
                    _ => break,
                };
                match self.conflict(&(start..start + len)) {
                    Some(taken) => start = taken.end,
                    None => return Some(Gpa(start)),
                }
            }
        }
        None
    }

    /// Takes the lowest free place in `within`.
    pub(super) fn place_from(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        within: Range<u64>,
    ) -> Result<Gpa, LoadError> {
        let start = self
            .find_low(len, align, within.clone())
            .ok_or_else(|| self.too_little(what, len, within))?;
        Ok(self.take(start.0..start.0 + len))
    }

    /// The error that nothing in `within` is free for `len` bytes.
    pub(super) fn too_little(&self, what: &'static str, len: u64, within: Range<u64>) -> LoadError {
        LoadError::TooLittleMemory {
            what,
            len,
            start: Gpa(within.start),
            end: Gpa(within.end),
            ram: self.ram,
        }
    }

    /// Takes a place in conventional memory, for the small structures of a protocol.
    pub(super) fn place_conventional(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
    ) -> Result<Gpa, LoadError> {
        self.place_from(what, len, align, 0..EBDA.0)
    }

    /// The highest free place in `within`, aligned to a power of two.
    pub(super) fn find_high(&self, len: u64, align: u64, within: Range<u64>) -> Option<Gpa> {
        for usable in self.usable().rev() {
            let floor = usable.start.max(within.start);
            let mut end = usable.end.min(within.end);
            // Every round passes one taken range for good, or ends.
            for _ in 0..=self.taken.len() {
                let start = match end.checked_sub(len) {
                    Some(start) if start - start % align >= floor => start - start % align,
                    _ => break,
                };
                match self.conflict(&(start..start + len)) {
                    Some(taken) => end = taken.start,
                    None => return Some(Gpa(start)),
                }
            }
        }
        None
    }

    /// Takes the highest free place below `limit`.
    pub(super) fn place_high(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        limit: u64,
    ) -> Result<Gpa, LoadError> {
        let start = self
            .find_high(len, align, 0..limit)
            .ok_or_else(|| self.too_little(what, len, 0..limit))?;
        Ok(self.take(start.0..start.0 + len))
    }

    /// Copies a part of a kernel and clears what lies behind it up to `len`.
    pub(super) fn write_padded(&self, start: Gpa, data: &[u8], len: u64) -> Result<(), LoadError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        self.memory.write(start, data)?;
        let mut done = data.len() as u64;
        while done < len {
            let part = (len - done).min(ZEROS.len() as u64);
            let gpa = start.wrapping_add(done);
            self.memory.write(gpa, &ZEROS[..part as usize])?;
            done += part;
        }
        Ok(())
    }
}
