//! Instructions that exited, remembered: for processors that do not tell their length.

use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use testudo_arch::{Gpa, GuestMemory};
use testudo_ept::walk::GuestTranslation;

/// What decides which bytes the processor fetches at an address in 64-bit mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FetchKey {
    pub(crate) rip: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
}

/// The most words that an instruction hangs on: five levels of tables, and its bytes.
const MAX_WORDS: usize = 7;

/// The words that nearly all hang on at most: four levels of tables, and one of code.
const FEW_WORDS: usize = 5;

/// A word of memory, and what it must hold.
type Word<'m> = (&'m AtomicU64, u64);

/// Stands for a word where there are fewer: it always holds what it must.
static NO_WORD: AtomicU64 = AtomicU64::new(0);

/// How many instructions are remembered: a guest that halts, sets its timer and ends interrupts in turn,
/// or enters a guest of its own, comes back to a handful.
const SLOTS: usize = 16;

/// Instructions with their lengths, each with every word of memory that says so: the table entries on
/// the way to it, and its bytes.
///
/// A hit is not an assumption: all these words are read and compared again, which takes a fraction
/// of the instructions that a walk and decoding take. If they are the same, so is the result.
#[derive(Clone, Debug)]
pub(crate) struct CodeCache<'m>([Known<'m>; SLOTS]);

#[derive(Clone, Debug)]
struct Known<'m> {
    key: FetchKey,
    /// As many as there can be, so that they are compared without being counted.
    words: [Word<'m>; MAX_WORDS],
    has_many: bool,
    /// Zero if nothing is remembered.
    length: u8,
}

impl Default for CodeCache<'_> {
    fn default() -> Self {
        Self([const { Known::NOTHING }; SLOTS])
    }
}

/// The place of an instruction: neighbours get different ones, and so do those that are alike in two
/// pages.
#[inline]
fn slot(key: &FetchKey) -> usize {
    (key.rip ^ key.rip >> 4) as usize % SLOTS
}

impl Known<'_> {
    const NOTHING: Self = Self {
        key: FetchKey {
            rip: 0,
            cr3: 0,
            cr4: 0,
        },
        words: [(&NO_WORD, 0); MAX_WORDS],
        has_many: false,
        length: 0,
    };
}

impl<'m> CodeCache<'m> {
    /// The length of the instruction, if it is remembered and nothing has changed.
    #[inline]
    pub(crate) fn length(&self, key: &FetchKey) -> Option<u8> {
        let known = &self.0[slot(key)];
        let same = |&(word, value): &Word<'_>| word.load(Ordering::Relaxed) == value;
        let (few, more) = known.words.split_at(FEW_WORDS);
        let unchanged = known.length != 0
            && known.key == *key
            && few.iter().all(same)
            && (!known.has_many || more.iter().all(same));
        unchanged.then_some(known.length)
    }

    /// Remembers an instruction that `walk` found, whose bytes `code` are all in that page.
    pub(crate) fn remember<M: GuestMemory>(
        &mut self,
        memory: &'m M,
        key: FetchKey,
        walk: &GuestTranslation,
        code: &[u8],
    ) {
        let known = &mut self.0[slot(&key)];
        known.length = 0;
        let mut words = ArrayVec::<Word<'_>, MAX_WORDS>::new();
        let length = code.len() as u8;
        let first = walk.gpa.0 & !7;
        let last = walk.gpa.0.wrapping_add(u64::from(length).saturating_sub(1)) & !7;
        for step in &walk.steps {
            let Some(word) = memory.word(step.at) else {
                return;
            };
            words.push((word, step.entry));
        }
        // Two words hold nine bytes wherever these begin, and no frequent instruction has more.
        if length == 0 || length > 9 {
            return;
        }
        let mut bytes = [0; 16];
        for (index, gpa) in [first, last].into_iter().enumerate() {
            // Short instructions mostly lie in one word.
            if index == 1 && last == first {
                break;
            }
            let Some(word) = memory.word(Gpa(gpa)) else {
                return;
            };
            let value = word.load(Ordering::Relaxed);
            words.push((word, value));
            bytes[8 * index..][..8].copy_from_slice(&value.to_le_bytes());
        }
        // Another vCPU may have changed the code since it was decoded.
        let skip = (walk.gpa.0 & 7) as usize;
        if bytes.get(skip..skip + code.len()) == Some(code) {
            *known = Known {
                key,
                has_many: words.len() > FEW_WORDS,
                length,
                ..Known::NOTHING
            };
            known.words[..words.len()].copy_from_slice(&words);
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code, reason = "guest memory over the test's own")]
mod tests {
    use super::*;
    use std::vec;
    use testudo_arch::Gva;
    use testudo_arch::memory::GuestRam;
    use testudo_ept::walk::{Access, PagingState, walk};

    #[test]
    fn a_hit_needs_every_entry_and_byte_unchanged() {
        let mut bytes = vec![0u64; 0x1000];
        let mut ram = GuestRam::new();
        // SAFETY: `bytes` outlives `ram`, which alone uses it.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), 0x8000, true) }.unwrap();
        for (at, entry) in [
            (0x1000, 0x2027),
            (0x2000, 0x3027),
            (0x3000, 0x4027),
            (0x4008, 0x5027),
        ] {
            ram.store_u64(Gpa(at), entry).unwrap();
        }
        ram.write(Gpa(0x5010), &[0x0F, 0xA2, 0xC3, 0]).unwrap();
        let key = FetchKey {
            rip: 0x1010,
            cr3: 0x1000,
            cr4: 0x20,
        };
        let state = PagingState {
            cr0: 1 << 31,
            cr3: 0x1000,
            cr4: 0x20,
            efer: 0x500,
            ..PagingState::default()
        };
        let found = walk(&ram, &state, Gva(key.rip), Access::FETCH).unwrap();
        let mut cache = CodeCache::default();
        assert_eq!(cache.length(&key), None);
        cache.remember(&ram, key, &found, &[0x0F, 0xA2]);
        assert_eq!(cache.length(&key), Some(2));
        assert_eq!(cache.length(&FetchKey { rip: 0x1011, ..key }), None);
        assert_eq!(cache.length(&FetchKey { cr3: 0x2000, ..key }), None);
        for (at, value) in [(0x1000, 0x2067), (0x4008, 0x6027), (0x5010, 0xA2_0F66)] {
            let old = ram.load_u64(Gpa(at)).unwrap();
            ram.store_u64(Gpa(at), value).unwrap();
            assert_eq!(cache.length(&key), None, "{at:#x}");
            ram.store_u64(Gpa(at), old).unwrap();
            assert_eq!(cache.length(&key), Some(2));
        }
        // Others come and go beside it.
        for other in (1..40).map(|n| FetchKey {
            rip: 0x1010 + n,
            ..key
        }) {
            if slot(&other) != slot(&key) {
                cache.remember(&ram, other, &found, &[0x0F, 0xA2]);
                assert_eq!(cache.length(&other), Some(2));
            }
        }
        assert_eq!(cache.length(&key), Some(2));
        for code in [&[0x0F, 0xA3][..], &[], &[0x0F; 10]] {
            cache.remember(&ram, key, &found, code);
            assert_eq!(cache.length(&key), None, "{code:x?}");
        }
    }
}
