//! Moving the guest past an instruction that exited.

use crate::controls::{Interruptibility, PendingDebug};
use crate::error::AccessError;
use crate::fields;
use crate::vmcs::{VmcsRead, VmcsWrite};

const RFLAGS_TF: u64 = 1 << 8;
const DEBUGCTL_BTF: u64 = 1 << 1;

/// Adds the length of the instruction to RIP: two VMREADs, one VMWRITE.
///
/// That is all most exits need, but not all that completing an instruction does: see
/// [`complete_instruction`].
///
/// # Errors
///
/// An access to the VMCS failed.
#[inline]
pub fn advance(vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
    let length = vmcs.get(fields::EXIT_INSTRUCTION_LENGTH)?;
    let rip = vmcs.get(fields::GUEST_RIP)?;
    let next = rip.wrapping_add(u64::from(length));
    // Outside 64-bit mode the instruction pointer has 32 bits. It can only have left them if bit 32
    // changed, which is worth a look at the code segment.
    let next = if (rip ^ next) & (1 << 32) != 0 {
        wrapped(vmcs, next)?
    } else {
        next
    };
    vmcs.set(fields::GUEST_RIP, next)
}

#[cold]
fn wrapped(vmcs: &impl VmcsRead, next: u64) -> Result<u64, AccessError> {
    const LONG: u32 = 1 << 13;
    let is_64_bit = vmcs.get(fields::GUEST_CS_ACCESS_RIGHTS)? & LONG != 0;
    Ok(if is_64_bit { next } else { next & 0xFFFF_FFFF })
}

/// Completes the instruction as the processor would have: advances RIP, ends blocking by STI and
/// MOV SS, and, when the guest single-steps, leaves its #DB pending.
///
/// Four VMREADs and one VMWRITE when nothing of that was the case.
///
/// # Errors
///
/// An access to the VMCS failed.
#[inline]
pub fn complete_instruction(vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
    advance(vmcs)?;
    let shadow = Interruptibility::BLOCKING_BY_STI | Interruptibility::BLOCKING_BY_MOV_SS;
    let state = Interruptibility::from_bits_retain(vmcs.get(fields::GUEST_INTERRUPTIBILITY)?);
    if state.intersects(shadow) {
        vmcs.set(fields::GUEST_INTERRUPTIBILITY, (state - shadow).bits())?;
    }
    if vmcs.get(fields::GUEST_RFLAGS)? & RFLAGS_TF != 0 {
        single_step(vmcs)?;
    }
    Ok(())
}

#[cold]
fn single_step(vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
    // With BTF the trap comes after branches only, and no instruction that exits is one.
    if vmcs.get(fields::GUEST_DEBUGCTL)? & DEBUGCTL_BTF != 0 {
        return Ok(());
    }
    let pending = vmcs.get(fields::GUEST_PENDING_DEBUG)?;
    vmcs.set(
        fields::GUEST_PENDING_DEBUG,
        pending | PendingDebug::BS.bits(),
    )
}
