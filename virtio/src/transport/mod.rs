//! Transports: how a guest finds a device and talks to it.
//!
//! [`Mmio`] is a window of registers.

mod core;
mod mmio;

pub use self::core::{Fault, Options};
pub use mmio::Mmio;
