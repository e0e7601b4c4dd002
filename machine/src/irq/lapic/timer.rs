//! The timer of a local APIC (SDM vol. 3A, 11.5.4).

use super::{LVT_MASKED, Lapic, Lvt};

/// The mode that the timer's entry of the local vector table selects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TimerMode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    /// From bits 18:17; the reserved encoding counts as the deadline mode's neighbour, one-shot.
    pub(super) const fn from_lvt(entry: u32) -> Self {
        match entry >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer's registers, with time in nanoseconds: the input clock is 1 GHz.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timer {
    pub(super) mode: TimerMode,
    /// The divide configuration register.
    pub(super) divide: u32,
    pub(super) initial: u32,
    /// When it expires next, if it runs.
    deadline: Option<u64>,
    /// IA32_TSC_DEADLINE; zero when not armed.
    pub(super) tsc_deadline: u64,
}

impl Timer {
    /// A guest that asks for a shorter period gets this one: there is no time left for it
    /// otherwise.
    const MIN_PERIOD: u64 = 20_000;

    /// The divisor: nanoseconds per count.
    fn divisor(&self) -> u64 {
        match self.divide & 3 | self.divide >> 1 & 4 {
            7 => 1,
            n => 2 << n,
        }
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }

    /// Counts down from the initial count.
    pub(super) fn start(&mut self, initial: u32, now: u64) {
        self.initial = initial;
        if self.mode != TimerMode::TscDeadline {
            self.deadline = (initial != 0).then(|| now.saturating_add(self.period()));
        }
    }

    /// The current-count register. The timer was polled at `now`.
    pub(super) fn count(&self, now: u64) -> u32 {
        match (self.mode, self.deadline) {
            (TimerMode::TscDeadline, _) | (_, None) => 0,
            (_, Some(deadline)) => {
                let left = deadline.saturating_sub(now).div_ceil(self.divisor());
                left.min(u64::from(self.initial)) as u32
            }
        }
    }

    pub(super) fn set_divide(&mut self, divide: u32, now: u64) {
        let count = u64::from(self.count(now));
        self.divide = divide & 0xB;
        if self.mode != TimerMode::TscDeadline && self.deadline.is_some() {
            self.deadline = Some(now.saturating_add(count * self.divisor()));
        }
    }

    /// A change of mode to or from TSC-deadline disarms the timer (SDM vol. 3A, 11.5.4.1).
    pub(super) fn set_mode(&mut self, mode: TimerMode) {
        if mode != self.mode
            && (mode == TimerMode::TscDeadline || self.mode == TimerMode::TscDeadline)
        {
            self.deadline = None;
            self.tsc_deadline = 0;
        }
        self.mode = mode;
    }

    /// Arms or disarms the deadline mode; `left` is how far the deadline is, in nanoseconds.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, now: u64, left: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = value;
            self.deadline = (value != 0).then(|| now.saturating_add(left));
        }
    }

    /// Whether the timer expired. A periodic timer that expired several times counts once.
    #[inline]
    fn expire(&mut self, now: u64) -> bool {
        match self.deadline {
            Some(deadline) if deadline <= now => {
                self.restart(deadline, now);
                true
            }
            _ => false,
        }
    }

    fn restart(&mut self, deadline: u64, now: u64) {
        self.tsc_deadline = 0;
        self.deadline = (self.mode == TimerMode::Periodic && self.initial != 0).then(|| {
            let period = self.period().max(Self::MIN_PERIOD);
            let missed = (now - deadline) / period;
            deadline.saturating_add((missed + 1).saturating_mul(period))
        });
    }
}

/// How many nanoseconds `ticks` of a counter of `hz` last, rounded up: a deadline never comes
/// early.
pub(super) fn ticks_to_ns(ticks: u64, hz: u64) -> u64 {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(hz.max(1)));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl Lapic {
    /// When the timer's interrupt is due, in the host's nanoseconds, if it will come at all.
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        let masked = self.lvt(Lvt::Timer) & LVT_MASKED != 0;
        self.timer.deadline.filter(|_| !masked)
    }

    /// Raises the timer's interrupt if it is due.
    #[inline]
    pub fn poll_timer(&mut self, now: u64) {
        if self.timer.expire(now) {
            self.fire(Lvt::Timer);
        }
    }

    /// Takes note that the guest's TSC was set and reads `guest_tsc` now: an armed deadline moves.
    pub fn tsc_changed(&mut self, guest_tsc: u64) {
        if self.timer.tsc_deadline != 0 {
            self.arm_tsc_deadline(self.timer.tsc_deadline, guest_tsc);
        }
    }

    pub(super) fn arm_tsc_deadline(&mut self, value: u64, guest_tsc: u64) {
        let host = self.chip.host();
        let left = ticks_to_ns(value.saturating_sub(guest_tsc), host.tsc_hz());
        let now = host.now();
        self.timer.set_tsc_deadline(value, now, left);
        self.poll_timer(now);
    }
}
