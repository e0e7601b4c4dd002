//! The virtio devices of a machine: where a guest finds them, and when they are polled.
//!
//! [`Devices`] is filled before the machine is built; each device goes behind a window of registers
//! that ACPI announces ([`Transport::Mmio`]) or becomes a PCI function ([`Transport::Pci`]). A
//! device works inside the bus write with which its driver notifies it. What is left to do later,
//! because it was too much at once or because its backend has a clock, has a deadline among those
//! of the machine's other devices, so that a device with nothing to do costs an exit nothing. What
//! its backend hears from outside it learns of by [`DeviceHandle::wake`].

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering, fence};

use testudo_arch::GuestMemory;
use testudo_arch::bus::BusDevice;
use testudo_arch::irq::InterruptSink;
use testudo_arch::pci::{BARS, PciFunction, PciWindow};
use testudo_virtio::transport::{Fault, Mmio, Options, Pci};
use testudo_virtio::{Device, Next};

use crate::acpi::VirtioMmio;
use crate::bus::{BusError, MmioBus};
use crate::device::pci::{PciError, PciHost};
use crate::device::{Clocked, Deadline, DeviceTimers};
use crate::irq::Irqchip;
use crate::layout;

/// How a guest finds and addresses a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A window of registers with a level-triggered interrupt, announced by ACPI as `LNRO0005`.
    Mmio,
    /// A PCI function with message-signalled interrupts.
    Pci,
}

/// Why a device cannot be attached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The PCI bus has a function at every device number.
    #[error("the PCI bus is full")]
    NoSlot,
    /// An interrupt is shared by as many devices as it can be.
    #[error("interrupt {gsi} has no wire left")]
    NoInterrupt {
        /// The global system interrupt.
        gsi: u32,
    },
    /// The window lies on another device's.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus refuses the function.
    #[error(transparent)]
    Pci(#[from] PciError),
}

struct Planned<M> {
    device: Box<dyn Device<M>>,
    transport: Transport,
    options: Options,
    handle: DeviceHandle,
}

/// The virtio devices that a machine is to have, in the order in which a guest finds them.
///
/// ```
/// use testudo_arch::memory::GuestRam;
/// use testudo_machine::virtio::{Devices, Transport};
/// use testudo_virtio::device::Rng;
/// use testudo_virtio::transport::Options;
///
/// let mut devices = Devices::<GuestRam>::new();
/// let rng = Rng::new(|bytes: &mut [u8]| {
///     bytes.fill(4); // Chosen by a fair die.
///     bytes.len()
/// });
/// let handle = devices.add(Transport::Pci, Options::default(), Box::new(rng));
/// // Now `Machine::with_devices(…, devices)`; the handle goes to whoever feeds the device.
/// assert_eq!((devices.len(), handle.fault()), (1, None));
/// ```
pub struct Devices<M> {
    planned: Vec<Planned<M>>,
}

impl<M> Default for Devices<M> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M> Devices<M> {
    /// No devices.
    pub fn new() -> Self {
        Self {
            planned: Vec::new(),
        }
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.planned.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.planned.is_empty()
    }

    /// Adds a device.
    pub fn add(
        &mut self,
        transport: Transport,
        options: Options,
        device: Box<dyn Device<M>>,
    ) -> DeviceHandle {
        let handle = DeviceHandle::default();
        self.planned.push(Planned {
            device,
            transport,
            options,
            handle: handle.clone(),
        });
        handle
    }
}

impl<M: GuestMemory + Clone + Send + 'static> Devices<M> {
    /// Puts the devices on their buses; gives what ACPI must say of those behind windows.
    pub(crate) fn attach(
        self,
        chip: &Arc<Irqchip>,
        memory: &M,
        mmio: &mut MmioBus,
        pci: &mut PciHost,
        timers: &mut DeviceTimers,
    ) -> Result<Vec<VirtioMmio>, AttachError> {
        let mut windows = Vec::new();
        for planned in self.planned {
            let Planned {
                device,
                transport,
                options,
                handle,
            } = planned;
            let memory = memory.clone();
            match transport {
                Transport::Mmio => {
                    // More devices than interrupts share them, which level triggering allows.
                    let number = windows.len();
                    let gsi = layout::FREE_GSIS[number % layout::FREE_GSIS.len()];
                    let base = layout::VIRTIO_MMIO
                        .wrapping_add(number as u64 * layout::VIRTIO_MMIO_STRIDE);
                    let line = wire(chip, gsi.into())?;
                    let transport = Mmio::new(device, memory, options, line, gsi.into());
                    let attached = Attached::new(transport, chip, handle);
                    mmio.add(base.0..base.0 + Mmio::<M>::WINDOW, attached.clone())?;
                    timers.add(attached);
                    windows.push(VirtioMmio { base, gsi });
                }
                Transport::Pci => {
                    let slot = pci.free_device().ok_or(AttachError::NoSlot)?;
                    let gsi = PciHost::intx_gsi(slot, 0);
                    let line = wire(chip, gsi)?;
                    let transport = Pci::new(device, memory, options, line, gsi);
                    let attached = Attached::new(transport, chip, handle);
                    pci.add(slot, 0, attached.clone())?;
                    timers.add(attached);
                }
            }
        }
        Ok(windows)
    }
}

/// A wire of its own to an interrupt, and the way for messages.
fn wire(chip: &Arc<Irqchip>, gsi: u32) -> Result<Arc<dyn InterruptSink>, AttachError> {
    let line = chip.line(gsi).ok_or(AttachError::NoInterrupt { gsi })?;
    Ok(Arc::new(line))
}

#[derive(Default)]
struct Shared {
    /// The backend has something that the device has not looked for yet.
    woken: AtomicBool,
    /// Known once the device is attached.
    deadline: spin::Once<Arc<Deadline>>,
    fault: spin::Mutex<Option<Fault>>,
}

/// A device of a machine, as the program around the machine sees it.
///
/// It can be used from any processor, also while the machine is not built yet.
#[derive(Clone, Default)]
pub struct DeviceHandle(Arc<Shared>);

impl DeviceHandle {
    /// Has the device look at its backend soon. It takes no lock that a device holds, so that an
    /// interrupt handler may call it.
    pub fn wake(&self) {
        self.0.woken.store(true, Ordering::SeqCst);
        if let Some(deadline) = self.0.deadline.get() {
            deadline.set(Some(AT_ONCE));
        }
    }

    /// Why the device needs a reset by its driver, if it does.
    pub fn fault(&self) -> Option<Fault> {
        *self.0.fault.lock()
    }

    fn take_wake(&self) -> bool {
        self.0.woken.swap(false, Ordering::SeqCst)
    }

    fn attach(&self, deadline: &Arc<Deadline>) {
        self.0.deadline.call_once(|| deadline.clone());
        self.keep_wake(deadline);
    }

    /// Brings back the deadline of a wake that the device's own may have replaced.
    fn keep_wake(&self, deadline: &Deadline) {
        // Either this sees the wake, or the wake sets its deadline after ours was set.
        fence(Ordering::SeqCst);
        if self.0.woken.load(Ordering::Relaxed) {
            deadline.set(Some(AT_ONCE));
        }
    }
}

/// A deadline that has always passed.
const AT_ONCE: u64 = 1;

/// What both transports have in common.
trait Polled: Send {
    fn poll(&mut self, now: u64) -> Next;
    fn next_poll(&self) -> Next;
    fn fault(&self) -> Option<Fault>;
}

impl<M: GuestMemory + Send> Polled for Mmio<M> {
    fn poll(&mut self, now: u64) -> Next {
        self.poll(now)
    }
    fn next_poll(&self) -> Next {
        self.next_poll()
    }
    fn fault(&self) -> Option<Fault> {
        self.fault()
    }
}

impl<M: GuestMemory + Send> Polled for Pci<M> {
    fn poll(&mut self, now: u64) -> Next {
        self.poll(now)
    }
    fn next_poll(&self) -> Next {
        self.next_poll()
    }
    fn fault(&self) -> Option<Fault> {
        self.fault()
    }
}

/// A device behind its transport, with its deadline.
struct Attached<T> {
    transport: T,
    deadline: Arc<Deadline>,
    /// What the device last asked for; the deadline may be a wake's.
    asked: Option<u64>,
    handle: DeviceHandle,
}

impl<T: Polled> Attached<T> {
    fn new(transport: T, chip: &Arc<Irqchip>, handle: DeviceHandle) -> Arc<spin::Mutex<Self>> {
        let deadline = Deadline::new(chip);
        handle.attach(&deadline);
        Arc::new(spin::Mutex::new(Self {
            transport,
            deadline,
            asked: None,
            handle,
        }))
    }

    /// Takes note of when the device wants to be polled, if an access has changed that.
    #[inline]
    fn settle(&mut self) {
        let asks = match self.transport.next_poll() {
            Next::Idle => None,
            Next::Again => Some(AT_ONCE),
            Next::At(time) => Some(time.max(AT_ONCE)),
        };
        if asks != self.asked {
            self.ask(asks);
        }
        if self.transport.fault().is_some() {
            self.report();
        }
    }

    fn ask(&mut self, at: Option<u64>) {
        self.asked = at;
        self.deadline.set(at);
        self.handle.keep_wake(&self.deadline);
    }

    #[cold]
    fn report(&mut self) {
        *self.handle.0.fault.lock() = self.transport.fault();
    }
}

impl<T: Polled> Clocked for Attached<T> {
    fn deadline(&self) -> &Arc<Deadline> {
        &self.deadline
    }

    fn poll(&mut self, now: u64) {
        self.handle.take_wake();
        self.ask(None);
        self.transport.poll(now);
        self.settle();
    }
}

impl<M: GuestMemory + Send> BusDevice for Attached<Mmio<M>> {
    #[inline]
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset, data);
    }

    #[inline]
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
        self.settle();
    }
}

impl<M: GuestMemory + Send> PciFunction for Attached<Pci<M>> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.transport.config_read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.transport.config_write(offset, data);
        self.settle();
    }

    fn windows(&self) -> [Option<PciWindow>; BARS] {
        self.transport.windows()
    }

    #[inline]
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.transport.bar_read(bar, offset, data);
    }

    #[inline]
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.transport.bar_write(bar, offset, data);
        self.settle();
    }
}

#[cfg(test)]
mod tests;
