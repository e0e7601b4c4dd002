//! One bit per page, for logs of dirty or accessed pages.

use core::sync::atomic::{AtomicU64, Ordering};

/// A log of pages over memory that the caller provides: bit `n` stands for the `n`th 4 KiB page
/// from `first` on. Several processors may mark pages at the same time.
///
/// ```
/// use core::sync::atomic::AtomicU64;
/// use testudo_ept::PageBitmap;
///
/// let words = [const { AtomicU64::new(0) }; 2];
/// let log = PageBitmap::new(0x10_0000, &words);
/// log.mark(0x10_3000);
/// assert_eq!(log.drain().collect::<Vec<_>>(), [0x10_3000]);
/// assert_eq!(log.drain().count(), 0);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PageBitmap<'a> {
    first: u64,
    words: &'a [AtomicU64],
}

impl<'a> PageBitmap<'a> {
    /// A log of the pages from the address `first` on, 64 for each word.
    #[inline]
    pub const fn new(first: u64, words: &'a [AtomicU64]) -> Self {
        Self {
            first: first >> 12,
            words,
        }
    }

    /// Marks the page that holds `address`. Pages beyond the log are not its business.
    #[inline]
    pub fn mark(&self, address: u64) {
        self.mark_word((address >> 12).wrapping_sub(self.first), 1);
    }

    /// Marks `pages` pages from the one that holds `address`.
    pub fn mark_range(&self, address: u64, pages: u64) {
        // Neither the log nor the addresses go on for ever.
        const PAGES: u64 = 1 << (64 - 12);
        let length = (self.words.len() as u64).saturating_mul(64);
        let last = self.first.saturating_add(length).min(PAGES);
        let start = address >> 12;
        let end = start.saturating_add(pages).min(last);
        let mut page = start.max(self.first);
        while page < end {
            let count = (end - page).min(64);
            let bits = u64::MAX >> (64 - count);
            self.mark_word(page.wrapping_sub(self.first), bits);
            page += count;
        }
    }

    /// Sets bits from bit `index` on, which need not begin a word.
    #[inline]
    pub(crate) fn mark_word(&self, index: u64, bits: u64) {
        let set = |word: u64, bits: u64| {
            if bits != 0
                && let Some(word) = usize::try_from(word).ok().and_then(|w| self.words.get(w))
            {
                // All bits at once need no read.
                match bits {
                    u64::MAX => word.store(bits, Ordering::Relaxed),
                    _ => _ = word.fetch_or(bits, Ordering::Relaxed),
                }
            }
        };
        let shift = index & 63;
        set(index >> 6, bits << shift);
        if shift != 0 {
            set((index >> 6).wrapping_add(1), bits >> (64 - shift));
        }
    }

    /// The index of the page that holds `address`; beyond the log's end if it lies before it.
    #[inline]
    pub(crate) fn index(&self, address: u64) -> u64 {
        (address >> 12).wrapping_sub(self.first)
    }

    /// The addresses of the marked pages in ascending order. Each mark is removed as it is read:
    /// one that another processor sets meanwhile is either read or left for the next time.
    pub fn drain(&self) -> impl Iterator<Item = u64> + 'a {
        let first = self.first;
        self.words
            .iter()
            .enumerate()
            .flat_map(move |(index, word)| {
                let mut bits = match word.load(Ordering::Relaxed) {
                    0 => 0,
                    _ => word.swap(0, Ordering::Relaxed),
                };
                core::iter::from_fn(move || {
                    let bit = bits.trailing_zeros();
                    bits &= bits.wrapping_sub(1);
                    (bit < 64).then(|| (first + index as u64 * 64 + u64::from(bit)) << 12)
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn ranges_cross_words_and_stop_at_the_end() {
        let words = [const { AtomicU64::new(0) }; 3];
        let log = PageBitmap::new(0x1000, &words);
        log.mark_range(0x1000 * 60, 80);
        log.mark(0);
        log.mark(u64::MAX);
        log.mark_range(0x1000 * 190, 1000);
        let pages: Vec<u64> = log.drain().map(|address| address >> 12).collect();
        let expected: Vec<u64> = (60..140).chain(190..193).collect();
        assert_eq!(pages, expected);
    }
}
