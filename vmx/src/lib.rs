//! Intel VT-x: the VMCS, capabilities, controls, VM-entry checks, exit decoding and the
//! instructions.
//!
//! Everything but the module `hw` (feature `hw`) is pure: it decides over plain values and the
//! traits [`VmcsRead`] and [`VmcsWrite`], so the same code serves the processor's current VMCS, the
//! VMCS of a guest hypervisor in memory ([`image`]) and a test ([`fake`]). This crate never
//! allocates, never panics on what a guest or a guest hypervisor chose, and turns what it does not
//! know into an `Unknown` value.
//!
//! Sections of Intel's Software Developer's Manual (SDM) are those of editions 325462-080 to -083
//! (2023 and 2024), in which volume 3C has the VMCS in chapter 25, VM entries in 27 and VM exits
//! in 28. Older editions count one less, newer ones one more.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod bitmap;
pub mod caps;
pub mod check;
pub mod clock;
pub mod controls;
pub mod encoding;
mod error;
pub mod event;
pub mod exit;
pub mod fake;
pub mod fields;
#[cfg(feature = "hw")]
pub mod hw;
pub mod image;
pub mod state;
pub mod structures;
mod vmcs;

pub use caps::VmxCaps;
pub use encoding::{Encoding, Field};
pub use error::{AccessError, InstructionError, VmFail};
pub use vmcs::{VmcsRead, VmcsWrite};
