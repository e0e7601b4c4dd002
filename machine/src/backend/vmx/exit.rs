//! Settling why the guest came out.

use testudo_arch::event::Combined;
use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr4Flags, Event, Exception, Gpr, Gprs, GuestMemory, Gva, Msr, RFlags};
use testudo_nested::vmx::{Instruction, SecondStage};
use testudo_vmx::controls::{Interruptibility, PendingDebug};
use testudo_vmx::event::{EventType, InterruptionInformation, interrupted_delivery};
use testudo_vmx::exit::{
    ApicAccess, ApicAccessKind, BasicReason, CrAccess, DebugQualification, EptQualification,
    EptViolation, Exit, ExitReason, IoAccess,
};
use testudo_vmx::{fields, state};

use super::apic::APIC_PAGE;
use super::cache::{self, Cached};
use super::mode::{LMA, pdptes_are_valid};
use super::{Level, Processor, Refusal, UnsupportedExit, VmxVcpu};
use crate::vcpu::{MemoryAccess, PortAccess, Vcpu, VcpuError, VmExit};

/// DR7.GD, which a #DB clears (SDM vol. 3B, 18.2.4).
const DR7_GENERAL_DETECT: u64 = 1 << 13;

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// What the machine must decide about the exit; `None` if it is settled here.
    #[inline(never)]
    pub(super) fn settle(&mut self, reason: ExitReason) -> Result<Option<VmExit>, VcpuError> {
        let basic = reason.basic();
        match basic {
            BasicReason::ExternalInterrupt => {
                self.processor.take_pending();
                return Ok(Some(VmExit::Interrupted));
            }
            BasicReason::PreemptionTimer => {
                self.until_timer = 1;
                return Ok(Some(VmExit::Interrupted));
            }
            BasicReason::ExceptionOrNmi => return self.exception(reason),
            _ => {}
        }
        if self.nested.is_some()
            && let Some(instruction) = Instruction::from_exit(basic)
        {
            return self.vmx_instruction(instruction);
        }
        if reason.is_entry_failure()
            && let Some(refusal) = Refusal::of_exit(reason, &self.processor, self.caps)?
        {
            return Err(VcpuError::VmEntry(refusal));
        }
        // What the exit interrupted of L2 the nested layer has in L2's VMCS again.
        if self.level == Level::L1 && basic.may_interrupt_delivery() {
            self.take_up_interrupted_event()?;
        }
        let exit = Exit::decode(reason, &self.processor)?;
        self.classify(exit)
    }

    fn classify(&mut self, exit: Exit) -> Result<Option<VmExit>, VcpuError> {
        Ok(Some(match exit {
            Exit::Cpuid => VmExit::Cpuid,
            Exit::Rdmsr => VmExit::ReadMsr(Msr(self.registers.gprs.rcx as u32)),
            Exit::Wrmsr => {
                let (index, value) = self.ecx_and_edx_eax();
                VmExit::WriteMsr(Msr(index), value)
            }
            Exit::EptViolation(violation) => self.memory_exit(&violation)?,
            Exit::Io(access, string) => port_exit(access, string.is_some()),
            Exit::ApicWrite { offset } => VmExit::ApicWrite { register: offset },
            Exit::VirtualizedEoi { vector } => VmExit::EndOfInterrupt(vector),
            Exit::ApicAccess(access) => VmExit::Memory(apic_access(access)),
            Exit::Hlt => {
                if self.level != Level::L1 && self.l2_has_virtual_interrupt()? {
                    self.advance();
                    // The shadow of an STI before the HLT would hold the interrupt back.
                    self.interruptibility();
                    return Ok(None);
                }
                self.note_l2_halt();
                VmExit::Halt
            }
            Exit::InterruptWindow | Exit::TprBelowThreshold => {
                self.set_interrupt_window(None);
                VmExit::InterruptWindow
            }
            Exit::NmiWindow => {
                self.set_nmi_window(false);
                VmExit::InterruptWindow
            }
            Exit::ControlRegister(access) => return self.move_to_control_register(access),
            Exit::TaskSwitch(switch) => return self.task_switch(switch),
            Exit::Invlpg { address } if self.shadow.is_some() => {
                self.invalidate_shadow_page(address)?;
                self.advance();
                return Ok(None);
            }
            Exit::Vmcall => VmExit::Hypercall,
            Exit::Xsetbv => {
                let (index, value) = self.ecx_and_edx_eax();
                VmExit::SetXcr { index, value }
            }
            Exit::Wbinvd { .. } | Exit::Invd => VmExit::CacheFlush,
            Exit::Pause => VmExit::Idle,
            Exit::TripleFault => VmExit::Shutdown,
            Exit::Vmclear(_)
            | Exit::Vmlaunch
            | Exit::Vmptrld(_)
            | Exit::Vmptrst(_)
            | Exit::Vmread(_)
            | Exit::Vmresume
            | Exit::Vmwrite(_)
            | Exit::Vmxoff
            | Exit::Vmxon(_)
            | Exit::Invept(_)
            | Exit::Invvpid(_)
            | Exit::Vmfunc
            | Exit::Getsec
            | Exit::Encls
            | Exit::Monitor
            | Exit::Mwait { .. }
            | Exit::Rdpmc
            | Exit::Rsm
            | Exit::Seamcall
            | Exit::Tdcall => VmExit::Forbidden,
            // What no control asked for, and what is newer than this.
            other => {
                let unsupported = UnsupportedExit::read(other, self.reason, &self.processor)?;
                return Err(VcpuError::Unsupported(unsupported));
            }
        }))
    }

    fn ecx_and_edx_eax(&self) -> (u32, u64) {
        let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
        (rcx as u32, rdx << 32 | rax & 0xFFFF_FFFF)
    }

    /// An event whose delivery the exit interrupted goes first at the next entry.
    pub(super) fn take_up_interrupted_event(&mut self) -> Result<(), VcpuError> {
        if let Some(event) = interrupted_delivery(&self.processor)? {
            if event == Event::Nmi {
                // Its delivery blocks NMIs, and the entry that delivers it again must not find
                // them blocked (SDM vol. 3C, 29.3.1.5).
                let state = self.interruptibility();
                let open = state - Interruptibility::BLOCKING_BY_NMI;
                self.cache.set_interruptibility(open);
            }
            self.inject(event);
        }
        Ok(())
    }

    fn exception(&mut self, reason: ExitReason) -> Result<Option<VmExit>, VcpuError> {
        let exit = Exit::decode(reason, &self.processor)?;
        let Exit::Exception {
            information,
            error_code,
            qualification,
        } = exit
        else {
            return self.classify(exit);
        };
        if information.event_type() == EventType::Nmi {
            self.processor.take_nmi();
            return Ok(Some(VmExit::Interrupted));
        }
        let interrupted = interrupted_delivery(&self.processor)?;
        if information.nmi_unblocking_by_iret() && interrupted.is_none() {
            self.block_nmis_again();
        }
        let known = Exception::from_vector(information.vector());
        if known == Some(Exception::MachineCheck) {
            self.processor.take_machine_check();
            return Ok(Some(VmExit::Interrupted));
        }
        if known == Some(Exception::PageFault) && self.shadow.is_some() {
            return self.shadow_fault(Gva(qualification), error_code, interrupted);
        }
        if known == Some(Exception::Debug) {
            self.debug_exception(DebugQualification::from_bits_retain(qualification))?;
        }
        self.reflect(information, error_code, interrupted)
    }

    /// An intercepted exception goes back to the guest, together with what it interrupted.
    fn reflect(
        &mut self,
        information: InterruptionInformation,
        error_code: u32,
        interrupted: Option<Event>,
    ) -> Result<Option<VmExit>, VcpuError> {
        let length = match information.event_type() {
            EventType::HardwareException => 0,
            _ => self.processor.get(fields::EXIT_INSTRUCTION_LENGTH)?,
        };
        let event = information.event(error_code, length);
        let (Some(event), Some(exception)) = (event, Exception::from_vector(information.vector()))
        else {
            return Ok(Some(VmExit::Exception {
                vector: information.vector(),
                error_code: information.has_error_code().then_some(error_code),
            }));
        };
        self.inject_after(event, exception, interrupted)
    }

    /// An exception goes to whoever runs, combined with the one whose delivery it interrupted. A double
    /// fault, and what becomes of a third, a guest hypervisor may want to see.
    pub(super) fn inject_after(
        &mut self,
        event: Event,
        exception: Exception,
        interrupted: Option<Event>,
    ) -> Result<Option<VmExit>, VcpuError> {
        if interrupted == Some(Event::Nmi) {
            // Its delivery has begun, and is not made again.
            self.block_nmis_again();
        }
        let combined = interrupted.map_or(Combined::Serial, |first| first.combine(exception));
        let event = match combined {
            Combined::Serial => event,
            // "A VM exit is not considered to occur during event delivery" if the original event leads
            // to a double fault that exits, or to a triple fault (SDM vol. 3C, 30.2.4).
            Combined::DoubleFault | Combined::Shutdown => {
                self.call_off_delivery()?;
                Event::fault_with(Exception::DoubleFault, 0)
            }
        };
        if combined == Combined::Shutdown {
            if self.level == Level::L1 {
                return Ok(Some(VmExit::Shutdown));
            }
            self.l2_exits_by_triple_fault()?;
            return Ok(None);
        }
        let is_l2 = self.level != Level::L1;
        let asks = is_l2 && combined == Combined::DoubleFault;
        if !asks || !self.l2_exits_by_exception(event, None) {
            self.inject(event);
        }
        Ok(None)
    }

    /// As [`Self::inject_after`], after what the next entry would deliver: the event whose delivery the
    /// last exit interrupted.
    pub(super) fn inject_after_what_is_due(
        &mut self,
        event: Event,
    ) -> Result<Option<VmExit>, VcpuError> {
        let Some(exception) = Exception::from_vector(event.vector()) else {
            self.inject(event);
            return Ok(None);
        };
        let interrupted = self.due_event()?;
        self.inject_after(event, exception, interrupted)
    }

    /// What a #DB does to the debug registers, which it does not when it exits (SDM vol. 3C, 30.1).
    fn debug_exception(&mut self, cause: DebugQualification) -> Result<(), VcpuError> {
        let dr6 = cause.into_dr6(self.processor.dr6());
        self.processor.set_dr6(dr6);
        let dr7 = self.processor.get(fields::GUEST_DR7)?;
        if dr7 & DR7_GENERAL_DETECT != 0 {
            self.processor
                .set(fields::GUEST_DR7, dr7 & !DR7_GENERAL_DETECT)?;
        }
        if cause.contains(DebugQualification::BS) {
            self.watchful = true;
        }
        // In a shadow of STI or MOV SS, an entry with TF set demands that a single step is pending
        // (SDM vol. 3C, 29.3.1.5).
        let stepping = self.cached(Cached::Rflags) & RFlags::TRAP_FLAG.bits() != 0;
        if stepping && self.interruptibility().intersects(cache::SHADOW) {
            let pending = self.processor.get(fields::GUEST_PENDING_DEBUG)?;
            let pending = pending | PendingDebug::BS.bits();
            self.processor.set(fields::GUEST_PENDING_DEBUG, pending)?;
        }
        Ok(())
    }

    /// An IRET had unblocked NMIs when it met a fault, and will be executed again (SDM vol. 3C,
    /// 30.2.3).
    pub(super) fn block_nmis_again(&mut self) {
        let state = self.interruptibility() | Interruptibility::BLOCKING_BY_NMI;
        self.cache.set_interruptibility(state);
    }

    fn memory_exit(&mut self, violation: &EptViolation) -> Result<VmExit, VcpuError> {
        use EptQualification as Q;
        let cause = violation.qualification;
        if cause.contains(Q::NMI_UNBLOCKING_BY_IRET) && self.due_event()?.is_none() {
            self.block_nmis_again();
        }
        Ok(VmExit::Memory(MemoryAccess {
            gpa: violation.gpa,
            gva: violation.linear,
            write: cause.contains(Q::WRITE),
            fetch: cause.contains(Q::FETCH),
            table: violation.linear.is_some() && !cause.contains(Q::TRANSLATED),
        }))
    }

    /// MOV to CR0 or CR4 that changes what belongs to the hypervisor. Of the guest's own no other
    /// access to a control register exits; of its guests' those to CR8 do, and to CR3 where it asked
    /// for exits but for some values, or where they are on shadow paging.
    fn move_to_control_register(&mut self, access: CrAccess) -> Result<Option<VmExit>, VcpuError> {
        if self.shadow.is_some() && self.level == Level::L1 {
            return self.shadow_register_access(access);
        }
        let (register, source) = match access {
            CrAccess::MovTo {
                register: register @ (0 | 3 | 4 | 8),
                source,
            } => (register, source),
            CrAccess::MovFrom {
                register: register @ (3 | 8),
                destination,
            } => {
                let value = match register {
                    3 => self.processor.get(fields::GUEST_CR3)?,
                    _ => u64::from(self.task_priority()),
                };
                let mask = if self.is_long_code() {
                    u64::MAX
                } else {
                    0xFFFF_FFFF
                };
                self.load_rsp();
                self.registers.gprs[destination] = value & mask;
                self.advance();
                return Ok(None);
            }
            _ => return Ok(Some(VmExit::ControlRegister)),
        };
        if source == Gpr::Rsp {
            self.load_rsp();
        }
        let cs_long = self.is_long_code();
        let operand = self.registers.gprs[source];
        let value = if cs_long {
            operand
        } else {
            operand & 0xFFFF_FFFF
        };
        match register {
            3 => return self.move_to_cr3(value),
            8 if value > 15 => {
                return Ok(self.raise(Event::GP0, None));
            }
            8 => {
                self.set_task_priority(value as u8);
                self.advance();
                // What the old priority held back may be due.
                return Ok(Some(VmExit::InterruptWindow));
            }
            _ => {}
        }
        let old = self.mode();
        let value = self.moved_value(register, value, &old)?;
        let new = if register == 0 {
            // What counts for entering IA-32e mode is the bit as it is, in whatever mode.
            let rights = self.processor.get(fields::GUEST_CS_ACCESS_RIGHTS)?;
            old.with_cr0(value, rights & SegmentAttributes::LONG.bits() != 0)
        } else {
            old.with_cr4(value, self.imposed.cr4_guest)
        };
        let Some(new) = new.filter(|new| self.vmx_allows(new)) else {
            return Ok(self.raise(Event::GP0, None));
        };
        if new.loads_pdptes(&old) {
            let cr3 = self.processor.get(fields::GUEST_CR3)?;
            if !self.load_pdptes(cr3)? {
                return Ok(self.raise(Event::GP0, None));
            }
        }
        if new.efer & !old.efer & LMA != 0 {
            self.widen_task_register()?;
        }
        self.set_mode(new)?;
        self.advance();
        Ok(None)
    }

    /// The page-directory pointers that CR3 points to; `false` if they do not suit.
    fn load_pdptes(&mut self, cr3: u64) -> Result<bool, VcpuError> {
        let pdptes = self.page_directory_pointers(cr3);
        let valid = pdptes_are_valid(&pdptes, self.caps.processor.physical_address_bits);
        if valid {
            self.write_pdptes(&pdptes)?;
        }
        Ok(valid)
    }

    /// MOV to CR3 of a value for which L1 wants no exit, though it does for others. Bit 63 of it, with
    /// PCIDs, only asks that translations be kept.
    fn move_to_cr3(&mut self, value: u64) -> Result<Option<VmExit>, VcpuError> {
        let keep = 1 << 63;
        let mode = self.mode();
        let pcid = mode.cr4 & Cr4Flags::PCID.bits() != 0;
        let cr3 = if pcid { value & !keep } else { value };
        let wide = self.caps.processor.exceeds_physical(cr3);
        let long = mode.efer & LMA != 0;
        if long && wide || mode.pae_paging() && !self.load_pdptes(cr3)? {
            return Ok(self.raise(Event::GP0, None));
        }
        self.processor.set(fields::GUEST_CR3, cr3)?;
        self.forget_translations()?;
        self.advance();
        Ok(None)
    }

    /// A guest may enter IA-32e mode with a 16-bit TSS in TR, but an entry in this mode takes only
    /// the type of the 64-bit one (SDM vol. 3C, 29.3.1.2).
    pub(super) fn widen_task_register(&mut self) -> Result<(), VcpuError> {
        const BUSY_TSS: u32 = 11;
        let field = state::segment_fields(SegmentRegister::Tr).access_rights;
        let rights = self.processor.get(field)?;
        if rights & 0xF != BUSY_TSS {
            self.processor.set(field, (rights & !0xF) | BUSY_TSS)?;
        }
        Ok(())
    }
}

/// An access to the local APIC's page that the processor does not virtualize.
fn apic_access(access: ApicAccess) -> MemoryAccess {
    MemoryAccess {
        gpa: APIC_PAGE.wrapping_add(access.offset.into()),
        gva: None,
        write: access.kind == ApicAccessKind::Write,
        fetch: access.kind == ApicAccessKind::Fetch,
        table: false,
    }
}

fn port_exit(access: IoAccess, string: bool) -> VmExit {
    let port = PortAccess {
        port: access.port,
        size: access.size,
        write: !access.input,
    };
    if string {
        VmExit::StringPort(port)
    } else {
        VmExit::Port(port)
    }
}
