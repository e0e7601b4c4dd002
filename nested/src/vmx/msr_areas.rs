//! The areas from which exits load MSRs of L1 and in which they store MSRs of L2, and the MSRs that
//! the VMCS itself holds (SDM vol. 3C, 30.4 and 30.6).

use testudo_arch::{EferFlags, Gpa, GuestMemory, Msr};
use testudo_vmx::structures::MsrEntry;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::{Context, Msrs, NestedVmx, VmcsPair};

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();

impl NestedVmx {
    /// The MSR-store area of exits. `false`: VMX abort.
    pub(super) fn store_exit_msrs<P: VmcsPair, M: GuestMemory, S, R: Msrs>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let count = u64::from(self.vmcs12.image.get(fields::EXIT_MSR_STORE_COUNT)?);
        let area = Gpa(self.vmcs12.image.get(fields::EXIT_MSR_STORE_ADDRESS)?);
        for index in 0..count {
            let Some(entry) = self.area_entry(area, index, cx.memory) else {
                return Ok(false);
            };
            let refused = entry.reserved() != 0 || matches!(entry.msr().0, 0x800..=0x8FF);
            let value = if refused {
                None
            } else {
                match store_vmcs_msr(entry.msr(), &cx.vmcs.l2())? {
                    Some(value) => Some(value),
                    None => cx.msrs.read(entry.msr()),
                }
            };
            let Some(value) = value else {
                return Ok(false);
            };
            let at = area.wrapping_add(16 * index + 8);
            // L1 chose the place; what is not memory takes nothing.
            let _dropped = cx.memory.write(at, &value.to_le_bytes()).is_err();
        }
        Ok(true)
    }

    /// The MSR-load area of exits. `false`: VMX abort.
    pub(super) fn load_exit_msrs<P: VmcsPair, M: GuestMemory, S, R: Msrs>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let count = u64::from(self.vmcs12.image.get(fields::EXIT_MSR_LOAD_COUNT)?);
        let area = Gpa(self.vmcs12.image.get(fields::EXIT_MSR_LOAD_ADDRESS)?);
        for index in 0..count {
            let Some(entry) = self.area_entry(area, index, cx.memory) else {
                return Ok(false);
            };
            if entry.load_on_entry_is_refused() {
                return Ok(false);
            }
            let loaded = match load_vmcs_msr(entry.msr(), entry.value(), &mut cx.vmcs.l1())? {
                Some(loaded) => loaded,
                None => cx.msrs.write(entry.msr(), entry.value()),
            };
            if !loaded {
                return Ok(false);
            }
        }
        if count != 0 {
            self.l1_sees.efer = cx.vmcs.l1().get(fields::GUEST_EFER)?;
        }
        Ok(true)
    }

    fn area_entry(&self, area: Gpa, index: u64, memory: &impl GuestMemory) -> Option<MsrEntry> {
        if index >= u64::from(self.caps.misc.msr_list_limit()) {
            return None;
        }
        let mut bytes = [0; 16];
        memory
            .read(area.wrapping_add(16 * index), &mut bytes)
            .ok()?;
        Some(MsrEntry::from_bytes(bytes))
    }
}

/// The MSRs of an area that the VMCS holds: loads one, and says whether the value was valid; `None`
/// for the others.
pub(super) fn load_vmcs_msr(
    msr: Msr,
    value: u64,
    vmcs: &mut impl VmcsWrite,
) -> Result<Option<bool>, AccessError> {
    let canonical = ((value << 16) as i64 >> 16) as u64 == value;
    match msr {
        Msr::EFER => {
            let old = vmcs.get(fields::GUEST_EFER)?;
            const DEFINED: u64 = 0xD01;
            // Neither the mode nor a reserved bit is to be loaded this way.
            let valid = value & !DEFINED == 0 && (value ^ old) & (LMA | LME) == 0;
            if valid {
                vmcs.set(fields::GUEST_EFER, value)?;
            }
            Ok(Some(valid))
        }
        Msr::PAT => {
            let valid = value
                .to_le_bytes()
                .iter()
                .all(|t| matches!(t, 0 | 1 | 4..=7));
            if valid {
                vmcs.set(fields::GUEST_PAT, value)?;
            }
            Ok(Some(valid))
        }
        Msr::SYSENTER_CS => {
            vmcs.set(fields::GUEST_SYSENTER_CS, value as u32)?;
            Ok(Some(true))
        }
        Msr::SYSENTER_ESP | Msr::SYSENTER_EIP if canonical => {
            let field = if msr == Msr::SYSENTER_ESP {
                fields::GUEST_SYSENTER_ESP
            } else {
                fields::GUEST_SYSENTER_EIP
            };
            vmcs.set(field, value)?;
            Ok(Some(true))
        }
        Msr::SYSENTER_ESP | Msr::SYSENTER_EIP => Ok(Some(false)),
        _ => Ok(None),
    }
}

/// The value of an MSR that the VMCS holds; `None` for the others.
fn store_vmcs_msr(msr: Msr, vmcs: &impl VmcsRead) -> Result<Option<u64>, AccessError> {
    Ok(Some(match msr {
        Msr::EFER => vmcs.get(fields::GUEST_EFER)?,
        Msr::PAT => vmcs.get(fields::GUEST_PAT)?,
        Msr::FS_BASE => vmcs.get(fields::GUEST_FS_BASE)?,
        Msr::GS_BASE => vmcs.get(fields::GUEST_GS_BASE)?,
        Msr::SYSENTER_CS => vmcs.get(fields::GUEST_SYSENTER_CS)?.into(),
        Msr::SYSENTER_ESP => vmcs.get(fields::GUEST_SYSENTER_ESP)?,
        Msr::SYSENTER_EIP => vmcs.get(fields::GUEST_SYSENTER_EIP)?,
        _ => return Ok(None),
    }))
}
