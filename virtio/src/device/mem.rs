//! The memory device (VIRTIO 1.3, 5.15): memory that is plugged and unplugged in blocks.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use spin::Mutex;
use testudo_arch::{Gpa, GuestMemory};

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;

/// Feature bits (5.15.3): unplugged memory must not be touched.
const UNPLUGGED_INACCESSIBLE: Features = Features::bit(1);

/// Requests (5.15.6).
mod request {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// Answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Ack = 0,
    Nack = 1,
    Busy = 2,
    Error = 3,
}

/// What a range of blocks is.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// Where the memory comes from and goes to. All ranges are whole blocks.
pub trait MemBackend: Send {
    /// Puts memory behind a range; false if there is none now.
    fn plug(&mut self, gpa: Gpa, len: u64) -> bool;

    /// Takes the memory behind a range away; false if that cannot be now.
    fn unplug(&mut self, gpa: Gpa, len: u64) -> bool;
}

/// The place of a memory device in guest-physical space.
#[derive(Clone, Copy, Debug)]
pub struct MemOptions {
    /// Where it begins: a multiple of the block size.
    pub start: Gpa,
    /// Its size in bytes: a multiple of the block size.
    pub size: u64,
    /// The size of a block in bytes: a power of two.
    pub block: u64,
}

#[derive(Debug, Default)]
struct Shared {
    requested: u64,
    plugged: u64,
    changed: bool,
}

/// The operator's side of a memory device.
#[derive(Clone, Debug, Default)]
pub struct MemControl(Arc<Mutex<Shared>>);

impl MemControl {
    /// Asks the guest to have `bytes` plugged in all. It learns of it at the device's next poll.
    pub fn request(&self, bytes: u64) {
        let mut shared = self.0.lock();
        shared.changed |= shared.requested != bytes;
        shared.requested = bytes;
    }

    /// The bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.0.lock().plugged
    }
}

/// The memory device.
#[derive(Debug)]
pub struct Mem<B> {
    backend: B,
    options: MemOptions,
    control: MemControl,
    /// One entry for each block: whether it is plugged.
    blocks: Vec<bool>,
}

impl<B: MemBackend> Mem<B> {
    /// A device with nothing plugged, and the operator's side of it. `None` if the place is not
    /// made of whole blocks.
    pub fn new(backend: B, options: MemOptions) -> Option<(Self, MemControl)> {
        let MemOptions { start, size, block } = options;
        let whole = block.is_power_of_two()
            && start.0.is_multiple_of(block)
            && size.is_multiple_of(block)
            && start.checked_add(size).is_some();
        if !whole {
            return None;
        }
        let control = MemControl::default();
        let device = Self {
            backend,
            options,
            control: control.clone(),
            blocks: vec![false; usize::try_from(size / block).ok()?],
        };
        Some((device, control))
    }

    /// The blocks of a request, if they are a proper part of the region.
    fn range(&self, gpa: u64, count: u16) -> Option<Range<usize>> {
        let offset = gpa.checked_sub(self.options.start.0)?;
        if count == 0 || !offset.is_multiple_of(self.options.block) {
            return None;
        }
        let first = usize::try_from(offset / self.options.block).ok()?;
        let range = first..first.checked_add(count.into())?;
        (range.end <= self.blocks.len()).then_some(range)
    }

    fn bytes(&self, range: &Range<usize>) -> (Gpa, u64) {
        let block = self.options.block;
        let start = self.options.start.wrapping_add(range.start as u64 * block);
        (start, range.len() as u64 * block)
    }

    /// Plugs or unplugs a range, all of which must be the other way now.
    fn change(&mut self, gpa: u64, count: u16, plug: bool) -> Answer {
        let Some(range) = self.range(gpa, count) else {
            return Answer::Error;
        };
        if self.blocks[range.clone()].contains(&plug) {
            return Answer::Error;
        }
        let (start, len) = self.bytes(&range);
        {
            let shared = self.control.0.lock();
            // More than was asked for is refused (5.15.6.1).
            if plug && shared.plugged.saturating_add(len) > shared.requested {
                return Answer::Nack;
            }
        }
        let done = if plug {
            self.backend.plug(start, len)
        } else {
            self.backend.unplug(start, len)
        };
        if !done {
            return Answer::Busy;
        }
        self.blocks[range].fill(plug);
        let mut shared = self.control.0.lock();
        shared.plugged = if plug {
            shared.plugged.saturating_add(len)
        } else {
            shared.plugged.saturating_sub(len)
        };
        Answer::Ack
    }

    /// Unplugs all runs of plugged blocks.
    fn unplug_all(&mut self) -> Answer {
        let mut first = 0;
        while first < self.blocks.len() {
            let len = self.blocks[first..].iter().take_while(|&&b| b).count();
            if len > 0 {
                let (start, bytes) = self.bytes(&(first..first + len));
                if !self.backend.unplug(start, bytes) {
                    return Answer::Busy;
                }
                self.blocks[first..first + len].fill(false);
                let mut shared = self.control.0.lock();
                shared.plugged = shared.plugged.saturating_sub(bytes);
            }
            first += len.max(1);
        }
        Answer::Ack
    }

    fn state(&self, gpa: u64, count: u16) -> Option<u16> {
        let blocks = &self.blocks[self.range(gpa, count)?];
        let plugged = blocks.iter().filter(|&&b| b).count();
        Some(match plugged {
            0 => UNPLUGGED,
            n if n == blocks.len() => PLUGGED,
            _ => MIXED,
        })
    }
}

impl<M: GuestMemory, B: MemBackend> Device<M> for Mem<B> {
    fn id(&self) -> DeviceId {
        DeviceId::MEM
    }

    fn features(&self) -> Features {
        UNPLUGGED_INACCESSIBLE
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.control.0.lock();
        let MemOptions { start, size, block } = self.options;
        let words = [
            block,
            0,
            start.0,
            size,
            size,
            shared.plugged,
            shared.requested,
        ];
        let mut config = [0; 56];
        for (place, word) in config.chunks_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        read_config_bytes(&config, offset, data);
    }

    fn reset(&mut self) {
        // Plugged memory stays: the driver that comes next asks for the state.
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        io.serve(queue, |memory, chain| {
            let mut reader = chain.reader(memory);
            let [kind, _, _, _]: [u16; 4] = reader.read_value()?;
            let (mut gpa, mut count) = (0, 0);
            if kind != request::UNPLUG_ALL {
                gpa = u64::from_le_bytes(reader.read_value()?);
                count = u16::from_le_bytes(reader.read_value()?);
            }
            let (answer, state) = match kind {
                request::PLUG => (self.change(gpa, count, true), 0),
                request::UNPLUG => (self.change(gpa, count, false), 0),
                request::UNPLUG_ALL => (self.unplug_all(), 0),
                request::STATE => match self.state(gpa, count) {
                    Some(state) => (Answer::Ack, state),
                    None => (Answer::Error, 0),
                },
                _ => (Answer::Error, 0),
            };
            let mut bytes = [0; 10];
            bytes[..2].copy_from_slice(&(answer as u16).to_le_bytes());
            bytes[8..].copy_from_slice(&state.to_le_bytes());
            let mut writer = chain.writer(memory);
            writer.write_all(&bytes)?;
            Ok(writer.written())
        })
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if core::mem::take(&mut self.control.0.lock().changed) {
            io.config_changed();
        }
        Ok(Next::Idle)
    }
}
