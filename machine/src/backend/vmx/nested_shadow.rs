//! A guest hypervisor (L1) on shadow paging, and its guest (L2): which registers the VMCSs hold, and
//! whose a page fault of L2 is.

use core::ops::ControlFlow;

use testudo_arch::{Event, Exception, GuestMemory, Gva};
use testudo_ept::shadow::Outcome;
use testudo_nested::vmx::{Handled, PageFaultOf, SecondStage};
use testudo_vmx::event::{EventType, InterruptionInformation, interrupted_delivery};
use testudo_vmx::exit::BasicReason;
use testudo_vmx::fields;

use super::cache::Cached;
use super::mode::Mode;
use super::setup::PAT_RESET;
use super::{Level, Processor, VmxVcpu};
use crate::vcpu::{Vcpu, VcpuError, VmExit};

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// Puts L1's own paging registers into its VMCS: before the nested layer looks at them, and while L2
    /// runs.
    pub(super) fn take_off_l1_shadow(&mut self) -> Result<(), VcpuError> {
        if self.shadow.as_ref().is_none_or(|shadow| shadow.is_l1_off) {
            return Ok(());
        }
        let mode = self.mode();
        self.write_mode(mode, mode)?;
        if let Some(shadow) = &mut self.shadow {
            shadow.is_l1_off = true;
            self.processor.set(fields::GUEST_CR3, shadow.paging.cr3())?;
            self.processor.set(fields::GUEST_PAT, shadow.pat)?;
        }
        Ok(())
    }

    /// Takes up what L1's VMCS says of its paging, and puts the processor's registers there: L1 runs next.
    pub(super) fn put_on_l1_shadow(&mut self) -> Result<(), VcpuError> {
        if self.shadow.as_ref().is_none_or(|shadow| !shadow.is_l1_off) {
            return Ok(());
        }
        self.mode = Mode {
            cr0: self.processor.get(fields::CR0_READ_SHADOW)?,
            cr4: self.processor.get(fields::CR4_READ_SHADOW)?,
            efer: self.processor.get(fields::GUEST_EFER)?,
        };
        let mode = self.mode();
        let cr3 = self.processor.get(fields::GUEST_CR3)?;
        let pat = self.processor.get(fields::GUEST_PAT)?;
        if let Some(shadow) = &mut self.shadow {
            shadow.is_l1_off = false;
            shadow.pat = pat;
            let is_stale = core::mem::take(&mut shadow.is_l1_stale);
            if is_stale || shadow.paging.mode() != mode || shadow.paging.cr3() != cr3 {
                shadow.paging.set(&self.memory, mode, cr3);
            }
        }
        self.processor.set(fields::GUEST_PAT, PAT_RESET)?;
        self.apply_shadow()
    }

    /// L1's linear translations are dropped, or loaded anew, before it runs.
    pub(super) fn forget_l1_shadow(&mut self) {
        if let Some(shadow) = &mut self.shadow {
            shadow.is_l1_stale = true;
        }
    }

    /// If L2 is meant, its linear translations are dropped before it runs again.
    pub(super) fn forget_l2_shadow(&mut self) {
        if let Some(shadow) = self.shadow.as_mut().filter(|_| self.level != Level::L1) {
            shadow.is_l2_stale = true;
        }
    }

    /// An entry in PAE paging loads the page-directory pointers, whatever was there before.
    pub(super) fn note_l2_entry(&mut self) -> Result<(), VcpuError> {
        if self.l2_mode()?.pae_paging() {
            self.forget_l2_shadow();
        }
        Ok(())
    }

    /// Runs L2 once. A page fault is settled, and leaves what the machine must decide; any other exit is yet
    /// to be.
    #[cold]
    #[inline(never)]
    pub(super) fn run_l2_on_shadow(&mut self) -> Result<ControlFlow<Option<VmExit>>, VcpuError> {
        self.put_on_l2_shadow()?;
        let reason = self.enter()?;
        self.take_off_l2_shadow()?;
        if reason.basic() == BasicReason::ExceptionOrNmi {
            let information = self.processor.get(fields::EXIT_INTERRUPTION_INFORMATION)?;
            let information = InterruptionInformation(information);
            if information.event_type() == EventType::HardwareException
                && information.vector() == Exception::PageFault.vector()
            {
                return self.l2_shadow_fault(information).map(ControlFlow::Break);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Has the processor's paging registers in L2's VMCS, for an entry.
    fn put_on_l2_shadow(&mut self) -> Result<(), VcpuError> {
        let seen = self.l2_mode()?;
        let cr3 = self.processor.get(fields::GUEST_CR3)?;
        let pat = self.processor.get(fields::GUEST_PAT)?;
        let Some(shadow) = &mut self.shadow else {
            return Ok(());
        };
        shadow.l2_pat = pat;
        let is_stale = core::mem::take(&mut shadow.is_l2_stale);
        let paging = &mut shadow.l2;
        if is_stale || paging.mode() != seen || paging.cr3() != cr3 {
            paging.set(&self.memory, seen, cr3);
        }
        let (real, root) = paging.hardware();
        let (cr0, cr4) = (
            self.imposed.real_cr0(real.cr0),
            self.imposed.real_cr4(real.cr4),
        );
        self.processor.set(fields::GUEST_CR0, cr0)?;
        self.processor.set(fields::GUEST_CR3, root)?;
        self.processor.set(fields::GUEST_CR4, cr4)?;
        self.processor.set(fields::GUEST_EFER, real.efer)?;
        Ok(self.processor.set(fields::GUEST_PAT, PAT_RESET)?)
    }

    /// Puts L2's own registers back, after its turn: it has changed none of these by itself. What CR0 and
    /// CR4 are to it is in their read shadows.
    fn take_off_l2_shadow(&mut self) -> Result<(), VcpuError> {
        let Some(shadow) = &self.shadow else {
            return Ok(());
        };
        let (efer, cr3) = (shadow.l2.mode().efer, shadow.l2.cr3());
        self.processor.set(fields::GUEST_CR3, cr3)?;
        self.processor.set(fields::GUEST_EFER, efer)?;
        Ok(self.processor.set(fields::GUEST_PAT, shadow.l2_pat)?)
    }

    /// A page fault of L2: of the shadow tables, of the tables that L1 gave it, or an access that the
    /// machine must make.
    fn l2_shadow_fault(
        &mut self,
        information: InterruptionInformation,
    ) -> Result<Option<VmExit>, VcpuError> {
        let address = Gva(self.processor.get(fields::EXIT_QUALIFICATION)?);
        let code = self.processor.get(fields::EXIT_INTERRUPTION_ERROR_CODE)?;
        let interrupted = interrupted_delivery(&self.processor)?;
        let context = (self.cpl(), self.cached(Cached::Rflags), self.pkru());
        let Some(shadow) = &mut self.shadow else {
            return Ok(None);
        };
        let outcome = shadow.l2.fault(address, code, context);
        let whose = match outcome {
            Some(Outcome::Inject(fault)) => PageFaultOf::L2 {
                address: fault.address.0,
                code: fault.code.bits(),
            },
            _ => PageFaultOf::L0,
        };
        match (self.exited_by_page_fault(whose)?, whose) {
            (Handled::L1(barrier), _) => {
                self.discharge(barrier);
                self.return_to_l1()?;
                Ok(None)
            }
            (Handled::Abort, _) => Ok(Some(VmExit::Shutdown)),
            (Handled::L0, PageFaultOf::L2 { address, code }) => {
                self.set_cr2(address);
                let fault = Event::fault_with(Exception::PageFault, code);
                self.inject_after(fault, Exception::PageFault, interrupted)
            }
            _ => {
                if information.nmi_unblocking_by_iret() && interrupted.is_none() {
                    self.block_nmis_again();
                }
                if outcome == Some(Outcome::NonCanonical) {
                    return Ok(self.raise(Event::GP0, None));
                }
                let delivering = interrupted.is_some();
                let paging = self.shadow.as_ref().map(|shadow| &shadow.l2);
                Ok(paging.and_then(|p| p.machine_access(outcome?, address, code, delivering)))
            }
        }
    }
}
