//! An L0 without EPT: whose a page fault of L2 is, and what L1's processor loads.

use super::transitions::in_pae_paging;
use super::*;
use crate::vmx::PageFaultOf;
use testudo_arch::Exception;
use testudo_vmx::caps::EptVpidCaps;
use testudo_vmx::controls::ExceptionBitmap;

/// A page fault, as interruption information.
const PAGE_FAULT: u64 = 1 << 31 | 1 << 11 | 3 << 8 | 14;
/// The error of a VMfail.
const INVALID_CONTROL: u32 = 7;
/// An external interrupt, vector 33.
const INTERRUPT: u64 = 1 << 31 | 33;

/// An L1 that is offered no EPT, with a VMCS that can be entered, on an L0 without EPT that wants page
/// faults.
fn ready() -> Vm {
    let mut vm = Vm::ready_by(Offer {
        ept: false,
        vpid: true,
        apic: false,
        enlightened: false,
    });
    let secondary = vm.vmcs.l1.get(fields::SECONDARY_CONTROLS).unwrap();
    let ept = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    let secondary = SecondaryControls::from_bits_retain(secondary) - ept;
    vm.vmcs
        .l1
        .preset(fields::SECONDARY_CONTROLS, secondary.bits().into());
    let exceptions = ExceptionBitmap::PAGE_FAULT | ExceptionBitmap::MACHINE_CHECK;
    vm.vmcs
        .l1
        .preset(fields::EXCEPTION_BITMAP, exceptions.bits().into());
    vm
}

fn launch(vm: &mut Vm) {
    let entered = Outcome::Entered { halted: false };
    assert_eq!(vm.run(Instruction::Vmlaunch), End::Other(entered));
}

/// With L2 running, whose page faults L1 wants to see or not.
fn running(wanted: bool) -> Vm {
    let mut vm = ready();
    if wanted {
        let exceptions = ExceptionBitmap::PAGE_FAULT.bits();
        vm.set12(fields::EXCEPTION_BITMAP, exceptions.into());
    }
    launch(&mut vm);
    vm
}

/// The processor reports a write of L2's to 0x5000 that its tables did not map.
fn page_fault(vm: &mut Vm, whose: PageFaultOf, interrupted: u64) -> Handled {
    for (field, value) in [
        (fields::EXIT_REASON.encoding(), 0),
        (fields::EXIT_QUALIFICATION.encoding(), 0x5000),
        (fields::EXIT_INTERRUPTION_INFORMATION.encoding(), PAGE_FAULT),
        (fields::EXIT_INTERRUPTION_ERROR_CODE.encoding(), 2),
        (fields::IDT_VECTORING_INFORMATION.encoding(), interrupted),
        (fields::GUEST_RSP.encoding(), 0x6660),
    ] {
        vm.vmcs.l2.preset(field, value);
    }
    let mut cx = Context {
        gprs: &mut vm.gprs,
        vmcs: &mut vm.vmcs,
        memory: &vm.memory,
        second_stage: &mut vm.stage,
        msrs: &mut vm.msrs,
    };
    vm.nested.exited_by_page_fault(whose, &mut cx).unwrap()
}

#[test]
fn page_faults_all_exit_whatever_l1_asks_for() {
    for wanted in [false, true] {
        let mut vm = ready();
        if wanted {
            vm.set12(fields::EXCEPTION_BITMAP, 1 << 14);
            vm.set12(fields::PAGE_FAULT_ERROR_CODE_MASK, 3);
            vm.set12(fields::PAGE_FAULT_ERROR_CODE_MATCH, 1);
        }
        launch(&mut vm);
        let l2 = &vm.vmcs.l2;
        assert_eq!(l2.get(fields::EXCEPTION_BITMAP).unwrap() & 1 << 14, 1 << 14);
        assert_eq!(l2.get(fields::PAGE_FAULT_ERROR_CODE_MASK), Ok(0));
        assert_eq!(l2.get(fields::PAGE_FAULT_ERROR_CODE_MATCH), Ok(0));
        let secondary = l2.get(fields::SECONDARY_CONTROLS).unwrap();
        let secondary = SecondaryControls::from_bits_retain(secondary);
        assert!(!secondary.contains(SecondaryControls::ENABLE_EPT));
    }
}

#[test]
fn what_l0s_tables_lack_l1_never_sees() {
    let mut vm = running(true);
    let handled = page_fault(&mut vm, PageFaultOf::L0, INTERRUPT);
    assert_eq!(handled, Handled::Resume);
    assert!(vm.nested.is_guest());
    assert_eq!(vm.gprs.rsp, 0x6660);
    // The event whose delivery met the fault goes in again.
    let injected = vm.vmcs.l2.get(fields::ENTRY_INTERRUPTION_INFORMATION);
    assert_eq!(injected, Ok(INTERRUPT as u32));
    assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), 0);
}

#[test]
fn a_fault_of_l2s_own_tables_is_what_l1s_processor_would_tell() {
    let mut vm = running(true);
    // L0's tables lacked the page; L1's have it, read-only.
    let whose = PageFaultOf::L2 {
        address: 0x5008,
        code: 3,
    };
    let Handled::L1(barrier) = page_fault(&mut vm, whose, INTERRUPT) else {
        panic!("L1 asked for page faults");
    };
    barrier.ignore();
    assert!(!vm.nested.is_guest());
    for (field, value) in [
        (fields::EXIT_REASON.encoding(), 0),
        (fields::EXIT_QUALIFICATION.encoding(), 0x5008),
        (fields::EXIT_INTERRUPTION_INFORMATION.encoding(), PAGE_FAULT),
        (fields::EXIT_INTERRUPTION_ERROR_CODE.encoding(), 3),
        (fields::IDT_VECTORING_INFORMATION.encoding(), INTERRUPT),
        (fields::GUEST_RSP.encoding(), 0x6660),
    ] {
        assert_eq!(vm.get12(field), value, "{field}");
    }
}

#[test]
fn a_fault_that_l1_does_not_want_is_l2s() {
    let mut vm = running(false);
    let whose = PageFaultOf::L2 {
        address: 0x5008,
        code: 7,
    };
    assert_eq!(page_fault(&mut vm, whose, INTERRUPT), Handled::L0);
    assert!(vm.nested.is_guest());
    // The backend combines it with what it interrupted.
    let injected = vm.vmcs.l2.get(fields::ENTRY_INTERRUPTION_INFORMATION);
    assert_eq!(injected.unwrap() & 1 << 31, 0);
    // By the mask and the match, L1 may want some.
    let mut vm = ready();
    vm.set12(fields::EXCEPTION_BITMAP, 1 << 14);
    vm.set12(fields::PAGE_FAULT_ERROR_CODE_MASK, 4);
    vm.set12(fields::PAGE_FAULT_ERROR_CODE_MATCH, 4);
    launch(&mut vm);
    let of_supervisor = PageFaultOf::L2 {
        address: 0x5008,
        code: 2,
    };
    assert_eq!(page_fault(&mut vm, of_supervisor, 0), Handled::L0);
    let Handled::L1(barrier) = page_fault(&mut vm, whose, 0) else {
        panic!("L1 asked for those of user accesses");
    };
    barrier.ignore();
}

#[test]
fn exceptions_of_instructions_that_l0_executes_go_by_the_bitmap() {
    let raise = |vm: &mut Vm, exception: Exception, code| {
        let mut cx = Context {
            gprs: &mut vm.gprs,
            vmcs: &mut vm.vmcs,
            memory: &vm.memory,
            second_stage: &mut vm.stage,
            msrs: &mut vm.msrs,
        };
        vm.nested
            .exit_by_exception(exception.vector(), code, None, &mut cx)
            .unwrap()
    };
    let mut vm = ready();
    vm.set12(fields::EXCEPTION_BITMAP, 1 << 13 | 1 << 6);
    launch(&mut vm);
    assert_eq!(raise(&mut vm, Exception::StackFault, Some(0)), None);
    assert_eq!(raise(&mut vm, Exception::PageFault, Some(2)), None);
    assert!(vm.nested.is_guest());
    let Some(Handled::L1(barrier)) = raise(&mut vm, Exception::GeneralProtection, Some(0x18))
    else {
        panic!("L1 asked for it");
    };
    barrier.ignore();
    let information = vm.get12(fields::EXIT_INTERRUPTION_INFORMATION);
    assert_eq!(information, 1 << 31 | 1 << 11 | 3 << 8 | 13);
    assert_eq!(vm.get12(fields::EXIT_INTERRUPTION_ERROR_CODE), 0x18);
    let mut vm = ready();
    vm.set12(fields::EXCEPTION_BITMAP, 1 << 13 | 1 << 6);
    launch(&mut vm);
    let Some(Handled::L1(barrier)) = raise(&mut vm, Exception::InvalidOpcode, None) else {
        panic!("L1 asked for it");
    };
    barrier.ignore();
    let information = vm.get12(fields::EXIT_INTERRUPTION_INFORMATION);
    assert_eq!(information, 1 << 31 | 3 << 8 | 6);
    // L1 itself has no bitmap.
    assert_eq!(raise(&mut vm, Exception::InvalidOpcode, None), None);
}

#[test]
fn without_ept_no_field_takes_page_directory_pointers() {
    let (mut vm, table) = in_pae_paging(ready());
    for vmcs in [&mut vm.vmcs.l1, &mut vm.vmcs.l2] {
        vmcs.preset(fields::GUEST_PDPTE0, 0x77);
    }
    launch(&mut vm);
    assert_eq!(vm.vmcs.l2.get(fields::GUEST_PDPTE0), Ok(0x77));
    let Handled::L1(barrier) = vm.exit(BasicReason::Cpuid, 0) else {
        panic!("CPUID is L1's");
    };
    barrier.ignore();
    assert_eq!(vm.vmcs.l1.get(fields::GUEST_PDPTE0), Ok(0x77));
    // They are checked all the same.
    let (mut vm, _) = in_pae_paging(ready());
    launch(&mut vm);
    vm.memory.store_u64(table, 0x5_0003).unwrap();
    assert_eq!(vm.exit(BasicReason::Cpuid, 0), Handled::Abort);
}

#[test]
fn an_l1_without_ept_cannot_ask_for_it() {
    let mut vm = ready();
    assert!(
        !vm.nested
            .caps()
            .ept_vpid
            .intersects(EptVpidCaps::INVEPT | EptVpidCaps::INVEPT_ALL)
    );
    let primary = vm.get12(fields::PRIMARY_CONTROLS) | 1 << 31;
    vm.set12(fields::PRIMARY_CONTROLS, primary);
    let ept = SecondaryControls::ENABLE_EPT.bits();
    vm.set12(fields::SECONDARY_CONTROLS, ept.into());
    assert_eq!(vm.run(Instruction::Vmlaunch), End::Fail(INVALID_CONTROL));
}
