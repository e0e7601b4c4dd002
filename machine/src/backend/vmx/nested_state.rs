//! Nested state as a whole: saved and restored as bytes, and lost when VMX operation ends.

use alloc::vec::Vec;

use testudo_arch::GuestMemory;
use testudo_nested::vmx::{RestoreError, SavedVmx, SecondStage};
use testudo_vmx::controls::SecondaryControls;
use testudo_vmx::encoding::Area;
use testudo_vmx::fields::FIELDS;
use testudo_vmx::{AccessError, fields};

use super::nested::{SHADOWING, layer};
use super::processor::Level;
use super::{Processor, VmxVcpu};
use crate::vcpu::{NestedStateError, VcpuError};

impl<P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'_, P, M, S> {
    /// The nested state as bytes.
    pub(super) fn nested_bytes(&mut self) -> Result<Option<Vec<u8>>, VcpuError> {
        // What is known of whoever runs goes to its VMCS, from which the layer takes it. On shadow paging
        // too L2's has its own registers between its turns, and of L1's the layer takes none.
        let due = self.injection;
        self.prepare()?;
        let Some(nested) = &mut self.nested else {
            return Ok(None);
        };
        let saved = layer!(self, nested, save())?;
        self.select(self.level)?;
        // It is still to be delivered.
        if let Some(event) = due {
            self.injection = Some(event);
            self.cache.add_work();
        }
        Ok(Some(saved.to_bytes()))
    }

    /// Begins anew with this nested state: neither the guest state in L2's VMCS nor what was composed
    /// comes from anywhere else.
    pub(super) fn take_nested(&mut self, bytes: &[u8]) -> Result<bool, NestedStateError> {
        if self.nested.is_none() {
            return Err(NestedStateError::Unsupported);
        }
        let saved = SavedVmx::from_bytes(bytes).map_err(RestoreError::from)?;
        self.prepare()?;
        self.leave_vmx_operation();
        // Whether L2 can run also depends on L1's own registers.
        self.take_off_l1_shadow()?;
        self.select(Level::L2)?;
        for info in FIELDS {
            let field = info.encoding;
            if field.area() == Area::Guest && info.exists(self.caps) {
                let write = self.processor.write_raw(field, 0);
                write
                    .map_err(|fail| AccessError::Write {
                        field,
                        value: 0,
                        fail,
                    })
                    .map_err(VcpuError::from)?;
            }
        }
        let Some(nested) = &mut self.nested else {
            return Err(NestedStateError::Unsupported);
        };
        nested.stage.flush(None);
        layer!(self, nested, restore(&saved))?;
        let is_guest = nested.state.is_guest();
        self.follow_shadowing()?;
        self.level = if is_guest { Level::L2 } else { Level::L1 };
        self.select(self.level)?;
        if !is_guest {
            self.l1_goes_on()?;
        }
        self.registers.gprs.rsp = self
            .processor
            .get(fields::GUEST_RSP)
            .map_err(VcpuError::from)?;
        self.rsp_agreed = self.registers.gprs.rsp;
        Ok(is_guest)
    }

    /// While L1 has a current VMCS, its VMREAD and VMWRITE reach the shadow. Without one the control is
    /// off: VMX instructions outside VMX operation must exit, to raise #UD.
    pub(super) fn follow_shadowing(&mut self) -> Result<(), VcpuError> {
        let Some(nested) = &mut self.nested else {
            return Ok(());
        };
        let wanted = nested.state.current_vmcs().is_some();
        let shadow = match nested.shadow {
            Some(shadow) if wanted != nested.shadowing => shadow,
            _ => return Ok(()),
        };
        nested.shadowing = wanted;
        self.select(Level::L1)?;
        let secondary = self.processor.get(fields::SECONDARY_CONTROLS)?;
        let mut secondary = SecondaryControls::from_bits_retain(secondary);
        secondary.set(SHADOWING, wanted);
        self.processor
            .set(fields::SECONDARY_CONTROLS, secondary.bits())?;
        let link = if wanted { shadow.0 } else { u64::MAX };
        self.processor.set(fields::VMCS_LINK_POINTER, link)?;
        Ok(())
    }

    /// RESET and INIT end VMX operation.
    pub(super) fn leave_vmx_operation(&mut self) {
        let Some(nested) = &mut self.nested else {
            return;
        };
        nested.state.reset();
        nested.delivery_due = false;
        nested.interrupted = false;
        nested.init_waits = false;
        self.level = Level::L1;
        self.cache.forget();
        if let Err(error) = self
            .select(Level::L1)
            .and_then(|()| self.follow_shadowing())
            .and_then(|()| self.put_on_l1_shadow())
        {
            self.remember(error);
        }
    }
}
