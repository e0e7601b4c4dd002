//! Making IOMMUs forget: what discharges a [`Flush`](crate::Flush) of a table that devices use.
//!
//! An IOMMU takes commands from a ring in memory and says in memory, too, that it has carried them out. A
//! [`CommandQueue`] writes commands for one unit and waits for it; a [`Domain`] of it is an
//! [`Invalidate`] for the table that the unit has under that domain's number:
//!
//! ```
//! use testudo_arch::{FrameAlloc, FrameMem, Gpa, Hpa};
//! use testudo_ept::format::vtd::Vtd;
//! use testudo_ept::iotlb::{IotlbError, InvalidationQueue, Registers, Ring};
//! use testudo_ept::PageTable;
//!
//! /// Takes a page from the devices of domain 5, which are all behind one unit and have no caches of their own.
//! fn take<M: FrameAlloc + FrameMem>(
//!     table: &PageTable<Vtd, M>,
//!     page: Gpa,
//!     unit: &mut InvalidationQueue<impl Ring, impl Registers>,
//! ) -> Result<Option<Hpa>, IotlbError> {
//!     // SAFETY: as above, and nobody else edits this table.
//!     let mut domain = unsafe { unit.domain(5) };
//!     let unmapped = table.unmap_page(page);
//!     // A token that comes back is dropped here: its frame is lost, but nobody else gets it.
//!     let leaf = unmapped.try_discharge(&mut domain).map_err(|(_, error)| error)?;
//!     Ok(leaf.map(|leaf| leaf.frame))
//! }
//! ```
//!
//! What the unit itself needs, such as turning it on and its tables of devices, is its driver's business. A
//! driver sends other commands through the same queue, with [`CommandQueue::execute`]; the device
//! TLBs of PCI's address translation services (ATS) are among those.

mod amdvi;
mod vtd;

use testudo_arch::Hpa;

pub use amdvi::AmdVi;
pub use vtd::Vtd;

use crate::{Invalidate, Invalidation};

/// A unit's ring of commands, and the word that the unit answers in, as the program reaches them.
pub trait Ring {
    /// Writes an entry of the ring. The unit must see it whole before whatever is written to its registers
    /// afterwards; where units do not snoop caches, this writes it back to memory.
    fn write(&mut self, index: u32, command: Command);

    /// Where the unit finds the word for its answers: 8 bytes, aligned to as many.
    fn status_address(&self) -> Hpa;

    /// What the word for answers holds.
    fn status(&self) -> u64;
}

/// A unit's registers, by their offsets.
pub trait Registers {
    /// Reads 32 bits.
    fn read32(&self, offset: u32) -> u32;

    /// Reads 64 bits.
    fn read64(&self, offset: u32) -> u64;

    /// Writes 64 bits.
    fn write64(&mut self, offset: u32, value: u64);
}

/// A command or descriptor: its low 64 bits, and its high ones.
pub type Command = [u64; 2];

/// What an IOTLB is to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everything.
    Global,
    /// All that it holds of a domain, with its references to tables.
    Domain(u16),
    /// What it holds of the naturally aligned block of `1 << order` pages of 4 KiB at `address`; its references to
    /// tables there only unless `leaves_only`.
    Pages {
        /// The domain.
        domain: u16,
        /// The block's first address.
        address: u64,
        /// The base-two logarithm of the number of pages.
        order: u8,
        /// Whether references to tables may stay.
        leaves_only: bool,
    },
}

impl Scope {
    /// The smallest block that holds all of an invalidation's range.
    pub fn of(domain: u16, what: &Invalidation) -> Self {
        let different = (what.first ^ what.last) >> 12;
        let order = (u64::BITS - different.leading_zeros()) as u8;
        let size = 1u64.checked_shl(u32::from(order) + 12);
        Self::Pages {
            domain,
            address: size.map_or(0, |size| what.first & !(size - 1)),
            order,
            leaves_only: what.leaves_only,
        }
    }
}

/// Why a unit has not forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IotlbError {
    /// The ring has no room: the unit has not taken what was sent before.
    #[error("the ring of commands is full")]
    Full,
    /// The unit did not answer in time.
    #[error("the unit did not answer in time")]
    TimedOut,
    /// The unit does not process commands: it met one that it could not take, or was not told to.
    #[error("the unit has stopped at a command (status {0:#x})")]
    Stopped(u32),
    /// The unit has no such command.
    #[error("the unit cannot forget everything by one command")]
    Unsupported,
}

/// A kind of unit: how its commands and registers look.
pub trait Kind: Sized {
    /// The register with the offset in the ring of what the unit takes next.
    const HEAD: u32;
    /// The register with the offset in the ring of what comes after the last command.
    const TAIL: u32;

    /// Reads what the unit can do, and how many entries its ring has.
    fn of(registers: &impl Registers) -> (Self, u32);

    /// Why the unit does not process commands, if it does not.
    fn failure(registers: &impl Registers) -> Option<IotlbError>;

    /// The command that makes the unit forget at least this much.
    ///
    /// # Errors
    ///
    /// It has none.
    fn forget(&self, scope: Scope) -> Result<Command, IotlbError>;

    /// The command that has the unit store `data` at `address` when it has carried out all commands before.
    fn wait(address: Hpa, data: u32) -> Command;
}

/// The ring of commands of one unit, whose only user this is.
#[derive(Debug)]
pub struct CommandQueue<K, Q, R> {
    kind: K,
    ring: Q,
    registers: R,
    entries: u32,
    /// The entry that is written next.
    tail: u32,
    /// What the unit was last asked to answer.
    asked: u32,
    patience: u32,
}

/// The invalidation queue of an Intel unit, with descriptors of 128 bits.
pub type InvalidationQueue<Q, R> = CommandQueue<Vtd, Q, R>;
/// The command buffer of an AMD unit.
pub type CommandBuffer<Q, R> = CommandQueue<AmdVi, Q, R>;

impl<K: Kind, Q: Ring, R: Registers> CommandQueue<K, Q, R> {
    /// For a unit that was told where its ring is, and to process it. After `patience` looks at the word
    /// for answers the unit is given up.
    pub fn new(ring: Q, registers: R, patience: u32) -> Self {
        let (kind, entries) = K::of(&registers);
        let tail = (registers.read64(K::TAIL) >> 4) as u32 % entries;
        // What the word holds answers nothing that will be asked.
        let asked = ring.status() as u32;
        Self {
            kind,
            ring,
            registers,
            entries,
            tail,
            asked,
            patience,
        }
    }

    /// What makes the unit forget translations of one domain.
    ///
    /// # Safety
    ///
    /// This keeps what [`Invalidate`] promises for a table if all devices that use it do so through this unit
    /// and under this domain, if device TLBs are off, and if no other processor is in a call on the
    /// table when a token is discharged.
    #[allow(
        unsafe_code,
        reason = "frames are reused on the strength of the caller's word"
    )]
    pub unsafe fn domain(&mut self, domain: u16) -> Domain<'_, K, Q, R> {
        Domain {
            queue: self,
            domain,
        }
    }

    /// Makes the unit forget.
    ///
    /// # Errors
    ///
    /// The unit cannot, or does not; what was cached may still be used.
    pub fn forget(&mut self, scope: Scope) -> Result<(), IotlbError> {
        let command = self.kind.forget(scope)?;
        self.execute(&[command])
    }

    /// Sends commands, and waits until the unit has carried them out.
    ///
    /// # Errors
    ///
    /// They are too many, or the unit does not carry them out.
    pub fn execute(&mut self, commands: &[Command]) -> Result<(), IotlbError> {
        if let Some(failure) = K::failure(&self.registers) {
            return Err(failure);
        }
        let head = (self.registers.read64(K::HEAD) >> 4) as u32 % self.entries;
        // The last entry stays free: a full ring would look like an empty one.
        let used = self.tail.wrapping_sub(head) % self.entries;
        if commands.len() as u64 + 1 > u64::from(self.entries - 1 - used) {
            return Err(IotlbError::Full);
        }
        self.asked = self.asked.wrapping_add(1);
        let wait = K::wait(self.ring.status_address(), self.asked);
        for command in commands.iter().chain([&wait]) {
            self.ring.write(self.tail, *command);
            self.tail = (self.tail + 1) % self.entries;
        }
        self.registers
            .write64(K::TAIL, u64::from(self.tail).wrapping_shl(4));
        for _ in 0..self.patience {
            if self.ring.status() as u32 == self.asked {
                return Ok(());
            }
            if let Some(failure) = K::failure(&self.registers) {
                return Err(failure);
            }
            core::hint::spin_loop();
        }
        Err(IotlbError::TimedOut)
    }
}

/// One domain of a unit: makes it forget translations of the domain's table.
#[derive(Debug)]
pub struct Domain<'q, K, Q, R> {
    queue: &'q mut CommandQueue<K, Q, R>,
    domain: u16,
}

#[allow(
    unsafe_code,
    reason = "`CommandQueue::domain` passes the promise on to its caller"
)]
// SAFETY: the answer comes when the unit has forgotten all of the range, and what devices had begun before is
// done. The caller of `domain` vouches for the rest.
unsafe impl<K: Kind, Q: Ring, R: Registers> Invalidate for Domain<'_, K, Q, R> {
    type Error = IotlbError;

    fn invalidate(&mut self, what: &Invalidation) -> Result<(), IotlbError> {
        self.queue.forget(Scope::of(self.domain, what))
    }
}

#[cfg(test)]
mod tests;
