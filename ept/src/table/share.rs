//! Pages that several addresses share: read-only for all of them, whatever else is edited.

use testudo_arch::{FrameAlloc, FrameMem, Hpa};

use super::PageTable;
use crate::Flush;
use crate::format::Format;

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// The bit by which a shared page is known: the second lowest one that hardware ignores.
    pub(super) const SHARED: u64 = {
        let rest = F::SOFTWARE & (F::SOFTWARE - 1);
        rest & rest.wrapping_neg()
    };

    /// The third one: the write right of a shared page, which it has once it is shared no more.
    const KEPT_WRITE: u64 = Self::SHARED << 1;

    /// A shared page's entry as it would be if the page were its only user's.
    #[inline]
    pub(super) fn alone(&self, entry: u64) -> u64 {
        if entry & Self::SHARED == 0 {
            return entry;
        }
        let rest = entry & !(Self::SHARED | Self::KEPT_WRITE);
        if entry & Self::KEPT_WRITE == 0 {
            rest
        } else {
            rest | self.format.write_bit()
        }
    }

    /// The entry for a page that is shared and would be `alone` otherwise.
    #[inline]
    fn shared(&self, alone: u64) -> u64 {
        let write = self.format.write_bit();
        let kept = if alone & write == 0 {
            0
        } else {
            Self::KEPT_WRITE
        };
        (alone & !write) | Self::SHARED | kept
    }

    /// An edit of a shared page neither ends the sharing nor gives the write right. `new` is made of
    /// what [`Self::alone`] says.
    #[inline]
    pub(super) fn keep_shared(&self, old: u64, new: u64) -> u64 {
        if old & Self::SHARED == 0 {
            new
        } else {
            self.shared(new & !Self::KEPT_WRITE)
        }
    }
}

/// A small page, as sharing sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SmallPage {
    frame: Hpa,
    shared: bool,
    /// Whether it may be written; if it is shared, once it is not.
    writable: bool,
}

impl<F: Format, M: FrameAlloc + FrameMem> PageTable<F, M> {
    /// A token of no edit yet, for those that add to one.
    pub fn no_edit(&self) -> Flush<'_, M> {
        self.token(())
    }

    /// Takes the write right from the 4 KiB page at `address`, which leads to `frame` and may be
    /// written: for good, whatever other edits say, until it is [thawed](Self::thaw_page). `false` if
    /// the page is not like that, or frozen already, or the token is another table's.
    pub fn freeze_page(&self, flush: &mut Flush<'_, M>, address: F::Input, frame: Hpa) -> bool {
        let old = SmallPage {
            frame,
            shared: false,
            writable: true,
        };
        self.replace_small(Some(flush), address, old, frame, true)
    }

    /// Leads a frozen page to another frame. It stays frozen. `false` if it is not frozen, or led
    /// elsewhere than to `old`, or was not to be written before it was frozen; or if `new` is no frame.
    pub fn redirect_page(
        &self,
        flush: &mut Flush<'_, M>,
        address: F::Input,
        old: Hpa,
        new: Hpa,
    ) -> bool {
        self.replace_small(Some(flush), address, Self::frozen(old), new, true)
    }

    /// Gives a frozen page its write right back; nothing is to be flushed for that. `false` as for
    /// [`Self::redirect_page`].
    pub fn thaw_page(&self, address: F::Input, frame: Hpa) -> bool {
        self.replace_small(None, address, Self::frozen(frame), frame, false)
    }

    fn frozen(frame: Hpa) -> SmallPage {
        SmallPage {
            frame,
            shared: true,
            writable: true,
        }
    }

    fn describe(&self, found: &crate::table::Found) -> Option<SmallPage> {
        let small = found.level == 1 && self.format.is_present(found.entry);
        (small && !self.is_sized(found)).then(|| SmallPage {
            frame: self.format.leaf(found.entry, 1).frame,
            shared: found.entry & Self::SHARED != 0,
            writable: self.alone(found.entry) & self.format.write_bit() != 0,
        })
    }

    /// Replaces a small page that still is as `old` says by one at `frame`: shared, so without the
    /// write right, or the writer's own. `false` if it was not as expected.
    fn replace_small(
        &self,
        flush: Option<&mut Flush<'_, M>>,
        address: F::Input,
        old: SmallPage,
        frame: Hpa,
        shared: bool,
    ) -> bool {
        // Another table's token would have the wrong translations dropped.
        let foreign = flush.as_ref().is_some_and(|flush| !flush.is_of(self.root));
        if foreign || frame.0 & !self.format.address_mask() != 0 {
            return false;
        }
        let Some(offset) = self.format.offset(address) else {
            return false;
        };
        let _editor = self.lock.shared();
        loop {
            let found = self.find(offset);
            if self.describe(&found) != Some(old) {
                return false;
            }
            let alone = self.alone(found.entry) & !self.format.address_mask();
            let mut entry = alone | frame.0;
            if shared {
                entry = self.shared(entry);
            }
            let swapped = self.frames.compare_exchange(found.at, found.entry, entry);
            if swapped.is_ok() {
                if let Some(flush) = flush {
                    flush.cover(offset & !0xFFF, offset | 0xFFF, true);
                }
                return true;
            }
        }
    }
}
