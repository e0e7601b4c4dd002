//! Transports: how a guest finds a device and talks to it.
//!
//! [`Mmio`] is a window of registers, [`Pci`] a PCI function. Both drive the same state machine.

mod core;
mod mmio;
mod pci;

pub use self::core::{Fault, Options};
pub use mmio::Mmio;
pub use pci::Pci;
