//! Second-stage tables of Intel's VT-d (VT-d specification 4.1, 3.7 and 9.8).

use bitflags::bitflags;
use testudo_arch::{Gpa, Hpa, PageSize};

use super::{Format, Leaf, Rights, level_of, shift_of};

const LARGE: u64 = 1 << 7;

bitflags! {
    /// The flags of an entry that maps a page (VT-d specification, table 45 and following).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct VtdFlags: u64 {
        /// R: the device may read.
        const READ = 1 << 0;
        /// W: the device may write.
        const WRITE = 1 << 1;
        /// A: the page has been accessed, where second-stage accessed and dirty bits are enabled.
        const ACCESSED = 1 << 8;
        /// D: the page has been written to.
        const DIRTY = 1 << 9;
        /// SNP: accesses snoop the processors' caches, whatever the request says.
        const SNOOP = 1 << 11;
        /// TM: transient mapping, a hint for device TLBs.
        const TRANSIENT = 1 << 62;
        const _ = !0;
    }
}

/// Second-stage tables with three, four or five levels (39, 48 or 57 address bits), and what the
/// unit offers for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtd {
    levels: u8,
    largest: u8,
    address_mask: u64,
    snoop: bool,
    accessed_dirty: bool,
}

impl Vtd {
    /// Tables with this many levels (3 to 5; CAP.SAGAW) and physical addresses of `physical_bits`
    /// (the host address width), with pages of 4 KiB only.
    pub const fn new(levels: u8, physical_bits: u8) -> Self {
        let levels = match levels {
            0..=3 => 3,
            4 => 4,
            _ => 5,
        };
        Self {
            levels,
            largest: 1,
            address_mask: super::long_mode::address_mask(physical_bits),
            snoop: false,
            accessed_dirty: false,
        }
    }

    /// With pages of at most this size (CAP.SLLPS).
    pub const fn with_largest_page(mut self, size: PageSize) -> Self {
        self.largest = level_of(size);
        self
    }

    /// With snoop control (ECAP.SC): without it the snoop bit is reserved.
    pub const fn with_snoop_control(mut self) -> Self {
        self.snoop = true;
        self
    }

    /// With accessed and dirty bits (ECAP.SSADS, enabled in the PASID entry).
    pub const fn with_accessed_dirty(mut self) -> Self {
        self.accessed_dirty = true;
        self
    }

    /// The address-width field of a context or PASID entry: 1, 2 or 3.
    #[inline]
    pub const fn address_width(&self) -> u8 {
        self.levels - 2
    }
}

impl Format for Vtd {
    type Input = Gpa;
    type Flags = VtdFlags;

    const NAME: &'static str = "VT-d second stage";
    const SOFTWARE: u64 = 0x3FF << 52;

    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }

    #[inline]
    fn address_mask(&self) -> u64 {
        self.address_mask
    }

    #[inline]
    fn largest_level(&self, _flags: VtdFlags) -> u8 {
        self.largest
    }

    #[inline]
    fn is_valid(&self, flags: VtdFlags) -> bool {
        let reserved = super::long_mode::address_mask(52) | LARGE;
        flags.bits() & reserved == 0
            && flags.intersects(VtdFlags::READ | VtdFlags::WRITE)
            && (self.snoop || !flags.contains(VtdFlags::SNOOP))
    }

    #[inline]
    fn is_present(&self, entry: u64) -> bool {
        entry & 3 != 0
    }

    #[inline]
    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || entry & LARGE != 0
    }

    #[inline]
    fn is_reserved(&self, entry: u64, level: u8) -> bool {
        let wide = entry & super::long_mode::address_mask(52) & !self.address_mask;
        let leaf = self.is_leaf(entry, level);
        let inside = ((1u64 << shift_of(level)) - 1) & !0xFFF;
        let large = level > 1 && leaf && (level > self.largest || entry & inside != 0);
        let snoop = leaf && !self.snoop && entry & VtdFlags::SNOOP.bits() != 0;
        wide != 0 || large || snoop
    }

    #[inline]
    fn leaf(&self, entry: u64, level: u8) -> Leaf<VtdFlags> {
        let size = if level == 1 { 0 } else { LARGE };
        Leaf {
            frame: Hpa(entry & self.address_mask & !((1 << shift_of(level)) - 1)),
            shift: shift_of(level),
            flags: VtdFlags::from_bits_retain(entry & !self.address_mask & !size),
        }
    }

    /// A table's entry allows everything: the pages' entries decide.
    #[inline]
    fn table_entry(&self, table: Hpa, _level: u8) -> u64 {
        table.0 | 3 | self.accessed_bit()
    }

    #[inline]
    fn leaf_entry(&self, frame: Hpa, level: u8, flags: VtdFlags) -> u64 {
        let size = if level == 1 { 0 } else { LARGE };
        frame.0 | flags.bits() | size
    }

    #[inline]
    fn accessed_bit(&self) -> u64 {
        if self.accessed_dirty { 1 << 8 } else { 0 }
    }

    #[inline]
    fn dirty_bit(&self) -> u64 {
        if self.accessed_dirty { 1 << 9 } else { 0 }
    }

    #[inline]
    fn write_bit(&self) -> u64 {
        VtdFlags::WRITE.bits()
    }

    #[inline]
    fn entry_rights(&self, entry: u64, _level: u8) -> Rights {
        Rights::from_bits_retain((entry & 3) as u8)
    }

    #[inline]
    fn flags(&self, rights: Rights) -> Option<VtdFlags> {
        let marks = VtdFlags::from_bits_retain(self.accessed_bit() | self.dirty_bit());
        self.with_rights(marks, rights)
    }

    #[inline]
    fn with_rights(&self, mut flags: VtdFlags, rights: Rights) -> Option<VtdFlags> {
        if rights.is_empty() || self.floor(rights) != rights {
            return None;
        }
        flags.set(VtdFlags::READ, rights.contains(Rights::READ));
        flags.set(VtdFlags::WRITE, rights.contains(Rights::WRITE));
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

    #[test]
    fn golden_entries() {
        let vtd = Vtd::new(4, 39)
            .with_largest_page(PageSize::Size2M)
            .with_snoop_control();
        let flags = VtdFlags::READ | VtdFlags::WRITE | VtdFlags::SNOOP;
        assert_eq!(vtd.leaf_entry(Hpa(0x12_3000), 1, flags), 0x12_3803);
        assert_eq!(vtd.leaf_entry(Hpa(0x20_0000), 2, flags), 0x20_0883);
        assert_eq!(vtd.table_entry(Hpa(0x5000), 3), 0x5003);
        assert_eq!(vtd.address_width(), 2);
        assert_eq!(Vtd::new(3, 39).address_width(), 1);
    }

    #[test]
    fn what_the_unit_lacks_is_reserved() {
        let flags = VtdFlags::READ | VtdFlags::SNOOP;
        let plain = Vtd::new(4, 39);
        assert!(!plain.is_valid(flags) && plain.with_snoop_control().is_valid(flags));
        assert!(plain.is_reserved(0x1000 | flags.bits(), 1));
        assert!(plain.is_reserved(0x20_0083, 2));
        assert!(
            !plain
                .with_largest_page(PageSize::Size2M)
                .is_reserved(0x20_0083, 2)
        );
        assert!(plain.is_reserved(0x1003 | 1 << 39, 1));
        assert!(!plain.is_valid(VtdFlags::ACCESSED));
    }
}
