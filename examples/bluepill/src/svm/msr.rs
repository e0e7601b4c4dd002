//! The MSRs that the guest does not have to itself.
//!
//! All others are the processor's: the guest reads and writes them without an exit.

use core::ops::RangeInclusive;

use testudo_arch::{Cr0Flags, EferFlags, Event, Msr};
use testudo_rt::msr::{try_read, try_write};
use testudo_svm::permission::{MsrAccess, MsrPermissionMap};

use super::Guest;
use super::tables::intercept;
use crate::apic;

/// By which the guest turns its own SVM on.
const SVM: [Msr; 3] = [Msr::EFER, Msr::VM_CR, Msr::VM_HSAVE_PA];
/// SVM_KEY: unlocks VM_CR.
const SVM_KEY: Msr = Msr(0xC001_0118);
/// PATCH_LOADER: changes what the processor is.
const PATCH_LOADER: Msr = Msr(0xC001_0020);

/// What decides where an address leads and who runs beside all guests: SYSCFG, the I/O ranges,
/// TOP_MEM and TOP_MEM2, the window of PCI configuration space, and the registers of SMM. Firmware
/// has set them, and systems leave them.
const FIRMWARES: [RangeInclusive<u32>; 6] = [
    0xC001_0010..=0xC001_0010,
    0xC001_0016..=0xC001_001A,
    0xC001_001D..=0xC001_001D,
    0xC001_0058..=0xC001_0058,
    0xC001_0111..=0xC001_0113,
    0xC001_0116..=0xC001_0116,
];

const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const NXE: u64 = EferFlags::NO_EXECUTE_ENABLE.bits();
/// What the hypervisor itself needs of EFER.
const OWN_EFER: u64 = SVME | LME | LMA | NXE;

/// Has the guest exit for the MSRs of this module, in a map that lets it have all.
pub(super) fn close(map: &mut MsrPermissionMap) {
    for msr in SVM {
        intercept(map, msr, MsrAccess::all());
    }
    intercept(map, SVM_KEY, MsrAccess::all());
    for msr in [PATCH_LOADER, Msr::APIC_BASE, Msr::X2APIC_ICR] {
        intercept(map, msr, MsrAccess::WRITE);
    }
    for msr in FIRMWARES.into_iter().flatten() {
        intercept(map, Msr(msr), MsrAccess::WRITE);
    }
}

impl Guest<'_> {
    /// RDMSR of a register that is not the guest's, or that the map does not cover.
    pub(super) fn read_msr(&mut self) {
        let msr = Msr(self.registers.gprs.rcx as u32);
        let value = match msr {
            Msr::EFER => Some(self.nested.visible_efer(self.vmcb().efer())),
            _ if msr == SVM_KEY || (SVM.contains(&msr) && !self.has_svm()) => None,
            _ => self.nested.read_msr(msr).or_else(|| try_read(msr.0)),
        };
        let Some(value) = value else {
            return self.inject(Event::GP0);
        };
        let gprs = &mut self.registers.gprs;
        gprs.rax = value & 0xFFFF_FFFF;
        gprs.rdx = value >> 32;
        self.advance();
    }

    /// WRMSR likewise.
    pub(super) fn write_msr(&mut self) {
        let gprs = &self.registers.gprs;
        let (msr, value) = (
            Msr(gprs.rcx as u32),
            gprs.rdx << 32 | gprs.rax & 0xFFFF_FFFF,
        );
        let firmwares = FIRMWARES.iter().any(|range| range.contains(&msr.0));
        let done = match msr {
            Msr::EFER => self.write_efer(value),
            Msr::APIC_BASE => apic::write_base(value),
            Msr::X2APIC_ICR => return self.write_x2apic_command(value),
            _ if msr == SVM_KEY || (SVM.contains(&msr) && !self.has_svm()) => false,
            _ if msr == PATCH_LOADER => true,
            _ if firmwares => try_read(msr.0) == Some(value),
            _ => match self.nested.write_msr(msr, value) {
                Some(done) => done,
                None => write(msr, value),
            },
        };
        if done {
            self.advance();
        } else {
            self.inject(Event::GP0);
        }
    }

    /// EFER: the processor says which bits it takes; LMA stays what it is, and LME while paging is on
    /// (APM vol. 2, 3.1.7 and 14.6.1).
    fn write_efer(&mut self, value: u64) -> bool {
        let old = self.vmcb().efer();
        let paging = self.vmcb().cr0() & Cr0Flags::PAGING.bits() != 0;
        if paging && (value ^ old) & LME != 0 {
            return false;
        }
        if value & SVME != 0 && !self.has_svm() {
            return false;
        }
        let Some(own) = try_read(Msr::EFER.0) else {
            return false;
        };
        if !write(Msr::EFER, value & !OWN_EFER | OWN_EFER) {
            return false;
        }
        let taken = try_read(Msr::EFER.0).unwrap_or(own) & !OWN_EFER;
        write(Msr::EFER, own);
        if !self.nested.write_svme(value) {
            return false;
        }
        self.nested.adjust_vmcb01(&mut self.vmcb01);
        let new = taken | value & (LME | NXE) | old & LMA | SVME;
        self.vmcb_mut().set_efer(new);
        true
    }

    fn write_x2apic_command(&mut self, value: u64) {
        let Some(command) = apic::write_x2apic_command(value) else {
            return self.inject(Event::GP0);
        };
        self.advance();
        self.carry_out(command);
    }
}

/// Writes an MSR for the guest.
fn write(msr: Msr, value: u64) -> bool {
    // SAFETY: none of the registers that the hypervisor depends on comes here with a value that
    // it cannot run with: EFER keeps its own bits, and the others are those that the guest has to itself anyway.
    unsafe { try_write(msr.0, value) }
}
