//! Copies of a whole table, for snapshots.

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

use super::map::Spare;
use super::{EditError, PageTable};
use crate::format::{Format, Leaf};
use crate::lock::EditLock;

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// A table of its own that maps what this one maps, in frames of its own; `change` decides the
    /// flags of each page. For a copy-on-write snapshot, take the write right here, and from this
    /// table with [`Self::track_writes`] before.
    ///
    /// # Errors
    ///
    /// There are not enough frames. None is lost.
    pub fn duplicate<N: FrameAlloc + FrameMem>(
        &self,
        frames: N,
        change: impl Fn(Leaf<F::Flags>) -> F::Flags,
    ) -> Result<PageTable<F, N>, EditError> {
        let _editor = self.lock.exclusive();
        let levels = self.format.levels();
        let count = self.count_tables(self.root, levels);
        let mut spare = Spare::new(&frames, count)?;
        let root = self.copy_table(self.root, levels, 0, &mut spare, &frames, &change);
        drop(spare);
        Ok(PageTable {
            format: self.format.clone(),
            frames,
            root,
            lock: EditLock::new(),
        })
    }

    fn copy_table<N: FrameAlloc + FrameMem>(
        &self,
        from: Hpa,
        level: u8,
        first: u64,
        spare: &mut Spare<'_, N>,
        frames: &N,
        change: &impl Fn(Leaf<F::Flags>) -> F::Flags,
    ) -> Hpa {
        let to = spare.take();
        frames.fill(to, 512, self.format.absent(), 0);
        for index in 0..512u64 {
            let entry = self.frames.load(Hpa(from.0 | index << 3));
            if !self.format.is_present(entry) {
                continue;
            }
            let offset = first | index << crate::format::shift_of(level);
            let copy = if self.format.is_leaf(entry, level) {
                let leaf = self.slot(entry, level, offset);
                let flags = change(leaf);
                let valid = self.format.is_valid(flags);
                let flags = if valid { flags } else { leaf.flags };
                self.format.leaf_entry(leaf.frame, level, flags)
            } else {
                let (child, below) = self.format.child(entry, level);
                let table = self.copy_table(child, below, offset, spare, frames, change);
                self.format.table_entry(table, level)
            };
            frames.store(Hpa(to.0 | index << 3), copy);
        }
        to
    }
}
