//! Exits: why a guest stopped, decoded (APM vol. 2, 15.6 to 15.14 and appendix C).
//!
//! [`Exit::read`] looks at the exit code, then only at the fields that this code defines. A code
//! that this crate does not know is [`Exit::Unknown`], never a panic.

mod code;
mod info;

use core::fmt;

use testudo_arch::{Gpa, Gva};

use crate::vmcb::Vmcb;

pub use code::ExitCode;
pub use info::{
    CrAccess, DrAccess, ExceptionInfo, IncompleteIpi, IncompleteIpiReason, NestedFaultBits,
    NestedPageFault, PortAccess, TaskSwitch, TaskSwitchReason, UnacceleratedAccess,
};

/// Why the guest stopped.
///
/// Variants without data are named after the instruction or event: what else they need stands in
/// registers. The length of the intercepted instruction is [`Vmcb::n_rip`] less RIP on processors
/// that save nRIP, else it must be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the instructions' own names")]
pub enum Exit {
    /// A control register was read or is to be written.
    Cr(CrAccess),
    /// A debug register was read or is to be written.
    Dr(DrAccess),
    /// An exception.
    Exception(ExceptionInfo),
    /// A physical interrupt is pending; it is taken when the host sets its GIF.
    Interrupt,
    /// An NMI is pending; it is taken when the host sets its GIF.
    Nmi,
    /// An SMI: bit 0 of EXITINFO1 is clear if I/O trapping caused it, set if it came from outside;
    /// bit 33 says that the other bits describe an I/O instruction (APM vol. 2, 15.13.3).
    Smi {
        info1: u64,
        info2: u64,
    },
    /// INIT; bit 63 of EXITINFO1 says that it is redirected.
    Init {
        info1: u64,
    },
    /// The guest could take the virtual interrupt that is pending in the VMCB.
    VirtualInterrupt,
    /// A CR0 write that changes more than TS and MP.
    Cr0SelectiveWrite(CrAccess),
    Sidt,
    Sgdt,
    Sldt,
    Str,
    Lidt,
    Lgdt,
    Lldt,
    Ltr,
    Rdtsc,
    Rdpmc,
    Pushf,
    Popf,
    Cpuid,
    Rsm,
    Iret,
    /// INT n. The vector is meaningful only with decode assists.
    SoftwareInterrupt {
        assisted_vector: u8,
    },
    Invd,
    Pause,
    Hlt,
    /// INVLPG. The address is meaningful only with decode assists.
    Invlpg {
        assisted_address: Gva,
    },
    Invlpga,
    /// IN, OUT, INS or OUTS.
    Port(PortAccess),
    /// RDMSR of the register in ECX.
    Rdmsr,
    /// WRMSR of the register in ECX.
    Wrmsr,
    /// A task switch.
    TaskSwitch(TaskSwitch),
    /// The processor froze to report a floating-point error by FERR#.
    FerrFreeze,
    /// A triple fault or another shutdown. The guest's state in the VMCB is undefined.
    Shutdown,
    Vmrun,
    Vmmcall,
    Vmload,
    Vmsave,
    Stgi,
    Clgi,
    Skinit,
    Rdtscp,
    /// INT1, also called ICEBP.
    Int1,
    /// WBINVD or WBNOINVD.
    Wbinvd,
    /// MONITOR or MONITORX.
    Monitor,
    /// MWAIT or MWAITX. `armed` from the conditional intercept.
    Mwait {
        armed: bool,
    },
    Xsetbv,
    Rdpru,
    /// EFER was written; this is its new value.
    EferWritten {
        value: u64,
    },
    /// A control register was written; this is its new value.
    CrWritten {
        register: u8,
        value: u64,
    },
    /// INVLPGB; `illegal` from the intercept of illegal operands.
    Invlpgb {
        illegal: bool,
    },
    /// INVPCID, with its descriptor's linear address and its type.
    Invpcid {
        descriptor: Gva,
        kind: u64,
    },
    Mcommit,
    Tlbsync,
    /// An instruction would lock the bus, and the threshold is used up.
    BusLock,
    /// HLT with no virtual interrupt pending.
    IdleHlt,
    /// A nested page fault.
    NestedPageFault(NestedPageFault),
    /// AVIC could not complete an IPI.
    IncompleteIpi(IncompleteIpi),
    /// AVIC does not accelerate this access.
    UnacceleratedAccess(UnacceleratedAccess),
    /// An SEV-ES guest asks for something through its GHCB.
    Vmgexit {
        ghcb: Gpa,
    },
    /// VMRUN found the guest state invalid: [`check_vmrun`](crate::check::check_vmrun) says why.
    Invalid,
    /// The VMSA of an SEV-ES guest is in use on another processor.
    Busy,
    /// The sibling thread was not idle where an SEV-SNP guest demands it.
    IdleRequired,
    /// The performance-counter state is invalid.
    InvalidPmc,
    /// A code that this crate does not know.
    Unknown {
        code: u64,
        info1: u64,
        info2: u64,
    },
}

impl Exit {
    /// Control registers, debug registers and exceptions: the codes that contain a number. Apart
    /// from the others so that those stay one table of jumps.
    fn read_numbered(vmcb: &Vmcb, code: ExitCode) -> Self {
        let register = (code.0 & 0xF) as u8;
        let (info1, info2) = (vmcb.exit_info1(), vmcb.exit_info2());
        match code.0 {
            0x00..=0x0F => Self::Cr(CrAccess::new(register, false, info1)),
            0x10..=0x1F => Self::Cr(CrAccess::new(register, true, info1)),
            0x20..=0x2F => Self::Dr(DrAccess::new(register, false, info1)),
            0x30..=0x3F => Self::Dr(DrAccess::new(register, true, info1)),
            vector => {
                let vector = vector.wrapping_sub(0x40) as u8;
                Self::Exception(ExceptionInfo::new(vector, info1, info2))
            }
        }
    }

    /// The exit that a VMCB reports.
    #[inline]
    pub fn read(vmcb: &Vmcb) -> Self {
        use ExitCode as C;
        let code = ExitCode::from_vmcb(vmcb.exit_code());
        if code.0 < C::INTR.0 {
            return Self::read_numbered(vmcb, code);
        }
        let info1 = || vmcb.exit_info1();
        let info2 = || vmcb.exit_info2();
        match code {
            C::INTR => Self::Interrupt,
            C::NMI => Self::Nmi,
            C::SMI => Self::Smi {
                info1: info1(),
                info2: info2(),
            },
            C::INIT => Self::Init { info1: info1() },
            C::VINTR => Self::VirtualInterrupt,
            C::CR0_SEL_WRITE => Self::Cr0SelectiveWrite(CrAccess::new(0, true, info1())),
            C::IDTR_READ => Self::Sidt,
            C::GDTR_READ => Self::Sgdt,
            C::LDTR_READ => Self::Sldt,
            C::TR_READ => Self::Str,
            C::IDTR_WRITE => Self::Lidt,
            C::GDTR_WRITE => Self::Lgdt,
            C::LDTR_WRITE => Self::Lldt,
            C::TR_WRITE => Self::Ltr,
            C::RDTSC => Self::Rdtsc,
            C::RDPMC => Self::Rdpmc,
            C::PUSHF => Self::Pushf,
            C::POPF => Self::Popf,
            C::CPUID => Self::Cpuid,
            C::RSM => Self::Rsm,
            C::IRET => Self::Iret,
            C::SWINT => Self::SoftwareInterrupt {
                assisted_vector: info1() as u8,
            },
            C::INVD => Self::Invd,
            C::PAUSE => Self::Pause,
            C::HLT => Self::Hlt,
            C::INVLPG => Self::Invlpg {
                assisted_address: Gva(info1()),
            },
            C::INVLPGA => Self::Invlpga,
            C::IOIO => Self::Port(PortAccess::new(info1(), info2())),
            C::MSR if info1() & 1 != 0 => Self::Wrmsr,
            C::MSR => Self::Rdmsr,
            C::TASK_SWITCH => Self::TaskSwitch(TaskSwitch::new(info1(), info2())),
            C::FERR_FREEZE => Self::FerrFreeze,
            C::SHUTDOWN => Self::Shutdown,
            C::VMRUN => Self::Vmrun,
            C::VMMCALL => Self::Vmmcall,
            C::VMLOAD => Self::Vmload,
            C::VMSAVE => Self::Vmsave,
            C::STGI => Self::Stgi,
            C::CLGI => Self::Clgi,
            C::SKINIT => Self::Skinit,
            C::RDTSCP => Self::Rdtscp,
            C::ICEBP => Self::Int1,
            C::WBINVD => Self::Wbinvd,
            C::MONITOR => Self::Monitor,
            C::MWAIT => Self::Mwait { armed: false },
            C::MWAIT_CONDITIONAL => Self::Mwait { armed: true },
            C::XSETBV => Self::Xsetbv,
            C::RDPRU => Self::Rdpru,
            C::EFER_WRITE_TRAP => Self::EferWritten { value: info1() },
            C(0x090..=0x09F) => Self::CrWritten {
                register: (code.0 & 0xF) as u8,
                value: info1(),
            },
            C::INVLPGB => Self::Invlpgb { illegal: false },
            C::INVLPGB_ILLEGAL => Self::Invlpgb { illegal: true },
            C::INVPCID => Self::Invpcid {
                descriptor: Gva(info1()),
                kind: info2(),
            },
            C::MCOMMIT => Self::Mcommit,
            C::TLBSYNC => Self::Tlbsync,
            C::BUSLOCK => Self::BusLock,
            C::IDLE_HLT => Self::IdleHlt,
            C::NPF => Self::NestedPageFault(NestedPageFault {
                gpa: Gpa(info2()),
                bits: NestedFaultBits::from_bits_retain(info1()),
            }),
            C::AVIC_INCOMPLETE_IPI => Self::IncompleteIpi(IncompleteIpi::new(info1(), info2())),
            C::AVIC_NOACCEL => {
                Self::UnacceleratedAccess(UnacceleratedAccess::new(info1(), info2()))
            }
            C::VMGEXIT => Self::Vmgexit {
                ghcb: Gpa(vmcb.ghcb_pa()),
            },
            C::INVALID => Self::Invalid,
            C::BUSY => Self::Busy,
            C::IDLE_REQUIRED => Self::IdleRequired,
            C::INVALID_PMC => Self::InvalidPmc,
            C(code) => Self::Unknown {
                code,
                info1: info1(),
                info2: info2(),
            },
        }
    }

    /// The exit code that reports this exit.
    pub fn code(&self) -> ExitCode {
        use ExitCode as C;
        let numbered = |base: u64, number: u8| C(base + u64::from(number & 0x1F));
        match *self {
            Self::Cr(a) => numbered(if a.write { 0x10 } else { 0 }, a.register & 0xF),
            Self::Dr(a) => numbered(if a.write { 0x30 } else { 0x20 }, a.register & 0xF),
            Self::Exception(e) => numbered(0x40, e.vector),
            Self::Interrupt => C::INTR,
            Self::Nmi => C::NMI,
            Self::Smi { .. } => C::SMI,
            Self::Init { .. } => C::INIT,
            Self::VirtualInterrupt => C::VINTR,
            Self::Cr0SelectiveWrite(_) => C::CR0_SEL_WRITE,
            Self::Sidt => C::IDTR_READ,
            Self::Sgdt => C::GDTR_READ,
            Self::Sldt => C::LDTR_READ,
            Self::Str => C::TR_READ,
            Self::Lidt => C::IDTR_WRITE,
            Self::Lgdt => C::GDTR_WRITE,
            Self::Lldt => C::LDTR_WRITE,
            Self::Ltr => C::TR_WRITE,
            Self::Rdtsc => C::RDTSC,
            Self::Rdpmc => C::RDPMC,
            Self::Pushf => C::PUSHF,
            Self::Popf => C::POPF,
            Self::Cpuid => C::CPUID,
            Self::Rsm => C::RSM,
            Self::Iret => C::IRET,
            Self::SoftwareInterrupt { .. } => C::SWINT,
            Self::Invd => C::INVD,
            Self::Pause => C::PAUSE,
            Self::Hlt => C::HLT,
            Self::Invlpg { .. } => C::INVLPG,
            Self::Invlpga => C::INVLPGA,
            Self::Port(_) => C::IOIO,
            Self::Rdmsr | Self::Wrmsr => C::MSR,
            Self::TaskSwitch(_) => C::TASK_SWITCH,
            Self::FerrFreeze => C::FERR_FREEZE,
            Self::Shutdown => C::SHUTDOWN,
            Self::Vmrun => C::VMRUN,
            Self::Vmmcall => C::VMMCALL,
            Self::Vmload => C::VMLOAD,
            Self::Vmsave => C::VMSAVE,
            Self::Stgi => C::STGI,
            Self::Clgi => C::CLGI,
            Self::Skinit => C::SKINIT,
            Self::Rdtscp => C::RDTSCP,
            Self::Int1 => C::ICEBP,
            Self::Wbinvd => C::WBINVD,
            Self::Monitor => C::MONITOR,
            Self::Mwait { armed: false } => C::MWAIT,
            Self::Mwait { armed: true } => C::MWAIT_CONDITIONAL,
            Self::Xsetbv => C::XSETBV,
            Self::Rdpru => C::RDPRU,
            Self::EferWritten { .. } => C::EFER_WRITE_TRAP,
            Self::CrWritten { register, .. } => numbered(0x90, register & 0xF),
            Self::Invlpgb { illegal: false } => C::INVLPGB,
            Self::Invlpgb { illegal: true } => C::INVLPGB_ILLEGAL,
            Self::Invpcid { .. } => C::INVPCID,
            Self::Mcommit => C::MCOMMIT,
            Self::Tlbsync => C::TLBSYNC,
            Self::BusLock => C::BUSLOCK,
            Self::IdleHlt => C::IDLE_HLT,
            Self::NestedPageFault(_) => C::NPF,
            Self::IncompleteIpi(_) => C::AVIC_INCOMPLETE_IPI,
            Self::UnacceleratedAccess(_) => C::AVIC_NOACCEL,
            Self::Vmgexit { .. } => C::VMGEXIT,
            Self::Invalid => C::INVALID,
            Self::Busy => C::BUSY,
            Self::IdleRequired => C::IDLE_REQUIRED,
            Self::InvalidPmc => C::INVALID_PMC,
            Self::Unknown { code, .. } => C(code),
        }
    }
}

impl DrAccess {
    const fn new(register: u8, write: bool, info1: u64) -> Self {
        Self {
            register,
            write,
            assisted_gpr: testudo_arch::Gpr::from_number(info1 as u8),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cr(CrAccess { gpr: Some(gpr), .. })
            | Self::Cr0SelectiveWrite(CrAccess { gpr: Some(gpr), .. }) => {
                write!(f, "{} with {}", self.code(), gpr.name())
            }
            Self::Exception(exception) => exception.fmt(f),
            Self::Port(access) => access.fmt(f),
            Self::Rdmsr => f.write_str("RDMSR"),
            Self::Wrmsr => f.write_str("WRMSR"),
            Self::NestedPageFault(fault) => write!(f, "nested page fault: {fault}"),
            Self::TaskSwitch(switch) => {
                let how = match switch.reason {
                    TaskSwitchReason::Iret => "IRET",
                    TaskSwitchReason::Jump => "a jump",
                    TaskSwitchReason::CallOrEvent => "a call or an event",
                };
                write!(f, "task switch to {:#x} by {how}", switch.selector)
            }
            Self::EferWritten { value } => write!(f, "EFER written: {value:#x}"),
            Self::CrWritten { register, value } => write!(f, "CR{register} written: {value:#x}"),
            Self::Invpcid { descriptor, kind } => {
                write!(
                    f,
                    "INVPCID of type {kind} with its descriptor at {descriptor}"
                )
            }
            Self::IncompleteIpi(ipi) => {
                write!(f, "AVIC: incomplete IPI {:#x} ({:?})", ipi.icr, ipi.reason)
            }
            Self::UnacceleratedAccess(access) => {
                let kind = if access.write { "write" } else { "read" };
                write!(f, "AVIC: {kind} of APIC register {:#x}", access.offset)
            }
            Self::Vmgexit { ghcb } => write!(f, "VMGEXIT with the GHCB at {ghcb}"),
            Self::Unknown { code, info1, info2 } => {
                write!(f, "unknown exit {code:#x} ({info1:#x}, {info2:#x})")
            }
            other => other.code().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests;
