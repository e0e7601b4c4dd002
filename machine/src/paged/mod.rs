//! Guest memory whose pages come and go: what a balloon gives back, what a memory device plugs.
//!
//! A page that goes leaves the guest's second-stage table at once, but its frame is free for others
//! only when the flush of that edit is discharged: when every vCPU has forgotten the translation
//! ([`Shootdown`]). Until then it waits in limbo; if the guest touches the page meanwhile it gets the
//! very same frame again, so that a processor that still has the old translation sees what
//! all others see. A page that the guest touches later is a fresh one, zeroed.
//!
//! With [`PagedMemory::with_sharing`], pages that hold the same are backed by one frame until they are
//! written: by the guest, or by whoever asks [`Pager::page`] for a page to write to.

mod scanner;
mod sharing;
mod shootdown;

pub(crate) use scanner::ScanClock;
pub use sharing::SharedPool;

pub(crate) use shootdown::FORGET;
pub use shootdown::Shootdown;

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use sharing::{Shares, Sharing};
use testudo_arch::memory::Pager;
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, PAGE_SIZE, PageSize};
use testudo_ept::format::{Format, Leaf};
use testudo_ept::{Flush, PageTable};

/// No frame, and one is brought in when the guest touches the page.
const AWAY: u64 = 0;
/// No frame, and the guest is not to touch the page.
const REFUSED: u64 = 1;
/// In a bit that no frame's address has: nobody may write to the page as it is.
const PROTECTED: u64 = 1 << 1;
/// In another: the frame is one that pages share.
const COMMON: u64 = 1 << 2;
/// All such bits.
const STATE: u64 = PAGE_SIZE - 1;
/// What frames of large pages are aligned to.
const BLOCK: u64 = PageSize::Size2M.bytes();

/// Where the frames of guest memory come from.
///
/// # Safety
///
/// As for [`FrameAlloc`], for [`Self::alloc_block`] too; and `pointer` is where this program has
/// mapped a frame that was handed out, for as long as it is, readable and writable.
#[allow(
    unsafe_code,
    reason = "the promise of exclusive memory that an implementation makes"
)]
pub unsafe trait GuestFrames: FrameAlloc + FrameMem + Sync {
    /// Where a frame's bytes are.
    fn pointer(&self, frame: Hpa) -> NonNull<u8>;

    /// 2 MiB of zeroed memory, aligned to as many, whose frames can be given back one by one.
    fn alloc_block(&self) -> Option<Hpa> {
        None
    }

    /// Takes back 2 MiB of frames that lie side by side, aligned to as many.
    fn free_block(&self, first: Hpa) {
        for offset in (0..BLOCK).step_by(PAGE_SIZE as usize) {
            self.free(Hpa(first.0 + offset));
        }
    }
}

/// What the program around a machine can do with guest memory that comes and goes.
pub trait Managed: Pager {
    /// Takes the memory of whole pages away; what the guest touches of it later is brought in
    /// anew. Gives how many pages went.
    fn reclaim(&self, gpa: Gpa, len: u64) -> u64;

    /// Takes the memory of whole pages away, and does not let the guest touch it; false if that
    /// cannot be now.
    fn unplug(&self, gpa: Gpa, len: u64) -> bool;

    /// Puts zeroed memory behind whole pages that the guest could not touch until now; false, with
    /// nothing changed, if there is not so much, or some of it is being taken away still.
    fn plug(&self, gpa: Gpa, len: u64) -> bool;

    /// The bytes that the guest has.
    fn resident(&self) -> u64;

    /// The bytes that were taken away and are not free yet.
    fn in_limbo(&self) -> u64;

    /// What has come of sharing, if pages are shared.
    fn shared(&self) -> Option<Shared>;

    /// Goes on looking for pages that hold what others hold, of which so many are read at most, and
    /// shares them. Called again and again by one of the guest's vCPUs, between two exits.
    fn share(&self, pages: usize);
}

/// How often pages of a memory were shared, and how often that ended. Both only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Pages that came to share a frame.
    pub joined: u64,
    /// Pages that shared one and were written.
    pub written: u64,
}

/// The most pages of edits that share an obligation: a guest can make many edits before its vCPUs
/// look up, but what is remembered of them does not grow with their number.
const JOINED: u64 = 512;

type Token<F, A> = Flush<'static, A, Vec<(Gpa, Leaf<<F as Format>::Flags>)>>;

/// Edits that not all vCPUs have forgotten.
struct Pending<F: Format<Input = Gpa>, A: FrameAlloc + FrameMem + 'static> {
    /// Tells them from earlier edits of the same pages.
    id: u64,
    /// The last edit's number.
    number: u64,
    pages: u64,
    token: Token<F, A>,
}

struct Limbo<F: Format<Input = Gpa>, A: FrameAlloc + FrameMem + 'static> {
    /// In the order of their numbers.
    pending: VecDeque<Pending<F, A>>,
    /// The frames of pages that left, with the edits' identification; [`COMMON`] is among a frame's bits.
    frames: BTreeMap<u64, (Hpa, u64)>,
    next_id: u64,
    /// Who shares what, if anything is shared.
    shares: Option<Shares<A>>,
}

impl<F: Format<Input = Gpa>, A: FrameAlloc + FrameMem + 'static> Limbo<F, A> {
    /// The identification that the next edit gets.
    fn id(&self) -> u64 {
        match self.pending.back() {
            Some(last) if last.pages < JOINED => last.id,
            _ => self.next_id,
        }
    }

    /// Adds the edit that got [`Self::id`].
    fn add(&mut self, number: u64, pages: u64, token: Token<F, A>) {
        let id = self.id();
        if id == self.next_id {
            self.next_id += 1;
            let pending = Pending {
                id,
                number,
                pages,
                token,
            };
            return self.pending.push_back(pending);
        }
        let Some(last) = self.pending.pop_back() else {
            return;
        };
        let mut put = |token, pages| {
            self.pending.push_back(Pending {
                id,
                number,
                pages,
                token,
            });
        };
        match last.token.join(token) {
            Ok(both) => {
                let both = both.map(|(mut first, second)| {
                    first.extend(second);
                    first
                });
                put(both, last.pages + pages);
            }
            // Only tokens of different tables do not join.
            Err((_, first, second)) => {
                put(first, last.pages);
                put(second, pages);
            }
        }
    }
}

/// A range of guest memory whose pages come and go, and the second-stage table that has them.
pub struct PagedMemory<F: Format<Input = Gpa> + 'static, A: GuestFrames + 'static> {
    table: &'static PageTable<F, A>,
    flags: F::Flags,
    start: Gpa,
    /// For each page its frame with [`PROTECTED`] and [`COMMON`], or [`AWAY`], or [`REFUSED`].
    pages: Box<[AtomicU64]>,
    resident: AtomicU64,
    shootdown: Arc<Shootdown>,
    /// Held for every change, and never while waiting for anybody but vCPUs to leave the guest.
    limbo: spin::Mutex<Limbo<F, A>>,
    sharing: Option<Sharing<A>>,
}

/// Memory that cannot be managed like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PagedError {
    /// Not whole pages, or none.
    #[error("{len:#x} bytes at {start} are not whole pages")]
    Misaligned {
        /// Where it begins.
        start: Gpa,
        /// How long it is.
        len: u64,
    },
    /// The table does not take it.
    #[error("the memory at {0} cannot be mapped")]
    Map(Gpa),
    /// More pages than sharing can number.
    #[error("{0:#x} bytes are too many to be shared")]
    TooLarge(u64),
}

impl<F: Format<Input = Gpa> + 'static, A: GuestFrames + 'static> PagedMemory<F, A> {
    /// `len` bytes at `start` without any memory, which the guest cannot touch. What comes is
    /// mapped in `table` with `flags`.
    ///
    /// # Errors
    ///
    /// It is not made of whole pages.
    ///
    /// # Safety
    ///
    /// The table is used by the vCPUs of the machine that `shootdown` belongs to and by nothing
    /// else, and nobody else maps anything in this range of it.
    #[allow(
        unsafe_code,
        reason = "frames are reused when the machine's vCPUs say so"
    )]
    pub unsafe fn unplugged(
        table: &'static PageTable<F, A>,
        flags: F::Flags,
        start: Gpa,
        len: u64,
        shootdown: Arc<Shootdown>,
    ) -> Result<Self, PagedError> {
        if len == 0 || (start.0 | len) & (PAGE_SIZE - 1) != 0 || start.checked_add(len).is_none() {
            return Err(PagedError::Misaligned { start, len });
        }
        let pages = (0..len / PAGE_SIZE).map(|_| AtomicU64::new(REFUSED));
        Ok(Self {
            table,
            flags,
            start,
            pages: pages.collect(),
            resident: AtomicU64::new(0),
            shootdown,
            limbo: spin::Mutex::new(Limbo {
                pending: VecDeque::new(),
                frames: BTreeMap::new(),
                next_id: 0,
                shares: None,
            }),
            sharing: None,
        })
    }

    /// As [`Self::unplugged`], with all of it in memory from the beginning: in consecutive frames
    /// from `first` on.
    ///
    /// # Errors
    ///
    /// It is not made of whole pages, or cannot be mapped.
    ///
    /// # Safety
    ///
    /// As for [`Self::unplugged`]; and the frames are the guest's alone, as if the table's
    /// allocator had handed out each, and it takes each back.
    #[allow(unsafe_code, reason = "as for `unplugged`")]
    pub unsafe fn resident_at(
        table: &'static PageTable<F, A>,
        flags: F::Flags,
        start: Gpa,
        len: u64,
        first: Hpa,
        shootdown: Arc<Shootdown>,
    ) -> Result<Self, PagedError> {
        // SAFETY: the caller's promise.
        let memory = unsafe { Self::unplugged(table, flags, start, len, shootdown) }?;
        let mapped = table.map(start, len, first, flags);
        mapped.map_err(|_| PagedError::Map(start))?;
        for (page, number) in memory.pages.iter().zip(0..) {
            page.store(first.0 + number * PAGE_SIZE, Ordering::Relaxed);
        }
        memory.resident.store(len, Ordering::Relaxed);
        Ok(memory)
    }

    /// Makes it one that vCPUs tell when they have forgotten something, for good.
    pub fn leak(self) -> &'static Self
    where
        F: Send + Sync,
        F::Flags: Send + Sync,
        A: Send,
    {
        let memory: &'static Self = Box::leak(Box::new(self));
        memory.shootdown.add_waiter(|| memory.settle());
        memory
    }

    /// The numbers of whole pages in the range.
    fn numbers(&self, gpa: Gpa, len: u64) -> Option<Range<u64>> {
        let offset = gpa.0.checked_sub(self.start.0)?;
        if len == 0 || (offset | len) & (PAGE_SIZE - 1) != 0 {
            return None;
        }
        let end = offset.checked_add(len)? / PAGE_SIZE;
        (end <= self.pages.len() as u64).then_some(offset / PAGE_SIZE..end)
    }

    fn gpa(&self, number: u64) -> Gpa {
        self.start.wrapping_add(number * PAGE_SIZE)
    }

    fn slot(&self, number: u64) -> &AtomicU64 {
        &self.pages[number as usize]
    }

    /// The frame of a page that is away.
    #[cold]
    fn fetch(&self, number: u64) -> Option<Hpa> {
        let mut limbo = self.limbo.lock();
        match self.slot(number).load(Ordering::Acquire) {
            AWAY => {}
            REFUSED => return None,
            slot if slot & PROTECTED != 0 => {
                drop(limbo);
                return self.own(number);
            }
            frame => return Some(Hpa(frame)),
        }
        let waiting = limbo.frames.get(&number).map(|(frame, _)| *frame);
        if let Some(frame) = waiting.filter(|frame| frame.0 & COMMON != 0) {
            return self.fetch_shared(&mut limbo, number, Hpa(frame.0 & !STATE));
        }
        let frame = match waiting {
            Some(frame) => frame,
            None => match self.fetch_block(number, &limbo.frames) {
                Some(frame) => return Some(frame),
                None => self.table.frames().alloc()?,
            },
        };
        let at = self.gpa(number);
        let mapped = self.table.map_page(at, PageSize::Size4K, frame, self.flags);
        if mapped.is_err() {
            // No frame is left for a table.
            if waiting.is_none() {
                self.table.frames().free(frame);
            }
            return None;
        }
        limbo.frames.remove(&number);
        self.resident.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        self.slot(number).store(frame.0, Ordering::Release);
        Some(frame)
    }

    /// The frame of a page of which all the neighbours are away that a large page would hold: they
    /// all come, in one.
    fn fetch_block(&self, number: u64, limbo: &BTreeMap<u64, (Hpa, u64)>) -> Option<Hpa> {
        let gpa = self.gpa(number).0 & !(BLOCK - 1);
        let block = self.numbers(Gpa(gpa), BLOCK)?;
        let away = |page: u64| self.slot(page).load(Ordering::Relaxed) == AWAY;
        if !block.clone().all(away) || limbo.range(block.clone()).next().is_some() {
            return None;
        }
        let frames = self.table.frames();
        let first = frames.alloc_block()?;
        let mapped = self.table.map(Gpa(gpa), BLOCK, first, self.flags);
        let page = |offset: u64| Hpa(first.0 + offset * PAGE_SIZE);
        if mapped.is_err() {
            frames.free_block(first);
            return None;
        }
        for at in block.clone() {
            let frame = page(at - block.start);
            self.slot(at).store(frame.0, Ordering::Release);
        }
        self.resident.fetch_add(BLOCK, Ordering::Relaxed);
        Some(page(number - block.start))
    }

    /// Takes the frames of pages away, which become what `state` says.
    fn take(&self, gpa: Gpa, len: u64, state: u64) -> Option<u64> {
        let numbers = self.numbers(gpa, len)?;
        let mut limbo = self.limbo.lock();
        // No frame is left to split a large page: everything stays.
        let token = self.table.unmap_into(gpa, len, Vec::new()).ok()?;
        self.shootdown.note_change(gpa, len);
        let id = limbo.id();
        let (mut taken, mut own) = (0, 0);
        for page in numbers {
            let slot = self.slot(page);
            match slot.load(Ordering::Relaxed) {
                // What the guest must not touch is not its to give.
                REFUSED => continue,
                AWAY => {}
                frame => {
                    let common = frame & COMMON;
                    let frame = Hpa(frame & !STATE | common);
                    limbo.frames.insert(page, (frame, id));
                    taken += 1;
                    own += u64::from(common == 0);
                }
            }
            slot.store(state, Ordering::Release);
        }
        self.resident.fetch_sub(own * PAGE_SIZE, Ordering::Relaxed);
        if taken > 0 {
            limbo.add(self.shootdown.begin(), taken, token);
        }
        Some(taken)
    }

    /// Frees what all vCPUs have forgotten.
    fn settle(&self) {
        let mut limbo = self.limbo.lock();
        while let Some(pending) = limbo.pending.pop_front() {
            let Pending { id, number, .. } = pending;
            let mut evidence = self.shootdown.evidence(number);
            let leaves = match pending.token.try_discharge(&mut evidence) {
                Ok(leaves) => leaves,
                Err((token, _)) => {
                    return limbo.pending.push_front(Pending { token, ..pending });
                }
            };
            for (gpa, leaf) in leaves {
                let first = gpa.0.wrapping_sub(self.start.0) / PAGE_SIZE;
                let end = first + leaf.bytes() / PAGE_SIZE;
                let mut page = first;
                while page < end {
                    page = self.release(&mut limbo, page..end, id);
                }
            }
        }
    }

    /// Frees the frames of pages that left by one edit, a large page's worth if there is, else one;
    /// gives the page behind them.
    fn release(&self, limbo: &mut Limbo<F, A>, pages: Range<u64>, id: u64) -> u64 {
        const PAGES: u64 = BLOCK / PAGE_SIZE;
        let Limbo { frames, shares, .. } = limbo;
        let page = pages.start;
        // One that the guest has again, perhaps gone once more since, is not free.
        let Some(&(first, edit)) = frames.get(&page).filter(|(_, edit)| *edit == id) else {
            return page + 1;
        };
        if first.0 & COMMON != 0 {
            frames.remove(&page);
            if let (Some(sharing), Some(shares)) = (&self.sharing, shares) {
                self.leave(sharing, shares.group(page));
            }
            return page + 1;
        }
        let side_by_side = |offset: u64| {
            let frame = Hpa(first.0 + offset * PAGE_SIZE);
            frames.get(&(page + offset)) == Some(&(frame, edit))
        };
        let whole = first.0.is_multiple_of(BLOCK)
            && pages.end - page >= PAGES
            && (0..PAGES).all(side_by_side);
        let count = if whole { PAGES } else { 1 };
        for page in page..page + count {
            frames.remove(&page);
        }
        if whole {
            self.table.frames().free_block(first);
        } else {
            self.table.frames().free(first);
        }
        page + count
    }

    /// Puts fresh memory behind pages of which none has any, in large pages as far as there are.
    fn put(&self, numbers: Range<u64>) -> Result<(), Range<u64>> {
        let frames = self.table.frames();
        let mut page = numbers.start;
        while page < numbers.end {
            let whole =
                self.gpa(page).0.is_multiple_of(BLOCK) && numbers.end - page >= BLOCK / PAGE_SIZE;
            let block = if whole { frames.alloc_block() } else { None };
            let (first, size) = match block {
                Some(first) => (Some(first), BLOCK),
                None => (frames.alloc(), PAGE_SIZE),
            };
            let first = first.ok_or(numbers.start..page)?;
            let mapped = self.table.map(self.gpa(page), size, first, self.flags);
            let count = size / PAGE_SIZE;
            if mapped.is_err() {
                if count == 1 {
                    frames.free(first);
                } else {
                    frames.free_block(first);
                }
                return Err(numbers.start..page);
            }
            for number in 0..count {
                let frame = first.0 + number * PAGE_SIZE;
                self.slot(page + number).store(frame, Ordering::Release);
            }
            self.resident.fetch_add(size, Ordering::Relaxed);
            page += count;
        }
        Ok(())
    }
}

#[allow(unsafe_code, reason = "pages are handed out by their address")]
// SAFETY: a page's frame was handed out by the allocator, which says where it is mapped; it goes back
// only when all vCPUs have said, after it left, that they have no address from before. Frames that are
// shared are given for reading only.
unsafe impl<F, A> Pager for PagedMemory<F, A>
where
    F: Format<Input = Gpa> + Send + Sync + 'static,
    F::Flags: Send + Sync,
    A: GuestFrames + Send + 'static,
{
    #[inline]
    fn page(&self, gpa: Gpa, write: bool) -> Option<NonNull<u8>> {
        let number = self.numbers(gpa, PAGE_SIZE)?.start;
        let frame = match self.slot(number).load(Ordering::Acquire) {
            AWAY => self.fetch(number),
            REFUSED => return None,
            slot if write && slot & PROTECTED != 0 => self.own(number),
            slot => Some(Hpa(slot & !STATE)),
        };
        if frame.is_none() && self.is_memory(gpa) {
            self.shootdown.exhaust(gpa);
        }
        Some(self.table.frames().pointer(frame?))
    }

    fn is_memory(&self, gpa: Gpa) -> bool {
        let number = self.numbers(gpa, PAGE_SIZE);
        number.is_some_and(|range| self.slot(range.start).load(Ordering::Acquire) != REFUSED)
    }
}

impl<F, A> Managed for PagedMemory<F, A>
where
    F: Format<Input = Gpa> + Send + Sync + 'static,
    F::Flags: Send + Sync,
    A: GuestFrames + Send + 'static,
{
    fn reclaim(&self, gpa: Gpa, len: u64) -> u64 {
        self.take(gpa, len, AWAY).unwrap_or(0)
    }

    fn unplug(&self, gpa: Gpa, len: u64) -> bool {
        self.take(gpa, len, REFUSED).is_some()
    }

    fn plug(&self, gpa: Gpa, len: u64) -> bool {
        let Some(numbers) = self.numbers(gpa, len) else {
            return false;
        };
        let limbo = self.limbo.lock();
        let free = |page: u64| self.slot(page).load(Ordering::Relaxed) == REFUSED;
        // A frame in limbo may still be seen by a processor where the guest would now see another.
        if limbo.frames.range(numbers.clone()).next().is_some() || !numbers.clone().all(free) {
            return false;
        }
        let result = self.put(numbers);
        drop(limbo);
        match result {
            Ok(()) => true,
            Err(done) => {
                if !done.is_empty() {
                    let len = (done.end - done.start) * PAGE_SIZE;
                    self.take(self.gpa(done.start), len, REFUSED);
                }
                false
            }
        }
    }

    fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    fn in_limbo(&self) -> u64 {
        self.limbo.lock().frames.len() as u64 * PAGE_SIZE
    }

    fn shared(&self) -> Option<Shared> {
        self.sharing.as_ref().map(Sharing::so_far)
    }

    fn share(&self, pages: usize) {
        if let Some(sharing) = &self.sharing {
            self.scan(sharing, pages);
        }
    }
}

#[cfg(test)]
mod tests;
