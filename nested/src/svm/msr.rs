//! The three MSRs through which L1 turns SVM on: EFER.SVME, VM_CR and VM_HSAVE_PA (APM vol. 2,
//! 15.4 and 15.30).

use testudo_arch::{EferFlags, Msr};
use testudo_svm::caps::VmCr;

use super::NestedSvm;

const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();

/// The bits of VM_CR that L1 can change here: R_INIT, LOCK and SVMDIS. DPD and DIS_A20M are about
/// pins that a virtual processor does not have; they are kept as written.
const VM_CR_WRITABLE: u64 = 0x1F;

impl NestedSvm {
    /// EFER as whoever runs reads it, from EFER of the VMCB, which always has SVME set.
    ///
    /// In L2, SVME is set: VMRUN demands it.
    #[inline]
    pub fn visible_efer(&self, efer: u64) -> u64 {
        if self.is_enabled || self.is_guest {
            efer
        } else {
            efer & !SVME
        }
    }

    /// Takes note of the SVME bit of a value that is written to EFER and is valid otherwise.
    /// `false` if the bit may not be set: #GP.
    ///
    /// Clearing it while a guest runs is undefined ("the effect of turning off EFER.SVME while a
    /// guest is running is undefined", APM vol. 2, 15.4); here L2 cannot do it.
    pub fn write_svme(&mut self, efer: u64) -> bool {
        let wanted = efer & SVME != 0;
        if self.is_guest {
            return true;
        }
        if wanted && self.vm_cr.contains(VmCr::SVMDIS) {
            return false;
        }
        self.is_enabled = wanted;
        if !wanted {
            // What L1 had under way ends: a later VMRUN starts from its memory.
            self.is_cached = false;
        }
        true
    }

    /// Whether L1 has VM_CR.R_INIT set, so that an INIT which nobody intercepts is #SX of whoever runs
    /// (APM vol. 2, 15.28).
    pub fn redirects_init(&self) -> bool {
        self.vm_cr.contains(VmCr::R_INIT)
    }

    /// Reads VM_CR or VM_HSAVE_PA; `None` for all other MSRs.
    pub fn read_msr(&self, msr: Msr) -> Option<u64> {
        match msr {
            Msr::VM_CR => Some(self.vm_cr.bits()),
            Msr::VM_HSAVE_PA => Some(self.vm_hsave_pa),
            _ => None,
        }
    }

    /// Writes VM_CR or VM_HSAVE_PA: `None` for all other MSRs, `Some(false)` for #GP.
    pub fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool> {
        match msr {
            Msr::VM_CR => Some(self.write_vm_cr(value)),
            Msr::VM_HSAVE_PA => {
                let valid = value & 0xFFF == 0 && value < self.l1_caps.physical_limit();
                if valid {
                    self.vm_hsave_pa = value;
                }
                Some(valid)
            }
            _ => None,
        }
    }

    /// "LOCK … When set, writes to LOCK and SVMDIS are silently ignored"; SVMDIS cannot be set
    /// while EFER.SVME is (APM vol. 2, 15.30.1).
    fn write_vm_cr(&mut self, value: u64) -> bool {
        if value & !VM_CR_WRITABLE != 0 {
            return false;
        }
        let sticky = VmCr::LOCK | VmCr::SVMDIS;
        let mut new = VmCr::from_bits_retain(value);
        if self.vm_cr.contains(VmCr::LOCK) {
            new = (new - sticky) | (self.vm_cr & sticky);
        }
        if new.contains(VmCr::SVMDIS) && self.is_enabled {
            return false;
        }
        self.vm_cr = new;
        true
    }
}
