//! Placeholder until its first slice.
#![no_std]
#![no_main]

testudo_rt::entry!(main);

fn main(_boot: &'static testudo_rt::Boot) -> u8 {
    testudo_rt::println!("linux-vmm: not yet");
    1
}
