//! The interrupt controllers of a PC: the PIC pair, the I/O APIC and one local APIC per vCPU.
//!
//! [`Irqchip`] is the shared half: devices drive its lines and send it messages, other vCPUs send
//! it inter-processor interrupts. It posts to a vCPU by atomic operations alone and kicks it.
//! [`Lapic`] is the half that a vCPU's loop owns: the registers, the timer, and what is in
//! service. It takes no lock except to end a level-triggered interrupt and to acknowledge one of
//! the PIC's.
//!
//! A vCPU's loop, before each entry: if [`Lapic::requests`] is not zero, [`Lapic::sync`]; if
//! [`Lapic::has_interrupt`], then [`Lapic::acknowledge`] and inject when the vCPU can take it, or
//! ask for an interrupt window.

#[cfg(test)]
pub(crate) mod fake;
mod ioapic;
mod irqchip;
mod lapic;
mod message;
mod pic;
mod port;

pub use irqchip::{IrqLine, Irqchip};
pub use lapic::{ApicMsrError, ApicState, Lapic, LapicFeatures};
pub use message::{DeliveryMode, Destination, Message};
pub use port::{ApicMode, request};
