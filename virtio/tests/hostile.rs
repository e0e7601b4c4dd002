//! Drivers that break the rules of transports and devices: what each gets, and that nothing else
//! suffers.

#[macro_use]
mod support;

use std::sync::Arc;

use support::zoo::{NoPages, Random, zoo};
use support::{Connect, GSI, Interrupts, MmioGuest, PciGuest, RAM_BASE, RawDriver, alloc, memory};
use testudo_arch::bus::BusDevice;
use testudo_arch::memory::GuestRam;
use testudo_arch::pci::PciFunction;
use testudo_arch::{Gpa, GuestMemory, MemoryFault};
use testudo_virtio::backend::MemoryImage;
use testudo_virtio::device::{Balloon, Blk, BlkOptions, Rng};
use testudo_virtio::driver::{DriverQueue, ring_bytes};
use testudo_virtio::queue::{ActivateError, QueueError};
use testudo_virtio::transport::{Fault, Mmio, Options};
use testudo_virtio::{Device, DeviceError, Features, Next, Segment};
use virtio_drivers::transport::DeviceStatus;

in_all_ways! {
    features_are_final
    features_that_were_not_offered_are_refused
    an_iommu_must_be_agreed_to
    status_bits_cannot_be_cleared
    queues_in_use_cannot_be_changed
    queues_wait_for_the_features
    a_ring_that_overlaps_itself_breaks_the_device
    nothing_happens_before_the_driver_is_ready
    a_buffer_outside_memory_breaks_only_its_device
    a_reset_forgets_chains_that_are_held
    a_request_without_room_for_an_answer_breaks_the_device
    only_what_was_offered_is_written
    every_device_survives_any_configuration_access
    every_device_survives_any_request
}

fn disk() -> Blk<MemoryImage<Vec<u8>>> {
    Blk::new(MemoryImage(vec![0x11; 64 << 10]), BlkOptions::default())
}

fn read_request(sector: u8) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[8] = sector;
    bytes
}

/// Whether a read of one sector succeeds.
fn works<T: Connect>(driver: &mut RawDriver<T>) -> bool {
    let answer = driver.exchange(0, &read_request(0), 513);
    answer.is_some_and(|bytes| bytes.len() == 513 && bytes[512] == 0)
}

fn features_are_final<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(disk(), packed);
    // The other format, and no indirect descriptors: ignored after FEATURES_OK.
    let other = driver.features ^ Features::RING_PACKED ^ Features::INDIRECT_DESC;
    driver.guest.write_driver_features(other.bits());
    assert!(works(&mut driver));
    // Nor does it count for a queue that is set up later.
    driver.guest.reset_queue(0);
    driver.set_up(0, packed);
    assert!(works(&mut driver));
}

fn features_that_were_not_offered_are_refused<T: Connect>(packed: bool) {
    let mut guest = T::connect(disk());
    let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    let base = if packed {
        Features::RING_PACKED
    } else {
        Features::empty()
    };
    let good = base | Features::VERSION_1;
    for (features, accepted) in [
        (good, true),
        (base, false),
        (good | Features::bit(60), false),
        (good | Features::SR_IOV, false),
        (Features::all(), false),
    ] {
        guest.set_status(DeviceStatus::empty());
        guest.set_status(begun);
        guest.write_driver_features(features.bits());
        guest.set_status(begun | DeviceStatus::FEATURES_OK);
        let status = guest.get_status();
        assert_eq!(
            status.contains(DeviceStatus::FEATURES_OK),
            accepted,
            "{features:?}"
        );
        // Nor does the device start without agreement.
        guest.set_status(begun | DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
        let status = guest.get_status();
        assert_eq!(status.contains(DeviceStatus::DRIVER_OK), accepted);
    }
}

fn an_iommu_must_be_agreed_to<T: Connect>(_: bool) {
    let options = Options {
        access_platform: true,
        ..Options::default()
    };
    let mut guest = T::connect_with(Box::new(disk()), options);
    assert_ne!(
        guest.read_device_features() & Features::ACCESS_PLATFORM.bits(),
        0
    );
    for (features, accepted) in [
        (Features::VERSION_1, false),
        (Features::VERSION_1 | Features::ACCESS_PLATFORM, true),
    ] {
        guest.set_status(DeviceStatus::empty());
        guest.write_driver_features(features.bits());
        guest.set_status(DeviceStatus::FEATURES_OK);
        let status = guest.get_status();
        assert_eq!(status.contains(DeviceStatus::FEATURES_OK), accepted);
    }
}

fn status_bits_cannot_be_cleared<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(disk(), packed);
    let before = driver.guest.get_status();
    driver.guest.set_status(DeviceStatus::ACKNOWLEDGE);
    assert_eq!(driver.guest.get_status(), before);
    // Nor can the driver say that the device needs a reset.
    driver
        .guest
        .set_status(before | DeviceStatus::DEVICE_NEEDS_RESET);
    assert_eq!(driver.guest.get_status(), before);
    assert!(works(&mut driver));
    // A driver that gives up is not served.
    driver.guest.set_status(before | DeviceStatus::FAILED);
    assert!(!works(&mut driver));
}

fn queues_in_use_cannot_be_changed<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(disk(), packed);
    let elsewhere = alloc(0x10000).0;
    let parts = (elsewhere, elsewhere + 0x4000, elsewhere + 0x8000);
    driver.guest.queue_set(0, 16, parts.0, parts.1, parts.2);
    // On PCI this reads the size as it is now.
    assert_eq!(driver.guest.max_queue_size(0), 256);
    assert!(works(&mut driver));
    let mut all = vec![0; 0x10000];
    memory().read(Gpa(elsewhere), &mut all).unwrap();
    assert!(
        all.iter().all(|&b| b == 0),
        "nothing was written to the other ring"
    );
}

fn queues_wait_for_the_features<T: Connect>(_: bool) {
    let mut guest = T::connect(disk());
    guest.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    let ring = alloc(ring_bytes(256)).0;
    guest.queue_set(0, 256, ring, ring + 0x1000, ring + 0x1400);
    assert!(!guest.queue_used(0));
    // Queues that do not exist neither.
    assert_eq!(guest.max_queue_size(1), 0);
    assert_eq!(guest.max_queue_size(0xFFFF), 0);
    guest.queue_set(0xFFFF, 256, ring, ring + 0x1000, ring + 0x1400);
    assert!(!guest.queue_used(0xFFFF));
}

/// Brings a device up to FEATURES_OK.
fn negotiated<T: Connect>(device: impl Device<GuestRam> + 'static, packed: bool) -> T {
    let mut guest = T::connect(device);
    let mut features = Features::VERSION_1;
    features.set(Features::RING_PACKED, packed);
    guest.write_driver_features(features.bits());
    guest.set_status(DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK);
    guest
}

fn a_ring_that_overlaps_itself_breaks_the_device<T: Connect>(packed: bool) {
    let mut guest = negotiated::<T>(disk(), packed);
    let ring = alloc(ring_bytes(256)).0;
    guest.queue_set(0, 256, ring, ring + 0x1000, ring);
    assert!(!guest.queue_used(0));
    assert!(
        guest
            .get_status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );
    let Some(Fault::Activate { queue: 0, error }) = guest.fault() else {
        panic!("{:?}", guest.fault());
    };
    assert!(matches!(error, ActivateError::Overlap { .. }), "{error}");
    // A reset makes it whole.
    let sizes = [256];
    let mut driver = RawDriver::start(guest, &sizes, packed, |offered| offered);
    assert!(works(&mut driver));
}

fn nothing_happens_before_the_driver_is_ready<T: Connect>(packed: bool) {
    let mut guest = negotiated::<T>(disk(), packed);
    let mut queue = DriverQueue::new(alloc(ring_bytes(256)), 256, packed);
    let config = *queue.config();
    let (table, driver) = (config.descriptors.0, config.driver.0);
    guest.queue_set(0, 256, table, driver, config.device.0);
    let (header, answer) = (alloc(16), alloc(513));
    let readable = [Segment {
        gpa: header,
        len: 16,
    }];
    let writable = [Segment {
        gpa: answer,
        len: 513,
    }];
    queue
        .offer(&memory(), &readable, &writable, None)
        .unwrap()
        .unwrap();
    for number in [0, 1, 77] {
        // On PCI only the queues that exist have an address.
        if number == 0 || guest.max_queue_size(number) > 0 {
            guest.notify(number);
        }
    }
    guest.poll(0);
    assert_eq!(queue.take_used(&memory()), Ok(None));
    // What was lost is made up for when the driver is ready.
    guest.set_status(guest.get_status() | DeviceStatus::DRIVER_OK);
    assert_eq!(
        queue.take_used(&memory()).unwrap().map(|(_, len)| len),
        Some(513)
    );
}

fn a_buffer_outside_memory_breaks_only_its_device<T: Connect>(packed: bool) {
    let mut other = RawDriver::<T>::new(disk(), packed);
    for bad in [
        // Nowhere; the device's own registers; over the end of memory.
        Gpa(0),
        Gpa(support::BAR_BASE),
        Gpa(RAM_BASE + support::RAM_SIZE - 512),
        Gpa(u64::MAX - 4096),
    ] {
        let mut driver = RawDriver::<T>::new(disk(), packed);
        let (header, status) = (alloc(16), alloc(1));
        let readable = [Segment {
            gpa: header,
            len: 16,
        }];
        let writable = [
            Segment {
                gpa: bad,
                len: 1024,
            },
            Segment {
                gpa: status,
                len: 1,
            },
        ];
        driver.offer(0, &readable, &writable);
        driver.guest.notify(0);
        assert!(driver.needs_reset());
        let Some(Fault::Device { queue: 0, error }) = driver.guest.fault() else {
            panic!("{:?}", driver.guest.fault());
        };
        assert!(matches!(error, DeviceError::Memory(_)), "{error}");
        // The driver is told with a configuration interrupt, and then nothing more is done.
        assert!(driver.guest.interrupts().level(GSI));
        assert_eq!(driver.guest.ack_interrupt().bits() & 2, 2);
        assert!(!works(&mut driver));
        assert_eq!(driver.guest.poll(0), Next::Idle);
        assert!(works(&mut other));
        let guest = driver.guest.clone();
        let mut driver = RawDriver::start(guest, &[256], packed, |offered| offered);
        assert_eq!(driver.guest.fault(), None);
        assert!(works(&mut driver));
    }
}

fn a_reset_forgets_chains_that_are_held<T: Connect>(packed: bool) {
    let (balloon, control) = Balloon::new(NoPages);
    let mut driver = RawDriver::<T>::new(balloon, packed);
    let stats = Segment {
        gpa: alloc(64),
        len: 10,
    };
    driver.offer(2, &[stats], &[]);
    driver.guest.notify(2);
    // The device holds the buffer. Reset, start again, ask: the new queue must not see it.
    control.request_stats();
    let guest = driver.guest.clone();
    let mut driver = RawDriver::start(guest, &[128; 5], packed, |offered| offered);
    driver.guest.poll(0);
    assert_eq!(driver.take_used(2), None);
    driver.offer(2, &[stats], &[]);
    driver.guest.notify(2);
    driver.guest.poll(1);
    assert!(driver.take_used(2).is_some());
    // The same for a reset of the queue alone.
    driver.offer(2, &[stats], &[]);
    driver.guest.notify(2);
    driver.guest.reset_queue(2);
    driver.set_up(2, packed);
    control.request_stats();
    driver.guest.poll(2);
    assert_eq!(driver.take_used(2), None);
    assert!(!driver.needs_reset());
}

fn a_request_without_room_for_an_answer_breaks_the_device<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(disk(), packed);
    assert_eq!(driver.exchange(0, &read_request(0), 0), None);
    assert!(driver.needs_reset());
    let Some(Fault::Device { queue: 0, error }) = driver.guest.fault() else {
        panic!("{:?}", driver.guest.fault());
    };
    assert!(matches!(error, DeviceError::Malformed(_)), "{error}");
    let mut driver = RawDriver::<T>::new(disk(), packed);
    assert_eq!(driver.exchange(0, &[0; 15], 513), None);
    let short = DeviceError::Short(1);
    assert_eq!(
        driver.guest.fault(),
        Some(Fault::Device {
            queue: 0,
            error: short
        })
    );
}

fn only_what_was_offered_is_written<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(disk(), packed);
    let ram = memory();
    let page = alloc(3 * 4096).0;
    ram.write(Gpa(page), &[0xEE; 3 * 4096]).unwrap();
    let header = alloc(16);
    let part = |at: u64, len: u32| Segment {
        gpa: Gpa(page + at),
        len,
    };
    // The last one is the status.
    let writable = [
        part(100, 500),
        part(1000, 500),
        part(5000, 24),
        part(9000, 1),
    ];
    driver.offer(
        0,
        &[Segment {
            gpa: header,
            len: 16,
        }],
        &writable,
    );
    driver.guest.notify(0);
    assert_eq!(driver.take_used(0).map(|(_, len)| len), Some(1025));
    let mut bytes = vec![0; 3 * 4096];
    ram.read(Gpa(page), &mut bytes).unwrap();
    for (i, &byte) in bytes.iter().enumerate() {
        let at = page + i as u64;
        let offered = |s: &&Segment| at >= s.gpa.0 && at < s.gpa.0 + u64::from(s.len);
        let expected = match writable.iter().position(|s| offered(&s)) {
            Some(3) => 0,
            Some(_) => 0x11,
            None => 0xEE,
        };
        assert_eq!(byte, expected, "at {i}");
    }
}

fn every_device_survives_any_configuration_access<T: Connect>(packed: bool) {
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    for device in zoo() {
        let sizes = device.queues().to_vec();
        let guest = T::connect_with(device, Options::default());
        let driver = RawDriver::start(guest, &sizes, packed, |offered| offered);
        for _ in 0..2000 {
            let value = random.next();
            let offset = random.next() % 0x180;
            let width = 1 << (random.next() % 4);
            driver
                .guest
                .poke_config(offset, &value.to_le_bytes()[..width]);
            driver.guest.peek_config(offset, &mut [0; 8][..width]);
        }
        driver.guest.poll(0);
        assert_eq!(driver.guest.fault(), None);
        // Back from a reset, it is as new.
        let driver = RawDriver::start(driver.guest.clone(), &sizes, packed, |offered| offered);
        assert!(!driver.needs_reset());
    }
}

fn every_device_survives_any_request<T: Connect>(packed: bool) {
    let mut random = Random(0xFEDC_BA98_7654_3211);
    for kind in 0..zoo::<GuestRam>().len() {
        let device = zoo().swap_remove(kind);
        let sizes = device.queues().to_vec();
        let guest = T::connect_with(device, Options::default());
        let mut driver = RawDriver::start(guest, &sizes, packed, |offered| offered);
        let area = alloc(0x4000).0;
        for _ in 0..3000 {
            let queue = (random.next() % sizes.len() as u64) as u16;
            while driver.take_used(queue).is_some() {}
            let bytes: Vec<u8> = (0..64)
                .map(|_| match random.next() % 3 {
                    0 => random.next() as u8,
                    1 => (random.next() % 8) as u8,
                    _ => 0,
                })
                .collect();
            memory().write(Gpa(area), &bytes).unwrap();
            let mut segments = |most: u64, from: u64| -> Vec<Segment> {
                (0..random.next() % most)
                    .map(|_| Segment {
                        gpa: Gpa(from + random.next() % 32),
                        len: 1 + (random.next() % 700) as u32,
                    })
                    .collect()
            };
            let (readable, writable) = (segments(4, area), segments(4, area + 0x1000));
            let ram = memory();
            let ring = &mut driver.queues[usize::from(queue)];
            ring.offer(&ram, &readable, &writable, None).unwrap();
            driver.guest.notify(queue);
            driver.guest.poll(random.next() % 1000);
            if driver.needs_reset() {
                assert!(driver.guest.fault().is_some());
                let guest = driver.guest.clone();
                driver = RawDriver::start(guest, &sizes, packed, |offered| offered);
            }
        }
    }
}

/// A driver on another processor that makes chains available as fast as the device takes them:
/// the available index is always ahead.
#[derive(Clone)]
struct Endless {
    ram: GuestRam,
    index: Gpa,
}

impl GuestMemory for Endless {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.ram.read(gpa, buf)
    }
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        self.ram.write(gpa, data)
    }
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        if gpa == self.index {
            let ahead = self.ram.load_u16(gpa)?.wrapping_add(1);
            self.ram.store_u16(gpa, ahead)?;
        }
        self.ram.load_u16(gpa)
    }
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.ram.store_u16(gpa, value)
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.ram.load_u32(gpa)
    }
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.ram.store_u32(gpa, value)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.ram.load_u64(gpa)
    }
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.ram.store_u64(gpa, value)
    }
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        self.ram.compare_exchange_u32(gpa, current, new)
    }
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        self.ram.compare_exchange_u64(gpa, current, new)
    }
    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        self.ram.contains(gpa, len)
    }
}

#[test]
fn a_notification_brings_a_bounded_amount_of_work() {
    let ram = memory();
    let mut queue = DriverQueue::new(alloc(ring_bytes(64)), 64, false);
    let config = *queue.config();
    let index = config.driver.wrapping_add(2);
    // One chain, whose head all 64 places of the ring name.
    let buffer = [Segment {
        gpa: alloc(64),
        len: 16,
    }];
    queue.offer(&ram, &[], &buffer, None).unwrap().unwrap();
    let memory = Endless { ram, index };
    let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = calls.clone();
    let source = move |buf: &mut [u8]| {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        buf.len()
    };
    let interrupts = Arc::new(Interrupts::default());
    let options = Options::split();
    let mut mmio = Mmio::new(Box::new(Rng::new(source)), memory, options, interrupts, 5);
    let mut write = |register: u64, value: u32| mmio.write(register, &value.to_le_bytes());
    for (register, value) in [
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 64),
    ] {
        write(register, value);
    }
    write(0x80, config.descriptors.0 as u32);
    write(0x90, config.driver.0 as u32);
    write(0xA0, config.device.0 as u32);
    write(0x44, 1);
    write(0x70, 15);
    for _ in 0..10 {
        let before = calls.load(std::sync::atomic::Ordering::Relaxed);
        mmio.write(0x50, &[0; 4]);
        let done = calls.load(std::sync::atomic::Ordering::Relaxed) - before;
        assert!((1..=64).contains(&done), "{done}");
        // What is left is for the next poll.
        assert_eq!(mmio.poll(0), Next::Again);
    }
    assert_eq!(mmio.fault(), None);
}

#[test]
fn a_jumping_index_has_its_name() {
    let mut driver = RawDriver::<MmioGuest>::new(disk(), false);
    let index = driver.queues[0].config().driver.wrapping_add(2);
    memory().store_u16(index, 999).unwrap();
    driver.guest.write(0x50, 0);
    assert!(driver.needs_reset());
    let error = DeviceError::Queue(QueueError::AvailableIndex {
        index: 999,
        next: 0,
        size: 256,
    });
    assert_eq!(
        driver.guest.fault(),
        Some(Fault::Device { queue: 0, error })
    );
    assert!(!works(&mut driver));
}

#[test]
fn mmio_registers_survive_anything() {
    let mut random = Random(77);
    for device in zoo() {
        let guest = MmioGuest::connect_with(device, Options::default());
        for _ in 0..20_000 {
            let offset = random.next() % 0x200;
            let value = match random.next() % 4 {
                0 => random.next(),
                1 => RAM_BASE + (random.next() % 0x100) * 0x1000,
                2 => random.next() % 16,
                _ => u64::MAX,
            };
            let width = 1 << (random.next() % 4);
            let mut mmio = guest.device.borrow_mut();
            mmio.write(offset, &value.to_le_bytes()[..width]);
            mmio.read(offset, &mut [0; 8][..width]);
        }
        guest.write(0x70, 0);
        assert_eq!(guest.read(0x70), 0);
    }
}

#[test]
fn pci_registers_survive_anything() {
    let mut random = Random(99);
    for device in zoo() {
        let guest = PciGuest::connect_with(device, Options::default());
        for _ in 0..20_000 {
            let value = match random.next() % 4 {
                0 => random.next(),
                1 => RAM_BASE + (random.next() % 0x100) * 0x1000,
                2 => random.next() % 16,
                _ => u64::MAX,
            };
            let width = 1 << (random.next() % 4);
            let bytes = value.to_le_bytes();
            let mut pci = guest.device.borrow_mut();
            if random.next().is_multiple_of(8) {
                let width = width.min(4);
                let offset = (random.next() % 0x140) as u16 & !(width as u16 - 1);
                pci.config_write(offset, &bytes[..width]);
                pci.config_read(offset, &mut [0; 4][..width]);
            } else {
                let offset = (random.next() % 8) * 0x1000 + random.next() % 0x80;
                pci.bar_write(0, offset, &bytes[..width]);
                pci.bar_read(0, offset, &mut [0; 8][..width]);
            }
            let _ = pci.windows();
        }
    }
}
