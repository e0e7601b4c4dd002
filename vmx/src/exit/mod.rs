//! VM exits as owned values (SDM vol. 3C, chapter 28; vol. 3D, appendix C).
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

use testudo_arch::{Gpa, Gva};

use crate::error::AccessError;
use crate::event::InterruptionInformation;
use crate::fields;
use crate::vmcs::VmcsRead;

mod advance;
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
        /// For #PF the linear address, for #DB a [`DebugQualification`].
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
    Wbinvd,
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
    },
    Xsaves,
    Xrstors,
    Pconfig,
    /// Sub-page permissions: a miss, or a misconfiguration.
    SppEvent {
        gpa: Gpa,
        misconfiguration: bool,
    },
    Umwait,
    Tpause,
    Loadiwkey,
    EnqcmdPasid,
    EnqcmdsPasid,
    BusLock,
    /// No instruction boundary for too long. With an invalid context the guest must not go on.
    InstructionTimeout {
        context_invalid: bool,
    },
    Seamcall,
    Tdcall,
    Rdmsrlist,
    Wrmsrlist,
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
            _ => return decode_with_fields(reason, vmcs),
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
            Self::Wbinvd => R::Wbinvd,
            Self::Xsetbv => R::Xsetbv,
            Self::Vmfunc => R::Vmfunc,
            Self::Encls => R::Encls,
            Self::Enclv => R::Enclv,
            Self::Xsaves => R::Xsaves,
            Self::Xrstors => R::Xrstors,
            Self::Pconfig => R::Pconfig,
            Self::Umwait => R::Umwait,
            Self::Tpause => R::Tpause,
            Self::Loadiwkey => R::Loadiwkey,
            Self::EnqcmdPasid => R::EnqcmdPasid,
            Self::EnqcmdsPasid => R::EnqcmdsPasid,
            Self::BusLock => R::BusLock,
            Self::Seamcall => R::Seamcall,
            Self::Tdcall => R::Tdcall,
            Self::Rdmsrlist => R::Rdmsrlist,
            Self::Wrmsrlist => R::Wrmsrlist,
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

/// The common reasons that come with fields.
#[inline(never)]
fn decode_with_fields(reason: ExitReason, vmcs: &impl VmcsRead) -> Result<Exit, AccessError> {
    use BasicReason as R;
    Ok(match reason.basic() {
        R::ExternalInterrupt => {
            let raw = vmcs.get(fields::EXIT_INTERRUPTION_INFORMATION)?;
            let information = InterruptionInformation(raw);
            Exit::ExternalInterrupt {
                vector: information.is_valid().then_some(information.vector()),
            }
        }
        R::Io => {
            let access = IoAccess::from_qualification(qualification(vmcs)?);
            if !access.string {
                return Ok(Exit::Io(access, None));
            }
            let string = StringAccess {
                linear: Gva(vmcs.get(fields::GUEST_LINEAR_ADDRESS)?),
                information: StringIo::new(information(vmcs)?),
            };
            Exit::Io(access, Some(string))
        }
        R::EptViolation => {
            let qualification = EptQualification::from_bits_retain(qualification(vmcs)?);
            let gpa = Gpa(vmcs.get(fields::GUEST_PHYSICAL_ADDRESS)?);
            let linear = if qualification.contains(EptQualification::LINEAR_VALID) {
                Some(Gva(vmcs.get(fields::GUEST_LINEAR_ADDRESS)?))
            } else {
                None
            };
            Exit::EptViolation(EptViolation {
                qualification,
                gpa,
                linear,
            })
        }
        R::ControlRegister => {
            Exit::ControlRegister(CrAccess::from_qualification(qualification(vmcs)?))
        }
        _ => return decode_rare(reason, vmcs),
    })
}

#[inline]
fn qualification(vmcs: &impl VmcsRead) -> Result<u64, AccessError> {
    vmcs.get(fields::EXIT_QUALIFICATION)
}

#[inline]
fn information(vmcs: &impl VmcsRead) -> Result<u32, AccessError> {
    vmcs.get(fields::EXIT_INSTRUCTION_INFORMATION)
}

#[inline(never)]
fn decode_rare(reason: ExitReason, vmcs: &impl VmcsRead) -> Result<Exit, AccessError> {
    use BasicReason as R;
    let memory = || -> Result<MemoryOperand, AccessError> {
        Ok(MemoryOperand::new(information(vmcs)?, qualification(vmcs)?))
    };
    let invalidate = || -> Result<InvalidateOperands, AccessError> {
        Ok(InvalidateOperands::new(
            information(vmcs)?,
            qualification(vmcs)?,
        ))
    };
    let vmcs_operands = || -> Result<VmcsOperands, AccessError> {
        Ok(VmcsOperands::new(information(vmcs)?, qualification(vmcs)?))
    };
    let gpa = || -> Result<Gpa, AccessError> { Ok(Gpa(vmcs.get(fields::GUEST_PHYSICAL_ADDRESS)?)) };
    Ok(match reason.basic() {
        R::ExceptionOrNmi => {
            let raw = vmcs.get(fields::EXIT_INTERRUPTION_INFORMATION)?;
            let information = InterruptionInformation(raw);
            let error_code = if information.has_error_code() {
                vmcs.get(fields::EXIT_INTERRUPTION_ERROR_CODE)?
            } else {
                0
            };
            Exit::Exception {
                information,
                error_code,
                qualification: qualification(vmcs)?,
            }
        }
        R::TripleFault => Exit::TripleFault,
        R::Init => Exit::Init,
        R::Sipi => Exit::Sipi {
            vector: qualification(vmcs)? as u8,
        },
        R::IoSmi => Exit::IoSmi,
        R::OtherSmi => Exit::OtherSmi,
        R::NmiWindow => Exit::NmiWindow,
        R::TaskSwitch => Exit::TaskSwitch(TaskSwitch::from_qualification(qualification(vmcs)?)),
        R::Getsec => Exit::Getsec,
        R::Invd => Exit::Invd,
        R::Invlpg => Exit::Invlpg {
            address: Gva(qualification(vmcs)?),
        },
        R::Rdpmc => Exit::Rdpmc,
        R::Rdtsc => Exit::Rdtsc,
        R::Rdtscp => Exit::Rdtscp,
        R::Rsm => Exit::Rsm,
        R::Vmclear => Exit::Vmclear(memory()?),
        R::Vmlaunch => Exit::Vmlaunch,
        R::Vmptrld => Exit::Vmptrld(memory()?),
        R::Vmptrst => Exit::Vmptrst(memory()?),
        R::Vmread => Exit::Vmread(vmcs_operands()?),
        R::Vmresume => Exit::Vmresume,
        R::Vmwrite => Exit::Vmwrite(vmcs_operands()?),
        R::Vmxoff => Exit::Vmxoff,
        R::Vmxon => Exit::Vmxon(memory()?),
        R::DebugRegister => Exit::DebugRegister(DrAccess::from_qualification(qualification(vmcs)?)),
        R::InvalidGuestState => {
            let failure = GuestStateFailure::from_qualification(qualification(vmcs)?);
            Exit::EntryFailure(EntryFailure::GuestState(failure))
        }
        R::MsrLoading => Exit::EntryFailure(EntryFailure::MsrLoading {
            entry: qualification(vmcs)? as u32,
        }),
        R::EntryMachineCheck => Exit::EntryFailure(EntryFailure::MachineCheck),
        R::Mwait => Exit::Mwait {
            armed: qualification(vmcs)? & 1 != 0,
        },
        R::MonitorTrapFlag => Exit::MonitorTrapFlag,
        R::Monitor => Exit::Monitor,
        R::Pause => Exit::Pause,
        R::TprBelowThreshold => Exit::TprBelowThreshold,
        R::ApicAccess => Exit::ApicAccess(ApicAccess::from_qualification(qualification(vmcs)?)),
        R::VirtualizedEoi => Exit::VirtualizedEoi {
            vector: qualification(vmcs)? as u8,
        },
        R::GdtrIdtr => Exit::GdtrIdtr(GdtrIdtrAccess::new(
            information(vmcs)?,
            qualification(vmcs)?,
        )),
        R::LdtrTr => Exit::LdtrTr(LdtrTrAccess::new(information(vmcs)?, qualification(vmcs)?)),
        R::EptMisconfiguration => Exit::EptMisconfiguration { gpa: gpa()? },
        R::Invept => Exit::Invept(invalidate()?),
        R::Invvpid => Exit::Invvpid(invalidate()?),
        R::Invpcid => Exit::Invpcid(invalidate()?),
        R::Wbinvd => Exit::Wbinvd,
        R::Xsetbv => Exit::Xsetbv,
        R::ApicWrite => Exit::ApicWrite {
            offset: qualification(vmcs)? as u16 & 0xFFF,
        },
        R::Rdrand => Exit::Rdrand(RandomDestination::new(information(vmcs)?)),
        R::Rdseed => Exit::Rdseed(RandomDestination::new(information(vmcs)?)),
        R::Vmfunc => Exit::Vmfunc,
        R::Encls => Exit::Encls,
        R::Enclv => Exit::Enclv,
        R::PmlFull => Exit::PmlFull {
            nmi_unblocking_by_iret: qualification(vmcs)? & (1 << 12) != 0,
        },
        R::Xsaves => Exit::Xsaves,
        R::Xrstors => Exit::Xrstors,
        R::Pconfig => Exit::Pconfig,
        R::SppEvent => Exit::SppEvent {
            gpa: gpa()?,
            misconfiguration: qualification(vmcs)? & (1 << 11) == 0,
        },
        R::Umwait => Exit::Umwait,
        R::Tpause => Exit::Tpause,
        R::Loadiwkey => Exit::Loadiwkey,
        R::EnqcmdPasid => Exit::EnqcmdPasid,
        R::EnqcmdsPasid => Exit::EnqcmdsPasid,
        R::BusLock => Exit::BusLock,
        R::InstructionTimeout => Exit::InstructionTimeout {
            context_invalid: qualification(vmcs)? & 1 != 0,
        },
        R::Seamcall => Exit::Seamcall,
        R::Tdcall => Exit::Tdcall,
        R::Rdmsrlist => Exit::Rdmsrlist,
        R::Wrmsrlist => Exit::Wrmsrlist,
        // Decoded by the caller, or unknown to the manual.
        _ => Exit::Unknown(reason),
    })
}

#[cfg(test)]
mod tests;
