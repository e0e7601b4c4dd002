//! What is left of a BIOS: kernels that call it in real mode (Xen asks for the memory map, disks and
//! video modes while it boots by Multiboot) must find services, which may all decline.

use testudo_arch::{Gpa, GuestMemory, MemoryFault};

use crate::layout::{EBDA, FIRMWARE_CODE, RESET_PORT, RESET_VALUE};

/// Sets CF in the caller's flags, "function not supported", and returns.
const DECLINE: [u8; 8] = [
    0x55, // push bp
    0x89, 0xE5, // mov bp, sp
    0x80, 0x4E, 0x06, 0x01, // or byte [bp + 6], 1
    0x5D, // pop bp
];
const RETURN: [u8; 1] = [0xCF]; // iret

/// The reset vector, for those who jump there: resets the machine.
const RESET: [u8; 9] = [
    0xBA,
    RESET_PORT as u8,
    (RESET_PORT >> 8) as u8, // mov dx, RESET_PORT
    0xB0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xEE,        // out dx, al
    0xF4,        // hlt
    0xEB,
    0xFD, // jmp to the hlt
];
const RESET_VECTOR: Gpa = Gpa(0xF_FFF0);

const _: () = assert!(FIRMWARE_CODE.0 + (DECLINE.len() + RETURN.len()) as u64 <= RESET_VECTOR.0);

/// Writes the interrupt table, the services, the reset vector, and the two words of the BIOS data
/// area by which kernels find the end of conventional memory: the segment of the extended BIOS
/// data area (40Eh) and the size in KiB (413h).
pub(super) fn write<M: GuestMemory + ?Sized>(memory: &M) -> Result<(), MemoryFault> {
    const SEGMENT: u64 = 0xF000;
    let offset = (FIRMWARE_CODE.0 - (SEGMENT << 4)) as u16;
    let mut table = [0; 1024];
    for entry in table.chunks_exact_mut(4) {
        entry[..2].copy_from_slice(&offset.to_le_bytes());
        entry[2..].copy_from_slice(&(SEGMENT as u16).to_le_bytes());
    }
    memory.write(Gpa::ZERO, &table)?;
    memory.write(FIRMWARE_CODE, &DECLINE)?;
    memory.write(FIRMWARE_CODE.wrapping_add(DECLINE.len() as u64), &RETURN)?;
    memory.write(RESET_VECTOR, &RESET)?;
    memory.write(Gpa(0x40E), &((EBDA.0 >> 4) as u16).to_le_bytes())?;
    memory.write(Gpa(0x413), &((EBDA.0 >> 10) as u16).to_le_bytes())
}
