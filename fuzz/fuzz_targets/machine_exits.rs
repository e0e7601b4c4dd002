#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| testudo_fuzz::machine::exits(data));
