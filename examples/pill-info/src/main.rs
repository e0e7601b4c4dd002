//! A Linux program that says whether the machine runs under the example `bluepill`, and how often the
//! machine was interrupted: the CPUID leaf that `bluepill` documents in its module `signature`.
//!
//! Its status is 0 under the hypervisor, and 1 without.
#![no_std]
#![no_main]

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use testudo_user::{Arguments, print};

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

testudo_user::entry!(main);

fn main(_: Arguments) -> u8 {
    let name = __cpuid_count(LEAF, 0);
    let words = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
    if words.as_flattened() != NAME {
        print(b"no pill was taken\n");
        return 1;
    }
    let CpuidResult { eax, ebx, .. } = __cpuid_count(LEAF, 1);
    print(NAME);
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
    0
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
    print(text.as_bytes());
    print(&digits[first - 1..]);
}
