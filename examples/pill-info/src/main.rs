//! A Linux program that says whether the machine runs under the example `bluepill`, and how often the
//! machine was interrupted: the CPUID leaf that `bluepill` documents in its module `signature`.
//!
//! Its status is 0 under the hypervisor, and 1 without.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::x86_64::{__cpuid_count, CpuidResult};
use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;

const LEAF: u32 = 0x4000_7000;
const NAME: &[u8; 12] = b"Testudo pill";
/// What sub-leaves 2 and on count.
const REASONS: [&str; 7] = [
    "CPUID",
    "MSR",
    "local APIC",
    "virtualization instruction",
    "guest of the guest",
    "INIT, NMI or message",
    "other",
];

const SYS_WRITE: usize = 1;
const SYS_EXIT: usize = 60;
const STANDARD_OUTPUT: usize = 1;

/// Linux starts a program here (System V ABI, x86-64 supplement, 3.4.1).
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("and rsp, -16", "call {start}", "ud2", start = sym start)
}

extern "C" fn start() -> ! {
    let name = __cpuid_count(LEAF, 0);
    let words = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
    if words.as_flattened() != NAME {
        write(b"no pill was taken\n");
        exit(1);
    }
    let CpuidResult { eax, ebx, .. } = __cpuid_count(LEAF, 1);
    write(NAME);
    line(": processors", u64::from(eax));
    line("KiB kept", u64::from(ebx));
    let mut all = 0;
    for (subleaf, reason) in (2..=name.eax).zip(REASONS) {
        let CpuidResult { eax, ebx, .. } = __cpuid_count(LEAF, subleaf);
        let count = u64::from(ebx) << 32 | u64::from(eax);
        all += count;
        line(reason, count);
    }
    line("exits in all", all);
    exit(0)
}

/// A line of a text and a number.
fn line(text: &str, mut number: u64) {
    let mut digits = [b' '; 21];
    digits[20] = b'\n';
    for place in digits[..20].iter_mut().rev() {
        *place = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    let first = digits.iter().position(|digit| *digit != b' ').unwrap_or(0);
    write(text.as_bytes());
    write(&digits[first - 1..]);
}

fn write(text: &[u8]) {
    system_call(
        SYS_WRITE,
        [STANDARD_OUTPUT, text.as_ptr() as usize, text.len()],
    );
}

fn system_call(number: usize, arguments: [usize; 3]) {
    // SAFETY: neither of this program's system calls changes its memory.
    unsafe {
        asm!(
            "syscall",
            inout("rax") number => _,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2],
            out("rcx") _, out("r11") _,
            options(nostack),
        );
    }
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
