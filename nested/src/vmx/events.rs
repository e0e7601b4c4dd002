//! Physical events while L1 or L2 runs: who takes them, and when (SDM vol. 3C, 28.2 and 30.1).
//!
//! "Physical" is L1's word: its virtual processor's interrupt controller, NMI line and so on, which are
//! L0's machine.

use testudo_arch::RFlags;
use testudo_vmx::controls::{ExitControls, Interruptibility, PinControls, PrimaryControls};
use testudo_vmx::event::InterruptionInformation;
use testudo_vmx::exit::BasicReason;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::join::{L0Controls, L1Controls, read_clock};
use super::{NestedVmx, VmcsPair};

pub use crate::svm::PhysicalEvent;

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

impl NestedVmx {
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
        match self.interception(event)? {
            Some(decided) => Ok(decided),
            None if self.is_guest => deliverable(event, &vmcs.l2()),
            None => deliverable(event, &vmcs.l1()),
        }
    }

    /// As [`Self::acceptance`], as far as VMX operation decides; `None` if it is as without: whoever
    /// runs takes the event as soon as its own state lets it.
    ///
    /// # Errors
    ///
    /// Never: L0's copy of L1's VMCS has every field.
    pub fn interception(&self, event: PhysicalEvent) -> Result<Option<Acceptance>, AccessError> {
        if !self.is_guest {
            // INIT is blocked in VMX root operation (26.8).
            let blocked = event == PhysicalEvent::Init && self.vmxon.is_some();
            return Ok(blocked.then_some(Acceptance::Blocked));
        }
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        let (reason, acknowledge) = match event {
            PhysicalEvent::Interrupt
                if l1.pin.contains(PinControls::EXTERNAL_INTERRUPT_EXITING) =>
            {
                let acknowledge = l1.exit.contains(ExitControls::ACKNOWLEDGE_INTERRUPT);
                (BasicReason::ExternalInterrupt, acknowledge)
            }
            PhysicalEvent::Nmi if l1.pin.contains(PinControls::NMI_EXITING) => {
                (BasicReason::ExceptionOrNmi, false)
            }
            // INIT always exits in non-root operation (28.2).
            PhysicalEvent::Init => (BasicReason::Init, false),
            _ => return Ok(None),
        };
        Ok(Some(Acceptance::Exit {
            reason,
            acknowledge,
        }))
    }

    /// Makes L2's clock follow L1's once more, after L0 moved that.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn refresh_clock<P: VmcsPair>(&mut self, vmcs: &mut P) -> Result<(), AccessError> {
        self.settled = None;
        let l0 = L0Controls::read(&vmcs.l1())?;
        let Some(joined) = &mut self.joined else {
            return Ok(());
        };
        let l1 = L1Controls::read(&self.vmcs12.image)?;
        let clock = read_clock(&*self.vmcs12.image, l1.primary, l1.secondary)?;
        joined.tsc_offset = l0.tsc.nested(clock).offset;
        vmcs.l2().set(fields::TSC_OFFSET, joined.tsc_offset)
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
        self.write_window(PrimaryControls::INTERRUPT_WINDOW_EXITING, wanted, vmcs)
    }

    /// As [`Self::set_window`], for an NMI.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn set_nmi_window<P: VmcsPair>(
        &mut self,
        wanted: bool,
        vmcs: &mut P,
    ) -> Result<(), AccessError> {
        if !self.is_guest || wanted == self.nmi_window {
            return Ok(());
        }
        self.nmi_window = wanted;
        self.write_window(PrimaryControls::NMI_WINDOW_EXITING, wanted, vmcs)
    }

    fn write_window<P: VmcsPair>(
        &mut self,
        window: PrimaryControls,
        wanted: bool,
        vmcs: &mut P,
    ) -> Result<(), AccessError> {
        self.settled = None;
        let theirs = L1Controls::read(&self.vmcs12.image)?
            .primary
            .contains(window);
        let held_back = window == PrimaryControls::INTERRUPT_WINDOW_EXITING && self.held_back;
        let mut vmcs02 = vmcs.l2();
        let mut primary = PrimaryControls::from_bits_retain(vmcs02.get(fields::PRIMARY_CONTROLS)?);
        primary.set(window, wanted || theirs || held_back);
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
