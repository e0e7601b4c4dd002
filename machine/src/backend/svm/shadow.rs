//! Guests on shadow paging, for processors without nested paging and for those who ask.
//!
//! What the guest does to its paging registers and INVLPG is intercepted, and so are its page
//! faults. In real mode it runs with paging nevertheless, over tables that map its memory one to one
//! ("paged real mode", APM vol. 2, 15.19).
//!
//! A guest of the guest's (L2) runs likewise: the tables that its hypervisor (L1) has made for it, in
//! L1's memory, are those that ours are made from. Outside of its turns the VMCB of L2 holds what L1
//! gave it; the processor's own paging registers are there from just before an entry until just
//! after it.

use alloc::borrow::Cow;

use testudo_arch::{Cr4Flags, Event, Exception, Gpa, GuestMemory, Gva};
use testudo_ept::shadow::Outcome;
use testudo_nested::svm::{PageFaultOf, SecondStage};
use testudo_svm::event::RawEvent;
use testudo_svm::exit::ExceptionInfo;
use testudo_svm::intercept::{CrIntercepts, ExceptionIntercepts, Misc1, Misc3};
use testudo_svm::vmcb::NestedControl;
use testudo_svm::{Exit, Vmcb};

use super::{CS_LONG, GUEST_EFER, LMA, Processor, SVME, SvmVcpu};
use crate::backend::mode::Mode;
use crate::backend::paging::{GuestPaging, ShadowPlace};
use crate::paging::Gate;
use crate::vcpu::{Vcpu, VcpuError, VmExit};
use testudo_arch::regs::{SegmentRegister, SystemRegisters};

/// The paging of the guest, and of a guest of its own.
pub(super) struct Shadow<'a> {
    pub(super) l1: GuestPaging<'a>,
    pub(super) l2: GuestPaging<'a>,
    /// VMRUN was executed since L2's paging registers were taken up.
    pub(super) is_l2_new: bool,
}

/// The exits that shadow paging needs, where the processor runs with `real` and the guest believes in
/// `seen`.
fn intercepts(real: Mode, seen: Mode) -> CrIntercepts {
    let mut intercepts = CrIntercepts::READ_CR3
        | CrIntercepts::WRITE_CR0
        | CrIntercepts::WRITE_CR3
        | CrIntercepts::WRITE_CR4;
    intercepts.set(CrIntercepts::READ_CR0, real.cr0 != seen.cr0);
    intercepts.set(CrIntercepts::READ_CR4, real.cr4 != seen.cr4);
    intercepts
}

fn write_mode(vmcb: &mut Vmcb, mode: Mode, cr3: u64) {
    vmcb.set_cr0(mode.cr0);
    vmcb.set_cr3(cr3);
    vmcb.set_cr4(mode.cr4);
    vmcb.set_efer(mode.efer | SVME);
}

impl<'a, M: GuestMemory, S: SecondStage, P: Processor> SvmVcpu<'a, M, S, P> {
    /// Puts the guest on shadow paging instead of nested paging. It cannot be offered nested paging
    /// itself then.
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
        let l1 = GuestPaging::new(place);
        self.gate = Some(place.gate());
        self.shadow = Some(Shadow {
            l2: l1.of_nested(),
            l1,
            is_l2_new: true,
        });
        self.set_system(&SystemRegisters::reset());
        self
    }

    pub(super) fn is_l2(&self) -> bool {
        let nested = self.nested.as_ref();
        nested.is_some_and(|nested| nested.state.is_guest())
    }

    /// The paging of whoever runs.
    fn paging(&self) -> Option<&GuestPaging<'a>> {
        let shadow = self.shadow.as_ref()?;
        Some(if self.is_l2() { &shadow.l2 } else { &shadow.l1 })
    }

    fn paging_mut(&mut self) -> Option<&mut GuestPaging<'a>> {
        let is_l2 = self.is_l2();
        let shadow = self.shadow.as_mut()?;
        Some(if is_l2 {
            &mut shadow.l2
        } else {
            &mut shadow.l1
        })
    }

    /// Before the guest or its own guest runs: through the gate, and without the translations that
    /// are no longer true. The ASID is to be assigned after it.
    #[inline]
    pub(super) fn enter_gate(&mut self) {
        if let Some(gate) = self.gate {
            self.pass(gate);
        }
    }

    #[inline(never)]
    fn pass(&mut self, gate: &Gate) {
        while gate.enter() {
            // What is made of them goes as well, outside, where nobody waits for this vCPU.
            gate.leave();
            self.drop_translations();
        }
    }

    /// After it ran.
    #[inline]
    pub(super) fn leave_gate(&self) {
        if let Some(gate) = self.gate {
            gate.leave();
        }
    }

    /// Why shadow paging cannot go on, if that is so.
    pub(super) fn shadow_failure(&mut self) -> Result<(), VcpuError> {
        match self.paging_mut().and_then(GuestPaging::failure) {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Has the processor's paging registers in L2's VMCB, for an entry. `false` if there is no memory
    /// for the tables.
    pub(super) fn put_on_l2_shadow(&mut self) -> bool {
        let (Some(shadow), Some(nested)) = (&mut self.shadow, &mut self.nested) else {
            return true;
        };
        let flushed = nested.state.take_l2_flush();
        let vmcb02 = nested.state.vmcb02();
        let seen = Mode {
            cr0: vmcb02.cr0(),
            cr4: vmcb02.cr4(),
            efer: vmcb02.efer() & !SVME,
        }
        .with_lma_by_paging();
        let cr3 = vmcb02.cr3();
        // VMRUN reads the page-directory pointers of PAE paging whatever was there before.
        let is_new = core::mem::take(&mut shadow.is_l2_new) && seen.pae_paging();
        let paging = &mut shadow.l2;
        if flushed || is_new || paging.mode() != seen || paging.cr3() != cr3 {
            paging.set(self.memory, seen, cr3);
        }
        if paging.has_failed() {
            return false;
        }
        let (real, root) = paging.hardware();
        let wanted = nested.state.vmcb12().intercept_cr() | intercepts(real, seen);
        let vmcb02 = nested.state.vmcb02_mut();
        write_mode(vmcb02, real, root);
        if vmcb02.intercept_cr() != wanted {
            vmcb02.set_intercept_cr(wanted);
        }
        true
    }

    /// Puts L2's own paging registers back, after its turn. The processor has changed none: all that
    /// writes them is intercepted.
    pub(super) fn take_off_l2_shadow(&mut self) {
        if let (Some(shadow), Some(nested)) = (&self.shadow, &mut self.nested) {
            let paging = &shadow.l2;
            write_mode(nested.state.vmcb02_mut(), paging.mode(), paging.cr3());
        }
    }

    /// L1's VMCB with the paging registers that L1 believes in.
    pub(super) fn l1_as_it_sees_itself(&self) -> Cow<'_, Vmcb> {
        let mut vmcb01 = Cow::Borrowed(&*self.vmcb01);
        if let Some(shadow) = &self.shadow {
            write_mode(vmcb01.to_mut(), shadow.l1.mode(), shadow.l1.cr3());
        }
        vmcb01
    }

    /// The reverse of [`l1_as_it_sees_itself`](Self::l1_as_it_sees_itself), when L1's registers come
    /// from elsewhere and L2 runs: L1's tables are shadowed, and L2's paging registers new.
    pub(super) fn put_l1_on_shadow(&mut self) {
        let Some(shadow) = &mut self.shadow else {
            return;
        };
        let vmcb01 = &mut self.vmcb01;
        let seen = Mode {
            cr0: vmcb01.cr0(),
            cr4: vmcb01.cr4(),
            efer: vmcb01.efer() & !SVME,
        };
        shadow.l1.set(self.memory, seen, vmcb01.cr3());
        shadow.is_l2_new = true;
        let (real, root) = shadow.l1.hardware();
        write_mode(vmcb01, real, root);
        vmcb01.set_intercept_cr(intercepts(real, seen));
    }

    /// Takes up the guest's paging registers, all of them. Those of L2 are taken up at its next entry.
    pub(super) fn set_shadow_system(&mut self, system: &SystemRegisters) {
        if self.is_l2() {
            return;
        }
        let Some(shadow) = &mut self.shadow else {
            return;
        };
        let mode = Mode {
            cr0: system.cr0,
            cr4: system.cr4,
            efer: system.efer,
        };
        shadow.l1.set(self.memory, mode, system.cr3);
        self.apply_shadow();
    }

    /// Brings the VMCB in line with the paging registers of whoever runs.
    fn apply_shadow(&mut self) {
        let Some(paging) = self.paging() else {
            return;
        };
        let (seen, cr3) = (paging.mode(), paging.cr3());
        let (real, root) = paging.hardware();
        if self.is_l2() {
            return write_mode(self.vmcb_mut(), seen, cr3);
        }
        let vmcb = &mut self.vmcb01;
        write_mode(vmcb, real, root);
        vmcb.set_intercept_cr(intercepts(real, seen));
    }

    /// WRMSR to EFER; `None` on nested paging.
    pub(super) fn write_shadow_efer(&mut self, value: u64) -> Option<bool> {
        let mode = self.paging()?.mode();
        let svme = if self.nested.is_some() { SVME } else { 0 };
        if mode.with_efer(value, GUEST_EFER | svme).is_none() {
            return Some(false);
        }
        if let Some(nested) = &mut self.nested {
            if !nested.state.write_svme(value) {
                return Some(false);
            }
            nested.state.adjust_vmcb01(&mut self.vmcb01);
        }
        let memory = self.memory;
        let done = self
            .paging_mut()?
            .write_efer(memory, value & !SVME, GUEST_EFER);
        self.apply_shadow();
        Some(done)
    }

    /// MOV to CR0, CR3 or CR4.
    pub(super) fn write_shadow_register(&mut self, number: u8, value: u64) -> bool {
        let code = self.vmcb().raw_segment(SegmentRegister::Cs).attributes;
        let memory = self.memory;
        let Some(paging) = self.paging_mut() else {
            return false;
        };
        let cs_long = code & CS_LONG != 0 && paging.mode().efer & LMA != 0;
        let done = paging.write(memory, number, value, cs_long);
        self.apply_shadow();
        done
    }

    /// INVLPG. The processor forgets the page, and with it the rest of the address space, which is
    /// the one way that all processors have.
    pub(super) fn invalidate_shadow_page(&mut self, address: Gva) {
        let Some(paging) = self.paging() else {
            return;
        };
        paging.invalidate_page(address);
        match &mut self.nested {
            Some(nested) if nested.state.is_guest() => nested.state.flush_translations(),
            _ => self.l1_asid.flush(),
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
        let outcome = self.shadow.as_mut()?.l1.fault(address, code, context)?;
        let interrupted = self.vmcb01.exit_int_info();
        let (exception, event) = match outcome {
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
                let paging = &self.shadow.as_ref()?.l1;
                return paging.machine_access(other, address, code, interrupted.is_valid());
            }
        };
        self.inject_after(event, exception, interrupted)
    }

    /// A page fault of L2: of the shadow tables, of the tables that L1 gave it, or an access that the
    /// machine must make.
    pub(super) fn l2_shadow_fault(&mut self) -> Option<VmExit> {
        let vmcb02 = self.vmcb();
        let (address, code) = (Gva(vmcb02.exit_info2()), vmcb02.exit_info1() as u32);
        let delivering = vmcb02.exit_int_info().is_valid();
        let context = (self.cpl(), vmcb02.rflags(), self.pkru());
        let outcome = self.shadow.as_mut()?.l2.fault(address, code, context);
        let whose = match outcome {
            Some(Outcome::Inject(fault)) => PageFaultOf::L2 {
                address: fault.address.0,
                code: fault.code.bits(),
            },
            _ => PageFaultOf::L0,
        };
        if !self.settle_l2_page_fault(whose) {
            if outcome == Some(Outcome::NonCanonical) {
                return self.raise(Event::GP0, None);
            }
            let paging = &self.shadow.as_ref()?.l2;
            return paging.machine_access(outcome?, address, code, delivering);
        }
        // As the delivery of a fault that nobody intercepts would have.
        self.vmcb_mut().set_cr2(address.0);
        match Exit::read(self.vmcb()) {
            Exit::Exception(exception) => self.reflect(exception),
            exit => self.classify(exit),
        }
    }

    /// Lets the guest write to a table itself.
    pub(super) fn stop_watching_shadow(&self, gpa: Gpa) -> bool {
        self.shadow
            .as_ref()
            .is_some_and(|shadow| shadow.l1.release(gpa))
    }

    /// What L1 sees of its paging registers, where its VMCB has others.
    #[inline]
    pub(super) fn l1_paging(&self) -> Option<&GuestPaging<'a>> {
        let shadow = self.shadow.as_ref()?;
        (!self.is_l2()).then_some(&shadow.l1)
    }

    /// What whoever runs sees of CR3 and CR4.
    #[inline]
    pub(super) fn visible_cr3_and_cr4(&self) -> (u64, u64) {
        match self.l1_paging() {
            Some(paging) => (paging.cr3(), paging.mode().cr4),
            None => (self.vmcb().cr3(), self.vmcb().cr4()),
        }
    }

    /// Whether the guest uses protection keys.
    pub(super) fn uses_keys(&self) -> bool {
        self.vmcb().cr4() & Cr4Flags::PROTECTION_KEY_USER.bits() != 0
    }
}
