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

/// A descriptor's offset in the ring, and in the highest bit the lap: the wrap counter is 1 where it
/// is clear.
///
/// One number, so that the processor never reads together what it has just written apart. Offsets
/// and sums of them are below 2^21, so nothing here wraps; the arithmetic that could not tell is
/// the faster one.
#[derive(Clone, Copy, Debug)]
struct Position(u32);

/// The wrap counter is 0.
const LAP: u32 = 1 << 31;
/// The size of a descriptor.
const DESCRIPTOR: u32 = 16;

impl Position {
    /// All ones on the lap where the wrap counter is 0.
    #[inline]
    fn mask(self) -> u16 {
        ((self.0 as i32) >> 31) as u16
    }

    #[inline]
    fn offset(self) -> u32 {
        self.0 & !LAP
    }

    /// AVAIL and USED of a descriptor that is available here.
    #[inline]
    fn available(self) -> u16 {
        AVAIL ^ (self.mask() & (AVAIL | USED))
    }

    /// AVAIL and USED of a descriptor that is used here.
    #[inline]
    fn used(self) -> u16 {
        !self.mask() & (AVAIL | USED)
    }

    /// The place `count` descriptors further on in a ring of `bytes`, at most a lap.
    #[inline]
    fn advance(self, count: u32, bytes: u32) -> Self {
        let next = self.0.wrapping_add(count.wrapping_mul(DESCRIPTOR));
        Self(if next & !LAP >= bytes {
            next.wrapping_sub(bytes) ^ LAP
        } else {
            next
        })
    }

    /// The place `count` descriptors before, at most a lap.
    #[inline]
    fn retreat(self, count: u32, bytes: u32) -> Self {
        let back = count.wrapping_mul(DESCRIPTOR);
        Self(if self.offset() < back {
            self.0.wrapping_add(bytes).wrapping_sub(back) ^ LAP
        } else {
            self.0.wrapping_sub(back)
        })
    }

    /// The descriptor's number on a line of two laps.
    #[inline]
    fn on_line(self, size: u32) -> u32 {
        self.offset() / DESCRIPTOR + (u32::from(self.mask()) & size)
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    size: u32,
    /// The length of the ring.
    bytes: u32,
    ring: Gpa,
    driver_event: Gpa,
    device_event: Gpa,
    event_idx: bool,
    /// The next places to take from and to return to.
    next_available: Position,
    next_used: Position,
    /// The descriptors that are with the device.
    in_flight: u32,
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
            bytes: u32::from(config.size) * DESCRIPTOR,
            ring: config.descriptors,
            driver_event: config.driver,
            device_event: config.device,
            event_idx,
            next_available: Position(0),
            next_used: Position(0),
            in_flight: 0,
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
    fn second_half(&self, at: Position) -> Gpa {
        self.ring.wrapping_add(u64::from(at.offset()) + 8)
    }

    /// The second half of the next descriptor, if it is available.
    #[inline]
    fn available<M: GuestMemory>(&self, memory: &M) -> Result<Option<u64>, QueueError> {
        let next = self.next_available;
        let half = memory.load_u64(self.second_half(next))?;
        let flags = (half >> 48) as u16;
        Ok((flags & (AVAIL | USED) == next.available()).then_some(half))
    }

    /// The places that are not with the device. Without one, the ring has nothing more to offer,
    /// whatever the flags say.
    #[inline]
    fn room(&self) -> u32 {
        self.size.saturating_sub(self.in_flight)
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
        let mut offset = self.next_available.offset();
        let mut count = 0;
        let id = loop {
            if count >= room {
                return Err(QueueError::TooManyInFlight(self.size()));
            }
            count += 1;
            let address = memory.load_u64(self.ring.wrapping_add(offset.into()))?;
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
            offset = offset.wrapping_add(DESCRIPTOR);
            if offset >= self.bytes {
                offset = 0;
            }
            half = memory.load_u64(self.second_half(Position(offset)))?;
        };
        self.next_available = self.next_available.advance(count, self.bytes);
        self.in_flight = self.in_flight.wrapping_add(count);
        Ok(Some(collector.finish(id, count as u16)))
    }

    #[inline]
    pub(super) fn give_back(&mut self, descriptors: u16) {
        let count = u32::from(descriptors);
        self.next_available = self.next_available.retreat(count, self.bytes);
        self.in_flight = self.in_flight.wrapping_sub(count);
    }

    #[inline]
    pub(super) fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        id: u16,
        descriptors: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let (place, count) = (self.next_used, u32::from(descriptors));
        let flags = place.used() | (u16::from(written > 0) * WRITE);
        let half = u64::from(written) | (u64::from(id) << 32) | (u64::from(flags) << 48);
        if place.0 == self.published.0 {
            self.hidden = half;
        } else {
            memory.store_u64(self.second_half(place), half)?;
        }
        self.next_used = place.advance(count, self.bytes);
        self.in_flight = self.in_flight.wrapping_sub(count);
        Ok(())
    }

    #[inline]
    pub(super) fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let (first, next) = (self.published, self.next_used);
        if next.0 == first.0 {
            return Ok(false);
        }
        memory.store_u64(self.second_half(first), self.hidden)?;
        self.published = next;
        fence(Ordering::SeqCst);
        let event = memory.load_u32(self.driver_event)?;
        Ok(match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // A place that the ring does not have is passed as little as any other.
                let (lap, wrap) = (2 * self.size, event & 0x8000 != 0);
                let at = (event & 0x7FFF) + if wrap { 0 } else { self.size };
                let (first, next) = (first.on_line(self.size), next.on_line(self.size));
                let used = (next + lap - first) % lap;
                let passed = (next + 2 * lap - at % lap - 1) % lap;
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
            let place = (next.offset() / DESCRIPTOR) | u32::from(!next.mask() & 0x8000);
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
