//! The packed ring (VIRTIO 1.3, 2.8).
//!
//! Driver and device write the same descriptors. A place is available when its AVAIL bit equals
//! the device's wrap counter and its USED bit does not; it is used when both equal it. The last
//! eight bytes of a descriptor (length, buffer number, flags) move in one atomic access, so a
//! place is seen either whole or not at all.

use alloc::boxed::Box;
use alloc::vec;
use core::sync::atomic::{Ordering, fence};

use testudo_arch::{Gpa, GuestMemory};

use super::descriptor::{Collector, Descriptor, Distant, Far, Flags, Near, Table, Taken};
use super::{Limits, QueueConfig, QueueError, Segment};

/// A descriptor's tail: the buffer's number, and above it the flags.
const FLAGS: Flags = Flags::at(16);
/// The flag that says that the device wrote something.
const WRITE: u16 = 2;
/// The descriptor is available when this equals the wrap counter.
const AVAIL: u16 = 1 << 7;
/// The descriptor is used when this equals the wrap counter too.
const USED: u16 = 1 << 15;

/// Event flags: notify always, never, at a given place (2.8.10).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring, and on which lap around it.
#[derive(Clone, Copy, Debug)]
struct Position {
    index: u32,
    /// AVAIL and USED as the device's wrap counter is: both set on the first lap, both clear on the
    /// next.
    wrap: u16,
}

impl Position {
    const FIRST: Self = Self {
        index: 0,
        wrap: AVAIL | USED,
    };

    /// Whether a descriptor here, of these flags, is available: AVAIL is as the wrap counter, USED
    /// is not.
    #[inline(always)]
    fn is_available(self, flags: u16) -> bool {
        (flags ^ self.wrap) & (AVAIL | USED) == USED
    }

    /// Moves on by `count` places in a ring of `size`, at most a lap. Numbers and their sums are
    /// below 2^17; the arithmetic that could not tell is the faster one.
    #[inline(always)]
    fn advance(&mut self, count: u32, size: u32) {
        self.index = self.index.wrapping_add(count);
        if self.index >= size {
            self.next_lap(size);
        }
    }

    /// Once in a lap: a branch is cheaper than the arithmetic.
    #[cold]
    fn next_lap(&mut self, size: u32) {
        self.index = self.index.wrapping_sub(size);
        self.wrap ^= AVAIL | USED;
    }

    /// Moves back by `count` places, at most a lap.
    #[inline]
    fn retreat(&mut self, count: u32, size: u32) {
        if self.index < count {
            self.index = self.index.wrapping_add(size);
            self.wrap ^= AVAIL | USED;
        }
        self.index = self.index.wrapping_sub(count);
    }

    /// The wrap counter.
    #[inline]
    fn wrap_counter(self) -> bool {
        self.wrap != 0
    }

    /// The descriptor's number on a line of two laps.
    #[inline]
    fn on_line(self, size: u32) -> u32 {
        self.index + if self.wrap_counter() { 0 } else { size }
    }
}

/// A chain that was returned: the number of the descriptor that will show it, and its second half.
#[derive(Clone, Copy, Debug, Default)]
struct Returned {
    half: u64,
    index: u32,
}

#[derive(Debug)]
pub(super) struct Packed {
    size: u32,
    ring: Gpa,
    driver_event: Gpa,
    device_event: Gpa,
    event_idx: bool,
    /// The next places to take from and to return to.
    next_available: Position,
    next_used: Position,
    /// The descriptors that are with the device as far as the driver knows.
    in_flight: u32,
    /// The chains that have been returned, but not been shown to it, in order, and their number.
    returned: Box<[Returned]>,
    unpublished: usize,
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
            next_available: Position::FIRST,
            next_used: Position::FIRST,
            in_flight: 0,
            returned: vec![Returned::default(); config.size.into()].into(),
            unpublished: 0,
            muted: false,
        }
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.size as u16
    }

    /// Where the second half of a descriptor is: length, buffer number, flags.
    #[inline(always)]
    fn second_half(&self, index: u32) -> Gpa {
        self.ring.wrapping_add(16 * u64::from(index) + 8)
    }

    /// The places that are not with the device. Without one, the ring has nothing more to offer,
    /// whatever the flags say.
    #[inline(always)]
    fn room(&self) -> u32 {
        self.size.wrapping_sub(self.in_flight)
    }

    /// Whether there is a chain to take.
    #[inline]
    pub(super) fn more<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if self.room() == 0 {
            return Ok(false);
        }
        let next = self.next_available;
        let half = memory.load_u64(self.second_half(next.index))?;
        Ok(next.is_available((half >> 48) as u16))
    }

    /// The ring, if it is near.
    #[inline(always)]
    pub(super) fn near<'m, M: GuestMemory>(&self, memory: &'m M) -> Option<Near<'m, M>> {
        Near::find(memory, self.ring, self.size)
    }

    /// Takes the next chain if all its descriptors are near: `near` is [`Self::near`]. Whatever is
    /// wrong, none is taken, and [`Self::pop_far`] says what it is.
    #[inline(always)]
    pub(super) fn pop_near<M: GuestMemory>(
        &mut self,
        near: Option<Near<'_, M>>,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, Distant> {
        let table = near.ok_or(Distant)?;
        self.take(table, segments, limits).map_err(|_| Distant)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn pop_far<M: GuestMemory>(
        &mut self,
        memory: &M,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, QueueError> {
        let table = Far::new(memory, self.ring, self.size);
        self.take(table, segments, limits)
    }

    /// Takes the next chain from `table`, the ring, or fails and takes none.
    #[inline(always)]
    fn take<T: Table>(
        &mut self,
        table: T,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, QueueError> {
        let room = self.room();
        if room == 0 {
            return Ok(None);
        }
        let next = self.next_available;
        let mut index = next.index;
        let mut half = table.rest(index)?;
        if !next.is_available((half >> 48) as u16) {
            return Ok(None);
        }
        let mut collector = Collector::new(segments, limits);
        let (id, count) = loop {
            // What goes on into places that are with the device has an error of its own.
            if !T::SILENT && collector.met() >= room {
                return Err(QueueError::TooManyInFlight(self.size()));
            }
            let descriptor = Descriptor::from_words(table.address(index)?, half);
            if descriptor.tail & FLAGS.indirect != 0 {
                // In this format the table's length, not NEXT, says where the chain ends (2.8.7).
                let entries = collector.indirect_table(descriptor, FLAGS)?;
                let count = collector.met() + 1;
                let table = table.other(descriptor.gpa, entries)?;
                for entry in 0..entries {
                    let descriptor = table.read(entry)?;
                    if descriptor.tail & FLAGS.indirect != 0 {
                        return Err(QueueError::NestedIndirect);
                    }
                    collector.push(descriptor, FLAGS)?;
                }
                break (descriptor.tail as u16, count);
            }
            collector.push(descriptor, FLAGS)?;
            if descriptor.tail & FLAGS.next == 0 {
                break (descriptor.tail as u16, collector.met());
            }
            index = index.wrapping_add(1);
            if index >= table.len() {
                index = 0;
            }
            half = table.rest(index)?;
        };
        if count > room {
            return Err(QueueError::TooManyInFlight(self.size()));
        }
        let taken = collector.finish(id, count as u16)?;
        self.next_available.advance(count, self.size);
        self.in_flight = self.in_flight.wrapping_add(count);
        Ok(Some(taken))
    }

    #[inline]
    pub(super) fn give_back(&mut self, descriptors: u16) {
        let count = u32::from(descriptors);
        self.next_available.retreat(count, self.size);
        self.in_flight = self.in_flight.wrapping_sub(count);
    }

    /// Returns a chain; nothing is written before [`Self::publish`].
    #[inline(always)]
    pub(super) fn complete(
        &mut self,
        id: u16,
        descriptors: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        // There is a place, since no more chains are with the device than the ring has descriptors.
        let Some(returned) = self.returned.get_mut(self.unpublished) else {
            return Err(QueueError::TooManyInFlight(self.size()));
        };
        let (next, count) = (self.next_used, u32::from(descriptors));
        let flags = next.wrap | (u16::from(written > 0) * WRITE);
        *returned = Returned {
            half: u64::from(written) | (u64::from(id) << 32) | (u64::from(flags) << 48),
            index: next.index,
        };
        self.unpublished += 1;
        self.next_used.advance(count, self.size);
        Ok(())
    }

    /// Writes what shows the chains that were returned. The first one comes last: the driver, which
    /// looks at them in order, then sees all at once.
    #[inline(always)]
    fn show(
        returned: &[Returned],
        mut store: impl FnMut(&Returned) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let Some((first, others)) = returned.split_first() else {
            return Ok(());
        };
        for chain in others {
            store(chain)?;
        }
        store(first)
    }

    #[cold]
    #[inline(never)]
    fn show_far<M: GuestMemory>(&self, memory: &M) -> Result<(), QueueError> {
        let returned = &self.returned[..self.unpublished];
        Self::show(returned, |chain| {
            Ok(memory.store_u64(self.second_half(chain.index), chain.half)?)
        })
    }

    #[inline]
    pub(super) fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let returned = &self.returned[..self.unpublished];
        let Some(first) = returned.first() else {
            return Ok(false);
        };
        // As many places as to the next one, and all of them if that is the first again.
        let used = match self.next_used.index.wrapping_sub(first.index) {
            0 => self.size,
            ahead if ahead < self.size => ahead,
            behind => behind.wrapping_add(self.size),
        };
        match self.near(memory) {
            Some(near) => Self::show(returned, |chain| near.store_rest(chain.index, chain.half))?,
            None => self.show_far(memory)?,
        }
        self.unpublished = 0;
        self.in_flight = self.in_flight.wrapping_sub(used);
        fence(Ordering::SeqCst);
        let event = memory.load_u32(self.driver_event)?;
        Ok(match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // A place that the ring does not have is passed as little as any other.
                let (lap, wrap) = (2 * self.size, event & 0x8000 != 0);
                let at = (event & 0x7FFF) + if wrap { 0 } else { self.size };
                let next = self.next_used.on_line(self.size);
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
            let place = next.index | (u32::from(next.wrap_counter()) << 15);
            memory.store_u32(self.device_event, place | (u32::from(EVENT_DESC) << 16))?;
        } else if self.muted {
            memory.store_u32(self.device_event, u32::from(EVENT_ENABLE) << 16)?;
        }
        self.muted = false;
        fence(Ordering::SeqCst);
        self.more(memory)
    }
}
