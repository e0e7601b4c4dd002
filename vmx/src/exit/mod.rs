//! VM exits as owned values (SDM vol. 3C, chapter 30; vol. 3D, appendix C).
//!
//! [`Exit::read`] reads the exit reason and then only the fields that this reason defines. Nothing
//! here fails on what it does not know: new hardware gives [`Exit::Unknown`].
//!
//! ```
//! use testudo_vmx::exit::{self, Exit};
//! use testudo_vmx::{VmcsRead, fake::FakeVmcs, fields};
//!
//! let mut vmcs = FakeVmcs::new();
//! vmcs.preset(fields::EXIT_REASON, 10);
//! vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
//! assert_eq!(Exit::read(&vmcs)?, Exit::Cpuid);
//! exit::advance(&mut vmcs)?;
//! assert_eq!(vmcs.get(fields::GUEST_RIP)?, 2);
//! assert_eq!(vmcs.counts(), (4, 1)); // one VMREAD is this example's own
//! # Ok::<(), testudo_vmx::AccessError>(())
//! ```

use testudo_arch::regs::Gpr;
use testudo_arch::{Gpa, Gva, Msr};

use crate::error::AccessError;
use crate::event::InterruptionInformation;
use crate::vmcs::VmcsRead;

mod advance;
mod decode;
mod display;
mod operand;
mod qualification;
mod reason;

pub use advance::{advance, complete_instruction};
pub use operand::{
    AddressSize, GdtrIdtrAccess, GdtrIdtrInstruction, InvalidateOperands, LdtrTrAccess,
    LdtrTrInstruction, MemoryOperand, Operand, RandomDestination, StringIo, VmcsOperands,
};
pub use qualification::{
    ApicAccess, ApicAccessKind, CrAccess, DebugQualification, DrAccess, EptQualification, IoAccess,
    TaskSwitch, TaskSwitchSource,
};
pub use reason::{BasicReason, ExitReason};

/// A guest-physical access that EPT does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EptViolation {
    /// The kind of access, and what the translation would have allowed.
    pub qualification: EptQualification,
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The linear address whose translation led there, where there is one.
    pub linear: Option<Gva>,
}

/// INS or OUTS: what an I/O exit says beyond [`IoAccess`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StringAccess {
    /// The linear address of the memory operand.
    pub linear: Gva,
    /// Its segment and address size, on processors that tell
    /// ([`Basic::string_io_information`](crate::caps::Basic::string_io_information)).
    pub information: StringIo,
}

/// Why a VM entry failed after its checks of controls and host state (29.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryFailure {
    /// A check of guest state failed.
    GuestState(GuestStateFailure),
    /// An MSR could not be loaded: the entry of the MSR-load area, counted from 1.
    MsrLoading {
        /// The entry, counted from 1.
        entry: u32,
    },
    /// A machine check occurred.
    MachineCheck,
}

/// What the qualification tells of invalid guest state (29.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestStateFailure {
    /// Nothing more.
    Unspecified,
    /// The PDPTEs.
    Pdptes,
    /// NMI injection while blocking by STI.
    NmiBlockedBySti,
    /// The VMCS link pointer.
    LinkPointer,
    /// A qualification that the manual does not define.
    Unknown(u64),
}

impl GuestStateFailure {
    /// The failure with this qualification.
    pub const fn from_qualification(qualification: u64) -> Self {
        match qualification {
            0 => Self::Unspecified,
            2 => Self::Pdptes,
            3 => Self::NmiBlockedBySti,
            4 => Self::LinkPointer,
            other => Self::Unknown(other),
        }
    }

    /// The qualification.
    pub const fn qualification(self) -> u64 {
        match self {
            Self::Unspecified => 0,
            Self::Pdptes => 2,
            Self::NmiBlockedBySti => 3,
            Self::LinkPointer => 4,
            Self::Unknown(qualification) => qualification,
        }
    }
}

/// A VM exit with what its reason defines.
///
/// Variants without data need nothing beyond the general registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "variants that are the manual's own words for one instruction"
)]
pub enum Exit {
    /// A hardware or software exception, or an NMI.
    Exception {
        /// What it is. NMI has type 2.
        information: InterruptionInformation,
        /// The error code, where the information says there is one; otherwise 0.
        error_code: u32,
        /// For #PF the linear address, for #DB a [`DebugQualification`], for NMI where it comes from, on
        /// processors that report that.
        qualification: u64,
    },
    /// An external interrupt; the vector is known if exits acknowledge interrupts.
    ExternalInterrupt {
        vector: Option<u8>,
    },
    TripleFault,
    Init,
    /// A start-up IPI with its vector.
    Sipi {
        vector: u8,
    },
    /// An SMI that came right after an I/O instruction (dual-monitor treatment).
    IoSmi,
    /// Any other SMI (dual-monitor treatment).
    OtherSmi,
    InterruptWindow,
    NmiWindow,
    TaskSwitch(TaskSwitch),
    Cpuid,
    Getsec,
    Hlt,
    Invd,
    Invlpg {
        address: Gva,
    },
    Rdpmc,
    Rdtsc,
    Rdtscp,
    Rsm,
    Vmcall,
    Vmclear(MemoryOperand),
    Vmlaunch,
    Vmptrld(MemoryOperand),
    Vmptrst(MemoryOperand),
    Vmread(VmcsOperands),
    Vmresume,
    Vmwrite(VmcsOperands),
    Vmxoff,
    Vmxon(MemoryOperand),
    ControlRegister(CrAccess),
    DebugRegister(DrAccess),
    /// An I/O instruction; the second part for INS and OUTS.
    Io(IoAccess, Option<StringAccess>),
    Rdmsr,
    /// WRMSR or WRMSRNS. The qualification tells which; a hypervisor answers both alike.
    Wrmsr,
    /// The guest was never entered.
    EntryFailure(EntryFailure),
    /// MWAIT, and whether the address-range monitor was armed.
    Mwait {
        armed: bool,
    },
    MonitorTrapFlag,
    Monitor,
    Pause,
    TprBelowThreshold,
    ApicAccess(ApicAccess),
    /// The EOI of an interrupt that the EOI-exit bitmap names.
    VirtualizedEoi {
        vector: u8,
    },
    GdtrIdtr(GdtrIdtrAccess),
    LdtrTr(LdtrTrAccess),
    EptViolation(EptViolation),
    /// An EPT entry with reserved settings was met on the way to this address.
    EptMisconfiguration {
        gpa: Gpa,
    },
    Invept(InvalidateOperands),
    Invvpid(InvalidateOperands),
    Invpcid(InvalidateOperands),
    PreemptionTimer,
    /// WBINVD; or WBNOINVD, which writes back without invalidating.
    Wbinvd {
        invalidates: bool,
    },
    Xsetbv,
    /// A write to the virtual-APIC page that software must complete, at this offset.
    ApicWrite {
        offset: u16,
    },
    Rdrand(RandomDestination),
    Rdseed(RandomDestination),
    Vmfunc,
    Encls,
    Enclv,
    /// The page-modification log is full.
    PmlFull {
        nmi_unblocking_by_iret: bool,
        /// The access that was to be logged was asynchronous to instruction execution.
        asynchronous: bool,
    },
    Xsaves(MemoryOperand),
    Xrstors(MemoryOperand),
    Pconfig,
    /// Sub-page permissions: a miss, or a misconfiguration.
    SppEvent {
        gpa: Gpa,
        linear: Gva,
        misconfiguration: bool,
        nmi_unblocking_by_iret: bool,
        /// The access was asynchronous to instruction execution.
        asynchronous: bool,
    },
    /// UMWAIT, with the register that says how deeply.
    Umwait {
        source: Gpr,
    },
    /// TPAUSE, with the register that says how deeply.
    Tpause {
        source: Gpr,
    },
    /// LOADIWKEY, with the numbers of its XMM registers.
    Loadiwkey {
        first: u8,
        second: u8,
    },
    /// ENQCMD: no translation of the PASID that IA32_PASID holds.
    EnqcmdPasid {
        pasid: u32,
    },
    /// ENQCMDS: no translation of the PASID in the low half of the command's first eight bytes.
    EnqcmdsPasid {
        command: u32,
    },
    BusLock,
    /// No instruction boundary for too long. With an invalid context the guest must not go on.
    InstructionTimeout {
        context_invalid: bool,
        nmi_unblocking_by_iret: bool,
    },
    Seamcall,
    Tdcall,
    /// RDMSRLIST has come to an MSR that exits; without MSR bitmaps, to any, and that one is not named.
    Rdmsrlist {
        msr: Msr,
    },
    /// WRMSRLIST likewise, with the value that it would have written.
    Wrmsrlist {
        msr: Msr,
        value: u64,
    },
    /// URDMSR, with the qualification and the instruction information as they are.
    Urdmsr {
        qualification: u64,
        information: u32,
    },
    /// UWRMSR, with the qualification and the instruction information as they are.
    Uwrmsr {
        qualification: u64,
        information: u32,
    },
    /// RDMSR of an MSR that the instruction names.
    RdmsrImmediate {
        msr: Msr,
        register: Gpr,
    },
    /// WRMSRNS to an MSR that the instruction names.
    WrmsrnsImmediate {
        msr: Msr,
        register: Gpr,
    },
    /// A reason that the manual did not define when this was written.
    Unknown(ExitReason),
}

impl Exit {
    /// Reads the last exit. One VMREAD, and those of [`Exit::decode`].
    ///
    /// # Errors
    ///
    /// A VMREAD failed.
    #[inline]
    pub fn read(vmcs: &impl VmcsRead) -> Result<Self, AccessError> {
        Self::decode(ExitReason::read(vmcs)?, vmcs)
    }

    /// Reads what belongs to `reason`: no VMREAD for reasons without data (CPUID, HLT, RDMSR, WRMSR,
    /// VMCALL, the windows, the timer), one for an access to a control register, a debug register,
    /// a port, the APIC page, and for an external interrupt; up to three for an EPT violation.
    ///
    /// # Errors
    ///
    /// A VMREAD failed.
    #[inline]
    pub fn decode(reason: ExitReason, vmcs: &impl VmcsRead) -> Result<Self, AccessError> {
        use BasicReason as R;
        // What needs no field is decided in place; the rest is behind a call.
        Ok(match reason.basic() {
            R::Cpuid => Self::Cpuid,
            R::Hlt => Self::Hlt,
            R::Rdmsr => Self::Rdmsr,
            R::Wrmsr => Self::Wrmsr,
            R::Vmcall => Self::Vmcall,
            R::InterruptWindow => Self::InterruptWindow,
            R::PreemptionTimer => Self::PreemptionTimer,
            _ => return decode::with_fields(reason, vmcs),
        })
    }

    /// The basic reason of such an exit.
    pub const fn reason(&self) -> BasicReason {
        use BasicReason as R;
        match self {
            Self::Exception { .. } => R::ExceptionOrNmi,
            Self::Io(..) => R::Io,
            Self::EntryFailure(EntryFailure::GuestState(_)) => R::InvalidGuestState,
            Self::EntryFailure(EntryFailure::MsrLoading { .. }) => R::MsrLoading,
            Self::EntryFailure(EntryFailure::MachineCheck) => R::EntryMachineCheck,
            Self::Unknown(reason) => reason.basic(),
            Self::TripleFault => R::TripleFault,
            Self::Init => R::Init,
            Self::IoSmi => R::IoSmi,
            Self::OtherSmi => R::OtherSmi,
            Self::InterruptWindow => R::InterruptWindow,
            Self::NmiWindow => R::NmiWindow,
            Self::Cpuid => R::Cpuid,
            Self::Getsec => R::Getsec,
            Self::Hlt => R::Hlt,
            Self::Invd => R::Invd,
            Self::Rdpmc => R::Rdpmc,
            Self::Rdtsc => R::Rdtsc,
            Self::Rdtscp => R::Rdtscp,
            Self::Rsm => R::Rsm,
            Self::Vmcall => R::Vmcall,
            Self::Vmlaunch => R::Vmlaunch,
            Self::Vmresume => R::Vmresume,
            Self::Vmxoff => R::Vmxoff,
            Self::Rdmsr => R::Rdmsr,
            Self::Wrmsr => R::Wrmsr,
            Self::MonitorTrapFlag => R::MonitorTrapFlag,
            Self::Monitor => R::Monitor,
            Self::Pause => R::Pause,
            Self::TprBelowThreshold => R::TprBelowThreshold,
            Self::PreemptionTimer => R::PreemptionTimer,
            Self::Wbinvd { .. } => R::Wbinvd,
            Self::Xsetbv => R::Xsetbv,
            Self::Vmfunc => R::Vmfunc,
            Self::Encls => R::Encls,
            Self::Enclv => R::Enclv,
            Self::Xsaves(_) => R::Xsaves,
            Self::Xrstors(_) => R::Xrstors,
            Self::Pconfig => R::Pconfig,
            Self::Umwait { .. } => R::Umwait,
            Self::Tpause { .. } => R::Tpause,
            Self::Loadiwkey { .. } => R::Loadiwkey,
            Self::EnqcmdPasid { .. } => R::EnqcmdPasid,
            Self::EnqcmdsPasid { .. } => R::EnqcmdsPasid,
            Self::BusLock => R::BusLock,
            Self::Seamcall => R::Seamcall,
            Self::Tdcall => R::Tdcall,
            Self::Rdmsrlist { .. } => R::Rdmsrlist,
            Self::Wrmsrlist { .. } => R::Wrmsrlist,
            Self::Urdmsr { .. } => R::Urdmsr,
            Self::Uwrmsr { .. } => R::Uwrmsr,
            Self::RdmsrImmediate { .. } => R::RdmsrImmediate,
            Self::WrmsrnsImmediate { .. } => R::WrmsrnsImmediate,
            Self::TaskSwitch(_) => R::TaskSwitch,
            Self::Vmclear(_) => R::Vmclear,
            Self::Vmptrld(_) => R::Vmptrld,
            Self::Vmptrst(_) => R::Vmptrst,
            Self::Vmread(_) => R::Vmread,
            Self::Vmwrite(_) => R::Vmwrite,
            Self::Vmxon(_) => R::Vmxon,
            Self::ControlRegister(_) => R::ControlRegister,
            Self::DebugRegister(_) => R::DebugRegister,
            Self::ApicAccess(_) => R::ApicAccess,
            Self::GdtrIdtr(_) => R::GdtrIdtr,
            Self::LdtrTr(_) => R::LdtrTr,
            Self::EptViolation(_) => R::EptViolation,
            Self::Invept(_) => R::Invept,
            Self::Invvpid(_) => R::Invvpid,
            Self::Invpcid(_) => R::Invpcid,
            Self::Rdrand(_) => R::Rdrand,
            Self::Rdseed(_) => R::Rdseed,
            Self::ExternalInterrupt { .. } => R::ExternalInterrupt,
            Self::Sipi { .. } => R::Sipi,
            Self::Invlpg { .. } => R::Invlpg,
            Self::Mwait { .. } => R::Mwait,
            Self::VirtualizedEoi { .. } => R::VirtualizedEoi,
            Self::EptMisconfiguration { .. } => R::EptMisconfiguration,
            Self::ApicWrite { .. } => R::ApicWrite,
            Self::PmlFull { .. } => R::PmlFull,
            Self::SppEvent { .. } => R::SppEvent,
            Self::InstructionTimeout { .. } => R::InstructionTimeout,
        }
    }
}

#[cfg(test)]
mod tests;
