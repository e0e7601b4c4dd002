//! The virtual PC: everything around the virtual processors.
//!
//! A [`Vcpu`] backend owns the processor mode (SVM, VMX, KVM); this crate owns what is the same
//! on all of them: the exit loop, CPUID and MSR policy, interrupt controllers, timers, buses,
//! devices, instruction emulation, ACPI tables and boot protocols. It allocates when a machine is
//! built, not while it runs, and touches the outside only through the traits [`Host`] and
//! [`testudo_arch::GuestMemory`].
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod backend;
mod board;
pub mod boot;
pub mod bus;
#[cfg(feature = "svm")]
mod code_cache;
pub mod device;
pub mod emulate;
mod guest_cpu;
pub mod host;
pub mod irq;
pub mod layout;
pub mod machine;
pub mod paged;
pub mod paging;
pub mod policy;
pub mod run;
pub mod stats;
pub mod stop;
pub mod vcpu;
pub mod virtio;

pub use host::Host;
pub use machine::{BuildError, Machine, MachineConfig};
pub use run::VcpuLoop;
pub use stop::{Stop, StopReason};
pub use vcpu::{NestedStateError, Vcpu, VcpuError, VmExit};
