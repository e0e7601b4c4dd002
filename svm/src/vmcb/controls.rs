//! The control area's words that are made of bits (APM vol. 2, table B-1).

use bitflags::bitflags;
use core::fmt;

/// TLB_CONTROL, offset 05Ch: what VMRUN flushes before it enters (APM vol. 2, 15.16.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlbControl {
    /// Nothing.
    DoNothing,
    /// Every entry of every ASID, global ones too.
    FlushAll,
    /// Every entry of this guest's ASID. Needs
    /// [`FLUSH_BY_ASID`](crate::caps::Features::FLUSH_BY_ASID).
    FlushAsid,
    /// The non-global entries of this guest's ASID. Needs `FLUSH_BY_ASID` too.
    FlushAsidNonGlobal,
    /// Reserved.
    Reserved(u8),
}

impl TlbControl {
    /// The encoding.
    #[inline]
    pub const fn to_raw(self) -> u8 {
        match self {
            Self::DoNothing => 0,
            Self::FlushAll => 1,
            Self::FlushAsid => 3,
            Self::FlushAsidNonGlobal => 7,
            Self::Reserved(raw) => raw,
        }
    }

    /// What an encoding means.
    #[inline]
    pub const fn from_raw(raw: u8) -> Self {
        match raw {
            0 => Self::DoNothing,
            1 => Self::FlushAll,
            3 => Self::FlushAsid,
            7 => Self::FlushAsidNonGlobal,
            other => Self::Reserved(other),
        }
    }
}

/// The virtual-interrupt word, offset 060h, 64 bits (APM vol. 2, 15.21).
///
/// Small fields between flags, so it is a number with accessors rather than a set.
///
/// ```
/// use testudo_svm::vmcb::{VintrFlags, VirtualInterrupts};
///
/// let word = VirtualInterrupts::default()
///     .with_flags(VintrFlags::V_INTR_MASKING | VintrFlags::V_IRQ)
///     .with_priority(0xF)
///     .with_vector(0x31);
/// assert_eq!(word.0, 0x31_010F_0100);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VirtualInterrupts(pub u64);

bitflags! {
    /// The flags of [`VirtualInterrupts`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VintrFlags: u64 {
        /// A virtual interrupt is pending: the guest takes it as soon as its IF, TPR and GIF allow.
        const V_IRQ = 1 << 8;
        /// The guest's virtual GIF.
        const V_GIF = 1 << 9;
        /// A virtual NMI is pending.
        const V_NMI = 1 << 11;
        /// Virtual NMIs are masked: one is being handled.
        const V_NMI_MASK = 1 << 12;
        /// The pending interrupt ignores the TPR.
        const V_IGN_TPR = 1 << 20;
        /// The guest's IF and TPR govern virtual interrupts only; physical ones follow the host's
        /// IF at VMRUN (APM vol. 2, 15.21.1).
        const V_INTR_MASKING = 1 << 24;
        /// STGI and CLGI of the guest act on the virtual GIF.
        const V_GIF_ENABLE = 1 << 25;
        /// NMI virtualization.
        const V_NMI_ENABLE = 1 << 26;
        /// x2AVIC: the accelerated APIC is in x2APIC mode.
        const X2AVIC_ENABLE = 1 << 30;
        /// AVIC: the interrupt controller is accelerated.
        const AVIC_ENABLE = 1 << 31;
    }
}

impl VirtualInterrupts {
    const PRIORITY_SHIFT: u32 = 16;
    const VECTOR_SHIFT: u32 = 32;

    /// The flags.
    #[inline]
    pub const fn flags(self) -> VintrFlags {
        VintrFlags::from_bits_truncate(self.0)
    }

    /// With these flags and no others.
    #[inline]
    pub const fn with_flags(self, flags: VintrFlags) -> Self {
        Self((self.0 & !VintrFlags::all().bits()) | flags.bits())
    }

    /// With these flags as well.
    #[inline]
    pub const fn insert(self, flags: VintrFlags) -> Self {
        Self(self.0 | flags.bits())
    }

    /// Without these flags.
    #[inline]
    pub const fn remove(self, flags: VintrFlags) -> Self {
        Self(self.0 & !flags.bits())
    }

    /// Whether all these flags are set.
    #[inline]
    pub const fn contains(self, flags: VintrFlags) -> bool {
        self.0 & flags.bits() == flags.bits()
    }

    /// V_TPR: the guest's CR8, four bits.
    #[inline]
    pub const fn tpr(self) -> u8 {
        (self.0 & 0xF) as u8
    }

    /// With this task priority; its low four bits count.
    #[inline]
    pub const fn with_tpr(self, tpr: u8) -> Self {
        Self((self.0 & !0xFF) | (tpr & 0xF) as u64)
    }

    /// The priority class of the pending virtual interrupt.
    #[inline]
    pub const fn priority(self) -> u8 {
        ((self.0 >> Self::PRIORITY_SHIFT) & 0xF) as u8
    }

    /// With this priority class; its low four bits count.
    #[inline]
    pub const fn with_priority(self, priority: u8) -> Self {
        let cleared = self.0 & !(0xF << Self::PRIORITY_SHIFT);
        Self(cleared | ((priority & 0xF) as u64) << Self::PRIORITY_SHIFT)
    }

    /// The vector of the pending virtual interrupt.
    #[inline]
    pub const fn vector(self) -> u8 {
        (self.0 >> Self::VECTOR_SHIFT) as u8
    }

    /// With this vector.
    #[inline]
    pub const fn with_vector(self, vector: u8) -> Self {
        Self((self.0 & !(0xFF << Self::VECTOR_SHIFT)) | (vector as u64) << Self::VECTOR_SHIFT)
    }
}

impl fmt::Debug for VirtualInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualInterrupts")
            .field("flags", &self.flags())
            .field("tpr", &self.tpr())
            .field("priority", &self.priority())
            .field("vector", &self.vector())
            .finish()
    }
}

bitflags! {
    /// Offset 068h: what holds interrupts back for one instruction (APM vol. 2, 15.21.5).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct InterruptState: u64 {
        /// The guest is in an interrupt shadow: the instruction after STI, MOV SS or POP SS.
        const INTERRUPT_SHADOW = 1;
        /// SEV-ES only: the guest's RFLAGS.IF, visible because RFLAGS is not.
        const GUEST_INTERRUPT_MASK = 1 << 1;
        const _ = !0;
    }
}

bitflags! {
    /// Offset 090h: nested paging and memory encryption.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct NestedControl: u64 {
        /// NP_ENABLE: nested paging.
        const NP_ENABLE = 1;
        /// Secure encrypted virtualization.
        const SEV = 1 << 1;
        /// SEV with encrypted register state.
        const SEV_ES = 1 << 2;
        /// GMET: no supervisor-mode execution from user-mode nested pages.
        const GMET = 1 << 3;
        /// Supervisor shadow-stack restrictions in nested page tables.
        const SUPERVISOR_SHADOW_STACK_CHECK = 1 << 4;
        /// Virtual transparent encryption.
        const TRANSPARENT_ENCRYPTION = 1 << 5;
        /// Read-only guest page tables.
        const READ_ONLY_GUEST_PAGE_TABLES = 1 << 6;
        /// The guest may execute INVLPGB and TLBSYNC.
        const INVLPGB_TLBSYNC = 1 << 7;
        const _ = !0;
    }
}

bitflags! {
    /// Offset 0B8h: what is virtualized in hardware beside the interrupts.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VirtualExtensions: u64 {
        /// Last-branch records are swapped with the guest (APM vol. 2, 15.23).
        const LBR = 1;
        /// VMLOAD and VMSAVE of the guest execute on guest-physical addresses (APM vol. 2, 15.33.1).
        const VMSAVE_VMLOAD = 1 << 1;
        /// Instruction-based sampling.
        const IBS = 1 << 2;
        /// Performance counters.
        const PMC = 1 << 3;
        const _ = !0;
    }
}

bitflags! {
    /// ERAP_CONTROL, offset 05Dh: the return-address predictor.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ErapControl: u8 {
        /// The guest may use the whole predictor.
        const ALLOW_LARGER_RAP = 1;
        /// VMRUN clears the predictor.
        const CLEAR_RAP = 1 << 1;
        const _ = !0;
    }
}

/// The AVIC physical-table pointer, offset 0F8h (APM vol. 2, 15.29.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AvicPhysicalTable(pub u64);

impl AvicPhysicalTable {
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

    /// A table at `address` (4 KiB aligned) whose last entry is `max_index`, of which twelve bits
    /// count.
    #[inline]
    pub const fn new(address: u64, max_index: u16) -> Self {
        Self((address & Self::ADDRESS) | (max_index & 0xFFF) as u64)
    }

    /// The host-physical address of the table.
    #[inline]
    pub const fn address(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// The index of the last entry.
    #[inline]
    pub const fn max_index(self) -> u16 {
        (self.0 & 0xFFF) as u16
    }
}
