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

    pub(super) fn new(chip: &Arc<Irqchip>) -> Arc<Self> {
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

    pub(super) fn set(&self, deadline: Option<u64>) {
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

/// The deadlines of all devices of a machine.
#[derive(Default)]
pub struct DeviceTimers {
    devices: Vec<(Arc<Deadline>, Arc<spin::Mutex<dyn Clocked>>)>,
}

impl DeviceTimers {
    /// No devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a device.
    pub fn add(&mut self, device: Arc<spin::Mutex<dyn Clocked>>) {
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
