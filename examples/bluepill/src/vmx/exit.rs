//! Why the guest came out, and what becomes of it.

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Cr0Flags, Cr4Flags, Event, Gprs};
use testudo_machine::backend::vmx::{Level, Processor};
use testudo_machine::emulate::{self, EmulateError};
use testudo_nested::vmx::Instruction;
use testudo_vmx::controls::{Interruptibility, PendingDebug};
use testudo_vmx::event::{EventType, InterruptionInformation, interrupted_delivery};
use testudo_vmx::exit::{BasicReason, CrAccess, Exit, ExitReason, IoAccess, complete_instruction};
use testudo_vmx::state::read_system_registers;
use testudo_vmx::{VmcsRead, VmcsWrite, fields};

use super::{AlwaysOpen, Guest, VmxError};
use crate::apic::Command;
use crate::counts::{self, Reason};
use crate::view::{Translate, View};
use crate::{cpuid, ports, processors, registers};

impl Guest<'_> {
    /// After an exit of the guest itself.
    pub(super) fn settle_guest(&mut self) -> Result<(), VmxError> {
        let reason = ExitReason::read(&self.processor)?;
        if reason.basic().may_interrupt_delivery() {
            self.deliver_again()?;
        }
        self.handle(reason)
    }

    /// An event whose delivery the exit interrupted goes first at the next entry.
    fn deliver_again(&mut self) -> Result<(), VmxError> {
        let Some(event) = interrupted_delivery(&self.processor)? else {
            return Ok(());
        };
        if event == Event::Nmi {
            // Its delivery blocks NMIs, and the entry that delivers it again must not find them blocked
            // (SDM vol. 3C, 29.3.1.5).
            let state = self.processor.get(fields::GUEST_INTERRUPTIBILITY)?;
            let blocked = Interruptibility::BLOCKING_BY_NMI.bits();
            self.processor
                .set(fields::GUEST_INTERRUPTIBILITY, state & !blocked)?;
        }
        self.inject(event)
    }

    /// An exit of whatever runs that the hypervisor handles.
    pub(super) fn handle(&mut self, reason: ExitReason) -> Result<(), VmxError> {
        let basic = reason.basic();
        if let Some(instruction) = Instruction::from_exit(basic) {
            counts::count(self.id, Reason::Virtualization);
            return self.execute(instruction);
        }
        counts::count(
            self.id,
            match basic {
                BasicReason::Cpuid => Reason::Cpuid,
                BasicReason::Rdmsr | BasicReason::Wrmsr => Reason::Msr,
                BasicReason::EptViolation => Reason::Apic,
                BasicReason::ExceptionOrNmi
                | BasicReason::NmiWindow
                | BasicReason::Init
                | BasicReason::ExternalInterrupt => Reason::Event,
                _ => Reason::Other,
            },
        );
        match Exit::decode(reason, &self.processor)? {
            Exit::Cpuid => self.cpuid(),
            Exit::Rdmsr => self.read_msr(),
            Exit::Wrmsr => self.write_msr(),
            Exit::EptViolation(_) => self.emulate(),
            Exit::Io(access, string) => self.access_port(access, string.is_some()),
            Exit::Exception { information, .. } => self.exception(information),
            Exit::Init => {
                processors::init_one(self.id);
                Ok(())
            }
            // The guest's own loop sees that there is no NMI any more, or has it delivered.
            Exit::NmiWindow => self.set_window(false),
            // Only a guest of the guest exits for these, because its hypervisor wants it.
            Exit::ExternalInterrupt { .. } => {
                let information = self.processor.get(fields::EXIT_INTERRUPTION_INFORMATION)?;
                self.leave_inner(BasicReason::ExternalInterrupt, 0, information)
            }
            Exit::PreemptionTimer => self.end_turn(),
            Exit::ControlRegister(access) => self.access_control_register(access),
            Exit::Xsetbv => self.set_xcr(),
            Exit::Invd => {
                // SAFETY: CPL 0; what the caches hold goes to memory, which is more than was asked for.
                unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
                self.advance()
            }
            Exit::TaskSwitch(switch) => self.task_switch(switch),
            // They exist for hosts only.
            Exit::Getsec | Exit::Rsm | Exit::Seamcall | Exit::Tdcall => self.inject(Event::UD),
            Exit::TripleFault => self.end("shut its processor down, as by a triple fault"),
            other => self.end(other),
        }
    }

    /// An NMI: the processor let it out, and takes it now; the handler notes whose it is. A machine check of
    /// the guest's guest that the guest wants to see.
    fn exception(&mut self, information: InterruptionInformation) -> Result<(), VmxError> {
        if information.event_type() == EventType::Nmi {
            self.processor.take_nmi();
            self.nmi |= processors::take_guest_nmi(self.id);
            return Ok(());
        }
        self.leave_inner(BasicReason::ExceptionOrNmi, 0, information.0)
    }

    fn cpuid(&mut self) -> Result<(), VmxError> {
        let Gprs { rax, rcx, .. } = self.registers.gprs;
        let (leaf, subleaf) = (rax as u32, rcx as u32);
        let cr4 = self.processor.get(fields::GUEST_CR4)?;
        let answer = cpuid::answer(self.pill, leaf, subleaf, cr4);
        let answer = self.tables.filter(leaf, subleaf, answer);
        let gprs = &mut self.registers.gprs;
        [gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx] = answer.map(u64::from);
        self.advance()
    }

    /// An access to ports of which one is watched, or one of the guest's guest, whose ports all exit. The
    /// processor has tested whether the program may make it.
    fn access_port(&mut self, access: IoAccess, string: bool) -> Result<(), VmxError> {
        if string {
            return self.emulate();
        }
        let (port, size) = (access.port, access.size);
        if access.input {
            ports::read_into(&mut self.registers.gprs.rax, port, size);
        } else {
            let rax = self.registers.gprs.rax as u32;
            ports::write(port, size, self.pill.sleep.filter(port, size, rax));
        }
        self.advance()
    }

    /// A move to CR0 or CR4 that changes a bit of the hypervisor's, or an access to CR8 by the guest's guest.
    ///
    /// Of a move only those bits are executed here. It is made once more then, with a read shadow that suits, so
    /// that the processor does not exit and judges and executes the rest by itself.
    fn access_control_register(&mut self, access: CrAccess) -> Result<(), VmxError> {
        let (register, source) = match access {
            CrAccess::MovFrom {
                register: 8,
                destination,
            } => {
                let priority = u64::from(registers::cr8());
                self.registers.gprs[destination] = priority;
                if destination == testudo_arch::Gpr::Rsp {
                    self.processor.set(fields::GUEST_RSP, priority)?;
                }
                return self.advance();
            }
            CrAccess::MovTo { register, source } => (register, source),
            _ => return self.inject(Event::GP0),
        };
        let value = if source == testudo_arch::Gpr::Rsp {
            self.processor.get(fields::GUEST_RSP)?
        } else {
            self.registers.gprs[source]
        };
        match register {
            8 if value > 0xF => self.inject(Event::GP0),
            8 => {
                registers::set_cr8(value as u8);
                self.advance()
            }
            // In VMX operation these bits are as they are (SDM vol. 3C, 26.8), for the guest's guest in any case.
            _ if self.level == Level::L2 => self.inject(Event::GP0),
            0 => {
                let numeric_error = Cr0Flags::NUMERIC_ERROR.bits();
                if value & numeric_error == 0 && self.is_in_vmx_operation() {
                    return self.inject(Event::GP0);
                }
                let mask = self.tables.cr0_mask();
                let shadow = self.processor.get(fields::CR0_READ_SHADOW)?;
                let shadow = shadow & !mask | value & mask;
                self.processor.set(fields::CR0_READ_SHADOW, shadow)?;
                Ok(())
            }
            4 => {
                let vmx = value & Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits() != 0;
                let refused = if vmx {
                    self.nested.is_none()
                } else {
                    self.is_in_vmx_operation()
                };
                if refused || value & Cr4Flags::SAFER_MODE_EXTENSIONS.bits() != 0 {
                    return self.inject(Event::GP0);
                }
                let mask = self.tables.cr4_mask();
                let shadow = self.processor.get(fields::CR4_READ_SHADOW)?;
                let shadow = shadow & !mask | value & mask;
                self.processor.set(fields::CR4_READ_SHADOW, shadow)?;
                Ok(())
            }
            // No other control register exits.
            _ => self.inject(Event::GP0),
        }
    }

    fn is_in_vmx_operation(&self) -> bool {
        let nested = self.nested.as_ref();
        nested.is_some_and(|nested| nested.state.vmxon_region().is_some())
    }

    /// XSETBV, which the processor judges.
    fn set_xcr(&mut self) -> Result<(), VmxError> {
        let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
        let value = rdx << 32 | rax & 0xFFFF_FFFF;
        // SAFETY: the guest's CR4.OSXSAVE is set, or XSETBV had raised #UD; so the processor has it, and the
        // runtime sets it for the hypervisor too.
        if unsafe { registers::try_set_xcr(rcx as u32, value) } {
            self.advance()
        } else {
            self.inject(Event::GP0)
        }
    }

    /// An access that EPT does not allow: a write to the local APIC, or something beyond all memory and
    /// devices. Or a string instruction at ports.
    fn emulate(&mut self) -> Result<(), VmxError> {
        // The processor itself wrote there, to deliver an event: that it cannot, at whatever time.
        let event = self.processor.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        if InterruptionInformation(event).is_valid() {
            return Ok(());
        }
        let system = read_system_registers(&self.processor)?;
        self.registers.gprs.rsp = self.processor.get(fields::GUEST_RSP)?;
        let stage = self.nested.as_mut().and_then(|nested| {
            let paging = nested.state.is_nested_paging();
            paging.then_some(&mut nested.stage as &mut dyn Translate)
        });
        let mut view = View {
            gprs: &mut self.registers.gprs,
            xmm: &mut self.registers.sse.xmm,
            system,
            stage,
            memory: &self.pill.territory.ram,
            sleep: &self.pill.sleep,
            physical_bits: self.tables.caps.processor.physical_address_bits,
            contended: false,
            command: Command::Pass,
        };
        let result = emulate::step(&mut view);
        let View {
            system: SystemRegisters { rip, rflags, .. },
            contended,
            command,
            ..
        } = view;
        if contended {
            return Ok(());
        }
        let rsp = self.registers.gprs.rsp;
        self.processor.set(fields::GUEST_RSP, rsp)?;
        self.processor.set(fields::GUEST_RIP, rip)?;
        self.processor.set(fields::GUEST_RFLAGS, rflags)?;
        match result {
            Ok(outcome) => {
                self.end_shadow()?;
                if outcome == emulate::Outcome::SingleStep {
                    let pending = self.processor.get(fields::GUEST_PENDING_DEBUG)?;
                    let pending = pending | PendingDebug::BS.bits();
                    self.processor.set(fields::GUEST_PENDING_DEBUG, pending)?;
                }
            }
            Err(EmulateError::Fault(fault)) => {
                if let Some(address) = fault.cr2 {
                    self.registers.cr2 = address;
                }
                self.inject(fault.event)?;
            }
            // No system writes to its local APIC in such a way.
            Err(_) => self.inject(Event::GP0)?,
        }
        self.carry_out(command);
        Ok(())
    }

    /// An instruction has ended that software executed: no interrupt waits for it any more.
    fn end_shadow(&mut self) -> Result<(), VmxError> {
        let state = self.processor.get(fields::GUEST_INTERRUPTIBILITY)?;
        let shadow = Interruptibility::BLOCKING_BY_STI | Interruptibility::BLOCKING_BY_MOV_SS;
        self.processor
            .set(fields::GUEST_INTERRUPTIBILITY, state & !shadow.bits())?;
        Ok(())
    }

    /// What the guest's message to other processors asks for.
    pub(super) fn carry_out(&mut self, command: Command) {
        processors::carry_out(self.id, command, &mut AlwaysOpen);
        // Waiting for the others may have let one in.
        self.nmi |= processors::take_guest_nmi(self.id);
    }

    /// Ends the instruction that exited.
    pub(super) fn advance(&mut self) -> Result<(), VmxError> {
        complete_instruction(&mut self.processor)?;
        Ok(())
    }
}
