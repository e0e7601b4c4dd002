//! Exceptions of instructions that the machine executes for a guest of the guest's: who gets them, and
//! what they make of an event that was on its way.

use super::*;
use crate::backend::fake_machine::{self, MEMORY, ram};
use crate::boot::BootState;
use crate::vcpu::MemoryAccess;
use crate::{StopReason, VcpuLoop};

const GP: ExceptionIntercepts = ExceptionIntercepts::GP;
const INTERRUPT: RawEvent = RawEvent(0x8000_0031);

fn fault(exception: Exception) -> Event {
    Event::fault_with(exception, 0)
}

fn code(exception: Exception) -> u64 {
    ExitCode::EXCEPTION.start() + u64::from(exception.vector())
}

/// L2 has met an access that the machine must make while this event was delivered, and L1 intercepts
/// these exceptions, and shutdown.
fn delivering(event: impl Into<RawEvent>, intercepts: ExceptionIntercepts) -> Hypervisor {
    let event = event.into();
    let mut vcpu = Hypervisor::running(|block| {
        block.set_intercept_exceptions(intercepts);
        block.set_intercept_misc1(Misc1::SHUTDOWN);
    });
    vcpu.will_miss(0xC000_0000, NestedFaultBits::WRITE, event);
    // By the machine's address, of which L2 knows nothing.
    assert_eq!(
        vcpu.enter_once(),
        VmExit::Memory(MemoryAccess {
            gpa: Gpa(0xC000_1000),
            gva: None,
            write: true,
            fetch: false,
            table: false,
        })
    );
    vcpu
}

#[test]
fn an_exception_that_meets_a_delivery_is_told_to_a_hypervisor_that_wants_it() {
    for first in [INTERRUPT, fault(Exception::PageFault).into()] {
        let mut vcpu = delivering(first, GP);
        assert_eq!(vcpu.raise(Event::GP0, None), None);
        let block = vcpu.seen_by_l1();
        assert_eq!(block.exit_code(), code(Exception::GeneralProtection));
        assert_eq!(block.exit_int_info(), first);
    }
    // A page fault's address is in the exit, and not in CR2.
    let mut vcpu = delivering(INTERRUPT, ExceptionIntercepts::PF);
    let event = Event::fault_with(Exception::PageFault, 6);
    assert_eq!(vcpu.raise(event, Some(0x7770)), None);
    let block = vcpu.seen_by_l1();
    assert_eq!((block.exit_info1(), block.exit_info2()), (6, 0x7770));
    assert_eq!((block.cr2(), block.exit_int_info()), (0, INTERRUPT));
}

/// APM vol. 2, table 8-4.
#[test]
fn exceptions_that_meet_combine() {
    let nobody = ExceptionIntercepts::empty();
    for (first, second, delivered) in [
        (INTERRUPT, Event::GP0, Event::GP0),
        (Event::UD.into(), Event::GP0, Event::GP0),
        (
            fault(Exception::StackFault).into(),
            fault(Exception::PageFault),
            fault(Exception::PageFault),
        ),
        (
            fault(Exception::StackFault).into(),
            Event::GP0,
            fault(Exception::DoubleFault),
        ),
        (
            fault(Exception::PageFault).into(),
            fault(Exception::PageFault),
            fault(Exception::DoubleFault),
        ),
    ] {
        let mut vcpu = delivering(first, nobody);
        assert_eq!(vcpu.raise(second, Some(0x7770)), None);
        assert_eq!(vcpu.vmcb().cr2(), 0x7770);
        vcpu.run_out();
        assert_eq!(
            vcpu.last_injected(),
            delivered.into(),
            "{second} in {first}"
        );
    }
    // L1 wants double faults: both exceptions are in it, and no delivery is left.
    let mut vcpu = delivering(fault(Exception::PageFault), ExceptionIntercepts::DF);
    assert_eq!(vcpu.raise(Event::GP0, None), None);
    let block = vcpu.seen_by_l1();
    assert_eq!(block.exit_code(), code(Exception::DoubleFault));
    assert_eq!(block.exit_int_info(), RawEvent::NONE);
    // After a double fault there is nothing but the end, of L2 if L1 wants to see it.
    let mut vcpu = delivering(fault(Exception::DoubleFault), nobody);
    assert_eq!(vcpu.raise(Event::GP0, None), None);
    let block = vcpu.seen_by_l1();
    assert_eq!(ExitCode(block.exit_code()), ExitCode::SHUTDOWN);
    assert_eq!(block.exit_int_info(), RawEvent::NONE);
    let mut vcpu = Hypervisor::running(|_| {});
    let double = fault(Exception::DoubleFault).into();
    vcpu.will_miss(0xC000_0000, NestedFaultBits::WRITE, double);
    vcpu.enter_once();
    assert_eq!(vcpu.raise(Event::GP0, None), Some(VmExit::Shutdown));
}

/// The same of an exception that the processor reports to L0 alone.
#[test]
fn a_double_fault_of_l2s_is_its_hypervisors_to_see() {
    let mut vcpu = Hypervisor::running(|block| {
        block.set_intercept_exceptions(ExceptionIntercepts::DF);
    });
    vcpu.will(|vmcb, _| {
        exit(vmcb, ExitCode(code(Exception::AlignmentCheck)), 0, 0);
        vmcb.set_exit_int_info(fault(Exception::PageFault).into());
    });
    vcpu.run_out();
    // An alignment check is no contributory exception.
    assert!(vcpu.is_l2());
    assert_eq!(
        vcpu.last_injected(),
        fault(Exception::AlignmentCheck).into()
    );
    let event = Event::GP0;
    let interrupted = fault(Exception::SegmentNotPresent).into();
    let exit = vcpu.inject_after(event, Exception::GeneralProtection, interrupted);
    assert_eq!(exit, None);
    assert_eq!(vcpu.seen_by_l1().exit_code(), code(Exception::DoubleFault));
}

/// Where L2 has an FLD from an address of a device's, which the emulator does not know.
const FLD: u64 = 0x3000;

/// Where L2 has a MOVSD.
const MOVS: u64 = 0x4000;

/// What the machine's loop does with L2's exit: `l2` makes it, and L1 goes on afterwards with what is then
/// in its control block. L1's processor shuts down at last.
fn in_the_loop(
    change: impl FnOnce(&mut Vmcb),
    l2: impl FnOnce(&mut Vmcb, &mut GuestRegisters) + 'static,
) -> (StopReason, Vmcb) {
    let memory = ram(MEMORY);
    let mut vcpu = hypervisor_in(Box::leak(Box::new(memory.clone())));
    let mut block = vmcb12();
    change(&mut block);
    memory.write_value(VMCB12, &block).unwrap();
    // A page further in L1's memory.
    let fld = [0xD9, 0x05, 0, 0, 0, 0xC0];
    memory.write(Gpa(FLD + 0x1000), &fld).unwrap();
    memory.write(Gpa(MOVS + 0x1000), &[0xA5]).unwrap();
    memory.write(Gpa(READ_ONLY + 0x1000), &SECRET).unwrap();
    vcpu.will_enter();
    vcpu.will(l2);
    vcpu.will_exit(ExitCode::SHUTDOWN);
    let start = BootState {
        system: vcpu.system(),
        gprs: Gprs::default(),
    };
    let (machine, lapic, _) = fake_machine::machine(memory.clone());
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    let secret: [u8; 4] = memory.read_value(Gpa(READ_ONLY + 0x1000)).unwrap();
    assert_eq!(secret, SECRET);
    (stop.reason, memory.read_value(VMCB12).unwrap())
}

/// What L2 may read and not write.
const SECRET: [u8; 4] = *b"mine";

/// From a device's register to memory that L1 does not let L2 write to.
#[test]
fn what_is_emulated_for_l2_writes_nowhere_that_l2_could_not() {
    use NestedFaultBits as B;
    let (stop, block) = in_the_loop(
        |_| {},
        |vmcb, registers| {
            vmcb.set_rip(MOVS);
            registers.gprs.rsi = 0xC000_0000;
            registers.gprs.rdi = READ_ONLY;
            exit(
                vmcb,
                ExitCode::NPF,
                (B::USER | B::FINAL).bits(),
                0xC000_0000,
            );
        },
    );
    assert_eq!(stop, StopReason::TripleFault);
    assert_eq!(ExitCode(block.exit_code()), ExitCode::NPF);
    let bits = B::USER | B::WRITE | B::FINAL;
    let told = (block.exit_info1(), block.exit_info2(), block.rip());
    assert_eq!(told, (bits.bits(), READ_ONLY, MOVS));
}

#[test]
fn an_instruction_that_is_refused_raises_an_exception_of_l2s() {
    let (stop, block) = in_the_loop(
        |block| block.set_intercept_exceptions(GP),
        |vmcb, registers| {
            registers.gprs.rcx = Msr::PAT.0.into();
            registers.gprs.rax = 2;
            exit(vmcb, ExitCode::MSR, 1, 0);
        },
    );
    assert_eq!(stop, StopReason::TripleFault);
    assert_eq!(block.exit_code(), code(Exception::GeneralProtection));
    assert_eq!((block.exit_info1(), block.rip()), (0, 0x2000));
    let (_, block) = in_the_loop(
        |block| block.set_intercept_exceptions(ExceptionIntercepts::UD),
        |vmcb, _| exit(vmcb, ExitCode::SKINIT, 0, 0),
    );
    assert_eq!(block.exit_code(), code(Exception::InvalidOpcode));
}

/// Nothing answers where no memory is, and ones are no instruction.
#[test]
fn a_fetch_from_nowhere_is_l2s_affair() {
    let nowhere = 0x4000_0000;
    let fetch = move |vmcb: &mut Vmcb, _: &mut GuestRegisters| {
        vmcb.set_rip(nowhere);
        exit(vmcb, ExitCode::NPF, NestedFaultBits::FETCH.bits(), nowhere);
    };
    let ud = ExceptionIntercepts::UD;
    let (stop, block) = in_the_loop(|block| block.set_intercept_exceptions(ud), fetch);
    assert_eq!(stop, StopReason::TripleFault);
    assert_eq!(block.exit_code(), code(Exception::InvalidOpcode));
    assert_eq!(block.rip(), nowhere);
    // L1 itself has lost its way if it gets there.
    let memory = ram(MEMORY);
    let mut vcpu = hypervisor_in(Box::leak(Box::new(memory.clone())));
    vcpu.will(fetch);
    let start = BootState {
        system: vcpu.system(),
        gprs: Gprs::default(),
    };
    let (machine, lapic, _) = fake_machine::machine(memory);
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::FetchOutsideMemory(Gpa(nowhere)));
}

#[test]
fn an_instruction_that_cannot_be_emulated_is_l2s_affair() {
    let (stop, block) = in_the_loop(
        |block| block.set_intercept_exceptions(ExceptionIntercepts::UD),
        |vmcb, _| {
            vmcb.set_rip(FLD);
            exit(vmcb, ExitCode::NPF, 0, 0xC000_0000);
        },
    );
    assert_eq!(stop, StopReason::TripleFault);
    assert_eq!(block.exit_code(), code(Exception::InvalidOpcode));
}
