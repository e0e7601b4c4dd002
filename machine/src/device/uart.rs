//! The 16550A serial port (National Semiconductor PC16550D data sheet, DS008592).
//!
//! Characters take no time on the line: what a guest sends is gone at once, so the transmitter is
//! always empty. What the guest is sent waits in a bounded queue in front of the receiver's FIFO,
//! and nothing of it is lost to an overrun.

use alloc::boxed::Box;

use testudo_arch::bus::BusDevice;

use super::{read_bytes, write_bytes};
use crate::irq::IrqLine;

/// Where a serial port's output goes.
pub trait SerialSink: Send {
    /// Takes a character. It must not wait: a sink that cannot keep up buffers or drops.
    fn put(&mut self, byte: u8);
}

impl<F: FnMut(u8) + Send> SerialSink for F {
    fn put(&mut self, byte: u8) {
        self(byte);
    }
}

/// Offsets of the registers.
mod register {
    pub(super) const DATA: u64 = 0;
    pub(super) const INTERRUPT_ENABLE: u64 = 1;
    pub(super) const INTERRUPT_ID: u64 = 2;
    pub(super) const LINE_CONTROL: u64 = 3;
    pub(super) const MODEM_CONTROL: u64 = 4;
    pub(super) const LINE_STATUS: u64 = 5;
    pub(super) const MODEM_STATUS: u64 = 6;
    pub(super) const SCRATCH: u64 = 7;
}

/// Interrupt enable.
mod ier {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const TRANSMITTER: u8 = 1 << 1;
    pub(super) const LINE: u8 = 1 << 2;
    pub(super) const MODEM: u8 = 1 << 3;
}

/// Interrupt identification.
mod iir {
    pub(super) const MODEM: u8 = 0x0;
    pub(super) const NONE: u8 = 0x1;
    pub(super) const TRANSMITTER: u8 = 0x2;
    pub(super) const RECEIVED: u8 = 0x4;
    pub(super) const LINE: u8 = 0x6;
    pub(super) const TIMEOUT: u8 = 0xC;
    pub(super) const FIFOS: u8 = 0xC0;
}

/// FIFO control.
mod fcr {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const CLEAR_RECEIVER: u8 = 1 << 1;
}

/// Modem control.
mod mcr {
    pub(super) const DTR: u8 = 1 << 0;
    pub(super) const RTS: u8 = 1 << 1;
    pub(super) const OUT1: u8 = 1 << 2;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOP: u8 = 1 << 4;
}

/// Line status.
mod lsr {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    pub(super) const TRANSMITTER_EMPTY: u8 = 3 << 5;
}

/// Modem status.
mod msr {
    pub(super) const CTS: u8 = 1 << 4;
    pub(super) const DSR: u8 = 1 << 5;
    pub(super) const RI: u8 = 1 << 6;
    pub(super) const DCD: u8 = 1 << 7;
    pub(super) const RI_DELTA: u8 = 1 << 2;
    pub(super) const DELTAS: u8 = 0xF;
}

const DIVISOR_LATCH: u8 = 1 << 7;

/// A queue of at most `N` bytes.
struct Queue<const N: usize> {
    bytes: [u8; N],
    first: usize,
    len: usize,
}

impl<const N: usize> Queue<N> {
    const fn new() -> Self {
        Self {
            bytes: [0; N],
            first: 0,
            len: 0,
        }
    }

    fn push(&mut self, byte: u8) -> bool {
        let room = self.len < N;
        if room {
            self.bytes[(self.first + self.len) % N] = byte;
            self.len += 1;
        }
        room
    }

    fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.bytes[self.first];
        self.first = (self.first + 1) % N;
        self.len -= 1;
        Some(byte)
    }

    fn clear(&mut self) {
        self.len = 0;
    }
}

/// The serial port.
pub struct Uart {
    irq: IrqLine,
    irq_high: bool,
    sink: Box<dyn SerialSink>,
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    overrun: bool,
    /// The transmitter became empty, and no one has been told.
    transmitter_news: bool,
    receiver: Queue<16>,
    waiting: Box<Queue<{ Uart::INPUT }>>,
}

impl Uart {
    /// The number of ports.
    pub const PORTS: u16 = 8;
    /// The most characters that wait in front of the receiver.
    pub const INPUT: usize = 4096;
    /// The lines of a terminal that is there: clear to send, data set ready, carrier.
    const TERMINAL: u8 = msr::CTS | msr::DSR | msr::DCD;

    /// A serial port that interrupts through `irq` and sends to `sink`, with a terminal connected.
    pub fn new(irq: IrqLine, sink: Box<dyn SerialSink>) -> Self {
        Self {
            irq,
            irq_high: false,
            sink,
            // 9600 baud, as firmware would leave it.
            divisor: [12, 0],
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 3,
            modem_control: 0,
            modem_status: Self::TERMINAL,
            scratch: 0,
            overrun: false,
            transmitter_news: false,
            receiver: Queue::new(),
            waiting: Box::new(Queue::new()),
        }
    }

    /// Sends the guest characters; gives how many fitted into the queue.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let accepted = bytes
            .iter()
            .take_while(|byte| self.waiting.push(**byte))
            .count();
        self.refill();
        self.update_irq();
        accepted
    }

    /// How many characters [`push_input`](Self::push_input) would take.
    pub fn input_room(&self) -> usize {
        Self::INPUT - self.waiting.len
    }

    fn fifo_enabled(&self) -> bool {
        self.fifo_control & fcr::ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { 16 } else { 1 }
    }

    /// How many characters the receiver interrupts for.
    fn trigger(&self) -> usize {
        match (self.fifo_enabled(), self.fifo_control >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    fn looped(&self) -> bool {
        self.modem_control & mcr::LOOP != 0
    }

    /// Moves waiting characters into the receiver; in loopback its input is cut off.
    fn refill(&mut self) {
        while !self.looped() && self.receiver.len < self.capacity() {
            match self.waiting.pop() {
                Some(byte) => self.receiver.push(byte),
                None => break,
            };
        }
    }

    /// The interrupt with the highest priority among those that are enabled and pending.
    fn interrupt(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(ier::LINE) && self.overrun {
            iir::LINE
        } else if enabled(ier::RECEIVED) && self.receiver.len >= self.trigger() {
            iir::RECEIVED
        } else if enabled(ier::RECEIVED) && self.receiver.len > 0 {
            // Characters take no time, so four character times have always passed.
            iir::TIMEOUT
        } else if enabled(ier::TRANSMITTER) && self.transmitter_news {
            iir::TRANSMITTER
        } else if enabled(ier::MODEM) && self.modem_status & msr::DELTAS != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }

    /// The interrupt reaches the bus through a gate that the output OUT2 opens; in loopback the
    /// outputs are inactive.
    fn update_irq(&mut self) {
        let gate = self.modem_control & (mcr::OUT2 | mcr::LOOP) == mcr::OUT2;
        let high = gate && self.interrupt() != iir::NONE;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.transmitter_news = true;
        if !self.looped() {
            self.sink.put(byte);
        } else if self.receiver.len < self.capacity() {
            self.receiver.push(byte);
        } else {
            self.overrun = true;
        }
    }

    fn write_fifo_control(&mut self, value: u8) {
        let toggled = (value ^ self.fifo_control) & fcr::ENABLE != 0;
        self.fifo_control = if value & fcr::ENABLE != 0 {
            value & 0xC9
        } else {
            0
        };
        if toggled || value & fcr::CLEAR_RECEIVER != 0 {
            self.receiver.clear();
            self.refill();
        }
    }

    fn write_modem_control(&mut self, value: u8) {
        self.modem_control = value & 0x1F;
        let lines = if self.looped() {
            [
                (mcr::RTS, msr::CTS),
                (mcr::DTR, msr::DSR),
                (mcr::OUT1, msr::RI),
                (mcr::OUT2, msr::DCD),
            ]
            .iter()
            .filter(|(output, _)| value & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
        } else {
            Self::TERMINAL
        };
        let mut deltas = (lines ^ self.modem_status) >> 4;
        // The ring indicator's delta tells of its trailing edge only.
        if lines & msr::RI != 0 {
            deltas &= !msr::RI_DELTA;
        }
        self.modem_status = lines | self.modem_status & msr::DELTAS | deltas;
        self.refill();
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let latch = self.line_control & DIVISOR_LATCH != 0;
        match register {
            register::DATA if latch => self.divisor[0],
            register::INTERRUPT_ENABLE if latch => self.divisor[1],
            register::DATA => {
                let byte = self.receiver.pop().unwrap_or(0);
                self.refill();
                byte
            }
            register::INTERRUPT_ENABLE => self.interrupt_enable,
            register::INTERRUPT_ID => {
                let interrupt = self.interrupt();
                if interrupt == iir::TRANSMITTER {
                    self.transmitter_news = false;
                }
                interrupt | if self.fifo_enabled() { iir::FIFOS } else { 0 }
            }
            register::LINE_CONTROL => self.line_control,
            register::MODEM_CONTROL => self.modem_control,
            register::LINE_STATUS => {
                let mut status = lsr::TRANSMITTER_EMPTY;
                if self.receiver.len > 0 {
                    status |= lsr::DATA_READY;
                }
                if core::mem::take(&mut self.overrun) {
                    status |= lsr::OVERRUN;
                }
                status
            }
            register::MODEM_STATUS => {
                let status = self.modem_status;
                self.modem_status &= !msr::DELTAS;
                status
            }
            register::SCRATCH => self.scratch,
            _ => 0xFF,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let latch = self.line_control & DIVISOR_LATCH != 0;
        match register {
            register::DATA if latch => self.divisor[0] = value,
            register::INTERRUPT_ENABLE if latch => self.divisor[1] = value,
            register::DATA => self.transmit(value),
            register::INTERRUPT_ENABLE => {
                // Enabling the transmitter's interrupt while it is empty interrupts at once.
                if value & !self.interrupt_enable & ier::TRANSMITTER != 0 {
                    self.transmitter_news = true;
                }
                self.interrupt_enable = value & 0xF;
            }
            register::INTERRUPT_ID => self.write_fifo_control(value),
            register::LINE_CONTROL => self.line_control = value,
            register::MODEM_CONTROL => self.write_modem_control(value),
            register::SCRATCH => self.scratch = value,
            // The status registers can be written for factory tests only.
            _ => {}
        }
    }
}

impl BusDevice for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| self.read_register(register));
        self.update_irq();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| {
            self.write_register(register, value);
        });
        self.update_irq();
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
