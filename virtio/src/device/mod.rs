//! Devices: what each one offers, and how it processes its queues.

mod balloon;
mod blk;
mod console;
mod fs;
mod iommu;
mod mem;
mod net;
mod pmem;
mod rng;
mod vsock;

pub use balloon::{Balloon, BalloonBackend, BalloonControl, Stat};
pub use blk::{Blk, BlkOptions};
pub use console::{Console, ConsolePort, PortOptions};
pub use fs::Fs;
pub use iommu::{Iommu, IommuMemory, IommuState, TranslateError};
pub use mem::{Mem, MemBackend, MemControl, MemOptions};
pub use net::{Net, NetOptions};
pub use pmem::{Pmem, PmemBackend};
pub use rng::{Entropy, Rng};
pub use vsock::Vsock;

use testudo_arch::{GuestMemory, MemoryFault};

use crate::Features;
use crate::queue::{Bounds, Chain, Queue, QueueError, ReadError, Token};

/// The type of a device (VIRTIO 1.3, 5). Open: a device of one's own may have any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub u32);

impl DeviceId {
    /// Network card (5.1).
    pub const NET: Self = Self(1);
    /// Block device (5.2).
    pub const BLK: Self = Self(2);
    /// Console (5.3).
    pub const CONSOLE: Self = Self(3);
    /// Entropy source (5.4).
    pub const RNG: Self = Self(4);
    /// Memory balloon (5.5).
    pub const BALLOON: Self = Self(5);
    /// Socket device (5.10).
    pub const VSOCK: Self = Self(19);
    /// IOMMU (5.13).
    pub const IOMMU: Self = Self(23);
    /// Memory device (5.15).
    pub const MEM: Self = Self(24);
    /// File system (5.11).
    pub const FS: Self = Self(26);
    /// Persistent memory (5.19).
    pub const PMEM: Self = Self(27);
}

/// When a device wants to be polled next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Not before a notification, or until its backend has something.
    Idle,
    /// At once: it stopped at its bound and there is more to do.
    Again,
    /// At this time, in the nanoseconds that `poll` is given.
    At(u64),
}

impl Next {
    /// The earlier of two.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::Again, _) | (_, Self::Again) => Self::Again,
            (Self::At(a), Self::At(b)) => Self::At(a.min(b)),
            (Self::At(t), Self::Idle) | (Self::Idle, Self::At(t)) => Self::At(t),
            (Self::Idle, Self::Idle) => Self::Idle,
        }
    }
}

/// What the driver did that the device cannot go on after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A ring or a chain is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// A buffer is not in memory.
    #[error(transparent)]
    Memory(#[from] MemoryFault),
    /// A chain has fewer bytes than a request needs for any answer at all.
    #[error("a request cut short by {0} bytes")]
    Short(u64),
    /// A request to which the specification knows no answer.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
}

impl From<ReadError> for DeviceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Memory(fault) => Self::Memory(fault),
            ReadError::Short(bytes) => Self::Short(bytes),
        }
    }
}

/// A virtio device: configuration space, features and the processing of its queues.
///
/// The transport calls it in this order: anything about features and configuration; then
/// [`activate`](Self::activate) once the driver is ready; then [`process`](Self::process) and
/// [`poll`](Self::poll) any number of times; then [`reset`](Self::reset), after which it is as new.
pub trait Device<M: GuestMemory>: Send {
    /// The type of the device.
    fn id(&self) -> DeviceId;

    /// The device's own features: those of [`Features::RINGS`] are the transport's to offer.
    fn features(&self) -> Features;

    /// The largest size of each queue; the length is the number of queues.
    fn queues(&self) -> &[u16];

    /// What chains of a queue may be at most.
    fn bounds(&self, queue: u16) -> Bounds {
        let size = self.queues().get(usize::from(queue)).copied();
        Bounds::for_queue(size.unwrap_or(0))
    }

    /// Copies bytes of the configuration space; what lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration space, of any width at any offset. What is not writable
    /// stays as it is.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready, and these features were agreed on.
    fn activate(&mut self, _features: Features) {}

    /// Forgets everything about the driver, above all chains that were not returned.
    fn reset(&mut self);

    /// Forgets the chains of one queue, which is being reset.
    fn reset_queue(&mut self, _queue: u16) {}

    /// Processes a queue that the driver says has something new.
    ///
    /// # Errors
    ///
    /// The driver broke a rule; the device will not be called again before a reset.
    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError>;

    /// Looks whether the backend has something for the driver.
    ///
    /// # Errors
    ///
    /// As for [`process`](Self::process).
    fn poll(&mut self, _io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        Ok(Next::Idle)
    }
}

/// Answers a read of a configuration space that exists as bytes.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    for (i, byte) in data.iter_mut().enumerate() {
        let at = offset.checked_add(i as u64);
        let at = at.and_then(|at| usize::try_from(at).ok());
        *byte = at.and_then(|at| config.get(at).copied()).unwrap_or(0);
    }
}

/// A queue with the two flags that say what came of using it.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) queue: Option<Queue>,
    /// The driver is to be interrupted.
    pub(crate) signal: bool,
    /// The driver has notified, or processing stopped at its bound.
    pub(crate) pending: bool,
}

/// What a device may reach while it is being called: memory, its queues, the time, and the
/// configuration-change notification.
#[derive(Debug)]
pub struct Io<'a, M> {
    memory: &'a M,
    slots: &'a mut [Slot],
    now: u64,
    config_changed: &'a mut bool,
    failed: &'a mut Option<u16>,
}

impl<'a, M: GuestMemory> Io<'a, M> {
    pub(crate) fn new(
        memory: &'a M,
        slots: &'a mut [Slot],
        now: u64,
        config_changed: &'a mut bool,
        failed: &'a mut Option<u16>,
    ) -> Self {
        Self {
            memory,
            slots,
            now,
            config_changed,
            failed,
        }
    }

    /// The memory of the guest as the device reaches it.
    pub fn memory(&self) -> &'a M {
        self.memory
    }

    /// The time of the last poll, in nanoseconds from an arbitrary start.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&mut self) {
        *self.config_changed = true;
    }

    /// A queue, if the driver has enabled it.
    #[inline]
    pub fn queue(&mut self, index: u16) -> Option<QueueIo<'_, M>> {
        let slot = self.slots.get_mut(usize::from(index))?;
        *self.failed = Some(index);
        Some(QueueIo {
            memory: self.memory,
            queue: slot.queue.as_mut()?,
            signal: &mut slot.signal,
        })
    }

    /// Takes each available chain of a queue, gives it to `handle` together with the memory, and
    /// returns it with the number of bytes that `handle` wrote. At most as many chains as the
    /// queue has places; [`Next::Again`] says that there may be more.
    ///
    /// # Errors
    ///
    /// The queue is broken, or `handle` says so. Chains already handled are returned nevertheless.
    #[inline]
    pub fn serve(
        &mut self,
        index: u16,
        mut handle: impl FnMut(&'a M, &Chain<'_>) -> Result<u32, DeviceError>,
    ) -> Result<Next, DeviceError> {
        let memory = self.memory;
        let Some(mut queue) = self.queue(index) else {
            return Ok(Next::Idle);
        };
        queue.queue.mute(memory)?;
        let mut budget = queue.queue.size();
        loop {
            while budget > 0 {
                let Some(chain) = queue.queue.pop(memory)? else {
                    break;
                };
                let written = match handle(memory, &chain) {
                    Ok(written) => written,
                    Err(error) => {
                        queue.publish()?;
                        return Err(error);
                    }
                };
                let token = chain.into_token();
                queue.complete(token, written)?;
                budget -= 1;
            }
            queue.publish()?;
            if budget == 0 {
                return Ok(Next::Again);
            }
            if !queue.queue.listen(memory)? {
                return Ok(Next::Idle);
            }
            // Counted, since a packed ring can be made to look available without end.
            budget -= 1;
        }
    }
}

/// One queue of a device, with its memory.
#[derive(Debug)]
pub struct QueueIo<'a, M> {
    memory: &'a M,
    queue: &'a mut Queue,
    signal: &'a mut bool,
}

impl<'a, M: GuestMemory> QueueIo<'a, M> {
    /// The memory of the guest as the device reaches it.
    pub fn memory(&self) -> &'a M {
        self.memory
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain. When there is none, the driver will notify as soon as there is.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Chain<'_>>, QueueError> {
        if !self.queue.is_available(self.memory)? && !self.queue.listen(self.memory)? {
            return Ok(None);
        }
        self.queue.pop(self.memory)
    }

    /// See [`Queue::complete`].
    #[inline]
    pub fn complete(&mut self, token: Token, written: u32) -> Result<(), QueueError> {
        self.queue.complete(self.memory, token, written)
    }

    /// See [`Queue::give_back`].
    #[inline]
    pub fn give_back(&mut self, token: Token) {
        self.queue.give_back(token);
    }

    /// Shows the driver what was returned, and interrupts it if it wants that.
    #[inline]
    pub fn publish(&mut self) -> Result<(), QueueError> {
        *self.signal |= self.queue.publish(self.memory)?;
        Ok(())
    }
}
