//! The compositions of one vCPU: L1's second-stage tables, each composed with L0's.

use alloc::vec::Vec;
use core::convert::Infallible;

use testudo_arch::{FrameAlloc, FrameMem, Gpa, GuestMemory, Hpa, PageSize};
use testudo_ept::compose::{ComposeFault, Composed, Filled};
use testudo_ept::format::Format;
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::{Flush, Invalidate, PageTable, Rights};

/// How many of L1's tables keep their composition: one for each of its guests, usually.
pub(crate) const TABLES: usize = 4;

/// Compositions by what identifies L1's table. What was found in L1's table stays until L1 flushes,
/// as in a TLB.
#[derive(Debug)]
pub(crate) struct Compositions<K, F: Format<Input = Gpa>, P: FrameAlloc + FrameMem, I> {
    tables: Vec<(K, Composed<F, P>)>,
    /// Which of them runs.
    current: usize,
    /// Which of them goes when another one comes.
    oldest: usize,
    processors: I,
}

/// Why an access of L2 has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// By L1's table.
    ByL1(TableFault),
    /// L0 maps nothing, or not for this use, at this address of L1's.
    ByL0(Gpa),
}

impl<K, F, P, I> Compositions<K, F, P, I>
where
    K: PartialEq + Copy,
    F: Format<Input = Gpa>,
    P: FrameAlloc + FrameMem,
    I: Invalidate<Error = Infallible>,
{
    pub(crate) const fn new(processors: I) -> Self {
        Self {
            tables: Vec::new(),
            current: 0,
            oldest: 0,
            processors,
        }
    }

    /// The table of L1's that is current.
    #[inline]
    pub(crate) fn current(&self) -> Option<K> {
        self.tables.get(self.current).map(|(key, _)| *key)
    }

    /// Makes the composition of a table of L1's current and returns its root. `make` gives an empty
    /// one; without frames for it, the oldest is used again.
    #[inline]
    pub(crate) fn activate(
        &mut self,
        key: K,
        make: impl FnOnce() -> Option<Composed<F, P>>,
    ) -> Option<Hpa> {
        if self.current() != Some(key) {
            match self.tables.iter().position(|(k, _)| *k == key) {
                Some(index) => self.current = index,
                None => self.add(key, make)?,
            }
        }
        let (_, composed) = self.tables.get(self.current)?;
        Some(composed.table().root())
    }

    #[cold]
    fn add(&mut self, key: K, make: impl FnOnce() -> Option<Composed<F, P>>) -> Option<()> {
        if self.tables.len() < TABLES
            && let Some(composed) = make()
        {
            self.current = self.tables.len();
            self.tables.push((key, composed));
            return Some(());
        }
        let index = self.oldest;
        let (owner, composed) = self.tables.get_mut(index)?;
        *owner = key;
        empty(composed, &mut self.processors);
        self.current = index;
        self.oldest = (index + 1) % self.tables.len();
        Some(())
    }

    /// Drops what was made of those of L1's tables that `which` names.
    pub(crate) fn flush(&mut self, which: impl Fn(&K) -> bool) {
        for (key, composed) in &mut self.tables {
            if which(key) {
                empty(composed, &mut self.processors);
            }
        }
    }

    /// Drops what was made of these addresses of L1's: L0 changed its own table there.
    pub(crate) fn forget_inner(&mut self, start: Gpa, len: u64) {
        for (_, composed) in &mut self.tables {
            composed
                .forget_inner(start, len)
                .discharge(&mut self.processors);
        }
    }

    /// Makes the translation of an access under the current composition, if both tables let it.
    pub(crate) fn fill<M: GuestMemory + ?Sized, N: FrameAlloc + FrameMem>(
        &mut self,
        outer: &GuestTable<'_, F, M>,
        inner: &PageTable<F, N>,
        gpa: Gpa,
        access: Rights,
    ) -> Result<(), Stopped> {
        let filled = self.fill_by(gpa, |composed| composed.fill(outer, inner, gpa, access));
        filled.unwrap_or_else(|| match outer.translate(gpa, access) {
            Ok(page) => Err(Stopped::ByL0(page.gpa)),
            Err(why) => Err(Stopped::ByL1(why)),
        })
    }

    /// As [`Self::fill`], where L2's addresses are L1's.
    pub(crate) fn fill_plain<N: FrameAlloc + FrameMem>(
        &mut self,
        inner: &PageTable<F, N>,
        gpa: Gpa,
        access: Rights,
        largest: PageSize,
    ) -> Result<(), Stopped> {
        let filled = self.fill_by(gpa, |composed| {
            composed.fill_plain(inner, gpa, access, largest)
        });
        filled.unwrap_or(Err(Stopped::ByL0(gpa)))
    }

    /// `None`: there are no frames even so, and L0 makes the access itself.
    fn fill_by(
        &mut self,
        gpa: Gpa,
        fill: impl Fn(&mut Composed<F, P>) -> Result<Flush<'_, P, Filled>, ComposeFault>,
    ) -> Option<Result<(), Stopped>> {
        let Some((_, composed)) = self.tables.get_mut(self.current) else {
            return Some(Err(Stopped::ByL0(gpa)));
        };
        // Twice at the most: the second time with all the room there is.
        for _ in 0..2 {
            match fill(composed) {
                Ok(filled) => {
                    filled.discharge(&mut self.processors);
                    return Some(Ok(()));
                }
                // L1 changes the entries under the walk: L2 tries again.
                Err(ComposeFault::Outer(TableFault::Contended)) => return Some(Ok(())),
                Err(ComposeFault::Outer(why)) => return Some(Err(Stopped::ByL1(why))),
                Err(
                    ComposeFault::InnerAbsent { middle, .. }
                    | ComposeFault::InnerDenied { middle, .. },
                ) => return Some(Err(Stopped::ByL0(middle))),
                Err(_) => composed.clear().discharge(&mut self.processors),
            }
        }
        None
    }

    /// What the processor walks.
    #[cfg(test)]
    pub(crate) fn table(&self) -> &PageTable<F, P> {
        self.tables[self.current].1.table()
    }

    /// Gives all frames back. L2 must not run on these tables any more.
    pub(crate) fn destroy(self) {
        let mut processors = self.processors;
        for (_, composed) in self.tables {
            match composed.destroy(&mut processors) {
                Ok(_) => {}
                Err((_, never)) => match never {},
            }
        }
    }
}

fn empty<F: Format<Input = Gpa>, P: FrameAlloc + FrameMem>(
    composed: &mut Composed<F, P>,
    processors: &mut impl Invalidate<Error = Infallible>,
) {
    if !composed.is_empty() {
        composed.clear().discharge(processors);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::svm::{self, NestedFault, NestedTable};
    use crate::test_memory::Memory;
    use crate::vmx::{self, EptFault, EptHandled};
    use core::cell::Cell;
    use proptest::prelude::*;
    use testudo_ept::format::ept::Ept;
    use testudo_ept::format::npt::{Npt, NptFlags};
    use testudo_ept::{FramePool, Invalidation};
    use testudo_svm::exit::{NestedFaultBits, NestedPageFault};

    /// A processor that counts what it is told to forget.
    #[derive(Clone, Copy, Debug)]
    struct Processor<'a>(&'a Cell<usize>);

    #[allow(unsafe_code, reason = "no processor walks the tables of a test")]
    // SAFETY: nothing caches translations here.
    unsafe impl Invalidate for Processor<'_> {
        type Error = Infallible;
        fn invalidate(&mut self, _: &Invalidation) -> Result<(), Infallible> {
            self.0.set(self.0.get() + 1);
            Ok(())
        }
    }

    /// Where L0 has L1's memory, and how much of it L1 has.
    const BACKING: u64 = 0x4_0000_0000;
    const MAPPED: u64 = 0x8_0000;

    /// L1's table at 0x1000 maps its guest's addresses from 0 on, by entries at 0x4000.
    fn l1_tables(memory: &Memory, link: u64) {
        for (at, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000u64)] {
            memory.store_u64(Gpa(at), next | link).unwrap();
        }
    }

    fn npt_fault(gpa: u64, bits: NestedFaultBits) -> NestedPageFault {
        NestedPageFault {
            gpa: Gpa(gpa),
            bits: bits | NestedFaultBits::FINAL | NestedFaultBits::USER,
        }
    }

    fn npt_l0(pool: &FramePool) -> PageTable<Npt, &FramePool> {
        let table = PageTable::new(Npt::new(48), pool).unwrap();
        let flags = NptFlags::WRITABLE | NptFlags::ACCESSED | NptFlags::DIRTY;
        table.map(Gpa(0), MAPPED, Hpa(BACKING), flags).unwrap();
        table
    }

    fn ept_l0(pool: &FramePool, bytes: u64) -> PageTable<Ept, &FramePool> {
        let table = PageTable::new(Ept::new(48), pool).unwrap();
        let flags = table.format().flags(Rights::all()).unwrap();
        table.map(Gpa(0), bytes, Hpa(BACKING), flags).unwrap();
        table
    }

    fn ept_stage<'a>(
        memory: &'a Memory,
        inner: &'a PageTable<Ept, &'a FramePool>,
        pool: &'a FramePool,
        count: &'a Cell<usize>,
    ) -> vmx::ComposedStage<'a, Memory, &'a FramePool, &'a FramePool, Processor<'a>> {
        let parts = vmx::ComposedParts {
            memory,
            inner,
            frames: pool,
            format: *inner.format(),
            l1_format: *inner.format(),
            page_limit: 100,
        };
        vmx::ComposedStage::new(parts, Processor(count))
    }

    const TABLE: NestedTable = NestedTable {
        root: Gpa(0x1000),
        cr4: 0x20,
        efer: 0xD00,
        asid: 1,
    };

    #[test]
    fn npt_faults_go_to_whom_they_belong() {
        use NestedFaultBits as B;
        use svm::SecondStage;
        let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
        l1_tables(&memory, 7);
        memory.store_u64(Gpa(0x4000), 0x9000 | 7).unwrap();
        memory.store_u64(Gpa(0x4008), 0xA000 | 5).unwrap();
        memory.store_u64(Gpa(0x4010), 0xFEC0_0000 | 7).unwrap();
        memory.store_u64(Gpa(0x4018), 1 << 51 | 7).unwrap();
        let inner = npt_l0(&pool);
        let parts = svm::ComposedParts {
            memory: &memory,
            inner: &inner,
            frames: &pool,
            format: Npt::new(48),
            l1_format: Npt::new(48),
            page_limit: 100,
        };
        let mut stage = svm::ComposedStage::new(parts, Processor(&count));
        let root = stage.activate(TABLE).unwrap();
        assert_eq!(stage.activate(TABLE), Some(root));
        let legacy = NestedTable { efer: 0, ..TABLE };
        assert_eq!(stage.activate(legacy), None);

        assert_eq!(
            stage.fault(npt_fault(0x123, B::WRITE)),
            NestedFault::Resolved
        );
        assert_eq!(stage.translate(Gpa(0x123), false), Some(Gpa(0x9123)));
        // Not present; not writable; not L0's memory; reserved bits.
        let absent = npt_fault(0x5000, B::empty());
        assert_eq!(stage.fault(absent), NestedFault::Reflect(absent));
        let denied = npt_fault(0x1000, B::WRITE);
        assert_eq!(stage.translate(denied.gpa, true), None);
        assert!(stage.translate(denied.gpa, false).is_some());
        let NestedFault::Reflect(seen) = stage.fault(denied) else {
            panic!("{denied:?}")
        };
        assert_eq!(seen, npt_fault(0x1000, B::WRITE | B::PRESENT));
        assert_eq!(
            stage.fault(npt_fault(0x2008, B::empty())),
            NestedFault::Host(Gpa(0xFEC0_0008))
        );
        let NestedFault::Reflect(seen) = stage.fault(npt_fault(0x3000, B::empty())) else {
            panic!("reserved bits are L1's fault")
        };
        assert!(seen.bits.contains(B::PRESENT | B::RESERVED));

        // What L1 flushes is looked up again.
        memory.store_u64(Gpa(0x4000), 0xB000 | 7).unwrap();
        let before = count.get();
        stage.flush(Some(1));
        assert!(count.get() > before);
        assert_eq!(
            stage.fault(npt_fault(0x123, B::WRITE)),
            NestedFault::Resolved
        );
        assert_eq!(stage.translate(Gpa(0x123), false), Some(Gpa(0xB123)));
        stage.destroy();
    }

    #[test]
    fn a_flush_concerns_the_address_spaces_that_it_names() {
        use NestedFaultBits as B;
        use svm::SecondStage;
        let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
        l1_tables(&memory, 7);
        // A second table, which shares the lower levels.
        memory.store_u64(Gpa(0x8000), 0x2007).unwrap();
        let inner = npt_l0(&pool);
        let parts = svm::ComposedParts {
            memory: &memory,
            inner: &inner,
            frames: &pool,
            format: Npt::new(48),
            l1_format: Npt::new(48),
            page_limit: 100,
        };
        let mut stage = svm::ComposedStage::new(parts, Processor(&count));
        let of = |root, asid| NestedTable {
            root: Gpa(root),
            asid,
            ..TABLE
        };
        let entry = Cell::new(0x9007);
        // What L2 reaches at address 0 in this address space, through what is derived already.
        let mut reaches = |flush: Option<Option<u32>>, root, asid| {
            memory.store_u64(Gpa(0x4000), entry.get()).unwrap();
            if let Some(flush) = flush {
                stage.flush(flush);
            }
            stage.activate(of(root, asid)).unwrap();
            let there = |stage: &svm::ComposedStage<_, _, _, _>| {
                let found = stage.tables_for_test().translate(Gpa(0));
                found.map(|found| found.address.0 - BACKING)
            };
            there(&stage).unwrap_or_else(|| {
                let handled = stage.fault(npt_fault(0, B::WRITE));
                assert_eq!(handled, NestedFault::Resolved);
                there(&stage).unwrap()
            })
        };
        assert_eq!(reaches(None, 0x1000, 1), 0x9000);
        assert_eq!(reaches(None, 0x8000, 2), 0x9000);
        // Nobody flushed: both may go on with what they have.
        entry.set(0xA007);
        assert_eq!(reaches(None, 0x1000, 1), 0x9000);
        assert_eq!(reaches(None, 0x8000, 2), 0x9000);
        assert_eq!(reaches(Some(Some(1)), 0x1000, 1), 0xA000);
        assert_eq!(reaches(None, 0x8000, 2), 0x9000, "that of another guest");
        // A new identifier on a table that another one has used.
        entry.set(0xB007);
        assert_eq!(reaches(None, 0x8000, 3), 0xB000);
        entry.set(0xC007);
        assert_eq!(reaches(None, 0x8000, 2), 0xB000, "both stay on it");
        assert_eq!(reaches(None, 0x8000, 3), 0xB000);
        // One that was flushed and has not run since finds the table as it is, though the other one
        // has derived it in between.
        assert_eq!(reaches(Some(Some(2)), 0x8000, 3), 0xC000);
        entry.set(0xD007);
        assert_eq!(reaches(None, 0x8000, 2), 0xD000);
        // More users than are remembered, and more tables.
        for asid in 4..20 {
            entry.set(0x9007 | u64::from(asid & 1) << 12);
            assert_eq!(reaches(None, 0x8000, asid), entry.get() - 7);
        }
        entry.set(0xE007);
        assert_eq!(reaches(None, 0x8000, 2), 0xE000);
        entry.set(0xF007);
        assert_eq!(reaches(Some(None), 0x8000, 2), 0xF000);
        assert_eq!(reaches(None, 0x1000, 1), 0xF000);
        stage.destroy();
    }

    /// The processor is given none that L0 has not mapped for L1 to read and write.
    #[test]
    fn a_frame_is_one_of_l1s_own_to_write() {
        use vmx::SecondStage;
        let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
        memory.store_u64(Gpa(0x9000), 0x1234).unwrap();
        let inner = ept_l0(&pool, MAPPED);
        let only = inner.protect(Gpa(0xA000), 0x1000, Rights::all() - Rights::WRITE);
        only.unwrap().discharge(&mut Processor(&count));
        let mut stage = ept_stage(&memory, &inner, &pool, &count);
        assert_eq!(stage.frame(Gpa(0x9000)), Some(Hpa(BACKING + 0x9000)));
        assert_eq!(memory.load_u64(Gpa(0x9000)), Ok(0x1234));
        // Not writable in L0's table; not in it; no memory, though it is.
        assert_eq!(stage.frame(Gpa(0xA000)), None);
        assert_eq!(stage.frame(Gpa(MAPPED)), None);
        memory.read_only_from.set(0x7_0000);
        assert_eq!(stage.frame(Gpa(0x7_0000)), None);
        assert_eq!(stage.frame(Gpa(0xFEE0_0000)), None);
        stage.destroy();
    }

    #[test]
    fn ept_faults_go_to_whom_they_belong() {
        use vmx::SecondStage;
        let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
        l1_tables(&memory, 7);
        let write_back = 6 << 3;
        memory
            .store_u64(Gpa(0x4000), 0x9000 | write_back | 7)
            .unwrap();
        memory
            .store_u64(Gpa(0x4008), 0xA000 | write_back | 1)
            .unwrap();
        memory
            .store_u64(Gpa(0x4010), 0xFEC0_0000 | write_back | 7)
            .unwrap();
        // Writable but not readable.
        memory
            .store_u64(Gpa(0x4018), 0x9000 | write_back | 2)
            .unwrap();
        let inner = ept_l0(&pool, MAPPED);
        let mut stage = ept_stage(&memory, &inner, &pool, &count);
        let pointer = stage.activate(0x101E).unwrap();
        assert_ne!(pointer & !0xFFF, 0x1000);
        let fault = |gpa, qualification| EptFault {
            gpa: Gpa(gpa),
            qualification,
        };
        assert_eq!(stage.fault(fault(0x10, 0x181)), EptHandled::Resolved);
        assert_eq!(stage.translate(Gpa(0x10), false), Some(Gpa(0x9010)));
        assert_eq!(
            stage.fault(fault(0x5000, 0x181)),
            EptHandled::Violation(0x181)
        );
        assert_eq!(
            stage.fault(fault(0x1000, 0x182)),
            EptHandled::Violation(0x18A)
        );
        assert_eq!(
            stage.fault(fault(0x2000, 0x181)),
            EptHandled::Host(Gpa(0xFEC0_0000))
        );
        assert_eq!(
            stage.fault(fault(0x3000, 0x181)),
            EptHandled::Misconfiguration
        );
        // INVEPT of another context leaves it, of this one drops it.
        let before = count.get();
        stage.flush(Some(0x201E));
        assert_eq!(count.get(), before);
        stage.flush(Some(0x101E));
        assert!(count.get() > before);
        stage.destroy();
    }

    #[test]
    fn a_page_is_alone_where_l1_has_no_table() {
        use vmx::SecondStage;
        const LARGE: u64 = 1 << 21;
        let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
        let inner = ept_l0(&pool, 4 * LARGE);
        let mut stage = ept_stage(&memory, &inner, &pool, &count);
        let alone = Gpa(LARGE + 0x5000);
        let pointer = stage.activate_plain(alone).unwrap();
        assert_ne!(stage.activate(0x101E).unwrap(), pointer);
        assert_eq!(stage.activate_plain(alone), Some(pointer));
        let mut reach = |gpa| {
            let fault = EptFault {
                gpa: Gpa(gpa),
                qualification: 0x182,
            };
            let handled = stage.fault(fault);
            assert_eq!(stage.translate(Gpa(gpa), true), Some(Gpa(gpa)));
            let found = stage.tables_for_test().translate(Gpa(gpa));
            (
                handled,
                found.map(|found| (found.address.0 - BACKING, found.leaf.shift)),
            )
        };
        // It, and what is in the same large page; what is in another; what is no memory.
        let resolved = EptHandled::Resolved;
        for at in [alone.0, alone.0 + 0x1008, LARGE] {
            assert_eq!(reach(at), (resolved, Some((at, 12))));
        }
        for at in [0x123, 2 * LARGE + 0x5000] {
            assert_eq!(reach(at), (resolved, Some((at, 21))));
        }
        let outside = 4 * LARGE;
        assert_eq!(reach(outside), (EptHandled::Host(Gpa(outside)), None));
        // L0 takes a page away, and it is gone here.
        let gone = inner.unmap(alone, 0x1000).unwrap();
        stage.forget_inner(alone, 0x1000);
        gone.discharge(&mut Processor(&count));
        assert!(stage.tables_for_test().translate(alone).is_none());
        stage.destroy();
    }

    proptest! {
        /// No host-physical address is reachable that L0 did not map for L1, whatever L1's table
        /// says and however it changes, and the work stays bounded when frames run out.
        #[test]
        fn no_address_outside_l1s_memory(
            steps in prop::collection::vec((0u64..32, any::<u64>(), any::<bool>(), 0u64..512), 1..60),
            frames in 12usize..24,
        ) {
            use svm::SecondStage;
            let (memory, pool, count) = (Memory::new(), FramePool::new(64), Cell::new(0));
            l1_tables(&memory, 7);
            let inner = npt_l0(&pool);
            let small = FramePool::new(frames);
            let parts = svm::ComposedParts {
                memory: &memory,
                inner: &inner,
                frames: &small,
                format: Npt::new(48),
                l1_format: Npt::new(48),
                page_limit: 8,
            };
            let mut stage = svm::ComposedStage::new(parts, Processor(&count));
            prop_assume!(stage.activate(TABLE).is_some());
            for (index, entry, near, which) in steps {
                // Entries of every level of L1's table.
                let at = 0x1000 + (index % 4) * 0x1000 + (index / 4) * 8;
                let entry = if near { entry & 0xF_F067 | 7 } else { entry };
                memory.store_u64(Gpa(at), entry).unwrap();
                let gpa = which << 12;
                let _ = stage.fault(npt_fault(gpa, NestedFaultBits::WRITE));
                for page in 0..512u64 {
                    if let Some(found) = stage.tables_for_test().translate(Gpa(page << 12)) {
                        prop_assert!((BACKING..BACKING + MAPPED).contains(&found.address.0));
                    }
                }
                if which & 7 == 0 {
                    stage.flush(None);
                }
            }
            stage.destroy();
        }
    }
}
