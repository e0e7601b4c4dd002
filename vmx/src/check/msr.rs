//! Which MSRs, and which values, a VM entry loads from its MSR-load area (SDM vol. 3C, 29.4).

use testudo_arch::Msr;

use super::{
    EFER_LME, FRED_CONFIG_RESERVED, FRED_RSP_RESERVED, FRED_SSP_RESERVED, efer_bits, is_valid_cet,
    is_valid_pat,
};
use crate::caps::{Processor, ProcessorFeatures as F, VmxCaps};

/// What of the guest's state decides about values, as the entry has established it before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Established {
    /// CR0.PG.
    pub(super) paging: bool,
    /// IA32_EFER.LME.
    pub(super) long_mode_enable: bool,
}

/// Whether WRMSR at CPL 0 would raise #GP for this value: by what the manual says of the MSR, on a
/// processor with these capabilities. Of MSRs that are not architectural, or whose values depend on
/// more, nothing is known, and they are taken.
pub(super) fn value_is_refused(
    msr: Msr,
    value: u64,
    caps: &VmxCaps,
    established: Established,
) -> bool {
    let processor = &caps.processor;
    let has = |feature| processor.features.contains(feature);
    let canonical = Processor::is_canonical(value, processor.linear_address_bits);
    match msr {
        // Read-only.
        Msr::PLATFORM_ID | Msr::MTRR_CAP | Msr::ARCH_CAPABILITIES | Msr::MCG_CAP => true,
        Msr(index) if (Msr::VMX_BASIC.0..=Msr::VMX_EXIT_CTLS2.0).contains(&index) => true,
        Msr::SYSENTER_ESP | Msr::SYSENTER_EIP => !canonical,
        Msr::LSTAR | Msr::CSTAR | Msr::KERNEL_GS_BASE => !has(F::LONG_MODE) || !canonical,
        Msr::PAT => !is_valid_pat(value),
        Msr::EFER => {
            let enable = value & EFER_LME != 0;
            value & !efer_bits(caps) != 0
                || established.paging && enable != established.long_mode_enable
        }
        Msr::DEBUG_CTL => value & !processor.debugctl != 0,
        Msr::PERF_GLOBAL_CTRL if has(F::PERFORMANCE_MONITORING) => {
            value & !processor.perf_global_ctrl != 0
        }
        Msr::RTIT_CTL => !processor.accepts_rtit_ctl(value),
        Msr::U_CET | Msr::S_CET => {
            !(has(F::SHADOW_STACK) || has(F::INDIRECT_BRANCH_TRACKING))
                || !canonical
                || !is_valid_cet(value)
        }
        Msr(index) if (Msr::PL0_SSP.0..=Msr::PL3_SSP.0).contains(&index) => {
            !has(F::SHADOW_STACK) || !canonical || value & 3 != 0
        }
        Msr::INTERRUPT_SSP_TABLE_ADDR => !has(F::SHADOW_STACK) || !canonical,
        Msr::PKRS => !has(F::PKS) || value >> 32 != 0,
        Msr::SPEC_CTRL => processor.spec_ctrl == 0 || value & !processor.spec_ctrl != 0,
        Msr(index) if (Msr::FRED_RSP0.0..=Msr::FRED_CONFIG.0).contains(&index) => {
            let reserved = match Msr(index) {
                Msr::FRED_STKLVLS => return !has(F::FRED),
                Msr::FRED_CONFIG => FRED_CONFIG_RESERVED,
                Msr::FRED_SSP1 | Msr::FRED_SSP2 | Msr::FRED_SSP3 => FRED_SSP_RESERVED,
                _ => FRED_RSP_RESERVED,
            };
            !has(F::FRED) || !canonical || value & reserved != 0
        }
        Msr::APIC_BASE => value & 0x2FF & !(1 << 8) != 0 || processor.exceeds_physical(value),
        Msr::MTRR_DEF_TYPE => value & !0xCFF != 0 || !is_mtrr_type(value as u8),
        _ => false,
    }
}

/// The memory types that MTRRs may hold (SDM vol. 3A, table 12-8).
const fn is_mtrr_type(memory_type: u8) -> bool {
    matches!(memory_type, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::fixtures;

    const LONG: Established = Established {
        paging: true,
        long_mode_enable: true,
    };

    #[test]
    fn values_are_those_that_wrmsr_takes() {
        let caps = fixtures::skylake_sp();
        let refused = |msr, value| value_is_refused(msr, value, &caps, LONG);
        let high = 0x8000_0000_0000;
        for (msr, good, bad) in [
            (Msr::LSTAR, high - 1, high),
            (Msr::SYSENTER_EIP, !0, high),
            (Msr::KERNEL_GS_BASE, 0, 1 << 63),
            (Msr::PAT, 0x0007_0406_0007_0406, 2),
            (Msr::EFER, 0xD01, 0xD02),
            (Msr::EFER, 0xD01, 0),
            (Msr::DEBUG_CTL, 3, 1 << 16),
            (Msr::PERF_GLOBAL_CTRL, 1, 1 << 63),
            (Msr::APIC_BASE, 0xFEE0_0900, 1),
            (Msr::MTRR_DEF_TYPE, 0xC06, 0xC02),
            (Msr::RTIT_CTL, 1, 1 << 63),
        ] {
            assert!(!refused(msr, good), "{msr:?} = {good:#x}");
            assert!(refused(msr, bad), "{msr:?} = {bad:#x}");
        }
        for missing in [
            Msr::S_CET,
            Msr::PL0_SSP,
            Msr::INTERRUPT_SSP_TABLE_ADDR,
            Msr::PKRS,
            Msr::FRED_STKLVLS,
            Msr::FRED_CONFIG,
        ] {
            assert!(refused(missing, 0), "{missing:?}");
        }
        assert!(refused(Msr::VMX_MISC, 0) && refused(Msr::MTRR_CAP, 0));
        assert!(!refused(Msr(0x1234_5678), !0), "nothing is known of it");
    }

    #[test]
    fn shadow_stacks_and_keys_where_there_are_any() {
        let caps = fixtures::sapphire_rapids();
        let refused = |msr, value| value_is_refused(msr, value, &caps, LONG);
        for (msr, good, bad) in [
            (Msr::S_CET, 0x3F, 0x40),
            (Msr::U_CET, 0x400, 0xC00),
            (Msr::PL3_SSP, 8, 2),
            (Msr::INTERRUPT_SSP_TABLE_ADDR, 1, 1 << 62),
            (Msr::PKRS, 0xFFFF_FFFF, 1 << 32),
            (Msr::SPEC_CTRL, 0x401, 1 << 8),
        ] {
            assert!(!refused(msr, good) && refused(msr, bad), "{msr:?}");
        }
    }

    #[test]
    fn long_mode_is_not_changed_while_paging_is_on() {
        let caps = fixtures::haswell();
        let legacy = |paging| Established {
            paging,
            long_mode_enable: false,
        };
        assert!(value_is_refused(Msr::EFER, 0x100, &caps, legacy(true)));
        assert!(!value_is_refused(Msr::EFER, 0x100, &caps, legacy(false)));
        assert!(!value_is_refused(Msr::EFER, 1, &caps, legacy(true)));
    }
}
