//! Clean bits: which parts of the VMCB the processor may take from its cache (APM vol. 2, 15.15).

use bitflags::bitflags;

bitflags! {
    /// The VMCB clean field, offset 0C0h: a set bit says "not changed since the last exit from this
    /// VMCB on this processor".
    ///
    /// Setters of [`Vmcb`](super::Vmcb) clear the bit of what they change;
    /// [`Vmcb::mark_clean`](super::Vmcb::mark_clean) sets them all after an exit, and
    /// [`Vmcb::mark_dirty`](super::Vmcb::mark_dirty) is due before the first entry on another
    /// processor or from another physical address. Bits that are not defined stay clear: "If any
    /// VMCB fields […] have been modified, all clean bits that are undefined […] must be cleared".
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct CleanBits: u32 {
        /// I: intercept vectors, TSC offset, pause filter.
        const INTERCEPTS = 1;
        /// IOPM: the addresses of the I/O and MSR permission maps, *and their contents*.
        const PERMISSION_MAPS = 1 << 1;
        /// ASID.
        const ASID = 1 << 2;
        /// TPR: the virtual-interrupt word (060h to 067h).
        const TPR = 1 << 3;
        /// NP: nested paging, its CR3, and the guest's PAT.
        const NESTED_PAGING = 1 << 4;
        /// CRx: CR0, CR3, CR4 and EFER.
        const CONTROL_REGISTERS = 1 << 5;
        /// DRx: DR6 and DR7.
        const DEBUG_REGISTERS = 1 << 6;
        /// DT: GDTR and IDTR.
        const DESCRIPTOR_TABLES = 1 << 7;
        /// SEG: CS, DS, SS, ES and the CPL.
        const SEGMENTS = 1 << 8;
        /// CR2.
        const CR2 = 1 << 9;
        /// LBR: DebugCtl and the last branch and exception records.
        const LBR = 1 << 10;
        /// AVIC: APIC base, backing page and the tables.
        const AVIC = 1 << 11;
        /// CET: S_CET, SSP and the interrupt shadow-stack table.
        const CET = 1 << 12;
    }
}

impl CleanBits {
    /// For fields that every VMRUN loads, whatever the clean field says.
    pub(super) const ALWAYS_LOADED: Self = Self::empty();
}
