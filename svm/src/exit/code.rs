//! Exit codes (APM vol. 2, appendix C).

use core::fmt;

/// EXITCODE, sign-extended to 64 bits: why the guest stopped.
///
/// Negative codes say that the guest never ran. Some implementations write only the low 32 bits of
/// the field, so [`ExitCode::from_vmcb`] restores the sign.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExitCode(pub u64);

macro_rules! codes {
    ($($name:ident = $code:expr, $text:literal;)*) => {
        #[allow(missing_docs, reason = "each name is the manual's own, less its VMEXIT_ prefix")]
        impl ExitCode {
            $(pub const $name: Self = Self($code as u64);)*

            /// Every code that has a name, by order of the manual. Control registers, debug
            /// registers and exceptions stand for themselves by number and are not here.
            pub const NAMED: &[Self] = &[$(Self::$name),*];

            const fn text(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    INTR = 0x060, "physical interrupt";
    NMI = 0x061, "NMI";
    SMI = 0x062, "SMI";
    INIT = 0x063, "INIT";
    VINTR = 0x064, "virtual-interrupt window";
    CR0_SEL_WRITE = 0x065, "selective CR0 write";
    IDTR_READ = 0x066, "SIDT";
    GDTR_READ = 0x067, "SGDT";
    LDTR_READ = 0x068, "SLDT";
    TR_READ = 0x069, "STR";
    IDTR_WRITE = 0x06A, "LIDT";
    GDTR_WRITE = 0x06B, "LGDT";
    LDTR_WRITE = 0x06C, "LLDT";
    TR_WRITE = 0x06D, "LTR";
    RDTSC = 0x06E, "RDTSC";
    RDPMC = 0x06F, "RDPMC";
    PUSHF = 0x070, "PUSHF";
    POPF = 0x071, "POPF";
    CPUID = 0x072, "CPUID";
    RSM = 0x073, "RSM";
    IRET = 0x074, "IRET";
    SWINT = 0x075, "INT n";
    INVD = 0x076, "INVD";
    PAUSE = 0x077, "PAUSE";
    HLT = 0x078, "HLT";
    INVLPG = 0x079, "INVLPG";
    INVLPGA = 0x07A, "INVLPGA";
    IOIO = 0x07B, "port I/O";
    MSR = 0x07C, "MSR access";
    TASK_SWITCH = 0x07D, "task switch";
    FERR_FREEZE = 0x07E, "FERR freeze";
    SHUTDOWN = 0x07F, "shutdown";
    VMRUN = 0x080, "VMRUN";
    VMMCALL = 0x081, "VMMCALL";
    VMLOAD = 0x082, "VMLOAD";
    VMSAVE = 0x083, "VMSAVE";
    STGI = 0x084, "STGI";
    CLGI = 0x085, "CLGI";
    SKINIT = 0x086, "SKINIT";
    RDTSCP = 0x087, "RDTSCP";
    ICEBP = 0x088, "INT1";
    WBINVD = 0x089, "WBINVD";
    MONITOR = 0x08A, "MONITOR";
    MWAIT = 0x08B, "MWAIT";
    MWAIT_CONDITIONAL = 0x08C, "MWAIT with the monitor armed";
    XSETBV = 0x08D, "XSETBV";
    RDPRU = 0x08E, "RDPRU";
    EFER_WRITE_TRAP = 0x08F, "EFER written";
    INVLPGB = 0x0A0, "INVLPGB";
    INVLPGB_ILLEGAL = 0x0A1, "illegal INVLPGB";
    INVPCID = 0x0A2, "INVPCID";
    MCOMMIT = 0x0A3, "MCOMMIT";
    TLBSYNC = 0x0A4, "TLBSYNC";
    BUSLOCK = 0x0A5, "bus lock";
    IDLE_HLT = 0x0A6, "HLT with nothing pending";
    NPF = 0x400, "nested page fault";
    AVIC_INCOMPLETE_IPI = 0x401, "AVIC: incomplete IPI";
    AVIC_NOACCEL = 0x402, "AVIC: access that is not accelerated";
    VMGEXIT = 0x403, "VMGEXIT";
    UNUSED = 0xF000_0000u64, "code reserved for software";
    INVALID = -1i64, "invalid guest state";
    BUSY = -2i64, "the VMSA is in use";
    IDLE_REQUIRED = -3i64, "the sibling thread is not idle";
    INVALID_PMC = -4i64, "invalid performance-counter state";
}

impl ExitCode {
    /// The first and last control-register read, by number of the register.
    pub const CR_READ: core::ops::RangeInclusive<u64> = 0x000..=0x00F;
    /// Control-register writes.
    pub const CR_WRITE: core::ops::RangeInclusive<u64> = 0x010..=0x01F;
    /// Debug-register reads.
    pub const DR_READ: core::ops::RangeInclusive<u64> = 0x020..=0x02F;
    /// Debug-register writes.
    pub const DR_WRITE: core::ops::RangeInclusive<u64> = 0x030..=0x03F;
    /// Exceptions, by vector.
    pub const EXCEPTION: core::ops::RangeInclusive<u64> = 0x040..=0x05F;
    /// Control-register writes, after the instruction.
    pub const CR_WRITE_TRAP: core::ops::RangeInclusive<u64> = 0x090..=0x09F;

    /// The code in a VMCB's field, whose high half an implementation may not have written.
    #[inline]
    pub const fn from_vmcb(raw: u64) -> Self {
        if raw >> 31 == 0 {
            Self(raw)
        } else {
            Self::with_sign(raw)
        }
    }

    /// No code but the negative ones and UNUSED has bit 31 set.
    #[cold]
    const fn with_sign(raw: u64) -> Self {
        if raw >> 31 == 1 && raw != Self::UNUSED.0 {
            Self(raw as u32 as i32 as i64 as u64)
        } else {
            Self(raw)
        }
    }

    /// Whether VMRUN failed and the guest never ran.
    #[inline]
    pub const fn is_failed_entry(self) -> bool {
        (self.0 as i64) < 0
    }
}

impl fmt::Display for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let low = self.0 & 0xF;
        match self.0 {
            0x000..=0x00F => write!(f, "read of CR{low}"),
            0x010..=0x01F => write!(f, "write of CR{low}"),
            0x020..=0x02F => write!(f, "read of DR{low}"),
            0x030..=0x03F => write!(f, "write of DR{low}"),
            0x040..=0x05F => {
                let vector = (self.0 - 0x40) as u8;
                match testudo_arch::Exception::from_vector(vector) {
                    Some(exception) => write!(f, "{exception}"),
                    None => write!(f, "exception {vector}"),
                }
            }
            0x090..=0x09F => write!(f, "CR{low} written"),
            other => match self.text() {
                Some(text) => f.write_str(text),
                None => write!(f, "unknown exit code {other:#x}"),
            },
        }
    }
}

impl fmt::Debug for ExitCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} ({self})", self.0)
    }
}
