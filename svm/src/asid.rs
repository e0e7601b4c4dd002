//! Address-space identifiers: allocation and flushes (APM vol. 2, 15.16).
//!
//! Translations of a guest are tagged with its ASID, so that entries and exits need not flush.
//! Each processor hands out its own ASIDs from an [`AsidPool`]; each guest context (a vCPU; a nested
//! guest is another context) keeps an [`AsidSlot`]. Before every entry [`AsidPool::assign`] says
//! which ASID to run with and what VMRUN must flush.
//!
//! A pool never takes ASIDs back. When it runs out, it starts a new generation: one flush of
//! everything, and every context gets a new ASID at its next entry. So a stale translation cannot
//! be met: an ASID is never given to two contexts in one generation.

use core::num::NonZeroU32;

use crate::caps::{Features, SvmCaps};
use crate::vmcb::{TlbControl, Vmcb};

/// An ASID of a guest. 0 is the host's, so it is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asid(NonZeroU32);

impl Asid {
    /// The ASID with this number; `None` for 0.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    #[inline]
    pub const fn number(self) -> u32 {
        self.0.get()
    }
}

/// The ASIDs of one processor.
///
/// ```
/// use testudo_svm::asid::{AsidPool, AsidSlot};
/// use testudo_svm::caps::SvmCaps;
/// use testudo_svm::vmcb::TlbControl;
///
/// let mut pool = AsidPool::new(0, &SvmCaps::ZEN2);
/// let mut guest = AsidSlot::new();
/// let (first, control) = pool.assign(&mut guest);
/// assert_eq!(control, TlbControl::FlushAll); // whoever used SVM before us
/// assert_eq!(pool.assign(&mut guest), (first, TlbControl::DoNothing));
/// guest.flush();
/// assert_eq!(pool.assign(&mut guest), (first, TlbControl::FlushAsid));
/// ```
#[derive(Clone, Debug)]
pub struct AsidPool {
    processor: u32,
    generation: u64,
    next: u32,
    last: u32,
    flush_by_asid: bool,
}

/// What one guest context has: its ASID, on which processor and of which generation, and the flush
/// it owes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsidSlot {
    processor: u32,
    generation: u64,
    asid: u32,
    pending: Pending,
}

/// The flush that a context owes, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Pending {
    Nothing,
    NonGlobal,
    Everything,
}

impl AsidPool {
    /// The pool of processor number `processor`, which must differ between processors.
    pub const fn new(processor: u32, caps: &SvmCaps) -> Self {
        // ASIDs run from 0 to NASID - 1. A processor that claims fewer than two has one guest ASID
        // all the same: SVM without any is unusable.
        let last = match caps.asid_count {
            0 | 1 => 1,
            count => count - 1,
        };
        Self {
            processor,
            // Slots begin with generation 0, which no pool ever has.
            generation: 1,
            // The pool is empty, so that the first guest starts a generation, with its flush.
            next: last + 1,
            last,
            flush_by_asid: caps.has(Features::FLUSH_BY_ASID),
        }
    }

    /// The ASID that the context is to run with next on this pool's processor, and what VMRUN must
    /// flush. The answer must be used: the flush is not asked for again.
    #[inline]
    #[must_use]
    pub fn assign(&mut self, slot: &mut AsidSlot) -> (Asid, TlbControl) {
        let current = slot.generation == self.generation && slot.processor == self.processor;
        if current && slot.pending == Pending::Nothing {
            return (slot.current(), TlbControl::DoNothing);
        }
        self.assign_slowly(slot, current)
    }

    /// [`Self::assign`] straight into the VMCB: the ASID only if it changes, so that its clean bit
    /// survives, and TLB_CONTROL.
    #[inline]
    pub fn prepare(&mut self, slot: &mut AsidSlot, vmcb: &mut Vmcb) {
        let (asid, control) = self.assign(slot);
        if vmcb.asid() != asid.number() {
            vmcb.set_asid(asid.number());
        }
        vmcb.set_tlb_control(control);
    }

    #[cold]
    fn assign_slowly(&mut self, slot: &mut AsidSlot, current: bool) -> (Asid, TlbControl) {
        let pending = core::mem::replace(&mut slot.pending, Pending::Nothing);
        if current && self.flush_by_asid {
            let control = match pending {
                Pending::Nothing => TlbControl::DoNothing,
                Pending::NonGlobal => TlbControl::FlushAsidNonGlobal,
                Pending::Everything => TlbControl::FlushAsid,
            };
            return (slot.current(), control);
        }
        // A new ASID has no translations: as good as a flush, and cheaper than one of everything.
        let mut control = TlbControl::DoNothing;
        if self.next > self.last {
            self.generation += 1;
            self.next = 1;
            control = TlbControl::FlushAll;
        }
        *slot = AsidSlot {
            processor: self.processor,
            generation: self.generation,
            asid: self.next,
            pending: Pending::Nothing,
        };
        self.next += 1;
        (slot.current(), control)
    }
}

impl AsidSlot {
    /// A context that has run nowhere yet.
    pub const fn new() -> Self {
        Self {
            processor: 0,
            generation: 0,
            asid: 1,
            pending: Pending::Nothing,
        }
    }

    /// Asks for all translations of this context to be flushed before it runs again: due when its
    /// nested page table lost a permission or a page, and when its guest invalidated everything.
    #[inline]
    pub fn flush(&mut self) {
        self.pending = Pending::Everything;
    }

    /// Asks for the non-global translations to be flushed: what a guest's write of CR3 means.
    #[inline]
    pub fn flush_non_global(&mut self) {
        self.pending = self.pending.max(Pending::NonGlobal);
    }

    /// Whether a flush is owed.
    #[inline]
    pub fn is_flush_pending(&self) -> bool {
        self.pending != Pending::Nothing
    }

    #[inline]
    fn current(&self) -> Asid {
        // `asid` starts at 1 and only ever gets numbers of a pool, which start at 1.
        Asid(NonZeroU32::new(self.asid).unwrap_or(NonZeroU32::MIN))
    }
}

impl Default for AsidSlot {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmcb::CleanBits;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::vec::Vec;

    #[test]
    fn without_flush_by_asid_a_flush_is_a_new_asid() {
        let mut pool = AsidPool::new(0, &SvmCaps::BARCELONA);
        let mut slot = AsidSlot::new();
        let (first, control) = pool.assign(&mut slot);
        assert_eq!((first.number(), control), (1, TlbControl::FlushAll));
        slot.flush();
        let (second, control) = pool.assign(&mut slot);
        assert_eq!((second.number(), control), (2, TlbControl::DoNothing));
    }

    #[test]
    fn the_strongest_flush_wins() {
        let mut pool = AsidPool::new(0, &SvmCaps::ZEN2);
        let mut slot = AsidSlot::new();
        let _ = pool.assign(&mut slot);
        slot.flush_non_global();
        assert_eq!(pool.assign(&mut slot).1, TlbControl::FlushAsidNonGlobal);
        slot.flush();
        slot.flush_non_global();
        assert!(slot.is_flush_pending());
        assert_eq!(pool.assign(&mut slot).1, TlbControl::FlushAsid);
        assert!(!slot.is_flush_pending());
    }

    #[test]
    fn another_processor_means_another_asid() {
        let mut first = AsidPool::new(0, &SvmCaps::ZEN2);
        let mut second = AsidPool::new(1, &SvmCaps::ZEN2);
        let (mut a, mut b) = (AsidSlot::new(), AsidSlot::new());
        let _ = (first.assign(&mut a), second.assign(&mut b));
        // Number 1 there belongs to `b`; the same generation number must not fool it.
        let (moved, control) = second.assign(&mut a);
        assert_eq!((moved.number(), control), (2, TlbControl::DoNothing));
        // And back again: what the first processor still caches under the old number is not used.
        let (back, _) = first.assign(&mut a);
        assert_eq!(back.number(), 2);
    }

    #[test]
    fn preparing_keeps_the_clean_bit_where_nothing_changes() {
        let mut pool = AsidPool::new(0, &SvmCaps::ZEN2);
        let (mut slot, mut vmcb) = (AsidSlot::new(), Vmcb::new());
        pool.prepare(&mut slot, &mut vmcb);
        assert_eq!((vmcb.asid(), vmcb.tlb_control()), (1, TlbControl::FlushAll));
        vmcb.mark_clean();
        pool.prepare(&mut slot, &mut vmcb);
        assert_eq!(vmcb.tlb_control(), TlbControl::DoNothing);
        assert!(vmcb.clean().contains(CleanBits::ASID));
    }

    #[test]
    fn a_processor_without_asids_still_works() {
        let mut pool = AsidPool::new(
            0,
            &SvmCaps {
                asid_count: 0,
                ..SvmCaps::BARCELONA
            },
        );
        let (mut a, mut b) = (AsidSlot::new(), AsidSlot::new());
        for _ in 0..3 {
            let (asid, control) = pool.assign(&mut a);
            assert_eq!((asid.number(), control), (1, TlbControl::FlushAll));
            let (asid, control) = pool.assign(&mut b);
            assert_eq!((asid.number(), control), (1, TlbControl::FlushAll));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Enter { guest: usize, processor: usize },
        Flush { guest: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..6, 0usize..2).prop_map(|(guest, processor)| Step::Enter { guest, processor }),
            1 => (0usize..6).prop_map(|guest| Step::Flush { guest }),
        ]
    }

    proptest! {
        /// A model of the TLBs: which version of which guest's tables each tag may have cached.
        /// No guest ever meets a translation of another guest, or its own from before a flush.
        #[test]
        fn no_stale_translation_is_ever_met(
            steps in proptest::collection::vec(step(), 1..200),
            asid_count in 2u32..6,
            by_asid: bool,
        ) {
            let features = if by_asid { Features::FLUSH_BY_ASID } else { Features::empty() };
            let caps = SvmCaps { asid_count, features, ..SvmCaps::BARCELONA };
            let mut pools: Vec<_> = (0..2).map(|n| AsidPool::new(n, &caps)).collect();
            let mut slots: Vec<_> = (0..6).map(|_| AsidSlot::new()).collect();
            let mut versions = [0u32; 6];
            let mut tlbs: Vec<HashMap<u32, Vec<(usize, u32)>>> = (0..2).map(|_| HashMap::new()).collect();
            // Before us, somebody else used every tag.
            for tlb in &mut tlbs {
                for asid in 0..asid_count {
                    tlb.insert(asid, [(usize::MAX, 0)].into());
                }
            }
            for step in steps {
                match step {
                    Step::Flush { guest } => {
                        versions[guest] += 1;
                        slots[guest].flush();
                    }
                    Step::Enter { guest, processor } => {
                        let (asid, control) = pools[processor].assign(&mut slots[guest]);
                        let asid = asid.number();
                        prop_assert!(asid < asid_count);
                        let tlb = &mut tlbs[processor];
                        match control {
                            TlbControl::FlushAll => tlb.clear(),
                            TlbControl::FlushAsid => {
                                prop_assert!(by_asid);
                                tlb.remove(&asid);
                            }
                            other => prop_assert_eq!(other, TlbControl::DoNothing),
                        }
                        let entries = tlb.entry(asid).or_default();
                        for &(owner, version) in entries.iter() {
                            prop_assert_eq!((owner, version), (guest, versions[guest]));
                        }
                        entries.push((guest, versions[guest]));
                    }
                }
            }
        }
    }
}
