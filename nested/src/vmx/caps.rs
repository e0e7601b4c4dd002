//! The VMX capabilities that L1 is shown (SDM vol. 3D, appendix A).

use testudo_arch::Msr;
use testudo_vmx::VmxCaps;
use testudo_vmx::caps::{
    Allowed, Basic, EptVpidCaps, FEATURE_CONTROL_LOCKED, FEATURE_CONTROL_VMX, Misc,
};
use testudo_vmx::controls::{
    ControlWord, EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    VmFunctions,
};

use super::apic;
use super::vmcs12::REVISION;

/// What L0 lets L1 have beyond what its own needs allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// EPT, unrestricted guests and INVEPT. Needs a second stage.
    pub ept: bool,
    /// VPID and INVVPID.
    pub vpid: bool,
    /// APIC virtualization, with posted interrupts where the processor delivers virtual ones. Needs a second stage that
    /// finds the [frames](super::SecondStage::frame) behind L1's pages, and that L1's interrupts are L0's to
    /// deliver, which [takes notifications](super::NestedVmx::take_notification).
    pub apic: bool,
    /// What an enlightened VMCS, version 1, has fields for, and no more: for a vCPU
    /// [with enlightened VMCSs](super::NestedVmx::with_enlightened_vmcs).
    pub enlightened: bool,
}

const PIN: PinControls = PinControls::EXTERNAL_INTERRUPT_EXITING
    .union(PinControls::NMI_EXITING)
    .union(PinControls::VIRTUAL_NMIS)
    .union(PinControls::ACTIVATE_PREEMPTION_TIMER);

const PRIMARY: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING
    .union(PrimaryControls::USE_TSC_OFFSETTING)
    .union(PrimaryControls::HLT_EXITING)
    .union(PrimaryControls::INVLPG_EXITING)
    .union(PrimaryControls::MWAIT_EXITING)
    .union(PrimaryControls::RDPMC_EXITING)
    .union(PrimaryControls::RDTSC_EXITING)
    .union(PrimaryControls::CR3_LOAD_EXITING)
    .union(PrimaryControls::CR3_STORE_EXITING)
    .union(PrimaryControls::CR8_LOAD_EXITING)
    .union(PrimaryControls::CR8_STORE_EXITING)
    .union(PrimaryControls::NMI_WINDOW_EXITING)
    .union(PrimaryControls::MOV_DR_EXITING)
    .union(PrimaryControls::UNCONDITIONAL_IO_EXITING)
    .union(PrimaryControls::USE_IO_BITMAPS)
    .union(PrimaryControls::MONITOR_TRAP_FLAG)
    .union(PrimaryControls::USE_MSR_BITMAPS)
    .union(PrimaryControls::MONITOR_EXITING)
    .union(PrimaryControls::PAUSE_EXITING)
    .union(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS);

const SECONDARY: SecondaryControls = SecondaryControls::DESCRIPTOR_TABLE_EXITING
    .union(SecondaryControls::ENABLE_RDTSCP)
    .union(SecondaryControls::WBINVD_EXITING)
    .union(SecondaryControls::RDRAND_EXITING)
    .union(SecondaryControls::ENABLE_INVPCID)
    .union(SecondaryControls::RDSEED_EXITING)
    .union(SecondaryControls::USE_TSC_SCALING);

const SECONDARY_EPT: SecondaryControls =
    SecondaryControls::ENABLE_EPT.union(SecondaryControls::UNRESTRICTED_GUEST);

/// Controls about the local APIC for which the enlightened VMCS has no fields.
const NOT_ENLIGHTENED: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::APIC_REGISTER_VIRTUALIZATION)
    .union(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);

const EXIT: ExitControls = ExitControls::SAVE_DEBUG_CONTROLS
    .union(ExitControls::HOST_ADDRESS_SPACE_SIZE)
    .union(ExitControls::ACKNOWLEDGE_INTERRUPT)
    .union(ExitControls::SAVE_PAT)
    .union(ExitControls::LOAD_PAT)
    .union(ExitControls::SAVE_EFER)
    .union(ExitControls::LOAD_EFER)
    .union(ExitControls::SAVE_PREEMPTION_TIMER);

const ENTRY: EntryControls = EntryControls::LOAD_DEBUG_CONTROLS
    .union(EntryControls::IA32E_MODE_GUEST)
    .union(EntryControls::LOAD_PAT)
    .union(EntryControls::LOAD_EFER);

const EPT_CAPS: EptVpidCaps = EptVpidCaps::EXECUTE_ONLY
    .union(EptVpidCaps::WALK_4)
    .union(EptVpidCaps::WRITE_BACK)
    .union(EptVpidCaps::PAGE_2M)
    .union(EptVpidCaps::PAGE_1G)
    .union(EptVpidCaps::ACCESSED_DIRTY)
    .union(EptVpidCaps::INVEPT)
    .union(EptVpidCaps::INVEPT_SINGLE)
    .union(EptVpidCaps::INVEPT_ALL);

const VPID_CAPS: EptVpidCaps = EptVpidCaps::INVVPID
    .union(EptVpidCaps::INVVPID_ADDRESS)
    .union(EptVpidCaps::INVVPID_SINGLE)
    .union(EptVpidCaps::INVVPID_ALL)
    .union(EptVpidCaps::INVVPID_SINGLE_RETAINING_GLOBALS);

/// The default-1 bits stay 1, the controls that the layer carries may be 1 where the processor
/// lets them, and CR3 and debug controls may be cleared (the "true" MSRs say so).
fn narrow<C: ControlWord>(processor: Allowed<C>, carried: C) -> Allowed<C> {
    let clearable = C::from_u64(carried.to_u64() & C::DEFAULT1);
    let must = C::from_u64(C::DEFAULT1 & !clearable.to_u64());
    let may = processor.may_be_one().to_u64() & carried.to_u64();
    Allowed::new(must, C::from_u64(may | C::DEFAULT1))
}

/// What L1's capability MSRs say, on a processor with `processor`'s capabilities.
///
/// `l1` describes the processor that L1 was told of by CPUID; its `processor` part decides which
/// bits of CR4 and EFER are valid.
pub fn offer(processor: &VmxCaps, l1: testudo_vmx::caps::Processor, offer: Offer) -> VmxCaps {
    let mut secondary = SECONDARY;
    let mut ept_vpid = EptVpidCaps::empty();
    if offer.ept && processor.secondary.allows(SECONDARY_EPT) {
        secondary |= SECONDARY_EPT;
        ept_vpid |= EPT_CAPS;
    }
    let mut primary = PRIMARY;
    if offer.apic {
        if processor.primary.allows(PrimaryControls::USE_TPR_SHADOW) {
            primary |= PrimaryControls::USE_TPR_SHADOW;
            secondary |= apic::CONTROLS;
        } else {
            secondary |= SecondaryControls::VIRTUALIZE_APIC_ACCESSES;
        }
        if offer.enlightened {
            secondary -= NOT_ENLIGHTENED;
        }
    }
    if offer.vpid {
        secondary |= SecondaryControls::ENABLE_VPID;
        ept_vpid |= VPID_CAPS;
    }
    let may_secondary = processor.secondary.may_be_one() & secondary;
    let offered = |control| may_secondary.contains(control);
    if !offered(SecondaryControls::ENABLE_EPT) {
        ept_vpid -= EPT_CAPS;
    }
    if !offered(SecondaryControls::ENABLE_VPID) {
        ept_vpid -= VPID_CAPS;
    }
    // INVEPT and INVVPID are this layer's own; what is in the tables is the processor's.
    let own = VPID_CAPS
        | EptVpidCaps::INVEPT
        | EptVpidCaps::INVEPT_SINGLE
        | EptVpidCaps::INVEPT_ALL
        | EptVpidCaps::ACCESSED_DIRTY;
    ept_vpid &= processor.ept_vpid | own;
    // Exit and entry bits for PAT and EFER come in pairs (KVM refuses others).
    let both = |exit, entry| processor.exit.allows(exit) && processor.entry.allows(entry);
    let (mut pin, mut exit, mut entry) = (PIN, EXIT, ENTRY);
    if offer.enlightened {
        pin -= PinControls::ACTIVATE_PREEMPTION_TIMER;
    }
    if !both(ExitControls::LOAD_PAT, EntryControls::LOAD_PAT) {
        exit -= ExitControls::LOAD_PAT | ExitControls::SAVE_PAT;
        entry -= EntryControls::LOAD_PAT;
    }
    if !both(ExitControls::LOAD_EFER, EntryControls::LOAD_EFER) {
        exit -= ExitControls::LOAD_EFER | ExitControls::SAVE_EFER;
        entry -= EntryControls::LOAD_EFER;
    }
    let mut pin_allowed = narrow(processor.pin, pin);
    if offered(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY) {
        // Whether or not the processor has it: this layer does it.
        let may = pin_allowed.may_be_one() | PinControls::PROCESS_POSTED_INTERRUPTS;
        pin_allowed = Allowed::new(pin_allowed.must_be_one(), may);
    }
    if !(processor.pin.may_be_one() & pin).contains(PinControls::ACTIVATE_PREEMPTION_TIMER) {
        exit -= ExitControls::SAVE_PREEMPTION_TIMER;
    }
    VmxCaps {
        // Region of a page, write-back (6), INS and OUTS information as the processor's, exact
        // control MSRs; no dual monitor.
        basic: Basic(
            u64::from(REVISION) | 4096 << 32 | 6 << 50 | (processor.basic.0 & (1 << 54)) | 1 << 55,
        ),
        pin: pin_allowed,
        primary: narrow(processor.primary, primary),
        exit: narrow(processor.exit, exit),
        entry: narrow(processor.entry, entry),
        secondary: Allowed::from_allowed1(may_secondary.to_u64()),
        tertiary: Allowed::none(),
        exit2: Allowed::none(),
        functions: VmFunctions::empty(),
        ept_vpid,
        // The timer's rate, LMA stored by exits, HLT as an activity state, four CR3 targets,
        // lists of 512 MSRs.
        misc: Misc((processor.misc.0 & 0x1F) | 1 << 5 | 1 << 6 | 4 << 16),
        cr0: processor.cr0,
        cr4: testudo_vmx::caps::FixedBits {
            ones: processor.cr4.ones,
            may: processor.cr4.may,
        },
        // The highest index of a field, here of any area and width.
        vmcs_enum: 0x2E << 1,
        feature_control: FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX,
        processor: l1,
    }
}

/// What RDMSR gives L1 for a VMX capability MSR or FEATURE_CONTROL; `None` for all others (and for
/// those of features that are not offered: #GP). All are read-only to L1, FEATURE_CONTROL because
/// it is locked.
pub fn read_msr(caps: &VmxCaps, msr: Msr) -> Option<u64> {
    caps.msr(msr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use testudo_vmx::caps::fixtures;

    /// FACTS of what the guest hypervisors need, as allowed-1 bits.
    #[test]
    fn kvm_and_xen_find_what_they_need() {
        for processor in [
            fixtures::nehalem(),
            fixtures::haswell(),
            fixtures::skylake_sp(),
        ] {
            let all = Offer {
                ept: true,
                vpid: true,
                apic: true,
                enlightened: false,
            };
            let caps = offer(&processor, processor.processor, all);
            assert!(caps.pin.allows(PinControls::from_bits_retain(0x9)));
            let primary = PrimaryControls::from_bits_retain(0x2399_9E8C - 0x0020_0000);
            assert!(
                caps.primary
                    .allows(primary & !PrimaryControls::USE_TPR_SHADOW)
            );
            assert!(caps.exit.allows(ExitControls::from_bits_retain(0x8204)));
            assert!(caps.entry.allows(EntryControls::from_bits_retain(0x204)));
            let basic = caps.basic;
            assert!(basic.region_size() <= 4096 && !basic.addresses_are_32_bit());
            assert_eq!((basic.memory_type(), basic.revision()), (6, REVISION));
            assert!(basic.true_controls());
            // Xen's HAP: CR3 exits can be cleared.
            let cr3 = PrimaryControls::CR3_LOAD_EXITING | PrimaryControls::CR3_STORE_EXITING;
            assert!(!caps.primary.must_be_one().intersects(cr3));
            assert_eq!(caps.feature_control & 5, 5);
            for msr in (0x480..=0x493).map(Msr) {
                let value = read_msr(&caps, msr);
                let hidden = [
                    Msr::VMX_VMFUNC,
                    Msr::VMX_PROCBASED_CTLS3,
                    Msr::VMX_EXIT_CTLS2,
                ];
                assert_eq!(value.is_none(), hidden.contains(&msr), "{msr}");
            }
        }
    }

    #[test]
    fn nothing_is_offered_that_the_processor_lacks() {
        let processor = fixtures::nehalem();
        let none = Offer {
            ept: false,
            vpid: false,
            apic: false,
            enlightened: false,
        };
        let caps = offer(&processor, processor.processor, none);
        assert!(caps.ept_vpid.is_empty());
        assert!(!caps.secondary.allows(SecondaryControls::ENABLE_EPT));
        for newer in [
            SecondaryControls::ENABLE_INVPCID,
            SecondaryControls::RDSEED_EXITING,
            SecondaryControls::VMCS_SHADOWING,
        ] {
            assert!(!caps.secondary.allows(newer));
        }
        let new = fixtures::sapphire_rapids();
        let caps = offer(
            &new,
            new.processor,
            Offer {
                ept: true,
                vpid: true,
                apic: false,
                enlightened: false,
            },
        );
        assert!(!caps.primary.allows(PrimaryControls::USE_TPR_SHADOW));
        assert!(!caps.pin.allows(PinControls::PROCESS_POSTED_INTERRUPTS));
        assert!(!caps.exit.allows(ExitControls::LOAD_CET_STATE));
        assert!(caps.tertiary.may_be_one().is_empty());
        assert!(!caps.misc.activity_shutdown() && !caps.misc.activity_wait_for_sipi());
    }
}
