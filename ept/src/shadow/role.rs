//! What makes one shadow table differ from another one of the same guest frame.

use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Gpa};

use crate::walk::{Mode, PagingState};

/// Write, user and execute rights, as three bits.
pub(super) type Allowed = u8;

/// All of them.
pub(super) const EVERYTHING: Allowed = 7;

/// What an entry of the guest, or one of ours, lets through.
#[inline]
pub(super) const fn allowed(entry: u64) -> Allowed {
    let execute = if entry >> 63 == 0 { 4 } else { 0 };
    ((entry >> 1) & 3) as u8 | execute
}

/// What a shadow table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A table in guest memory, whose frame is watched.
    Table,
    /// A region of memory that the guest maps with one large page, or without paging.
    Direct,
    /// The top of PAE, legacy or no paging: four entries that the guest keeps elsewhere.
    Top,
}

/// Everything beside the frame that decides what a shadow table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Role {
    mode: u8,
    /// CR0.WP, CR4.PSE, SMEP, SMAP, PKE and PKS, EFER.NXE.
    controls: u8,
    /// What the entries above let through.
    allowed: Allowed,
}

/// A shadow table's name. `Table` comes first and then the frame, so that all shadows of one
/// frame lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) kind: Kind,
    /// The guest frame of the table or of the region; for a top, CR3's address bits.
    pub(super) frame: u64,
    pub(super) level: u8,
    /// Which part of a guest table of 1024 entries.
    part: u8,
    role: Role,
}

impl Key {
    /// The name of the root for these registers.
    pub(super) fn root(state: &PagingState) -> Self {
        let mode = state.mode();
        let cr4 = Cr4Flags::from_bits_retain(state.cr4);
        let bits = [
            state.cr0 & Cr0Flags::WRITE_PROTECT.bits() != 0,
            cr4.contains(Cr4Flags::PAGE_SIZE_EXTENSION),
            cr4.contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION),
            cr4.contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION),
            cr4.contains(Cr4Flags::PROTECTION_KEY_USER),
            cr4.contains(Cr4Flags::PROTECTION_KEY_SUPERVISOR),
            state.efer & EferFlags::NO_EXECUTE_ENABLE.bits() != 0,
        ];
        let controls = bits
            .iter()
            .rev()
            .fold(0, |sum, bit| sum << 1 | u8::from(*bit));
        let (kind, level, frame) = match mode {
            Mode::Level4 => (Kind::Table, 4, state.root(mode) >> 12),
            Mode::Level5 => (Kind::Table, 5, state.root(mode) >> 12),
            Mode::Off => (Kind::Top, 3, 0),
            Mode::Legacy | Mode::Pae => (Kind::Top, 3, state.root(mode)),
        };
        let role = Role {
            mode: match mode {
                Mode::Off => 0,
                Mode::Legacy => 1,
                Mode::Pae => 2,
                Mode::Level4 => 4,
                Mode::Level5 => 5,
            },
            controls: if mode == Mode::Off { 0 } else { controls },
            allowed: EVERYTHING,
        };
        Self {
            kind,
            frame,
            level,
            part: 0,
            role,
        }
    }

    /// The first name that a shadow of the table in `frame` can have.
    pub(super) const fn first_of(frame: u64) -> Self {
        Self {
            kind: Kind::Table,
            frame,
            level: 0,
            part: 0,
            role: Role {
                mode: 0,
                controls: 0,
                allowed: 0,
            },
        }
    }

    /// The shadow of the guest table in `frame`, one level below this one, for `address`.
    pub(super) fn table(self, frame: u64, allowed: Allowed, address: u64) -> Self {
        let level = self.level - 1;
        // A guest table of 1024 entries covers two of ours, and a directory four.
        let part = match (self.is_legacy(), level) {
            (true, 2) => (address >> 30) & 3,
            (true, 1) => (address >> 21) & 1,
            _ => 0,
        };
        Self {
            kind: Kind::Table,
            frame,
            level,
            part: part as u8,
            role: Role {
                allowed,
                ..self.role
            },
        }
    }

    /// The shadow for a region of memory from `frame` on, one level below this one.
    pub(super) fn direct(self, frame: u64, allowed: Allowed) -> Self {
        Self {
            kind: Kind::Direct,
            frame,
            level: self.level - 1,
            part: 0,
            role: Role {
                allowed,
                ..self.role
            },
        }
    }

    #[inline]
    pub(super) fn is_legacy(&self) -> bool {
        self.role.mode == 1
    }

    /// Whether the hardware reads this table as the four pointers of PAE paging.
    #[inline]
    pub(super) fn is_pae_top(&self) -> bool {
        self.kind == Kind::Top
    }

    /// Which entry of the shadow leads to `address`.
    #[inline]
    pub(super) fn index(&self, address: u64) -> usize {
        let entries = if self.is_pae_top() { 4 } else { 512 };
        (address >> (3 + 9 * u32::from(self.level))) as usize & (entries - 1)
    }

    /// The size in bytes of an entry of the guest's table.
    #[inline]
    pub(super) fn entry_bytes(&self) -> u64 {
        if self.is_legacy() { 4 } else { 8 }
    }

    /// Where the guest keeps what entry `index` of the shadow says.
    #[inline]
    pub(super) fn guest_entry(&self, index: usize) -> Gpa {
        let index = index as u64;
        let part = u64::from(self.part);
        let number = match (self.is_legacy(), self.level) {
            (true, 2) => part << 8 | index >> 1,
            (true, _) => part << 9 | index,
            _ => index,
        };
        Gpa((self.frame << 12) | (number * self.entry_bytes()))
    }

    /// The entries of the shadow that say what entry `number` of the guest's table says, as an
    /// inclusive range; empty if they are in another part.
    pub(super) fn shadows_of(&self, number: u64) -> core::ops::Range<usize> {
        let (part, first, count) = match (self.is_legacy(), self.level) {
            (true, 2) => (number >> 8, (number & 0xFF) * 2, 2),
            (true, _) => (number >> 9, number & 0x1FF, 1),
            _ => (0, number & 0x1FF, 1),
        };
        if part == u64::from(self.part) {
            first as usize..(first + count) as usize
        } else {
            0..0
        }
    }
}
