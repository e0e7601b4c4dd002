//! The end of a program: its status leaves the machine.

use crate::{port, serial};

/// The status of a program that panicked, as Rust's own programs have it.
pub const PANICKED: u8 = 101;
/// The status of a program that ran into a processor exception which it does not handle.
pub const EXCEPTION: u8 = 102;

/// QEMU's and Bochs's debug console, which answers its own number when read.
const DEBUG_CONSOLE: u16 = 0xe9;
/// QEMU's `isa-debug-exit`, where the examples and the `machine` crate put it.
const DEBUG_EXIT: u16 = 0xf4;
/// Bochs ends when it reads this word here.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// Ends the emulator with a status, or halts where nothing takes it.
///
/// QEMU's own exit status holds seven bits and Bochs's none, so the whole status goes to the debug
/// console first, as the line `testudo-exit: STATUS`, and then as a byte to port 0xf4.
pub fn exit(status: u8) -> ! {
    x86_64::instructions::interrupts::disable();
    serial::drain();
    // SAFETY: none of these ports belongs to a device that accesses memory.
    unsafe {
        if port::read_u8(DEBUG_CONSOLE) == 0xe9 {
            let digits = [
                b'0' + status / 100,
                b'0' + status / 10 % 10,
                b'0' + status % 10,
                b'\n',
            ];
            for byte in b"testudo-exit: ".iter().chain(&digits) {
                port::write_u8(DEBUG_CONSOLE, *byte);
            }
        }
        port::write_u8(DEBUG_EXIT, status);
        for byte in b"Shutdown" {
            port::write_u8(BOCHS_SHUTDOWN, *byte);
        }
    }
    loop {
        x86_64::instructions::hlt();
    }
}
