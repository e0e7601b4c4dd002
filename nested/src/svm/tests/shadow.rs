//! An L0 without nested paging: whose a page fault of L2 is, and what L1's flushes mean.

use super::*;
use crate::svm::PageFaultOf;
use testudo_svm::event::RawEvent;
use testudo_svm::vmcb::TlbControl;

const PAGE_FAULT: ExitCode = ExitCode(0x4E);
/// An external interrupt, vector 33.
const INTERRUPT: RawEvent = RawEvent(1 << 31 | 33);

/// An L1 that is offered no nested paging, on an L0 that intercepts page faults.
fn shadowing() -> Vm {
    shadowing_on(Defects::empty())
}

fn shadowing_on(defects: Defects) -> Vm {
    let caps = SvmCaps {
        features: Features::all() - Features::NP,
        ..full_caps()
    };
    let mut vm = Vm::with_defects(caps, defects);
    vm.vmcb01.set_nested_control(NestedControl::empty());
    let exceptions = vm.vmcb01.intercept_exceptions() | ExceptionIntercepts::PF;
    vm.vmcb01.set_intercept_exceptions(exceptions);
    vm
}

/// The processor reports a write of L2's to 0x5000 that its tables did not map.
fn page_fault(vm: &mut Vm, whose: PageFaultOf) -> Handled {
    let vmcb02 = vm.nested.vmcb02_mut();
    vmcb02.set_exit_code(PAGE_FAULT.0);
    vmcb02.set_exit_info1(2);
    vmcb02.set_exit_info2(0x5000);
    let mut cx = Context {
        gprs: &mut vm.gprs,
        vmcb01: &mut vm.vmcb01,
        memory: &vm.memory,
        second_stage: &mut vm.stage,
    };
    vm.nested.exited_by_page_fault(whose, &mut cx)
}

fn ask_for_page_faults(vm: &Vm) {
    vm.edit12(|vmcb12| vmcb12.set_intercept_exceptions(ExceptionIntercepts::PF));
}

#[test]
fn page_faults_exit_whether_l1_asks_for_them_or_not() {
    for asked in [false, true] {
        let mut vm = shadowing();
        if asked {
            ask_for_page_faults(&vm);
        }
        vm.enter();
        let exceptions = vm.nested.vmcb02().intercept_exceptions();
        assert!(exceptions.contains(ExceptionIntercepts::PF));
    }
}

#[test]
fn what_l0s_tables_lack_l1_never_sees() {
    let mut vm = shadowing();
    ask_for_page_faults(&vm);
    vm.edit12(|vmcb12| vmcb12.set_event_inj(INTERRUPT));
    vm.enter();
    let before = vm.vmcb12();
    vm.nested.vmcb02_mut().set_exit_int_info(INTERRUPT);
    assert_eq!(page_fault(&mut vm, PageFaultOf::L0), Handled::Resume);
    assert!(vm.nested.is_guest());
    // The event whose delivery met the fault goes in again.
    assert_eq!(vm.nested.vmcb02().event_inj(), INTERRUPT);
    assert_eq!(vm.vmcb12().exit_code(), before.exit_code());
}

#[test]
fn a_fault_of_l2s_own_tables_is_what_l1s_processor_would_tell() {
    let mut vm = shadowing();
    ask_for_page_faults(&vm);
    vm.enter();
    let cr2 = vm.nested.vmcb02().cr2();
    vm.nested.vmcb02_mut().set_exit_int_info(INTERRUPT);
    // L0's tables lacked the page; L1's have it, read-only.
    let whose = PageFaultOf::L2 {
        address: 0x5008,
        code: 3,
    };
    let Handled::L1(barrier) = page_fault(&mut vm, whose) else {
        panic!("L1 asked for page faults");
    };
    barrier.ignore();
    assert!(!vm.nested.is_guest());
    let vmcb12 = vm.vmcb12();
    assert_eq!(vmcb12.exit_code(), PAGE_FAULT.0);
    assert_eq!((vmcb12.exit_info1(), vmcb12.exit_info2()), (3, 0x5008));
    assert_eq!(vmcb12.exit_int_info(), INTERRUPT);
    assert_eq!(vmcb12.cr2(), cr2);
}

#[test]
fn a_fault_that_l1_does_not_want_is_l2s() {
    let mut vm = shadowing();
    vm.enter();
    let whose = PageFaultOf::L2 {
        address: 0x5008,
        code: 7,
    };
    assert_eq!(page_fault(&mut vm, whose), Handled::L0);
    assert!(vm.nested.is_guest());
    let vmcb02 = vm.nested.vmcb02();
    assert_eq!((vmcb02.exit_info1(), vmcb02.exit_info2()), (7, 0x5008));
}

#[test]
fn every_way_to_flush_is_told() {
    let mut vm = shadowing();
    vm.enter();
    assert!(vm.nested.take_l2_flush(), "a new ASID");
    vm.exit_to_l1(ExitCode::INTR);
    vm.enter();
    assert!(!vm.nested.take_l2_flush(), "nothing was flushed");
    for control in [
        TlbControl::FlushAsid,
        TlbControl::FlushAsidNonGlobal,
        TlbControl::FlushAll,
    ] {
        vm.exit_to_l1(ExitCode::INTR);
        vm.edit12(|vmcb12| vmcb12.set_tlb_control(control));
        vm.enter();
        assert!(vm.nested.take_l2_flush(), "{control:?}");
    }
    vm.exit_to_l1(ExitCode::INTR);
    vm.gprs.rcx = 5;
    assert_eq!(vm.execute(Instruction::Invlpga), Outcome::Done);
    assert!(vm.nested.take_l2_flush(), "INVLPGA");
    vm.gprs.rcx = 0;
    assert_eq!(vm.execute(Instruction::Invlpga), Outcome::Done);
    assert!(!vm.nested.take_l2_flush(), "INVLPGA of L1's own");
    assert!(vm.nested.take_l1_flush());
}

#[test]
fn without_nested_paging_page_directory_pointers_are_checked() {
    let pae = |vm: &Vm| {
        vm.edit12(|vmcb12| {
            vmcb12.set_efer(SVME);
            vmcb12.set_cr3(0x9000);
        });
    };
    let mut vm = shadowing();
    pae(&vm);
    vm.memory.store_u64(Gpa(0x9008), 0xA001).unwrap();
    vm.enter();
    for reserved in [2, 4, 1 << 5, 1 << 52, 1 << 63] {
        let mut vm = shadowing();
        pae(&vm);
        vm.memory.store_u64(Gpa(0x9008), 0xA001 | reserved).unwrap();
        vm.gprs.rax = VMCB12.0;
        assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Refused);
        assert_eq!(vm.vmcb12().exit_code(), ExitCode::INVALID.0);
    }
    // L2 ran on QEMU with this table before, so its walks have marked the entry.
    let mut vm = shadowing_on(Defects::MARKS_PDPES);
    pae(&vm);
    vm.memory.store_u64(Gpa(0x9008), 0xA001 | 1 << 5).unwrap();
    vm.enter();
}
