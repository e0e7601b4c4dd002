//! VMLAUNCH and VMRESUME: the checks, the join, and what is loaded (SDM vol. 3C, chapter 29).

use testudo_arch::{EferFlags, Gpa, GuestMemory, Hpa, Msr};
use testudo_vmx::check::{EntryContext, Outcome as Refusal, check_entry_from, check_memory};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, PinControls, PrimaryControls,
    SecondaryControls,
};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::{BasicReason, GuestStateFailure};
use testudo_vmx::structures::MsrEntry;
use testudo_vmx::{AccessError, InstructionError, VmFail, VmcsRead, VmcsWrite, fields};

use super::apic::{self, Frames};
use super::exit::{ABORT_HOST_PDPTES, ABORT_LOADING_MSRS};
use super::instruction::Stop;
use super::join::{Fixed, Joined, L0Controls, L1Controls};
use super::pdptes::{self, Pdptes};
use super::resume::Settled;
use super::shadow::ALL_SHADOWED;
use super::vmcs12::LaunchState;
use super::{Context, Flush, Msrs, NestedVmx, Outcome, SecondStage, VmcsPair, guest_fields};

const PAE: u64 = 1 << 5;
const PG: u64 = 1 << 31;

/// Bit 31 of an exit reason: the entry failed.
const ENTRY_FAILURE: u64 = 1 << 31;

impl NestedVmx {
    /// VMLAUNCH (`launch`) or VMRESUME. The inner error is a VMfail.
    pub(super) fn enter<P, M, S, R>(
        &mut self,
        launch: bool,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Result<Outcome, VmFail>, Stop>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        let enlightened = match self.load_enlightened(launch, cx.memory) {
            Ok(enlightened) => enlightened,
            Err(fail) => return Ok(Err(fail)),
        };
        let Some(current) = self.region() else {
            return Ok(Err(VmFail::Invalid));
        };
        let fail = |error| Ok(Err(VmFail::Valid(error)));
        let (shadow, efer) = {
            let vmcs01 = cx.vmcs.l1();
            let shadow = vmcs01.get(fields::GUEST_INTERRUPTIBILITY)?;
            (
                Interruptibility::from_bits_retain(shadow),
                vmcs01.get(fields::GUEST_EFER)?,
            )
        };
        if shadow.contains(Interruptibility::BLOCKING_BY_MOV_SS) {
            return fail(InstructionError::EventsBlockedByMovSs);
        }
        match (launch, self.vmcs12.launch_state) {
            _ if enlightened.is_some() => {}
            (true, LaunchState::Launched) => return fail(InstructionError::VmlaunchNonClear),
            (false, LaunchState::Clear) => return fail(InstructionError::VmresumeNonLaunched),
            _ => {}
        }
        let context = EntryContext {
            long_mode: efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0,
            in_smm: false,
            current_vmcs: Some(Hpa(current.0)),
            tracing: false,
            in_seam: false,
        };
        if let Some(refusal) = self.refusal(&context, cx.memory)? {
            return match refusal {
                Refusal::VmFail(error) => fail(error),
                Refusal::GuestState(why) => {
                    let reason = BasicReason::InvalidGuestState;
                    self.fail_entry(reason, why.qualification(), cx)
                        .map(Ok)
                        .map_err(Stop::Access)
                }
                // The area is read once, when it is loaded.
                Refusal::MsrLoading { .. } => Ok(Err(VmFail::Invalid)),
            };
        }
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        let Some(composed) = self.compose(&l1, cx.second_stage)? else {
            return fail(InstructionError::InvalidControlField);
        };
        let Some(pdptes) = self.pdptes(&l1, cx.memory)? else {
            // They suited when they were checked, and L1 has changed them since.
            let why = GuestStateFailure::Pdptes;
            return self
                .fail_entry(BasicReason::InvalidGuestState, why.qualification(), cx)
                .map(Ok)
                .map_err(Stop::Access);
        };
        // L1 named pages that are none of its memory, which no processor can be told of.
        let Some(frames) = Frames::find(&self.vmcs12.image, &l1, cx.second_stage)? else {
            return fail(InstructionError::InvalidControlField);
        };
        self.note_vpid(&l1)?;
        self.load_l2(&l1, (composed, frames), &pdptes, cx)?;
        if let Some(entry) = self.load_entry_msrs(cx)? {
            let reason = BasicReason::MsrLoading;
            return self
                .fail_entry(reason, entry, cx)
                .map(Ok)
                .map_err(Stop::Access);
        }
        self.vmcs12.launch_state = LaunchState::Launched;
        self.is_guest = true;
        let information = self
            .vmcs12
            .image
            .get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        let injecting = InterruptionInformation(information).is_valid();
        let activity = self.vmcs12.image.get(fields::GUEST_ACTIVITY_STATE)?;
        let halted = activity == ActivityState::Hlt.number()
            && !injecting
            && !self.has_virtual_interrupt(cx)?;
        self.is_halted = halted;
        Ok(Ok(Outcome::Entered { halted }))
    }

    /// The EPT pointer of the composition that L2 runs on, if it is not L0's own table. The outer `None`: there is none
    /// for L1's EPT.
    pub(super) fn compose(
        &self,
        l1: &L1Controls,
        stage: &mut impl SecondStage,
    ) -> Result<Option<Option<u64>>, AccessError> {
        let image = &*self.vmcs12.image;
        if l1.secondary.contains(SecondaryControls::ENABLE_EPT) {
            let composed = stage.activate(image.get(fields::EPT_POINTER)?);
            return Ok(composed.map(Some));
        }
        let accesses = SecondaryControls::VIRTUALIZE_APIC_ACCESSES;
        Ok(Some(match l1.secondary.contains(accesses) {
            true => stage.activate_plain(Gpa(image.get(fields::APIC_ACCESS_ADDRESS)?)),
            false => None,
        }))
    }

    /// What the processor would do instead of entering, if anything.
    fn refusal(
        &self,
        context: &EntryContext,
        memory: &impl GuestMemory,
    ) -> Result<Option<Refusal>, AccessError> {
        let image = &*self.vmcs12.image;
        let violations = check_entry_from(image, &self.caps, context)?;
        if let Some(refusal) = violations.outcomes().next() {
            return Ok(Some(refusal));
        }
        let in_memory = check_memory(image, &self.caps, context, memory)?;
        let mut outcomes = in_memory.outcomes();
        Ok(outcomes.find(|o| !matches!(o, Refusal::MsrLoading { .. })))
    }

    /// Without VPID, and with a new one, no cached translation of L2 may be used.
    pub(super) fn note_vpid(&mut self, l1: &L1Controls) -> Result<(), AccessError> {
        let vpid = if l1.secondary.contains(SecondaryControls::ENABLE_VPID) {
            self.vmcs12.image.get(fields::VPID)?
        } else {
            0
        };
        if vpid == 0 || vpid != self.vpid12 {
            self.flush |= Flush::VPID;
        }
        self.vpid12 = vpid;
        Ok(())
    }

    /// Controls and guest state into `vmcs02`.
    pub(super) fn load_l2<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        l1: &L1Controls,
        (composed, frames): (Option<u64>, Frames),
        pdptes: &Pdptes,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let mut l0 = L0Controls::read(&cx.vmcs.l1())?;
        l0.ept_pointer = self.ept_pointer.unwrap_or(l0.ept_pointer);
        if self.x2apic_open {
            self.close_x2apic();
        }
        let both = l0.primary & l1.primary;
        if both.contains(PrimaryControls::USE_MSR_BITMAPS) {
            let l1_bitmap = Gpa(self.vmcs12.image.get(fields::MSR_BITMAPS)?);
            let map = self.msr_bitmap.as_mut_bytes();
            // The processor reads the bitmap in memory at each access: a change needs no word to it.
            let _changed = self.open_msrs.merge(map, cx.memory, l1_bitmap);
            let x2apic = SecondaryControls::VIRTUALIZE_X2APIC_MODE;
            if l1.secondary.contains(x2apic) {
                self.merge_x2apic(l1.secondary, l1_bitmap, cx.memory);
            }
        }
        let fixed = Fixed {
            cr0: self.cr0,
            cr4: self.cr4,
            composed,
            msr_bitmap: self.msr_bitmap_at.0,
            frames,
            saves_timer: self.caps.exit.allows(ExitControls::SAVE_PREEMPTION_TIMER),
            pin: match self.timer.turn {
                Some(_) => PinControls::ACTIVATE_PREEMPTION_TIMER,
                None => PinControls::empty(),
            },
        };
        let image = &*self.vmcs12.image;
        let joined = Joined::new(&l0, image, l1, &fixed)?;
        self.settled = Settled::of(image, l1, &l0, &joined, composed)?;

        if self.access_page != joined.apic_access {
            self.access_page = joined.apic_access;
            // Translations may have been cached when the page was none for APIC accesses, or another was
            // (32.4.5).
            self.flush |= Flush::VPID;
            self.flush |= Flush::EPT;
        }
        self.frames_stale = false;

        let mut vmcs02 = cx.vmcs.l2();
        joined.write(self.joined.as_ref(), &mut vmcs02)?;
        self.serving = None;
        if apic::delivers_interrupts(l1) {
            let status = image.get(fields::GUEST_INTERRUPT_STATUS)?;
            vmcs02.set(fields::GUEST_INTERRUPT_STATUS, status)?;
            self.serving = (!self.defects.is_empty()).then_some((status >> 8) as u8);
        }
        if self.in_vmcs02 != self.region() || self.rare_dirty {
            guest_fields::push(image, &mut vmcs02, &guest_fields::RARE)?;
            vmcs02.set(fields::VMCS_LINK_POINTER, u64::MAX)?;
        }
        guest_fields::push(image, &mut vmcs02, &guest_fields::FREQUENT)?;
        if let Pdptes::Loaded(pdptes) = pdptes
            && joined.secondary.contains(SecondaryControls::ENABLE_EPT)
        {
            pdptes::write(pdptes, &mut vmcs02)?;
        }
        if l1.pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER) {
            let value = image.get(fields::PREEMPTION_TIMER_VALUE)?;
            vmcs02.set(fields::PREEMPTION_TIMER_VALUE, self.timer.start(value))?;
        } else if let Some(turn) = self.timer.start_turn() {
            vmcs02.set(fields::PREEMPTION_TIMER_VALUE, turn)?;
        }
        // The states other than active are waits, and waiting is L0's work: the processor never
        // gets one from L1.
        vmcs02.set(fields::GUEST_ACTIVITY_STATE, ActivityState::Active.number())?;
        let information = image.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        vmcs02.set(fields::ENTRY_INTERRUPTION_INFORMATION, information)?;
        if InterruptionInformation(information).is_valid() {
            let code = image.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?;
            vmcs02.set(fields::ENTRY_EXCEPTION_ERROR_CODE, code)?;
            let length = image.get(fields::ENTRY_INSTRUCTION_LENGTH)?;
            vmcs02.set(fields::ENTRY_INSTRUCTION_LENGTH, length)?;
        }
        drop(vmcs02);
        self.window = false;
        self.nmi_window = false;
        self.joined = Some(joined);
        self.in_vmcs02 = self.region();
        self.rare_dirty = false;
        (self.held_back, self.self_ipi_open) = (false, false);
        if self.serving.is_some() {
            self.hold_back(cx)?;
        }
        Ok(())
    }

    /// The PDPTEs of an L2 in PAE paging: with EPT they are fields, without it the entry reads them
    /// from L1's memory; the processor, which uses EPT here, wants fields in both cases. `None`: the
    /// entry fails.
    pub(super) fn pdptes(
        &self,
        l1: &L1Controls,
        memory: &impl GuestMemory,
    ) -> Result<Option<Pdptes>, AccessError> {
        let image = &*self.vmcs12.image;
        let long = l1.entry.contains(EntryControls::IA32E_MODE_GUEST);
        let paging = image.get(fields::GUEST_CR0)? & PG != 0;
        if long || !paging || image.get(fields::GUEST_CR4)? & PAE == 0 {
            return Ok(Some(Pdptes::Unused));
        }
        if l1.secondary.contains(SecondaryControls::ENABLE_EPT) {
            return Ok(Some(Pdptes::Loaded([
                image.get(fields::GUEST_PDPTE0)?,
                image.get(fields::GUEST_PDPTE1)?,
                image.get(fields::GUEST_PDPTE2)?,
                image.get(fields::GUEST_PDPTE3)?,
            ])));
        }
        let cr3 = image.get(fields::GUEST_CR3)?;
        Ok(pdptes::read(memory, cr3, &self.caps.processor).map(Pdptes::Loaded))
    }

    /// Loads the MSR-load area for entries. The number of the entry that failed, counted from 1.
    fn load_entry_msrs<P: VmcsPair, M: GuestMemory, S, R: Msrs>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Option<u64>, AccessError> {
        let count = u64::from(self.vmcs12.image.get(fields::ENTRY_MSR_LOAD_COUNT)?);
        let area = Gpa(self.vmcs12.image.get(fields::ENTRY_MSR_LOAD_ADDRESS)?);
        let limit = u64::from(self.caps.misc.msr_list_limit());
        for index in 0..count {
            let mut bytes = [0xFF; 16];
            let at = area.wrapping_add(16 * index);
            if index >= limit || cx.memory.read(at, &mut bytes).is_err() {
                return Ok(Some(index + 1));
            }
            // One read, and the check is of what was read.
            let entry = MsrEntry::from_bytes(bytes);
            if entry.load_on_entry_is_refused() || !load_l2_msr(entry.msr(), entry.value(), cx)? {
                return Ok(Some(index + 1));
            }
        }
        Ok(None)
    }

    /// An entry that failed after its controls were accepted: an exit that saves nothing of L2
    /// (SDM vol. 3C, 29.8).
    fn fail_entry<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Outcome, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        self.shadow_misses = ALL_SHADOWED;
        self.settled = None;
        let image = &mut self.vmcs12.image;
        let number = u64::from(reason.number()) | ENTRY_FAILURE;
        guest_fields::set(image, fields::EXIT_REASON.encoding(), number)?;
        guest_fields::set(image, fields::EXIT_QUALIFICATION.encoding(), qualification)?;
        // What `vmcs02` holds by now is nobody's state.
        self.in_vmcs02 = None;
        self.is_guest = false;
        let indicator = if !self.load_host(Interruptibility::empty(), cx)? {
            ABORT_HOST_PDPTES
        } else {
            self.give_to_l1(cx)?;
            if self.load_exit_msrs(cx)? {
                return Ok(Outcome::FailedEntry);
            }
            ABORT_LOADING_MSRS
        };
        self.note_abort(indicator, cx.memory);
        Ok(Outcome::Abort)
    }
}

/// Loads one MSR for L2: into `vmcs02`, if it holds the MSR.
fn load_l2_msr<P: VmcsPair, M, S, R: Msrs>(
    msr: Msr,
    value: u64,
    cx: &mut Context<'_, P, M, S, R>,
) -> Result<bool, AccessError> {
    match super::msr_areas::load_vmcs_msr(msr, value, &mut cx.vmcs.l2())? {
        Some(loaded) => Ok(loaded),
        None => Ok(cx.msrs.write(msr, value)),
    }
}
