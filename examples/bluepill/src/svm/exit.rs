//! Why the guest came out, and what becomes of it.

use testudo_arch::regs::{CpuMode, SystemRegisters};
use testudo_arch::{Event, Exception, Gprs, Gva};
use testudo_machine::emulate::{self, Cpu, EmulateError};
use testudo_nested::svm::{Handled, Instruction, Outcome};
use testudo_rt::{self as rt, println};
use testudo_svm::Exit;
use testudo_svm::event::RawEvent;
use testudo_svm::exit::{ExitCode, PortAccess};
use testudo_svm::hw::instructions::ibpb;
use testudo_svm::vmcb::InterruptState;

use super::Guest;
use crate::apic::Command;
use crate::counts::{self, Reason};
use crate::view::{Translate, View};
use crate::{cpuid, ports, processors};

/// The status of a machine whose guest is at its end.
const GUEST_SHUT_DOWN: u8 = 103;

const DR6_SINGLE_STEP: u64 = 1 << 14;

impl Guest<'_> {
    /// After an exit of the guest itself.
    pub(super) fn settle_guest(&mut self) {
        let exit = Exit::read(&self.vmcb01);
        // An event whose delivery the exit interrupted goes first at the next entry.
        let interrupted = self.vmcb01.exit_int_info();
        let again = interrupted.is_valid().then(|| interrupted.to_redeliver());
        let again = again.flatten().map_or(RawEvent::NONE, RawEvent::from);
        self.vmcb01.set_event_inj(again);

        self.handle(exit);
    }

    /// After an exit of the guest's guest.
    pub(super) fn settle_inner(&mut self) {
        counts::count(self.id, Reason::Nested);
        match self.with_nested(|nested, context| nested.exited(context)) {
            Handled::Resume => {}
            Handled::L1(barrier) => barrier.discharge(self.predictor_barrier()),
            Handled::L0 | Handled::Memory(_) => {
                let exit = Exit::read(self.nested.vmcb02());
                self.handle(exit);
            }
        }
    }

    /// Gives the guest an exit of its guest, which the machine caused.
    pub(super) fn leave_inner(&mut self, code: ExitCode, info1: u64, info2: u64) {
        let barrier =
            self.with_nested(|nested, context| nested.exit_to_l1(code, info1, info2, context));
        barrier.discharge(self.predictor_barrier());
    }

    fn predictor_barrier(&self) -> impl FnOnce() + use<> {
        let exists = self.has_predictor_barrier;
        move || {
            if exists {
                // SAFETY: CPL 0, and the processor has it.
                unsafe { ibpb() };
            }
        }
    }

    /// An exit of whatever runs that the hypervisor handles.
    fn handle(&mut self, exit: Exit) {
        let reason = match exit {
            Exit::Cpuid => Reason::Cpuid,
            Exit::Rdmsr | Exit::Wrmsr => Reason::Msr,
            Exit::NestedPageFault(_) => Reason::Apic,
            Exit::Nmi | Exit::Init { .. } | Exit::Interrupt => Reason::Event,
            Exit::Vmrun | Exit::Vmload | Exit::Vmsave | Exit::Stgi | Exit::Clgi => {
                Reason::Virtualization
            }
            _ => Reason::Other,
        };
        counts::count(self.id, reason);
        match exit {
            Exit::Cpuid => self.cpuid(),
            Exit::Rdmsr => self.read_msr(),
            Exit::Wrmsr => self.write_msr(),
            Exit::NestedPageFault(_) => self.emulate(),
            Exit::Port(access) => self.access_port(access),
            // The processor lets it in for a moment, and the handler notes it; INIT comes as #SX.
            Exit::Nmi | Exit::Init { .. } => {
                self.held.take_nmi();
                self.nmi |= processors::take_guest_nmi(self.id);
            }
            // Only a guest of the guest exits for these: it runs without the hypervisor's knowledge of
            // what its hypervisor makes of them.
            Exit::Interrupt => self.leave_inner(ExitCode::INTR, 0, 0),
            Exit::Smi { info1, info2 } => self.leave_inner(ExitCode::SMI, info1, info2),
            Exit::Exception(exception) => {
                let code = ExitCode(ExitCode::EXCEPTION.start() + u64::from(exception.vector));
                self.leave_inner(code, u64::from(exception.error_code.unwrap_or(0)), 0);
            }
            Exit::Invd => {
                // SAFETY: CPL 0; what the caches hold goes to memory, which is more than was asked for.
                unsafe { core::arch::asm!("wbinvd", options(nostack, preserves_flags)) };
                self.advance();
            }
            Exit::Vmrun => self.execute(Instruction::Vmrun),
            Exit::Vmload => self.execute(Instruction::Vmload),
            Exit::Vmsave => self.execute(Instruction::Vmsave),
            Exit::Stgi => self.execute(Instruction::Stgi),
            Exit::Clgi => self.execute(Instruction::Clgi),
            Exit::Invlpga => self.execute(Instruction::Invlpga),
            Exit::Skinit => self.execute(Instruction::Skinit),
            Exit::Shutdown => self.end("shut its processor down, as by a triple fault"),
            _ => self.end(exit),
        }
    }

    /// The end of the machine: where its firmware would reset it, what brought it about is said first.
    #[cold]
    fn end(&self, why: impl core::fmt::Display) -> ! {
        let (id, rip) = (self.id, self.vmcb().rip());
        println!("testudo: the guest's processor {id}, at {rip:#x}: {why}");
        rt::exit(GUEST_SHUT_DOWN)
    }

    /// An SVM instruction of whatever runs.
    fn execute(&mut self, instruction: Instruction) {
        let next = self.next_instruction();
        match self.with_nested(|nested, context| nested.execute(instruction, next, context)) {
            // The guest's GIF is looked at before its next entry.
            Outcome::Done | Outcome::Refused | Outcome::GifSet => {}
            Outcome::Entered => self.pass_interrupts(),
            Outcome::Fault(event) => self.inject(event),
        }
    }

    /// CPUID: the processor's answers, but for what depends on registers that are the hypervisor's at
    /// this moment, and for what it has taken for itself.
    fn cpuid(&mut self) {
        let Gprs { rax, rcx, .. } = self.registers.gprs;
        let (leaf, subleaf) = (rax as u32, rcx as u32);
        let cr4 = self.vmcb().cr4();
        let [eax, mut ebx, mut ecx, edx] = cpuid::answer(self.pill, leaf, subleaf, cr4);
        let answer = match leaf {
            0x8000_0001 => {
                // SKINIT, and SVM.
                ecx &= !(1 << 12);
                if !self.has_svm() {
                    ecx &= !(1 << 2);
                }
                [eax, ebx, ecx, edx]
            }
            0x8000_0008 => {
                // INVLPGB reaches address spaces that are not the guest's.
                ebx &= !(1 << 3);
                [eax, ebx, ecx, edx]
            }
            0x8000_000A => self.tables.leaf(),
            // Memory encryption: its keys and tables are the host's.
            0x8000_001F => [0; 4],
            _ => [eax, ebx, ecx, edx],
        };
        let gprs = &mut self.registers.gprs;
        [gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx] = answer.map(u64::from);
        self.advance();
    }

    /// An access to ports of which one is watched. The processor has tested whether the program may
    /// make it.
    fn access_port(&mut self, access: PortAccess) {
        if access.string {
            return self.emulate();
        }
        let (port, size) = (access.port, access.size);
        if access.input {
            ports::read_into(&mut self.registers.gprs.rax, port, size);
        } else {
            let rax = self.registers.gprs.rax as u32;
            ports::write(port, size, self.pill.sleep.filter(port, size, rax));
        }
        let vmcb = self.vmcb_mut();
        vmcb.set_rip(access.next_rip);
        let state = vmcb.interrupt_state() - InterruptState::INTERRUPT_SHADOW;
        vmcb.set_interrupt_state(state);
    }

    /// An access that the nested table does not allow: a write to the local APIC, or something beyond
    /// all memory and devices. Or a string instruction at a watched port.
    fn emulate(&mut self) {
        // The processor itself wrote there, to deliver an event: that it cannot, at whatever time.
        if self.vmcb().event_inj().is_valid() {
            return;
        }
        let mut view = self.view();
        let result = emulate::step(&mut view);
        let View {
            system: SystemRegisters { rip, rflags, .. },
            contended,
            command,
            ..
        } = view;
        if contended {
            return;
        }
        let vmcb = self.vmcb_mut();
        vmcb.set_rip(rip);
        vmcb.set_rflags(rflags);
        match result {
            Ok(outcome) => {
                let vmcb = self.vmcb_mut();
                let state = vmcb.interrupt_state() - InterruptState::INTERRUPT_SHADOW;
                vmcb.set_interrupt_state(state);
                if outcome == emulate::Outcome::SingleStep {
                    let dr6 = vmcb.dr6() | DR6_SINGLE_STEP;
                    vmcb.set_dr6(dr6);
                    self.inject(Event::fault(Exception::Debug));
                }
            }
            Err(EmulateError::Fault(fault)) => {
                if let Some(address) = fault.cr2 {
                    self.vmcb_mut().set_cr2(address);
                }
                self.inject(fault.event);
            }
            // No system writes to its local APIC in such a way.
            Err(_) => self.inject(Event::GP0),
        }
        self.carry_out(command);
    }

    /// What the guest's message to other processors asks for.
    pub(super) fn carry_out(&mut self, command: Command) {
        processors::carry_out(self.id, command, &mut self.held);
        // Waiting for the others may have let one in.
        self.nmi |= processors::take_guest_nmi(self.id);
    }

    fn view(&mut self) -> View<'_> {
        let system = self.vmcb().system_registers();
        let nested_paging = self.nested.is_nested_paging();
        View {
            gprs: &mut self.registers.gprs,
            xmm: &mut self.registers.sse.xmm,
            system,
            stage: nested_paging.then_some(&mut self.stage as &mut dyn Translate),
            memory: &self.pill.territory.ram,
            sleep: &self.pill.sleep,
            physical_bits: self.tables.caps.physical_address_bits,
            contended: false,
            command: Command::Pass,
        }
    }

    /// Ends the instruction that exited.
    pub(super) fn advance(&mut self) {
        let next = self.next_instruction();
        let vmcb = self.vmcb_mut();
        vmcb.set_rip(next);
        let state = vmcb.interrupt_state() - InterruptState::INTERRUPT_SHADOW;
        vmcb.set_interrupt_state(state);
    }

    /// The address behind the instruction that exited.
    fn next_instruction(&mut self) -> u64 {
        use testudo_svm::caps::Features;
        let next = self.vmcb().n_rip();
        if self.tables.caps.has(Features::NRIPS) && next != 0 {
            return next;
        }
        let mut view = self.view();
        let (rip, mode) = (view.rip(), view.mode());
        let start = match mode {
            CpuMode::Long64 => Gva(rip),
            _ => {
                let base = view.segment(testudo_arch::regs::SegmentRegister::Cs).base;
                Gva(base.wrapping_add(rip) & 0xFFFF_FFFF)
            }
        };
        let mut code = [0; emulate::MAX_LENGTH];
        let mut have = 0;
        while have < code.len() {
            let at = start.wrapping_add(have as u64);
            let Ok(part) = view.fetch(at, &mut code[have..]) else {
                break;
            };
            have += part;
            if let Some(length) = emulate::length(&code[..have], mode) {
                return rip.wrapping_add(u64::from(length));
            }
        }
        // The processor decoded it a moment ago: only another processor that changes the code can lead here,
        // and then the guest goes on at whatever it put there.
        rip
    }
}
