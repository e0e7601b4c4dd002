//! ACPI fixed hardware: the PM1a blocks, the power-management timer and one general-purpose event
//! block (ACPI 6.5, 4.8.3 and 4.8.4).
//!
//! The machine is in ACPI mode from the start: SCI_EN reads one and there is no SMI command port.

use alloc::sync::Arc;

use testudo_arch::bus::BusDevice;

use super::power::{PowerEvent, PowerSignal};
use super::{Clocked, Deadline, NS_PER_SECOND, scale, scale_up};
use crate::host::Host;
use crate::irq::{IrqLine, Irqchip};
use crate::layout;

/// The frequency of the timer, in Hz.
pub const TIMER_FREQUENCY: u64 = 3_579_545;

/// Bits of the PM1 status and enable registers (ACPI 6.5, tables 4.12 and 4.13).
mod event {
    pub(super) const TIMER: u16 = 1 << 0;
    pub(super) const GLOBAL: u16 = 1 << 5;
    pub(super) const POWER_BUTTON: u16 = 1 << 8;
    pub(super) const SLEEP_BUTTON: u16 = 1 << 9;
    pub(super) const CLOCK: u16 = 1 << 10;
    pub(super) const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | CLOCK;
}

/// Bits of the PM1 control register (ACPI 6.5, table 4.14).
mod control {
    pub(super) const SCI_ENABLE: u16 = 1 << 0;
    pub(super) const BUS_MASTER_RELOAD: u16 = 1 << 1;
    pub(super) const SLEEP_TYPE: u16 = 7 << 10;
    pub(super) const SLEEP_ENABLE: u16 = 1 << 13;
}

/// Offsets in the window.
const EVENT_STATUS: u64 = 0;
const EVENT_ENABLE: u64 = 2;
const CONTROL: u64 = (layout::PM1A_CONTROL - layout::PM1A_EVENT) as u64;
const TIMER: u64 = (layout::PM_TIMER - layout::PM1A_EVENT) as u64;
const GPE_STATUS: u64 = (layout::GPE0 - layout::PM1A_EVENT) as u64;
const GPE_ENABLE: u64 = GPE_STATUS + layout::GPE0_LEN as u64 / 2;

/// The fixed hardware, all in one window of ports.
pub struct PowerManagement {
    host: Arc<dyn Host>,
    power: Arc<PowerSignal>,
    sci: IrqLine,
    sci_high: bool,
    deadline: Arc<Deadline>,
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// How often the timer's most significant bit had changed when last looked at.
    carries: u64,
}

impl PowerManagement {
    /// The first port.
    pub const PORT: u16 = layout::PM1A_EVENT;
    /// The number of ports.
    pub const PORTS: u16 = layout::GPE0 + layout::GPE0_LEN as u16 - layout::PM1A_EVENT;
    /// The number of general-purpose events.
    pub const EVENTS: u8 = layout::GPE0_LEN / 2 * 8;

    /// The fixed hardware of a machine with the interrupt controllers `chip`, which interrupts
    /// through `sci`, a wire to [`SCI_GSI`](layout::SCI_GSI).
    pub fn new(chip: &Arc<Irqchip>, sci: IrqLine, power: Arc<PowerSignal>) -> Self {
        let host = chip.host().clone();
        let carries = Self::ticks(host.now()) >> 31;
        Self {
            host,
            power,
            sci,
            sci_high: false,
            deadline: Deadline::new(chip),
            status: 0,
            enable: 0,
            control: control::SCI_ENABLE,
            gpe_status: 0,
            gpe_enable: 0,
            carries,
        }
    }

    /// Presses the power button, by which a guest is asked to shut down.
    pub fn press_power_button(&mut self) {
        self.status |= event::POWER_BUTTON;
        self.finish();
    }

    /// Raises a general-purpose event below [`EVENTS`](Self::EVENTS); others are ignored.
    pub fn raise_event(&mut self, number: u8) {
        self.gpe_status |= 1u16.checked_shl(u32::from(number)).unwrap_or(0);
        self.finish();
    }

    fn ticks(ns: u64) -> u64 {
        scale(ns, TIMER_FREQUENCY, NS_PER_SECOND)
    }

    fn settle(&mut self, now: u64) {
        let carries = Self::ticks(now) >> 31;
        if carries != self.carries {
            self.carries = carries;
            self.status |= event::TIMER;
        }
    }

    fn finish(&mut self) {
        let high = self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0;
        if high != self.sci_high {
            self.sci_high = high;
            self.sci.set(high);
        }
        let waits = self.enable & !self.status & event::TIMER != 0;
        self.deadline
            .set(waits.then(|| scale_up((self.carries + 1) << 31, NS_PER_SECOND, TIMER_FREQUENCY)));
    }

    fn write_control(&mut self, value: u16) {
        let sleep = value & control::SLEEP_ENABLE != 0;
        let kept = control::BUS_MASTER_RELOAD | control::SLEEP_TYPE;
        self.control = control::SCI_ENABLE | value & kept;
        let sleep_type = ((value & control::SLEEP_TYPE) >> 10) as u8;
        // S5 is the only sleeping state that the tables offer.
        if sleep && sleep_type == layout::S5_SLEEP_TYPE {
            self.power.raise(PowerEvent::PowerOff);
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        // Registers are 16 bits wide; a byte keeps the other half. Status bits are cleared by
        // ones, so that half is written as zeros.
        let shift = offset as u32 % 2 * 8;
        let bits = u16::from(value) << shift;
        let merge = |old: u16| old & !(0xFF << shift) | bits;
        match offset & !1 {
            EVENT_STATUS => self.status &= !bits,
            EVENT_ENABLE => self.enable = merge(self.enable) & event::ENABLES,
            CONTROL => self.write_control(merge(self.control)),
            GPE_STATUS => self.gpe_status &= !bits,
            GPE_ENABLE => self.gpe_enable = merge(self.gpe_enable),
            _ => {}
        }
    }
}

impl Clocked for PowerManagement {
    fn deadline(&self) -> &Arc<Deadline> {
        &self.deadline
    }

    fn poll(&mut self, now: u64) {
        self.settle(now);
        self.finish();
    }
}

impl BusDevice for PowerManagement {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.host.now();
        // Systems read the timer most of all.
        let timer = (Self::ticks(now) as u32).to_le_bytes();
        if offset == TIMER && data.len() == timer.len() {
            data.copy_from_slice(&timer);
            return;
        }
        self.settle(now);
        super::read_bytes(offset, data, |offset| {
            let half = |register: u16| register.to_le_bytes()[offset as usize % 2];
            match offset {
                TIMER.. if offset - TIMER < 4 => timer[(offset - TIMER) as usize],
                _ => match offset & !1 {
                    EVENT_STATUS => half(self.status),
                    EVENT_ENABLE => half(self.enable),
                    CONTROL => half(self.control),
                    GPE_STATUS => half(self.gpe_status),
                    GPE_ENABLE => half(self.gpe_enable),
                    _ => 0xFF,
                },
            }
        });
        self.finish();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.settle(self.host.now());
        super::write_bytes(offset, data, |offset, value| self.write_byte(offset, value));
        self.finish();
    }
}

#[cfg(test)]
#[path = "pm_tests.rs"]
mod tests;
