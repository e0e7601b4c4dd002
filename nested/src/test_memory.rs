//! Guest memory for the tests.

use core::cell::{Cell, RefCell};

use std::boxed::Box;
use std::vec;
use std::vec::Vec;

use testudo_arch::memory::{FaultKind, MemoryFault};
use testudo_arch::{Gpa, GuestMemory};

/// A megabyte of guest memory from 0 on. What another processor of the guest does to it while it
/// is being read is the `adversary`'s work: it runs before every read.
pub(crate) struct Memory {
    bytes: RefCell<Vec<u8>>,
    /// The reads made so far, in bytes from where.
    pub(crate) reads: RefCell<Vec<(Gpa, usize)>>,
    pub(crate) writes: RefCell<Vec<(Gpa, usize)>>,
    #[allow(clippy::type_complexity, reason = "one closure of a test")]
    pub(crate) adversary: RefCell<Option<Box<dyn FnMut(&mut [u8])>>>,
    /// Writes from here on fail, as to a ROM.
    pub(crate) read_only_from: Cell<u64>,
}

impl Memory {
    pub(crate) const SIZE: usize = 1 << 20;

    pub(crate) fn new() -> Self {
        Self {
            bytes: RefCell::new(vec![0; Self::SIZE]),
            reads: RefCell::default(),
            writes: RefCell::default(),
            adversary: RefCell::default(),
            read_only_from: Cell::new(u64::MAX),
        }
    }

    fn range(gpa: Gpa, len: usize) -> Result<core::ops::Range<usize>, MemoryFault> {
        let end = gpa.0.checked_add(len as u64);
        match end {
            Some(end) if end <= Self::SIZE as u64 => Ok(gpa.0 as usize..end as usize),
            _ => Err(MemoryFault {
                gpa,
                len: len as u64,
                kind: FaultKind::NotMemory,
            }),
        }
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        let range = Self::range(gpa, buf.len())?;
        let mut bytes = self.bytes.borrow_mut();
        if let Some(adversary) = self.adversary.borrow_mut().as_mut() {
            adversary(&mut bytes);
        }
        self.reads.borrow_mut().push((gpa, buf.len()));
        buf.copy_from_slice(&bytes[range]);
        Ok(())
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        let range = Self::range(gpa, data.len())?;
        if range.end as u64 > self.read_only_from.get() {
            return Err(MemoryFault {
                gpa,
                len: data.len() as u64,
                kind: FaultKind::ReadOnly,
            });
        }
        self.writes.borrow_mut().push((gpa, data.len()));
        self.bytes.borrow_mut()[range].copy_from_slice(data);
        Ok(())
    }

    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        self.read_value(gpa)
    }
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.write_value(gpa, &value)
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.read_value(gpa)
    }
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.write_value(gpa, &value)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.read_value(gpa)
    }
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.write_value(gpa, &value)
    }
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        let found = self.load_u32(gpa)?;
        if found != current {
            return Ok(Err(found));
        }
        self.store_u32(gpa, new)?;
        Ok(Ok(found))
    }
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        let found = self.load_u64(gpa)?;
        if found != current {
            return Ok(Err(found));
        }
        self.store_u64(gpa, new)?;
        Ok(Ok(found))
    }
    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        Self::range(gpa, len as usize).is_ok()
    }
}
