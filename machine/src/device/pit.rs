//! The 8254 programmable interval timer (Intel 8254 data sheet, order number 231164), and the part
//! of port 0x61 that belongs to it.
//!
//! Nothing counts: each channel knows when its count was loaded, and what its counter and output
//! are follows from the time that has passed. Counts are loaded at once, not with the next clock.
//! Of the interrupts that a guest could not be given in time only one is delivered: what counts
//! them as time must look at a counter.

use alloc::sync::Arc;

use testudo_arch::bus::BusDevice;

use super::{Clocked, Deadline, NS_PER_SECOND, read_bytes, scale, scale_up, write_bytes};
use crate::bus::SharedDevice;
use crate::host::Host;
use crate::irq::{IrqLine, Irqchip};

/// The input clock, in Hz.
pub const FREQUENCY: u64 = 1_193_182;

/// Which bytes of a count an access means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

/// Whether a channel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// No count, or no trigger, since the control word.
    Idle,
    /// Since this tick.
    Since(u64),
    /// The gate stopped it after this many ticks.
    Stopped(u64),
}

#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    bcd: bool,
    bytes: Bytes,
    gate: bool,
    /// 1 to 65,536.
    count: u64,
    run: Run,
    /// A count that takes effect at the end of the period (modes 2 and 3).
    next_count: Option<u64>,
    /// A count was written that the counter has not taken yet.
    null: bool,
    /// The low byte of a count whose high byte is still to be written.
    low_byte: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    const fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            bytes: Bytes::Both,
            gate,
            count: 0x1_0000,
            run: Run::Idle,
            next_count: None,
            null: true,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    const fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Whether a rising gate starts the count rather than a written count (modes 1 and 5).
    const fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    const fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, tick: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => Some(tick.saturating_sub(start)),
            Run::Stopped(elapsed) => Some(elapsed),
        }
    }

    /// Lets a count that waits for the end of the period take effect, if the end has come.
    fn settle(&mut self, tick: u64) {
        if let (Run::Since(start), Some(next)) = (self.run, self.next_count) {
            let periods = tick.saturating_sub(start) / self.count;
            // The write happened in the period in which it was stored, so the first end counts.
            if periods > 0 {
                self.run = Run::Since(start + self.count);
                self.take(next);
            }
        }
    }

    fn take(&mut self, count: u64) {
        self.count = count;
        self.next_count = None;
        self.null = false;
    }

    /// The output pin.
    fn output(&self, tick: u64) -> bool {
        let Some(elapsed) = self.elapsed(tick) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= self.count,
            // A stopped gate holds the output of the periodic modes high.
            2 | 3 if !self.gate => true,
            2 => elapsed % self.count != self.count - 1,
            3 => elapsed % self.count < self.count.div_ceil(2),
            _ => elapsed != self.count,
        }
    }

    /// The counter's value, as it is read.
    fn value(&self, tick: u64) -> u16 {
        let modulus = self.modulus();
        let value = match self.elapsed(tick) {
            None => self.count % modulus,
            Some(elapsed) if self.periodic() => {
                let speed = u64::from(self.mode - 1);
                (self.count - elapsed.wrapping_mul(speed) % self.count) % modulus
            }
            Some(elapsed) => (self.count + modulus - elapsed % modulus) % modulus,
        };
        if self.bcd {
            to_bcd(value)
        } else {
            value as u16
        }
    }

    /// The first rising edge of the output after `elapsed` ticks, in ticks since the count was
    /// loaded.
    fn next_edge(&self, elapsed: u64) -> Option<u64> {
        let once = |at| (elapsed < at).then_some(at);
        match self.mode {
            0 | 1 => once(self.count),
            2 | 3 => Some((elapsed / self.count + 1).saturating_mul(self.count)),
            _ => once(self.count + 1),
        }
    }

    fn status(&self, tick: u64) -> u8 {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        u8::from(self.output(tick)) << 7
            | u8::from(self.null) << 6
            | bytes << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn control(&mut self, control: u8, tick: u64) {
        let bytes = match control >> 4 & 3 {
            0 => return self.latch_count(tick),
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        let mode = control >> 1 & 7;
        *self = Self {
            // Bit 2 of the mode is ignored for modes 2 and 3.
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: control & 1 != 0,
            bytes,
            count: self.count,
            ..Self::new(self.gate)
        };
    }

    fn latch_count(&mut self, tick: u64) {
        // A second latch command before the first one was read is ignored.
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(tick));
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.value(tick))
            .to_le_bytes();
        let (byte, last) = match self.bytes {
            Bytes::Low => (low, true),
            Bytes::High => (high, true),
            Bytes::Both if self.read_high => (high, true),
            Bytes::Both => (low, false),
        };
        self.read_high = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    fn write(&mut self, byte: u8, tick: u64) {
        let value = match (self.bytes, self.low_byte.take()) {
            (Bytes::Low, _) => u16::from(byte),
            (Bytes::High, _) => u16::from(byte) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Bytes::Both, None) => {
                self.low_byte = Some(byte);
                self.null = true;
                // In mode 0 the first byte stops the count and lowers the output.
                if self.mode == 0 {
                    self.run = Run::Idle;
                }
                return;
            }
        };
        let value = if self.bcd {
            from_bcd(value)
        } else {
            u64::from(value)
        };
        let mut count = if value == 0 { self.modulus() } else { value };
        if self.periodic() {
            // A count of one is not defined for these modes.
            count = count.max(2);
        }
        self.load(count, tick);
    }

    fn load(&mut self, count: u64, tick: u64) {
        match self.run {
            // The new count waits for the end of the period.
            Run::Since(_) if self.periodic() => {
                self.next_count = Some(count);
                self.null = true;
            }
            // The new count waits for a trigger.
            _ if self.triggered() => {
                self.next_count = Some(count);
                self.null = true;
            }
            _ => {
                self.take(count);
                self.run = if self.gate {
                    Run::Since(tick)
                } else {
                    Run::Stopped(0)
                };
            }
        }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        match self.run {
            // Without a count since the control word there is nothing to start.
            Run::Idle if self.next_count.is_none() => {}
            _ if rising && self.triggered() => {
                let count = self.next_count.unwrap_or(self.count);
                self.take(count);
                self.run = Run::Since(tick);
            }
            Run::Since(start) if falling && !self.triggered() => {
                self.run = Run::Stopped(tick.saturating_sub(start));
            }
            Run::Stopped(elapsed) if rising => {
                let elapsed = if self.periodic() { 0 } else { elapsed };
                if self.periodic() {
                    let count = self.next_count.unwrap_or(self.count);
                    self.take(count);
                }
                self.run = Run::Since(tick.saturating_sub(elapsed));
            }
            _ => {}
        }
    }
}

fn to_bcd(value: u64) -> u16 {
    [1000, 100, 10, 1]
        .iter()
        .fold(0, |bcd, place| bcd << 4 | (value / place % 10) as u16)
}

/// Digits above nine count as what they weigh, as the counter's digits do, up to 9,999.
fn from_bcd(value: u16) -> u64 {
    let digits = [12, 8, 4, 0]
        .iter()
        .fold(0, |sum, shift| sum * 10 + u64::from(value >> shift & 0xF));
    digits.min(9_999)
}

/// The interval timer. Channel 0 interrupts, channel 1 once refreshed memory, channel 2 drives the
/// speaker.
pub struct Pit {
    host: Arc<dyn Host>,
    irq: IrqLine,
    irq_high: bool,
    channels: [Channel; 3],
    /// The tick up to which channel 0's edges have been delivered.
    polled: u64,
    /// No poll before this time: a guest that asks for more interrupts loses them.
    earliest: u64,
    deadline: Arc<Deadline>,
    /// The bits of port 0x61 that can be written.
    port_61: u8,
}

impl Pit {
    /// The first port.
    pub const PORT: u16 = 0x40;
    /// The number of ports.
    pub const PORTS: u16 = 4;
    /// The least time between two of channel 0's interrupts, in nanoseconds.
    const MIN_PERIOD: u64 = 20_000;

    /// The timer of a machine with the interrupt controllers `chip`; channel 0 interrupts through
    /// `irq`, a wire to [`Irqchip::TIMER_GSI`].
    pub fn new(chip: &Arc<Irqchip>, irq: IrqLine) -> Self {
        Self {
            host: chip.host().clone(),
            irq,
            irq_high: false,
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            polled: 0,
            earliest: 0,
            deadline: Deadline::new(chip),
            port_61: 0,
        }
    }

    fn tick_at(ns: u64) -> u64 {
        scale(ns, FREQUENCY, NS_PER_SECOND)
    }

    /// The tick now, with everything delivered that was due.
    fn advance(&mut self, now: u64) -> u64 {
        let tick = Self::tick_at(now);
        let channel = &mut self.channels[0];
        let edge = channel.elapsed(tick).is_some_and(|elapsed| {
            let since = self.polled.saturating_sub(tick - elapsed);
            matches!(channel.run, Run::Since(_))
                && channel.next_edge(since).is_some_and(|at| at <= elapsed)
        });
        for channel in &mut self.channels {
            channel.settle(tick);
        }
        self.polled = tick;
        if edge {
            self.earliest = now.saturating_add(Self::MIN_PERIOD);
            // The edge, whatever the level was before and is now.
            self.set_irq(false);
            self.set_irq(true);
        }
        tick
    }

    fn set_irq(&mut self, high: bool) {
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    /// Drives the interrupt as the output stands, and says when it will rise next.
    fn finish(&mut self, tick: u64) {
        let channel = &self.channels[0];
        let high = channel.output(tick);
        let next = match channel.run {
            Run::Since(start) => channel
                .next_edge(tick.saturating_sub(start))
                .map(|edge| start.saturating_add(edge)),
            _ => None,
        };
        self.set_irq(high);
        let at = next.map(|tick| scale_up(tick, NS_PER_SECOND, FREQUENCY).max(self.earliest));
        self.deadline.set(at);
    }

    fn control(&mut self, value: u8, tick: u64) {
        match value >> 6 {
            3 => {
                // Read-back: bits 1 to 3 choose the channels; a clear bit asks for its latch.
                for (i, channel) in self.channels.iter_mut().enumerate() {
                    if value >> (i + 1) & 1 != 0 {
                        if value & 1 << 5 == 0 {
                            channel.latch_count(tick);
                        }
                        if value & 1 << 4 == 0 {
                            channel.latch_status(tick);
                        }
                    }
                }
            }
            channel => self.channels[usize::from(channel)].control(value, tick),
        }
    }

    fn read_61(&mut self) -> u8 {
        /// The time between two refreshes of memory, in nanoseconds.
        const REFRESH: u64 = 15_085;
        let now = self.host.now();
        let tick = self.advance(now);
        let value = self.port_61
            | (((now / REFRESH) & 1) as u8) << 4
            | u8::from(self.channels[2].output(tick)) << 5;
        self.finish(tick);
        value
    }

    fn write_61(&mut self, value: u8) {
        let tick = self.advance(self.host.now());
        self.port_61 = value & 0xF;
        self.channels[2].set_gate(value & 1 != 0, tick);
        self.finish(tick);
    }
}

impl Clocked for Pit {
    fn deadline(&self) -> &Arc<Deadline> {
        &self.deadline
    }

    fn poll(&mut self, now: u64) {
        let tick = self.advance(now);
        self.finish(tick);
    }
}

impl BusDevice for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let tick = self.advance(self.host.now());
        read_bytes(offset, data, |port| match port {
            0..3 => self.channels[port as usize].read(tick),
            // The control word cannot be read.
            _ => 0xFF,
        });
        self.finish(tick);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let tick = self.advance(self.host.now());
        write_bytes(offset, data, |port, value| match port {
            0..3 => self.channels[port as usize].write(value, tick),
            _ => self.control(value, tick),
        });
        self.finish(tick);
    }
}

/// Port 0x61, system control port B: channel 2's gate (bit 0), the speaker (bit 1), memory refresh
/// (bit 4, alternating) and channel 2's output (bit 5).
pub struct SystemControlB(Arc<spin::Mutex<Pit>>);

impl SystemControlB {
    /// The port.
    pub const PORT: u16 = 0x61;

    /// The port that goes with `pit`.
    pub fn new(pit: Arc<spin::Mutex<Pit>>) -> Self {
        Self(pit)
    }
}

impl SharedDevice for SystemControlB {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let [first, ..] = data {
            *first = self.0.lock().read_61();
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [value, ..] = data {
            self.0.lock().write_61(*value);
        }
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
