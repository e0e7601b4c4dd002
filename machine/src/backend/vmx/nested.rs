//! The guest as a hypervisor: which of its guests runs, and who takes what.
//!
//! The decisions are the nested layer's ([`testudo_nested::vmx`]). Here they meet the processor:
//! which VMCS is current, what is cached of it, and what becomes of the interrupts that the machine
//! has. Between two calls the current VMCS is that of whoever runs.

use alloc::boxed::Box;
use core::num::NonZeroU32;
use core::ops::ControlFlow;

use testudo_arch::{Cr4Flags, Gpa, GuestMemory, Gva, Hpa};
use testudo_nested::vmx::{
    ControlRegisters, EptFault, Flush, Handled, Instruction, NestedVmx, Outcome, PageFaultOf,
    Posted, PredictorBarrier, SecondStage,
};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::Allowed;
use testudo_vmx::clock::preemption_timer;
use testudo_vmx::controls::{EntryControls, PinControls, PrimaryControls, SecondaryControls};
use testudo_vmx::exit::EptQualification;
use testudo_vmx::hw::instructions::{self, ibpb};
use testudo_vmx::hw::{HostState, Vmcs};
use testudo_vmx::{Defects, VmxCaps, fields};

use super::apic::VirtualApic;
use super::mode::{LMA, MCE, Mode};
use super::processor::Level;
use super::{Controls, Processor, ThisProcessor, VmxTables, VmxVcpu, setup};
pub use crate::backend::flusher::Flusher;
use crate::emulate::linear::StageAccess;
use crate::stats::Settled;
use crate::vcpu::{Vcpu, VcpuError, VmExit};

/// What a vCPU needs to be a hypervisor's.
pub struct NestedParts<'t, S> {
    /// The capabilities that L1 is shown.
    pub caps: VmxCaps,
    /// Whether L1 is offered enlightened VMCSs: then `caps` are such.
    pub enlightened: bool,
    /// The VPID of L2: not 0.
    pub vpid: u16,
    /// The controls that the vCPU was made with.
    pub controls: &'t Controls,
    /// The tables that it was made with.
    pub tables: &'t VmxTables,
    /// The MSR bitmap among them.
    pub l1_msr_bitmap: &'t MsrBitmap,
    /// A page for L2's MSR bitmap, and its physical address.
    pub msr_bitmap: (Box<MsrBitmap>, Hpa),
    /// For VMCS shadowing, on a processor that has it ([`offers_shadowing`]).
    pub shadowing: Option<ShadowBitmaps>,
    /// What composes L1's EPT with ours.
    pub stage: S,
    /// The flusher that `stage` was made with.
    pub flusher: Flusher,
    /// Whether the processor has IBPB (CPUID 7 EDX bit 26).
    pub has_predictor_barrier: bool,
}

/// The bitmaps of [`shadow_bitmaps`](testudo_nested::vmx::shadow_bitmaps) at their physical addresses:
/// which fields L1's VMREAD, and which its VMWRITE, reach without an exit.
#[derive(Clone, Copy, Debug)]
pub struct ShadowBitmaps {
    /// Of VMREAD.
    pub reads: Hpa,
    /// Of VMWRITE.
    pub writes: Hpa,
}

/// Whether the processor can let L1's VMREAD and VMWRITE reach a shadow VMCS, all of whose fields
/// software can write.
pub fn offers_shadowing(caps: &VmxCaps) -> bool {
    caps.secondary.allows(SHADOWING) && caps.misc.vmwrite_any_field()
}

pub(super) const SHADOWING: SecondaryControls = SecondaryControls::VMCS_SHADOWING;
const VMXE: u64 = Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits();

/// How many ticks of the time-stamp counter L2's turn takes at most where an interrupt does not always end it
/// ([`Defects::HOLDS_INTERRUPTS_BACK`]): 10 ms on the one processor with this defect. An L1 that
/// waits for what it interrupts on another processor goes on so late at the latest.
const TURN: u64 = 1 << 20;

/// After how many units of the preemption timer L2's turn ends at the latest; `None` where interrupts end it anyway,
/// or there is no such timer.
pub fn longest_turn(caps: &VmxCaps) -> Option<NonZeroU32> {
    let holds_back = Defects::of(caps).contains(Defects::HOLDS_INTERRUPTS_BACK);
    let has_timer = caps.pin.allows(PinControls::ACTIVATE_PREEMPTION_TIMER);
    let turn = preemption_timer(TURN, caps.misc.preemption_timer_shift());
    NonZeroU32::new(turn).filter(|_| holds_back && has_timer)
}

/// Secondary controls with which a hypervisor gives its guests an instruction or a mode.
const GRANTS: SecondaryControls = SecondaryControls::ENABLE_RDTSCP
    .union(SecondaryControls::ENABLE_INVPCID)
    .union(SecondaryControls::ENABLE_EPT)
    .union(SecondaryControls::UNRESTRICTED_GUEST);

pub(super) struct Nested<S> {
    pub(super) state: NestedVmx,
    pub(super) stage: S,
    flusher: Flusher,
    has_predictor_barrier: bool,
    /// The shadow VMCS, if there is one, and whether L1's VMREAD and VMWRITE reach it now.
    pub(super) shadow: Option<Hpa>,
    pub(super) shadowing: bool,
    /// L2's next entry delivers an event, and is to end right after it.
    pub(super) delivery_due: bool,
    /// L2's turn has ended otherwise than by an exit of its own.
    pub(super) interrupted: bool,
    /// An INIT waits for the end of VMX root operation.
    pub(super) init_waits: bool,
    /// What L1's EPT has refused to an instruction of L2's that is emulated, at which linear address.
    pub(super) refused: Option<(EptFault, Gva)>,
    pub(super) counts: Counts,
}

/// What happened between the levels.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) entries: u64,
    pub(super) exits: u64,
    pub(super) events: u64,
    pub(super) resumed: u64,
    pub(super) accesses: u64,
    pub(super) instructions: u64,
}

/// A call of the layer with all that it works on.
macro_rules! layer {
    ($vcpu:ident, $nested:ident, $method:ident($($argument:expr),*)) => {
        $nested.state.$method(
            $($argument,)*
            &mut testudo_nested::vmx::Context {
                gprs: &mut $vcpu.registers.gprs,
                msrs: &mut $vcpu.processor.guest_msrs(),
                vmcs: &mut $crate::backend::vmx::Pair(&mut $vcpu.processor),
                memory: &$vcpu.memory,
                second_stage: &mut $nested.stage,
            },
        )
    };
}

pub(super) use layer;

impl<'a, M: GuestMemory, S: SecondStage> VmxVcpu<'a, ThisProcessor<'a>, M, S> {
    /// Offers the guest VMX. L2 is to run with `vmcs`, and L1's VMREAD and VMWRITE are to reach
    /// `shadow` with the bitmaps among the parts; both are clear, and this vCPU's alone.
    ///
    /// # Errors
    ///
    /// An access to a VMCS failed.
    ///
    /// # Safety
    ///
    /// What [`VmxVcpu::new`] asks, for these parts: all bitmaps are at their addresses, the VPID is no
    /// other guest's on this processor, and `stage` gives EPT pointers of tables that are in place
    /// and reach only the guest's memory.
    #[allow(
        unsafe_code,
        reason = "entering a guest rests on what the caller put in memory"
    )]
    pub unsafe fn with_nested(
        mut self,
        parts: NestedParts<'_, S>,
        vmcs: &'a mut Vmcs,
        shadow: Option<&'a mut Vmcs>,
    ) -> Result<Self, VcpuError> {
        let flush = parts.controls.flush(self.caps, parts.vpid);
        let at = shadow.as_ref().map(|shadow| shadow.address());
        // SAFETY: the kind was chosen from the processor's capabilities.
        unsafe { self.processor.add(vmcs, flush, shadow) };
        self.processor
            .select(Level::L2)
            .map_err(VcpuError::Vmptrld)?;
        // SAFETY: the caller's promise.
        unsafe { HostState::of_this_processor() }.write(&mut self.processor)?;
        if let Some(kind) = flush {
            // SAFETY: a current VMCS is in VMX root operation, and the kind was chosen from the
            // processor's capabilities.
            unsafe { instructions::invvpid(kind).map_err(VcpuError::Invalidation)? };
        }
        self.nest(parts, at)?;
        Ok(self)
    }
}

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// Sets L2's VMCS up as L1's was, and begins outside VMX operation.
    pub(super) fn nest(
        &mut self,
        parts: NestedParts<'_, S>,
        shadow: Option<Hpa>,
    ) -> Result<(), VcpuError> {
        self.select(Level::L1)?;
        let virtual_apic = Hpa(self.processor.get(fields::VIRTUAL_APIC_ADDRESS)?);
        self.select(Level::L2)?;
        setup::write(
            &mut self.processor,
            parts.controls,
            parts.tables,
            virtual_apic,
            parts.vpid,
        )?;
        self.select(Level::L1)?;
        let shadow = shadow.filter(|_| offers_shadowing(self.caps));
        if let Some(bitmaps) = parts.shadowing
            && shadow.is_some()
        {
            self.processor
                .set(fields::VMREAD_BITMAP_ADDRESS, bitmaps.reads.0)?;
            self.processor
                .set(fields::VMWRITE_BITMAP_ADDRESS, bitmaps.writes.0)?;
        }
        self.imposed.offer_vmx();
        let mut caps = parts.caps;
        caps.cr4.may &= self.imposed.cr4_guest;
        if let Some(shadow) = &mut self.shadow {
            shadow.paging.offer_cr4(VMXE);
            caps.cr4.may &= shadow.paging.allowed_cr4();
        }
        // What L1 grants L2 takes effect only where L1 itself has it.
        let granted = parts.controls.secondary | !GRANTS;
        let secondary = caps.secondary.may_be_one() & granted;
        caps.secondary = Allowed::new(caps.secondary.must_be_one(), secondary);
        let mut processor = self.caps.clone();
        processor.cr4.ones |= MCE;
        let (bitmap, at) = parts.msr_bitmap;
        let mut state = NestedVmx::new(caps, &processor, parts.l1_msr_bitmap, bitmap, at);
        state = state.with_ept_pointer(parts.tables.ept_pointer);
        if parts.enlightened {
            state = state.with_enlightened_vmcs();
        }
        if let Some(turn) = longest_turn(self.caps) {
            state = state.with_turns(turn);
        }
        self.nested = Some(Nested {
            state,
            stage: parts.stage,
            flusher: parts.flusher,
            has_predictor_barrier: parts.has_predictor_barrier,
            shadow: shadow.filter(|_| parts.shadowing.is_some()),
            shadowing: false,
            delivery_due: false,
            interrupted: false,
            init_waits: false,
            refused: None,
            counts: Counts::default(),
        });
        Ok(())
    }

    pub(super) fn select(&mut self, level: Level) -> Result<(), VcpuError> {
        self.processor.select(level).map_err(VcpuError::Vmptrld)
    }

    /// Runs L2 once; gives what the machine must decide.
    ///
    /// Most exits are L1's and nothing else is to be done about them. That is here; the rest are calls, whose results
    /// are far larger.
    #[inline(never)]
    pub(super) fn run_l2(&mut self) -> Option<Result<VmExit, VcpuError>> {
        let nested = self.nested.as_mut()?;
        if core::mem::take(&mut nested.delivery_due) {
            return Some(Ok(VmExit::DeliveryDue));
        }
        if let Err(error) = self.make_l2_ready() {
            return Some(Err(error));
        }
        if self.shadow.is_some() {
            match self.run_l2_on_shadow() {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(settled)) => return settled.map(Ok),
                Err(error) => return Some(Err(error)),
            }
        } else if let Err(error) = self.enter_unread() {
            return self.l2_was_refused(error).transpose();
        }
        let nested = self.nested.as_mut()?;
        match layer!(self, nested, exited()) {
            Ok(Handled::L1(barrier)) => {
                nested.counts.exits = nested.counts.exits.wrapping_add(1);
                barrier.discharge(predictor_barrier(nested.has_predictor_barrier));
                self.return_to_l1().err().map(Err)
            }
            Ok(Handled::Resume) => {
                nested.counts.resumed = nested.counts.resumed.wrapping_add(1);
                self.rsp_agreed = self.registers.gprs.rsp;
                None
            }
            Ok(Handled::L0) => self.settle_exit_of_l2().transpose(),
            Ok(Handled::Memory(gpa)) => self.settle_access_of_l2(gpa).transpose(),
            Ok(Handled::Abort) => Some(Ok(VmExit::Shutdown)),
            Err(error) => Some(Err(error.into())),
        }
    }

    /// L2 is entered with what its VMCS names as that is now.
    #[inline(always)]
    fn make_l2_ready(&mut self) -> Result<(), VcpuError> {
        self.flush_what_l1_flushed()?;
        if self.are_frames_stale() {
            self.renew_frames()?;
        }
        Ok(())
    }

    #[inline(never)]
    fn settle_exit_of_l2(&mut self) -> Result<Option<VmExit>, VcpuError> {
        // The layer has read RSP.
        self.rsp_agreed = self.registers.gprs.rsp;
        let reason = self.read_reason()?;
        self.settle(reason)
    }

    /// An access to a device of L0's, at whatever address L2 knows it by: the instruction is emulated with the
    /// translations of both stages.
    fn settle_access_of_l2(&mut self, gpa: Gpa) -> Result<Option<VmExit>, VcpuError> {
        Ok(match self.settle_exit_of_l2()? {
            Some(VmExit::Memory(access)) => {
                Some(VmExit::Memory(crate::vcpu::MemoryAccess { gpa, ..access }))
            }
            other => other,
        })
    }

    /// Whether L2's VMCS names frames of the guest's memory that may be others' by now.
    #[inline(always)]
    pub(super) fn are_frames_stale(&self) -> bool {
        let nested = self.nested.as_ref();
        nested.is_some_and(|nested| nested.state.are_frames_stale())
    }

    /// Has it name those that the guest has there now.
    #[cold]
    pub(super) fn renew_frames(&mut self) -> Result<(), VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        match layer!(self, nested, renew_frames())? {
            true => self.select(self.level),
            false => Err(VcpuError::LostApicPage),
        }
    }

    /// The processor did not enter L2. Of what it checks L1 can change one thing after the layer has looked at it:
    /// the task priority in L2's virtual-APIC page. An L2 that runs exits if it falls below the threshold.
    #[cold]
    fn l2_was_refused(&mut self, error: VcpuError) -> Result<Option<VmExit>, VcpuError> {
        let nested = self.nested.as_ref();
        let is_below = nested.is_some_and(|nested| nested.state.may_be_below_threshold());
        match error {
            VcpuError::VmEntry(refusal) if is_below && refusal.is_of_control() => {
                self.l2_exits_below_threshold()?;
                Ok(None)
            }
            _ => Err(error),
        }
    }

    /// Whose a page fault of L2 on shadow paging is, and what becomes of it.
    pub(super) fn exited_by_page_fault(
        &mut self,
        whose: PageFaultOf,
    ) -> Result<Handled, VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(Handled::L0);
        };
        let handled = layer!(self, nested, exited_by_page_fault(whose))?;
        self.rsp_agreed = self.registers.gprs.rsp;
        match handled {
            Handled::L1(_) => nested.counts.exits += 1,
            Handled::Resume => nested.counts.resumed += 1,
            _ => {}
        }
        Ok(handled)
    }

    /// The barrier between L2 and L1 takes effect.
    pub(super) fn discharge(&self, barrier: PredictorBarrier) {
        let nested = self.nested.as_ref();
        let exists = nested.is_some_and(|nested| nested.has_predictor_barrier);
        barrier.discharge(predictor_barrier(exists));
    }

    /// A VMX instruction of L1's, whose exit is in its VMCS.
    #[inline(never)]
    pub(super) fn vmx_instruction(
        &mut self,
        instruction: Instruction,
    ) -> Result<Option<VmExit>, VcpuError> {
        if self.shadow.is_some() {
            self.take_off_l1_shadow()?;
        }
        // An interrupt that L1's processor has requested and not delivered, for instance since L1 enters its guest with
        // interrupts off.
        let mut requested = false;
        if self.apic.is_some() && is_entry(instruction) {
            requested = self.processor.get(fields::GUEST_INTERRUPT_STATUS)? & 0xFF != 0;
        }
        let Some(nested) = &mut self.nested else {
            return Ok(Some(VmExit::Forbidden));
        };
        match instruction {
            Instruction::Vmread | Instruction::Vmwrite => nested.counts.accesses += 1,
            Instruction::Vmlaunch | Instruction::Vmresume => nested.counts.entries += 1,
            _ => nested.counts.instructions += 1,
        }
        let outcome = layer!(self, nested, execute(instruction))?;
        self.rsp_agreed = self.registers.gprs.rsp;
        match outcome {
            Outcome::Done => {
                let waited = instruction == Instruction::Vmxoff && nested.init_waits;
                self.follow_shadowing()?;
                self.select(Level::L1)?;
                self.l1_goes_on()?;
                Ok(waited.then_some(VmExit::InterruptWindow))
            }
            Outcome::Fault(fault) => {
                self.select(Level::L1)?;
                self.l1_goes_on()?;
                if let Some(address) = fault.cr2 {
                    self.set_cr2(address);
                }
                self.inject(fault.event);
                Ok(None)
            }
            Outcome::Entered { halted } => {
                self.follow_shadowing()?;
                self.select(Level::L2)?;
                self.level = Level::L2;
                if self.shadow.is_some() {
                    self.note_l2_entry()?;
                }
                let events = self.look_at_events(halted);
                Ok(events.or(requested.then_some(VmExit::InterruptWindow)))
            }
            Outcome::FailedEntry => {
                self.follow_shadowing()?;
                self.return_to_l1()?;
                Ok(None)
            }
            Outcome::Abort => Ok(Some(VmExit::Shutdown)),
            Outcome::Hypercall => {
                self.l1_goes_on()?;
                Ok(Some(VmExit::Hypercall))
            }
        }
    }

    /// L1 goes on after an instruction at which the nested layer looked.
    #[inline]
    pub(super) fn l1_goes_on(&mut self) -> Result<(), VcpuError> {
        match self.shadow {
            None => Ok(()),
            Some(_) => self.put_on_l1_shadow(),
        }
    }

    /// L2 executed a HLT that L1 does not want to see; it waits.
    pub(super) fn note_l2_halt(&mut self) {
        if let Some(nested) = &mut self.nested {
            nested.state.note_halt();
        }
    }

    /// An interrupt of L1's that is acknowledged: whether it was only the notification of those that are posted to L2, and
    /// then whether L2's halt ends.
    pub(super) fn try_notification(&mut self, vector: u8) -> Result<Option<bool>, VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(None);
        };
        let posted = layer!(self, nested, take_notification(vector))?;
        self.select(self.level)?;
        Ok(match posted {
            Posted::No => None,
            Posted::Taken { due } => Some(due),
        })
    }

    /// Whether an interrupt that the processor delivers to L2 ends its halt at once.
    pub(super) fn l2_has_virtual_interrupt(&mut self) -> Result<bool, VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(false);
        };
        let due = layer!(self, nested, has_virtual_interrupt())?;
        self.select(self.level)?;
        Ok(due)
    }

    /// Has the machine look once more at what waited for L1, which may end L2's turn at once.
    fn look_at_events(&self, halted: bool) -> Option<VmExit> {
        if halted {
            return Some(VmExit::EnteredHalted);
        }
        let nmi = self.primary.contains(PrimaryControls::NMI_WINDOW_EXITING);
        let nested = self.nested.as_ref();
        let init = nested.is_some_and(|nested| nested.init_waits);
        (nmi || init || self.window.is_some()).then_some(VmExit::InterruptWindow)
    }

    /// L1 runs next: what is known of its registers is what the exit loaded. (A call of its own is 20 instructions
    /// of each exit.)
    #[inline(always)]
    pub(super) fn return_to_l1(&mut self) -> Result<(), VcpuError> {
        self.select(Level::L1)?;
        self.level = Level::L1;
        self.rsp_agreed = self.registers.gprs.rsp;
        self.cache.forget();
        self.injection = None;
        if let Some(nested) = &self.nested {
            let &ControlRegisters { cr0, cr4, efer } = nested.state.l1_control_registers();
            self.mode = Mode { cr0, cr4, efer };
            // The exit has loaded it so.
            let long = efer & LMA != 0;
            self.entry.set(EntryControls::IA32E_MODE_GUEST, long);
        }
        self.flush_what_l1_flushed()?;
        if self.shadow.is_some() {
            if self.mode.pae_paging() {
                // An exit loads the page-directory pointers (SDM vol. 3C, 30.5.4).
                self.forget_l1_shadow();
            }
            self.put_on_l1_shadow()?;
        }
        if self.apic.as_ref().is_some_and(VirtualApic::is_behind) {
            self.tell_apic();
        }
        let open = PrimaryControls::INTERRUPT_WINDOW_EXITING;
        if self.window.is_some() || self.tpr_threshold != 0 || self.primary.contains(open) {
            self.open_window();
        }
        Ok(())
    }

    /// What changed in L1's local APIC while L2 ran.
    #[cold]
    fn tell_apic(&mut self) {
        let waiting = self.apic.as_mut().and_then(VirtualApic::take_waiting);
        if let Some(state) = waiting {
            self.set_apic(&state);
        }
    }

    /// L1's secondary controls, whatever its local APIC's mode.
    pub(super) fn l1_secondary(&self) -> SecondaryControls {
        let shadowing = self.nested.as_ref().is_some_and(|nested| nested.shadowing);
        let mut secondary = self.controls.secondary;
        secondary.set(SHADOWING, shadowing);
        secondary
    }

    #[inline(always)]
    fn flush_what_l1_flushed(&mut self) -> Result<(), VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let flush = nested.state.take_flush();
        if let Some(shadow) = &mut self.shadow {
            shadow.is_l1_stale |= flush.contains(Flush::L1);
            shadow.is_l2_stale |= flush.contains(Flush::VPID);
        } else if nested.flusher.take() | flush.contains(Flush::EPT) {
            self.processor
                .forget_ept()
                .map_err(VcpuError::Invalidation)?;
        }
        for (due, level) in [(Flush::VPID, Level::L2), (Flush::L1, Level::L1)] {
            if flush.contains(due) {
                let forgotten = self.processor.forget_translations(level);
                forgotten.map_err(VcpuError::Invalidation)?;
            }
        }
        Ok(())
    }

    /// What happened between the levels, by name.
    pub(super) fn settled_exits(&self) -> Option<Settled> {
        let Counts {
            entries,
            exits,
            events,
            resumed,
            accesses,
            instructions,
        } = self.nested.as_ref()?.counts;
        Some([
            ("nested entry", entries),
            ("nested exit", exits),
            ("nested event", events),
            ("nested EPT", resumed),
            ("VMREAD, VMWRITE", accesses),
            ("other VMX", instructions),
        ])
    }

    /// Where an address of whoever runs lies in the machine, to read what is there.
    pub(super) fn find_nested(&mut self, gpa: Gpa) -> Option<Gpa> {
        match &mut self.nested {
            Some(nested) if nested.state.is_nested_paging() => nested.stage.translate(gpa, false),
            _ => Some(gpa),
        }
    }

    /// As [`Self::find_nested`], for an access of an instruction of its that is emulated: if L1's EPT refuses
    /// it, that is kept in mind.
    pub(super) fn translate_nested(&mut self, gpa: Gpa, access: &StageAccess) -> Option<Gpa> {
        use EptQualification as Q;
        let nested = self.nested.as_mut();
        let Some(nested) = nested.filter(|nested| nested.state.is_nested_paging()) else {
            return Some(gpa);
        };
        let found = nested.stage.translate(gpa, access.write);
        if found.is_none() {
            let mut cause = Q::LINEAR_VALID;
            cause.set(Q::READ, !access.write && !access.fetch);
            cause.set(Q::WRITE, access.write);
            cause.set(Q::FETCH, access.fetch);
            cause.set(Q::TRANSLATED, !access.table);
            let qualification = cause.bits();
            let fault = EptFault { gpa, qualification };
            nested.refused = Some((fault, access.linear));
        }
        found
    }
}

const fn is_entry(instruction: Instruction) -> bool {
    matches!(instruction, Instruction::Vmlaunch | Instruction::Vmresume)
}

/// The barrier between what L2 taught the branch predictor and L1.
fn predictor_barrier(exists: bool) -> impl FnOnce() {
    move || {
        if exists {
            // SAFETY: the processor has it.
            #[allow(unsafe_code, reason = "an MSR that only processors with IBPB have")]
            unsafe {
                ibpb();
            }
        }
    }
}
