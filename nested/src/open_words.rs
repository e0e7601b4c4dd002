//! Joining a permission bitmap of L0's with one of L1's, word by word where it matters.
//!
//! A bitmap of some kilobytes is not joined at every entry. Where L0's own map intercepts everything,
//! which is nearly everywhere, L1's cannot add anything; so only the few words in which L0 leaves
//! something to its guest are looked up in L1's map. They are read anew at every entry: L1 owes
//! nobody a word when it changes a bit there, and a bit that was missed would be an access that L1
//! does not see.
//!
//! An L0 that leaves nearly everything to its guest, as one below a whole machine does, has long runs
//! of such words. Where L1's map lies in memory is then looked up once for each run.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use testudo_arch::{Gpa, GuestMemory};

/// From how many words on a run is looked up as one.
const LONG: usize = 8;

/// The words in which L0's map leaves something to its guest, and what L0 has there.
#[derive(Clone, Debug)]
pub(crate) enum OpenWords {
    /// One by one.
    Few(Vec<(u16, u64)>),
    /// There are at least [`LONG`] that follow one another.
    Runs(Vec<Run>),
}

/// Words that follow one another.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    first: u16,
    l0: Vec<u64>,
}

impl OpenWords {
    /// The open words of L0's map, given as its bytes.
    pub(crate) fn of(l0: &[u8]) -> Self {
        let words: Vec<u64> = l0
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect();
        let mut runs = Vec::new();
        let mut first = 0;
        for run in words.chunk_by(|a, b| (*a == u64::MAX) == (*b == u64::MAX)) {
            if run[0] != u64::MAX {
                runs.push(Run {
                    first: first as u16,
                    l0: run.to_vec(),
                });
            }
            first += run.len();
        }
        if runs.iter().any(|run| run.l0.len() >= LONG) {
            return Self::Runs(runs);
        }
        let words = |run: &Run| (run.first..).zip(run.l0.clone());
        Self::Few(runs.iter().flat_map(words).collect())
    }

    /// Whether L0's map intercepts everything, so that nobody's can add to it.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Few(words) if words.is_empty())
    }

    /// Makes `map`, which began as L0's, intercept what L1's map at `l1` intercepts too. Says
    /// whether it changed.
    ///
    /// What is not memory reads as ones, as on the bus: everything there is intercepted.
    #[inline]
    pub(crate) fn merge(&self, map: &mut [u8], memory: &impl GuestMemory, l1: Gpa) -> bool {
        let map = map.as_chunks_mut().0;
        let words = match self {
            Self::Few(words) => words,
            Self::Runs(runs) => return merge_runs(runs, map, memory, l1),
        };
        let mut changed = false;
        for &(index, l0) in words {
            let at = l1.wrapping_add(u64::from(index) * 8);
            let l1 = memory.load_u64(at).unwrap_or(u64::MAX);
            if let Some(word) = map.get_mut(usize::from(index)) {
                changed |= join(word, l0, l1);
            }
        }
        changed
    }
}

/// Apart, so that the loop over a few words stays what it is.
#[inline(never)]
fn merge_runs(runs: &[Run], map: &mut [[u8; 8]], memory: &impl GuestMemory, l1: Gpa) -> bool {
    let mut changed = false;
    for run in runs {
        changed |= run.merge(map, memory, l1);
    }
    changed
}

impl Run {
    fn merge(&self, map: &mut [[u8; 8]], memory: &impl GuestMemory, l1: Gpa) -> bool {
        let at = l1.wrapping_add(u64::from(self.first) * 8);
        let map = map.get_mut(usize::from(self.first)..).unwrap_or(&mut []);
        let words = map.iter_mut().zip(&self.l0);
        let mut changed = false;
        if let Some(theirs) = memory.words(at, self.l0.len()) {
            for ((word, &l0), l1) in words.zip(theirs) {
                changed |= join(word, l0, l1.load(Ordering::Acquire));
            }
        } else {
            for ((word, &l0), skip) in words.zip((0..).step_by(8)) {
                let l1 = memory.load_u64(at.wrapping_add(skip));
                changed |= join(word, l0, l1.unwrap_or(u64::MAX));
            }
        }
        changed
    }
}

/// Makes a word what both intercept; says whether it changed.
#[inline]
fn join(word: &mut [u8; 8], l0: u64, l1: u64) -> bool {
    let joined = (l0 | l1).to_le_bytes();
    let changed = *word != joined;
    *word = joined;
    changed
}

#[cfg(test)]
#[allow(unsafe_code, reason = "guest memory that is mapped")]
mod tests {
    use super::*;
    use crate::test_memory::Memory;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::vec::Vec;
    use testudo_arch::memory::GuestRam;

    const L1_MAP: Gpa = Gpa(0x3000);
    const WORDS: usize = 64;

    #[repr(align(4096))]
    struct Page([u8; 4096]);

    /// L0's maps have open words one by one and in runs; zero and all ones are frequent.
    fn a_map() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
        let run = (word, 1..20usize).prop_map(|(word, len)| std::vec![word; len]);
        prop::collection::vec(run, WORDS).prop_map(|runs| {
            let mut words = runs.concat();
            words.truncate(WORDS);
            words
        })
    }

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    proptest! {
        #[test]
        fn runs_are_joined_word_by_word(l0 in a_map(), l1 in [a_map(), a_map()], in_pieces: bool) {
            let open = OpenWords::of(&bytes(&l0));
            prop_assert_eq!(open.is_empty(), l0.iter().all(|word| *word == u64::MAX));
            let mut page = Box::new(Page([0; 4096]));
            let (pieces, mut whole) = (Memory::new(), GuestRam::new());
            // SAFETY: the page outlives `whole`, through which alone it is accessed.
            unsafe { whole.add(L1_MAP, page.0.as_mut_ptr(), 4096, true) }.unwrap();
            let mut merged = bytes(&l0);
            for l1 in l1 {
                pieces.write(L1_MAP, &bytes(&l1)).unwrap();
                whole.write(L1_MAP, &bytes(&l1)).unwrap();
                let before = merged.clone();
                let changed = if in_pieces {
                    open.merge(&mut merged, &pieces, L1_MAP)
                } else {
                    open.merge(&mut merged, &whole, L1_MAP)
                };
                prop_assert_eq!(changed, before != merged);
                let both: Vec<u64> = l0.iter().zip(&l1).map(|(l0, l1)| l0 | l1).collect();
                prop_assert_eq!(&merged, &bytes(&both));
            }
        }
    }

    #[test]
    fn a_run_that_is_not_memory_is_intercepted() {
        let mut map = std::vec![0; 8 * WORDS];
        let open = OpenWords::of(&map);
        // The second half of the map is behind the end of memory.
        let at = Gpa((Memory::SIZE - 4 * WORDS) as u64);
        assert!(open.merge(&mut map, &Memory::new(), at));
        assert!(map[..4 * WORDS].iter().all(|byte| *byte == 0));
        assert!(map[4 * WORDS..].iter().all(|byte| *byte == 0xFF));
    }
}
