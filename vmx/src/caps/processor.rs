//! The facts of CPUID on which VM-entry checks depend.

use bitflags::bitflags;

bitflags! {
    /// Features outside VMX that decide which bits of guest or host state are reserved.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ProcessorFeatures: u32 {
        /// Intel 64 architecture.
        const LONG_MODE = 1 << 0;
        /// SYSCALL and SYSRET.
        const SYSCALL = 1 << 1;
        /// The execute-disable bit.
        const EXECUTE_DISABLE = 1 << 2;
        /// Restricted transactional memory.
        const RTM = 1 << 3;
        /// Software guard extensions.
        const SGX = 1 << 4;
        /// Bus-lock debug exceptions.
        const BUS_LOCK_DETECT = 1 << 5;
        /// Control-flow enforcement: shadow stacks.
        const SHADOW_STACK = 1 << 6;
        /// Control-flow enforcement: indirect-branch tracking.
        const INDIRECT_BRANCH_TRACKING = 1 << 7;
        /// Five-level paging.
        const LA57 = 1 << 8;
        /// Architectural performance monitoring, version 1 or later.
        const PERFORMANCE_MONITORING = 1 << 9;
        /// Debug store and branch-trace store.
        const DEBUG_STORE = 1 << 10;
        /// Processor trace.
        const PROCESSOR_TRACE = 1 << 11;
        /// Protection keys of supervisor pages.
        const PKS = 1 << 12;
        /// Flexible return and event delivery.
        const FRED = 1 << 13;
        /// Linear-address masking.
        const LAM = 1 << 14;
        /// Architectural last-branch records.
        const ARCH_LBR = 1 << 15;
        /// Total memory encryption, whose key identifiers may take bits of physical addresses.
        const TOTAL_MEMORY_ENCRYPTION = 1 << 16;
    }
}

/// What VM entries depend on besides the VMX capability MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Processor {
    /// The width of physical addresses, without the bits that the keys of trust domains take.
    #[doc(alias = "MAXPHYADDR")]
    pub physical_address_bits: u8,
    /// The widest linear addresses that the processor supports: 48, or 57 with LA57.
    pub linear_address_bits: u8,
    /// Features by CPUID.
    pub features: ProcessorFeatures,
    /// The bits of IA32_DEBUGCTL that are not reserved.
    pub debugctl: u64,
    /// The bits of IA32_PERF_GLOBAL_CTRL that are not reserved.
    pub perf_global_ctrl: u64,
    /// The bits of IA32_RTIT_CTL that are not reserved.
    pub rtit_ctl: u64,
    /// The encodings that its fields take.
    pub rtit_encodings: RtitEncodings,
    /// The bits of IA32_LBR_CTL that are not reserved.
    pub lbr_ctl: u64,
    /// The bits of IA32_SPEC_CTRL that are not reserved.
    pub spec_ctrl: u64,
}

impl Processor {
    /// From CPUID.
    pub fn read_from(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        use ProcessorFeatures as F;
        let (last, last_extended) = (cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]);
        let basic = |leaf, sub| {
            if leaf <= last {
                cpuid(leaf, sub)
            } else {
                [0; 4]
            }
        };
        let extended = |leaf| {
            if leaf <= last_extended {
                cpuid(leaf, 0)
            } else {
                [0; 4]
            }
        };
        let one = basic(1, 0);
        let seven = basic(7, 0);
        let seven_one = if seven[0] >= 1 { basic(7, 1) } else { [0; 4] };
        let monitoring = basic(0xA, 0);
        let trace = [basic(0x14, 0), basic(0x14, 1)];
        let high = extended(0x8000_0001);
        let mut features = F::empty();
        features.set(F::LONG_MODE, high[3] & (1 << 29) != 0);
        features.set(F::SYSCALL, high[3] & (1 << 11) != 0);
        features.set(F::EXECUTE_DISABLE, high[3] & (1 << 20) != 0);
        features.set(F::RTM, seven[1] & (1 << 11) != 0);
        features.set(F::SGX, seven[1] & (1 << 2) != 0);
        features.set(F::BUS_LOCK_DETECT, seven[2] & (1 << 24) != 0);
        features.set(F::SHADOW_STACK, seven[2] & (1 << 7) != 0);
        features.set(F::INDIRECT_BRANCH_TRACKING, seven[3] & (1 << 20) != 0);
        features.set(F::LA57, seven[2] & (1 << 16) != 0);
        features.set(F::PERFORMANCE_MONITORING, monitoring[0] & 0xFF != 0);
        features.set(F::DEBUG_STORE, one[3] & (1 << 21) != 0);
        features.set(F::PROCESSOR_TRACE, seven[1] & (1 << 25) != 0);
        features.set(F::PKS, seven[2] & (1 << 31) != 0);
        features.set(F::FRED, seven_one[0] & (1 << 17) != 0);
        features.set(F::LAM, seven_one[0] & (1 << 26) != 0);
        features.set(F::ARCH_LBR, seven[3] & (1 << 19) != 0);
        features.set(F::TOTAL_MEMORY_ENCRYPTION, seven[2] & (1 << 13) != 0);
        let seven_two = if seven[0] >= 2 { basic(7, 2) } else { [0; 4] };
        let sizes = extended(0x8000_0008)[0];
        let physical = if sizes & 0xFF != 0 {
            (sizes & 0xFF).clamp(32, 52)
        } else {
            36
        };
        Self {
            physical_address_bits: physical as u8,
            linear_address_bits: if features.contains(F::LA57) { 57 } else { 48 },
            features,
            debugctl: debugctl_bits(features, one[2] & (1 << 15) != 0, monitoring[0] & 0xFF),
            perf_global_ctrl: perf_global_bits(monitoring),
            rtit_ctl: if features.contains(F::PROCESSOR_TRACE) {
                rtit_ctl_bits(trace)
            } else {
                0
            },
            rtit_encodings: RtitEncodings::read_from(trace),
            lbr_ctl: if features.contains(F::ARCH_LBR) {
                0x7F_000F
            } else {
                0
            },
            spec_ctrl: spec_ctrl_bits(seven[3], seven_two[3]),
        }
    }

    /// The same, with what IA32_TME_ACTIVATE takes from the width of physical addresses outside SEAM
    /// (29.2.1): bits 39:36, once bit 0 says that it is configured.
    #[must_use]
    pub fn with_tme_activate(self, value: u64) -> Self {
        let keys = if value & 1 != 0 {
            (value >> 36) as u8 & 0xF
        } else {
            0
        };
        Self {
            physical_address_bits: self.physical_address_bits.saturating_sub(keys).max(32),
            ..self
        }
    }

    /// Whether `address` sticks out of the physical address space.
    #[inline]
    pub const fn exceeds_physical(self, address: u64) -> bool {
        address >> self.physical_address_bits != 0
    }

    /// Whether WRMSR of `value` to IA32_RTIT_CTL finds nothing reserved: neither bits nor encodings
    /// (SDM vol. 3C, 36.2.8.2).
    pub const fn accepts_rtit_ctl(self, value: u64) -> bool {
        let mut range = 32;
        while range < 48 {
            if (value >> range) & 0xF > 2 {
                return false;
            }
            range += 4;
        }
        value & !self.rtit_ctl == 0 && self.rtit_encodings.accept(value)
    }

    /// Whether an address is canonical for linear addresses of `bits` bits.
    #[inline]
    pub const fn is_canonical(address: u64, bits: u8) -> bool {
        let shift = 64 - bits as u32;
        ((address << shift) as i64 >> shift) as u64 == address
    }
}

/// The encodings of IA32_RTIT_CTL's fields that a processor takes: a bit for each (CPUID leaf 0x14,
/// sub-leaf 1; SDM vol. 3C, 36.3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RtitEncodings {
    /// MTCFreq, bits 17:14.
    pub mtc_period: u16,
    /// CycThresh, bits 22:19.
    pub cycle_threshold: u16,
    /// PSBFreq, bits 27:24.
    pub psb_frequency: u16,
}

impl RtitEncodings {
    fn read_from([zero, one]: [[u32; 4]; 2]) -> Self {
        let one = if zero[0] >= 1 { one } else { [0; 4] };
        Self {
            mtc_period: (one[0] >> 16) as u16,
            cycle_threshold: one[1] as u16,
            psb_frequency: (one[1] >> 16) as u16,
        }
    }

    /// Whether each field's encoding is one of them. Zero always is: the field's feature is off, or
    /// its shortest period is chosen.
    const fn accept(self, value: u64) -> bool {
        const fn takes(encodings: u16, value: u64, shift: u32) -> bool {
            let encoding = (value >> shift) as u32 & 0xF;
            encoding == 0 || encodings & (1 << encoding) != 0
        }
        takes(self.mtc_period, value, 14)
            && takes(self.cycle_threshold, value, 19)
            && takes(self.psb_frequency, value, 24)
    }
}

/// The bits of IA32_RTIT_CTL that such a processor has (SDM vol. 3C, 36.2.8.2), by CPUID leaf 0x14.
fn rtit_ctl_bits([zero, one]: [[u32; 4]; 2]) -> u64 {
    // TraceEn, OS, User, TSCEn, DisRETC, BranchEn.
    let mut bits = 0x2C0D;
    let ranges = if zero[0] >= 1 { one[0] & 7 } else { 0 };
    for (register, bit, has) in [
        // CR3Filter; CYCEn, CycThresh and PSBFreq; MTCEn and MTCFreq; FUPonPTW and PTWEn; PwrEvtEn.
        (1, 0, 1 << 7),
        (1, 1, 1 << 1 | 0xF << 19 | 0xF << 24),
        (1, 3, 1 << 9 | 0xF << 14),
        (1, 4, 1 << 5 | 1 << 12),
        (1, 5, 1 << 4),
        // InjectPsbPmiOnEnable, EventEn, DisTNT.
        (1, 6, 1 << 56),
        (1, 7, 1 << 31),
        (1, 8, 1 << 55),
        // ToPA and FabricEn.
        (2, 0, 1 << 8),
        (2, 3, 1 << 6),
    ] {
        if zero[register] & (1 << bit) != 0 {
            bits |= has;
        }
    }
    // Of an address range 0, 1 and 2 are defined.
    (0..ranges.min(4)).fold(bits, |bits, range| bits | 0b11 << (32 + 4 * range))
}

/// The bits of IA32_DEBUGCTL that such a processor has (SDM vol. 3B, 18.4.1).
fn debugctl_bits(features: ProcessorFeatures, pdcm: bool, monitoring_version: u32) -> u64 {
    // LBR and BTF.
    let mut bits = 0b11;
    if features.contains(ProcessorFeatures::BUS_LOCK_DETECT) {
        bits |= 1 << 2;
    }
    if features.contains(ProcessorFeatures::DEBUG_STORE) {
        // TR, BTS, BTINT, BTS_OFF_OS and BTS_OFF_USR.
        bits |= 0x7C0;
    }
    if monitoring_version >= 2 {
        // FREEZE_LBRS_ON_PMI and FREEZE_PERFMON_ON_PMI.
        bits |= 0x1800;
    }
    if pdcm {
        // ENABLE_UNCORE_PMI and FREEZE_WHILE_SMM.
        bits |= 0x6000;
    }
    if features.contains(ProcessorFeatures::RTM) {
        bits |= 1 << 15;
    }
    bits
}

/// The bits of IA32_SPEC_CTRL that such a processor has (SDM vol. 4, 2.1), by EDX of the sub-leaves 0 and
/// 2 of CPUID leaf 7.
fn spec_ctrl_bits(zero: u32, two: u32) -> u64 {
    let bits = [
        // IBRS, which brings a STIBP that does nothing; STIBP; SSBD.
        (zero, 26, 0b11),
        (zero, 27, 1 << 1),
        (zero, 31, 1 << 2),
        // PSFD; IPRED_DIS_U and _S; RRSBA_DIS_U and _S; DDPD_U; BHI_DIS_S.
        (two, 0, 1 << 7),
        (two, 1, 0b11 << 3),
        (two, 2, 0b11 << 5),
        (two, 3, 1 << 8),
        (two, 4, 1 << 10),
    ];
    let has = |&(register, bit, _): &(u32, u32, u64)| register & (1 << bit) != 0;
    bits.iter()
        .filter(|row| has(row))
        .fold(0, |all, row| all | row.2)
}

/// The enable bits of the counters that CPUID leaf 0xA enumerates (SDM vol. 3B, 20.2.2).
fn perf_global_bits([eax, _, _, edx]: [u32; 4]) -> u64 {
    if eax & 0xFF < 2 {
        return 0;
    }
    let general = ((eax >> 8) & 0xFF).min(32);
    let fixed = (edx & 0x1F).min(16);
    ((1u64 << general) - 1) | (((1u64 << fixed) - 1) << 32)
}
