//! VM exits to L1: what the processor would save, and what it would load (SDM vol. 3C, chapter 30).

use testudo_arch::{Cr4Flags, EferFlags, Exception, Gpa, GuestMemory};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, PinControls, PrimaryControls,
    SecondaryControls,
};
use testudo_vmx::event::{EventType, Injection, InterruptionInformation, interrupted_delivery};
use testudo_vmx::exit::{BasicReason, ExitReason};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, FieldGroup, VmcsRead, VmcsWrite, fields};

use super::apic::delivers_interrupts;
use super::host::HostLoad;
use super::join::L1Controls;
use super::route::{ExitDetails, L0Windows, Route, is_event_wanted, is_exception_wanted, route};
use super::shadow::{ShadowedFields, follow, note, shadowed};
use super::timer::L2Timer;
use super::{
    Context, ControlRegisters, EptFault, EptHandled, Flush, Msrs, NestedVmx, SecondStage, VmcsPair,
    guest_fields, vmcs12,
};

pub use crate::svm::{PageFaultOf, PredictorBarrier};

/// What became of an exit of L2.
#[derive(Debug, PartialEq, Eq)]
pub enum Handled {
    /// L1 runs next: it has been given the exit.
    L1(PredictorBarrier),
    /// L2 goes on.
    Resume,
    /// L0 handles the exit, which is in `vmcs02`. An event whose delivery was interrupted is to be
    /// injected again already.
    L0,
    /// L0 handles an access of L2 to this address of L1's, which is not memory; the exit in
    /// `vmcs02` says how it was made.
    Memory(Gpa),
    /// VMX abort: L1's processor shuts down.
    Abort,
}

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const PG: u64 = 1 << 31;

/// VMX-abort indicators (30.7).
const ABORT_SAVING_MSRS: u32 = 1;
pub(super) const ABORT_HOST_PDPTES: u32 = 2;
pub(super) const ABORT_LOADING_MSRS: u32 = 4;

/// What the processor reported of an exit, as far as its route depends on it.
#[derive(Clone, Copy)]
struct Reported {
    reason: ExitReason,
    interruption: InterruptionInformation,
    qualification: u64,
}

impl Reported {
    /// That, with L2's stack pointer.
    #[inline(always)]
    fn read(vmcs02: &impl VmcsRead) -> Result<(Self, u64), AccessError> {
        const GROUP: FieldGroup<4> = FieldGroup::new([
            fields::GUEST_RSP.encoding(),
            fields::EXIT_REASON.encoding(),
            fields::EXIT_QUALIFICATION.encoding(),
            fields::EXIT_INTERRUPTION_INFORMATION.encoding(),
        ]);
        let [rsp, reason, qualification, interruption] = vmcs02.get_group(&GROUP)?;
        let seen = Self {
            reason: ExitReason(reason as u32),
            interruption: InterruptionInformation(interruption as u32),
            qualification,
        };
        Ok((seen, rsp))
    }

    #[inline]
    fn is_exception(&self) -> bool {
        self.reason.0 as u16 == BasicReason::ExceptionOrNmi.number()
    }
}

impl NestedVmx {
    /// Decides an exit of L2, just after the processor left it.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exited<P, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        // It has run.
        self.is_halted = false;
        if let Some(serving) = self.serving {
            self.mend_interrupted_delivery(serving, &mut cx.vmcs.l2())?;
        }
        let (seen, rsp) = Reported::read(&cx.vmcs.l2())?;
        cx.gprs.rsp = rsp;
        // What becomes of most exits is here, and the rest are calls. (That each gives its result to this function, which
        // gives its own, keeps that in registers: 20 instructions of each exit.)
        let handled = if seen.is_exception() {
            self.exited_by_exception(seen, cx)?
        } else {
            let details = ExitDetails {
                reason: seen.reason.basic(),
                qualification: seen.qualification,
                interruption: seen.interruption,
                error_code: 0,
                gprs: cx.gprs,
            };
            let windows = L0Windows {
                interrupt: self.window,
                nmi: self.nmi_window,
                timer: self.timer.rest != 0,
            };
            match route(&details, &self.vmcs12.image, windows, cx.memory)? {
                Route::L1 => {
                    self.take_exit_information(seen, cx)?;
                    if self.repeat_exit(cx)? {
                        Handled::L1(PredictorBarrier::new())
                    } else {
                        self.leave_completely(Interruptibility::empty(), cx)?
                    }
                }
                Route::SecondStage => self.ept_fault(seen, cx)?,
                // L1 has no table that could stop it, but what L2 runs on is filled as it is used.
                Route::L0
                    if seen.reason.basic() == BasicReason::EptViolation
                        && self.is_nested_paging() =>
                {
                    self.ept_fault(seen, cx)?
                }
                Route::L0 => self.exited_to_l0(seen.reason.basic(), cx)?,
            }
        };
        Ok(handled)
    }

    #[inline(never)]
    fn exited_by_exception<P, M, S, R>(
        &mut self,
        seen: Reported,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        let error_code = if seen.interruption.has_error_code() {
            cx.vmcs.l2().get(fields::EXIT_INTERRUPTION_ERROR_CODE)?
        } else {
            0
        };
        if !is_event_wanted(&self.vmcs12.image, seen.interruption, error_code)? {
            return self.exited_to_l0(BasicReason::ExceptionOrNmi, cx);
        }
        self.take_exit_information(seen, cx)?;
        self.take_error_code(error_code);
        self.leave(blocking_after(seen.interruption), cx)
    }

    #[inline(never)]
    fn exited_to_l0<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        reason: BasicReason,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError> {
        if self.serving.is_some() && self.goes_on(reason, cx)? {
            return Ok(Handled::Resume);
        }
        if reason == BasicReason::PreemptionTimer
            && let Some(value) = self.timer.go_on()
        {
            cx.vmcs.l2().set(fields::PREEMPTION_TIMER_VALUE, value)?;
        }
        redeliver(reason, &mut cx.vmcs.l2())?;
        Ok(Handled::L0)
    }

    /// As [`Self::exited`], for a page fault of L2 that exited when L0 shadows page tables. No other exit
    /// is different there.
    ///
    /// [`Handled::L0`] says that L2 takes the fault, whose address and error code `whose` has.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exited_by_page_fault<P, M, S, R>(
        &mut self,
        whose: PageFaultOf,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        self.is_halted = false;
        let (seen, rsp) = Reported::read(&cx.vmcs.l2())?;
        cx.gprs.rsp = rsp;
        let reason = BasicReason::ExceptionOrNmi;
        let PageFaultOf::L2 { address, code } = whose else {
            redeliver(reason, &mut cx.vmcs.l2())?;
            return Ok(Handled::Resume);
        };
        let vector = Exception::PageFault.vector();
        if !is_exception_wanted(&self.vmcs12.image, vector, code)? {
            return Ok(Handled::L0);
        }
        let told = Reported {
            qualification: address,
            ..seen
        };
        self.take_exit_information(told, cx)?;
        self.take_error_code(code);
        self.leave(Interruptibility::empty(), cx)
    }

    #[inline(never)]
    fn ept_fault<P, M, S, R>(
        &mut self,
        seen: Reported,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        let gpa = Gpa(cx.vmcs.l2().get(fields::GUEST_PHYSICAL_ADDRESS)?);
        let qualification = seen.qualification;
        let fault = EptFault { gpa, qualification };
        let handled = match cx.second_stage.fault(fault) {
            EptHandled::Resolved => Handled::Resume,
            EptHandled::Host(gpa) => Handled::Memory(gpa),
            EptHandled::Violation(qualification) => {
                return self.reflect_as(BasicReason::EptViolation, qualification, seen, cx);
            }
            EptHandled::Misconfiguration => {
                return self.reflect_as(BasicReason::EptMisconfiguration, 0, seen, cx);
            }
        };
        redeliver(seen.reason.basic(), &mut cx.vmcs.l2())?;
        Ok(handled)
    }

    /// All exit information that an exit to L1 copies, but for the error code of an exception. (A call of its own is 20
    /// instructions of each exit.)
    #[inline(always)]
    fn take_exit_information<P: VmcsPair, M, S, R>(
        &mut self,
        seen: Reported,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let vmcs02 = cx.vmcs.l2();
        let image = &mut *self.vmcs12.image;
        let misses = &mut self.shadow_misses;
        note!(image, *misses; EXIT_REASON = seen.reason.0.into());
        note!(image, *misses; EXIT_QUALIFICATION = seen.qualification);
        note!(image, *misses; EXIT_INTERRUPTION_INFORMATION = seen.interruption.0.into());
        follow!(
            &vmcs02, image, *misses;
            IDT_VECTORING_INFORMATION EXIT_INSTRUCTION_LENGTH EXIT_INSTRUCTION_INFORMATION
            GUEST_LINEAR_ADDRESS
        );
        // Without an event and its error code, "the value of this field is undefined" (27.9.2 and 27.9.3).
        if InterruptionInformation(image.get(fields::IDT_VECTORING_INFORMATION)?).is_valid() {
            follow!(&vmcs02, image, *misses; IDT_VECTORING_ERROR_CODE);
        }
        Ok(())
    }

    /// And that error code.
    fn take_error_code(&mut self, code: u32) {
        let image = &mut *self.vmcs12.image;
        note!(image, self.shadow_misses; EXIT_INTERRUPTION_ERROR_CODE = code.into());
    }

    fn reflect_as<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        seen: Reported,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        self.take_exit_information(seen, cx)?;
        let gpa = cx.vmcs.l2().get(fields::GUEST_PHYSICAL_ADDRESS)?;
        self.set_exit(reason, qualification)?;
        let field = fields::GUEST_PHYSICAL_ADDRESS.encoding();
        guest_fields::set(&mut self.vmcs12.image, field, gpa)?;
        self.leave(Interruptibility::empty(), cx)
    }

    /// Everything of an exit but its information, with events blocked in L1 by it.
    #[inline(never)]
    pub(super) fn leave<P, M, S, R>(
        &mut self,
        blocking: Interruptibility,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        if self.is_halted || !self.repeat_exit(cx)? {
            return self.leave_completely(blocking, cx);
        }
        if !blocking.is_empty() {
            let mut vmcs01 = cx.vmcs.l1();
            vmcs01.set(fields::GUEST_INTERRUPTIBILITY, blocking.bits())?;
        }
        Ok(Handled::L1(PredictorBarrier::new()))
    }

    #[inline(never)]
    fn leave_completely<P, M, S, R>(
        &mut self,
        blocking: Interruptibility,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        self.save_guest(&l1, cx)?;
        if self.current.is_none() {
            // Not for VMREAD to ask for.
            self.fetch_rare(cx)?;
        }
        self.end_turn();
        if !self.store_exit_msrs(cx)? {
            return self.abort(ABORT_SAVING_MSRS, cx.memory);
        }
        if !self.load_host(blocking, cx)? {
            return self.abort(ABORT_HOST_PDPTES, cx.memory);
        }
        self.give_to_l1(cx)?;
        if !self.load_exit_msrs(cx)? {
            return self.abort(ABORT_LOADING_MSRS, cx.memory);
        }
        Ok(Handled::L1(PredictorBarrier::new()))
    }

    /// L2 does not run any more.
    #[inline(always)]
    pub(super) fn end_turn(&mut self) {
        self.is_guest = false;
        self.host_loaded = false;
        self.window = false;
        self.nmi_window = false;
        // Without VPID, an exit too leaves no linear translation behind.
        if self.vpid12 == 0 {
            self.flush |= Flush::L1;
        }
    }

    /// Keeps what an exit loads for the next one, if that can be expected to load the same.
    pub(super) fn note_host_load(&mut self, load: HostLoad) -> Result<(), AccessError> {
        let image = &*self.vmcs12.image;
        let has_areas =
            image.get(fields::EXIT_MSR_STORE_COUNT)? | image.get(fields::EXIT_MSR_LOAD_COUNT)? != 0;
        if let Some(settled) = &mut self.settled
            && load.repeats()
            && !has_areas
        {
            settled.last_exit.load = Some(load);
        }
        Ok(())
    }

    /// The copy to where L1 reads it without an exit, before L1 runs.
    #[inline(always)]
    pub(super) fn give_to_l1<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        self.store_enlightened(cx.memory);
        self.give_to_shadow(cx)
    }

    fn abort(&mut self, indicator: u32, memory: &impl GuestMemory) -> Result<Handled, AccessError> {
        self.note_abort(indicator, memory);
        Ok(Handled::Abort)
    }

    /// Says in L1's region why its processor ends.
    pub(super) fn note_abort(&self, indicator: u32, memory: &impl GuestMemory) {
        // An enlightened VMCS has it in the same place.
        if let Some(current) = self.region() {
            let _dropped = vmcs12::write_abort(memory, current, indicator).is_err();
        }
    }

    /// L2's state into L1's VMCS (30.3), but for the fields that seldom change: they are in `vmcs02`, and
    /// fetched when they are wanted. (A call of its own is 20 instructions of each exit.)
    #[inline(always)]
    pub(super) fn save_guest<P: VmcsPair, M, S, R>(
        &mut self,
        l1: &L1Controls,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let vmcs02 = cx.vmcs.l2();
        let ControlRegisters { cr0, cr4, efer } = self.l2_control_registers(&vmcs02)?;
        let loads_efer = self.joined.as_mut().is_some_and(|joined| {
            let loads = joined.entry.contains(EntryControls::LOAD_EFER);
            if loads {
                // The processor keeps the bit in `vmcs02`.
                let long = efer & LMA != 0;
                joined.entry.set(EntryControls::IA32E_MODE_GUEST, long);
            }
            loads
        });
        // "The activity-state field is saved with the logical processor's activity state before the VM
        // exit" (30.3.4): an interrupt that exits does not end a halt first. L0 waits for L2, or, where
        // neither L0 nor L1 wants to see HLT, the processor does.
        let may_halt = self
            .joined
            .is_some_and(|j| !j.primary.contains(PrimaryControls::HLT_EXITING));
        let halted = ActivityState::Hlt.number();
        let l0_waits = core::mem::take(&mut self.is_halted);
        let waits = match may_halt {
            true => vmcs02.get(fields::GUEST_ACTIVITY_STATE)? == halted,
            false => l0_waits,
        };
        let activity = if waits {
            // The next entry waits again, which only a complete one does.
            self.settled = None;
            ActivityState::Hlt
        } else {
            ActivityState::Active
        };
        let image = &mut *self.vmcs12.image;
        follow!(
            &vmcs02, image, self.shadow_misses;
            GUEST_RIP GUEST_RSP GUEST_RFLAGS GUEST_INTERRUPTIBILITY GUEST_CR3 GUEST_CS_BASE
            GUEST_CS_ACCESS_RIGHTS GUEST_SS_ACCESS_RIGHTS
        );
        self.rare_missing = true;

        if cr0 != image.get(fields::GUEST_CR0)? {
            image.set(fields::GUEST_CR0, cr0)?;
            self.shadow_misses |= const { shadowed(fields::GUEST_CR0.encoding()) };
        }
        if cr4 != image.get(fields::GUEST_CR4)? {
            image.set(fields::GUEST_CR4, cr4)?;
            self.shadow_misses |= const { shadowed(fields::GUEST_CR4.encoding()) };
        }
        image.set(fields::GUEST_ACTIVITY_STATE, activity.number())?;
        // "IA-32e mode guest" follows LMA (IA32_VMX_MISC bit 5, as L1 was told).
        if loads_efer {
            let mut entry = l1.entry;
            entry.set(EntryControls::IA32E_MODE_GUEST, efer & LMA != 0);
            image.set(fields::ENTRY_CONTROLS, entry.bits())?;
        }
        if l1.exit.contains(ExitControls::SAVE_EFER) {
            image.set(fields::GUEST_EFER, efer)?;
        }
        let delivers = delivers_interrupts(l1);
        save_governed(
            image,
            &mut self.shadow_misses,
            &self.timer,
            delivers,
            &vmcs02,
        )?;
        let pae = cr0 & PG != 0 && cr4 & PAE != 0 && efer & LMA == 0;
        if pae && l1.secondary.contains(SecondaryControls::ENABLE_EPT) {
            guest_fields::pull(&vmcs02, image, &guest_fields::PDPTES)?;
        }
        if let Some(settled) = &mut self.settled {
            let raw = [
                vmcs02.get(fields::GUEST_CR0)?,
                vmcs02.get(fields::GUEST_CR4)?,
                efer,
            ];
            settled.last_exit.mode = (loads_efer && !pae).then_some(raw);
        }
        // "bit 31 … is cleared" (30.2).
        let injected = image.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        if injected & (1 << 31) != 0 {
            let done = injected & !(1 << 31);
            image.set(fields::ENTRY_INTERRUPTION_INFORMATION, done)?;
            self.shadow_misses |=
                const { shadowed(fields::ENTRY_INTERRUPTION_INFORMATION.encoding()) };
        }
        Ok(())
    }

    /// The guest fields that seldom change, if L1's VMCS misses those of the last exit: before they are
    /// used, and before `vmcs02` is another's.
    #[inline]
    pub(super) fn fetch_rare<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if self.rare_missing {
            self.rare_missing = false;
            let image = &mut self.vmcs12.image;
            guest_fields::pull(&cx.vmcs.l2(), image, &guest_fields::RARE)?;
        }
        Ok(())
    }
}

/// L2's registers that L1 has saved by exit controls, but for EFER.
#[inline]
pub(super) fn save_governed(
    image: &mut VmcsImage,
    misses: &mut ShadowedFields,
    timer: &L2Timer,
    delivers_interrupts: bool,
    vmcs02: &impl VmcsRead,
) -> Result<(), AccessError> {
    let exit = ExitControls::from_bits_retain(image.get(fields::EXIT_CONTROLS)?);
    if exit.contains(ExitControls::SAVE_PAT) {
        image.set(fields::GUEST_PAT, vmcs02.get(fields::GUEST_PAT)?)?;
    }
    if exit.contains(ExitControls::SAVE_DEBUG_CONTROLS) {
        image.set(fields::GUEST_DR7, vmcs02.get(fields::GUEST_DR7)?)?;
        image.set(fields::GUEST_DEBUGCTL, vmcs02.get(fields::GUEST_DEBUGCTL)?)?;
    }
    let pin = PinControls::from_bits_retain(image.get(fields::PIN_CONTROLS)?);
    if pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER)
        && exit.contains(ExitControls::SAVE_PREEMPTION_TIMER)
    {
        let counted = vmcs02.get(fields::PREEMPTION_TIMER_VALUE)?;
        let left = counted.saturating_add(timer.rest);
        note!(image, *misses; PREEMPTION_TIMER_VALUE = left.into());
    }
    if delivers_interrupts {
        let status = vmcs02.get(fields::GUEST_INTERRUPT_STATUS)?;
        note!(image, *misses; GUEST_INTERRUPT_STATUS = status.into());
    }
    Ok(())
}

/// How an exit with this interruption information, by an exception or an NMI, leaves events blocked in L1: an
/// NMI blocks others (30.5.5).
#[cold]
#[inline(never)]
pub(super) fn blocking_after(interruption: InterruptionInformation) -> Interruptibility {
    if interruption.event_type() == EventType::Nmi {
        Interruptibility::BLOCKING_BY_NMI
    } else {
        Interruptibility::empty()
    }
}

/// Has the event injected again whose delivery the exit interrupted.
fn redeliver(reason: BasicReason, vmcs02: &mut impl VmcsWrite) -> Result<(), AccessError> {
    if !reason.may_interrupt_delivery() {
        return Ok(());
    }
    let Some(event) = interrupted_delivery(vmcs02)? else {
        return Ok(());
    };
    if event == testudo_arch::Event::Nmi {
        // Its delivery blocked NMIs, itself among them.
        let state = vmcs02.get(fields::GUEST_INTERRUPTIBILITY)?;
        let nmi = Interruptibility::BLOCKING_BY_NMI.bits();
        vmcs02.set(fields::GUEST_INTERRUPTIBILITY, state & !nmi)?;
    }
    match Injection::of(event) {
        Some(injection) => injection.write(vmcs02),
        None => Ok(()),
    }
}
