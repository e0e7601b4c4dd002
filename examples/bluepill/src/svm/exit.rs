//! Why the guest came out, and what becomes of it.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use testudo_arch::regs::CpuMode;
use testudo_arch::{Cr4Flags, Event, Exception, Gprs, Gva};
use testudo_machine::emulate::{self, Cpu, EmulateError};
use testudo_nested::svm::{Handled, Instruction, Outcome};
use testudo_rt::{self as rt, port, println};
use testudo_svm::Exit;
use testudo_svm::event::RawEvent;
use testudo_svm::exit::{ExitCode, PortAccess};
use testudo_svm::hw::instructions::ibpb;
use testudo_svm::vmcb::InterruptState;

use super::Guest;
use super::view::View;
use crate::apic::Command;
use crate::counts::{self, Reason};
use crate::{processors, signature};

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
        let CpuidResult {
            eax,
            mut ebx,
            mut ecx,
            edx,
        } = __cpuid_count(leaf, subleaf);
        let cr4 = self.vmcb().cr4();
        let mirror = |word: u32, bit: u32, flag: Cr4Flags| {
            word & !(1 << bit) | u32::from(cr4 & flag.bits() != 0) << bit
        };
        let answer = match leaf {
            1 => {
                ecx = mirror(ecx, 27, Cr4Flags::OSXSAVE);
                [eax, ebx, ecx, edx]
            }
            7 if subleaf == 0 => {
                ecx = mirror(ecx, 4, Cr4Flags::PROTECTION_KEY_USER);
                [eax, ebx, ecx, edx]
            }
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
            0x8000_000A => self.pill.tables.leaf(),
            // Memory encryption: its keys and tables are the host's.
            0x8000_001F => [0; 4],
            signature::LEAF => {
                let own_bytes = self.pill.territory.own_bytes();
                signature::answer(subleaf, rt::cpu::count(), own_bytes)
            }
            _ => [eax, ebx, ecx, edx],
        };
        let gprs = &mut self.registers.gprs;
        [gprs.rax, gprs.rbx, gprs.rcx, gprs.rdx] = answer.map(u64::from);
        self.advance();
    }

    /// An access to ports of which one is watched. The processor has tested whether the program may
    /// make it.
    fn access_port(&mut self, access: PortAccess) {
        // No system writes its power management's registers so.
        if access.string {
            return self.inject(Event::GP0);
        }
        let (port, size) = (access.port, access.size);
        let rax = self.registers.gprs.rax;
        if access.input {
            let value = read_port(port, size);
            self.registers.gprs.rax = match size {
                1 => rax & !0xFF | u64::from(value),
                2 => rax & !0xFFFF | u64::from(value),
                _ => u64::from(value),
            };
        } else {
            write_port(port, size, self.pill.sleep.filter(port, size, rax as u32));
        }
        let vmcb = self.vmcb_mut();
        vmcb.set_rip(access.next_rip);
        let state = vmcb.interrupt_state() - InterruptState::INTERRUPT_SHADOW;
        vmcb.set_interrupt_state(state);
    }

    /// An access that the nested table does not allow: a write to the local APIC, or something beyond
    /// all memory and devices.
    fn emulate(&mut self) {
        // The processor itself wrote there, to deliver an event: that it cannot, at whatever time.
        if self.vmcb().event_inj().is_valid() {
            return;
        }
        let mut view = self.view();
        let result = emulate::step(&mut view);
        let (contended, command) = (view.contended, view.command);
        if contended {
            return;
        }
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
        match command {
            Command::Pass | Command::Drop => {}
            Command::Init(target) => processors::init(self.id, target, &mut self.held),
            Command::Startup(target, page) => {
                processors::start_up(self.id, target, page, &mut self.held);
            }
        }
        // Waiting for the others may have let one in.
        self.nmi |= processors::take_guest_nmi(self.id);
    }

    fn view(&mut self) -> View<'_> {
        View::new(
            (&mut self.nested, &mut self.stage),
            &mut self.vmcb01,
            &mut self.registers,
            &self.pill.territory.ram,
            self.pill.tables.caps.physical_address_bits,
        )
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
        if self.pill.tables.caps.has(Features::NRIPS) && next != 0 {
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

/// Reads a port for the guest.
fn read_port(port: u16, size: u8) -> u32 {
    // SAFETY: ports are the guest's, and none makes a device write memory that the guest could not have it
    // write anyway.
    unsafe {
        match size {
            1 => u32::from(port::read_u8(port)),
            2 => u32::from(port::read_u16(port)),
            _ => port::read_u32(port),
        }
    }
}

/// Writes to a port for the guest.
fn write_port(port: u16, size: u8, value: u32) {
    // SAFETY: as for `read_port`.
    unsafe {
        match size {
            1 => port::write_u8(port, value as u8),
            2 => port::write_u16(port, value as u16),
            _ => port::write_u32(port, value),
        }
    }
}
