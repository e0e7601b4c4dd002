//! Content-based page sharing: pages that hold the same are backed once, until one is written.
//!
//! A scanner looks at pages, a few at a time ([`Pace`]). A page that has not changed since the last
//! round and holds what another one holds loses its write right; when no processor can write to it
//! any more, it is compared in full, and led to the frame that all pages with these contents share. A
//! write to it faults, and the writer gets a page of its own. [`SharedFrames`] keeps the account of the
//! shared frames, for any number of tables, and says in which order tables are to be edited.
//!
//! What is shared stays without the write right whatever else is done to the table; what an edit gives
//! or takes counts once the page is shared no more. A table that is shared from must not be copied with
//! [`PageTable::duplicate`](crate::PageTable::duplicate), whose copy nobody counts.
//!
//! Who shares a page can find out that somebody else has the same one: the first write to it takes
//! longer. Among guests that do not trust one another this is a way to learn what the others have in memory.

mod frames;

use testudo_arch::Hpa;

pub use frames::{Group, Scanner, SharedFrames, SharingStats};

/// Guest pages by host-physical address.
///
/// Guests write to them meanwhile, so a load is atomic and nothing here is a reference.
pub trait PageMemory {
    /// Loads the aligned 64 bits at `word`.
    fn load(&self, word: Hpa) -> u64;

    /// Whether any bit of the aligned 256 bytes at `at` is set. Who can load more than 64 bits at a time
    /// finds it out faster than by [`Self::load`].
    #[inline]
    fn any_set(&self, at: Hpa) -> bool {
        let mut sum = [0u64; 4];
        for word in 0..8 {
            for (lane, sum) in sum.iter_mut().enumerate() {
                *sum |= self.load(at.wrapping_add(word * 32 + lane as u64 * 8));
            }
        }
        sum != [0; 4]
    }

    /// Has the processor bring the 64 bytes at `line` into its caches, if it can be told to: they are
    /// loaded soon.
    #[inline]
    fn prefetch(&self, line: Hpa) {
        let _ = line;
    }

    /// Copies a page to another that nobody else uses.
    fn copy(&self, from: Hpa, to: Hpa);
}

/// Has a part of the page that comes next brought into the caches while another is read: memory is
/// far away, and the processor does not guess across the end of a page.
#[inline]
fn prefetch(memory: &impl PageMemory, next: Option<Hpa>, from: u64, to: u64) {
    if let Some(next) = next {
        for line in (from..to).step_by(64) {
            memory.prefetch(next.wrapping_add(line));
        }
    }
}

/// Whether a page is all zeros. `next` is the page that will be read after it, if that is known.
#[inline]
pub fn is_zero(memory: &impl PageMemory, page: Hpa, next: Option<Hpa>) -> bool {
    // Most pages show at once that they are not.
    if memory.load(page) | memory.load(page.wrapping_add(2048)) != 0 {
        return false;
    }
    (0..4096).step_by(256).all(|at| {
        prefetch(memory, next, at, at + 256);
        !memory.any_set(page.wrapping_add(at))
    })
}

/// The keys of [`hashes`]: odd numbers without a pattern.
const KEYS: [u64; 5] = [
    0x9E37_79B9_7F4A_7C15,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0x27D4_EB2F_1656_67C5,
    0x85EB_CA77_C2B2_AE63,
];

/// A hash of a page's contents. It finds candidates and proves nothing. `next` is as for [`is_zero`].
#[inline]
pub fn hash(memory: &impl PageMemory, page: Hpa, next: Option<Hpa>) -> u64 {
    let [hash] = hashes(memory, [page], next.map(|next| [next]));
    hash
}

/// The hashes of several pages, each as [`hash`] has it. `next` are those that will be read after them.
///
/// One after another, pages of memory that is in no cache are hashed more slowly than the memory could
/// give them: the processor guesses ahead within a page only. Four at a time, a line of each in turn,
/// keep it guessing in four. Nothing is shared between calls: threads that each have their part of the pages
/// need to take turns only with the [account](SharedFrames).
#[inline]
pub fn hashes<const N: usize>(
    memory: &impl PageMemory,
    pages: [Hpa; N],
    next: Option<[Hpa; N]>,
) -> [u64; N] {
    let mut sums = [KEYS[0]; N];
    for line in (0..4096).step_by(64) {
        for (n, sum) in sums.iter_mut().enumerate() {
            if let Some(next) = &next {
                memory.prefetch(next[n].wrapping_add(line));
            }
            // Products are summed, so that none waits for another.
            let mut products = 0u64;
            for block in 0..4 {
                let at = pages[n].wrapping_add(line + block as u64 * 16);
                let (a, b) = (memory.load(at), memory.load(at.wrapping_add(8)));
                let product = fold(a ^ KEYS[block], b ^ KEYS[block + 1]);
                products = products.wrapping_add(product);
            }
            // It matters which line comes first.
            *sum = sum
                .rotate_left(23)
                .wrapping_mul(KEYS[4])
                .wrapping_add(products);
        }
    }
    sums.map(|sum| fold(sum ^ KEYS[2], KEYS[4]))
}

/// Both halves of a product, added without carry.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b));
    product as u64 ^ (product >> 64) as u64
}

/// Whether two pages hold the same.
#[inline]
pub fn is_equal(memory: &impl PageMemory, a: Hpa, b: Hpa) -> bool {
    (0..512).step_by(8).all(|first| {
        let mut difference = 0;
        for word in first..first + 8 {
            let at = word * 8;
            difference |= memory.load(a.wrapping_add(at)) ^ memory.load(b.wrapping_add(at));
        }
        difference == 0
    })
}

/// The digest of a page of zeros.
pub const ZERO: u64 = 0;

/// What finds pages that may be equal: [`ZERO`] for a page of zeros, and else a [`hash`] that is not that.
/// `next` is as for [`is_zero`].
#[inline]
pub fn digest(memory: &impl PageMemory, page: Hpa, next: Option<Hpa>) -> u64 {
    if is_zero(memory, page, next) {
        ZERO
    } else {
        hash(memory, page, next) | 1
    }
}

/// How many pages a scanner may look at: so many a second, and not many at once.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    per_second: u64,
    most: u64,
    credit: u64,
    last: u64,
}

impl Pace {
    /// `per_second` pages a second, at most `most` of them at once.
    pub const fn new(per_second: u64, most: u64) -> Self {
        Self {
            per_second,
            most,
            credit: 0,
            last: 0,
        }
    }

    /// How many pages may be looked at now. `now` is a clock in nanoseconds that starts anywhere;
    /// one that goes back grants nothing.
    pub fn grant(&mut self, now: u64) -> usize {
        let passed = u128::from(now.saturating_sub(self.last));
        let scale = 1_000_000_000u128;
        let earned = u128::from(self.per_second) * passed + u128::from(self.credit);
        let pages = (earned / scale).min(u128::from(self.most));
        // The rest of a page is kept, more than `most` is lost.
        self.credit = (earned % scale) as u64;
        self.last = self.last.max(now);
        pages as usize
    }
}
