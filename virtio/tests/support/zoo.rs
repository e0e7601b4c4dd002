//! One of each device, and what they need.

use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::Device;
use testudo_virtio::backend::{EchoHost, MemoryImage, MemoryTree, Unplugged};
use testudo_virtio::device::{
    Balloon, BalloonBackend, Blk, BlkOptions, Console, ConsolePort, Fs, Iommu, IommuState, Mem,
    MemBackend, MemOptions, Net, NetOptions, Pmem, Rng, Vsock,
};

pub struct NoPages;

impl BalloonBackend for NoPages {
    fn reclaim(&mut self, _: Gpa, _: u64) {}
    fn restore(&mut self, _: Gpa, _: u64) {}
    fn report_free(&mut self, _: Gpa, _: u64) {}
}

impl MemBackend for NoPages {
    fn plug(&mut self, _: Gpa, _: u64) -> bool {
        true
    }
    fn unplug(&mut self, _: Gpa, _: u64) -> bool {
        true
    }
}

pub struct Nowhere;

impl ConsolePort for Nowhere {
    fn write(&mut self, _: &[u8]) {}
    fn read(&mut self, buf: &mut [u8]) -> usize {
        buf.fill(b'x');
        buf.len()
    }
}

/// One of each device.
pub fn zoo<M: GuestMemory>() -> Vec<Box<dyn Device<M>>> {
    let options = MemOptions {
        start: Gpa(1 << 32),
        size: 64 << 20,
        block: 2 << 20,
    };
    vec![
        Box::new(Blk::new(
            MemoryImage(vec![0x11; 64 << 10]),
            BlkOptions::default(),
        )),
        Box::new(Console::new(Box::new(Nowhere)).with_port(Default::default(), Box::new(Nowhere))),
        Box::new(Rng::new(|buf: &mut [u8]| buf.len())),
        Box::new(Net::new(Unplugged, NetOptions::default())),
        Box::new(Balloon::new(NoPages).0),
        Box::new(Vsock::new(EchoHost { port: 7 }, 3)),
        Box::new(Iommu::new(IommuState::new([1, 2]))),
        Box::new(Mem::new(NoPages, options).unwrap().0),
        Box::new(Pmem::new(|| true, Gpa(1 << 33), 1 << 20)),
        Box::new(Fs::new(
            MemoryTree::new().with_file("a/b", vec![1; 5000]),
            "tag",
        )),
    ]
}

/// Numbers without a pattern, the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
