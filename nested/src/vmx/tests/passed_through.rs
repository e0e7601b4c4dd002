//! An L0 that leaves its machine to L1: interrupts, HLT, and the mode.

use super::*;
use testudo_vmx::controls::{EntryControls, ExitControls, PinControls};

const EXTERNAL: u32 = PinControls::EXTERNAL_INTERRUPT_EXITING.bits();
const ACKNOWLEDGE: u32 = ExitControls::ACKNOWLEDGE_INTERRUPT.bits();

/// With an L0 that intercepts neither interrupts nor HLT.
fn passing() -> Vm {
    let mut vm = Vm::ready();
    for (field, bits) in [
        (fields::PIN_CONTROLS, EXTERNAL),
        (
            fields::PRIMARY_CONTROLS,
            PrimaryControls::HLT_EXITING.bits(),
        ),
    ] {
        let old = vm.vmcs.l1.get(field).unwrap();
        vm.vmcs.l1.preset(field, u64::from(old & !bits));
    }
    vm
}

fn enter(vm: &mut Vm, instruction: Instruction) -> bool {
    match vm.run(instruction) {
        End::Other(Outcome::Entered { halted }) => halted,
        other => panic!("{other:?}"),
    }
}

#[test]
fn interrupts_that_are_l1s_exit_as_l1_wants() {
    for wanted in [0, EXTERNAL] {
        for acknowledge in [0, ACKNOWLEDGE] {
            let mut vm = passing();
            let pin = vm.get12(fields::PIN_CONTROLS) as u32 & !EXTERNAL | wanted;
            vm.set12(fields::PIN_CONTROLS, pin.into());
            let exit = vm.get12(fields::EXIT_CONTROLS) as u32 & !ACKNOWLEDGE | acknowledge;
            vm.set12(fields::EXIT_CONTROLS, exit.into());
            enter(&mut vm, Instruction::Vmlaunch);
            let pin02 = vm.vmcs.l2.get(fields::PIN_CONTROLS).unwrap();
            assert_eq!(pin02 & EXTERNAL, wanted);
            assert_ne!(pin02 & PinControls::NMI_EXITING.bits(), 0);
            let exit02 = vm.vmcs.l2.get(fields::EXIT_CONTROLS).unwrap();
            assert_eq!(exit02 & ACKNOWLEDGE, acknowledge);
        }
    }
    // Those of an L0 that wants them itself exit whatever L1 says, and L0 acknowledges them its own way.
    let mut vm = Vm::ready();
    let exit = vm.get12(fields::EXIT_CONTROLS) as u32 | ACKNOWLEDGE;
    vm.set12(fields::EXIT_CONTROLS, exit.into());
    let pin = vm.get12(fields::PIN_CONTROLS) as u32 & !EXTERNAL;
    vm.set12(fields::PIN_CONTROLS, pin.into());
    enter(&mut vm, Instruction::Vmlaunch);
    assert_ne!(vm.vmcs.l2.get(fields::PIN_CONTROLS).unwrap() & EXTERNAL, 0);
    assert_eq!(
        vm.vmcs.l2.get(fields::EXIT_CONTROLS).unwrap() & ACKNOWLEDGE,
        vm.vmcs.l1.get(fields::EXIT_CONTROLS).unwrap() & ACKNOWLEDGE
    );
}

#[test]
fn an_exit_from_hlt_says_so_and_l2_waits_again() {
    let mut vm = passing();
    let hlt = PrimaryControls::HLT_EXITING.bits();
    let primary = vm.get12(fields::PRIMARY_CONTROLS) as u32 & !hlt;
    vm.set12(fields::PRIMARY_CONTROLS, primary.into());
    assert!(!enter(&mut vm, Instruction::Vmlaunch));
    vm.vmcs.l2.preset(fields::GUEST_ACTIVITY_STATE, 1);
    let handled = vm.exit_to_l1(BasicReason::ExternalInterrupt, 0x8000_0031);
    assert!(matches!(handled, Handled::L1(_)));
    assert_eq!(vm.get12(fields::GUEST_ACTIVITY_STATE), 1);
    assert!(enter(&mut vm, Instruction::Vmresume));
    // No other state is taken from `vmcs02`.
    vm.vmcs.l2.preset(fields::GUEST_ACTIVITY_STATE, 2);
    vm.exit_to_l1(BasicReason::ExternalInterrupt, 0x8000_0031);
    assert_eq!(vm.get12(fields::GUEST_ACTIVITY_STATE), 0);
}

/// The processor keeps the entry control in step with EFER.LMA at exits; the next entry must not take it to be
/// what the last one wrote.
#[test]
fn a_mode_that_l2_changed_by_itself_can_be_changed_back() {
    let long = EntryControls::IA32E_MODE_GUEST.bits();
    let mut vm = passing();
    enter(&mut vm, Instruction::Vmlaunch);
    let (entry, efer) = (
        vm.vmcs.l2.get(fields::ENTRY_CONTROLS).unwrap(),
        vm.vmcs.l2.get(fields::GUEST_EFER).unwrap(),
    );
    let lma = 1 << 10;
    vm.vmcs
        .l2
        .preset(fields::ENTRY_CONTROLS, (entry ^ long).into());
    vm.vmcs.l2.preset(fields::GUEST_EFER, efer ^ lma);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(
        vm.get12(fields::ENTRY_CONTROLS) as u32 & long,
        (entry ^ long) & long
    );
    // L1 puts it back.
    let theirs = vm.get12(fields::ENTRY_CONTROLS) ^ u64::from(long);
    vm.set12(fields::ENTRY_CONTROLS, theirs);
    vm.set12(fields::GUEST_EFER, efer);
    enter(&mut vm, Instruction::Vmresume);
    assert_eq!(vm.vmcs.l2.get(fields::ENTRY_CONTROLS).unwrap(), entry);
}

#[test]
fn vmcall_without_hypercalls_fails_as_on_a_processor() {
    let refuse = |vm: &mut Vm| {
        let mut cx = Context {
            gprs: &mut vm.gprs,
            vmcs: &mut vm.vmcs,
            memory: &vm.memory,
            second_stage: &mut vm.stage,
            msrs: &mut vm.msrs,
        };
        vm.nested.refuse_vmcall(&mut cx).unwrap()
    };
    let undefined = Outcome::Fault(testudo_arch::Event::UD.into());
    assert_eq!(refuse(&mut Vm::new()), undefined);
    let mut vm = Vm::ready();
    assert_eq!(refuse(&mut vm), Outcome::Done);
    let flags = vm.vmcs.l1.get(fields::GUEST_RFLAGS).unwrap();
    assert_eq!(flags & 0x8D5, 0x40);
    assert_eq!(vm.get12(fields::VM_INSTRUCTION_ERROR), 1);
}
