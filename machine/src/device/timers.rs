//! Deadlines of devices: who must be polled when.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::irq::{Irqchip, request};

/// When a device wants to be polled next.
///
/// The device stores it, on whatever vCPU it is addressed; the loop of vCPU 0 reads it without a
/// lock. When the deadline comes nearer, vCPU 0 is told ([`request::DEVICE_TIMERS`]).
pub struct Deadline {
    at: AtomicU64,
    chip: Arc<Irqchip>,
}

impl Deadline {
    const NEVER: u64 = u64::MAX;

    pub(crate) fn new(chip: &Arc<Irqchip>) -> Arc<Self> {
        Arc::new(Self {
            at: AtomicU64::new(Self::NEVER),
            chip: chip.clone(),
        })
    }

    /// The deadline, in the host's nanoseconds.
    pub fn get(&self) -> Option<u64> {
        let at = self.at.load(Ordering::Acquire);
        (at != Self::NEVER).then_some(at)
    }

    pub(crate) fn set(&self, deadline: Option<u64>) {
        let at = deadline.unwrap_or(Self::NEVER);
        if at < self.at.swap(at, Ordering::AcqRel) {
            self.chip.request(0, request::DEVICE_TIMERS);
        }
    }
}

/// A device with deadlines.
pub trait Clocked: Send {
    /// Where it stores its next one.
    fn deadline(&self) -> &Arc<Deadline>;

    /// Does what is due at `now`.
    fn poll(&mut self, now: u64);
}

/// A device with deadlines, as the machine holds it.
pub type SharedClock = Arc<spin::Mutex<dyn Clocked>>;

/// The deadlines of all devices of a machine.
#[derive(Default)]
pub struct DeviceTimers {
    devices: Vec<(Arc<Deadline>, SharedClock)>,
}

impl DeviceTimers {
    /// No devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device.
    pub fn add(&mut self, device: SharedClock) {
        let deadline = device.lock().deadline().clone();
        self.devices.push((deadline, device));
    }

    /// The earliest deadline, in the host's nanoseconds.
    #[inline]
    pub fn next_deadline(&self) -> Option<u64> {
        self.devices.iter().filter_map(|(at, _)| at.get()).min()
    }

    /// Polls the devices whose deadline has passed at `now`.
    #[inline]
    pub fn poll(&self, now: u64) {
        for (deadline, device) in &self.devices {
            if deadline.get().is_some_and(|at| at <= now) {
                device.lock().poll(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::fake::machine;

    struct Alarm {
        deadline: Arc<Deadline>,
        polled: usize,
    }

    impl Clocked for Alarm {
        fn deadline(&self) -> &Arc<Deadline> {
            &self.deadline
        }

        fn poll(&mut self, _: u64) {
            self.polled += 1;
            self.deadline.set(None);
        }
    }

    #[test]
    fn the_earliest_counts_and_only_those_due_are_polled() {
        let (host, chip, lapics) = machine(2);
        let mut timers = DeviceTimers::new();
        let alarms: [_; 2] = core::array::from_fn(|_| {
            let deadline = Deadline::new(&chip);
            let alarm = Arc::new(spin::Mutex::new(Alarm {
                deadline,
                polled: 0,
            }));
            timers.add(alarm.clone());
            alarm
        });
        assert_eq!(timers.next_deadline(), None);
        alarms[0].lock().deadline.set(Some(500));
        alarms[1].lock().deadline.set(Some(400));
        assert_eq!(timers.next_deadline(), Some(400));
        timers.poll(399);
        timers.poll(499);
        assert_eq!([0, 1].map(|i| alarms[i].lock().polled), [0, 1]);
        assert_eq!(timers.next_deadline(), Some(500));
        assert_eq!((host.kicks(0), host.kicks(1)), (1, 0));
        lapics[0].requests().store(0, Ordering::Relaxed);
        alarms[0].lock().deadline.set(Some(600));
        assert_eq!(
            host.kicks(0),
            1,
            "later: the timer that is set comes in time"
        );
        alarms[0].lock().deadline.set(Some(550));
        assert_eq!(host.kicks(0), 2);
    }
}
