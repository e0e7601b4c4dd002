//! A case to try: valid tables and registers, an access, and changes to all of them.

use core::fmt;

use arrayvec::ArrayVec;
use testudo_ept::walk::{Access, AccessKind, Mode, Privilege};

/// The instruction that makes the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// A load of one byte.
    Read,
    /// A store of one byte.
    Write,
    /// A read-modify-write of one byte.
    Modify,
    /// The same with a LOCK prefix.
    LockedModify,
    /// The instruction itself.
    Fetch,
    /// A load of ES, which reads the descriptor table: the processor's own access.
    LoadSegment,
    /// The same with a descriptor whose accessed bit is clear: the processor sets it.
    MarkSegment,
}

impl Instruction {
    pub(crate) const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::Modify,
        Self::LockedModify,
        Self::Fetch,
        Self::LoadSegment,
        Self::MarkSegment,
    ];

    /// Whether the processor makes the access by itself, to a descriptor.
    pub(crate) fn is_implicit(self) -> bool {
        matches!(self, Self::LoadSegment | Self::MarkSegment)
    }

    /// The accesses to the target, in their order.
    pub(crate) fn accesses(self, user: bool) -> ArrayVec<Access, 2> {
        let explicit = if user {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        let one = |kind| [Access::new(kind, explicit)].into_iter().collect();
        let implicit = |kind| Access::new(kind, Privilege::Implicit);
        match self {
            Self::Read => one(AccessKind::Read),
            Self::Write | Self::Modify | Self::LockedModify => one(AccessKind::Write),
            Self::Fetch => one(AccessKind::Fetch),
            Self::LoadSegment => [implicit(AccessKind::Read)].into_iter().collect(),
            Self::MarkSegment => [implicit(AccessKind::Read), implicit(AccessKind::Write)].into(),
        }
    }
}

/// What a change changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The entry of this level on the guest's path to the target.
    Guest(u8),
    /// The entry of this level on the second stage's path to the data.
    Data(u8),
    /// The entry of this level on the second stage's path to one of the guest's tables.
    Table(u8),
    /// The linear address of the access.
    Linear,
    Cr0,
    Cr4,
    Efer,
    Rflags,
    Pkru,
    Pkrs,
}

/// Bits to clear, then bits to set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) target: Target,
    pub(crate) clear: u64,
    pub(crate) set: u64,
}

impl Change {
    pub(crate) fn set(target: Target, bits: u64) -> Self {
        Self {
            target,
            clear: 0,
            set: bits,
        }
    }

    pub(crate) fn clear(target: Target, bits: u64) -> Self {
        Self {
            target,
            clear: bits,
            set: 0,
        }
    }
}

/// Names of bits, beside which all others go by their numbers.
type Names = &'static [(u64, &'static str)];

const GUEST: Names = &[
    (1 << 0, "P"),
    (1 << 1, "R/W"),
    (1 << 2, "U/S"),
    (1 << 3, "PWT"),
    (1 << 4, "PCD"),
    (1 << 5, "A"),
    (1 << 6, "D"),
    (1 << 7, "PS or PAT"),
    (1 << 8, "G"),
    (1 << 63, "XD"),
];
const CR0: Names = &[(1 << 16, "WP")];
const CR4: Names = &[
    (1 << 4, "PSE"),
    (1 << 7, "PGE"),
    (1 << 20, "SMEP"),
    (1 << 21, "SMAP"),
    (1 << 22, "PKE"),
    (1 << 24, "PKS"),
];
const EFER: Names = &[(1 << 11, "NXE")];
const RFLAGS: Names = &[(1 << 18, "AC")];
/// Bits of the second stage have names that differ from vendor to vendor.
const NONE: Names = &[];

/// Bits by their names.
struct Bits(u64, Names);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut rest, mut first) = (self.0, true);
        while rest != 0 {
            let bit = rest & rest.wrapping_neg();
            f.write_str(if first { "" } else { ", " })?;
            match self.1.iter().find(|(named, _)| *named == bit) {
                Some((_, name)) => f.write_str(name)?,
                None => write!(f, "bit {}", bit.trailing_zeros())?,
            }
            (rest, first) = (rest & (rest - 1), false);
        }
        Ok(())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = match self.target {
            Target::Guest(level) => {
                write!(f, "the guest's entry of level {level}")?;
                GUEST
            }
            Target::Data(level) => {
                write!(f, "the data's second-stage entry of level {level}")?;
                NONE
            }
            Target::Table(level) => {
                write!(f, "the table's second-stage entry of level {level}")?;
                NONE
            }
            Target::Linear => {
                f.write_str("the linear address")?;
                NONE
            }
            Target::Cr0 => {
                f.write_str("CR0")?;
                CR0
            }
            Target::Cr4 => {
                f.write_str("CR4")?;
                CR4
            }
            Target::Efer => {
                f.write_str("EFER")?;
                EFER
            }
            Target::Rflags => {
                f.write_str("RFLAGS")?;
                RFLAGS
            }
            Target::Pkru => {
                f.write_str("PKRU")?;
                NONE
            }
            Target::Pkrs => {
                f.write_str("PKRS")?;
                NONE
            }
        };
        match (self.clear, self.set) {
            (0, set) => write!(f, " with {}", Bits(set, names)),
            (clear, 0) => write!(f, " without {}", Bits(clear, names)),
            (u64::MAX, set) => write!(f, " of {set:#x}"),
            (clear, set) => write!(f, " with {set:#x} in {clear:#x}"),
        }
    }
}

/// Where the guest's data lies in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DataPlace {
    /// Where the second stage maps everything.
    Plain,
    /// Below 4 GiB, behind a second-stage path of its own from level 3 on, mapped at this level.
    Near(u8),
    /// Above 512 GiB, behind a second-stage path of its own from the top, mapped at this level.
    Far(u8),
}

/// One of the guest's tables behind a second-stage path of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TablePlace {
    /// The level of the guest's table.
    pub(crate) table: u8,
    /// The level of the second stage at which it is mapped.
    pub(crate) leaf: u8,
}

/// A case to try.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) mode: Mode,
    pub(crate) instruction: Instruction,
    pub(crate) user: bool,
    /// The upper bits of the linear address: an index into the tables above 1 GiB.
    pub(crate) upper: u64,
    /// The offset in the page.
    pub(crate) offset: u64,
    /// The level of the guest's tables that maps the target.
    pub(crate) leaf: u8,
    pub(crate) data: DataPlace,
    pub(crate) table: Option<TablePlace>,
    /// EPT with accessed and dirty bits.
    pub(crate) marks: bool,
    /// EPT with mode-based execute control.
    pub(crate) mode_based: bool,
    /// EPT with sub-page permissions: the pieces of the data's page that may be written.
    pub(crate) pieces: Option<u32>,
    pub(crate) changes: ArrayVec<Change, { Case::MAX_CHANGES }>,
}

impl Case {
    pub(crate) const MAX_CHANGES: usize = 12;

    /// A value after the changes to it.
    pub(crate) fn changed(&self, target: Target, value: u64) -> u64 {
        let concerned = self.changes.iter().filter(|c| c.target == target);
        concerned.fold(value, |value, c| (value & !c.clear) | c.set)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = if self.user { "user" } else { "supervisor" };
        let (mode, what, leaf) = (self.mode, self.instruction, self.leaf);
        write!(f, "{mode:?}, {who} {what:?}, mapped at level {leaf}")?;
        match self.data {
            DataPlace::Plain => {}
            DataPlace::Near(leaf) => write!(f, ", data behind a second stage of level {leaf}")?,
            DataPlace::Far(leaf) => {
                write!(
                    f,
                    ", data above 512 GiB behind a second stage of level {leaf}"
                )?;
            }
        }
        if let Some(TablePlace { table, leaf }) = self.table {
            write!(
                f,
                ", table of level {table} behind a second stage of level {leaf}"
            )?;
        }
        if self.marks {
            f.write_str(", EPT with accessed and dirty bits")?;
        }
        if self.mode_based {
            f.write_str(", EPT with mode-based execution")?;
        }
        if let Some(pieces) = self.pieces {
            write!(f, ", EPT with sub-page permissions {pieces:#x}")?;
        }
        for change in &self.changes {
            write!(f, ", {change}")?;
        }
        Ok(())
    }
}
