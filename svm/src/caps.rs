//! What a processor offers of SVM, as a plain snapshot (APM vol. 2, 15.4 and 15.30; vol. 3,
//! CPUID Fn8000_000A).

use core::fmt;

use bitflags::bitflags;
use testudo_arch::cpuid::Cpuid;

bitflags! {
    /// CPUID Fn8000_000A EDX.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// Nested paging.
        const NP = 1;
        /// LBR virtualization.
        const LBR_VIRT = 1 << 1;
        /// SVM lock: VM_CR can be locked.
        const SVM_LOCK = 1 << 2;
        /// nRIP is saved on exits.
        const NRIPS = 1 << 3;
        /// The TSC ratio MSR.
        const TSC_RATE_MSR = 1 << 4;
        /// VMCB clean bits.
        const VMCB_CLEAN = 1 << 5;
        /// TLB_CONTROL can flush one ASID; CR writes of a guest flush its own.
        const FLUSH_BY_ASID = 1 << 6;
        /// Decode assists: registers, addresses, vectors and instruction bytes on exits.
        const DECODE_ASSISTS = 1 << 7;
        /// Performance-counter virtualization.
        const PMC_VIRT = 1 << 8;
        /// The pause filter.
        const PAUSE_FILTER = 1 << 10;
        /// The pause filter's threshold.
        const PAUSE_FILTER_THRESHOLD = 1 << 12;
        /// AVIC.
        const AVIC = 1 << 13;
        /// Virtual VMLOAD and VMSAVE.
        const V_VMSAVE_VMLOAD = 1 << 15;
        /// Virtual GIF.
        const V_GIF = 1 << 16;
        /// Guest mode execute trap.
        const GMET = 1 << 17;
        /// x2AVIC.
        const X2AVIC = 1 << 18;
        /// Supervisor shadow-stack check.
        const SSS_CHECK = 1 << 19;
        /// SPEC_CTRL is virtualized.
        const SPEC_CTRL = 1 << 20;
        /// Read-only guest page tables.
        const RO_GPT = 1 << 21;
        /// A #MC that the host does not intercept while a guest runs is delivered as one.
        const HOST_MCE_OVERRIDE = 1 << 23;
        /// INVLPGB and TLBSYNC of guests.
        const TLBI_CTL = 1 << 24;
        /// NMI virtualization.
        const V_NMI = 1 << 25;
        /// IBS virtualization.
        const IBS_VIRT = 1 << 26;
        /// The extended range of AVIC's local vector table.
        const EXT_LVT_AVIC = 1 << 27;
        /// VMCB addresses given to SVM instructions are checked.
        const SVME_ADDR_CHECK = 1 << 28;
        /// Bus-lock threshold.
        const BUS_LOCK_THRESHOLD = 1 << 29;
        /// Intercept of HLT with nothing pending.
        const IDLE_HLT = 1 << 30;
        /// INIT and NMI shutdown intercepts are extended.
        const ENHANCED_SHUTDOWN = 1 << 31;
        const _ = !0;
    }
}

bitflags! {
    /// The MSR VM_CR (APM vol. 2, 15.30.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VmCr: u64 {
        /// External debug requests stop the processor.
        const DPD = 1;
        /// INIT is redirected to #SX.
        const R_INIT = 1 << 1;
        /// A20 masking is off.
        const DIS_A20M = 1 << 2;
        /// LOCK: SVMDIS cannot be changed.
        const LOCK = 1 << 3;
        /// SVMDIS: EFER.SVME cannot be set.
        const SVMDIS = 1 << 4;
        const _ = !0;
    }
}

/// Why SVM cannot be used on a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SvmUnavailable {
    /// CPUID Fn8000_0001 ECX bit 2 is clear.
    #[error("this processor has no AMD-V (CPUID 0x80000001 ECX = {ecx:#x}, bit 2 clear)")]
    NoSvm {
        /// CPUID Fn8000_0001 ECX.
        ecx: u32,
    },
    /// VM_CR.SVMDIS is set.
    #[error(
        "AMD-V is disabled by firmware (VM_CR = {vm_cr:#x}, SVMDIS set{})",
        lock_words(.locked)
    )]
    DisabledByFirmware {
        /// VM_CR.
        vm_cr: u64,
        /// Whether it is locked. If not, a host may clear SVMDIS itself.
        locked: bool,
    },
}

/// What a processor offers, apart from whether its firmware allows it.
///
/// ```
/// use testudo_svm::caps::{Features, SvmCaps};
///
/// let old = SvmCaps::BARCELONA;
/// assert!(old.features.contains(Features::NP) && !old.features.contains(Features::NRIPS));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SvmCaps {
    /// CPUID Fn8000_000A EAX: the SVM revision.
    pub revision: u8,
    /// CPUID Fn8000_000A EBX: the number of ASIDs, the host's among them: the largest is one less.
    pub asid_count: u32,
    /// CPUID Fn8000_000A EDX.
    pub features: Features,
    /// CPUID Fn8000_0008 EAX: bits of a physical address.
    pub physical_address_bits: u8,
    /// CPUID Fn8000_0008 EAX: bits of a virtual address.
    pub virtual_address_bits: u8,
    /// The bits of CR4 that this processor defines.
    pub cr4_valid: u64,
    /// The bits of EFER that this processor defines.
    pub efer_valid: u64,
    /// CPUID Fn8000_0001 EDX bit 29: long mode.
    pub long_mode: bool,
    /// CPUID Fn8000_001F EAX: SEV (bit 1), SEV-ES (bit 3) and their kin.
    pub encryption: u32,
    /// CPUID Fn8000_000A ECX bit 6: x2AVIC tables of up to 4,096 entries rather than 512.
    pub x2avic_extended: bool,
}

impl SvmCaps {
    /// Reads the capabilities from a CPUID table.
    ///
    /// # Errors
    ///
    /// [`SvmUnavailable::NoSvm`] if the table has no SVM.
    pub fn from_cpuid(cpuid: &Cpuid) -> Result<Self, SvmUnavailable> {
        let [_, _, ecx, edx] = cpuid.query(0x8000_0001, 0);
        if ecx & 1 << 2 == 0 {
            return Err(SvmUnavailable::NoSvm { ecx });
        }
        let [svm_eax, svm_ebx, svm_ecx, svm_edx] = cpuid.query(0x8000_000A, 0);
        let [sizes, _, _, _] = cpuid.query(0x8000_0008, 0);
        // Without the leaf: the first processors with SVM had 40 and 48 bits.
        let or = |bits: u32, default: u8| match bits as u8 {
            0 => default,
            bits => bits,
        };
        Ok(Self {
            revision: svm_eax as u8,
            asid_count: svm_ebx,
            features: Features::from_bits_retain(svm_edx),
            physical_address_bits: or(sizes, 40).min(52),
            virtual_address_bits: or(sizes >> 8, 48).clamp(32, 64),
            cr4_valid: cr4_bits(cpuid),
            efer_valid: efer_bits(cpuid),
            long_mode: edx & 1 << 29 != 0,
            encryption: cpuid.query(0x8000_001F, 0)[0],
            x2avic_extended: svm_ecx & 1 << 6 != 0,
        })
    }

    /// Whether all these features are there.
    #[inline]
    pub const fn has(&self, features: Features) -> bool {
        self.features.contains(features)
    }

    /// The first physical address beyond what the processor can form.
    #[inline]
    pub const fn physical_limit(&self) -> u64 {
        1 << self.physical_address_bits
    }

    /// The address sign-extended from the processor's virtual-address width: what VMRUN does to
    /// segment bases (APM vol. 2, 15.5.1).
    #[inline]
    pub const fn canonicalize(&self, address: u64) -> u64 {
        let unused = 64 - self.virtual_address_bits as u32;
        (((address << unused) as i64) >> unused) as u64
    }

    /// Quad-core Opteron, 2007 (family 10h): nested paging and LBR virtualization, no nRIP.
    pub const BARCELONA: Self = Self {
        revision: 1,
        asid_count: 64,
        features: Features::from_bits_retain(0x7),
        physical_address_bits: 48,
        virtual_address_bits: 48,
        cr4_valid: 0x7FF,
        efer_valid: 0x7D01,
        long_mode: true,
        encryption: 0,
        x2avic_extended: false,
    };

    /// EPYC Rome, 2019 (Zen 2).
    pub const ZEN2: Self = Self {
        revision: 1,
        asid_count: 32768,
        features: Features::from_bits_retain(0x0013_BCFF),
        physical_address_bits: 48,
        virtual_address_bits: 48,
        cr4_valid: 0x0035_0FFF,
        efer_valid: 0x0006_FD01,
        long_mode: true,
        encryption: 0x0001_000F,
        x2avic_extended: false,
    };

    /// EPYC Genoa, 2022 (Zen 4).
    pub const ZEN4: Self = Self {
        revision: 1,
        asid_count: 32768,
        features: Features::from_bits_retain(0x1EBF_BCFF),
        physical_address_bits: 52,
        virtual_address_bits: 57,
        cr4_valid: 0x00F7_1FFF,
        efer_valid: 0x0034_DD01,
        long_mode: true,
        encryption: 0x0101_FD3F,
        x2avic_extended: false,
    };

    /// QEMU 7.2's interpreter with `-cpu max,+svm,+npt`: nested paging, virtual GIF and address
    /// checks.
    pub const QEMU_TCG: Self = Self {
        revision: 1,
        asid_count: 16,
        features: Features::from_bits_retain(0x1001_0001),
        physical_address_bits: 40,
        virtual_address_bits: 57,
        cr4_valid: 0x0175_1FFC,
        efer_valid: 0x3D01,
        long_mode: true,
        encryption: 0,
        x2avic_extended: false,
    };

    /// Bochs 2.7 with `cpu: model=ryzen`.
    pub const BOCHS_RYZEN: Self = Self {
        revision: 1,
        asid_count: 32768,
        features: Features::from_bits_retain(0x44F),
        physical_address_bits: 40,
        virtual_address_bits: 48,
        cr4_valid: 0x0035_07FF,
        efer_valid: 0xFD01,
        long_mode: true,
        encryption: 0x7,
        x2avic_extended: false,
    };
}

fn lock_words(locked: &bool) -> &'static str {
    if *locked {
        " and locked: only the firmware's setup or a key can unlock it"
    } else {
        " but not locked"
    }
}

/// Whether a processor's VM_CR lets SVM be enabled.
///
/// # Errors
///
/// [`SvmUnavailable::DisabledByFirmware`].
pub const fn check_vm_cr(vm_cr: VmCr) -> Result<(), SvmUnavailable> {
    if vm_cr.contains(VmCr::SVMDIS) {
        return Err(SvmUnavailable::DisabledByFirmware {
            vm_cr: vm_cr.bits(),
            locked: vm_cr.contains(VmCr::LOCK),
        });
    }
    Ok(())
}

/// The bits of CR4 that a processor with this CPUID table defines (APM vol. 2, 3.1.3). All others
/// must be zero.
fn cr4_bits(cpuid: &Cpuid) -> u64 {
    let [_, _, ecx1, edx1] = cpuid.query(1, 0);
    let [_, ebx7, ecx7, _] = cpuid.query(7, 0);
    let [eax7_1, ..] = cpuid.query(7, 1);
    let mut bits = 0;
    // (CPUID word, bit in it, bit in CR4)
    for (word, feature, control) in [
        (edx1, 1, 0),     // VME
        (edx1, 1, 1),     // PVI
        (edx1, 4, 2),     // TSD
        (edx1, 2, 3),     // DE
        (edx1, 3, 4),     // PSE
        (edx1, 6, 5),     // PAE
        (edx1, 7, 6),     // MCE
        (edx1, 13, 7),    // PGE
        (edx1, 24, 9),    // OSFXSR
        (edx1, 25, 10),   // OSXMMEXCPT
        (ecx7, 2, 11),    // UMIP
        (ecx7, 16, 12),   // LA57
        (ebx7, 0, 16),    // FSGSBASE
        (ecx1, 17, 17),   // PCIDE
        (ecx1, 26, 18),   // OSXSAVE
        (ebx7, 7, 20),    // SMEP
        (ebx7, 20, 21),   // SMAP
        (ecx7, 3, 22),    // PKE
        (ecx7, 7, 23),    // CET
        (ecx7, 31, 24),   // PKS
        (eax7_1, 26, 28), // LAM_SUP
    ] {
        bits |= u64::from(word >> feature & 1) << control;
    }
    // PCE needs no CPUID bit.
    bits | 1 << 8
}

/// The bits of EFER that a processor with this CPUID table defines (APM vol. 2, 3.1.7).
fn efer_bits(cpuid: &Cpuid) -> u64 {
    let [_, _, ecx, edx] = cpuid.query(0x8000_0001, 0);
    let [_, ebx8, _, _] = cpuid.query(0x8000_0008, 0);
    let [eax21, ..] = cpuid.query(0x8000_0021, 0);
    let mut bits = 0;
    for (word, feature, control) in [
        (edx, 11, 0),   // SCE
        (edx, 29, 8),   // LME
        (edx, 29, 10),  // LMA
        (edx, 20, 11),  // NXE
        (ecx, 2, 12),   // SVME
        (edx, 25, 14),  // FFXSR
        (ecx, 17, 15),  // TCE
        (ebx8, 8, 17),  // MCOMMIT
        (ebx8, 13, 18), // INTWB
        (eax21, 7, 20), // UAIE
        (eax21, 8, 21), // AIBRSE
    ] {
        bits |= u64::from(word >> feature & 1) << control;
    }
    // LMSLE: offered unless CPUID Fn8000_0008 EBX bit 20 says it is gone, where long mode is.
    bits | u64::from(edx >> 29 & 1 & !(ebx8 >> 20)) << 13
}

impl fmt::Display for SvmCaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "SVM revision {}, {} ASIDs, {}-bit physical addresses:",
            self.revision, self.asid_count, self.physical_address_bits
        )?;
        for (name, _) in self.features.iter_names() {
            write!(f, " {name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;
    use testudo_arch::cpuid::CpuidEntry;

    fn table(entries: &[(u32, [u32; 4])]) -> Cpuid {
        let mut table = Cpuid::new();
        for &(leaf, [eax, ebx, ecx, edx]) in entries {
            let entry = CpuidEntry {
                leaf,
                eax,
                ebx,
                ecx,
                edx,
                ..CpuidEntry::default()
            };
            assert!(table.set(entry));
        }
        table
    }

    /// Leaves as QEMU 7.2 answers with `-accel tcg -cpu max,+svm,+npt`.
    fn qemu() -> Cpuid {
        table(&[
            (1, [0x0066_0061 >> 4, 0, 0xFEF8_3203, 0x0F8B_FBFF]),
            (0x8000_0001, [0, 0, 0x0000_0165, 0x2FD3_FBFF]),
            (0x8000_0008, [0x3928, 0, 0, 0]),
            (0x8000_000A, [1, 0x10, 0, 0x1001_0001]),
        ])
    }

    #[test]
    fn a_table_becomes_a_snapshot() {
        let caps = SvmCaps::from_cpuid(&qemu()).unwrap();
        assert_eq!(caps.features, SvmCaps::QEMU_TCG.features);
        assert_eq!((caps.asid_count, caps.revision), (16, 1));
        assert_eq!(
            (caps.physical_address_bits, caps.virtual_address_bits),
            (40, 57)
        );
        assert_eq!(caps.physical_limit(), 1 << 40);
        assert!(caps.long_mode);
    }

    #[test]
    fn no_svm_says_so() {
        let intel = table(&[(0x8000_0001, [0, 0, 0x121, 0x2C10_0800])]);
        let error = SvmCaps::from_cpuid(&intel).unwrap_err();
        assert_eq!(error, SvmUnavailable::NoSvm { ecx: 0x121 });
        assert!(error.to_string().contains("no AMD-V"));
    }

    #[test]
    fn firmware_can_forbid_it() {
        assert_eq!(check_vm_cr(VmCr::LOCK), Ok(()));
        let locked = check_vm_cr(VmCr::SVMDIS | VmCr::LOCK).unwrap_err();
        assert_eq!(
            locked,
            SvmUnavailable::DisabledByFirmware {
                vm_cr: 0x18,
                locked: true
            }
        );
        assert!(locked.to_string().contains("locked: only"), "{locked}");
        let open = check_vm_cr(VmCr::SVMDIS).unwrap_err();
        assert!(open.to_string().ends_with("but not locked)"), "{open}");
    }

    #[test]
    fn nonsense_widths_do_not_overflow() {
        let mut odd = qemu();
        odd.get_mut(0x8000_0008, 0).unwrap().eax = 0xFFFF;
        let caps = SvmCaps::from_cpuid(&odd).unwrap();
        assert_eq!(caps.physical_limit(), 1 << 52);
        assert_eq!(caps.canonicalize(1 << 63), 1 << 63);
    }

    #[test]
    fn canonical_addresses_follow_the_width() {
        let four_level = SvmCaps::BOCHS_RYZEN;
        assert_eq!(
            four_level.canonicalize(0x0000_8000_0000_0000),
            0xFFFF_8000_0000_0000
        );
        assert_eq!(
            four_level.canonicalize(0xABCD_7FFF_FFFF_FFFF),
            0x0000_7FFF_FFFF_FFFF
        );
        let five_level = SvmCaps::QEMU_TCG;
        assert_eq!(
            five_level.canonicalize(0x0000_8000_0000_0000),
            0x0000_8000_0000_0000
        );
    }

    #[test]
    fn generations_differ_where_it_matters() {
        let lacks = |caps: SvmCaps, feature| !caps.has(feature);
        for caps in [SvmCaps::BARCELONA, SvmCaps::QEMU_TCG] {
            assert!(lacks(caps, Features::NRIPS) && lacks(caps, Features::FLUSH_BY_ASID));
            assert!(lacks(caps, Features::DECODE_ASSISTS));
        }
        assert!(SvmCaps::ZEN2.has(Features::AVIC | Features::V_GIF | Features::DECODE_ASSISTS));
        assert!(lacks(SvmCaps::ZEN2, Features::X2AVIC) && SvmCaps::ZEN4.has(Features::X2AVIC));
        assert!(SvmCaps::ZEN4.has(Features::V_NMI | Features::SPEC_CTRL | Features::GMET));
        let text = SvmCaps::BOCHS_RYZEN.to_string();
        assert!(
            text.contains("32768 ASIDs") && text.contains("NRIPS"),
            "{text}"
        );
    }
}
