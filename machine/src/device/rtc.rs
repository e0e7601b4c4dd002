//! The MC146818 real-time clock and its battery-backed memory (Motorola MC146818 data sheet; the
//! extensions of the PC/AT).
//!
//! The date and time follow from the host's clock and a start value; flags and interrupts from what
//! has passed since they were looked at. The day of the week follows from the date.

use alloc::sync::Arc;

use testudo_arch::bus::BusDevice;

use super::{Clocked, Deadline, NS_PER_SECOND, scale, scale_up};
use crate::host::Host;
use crate::irq::{IrqLine, Irqchip};

/// Registers by index.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0A;
    pub(super) const B: u8 = 0x0B;
    pub(super) const C: u8 = 0x0C;
    pub(super) const D: u8 = 0x0D;
    pub(super) const CENTURY: u8 = 0x32;
}

const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Bits of register B.
mod control {
    pub(super) const SET: u8 = 1 << 7;
    pub(super) const BINARY: u8 = 1 << 2;
    pub(super) const HOURS_24: u8 = 1 << 1;
}
/// Bits of register C, and of B where they are enabled.
mod flag {
    pub(super) const REQUEST: u8 = 1 << 7;
    pub(super) const PERIODIC: u8 = 1 << 6;
    pub(super) const ALARM: u8 = 1 << 5;
    pub(super) const UPDATE: u8 = 1 << 4;
    pub(super) const ALL: u8 = PERIODIC | ALARM | UPDATE;
}
const VALID_RAM_AND_TIME: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// A date and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const DAY: u64 = 86_400;

impl Civil {
    /// From seconds since the start of 1970, in the Gregorian calendar.
    fn from_unix(seconds: u64) -> Self {
        let (days, time) = (seconds / DAY, seconds % DAY);
        // Days since 1 March of the year 0, in eras of 400 years; the year starts in March, so
        // that the leap day is its last.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (time / 3_600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// Seconds since the start of 1970. Fields out of their range count on; what is before 1970
    /// is 1970.
    fn to_unix(self) -> u64 {
        let month = u64::from(self.month.clamp(1, 12));
        let year = self.year.max(1970) - u64::from(month <= 2);
        let (era, year_of_era) = (year / 400, year % 400);
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * march_month + 2) / 5 + u64::from(self.day.max(1)) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * DAY
            + u64::from(self.hour) * 3_600
            + u64::from(self.minute) * 60
            + u64::from(self.second)
    }
}

/// The real-time clock with its 128 bytes of memory.
pub struct Rtc {
    host: Arc<dyn Host>,
    irq: IrqLine,
    irq_high: bool,
    deadline: Arc<Deadline>,
    index: u8,
    ram: [u8; 128],
    /// Unix time at `base_ns`.
    base_seconds: u64,
    base_ns: u64,
    /// The time that is being set, while updates are inhibited.
    frozen: Option<Civil>,
    flags: u8,
    /// Up to when `flags` is right.
    seen_ns: u64,
}

impl Rtc {
    /// The first port.
    pub const PORT: u16 = 0x70;
    /// The number of ports.
    pub const PORTS: u16 = 2;
    /// The frequency that periodic interrupts are divided from.
    const CRYSTAL: u64 = 32_768;
    /// For how long before an update it is announced.
    const UPDATE_WINDOW: u64 = 244_000;

    /// The clock of a machine with the interrupt controllers `chip`, which reads `unix_time` now,
    /// and interrupts through `irq` ([`RTC_GSI`](crate::layout::RTC_GSI)). The memory tells of
    /// `ram` bytes of main memory in the way of a PC's firmware.
    pub fn new(chip: &Arc<Irqchip>, irq: IrqLine, unix_time: u64, ram: u64) -> Self {
        let host = chip.host().clone();
        let now = host.now();
        let mut rtc = Self {
            host,
            irq,
            irq_high: false,
            deadline: Deadline::new(chip),
            index: 0,
            ram: [0; 128],
            // Up to the year 9999, which four digits can show.
            base_seconds: unix_time.min(253_402_300_799),
            base_ns: now,
            frozen: None,
            flags: 0,
            seen_ns: now,
        };
        // A 32.768 kHz crystal, 1024 Hz; 24 hours.
        rtc.ram[usize::from(register::A)] = 0x26;
        rtc.ram[usize::from(register::B)] = control::HOURS_24;
        rtc.set_memory_size(ram);
        rtc
    }

    /// The memory-size bytes: 640 KiB, what is above 1 MiB in KiB (twice), above 16 MiB in units of
    /// 64 KiB, and above 4 GiB in units of 64 KiB. Each field saturates.
    fn set_memory_size(&mut self, ram: u64) {
        let low = ram.min(crate::layout::LOW_RAM_LIMIT);
        let extended = (low.saturating_sub(1 << 20) >> 10).min(0xFFFF) as u16;
        let above_16m = (low.saturating_sub(16 << 20) >> 16).min(0xFFFF) as u16;
        let above_4g = (ram.saturating_sub(low) >> 16).min(0xFF_FFFF) as u32;
        self.ram[0x15..0x17].copy_from_slice(&640u16.to_le_bytes());
        self.ram[0x17..0x19].copy_from_slice(&extended.to_le_bytes());
        self.ram[0x30..0x32].copy_from_slice(&extended.to_le_bytes());
        self.ram[0x34..0x36].copy_from_slice(&above_16m.to_le_bytes());
        self.ram[0x5B..0x5E].copy_from_slice(&above_4g.to_le_bytes()[..3]);
    }

    fn reg_b(&self) -> u8 {
        self.ram[usize::from(register::B)]
    }

    /// Unix time at `ns`.
    fn seconds_at(&self, ns: u64) -> u64 {
        self.base_seconds + ns.saturating_sub(self.base_ns) / NS_PER_SECOND
    }

    /// When Unix time becomes `seconds`.
    fn ns_of(&self, seconds: u64) -> u64 {
        let ahead = seconds.saturating_sub(self.base_seconds);
        self.base_ns
            .saturating_add(ahead.saturating_mul(NS_PER_SECOND))
    }

    fn civil(&self, now: u64) -> Civil {
        self.frozen
            .unwrap_or_else(|| Civil::from_unix(self.seconds_at(now)))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.reg_b() & control::BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.reg_b() & control::BINARY != 0 {
            value
        } else {
            (value >> 4).saturating_mul(10).saturating_add(value & 0xF)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg_b() & control::HOURS_24 != 0 {
            return self.encode(hour);
        }
        let half = self.encode((hour + 11) % 12 + 1);
        if hour >= 12 { half | PM } else { half }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.reg_b() & control::HOURS_24 != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & !PM) % 12;
        if value & PM != 0 { hour + 12 } else { hour }
    }

    /// The first time after `after` at which the alarm matches, both in Unix time.
    fn next_alarm(&self, after: u64) -> Option<u64> {
        // A field with both upper bits set matches always.
        let field = |register: u8, hour: bool, limit: u8| {
            let raw = self.ram[usize::from(register)];
            match raw {
                0xC0.. => Some(None),
                _ if hour => Some(Some(self.decode_hour(raw))),
                _ => Some(Some(self.decode(raw))),
            }
            .filter(|value| value.is_none_or(|value| value < limit))
        };
        let hours = field(register::HOURS_ALARM, true, 24)?;
        let minutes = field(register::MINUTES_ALARM, false, 60)?;
        let seconds = field(register::SECONDS_ALARM, false, 60)?;
        let matches = |pattern: Option<u8>, value: u64| {
            pattern.is_none_or(|wanted| u64::from(wanted) == value)
        };
        let first = after + 1;
        let midnight = first - first % DAY;
        for day in [midnight, midnight + DAY] {
            let start = first.max(day) - day;
            for hour in (start / 3_600..24).filter(|h| matches(hours, *h)) {
                let start = start.max(hour * 3_600) - hour * 3_600;
                for minute in (start / 60..60).filter(|m| matches(minutes, *m)) {
                    let start = start.max(minute * 60) - minute * 60;
                    if let Some(second) = (start..60).find(|s| matches(seconds, *s)) {
                        return Some(day + hour * 3_600 + minute * 60 + second);
                    }
                }
            }
        }
        None
    }

    /// The period of the periodic interrupt, in ticks of the crystal.
    fn period(&self) -> Option<u64> {
        match self.ram[usize::from(register::A)] & 0xF {
            0 => None,
            // The two lowest rates of this crystal repeat two others.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Sets the flags for what happened until `now`.
    fn settle(&mut self, now: u64) {
        let seen = self.seen_ns;
        self.seen_ns = now.max(seen);
        if let Some(period) = self.period() {
            let ticks = |ns| scale(ns, Self::CRYSTAL, NS_PER_SECOND) / period;
            if ticks(now) > ticks(seen) {
                self.flags |= flag::PERIODIC;
            }
        }
        if self.frozen.is_none() {
            let (before, after) = (self.seconds_at(seen), self.seconds_at(now));
            if after > before {
                self.flags |= flag::UPDATE;
                if self.next_alarm(before).is_some_and(|at| at <= after) {
                    self.flags |= flag::ALARM;
                }
            }
        }
    }

    /// Drives the interrupt, and says when a flag will next be set that interrupts.
    fn finish(&mut self, now: u64) {
        let enabled = self.reg_b() & flag::ALL;
        let high = self.flags & enabled != 0;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
        // While the request is up no further edge can come.
        let waits = |bit| !high && enabled & bit != 0;
        let periodic = self
            .period()
            .filter(|_| waits(flag::PERIODIC))
            .map(|period| {
                let tick = (scale(now, Self::CRYSTAL, NS_PER_SECOND) / period + 1) * period;
                scale_up(tick, NS_PER_SECOND, Self::CRYSTAL)
            });
        let running = self.frozen.is_none();
        let seconds = self.seconds_at(now);
        let update = (running && waits(flag::UPDATE)).then(|| self.ns_of(seconds + 1));
        let alarm = (running && waits(flag::ALARM))
            .then(|| self.next_alarm(seconds))
            .flatten()
            .map(|at| self.ns_of(at));
        self.deadline
            .set([periodic, update, alarm].into_iter().flatten().min());
    }

    fn read_register(&mut self, now: u64) -> u8 {
        let time = self.civil(now);
        match self.index {
            register::SECONDS => self.encode(time.second),
            register::MINUTES => self.encode(time.minute),
            register::HOURS => self.encode_hour(time.hour),
            // 1 January 1970 was a Thursday; Sunday is 1.
            register::WEEKDAY => self.encode(((time.to_unix() / DAY + 4) % 7 + 1) as u8),
            register::DAY => self.encode(time.day),
            register::MONTH => self.encode(time.month),
            register::YEAR => self.encode((time.year % 100) as u8),
            register::CENTURY => self.encode((time.year / 100 % 100) as u8),
            register::A => {
                let left = NS_PER_SECOND - (now.saturating_sub(self.base_ns)) % NS_PER_SECOND;
                let updating = self.frozen.is_none() && left <= Self::UPDATE_WINDOW;
                self.ram[usize::from(register::A)] | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            register::C => {
                let flags = core::mem::take(&mut self.flags);
                let request = flags & self.reg_b() & flag::ALL != 0;
                flags | if request { flag::REQUEST } else { 0 }
            }
            register::D => VALID_RAM_AND_TIME,
            index => self.ram[usize::from(index)],
        }
    }

    fn write_register(&mut self, value: u8, now: u64) {
        match self.index {
            register::SECONDS
            | register::MINUTES
            | register::HOURS
            | register::WEEKDAY..=register::YEAR
            | register::CENTURY => self.write_time(value, now),
            register::A => self.ram[usize::from(register::A)] = value & !UPDATE_IN_PROGRESS,
            register::B => self.write_b(value, now),
            register::C | register::D => {}
            index => self.ram[usize::from(index)] = value,
        }
    }

    fn write_time(&mut self, value: u8, now: u64) {
        let mut time = self.civil(now);
        let number = self.decode(value);
        match self.index {
            register::SECONDS => time.second = number,
            register::MINUTES => time.minute = number,
            register::HOURS => time.hour = self.decode_hour(value),
            register::DAY => time.day = number,
            register::MONTH => time.month = number,
            register::YEAR => time.year = time.year / 100 * 100 + u64::from(number),
            register::CENTURY => time.year = u64::from(number) * 100 + time.year % 100,
            _ => return,
        }
        match &mut self.frozen {
            Some(frozen) => *frozen = time,
            None => self.set_time(time, now, self.phase(now)),
        }
    }

    /// How long ago the running second began.
    fn phase(&self, now: u64) -> u64 {
        now.saturating_sub(self.base_ns) % NS_PER_SECOND
    }

    fn set_time(&mut self, time: Civil, now: u64, phase: u64) {
        self.base_seconds = time.to_unix();
        self.base_ns = now.saturating_sub(phase);
        // A jump is no passing of seconds.
        self.seen_ns = now;
    }

    fn write_b(&mut self, value: u8, now: u64) {
        let time = self.civil(now);
        // Setting SET clears the update-ended interrupt's enable bit.
        let value = if value & control::SET != 0 {
            value & !flag::UPDATE
        } else {
            value
        };
        self.ram[usize::from(register::B)] = value;
        match (value & control::SET != 0, self.frozen) {
            (true, None) => self.frozen = Some(time),
            (false, Some(time)) => {
                self.frozen = None;
                self.set_time(time, now, 0);
            }
            _ => {}
        }
    }
}

impl Clocked for Rtc {
    fn deadline(&self) -> &Arc<Deadline> {
        &self.deadline
    }

    fn poll(&mut self, now: u64) {
        self.settle(now);
        self.finish(now);
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.host.now();
        self.settle(now);
        // The index port cannot be read.
        super::read_bytes(offset, data, |port| match port {
            1 => self.read_register(now),
            _ => 0xFF,
        });
        self.finish(now);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = self.host.now();
        self.settle(now);
        super::write_bytes(offset, data, |port, value| match port {
            // Bit 7 masks NMI.
            0 => self.index = value & 0x7F,
            _ => self.write_register(value, now),
        });
        self.finish(now);
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
