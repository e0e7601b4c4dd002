//! Intel's sub-page write permissions (SDM vol. 3C, 31.3.4): which of the 32 pieces of 128 bytes of a
//! page may be written.
//!
//! A 4 KiB page that EPT does not let the guest write, and whose entry has
//! [`EptFlags::SUB_PAGE_WRITE`](crate::format::ept::EptFlags::SUB_PAGE_WRITE), asks this table about
//! the piece that a write falls into. The table has four levels like EPT, but its lowest entries are
//! bits, not pages.

use arrayvec::ArrayVec;
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa};

use crate::table::place;
use crate::{EditError, Flush, Invalidate, Invalidation};

/// An entry that refers to a table.
const VALID: u64 = 1 << 0;
const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
const LEVELS: u8 = 4;

/// A sub-page permission table. Its root goes into the VMCS field of that name.
#[derive(Debug)]
pub struct SubPageTable<M: FrameAlloc + FrameMem> {
    frames: M,
    root: Hpa,
}

/// The entry of the lowest level: bit `2 * n` allows writes to piece `n`, the odd bits are reserved.
#[inline]
fn spread(pieces: u32) -> u64 {
    (0..32).fold(0, |bits, n| bits | u64::from(pieces >> n & 1) << (2 * n))
}

#[inline]
fn gather(entry: u64) -> u32 {
    (0..32).fold(0, |pieces, n| pieces | ((entry >> (2 * n) & 1) as u32) << n)
}

impl<M: FrameAlloc + FrameMem> SubPageTable<M> {
    /// A table that allows nothing, or `None` if there is no frame for its root.
    pub fn new(frames: M) -> Option<Self> {
        let root = frames.alloc()?;
        Some(Self { frames, root })
    }

    /// The root frame.
    #[inline]
    pub fn root(&self) -> Hpa {
        self.root
    }

    /// Which pieces of the page that holds `gpa` may be written, bit 0 for the first one; `None` if
    /// the table does not reach there, which hardware calls a miss.
    pub fn pieces(&self, gpa: Gpa) -> Option<u32> {
        let mut table = self.root;
        for level in (2..=LEVELS).rev() {
            let entry = self.frames.load(place(table, level, gpa.0));
            if entry & VALID == 0 {
                return None;
            }
            table = Hpa(entry & FRAME);
        }
        Some(gather(self.frames.load(place(table, 1, gpa.0))))
    }

    /// Sets which pieces of the page that holds `gpa` may be written, in parallel with others that do
    /// the same. What was allowed before comes out; hardware caches it together with EPT.
    ///
    /// # Errors
    ///
    /// The address has more than 48 bits, or there is no frame for a table: nothing has changed.
    pub fn set_pieces(&self, gpa: Gpa, pieces: u32) -> Result<Flush<'_, M, u32>, EditError> {
        if gpa.0 >> 48 != 0 {
            return Err(EditError::OutOfRange(gpa.0));
        }
        let mut spare = ArrayVec::<Hpa, 3>::new();
        let result = self.reach(gpa, &mut spare);
        for table in spare {
            self.frames.free(table);
        }
        let at = result?;
        let new = spread(pieces);
        let mut old = self.frames.load(at);
        while let Err(now) = self.frames.compare_exchange(at, old, new) {
            old = now;
        }
        let mut flush = Flush::new(&self.frames, self.root, 0xF << 52, 0, gather(old));
        if old & !new != 0 {
            flush.cover(gpa.0 & !0xFFF, gpa.0 | 0xFFF, true);
        }
        Ok(flush)
    }

    /// The place of the lowest entry, with the tables above it.
    fn reach(&self, gpa: Gpa, spare: &mut ArrayVec<Hpa, 3>) -> Result<Hpa, EditError> {
        let (mut table, mut level) = (self.root, LEVELS);
        while level > 1 {
            let at = place(table, level, gpa.0);
            let entry = self.frames.load(at);
            if entry & VALID != 0 {
                table = Hpa(entry & FRAME);
                level -= 1;
                continue;
            }
            // All that are missing, so that a lack of frames leaves nothing behind.
            while spare.len() < usize::from(level - 1) {
                let frame = self.frames.alloc().ok_or(EditError::OutOfFrames)?;
                spare.push(frame);
            }
            if let Some(new) = spare.pop()
                && self
                    .frames
                    .compare_exchange(at, entry, new.0 | VALID)
                    .is_err()
            {
                spare.push(new);
            }
        }
        Ok(place(table, 1, gpa.0))
    }

    /// Frees the table once hardware has forgotten it.
    ///
    /// # Errors
    ///
    /// The hardware's error with the table, which is as before.
    pub fn destroy<I: Invalidate + ?Sized>(self, hardware: &mut I) -> Result<M, (Self, I::Error)> {
        let everything = Invalidation {
            root: self.root,
            first: 0,
            last: (1 << 48) - 1,
            leaves_only: false,
        };
        if let Err(error) = hardware.invalidate(&everything) {
            return Err((self, error));
        }
        self.free(self.root, LEVELS);
        Ok(self.frames)
    }

    fn free(&self, table: Hpa, level: u8) {
        if level > 1 {
            for index in 0..512 {
                let entry = self.frames.load(Hpa(table.0 | index << 3));
                if entry & VALID != 0 {
                    self.free(Hpa(entry & FRAME), level - 1);
                }
            }
        }
        self.frames.free(table);
    }
}

#[cfg(all(test, feature = "alloc"))]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use crate::FramePool;

    struct NoHardware;

    // SAFETY: no hardware and no other thread uses the tables of these tests.
    unsafe impl Invalidate for NoHardware {
        type Error = core::convert::Infallible;
        fn invalidate(&mut self, _: &Invalidation) -> Result<(), Self::Error> {
            Ok(())
        }
    }

    #[test]
    fn pieces_are_every_other_bit() {
        assert_eq!(spread(1 << 31 | 1), 1 << 62 | 1);
        for pieces in [0, 1, 0x8000_0001, 0xDEAD_BEEF, u32::MAX] {
            assert_eq!(spread(pieces) & 0xAAAA_AAAA_AAAA_AAAA, 0);
            assert_eq!(gather(spread(pieces)), pieces);
        }
    }

    #[test]
    fn only_a_loss_of_rights_must_be_flushed() {
        let pool = FramePool::new(16);
        let table = SubPageTable::new(&pool).unwrap();
        let gpa = Gpa(0x1234_5678);
        assert_eq!(table.pieces(gpa), None);
        let first = table.set_pieces(gpa, 0b11).unwrap();
        assert_eq!(first.scope(), None);
        assert_eq!(first.discharge(&mut NoHardware), 0);
        assert_eq!(
            (table.pieces(gpa), table.pieces(Gpa(0x1234_6000))),
            (Some(3), Some(0))
        );
        let less = table.set_pieces(gpa, 0b01).unwrap();
        let scope = less.scope().unwrap();
        assert_eq!((scope.first, scope.last), (0x1234_5000, 0x1234_5FFF));
        assert_eq!(less.discharge(&mut NoHardware), 3);
        assert_eq!(pool.free_frames(), 12);
        table.destroy(&mut NoHardware).unwrap();
        assert_eq!(pool.free_frames(), 16);
    }

    #[test]
    fn a_lack_of_frames_leaves_nothing_behind() {
        let pool = FramePool::new(3);
        let table = SubPageTable::new(&pool).unwrap();
        let result = table.set_pieces(Gpa(0), 1).map(|_| ());
        assert_eq!(result, Err(EditError::OutOfFrames));
        assert_eq!((pool.free_frames(), table.pieces(Gpa(0))), (2, None));
        let result = table.set_pieces(Gpa(1 << 48), 1).map(|_| ());
        assert_eq!(result, Err(EditError::OutOfRange(1 << 48)));
    }
}
