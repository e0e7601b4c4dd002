//! Random cases near the border: each is a function of the seed and its number.

use arrayvec::ArrayVec;
use testudo_diff::Random;
use testudo_ept::format::ept::EptFlags;
use testudo_ept::walk::Mode;

use crate::arena::Arena;
use crate::case::{Case, Change, DataPlace, Instruction, TablePlace, Target};
use crate::processor::Offers;

const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PGE: u64 = 1 << 7;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const PKS: u64 = 1 << 24;
const LA57: u64 = 1 << 12;
const NXE: u64 = 1 << 11;
const AC: u64 = 1 << 18;

/// The bits of CR4 that concern paging and that a case may change, and the one that selects a mode.
pub(crate) const PAGING_CR4: u64 = PSE | PGE | SMEP | SMAP | PKE | PKS | LA57;

/// Bits of the guest's entries.
mod bit {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const RIGHTS: u64 = 6;
    pub(super) const MARKS: u64 = 0x60;
    pub(super) const LARGE: u64 = 0x80;
    /// PWT, PCD, G and what is free for software.
    pub(super) const IGNORED: u64 = 0x18 | 0xF00;
    pub(super) const KEY: u64 = 0xF << 59;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
    pub(super) const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
}

/// Makes cases.
pub(crate) struct Generator<'a> {
    pub(crate) offers: &'a Offers,
    pub(crate) arena: &'a Arena,
}

impl Generator<'_> {
    /// The valid case that differs from the simplest in nothing.
    pub(crate) fn plain(mode: Mode) -> Case {
        Case {
            mode,
            instruction: Instruction::Read,
            user: false,
            upper: 0,
            offset: 0,
            leaf: 1,
            data: DataPlace::Plain,
            table: None,
            marks: false,
            mode_based: false,
            pieces: None,
            changes: ArrayVec::new(),
        }
    }

    /// Case number `index` of the run with this seed.
    pub(crate) fn case(&self, seed: u64, index: u64) -> Case {
        let mut random = Random::new(seed, index);
        let mut mode = random.pick(&self.offers.modes);
        if mode == Mode::Off && !random.one_in(4) {
            mode = Mode::Level4;
        }
        let instruction = random.pick(&Instruction::ALL);
        let largest = match mode {
            Mode::Off => 1,
            Mode::Legacy | Mode::Pae => 2,
            _ if self.offers.gigabyte_pages => 3,
            _ => 2,
        };
        let leaf = match random.below(4) {
            0 => 1 + random.below(largest) as u8,
            _ => 1,
        };
        let align = match instruction {
            Instruction::Fetch => !1,
            _ if instruction.is_implicit() => !7,
            _ => !0,
        };
        let mut case = Case {
            instruction,
            // Without protection there is no user; without paging nobody asks.
            user: mode != Mode::Off && random.one_in(2),
            upper: random.next() >> 16,
            offset: random.below(4096) & align,
            leaf,
            data: self.data_place(&mut random, mode, leaf),
            table: self.table_place(&mut random, mode, leaf),
            marks: self.offers.marks && random.one_in(2),
            mode_based: self.offers.mode_based && random.one_in(2),
            ..Self::plain(mode)
        };
        let small = matches!(case.data, DataPlace::Near(1) | DataPlace::Far(1));
        if self.offers.sub_pages && small && random.one_in(3) {
            case.pieces = Some(random.next() as u32);
            let target = Target::Data(1);
            case.changes.push(Change {
                target,
                clear: EptFlags::WRITE.bits(),
                set: EptFlags::SUB_PAGE_WRITE.bits(),
            });
        }
        for _ in 0..random.below(Case::MAX_CHANGES as u64 - 4) {
            if let Some(change) = self.change(&mut random, &case) {
                case.changes.push(change);
            }
        }
        // A right that everything else turns on is worth setting often.
        if random.one_in(2) {
            let target = random.pick(&[Target::Cr0, Target::Efer]);
            let bits = if target == Target::Cr0 { WP } else { NXE };
            case.changes.push(Change::set(target, bits));
        }
        case
    }

    fn data_place(&self, random: &mut Random, mode: Mode, leaf: u8) -> DataPlace {
        let level = 1 + random.below(6).saturating_sub(3) as u8;
        // 32-bit entries reach that far in large pages only.
        let reaches = match mode {
            Mode::Off => false,
            Mode::Legacy => leaf == 2,
            _ => true,
        };
        match random.below(4) {
            0 => DataPlace::Plain,
            1 if reaches && self.offers.physical_bits >= 40 => DataPlace::Far(level),
            _ => DataPlace::Near(level),
        }
    }

    fn table_place(&self, random: &mut Random, mode: Mode, leaf: u8) -> Option<TablePlace> {
        if mode == Mode::Off || random.one_in(2) {
            return None;
        }
        Some(TablePlace {
            table: leaf + random.below(u64::from(mode.levels() - leaf + 1)) as u8,
            leaf: 1 + random.below(6).saturating_sub(3) as u8,
        })
    }

    fn change(&self, random: &mut Random, case: &Case) -> Option<Change> {
        match random.below(8) {
            0..=3 if case.mode != Mode::Off => Some(self.guest_change(random, case)),
            4 | 5 => self.stage_change(random, case),
            6 => Some(self.register_change(random, case)),
            _ if random.one_in(16) && case.mode != Mode::Off => {
                let data = !case.instruction.is_implicit();
                let bit = 1 << (48 + random.below(16));
                // An instruction pointer that is not canonical is no page table's affair.
                (data && case.instruction != Instruction::Fetch)
                    .then(|| Change::set(Target::Linear, bit))
            }
            _ => Some(self.register_change(random, case)),
        }
    }

    fn guest_change(&self, random: &mut Random, case: &Case) -> Change {
        let levels = u64::from(case.mode.levels() - case.leaf + 1);
        let level = case.leaf + random.below(levels) as u8;
        let target = Target::Guest(level);
        if case.mode == Mode::Pae && level == 3 && self.offers.pdpte_registers {
            // Loading the registers checks the others.
            return match random.below(4) {
                0 => Change::clear(target, bit::PRESENT),
                1 => self.frame_change(random, target),
                _ => Change::set(target, random.bit_of(0xE18)),
            };
        }
        let wide = bit::ADDRESS & !((1 << self.offers.physical_bits) - 1);
        match random.below(16) {
            0 => Change::clear(target, bit::PRESENT),
            1..=4 => Change::clear(target, random.bit_of(bit::RIGHTS)),
            5 | 6 => Change::set(target, bit::NO_EXECUTE),
            7 | 8 => Change::set(target, random.bit_of(bit::MARKS)),
            9 => Change::set(target, bit::LARGE),
            10 => Change::clear(target, bit::LARGE),
            11 => Change::set(target, random.bit_of(bit::IGNORED | 0x7F << 52)),
            12 => Change::set(target, random.next() & bit::KEY),
            13 => Change::set(target, random.bit_of(wide)),
            // The low bits of a large page's address: the PAT bit, then reserved ones.
            14 if level == case.leaf && level > 1 => {
                let inside = (1 << case.mode.shift(level)) - 1;
                Change::set(target, random.bit_of(inside & !0xFFF))
            }
            _ => self.frame_change(random, target),
        }
    }

    fn frame_change(&self, random: &mut Random, target: Target) -> Change {
        Change {
            target,
            clear: bit::ADDRESS,
            set: random.pick(&self.arena.other_frames()),
        }
    }

    fn stage_change(&self, random: &mut Random, case: &Case) -> Option<Change> {
        let data = match case.data {
            DataPlace::Plain => None,
            DataPlace::Near(leaf) => Some((leaf, 3)),
            DataPlace::Far(leaf) => Some((leaf, 4)),
        };
        let table = case.table.map(|place| (place.leaf, 3));
        let (kind, (leaf, top)): (fn(u8) -> Target, _) = match (data, table) {
            (Some(range), None) => (Target::Data, range),
            (None, Some(range)) => (Target::Table, range),
            (Some(range), Some(_)) if random.one_in(2) => (Target::Data, range),
            (_, Some(range)) => (Target::Table, range),
            (None, None) => return None,
        };
        let level = leaf + random.below(u64::from(top - leaf + 1)) as u8;
        let target = kind(level);
        let wide = bit::ADDRESS & !((1 << self.offers.physical_bits) - 1);
        let inside = (1u64 << (3 + 9 * u32::from(level))) - 1;
        Some(match random.below(16) {
            0..=5 => Change::clear(target, random.bit_of(self.offers.stage_bits & 0x407)),
            // A table's address read as a page's has reserved bits, and stays harmless.
            6 if level > leaf => Change::set(target, bit::LARGE),
            7 => Change::set(target, random.bit_of(wide)),
            8 if level == leaf => Change::set(target, random.bit_of(inside & !0xFFF)),
            9 => Change::set(target, random.bit_of(0x7FF << 52)),
            10 => Change {
                target,
                clear: 7 << 3,
                set: random.below(8) << 3,
            },
            _ => Change::set(target, random.bit_of(self.offers.stage_bits & !bit::LARGE)),
        })
    }

    fn register_change(&self, random: &mut Random, case: &Case) -> Change {
        let offered = self.offers.cr4 & !LA57;
        let long = matches!(case.mode, Mode::Level4 | Mode::Level5);
        match random.below(8) {
            0 => Change::set(Target::Cr0, WP),
            1 | 2 => Change::set(Target::Cr4, random.bit_of(offered & (SMEP | SMAP))),
            3 if long => Change::set(Target::Cr4, random.bit_of(offered & (PKE | PKS))),
            3 => Change::clear(Target::Cr4, PSE),
            4 => Change::set(Target::Efer, NXE),
            5 => Change::set(Target::Rflags, AC),
            6 => Change::set(Target::Cr4, random.bit_of(offered & PGE)),
            _ => Change {
                target: random.pick(&[Target::Pkru, Target::Pkrs]),
                clear: !0,
                set: random.next() & 0xFFFF_FFFF,
            },
        }
    }
}
