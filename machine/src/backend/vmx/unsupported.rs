//! An exit that ends the guest's run, in words.

use core::fmt;

use testudo_arch::Event;
use testudo_vmx::controls::{ActivityState, Interruptibility, PendingDebug};
use testudo_vmx::event::interrupted_delivery;
use testudo_vmx::exit::{Exit, ExitReason};
use testudo_vmx::{AccessError, VmcsRead, fields};

/// An exit that this backend does not support, and the guest's state that belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnsupportedExit {
    /// The exit, decoded.
    pub exit: Exit,
    /// The reason with its flags.
    pub reason: ExitReason,
    /// The qualification, whatever it means for this reason.
    pub qualification: u64,
    /// The event whose delivery the exit interrupted.
    pub delivering: Option<Event>,
    /// Whether the guest was executing.
    pub activity: ActivityState,
    /// What it blocks.
    pub interruptibility: Interruptibility,
    /// The debug exceptions that it has not yet taken.
    pub pending_debug: PendingDebug,
}

impl UnsupportedExit {
    /// Reads what the VMCS says.
    #[cold]
    pub(super) fn read(
        exit: Exit,
        reason: ExitReason,
        vmcs: &impl VmcsRead,
    ) -> Result<Self, AccessError> {
        let interruptibility = vmcs.get(fields::GUEST_INTERRUPTIBILITY)?;
        Ok(Self {
            exit,
            reason,
            qualification: vmcs.get(fields::EXIT_QUALIFICATION)?,
            delivering: interrupted_delivery(vmcs)?,
            activity: ActivityState::from_number(vmcs.get(fields::GUEST_ACTIVITY_STATE)?),
            interruptibility: Interruptibility::from_bits_retain(interruptibility),
            pending_debug: PendingDebug::from_bits_retain(vmcs.get(fields::GUEST_PENDING_DEBUG)?),
        })
    }
}

impl fmt::Display for UnsupportedExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exit, reason, .. } = self;
        write!(
            f,
            "the guest exited by {exit}{} (reason {:#x}, qualification {:#x}), which is not supported",
            reason.circumstances(),
            reason.0,
            self.qualification
        )?;
        if let Some(event) = self.delivering {
            write!(f, "; while {event} was being delivered")?;
        }
        write!(
            f,
            "; activity: {}; blocking: {}; pending debug exceptions: {}",
            self.activity, self.interruptibility, self.pending_debug
        )
    }
}
