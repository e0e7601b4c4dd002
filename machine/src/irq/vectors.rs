//! A set of interrupt vectors: IRR, ISR, TMR.

/// A set of the 256 interrupt vectors, as in the registers IRR, ISR and TMR
/// (SDM vol. 3A, 11.8.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet {
    words: [u64; 4],
}

impl VectorSet {
    /// The empty set.
    pub const EMPTY: Self = Self { words: [0; 4] };

    /// Adds `vector`.
    #[inline]
    pub const fn insert(&mut self, vector: u8) {
        self.words[(vector >> 6) as usize] |= 1 << (vector & 63);
    }

    /// Removes `vector`.
    #[inline]
    pub const fn remove(&mut self, vector: u8) {
        self.words[(vector >> 6) as usize] &= !(1 << (vector & 63));
    }

    /// Whether `vector` is in the set.
    #[inline]
    pub const fn contains(&self, vector: u8) -> bool {
        self.words[(vector >> 6) as usize] >> (vector & 63) & 1 != 0
    }

    /// Whether the set is empty.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.words[0] | self.words[1] | self.words[2] | self.words[3] == 0
    }

    /// The highest vector in the set, which has the highest priority.
    #[inline]
    pub const fn highest(&self) -> Option<u8> {
        let mut i = 4;
        while i > 0 {
            i -= 1;
            if self.words[i] != 0 {
                return Some((i as u8) << 6 | (63 - self.words[i].leading_zeros() as u8));
            }
        }
        None
    }

    /// The vectors 32 × `index` to 32 × `index` + 31 as a register shows them. `index` is taken
    /// modulo 8.
    #[inline]
    pub const fn word(&self, index: usize) -> u32 {
        (self.words[index / 2 % 4] >> (index % 2 * 32)) as u32
    }

    /// Adds the vectors of a register, as [`word`](Self::word) counts them.
    #[inline]
    pub const fn insert_word(&mut self, index: usize, vectors: u32) {
        self.words[index / 2 % 4] |= (vectors as u64) << (index % 2 * 32);
    }

    /// Of the `vectors` of a register, keeps exactly those in `chosen`; others stay as they are.
    #[inline]
    pub const fn replace_word(&mut self, index: usize, vectors: u32, chosen: u32) {
        let shift = index % 2 * 32;
        let word = &mut self.words[index / 2 % 4];
        *word = *word & !((vectors as u64) << shift) | ((chosen & vectors) as u64) << shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(changes: std::vec::Vec<(u8, bool)>, extra: u32, index in 0usize..8) {
            let (mut set, mut model) = (VectorSet::EMPTY, BTreeSet::new());
            for (vector, add) in changes {
                if add {
                    set.insert(vector);
                    model.insert(vector);
                } else {
                    set.remove(vector);
                    model.remove(&vector);
                }
                prop_assert_eq!(set.contains(vector), add);
                prop_assert_eq!(set.highest(), model.last().copied());
                prop_assert_eq!(set.is_empty(), model.is_empty());
            }
            set.insert_word(index, extra);
            for bit in 0..32u8 {
                let vector = index as u8 * 32 + bit;
                let expected = model.contains(&vector) || extra >> bit & 1 != 0;
                prop_assert_eq!(set.contains(vector), expected);
                prop_assert_eq!(set.word(index) >> bit & 1 != 0, expected);
            }
        }
    }
}
