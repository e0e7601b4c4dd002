//! Intercepts: which instructions and events leave the guest (APM vol. 2, 15.9 and appendix B).
//!
//! The VMCB begins with six 32-bit words. Bit `b` of word `w` belongs to exit code `32 * w + b`
//! (the one regularity of appendix C), except that some exits need more than their bit: see
//! [`Intercepts::of_exit`].

use bitflags::bitflags;
use core::fmt;

use testudo_arch::Exception;

bitflags! {
    /// Word 0: reads (low half) and writes (high half) of control registers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct CrIntercepts: u32 {
        /// Reads of CR0, by MOV or SMSW.
        const READ_CR0 = 1;
        /// Reads of CR2.
        const READ_CR2 = 1 << 2;
        /// Reads of CR3.
        const READ_CR3 = 1 << 3;
        /// Reads of CR4.
        const READ_CR4 = 1 << 4;
        /// Reads of CR8.
        const READ_CR8 = 1 << 8;
        /// Writes of CR0, by MOV, LMSW or CLTS.
        const WRITE_CR0 = 1 << 16;
        /// Writes of CR2.
        const WRITE_CR2 = 1 << 18;
        /// Writes of CR3.
        const WRITE_CR3 = 1 << 19;
        /// Writes of CR4.
        const WRITE_CR4 = 1 << 20;
        /// Writes of CR8.
        const WRITE_CR8 = 1 << 24;
        const _ = !0;
    }
}

bitflags! {
    /// Word 1: reads (low half) and writes (high half) of debug registers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct DrIntercepts: u32 {
        /// Reads of DR0 to DR15.
        const READ_ALL = 0xFFFF;
        /// Writes of DR0 to DR15.
        const WRITE_ALL = 0xFFFF_0000;
        const _ = !0;
    }
}

macro_rules! numbered {
    ($type:ident, $what:literal) => {
        impl $type {
            #[doc = concat!("The intercept of reads of ", $what, " `number` (its low four bits).")]
            #[inline]
            pub const fn read(number: u8) -> Self {
                Self::from_bits_retain(1 << (number & 0xF))
            }

            #[doc = concat!("The intercept of writes of ", $what, " `number` (its low four bits).")]
            #[inline]
            pub const fn write(number: u8) -> Self {
                Self::from_bits_retain(1 << (16 + (number & 0xF)))
            }
        }
    };
}

numbered!(CrIntercepts, "CR");
numbered!(DrIntercepts, "DR");

bitflags! {
    /// Word 2: exceptions, by vector.
    ///
    /// Vector 2 has no meaning here: NMIs have their own intercept, [`Misc1::NMI`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ExceptionIntercepts: u32 {
        /// `#DE`.
        const DE = 1;
        /// `#DB`.
        const DB = 1 << 1;
        /// `#BP`.
        const BP = 1 << 3;
        /// `#OF`.
        const OF = 1 << 4;
        /// `#BR`.
        const BR = 1 << 5;
        /// `#UD`.
        const UD = 1 << 6;
        /// `#NM`.
        const NM = 1 << 7;
        /// `#DF`.
        const DF = 1 << 8;
        /// `#TS`.
        const TS = 1 << 10;
        /// `#NP`.
        const NP = 1 << 11;
        /// `#SS`.
        const SS = 1 << 12;
        /// `#GP`.
        const GP = 1 << 13;
        /// `#PF`.
        const PF = 1 << 14;
        /// `#MF`.
        const MF = 1 << 16;
        /// `#AC`.
        const AC = 1 << 17;
        /// `#MC`.
        const MC = 1 << 18;
        /// `#XF`, also called `#XM`.
        const XF = 1 << 19;
        /// `#CP`.
        const CP = 1 << 21;
        /// `#HV`.
        const HV = 1 << 28;
        /// `#VC`.
        const VC = 1 << 29;
        /// `#SX`.
        const SX = 1 << 30;
        const _ = !0;
    }
}

impl ExceptionIntercepts {
    /// The intercept of one exception.
    #[inline]
    pub const fn of(exception: Exception) -> Self {
        Self::from_bits_retain(1 << (exception.vector() & 31))
    }
}

bitflags! {
    /// Word 3, VMCB offset 00Ch.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Misc1: u32 {
        /// Physical maskable interrupts.
        const INTR = 1;
        /// Non-maskable interrupts.
        const NMI = 1 << 1;
        /// System-management interrupts.
        const SMI = 1 << 2;
        /// INIT.
        const INIT = 1 << 3;
        /// The moment at which a virtual interrupt would be taken: the interrupt window.
        const VINTR = 1 << 4;
        /// Writes of CR0 that change bits other than TS and MP.
        const CR0_SELECTIVE_WRITE = 1 << 5;
        /// SIDT.
        const IDTR_READ = 1 << 6;
        /// SGDT.
        const GDTR_READ = 1 << 7;
        /// SLDT.
        const LDTR_READ = 1 << 8;
        /// STR.
        const TR_READ = 1 << 9;
        /// LIDT.
        const IDTR_WRITE = 1 << 10;
        /// LGDT.
        const GDTR_WRITE = 1 << 11;
        /// LLDT.
        const LDTR_WRITE = 1 << 12;
        /// LTR.
        const TR_WRITE = 1 << 13;
        /// RDTSC.
        const RDTSC = 1 << 14;
        /// RDPMC.
        const RDPMC = 1 << 15;
        /// PUSHF.
        const PUSHF = 1 << 16;
        /// POPF.
        const POPF = 1 << 17;
        /// CPUID.
        const CPUID = 1 << 18;
        /// RSM.
        const RSM = 1 << 19;
        /// IRET.
        const IRET = 1 << 20;
        /// INT n (not INT1, INT3 and INTO).
        const INT_N = 1 << 21;
        /// INVD.
        const INVD = 1 << 22;
        /// PAUSE, thinned by the pause filter.
        const PAUSE = 1 << 23;
        /// HLT.
        const HLT = 1 << 24;
        /// INVLPG.
        const INVLPG = 1 << 25;
        /// INVLPGA.
        const INVLPGA = 1 << 26;
        /// Ports, as the I/O permission map says.
        const IOIO = 1 << 27;
        /// MSRs, as the MSR permission map says.
        const MSR = 1 << 28;
        /// Task switches.
        const TASK_SWITCH = 1 << 29;
        /// The processor freezing with FERR#.
        const FERR_FREEZE = 1 << 30;
        /// Shutdown: triple faults among them.
        const SHUTDOWN = 1 << 31;
    }
}

bitflags! {
    /// Word 4, VMCB offset 010h.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Misc2: u32 {
        /// VMRUN. Every valid VMCB has it: "The VMRUN intercept bit is clear" is an illegal state
        /// (APM vol. 2, 15.5.1).
        const VMRUN = 1;
        /// VMMCALL.
        const VMMCALL = 1 << 1;
        /// VMLOAD.
        const VMLOAD = 1 << 2;
        /// VMSAVE.
        const VMSAVE = 1 << 3;
        /// STGI.
        const STGI = 1 << 4;
        /// CLGI.
        const CLGI = 1 << 5;
        /// SKINIT.
        const SKINIT = 1 << 6;
        /// RDTSCP.
        const RDTSCP = 1 << 7;
        /// ICEBP (INT1).
        const ICEBP = 1 << 8;
        /// WBINVD and WBNOINVD.
        const WBINVD = 1 << 9;
        /// MONITOR and MONITORX.
        const MONITOR = 1 << 10;
        /// MWAIT and MWAITX, always.
        const MWAIT = 1 << 11;
        /// MWAIT and MWAITX, if the monitor is armed.
        const MWAIT_ARMED = 1 << 12;
        /// XSETBV.
        const XSETBV = 1 << 13;
        /// RDPRU.
        const RDPRU = 1 << 14;
        /// Writes of EFER, after the instruction.
        const EFER_WRITE_TRAP = 1 << 15;
        /// Writes of CR0, after the instruction. The following bits: CR1 to CR15.
        const CR0_WRITE_TRAP = 1 << 16;
        /// Writes of CR3, after the instruction.
        const CR3_WRITE_TRAP = 1 << 19;
        /// Writes of CR4, after the instruction.
        const CR4_WRITE_TRAP = 1 << 20;
        /// Writes of CR8, after the instruction.
        const CR8_WRITE_TRAP = 1 << 24;
        const _ = !0;
    }
}

bitflags! {
    /// Word 5, VMCB offset 014h.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Misc3: u32 {
        /// INVLPGB, always.
        const INVLPGB = 1;
        /// INVLPGB whose operand is illegal for the guest.
        const INVLPGB_ILLEGAL = 1 << 1;
        /// INVPCID.
        const INVPCID = 1 << 2;
        /// MCOMMIT.
        const MCOMMIT = 1 << 3;
        /// TLBSYNC.
        const TLBSYNC = 1 << 4;
        /// Bus locks, after `bus_lock_threshold` of them.
        const BUS_LOCK = 1 << 5;
        /// HLT, if no virtual interrupt is pending.
        const IDLE_HLT = 1 << 6;
        const _ = !0;
    }
}

/// All six intercept words together.
///
/// ```
/// use testudo_svm::exit::ExitCode;
/// use testudo_svm::intercept::{Intercepts, Misc1, Misc2};
///
/// let mut wanted = Intercepts { misc1: Misc1::HLT, misc2: Misc2::VMRUN, ..Intercepts::default() };
/// assert!(wanted.contains(ExitCode::HLT) && !wanted.contains(ExitCode::CPUID));
/// wanted |= Intercepts::of_exit(ExitCode::CPUID).unwrap();
/// assert!(wanted.contains(ExitCode::CPUID));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Intercepts {
    /// Control registers.
    pub cr: CrIntercepts,
    /// Debug registers.
    pub dr: DrIntercepts,
    /// Exceptions.
    pub exceptions: ExceptionIntercepts,
    /// Instructions and events, first word.
    pub misc1: Misc1,
    /// Instructions and events, second word.
    pub misc2: Misc2,
    /// Instructions and events, third word.
    pub misc3: Misc3,
}

impl Intercepts {
    /// From the six words as they stand in the VMCB. Unknown bits are kept.
    #[inline]
    pub const fn from_words(words: [u32; 6]) -> Self {
        Self {
            cr: CrIntercepts::from_bits_retain(words[0]),
            dr: DrIntercepts::from_bits_retain(words[1]),
            exceptions: ExceptionIntercepts::from_bits_retain(words[2]),
            misc1: Misc1::from_bits_retain(words[3]),
            misc2: Misc2::from_bits_retain(words[4]),
            misc3: Misc3::from_bits_retain(words[5]),
        }
    }

    /// The six words as they stand in the VMCB.
    #[inline]
    pub const fn to_words(self) -> [u32; 6] {
        [
            self.cr.bits(),
            self.dr.bits(),
            self.exceptions.bits(),
            self.misc1.bits(),
            self.misc2.bits(),
            self.misc3.bits(),
        ]
    }

    /// The intercept that an exit code belongs to, or `None` for exits that no intercept asks for:
    /// nested page faults, AVIC exits, VMGEXIT, failed entries.
    ///
    /// The bit is necessary, not always sufficient: IOIO and MSR exits also need the port or MSR
    /// set in its permission map. A MOV to CR0 needs either [`CrIntercepts::WRITE_CR0`] or
    /// [`Misc1::CR0_SELECTIVE_WRITE`], which have exit codes of their own.
    #[inline]
    pub const fn of_exit(code: ExitCode) -> Option<Self> {
        if code.0 >= 6 * 32 {
            return None;
        }
        let mut words = [0; 6];
        words[(code.0 / 32) as usize] = 1 << (code.0 % 32);
        Some(Self::from_words(words))
    }

    /// Whether the intercept that this exit code belongs to is set.
    #[inline]
    pub const fn contains(self, code: ExitCode) -> bool {
        if code.0 >= 6 * 32 {
            return false;
        }
        self.to_words()[(code.0 / 32) as usize] & (1 << (code.0 % 32)) != 0
    }

    /// The exit codes whose intercepts are set, in ascending order.
    pub fn exit_codes(self) -> impl Iterator<Item = ExitCode> {
        (0..6 * 32).map(ExitCode).filter(move |&c| self.contains(c))
    }
}

impl core::ops::BitOr for Intercepts {
    type Output = Self;

    /// Everything that either side intercepts: what a nested guest must run with.
    #[inline]
    fn bitor(self, other: Self) -> Self {
        let (a, b) = (self.to_words(), other.to_words());
        Self::from_words(core::array::from_fn(|i| a[i] | b[i]))
    }
}

impl core::ops::BitOrAssign for Intercepts {
    #[inline]
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

impl fmt::Display for Intercepts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, code) in self.exit_codes().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{code}")?;
        }
        Ok(())
    }
}

use crate::exit::ExitCode;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn golden_bits() {
        // APM vol. 2, table B-1: offset 00Ch bit 18 is CPUID, 010h bit 0 is VMRUN, 014h bit 5 is
        // the bus lock.
        assert_eq!(Misc1::CPUID.bits(), 0x0004_0000);
        assert_eq!(Misc1::SHUTDOWN.bits(), 0x8000_0000);
        assert_eq!(Misc2::XSETBV.bits(), 0x2000);
        assert_eq!(Misc3::BUS_LOCK.bits(), 0x20);
        assert_eq!(CrIntercepts::write(3), CrIntercepts::WRITE_CR3);
        assert_eq!(CrIntercepts::read(8), CrIntercepts::READ_CR8);
        assert_eq!(DrIntercepts::write(7).bits(), 1 << 23);
        let pf = ExceptionIntercepts::of(Exception::PageFault);
        assert_eq!(pf, ExceptionIntercepts::PF);
    }

    #[test]
    fn an_exit_names_its_bit() {
        let of = |code| Intercepts::of_exit(code).unwrap();
        assert_eq!(of(ExitCode::HLT).misc1, Misc1::HLT);
        assert_eq!(of(ExitCode::XSETBV).misc2, Misc2::XSETBV);
        assert_eq!(of(ExitCode::EFER_WRITE_TRAP).misc2, Misc2::EFER_WRITE_TRAP);
        assert_eq!(of(ExitCode::IDLE_HLT).misc3, Misc3::IDLE_HLT);
        assert_eq!(of(ExitCode::IOIO).misc1, Misc1::IOIO);
        assert_eq!(of(ExitCode(0x4E)).exceptions, ExceptionIntercepts::PF);
        assert_eq!(of(ExitCode(0x14)).cr, CrIntercepts::WRITE_CR4);
        assert_eq!(of(ExitCode(0x37)).dr, DrIntercepts::write(7));
        for none in [ExitCode::NPF, ExitCode::INVALID, ExitCode::VMGEXIT] {
            assert_eq!(Intercepts::of_exit(none), None);
        }
    }

    #[test]
    fn display_lists_exits() {
        let set = Intercepts {
            misc1: Misc1::CPUID | Misc1::HLT,
            ..Intercepts::default()
        };
        assert_eq!(set.to_string(), "CPUID, HLT");
    }

    proptest! {
        #[test]
        fn words_round_trip(words: [u32; 6], other: [u32; 6]) {
            let set = Intercepts::from_words(words);
            prop_assert_eq!(set.to_words(), words);
            let mut rebuilt = Intercepts::default();
            for code in set.exit_codes() {
                rebuilt |= Intercepts::of_exit(code).unwrap();
            }
            prop_assert_eq!(rebuilt, set);
            let merged = set | Intercepts::from_words(other);
            for code in (0..192).map(ExitCode) {
                let either = set.contains(code) || Intercepts::from_words(other).contains(code);
                prop_assert_eq!(merged.contains(code), either);
            }
        }
    }
}
