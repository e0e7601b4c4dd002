//! What ends a turn of L2's that no exit of its own ended: the machine's interrupts, NMIs and INITs, and
//! exceptions of instructions that are executed for it.

use testudo_arch::{Event, GuestMemory};
use testudo_nested::vmx::{Acceptance, EptFault, EptHandled, Handled, PhysicalEvent, SecondStage};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::BasicReason;
use testudo_vmx::{AccessError, fields};

use super::nested::layer;
use super::processor::{Level, Pair};
use super::{Processor, VmxVcpu};
use crate::vcpu::{AwaitedInterrupt, InitSignal, Vcpu, VcpuError};

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// What L1 decides about an event while L2 runs; `None` if whoever runs takes it as its own state
    /// lets it.
    fn interception(&self, event: PhysicalEvent) -> Option<Acceptance> {
        let nested = self.nested.as_ref()?;
        self.or_zero(nested.state.interception(event))
    }

    /// Whether L2's next entry delivers an event: L1's, or one whose delivery an exit interrupted.
    fn delivers_event(&self) -> bool {
        let information =
            InterruptionInformation(self.field(fields::ENTRY_INTERRUPTION_INFORMATION));
        self.injection.is_some() || information.is_valid()
    }

    /// The event that the next entry delivers.
    pub(super) fn due_event(&self) -> Result<Option<Event>, AccessError> {
        if self.injection.is_some() || self.level == Level::L1 {
            return Ok(self.injection);
        }
        let information = self.processor.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        let error_code = self.processor.get(fields::ENTRY_EXCEPTION_ERROR_CODE)?;
        let length = self.processor.get(fields::ENTRY_INSTRUCTION_LENGTH)?;
        Ok(InterruptionInformation(information).event(error_code, length))
    }

    /// The next entry delivers no event.
    pub(super) fn call_off_delivery(&mut self) -> Result<(), AccessError> {
        self.injection = None;
        if self.level != Level::L1 {
            let information = fields::ENTRY_INTERRUPTION_INFORMATION;
            self.processor.set(information, 0)?;
        }
        Ok(())
    }

    /// Whether an event ends L2's turn at once, or is L2's own to take if `otherwise`.
    pub(super) fn l2_takes(&self, event: PhysicalEvent, otherwise: bool) -> bool {
        match self.interception(event) {
            Some(Acceptance::Exit { acknowledge, .. }) => {
                let told = acknowledge || event == PhysicalEvent::Nmi;
                told && !self.delivers_event()
            }
            Some(_) => false,
            None => otherwise && !self.delivers_event(),
        }
    }

    /// What an INIT does: in VMX root operation it waits, and in non-root operation it exits (SDM vol.
    /// 3C, 26.8 and 28.2).
    pub(super) fn nested_init(&mut self) -> Result<InitSignal, VcpuError> {
        let interception = self.interception(PhysicalEvent::Init);
        let waits = match interception {
            Some(Acceptance::Exit { .. }) => self.delivers_event(),
            Some(_) => true,
            None => false,
        };
        if let Some(nested) = &mut self.nested {
            nested.init_waits = waits;
        }
        match interception {
            _ if waits => {
                if self.level != Level::L1 {
                    self.end_turn_after_delivery();
                }
                Ok(InitSignal::Waits)
            }
            Some(Acceptance::Exit { reason, .. }) => {
                self.exit_to_l1(reason, 0)?;
                Ok(InitSignal::Exits)
            }
            _ => Ok(InitSignal::Resets),
        }
    }

    /// Ends L2's turn with an event, if L1 intercepts it.
    pub(super) fn l2_exits_by(&mut self, event: Event) -> bool {
        let (kind, information) = match event {
            Event::Interrupt(vector) => (PhysicalEvent::Interrupt, 1 << 31 | u32::from(vector)),
            Event::Nmi => (PhysicalEvent::Nmi, 1 << 31 | 2 << 8 | 2),
            _ => return false,
        };
        let Some(Acceptance::Exit { reason, .. }) = self.interception(kind) else {
            return false;
        };
        if let Err(error) = self.exit_to_l1(reason, information) {
            self.remember(error);
        }
        true
    }

    /// An exception of an instruction that L0 executed for L2 ends its turn, if L1 intercepts it.
    /// `address` is that of a page fault.
    pub(super) fn l2_exits_by_exception(&mut self, event: Event, address: Option<u64>) -> bool {
        let Event::Exception { vector, error_code } = event else {
            return false;
        };
        match self.try_exit_by_exception(vector, error_code, address) {
            Ok(exits) => exits,
            Err(error) => {
                self.remember(error);
                true
            }
        }
    }

    fn try_exit_by_exception(
        &mut self,
        vector: u8,
        error_code: Option<u32>,
        address: Option<u64>,
    ) -> Result<bool, VcpuError> {
        self.prepare()?;
        let Some(nested) = &mut self.nested else {
            return Ok(false);
        };
        let handled = layer!(self, nested, exit_by_exception(vector, error_code, address))?;
        let Some(handled) = handled else {
            return Ok(false);
        };
        nested.counts.exits += 1;
        self.has_left(handled)?;
        Ok(true)
    }

    /// L2 met an exception that it cannot be told of: L1 sees a triple fault.
    pub(super) fn l2_exits_by_triple_fault(&mut self) -> Result<(), VcpuError> {
        self.exit_to_l1(BasicReason::TripleFault, 0)
    }

    /// L2's task priority is below the threshold: the memory that holds it was written by another.
    pub(super) fn l2_exits_below_threshold(&mut self) -> Result<(), VcpuError> {
        self.exit_to_l1(BasicReason::TprBelowThreshold, 0)
    }

    /// L2 leaves with the EPT violation that the access would have met, if L1's EPT refuses it still.
    pub(super) fn exit_by_refusal(&mut self) -> Result<(), VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let Some((fault, linear)) = nested.refused.take() else {
            return Ok(());
        };
        let (reason, qualification) = match nested.stage.fault(fault) {
            EptHandled::Resolved | EptHandled::Host(_) => return Ok(()),
            EptHandled::Violation(qualification) => (BasicReason::EptViolation, qualification),
            EptHandled::Misconfiguration => (BasicReason::EptMisconfiguration, 0),
        };
        self.prepare()?;
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let fault = EptFault {
            qualification,
            ..fault
        };
        let handled = layer!(self, nested, exit_by_ept(reason, fault, linear))?;
        nested.counts.exits += 1;
        self.has_left(handled)
    }

    fn exit_to_l1(&mut self, reason: BasicReason, information: u32) -> Result<(), VcpuError> {
        // What is known of L2 goes to its VMCS, from which the layer takes it.
        self.prepare()?;
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let handled = layer!(self, nested, exit_to_l1(reason, 0, information))?;
        nested.interrupted = true;
        nested.counts.events += 1;
        self.has_left(handled)
    }

    /// L2 has left for L1 otherwise than by an exit of its own.
    fn has_left(&mut self, handled: Handled) -> Result<(), VcpuError> {
        self.rsp_agreed = self.registers.gprs.rsp;
        match handled {
            Handled::L1(barrier) => {
                self.discharge(barrier);
                self.return_to_l1()
            }
            _ => Ok(()),
        }
    }

    /// Has L2 leave when the interrupt that waits can be taken.
    pub(super) fn open_l2_window(&mut self) -> Result<(), VcpuError> {
        match self.interception(PhysicalEvent::Interrupt) {
            Some(Acceptance::Exit {
                reason,
                acknowledge,
            }) => {
                let priority = self.task_priority();
                let due = self.window.is_some_and(|awaited| match awaited {
                    AwaitedInterrupt::Vector(vector) => vector >> 4 > priority,
                    AwaitedInterrupt::External => true,
                });
                if due && self.delivers_event() {
                    self.end_turn_after_delivery();
                } else if due && !acknowledge {
                    return self.exit_to_l1(reason, 0);
                }
                Ok(())
            }
            _ => {
                let wanted = self.window.is_some();
                let Some(nested) = &mut self.nested else {
                    return Ok(());
                };
                nested
                    .state
                    .set_window(wanted, &mut Pair(&mut self.processor))?;
                Ok(())
            }
        }
    }

    /// As [`Self::open_l2_window`], for an NMI.
    pub(super) fn open_l2_nmi_window(&mut self, wanted: bool) -> Result<(), VcpuError> {
        if self.interception(PhysicalEvent::Nmi).is_some() {
            if wanted && self.delivers_event() {
                self.end_turn_after_delivery();
            }
            return Ok(());
        }
        if let Some(nested) = &mut self.nested {
            nested
                .state
                .set_nmi_window(wanted, &mut Pair(&mut self.processor))?;
        }
        Ok(())
    }

    /// An entry delivers what it injects before it recognizes any interrupt (SDM vol. 3C, 29.6), and
    /// hypervisors count on it: one that asks for an interrupt in order to come back right after the
    /// delivery would otherwise ask for ever.
    fn end_turn_after_delivery(&mut self) {
        if let Some(nested) = &mut self.nested {
            nested.delivery_due = true;
        }
    }
}
