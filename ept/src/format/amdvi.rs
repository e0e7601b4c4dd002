//! I/O page tables of AMD-Vi for host translation (AMD I/O Virtualization Technology
//! Specification 2.2.3).

use bitflags::bitflags;
use testudo_arch::{Gpa, Hpa};

use super::{Format, Leaf, Rights, shift_of};

const PRESENT: u64 = 1 << 0;
/// Bits 11:9: the level of the table that an entry refers to; 0 or 7 for a page.
const NEXT_LEVEL: u64 = 7 << 9;
/// A page whose size is coded in the low bits of its address.
const SIZED: u64 = 7 << 9;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const RESERVED: u64 = 0x7F << 52;

bitflags! {
    /// The flags of an entry that maps a page.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct AmdViFlags: u64 {
        /// A: the page has been accessed, where the device's entry enables these bits.
        const ACCESSED = 1 << 5;
        /// D: the page has been written to.
        const DIRTY = 1 << 6;
        /// U: attribute for address-translation requests.
        const UNTRANSLATED = 1 << 59;
        /// FC: accesses are coherent, whatever the request says.
        const FORCE_COHERENT = 1 << 60;
        /// IR: the device may read.
        const READ = 1 << 61;
        /// IW: the device may write.
        const WRITE = 1 << 62;
        const _ = !0;
    }
}

/// I/O page tables with up to six levels.
///
/// Six levels would translate 66 bits; this translates 63 of them, more than any bus has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmdVi {
    levels: u8,
    largest: u8,
    address_mask: u64,
    sized_pages: bool,
    accessed_dirty: bool,
}

impl AmdVi {
    /// Tables with this many levels (1 to 6; the mode field of a device-table entry) and physical
    /// addresses of `physical_bits`, with pages of 4 KiB, 2 MiB and 1 GiB.
    pub const fn new(levels: u8, physical_bits: u8) -> Self {
        let levels = match levels {
            0 => 1,
            1..=6 => levels,
            _ => 6,
        };
        Self {
            levels,
            largest: if levels < 3 { levels } else { 3 },
            address_mask: super::long_mode::address_mask(physical_bits),
            sized_pages: false,
            accessed_dirty: false,
        }
    }

    /// With pages of every power of two: runs of entries with next-level 7, which take one place in
    /// an IOTLB.
    pub const fn with_sized_pages(mut self) -> Self {
        self.sized_pages = true;
        self
    }

    /// With accessed and dirty bits (the HAD field of a device-table entry).
    pub const fn with_accessed_dirty(mut self) -> Self {
        self.accessed_dirty = true;
        self
    }

    #[inline]
    const fn next_level(entry: u64) -> u8 {
        ((entry & NEXT_LEVEL) >> 9) as u8
    }
}

impl Format for AmdVi {
    type Input = Gpa;
    type Flags = AmdViFlags;

    const NAME: &'static str = "AMD-Vi host tables";
    const SOFTWARE: u64 = 0xF << 1;
    const SIZED_PAGES: bool = true;

    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }

    #[inline]
    fn input_bits(&self) -> u32 {
        (shift_of(self.levels) + 9).min(63)
    }

    #[inline]
    fn address_mask(&self) -> u64 {
        self.address_mask
    }

    #[inline]
    fn largest_level(&self, _flags: AmdViFlags) -> u8 {
        self.largest
    }

    #[inline]
    fn is_valid(&self, flags: AmdViFlags) -> bool {
        flags.bits() & (ADDRESS | NEXT_LEVEL | PRESENT | RESERVED) == 0
    }

    #[inline]
    fn is_present(&self, entry: u64) -> bool {
        entry & PRESENT != 0
    }

    #[inline]
    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || matches!(Self::next_level(entry), 0 | 7)
    }

    #[inline]
    fn is_reserved(&self, entry: u64, level: u8) -> bool {
        let wide = entry & ADDRESS & !self.address_mask != 0 || entry & RESERVED != 0;
        let kind = match Self::next_level(entry) {
            0 => entry & ADDRESS & ((1 << shift_of(level)) - 1) != 0,
            7 => {
                let shift = self.leaf(entry, level).shift;
                shift <= shift_of(level) || shift >= shift_of(level + 1)
            }
            next => next >= level,
        };
        wide || kind
    }

    /// An entry may skip levels, whose address bits are zero then.
    #[inline]
    fn child(&self, entry: u64, _level: u8) -> (Hpa, u8) {
        (Hpa(entry & self.address_mask), Self::next_level(entry))
    }

    #[inline]
    fn leaf(&self, entry: u64, level: u8) -> Leaf<AmdViFlags> {
        let shift = if entry & NEXT_LEVEL == SIZED {
            // The first zero from bit 12 on is the highest bit inside the page.
            (((entry & ADDRESS) >> 12).trailing_ones() + 13).min(52)
        } else {
            shift_of(level)
        };
        let other = ADDRESS | NEXT_LEVEL | PRESENT;
        Leaf {
            frame: Hpa(entry & self.address_mask & !((1 << shift) - 1)),
            shift,
            flags: AmdViFlags::from_bits_retain(entry & !other),
        }
    }

    /// A table's entry allows everything: the pages' entries decide.
    #[inline]
    fn table_entry(&self, table: Hpa, level: u8) -> u64 {
        let rights = (AmdViFlags::READ | AmdViFlags::WRITE).bits();
        let next = u64::from(level.wrapping_sub(1)) << 9;
        table.0 | rights | next | self.accessed_bit() | PRESENT
    }

    #[inline]
    fn leaf_entry(&self, frame: Hpa, _level: u8, flags: AmdViFlags) -> u64 {
        frame.0 | flags.bits() | PRESENT
    }

    #[inline]
    fn sized_entry(&self, frame: Hpa, shift: u32, flags: AmdViFlags) -> Option<u64> {
        if !self.sized_pages {
            return None;
        }
        let size = ((1 << (shift - 1)) - 1) & ADDRESS;
        Some(frame.0 | size | flags.bits() | SIZED | PRESENT)
    }

    #[inline]
    fn accessed_bit(&self) -> u64 {
        if self.accessed_dirty { 1 << 5 } else { 0 }
    }

    #[inline]
    fn dirty_bit(&self) -> u64 {
        if self.accessed_dirty { 1 << 6 } else { 0 }
    }

    #[inline]
    fn write_bit(&self) -> u64 {
        AmdViFlags::WRITE.bits()
    }

    #[inline]
    fn entry_rights(&self, entry: u64, _level: u8) -> Rights {
        Rights::from_bits_retain(((entry >> 61) & 3) as u8)
    }

    #[inline]
    fn flags(&self, rights: Rights) -> Option<AmdViFlags> {
        let marks = AmdViFlags::from_bits_retain(self.accessed_bit() | self.dirty_bit());
        self.with_rights(marks, rights)
    }

    #[inline]
    fn with_rights(&self, mut flags: AmdViFlags, rights: Rights) -> Option<AmdViFlags> {
        if rights.is_empty() || self.floor(rights) != rights {
            return None;
        }
        flags.set(AmdViFlags::READ, rights.contains(Rights::READ));
        flags.set(AmdViFlags::WRITE, rights.contains(Rights::WRITE));
        Some(flags)
    }

    /// Devices fetch no instructions.
    #[inline]
    fn floor(&self, rights: Rights) -> Rights {
        rights & (Rights::READ | Rights::WRITE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RW: AmdViFlags = AmdViFlags::READ.union(AmdViFlags::WRITE);

    #[test]
    fn golden_entries() {
        let format = AmdVi::new(4, 48).with_sized_pages();
        assert_eq!(
            format.leaf_entry(Hpa(0x12_3000), 1, RW),
            0x6000_0000_0012_3001
        );
        assert_eq!(format.table_entry(Hpa(0x5000), 3), 0x6000_0000_0000_5401);
        // 8 KiB: bit 12 is the first zero. 64 KiB: bits 14:12 are ones, bit 15 is zero.
        let entry = format.sized_entry(Hpa(0x2_0000), 13, RW).unwrap();
        assert_eq!(entry, 0x6000_0000_0002_0E01);
        let entry = format.sized_entry(Hpa(0x2_0000), 16, RW).unwrap();
        assert_eq!(entry, 0x6000_0000_0002_7E01);
        let leaf = format.leaf(entry, 1);
        assert_eq!(
            (leaf.frame, leaf.shift, leaf.flags),
            (Hpa(0x2_0000), 16, RW)
        );
    }

    #[test]
    fn reserved_entries() {
        let format = AmdVi::new(4, 48);
        assert!(format.is_reserved(0x1000 | 2 << 9 | 1, 2));
        assert!(!format.is_reserved(0x1000 | 1 << 9 | 1, 3));
        assert!(format.is_reserved(0x1001, 2));
        assert!(format.is_reserved(1 << 52 | 1, 1));
        assert!(format.is_reserved(1 << 48 | 1, 1));
        // A sized page belongs to the level whose pages are just smaller.
        assert!(format.is_reserved(0x7E01, 2) && !format.is_reserved(0x7E01, 1));
    }
}
