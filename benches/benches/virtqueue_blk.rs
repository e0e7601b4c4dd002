//! The block device on a memory image, against its limit: the same chains popped and the same
//! bytes copied, with nothing decided.
//!
//! Measured as the queues were: 59 µs for 64 reads against a limit of 54 on split rings (91 %), 53
//! against 43 on packed ones (81 %).
#![allow(unsafe_code, reason = "guest memory is mapped once, below")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use testudo_arch::bus::BusDevice;
use testudo_arch::irq::{InterruptSink, Msi};
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::backend::MemoryImage;
use testudo_virtio::device::{Blk, BlkOptions};
use testudo_virtio::driver::DriverQueue;
use testudo_virtio::queue::Bounds;
use testudo_virtio::transport::{Mmio, Options};
use testudo_virtio::{Features, Segment};

const MEMORY: u64 = 16 << 20;
const IMAGE: u64 = 256 << 20;
const RING: Gpa = Gpa(0);
const HEADERS: u64 = 0x1_0000;
const STATUS: u64 = 0x2_0000;
const DATA: u64 = 1 << 20;
const QUEUE: u16 = 256;
/// Three descriptors each.
const REQUESTS: u64 = 64;

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn set_level(&self, _: u32, _: bool) {}
    fn send_msi(&self, _: Msi) {}
}

struct Guest {
    ram: GuestRam,
    _bytes: Vec<u64>,
    random: u64,
}

impl Guest {
    fn new() -> Self {
        let mut bytes = vec![0u64; (MEMORY / 8) as usize];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives as long as the memory made of it, and is used through it only.
        unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), MEMORY, true) }.unwrap();
        Self {
            ram,
            _bytes: bytes,
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    /// The place of the next read, in blocks of 4 KiB.
    fn next_block(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % (IMAGE / 4096)
    }

    /// Makes 64 random reads available.
    fn offer(&mut self, driver: &mut DriverQueue) {
        for i in 0..REQUESTS {
            let header = HEADERS + 16 * i;
            let sector = self.next_block() * 8;
            self.ram.store_u64(Gpa(header), 0).unwrap();
            self.ram.store_u64(Gpa(header + 8), sector).unwrap();
            let part = |gpa, len| Segment { gpa: Gpa(gpa), len };
            let writable = [part(DATA + 4096 * i, 4096), part(STATUS + i, 1)];
            let offered = driver.offer(&self.ram, &[part(header, 16)], &writable, None);
            offered.unwrap().unwrap();
        }
    }
}

fn image() -> Vec<u8> {
    // Every page has contents of its own, or reads of the one zero page would be measured.
    (0..IMAGE / 8).flat_map(|i| i.to_le_bytes()).collect()
}

fn take_back(guest: &Guest, driver: &mut DriverQueue) {
    let mut count = 0;
    while driver.take_used(&guest.ram).unwrap().is_some() {
        count += 1;
    }
    assert_eq!(count, REQUESTS);
}

fn random_reads(c: &mut Criterion) {
    let mut group = c.benchmark_group("4 KiB random reads");
    group.throughput(Throughput::Elements(REQUESTS));
    for packed in [false, true] {
        let label = if packed { "packed" } else { "split" };
        let mut features = Features::VERSION_1;
        features.set(Features::RING_PACKED, packed);

        let mut guest = Guest::new();
        let disk = Blk::new(MemoryImage(image()), BlkOptions::default());
        let options = Options::default();
        let interrupts = Arc::new(NoInterrupts);
        let mut mmio = Mmio::new(Box::new(disk), guest.ram.clone(), options, interrupts, 5);
        let mut driver = DriverQueue::new(RING, QUEUE, packed);
        let mut write = |register: u64, value: u32| mmio.write(register, &value.to_le_bytes());
        for (register, value) in [(0x70, 3), (0x24, 0), (0x20, 0), (0x24, 1)] {
            write(register, value);
        }
        write(0x20, features.window(1));
        write(0x70, 11);
        write(0x30, 0);
        write(0x38, QUEUE.into());
        write(0x80, driver.config().descriptors.0 as u32);
        write(0x90, driver.config().driver.0 as u32);
        write(0xA0, driver.config().device.0 as u32);
        write(0x44, 1);
        write(0x70, 15);
        group.bench_function(format!("device, {label}"), |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    guest.offer(&mut driver);
                    let start = Instant::now();
                    mmio.write(0x50, &0u32.to_le_bytes());
                    total += start.elapsed();
                    take_back(&guest, &mut driver);
                }
                total
            });
        });
        assert_eq!(mmio.fault(), None);
        drop(mmio);

        let mut guest = Guest::new();
        let image = image();
        let mut driver = DriverQueue::new(RING, QUEUE, packed);
        let bounds = Bounds::for_queue(QUEUE);
        let mut queue = driver
            .config()
            .activate(features, bounds, &guest.ram)
            .unwrap();
        group.bench_function(format!("limit, {label}"), |b| {
            b.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    guest.offer(&mut driver);
                    let places: Vec<_> = (0..REQUESTS).map(|_| guest.next_block() * 4096).collect();
                    let start = Instant::now();
                    for &place in &places {
                        let chain = queue.pop(&guest.ram).unwrap().unwrap();
                        let to = chain.writable()[0].gpa;
                        let from = &image[place as usize..place as usize + 4096];
                        guest.ram.write(to, from).unwrap();
                        let token = chain.into_token();
                        queue.complete(&guest.ram, token, 4097).unwrap();
                    }
                    black_box(queue.publish(&guest.ram).unwrap());
                    total += start.elapsed();
                    take_back(&guest, &mut driver);
                }
                total
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = random_reads
}
criterion_main!(benches);
