//! Pages that hold the same, of this guest or several: one frame for all of them until one is written.
//!
//! One of the guest's vCPUs looks for them, a few pages in each of its turns. What takes rights away waits for
//! no vCPU, as everywhere here: a turn takes up what an earlier one began when all vCPUs have
//! forgotten what was before.
//!
//! 1. Pages that another page may equal lose the write right, in the guest's table and for the host.
//! 2. When that is discharged nobody can write to them: they are compared, and led to the shared frames.
//! 3. When that is discharged too, their old frames are free.
//!
//! A page that is written meanwhile gets its write right back and is left alone. A write to one that is
//! shared cannot be put off, though: it may be a device's, under a lock. The page is led to a copy, which
//! cannot be written yet; all vCPUs are expelled from the guest, and then it can, since none of them sees
//! the old frame any more. What may still look at that is an access of the host's that has begun before:
//! the page counts as a user of it until each vCPU is past such accesses.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa, PAGE_SIZE, PageSize};
use testudo_ept::Flush;
use testudo_ept::format::Format;
use testudo_ept::sharing::{
    Group, PageMemory, Scanner, SharedFrames, ZERO, digest, is_equal, is_zero,
};

use super::{
    AWAY, COMMON, GuestFrames, Limbo, PROTECTED, PagedError, PagedMemory, REFUSED, STATE, Shared,
};

/// The frames that are shared, among all memories that have this.
pub type SharedPool = Arc<spin::Mutex<SharedFrames>>;

/// The most pages that one turn makes something of.
const BATCH: usize = 64;
/// How many pages a turn may pass over for one that it reads.
const PASSED: usize = 8;
/// How many pages' old groups a turn takes leave of.
const LEAVING: usize = 4 * BATCH;

/// A page that has left no group of which something may still be seen.
const SETTLED: u32 = u32::MAX;
/// The last of those that have.
const LAST: u32 = u32::MAX - 1;

/// What scanning needs to know.
pub(super) struct Sharing<A: FrameAlloc + FrameMem + 'static> {
    pool: SharedPool,
    /// This memory among all whose pages are in the pool.
    scanner: Scanner,
    /// Only the vCPU that scans takes it.
    scan: spin::Mutex<Scan<A>>,
    /// [`Shared`], as it is counted.
    joined: AtomicU64,
    written: AtomicU64,
}

impl<A: FrameAlloc + FrameMem> Sharing<A> {
    /// How often pages were shared until now.
    pub(super) fn so_far(&self) -> Shared {
        Shared {
            joined: self.joined.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
        }
    }
}

struct Scan<A: FrameAlloc + FrameMem + 'static> {
    /// The page to be looked at next.
    next: u64,
    /// Half of each page's digest in the last round.
    last: Box<[u32]>,
    frozen: ArrayVec<Candidate, BATCH>,
    frozen_by: Option<Change<A>>,
    superfluous: ArrayVec<Hpa, BATCH>,
    superfluous_by: Option<Change<A>>,
}

/// A page without write right that another one may equal.
struct Candidate {
    page: u64,
    frame: Hpa,
    digest: u64,
}

/// An edit that not all vCPUs have forgotten.
struct Change<A: FrameAlloc + FrameMem + 'static> {
    number: u64,
    token: Flush<'static, A>,
}

/// Who shares what.
pub(super) struct Shares<A: FrameAlloc + FrameMem + 'static> {
    /// Of each page the group, while it has one.
    groups: Box<[Group]>,
    /// Of each page that has left its group the one that did next.
    after: Box<[u32]>,
    /// Pages that have left lately, and those that left before, for which all vCPUs are waited.
    lately: Departed<A>,
    before: Departed<A>,
}

/// Pages that have left their groups and are users of the frames still, in a chain.
struct Departed<A: FrameAlloc + FrameMem + 'static> {
    first: u32,
    last: u32,
    /// The edits by which they left, none when they are discharged.
    change: Option<Change<A>>,
}

impl<A: FrameAlloc + FrameMem> Departed<A> {
    const NONE: Self = Self {
        first: LAST,
        last: LAST,
        change: None,
    };
}

impl<A: FrameAlloc + FrameMem> Shares<A> {
    /// The page's group, which it has or has left.
    pub(super) fn group(&self, page: u64) -> Group {
        self.groups[page as usize]
    }

    /// A page leaves its group by an edit.
    fn depart(&mut self, page: u64, change: Change<A>) {
        let lately = &mut self.lately;
        self.after[page as usize] = LAST;
        match lately.first {
            LAST => lately.first = page as u32,
            _ => self.after[lately.last as usize] = page as u32,
        }
        lately.last = page as u32;
        let Some(earlier) = lately.change.take() else {
            lately.change = Some(change);
            return;
        };
        let token = match earlier.token.join(change.token) {
            Ok(both) => both.map(|_| ()),
            // Only tokens of different tables do not join.
            Err((_, _, second)) => second,
        };
        let number = change.number;
        lately.change = Some(Change { number, token });
    }
}

/// Guest memory as the scanner reads it.
struct Contents<'a, A>(&'a A);

#[allow(unsafe_code, reason = "pages are reached by their address")]
impl<A: GuestFrames> PageMemory for Contents<'_, A> {
    #[inline]
    fn load(&self, word: Hpa) -> u64 {
        let offset = word.0 & (PAGE_SIZE - 1) & !7;
        let page = self.0.pointer(Hpa(word.0 & !(PAGE_SIZE - 1))).as_ptr();
        // SAFETY: the frame is guest memory that has not been given back, mapped there and aligned; what
        // else accesses it does so by copies and atomics.
        unsafe { AtomicU64::from_ptr(page.add(offset as usize).cast()) }.load(Ordering::Relaxed)
    }

    fn copy(&self, from: Hpa, to: Hpa) {
        let (from, to) = (self.0.pointer(from), self.0.pointer(to));
        // SAFETY: both are frames; nobody writes to the first, which is shared, and nobody has the second
        // yet.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), PAGE_SIZE as usize) };
    }
}

impl<F: Format<Input = Gpa> + 'static, A: GuestFrames + 'static> PagedMemory<F, A> {
    /// Has pages share frames with others that are in `pool`. [`Managed::share`](super::Managed::share)
    /// is to be called then.
    ///
    /// # Errors
    ///
    /// There are too many pages.
    ///
    /// # Safety
    ///
    /// Each vCPU of the machine goes through its [gate](super::Shootdown::gate), and the pool's frames are
    /// the same allocator's, its frame of zeros included.
    #[allow(unsafe_code, reason = "pages are written when the vCPUs are out")]
    pub unsafe fn with_sharing(mut self, pool: SharedPool) -> Result<Self, PagedError> {
        let pages = self.pages.len();
        if pages >= LAST as usize {
            return Err(PagedError::TooLarge(pages as u64 * PAGE_SIZE));
        }
        self.limbo.get_mut().shares = Some(Shares {
            groups: (0..pages).map(|_| Group::ZERO).collect(),
            after: (0..pages).map(|_| SETTLED).collect(),
            lately: Departed::NONE,
            before: Departed::NONE,
        });
        let scanner = pool.lock().add_scanner();
        self.sharing = Some(Sharing {
            pool,
            scanner,
            scan: spin::Mutex::new(Scan {
                next: 0,
                last: (0..pages).map(|_| 0).collect(),
                frozen: ArrayVec::new(),
                frozen_by: None,
                superfluous: ArrayVec::new(),
                superfluous_by: None,
            }),
            joined: AtomicU64::new(0),
            written: AtomicU64::new(0),
        });
        Ok(self)
    }

    fn contents(&self) -> Contents<'_, A> {
        Contents(self.table.frames())
    }

    /// One turn.
    pub(super) fn scan(&self, sharing: &Sharing<A>, pages: usize) {
        let scan = &mut *sharing.scan.lock();
        self.take_leave(sharing);
        if let Some(change) = scan.superfluous_by.take() {
            match self.passed(change) {
                Ok(()) => {
                    for frame in scan.superfluous.drain(..) {
                        self.table.frames().free(frame);
                    }
                }
                Err(change) => scan.superfluous_by = Some(change),
            }
        }
        if scan.superfluous_by.is_none()
            && let Some(change) = scan.frozen_by.take()
        {
            match self.passed(change) {
                Ok(()) => self.merge(sharing, scan),
                Err(change) => scan.frozen_by = Some(change),
            }
        }
        if scan.frozen_by.is_none() {
            self.look(sharing, scan, pages);
        }
    }

    /// Discharges what all vCPUs have forgotten.
    fn passed(&self, change: Change<A>) -> Result<(), Change<A>> {
        let Change { number, token } = change;
        // A token of no edit would be discharged at once; what its number stands for is not over.
        if self.shootdown.passed() < number {
            return Err(Change { number, token });
        }
        let mut evidence = self.shootdown.evidence(number);
        let discharged = token.try_discharge(&mut evidence);
        discharged.map_err(|(token, _)| Change { number, token })
    }

    /// Reads pages, and takes the write right from those that may equal others.
    fn look(&self, sharing: &Sharing<A>, scan: &mut Scan<A>, pages: usize) {
        let memory = self.contents();
        let mut flush = self.table.no_edit();
        let (mut read, mut passed) = (0, 0);
        while read < pages && passed < pages * PASSED && !scan.frozen.is_full() {
            passed += 1;
            let page = scan.next;
            scan.next = page + 1;
            if scan.next == self.pages.len() as u64 {
                scan.next = 0;
                sharing.pool.lock().finish_round(sharing.scanner);
            }
            let slot = self.slot(page).load(Ordering::Acquire);
            if slot & COMMON != 0 {
                self.visit_shared(sharing, page);
            }
            if slot == AWAY || slot == REFUSED || slot & PROTECTED != 0 {
                continue;
            }
            read += 1;
            // It is not given back before this vCPU has been asked.
            let frame = Hpa(slot);
            let next = self.slot(scan.next).load(Ordering::Relaxed);
            let next = (next & STATE == 0 && next != AWAY).then_some(Hpa(next));
            let digest = digest(&memory, frame, next);
            let half = (digest >> 32) as u32;
            let before = core::mem::replace(&mut scan.last[page as usize], half);
            let mut pool = sharing.pool.lock();
            // What is being written is not worth sharing.
            if digest != ZERO && before != half {
                pool.note_volatile();
                continue;
            }
            let promising = pool.look(digest, sharing.scanner, page);
            drop(pool);
            if promising && self.freeze(&mut flush, page, frame) {
                scan.frozen.push(Candidate {
                    page,
                    frame,
                    digest,
                });
            }
        }
        if !scan.frozen.is_empty() {
            let number = self.shootdown.begin();
            let token = flush;
            scan.frozen_by = Some(Change { number, token });
        }
    }

    /// The scanner passes by a page that has a group: one that stays its only user is better off
    /// without.
    fn visit_shared(&self, sharing: &Sharing<A>, page: u64) {
        let limbo = self.limbo.lock();
        let Some(shares) = &limbo.shares else {
            return;
        };
        if self.slot(page).load(Ordering::Relaxed) & COMMON == 0 {
            return;
        }
        let group = shares.group(page);
        let mut pool = sharing.pool.lock();
        if pool.is_lonely(group)
            && let Some(frame) = pool.take_over(group)
        {
            pool.note_mistaken();
            drop(pool);
            self.give_back(page, frame);
            self.resident.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        }
    }

    /// Lets a page be written that is alone on its frame. The caller keeps others from changing it.
    fn give_back(&self, page: u64, frame: Hpa) {
        let thawed = self.table.thaw_page(self.gpa(page), frame);
        let state = if thawed { 0 } else { PROTECTED };
        self.slot(page).store(frame.0 | state, Ordering::Release);
    }

    /// Takes the write right from a page.
    fn freeze(&self, flush: &mut Flush<'static, A>, page: u64, frame: Hpa) -> bool {
        let limbo = self.limbo.lock();
        let settled = |shares: &Shares<A>| shares.after[page as usize] == SETTLED;
        let slot = self.slot(page);
        if slot.load(Ordering::Relaxed) != frame.0 || !limbo.shares.as_ref().is_some_and(settled) {
            return false;
        }
        let at = self.gpa(page);
        if !self.table.freeze_page(flush, at, frame) {
            // Most pages are parts of large ones.
            let Ok(split) = self.table.split(at, PAGE_SIZE, PageSize::Size4K) else {
                return false;
            };
            let frozen = self.table.freeze_page(flush, at, frame);
            let token = core::mem::replace(flush, self.table.no_edit());
            match token.join(split) {
                Ok(both) => *flush = both.map(|_| ()),
                // Only tokens of different tables do not join.
                Err((_, token, _)) => *flush = token,
            }
            if !frozen {
                return false;
            }
        }
        slot.store(frame.0 | PROTECTED, Ordering::Release);
        self.shootdown.note_change(at, PAGE_SIZE);
        true
    }

    /// Compares pages that nobody can write to, and leads those that are equal to the shared frames.
    fn merge(&self, sharing: &Sharing<A>, scan: &mut Scan<A>) {
        let mut flush = self.table.no_edit();
        for candidate in scan.frozen.drain(..) {
            let mut limbo = self.limbo.lock();
            let Limbo { shares, .. } = &mut *limbo;
            let frozen = candidate.frame.0 | PROTECTED;
            let slot = self.slot(candidate.page);
            let Some(shares) = shares else {
                continue;
            };
            // It may have been written, or be away.
            if slot.load(Ordering::Relaxed) != frozen {
                continue;
            }
            match self.join(sharing, &mut flush, &candidate) {
                Some((group, frame)) => {
                    shares.groups[candidate.page as usize] = group;
                    slot.store(frame.0 | PROTECTED | COMMON, Ordering::Release);
                    self.resident.fetch_sub(PAGE_SIZE, Ordering::Relaxed);
                    sharing.joined.fetch_add(1, Ordering::Relaxed);
                    if frame != candidate.frame {
                        scan.superfluous.push(candidate.frame);
                    }
                }
                None => {
                    sharing.pool.lock().note_mistaken();
                    self.give_back(candidate.page, candidate.frame);
                }
            }
        }
        if !scan.superfluous.is_empty() {
            let number = self.shootdown.begin();
            let token = flush;
            scan.superfluous_by = Some(Change { number, token });
        }
    }

    /// Finds the group of a page that nobody can write to, or founds it; gives the frame as well.
    fn join(
        &self,
        sharing: &Sharing<A>,
        flush: &mut Flush<'static, A>,
        candidate: &Candidate,
    ) -> Option<(Group, Hpa)> {
        let memory = self.contents();
        let &Candidate {
            page,
            frame,
            digest,
        } = candidate;
        let mut pool = sharing.pool.lock();
        let Some(group) = pool.group(digest) else {
            drop(pool);
            // It was written before it lost the write right.
            if testudo_ept::sharing::digest(&memory, frame, None) != digest {
                return None;
            }
            return Some((sharing.pool.lock().found(digest, frame)?, frame));
        };
        // As long as this page is a user, nobody writes to the group's frame.
        let target = pool.join(group)?;
        drop(pool);
        let equal = match digest {
            ZERO => is_zero(&memory, frame, None),
            _ => is_equal(&memory, target, frame),
        };
        if equal
            && self
                .table
                .redirect_page(flush, self.gpa(page), frame, target)
        {
            self.shootdown.note_change(self.gpa(page), PAGE_SIZE);
            return Some((group, target));
        }
        self.leave(sharing, group);
        None
    }

    /// Ends a use of a shared frame that nobody looks at any more.
    pub(super) fn leave(&self, sharing: &Sharing<A>, group: Group) {
        let last = sharing.pool.lock().leave(group);
        if let Some(frame) = last {
            self.table.frames().free(frame);
        }
    }

    /// Ends uses of shared frames by pages that left when all vCPUs have forgotten them.
    fn take_leave(&self, sharing: &Sharing<A>) {
        let mut limbo = self.limbo.lock();
        let Some(shares) = &mut limbo.shares else {
            return;
        };
        if shares.before.first == LAST {
            shares.before = core::mem::replace(&mut shares.lately, Departed::NONE);
        }
        if let Some(change) = shares.before.change.take()
            && let Err(change) = self.passed(change)
        {
            shares.before.change = Some(change);
            return;
        }
        for _ in 0..LEAVING {
            let page = shares.before.first;
            if page == LAST {
                return;
            }
            let after = core::mem::replace(&mut shares.after[page as usize], SETTLED);
            shares.before.first = after;
            self.leave(sharing, shares.groups[page as usize]);
        }
    }

    /// A frame of its own for a page that shares one, with the same contents.
    fn copy_of(&self, group: Group, frame: Hpa) -> Option<Hpa> {
        let frames = self.table.frames();
        if group == Group::ZERO {
            return frames.alloc();
        }
        let own = frames.alloc_any()?;
        self.contents().copy(frame, own);
        Some(own)
    }

    /// The frame of a page that is about to be written, and that may be nobody's but the page's own.
    #[cold]
    pub(super) fn own(&self, page: u64) -> Option<Hpa> {
        let mut limbo = self.limbo.lock();
        let slot = self.slot(page).load(Ordering::Acquire);
        if slot == AWAY {
            drop(limbo);
            return self.fetch(page);
        }
        if slot == REFUSED {
            return None;
        }
        let (at, old) = (self.gpa(page), Hpa(slot & !STATE));
        if slot & PROTECTED == 0 {
            return Some(old);
        }
        let (Some(sharing), Some(shares)) = (&self.sharing, &mut limbo.shares) else {
            return None;
        };
        let mut own = old;
        if slot & COMMON != 0 {
            let group = shares.group(page);
            let mut pool = sharing.pool.lock();
            let alone = pool.take_over(group).is_some();
            drop(pool);
            if !alone {
                own = self.copy_of(group, old)?;
                let mut token = self.table.no_edit();
                if !self.table.redirect_page(&mut token, at, old, own) {
                    // Nobody else edits this range: it is as this memory has left it.
                    self.table.frames().free(own);
                    return None;
                }
                self.shootdown.note_change(at, PAGE_SIZE);
                let number = self.shootdown.begin();
                self.shootdown.expel();
                shares.depart(page, Change { number, token });
            }
            sharing.pool.lock().note_broken();
            sharing.written.fetch_add(1, Ordering::Relaxed);
            self.resident.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        }
        self.give_back(page, own);
        Some(own)
    }

    /// The frame of a page that was taken away while it shared `frame`, and is wanted before all vCPUs
    /// have forgotten that: a copy, since what they see must not differ.
    pub(super) fn fetch_shared(
        &self,
        limbo: &mut Limbo<F, A>,
        page: u64,
        frame: Hpa,
    ) -> Option<Hpa> {
        let shares = limbo.shares.as_mut()?;
        let own = self.copy_of(shares.group(page), frame)?;
        // The page is absent: what a vCPU still has of it is older, and ends here.
        let number = self.shootdown.begin();
        self.shootdown.expel();
        let mapped = self
            .table
            .map_page(self.gpa(page), PageSize::Size4K, own, self.flags);
        if mapped.is_err() {
            // No frame is left for a table.
            self.table.frames().free(own);
            return None;
        }
        let token = self.table.no_edit();
        shares.depart(page, Change { number, token });
        limbo.frames.remove(&page);
        self.resident.fetch_add(PAGE_SIZE, Ordering::Relaxed);
        self.slot(page).store(own.0, Ordering::Release);
        Some(own)
    }
}
