//! CR0, CR4 and EFER as a guest sees them, and how it may change them (SDM vol. 3A, 2.5, 4.1 and
//! 10.8.5; APM vol. 2, 3.1 and 14.6).

use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Gpa, GuestMemory};

pub(super) const PE: u64 = Cr0Flags::PROTECTED_MODE_ENABLE.bits();
pub(super) const ET: u64 = Cr0Flags::EXTENSION_TYPE.bits();
pub(super) const NE: u64 = Cr0Flags::NUMERIC_ERROR.bits();
pub(super) const NW: u64 = Cr0Flags::NOT_WRITE_THROUGH.bits();
pub(super) const CD: u64 = Cr0Flags::CACHE_DISABLE.bits();
pub(super) const PG: u64 = Cr0Flags::PAGING.bits();
const CR0_DEFINED: u64 = PE
    | ET
    | NE
    | NW
    | CD
    | PG
    | Cr0Flags::MONITOR_COPROCESSOR.bits()
    | Cr0Flags::EMULATE_COPROCESSOR.bits()
    | Cr0Flags::TASK_SWITCHED.bits()
    | Cr0Flags::WRITE_PROTECT.bits()
    | Cr0Flags::ALIGNMENT_MASK.bits();

pub(super) const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const LA57: u64 = Cr4Flags::L5_PAGING.bits();
#[cfg(feature = "vmx")]
pub(super) const MCE: u64 = Cr4Flags::MACHINE_CHECK_EXCEPTION.bits();
/// The bits that a guest may set, where the processor has them: those whose feature the guest's
/// CPUID can show.
#[cfg(feature = "vmx")]
pub(super) const GUEST_CR4: u64 = Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS.bits()
    | Cr4Flags::PROTECTED_MODE_VIRTUAL_INTERRUPTS.bits()
    | Cr4Flags::TIMESTAMP_DISABLE.bits()
    | Cr4Flags::DEBUGGING_EXTENSIONS.bits()
    | Cr4Flags::PAGE_SIZE_EXTENSION.bits()
    | PAE
    | MCE
    | Cr4Flags::PAGE_GLOBAL.bits()
    | Cr4Flags::PERFORMANCE_MONITOR_COUNTER.bits()
    | Cr4Flags::OSFXSR.bits()
    | Cr4Flags::OSXMMEXCPT_ENABLE.bits()
    | Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION.bits()
    | LA57
    | Cr4Flags::FSGSBASE.bits()
    | Cr4Flags::OSXSAVE.bits()
    | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits()
    | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION.bits()
    | Cr4Flags::PROTECTION_KEY_USER.bits();
/// A change of these drops cached translations (SDM vol. 3A, 4.10.4.1).
const CR4_PAGING: u64 = Cr4Flags::PAGE_SIZE_EXTENSION.bits()
    | PAE
    | Cr4Flags::PAGE_GLOBAL.bits()
    | LA57
    | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits()
    | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION.bits()
    | Cr4Flags::PROTECTION_KEY_USER.bits();
/// With PAE paging, a change of these loads the page-directory pointers (SDM vol. 3A, 4.4.1).
const CR4_LOADS_PDPTES: u64 = PAE
    | Cr4Flags::PAGE_GLOBAL.bits()
    | Cr4Flags::PAGE_SIZE_EXTENSION.bits()
    | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits();

pub(super) const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
pub(super) const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
pub(super) const NXE: u64 = EferFlags::NO_EXECUTE_ENABLE.bits();

/// CR0, CR4 and EFER as the guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) cr0: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
}

impl Mode {
    /// After MOV to CR0 of `value`, by code with CS.L = `cs_long`; `None` is #GP(0).
    pub(super) fn with_cr0(self, value: u64, cs_long: bool) -> Option<Self> {
        if value >> 32 != 0 {
            return None;
        }
        let cr0 = (value & CR0_DEFINED) | ET;
        if cr0 & (PG | PE) == PG || cr0 & (NW | CD) == NW {
            return None;
        }
        let mut efer = self.efer;
        let begins = cr0 & PG != 0 && self.cr0 & PG == 0;
        let ends = cr0 & PG == 0 && self.cr0 & PG != 0;
        if begins && efer & LME != 0 {
            if self.cr4 & PAE == 0 || cs_long {
                return None;
            }
            efer |= LMA;
        }
        if ends && efer & LMA != 0 {
            if cs_long {
                return None;
            }
            efer &= !LMA;
        }
        Some(Self { cr0, efer, ..self })
    }

    /// After MOV to CR4 of `value`, where the guest may set the bits `allowed`; `None` is #GP(0).
    pub(super) fn with_cr4(self, value: u64, allowed: u64) -> Option<Self> {
        let long = self.efer & LMA != 0;
        let wrong =
            value & !allowed != 0 || long && (value & PAE == 0 || (value ^ self.cr4) & LA57 != 0);
        (!wrong).then_some(Self { cr4: value, ..self })
    }

    /// After WRMSR of `value` to EFER, where the guest may set the bits `allowed`; `None` is #GP(0).
    /// LMA stays what the processor made it, and LME cannot change while paging is on.
    pub(super) fn with_efer(self, value: u64, allowed: u64) -> Option<Self> {
        let paging = self.cr0 & PG != 0;
        if value & !allowed != 0 || paging && (value ^ self.efer) & LME != 0 {
            return None;
        }
        let efer = (value & !LMA) | (self.efer & LMA);
        Some(Self { efer, ..self })
    }

    /// As VMRUN loads it: LMA is what LME and PG make it, whatever a control block says. Tables for one
    /// mode must not be walked in another.
    #[cfg(feature = "svm")]
    pub(super) const fn with_lma_by_paging(self) -> Self {
        let long = self.cr0 & PG != 0 && self.efer & LME != 0;
        let efer = (self.efer & !LMA) | if long { LMA } else { 0 };
        Self { efer, ..self }
    }

    /// Whether linear addresses are translated by PAE paging.
    pub(super) const fn pae_paging(&self) -> bool {
        self.cr0 & PG != 0 && self.cr4 & PAE != 0 && self.efer & LMA == 0
    }

    /// Whether the change from `old` loads the page-directory pointers from memory.
    pub(super) const fn loads_pdptes(&self, old: &Self) -> bool {
        self.pae_paging()
            && ((self.cr0 ^ old.cr0) & (PG | CD | NW) != 0
                || (self.cr4 ^ old.cr4) & CR4_LOADS_PDPTES != 0)
    }

    /// Whether the change from `old` drops cached translations.
    pub(super) const fn drops_translations(&self, old: &Self) -> bool {
        (self.cr0 ^ old.cr0) & PG != 0
            || (self.cr4 ^ old.cr4) & CR4_PAGING != 0
            || (self.efer ^ old.efer) & (NXE | LMA) != 0
    }
}

/// Whether PAE paging accepts these page-directory pointers on a processor with this width of
/// physical addresses (SDM vol. 3A, table 4-8).
pub(super) fn pdptes_are_valid(pdptes: &[u64; 4], physical_bits: u8) -> bool {
    let wide = !0u64 << physical_bits.clamp(32, 52);
    let reserved = wide | 0x1E6;
    pdptes
        .iter()
        .all(|entry| entry & 1 == 0 || entry & reserved == 0)
}

/// The four page-directory pointers at CR3; where no memory is, ones.
pub(super) fn read_pdptes(memory: &(impl GuestMemory + ?Sized), cr3: u64) -> [u64; 4] {
    let table = Gpa(cr3 & 0xFFFF_FFE0);
    core::array::from_fn(|i| {
        let at = table.wrapping_add(8 * i as u64);
        memory.load_u64(at).unwrap_or(u64::MAX)
    })
}
