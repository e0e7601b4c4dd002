//! INIT, where the guest is a hypervisor.

use super::*;
use crate::vcpu::InitSignal;

fn sx() -> Event {
    Event::fault_with(Exception::Security, 1)
}

/// With the processor's GIF, the guest's CLGI is no exit: the processor notes it.
fn close_gif(vcpu: &mut Hypervisor) {
    vcpu.will(|vmcb, _| {
        let word = vmcb.virtual_interrupts().remove(VintrFlags::V_GIF);
        vmcb.set_virtual_interrupts(word);
        exit(vmcb, ExitCode::INTR, 0, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
}

/// What the machine's loop does before each entry.
fn asked(vcpu: &mut Hypervisor) -> InitSignal {
    let effect = vcpu.init_signal();
    vcpu.set_nmi_window(false);
    vcpu.set_interrupt_window(None);
    effect
}

#[test]
fn it_waits_while_gif_is_clear() {
    let mut vcpu = hypervisor();
    assert_eq!(asked(&mut vcpu), InitSignal::Resets);
    close_gif(&mut vcpu);
    for _ in 0..2 {
        assert_eq!(asked(&mut vcpu), InitSignal::Waits);
        // STGI is to be heard of, and only then.
        assert!(vcpu.vmcb().intercept_misc2().contains(Misc2::STGI));
    }
    vcpu.will_exit(ExitCode::STGI);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert!(!vcpu.vmcb().intercept_misc2().contains(Misc2::STGI));
    assert_eq!(asked(&mut vcpu), InitSignal::Resets);
    vcpu.reset();
    assert!(!vcpu.is_l2());
}

#[test]
fn it_ends_the_turn_of_l2_and_waits_on_if_l1_intercepts_it() {
    for intercepted in [false, true] {
        let mut vcpu = hypervisor();
        close_gif(&mut vcpu);
        assert_eq!(asked(&mut vcpu), InitSignal::Waits);
        let mut block = vmcb12();
        if intercepted {
            block.set_intercept_misc1(Misc1::INIT);
        }
        vcpu.memory.write_value(VMCB12, &block).unwrap();
        // VMRUN sets GIF: who waited for that is asked again.
        vcpu.will_enter();
        assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
        assert!(vcpu.is_l2());
        if !intercepted {
            assert_eq!(asked(&mut vcpu), InitSignal::Resets);
            continue;
        }
        assert_eq!(asked(&mut vcpu), InitSignal::Waits);
        assert_eq!(ExitCode(vcpu.seen_by_l1().exit_code()), ExitCode::INIT);
        assert!(vcpu.take_interrupted());
        // #VMEXIT has cleared GIF.
        vcpu.will_exit(ExitCode::STGI);
        assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
        assert_eq!(asked(&mut vcpu), InitSignal::Resets);
    }
}

#[test]
fn an_event_that_l1_injects_comes_first() {
    let mut vcpu = hypervisor();
    let mut block = vmcb12();
    block.set_intercept_misc1(Misc1::INIT);
    block.set_event_inj(Event::UD.into());
    vcpu.memory.write_value(VMCB12, &block).unwrap();
    close_gif(&mut vcpu);
    assert_eq!(asked(&mut vcpu), InitSignal::Waits);
    vcpu.will_enter();
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(asked(&mut vcpu), InitSignal::Waits);
    assert_eq!(vcpu.enter_once(), VmExit::DeliveryDue);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), Event::UD.into());
    assert!(vcpu.is_l2());
    assert_eq!(asked(&mut vcpu), InitSignal::Waits);
    assert_eq!(ExitCode(vcpu.seen_by_l1().exit_code()), ExitCode::INIT);
}

#[test]
fn r_init_makes_an_exception_of_it() {
    const R_INIT: u64 = 1 << 1;
    let mut vcpu = hypervisor();
    assert_eq!(vcpu.write_msr(Msr::VM_CR, R_INIT), Some(true));
    // Not before GIF is set.
    close_gif(&mut vcpu);
    assert_eq!(asked(&mut vcpu), InitSignal::Waits);
    vcpu.will_exit(ExitCode::STGI);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(asked(&mut vcpu), InitSignal::Redirected);
    // Another waits until this one is delivered.
    assert_eq!(asked(&mut vcpu), InitSignal::Waits);
    assert_eq!(vcpu.enter_once(), VmExit::DeliveryDue);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), sx().into());
    // L2 gets it, unless L1 wants it.
    for wanted in [false, true] {
        let mut vcpu = Hypervisor::running(|block| {
            if wanted {
                block.set_intercept_exceptions(ExceptionIntercepts::SX);
            }
        });
        assert_eq!(vcpu.write_msr(Msr::VM_CR, R_INIT), Some(true));
        assert_eq!(asked(&mut vcpu), InitSignal::Redirected);
        if wanted {
            let block = vcpu.seen_by_l1();
            assert_eq!((block.exit_code(), block.exit_info1()), (0x5E, 1));
        } else {
            vcpu.run_out();
            assert_eq!(vcpu.last_injected(), sx().into());
        }
    }
}
