//! What the transports share: device status, feature negotiation, queue set-up, and the calls into
//! the device (VIRTIO 1.3, 2 and 3).

use alloc::boxed::Box;
use alloc::vec::Vec;

use bitflags::bitflags;
use testudo_arch::{Gpa, GuestMemory};

use crate::Features;
use crate::device::{Device, DeviceError, DeviceId, Io, Next, Slot};
use crate::queue::{ActivateError, QueueConfig};

bitflags! {
    /// The device status field (2.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Status: u8 {
        const ACKNOWLEDGE = 1;
        const DRIVER = 2;
        const DRIVER_OK = 4;
        const FEATURES_OK = 8;
        const NEEDS_RESET = 64;
        const FAILED = 128;
    }
}

/// Why a device has set DEVICE_NEEDS_RESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A queue was enabled that cannot be used as it is configured.
    #[error("queue {queue}: {error}")]
    Activate {
        /// The queue's number.
        queue: u16,
        /// What is wrong with it.
        error: ActivateError,
    },
    /// The device met something that the driver must not do.
    #[error("queue {queue}: {error}")]
    Device {
        /// The number of the queue that the device was using.
        queue: u16,
        /// What it met.
        error: DeviceError,
    },
}

/// What a transport offers besides the device's own features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The ring features to offer.
    pub rings: Features,
    /// Addresses go through the platform's IOMMU, and the memory that the transport was given
    /// translates them: the driver must agree to that or not use the device.
    pub access_platform: bool,
}

impl Default for Options {
    /// All ring features, no IOMMU.
    fn default() -> Self {
        Self {
            rings: Features::RINGS,
            access_platform: false,
        }
    }
}

impl Options {
    /// All ring features but the packed format.
    pub fn split() -> Self {
        Self {
            rings: Features::RINGS.difference(Features::RING_PACKED),
            ..Self::default()
        }
    }
}

/// What the driver is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// The queue with this number has returned chains.
    Queue(u16),
    /// The configuration has changed, or the device needs a reset.
    Config,
}

pub(crate) struct Core<M> {
    device: Box<dyn Device<M>>,
    memory: M,
    offered: Features,
    access_platform: bool,
    accepted: Features,
    status: Status,
    configs: Vec<QueueConfig>,
    slots: Vec<Slot>,
    generation: u8,
    config_signal: bool,
    fault: Option<Fault>,
    /// Whether the device may reach memory: PCI's bus master bit.
    dma: bool,
    now: u64,
    /// When the device wants to be polled.
    next: Next,
}

impl<M: GuestMemory> Core<M> {
    pub(crate) fn new(device: Box<dyn Device<M>>, memory: M, options: Options) -> Self {
        let mut rings = options.rings & Features::RINGS;
        rings.insert(Features::VERSION_1);
        rings.set(Features::ACCESS_PLATFORM, options.access_platform);
        let offered = device.features() | rings;
        let configs: Vec<_> = device
            .queues()
            .iter()
            .map(|&max| QueueConfig::new(max))
            .collect();
        let slots = configs
            .iter()
            .map(|_| Slot {
                queue: None,
                signal: false,
                pending: false,
            })
            .collect();
        Self {
            device,
            memory,
            offered,
            access_platform: options.access_platform,
            accepted: Features::empty(),
            status: Status::empty(),
            configs,
            slots,
            generation: 0,
            config_signal: false,
            fault: None,
            dma: true,
            now: 0,
            next: Next::Idle,
        }
    }

    pub(crate) fn id(&self) -> DeviceId {
        self.device.id()
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// When the device wants to be polled, by what has happened since the last time.
    #[inline]
    pub(crate) fn next_poll(&self) -> Next {
        self.next
    }

    pub(crate) fn status(&self) -> u8 {
        self.status.bits()
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation
    }

    pub(crate) fn offered(&self) -> Features {
        self.offered
    }

    pub(crate) fn accepted(&self) -> Features {
        self.accepted
    }

    /// Takes the driver's choice of features; after FEATURES_OK it is final (3.1.1).
    pub(crate) fn write_features(&mut self, window: u32, bits: u32) {
        if !self.status.contains(Status::FEATURES_OK) {
            self.accepted = self.accepted.with_window(window, bits);
        }
    }

    /// Takes a write to the status field. True when it was a reset.
    pub(crate) fn write_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        let mut new = Status::from_bits_truncate(value) - Status::NEEDS_RESET;
        // The driver must not clear a bit (2.1.1), so one that is missing stays set.
        new |= self.status;
        if new.contains(Status::FEATURES_OK) && !self.acceptable() {
            new.remove(Status::FEATURES_OK);
        }
        // Without agreement on features there is no device to start.
        if !new.contains(Status::FEATURES_OK) {
            new.remove(Status::DRIVER_OK);
        }
        let started = new.contains(Status::DRIVER_OK) && !self.status.contains(Status::DRIVER_OK);
        self.status = new;
        if started {
            self.device.activate(self.accepted);
            // The driver may have made chains available before, and its notifications were lost.
            for slot in &mut self.slots {
                slot.pending = slot.queue.is_some();
            }
            self.run_pending();
            // Its backend may have something for the driver.
            self.next = Next::Again;
        }
        false
    }

    /// Whether the driver's features are a set that the device can work with (2.2.2).
    fn acceptable(&self) -> bool {
        self.offered.contains(self.accepted)
            && self.accepted.contains(Features::VERSION_1)
            && (!self.access_platform || self.accepted.contains(Features::ACCESS_PLATFORM))
    }

    /// Back to the beginning; the configuration space and its generation live on.
    fn reset(&mut self) {
        self.device.reset();
        self.status = Status::empty();
        self.accepted = Features::empty();
        self.fault = None;
        self.config_signal = false;
        self.next = Next::Idle;
        for (slot, config) in self.slots.iter_mut().zip(&mut self.configs) {
            *slot = Slot {
                queue: None,
                signal: false,
                pending: false,
            };
            *config = QueueConfig::new(config.max_size());
        }
    }

    pub(crate) fn queue_count(&self) -> u16 {
        self.configs.len() as u16
    }

    /// The configuration of a queue, if there is such a queue.
    pub(crate) fn config(&self, queue: u32) -> Option<&QueueConfig> {
        self.configs.get(usize::try_from(queue).ok()?)
    }

    /// Changes the configuration of a queue, unless it is in use.
    pub(crate) fn configure(&mut self, queue: u32, change: impl FnOnce(&mut QueueConfig)) {
        let Ok(queue) = usize::try_from(queue) else {
            return;
        };
        if let (Some(config), Some(slot)) = (self.configs.get_mut(queue), self.slots.get(queue))
            && slot.queue.is_none()
        {
            change(config);
        }
    }

    pub(crate) fn enabled(&self, queue: u32) -> bool {
        let slot = usize::try_from(queue).ok().and_then(|q| self.slots.get(q));
        slot.is_some_and(|slot| slot.queue.is_some())
    }

    /// Puts a queue into use as it is configured.
    pub(crate) fn enable(&mut self, queue: u32) {
        // The format of the ring is not known before the features are.
        if !self.status.contains(Status::FEATURES_OK) || self.fault.is_some() {
            return;
        }
        let Ok(number) = u16::try_from(queue) else {
            return;
        };
        let (Some(config), Some(slot)) = (
            self.configs.get(usize::from(number)),
            self.slots.get_mut(usize::from(number)),
        ) else {
            return;
        };
        if slot.queue.is_some() {
            return;
        }
        let bounds = self.device.bounds(number);
        match config.activate(self.accepted, bounds, &self.memory) {
            Ok(queue) => slot.queue = Some(queue),
            Err(error) => self.fail(Fault::Activate {
                queue: number,
                error,
            }),
        }
    }

    /// Takes one queue out of use (2.6.1).
    pub(crate) fn reset_queue(&mut self, queue: u32) {
        if !self.accepted.contains(Features::RING_RESET) {
            return;
        }
        self.disable(queue);
    }

    /// Takes one queue out of use, whatever was agreed on.
    pub(crate) fn disable(&mut self, queue: u32) {
        let Ok(number) = u16::try_from(queue) else {
            return;
        };
        let (Some(config), Some(slot)) = (
            self.configs.get_mut(usize::from(number)),
            self.slots.get_mut(usize::from(number)),
        ) else {
            return;
        };
        self.device.reset_queue(number);
        *config = QueueConfig::new(config.max_size());
        *slot = Slot {
            queue: None,
            signal: false,
            pending: false,
        };
    }

    fn fail(&mut self, fault: Fault) {
        self.fault = Some(fault);
        self.status |= Status::NEEDS_RESET;
        if self.status.contains(Status::DRIVER_OK) {
            self.config_signal = true;
        }
    }

    /// Allows or forbids the device to reach memory. What came meanwhile is processed then.
    pub(crate) fn set_dma(&mut self, allowed: bool) {
        let resumed = allowed && !self.dma;
        self.dma = allowed;
        if resumed {
            self.next = self.next.min(self.run_pending());
        }
    }

    fn running(&self) -> bool {
        self.dma
            && self.status.contains(Status::DRIVER_OK)
            && !self.status.intersects(Status::FAILED | Status::NEEDS_RESET)
    }

    /// The driver has made something available in the queue that `value` names. Anything else is
    /// ignored. With NOTIFICATION_DATA the upper half says where the ring stands (2.9.1), but the
    /// ring itself is what counts.
    #[inline]
    pub(crate) fn notify(&mut self, value: u32) {
        let queue = if self.accepted.contains(Features::NOTIFICATION_DATA) {
            value & 0xFFFF
        } else {
            value
        };
        self.notify_queue(queue);
    }

    /// The driver has made something available in the queue with this number.
    #[inline]
    pub(crate) fn notify_queue(&mut self, queue: u32) {
        let Ok(index) = usize::try_from(queue) else {
            return;
        };
        if let Some(slot) = self.slots.get_mut(index)
            && slot.queue.is_some()
        {
            slot.pending = true;
            let next = self.run(index);
            self.next = self.next.min(next);
        }
    }

    /// Processes a queue that is pending.
    #[inline]
    fn run(&mut self, index: usize) -> Next {
        if !self.running() {
            return Next::Idle;
        }
        let Some(slot) = self.slots.get_mut(index) else {
            return Next::Idle;
        };
        if !core::mem::take(&mut slot.pending) || slot.queue.is_none() {
            return Next::Idle;
        }
        let next = self.call(index as u16, |device, io| device.process(index as u16, io));
        if next == Next::Again
            && let Some(slot) = self.slots.get_mut(index)
        {
            slot.pending = true;
        }
        next
    }

    fn run_pending(&mut self) -> Next {
        (0..self.slots.len()).fold(Next::Idle, |next, index| next.min(self.run(index)))
    }

    /// Calls into the device, and breaks it if it says that the driver broke a rule.
    fn call(
        &mut self,
        queue: u16,
        work: impl FnOnce(&mut dyn Device<M>, &mut Io<'_, M>) -> Result<Next, DeviceError>,
    ) -> Next {
        let mut changed = false;
        let mut used = None;
        let mut io = Io::new(
            &self.memory,
            &mut self.slots,
            self.now,
            &mut changed,
            &mut used,
        );
        let result = work(&mut *self.device, &mut io);
        if changed {
            self.generation = self.generation.wrapping_add(1);
            self.config_signal = true;
        }
        result.unwrap_or_else(|error| {
            self.fail(Fault::Device {
                queue: used.unwrap_or(queue),
                error,
            });
            Next::Idle
        })
    }

    /// Goes on with what was left, and lets the device look at its backend.
    pub(crate) fn poll(&mut self, now: u64) -> Next {
        self.now = now;
        self.next = Next::Idle;
        if self.running() {
            let next = self.run_pending();
            if self.running() {
                self.next = next.min(self.call(0, |device, io| device.poll(io)));
            }
        }
        self.next
    }

    /// Reads the device's configuration space.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes the device's configuration space.
    pub(crate) fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Takes the next thing that the driver is to be told.
    pub(crate) fn take_signal(&mut self) -> Option<Signal> {
        if core::mem::take(&mut self.config_signal) {
            return Some(Signal::Config);
        }
        let found = self.slots.iter_mut().enumerate().find(|(_, s)| s.signal);
        found.map(|(index, slot)| {
            slot.signal = false;
            Signal::Queue(index as u16)
        })
    }
}

/// Replaces the low 32 bits of an address.
pub(crate) fn with_low(gpa: Gpa, low: u32) -> Gpa {
    Gpa((gpa.0 & !0xFFFF_FFFF) | u64::from(low))
}

/// Replaces the high 32 bits of an address.
pub(crate) fn with_high(gpa: Gpa, high: u32) -> Gpa {
    Gpa((gpa.0 & 0xFFFF_FFFF) | (u64::from(high) << 32))
}
