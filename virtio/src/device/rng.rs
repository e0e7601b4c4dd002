//! The entropy device (VIRTIO 1.3, 5.4): fills buffers with random bytes.

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next};
use crate::Features;

/// A source of random bytes.
pub trait Entropy: Send {
    /// Fills the beginning of `buf` and says how far; less than all when the source has no more
    /// at the moment.
    fn fill(&mut self, buf: &mut [u8]) -> usize;
}

impl<F: FnMut(&mut [u8]) -> usize + Send> Entropy for F {
    fn fill(&mut self, buf: &mut [u8]) -> usize {
        self(buf)
    }
}

/// The most bytes that one request is given. A driver that wants more asks again.
const MAX_REQUEST: u64 = 4096;

/// The entropy device.
#[derive(Debug)]
pub struct Rng<E> {
    source: E,
}

impl<E: Entropy> Rng<E> {
    /// A device that passes on what `source` gives.
    pub fn new(source: E) -> Self {
        Self { source }
    }
}

impl<M: GuestMemory, E: Entropy> Device<M> for Rng<E> {
    fn id(&self) -> DeviceId {
        DeviceId::RNG
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn reset(&mut self) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let source = &mut self.source;
        io.serve(queue, |memory, chain| {
            // The driver gives no data with a request (5.4.6.1); there is nothing to do with it.
            let mut writer = chain.writer(memory);
            let mut bytes = [0; 256];
            while writer.remaining() > 0 && u64::from(writer.written()) < MAX_REQUEST {
                let want = writer.remaining().min(bytes.len() as u64) as usize;
                let got = source.fill(&mut bytes[..want]).min(want);
                writer.write(&bytes[..got])?;
                if got < want {
                    break;
                }
            }
            Ok(writer.written())
        })
    }
}
