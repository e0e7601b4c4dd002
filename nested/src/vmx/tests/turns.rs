//! L2's turns: L0 has L2 leave by the preemption timer, and L1's timer counts as if it did not.

use core::num::NonZeroU32;

use super::*;
use testudo_vmx::controls::{ExitControls, PinControls};

const TURN: u32 = 100;
const TIMER: PinControls = PinControls::ACTIVATE_PREEMPTION_TIMER;

/// An L1 with a VMCS, whose guests leave for L0 after 100 units; its own timer, if it uses it, has this
/// value.
fn ready(timer: Option<u32>) -> Vm {
    let mut vm = Vm::ready();
    let bitmap = MsrBitmap::all_exit();
    let caps = vm.nested.caps().clone();
    let vmcs12 = vm.nested.vmcs12.image.clone();
    vm.nested = NestedVmx::new(
        caps,
        &vm.processor,
        &bitmap,
        Box::new(MsrBitmap::all_exit()),
        BITMAP_AT,
    )
    .with_turns(NonZeroU32::new(TURN).unwrap());
    assert_eq!(vm.pointer(Instruction::Vmxon, VMXON_REGION.0), End::Succeed);
    assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
    *vm.nested.vmcs12.image = *vmcs12;
    if let Some(value) = timer {
        let pin = vm.get12(fields::PIN_CONTROLS) | u64::from(TIMER.bits());
        vm.set12(fields::PIN_CONTROLS, pin);
        vm.set12(fields::PREEMPTION_TIMER_VALUE, value.into());
    }
    vm
}

fn saves_timer(vm: &mut Vm) {
    let save = ExitControls::SAVE_PREEMPTION_TIMER;
    let exit = vm.get12(fields::EXIT_CONTROLS) | u64::from(save.bits());
    vm.set12(fields::EXIT_CONTROLS, exit);
}

fn enter(vm: &mut Vm, instruction: Instruction) {
    let entered = Outcome::Entered { halted: false };
    assert_eq!(vm.run(instruction), End::Other(entered));
}

/// What the processor is to count.
fn counted(vm: &Vm) -> u32 {
    let pin = vm.vmcs.l2.get(fields::PIN_CONTROLS).unwrap();
    assert!(PinControls::from_bits_retain(pin).contains(TIMER));
    vm.vmcs.l2.get(fields::PREEMPTION_TIMER_VALUE).unwrap()
}

/// The processor's timer expires.
fn expire(vm: &mut Vm) -> Handled {
    vm.vmcs.l2.preset(fields::PREEMPTION_TIMER_VALUE, 0);
    vm.exit(BasicReason::PreemptionTimer, 0)
}

fn leaves(handled: Handled) {
    match handled {
        Handled::L1(barrier) => barrier.ignore(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_turn_ends_for_l0_alone() {
    let mut vm = ready(None);
    enter(&mut vm, Instruction::Vmlaunch);
    assert_eq!(counted(&vm), TURN);
    // Nothing saves the timer, so that the next turn is as long.
    let exit = vm.vmcs.l2.get(fields::EXIT_CONTROLS).unwrap();
    let save = ExitControls::SAVE_PREEMPTION_TIMER.bits();
    assert_eq!(exit & save, 0);
    assert_eq!(vm.exit(BasicReason::PreemptionTimer, 0), Handled::L0);
    assert!(vm.nested.is_guest());
    assert_eq!(counted(&vm), TURN);
}

#[test]
fn l1s_timer_expires_after_as_long_as_it_said() {
    let mut vm = ready(Some(2 * TURN + 30));
    enter(&mut vm, Instruction::Vmlaunch);
    for next in [TURN, 30] {
        assert_eq!(counted(&vm), TURN);
        assert_eq!(expire(&mut vm), Handled::L0);
        assert_eq!(counted(&vm), next);
    }
    leaves(expire(&mut vm));
    let reason = u64::from(BasicReason::PreemptionTimer.number());
    assert_eq!(vm.get12(fields::EXIT_REASON), reason);
    // One that is shorter than a turn is L1's at once, and so is one that has expired before.
    for value in [7, 0] {
        let mut vm = ready(Some(value));
        enter(&mut vm, Instruction::Vmlaunch);
        assert_eq!(counted(&vm), value);
        leaves(expire(&mut vm));
    }
}

#[test]
fn l1_reads_what_is_left_of_its_timer() {
    let mut vm = ready(Some(u32::MAX));
    saves_timer(&mut vm);
    enter(&mut vm, Instruction::Vmlaunch);
    assert_eq!(expire(&mut vm), Handled::L0);
    vm.vmcs.l2.preset(fields::PREEMPTION_TIMER_VALUE, 60);
    leaves(vm.exit(BasicReason::Cpuid, 0));
    let left = u32::MAX - TURN - 40;
    assert_eq!(vm.get12(fields::PREEMPTION_TIMER_VALUE), left.into());
    // It goes on from there.
    enter(&mut vm, Instruction::Vmresume);
    assert_eq!(counted(&vm), TURN);
    vm.vmcs.l2.preset(fields::PREEMPTION_TIMER_VALUE, 1);
    leaves(vm.exit(BasicReason::Cpuid, 0));
    let left = left - (TURN - 1);
    assert_eq!(vm.get12(fields::PREEMPTION_TIMER_VALUE), left.into());
}

#[test]
fn an_exit_that_saves_no_timer_starts_it_anew() {
    let mut vm = ready(Some(TURN + 50));
    enter(&mut vm, Instruction::Vmlaunch);
    assert_eq!(expire(&mut vm), Handled::L0);
    leaves(vm.exit(BasicReason::Cpuid, 0));
    enter(&mut vm, Instruction::Vmresume);
    assert_eq!(counted(&vm), TURN);
    assert_eq!(expire(&mut vm), Handled::L0);
    assert_eq!(counted(&vm), 50);
    // Without a timer of L1's, nothing is left of it.
    leaves(vm.exit(BasicReason::Cpuid, 0));
    let pin = vm.get12(fields::PIN_CONTROLS) & !u64::from(TIMER.bits());
    vm.set12(fields::PIN_CONTROLS, pin);
    enter(&mut vm, Instruction::Vmresume);
    assert_eq!(counted(&vm), TURN);
    assert_eq!(vm.exit(BasicReason::PreemptionTimer, 0), Handled::L0);
    assert_eq!(counted(&vm), TURN);
}
