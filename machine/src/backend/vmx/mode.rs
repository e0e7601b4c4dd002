//! CR0, CR4 and EFER, and how a guest may change them (SDM vol. 3A, 2.5, 4.1 and 10.8.5).
//!
//! Bits that need the hypervisor's eye belong to it: the guest reads them from a shadow, and a
//! change exits. In CR0 these are PG (which makes or ends IA-32e mode), NE (fixed by VMX), and CD
//! and NW (which would act on the processor itself). PE, MP, EM, TS, WP and AM are the guest's, so
//! that CLTS, LMSW and lazy switching of the FPU never exit. CR4 is the hypervisor's as a whole: it
//! changes seldom, and its value, which CPUID mirrors, is then known without a VMREAD.

use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags};
use testudo_vmx::VmxCaps;

pub(super) const PE: u64 = Cr0Flags::PROTECTED_MODE_ENABLE.bits();
const ET: u64 = Cr0Flags::EXTENSION_TYPE.bits();
const NE: u64 = Cr0Flags::NUMERIC_ERROR.bits();
const NW: u64 = Cr0Flags::NOT_WRITE_THROUGH.bits();
const CD: u64 = Cr0Flags::CACHE_DISABLE.bits();
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
const MCE: u64 = Cr4Flags::MACHINE_CHECK_EXCEPTION.bits();
/// The bits that a guest may set, where the processor has them: those whose feature the guest's
/// CPUID can show.
const GUEST_CR4: u64 = Cr4Flags::VIRTUAL_8086_MODE_EXTENSIONS.bits()
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
const NXE: u64 = EferFlags::NO_EXECUTE_ENABLE.bits();
const GUEST_EFER: u64 = EferFlags::SYSTEM_CALL_EXTENSIONS.bits() | LME | LMA | NXE;

/// What the processor imposes on CR0 and CR4 of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Imposed {
    cr0_ones: u64,
    cr4_ones: u64,
    cr4_guest: u64,
}

impl Imposed {
    pub(super) fn new(caps: &VmxCaps) -> Self {
        Self {
            // Unrestricted guests are exempt from PE and PG.
            cr0_ones: (caps.cr0.ones & !(PE | PG)) | ET,
            // A machine check must be able to end the guest's run, whatever the guest thinks of it.
            cr4_ones: caps.cr4.ones | MCE,
            cr4_guest: GUEST_CR4 & caps.cr4.may,
        }
    }

    /// The bits of CR0 that belong to the hypervisor.
    pub(super) const fn cr0_mask(&self) -> u64 {
        (self.cr0_ones & !ET) | PG | NE | CD | NW
    }

    /// What the processor runs with when the guest has this CR0.
    pub(super) const fn real_cr0(&self, cr0: u64) -> u64 {
        (cr0 & !(CD | NW)) | self.cr0_ones
    }

    /// What the processor runs with when the guest has this CR4.
    pub(super) const fn real_cr4(&self, cr4: u64) -> u64 {
        cr4 | self.cr4_ones
    }
}

/// CR0, CR4 and EFER as the guest sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mode {
    pub(super) cr0: u64,
    pub(super) cr4: u64,
    pub(super) efer: u64,
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

    /// After MOV to CR4 of `value`; `None` is #GP(0).
    pub(super) fn with_cr4(self, value: u64, imposed: &Imposed) -> Option<Self> {
        let long = self.efer & LMA != 0;
        let wrong = value & !imposed.cr4_guest != 0
            || long && (value & PAE == 0 || (value ^ self.cr4) & LA57 != 0);
        (!wrong).then_some(Self { cr4: value, ..self })
    }

    /// After WRMSR of `value` to EFER; `None` is #GP(0). LMA stays what the processor made it, and
    /// LME cannot change while paging is on.
    pub(super) fn with_efer(self, value: u64) -> Option<Self> {
        let paging = self.cr0 & PG != 0;
        if value & !GUEST_EFER != 0 || paging && (value ^ self.efer) & LME != 0 {
            return None;
        }
        let efer = (value & !LMA) | (self.efer & LMA);
        Some(Self { efer, ..self })
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
