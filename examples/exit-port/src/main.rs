//! A Linux program that ends its machine with a status: `exit-port STATUS` writes the byte to the
//! debug-exit port 0xf4, once its terminal has sent what was written to it before. The line
//! `testudo-exit: STATUS` goes to the debug console at port 0xe9 first: an emulator's own status has no
//! room for all of it.
//!
//! Debian's kernel for virtual machines has no `/dev/port`, so a shell cannot do this. The program needs
//! no libc and thus runs in any initial RAM disk.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;

const DEBUG_EXIT: u16 = 0xf4;
const DEBUG_CONSOLE: u16 = 0xe9;

const STANDARD_OUTPUT: usize = 1;

/// With an argument other than 0: waits until the terminal has sent its output (`ioctl_tty(2)`).
const TCSBRK: usize = 0x5409;

const SYS_IOCTL: usize = 16;
const SYS_EXIT: usize = 60;
const SYS_IOPERM: usize = 173;

/// Linux starts a program here, with the argument count and the arguments on the stack (System V ABI,
/// x86-64 supplement, 3.4.1).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "and rsp, -16", "call {start}", "ud2", start = sym start)
}

extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: the kernel put the count there, as many pointers to terminated strings, and a null pointer.
    let status = unsafe {
        match stack.read() {
            2 => number(stack.add(2).read() as *const u8),
            _ => None,
        }
    };
    let Some(status) = status else { exit(2) };
    for port in [DEBUG_EXIT, DEBUG_CONSOLE] {
        if system_call(SYS_IOPERM, [usize::from(port), 1, 1]) != 0 {
            exit(1);
        }
    }
    // The machine ends with the next instruction, and what the kernel still holds for the serial port with
    // it. An output that is no terminal refuses this, and has nothing to wait for.
    system_call(SYS_IOCTL, [STANDARD_OUTPUT, TCSBRK, 1]);
    let digits = [status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + digit);
    for text in [b"testudo-exit: ".as_slice(), &digits, b"\n"] {
        for &byte in text {
            out(DEBUG_CONSOLE, byte);
        }
    }
    out(DEBUG_EXIT, status);
    // There is no such device.
    exit(1)
}

/// Writes to one of the ports that the kernel has granted.
fn out(port: u16, byte: u8) {
    // SAFETY: one is a console, and the other ends the machine; neither touches memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) };
}

/// The decimal number of a terminated string, if it is one that fits a byte.
///
/// # Safety
/// The string must be readable up to its terminating zero.
unsafe fn number(mut text: *const u8) -> Option<u8> {
    let mut value = None;
    loop {
        // SAFETY: the caller vouches for the bytes up to the zero, and the loop ends there.
        let byte = unsafe { text.read() };
        if byte == 0 {
            return value;
        }
        let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value = Some(value.unwrap_or(0_u8).checked_mul(10)?.checked_add(digit)?);
        text = text.wrapping_add(1);
    }
}

fn system_call(number: usize, arguments: [usize; 3]) -> isize {
    let result;
    // SAFETY: neither of this program's system calls touches its memory.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2],
            out("rcx") _, out("r11") _,
            options(nostack),
        );
    }
    result
}

fn exit(status: usize) -> ! {
    loop {
        system_call(SYS_EXIT, [status, 0, 0]);
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(101)
}

/// `core` was compiled to unwind and refers to this; with `panic = "abort"` nobody calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
