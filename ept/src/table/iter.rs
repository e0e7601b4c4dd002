//! Iteration over what is mapped.

use testudo_arch::{FrameAlloc, FrameMem};

use super::{EditError, PageTable};
use crate::format::{Format, Leaf, shift_of};

/// The pages of a range in ascending order, found while others edit.
#[derive(Debug)]
pub struct Leaves<'t, F: Format, M: FrameAlloc + FrameMem> {
    table: &'t PageTable<F, M>,
    offset: u64,
    end: u64,
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// The pages that are mapped in the range, each with the address at which it begins (which may
    /// lie before `start` for the first one).
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn leaves(&self, start: F::Input, len: u64) -> Result<Leaves<'_, F, M>, EditError> {
        let offset = self.range(start, len)?;
        Ok(Leaves {
            table: self,
            offset,
            end: offset + len,
        })
    }
}

impl<F: Format, M: FrameAlloc + FrameMem> Iterator for Leaves<'_, F, M> {
    type Item = (F::Input, Leaf<F::Flags>);

    fn next(&mut self) -> Option<Self::Item> {
        let format = &self.table.format;
        while self.offset < self.end {
            let found = self.table.find(self.offset);
            if !format.is_present(found.entry) {
                let hole = (self.offset | ((1 << shift_of(found.level)) - 1)) + 1;
                self.offset = self.table.next_mapped(hole, self.end).unwrap_or(self.end);
                continue;
            }
            let leaf = format.leaf(found.entry, found.level);
            let first = self.offset & !(leaf.bytes() - 1);
            self.offset = first + leaf.bytes();
            return Some((format.address(first), leaf));
        }
        None
    }
}
