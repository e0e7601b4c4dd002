//! Exceptions of instructions that the machine executes for a guest of the guest's: who gets them, and
//! what they make of an event that was on its way.

use testudo_vmx::controls::{ExceptionBitmap, PinControls};

use super::nested::{
    Hypervisor, NO_EXIT, NO_PIN, READ_ONLY, TABLES, hypervisor_on, prepare_memory, prepared_memory,
};
use super::*;
use crate::emulate::linear::StageAccess;
use crate::vcpu::MemoryAccess;

const INTERRUPT: u32 = 0x8000_0031;
const GP: u32 = 0x8000_0B0D;
const PF: u32 = 0x8000_0B0E;
const DF: u32 = 0x8000_0B08;
const SS: u32 = 0x8000_0B0C;
const UD: u32 = 0x8000_0306;

/// L2 on EPT that L1 has made, and L1 wants to see these exceptions.
fn running_in(memory: &'static GuestRam, bitmap: ExceptionBitmap) -> Hypervisor {
    let vcpu = hypervisor_on(fixtures::skylake_sp(), memory, false, false);
    // L1 gets L2's interrupts, as hypervisors want it: what it injects itself is none of them.
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING;
    let mut vcpu = vcpu.with_vmcs(pin, NO_EXIT);
    vcpu.gives_ept();
    vcpu.vmwrite(fields::EXCEPTION_BITMAP, bitmap.bits().into());
    vcpu.launch();
    vcpu
}

/// As [`running_in`]; L2 has met an access that the machine must make while this event was delivered.
fn delivering(event: u32, bitmap: ExceptionBitmap) -> Hypervisor {
    let mut vcpu = running_in(prepared_memory(), bitmap);
    vcpu.will(move |vmcs, _| {
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0xC000_0000);
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        exit(vmcs, BasicReason::EptViolation, 2);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, event.into());
        vmcs.preset(fields::IDT_VECTORING_ERROR_CODE, 0);
    });
    // By the machine's address, of which L2 knows nothing.
    let exit = vcpu.enter_once();
    let VmExit::Memory(MemoryAccess { gpa, .. }) = exit else {
        panic!("{exit:?}");
    };
    assert_eq!((gpa, vcpu.level), (Gpa(0xC000_1000), Level::L2));
    vcpu
}

fn fault(exception: Exception) -> Event {
    Event::fault_with(exception, 0)
}

/// What L1 finds in its VMCS after an exit by an exception: which, and the event that it met.
fn told(vcpu: &mut Hypervisor) -> (u64, u64) {
    vcpu.assert_exited(BasicReason::ExceptionOrNmi);
    (
        vcpu.vmread(fields::EXIT_INTERRUPTION_INFORMATION),
        vcpu.vmread(fields::IDT_VECTORING_INFORMATION),
    )
}

#[test]
fn an_event_that_an_access_of_the_machines_interrupts_is_delivered_after_it() {
    for event in [INTERRUPT, GP] {
        let mut vcpu = delivering(event, ExceptionBitmap::all());
        vcpu.run_out();
        assert_eq!((vcpu.level, vcpu.last_injected()), (Level::L2, event));
    }
}

#[test]
fn an_exception_that_meets_a_delivery_is_told_to_a_hypervisor_that_wants_it() {
    for first in [INTERRUPT, PF] {
        let mut vcpu = delivering(first, ExceptionBitmap::GENERAL_PROTECTION);
        assert_eq!(vcpu.raise(Event::GP0, None), None);
        assert_eq!(told(&mut vcpu), (GP.into(), first.into()));
    }
}

/// SDM vol. 3A, table 7-5.
#[test]
fn exceptions_that_meet_combine() {
    let nobody = ExceptionBitmap::empty();
    for (first, second, delivered) in [
        (INTERRUPT, Event::GP0, GP),
        (UD, Event::GP0, GP),
        (SS, fault(Exception::PageFault), PF),
        (SS, Event::GP0, DF),
        (PF, fault(Exception::PageFault), DF),
    ] {
        let mut vcpu = delivering(first, nobody);
        assert_eq!(vcpu.raise(second, Some(0x7770)), None);
        assert_eq!(vcpu.registers.cr2, 0x7770);
        vcpu.run_out();
        assert_eq!(vcpu.last_injected(), delivered, "{second} in {first:#x}");
    }
    // L1 wants double faults: both exceptions are in it, and no delivery is left.
    let mut vcpu = delivering(PF, ExceptionBitmap::DOUBLE_FAULT);
    assert_eq!(vcpu.raise(Event::GP0, None), None);
    assert_eq!(told(&mut vcpu), (DF.into(), 0));
    // After a double fault there is nothing but the end of L2.
    let mut vcpu = delivering(DF, nobody);
    assert_eq!(vcpu.raise(Event::GP0, None), None);
    vcpu.assert_exited(BasicReason::TripleFault);
    assert_eq!(vcpu.vmread(fields::IDT_VECTORING_INFORMATION), 0);
}

#[test]
fn the_same_of_an_exception_that_the_processor_reports() {
    let mut vcpu = running_in(prepared_memory(), ExceptionBitmap::DOUBLE_FAULT);
    vcpu.will(|vmcs, _| {
        // L0 sees alignment checks, which are no contributory exceptions.
        exception(vmcs, 0x8000_0B11, 0);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, PF.into());
    });
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.last_injected()), (Level::L2, 0x8000_0B11));
    let second = Exception::GeneralProtection;
    let interrupted = Some(fault(Exception::SegmentNotPresent));
    let exit = vcpu.inject_after(Event::GP0, second, interrupted);
    assert_eq!(exit, Ok(None));
    assert_eq!(told(&mut vcpu).0, DF.into());
}

/// Where no memory is, and at which address L2 finds it.
const NOWHERE: Gpa = Gpa(0x4000_0000);
const NOWHERE_OF_L2: u64 = 0x20_0000;
/// Where L2 has an FLD, which the emulator does not know.
const FLD: u64 = 0x6000;

/// What is emulated for L2 writes nowhere that L2 could not: from a device's register to memory that L1 does not
/// let it write to.
#[test]
fn what_l1s_ept_refuses_to_an_emulated_instruction_is_told_to_l1() {
    let mut vcpu = running_in(prepared_memory(), ExceptionBitmap::empty());
    let access = StageAccess {
        linear: Gva(0x1234_5008),
        write: true,
        fetch: false,
        table: false,
    };
    let read = StageAccess {
        write: false,
        ..access
    };
    let at = Gpa(READ_ONLY + 8);
    assert_eq!(vcpu.translate(at, &read), Some(Gpa(READ_ONLY + 0x1008)));
    vcpu.settle_refusal();
    assert_eq!(vcpu.level, Level::L2);
    assert_eq!(vcpu.translate(at, &access), None);
    vcpu.settle_refusal();
    vcpu.assert_exited(BasicReason::EptViolation);
    // A write, of a linear address, behind its translation.
    assert_eq!(vcpu.vmread(fields::EXIT_QUALIFICATION), 0x182);
    assert_eq!(vcpu.vmread(fields::GUEST_PHYSICAL_ADDRESS), at.0);
    assert_eq!(vcpu.vmread(fields::GUEST_LINEAR_ADDRESS), 0x1234_5008);
    // Told once.
    vcpu.settle_refusal();
    assert_eq!(vcpu.level, Level::L1);
}

/// The machine's loop meets L2's exit, and L1 goes on afterwards: it reads the interruption information of
/// the exit that it got, before its processor shuts down.
fn in_the_loop(
    bitmap: ExceptionBitmap,
    l2: impl FnOnce(&mut FakeVmcs, &mut GuestRegisters) + 'static,
) -> u64 {
    let memory = ram(MEMORY);
    let (machine, lapic, _) = fake_machine::machine(memory.clone());
    let memory: &'static GuestRam = Box::leak(Box::new(memory));
    prepare_memory(memory);
    memory
        .store_u64(Gpa(TABLES + 0x2008), NOWHERE.0 | 0x83)
        .unwrap();
    memory.write(Gpa(FLD), &[0xD9, 0x00]).unwrap();
    let vcpu = hypervisor_on(fixtures::skylake_sp(), memory, false, false);
    let mut vcpu = vcpu.with_vmcs(NO_PIN, NO_EXIT);
    vcpu.vmwrite(fields::GUEST_CR3, TABLES);
    let primary = vcpu.vmread(fields::PRIMARY_CONTROLS);
    let bitmaps = u64::from(PrimaryControls::USE_MSR_BITMAPS.bits());
    vcpu.vmwrite(fields::PRIMARY_CONTROLS, primary | bitmaps);
    vcpu.vmwrite(fields::MSR_BITMAPS, 0xE000);
    vcpu.vmwrite(fields::EXCEPTION_BITMAP, bitmap.bits().into());
    let start = BootState {
        system: vcpu.system(),
        gprs: Gprs::default(),
    };
    vcpu.will_exit(BasicReason::Vmlaunch, 0);
    vcpu.will(l2);
    let information: &'static core::cell::Cell<u64> = Box::leak(Box::default());
    vcpu.will(|vmcs, registers| {
        registers.gprs.rax = fields::EXIT_INTERRUPTION_INFORMATION.encoding().0.into();
        let registers = 1 << 10 | (testudo_arch::Gpr::Rbx as u64) << 3;
        vmcs.preset(fields::EXIT_INSTRUCTION_INFORMATION, registers);
        exit(vmcs, BasicReason::Vmread, 0);
    });
    vcpu.will(|vmcs, registers| {
        information.set(registers.gprs.rbx);
        exit(vmcs, BasicReason::TripleFault, 0);
    });
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::TripleFault);
    information.get()
}

#[test]
fn an_instruction_that_is_refused_raises_an_exception_of_l2s() {
    let wanted = ExceptionBitmap::GENERAL_PROTECTION;
    let information = in_the_loop(wanted, |vmcs, registers| {
        registers.gprs.rcx = Msr::PAT.0.into();
        registers.gprs.rax = 2;
        exit(vmcs, BasicReason::Wrmsr, 0);
    });
    assert_eq!(information, GP.into());
}

/// Nothing answers where no memory is, and ones are no instruction.
#[test]
fn a_fetch_from_nowhere_is_l2s_affair() {
    let wanted = ExceptionBitmap::INVALID_OPCODE;
    let information = in_the_loop(wanted, |vmcs, _| {
        vmcs.preset(fields::GUEST_RIP, NOWHERE_OF_L2);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, NOWHERE.0);
        exit(vmcs, BasicReason::EptViolation, 4);
    });
    assert_eq!(information, UD.into());
}

#[test]
fn an_instruction_that_cannot_be_emulated_is_l2s_affair() {
    let wanted = ExceptionBitmap::INVALID_OPCODE;
    let information = in_the_loop(wanted, |vmcs, _| {
        vmcs.preset(fields::GUEST_RIP, FLD);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0xC000_0000);
        exit(vmcs, BasicReason::EptViolation, 1);
    });
    assert_eq!(information, UD.into());
}
