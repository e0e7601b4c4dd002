//! Registers of the guest's that are in the processor while the hypervisor runs.

use core::arch::asm;

/// The processor's task priority.
pub(crate) fn cr8() -> u8 {
    let cr8: u64;
    // SAFETY: CPL 0; the register has no effect on memory.
    unsafe { asm!("mov {}, cr8", out(reg) cr8, options(nomem, nostack, preserves_flags)) };
    cr8 as u8
}

/// Sets it.
pub(crate) fn set_cr8(priority: u8) {
    let cr8 = u64::from(priority & 0xF);
    // SAFETY: CPL 0, and the value has four bits; the hypervisor takes no interrupts.
    unsafe { asm!("mov cr8, {}", in(reg) cr8, options(nomem, nostack, preserves_flags)) };
}

/// Clears DR0 to DR3, which are neither in the VMCB nor in the VMCS.
pub(crate) fn clear_breakpoints() {
    // SAFETY: CPL 0, and the hypervisor uses no breakpoints.
    unsafe {
        asm!("mov dr0, {0}", "mov dr1, {0}", "mov dr2, {0}", "mov dr3, {0}", in(reg) 0_u64,
            options(nomem, nostack, preserves_flags));
    }
}

/// Executes XSETBV for the guest; `false` is #GP.
///
/// # Safety
///
/// CR4.OSXSAVE is set.
pub(crate) unsafe fn try_set_xcr(index: u32, value: u64) -> bool {
    let mut refused = 0_u32;
    // SAFETY: CPL 0, and the instruction exists, says the caller; the hypervisor uses only what no value of
    // XCR0 takes away; a fault continues at label 3 (`testudo_rt::irq`).
    unsafe {
        asm!(
            "2: xsetbv",
            "jmp 4f",
            "3: mov {refused:e}, 1",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            refused = inout(reg) refused,
            in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack),
        );
    }
    refused == 0
}
