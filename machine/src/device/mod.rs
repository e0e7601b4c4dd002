//! The devices of the virtual PC.
//!
//! A device is a state machine over its registers: it takes the time from [`Host`], drives
//! interrupts through an [`IrqLine`](crate::irq::IrqLine), and tells the machine to stop or reset
//! through a [`PowerSignal`]. Nothing a guest writes makes one panic, allocate or wait.
//!
//! Devices with a clock compute their counters when they are looked at. What must happen by
//! itself has a deadline ([`Deadline`]), and the loop of vCPU 0 polls when it has passed
//! ([`DeviceTimers`]).
//!
//! [`Host`]: crate::Host

pub mod pci;
pub mod pit;
pub mod pm;
pub mod power;
pub mod rtc;
mod timers;
pub mod uart;

pub use power::{PowerEvent, PowerSignal};
pub use timers::{Clocked, Deadline, DeviceTimers, SharedClock};

/// Reads from a device whose ports are 8 bits wide: wider accesses become accesses to
/// consecutive ports, as on the ISA bus.
#[inline]
fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (byte, offset) in data.iter_mut().zip(offset..) {
        *byte = read(offset);
    }
}

/// Writes to a device whose ports are 8 bits wide.
#[inline]
fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (byte, offset) in data.iter().zip(offset..) {
        write(offset, *byte);
    }
}

/// `value` of one clock in units of `to` per unit of `from`, rounded down and saturated.
fn scale(value: u64, to: u64, from: u64) -> u64 {
    let scaled = u128::from(value) * u128::from(to) / u128::from(from);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// As [`scale`], but rounded up.
fn scale_up(value: u64, to: u64, from: u64) -> u64 {
    let scaled = (u128::from(value) * u128::from(to)).div_ceil(u128::from(from));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

const NS_PER_SECOND: u64 = 1_000_000_000;
