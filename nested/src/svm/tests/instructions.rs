//! Every SVM instruction with every condition under which it faults, one at a time (APM vol. 3,
//! chapter 4).

use super::*;
use testudo_arch::Event;

/// A way to make an instruction fault, and the fault.
struct Condition {
    name: &'static str,
    cause: fn(&mut Vm),
    fault: Event,
}

const COMMON: [Condition; 4] = [
    Condition {
        name: "EFER.SVME is clear",
        cause: |vm| assert!(vm.nested.write_svme(0)),
        fault: Event::UD,
    },
    Condition {
        name: "real mode",
        cause: |vm| vm.vmcb01.set_cr0(CR0_ON & !1),
        fault: Event::UD,
    },
    Condition {
        name: "virtual-8086 mode",
        cause: |vm| vm.vmcb01.set_rflags(0x2_0202),
        fault: Event::UD,
    },
    Condition {
        name: "CPL 3",
        cause: |vm| vm.vmcb01.set_cpl(3),
        fault: Event::GP0,
    },
];

/// Of VMRUN, VMLOAD and VMSAVE.
const ADDRESS: [Condition; 4] = [
    Condition {
        name: "not aligned",
        cause: |vm| vm.gprs.rax |= 8,
        fault: Event::GP0,
    },
    Condition {
        name: "beyond the physical-address width",
        cause: |vm| vm.gprs.rax = SvmCaps::ZEN2.physical_limit(),
        fault: Event::GP0,
    },
    Condition {
        name: "all ones",
        cause: |vm| vm.gprs.rax = !0xFFF,
        fault: Event::GP0,
    },
    Condition {
        name: "no memory there",
        cause: |vm| vm.gprs.rax = Memory::SIZE as u64,
        fault: Event::GP0,
    },
];

const HSAVE: Condition = Condition {
    name: "VM_HSAVE_PA was never set",
    cause: |vm| assert_eq!(vm.nested.write_msr(Msr::VM_HSAVE_PA, 0), Some(true)),
    fault: Event::GP0,
};

const READ_ONLY: Condition = Condition {
    name: "a ROM there",
    cause: |vm| vm.memory.read_only_from.set(VMCB12.0),
    fault: Event::GP0,
};

#[test]
fn every_instruction_faults_under_every_condition() {
    use Instruction as I;
    let mut tried = 0;
    for instruction in I::ALL {
        let takes_address = matches!(instruction, I::Vmrun | I::Vmload | I::Vmsave);
        let conditions = COMMON
            .iter()
            .chain(ADDRESS.iter().filter(|_| takes_address))
            .chain(Some(&HSAVE).filter(|_| instruction == I::Vmrun))
            .chain(Some(&READ_ONLY).filter(|_| instruction == I::Vmsave));
        for condition in conditions {
            let mut vm = Vm::full();
            (condition.cause)(&mut vm);
            let before = (vm.vmcb01.clone(), vm.gprs, vm.vmcb12());
            let outcome = vm.execute(instruction);
            // SKINIT is not offered: it is #UD before its privilege level counts.
            let fault = if instruction == I::Skinit {
                Event::UD
            } else {
                condition.fault
            };
            let case = std::format!("{instruction:?}, {}", condition.name);
            assert_eq!(outcome, Outcome::Fault(fault), "{case}");
            assert_eq!(before, (vm.vmcb01.clone(), vm.gprs, vm.vmcb12()), "{case}");
            assert!(!vm.nested.is_guest(), "{case}");
            tried += 1;
        }
    }
    assert_eq!(tried, 7 * COMMON.len() + 3 * ADDRESS.len() + 2);
}

#[test]
fn mode_comes_before_privilege_and_privilege_before_the_operand() {
    let mut vm = Vm::full();
    vm.vmcb01.set_cpl(3);
    vm.gprs.rax = 1;
    assert_eq!(vm.execute(Instruction::Vmload), Outcome::Fault(Event::GP0));
    assert!(vm.nested.write_svme(0));
    assert_eq!(vm.execute(Instruction::Vmload), Outcome::Fault(Event::UD));
}

#[test]
fn without_conditions_each_instruction_completes() {
    for instruction in Instruction::ALL {
        let mut vm = Vm::full();
        vm.vmcb01
            .set_interrupt_state(InterruptState::INTERRUPT_SHADOW);
        let expected = match instruction {
            Instruction::Vmrun => Outcome::Entered,
            Instruction::Stgi => Outcome::GifSet,
            Instruction::Skinit => Outcome::Fault(Event::UD),
            _ => Outcome::Done,
        };
        assert_eq!(vm.execute(instruction), expected, "{instruction:?}");
        if instruction != Instruction::Skinit {
            assert_eq!(vm.vmcb01.rip(), NEXT_RIP, "{instruction:?}");
            assert!(vm.vmcb01.interrupt_state().is_empty(), "{instruction:?}");
        }
    }
}

#[test]
fn an_address_has_32_bits_outside_64_bit_mode() {
    let mut vm = Vm::full();
    let compatibility = VmcbSegment {
        attributes: 0xC9B,
        ..code64()
    };
    vm.vmcb01
        .set_raw_segment(testudo_arch::regs::SegmentRegister::Cs, compatibility);
    vm.gprs.rax = 0xFFFF_FFFF_0000_0000 | VMCB12.0;
    assert_eq!(vm.execute(Instruction::Vmsave), Outcome::Done);
    assert_eq!(vm.vmcb12().star(), vm.vmcb01.star());
}

#[test]
fn vmload_and_vmsave_move_their_registers_and_no_others() {
    let mut vm = Vm::full();
    let before01 = vm.vmcb01.clone();
    let before12 = vm.vmcb12();
    assert_eq!(vm.execute(Instruction::Vmload), Outcome::Done);
    use testudo_arch::regs::SegmentRegister as S;
    let resident = [S::Fs, S::Gs, S::Ldtr, S::Tr];
    for register in resident {
        assert_eq!(
            vm.vmcb01.raw_segment(register),
            before12.raw_segment(register)
        );
    }
    for register in [S::Cs, S::Ss, S::Ds, S::Es] {
        assert_eq!(
            vm.vmcb01.raw_segment(register),
            before01.raw_segment(register)
        );
    }
    let moved = [
        "star",
        "lstar",
        "cstar",
        "sfmask",
        "kernel_gs_base",
        "sysenter_cs",
        "sysenter_esp",
        "sysenter_eip",
    ];
    for field in Vmcb::FIELDS {
        let source = match field.name {
            name if moved.contains(&name) => before12.field(field),
            "rip" => NEXT_RIP,
            _ => before01.field(field),
        };
        assert_eq!(vm.vmcb01.field(field), source, "{}", field.name);
    }
    // And back: into another page, of which only those bytes change.
    let mut vm = Vm::full();
    assert_eq!(vm.execute(Instruction::Vmsave), Outcome::Done);
    for field in Vmcb::FIELDS {
        let source = if moved.contains(&field.name) {
            vm.vmcb01.field(field)
        } else {
            before12.field(field)
        };
        assert_eq!(vm.vmcb12().field(field), source, "{}", field.name);
    }
}

#[test]
fn invlpga_flushes_what_it_names() {
    let mut vm = Vm::full();
    vm.enter();
    let _ = vm.exit(ExitCode::VMMCALL, 0, 0);
    let flushes = vm.stage.flushes;
    vm.exit_to_l1(ExitCode::HLT);
    let mut pool = testudo_svm::asid::AsidPool::new(0, &full_caps());
    let _ = pool.assign(vm.nested.asid_slot());
    assert!(!vm.nested.asid_slot().is_flush_pending());
    vm.gprs.rcx = 6;
    assert_eq!(vm.execute(Instruction::Invlpga), Outcome::Done);
    assert!(!vm.nested.asid_slot().is_flush_pending());
    vm.gprs.rcx = 5;
    assert_eq!(vm.execute(Instruction::Invlpga), Outcome::Done);
    assert!(vm.nested.asid_slot().is_flush_pending() && vm.stage.flushes > flushes);
    assert!(!vm.nested.take_l1_flush());
    vm.gprs.rcx = 0;
    assert_eq!(vm.execute(Instruction::Invlpga), Outcome::Done);
    assert!(vm.nested.take_l1_flush() && !vm.nested.take_l1_flush());
}

#[test]
fn vm_cr_and_vm_hsave_pa_behave_as_the_manual_says() {
    let mut vm = Vm::full();
    let nested = &mut vm.nested;
    assert_eq!(nested.write_msr(Msr::VM_HSAVE_PA, 0x8001), Some(false));
    assert_eq!(nested.write_msr(Msr::VM_HSAVE_PA, 1 << 60), Some(false));
    assert_eq!(nested.read_msr(Msr::VM_HSAVE_PA), Some(0x8000));
    assert_eq!(nested.write_msr(Msr::STAR, 1), None);
    // Reserved bits, and SVMDIS while SVM is on.
    assert_eq!(nested.write_msr(Msr::VM_CR, 1 << 5), Some(false));
    assert_eq!(nested.write_msr(Msr::VM_CR, 0x10), Some(false));
    assert!(nested.write_svme(0));
    assert_eq!(nested.write_msr(Msr::VM_CR, 0x18), Some(true));
    assert!(!nested.write_svme(SVME));
    // Locked: neither LOCK nor SVMDIS changes, R_INIT does.
    assert_eq!(nested.write_msr(Msr::VM_CR, 0x2), Some(true));
    assert_eq!(nested.read_msr(Msr::VM_CR), Some(0x1A));
    assert_eq!(nested.visible_efer(EFER64), EFER64 & !SVME);
}
