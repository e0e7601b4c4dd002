//! The checks of a VM entry that read memory.

use testudo_arch::{Gpa, GuestMemory};

use super::guest::{is_valid_pdpte, uses_pae_paging};
use super::msr::{Established, value_is_refused};
use super::{CR0_PG, Checker, EFER_LME, EntryContext, Rule, Violation, Violations};
use crate::caps::VmxCaps;
use crate::controls::{EntryControls, PrimaryControls, SecondaryControls};
use crate::encoding::Encoding;
use crate::error::AccessError;
use crate::fields;
use crate::structures::MsrEntry;
use crate::vmcs::VmcsRead;

/// How many entries of an MSR area are looked at. More than a processor recommends, and a bound on
/// the work that a guest hypervisor can cause.
const MAX_ENTRIES: u64 = 4096;

/// The offset of the TPR in the virtual-APIC page.
const VTPR: u64 = 0x80;

/// Checks what a VM entry checks in memory: the TPR against its threshold, the region of the VMCS
/// link pointer, the PDPTEs of a guest without EPT, and names and values in the VM-entry MSR-load area.
///
/// `memory` is the memory of whoever wrote the VMCS: a guest hypervisor's, or this machine's. What
/// cannot be read reads as all ones, as a bus without a device does. Whether a model-specific register
/// takes its value only writing it can tell; of the architectural ones the manual says it.
///
/// Addresses that [`check_entry`](super::check_entry) rejects are not followed.
///
/// # Errors
///
/// A VMREAD failed of a field that a processor with these capabilities has.
pub fn check_memory(
    vmcs: &impl VmcsRead,
    caps: &VmxCaps,
    context: &EntryContext,
    memory: &impl GuestMemory,
) -> Result<Violations, AccessError> {
    let mut c = Checker::new(vmcs, caps, context)?;
    c.words.primary &= caps.primary.may_be_one();
    if c.words
        .primary
        .contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
    {
        let bits = c.get(fields::SECONDARY_CONTROLS)?;
        c.words.secondary = SecondaryControls::from_bits_retain(bits) & caps.secondary.may_be_one();
    }
    task_priority(&mut c, memory)?;
    link_region(&mut c, memory)?;
    pdptes(&mut c, memory)?;
    msr_area(&mut c, memory)?;
    Ok(c.found)
}

fn read<const N: usize>(memory: &impl GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0xFF; N];
    if memory.read(Gpa(address), &mut bytes).is_err() {
        bytes = [0xFF; N];
    }
    bytes
}

fn task_priority<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    memory: &impl GuestMemory,
) -> Result<(), AccessError> {
    let excluded =
        SecondaryControls::VIRTUALIZE_APIC_ACCESSES | SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    if !c.words.primary.contains(PrimaryControls::USE_TPR_SHADOW)
        || c.words.secondary.intersects(excluded)
    {
        return Ok(());
    }
    let page = c.get(fields::VIRTUAL_APIC_ADDRESS)?;
    if page & 0xFFF != 0 || c.exceeds_physical(page) {
        return Ok(());
    }
    let [tpr] = read(memory, page + VTPR);
    let threshold = c.get(fields::TPR_THRESHOLD)?;
    let ok = threshold & 0xF <= u32::from(tpr >> 4);
    let field = fields::TPR_THRESHOLD;
    c.require(ok, Rule::TprThresholdAboveVtpr, field, threshold.into());
    Ok(())
}

fn link_region<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    memory: &impl GuestMemory,
) -> Result<(), AccessError> {
    let link = c.get(fields::VMCS_LINK_POINTER)?;
    if link == u64::MAX || link & 0xFFF != 0 || c.exceeds_physical(link) {
        return Ok(());
    }
    let word = u32::from_le_bytes(read(memory, link));
    let shadow = c
        .words
        .secondary
        .contains(SecondaryControls::VMCS_SHADOWING);
    let expected = c.caps.basic.revision() | u32::from(shadow) << 31;
    let field = fields::VMCS_LINK_POINTER;
    c.require(word == expected, Rule::LinkPointerRegion, field, link);
    Ok(())
}

fn pdptes<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    memory: &impl GuestMemory,
) -> Result<(), AccessError> {
    if c.words.secondary.contains(SecondaryControls::ENABLE_EPT) || !uses_pae_paging(c)? {
        return Ok(());
    }
    let cr3 = c.get(fields::GUEST_CR3)?;
    let table = cr3 & 0xFFFF_FFE0;
    for index in 0..4 {
        let entry = u64::from_le_bytes(read(memory, table + 8 * index));
        c.require(
            is_valid_pdpte(c, entry),
            Rule::PdpteReserved,
            fields::GUEST_CR3,
            cr3,
        );
    }
    Ok(())
}

fn msr_area<V: VmcsRead>(
    c: &mut Checker<'_, V>,
    memory: &impl GuestMemory,
) -> Result<(), AccessError> {
    let count = u64::from(c.get(fields::ENTRY_MSR_LOAD_COUNT)?);
    let start = c.get(fields::ENTRY_MSR_LOAD_ADDRESS)?;
    if start & 0xF != 0 {
        return Ok(());
    }
    if count == 0 {
        return Ok(());
    }
    let long = c.long_mode_guest();
    // "The IA32_EFER.LME ... are loaded from" the control, unless IA32_EFER is (29.3.2.1).
    let long_mode_enable = if c.words.entry.contains(EntryControls::LOAD_EFER) {
        c.get(fields::GUEST_EFER)? & EFER_LME != 0
    } else {
        long
    };
    let established = Established {
        paging: c.get(fields::GUEST_CR0)? & CR0_PG != 0,
        long_mode_enable,
    };
    for index in 0..count.min(MAX_ENTRIES) {
        let Some(address) = start.checked_add(16 * index) else {
            break;
        };
        if c.exceeds_physical(address | 0xF) {
            break;
        }
        let entry = MsrEntry::from_bytes(read(memory, address));
        let name = entry.load_on_entry_is_refused();
        c.found.apply(Rule::MsrLoadRefused);
        let value = !name && value_is_refused(entry.msr(), entry.value(), c.caps, established);
        if !name {
            c.found.apply(Rule::MsrValueRefused);
        }
        if name || value {
            c.found.push(Violation {
                rule: if name {
                    Rule::MsrLoadRefused
                } else {
                    Rule::MsrValueRefused
                },
                field: Encoding::from(fields::ENTRY_MSR_LOAD_ADDRESS),
                value: address,
                entry: index as u32 + 1,
            });
            break;
        }
    }
    Ok(())
}
