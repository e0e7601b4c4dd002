//! Content-based page sharing: pages that hold the same are backed once, until one is written.
//!
//! [`Sharing`] walks the small pages of a second-stage table a few at a time. A page that has not
//! changed since the last round and holds what another one holds loses its write right; when no
//! processor can write to either any more, they are compared in full and become one. A write to
//! a shared page faults, and [`Sharing::unshare`] gives the writer a page of its own.
//!
//! What is shared stays without the write right whatever else is done to the table; what an edit gives
//! or takes counts once the page is shared no more. A table that is shared from must not be copied with [`PageTable::duplicate`], whose copy nobody counts.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::convert::Infallible;

use testudo_arch::{FrameAlloc, FrameMem, Hpa, PAGE_SIZE};

use crate::format::{Format, Input};
use crate::table::SmallPage;
use crate::{EditError, Flush, Invalidate, PageTable};

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
/// keep it guessing in four.
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

/// What sharing has achieved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharingStats {
    /// Pages looked at.
    pub scanned: u64,
    /// Pages that had changed since the round before.
    pub volatile: u64,
    /// Pages whose hash agreed with another's and whose contents did not.
    pub mistaken: u64,
    /// Addresses that share now.
    pub sharing: u64,
    /// Of these, addresses that share the page of zeros.
    pub zero: u64,
    /// Frames that are shared now, the page of zeros among them.
    pub shared: u64,
    /// Pages that were given back to the writer.
    pub unshared: u64,
}

impl SharingStats {
    /// The number of frames that sharing saves at the moment.
    pub const fn saved(&self) -> u64 {
        self.sharing.saturating_sub(self.shared)
    }
}

/// A frame that is shared.
#[derive(Clone, Copy, Debug)]
struct Group {
    hash: u64,
    users: u64,
}

/// A page that another one may equal.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    address: u64,
    hash: u64,
    page: SmallPage,
}

impl Candidate {
    /// The page without the write right, as the first step leaves it.
    fn frozen(&self) -> SmallPage {
        SmallPage {
            shared: true,
            ..self.page
        }
    }
}

/// The hash that stands for a page of zeros.
const ZERO: u64 = 0;

/// There is no frame for a page of the writer's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no frame left for a page of the writer's own")]
pub struct NoFrame;

/// The pages of one table that share frames.
///
/// Every small writable page in the ranges that are scanned is a frame of `D`, mapped once: frames that
/// become superfluous are freed to it, and a writer's own page comes from it.
#[derive(Debug)]
pub struct Sharing<D: FrameAlloc> {
    frames: D,
    groups: BTreeMap<Hpa, Group>,
    by_hash: BTreeMap<u64, Hpa>,
    /// Hashes of the last round, by address.
    last: BTreeMap<u64, u64>,
    /// Pages of this round that equal nothing so far, by hash.
    open: BTreeMap<u64, Candidate>,
    next: u64,
    stats: SharingStats,
}

impl<D: FrameAlloc> Sharing<D> {
    /// Nothing shared yet.
    pub fn new(frames: D) -> Self {
        Self {
            frames,
            groups: BTreeMap::new(),
            by_hash: BTreeMap::new(),
            last: BTreeMap::new(),
            open: BTreeMap::new(),
            next: 0,
            stats: SharingStats::default(),
        }
    }

    /// What has been achieved.
    pub fn stats(&self) -> SharingStats {
        let zero = self.by_hash.get(&ZERO);
        SharingStats {
            sharing: self.groups.values().map(|group| group.users).sum(),
            zero: zero.map_or(0, |zero| self.groups[zero].users),
            shared: self.groups.len() as u64,
            ..self.stats
        }
    }

    /// Looks at up to `pages` mapped pages of `len` bytes from `start`, going on where the last call
    /// stopped, and shares those that hold the same. `true` when the range is through.
    ///
    /// Hardware is made to forget twice: when pages lose the write right, and before their frames
    /// are freed.
    ///
    /// # Errors
    ///
    /// The range is bad.
    pub fn scan<F, M, P, I>(
        &mut self,
        table: &PageTable<F, M>,
        (start, len): (F::Input, u64),
        pages: usize,
        memory: &P,
        hardware: &mut I,
    ) -> Result<bool, EditError>
    where
        F: Format,
        M: FrameAlloc + FrameMem,
        P: PageMemory,
        I: Invalidate<Error = Infallible> + ?Sized,
    {
        let first = start.as_u64();
        let end = first.saturating_add(len);
        let from = if (first..end).contains(&self.next) {
            self.next
        } else {
            first
        };
        let mut candidates = Vec::new();
        // The page before is looked at while the next one is on its way from memory.
        let mut waiting: Option<(u64, SmallPage)> = None;
        let mut through = true;
        let leaves = table.leaves(F::Input::from_u64(from), end - from)?;
        for (looked, (address, leaf)) in leaves.enumerate() {
            if looked >= pages {
                self.next = address.as_u64();
                through = false;
                break;
            }
            if leaf.shift == 12
                && let Some(page) = table.small_page(address).filter(SmallPage::is_candidate)
                && let Some(before) = waiting.replace((address.as_u64(), page))
            {
                self.look(before, Some(page.frame), memory, &mut candidates);
            }
        }
        if let Some(last) = waiting {
            self.look(last, None, memory, &mut candidates);
        }
        if through {
            self.next = end;
            self.open.clear();
        }
        self.join(table, candidates, memory, hardware);
        Ok(through)
    }

    /// Finds out whether a page may equal another, which comes first in `candidates` then unless it
    /// is shared already.
    fn look<P: PageMemory>(
        &mut self,
        (address, page): (u64, SmallPage),
        next: Option<Hpa>,
        memory: &P,
        candidates: &mut Vec<Candidate>,
    ) {
        self.stats.scanned += 1;
        let zero = is_zero(memory, page.frame, next);
        let hash = if zero {
            ZERO
        } else {
            hash(memory, page.frame, next) | 1
        };
        let candidate = Candidate {
            address,
            hash,
            page,
        };
        // What is being written is not worth sharing.
        if !zero && self.last.insert(address, hash) != Some(hash) {
            self.stats.volatile += 1;
            return;
        }
        if !zero && !self.by_hash.contains_key(&hash) {
            match self.open.remove(&hash) {
                Some(other) if other.address != address => candidates.push(other),
                _ => {
                    self.open.insert(hash, candidate);
                    return;
                }
            }
        }
        candidates.push(candidate);
    }

    /// Takes the write right from the candidates, and lets those that are equal share.
    fn join<F, M, P, I>(
        &mut self,
        table: &PageTable<F, M>,
        mut candidates: Vec<Candidate>,
        memory: &P,
        hardware: &mut I,
    ) where
        F: Format,
        M: FrameAlloc + FrameMem,
        P: PageMemory,
        I: Invalidate<Error = Infallible> + ?Sized,
    {
        let mut flush = table.token(());
        let change = |flush: &mut Flush<'_, M>, page: &Candidate, old, frame, shared| {
            table.replace_small(flush, F::Input::from_u64(page.address), old, frame, shared)
        };
        candidates.retain(|page| change(&mut flush, page, page.page, page.page.frame, true));
        // From here on nobody can write to them.
        flush.discharge(hardware);

        let mut flush = table.token(());
        let mut superfluous = Vec::new();
        let mut founders = Vec::new();
        for page in candidates {
            let frame = page.page.frame;
            if page.hash == ZERO
                && !self.by_hash.contains_key(&ZERO)
                && let Some(zero) = self.frames.alloc()
            {
                self.found(ZERO, zero, 0);
            }
            match self.by_hash.get(&page.hash).copied() {
                None if page.hash != ZERO => {
                    self.found(page.hash, frame, 1);
                    founders.push(page);
                }
                Some(target)
                    if target != frame
                        && is_equal(memory, target, frame)
                        && change(&mut flush, &page, page.frozen(), target, true) =>
                {
                    self.adjust(target, 1);
                    superfluous.push(frame);
                    self.last.remove(&page.address);
                }
                _ => {
                    self.stats.mistaken += 1;
                    change(&mut flush, &page, page.frozen(), frame, false);
                }
            }
        }
        for page in founders {
            // One that stayed alone gets its write right back.
            let frame = page.page.frame;
            if self
                .groups
                .get(&frame)
                .is_some_and(|group| group.users == 1)
                && change(&mut flush, &page, page.frozen(), frame, false)
            {
                self.adjust(frame, -1);
            }
        }
        flush.discharge(hardware);
        for frame in superfluous {
            self.frames.free(frame);
        }
    }

    /// Resolves a write fault: if the page is shared, the writer gets its own, or the frame itself if
    /// it is the last user. `false` comes out if the page is not shared, or is not to be written in any
    /// case: the fault has another cause.
    ///
    /// # Errors
    ///
    /// There is no frame for the copy; the page stays shared.
    pub fn unshare<'t, F, M, P>(
        &mut self,
        table: &'t PageTable<F, M>,
        address: F::Input,
        memory: &P,
    ) -> Result<Flush<'t, M, bool>, NoFrame>
    where
        F: Format,
        M: FrameAlloc + FrameMem,
        P: PageMemory,
    {
        let mut flush = table.token(());
        let address = F::Input::from_u64(address.as_u64() & !(PAGE_SIZE - 1));
        let shared = |page: &SmallPage| page.shared && page.writable;
        let Some(old) = table.small_page(address).filter(shared) else {
            return Ok(flush.map(|()| false));
        };
        let group = self.groups.get(&old.frame);
        let last = group.is_none_or(|group| group.hash != ZERO && group.users == 1);
        let own = if last {
            old.frame
        } else {
            let own = self.frames.alloc().ok_or(NoFrame)?;
            memory.copy(old.frame, own);
            own
        };
        if table.replace_small(&mut flush, address, old, own, false) {
            self.stats.unshared += 1;
            self.adjust(old.frame, -1);
        } else if !last {
            // Somebody has changed the page meanwhile: the access comes again.
            self.frames.free(own);
        }
        Ok(flush.map(|()| true))
    }

    /// Says that a page was unmapped from the table. `true` if its frame is shared by nobody any more
    /// and may be freed once that edit's token is discharged.
    pub fn unmapped(&mut self, frame: Hpa) -> bool {
        match self.groups.get(&frame) {
            None => true,
            Some(group) => {
                let free = group.hash != ZERO && group.users == 1;
                self.adjust(frame, -1);
                free
            }
        }
    }

    fn found(&mut self, hash: u64, frame: Hpa, users: u64) {
        self.groups.insert(frame, Group { hash, users });
        self.by_hash.insert(hash, frame);
    }

    /// Counts a user more or less. The page of zeros stays without any.
    fn adjust(&mut self, frame: Hpa, by: i64) {
        let Some(group) = self.groups.get_mut(&frame) else {
            return;
        };
        group.users = group.users.saturating_add_signed(by);
        if group.users == 0 && group.hash != ZERO {
            self.by_hash.remove(&group.hash);
            self.groups.remove(&frame);
        }
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
