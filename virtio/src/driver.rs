//! The driver's side of a queue, in both formats: for tests, benchmarks and fuzzers.
//!
//! It does what a well-behaved driver does and nothing more; a test that wants misbehaviour writes
//! to guest memory itself, at the addresses that [`DriverQueue::config`] tells.

use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::{Gpa, GuestMemory, MemoryFault};

use crate::queue::{QueueConfig, Segment};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// The number of bytes that the ring of a queue takes, in either format.
pub const fn ring_bytes(size: u16) -> u64 {
    // Table, available ring and used ring, each rounded up for alignment.
    16 * size as u64 + (6 + 2 * size as u64 + 15) + (6 + 8 * size as u64 + 15)
}

/// A queue as its driver sees it.
#[derive(Debug)]
pub struct DriverQueue {
    config: QueueConfig,
    packed: bool,
    /// Split: unused descriptors. Packed: unused buffer numbers.
    free: Vec<u16>,
    /// What a chain occupies: the descriptors (split) or their number (packed), by its number.
    chains: Vec<Vec<u16>>,
    next: u16,
    wrap: bool,
    room: u16,
    used: u16,
    used_wrap: bool,
}

impl DriverQueue {
    /// A queue of `size` descriptors whose ring begins at `base`, a multiple of 16, and takes
    /// [`ring_bytes`] of zeroed memory.
    pub fn new(base: Gpa, size: u16, packed: bool) -> Self {
        let mut config = QueueConfig::new(size);
        config.descriptors = base;
        config.driver = base.wrapping_add(16 * u64::from(size));
        let device = config.driver.0 + 6 + 2 * u64::from(size);
        config.device = Gpa(device.next_multiple_of(16));
        Self {
            config,
            packed,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            next: 0,
            wrap: true,
            room: size,
            used: 0,
            used_wrap: true,
        }
    }

    /// Where the parts of the ring are: what the driver tells the device.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// The descriptors that are not in use.
    pub fn room(&self) -> u16 {
        self.room
    }

    /// Makes a chain available and says its number; `None` if there is no room for it.
    ///
    /// With `table`, the descriptors go there (16 bytes each) and the ring holds a single one.
    ///
    /// # Errors
    ///
    /// The ring or the table is not in memory.
    pub fn offer<M: GuestMemory>(
        &mut self,
        memory: &M,
        readable: &[Segment],
        writable: &[Segment],
        table: Option<Gpa>,
    ) -> Result<Option<u16>, MemoryFault> {
        let flags = |i: usize| if i < readable.len() { 0 } else { WRITE };
        let segments = || readable.iter().chain(writable);
        let count = (readable.len() + writable.len()) as u16;
        let places = if table.is_some() { 1 } else { count };
        if count == 0 || places > self.room {
            return Ok(None);
        }
        if let Some(table) = table {
            for (i, segment) in segments().enumerate() {
                let last = i + 1 == usize::from(count);
                let continues = if last || self.packed { 0 } else { NEXT };
                let (flags, next) = (flags(i) | continues, i as u16 + 1);
                let tail = if self.packed {
                    [0, flags]
                } else {
                    [flags, next]
                };
                write(memory, table, i as u16, *segment, tail)?;
            }
            let whole = Segment {
                gpa: table,
                len: 16 * u32::from(count),
            };
            return self.put(memory, &[(whole, INDIRECT)]);
        }
        let list: Vec<_> = segments()
            .enumerate()
            .map(|(i, s)| (*s, flags(i)))
            .collect();
        self.put(memory, &list)
    }

    fn put<M: GuestMemory>(
        &mut self,
        memory: &M,
        list: &[(Segment, u16)],
    ) -> Result<Option<u16>, MemoryFault> {
        if self.packed {
            self.put_packed(memory, list)
        } else {
            self.put_split(memory, list)
        }
    }

    fn put_split<M: GuestMemory>(
        &mut self,
        memory: &M,
        list: &[(Segment, u16)],
    ) -> Result<Option<u16>, MemoryFault> {
        let indices = self.free.split_off(self.free.len() - list.len());
        for (i, &(segment, flags)) in list.iter().enumerate() {
            let next = indices.get(i + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let tail = [flags, next.unwrap_or(0)];
            write(memory, self.config.descriptors, indices[i], segment, tail)?;
        }
        let head = indices[0];
        self.room -= indices.len() as u16;
        self.chains[usize::from(head)] = indices;
        let slot = 4 + 2 * u64::from(self.next % self.config.size);
        memory.store_u16(self.config.driver.wrapping_add(slot), head)?;
        self.next = self.next.wrapping_add(1);
        memory.store_u16(self.config.driver.wrapping_add(2), self.next)?;
        Ok(Some(head))
    }

    fn put_packed<M: GuestMemory>(
        &mut self,
        memory: &M,
        list: &[(Segment, u16)],
    ) -> Result<Option<u16>, MemoryFault> {
        let Some(id) = self.free.pop() else {
            return Ok(None);
        };
        let mut first = None;
        for (i, &(segment, flags)) in list.iter().enumerate() {
            let continues = if i + 1 < list.len() { NEXT } else { 0 };
            let available = if self.wrap { AVAIL } else { USED };
            let tail = [id, flags | continues | available];
            if i == 0 {
                first = Some((self.next, segment, tail));
            } else {
                write(memory, self.config.descriptors, self.next, segment, tail)?;
            }
            self.next += 1;
            if self.next == self.config.size {
                self.next = 0;
                self.wrap = !self.wrap;
            }
        }
        // The first one makes the whole chain available (2.8.21).
        if let Some((index, segment, tail)) = first {
            write(memory, self.config.descriptors, index, segment, tail)?;
        }
        self.room -= list.len() as u16;
        self.chains[usize::from(id)] = vec![list.len() as u16];
        Ok(Some(id))
    }

    /// The next chain that the device returned: its number, and the bytes written into it.
    ///
    /// # Errors
    ///
    /// The ring is not in memory.
    pub fn take_used<M: GuestMemory>(
        &mut self,
        memory: &M,
    ) -> Result<Option<(u16, u32)>, MemoryFault> {
        let (id, len) = if self.packed {
            let at = 16 * u64::from(self.used) + 8;
            let half = memory.load_u64(self.config.descriptors.wrapping_add(at))?;
            let flags = (half >> 48) as u16;
            let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
            if avail != used || used != self.used_wrap {
                return Ok(None);
            }
            ((half >> 32) as u16, half as u32)
        } else {
            if memory.load_u16(self.config.device.wrapping_add(2))? == self.used {
                return Ok(None);
            }
            let slot = 4 + 8 * u64::from(self.used % self.config.size);
            let at = self.config.device.wrapping_add(slot);
            let id = memory.load_u32(at)? as u16;
            (id, memory.load_u32(at.wrapping_add(4))?)
        };
        let chain = self.chains.get_mut(usize::from(id));
        let chain = chain.map(core::mem::take).unwrap_or_default();
        if self.packed {
            let places = chain.first().copied().unwrap_or(0);
            self.free.push(id);
            self.room += places;
            self.used += places;
            if self.used >= self.config.size {
                self.used -= self.config.size;
                self.used_wrap = !self.used_wrap;
            }
        } else {
            self.room += chain.len() as u16;
            self.free.extend(chain);
            self.used = self.used.wrapping_add(1);
        }
        Ok(Some((id, len)))
    }

    /// Whether the device wants to be told of what has been offered, without the event index.
    ///
    /// # Errors
    ///
    /// The ring is not in memory.
    pub fn wants_notification<M: GuestMemory>(&self, memory: &M) -> Result<bool, MemoryFault> {
        if self.packed {
            Ok(memory.load_u32(self.config.device)? >> 16 != 1)
        } else {
            Ok(memory.load_u16(self.config.device)? & 1 == 0)
        }
    }

    /// Asks for an interrupt after each chain, or for none, without the event index.
    ///
    /// # Errors
    ///
    /// The ring is not in memory.
    pub fn set_interrupts<M: GuestMemory>(&self, memory: &M, on: bool) -> Result<(), MemoryFault> {
        let off = u16::from(!on);
        if self.packed {
            memory.store_u32(self.config.driver, u32::from(off) << 16)
        } else {
            memory.store_u16(self.config.driver, off)
        }
    }

    /// With the event index: asks for one interrupt when the device has returned `count` chains
    /// more (split) or used `count` places more (packed), at least 1.
    ///
    /// # Errors
    ///
    /// The ring is not in memory.
    pub fn set_event<M: GuestMemory>(&self, memory: &M, count: u16) -> Result<(), MemoryFault> {
        let ahead = count - 1;
        if self.packed {
            let sum = u32::from(self.used) + u32::from(ahead);
            let wraps = sum >= u32::from(self.config.size);
            let index = if wraps {
                sum - u32::from(self.config.size)
            } else {
                sum
            };
            let place = index | (u32::from(self.used_wrap != wraps) << 15);
            memory.store_u32(self.config.driver, place | (2 << 16))
        } else {
            let at = 4 + 2 * u64::from(self.config.size);
            let event = self.used.wrapping_add(ahead);
            memory.store_u16(self.config.driver.wrapping_add(at), event)
        }
    }
}

/// Writes a descriptor; the tail is its last two halves, in the order of the format.
fn write<M: GuestMemory>(
    memory: &M,
    table: Gpa,
    index: u16,
    segment: Segment,
    tail: [u16; 2],
) -> Result<(), MemoryFault> {
    let at = table.wrapping_add(16 * u64::from(index));
    memory.store_u64(at, segment.gpa.0)?;
    let half = u64::from(segment.len) | (u64::from(tail[0]) << 32) | (u64::from(tail[1]) << 48);
    memory.store_u64(at.wrapping_add(8), half)
}
