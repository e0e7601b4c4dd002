//! An SDK for building x86-64 hypervisors.
#![no_std]
pub use testudo_arch as arch;
