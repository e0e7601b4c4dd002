//! What a Linux program without libc needs: a start, its arguments, system calls and an end.
//!
//! Such programs run in any initial RAM disk. One is an ordinary Rust binary of the host target:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//!
//! use testudo_user::Arguments;
//!
//! testudo_user::entry!(main);
//!
//! fn main(arguments: Arguments) -> u8 {
//!     testudo_user::print(b"hello\n");
//!     0
//! }
//! ```
//!
//! with a `build.rs` that calls `testudo_rt_link::freestanding()`. The numbers of system calls are those of
//! x86-64 (`syscalls(2)`).
#![no_std]
#![allow(unsafe_code)]

use core::arch::asm;
use core::panic::PanicInfo;

const SYS_WRITE: usize = 1;
const SYS_EXIT: usize = 60;

/// The file to which a program prints.
pub const STANDARD_OUTPUT: usize = 1;

/// Names the function that is the program: it takes the arguments and returns the exit status.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        /// Linux starts a program here, with the argument count and the arguments on the stack (System V
        /// ABI, x86-64 supplement, 3.4.1).
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn _start() -> ! {
            core::arch::naked_asm!(
                "mov rdi, rsp", "and rsp, -16", "call {start}", "ud2", start = sym start
            )
        }

        extern "C" fn start(stack: *const usize) -> ! {
            let main: fn($crate::Arguments) -> u8 = $main;
            // SAFETY: this is the stack that the kernel prepared.
            $crate::exit(main(unsafe { $crate::Arguments::new(stack) }))
        }
    };
}

/// The arguments after the program's name.
#[derive(Clone, Debug)]
pub struct Arguments {
    next: *const *const u8,
    left: usize,
}

impl Arguments {
    /// The arguments that the kernel left on the stack.
    ///
    /// # Safety
    /// At `stack` must be their count, as many pointers to terminated strings, and a null pointer, for as long
    /// as the program runs.
    pub unsafe fn new(stack: *const usize) -> Self {
        // SAFETY: the caller vouches for the count.
        let count = unsafe { stack.read() };
        Self {
            next: stack.wrapping_add(2).cast(),
            left: count.saturating_sub(1),
        }
    }

    /// The next argument as a decimal number, if it is one.
    pub fn next_number(&mut self) -> Option<u32> {
        core::str::from_utf8(self.next()?).ok()?.parse().ok()
    }
}

impl Iterator for Arguments {
    type Item = &'static [u8];

    fn next(&mut self) -> Option<&'static [u8]> {
        self.left = self.left.checked_sub(1)?;
        // SAFETY: `new`'s caller vouches for the pointers up to the count, and for each string up to the zero,
        // where the search ends.
        let argument = unsafe {
            let text = self.next.read();
            let mut len = 0;
            while text.add(len).read() != 0 {
                len += 1;
            }
            core::slice::from_raw_parts(text, len)
        };
        self.next = self.next.wrapping_add(1);
        Some(argument)
    }
}

/// A system call; a negative result is an error's number.
///
/// # Safety
/// The call must touch no memory of the program's but what its arguments name, and that must be the caller's
/// to have read and written.
pub unsafe fn system_call(number: usize, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the caller vouches for what the kernel does; besides, it changes RAX, RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            out("rcx") _, out("r11") _,
            options(nostack),
        );
    }
    result
}

/// Writes a text to the standard output, as far as that takes it.
pub fn print(mut text: &[u8]) {
    while !text.is_empty() {
        let (at, len) = (text.as_ptr() as usize, text.len());
        // SAFETY: the call reads the text only.
        let written = unsafe { system_call(SYS_WRITE, [STANDARD_OUTPUT, at, len, 0, 0, 0]) };
        match usize::try_from(written) {
            Ok(written) if written > 0 => text = text.get(written..).unwrap_or_default(),
            _ => return,
        }
    }
}

/// Ends the program.
pub fn exit(status: u8) -> ! {
    loop {
        // SAFETY: the call touches no memory.
        unsafe { system_call(SYS_EXIT, [status.into(), 0, 0, 0, 0, 0]) };
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(101)
}

/// `core` was compiled to unwind and refers to this; with `panic = "abort"` nobody calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
