//! Virtio over MMIO, version 2 (VIRTIO 1.3, 4.2).

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;

use testudo_arch::GuestMemory;
use testudo_arch::bus::BusDevice;
use testudo_arch::irq::InterruptSink;

use super::core::{Core, Fault, Options, Signal, with_high, with_low};
use crate::device::{Device, Next};

/// The registers (4.2.2), as offsets in the window.
mod register {
    pub(super) const MAGIC_VALUE: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00C;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0A0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0A4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0B0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0BC;
    pub(super) const QUEUE_RESET: u64 = 0x0C0;
    pub(super) const CONFIG_GENERATION: u64 = 0x0FC;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// "TSTD": there is no registry for this transport's vendor numbers.
const VENDOR: u32 = u32::from_le_bytes(*b"TSTD");

/// Interrupt status: a queue has returned chains; the configuration has changed.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// A virtio device in a window of registers.
///
/// The window is [`Mmio::WINDOW`] bytes. ACPI describes it to Linux as `LNRO0005` with the window
/// and one level-triggered interrupt.
pub struct Mmio<M> {
    core: Core<M>,
    interrupts: Arc<dyn InterruptSink>,
    gsi: u32,
    interrupt_status: u32,
    device_window: u32,
    driver_window: u32,
    queue: u32,
}

impl<M> fmt::Debug for Mmio<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmio")
            .field("gsi", &self.gsi)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMemory> Mmio<M> {
    /// The size of the register window in bytes.
    pub const WINDOW: u64 = 0x1000;

    /// Puts `device` behind registers; it interrupts through the line `gsi`.
    pub fn new(
        device: Box<dyn Device<M>>,
        memory: M,
        options: Options,
        interrupts: Arc<dyn InterruptSink>,
        gsi: u32,
    ) -> Self {
        Self {
            core: Core::new(device, memory, options),
            interrupts,
            gsi,
            interrupt_status: 0,
            device_window: 0,
            driver_window: 0,
            queue: 0,
        }
    }

    /// The interrupt line.
    pub fn gsi(&self) -> u32 {
        self.gsi
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

    /// Raises the line for what the device has to tell.
    fn deliver(&mut self) {
        let before = self.interrupt_status;
        while let Some(signal) = self.core.take_signal() {
            self.interrupt_status |= match signal {
                Signal::Queue(_) => USED_BUFFER,
                Signal::Config => CONFIG_CHANGE,
            };
        }
        if before == 0 && self.interrupt_status != 0 {
            self.interrupts.set_level(self.gsi, true);
        }
    }

    /// Clears causes of the interrupt, and the line when none is left.
    fn acknowledge(&mut self, causes: u32) {
        let before = self.interrupt_status;
        self.interrupt_status &= !causes;
        if before != 0 && self.interrupt_status == 0 {
            self.interrupts.set_level(self.gsi, false);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.core.id().0,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.core.offered().window(self.device_window),
            register::QUEUE_SIZE_MAX => {
                let config = self.core.config(self.queue);
                config.map_or(0, |config| config.max_size().into())
            }
            register::QUEUE_READY => self.core.enabled(self.queue).into(),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.core.status().into(),
            // No shared memory region exists: length and base of all are -1 (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // A reset of a queue has ended before the driver can look (4.2.2.1).
            register::QUEUE_RESET => 0,
            register::CONFIG_GENERATION => self.core.generation().into(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let queue = self.queue;
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_window = value,
            register::DRIVER_FEATURES => self.core.write_features(self.driver_window, value),
            register::DRIVER_FEATURES_SEL => self.driver_window = value,
            register::QUEUE_SEL => self.queue = value,
            register::QUEUE_SIZE => self.core.configure(queue, |q| {
                // A size that does not fit is kept as one that cannot be used either.
                q.size = u16::try_from(value).unwrap_or(u16::MAX);
            }),
            register::QUEUE_READY => match value {
                0 => self.core.disable(queue),
                1 => self.core.enable(queue),
                _ => {}
            },
            register::QUEUE_NOTIFY => self.core.notify(value),
            register::INTERRUPT_ACK => self.acknowledge(value),
            register::STATUS => {
                let reset = self.core.write_status(value as u8);
                if reset {
                    self.acknowledge(u32::MAX);
                    (self.device_window, self.driver_window, self.queue) = (0, 0, 0);
                }
            }
            register::QUEUE_DESC_LOW => self
                .core
                .configure(queue, |q| q.descriptors = with_low(q.descriptors, value)),
            register::QUEUE_DESC_HIGH => self
                .core
                .configure(queue, |q| q.descriptors = with_high(q.descriptors, value)),
            register::QUEUE_DRIVER_LOW => self
                .core
                .configure(queue, |q| q.driver = with_low(q.driver, value)),
            register::QUEUE_DRIVER_HIGH => self
                .core
                .configure(queue, |q| q.driver = with_high(q.driver, value)),
            register::QUEUE_DEVICE_LOW => self
                .core
                .configure(queue, |q| q.device = with_low(q.device, value)),
            register::QUEUE_DEVICE_HIGH => self
                .core
                .configure(queue, |q| q.device = with_high(q.device, value)),
            register::QUEUE_RESET if value == 1 => self.core.reset_queue(queue),
            _ => {}
        }
    }
}

impl<M: GuestMemory + Send> BusDevice for Mmio<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.core.read_config(offset, data);
        }
        // Registers are read whole and aligned (4.2.2.2); anything else reads as zero.
        data.fill(0);
        if let (4, 0) = (data.len(), offset & 3) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.core.write_config(offset, data);
        } else if let (Ok(bytes), 0) = (<[u8; 4]>::try_from(data), offset & 3) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        self.deliver();
    }
}
