//! Guest memory as a backend writes to it where shadow tables may be made from it.

use core::ops::Range;
use core::sync::atomic::AtomicU64;

use testudo_arch::memory::{BroughtIn, MemoryFault};
use testudo_arch::{Gpa, GuestMemory};

use crate::paging::ShadowTables;

/// The shadow tables, and the vCPU for which memory is written.
type Watcher<'a> = (&'a dyn ShadowTables, usize);

/// Guest memory, with those told of each write who have made tables from it: what the processor would
/// write by itself, it would write without an exit.
pub(super) struct Watched<'a, M> {
    memory: &'a M,
    watcher: Option<Watcher<'a>>,
}

impl<'a, M> Watched<'a, M> {
    pub(super) fn new(memory: &'a M, watcher: Option<Watcher<'a>>) -> Self {
        Self { memory, watcher }
    }

    /// The memory itself.
    #[cfg(test)]
    pub(super) fn inner(&self) -> &'a M {
        self.memory
    }

    #[inline]
    fn tell<T>(
        &self,
        gpa: Gpa,
        len: usize,
        done: Result<T, MemoryFault>,
    ) -> Result<T, MemoryFault> {
        if let Some((tables, vcpu)) = self.watcher {
            tables.written(vcpu, gpa, len as u64);
        }
        done
    }
}

impl<M: GuestMemory> GuestMemory for Watched<'_, M> {
    #[inline]
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.memory.read(gpa, buf)
    }

    #[inline]
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        self.tell(gpa, data.len(), self.memory.write(gpa, data))
    }

    #[inline]
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        self.memory.load_u16(gpa)
    }

    #[inline]
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.tell(gpa, 2, self.memory.store_u16(gpa, value))
    }

    #[inline]
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.memory.load_u32(gpa)
    }

    #[inline]
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.tell(gpa, 4, self.memory.store_u32(gpa, value))
    }

    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.memory.load_u64(gpa)
    }

    #[inline]
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.tell(gpa, 8, self.memory.store_u64(gpa, value))
    }

    #[inline]
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        let done = self.memory.compare_exchange_u32(gpa, current, new);
        self.tell(gpa, 4, done)
    }

    #[inline]
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        let done = self.memory.compare_exchange_u64(gpa, current, new);
        self.tell(gpa, 8, done)
    }

    #[inline]
    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        self.memory.contains(gpa, len)
    }

    #[inline]
    fn bring_in(&self, gpa: Gpa, write: bool) -> BroughtIn {
        self.memory.bring_in(gpa, write)
    }

    #[inline]
    fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        self.memory.word(gpa)
    }

    /// None where writes are told: these are not seen.
    #[inline]
    fn words(&self, gpa: Gpa, count: usize) -> Option<&[AtomicU64]> {
        match self.watcher {
            None => self.memory.words(gpa, count),
            Some(_) => None,
        }
    }

    #[inline]
    fn read_parts(
        &self,
        page: Gpa,
        buf: &mut [u8; 4096],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        self.memory.read_parts(page, buf, parts)
    }

    #[inline]
    fn write_parts(
        &self,
        page: Gpa,
        data: &[u8; 4096],
        parts: &[Range<usize>],
    ) -> Result<(), MemoryFault> {
        let done = self.memory.write_parts(page, data, parts);
        self.tell(page, data.len(), done)
    }
}
