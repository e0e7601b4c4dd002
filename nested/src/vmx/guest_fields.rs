//! The guest-state fields that go between L1's VMCS and `vmcs02`, and which of them seldom change.

use testudo_vmx::encoding::Encoding;
use testudo_vmx::fields as f;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmFail, VmcsRead, VmcsWrite};

/// Guest fields that hypervisors read or write at nearly every exit. CR0, CR4, the activity state and
/// the fields that controls govern are not here: they have rules of their own.
pub(super) const FREQUENT: [Encoding; 7] = [
    f::GUEST_RIP.encoding(),
    f::GUEST_RSP.encoding(),
    f::GUEST_RFLAGS.encoding(),
    f::GUEST_INTERRUPTIBILITY.encoding(),
    f::GUEST_CR3.encoding(),
    f::GUEST_CS_ACCESS_RIGHTS.encoding(),
    f::GUEST_SS_ACCESS_RIGHTS.encoding(),
];

/// Guest fields that change with a task or never.
pub(super) const RARE: [Encoding; 38] = [
    f::GUEST_ES_SELECTOR.encoding(),
    f::GUEST_CS_SELECTOR.encoding(),
    f::GUEST_SS_SELECTOR.encoding(),
    f::GUEST_DS_SELECTOR.encoding(),
    f::GUEST_FS_SELECTOR.encoding(),
    f::GUEST_GS_SELECTOR.encoding(),
    f::GUEST_LDTR_SELECTOR.encoding(),
    f::GUEST_TR_SELECTOR.encoding(),
    f::GUEST_ES_LIMIT.encoding(),
    f::GUEST_CS_LIMIT.encoding(),
    f::GUEST_SS_LIMIT.encoding(),
    f::GUEST_DS_LIMIT.encoding(),
    f::GUEST_FS_LIMIT.encoding(),
    f::GUEST_GS_LIMIT.encoding(),
    f::GUEST_LDTR_LIMIT.encoding(),
    f::GUEST_TR_LIMIT.encoding(),
    f::GUEST_GDTR_LIMIT.encoding(),
    f::GUEST_IDTR_LIMIT.encoding(),
    f::GUEST_ES_ACCESS_RIGHTS.encoding(),
    f::GUEST_DS_ACCESS_RIGHTS.encoding(),
    f::GUEST_FS_ACCESS_RIGHTS.encoding(),
    f::GUEST_GS_ACCESS_RIGHTS.encoding(),
    f::GUEST_LDTR_ACCESS_RIGHTS.encoding(),
    f::GUEST_TR_ACCESS_RIGHTS.encoding(),
    f::GUEST_SYSENTER_CS.encoding(),
    f::GUEST_ES_BASE.encoding(),
    f::GUEST_CS_BASE.encoding(),
    f::GUEST_SS_BASE.encoding(),
    f::GUEST_DS_BASE.encoding(),
    f::GUEST_FS_BASE.encoding(),
    f::GUEST_GS_BASE.encoding(),
    f::GUEST_LDTR_BASE.encoding(),
    f::GUEST_TR_BASE.encoding(),
    f::GUEST_GDTR_BASE.encoding(),
    f::GUEST_IDTR_BASE.encoding(),
    f::GUEST_PENDING_DEBUG.encoding(),
    f::GUEST_SYSENTER_ESP.encoding(),
    f::GUEST_SYSENTER_EIP.encoding(),
];

/// PDPTEs, with EPT only.
pub(super) const PDPTES: [Encoding; 4] = [
    f::GUEST_PDPTE0.encoding(),
    f::GUEST_PDPTE1.encoding(),
    f::GUEST_PDPTE2.encoding(),
    f::GUEST_PDPTE3.encoding(),
];

/// Exit information, all of which an exit to L1 copies.
pub(super) const EXIT_INFORMATION: [Encoding; 9] = [
    f::EXIT_REASON.encoding(),
    f::EXIT_QUALIFICATION.encoding(),
    f::EXIT_INTERRUPTION_INFORMATION.encoding(),
    f::EXIT_INTERRUPTION_ERROR_CODE.encoding(),
    f::IDT_VECTORING_INFORMATION.encoding(),
    f::IDT_VECTORING_ERROR_CODE.encoding(),
    f::EXIT_INSTRUCTION_LENGTH.encoding(),
    f::EXIT_INSTRUCTION_INFORMATION.encoding(),
    f::GUEST_LINEAR_ADDRESS.encoding(),
];

/// Whether a field is one of those that seldom change.
pub(super) fn is_rare(field: Encoding) -> bool {
    RARE.contains(&field.full())
}

fn read_failed(field: Encoding) -> impl Fn(VmFail) -> AccessError {
    move |fail| AccessError::Read { field, fail }
}

fn write_failed(field: Encoding, value: u64) -> impl Fn(VmFail) -> AccessError {
    move |fail| AccessError::Write { field, value, fail }
}

/// From L1's VMCS to `vmcs02`.
#[inline]
pub(super) fn push(
    image: &VmcsImage,
    vmcs: &mut impl VmcsWrite,
    list: &[Encoding],
) -> Result<(), AccessError> {
    for &field in list {
        let value = image.read_raw(field).map_err(read_failed(field))?;
        vmcs.write_raw(field, value)
            .map_err(write_failed(field, value))?;
    }
    Ok(())
}

/// From `vmcs02` to L1's VMCS.
#[inline]
pub(super) fn pull(
    vmcs: &impl VmcsRead,
    image: &mut VmcsImage,
    list: &[Encoding],
) -> Result<(), AccessError> {
    for &field in list {
        let value = vmcs.read_raw(field).map_err(read_failed(field))?;
        set(image, field, value)?;
    }
    Ok(())
}

/// Sets any field of L1's VMCS, exit information too.
#[inline]
pub(super) fn set(image: &mut VmcsImage, field: Encoding, value: u64) -> Result<(), AccessError> {
    image
        .write_raw(field, value)
        .map_err(write_failed(field, value))
}
