//! The registers of a guest that stay in the processor across exits: moved only when another guest
//! needs the processor, or this guest another processor.

use core::arch::asm;

use testudo_arch::Msr;
use testudo_arch::cpuid::Cpuid;
pub use testudo_arch::xsave::{XsaveArea, XsaveUnsupported as ResidentUnsupported};

use super::HeldInterrupts;
use super::instructions::{rdmsr, wrmsr};

/// A guest's x87, YMM, ZMM, PKRU, XCR0, DR0 to DR3, TSC_AUX and CET MSRs.
///
/// XMM and MXCSR are in the image too, but [`GuestRegisters`](super::GuestRegisters) has the
/// values that count, except on a target without SSE, where they stay in the registers as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentRegisters {
    /// The image of XSAVE, or of FXSAVE on processors without XSAVE.
    pub area: XsaveArea,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// TSC_AUX.
    pub tsc_aux: u32,
    /// U_CET, PL0_SSP to PL3_SSP.
    pub cet: [u64; 5],
    support: Support,
}

/// What there is to move on the processors of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Support {
    /// All components that XCR0 can enable; 0 without XSAVE.
    xcr0: u64,
    tsc_aux: bool,
    cet: bool,
}

const CET_MSRS: [Msr; 5] = [
    Msr::U_CET,
    Msr::PL0_SSP,
    Msr::PL1_SSP,
    Msr::PL2_SSP,
    Msr::PL3_SSP,
];

impl ResidentRegisters {
    /// The state after reset, for processors with this CPUID table.
    ///
    /// # Errors
    ///
    /// See [`ResidentUnsupported`].
    pub fn reset(cpuid: &Cpuid) -> Result<Self, ResidentUnsupported> {
        let xcr0 = XsaveArea::components(cpuid)?;
        let rdtscp = cpuid.query(0x8000_0001, 0)[3] & 1 << 27 != 0;
        let shadow_stacks = cpuid.query(7, 0)[2] & 1 << 7 != 0;
        Ok(Self {
            area: XsaveArea::INITIAL,
            xcr0: 1,
            dr: [0; 4],
            tsc_aux: 0,
            cet: [0; 5],
            support: Support {
                xcr0,
                tsc_aux: rdtscp,
                cet: shadow_stacks,
            },
        })
    }

    /// Takes the guest's registers out of this processor.
    ///
    /// # Safety
    ///
    /// CPL 0, CR0.TS and CR0.EM clear, CR4.OSFXSR set, on a processor with the CPUID table that
    /// [`Self::reset`] was given; the registers in the processor are this guest's.
    pub unsafe fn save(&mut self) {
        let area = self.area.bytes_mut().as_mut_ptr();
        // SAFETY: every register read exists, by `support`; the area is large enough and aligned.
        unsafe {
            if self.support.xcr0 != 0 {
                self.xcr0 = xgetbv();
                // With all components enabled, XSAVE writes what the guest's XCR0 hides too.
                xsetbv(self.support.xcr0);
                asm!("xsave64 [{area}]", area = in(reg) area,
                    in("eax") self.support.xcr0 as u32, in("edx") (self.support.xcr0 >> 32) as u32,
                    options(nostack, preserves_flags));
            } else {
                asm!("fxsave64 [{area}]", area = in(reg) area, options(nostack, preserves_flags));
            }
            asm!("mov {0}, dr0", "mov {1}, dr1", "mov {2}, dr2", "mov {3}, dr3",
                out(reg) self.dr[0], out(reg) self.dr[1], out(reg) self.dr[2], out(reg) self.dr[3],
                options(nomem, nostack, preserves_flags));
            if self.support.tsc_aux {
                self.tsc_aux = rdmsr(Msr::TSC_AUX) as u32;
            }
            if self.support.cet {
                self.cet = CET_MSRS.map(|msr| rdmsr(msr));
            }
        }
    }

    /// Puts the guest's registers into this processor. Due before the first entry.
    ///
    /// # Safety
    ///
    /// As for [`Self::save`]; the host uses none of these registers; and the fields hold what
    /// [`Self::reset`] or [`Self::save`] put there, or values that the processor takes.
    pub unsafe fn load(&self) {
        let area = self.area.bytes().as_ptr();
        // SAFETY: every register written exists, by `support`, and takes its value, says the
        // caller; host code does not depend on any of them, MXCSR excepted, which gets its value
        // again.
        unsafe {
            if self.support.xcr0 != 0 {
                xsetbv(self.support.xcr0);
                asm!("xrstor64 [{area}]", area = in(reg) area,
                    in("eax") self.support.xcr0 as u32, in("edx") (self.support.xcr0 >> 32) as u32,
                    clobber_abi("sysv64"), options(nostack));
                xsetbv(self.xcr0);
            } else {
                asm!("fxrstor64 [{area}]", area = in(reg) area, clobber_abi("sysv64"),
                    options(nostack));
            }
            #[cfg(target_feature = "sse2")]
            asm!("ldmxcsr [rip + {}]", sym super::switch::HOST_MXCSR,
                options(nostack, preserves_flags));
            asm!("mov dr0, {0}", "mov dr1, {1}", "mov dr2, {2}", "mov dr3, {3}",
                in(reg) self.dr[0], in(reg) self.dr[1], in(reg) self.dr[2], in(reg) self.dr[3],
                options(nomem, nostack, preserves_flags));
            if self.support.tsc_aux {
                wrmsr(Msr::TSC_AUX, u64::from(self.tsc_aux));
            }
            if self.support.cet {
                for (msr, value) in CET_MSRS.into_iter().zip(self.cet) {
                    wrmsr(msr, value);
                }
            }
        }
    }
}

impl HeldInterrupts<'_> {
    /// Sets XCR0 for the guest whose registers are in this processor, as its XSETBV asks.
    ///
    /// # Safety
    ///
    /// CR4.OSXSAVE of the host is set, XCR0 takes this value, and the guest may enable all its
    /// components.
    pub unsafe fn set_guest_xcr0(&mut self, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { xsetbv(value) };
    }

    /// XCR0 of the guest whose registers are in this processor.
    ///
    /// # Safety
    ///
    /// The processor has XSAVE, and CR4.OSXSAVE of the host is set.
    pub unsafe fn guest_xcr0(&self) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { xgetbv() }
    }

    /// PKRU of the guest whose registers are in this processor.
    ///
    /// # Safety
    ///
    /// The processor has protection keys (the guest's CR4.PKE proves it).
    pub unsafe fn guest_pkru(&self) -> u32 {
        let pkru: u32;
        // SAFETY: CPL 0; RDPKRU exists and needs CR4.PKE, which the host may have clear: it is set
        // for this one instruction. The host's pages are the supervisor's, so that no access of
        // its own depends on it.
        unsafe {
            asm!("mov {cr4}, cr4", "mov {old}, {cr4}", "bts {cr4}, 22", "mov cr4, {cr4}",
                "rdpkru", "mov cr4, {old}",
                cr4 = out(reg) _, old = out(reg) _, in("ecx") 0, out("eax") pkru, out("edx") _,
                options(nostack));
        }
        pkru
    }
}

/// # Safety
///
/// CR4.OSXSAVE is set.
unsafe fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: XCR0 exists, says the caller.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
///
/// CPL 0, CR4.OSXSAVE is set, and XCR0 takes this value.
unsafe fn xsetbv(value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testudo_arch::cpuid::CpuidEntry;

    fn cpuid(ecx1: u32, area_size: u32) -> Cpuid {
        let mut table = Cpuid::new();
        let leaf1 = CpuidEntry {
            leaf: 1,
            ecx: ecx1,
            ..CpuidEntry::default()
        };
        let leaf_d = CpuidEntry {
            leaf: 0xD,
            indexed: true,
            eax: 7,
            ecx: area_size,
            ..CpuidEntry::default()
        };
        assert!(table.set(leaf1) && table.set(leaf_d));
        table
    }

    #[test]
    fn what_cannot_be_moved_is_named() {
        let off = ResidentRegisters::reset(&cpuid(1 << 26, 832));
        assert_eq!(off.unwrap_err(), ResidentUnsupported::OsxsaveClear);
        let amx = ResidentRegisters::reset(&cpuid(3 << 26, 11008));
        assert_eq!(
            amx.unwrap_err(),
            ResidentUnsupported::TooLarge { size: 11008 }
        );
        let avx = ResidentRegisters::reset(&cpuid(3 << 26, 832)).unwrap();
        assert_eq!((avx.xcr0, avx.support.xcr0), (1, 7));
        assert_eq!(
            ResidentRegisters::reset(&cpuid(0, 0)).unwrap().support.xcr0,
            0
        );
    }

    #[test]
    fn a_saved_image_comes_back() {
        // FXSAVE and FXRSTOR need no privilege: what the fallback path does, on this processor.
        let mut area = XsaveArea::INITIAL;
        assert_eq!(area.bytes()[..2], [0x7F, 0x03]);
        let pointer = area.bytes_mut().as_mut_ptr();
        // SAFETY: FXRSTOR of the initial image, then FXSAVE into it; both within 512 bytes of an
        // aligned area, and the registers that it loads are declared clobbered.
        unsafe {
            asm!("fxrstor64 [{0}]", "fxsave64 [{0}]", in(reg) pointer, clobber_abi("sysv64"));
        }
        assert_eq!(area.bytes()[..2], [0x7F, 0x03]);
        assert_eq!(area.bytes()[24..26], [0x80, 0x1F]);
    }
}
