//! AMD's nested page tables (APM vol. 2, 15.25): long-mode entries that translate guest-physical
//! addresses.

use bitflags::bitflags;
use testudo_arch::{Gpa, Hpa};

use super::long_mode::{self, address_mask};
use super::{Format, Leaf, Rights, shift_of};

const PRESENT: u64 = 1 << 0;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;

bitflags! {
    /// The flags of a nested entry that maps a page, PAT always at the place that it has in a
    /// 4 KiB entry.
    ///
    /// The user bit is not among them: every access of a guest counts as a user access (APM
    /// vol. 2, 15.25.5), so the format always sets it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct NptFlags: u64 {
        /// R/W: the guest may write.
        const WRITABLE = 1 << 1;
        /// PWT: bit 0 of the index into the host's PAT.
        const PWT = 1 << 3;
        /// PCD: bit 1 of the index into the host's PAT.
        const PCD = 1 << 4;
        /// A: the page has been accessed.
        const ACCESSED = 1 << 5;
        /// D: the page has been written to.
        const DIRTY = 1 << 6;
        /// PAT: bit 2 of the index into the host's PAT.
        const PAT = 1 << 7;
        /// NX: the guest may not execute.
        const NO_EXECUTE = 1 << 63;
        const _ = !0;
    }
}

/// Nested paging with four or five levels, as the host's own paging mode has (APM vol. 2,
/// 15.25.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Npt {
    levels: u8,
    address_mask: u64,
    c_bit: u64,
    encrypted_tables: bool,
    gigabyte_pages: bool,
}

impl Npt {
    /// Four levels, physical addresses of `physical_bits` (32 to 52), with 1 GiB pages.
    ///
    /// The host must have EFER.NXE set, as every 64-bit host has: NX is reserved without it.
    pub const fn new(physical_bits: u8) -> Self {
        Self {
            levels: 4,
            address_mask: address_mask(physical_bits),
            c_bit: 0,
            encrypted_tables: false,
            gigabyte_pages: true,
        }
    }

    /// With five levels (the host runs with CR4.LA57).
    pub const fn with_five_levels(mut self) -> Self {
        self.levels = 5;
        self
    }

    /// Without 1 GiB pages (CPUID 8000_0001 EDX bit 26 clear).
    pub const fn without_gigabyte_pages(mut self) -> Self {
        self.gigabyte_pages = false;
        self
    }

    /// With memory encryption: the C-bit at this position (12 to 51; CPUID 8000_001F EBX 5:0), and
    /// whether the tables themselves are encrypted (APM vol. 2, 7.10.2).
    pub const fn with_c_bit(mut self, position: u8, encrypted_tables: bool) -> Self {
        self.c_bit = (1 << (position & 63)) & address_mask(52);
        self.address_mask &= !self.c_bit;
        self.encrypted_tables = encrypted_tables;
        self
    }

    /// These flags for an encrypted page.
    #[inline]
    pub const fn encrypted(&self, flags: NptFlags) -> NptFlags {
        NptFlags::from_bits_retain(flags.bits() | self.c_bit)
    }
}

impl Format for Npt {
    type Input = Gpa;
    type Flags = NptFlags;

    const NAME: &'static str = "NPT";
    const SOFTWARE: u64 = 0x7F << 52;

    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }

    #[inline]
    fn address_mask(&self) -> u64 {
        self.address_mask
    }

    #[inline]
    fn largest_level(&self, _flags: NptFlags) -> u8 {
        if self.gigabyte_pages { 3 } else { 2 }
    }

    #[inline]
    fn is_valid(&self, flags: NptFlags) -> bool {
        let reserved = (address_mask(52) & !self.c_bit) | PRESENT | USER;
        flags.bits() & reserved == 0
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
        long_mode::is_reserved(
            entry,
            level,
            self.address_mask | self.c_bit,
            self.gigabyte_pages,
        )
    }

    #[inline]
    fn leaf(&self, entry: u64, level: u8) -> Leaf<NptFlags> {
        let (frame, flags) = long_mode::leaf(entry, level, self.address_mask);
        Leaf {
            frame: Hpa(frame),
            shift: shift_of(level),
            flags: NptFlags::from_bits_retain(flags & !USER),
        }
    }

    #[inline]
    fn table_entry(&self, table: Hpa, _level: u8) -> u64 {
        let encrypted = if self.encrypted_tables { self.c_bit } else { 0 };
        table.0 | 0x67 | encrypted
    }

    #[inline]
    fn leaf_entry(&self, frame: Hpa, level: u8, flags: NptFlags) -> u64 {
        long_mode::leaf_entry(frame.0, level, flags.bits() | USER)
    }

    #[inline]
    fn accessed_bit(&self) -> u64 {
        NptFlags::ACCESSED.bits()
    }

    #[inline]
    fn dirty_bit(&self) -> u64 {
        NptFlags::DIRTY.bits()
    }

    #[inline]
    fn write_bit(&self) -> u64 {
        NptFlags::WRITABLE.bits()
    }

    #[inline]
    fn entry_rights(&self, entry: u64, _level: u8) -> Rights {
        // Every access of a guest is a user access.
        if entry & USER == 0 {
            return Rights::empty();
        }
        let mut rights = Rights::READ;
        rights.set(Rights::WRITE, entry & NptFlags::WRITABLE.bits() != 0);
        let execute = entry & NptFlags::NO_EXECUTE.bits() == 0;
        rights.set(Rights::EXECUTE | Rights::USER_EXECUTE, execute);
        rights
    }

    #[inline]
    fn flags(&self, rights: Rights) -> Option<NptFlags> {
        self.with_rights(NptFlags::ACCESSED | NptFlags::DIRTY, rights)
    }

    #[inline]
    fn with_rights(&self, mut flags: NptFlags, rights: Rights) -> Option<NptFlags> {
        if rights.is_empty() || self.floor(rights) != rights {
            return None;
        }
        flags.set(NptFlags::WRITABLE, rights.contains(Rights::WRITE));
        flags.set(NptFlags::NO_EXECUTE, !rights.contains(Rights::EXECUTE));
        Some(flags)
    }

    #[inline]
    fn floor(&self, rights: Rights) -> Rights {
        if !rights.contains(Rights::READ) {
            return Rights::empty();
        }
        let execute = rights.contains(Rights::EXECUTE | Rights::USER_EXECUTE);
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
        let format = Npt::new(48).with_c_bit(47, true);
        let entry = format.leaf_entry(Hpa(0x1000), 1, format.encrypted(NptFlags::WRITABLE));
        assert_eq!(entry, 0x8000_0000_1007);
        assert_eq!(format.table_entry(Hpa(0x2000), 3), 0x8000_0000_2067);
        assert_eq!(format.child(0x8000_0000_2067, 3), (Hpa(0x2000), 2));
        assert!(!Npt::new(48).is_valid(format.encrypted(NptFlags::empty())));
        let large = format.leaf_entry(Hpa(0x4000_0000), 3, NptFlags::NO_EXECUTE);
        assert_eq!(large, 0x8000_0000_4000_0085);
    }
}
