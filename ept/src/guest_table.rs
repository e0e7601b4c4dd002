//! Second-stage tables that a guest owns: the EPT or NPT of a guest hypervisor, the tables that a
//! guest gives to an emulated IOMMU.

use arrayvec::ArrayVec;
use testudo_arch::{Gpa, GuestMemory, MemoryFault};

use crate::format::{Format, Rights, shift_of};
use crate::walk::Step;

/// How often a walk starts again because the guest changed an entry under it.
const MAX_RESTARTS: u32 = 16;

/// A table in guest memory, written by a guest, read with every check that hardware makes.
#[derive(Clone, Copy, Debug)]
pub struct GuestTable<'m, F: Format, M: GuestMemory + ?Sized> {
    memory: &'m M,
    format: F,
    root: Gpa,
}

/// Where a guest's table leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestPage<Flags> {
    /// The output address: physical for the guest that owns the table.
    pub gpa: Gpa,
    /// The number of address bits inside the page.
    pub shift: u32,
    /// The flags of the entry that maps the page.
    pub flags: Flags,
    /// What all entries on the way let through.
    pub rights: Rights,
    /// Whether the page is marked dirty, or the format marks none: if not, a write must come
    /// through [`GuestTable::translate`] first.
    pub dirty: bool,
    /// The entries on the way, top first.
    pub steps: ArrayVec<Step, 6>,
}

/// Why a guest's table leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableFault {
    /// An entry is absent, or the address is beyond the table's input range.
    #[error("absent at level {level}")]
    Absent {
        /// The level of the entry.
        level: u8,
    },
    /// The entries do not allow the access.
    #[error("denied: only {rights:?}")]
    Denied {
        /// What they allow.
        rights: Rights,
    },
    /// A reserved bit or combination of bits: a misconfiguration.
    #[error("reserved bits at level {level}")]
    Reserved {
        /// The level of the entry.
        level: u8,
    },
    /// The table does not lie in the guest's memory.
    #[error("no memory behind a table: {0}")]
    NoTable(MemoryFault),
    /// The guest changes the entries faster than they can be read: let the access happen again.
    #[error("the tables keep changing")]
    Contended,
}

impl<'m, F: Format, M: GuestMemory + ?Sized> GuestTable<'m, F, M> {
    /// The table whose root lies at `root` in the guest's memory.
    pub const fn new(memory: &'m M, format: F, root: Gpa) -> Self {
        Self {
            memory,
            format,
            root,
        }
    }

    /// The format.
    #[inline]
    pub const fn format(&self) -> &F {
        &self.format
    }

    /// The root.
    #[inline]
    pub const fn root(&self) -> Gpa {
        self.root
    }

    /// Translates for an access with these rights, and sets accessed and dirty bits where the
    /// format has them.
    ///
    /// # Errors
    ///
    /// Why not. The table is as before then, accessed bits apart if the guest changes it meanwhile.
    pub fn translate(
        &self,
        address: F::Input,
        access: Rights,
    ) -> Result<GuestPage<F::Flags>, TableFault> {
        for _ in 0..MAX_RESTARTS {
            let mut page = self.look_up(address, access)?;
            if self.mark(&mut page, access)? {
                return Ok(page);
            }
        }
        Err(TableFault::Contended)
    }

    /// As [`Self::translate`], but changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Self::translate`].
    pub fn look_up(
        &self,
        address: F::Input,
        access: Rights,
    ) -> Result<GuestPage<F::Flags>, TableFault> {
        let mut level = self.format.levels();
        let offset = self.format.offset(address);
        let offset = offset.ok_or(TableFault::Absent { level })?;
        let mut table = self.root;
        let mut rights = Rights::all();
        let mut steps = ArrayVec::new();
        loop {
            let index = (offset >> shift_of(level)) & 0x1FF;
            let at = Gpa(table.0 | (index << 3));
            let entry = self.memory.load_u64(at).map_err(TableFault::NoTable)?;
            if !self.format.is_present(entry) {
                return Err(TableFault::Absent { level });
            }
            if self.format.is_reserved(entry, level) {
                return Err(TableFault::Reserved { level });
            }
            rights &= self.format.entry_rights(entry, level);
            steps.push(Step { at, entry, level });
            if self.format.is_leaf(entry, level) {
                if !rights.contains(access) {
                    return Err(TableFault::Denied { rights });
                }
                let leaf = self.format.leaf(entry, level);
                let dirty = self.format.dirty_bit();
                return Ok(GuestPage {
                    gpa: Gpa(leaf.frame.0 | (offset & (leaf.bytes() - 1))),
                    shift: leaf.shift,
                    flags: leaf.flags,
                    rights,
                    dirty: entry & dirty == dirty,
                    steps,
                });
            }
            let (child, below) = self.format.child(entry, level);
            // An entry may skip levels, if the address has zeros there; it never goes up again.
            let skipped = (offset & ((1 << shift_of(level)) - 1)) >> (shift_of(below) + 9);
            if below == 0 || below >= level || skipped != 0 {
                return Err(TableFault::Absent { level });
            }
            (table, level) = (Gpa(child.0), below);
        }
    }

    fn mark(&self, page: &mut GuestPage<F::Flags>, access: Rights) -> Result<bool, TableFault> {
        let (accessed, dirty) = (self.format.accessed_bit(), self.format.dirty_bit());
        let last = page.steps.len().wrapping_sub(1);
        for (index, step) in page.steps.iter().enumerate() {
            let mut wanted = accessed;
            if index == last && access.contains(Rights::WRITE) {
                wanted |= dirty;
                page.dirty = true;
            }
            if step.entry & wanted == wanted {
                continue;
            }
            let new = step.entry | wanted;
            let swapped = self.memory.compare_exchange_u64(step.at, step.entry, new);
            match swapped.map_err(TableFault::NoTable)? {
                Ok(_) => {}
                Err(now)
                    if now & wanted == wanted && (now ^ step.entry) & !(accessed | dirty) == 0 => {}
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }
}
