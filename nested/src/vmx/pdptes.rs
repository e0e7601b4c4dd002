//! The four page-directory pointers of PAE paging, which entries and exits read from L1's memory
//! (SDM vol. 3A, 4.4.1; vol. 3C, 29.3.1.6 and 30.5.4).

use testudo_arch::{Gpa, GuestMemory};
use testudo_vmx::caps::Processor;
use testudo_vmx::{AccessError, Field, VmcsWrite, fields};

const FIELDS: [Field<u64>; 4] = [
    fields::GUEST_PDPTE0,
    fields::GUEST_PDPTE1,
    fields::GUEST_PDPTE2,
    fields::GUEST_PDPTE3,
];

/// Bits 2:1 and 8:5, which a present entry does not have.
const RESERVED: u64 = 0x1E6;

/// What an entry of L2 does about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pdptes {
    /// L2 is not in PAE paging.
    Unused,
    /// They are loaded.
    Loaded([u64; 4]),
}

/// The entries that CR3 points to, read once; `None` if one that is present has a reserved bit. What
/// is not memory reads as ones, which are reserved.
pub(super) fn read(memory: &impl GuestMemory, cr3: u64, processor: &Processor) -> Option<[u64; 4]> {
    let mut bytes = [0xFF; 32];
    if memory.read(Gpa(cr3 & 0xFFFF_FFE0), &mut bytes).is_err() {
        return None;
    }
    let mut entries = [0; 4];
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*bytes);
        let present = *entry & 1 != 0;
        if present && (*entry & RESERVED != 0 || processor.exceeds_physical(*entry & !0xFFF)) {
            return None;
        }
    }
    Some(entries)
}

/// Writes them where a processor that uses EPT looks for them.
pub(super) fn write(entries: &[u64; 4], vmcs: &mut impl VmcsWrite) -> Result<(), AccessError> {
    for (field, &entry) in FIELDS.into_iter().zip(entries) {
        vmcs.set(field, entry)?;
    }
    Ok(())
}
