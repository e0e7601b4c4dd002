use super::*;
use crate::irq::fake::{FakeHost, machine};
use proptest::prelude::*;
use std::vec::Vec;

/// 2024-02-28 23:59:58 UTC, a Wednesday.
const LEAP_EVE: u64 = 1_709_164_798;

struct Bench {
    host: Arc<FakeHost>,
    rtc: Rtc,
}

fn bench(unix_time: u64) -> Bench {
    let (host, chip, _) = machine(1);
    let rtc = Rtc::new(&chip, chip.line(8).unwrap(), unix_time, 5 << 30);
    Bench { host, rtc }
}

impl Bench {
    fn read(&mut self, index: u8) -> u8 {
        let mut data = [0];
        self.rtc.write(0, &[index]);
        self.rtc.read(1, &mut data);
        data[0]
    }

    fn write(&mut self, index: u8, value: u8) {
        self.rtc.write(0, &[index]);
        self.rtc.write(1, &[value]);
    }

    fn time(&mut self) -> [u8; 8] {
        [0x32, 9, 8, 7, 4, 2, 0, 6].map(|index| self.read(index))
    }

    /// Lets time pass in the steps of the deadlines, as the loop does; gives the rising edges.
    fn run(&mut self, ns: u64) -> usize {
        let end = self.host.now() + ns;
        let mut edges = 0;
        loop {
            let at = self.rtc.deadline.get().unwrap_or(u64::MAX).min(end);
            self.host.pass(at.saturating_sub(self.host.now()));
            let before = self.rtc.irq_high;
            self.rtc.poll(self.host.now());
            if self.rtc.irq_high && !before {
                edges += 1;
            }
            if self.host.now() >= end {
                return edges;
            }
            // The handler.
            self.read(0x0C);
        }
    }
}

#[test]
fn the_time_runs_over_a_leap_day() {
    let mut b = bench(LEAP_EVE);
    assert_eq!(b.time(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58, 4]);
    b.host.pass(2 * NS_PER_SECOND);
    assert_eq!(b.time(), [0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5]);
    b.host.pass(86_400 * NS_PER_SECOND);
    assert_eq!(b.time(), [0x20, 0x24, 0x03, 0x01, 0, 0, 0, 6]);
}

#[test]
fn binary_and_twelve_hours() {
    let mut b = bench(LEAP_EVE);
    b.write(0x0B, 0x06);
    assert_eq!(b.time(), [20, 24, 2, 28, 23, 59, 58, 4]);
    b.write(0x0B, 0x00);
    assert_eq!(b.read(4), 0x91, "11 pm");
    b.host.pass(2 * NS_PER_SECOND);
    assert_eq!(b.read(4), 0x12, "midnight");
    b.write(4, 0x92);
    b.write(0x0B, 0x02);
    assert_eq!(b.read(4), 0x12, "12 pm is noon");
}

#[test]
fn setting_freezes_and_starts_again() {
    let mut b = bench(LEAP_EVE);
    b.write(0x0B, 0x92);
    assert_eq!(
        b.read(0x0B),
        0x82,
        "the update interrupt is disabled by SET"
    );
    for (index, value) in [
        (0x32, 0x19),
        (9, 0x99),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x59),
    ] {
        b.write(index, value);
        b.host.pass(NS_PER_SECOND);
    }
    assert_eq!(b.time(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59, 6]);
    b.write(0x0B, 0x02);
    b.host.pass(NS_PER_SECOND);
    assert_eq!(b.time(), [0x20, 0, 1, 1, 0, 0, 0, 7]);
}

#[test]
fn an_update_is_announced_and_interrupts() {
    let mut b = bench(LEAP_EVE);
    b.write(0x0B, 0x12);
    b.host.pass(NS_PER_SECOND - 245_000);
    assert_eq!(b.read(0x0A), 0x26);
    b.host.pass(2_000);
    assert_eq!(b.read(0x0A), 0xA6);
    b.host.pass(243_000);
    b.rtc.poll(b.host.now());
    assert!(b.rtc.irq_high);
    assert_eq!(
        b.read(0x0C),
        0xD0,
        "the periodic flag is set as well, but not enabled"
    );
    assert_eq!(b.read(0x0C), 0);
    assert!(!b.rtc.irq_high);
    assert_eq!(b.run(10 * NS_PER_SECOND), 10);
}

#[test]
fn periodic_interrupts_have_their_rate() {
    for (rate, hz) in [(6, 1_024), (15, 2), (3, 8_192), (1, 256), (2, 128)] {
        let mut b = bench(LEAP_EVE);
        b.write(0x0A, 0x20 | rate);
        b.write(0x0B, 0x42);
        let edges = b.run(NS_PER_SECOND);
        assert!(edges.abs_diff(hz) <= 1, "{rate}: {edges}");
    }
    let mut b = bench(LEAP_EVE);
    b.write(0x0A, 0x20);
    b.write(0x0B, 0x42);
    assert_eq!(b.rtc.deadline.get(), None);
}

#[test]
fn flags_are_set_without_interrupts() {
    let mut b = bench(LEAP_EVE);
    b.host.pass(NS_PER_SECOND);
    assert_eq!(b.read(0x0C), 0x50);
}

#[test]
fn alarms() {
    let mut b = bench(LEAP_EVE);
    let now = LEAP_EVE;
    let mut next = |hour, minute, second| {
        b.write(5, hour);
        b.write(3, minute);
        b.write(1, second);
        b.rtc.next_alarm(now).map(|at| at - now)
    };
    assert_eq!(next(0xFF, 0xFF, 0xFF), Some(1));
    assert_eq!(next(0x23, 0x59, 0x59), Some(1));
    assert_eq!(next(0x23, 0x59, 0x58), Some(86_400), "only after now");
    assert_eq!(next(0x00, 0x00, 0x05), Some(7));
    assert_eq!(next(0xC0, 0x30, 0x00), Some(2 + 1_800));
    assert_eq!(next(0x12, 0xFF, 0xFF), Some(2 + 12 * 3_600));
    assert_eq!(next(0xFF, 0xFF, 0x57), Some(59));
    assert_eq!(next(0x24, 0x00, 0x00), None);
    assert_eq!(next(0x00, 0x60, 0x00), None);
    b.write(5, 0x00);
    b.write(3, 0x00);
    b.write(1, 0x05);
    b.write(0x0B, 0x22);
    assert_eq!(b.run(7 * NS_PER_SECOND - 1), 0);
    assert_eq!(b.run(1), 1);
    assert_eq!(b.read(0x0C) & 0xA0, 0xA0);
}

#[test]
fn memory_and_its_size() {
    let mut b = bench(LEAP_EVE);
    assert_eq!((b.read(0x15), b.read(0x16)), (0x80, 0x02));
    assert_eq!((b.read(0x30), b.read(0x31)), (0xFF, 0xFF));
    // 3 GiB below the windows, 2 GiB above 4 GiB.
    let above_16m = u16::from_le_bytes([b.read(0x34), b.read(0x35)]);
    assert_eq!(u64::from(above_16m) << 16, (3 << 30) - (16 << 20));
    assert_eq!([0x5B, 0x5C, 0x5D].map(|i| b.read(i)), [0x00, 0x80, 0x00]);
    b.write(0x8F, 0x0A);
    assert_eq!(b.read(0x0F), 0x0A, "bit 7 of the index masks NMI");
    b.write(0x0D, 0);
    assert_eq!(b.read(0x0D), 0x80);
    let mut both = [0; 2];
    b.rtc.write(0, &[0x0D]);
    b.rtc.read(0, &mut both);
    assert_eq!(both, [0xFF, 0x80]);
}

proptest! {
    #[test]
    fn dates_round_trip(seconds in 0u64..253_402_300_800) {
        let civil = Civil::from_unix(seconds);
        prop_assert_eq!(civil.to_unix(), seconds);
        prop_assert!((1..=12).contains(&civil.month) && (1..=31).contains(&civil.day));
        let next = Civil::from_unix(seconds + DAY);
        prop_assert!(next.day == civil.day + 1 || next.day == 1);
    }

    #[test]
    fn nothing_panics_and_deadlines_lie_ahead(steps: Vec<(u8, u8, bool, u32)>) {
        let mut b = bench(LEAP_EVE);
        for (index, value, narrow, pass) in steps {
            // Mostly the clock's own registers.
            let index = if narrow { index % 14 } else { index };
            b.write(index, value);
            b.host.pass(u64::from(pass) * 100);
            b.read(index);
            b.rtc.poll(b.host.now());
            prop_assert!(b.rtc.deadline.get().is_none_or(|at| at > b.host.now()));
        }
    }

    /// The alarm found is the first time that matches, by trying them all.
    #[test]
    fn the_alarm_is_the_first_match(
        start in LEAP_EVE..LEAP_EVE + 4 * DAY, hour in 0u8..24, minute in 0u8..60, any in 0u8..4
    ) {
        let mut b = bench(start);
        b.write(0x0B, 0x06);
        b.write(5, if any & 1 != 0 { 0xFF } else { hour });
        b.write(3, if any & 2 != 0 { 0xFF } else { minute });
        b.write(1, 30);
        let first = (start + 1..=start + DAY).find(|at| {
            let c = Civil::from_unix(*at);
            (any & 1 != 0 || c.hour == hour) && (any & 2 != 0 || c.minute == minute) && c.second == 30
        });
        prop_assert_eq!(b.rtc.next_alarm(start), first);
    }
}
