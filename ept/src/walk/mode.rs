//! The paging modes: their geometry, and which bits they reserve.

use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Gva};

use super::{
    Access, AccessKind, GuestTranslation, NO_EXECUTE, PAGE_SIZE_BIT, PRESENT, PageFaultCode,
    Privilege,
};

/// The paging modes (SDM vol. 3A, 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// CR0.PG is clear: linear addresses are physical.
    Off,
    /// 32-bit paging: two levels of 32-bit entries.
    Legacy,
    /// PAE paging: three levels of 64-bit entries, 32-bit linear addresses.
    Pae,
    /// 4-level paging.
    Level4,
    /// 5-level paging.
    Level5,
}

impl Mode {
    /// Whether linear addresses have 64 bits.
    #[inline]
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Level4 | Self::Level5)
    }

    /// The number of levels of tables.
    #[inline]
    pub const fn levels(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Legacy => 2,
            Self::Pae => 3,
            Self::Level4 => 4,
            Self::Level5 => 5,
        }
    }

    /// The number of linear-address bits that are translated.
    #[inline]
    pub const fn linear_bits(self) -> u32 {
        match self {
            Self::Level4 => 48,
            Self::Level5 => 57,
            _ => 32,
        }
    }

    /// The bits of an address that are translated, or `None` if it is not canonical. Without long
    /// mode an address has 32 bits.
    #[inline]
    pub(super) const fn linear(self, address: Gva) -> Option<u64> {
        let unused = 64 - self.linear_bits();
        let bits = (address.0 << unused) >> unused;
        let extended = ((address.0 << unused) as i64 >> unused) as u64;
        if self.is_long() && extended != address.0 {
            None
        } else {
            Some(bits)
        }
    }

    /// The number of address bits below those that index a table of `level`.
    #[inline]
    pub const fn shift(self, level: u8) -> u32 {
        match self {
            Self::Legacy => 2 + 10 * level as u32,
            _ => 3 + 9 * level as u32,
        }
    }

    #[inline]
    pub(super) const fn entry_bytes(self) -> u64 {
        if matches!(self, Self::Legacy) { 4 } else { 8 }
    }

    #[inline]
    pub(super) const fn index(self, linear: u64, level: u8) -> u64 {
        let entries = match (self, level) {
            (Self::Legacy, _) => 1024,
            (Self::Pae, 3) => 4,
            _ => 512,
        };
        (linear >> self.shift(level)) & (entries - 1)
    }

    /// The bits of an entry that hold a table's address.
    #[inline]
    pub(crate) const fn table_mask(self) -> u64 {
        match self {
            Self::Legacy => 0xFFFF_F000,
            _ => 0x000F_FFFF_FFFF_F000,
        }
    }

    /// The first byte of the page that an entry maps. Reserved bits have been checked.
    #[inline]
    pub(super) const fn page(self, entry: u64, level: u8, large: bool) -> u64 {
        match self {
            // Bits 20:13 are address bits 39:32 (SDM vol. 3A, table 4-4).
            Self::Legacy if large => (entry & 0xFFC0_0000) | ((entry >> 13) & 0xFF) << 32,
            _ => entry & self.table_mask() & !((1 << self.shift(level)) - 1),
        }
    }
}

/// The registers that decide how linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingState {
    /// CR0: PG and WP count.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4: PSE, PAE, LA57, SMEP, SMAP, PKE and PKS count.
    pub cr4: u64,
    /// EFER: LMA and NXE count.
    pub efer: u64,
    /// EFLAGS.AC, which lifts SMAP for explicit accesses.
    pub alignment_check: bool,
    /// PKRU: the rights of user pages' protection keys.
    pub pkru: u32,
    /// IA32_PKRS: the rights of supervisor pages' protection keys.
    pub pkrs: u32,
    /// MAXPHYADDR, 32 to 52: address bits beyond it are reserved.
    pub physical_bits: u8,
    /// Whether the processor has 1 GiB pages; without them the size bit is reserved there.
    pub gigabyte_pages: bool,
    /// The four PDPTE registers of PAE paging, which processors load with CR3 (SDM vol. 3A,
    /// 4.4.1). `None` reads them from memory, as AMD's do under nested paging (APM vol. 2, 15.25.10).
    pub pdptes: Option<[u64; 4]>,
}

impl Default for PagingState {
    /// Paging off on a processor with 52 physical-address bits and 1 GiB pages.
    fn default() -> Self {
        Self {
            cr0: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            alignment_check: false,
            pkru: 0,
            pkrs: 0,
            physical_bits: 52,
            gigabyte_pages: true,
            pdptes: None,
        }
    }
}

impl PagingState {
    /// The paging mode that the registers select.
    #[inline]
    pub fn mode(&self) -> Mode {
        let cr4 = Cr4Flags::from_bits_retain(self.cr4);
        if self.cr0 & Cr0Flags::PAGING.bits() == 0 {
            Mode::Off
        } else if !cr4.contains(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION) {
            Mode::Legacy
        } else if self.efer & EferFlags::LONG_MODE_ACTIVE.bits() == 0 {
            Mode::Pae
        } else if cr4.contains(Cr4Flags::L5_PAGING) {
            Mode::Level5
        } else {
            Mode::Level4
        }
    }

    /// The address of the top table.
    #[inline]
    pub(crate) fn root(&self, mode: Mode) -> u64 {
        match mode {
            // PAE's top table has 32 bytes and need not begin a page.
            Mode::Pae => self.cr3 & 0xFFFF_FFE0,
            Mode::Legacy | Mode::Off => self.cr3 & 0xFFFF_F000,
            Mode::Level4 | Mode::Level5 => self.cr3 & self.physical_mask() & !0xFFF,
        }
    }

    /// The PDPTE register that stands for the entry, if the processor has it.
    #[inline]
    pub(super) fn pdpte(&self, mode: Mode, level: u8, linear: u64) -> Option<u64> {
        if mode != Mode::Pae || level != 3 {
            return None;
        }
        // Loading CR3 has checked the reserved bits.
        let keep = PRESENT | (self.physical_mask() & !0xFFF);
        self.pdptes
            .map(|registers| registers[mode.index(linear, 3) as usize] & keep)
    }

    /// Whether a present entry above level 1 maps a page.
    #[inline]
    pub(super) fn is_large(&self, mode: Mode, entry: u64, level: u8) -> bool {
        let sized = entry & PAGE_SIZE_BIT != 0;
        match (mode, level) {
            (Mode::Legacy, 2) => sized && self.cr4 & Cr4Flags::PAGE_SIZE_EXTENSION.bits() != 0,
            (Mode::Pae | Mode::Level4 | Mode::Level5, 2) => sized,
            (Mode::Level4 | Mode::Level5, 3) => sized && self.gigabyte_pages,
            _ => false,
        }
    }

    #[inline]
    fn physical_mask(&self) -> u64 {
        (1 << u32::from(self.physical_bits.clamp(32, 52))) - 1
    }

    #[inline]
    fn no_execute(&self) -> bool {
        self.efer & EferFlags::NO_EXECUTE_ENABLE.bits() != 0
    }

    /// The bits of a present entry that must be zero (SDM vol. 3A, 4.3 to 4.5, "reserved"; 4.7).
    #[inline]
    pub(super) fn reserved(&self, mode: Mode, level: u8, large: bool) -> u64 {
        let wide = !self.physical_mask();
        let execute = if self.no_execute() { 0 } else { NO_EXECUTE };
        match mode {
            Mode::Off => 0,
            Mode::Legacy if large => {
                // Bits 20:13 hold address bits 39:32 as far as there are such; 21 is reserved.
                let high = ((wide >> 32) & 0xFF) << 13;
                high | 1 << 21
            }
            Mode::Legacy => 0,
            Mode::Pae if level == 3 => {
                if self.pdptes.is_some() {
                    0
                } else {
                    wide | 0x1E6
                }
            }
            // With PAE paging, bits 62:52 are reserved too.
            Mode::Pae => (wide & !NO_EXECUTE) | execute | self.page_offset(mode, level, large),
            Mode::Level4 | Mode::Level5 => {
                let size = if level > 3 || (level == 3 && !self.gigabyte_pages) {
                    PAGE_SIZE_BIT
                } else {
                    0
                };
                let wide = wide & 0x000F_FFFF_FFFF_FFFF;
                wide | execute | size | self.page_offset(mode, level, large)
            }
        }
    }

    /// The address bits that a larger page has no use for, bit 12 apart, which is its PAT bit.
    #[inline]
    fn page_offset(&self, mode: Mode, level: u8, large: bool) -> u64 {
        if large {
            ((1 << mode.shift(level)) - 1) & !0x1FFF
        } else {
            0
        }
    }

    /// SMEP: the supervisor does not fetch from user pages.
    #[cfg(feature = "alloc")]
    #[inline]
    pub(crate) fn prevents_supervisor_fetch(&self) -> bool {
        self.cr4 & Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits() != 0
    }

    /// The error-code bits that follow from the access alone.
    #[inline]
    pub(super) fn fault_code(&self, access: Access) -> PageFaultCode {
        let mut code = PageFaultCode::empty();
        code.set(PageFaultCode::USER, access.privilege == Privilege::User);
        match access.kind {
            AccessKind::Read => {}
            AccessKind::Write => code |= PageFaultCode::WRITE,
            AccessKind::Fetch => {
                let cr4 = Cr4Flags::from_bits_retain(self.cr4);
                let smep = cr4.contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION);
                let nx = cr4.contains(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION) && self.no_execute();
                code.set(PageFaultCode::FETCH, smep || nx);
            }
        }
        code
    }

    /// The two right-denying bits of the page's protection key, if keys apply to the page: bit 0
    /// denies access, bit 1 writes (SDM vol. 3A, 4.6.2).
    #[inline]
    pub(super) fn key_rights(&self, mode: Mode, page: &GuestTranslation) -> Option<u32> {
        let cr4 = Cr4Flags::from_bits_retain(self.cr4);
        let (enabled, register) = if page.user {
            (cr4.contains(Cr4Flags::PROTECTION_KEY_USER), self.pkru)
        } else {
            (cr4.contains(Cr4Flags::PROTECTION_KEY_SUPERVISOR), self.pkrs)
        };
        if !enabled || !mode.is_long() {
            return None;
        }
        let key = (page.leaf()?.entry >> 59) & 0xF;
        Some((register >> (2 * key as u32)) & 3)
    }
}
