//! Where the emulators differ from the manual: each entry with what the manual says, as far as it says it. Volume 3A
//! of the SDM is cited by the editions in which paging is chapter 4, volume 3C by those since 2025.

use testudo_diff::Emulator;

use arrayvec::ArrayVec;
use testudo_ept::walk::{Access, AccessKind, Mode, Privilege};

use crate::Answer;
use crate::arena::{PKE, PKS};
use crate::case::{Case, Instruction, Target};
use crate::processor::Outcome;
use crate::words::{Owner, Word, Words};

/// What an emulator does otherwise than the manual says.
pub(crate) enum Kind {
    /// It makes other accesses for an instruction.
    Accesses(fn(&Case, &mut ArrayVec<Access, 2>)),
    /// It sees entries otherwise than they are.
    Sees(fn(&Case, &mut Words)),
    /// It sets accessed and dirty bits of the guest's entries without asking the second stage.
    UpdatesUnchecked,
    /// It lets pages that may not be read ask for the permissions of their pieces.
    UnreadablePieces,
    /// So much is otherwise that such cases are not compared.
    NotCompared(fn(&Case) -> bool),
    /// It reports otherwise, or changes entries otherwise.
    Answers(fn(&Case, &Words, &mut Answer)),
}

/// A documented defect.
pub(crate) struct Defect {
    pub(crate) emulator: Emulator,
    pub(crate) name: &'static str,
    /// What the manual says.
    #[expect(dead_code, reason = "the reason of the entry, for its reader")]
    pub(crate) manual: &'static str,
    pub(crate) kind: Kind,
}

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const RESERVED: u64 = 1 << 3;
const LARGE: u64 = 1 << 7;
const PROTECTION_KEY: u32 = 1 << 5;
/// The bits that an address of the guest's has in common with the host's.
const WITHIN_ARENA: u64 = (2 << 20) - 1;

/// Bits of the qualification of an EPT violation: a read; a valid linear address, and its page rather
/// than a table on the way.
const QUALIFIED_READ: u64 = 1;
const QUALIFIED_WALK: u64 = 0x180;

const SMAP_IMPLICIT: &str = "SDM vol. 3A, 4.6.1: if CR4.SMAP = 1, data may be read from a user-mode \
                             address if EFLAGS.AC = 1 and the access is explicit; by an implicit \
                             supervisor-mode access it may not, whatever EFLAGS.AC is";

fn explicit(access: &mut Access) {
    if access.privilege == Privilege::Implicit {
        access.privilege = Privilege::Supervisor;
    }
}

use Emulator::{Bochs, Qemu};
use Kind::{Accesses, Answers, NotCompared, Sees, UnreadablePieces, UpdatesUnchecked};

pub(crate) const DEFECTS: &[Defect] = &[
    Defect {
        emulator: Qemu,
        name: "a reserved bit is reported without the present bit",
        manual: "SDM vol. 3A, 4.7: because reserved bits are not checked in a paging-structure entry \
                 whose P flag is 0, bit 3 of the error code can be set only if bit 0 is also set",
        kind: Answers(|_, _, answer| match &mut answer.outcome {
            Outcome::Exception {
                vector: 14, code, ..
            } if *code & RESERVED as u32 != 0 => *code &= !(PRESENT as u32),
            Outcome::NestedFault { bits, .. } if *bits & RESERVED != 0 => *bits &= !PRESENT,
            _ => {}
        }),
    },
    Defect {
        emulator: Qemu,
        name: "a read-modify-write reads first, with a read's rights",
        manual: "SDM vol. 3A, 4.7: W/R: if the access causing the page-fault exception was a write, \
                 this flag is 1. That a read-modify-write counts as a write from its start, the manual says \
                 of EPT violations only (vol. 3C, table 30-7: it sets bit 1); Bochs has it so for all faults",
        kind: Accesses(|case, accesses| {
            let modify = [Instruction::Modify, Instruction::LockedModify];
            if modify.contains(&case.instruction)
                && let [write] = accesses[..]
            {
                accesses.insert(0, Access::new(AccessKind::Read, write.privilege));
            }
        }),
    },
    Defect {
        emulator: Qemu,
        name: "EFLAGS.AC lifts SMAP for the supervisor's implicit accesses too",
        manual: SMAP_IMPLICIT,
        kind: Accesses(|case, accesses| {
            if !case.user {
                accesses.iter_mut().for_each(explicit);
            }
        }),
    },
    Defect {
        emulator: Qemu,
        name: "a user's access to the supervisor's page is reported without its key",
        manual: "SDM vol. 3A, 4.7: the PK flag is 1 if the access causing the page-fault exception was a \
                 data access to a linear address with a protection key for which the protection-key \
                 rights registers disallow access; 2.5, CR4.PKS: for supervisor-mode addresses that is \
                 IA32_PKRS",
        kind: Answers(|case, words, answer| {
            let supervisor =
                |word: &Word| matches!(word.owner, Owner::Guest(_)) && word.value & USER == 0;
            if let Outcome::Exception {
                vector: 14, code, ..
            } = &mut answer.outcome
                && case.user
                && words.iter().any(supervisor)
            {
                *code &= !PROTECTION_KEY;
            }
        }),
    },
    Defect {
        emulator: Qemu,
        name: "PAE paging's upper entries are marked accessed",
        manual: "APM vol. 2, 5.2.3, figure 5-10: a page-directory-pointer entry of legacy PAE paging \
                 has no accessed bit; bits 8:5 must be zero",
        kind: Answers(|case, words, answer| {
            if case.mode != Mode::Pae || !matches!(answer.outcome, Outcome::Done { .. }) {
                return;
            }
            for (word, value) in words.iter().zip(&mut answer.values) {
                *value |= match word.owner {
                    Owner::Guest(3) => ACCESSED,
                    Owner::Code if case.instruction != Instruction::Fetch => ACCESSED,
                    _ => 0,
                };
            }
        }),
    },
    Defect {
        emulator: Qemu,
        name: "the low reserved bits of PAE paging's upper entries are not checked",
        manual: "APM vol. 2, 5.2.3, figure 5-10: bits 2:1 and 8:5 of a page-directory-pointer entry of \
                 legacy PAE paging must be zero",
        kind: Sees(|case, words| {
            for word in words {
                if case.mode == Mode::Pae && word.owner == Owner::Guest(3) {
                    word.value &= !0x1E6;
                }
            }
        }),
    },
    Defect {
        emulator: Bochs,
        name: "protection keys do not tell the user's pages from the supervisor's",
        manual: "SDM vol. 3A, 2.5: with CR4.PKE, PKRU specifies for each protection key whether user-mode \
                 linear addresses with that key can be read or written, and with CR4.PKS, IA32_PKRS \
                 whether supervisor-mode linear addresses can",
        kind: NotCompared(|case| case.changed(Target::Cr4, 0) & (PKE | PKS) != 0),
    },
    Defect {
        emulator: Bochs,
        name: "EFLAGS.AC lifts SMAP for implicit accesses too",
        manual: SMAP_IMPLICIT,
        kind: Accesses(|_, accesses| accesses.iter_mut().for_each(explicit)),
    },
    Defect {
        emulator: Bochs,
        name: "a guest's table walk that counts as a write is not reported as a read too",
        manual: "SDM vol. 3C, table 30-7: if accessed and dirty flags for EPT are enabled, processor \
                 accesses to guest paging-structure entries are treated as writes; if such an access \
                 causes an EPT violation, the processor sets both bit 0 and bit 1",
        kind: Answers(|case, _, answer| {
            if let Outcome::Violation { qualification, .. } = &mut answer.outcome
                && case.marks
                && *qualification & QUALIFIED_WALK == 0x80
            {
                *qualification &= !QUALIFIED_READ;
            }
        }),
    },
    Defect {
        emulator: Bochs,
        name: "a guest's entries are marked although the second stage forbids writing them",
        manual: "SDM vol. 3C, 31.3.3.2: an EPT violation occurs if the access is a data write and bit 1 \
                 was clear in any of the EPT entries; writes to guest paging structures to update \
                 accessed and dirty flags are considered to be data writes",
        kind: UpdatesUnchecked,
    },
    Defect {
        emulator: Bochs,
        name: "bit 12 of a large page's EPT entry is not checked",
        manual: "SDM vol. 3C, tables 31-3 and 31-5: bits 29:12 of an entry that maps a 1-GByte page, \
                 and 20:12 of one that maps a 2-MByte page, are reserved",
        kind: Sees(|_, words| {
            for word in words {
                let stage = matches!(word.owner, Owner::Data(2..) | Owner::Table(2..));
                if stage && word.value & LARGE != 0 {
                    word.value &= !(1 << 12);
                }
            }
        }),
    },
    Defect {
        emulator: Bochs,
        name: "nested faults at PAE paging's upper entries are reported at their table's address",
        manual: "APM vol. 2, 15.25.6: the faulting guest physical address is saved in the VMCB's \
                 EXITINFO2 field",
        kind: Answers(|case, words, answer| {
            let is_upper = |word: &Word| word.owner == Owner::Guest(3);
            if let Outcome::NestedFault { gpa, .. } = &mut answer.outcome
                && case.mode == Mode::Pae
                && let Some(upper) = words.iter().find(|word| is_upper(word))
                && (*gpa ^ upper.at.0) & WITHIN_ARENA == 0
            {
                *gpa &= !0x1F;
            }
        }),
    },
    Defect {
        emulator: Bochs,
        name: "a page that may not be read is eligible for sub-page write permissions",
        manual: "SDM vol. 3C, 31.3.4 describes pieces to which writes may be allowed although the page would \
                 normally not be writable. That the page must be readable for that is our reading of 31.3.4.1, \
                 not its words",
        kind: UnreadablePieces,
    },
];
