#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_virtio::device::Template;

fuzz_target!(|data: &[u8]| testudo_fuzz::virtio::drive(Box::new(Template::new()), data));
