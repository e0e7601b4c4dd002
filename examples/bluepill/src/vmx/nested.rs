//! The guest as a hypervisor. What it runs, and who takes what, is the nested layer's to decide
//! (`testudo_nested::vmx`); here its decisions meet the processor. Between two calls the current VMCS is that
//! of whoever runs.
//!
//! Physical interrupts are the guest's: while a guest of its own runs, they exit if it has asked for that, and
//! then it gets that exit.

use alloc::boxed::Box;

use testudo_arch::{Gpa, Hpa, RFlags};
use testudo_machine::backend::vmx::{Level, Pair, Processor, ept_format, longest_turn};
use testudo_nested::vmx::{
    Acceptance, ComposedParts, ComposedStage, Context, Flush, Handled, Instruction, NestedVmx,
    Outcome, PhysicalEvent, PredictorBarrier, SecondStage,
};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::controls::{ActivityState, SecondaryControls};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::{BasicReason, ExitReason};
use testudo_vmx::hw::Vmcs;
use testudo_vmx::hw::instructions::ibpb;
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields};

use super::msr::OpenMsrs;
use super::{Guest, Stage, VPID_L2, VmxError, address};
use crate::apic;
use crate::counts::{self, Reason};
use crate::nesting::{Flusher, PAGE_LIMIT};
use crate::processors;
use crate::view::Translate;
use testudo_rt::memory::Frames;

/// The VM-exit interruption information of an NMI.
const NMI: u32 = 1 << 31 | 2 << 8 | 2;

pub(super) struct Nested {
    pub(super) state: NestedVmx,
    pub(super) stage: Stage,
    flusher: Flusher,
    /// The shadow VMCS, if there is one, and whether the guest's VMREAD and VMWRITE reach it now.
    shadow: Option<Hpa>,
    shadowing: bool,
    /// The guest's guest runs with RFLAGS.IF set for an interrupt that is to end its turn, although it has
    /// cleared it.
    lent_if: bool,
}

impl Translate for Stage {
    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        SecondStage::translate(self, gpa, write)
    }
}

/// A call of the layer with all that it works on.
macro_rules! layer {
    ($guest:ident, $nested:ident, $method:ident($($argument:expr),*)) => {
        $nested.state.$method(
            $($argument,)*
            &mut Context {
                gprs: &mut $guest.registers.gprs,
                msrs: &mut OpenMsrs(&$guest.tables.msr_bitmap),
                vmcs: &mut Pair(&mut $guest.processor),
                memory: &$guest.pill.territory.ram,
                second_stage: &mut $nested.stage,
            },
        )
    };
}

impl<'a> Guest<'a> {
    /// Offers the guest VMX with these capabilities.
    pub(super) fn nest(
        &mut self,
        caps: &VmxCaps,
        vmcs02: &'a mut Vmcs,
        shadow: Option<&'a mut Vmcs>,
    ) -> Result<(), VmxError> {
        let tables = self.tables;
        let at = shadow.as_ref().map(|shadow| shadow.address());
        // SAFETY: the kind was chosen from the processor's capabilities.
        unsafe { self.processor.add(vmcs02, tables.flush(VPID_L2), shadow) };
        self.select(Level::L2)?;
        self.set_up(VPID_L2)?;
        self.select(Level::L1)?;
        if let (Some(bitmaps), Some(_)) = (&tables.shadowing, at) {
            let (reads, writes) = &**bitmaps;
            self.processor
                .set(fields::VMREAD_BITMAP_ADDRESS, address(reads).0)?;
            self.processor
                .set(fields::VMWRITE_BITMAP_ADDRESS, address(writes).0)?;
        }
        let flusher = Flusher::default();
        let parts = ComposedParts {
            memory: &self.pill.territory.ram,
            inner: &tables.ept,
            frames: Frames,
            format: ept_format(&tables.caps),
            l1_format: ept_format(caps),
            page_limit: PAGE_LIMIT,
        };
        let bitmap = Box::new(MsrBitmap::all_exit());
        let bitmap_at = address(&*bitmap);
        let own = &tables.msr_bitmap;
        let mut state = NestedVmx::new(caps.clone(), &tables.caps, own, bitmap, bitmap_at);
        if let Some(turn) = longest_turn(&tables.caps) {
            state = state.with_turns(turn);
        }
        self.nested = Some(Nested {
            state,
            stage: ComposedStage::new(parts, flusher.clone()),
            flusher,
            shadow: at,
            shadowing: false,
            lent_if: false,
        });
        Ok(())
    }
}

impl Guest<'_> {
    pub(super) fn select(&mut self, level: Level) -> Result<(), VmxError> {
        self.processor.select(level).map_err(VmxError::Vmcs)
    }

    /// A VMX instruction of the guest's, whose exit is in its VMCS.
    pub(super) fn execute(&mut self, instruction: Instruction) -> Result<(), VmxError> {
        let Some(nested) = &mut self.nested else {
            return self.inject(testudo_arch::Event::UD);
        };
        let outcome = match layer!(self, nested, execute(instruction))? {
            Outcome::Hypercall => layer!(self, nested, refuse_vmcall())?,
            other => other,
        };
        match outcome {
            Outcome::Done | Outcome::Hypercall => self.follow_shadowing()?,
            Outcome::Fault(fault) => {
                self.select(Level::L1)?;
                if let Some(address) = fault.cr2 {
                    self.registers.cr2 = address;
                }
                self.inject(fault.event)?;
            }
            Outcome::Entered { halted } => {
                self.select(Level::L2)?;
                self.level = Level::L2;
                // The machine's interrupts are the guest's, so that its processor may wait for them here.
                if halted {
                    let state = ActivityState::Hlt.number();
                    self.processor.set(fields::GUEST_ACTIVITY_STATE, state)?;
                }
            }
            Outcome::FailedEntry => self.return_to_guest()?,
            Outcome::Abort => self.end("a VMX abort"),
        }
        if self.init_put_off && !self.blocks_init()? {
            self.init_put_off = false;
            processors::take_up(self.id);
        }
        Ok(())
    }

    /// Whether the guest is in VMX root operation, in which INIT is blocked.
    fn blocks_init(&self) -> Result<bool, VmxError> {
        let Some(nested) = &self.nested else {
            return Ok(false);
        };
        let taken = nested.state.interception(PhysicalEvent::Init)?;
        Ok(taken == Some(Acceptance::Blocked))
    }

    /// After an exit of the guest's guest.
    pub(super) fn settle_inner(&mut self) -> Result<(), VmxError> {
        counts::count(self.id, Reason::Nested);
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        if core::mem::take(&mut nested.lent_if) {
            let flags = self.processor.get(fields::GUEST_RFLAGS)?;
            let flags = flags & !RFlags::INTERRUPT_FLAG.bits();
            self.processor.set(fields::GUEST_RFLAGS, flags)?;
        }
        match layer!(self, nested, exited())? {
            Handled::Resume => Ok(()),
            Handled::L1(barrier) => self.return_by(barrier),
            Handled::L0 | Handled::Memory(_) => {
                let reason = ExitReason::read(&self.processor)?;
                self.handle(reason)
            }
            Handled::Abort => self.end("a VMX abort"),
        }
    }

    /// The turn of the guest's guest ends where interrupts do not always end it. If one waits that the guest wants
    /// to exit for, RFLAGS.IF lets the processor see it, and the entry exits before the first instruction.
    pub(super) fn end_turn(&mut self) -> Result<(), VmxError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let taken = nested.state.interception(PhysicalEvent::Interrupt)?;
        if !matches!(taken, Some(Acceptance::Exit { .. })) || !apic::has_pending() {
            return Ok(());
        }
        let flags = self.processor.get(fields::GUEST_RFLAGS)?;
        let event = self.processor.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        // What comes before an interrupt would see the flag.
        let before = self.processor.get(fields::GUEST_INTERRUPTIBILITY)?
            | self.processor.get(fields::GUEST_ACTIVITY_STATE)?;
        if flags & RFlags::INTERRUPT_FLAG.bits() == 0
            && before == 0
            && !InterruptionInformation(event).is_valid()
        {
            let flags = flags | RFlags::INTERRUPT_FLAG.bits();
            self.processor.set(fields::GUEST_RFLAGS, flags)?;
            nested.lent_if = true;
        }
        Ok(())
    }

    /// Gives the guest an exit of its guest.
    pub(super) fn leave_inner(
        &mut self,
        reason: BasicReason,
        qualification: u64,
        interruption: u32,
    ) -> Result<(), VmxError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        match layer!(
            self,
            nested,
            exit_to_l1(reason, qualification, interruption)
        )? {
            Handled::L1(barrier) => self.return_by(barrier),
            Handled::Abort => self.end("a VMX abort"),
            Handled::Resume | Handled::L0 | Handled::Memory(_) => Ok(()),
        }
    }

    /// Ends the turn of the guest's guest if the guest wants that for this event; says whether.
    pub(super) fn leave_inner_for(&mut self, event: PhysicalEvent) -> Result<bool, VmxError> {
        if self.level != Level::L2 {
            return Ok(false);
        }
        let Some(nested) = &self.nested else {
            return Ok(false);
        };
        let Some(Acceptance::Exit { reason, .. }) = nested.state.interception(event)? else {
            return Ok(false);
        };
        let information = if event == PhysicalEvent::Nmi { NMI } else { 0 };
        self.leave_inner(reason, 0, information)?;
        Ok(true)
    }

    /// Has the guest's guest exit as soon as it can take an NMI, or not.
    pub(super) fn set_inner_window(&mut self, wanted: bool) -> Result<(), VmxError> {
        if let Some(nested) = &mut self.nested {
            nested
                .state
                .set_nmi_window(wanted, &mut Pair(&mut self.processor))?;
        }
        Ok(())
    }

    fn return_by(&mut self, barrier: PredictorBarrier) -> Result<(), VmxError> {
        let exists = self.has_predictor_barrier;
        barrier.discharge(|| {
            if exists {
                // SAFETY: CPL 0, and the processor has it.
                unsafe { ibpb() };
            }
        });
        self.return_to_guest()
    }

    /// The guest runs next.
    fn return_to_guest(&mut self) -> Result<(), VmxError> {
        self.select(Level::L1)?;
        self.level = Level::L1;
        self.flush_what_the_guest_flushed()
    }

    pub(super) fn flush_what_the_guest_flushed(&mut self) -> Result<(), VmxError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let flush = nested.state.take_flush();
        if nested.flusher.take() || flush.contains(Flush::EPT) {
            let forgotten = self.processor.forget_ept();
            forgotten.map_err(VmxError::Invalidation)?;
        }
        for (due, level) in [(Flush::VPID, Level::L2), (Flush::L1, Level::L1)] {
            if flush.contains(due) {
                let forgotten = self.processor.forget_translations(level);
                forgotten.map_err(VmxError::Invalidation)?;
            }
        }
        Ok(())
    }

    /// While the guest has a current VMCS, its VMREAD and VMWRITE reach the shadow. Without one the control is
    /// off: VMX instructions outside VMX operation must exit, to raise #UD.
    fn follow_shadowing(&mut self) -> Result<(), VmxError> {
        self.select(Level::L1)?;
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let Some(shadow) = nested.shadow else {
            return Ok(());
        };
        let wanted = nested.state.current_vmcs().is_some();
        if wanted == nested.shadowing {
            return Ok(());
        }
        nested.shadowing = wanted;
        let mut secondary = self.tables.controls.secondary;
        secondary.set(SecondaryControls::VMCS_SHADOWING, wanted);
        let link = if wanted { shadow.0 } else { u64::MAX };
        self.processor
            .set(fields::SECONDARY_CONTROLS, secondary.bits())?;
        self.processor.set(fields::VMCS_LINK_POINTER, link)?;
        Ok(())
    }

    /// RESET and INIT end VMX operation.
    pub(super) fn reset_nested(&mut self) -> Result<(), VmxError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        nested.state.reset();
        self.level = Level::L1;
        self.follow_shadowing()
    }
}
