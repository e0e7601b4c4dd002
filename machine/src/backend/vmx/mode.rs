//! CR0, CR4 and EFER, and how a guest may change them (SDM vol. 3A, 2.5, 4.1 and 10.8.5).
//!
//! Bits that need the hypervisor's eye belong to it: the guest reads them from a shadow, and a
//! change exits. In CR0 these are PG (which makes or ends IA-32e mode), NE (fixed by VMX), and CD
//! and NW (which would act on the processor itself). PE, MP, EM, TS, WP and AM are the guest's, so
//! that CLTS, LMSW and lazy switching of the FPU never exit. CR4 is the hypervisor's as a whole: it
//! changes seldom, and its value, which CPUID mirrors, is then known without a VMREAD.

use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags};
use testudo_vmx::VmxCaps;

pub(super) use crate::backend::mode::*;

/// The bits of EFER that a guest may set.
pub(super) const GUEST_EFER: u64 = EferFlags::SYSTEM_CALL_EXTENSIONS.bits() | LME | LMA | NXE;

/// What the processor imposes on CR0 and CR4 of guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Imposed {
    cr0_ones: u64,
    /// The bits of CR0 that belong to the hypervisor in any case.
    cr0_owned: u64,
    cr4_ones: u64,
    pub(super) cr4_guest: u64,
}

impl Imposed {
    pub(super) fn new(caps: &VmxCaps) -> Self {
        Self {
            // Unrestricted guests are exempt from PE and PG.
            cr0_ones: (caps.cr0.ones & !(PE | PG)) | ET,
            cr0_owned: PG | NE | CD | NW,
            // A machine check must be able to end the guest's run, whatever the guest thinks of it.
            cr4_ones: caps.cr4.ones | MCE,
            cr4_guest: GUEST_CR4 & caps.cr4.may,
        }
    }

    /// The guest may set CR4.VMXE.
    pub(super) fn offer_vmx(&mut self) {
        self.cr4_guest |= Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS.bits();
    }

    /// For guests that are restricted, and whose tables are not the ones that the processor walks.
    pub(super) fn on_shadow_paging(caps: &VmxCaps) -> Self {
        Self {
            cr0_ones: caps.cr0.ones | ET,
            cr0_owned: PE | PG | NE | CD | NW | Cr0Flags::WRITE_PROTECT.bits(),
            ..Self::new(caps)
        }
    }

    /// The bits of CR0 that belong to the hypervisor.
    pub(super) const fn cr0_mask(&self) -> u64 {
        (self.cr0_ones & !ET) | self.cr0_owned
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
