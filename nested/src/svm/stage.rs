//! The seam to the second stage: L1's nested page table composed with L0's.

use testudo_arch::{Gpa, Hpa};
use testudo_svm::exit::NestedPageFault;

/// How L1's nested page table is to be walked: as the processor that executed VMRUN translated its
/// own addresses (APM vol. 2, 15.25.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedTable {
    /// N_CR3: where L1 says the root is.
    pub root: Gpa,
    /// L1's CR4 at VMRUN: PAE and LA57 decide the format.
    pub cr4: u64,
    /// L1's EFER at VMRUN: LMA decides the format, NXE whether bit 63 is reserved.
    pub efer: u64,
    /// The address space that L1 has put L2 in.
    pub asid: u32,
}

/// What became of a nested page fault of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedFault {
    /// The translation has been made: L2 goes on.
    Resolved,
    /// L1's own table stops the access: L1 gets the fault, with what its processor would tell.
    Reflect(NestedPageFault),
    /// L1's table allows the access, but what it maps is not memory that L0 has mapped: L0
    /// handles the access at this address of L1's.
    Host(Gpa),
}

/// Tables that translate L2's physical addresses to the host's, made from L1's nested page table.
///
/// The answers never let L2 reach what L1 cannot reach itself: every address that L1's table names
/// is one of L1's guest-physical ones and goes through L0's table.
pub trait SecondStage {
    /// Makes the composition of this table of L1's the current one, and returns its root for
    /// N_CR3 of L2's control block. Without one, L1's VMRUN fails with VMEXIT_INVALID.
    ///
    /// An address space that has not run on the table since it was flushed must find it as it is:
    /// a new identifier is one way to flush.
    fn activate(&mut self, table: NestedTable) -> Option<Hpa>;

    /// L1 flushed the translations of one of its address spaces, or of all of them: what these have
    /// derived from its tables is to be derived anew, unless the implementation saw every change of
    /// the tables already.
    fn flush(&mut self, asid: Option<u32>);

    /// L0 changed its own table at these addresses of L1's: what was derived from it there is to be derived
    /// anew.
    fn forget(&mut self, start: Gpa, len: u64) {
        let _ = (start, len);
        self.flush(None);
    }

    /// Handles a nested page fault of L2 under the current composition.
    fn fault(&mut self, fault: NestedPageFault) -> NestedFault;

    /// Where an address of L2's lies in L1, by L1's current table: for L0 to make accesses of L2's.
    /// `None` if L1 does not map it, or not for writing if that is to be done.
    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa>;
}

/// For an L1 that is not offered nested paging: it shadows its guests' page tables itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSecondStage;

impl SecondStage for NoSecondStage {
    fn activate(&mut self, _: NestedTable) -> Option<Hpa> {
        None
    }

    fn flush(&mut self, _: Option<u32>) {}

    fn fault(&mut self, fault: NestedPageFault) -> NestedFault {
        NestedFault::Reflect(fault)
    }

    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
}
