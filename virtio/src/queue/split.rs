//! The split ring (VIRTIO 1.3, 2.7).

use core::sync::atomic::{Ordering, fence};

use testudo_arch::{Gpa, GuestMemory};

use super::descriptor::{Collector, Distant, Far, Flags, Near, Table, Taken};
use super::{Limits, QueueConfig, QueueError, Segment};

/// A descriptor's tail: the flags, and above them the next one's index.
const FLAGS: Flags = Flags::at(0);
/// Offset of the index in both the available and the used ring; the flags are at 0.
const INDEX: u64 = 2;
/// Offset of the first element in both.
const ELEMENTS: u64 = 4;
/// Available flags: the driver wants no interrupt.
const NO_INTERRUPT: u16 = 1;
/// Used flags: the device wants no notification.
const NO_NOTIFY: u16 = 1;

#[derive(Debug)]
pub(super) struct Split {
    size: u16,
    table: Gpa,
    available: Gpa,
    used: Gpa,
    event_idx: bool,
    /// The chain to take next, and the end of those known to be available. These indices run
    /// freely, and their low halves are the ring's; each is a word of its own, so that the processor
    /// never reads together what it has just written apart.
    next_available: u32,
    seen_available: u32,
    /// The next place in the used ring, and what the driver has been shown.
    next_used: u32,
    published: u32,
    muted: bool,
}

impl Split {
    pub(super) fn new(config: &QueueConfig, event_idx: bool) -> Self {
        Self {
            size: config.size,
            table: config.descriptors,
            available: config.driver,
            used: config.device,
            event_idx,
            next_available: 0,
            seen_available: 0,
            next_used: 0,
            published: 0,
            muted: false,
        }
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The element that a free-running index stands for.
    #[inline]
    fn slot(&self, index: u32) -> u64 {
        u64::from(index & u32::from(self.size).wrapping_sub(1))
    }

    /// Whether there is a chain to take; looks at the driver's index only when all that was known
    /// has been taken.
    #[inline]
    pub(super) fn more<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if self.next_available != self.seen_available {
            return Ok(true);
        }
        let index = memory.load_u16(self.available.wrapping_add(INDEX))?;
        let next = self.next_available as u16;
        let ahead = index.wrapping_sub(next);
        if ahead > self.size {
            return Err(QueueError::AvailableIndex {
                index,
                next,
                size: self.size,
            });
        }
        self.seen_available = self.next_available.wrapping_add(ahead.into());
        Ok(ahead != 0)
    }

    /// The descriptors, if they are near.
    #[inline(always)]
    pub(super) fn near<'m, M: GuestMemory>(&self, memory: &'m M) -> Option<Near<'m, M>> {
        Near::find(memory, self.table, self.size.into())
    }

    /// Takes the next chain if all its descriptors are near: `near` is [`Self::near`]. Whatever is
    /// wrong, none is taken, and [`Self::pop_far`] says what it is.
    #[inline(always)]
    pub(super) fn pop_near<M: GuestMemory>(
        &mut self,
        memory: &M,
        near: Option<Near<'_, M>>,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, Distant> {
        let table = near.ok_or(Distant)?;
        self.take(memory, table, segments, limits)
            .map_err(|_| Distant)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn pop_far<M: GuestMemory>(
        &mut self,
        memory: &M,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, QueueError> {
        let table = Far::new(memory, self.table, self.size.into());
        self.take(memory, table, segments, limits)
    }

    /// Takes the next chain from `table`, or fails and takes none.
    #[inline(always)]
    fn take<M: GuestMemory>(
        &mut self,
        memory: &M,
        table: impl Table,
        segments: &mut [Segment],
        limits: &Limits,
    ) -> Result<Option<Taken>, QueueError> {
        if !self.more(memory)? {
            return Ok(None);
        }
        let element = ELEMENTS + 2 * self.slot(self.next_available);
        let head = memory.load_u16(self.available.wrapping_add(element))?;
        let taken = collect(table, head, segments, limits)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(taken))
    }

    #[inline]
    pub(super) fn give_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    #[inline(never)]
    pub(super) fn complete<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let element = self
            .used
            .wrapping_add(ELEMENTS + 8 * self.slot(self.next_used));
        let entry = u64::from(head) | (u64::from(written) << 32);
        memory.write(element, &entry.to_le_bytes())?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    #[inline]
    pub(super) fn publish<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Ok(false);
        }
        memory.store_u16(self.used.wrapping_add(INDEX), new as u16)?;
        self.published = new;
        // The driver stores its event index (or flags) and then looks at the used index again:
        // one of the two must see the other's store (2.7.7.2).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = ELEMENTS + 2 * u64::from(self.size);
            let event = memory.load_u16(self.available.wrapping_add(at))?;
            let passed = (new as u16).wrapping_sub(event).wrapping_sub(1);
            Ok(u32::from(passed) < new.wrapping_sub(old))
        } else {
            Ok(memory.load_u16(self.available)? & NO_INTERRUPT == 0)
        }
    }

    #[inline]
    pub(super) fn mute<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        // With an event index, not moving it is the request (2.7.10).
        if !self.event_idx && !self.muted {
            memory.store_u16(self.used, NO_NOTIFY)?;
            self.muted = true;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn listen<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        if self.event_idx {
            let at = ELEMENTS + 8 * u64::from(self.size);
            memory.store_u16(self.used.wrapping_add(at), self.next_available as u16)?;
        } else if self.muted {
            memory.store_u16(self.used, 0)?;
            self.muted = false;
        }
        // As in `publish`, with the roles exchanged.
        fence(Ordering::SeqCst);
        self.more(memory)
    }
}

/// Follows the chain that begins at `head`, into an indirect table if it ends with one.
#[inline(always)]
fn collect(
    mut table: impl Table,
    head: u16,
    segments: &mut [Segment],
    limits: &Limits,
) -> Result<Taken, QueueError> {
    let mut collector = Collector::new(segments, limits);
    let mut nested = false;
    let mut index = head.into();
    loop {
        let descriptor = table.read(index)?;
        if descriptor.tail & FLAGS.indirect != 0 {
            if nested {
                return Err(QueueError::NestedIndirect);
            }
            nested = true;
            let count = collector.indirect_table(descriptor, FLAGS)?;
            table = table.other(descriptor.gpa, count)?;
            index = 0;
            continue;
        }
        collector.push(descriptor, FLAGS)?;
        if descriptor.tail & FLAGS.next == 0 {
            break;
        }
        index = descriptor.tail >> 16;
    }
    collector.finish(head, 1)
}
