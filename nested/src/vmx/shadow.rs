//! VMCS shadowing: L1's most frequent VMREADs and VMWRITEs without an exit, where the processor
//! offers it (SDM vol. 3C, 27.10 and 33.3, VMREAD and VMWRITE).
//!
//! The processor's own shadow VMCS, which the link pointer of `vmcs01` names, holds the fields below
//! while L1 runs; L0's copy holds all others. The two meet when L1 enters L2, when L2 exits to L1, and
//! when another VMCS becomes current.

use testudo_vmx::bitmap::FieldBitmap;
use testudo_vmx::{AccessError, fields as f};

use super::guest_fields::{Slot, slots};
use super::{Context, NestedVmx, VmcsPair, guest_fields};

/// What L1 reads at nearly every exit and can not write.
const READ_ONLY: [Slot; 10] = slots([
    f::EXIT_REASON.encoding(),
    f::EXIT_QUALIFICATION.encoding(),
    f::EXIT_INTERRUPTION_INFORMATION.encoding(),
    f::EXIT_INTERRUPTION_ERROR_CODE.encoding(),
    f::IDT_VECTORING_INFORMATION.encoding(),
    f::IDT_VECTORING_ERROR_CODE.encoding(),
    f::EXIT_INSTRUCTION_LENGTH.encoding(),
    f::EXIT_INSTRUCTION_INFORMATION.encoding(),
    f::GUEST_LINEAR_ADDRESS.encoding(),
    f::GUEST_PHYSICAL_ADDRESS.encoding(),
]);

/// What L1 reads and writes at many exits. None of them is one of the seldom-used guest fields, whose
/// changes L0 must notice.
const READ_WRITE: [Slot; 24] = slots([
    f::GUEST_RIP.encoding(),
    f::GUEST_RSP.encoding(),
    f::GUEST_RFLAGS.encoding(),
    f::GUEST_INTERRUPTIBILITY.encoding(),
    f::GUEST_CR0.encoding(),
    f::GUEST_CR3.encoding(),
    f::GUEST_CR4.encoding(),
    f::GUEST_CS_BASE.encoding(),
    f::GUEST_CS_ACCESS_RIGHTS.encoding(),
    f::GUEST_SS_ACCESS_RIGHTS.encoding(),
    f::CR0_READ_SHADOW.encoding(),
    f::CR4_READ_SHADOW.encoding(),
    f::PRIMARY_CONTROLS.encoding(),
    f::EXCEPTION_BITMAP.encoding(),
    f::ENTRY_INTERRUPTION_INFORMATION.encoding(),
    f::ENTRY_EXCEPTION_ERROR_CODE.encoding(),
    f::ENTRY_INSTRUCTION_LENGTH.encoding(),
    f::CR0_GUEST_HOST_MASK.encoding(),
    f::PREEMPTION_TIMER_VALUE.encoding(),
    // What a hypervisor that runs its guests in threads changes with the thread.
    f::HOST_FS_SELECTOR.encoding(),
    f::HOST_GS_SELECTOR.encoding(),
    f::HOST_FS_BASE.encoding(),
    f::HOST_GS_BASE.encoding(),
    f::HOST_RSP.encoding(),
]);

/// The bitmaps for VMREAD and VMWRITE of L1: what exits all the same.
pub fn shadow_bitmaps() -> (FieldBitmap, FieldBitmap) {
    let (mut reads, mut writes) = (FieldBitmap::all_exit(), FieldBitmap::all_exit());
    for field in READ_ONLY.map(|slot| slot.field) {
        reads.pass_through(field);
    }
    for field in READ_WRITE.map(|slot| slot.field) {
        reads.pass_through(field);
        writes.pass_through(field);
    }
    (reads, writes)
}

impl NestedVmx {
    /// What L1 wrote into the shadow, into the copy: before the copy is used.
    #[inline]
    pub(super) fn take_from_shadow<P: VmcsPair, M, S, R>(
        &mut self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if self.current.is_some()
            && let Some(shadow) = cx.vmcs.shadow()
        {
            guest_fields::pull(&shadow, &mut self.vmcs12.image, &READ_WRITE)?;
        }
        Ok(())
    }

    /// The copy into the shadow: after the copy changed, and before L1 runs.
    #[inline]
    pub(super) fn give_to_shadow<P: VmcsPair, M, S, R>(
        &self,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<(), AccessError> {
        if self.current.is_some()
            && let Some(mut shadow) = cx.vmcs.shadow()
        {
            guest_fields::push(&self.vmcs12.image, &mut shadow, &READ_WRITE)?;
            guest_fields::push(&self.vmcs12.image, &mut shadow, &READ_ONLY)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_shadowed_field_changes_unnoticed() {
        for field in READ_WRITE.map(|slot| slot.field) {
            assert!(!guest_fields::is_rare(field), "{field}");
        }
        let (reads, writes) = shadow_bitmaps();
        for field in READ_ONLY.map(|slot| slot.field) {
            let encoding = u64::from(field.0);
            assert!(!reads.exits(encoding) && writes.exits(encoding), "{field}");
        }
        let rip = u64::from(f::GUEST_RIP.encoding().0);
        assert!(!reads.exits(rip) && !writes.exits(rip));
        let ds = u64::from(f::GUEST_DS_BASE.encoding().0);
        assert!(reads.exits(ds) && writes.exits(ds));
    }
}
