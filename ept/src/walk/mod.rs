//! The guest's own paging: every mode of x86, walked as the processor walks it.
//!
//! [`walk`] translates a linear address through the tables in guest memory and returns either the
//! guest-physical address or exactly the page fault that the processor would raise (SDM vol. 3A,
//! chapter 4; APM vol. 2, chapter 5). Each entry is loaded once; accessed and dirty bits are set by
//! compare-exchange once the access is known to be allowed.
//!
//! ```
//! use testudo_arch::memory::{GuestMemory, GuestRam};
//! use testudo_arch::{Gpa, Gva};
//! use testudo_ept::walk::{Access, PagingState, walk};
//!
//! let mut bytes = vec![0u64; 0x1000];
//! let mut ram = GuestRam::new();
//! // SAFETY: `bytes` outlives `ram`, and nothing else refers to it.
//! unsafe { ram.add(Gpa(0), bytes.as_mut_ptr().cast(), 0x8000, true) }.unwrap();
//! // A page directory at 0x1000 that maps 4 MiB at 0 with a large page, read-only.
//! ram.store_u32(Gpa(0x1000), 0x81).unwrap();
//! let state = PagingState { cr0: 0x8001_0001, cr3: 0x1000, cr4: 0x10, ..PagingState::default() };
//! let found = walk(&ram, &state, Gva(0x1234), Access::READ).unwrap();
//! assert_eq!((found.gpa, found.bytes()), (Gpa(0x1234), 4 << 20));
//! let fault = walk(&ram, &state, Gva(0x1234), Access::WRITE).unwrap_err();
//! assert_eq!(fault.page_fault().unwrap().code.bits(), 0b11);
//! ```

mod mode;
#[cfg(test)]
mod tests;

use core::convert::Infallible;

use arrayvec::ArrayVec;
use bitflags::bitflags;
use testudo_arch::{Cr0Flags, Cr4Flags, Gpa, GuestMemory, Gva, MemoryFault};

pub use mode::{Mode, PagingState};

/// P: the entry translates.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// How often a walk starts again because the guest changed an entry under it.
const MAX_RESTARTS: u32 = 16;

/// What is done with the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A load.
    Read,
    /// A store, or a locked read-modify-write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// On whose behalf memory is accessed (SDM vol. 3A, 4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// By an instruction at CPL 3.
    User,
    /// By an instruction at a lower CPL.
    Supervisor,
    /// By the processor itself, whatever the CPL: descriptor tables, the TSS. EFLAGS.AC does not
    /// lift SMAP for these.
    Implicit,
}

/// An access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What is done.
    pub kind: AccessKind,
    /// By whom.
    pub privilege: Privilege,
}

impl Access {
    /// A load by the supervisor.
    pub const READ: Self = Self::new(AccessKind::Read, Privilege::Supervisor);
    /// A store by the supervisor.
    pub const WRITE: Self = Self::new(AccessKind::Write, Privilege::Supervisor);
    /// An instruction fetch by the supervisor.
    pub const FETCH: Self = Self::new(AccessKind::Fetch, Privilege::Supervisor);

    /// An access of this kind.
    #[inline]
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        Self { kind, privilege }
    }

    /// The explicit access of an instruction at this privilege level.
    #[inline]
    pub const fn at_cpl(kind: AccessKind, cpl: u8) -> Self {
        let user = cpl == 3;
        let privilege = if user {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        Self { kind, privilege }
    }
}

bitflags! {
    /// The error code of a page fault (SDM vol. 3A, 4.7; APM vol. 2, 8.4.2).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageFaultCode: u32 {
        /// P: the page was present; the access was not allowed.
        const PRESENT = 1 << 0;
        /// W/R: the access was a write.
        const WRITE = 1 << 1;
        /// U/S: the access was made at CPL 3.
        const USER = 1 << 2;
        /// RSVD: a reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// I/D: the access was an instruction fetch, and fetches can be forbidden.
        const FETCH = 1 << 4;
        /// PK: the page's protection key forbids the access.
        const PROTECTION_KEY = 1 << 5;
        /// SS: the access was a shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// SGX: an access-control requirement of an enclave was violated.
        const SGX = 1 << 15;
        const _ = !0;
    }
}

/// A page fault as the processor would raise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page fault at {address}, error code {:#x}", code.bits())]
pub struct PageFault {
    /// What CR2 receives.
    pub address: Gva,
    /// The error code.
    pub code: PageFaultCode,
}

/// A walk that leads to no address. `E` is what the second stage reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError<E = Infallible> {
    /// The guest's tables do not allow the access.
    #[error(transparent)]
    Fault(PageFault),
    /// The linear address is not canonical: `#GP(0)`, or `#SS(0)` for an access through SS.
    #[error("{0} is not canonical")]
    NonCanonical(Gva),
    /// A table does not lie in memory. What a processor reads there is up to the platform; a
    /// hypervisor treats it as a bus that answers all ones, or stops the guest.
    #[error("no memory behind a table: {0}")]
    NoTable(MemoryFault),
    /// The second stage does not translate a table's address.
    #[error("the second stage refuses the table's entry at {gpa}")]
    SecondStage {
        /// The guest-physical address of the entry.
        gpa: Gpa,
        /// What the second stage says.
        error: E,
    },
    /// The guest changes the entries faster than they can be read: let it execute the
    /// instruction again.
    #[error("the tables keep changing")]
    Contended,
}

impl<E> WalkError<E> {
    /// The page fault, if that is what it is.
    #[inline]
    pub const fn page_fault(&self) -> Option<PageFault> {
        match self {
            Self::Fault(fault) => Some(*fault),
            _ => None,
        }
    }
}

/// One entry that a walk went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where the entry lies, before any second stage.
    pub at: Gpa,
    /// What it held when it was used, without the bits that this walk has set.
    pub entry: u64,
    /// The level of its table, 1 at the bottom.
    pub level: u8,
}

/// Where a linear address leads, and what the tables say about the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestTranslation {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The number of address bits inside the page: 12, 21, 22 or 30; the whole linear address
    /// where paging is off.
    pub shift: u32,
    /// Whether every level lets writes through.
    pub writable: bool,
    /// Whether every level lets user mode through.
    pub user: bool,
    /// Whether no level forbids fetches.
    pub executable: bool,
    /// The entries on the way, top first; empty where paging is off.
    pub steps: ArrayVec<Step, 5>,
}

impl GuestTranslation {
    /// The size of the page in bytes.
    #[inline]
    pub const fn bytes(&self) -> u64 {
        1 << self.shift
    }

    /// The entry that maps the page, or `None` where paging is off.
    #[inline]
    pub fn leaf(&self) -> Option<&Step> {
        self.steps.last()
    }
}

/// What a walk does with an entry of a table, for a second stage that wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableUse {
    /// It loads the entry.
    Load,
    /// It sets the entry's accessed or dirty bit.
    Update,
}

/// Translates a linear address through the guest's tables, and sets their accessed and dirty bits.
///
/// # Errors
///
/// The page fault, or why there is no answer. Nothing in guest memory has changed then, save for
/// accessed bits when the guest changes its tables at the same time.
#[inline]
pub fn walk<M: GuestMemory + ?Sized>(
    memory: &M,
    state: &PagingState,
    address: Gva,
    access: Access,
) -> Result<GuestTranslation, WalkError> {
    walk_nested(memory, state, address, access, |gpa, _| Ok(gpa))
}

/// As [`walk`], where the addresses of the guest's tables are themselves translated: `second_stage`
/// turns the guest-physical address of each entry into an address of `memory`.
///
/// The address that comes out is the guest's: the caller passes it through the second stage with
/// the access that it makes.
///
/// # Errors
///
/// As [`walk`], and what the second stage refuses.
pub fn walk_nested<M: GuestMemory + ?Sized, E>(
    memory: &M,
    state: &PagingState,
    address: Gva,
    access: Access,
    mut second_stage: impl FnMut(Gpa, TableUse) -> Result<Gpa, E>,
) -> Result<GuestTranslation, WalkError<E>> {
    for _ in 0..MAX_RESTARTS {
        let found = look_up(memory, state, address, access, &mut second_stage)?;
        if mark(memory, state, &found, access, &mut second_stage)? {
            return Ok(found);
        }
    }
    Err(WalkError::Contended)
}

/// As [`walk_nested`], but changes nothing: for debuggers, and for asking what would happen.
///
/// # Errors
///
/// As [`walk_nested`].
pub fn look_up<M: GuestMemory + ?Sized, E>(
    memory: &M,
    state: &PagingState,
    address: Gva,
    access: Access,
    mut second_stage: impl FnMut(Gpa, TableUse) -> Result<Gpa, E>,
) -> Result<GuestTranslation, WalkError<E>> {
    let mode = state.mode();
    let Some(linear) = mode.linear(address) else {
        return Err(WalkError::NonCanonical(address));
    };
    let mut found = GuestTranslation {
        gpa: Gpa(linear),
        shift: mode.linear_bits(),
        writable: true,
        user: true,
        executable: true,
        steps: ArrayVec::new_const(),
    };
    if mode == Mode::Off {
        return Ok(found);
    }
    let fault = |code| {
        Err(WalkError::Fault(PageFault {
            address: Gva(linear_to_gva(address, mode, linear)),
            code,
        }))
    };
    let base = state.fault_code(access);
    let mut level = mode.levels();
    let mut table = state.root(mode);
    loop {
        let at = Gpa(table | (mode.index(linear, level) * mode.entry_bytes()));
        let entry = match state.pdpte(mode, level, linear) {
            Some(register) => register,
            None => {
                let gpa = second_stage(at, TableUse::Load)
                    .map_err(|error| WalkError::SecondStage { gpa: at, error })?;
                load(memory, mode, gpa).map_err(WalkError::NoTable)?
            }
        };
        if entry & PRESENT == 0 {
            return fault(base);
        }
        let large = state.is_large(mode, entry, level);
        if entry & state.reserved(mode, level, large) != 0 {
            return fault(base | PageFaultCode::PRESENT | PageFaultCode::RESERVED);
        }
        if !(mode == Mode::Pae && level == 3) {
            found.writable &= entry & WRITABLE != 0;
            found.user &= entry & USER != 0;
            found.executable &= mode == Mode::Legacy || entry & NO_EXECUTE == 0;
        }
        found.steps.push(Step { at, entry, level });
        if large || level == 1 {
            found.shift = mode.shift(level);
            let within = linear & ((1 << found.shift) - 1);
            found.gpa = Gpa(mode.page(entry, level, large) | within);
            break;
        }
        table = entry & mode.table_mask();
        level -= 1;
    }
    match violation(state, mode, &found, access) {
        None => Ok(found),
        Some(extra) => fault(base | PageFaultCode::PRESENT | extra),
    }
}

/// CR2 receives the address as it was given, which outside long mode has 32 bits.
#[inline]
fn linear_to_gva(address: Gva, mode: Mode, linear: u64) -> u64 {
    if mode.is_long() { address.0 } else { linear }
}

#[inline]
fn load<M: GuestMemory + ?Sized>(memory: &M, mode: Mode, at: Gpa) -> Result<u64, MemoryFault> {
    if mode == Mode::Legacy {
        memory.load_u32(at).map(u64::from)
    } else {
        memory.load_u64(at)
    }
}

/// Whether the page forbids the access, and the error-code bits that this adds (SDM vol. 3A, 4.6
/// and 4.7).
#[inline]
fn violation(
    state: &PagingState,
    mode: Mode,
    page: &GuestTranslation,
    access: Access,
) -> Option<PageFaultCode> {
    let cr4 = Cr4Flags::from_bits_retain(state.cr4);
    let by_user = access.privilege == Privilege::User;
    let protected = by_user || state.cr0 & Cr0Flags::WRITE_PROTECT.bits() != 0;
    let mut denied = by_user && !page.user;
    match access.kind {
        AccessKind::Fetch => {
            denied |= !page.executable;
            let smep = cr4.contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION);
            denied |= smep && !by_user && page.user;
            return denied.then_some(PageFaultCode::empty());
        }
        AccessKind::Write => denied |= protected && !page.writable,
        AccessKind::Read => {}
    }
    if !by_user && page.user && cr4.contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION) {
        denied |= !(state.alignment_check && access.privilege == Privilege::Supervisor);
    }
    let mut extra = PageFaultCode::empty();
    if let Some(rights) = state.key_rights(mode, page) {
        let (no_access, no_write) = (rights & 1 != 0, rights & 2 != 0);
        if no_access || (no_write && access.kind == AccessKind::Write && protected) {
            denied = true;
            extra |= PageFaultCode::PROTECTION_KEY;
        }
    }
    denied.then_some(extra)
}

/// Sets the accessed bits of the entries, and the dirty bit of the last one for a write. `false`
/// if an entry has changed in another way since it was read.
fn mark<M: GuestMemory + ?Sized, E>(
    memory: &M,
    state: &PagingState,
    found: &GuestTranslation,
    access: Access,
    second_stage: &mut impl FnMut(Gpa, TableUse) -> Result<Gpa, E>,
) -> Result<bool, WalkError<E>> {
    let mode = state.mode();
    let last = found.steps.len().wrapping_sub(1);
    for (index, step) in found.steps.iter().enumerate() {
        // The entries above a PAE directory have no accessed bit.
        if mode == Mode::Pae && step.level == 3 {
            continue;
        }
        let mut wanted = ACCESSED;
        if index == last && access.kind == AccessKind::Write {
            wanted |= DIRTY;
        }
        if step.entry & wanted == wanted {
            continue;
        }
        let gpa =
            second_stage(step.at, TableUse::Update).map_err(|error| WalkError::SecondStage {
                gpa: step.at,
                error,
            })?;
        let old = step.entry;
        let new = old | wanted;
        let swapped = if mode == Mode::Legacy {
            memory
                .compare_exchange_u32(gpa, old as u32, new as u32)
                .map(|r| r.map(u64::from).map_err(u64::from))
        } else {
            memory.compare_exchange_u64(gpa, old, new)
        };
        match swapped.map_err(WalkError::NoTable)? {
            Ok(_) => {}
            // Another processor has set bits, and the entry is otherwise what it was.
            Err(now) if now & wanted == wanted && (now ^ old) & !(ACCESSED | DIRTY) == 0 => {}
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}
