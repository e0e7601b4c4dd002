//! What the reasons define, read from their fields (SDM vol. 3C, 30.2).

use testudo_arch::regs::Gpr;
use testudo_arch::{Gpa, Gva, Msr};

use super::{
    ApicAccess, BasicReason, CrAccess, DrAccess, EntryFailure, EptQualification, EptViolation,
    Exit, ExitReason, GdtrIdtrAccess, GuestStateFailure, InvalidateOperands, IoAccess,
    LdtrTrAccess, MemoryOperand, RandomDestination, StringAccess, StringIo, TaskSwitch,
    VmcsOperands,
};
use crate::error::{AccessError, InstructionError, VmFail};
use crate::event::InterruptionInformation;
use crate::fields;
use crate::vmcs::VmcsRead;

/// The common reasons that come with fields.
#[inline(never)]
pub(super) fn with_fields(reason: ExitReason, vmcs: &impl VmcsRead) -> Result<Exit, AccessError> {
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
        _ => return rare(reason, vmcs),
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
fn rare(reason: ExitReason, vmcs: &impl VmcsRead) -> Result<Exit, AccessError> {
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
    let msr = || -> Result<Msr, AccessError> { Ok(Msr(qualification(vmcs)? as u32)) };
    let register =
        || -> Result<Gpr, AccessError> { Ok(Gpr::from_number((information(vmcs)? >> 3) as u8)) };
    // The bit is the same wherever a memory access of IRET can exit (30.2.3).
    let unblocked = |qualification: EptQualification| {
        qualification.contains(EptQualification::NMI_UNBLOCKING_BY_IRET)
    };
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
        R::Wbinvd => Exit::Wbinvd {
            invalidates: qualification(vmcs)? & 1 == 0,
        },
        R::Xsetbv => Exit::Xsetbv,
        R::ApicWrite => Exit::ApicWrite {
            offset: qualification(vmcs)? as u16 & 0xFFF,
        },
        R::Rdrand => Exit::Rdrand(RandomDestination::new(information(vmcs)?)),
        R::Rdseed => Exit::Rdseed(RandomDestination::new(information(vmcs)?)),
        R::Vmfunc => Exit::Vmfunc,
        R::Encls => Exit::Encls,
        R::Enclv => Exit::Enclv,
        R::PmlFull => {
            let qualification = EptQualification::from_bits_retain(qualification(vmcs)?);
            Exit::PmlFull {
                nmi_unblocking_by_iret: unblocked(qualification),
                asynchronous: qualification.contains(EptQualification::ASYNCHRONOUS),
            }
        }
        R::Xsaves => Exit::Xsaves(memory()?),
        R::Xrstors => Exit::Xrstors(memory()?),
        R::Pconfig => Exit::Pconfig,
        R::SppEvent => {
            let qualification = EptQualification::from_bits_retain(qualification(vmcs)?);
            Exit::SppEvent {
                gpa: gpa()?,
                linear: Gva(vmcs.get(fields::GUEST_LINEAR_ADDRESS)?),
                misconfiguration: qualification.bits() & (1 << 11) == 0,
                nmi_unblocking_by_iret: unblocked(qualification),
                asynchronous: qualification.contains(EptQualification::ASYNCHRONOUS),
            }
        }
        R::Umwait => Exit::Umwait {
            source: register()?,
        },
        R::Tpause => Exit::Tpause {
            source: register()?,
        },
        R::Loadiwkey => {
            let information = information(vmcs)?;
            Exit::Loadiwkey {
                first: (information >> 3) as u8 & 0xF,
                second: (information >> 28) as u8,
            }
        }
        R::EnqcmdPasid => Exit::EnqcmdPasid {
            pasid: qualification(vmcs)? as u32 & 0xF_FFFF,
        },
        R::EnqcmdsPasid => Exit::EnqcmdsPasid {
            command: qualification(vmcs)? as u32,
        },
        R::BusLock => Exit::BusLock,
        R::InstructionTimeout => {
            let qualification = qualification(vmcs)?;
            Exit::InstructionTimeout {
                context_invalid: qualification & 1 != 0,
                nmi_unblocking_by_iret: unblocked(EptQualification::from_bits_retain(
                    qualification,
                )),
            }
        }
        R::Seamcall => Exit::Seamcall,
        R::Tdcall => Exit::Tdcall,
        R::Rdmsrlist => Exit::Rdmsrlist { msr: msr()? },
        R::Wrmsrlist => match vmcs.get(fields::MSR_DATA) {
            // The reason of a processor that has no such instruction.
            Err(AccessError::Read {
                fail: VmFail::Valid(InstructionError::UnsupportedComponent),
                ..
            }) => Exit::Unknown(reason),
            value => Exit::Wrmsrlist {
                msr: msr()?,
                value: value?,
            },
        },
        R::Urdmsr => Exit::Urdmsr {
            qualification: qualification(vmcs)?,
            information: information(vmcs)?,
        },
        R::Uwrmsr => Exit::Uwrmsr {
            qualification: qualification(vmcs)?,
            information: information(vmcs)?,
        },
        R::RdmsrImmediate => Exit::RdmsrImmediate {
            msr: msr()?,
            register: register()?,
        },
        R::WrmsrnsImmediate => Exit::WrmsrnsImmediate {
            msr: msr()?,
            register: register()?,
        },
        // Decoded by the caller, or unknown to the manual.
        _ => Exit::Unknown(reason),
    })
}
