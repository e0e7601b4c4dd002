//! Exit reasons (SDM vol. 3C, 27.9.1; vol. 3D, appendix C).

use core::fmt;

use crate::error::AccessError;
use crate::fields;
use crate::vmcs::VmcsRead;

/// The exit-reason field: the basic reason and what goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExitReason(pub u32);

impl ExitReason {
    /// Reads the field. One VMREAD.
    ///
    /// # Errors
    ///
    /// The VMREAD failed.
    #[inline]
    pub fn read(vmcs: &impl VmcsRead) -> Result<Self, AccessError> {
        Ok(Self(vmcs.get(fields::EXIT_REASON)?))
    }

    /// The basic reason.
    #[inline]
    pub const fn basic(self) -> BasicReason {
        BasicReason::from_number(self.0 as u16)
    }

    /// Whether the guest was never entered.
    #[inline]
    pub const fn is_entry_failure(self) -> bool {
        self.0 & (1 << 31) != 0
    }

    /// Whether the exit came from VMX root operation (an SMM exit).
    #[inline]
    pub const fn is_from_root(self) -> bool {
        self.0 & (1 << 29) != 0
    }

    /// Whether an MTF exit is pending as well (SMM exits only).
    #[inline]
    pub const fn has_pending_mtf(self) -> bool {
        self.0 & (1 << 28) != 0
    }

    /// Whether the processor was in an enclave.
    #[inline]
    pub const fn is_from_enclave(self) -> bool {
        self.0 & (1 << 27) != 0
    }

    /// Whether a bus lock was detected just before the exit.
    #[inline]
    pub const fn has_bus_lock(self) -> bool {
        self.0 & (1 << 26) != 0
    }

    /// Whether the event whose delivery was interrupted left its shadow stack busy.
    #[inline]
    pub const fn left_shadow_stack_busy(self) -> bool {
        self.0 & (1 << 25) != 0
    }
}

impl ExitReason {
    /// What goes with the basic reason, in words: nothing, or all of it in brackets after a space.
    pub fn circumstances(self) -> impl fmt::Display {
        Circumstances(self)
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.basic(), self.circumstances())
    }
}

struct Circumstances(ExitReason);

impl fmt::Display for Circumstances {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.0;
        let all = [
            (reason.is_entry_failure(), "VM entry failed"),
            (reason.is_from_root(), "from VMX root operation"),
            (reason.has_pending_mtf(), "an MTF exit pending"),
            (reason.is_from_enclave(), "from an enclave"),
            (reason.has_bus_lock(), "after a bus lock"),
            (reason.left_shadow_stack_busy(), "a shadow stack left busy"),
        ];
        let mut gap = " (";
        for (_, words) in all.iter().filter(|(applies, _)| *applies) {
            write!(f, "{gap}{words}")?;
            gap = ", ";
        }
        if gap == ", " {
            f.write_str(")")
        } else {
            Ok(())
        }
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal;)*) => {
        /// A basic exit reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum BasicReason {
            $($(#[doc = $doc])+ $name,)*
            /// A number that the manual does not define.
            Unknown(u16),
        }

        impl BasicReason {
            /// Every reason that the manual defines.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The reason with this number.
            #[inline]
            pub const fn from_number(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// The number.
            #[inline]
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Unknown(number) => number,
                }
            }

            /// What the manual calls it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_ascii(),)*
                    Self::Unknown(_) => "unknown exit reason",
                }
            }
        }
    };
}

reasons! {
    /// Exception or NMI
    ExceptionOrNmi = 0;
    /// External interrupt
    ExternalInterrupt = 1;
    /// Triple fault
    TripleFault = 2;
    /// INIT signal
    Init = 3;
    /// Start-up IPI
    Sipi = 4;
    /// I/O SMI
    IoSmi = 5;
    /// Other SMI
    OtherSmi = 6;
    /// Interrupt window
    InterruptWindow = 7;
    /// NMI window
    NmiWindow = 8;
    /// Task switch
    TaskSwitch = 9;
    /// CPUID
    Cpuid = 10;
    /// GETSEC
    Getsec = 11;
    /// HLT
    Hlt = 12;
    /// INVD
    Invd = 13;
    /// INVLPG
    Invlpg = 14;
    /// RDPMC
    Rdpmc = 15;
    /// RDTSC
    Rdtsc = 16;
    /// RSM
    Rsm = 17;
    /// VMCALL
    Vmcall = 18;
    /// VMCLEAR
    Vmclear = 19;
    /// VMLAUNCH
    Vmlaunch = 20;
    /// VMPTRLD
    Vmptrld = 21;
    /// VMPTRST
    Vmptrst = 22;
    /// VMREAD
    Vmread = 23;
    /// VMRESUME
    Vmresume = 24;
    /// VMWRITE
    Vmwrite = 25;
    /// VMXOFF
    Vmxoff = 26;
    /// VMXON
    Vmxon = 27;
    /// Control-register access
    ControlRegister = 28;
    /// MOV DR
    DebugRegister = 29;
    /// I/O instruction
    Io = 30;
    /// RDMSR
    Rdmsr = 31;
    /// WRMSR
    Wrmsr = 32;
    /// VM-entry failure due to invalid guest state
    InvalidGuestState = 33;
    /// VM-entry failure due to MSR loading
    MsrLoading = 34;
    /// MWAIT
    Mwait = 36;
    /// Monitor trap flag
    MonitorTrapFlag = 37;
    /// MONITOR
    Monitor = 39;
    /// PAUSE
    Pause = 40;
    /// VM-entry failure due to machine-check event
    EntryMachineCheck = 41;
    /// TPR below threshold
    TprBelowThreshold = 43;
    /// APIC access
    ApicAccess = 44;
    /// Virtualized EOI
    VirtualizedEoi = 45;
    /// Access to GDTR or IDTR
    GdtrIdtr = 46;
    /// Access to LDTR or TR
    LdtrTr = 47;
    /// EPT violation
    EptViolation = 48;
    /// EPT misconfiguration
    EptMisconfiguration = 49;
    /// INVEPT
    Invept = 50;
    /// RDTSCP
    Rdtscp = 51;
    /// VMX-preemption timer expired
    PreemptionTimer = 52;
    /// INVVPID
    Invvpid = 53;
    /// WBINVD or WBNOINVD
    Wbinvd = 54;
    /// XSETBV
    Xsetbv = 55;
    /// APIC write
    ApicWrite = 56;
    /// RDRAND
    Rdrand = 57;
    /// INVPCID
    Invpcid = 58;
    /// VMFUNC
    Vmfunc = 59;
    /// ENCLS
    Encls = 60;
    /// RDSEED
    Rdseed = 61;
    /// Page-modification log full
    PmlFull = 62;
    /// XSAVES
    Xsaves = 63;
    /// XRSTORS
    Xrstors = 64;
    /// PCONFIG
    Pconfig = 65;
    /// SPP-related event
    SppEvent = 66;
    /// UMWAIT
    Umwait = 67;
    /// TPAUSE
    Tpause = 68;
    /// LOADIWKEY
    Loadiwkey = 69;
    /// ENCLV
    Enclv = 70;
    /// ENQCMD PASID translation failure
    EnqcmdPasid = 72;
    /// ENQCMDS PASID translation failure
    EnqcmdsPasid = 73;
    /// Bus lock
    BusLock = 74;
    /// Instruction timeout
    InstructionTimeout = 75;
    /// SEAMCALL
    Seamcall = 76;
    /// TDCALL
    Tdcall = 77;
    /// RDMSRLIST
    Rdmsrlist = 78;
    /// WRMSRLIST
    Wrmsrlist = 79;
    /// URDMSR
    Urdmsr = 80;
    /// UWRMSR
    Uwrmsr = 81;
    /// RDMSR with an immediate operand
    RdmsrImmediate = 84;
    /// WRMSRNS with an immediate operand
    WrmsrnsImmediate = 85;
}

impl BasicReason {
    /// Whether an exit for this reason can occur while an event is being delivered to the guest, so
    /// that the IDT-vectoring information must be looked at (30.2.4).
    #[inline]
    pub const fn may_interrupt_delivery(self) -> bool {
        matches!(
            self,
            Self::ExceptionOrNmi
                | Self::TripleFault
                | Self::TaskSwitch
                | Self::ApicAccess
                | Self::EptViolation
                | Self::EptMisconfiguration
                | Self::ApicWrite
                | Self::PmlFull
                | Self::SppEvent
                | Self::InstructionTimeout
                | Self::Unknown(_)
        )
    }
}

impl fmt::Display for BasicReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(number) => write!(f, "unknown exit reason {number}"),
            known => f.write_str(known.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for number in 0..=u16::MAX {
            assert_eq!(BasicReason::from_number(number).number(), number);
        }
    }

    #[test]
    fn flags_and_words() {
        let reason = ExitReason(0x8000_0021);
        assert!(reason.is_entry_failure());
        assert_eq!(
            std::format!("{reason}"),
            "VM-entry failure due to invalid guest state (VM entry failed)"
        );
        assert_eq!(
            std::format!("{}", ExitReason(1 << 27 | 1 << 26 | 1)),
            "External interrupt (from an enclave, after a bus lock)"
        );
        assert_eq!(
            std::format!("{}", ExitReason(300)),
            "unknown exit reason 300"
        );
    }
}
