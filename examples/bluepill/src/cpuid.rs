//! CPUID, which always exits on VT-x and could always on AMD-V.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use testudo_arch::Cr4Flags;
use testudo_rt as rt;

use crate::{Pill, signature};

/// The processor's answer, but for what depends on CR4, which is the hypervisor's at this moment, and for
/// the signature. What else depends on registers, on XCR0, IA32_XSS and the APIC's base, is the guest's own.
pub(crate) fn answer(pill: &Pill, leaf: u32, subleaf: u32, cr4: u64) -> [u32; 4] {
    if leaf == signature::LEAF {
        let own_bytes = pill.territory.own_bytes();
        return signature::answer(subleaf, rt::cpu::count(), own_bytes);
    }
    let CpuidResult {
        eax,
        ebx,
        mut ecx,
        edx,
    } = __cpuid_count(leaf, subleaf);
    let mirrored = match (leaf, subleaf) {
        (1, _) => Some((27, Cr4Flags::OSXSAVE)),
        (7, 0) => Some((4, Cr4Flags::PROTECTION_KEY_USER)),
        _ => None,
    };
    if let Some((bit, flag)) = mirrored {
        ecx = ecx & !(1 << bit) | u32::from(cr4 & flag.bits() != 0) << bit;
    }
    [eax, ebx, ecx, edx]
}
