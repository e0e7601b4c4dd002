//! Exits in words.

use core::fmt;

use super::{
    ApicAccess, ApicAccessKind, CrAccess, DebugQualification, DrAccess, EntryFailure,
    EptQualification, EptViolation, Exit, GuestStateFailure, IoAccess, TaskSwitch,
    TaskSwitchSource,
};
use testudo_arch::Gva;

use crate::event::EventType;

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exception {
                information,
                error_code,
                qualification,
            } => match information.event(*error_code, 0) {
                Some(event) if information.event_type() == EventType::Nmi => write!(f, "{event}"),
                Some(event) => match information.vector() {
                    1 => {
                        let cause = DebugQualification::from_bits_retain(*qualification);
                        write!(f, "{event}, cause: {cause}")
                    }
                    14 => write!(f, "{event}, at {}", Gva(*qualification)),
                    _ => write!(f, "{event}"),
                },
                None => write!(f, "exception, information {:#x}", information.0),
            },
            Self::ExternalInterrupt { vector: None } => f.write_str("external interrupt"),
            Self::ExternalInterrupt {
                vector: Some(vector),
            } => write!(f, "external interrupt {vector:#04x}"),
            Self::Sipi { vector } => write!(f, "start-up IPI {vector:#04x}"),
            Self::TaskSwitch(TaskSwitch { selector, source }) => {
                write!(f, "task switch by {source} to {selector:#06x}")
            }
            Self::Invlpg { address } => write!(f, "INVLPG of {address}"),
            Self::ControlRegister(access) => write!(f, "{access}"),
            Self::DebugRegister(access) => write!(f, "{access}"),
            Self::Io(access, _) => write!(f, "{access}"),
            Self::EntryFailure(failure) => write!(f, "VM entry failed: {failure}"),
            Self::ApicAccess(ApicAccess { offset, kind, .. }) => {
                write!(f, "APIC access at {offset:#x}: {kind}")
            }
            Self::VirtualizedEoi { vector } => write!(f, "virtualized EOI of {vector:#04x}"),
            Self::GdtrIdtr(access) => write!(f, "{:?}", access.instruction),
            Self::LdtrTr(access) => write!(f, "{:?}", access.instruction),
            Self::EptViolation(violation) => write!(f, "{violation}"),
            Self::EptMisconfiguration { gpa } => {
                write!(f, "EPT misconfiguration on the way to {gpa}")
            }
            Self::ApicWrite { offset } => write!(f, "APIC write at {offset:#x}"),
            Self::Wbinvd {
                invalidates: false, ..
            } => f.write_str("WBNOINVD"),
            Self::Wbinvd { .. } => f.write_str("WBINVD"),
            Self::SppEvent {
                gpa,
                misconfiguration,
                ..
            } => {
                let what = if *misconfiguration {
                    "misconfiguration"
                } else {
                    "miss"
                };
                write!(f, "SPP {what} at {gpa}")
            }
            Self::InstructionTimeout {
                context_invalid: true,
                ..
            } => f.write_str("instruction timeout, context invalid"),
            Self::Umwait { source } => write!(f, "UMWAIT with {}", source.name()),
            Self::Tpause { source } => write!(f, "TPAUSE with {}", source.name()),
            Self::Loadiwkey { first, second } => {
                write!(f, "LOADIWKEY with xmm{first}, xmm{second}")
            }
            Self::EnqcmdPasid { pasid } => write!(f, "ENQCMD, no translation of PASID {pasid:#x}"),
            Self::EnqcmdsPasid { command } => {
                write!(f, "ENQCMDS, no translation of the PASID in {command:#x}")
            }
            Self::Rdmsrlist { msr } => write!(f, "RDMSRLIST, {msr}"),
            Self::Wrmsrlist { msr, value } => write!(f, "WRMSRLIST, {msr} = {value:#x}"),
            Self::RdmsrImmediate { msr, register } => write!(f, "rdmsr {}, {msr}", register.name()),
            Self::WrmsrnsImmediate { msr, register } => {
                write!(f, "wrmsrns {msr}, {}", register.name())
            }
            Self::Unknown(reason) => write!(f, "{reason}"),
            other => write!(f, "{}", other.reason()),
        }
    }
}

impl fmt::Display for TaskSwitchSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Call => "CALL",
            Self::Iret => "IRET",
            Self::Jmp => "JMP",
            Self::TaskGate => "a task gate in the IDT",
        })
    }
}

impl fmt::Display for ApicAccessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Fetch => "instruction fetch",
            Self::EventDelivery => "event delivery",
            Self::Asynchronous => "asynchronous access",
            Self::PhysicalEventDelivery => "event delivery, by a guest-physical address",
            Self::PhysicalAsynchronous => "asynchronous access, by a guest-physical address",
            Self::Physical => "an instruction, by a guest-physical address",
            Self::Unknown(kind) => return write!(f, "unknown kind {kind}"),
        })
    }
}

impl fmt::Display for DebugQualification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::controls::write_flags(self, f)
    }
}

impl fmt::Display for CrAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MovTo { register, source } => write!(f, "mov cr{register}, {}", source.name()),
            Self::MovFrom {
                register,
                destination,
            } => write!(f, "mov {}, cr{register}", destination.name()),
            Self::Clts => f.write_str("clts"),
            Self::Lmsw { source, .. } => write!(f, "lmsw {source:#06x}"),
        }
    }
}

impl fmt::Display for DrAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (register, gpr) = (self.register, self.gpr.name());
        if self.write {
            write!(f, "mov dr{register}, {gpr}")
        } else {
            write!(f, "mov {gpr}, dr{register}")
        }
    }
}

impl fmt::Display for IoAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.input, self.string) {
            (true, false) => "IN from",
            (false, false) => "OUT to",
            (true, true) => "INS from",
            (false, true) => "OUTS to",
        };
        let repeated = if self.repeated { "REP " } else { "" };
        write!(
            f,
            "{repeated}{name} port {:#06x}, {} bytes",
            self.port, self.size
        )
    }
}

impl fmt::Display for EptViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use EptQualification as Q;
        let access = self.qualification;
        let kind = if access.contains(Q::FETCH) {
            "fetch"
        } else if access.contains(Q::WRITE) {
            "write"
        } else {
            "read"
        };
        write!(f, "EPT violation: {kind} at {}", self.gpa)?;
        match self.linear {
            Some(linear) if access.contains(Q::TRANSLATED) => write!(f, " (linear {linear})"),
            Some(linear) => write!(f, " (page walk for linear {linear})"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for EntryFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestState(failure) => write!(f, "invalid guest state{failure}"),
            Self::MsrLoading { entry } => write!(f, "entry {entry} of the MSR-load area"),
            Self::MachineCheck => f.write_str("machine check"),
        }
    }
}

impl fmt::Display for GuestStateFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unspecified => Ok(()),
            Self::Pdptes => f.write_str(" (PDPTEs)"),
            Self::NmiBlockedBySti => f.write_str(" (NMI injected while STI blocks)"),
            Self::LinkPointer => f.write_str(" (VMCS link pointer)"),
            Self::Unknown(qualification) => write!(f, " (qualification {qualification:#x})"),
        }
    }
}
