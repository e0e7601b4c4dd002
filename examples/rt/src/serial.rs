//! The first serial port, the program's console: 115,200 baud, 8 data bits, no parity, one stop bit.

use core::fmt;

use crate::lock::Lock;
use crate::{apic, ioapic, port};

const BASE: u16 = 0x3f8;
/// COM1's ISA interrupt.
const IRQ: u8 = 4;

const DATA: u16 = BASE;
const INTERRUPT_ENABLE: u16 = BASE + 1;
const FIFO_CONTROL: u16 = BASE + 2;
const LINE_CONTROL: u16 = BASE + 3;
const MODEM_CONTROL: u16 = BASE + 4;
const LINE_STATUS: u16 = BASE + 5;

const DATA_READY: u8 = 1 << 0;
const TRANSMIT_HOLDING_EMPTY: u8 = 1 << 5;
const TRANSMITTER_EMPTY: u8 = 1 << 6;

/// A line status that no UART reports: nothing answers at the port.
const NO_UART: u8 = 0xff;

static OUTPUT: Lock<Uart> = Lock::new(Uart);

/// The transmitter; whoever can name one may write bytes in order.
struct Uart;

fn read(register: u16) -> u8 {
    // SAFETY: a UART has no access to memory.
    unsafe { port::read_u8(register) }
}

fn write(register: u16, value: u8) {
    // SAFETY: a UART has no access to memory.
    unsafe { port::write_u8(register, value) };
}

impl Uart {
    fn put(&mut self, byte: u8) {
        loop {
            let status = read(LINE_STATUS);
            if status == NO_UART {
                return;
            }
            if status & TRANSMIT_HOLDING_EMPTY != 0 {
                break;
            }
            core::hint::spin_loop();
        }
        write(DATA, byte);
    }
}

impl fmt::Write for Uart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}

pub(crate) fn init() {
    write(INTERRUPT_ENABLE, 0);
    write(LINE_CONTROL, 0x80);
    write(DATA, 1);
    write(INTERRUPT_ENABLE, 0);
    write(LINE_CONTROL, 0x03);
    write(FIFO_CONTROL, 0x07);
    // DTR, RTS, and OUT2, which gates the interrupt line on a PC.
    write(MODEM_CONTROL, 0x0b);
}

/// Sends one byte as it is.
pub fn write_byte(byte: u8) {
    OUTPUT.lock().put(byte);
}

/// Sends bytes as they are, without another processor's output between them.
pub fn write_bytes(bytes: &[u8]) {
    let mut uart = OUTPUT.lock();
    for &byte in bytes {
        uart.put(byte);
    }
}

/// A byte that has arrived, if there is one.
pub fn read_byte() -> Option<u8> {
    let status = read(LINE_STATUS);
    (status != NO_UART && status & DATA_READY != 0).then(|| read(DATA))
}

/// Has received bytes raise `vector` on the calling processor.
///
/// Returns false where there is no I/O APIC to route the interrupt.
pub fn enable_rx_irq(vector: u8) -> bool {
    if !ioapic::route_isa(IRQ, vector, apic::id()) {
        return false;
    }
    write(INTERRUPT_ENABLE, 1);
    true
}

/// Waits until everything written has left the transmitter.
pub fn drain() {
    loop {
        let status = read(LINE_STATUS);
        if status == NO_UART || status & TRANSMITTER_EMPTY != 0 {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Writes formatted text; `print!` and `println!` call it.
pub fn print(arguments: fmt::Arguments<'_>) {
    // `put` cannot fail, so an error is a `Display` of the caller's own giving up.
    let _ = fmt::Write::write_fmt(&mut *OUTPUT.lock(), arguments);
}

/// Writes text although the lock may be held by the code that has just failed.
pub(crate) fn print_last_words(arguments: fmt::Arguments<'_>) {
    let mut guard = (0..1_000_000).find_map(|_| {
        core::hint::spin_loop();
        OUTPUT.try_lock()
    });
    let mut alone = Uart;
    let uart = guard.as_deref_mut().unwrap_or(&mut alone);
    let _ = fmt::Write::write_fmt(uart, arguments);
}

/// Prints to the serial console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => { $crate::serial::print(format_args!($($argument)*)) };
}

/// Prints a line to the serial console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($argument:tt)*) => { $crate::serial::print(format_args!("{}\n", format_args!($($argument)*))) };
}
