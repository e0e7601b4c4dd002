//! AMD-V: everything a hypervisor says to the processor and hears from it, as typed values.
//!
//! The [`vmcb`] with its clean bits, [`intercept`] vectors, [`permission`] maps for MSRs and ports,
//! [`asid`] allocation, [`event`] injection, decoded [`exit`]s, the consistency checks of VMRUN as
//! data ([`check`]), what a processor offers ([`caps`]), and behind the feature `hw` the
//! instructions and the world switch.
//!
//! All but `hw` are pure functions over values: they run in tests, in fuzzers and inside an
//! emulator of VMRUN for a guest hypervisor. Nothing here allocates, and no value that a guest or
//! a guest hypervisor chose makes it panic.
//!
//! Sections cited are those of the AMD64 Architecture Programmer's Manual, volume 2 (publication
//! 24593), "APM" below.
//!
//! ```
//! use testudo_svm::exit::Exit;
//! use testudo_svm::intercept::{Misc1, Misc2};
//! use testudo_svm::vmcb::Vmcb;
//!
//! let mut vmcb = Vmcb::new();
//! vmcb.set_intercept_misc1(Misc1::CPUID | Misc1::HLT);
//! vmcb.set_intercept_misc2(Misc2::VMRUN);
//! vmcb.set_asid(1);
//! // After an exit the processor has written the reason into the same memory:
//! vmcb.set_exit_code(0x72);
//! assert_eq!(Exit::read(&vmcb), Exit::Cpuid);
//! assert_eq!(Exit::read(&vmcb).to_string(), "CPUID");
//! ```
#![no_std]

#[cfg(test)]
extern crate std;

pub mod asid;
pub mod caps;
pub mod check;
pub mod defects;
pub mod event;
pub mod exit;
#[cfg(feature = "hw")]
pub mod hw;
pub mod intercept;
pub mod permission;
pub mod vmcb;

pub use asid::Asid;
pub use caps::SvmCaps;
pub use defects::Defects;
pub use exit::Exit;
pub use vmcb::Vmcb;
