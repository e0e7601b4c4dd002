//! The guest-state fields that go between L1's VMCS and `vmcs02`, and which of them seldom change.

use testudo_vmx::encoding::{Encoding, FieldWidth};
use testudo_vmx::fields as f;
use testudo_vmx::image::{IMAGE_SIZE, VmcsImage, offset_of};
use testudo_vmx::{AccessError, VmFail, VmcsRead, VmcsWrite};

/// A field with its place in L1's VMCS, found at compile time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// The bits that its width has.
    mask: u64,
    pub(super) field: Encoding,
    offset: u16,
    width: FieldWidth,
}

/// The slot of a field; at compile time, so that one that is not in the table cannot be named.
pub(super) const fn slot(field: Encoding) -> Slot {
    let Some(offset) = offset_of(field) else {
        panic!("not in the table of fields");
    };
    assert!(offset + 8 <= IMAGE_SIZE, "eight bytes are read");
    Slot {
        mask: field.width().mask(),
        field,
        offset: offset as u16,
        width: field.width(),
    }
}

pub(super) const fn slots<const N: usize>(list: [Encoding; N]) -> [Slot; N] {
    let mut slots = [slot(list[0]); N];
    let mut i = 1;
    while i < N {
        slots[i] = slot(list[i]);
        i += 1;
    }
    slots
}

impl Slot {
    #[inline(always)]
    pub(super) fn load(&self, image: &VmcsImage) -> u64 {
        let offset = usize::from(self.offset);
        let mut value = [0; 8];
        value.copy_from_slice(&image.as_bytes()[offset..offset + 8]);
        u64::from_le_bytes(value) & self.mask
    }

    /// Stores a value; whether it differs from the one that was there.
    #[inline(always)]
    pub(super) fn update(&self, image: &mut VmcsImage, value: u64) -> bool {
        let (old, value) = (self.load(image), value & self.mask);
        let differs = match self.width {
            FieldWidth::Bits16 => old as u16 != value as u16,
            FieldWidth::Bits32 => old as u32 != value as u32,
            FieldWidth::Bits64 | FieldWidth::Natural => old != value,
        };
        if differs {
            self.store(image, value);
        }
        differs
    }

    #[inline(always)]
    pub(super) fn store(&self, image: &mut VmcsImage, value: u64) {
        let (at, value) = (
            &mut image.as_mut_bytes()[usize::from(self.offset)..],
            value.to_le_bytes(),
        );
        match self.width {
            FieldWidth::Bits16 => at[..2].copy_from_slice(&value[..2]),
            FieldWidth::Bits32 => at[..4].copy_from_slice(&value[..4]),
            FieldWidth::Bits64 | FieldWidth::Natural => at[..8].copy_from_slice(&value),
        }
    }
}

/// Guest fields that hypervisors read or write at nearly every exit. CR0, CR4, the activity state and
/// the fields that controls govern are not here: they have rules of their own.
pub(super) const FREQUENT: [Slot; 8] = slots([
    f::GUEST_RIP.encoding(),
    f::GUEST_RSP.encoding(),
    f::GUEST_RFLAGS.encoding(),
    f::GUEST_INTERRUPTIBILITY.encoding(),
    f::GUEST_CR3.encoding(),
    f::GUEST_CS_BASE.encoding(),
    f::GUEST_CS_ACCESS_RIGHTS.encoding(),
    f::GUEST_SS_ACCESS_RIGHTS.encoding(),
]);

/// Guest fields that change with a task or never.
pub(super) const RARE: [Slot; 37] = slots([
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
]);

/// PDPTEs, with EPT only.
pub(super) const PDPTES: [Slot; 4] = slots([
    f::GUEST_PDPTE0.encoding(),
    f::GUEST_PDPTE1.encoding(),
    f::GUEST_PDPTE2.encoding(),
    f::GUEST_PDPTE3.encoding(),
]);

/// Whether a field is one of those that seldom change.
pub(super) fn is_rare(field: Encoding) -> bool {
    RARE.iter().any(|slot| slot.field == field.full())
}

/// Whether a field is a PDPTE.
pub(super) fn is_pdpte(field: Encoding) -> bool {
    PDPTES.iter().any(|slot| slot.field == field.full())
}

#[cold]
fn read_failed(field: Encoding, fail: VmFail) -> AccessError {
    AccessError::Read { field, fail }
}

#[cold]
fn write_failed(field: Encoding, value: u64, fail: VmFail) -> AccessError {
    AccessError::Write { field, value, fail }
}

/// A field of a VMCS.
#[inline(always)]
pub(super) fn read(vmcs: &impl VmcsRead, field: Encoding) -> Result<u64, AccessError> {
    match vmcs.read_raw(field) {
        Ok(value) => Ok(value),
        Err(fail) => Err(read_failed(field, fail)),
    }
}

/// From L1's VMCS to `vmcs02`.
#[inline]
pub(super) fn push(
    image: &VmcsImage,
    vmcs: &mut impl VmcsWrite,
    list: &[Slot],
) -> Result<(), AccessError> {
    for slot in list {
        push_slot(image, vmcs, slot)?;
    }
    Ok(())
}

/// One field of [`push`]. Where few change, a call for each would be most of the cost.
#[inline(always)]
pub(super) fn push_slot(
    image: &VmcsImage,
    vmcs: &mut impl VmcsWrite,
    slot: &Slot,
) -> Result<(), AccessError> {
    let value = slot.load(image);
    if let Err(fail) = vmcs.write_raw(slot.field, value) {
        return Err(write_failed(slot.field, value, fail));
    }
    Ok(())
}

/// From `vmcs02` to L1's VMCS.
#[inline]
pub(super) fn pull(
    vmcs: &impl VmcsRead,
    image: &mut VmcsImage,
    list: &[Slot],
) -> Result<(), AccessError> {
    for slot in list {
        slot.store(image, read(vmcs, slot.field)?);
    }
    Ok(())
}

/// Sets any field of L1's VMCS, exit information too.
#[inline]
pub(super) fn set(image: &mut VmcsImage, field: Encoding, value: u64) -> Result<(), AccessError> {
    image
        .write_raw(field, value)
        .map_err(|fail| write_failed(field, value, fail))
}
