//! What the walkers of `testudo-ept` say becomes of an access.

use arrayvec::ArrayVec;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory, Gva};
use testudo_ept::format::{Format, Rights};
use testudo_ept::guest_table::{GuestTable, TableFault};
use testudo_ept::walk::{Access, AccessKind, TableUse, WalkError, walk_nested};

use crate::arena::{AL, Arena, DESCRIPTOR, DESCRIPTOR_ACCESSED, INSTRUCTIONS};
use crate::case::{Case, Instruction};
use crate::processor::{Outcome, Processor, Refused};
use crate::words::Prepared;

/// How the model sees a processor.
pub(crate) struct View {
    /// What the instruction does to its target.
    pub(crate) accesses: ArrayVec<Access, 2>,
    /// The second stage is asked before the processor marks the guest's entries, as it must be.
    pub(crate) checks_updates: bool,
    /// Pages that may not even be read ask for their pieces too, as they must not.
    pub(crate) unreadable_pieces: bool,
}

/// What becomes of a case whose words are in place; it does to memory what the instruction does.
///
/// `None`: the tables lead out of the arena, which would be no fault of anybody's.
pub(crate) fn expect<P: Processor>(
    processor: &P,
    arena: &Arena,
    case: &Case,
    prepared: &Prepared,
    view: &View,
) -> Option<Outcome> {
    let mut at = Gpa(0);
    if case.instruction != Instruction::Fetch {
        let cpl = if case.user { 3 } else { 0 };
        let fetch = Access::at_cpl(AccessKind::Fetch, cpl);
        if let Err(outcome) =
            translate(processor, arena, case, prepared, view, prepared.code, fetch)?
        {
            return Some(outcome);
        }
    }
    for &access in &view.accesses {
        let target = prepared.target;
        at = match translate(processor, arena, case, prepared, view, target, access)? {
            Ok(at) => at,
            Err(outcome) => return Some(outcome),
        };
        // What executing or loading something else does is no matter of paging.
        if !is_ours(arena, case, at)? {
            return None;
        }
    }
    let done = finish(arena, case, at);
    done.map(|byte| Outcome::Done { byte })
}

/// Whether what lies there is what the instruction expects.
fn is_ours(arena: &Arena, case: &Case, at: Gpa) -> Option<bool> {
    let content = arena.memory.load_u64(Gpa(at.0 & !7)).ok()?;
    Some(match case.instruction {
        Instruction::Fetch => INSTRUCTIONS.contains(&content),
        Instruction::LoadSegment | Instruction::MarkSegment => {
            content & !DESCRIPTOR_ACCESSED == DESCRIPTOR
        }
        _ => true,
    })
}

/// The host-physical address of an access, or what the processor reports instead.
fn translate<P: Processor>(
    processor: &P,
    arena: &Arena,
    case: &Case,
    prepared: &Prepared,
    view: &View,
    linear: u64,
    access: Access,
) -> Option<Result<Gpa, Outcome>> {
    let memory = &arena.memory;
    let root = Gpa(prepared.start.stage.0);
    let stage = GuestTable::new(memory, processor.stage(case), root);
    // Outside 64-bit mode, instructions form addresses of 32 bits.
    let width = if prepared.paging.mode().is_long() {
        64
    } else {
        32
    };
    let linear = linear & (u64::MAX >> (64 - width));
    let refused = |why, gpa, at| Refused {
        why,
        gpa,
        linear: Gva(linear),
        access,
        at,
    };
    let second_stage = |gpa, mut table_use: TableUse| {
        if !view.checks_updates {
            table_use = TableUse::Load;
        }
        let page = stage.translate(gpa, processor.table_rights(case, table_use));
        page.map(|page| page.gpa).map_err(|why| (why, table_use))
    };
    let page = match walk_nested(memory, &prepared.paging, Gva(linear), access, second_stage) {
        Ok(page) => page,
        Err(WalkError::Fault(fault)) => {
            return Some(Err(Outcome::Exception {
                vector: 14,
                code: fault.code.bits(),
                address: fault.address.0,
            }));
        }
        Err(WalkError::NonCanonical(_)) => {
            return Some(Err(Outcome::Exception {
                vector: 13,
                code: 0,
                address: 0,
            }));
        }
        Err(WalkError::SecondStage {
            error: (TableFault::NoTable(_), _),
            ..
        }) => return None,
        Err(WalkError::SecondStage {
            gpa,
            error: (why, table_use),
        }) => {
            let refused = refused(why, gpa, Err(table_use));
            return processor.report(case, &refused).map(Err);
        }
        Err(_) => return None,
    };
    match stage.translate(page.gpa, processor.page_rights(access, &page)) {
        Ok(found) => Some(Ok(found.gpa)),
        Err(why) => {
            if access.kind == AccessKind::Write
                && let Some(at) = write_piece(processor, arena, case, view, &stage, page.gpa)
            {
                return Some(Ok(at));
            }
            let refused = refused(why, page.gpa, Ok(&page));
            processor.report(case, &refused).map(Err)
        }
    }
}

/// Where a write goes that the page forbids and the piece of the page allows.
fn write_piece<P: Processor>(
    processor: &P,
    arena: &Arena,
    case: &Case,
    view: &View,
    stage: &GuestTable<'_, P::Stage, GuestRam>,
    gpa: Gpa,
) -> Option<Gpa> {
    let found = stage.look_up(gpa, Rights::empty()).ok()?;
    let readable = view.unreadable_pieces || found.rights.contains(Rights::READ);
    if found.shift != 12 || !readable || !processor.allows_piece(case, gpa, found.flags) {
        return None;
    }
    let found = stage.translate(gpa, Rights::empty()).ok()?;
    let leaf = found.steps.last()?;
    let entry = arena.memory.load_u64(leaf.at).ok()?;
    let dirty = entry | stage.format().dirty_bit();
    arena.memory.store_u64(leaf.at, dirty).ok()?;
    Some(found.gpa)
}

/// Makes the access; gives what the guest then has in AL, or the second byte of its instruction.
fn finish(arena: &Arena, case: &Case, at: Gpa) -> Option<u8> {
    let memory = &arena.memory;
    let mut byte = [0];
    memory.read(at, &mut byte).ok()?;
    let [old] = byte;
    match case.instruction {
        Instruction::Read => return Some(old),
        Instruction::Write => memory.write(at, &[AL]).ok()?,
        Instruction::Modify | Instruction::LockedModify => {
            memory.write(at, &[old.wrapping_add(AL)]).ok()?;
        }
        Instruction::Fetch => {
            memory.read(Gpa(at.0 | 1), &mut byte).ok()?;
            return Some(byte[0]);
        }
        Instruction::LoadSegment | Instruction::MarkSegment => {
            let descriptor = memory.load_u64(at).ok()?;
            let marked = descriptor | DESCRIPTOR_ACCESSED;
            memory.store_u64(at, marked).ok()?;
        }
    }
    Some(AL)
}
