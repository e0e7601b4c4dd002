//! Virtio over PCI, modern interface only (VIRTIO 1.3, 4.1).
//!
//! A driver that knows only the legacy interface finds no I/O ports and a device number past the
//! transitional range, so it does not take the device.

mod config;
mod msix;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use testudo_arch::GuestMemory;
use testudo_arch::irq::InterruptSink;
use testudo_arch::pci::{BARS, PciFunction, PciSpace, PciWindow};

use super::core::{Core, Fault, Options, Signal, with_high, with_low};
use crate::device::{Device, DeviceId, Next};
use config::{BUS_MASTER, ConfigSpace, INTX_DISABLE, MEMORY_SPACE, header};
use msix::{CONTROL_WRITABLE, Msix};

/// The vendor number of all virtio devices, and what is added to a device's type (4.1.2).
const VENDOR: u16 = 0x1AF4;
const DEVICE_BASE: u16 = 0x1040;

/// The parts of the one memory window. Each has a page of its own, so that a guest can map them
/// with different rights.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const PART: u64 = 0x1000;
const WINDOW: u64 = 0x8000;

/// Each queue is notified at an address of its own (4.1.4.4).
const NOTIFY_MULTIPLIER: u32 = 4;

/// Capability numbers: vendor-specific, MSI-X.
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

/// What a vendor-specific capability points to (4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// The common configuration structure (4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(super) const DEVICE_FEATURE: u64 = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 16;
    pub(super) const NUM_QUEUES: u64 = 18;
    pub(super) const DEVICE_STATUS: u64 = 20;
    pub(super) const CONFIG_GENERATION: u64 = 21;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 26;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
    pub(super) const QUEUE_RESET: u64 = 58;
    pub(super) const LENGTH: u32 = 64;
}

/// No MSI-X vector is assigned.
const NO_VECTOR: u16 = 0xFFFF;

/// ISR: a queue has returned chains; the configuration has changed (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A virtio device as a PCI function.
pub struct Pci<M> {
    core: Core<M>,
    interrupts: Arc<dyn InterruptSink>,
    gsi: u32,
    config: ConfigSpace,
    msix_capability: usize,
    access_capability: usize,
    msix: Msix,
    isr: u8,
    line: bool,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    device_window: u32,
    driver_window: u32,
    queue: u16,
}

impl<M> fmt::Debug for Pci<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pci")
            .field("gsi", &self.gsi)
            .finish_non_exhaustive()
    }
}

/// The class code that fits a device best (PCI Code and ID Assignment).
fn class(id: DeviceId) -> u32 {
    match id {
        DeviceId::NET => 0x02_00_00,
        DeviceId::BLK | DeviceId::FS | DeviceId::PMEM => 0x01_80_00,
        DeviceId::CONSOLE => 0x07_80_00,
        DeviceId::RNG => 0x10_00_00,
        DeviceId::IOMMU => 0x08_06_00,
        _ => 0xFF_00_00,
    }
}

/// The body of a capability that says where a structure is (`virtio_pci_cap`), without number and
/// link.
fn structure(kind: u8, extra: u8, offset: u64, len: u32) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = 16 + extra;
    body[1] = kind;
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&len.to_le_bytes());
    body
}

/// A structure's capability with the four bytes that some have at the end.
fn structure_with(kind: u8, offset: u64, len: u32, tail: u32) -> [u8; 18] {
    let mut body = [0; 18];
    body[..14].copy_from_slice(&structure(kind, 4, offset, len));
    body[14..].copy_from_slice(&tail.to_le_bytes());
    body
}

impl<M: GuestMemory> Pci<M> {
    /// Makes `device` a PCI function. Without MSI-X it interrupts through pin INTA, which is wired
    /// to `gsi`.
    pub fn new(
        device: Box<dyn Device<M>>,
        memory: M,
        options: Options,
        interrupts: Arc<dyn InterruptSink>,
        gsi: u32,
    ) -> Self {
        let mut core = Core::new(device, memory, options);
        core.set_dma(false);
        let id = core.id();
        let number = DEVICE_BASE.wrapping_add(id.0 as u16);
        let queues = core.queue_count();
        // The table has one page: 256 vectors. Queues beyond share.
        let msix = Msix::new(queues.saturating_add(1).min(256));

        let mut config = ConfigSpace::new(VENDOR, number, class(id), WINDOW);
        config.set(header::REVISION, &[1]);
        config.set(header::SUBSYSTEM_VENDOR, &VENDOR.to_le_bytes());
        config.set(header::SUBSYSTEM, &number.to_le_bytes());
        config.set(header::INTERRUPT_PIN, &[1]);
        let common = structure(cfg_type::COMMON, 0, COMMON, common::LENGTH);
        config.add_capability(CAP_VENDOR, &common);
        let notify_len = u32::from(queues) * NOTIFY_MULTIPLIER;
        let notify = structure_with(cfg_type::NOTIFY, NOTIFY, notify_len, NOTIFY_MULTIPLIER);
        config.add_capability(CAP_VENDOR, &notify);
        config.add_capability(CAP_VENDOR, &structure(cfg_type::ISR, 0, ISR, 1));
        let device_part = structure(cfg_type::DEVICE, 0, DEVICE, PART as u32);
        config.add_capability(CAP_VENDOR, &device_part);
        // Register, offset, length and data are the driver's (4.1.4.9).
        let access = structure_with(cfg_type::PCI, 0, 0, 0);
        let access_capability = config.add_capability(CAP_VENDOR, &access);
        config.allow(access_capability + 4, &[0xFF]);
        config.allow(access_capability + 8, &[0xFF; 8]);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(MSIX_TABLE as u32).to_le_bytes());
        body[6..].copy_from_slice(&(MSIX_PENDING as u32).to_le_bytes());
        let msix_capability = config.add_capability(CAP_MSIX, &body);
        config.allow(msix_capability + 2, &CONTROL_WRITABLE.to_le_bytes());

        Self {
            core,
            interrupts,
            gsi,
            config,
            msix_capability,
            access_capability,
            msix,
            isr: 0,
            line: false,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; usize::from(queues)],
            device_window: 0,
            driver_window: 0,
            queue: 0,
        }
    }

    /// Why the device needs a reset, if it does.
    pub fn fault(&self) -> Option<Fault> {
        self.core.fault()
    }

    /// Goes on with work that was left, and lets the device look at its backend. `now` is the time
    /// in nanoseconds.
    pub fn poll(&mut self, now: u64) -> Next {
        let next = self.core.poll(now);
        self.deliver();
        next
    }

    /// When to poll, by all that has happened since the last time: what [`poll`](Self::poll) gave,
    /// or earlier if an access of the driver's left work behind. At once after the driver has
    /// started the device.
    #[inline]
    pub fn next_poll(&self) -> Next {
        self.core.next_poll()
    }

    /// Interrupts for what the device has to tell.
    fn deliver(&mut self) {
        while let Some(signal) = self.core.take_signal() {
            let (cause, vector) = match signal {
                Signal::Config => {
                    self.isr |= ISR_CONFIG;
                    (ISR_CONFIG, self.config_vector)
                }
                Signal::Queue(queue) => {
                    let vector = self.queue_vectors.get(usize::from(queue));
                    (ISR_QUEUE, vector.copied().unwrap_or(NO_VECTOR))
                }
            };
            if self.msix.enabled() {
                self.msix.fire(vector, &*self.interrupts);
            } else {
                self.isr |= cause;
            }
        }
        self.drive_line();
    }

    /// Brings status register and line to what the causes and the command register say.
    fn drive_line(&mut self) {
        let wanted = self.isr != 0 && !self.msix.enabled();
        self.config.set_interrupt_status(wanted);
        let level = wanted && self.config.command() & INTX_DISABLE == 0;
        if level != self.line {
            self.line = level;
            self.interrupts.set_level(self.gsi, level);
        }
    }

    /// A vector as the driver may assign it: one that does not exist is none.
    fn vector(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let queue = u32::from(self.queue);
        let config = self.core.config(queue);
        let part = |gpa: Option<u64>, high: bool| {
            let gpa = gpa.unwrap_or(0);
            if high { (gpa >> 32) as u32 } else { gpa as u32 }
        };
        let value = match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.device_window,
            (common::DEVICE_FEATURE, 4) => self.core.offered().window(self.device_window),
            (common::DRIVER_FEATURE_SELECT, 4) => self.driver_window,
            (common::DRIVER_FEATURE, 4) => self.core.accepted().window(self.driver_window),
            (common::CONFIG_MSIX_VECTOR, 2) => self.config_vector.into(),
            (common::NUM_QUEUES, 2) => self.core.queue_count().into(),
            (common::DEVICE_STATUS, 1) => self.core.status().into(),
            (common::CONFIG_GENERATION, 1) => self.core.generation().into(),
            (common::QUEUE_SELECT, 2) => queue,
            (common::QUEUE_SIZE, 2) => config.map_or(0, |q| q.size.into()),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                let vector = self.queue_vectors.get(usize::from(self.queue));
                vector.copied().unwrap_or(NO_VECTOR).into()
            }
            (common::QUEUE_ENABLE, 2) => self.core.enabled(queue).into(),
            (common::QUEUE_NOTIFY_OFF, 2) => queue,
            (common::QUEUE_DESC, 4) => part(config.map(|q| q.descriptors.0), false),
            (0x24, 4) => part(config.map(|q| q.descriptors.0), true),
            (common::QUEUE_DRIVER, 4) => part(config.map(|q| q.driver.0), false),
            (0x2C, 4) => part(config.map(|q| q.driver.0), true),
            (common::QUEUE_DEVICE, 4) => part(config.map(|q| q.device.0), false),
            (0x34, 4) => part(config.map(|q| q.device.0), true),
            // A reset of a queue has ended before the driver can look.
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        let queue = u32::from(self.queue);
        let core = &mut self.core;
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.device_window = value,
            (common::DRIVER_FEATURE_SELECT, 4) => self.driver_window = value,
            (common::DRIVER_FEATURE, 4) => core.write_features(self.driver_window, value),
            (common::CONFIG_MSIX_VECTOR, 2) => self.config_vector = self.vector(value as u16),
            (common::DEVICE_STATUS, 1) => {
                let reset = core.write_status(value as u8);
                if reset {
                    self.reset();
                }
            }
            (common::QUEUE_SELECT, 2) => self.queue = value as u16,
            (common::QUEUE_SIZE, 2) => core.configure(queue, |q| q.size = value as u16),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                let vector = self.vector(value as u16);
                if let Some(place) = self.queue_vectors.get_mut(usize::from(self.queue)) {
                    *place = vector;
                }
            }
            // The driver must not write 0 (4.1.4.3.2): a queue is taken out of use by its reset.
            (common::QUEUE_ENABLE, 2) if value == 1 => core.enable(queue),
            (common::QUEUE_DESC, 4) => {
                core.configure(queue, |q| q.descriptors = with_low(q.descriptors, value));
            }
            (0x24, 4) => {
                core.configure(queue, |q| q.descriptors = with_high(q.descriptors, value));
            }
            (common::QUEUE_DRIVER, 4) => {
                core.configure(queue, |q| q.driver = with_low(q.driver, value));
            }
            (0x2C, 4) => core.configure(queue, |q| q.driver = with_high(q.driver, value)),
            (common::QUEUE_DEVICE, 4) => {
                core.configure(queue, |q| q.device = with_low(q.device, value));
            }
            (0x34, 4) => core.configure(queue, |q| q.device = with_high(q.device, value)),
            (common::QUEUE_RESET, 2) if value == 1 => core.reset_queue(queue),
            _ => {}
        }
    }

    /// What a reset of the device means for the transport.
    fn reset(&mut self) {
        self.isr = 0;
        self.config_vector = NO_VECTOR;
        self.queue_vectors.fill(NO_VECTOR);
        (self.device_window, self.driver_window, self.queue) = (0, 0, 0);
    }

    /// Reads from the memory window, naturally aligned and at most 4 bytes.
    fn read_part(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % PART;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR => {
                data.fill(0);
                if within == 0
                    && let Some(first) = data.first_mut()
                {
                    *first = core::mem::take(&mut self.isr);
                    self.drive_line();
                }
            }
            DEVICE => self.core.read_config(within, data),
            MSIX_TABLE if data.len() == 4 => {
                data.copy_from_slice(&self.msix.read_table(within).to_le_bytes());
            }
            MSIX_PENDING if data.len() == 4 => {
                data.copy_from_slice(&self.msix.read_pending(within).to_le_bytes());
            }
            _ => data.fill(0),
        }
    }

    /// Writes to the memory window, naturally aligned and at most 4 bytes.
    fn write_part(&mut self, offset: u64, data: &[u8]) {
        let within = offset % PART;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => self.core.write_config(within, data),
            // The address says which queue; the value says it too, and may carry more (4.1.5.2).
            NOTIFY if within.is_multiple_of(u64::from(NOTIFY_MULTIPLIER)) => {
                let queue = within / u64::from(NOTIFY_MULTIPLIER);
                self.core.notify_queue(queue as u32);
            }
            MSIX_TABLE => {
                if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                    let value = u32::from_le_bytes(bytes);
                    self.msix.write_table(within, value, &*self.interrupts);
                }
            }
            _ => {}
        }
    }

    /// The place in the memory window that the PCI configuration access capability points to, if
    /// it is a proper access.
    fn access_target(&self) -> Option<(u64, usize)> {
        let at = self.access_capability;
        let mut bar = [0];
        self.config.read(at as u16 + 4, &mut bar);
        let offset = u64::from(self.config.u32(at + 8));
        let len = self.config.u32(at + 12);
        let proper = bar == [0] && matches!(len, 1 | 2 | 4) && offset % u64::from(len) == 0;
        (proper && offset < WINDOW).then_some((offset, len as usize))
    }
}

impl<M: GuestMemory + Send> PciFunction for Pci<M> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let window = self.access_capability + 16;
        if usize::from(offset) == window
            && let Some((target, len)) = self.access_target()
        {
            let mut bytes = [0; 4];
            self.read_part(target, &mut bytes[..len]);
            self.config.set(window, &bytes);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let window = self.access_capability + 16;
        if usize::from(offset) == window
            && let Some((target, len)) = self.access_target()
            && let Some(bytes) = data.get(..len)
        {
            self.write_part(target, bytes);
        }
        self.core.set_dma(self.config.command() & BUS_MASTER != 0);
        let control = self.config.u16(self.msix_capability + 2);
        self.msix.set_control(control, &*self.interrupts);
        self.deliver();
    }

    fn windows(&self) -> [Option<PciWindow>; BARS] {
        let mut windows = [None; BARS];
        if self.config.command() & MEMORY_SPACE != 0 {
            windows[0] = Some(PciWindow {
                space: PciSpace::Memory,
                base: self.config.bar_address(),
                size: WINDOW,
            });
        }
        windows
    }

    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        if !offset.is_multiple_of(data.len().max(1) as u64) {
            return data.fill(0);
        }
        for (i, part) in data.chunks_mut(4).enumerate() {
            self.read_part(offset.wrapping_add(4 * i as u64), part);
        }
    }

    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        if offset.is_multiple_of(data.len().max(1) as u64) {
            for (i, part) in data.chunks(4).enumerate() {
                self.write_part(offset.wrapping_add(4 * i as u64), part);
            }
        }
        self.deliver();
    }
}
