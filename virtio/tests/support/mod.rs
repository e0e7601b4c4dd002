//! A guest without a processor: memory, interrupt controllers that write down what they are told,
//! and what the crate `virtio-drivers` needs to drive our devices over their real registers.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

pub mod zoo;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use testudo_arch::bus::BusDevice;
use testudo_arch::irq::{InterruptSink, Msi};
use testudo_arch::memory::GuestRam;
use testudo_arch::pci::PciFunction;
use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::driver::{DriverQueue, ring_bytes};
use testudo_virtio::transport::{Fault, Mmio, Options, Pci};
use testudo_virtio::{Device, Features, Next, Segment};
use virtio_drivers::transport::pci::VIRTIO_VENDOR_ID;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, PciRoot,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Makes a test of each function `fn name<T: Connect>(packed: bool)`, for each transport and each ring format.
#[allow(unused_macros, reason = "each test file uses its own part")]
macro_rules! in_all_ways {
    ($($name:ident)*) => {
        mod mmio_split {
            $(#[test] fn $name() { super::$name::<super::MmioGuest>(false) })*
        }
        mod mmio_packed {
            $(#[test] fn $name() { super::$name::<super::MmioGuest>(true) })*
        }
        mod pci_split {
            $(#[test] fn $name() { super::$name::<super::PciGuest>(false) })*
        }
        mod pci_packed {
            $(#[test] fn $name() { super::$name::<super::PciGuest>(true) })*
        }
    };
}

/// Where guest memory begins: far from anything that a host pointer could be mistaken for.
pub const RAM_BASE: u64 = 0x10_0000;
pub const RAM_SIZE: u64 = 32 << 20;

/// Guest memory of the running test.
pub struct Ram {
    pub guest: GuestRam,
    host: *mut u8,
    next: u64,
    free: HashMap<u64, Vec<u64>>,
}

impl Ram {
    #[allow(unsafe_code)]
    fn new() -> Self {
        let bytes: &'static mut [u64] = vec![0u64; (RAM_SIZE / 8) as usize].leak();
        let host = bytes.as_mut_ptr().cast();
        let mut guest = GuestRam::new();
        // SAFETY: the memory is leaked, and only raw accesses are made to it from here on.
        unsafe { guest.add(Gpa(RAM_BASE), host, RAM_SIZE, true) }.unwrap();
        Self {
            guest,
            host,
            next: RAM_BASE,
            free: HashMap::new(),
        }
    }

    /// Zeroed guest memory of `len` bytes (rounded up to pages).
    pub fn alloc(&mut self, len: u64) -> u64 {
        let len = len.next_multiple_of(4096);
        let gpa = match self.free.get_mut(&len).and_then(Vec::pop) {
            Some(gpa) => gpa,
            None => {
                let gpa = self.next;
                self.next += len;
                assert!(self.next <= RAM_BASE + RAM_SIZE, "out of guest memory");
                gpa
            }
        };
        self.guest.write(Gpa(gpa), &vec![0; len as usize]).unwrap();
        gpa
    }

    pub fn free(&mut self, gpa: u64, len: u64) {
        let len = len.next_multiple_of(4096);
        // What is used after it was given back shows.
        self.guest
            .write(Gpa(gpa), &vec![0xDD; len as usize])
            .unwrap();
        self.free.entry(len).or_default().push(gpa);
    }
}

thread_local! {
    pub static RAM: RefCell<Ram> = RefCell::new(Ram::new());
}

/// The memory of the running test, for a device.
pub fn memory() -> GuestRam {
    RAM.with_borrow(|ram| ram.guest.clone())
}

pub fn alloc(len: u64) -> Gpa {
    Gpa(RAM.with_borrow_mut(|ram| ram.alloc(len)))
}

/// Copies every buffer into guest memory and back, so that a device that touches the wrong bytes,
/// or the right ones too late, shows.
pub struct GuestHal;

#[allow(unsafe_code)]
// SAFETY: memory comes from the leaked guest memory, page-aligned and zeroed, and is handed out
// once until it is freed.
unsafe impl Hal for GuestHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        RAM.with_borrow_mut(|ram| {
            let gpa = ram.alloc(pages as u64 * 4096);
            let host = ram.host.wrapping_add((gpa - RAM_BASE) as usize);
            (gpa, NonNull::new(host).unwrap())
        })
    }

    unsafe fn dma_dealloc(gpa: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        RAM.with_borrow_mut(|ram| ram.free(gpa, pages as u64 * 4096));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are reached through the bus")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        RAM.with_borrow_mut(|ram| {
            let gpa = ram.alloc(buffer.len() as u64);
            if direction != BufferDirection::DeviceToDriver {
                // SAFETY: the driver promises a valid buffer that nobody else uses now.
                ram.guest
                    .write(Gpa(gpa), unsafe { buffer.as_ref() })
                    .unwrap();
            }
            gpa
        })
    }

    unsafe fn unshare(gpa: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        RAM.with_borrow_mut(|ram| {
            if direction != BufferDirection::DriverToDevice {
                // SAFETY: as for `share`.
                ram.guest
                    .read(Gpa(gpa), unsafe { buffer.as_mut() })
                    .unwrap();
            }
            ram.free(gpa, buffer.len() as u64);
        });
    }
}

/// Interrupt controllers that remember.
#[derive(Debug, Default)]
pub struct Interrupts {
    pub levels: Mutex<BTreeMap<u32, bool>>,
    pub raised: Mutex<BTreeMap<u32, usize>>,
    pub messages: Mutex<Vec<Msi>>,
}

impl InterruptSink for Interrupts {
    fn set_level(&self, gsi: u32, high: bool) {
        self.levels.lock().unwrap().insert(gsi, high);
        if high {
            *self.raised.lock().unwrap().entry(gsi).or_default() += 1;
        }
    }

    fn send_msi(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}

impl Interrupts {
    pub fn level(&self, gsi: u32) -> bool {
        self.levels.lock().unwrap().get(&gsi) == Some(&true)
    }

    pub fn count(&self, gsi: u32) -> usize {
        self.raised.lock().unwrap().get(&gsi).copied().unwrap_or(0)
    }
}

/// The interrupt line of the device under test.
pub const GSI: u32 = 5;

/// How a device is connected to the guest of a test.
pub trait Connect: Transport + Clone {
    /// Connects a device with these options.
    fn connect_with(device: Box<dyn Device<GuestRam>>, options: Options) -> Self;

    /// Lets the device look at its backend.
    fn poll(&self, now: u64) -> Next;

    /// What the interrupt controllers were told.
    fn interrupts(&self) -> &Interrupts;

    /// Why the device needs a reset, if it does.
    fn fault(&self) -> Option<Fault>;

    /// Takes one queue out of use.
    fn reset_queue(&mut self, queue: u16);

    /// Reads the device's configuration space, in any width at any place.
    fn peek_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space, in any width at any place.
    fn poke_config(&self, offset: u64, data: &[u8]);

    fn connect(device: impl Device<GuestRam> + 'static) -> Self {
        Self::connect_with(Box::new(device), Options::default())
    }
}

/// A device behind MMIO registers as `virtio-drivers` sees it.
#[derive(Clone)]
pub struct MmioGuest {
    pub device: Rc<RefCell<Mmio<GuestRam>>>,
    interrupts: Arc<Interrupts>,
}

impl Connect for MmioGuest {
    fn connect_with(device: Box<dyn Device<GuestRam>>, options: Options) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let mmio = Mmio::new(device, memory(), options, interrupts.clone(), GSI);
        Self {
            device: Rc::new(RefCell::new(mmio)),
            interrupts,
        }
    }

    fn poll(&self, now: u64) -> Next {
        self.device.borrow_mut().poll(now)
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn fault(&self) -> Option<Fault> {
        self.device.borrow().fault()
    }

    fn reset_queue(&mut self, queue: u16) {
        self.write(0x30, queue.into());
        self.write(0xC0, 1);
        assert_eq!(self.read(0xC0), 0);
    }

    fn peek_config(&self, offset: u64, data: &mut [u8]) {
        self.device.borrow_mut().read(0x100 + offset, data);
    }

    fn poke_config(&self, offset: u64, data: &[u8]) {
        self.device.borrow_mut().write(0x100 + offset, data);
    }
}

impl MmioGuest {
    pub fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.borrow_mut().read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.device.borrow_mut().write(offset, &value.to_le_bytes());
    }
}

impl Transport for MmioGuest {
    fn device_type(&self) -> DeviceType {
        assert_eq!((self.read(0), self.read(4)), (0x7472_6976, 2));
        DeviceType::try_from(self.read(8)).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(low) | (u64::from(self.read(0x10)) << 32)
    }

    fn write_driver_features(&mut self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(0x30, queue.into());
        self.read(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.write(0x50, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(0x70, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, driver: u64, device: u64) {
        self.write(0x30, queue.into());
        self.write(0x38, size);
        for (register, address) in [(0x80, table), (0x90, driver), (0xA0, device)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(0x30, queue.into());
        self.write(0x44, 0);
        assert_eq!(self.read(0x44), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(0x30, queue.into());
        self.read(0x44) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(0x60);
        self.write(0x64, status);
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(0xFC)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        let mut device = self.device.borrow_mut();
        // As a processor reads a structure: in pieces of its alignment.
        let pieces = value.as_mut_bytes().chunks_mut(align_of::<T>());
        for (i, piece) in pieces.enumerate() {
            device.read((0x100 + offset + i * align_of::<T>()) as u64, piece);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        let mut device = self.device.borrow_mut();
        device.write(0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

/// Where the test puts the memory window of the function.
pub const BAR_BASE: u64 = 0xE000_0000;

/// The place of a structure: register, offset, length.
#[derive(Clone, Copy, Debug, Default)]
pub struct Structure {
    pub bar: u8,
    pub offset: u32,
    pub len: u32,
}

/// A device as a PCI function as `virtio-drivers` finds it: its enumeration, its sizing of base
/// address registers and its walk of the capability list.
#[derive(Clone)]
pub struct PciGuest {
    pub device: Rc<RefCell<Pci<GuestRam>>>,
    interrupts: Arc<Interrupts>,
    pub common: Structure,
    pub notify: Structure,
    pub isr: Structure,
    pub config: Structure,
    multiplier: u32,
}

/// The configuration space of a bus with one function on it.
struct Bus(Rc<RefCell<Pci<GuestRam>>>);

const FUNCTION: DeviceFunction = DeviceFunction {
    bus: 0,
    device: 3,
    function: 0,
};

impl ConfigurationAccess for Bus {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        let mut bytes = [0xFF; 4];
        if function == FUNCTION {
            self.0.borrow_mut().config_read(offset.into(), &mut bytes);
        }
        u32::from_le_bytes(bytes)
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        assert_eq!(function, FUNCTION);
        self.0
            .borrow_mut()
            .config_write(offset.into(), &data.to_le_bytes());
    }

    #[allow(unsafe_code)]
    unsafe fn unsafe_clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl Connect for PciGuest {
    fn connect_with(device: Box<dyn Device<GuestRam>>, options: Options) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let pci = Pci::new(device, memory(), options, interrupts.clone(), GSI);
        let device = Rc::new(RefCell::new(pci));
        assert_eq!(device.borrow().windows(), [None; 6]);
        let mut root = PciRoot::new(Bus(device.clone()));
        let (function, info) = root.enumerate_bus(0).next().unwrap();
        assert_eq!(function, FUNCTION);
        assert_eq!(info.vendor_id, VIRTIO_VENDOR_ID);
        let bar = root.bar_info(FUNCTION, 0).unwrap().unwrap();
        let BarInfo::Memory {
            size,
            prefetchable: false,
            ..
        } = bar
        else {
            panic!("{bar:?}");
        };
        root.set_bar_64(FUNCTION, 0, BAR_BASE);
        root.set_command(FUNCTION, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let window = device.borrow().windows()[0].unwrap();
        assert_eq!((window.base, window.size), (BAR_BASE, size));

        let mut guest = Self {
            device,
            interrupts,
            common: Structure::default(),
            notify: Structure::default(),
            isr: Structure::default(),
            config: Structure::default(),
            multiplier: 0,
        };
        let word = |at: u8| Bus(guest.device.clone()).read_word(FUNCTION, at);
        for capability in root.capabilities(FUNCTION).filter(|c| c.id == 9) {
            let at = capability.offset;
            let structure = Structure {
                bar: word(at + 4) as u8,
                offset: word(at + 8),
                len: word(at + 12),
            };
            match capability.private_header >> 8 {
                1 => guest.common = structure,
                2 => {
                    guest.notify = structure;
                    guest.multiplier = word(at + 16);
                }
                3 => guest.isr = structure,
                4 => guest.config = structure,
                5 => {}
                other => panic!("capability of type {other}"),
            }
        }
        guest
    }

    fn poll(&self, now: u64) -> Next {
        self.device.borrow_mut().poll(now)
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn fault(&self) -> Option<Fault> {
        self.device.borrow().fault()
    }

    fn reset_queue(&mut self, queue: u16) {
        self.write(22, queue);
        self.write(58, 1u16);
        assert_eq!(self.read::<u16>(58), 0);
    }

    fn peek_config(&self, offset: u64, data: &mut [u8]) {
        let at = u64::from(self.config.offset) + offset;
        self.device.borrow_mut().bar_read(0, at, data);
    }

    fn poke_config(&self, offset: u64, data: &[u8]) {
        let at = u64::from(self.config.offset) + offset;
        self.device.borrow_mut().bar_write(0, at, data);
    }
}

impl PciGuest {
    pub fn read_bar(&self, structure: Structure, offset: usize, data: &mut [u8]) {
        assert!(offset + data.len() <= structure.len as usize);
        let at = u64::from(structure.offset) + offset as u64;
        let bar = usize::from(structure.bar);
        self.device.borrow_mut().bar_read(bar, at, data);
    }

    pub fn write_bar(&self, structure: Structure, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= structure.len as usize);
        let at = u64::from(structure.offset) + offset as u64;
        let bar = usize::from(structure.bar);
        self.device.borrow_mut().bar_write(bar, at, data);
    }

    pub fn read<T: FromBytes + IntoBytes>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.read_bar(self.common, offset, value.as_mut_bytes());
        value
    }

    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: T) {
        self.write_bar(self.common, offset, value.as_bytes());
    }
}

impl Transport for PciGuest {
    fn device_type(&self) -> DeviceType {
        let mut id = [0; 2];
        self.device.borrow_mut().config_read(2, &mut id);
        DeviceType::try_from(u16::from_le_bytes(id) - 0x1040).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(0, 0u32);
        let low: u32 = self.read(4);
        self.write(0, 1u32);
        u64::from(low) | (u64::from(self.read::<u32>(4)) << 32)
    }

    fn write_driver_features(&mut self, features: u64) {
        for (window, bits) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(8, window);
            self.write(12, bits);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(22, queue);
        u32::from(self.read::<u16>(24))
    }

    fn notify(&mut self, queue: u16) {
        self.write(22, queue);
        let offset = u32::from(self.read::<u16>(30)) * self.multiplier;
        self.write_bar(self.notify, offset as usize, &queue.to_le_bytes());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read::<u8>(20).into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(20, status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, driver: u64, device: u64) {
        self.write(22, queue);
        self.write(24, size as u16);
        // Whole, where other drivers use halves: both must do.
        self.write(32, table);
        self.write(40, driver);
        self.write(48, device);
        self.write(28, 1u16);
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(22, queue);
        self.read::<u16>(28) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let mut status = [0];
        self.read_bar(self.isr, 0, &mut status);
        InterruptStatus::from_bits_truncate(status[0].into())
    }

    fn read_config_generation(&self) -> u32 {
        self.read::<u8>(21).into()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        // As a processor reads a structure: in pieces of its alignment.
        let pieces = value.as_mut_bytes().chunks_mut(align_of::<T>());
        for (i, piece) in pieces.enumerate() {
            self.read_bar(self.config, offset + i * align_of::<T>(), piece);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.write_bar(self.config, offset, value.as_bytes());
        Ok(())
    }
}

/// A driver without a driver library: negotiates, sets queues up in either format, and exchanges
/// plain bytes.
pub struct RawDriver<T: Connect> {
    pub guest: T,
    pub queues: Vec<DriverQueue>,
    pub features: Features,
}

impl<T: Connect> RawDriver<T> {
    /// Connects a device and takes every feature it offers; the packed format only if asked to.
    pub fn new(device: impl Device<GuestRam> + 'static, packed: bool) -> Self {
        Self::with_features(device, packed, |offered| offered)
    }

    /// Connects a device and takes the features that `choose` leaves of those offered.
    pub fn with_features(
        device: impl Device<GuestRam> + 'static,
        packed: bool,
        choose: impl Fn(Features) -> Features,
    ) -> Self {
        let sizes = device.queues().to_vec();
        let guest = T::connect(device);
        Self::start(guest, &sizes, packed, choose)
    }

    /// Brings a connected device up, from a reset.
    pub fn start(
        mut guest: T,
        sizes: &[u16],
        packed: bool,
        choose: impl Fn(Features) -> Features,
    ) -> Self {
        guest.set_status(DeviceStatus::empty());
        guest.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        // What the driver side here does not do, it does not take.
        let mut features = Features::from_bits_retain(guest.read_device_features());
        features -= Features::EVENT_IDX | Features::NOTIFICATION_DATA;
        features.set(Features::RING_PACKED, packed);
        let features = choose(features);
        guest.write_driver_features(features.bits());
        let so_far = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        guest.set_status(so_far);
        assert!(guest.get_status().contains(DeviceStatus::FEATURES_OK));
        let mut queues = Vec::new();
        for (number, &size) in sizes.iter().enumerate() {
            let number = number as u16;
            assert_eq!(guest.max_queue_size(number), size.into());
            let queue = DriverQueue::new(alloc(ring_bytes(size)), size, packed);
            let config = *queue.config();
            let (table, driver) = (config.descriptors.0, config.driver.0);
            guest.queue_set(number, size.into(), table, driver, config.device.0);
            queues.push(queue);
        }
        guest.set_status(so_far | DeviceStatus::DRIVER_OK);
        Self {
            guest,
            queues,
            features,
        }
    }

    /// Sets a queue up anew after its reset.
    pub fn set_up(&mut self, number: u16, packed: bool) {
        let size = self.queues[usize::from(number)].config().size;
        let queue = DriverQueue::new(alloc(ring_bytes(size)), size, packed);
        let config = *queue.config();
        let (table, driver) = (config.descriptors.0, config.driver.0);
        let guest = &mut self.guest;
        guest.queue_set(number, size.into(), table, driver, config.device.0);
        self.queues[usize::from(number)] = queue;
    }

    /// Offers one chain, without notifying.
    pub fn offer(&mut self, queue: u16, readable: &[Segment], writable: &[Segment]) -> u16 {
        let memory = memory();
        let queue = &mut self.queues[usize::from(queue)];
        queue
            .offer(&memory, readable, writable, None)
            .unwrap()
            .expect("room in the queue")
    }

    /// What the device returned, if anything.
    pub fn take_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        self.queues[usize::from(queue)]
            .take_used(&memory())
            .unwrap()
    }

    /// Sends `request` with room for `room` bytes of answer, and returns the answer as far as it
    /// was written.
    pub fn exchange(&mut self, queue: u16, request: &[u8], room: u32) -> Option<Vec<u8>> {
        let memory = memory();
        let at = alloc(request.len().max(1) as u64);
        memory.write(at, request).unwrap();
        let answer = alloc(u64::from(room.max(1)));
        let segment = |gpa, len| Segment { gpa, len };
        let readable = [segment(at, request.len() as u32)];
        let writable = [segment(answer, room)];
        let readable = if request.is_empty() {
            &[][..]
        } else {
            &readable
        };
        let writable = if room == 0 { &[][..] } else { &writable };
        let id = self.offer(queue, readable, writable);
        self.guest.notify(queue);
        let (returned, written) = self.take_used(queue)?;
        assert_eq!(returned, id);
        assert!(written <= room);
        let mut bytes = vec![0; written as usize];
        memory.read(answer, &mut bytes).unwrap();
        Some(bytes)
    }

    pub fn needs_reset(&self) -> bool {
        self.guest
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    }
}

impl<T: Connect> Drop for RawDriver<T> {
    fn drop(&mut self) {
        for queue in &self.queues {
            let config = queue.config();
            let len = ring_bytes(config.size);
            RAM.with_borrow_mut(|ram| ram.free(config.descriptors.0, len));
        }
    }
}
