//! The preemption timer: the processor ends the guest's turn when the next deadline comes, without
//! an interrupt of the host's (SDM vol. 3C, 28.5.1).
//!
//! The timer counts only while the guest runs, and goes on where it stopped: so it lags behind by
//! what the host takes for exits, and is set anew every few entries. That keeps the lag short and
//! the hot exits free of it.

use testudo_vmx::clock::preemption_timer;
use testudo_vmx::controls::{ExitControls, PinControls};
use testudo_vmx::{AccessError, VmcsWrite, VmxCaps, fields};

use super::Controls;

/// After so many entries the timer is set anew, if a deadline is set.
pub(super) const LAG: u32 = 16;

/// What the timer takes.
pub(super) const PIN: PinControls = PinControls::ACTIVATE_PREEMPTION_TIMER;
/// And that it goes on where it stopped.
pub(super) const EXIT: ExitControls = ExitControls::SAVE_PREEMPTION_TIMER;

/// When the guest's turn is to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct PreemptionTimer {
    /// The host's TSC then; the largest value for never.
    pub(super) deadline: u64,
    /// Which bit of the TSC it counts.
    shift: u32,
}

impl PreemptionTimer {
    /// Has the timer count in the turns of the guest that has these controls besides; no deadline is
    /// set.
    pub(super) fn new(
        vmcs: &mut impl VmcsWrite,
        caps: &VmxCaps,
        controls: &Controls,
    ) -> Result<Self, AccessError> {
        vmcs.set(fields::PIN_CONTROLS, (controls.pin | PIN).bits())?;
        vmcs.set(fields::EXIT_CONTROLS, (controls.exit | EXIT).bits())?;
        Ok(Self {
            deadline: u64::MAX,
            shift: caps.misc.preemption_timer_shift(),
        })
    }

    /// After how many entries it is to be set again. Without a deadline that is as good as never.
    pub(super) fn lag(self) -> u32 {
        if self.deadline == u64::MAX {
            u32::MAX
        } else {
            LAG
        }
    }

    /// Sets the timer by the TSC. Where it cannot count that far it expires early, and is set again.
    pub(super) fn set(self, vmcs: &mut impl VmcsWrite, tsc: u64) -> Result<(), AccessError> {
        let left = self.deadline.saturating_sub(tsc);
        let value = preemption_timer(left, self.shift);
        vmcs.set(fields::PREEMPTION_TIMER_VALUE, value)
    }
}
