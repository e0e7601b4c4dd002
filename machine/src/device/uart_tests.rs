use super::*;
use crate::irq::Irqchip;
use crate::irq::fake::machine;
use alloc::sync::Arc;
use proptest::prelude::*;
use std::vec::Vec;

struct Bench {
    uart: Uart,
    output: Arc<spin::Mutex<Vec<u8>>>,
    _chip: Arc<Irqchip>,
}

fn bench() -> Bench {
    let (_, chip, _) = machine(1);
    let output = Arc::new(spin::Mutex::new(Vec::new()));
    let sink = output.clone();
    let uart = Uart::new(
        chip.line(4).unwrap(),
        Box::new(move |byte| sink.lock().push(byte)),
    );
    Bench {
        uart,
        output,
        _chip: chip,
    }
}

impl Bench {
    fn read(&mut self, register: u64) -> u8 {
        let mut data = [0];
        self.uart.read(register, &mut data);
        data[0]
    }

    fn write(&mut self, register: u64, value: u8) {
        self.uart.write(register, &[value]);
    }
}

#[test]
fn output_goes_out_and_the_transmitter_is_empty() {
    let mut b = bench();
    for byte in *b"ok\n" {
        b.write(0, byte);
        assert_eq!(b.read(5) & 0x60, 0x60);
    }
    assert_eq!(*b.output.lock(), b"ok\n");
}

#[test]
fn transmitter_interrupts() {
    let mut b = bench();
    b.write(4, 0x08);
    assert_eq!(b.read(2), 0x01);
    b.write(1, 0x02);
    assert!(b.uart.irq_high, "enabling it while empty interrupts");
    assert_eq!(b.read(2), 0x02);
    assert_eq!(b.read(2), 0x01, "reading the identification cleared it");
    assert!(!b.uart.irq_high);
    b.write(0, b'x');
    assert!(b.uart.irq_high);
    b.write(1, 0x00);
    assert!(!b.uart.irq_high);
    b.write(1, 0x02);
    assert_eq!(b.read(2), 0x02, "enabled anew");
}

#[test]
fn out2_is_the_gate_of_the_interrupt() {
    let mut b = bench();
    b.write(1, 0x02);
    assert!(!b.uart.irq_high);
    b.write(4, 0x08);
    assert!(b.uart.irq_high);
    b.write(4, 0x18);
    assert!(!b.uart.irq_high);
}

#[test]
fn input_without_fifos() {
    let mut b = bench();
    b.write(4, 0x08);
    b.write(1, 0x01);
    assert_eq!(b.uart.push_input(b"ab"), 2);
    assert!(b.uart.irq_high);
    assert_eq!((b.read(2), b.read(5) & 1), (0x04, 1));
    assert_eq!((b.read(0), b.read(0), b.read(0)), (b'a', b'b', 0));
    assert!(!b.uart.irq_high);
    assert_eq!(b.read(5) & 1, 0);
}

#[test]
fn triggers_and_the_time_out() {
    let mut b = bench();
    b.write(1, 0x01);
    for (fcr, trigger) in [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)] {
        b.write(2, fcr | 0x02);
        for n in 1..trigger {
            b.uart.push_input(&[n]);
            assert_eq!(b.read(2), 0xCC, "below the trigger it times out");
        }
        b.uart.push_input(&[trigger]);
        assert_eq!(b.read(2), 0xC4);
        for n in 1..=trigger {
            assert_eq!(b.read(0), n);
        }
        assert_eq!(b.read(2), 0xC1);
    }
}

#[test]
fn input_is_bounded_and_nothing_is_lost() {
    let mut b = bench();
    b.write(2, 0x01);
    let bytes: Vec<u8> = (0..5_000u32).map(|n| n as u8).collect();
    let first = b.uart.push_input(&bytes);
    assert_eq!(first, Uart::INPUT);
    assert_eq!(b.uart.input_room(), 16, "the receiver took some");
    let second = b.uart.push_input(&bytes[first..]);
    assert_eq!(second, 16);
    assert_eq!(b.uart.push_input(&bytes[first + second..]), 0);
    for (n, byte) in bytes.iter().enumerate().take(first + second) {
        assert_eq!((b.read(5) & 3, b.read(0)), (1, *byte), "{n}");
    }
    assert_eq!(b.read(5) & 1, 0);
}

#[test]
fn fifo_control_clears() {
    let mut b = bench();
    b.write(2, 0x01);
    b.uart.push_input(b"abc");
    b.write(2, 0x03);
    assert_eq!(b.read(5) & 1, 0);
    assert_eq!(b.read(2) & 0xC0, 0xC0);
    b.write(2, 0x00);
    assert_eq!(b.read(2) & 0xC0, 0);
}

#[test]
fn loopback_turns_data_and_lines_around() {
    let mut b = bench();
    assert_eq!(b.read(6) & 0xF0, 0xB0);
    b.write(4, 0x1A);
    assert_eq!(b.read(6) & 0xF0, 0x90, "Linux looks for this");
    b.write(4, 0x1F);
    assert_eq!(b.read(6) & 0xF0, 0xF0);
    b.uart.push_input(b"z");
    b.write(0, b'q');
    b.write(0, b'r');
    assert_eq!(b.read(5) & 3, 3, "the second was one too many");
    assert_eq!(b.read(5) & 3, 1);
    assert_eq!(b.read(0), b'q');
    assert!(b.output.lock().is_empty());
    b.write(4, 0x0B);
    assert_eq!(b.read(0), b'z', "the line is connected again");
}

#[test]
fn modem_deltas_interrupt_and_are_cleared_by_reading() {
    let mut b = bench();
    b.write(1, 0x08);
    b.write(4, 0x10);
    assert_eq!(b.read(2), 0x00);
    assert_eq!(b.read(6), 0x0B, "CTS, DSR and carrier fell");
    assert_eq!((b.read(6), b.read(2)), (0, 1));
    b.write(4, 0x14);
    assert_eq!(b.read(6), 0x40, "the ring indicator's leading edge is none");
    b.write(4, 0x10);
    assert_eq!(b.read(6), 0x04);
}

#[test]
fn line_errors_come_first() {
    let mut b = bench();
    b.write(4, 0x10);
    b.write(1, 0x0F);
    b.write(0, 1);
    b.write(0, 2);
    assert_eq!(b.read(2), 0x06);
    b.read(5);
    assert_eq!(b.read(2), 0x04);
    b.read(0);
    assert_eq!(b.read(2), 0x02);
    assert_eq!(b.read(2), 0x00);
}

#[test]
fn divisor_latch_scratch_and_wide_accesses() {
    let mut b = bench();
    b.write(3, 0x83);
    b.uart.write(0, &[0x34, 0x12]);
    let mut divisor = [0; 2];
    b.uart.read(0, &mut divisor);
    assert_eq!(divisor, [0x34, 0x12]);
    b.write(3, 0x03);
    b.write(7, 0xA5);
    let mut all = [0; 8];
    b.uart.read(0, &mut all);
    assert_eq!(all, [0, 0, 0x01, 0x03, 0, 0x60, 0xB0, 0xA5]);
    assert!(b.output.lock().is_empty());
}

proptest! {
    /// Whatever a guest writes: no panic, and the interrupt follows the identification.
    #[test]
    fn the_line_follows_the_identification(steps: Vec<(u8, u8, u8, bool)>) {
        let mut b = bench();
        for (register, value, log, write) in steps {
            let mut data = [value; 4];
            let data = &mut data[..1 << (log % 3)];
            let register = u64::from(register).min(8 - data.len() as u64);
            match (write, log & 0x80) {
                (true, 0) => b.uart.write(register, data),
                (true, _) => { b.uart.push_input(data); }
                (false, _) => b.uart.read(register, data),
            }
            let gate = b.uart.modem_control & 0x18 == 0x08;
            prop_assert_eq!(b.uart.irq_high, gate && b.uart.interrupt() != 1);
            prop_assert!(b.uart.receiver.len <= 16);
        }
    }
}
