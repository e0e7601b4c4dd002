//! CR0, CR4 and EFER of L2, of which L0 owns bits that L1 leaves to L2; and what VMX operation
//! demands of L1's.

use testudo_arch::EferFlags;
use testudo_vmx::controls::{EntryControls, SecondaryControls};
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::{Flush, NestedVmx, visible};

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
/// PE and PG, which an unrestricted guest may clear.
const PE_PG: u64 = 1 | 1 << 31;

/// The registers that decide how whoever runs executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
}

impl NestedVmx {
    /// L2's control registers: those that it runs by, whatever its read shadows show. It is what an
    /// exit would save.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn l2_control_registers(
        &self,
        vmcs02: &impl VmcsRead,
    ) -> Result<ControlRegisters, AccessError> {
        // Bits that L1 owns L2 cannot change; bits that only L0 owns are in the read shadow; the rest
        // is in the register.
        let image = &*self.vmcs12.image;
        let (mask0, mask4, loads_efer) = self.joined.map_or((0, 0, false), |j| {
            let efer = j.entry.contains(EntryControls::LOAD_EFER);
            (j.cr0_mask, j.cr4_mask, efer)
        });
        let mask12 = image.get(fields::CR0_GUEST_HOST_MASK)?;
        let seen = visible(
            vmcs02.get(fields::GUEST_CR0)?,
            mask0,
            vmcs02.get(fields::CR0_READ_SHADOW)?,
        );
        let cr0 = visible(seen, mask12, image.get(fields::GUEST_CR0)?);
        let mask12 = image.get(fields::CR4_GUEST_HOST_MASK)?;
        let seen = visible(
            vmcs02.get(fields::GUEST_CR4)?,
            mask4,
            vmcs02.get(fields::CR4_READ_SHADOW)?,
        );
        let cr4 = visible(seen, mask12, image.get(fields::GUEST_CR4)?);
        let efer = if loads_efer {
            vmcs02.get(fields::GUEST_EFER)?
        } else {
            0
        };
        Ok(ControlRegisters { cr0, cr4, efer })
    }

    /// What L1 has in its control registers right after an exit or a failed entry, as it sees them itself: what
    /// the backend knew of them before is over.
    #[inline]
    pub fn l1_control_registers(&self) -> &ControlRegisters {
        &self.l1_sees
    }

    /// What becomes of CR0 when L2 moves `value` to it and L1 did not want to see that: the bits that
    /// L1 owns stay (SDM vol. 3C, 28.3).
    ///
    /// # Errors
    ///
    /// Never: L0's copy of L1's VMCS has every field.
    pub fn l2_cr0_after(&self, value: u64, now: u64) -> Result<u64, AccessError> {
        let mask12 = self.vmcs12.image.get(fields::CR0_GUEST_HOST_MASK)?;
        Ok(visible(value, mask12, now))
    }

    /// As [`Self::l2_cr0_after`], for CR4.
    ///
    /// # Errors
    ///
    /// Never: L0's copy of L1's VMCS has every field.
    pub fn l2_cr4_after(&self, value: u64, now: u64) -> Result<u64, AccessError> {
        let mask12 = self.vmcs12.image.get(fields::CR4_GUEST_HOST_MASK)?;
        Ok(visible(value, mask12, now))
    }

    /// Whether VMX operation lets whoever runs have these values of CR0 and CR4 (SDM vol. 3C, 26.8 and
    /// 28.3); if not, the instruction that would load them raises #GP(0).
    pub fn allows(&self, cr0: u64, cr4: u64) -> bool {
        if self.vmxon.is_none() {
            return true;
        }
        let unrestricted = SecondaryControls::UNRESTRICTED_GUEST;
        let exempt = self.is_guest
            && self
                .joined
                .is_some_and(|j| j.secondary.contains(unrestricted));
        let except = if exempt { PE_PG } else { 0 };
        self.caps.cr0.violations(cr0, except) == 0 && self.caps.cr4.violations(cr4, 0) == 0
    }

    /// Sets L2's control registers, as an instruction of L2's that L0 executes for it.
    ///
    /// # Errors
    ///
    /// L0's own access to a VMCS failed.
    pub fn set_l2_control_registers(
        &mut self,
        registers: &ControlRegisters,
        vmcs02: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        let Some(joined) = &mut self.joined else {
            return Ok(());
        };
        let image = &*self.vmcs12.image;
        let &ControlRegisters { cr0, cr4, efer } = registers;
        let unrestricted = SecondaryControls::UNRESTRICTED_GUEST;
        let except = if joined.secondary.contains(unrestricted) {
            PE_PG
        } else {
            0
        };
        joined.cr0_shadow = visible(
            cr0,
            image.get(fields::CR0_GUEST_HOST_MASK)?,
            image.get(fields::CR0_READ_SHADOW)?,
        );
        joined.cr4_shadow = visible(
            cr4,
            image.get(fields::CR4_GUEST_HOST_MASK)?,
            image.get(fields::CR4_READ_SHADOW)?,
        );
        joined
            .entry
            .set(EntryControls::IA32E_MODE_GUEST, efer & LMA != 0);
        vmcs02.set(
            fields::GUEST_CR0,
            (self.cr0.apply(cr0) & !except) | (cr0 & except),
        )?;
        vmcs02.set(fields::CR0_READ_SHADOW, joined.cr0_shadow)?;
        vmcs02.set(fields::GUEST_CR4, self.cr4.apply(cr4))?;
        vmcs02.set(fields::CR4_READ_SHADOW, joined.cr4_shadow)?;
        vmcs02.set(fields::ENTRY_CONTROLS, joined.entry.bits())?;
        if joined.entry.contains(EntryControls::LOAD_EFER) {
            vmcs02.set(fields::GUEST_EFER, efer)?;
        }
        // L1's VMCS gets them at the next exit.
        if let Some(settled) = &mut self.settled {
            settled.last_exit.mode = None;
        }
        // Which changes drop translations (SDM vol. 3A, 4.10.4.1) is not worth a distinction here.
        self.flush |= Flush::VPID;
        Ok(())
    }
}
