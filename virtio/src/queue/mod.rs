//! Virtqueues from the device's side: split and packed rings behind one type.
//!
//! A [`QueueConfig`] is what the driver may change; [`QueueConfig::activate`] checks it once and
//! gives a [`Queue`], whose geometry nothing can change any more. A queue hands out [`Chain`]s:
//! descriptors that were copied from guest memory exactly once, checked, and sorted into readable
//! and writable [`Segment`]s. What a driver does wrong is a [`QueueError`], after which the device
//! needs a reset; nothing it does makes a queue loop, allocate or panic.

mod chain;
mod descriptor;
mod packed;
mod split;
#[cfg(test)]
mod tests;

pub use chain::{Chain, ReadError, Reader, Segment, Token, Writer};

use alloc::boxed::Box;
use alloc::vec;

use testudo_arch::{Gpa, GuestMemory, MemoryFault};

use crate::Features;
use descriptor::{Distant, Taken};
use packed::Packed;
use split::Split;

/// The largest queue of either format (VIRTIO 1.3, 2.7 and 2.8.10.1).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// What a chain may be at most. The device sets it; a chain beyond it is an error of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Descriptors in one chain, those of an indirect table included.
    pub segments: u16,
    /// Bytes in one chain, readable and writable together.
    pub bytes: u32,
}

impl Bounds {
    /// As many descriptors as `max_size`, the longest queue, and as many bytes as the
    /// specification allows a chain to have.
    pub const fn for_queue(max_size: u16) -> Self {
        Self {
            segments: max_size,
            bytes: u32::MAX,
        }
    }
}

/// What a driver did wrong with a queue. The device needs a reset afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The ring, an indirect table or a buffer is not (all) in memory.
    #[error(transparent)]
    Memory(#[from] MemoryFault),
    /// More chains became available than the queue has places (2.7.13.3).
    #[error("available index {index} is more than {size} past {next}")]
    AvailableIndex {
        /// The index that the driver published.
        index: u16,
        /// The index of the chain that the device takes next.
        next: u16,
        /// The queue's size.
        size: u16,
    },
    /// A chain begins or continues at a descriptor that does not exist.
    #[error("descriptor {index} of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// The number of descriptors in the table.
        size: u16,
    },
    /// The driver offered a chain again that the device has not returned.
    #[error("chain {0} is already with the device")]
    InFlight(u16),
    /// More descriptors are with the device than the packed ring has.
    #[error("more than {0} descriptors in flight")]
    TooManyInFlight(u16),
    /// The chain loops, or is longer than the device's bound.
    #[error("a chain of more than {0} descriptors")]
    TooManySegments(u16),
    /// The chain has more bytes than the device's bound.
    #[error("a chain of more than {0} bytes")]
    TooManyBytes(u32),
    /// A buffer wraps around the end of the address space.
    #[error("a buffer of {len:#x} bytes at {gpa} wraps around")]
    Wraps {
        /// Where it begins.
        gpa: Gpa,
        /// Its length.
        len: u32,
    },
    /// A buffer for the device to read comes after one for it to write (2.7.4.2).
    #[error("a readable buffer after a writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor without the feature.
    #[error("indirect descriptors were not negotiated")]
    IndirectNotNegotiated,
    /// An indirect descriptor in an indirect table.
    #[error("an indirect descriptor in an indirect table")]
    NestedIndirect,
    /// A descriptor has both INDIRECT and NEXT (2.7.5.3.1).
    #[error("a descriptor that is indirect and continues")]
    IndirectWithNext,
    /// The length of an indirect table is zero, odd or beyond the bound.
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// The device returned a chain out of turn although it had promised order.
    #[error("chains returned out of order")]
    OutOfOrder,
}

/// Why a queue that the driver configured cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ActivateError {
    /// The size is zero, beyond the device's maximum, or not a power of two for a split ring.
    #[error("a queue of {size} descriptors (at most {max})")]
    Size {
        /// What the driver set.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A part of the ring is not aligned (2.7, 2.8.10.1).
    #[error("the {area} at {gpa} is not aligned to {align} bytes")]
    Alignment {
        /// Which part.
        area: &'static str,
        /// Where the driver put it.
        gpa: Gpa,
        /// The alignment it needs.
        align: u64,
    },
    /// A part of the ring is not memory.
    #[error("the {area} at {gpa} is not in memory")]
    NotMemory {
        /// Which part.
        area: &'static str,
        /// Where the driver put it.
        gpa: Gpa,
    },
    /// What the device writes overlaps another part of the ring.
    #[error("the {first} overlaps the {second}")]
    Overlap {
        /// The part that the device writes.
        first: &'static str,
        /// The part it overlaps.
        second: &'static str,
    },
}

/// A queue as the driver configures it, before it is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    max_size: u16,
    /// The number of descriptors.
    pub size: u16,
    /// The descriptor table, or the packed descriptor ring.
    pub descriptors: Gpa,
    /// The available ring, or the driver event suppression structure.
    #[doc(alias = "avail")]
    pub driver: Gpa,
    /// The used ring, or the device event suppression structure.
    #[doc(alias = "used")]
    pub device: Gpa,
}

/// A part of a ring: name, address, length, alignment.
type Area = (&'static str, Gpa, u64, u64);

impl QueueConfig {
    /// A queue of which the device offers `max_size` descriptors (at most [`MAX_QUEUE_SIZE`]).
    pub const fn new(max_size: u16) -> Self {
        let max_size = if max_size > MAX_QUEUE_SIZE {
            MAX_QUEUE_SIZE
        } else {
            max_size
        };
        Self {
            max_size,
            size: max_size,
            descriptors: Gpa(0),
            driver: Gpa(0),
            device: Gpa(0),
        }
    }

    /// The largest number of descriptors.
    pub const fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Checks the configuration and turns it into a queue in the format that `features` names.
    ///
    /// # Errors
    ///
    /// The size, alignment or place of a part is not what VIRTIO 1.3, 2.7 or 2.8 demands.
    pub fn activate<M: GuestMemory>(
        &self,
        features: Features,
        bounds: Bounds,
        memory: &M,
    ) -> Result<Queue, ActivateError> {
        let packed = features.contains(Features::RING_PACKED);
        let size = u64::from(self.size);
        if self.size == 0 || self.size > self.max_size || (!packed && !self.size.is_power_of_two())
        {
            return Err(ActivateError::Size {
                size: self.size,
                max: self.max_size,
            });
        }
        // The event fields at the ends of a split ring's parts exist whether or not the feature
        // was negotiated (2.7.6, 2.7.8).
        let areas: [Area; 3] = if packed {
            [
                ("descriptor ring", self.descriptors, 16 * size, 16),
                ("driver event area", self.driver, 4, 4),
                ("device event area", self.device, 4, 4),
            ]
        } else {
            [
                ("descriptor table", self.descriptors, 16 * size, 16),
                ("available ring", self.driver, 6 + 2 * size, 2),
                ("used ring", self.device, 6 + 8 * size, 4),
            ]
        };
        for (area, gpa, len, align) in areas {
            if gpa.0 & (align - 1) != 0 {
                return Err(ActivateError::Alignment { area, gpa, align });
            }
            // The last byte may be the address space's: behind an IOMMU that is an address as good
            // as any.
            if gpa.checked_add(len - 1).is_none() || !memory.contains(gpa, len) {
                return Err(ActivateError::NotMemory { area, gpa });
            }
        }
        let [ring, driver, device] = areas;
        let last = |(_, gpa, len, _): Area| gpa.0 + (len - 1);
        let overlap = |a: Area, b: Area| a.1.0 <= last(b) && b.1.0 <= last(a);
        let written_first = [(device, ring), (device, driver), (ring, driver)];
        for (first, second) in &written_first[..if packed { 3 } else { 2 }] {
            if overlap(*first, *second) {
                return Err(ActivateError::Overlap {
                    first: first.0,
                    second: second.0,
                });
            }
        }
        // A bound of zero would make every chain an error, and no device wants that.
        let most = bounds.segments.max(1);
        let segments = vec![Segment::default(); most.into()];
        let limits = Limits {
            segments: most,
            max_bytes: bounds.bytes.into(),
            indirect: features.contains(Features::INDIRECT_DESC),
        };
        let event_idx = features.contains(Features::EVENT_IDX);
        Ok(Queue {
            ring: if packed {
                Ring::Packed(Packed::new(self, event_idx))
            } else {
                Ring::Split(Split::new(self, event_idx))
            },
            segments: segments.into(),
            limits,
            in_flight: InFlight::new(if packed { 1 << 16 } else { self.size.into() }),
            in_order: features.contains(Features::IN_ORDER),
            popped: 0,
            completed: 0,
        })
    }
}

/// The chains that are with the device, one bit for each head (split) or buffer number (packed).
#[derive(Debug)]
struct InFlight(Box<[u64]>);

impl InFlight {
    fn new(ids: usize) -> Self {
        Self(vec![0; ids.div_ceil(64)].into())
    }

    /// Counts a chain as being with the device.
    #[inline(always)]
    fn take(&mut self, taken: &Taken, popped: &mut u32) -> Result<Token, QueueError> {
        if !self.insert(taken.id) {
            return Err(QueueError::InFlight(taken.id));
        }
        let sequence = *popped;
        *popped = sequence.wrapping_add(1);
        Ok(Token::new(taken.id, taken.descriptors, sequence))
    }

    /// Adds `id`; false when it is there already.
    #[inline]
    fn insert(&mut self, id: u16) -> bool {
        let (word, bit) = (usize::from(id / 64), 1 << (id % 64));
        match self.0.get_mut(word) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    #[inline]
    fn remove(&mut self, id: u16) {
        if let Some(word) = self.0.get_mut(usize::from(id / 64)) {
            *word &= !(1 << (id % 64));
        }
    }
}

/// What a chain may be, besides its number of segments.
#[derive(Clone, Copy, Debug)]
struct Limits {
    segments: u16,
    max_bytes: u64,
    indirect: bool,
}

#[derive(Debug)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

impl Ring {
    #[cold]
    #[inline(never)]
    fn pop_far<M: GuestMemory>(
        &mut self,
        memory: &M,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, QueueError> {
        match self {
            Self::Split(ring) => ring.pop_far(memory, segments, limits),
            Self::Packed(ring) => ring.pop_far(memory, segments, limits),
        }
    }
}

/// A virtqueue in use.
///
/// A device takes chains with [`pop`](Self::pop), returns each with [`complete`](Self::complete),
/// and makes a batch of returned ones visible with one [`publish`](Self::publish), which also says
/// whether the driver wants an interrupt. Before it stops looking, it calls
/// [`listen`](Self::listen), which asks for a notification and finds out whether one was missed.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    /// Where the segments of the chain being taken are collected.
    segments: Box<[Segment]>,
    limits: Limits,
    in_flight: InFlight,
    in_order: bool,
    popped: u32,
    completed: u32,
}

impl Queue {
    /// The number of descriptors.
    #[inline]
    pub fn size(&self) -> u16 {
        match &self.ring {
            Ring::Split(ring) => ring.size(),
            Ring::Packed(ring) => ring.size(),
        }
    }

    /// The number of chains that were taken and not yet returned.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.popped.wrapping_sub(self.completed) as u16
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    ///
    /// What the driver wrote is no chain within the bounds, see [`QueueError`].
    #[inline]
    pub fn pop<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain<'_>>, QueueError> {
        let (segments, limits) = (&mut *self.segments, &self.limits);
        let taken = match &mut self.ring {
            Ring::Split(ring) => ring.pop_near(memory, ring.near(memory), segments, limits),
            Ring::Packed(ring) => ring.pop_near(ring.near(memory), segments, limits),
        };
        let taken = match taken {
            Ok(Some(taken)) => taken,
            Ok(None) => return Ok(None),
            Err(Distant) => match self.ring.pop_far(memory, segments, limits)? {
                Some(taken) => taken,
                None => return Ok(None),
            },
        };
        let token = self.in_flight.take(&taken, &mut self.popped)?;
        let segments = &self.segments[..taken.segments];
        let (readable, writable) = segments.split_at(taken.readable);
        Ok(Some(Chain {
            token,
            readable,
            writable,
        }))
    }

    /// Whether a chain is available. A hostile driver may take the answer back, so a loop must not
    /// rely on [`pop`](Self::pop) to give one.
    ///
    /// # Errors
    ///
    /// The ring is no longer in memory, or its index is impossible.
    #[inline]
    pub fn is_available<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.more(memory),
            Ring::Packed(ring) => ring.more(memory),
        }
    }

    /// Takes chains until the batch is full or none is available, and says how many.
    ///
    /// The batch never grows: taking stops before a chain that might not fit.
    ///
    /// # Errors
    ///
    /// As for [`pop`](Self::pop). The chains before the faulty one are in the storage.
    #[inline]
    pub fn pop_batch<M: GuestMemory>(
        &mut self,
        memory: &M,
        batch: &mut Batch,
    ) -> Result<usize, QueueError> {
        let Self {
            ring,
            limits,
            in_flight,
            popped,
            ..
        } = self;
        match ring {
            Ring::Split(ring) => {
                let near = ring.near(memory);
                batch.fill(
                    ring,
                    limits.segments,
                    in_flight,
                    popped,
                    |ring, segments| ring.pop_near(memory, near, segments, limits),
                    |ring, segments| ring.pop_far(memory, segments, limits),
                )
            }
            Ring::Packed(ring) => {
                let near = ring.near(memory);
                batch.fill(
                    ring,
                    limits.segments,
                    in_flight,
                    popped,
                    |ring, segments| ring.pop_near(near, segments, limits),
                    |ring, segments| ring.pop_far(memory, segments, limits),
                )
            }
        }
    }

    /// Makes a chain available again, as if it had never been taken: it comes again with the next
    /// [`pop`](Self::pop). Only the chain taken last can be given back; then the one before it.
    #[inline]
    pub fn give_back(&mut self, token: Token) {
        let last = self.popped.wrapping_sub(1);
        debug_assert_eq!(
            token.sequence, last,
            "only the last chain can be given back"
        );
        match &mut self.ring {
            Ring::Split(ring) => ring.give_back(),
            Ring::Packed(ring) => ring.give_back(token.descriptors()),
        }
        self.in_flight.remove(token.id());
        self.popped = last;
    }

    /// Returns a chain into whose writable segments the device wrote `written` bytes. The driver
    /// sees it after the next [`publish`](Self::publish).
    ///
    /// # Errors
    ///
    /// The ring is no longer in memory; or order was promised and this is not the oldest chain.
    #[inline]
    pub fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        if self.in_order && token.sequence != self.completed {
            return Err(QueueError::OutOfOrder);
        }
        let (id, descriptors) = (token.id(), token.descriptors());
        self.in_flight.remove(id);
        self.completed = self.completed.wrapping_add(1);
        match &mut self.ring {
            Ring::Split(ring) => ring.complete(memory, id, written),
            Ring::Packed(ring) => ring.complete(id, descriptors, written),
        }
    }

    /// Shows the driver all chains returned since the last call, and says whether it wants an
    /// interrupt for them.
    ///
    /// # Errors
    ///
    /// The ring is no longer in memory.
    #[inline]
    pub fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(memory),
            Ring::Packed(ring) => ring.publish(memory),
        }
    }

    /// Asks the driver not to notify: the device is looking at the queue anyway. Only a hint.
    ///
    /// # Errors
    ///
    /// The ring is no longer in memory.
    #[inline]
    pub fn mute<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.mute(memory),
            Ring::Packed(ring) => ring.mute(memory),
        }
    }

    /// Asks the driver to notify when it makes the next chain available, and says whether it has
    /// done so already: then no notification may come, and the device must look again.
    ///
    /// # Errors
    ///
    /// The ring is no longer in memory, or its index is impossible.
    #[inline]
    pub fn listen<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Split(ring) => ring.listen(memory),
            Ring::Packed(ring) => ring.listen(memory),
        }
    }
}

/// Chains taken together, in storage that is allocated once.
#[derive(Debug)]
pub struct Batch {
    chains: Box<[BatchChain]>,
    segments: Box<[Segment]>,
    /// How many chains there are, and how many segments they have.
    len: usize,
    filled: usize,
}

/// A chain in a batch: its token's two halves, and how many segments of either kind it has.
#[derive(Clone, Copy, Debug, Default)]
struct BatchChain {
    chain: u32,
    sequence: u32,
    readable: u32,
    segments: u32,
}

impl Batch {
    /// Room for `chains` chains of `segments` segments altogether.
    ///
    /// A queue fills it only while a chain as long as its bound would still fit.
    pub fn new(chains: usize, segments: usize) -> Self {
        Self {
            chains: vec![BatchChain::default(); chains].into(),
            segments: vec![Segment::default(); segments].into(),
            len: 0,
            filled: 0,
        }
    }

    /// Fills the batch with the chains that `pop` finds, each of at most `bound` segments; how many
    /// there were.
    #[inline(always)]
    fn fill<R>(
        &mut self,
        ring: &mut R,
        bound: u16,
        in_flight: &mut InFlight,
        popped: &mut u32,
        near: impl Fn(&mut R, &mut [Segment]) -> Result<Option<Taken>, Distant>,
        far: impl Fn(&mut R, &mut [Segment]) -> Result<Option<Taken>, QueueError>,
    ) -> Result<usize, QueueError> {
        let before = self.len;
        while let Some(chain) = self.chains.get_mut(self.len) {
            let place = self.filled..self.filled.wrapping_add(bound.into());
            let Some(segments) = self.segments.get_mut(place) else {
                break;
            };
            let taken = match near(ring, segments) {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(Distant) => match far(ring, segments)? {
                    Some(taken) => taken,
                    None => break,
                },
            };
            let token = in_flight.take(&taken, popped)?;
            *chain = BatchChain {
                chain: token.chain,
                sequence: token.sequence,
                readable: taken.readable as u32,
                segments: taken.segments as u32,
            };
            self.filled += taken.segments;
            self.len += 1;
        }
        Ok(self.len - before)
    }

    /// Takes the chains out in order; afterwards the batch is empty.
    #[inline]
    pub fn drain(&mut self) -> impl Iterator<Item = Chain<'_>> {
        let len = core::mem::take(&mut self.len);
        self.filled = 0;
        let mut rest = &self.segments[..];
        self.chains[..len].iter().map(move |chain| {
            let (segments, after) = rest.split_at(chain.segments as usize);
            rest = after;
            let (readable, writable) = segments.split_at(chain.readable as usize);
            Chain {
                token: Token {
                    chain: chain.chain,
                    sequence: chain.sequence,
                },
                readable,
                writable,
            }
        })
    }
}
