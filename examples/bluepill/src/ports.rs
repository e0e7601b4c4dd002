//! Ports, which are the guest's: accessed here for it, where one of them is watched.

use testudo_rt::port;

/// Reads a port for the guest.
pub(crate) fn read(port: u16, size: u8) -> u32 {
    // SAFETY: ports are the guest's, and none makes a device write memory that the guest could not have it
    // write anyway.
    unsafe {
        match size {
            1 => u32::from(port::read_u8(port)),
            2 => u32::from(port::read_u16(port)),
            _ => port::read_u32(port),
        }
    }
}

/// Reads a port into RAX, as IN of this size.
pub(crate) fn read_into(rax: &mut u64, port: u16, size: u8) {
    let value = u64::from(read(port, size));
    *rax = match size {
        1 => *rax & !0xFF | value,
        2 => *rax & !0xFFFF | value,
        _ => value,
    };
}

/// Writes to a port for the guest.
pub(crate) fn write(port: u16, size: u8, value: u32) {
    // SAFETY: as for `read`.
    unsafe {
        match size {
            1 => port::write_u8(port, value as u8),
            2 => port::write_u16(port, value as u16),
            _ => port::write_u32(port, value),
        }
    }
}
