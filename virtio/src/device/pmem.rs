//! The persistent memory device (VIRTIO 1.3, 5.19): memory that the guest maps, with a flush.
//!
//! The device only tells where the memory is, and flushes it. Whoever builds the machine maps the
//! memory there.

use testudo_arch::{Gpa, GuestMemory};

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;

/// What makes the memory persistent.
pub trait PmemBackend: Send {
    /// Makes all that the guest has stored durable; false if that failed.
    fn flush(&mut self) -> bool;
}

impl<F: FnMut() -> bool + Send> PmemBackend for F {
    fn flush(&mut self) -> bool {
        self()
    }
}

/// The only request.
const FLUSH: u32 = 0;

/// The persistent memory device.
#[derive(Debug)]
pub struct Pmem<B> {
    backend: B,
    start: Gpa,
    size: u64,
}

impl<B: PmemBackend> Pmem<B> {
    /// A device for `size` bytes of memory at `start`.
    pub fn new(backend: B, start: Gpa, size: u64) -> Self {
        Self {
            backend,
            start,
            size,
        }
    }
}

impl<M: GuestMemory, B: PmemBackend> Device<M> for Pmem<B> {
    fn id(&self) -> DeviceId {
        DeviceId::PMEM
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.start.0.to_le_bytes());
        config[8..].copy_from_slice(&self.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn reset(&mut self) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let backend = &mut self.backend;
        io.serve(queue, |memory, chain| {
            let kind = u32::from_le_bytes(chain.reader(memory).read_value()?);
            let done = kind == FLUSH && backend.flush();
            // The answer is 0, or -1 as the specification has it (5.19.6.2).
            let answer: u32 = if done { 0 } else { u32::MAX };
            let mut writer = chain.writer(memory);
            writer.write_all(&answer.to_le_bytes())?;
            Ok(writer.written())
        })
    }
}
