//! A guest's guest whose local APIC the processor virtualizes as the guest asked for it.

use core::sync::atomic::Ordering;

use testudo_vmx::controls::{ExitControls, PinControls, SecondaryControls};

use super::apic::apic_tables;
use super::nested::{
    Hypervisor, NO_EXIT, hypervisor, hypervisor_by, hypervisor_on, prepare_memory, prepared_memory,
};
use super::*;
use crate::Stop;
use crate::irq::{ApicMode, ApicState};

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

/// L1, in VMX operation, on a processor that virtualizes its own local APIC.
fn with_its_own(shadow: bool) -> Hypervisor {
    let (caps, memory) = (fixtures::skylake_sp(), prepared_memory());
    let vcpu = hypervisor_by(caps, memory, (shadow, false), Some(apic_tables()));
    vcpu.with_vmcs(PinControls::EXTERNAL_INTERRUPT_EXITING, NO_EXIT)
}

fn state(mode: ApicMode, requesting: u8) -> ApicState {
    ApicState {
        mode,
        page: None,
        requesting,
        serving: 0x31,
        level: [0; 4],
    }
}

/// While L2 runs the processor delivers L1 nothing: what it has requested by then is the machine's to look at.
#[test]
fn an_interrupt_that_l1s_processor_has_requested_is_seen_when_l2_begins() {
    let mut vcpu = with_its_own(false);
    assert!(vcpu.delivers_interrupts());
    vcpu.launch();
    assert!(!vcpu.delivers_interrupts() && vcpu.virtualizes_apic());
    assert!(!secondary(&vcpu).intersects(super::super::apic::NEEDED));
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert!(vcpu.delivers_interrupts());
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPT_STATUS, 0x61);
        exit(vmcs, BasicReason::Vmresume, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(vcpu.level, Level::L2);
}

fn secondary(vcpu: &Hypervisor) -> SecondaryControls {
    SecondaryControls::from_bits_retain(vcpu.hardware(fields::SECONDARY_CONTROLS))
}

#[test]
fn what_changes_in_l1s_apic_while_l2_runs_l1s_vmcs_says_afterwards() {
    let mode = SecondaryControls::VIRTUALIZE_X2APIC_MODE;
    let shadowing = SecondaryControls::VMCS_SHADOWING;
    // What the mode of the APIC decides leaves what nesting does.
    let mut vcpu = with_its_own(true);
    assert!(secondary(&vcpu).contains(shadowing));
    vcpu.set_apic(&state(ApicMode::X2Apic, 0));
    assert!(secondary(&vcpu).contains(shadowing | mode));
    let mut vcpu = with_its_own(false);
    vcpu.set_apic(&state(ApicMode::X2Apic, 0));
    vcpu.launch();
    let status = |vcpu: &Hypervisor| vcpu.hardware(fields::GUEST_INTERRUPT_STATUS);
    let before = status(&vcpu);
    vcpu.set_apic(&state(ApicMode::Disabled, 0x71));
    vcpu.set_apic(&state(ApicMode::X2Apic, 0x81));
    assert_eq!(status(&vcpu), before);
    assert!(!secondary(&vcpu).contains(mode));
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_eq!((vcpu.level, status(&vcpu)), (Level::L1, 0x3181));
    assert!(secondary(&vcpu).contains(mode));
    // A vector is the processor's to deliver, not to be told of when it can be.
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x81)));
    let window = PrimaryControls::INTERRUPT_WINDOW_EXITING.bits();
    assert_eq!(vcpu.hardware(fields::PRIMARY_CONTROLS) & window, 0);
}

/// A line of the I/O APIC's that stays high, with the notification's vector and level-triggered: each of its
/// interrupts is taken for L2, and is there again when that is over. L2 comes no further, as on a processor.
#[test]
fn a_notification_that_asks_without_end_does_not_keep_the_machine_from_stopping() {
    const NOTIFICATION: u8 = 0x72;
    const DESCRIPTOR: u64 = 0x7_0000;
    const GSI: u32 = 10;
    let memory = ram(MEMORY);
    let (machine, mut lapic, _) = fake_machine::machine(memory.clone());
    let memory: &'static GuestRam = Box::leak(Box::new(memory));
    prepare_memory(memory);
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::PROCESS_POSTED_INTERRUPTS;
    let acknowledge = ExitControls::ACKNOWLEDGE_INTERRUPT;
    let vcpu = hypervisor_on(fixtures::skylake_sp(), memory, false, false);
    let mut vcpu = vcpu.with_vmcs(pin, acknowledge);
    vcpu.nested.as_mut().unwrap().stage.frames = Some(FRAMES);
    vcpu.vmwrite(fields::VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC);
    let primary = vcpu.vmread(fields::PRIMARY_CONTROLS);
    let wanted = PrimaryControls::USE_TPR_SHADOW | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
    vcpu.vmwrite(fields::PRIMARY_CONTROLS, primary | u64::from(wanted.bits()));
    let delivery = SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    vcpu.vmwrite(fields::SECONDARY_CONTROLS, delivery.bits().into());
    let vector = fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR;
    vcpu.vmwrite(vector, NOTIFICATION.into());
    vcpu.vmwrite(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, DESCRIPTOR);
    let start = BootState {
        system: vcpu.system(),
        gprs: Gprs::default(),
    };
    lapic.write_mmio(0xF0, &0x1FF_u32.to_le_bytes());
    let window = machine.irqchip.ioapic_window();
    let level = 1 << 15 | u32::from(NOTIFICATION);
    for (register, value) in [(0x11 + 2 * GSI, 0), (0x10 + 2 * GSI, level)] {
        window.write(0, &register.to_le_bytes());
        window.write(0x10, &value.to_le_bytes());
    }
    let line: &'static _ = Box::leak(Box::new(machine.irqchip.line(GSI).unwrap()));
    vcpu.will_exit(BasicReason::Vmlaunch, 0);
    static ASKS: AtomicU32 = AtomicU32::new(0);
    vcpu.will(move |vmcs, _| {
        line.set(true);
        ASKS.store(1, Ordering::Release);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while ASKS.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            machine.stop(Stop {
                reason: StopReason::Host,
                vcpu: 0,
                gprs: Gprs::default(),
                system: start.system,
            });
        });
        let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
        assert_eq!(stop.reason, StopReason::Host);
    });
}
