//! The backend over a processor that is none: a fake VMCS, exits by script, and at every entry the
//! validator in place of the processor's own checks.

use core::sync::atomic::AtomicU32;
use std::boxed::Box;
use std::collections::VecDeque;
use std::string::ToString;
use std::vec::Vec;

use proptest::prelude::*;
use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Exception, Gpa, Gprs, Gva, Msr};
use testudo_nested::vmx::Msrs;
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::fixtures;
use testudo_vmx::check::{Rule, check_entry, samples};
use testudo_vmx::controls::SecondaryControls;
use testudo_vmx::encoding::Area;
use testudo_vmx::fake::FakeVmcs;
use testudo_vmx::{Encoding, InstructionError, VmFail, VmcsRead, VmcsWrite};

mod apic;
mod exceptions;
mod fake;
mod masked_interrupts;
mod nested;
mod nested_apic;
mod nested_shadow;
mod properties;
mod shadow;
mod timer;

use fake::*;

use super::mode::LME;
use super::*;
use crate::backend::fake_machine::{self, MEMORY, ram};
use crate::boot::BootState;
use crate::irq::fake::FakeHost;
use crate::vcpu::{MemoryAccess, PortAccess, VmExit};
use crate::{StopReason, VcpuLoop};

#[test]
fn every_processor_that_suits_enters_the_reset_state() {
    for (name, caps) in fixtures::all() {
        match Controls::choose(&caps) {
            Ok(_) => {
                let mut vcpu = vcpu_on(&caps);
                vcpu.run_out();
                assert_eq!(vcpu.system(), SystemRegisters::reset(), "{name}");
            }
            Err(error) => assert_eq!(name, "nehalem", "{error}"),
        }
    }
}

#[test]
fn what_a_processor_lacks_is_named() {
    let error = Controls::choose(&fixtures::nehalem()).unwrap_err();
    assert!(error.to_string().contains("UNRESTRICTED_GUEST"), "{error}");
    let mut caps = fixtures::skylake_sp();
    caps.ept_vpid -= testudo_vmx::caps::EptVpidCaps::INVEPT_ALL;
    let error = Controls::choose(&caps).unwrap_err();
    assert!(error.to_string().contains("INVEPT_ALL"), "{error}");
    let mut caps = fixtures::skylake_sp();
    caps.ept_vpid -= testudo_vmx::caps::EptVpidCaps::INVVPID_ALL;
    let controls = Controls::choose(&caps).unwrap();
    assert!(!controls.secondary.contains(SecondaryControls::ENABLE_VPID));
    assert_eq!(controls.flush(&caps, 1), None);
}

/// The machine's part of a CPUID exit.
fn answer_cpuid(vcpu: &mut Fake) {
    let _ = (vcpu.gprs().rax, vcpu.cr4());
    vcpu.gprs_mut().rax = 7;
    vcpu.advance();
}

#[test]
fn cpuid_costs_three_reads_and_one_write() {
    let mut vcpu = vcpu();
    vcpu.will_exit(BasicReason::Cpuid, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    answer_cpuid(&mut vcpu);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (3, 1));
    assert_eq!(vcpu.hardware(fields::GUEST_RIP), 0xFFF2);
}

#[test]
fn what_the_other_hot_exits_cost() {
    let costs = [
        (BasicReason::Rdmsr, 0, (4, 1)),
        (BasicReason::Wrmsr, 0, (4, 1)),
        (BasicReason::Vmcall, 0, (4, 1)),
        (BasicReason::Hlt, 0, (4, 1)),
        (BasicReason::Io, 0x03F8_0000, (5, 1)),
    ];
    for (reason, qualification, cost) in costs {
        let mut vcpu = vcpu();
        vcpu.will_exit(reason, qualification);
        vcpu.enter_once();
        vcpu.advance();
        vcpu.run_out();
        assert_eq!(vcpu.cost(), cost, "{reason}");
    }
    for (reason, exit, reads) in [
        (
            BasicReason::ApicWrite,
            VmExit::ApicWrite { register: 0x380 },
            3,
        ),
        (BasicReason::VirtualizedEoi, VmExit::EndOfInterrupt(0x80), 2),
    ] {
        let mut vcpu = vcpu();
        vcpu.will_exit(reason, 0x380);
        assert_eq!(vcpu.enter_once(), exit);
        vcpu.run_out();
        assert_eq!(vcpu.cost(), (reads, 0), "{reason}");
    }
    let mut vcpu = vcpu();
    vcpu.will_exit(BasicReason::PreemptionTimer, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 1));
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 0));
    assert_eq!(vcpu.processor.interrupts, 2);
    vcpu.set_rflags(0x202);
    vcpu.run_out();
    assert!(vcpu.can_take_interrupt());
    vcpu.inject(Event::Interrupt(0x31));
    assert!(!vcpu.can_take_interrupt());
    vcpu.set_interrupt_window(None);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (3, 1));
    assert_eq!(vcpu.last_injected(), 0x8000_0031);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() >> 31, 0, "delivered once");
}

#[test]
fn a_step_over_an_emulated_instruction_leaves_its_trap_pending() {
    let mut vcpu = vcpu();
    vcpu.set_rflags(0x102);
    vcpu.single_step();
    vcpu.will(|vmcs, _| {
        let pending = vmcs.image().get(fields::GUEST_PENDING_DEBUG).unwrap();
        assert_eq!(pending, PendingDebug::BS.bits());
        exception(vmcs, 0x8000_0301, PendingDebug::BS.bits());
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() & 0xFF, 1, "#DB");
    assert_ne!(vcpu.processor.dr6 & 1 << 14, 0, "BS");
}

#[test]
fn a_guest_reads_directly_what_the_processor_keeps_for_it() {
    let mut bitmap = MsrBitmap::all_exit();
    open_direct_msrs(&mut bitmap);
    for msr in [Msr::DEBUG_CTL, Msr::TSC] {
        assert!(!bitmap.read_exits(msr) && bitmap.write_exits(msr), "{msr}");
    }
    assert!(!bitmap.write_exits(Msr::LSTAR) && bitmap.read_exits(Msr::EFER));
    // What RDMSR finds.
    let mut vcpu = vcpu();
    vcpu.set_guest_tsc(1000, 5000);
    assert_eq!(vcpu.hardware(fields::TSC_OFFSET), 4000);
    assert_eq!(vcpu.hardware(fields::GUEST_DEBUGCTL), 0);
}

#[test]
fn requests_keep_the_guest_out() {
    let mut vcpu = vcpu();
    assert_eq!(vcpu.run(&AtomicU32::new(1)), Ok(VmExit::Interrupted));
    assert!(vcpu.processor.costs.is_empty());
}

#[test]
fn rsp_is_read_and_written_on_demand() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RSP, 0x7000);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 0));
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0x7000);
    vcpu.load_rsp();
    assert_eq!(vcpu.gprs().rsp, 0x7000);
    vcpu.gprs_mut().rsp -= 8;
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0x6FF8);
    // A reset sets it, whatever it was when somebody last looked.
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RSP, 0x9000);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.reset();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0);
}

#[test]
fn a_guest_reaches_64_bit_mode_and_leaves_it() {
    let mut vcpu = vcpu();
    // A 16-bit TSS, which IA-32e mode cannot be entered with by a VM entry.
    vcpu.processor
        .set(fields::GUEST_TR_ACCESS_RIGHTS, 0x83)
        .unwrap();
    vcpu.guest_enters_long_mode();
    assert_eq!(vcpu.hardware(fields::GUEST_TR_ACCESS_RIGHTS), 0x8B);
    let entry = EntryControls::from_bits_retain(vcpu.hardware(fields::ENTRY_CONTROLS));
    assert!(entry.contains(EntryControls::IA32E_MODE_GUEST));
    vcpu.advance();
    vcpu.run_out();
    // From 64-bit code paging cannot be switched off; from compatibility mode it can.
    vcpu.guest_moves_to(0, 0x11);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.guest_moves_to(0, 0x11);
    assert_eq!((vcpu.system().efer, vcpu.system().cr0), (LME, 0x11));
    let entry = EntryControls::from_bits_retain(vcpu.hardware(fields::ENTRY_CONTROLS));
    assert!(!entry.contains(EntryControls::IA32E_MODE_GUEST));
}

#[test]
fn caching_stays_on_whatever_the_guest_says() {
    let mut vcpu = vcpu();
    let cr0 = vcpu.hardware(fields::GUEST_CR0);
    assert_eq!(cr0 & 0x6000_0020, 0x20, "NE is VMX's, CD and NW are off");
    assert_eq!(vcpu.system().cr0, 0x6000_0010);
    vcpu.guest_moves_to(0, 0x4000_0011);
    assert_eq!(vcpu.system().cr0, 0x4000_0011);
    assert_eq!(vcpu.hardware(fields::CR0_READ_SHADOW), 0x4000_0011);
    assert_eq!(vcpu.hardware(fields::GUEST_CR0), 0x31);
    vcpu.guest_moves_to(0, 0x2000_0011);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "NW without CD");
    assert_eq!(vcpu.system().cr0, 0x4000_0011);
}

#[test]
fn what_the_guest_owns_of_cr0_is_read_where_it_is() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        // The guest set TS, MP and PE by itself.
        vmcs.preset(fields::GUEST_CR0, 0x3B);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    assert_eq!(vcpu.system().cr0, 0x6000_001B);
    // EFER's change keeps them.
    assert_eq!(vcpu.write_msr(Msr::EFER, 1), Some(true));
    assert_eq!(vcpu.hardware(fields::GUEST_CR0), 0x3B);
}

#[test]
fn pae_paging_loads_the_directory_pointers() {
    let mut vcpu = vcpu();
    for (i, entry) in [0x2001u64, 0x3001, 0, 0x4001].into_iter().enumerate() {
        vcpu.memory
            .store_u64(Gpa(0x1000 + 8 * i as u64), entry)
            .unwrap();
    }
    vcpu.processor.set(fields::GUEST_CR3, 0x1000).unwrap();
    vcpu.guest_moves_to(4, 0x20);
    let before = vcpu.processor.flushes;
    vcpu.guest_moves_to(0, 0x8000_0011);
    assert_eq!(vcpu.hardware(fields::GUEST_PDPTE1), 0x3001);
    assert_eq!(vcpu.processor.flushes, before + 1);
    vcpu.memory.store_u64(Gpa(0x1008), 0x3007).unwrap();
    vcpu.guest_moves_to(4, 0xA0);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "reserved bits");
    assert_eq!(vcpu.hardware(fields::GUEST_PDPTE1), 0x3001);
    assert_eq!(vcpu.cr4(), 0x20);
    // Where there is no memory the pointers are all ones.
    vcpu.processor.set(fields::GUEST_CR3, 0x10_0000).unwrap();
    vcpu.guest_moves_to(4, 0xA0);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
}

#[test]
fn cr4_takes_what_the_guest_may_have() {
    let mut vcpu = vcpu();
    vcpu.guest_moves_to(4, 0x30_0620);
    assert_eq!(vcpu.cr4(), 0x30_0620);
    let hardware = vcpu.hardware(fields::GUEST_CR4);
    assert_eq!(hardware, 0x30_0620 | 1 << 13 | 1 << 6, "VMXE and MCE");
    for refused in [1u64 << 13, 1 << 14, 1 << 17, 1 << 23, 1 << 31] {
        vcpu.guest_moves_to(4, refused);
        assert_eq!(vcpu.last_injected(), 0x8000_030D, "{refused:#x}");
    }
    assert_eq!(vcpu.cr4(), 0x30_0620);
}

#[test]
fn the_window_follows_the_task_priority() {
    let window = |vcpu: &Fake| {
        let primary = PrimaryControls::from_bits_retain(vcpu.hardware(fields::PRIMARY_CONTROLS));
        let exiting = primary.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        (exiting, vcpu.hardware(fields::TPR_THRESHOLD))
    };
    let mut vcpu = vcpu();
    vcpu.set_task_priority(5);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x51)));
    assert_eq!(window(&vcpu), (false, 5));
    vcpu.run_out();
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x61)));
    assert_eq!(window(&vcpu), (true, 0));
    vcpu.run_out();
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x31)));
    assert_eq!(window(&vcpu), (false, 3));
    // A threshold above the priority would make the entry fail.
    vcpu.set_task_priority(2);
    assert_eq!(window(&vcpu), (true, 0));
    vcpu.run_out();
    vcpu.will_exit(BasicReason::InterruptWindow, 0);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(window(&vcpu), (false, 0));
    vcpu.set_task_priority(15);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert_eq!(window(&vcpu), (true, 0));
}

#[test]
fn a_shadow_of_sti_ends_with_the_instruction() {
    let sti = |vmcs: &mut FakeVmcs| {
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1);
        exit(vmcs, BasicReason::Hlt, 0);
    };
    let mut vcpu = vcpu();
    vcpu.will(move |vmcs, _| sti(vmcs));
    assert_eq!(vcpu.enter_once(), VmExit::Halt);
    assert!(!vcpu.can_take_interrupt(), "STI shadows HLT");
    vcpu.advance();
    assert!(vcpu.can_take_interrupt());
    vcpu.inject(Event::Interrupt(0x20));
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
    // With an open window it ends without being asked for.
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    vcpu.will(move |vmcs, _| {
        sti(vmcs);
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    answer_cpuid(&mut vcpu);
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn single_steps_and_rf_end_as_on_a_processor() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RFLAGS, 0x1_0102);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 2);
        exit(vmcs, BasicReason::Rdmsr, 0);
    });
    vcpu.enter_once();
    vcpu.advance();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
    assert_eq!(vcpu.hardware(fields::GUEST_RFLAGS), 0x102);
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
    // Now that stepping was seen, CPUID takes part in it.
    vcpu.processor.vmcs.preset(fields::GUEST_PENDING_DEBUG, 0);
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.enter_once();
    answer_cpuid(&mut vcpu);
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
    vcpu.processor.vmcs.preset(fields::GUEST_PENDING_DEBUG, 0);
    // It ends with TF.
    for cost in [(4, 1), (3, 1)] {
        vcpu.will(|vmcs, _| {
            vmcs.preset(fields::GUEST_RFLAGS, 2);
            exit(vmcs, BasicReason::Cpuid, 0);
        });
        vcpu.enter_once();
        answer_cpuid(&mut vcpu);
        vcpu.run_out();
        assert_eq!(vcpu.cost(), cost);
    }
}

#[test]
fn debug_exceptions_reach_the_guest_with_their_registers() {
    let mut vcpu = vcpu();
    vcpu.processor.dr6 = 0xFFFF_0FF1;
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_DR7, 0x2400);
        vmcs.preset(fields::GUEST_RFLAGS, 0x302);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1);
        exception(vmcs, 0x8000_0301, 1 << 14);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0301);
    assert_eq!(vcpu.processor.dr6, 0xFFFF_4FF0);
    assert_eq!(vcpu.hardware(fields::GUEST_DR7), 0x400);
    // The processor demands it in a shadow with TF.
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
}

#[test]
fn int1_and_alignment_checks_go_back_as_they_were() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        exception(vmcs, 0x8000_0501, 0);
        vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 1);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0501);
    assert_eq!(vcpu.hardware(fields::ENTRY_INSTRUCTION_LENGTH), 1);
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.guest_moves_to(0, 0x11);
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0B11, 0));
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0B11);
    assert_eq!(vcpu.hardware(fields::ENTRY_EXCEPTION_ERROR_CODE), 0);
}

#[test]
fn an_exception_that_meets_another_may_be_a_double_fault() {
    let meet = |first: Exception, second: u32| {
        let mut vcpu = vcpu();
        vcpu.guest_moves_to(0, 0x11);
        vcpu.will(move |vmcs, _| {
            exception(vmcs, 0x8000_0B00 | second, 0);
            let first = 0x8000_0B00 | u64::from(first.vector());
            vmcs.preset(fields::IDT_VECTORING_INFORMATION, first);
        });
        vcpu.will_exit(BasicReason::ExternalInterrupt, 0);
        let exit = vcpu.enter_once();
        (exit, *vcpu.processor.injected.last().unwrap())
    };
    use Exception as E;
    assert_eq!(meet(E::PageFault, 13), (VmExit::Interrupted, 0x8000_0B08));
    assert_eq!(meet(E::PageFault, 17), (VmExit::Interrupted, 0x8000_0B11));
    assert_eq!(meet(E::DoubleFault, 13).0, VmExit::Shutdown);
}

#[test]
fn an_interrupted_event_is_delivered_again() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        exit(vmcs, BasicReason::EptViolation, 0x181);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0xFEE0_0000);
        vmcs.preset(fields::GUEST_LINEAR_ADDRESS, 0x1234);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0480);
    });
    let read = MemoryAccess {
        gpa: Gpa(0xFEE0_0000),
        gva: Some(Gva(0x1234)),
        write: false,
        fetch: false,
        table: false,
    };
    assert_eq!(vcpu.enter_once(), VmExit::Memory(read));
    assert!(!vcpu.can_take_interrupt() && !vcpu.can_take_nmi());
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0480);
    assert_eq!(vcpu.hardware(fields::ENTRY_INSTRUCTION_LENGTH), 2);
    // An NMI blocks NMIs when its delivery begins, and must not be injected while they are.
    vcpu.will(|vmcs, _| {
        exit(vmcs, BasicReason::EptViolation, 0x181);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 8);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0202);
    });
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0202);
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn nmis_and_machine_checks_are_the_hosts() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0202, 0));
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0312, 0));
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    assert_eq!((vcpu.processor.nmis, vcpu.processor.machine_checks), (1, 1));
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() >> 31, 0);
}

#[test]
fn guest_nmis_wait_for_the_iret() {
    let mut vcpu = vcpu();
    assert!(vcpu.can_take_nmi());
    vcpu.inject(Event::Nmi);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 8);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    assert_eq!(vcpu.last_injected(), 0x8000_0202);
    assert!(!vcpu.can_take_nmi());
    vcpu.set_nmi_window(true);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 0);
        exit(vmcs, BasicReason::NmiWindow, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert!(vcpu.can_take_nmi());
    vcpu.run_out();
    let primary = PrimaryControls::from_bits_retain(vcpu.hardware(fields::PRIMARY_CONTROLS));
    assert!(!primary.contains(PrimaryControls::NMI_WINDOW_EXITING));
}

#[test]
fn an_iret_that_faults_leaves_nmis_blocked() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| exit(vmcs, BasicReason::EptViolation, 0x1182));
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 8);
}

#[test]
fn real_mode_has_no_error_codes() {
    let mut vcpu = vcpu();
    vcpu.inject(Event::GP0);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_030D);
}

#[test]
fn a_failed_access_keeps_the_guest_out() {
    let mut vcpu = vcpu();
    vcpu.run_out();
    vcpu.processor
        .vmcs
        .fail(fields::GUEST_CS_BASE, VmFail::Invalid);
    assert_eq!(vcpu.system(), SystemRegisters::default());
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "VMREAD of GUEST_CS_BASE: VMfailInvalid: no current VMCS, or one that this instruction cannot use"
    );
}

#[test]
fn a_refused_entry_names_the_rule() {
    let mut vcpu = vcpu();
    vcpu.set_rflags(0);
    let VcpuError::VmEntry(refusal) = vcpu.run(&AtomicU32::new(0)).unwrap_err() else {
        panic!("no refusal");
    };
    assert_eq!(refusal.violation.unwrap().rule, Rule::RflagsReserved);
    let text = refusal.to_string();
    assert!(
        text.contains("VM entry with invalid control field(s) (error 7)"),
        "{text}"
    );
    assert!(text.ends_with("but GUEST_RFLAGS is 0x0"), "{text}");
    // The processor itself finds it after the checks of controls.
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::EXIT_REASON, 0x8000_0021);
        vmcs.preset(fields::VMCS_LINK_POINTER, 1);
    });
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    assert!(error.contains("invalid guest state"), "{error}");
    assert!(error.contains("VMCS_LINK_POINTER is 0x1"), "{error}");
}

#[test]
fn exits_have_the_machines_names() {
    use BasicReason as R;
    let exit_of = |reason, qualification| {
        let mut vcpu = vcpu();
        vcpu.registers.gprs = Gprs {
            rax: 0xFFFF_FFFF_0000_0003,
            rcx: 0x1_0000_0010,
            rdx: 7,
            ..Gprs::default()
        };
        vcpu.will_exit(reason, qualification);
        vcpu.enter_once()
    };
    assert_eq!(exit_of(R::Rdmsr, 0), VmExit::ReadMsr(Msr(0x10)));
    assert_eq!(
        exit_of(R::Wrmsr, 0),
        VmExit::WriteMsr(Msr(0x10), 0x7_0000_0003)
    );
    let xcr = VmExit::SetXcr {
        index: 0x10,
        value: 0x7_0000_0003,
    };
    assert_eq!(exit_of(R::Xsetbv, 0), xcr);
    let port = PortAccess {
        port: 0x3F8,
        size: 1,
        write: false,
    };
    assert_eq!(exit_of(R::Io, 0x03F8_0008), VmExit::Port(port));
    assert_eq!(exit_of(R::Io, 0x03F8_0018), VmExit::StringPort(port));
    assert_eq!(exit_of(R::Vmcall, 0), VmExit::Hypercall);
    assert_eq!(exit_of(R::Wbinvd, 0), VmExit::CacheFlush);
    assert_eq!(exit_of(R::TripleFault, 0), VmExit::Shutdown);
    for reason in [
        R::Vmxon,
        R::Vmlaunch,
        R::Vmread,
        R::Getsec,
        R::Monitor,
        R::Invept,
        R::Rdpmc,
    ] {
        assert_eq!(exit_of(reason, 0), VmExit::Forbidden, "{reason}");
    }
}

#[test]
fn what_is_not_supported_is_said_in_words() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1 << 3);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0202);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0x5000);
        exit(vmcs, BasicReason::EptMisconfiguration, 0);
        vmcs.preset(fields::EXIT_REASON, 1 << 26 | 49);
    });
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    for words in [
        "EPT misconfiguration on the way to 0x5000 (after a bus lock) (reason 0x4000031,",
        "while NMI was being delivered",
        "activity: active; blocking: BLOCKING_BY_NMI; pending debug exceptions: none",
    ] {
        assert!(error.contains(words), "{error}");
    }
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.will_exit(BasicReason::Unknown(300), 9);
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    assert!(
        error.contains("0x12c") && error.contains("qualification 0x9"),
        "{error}"
    );
}

/// A task priority is one register, whether the guest reaches it as CR8 or through its local APIC.
#[test]
fn the_task_priority_is_one_in_the_processor_and_the_apic() {
    let (machine, lapic, _) = fake_machine::machine(ram(MEMORY));
    let mut vcpu = vcpu();
    let apic = vcpu.apic_page;
    let access = |write: bool, msr: Msr, value: u64| {
        move |vmcs: &mut FakeVmcs, registers: &mut GuestRegisters| {
            (registers.gprs.rcx, registers.gprs.rax) = (msr.0.into(), value);
            let reasons = [BasicReason::Rdmsr, BasicReason::Wrmsr];
            exit(vmcs, reasons[usize::from(write)], 0);
        }
    };
    vcpu.will(access(true, Msr::APIC_BASE, 0xFEE0_0D00));
    vcpu.will(access(true, Msr::X2APIC_TPR, 0x53));
    vcpu.will(move |vmcs, registers| {
        assert_eq!(apic.task_priority(), 5);
        // MOV to CR8, which does not exit, and a write to another register of the APIC.
        apic.set_task_priority(7);
        access(true, Msr::X2APIC_EOI, 0)(vmcs, registers);
    });
    vcpu.will(access(false, Msr::X2APIC_TPR, 0));
    vcpu.will(move |vmcs, registers| {
        assert_eq!(registers.gprs.rax, 0x70);
        assert_eq!(apic.task_priority(), 7);
        exit(vmcs, BasicReason::TripleFault, 0);
    });
    let start = BootState {
        system: SystemRegisters::reset(),
        gprs: Gprs::default(),
    };
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::TripleFault);
}
