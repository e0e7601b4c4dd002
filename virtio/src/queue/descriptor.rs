//! Descriptors: the sixteen bytes that both formats begin alike (VIRTIO 1.3, 2.7.5 and 2.8.5).

use testudo_arch::{Gpa, GuestMemory};

use super::{Limits, QueueError, Segment};

/// The chain continues in another descriptor.
pub(super) const NEXT: u16 = 1;
/// The device writes the buffer; otherwise it reads it.
pub(super) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;

/// One descriptor as copied from guest memory. `tail` is the last 32 bits, in which the formats
/// differ: flags and next index (split), or buffer number and flags (packed).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) gpa: Gpa,
    pub(super) len: u32,
    tail: u32,
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

    /// Copies a descriptor out of a table.
    #[inline]
    pub(super) fn read<M: GuestMemory>(
        memory: &M,
        table: Gpa,
        index: u16,
    ) -> Result<Self, QueueError> {
        let at = table.wrapping_add(16 * u64::from(index));
        // The next descriptor waits for this one: two loads reach registers sooner than a copy.
        // Indirect tables need not be aligned.
        if at.0.is_multiple_of(8) {
            let rest = memory.load_u64(at.wrapping_add(8))?;
            let address = memory.load_u64(at)?;
            return Ok(Self::from_words(address, rest));
        }
        let mut bytes = [0; 16];
        memory.read(at, &mut bytes)?;
        let bits = u128::from_le_bytes(bytes);
        Ok(Self::from_words(bits as u64, (bits >> 64) as u64))
    }

    /// The flags where the split format has them.
    #[inline]
    pub(super) const fn split_flags(self) -> u16 {
        self.tail as u16
    }

    /// The index of the next descriptor (split).
    #[inline]
    pub(super) const fn next(self) -> u16 {
        (self.tail >> 16) as u16
    }

    /// The flags where the packed format has them.
    #[inline]
    pub(super) const fn packed_flags(self) -> u16 {
        (self.tail >> 16) as u16
    }

    /// The buffer number (packed).
    #[inline]
    pub(super) const fn id(self) -> u16 {
        self.tail as u16
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

/// Whether a buffer goes on past the last address. It may end with it.
#[inline(always)]
fn wraps(gpa: Gpa, len: u32) -> bool {
    let end = gpa.0.wrapping_add(len.into());
    end < gpa.0 && end != 0
}

/// Collects the segments of one chain and enforces the bounds.
///
/// The counters are whole words, everything is inlined into the walk, and indirect tables take and
/// return the collector by value, so that it lives in registers: this is the innermost loop of
/// every device.
pub(super) struct Collector<'w> {
    segments: &'w mut [Segment],
    limits: Limits,
    /// Descriptors met, empty ones included.
    seen: usize,
    collected: usize,
    /// The readable segments, once a writable one has been met.
    readable: Option<usize>,
    bytes: u64,
}

impl<'w> Collector<'w> {
    #[inline(always)]
    pub(super) fn new(segments: &'w mut [Segment], limits: Limits) -> Self {
        Self {
            segments,
            limits,
            seen: 0,
            collected: 0,
            readable: None,
            bytes: 0,
        }
    }

    #[inline(always)]
    pub(super) fn finish(self, id: u16, descriptors: u16) -> Taken {
        Taken {
            id,
            descriptors,
            readable: self.readable.unwrap_or(self.collected),
            segments: self.collected,
        }
    }

    /// Adds one buffer. Empty ones count as descriptors, which bounds every loop, but make no
    /// segment.
    #[inline(always)]
    pub(super) fn push(&mut self, descriptor: Descriptor, flags: u16) -> Result<(), QueueError> {
        let limit = self.segments.len();
        if self.seen >= limit {
            return Err(QueueError::TooManySegments(limit as u16));
        }
        self.seen += 1;
        let Descriptor { gpa, len, .. } = descriptor;
        if wraps(gpa, len) {
            return Err(QueueError::Wraps { gpa, len });
        }
        self.bytes += u64::from(len);
        if self.bytes > self.limits.max_bytes {
            return Err(QueueError::TooManyBytes(self.limits.max_bytes as u32));
        }
        match (flags & WRITE != 0, self.readable) {
            (true, None) => self.readable = Some(self.collected),
            (false, Some(_)) => return Err(QueueError::ReadableAfterWritable),
            _ => {}
        }
        // There is a place, since no more were collected than seen.
        if len != 0
            && let Some(segment) = self.segments.get_mut(self.collected)
        {
            *segment = Segment { gpa, len };
            self.collected += 1;
        }
        Ok(())
    }

    /// The number of descriptors in the indirect table that `descriptor` refers to, if the driver
    /// may use one here and it lies within the bounds.
    #[inline]
    pub(super) fn indirect_table(
        &self,
        descriptor: Descriptor,
        flags: u16,
    ) -> Result<u16, QueueError> {
        let Descriptor { gpa, len, .. } = descriptor;
        if !self.limits.indirect {
            return Err(QueueError::IndirectNotNegotiated);
        }
        if flags & NEXT != 0 {
            return Err(QueueError::IndirectWithNext);
        }
        let count = u16::try_from(len / 16).unwrap_or(u16::MAX);
        if len == 0 || len % 16 != 0 || u32::from(count) * 16 != len {
            return Err(QueueError::IndirectLength(len));
        }
        if wraps(gpa, len) {
            return Err(QueueError::Wraps { gpa, len });
        }
        Ok(count)
    }
}
