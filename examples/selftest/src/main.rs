//! A test kernel: its cases run one by one on an emulator, on a real machine, or in a guest.
//!
//! Each prints `test NAME ... ok`, or what failed; the last line is `N passed, N failed`, and the exit
//! status is 1 if any failed. Words on the command line choose the cases whose names contain one of them.
#![no_std]
#![no_main]

extern crate alloc;

mod case;
mod iommu;
mod runtime;
mod svm;
mod vmx;
mod vmx_apic;

use testudo_rt::{Boot, print, println};

use case::{Case, Outcome};

testudo_rt::entry!(main);

/// The groups of cases, in the order in which they run: later ones rely on what earlier ones tested.
const GROUPS: [&[Case]; 5] = [
    runtime::CASES,
    svm::CASES,
    vmx::CASES,
    vmx_apic::CASES,
    iommu::CASES,
];

fn main(boot: &'static Boot) -> u8 {
    let chosen = |case: &&Case| {
        let mut words = boot.command_line().split_whitespace().peekable();
        words.peek().is_none() || words.any(|word| case.name.contains(word))
    };
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in GROUPS.into_iter().flatten().filter(chosen) {
        print!("test {} ... ", case.name);
        match (case.run)(boot) {
            Outcome::Passed => {
                passed += 1;
                println!("ok");
            }
            Outcome::Failed(why) => {
                failed += 1;
                println!("FAILED: {why}");
            }
            Outcome::Skipped(why) => {
                skipped += 1;
                println!("skipped: {why}");
            }
        }
    }
    if skipped > 0 {
        println!("{skipped} skipped");
    }
    println!("{passed} passed, {failed} failed");
    u8::from(failed > 0 || passed == 0)
}
