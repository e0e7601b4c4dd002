//! The guest as a hypervisor: which of its guests runs, and who takes what.
//!
//! The decisions are the nested layer's ([`testudo_nested::svm`]). Here they meet the processor:
//! which VMCB is entered with which ASID, and what becomes of the interrupts that the machine has.

use alloc::vec::Vec;

use testudo_arch::{Event, Exception, Gpa, GuestMemory};
use testudo_nested::svm::{
    Acceptance, Context, Handled, Instruction, NestedFault, NestedSvm, Outcome, PageFaultOf,
    PhysicalEvent, PredictorBarrier, RestoreError, SavedSvm, SecondStage,
};
use testudo_svm::exit::{ExitCode, NestedFaultBits, NestedPageFault};
use testudo_svm::hw::VmcbFrame;
use testudo_svm::hw::instructions::ibpb;
use testudo_svm::intercept::Misc1;
use testudo_svm::vmcb::VintrFlags;
use testudo_svm::{Exit, Vmcb};

use super::exit::{hide_lme, memory_exit, show_lme};
use super::{Processor, SVME, SvmVcpu};
pub use crate::backend::flusher::Flusher;
use crate::emulate::linear::StageAccess;
use crate::stats::Settled;
use crate::vcpu::{AwaitedInterrupt, InitSignal, NestedStateError, Vcpu, VmExit};

/// The error code of the one #SX that there is (APM vol. 2, 15.28).
const INIT_REDIRECTED: u32 = 1;

const PAGE_FAULT: u64 = *ExitCode::EXCEPTION.start() + Exception::PageFault.vector() as u64;

/// What a vCPU needs to be a hypervisor's.
pub struct NestedParts<S> {
    /// The nested state.
    pub state: NestedSvm,
    /// What composes nested page tables.
    pub stage: S,
    /// The flusher that `stage` was made with.
    pub flusher: Flusher,
}

pub(super) struct Nested<S> {
    pub(super) state: NestedSvm,
    pub(super) stage: S,
    flusher: Flusher,
    /// L2's turn has ended otherwise than by an exit of its own.
    pub(super) interrupted: bool,
    /// An INIT waits, and an NMI: both may be due as soon as GIF is set.
    pub(super) init_waits: bool,
    pub(super) nmi_waits: bool,
    /// What L1's table has refused to an instruction of L2's that is emulated.
    pub(super) refused: Option<NestedPageFault>,
    counts: Counts,
}

/// What happened between the levels.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    entries: u64,
    exits: u64,
    events: u64,
    resumed: u64,
    instructions: u64,
}

impl<S> Nested<S> {
    /// Whether whoever runs takes this event now.
    pub(super) fn delivers(&self, event: PhysicalEvent, vmcb01: &Vmcb) -> bool {
        self.state.acceptance(event, vmcb01) == Acceptance::Deliver
    }
}

impl<'a, M: GuestMemory, S: SecondStage, P: Processor> SvmVcpu<'a, M, S, P> {
    /// Offers the guest SVM.
    #[must_use]
    pub fn with_nested(mut self, parts: NestedParts<S>) -> Self {
        let NestedParts {
            state,
            stage,
            flusher,
        } = parts;
        state.adjust_vmcb01(&mut self.vmcb01);
        self.nested = Some(Nested {
            state,
            stage,
            flusher,
            interrupted: false,
            init_waits: false,
            nmi_waits: false,
            refused: None,
            counts: Counts::default(),
        });
        self
    }

    /// What happened between the levels, by name.
    pub(super) fn settled_exits(&self) -> Option<Settled> {
        let Counts {
            entries,
            exits,
            events,
            resumed,
            instructions,
        } = self.nested.as_ref()?.counts;
        Some([
            ("nested entry", entries),
            ("nested exit", exits),
            ("nested event", events),
            ("nested NPT", resumed),
            ("other SVM", instructions),
            Default::default(),
        ])
    }

    /// EFER as whoever runs reads it.
    pub(super) fn visible_efer(&self) -> u64 {
        let efer = match self.l1_paging() {
            Some(paging) => paging.mode().efer | SVME,
            None => self.vmcb().efer(),
        };
        match &self.nested {
            Some(nested) => nested.state.visible_efer(efer),
            None => efer & !SVME,
        }
    }

    /// Before L1 runs: its address space, which it may have asked to be flushed.
    pub(super) fn prepare_l1(&mut self) {
        if let Some(nested) = &mut self.nested
            && nested.state.take_l1_flush()
        {
            self.l1_asid.flush();
        }
        self.asids.prepare(&mut self.l1_asid, &mut self.vmcb01);
    }

    /// Runs L2 once; gives what the machine must decide.
    #[inline(never)]
    pub(super) fn run_l2(&mut self) -> Option<VmExit> {
        if self.shadow.is_some() && !self.put_on_l2_shadow() {
            return None;
        }
        self.enter_gate();
        let nested = self.nested.as_mut()?;
        if nested.flusher.take() {
            nested.state.flush_translations();
        }
        let asid = nested.state.asid_slot();
        let (asid, control) = self.asids.assign(asid);
        let address = nested.state.vmcb02_address();
        let vmcb02 = nested.state.vmcb02_mut();
        if vmcb02.asid() != asid.number() {
            vmcb02.set_asid(asid.number());
        }
        vmcb02.set_tlb_control(control);
        let hidden = self.hides_lme && hide_lme(vmcb02);
        // SAFETY: the layer's pages are where its maker said they are.
        #[allow(unsafe_code, reason = "the address that VMRUN takes")]
        let mut frame = unsafe { VmcbFrame::new(vmcb02, address) };
        // SAFETY: the layer merges every intercept of `vmcb01` into this block at each VMRUN of
        // L1's; its tables are compositions with L0's, or L0's own.
        #[allow(unsafe_code, reason = "the entry of a nested guest; see `new`")]
        unsafe {
            self.processor.enter(&mut frame, &mut self.registers);
        }
        show_lme(nested.state.vmcb02_mut(), hidden);
        self.next_rip = if self.saves_next_rip {
            nested.state.vmcb02().n_rip()
        } else {
            0
        };
        self.leave_gate();
        if self.shadow.is_some() {
            self.take_off_l2_shadow();
            if self.vmcb().exit_code() == PAGE_FAULT {
                return self.l2_shadow_fault();
            }
        }
        let nested = self.nested.as_mut()?;
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: self.memory,
            second_stage: &mut nested.stage,
        };
        match nested.state.exited(&mut context) {
            Handled::Resume => {
                nested.counts.resumed += 1;
                None
            }
            Handled::L1(barrier) => {
                nested.counts.exits += 1;
                self.has_left_for_l1(barrier);
                // Mostly none is wanted, and none was open when L1 ran last.
                let is_open = self.vmcb01.intercept_misc1().contains(Misc1::VINTR);
                if is_open || self.window.is_some() {
                    self.apply_window();
                }
                None
            }
            Handled::L0 => match Exit::read(nested.state.vmcb02()) {
                Exit::Exception(exception) => self.reflect(exception),
                exit => self.classify(exit),
            },
            // An access to a device of L0's, at whatever address L2 knows it by: the instruction is
            // emulated with the translations of both stages.
            Handled::Memory(gpa) => match Exit::read(nested.state.vmcb02()) {
                Exit::NestedPageFault(fault) => Some(memory_exit(NestedPageFault { gpa, ..fault })),
                exit => self.classify(exit),
            },
        }
    }

    /// The nested state as bytes.
    pub(super) fn nested_bytes(&self) -> Option<Vec<u8>> {
        let nested = self.nested.as_ref()?;
        let vmcb01 = self.l1_as_it_sees_itself();
        let saved = nested.state.save(&self.registers.gprs, &vmcb01);
        Some(saved.to_bytes())
    }

    /// Begins anew with this nested state: neither L2's control block, nor what was composed, nor L1's
    /// registers while L2 runs, come from anywhere else.
    pub(super) fn take_nested(&mut self, bytes: &[u8]) -> Result<bool, NestedStateError> {
        let nested = self.nested.as_mut();
        let nested = nested.ok_or(NestedStateError::Unsupported)?;
        let saved = SavedSvm::from_bytes(bytes).map_err(RestoreError::from)?;
        nested.state.reset();
        *nested.state.vmcb02_mut() = Vmcb::new();
        nested.stage.flush(None);
        nested.state.restore(
            &saved,
            &mut Context {
                gprs: &mut self.registers.gprs,
                vmcb01: &mut self.vmcb01,
                memory: self.memory,
                second_stage: &mut nested.stage,
            },
        )?;
        let is_guest = nested.state.is_guest();
        nested.interrupted = false;
        self.delivery_due = false;
        if is_guest {
            self.put_l1_on_shadow();
        }
        self.apply_window();
        Ok(is_guest)
    }

    /// Ends or continues L2's turn after a page fault; `true` if L2 itself takes it.
    pub(super) fn settle_l2_page_fault(&mut self, whose: PageFaultOf) -> bool {
        let Some(nested) = &mut self.nested else {
            return false;
        };
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: self.memory,
            second_stage: &mut nested.stage,
        };
        match nested.state.exited_by_page_fault(whose, &mut context) {
            Handled::L1(barrier) => {
                nested.counts.exits += 1;
                self.has_left_for_l1(barrier);
                self.apply_window();
                false
            }
            Handled::L0 => true,
            Handled::Resume | Handled::Memory(_) => {
                nested.counts.resumed += 1;
                false
            }
        }
    }

    /// L2's turn has ended, and L1's begins.
    #[inline]
    fn has_left_for_l1(&mut self, barrier: PredictorBarrier) {
        barrier.discharge(predictor_barrier(self.has_predictor_barrier));
        if self.shadow.is_some() {
            self.has_written_vmcb12();
        }
    }

    /// An exit was written into L1's memory, where a shadowed table may be.
    fn has_written_vmcb12(&mut self) {
        if let Some(nested) = &self.nested {
            let at = nested.state.vmcb12_address();
            self.memory_written(at, size_of::<Vmcb>());
        }
    }

    /// Where an address of L2's lies in L1, for an access that L1's table must allow.
    pub(super) fn translate_nested(&mut self, gpa: Gpa, access: &StageAccess) -> Option<Gpa> {
        let nested = self.nested.as_mut();
        let Some(nested) = nested.filter(|nested| nested.state.is_nested_paging()) else {
            return Some(gpa);
        };
        let found = nested.stage.translate(gpa, access.write);
        if found.is_none() {
            // "Nested page faults are always user faults" but for the guest's own tables (APM vol. 2,
            // 15.25.6).
            let mut bits = NestedFaultBits::USER;
            bits.set(NestedFaultBits::WRITE, access.write);
            bits.set(NestedFaultBits::FETCH, access.fetch);
            bits |= match access.table {
                true => NestedFaultBits::TABLE_WALK,
                false => NestedFaultBits::FINAL,
            };
            nested.refused = Some(NestedPageFault { gpa, bits });
        }
        found
    }

    /// L2 leaves with the nested page fault that the access would have met, if L1's table refuses it still.
    pub(super) fn exit_by_refusal(&mut self) {
        let refused = self.nested.as_mut().and_then(|nested| {
            let refused = nested.refused.take()?;
            match nested.stage.fault(refused) {
                NestedFault::Reflect(fault) => Some(fault),
                NestedFault::Resolved | NestedFault::Host(_) => None,
            }
        });
        if let Some(NestedPageFault { gpa, bits }) = refused {
            self.l2_leaves(ExitCode::NPF, bits.bits(), gpa.0);
        }
    }

    /// L2 leaves with an exception that arose while L0 executed an instruction for it, if L1
    /// intercepts that one. `address` is that of a page fault, which then does not reach CR2 (APM
    /// vol. 2, 15.12.15).
    pub(super) fn l2_exits_by(&mut self, event: Event, address: Option<u64>) -> bool {
        let Event::Exception { vector, error_code } = event else {
            return false;
        };
        let code = ExitCode(ExitCode::EXCEPTION.start() + u64::from(vector & 0x1F));
        // Exceptions without an error code, or without an address, have 0 there (APM vol. 2, 15.12).
        let info1 = error_code.unwrap_or(0).into();
        self.l2_exits(code, info1, address.unwrap_or(0))
    }

    /// L2 leaves with this exit, which the processor did not report, if L1 intercepts it.
    pub(super) fn l2_exits(&mut self, code: ExitCode, info1: u64, info2: u64) -> bool {
        let nested = self.nested.as_ref();
        let wanted = nested.is_some_and(|nested| {
            nested.state.is_guest() && nested.state.vmcb12().intercepts().contains(code)
        });
        if wanted {
            self.l2_leaves(code, info1, info2);
        }
        wanted
    }

    fn l2_leaves(&mut self, code: ExitCode, info1: u64, info2: u64) {
        let Some(nested) = &mut self.nested else {
            return;
        };
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: self.memory,
            second_stage: &mut nested.stage,
        };
        let barrier = nested.state.exit_to_l1(code, info1, info2, &mut context);
        nested.counts.exits += 1;
        self.has_left_for_l1(barrier);
        self.apply_window();
    }

    /// Whether a HLT of L2's ends as soon as it begins: L1 has a virtual interrupt for it, which the
    /// machine knows nothing of.
    pub(super) fn l2_wakes_at_once(&self) -> bool {
        let nested = self.nested.as_ref();
        nested.is_some_and(|nested| nested.state.takes_virtual_interrupt())
    }

    /// An SVM instruction of whoever runs.
    pub(super) fn svm_instruction(&mut self, instruction: Instruction) -> Option<VmExit> {
        if self.nested.is_none() {
            return Some(VmExit::Forbidden);
        }
        let next = self.next_instruction();
        let nested = self.nested.as_mut()?;
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: self.memory,
            second_stage: &mut nested.stage,
        };
        let operand = context.gprs.rax;
        match nested.state.execute(instruction, next, &mut context) {
            Outcome::Done => {
                nested.counts.instructions += 1;
                if instruction == Instruction::Vmsave {
                    self.memory_written(Gpa(operand), size_of::<Vmcb>());
                }
                None
            }
            Outcome::Refused => {
                nested.counts.instructions += 1;
                self.has_written_vmcb12();
                None
            }
            Outcome::Entered => {
                nested.counts.entries += 1;
                if let Some(shadow) = &mut self.shadow {
                    shadow.is_l2_new = true;
                }
                let waits = nested.init_waits || nested.nmi_waits;
                // An entry leaves none open.
                if self.window.is_some() {
                    self.apply_window();
                }
                waits.then_some(VmExit::InterruptWindow)
            }
            Outcome::GifSet => {
                nested.state.set_gif_window(false, &mut self.vmcb01);
                Some(VmExit::InterruptWindow)
            }
            Outcome::Fault(event) => {
                nested.counts.instructions += 1;
                self.raise(event, None)
            }
        }
    }

    /// Has the processor tell when it can take what the machine wants to deliver.
    pub(super) fn apply_window(&mut self) {
        let Some(nested) = &mut self.nested else {
            return set_window(&mut self.vmcb01, self.window);
        };
        if !nested.state.is_guest() {
            let open = nested.state.gif(&self.vmcb01) || has_hardware_gif(&self.vmcb01);
            return set_window(&mut self.vmcb01, self.window.filter(|_| open));
        }
        let acceptance = nested
            .state
            .acceptance(PhysicalEvent::Interrupt, &self.vmcb01);
        match acceptance {
            Acceptance::Exit(code) if self.window.is_some() => {
                if self.exit_to_l1(code) {
                    self.apply_window();
                }
            }
            _ => nested.state.set_window(self.window.is_some(), &self.vmcb01),
        }
    }

    /// An NMI waits, or none does any more.
    pub(super) fn apply_nmi_window(&mut self, wanted: bool) {
        let Some(nested) = &mut self.nested else {
            return;
        };
        nested.nmi_waits = wanted;
        match nested.state.acceptance(PhysicalEvent::Nmi, &self.vmcb01) {
            Acceptance::Exit(code) if wanted => {
                if self.exit_to_l1(code) {
                    self.apply_nmi_window(wanted);
                    self.apply_window();
                }
            }
            _ => {
                let closed = !nested.state.gif(&self.vmcb01);
                let wanted = wanted || nested.init_waits;
                nested
                    .state
                    .set_gif_window(wanted && closed, &mut self.vmcb01);
            }
        }
    }

    /// What an INIT does. While GIF is clear it is held pending (APM vol. 2, 15.17); L1 may intercept it,
    /// and then has it pending still (15.13); and VM_CR.R_INIT makes an exception of it (15.28).
    pub(super) fn nested_init(&mut self) -> InitSignal {
        let Some(nested) = &mut self.nested else {
            return InitSignal::Resets;
        };
        let acceptance = nested.state.acceptance(PhysicalEvent::Init, &self.vmcb01);
        nested.init_waits = acceptance != Acceptance::Deliver;
        match acceptance {
            Acceptance::Blocked => InitSignal::Waits,
            Acceptance::Exit(code) => {
                if self.exit_to_l1(code) {
                    self.apply_window();
                }
                InitSignal::Waits
            }
            Acceptance::Deliver if !nested.state.redirects_init() => InitSignal::Resets,
            Acceptance::Deliver if self.vmcb().event_inj().is_valid() => {
                self.delivery_due = true;
                InitSignal::Waits
            }
            Acceptance::Deliver => {
                self.is_quiet = false;
                let event = Event::fault_with(Exception::Security, INIT_REDIRECTED);
                if !self.l2_exits_by(event, None) {
                    self.vmcb_mut().set_event_inj(event.into());
                }
                InitSignal::Redirected
            }
        }
    }

    /// Ends L2's turn for a physical event that L1 intercepts; `false` if it must have an event
    /// delivered first.
    ///
    /// VMRUN delivers what EVENTINJ holds before it recognizes any interrupt (APM vol. 2, 15.20),
    /// and hypervisors count on it: one that asks for an interrupt in order to come back right after
    /// the delivery would otherwise ask for ever.
    fn exit_to_l1(&mut self, code: ExitCode) -> bool {
        let Some(nested) = &mut self.nested else {
            return false;
        };
        if nested.state.vmcb02().event_inj().is_valid() {
            self.delivery_due = true;
            return false;
        }
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: self.memory,
            second_stage: &mut nested.stage,
        };
        let barrier = nested.state.exit_to_l1(code, 0, 0, &mut context);
        nested.interrupted = true;
        nested.counts.events += 1;
        self.has_left_for_l1(barrier);
        true
    }
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

/// A window of the guest itself is a virtual interrupt of the same priority, whose intercept comes
/// before its delivery (APM vol. 2, 15.21.4).
fn set_window(vmcb: &mut Vmcb, wanted: Option<AwaitedInterrupt>) {
    let before = vmcb.virtual_interrupts();
    let idle = before.remove(VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR);
    let misc1 = vmcb.intercept_misc1();
    let (asked, misc1) = match wanted {
        Some(AwaitedInterrupt::Vector(vector)) => {
            let asked = idle.insert(VintrFlags::V_IRQ);
            (
                asked.with_priority(vector >> 4).with_vector(vector),
                misc1 | Misc1::VINTR,
            )
        }
        Some(AwaitedInterrupt::External) => (
            idle.insert(VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR),
            misc1 | Misc1::VINTR,
        ),
        None => (idle, misc1 - Misc1::VINTR),
    };
    vmcb.set_virtual_interrupts(asked);
    vmcb.set_intercept_misc1(misc1);
}

/// Whether the processor keeps the guest's GIF, and so delays its virtual interrupts by it.
fn has_hardware_gif(vmcb: &Vmcb) -> bool {
    vmcb.virtual_interrupts().contains(VintrFlags::V_GIF_ENABLE)
}
