//! Taking, walking and returning chains: our queues, split and packed, and rust-vmm's
//! `virtio-queue` over `vm-memory`, on the same rings in the same memory.
//!
//! Rates are per chain, or per descriptor where a row says so. A driver fills the rings before
//! each measured pass.
//!
//! On a virtual machine with two cores of a Xeon, everything else stopped, in µs for 128 chains (or
//! one of 128 descriptors), and our instructions for each as callgrind counts them. Times drift by
//! some 10 % between rows, counts do not:
//!
//! | row | split | batched | packed | batched | rust-vmm | drained |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | one-descriptor chains | 3.3 | 3.3 | 3.1 | 1.8 | 13.2 | 13.5 |
//! | instructions | 259 | 208 | 236 | 200 | | |
//! | a chain of 128 | 0.86 | 0.77 | 0.66 | 0.67 | 3.5 | 3.6 |
//! | instructions | 39 | 41 | 41 | 44 | | |
//! | indirect chains of 1 | 4.4 | 4.2 | 3.6 | 3.7 | 19.4 | 14.1 |
//! | instructions | 305 | 256 | 283 | 252 | | |
//! | indirect chains of 8 | 7.0 | 8.1 | 6.9 | 7.1 | 31.9 | 36.7 |
//! | instructions | 557 | 515 | 514 | 476 | | |
//! | returning alone | 1.0 | | 0.56 | | 5.0 | |
//! | instructions | 67 | | 55 | | | |
//!
//! In a packed ring the next descriptor of a chain is known before the one before it has arrived,
//! so it takes less time for as many instructions.
#![allow(unsafe_code, reason = "guest memory is mapped once, below")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory as _};
use testudo_virtio::driver::{DriverQueue, ring_bytes};
use testudo_virtio::queue::{Batch, Bounds};
use testudo_virtio::{Features, Queue, Segment};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: u64 = 64 << 20;
/// Rings that one pass goes through, so that reading the clock costs little of it. Few enough that
/// all of them stay in the first-level cache, in either format.
const RINGS: u64 = 4;
const QUEUE: u16 = 256;
const CHAINS: u64 = 128;
/// The room for a ring with its indirect tables.
const STRIDE: u64 = 1 << 20;
const TABLES: u64 = 0x1_0000;
const BUFFERS: u64 = 32 << 20;

/// The memory as both libraries see it.
struct Guest {
    peer: GuestMemoryMmap<()>,
    ours: GuestRam,
}

impl Guest {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), MEMORY as usize)];
        let peer = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let pointer = peer.get_host_address(GuestAddress(0)).unwrap();
        let mut ours = GuestRam::new();
        // SAFETY: the mapping lives as long as `peer`, which lives as long as `ours`; it is used
        // through the two only.
        unsafe { ours.add(Gpa(0), pointer, MEMORY, true) }.unwrap();
        Self { peer, ours }
    }
}

/// What the rings hold: so many chains of so many descriptors, in tables of their own or not.
#[derive(Clone, Copy)]
struct Shape {
    chains: u64,
    descriptors: u64,
    indirect: bool,
}

/// A ring of one shape, with the driver that fills it again and again.
struct Ring {
    driver: DriverQueue,
    base: Gpa,
    packed: bool,
    shape: Shape,
}

impl Ring {
    fn new(guest: &Guest, index: u64, packed: bool, shape: Shape) -> Self {
        let base = Gpa(index * STRIDE);
        let bytes = ring_bytes(QUEUE) as usize;
        guest.ours.write(base, &vec![0; bytes]).unwrap();
        Self {
            driver: DriverQueue::new(base, QUEUE, packed),
            base,
            packed,
            shape,
        }
    }

    /// Takes back what the device returned, and offers all chains anew.
    fn refill(&mut self, guest: &Guest) {
        while self.driver.take_used(&guest.ours).unwrap().is_some() {}
        let shape = self.shape;
        for chain in 0..shape.chains {
            let readable: Vec<_> = (0..shape.descriptors)
                .map(|i| Segment {
                    gpa: Gpa(BUFFERS + 0x1000 * (chain * shape.descriptors + i)),
                    len: 0x1000,
                })
                .collect();
            let at = self.base.0 + TABLES + 16 * shape.descriptors * chain;
            let table = shape.indirect.then_some(Gpa(at));
            let offered = self.driver.offer(&guest.ours, &readable, &[], table);
            offered.unwrap().unwrap();
        }
    }

    fn queue(&self, guest: &Guest) -> Queue {
        let mut features = Features::VERSION_1 | Features::INDIRECT_DESC;
        features.set(Features::RING_PACKED, self.packed);
        let config = self.driver.config();
        config
            .activate(features, Bounds::for_queue(QUEUE), &guest.ours)
            .unwrap()
    }

    fn peer_queue(&self) -> virtio_queue::Queue {
        let config = self.driver.config();
        let mut queue = virtio_queue::Queue::new(QUEUE).unwrap();
        queue.set_size(QUEUE);
        queue.set_desc_table_address(Some(config.descriptors.0 as u32), Some(0));
        queue.set_avail_ring_address(Some(config.driver.0 as u32), Some(0));
        queue.set_used_ring_address(Some(config.device.0 as u32), Some(0));
        queue.set_ready(true);
        queue
    }
}

/// Rings with the queues that serve them.
struct Bench<Q>(Vec<(Ring, Q)>);

impl<Q> Bench<Q> {
    fn new(guest: &Guest, packed: bool, shape: Shape, make: impl Fn(&Ring) -> Q) -> Self {
        let rings = (0..RINGS).map(|i| Ring::new(guest, i, packed, shape));
        Self(
            rings
                .map(|ring| (make(&ring), ring))
                .map(|(q, r)| (r, q))
                .collect(),
        )
    }

    /// Times `work` on rings that were just filled, `iterations` times. What `before` makes of a
    /// queue is not timed.
    fn time<T>(
        &mut self,
        guest: &Guest,
        iterations: u64,
        mut before: impl FnMut(&mut Q) -> T,
        mut work: impl FnMut(&mut Q, &mut T),
    ) -> Duration {
        let mut total = Duration::ZERO;
        let mut left = iterations;
        while left > 0 {
            let pass = left.min(RINGS) as usize;
            let mut prepared: Vec<T> = self.0[..pass]
                .iter_mut()
                .map(|(ring, queue)| {
                    ring.refill(guest);
                    before(queue)
                })
                .collect();
            let start = Instant::now();
            for ((_, queue), prepared) in self.0.iter_mut().zip(&mut prepared) {
                work(queue, prepared);
            }
            total += start.elapsed();
            left -= pass as u64;
        }
        total
    }
}

/// One chain after the other: taken, walked, returned; all shown at the end.
fn ours_one_by_one(guest: &Guest, queue: &mut Queue) {
    let memory = &guest.ours;
    while let Some(chain) = queue.pop(memory).unwrap() {
        for segment in chain.readable() {
            black_box(segment);
        }
        let token = chain.into_token();
        queue.complete(memory, token, 0x100).unwrap();
    }
    black_box(queue.publish(memory).unwrap());
}

fn ours_batched(guest: &Guest, queue: &mut Queue, batch: &mut Batch) {
    let memory = &guest.ours;
    while queue.pop_batch(memory, batch).unwrap() > 0 {
        for chain in batch.drain() {
            for segment in chain.readable() {
                black_box(segment);
            }
            queue.complete(memory, chain.into_token(), 0x100).unwrap();
        }
    }
    black_box(queue.publish(memory).unwrap());
}

/// As the peer's documentation has it.
fn peer(guest: &Guest, queue: &mut virtio_queue::Queue) {
    let memory = &guest.peer;
    while let Some(chain) = queue.iter(memory).unwrap().next() {
        let head = chain.head_index();
        for descriptor in chain {
            black_box(descriptor);
        }
        queue.add_used(memory, head, 0x100).unwrap();
    }
    black_box(queue.needs_notification(memory).unwrap());
}

/// The peer with the index read once for all chains, its fastest way.
fn peer_drained(guest: &Guest, queue: &mut virtio_queue::Queue) {
    let memory = &guest.peer;
    let mut heads = [0; QUEUE as usize];
    let mut count = 0;
    for chain in queue.iter(memory).unwrap() {
        heads[count] = chain.head_index();
        count += 1;
        for descriptor in chain {
            black_box(descriptor);
        }
    }
    for &head in &heads[..count] {
        queue.add_used(memory, head, 0x100).unwrap();
    }
    black_box(queue.needs_notification(memory).unwrap());
}

fn shapes(c: &mut Criterion) {
    let guest = Guest::new();
    let one = |chains, descriptors, indirect| Shape {
        chains,
        descriptors,
        indirect,
    };
    let rows = [
        ("one-descriptor chains", one(CHAINS, 1, false), CHAINS),
        (
            "128-descriptor chain, per descriptor",
            one(1, 128, false),
            128,
        ),
        ("indirect chains of 1", one(CHAINS, 1, true), CHAINS),
        ("indirect chains of 8", one(CHAINS, 8, true), CHAINS),
    ];
    for (name, shape, elements) in rows {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(elements));
        for packed in [false, true] {
            let label = if packed { "packed" } else { "split" };
            let mut bench = Bench::new(&guest, packed, shape, |ring| ring.queue(&guest));
            group.bench_function(label, |b| {
                b.iter_custom(|n| {
                    bench.time(&guest, n, |_| (), |q, ()| ours_one_by_one(&guest, q))
                });
            });
            let mut bench = Bench::new(&guest, packed, shape, |ring| ring.queue(&guest));
            let mut batch = Batch::new(64, 1024);
            group.bench_function(format!("{label}, batched"), |b| {
                b.iter_custom(|n| {
                    bench.time(
                        &guest,
                        n,
                        |_| (),
                        |q, ()| ours_batched(&guest, q, &mut batch),
                    )
                });
            });
        }
        let mut bench = Bench::new(&guest, false, shape, Ring::peer_queue);
        group.bench_function("rust-vmm", |b| {
            b.iter_custom(|n| bench.time(&guest, n, |_| (), |q, ()| peer(&guest, q)));
        });
        let mut bench = Bench::new(&guest, false, shape, Ring::peer_queue);
        group.bench_function("rust-vmm, drained", |b| {
            b.iter_custom(|n| bench.time(&guest, n, |_| (), |q, ()| peer_drained(&guest, q)));
        });
        group.finish();
    }
}

/// Returning alone: 128 chains that were taken before.
fn returning(c: &mut Criterion) {
    let guest = Guest::new();
    let shape = Shape {
        chains: CHAINS,
        descriptors: 1,
        indirect: false,
    };
    let mut group = c.benchmark_group("return chains");
    group.throughput(Throughput::Elements(CHAINS));
    for packed in [false, true] {
        let mut bench = Bench::new(&guest, packed, shape, |ring| ring.queue(&guest));
        let take = |queue: &mut Queue| {
            let mut tokens = Vec::new();
            while let Some(chain) = queue.pop(&guest.ours).unwrap() {
                tokens.push(chain.into_token());
            }
            tokens
        };
        group.bench_function(if packed { "packed" } else { "split" }, |b| {
            b.iter_custom(|n| {
                bench.time(&guest, n, take, |queue, tokens| {
                    for token in tokens.drain(..) {
                        queue.complete(&guest.ours, token, 0x1000).unwrap();
                    }
                    black_box(queue.publish(&guest.ours).unwrap());
                })
            });
        });
    }
    let mut bench = Bench::new(&guest, false, shape, Ring::peer_queue);
    let take = |queue: &mut virtio_queue::Queue| -> Vec<u16> {
        queue
            .iter(&guest.peer)
            .unwrap()
            .map(|chain| chain.head_index())
            .collect()
    };
    group.bench_function("rust-vmm", |b| {
        b.iter_custom(|n| {
            bench.time(&guest, n, take, |queue, heads| {
                for head in heads.drain(..) {
                    queue.add_used(&guest.peer, head, 0x1000).unwrap();
                }
                black_box(queue.needs_notification(&guest.peer).unwrap());
            })
        });
    });
    group.finish();
    // The mapping must outlive everything that was made from it.
    guest.peer.write_obj(0u8, GuestAddress(0)).unwrap();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = shapes, returning
}
criterion_main!(benches);
