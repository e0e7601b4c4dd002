//! The I/O APIC (82093AA data sheet, order number 290566; version 0x20 with the EOI register as in
//! the I/O controller hubs).

use super::message::{DeliveryMode, Destination, Message};

/// The number of inputs.
pub(super) const PINS: usize = 24;

const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const DELIVERY_STATUS: u64 = 1 << 12;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;
const WRITABLE: u64 = 0xFF00_0000_0001_FFFF & !READ_ONLY;

/// Where the I/O APIC sends its messages: whether one local APIC at least took it.
pub(super) trait Bus {
    fn deliver(&self, message: Message) -> bool;
}

impl<F: Fn(Message) -> bool> Bus for F {
    fn deliver(&self, message: Message) -> bool {
        self(message)
    }
}

/// The I/O APIC.
///
/// An edge on a masked input is lost, as the data sheet says. A level-triggered input sends one
/// message and waits (remote IRR) until the end of that interrupt, and sends another one if the
/// line is still active then.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    id: u8,
    select: u8,
    redirection: [u64; PINS],
    /// The levels of the inputs.
    lines: u32,
}

impl IoApic {
    pub(super) const fn new(id: u8) -> Self {
        Self {
            id: id & 0xF,
            select: 0,
            redirection: [MASKED; PINS],
            lines: 0,
        }
    }

    /// The redirection entry of an input.
    #[cfg(test)]
    pub(super) fn entry(&self, pin: usize) -> u64 {
        self.redirection[pin]
    }

    /// Whether an input is active, its polarity considered.
    #[inline]
    fn active(&self, pin: usize) -> bool {
        let low = self.redirection[pin] & ACTIVE_LOW != 0;
        (self.lines >> pin & 1 != 0) != low
    }

    fn level_triggered(entry: u64) -> bool {
        let fixed = matches!(
            DeliveryMode::from_bits((entry >> 8) as u32),
            DeliveryMode::Fixed | DeliveryMode::LowestPriority
        );
        fixed && entry & LEVEL != 0
    }

    fn send(&mut self, pin: usize, bus: &impl Bus) {
        let entry = self.redirection[pin];
        let level = Self::level_triggered(entry);
        let accepted = bus.deliver(Message {
            destination: Destination::from_field8((entry >> 56) as u8, entry & 1 << 11 != 0),
            mode: DeliveryMode::from_bits((entry >> 8) as u32),
            vector: entry as u8,
            level,
        });
        if level && accepted {
            self.redirection[pin] |= REMOTE_IRR;
        }
    }

    /// Sends for a level-triggered input that is active, unmasked and not waiting for its end.
    fn serve_level(&mut self, pin: usize, bus: &impl Bus) {
        let entry = self.redirection[pin];
        if Self::level_triggered(entry) && entry & (MASKED | REMOTE_IRR) == 0 && self.active(pin) {
            self.send(pin, bus);
        }
    }

    pub(super) fn set_line(&mut self, pin: usize, high: bool, bus: &impl Bus) {
        let Some(&entry) = self.redirection.get(pin) else {
            return;
        };
        let was_active = self.active(pin);
        self.lines = self.lines & !(1 << pin) | u32::from(high) << pin;
        if Self::level_triggered(entry) {
            self.serve_level(pin, bus);
        } else if !was_active && self.active(pin) && entry & MASKED == 0 {
            self.send(pin, bus);
        }
    }

    /// The end of an interrupt, broadcast by a local APIC or written to the EOI register.
    pub(super) fn end_of_interrupt(&mut self, vector: u8, bus: &impl Bus) {
        for pin in 0..PINS {
            let entry = self.redirection[pin];
            if entry as u8 == vector && entry & REMOTE_IRR != 0 {
                self.redirection[pin] &= !REMOTE_IRR;
                self.serve_level(pin, bus);
            }
        }
    }

    /// Reads from the window; registers are 32 bits wide at offsets 0, 0x10, 0x40.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => u32::from(self.select),
            0x10 => self.read_register(),
            _ => 0,
        }
    }

    /// Writes to the window.
    pub(super) fn write(&mut self, offset: u64, value: u32, bus: &impl Bus) {
        match offset {
            0x00 => self.select = value as u8,
            0x10 => self.write_register(value, bus),
            0x40 => self.end_of_interrupt(value as u8, bus),
            _ => {}
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            index @ 0x10..=0x3F => {
                let entry = self.redirection[usize::from(index - 0x10) / 2];
                (if index & 1 != 0 { entry >> 32 } else { entry }) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32, bus: &impl Bus) {
        match self.select {
            0 => self.id = (value >> 24) as u8 & 0xF,
            index @ 0x10..=0x3F => {
                let pin = usize::from(index - 0x10) / 2;
                let old = self.redirection[pin];
                let new = if index & 1 != 0 {
                    u64::from(value) << 32 | old & 0xFFFF_FFFF
                } else {
                    old & !0xFFFF_FFFF | u64::from(value)
                };
                let mut entry = new & WRITABLE | old & REMOTE_IRR;
                // An edge-triggered entry waits for no end: guests without the EOI register
                // clear the bit in this way.
                if entry & LEVEL == 0 {
                    entry &= !REMOTE_IRR;
                }
                self.redirection[pin] = entry;
                self.serve_level(pin, bus);
            }
            _ => {}
        }
    }
}

const _: () = assert!(0x10 + 2 * PINS == 0x40);

#[cfg(test)]
#[path = "ioapic_tests.rs"]
mod tests;
