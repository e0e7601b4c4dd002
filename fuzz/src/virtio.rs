//! Virtio devices under drivers that do anything.
//!
//! The oracles: nothing panics (with overflow checks), nothing runs without end, and a device never
//! writes memory that it was not offered.

use std::sync::Arc;

use testudo_arch::bus::BusDevice;
use testudo_arch::irq::{InterruptSink, Msi};
use testudo_arch::memory::GuestRam;
use testudo_arch::pci::PciFunction;
use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::backend::{
    EchoHost, MemoryImage, MemoryTree, NetBackend, NetHeader, Offloads, UserHost, UserOptions, Wire,
};
use testudo_virtio::device::{
    Balloon, BalloonBackend, Blk, BlkOptions, Console, ConsolePort, Fs, Iommu, IommuState, Mem,
    MemBackend, MemOptions, Net, NetOptions, Pmem, PortOptions, Rng, Vsock,
};
use testudo_virtio::driver::{DriverQueue, ring_bytes};
use testudo_virtio::queue::{Batch, Bounds};
use testudo_virtio::transport::{Mmio, Options, Pci};
use testudo_virtio::{Chain, Device, Features, Segment};

use crate::input::Input;

/// Guest memory: small, so that random addresses meet one another.
const BASE: u64 = 0x1_0000;
const SIZE: u64 = 0x4_0000;

impl Input<'_> {
    /// An address that is mostly in memory.
    fn address(&mut self) -> u64 {
        match self.u8() {
            0 => u64::from_le_bytes(self.bytes()),
            _ => BASE + (u64::from(self.u32()) % (SIZE + 64)),
        }
    }
}

/// Memory that lives as long as one run.
struct Guest {
    ram: GuestRam,
    _bytes: Vec<u64>,
}

impl Guest {
    fn new() -> Self {
        let mut bytes = vec![0u64; (SIZE / 8) as usize];
        let mut ram = GuestRam::new();
        // SAFETY: the vector lives in the same value, and is used through `ram` only.
        unsafe { ram.add(Gpa(BASE), bytes.as_mut_ptr().cast(), SIZE, true) }.unwrap();
        Self { ram, _bytes: bytes }
    }
}

/// Any bytes as a ring, and any work of the device on it.
pub fn queue(data: &[u8]) {
    let mut input = Input(data);
    let guest = Guest::new();
    let flags = input.u8();
    let packed = flags & 1 != 0;
    let mut features = Features::VERSION_1;
    features.set(Features::RING_PACKED, packed);
    features.set(Features::EVENT_IDX, flags & 2 != 0);
    features.set(Features::INDIRECT_DESC, flags & 4 != 0);
    features.set(Features::IN_ORDER, flags & 8 != 0);
    let size = 1 << (flags >> 4 & 3);
    let driver = DriverQueue::new(Gpa(BASE), size, packed);
    let bounds = Bounds {
        segments: 1 + input.u8() as u16,
        bytes: input.u32(),
    };
    let mut queue = driver
        .config()
        .activate(features, bounds, &guest.ram)
        .unwrap();
    let mut taken = Vec::new();
    let mut batch = Batch::new(5, 400);
    while !input.is_empty() {
        match input.u8() % 8 {
            // The driver writes somewhere near the ring or an indirect table.
            0..=2 => {
                let at = Gpa(BASE + u64::from(input.u16()) % 0x400);
                let bytes = input.bytes::<16>();
                let _ = guest
                    .ram
                    .write(at, &bytes[..1 + usize::from(input.u8() % 16)]);
            }
            3 | 4 => match queue.pop(&guest.ram) {
                Ok(Some(chain)) => {
                    let count = chain.readable().len() + chain.writable().len();
                    assert!(count <= usize::from(bounds.segments));
                    let total: u64 = chain.readable().iter().map(|s| u64::from(s.len)).sum();
                    assert!(total <= u64::from(bounds.bytes));
                    taken.push(chain.into_token());
                    assert!(taken.len() <= usize::from(size));
                }
                Ok(None) => {}
                Err(_) => return,
            },
            5 if input.u8() & 7 == 0 => {
                let end = queue.pop_batch(&guest.ram, &mut batch);
                taken.extend(batch.drain().map(Chain::into_token));
                assert!(taken.len() <= usize::from(size));
                if end.is_err() {
                    return;
                }
            }
            5 if !taken.is_empty() => {
                let which = usize::from(input.u8()) % taken.len();
                let token = taken.remove(which);
                let _ = queue.complete(&guest.ram, token, input.u32());
            }
            5 => {}
            6 => {
                let _ = queue.publish(&guest.ram);
            }
            _ => {
                if queue.listen(&guest.ram).is_err() {
                    return;
                }
            }
        }
    }
}

/// The devices.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "their own names")]
pub enum Kind {
    Blk,
    Net,
    UserNet,
    Console,
    Rng,
    Balloon,
    Vsock,
    Iommu,
    Mem,
    Pmem,
    Fs,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Blk,
        Self::Net,
        Self::UserNet,
        Self::Console,
        Self::Rng,
        Self::Balloon,
        Self::Vsock,
        Self::Iommu,
        Self::Mem,
        Self::Pmem,
        Self::Fs,
    ];
}

struct Backend;

impl BalloonBackend for Backend {
    fn reclaim(&mut self, gpa: Gpa, len: u64) {
        inside(gpa, len);
    }
    fn restore(&mut self, gpa: Gpa, len: u64) {
        inside(gpa, len);
    }
    fn report_free(&mut self, gpa: Gpa, len: u64) {
        inside(gpa, len);
    }
    fn hint_free(&mut self, gpa: Gpa, len: u64) {
        inside(gpa, len);
    }
}

/// A balloon takes whole pages of memory and nothing else.
fn inside(gpa: Gpa, len: u64) {
    assert!(gpa.0.is_multiple_of(4096) && len.is_multiple_of(4096) && len > 0);
    assert!(gpa.0 >= BASE && gpa.0 + len <= BASE + SIZE);
}

const PLUG: MemOptions = MemOptions {
    start: Gpa(1 << 32),
    size: 64 << 20,
    block: 2 << 20,
};

impl MemBackend for Backend {
    fn plug(&mut self, gpa: Gpa, len: u64) -> bool {
        assert!(gpa.0 >= PLUG.start.0 && gpa.0 + len <= PLUG.start.0 + PLUG.size);
        true
    }
    fn unplug(&mut self, gpa: Gpa, len: u64) -> bool {
        self.plug(gpa, len)
    }
}

impl ConsolePort for Backend {
    fn write(&mut self, _: &[u8]) {}
    fn read(&mut self, buf: &mut [u8]) -> usize {
        buf.len().min(7)
    }
}

fn make(kind: Kind) -> Box<dyn Device<GuestRam>> {
    let offloads = Offloads::CHECKSUM | Offloads::TSO4;
    match kind {
        Kind::Blk => {
            let options = BlkOptions {
                queues: 2,
                queue_size: 16,
                ..BlkOptions::default()
            };
            Box::new(Blk::new(MemoryImage(vec![0; 8192]), options))
        }
        Kind::Net => {
            // What one end sends, the other gives back.
            let (near, far) = Wire::pair(offloads);
            let options = NetOptions {
                pairs: 2,
                queue_size: 16,
                ..NetOptions::default()
            };
            Box::new(Net::new(Loop { near, far }, options))
        }
        Kind::UserNet => {
            let host = UserHost::new(UserOptions::default());
            let options = NetOptions {
                queue_size: 16,
                ..NetOptions::default()
            };
            Box::new(Net::new(host, options))
        }
        Kind::Console => {
            let port = PortOptions::default();
            Box::new(Console::new(Box::new(Backend)).with_port(port, Box::new(Backend)))
        }
        Kind::Rng => Box::new(Rng::new(|buf: &mut [u8]| buf.len())),
        Kind::Balloon => {
            let (balloon, control) = Balloon::new(Backend);
            control.start_hinting();
            control.request_stats();
            Box::new(balloon)
        }
        Kind::Vsock => Box::new(Vsock::new(EchoHost { port: 7 }, 3)),
        Kind::Iommu => Box::new(Iommu::new(IommuState::new([0, 1, 2]))),
        Kind::Mem => {
            let (mem, control) = Mem::new(Backend, PLUG).expect("whole blocks");
            control.request(PLUG.size / 2);
            Box::new(mem)
        }
        Kind::Pmem => Box::new(Pmem::new(|| true, Gpa(1 << 33), 1 << 20)),
        Kind::Fs => {
            let tree = MemoryTree::new()
                .with_file("a/b", vec![1; 5000])
                .with_link("c", "a/b");
            Box::new(Fs::new(tree, "tag"))
        }
    }
}

/// A wire whose far end sends back what it receives.
struct Loop {
    near: Wire,
    far: Wire,
}

impl NetBackend for Loop {
    fn offloads(&self) -> Offloads {
        self.near.offloads()
    }
    fn send(
        &mut self,
        header: NetHeader,
        len: usize,
        fill: testudo_virtio::backend::Fill<'_>,
    ) -> Result<(), testudo_arch::MemoryFault> {
        assert!(header.needs(len).is_some());
        self.near.send(header, len, fill)?;
        while let Some((header, frame)) = self.far.peek() {
            let frame = frame.to_vec();
            self.far.consume();
            let mut copy = |to: &mut [u8]| {
                to.copy_from_slice(&frame);
                Ok(())
            };
            self.far.send(header, frame.len(), &mut copy)?;
        }
        Ok(())
    }
    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        self.near.peek()
    }
    fn consume(&mut self) {
        self.near.consume();
    }
}

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn set_level(&self, _: u32, _: bool) {}
    fn send_msi(&self, _: Msi) {}
}

/// Any accesses to the registers of any device, with any memory behind them.
pub fn mmio(data: &[u8]) {
    let mut input = Input(data);
    let guest = Guest::new();
    let kind = Kind::ALL[usize::from(input.u8()) % Kind::ALL.len()];
    let interrupts = Arc::new(NoInterrupts);
    let memory = guest.ram.clone();
    let mut device = Mmio::new(make(kind), memory, Options::default(), interrupts, 5);
    let mut now = 0;
    while !input.is_empty() {
        let action = input.u8();
        let offset = u64::from(input.u16() % 0x200);
        let width = 1 << (action >> 6);
        match action % 8 {
            0 => device.read(offset, &mut [0; 8][..width]),
            1 => device.write(offset, &input.bytes::<8>()[..width]),
            // A whole register, which random widths seldom are.
            2..=4 => device.write(offset & !3, &input.bytes::<4>()),
            5 => {
                let value = input.address();
                let at = 0x80 + (offset & 0x30);
                device.write(at, &(value as u32).to_le_bytes());
                device.write(at + 4, &((value >> 32) as u32).to_le_bytes());
            }
            6 => {
                let _ = guest.ram.write(Gpa(input.address()), &input.bytes::<16>());
            }
            _ => {
                now += u64::from(input.u16()) << 16;
                let _ = device.poll(now);
            }
        }
    }
}

/// The same of a PCI function.
pub fn pci(data: &[u8]) {
    let mut input = Input(data);
    let guest = Guest::new();
    let kind = Kind::ALL[usize::from(input.u8()) % Kind::ALL.len()];
    let interrupts = Arc::new(NoInterrupts);
    let memory = guest.ram.clone();
    let mut device = Pci::new(make(kind), memory, Options::default(), interrupts, 5);
    device.config_write(4, &[6, 0]);
    let mut now = 0;
    while !input.is_empty() {
        let action = input.u8();
        let offset = u64::from(input.u16()) % 0x8000;
        let width = 1 << (action >> 6);
        match action % 8 {
            0 => device.bar_read(0, offset, &mut [0; 8][..width]),
            1 => device.bar_write(0, offset, &input.bytes::<8>()[..width]),
            // Mostly the common structure and the notifications.
            2 | 3 => {
                let offset = (offset % 0x40) & !(width as u64 - 1);
                device.bar_write(0, offset, &input.bytes::<8>()[..width]);
            }
            4 => {
                let value = input.address();
                device.bar_write(0, 0x20 + offset % 0x18 / 8 * 8, &value.to_le_bytes());
            }
            5 => {
                let width = width.min(4);
                let at = (offset as u16 & 0x1FF) & !(width as u16 - 1);
                device.config_write(at, &input.bytes::<4>()[..width]);
                device.config_read(at, &mut [0; 4][..width]);
            }
            6 => {
                let _ = guest.ram.write(Gpa(input.address()), &input.bytes::<16>());
            }
            _ => {
                device.bar_write(0, 0x3000 + offset % 0x40, &[0; 2]);
                now += u64::from(input.u16()) << 16;
                let _ = device.poll(now);
            }
        }
        let _ = device.windows();
    }
}

/// One of the devices under [`drive`].
pub fn device(kind: Kind, data: &[u8]) {
    drive(make(kind), data);
}

/// A driver that negotiates properly, keeps its rings in order, and asks for anything.
pub fn drive(device: Box<dyn Device<GuestRam>>, data: &[u8]) {
    /// The rings begin the memory; what is offered lies behind them.
    const AREA: u64 = BASE + 0x3_0000;
    const AREA_SIZE: u64 = BASE + SIZE - AREA;
    let mut input = Input(data);
    let guest = Guest::new();
    let sizes = device.queues().to_vec();
    let interrupts = Arc::new(NoInterrupts);
    let memory = guest.ram.clone();
    let mut mmio = Mmio::new(device, memory, Options::default(), interrupts, 5);
    let flags = input.u8();
    let packed = flags & 1 != 0;
    let mut write = |register: u64, value: u32| mmio.write(register, &value.to_le_bytes());
    write(0x70, 3);
    // All features of the device but the format and what the driver side lacks.
    let mut offered = [0; 2];
    for window in [0, 1] {
        let mut bytes = [0; 4];
        mmio.write(0x14, &(window as u32).to_le_bytes());
        mmio.read(0x10, &mut bytes);
        offered[window] = u32::from_le_bytes(bytes);
    }
    let all = u64::from(offered[0]) | u64::from(offered[1]) << 32;
    let mut features = Features::from_bits_retain(all) - Features::EVENT_IDX;
    features.set(Features::RING_PACKED, packed);
    let mut write = |register: u64, value: u32| mmio.write(register, &value.to_le_bytes());
    for window in [0, 1] {
        write(0x24, window);
        write(0x20, features.window(window));
    }
    write(0x70, 11);
    let mut queues = Vec::new();
    let mut base = BASE;
    for (number, &size) in sizes.iter().enumerate() {
        let queue = DriverQueue::new(Gpa(base), size, packed);
        base += ring_bytes(size).next_multiple_of(64);
        let config = *queue.config();
        write(0x30, number as u32);
        write(0x38, size.into());
        write(0x80, config.descriptors.0 as u32);
        write(0x90, config.driver.0 as u32);
        write(0xA0, config.device.0 as u32);
        write(0x44, 1);
        queues.push(queue);
    }
    assert!(base <= AREA);
    write(0x70, 15);
    assert_eq!(mmio.fault(), None);
    let mut now = 0;
    // What was ever offered to be written, and what was put there to be read.
    let mut offered = vec![false; AREA_SIZE as usize];
    let mut after = vec![0; AREA_SIZE as usize];
    while !input.is_empty() && mmio.fault().is_none() {
        let number = usize::from(input.u8()) % queues.len();
        let queue = &mut queues[number];
        while queue.take_used(&guest.ram).unwrap().is_some() {}
        let request = input.bytes::<48>();
        let len = usize::from(input.u8()) % 49;
        guest.ram.write(Gpa(AREA), &request).unwrap();
        // Two buffers to read, up to three to write, all within the area.
        let cut = if len == 0 {
            0
        } else {
            usize::from(input.u8()) % len
        };
        let part = |gpa: u64, len: u32| Segment { gpa: Gpa(gpa), len };
        let readable: Vec<_> = [(0, cut), (cut, len - cut)]
            .iter()
            .filter(|(_, len)| *len > 0)
            .map(|&(at, len)| part(AREA + at as u64, len as u32))
            .collect();
        let mut at = AREA + 0x1000;
        let writable: Vec<_> = (0..input.u8() % 4)
            .map(|_| {
                let len = 1 + u32::from(input.u16()) % 0x1000;
                let segment = part(at, len);
                at += u64::from(len) + 16;
                segment
            })
            .collect();
        queue.offer(&guest.ram, &readable, &writable, None).unwrap();
        for segment in &writable {
            let start = (segment.gpa.0 - AREA) as usize;
            offered[start..start + segment.len as usize].fill(true);
        }
        mmio.write(0x50, &(number as u32).to_le_bytes());
        now += u64::from(input.u16()) << 12;
        let _ = mmio.poll(now);
        // Everything else is as the driver left it.
        guest.ram.read(Gpa(AREA), &mut after).unwrap();
        assert_eq!(after[..48], request, "what was only to be read");
        let mut untouched = after[48..].iter().zip(&offered[48..]);
        assert!(untouched.all(|(byte, offered)| *offered || *byte == 0));
    }
}
