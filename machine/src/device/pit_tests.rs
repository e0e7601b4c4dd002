use super::*;
use crate::irq::fake::{FakeHost, machine};
use proptest::prelude::*;
use std::vec::Vec;

struct Bench {
    host: Arc<FakeHost>,
    pit: Pit,
    lapic: crate::irq::Lapic,
}

/// A timer whose interrupt is vector 0x50 on the only vCPU.
fn bench() -> Bench {
    let (host, chip, mut lapics) = machine(1);
    let window = chip.ioapic_window();
    window.write(0, &0x14u32.to_le_bytes());
    window.write(0x10, &0x50u32.to_le_bytes());
    let irq = chip.line(Irqchip::TIMER_GSI).unwrap();
    let pit = Pit::new(&chip, irq);
    Bench {
        host,
        pit,
        lapic: lapics.remove(0),
    }
}

impl Bench {
    fn out(&mut self, port: u16, value: u8) {
        self.pit.write(u64::from(port - 0x40), &[value]);
    }

    fn read(&mut self, port: u16) -> u8 {
        let mut data = [0];
        self.pit.read(u64::from(port - 0x40), &mut data);
        data[0]
    }

    fn read_word(&mut self, port: u16) -> u16 {
        u16::from_le_bytes([self.read(port), self.read(port)])
    }

    fn program(&mut self, channel: u8, mode: u8, count: u16) {
        self.out(0x43, channel << 6 | 0x30 | mode << 1);
        let [low, high] = count.to_le_bytes();
        self.out(0x40 + u16::from(channel), low);
        self.out(0x40 + u16::from(channel), high);
    }

    /// Lets this many of the timer's ticks pass, from a whole tick to a whole tick.
    fn ticks(&mut self, ticks: u64) {
        let now = self.host.now();
        let to = scale_up(Pit::tick_at(now) + ticks, NS_PER_SECOND, FREQUENCY);
        self.host.pass(to - now);
    }

    fn interrupts(&mut self) -> bool {
        let now = self.host.now();
        if self.pit.deadline.get().is_some_and(|at| at <= now) {
            self.pit.poll(now);
        }
        self.lapic.sync();
        let came = self.lapic.acknowledge().is_some();
        self.lapic.write_mmio(0xB0, &[0; 4]);
        came
    }
}

#[test]
fn mode_0_interrupts_once_at_its_end() {
    let mut b = bench();
    b.program(0, 0, 1_000);
    assert!(!b.interrupts());
    b.ticks(400);
    assert_eq!(b.read_word(0x40), 600);
    assert!(!b.interrupts());
    b.ticks(600);
    assert!(b.interrupts());
    assert_eq!(b.pit.deadline.get(), None);
    b.ticks(10);
    assert_eq!(b.read_word(0x40), 0xFFF6, "it counts on");
    assert!(!b.interrupts());
}

#[test]
fn mode_2_interrupts_at_each_period() {
    let mut b = bench();
    b.program(0, 2, 11_932);
    b.interrupts();
    let start = b.pit.deadline.get().unwrap();
    for n in 1..4 {
        b.ticks(11_931);
        assert!(!b.interrupts());
        assert_eq!(b.read_word(0x40), 1);
        b.ticks(1);
        assert!(b.interrupts());
        assert_eq!(b.read_word(0x40), 11_932);
        let next = b.pit.deadline.get().unwrap();
        assert!(
            (next - start).abs_diff(n * 10_000_000) < 2_000,
            "about 100 Hz"
        );
    }
    b.ticks(50_000);
    assert!(
        b.interrupts() && !b.interrupts(),
        "missed periods count once"
    );
}

#[test]
fn mode_3_is_a_square_wave() {
    let mut b = bench();
    b.program(2, 3, 1_001);
    b.pit.write_61(1);
    assert_eq!(b.pit.read_61() & 0x20, 0x20);
    b.ticks(500);
    assert_eq!(b.pit.read_61() & 0x20, 0x20);
    b.ticks(1);
    assert_eq!(b.pit.read_61() & 0x20, 0);
    b.ticks(500);
    assert_eq!(b.pit.read_61() & 0x20, 0x20);
    b.program(0, 3, 100);
    b.ticks(10);
    assert_eq!(b.read_word(0x40), 80, "by two");
    b.ticks(50);
    assert_eq!(b.read_word(0x40), 80, "and again in the second half");
}

/// How Linux calibrates the TSC: channel 2 in mode 0, started by the gate, watched in port 0x61.
#[test]
fn channel_2_counts_while_its_gate_is_open() {
    let mut b = bench();
    b.pit.write_61(0);
    b.program(2, 0, 59_659);
    b.ticks(70_000);
    assert_eq!(b.pit.read_61() & 0x20, 0, "the gate is closed");
    b.pit.write_61(1);
    b.ticks(59_658);
    assert_eq!(b.pit.read_61() & 0x20, 0);
    b.ticks(1);
    assert_eq!(b.pit.read_61() & 0x21, 0x21);
    b.program(2, 0, 100);
    b.ticks(40);
    b.pit.write_61(0);
    b.ticks(40);
    assert_eq!(b.read_word(0x42), 60, "stopped");
    b.pit.write_61(1);
    b.ticks(60);
    assert_eq!(b.pit.read_61() & 0x20, 0x20, "and continued");
}

#[test]
fn mode_1_starts_with_the_gate_and_again() {
    let mut b = bench();
    b.program(2, 1, 100);
    assert_eq!(b.pit.read_61() & 0x20, 0x20);
    b.pit.write_61(1);
    assert_eq!(b.pit.read_61() & 0x20, 0);
    b.ticks(60);
    b.pit.write_61(0);
    b.pit.write_61(1);
    b.ticks(60);
    assert_eq!(b.pit.read_61() & 0x20, 0, "triggered again");
    b.ticks(40);
    assert_eq!(b.pit.read_61() & 0x20, 0x20);
}

#[test]
fn modes_4_and_5_strobe() {
    let mut b = bench();
    for (mode, trigger) in [(4, false), (5, true)] {
        b.pit.write_61(u8::from(!trigger));
        b.program(2, mode, 50);
        b.pit.write_61(1);
        b.ticks(49);
        assert_eq!(b.pit.read_61() & 0x20, 0x20);
        b.ticks(1);
        assert_eq!(b.pit.read_61() & 0x20, 0);
        b.ticks(1);
        assert_eq!(b.pit.read_61() & 0x20, 0x20);
    }
}

#[test]
fn a_new_count_of_a_periodic_mode_waits_for_the_period() {
    let mut b = bench();
    b.program(0, 2, 1_000);
    b.ticks(500);
    b.out(0x40, 200);
    b.out(0x40, 0);
    assert_eq!(b.read_word(0x40), 500);
    b.ticks(500);
    assert_eq!(b.read_word(0x40), 200);
    b.ticks(250);
    assert_eq!(b.read_word(0x40), 150);
}

#[test]
fn latches() {
    let mut b = bench();
    b.program(0, 2, 5_000);
    b.ticks(1_000);
    b.out(0x43, 0x00);
    b.ticks(1_000);
    b.out(0x43, 0x00);
    assert_eq!(b.read_word(0x40), 4_000, "the first latch stays");
    assert_eq!(b.read_word(0x40), 3_000);
    b.out(0x43, 0xC2);
    assert_eq!(b.read(0x40), 0x80 | 0x30 | 2 << 1, "status first");
    assert_eq!(b.read_word(0x40), 3_000);
    b.out(0x43, 0x34);
    b.out(0x43, 0xE2);
    assert_eq!(b.read(0x40) & 0x40, 0x40, "no count loaded");
}

#[test]
fn byte_orders_and_bcd() {
    let mut b = bench();
    b.out(0x43, 0x10);
    b.out(0x40, 200);
    b.ticks(50);
    assert_eq!((b.read(0x40), b.read(0x40)), (150, 150));
    b.out(0x43, 0x20);
    b.out(0x40, 2);
    assert_eq!(b.read(0x40), 2);
    b.out(0x43, 0x31);
    b.out(0x40, 0x34);
    b.out(0x40, 0x12);
    b.ticks(35);
    assert_eq!(b.read_word(0x40), 0x1199);
    b.program(0, 0, 0);
    b.ticks(0x1_0000 - 1);
    assert!(!b.interrupts());
    b.ticks(1);
    assert!(b.interrupts(), "zero stands for 65,536");
}

#[test]
fn a_control_word_without_a_count_stops_the_interrupts() {
    let mut b = bench();
    b.program(0, 2, 1_000);
    b.interrupts();
    b.out(0x43, 0x30);
    assert_eq!(b.pit.deadline.get(), None);
    b.ticks(5_000);
    assert!(!b.interrupts());
}

#[test]
fn wide_accesses_are_several_narrow_ones() {
    let mut b = bench();
    b.out(0x43, 0x30);
    b.out(0x43, 0x70);
    b.pit.write(0, &[0x10, 0x20]);
    b.pit.write(0, &[0x00, 0x00]);
    assert_eq!((b.read_word(0x40), b.read_word(0x41)), (0x10, 0x20));
    let mut all = [0; 4];
    b.pit.read(0, &mut all);
    assert_eq!(all[3], 0xFF);
}

#[test]
fn a_greedy_guest_gets_a_bounded_rate() {
    let mut b = bench();
    b.program(0, 2, 2);
    let (mut polls, end) = (0, b.host.now() + 1_000_000);
    while b.host.now() < end {
        let at = b.pit.deadline.get().unwrap();
        b.host.pass(at.saturating_sub(b.host.now()));
        b.pit.poll(b.host.now());
        polls += 1;
    }
    assert!(polls <= 52, "{polls}");
}

proptest! {
    #[test]
    fn nothing_panics_and_deadlines_lie_ahead(steps: Vec<(u8, u8, u32)>) {
        let mut b = bench();
        for (what, value, pass) in steps {
            match what % 8 {
                0..=2 => b.pit.write(u64::from(what >> 3 & 3), &[value]),
                3 => b.pit.write(3, &[value]),
                4 => b.pit.write(0, &[value; 4]),
                5 => { b.read(0x40 + u16::from(value & 3)); }
                6 => b.pit.write_61(value),
                _ => { b.pit.read_61(); }
            }
            b.host.pass(u64::from(pass));
            b.pit.poll(b.host.now());
            prop_assert!(b.pit.deadline.get().is_none_or(|at| at > b.host.now()));
        }
    }

    /// BCD counters show four decimal digits.
    #[test]
    fn bcd_round_trip(value in 0u64..10_000) {
        prop_assert_eq!(from_bcd(to_bcd(value)), value);
    }
}
