//! Model-specific registers that the machine decides: neither processor state, which the backend
//! holds, nor the local APIC's.
//!
//! The policy is a list. A register on it reads and writes as stated there; any other raises #GP
//! on both, as on a processor without it. Linux, Xen and the BSDs probe with that in mind.

use core::ops::RangeInclusive;

use testudo_arch::Msr;

/// The variable-range MTRR pairs offered.
const VARIABLE_RANGES: usize = 8;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write-combining (SDM vol. 3A, 12.11.1).
const MTRR_CAP: u64 = VARIABLE_RANGES as u64 | 1 << 8 | 1 << 10;
/// The fixed-range MTRRs (SDM vol. 3A, table 12-9).
const FIXED_RANGES: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
];
/// IA32_MTRR_DEF_TYPE as firmware leaves it: enabled, fixed ranges enabled, write-back.
const MTRR_DEFAULT: u64 = 0xC06;
/// AMD's event selects and counters of old, which every processor of theirs has and which therefore Xen sets
/// without asking (APM vol. 2, 13.2.1).
const LEGACY_COUNTERS: RangeInclusive<u32> = 0xC001_0000..=0xC001_0007;
/// A microcode revision that no guest tries to replace.
const MICROCODE_REVISION: u64 = 0xFFFF_FFFF << 32;

/// IA32_ARCH_CAPABILITIES: "the processor is not susceptible to a machine check error due to modifying the size of
/// a code page without TLB invalidation" (SDM vol. 4, table 2-2).
pub const IF_PSCHANGE_MC_NO: u64 = 1 << 6;

/// A register's answer to RDMSR or WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} refuses: #GP(0)")]
pub struct Refused(pub Msr);

/// One vCPU's registers of this kind.
#[derive(Clone, Debug)]
pub struct MsrPolicy {
    physical_bits: u32,
    mtrr_default: u64,
    mtrr_fixed: [u64; FIXED_RANGES.len()],
    mtrr_variable: [(u64, u64); VARIABLE_RANGES],
    misc_enable: u64,
    arch_capabilities: Option<u64>,
}

impl MsrPolicy {
    /// The registers after reset, as firmware would leave them, on a processor with this many
    /// physical-address bits.
    pub fn new(physical_bits: u32) -> Self {
        Self {
            physical_bits: physical_bits.clamp(32, 52),
            mtrr_default: MTRR_DEFAULT,
            // Write-back everywhere: the memory types that count are in the second-stage tables.
            mtrr_fixed: [0x0606_0606_0606_0606; FIXED_RANGES.len()],
            mtrr_variable: [(0, 0); VARIABLE_RANGES],
            // Fast strings; performance monitoring and debug store unavailable.
            misc_enable: 1 | 1 << 11 | 1 << 12,
            arch_capabilities: None,
        }
    }

    /// With an IA32_ARCH_CAPABILITIES that says no more than that a change of a page's size causes no machine
    /// check.
    #[must_use]
    pub fn with_pschange_mc_no(mut self) -> Self {
        self.arch_capabilities = Some(IF_PSCHANGE_MC_NO);
        self
    }

    /// RDMSR.
    pub fn read(&self, msr: Msr) -> Result<u64, Refused> {
        Ok(match msr {
            Msr::MTRR_CAP => MTRR_CAP,
            Msr::MTRR_DEF_TYPE => self.mtrr_default,
            Msr(0x200..=0x20F) => {
                let (base, mask) = self.mtrr_variable[(msr.0 as usize - 0x200) / 2];
                if msr.0 & 1 == 0 { base } else { mask }
            }
            Msr::MISC_ENABLE => self.misc_enable,
            Msr::BIOS_SIGN_ID => MICROCODE_REVISION,
            Msr::ARCH_CAPABILITIES => self.arch_capabilities.ok_or(Refused(msr))?,
            _ if reads_as_zero(msr) => 0,
            _ => match fixed_range(msr) {
                Some(range) => self.mtrr_fixed[range],
                None => return Err(Refused(msr)),
            },
        })
    }

    /// WRMSR.
    pub fn write(&mut self, msr: Msr, value: u64) -> Result<(), Refused> {
        match msr {
            Msr::MTRR_DEF_TYPE if value & !0xCFF == 0 && is_memory_type(value) => {
                self.mtrr_default = value;
            }
            Msr(0x200..=0x20F) if self.is_variable_range(msr, value) => {
                let pair = &mut self.mtrr_variable[(msr.0 as usize - 0x200) / 2];
                *if msr.0 & 1 == 0 {
                    &mut pair.0
                } else {
                    &mut pair.1
                } = value;
            }
            Msr::MISC_ENABLE => self.misc_enable = value,
            _ if ignores_writes(msr) => {}
            _ => match fixed_range(msr) {
                Some(range)
                    if value
                        .to_le_bytes()
                        .iter()
                        .all(|&b| is_memory_type(b.into())) =>
                {
                    self.mtrr_fixed[range] = value;
                }
                _ => return Err(Refused(msr)),
            },
        }
        Ok(())
    }

    /// Base: type and address. Mask: valid bit and address. Everything else is reserved (SDM
    /// vol. 3A, 12.11.2.3).
    fn is_variable_range(&self, msr: Msr, value: u64) -> bool {
        let address = (1u64 << self.physical_bits) - 0x1000;
        if msr.0 & 1 == 0 {
            value & !(address | 0xFF) == 0 && is_memory_type(value)
        } else {
            value & !(address | 1 << 11) == 0
        }
    }
}

fn fixed_range(msr: Msr) -> Option<usize> {
    FIXED_RANGES.iter().position(|&index| index == msr.0)
}

/// Uncacheable, write-combining, write-through, write-protected, write-back.
fn is_memory_type(value: u64) -> bool {
    matches!(value & 0xFF, 0 | 1 | 4 | 5 | 6)
}

/// Machine check with no banks, configuration registers that hold nothing a guest may change, and
/// counters that count nothing.
fn reads_as_zero(msr: Msr) -> bool {
    LEGACY_COUNTERS.contains(&msr.0)
        || matches!(
            msr,
            Msr::PLATFORM_ID
                | Msr::MCG_CAP
                | Msr::MCG_STATUS
                | Msr::MCG_CTL
                | Msr::DEBUG_CTL
                | Msr::SYSCFG
                | Msr::HWCR
                | Msr::NB_CFG
                | Msr::LS_CFG
                | Msr::DE_CFG
                | Msr::INT_PENDING_MSG
                | Msr::SMM_MONITOR_CTL
        )
}

/// Those and the microcode trigger take any value and keep none.
fn ignores_writes(msr: Msr) -> bool {
    (reads_as_zero(msr) && msr != Msr::MCG_CAP && msr != Msr::PLATFORM_ID)
        || matches!(msr, Msr::BIOS_SIGN_ID | Msr::BIOS_UPDT_TRIG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mtrrs_keep_what_is_valid_and_refuse_the_rest() {
        let mut msrs = MsrPolicy::new(40);
        assert_eq!(msrs.read(Msr::MTRR_CAP), Ok(0x508));
        assert_eq!(msrs.write(Msr(0x200), 0xE000_0001), Ok(()));
        assert_eq!(msrs.write(Msr(0x201), 0xFF_E000_0800), Ok(()));
        assert_eq!(
            (msrs.read(Msr(0x200)), msrs.read(Msr(0x201))),
            (Ok(0xE000_0001), Ok(0xFF_E000_0800))
        );
        assert_eq!(msrs.write(Msr(0x200), 2), Err(Refused(Msr(0x200))));
        assert_eq!(msrs.write(Msr(0x201), 1 << 40), Err(Refused(Msr(0x201))));
        assert_eq!(
            msrs.write(Msr(0x250), 0x0606_0606_0606_0602),
            Err(Refused(Msr(0x250)))
        );
        assert_eq!(msrs.write(Msr::MTRR_CAP, 0), Err(Refused(Msr::MTRR_CAP)));
    }

    #[test]
    fn unknown_registers_refuse() {
        let mut msrs = MsrPolicy::new(48);
        assert_eq!(msrs.read(Msr(0xDEAD)), Err(Refused(Msr(0xDEAD))));
        assert_eq!(msrs.write(Msr::VMX_BASIC, 0), Err(Refused(Msr::VMX_BASIC)));
        assert_eq!(msrs.write(Msr::HWCR, 1 << 24), Ok(()));
        assert_eq!(msrs.read(Msr::HWCR), Ok(0));
        assert_eq!(msrs.write(Msr(0xC001_0007), 0xFFFF), Ok(()));
        assert_eq!(msrs.read(Msr(0xC001_0007)), Ok(0));
        assert_eq!(msrs.read(Msr(0xC001_0008)), Err(Refused(Msr(0xC001_0008))));
    }

    #[test]
    fn arch_capabilities_are_read_where_they_are() {
        let refused = Err(Refused(Msr::ARCH_CAPABILITIES));
        let without = MsrPolicy::new(48);
        assert_eq!(without.read(Msr::ARCH_CAPABILITIES), refused);
        let mut with = without.with_pschange_mc_no();
        assert_eq!(with.read(Msr::ARCH_CAPABILITIES), Ok(1 << 6));
        assert_eq!(with.write(Msr::ARCH_CAPABILITIES, 0), refused.map(drop));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_or_was_refused_or_ignored(index in 0x200u32..0x300, value: u64) {
            let mut msrs = MsrPolicy::new(48);
            let before = msrs.read(Msr(index));
            match msrs.write(Msr(index), value) {
                Ok(()) => prop_assert_eq!(msrs.read(Msr(index)), Ok(value)),
                Err(_) => prop_assert_eq!(msrs.read(Msr(index)), before),
            }
        }
    }
}
