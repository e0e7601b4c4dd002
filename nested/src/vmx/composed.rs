//! The second stage by composition: one EPT for L2, made from L1's EPT and L0's (Turtles'
//! multi-dimensional paging).

use core::convert::Infallible;

use testudo_arch::{FrameAlloc, FrameMem, Gpa, GuestMemory, Hpa, PageSize};
use testudo_ept::compose::Composed;
use testudo_ept::format::ept::Ept;
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::{Format, Invalidate, PageTable, Rights};

use super::{EptFault, EptHandled, SecondStage};
use crate::composed::{Compositions, Stopped};

/// What a composition is built with.
#[derive(Clone, Copy, Debug)]
pub struct ComposedParts<'t, M, N: FrameAlloc + FrameMem, P> {
    /// L1's memory, in which its tables lie.
    pub memory: &'t M,
    /// L0's EPT for L1: everything that L2 can ever reach is in it.
    pub inner: &'t PageTable<Ept, N>,
    /// Where the composed tables' frames come from.
    pub frames: P,
    /// The format that the processor walks, as for `inner`.
    pub format: Ept,
    /// The format in which L1's tables are read: what L1's IA32_VMX_EPT_VPID_CAP says. Levels and
    /// accessed and dirty flags are the EPT pointer's to say.
    pub l1_format: Ept,
    /// How many pages each composition holds at most. L1 decides how many there are.
    pub page_limit: usize,
}

/// How often a page is looked for that L0 takes away meanwhile.
const FRAME_TRIES: u32 = 16;

/// The compositions of one vCPU.
#[derive(Debug)]
pub struct ComposedStage<'t, M, N: FrameAlloc + FrameMem, P: FrameAlloc + FrameMem, I> {
    parts: ComposedParts<'t, M, N, P>,
    tables: Compositions<u64, Ept, P, I>,
}

impl<'t, M, N, P, I> ComposedStage<'t, M, N, P, I>
where
    M: GuestMemory,
    N: FrameAlloc + FrameMem,
    P: FrameAlloc + FrameMem + Copy,
    I: Invalidate<Error = Infallible>,
{
    /// No compositions yet. `processors` makes the processor forget translations: since the
    /// compositions are one vCPU's, INVEPT on its processor is enough.
    pub const fn new(parts: ComposedParts<'t, M, N, P>, processors: I) -> Self {
        Self {
            parts,
            tables: Compositions::new(processors),
        }
    }

    /// Drops what was made of these addresses of L1's: L0 changed its own table there.
    pub fn forget_inner(&mut self, start: Gpa, len: u64) {
        self.tables.forget_inner(start, len);
    }

    /// The EPT pointer of the composition that has this key, which is the current one from now on.
    #[inline]
    fn activate_key(&mut self, key: u64) -> Option<u64> {
        let (format, frames) = (self.parts.format, self.parts.frames);
        let limit = self.parts.page_limit;
        let root = self
            .tables
            .activate(key, || Composed::new(format, frames, limit))?;
        Some(format.pointer(root))
    }

    /// The composition of no table of L1's, with this page alone.
    fn plain(&self) -> Option<Gpa> {
        let key = self.tables.current()?;
        (key & 0xFFF == 0).then_some(Gpa(key))
    }

    /// L1's current table, and whether it has accessed and dirty flags.
    fn outer(&self) -> Option<(GuestTable<'t, Ept, M>, bool)> {
        let eptp = self.tables.current()?;
        let (format, root) = self.parts.l1_format.of_pointer(eptp)?;
        let outer = GuestTable::new(self.parts.memory, format, Gpa(root));
        Some((outer, eptp & (1 << 6) != 0))
    }

    fn fault_of_plain(&mut self, fault: &EptFault, alone: Gpa) -> EptHandled {
        let (gpa, access) = (fault.gpa, rights_of(fault.qualification));
        let apart = |size: &PageSize| gpa.align_down(*size) != alone.align_down(*size);
        let mut sizes = PageSize::ALL.into_iter().rev();
        let largest = sizes.find(apart).unwrap_or(PageSize::Size4K);
        let inner = self.parts.inner;
        match self.tables.fill_plain(inner, gpa, access, largest) {
            Ok(()) => EptHandled::Resolved,
            Err(_) => EptHandled::Host(gpa),
        }
    }

    /// What the processor walks.
    #[cfg(test)]
    pub(crate) fn tables_for_test(&self) -> &PageTable<Ept, P> {
        self.tables.table()
    }

    /// Gives all frames back. L2 must not run on these tables any more.
    pub fn destroy(self) {
        self.tables.destroy();
    }
}

/// Bits of the exit qualification of an EPT violation (SDM vol. 3C, table 30-7).
mod qualification {
    pub(super) const READ: u64 = 1;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const FETCH: u64 = 1 << 2;
    /// Readable, writable, executable: what the entries allow.
    pub(super) const ALLOWED: u64 = 0x78;
    pub(super) const LINEAR_VALID: u64 = 1 << 7;
    /// The access was to the translation of the linear address, not to a guest paging structure.
    pub(super) const FINAL: u64 = 1 << 8;
}

/// How the access was made, as a processor with L1's EPT would report it. With accessed and dirty flags in it,
/// the processor's accesses to L2's paging structures count as writes, and are reported as both a read and a
/// write (SDM vol. 3C, 31.3.3.2 and table 30-7).
fn as_l1_sees(bits: u64, accessed_dirty: bool) -> u64 {
    use qualification as q;
    let walk = bits & q::LINEAR_VALID != 0 && bits & q::FINAL == 0;
    if walk && accessed_dirty {
        bits | q::READ | q::WRITE
    } else {
        bits
    }
}

/// What an access needs.
fn rights_of(bits: u64) -> Rights {
    use qualification as q;
    let mut rights = Rights::empty();
    rights.set(Rights::READ, bits & q::READ != 0);
    rights.set(Rights::WRITE, bits & q::WRITE != 0);
    rights.set(Rights::EXECUTE, bits & q::FETCH != 0);
    if rights.is_empty() {
        rights = Rights::READ;
    }
    rights
}

/// The fault as L1's own processor would report it: how the access was made is as it was; what the
/// entries allow is what L1's entries allow.
fn reflect(fault: EptFault, why: TableFault) -> EptHandled {
    let allowed = match why {
        TableFault::Absent { .. } => 0,
        TableFault::Denied { rights } => {
            let bit = |right, at: u64| if rights.contains(right) { 1 << at } else { 0 };
            bit(Rights::READ, 3) | bit(Rights::WRITE, 4) | bit(Rights::EXECUTE, 5)
        }
        // Where L1 has no memory it reads ones, reserved bits among them.
        TableFault::Reserved { .. } | TableFault::NoTable(_) => {
            return EptHandled::Misconfiguration;
        }
        // Nothing stops the access for good: L2 tries again.
        _ => return EptHandled::Resolved,
    };
    EptHandled::Violation((fault.qualification & !qualification::ALLOWED) | allowed)
}

impl<M, N, P, I> SecondStage for ComposedStage<'_, M, N, P, I>
where
    M: GuestMemory,
    N: FrameAlloc + FrameMem,
    P: FrameAlloc + FrameMem + Copy,
    I: Invalidate<Error = Infallible>,
{
    #[inline]
    fn activate(&mut self, eptp: u64) -> Option<u64> {
        self.parts.l1_format.of_pointer(eptp)?;
        self.activate_key(eptp)
    }

    #[inline(never)]
    fn activate_plain(&mut self, page: Gpa) -> Option<u64> {
        // As a key it is no EPT pointer of L1's, of which bits 5:3 are not 0 (SDM vol. 3C, 27.6.11).
        self.activate_key(page.0 & !0xFFF)
    }

    /// A single-context INVEPT names the table by the EPT pointer's address bits.
    fn flush(&mut self, eptp: Option<u64>) {
        self.tables
            .flush(|key| eptp.is_none_or(|eptp| (eptp ^ key) & !0xFFF == 0));
    }

    fn forget(&mut self, start: Gpa, len: u64) {
        self.forget_inner(start, len);
    }

    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, write);
        if self.plain().is_some() {
            return Some(gpa);
        }
        let (outer, _) = self.outer()?;
        let page = outer.translate(gpa, rights).ok()?;
        Some(page.gpa)
    }

    fn frame(&mut self, page: Gpa) -> Option<Hpa> {
        let parts = &self.parts;
        for _ in 0..FRAME_TRIES {
            // An access of L0's for writing, which changes nothing: a page that is away comes, and one that is
            // shared becomes L1's own.
            let word = parts.memory.load_u64(page).ok()?;
            let _unchanged = parts.memory.compare_exchange_u64(page, word, word).ok()?;
            if let Some(found) = parts.inner.translate(page)
                && let rights = parts.inner.format().rights(found.leaf.flags)
                && rights.contains(Rights::READ | Rights::WRITE)
            {
                return Some(found.address);
            }
        }
        None
    }

    fn fault(&mut self, mut fault: EptFault) -> EptHandled {
        if let Some(alone) = self.plain() {
            return self.fault_of_plain(&fault, alone);
        }
        let Some((outer, accessed_dirty)) = self.outer() else {
            return EptHandled::Host(fault.gpa);
        };
        fault.qualification = as_l1_sees(fault.qualification, accessed_dirty);
        let access = rights_of(fault.qualification);
        match self
            .tables
            .fill(&outer, self.parts.inner, fault.gpa, access)
        {
            Ok(()) => EptHandled::Resolved,
            Err(Stopped::ByL1(why)) => reflect(fault, why),
            Err(Stopped::ByL0(gpa)) => EptHandled::Host(gpa),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_walk_is_a_read_and_a_write_where_l1_has_accessed_and_dirty_flags() {
        let walk = qualification::LINEAR_VALID | qualification::READ;
        assert_eq!(as_l1_sees(walk, false), walk);
        assert_eq!(as_l1_sees(walk, true), walk | qualification::WRITE);
        let page = walk | qualification::FINAL;
        assert_eq!(as_l1_sees(page, true), page);
        assert_eq!(
            rights_of(as_l1_sees(walk, true)),
            Rights::READ | Rights::WRITE
        );
        let fault = EptFault {
            qualification: as_l1_sees(walk, true),
            gpa: Gpa(0x1000),
        };
        let denied = TableFault::Denied {
            rights: Rights::READ,
        };
        let expected = walk | qualification::WRITE | 1 << 3;
        assert_eq!(reflect(fault, denied), EptHandled::Violation(expected));
    }
}
