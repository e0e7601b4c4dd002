//! Registers of L2's that are L1's to govern: control registers, and the clock.

use testudo_arch::GuestMemory;
use testudo_nested::vmx::{ControlRegisters, SecondStage};
use testudo_vmx::{AccessError, fields};

use super::mode::Mode;
use super::processor::{Level, Pair};
use super::{Processor, VmxVcpu};
use crate::vcpu::VcpuError;

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// CR0, CR4 and EFER of L2.
    pub(super) fn l2_mode(&self) -> Result<Mode, AccessError> {
        let Some(nested) = &self.nested else {
            return Ok(self.mode);
        };
        let ControlRegisters { cr0, cr4, efer } =
            nested.state.l2_control_registers(&self.processor)?;
        Ok(Mode { cr0, cr4, efer })
    }

    /// Sets them.
    pub(super) fn set_l2_mode(&mut self, mode: Mode) -> Result<(), VcpuError> {
        if let Some(nested) = &mut self.nested {
            let Mode { cr0, cr4, efer } = mode;
            let registers = ControlRegisters { cr0, cr4, efer };
            nested
                .state
                .set_l2_control_registers(&registers, &mut self.processor)?;
        }
        Ok(())
    }

    /// What a move of `value` to CR0 or CR4 makes of it: bits that L1 owns L2 cannot change.
    pub(super) fn moved_value(
        &self,
        register: u8,
        value: u64,
        old: &Mode,
    ) -> Result<u64, AccessError> {
        match &self.nested {
            Some(nested) if self.level == Level::L2 => {
                if register == 0 {
                    nested.state.l2_cr0_after(value, old.cr0)
                } else {
                    nested.state.l2_cr4_after(value, old.cr4)
                }
            }
            _ => Ok(value),
        }
    }

    /// Whether VMX operation, if the guest is in it, lets it have these registers.
    pub(super) fn vmx_allows(&self, mode: &Mode) -> bool {
        let nested = self.nested.as_ref();
        nested.is_none_or(|nested| nested.state.allows(mode.cr0, mode.cr4))
    }

    /// L1's clock was moved, and L2's moves with it.
    pub(super) fn move_both_clocks(&mut self) -> Result<(), VcpuError> {
        self.select(Level::L1)?;
        self.processor.set(fields::TSC_OFFSET, self.tsc_offset)?;
        if let Some(nested) = &mut self.nested {
            nested.state.refresh_clock(&mut Pair(&mut self.processor))?;
        }
        self.select(Level::L2)
    }
}
