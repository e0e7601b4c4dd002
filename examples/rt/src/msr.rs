//! Model-specific registers, with and without knowing that they exist.

use core::arch::asm;

/// Reads an MSR.
///
/// # Safety
/// The processor must have it, or the read faults and the program ends.
#[inline]
pub unsafe fn read(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for the register; reading one changes no memory.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
/// The processor must accept the value, and what the register controls must stay sound.
#[inline]
pub unsafe fn write(msr: u32, value: u64) {
    // SAFETY: the caller vouches for the register and the value.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

/// Reads an MSR that may not exist; `None` if the processor refuses.
pub fn try_read(msr: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    let mut refused = 0_u32;
    // SAFETY: reading a register changes no memory; a fault continues at label 3 (see `irq::Fixup`).
    unsafe {
        asm!(
            "2: rdmsr",
            "jmp 4f",
            "3: mov {refused:e}, 1",
            "xor eax, eax",
            "xor edx, edx",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            refused = inout(reg) refused,
            in("ecx") msr, out("eax") low, out("edx") high,
            options(nomem, nostack),
        );
    }
    (refused == 0).then_some(u64::from(high) << 32 | u64::from(low))
}

/// Writes an MSR that may not exist or may refuse the value; says whether it was accepted.
///
/// # Safety
/// What the register controls must stay sound if the processor accepts the value.
pub unsafe fn try_write(msr: u32, value: u64) -> bool {
    let mut refused = 0_u32;
    // SAFETY: the caller vouches for an accepted value; a fault continues at label 3 (see `irq::Fixup`).
    unsafe {
        asm!(
            "2: wrmsr",
            "jmp 4f",
            "3: mov {refused:e}, 1",
            "4:",
            ".pushsection .rt_fixups, \"a\"",
            ".quad 2b, 3b",
            ".popsection",
            refused = inout(reg) refused,
            in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack),
        );
    }
    refused == 0
}
