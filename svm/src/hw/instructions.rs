//! The SVM instructions, one function each (APM vol. 3, chapter 4), and the few others that the
//! world switch needs.

use core::arch::asm;

use testudo_arch::{Gva, Hpa, Msr};

/// VMLOAD: loads FS, GS, TR, LDTR, KernelGSBase, STAR, LSTAR, CSTAR, SFMASK and the SYSENTER
/// registers from a VMCB.
///
/// # Safety
///
/// SVM is enabled, the address is that of a VMCB, and what it holds suits the code that runs next.
#[inline]
pub unsafe fn vmload(vmcb: Hpa) {
    // SAFETY: SVM is enabled and `vmcb` is a VMCB, says the caller.
    unsafe { asm!("vmload rax", in("rax") vmcb.0, options(nostack, preserves_flags)) };
}

/// VMSAVE: the reverse of [`vmload`].
///
/// # Safety
///
/// SVM is enabled, and the address is that of a VMCB that may be written.
#[inline]
pub unsafe fn vmsave(vmcb: Hpa) {
    // SAFETY: SVM is enabled and `vmcb` may be written, says the caller.
    unsafe { asm!("vmsave rax", in("rax") vmcb.0, options(nostack, preserves_flags)) };
}

/// STGI: sets the global interrupt flag.
///
/// # Safety
///
/// SVM is enabled, and the host is ready for whatever is pending.
#[inline]
pub unsafe fn stgi() {
    // SAFETY: SVM is enabled, says the caller.
    unsafe { asm!("stgi", options(nostack)) };
}

/// CLGI: clears the global interrupt flag.
///
/// # Safety
///
/// SVM is enabled.
#[inline]
pub unsafe fn clgi() {
    // SAFETY: SVM is enabled, says the caller.
    unsafe { asm!("clgi", options(nostack)) };
}

/// INVLPGA: invalidates the translation of one page in one ASID, as the guest's own paging made it.
/// It invalidates nothing by guest-physical address.
///
/// # Safety
///
/// SVM is enabled. ASID 0 names the host's own translations.
#[inline]
pub unsafe fn invlpga(address: Gva, asid: u32) {
    // SAFETY: SVM is enabled, says the caller; dropping a translation is always allowed.
    unsafe {
        asm!("invlpga rax, ecx", in("rax") address.0, in("ecx") asid,
            options(nostack, preserves_flags));
    }
}

/// STI.
///
/// # Safety
///
/// CPL 0, and the host is ready for interrupts, or GIF is clear.
#[inline]
pub unsafe fn sti() {
    // SAFETY: the caller's promise.
    unsafe { asm!("sti", options(nostack)) };
}

/// CLI.
///
/// # Safety
///
/// CPL 0.
#[inline]
pub unsafe fn cli() {
    // SAFETY: the caller's promise.
    unsafe { asm!("cli", options(nostack)) };
}

/// Whether RFLAGS.IF is set.
#[inline]
pub fn interrupts_enabled() -> bool {
    let flags: u64;
    // SAFETY: reads the flags through the stack, which the compiler knows of.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags)) };
    flags & 1 << 9 != 0
}

/// Sets GIF for one instruction, so that everything pending is taken that IF does not hold back, and
/// clears it.
///
/// # Safety
///
/// SVM is enabled, GIF is clear, and the host's IDT is in place.
#[inline]
pub(super) unsafe fn open_gif_window() {
    // SAFETY: the caller's promise; interrupt handlers keep all registers.
    unsafe { asm!("stgi", "nop", "clgi") };
}

/// Waits for an interrupt, takes it, and clears GIF.
///
/// IF is clear while GIF is set before HLT, so that an interrupt cannot come between the two: STI
/// lets it in only after the next instruction, HLT, has begun.
///
/// # Safety
///
/// As for [`open_gif_window`].
#[inline]
pub(super) unsafe fn wait_with_gif_window() {
    // SAFETY: the caller's promise; interrupt handlers keep all registers.
    unsafe { asm!("cli", "stgi", "sti", "hlt", "clgi") };
}

/// IBPB: a barrier that keeps branch targets trained before it from being used after it (APM vol. 2,
/// 3.2.9). Due between two guests that must not influence one another, and between a guest
/// hypervisor and its guest.
///
/// # Safety
///
/// CPL 0, and CPUID Fn8000_0008 EBX bit 12 (IBPB) is set.
#[inline]
pub unsafe fn ibpb() {
    // SAFETY: PRED_CMD exists, says the caller.
    unsafe { wrmsr(Msr::PRED_CMD, 1) };
}

/// RDMSR.
///
/// # Safety
///
/// CPL 0, and the register exists and can be read.
#[inline]
pub(super) unsafe fn rdmsr(msr: Msr) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rdmsr", in("ecx") msr.0, out("eax") low, out("edx") high,
            options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR.
///
/// # Safety
///
/// CPL 0, the register exists and takes this value, and what changes suits the code that runs next.
#[inline]
pub(super) unsafe fn wrmsr(msr: Msr, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") msr.0, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}
