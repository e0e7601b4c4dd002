//! Entries and exits, field by field.

use super::*;
use testudo_arch::Event;
use testudo_arch::regs::SegmentRegister as S;
use testudo_svm::event::RawEvent;
use testudo_svm::vmcb::{CleanBits, InterruptState, TlbControl, VirtualExtensions};

#[test]
fn l2_runs_with_its_own_registers_and_comes_back_with_them() {
    let mut vm = Vm::full();
    let vmcb12 = vm.vmcb12();
    let vmcb01 = vm.vmcb01.clone();
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert!(vm.nested.is_guest() && vm.nested.vmcb12_address() == VMCB12);
    for field in [
        "efer", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "rflags", "rip", "cpl", "rsp", "rax",
    ] {
        let field = Vmcb::FIELDS.iter().find(|f| f.name == field).unwrap();
        assert_eq!(vmcb02.field(field), vmcb12.field(field), "{}", field.name);
    }
    assert_eq!((vm.gprs.rax, vm.gprs.rsp), (vmcb12.rax(), vmcb12.rsp()));
    for register in [S::Es, S::Cs, S::Ss, S::Ds] {
        assert_eq!(vmcb02.raw_segment(register), vmcb12.raw_segment(register));
    }
    assert_eq!(
        (vmcb02.gdtr(), vmcb02.idtr()),
        (vmcb12.gdtr(), vmcb12.idtr())
    );
    // VMRUN does not touch what VMLOAD loads: L1's values go on.
    for register in [S::Fs, S::Gs, S::Ldtr, S::Tr] {
        assert_eq!(vmcb02.raw_segment(register), vmcb01.raw_segment(register));
    }
    assert_eq!(vmcb02.star(), vmcb01.star());

    // L2 runs and changes everything.
    set_state(vm.nested.vmcb02_mut(), 7);
    vm.nested.vmcb02_mut().set_cpl(3);
    vm.gprs.rax = 0x777;
    vm.gprs.rsp = 0x888;
    vm.nested
        .vmcb02_mut()
        .set_exit_int_info(RawEvent::from(Event::Interrupt(0x40)));
    vm.nested.vmcb02_mut().set_n_rip(0x9999);
    vm.edit12(|v| v.set_intercept_misc1(Misc1::empty()));
    let left = vm.exit(ExitCode::VMRUN, 0x11, 0x22);
    assert!(matches!(left, Handled::L1(_)));

    let (seen, vmcb02) = (vm.vmcb12(), vm.nested.vmcb02());
    assert_eq!(
        (seen.exit_code(), seen.exit_info1(), seen.exit_info2()),
        (0x80, 0x11, 0x22)
    );
    assert_eq!(seen.exit_int_info(), RawEvent::from(Event::Interrupt(0x40)));
    assert_eq!(
        (seen.rax(), seen.rsp(), seen.n_rip()),
        (0x777, 0x888, 0x9999)
    );
    assert_eq!(seen.cpl(), 3);
    for field in [
        "efer", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "rflags", "rip",
    ] {
        let field = Vmcb::FIELDS.iter().find(|f| f.name == field).unwrap();
        assert_eq!(seen.field(field), vmcb02.field(field), "{}", field.name);
    }
    for register in [S::Es, S::Cs, S::Ss, S::Ds] {
        assert_eq!(seen.raw_segment(register), vmcb02.raw_segment(register));
    }
    // #VMEXIT does not write these; L2's values stay in the processor, which L1 has now.
    for register in [S::Fs, S::Gs, S::Ldtr, S::Tr] {
        assert_eq!(seen.raw_segment(register), vmcb12.raw_segment(register));
        assert_eq!(
            vm.vmcb01.raw_segment(register),
            vmcb02.raw_segment(register)
        );
    }
    assert_eq!(vm.vmcb01.kernel_gs_base(), vmcb02.kernel_gs_base());

    // L1 goes on behind its VMRUN with its own state, as #VMEXIT leaves it.
    assert!(!vm.nested.is_guest());
    let l1 = &vm.vmcb01;
    assert_eq!((vm.gprs.rax, vm.gprs.rsp), (VMCB12.0, 0x5EED));
    assert_eq!((l1.rip(), l1.cpl(), l1.dr7()), (NEXT_RIP, 0, 0x400));
    assert_eq!(
        (l1.cr0(), l1.cr3(), l1.cr4(), l1.efer()),
        (vmcb01.cr0(), vmcb01.cr3(), vmcb01.cr4(), vmcb01.efer())
    );
    for register in [S::Es, S::Cs, S::Ss, S::Ds] {
        assert_eq!(l1.raw_segment(register), vmcb01.raw_segment(register));
    }
    assert!(!vm.nested.gif(l1));
}

#[test]
fn an_exit_touches_no_byte_that_the_processor_would_not() {
    let mut vm = Vm::full();
    let filler = |memory: &Memory, at: Gpa| {
        // Everything that nobody reads, set to a pattern.
        let vmcb12: Vmcb = memory.read_value(at).unwrap();
        let mut bytes: [u8; 4096] = zerocopy::transmute!(vmcb12);
        for gap in [0x018..0x038, 0x0D0..0x400, 0x4A0..0x4C8, 0x700..0x1000] {
            bytes[gap].fill(0xEE);
        }
        memory.write(at, &bytes).unwrap();
        bytes
    };
    let before = filler(&vm.memory, VMCB12);
    vm.enter();
    set_state(vm.nested.vmcb02_mut(), 9);
    let _ = vm.exit(ExitCode::VMRUN, 1, 2);
    let mut after = [0; 4096];
    vm.memory.read(VMCB12, &mut after).unwrap();
    let written = [
        0x060..0x090,
        0x0A8..0x0B0,
        0x0C8..0x0E0,
        0x400..0x440,
        0x460..0x470,
        0x480..0x490,
        0x4CB..0x4CC,
        0x4D0..0x4D8,
        0x548..0x580,
        0x5D8..0x5E0,
        0x5F8..0x600,
        0x640..0x648,
    ];
    for (offset, (old, new)) in before.iter().zip(&after).enumerate() {
        let allowed = written.iter().any(|r| r.contains(&offset));
        assert!(allowed || old == new, "byte {offset:#x}");
    }
}

#[test]
fn controls_are_joined() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_intercept_misc1(Misc1::INTR | Misc1::HLT | Misc1::PAUSE);
        v.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL);
        v.set_pause_filter_count(3000);
        v.set_pause_filter_threshold(128);
        v.set_interrupt_state(InterruptState::from_bits_retain(3));
        v.set_event_inj(RawEvent(
            RawEvent::from(Event::Interrupt(0x33)).0 | 0x7FFF_F000,
        ));
    });
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert_eq!(vmcb02.tsc_offset(), 0x1010);
    assert_eq!(vmcb02.intercepts(), vm.nested.merged_intercepts(&vm.vmcb01));
    assert!(
        vmcb02
            .intercept_misc1()
            .contains(Misc1::CPUID | Misc1::PAUSE | Misc1::IOIO | Misc1::MSR)
    );
    assert!(
        vmcb02
            .intercept_misc2()
            .contains(Misc2::VMMCALL | Misc2::XSETBV)
    );
    assert_eq!(
        (vmcb02.pause_filter_count(), vmcb02.pause_filter_threshold()),
        (3000, 128)
    );
    assert_eq!(vmcb02.interrupt_state(), InterruptState::INTERRUPT_SHADOW);
    assert_eq!(vmcb02.event_inj(), RawEvent::from(Event::Interrupt(0x33)));
    // L1 does not want MSRs and ports of L2: L0's own maps serve.
    assert_eq!(
        (vmcb02.msrpm_base_pa(), vmcb02.iopm_base_pa()),
        (L0_MSRPM, L0_IOPM)
    );
    assert_eq!(vmcb02.n_cr3(), L0_ROOT);
    let word = vmcb02.virtual_interrupts();
    assert!(word.contains(VintrFlags::V_INTR_MASKING) && word.tpr() == 9);
}

#[test]
fn l2s_vmmcall_is_not_a_hypercall_to_l0() {
    let mut vm = Vm::full();
    vm.enter();
    assert!(
        !vm.nested
            .vmcb02()
            .intercept_misc2()
            .contains(Misc2::VMMCALL)
    );
}

#[test]
fn svm_instructions_of_l2_exit_unless_the_processor_virtualizes_them_for_it() {
    let all = Misc2::STGI | Misc2::CLGI | Misc2::VMLOAD | Misc2::VMSAVE;
    let mut vm = Vm::full();
    vm.enter();
    assert!(vm.nested.vmcb02().intercept_misc2().contains(all));
    let mut vm = Vm::full();
    vm.edit12(|v| {
        let word = v
            .virtual_interrupts()
            .insert(VintrFlags::V_GIF_ENABLE | VintrFlags::V_GIF);
        v.set_virtual_interrupts(word);
        v.set_virtual_extensions(VirtualExtensions::VMSAVE_VMLOAD);
    });
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert!(!vmcb02.intercept_misc2().intersects(all));
    assert!(
        vmcb02
            .virtual_interrupts()
            .contains(VintrFlags::V_GIF_ENABLE | VintrFlags::V_GIF)
    );
    assert!(
        vmcb02
            .virtual_extensions()
            .contains(VirtualExtensions::VMSAVE_VMLOAD)
    );
}

#[test]
fn features_that_are_not_offered_do_nothing() {
    // QEMU's emulation without nested paging.
    let bare = SvmCaps {
        features: Features::SVME_ADDR_CHECK,
        ..SvmCaps::ZEN2
    };
    let mut vm = Vm::new(bare);
    vm.edit12(|v| {
        v.set_nested_control(NestedControl::from_bits_retain(0xFF));
        v.set_n_cr3(0x4000);
        v.set_intercept_misc3(testudo_svm::intercept::Misc3::all());
        v.set_virtual_interrupts(VirtualInterrupts(u64::MAX));
        v.set_virtual_extensions(VirtualExtensions::from_bits_retain(u64::MAX));
    });
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert_eq!(vmcb02.intercept_misc3().bits(), 0x1F);
    assert_eq!(vmcb02.nested_control(), NestedControl::NP_ENABLE);
    assert_eq!(vmcb02.n_cr3(), L0_ROOT);
    assert!(vmcb02.virtual_extensions().is_empty() && vm.stage.activated.is_empty());
    let flags = VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR | VintrFlags::V_INTR_MASKING;
    assert_eq!(vmcb02.virtual_interrupts().flags(), flags);
}

#[test]
fn clean_parts_come_from_the_last_exit() {
    let mut vm = Vm::full();
    vm.enter();
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    // L1 changes CR3 and RIP, and says so; and changes CR0 without saying so.
    vm.edit12(|v| {
        v.mark_clean();
        v.set_cr4(CR4_ON | 1 << 20);
        v.set_rip(0x4242);
        let clean = v.clean();
        v.set_dr7(0x455);
        v.set_clean(clean);
    });
    vm.nested.vmcb02_mut().mark_clean();
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert_eq!((vmcb02.cr4(), vmcb02.rip()), (CR4_ON | 1 << 20, 0x4242));
    assert_eq!(vmcb02.dr7(), 0x400 | 2 << 16);
    let clean = vmcb02.clean();
    assert!(!clean.contains(CleanBits::CONTROL_REGISTERS));
    for part in [
        CleanBits::SEGMENTS,
        CleanBits::DESCRIPTOR_TABLES,
        CleanBits::DEBUG_REGISTERS,
        CleanBits::CR2,
        CleanBits::INTERCEPTS,
        CleanBits::PERMISSION_MAPS,
        CleanBits::NESTED_PAGING,
    ] {
        assert!(clean.contains(part), "{part:?}");
    }
    // Another control block: nothing of it is known, whatever its clean bits say.
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    let mut other = vm.vmcb12();
    set_state(&mut other, 5);
    other.mark_clean();
    vm.memory.write_value(Gpa(0x30000), &other).unwrap();
    vm.gprs.rax = 0x30000;
    assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Entered);
    assert_eq!(vm.nested.vmcb02().dr7(), 0x400 | 5 << 16);
    assert_eq!(vm.nested.vmcb02().cr3(), 0x5000);
}

#[test]
fn without_the_clean_feature_the_bits_mean_nothing() {
    let mut vm = Vm::full();
    vm.nested.features -= Features::VMCB_CLEAN;
    vm.enter();
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    vm.edit12(|v| {
        v.set_cr3(0x9000);
        v.mark_clean();
    });
    vm.enter();
    assert_eq!(vm.nested.vmcb02().cr3(), 0x9000);
}

#[test]
fn a_bad_control_block_is_refused_with_nothing_but_the_reason() {
    let mut vm = Vm::full();
    vm.edit12(|v| v.set_asid(0));
    let (before, l1) = (vm.vmcb12(), vm.vmcb01.clone());
    vm.memory.writes.borrow_mut().clear();
    assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Refused);
    assert!(!vm.nested.is_guest() && !vm.nested.gif(&vm.vmcb01));
    let after = vm.vmcb12();
    assert_eq!(after.exit_code(), ExitCode::INVALID.0);
    for field in Vmcb::FIELDS {
        if !["exit_code", "exit_info1", "exit_info2", "exit_int_info"].contains(&field.name) {
            assert_eq!(after.field(field), before.field(field), "{}", field.name);
        }
    }
    assert_eq!((vm.vmcb01.rip(), vm.vmcb01.cr3()), (NEXT_RIP, l1.cr3()));
    assert_eq!(vm.gprs.rax, VMCB12.0);
}

#[test]
fn a_second_stage_without_a_table_refuses_the_entry() {
    let mut vm = Vm::full();
    vm.edit12(|v| v.set_nested_control(NestedControl::NP_ENABLE));
    vm.stage.unavailable = true;
    assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Refused);
    assert_eq!(vm.vmcb12().exit_code(), ExitCode::INVALID.0);
}

#[test]
fn tlb_control_flushes_what_it_says() {
    let mut pool = testudo_svm::asid::AsidPool::new(0, &full_caps());
    for (control, l1, l2) in [
        (TlbControl::DoNothing, false, false),
        (TlbControl::FlushAsid, false, true),
        (TlbControl::FlushAsidNonGlobal, false, true),
        (TlbControl::FlushAll, true, true),
        (TlbControl::Reserved(2), true, true),
    ] {
        let mut vm = Vm::full();
        vm.enter();
        let _ = vm.exit(ExitCode::VMRUN, 0, 0);
        let _ = pool.assign(vm.nested.asid_slot());
        vm.stage.flushes = 0;
        vm.edit12(|v| v.set_tlb_control(control));
        vm.enter();
        assert_eq!(vm.nested.asid_slot().is_flush_pending(), l2, "{control:?}");
        assert_eq!(vm.stage.flushes > 0, l2, "{control:?}");
        assert_eq!(vm.nested.take_l1_flush(), l1, "{control:?}");
        // It is L0's word what the processor flushes, never L1's.
        assert_eq!(vm.nested.vmcb02().tlb_control(), TlbControl::DoNothing);
        assert_eq!(vm.nested.vmcb02().asid(), 0);
    }
}

#[test]
fn events_that_an_exit_interrupted_are_not_lost() {
    let interrupt = RawEvent::from(Event::Interrupt(0x51));
    let software = RawEvent(1 << 31 | 4 << 8 | 0x80);
    // L0 handles the exit: what L1 injected goes in again as it was.
    for event in [interrupt, software] {
        let mut vm = Vm::full();
        vm.edit12(|v| v.set_event_inj(event));
        vm.enter();
        assert_eq!(vm.nested.vmcb02().event_inj(), event);
        vm.nested.vmcb02_mut().set_exit_int_info(event);
        assert_eq!(vm.exit(ExitCode::CPUID, 0, 0), Handled::L0);
        assert_eq!(vm.nested.vmcb02().event_inj(), event);
        // L1 gets the next exit before L2 ran on: it is told of the event.
        vm.exit_to_l1(ExitCode::INTR);
        assert_eq!(vm.vmcb12().exit_int_info(), event);
        assert_eq!((vm.vmcb12().exit_info1(), vm.vmcb12().exit_info2()), (1, 2));
        assert!(!vm.vmcb12().event_inj().is_valid());
    }
    // A software interrupt of L2's own runs again by itself.
    let mut vm = Vm::full();
    vm.enter();
    vm.nested.vmcb02_mut().set_exit_int_info(software);
    assert_eq!(vm.exit(ExitCode::CPUID, 0, 0), Handled::L0);
    assert!(!vm.nested.vmcb02().event_inj().is_valid());
    // Once delivered, an event of the same kind is L2's own.
    let mut vm = Vm::full();
    vm.edit12(|v| v.set_event_inj(software));
    vm.enter();
    assert_eq!(vm.exit(ExitCode::CPUID, 0, 0), Handled::L0);
    vm.nested.vmcb02_mut().set_exit_int_info(software);
    assert_eq!(vm.exit(ExitCode::CPUID, 0, 0), Handled::L0);
    assert!(!vm.nested.vmcb02().event_inj().is_valid());
    // L1 gets the exit itself: EXITINTINFO as the processor wrote it.
    let mut vm = Vm::full();
    vm.enter();
    vm.nested.vmcb02_mut().set_exit_int_info(interrupt);
    assert!(matches!(vm.exit(ExitCode::VMRUN, 0, 0), Handled::L1(_)));
    assert_eq!(vm.vmcb12().exit_int_info(), interrupt);
}

#[test]
fn virtual_interrupts_come_back_as_the_processor_left_them() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        let word = v
            .virtual_interrupts()
            .insert(VintrFlags::V_IRQ)
            .with_vector(0x61)
            .with_priority(6);
        v.set_virtual_interrupts(word);
    });
    vm.enter();
    let live = vm.nested.vmcb02().virtual_interrupts();
    assert!(live.contains(VintrFlags::V_IRQ) && live.vector() == 0x61 && live.priority() == 6);
    // L2 took it and changed its CR8.
    vm.nested
        .vmcb02_mut()
        .set_virtual_interrupts(live.remove(VintrFlags::V_IRQ).with_tpr(4));
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    let word = vm.vmcb12().virtual_interrupts();
    assert!(!word.contains(VintrFlags::V_IRQ) && word.contains(VintrFlags::V_INTR_MASKING));
    assert_eq!((word.tpr(), word.vector()), (4, 0x61));
    assert_eq!(vm.vmcb01.virtual_interrupts().tpr(), 3);
}

#[test]
fn without_masking_l2_has_l1s_task_priority() {
    let mut vm = Vm::full();
    vm.edit12(|v| v.set_virtual_interrupts(VirtualInterrupts::default().with_tpr(9)));
    vm.enter();
    let live = vm.nested.vmcb02().virtual_interrupts();
    assert!(live.contains(VintrFlags::V_INTR_MASKING) && live.tpr() == 3);
    vm.nested
        .vmcb02_mut()
        .set_virtual_interrupts(live.with_tpr(5));
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    assert_eq!(vm.vmcb01.virtual_interrupts().tpr(), 5);
    assert_eq!(vm.vmcb12().virtual_interrupts().tpr(), 9);
    assert!(
        !vm.vmcb12()
            .virtual_interrupts()
            .contains(VintrFlags::V_INTR_MASKING)
    );
}

#[test]
fn last_branch_records_are_l2s_where_l1_virtualizes_them() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_virtual_extensions(VirtualExtensions::LBR);
        v.set_dbg_ctl(1);
        v.set_br_from(0x123);
    });
    vm.enter();
    let vmcb02 = vm.nested.vmcb02_mut();
    assert_eq!((vmcb02.dbg_ctl(), vmcb02.br_from()), (1, 0x123));
    assert!(vmcb02.virtual_extensions().contains(VirtualExtensions::LBR));
    vmcb02.set_br_from(0x456);
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    assert_eq!(vm.vmcb12().br_from(), 0x456);
    assert_eq!(vm.vmcb01.br_from(), 0);
    // And L1's own go on in L2 where it does not.
    let mut vm = Vm::full();
    vm.vmcb01.set_virtual_extensions(VirtualExtensions::LBR);
    vm.vmcb01.set_br_from(0x999);
    vm.enter();
    assert_eq!(vm.nested.vmcb02().br_from(), 0x999);
    vm.nested.vmcb02_mut().set_br_from(0xAAA);
    let _ = vm.exit(ExitCode::VMRUN, 0, 0);
    assert_eq!((vm.vmcb12().br_from(), vm.vmcb01.br_from()), (0, 0xAAA));
}

#[test]
fn an_exit_to_nowhere_still_leaves_l2() {
    let mut vm = Vm::full();
    vm.enter();
    vm.memory.read_only_from.set(0);
    let before = vm.vmcb12();
    assert!(matches!(vm.exit(ExitCode::VMRUN, 0, 0), Handled::L1(_)));
    assert!(!vm.nested.is_guest() && vm.vmcb12() == before);
    assert_eq!(vm.vmcb01.rip(), NEXT_RIP);
}
