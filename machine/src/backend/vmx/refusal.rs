//! Why the processor did not enter the guest, in words.

use core::fmt;

use testudo_vmx::check::{Violation, check_entry};
use testudo_vmx::exit::{EntryFailure, Exit, ExitReason};
use testudo_vmx::{AccessError, InstructionError, VmFail, VmcsRead, VmxCaps};

/// A VM entry that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the processor said.
    pub cause: RefusalCause,
    /// The first rule that the VMCS violates, in the manual's order.
    pub violation: Option<Violation>,
    /// How many more it violates.
    pub more: u8,
}

/// What the processor said of an entry that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCause {
    /// A control or the host state did not suit (SDM vol. 3C, 29.2).
    Fail(VmFail),
    /// Guest state did not suit (29.3 and 29.8).
    Failure(EntryFailure),
}

impl Refusal {
    /// Whether it was for a control field.
    pub(super) fn is_of_control(&self) -> bool {
        let control = VmFail::Valid(InstructionError::InvalidControlField);
        self.cause == RefusalCause::Fail(control)
    }

    /// Explains VMLAUNCH's or VMRESUME's failure.
    #[cold]
    pub(super) fn of_fail(fail: VmFail, vmcs: &impl VmcsRead, caps: &VmxCaps) -> Self {
        Self::explain(RefusalCause::Fail(fail), vmcs, caps)
    }

    /// Explains an exit by which an entry failed.
    #[cold]
    pub(super) fn of_exit(
        reason: ExitReason,
        vmcs: &impl VmcsRead,
        caps: &VmxCaps,
    ) -> Result<Option<Self>, AccessError> {
        Ok(match Exit::decode(reason, vmcs)? {
            Exit::EntryFailure(failure) => {
                Some(Self::explain(RefusalCause::Failure(failure), vmcs, caps))
            }
            _ => None,
        })
    }

    fn explain(cause: RefusalCause, vmcs: &impl VmcsRead, caps: &VmxCaps) -> Self {
        let violations = check_entry(vmcs, caps).unwrap_or_default();
        Self {
            cause,
            violation: violations.first().copied(),
            more: violations.len().saturating_sub(1) as u8,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the processor refused to enter the guest: ")?;
        match self.cause {
            RefusalCause::Fail(fail) => write!(f, "{fail}")?,
            RefusalCause::Failure(EntryFailure::GuestState(_)) => {
                f.write_str("invalid guest state")?;
            }
            RefusalCause::Failure(EntryFailure::MsrLoading { entry }) => {
                write!(f, "entry {entry} of the MSR-load area is invalid")?;
            }
            RefusalCause::Failure(EntryFailure::MachineCheck) => f.write_str("a machine check")?,
        }
        match self.violation {
            Some(violation) => write!(f, ". {violation}")?,
            None => f.write_str(". No rule that can be told from the VMCS is violated")?,
        }
        match self.more {
            0 => Ok(()),
            1 => f.write_str(" (and one more rule is violated)"),
            more => write!(f, " (and {more} more rules are violated)"),
        }
    }
}
