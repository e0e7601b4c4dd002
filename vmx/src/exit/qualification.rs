//! Exit qualifications, decoded by the reason they belong to (SDM vol. 3C, 30.2.1).

use bitflags::bitflags;
use testudo_arch::regs::Gpr;

/// What made a task switch (table 30-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskSwitchSource {
    /// CALL.
    Call,
    /// IRET.
    Iret,
    /// JMP.
    Jmp,
    /// A task gate in the IDT.
    TaskGate,
}

/// A task switch (table 30-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskSwitch {
    /// The selector of the new task's TSS.
    pub selector: u16,
    /// What made it.
    pub source: TaskSwitchSource,
}

impl TaskSwitch {
    /// From the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            selector: qualification as u16,
            source: match (qualification >> 30) & 3 {
                0 => TaskSwitchSource::Call,
                1 => TaskSwitchSource::Iret,
                2 => TaskSwitchSource::Jmp,
                _ => TaskSwitchSource::TaskGate,
            },
        }
    }
}

/// A control-register access (table 30-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CrAccess {
    /// MOV to a control register.
    MovTo {
        /// The control register's number.
        register: u8,
        /// Where the value comes from.
        source: Gpr,
    },
    /// MOV from a control register.
    MovFrom {
        /// The control register's number: 3 or 8.
        register: u8,
        /// Where the value goes.
        destination: Gpr,
    },
    /// CLTS.
    Clts,
    /// LMSW: the low four bits of the operand are the new PE, MP, EM and TS; PE cannot be cleared.
    Lmsw {
        /// The operand's 16 bits.
        source: u16,
        /// Whether the operand is in memory, at the guest-linear address of the exit.
        from_memory: bool,
    },
}

impl CrAccess {
    /// From the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        let register = qualification as u8 & 0xF;
        let gpr = Gpr::from_number((qualification >> 8) as u8);
        match (qualification >> 4) & 3 {
            0 => Self::MovTo {
                register,
                source: gpr,
            },
            1 => Self::MovFrom {
                register,
                destination: gpr,
            },
            2 => Self::Clts,
            _ => Self::Lmsw {
                source: (qualification >> 16) as u16,
                from_memory: qualification & (1 << 6) != 0,
            },
        }
    }
}

/// A MOV to or from a debug register (table 30-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DrAccess {
    /// The debug register's number.
    pub register: u8,
    /// Whether the debug register is written.
    pub write: bool,
    /// The general register.
    pub gpr: Gpr,
}

impl DrAccess {
    /// From the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            register: qualification as u8 & 7,
            write: qualification & (1 << 4) == 0,
            gpr: Gpr::from_number((qualification >> 8) as u8),
        }
    }
}

/// An I/O instruction (table 30-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IoAccess {
    /// The port.
    pub port: u16,
    /// The number of bytes: 1, 2 or 4.
    pub size: u8,
    /// IN or INS, as opposed to OUT or OUTS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub repeated: bool,
    /// The port is an immediate operand, not DX.
    pub immediate: bool,
}

impl IoAccess {
    /// From the exit qualification. A size that the manual does not define counts as 4.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            size: match qualification & 7 {
                0 => 1,
                1 => 2,
                _ => 4,
            },
            input: qualification & (1 << 3) != 0,
            string: qualification & (1 << 4) != 0,
            repeated: qualification & (1 << 5) != 0,
            immediate: qualification & (1 << 6) != 0,
        }
    }
}

/// How the APIC-access page was reached (table 30-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApicAccessKind {
    /// Linear: an instruction read.
    Read,
    /// Linear: an instruction wrote.
    Write,
    /// Linear: an instruction fetch.
    Fetch,
    /// Linear: during event delivery.
    EventDelivery,
    /// Linear: asynchronous to instruction execution.
    Asynchronous,
    /// Guest-physical: during event delivery.
    PhysicalEventDelivery,
    /// Guest-physical: asynchronous to instruction execution.
    PhysicalAsynchronous,
    /// Guest-physical: an instruction or its fetch.
    Physical,
    /// A kind that the manual does not define.
    Unknown(u8),
}

/// An access to the APIC-access page (table 30-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApicAccess {
    /// The offset in the page, if the access was linear.
    pub offset: u16,
    /// How it was reached.
    pub kind: ApicAccessKind,
    /// The access was asynchronous to instruction execution and not part of event delivery.
    pub asynchronous: bool,
}

impl ApicAccess {
    /// From the exit qualification.
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            offset: qualification as u16 & 0xFFF,
            kind: match (qualification >> 12) as u8 & 0xF {
                0 => ApicAccessKind::Read,
                1 => ApicAccessKind::Write,
                2 => ApicAccessKind::Fetch,
                3 => ApicAccessKind::EventDelivery,
                4 => ApicAccessKind::Asynchronous,
                10 => ApicAccessKind::PhysicalEventDelivery,
                11 => ApicAccessKind::PhysicalAsynchronous,
                15 => ApicAccessKind::Physical,
                other => ApicAccessKind::Unknown(other),
            },
            asynchronous: qualification & (1 << 16) != 0,
        }
    }
}

bitflags! {
    /// The exit qualification of an EPT violation (table 30-7).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptQualification: u64 {
        /// The access was a data read.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// The translation allows reading.
        const READABLE = 1 << 3;
        /// The translation allows writing.
        const WRITABLE = 1 << 4;
        /// The translation allows execution (with mode-based control, of supervisor addresses).
        const EXECUTABLE = 1 << 5;
        /// With mode-based control, the translation allows execution of user addresses.
        const USER_EXECUTABLE = 1 << 6;
        /// The guest-linear address is valid.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the page that a linear address translates to, not to one of the
        /// guest's paging structures.
        const TRANSLATED = 1 << 8;
        /// With advanced information: the linear address is a user-mode one.
        const USER = 1 << 9;
        /// With advanced information: the guest's paging allows writing.
        const PAGE_WRITABLE = 1 << 10;
        /// With advanced information: the guest's paging forbids execution.
        const PAGE_EXECUTE_DISABLED = 1 << 11;
        /// An IRET had already unblocked NMIs.
        const NMI_UNBLOCKING_BY_IRET = 1 << 12;
        /// The access was a shadow-stack access.
        const SHADOW_STACK = 1 << 13;
        /// The translation allows supervisor shadow stacks.
        const SUPERVISOR_SHADOW_STACK_PAGE = 1 << 14;
        /// Guest-paging verification failed.
        const GUEST_PAGING_VERIFICATION = 1 << 15;
        /// The access was asynchronous to instruction execution and not part of event delivery.
        const ASYNCHRONOUS = 1 << 16;
        const _ = !0;
    }
}

bitflags! {
    /// The exit qualification of a debug exception (table 30-1), and what to set in DR6 for it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct DebugQualification: u64 {
        /// The breakpoint condition of DR0 was met.
        const B0 = 1 << 0;
        /// The breakpoint condition of DR1 was met.
        const B1 = 1 << 1;
        /// The breakpoint condition of DR2 was met.
        const B2 = 1 << 2;
        /// The breakpoint condition of DR3 was met.
        const B3 = 1 << 3;
        /// A bus lock was taken. (DR6 has this bit inverted.)
        const BUS_LOCK = 1 << 11;
        /// A debug register was accessed while DR7.GD was 1.
        const BD = 1 << 13;
        /// Single step.
        const BS = 1 << 14;
        /// Inside a restricted transactional region. (DR6 has this bit inverted.)
        const RTM = 1 << 16;
        const _ = !0;
    }
}

impl DebugQualification {
    /// DR6 as the processor would have set it: the conditions added to `dr6` as SDM vol. 3B,
    /// 18.2.3 says, with the bits that count inverted.
    #[inline]
    pub const fn into_dr6(self, dr6: u64) -> u64 {
        let inverted = Self::BUS_LOCK.bits() | Self::RTM.bits();
        let set = self.bits() & (0xF | Self::BD.bits() | Self::BS.bits());
        let cleared = dr6 & !(0xF | (self.bits() & inverted));
        cleared | set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_qualifications() {
        let lmsw = CrAccess::from_qualification(0xFFF7_0070);
        let expected = CrAccess::Lmsw {
            source: 0xFFF7,
            from_memory: true,
        };
        assert_eq!(lmsw, expected);
        let to_cr3 = CrAccess::from_qualification(0x0903);
        let expected = CrAccess::MovTo {
            register: 3,
            source: Gpr::R9,
        };
        assert_eq!(to_cr3, expected);
        let from_cr8 = CrAccess::from_qualification(0x0018);
        let expected = CrAccess::MovFrom {
            register: 8,
            destination: Gpr::Rax,
        };
        assert_eq!(from_cr8, expected);
        let dr = DrAccess::from_qualification(0x0317);
        assert_eq!((dr.register, dr.write, dr.gpr), (7, false, Gpr::Rbx));
        let io = IoAccess::from_qualification(0x03F8_0038);
        assert_eq!((io.port, io.size, io.input), (0x3F8, 1, true));
        assert!(io.string && io.repeated && !io.immediate);
        let task = TaskSwitch::from_qualification(0xC000_0028);
        assert_eq!(
            (task.selector, task.source),
            (0x28, TaskSwitchSource::TaskGate)
        );
        let apic = ApicAccess::from_qualification(0x1_10B0);
        assert_eq!((apic.offset, apic.kind), (0xB0, ApicAccessKind::Write));
        assert!(apic.asynchronous);
    }

    #[test]
    fn dr6_takes_the_conditions() {
        let step = DebugQualification::BS;
        assert_eq!(step.into_dr6(0xFFFF_0FF1), 0xFFFF_4FF0);
        let rtm = DebugQualification::RTM | DebugQualification::B0;
        assert_eq!(rtm.into_dr6(0xFFFF_0FF0), 0xFFFE_0FF1);
    }
}
