//! A test kernel.
#![no_std]
#![no_main]

use testudo_rt::{Boot, println};

testudo_rt::entry!(main);

fn main(boot: &'static Boot) -> u8 {
    println!(
        "selftest {:?} {} {}",
        boot.loader(),
        1.5_f64 * boot.command_line().len() as f64,
        testudo_rt::memory::available()
    );
    for r in boot.memory_map() {
        println!("{:x?}", r);
    }
    for r in boot.modules() {
        println!("{} {} {}", r.name, r.args, r.data.len());
    }
    7
}
