//! VM exits to L1: what the processor would save, and what it would load (SDM vol. 3C, chapter 28).

use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr4Flags, EferFlags, Gpa, GuestMemory, Msr, RFlags};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, PinControls, PrimaryControls,
    SecondaryControls,
};
use testudo_vmx::event::{Injection, InterruptionInformation, interrupted_delivery};
use testudo_vmx::exit::{BasicReason, ExitReason};
use testudo_vmx::structures::MsrEntry;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::join::L1Controls;
use super::route::{ExitDetails, Route, route};
use super::{
    Context, EptFault, EptHandled, Msrs, NestedVmx, SecondStage, VmcsPair, guest_fields, vmcs12,
};

pub use crate::svm::{PhysicalEvent, PredictorBarrier};

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

/// What becomes of a physical event of L1's processor now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// It stays pending.
    Blocked,
    /// L1 intercepts it: L2 exits with this reason. An interrupt is acknowledged, and its vector
    /// given to [`NestedVmx::exit_to_l1`], if `acknowledge` says so; if not, it stays pending.
    Exit {
        /// The reason.
        reason: BasicReason,
        /// L1's VMCS has "acknowledge interrupt on exit".
        acknowledge: bool,
    },
    /// Whoever runs takes it.
    Deliver,
}

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const PCIDE: u64 = Cr4Flags::PCID.bits();
const PG: u64 = 1 << 31;

/// Bits of CR0 that an exit leaves as they are: all but PG, AM, WP, NE, TS, EM, MP and PE (28.5.1).
const CR0_KEPT: u64 = !(PG | 1 << 18 | 1 << 16 | 1 << 5 | 0xF);

/// VMX-abort indicators (28.7).
const ABORT_SAVING_MSRS: u32 = 1;
const ABORT_LOADING_MSRS: u32 = 4;

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
        let (reason, qualification, interruption, error_code) = {
            let vmcs02 = cx.vmcs.l2();
            cx.gprs.rsp = vmcs02.get(fields::GUEST_RSP)?;
            let reason = ExitReason::read(&vmcs02)?;
            let interruption = match reason.basic() {
                BasicReason::ExceptionOrNmi => vmcs02.get(fields::EXIT_INTERRUPTION_INFORMATION)?,
                _ => 0,
            };
            let interruption = InterruptionInformation(interruption);
            let code = if interruption.has_error_code() {
                vmcs02.get(fields::EXIT_INTERRUPTION_ERROR_CODE)?
            } else {
                0
            };
            (
                reason,
                vmcs02.get(fields::EXIT_QUALIFICATION)?,
                interruption,
                code,
            )
        };
        let details = ExitDetails {
            reason: reason.basic(),
            qualification,
            interruption,
            error_code,
            gprs: cx.gprs,
        };
        match route(&details, &self.vmcs12.image, self.window, cx.memory)? {
            Route::L1 => self.reflect(cx),
            Route::SecondStage => self.ept_fault(reason.basic(), qualification, cx),
            Route::L0 => {
                redeliver(reason.basic(), &mut cx.vmcs.l2())?;
                Ok(Handled::L0)
            }
        }
    }

    fn ept_fault<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        S: SecondStage,
        R: Msrs,
    {
        let gpa = Gpa(cx.vmcs.l2().get(fields::GUEST_PHYSICAL_ADDRESS)?);
        let fault = EptFault { gpa, qualification };
        let handled = match cx.second_stage.fault(fault) {
            EptHandled::Resolved => Handled::Resume,
            EptHandled::Host(gpa) => Handled::Memory(gpa),
            EptHandled::Violation(qualification) => {
                return self.reflect_as(BasicReason::EptViolation, qualification, cx);
            }
            EptHandled::Misconfiguration => {
                return self.reflect_as(BasicReason::EptMisconfiguration, 0, cx);
            }
        };
        redeliver(reason, &mut cx.vmcs.l2())?;
        Ok(handled)
    }

    /// Gives L1 the exit that the processor reported.
    fn reflect<P, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        {
            let vmcs02 = cx.vmcs.l2();
            let image = &mut self.vmcs12.image;
            guest_fields::pull(&vmcs02, image, &guest_fields::EXIT_INFORMATION)?;
        }
        self.leave(cx)
    }

    fn reflect_as<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        let gpa = {
            let vmcs02 = cx.vmcs.l2();
            let image = &mut self.vmcs12.image;
            guest_fields::pull(&vmcs02, image, &guest_fields::EXIT_INFORMATION)?;
            vmcs02.get(fields::GUEST_PHYSICAL_ADDRESS)?
        };
        self.set_exit(reason, qualification)?;
        let field = fields::GUEST_PHYSICAL_ADDRESS.encoding();
        guest_fields::set(&mut self.vmcs12.image, field, gpa)?;
        self.leave(cx)
    }

    fn set_exit(&mut self, reason: BasicReason, qualification: u64) -> Result<(), AccessError> {
        let image = &mut self.vmcs12.image;
        let number = u64::from(reason.number());
        guest_fields::set(image, fields::EXIT_REASON.encoding(), number)?;
        guest_fields::set(image, fields::EXIT_QUALIFICATION.encoding(), qualification)
    }

    /// Makes L2 exit to L1 for something that the processor did not report: a physical event that L1
    /// intercepts, or what L0 found while it emulated an instruction of L2. `interruption` is the
    /// VM-exit interruption information: the acknowledged interrupt, or the NMI.
    ///
    /// An event that was on its way into L2 is told to L1 as one whose delivery was interrupted.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn exit_to_l1<P, M, S, R>(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        interruption: u32,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        if !self.is_guest {
            return Ok(Handled::Resume);
        }
        let (pending, code, length) = {
            let vmcs02 = cx.vmcs.l2();
            (
                vmcs02.get(fields::ENTRY_INTERRUPTION_INFORMATION)?,
                vmcs02.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?,
                vmcs02.get(fields::ENTRY_INSTRUCTION_LENGTH)?,
            )
        };
        self.set_exit(reason, qualification)?;
        let is_pending = InterruptionInformation(pending).is_valid();
        let pending = if is_pending { pending } else { 0 };
        let information = [
            (
                fields::EXIT_INTERRUPTION_INFORMATION.encoding(),
                interruption,
            ),
            (fields::EXIT_INTERRUPTION_ERROR_CODE.encoding(), 0),
            (fields::IDT_VECTORING_INFORMATION.encoding(), pending),
            (fields::IDT_VECTORING_ERROR_CODE.encoding(), code),
            (fields::EXIT_INSTRUCTION_LENGTH.encoding(), length),
            (fields::EXIT_INSTRUCTION_INFORMATION.encoding(), 0),
        ];
        for (field, value) in information {
            guest_fields::set(&mut self.vmcs12.image, field, value.into())?;
        }
        self.leave(cx)
    }

    /// Everything of an exit but the reason.
    fn leave<P, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<Handled, AccessError>
    where
        P: VmcsPair,
        M: GuestMemory,
        R: Msrs,
    {
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        self.save_guest(&l1, cx)?;
        self.is_guest = false;
        self.window = false;
        // Without VPID, an exit too leaves no linear translation behind.
        self.flush.l1 |= self.vpid12 == 0;
        if !self.store_exit_msrs(cx)? {
            return self.abort(ABORT_SAVING_MSRS, cx.memory);
        }
        let information = self
            .vmcs12
            .image
            .get(fields::EXIT_INTERRUPTION_INFORMATION)?;
        let reason = ExitReason::read(&*self.vmcs12.image)?;
        let nmi = reason.basic() == BasicReason::ExceptionOrNmi && information & 0x700 == 0x200;
        self.load_host(nmi, cx)?;
        self.give_to_shadow(cx)?;
        if !self.load_exit_msrs(cx)? {
            return self.abort(ABORT_LOADING_MSRS, cx.memory);
        }
        Ok(Handled::L1(PredictorBarrier::new()))
    }

    fn abort(&mut self, indicator: u32, memory: &impl GuestMemory) -> Result<Handled, AccessError> {
        if let Some(current) = self.current {
            let _dropped = vmcs12::write_abort(memory, current, indicator).is_err();
        }
        Ok(Handled::Abort)
    }

    /// L2's state into L1's VMCS (28.3).
    pub(super) fn save_guest<P: VmcsPair, M, S, R>(
        &mut self,
        l1: &L1Controls,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let vmcs02 = cx.vmcs.l2();
        let image = &mut *self.vmcs12.image;
        guest_fields::pull(&vmcs02, image, &guest_fields::FREQUENT)?;
        guest_fields::pull(&vmcs02, image, &guest_fields::RARE)?;

        let (mask01, _) = self.joined.map_or((0, 0), |j| (j.cr0_mask, j.cr4_mask));
        let mask12 = image.get(fields::CR0_GUEST_HOST_MASK)?;
        let cr0 = l2_register(
            vmcs02.get(fields::GUEST_CR0)?,
            vmcs02.get(fields::CR0_READ_SHADOW)?,
            image.get(fields::GUEST_CR0)?,
            mask01,
            mask12,
        );
        let (_, mask01) = self.joined.map_or((0, 0), |j| (j.cr0_mask, j.cr4_mask));
        let mask12 = image.get(fields::CR4_GUEST_HOST_MASK)?;
        let cr4 = l2_register(
            vmcs02.get(fields::GUEST_CR4)?,
            vmcs02.get(fields::CR4_READ_SHADOW)?,
            image.get(fields::GUEST_CR4)?,
            mask01,
            mask12,
        );
        image.set(fields::GUEST_CR0, cr0)?;
        image.set(fields::GUEST_CR4, cr4)?;
        image.set(fields::GUEST_ACTIVITY_STATE, ActivityState::Active.number())?;

        let loads_efer = self
            .joined
            .is_some_and(|j| j.entry.contains(EntryControls::LOAD_EFER));
        let efer = if loads_efer {
            vmcs02.get(fields::GUEST_EFER)?
        } else {
            0
        };
        // "IA-32e mode guest" follows LMA (IA32_VMX_MISC bit 5, as L1 was told).
        if loads_efer {
            let mut entry = l1.entry;
            entry.set(EntryControls::IA32E_MODE_GUEST, efer & LMA != 0);
            image.set(fields::ENTRY_CONTROLS, entry.bits())?;
        }
        if l1.exit.contains(ExitControls::SAVE_EFER) {
            image.set(fields::GUEST_EFER, efer)?;
        }
        if l1.exit.contains(ExitControls::SAVE_PAT) {
            image.set(fields::GUEST_PAT, vmcs02.get(fields::GUEST_PAT)?)?;
        }
        if l1.exit.contains(ExitControls::SAVE_DEBUG_CONTROLS) {
            image.set(fields::GUEST_DR7, vmcs02.get(fields::GUEST_DR7)?)?;
            image.set(fields::GUEST_DEBUGCTL, vmcs02.get(fields::GUEST_DEBUGCTL)?)?;
        }
        let pae = cr0 & PG != 0 && cr4 & PAE != 0 && efer & LMA == 0;
        if pae && l1.secondary.contains(SecondaryControls::ENABLE_EPT) {
            guest_fields::pull(&vmcs02, image, &guest_fields::PDPTES)?;
        }
        if l1.pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER)
            && l1.exit.contains(ExitControls::SAVE_PREEMPTION_TIMER)
        {
            let left = vmcs02.get(fields::PREEMPTION_TIMER_VALUE)?;
            image.set(fields::PREEMPTION_TIMER_VALUE, left)?;
        }
        // "bit 31 … is cleared" (28.2).
        let injected = image.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        image.set(
            fields::ENTRY_INTERRUPTION_INFORMATION,
            injected & !(1 << 31),
        )
    }

    /// L1's host state into `vmcs01` (28.5).
    pub(super) fn load_host<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        nmi: bool,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        let image = &*self.vmcs12.image;
        let exit = ExitControls::from_bits_retain(image.get(fields::EXIT_CONTROLS)?);
        let long = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
        let mut vmcs01 = cx.vmcs.l1();

        let old_cr0 = vmcs01.get(fields::GUEST_CR0)?;
        let cr0 = (image.get(fields::HOST_CR0)? & !CR0_KEPT) | (old_cr0 & CR0_KEPT);
        let mut cr4 = image.get(fields::HOST_CR4)?;
        if long {
            cr4 |= PAE;
        } else {
            cr4 &= !PCIDE;
        }
        // L1 sees these values; the processor also gets what it and L0 insist on.
        vmcs01.set(fields::GUEST_CR0, self.cr0.apply(cr0))?;
        vmcs01.set(fields::CR0_READ_SHADOW, cr0)?;
        vmcs01.set(fields::GUEST_CR4, self.cr4.apply(cr4))?;
        vmcs01.set(fields::CR4_READ_SHADOW, cr4)?;
        let cr3 = image.get(fields::HOST_CR3)?;
        vmcs01.set(fields::GUEST_CR3, cr3)?;
        vmcs01.set(fields::GUEST_DR7, 0x400)?;
        vmcs01.set(fields::GUEST_DEBUGCTL, 0)?;

        let efer = if exit.contains(ExitControls::LOAD_EFER) {
            image.get(fields::HOST_EFER)?
        } else {
            let old = vmcs01.get(fields::GUEST_EFER)?;
            if long {
                old | LMA | LME
            } else {
                old & !(LMA | LME)
            }
        };
        vmcs01.set(fields::GUEST_EFER, efer)?;
        let mut entry = EntryControls::from_bits_retain(vmcs01.get(fields::ENTRY_CONTROLS)?);
        if entry.contains(EntryControls::IA32E_MODE_GUEST) != long {
            entry.set(EntryControls::IA32E_MODE_GUEST, long);
            vmcs01.set(fields::ENTRY_CONTROLS, entry.bits())?;
        }
        if exit.contains(ExitControls::LOAD_PAT) {
            vmcs01.set(fields::GUEST_PAT, image.get(fields::HOST_PAT)?)?;
        }
        load_host_segments(image, long, &mut vmcs01)?;
        vmcs01.set(
            fields::GUEST_SYSENTER_CS,
            image.get(fields::HOST_SYSENTER_CS)?,
        )?;
        vmcs01.set(
            fields::GUEST_SYSENTER_ESP,
            image.get(fields::HOST_SYSENTER_ESP)?,
        )?;
        vmcs01.set(
            fields::GUEST_SYSENTER_EIP,
            image.get(fields::HOST_SYSENTER_EIP)?,
        )?;
        let rsp = image.get(fields::HOST_RSP)?;
        vmcs01.set(fields::GUEST_RSP, rsp)?;
        vmcs01.set(fields::GUEST_RIP, image.get(fields::HOST_RIP)?)?;
        vmcs01.set(fields::GUEST_RFLAGS, 2)?;
        let blocking = if nmi {
            Interruptibility::BLOCKING_BY_NMI
        } else {
            Interruptibility::empty()
        };
        vmcs01.set(fields::GUEST_INTERRUPTIBILITY, blocking.bits())?;
        vmcs01.set(fields::GUEST_ACTIVITY_STATE, ActivityState::Active.number())?;
        vmcs01.set(fields::GUEST_PENDING_DEBUG, 0)?;
        vmcs01.set(fields::ENTRY_INTERRUPTION_INFORMATION, 0)?;
        // The processor walks L1's PAE tables from the fields.
        if !long && cr4 & PAE != 0 {
            let table = Gpa(cr3 & 0xFFFF_FFE0);
            let fields = [
                fields::GUEST_PDPTE0,
                fields::GUEST_PDPTE1,
                fields::GUEST_PDPTE2,
                fields::GUEST_PDPTE3,
            ];
            for (index, field) in (0..).zip(fields) {
                let entry = cx
                    .memory
                    .load_u64(table.wrapping_add(8 * index))
                    .unwrap_or(0);
                vmcs01.set(field, entry)?;
            }
        }
        drop(vmcs01);
        cx.gprs.rsp = rsp;
        Ok(())
    }

    /// The MSR-store area of exits. `false`: VMX abort.
    fn store_exit_msrs<P: VmcsPair, M: GuestMemory, S, R: Msrs>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let count = u64::from(self.vmcs12.image.get(fields::EXIT_MSR_STORE_COUNT)?);
        let area = Gpa(self.vmcs12.image.get(fields::EXIT_MSR_STORE_ADDRESS)?);
        for index in 0..count {
            let Some(entry) = self.area_entry(area, index, cx.memory) else {
                return Ok(false);
            };
            let refused = entry.reserved() != 0 || matches!(entry.msr().0, 0x800..=0x8FF);
            let value = if refused {
                None
            } else {
                match store_vmcs_msr(entry.msr(), &cx.vmcs.l2())? {
                    Some(value) => Some(value),
                    None => cx.msrs.read(entry.msr()),
                }
            };
            let Some(value) = value else {
                return Ok(false);
            };
            let at = area.wrapping_add(16 * index + 8);
            // L1 chose the place; what is not memory takes nothing.
            let _dropped = cx.memory.write(at, &value.to_le_bytes()).is_err();
        }
        Ok(true)
    }

    /// The MSR-load area of exits. `false`: VMX abort.
    pub(super) fn load_exit_msrs<P: VmcsPair, M: GuestMemory, S, R: Msrs>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let count = u64::from(self.vmcs12.image.get(fields::EXIT_MSR_LOAD_COUNT)?);
        let area = Gpa(self.vmcs12.image.get(fields::EXIT_MSR_LOAD_ADDRESS)?);
        for index in 0..count {
            let Some(entry) = self.area_entry(area, index, cx.memory) else {
                return Ok(false);
            };
            if entry.load_on_entry_is_refused() {
                return Ok(false);
            }
            let loaded = match load_vmcs_msr(entry.msr(), entry.value(), &mut cx.vmcs.l1())? {
                Some(loaded) => loaded,
                None => cx.msrs.write(entry.msr(), entry.value()),
            };
            if !loaded {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn area_entry(&self, area: Gpa, index: u64, memory: &impl GuestMemory) -> Option<MsrEntry> {
        if index >= u64::from(self.caps.misc.msr_list_limit()) {
            return None;
        }
        let mut bytes = [0; 16];
        memory
            .read(area.wrapping_add(16 * index), &mut bytes)
            .ok()?;
        Some(MsrEntry::from_bytes(bytes))
    }

    /// What becomes of this event now. Nothing is lost by asking.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn acceptance<P: VmcsPair>(
        &self,
        event: PhysicalEvent,
        vmcs: &mut P,
    ) -> Result<Acceptance, AccessError> {
        if self.is_guest {
            let l1 = L1Controls::read(&self.vmcs12.image)?;
            let exit = |reason, acknowledge| {
                Ok(Acceptance::Exit {
                    reason,
                    acknowledge,
                })
            };
            match event {
                PhysicalEvent::Interrupt
                    if l1.pin.contains(PinControls::EXTERNAL_INTERRUPT_EXITING) =>
                {
                    let acknowledge = l1.exit.contains(ExitControls::ACKNOWLEDGE_INTERRUPT);
                    return exit(BasicReason::ExternalInterrupt, acknowledge);
                }
                PhysicalEvent::Nmi if l1.pin.contains(PinControls::NMI_EXITING) => {
                    return exit(BasicReason::ExceptionOrNmi, false);
                }
                // INIT always exits in non-root operation (26.2).
                PhysicalEvent::Init => return exit(BasicReason::Init, false),
                _ => {}
            }
            deliverable(event, &vmcs.l2())
        } else if event == PhysicalEvent::Init && self.vmxon.is_some() {
            // INIT is blocked in VMX root operation (24.8).
            Ok(Acceptance::Blocked)
        } else {
            deliverable(event, &vmcs.l1())
        }
    }

    /// Asks for an exit as soon as L2 can take an interrupt, or stops asking. While L1 itself runs,
    /// the window is `vmcs01`'s own.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn set_window<P: VmcsPair>(
        &mut self,
        wanted: bool,
        vmcs: &mut P,
    ) -> Result<(), AccessError> {
        if !self.is_guest || wanted == self.window {
            return Ok(());
        }
        self.window = wanted;
        let window = PrimaryControls::INTERRUPT_WINDOW_EXITING;
        let theirs = L1Controls::read(&self.vmcs12.image)?
            .primary
            .contains(window);
        let mut vmcs02 = vmcs.l2();
        let mut primary = PrimaryControls::from_bits_retain(vmcs02.get(fields::PRIMARY_CONTROLS)?);
        primary.set(window, wanted || theirs);
        vmcs02.set(fields::PRIMARY_CONTROLS, primary.bits())?;
        // The next entry compares with what is there.
        if let Some(joined) = &mut self.joined {
            joined.primary = primary;
        }
        Ok(())
    }
}

/// Whether an event can be injected into whoever runs on this VMCS.
fn deliverable(event: PhysicalEvent, vmcs: &impl VmcsRead) -> Result<Acceptance, AccessError> {
    let state = Interruptibility::from_bits_retain(vmcs.get(fields::GUEST_INTERRUPTIBILITY)?);
    let shadow = Interruptibility::BLOCKING_BY_STI | Interruptibility::BLOCKING_BY_MOV_SS;
    let pending =
        InterruptionInformation(vmcs.get(fields::ENTRY_INTERRUPTION_INFORMATION)?).is_valid();
    let enabled = vmcs.get(fields::GUEST_RFLAGS)? & RFlags::INTERRUPT_FLAG.bits() != 0;
    let free = match event {
        PhysicalEvent::Interrupt => enabled && !state.intersects(shadow) && !pending,
        PhysicalEvent::Nmi => {
            !state.intersects(shadow | Interruptibility::BLOCKING_BY_NMI) && !pending
        }
        PhysicalEvent::Smi => !state.contains(Interruptibility::BLOCKING_BY_SMI) && !pending,
        PhysicalEvent::Init => true,
    };
    Ok(if free {
        Acceptance::Deliver
    } else {
        Acceptance::Blocked
    })
}

/// A control register of L2 as L1 shall see it. Bits that L1 owns L2 cannot change; bits that only L0
/// owns are in the read shadow; the rest is in the register.
const fn l2_register(register: u64, shadow: u64, old: u64, mask02: u64, mask12: u64) -> u64 {
    (register & !mask02) | (shadow & mask02 & !mask12) | (old & mask12)
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

/// The segments after an exit (28.5.2).
fn load_host_segments(
    image: &impl VmcsRead,
    long: bool,
    vmcs01: &mut impl VmcsWrite,
) -> Result<(), AccessError> {
    let code = if long {
        SegmentAttributes::CODE64
    } else {
        SegmentAttributes::CODE32
    };
    let unusable = SegmentAttributes::UNUSABLE;
    let data = SegmentAttributes::DATA;
    macro_rules! segment {
        ($selector:expr, $name_selector:ident, $name_base:ident, $name_limit:ident, $name_rights:ident,
            $base:expr, $limit:expr, $rights:expr) => {
            vmcs01.set(fields::$name_selector, $selector)?;
            vmcs01.set(fields::$name_base, $base)?;
            vmcs01.set(fields::$name_limit, $limit)?;
            let rights: SegmentAttributes = $rights;
            vmcs01.set(fields::$name_rights, rights.bits())?;
        };
    }
    let or_unusable = |selector: u16| if selector == 0 { data | unusable } else { data };
    let cs = image.get(fields::HOST_CS_SELECTOR)?;
    segment!(
        cs,
        GUEST_CS_SELECTOR,
        GUEST_CS_BASE,
        GUEST_CS_LIMIT,
        GUEST_CS_ACCESS_RIGHTS,
        0,
        u32::MAX,
        code
    );
    let ss = image.get(fields::HOST_SS_SELECTOR)?;
    segment!(
        ss,
        GUEST_SS_SELECTOR,
        GUEST_SS_BASE,
        GUEST_SS_LIMIT,
        GUEST_SS_ACCESS_RIGHTS,
        0,
        u32::MAX,
        or_unusable(ss)
    );
    let ds = image.get(fields::HOST_DS_SELECTOR)?;
    segment!(
        ds,
        GUEST_DS_SELECTOR,
        GUEST_DS_BASE,
        GUEST_DS_LIMIT,
        GUEST_DS_ACCESS_RIGHTS,
        0,
        u32::MAX,
        or_unusable(ds)
    );
    let es = image.get(fields::HOST_ES_SELECTOR)?;
    segment!(
        es,
        GUEST_ES_SELECTOR,
        GUEST_ES_BASE,
        GUEST_ES_LIMIT,
        GUEST_ES_ACCESS_RIGHTS,
        0,
        u32::MAX,
        or_unusable(es)
    );
    let fs = image.get(fields::HOST_FS_SELECTOR)?;
    let base = image.get(fields::HOST_FS_BASE)?;
    segment!(
        fs,
        GUEST_FS_SELECTOR,
        GUEST_FS_BASE,
        GUEST_FS_LIMIT,
        GUEST_FS_ACCESS_RIGHTS,
        base,
        u32::MAX,
        or_unusable(fs)
    );
    let gs = image.get(fields::HOST_GS_SELECTOR)?;
    let base = image.get(fields::HOST_GS_BASE)?;
    segment!(
        gs,
        GUEST_GS_SELECTOR,
        GUEST_GS_BASE,
        GUEST_GS_LIMIT,
        GUEST_GS_ACCESS_RIGHTS,
        base,
        u32::MAX,
        or_unusable(gs)
    );
    let tr = image.get(fields::HOST_TR_SELECTOR)?;
    let base = image.get(fields::HOST_TR_BASE)?;
    segment!(
        tr,
        GUEST_TR_SELECTOR,
        GUEST_TR_BASE,
        GUEST_TR_LIMIT,
        GUEST_TR_ACCESS_RIGHTS,
        base,
        0x67,
        SegmentAttributes::TSS_BUSY
    );
    segment!(
        0,
        GUEST_LDTR_SELECTOR,
        GUEST_LDTR_BASE,
        GUEST_LDTR_LIMIT,
        GUEST_LDTR_ACCESS_RIGHTS,
        0,
        0,
        unusable
    );
    vmcs01.set(fields::GUEST_GDTR_BASE, image.get(fields::HOST_GDTR_BASE)?)?;
    vmcs01.set(fields::GUEST_GDTR_LIMIT, 0xFFFF)?;
    vmcs01.set(fields::GUEST_IDTR_BASE, image.get(fields::HOST_IDTR_BASE)?)?;
    vmcs01.set(fields::GUEST_IDTR_LIMIT, 0xFFFF)
}

/// The MSRs of an area that the VMCS holds: loads one, and says whether the value was valid; `None`
/// for the others.
pub(super) fn load_vmcs_msr(
    msr: Msr,
    value: u64,
    vmcs: &mut impl VmcsWrite,
) -> Result<Option<bool>, AccessError> {
    let canonical = ((value << 16) as i64 >> 16) as u64 == value;
    match msr {
        Msr::EFER => {
            let old = vmcs.get(fields::GUEST_EFER)?;
            const DEFINED: u64 = 0xD01;
            // Neither the mode nor a reserved bit is to be loaded this way.
            let valid = value & !DEFINED == 0 && (value ^ old) & (LMA | LME) == 0;
            if valid {
                vmcs.set(fields::GUEST_EFER, value)?;
            }
            Ok(Some(valid))
        }
        Msr::PAT => {
            let valid = value
                .to_le_bytes()
                .iter()
                .all(|t| matches!(t, 0 | 1 | 4..=7));
            if valid {
                vmcs.set(fields::GUEST_PAT, value)?;
            }
            Ok(Some(valid))
        }
        Msr::SYSENTER_CS => {
            vmcs.set(fields::GUEST_SYSENTER_CS, value as u32)?;
            Ok(Some(true))
        }
        Msr::SYSENTER_ESP | Msr::SYSENTER_EIP if canonical => {
            let field = if msr == Msr::SYSENTER_ESP {
                fields::GUEST_SYSENTER_ESP
            } else {
                fields::GUEST_SYSENTER_EIP
            };
            vmcs.set(field, value)?;
            Ok(Some(true))
        }
        Msr::SYSENTER_ESP | Msr::SYSENTER_EIP => Ok(Some(false)),
        _ => Ok(None),
    }
}

/// The value of an MSR that the VMCS holds; `None` for the others.
fn store_vmcs_msr(msr: Msr, vmcs: &impl VmcsRead) -> Result<Option<u64>, AccessError> {
    Ok(Some(match msr {
        Msr::EFER => vmcs.get(fields::GUEST_EFER)?,
        Msr::PAT => vmcs.get(fields::GUEST_PAT)?,
        Msr::FS_BASE => vmcs.get(fields::GUEST_FS_BASE)?,
        Msr::GS_BASE => vmcs.get(fields::GUEST_GS_BASE)?,
        Msr::SYSENTER_CS => vmcs.get(fields::GUEST_SYSENTER_CS)?.into(),
        Msr::SYSENTER_ESP => vmcs.get(fields::GUEST_SYSENTER_ESP)?,
        Msr::SYSENTER_EIP => vmcs.get(fields::GUEST_SYSENTER_EIP)?,
        _ => return Ok(None),
    }))
}
