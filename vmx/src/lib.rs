//! Intel VT-x: the VMCS, capabilities, controls, VM-entry checks, exit decoding and the
//! instructions.
//!
//! Everything but the module `hw` (feature `hw`) is pure: it decides over plain values and the
//! traits [`VmcsRead`] and [`VmcsWrite`], so the same code serves the processor's current VMCS, the
//! VMCS of a guest hypervisor in memory ([`image`]) and a test ([`fake`]). This crate never
//! allocates, never panics on what a guest or a guest hypervisor chose, and turns what it does not
//! know into an `Unknown` value.
//!
//! Sections of volume 3C of Intel's Software Developer's Manual (SDM) are those of its editions since
//! 2025, in which chapter 27 has the VMCS, 28 non-root operation, 29 VM entries, 30 VM exits, 31 EPT,
//! 32 APIC virtualization and 33 the instructions. Those chapters have lower numbers in older editions: in
//! those of 2023 by two. Where a newer edition gives a thing a new name, it is named beside the one that
//! software knows it by.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod bitmap;
pub mod caps;
pub mod check;
pub mod clock;
pub mod controls;
mod defects;
pub mod encoding;
mod error;
pub mod event;
pub mod exit;
pub mod fake;
pub mod fields;
mod group;
#[cfg(feature = "hw")]
pub mod hw;
pub mod image;
pub mod state;
pub mod structures;
mod vmcs;

pub use caps::VmxCaps;
pub use defects::Defects;
pub use encoding::{Encoding, Field};
pub use error::{AccessError, InstructionError, RegionError, VmFail};
pub use group::FieldGroup;
pub use vmcs::{VmcsRead, VmcsWrite};
