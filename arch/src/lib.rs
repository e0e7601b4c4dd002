//! The vocabulary that the Testudo crates share.
//!
//! Addresses that cannot be confused ([`Gva`], [`Gpa`], [`Hpa`]), general and special registers,
//! segments, the events a hypervisor injects, MSR names, CPUID snapshots, and the traits through
//! which everything else reaches memory, interrupt controllers and buses.
//!
//! This crate allocates nothing, executes no privileged instruction and never panics on a value
//! that a guest chose.
#![no_std]

#[cfg(test)]
extern crate std;

mod addr;
pub mod apic;
pub mod bus;
pub mod cpuid;
pub mod event;
pub mod irq;
pub mod memory;
pub mod msr;
pub mod mtrr;
pub mod pci;
pub mod regs;
pub mod segment;
pub mod xsave;

pub use addr::{Gpa, Gva, Hpa, PAGE_SIZE, PageSize};
pub use event::{Event, Exception};
pub use memory::{FrameAlloc, FrameMem, GuestMemory, MemoryFault};
pub use msr::Msr;
pub use regs::{Gpr, Gprs};
pub use segment::{DescriptorTable, Segment};

pub use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
pub use x86_64::registers::rflags::RFlags;
pub use x86_64::registers::xcontrol::XCr0Flags;
