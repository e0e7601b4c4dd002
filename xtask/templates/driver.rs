//! The template device as its driver sees it, over both transports and both ring formats.

#[macro_use]
mod support;

use support::{Connect, MmioGuest, PciGuest, RawDriver};
use testudo_virtio::device::Template;

in_all_ways! {
    its_configuration_is_read
    requests_are_answered
    no_request_makes_it_do_too_much
}

fn its_configuration_is_read<T: Connect>(packed: bool) {
    let driver = RawDriver::<T>::new(Template::new(), packed);
    let largest: u32 = driver.guest.read_config_space(0).unwrap();
    assert_eq!(largest, 4096);
}

fn requests_are_answered<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(Template::new(), packed);
    assert_eq!(driver.exchange(0, b"hello", 16), Some(b"hello".to_vec()));
    assert_eq!(driver.exchange(0, b"hello", 2), Some(b"he".to_vec()));
    assert_eq!(driver.exchange(0, &[], 16), Some(Vec::new()));
    assert!(!driver.needs_reset());
}

fn no_request_makes_it_do_too_much<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(Template::new(), packed);
    let request = vec![7; 10_000];
    assert_eq!(driver.exchange(0, &request, 10_000), Some(vec![7; 4096]));
}
