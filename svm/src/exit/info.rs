//! What EXITINFO1 and EXITINFO2 hold, by kind of exit (APM vol. 2, 15.8 to 15.12 and 15.25).

use core::fmt;

use bitflags::bitflags;
use testudo_arch::regs::SegmentRegister;
use testudo_arch::{Gpa, Gpr, Gva};

/// An access to a port (APM vol. 2, 15.10.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes per element: 1, 2 or 4. 0 only if the processor's report made no sense.
    pub size: u8,
    /// IN rather than OUT.
    pub input: bool,
    /// INS or OUTS, which use memory instead of RAX.
    pub string: bool,
    /// With a REP prefix.
    pub rep: bool,
    /// Bytes of an address: 2, 4 or 8. Meaningful for string instructions.
    pub address_size: u8,
    /// The effective segment of OUTS, raw as in EXITINFO1 bits 12:10. Only with decode assists:
    /// see [`Self::segment`].
    pub raw_segment: u8,
    /// RIP of the following instruction, from EXITINFO2.
    pub next_rip: u64,
}

impl PortAccess {
    pub(super) const fn new(info1: u64, info2: u64) -> Self {
        // One bit each for 8, 16 and 32 bits; the sizes in bytes are 1, 2 and 4.
        let size = match (info1 >> 4) & 7 {
            1 => 1,
            2 => 2,
            4 => 4,
            _ => 0,
        };
        let address_size = match (info1 >> 7) & 7 {
            1 => 2,
            2 => 4,
            4 => 8,
            _ => 0,
        };
        Self {
            port: (info1 >> 16) as u16,
            size,
            input: info1 & 1 != 0,
            string: info1 & 1 << 2 != 0,
            rep: info1 & 1 << 3 != 0,
            address_size,
            raw_segment: ((info1 >> 10) & 7) as u8,
            next_rip: info2,
        }
    }

    /// EXITINFO1 for this access, as an emulator of #VMEXIT writes it.
    pub const fn to_info1(self) -> u64 {
        let size = self.size as u64 & 7;
        let address_size = match self.address_size {
            2 => 1,
            4 => 2,
            8 => 4,
            _ => 0u64,
        };
        (self.port as u64) << 16
            | ((self.raw_segment & 7) as u64) << 10
            | address_size << 7
            | size << 4
            | (self.rep as u64) << 3
            | (self.string as u64) << 2
            | self.input as u64
    }

    /// The effective segment of an OUTS, on a processor with decode assists.
    pub const fn segment(self) -> Option<SegmentRegister> {
        Some(match self.raw_segment {
            0 => SegmentRegister::Es,
            1 => SegmentRegister::Cs,
            2 => SegmentRegister::Ss,
            3 => SegmentRegister::Ds,
            4 => SegmentRegister::Fs,
            5 => SegmentRegister::Gs,
            _ => return None,
        })
    }
}

impl fmt::Display for PortAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rep = if self.rep { "REP " } else { "" };
        let name = match (self.input, self.string) {
            (true, false) => "IN",
            (false, false) => "OUT",
            (true, true) => "INS",
            (false, true) => "OUTS",
        };
        let plural = if self.size == 1 { "" } else { "s" };
        write!(
            f,
            "{rep}{name}, port {:#x}, {} byte{plural}",
            self.port, self.size
        )
    }
}

/// A MOV, LMSW, SMSW or CLTS on a control register (APM vol. 2, 15.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CrAccess {
    /// The number of the control register.
    pub register: u8,
    /// Write rather than read.
    pub write: bool,
    /// The general register of a MOV. `None` for LMSW, SMSW and CLTS, and without decode assists.
    pub gpr: Option<Gpr>,
}

impl CrAccess {
    pub(super) const fn new(register: u8, write: bool, info1: u64) -> Self {
        let gpr = if info1 >> 63 != 0 {
            Some(Gpr::from_number(info1 as u8))
        } else {
            None
        };
        Self {
            register,
            write,
            gpr,
        }
    }
}

/// A MOV on a debug register (APM vol. 2, 15.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DrAccess {
    /// The number of the debug register.
    pub register: u8,
    /// Write rather than read.
    pub write: bool,
    /// The general register. Meaningful only with decode assists: nothing in the VMCB says so.
    pub assisted_gpr: Gpr,
}

bitflags! {
    /// The error code of a nested page fault, EXITINFO1 (APM vol. 2, 15.25.6). The low bits are
    /// those of a #PF.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct NestedFaultBits: u64 {
        /// The nested translation was present: protection stopped it.
        const PRESENT = 1;
        /// A write.
        const WRITE = 1 << 1;
        /// A user-mode access; set for every access in a guest table walk, which is made as user.
        const USER = 1 << 2;
        /// A reserved bit was set in a nested table entry.
        const RESERVED = 1 << 3;
        /// An instruction fetch.
        const FETCH = 1 << 4;
        /// A shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// Stopped by the reverse map table (SEV-SNP).
        const RMP = 1 << 31;
        /// At the final guest-physical address.
        const FINAL = 1 << 32;
        /// While walking the guest's page table.
        const TABLE_WALK = 1 << 33;
        /// The guest's effective C-bit was 1 (SEV-SNP).
        const ENCRYPTED = 1 << 34;
        /// Page sizes in the page table and the reverse map table differ (SEV-SNP).
        const SIZE_MISMATCH = 1 << 35;
        /// Stopped by a VM privilege level (SEV-SNP).
        const VMPL = 1 << 36;
        /// Stopped by the supervisor shadow-stack check.
        const SUPERVISOR_SHADOW_STACK = 1 << 37;
        const _ = !0;
    }
}

/// A nested page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NestedPageFault {
    /// Where: with its offset in the page if the fault is at the final address.
    pub gpa: Gpa,
    /// How and why.
    pub bits: NestedFaultBits,
}

impl fmt::Display for NestedPageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use NestedFaultBits as B;
        let has = |bit| self.bits.contains(bit);
        let access = match (has(B::FETCH), has(B::WRITE)) {
            (true, _) => "fetch",
            (false, true) => "write",
            (false, false) => "read",
        };
        let why = match (has(B::RESERVED), has(B::PRESENT)) {
            (true, _) => "reserved bit set",
            (false, true) => "not allowed",
            (false, false) => "not present",
        };
        let place = if has(B::TABLE_WALK) {
            " in the guest's page table"
        } else {
            ""
        };
        write!(f, "{access} of {}{place}: {why}", self.gpa)
    }
}

/// A task switch (APM vol. 2, 15.14.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskSwitch {
    /// The selector of the incoming task.
    pub selector: u16,
    /// Why.
    pub reason: TaskSwitchReason,
    /// The error code to push in the new task, for an exception that has one.
    pub error_code: Option<u32>,
    /// The RF flag that would be saved in the outgoing task.
    pub resume_flag: bool,
}

/// What switches tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskSwitchReason {
    /// IRET.
    Iret,
    /// A far jump.
    Jump,
    /// A far call, or an event through a task gate (then EXITINTINFO is valid).
    CallOrEvent,
}

impl TaskSwitch {
    pub(super) const fn new(info1: u64, info2: u64) -> Self {
        let reason = if info2 & 1 << 36 != 0 {
            TaskSwitchReason::Iret
        } else if info2 & 1 << 38 != 0 {
            TaskSwitchReason::Jump
        } else {
            TaskSwitchReason::CallOrEvent
        };
        Self {
            selector: info1 as u16,
            reason,
            error_code: if info2 & 1 << 44 != 0 {
                Some(info2 as u32)
            } else {
                None
            },
            resume_flag: info2 & 1 << 48 != 0,
        }
    }
}

/// An IPI that AVIC could not complete (APM vol. 2, 15.29.9.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IncompleteIpi {
    /// The interrupt command register as the guest wrote it.
    pub icr: u64,
    /// Why.
    pub reason: IncompleteIpiReason,
    /// The index in the logical or physical table of the (first) destination in question.
    pub index: u16,
}

/// Why AVIC could not complete an IPI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IncompleteIpiReason {
    /// The kind of interrupt is not one that AVIC delivers.
    InvalidType,
    /// A destination is not running: it must be woken or scheduled.
    TargetNotRunning,
    /// A destination has no valid table entry.
    InvalidTarget,
    /// A destination's backing page is not valid.
    InvalidBackingPage,
    /// The vector is below 16.
    InvalidVector,
    /// A reason that this crate does not know.
    Unknown(u32),
}

impl IncompleteIpi {
    pub(super) const fn new(info1: u64, info2: u64) -> Self {
        let reason = match (info2 >> 32) as u32 {
            0 => IncompleteIpiReason::InvalidType,
            1 => IncompleteIpiReason::TargetNotRunning,
            2 => IncompleteIpiReason::InvalidTarget,
            3 => IncompleteIpiReason::InvalidBackingPage,
            4 => IncompleteIpiReason::InvalidVector,
            other => IncompleteIpiReason::Unknown(other),
        };
        Self {
            icr: info1,
            reason,
            index: (info2 & 0xFFF) as u16,
        }
    }
}

/// An APIC access that AVIC does not accelerate (APM vol. 2, 15.29.9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnacceleratedAccess {
    /// The register's offset in the APIC page.
    pub offset: u16,
    /// A write: then the exit is a trap and the register has its new value.
    pub write: bool,
    /// For a write of EOI: the vector that it ended.
    pub vector: u8,
}

impl UnacceleratedAccess {
    pub(super) const fn new(info1: u64, info2: u64) -> Self {
        Self {
            offset: (info1 & 0xFF0) as u16,
            write: info1 & 1 << 32 != 0,
            vector: info2 as u8,
        }
    }
}

/// An intercepted exception (APM vol. 2, 15.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExceptionInfo {
    /// The vector.
    pub vector: u8,
    /// The error code, for vectors that have one.
    pub error_code: Option<u32>,
    /// For #PF: the linear address. The guest's CR2 has not been written.
    pub address: Option<Gva>,
}

impl ExceptionInfo {
    pub(super) fn new(vector: u8, info1: u64, info2: u64) -> Self {
        use testudo_arch::Exception;
        let exception = Exception::from_vector(vector);
        let error_code = match exception {
            // Always zero, and EXITINFO1 is undefined (APM vol. 2, 15.12.9).
            Some(Exception::DoubleFault) => Some(0),
            Some(exception) if exception.has_error_code() => Some(info1 as u32),
            _ => None,
        };
        Self {
            vector,
            error_code,
            address: (exception == Some(Exception::PageFault)).then_some(Gva(info2)),
        }
    }

    /// The event that gives the exception to the guest after all. A #PF also needs CR2, and what it
    /// interrupted (EXITINTINFO) decides whether it is a double fault:
    /// [`RawEvent::combine`](crate::event::RawEvent::combine).
    pub const fn to_event(self) -> testudo_arch::Event {
        testudo_arch::Event::Exception {
            vector: self.vector,
            error_code: self.error_code,
        }
    }
}

impl fmt::Display for ExceptionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_event().fmt(f)?;
        match self.address {
            Some(address) => write!(f, " at {address}"),
            None => Ok(()),
        }
    }
}
