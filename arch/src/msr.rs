//! Model-specific registers by name.

use core::fmt;

/// The index of a model-specific register, as in ECX of RDMSR.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Msr(pub u32);

macro_rules! msrs {
    ($($(#[$doc:meta])* $name:ident = $index:expr, $text:literal;)*) => {
        impl Msr {
            $($(#[$doc])* pub const $name: Self = Self($index);)*

            /// The manuals' name of this register, where this crate knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($index => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

msrs! {
    /// Time-stamp counter.
    TSC = 0x10, "IA32_TIME_STAMP_COUNTER";
    /// Processor flags of a microcode update.
    PLATFORM_ID = 0x17, "IA32_PLATFORM_ID";
    /// Local APIC base address, enable and x2APIC mode.
    APIC_BASE = 0x1B, "IA32_APIC_BASE";
    /// VMX enable and lock.
    FEATURE_CONTROL = 0x3A, "IA32_FEATURE_CONTROL";
    /// Offset of the time-stamp counter.
    TSC_ADJUST = 0x3B, "IA32_TSC_ADJUST";
    /// Speculation control.
    SPEC_CTRL = 0x48, "IA32_SPEC_CTRL";
    /// Prediction commands (write-only).
    PRED_CMD = 0x49, "IA32_PRED_CMD";
    /// Microcode update trigger.
    BIOS_UPDT_TRIG = 0x79, "IA32_BIOS_UPDT_TRIG";
    /// Microcode revision; AMD calls it PATCH_LEVEL.
    BIOS_SIGN_ID = 0x8B, "IA32_BIOS_SIGN_ID";
    /// SMM monitor control.
    SMM_MONITOR_CTL = 0x9B, "IA32_SMM_MONITOR_CTL";
    /// Memory-type ranges: capabilities.
    MTRR_CAP = 0xFE, "IA32_MTRRCAP";
    /// Architectural capabilities.
    ARCH_CAPABILITIES = 0x10A, "IA32_ARCH_CAPABILITIES";
    /// Flush commands (write-only).
    FLUSH_CMD = 0x10B, "IA32_FLUSH_CMD";
    /// SYSENTER code segment.
    SYSENTER_CS = 0x174, "IA32_SYSENTER_CS";
    /// SYSENTER stack pointer.
    SYSENTER_ESP = 0x175, "IA32_SYSENTER_ESP";
    /// SYSENTER instruction pointer.
    SYSENTER_EIP = 0x176, "IA32_SYSENTER_EIP";
    /// Machine check: capabilities.
    MCG_CAP = 0x179, "IA32_MCG_CAP";
    /// Machine check: status.
    MCG_STATUS = 0x17A, "IA32_MCG_STATUS";
    /// Machine check: control.
    MCG_CTL = 0x17B, "IA32_MCG_CTL";
    /// Miscellaneous features of the processor.
    MISC_ENABLE = 0x1A0, "IA32_MISC_ENABLE";
    /// FRED: regular stack pointer of level 0.
    FRED_RSP0 = 0x1CC, "IA32_FRED_RSP0";
    /// FRED: regular stack pointer of level 1.
    FRED_RSP1 = 0x1CD, "IA32_FRED_RSP1";
    /// FRED: regular stack pointer of level 2.
    FRED_RSP2 = 0x1CE, "IA32_FRED_RSP2";
    /// FRED: regular stack pointer of level 3.
    FRED_RSP3 = 0x1CF, "IA32_FRED_RSP3";
    /// FRED: stack levels of the first 32 vectors.
    FRED_STKLVLS = 0x1D0, "IA32_FRED_STKLVLS";
    /// FRED: shadow stack pointer of level 1.
    FRED_SSP1 = 0x1D1, "IA32_FRED_SSP1";
    /// FRED: shadow stack pointer of level 2.
    FRED_SSP2 = 0x1D2, "IA32_FRED_SSP2";
    /// FRED: shadow stack pointer of level 3.
    FRED_SSP3 = 0x1D3, "IA32_FRED_SSP3";
    /// FRED: entry point, and the stack level of interrupts.
    FRED_CONFIG = 0x1D4, "IA32_FRED_CONFIG";
    /// Debug control: last-branch records, branch trap.
    DEBUG_CTL = 0x1D9, "IA32_DEBUGCTL";
    /// Last branch from.
    LAST_BRANCH_FROM_IP = 0x1DB, "LastBranchFromIP";
    /// Last branch to.
    LAST_BRANCH_TO_IP = 0x1DC, "LastBranchToIP";
    /// Last exception from.
    LAST_INT_FROM_IP = 0x1DD, "LastIntFromIP";
    /// Last exception to.
    LAST_INT_TO_IP = 0x1DE, "LastIntToIP";
    /// Page attribute table.
    PAT = 0x277, "IA32_PAT";
    /// Memory-type ranges: default type.
    MTRR_DEF_TYPE = 0x2FF, "IA32_MTRR_DEF_TYPE";
    /// Performance counters: global control.
    PERF_GLOBAL_CTRL = 0x38F, "IA32_PERF_GLOBAL_CTRL";
    /// VMX: revision, region size, memory type.
    VMX_BASIC = 0x480, "IA32_VMX_BASIC";
    /// VMX: pin-based controls.
    VMX_PINBASED_CTLS = 0x481, "IA32_VMX_PINBASED_CTLS";
    /// VMX: primary processor-based controls.
    VMX_PROCBASED_CTLS = 0x482, "IA32_VMX_PROCBASED_CTLS";
    /// VMX: exit controls.
    VMX_EXIT_CTLS = 0x483, "IA32_VMX_EXIT_CTLS";
    /// VMX: entry controls.
    VMX_ENTRY_CTLS = 0x484, "IA32_VMX_ENTRY_CTLS";
    /// VMX: miscellaneous.
    VMX_MISC = 0x485, "IA32_VMX_MISC";
    /// VMX: bits that are 1 in CR0.
    VMX_CR0_FIXED0 = 0x486, "IA32_VMX_CR0_FIXED0";
    /// VMX: bits that may be 1 in CR0.
    VMX_CR0_FIXED1 = 0x487, "IA32_VMX_CR0_FIXED1";
    /// VMX: bits that are 1 in CR4.
    VMX_CR4_FIXED0 = 0x488, "IA32_VMX_CR4_FIXED0";
    /// VMX: bits that may be 1 in CR4.
    VMX_CR4_FIXED1 = 0x489, "IA32_VMX_CR4_FIXED1";
    /// VMX: highest index of a VMCS field.
    VMX_VMCS_ENUM = 0x48A, "IA32_VMX_VMCS_ENUM";
    /// VMX: secondary processor-based controls.
    VMX_PROCBASED_CTLS2 = 0x48B, "IA32_VMX_PROCBASED_CTLS2";
    /// VMX: EPT and VPID.
    VMX_EPT_VPID_CAP = 0x48C, "IA32_VMX_EPT_VPID_CAP";
    /// VMX: pin-based controls without default-1 bits.
    VMX_TRUE_PINBASED_CTLS = 0x48D, "IA32_VMX_TRUE_PINBASED_CTLS";
    /// VMX: primary controls without default-1 bits.
    VMX_TRUE_PROCBASED_CTLS = 0x48E, "IA32_VMX_TRUE_PROCBASED_CTLS";
    /// VMX: exit controls without default-1 bits.
    VMX_TRUE_EXIT_CTLS = 0x48F, "IA32_VMX_TRUE_EXIT_CTLS";
    /// VMX: entry controls without default-1 bits.
    VMX_TRUE_ENTRY_CTLS = 0x490, "IA32_VMX_TRUE_ENTRY_CTLS";
    /// VMX: VM functions.
    VMX_VMFUNC = 0x491, "IA32_VMX_VMFUNC";
    /// VMX: tertiary processor-based controls.
    VMX_PROCBASED_CTLS3 = 0x492, "IA32_VMX_PROCBASED_CTLS3";
    /// VMX: secondary exit controls.
    VMX_EXIT_CTLS2 = 0x493, "IA32_VMX_EXIT_CTLS2";
    /// User-mode CET.
    U_CET = 0x6A0, "IA32_U_CET";
    /// Supervisor-mode CET.
    S_CET = 0x6A2, "IA32_S_CET";
    /// Shadow stack pointer of ring 0.
    PL0_SSP = 0x6A4, "IA32_PL0_SSP";
    /// Shadow stack pointer of ring 1.
    PL1_SSP = 0x6A5, "IA32_PL1_SSP";
    /// Shadow stack pointer of ring 2.
    PL2_SSP = 0x6A6, "IA32_PL2_SSP";
    /// Shadow stack pointer of ring 3.
    PL3_SSP = 0x6A7, "IA32_PL3_SSP";
    /// Interrupt shadow stack table.
    INTERRUPT_SSP_TABLE_ADDR = 0x6A8, "IA32_INTERRUPT_SSP_TABLE_ADDR";
    /// The local APIC timer's deadline.
    TSC_DEADLINE = 0x6E0, "IA32_TSC_DEADLINE";
    /// Protection keys of supervisor pages.
    PKRS = 0x6E1, "IA32_PKRS";
    /// The first x2APIC register.
    X2APIC_FIRST = 0x800, "IA32_X2APIC (first)";
    /// x2APIC: identification.
    X2APIC_APICID = 0x802, "IA32_X2APIC_APICID";
    /// x2APIC: task priority.
    X2APIC_TPR = 0x808, "IA32_X2APIC_TPR";
    /// x2APIC: end of interrupt.
    X2APIC_EOI = 0x80B, "IA32_X2APIC_EOI";
    /// x2APIC: interrupt command.
    X2APIC_ICR = 0x830, "IA32_X2APIC_ICR";
    /// x2APIC: timer's initial count.
    X2APIC_INIT_COUNT = 0x838, "IA32_X2APIC_INIT_COUNT";
    /// x2APIC: interrupt to the own processor.
    X2APIC_SELF_IPI = 0x83F, "IA32_X2APIC_SELF_IPI";
    /// The last index reserved for the x2APIC.
    X2APIC_LAST = 0x8FF, "IA32_X2APIC (last)";
    /// Total memory encryption: what is configured.
    TME_ACTIVATE = 0x982, "IA32_TME_ACTIVATE";
    /// MPX: bounds configuration.
    BNDCFGS = 0xD90, "IA32_BNDCFGS";
    /// Extended supervisor state mask.
    XSS = 0xDA0, "IA32_XSS";
    /// Last-branch records: control.
    LBR_CTL = 0x14CE, "IA32_LBR_CTL";
    /// Real-time instruction tracing: control.
    RTIT_CTL = 0x570, "IA32_RTIT_CTL";
    /// Extended features: long mode, NX, SVM.
    EFER = 0xC000_0080, "IA32_EFER";
    /// SYSCALL target: selectors.
    STAR = 0xC000_0081, "IA32_STAR";
    /// SYSCALL target in 64-bit mode.
    LSTAR = 0xC000_0082, "IA32_LSTAR";
    /// SYSCALL target in compatibility mode.
    CSTAR = 0xC000_0083, "IA32_CSTAR";
    /// SYSCALL flag mask.
    SFMASK = 0xC000_0084, "IA32_FMASK";
    /// Base of FS.
    FS_BASE = 0xC000_0100, "IA32_FS_BASE";
    /// Base of GS.
    GS_BASE = 0xC000_0101, "IA32_GS_BASE";
    /// What SWAPGS exchanges with the base of GS.
    KERNEL_GS_BASE = 0xC000_0102, "IA32_KERNEL_GS_BASE";
    /// What RDTSCP and RDPID return.
    TSC_AUX = 0xC000_0103, "IA32_TSC_AUX";
    /// AMD: ratio of the guest's time-stamp counter.
    TSC_RATIO = 0xC000_0104, "TSC_RATIO";
    /// AMD: system configuration.
    SYSCFG = 0xC001_0010, "SYSCFG";
    /// AMD: hardware configuration.
    HWCR = 0xC001_0015, "HWCR";
    /// AMD: northbridge configuration.
    NB_CFG = 0xC001_001F, "NB_CFG";
    /// AMD: interrupt pending and CMP-halt.
    INT_PENDING_MSG = 0xC001_0055, "INT_PENDING_MSG";
    /// AMD: control of SVM features.
    VM_CR = 0xC001_0114, "VM_CR";
    /// AMD: SMI trigger on ignored INIT.
    IGNNE = 0xC001_0115, "IGNNE";
    /// AMD: physical address of the host state-save area.
    VM_HSAVE_PA = 0xC001_0117, "VM_HSAVE_PA";
    /// AMD: load-store configuration.
    LS_CFG = 0xC001_1020, "LS_CFG";
    /// AMD: decoder configuration.
    DE_CFG = 0xC001_1029, "DE_CFG";
}

impl fmt::Display for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#x})", self.0),
            None => write!(f, "MSR {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<u32> for Msr {
    fn from(index: u32) -> Self {
        Self(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(std::format!("{}", Msr::EFER), "IA32_EFER (0xc0000080)");
        assert_eq!(std::format!("{}", Msr(0x4b56_4d00)), "MSR 0x4b564d00");
    }
}
