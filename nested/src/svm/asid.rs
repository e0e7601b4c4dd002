//! L1's address-space identifiers on the processor's.
//!
//! L1 tags the translations of its guests with any identifiers it likes. The processor's are few
//! and shared with others, so each vCPU has a handful of contexts for L2 guests, and this table
//! says which of L1's identifiers has which. A translation is never used under an identifier that
//! L1 did not give it: a context that changes hands, or that L1 flushed, is flushed before its next
//! use.

use testudo_svm::asid::AsidSlot;

/// How many of L1's identifiers keep their translations at the same time, on one vCPU.
const CONTEXTS: usize = 4;

/// One context of the processor's translations, and whose it is.
#[derive(Clone, Debug, Default)]
struct Context {
    /// L1's identifier; 0, which is L1's own, when nobody has the context.
    l1: u32,
    slot: AsidSlot,
}

/// The table of one vCPU.
#[derive(Clone, Debug, Default)]
pub(super) struct Asids {
    contexts: [Context; CONTEXTS],
    current: usize,
    /// The context to be reused next.
    oldest: usize,
}

impl Asids {
    /// Makes the context of L1's `asid` the current one. Says whether it had none, so that
    /// nothing is cached under it.
    #[inline]
    pub(super) fn activate(&mut self, asid: u32) -> bool {
        self.contexts[self.current].l1 != asid && self.switch(asid)
    }

    #[cold]
    fn switch(&mut self, asid: u32) -> bool {
        if let Some(index) = self.contexts.iter().position(|c| c.l1 == asid) {
            self.current = index;
            return false;
        }
        self.current = self.oldest;
        self.oldest = (self.oldest + 1) % CONTEXTS;
        let context = &mut self.contexts[self.current];
        context.l1 = asid;
        context.slot.flush();
        true
    }

    /// What the current context has of the processor.
    #[inline]
    pub(super) fn current_mut(&mut self) -> &mut AsidSlot {
        &mut self.contexts[self.current].slot
    }

    /// L1 flushed one of its identifiers.
    pub(super) fn flush(&mut self, asid: u32) {
        for context in self.contexts.iter_mut().filter(|c| c.l1 == asid) {
            context.slot.flush();
        }
    }

    /// Everything is stale: L1 flushed all, or a table below L1's changed.
    pub(super) fn flush_all(&mut self) {
        for context in &mut self.contexts {
            context.slot.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use testudo_svm::SvmCaps;
    use testudo_svm::asid::AsidPool;
    use testudo_svm::vmcb::TlbControl;

    proptest! {
        /// Whatever happens, translations that are used without a flush were made for the same
        /// identifier of L1, which was not flushed since.
        #[test]
        fn no_translation_leaks(steps in prop::collection::vec((0u8..4, 1u32..8), 0..64)) {
            let mut asids = Asids::default();
            let mut pool = AsidPool::new(0, &SvmCaps::ZEN2);
            let mut owner = HashMap::new();
            for (kind, asid) in steps {
                match kind {
                    0 => {
                        asids.flush(asid);
                        owner.retain(|_, o| *o != asid);
                    }
                    1 => {
                        asids.flush_all();
                        owner.clear();
                    }
                    _ => {
                        asids.activate(asid);
                        let (hardware, control) = pool.assign(asids.current_mut());
                        match control {
                            TlbControl::FlushAll => owner.clear(),
                            TlbControl::FlushAsid => { owner.remove(&hardware); }
                            _ => {}
                        }
                        let before = owner.insert(hardware, asid);
                        prop_assert!(before.is_none_or(|o| o == asid));
                    }
                }
            }
        }
    }

    #[test]
    fn an_identifier_that_stays_keeps_its_translations() {
        let mut asids = Asids::default();
        assert!(asids.activate(1));
        let mut pool = AsidPool::new(0, &SvmCaps::ZEN2);
        let (first, _) = pool.assign(asids.current_mut());
        assert!(asids.activate(2));
        let (second, _) = pool.assign(asids.current_mut());
        assert!(!asids.activate(1));
        assert_ne!(first, second);
        assert_eq!(
            pool.assign(asids.current_mut()),
            (first, TlbControl::DoNothing)
        );
    }
}
