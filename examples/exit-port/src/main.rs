//! A Linux program that ends its machine with a status: `exit-port STATUS` writes the byte to the
//! debug-exit port 0xf4, once its terminal has sent what was written to it before.
//!
//! Debian's kernel for virtual machines has no `/dev/port`, so a shell cannot do this.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::asm;

use testudo_user::{Arguments, STANDARD_OUTPUT, system_call};

const DEBUG_EXIT: u16 = 0xf4;

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
    // SAFETY: the call touches no memory.
    if unsafe { system_call(SYS_IOPERM, [DEBUG_EXIT.into(), 1, 1, 0, 0, 0]) } != 0 {
        return 1;
    }
    // The machine ends with the next instruction, and what the kernel still holds for the serial port with
    // it. An output that is no terminal refuses this, and has nothing to wait for.
    // SAFETY: the call touches no memory.
    unsafe { system_call(SYS_IOCTL, [STANDARD_OUTPUT, TCSBRK, 1, 0, 0, 0]) };
    // SAFETY: the kernel has granted the port, whose device ends the machine.
    unsafe { asm!("out dx, al", in("dx") DEBUG_EXIT, in("al") status, options(nomem, nostack)) };
    // There is no such device.
    1
}
