//! The device side of virtio without std: queues, transports and devices (VIRTIO 1.3).
//!
//! A *device* ([`Device`]) processes chains of buffers; a *queue* ([`Queue`]) takes them from
//! split or packed rings; a *transport* ([`transport::Mmio`], [`transport::Pci`]) is what the guest sees on its
//! bus; a *backend* ([`backend`]) is where blocks, packets and bytes really go. Each piece works
//! alone. All of them reach the guest through [`testudo_arch::GuestMemory`] and
//! [`testudo_arch::irq::InterruptSink`] only, so the same device runs on bare metal, on KVM and in
//! a unit test.
//!
//! What a guest writes is copied once, checked, and only the copy is used. Whatever it writes, no
//! call panics, loops without a bound, or touches memory that the chain did not offer; queues
//! allocate when they are activated and never afterwards. A driver that breaks the rules finds
//! DEVICE_NEEDS_RESET set, and [`transport::Fault`] says why.
//!
//! ```
//! use std::sync::Arc;
//! use testudo_arch::bus::BusDevice;
//! use testudo_arch::irq::{InterruptSink, Msi};
//! use testudo_arch::memory::GuestRam;
//! use testudo_virtio::backend::{Overlay, ReadOnlyImage};
//! use testudo_virtio::device::{Blk, BlkOptions};
//! use testudo_virtio::transport::{Mmio, Options};
//!
//! struct Controllers;
//! impl InterruptSink for Controllers {
//!     fn set_level(&self, _gsi: u32, _high: bool) {}
//!     fn send_msi(&self, _msi: Msi) {}
//! }
//!
//! // A disk that the guest may write, over an image that stays as it is.
//! let disk = Blk::new(Overlay::new(ReadOnlyImage([0; 4096]), 1 << 20), BlkOptions::default());
//! let memory = GuestRam::new();
//! let mut device = Mmio::new(
//!     Box::new(disk), memory, Options::default(), Arc::new(Controllers), 5);
//!
//! let mut magic = [0; 4];
//! device.read(0, &mut magic);
//! assert_eq!(&magic, b"virt");
//! ```
//!
//! Work happens in two places: in the bus write that carries the driver's notification, and in
//! `poll`, which the owner calls when a backend has something or time has passed. Each call does a
//! bounded amount of work.
#![no_std]

extern crate alloc;
#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod backend;
pub mod device;
#[cfg(any(test, feature = "driver"))]
pub mod driver;
mod feature;
pub mod queue;
pub mod transport;

pub use device::{Device, DeviceError, DeviceId, Io, Next};
pub use feature::Features;
pub use queue::{Chain, Queue, QueueConfig, QueueError, Segment, Token};
