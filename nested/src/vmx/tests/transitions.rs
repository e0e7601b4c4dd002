//! Entries and exits, field by field; and failures of other hypervisors that must not be ours.

use super::*;
use crate::svm::PhysicalEvent;
use crate::vmx::Acceptance;
use crate::vmx::Flush;
use testudo_vmx::controls::{EntryControls, ExitControls, PinControls};
use testudo_vmx::encoding::Area;
use testudo_vmx::structures::MsrEntry;

fn l1(vm: &Vm, field: impl Into<Encoding>) -> u64 {
    vm.vmcs.l1.image().read_raw(field.into()).unwrap()
}

fn l2(vm: &Vm, field: impl Into<Encoding>) -> u64 {
    vm.vmcs.l2.image().read_raw(field.into()).unwrap()
}

fn or12(vm: &mut Vm, field: impl Into<Encoding>, bits: u32) {
    let field = field.into();
    let old = vm.get12(field);
    vm.set12(field, old | u64::from(bits));
}

#[test]
fn l2_gets_its_state_and_l1_gets_it_back() {
    let mut vm = Vm::ready();
    vm.set12(fields::GUEST_RIP, 0x1111);
    vm.set12(fields::GUEST_RSP, 0x2222);
    vm.set12(fields::GUEST_FS_BASE, 0x3333);
    vm.set12(fields::GUEST_SYSENTER_EIP, 0x4444);
    or12(&mut vm, fields::PRIMARY_CONTROLS, 8);
    vm.set12(fields::TSC_OFFSET, 0x10);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::GUEST_RIP), 0x1111);
    assert_eq!(l2(&vm, fields::GUEST_FS_BASE), 0x3333);
    assert_eq!(l2(&vm, fields::TSC_OFFSET), 0x1010);
    assert_eq!(l2(&vm, fields::EPT_POINTER), L0_EPTP);
    assert_eq!(l2(&vm, fields::VMCS_LINK_POINTER), u64::MAX);

    vm.vmcs.l2.preset(fields::GUEST_RIP, 0x5555);
    vm.vmcs.l2.preset(fields::GUEST_GS_BASE, 0x6666);
    vm.vmcs.l2.preset(fields::GUEST_INTERRUPTIBILITY, 1);
    vm.vmcs.l2.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
    vm.vmcs
        .l2
        .preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0031);
    vm.vmcs
        .l2
        .preset(fields::EXIT_INSTRUCTION_INFORMATION, 0x77);
    vm.vmcs.l2.preset(fields::GUEST_LINEAR_ADDRESS, 0x88);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0x99), Handled::L1(_)));
    for (field, value) in [
        (fields::GUEST_RIP.encoding(), 0x5555),
        (fields::GUEST_GS_BASE.encoding(), 0x6666),
        (fields::GUEST_INTERRUPTIBILITY.encoding(), 1),
        (fields::EXIT_REASON.encoding(), 10),
        (fields::EXIT_QUALIFICATION.encoding(), 0x99),
        (fields::EXIT_INSTRUCTION_LENGTH.encoding(), 2),
        (fields::IDT_VECTORING_INFORMATION.encoding(), 0x8000_0031),
        (fields::EXIT_INSTRUCTION_INFORMATION.encoding(), 0x77),
        (fields::GUEST_LINEAR_ADDRESS.encoding(), 0x88),
    ] {
        assert_eq!(vm.get12(field), value, "{field}");
    }
}

#[test]
fn l1_goes_on_with_its_host_state() {
    let mut vm = Vm::ready();
    for (field, value) in [
        (fields::HOST_RIP.encoding(), 0xFFFF_8000_0000_1000),
        (fields::HOST_RSP.encoding(), 0xFFFF_8000_0000_2000),
        (fields::HOST_CR3.encoding(), 0x5000),
        (fields::HOST_FS_BASE.encoding(), 0x111),
        (fields::HOST_GS_BASE.encoding(), 0x222),
        (fields::HOST_TR_BASE.encoding(), 0x333),
        (fields::HOST_GDTR_BASE.encoding(), 0x444),
        (fields::HOST_IDTR_BASE.encoding(), 0x555),
        (fields::HOST_SYSENTER_EIP.encoding(), 0x666),
        (fields::HOST_DS_SELECTOR.encoding(), 0x20),
    ] {
        vm.set12(field, value);
    }
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    vm.vmcs.l1.preset(fields::GUEST_RFLAGS, 0xFFFF);
    vm.vmcs.l1.preset(fields::GUEST_DR7, 0x455);
    assert!(matches!(vm.exit(BasicReason::Hlt, 0), Handled::L0));
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    for (field, value) in [
        (fields::GUEST_RIP.encoding(), 0xFFFF_8000_0000_1000),
        (fields::GUEST_RSP.encoding(), 0xFFFF_8000_0000_2000),
        (fields::GUEST_CR3.encoding(), 0x5000),
        (fields::GUEST_FS_BASE.encoding(), 0x111),
        (fields::GUEST_GS_BASE.encoding(), 0x222),
        (fields::GUEST_TR_BASE.encoding(), 0x333),
        (fields::GUEST_TR_LIMIT.encoding(), 0x67),
        (fields::GUEST_GDTR_BASE.encoding(), 0x444),
        (fields::GUEST_GDTR_LIMIT.encoding(), 0xFFFF),
        (fields::GUEST_IDTR_BASE.encoding(), 0x555),
        (fields::GUEST_SYSENTER_EIP.encoding(), 0x666),
        (fields::GUEST_RFLAGS.encoding(), 2),
        (fields::GUEST_DR7.encoding(), 0x400),
        (fields::GUEST_CS_ACCESS_RIGHTS.encoding(), 0xA09B),
        (fields::GUEST_DS_ACCESS_RIGHTS.encoding(), 0xC093),
        (fields::GUEST_ES_ACCESS_RIGHTS.encoding(), 0x1_C093),
        (fields::GUEST_LDTR_ACCESS_RIGHTS.encoding(), 1 << 16),
        (fields::GUEST_INTERRUPTIBILITY.encoding(), 0),
    ] {
        assert_eq!(l1(&vm, field), value, "{field}");
    }
    assert_eq!(vm.gprs.rsp, 0xFFFF_8000_0000_2000);
}

#[test]
fn control_registers_are_shown_as_their_owners_say() {
    let mut vm = Vm::ready();
    let cr0 = vm.get12(fields::GUEST_CR0);
    let cr4 = vm.get12(fields::GUEST_CR4);
    // L1 owns TS, and shows it set while it is clear; L0 owns VMXE.
    vm.set12(fields::CR0_GUEST_HOST_MASK, 8);
    vm.set12(fields::CR0_READ_SHADOW, 8);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::CR0_GUEST_HOST_MASK), 8);
    assert_eq!(l2(&vm, fields::CR0_READ_SHADOW), cr0 | 8);
    assert_eq!(l2(&vm, fields::CR4_GUEST_HOST_MASK), 1 << 13);
    assert_eq!(l2(&vm, fields::CR4_READ_SHADOW), cr4);
    // L2 sets MP by itself; L0 emulates a write of VMXE for it, into the shadow.
    vm.vmcs.l2.preset(fields::GUEST_CR0, cr0 | 2);
    vm.vmcs.l2.preset(fields::CR4_READ_SHADOW, cr4 & !(1 << 13));
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(vm.get12(fields::GUEST_CR0), cr0 | 2);
    assert_eq!(vm.get12(fields::GUEST_CR4), cr4 & !(1 << 13));
}

#[test]
fn entries_that_fail_late_are_exits() {
    let mut vm = Vm::ready();
    vm.set12(fields::GUEST_RFLAGS, 0);
    vm.set12(fields::HOST_RIP, 0x1234);
    vm.set12(fields::EXIT_INSTRUCTION_LENGTH, 0x42);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::FailedEntry)
    );
    assert_eq!(vm.get12(fields::EXIT_REASON), 1 << 31 | 33);
    assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), 0);
    assert_eq!(
        vm.get12(fields::EXIT_INSTRUCTION_LENGTH),
        0x42,
        "not a field of this exit"
    );
    assert_eq!(l1(&vm, fields::GUEST_RIP), 0x1234);
    assert!(!vm.nested.is_guest());
    // It was not launched.
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    vm.set12(fields::GUEST_RFLAGS, 2);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
}

fn area(vm: &Vm, at: u64, entries: &[MsrEntry]) {
    for (index, entry) in (0..).zip(entries) {
        vm.memory
            .write(Gpa(at + 16 * index), &entry.to_bytes())
            .unwrap();
    }
}

#[test]
fn msr_areas_are_loaded_and_stored() {
    let mut vm = Vm::ready();
    vm.msrs.0.extend([(0xC000_0082, 1), (0xC000_0081, 2)]);
    area(
        &vm,
        0x20000,
        &[
            MsrEntry::new(Msr::LSTAR, 0x111),
            MsrEntry::new(Msr::SYSENTER_ESP, 0x222),
        ],
    );
    area(
        &vm,
        0x21000,
        &[
            MsrEntry::new(Msr::LSTAR, 0),
            MsrEntry::new(Msr::SYSENTER_ESP, 0),
        ],
    );
    area(&vm, 0x22000, &[MsrEntry::new(Msr::LSTAR, 0x333)]);
    for (count, address, n, at) in [
        (
            fields::ENTRY_MSR_LOAD_COUNT,
            fields::ENTRY_MSR_LOAD_ADDRESS,
            2,
            0x20000,
        ),
        (
            fields::EXIT_MSR_STORE_COUNT,
            fields::EXIT_MSR_STORE_ADDRESS,
            2,
            0x21000,
        ),
        (
            fields::EXIT_MSR_LOAD_COUNT,
            fields::EXIT_MSR_LOAD_ADDRESS,
            1,
            0x22000,
        ),
    ] {
        vm.set12(count, n);
        vm.set12(address, at);
    }
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(vm.msrs.0[&0xC000_0082], 0x111);
    assert_eq!(l2(&vm, fields::GUEST_SYSENTER_ESP), 0x222);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(vm.memory.load_u64(Gpa(0x21008)), Ok(0x111));
    assert_eq!(vm.memory.load_u64(Gpa(0x21018)), Ok(0x222));
    assert_eq!(vm.msrs.0[&0xC000_0082], 0x333);
}

#[test]
fn bad_msr_areas_fail_the_entry_or_abort() {
    // The second entry is FS base, which entries refuse (29.4).
    for bad in [
        MsrEntry::new(Msr::FS_BASE, 0),
        MsrEntry::new(Msr(0x9999), 0),
    ] {
        let mut vm = Vm::ready();
        vm.msrs.0.insert(0xC000_0082, 1);
        area(&vm, 0x20000, &[MsrEntry::new(Msr::LSTAR, 5), bad]);
        vm.set12(fields::ENTRY_MSR_LOAD_COUNT, 2);
        vm.set12(fields::ENTRY_MSR_LOAD_ADDRESS, 0x20000);
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::FailedEntry)
        );
        assert_eq!(vm.get12(fields::EXIT_REASON), 1 << 31 | 34);
        assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), 2);
    }
    for (count, address, indicator) in [
        (
            fields::EXIT_MSR_STORE_COUNT,
            fields::EXIT_MSR_STORE_ADDRESS,
            1,
        ),
        (
            fields::EXIT_MSR_LOAD_COUNT,
            fields::EXIT_MSR_LOAD_ADDRESS,
            4,
        ),
    ] {
        let mut vm = Vm::ready();
        area(&vm, 0x20000, &[MsrEntry::new(Msr(0x9999), 0)]);
        vm.set12(count, 1);
        vm.set12(address, 0x20000);
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::Entered { halted: false })
        );
        assert_eq!(vm.exit(BasicReason::Cpuid, 0), Handled::Abort);
        assert_eq!(vm.memory.load_u32(REGION.wrapping_add(4)), Ok(indicator));
    }
}

#[test]
fn events_on_their_way_are_not_lost() {
    let mut vm = Vm::ready();
    vm.set12(fields::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0B0E);
    vm.set12(fields::ENTRY_EXCEPTION_ERROR_CODE, 4);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::ENTRY_INTERRUPTION_INFORMATION), 0x8000_0B0E);
    // An interrupt comes before L2 ran: L1 is told of both.
    assert!(matches!(
        vm.exit_to_l1(BasicReason::ExternalInterrupt, 0x8000_0033),
        Handled::L1(_)
    ));
    assert_eq!(vm.get12(fields::EXIT_INTERRUPTION_INFORMATION), 0x8000_0033);
    assert_eq!(vm.get12(fields::IDT_VECTORING_INFORMATION), 0x8000_0B0E);
    assert_eq!(vm.get12(fields::IDT_VECTORING_ERROR_CODE), 4);
    assert_eq!(vm.get12(fields::ENTRY_INTERRUPTION_INFORMATION), 0x0B0E);

    // An EPT violation of L0's table interrupted a delivery: the event goes in again.
    let mut vm = Vm::running();
    vm.vmcs.l2.preset(fields::ENTRY_INTERRUPTION_INFORMATION, 0);
    vm.vmcs
        .l2
        .preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0055);
    assert_eq!(vm.exit(BasicReason::EptViolation, 0), Handled::L0);
    assert_eq!(l2(&vm, fields::ENTRY_INTERRUPTION_INFORMATION), 0x8000_0055);
}

#[test]
fn the_second_stage_decides_what_l1_sees() {
    for (answer, reason) in [
        (EptHandled::Resolved, None),
        (EptHandled::Host(Gpa(0xFEC0_0000)), None),
        (EptHandled::Violation(0x1AA), Some(48)),
        (EptHandled::Misconfiguration, Some(49)),
    ] {
        let mut vm = Vm::ready();
        let caps = vm.nested.caps().clone();
        let mut image = (*vm.nested.vmcs12.image).clone();
        assert!(samples::enable_ept(&mut image, &caps).unwrap());
        *vm.nested.vmcs12.image = image;
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::Entered { halted: false })
        );
        assert_eq!(l2(&vm, fields::EPT_POINTER), COMPOSED_EPTP);
        vm.stage.answer = Some(answer);
        vm.vmcs.l2.preset(fields::GUEST_PHYSICAL_ADDRESS, 0x4321);
        let handled = vm.exit(BasicReason::EptViolation, 0x81);
        match (answer, reason) {
            (EptHandled::Resolved, _) => assert_eq!(handled, Handled::Resume),
            (EptHandled::Host(gpa), _) => assert_eq!(handled, Handled::Memory(gpa)),
            (_, Some(reason)) => {
                assert!(matches!(handled, Handled::L1(_)));
                assert_eq!(vm.get12(fields::EXIT_REASON), reason);
                assert_eq!(vm.get12(fields::GUEST_PHYSICAL_ADDRESS), 0x4321);
            }
            _ => unreachable!("both are above"),
        }
    }
}

#[test]
fn physical_events_go_where_l1_says() {
    let mut vm = Vm::running();
    let accept = |vm: &mut Vm, event| vm.nested.acceptance(event, &mut vm.vmcs).unwrap();
    vm.vmcs.l2.preset(fields::GUEST_RFLAGS, 0x202);
    // Without exiting, an interrupt is L2's when it can take it.
    assert_eq!(
        accept(&mut vm, PhysicalEvent::Interrupt),
        Acceptance::Deliver
    );
    vm.vmcs.l2.preset(fields::GUEST_RFLAGS, 2);
    assert_eq!(
        accept(&mut vm, PhysicalEvent::Interrupt),
        Acceptance::Blocked
    );
    vm.nested.set_window(true, &mut vm.vmcs).unwrap();
    assert_eq!(l2(&vm, fields::PRIMARY_CONTROLS) & 4, 4);
    assert_eq!(vm.exit(BasicReason::InterruptWindow, 0), Handled::L0);
    vm.nested.set_window(false, &mut vm.vmcs).unwrap();
    assert_eq!(l2(&vm, fields::PRIMARY_CONTROLS) & 4, 0);

    let mut vm = Vm::ready();
    or12(&mut vm, fields::PIN_CONTROLS, 9);
    or12(
        &mut vm,
        fields::EXIT_CONTROLS,
        ExitControls::ACKNOWLEDGE_INTERRUPT.bits(),
    );
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    // With it, whatever IF and the shadow say.
    vm.vmcs.l2.preset(fields::GUEST_RFLAGS, 2);
    vm.vmcs.l2.preset(fields::GUEST_INTERRUPTIBILITY, 1);
    let exit = Acceptance::Exit {
        reason: BasicReason::ExternalInterrupt,
        acknowledge: true,
    };
    assert_eq!(accept(&mut vm, PhysicalEvent::Interrupt), exit);
    let exit = Acceptance::Exit {
        reason: BasicReason::ExceptionOrNmi,
        acknowledge: false,
    };
    assert_eq!(accept(&mut vm, PhysicalEvent::Nmi), exit);
    let exit = Acceptance::Exit {
        reason: BasicReason::Init,
        acknowledge: false,
    };
    assert_eq!(accept(&mut vm, PhysicalEvent::Init), exit);
    // An NMI exit leaves L1 with NMIs blocked; in root operation INIT is blocked.
    assert!(matches!(
        vm.exit_to_l1(BasicReason::ExceptionOrNmi, 0x8000_0202),
        Handled::L1(_)
    ));
    assert_eq!(l1(&vm, fields::GUEST_INTERRUPTIBILITY), 8);
    assert_eq!(accept(&mut vm, PhysicalEvent::Init), Acceptance::Blocked);
}

#[test]
fn without_vpid_nothing_cached_survives() {
    let mut vm = Vm::running();
    assert!(vm.nested.take_flush().contains(Flush::VPID));
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert!(vm.nested.take_flush().contains(Flush::L1));
    let mut vm = Vm::ready();
    or12(&mut vm, fields::PRIMARY_CONTROLS, 1 << 31);
    or12(&mut vm, fields::SECONDARY_CONTROLS, 1 << 5);
    vm.set12(fields::VPID, 3);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert!(
        vm.nested.take_flush().contains(Flush::VPID),
        "a VPID that did not run before"
    );
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    assert_eq!(
        vm.run(Instruction::Vmresume),
        End::Other(Outcome::Entered { halted: false })
    );
    let flush = vm.nested.take_flush();
    assert!(!flush.intersects(Flush::VPID | Flush::L1));
}

/// CVE-2018-12904: VMX instructions of L2's user mode were emulated without a CPL check.
#[test]
fn cve_2018_12904_user_mode_cannot_execute_vmx_instructions() {
    for instruction in Instruction::ALL {
        let mut vm = Vm::ready();
        vm.vmcs.l1.preset(fields::GUEST_SS_ACCESS_RIGHTS, 0xC0F3);
        let before = (vm.nested.vmxon_region(), vm.nested.current_vmcs());
        let end = vm.run(instruction);
        match instruction {
            Instruction::Vmcall => assert_eq!(end, End::Other(Outcome::Hypercall)),
            Instruction::Vmfunc => assert_eq!(end, End::Fault(testudo_arch::Event::UD.into())),
            _ => assert_eq!(
                end,
                End::Fault(testudo_arch::Event::GP0.into()),
                "{instruction:?}"
            ),
        }
        assert_eq!((vm.nested.vmxon_region(), vm.nested.current_vmcs()), before);
    }
}

/// Xen 3643bb53: an activity state of SHUTDOWN in vmcs12 went to the processor, which then took no
/// interrupt any more.
#[test]
fn xen_3643bb53_no_waiting_state_reaches_the_processor() {
    for (state, expected) in [
        (1, End::Other(Outcome::Entered { halted: true })),
        (2, End::Other(Outcome::FailedEntry)),
        (3, End::Other(Outcome::FailedEntry)),
    ] {
        let mut vm = Vm::ready();
        vm.set12(fields::GUEST_ACTIVITY_STATE, state);
        vm.vmcs.l2.preset(fields::GUEST_ACTIVITY_STATE, 0);
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            expected,
            "activity state {state}"
        );
        assert_eq!(l2(&vm, fields::GUEST_ACTIVITY_STATE), 0);
    }
}

/// CVE-2019-7221: the emulated preemption timer of a VMCS fired after the VMCS was gone. Here the
/// processor's own timer counts, in `vmcs02`, and only while L2 runs.
#[test]
fn cve_2019_7221_the_preemption_timer_lives_in_vmcs02_only() {
    let mut vm = Vm::ready();
    or12(
        &mut vm,
        fields::PIN_CONTROLS,
        PinControls::ACTIVATE_PREEMPTION_TIMER.bits(),
    );
    or12(
        &mut vm,
        fields::EXIT_CONTROLS,
        ExitControls::SAVE_PREEMPTION_TIMER.bits(),
    );
    vm.set12(fields::PREEMPTION_TIMER_VALUE, 1000);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::PREEMPTION_TIMER_VALUE), 1000);
    assert_eq!(l2(&vm, fields::PIN_CONTROLS) & 64, 64);
    vm.vmcs.l2.preset(fields::PREEMPTION_TIMER_VALUE, 400);
    assert!(matches!(
        vm.exit(BasicReason::PreemptionTimer, 0),
        Handled::L1(_)
    ));
    assert_eq!(vm.get12(fields::PREEMPTION_TIMER_VALUE), 400);
    assert_eq!(l1(&vm, fields::PIN_CONTROLS) & 64, 0, "L1 runs without it");
    // The next VMCS does not want it, and does not get it.
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    let pin = vm.get12(fields::PIN_CONTROLS);
    vm.set12(fields::PIN_CONTROLS, pin & !64);
    let exit = vm.get12(fields::EXIT_CONTROLS);
    vm.set12(
        fields::EXIT_CONTROLS,
        exit & !u64::from(ExitControls::SAVE_PREEMPTION_TIMER.bits()),
    );
    assert_eq!(
        vm.run(Instruction::Vmresume),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::PIN_CONTROLS) & 64, 0);
}

/// CVE-2018-16882: a page that L1 had named for posted interrupts was used after it had been unmapped.
/// The descriptor is L0's to access, in L1's memory, and no page is named that no control is about.
#[test]
fn cve_2018_16882_no_page_of_l1s_is_named_to_the_processor() {
    let mut vm = Vm::running();
    let addresses = [
        fields::VIRTUAL_APIC_ADDRESS,
        fields::APIC_ACCESS_ADDRESS,
        fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
        fields::IO_BITMAP_A,
        fields::IO_BITMAP_B,
        fields::EXIT_MSR_STORE_ADDRESS,
        fields::EXIT_MSR_LOAD_ADDRESS,
        fields::ENTRY_MSR_LOAD_ADDRESS,
    ];
    for field in addresses {
        vm.set12(field, 0x9000);
    }
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    assert_eq!(
        vm.run(Instruction::Vmresume),
        End::Other(Outcome::Entered { halted: false })
    );
    for field in addresses {
        assert_eq!(l2(&vm, field), 0, "{field:?}");
    }
}

/// CVE-2023-30456: CR0 and CR4 of vmcs12 were not checked where the hardware would not object to
/// vmcs02.
#[test]
fn cve_2023_30456_control_registers_are_checked() {
    let bad: [(Encoding, u64); 3] = [
        // Paging without protection, which an unrestricted guest of L0's could run.
        (fields::GUEST_CR0.encoding(), 0x8000_0020),
        (fields::GUEST_CR4.encoding(), 1 << 60),
        (fields::GUEST_CR0.encoding(), 1 << 40 | 0x8000_0021),
    ];
    for (field, value) in bad {
        let mut vm = Vm::ready();
        vm.set12(field, value);
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::FailedEntry),
            "{field}"
        );
    }
}

#[test]
fn the_hosts_own_state_is_never_written() {
    let mut vm = Vm::running();
    vm.vmcs.l2.clear_trace();
    let _ = vm.exit(BasicReason::Cpuid, 0);
    let host_writes = vm
        .vmcs
        .l2
        .trace()
        .iter()
        .filter(|t| matches!(t, testudo_vmx::fake::Trace::Write(f, _) if f.area() == Area::Host))
        .count();
    assert_eq!(host_writes, 0);
    let entry = EntryControls::from_bits_retain(l2(&vm, fields::ENTRY_CONTROLS) as u32);
    assert!(entry.contains(EntryControls::IA32E_MODE_GUEST));
}

#[test]
fn a_shadow_vmcs_and_the_copy_agree_whenever_it_matters() {
    let mut vm = Vm::ready();
    let caps = vm.processor.clone();
    vm.vmcs.shadow = Some(FakeVmcs::with_caps(&caps));
    let shadow = |vm: &mut Vm| vm.vmcs.shadow.take().unwrap();
    // Becoming current fills it.
    let image = vm.nested.vmcs12.image.clone();
    let mut region = *image.as_bytes();
    region[..4].copy_from_slice(&REVISION.to_le_bytes());
    vm.memory.write(OTHER, &region).unwrap();
    vm.memory.store_u64(OTHER.wrapping_add(8), 0).unwrap();
    assert_eq!(vm.pointer(Instruction::Vmptrld, OTHER.0), End::Succeed);
    let rip = vm.get12(fields::GUEST_RIP);
    let mut seen = shadow(&mut vm);
    assert_eq!(seen.get(fields::GUEST_RIP), Ok(rip));
    // L1 writes it without an exit, and enters.
    seen.preset(fields::GUEST_RIP, 0x4321);
    vm.vmcs.shadow = Some(seen);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::GUEST_RIP), 0x4321);
    vm.vmcs.l2.preset(fields::GUEST_RIP, 0x8765);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0x55), Handled::L1(_)));
    let mut seen = shadow(&mut vm);
    assert_eq!(seen.get(fields::GUEST_RIP), Ok(0x8765));
    assert_eq!(seen.get(fields::EXIT_REASON), Ok(10));
    assert_eq!(seen.get(fields::EXIT_QUALIFICATION), Ok(0x55));
    // What L1 wrote is in memory after VMCLEAR.
    seen.preset(fields::GUEST_RIP, 0x1111);
    vm.vmcs.shadow = Some(seen);
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    assert_eq!(vm.pointer(Instruction::Vmclear, OTHER.0), End::Succeed);
    assert_eq!(vm.pointer(Instruction::Vmptrld, OTHER.0), End::Succeed);
    assert_eq!(vm.get12(fields::GUEST_RIP), 0x1111);
}

#[test]
fn l2s_clock_is_made_from_l1s() {
    use testudo_vmx::clock::GuestTsc;
    let mut vm = Vm::ready();
    or12(&mut vm, fields::PRIMARY_CONTROLS, 1 << 31 | 1 << 3);
    or12(&mut vm, fields::SECONDARY_CONTROLS, 1 << 25);
    let inner = GuestTsc {
        multiplier: 3 << 47,
        offset: 77,
    };
    vm.set12(fields::TSC_MULTIPLIER, inner.multiplier);
    vm.set12(fields::TSC_OFFSET, inner.offset);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    // L0 offsets L1 by 0x1000 and does not scale it.
    let host = 1_000_000;
    let l2_reads = GuestTsc {
        multiplier: l2(&vm, fields::TSC_MULTIPLIER),
        offset: l2(&vm, fields::TSC_OFFSET),
    };
    assert_eq!(l2_reads.read(host), inner.read(host + 0x1000));
    assert_eq!(l2(&vm, fields::SECONDARY_CONTROLS) >> 25 & 1, 1);
    // Two tiny factors: the product is not 0, which the processor would refuse.
    let mut vm = Vm::ready();
    or12(&mut vm, fields::PRIMARY_CONTROLS, 1 << 31 | 1 << 3);
    or12(&mut vm, fields::SECONDARY_CONTROLS, 1 << 25);
    vm.set12(fields::TSC_MULTIPLIER, 1);
    vm.vmcs.l1.preset(fields::TSC_MULTIPLIER, 1);
    let secondary = l1(&vm, fields::SECONDARY_CONTROLS) | 1 << 25;
    vm.vmcs.l1.preset(fields::SECONDARY_CONTROLS, secondary);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::TSC_MULTIPLIER), 1);
}

/// A field that counts only under a control must be right from the first entry under it, whatever the
/// entries before had it at.
#[test]
fn a_control_that_is_switched_on_late_brings_its_field() {
    let mut vm = Vm::running();
    vm.vmcs.l2.preset(fields::TSC_MULTIPLIER, 0);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    or12(&mut vm, fields::PRIMARY_CONTROLS, 1 << 31 | 1 << 3);
    or12(&mut vm, fields::SECONDARY_CONTROLS, 1 << 25);
    vm.set12(fields::TSC_MULTIPLIER, 1 << 48);
    assert_eq!(
        vm.run(Instruction::Vmresume),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::TSC_MULTIPLIER), 1 << 48);
}

/// An L1 in PAE paging, whose L2 is in it too, without EPT; and where both have their page-directory
/// pointers.
fn with_pae_paging() -> (Vm, Gpa) {
    in_pae_paging(Vm::ready())
}

/// As [`with_pae_paging`], of an L1 that is ready.
pub(super) fn in_pae_paging(mut vm: Vm) -> (Vm, Gpa) {
    let table = Gpa(0x3_0020);
    vm.vmcs.l1.preset(fields::GUEST_EFER, 0);
    vm.vmcs.l1.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
    let caps = vm.nested.caps().clone();
    samples::protected_mode(&mut *vm.nested.vmcs12.image, &caps).unwrap();
    let exit = vm.get12(fields::EXIT_CONTROLS);
    let long = u64::from(ExitControls::HOST_ADDRESS_SPACE_SIZE.bits());
    vm.set12(fields::EXIT_CONTROLS, exit & !long);
    let pae = 1 << 5;
    for register in [fields::HOST_CR4, fields::GUEST_CR4] {
        let value = vm.get12(register) | pae;
        vm.set12(register, value & !(1 << 17));
    }
    for root in [fields::HOST_CR3, fields::GUEST_CR3] {
        vm.set12(root, table.0);
    }
    for efer in [fields::HOST_EFER, fields::GUEST_EFER] {
        vm.set12(efer, 0);
    }
    vm.set12(fields::HOST_SS_SELECTOR, 0x10);
    for high in [
        fields::HOST_RIP,
        fields::HOST_RSP,
        fields::HOST_FS_BASE,
        fields::HOST_GS_BASE,
        fields::HOST_TR_BASE,
    ] {
        vm.set12(high, 0x1000);
    }
    for index in 0..4 {
        let entry = 0x4_0001 + (index << 12);
        vm.memory
            .store_u64(table.wrapping_add(8 * index), entry)
            .unwrap();
    }
    (vm, table)
}

#[test]
fn page_directory_pointers_are_loaded_by_entries_and_exits() {
    let (mut vm, table) = with_pae_paging();
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(l2(&vm, fields::GUEST_PDPTE0), 0x4_0001);
    assert_eq!(l2(&vm, fields::GUEST_PDPTE3), 0x4_3001);
    vm.memory.store_u64(table, 0x5_0001).unwrap();
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(l1(&vm, fields::GUEST_PDPTE0), 0x5_0001);
    assert_eq!(l1(&vm, fields::GUEST_PDPTE3), 0x4_3001);
}

/// 30.5.4: "If any of the PDPTEs ... has any reserved bits set, a VMX abort occurs."
#[test]
fn bad_page_directory_pointers_of_l1_abort() {
    for (bad, present) in [(0x4_0003, true), (1 << 51 | 1, true), (0x4_0102, false)] {
        let (mut vm, table) = with_pae_paging();
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::Entered { halted: false })
        );
        vm.memory.store_u64(table, bad).unwrap();
        let handled = vm.exit(BasicReason::Cpuid, 0);
        let abort = vm.memory.load_u32(REGION.wrapping_add(4));
        if present {
            assert_eq!((handled, abort), (Handled::Abort, Ok(2)), "{bad:#x}");
        } else {
            assert!(matches!(handled, Handled::L1(_)), "{bad:#x}");
            assert_eq!(l1(&vm, fields::GUEST_PDPTE0), bad);
        }
    }
    // Where no memory is, ones are read: for an exit and for an entry that fails late.
    let (mut vm, _) = with_pae_paging();
    vm.set12(fields::HOST_CR3, 0xFFF0_0000);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_eq!(vm.exit(BasicReason::Cpuid, 0), Handled::Abort);
    let (mut vm, _) = with_pae_paging();
    vm.set12(fields::HOST_CR3, 0xFFF0_0000);
    vm.set12(fields::GUEST_RFLAGS, 0);
    assert_eq!(vm.run(Instruction::Vmlaunch), End::Other(Outcome::Abort));
    assert_eq!(vm.memory.load_u32(REGION.wrapping_add(4)), Ok(2));
}

#[test]
fn bad_page_directory_pointers_of_l2_fail_the_entry() {
    let (mut vm, table) = with_pae_paging();
    vm.set12(fields::HOST_CR3, 0x3_1000);
    vm.memory.store_u64(table, 0x4_0003).unwrap();
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::FailedEntry)
    );
    assert_eq!(vm.get12(fields::EXIT_REASON), 1 << 31 | 33);
    assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), 2);
    // They suit while they are checked, and not when they are loaded.
    let (mut vm, table) = with_pae_paging();
    vm.set12(fields::HOST_CR3, 0x3_1000);
    let mut reads = 0;
    *vm.memory.adversary.borrow_mut() = Some(Box::new(move |bytes: &mut [u8]| {
        reads += 1;
        if reads == 5 {
            bytes[table.0 as usize] = 3;
        }
    }));
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::FailedEntry)
    );
    assert_eq!(vm.get12(fields::EXIT_QUALIFICATION), 2);
}

#[test]
fn what_l0_has_exit_stays_an_exit_though_l1_is_not_offered_it() {
    let mut vm = Vm::ready();
    let encls = u64::from(SecondaryControls::ENABLE_ENCLS_EXITING.bits());
    let secondary = l1(&vm, fields::SECONDARY_CONTROLS) | encls;
    vm.vmcs.l1.preset(fields::SECONDARY_CONTROLS, secondary);
    assert_eq!(
        vm.run(Instruction::Vmlaunch),
        End::Other(Outcome::Entered { halted: false })
    );
    assert_ne!(l2(&vm, fields::SECONDARY_CONTROLS) & encls, 0);
    assert_eq!(vm.get12(fields::SECONDARY_CONTROLS) & encls, 0);
}

#[test]
fn an_interrupt_that_exits_finds_a_halted_l2_halted() {
    const INTERRUPT: BasicReason = BasicReason::ExternalInterrupt;
    // By the entry, by a HLT that L0 handles, and after it ran on.
    for (state, halts, runs, expected) in [
        (1, false, false, 1),
        (0, true, false, 1),
        (1, false, true, 0),
        (0, true, true, 0),
        (0, false, false, 0),
    ] {
        let mut vm = Vm::ready();
        vm.set12(fields::GUEST_ACTIVITY_STATE, state);
        let halted = state == 1;
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::Entered { halted })
        );
        if halts {
            assert_eq!(vm.exit(BasicReason::Hlt, 0), Handled::L0);
            vm.nested.note_halt();
        }
        if runs {
            assert_eq!(vm.exit(INTERRUPT, 0), Handled::L0);
        }
        let _ = vm.exit_to_l1(INTERRUPT, 0x8000_0021);
        assert_eq!(vm.get12(fields::GUEST_ACTIVITY_STATE), expected);
        // The next L2 does not inherit it.
        vm.set12(fields::GUEST_ACTIVITY_STATE, 0);
        assert_eq!(
            vm.run(Instruction::Vmresume),
            End::Other(Outcome::Entered { halted: false })
        );
        assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
        assert_eq!(vm.get12(fields::GUEST_ACTIVITY_STATE), 0);
    }
}
