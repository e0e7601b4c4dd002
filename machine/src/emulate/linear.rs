//! Linear addresses, for a [`Cpu`](super::Cpu) whose memory lies behind a guest's paging and a second stage: accesses
//! are cut at the ends of pages, and a walk that leads nowhere becomes the fault that the guest's processor raises.

use testudo_arch::regs::{CpuMode, SystemRegisters};
use testudo_arch::{Gpa, GuestMemory, Gva, PAGE_SIZE, PageSize};
use testudo_ept::walk::{
    Access, AccessKind, PageFaultCode, PagingState, Privilege, TableUse, WalkError, walk_nested,
};

use super::{Fault, Intent};

/// The longest access of one instruction: two pages at the most.
const MAX_PARTS: usize = 2;

/// Why a linear address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss {
    /// The guest's tables say so.
    Fault(Fault),
    /// The walk gave up, because the tables kept changing or the second stage has no translation at present.
    Later,
}

/// An access that goes through a second stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageAccess {
    /// The linear address that it is for.
    pub linear: Gva,
    /// Whether it writes.
    pub write: bool,
    /// Whether it fetches an instruction.
    pub fetch: bool,
    /// Whether it is to an entry of a table on the way.
    pub table: bool,
}

/// What linear addresses lead to. The functions of this module are accesses to it.
pub trait Reach {
    /// The registers that say how wide addresses are and what the program may do.
    fn system(&self) -> &SystemRegisters;

    /// Where a linear address leads at the end of both stages; [`walk`] finds it.
    ///
    /// # Errors
    ///
    /// It leads nowhere.
    fn find(&mut self, address: Gva, access: Access) -> Result<Gpa, Miss>;

    /// Takes note that an access missed what will be there later. Whatever the emulator says, the instruction
    /// has not been executed then, and is to be tried again.
    fn put_off(&mut self);

    /// Reads what is at this address, memory or a device.
    fn load(&mut self, gpa: Gpa, data: &mut [u8]);

    /// Writes there.
    fn store(&mut self, gpa: Gpa, data: &[u8]);

    /// Exchanges bytes of memory as [`exchange`] does; `None` stands for what a plain write is right for.
    fn exchange(&mut self, gpa: Gpa, current: &[u8], new: &[u8]) -> Option<bool>;
}

/// Goes through the guest's tables, which themselves lie behind the second stage, as does what they lead to.
///
/// # Errors
///
/// The address leads nowhere.
pub fn walk(
    memory: &impl GuestMemory,
    paging: &PagingState,
    address: Gva,
    access: Access,
    mut second_stage: impl FnMut(Gpa, StageAccess) -> Option<Gpa>,
) -> Result<Gpa, Miss> {
    let own = StageAccess {
        linear: address,
        write: access.kind == AccessKind::Write,
        fetch: access.kind == AccessKind::Fetch,
        table: false,
    };
    let stage = |gpa, table| {
        let of_table = StageAccess {
            write: table == TableUse::Update,
            fetch: false,
            table: true,
            ..own
        };
        second_stage(gpa, of_table).ok_or(())
    };
    match walk_nested(memory, paging, address, access, stage) {
        Ok(found) => second_stage(found.gpa, own).ok_or(Miss::Later),
        Err(error) => Err(missed(address, access, error)),
    }
}

#[cold]
fn missed(address: Gva, access: Access, error: WalkError<()>) -> Miss {
    match error {
        WalkError::Fault(fault) => Miss::Fault(Fault::page(fault.address, fault.code.bits())),
        WalkError::NonCanonical(_) => Miss::Fault(Fault::GP0),
        WalkError::Contended | WalkError::SecondStage { .. } => Miss::Later,
        // A table that is not in memory: a bus that nobody drives reads as ones, and an entry of ones has
        // reserved bits set.
        _ => {
            let mut code = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
            code.set(PageFaultCode::WRITE, access.kind == AccessKind::Write);
            code.set(PageFaultCode::USER, access.privilege == Privilege::User);
            Miss::Fault(Fault::page(address, code.bits()))
        }
    }
}

/// The guest-physical pieces of a linear access.
struct Parts {
    pieces: [(Gpa, usize); MAX_PARTS],
    count: usize,
}

impl Parts {
    fn of(
        reach: &mut impl Reach,
        address: Gva,
        len: usize,
        kind: AccessKind,
    ) -> Result<Self, Fault> {
        let access = Access::at_cpl(kind, reach.system().cpl());
        let wide = reach.system().mode() == CpuMode::Long64;
        let mut parts = Self {
            pieces: [(Gpa::ZERO, 0); MAX_PARTS],
            count: 0,
        };
        let first = len.min((PAGE_SIZE - address.offset_in(PageSize::Size4K)) as usize);
        for (skip, len) in [(0, first), (first, len - first)] {
            if len == 0 {
                break;
            }
            let mut at = address.wrapping_add(skip as u64);
            // Outside 64-bit mode, linear addresses are 32 bits wide.
            if !wide {
                at.0 &= 0xFFFF_FFFF;
            }
            match reach.find(at, access) {
                Ok(gpa) => parts.pieces[parts.count] = (gpa, len),
                Err(Miss::Fault(fault)) => return Err(fault),
                Err(Miss::Later) => {
                    reach.put_off();
                    // It only ends this attempt.
                    return Err(Fault::GP0);
                }
            }
            parts.count += 1;
        }
        Ok(parts)
    }

    fn pieces(&self) -> &[(Gpa, usize)] {
        &self.pieces[..self.count]
    }
}

/// [`Cpu::fetch`](super::Cpu::fetch).
///
/// # Errors
///
/// The fetch's fault.
pub fn fetch(reach: &mut impl Reach, address: Gva, code: &mut [u8]) -> Result<usize, Fault> {
    let room = (PAGE_SIZE - address.offset_in(PageSize::Size4K)) as usize;
    let len = code.len().min(room);
    let parts = Parts::of(reach, address, len, AccessKind::Fetch)?;
    let (gpa, len) = parts.pieces[0];
    reach.load(gpa, &mut code[..len]);
    Ok(len)
}

/// [`Cpu::read`](super::Cpu::read).
///
/// # Errors
///
/// The access's fault.
pub fn read(
    reach: &mut impl Reach,
    address: Gva,
    data: &mut [u8],
    intent: Intent,
) -> Result<(), Fault> {
    let kind = match intent {
        Intent::Read => AccessKind::Read,
        Intent::Modify => AccessKind::Write,
    };
    let parts = Parts::of(reach, address, data.len(), kind)?;
    let mut rest = data;
    for &(gpa, len) in parts.pieces() {
        let (part, tail) = rest.split_at_mut(len);
        reach.load(gpa, part);
        rest = tail;
    }
    Ok(())
}

/// [`Cpu::write`](super::Cpu::write).
///
/// # Errors
///
/// The access's fault.
pub fn write(reach: &mut impl Reach, address: Gva, data: &[u8]) -> Result<(), Fault> {
    let parts = Parts::of(reach, address, data.len(), AccessKind::Write)?;
    let mut rest = data;
    for &(gpa, len) in parts.pieces() {
        let (part, tail) = rest.split_at(len);
        reach.store(gpa, part);
        rest = tail;
    }
    Ok(())
}

/// [`Cpu::probe_write`](super::Cpu::probe_write).
///
/// # Errors
///
/// The write's fault.
pub fn probe_write(reach: &mut impl Reach, address: Gva, len: usize) -> Result<(), Fault> {
    Parts::of(reach, address, len, AccessKind::Write).map(|_| ())
}

/// [`Cpu::compare_exchange`](super::Cpu::compare_exchange).
///
/// # Errors
///
/// The access's fault.
pub fn compare_exchange(
    reach: &mut impl Reach,
    address: Gva,
    current: &[u8],
    new: &[u8],
) -> Result<bool, Fault> {
    let parts = Parts::of(reach, address, new.len(), AccessKind::Write)?;
    if let [(gpa, _)] = *parts.pieces()
        && let Some(exchanged) = reach.exchange(gpa, current, new)
    {
        return Ok(exchanged);
    }
    write(reach, address, new).map(|()| true)
}

/// Writes 4 or 8 aligned bytes of memory if they are `current`, atomically, and says whether it did. `None` for
/// anything else.
pub fn exchange(memory: &impl GuestMemory, gpa: Gpa, current: &[u8], new: &[u8]) -> Option<bool> {
    let len = new.len() as u64;
    if !memory.contains(gpa, len) || !gpa.0.is_multiple_of(len.max(1)) {
        return None;
    }
    if let (Ok(current), Ok(new)) = (current.try_into(), new.try_into()) {
        let (current, new) = (u32::from_le_bytes(current), u32::from_le_bytes(new));
        let result = memory.compare_exchange_u32(gpa, current, new);
        return Some(result.is_ok_and(|exchanged| exchanged.is_ok()));
    }
    let (current, new) = (current.try_into().ok()?, new.try_into().ok()?);
    let (current, new) = (u64::from_le_bytes(current), u64::from_le_bytes(new));
    let result = memory.compare_exchange_u64(gpa, current, new);
    Some(result.is_ok_and(|exchanged| exchanged.is_ok()))
}
