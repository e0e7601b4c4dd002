//! Nested virtualization: a guest that is itself a hypervisor.
//!
//! Three levels meet here. *L0* is the hypervisor that uses this crate, *L1* its guest, which
//! believes to have the virtualization extension to itself, and *L2* what L1 runs. The processor
//! knows one level of guests only, so L0 runs L2 for L1: what L1 asks for in its control block
//! (`12`), joined with what L0 itself needs (`01`), makes the control block that the processor
//! runs L2 with (`02`), and every exit of L2 is given to whom it belongs.
//!
//! This crate is that work without a processor: instruction emulation, the join, the routing of
//! exits, events, and the state to save. It works on control blocks as values and reaches L1's
//! memory through [`GuestMemory`](testudo_arch::GuestMemory), so all of it runs in tests and in
//! fuzzers. A backend that owns a processor calls it from its run loop.
//!
//! # What L1 may never do
//!
//! L1 is the adversary: it controls its control blocks, its tables and its memory, and other
//! processors of it change them at any time.
//!
//! - Its control block is copied once for each entry, the copy is checked, and nothing but the
//!   copy is used.
//! - `02` is made from a list of what L1 may decide. It intercepts all that L0 intercepts.
//! - No host-physical address comes from L1: permission maps and second-stage tables of `02` are
//!   L0's own, made from L1's by looking up each address.
//! - The state that L0 itself returns to is never L1's choice.
//! - Each instruction checks its mode and privilege level before anything else.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod composed;
mod kvm;
mod open_words;
pub mod svm;
#[cfg(test)]
mod test_memory;
pub mod vmx;

pub use kvm::FormatError;
