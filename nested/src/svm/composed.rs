//! The second stage by composition: one table for L2, made from L1's nested page table and L0's
//! (Turtles' multi-dimensional paging).

use core::convert::Infallible;

use testudo_arch::{Cr4Flags, EferFlags, FrameAlloc, FrameMem, Gpa, GuestMemory, Hpa};
use testudo_ept::compose::Composed;
use testudo_ept::format::npt::Npt;
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::{Invalidate, PageTable, Rights};
use testudo_svm::exit::{NestedFaultBits, NestedPageFault};

use super::{NestedFault, NestedTable, SecondStage};
use crate::composed::{Compositions, Stopped, TABLES};

/// What a composition is built with.
#[derive(Clone, Copy, Debug)]
pub struct ComposedParts<'t, M, N: FrameAlloc + FrameMem, P> {
    /// L1's memory, in which its tables lie.
    pub memory: &'t M,
    /// L0's table for L1: everything that L2 can ever reach is in it.
    pub inner: &'t PageTable<Npt, N>,
    /// Where the composed tables' frames come from.
    pub frames: P,
    /// The format that the processor walks, as for `inner`.
    pub format: Npt,
    /// The format in which L1's tables are read: what L1 was told about its processor. Whether it
    /// has five levels is L1's CR4 to say.
    pub l1_format: Npt,
    /// How many pages each composition holds at most. L1 decides how many there are.
    pub page_limit: usize,
}

/// What identifies a table of L1's, and how it is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    root: u64,
    five_levels: bool,
}

/// How many of L1's address spaces can use one composition without its being made anew between them.
const USERS: usize = 8;

/// The address spaces whose translations a composition stands for: none of them was flushed since it
/// used the composition. One that is not among them must not find what L1's table said before.
#[derive(Clone, Copy, Debug, Default)]
struct Users {
    table: Option<Key>,
    /// Identifiers of L1's; 0 is none.
    asids: [u32; USERS],
    oldest: usize,
}

impl Users {
    /// `true` if it was not among them.
    fn add(&mut self, asid: u32) -> bool {
        if self.asids.contains(&asid) {
            return false;
        }
        self.asids[self.oldest] = asid;
        self.oldest = (self.oldest + 1) % USERS;
        true
    }
}

/// The compositions of one vCPU.
///
/// L1's table is looked up when L2 faults, and what was found stays until L1 flushes, as in a TLB.
/// An L1 that runs in PAE or 32-bit paging itself, whose nested tables would have three or two
/// levels, gets VMEXIT_INVALID. EFER.NXE of L1 is taken to be set, as every 64-bit system has it.
#[derive(Debug)]
pub struct ComposedStage<'t, M, N: FrameAlloc + FrameMem, P: FrameAlloc + FrameMem, I> {
    parts: ComposedParts<'t, M, N, P>,
    tables: Compositions<Key, Npt, P, I>,
    users: [Users; TABLES],
    /// Whose users go when another table comes.
    oldest: usize,
    /// What the last entry asked for.
    current: Option<(Key, u32)>,
}

impl<'t, M, N, P, I> ComposedStage<'t, M, N, P, I>
where
    M: GuestMemory,
    N: FrameAlloc + FrameMem,
    P: FrameAlloc + FrameMem + Copy,
    I: Invalidate<Error = Infallible>,
{
    /// No compositions yet. `processors` makes the processor forget translations: since the
    /// compositions are one vCPU's, flushing its L2 guests before their next entry
    /// ([`NestedSvm::flush_translations`](super::NestedSvm::flush_translations)) is enough.
    pub const fn new(parts: ComposedParts<'t, M, N, P>, processors: I) -> Self {
        const NOBODY: Users = Users {
            table: None,
            asids: [0; USERS],
            oldest: 0,
        };
        Self {
            parts,
            tables: Compositions::new(processors),
            users: [NOBODY; TABLES],
            oldest: 0,
            current: None,
        }
    }

    /// Another table, or another address space on it: what was derived for others may be older than
    /// what a processor without translations of this one would find.
    #[cold]
    fn change(&mut self, key: Key, asid: u32) {
        self.current = Some((key, asid));
        let index = match self.users.iter().position(|users| users.table == Some(key)) {
            Some(index) => index,
            None => {
                let index = self.oldest;
                self.oldest = (index + 1) % TABLES;
                self.users[index] = Users {
                    table: Some(key),
                    ..Users::default()
                };
                index
            }
        };
        if self.users[index].add(asid) {
            self.tables.flush(|table| *table == key);
        }
    }

    /// Drops what was made of these addresses of L1's: L0 changed its own table there.
    pub fn forget_inner(&mut self, start: Gpa, len: u64) {
        self.tables.forget_inner(start, len);
    }

    #[cfg(test)]
    pub(crate) fn tables_for_test(&self) -> &PageTable<Npt, P> {
        self.tables.table()
    }

    /// L1's current table.
    fn outer(&self) -> Option<GuestTable<'t, Npt, M>> {
        let key = self.tables.current()?;
        let format = self.parts.l1_format;
        let format = if key.five_levels {
            format.with_five_levels()
        } else {
            format
        };
        Some(GuestTable::new(self.parts.memory, format, Gpa(key.root)))
    }

    /// Gives all frames back. L2 must not run on these tables any more.
    pub fn destroy(self) {
        self.tables.destroy();
    }
}

/// What an access needs.
fn rights_of(bits: NestedFaultBits) -> Rights {
    let mut rights = Rights::READ;
    rights.set(Rights::WRITE, bits.contains(NestedFaultBits::WRITE));
    let fetch = Rights::EXECUTE | Rights::USER_EXECUTE;
    rights.set(fetch, bits.contains(NestedFaultBits::FETCH));
    rights
}

/// The fault as L1's own processor would report it: how the access was made is as it was; what
/// stopped it is what L1's table says (APM vol. 2, 15.25.6).
fn reflect(fault: NestedPageFault, why: TableFault) -> NestedFault {
    let (present, reserved) = match why {
        TableFault::Absent { .. } => (false, false),
        TableFault::Denied { .. } => (true, false),
        // Where L1 has no memory it reads ones, reserved bits among them.
        TableFault::Reserved { .. } | TableFault::NoTable(_) => (true, true),
        // Nothing stops the access for good: L2 tries again.
        _ => return NestedFault::Resolved,
    };
    let mut bits = fault.bits;
    bits.set(NestedFaultBits::PRESENT, present);
    bits.set(NestedFaultBits::RESERVED, reserved);
    NestedFault::Reflect(NestedPageFault { bits, ..fault })
}

/// Bits 51:12 of N_CR3; the cache-control bits below do not concern the walk.
const TABLE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

impl<M, N, P, I> SecondStage for ComposedStage<'_, M, N, P, I>
where
    M: GuestMemory,
    N: FrameAlloc + FrameMem,
    P: FrameAlloc + FrameMem + Copy,
    I: Invalidate<Error = Infallible>,
{
    #[inline]
    fn activate(&mut self, table: NestedTable) -> Option<Hpa> {
        if table.efer & EferFlags::LONG_MODE_ACTIVE.bits() == 0 {
            return None;
        }
        let key = Key {
            root: table.root.0 & TABLE_ADDRESS,
            five_levels: table.cr4 & Cr4Flags::L5_PAGING.bits() != 0,
        };
        if self.current != Some((key, table.asid)) {
            self.change(key, table.asid);
        }
        let (format, frames) = (self.parts.format, self.parts.frames);
        let limit = self.parts.page_limit;
        self.tables
            .activate(key, || Composed::new(format, frames, limit))
    }

    fn flush(&mut self, asid: Option<u32>) {
        self.current = None;
        let Some(asid) = asid else {
            self.users = Default::default();
            return self.tables.flush(|_| true);
        };
        let users = &self.users;
        self.tables.flush(|table| {
            let users = users.iter().find(|users| users.table == Some(*table));
            users.is_none_or(|users| users.asids.contains(&asid))
        });
        for users in &mut self.users {
            for user in users.asids.iter_mut().filter(|user| **user == asid) {
                *user = 0;
            }
        }
    }

    fn forget(&mut self, start: Gpa, len: u64) {
        self.forget_inner(start, len);
    }

    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, write);
        let page = self.outer()?.translate(gpa, rights).ok()?;
        Some(page.gpa)
    }

    fn fault(&mut self, fault: NestedPageFault) -> NestedFault {
        let Some(outer) = self.outer() else {
            return NestedFault::Host(fault.gpa);
        };
        let access = rights_of(fault.bits);
        match self
            .tables
            .fill(&outer, self.parts.inner, fault.gpa, access)
        {
            Ok(()) => NestedFault::Resolved,
            Err(Stopped::ByL1(why)) => reflect(fault, why),
            Err(Stopped::ByL0(gpa)) => NestedFault::Host(gpa),
        }
    }
}
