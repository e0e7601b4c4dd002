//! An SDK for building x86-64 hypervisors: the facade over all its crates.
//!
//! Each part is useful alone, as a crate of its own, and appears here behind a feature of the same
//! name: [`arch`] always; `svm` and `vmx`, the processors' virtualization as typed values; `ept`,
//! page tables of every kind; `virtio`, the device side; `nested`, guests that are hypervisors;
//! `machine`, the virtual PC around the processors, with `svm` and `vmx` as its backends if they are
//! there too. The feature `full` is all of them; `hw` adds the privileged instructions, which `machine`'s
//! backends bring along.
//!
//! Nothing here needs the standard library.
//!
//! ```
//! use testudo::arch::{Gpa, PageSize};
//!
//! let page = Gpa(0x1234_5678).align_down(PageSize::Size2M);
//! assert_eq!(page, Gpa(0x1220_0000));
//! ```
#![no_std]

pub use testudo_arch as arch;
#[cfg(feature = "ept")]
pub use testudo_ept as ept;
#[cfg(feature = "machine")]
pub use testudo_machine as machine;
#[cfg(feature = "nested")]
pub use testudo_nested as nested;
#[cfg(feature = "svm")]
pub use testudo_svm as svm;
#[cfg(feature = "virtio")]
pub use testudo_virtio as virtio;
#[cfg(feature = "vmx")]
pub use testudo_vmx as vmx;

/// The README's example, compiled and run.
#[cfg(all(doctest, feature = "svm"))]
#[doc = include_str!("../README.md")]
pub struct Readme;
