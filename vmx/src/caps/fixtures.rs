//! Processors as data: capabilities shaped like those of several generations.
//!
//! For tests on machines without VT-x, and for asking "would this run on a processor of 2009?". The
//! values follow what processors of the named generation report; single steppings differ in detail.
//!
//! ```
//! use testudo_vmx::caps::fixtures;
//! use testudo_vmx::controls::SecondaryControls;
//! use testudo_vmx::{VmcsRead, fake::FakeVmcs, fields};
//!
//! let old = fixtures::nehalem();
//! assert!(!old.secondary.allows(SecondaryControls::UNRESTRICTED_GUEST));
//! // What it has not got cannot be read there either.
//! assert!(FakeVmcs::with_caps(&old).get(fields::PML_ADDRESS).is_err());
//! ```

use testudo_arch::Msr;

use super::VmxCaps;
use super::processor::{Processor, ProcessorFeatures as F, RtitEncodings};

/// The MSRs of one processor, and its other facts.
struct Fixture {
    basic: u64,
    pin: u64,
    primary: [u64; 2],
    exit: [u64; 2],
    entry: [u64; 2],
    secondary: u64,
    tertiary: u64,
    exit2: u64,
    ept_vpid: u64,
    functions: u64,
    misc: u64,
    cr4_may: u64,
    vmcs_enum: u64,
    processor: Processor,
}

impl Fixture {
    fn rdmsr(&self, msr: Msr) -> Option<u64> {
        Some(match msr {
            Msr::FEATURE_CONTROL => 5,
            Msr::VMX_BASIC => self.basic,
            Msr::VMX_PINBASED_CTLS | Msr::VMX_TRUE_PINBASED_CTLS => self.pin,
            Msr::VMX_PROCBASED_CTLS => self.primary[0],
            Msr::VMX_TRUE_PROCBASED_CTLS => self.primary[1],
            Msr::VMX_EXIT_CTLS => self.exit[0],
            Msr::VMX_TRUE_EXIT_CTLS => self.exit[1],
            Msr::VMX_ENTRY_CTLS => self.entry[0],
            Msr::VMX_TRUE_ENTRY_CTLS => self.entry[1],
            Msr::VMX_PROCBASED_CTLS2 => self.secondary,
            Msr::VMX_PROCBASED_CTLS3 => self.tertiary,
            Msr::VMX_EXIT_CTLS2 => self.exit2,
            Msr::VMX_EPT_VPID_CAP => self.ept_vpid,
            Msr::VMX_VMFUNC => self.functions,
            Msr::VMX_MISC => self.misc,
            Msr::VMX_CR0_FIXED0 => 0x8000_0021,
            Msr::VMX_CR0_FIXED1 => 0xFFFF_FFFF,
            Msr::VMX_CR4_FIXED0 => 0x2000,
            Msr::VMX_CR4_FIXED1 => self.cr4_may,
            Msr::VMX_VMCS_ENUM => self.vmcs_enum,
            _ => return None,
        })
    }

    fn caps(&self) -> VmxCaps {
        let vmx_only = |leaf, _| {
            if leaf == 0 {
                [1, 0, 0, 0]
            } else {
                [0, 0, 1 << 5, 0]
            }
        };
        match VmxCaps::read_from(|msr| self.rdmsr(msr), vmx_only) {
            Ok(caps) => VmxCaps {
                processor: self.processor,
                ..caps
            },
            Err(error) => unreachable!("a fixture has every MSR that it announces: {error}"),
        }
    }
}

/// Processor trace with everything but what came after 2018: cycle-accurate mode, MTC packets,
/// PTWRITE, power events, two address ranges.
const RTIT_CTL: u64 = 0x0000_0033_0F7B_FFFF;
const RTIT_ENCODINGS: RtitEncodings = RtitEncodings {
    mtc_period: 0x0249,
    cycle_threshold: 0x3FFF,
    psb_frequency: 0x003F,
};

const NO_TRACE: RtitEncodings = RtitEncodings {
    mtc_period: 0,
    cycle_threshold: 0,
    psb_frequency: 0,
};

const LONG: F = F::LONG_MODE.union(F::SYSCALL).union(F::EXECUTE_DISABLE);
const SERVER: F = LONG.union(F::PERFORMANCE_MONITORING).union(F::DEBUG_STORE);

/// A Nehalem (2008): EPT and VPID, but no unrestricted guest.
pub fn nehalem() -> VmxCaps {
    Fixture {
        basic: 0x00DA_0400_0000_000E,
        pin: 0x0000_007F_0000_0016,
        primary: [0xFFF9_FFFE_0401_E172, 0xFFF9_FFFE_0400_6172],
        exit: [0x007F_FFFF_0003_6DFF, 0x007F_FFFF_0003_6DFB],
        entry: [0x0000_FFFF_0000_11FF, 0x0000_FFFF_0000_11FB],
        secondary: 0x0000_007F_0000_0000,
        tertiary: 0,
        exit2: 0,
        ept_vpid: 0x0000_0F01_0611_4141,
        functions: 0,
        misc: 0x0000_0000_0004_01C5,
        cr4_may: 0x27FF,
        vmcs_enum: 0x2C,
        processor: Processor {
            physical_address_bits: 40,
            linear_address_bits: 48,
            features: SERVER,
            debugctl: 0x7FC3,
            perf_global_ctrl: 0x7_0000_000F,
            rtit_ctl: 0,
            rtit_encodings: NO_TRACE,
            lbr_ctl: 0,
            spec_ctrl: 0,
        },
    }
    .caps()
}

/// A Haswell (2013): unrestricted guest, VMCS shadowing, VM functions, EPT accessed and dirty flags.
pub fn haswell() -> VmxCaps {
    Fixture {
        basic: 0x00DA_0400_0000_0012,
        pin: 0x0000_007F_0000_0016,
        primary: [0xFFF9_FFFE_0401_E172, 0xFFF9_FFFE_0400_6172],
        exit: [0x007F_FFFF_0003_6DFF, 0x007F_FFFF_0003_6DFB],
        entry: [0x0000_FFFF_0000_11FF, 0x0000_FFFF_0000_11FB],
        secondary: 0x0000_7CFF_0000_0000,
        tertiary: 0,
        exit2: 0,
        ept_vpid: 0x0000_0F01_0633_4141,
        functions: 1,
        misc: 0x0000_0000_3004_81E5,
        cr4_may: 0x0017_27FF,
        vmcs_enum: 0x2A,
        processor: Processor {
            physical_address_bits: 39,
            linear_address_bits: 48,
            features: SERVER.union(F::RTM),
            debugctl: 0xFFC3,
            perf_global_ctrl: 0x7_0000_000F,
            rtit_ctl: 0,
            rtit_encodings: NO_TRACE,
            lbr_ctl: 0,
            spec_ctrl: 0x7,
        },
    }
    .caps()
}

/// A Skylake server (2017): APIC virtualization, posted interrupts, PML, #VE, TSC scaling, MBEC.
pub fn skylake_sp() -> VmxCaps {
    Fixture {
        basic: 0x00DA_0400_0000_0004,
        pin: 0x0000_00FF_0000_0016,
        primary: [0xFFF9_FFFE_0401_E172, 0xFFF9_FFFE_0400_6172],
        exit: [0x01FF_FFFF_0003_6DFF, 0x01FF_FFFF_0003_6DFB],
        entry: [0x0003_FFFF_0000_11FF, 0x0003_FFFF_0000_11FB],
        secondary: 0x025F_FFFF_0000_0000,
        tertiary: 0,
        exit2: 0,
        ept_vpid: 0x0000_0F01_0673_4141,
        functions: 1,
        misc: 0x0000_0000_7004_C1E7,
        cr4_may: 0x0037_67FF,
        vmcs_enum: 0x2E,
        processor: Processor {
            physical_address_bits: 46,
            linear_address_bits: 48,
            features: SERVER.union(F::RTM).union(F::PROCESSOR_TRACE),
            debugctl: 0xFFC3,
            perf_global_ctrl: 0x7_0000_000F,
            rtit_ctl: RTIT_CTL,
            rtit_encodings: RTIT_ENCODINGS,
            lbr_ctl: 0,
            spec_ctrl: 0x7,
        },
    }
    .caps()
}

/// An Ice Lake server (2021): five-level paging and EPT, sub-page permissions, SGX.
pub fn ice_lake_sp() -> VmxCaps {
    Fixture {
        basic: 0x00DA_0400_0000_0004,
        pin: 0x0000_00FF_0000_0016,
        primary: [0xFFF9_FFFE_0401_E172, 0xFFF9_FFFE_0400_6172],
        exit: [0x03FF_FFFF_0003_6DFF, 0x03FF_FFFF_0003_6DFB],
        entry: [0x0007_FFFF_0000_11FF, 0x0007_FFFF_0000_11FB],
        secondary: 0x1BDF_FFFF_0000_0000,
        tertiary: 0,
        exit2: 0,
        ept_vpid: 0x0000_0F01_0673_41C1,
        functions: 1,
        misc: 0x0000_0000_7004_C1E7,
        cr4_may: 0x0037_7FFF,
        vmcs_enum: 0x2E,
        processor: Processor {
            physical_address_bits: 46,
            linear_address_bits: 57,
            features: SERVER
                .union(F::SGX)
                .union(F::PROCESSOR_TRACE)
                .union(F::LA57),
            debugctl: 0x7FC3,
            perf_global_ctrl: 0xF_0000_00FF,
            rtit_ctl: RTIT_CTL,
            rtit_encodings: RTIT_ENCODINGS,
            lbr_ctl: 0,
            spec_ctrl: 0x7,
        },
    }
    .caps()
}

/// A Sapphire Rapids (2023): tertiary controls with IPI virtualization, CET, PKS, architectural LBR,
/// bus-lock detection, notify window.
pub fn sapphire_rapids() -> VmxCaps {
    Fixture {
        basic: 0x01DA_0400_0000_0017,
        pin: 0x0000_00FF_0000_0016,
        primary: [0xFFFB_FFFE_0401_E172, 0xFFFB_FFFE_0400_6172],
        exit: [0x77FF_FFFF_0003_6DFF, 0x77FF_FFFF_0003_6DFB],
        entry: [0x0077_FFFF_0000_11FF, 0x0077_FFFF_0000_11FB],
        secondary: 0xDFDF_FFFF_0000_0000,
        tertiary: 0x10,
        exit2: 0,
        ept_vpid: 0x0000_0F01_06F3_41C1,
        functions: 1,
        misc: 0x0000_0000_7004_C1E7,
        cr4_may: 0x01FF_7FFF,
        vmcs_enum: 0x4A,
        processor: Processor {
            physical_address_bits: 46,
            linear_address_bits: 57,
            features: SERVER
                .union(F::SGX)
                .union(F::RTM)
                .union(F::PROCESSOR_TRACE)
                .union(F::LA57)
                .union(F::BUS_LOCK_DETECT)
                .union(F::SHADOW_STACK)
                .union(F::INDIRECT_BRANCH_TRACKING)
                .union(F::PKS)
                .union(F::ARCH_LBR),
            debugctl: 0xFFC7,
            perf_global_ctrl: 0xF_0000_00FF,
            rtit_ctl: RTIT_CTL,
            rtit_encodings: RTIT_ENCODINGS,
            lbr_ctl: 0x7F_000F,
            spec_ctrl: 0x4FF,
        },
    }
    .caps()
}

/// Bochs 2.7 with `cpu: model=corei7_skylake_x`, as it reports itself: no monitor trap flag, no
/// posted interrupts, and IA32_PERF_GLOBAL_CTRL without the MSR.
pub fn bochs_skylake_x() -> VmxCaps {
    Fixture {
        basic: 0x00D8_1000_0000_002B,
        pin: 0x0000_007F_0000_0016,
        primary: [0xF7F9_FFFE_0401_E172, 0xF7F9_FFFE_0400_6172],
        exit: [0x007F_FFFF_0003_6DFF, 0x007F_FFFF_0003_6DFB],
        entry: [0x0000_FFFF_0000_11FF, 0x0000_FFFF_0000_11FB],
        secondary: 0x0217_7FFF_0000_0000,
        tertiary: 0,
        exit2: 0,
        ept_vpid: 0x0000_0F01_0633_4141,
        functions: 1,
        misc: 0x0000_0000_6004_01E0,
        cr4_may: 0x0037_27FF,
        vmcs_enum: 0x34,
        processor: Processor {
            physical_address_bits: 40,
            linear_address_bits: 48,
            features: SERVER,
            debugctl: 0x7FC3,
            perf_global_ctrl: 0x7_0000_000F,
            rtit_ctl: 0,
            rtit_encodings: NO_TRACE,
            lbr_ctl: 0,
            spec_ctrl: 0,
        },
    }
    .caps()
}

/// Everything that the manual of 2025 defines, in one processor that does not exist: FRED, APIC-timer
/// virtualization, HLAT, trust domains.
pub fn everything() -> VmxCaps {
    Fixture {
        basic: 0x05DA_0400_0000_0020,
        pin: 0x0000_00FF_0000_0016,
        primary: [0xFFFB_FFFE_0401_E172, 0xFFFB_FFFE_0400_6172],
        exit: [0xFFFF_FFFF_0003_6DFF, 0xFFFF_FFFF_0003_6DFB],
        entry: [0x03FF_FFFF_0000_11FF, 0x03FF_FFFF_0000_11FB],
        secondary: 0xFFFF_FFFF_0000_0000,
        tertiary: 0x13FF,
        exit2: 0xF,
        ept_vpid: 0x0001_0F01_06F3_41C1,
        functions: 1,
        misc: 0x0000_0000_7004_C1E7,
        cr4_may: 0x1_1BFF_7FFF,
        vmcs_enum: 0x52,
        processor: Processor {
            physical_address_bits: 52,
            linear_address_bits: 57,
            features: F::all(),
            debugctl: 0xFFC7,
            perf_global_ctrl: 0xF_0000_00FF,
            rtit_ctl: RTIT_CTL,
            rtit_encodings: RTIT_ENCODINGS,
            lbr_ctl: 0x7F_000F,
            spec_ctrl: 0x5FF,
        },
    }
    .caps()
}

/// Those of real processors, and the emulator's, by name, oldest first.
pub fn all() -> [(&'static str, VmxCaps); 6] {
    [
        ("nehalem", nehalem()),
        ("haswell", haswell()),
        ("skylake_sp", skylake_sp()),
        ("ice_lake_sp", ice_lake_sp()),
        ("sapphire_rapids", sapphire_rapids()),
        ("bochs_skylake_x", bochs_skylake_x()),
    ]
}
