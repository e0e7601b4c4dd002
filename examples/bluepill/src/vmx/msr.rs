//! The MSRs that the guest does not have to itself.
//!
//! All others are the processor's, or in the VMCS: the guest reads and writes them without an exit.

use core::ops::RangeInclusive;

use testudo_arch::mtrr::Mtrrs;
use testudo_arch::{Event, Msr};
use testudo_nested::vmx::{Msrs, read_msr};
use testudo_rt::msr::{try_read, try_write};
use testudo_vmx::bitmap::MsrBitmap;

use super::tables::is_vmx;
use super::{Guest, VmxError};
use crate::apic;

/// What decides where an address leads, by which key, and who runs beside all guests: the monitor of SMM and
/// its ranges, and total memory encryption. Firmware has set them, and systems leave them.
const FIRMWARES: [RangeInclusive<u32>; 3] = [0x9B..=0x9B, 0x1F2..=0x1F3, 0x981..=0x984];

/// Those in the VMCS that are in no MSR area: what the processor holds is the hypervisor's.
const IN_VMCS: [Msr; 3] = [Msr::DEBUG_CTL, Msr::S_CET, Msr::INTERRUPT_SSP_TABLE_ADDR];

/// Has the guest exit for the MSRs of this module, in a bitmap that lets it have all.
pub(super) fn close(bitmap: &mut MsrBitmap, mtrrs: Option<&Mtrrs>) {
    for number in Msr::VMX_BASIC.0..=Msr::VMX_EXIT_CTLS2.0 {
        bitmap.set(Msr(number), true, true);
    }
    bitmap.set(Msr::FEATURE_CONTROL, true, true);
    for msr in mtrrs.into_iter().flat_map(Mtrrs::msrs) {
        bitmap.set(msr, true, true);
    }
    for msr in [Msr::BIOS_UPDT_TRIG, Msr::APIC_BASE, Msr::X2APIC_ICR] {
        bitmap.set(msr, false, true);
    }
    for number in FIRMWARES.into_iter().flatten() {
        bitmap.set(Msr(number), false, true);
    }
}

impl Guest<'_> {
    /// RDMSR of a register that is not the guest's, or that the bitmap does not cover.
    pub(super) fn read_msr(&mut self) -> Result<(), VmxError> {
        let msr = Msr(self.registers.gprs.rcx as u32);
        let value = match msr {
            Msr::FEATURE_CONTROL => Some(self.tables.feature_control),
            _ if is_vmx(msr) => {
                let caps = self.tables.guest_caps.as_deref();
                caps.and_then(|caps| read_msr(caps, msr))
            }
            _ => {
                let range = self.mtrrs.as_ref().and_then(|mtrrs| mtrrs.get(msr));
                range.or_else(|| try_read(msr.0))
            }
        };
        let Some(value) = value else {
            return self.inject(Event::GP0);
        };
        let gprs = &mut self.registers.gprs;
        gprs.rax = value & 0xFFFF_FFFF;
        gprs.rdx = value >> 32;
        self.advance()
    }

    /// WRMSR likewise.
    pub(super) fn write_msr(&mut self) -> Result<(), VmxError> {
        let gprs = &self.registers.gprs;
        let (msr, value) = (
            Msr(gprs.rcx as u32),
            gprs.rdx << 32 | gprs.rax & 0xFFFF_FFFF,
        );
        let firmwares = FIRMWARES.iter().any(|range| range.contains(&msr.0));
        let done = match msr {
            Msr::APIC_BASE => apic::write_base(value),
            Msr::X2APIC_ICR => {
                let Some(command) = apic::write_x2apic_command(value) else {
                    return self.inject(Event::GP0);
                };
                self.advance()?;
                self.carry_out(command);
                return Ok(());
            }
            // The capabilities are read-only, and the switch is locked.
            _ if is_vmx(msr) => false,
            // Microcode changes what the processor is.
            Msr::BIOS_UPDT_TRIG => true,
            _ if firmwares => try_read(msr.0) == Some(value),
            _ => {
                // The guest reads the memory types that it writes; those of the firmware stay in effect.
                let range = self.mtrrs.as_mut().and_then(|mtrrs| mtrrs.set(msr, value));
                // SAFETY: none of the registers that the hypervisor depends on comes here; the others are
                // those that the guest has to itself anyway.
                range.unwrap_or_else(|| unsafe { try_write(msr.0, value) })
            }
        };
        if done {
            self.advance()
        } else {
            self.inject(Event::GP0)
        }
    }
}

/// The MSRs of the guest in the areas from which its own VM entries and exits load them: those that it
/// could as well read and write without an exit.
pub(super) struct OpenMsrs(pub(super) &'static MsrBitmap);

impl Msrs for OpenMsrs {
    fn read(&mut self, msr: Msr) -> Option<u64> {
        let open = !self.0.read_exits(msr) && !IN_VMCS.contains(&msr);
        if open { try_read(msr.0) } else { None }
    }

    fn write(&mut self, msr: Msr, value: u64) -> bool {
        let open = !self.0.write_exits(msr) && !IN_VMCS.contains(&msr);
        // SAFETY: the guest has the register to itself.
        open && unsafe { try_write(msr.0, value) }
    }
}
