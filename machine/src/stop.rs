//! Why a machine stopped, with the state of the processor that stopped it.

use core::fmt;

use testudo_arch::regs::{CpuMode, SystemRegisters};
use testudo_arch::{Gpa, Gprs, Segment};

use crate::vcpu::{NestedStateError, VcpuError};

/// Why a machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// The guest switched the machine off.
    #[error("the guest powered off")]
    PowerOff,
    /// The guest reset the machine.
    #[error("the guest reset the machine")]
    Reset,
    /// The guest ended the run with a status.
    #[error("the guest exited with status {0}")]
    Exit(u32),
    /// The host asked for it.
    #[error("the host stopped the machine")]
    Host,
    /// The machine ran as long as it may.
    #[error("the guest was still running when its time was up")]
    TimeIsUp,
    /// A triple fault: an exception while a double fault was delivered.
    #[error("the guest's processor shut down (triple fault)")]
    TripleFault,
    /// The processor found the guest's state invalid.
    #[error("the processor refused the guest's state")]
    InvalidState,
    /// Code was to be fetched from where no memory is.
    #[error("the guest executes at {0}, where no memory is")]
    FetchOutsideMemory(Gpa),
    /// The guest touched memory that is its own, and the host has none left for it.
    #[error("the host has no memory left for the guest's page at {0}")]
    OutOfMemory(Gpa),
    /// An instruction accessed a device in a way that the emulator does not know.
    #[error("the instruction at RIP accesses a device and cannot be emulated: {bytes:02x?}")]
    Unemulated {
        /// The instruction, as far as it could be read.
        bytes: [u8; 15],
    },
    /// An exit that this version does not know.
    #[error("unknown exit {code:#x} (information {info:#x?})")]
    UnknownExit {
        /// The backend's raw code.
        code: u64,
        /// What the processor said about it.
        info: [u64; 2],
    },
    /// The state of a guest hypervisor was not taken up again.
    #[error("the nested state cannot be restored: {0}")]
    NestedState(NestedStateError),
    /// The backend failed.
    #[error(transparent)]
    Backend(VcpuError),
}

impl StopReason {
    /// The status of a run that took too long, as `timeout` of the GNU coreutils has it.
    pub const TIMED_OUT: u8 = 124;

    /// The status with which a program that runs one machine ends: the guest's own if it gave
    /// one, zero for an orderly end, one for all else.
    pub fn status(&self) -> u8 {
        match *self {
            Self::Exit(status) => status as u8,
            Self::PowerOff | Self::Reset => 0,
            Self::TimeIsUp => Self::TIMED_OUT,
            _ => 1,
        }
    }

    /// Whether the guest ended in order, so that its processor's state is of no interest.
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            Self::PowerOff | Self::Reset | Self::Exit(_) | Self::Host
        )
    }
}

/// A stop: why, on which vCPU, and in which state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// The vCPU that it happened on.
    pub vcpu: usize,
    /// Its general registers.
    pub gprs: Gprs,
    /// Its other registers.
    pub system: SystemRegisters,
}

impl fmt::Display for Stop {
    /// The reason, and the guest's state unless the end was in order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if self.reason.is_orderly() {
            return Ok(());
        }
        let s = &self.system;
        let mode = match s.mode() {
            CpuMode::Real => "real mode",
            CpuMode::Virtual8086 => "virtual-8086 mode",
            CpuMode::Protected16 => "16-bit protected mode",
            CpuMode::Protected32 => "32-bit protected mode",
            CpuMode::Compatibility16 => "16-bit compatibility mode",
            CpuMode::Compatibility32 => "32-bit compatibility mode",
            CpuMode::Long64 => "64-bit mode",
        };
        writeln!(f, "\nvCPU {} in {mode}, CPL {}:", self.vcpu, s.cpl())?;
        writeln!(f, "rip {:016x} rflags {:08x}", s.rip, s.rflags)?;
        writeln!(f, "{:?}", self.gprs)?;
        writeln!(
            f,
            "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:04x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )?;
        for (name, segment) in [
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("es", &s.es),
            ("fs", &s.fs),
            ("gs", &s.gs),
        ] {
            write_segment(f, name, segment)?;
        }
        write_segment(f, "tr", &s.tr)?;
        write!(
            f,
            "gdtr {:x} limit {:x}, idtr {:x} limit {:x}",
            s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit
        )
    }
}

fn write_segment(f: &mut fmt::Formatter<'_>, name: &str, s: &Segment) -> fmt::Result {
    let Segment {
        selector,
        attributes,
        limit,
        base,
    } = s;
    writeln!(
        f,
        "{name} {selector:04x} base {base:x} limit {limit:x} attributes {:05x}",
        attributes.bits()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stop(reason: StopReason) -> Stop {
        Stop {
            reason,
            vcpu: 1,
            gprs: Gprs {
                rax: 0xABCD,
                ..Gprs::default()
            },
            system: SystemRegisters::reset(),
        }
    }

    #[test]
    fn an_orderly_end_is_one_line_and_a_failure_shows_the_state() {
        let text = std::format!("{}", stop(StopReason::Exit(7)));
        assert_eq!(text, "the guest exited with status 7");
        let text = std::format!("{}", stop(StopReason::TripleFault));
        assert!(text.contains("vCPU 1 in real mode, CPL 0"), "{text}");
        assert!(text.contains("rax 000000000000abcd"), "{text}");
        assert!(text.contains("cs f000 base ffff0000"), "{text}");
    }

    #[test]
    fn statuses() {
        let of = |reason: StopReason| reason.status();
        assert_eq!(
            (
                of(StopReason::Exit(7)),
                of(StopReason::PowerOff),
                of(StopReason::TripleFault)
            ),
            (7, 0, 1)
        );
    }
}
