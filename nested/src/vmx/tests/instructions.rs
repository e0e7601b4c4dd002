//! Every VMX instruction with every condition under which it faults or fails, one at a time
//! (SDM vol. 3C, chapter 33).

use super::*;
use crate::vmx::Fault;
use crate::vmx::Flush;
use testudo_arch::{Event, Exception};
use testudo_vmx::InstructionError as E;

fn ud() -> End {
    End::Fault(Event::UD.into())
}

fn gp() -> End {
    End::Fault(Event::GP0.into())
}

fn fail(error: E) -> End {
    End::Fail(error.number())
}

/// An instruction as it would succeed.
fn well(vm: &mut Vm, instruction: Instruction) -> End {
    use Instruction as I;
    match instruction {
        I::Vmxon => vm.pointer(instruction, VMXON_REGION.0),
        I::Vmclear | I::Vmptrld => vm.pointer(instruction, OTHER.0),
        I::Vmptrst => {
            vm.memory_operand(OPERAND);
            vm.run(instruction)
        }
        I::Vmread | I::Vmwrite => vm.field(instruction, fields::GUEST_RIP.encoding().0.into()),
        I::Invept => vm.invalidate(instruction, 2, [0; 2]),
        I::Invvpid => vm.invalidate(instruction, 2, [0; 2]),
        _ => vm.run(instruction),
    }
}

/// VMX operation as the instruction wants it.
fn vm_for(instruction: Instruction) -> Vm {
    if instruction == Instruction::Vmxon {
        Vm::new()
    } else {
        Vm::ready()
    }
}

#[test]
fn every_instruction_checks_its_mode_and_privilege_first() {
    use Instruction as I;
    type Condition = (&'static str, fn(&mut Vm), fn() -> End);
    let conditions: [Condition; 4] = [
        (
            "real mode",
            |vm| {
                vm.vmcs.l1.preset(fields::GUEST_CR0, 0x20);
            },
            ud,
        ),
        (
            "virtual-8086 mode",
            |vm| {
                vm.vmcs.l1.preset(fields::GUEST_RFLAGS, 0x2_0002);
            },
            ud,
        ),
        (
            "compatibility mode",
            |vm| {
                vm.vmcs.l1.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
            },
            ud,
        ),
        (
            "CPL 3",
            |vm| {
                vm.vmcs.l1.preset(fields::GUEST_SS_ACCESS_RIGHTS, 0xC0F3);
            },
            gp,
        ),
    ];
    for instruction in I::ALL {
        if matches!(instruction, I::Vmcall | I::Vmfunc) {
            continue;
        }
        for (name, cause, expected) in conditions {
            let mut vm = vm_for(instruction);
            cause(&mut vm);
            let rip = vm.vmcs.l1.get(fields::GUEST_RIP).unwrap();
            assert_eq!(
                well(&mut vm, instruction),
                expected(),
                "{instruction:?} in {name}"
            );
            assert_eq!(
                vm.vmcs.l1.get(fields::GUEST_RIP),
                Ok(rip),
                "{instruction:?} in {name}"
            );
        }
    }
}

#[test]
fn outside_vmx_operation_only_vmxon_exists() {
    use Instruction as I;
    for instruction in I::ALL {
        let mut vm = Vm::new();
        let expected = match instruction {
            I::Vmxon => End::Succeed,
            I::Vmcall => End::Other(Outcome::Hypercall),
            _ => ud(),
        };
        assert_eq!(well(&mut vm, instruction), expected, "{instruction:?}");
    }
    // And VMXON not without CR4.VMXE, as L1 sees CR4.
    let mut vm = Vm::new();
    vm.vmcs.l1.preset(fields::CR4_READ_SHADOW, 0);
    assert_eq!(well(&mut vm, I::Vmxon), ud());
    // VMFUNC does not exist in root operation either.
    assert_eq!(Vm::ready().run(I::Vmfunc), ud());
}

#[test]
fn each_instruction_succeeds_and_moves_on() {
    use Instruction as I;
    for instruction in I::ALL {
        if matches!(
            instruction,
            I::Vmcall | I::Vmfunc | I::Vmlaunch | I::Vmresume
        ) {
            continue;
        }
        let mut vm = vm_for(instruction);
        let rip = vm.vmcs.l1.get(fields::GUEST_RIP).unwrap();
        vm.vmcs.l1.preset(fields::GUEST_RFLAGS, 0x8D7);
        assert_eq!(well(&mut vm, instruction), End::Succeed, "{instruction:?}");
        assert_eq!(
            vm.vmcs.l1.get(fields::GUEST_RIP),
            Ok(rip + 4),
            "{instruction:?}"
        );
    }
}

#[test]
fn memory_operands_fault_as_on_the_processor() {
    use Instruction as I;
    let page_fault = |address, code| {
        End::Fault(Fault {
            event: Event::fault_with(Exception::PageFault, code),
            cr2: Some(address),
        })
    };
    for instruction in [
        I::Vmxon,
        I::Vmclear,
        I::Vmptrld,
        I::Vmptrst,
        I::Invept,
        I::Invvpid,
    ] {
        let mut vm = vm_for(instruction);
        vm.gprs.rcx = 2;
        let write = if instruction == I::Vmptrst { 2 } else { 0 };
        // Beyond what L1's tables map.
        vm.memory_operand(0x20_0000);
        if matches!(instruction, I::Invept | I::Invvpid) {
            let information = vm
                .vmcs
                .l1
                .get(fields::EXIT_INSTRUCTION_INFORMATION)
                .unwrap();
            vm.vmcs.l1.preset(
                fields::EXIT_INSTRUCTION_INFORMATION,
                u64::from(information) | 1 << 28,
            );
        }
        assert_eq!(
            vm.run(instruction),
            page_fault(0x20_0000, write),
            "{instruction:?}"
        );
        // The second page of an operand that crosses into it.
        vm.vmcs.l1.preset(fields::EXIT_QUALIFICATION, 0x1F_FFFC);
        assert_eq!(
            vm.run(instruction),
            page_fault(0x20_0000, write),
            "{instruction:?}"
        );
        // Not canonical: #GP(0), through SS #SS(0).
        vm.vmcs.l1.preset(fields::EXIT_QUALIFICATION, 1 << 47);
        assert_eq!(vm.run(instruction), gp(), "{instruction:?}");
        let information = vm
            .vmcs
            .l1
            .get(fields::EXIT_INSTRUCTION_INFORMATION)
            .unwrap();
        let through_ss = u64::from(information) & !(7 << 15) | 2 << 15;
        vm.vmcs
            .l1
            .preset(fields::EXIT_INSTRUCTION_INFORMATION, through_ss);
        let stack = End::Fault(Event::fault_with(Exception::StackFault, 0).into());
        assert_eq!(vm.run(instruction), stack, "{instruction:?}");
    }
}

#[test]
fn vmxon_fails_in_the_manuals_order() {
    let mut vm = Vm::new();
    // CR0.NE is fixed to 1 in VMX operation.
    let cr0 = vm.vmcs.l1.get(fields::GUEST_CR0).unwrap();
    vm.vmcs.l1.preset(fields::CR0_GUEST_HOST_MASK, 0x20);
    assert_eq!(vm.pointer(Instruction::Vmxon, 1), gp());
    vm.vmcs.l1.preset(fields::CR0_READ_SHADOW, cr0);
    for bad in [VMXON_REGION.0 + 8, 1 << 60, Memory::SIZE as u64] {
        assert_eq!(
            vm.pointer(Instruction::Vmxon, bad),
            End::FailInvalid,
            "{bad:#x}"
        );
    }
    for revision in [REVISION + 1, REVISION | 1 << 31] {
        vm.memory.store_u32(VMXON_REGION, revision).unwrap();
        assert_eq!(
            vm.pointer(Instruction::Vmxon, VMXON_REGION.0),
            End::FailInvalid
        );
    }
    vm.memory.store_u32(VMXON_REGION, REVISION).unwrap();
    assert_eq!(vm.pointer(Instruction::Vmxon, VMXON_REGION.0), End::Succeed);
    // In root operation: VMfail(15), which without a current VMCS is VMfailInvalid.
    assert_eq!(
        vm.pointer(Instruction::Vmxon, VMXON_REGION.0),
        End::FailInvalid
    );
    let mut vm = Vm::ready();
    assert_eq!(
        vm.pointer(Instruction::Vmxon, VMXON_REGION.0),
        fail(E::VmxonInRoot)
    );
}

#[test]
fn region_pointers_fail_with_their_numbers() {
    use Instruction as I;
    let cases = [
        (I::Vmclear, E::VmclearInvalidAddress, E::VmclearVmxonPointer),
        (I::Vmptrld, E::VmptrldInvalidAddress, E::VmptrldVmxonPointer),
    ];
    for (instruction, invalid, vmxon) in cases {
        let mut vm = Vm::ready();
        assert_eq!(vm.pointer(instruction, OTHER.0 + 1), fail(invalid));
        assert_eq!(vm.pointer(instruction, 1 << 60), fail(invalid));
        assert_eq!(vm.pointer(instruction, VMXON_REGION.0), fail(vmxon));
        assert_eq!(vm.nested.current_vmcs(), Some(REGION));
    }
    let mut vm = Vm::ready();
    for revision in [REVISION + 1, REVISION | 1 << 31] {
        vm.memory.store_u32(OTHER, revision).unwrap();
        assert_eq!(
            vm.pointer(I::Vmptrld, OTHER.0),
            fail(E::VmptrldWrongRevision)
        );
    }
    assert_eq!(
        vm.pointer(I::Vmptrld, Memory::SIZE as u64),
        fail(E::VmptrldWrongRevision)
    );
}

#[test]
fn fields_fail_with_their_numbers() {
    use Instruction as I;
    for instruction in [I::Vmread, I::Vmwrite] {
        let mut vm = Vm::ready();
        assert_eq!(vm.pointer(I::Vmclear, REGION.0), End::Succeed);
        assert_eq!(vm.field(instruction, 0x681E), End::FailInvalid);
        let mut vm = Vm::ready();
        // No such field; bits beyond the encoding; a field of a feature that is not offered.
        let log = fields::PML_ADDRESS.encoding().0;
        for field in [0x2046, 0x1_0000_681E, 0x8000_681E, log.into()] {
            let end = vm.field(instruction, field);
            assert_eq!(end, fail(E::UnsupportedComponent), "{field:#x}");
        }
    }
    let mut vm = Vm::ready();
    let reason = u64::from(fields::EXIT_REASON.encoding().0);
    assert_eq!(
        vm.field(Instruction::Vmwrite, reason),
        fail(E::ReadOnlyComponent)
    );
    assert_eq!(vm.field(Instruction::Vmread, reason), End::Succeed);
}

#[test]
fn vmread_and_vmwrite_reach_the_whole_field_and_its_high_half() {
    let mut vm = Vm::ready();
    let offset = u64::from(fields::TSC_OFFSET.encoding().0);
    vm.gprs.rbx = 0x1111_2222_3333_4444;
    assert_eq!(vm.field(Instruction::Vmwrite, offset), End::Succeed);
    vm.gprs.rbx = 0;
    assert_eq!(vm.field(Instruction::Vmread, offset | 1), End::Succeed);
    assert_eq!(vm.gprs.rbx, 0x1111_2222);
    // And through memory.
    vm.gprs.rax = offset;
    let information = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27;
    vm.vmcs
        .l1
        .preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
    vm.vmcs.l1.preset(fields::EXIT_QUALIFICATION, OPERAND);
    assert_eq!(vm.run(Instruction::Vmread), End::Succeed);
    assert_eq!(vm.memory.load_u64(Gpa(OPERAND)), Ok(0x1111_2222_3333_4444));
    vm.memory.store_u64(Gpa(OPERAND), 5).unwrap();
    assert_eq!(vm.run(Instruction::Vmwrite), End::Succeed);
    assert_eq!(vm.get12(fields::TSC_OFFSET), 5);
}

#[test]
fn entries_fail_with_their_numbers() {
    use Instruction as I;
    let mut vm = Vm::ready();
    assert_eq!(vm.run(I::Vmresume), fail(E::VmresumeNonLaunched));
    vm.vmcs.l1.preset(fields::GUEST_INTERRUPTIBILITY, 2);
    assert_eq!(vm.run(I::Vmlaunch), fail(E::EventsBlockedByMovSs));
    let mut vm = Vm::ready();
    vm.set12(fields::PIN_CONTROLS, 0);
    assert_eq!(vm.run(I::Vmlaunch), fail(E::InvalidControlField));
    let mut vm = Vm::ready();
    vm.set12(fields::HOST_CR3, 1 << 60);
    assert_eq!(vm.run(I::Vmlaunch), fail(E::InvalidHostState));
    let mut vm = Vm::ready();
    assert_eq!(vm.pointer(I::Vmclear, REGION.0), End::Succeed);
    for instruction in [I::Vmlaunch, I::Vmresume] {
        assert_eq!(vm.run(instruction), End::FailInvalid);
    }
    let mut vm = Vm::running();
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(vm.run(I::Vmlaunch), fail(E::VmlaunchNonClear));
    assert_eq!(
        vm.run(I::Vmresume),
        End::Other(Outcome::Entered { halted: false })
    );
}

#[test]
fn invalidations_check_type_and_descriptor() {
    use Instruction as I;
    let bad = fail(E::InvalidInvalidationOperand);
    let mut vm = Vm::ready();
    for kind in [0, 3, u64::MAX, 1 << 32 | 2] {
        assert_eq!(
            vm.invalidate(I::Invept, kind, [0x1E; 2]),
            bad,
            "type {kind:#x}"
        );
    }
    for eptp in [0x1F, 0x10, 0x5E | 1 << 7, 0x1E | 1 << 60, 0x26] {
        assert_eq!(
            vm.invalidate(I::Invept, 1, [eptp, 0]),
            bad,
            "EPTP {eptp:#x}"
        );
    }
    assert!(vm.stage.flushed.is_empty());
    assert_eq!(vm.invalidate(I::Invept, 1, [0x501E, 0]), End::Succeed);
    assert_eq!(vm.invalidate(I::Invept, 2, [!0, !0]), End::Succeed);
    assert_eq!(vm.stage.flushed, [Some(0x501E), None]);
    assert!(vm.nested.take_flush().contains(Flush::EPT));

    assert_eq!(vm.invalidate(I::Invvpid, 4, [1, 0]), bad);
    for kind in [0, 1, 3] {
        assert_eq!(
            vm.invalidate(I::Invvpid, kind, [0, 0]),
            bad,
            "VPID 0, type {kind}"
        );
        assert_eq!(vm.invalidate(I::Invvpid, kind, [1 << 16 | 1, 0]), bad);
        assert_eq!(vm.invalidate(I::Invvpid, kind, [1, 0x1000]), End::Succeed);
    }
    assert_eq!(vm.invalidate(I::Invvpid, 0, [1, 1 << 47]), bad);
    assert_eq!(vm.invalidate(I::Invvpid, 2, [0, 0]), End::Succeed);
    assert!(vm.nested.take_flush().contains(Flush::VPID));
}

#[test]
fn vmptrst_tells_the_pointer_and_its_absence() {
    let mut vm = Vm::ready();
    vm.memory_operand(OPERAND);
    assert_eq!(vm.run(Instruction::Vmptrst), End::Succeed);
    assert_eq!(vm.memory.load_u64(Gpa(OPERAND)), Ok(REGION.0));
    assert_eq!(vm.pointer(Instruction::Vmclear, REGION.0), End::Succeed);
    assert_eq!(vm.run(Instruction::Vmptrst), End::Succeed);
    assert_eq!(vm.memory.load_u64(Gpa(OPERAND)), Ok(u64::MAX));
}
