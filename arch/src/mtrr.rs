//! Memory-type range registers: which memory types a machine's firmware has given to its addresses
//! (SDM vol. 3A, 12.11).
//!
//! ```
//! use testudo_arch::mtrr::{MemoryType, Mtrrs};
//!
//! // Write-back but for the last MiB below 4 GiB, as by the registers of a small machine.
//! let registers = |msr: u32| match msr {
//!     0xFE => Some(1),
//!     0x2FF => Some(0x806),
//!     0x200 => Some(0xFFF0_0000),
//!     0x201 => Some(0xF_FFF0_0800),
//!     _ => None,
//! };
//! let mtrrs = Mtrrs::read_from(|msr| registers(msr.0), 36).unwrap();
//! let ranges: Vec<_> = mtrrs.ranges(1 << 33).unwrap().collect();
//! assert_eq!(ranges[0], (0..0xFFF0_0000, MemoryType::WriteBack));
//! assert_eq!(ranges[1], (0xFFF0_0000..1 << 32, MemoryType::Uncacheable));
//! ```

use core::ops::Range;

use crate::Msr;

/// The memory types that a range register, an EPT entry or an EPT pointer can name (SDM vol. 3A,
/// table 12-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MemoryType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    WriteBack = 6,
}

impl MemoryType {
    /// The type with this encoding; `None` if it is reserved.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Uncacheable,
            1 => Self::WriteCombining,
            4 => Self::WriteThrough,
            5 => Self::WriteProtected,
            6 => Self::WriteBack,
            _ => return None,
        })
    }

    /// As [`Self::from_number`]; a reserved encoding, of which the manual says nothing, is uncacheable.
    const fn or_uncacheable(number: u8) -> Self {
        match Self::from_number(number) {
            Some(known) => known,
            None => Self::Uncacheable,
        }
    }
}

/// IA32_MTRRCAP: the number of variable ranges, and whether there are fixed ones.
const CAP_COUNT: u64 = 0xFF;
const CAP_FIXED: u64 = 1 << 8;
/// IA32_MTRR_DEF_TYPE: the fixed ranges are on; all ranges are on.
const FIXED_ENABLE: u64 = 1 << 10;
const ENABLE: u64 = 1 << 11;
const DEF_TYPE_DEFINED: u64 = ENABLE | FIXED_ENABLE | 0xFF;
/// IA32_MTRR_PHYSMASKn: the range counts.
const VALID: u64 = 1 << 11;

/// IA32_MTRR_PHYSBASE0; the mask follows, then the next pair.
const FIRST_VARIABLE: u32 = 0x200;

/// The fixed-range registers, with the first address and the size of each of their eight ranges
/// (SDM vol. 3A, table 12-9).
const FIXED: [(u32, u64, u64); 11] = [
    (0x250, 0, 0x1_0000),
    (0x258, 0x8_0000, 0x4000),
    (0x259, 0xA_0000, 0x4000),
    (0x268, 0xC_0000, 0x1000),
    (0x269, 0xC_8000, 0x1000),
    (0x26A, 0xD_0000, 0x1000),
    (0x26B, 0xD_8000, 0x1000),
    (0x26C, 0xE_0000, 0x1000),
    (0x26D, 0xE_8000, 0x1000),
    (0x26E, 0xF_0000, 0x1000),
    (0x26F, 0xF_8000, 0x1000),
];
/// What they cover.
const FIXED_END: u64 = 1 << 20;

/// The range registers of a processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mtrrs {
    default: u64,
    has_fixed: bool,
    fixed: [u64; FIXED.len()],
    /// Base and mask.
    variable: [(u64, u64); Self::MAX],
    count: usize,
    /// The bits of a physical address.
    addresses: u64,
}

/// What an MSR of this kind is.
#[derive(Clone, Copy)]
enum Which {
    Default,
    Fixed(usize),
    Base(usize),
    Mask(usize),
}

impl Mtrrs {
    /// The most variable ranges that are kept; processors have ten at most.
    pub const MAX: usize = 32;

    /// Reads the registers of a processor with this width of physical addresses through `rdmsr`, which
    /// answers `None` where RDMSR would fault. `None` if it has no such registers.
    pub fn read_from(mut rdmsr: impl FnMut(Msr) -> Option<u64>, physical_bits: u8) -> Option<Self> {
        let capabilities = rdmsr(Msr::MTRR_CAP)?;
        let mut mtrrs = Self {
            default: rdmsr(Msr::MTRR_DEF_TYPE)?,
            has_fixed: capabilities & CAP_FIXED != 0,
            fixed: [0; FIXED.len()],
            variable: [(0, 0); Self::MAX],
            count: (capabilities & CAP_COUNT) as usize,
            addresses: (1 << physical_bits.clamp(32, 52)) - 1,
        };
        mtrrs.count = mtrrs.count.min(Self::MAX);
        if mtrrs.has_fixed {
            for (value, (msr, ..)) in mtrrs.fixed.iter_mut().zip(FIXED) {
                *value = rdmsr(Msr(msr))?;
            }
        }
        for (pair, msr) in mtrrs.variable[..mtrrs.count]
            .iter_mut()
            .zip((FIRST_VARIABLE..).step_by(2))
        {
            *pair = (rdmsr(Msr(msr))?, rdmsr(Msr(msr + 1))?);
        }
        Some(mtrrs)
    }

    /// All of these registers but the capabilities, which cannot be written.
    pub fn msrs(&self) -> impl Iterator<Item = Msr> + use<> {
        let fixed = if self.has_fixed { FIXED.len() } else { 0 };
        let variable = FIRST_VARIABLE..FIRST_VARIABLE + 2 * self.count as u32;
        let fixed = FIXED[..fixed].iter().map(|(msr, ..)| *msr);
        core::iter::once(Msr::MTRR_DEF_TYPE).chain(variable.chain(fixed).map(Msr))
    }

    fn which(&self, msr: Msr) -> Option<Which> {
        if msr == Msr::MTRR_DEF_TYPE {
            return Some(Which::Default);
        }
        if self.has_fixed
            && let Some(index) = FIXED.iter().position(|(number, ..)| *number == msr.0)
        {
            return Some(Which::Fixed(index));
        }
        let index = msr.0.checked_sub(FIRST_VARIABLE)? as usize;
        (index / 2 < self.count).then_some(if index.is_multiple_of(2) {
            Which::Base(index / 2)
        } else {
            Which::Mask(index / 2)
        })
    }

    /// The value of one of these registers; `None` for all other MSRs.
    pub fn get(&self, msr: Msr) -> Option<u64> {
        Some(match self.which(msr)? {
            Which::Default => self.default,
            Which::Fixed(index) => self.fixed[index],
            Which::Base(index) => self.variable[index].0,
            Which::Mask(index) => self.variable[index].1,
        })
    }

    /// Writes one of these registers, as WRMSR would; `None` for all other MSRs, `Some(false)` for #GP:
    /// a reserved bit or memory type.
    pub fn set(&mut self, msr: Msr, value: u64) -> Option<bool> {
        let which = self.which(msr)?;
        let known = |number: u64| MemoryType::from_number(number as u8).is_some();
        let page = self.addresses & !0xFFF;
        let valid = match which {
            Which::Default => value & !DEF_TYPE_DEFINED == 0 && known(value),
            Which::Fixed(_) => value
                .to_le_bytes()
                .into_iter()
                .all(|kind| known(kind.into())),
            Which::Base(_) => value & !(page | 0xFF) == 0 && known(value),
            Which::Mask(_) => value & !(page | VALID) == 0,
        };
        if valid {
            *match which {
                Which::Default => &mut self.default,
                Which::Fixed(index) => &mut self.fixed[index],
                Which::Base(index) => &mut self.variable[index].0,
                Which::Mask(index) => &mut self.variable[index].1,
            } = value;
        }
        Some(valid)
    }

    fn fixed_count(&self) -> bool {
        self.has_fixed && self.default & FIXED_ENABLE != 0
    }

    /// The variable ranges that count: base, mask, type.
    fn enabled(&self) -> impl Iterator<Item = (u64, u64, MemoryType)> {
        let page = self.addresses & !0xFFF;
        self.variable[..self.count]
            .iter()
            .filter(|(_, mask)| mask & VALID != 0)
            .map(move |&(base, mask)| {
                let kind = MemoryType::or_uncacheable(base as u8);
                (base & page, mask & page, kind)
            })
    }

    /// The memory type of an address (SDM vol. 3A, 12.11.4.1).
    pub fn memory_type(&self, address: u64) -> MemoryType {
        use MemoryType as T;
        if self.default & ENABLE == 0 {
            return T::Uncacheable;
        }
        if address < FIXED_END && self.fixed_count() {
            let covers =
                |&(_, start, size): &(u32, u64, u64)| (start..start + 8 * size).contains(&address);
            if let Some(index) = FIXED.iter().position(covers) {
                let (_, start, size) = FIXED[index];
                let range = ((address - start) / size) as usize;
                return T::or_uncacheable(self.fixed[index].to_le_bytes()[range]);
            }
        }
        let matching = self
            .enabled()
            .filter(|(base, mask, _)| (address ^ base) & mask == 0)
            .map(|(.., kind)| kind);
        let joined = matching.reduce(|a, b| match (a, b) {
            _ if a == b => a,
            (T::WriteThrough, T::WriteBack) | (T::WriteBack, T::WriteThrough) => T::WriteThrough,
            // With UC among them it is UC; of all other pairs "processor behavior is undefined".
            _ => T::Uncacheable,
        });
        joined.unwrap_or(T::or_uncacheable(self.default as u8))
    }

    /// The addresses below `end` in order, in ranges of one type each and each as long as can be. `None`
    /// if a variable range is not one range: its mask has holes, which no firmware makes.
    pub fn ranges(&self, end: u64) -> Option<Ranges<'_>> {
        let whole =
            |mask: u64| (mask | !self.addresses).leading_ones() + mask.trailing_zeros() >= 64;
        let suits = self.enabled().all(|(_, mask, _)| whole(mask));
        suits.then_some(Ranges {
            mtrrs: self,
            next: 0,
            end,
        })
    }

    /// The first address above this one at which another type may begin.
    fn next_border(&self, address: u64) -> u64 {
        let fixed = if address < FIXED_END && self.fixed_count() {
            let size = FIXED
                .iter()
                .rfind(|(_, start, _)| *start <= address)
                .map_or(0x1000, |(.., size)| *size);
            (address | (size - 1)) + 1
        } else {
            u64::MAX
        };
        let variable = self.enabled().map(|(base, mask, _)| {
            let start = base & mask;
            let size = 1 << mask.trailing_zeros().min(52);
            if address < start {
                start
            } else if address < start + size {
                start + size
            } else {
                u64::MAX
            }
        });
        variable.fold(fixed, u64::min)
    }
}

/// See [`Mtrrs::ranges`].
#[derive(Clone, Debug)]
pub struct Ranges<'a> {
    mtrrs: &'a Mtrrs,
    next: u64,
    end: u64,
}

impl Iterator for Ranges<'_> {
    type Item = (Range<u64>, MemoryType);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.next;
        if start >= self.end {
            return None;
        }
        let kind = self.mtrrs.memory_type(start);
        let mut end = start;
        while end < self.end && self.mtrrs.memory_type(end) == kind {
            end = self.mtrrs.next_border(end).min(self.end);
        }
        self.next = end;
        Some((start..end, kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use MemoryType as T;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const BITS: u8 = 36;

    fn of(registers: &[(u32, u64)]) -> Mtrrs {
        let mut all = BTreeMap::from([(0xFE, 0x508), (0x2FF, 0xC06)]);
        for pair in 0..8 {
            all.extend([(0x200 + 2 * pair, 0), (0x201 + 2 * pair, 0)]);
        }
        all.extend(FIXED.map(|(msr, ..)| (msr, 0x0606_0606_0606_0606)));
        all.extend(registers.iter().copied());
        Mtrrs::read_from(|msr| all.get(&msr.0).copied(), BITS).unwrap()
    }

    /// The registers as Bochs's firmware leaves them: the PCI hole from 3 GiB on is uncacheable.
    #[test]
    fn a_pc() {
        let mtrrs = of(&[(0x259, 0), (0x200, 0xC000_0000), (0x201, 0xF_C000_0800)]);
        let ranges: Vec<_> = mtrrs.ranges(1 << BITS).unwrap().collect();
        assert_eq!(
            ranges,
            [
                (0..0xA_0000, T::WriteBack),
                (0xA_0000..0xC_0000, T::Uncacheable),
                (0xC_0000..0xC000_0000, T::WriteBack),
                (0xC000_0000..1 << 32, T::Uncacheable),
                (1 << 32..1 << BITS, T::WriteBack),
            ]
        );
    }

    #[test]
    fn overlaps_and_switches() {
        let pairs = [
            (0x200, 0x4000_0006),
            (0x201, 0xF_C000_0800),
            (0x202, 0x4000_0004),
            (0x203, 0xF_F000_0800),
            (0x204, 0x4800_0000),
            (0x205, 0xF_F800_0800),
        ];
        let mut mtrrs = of(&pairs);
        assert_eq!(mtrrs.memory_type(0x4000_0000), T::WriteThrough);
        assert_eq!(mtrrs.memory_type(0x4800_0000), T::Uncacheable);
        assert_eq!(mtrrs.memory_type(0x5000_0000), T::WriteBack);
        // Fixed ranges count before variable ones, and only if they are on.
        assert_eq!(mtrrs.set(Msr(0x250), 0x0606_0606_0606_0601), Some(true));
        assert_eq!(mtrrs.memory_type(0xFFFF), T::WriteCombining);
        assert_eq!(mtrrs.set(Msr::MTRR_DEF_TYPE, 0x806), Some(true));
        assert_eq!(mtrrs.memory_type(0xFFFF), T::WriteBack);
        assert_eq!(mtrrs.set(Msr::MTRR_DEF_TYPE, 6), Some(true));
        assert_eq!(mtrrs.memory_type(0x5000_0000), T::Uncacheable);
    }

    #[test]
    fn a_mask_with_holes_is_no_range() {
        assert!(of(&[(0x201, 0xF_A000_0800)]).ranges(1 << 32).is_none());
        assert!(of(&[(0x201, 0xF_A000_0000)]).ranges(1 << 32).is_some());
    }

    #[test]
    fn what_a_processor_refuses() {
        let mut mtrrs = of(&[]);
        for (msr, value) in [
            (0x2FF, 0xC02),
            (0x2FF, 0x1006),
            (0x250, 7),
            (0x200, 0x1_0000_0002),
            (0x200, 1 << 36 | 6),
            (0x201, 0x400),
        ] {
            let before = mtrrs.clone();
            assert_eq!(mtrrs.set(Msr(msr), value), Some(false), "{msr:#x}");
            assert_eq!(mtrrs, before);
        }
        assert_eq!(mtrrs.set(Msr::PAT, 0), None);
        assert_eq!(mtrrs.get(Msr(0x210)), None);
        for msr in mtrrs.msrs() {
            let value = mtrrs.get(msr).unwrap();
            assert_eq!(mtrrs.set(msr, value), Some(true), "{msr}");
        }
        assert_eq!(mtrrs.msrs().count(), 1 + 16 + 11);
        assert!(Mtrrs::read_from(|_| None, BITS).is_none());
    }

    proptest! {
        /// The ranges are in order, without gaps, and every address has its range's type.
        #[test]
        fn ranges_have_their_types(
            pairs in prop::collection::vec((0u64..64, 26u32..36, 0usize..5), 0..8),
            fixed in any::<bool>(),
            types in prop::collection::vec(0usize..5, 8),
            probes in prop::collection::vec(0u64..1 << 34, 64),
        ) {
            const TYPES: [u64; 5] = [0, 1, 4, 5, 6];
            let mut registers = Vec::new();
            for (number, (base, shift, kind)) in (0u32..).zip(&pairs) {
                let mask = 0xF_FFFF_F000 & !((1 << shift) - 1);
                registers.push((0x200 + 2 * number, (base << 26) & mask | TYPES[*kind]));
                registers.push((0x201 + 2 * number, mask | 0x800));
            }
            let bytes: Vec<u8> = types.iter().map(|kind| TYPES[*kind] as u8).collect();
            registers.push((0x268, u64::from_le_bytes(bytes.try_into().unwrap())));
            registers.push((0x2FF, if fixed { 0xC06 } else { 0x806 }));
            let mtrrs = of(&registers);
            let ranges: Vec<_> = mtrrs.ranges(1 << 34).unwrap().collect();
            let mut at = 0;
            let mut last = None;
            for (range, kind) in &ranges {
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > at && last != Some(*kind));
                at = range.end;
                last = Some(*kind);
            }
            prop_assert_eq!(at, 1 << 34);
            for probe in probes.into_iter().chain((0xC_0000..0xD_0000).step_by(0x800)) {
                let (_, kind) = ranges.iter().find(|(range, _)| range.contains(&probe)).unwrap();
                prop_assert_eq!(*kind, mtrrs.memory_type(probe));
            }
        }
    }
}
