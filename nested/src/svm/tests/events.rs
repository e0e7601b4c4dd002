//! Physical events: acceptance in every combination, GIF, and windows.

use super::*;
use proptest::prelude::*;
use testudo_arch::Event;
use testudo_svm::event::RawEvent;

const IF: u64 = 0x200;

/// What acceptance depends on.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "a truth table")]
struct Conditions {
    event: PhysicalEvent,
    l2: bool,
    gif: bool,
    intercepted: bool,
    masking: bool,
    l1_if: bool,
    l2_if: bool,
    shadow: bool,
    injecting: bool,
}

/// A straight reading of APM vol. 2, 15.13, 15.17 and 15.21.1.
fn expected(given: Conditions) -> Acceptance {
    let Conditions {
        event,
        l2,
        gif,
        intercepted,
        masking,
        l1_if,
        l2_if,
        shadow,
        injecting,
    } = given;
    // 15.17: with GIF clear, interrupts, NMI, SMI and INIT are held pending.
    if !gif {
        return Acceptance::Blocked;
    }
    // 15.21.1: the host's IF counts if interrupts are masked virtually, the guest's otherwise.
    let enabled = match (l2, masking) {
        (false, _) | (true, true) => l1_if,
        (true, false) => l2_if,
    };
    if event == PhysicalEvent::Interrupt && !enabled {
        return Acceptance::Blocked;
    }
    // 15.13: intercepted events exit and stay pending.
    if l2 && intercepted {
        return Acceptance::Exit(match event {
            PhysicalEvent::Interrupt => ExitCode::INTR,
            PhysicalEvent::Nmi => ExitCode::NMI,
            PhysicalEvent::Smi => ExitCode::SMI,
            PhysicalEvent::Init => ExitCode::INIT,
        });
    }
    // Delivery waits for the instruction after a shadow and for the event before it; INIT resets.
    if event != PhysicalEvent::Init && (shadow || injecting) {
        return Acceptance::Blocked;
    }
    Acceptance::Deliver
}

proptest! {
    #[test]
    fn acceptance_agrees_with_the_manual(
        which in 0usize..4, l2: bool, gif: bool, intercepted: bool, masking: bool, l1_if: bool,
        l2_if: bool, shadow: bool, injecting: bool, virtual_gif: bool,
    ) {
        use PhysicalEvent as P;
        let event = [P::Interrupt, P::Nmi, P::Smi, P::Init][which];
        let mut caps = full_caps();
        caps.features.set(Features::V_GIF, virtual_gif);
        let mut vm = Vm::new(caps);
        vm.edit12(|v| {
            let bit = [Misc1::INTR, Misc1::NMI, Misc1::SMI, Misc1::INIT][which];
            v.set_intercept_misc1(if intercepted { bit } else { Misc1::empty() });
            let word = VirtualInterrupts::default();
            let flag = VintrFlags::V_INTR_MASKING;
            v.set_virtual_interrupts(if masking { word.insert(flag) } else { word });
        });
        vm.vmcb01.set_rflags(if l1_if { 2 | IF } else { 2 });
        if l2 {
            vm.enter();
            vm.nested.vmcb02_mut().set_rflags(if l2_if { 2 | IF } else { 2 });
        }
        vm.nested.set_gif(gif, &mut vm.vmcb01);
        let runs = if l2 { vm.nested.vmcb02_mut() } else { &mut vm.vmcb01 };
        let state = if shadow { InterruptState::INTERRUPT_SHADOW } else { InterruptState::empty() };
        runs.set_interrupt_state(state);
        runs.set_event_inj(if injecting { RawEvent::from(Event::UD) } else { RawEvent::NONE });
        let given = Conditions { event, l2, gif, intercepted, masking, l1_if, l2_if, shadow, injecting };
        prop_assert_eq!(vm.accepts(event), expected(given));
    }
}

#[test]
fn gif_follows_the_instructions_and_the_transitions() {
    for virtual_gif in [false, true] {
        let mut caps = full_caps();
        caps.features.set(Features::V_GIF, virtual_gif);
        let mut vm = Vm::new(caps);
        assert!(vm.nested.gif(&vm.vmcb01), "after reset");
        assert_eq!(vm.execute(Instruction::Clgi), Outcome::Done);
        assert!(!vm.nested.gif(&vm.vmcb01));
        assert_eq!(vm.execute(Instruction::Stgi), Outcome::GifSet);
        assert!(vm.nested.gif(&vm.vmcb01));
        let _ = vm.execute(Instruction::Clgi);
        vm.enter();
        assert!(vm.nested.gif(&vm.vmcb01), "VMRUN sets GIF");
        // L2's CLGI, which L1 does not intercept, is the processor's.
        assert_eq!(vm.exit(ExitCode::CLGI, 0, 0), Handled::L0);
        assert_eq!(vm.execute(Instruction::Clgi), Outcome::Done);
        assert!(!vm.nested.gif(&vm.vmcb01));
        let _ = vm.execute(Instruction::Stgi);
        vm.exit_to_l1(ExitCode::INTR);
        assert!(!vm.nested.gif(&vm.vmcb01), "#VMEXIT clears it");
        let stgi = vm.vmcb01.intercept_misc2().contains(Misc2::STGI);
        assert_eq!(stgi, !virtual_gif);
    }
}

#[test]
fn the_processor_keeps_gif_only_for_an_l1_with_svm() {
    let mut vm = Vm::full();
    let direct = Misc2::STGI | Misc2::CLGI | Misc2::VMLOAD | Misc2::VMSAVE;
    assert!(!vm.vmcb01.intercept_misc2().intersects(direct));
    let _ = vm.execute(Instruction::Clgi);
    assert!(vm.nested.write_svme(0));
    vm.nested.adjust_vmcb01(&mut vm.vmcb01);
    assert!(vm.vmcb01.intercept_misc2().contains(direct));
    assert!(vm.nested.gif(&vm.vmcb01), "nobody could set it again");
    assert!(vm.vmcb01.virtual_extensions().is_empty());
}

#[test]
fn an_nmi_that_waits_for_gif_sees_stgi() {
    let mut vm = Vm::full();
    let _ = vm.execute(Instruction::Clgi);
    assert_eq!(vm.accepts(PhysicalEvent::Nmi), Acceptance::Blocked);
    vm.nested.set_gif_window(true, &mut vm.vmcb01);
    assert!(vm.vmcb01.intercept_misc2().contains(Misc2::STGI));
    assert_eq!(vm.execute(Instruction::Stgi), Outcome::GifSet);
    vm.nested.set_gif_window(false, &mut vm.vmcb01);
    assert!(!vm.vmcb01.intercept_misc2().contains(Misc2::STGI));
    assert_eq!(vm.accepts(PhysicalEvent::Nmi), Acceptance::Deliver);
}

#[test]
fn l0s_window_hides_l1s_virtual_interrupt_and_gives_it_back() {
    let theirs = VirtualInterrupts::default()
        .insert(VintrFlags::V_IRQ | VintrFlags::V_GIF_ENABLE | VintrFlags::V_GIF)
        .with_vector(0x42)
        .with_priority(4)
        .with_tpr(3);
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_intercept_misc1(Misc1::empty());
        v.set_virtual_interrupts(theirs);
    });
    vm.enter();
    let before = vm.nested.vmcb02().virtual_interrupts();
    vm.nested.set_window(true, &vm.vmcb01);
    let vmcb02 = vm.nested.vmcb02();
    let word = vmcb02.virtual_interrupts();
    assert!(word.contains(VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR));
    // The virtual GIF would hold back what asks for a physical interrupt.
    assert!(!word.contains(VintrFlags::V_GIF_ENABLE) && word.priority() == 0xF);
    assert!(vmcb02.intercept_misc1().contains(Misc1::VINTR));
    assert!(vmcb02.intercept_misc2().contains(Misc2::STGI | Misc2::CLGI));
    // Meanwhile L2's CLGI acts on the virtual GIF that L1 gave it.
    assert_eq!(vm.exit(ExitCode::CLGI, 0, 0), Handled::L0);
    assert_eq!(vm.execute(Instruction::Clgi), Outcome::Done);
    assert_eq!(vm.exit(ExitCode::VINTR, 0, 0), Handled::L0);
    vm.nested.set_window(false, &vm.vmcb01);
    let vmcb02 = vm.nested.vmcb02();
    assert_eq!(
        vmcb02.virtual_interrupts(),
        before.remove(VintrFlags::V_GIF)
    );
    assert!(!vmcb02.intercept_misc1().contains(Misc1::VINTR));
    assert!(!vmcb02.intercept_misc2().contains(Misc2::STGI));

    // An exit to L1 with the window open gives L1 its own word back.
    vm.nested.set_window(true, &vm.vmcb01);
    vm.exit_to_l1(ExitCode::NMI);
    let word = vm.vmcb12().virtual_interrupts();
    assert!(word.contains(VintrFlags::V_IRQ | VintrFlags::V_GIF_ENABLE));
    assert!(!word.contains(VintrFlags::V_IGN_TPR) && word.vector() == 0x42);
    // And the next entry begins without it.
    vm.enter();
    assert!(!vm.nested.vmcb02().intercept_misc1().contains(Misc1::VINTR));
}

#[test]
fn a_virtual_interrupt_ends_a_halt_where_l2_takes_it() {
    let asked = VirtualInterrupts::default()
        .insert(VintrFlags::V_IRQ | VintrFlags::V_INTR_MASKING)
        .with_priority(4)
        .with_tpr(3);
    let takes = |word: VirtualInterrupts, rflags: u64, window: bool| {
        let mut vm = Vm::full();
        vm.edit12(|vmcb12| {
            vmcb12.set_virtual_interrupts(word);
            vmcb12.set_rflags(rflags);
        });
        vm.enter();
        vm.nested.set_window(window, &vm.vmcb01);
        vm.nested.takes_virtual_interrupt()
    };
    let gif = VintrFlags::V_GIF_ENABLE;
    for window in [false, true] {
        assert!(takes(asked, 0x202, window));
        assert!(!takes(asked, 2, window), "IF is clear");
        assert!(!takes(asked.with_tpr(4), 0x202, window), "priority");
        let ignoring = asked.with_tpr(15).insert(VintrFlags::V_IGN_TPR);
        assert!(takes(ignoring, 0x202, window));
        assert!(!takes(asked.remove(VintrFlags::V_IRQ), 0x202, window));
        assert!(!takes(asked.insert(gif), 0x202, window), "V_GIF is clear");
        assert!(takes(asked.insert(gif | VintrFlags::V_GIF), 0x202, window));
    }
    assert!(!Vm::full().nested.takes_virtual_interrupt(), "L1 runs");
}
