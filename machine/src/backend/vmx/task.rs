//! Hardware task switches, which always exit on VT-x (SDM vol. 3C, 28.4.2).

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Event, Exception, Gpa, Gprs, GuestMemory, Gva, PAGE_SIZE, PageSize};
use testudo_ept::walk::{
    Access, AccessKind, PageFaultCode, PagingState, Privilege, WalkError, walk,
};
use testudo_nested::vmx::SecondStage;
use testudo_vmx::controls::Interruptibility;
use testudo_vmx::exit::{TaskSwitch, TaskSwitchSource};
use testudo_vmx::fields;

use super::{Processor, VmxVcpu};
use crate::emulate::Fault;
use crate::emulate::task::{self, Cause, TaskMemory};
use crate::guest_cpu::paging_state;
use crate::vcpu::{Vcpu, VcpuError, VmExit};

/// How a task switch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switched {
    /// The new task runs, with this fault or trap as its first.
    Done(Option<Fault>),
    /// The old task goes on with this fault.
    Fault(Fault),
    /// A fault met the delivery of a double fault.
    Shutdown,
    /// The guest's page tables kept changing. Nothing that the guest can see has happened: once more.
    Contended,
}

/// Switches tasks as the processor would have, after an exit by one that it was to make while delivering
/// `delivering`, with the instruction length of the exit. Changes the registers, and memory through the
/// guest's paging.
pub fn switch_tasks<M: GuestMemory>(
    exit: TaskSwitch,
    delivering: Option<Event>,
    length: u32,
    (memory, physical_bits): (&M, u8),
    system: &mut SystemRegisters,
    gprs: &mut Gprs,
) -> Switched {
    let faults = matches!(
        delivering,
        Some(Event::Interrupt(_) | Event::Nmi | Event::Exception { .. })
    );
    if exit.source != TaskSwitchSource::TaskGate || !faults {
        // Past the instruction.
        system.rip = system.rip.wrapping_add(length.into()) & 0xFFFF_FFFF;
    }
    let mut memory = Linear {
        memory,
        paging: paging(system, physical_bits),
        contended: false,
    };
    let request = task::TaskSwitch {
        selector: exit.selector,
        cause: cause(exit.source, delivering),
    };
    let switched = task::switch(&mut memory, system, gprs, &request);
    if memory.contended {
        return Switched::Contended;
    }
    match (switched, delivering) {
        (Ok(first), _) => Switched::Done(first),
        (Err(fault), None) => Switched::Fault(fault),
        (Err(fault), Some(event)) => {
            combined(event, fault).map_or(Switched::Shutdown, Switched::Fault)
        }
    }
}

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// Switches tasks as the processor would have. What the exit interrupted waits to be injected.
    pub(super) fn task_switch(&mut self, exit: TaskSwitch) -> Result<Option<VmExit>, VcpuError> {
        let delivering = self.injection.take();
        let mut system = self.read_system()?;
        let length = self.processor.get(fields::EXIT_INSTRUCTION_LENGTH)?;
        self.load_rsp();
        let mut gprs = self.registers.gprs;
        let memory = (&self.memory, self.caps.processor.physical_address_bits);
        match switch_tasks(exit, delivering, length, memory, &mut system, &mut gprs) {
            Switched::Done(first) => {
                self.load_system(&system)?;
                self.registers.gprs = gprs;
                if delivering == Some(Event::Nmi) {
                    let blocked = Interruptibility::BLOCKING_BY_NMI;
                    self.cache.set_interruptibility(blocked);
                }
                if let Some(Fault { event, cr2 }) = first {
                    return Ok(self.raise(event, cr2));
                }
            }
            Switched::Fault(Fault { event, cr2 }) => return Ok(self.raise(event, cr2)),
            Switched::Shutdown => return Ok(Some(VmExit::Shutdown)),
            Switched::Contended => self.injection = delivering,
        }
        Ok(None)
    }
}

fn cause(source: TaskSwitchSource, delivering: Option<Event>) -> Cause {
    match (source, delivering) {
        (TaskSwitchSource::Call, _) => Cause::Call,
        (TaskSwitchSource::Jmp, _) => Cause::Jump,
        (TaskSwitchSource::Iret, _) => Cause::Return,
        (
            TaskSwitchSource::TaskGate,
            Some(event @ (Event::SoftwareInterrupt { .. } | Event::SoftwareException { .. })),
        ) => Cause::SoftwareInterrupt {
            vector: event.vector(),
        },
        (TaskSwitchSource::TaskGate, Some(Event::Exception { error_code, .. })) => {
            Cause::Event { error_code }
        }
        (TaskSwitchSource::TaskGate, _) => Cause::Event { error_code: None },
    }
}

/// What a fault makes that meets the delivery of an event; `None` is a shutdown.
fn combined(first: Event, fault: Fault) -> Option<Fault> {
    use testudo_arch::event::Combined;
    let exception = Exception::from_vector(fault.event.vector());
    match exception.map_or(Combined::Serial, |second| first.combine(second)) {
        Combined::Serial => Some(fault),
        Combined::DoubleFault => Some(Fault {
            event: Event::fault_with(Exception::DoubleFault, 0),
            cr2: fault.cr2,
        }),
        Combined::Shutdown => None,
    }
}

/// Protection keys are of IA-32e mode, in which there are no task switches.
fn paging(system: &SystemRegisters, physical_bits: u8) -> PagingState {
    paging_state(system, 0, physical_bits)
}

/// The guest's linear memory, as its processor accesses it for itself.
struct Linear<'a, M> {
    memory: &'a M,
    paging: PagingState,
    contended: bool,
}

impl<M: GuestMemory> Linear<'_, M> {
    /// The pieces of an access, each in a page, translated before any is made.
    fn pieces(
        &mut self,
        address: Gva,
        len: usize,
        kind: AccessKind,
    ) -> Result<[(Gpa, usize); 2], Fault> {
        let first = len.min((PAGE_SIZE - address.offset_in(PageSize::Size4K)) as usize);
        let mut pieces = [(Gpa::ZERO, 0); 2];
        for (piece, (skip, len)) in pieces.iter_mut().zip([(0, first), (first, len - first)]) {
            if len > 0 {
                let at = Gva(address.0.wrapping_add(skip as u64) & 0xFFFF_FFFF);
                *piece = (self.translate(at, kind)?, len);
            }
        }
        Ok(pieces)
    }

    fn translate(&mut self, at: Gva, kind: AccessKind) -> Result<Gpa, Fault> {
        let access = Access::new(kind, Privilege::Implicit);
        match walk(self.memory, &self.paging, at, access) {
            Ok(found) => Ok(found.gpa),
            Err(WalkError::Fault(fault)) => Err(Fault::page(fault.address, fault.code.bits())),
            Err(WalkError::NonCanonical(_)) => Err(Fault::GP0),
            Err(WalkError::NoTable(_)) => {
                // A bus that nobody drives reads as ones: reserved bits are set.
                let mut code = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
                code.set(PageFaultCode::WRITE, kind == AccessKind::Write);
                Err(Fault::page(at, code.bits()))
            }
            Err(_) => {
                self.contended = true;
                Err(Fault::GP0)
            }
        }
    }
}

impl<M: GuestMemory> TaskMemory for Linear<'_, M> {
    fn read(&mut self, address: Gva, data: &mut [u8]) -> Result<(), Fault> {
        let mut rest = data;
        for (gpa, len) in self.pieces(address, rest.len(), AccessKind::Read)? {
            let (part, tail) = rest.split_at_mut(len);
            // Where no memory is, ones.
            if len > 0 && self.memory.read(gpa, part).is_err() {
                part.fill(0xFF);
            }
            rest = tail;
        }
        Ok(())
    }

    fn write(&mut self, address: Gva, data: &[u8]) -> Result<(), Fault> {
        let mut rest = data;
        for (gpa, len) in self.pieces(address, rest.len(), AccessKind::Write)? {
            let (part, tail) = rest.split_at(len);
            if len > 0 {
                // Where no memory is, nobody takes it.
                let _nobody = self.memory.write(gpa, part);
            }
            rest = tail;
        }
        Ok(())
    }

    fn set_cr3(&mut self, cr3: u64) {
        self.paging.cr3 = cr3;
    }
}
