//! MSRs of a guest that stay in the processor, one by one: for a hypervisor that executes RDMSR,
//! WRMSR or an MSR area in the guest's place.

use core::marker::PhantomData;

use testudo_arch::Msr;
use testudo_arch::cpuid::Cpuid;

use super::CurrentVmcs;
use super::instructions::{rdmsr, wrmsr};
use crate::caps::{Processor, ProcessorFeatures};

/// STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE and, where it exists, TSC_AUX of the guest whose
/// [`ResidentRegisters`](super::ResidentRegisters) are in this processor.
#[derive(Clone, Copy, Debug)]
pub struct GuestMsrs {
    linear_bits: u8,
    syscall: bool,
    tsc_aux: bool,
    _processor: PhantomData<*mut ()>,
}

impl CurrentVmcs<'_> {
    /// The MSRs of the guest that stay in this processor.
    pub fn guest_msrs(&self) -> GuestMsrs {
        let cpuid = Cpuid::of_this_processor();
        let processor = Processor::read_from(|leaf, sub| cpuid.query(leaf, sub));
        GuestMsrs {
            linear_bits: processor.linear_address_bits,
            syscall: processor.features.contains(ProcessorFeatures::LONG_MODE),
            tsc_aux: cpuid.query(0x8000_0001, 0)[3] & (1 << 27) != 0,
            _processor: PhantomData,
        }
    }
}

impl GuestMsrs {
    /// Whether an MSR is one of these, on this processor.
    fn has(self, msr: Msr) -> bool {
        match msr {
            Msr::STAR | Msr::LSTAR | Msr::CSTAR | Msr::SFMASK | Msr::KERNEL_GS_BASE => self.syscall,
            Msr::TSC_AUX => self.tsc_aux,
            _ => false,
        }
    }

    /// What RDMSR gives the guest; `None` for all other MSRs.
    pub fn read(self, msr: Msr) -> Option<u64> {
        // SAFETY: VMX root operation, which made this value, is CPL 0, and the register exists.
        self.has(msr).then(|| unsafe { rdmsr(msr) })
    }

    /// The guest's WRMSR; `None` for all other MSRs, `Some(false)` for #GP.
    pub fn write(self, msr: Msr, value: u64) -> Option<bool> {
        if !self.has(msr) {
            return None;
        }
        let valid = match msr {
            Msr::LSTAR | Msr::CSTAR | Msr::KERNEL_GS_BASE => {
                Processor::is_canonical(value, self.linear_bits)
            }
            Msr::SFMASK | Msr::TSC_AUX => value >> 32 == 0,
            _ => true,
        };
        if valid {
            // SAFETY: as for reading; the register takes this value, and the host uses none of them
            // while a guest's are in the processor.
            unsafe { wrmsr(msr, value) };
        }
        Some(valid)
    }
}
