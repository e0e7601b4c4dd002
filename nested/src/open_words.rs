//! Joining a permission bitmap of L0's with one of L1's, word by word where it matters.
//!
//! A bitmap of some kilobytes is not joined at every entry. Where L0's own map intercepts everything,
//! which is nearly everywhere, L1's cannot add anything; so only the few words in which L0 leaves
//! something to its guest are looked up in L1's map. They are read anew at every entry: L1 owes
//! nobody a word when it changes a bit there, and a bit that was missed would be an access that L1
//! does not see.

use alloc::vec::Vec;

use testudo_arch::{Gpa, GuestMemory};

/// The words in which L0's map leaves something to its guest, and what L0 has there.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenWords(Vec<(u16, u64)>);

impl OpenWords {
    /// The open words of L0's map, given as its bytes.
    pub(crate) fn of(l0: &[u8]) -> Self {
        let words = l0
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes));
        let open = words.enumerate().filter(|(_, word)| *word != u64::MAX);
        Self(open.map(|(index, word)| (index as u16, word)).collect())
    }

    /// Whether L0's map intercepts everything, so that nobody's can add to it.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes `map`, which began as L0's, intercept what L1's map at `l1` intercepts too. Says
    /// whether it changed.
    ///
    /// What is not memory reads as ones, as on the bus: everything there is intercepted.
    #[inline]
    pub(crate) fn merge(&self, map: &mut [u8], memory: &impl GuestMemory, l1: Gpa) -> bool {
        let mut changed = false;
        for &(index, l0) in &self.0 {
            let at = l1.wrapping_add(u64::from(index) * 8);
            let merged = (l0 | memory.load_u64(at).unwrap_or(u64::MAX)).to_le_bytes();
            if let Some(word) = map.as_chunks_mut().0.get_mut(usize::from(index)) {
                changed |= *word != merged;
                *word = merged;
            }
        }
        changed
    }
}
