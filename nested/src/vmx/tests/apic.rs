//! APIC virtualization for L2.

use super::*;
use crate::vmx::{Flush, Posted};
use testudo_vmx::controls::Interruptibility;

/// The controls, as for [`Vm::ask_for_apic`].
const SHADOW: u32 = 1 << 31;
const ACCESSES: u32 = 1;
const DELIVERY: u32 = 1 << 9;

const ENTERED: End = End::Other(Outcome::Entered { halted: false });

fn l2<W: testudo_vmx::encoding::Width>(vm: &Vm, field: testudo_vmx::Field<W>) -> W::Value {
    vm.vmcs.l2.get(field).unwrap()
}

fn primary(vm: &Vm) -> PrimaryControls {
    PrimaryControls::from_bits_retain(l2(vm, fields::PRIMARY_CONTROLS))
}

fn priority(vm: &Vm, vtpr: u8) {
    vm.memory.write(Gpa(VIRTUAL_APIC + 0x80), &[vtpr]).unwrap();
}

#[test]
fn l2_has_a_task_priority_of_its_own_with_a_shadow_only() {
    let cr8 = PrimaryControls::CR8_LOAD_EXITING | PrimaryControls::CR8_STORE_EXITING;
    let mut vm = Vm::running();
    assert!(primary(&vm).contains(cr8));
    let _ = vm.exit(BasicReason::Cpuid, 0);
    vm.ask_for_apic(SHADOW, 0);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert!(!primary(&vm).intersects(cr8));
    assert_eq!(l2(&vm, fields::VIRTUAL_APIC_ADDRESS), FRAMES + VIRTUAL_APIC);
    // What L1 wants to see of it exits to it.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    let wanted =
        vm.get12(fields::PRIMARY_CONTROLS) | u64::from(PrimaryControls::CR8_STORE_EXITING.bits());
    vm.set12(fields::PRIMARY_CONTROLS, wanted);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(primary(&vm) & cr8, PrimaryControls::CR8_STORE_EXITING);
    let mov_from_cr8 = 8 | 1 << 4;
    assert!(matches!(
        vm.exit(BasicReason::ControlRegister, mov_from_cr8),
        Handled::L1(_)
    ));
}

#[test]
fn an_entry_below_the_threshold_fails_however_it_was_before() {
    let mut vm = Vm::ready();
    vm.ask_for_apic(SHADOW, 5);
    priority(&vm, 0x4F);
    assert_eq!(vm.run(Instruction::Vmlaunch), End::Fail(7));
    priority(&vm, 0x50);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert_eq!(l2(&vm, fields::TPR_THRESHOLD), 5);
    assert!(vm.nested.may_be_below_threshold());
    for (vtpr, end) in [(0x60, ENTERED), (0x4F, End::Fail(7)), (0xFF, ENTERED)] {
        if vm.nested.is_guest() {
            let _ = vm.exit(BasicReason::Cpuid, 0);
        }
        priority(&vm, vtpr);
        assert_eq!(vm.run(Instruction::Vmresume), end);
    }
    // With an APIC-access page it does not: the processor exits right after it.
    let _ = vm.exit(BasicReason::TprBelowThreshold, 0);
    assert_eq!(vm.get12(fields::EXIT_REASON), 43);
    vm.ask_for_apic(SHADOW | ACCESSES, 5);
    priority(&vm, 0);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert!(!vm.nested.may_be_below_threshold());
    assert_eq!(l2(&vm, fields::APIC_ACCESS_ADDRESS), FRAMES + ACCESS_PAGE);
}

#[test]
fn what_is_not_memory_cannot_be_a_page_of_l2s_apic() {
    for field in [fields::VIRTUAL_APIC_ADDRESS, fields::APIC_ACCESS_ADDRESS] {
        let mut vm = Vm::ready();
        vm.ask_for_apic(SHADOW | ACCESSES, 0);
        vm.set12(field, 0xFEE0_0000);
        assert_eq!(vm.run(Instruction::Vmlaunch), End::Fail(7));
        vm.ask_for_apic(SHADOW | ACCESSES, 0);
        assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    }
}

#[test]
fn an_access_page_without_an_ept_of_l1s_is_mapped_alone() {
    let mut vm = Vm::ready();
    vm.stage.makes_plain = true;
    vm.ask_for_apic(SHADOW, 0);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert_eq!(l2(&vm, fields::EPT_POINTER), L0_EPTP);
    assert_eq!(
        (vm.stage.alone, vm.nested.is_nested_paging()),
        (None, false)
    );
    let _ = vm.exit(BasicReason::Cpuid, 0);
    vm.ask_for_apic(SHADOW | ACCESSES, 0);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(l2(&vm, fields::EPT_POINTER), PLAIN_EPTP);
    assert_eq!(vm.stage.alone, Some(Gpa(ACCESS_PAGE)));
    assert!(vm.nested.is_nested_paging());
    // What it lacks is L0's to find, and never L1's to hear of.
    for (answer, handled) in [
        (EptHandled::Resolved, Handled::Resume),
        (
            EptHandled::Host(Gpa(0xFEE0_0000)),
            Handled::Memory(Gpa(0xFEE0_0000)),
        ),
    ] {
        vm.stage.answer = Some(answer);
        assert_eq!(vm.exit(BasicReason::EptViolation, 0x181), handled);
    }
    // Each entry asks for it anew.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    vm.stage.alone = None;
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.stage.alone, Some(Gpa(ACCESS_PAGE)));
    // With an EPT of L1's it is L1's to map it so.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    let ept = SecondaryControls::ENABLE_EPT.bits();
    let secondary = vm.get12(fields::SECONDARY_CONTROLS);
    vm.set12(fields::SECONDARY_CONTROLS, secondary | u64::from(ept));
    vm.set12(fields::EPT_POINTER, 0x101E);
    vm.stage.alone = None;
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(l2(&vm, fields::EPT_POINTER), COMPOSED_EPTP);
    assert_eq!(vm.stage.alone, None);
    // A stage without such compositions has L2 run on L0's own table.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    vm.set12(fields::SECONDARY_CONTROLS, secondary);
    vm.stage.makes_plain = false;
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(l2(&vm, fields::EPT_POINTER), L0_EPTP);
    assert_eq!(vm.exit(BasicReason::EptViolation, 0x181), Handled::L0);
}

#[test]
fn translations_are_dropped_when_the_access_page_changes() {
    let mut vm = Vm::running();
    let mut enter = |controls, value| {
        let _ = vm.exit(BasicReason::Cpuid, 0);
        vm.nested.take_flush();
        vm.set12(fields::VPID, 7);
        vm.nested.vpid12 = 7;
        vm.ask_for_apic(controls, value);
        assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
        vm.nested.take_flush().contains(Flush::EPT)
    };
    assert!(!enter(SHADOW, 0));
    assert!(enter(SHADOW | ACCESSES, 0));
    assert!(!enter(SHADOW | ACCESSES, 0));
    assert!(enter(SHADOW | ACCESSES, 0x1000));
    assert!(enter(SHADOW, 0x1000));
    assert!(!enter(0, 0));
}

#[test]
fn the_interrupt_status_goes_to_l2_and_comes_back() {
    let mut vm = Vm::ready();
    vm.ask_for_apic(SHADOW | DELIVERY, 0x3141_0000);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert_eq!(l2(&vm, fields::GUEST_INTERRUPT_STATUS), 0x3141);
    assert_eq!(l2(&vm, fields::EOI_EXIT_BITMAP_2), 0x3141_0000);
    for round in 0..4 {
        vm.vmcs
            .l2
            .preset(fields::GUEST_INTERRUPT_STATUS, 0x4100 + round);
        let _ = vm.exit(BasicReason::Cpuid, 0);
        assert_eq!(vm.get12(fields::GUEST_INTERRUPT_STATUS), 0x4100 + round);
        // L1's VMWRITE of it alone leaves everything else as it was.
        let settled = vm.nested.settled.is_some();
        vm.gprs.rbx = 0x51 + round;
        let field = fields::GUEST_INTERRUPT_STATUS.encoding().0;
        assert_eq!(vm.field(Instruction::Vmwrite, field.into()), End::Succeed);
        assert_eq!(vm.nested.settled.is_some(), settled);
        assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
        assert_eq!(
            u64::from(l2(&vm, fields::GUEST_INTERRUPT_STATUS)),
            0x51 + round
        );
    }
    assert!(vm.nested.settled.is_some());
}

#[test]
fn l1_has_the_fields_of_interrupt_delivery_without_an_exit() {
    let mut vm = Vm::ready();
    let cr3 = vm.vmcs.l1.get(fields::GUEST_CR3).unwrap();
    vm.ask_for_apic(SHADOW | DELIVERY, 0x0031_0000);
    vm.vmcs.shadow = Some(FakeVmcs::with_caps(&vm.processor));
    let seen = |vm: &Vm| {
        let shadow = vm.vmcs.shadow.as_ref().unwrap();
        shadow.get(fields::GUEST_INTERRUPT_STATUS)
    };
    let image = vm.nested.vmcs12.image.clone();
    fill(vm.vmcs.shadow.as_mut().unwrap(), &image);
    assert_eq!(vm.pointer(Instruction::Vmclear, REGION.0), End::Succeed);
    // Becoming current fills it.
    vm.vmcs.shadow = Some(FakeVmcs::with_caps(&vm.processor));
    assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
    assert_eq!(seen(&vm), Ok(0x31));
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    vm.vmcs.l2.preset(fields::GUEST_INTERRUPT_STATUS, 0x3141);
    let _ = vm.exit(BasicReason::Cpuid, 0);
    assert_eq!(seen(&vm), Ok(0x3141));
    // What it writes there the next entry loads, and nothing else is done anew.
    vm.nested.settled.as_ref().unwrap();
    let shadow = vm.vmcs.shadow.as_mut().unwrap();
    shadow.set(fields::GUEST_INTERRUPT_STATUS, 0x51).unwrap();
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(l2(&vm, fields::GUEST_INTERRUPT_STATUS), 0x51);
    assert!(vm.nested.settled.is_some());
    let _ = vm.exit(BasicReason::Cpuid, 0);
    assert_eq!(vm.get12(fields::GUEST_INTERRUPT_STATUS), 0x51);
    // Which ends exit, an entry takes from there too, and that is a complete one.
    let bitmap = fields::EOI_EXIT_BITMAP_3;
    write_shadow(&mut vm, bitmap, 0x31);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(l2(&vm, bitmap), 0x31);
    // Without the delivery of interrupts none of it is looked at, until L1's VMCS is saved or goes.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    vm.ask_for_apic(SHADOW, 0);
    for _ in 0..2 {
        assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
        let _ = vm.exit(BasicReason::Cpuid, 0);
    }
    write_shadow(&mut vm, bitmap, 0x41);
    assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.get12(bitmap), 0x31);
    vm.call(|nested, cx| nested.save(cx)).unwrap();
    assert_eq!(vm.get12(bitmap), 0x41);
    let _ = vm.exit(BasicReason::Cpuid, 0);
    write_shadow(&mut vm, bitmap, 0x51);
    vm.vmcs.l1.preset(fields::GUEST_CR3, cr3);
    assert_eq!(vm.pointer(Instruction::Vmclear, REGION.0), End::Succeed);
    vm.vmcs.shadow = Some(FakeVmcs::with_caps(&vm.processor));
    assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
    assert_eq!(vm.vmcs.shadow.as_ref().unwrap().get(bitmap), Ok(0x51));
}

/// A vCPU that was given its state has not seen L1 write anything.
#[test]
fn what_was_restored_is_saved_again_whatever_the_shadow_holds() {
    let mut vm = Vm::ready();
    vm.ask_for_apic(SHADOW | DELIVERY, 0x3141_0000);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    let saved = vm.call(|nested, cx| nested.save(cx)).unwrap();
    let mut other = Vm::new();
    other.vmcs.shadow = Some(FakeVmcs::with_caps(&other.processor));
    other.call(|nested, cx| nested.restore(&saved, cx)).unwrap();
    for _ in 0..2 {
        let again = other.call(|nested, cx| nested.save(cx)).unwrap();
        assert_eq!(again, saved);
    }
    // Its L1 reads there what it wrote elsewhere.
    let _ = other.exit(BasicReason::Cpuid, 0);
    let shadow = other.vmcs.shadow.as_ref().unwrap();
    assert_eq!(shadow.get(fields::EOI_EXIT_BITMAP_2), Ok(0x3141_0000));
}

fn write_shadow<W: testudo_vmx::encoding::Width>(
    vm: &mut Vm,
    field: testudo_vmx::Field<W>,
    value: W::Value,
) {
    let shadow = vm.vmcs.shadow.as_mut().unwrap();
    shadow.set(field, value).unwrap();
}

#[test]
fn a_halt_ends_at_once_by_an_interrupt_that_is_due() {
    const ENABLED: u64 = 0x202;
    let due = |vm: &mut Vm| {
        vm.call(|nested, cx| nested.has_virtual_interrupt(cx))
            .unwrap()
    };
    // (controls, status, task priority, flags): by the classes of the three, and IF.
    for (controls, status, vtpr, rflags, expected) in [
        (SHADOW | DELIVERY, 0x0061, 0x50, ENABLED, true),
        (SHADOW | DELIVERY, 0x0061, 0x50, 2, false),
        (SHADOW | DELIVERY, 0x0061, 0x60, ENABLED, false),
        (SHADOW | DELIVERY, 0x6071, 0x50, ENABLED, true),
        (SHADOW | DELIVERY, 0x7071, 0x50, ENABLED, false),
        (SHADOW | DELIVERY, 0x0000, 0x00, ENABLED, false),
        (SHADOW, 0x0061, 0x50, ENABLED, false),
    ] {
        let mut vm = Vm::ready();
        vm.ask_for_apic(controls, status << 16);
        priority(&vm, vtpr);
        vm.set12(fields::GUEST_RFLAGS, rflags);
        vm.set12(fields::GUEST_ACTIVITY_STATE, 1);
        let halted = !expected;
        let entered = End::Other(Outcome::Entered { halted });
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            entered,
            "{status:#x} {vtpr:#x} {rflags:#x}"
        );
        assert_eq!(due(&mut vm), expected);
        // The shadow of an STI before a HLT is over by then.
        let sti = Interruptibility::BLOCKING_BY_STI.bits();
        vm.vmcs
            .l2
            .preset(fields::GUEST_INTERRUPTIBILITY, sti.into());
        assert_eq!(due(&mut vm), expected);
    }
}

#[test]
fn qualifications_of_the_apics_exits_are_copied() {
    let mut vm = Vm::running();
    for (number, qualification) in [(44, 0x1080), (45, 0x61), (56, 0x300)] {
        if !vm.nested.is_guest() {
            assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
        }
        let _ = vm.exit(BasicReason::Cpuid, 0);
        vm.ask_for_apic(SHADOW | ACCESSES | DELIVERY | 1 << 8, 0);
        vm.set12(fields::EOI_EXIT_BITMAP_1, 1 << (0x61 - 64));
        assert_eq!(vm.run(Instruction::Vmresume), ENTERED);
        let handled = vm.exit(BasicReason::from_number(number), qualification);
        assert!(matches!(handled, Handled::L1(_)));
        assert_eq!(vm.get12(fields::EXIT_REASON), u64::from(number));
        assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), qualification);
    }
}

/// Where the processor reports another event than the virtual interrupt whose delivery an exit interrupted, which Bochs
/// does: the interrupt is lost unless L0 delivers it.
#[test]
fn a_virtual_interrupt_that_meets_an_ept_violation_is_delivered_again() {
    for (misreports, rflags, status, expected) in [
        (true, 0x202, 0x6100, 0x8000_0061),
        (true, 0x202, 0x3100, 0x8000_0B0E),
        (true, 0x002, 0x6100, 0x8000_0B0E),
        (false, 0x202, 0x6100, 0x8000_0B0E),
    ] {
        let mut vm = Vm::ready();
        if misreports {
            vm.nested.defects = testudo_vmx::Defects::MISREPORTS_VIRTUAL_INTERRUPTS;
        }
        vm.ask_for_apic(SHADOW | DELIVERY, 0x3161 << 16);
        let activate = vm.get12(fields::SECONDARY_CONTROLS);
        let ept = u64::from(SecondaryControls::ENABLE_EPT.bits());
        vm.set12(fields::SECONDARY_CONTROLS, activate | ept);
        vm.set12(fields::EPT_POINTER, 0x5000 | 3 << 3 | 6);
        assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
        vm.stage.answer = Some(EptHandled::Resolved);
        vm.vmcs.l2.preset(fields::GUEST_INTERRUPT_STATUS, status);
        vm.vmcs.l2.preset(fields::GUEST_RFLAGS, rflags);
        vm.vmcs
            .l2
            .preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0B0E);
        assert_eq!(vm.exit(BasicReason::EptViolation, 0x181), Handled::Resume);
        assert_eq!(l2(&vm, fields::ENTRY_INTERRUPTION_INFORMATION), expected);
    }
}

const DESCRIPTOR: u64 = 0x7_0000;
const NOTIFICATION: u8 = 0xF2;

/// L2 runs with posted interrupts.
fn with_posting() -> Vm {
    let mut vm = Vm::ready();
    vm.ask_for_apic(SHADOW | DELIVERY, 0x0031_0000);
    let posted = testudo_vmx::controls::PinControls::PROCESS_POSTED_INTERRUPTS;
    let pin = vm.get12(fields::PIN_CONTROLS) | u64::from(posted.bits());
    vm.set12(fields::PIN_CONTROLS, pin);
    let acknowledge = testudo_vmx::controls::ExitControls::ACKNOWLEDGE_INTERRUPT;
    let exit = vm.get12(fields::EXIT_CONTROLS) | u64::from(acknowledge.bits());
    vm.set12(fields::EXIT_CONTROLS, exit);
    vm.set12(
        fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR,
        NOTIFICATION.into(),
    );
    vm.set12(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, DESCRIPTOR);
    vm.set12(fields::GUEST_RFLAGS, 0x202);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    // They are L0's to process: the processor's own notifications are not L1's.
    assert_eq!(l2(&vm, fields::PIN_CONTROLS) & posted.bits(), 0);
    assert_eq!(l2(&vm, fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS), 0);
    vm
}

fn notify(vm: &mut Vm, vector: u8) -> Posted {
    vm.call(|nested, cx| nested.take_notification(vector, cx))
        .unwrap()
}

#[test]
fn what_is_posted_is_requested_by_the_notification_alone() {
    let mut vm = with_posting();
    let words = [0, 1 << 33 | 1, 0, 1 << 63];
    for (index, word) in (0..).zip(words) {
        vm.memory
            .store_u64(Gpa(DESCRIPTOR + 8 * index), word)
            .unwrap();
    }
    // A notification is outstanding, others are suppressed, and there is more behind it.
    vm.memory
        .store_u32(Gpa(DESCRIPTOR + 32), 0xABCD_0003)
        .unwrap();
    vm.memory
        .store_u32(Gpa(VIRTUAL_APIC + 0x230), 1 << 9)
        .unwrap();
    assert_eq!(notify(&mut vm, 0xF1), Posted::No);
    assert_eq!(vm.memory.load_u64(Gpa(DESCRIPTOR + 8)), Ok(1 << 33 | 1));
    assert_eq!(notify(&mut vm, NOTIFICATION), Posted::Taken { due: true });
    let register = |at: u64| vm.memory.load_u32(Gpa(VIRTUAL_APIC + 0x200 + at)).unwrap();
    let requested: Vec<u32> = (0..8).map(|i| register(0x10 * i)).collect();
    assert_eq!(requested, [0, 0, 1, 1 << 9 | 1 << 1, 0, 0, 0, 1 << 31]);
    assert_eq!(l2(&vm, fields::GUEST_INTERRUPT_STATUS), 0x00FF);
    for index in 0..4 {
        assert_eq!(vm.memory.load_u64(Gpa(DESCRIPTOR + 8 * index)), Ok(0));
    }
    assert_eq!(vm.memory.load_u32(Gpa(DESCRIPTOR + 32)), Ok(0xABCD_0002));
    // With nothing posted the highest stays what it was.
    vm.vmcs.l2.preset(fields::GUEST_INTERRUPT_STATUS, 0x6131);
    assert_eq!(notify(&mut vm, NOTIFICATION), Posted::Taken { due: false });
    assert_eq!(l2(&vm, fields::GUEST_INTERRUPT_STATUS), 0x6131);
    // L1 itself gets what is its own.
    let _ = vm.exit(BasicReason::Cpuid, 0);
    assert_eq!(notify(&mut vm, NOTIFICATION), Posted::No);
}

#[test]
fn a_descriptor_outside_memory_posts_nothing() {
    let mut vm = with_posting();
    vm.set12(
        fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
        Memory::SIZE as u64,
    );
    assert_eq!(notify(&mut vm, NOTIFICATION), Posted::Taken { due: true });
    assert_eq!(l2(&vm, fields::GUEST_INTERRUPT_STATUS), 0x0031);
}
