//! The registers of a local APIC as a page of memory: what software emulates, and what a processor
//! that virtualizes the APIC reads and writes itself (Intel SDM vol. 3A, table 11-1, and vol. 3C,
//! 32.1; AMD APM vol. 2, 15.29.3).
//!
//! ```
//! use testudo_arch::apic::{ApicPage, VectorRegister};
//!
//! let page = ApicPage::new();
//! page.vectors(VectorRegister::Irr).insert(0x41);
//! assert_eq!(page.get(0x220), 1 << 1); // vectors 0x40 to 0x5F
//! assert_eq!(page.vectors(VectorRegister::Irr).highest(), Some(0x41));
//! ```

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

/// The registers of a local APIC: 32 bits at each multiple of 16.
///
/// One processor or thread writes a page at a time, or the processor whose guest it belongs to; the
/// words are atomic so that sharing it needs no more than that.
#[repr(C, align(4096))]
pub struct ApicPage([AtomicU32; 1024]);

const _: () = assert!(size_of::<ApicPage>() == 4096);

/// The offset of the task-priority register.
const TASK_PRIORITY: u16 = 0x80;

impl ApicPage {
    /// A page with all registers 0.
    pub const fn new() -> Self {
        Self([const { AtomicU32::new(0) }; 1024])
    }

    #[inline]
    fn word(&self, offset: u16) -> &AtomicU32 {
        &self.0[usize::from(offset & 0xFFF) / 4]
    }

    /// The register at this offset in the page. Bits beyond the page's do not count.
    #[inline]
    pub fn get(&self, offset: u16) -> u32 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Sets the register at this offset in the page. Bits beyond the page's do not count.
    #[inline]
    pub fn set(&self, offset: u16, value: u32) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    /// The task-priority class: what CR8 reads.
    #[inline]
    pub fn task_priority(&self) -> u8 {
        (self.get(TASK_PRIORITY) >> 4) as u8 & 0xF
    }

    /// Sets the task-priority class (its low four bits count), the sub-class being 0.
    #[inline]
    pub fn set_task_priority(&self, class: u8) {
        self.set(TASK_PRIORITY, u32::from(class & 0xF) << 4);
    }

    /// One of the registers of 256 bits.
    #[inline]
    pub const fn vectors(&self, register: VectorRegister) -> VectorSet<'_> {
        VectorSet {
            page: self,
            register,
        }
    }

    /// Sets all registers to 0.
    pub fn clear(&self) {
        for word in &self.0 {
            word.store(0, Ordering::Relaxed);
        }
    }
}

impl Default for ApicPage {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ApicPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registers = (0..0x400).step_by(16).map(|at| (at, self.get(at)));
        f.debug_map()
            .entries(registers.filter(|(_, value)| *value != 0))
            .finish()
    }
}

/// The registers with a bit for each vector, by their offset in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum VectorRegister {
    /// What is in service.
    Isr = 0x100,
    /// Of what was accepted last: whether it stands for a level.
    Tmr = 0x180,
    /// What is requested.
    Irr = 0x200,
}

/// A set of the 256 interrupt vectors in a page: IRR, ISR or TMR (Intel SDM vol. 3A, 11.8.4).
#[derive(Clone, Copy)]
pub struct VectorSet<'a> {
    page: &'a ApicPage,
    register: VectorRegister,
}

impl VectorSet<'_> {
    /// The offset of a register. `index` is taken modulo 8.
    #[inline]
    const fn at(self, index: usize) -> u16 {
        self.register as u16 + ((index as u16 & 7) << 4)
    }

    /// Adds `vector`.
    #[inline]
    pub fn insert(self, vector: u8) {
        self.insert_word(usize::from(vector >> 5), 1 << (vector & 31));
    }

    /// Removes `vector`.
    #[inline]
    pub fn remove(self, vector: u8) {
        let at = self.at(usize::from(vector >> 5));
        self.page.set(at, self.page.get(at) & !(1 << (vector & 31)));
    }

    /// Whether `vector` is in the set.
    #[inline]
    pub fn contains(self, vector: u8) -> bool {
        self.word(usize::from(vector >> 5)) >> (vector & 31) & 1 != 0
    }

    /// Whether the set is empty.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.highest().is_none()
    }

    /// The highest vector in the set, which has the highest priority.
    #[inline]
    pub fn highest(self) -> Option<u8> {
        let mut index = 8;
        while index > 0 {
            index -= 1;
            let word = self.word(index);
            if word != 0 {
                return Some((index as u8) << 5 | (31 - word.leading_zeros() as u8));
            }
        }
        None
    }

    /// The vectors 32 × `index` to 32 × `index` + 31. `index` is taken modulo 8.
    #[inline]
    pub fn word(self, index: usize) -> u32 {
        self.page.get(self.at(index))
    }

    /// Adds the vectors of a register, as [`word`](Self::word) counts them.
    #[inline]
    pub fn insert_word(self, index: usize, vectors: u32) {
        let at = self.at(index);
        self.page.set(at, self.page.get(at) | vectors);
    }

    /// Of the `vectors` of a register, keeps exactly those in `chosen`; others stay as they are.
    #[inline]
    pub fn replace_word(self, index: usize, vectors: u32, chosen: u32) {
        let at = self.at(index);
        let others = self.page.get(at) & !vectors;
        self.page.set(at, others | chosen & vectors);
    }

    /// The whole set: vectors 0 to 63 in the first word.
    #[inline]
    pub fn words(self) -> [u64; 4] {
        core::array::from_fn(|i| {
            u64::from(self.word(2 * i)) | u64::from(self.word(2 * i + 1)) << 32
        })
    }
}

impl fmt::Debug for VectorSet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = (0..=u8::MAX).filter(|vector| self.contains(*vector));
        f.debug_set().entries(all).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn task_priority_is_the_upper_half_of_its_register() {
        let page = ApicPage::new();
        page.set_task_priority(0xF9);
        assert_eq!(page.get(0x80), 0x90);
        assert_eq!(page.task_priority(), 9);
        page.set(0x80, 0x4F);
        assert_eq!(page.task_priority(), 4);
    }

    #[test]
    fn only_the_offset_in_the_page_counts() {
        let page = ApicPage::new();
        page.set(0xF3F0, 7);
        assert_eq!(page.get(0x3F0), 7);
        assert_eq!(std::format!("{page:?}"), "{1008: 7}");
        page.clear();
        assert_eq!(page.get(0x3F0), 0);
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(changes: std::vec::Vec<(u8, bool)>, extra: u32, index in 0usize..8) {
            let page = ApicPage::new();
            let (set, mut model) = (page.vectors(VectorRegister::Isr), BTreeSet::new());
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
                prop_assert_eq!(set.words()[index / 2] >> (index % 2 * 32 + usize::from(bit)) & 1 != 0, expected);
            }
            let empty = [VectorRegister::Irr, VectorRegister::Tmr].map(|r| page.vectors(r).is_empty());
            prop_assert_eq!(empty, [true, true]);
        }
    }
}
