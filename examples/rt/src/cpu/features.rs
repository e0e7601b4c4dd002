//! The few processor features that the runtime itself depends on.

use core::arch::x86_64::{__cpuid, CpuidResult};

use x86_64::registers::control::{Cr4, Cr4Flags, Efer, EferFlags};
use x86_64::registers::xcontrol::{XCr0, XCr0Flags};

/// CPUID of a leaf, all zero where the processor has no such leaf.
pub fn cpuid(leaf: u32) -> CpuidResult {
    let last = __cpuid(leaf & 0xffff_0000).eax;
    if leaf <= last {
        __cpuid(leaf)
    } else {
        CpuidResult {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        }
    }
}

/// 1 GiB pages (CPUID 8000_0001H, EDX bit 26).
pub fn has_1g_pages() -> bool {
    cpuid(0x8000_0001).edx & 1 << 26 != 0
}

/// The local APIC timer's TSC-deadline mode (CPUID 1, ECX bit 24).
pub fn has_tsc_deadline() -> bool {
    cpuid(1).ecx & 1 << 24 != 0
}

/// XSAVE (CPUID 1, ECX bit 26).
pub fn has_xsave() -> bool {
    cpuid(1).ecx & 1 << 26 != 0
}

/// The no-execute bit of page tables (CPUID 8000_0001H, EDX bit 20).
pub fn has_nx() -> bool {
    cpuid(0x8000_0001).edx & 1 << 20 != 0
}

/// AVX (CPUID 1, ECX bit 28).
pub fn has_avx() -> bool {
    cpuid(1).ecx & 1 << 28 != 0
}

/// Turns on, on the running processor, what the entry code did not need: the no-execute bit, and XSAVE
/// with the x87, SSE and AVX states.
pub(crate) fn enable() {
    // SAFETY: the bits exist by CPUID; the page tables have the no-execute bit only where
    // it is on already or about to be, and more state that can be
    // saved changes none of what there is.
    unsafe {
        if has_nx() {
            Efer::update(|efer| efer.insert(EferFlags::NO_EXECUTE_ENABLE));
        }
        if has_xsave() {
            Cr4::update(|cr4| cr4.insert(Cr4Flags::OSXSAVE));
            let mut states = XCr0Flags::X87 | XCr0Flags::SSE;
            states.set(XCr0Flags::AVX, has_avx());
            XCr0::write(states);
        }
    }
}
