//! The second stage by composition: one table for L2, made from L1's nested page table and L0's
//! (Turtles' multi-dimensional paging).

use alloc::vec::Vec;
use core::convert::Infallible;

use testudo_arch::{Cr4Flags, EferFlags, FrameAlloc, FrameMem, Gpa, GuestMemory, Hpa};
use testudo_ept::compose::{ComposeFault, Composed};
use testudo_ept::format::npt::Npt;
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::{Invalidate, PageTable, Rights};
use testudo_svm::exit::{NestedFaultBits, NestedPageFault};

use super::{NestedFault, NestedTable, SecondStage};

/// How many of L1's tables keep their composition: one for each of its guests, usually.
const TABLES: usize = 4;

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

/// The compositions of one vCPU.
///
/// L1's table is looked up when L2 faults, and what was found stays until L1 flushes, as in a TLB.
/// An L1 that runs in PAE or 32-bit paging itself, whose nested tables would have three or two
/// levels, gets VMEXIT_INVALID.
#[derive(Debug)]
pub struct ComposedStage<'t, M, N: FrameAlloc + FrameMem, P: FrameAlloc + FrameMem, I> {
    parts: ComposedParts<'t, M, N, P>,
    tables: Vec<(NestedTable, Composed<Npt, P>)>,
    /// Which of them runs.
    current: usize,
    /// Which of them goes when another one comes.
    oldest: usize,
    processors: I,
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
        Self {
            parts,
            tables: Vec::new(),
            current: 0,
            oldest: 0,
            processors,
        }
    }

    /// Drops what was made of these addresses of L1's: L0 changed its own table there.
    pub fn forget_inner(&mut self, start: Gpa, len: u64) {
        for (_, composed) in &mut self.tables {
            composed
                .forget_inner(start, len)
                .discharge(&mut self.processors);
        }
    }

    /// Gives all frames back. L2 must not run on these tables any more.
    pub fn destroy(self) {
        let mut processors = self.processors;
        for (_, composed) in self.tables {
            match composed.destroy(&mut processors) {
                Ok(_) => {}
                Err((_, never)) => match never {},
            }
        }
    }

    fn format_of(&self, table: NestedTable) -> Option<Npt> {
        if table.efer & EferFlags::LONG_MODE_ACTIVE.bits() == 0 {
            return None;
        }
        let five = table.cr4 & Cr4Flags::L5_PAGING.bits() != 0;
        let format = self.parts.l1_format;
        Some(if five {
            format.with_five_levels()
        } else {
            format
        })
    }

    /// Makes room for this table of L1's, and makes it the current one.
    #[cold]
    fn compose(&mut self, table: NestedTable) -> Option<()> {
        self.format_of(table)?;
        if self.tables.len() < TABLES {
            let ComposedParts {
                format,
                frames,
                page_limit,
                ..
            } = self.parts;
            if let Some(composed) = Composed::new(format, frames, page_limit) {
                self.current = self.tables.len();
                self.tables.push((table, composed));
                return Some(());
            }
        }
        // No frame for another root, or enough of them: the oldest goes.
        let index = self.oldest;
        let (owner, composed) = self.tables.get_mut(index)?;
        empty(composed, &mut self.processors);
        *owner = table;
        self.current = index;
        self.oldest = (index + 1) % self.tables.len();
        Some(())
    }
}

/// Empties a composition.
fn empty<P: FrameAlloc + FrameMem>(
    composed: &mut Composed<Npt, P>,
    processors: &mut impl Invalidate<Error = Infallible>,
) {
    if !composed.is_empty() {
        composed.clear().discharge(processors);
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
        // L1 changes the entries under the walk: L2 tries again.
        _ => return NestedFault::Resolved,
    };
    let mut bits = fault.bits;
    bits.set(NestedFaultBits::PRESENT, present);
    bits.set(NestedFaultBits::RESERVED, reserved);
    NestedFault::Reflect(NestedPageFault { bits, ..fault })
}

impl<M, N, P, I> SecondStage for ComposedStage<'_, M, N, P, I>
where
    M: GuestMemory,
    N: FrameAlloc + FrameMem,
    P: FrameAlloc + FrameMem + Copy,
    I: Invalidate<Error = Infallible>,
{
    #[inline]
    fn activate(&mut self, table: NestedTable) -> Option<Hpa> {
        let is_current = self
            .tables
            .get(self.current)
            .is_some_and(|(owner, _)| owner.is_alike(&table));
        if !is_current {
            match self.tables.iter().position(|(o, _)| o.is_alike(&table)) {
                Some(index) => self.current = index,
                None => self.compose(table)?,
            }
        }
        let (_, composed) = self.tables.get(self.current)?;
        Some(composed.table().root())
    }

    fn flush(&mut self) {
        for (_, composed) in &mut self.tables {
            empty(composed, &mut self.processors);
        }
    }

    fn translate(&mut self, gpa: Gpa) -> Option<Gpa> {
        let owner = self.tables.get(self.current)?.0;
        let root = Gpa(owner.root.0 & TABLE_ADDRESS);
        let outer = GuestTable::new(self.parts.memory, self.format_of(owner)?, root);
        outer.translate(gpa, Rights::READ).ok().map(|page| page.gpa)
    }

    fn fault(&mut self, fault: NestedPageFault) -> NestedFault {
        let access = rights_of(fault.bits);
        let Some((owner, _)) = self.tables.get(self.current) else {
            return NestedFault::Host(fault.gpa);
        };
        let owner = *owner;
        let Some(format) = self.format_of(owner) else {
            return NestedFault::Host(fault.gpa);
        };
        let root = Gpa(owner.root.0 & TABLE_ADDRESS);
        let outer = GuestTable::new(self.parts.memory, format, root);
        let (_, composed) = &mut self.tables[self.current];
        // Twice at the most: the second time with all the room there is.
        for _ in 0..2 {
            match composed.fill(&outer, self.parts.inner, fault.gpa, access) {
                Ok(filled) => {
                    filled.discharge(&mut self.processors);
                    return NestedFault::Resolved;
                }
                Err(ComposeFault::Outer(why)) => return reflect(fault, why),
                Err(
                    ComposeFault::InnerAbsent { middle, .. }
                    | ComposeFault::InnerDenied { middle, .. },
                ) => return NestedFault::Host(middle),
                Err(_) => composed.clear().discharge(&mut self.processors),
            }
        }
        // No frames even so: L0 makes the access itself.
        match outer.translate(fault.gpa, access) {
            Ok(page) => NestedFault::Host(page.gpa),
            Err(why) => reflect(fault, why),
        }
    }
}

/// Bits 51:12 of N_CR3; the cache-control bits below do not concern the walk.
const TABLE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

impl NestedTable {
    /// Whether two tables are walked alike, so that one composition serves both.
    fn is_alike(&self, other: &Self) -> bool {
        const CR4: u64 = Cr4Flags::L5_PAGING.bits() | Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
        const EFER: u64 = EferFlags::LONG_MODE_ACTIVE.bits() | EferFlags::NO_EXECUTE_ENABLE.bits();
        self.root == other.root
            && (self.cr4 ^ other.cr4) & CR4 == 0
            && (self.efer ^ other.efer) & EFER == 0
    }
}
