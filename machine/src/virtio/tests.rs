use core::sync::atomic::AtomicUsize;
use std::vec::Vec;

use testudo_arch::Gpa;
use testudo_arch::memory::GuestRam;
use testudo_virtio::{DeviceError, DeviceId, Features, Io};

use super::*;
use crate::device::PowerSignal;
use crate::host::Host;
use crate::irq::Lapic;
use crate::irq::fake::{FakeHost, machine};
use crate::irq::request;

/// A device that wants what it is told to want, and counts.
#[derive(Default)]
struct Wishes {
    after_process: spin::Mutex<Option<Result<Next, DeviceError>>>,
    after_poll: spin::Mutex<Vec<Next>>,
    polled: AtomicUsize,
}

struct Wisher(Arc<Wishes>);

impl<M: GuestMemory> Device<M> for Wisher {
    fn id(&self) -> DeviceId {
        DeviceId(0x3F)
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self) -> &[u16] {
        &[4]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn reset(&mut self) {}

    fn process(&mut self, _: u16, _: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        self.0.after_process.lock().unwrap_or(Ok(Next::Idle))
    }

    fn poll(&mut self, _: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        self.0.polled.fetch_add(1, Ordering::Relaxed);
        Ok(self.0.after_poll.lock().pop().unwrap_or(Next::Idle))
    }
}

struct Bench {
    wishes: Arc<Wishes>,
    handle: DeviceHandle,
    mmio: MmioBus,
    timers: DeviceTimers,
    lapics: Vec<Lapic>,
    host: Arc<FakeHost>,
}

const BASE: u64 = layout::VIRTIO_MMIO.0;

impl Bench {
    /// One device behind a window.
    fn new(before: impl FnOnce(&DeviceHandle)) -> Self {
        let (host, chip, lapics) = machine(1);
        let mut memory = GuestRam::new();
        let page = std::vec![0u64; 2 << 10].leak();
        // SAFETY: the memory is leaked, and nobody else has it.
        #[allow(unsafe_code)]
        unsafe {
            let place = page.as_mut_ptr().cast();
            memory.add(Gpa(0), place, 16 << 10, true).unwrap();
        }
        let wishes = Arc::new(Wishes::default());
        let mut devices = Devices::new();
        let device = Box::new(Wisher(wishes.clone()));
        let handle = devices.add(Transport::Mmio, Options::split(), device);
        before(&handle);
        let (mut mmio, mut timers) = (MmioBus::new(), DeviceTimers::new());
        let mut pci = PciHost::new(Arc::new(PowerSignal::new()));
        let windows = devices.attach(&chip, &memory, &mut mmio, &mut pci, &mut timers);
        let window = VirtioMmio {
            base: Gpa(BASE),
            gsi: layout::FREE_GSIS[0],
        };
        let found = Found {
            windows: Vec::from([window]),
            topology: None,
        };
        assert_eq!(windows, Ok(found));
        Self {
            wishes,
            handle,
            mmio,
            timers,
            lapics,
            host,
        }
    }

    fn write(&self, register: u64, value: u32) {
        self.mmio.write(BASE + register, &value.to_le_bytes());
    }

    /// Does what a driver does until DRIVER_OK, and lets the device look at its backend.
    fn start(&self) {
        self.write(0x70, 1 | 2);
        self.write(0x24, 1);
        self.write(0x20, 1); // VERSION_1
        self.write(0x70, 1 | 2 | 8);
        self.write(0x38, 4);
        for (register, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xA0, 0x3000)] {
            self.write(register, address);
        }
        self.write(0x44, 1);
        self.write(0x70, 1 | 2 | 8 | 4);
        assert_eq!(self.timers.next_deadline(), Some(AT_ONCE));
        self.timers.poll(self.host.now());
        assert_eq!(self.polled(), 1);
        assert_eq!(self.timers.next_deadline(), None);
        self.requested();
    }

    fn notify(&self) {
        self.write(0x50, 0);
    }

    fn polled(&self) -> usize {
        self.wishes.polled.load(Ordering::Relaxed)
    }

    /// Whether the loop of vCPU 0 was told to look at its timers.
    fn requested(&self) -> bool {
        let requests = self.lapics[0].requests();
        requests.fetch_and(!request::DEVICE_TIMERS, Ordering::Relaxed) & request::DEVICE_TIMERS != 0
    }
}

#[test]
fn a_device_with_nothing_to_do_has_no_deadline() {
    let bench = Bench::new(|_| {});
    assert_eq!(bench.timers.next_deadline(), None);
    bench.start();
    bench.notify();
    assert_eq!(bench.timers.next_deadline(), None);
    assert!(!bench.requested());
}

#[test]
fn what_a_notification_leaves_to_do_gets_a_deadline() {
    let bench = Bench::new(|_| {});
    bench.start();
    *bench.wishes.after_process.lock() = Some(Ok(Next::At(5_000_000_000)));
    bench.notify();
    assert_eq!(bench.timers.next_deadline(), Some(5_000_000_000));
    assert!(bench.requested());
    bench.timers.poll(4_999_999_999);
    assert_eq!(bench.polled(), 1);
    bench.wishes.after_poll.lock().push(Next::At(6_000_000_000));
    bench.timers.poll(5_000_000_000);
    assert_eq!(bench.polled(), 2);
    assert_eq!(bench.timers.next_deadline(), Some(6_000_000_000));
}

#[test]
fn a_device_that_has_more_to_do_is_polled_at_once() {
    let bench = Bench::new(|_| {});
    bench.start();
    *bench.wishes.after_process.lock() = Some(Ok(Next::Again));
    bench.notify();
    assert!(bench.requested());
    *bench.wishes.after_process.lock() = None;
    let now = bench.host.now();
    *bench.wishes.after_poll.lock() = Vec::from([Next::Idle, Next::Again]);
    bench.timers.poll(now);
    assert!(bench.requested());
    bench.timers.poll(now);
    assert!(!bench.requested());
    assert_eq!(bench.timers.next_deadline(), None);
    assert_eq!(bench.polled(), 3);
}

#[test]
fn a_wake_is_not_lost() {
    // Before there is a device to wake.
    let bench = Bench::new(DeviceHandle::wake);
    assert_eq!(bench.timers.next_deadline(), Some(AT_ONCE));
    bench.timers.poll(bench.host.now());
    assert_eq!(bench.timers.next_deadline(), None);
    bench.start();
    bench.handle.wake();
    assert!(bench.requested());
    // The device's own wish replaces the deadline, but not the wake.
    *bench.wishes.after_process.lock() = Some(Ok(Next::At(u64::MAX - 1)));
    bench.notify();
    assert_eq!(bench.timers.next_deadline(), Some(AT_ONCE));
    bench.timers.poll(bench.host.now());
    assert_eq!(bench.polled(), 2);
    assert_eq!(bench.timers.next_deadline(), None);
}

#[test]
fn a_fault_is_seen_by_the_handle_until_the_driver_resets() {
    let bench = Bench::new(|_| {});
    bench.start();
    assert_eq!(bench.handle.fault(), None);
    let error = DeviceError::Malformed("test");
    *bench.wishes.after_process.lock() = Some(Err(error));
    bench.notify();
    let fault = bench.handle.fault();
    assert!(matches!(fault, Some(Fault::Device { queue: 0, error: e }) if e == error));
}

#[test]
fn devices_beyond_the_interrupts_share_them_and_a_full_bus_refuses() {
    let (_, chip, _) = machine(1);
    let attach = |transport, count| {
        let mut devices = Devices::new();
        for _ in 0..count {
            let device = Box::new(Wisher(Arc::default()));
            devices.add(transport, Options::default(), device);
        }
        let mut pci = PciHost::new(Arc::new(PowerSignal::new()));
        let (mut mmio, mut timers) = (MmioBus::new(), DeviceTimers::new());
        devices.attach(&chip, &GuestRam::new(), &mut mmio, &mut pci, &mut timers)
    };
    let windows = attach(Transport::Mmio, 12).unwrap().windows;
    assert_eq!(windows[9].gsi, windows[0].gsi);
    assert_eq!(windows[11].base.0, BASE + 0xB000);
    // Device 0 is the bridge.
    assert_eq!(attach(Transport::Pci, 31), Ok(Found::default()));
    assert_eq!(attach(Transport::Pci, 32), Err(AttachError::NoSlot));
}

/// What is attached of a plan that `plan` makes.
fn attached(plan: impl FnOnce(&mut Devices<GuestRam>)) -> Result<Found, AttachError> {
    let (_, chip, _) = machine(1);
    let mut devices = Devices::new();
    plan(&mut devices);
    let (mut mmio, mut timers) = (MmioBus::new(), DeviceTimers::new());
    let mut pci = PciHost::new(Arc::new(PowerSignal::new()));
    devices.attach(&chip, &GuestRam::new(), &mut mmio, &mut pci, &mut timers)
}

#[test]
fn acpi_is_told_what_is_behind_the_iommu_and_nothing_else() {
    let device = || Box::new(Wisher(Arc::default()));
    let found = attached(|devices| {
        let (_, iommu) = devices.add_iommu(Transport::Pci, Options::split());
        devices.add(Transport::Pci, Options::split(), device());
        devices.add_behind(&iommu, Transport::Pci, Options::split(), device());
        devices.add_behind(&iommu, Transport::Mmio, Options::split(), device());
        assert_eq!(iommu.state().refused(), 0);
    })
    .unwrap();
    let topology = VirtioTopology {
        iommu: TopologyPlace::Pci(1 << 3),
        endpoints: Vec::from([
            TopologyPlace::Pci(3 << 3),
            TopologyPlace::Mmio(layout::VIRTIO_MMIO),
        ]),
    };
    assert_eq!(found.topology, Some(topology));
    assert_eq!(found.windows.len(), 1);
}

#[test]
fn a_device_behind_another_machines_iommu_is_refused() {
    let (_, iommu) = Devices::<GuestRam>::new().add_iommu(Transport::Pci, Options::split());
    let refused = attached(|devices| {
        let device = Box::new(Wisher(Arc::default()));
        devices.add_behind(&iommu, Transport::Pci, Options::split(), device);
    });
    assert_eq!(refused, Err(AttachError::NoIommu));
}

#[test]
fn a_refused_access_wakes_the_iommu() {
    let mut devices = Devices::<GuestRam>::new();
    let (handle, iommu) = devices.add_iommu(Transport::Pci, Options::split());
    iommu.state().add_endpoint(8);
    assert!(iommu.state().translate(8, 0x1000, 8, false).is_ok());
    assert!(!handle.take_wake());
    assert!(iommu.state().translate(9, 0x1000, 8, true).is_ok());
    let unmapped = testudo_virtio::device::IommuMemory::new(GuestRam::new(), iommu.0.clone(), 8);
    assert!(unmapped.load_u32(Gpa(0x1000)).is_err());
    assert!(!handle.take_wake(), "no memory is not the IOMMU's refusal");
}
