use super::*;
use crate::irq::fake::{FakeHost, machine};
use proptest::prelude::*;
use std::vec::Vec;

struct Bench {
    host: Arc<FakeHost>,
    power: Arc<PowerSignal>,
    pm: PowerManagement,
}

fn bench() -> Bench {
    let (host, chip, _) = machine(1);
    let power = Arc::new(PowerSignal::new());
    let sci = chip.line(layout::SCI_GSI.into()).unwrap();
    let pm = PowerManagement::new(&chip, sci, power.clone());
    Bench { host, power, pm }
}

impl Bench {
    fn read(&mut self, port: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.pm.read(u64::from(port - 0x600), &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, port: u16, data: &[u8]) {
        self.pm.write(u64::from(port - 0x600), data);
    }
}

#[test]
fn sleep_type_5_powers_off() {
    let mut b = bench();
    b.write(0x604, &(5u16 << 10).to_le_bytes());
    assert_eq!(b.power.get(), None, "without the enable bit");
    b.write(0x604, &(4u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(b.power.get(), None, "another type");
    b.write(0x604, &(5u16 << 10 | 1 << 13).to_le_bytes());
    assert_eq!(b.power.get(), Some(PowerEvent::PowerOff));
    assert_eq!(
        b.read(0x604, 2),
        5 << 10 | 1,
        "the enable bit is write-only"
    );
}

#[test]
fn power_off_by_a_byte() {
    let mut b = bench();
    b.write(0x605, &[(5 << 2) | (1 << 5)]);
    assert_eq!(b.power.get(), Some(PowerEvent::PowerOff));
}

#[test]
fn the_timer_counts_at_its_frequency() {
    let mut b = bench();
    let start = b.read(0x608, 4);
    b.host.pass(NS_PER_SECOND);
    assert_eq!(b.read(0x608, 4) - start, 3_579_545);
    let whole = b.read(0x608, 4).to_le_bytes();
    assert_eq!(b.read(0x60A, 1), u32::from(whole[2]));
    assert_eq!(
        b.read(0x608, 2) as u16,
        u16::from_le_bytes([whole[0], whole[1]])
    );
}

#[test]
fn the_timers_carry_interrupts() {
    let mut b = bench();
    b.write(0x602, &1u16.to_le_bytes());
    for _ in 0..3 {
        let at = b.pm.deadline.get().unwrap();
        b.host.pass(at - b.host.now() - 1);
        b.pm.poll(b.host.now());
        assert!(!b.pm.sci_high);
        b.host.pass(1);
        b.pm.poll(b.host.now());
        assert!(b.pm.sci_high);
        assert_eq!(b.read(0x608, 4) & 0x7FFF_FFFF, 0);
        assert_eq!(b.pm.deadline.get(), None);
        b.write(0x600, &1u16.to_le_bytes());
        assert!(!b.pm.sci_high);
    }
}

#[test]
fn buttons_and_events_interrupt_when_enabled() {
    let mut b = bench();
    b.pm.press_power_button();
    assert_eq!(b.read(0x600, 2), 0x100);
    assert!(!b.pm.sci_high);
    b.write(0x602, &[0, 1]);
    assert!(b.pm.sci_high);
    b.write(0x600, &[0xFF, 0]);
    assert!(b.pm.sci_high, "the other byte");
    b.write(0x601, &[1]);
    assert!(!b.pm.sci_high);
    b.write(0x602, &[0xFF, 0xFF]);
    assert_eq!(b.read(0x602, 2), 0x721, "only what is defined");
    b.write(0x622, &[0x04]);
    b.pm.raise_event(200);
    b.pm.raise_event(2);
    assert!(b.pm.sci_high);
    b.write(0x620, &[0x04, 0]);
    assert!(!b.pm.sci_high);
}

#[test]
fn what_is_not_there_floats() {
    let mut b = bench();
    assert_eq!(b.read(0x606, 2), 0xFFFF);
    assert_eq!(b.read(0x610, 4), u32::MAX);
    assert_eq!(b.read(0x600, 4), 0);
    assert_eq!(b.read(0x603, 4) >> 24, 0xFF);
}

proptest! {
    #[test]
    fn the_sci_follows_status_and_enable(steps: Vec<(u8, u32, u8, bool)>) {
        let mut b = bench();
        for (offset, value, log, write) in steps {
            let len = 1usize << (log % 3);
            let offset = u16::from(offset) % (PowerManagement::PORTS - 3);
            if write {
                b.write(0x600 + offset, &value.to_le_bytes()[..len]);
            } else {
                b.read(0x600 + offset, len);
                b.host.pass(u64::from(value) * 300);
            }
            let pm = &b.pm;
            prop_assert_eq!(
                pm.sci_high,
                pm.status & pm.enable != 0 || pm.gpe_status & pm.gpe_enable != 0
            );
        }
    }
}
