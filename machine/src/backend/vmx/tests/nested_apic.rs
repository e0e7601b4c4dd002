//! A guest's guest whose local APIC the processor virtualizes as the guest asked for it.

use testudo_vmx::controls::{PinControls, SecondaryControls};

use super::nested::{Hypervisor, NO_EXIT, hypervisor};
use super::*;

const VIRTUAL_APIC: u64 = 0xC000;
const VTPR: u64 = VIRTUAL_APIC + 0x80;
const FRAMES: u64 = 0x3_0000_0000;

/// L2 runs with a task priority of its own, 5, and these secondary controls.
fn running(secondary: SecondaryControls) -> Hypervisor {
    let mut vcpu = hypervisor().with_vmcs(PinControls::EXTERNAL_INTERRUPT_EXITING, NO_EXIT);
    vcpu.nested.as_mut().unwrap().stage.frames = Some(FRAMES);
    vcpu.memory.store_u64(Gpa(VTPR), 0x50).unwrap();
    vcpu.vmwrite(fields::VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC);
    let primary = vcpu.vmread(fields::PRIMARY_CONTROLS);
    let wanted = PrimaryControls::USE_TPR_SHADOW | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    vcpu.vmwrite(fields::PRIMARY_CONTROLS, primary | u64::from(wanted.bits()));
    vcpu.vmwrite(fields::SECONDARY_CONTROLS, secondary.bits().into());
    vcpu.vmwrite(fields::TPR_THRESHOLD, 5);
    vcpu.vmwrite(fields::GUEST_RFLAGS, 0x202);
    vcpu.launch();
    vcpu
}

#[test]
fn l2_does_not_run_on_a_frame_that_the_machine_took_away() {
    let mut vcpu = running(SecondaryControls::empty());
    let named = |vcpu: &Hypervisor| vcpu.hardware(fields::VIRTUAL_APIC_ADDRESS);
    assert_eq!(named(&vcpu), FRAMES + VIRTUAL_APIC);
    vcpu.nested.as_mut().unwrap().stage.frames = Some(2 * FRAMES);
    vcpu.forget_memory().unwrap();
    vcpu.will(|vmcs, _| {
        assert_eq!(
            vmcs.get(fields::VIRTUAL_APIC_ADDRESS),
            Ok(2 * FRAMES + VIRTUAL_APIC)
        );
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    assert_eq!(named(&vcpu), 2 * FRAMES + VIRTUAL_APIC);
    // Nothing is there any more: the entry is not made.
    vcpu.nested.as_mut().unwrap().stage.frames = None;
    vcpu.forget_memory().unwrap();
    let end = vcpu.run(&AtomicU32::new(0));
    assert_eq!(end, Err(VcpuError::LostApicPage));
}

#[test]
fn a_priority_that_falls_below_the_threshold_behind_an_entrys_back_is_an_exit() {
    let mut vcpu = running(SecondaryControls::empty());
    vcpu.will_exit(BasicReason::ExternalInterrupt, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    // Another processor of L1's writes, and the processor looks: it refuses.
    vcpu.memory.store_u64(Gpa(VTPR), 0x40).unwrap();
    vcpu.processor.refuses = 1;
    vcpu.run_out();
    vcpu.assert_exited(BasicReason::TprBelowThreshold);
    // Any other refusal is a failure still.
    let mut vcpu = running(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
    vcpu.processor.refuses = 1;
    let end = vcpu.run(&AtomicU32::new(0));
    assert!(matches!(end, Err(VcpuError::VmEntry(_))), "{end:?}");
}

#[test]
fn a_halt_of_l2_is_none_while_the_processor_has_an_interrupt_for_it() {
    let mut vcpu = running(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPT_STATUS, 0x61);
        let sti = Interruptibility::BLOCKING_BY_STI.bits();
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, sti.into());
        exit(vmcs, BasicReason::Hlt, 0);
    });
    let rip = vcpu.rip();
    vcpu.will(|vmcs, _| {
        assert_eq!(vmcs.get(fields::GUEST_INTERRUPTIBILITY), Ok(0));
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    assert_eq!(vcpu.rip(), rip + 2);
    // Not above the task's priority, it waits as any.
    vcpu.memory.store_u64(Gpa(VTPR), 0x60).unwrap();
    vcpu.will_exit(BasicReason::Hlt, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Halt);
}
