//! The preemption timer.

use super::*;
use crate::backend::vmx::timer::{LAG, PIN};

fn count(vcpu: &Fake) -> u32 {
    vcpu.hardware(fields::PREEMPTION_TIMER_VALUE)
}

/// Lets the guest run for an exit that has nothing to do with the timer.
fn pass(vcpu: &mut Fake, ticks: u64) {
    vcpu.will_exit(BasicReason::Cpuid, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    vcpu.advance();
    vcpu.processor.tsc += ticks;
}

#[test]
fn a_turn_ends_at_the_deadline() {
    let mut vcpu = vcpu();
    let shift = vcpu.caps.misc.preemption_timer_shift();
    vcpu.processor.tsc = 1000;
    assert!(vcpu.set_deadline(Some(1000 + (50 << shift) - 1)));
    vcpu.run_out();
    assert_eq!(count(&vcpu), 50, "rounded up");
    vcpu.will_exit(BasicReason::PreemptionTimer, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    // Too early by a tick, and once more by the clock.
    vcpu.processor.tsc = 1000 + (49 << shift);
    vcpu.run_out();
    assert_eq!(count(&vcpu), 1);
    assert_eq!(vcpu.cost(), (1, 1));
    vcpu.processor.tsc = u64::MAX;
    vcpu.will_exit(BasicReason::PreemptionTimer, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    vcpu.run_out();
    assert_eq!(count(&vcpu), 0, "overdue");
    assert!(vcpu.set_deadline(None));
    vcpu.processor.tsc = 0;
    vcpu.run_out();
    assert_eq!(count(&vcpu), u32::MAX);
}

#[test]
fn the_timer_is_behind_the_clock_by_a_few_exits_at_the_most() {
    let mut vcpu = vcpu();
    let shift = vcpu.caps.misc.preemption_timer_shift();
    assert!(vcpu.set_deadline(Some(1000 << shift)));
    pass(&mut vcpu, 0);
    assert_eq!(count(&vcpu), 1000);
    // The processor stores what is left, which here is all: the guest takes no time.
    for entry in 1..LAG {
        pass(&mut vcpu, 10 << shift);
        assert_eq!(count(&vcpu), 1000, "entry {entry}");
        assert_eq!(vcpu.cost().1, 1, "RIP alone is written");
    }
    pass(&mut vcpu, 0);
    assert_eq!(count(&vcpu), 1000 - 10 * (LAG - 1));
    assert_eq!(vcpu.cost(), (3, 2));
}

#[test]
fn without_the_timer_the_host_counts() {
    let mut caps = fixtures::skylake_sp();
    let msr = caps.msr(Msr::VMX_TRUE_PINBASED_CTLS).unwrap();
    let without = msr & !(u64::from(PIN.bits()) << 32);
    caps.pin = testudo_vmx::caps::Allowed::from_msr(without);
    let mut vcpu = vcpu_on(&caps);
    assert!(!vcpu.set_deadline(Some(1)));
    for _ in 0..20 {
        vcpu.run_out();
        assert_eq!(count(&vcpu), 0);
    }
}
