#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_fuzz::virtio::Kind;

fuzz_target!(|data: &[u8]| testudo_fuzz::virtio::device(Kind::Fs, data));
