//! IA32_EFER and IA32_PAT of guest and host, where the VMCS has no fields for them: the lists of MSRs that are
//! loaded on VM entries and VM exits hold them (SDM vol. 3C, 27.7.2, 27.8.2; 29.4 and 30.6).

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::{Hpa, Msr};
use testudo_vmx::{AccessError, VmcsWrite, fields};

/// The entries of a list: index and value.
type List = [[AtomicU64; 2]; COUNT];
const COUNT: usize = 2;
/// Bytes in a list.
const SIZE: u64 = size_of::<List>() as u64;

/// The lists of one vCPU, which its processor reads.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct SwitchedMsrs {
    /// Loaded on entries.
    guest: List,
    /// Loaded on exits.
    host: List,
}

impl Default for SwitchedMsrs {
    fn default() -> Self {
        let list = || [Msr::EFER, Msr::PAT].map(|msr| [u64::from(msr.0), 0].map(AtomicU64::new));
        Self {
            guest: list(),
            host: list(),
        }
    }
}

impl SwitchedMsrs {
    fn set(list: &List, values: [u64; COUNT]) {
        for ([_, entry], value) in list.iter().zip(values) {
            entry.store(value, Ordering::Relaxed);
        }
    }

    /// What the host has after each exit.
    pub(super) fn set_host(&self, efer: u64, pat: u64) {
        Self::set(&self.host, [efer, pat]);
    }

    /// What the guest has; LME and LMA as the control "IA-32e mode guest" says.
    pub(super) fn set_guest_efer(&self, efer: u64) {
        self.guest[0][1].store(efer, Ordering::Relaxed);
    }

    /// Has a VMCS use the lists, which are at `address`.
    ///
    /// # Errors
    ///
    /// A VMWRITE failed.
    pub(super) fn write(
        &self,
        vmcs: &mut impl VmcsWrite,
        address: Hpa,
        guest_pat: u64,
    ) -> Result<(), AccessError> {
        self.guest[1][1].store(guest_pat, Ordering::Relaxed);
        vmcs.set(fields::ENTRY_MSR_LOAD_ADDRESS, address.0)?;
        vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, COUNT as u32)?;
        vmcs.set(fields::EXIT_MSR_LOAD_ADDRESS, address.0 + SIZE)?;
        vmcs.set(fields::EXIT_MSR_LOAD_COUNT, COUNT as u32)
    }
}

#[cfg(test)]
impl SwitchedMsrs {
    /// Both lists, as the processor reads them.
    pub(super) fn lists(&self) -> [[testudo_vmx::structures::MsrEntry; COUNT]; 2] {
        [&self.guest, &self.host].map(|list| {
            core::array::from_fn(|n| {
                let [index, value] = [0, 1].map(|half| list[n][half].load(Ordering::Relaxed));
                let bytes = u128::from(index) | u128::from(value) << 64;
                testudo_vmx::structures::MsrEntry::from_bytes(bytes.to_le_bytes())
            })
        })
    }
}
