//! Guests on shadow paging, for processors without EPT or without unrestricted guests.
//!
//! Page faults, INVLPG, all accesses to CR3, and changes of CR0 and CR4 exit. The processor runs with
//! paging and protection whatever the guest has: it takes no other guest without "unrestricted
//! guest". In real mode, and until it has loaded its segments in protected mode, it is emulated.
//!
//! A guest of the guest's (L2) runs likewise: the tables that its hypervisor (L1) has made for it, in
//! L1's memory, are those that ours are made from. The processor's own paging registers are in L2's
//! VMCS from just before an entry until just after it, and in L1's VMCS while L1 runs; else they hold
//! what L1 gave L2, and L1's own, by which the nested layer finds its way in L1's memory.

use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Event, Exception, Gpa, Gpr, GuestMemory, Gva};
use testudo_ept::shadow::Outcome;
use testudo_nested::vmx::SecondStage;
use testudo_vmx::check::check_entry;
use testudo_vmx::exit::CrAccess;
use testudo_vmx::fields;

use super::cache::Cached;
use super::mode::{GUEST_EFER, LMA, Mode, PE};
use super::setup::PAT_RESET;
use super::{Level, Processor, VmxVcpu};
use crate::backend::paging::{GuestPaging, ShadowPlace};
use crate::vcpu::{Vcpu, VcpuError, VmExit};

/// What a vCPU has on shadow paging.
pub(super) struct Shadow<'a> {
    pub(super) paging: GuestPaging<'a>,
    /// The paging of the guest's own guest.
    pub(super) l2: GuestPaging<'a>,
    /// The guest's page attribute table, which acts on nothing: all its memory is write-back.
    pub(super) pat: u64,
    /// That of its own guest.
    pub(super) l2_pat: u64,
    /// L1's VMCS holds L1's own paging registers, and not the processor's.
    pub(super) is_l1_off: bool,
    /// Translations of L1's were dropped, or its page-directory pointers loaded: what its tables say is to
    /// be taken up before it runs.
    pub(super) is_l1_stale: bool,
    /// The same of L2.
    pub(super) is_l2_stale: bool,
    /// The processor does not take the guest as it is: it is in real mode, or its segments are still
    /// real mode's.
    outside: bool,
}

impl<'a> Shadow<'a> {
    pub(super) fn new(place: ShadowPlace<'a>) -> Self {
        let paging = GuestPaging::new(place);
        Self {
            l2: paging.of_nested(),
            paging,
            pat: PAT_RESET,
            l2_pat: PAT_RESET,
            is_l1_off: false,
            is_l1_stale: false,
            is_l2_stale: true,
            outside: true,
        }
    }
}

impl<'a, P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'a, P, M, S> {
    /// Before the guest runs: through the gate, and without the translations that are no longer
    /// true.
    #[inline]
    pub(super) fn enter_gate(&mut self) -> Result<(), VcpuError> {
        let failure = self.shadow.as_mut();
        let failure = failure.and_then(|s| s.paging.failure().or_else(|| s.l2.failure()));
        if let Some(error) = failure {
            return Err(error.into());
        }
        let Some(gate) = self.gate else {
            return Ok(());
        };
        while gate.enter() {
            // Whoever waits for this vCPU to leave must not wait for it to forget.
            gate.leave();
            if self.shadow.is_some() {
                self.forget_both()?;
            } else {
                self.forget_memory()?;
            }
            if self.are_frames_stale() {
                self.renew_frames()?;
            }
        }
        Ok(())
    }

    /// The guest and its own guest run on the same tables.
    fn forget_both(&mut self) -> Result<(), VcpuError> {
        let levels: &[Level] = match self.nested {
            Some(_) => &[Level::L1, Level::L2],
            None => &[Level::L1],
        };
        for &level in levels {
            let forgotten = self.processor.forget_translations(level);
            forgotten.map_err(VcpuError::Invalidation)?;
        }
        Ok(())
    }

    /// What is to be emulated, if the processor does not take the guest as it is.
    pub(super) fn outside(&mut self) -> Result<Option<VmExit>, VcpuError> {
        let Some(shadow) = self.shadow.as_ref().filter(|shadow| shadow.outside) else {
            return Ok(None);
        };
        if shadow.paging.mode().cr0 & PE == 0 {
            return Ok(Some(VmExit::Emulate(self.injection.take())));
        }
        let event = self.injection.take();
        self.prepare()?;
        if check_entry(&self.processor, self.caps)?.is_empty() {
            if let Some(shadow) = &mut self.shadow {
                shadow.outside = false;
            }
            if let Some(event) = event {
                self.inject(event);
            }
            return Ok(None);
        }
        // On the few instructions between the modes no handler can be reached.
        Ok(Some(match event {
            Some(_) => VmExit::Shutdown,
            None => VmExit::Emulate(None),
        }))
    }

    /// Whether the guest is between the modes, so that no interrupt can be delivered.
    pub(super) fn is_between_modes(&self) -> bool {
        let shadow = self.shadow.as_ref();
        shadow.is_some_and(|shadow| shadow.outside && shadow.paging.mode().cr0 & PE != 0)
    }

    /// After it ran.
    #[inline]
    pub(super) fn leave_gate(&self) {
        if let Some(gate) = self.gate {
            gate.leave();
        }
    }

    /// Takes up all of the guest's paging registers.
    pub(super) fn set_shadow_system(&mut self, system: &SystemRegisters) -> Result<(), VcpuError> {
        let Some(shadow) = &mut self.shadow else {
            return Ok(());
        };
        let mode = Mode {
            cr0: system.cr0,
            cr4: system.cr4,
            efer: system.efer,
        };
        shadow.paging.set(&self.memory, mode, system.cr3);
        shadow.outside = true;
        self.apply_shadow()
    }

    /// Brings the VMCS in line with the guest's paging registers.
    pub(super) fn apply_shadow(&mut self) -> Result<(), VcpuError> {
        let Some(shadow) = &mut self.shadow else {
            return Ok(());
        };
        let (real, root) = shadow.paging.hardware();
        let seen = shadow.paging.mode();
        shadow.outside |= seen.cr0 & PE == 0;
        self.processor.set(fields::GUEST_CR3, root)?;
        self.write_mode(seen, real)
    }

    /// CR0 as it is before one of the registers changes: some of its bits are the guest's to change, and
    /// all are written when one of the registers is.
    fn note_cr0(&mut self) {
        let cr0 = self.mode().cr0;
        if let Some(shadow) = &mut self.shadow {
            shadow.paging.note_cr0(cr0);
        }
    }

    /// What L1 has on shadow paging, while it runs: its VMCS holds the processor's registers.
    fn of_l1(&mut self) -> Option<&mut Shadow<'a>> {
        let level = self.level;
        self.shadow.as_mut().filter(|_| level == Level::L1)
    }

    /// CR3 as the guest sees it, where its VMCS has another.
    pub(super) fn shadow_cr3(&self) -> Option<u64> {
        let shadow = self.shadow.as_ref().filter(|_| self.level == Level::L1)?;
        Some(shadow.paging.cr3())
    }

    /// The guest's page attribute table, where its VMCS has another.
    pub(super) fn shadow_pat(&mut self) -> Option<&mut u64> {
        Some(&mut self.of_l1()?.pat)
    }

    /// WRMSR to EFER; `None` where the processor has it in the VMCS.
    pub(super) fn write_shadow_efer(&mut self, value: u64) -> Option<bool> {
        self.of_l1()?;
        self.note_cr0();
        let shadow = self.shadow.as_mut()?;
        let done = shadow.paging.write_efer(&self.memory, value, GUEST_EFER);
        if let Err(error) = self.apply_shadow() {
            self.remember(error);
        }
        Some(done)
    }

    /// MOV to CR0, CR3 or CR4; `false` is #GP(0).
    pub(super) fn write_shadow_register(
        &mut self,
        number: u8,
        value: u64,
    ) -> Result<bool, VcpuError> {
        let cs_long = self.is_long_code();
        let old = self.mode();
        let after = match number {
            0 => Mode { cr0: value, ..old },
            4 => Mode { cr4: value, ..old },
            _ => old,
        };
        if self.level != Level::L1 || !self.vmx_allows(&after) {
            return Ok(false);
        }
        self.note_cr0();
        let Some(shadow) = &mut self.shadow else {
            return Ok(false);
        };
        let done = shadow.paging.write(&self.memory, number, value, cs_long);
        if !done {
            return Ok(false);
        }
        self.apply_shadow()?;
        if self.mode.efer & !old.efer & LMA != 0 {
            self.widen_task_register()?;
        }
        Ok(true)
    }

    /// An access to a control register that exits on shadow paging.
    pub(super) fn shadow_register_access(
        &mut self,
        access: CrAccess,
    ) -> Result<Option<VmExit>, VcpuError> {
        let long = self.is_long_code();
        let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
        match access {
            CrAccess::MovTo { register, source } => {
                if source == Gpr::Rsp {
                    self.load_rsp();
                }
                let value = self.registers.gprs[source] & mask;
                if !self.write_shadow_register(register, value)? {
                    return Ok(self.raise(Event::GP0, None));
                }
            }
            CrAccess::MovFrom {
                register: 3,
                destination,
            } => {
                let value = self.shadow_cr3().unwrap_or_default() & mask;
                if destination == Gpr::Rsp {
                    self.load_rsp();
                }
                self.registers.gprs[destination] = value;
            }
            _ => return Ok(Some(VmExit::ControlRegister)),
        }
        self.advance();
        Ok(None)
    }

    /// INVLPG.
    pub(super) fn invalidate_shadow_page(&mut self, address: Gva) -> Result<(), VcpuError> {
        if let Some(shadow) = &self.shadow {
            match self.level {
                Level::L1 => shadow.paging.invalidate_page(address),
                _ => shadow.l2.invalidate_page(address),
            }
        }
        let forgotten = self.processor.forget_translations(self.level);
        forgotten.map_err(VcpuError::Invalidation)
    }

    /// The machine wrote guest memory.
    pub(super) fn shadow_written(&self, gpa: Gpa, len: usize) {
        if let Some(shadow) = &self.shadow {
            shadow.paging.written(gpa, len);
        }
    }

    /// Lets the guest write to a table itself.
    pub(super) fn stop_watching_shadow(&self, gpa: Gpa) -> bool {
        let shadow = self.shadow.as_ref();
        shadow.is_some_and(|shadow| shadow.paging.release(gpa))
    }

    /// A page fault: the guest's own, or one that the shadow tables are to be filled by.
    pub(super) fn shadow_fault(
        &mut self,
        address: Gva,
        code: u32,
        interrupted: Option<Event>,
    ) -> Result<Option<VmExit>, VcpuError> {
        let context = (self.cpl(), self.cached(Cached::Rflags), self.pkru());
        let Some(shadow) = &mut self.shadow else {
            return Ok(None);
        };
        let Some(outcome) = shadow.paging.fault(address, code, context) else {
            return Ok(None);
        };
        let (exception, event) = match outcome {
            Outcome::Inject(fault) => {
                self.registers.cr2 = fault.address.0;
                let code = fault.code.bits();
                let event = Event::fault_with(Exception::PageFault, code);
                (Exception::PageFault, event)
            }
            Outcome::NonCanonical => (Exception::GeneralProtection, Event::GP0),
            other => {
                let delivering = interrupted.is_some();
                self.take_up_interrupted_event()?;
                let paging = self.shadow.as_ref().map(|shadow| &shadow.paging);
                return Ok(paging.and_then(|p| p.machine_access(other, address, code, delivering)));
            }
        };
        self.inject_after(event, exception, interrupted)
    }
}
