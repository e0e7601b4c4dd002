//! The virtio devices of a machine: where a guest finds them, and when they are polled.
//!
//! [`Devices`] is filled before the machine is built; each device goes behind a window of registers
//! that ACPI announces ([`Transport::Mmio`]) or becomes a PCI function ([`Transport::Pci`]). A
//! device works inside the bus write with which its driver notifies it. What is left to do later,
//! because it was too much at once or because its backend has a clock, has a deadline among those
//! of the machine's other devices, so that a device with nothing to do costs an exit nothing. What
//! its backend hears from outside it learns of by [`DeviceHandle::wake`].
//!
//! With [`Devices::add_iommu`] the guest decides what devices may reach: those that are added
//! [behind it](Devices::add_behind) see guest memory through the domain that the guest puts them
//! in, and ACPI says so (VIOT).

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering, fence};

use testudo_arch::GuestMemory;
use testudo_arch::bus::BusDevice;
use testudo_arch::irq::InterruptSink;
use testudo_arch::pci::{BARS, PciFunction, PciWindow};
use testudo_virtio::device::{Iommu, IommuMemory, IommuState};
use testudo_virtio::transport::{Fault, Mmio, Options, Pci};
use testudo_virtio::{Device, Next};

use crate::acpi::{TopologyPlace, VirtioMmio, VirtioTopology};
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
    /// A device is behind an IOMMU of other devices'.
    #[error("a device is behind an IOMMU that is not among the devices")]
    NoIommu,
    /// The window lies on another device's.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus refuses the function.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// A device by what it sees of memory.
enum Behind<M> {
    /// All of it.
    Nothing(Box<dyn Device<M>>),
    /// What the guest lets it see.
    Iommu(Box<dyn Device<IommuMemory<M>>>),
    /// It is what decides that.
    IsIommu(Box<dyn Device<M>>),
}

struct Planned<M> {
    device: Behind<M>,
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
    iommu: Option<Arc<IommuState>>,
}

/// The IOMMU that some [`Devices`] have.
#[derive(Clone, Debug)]
pub struct IommuRef(Arc<IommuState>);

impl IommuRef {
    /// What the guest has decided.
    pub fn state(&self) -> &IommuState {
        &self.0
    }
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
            iommu: None,
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

    /// Adds a device that reaches all of memory.
    pub fn add(
        &mut self,
        transport: Transport,
        options: Options,
        device: Box<dyn Device<M>>,
    ) -> DeviceHandle {
        self.plan(transport, options, Behind::Nothing(device))
    }

    fn plan(&mut self, transport: Transport, options: Options, device: Behind<M>) -> DeviceHandle {
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

/// What ACPI must say of the devices.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) windows: Vec<VirtioMmio>,
    pub(crate) topology: Option<VirtioTopology>,
}

/// The buses on which devices are put.
struct Buses<'a> {
    chip: &'a Arc<Irqchip>,
    mmio: &'a mut MmioBus,
    pci: &'a mut PciHost,
    timers: &'a mut DeviceTimers,
    windows: Vec<VirtioMmio>,
}

/// Where a device of some [`Buses`] goes: its place, and the interrupt there.
struct Slot {
    place: TopologyPlace,
    gsi: u32,
}

impl Buses<'_> {
    /// The next free place.
    fn slot(&self, transport: Transport) -> Result<Slot, AttachError> {
        match transport {
            Transport::Mmio => {
                // More devices than interrupts share them, which level triggering allows.
                let number = self.windows.len();
                let gsi = layout::FREE_GSIS[number % layout::FREE_GSIS.len()];
                let offset = number as u64 * layout::VIRTIO_MMIO_STRIDE;
                Ok(Slot {
                    place: TopologyPlace::Mmio(layout::VIRTIO_MMIO.wrapping_add(offset)),
                    gsi: gsi.into(),
                })
            }
            Transport::Pci => {
                let device = self.pci.free_device().ok_or(AttachError::NoSlot)?;
                Ok(Slot {
                    place: TopologyPlace::Pci(u16::from(device) << 3),
                    gsi: PciHost::intx_gsi(device, 0),
                })
            }
        }
    }

    /// Puts a device into a place.
    fn put<M: GuestMemory + Send + 'static>(
        &mut self,
        slot: &Slot,
        device: Box<dyn Device<M>>,
        memory: M,
        options: Options,
        handle: DeviceHandle,
    ) -> Result<(), AttachError> {
        let gsi = slot.gsi;
        let line = wire(self.chip, gsi)?;
        match slot.place {
            TopologyPlace::Mmio(base) => {
                let transport = Mmio::new(device, memory, options, line, gsi);
                let attached = Attached::new(transport, self.chip, handle);
                self.mmio
                    .add(base.0..base.0 + Mmio::<M>::WINDOW, attached.clone())?;
                self.timers.add(attached);
                // All interrupts for windows are among the first few.
                let gsi = gsi as u8;
                self.windows.push(VirtioMmio { base, gsi });
            }
            TopologyPlace::Pci(function) => {
                let transport = Pci::new(device, memory, options, line, gsi);
                let attached = Attached::new(transport, self.chip, handle);
                self.pci.add((function >> 3) as u8, 0, attached.clone())?;
                self.timers.add(attached);
            }
        }
        Ok(())
    }
}

impl<M: GuestMemory + Clone + Send + 'static> Devices<M> {
    /// Adds the device by which the guest decides what the devices behind it may reach. The first
    /// one is the one that counts.
    pub fn add_iommu(
        &mut self,
        transport: Transport,
        options: Options,
    ) -> (DeviceHandle, IommuRef) {
        let state = self
            .iommu
            .get_or_insert_with(|| IommuState::new([]))
            .clone();
        let device = Behind::IsIommu(Box::new(Iommu::new(state.clone())));
        let handle = self.plan(transport, options, device);
        let woken = handle.clone();
        state.set_waker(move || woken.wake());
        (handle, IommuRef(state))
    }

    /// Adds a device whose accesses to memory go through an IOMMU: its driver must agree to
    /// [`ACCESS_PLATFORM`](testudo_virtio::Features::ACCESS_PLATFORM).
    pub fn add_behind(
        &mut self,
        _iommu: &IommuRef,
        transport: Transport,
        options: Options,
        device: Box<dyn Device<IommuMemory<M>>>,
    ) -> DeviceHandle {
        let options = Options {
            access_platform: true,
            ..options
        };
        self.plan(transport, options, Behind::Iommu(device))
    }

    /// Puts the devices on their buses; gives what ACPI must say of them.
    pub(crate) fn attach(
        self,
        chip: &Arc<Irqchip>,
        memory: &M,
        mmio: &mut MmioBus,
        pci: &mut PciHost,
        timers: &mut DeviceTimers,
    ) -> Result<Found, AttachError> {
        let mut buses = Buses {
            chip,
            mmio,
            pci,
            timers,
            windows: Vec::new(),
        };
        let mut iommu = None;
        let mut endpoints = Vec::new();
        for planned in self.planned {
            let Planned {
                device,
                transport,
                options,
                handle,
            } = planned;
            let memory = memory.clone();
            let slot = buses.slot(transport)?;
            match device {
                Behind::Nothing(device) => buses.put(&slot, device, memory, options, handle)?,
                Behind::IsIommu(device) => {
                    iommu.get_or_insert(slot.place);
                    buses.put(&slot, device, memory, options, handle)?;
                }
                Behind::Iommu(device) => {
                    let state = self.iommu.clone().ok_or(AttachError::NoIommu)?;
                    let number = slot.place.endpoint();
                    state.add_endpoint(number);
                    endpoints.push(slot.place);
                    let memory = IommuMemory::new(memory, state, number);
                    buses.put(&slot, device, memory, options, handle)?;
                }
            }
        }
        let windows = buses.windows;
        let topology = iommu.map(|iommu| VirtioTopology { iommu, endpoints });
        Ok(Found { windows, topology })
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
