//! Long-mode paging (SDM vol. 3A, 4.5; APM vol. 2, 5.3): the tables a host runs on.

use bitflags::bitflags;
use testudo_arch::{Gva, Hpa};

use super::{Format, Input, Leaf, Rights, shift_of};

const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// PAT in an entry that maps 2 MiB or 1 GiB, where bit 7 says that it does.
const PAT_LARGE: u64 = 1 << 12;

bitflags! {
    /// The flags of an entry that maps a page (SDM vol. 3A, table 4-20), PAT always at the
    /// place that it has in a 4 KiB entry.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct LongModeFlags: u64 {
        /// R/W: writes are allowed.
        const WRITABLE = 1 << 1;
        /// U/S: user mode may access the page.
        const USER = 1 << 2;
        /// PWT: bit 0 of the PAT index.
        const PWT = 1 << 3;
        /// PCD: bit 1 of the PAT index.
        const PCD = 1 << 4;
        /// A: the processor has accessed the page.
        const ACCESSED = 1 << 5;
        /// D: the processor has written to the page.
        const DIRTY = 1 << 6;
        /// PAT: bit 2 of the PAT index.
        const PAT = 1 << 7;
        /// G: the translation stays when CR3 is loaded.
        const GLOBAL = 1 << 8;
        /// XD, NX: instructions are not fetched from the page.
        const NO_EXECUTE = 1 << 63;
        const _ = !0;
    }
}

/// Long-mode paging with four or five levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongMode {
    levels: u8,
    address_mask: u64,
    no_execute: bool,
    gigabyte_pages: bool,
}

impl LongMode {
    /// Four levels, physical addresses of `physical_bits` (32 to 52), with execute-disable and
    /// 1 GiB pages.
    pub const fn new(physical_bits: u8) -> Self {
        Self {
            levels: 4,
            address_mask: address_mask(physical_bits),
            no_execute: true,
            gigabyte_pages: true,
        }
    }

    /// With five levels (CR4.LA57).
    pub const fn with_five_levels(mut self) -> Self {
        self.levels = 5;
        self
    }

    /// Without execute-disable (EFER.NXE clear): the bit is reserved.
    pub const fn without_no_execute(mut self) -> Self {
        self.no_execute = false;
        self
    }

    /// Without 1 GiB pages (CPUID 8000_0001 EDX bit 26 clear).
    pub const fn without_gigabyte_pages(mut self) -> Self {
        self.gigabyte_pages = false;
        self
    }
}

/// Bits `physical_bits - 1` to 12.
pub(super) const fn address_mask(physical_bits: u8) -> u64 {
    let bits = if physical_bits > 52 {
        52
    } else {
        physical_bits
    };
    ((1 << bits) - 1) & !0xFFF
}

/// The entry for a page, its flags in the 4 KiB form.
#[inline]
pub(super) const fn leaf_entry(frame: u64, level: u8, flags: u64) -> u64 {
    if level == 1 {
        frame | flags | PRESENT
    } else {
        let pat = (flags & LongModeFlags::PAT.bits()) << 5;
        frame | (flags & !LongModeFlags::PAT.bits()) | pat | LARGE | PRESENT
    }
}

/// Frame and 4 KiB-form flags of the entry for a page.
#[inline]
pub(super) const fn leaf(entry: u64, level: u8, address_mask: u64) -> (u64, u64) {
    if level == 1 {
        (entry & address_mask, entry & !address_mask & !PRESENT)
    } else {
        let frame = entry & address_mask & !PAT_LARGE;
        let pat = (entry & PAT_LARGE) >> 5;
        (frame, (entry & !address_mask & !(PRESENT | LARGE)) | pat)
    }
}

/// Whether a present entry has a reserved bit set, NX apart.
#[inline]
pub(super) const fn is_reserved(
    entry: u64,
    level: u8,
    address_mask: u64,
    gigabyte_pages: bool,
) -> bool {
    let wide = entry & self::address_mask(52) & !address_mask;
    let large = level > 1 && entry & LARGE != 0;
    let allowed = level < 3 || (level == 3 && gigabyte_pages);
    let inside = ((1 << shift_of(level)) - 1) & !0x1FFF;
    wide != 0 || (large && (!allowed || entry & inside != 0))
}

impl Format for LongMode {
    type Input = Gva;
    type Flags = LongModeFlags;

    const NAME: &'static str = "long mode";
    const SOFTWARE: u64 = 0x7F << 52;

    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }

    /// The canonical halves become one range: the low one first.
    #[inline]
    fn offset(&self, address: Gva) -> Option<u64> {
        let unused = 64 - self.input_bits();
        let extended = (((address.0 << unused) as i64) >> unused) as u64;
        (extended == address.0).then_some((address.0 << unused) >> unused)
    }

    #[inline]
    fn address(&self, offset: u64) -> Gva {
        let unused = 64 - self.input_bits();
        Gva::from_u64((((offset << unused) as i64) >> unused) as u64)
    }

    #[inline]
    fn address_mask(&self) -> u64 {
        self.address_mask
    }

    #[inline]
    fn largest_level(&self, _flags: LongModeFlags) -> u8 {
        if self.gigabyte_pages { 3 } else { 2 }
    }

    #[inline]
    fn is_valid(&self, flags: LongModeFlags) -> bool {
        let reserved = address_mask(52) | PRESENT;
        flags.bits() & reserved == 0
            && (self.no_execute || !flags.contains(LongModeFlags::NO_EXECUTE))
    }

    #[inline]
    fn is_present(&self, entry: u64) -> bool {
        entry & PRESENT != 0
    }

    #[inline]
    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || entry & LARGE != 0
    }

    #[inline]
    fn is_reserved(&self, entry: u64, level: u8) -> bool {
        is_reserved(entry, level, self.address_mask, self.gigabyte_pages)
            || (!self.no_execute && entry & LongModeFlags::NO_EXECUTE.bits() != 0)
    }

    #[inline]
    fn leaf(&self, entry: u64, level: u8) -> Leaf<LongModeFlags> {
        let (frame, flags) = leaf(entry, level, self.address_mask);
        Leaf {
            frame: Hpa(frame),
            shift: shift_of(level),
            flags: LongModeFlags::from_bits_retain(flags),
        }
    }

    /// A table's entry allows everything: the pages' entries decide.
    #[inline]
    fn table_entry(&self, table: Hpa, _level: u8) -> u64 {
        table.0 | 0x67
    }

    #[inline]
    fn leaf_entry(&self, frame: Hpa, level: u8, flags: LongModeFlags) -> u64 {
        leaf_entry(frame.0, level, flags.bits())
    }

    #[inline]
    fn accessed_bit(&self) -> u64 {
        LongModeFlags::ACCESSED.bits()
    }

    #[inline]
    fn dirty_bit(&self) -> u64 {
        LongModeFlags::DIRTY.bits()
    }

    #[inline]
    fn write_bit(&self) -> u64 {
        LongModeFlags::WRITABLE.bits()
    }

    #[inline]
    fn entry_rights(&self, entry: u64, _level: u8) -> Rights {
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, entry & LongModeFlags::WRITABLE.bits() != 0);
        let execute = entry & LongModeFlags::NO_EXECUTE.bits() == 0;
        rights.set(Rights::EXECUTE | Rights::USER_EXECUTE, execute);
        rights
    }

    #[inline]
    fn flags(&self, rights: Rights) -> Option<LongModeFlags> {
        self.with_rights(LongModeFlags::ACCESSED | LongModeFlags::DIRTY, rights)
    }

    #[inline]
    fn with_rights(&self, mut flags: LongModeFlags, rights: Rights) -> Option<LongModeFlags> {
        if rights.is_empty() || self.floor(rights) != rights {
            return None;
        }
        flags.set(LongModeFlags::WRITABLE, rights.contains(Rights::WRITE));
        flags.set(LongModeFlags::NO_EXECUTE, !rights.contains(Rights::EXECUTE));
        Some(flags)
    }

    #[inline]
    fn floor(&self, rights: Rights) -> Rights {
        if !rights.contains(Rights::READ) {
            return Rights::empty();
        }
        let execute = rights.contains(Rights::EXECUTE | Rights::USER_EXECUTE);
        if !execute && !self.no_execute {
            return Rights::empty();
        }
        let mut floor = rights & (Rights::READ | Rights::WRITE);
        floor.set(Rights::EXECUTE | Rights::USER_EXECUTE, execute);
        floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_entries() {
        let format = LongMode::new(46);
        let flags = LongModeFlags::WRITABLE | LongModeFlags::PAT | LongModeFlags::NO_EXECUTE;
        assert_eq!(
            format.leaf_entry(Hpa(0x12_3000), 1, flags),
            0x8000_0000_0012_3083
        );
        assert_eq!(
            format.leaf_entry(Hpa(0x20_0000), 2, flags),
            0x8000_0000_0020_1083
        );
        assert_eq!(format.table_entry(Hpa(0x5000), 4), 0x5067);
    }

    #[test]
    fn canonical_addresses_only() {
        let four = LongMode::new(46);
        assert_eq!(four.offset(Gva(0x8000_0000_0000)), None);
        assert_eq!(four.offset(Gva(u64::MAX)), Some((1 << 48) - 1));
        assert_eq!(four.address((1 << 48) - 1), Gva(u64::MAX));
        let five = four.with_five_levels();
        assert_eq!(five.offset(Gva(0x8000_0000_0000)), Some(1 << 47));
        assert_eq!(five.offset(Gva(1 << 56)), None);
    }
}
