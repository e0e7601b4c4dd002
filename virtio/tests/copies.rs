//! How often the library touches guest memory: each byte of data once, and nothing that a driver
//! could change in between twice.

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use support::zoo::{Nowhere, Random, zoo};
use support::{Interrupts, alloc, memory};
use testudo_arch::bus::BusDevice;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory, MemoryFault};
use testudo_virtio::backend::{
    EchoHost, MemoryImage, MemoryTree, NetBackend, NetHeader, Offloads, Wire,
};
use testudo_virtio::device::{Blk, BlkOptions, Console, Fs, Net, NetOptions, Rng, Vsock};
use testudo_virtio::driver::{DriverQueue, ring_bytes};
use testudo_virtio::transport::{Mmio, Options};
use testudo_virtio::{Device, Features, Segment};

/// Guest memory that counts the bytes that are copied, in whatever way.
#[derive(Clone)]
struct Counting {
    ram: GuestRam,
    read: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
    /// Where a range begins of which is counted how often each byte was read.
    watched: Arc<Mutex<(u64, Vec<u8>)>>,
}

impl Counting {
    fn new() -> Self {
        Self {
            ram: memory(),
            read: Arc::default(),
            written: Arc::default(),
            watched: Arc::default(),
        }
    }

    /// The bytes read and written since the last call.
    fn take(&self) -> (u64, u64) {
        (
            self.read.swap(0, Ordering::Relaxed),
            self.written.swap(0, Ordering::Relaxed),
        )
    }
}

impl GuestMemory for Counting {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let (start, counts) = &mut *self.watched.lock().unwrap();
        for at in gpa.0..gpa.0 + buf.len() as u64 {
            let index = at.wrapping_sub(*start) as usize;
            if let Some(count) = counts.get_mut(index) {
                *count += 1;
            }
        }
        self.ram.read(gpa, buf)
    }
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.ram.write(gpa, data)
    }
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        self.read.fetch_add(2, Ordering::Relaxed);
        self.ram.load_u16(gpa)
    }
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.written.fetch_add(2, Ordering::Relaxed);
        self.ram.store_u16(gpa, value)
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.read.fetch_add(4, Ordering::Relaxed);
        self.ram.load_u32(gpa)
    }
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.written.fetch_add(4, Ordering::Relaxed);
        self.ram.store_u32(gpa, value)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.read.fetch_add(8, Ordering::Relaxed);
        self.ram.load_u64(gpa)
    }
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.written.fetch_add(8, Ordering::Relaxed);
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

struct Machine {
    mmio: Mmio<Counting>,
    memory: Counting,
    queues: Vec<DriverQueue>,
}

impl Machine {
    fn new(device: Box<dyn Device<Counting>>, feature: Features) -> Self {
        let memory = Counting::new();
        let sizes = device.queues().to_vec();
        let options = Options::split();
        let interrupts = Arc::new(Interrupts::default());
        let mut mmio = Mmio::new(device, memory.clone(), options, interrupts, 5);
        let mut write = |register: u64, value: u32| {
            BusDevice::write(&mut mmio, register, &value.to_le_bytes());
        };
        let features = Features::VERSION_1 | feature;
        write(0x70, 3);
        for window in [0, 1] {
            write(0x24, window);
            write(0x20, features.window(window));
        }
        write(0x70, 11);
        let mut queues = Vec::new();
        for (number, &size) in sizes.iter().enumerate() {
            let queue = DriverQueue::new(alloc(ring_bytes(size)), size, false);
            let config = *queue.config();
            write(0x30, number as u32);
            write(0x38, size.into());
            write(0x80, config.descriptors.0 as u32);
            write(0x90, config.driver.0 as u32);
            write(0xA0, config.device.0 as u32);
            write(0x44, 1);
            queues.push(queue);
        }
        write(0x70, 15);
        memory.take();
        Self {
            mmio,
            memory,
            queues,
        }
    }

    fn offer(&mut self, queue: usize, readable: &[Segment], writable: &[Segment]) {
        let ram = &self.memory.ram;
        let offered = self.queues[queue].offer(ram, readable, writable, None);
        offered.unwrap().unwrap();
    }

    fn notify(&mut self, queue: u32) {
        self.mmio.write(0x50, &queue.to_le_bytes());
        assert_eq!(self.mmio.fault(), None);
    }
}

fn segment(len: u32) -> Segment {
    let gpa = alloc(len.into());
    Segment { gpa, len }
}

/// Where the bytes of a request go.
#[derive(Clone, Copy)]
enum Way {
    /// From the guest.
    Out,
    /// To the guest.
    In,
    /// From the guest, and back.
    Both,
}

/// What is read and written besides the data, for each chain: rings, descriptors, headers, the
/// status.
const OVERHEAD: u64 = 160;

/// Asserts that of two costs for `len` and for twice as many bytes the second is larger by exactly
/// `len` in the direction of the data and equal in the other, and that neither has much besides.
fn once(len: u64, cost: impl Fn(u64) -> (u64, u64), way: Way) {
    let (one, two) = (cost(len), cost(2 * len));
    let (expected, chains) = match way {
        Way::Out => ((len, 0), 1),
        Way::In => ((0, len), 1),
        Way::Both => ((len, len), 2),
    };
    assert_eq!((two.0 - one.0, two.1 - one.1), expected);
    let besides = (one.0 - expected.0, one.1 - expected.1);
    let most = chains * OVERHEAD;
    assert!(besides.0 <= most && besides.1 <= most, "{one:?}");
}

#[test]
fn a_block_is_copied_once_each_way() {
    let cost = |kind: u32, len: u64| {
        // With the write cache (FLUSH), so that a write is not flushed at once.
        let disk = Blk::new(MemoryImage(vec![7u8; 1 << 20]), BlkOptions::default());
        let mut machine = Machine::new(Box::new(disk), Features::bit(9));
        let (header, data, status) = (segment(16), segment(len as u32), segment(1));
        machine.memory.ram.store_u32(header.gpa, kind).unwrap();
        match kind {
            0 => machine.offer(0, &[header], &[data, status]),
            _ => machine.offer(0, &[header, data], &[status]),
        }
        machine.notify(0);
        machine.memory.take()
    };
    once(4096, |len| cost(0, len), Way::In);
    once(4096, |len| cost(1, len), Way::Out);
}

#[test]
fn a_frame_is_copied_once_each_way() {
    // With merged receive buffers (MRG_RXBUF).
    let card = |wire| {
        let card = Net::new(wire, NetOptions::default());
        Machine::new(Box::new(card), Features::bit(15))
    };
    let sent = |len: u64| {
        let (near, mut far) = Wire::pair(Offloads::empty());
        let mut machine = card(near);
        machine.offer(1, &[segment(12 + len as u32)], &[]);
        machine.notify(1);
        assert_eq!(far.peek().map(|(_, frame)| frame.len() as u64), Some(len));
        machine.memory.take()
    };
    once(750, sent, Way::Out);
    let received = |len: u64| {
        let (near, mut far) = Wire::pair(Offloads::empty());
        let mut machine = card(near);
        let mut fill = |to: &mut [u8]| {
            to.fill(0xFF);
            Ok(())
        };
        far.send(NetHeader::default(), len as usize, &mut fill)
            .unwrap();
        // Both lengths take two buffers.
        machine.offer(0, &[], &[segment(600)]);
        machine.offer(0, &[], &[segment(1500)]);
        machine.notify(0);
        machine.memory.take()
    };
    once(750, received, Way::In);
}

#[test]
fn random_bytes_are_copied_once() {
    let cost = |len: u64| {
        let rng = Rng::new(|buf: &mut [u8]| buf.len());
        let mut machine = Machine::new(Box::new(rng), Features::empty());
        machine.offer(0, &[], &[segment(len as u32)]);
        machine.notify(0);
        machine.memory.take()
    };
    once(1024, cost, Way::In);
}

#[test]
fn what_a_console_carries_is_copied_once_each_way() {
    let cost = |queue: usize, len: u64| {
        let console = Console::new(Box::new(Nowhere));
        let mut machine = Machine::new(Box::new(console), Features::empty());
        let data = [segment(len as u32)];
        match queue {
            0 => machine.offer(0, &[], &data),
            _ => machine.offer(1, &data, &[]),
        }
        machine.notify(queue as u32);
        machine.memory.take()
    };
    once(1024, |len| cost(0, len), Way::In);
    once(1024, |len| cost(1, len), Way::Out);
}

#[test]
fn what_a_socket_carries_is_copied_once_each_way() {
    // From port 1000 of guest 3 to the host's port 7: connect, then data.
    let header = |operation: u16, len: u64| -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend([3u64, 2].iter().flat_map(|cid| cid.to_le_bytes()));
        let words = [
            1000,
            7,
            len as u32,
            1 | u32::from(operation) << 16,
            0,
            1 << 20,
            0,
        ];
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    };
    let cost = |len: u64| {
        let vsock = Vsock::new(EchoHost { port: 7 }, 3);
        let mut machine = Machine::new(Box::new(vsock), Features::empty());
        let ram = machine.memory.ram.clone();
        let send = |machine: &mut Machine, operation: u16, len: u64| {
            let packet = [segment(44), segment(len.max(1) as u32)];
            ram.write(packet[0].gpa, &header(operation, len)).unwrap();
            let parts = if len == 0 { 1 } else { 2 };
            machine.offer(0, &[], &[segment(4096)]);
            machine.memory.take();
            machine.offer(1, &packet[..parts], &[]);
            machine.notify(1);
            machine.mmio.poll(0);
        };
        send(&mut machine, 1, 0);
        send(&mut machine, 5, len);
        machine.memory.take()
    };
    once(1000, cost, Way::Both);
}

#[test]
fn what_is_read_of_a_file_is_copied_once() {
    let cost = |len: u64| {
        let tree = MemoryTree::new().with_file("file", vec![7; 1 << 16]);
        let mut machine = Machine::new(Box::new(Fs::new(tree, "tag")), Features::empty());
        let ram = machine.memory.ram.clone();
        // The node or handle that the answer begins with.
        let mut ask = |opcode: u32, node: u64, body: &[u8], room: u64| -> u64 {
            let request = segment(40 + body.len() as u32);
            let answer = segment(16 + room as u32);
            let mut bytes = request.len.to_le_bytes().to_vec();
            bytes.extend(opcode.to_le_bytes());
            bytes.extend(
                [1, node, 0, 0]
                    .iter()
                    .flat_map(|word: &u64| word.to_le_bytes()),
            );
            bytes.extend(body);
            ram.write(request.gpa, &bytes).unwrap();
            machine.memory.take();
            machine.offer(1, &[request], &[answer]);
            machine.notify(1);
            let error = ram.load_u32(answer.gpa.wrapping_add(4)).unwrap();
            assert_eq!(error, 0, "opcode {opcode}");
            ram.load_u64(answer.gpa.wrapping_add(16)).unwrap()
        };
        let words = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        ask(26, 0, &words(&[7 | 36 << 32, 131_072]), 64);
        let node = ask(1, 1, b"file\0", 128);
        let handle = ask(14, node, &words(&[0]), 16);
        ask(15, node, &words(&[handle, 0, len, 0, 0]), len);
        machine.memory.take()
    };
    once(4096, cost, Way::In);
}

#[test]
fn no_byte_of_a_request_is_read_twice() {
    let mut random = Random(0x0DDB_1A5E_5BAD_5EED);
    for kind in 0..zoo::<Counting>().len() {
        let make = || {
            let device = zoo::<Counting>().swap_remove(kind);
            let features = device.features();
            Machine::new(device, features)
        };
        let mut machine = make();
        let area = alloc(0x1000);
        let room = alloc(0x4000);
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..128)
                .map(|_| match random.next() % 3 {
                    0 => random.next() as u8,
                    1 => (random.next() % 8) as u8,
                    _ => 0,
                })
                .collect();
            machine.memory.ram.write(area, &bytes).unwrap();
            let number = (random.next() % machine.queues.len() as u64) as usize;
            let ram = machine.memory.ram.clone();
            let queue = &mut machine.queues[number];
            while queue.take_used(&ram).unwrap().is_some() {}
            // One after the other, so that no byte is offered twice.
            let cut = 1 + random.next() % 127;
            let part = |at: u64, len: u64| Segment {
                gpa: area.wrapping_add(at),
                len: len as u32,
            };
            let readable = [part(0, cut), part(cut, 128 - cut)];
            let answer = Segment {
                gpa: room,
                len: 1 + (random.next() % 0x3FFF) as u32,
            };
            let writable = if random.next().is_multiple_of(4) {
                &[][..]
            } else {
                &[answer]
            };
            *machine.memory.watched.lock().unwrap() = (area.0, vec![0; 128]);
            queue.offer(&ram, &readable, writable, None).unwrap();
            machine.mmio.write(0x50, &(number as u32).to_le_bytes());
            machine.mmio.poll(random.next() % 1000);
            let counts = machine.memory.watched.lock().unwrap().1.clone();
            assert!(
                counts.iter().all(|&n| n <= 1),
                "device {kind}, queue {number}: {counts:?}"
            );
            if machine.mmio.fault().is_some() {
                machine = make();
            }
        }
    }
}
