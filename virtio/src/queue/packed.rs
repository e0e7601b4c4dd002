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

/// A place in the ring with the wrap counter of the lap it is in.
#[derive(Clone, Copy, Debug)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    const START: Self = Self {
        index: 0,
        wrap: true,
    };

    /// The place `count` further on; `count` is at most `size`.
    #[inline]
    fn advance(self, count: u16, size: u16) -> Self {
        let index = u32::from(self.index) + u32::from(count);
        if index >= u32::from(size) {
            Self {
                index: (index - u32::from(size)) as u16,
                wrap: !self.wrap,
            }
        } else {
            Self {
                index: index as u16,
                wrap: self.wrap,
            }
        }
    }

    /// The place `count` before; `count` is at most `size`.
    #[inline]
    fn retreat(self, count: u16, size: u16) -> Self {
        if count <= self.index {
            Self {
                index: self.index - count,
                wrap: self.wrap,
            }
        } else {
            Self {
                index: (u32::from(self.index) + u32::from(size) - u32::from(count)) as u16,
                wrap: !self.wrap,
            }
        }
    }

    /// The place on a line that repeats after two laps.
    #[inline]
    fn linear(self, size: u16) -> u32 {
        u32::from(self.index) + if self.wrap { 0 } else { u32::from(size) }
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    size: u16,
    ring: Gpa,
    driver_event: Gpa,
    device_event: Gpa,
    event_idx: bool,
    next_available: Position,
    next_used: Position,
    in_flight: u16,
    /// The first descriptor of the batch, whose flags show the whole batch to the driver.
    first_of_batch: Option<(Gpa, u64)>,
    /// Places used since the last decision about an interrupt.
    since_publish: u32,
    muted: bool,
}

impl Packed {
    pub(super) fn new(config: &QueueConfig, event_idx: bool) -> Self {
        Self {
            size: config.size,
            ring: config.descriptors,
            driver_event: config.driver,
            device_event: config.device,
            event_idx,
            next_available: Position::START,
            next_used: Position::START,
            in_flight: 0,
            first_of_batch: None,
            since_publish: 0,
            muted: false,
        }
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Where the second half of a descriptor is: length, buffer number, flags.
    #[inline]
    fn second_half(&self, index: u16) -> Gpa {
        self.ring.wrapping_add(16 * u64::from(index) + 8)
    }

    /// The second half of the next descriptor, if it is available.
    #[inline]
    fn available<M: GuestMemory>(&self, memory: &M) -> Result<Option<u64>, QueueError> {
        let half = memory.load_u64(self.second_half(self.next_available.index))?;
        let flags = (half >> 48) as u16;
        let wrap = self.next_available.wrap;
        let is_available = (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap;
        Ok(is_available.then_some(half))
    }

    /// Whether there is a chain to take.
    #[inline]
    pub(super) fn more<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        Ok(self.in_flight < self.size && self.available(memory)?.is_some())
    }

    #[inline]
    pub(super) fn pop<M: GuestMemory>(
        &mut self,
        memory: &M,
        segments: &mut [Segment],
        limits: Limits,
    ) -> Result<Option<Taken>, QueueError> {
        // Until the device returns something, a full ring has nothing more to offer, whatever the
        // flags say.
        if self.in_flight >= self.size {
            return Ok(None);
        }
        let Some(mut half) = self.available(memory)? else {
            return Ok(None);
        };
        let room = self.size - self.in_flight;
        let mut collector = Collector::new(segments, limits);
        let mut index = self.next_available.index;
        let mut count = 0;
        let id = loop {
            if count >= room {
                return Err(QueueError::TooManyInFlight(self.size));
            }
            count += 1;
            let address = memory.load_u64(self.ring.wrapping_add(16 * u64::from(index)))?;
            let descriptor = Descriptor::from_words(address, half);
            let flags = descriptor.packed_flags();
            if flags & INDIRECT != 0 {
                let entries = collector.indirect_table(descriptor, flags)?;
                collect_indirect(memory, descriptor.gpa, entries, &mut collector)?;
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
        self.in_flight += count;
        Ok(Some(collector.finish(id, count)))
    }

    #[inline]
    pub(super) fn give_back(&mut self, descriptors: u16) {
        self.next_available = self.next_available.retreat(descriptors, self.size);
        self.in_flight -= descriptors;
    }

    #[inline]
    pub(super) fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        id: u16,
        descriptors: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let Position { index, wrap } = self.next_used;
        let mut flags = if wrap { AVAIL | USED } else { 0 };
        if written > 0 {
            flags |= WRITE;
        }
        let half = u64::from(written) | (u64::from(id) << 32) | (u64::from(flags) << 48);
        let gpa = self.second_half(index);
        if self.first_of_batch.is_none() {
            self.first_of_batch = Some((gpa, half));
        } else {
            memory.store_u64(gpa, half)?;
        }
        self.next_used = self.next_used.advance(descriptors, self.size);
        self.in_flight -= descriptors;
        self.since_publish += u32::from(descriptors);
        Ok(())
    }

    #[inline]
    pub(super) fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let Some((gpa, half)) = self.first_of_batch.take() else {
            return Ok(false);
        };
        memory.store_u64(gpa, half)?;
        let used = core::mem::take(&mut self.since_publish);
        fence(Ordering::SeqCst);
        let event = memory.load_u32(self.driver_event)?;
        Ok(match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let at = Position {
                    index: event as u16 & 0x7FFF,
                    wrap: event & 0x8000 != 0,
                };
                // A place that the ring does not have is passed as little as any other.
                let lap = 2 * u32::from(self.size);
                let new = self.next_used.linear(self.size);
                let passed = (new + 2 * lap - 1).wrapping_sub(at.linear(self.size) % lap) % lap;
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
        let Position { index, wrap } = self.next_available;
        if self.event_idx {
            let place = u32::from(index) | (u32::from(wrap) << 15);
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
#[inline]
fn collect_indirect<M: GuestMemory>(
    memory: &M,
    table: Gpa,
    count: u16,
    collector: &mut Collector<'_>,
) -> Result<(), QueueError> {
    for index in 0..count {
        let descriptor = Descriptor::read(memory, table, index)?;
        let flags = descriptor.packed_flags();
        if flags & INDIRECT != 0 {
            return Err(QueueError::NestedIndirect);
        }
        collector.push(descriptor, flags)?;
    }
    Ok(())
}
