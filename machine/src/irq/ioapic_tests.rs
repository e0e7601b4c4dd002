use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::vec::Vec;

/// Notes messages, and refuses them all if told so.
#[derive(Default)]
struct Recorder {
    messages: RefCell<Vec<Message>>,
    refuse: bool,
}

impl Bus for Recorder {
    fn deliver(&self, message: Message) -> bool {
        self.messages.borrow_mut().push(message);
        !self.refuse
    }
}

impl Recorder {
    fn vectors(&self) -> Vec<u8> {
        self.messages
            .borrow_mut()
            .drain(..)
            .map(|m| m.vector)
            .collect()
    }
}

fn set_entry(chip: &mut IoApic, bus: &Recorder, pin: u32, entry: u64) {
    for (half, value) in [(1, entry >> 32), (0, entry)] {
        chip.write(0, 0x10 + pin * 2 + half, bus);
        chip.write(0x10, value as u32, bus);
    }
}

#[test]
fn identifies_itself() {
    let (mut chip, bus) = (IoApic::new(3), Recorder::default());
    let mut read = |index| {
        chip.write(0, index, &bus);
        chip.read(0x10)
    };
    assert_eq!(read(0), 3 << 24);
    assert_eq!(read(1), 0x0017_0020);
    assert_eq!(read(0x10), 0x1_0000);
    assert_eq!(read(0x40), 0);
    chip.write(0, 0, &bus);
    chip.write(0x10, 0xFF00_0000, &bus);
    assert_eq!(chip.read(0x10), 0xF00_0000);
}

#[test]
fn an_edge_is_sent_once_with_its_destination() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    set_entry(&mut chip, &bus, 4, 0x0300_0000_0000_0831);
    chip.set_line(4, true, &bus);
    chip.set_line(4, true, &bus);
    assert_eq!(
        bus.messages.take(),
        [Message {
            destination: Destination::Logical(3),
            mode: DeliveryMode::Fixed,
            vector: 0x31,
            level: false
        }]
    );
    chip.set_line(4, false, &bus);
    assert_eq!(bus.vectors(), []);
    chip.set_line(4, true, &bus);
    assert_eq!(bus.vectors(), [0x31]);
}

#[test]
fn a_masked_edge_is_lost() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    set_entry(&mut chip, &bus, 4, MASKED | 0x31);
    chip.set_line(4, true, &bus);
    set_entry(&mut chip, &bus, 4, 0x31);
    assert_eq!(bus.vectors(), []);
}

#[test]
fn a_level_waits_for_its_end_and_comes_again() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    set_entry(&mut chip, &bus, 10, LEVEL | 0x55);
    chip.set_line(10, true, &bus);
    chip.set_line(10, false, &bus);
    chip.set_line(10, true, &bus);
    assert_eq!(bus.vectors(), [0x55], "remote IRR holds it back");
    assert_ne!(chip.entry(10) & REMOTE_IRR, 0);
    chip.end_of_interrupt(0x54, &bus);
    assert_eq!(bus.vectors(), []);
    chip.end_of_interrupt(0x55, &bus);
    assert_eq!(bus.vectors(), [0x55], "the line is still high");
    chip.set_line(10, false, &bus);
    chip.write(0x40, 0x55, &bus);
    assert_eq!(chip.entry(10) & REMOTE_IRR, 0);
    assert_eq!(bus.vectors(), []);
}

#[test]
fn a_masked_level_comes_when_unmasked() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    set_entry(&mut chip, &bus, 10, LEVEL | MASKED | 0x55);
    chip.set_line(10, true, &bus);
    assert_eq!(bus.vectors(), []);
    set_entry(&mut chip, &bus, 10, LEVEL | 0x55);
    assert_eq!(bus.vectors(), [0x55]);
}

#[test]
fn switching_to_edge_ends_a_level() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    set_entry(&mut chip, &bus, 10, LEVEL | 0x55);
    chip.set_line(10, true, &bus);
    assert_eq!(bus.vectors(), [0x55]);
    set_entry(&mut chip, &bus, 10, MASKED | 0x55);
    set_entry(&mut chip, &bus, 10, LEVEL | 0x55);
    assert_eq!(bus.vectors(), [0x55]);
}

#[test]
fn an_active_low_line_is_active_when_low() {
    let (mut chip, bus) = (IoApic::new(0), Recorder::default());
    chip.set_line(11, true, &bus);
    set_entry(&mut chip, &bus, 11, LEVEL | ACTIVE_LOW | 0x60);
    assert_eq!(bus.vectors(), []);
    chip.set_line(11, false, &bus);
    assert_eq!(bus.vectors(), [0x60]);
}

#[test]
fn a_message_that_nobody_takes_sets_no_remote_irr() {
    let (mut chip, bus) = (
        IoApic::new(0),
        Recorder {
            refuse: true,
            ..Recorder::default()
        },
    );
    set_entry(&mut chip, &bus, 10, LEVEL | 0x55);
    chip.set_line(10, true, &bus);
    assert_eq!(chip.entry(10) & REMOTE_IRR, 0);
}

proptest! {
    /// Whatever a guest and devices do: read-only bits cannot be written, an edge never waits,
    /// and an input that does not exist does nothing.
    #[test]
    fn entries_stay_well_formed(steps: Vec<(u8, u8, u32, bool)>) {
        let (mut chip, bus) = (IoApic::new(0), Recorder::default());
        for (what, pin, value, high) in steps {
            match what % 4 {
                0 => chip.set_line(usize::from(pin % 30), high, &bus),
                1 => chip.write(u64::from(pin), value, &bus),
                2 => {
                    chip.write(0, u32::from(pin) % 0x44, &bus);
                    chip.write(0x10, value, &bus);
                }
                _ => chip.end_of_interrupt(pin, &bus),
            }
            chip.read(u64::from(pin));
            for pin in 0..PINS {
                let entry = chip.entry(pin);
                prop_assert_eq!(entry & !(WRITABLE | REMOTE_IRR), 0);
                prop_assert!(entry & REMOTE_IRR == 0 || entry & LEVEL != 0);
            }
        }
    }
}
