//! The packed ring (VIRTIO 1.3, 2.8).
//!
//! Driver and device write the same descriptors. A place is available when its AVAIL bit equals
//! the device's wrap counter and its USED bit does not; it is used when both equal it. The last
//! eight bytes of a descriptor (length, buffer number, flags) move in one atomic access, so a
//! place is seen either whole or not at all.

use core::sync::atomic::{Ordering, fence};

use testudo_arch::{Gpa, GuestMemory};

use super::descriptor::{Collector, Descriptor, INDIRECT, NEXT, Taken, WRITE};
use super::{Limits, QueueConfig, QueueError, Segment};

/// The descriptor is available when this equals the wrap counter.
const AVAIL: u16 = 1 << 7;
/// The descriptor is used when this equals the wrap counter too.
const USED: u16 = 1 << 15;

/// Event flags: notify always, never, at a given place (2.8.10).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring and the lap it is in, as the place on a line of two laps: the wrap counter
/// is 1 on the first.
///
/// One number, so that the processor never reads together what it has just written apart. Places
/// and counts are at most 65536, so no sum here wraps; the arithmetic that could not tell is the
/// faster one.
#[derive(Clone, Copy, Debug)]
struct Position(u32);

impl Position {
    /// The place that an event structure names, which may not exist in a ring of this size.
    #[inline]
    fn from_event(event: u32, size: u32) -> Self {
        let wrap = event & 0x8000 != 0;
        Self((event & 0x7FFF) + if wrap { 0 } else { size })
    }

    #[inline]
    fn wrap(self, size: u32) -> bool {
        self.0 < size
    }

    #[inline]
    fn index(self, size: u32) -> u32 {
        if self.wrap(size) {
            self.0
        } else {
            self.0.wrapping_sub(size)
        }
    }

    /// The place `count` further on; `count` is at most `size`.
    #[inline]
    fn advance(self, count: u32, size: u32) -> Self {
        let sum = self.0.wrapping_add(count);
        let lap = size << 1;
        Self(if sum >= lap {
            sum.wrapping_sub(lap)
        } else {
            sum
        })
    }

    /// How far `self` is past `earlier`, less than two laps.
    #[inline]
    fn since(self, earlier: Self, size: u32) -> u32 {
        let ahead = self.0.wrapping_sub(earlier.0);
        if self.0 >= earlier.0 {
            ahead
        } else {
            ahead.wrapping_add(size << 1)
        }
    }

    /// The place `count` before; `count` is at most `size`.
    #[inline]
    fn retreat(self, count: u32, size: u32) -> Self {
        self.advance((size << 1).wrapping_sub(count), size)
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    size: u32,
    ring: Gpa,
    driver_event: Gpa,
    device_event: Gpa,
    event_idx: bool,
    /// The next place to take from. What lies between the next to return to and it is with the
    /// device.
    next_available: Position,
    next_used: Position,
    /// The end of what the driver has been shown.
    published: Position,
    /// The second half of the first descriptor that it has not: its flags will show all of them.
    hidden: u64,
    muted: bool,
}

impl Packed {
    pub(super) fn new(config: &QueueConfig, event_idx: bool) -> Self {
        Self {
            size: config.size.into(),
            ring: config.descriptors,
            driver_event: config.driver,
            device_event: config.device,
            event_idx,
            next_available: Position(0),
            next_used: Position(0),
            published: Position(0),
            hidden: 0,
            muted: false,
        }
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.size as u16
    }

    /// Where the second half of a descriptor is: length, buffer number, flags.
    #[inline]
    fn second_half(&self, index: u32) -> Gpa {
        self.ring.wrapping_add(16 * u64::from(index) + 8)
    }

    /// The second half of the next descriptor, if it is available.
    #[inline]
    fn available<M: GuestMemory>(&self, memory: &M) -> Result<Option<u64>, QueueError> {
        let next = self.next_available;
        let half = memory.load_u64(self.second_half(next.index(self.size)))?;
        let flags = (half >> 48) as u16;
        let expected = if next.wrap(self.size) { AVAIL } else { USED };
        Ok((flags & (AVAIL | USED) == expected).then_some(half))
    }

    /// The places that are not with the device. Without one, the ring has nothing more to offer,
    /// whatever the flags say.
    #[inline]
    fn room(&self) -> u32 {
        let in_flight = self.next_available.since(self.next_used, self.size);
        self.size.saturating_sub(in_flight)
    }

    /// Whether there is a chain to take.
    #[inline]
    pub(super) fn more<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        Ok(self.room() > 0 && self.available(memory)?.is_some())
    }

    #[inline(always)]
    pub(super) fn pop<M: GuestMemory>(
        &mut self,
        memory: &M,
        segments: &mut [Segment],
        limits: Limits,
    ) -> Result<Option<Taken>, QueueError> {
        let room = self.room();
        if room == 0 {
            return Ok(None);
        }
        let Some(mut half) = self.available(memory)? else {
            return Ok(None);
        };
        let mut collector = Collector::new(segments, limits);
        let mut index = self.next_available.index(self.size);
        let mut count = 0;
        let id = loop {
            if count >= room {
                return Err(QueueError::TooManyInFlight(self.size()));
            }
            count += 1;
            let address = memory.load_u64(self.ring.wrapping_add(16 * u64::from(index)))?;
            let descriptor = Descriptor::from_words(address, half);
            let flags = descriptor.packed_flags();
            if flags & INDIRECT != 0 {
                let entries = collector.indirect_table(descriptor, flags)?;
                collector = collect_indirect(memory, descriptor.gpa, entries, collector)?;
                break descriptor.id();
            }
            collector.push(descriptor, flags)?;
            if flags & NEXT == 0 {
                break descriptor.id();
            }
            index = if index + 1 == self.size { 0 } else { index + 1 };
            half = memory.load_u64(self.second_half(index))?;
        };
        self.next_available = self.next_available.advance(count, self.size);
        Ok(Some(collector.finish(id, count as u16)))
    }

    #[inline]
    pub(super) fn give_back(&mut self, descriptors: u16) {
        self.next_available = self.next_available.retreat(descriptors.into(), self.size);
    }

    #[inline]
    pub(super) fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        id: u16,
        descriptors: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let place = self.next_used;
        let mut flags = if place.wrap(self.size) {
            AVAIL | USED
        } else {
            0
        };
        if written > 0 {
            flags |= WRITE;
        }
        let half = u64::from(written) | (u64::from(id) << 32) | (u64::from(flags) << 48);
        if place.0 == self.published.0 {
            self.hidden = half;
        } else {
            memory.store_u64(self.second_half(place.index(self.size)), half)?;
        }
        self.next_used = place.advance(descriptors.into(), self.size);
        Ok(())
    }

    #[inline]
    pub(super) fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let first = self.published;
        let used = self.next_used.since(first, self.size);
        if used == 0 {
            return Ok(false);
        }
        memory.store_u64(self.second_half(first.index(self.size)), self.hidden)?;
        self.published = self.next_used;
        fence(Ordering::SeqCst);
        let event = memory.load_u32(self.driver_event)?;
        Ok(match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // A place that the ring does not have is passed as little as any other.
                let lap = 2 * self.size;
                let at = Position::from_event(event, self.size).0 % lap;
                let passed = (self.next_used.0 + 2 * lap - at - 1) % lap;
                passed < used
            }
            _ => true,
        })
    }

    #[inline]
    pub(super) fn mute<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        if !self.muted {
            memory.store_u32(self.device_event, u32::from(EVENT_DISABLE) << 16)?;
            self.muted = true;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn listen<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if self.event_idx {
            let next = self.next_available;
            let place = next.index(self.size) | (u32::from(next.wrap(self.size)) << 15);
            memory.store_u32(self.device_event, place | (u32::from(EVENT_DESC) << 16))?;
        } else if self.muted {
            memory.store_u32(self.device_event, u32::from(EVENT_ENABLE) << 16)?;
        }
        self.muted = false;
        fence(Ordering::SeqCst);
        self.more(memory)
    }
}

/// Collects all `count` descriptors of an indirect table: in this format the table's length, not
/// NEXT, says where the chain ends (2.8.7).
#[inline(never)]
fn collect_indirect<'w, M: GuestMemory>(
    memory: &M,
    table: Gpa,
    count: u16,
    mut collector: Collector<'w>,
) -> Result<Collector<'w>, QueueError> {
    for index in 0..count {
        let descriptor = Descriptor::read(memory, table, index)?;
        let flags = descriptor.packed_flags();
        if flags & INDIRECT != 0 {
            return Err(QueueError::NestedIndirect);
        }
        collector.push(descriptor, flags)?;
    }
    Ok(collector)
}
