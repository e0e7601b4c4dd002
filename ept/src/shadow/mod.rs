//! Shadow paging: one set of tables that does the work of the guest's paging and of ours, for
//! processors without nested paging.
//!
//! Hardware walks tables that [`ShadowMmu`] fills page by page as faults come. Each of them shadows
//! one table of the guest *in one role*: at one level, under one set of rights, in one paging mode. Two
//! roles of a frame never share a shadow. The guest's tables are write-protected while they are
//! shadowed; tables of the lowest level may instead go out of step until the guest invalidates,
//! as a translation cache may.
//!
//! What the guest must run with: CR0.PG and CR0.WP set, EFER.NXE set, and CR3 as
//! [`ShadowMmu::load`] says. While the guest is not in long mode, CR4.PAE is set too; while its own
//! CR0.PG is clear, CR4.SMEP, SMAP, PKE and PKS are clear, since they do nothing without paging. Page
//! faults, writes to CR0, CR3 and CR4, and INVLPG must exit. All of the guest's memory is write-back,
//! whatever its tables and its PAT say.

mod fill;
mod pages;
mod role;
#[cfg(test)]
mod tests;

use alloc::sync::Arc;
use alloc::vec::Vec;

use testudo_arch::{FrameAlloc, FrameMem, Gpa, GuestMemory, Gva, Hpa, MemoryFault};

use crate::format::Format;
use crate::walk::{
    ACCESSED, Access, AccessKind, DIRTY, GuestTranslation, Mode, PageFault, PagingState, Privilege,
    WalkError, walk,
};
use crate::{Flush, PageTable, Rights};
use fill::Fault;
use pages::{Child, PageId, Pages, Slot};
use role::{EVERYTHING, Key, Kind, allowed};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const MARKED: u64 = 0x60;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const KEY: u64 = 0xF << 59;

/// Emulated writes to a table above the lowest level, without a fault through it in between, after
/// which it is taken for something else than a table.
const FLOOD: u8 = 8;

/// The guest's memory as it is backed.
pub trait Backing {
    /// The page that backs `gpa`: where the byte at `gpa` lies, how many address bits around it are
    /// contiguous and alike, and whether the guest may write. `None` where there is no memory.
    fn find(&self, gpa: Gpa) -> Option<Backed>;
}

/// A piece of backed guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backed {
    /// Where the byte lies.
    pub address: Hpa,
    /// The size of the page around it, in address bits.
    pub shift: u32,
    /// Whether the guest may write.
    pub writable: bool,
}

/// A second-stage table that no hardware uses is a memory map.
impl<F: Format<Input = Gpa>, M: FrameAlloc + FrameMem> Backing for PageTable<F, M> {
    #[inline]
    fn find(&self, gpa: Gpa) -> Option<Backed> {
        let found = self.translate(gpa)?;
        let rights = self.format().rights(found.leaf.flags);
        Some(Backed {
            address: found.address,
            shift: found.leaf.shift,
            writable: rights.contains(Rights::WRITE),
        })
    }
}

impl<B: Backing + ?Sized> Backing for &B {
    #[inline]
    fn find(&self, gpa: Gpa) -> Option<Backed> {
        (**self).find(gpa)
    }
}

impl<B: Backing + ?Sized> Backing for Arc<B> {
    #[inline]
    fn find(&self, gpa: Gpa) -> Option<Backed> {
        (**self).find(gpa)
    }
}

/// What a fault on shadow tables comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The page is there now: let the guest try again.
    Resolved,
    /// The guest's own tables do not allow it: inject this, with CR2.
    Inject(PageFault),
    /// The address is not canonical: inject `#GP(0)` or `#SS(0)`.
    NonCanonical,
    /// There is no memory: a device's, to be emulated.
    NotMemory(Gpa),
    /// A write to memory whose backing does not allow it: a page that is shared or logged, to be
    /// resolved there (and then [`ShadowMmu::forget`]), or a ROM.
    ReadOnly(Gpa),
    /// A write to a table that is shadowed: emulate the instruction, then say
    /// [`ShadowMmu::written`].
    TableWrite(Gpa),
}

/// A fault that cannot be handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShadowError {
    /// No frame for a shadow table, even after the oldest ones were given up.
    #[error("no frame left for a shadow table")]
    OutOfFrames,
    /// A root for a guest that is not in long mode must lie below 4 GiB.
    #[error("the frame {0} is beyond 4 GiB, where CR3 does not reach outside long mode")]
    RootTooHigh(Hpa),
    /// The guest's tables lie outside its memory: a processor would read what the bus floats.
    #[error("no memory behind a table: {0}")]
    NoTable(MemoryFault),
    /// No table is loaded: [`ShadowMmu::load`] comes first.
    #[error("no root is loaded")]
    NotLoaded,
}

/// The root that one virtual processor runs on.
#[derive(Debug, Default)]
pub struct ShadowRoot {
    page: Option<PageId>,
}

/// The shadow tables of a guest, shared by its virtual processors under one lock.
///
/// Every call returns a token: the tables that it gave up are freed when the token has been
/// discharged, on all virtual processors, by flushing what they cache.
#[derive(Debug)]
pub struct ShadowMmu<M: FrameAlloc + FrameMem> {
    frames: M,
    pages: Pages,
    limit: usize,
    /// What a call that failed has left to be flushed: the next token takes it.
    owed: Debt,
    /// Some processor may still use a translation whose entry is gone: the guest has not
    /// invalidated it there yet.
    lingering: bool,
}

/// What a call leaves to be flushed.
#[derive(Debug, Default)]
struct Debt {
    retired: Vec<Hpa>,
    everything: bool,
}

impl Debt {
    fn take_over(&mut self, other: &mut Self) {
        self.retired.append(&mut other.retired);
        self.everything |= core::mem::take(&mut other.everything);
    }
}

impl<M: FrameAlloc + FrameMem> ShadowMmu<M> {
    /// No shadow tables yet, and at most `limit` of them (at least 16): the oldest make room.
    pub fn new(frames: M, limit: usize) -> Self {
        Self {
            frames,
            pages: Pages::default(),
            limit: limit.max(16),
            owed: Debt::default(),
            lingering: false,
        }
    }

    /// The number of shadow tables.
    pub fn tables(&self) -> usize {
        self.pages.count()
    }

    /// The number of entries that map memory.
    pub fn mapped(&self) -> usize {
        self.pages.mapped()
    }

    /// Makes the tables that `state` selects the ones that a virtual processor runs on, after a write
    /// to its CR3 or to another register that [`PagingState`] holds. The value for the hardware's
    /// CR3 comes out.
    ///
    /// Shadows of a root that was used before are still there, and are brought up to date. As the
    /// guest's own write would have, the caller drops all translations that this processor caches;
    /// what the others must drop is the token's.
    ///
    /// # Errors
    ///
    /// No frame for the root: the old root stays loaded. After [`Self::clear`] there are frames.
    pub fn load<V: GuestMemory + ?Sized>(
        &mut self,
        processor: &mut ShadowRoot,
        memory: &V,
        state: &PagingState,
    ) -> Result<Flush<'_, M, u64>, ShadowError> {
        let mut debt = Debt::default();
        self.catch_up(memory, &mut debt);
        let page = self.root(memory, state, &mut debt);
        let page = self.unless_failed(page, &mut debt)?;
        self.pages[page].pins += 1;
        self.unload(processor);
        processor.page = Some(page);
        let frame = self.pages[page].frame;
        Ok(self.settle(debt, frame.0))
    }

    fn root<V: GuestMemory + ?Sized>(
        &mut self,
        memory: &V,
        state: &PagingState,
        debt: &mut Debt,
    ) -> Result<PageId, ShadowError> {
        self.make_room(debt);
        let key = Key::root(state);
        self.keep_in_step(key, memory, debt);
        let page = self.find_or_new(key, debt)?;
        let frame = self.pages[page].frame;
        if !state.mode().is_long() && frame.0 >> 32 != 0 {
            self.give_up(page, debt);
            return Err(ShadowError::RootTooHigh(frame));
        }
        if state.mode() == Mode::Pae {
            // The four pointers come with CR3, whatever they were before.
            for index in 0..4 {
                self.drop_entry(page, index, debt);
            }
        }
        Ok(page)
    }

    /// Lets go of a virtual processor's root: it does not run again before the next load.
    pub fn unload(&mut self, processor: &mut ShadowRoot) {
        if let Some(old) = processor.page.take() {
            self.pages[old].pins -= 1;
        }
    }

    /// Handles a page fault that a virtual processor took on its shadow tables.
    ///
    /// # Errors
    ///
    /// Frames or the guest's tables are missing. After [`Self::clear`] there are frames.
    pub fn fault<V: GuestMemory + ?Sized>(
        &mut self,
        processor: &ShadowRoot,
        memory: &V,
        backing: &impl Backing,
        state: &PagingState,
        address: Gva,
        access: Access,
    ) -> Result<Flush<'_, M, Outcome>, ShadowError> {
        let root = processor.page.ok_or(ShadowError::NotLoaded)?;
        let mut debt = Debt::default();
        let outcome = match walk(memory, state, address, access) {
            Ok(found) => {
                let fault = Fault {
                    state,
                    address: address.0,
                    access,
                    found: &found,
                };
                self.resolve(root, memory, backing, &fault, &mut debt)
            }
            Err(WalkError::Fault(fault)) => Ok(Outcome::Inject(fault)),
            Err(WalkError::NonCanonical(_)) => Ok(Outcome::NonCanonical),
            Err(WalkError::NoTable(fault)) => Err(ShadowError::NoTable(fault)),
            // The guest changes its tables meanwhile: it may as well fault again.
            Err(WalkError::Contended | WalkError::SecondStage { .. }) => Ok(Outcome::Resolved),
        };
        let outcome = self.unless_failed(outcome, &mut debt)?;
        Ok(self.settle(debt, outcome))
    }

    /// Says that `len` bytes at `gpa` have been written on the guest's behalf: shadows of a table
    /// there follow. Cheap where there is none.
    pub fn written(&mut self, gpa: Gpa, len: u64) -> Flush<'_, M> {
        let mut debt = Debt::default();
        let last = gpa.0.saturating_add(len.max(1) - 1);
        for frame in gpa.0 >> 12..=last >> 12 {
            let pages: Vec<PageId> = self.pages.of_frame(frame).collect();
            for page in pages {
                let from = gpa.0.max(frame << 12) & 0xFFF;
                let to = last.min(frame << 12 | 0xFFF) & 0xFFF;
                self.table_written(page, from, to, &mut debt);
            }
        }
        self.settle(debt, ())
    }

    fn table_written(&mut self, id: PageId, from: u64, to: u64, debt: &mut Debt) {
        if !self.pages.is_live(id) {
            return;
        }
        let page = &mut self.pages[id];
        let key = page.key;
        page.writes = page.writes.saturating_add(1);
        let bytes = key.entry_bytes();
        let whole = from.is_multiple_of(bytes) && (to + 1).is_multiple_of(bytes);
        if !whole || (key.level > 1 && page.writes >= FLOOD) {
            // This is hardly a table any more.
            self.give_up(id, debt);
            return;
        }
        for number in from / bytes..=to / bytes {
            for index in key.shadows_of(number) {
                self.drop_entry(id, index, debt);
            }
        }
    }

    /// INVLPG on one virtual processor, whose cached translations of the page the caller drops.
    ///
    /// The other processors may go on with theirs until the guest invalidates there, as they
    /// might on a machine of their own; before it could do harm, a token asks for it.
    pub fn invalidate_page<V: GuestMemory + ?Sized>(
        &mut self,
        processor: &ShadowRoot,
        memory: &V,
        address: Gva,
    ) -> Flush<'_, M> {
        let mut debt = Debt::default();
        // "INVLPG also invalidates all entries in all paging-structure caches ... regardless of the
        // linear addresses to which they correspond" (SDM vol. 3A, 4.10.4.1).
        self.settle_doubts(memory, &mut debt);
        for frame in self.pages.all_released() {
            self.catch_up_frame(frame, memory, &mut debt);
        }
        let mut next = processor.page;
        while let Some(id) = next.take() {
            let page = &self.pages[id];
            let index = page.key.index(address.0);
            match page.slot(index).child {
                Child::Table(child) => next = Some(child),
                Child::Memory(_) => self.drop_entry(id, index, &mut debt),
                Child::Absent => {}
            }
        }
        self.settle(debt, ())
    }

    /// Gives up what shadows the guest's table at `gpa`, and lets the guest write there unseen
    /// until it loads CR3: for an instruction that cannot be emulated, and for the delivery of an
    /// event. `false` if nothing there was shadowed.
    pub fn release(&mut self, gpa: Gpa) -> Flush<'_, M, bool> {
        let mut debt = Debt::default();
        let frame = gpa.0 >> 12;
        let pages: Vec<PageId> = self.pages.of_frame(frame).collect();
        for page in &pages {
            self.give_up(*page, &mut debt);
        }
        if !pages.is_empty() {
            // The write may itself go through this table, which then is shadowed again at once.
            self.pages.release(frame);
        }
        self.settle(debt, !pages.is_empty())
    }

    /// Takes every mapping of this guest memory out, before its backing changes.
    pub fn forget(&mut self, gpa: Gpa, len: u64) -> Flush<'_, M> {
        let mut debt = Debt::default();
        let last = gpa.0.saturating_add(len.max(1) - 1);
        while let Some((page, index)) = self.pages.mapping_in(gpa.0 >> 12, last >> 12) {
            self.drop_entry(page, index, &mut debt);
        }
        debt.everything = self.lingering;
        self.settle(debt, ())
    }

    /// Takes everything out. Roots that are loaded stay, empty.
    pub fn clear(&mut self) -> Flush<'_, M> {
        let mut debt = Debt {
            everything: true,
            ..Debt::default()
        };
        for page in self.pages.by_age() {
            self.give_up(page, &mut debt);
        }
        self.settle(debt, ())
    }

    /// Keeps what a failed call has given up for the next token.
    fn unless_failed<T>(
        &mut self,
        result: Result<T, ShadowError>,
        debt: &mut Debt,
    ) -> Result<T, ShadowError> {
        if result.is_err() {
            self.owed.take_over(debt);
        }
        result
    }

    fn settle<T>(&mut self, mut debt: Debt, value: T) -> Flush<'_, M, T> {
        debt.take_over(&mut self.owed);
        // The guest's roots share tables, so that no single root names what is stale.
        let mut flush = Flush::new(&self.frames, Hpa::ZERO, 0xF << 52, 0, value);
        if debt.everything || !debt.retired.is_empty() {
            self.lingering = false;
            flush.cover(0, u64::MAX, false);
        }
        for table in debt.retired {
            flush.retire(table);
        }
        flush
    }
}
