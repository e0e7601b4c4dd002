//! Port input and output.

use core::arch::asm;

/// Reads a byte from an I/O port.
///
/// # Safety
/// Reading the port must have no effect that memory safety depends on (a device's DMA, for one).
#[inline]
pub unsafe fn read_u8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: the caller vouches for the device behind the port; IN touches no memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Writes a byte to an I/O port.
///
/// # Safety
/// As for [`read_u8`].
#[inline]
pub unsafe fn write_u8(port: u16, value: u8) {
    // SAFETY: the caller vouches for the device behind the port; OUT touches no memory.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// Reads a 16-bit word from an I/O port.
///
/// # Safety
/// As for [`read_u8`].
#[inline]
pub unsafe fn read_u16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: the caller vouches for the device behind the port; IN touches no memory.
    unsafe {
        asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Writes a 16-bit word to an I/O port.
///
/// # Safety
/// As for [`read_u8`].
#[inline]
pub unsafe fn write_u16(port: u16, value: u16) {
    // SAFETY: the caller vouches for the device behind the port; OUT touches no memory.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags));
    }
}

/// Reads a 32-bit word from an I/O port.
///
/// # Safety
/// As for [`read_u8`].
#[inline]
pub unsafe fn read_u32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: the caller vouches for the device behind the port; IN touches no memory.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Writes a 32-bit word to an I/O port.
///
/// # Safety
/// As for [`read_u8`].
#[inline]
pub unsafe fn write_u32(port: u16, value: u32) {
    // SAFETY: the caller vouches for the device behind the port; OUT touches no memory.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
    }
}
