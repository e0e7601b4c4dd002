use super::*;
use crate::caps::fixtures;
use std::string::ToString;

#[test]
fn the_msrs_of_a_snapshot_make_the_same_snapshot() {
    for (name, caps) in fixtures::all() {
        let vmx = |leaf, _| {
            if leaf == 0 {
                [1, 0, 0, 0]
            } else {
                [0, 0, 1 << 5, 0]
            }
        };
        let again = VmxCaps::read_from(|msr| caps.msr(msr), vmx).unwrap();
        let again = VmxCaps {
            processor: caps.processor,
            ..again
        };
        assert_eq!(again, caps, "{name}");
    }
}

#[test]
fn true_msrs_free_the_default_bits() {
    let caps = fixtures::haswell();
    assert!(
        !caps
            .primary
            .must_be_one()
            .contains(PrimaryControls::CR3_LOAD_EXITING)
    );
    let plain = Allowed::<PrimaryControls>::from_msr(caps.msr(Msr::VMX_PROCBASED_CTLS).unwrap());
    assert!(
        plain
            .must_be_one()
            .contains(PrimaryControls::CR3_LOAD_EXITING)
    );
    assert_eq!(
        caps.msr(Msr::VMX_PROCBASED_CTLS),
        Some(0xFFF9_FFFE_0401_E172)
    );
}

#[test]
fn what_is_not_offered_is_named() {
    let caps = fixtures::nehalem();
    let wish = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    let error = caps
        .secondary
        .grant(wish, SecondaryControls::empty())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the processor does not offer UNRESTRICTED_GUEST among the \
         secondary processor-based VM-execution controls"
    );
}

#[test]
fn what_is_forced_is_reported() {
    let caps = fixtures::skylake_sp();
    let granted = caps
        .pin
        .grant(
            PinControls::NMI_EXITING,
            PinControls::PROCESS_POSTED_INTERRUPTS,
        )
        .unwrap();
    assert_eq!(granted.forced.bits(), 0x16);
    assert!(granted.refused.is_empty());
    assert!(caps.pin.accepts(granted.controls));

    let plain = Allowed::<PrimaryControls>::from_msr(0xFFF9_FFFE_0401_E172);
    let granted = plain.grant(PrimaryControls::HLT_EXITING, PrimaryControls::empty());
    let error = granted
        .unwrap()
        .without(PrimaryControls::CR3_LOAD_EXITING)
        .unwrap_err();
    assert_eq!(error.forced, PrimaryControls::CR3_LOAD_EXITING);
}

#[test]
fn reasons_for_no_vmx() {
    let caps = fixtures::haswell();
    let vmx = |leaf, _| {
        if leaf == 0 {
            [1, 0, 0, 0]
        } else {
            [0, 0, 1 << 5, 0]
        }
    };
    let no_vmx = VmxCaps::read_from(|msr| caps.msr(msr), |leaf, _| [1 - leaf, 0, 0, 0]);
    assert_eq!(no_vmx, Err(NoVmx::NotSupported));
    let lock = |value| move |msr| (msr == Msr::FEATURE_CONTROL).then_some(value);
    let locked = VmxCaps::read_from(lock(1), vmx).unwrap_err();
    assert_eq!(locked, NoVmx::LockedOff { feature_control: 1 });
    assert!(locked.to_string().contains("IA32_FEATURE_CONTROL is 0x1"));
    let unlocked = VmxCaps::read_from(lock(0), vmx);
    assert_eq!(unlocked, Err(NoVmx::MissingMsr(Msr::VMX_BASIC)));
}

#[test]
fn canonical_addresses() {
    assert!(Processor::is_canonical(0x0000_7FFF_FFFF_FFFF, 48));
    assert!(!Processor::is_canonical(0x0000_8000_0000_0000, 48));
    assert!(Processor::is_canonical(0xFFFF_8000_0000_0000, 48));
    assert!(Processor::is_canonical(0x0000_8000_0000_0000, 57));
    assert!(!Processor::is_canonical(0x0100_0000_0000_0000, 57));
}

#[test]
fn counters_decide_the_performance_control() {
    let cpuid = |leaf: u32, _: u32| match leaf {
        0 => [0xA, 0, 0, 0],
        0xA => [0x0830_0404, 0, 0, 3],
        _ => [0; 4],
    };
    let processor = Processor::read_from(cpuid);
    assert_eq!(processor.perf_global_ctrl, 0x7_0000_000F);
    assert_eq!(processor.physical_address_bits, 36);
    assert!(processor.exceeds_physical(1 << 36) && !processor.exceeds_physical((1 << 36) - 1));
}

#[test]
fn a_snapshot_reads_in_words() {
    let text = fixtures::sapphire_rapids().to_string();
    assert!(text.contains("IPI_VIRTUALIZATION") && text.contains("physical addresses  46 bits"));
}
