//! The template device (VIRTIO 1.3, 5): what it is for, in one sentence.
//!
//! As it stands, it answers each request with the request's own bytes, and its configuration space
//! is the largest answer that it gives.

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;

/// The largest answer, in bytes: no driver makes the device do more for one request.
const MAX_ANSWER: u32 = 4096;

/// The template device.
#[derive(Debug, Default)]
pub struct Template {}

impl Template {
    /// A device as its driver finds it first.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<M: GuestMemory> Device<M> for Template {
    fn id(&self) -> DeviceId {
        DeviceId(0xFFFF_FFFF)
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&MAX_ANSWER.to_le_bytes(), offset, data);
    }

    fn reset(&mut self) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        io.serve(queue, |memory, chain| {
            // What the driver wrote is copied once; only the copy is looked at.
            let (mut reader, mut writer) = (chain.reader(memory), chain.writer(memory));
            let mut bytes = [0; 256];
            while writer.remaining() > 0 && writer.written() < MAX_ANSWER {
                let want = writer.remaining().min(bytes.len() as u64) as usize;
                let got = reader.read(&mut bytes[..want])?;
                if got == 0 {
                    break;
                }
                writer.write(&bytes[..got])?;
            }
            Ok(writer.written())
        })
    }
}
