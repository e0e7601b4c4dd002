//! The CPUID answers of a guest: what the processor has, what the machine emulates, and what the
//! guest may know, in a table that is looked up in a few instructions.

use alloc::vec::Vec;

use testudo_arch::Cr4Flags;
use testudo_arch::cpuid::{Cpuid, CpuidEntry};

use super::hyperv;

/// The signature in leaf 0x4000_0000.
pub const SIGNATURE: [u8; 12] = *b"TestudoTstud";

/// KVM's paravirtual interface, which follows ours, as far as it is offered. Guests that know it
/// use x2APIC mode, which they would not without interrupt remapping under a hypervisor unknown to
/// them, and each access to a register of the local APIC is an MSR exit at the most.
mod kvm {
    /// Its leaves: the second place where guests look for an interface.
    pub(super) const BASE: u32 = 0x4000_0100;
    pub(super) const FEATURES: u32 = BASE + 1;
    pub(super) const SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
    /// KVM_FEATURE_NOP_IO_DELAY: no device here needs time between two accesses to its ports. All other
    /// features need MSRs or hypercalls of KVM's, of which there are none.
    pub(super) const NOP_IO_DELAY: u32 = 1 << 1;
}

/// Choices that the processor does not decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// How many vCPUs the machine has.
    pub vcpus: u32,
    /// Whether the guest may be a hypervisor itself: VMX or SVM is shown if the processor has it.
    pub nested: bool,
    /// Whether Hyper-V's interface takes the place of ours and KVM's ([`hyperv`]).
    pub hyperv: bool,
    /// Whether there is an IA32_ARCH_CAPABILITIES.
    pub arch_capabilities: bool,
}

/// Leaf 1, ECX: what a guest may see.
mod leaf1_ecx {
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX,
    /// F16C, RDRAND: instructions that need nothing from the hypervisor.
    pub(super) const ALLOWED: u32 = 1
        | 1 << 1
        | 1 << 9
        | 1 << 12
        | 1 << 13
        | 1 << 19
        | 1 << 20
        | 1 << 22
        | 1 << 23
        | 1 << 25
        | 1 << 26
        | 1 << 28
        | 1 << 29
        | 1 << 30;
}

/// Leaf 1, EDX: FPU to SSE2 without the thermal, debug-store and serial-number features.
const LEAF1_EDX: u32 = 0x0783_FBFF | 1 << 19;
const LEAF1_EDX_APIC: u32 = 1 << 9;
const LEAF1_EDX_HTT: u32 = 1 << 28;

/// Leaf 7.0, EBX: FSGSBASE, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, AVX512F and DQ, RDSEED, ADX, SMAP,
/// AVX512IFMA, CLFLUSHOPT, CLWB, AVX512PF, ER, CD, SHA, BW, VL.
const LEAF7_EBX: u32 = 1
    | 1 << 3
    | 1 << 5
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 10
    | 1 << 16
    | 1 << 17
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 23
    | 1 << 24
    | 0xF << 26
    | 1 << 30
    | 1 << 31;
const LEAF7_EBX_TSC_ADJUST: u32 = 1 << 1;
/// Leaf 7.0, ECX: AVX512_VBMI, UMIP, PKU, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, LA57, RDPID,
/// CLDEMOTE, MOVDIRI, MOVDIR64B.
const LEAF7_ECX: u32 = 1 << 1
    | 1 << 2
    | 1 << 3
    | 1 << 6
    | 0x7F << 8
    | 1 << 14
    | 1 << 16
    | 1 << 22
    | 1 << 25
    | 1 << 27
    | 1 << 28;
const LEAF7_ECX_OSPKE: u32 = 1 << 4;
/// Leaf 7.0, EDX: AVX512 4VNNIW and 4FMAPS, fast short REP MOV, VP2INTERSECT, SERIALIZE.
const LEAF7_EDX: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 14;
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = 1 << 29;

/// XCR0 components that the world switch carries: x87, SSE, AVX, AVX-512, PKRU.
pub const XCR0_ALLOWED: u64 = 0x2E7;
/// Leaf 0xD.1, EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1. XSAVES needs IA32_XSS, which is not offered.
const LEAF_D1_EAX: u32 = 0b111;

/// Leaf 0x8000_0001, ECX: LAHF, CR8 in legacy mode, ABM, SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4,
/// TBM.
const LEAF8_1_ECX: u32 =
    1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 16 | 1 << 21;
const LEAF8_1_ECX_SVM: u32 = 1 << 2;
/// Leaf 0x8000_0001, EDX: the copy of leaf 1 and SYSCALL, NX, MMXEXT, FFXSR, 1 GiB pages, RDTSCP, LM,
/// 3DNow.
const LEAF8_1_EDX: u32 = 0x0183_F3FF | 1 << 11 | 1 << 20 | 1 << 22 | 0x6E00_0000 | 1 << 31;

/// Makes the table that a guest sees from the table of the processor.
///
/// The vCPU's own numbers (APIC id) and the bits that mirror CR4 and XCR0 are left for
/// [`CpuidTable::query`].
pub fn for_guest(processor: &Cpuid, config: CpuidConfig) -> Cpuid {
    let mut guest = processor.clone();
    guest.retain(|entry| keep(entry, config));
    for level in [0, 1] {
        guest.set(topology(level, config.vcpus));
    }
    if config.hyperv {
        // Guests look for it in the first place only, and prefer what they find in the second.
        hyperv::announce(&mut guest, config.vcpus);
        guest.set(interface(kvm::BASE, kvm::BASE, SIGNATURE));
    } else {
        guest.set(interface(0x4000_0000, 0x4000_0000, SIGNATURE));
        guest.set(interface(kvm::BASE, kvm::FEATURES, kvm::SIGNATURE));
        guest.set(CpuidEntry {
            leaf: kvm::FEATURES,
            eax: kvm::NOP_IO_DELAY,
            ..CpuidEntry::default()
        });
    }
    if let Some(basic) = guest.get_mut(0, 0) {
        basic.eax = basic.eax.clamp(0xD, 0x1F);
    }
    guest
}

/// The first leaf of a hypervisor's interface: the last one, and the signature.
pub(super) fn interface(leaf: u32, last: u32, signature: [u8; 12]) -> CpuidEntry {
    let [ebx, ecx, edx] =
        [0, 4, 8].map(|i| u32::from_le_bytes([0, 1, 2, 3].map(|j| signature[i + j])));
    CpuidEntry {
        leaf,
        eax: last,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    }
}

/// Whether a guest sees this leaf, and what is left of it.
fn keep(entry: &mut CpuidEntry, config: CpuidConfig) -> bool {
    let CpuidEntry {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
        ..
    } = entry;
    let many = config.vcpus > 1;
    match (*leaf, *subleaf) {
        (0 | 2 | 0x8000_0000, _) | (0x8000_0002..=0x8000_0006, _) => {}
        (1, _) => {
            let nested = if config.nested { leaf1_ecx::VMX } else { 0 };
            *ecx &= leaf1_ecx::ALLOWED | nested;
            *ecx |= leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE | leaf1_ecx::HYPERVISOR;
            *edx = (*edx & LEAF1_EDX) | LEAF1_EDX_APIC | if many { LEAF1_EDX_HTT } else { 0 };
            *ebx = (*ebx & 0xFF00) | (config.vcpus.min(255) << 16);
        }
        // One thread a core and all cores in one package: 31:26 cores less one, 25:14 sharers.
        (4, _) => *eax = (*eax & 0x3FFF) | (config.vcpus.clamp(1, 64) - 1) << 26,
        // Only the timer that keeps running in deep idle states.
        (6, _) => (*eax, *ebx, *ecx, *edx) = (1 << 2, 0, 0, 0),
        (7, 0) => {
            *eax = 0;
            *ebx = (*ebx & LEAF7_EBX) | LEAF7_EBX_TSC_ADJUST;
            *ecx &= LEAF7_ECX;
            *edx &= LEAF7_EDX;
            if config.arch_capabilities {
                *edx |= LEAF7_EDX_ARCH_CAPABILITIES;
            }
        }
        (0xD, 0) => {
            *eax &= XCR0_ALLOWED as u32;
            *edx = 0;
            *ecx = 0x240;
        }
        (0xD, 1) => (*eax, *ebx, *ecx, *edx) = (*eax & LEAF_D1_EAX, 0, 0, 0),
        (0xD, component) => return XCR0_ALLOWED & (1u64 << (component & 63)) != 0,
        (0x15 | 0x16, _) => {}
        (0x8000_0001, _) => {
            *ecx &= LEAF8_1_ECX | if config.nested { LEAF8_1_ECX_SVM } else { 0 };
            *edx &= LEAF8_1_EDX;
        }
        // Invariant TSC, if the processor's is.
        (0x8000_0007, _) => (*eax, *ebx, *ecx, *edx) = (0, 0, 0, *edx & (1 << 8)),
        // Address widths; CLZERO and XSAVEERPTR; cores.
        (0x8000_0008, _) => {
            (*ebx, *ecx, *edx) = (*ebx & 0b101, config.vcpus.clamp(1, 256) - 1, 0);
        }
        (0x8000_000A, _) => return config.nested,
        _ => return false,
    }
    true
}

/// Leaf 0xB: one thread a core, then all cores of the package.
fn topology(level: u32, vcpus: u32) -> CpuidEntry {
    let (shift, count, kind) = if level == 0 {
        (0, 1, 1)
    } else {
        (vcpus.next_power_of_two().trailing_zeros(), vcpus, 2)
    };
    CpuidEntry {
        leaf: 0xB,
        subleaf: level,
        indexed: true,
        eax: shift,
        ebx: count,
        ecx: level | kind << 8,
        edx: 0,
    }
}

/// What makes one vCPU's answers differ from another's, or from a moment ago.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidState {
    /// The vCPU's APIC id.
    pub apic_id: u32,
    /// CR4, for OSXSAVE and OSPKE.
    pub cr4: u64,
    /// XCR0, for the size of the XSAVE area.
    pub xcr0: u64,
}

const LEAVES_PER_RANGE: u32 = 32;

/// Of the four ranges that a leaf's bits 31:30 tell apart, the basic one, that of hypervisors and the
/// extended one; there is none for the fourth value.
const SLOTS: usize = 4 * LEAVES_PER_RANGE as usize;

/// A guest's answers, indexed for the exit path.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    entries: Vec<CpuidEntry>,
    /// Those in the second place, for which nobody asks often.
    kvm: [[u32; 4]; 2],
    /// For each leaf, where its first entry is and one past its last.
    index: [(u8, u8); SLOTS],
    /// The answers to the leaves that depend on nothing else.
    constant: [Option<[u32; 4]>; SLOTS],
    /// The size of the XSAVE area with each component alone: its end.
    component_end: [u32; 64],
}

impl CpuidTable {
    /// Indexes a guest's answers.
    pub fn new(cpuid: &Cpuid) -> Self {
        let mut entries: Vec<_> = cpuid
            .entries()
            .iter()
            .copied()
            .filter(|e| slot(e.leaf).is_some())
            .collect();
        entries.sort_by_key(|e| (e.leaf, e.subleaf));
        let mut index = [(0, 0); SLOTS];
        let mut constant = [None; SLOTS];
        let mut component_end = [0; 64];
        for (at, entry) in entries.iter().enumerate() {
            let Some(slot) = slot(entry.leaf) else {
                continue;
            };
            let place = &mut index[slot];
            if place.1 == 0 {
                place.0 = at as u8;
            }
            place.1 = at as u8 + 1;
            if !entry.indexed && !varies(entry.leaf) {
                constant[slot] = Some([entry.eax, entry.ebx, entry.ecx, entry.edx]);
            }
            if entry.leaf == 0xD && (2..64).contains(&entry.subleaf) {
                component_end[entry.subleaf as usize] = entry.eax.saturating_add(entry.ebx);
            }
        }
        Self {
            entries,
            kvm: [kvm::BASE, kvm::FEATURES].map(|leaf| cpuid.query(leaf, 0)),
            index,
            constant,
            component_end,
        }
    }

    /// What CPUID answers for EAX = `leaf`, if neither ECX nor the vCPU matters.
    #[inline]
    pub fn constant(&self, leaf: u32) -> Option<&[u32; 4]> {
        self.constant[slot(leaf)?].as_ref()
    }

    #[cold]
    #[inline(never)]
    fn beyond_the_index(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            kvm::BASE => self.kvm[0],
            kvm::FEATURES => self.kvm[1],
            _ => [0; 4],
        }
    }

    /// What CPUID answers for EAX = `leaf` and ECX = `subleaf`: EAX, EBX, ECX, EDX.
    #[inline]
    pub fn query(&self, leaf: u32, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        let Some((first, end)) = slot(leaf).map(|slot| self.index[slot]) else {
            return self.beyond_the_index(leaf);
        };
        for index in first..end {
            let Some(entry) = self.entries.get(usize::from(index)) else {
                break;
            };
            if !entry.indexed || entry.subleaf == subleaf {
                let answer = [entry.eax, entry.ebx, entry.ecx, entry.edx];
                return if varies(leaf) {
                    self.with_state(answer, leaf, subleaf, state)
                } else {
                    answer
                };
            }
        }
        // Past the last level, leaf 0xB still tells the level asked for and the APIC id.
        if leaf == 0xB {
            [0, 0, subleaf & 0xFF, state.apic_id]
        } else {
            [0; 4]
        }
    }

    fn with_state(&self, answer: [u32; 4], leaf: u32, sub: u32, state: &CpuidState) -> [u32; 4] {
        let [eax, mut ebx, mut ecx, mut edx] = answer;
        let cr4 = Cr4Flags::from_bits_retain(state.cr4);
        match (leaf, sub) {
            (1, _) => {
                ebx |= state.apic_id << 24;
                if cr4.contains(Cr4Flags::OSXSAVE) {
                    ecx |= leaf1_ecx::OSXSAVE;
                }
            }
            (7, 0) if cr4.contains(Cr4Flags::PROTECTION_KEY_USER) => ecx |= LEAF7_ECX_OSPKE,
            (0xB, _) => edx = state.apic_id,
            (0xD, 0) => {
                ebx = self.xsave_size(state.xcr0);
                ecx = self.xsave_size(u64::from(eax));
            }
            (0xD, 1) => ebx = self.xsave_size(state.xcr0),
            _ => {}
        }
        [eax, ebx, ecx, edx]
    }

    /// The bytes of an XSAVE area in standard form that holds these components: the legacy region
    /// and header, then as far as the last component ends (SDM vol. 1, 13.4).
    fn xsave_size(&self, components: u64) -> u32 {
        let ends = self.component_end.iter().enumerate();
        ends.filter(|(i, _)| components & (1 << i) != 0)
            .map(|(_, &end)| end)
            .fold(0x240, u32::max)
    }
}

/// The place of a leaf in the index.
#[inline]
fn slot(leaf: u32) -> Option<usize> {
    let (range, offset) = (leaf >> 30, leaf & 0x3FFF_FFFF);
    (offset < LEAVES_PER_RANGE).then_some((range * LEAVES_PER_RANGE + offset) as usize)
}

/// Whether the answer depends on the vCPU.
#[inline]
fn varies(leaf: u32) -> bool {
    matches!(leaf, 1 | 7 | 0xB | 0xD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rich() -> Cpuid {
        Cpuid::read_from(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0x20, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            (0x8000_0000, _) => [0x8000_0022, 0, 0, 0],
            (4 | 0x8000_001D, 3..) => [0; 4],
            (7, 0) => [2, !0, !0, !0],
            (0xB, 2..) => [0; 4],
            (0xD, 0) => [0x2E7, 576, 2696, 0],
            (0xD, 2) => [256, 576, 0, 0],
            (0xD, 9) => [8, 2688, 0, 0],
            (0xD, 3..) => [0; 4],
            _ => [!0; 4],
        })
    }

    const CONFIG: CpuidConfig = CpuidConfig {
        vcpus: 2,
        nested: false,
        hyperv: false,
        arch_capabilities: false,
    };

    #[test]
    fn what_needs_the_hypervisors_help_is_hidden_and_what_it_emulates_is_shown() {
        let guest = for_guest(&rich(), CONFIG);
        let [_, _, ecx, _] = guest.query(1, 0);
        assert_eq!(ecx & (leaf1_ecx::VMX | 1 << 3 | leaf1_ecx::OSXSAVE), 0);
        assert_ne!(ecx & leaf1_ecx::X2APIC, 0);
        assert_eq!(guest.query(0x8000_0001, 0)[2] & LEAF8_1_ECX_SVM, 0);
        assert_eq!(guest.query(0x8000_000A, 0), [0; 4]);
        assert_eq!(
            guest.query(7, 0)[3] & (1 << 26 | 1 << 27),
            0,
            "speculation control"
        );
        assert_eq!(guest.query(7, 1), [0; 4]);
        // That of the processor would tell of flaws that the hypervisor may have removed or brought.
        assert_eq!(guest.query(7, 0)[3] & LEAF7_EDX_ARCH_CAPABILITIES, 0);
        let told = CpuidConfig {
            arch_capabilities: true,
            ..CONFIG
        };
        let told = for_guest(&rich(), told).query(7, 0)[3] ^ guest.query(7, 0)[3];
        assert_eq!(told, LEAF7_EDX_ARCH_CAPABILITIES);
        let nested = for_guest(
            &rich(),
            CpuidConfig {
                nested: true,
                ..CONFIG
            },
        );
        assert_ne!(nested.query(0x8000_0001, 0)[2] & LEAF8_1_ECX_SVM, 0);
        assert_ne!(nested.query(0x8000_000A, 0), [0; 4]);
    }

    #[test]
    fn answers_follow_the_vcpu() {
        let table = CpuidTable::new(&for_guest(&rich(), CONFIG));
        let mut state = CpuidState {
            apic_id: 1,
            cr4: 0,
            xcr0: 1,
        };
        assert_eq!(table.query(1, 7, &state)[1] >> 24, 1);
        assert_eq!(table.query(0xB, 0, &state), [0, 1, 0x100, 1]);
        assert_eq!(table.query(0xB, 1, &state), [1, 2, 0x201, 1]);
        assert_eq!(table.query(0xB, 5, &state), [0, 0, 5, 1]);
        assert_eq!(table.query(0xD, 0, &state)[1], 0x240);
        state.xcr0 = 7;
        assert_eq!(table.query(0xD, 0, &state), [0x2E7, 832, 2696, 0]);
        state.cr4 = 1 << 18 | 1 << 22;
        assert_ne!(table.query(1, 0, &state)[2] & leaf1_ecx::OSXSAVE, 0);
        assert_ne!(table.query(7, 0, &state)[2] & LEAF7_ECX_OSPKE, 0);
    }

    #[test]
    fn the_signature_is_there() {
        let table = CpuidTable::new(&for_guest(&rich(), CONFIG));
        let [eax, ebx, ..] = table.query(0x4000_0000, 0, &CpuidState::default());
        assert_eq!((eax, ebx.to_le_bytes()), (0x4000_0000, *b"Test"));
    }

    #[test]
    fn kvms_interface_has_what_is_there_and_nothing_else() {
        let table = CpuidTable::new(&for_guest(&rich(), CONFIG));
        let query = |leaf| table.query(leaf, 0, &CpuidState::default());
        let [eax, ebx, ecx, edx] = query(0x4000_0100);
        assert_eq!((eax, ebx.to_le_bytes()), (0x4000_0101, *b"KVMK"));
        assert_eq!((ecx.to_le_bytes(), edx), (*b"VMKV", u32::from(b'M')));
        assert_eq!(query(0x4000_0101), [0b10, 0, 0, 0]);
        assert_eq!(query(0x4000_0102), [0; 4]);
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_the_list(leaf in prop_oneof![0u32..64, 0x4000_0000u32..0x4000_0004, 0x4000_00FEu32..0x4000_0104, 0x8000_0000u32..0x8000_0040, any::<u32>()], sub in 0u32..70) {
            let list = for_guest(&rich(), CONFIG);
            let table = CpuidTable::new(&list);
            if !matches!(leaf, 1 | 7 | 0xB | 0xD) {
                prop_assert_eq!(table.query(leaf, sub, &CpuidState::default()), list.query(leaf, sub));
            }
            if let Some(answer) = table.constant(leaf) {
                for state in [CpuidState::default(), CpuidState { apic_id: 1, cr4: !0, xcr0: !0 }] {
                    prop_assert_eq!(table.query(leaf, sub, &state), *answer);
                }
            }
        }
    }
}
