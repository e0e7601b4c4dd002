//! Descriptors: the sixteen bytes that both formats begin alike (VIRTIO 1.3, 2.7.5 and 2.8.5).

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{Gpa, GuestMemory};

use super::{Limits, QueueError, Segment};

/// The flags of a descriptor, where a format has them in its [`tail`](Descriptor::tail): tests of
/// bits in place are cheaper than moving them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    /// The chain continues in another descriptor.
    pub(super) next: u32,
    /// The device writes the buffer; otherwise it reads it.
    pub(super) write: u32,
    /// The buffer is a table of descriptors.
    pub(super) indirect: u32,
}

impl Flags {
    /// The flags that begin with bit `at`.
    pub(super) const fn at(at: u32) -> Self {
        Self {
            next: 1 << at,
            write: 2 << at,
            indirect: 4 << at,
        }
    }
}

/// One descriptor as copied from guest memory. `tail` is the last 32 bits, in which the formats
/// differ: flags and next index (split), or buffer number and flags (packed).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) gpa: Gpa,
    pub(super) len: u32,
    pub(super) tail: u32,
}

impl Descriptor {
    /// From the two halves as the ring holds them.
    #[inline]
    pub(super) const fn from_words(address: u64, rest: u64) -> Self {
        Self {
            gpa: Gpa(address),
            len: rest as u32,
            tail: (rest >> 32) as u32,
        }
    }
}

/// What was taken from a ring: its number, the ring places it occupies, and how many of the
/// collected segments there are, the readable ones first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) id: u16,
    pub(super) descriptors: u16,
    pub(super) readable: usize,
    pub(super) segments: usize,
}

/// Whether a buffer that is not empty goes on past the last address. It may end with it.
#[inline(always)]
fn wraps(gpa: Gpa, len: u32) -> bool {
    gpa.0 > u64::from(len).wrapping_neg()
}

/// A table of descriptors: a ring's own, or an indirect one.
///
/// The two halves of a descriptor are copied apart, each exactly once.
pub(super) trait Table: Sized {
    /// Whether nobody sees which error it is.
    const SILENT: bool;

    /// The number of descriptors.
    fn len(&self) -> u32;

    /// The first half of a descriptor: the address.
    fn address(&self, index: u32) -> Result<u64, QueueError>;

    /// The second half: the length, and in which the formats differ.
    fn rest(&self, index: u32) -> Result<u64, QueueError>;

    /// Another table, for a descriptor that refers to it.
    fn other(&self, table: Gpa, count: u32) -> Result<Self, QueueError>;

    /// Copies a descriptor.
    #[inline(always)]
    fn read(&self, index: u32) -> Result<Descriptor, QueueError> {
        let rest = self.rest(index)?;
        Ok(Descriptor::from_words(self.address(index)?, rest))
    }
}

/// No descriptor has this number.
#[inline(always)]
fn no_descriptor(index: u32, size: u32) -> QueueError {
    QueueError::DescriptorIndex {
        index: index as u16,
        size: size as u16,
    }
}

/// A chain cannot be taken over near tables: one of them is not near, or something is wrong with it.
#[derive(Debug)]
pub(super) struct Distant;

/// A table that is one piece of memory, which was found once for all descriptors.
#[derive(Debug)]
pub(super) struct Near<'m, M> {
    memory: &'m M,
    descriptors: &'m [[AtomicU64; 2]],
}

impl<M> Clone for Near<'_, M> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Near<'_, M> {}

impl<'m, M: GuestMemory> Near<'m, M> {
    /// The table, if it is such a one.
    #[inline(always)]
    pub(super) fn find(memory: &'m M, table: Gpa, count: u32) -> Option<Self> {
        let words = memory.words(table, 2 * count as usize)?;
        let (descriptors, _) = words.as_chunks();
        Some(Self {
            memory,
            descriptors,
        })
    }

    /// Stores the second half of a descriptor.
    #[inline(always)]
    pub(super) fn store_rest(&self, index: u32, rest: u64) -> Result<(), QueueError> {
        self.get(index)?[1].store(rest, Ordering::Release);
        Ok(())
    }

    #[inline(always)]
    fn get(&self, index: u32) -> Result<&'m [AtomicU64; 2], QueueError> {
        let descriptor = self.descriptors.get(index as usize);
        descriptor.ok_or_else(|| no_descriptor(index, self.len()))
    }
}

impl<M: GuestMemory> Table for Near<'_, M> {
    const SILENT: bool = true;

    #[inline(always)]
    fn len(&self) -> u32 {
        self.descriptors.len() as u32
    }

    #[inline(always)]
    fn address(&self, index: u32) -> Result<u64, QueueError> {
        let [address, _] = self.get(index)?;
        Ok(address.load(Ordering::Acquire))
    }

    #[inline(always)]
    fn rest(&self, index: u32) -> Result<u64, QueueError> {
        let [_, rest] = self.get(index)?;
        Ok(rest.load(Ordering::Acquire))
    }

    #[inline(always)]
    fn other(&self, table: Gpa, count: u32) -> Result<Self, QueueError> {
        // Whoever walks near tables walks anew over far ones when there is none.
        Self::find(self.memory, table, count).ok_or(QueueError::IndirectLength(0))
    }
}

/// A table wherever it is, looked up at each access: behind an IOMMU, in pages that come and go,
/// across the border of two ranges, or (an indirect one) not aligned.
#[derive(Debug)]
pub(super) struct Far<'m, M> {
    memory: &'m M,
    table: Gpa,
    count: u32,
}

impl<'m, M: GuestMemory> Far<'m, M> {
    pub(super) fn new(memory: &'m M, table: Gpa, count: u32) -> Self {
        Self {
            memory,
            table,
            count,
        }
    }

    fn half(&self, index: u32, offset: u64) -> Result<u64, QueueError> {
        if index >= self.count {
            return Err(no_descriptor(index, self.count));
        }
        let at = self.table.wrapping_add(16 * u64::from(index) + offset);
        if at.0.is_multiple_of(8) {
            return Ok(self.memory.load_u64(at)?);
        }
        let mut bytes = [0; 8];
        self.memory.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl<M: GuestMemory> Table for Far<'_, M> {
    const SILENT: bool = false;

    fn len(&self) -> u32 {
        self.count
    }

    fn address(&self, index: u32) -> Result<u64, QueueError> {
        self.half(index, 0)
    }

    fn rest(&self, index: u32) -> Result<u64, QueueError> {
        self.half(index, 8)
    }

    fn other(&self, table: Gpa, count: u32) -> Result<Self, QueueError> {
        Ok(Self::new(self.memory, table, count))
    }
}

/// Collects the segments of one chain and enforces the bounds.
///
/// The counters are whole words and everything is inlined into the walk, so that it lives in
/// registers: this is the innermost loop of every device.
pub(super) struct Collector<'w> {
    /// A place for each descriptor that the chain may have, but for the empty ones met.
    segments: &'w mut [Segment],
    limits: &'w Limits,
    collected: usize,
    /// The flag, once a writable segment has been met; before it, `readable` says nothing.
    direction: u32,
    readable: usize,
    bytes: u64,
}

impl<'w> Collector<'w> {
    #[inline(always)]
    pub(super) fn new(segments: &'w mut [Segment], limits: &'w Limits) -> Self {
        Self {
            segments,
            limits,
            collected: 0,
            direction: 0,
            readable: 0,
            bytes: 0,
        }
    }

    #[inline(always)]
    pub(super) fn finish(self, id: u16, descriptors: u16) -> Result<Taken, QueueError> {
        if self.bytes > self.limits.max_bytes {
            return Err(QueueError::TooManyBytes(self.limits.max_bytes as u32));
        }
        Ok(Taken {
            id,
            descriptors,
            readable: if self.direction == 0 {
                self.collected
            } else {
                self.readable
            },
            segments: self.collected,
        })
    }

    /// The descriptors met.
    #[inline(always)]
    pub(super) fn met(&self) -> u32 {
        // Each empty one has taken a place away, so this neither wraps nor exceeds the bound.
        let empty = usize::from(self.limits.segments).wrapping_sub(self.segments.len());
        self.collected.wrapping_add(empty) as u32
    }

    /// Adds one buffer. Empty ones count as descriptors, which bounds every loop, but make no
    /// segment.
    #[inline(always)]
    pub(super) fn push(&mut self, descriptor: Descriptor, flags: Flags) -> Result<(), QueueError> {
        let Descriptor { gpa, len, tail } = descriptor;
        let Some(place) = self.segments.get_mut(self.collected) else {
            return Err(QueueError::TooManySegments(self.limits.segments));
        };
        if (tail ^ self.direction) & flags.write != 0 {
            if self.direction != 0 {
                return Err(QueueError::ReadableAfterWritable);
            }
            self.direction = flags.write;
            self.readable = self.collected;
        }
        // At most 2^15 lengths below 2^32: the sum does not wrap.
        self.bytes = self.bytes.wrapping_add(len.into());
        if len != 0 {
            if wraps(gpa, len) {
                return Err(QueueError::Wraps { gpa, len });
            }
            *place = Segment { gpa, len };
            self.collected += 1;
        } else if let Some((_, rest)) = core::mem::take(&mut self.segments).split_last_mut() {
            self.segments = rest;
        }
        Ok(())
    }

    /// The number of descriptors in the indirect table that `descriptor` refers to, if the driver
    /// may use one here and it lies within the bounds.
    #[inline]
    pub(super) fn indirect_table(
        &self,
        descriptor: Descriptor,
        flags: Flags,
    ) -> Result<u32, QueueError> {
        let Descriptor { gpa, len, tail } = descriptor;
        if !self.limits.indirect {
            return Err(QueueError::IndirectNotNegotiated);
        }
        if tail & flags.next != 0 {
            return Err(QueueError::IndirectWithNext);
        }
        let count = len / 16;
        if len == 0 || len % 16 != 0 || count > u16::MAX.into() {
            return Err(QueueError::IndirectLength(len));
        }
        if wraps(gpa, len) {
            return Err(QueueError::Wraps { gpa, len });
        }
        Ok(count)
    }
}
