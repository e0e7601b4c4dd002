//! Guests on shadow paging, for processors without nested paging and for those who ask.
//!
//! What the guest does to its paging registers and INVLPG is intercepted, and so are its page
//! faults. In real mode it runs with paging nevertheless, over tables that map its memory one to one
//! ("paged real mode", APM vol. 2, 15.19).

use testudo_arch::{Cr4Flags, Event, Exception, Gpa, GuestMemory, Gva};
use testudo_ept::shadow::Outcome;
use testudo_nested::svm::SecondStage;
use testudo_svm::event::{Combined, RawEvent};
use testudo_svm::exit::ExceptionInfo;
use testudo_svm::intercept::{CrIntercepts, ExceptionIntercepts, Misc1, Misc3};
use testudo_svm::vmcb::NestedControl;

use super::{CS_LONG, GUEST_EFER, LMA, SVME, SvmVcpu};
use crate::backend::mode::Mode;
use crate::backend::paging::{GuestPaging, ShadowPlace};
use crate::vcpu::{MemoryAccess, Vcpu, VcpuError, VmExit};
use testudo_arch::regs::{SegmentRegister, SystemRegisters};

impl<'a, M: GuestMemory, S: SecondStage> SvmVcpu<'a, M, S> {
    /// Puts the guest on shadow paging instead of nested paging. It cannot be a hypervisor then.
    #[must_use]
    pub fn with_shadow_paging(mut self, place: ShadowPlace<'a>) -> Self {
        let vmcb = &mut self.vmcb01;
        vmcb.set_nested_control(NestedControl::empty());
        vmcb.set_n_cr3(0);
        let exceptions = vmcb.intercept_exceptions() | ExceptionIntercepts::PF;
        vmcb.set_intercept_exceptions(exceptions);
        let misc1 = vmcb.intercept_misc1() | Misc1::INVLPG;
        vmcb.set_intercept_misc1(misc1);
        let misc3 = vmcb.intercept_misc3() | Misc3::INVPCID;
        vmcb.set_intercept_misc3(misc3);
        self.shadow = Some(GuestPaging::new(place));
        self.set_system(&SystemRegisters::reset());
        self
    }

    /// Before the guest runs: through the gate, and without the translations that are no longer
    /// true.
    #[inline]
    pub(super) fn enter_gate(&mut self) {
        if let Some(shadow) = &self.shadow
            && shadow.gate().enter()
        {
            self.l1_asid.flush();
        }
    }

    /// After it ran.
    #[inline]
    pub(super) fn leave_gate(&self) {
        if let Some(shadow) = &self.shadow {
            shadow.gate().leave();
        }
    }

    /// Why shadow paging cannot go on, if that is so.
    pub(super) fn shadow_failure(&mut self) -> Result<(), VcpuError> {
        match self.shadow.as_mut().and_then(GuestPaging::failure) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Takes up the guest's paging registers, all of them.
    pub(super) fn set_shadow_system(&mut self, system: &SystemRegisters) {
        let Some(shadow) = &mut self.shadow else {
            return;
        };
        let mode = Mode {
            cr0: system.cr0,
            cr4: system.cr4,
            efer: system.efer,
        };
        shadow.set(self.memory, mode, system.cr3);
        self.apply_shadow();
    }

    /// Brings the VMCB in line with the guest's paging registers.
    fn apply_shadow(&mut self) {
        let Some(shadow) = &self.shadow else {
            return;
        };
        let (real, root) = shadow.hardware();
        let seen = shadow.mode();
        let mut intercepts = CrIntercepts::READ_CR3
            | CrIntercepts::WRITE_CR0
            | CrIntercepts::WRITE_CR3
            | CrIntercepts::WRITE_CR4;
        intercepts.set(CrIntercepts::READ_CR0, real.cr0 != seen.cr0);
        intercepts.set(CrIntercepts::READ_CR4, real.cr4 != seen.cr4);
        let vmcb = &mut self.vmcb01;
        vmcb.set_cr0(real.cr0);
        vmcb.set_cr3(root);
        vmcb.set_cr4(real.cr4);
        vmcb.set_efer(real.efer | SVME);
        vmcb.set_intercept_cr(intercepts);
    }

    /// WRMSR to EFER; `None` on nested paging.
    pub(super) fn write_shadow_efer(&mut self, value: u64) -> Option<bool> {
        let shadow = self.shadow.as_mut()?;
        let done = shadow.write_efer(self.memory, value, GUEST_EFER);
        self.apply_shadow();
        Some(done)
    }

    /// MOV to CR0, CR3 or CR4.
    pub(super) fn write_shadow_register(&mut self, number: u8, value: u64) -> bool {
        let Some(shadow) = &mut self.shadow else {
            return false;
        };
        let code = self.vmcb01.raw_segment(SegmentRegister::Cs).attributes;
        let cs_long = code & CS_LONG != 0 && shadow.mode().efer & LMA != 0;
        let done = shadow.write(self.memory, number, value, cs_long);
        self.apply_shadow();
        done
    }

    /// INVLPG. The processor forgets the page, and with it the rest of the address space, which is
    /// the one way that all processors have.
    pub(super) fn invalidate_shadow_page(&mut self, address: Gva) {
        if let Some(shadow) = &self.shadow {
            shadow.invalidate_page(address);
            self.l1_asid.flush();
        }
    }

    /// A page fault: the guest's own, or one that the shadow tables are to be filled by.
    pub(super) fn shadow_fault(&mut self, exception: ExceptionInfo) -> Option<VmExit> {
        let (Some(address), Some(code)) = (exception.address, exception.error_code) else {
            return Some(VmExit::Exception {
                vector: exception.vector,
                error_code: exception.error_code,
            });
        };
        let context = (self.cpl(), self.vmcb01.rflags(), self.pkru());
        let outcome = self.shadow.as_mut()?.fault(address, code, context)?;
        let interrupted = self.vmcb01.exit_int_info();
        let fault = match outcome {
            Outcome::Inject(fault) => {
                let event = Event::fault_with(Exception::PageFault, fault.code.bits());
                self.vmcb01.set_cr2(fault.address.0);
                (Exception::PageFault, event)
            }
            Outcome::NonCanonical => (Exception::GeneralProtection, Event::GP0),
            other => {
                if interrupted.is_valid() {
                    let again = interrupted
                        .to_redeliver()
                        .map_or(RawEvent::NONE, RawEvent::from);
                    self.vmcb01.set_event_inj(again);
                }
                return self.shadow_access(other, address, code, interrupted.is_valid());
            }
        };
        let (exception, event) = fault;
        self.vmcb01
            .set_event_inj(match interrupted.combine(exception) {
                Combined::Serial => event.into(),
                Combined::DoubleFault => Event::fault_with(Exception::DoubleFault, 0).into(),
                Combined::Shutdown => return Some(VmExit::Shutdown),
            });
        None
    }

    /// A fault that is not the guest's; `delivering` if an event's delivery met it.
    fn shadow_access(
        &self,
        outcome: Outcome,
        address: Gva,
        code: u32,
        delivering: bool,
    ) -> Option<VmExit> {
        const WRITE: u32 = 1 << 1;
        const FETCH: u32 = 1 << 4;
        let gpa = match outcome {
            // The instruction at RIP has nothing to do with it: the processor itself must write.
            Outcome::TableWrite(gpa) if delivering => {
                self.stop_watching_shadow(gpa);
                return None;
            }
            Outcome::TableWrite(gpa) | Outcome::NotMemory(gpa) | Outcome::ReadOnly(gpa) => gpa,
            _ => return None,
        };
        Some(VmExit::Memory(MemoryAccess {
            gpa,
            gva: Some(address),
            write: code & WRITE != 0,
            fetch: code & FETCH != 0,
            table: false,
        }))
    }

    /// Lets the guest write to a table itself.
    pub(super) fn stop_watching_shadow(&self, gpa: Gpa) -> bool {
        self.shadow
            .as_ref()
            .is_some_and(|shadow| shadow.release(gpa))
    }

    /// What whoever runs sees of CR3 and CR4.
    #[inline]
    pub(super) fn visible_cr3_and_cr4(&self) -> (u64, u64) {
        match &self.shadow {
            Some(shadow) => (shadow.cr3(), shadow.mode().cr4),
            None => (self.vmcb().cr3(), self.vmcb().cr4()),
        }
    }

    /// Whether the guest uses protection keys.
    pub(super) fn uses_keys(&self) -> bool {
        self.vmcb().cr4() & Cr4Flags::PROTECTION_KEY_USER.bits() != 0
    }
}
