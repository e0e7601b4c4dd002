//! A Linux program that ends its machine with a status: `exit-port STATUS` writes the byte to the
//! debug-exit port 0xf4, once its terminal has sent what was written to it before. The line
//! `testudo-exit: STATUS` goes to the debug console at port 0xe9 first, since an emulator's own status has no
//! room for all of it; and an emulator that has no debug-exit port, which is Bochs, is ended by its own.
//!
//! Debian's kernel for virtual machines has no `/dev/port`, so a shell cannot do this.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::asm;

use testudo_user::{Arguments, STANDARD_OUTPUT, system_call};

const DEBUG_EXIT: u16 = 0xf4;
const DEBUG_CONSOLE: u16 = 0xe9;
/// Bochs ends when it reads a word here.
const BOCHS_SHUTDOWN: u16 = 0x8900;

/// With an argument other than 0: waits until the terminal has sent its output (`ioctl_tty(2)`).
const TCSBRK: usize = 0x5409;

const SYS_IOCTL: usize = 16;
const SYS_IOPERM: usize = 173;

testudo_user::entry!(main);

fn main(mut arguments: Arguments) -> u8 {
    let status = arguments.next_number().and_then(|n| u8::try_from(n).ok());
    let (Some(status), None) = (status, arguments.next()) else {
        return 2;
    };
    for port in [DEBUG_EXIT, DEBUG_CONSOLE, BOCHS_SHUTDOWN] {
        // SAFETY: the call touches no memory.
        if unsafe { system_call(SYS_IOPERM, [port.into(), 1, 1, 0, 0, 0]) } != 0 {
            return 1;
        }
    }
    // The machine ends with the port, and what the kernel still holds for the serial port with
    // it. An output that is no terminal refuses this, and has nothing to wait for.
    // SAFETY: the call touches no memory.
    unsafe { system_call(SYS_IOCTL, [STANDARD_OUTPUT, TCSBRK, 1, 0, 0, 0]) };
    let digits = [status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + digit);
    for text in [b"testudo-exit: ".as_slice(), &digits, b"\n"] {
        out(DEBUG_CONSOLE, text);
    }
    out(DEBUG_EXIT, &[status]);
    out(BOCHS_SHUTDOWN, b"Shutdown");
    // There is no such device.
    1
}

/// Writes to one of the ports that the kernel has granted.
fn out(port: u16, bytes: &[u8]) {
    for &byte in bytes {
        // SAFETY: the first is a console's, and the others end the machine; none touches memory.
        unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) };
    }
}
