//! Entering the guest, and settling why it came out.

use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::regs::{CpuMode, SegmentRegister};
use testudo_arch::{Cr0Flags, Event, Exception, Gprs, GuestMemory, Gva, Msr, PAGE_SIZE, PageSize};
use testudo_ept::walk::{Access, AccessKind, walk_nested};
use testudo_nested::svm::{Instruction, SecondStage};
use testudo_svm::event::{Combined, RawEvent};
use testudo_svm::exit::{
    ExceptionInfo, ExitCode, NestedFaultBits, NestedPageFault, PortAccess as SvmPort,
};
use testudo_svm::intercept::Misc1;
use testudo_svm::{Exit, Vmcb};

use super::{CS_LONG, LMA, LME, Processor, SvmVcpu, set_rip};
use crate::code_cache::FetchKey;
use crate::emulate;
use crate::guest_cpu::paging_state;
use crate::vcpu::{MemoryAccess, PortAccess, Vcpu, VcpuError, VmExit};

impl<M: GuestMemory, S: SecondStage, P: Processor> SvmVcpu<'_, M, S, P> {
    /// Goes on after an exit of a quiet guest.
    #[inline(never)]
    pub(super) fn run_on(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        match self.settle() {
            Some(exit) => {
                // What the exit interrupted is due again; else there is nothing new.
                self.is_quiet = !self.vmcb01.event_inj().is_valid();
                Ok(exit)
            }
            None => {
                self.is_quiet = false;
                self.run_watchfully(requests)
            }
        }
    }

    /// Runs whatever is to run, with regard to all that may have happened.
    #[inline(never)]
    pub(super) fn run_watchfully(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        loop {
            // Interrupts are held back: what comes after this test makes the guest exit at once.
            if requests.load(Ordering::Acquire) != 0 {
                self.ends_next = false;
                return Ok(VmExit::Interrupted);
            }
            if self.is_delivery_due() {
                return Ok(VmExit::DeliveryDue);
            }
            let exit = match &self.nested {
                Some(nested) if nested.state.is_guest() => {
                    if self.shadow.is_some() {
                        self.shadow_failure()?;
                    }
                    self.run_l2()
                }
                _ => {
                    if self.shadow.is_some() {
                        self.shadow_failure()?;
                    }
                    self.enter_l1();
                    // CPUID needs no more than this, and never interrupts an event.
                    if self.vmcb01.exit_code() == ExitCode::CPUID.0 {
                        Some(VmExit::Cpuid)
                    } else {
                        self.settle()
                    }
                }
            };
            if let Some(exit) = exit {
                self.is_quiet = self.becomes_quiet();
                return Ok(exit);
            }
        }
    }

    /// Whether the machine is to be told first that the next entry delivers an event and ends.
    #[inline]
    fn is_delivery_due(&mut self) -> bool {
        let wanted = core::mem::take(&mut self.delivery_due)
            || self.ends_deliveries && self.vmcb().event_inj().is_interrupt();
        self.ends_next = wanted && !self.ends_next;
        self.ends_next
    }

    /// Whether the next entry has nothing to look at, unless something happens.
    fn becomes_quiet(&self) -> bool {
        let paging = self.vmcb01.cr0() & Cr0Flags::PAGING.bits() != 0;
        self.nested.is_none()
            && self.gate.is_none()
            && self.unmasking_iret.is_none()
            && (paging || !self.hides_lme)
            && !self.vmcb01.event_inj().is_valid()
            && !self.l1_asid.is_flush_pending()
    }

    /// Enters the guest by its VMCB as it is.
    #[inline(always)]
    pub(super) fn enter_vmcb01(&mut self) {
        // SAFETY: `new` set the intercepts that `enter` lists, and nothing removes one but the
        // nested layer, where the processor virtualizes what they guard; the rest is what the
        // caller of `new` promised.
        #[allow(unsafe_code, reason = "the entry; see `new`")]
        unsafe {
            self.processor.enter(&mut self.vmcb01, &mut self.registers);
        }
        self.next_rip = if self.saves_next_rip {
            self.vmcb01.n_rip()
        } else {
            0
        };
    }

    /// Runs the guest once.
    #[inline]
    fn enter_l1(&mut self) {
        self.enter_gate();
        if self.nested.is_some() {
            self.prepare_l1();
        } else {
            self.asids.prepare(&mut self.l1_asid, &mut self.vmcb01);
        }
        let hidden = self.hides_lme && hide_lme(&mut self.vmcb01);
        self.enter_vmcb01();
        show_lme(&mut self.vmcb01, hidden);
        self.leave_gate();
        self.vmcb01.set_event_inj(RawEvent::NONE);
        if let Some(at) = self.unmasking_iret {
            self.note_progress(at);
        }
    }

    /// What the machine must decide about the guest's exit; `None` if it is settled here.
    #[inline(never)]
    pub(super) fn settle(&mut self) -> Option<VmExit> {
        let exit = Exit::read(&self.vmcb01);
        if let Exit::Exception(exception) = exit {
            if self.shadow.is_some() && exception.vector == Exception::PageFault.vector() {
                return self.shadow_fault(exception);
            }
            return self.reflect(exception);
        }
        // An event whose delivery the exit interrupted goes first at the next entry.
        let interrupted = self.vmcb01.exit_int_info();
        if interrupted.is_valid() {
            let again = interrupted
                .to_redeliver()
                .map_or(RawEvent::NONE, RawEvent::from);
            self.vmcb01.set_event_inj(again);
        }
        self.classify(exit)
    }

    /// An exit that is not an exception, of whatever runs.
    pub(super) fn classify(&mut self, exit: Exit) -> Option<VmExit> {
        Some(match exit {
            Exit::Cpuid => VmExit::Cpuid,
            Exit::Rdmsr => VmExit::ReadMsr(Msr(self.registers.gprs.rcx as u32)),
            Exit::Wrmsr => {
                let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
                VmExit::WriteMsr(Msr(rcx as u32), rdx << 32 | rax & 0xFFFF_FFFF)
            }
            Exit::Interrupt | Exit::Nmi => {
                self.processor.take_pending();
                VmExit::Interrupted
            }
            Exit::NestedPageFault(fault) => memory_exit(fault),
            Exit::Port(access) => {
                // "EXITINFO2 contains the rIP of the instruction following the IN/OUT" (APM vol. 2,
                // 15.10.2), on all processors.
                self.next_rip = access.next_rip;
                port_exit(access)
            }
            Exit::Hlt if self.l2_wakes_at_once() => VmExit::Idle,
            Exit::Hlt => VmExit::Halt,
            Exit::VirtualInterrupt => {
                self.set_interrupt_window(None);
                VmExit::InterruptWindow
            }
            Exit::Vmmcall => VmExit::Hypercall,
            Exit::Iret => {
                self.iret();
                return None;
            }
            Exit::Xsetbv => {
                let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
                VmExit::SetXcr {
                    index: rcx as u32,
                    value: rdx << 32 | rax & 0xFFFF_FFFF,
                }
            }
            Exit::Wbinvd | Exit::Invd => VmExit::CacheFlush,
            Exit::Shutdown => VmExit::Shutdown,
            Exit::Invalid => VmExit::InvalidState,
            Exit::Vmrun => return self.svm_instruction(Instruction::Vmrun),
            Exit::Vmload => return self.svm_instruction(Instruction::Vmload),
            Exit::Vmsave => return self.svm_instruction(Instruction::Vmsave),
            Exit::Stgi => return self.svm_instruction(Instruction::Stgi),
            Exit::Clgi => return self.svm_instruction(Instruction::Clgi),
            Exit::Skinit => return self.svm_instruction(Instruction::Skinit),
            Exit::Invlpga => return self.svm_instruction(Instruction::Invlpga),
            Exit::Cr(access) if self.hides_lme && access.register == 0 => VmExit::ControlRegister,
            Exit::Cr(_) | Exit::Invlpg { .. } if self.shadow.is_some() => VmExit::ControlRegister,
            Exit::Invpcid { .. } if self.shadow.is_some() => VmExit::Forbidden,
            Exit::Invlpgb { .. }
            | Exit::Tlbsync
            | Exit::Mcommit
            | Exit::Monitor
            | Exit::Mwait { .. }
            | Exit::Rdpmc
            | Exit::Rdpru
            | Exit::Rsm => VmExit::Forbidden,
            _ => {
                let vmcb = self.vmcb();
                VmExit::Unknown {
                    code: vmcb.exit_code(),
                    info: [vmcb.exit_info1(), vmcb.exit_info2()],
                }
            }
        })
    }

    /// An intercepted exception goes back to whatever runs, together with what it interrupted.
    pub(super) fn reflect(&mut self, exception: ExceptionInfo) -> Option<VmExit> {
        let Some(known) = Exception::from_vector(exception.vector) else {
            return Some(VmExit::Exception {
                vector: exception.vector,
                error_code: exception.error_code,
            });
        };
        let interrupted = self.vmcb().exit_int_info();
        self.inject_after(exception.to_event(), known, interrupted)
    }

    /// An exception goes to whatever runs, combined with the event whose delivery it interrupted. A
    /// double fault, and what becomes of a third, a guest hypervisor may want to see.
    pub(super) fn inject_after(
        &mut self,
        event: Event,
        exception: Exception,
        interrupted: RawEvent,
    ) -> Option<VmExit> {
        let combined = interrupted.combine(exception);
        let event = match combined {
            Combined::Serial => event,
            // Both faults are in it: nothing is left whose delivery it interrupted.
            Combined::DoubleFault | Combined::Shutdown => {
                self.vmcb_mut().set_event_inj(RawEvent::NONE);
                Event::fault_with(Exception::DoubleFault, 0)
            }
        };
        if combined == Combined::Shutdown {
            return (!self.l2_exits(ExitCode::SHUTDOWN, 0, 0)).then_some(VmExit::Shutdown);
        }
        if combined == Combined::Serial || !self.l2_exits_by(event, None) {
            self.vmcb_mut().set_event_inj(event.into());
        }
        None
    }

    /// The end of an NMI's handler is near: its IRET was intercepted.
    fn iret(&mut self) {
        let vmcb = self.vmcb_mut();
        let misc1 = vmcb.intercept_misc1() - Misc1::IRET;
        vmcb.set_intercept_misc1(misc1);
        self.unmasking_iret = Some(self.vmcb().rip());
    }

    /// The intercept of IRET comes before the instruction: NMIs stay masked until the guest was
    /// seen elsewhere.
    fn note_progress(&mut self, iret: u64) {
        if self.vmcb01.rip() != iret {
            self.unmasking_iret = None;
            self.nmi_masked = false;
        }
    }

    /// Ends the instruction that exited.
    #[inline(never)]
    pub(super) fn advance_any(&mut self) {
        let next = self.next_instruction();
        set_rip(self.vmcb_mut(), next);
    }

    /// The address behind the instruction that exited, of a quiet guest, if it is known already.
    #[inline]
    pub(super) fn quiet_next_instruction(&self) -> Option<u64> {
        if self.next_rip != 0 {
            return Some(self.next_rip);
        }
        let vmcb = &self.vmcb01;
        let key = FetchKey {
            rip: vmcb.rip(),
            cr3: vmcb.cr3(),
            cr4: vmcb.cr4(),
        };
        let length = self.code_cache.length(&key).filter(|_| is_long(vmcb))?;
        Some(key.rip.wrapping_add(u64::from(length)))
    }

    /// The address behind the instruction that exited.
    #[inline]
    pub(super) fn next_instruction(&mut self) -> u64 {
        if self.next_rip != 0 {
            return self.next_rip;
        }
        let vmcb = self.vmcb();
        let (cr3, cr4) = self.visible_cr3_and_cr4();
        let rip = vmcb.rip();
        let key = FetchKey { rip, cr3, cr4 };
        let long = is_long(vmcb);
        let length = match self.code_cache.length(&key) {
            Some(length) if long => length,
            _ => self.measure_instruction(key),
        };
        key.rip.wrapping_add(u64::from(length))
    }

    /// The length of the instruction that exited, from its bytes: in any mode, also across pages.
    #[inline(never)]
    fn measure_instruction(&mut self, key: FetchKey) -> u8 {
        let system = self.system();
        let mode = system.mode();
        let paging = paging_state(&system, 0, self.physical_bits);
        let linear = match mode {
            CpuMode::Long64 => system.rip,
            _ => system.cs.base.wrapping_add(system.rip) & 0xFFFF_FFFF,
        };
        // What L2's addresses mean depends on L1's tables too, which the cache does not watch.
        let direct = self
            .nested
            .as_ref()
            .is_none_or(|nested| !nested.state.is_guest());
        let mut code = [0; emulate::MAX_LENGTH];
        let mut have = 0;
        let access = Access::at_cpl(AccessKind::Fetch, system.cpl());
        let memory = self.memory;
        while have < code.len() {
            let at = Gva(linear).wrapping_add(have as u64);
            // It has been fetched: what its tables allow is settled.
            let mut second = |gpa| match &mut self.nested {
                Some(nested) if nested.state.is_nested_paging() => {
                    nested.stage.translate(gpa, false)
                }
                _ => Some(gpa),
            };
            let stage = |gpa, _| second(gpa).ok_or(());
            let Ok(found) = walk_nested(memory, &paging, at, access, stage) else {
                break;
            };
            let Some(gpa) = second(found.gpa) else {
                break;
            };
            let room = (PAGE_SIZE - at.offset_in(PageSize::Size4K)) as usize;
            let part = room.min(code.len() - have);
            if memory.read(gpa, &mut code[have..have + part]).is_err() {
                break;
            }
            if let Some(length) = emulate::length(&code[..have + part], mode) {
                if have == 0 && direct && mode == CpuMode::Long64 {
                    let code = &code[..usize::from(length)];
                    self.code_cache.remember(memory, key, &found, code);
                }
                return length;
            }
            have += part;
        }
        // The processor fetched and decoded it a moment ago: only another processor that changes
        // the code can lead here, and then the guest goes on at whatever it put there.
        0
    }
}

/// Takes EFER.LME out of a VMCB whose guest has paging off, for the time of one entry; says whether
/// it was there.
#[inline]
pub(super) fn hide_lme(vmcb: &mut Vmcb) -> bool {
    let hidden = vmcb.efer() & LME != 0 && vmcb.cr0() & Cr0Flags::PAGING.bits() == 0;
    if hidden {
        vmcb.set_efer(vmcb.efer() & !LME);
    }
    hidden
}

/// Puts back what [`hide_lme`] took. No exit is needed in between: the guest's writes to EFER and
/// CR0 are exits.
#[inline]
pub(super) fn show_lme(vmcb: &mut Vmcb, hidden: bool) {
    if hidden {
        vmcb.set_efer(vmcb.efer() | LME);
    }
}

/// Whether the code is of 64-bit mode.
#[inline]
fn is_long(vmcb: &Vmcb) -> bool {
    vmcb.raw_segment(SegmentRegister::Cs).attributes & CS_LONG != 0 && vmcb.efer() & LMA != 0
}

fn port_exit(access: SvmPort) -> VmExit {
    let port = PortAccess {
        port: access.port,
        size: access.size,
        write: !access.input,
    };
    if access.string {
        VmExit::StringPort(port)
    } else {
        VmExit::Port(port)
    }
}

pub(super) fn memory_exit(fault: NestedPageFault) -> VmExit {
    VmExit::Memory(MemoryAccess {
        gpa: fault.gpa,
        gva: None,
        write: fault.bits.contains(NestedFaultBits::WRITE),
        fetch: fault.bits.contains(NestedFaultBits::FETCH),
        table: fault.bits.contains(NestedFaultBits::TABLE_WALK),
    })
}
