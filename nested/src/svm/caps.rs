//! What L1 is told about its processor (CPUID Fn8000_000A, APM vol. 3).

use testudo_arch::cpuid::CpuidEntry;
use testudo_svm::caps::{Features, SvmCaps};

/// Features that need the processor's help while L2 runs, and that the layer passes on.
const PASSED_ON: Features = Features::NP
    .union(Features::LBR_VIRT)
    .union(Features::NRIPS)
    .union(Features::DECODE_ASSISTS)
    .union(Features::PAUSE_FILTER)
    .union(Features::PAUSE_FILTER_THRESHOLD)
    .union(Features::V_VMSAVE_VMLOAD)
    .union(Features::V_GIF);

/// Features that the layer provides on any processor.
const PROVIDED: Features = Features::VMCB_CLEAN
    .union(Features::FLUSH_BY_ASID)
    .union(Features::SVME_ADDR_CHECK);

/// The number of ASIDs that L1 may use. They are numbers in a table here, so there is no shortage;
/// KVM wants more than it has vCPUs, Xen more than one.
const ASID_COUNT: u32 = 0x8000;

/// The features of SVM that L1 can be offered on a processor with these capabilities.
///
/// Nested paging needs a [`SecondStage`](super::SecondStage); an L0 without one removes
/// [`Features::NP`].
pub fn offer(processor: &SvmCaps) -> Features {
    (processor.features & PASSED_ON) | PROVIDED
}

/// The CPUID leaf 8000_000Ah for an L1 that is offered these features. Bit 2 of ECX of leaf
/// 8000_0001h belongs with it.
pub fn leaf_8000_000a(features: Features) -> CpuidEntry {
    CpuidEntry {
        leaf: 0x8000_000A,
        eax: 1,
        ebx: ASID_COUNT,
        edx: (features & (PASSED_ON | PROVIDED)).bits(),
        ..CpuidEntry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn l1_is_offered_no_more_than_there_is() {
        // QEMU's emulation: nested paging, virtual GIF and the address check, nothing else.
        let qemu = SvmCaps {
            features: Features::NP | Features::V_GIF | Features::SVME_ADDR_CHECK,
            ..SvmCaps::BARCELONA
        };
        assert_eq!(
            offer(&qemu),
            Features::NP
                | Features::V_GIF
                | Features::SVME_ADDR_CHECK
                | Features::VMCB_CLEAN
                | Features::FLUSH_BY_ASID
        );
        let all = SvmCaps {
            features: Features::all(),
            ..SvmCaps::BARCELONA
        };
        let offered = offer(&all);
        for not in [
            Features::AVIC,
            Features::V_NMI,
            Features::GMET,
            Features::TSC_RATE_MSR,
        ] {
            assert!(!offered.intersects(not), "{not:?}");
        }
        let leaf = leaf_8000_000a(Features::all());
        assert_eq!((leaf.eax, leaf.ebx, leaf.edx), (1, 0x8000, offered.bits()));
    }
}
