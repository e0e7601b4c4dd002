//! Intel's extended page tables (SDM vol. 3C, 31.3).

use bitflags::bitflags;
use testudo_arch::{Gpa, Hpa, PageSize};

pub use testudo_arch::mtrr::MemoryType;

use super::{Format, Leaf, Rights, level_of, shift_of};

const LARGE: u64 = 1 << 7;
const MEMORY_TYPE: u64 = 7 << 3;

bitflags! {
    /// The flags of an entry that maps a page (SDM vol. 3C, tables 31-3, 31-5 and 31-7).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct EptFlags: u64 {
        /// Reads are allowed.
        const READ = 1 << 0;
        /// Writes are allowed.
        const WRITE = 1 << 1;
        /// Fetches are allowed; with mode-based execute control, from supervisor-mode pages.
        const EXECUTE = 1 << 2;
        /// The memory type is write-back (the field's value 6). See [`Self::memory_type`].
        const WRITE_BACK = 6 << 3;
        /// Ignore PAT: the memory type stands, whatever the guest's PAT says.
        const IGNORE_PAT = 1 << 6;
        /// A: software has accessed the page.
        const ACCESSED = 1 << 8;
        /// D: software has written to the page.
        const DIRTY = 1 << 9;
        /// Fetches are allowed from user-mode pages, with mode-based execute control.
        const USER_EXECUTE = 1 << 10;
        /// Guest-paging verification.
        const VERIFY_GUEST_PAGING = 1 << 57;
        /// Writes by the processor to a guest's paging structures are allowed.
        const PAGING_WRITE = 1 << 58;
        /// Supervisor shadow-stack accesses are allowed.
        const SUPERVISOR_SHADOW_STACK = 1 << 60;
        /// SPP: writes to a 4 KiB page that is not writable ask the sub-page-permission table.
        const SUB_PAGE_WRITE = 1 << 61;
        /// A violation on this page is never turned into a #VE.
        const SUPPRESS_VE = 1 << 63;
        const _ = !0;
    }
}

impl EptFlags {
    /// These flags with another memory type.
    #[inline]
    pub const fn with_memory_type(self, memory: MemoryType) -> Self {
        Self::from_bits_retain((self.bits() & !MEMORY_TYPE) | ((memory as u64) << 3))
    }

    /// The memory type, or the reserved value of the field.
    #[inline]
    pub const fn memory_type(self) -> Result<MemoryType, u8> {
        match (self.bits() & MEMORY_TYPE) >> 3 {
            0 => Ok(MemoryType::Uncacheable),
            1 => Ok(MemoryType::WriteCombining),
            4 => Ok(MemoryType::WriteThrough),
            5 => Ok(MemoryType::WriteProtected),
            6 => Ok(MemoryType::WriteBack),
            reserved => Err(reserved as u8),
        }
    }
}

/// Extended page tables with four or five levels, and what the processor offers for them
/// (IA32_VMX_EPT_VPID_CAP; SDM vol. 3D, A.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept {
    levels: u8,
    largest: u8,
    largest_executable: u8,
    address_mask: u64,
    absent: u64,
    execute_only: bool,
    mode_based_execute: bool,
    accessed_dirty: bool,
}

impl Ept {
    /// Four levels with 1 GiB pages, physical addresses of `physical_bits` (32 to 52), and nothing
    /// else that is optional.
    pub const fn new(physical_bits: u8) -> Self {
        Self {
            levels: 4,
            largest: 3,
            largest_executable: 3,
            address_mask: super::long_mode::address_mask(physical_bits),
            absent: 0,
            execute_only: false,
            mode_based_execute: false,
            accessed_dirty: false,
        }
    }

    /// With five levels (capability bit 7).
    pub const fn with_five_levels(mut self) -> Self {
        self.levels = 5;
        self
    }

    /// With pages of at most this size (capability bits 16 and 17).
    pub const fn with_largest_page(mut self, size: PageSize) -> Self {
        self.largest = level_of(size);
        if self.largest_executable > self.largest {
            self.largest_executable = self.largest;
        }
        self
    }

    /// With executable pages of 4 KiB only. A guest that changes the size of an executable page
    /// can stop some processors with a machine check (CVE-2018-12207), and with this it cannot.
    pub const fn without_large_executable(mut self) -> Self {
        self.largest_executable = 1;
        self
    }

    /// With pages that can be executed but not read (capability bit 0).
    pub const fn with_execute_only(mut self) -> Self {
        self.execute_only = true;
        self
    }

    /// With mode-based execute control: user-mode pages have their own execute right.
    pub const fn with_mode_based_execute(mut self) -> Self {
        self.mode_based_execute = true;
        self
    }

    /// With accessed and dirty bits, enabled in the pointer (capability bit 21).
    pub const fn with_accessed_dirty(mut self) -> Self {
        self.accessed_dirty = true;
        self
    }

    /// With absent entries that never cause a #VE but always an exit: bit 63 is set in them
    /// (SDM vol. 3C, 28.5.8.1).
    pub const fn with_suppressed_ve(mut self) -> Self {
        self.absent = EptFlags::SUPPRESS_VE.bits();
        self
    }

    /// The EPT pointer for a table: write-back walks, levels, accessed and dirty (SDM vol. 3C,
    /// 27.6.11).
    #[inline]
    pub const fn pointer(&self, root: Hpa) -> u64 {
        let accessed_dirty = if self.accessed_dirty { 1 << 6 } else { 0 };
        root.0 | accessed_dirty | ((self.levels as u64 - 1) << 3) | MemoryType::WriteBack as u64
    }

    /// The format that an EPT pointer selects, with this one's other properties; `None` if VM entry
    /// rejects it (SDM vol. 3C, 29.2.1.1).
    pub const fn of_pointer(mut self, pointer: u64) -> Option<(Self, u64)> {
        let walk = (pointer >> 3) & 7;
        let known = matches!(walk, 3 | 4) && matches!(pointer & 7, 0 | 6);
        if !known || pointer & !(self.address_mask | 0x7F) != 0 {
            return None;
        }
        self.levels = walk as u8 + 1;
        self.accessed_dirty = pointer & (1 << 6) != 0;
        Some((self, pointer & self.address_mask))
    }

    /// The bits any of which makes an entry present.
    #[inline]
    const fn present(&self) -> u64 {
        if self.mode_based_execute { 0x407 } else { 7 }
    }
}

impl Format for Ept {
    type Input = Gpa;
    type Flags = EptFlags;

    const NAME: &'static str = "EPT";
    const SOFTWARE: u64 = 0x1F << 52;

    #[inline]
    fn levels(&self) -> u8 {
        self.levels
    }

    #[inline]
    fn address_mask(&self) -> u64 {
        self.address_mask
    }

    #[inline]
    fn absent(&self) -> u64 {
        self.absent
    }

    #[inline]
    fn largest_level(&self, flags: EptFlags) -> u8 {
        if flags.intersects(EptFlags::EXECUTE | EptFlags::USER_EXECUTE) {
            self.largest_executable
        } else {
            self.largest
        }
    }

    /// Misconfigurations are what an entry must not be (SDM vol. 3C, 31.3.3.1).
    #[inline]
    fn is_valid(&self, flags: EptFlags) -> bool {
        let bits = flags.bits();
        let reserved = super::long_mode::address_mask(52) | LARGE;
        bits & self.present() != 0
            && bits & reserved == 0
            && !self.is_misconfigured(bits)
            && flags.memory_type().is_ok()
    }

    #[inline]
    fn is_present(&self, entry: u64) -> bool {
        entry & self.present() != 0
    }

    #[inline]
    fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level == 1 || entry & LARGE != 0
    }

    #[inline]
    fn is_reserved(&self, entry: u64, level: u8) -> bool {
        let wide = entry & super::long_mode::address_mask(52) & !self.address_mask;
        let kind = if level > self.largest && level > 1 {
            entry & (LARGE | MEMORY_TYPE | EptFlags::IGNORE_PAT.bits()) != 0
        } else if self.is_leaf(entry, level) {
            let inside = ((1u64 << shift_of(level)) - 1) & !0xFFF;
            let memory = EptFlags::from_bits_retain(entry).memory_type();
            entry & inside != 0 || memory.is_err()
        } else {
            entry & (MEMORY_TYPE | EptFlags::IGNORE_PAT.bits()) != 0
        };
        wide != 0 || kind || self.is_misconfigured(entry)
    }

    #[inline]
    fn leaf(&self, entry: u64, level: u8) -> Leaf<EptFlags> {
        let size = if level == 1 { 0 } else { LARGE };
        Leaf {
            frame: Hpa(entry & self.address_mask & !((1 << shift_of(level)) - 1)),
            shift: shift_of(level),
            flags: EptFlags::from_bits_retain(entry & !self.address_mask & !size),
        }
    }

    /// A table's entry allows everything: the pages' entries decide.
    #[inline]
    fn table_entry(&self, table: Hpa, _level: u8) -> u64 {
        let accessed = if self.accessed_dirty { 1 << 8 } else { 0 };
        table.0 | self.present() | accessed
    }

    #[inline]
    fn leaf_entry(&self, frame: Hpa, level: u8, flags: EptFlags) -> u64 {
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
        EptFlags::WRITE.bits()
    }

    #[inline]
    fn entry_rights(&self, entry: u64, _level: u8) -> Rights {
        let mut rights = Rights::from_bits_retain((entry & 7) as u8);
        let user = if self.mode_based_execute {
            1 << 10
        } else {
            1 << 2
        };
        rights.set(Rights::USER_EXECUTE, entry & user != 0);
        rights
    }

    #[inline]
    fn flags(&self, rights: Rights) -> Option<EptFlags> {
        let flags = EptFlags::WRITE_BACK | EptFlags::ACCESSED | EptFlags::DIRTY;
        self.with_rights(flags, rights)
    }

    #[inline]
    fn with_rights(&self, mut flags: EptFlags, rights: Rights) -> Option<EptFlags> {
        if rights.is_empty() || self.floor(rights) != rights {
            return None;
        }
        flags.set(EptFlags::READ, rights.contains(Rights::READ));
        flags.set(EptFlags::WRITE, rights.contains(Rights::WRITE));
        flags.set(EptFlags::EXECUTE, rights.contains(Rights::EXECUTE));
        let user = self.mode_based_execute && rights.contains(Rights::USER_EXECUTE);
        flags.set(EptFlags::USER_EXECUTE, user);
        Some(flags)
    }

    #[inline]
    fn floor(&self, mut rights: Rights) -> Rights {
        if !self.mode_based_execute && !rights.contains(Rights::EXECUTE | Rights::USER_EXECUTE) {
            rights -= Rights::EXECUTE | Rights::USER_EXECUTE;
        }
        if rights.contains(Rights::READ) {
            rights
        } else if self.execute_only {
            rights - Rights::WRITE
        } else {
            Rights::empty()
        }
    }
}

impl Ept {
    /// Writable but not readable; or executable but not readable without the capability.
    #[inline]
    const fn is_misconfigured(&self, entry: u64) -> bool {
        let executable = entry & self.present() & !3 != 0;
        entry & 1 == 0 && (entry & 2 != 0 || (executable && !self.execute_only))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RWX: EptFlags = EptFlags::READ
        .union(EptFlags::WRITE)
        .union(EptFlags::EXECUTE);

    #[test]
    fn golden_entries() {
        let ept = Ept::new(46);
        let flags = RWX | EptFlags::WRITE_BACK | EptFlags::IGNORE_PAT;
        assert_eq!(ept.leaf_entry(Hpa(0x12_3000), 1, flags), 0x12_3077);
        assert_eq!(ept.leaf_entry(Hpa(0x20_0000), 2, flags), 0x20_00F7);
        assert_eq!(ept.table_entry(Hpa(0x5000), 4), 0x5007);
        assert_eq!(ept.pointer(Hpa(0x9000)), 0x901E);
        let rich = ept
            .with_five_levels()
            .with_accessed_dirty()
            .with_mode_based_execute();
        assert_eq!(rich.table_entry(Hpa(0x5000), 4), 0x5507);
        assert_eq!(rich.pointer(Hpa(0x9000)), 0x9066);
    }

    #[test]
    fn pointers_that_entry_rejects() {
        let ept = Ept::new(40);
        assert_eq!(ept.of_pointer(0x901E), Some((ept, 0x9000)));
        assert!(ept.of_pointer(0x9066).is_some_and(|(e, _)| e.levels == 5));
        for bad in [0x901F, 0x9016, 0x909E, 0x901E | 1 << 40, 0x901E | 1 << 63] {
            assert_eq!(ept.of_pointer(bad), None, "{bad:#x}");
        }
    }

    #[test]
    fn misconfigurations() {
        let ept = Ept::new(40);
        let write_back = EptFlags::WRITE_BACK;
        assert!(ept.is_valid(write_back | RWX));
        assert!(!ept.is_valid(write_back));
        assert!(!ept.is_valid(write_back | EptFlags::WRITE));
        assert!(!ept.is_valid(write_back | EptFlags::EXECUTE));
        assert!(
            ept.with_execute_only()
                .is_valid(write_back | EptFlags::EXECUTE)
        );
        assert!(
            !ept.with_execute_only()
                .is_valid(write_back | EptFlags::EXECUTE | EptFlags::WRITE)
        );
        for reserved in [2, 3, 7] {
            let bits = RWX.bits() | reserved << 3;
            assert!(!ept.is_valid(EptFlags::from_bits_retain(bits)));
            assert!(ept.is_reserved(0x1000 | bits, 1));
        }
        assert!(ept.is_reserved(0x1007 | 1 << 40, 1));
        assert!(ept.is_reserved(0x1087, 4) && ept.is_reserved(0x100F, 2));
        assert!(ept.is_reserved(0x10_0087, 2) && !ept.is_reserved(0x20_0087, 2));
    }

    #[test]
    fn mode_based_execute_separates_the_rights() {
        let plain = Ept::new(40);
        let supervisor = Rights::READ | Rights::EXECUTE;
        assert_eq!(plain.flags(supervisor), None);
        assert_eq!(plain.floor(supervisor), Rights::READ);
        let mbec = plain.with_mode_based_execute();
        let flags = mbec.flags(supervisor).unwrap();
        assert_eq!(mbec.rights(flags), supervisor);
        assert!(mbec.is_present(1 << 10) && !plain.is_present(1 << 10));
    }

    #[test]
    fn executable_superpages_can_be_forbidden() {
        let ept = Ept::new(40).without_large_executable();
        let data = EptFlags::READ | EptFlags::WRITE;
        assert_eq!((ept.largest_level(RWX), ept.largest_level(data)), (1, 3));
    }
}
