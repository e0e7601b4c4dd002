use super::*;
use proptest::prelude::*;

/// The pair as Linux sets it up: vectors 0x30 and 0x38, all unmasked.
fn pair(icw4: u8) -> PicPair {
    let mut pics = PicPair::new();
    for (port, base, wiring) in [(0x20, 0x30, 4), (0xA0, 0x38, 2)] {
        pics.write(port, 0x11);
        pics.write(port + 1, base);
        pics.write(port + 1, wiring);
        pics.write(port + 1, icw4);
        pics.write(port + 1, 0);
    }
    assert_eq!(pics.read_elcr(0x4D1), 1 << 1, "the SCI");
    pics.write_elcr(0x4D1, 0);
    pics
}

fn pulse(pics: &mut PicPair, irq: u8) {
    pics.set_line(irq, true);
    pics.set_line(irq, false);
}

#[test]
fn an_edge_is_latched_until_acknowledged() {
    let mut pics = pair(1);
    assert!(!pics.output());
    pulse(&mut pics, 4);
    assert_eq!(pics.acknowledge(), Some(0x34));
    assert_eq!(pics.acknowledge(), None);
    pics.write(0x20, 0x0B);
    assert_eq!(pics.read(0x20), 1 << 4, "in service");
    pics.write(0x20, 0x20);
    assert_eq!(pics.read(0x20), 0, "ended");
}

#[test]
fn priorities_hold_back_lower_inputs() {
    let mut pics = pair(1);
    pulse(&mut pics, 4);
    assert_eq!(pics.acknowledge(), Some(0x34));
    pulse(&mut pics, 5);
    assert!(!pics.output());
    pulse(&mut pics, 1);
    assert_eq!(pics.acknowledge(), Some(0x31));
    pics.write(0x20, 0x20);
    assert!(!pics.output(), "4 is still in service");
    pics.write(0x20, 0x20);
    assert_eq!(pics.acknowledge(), Some(0x35));
}

#[test]
fn the_slave_comes_through_input_two() {
    let mut pics = pair(1);
    pulse(&mut pics, 8);
    pulse(&mut pics, 3);
    assert_eq!(pics.acknowledge(), Some(0x38), "input 2 beats input 3");
    pulse(&mut pics, 9);
    assert_eq!(pics.acknowledge(), None, "8 is in service in both");
    pics.write(0xA0, 0x20);
    pics.write(0x20, 0x20);
    assert_eq!(pics.acknowledge(), Some(0x39));
}

#[test]
fn special_fully_nested_mode_lets_the_slave_nest() {
    let mut pics = pair(0x11);
    pulse(&mut pics, 10);
    assert_eq!(pics.acknowledge(), Some(0x3A));
    pulse(&mut pics, 9);
    assert_eq!(pics.acknowledge(), Some(0x39));
    pulse(&mut pics, 11);
    assert_eq!(pics.acknowledge(), None);
}

#[test]
fn a_mask_hides_and_keeps() {
    let mut pics = pair(1);
    pics.write(0x21, 1 << 4);
    pulse(&mut pics, 4);
    assert!(!pics.output());
    assert_eq!(pics.read(0x20), 1 << 4);
    pics.write(0x21, 0);
    assert!(pics.output());
}

#[test]
fn special_mask_mode_lets_lower_inputs_in() {
    let mut pics = pair(1);
    pulse(&mut pics, 3);
    pics.acknowledge();
    pulse(&mut pics, 6);
    assert!(!pics.output());
    pics.write(0x21, 1 << 3);
    pics.write(0x20, 0x68);
    assert_eq!(pics.acknowledge(), Some(0x36));
}

#[test]
fn level_inputs_follow_their_line() {
    let mut pics = pair(1);
    pics.write_elcr(0x4D0, 0xFF);
    pics.write_elcr(0x4D1, 0xFF);
    assert_eq!((pics.read_elcr(0x4D0), pics.read_elcr(0x4D1)), (0xF8, 0xDE));
    pics.set_line(5, true);
    assert_eq!(pics.acknowledge(), Some(0x35));
    pics.write(0x20, 0x65);
    assert_eq!(pics.acknowledge(), Some(0x35), "still high after its end");
    pics.set_line(5, false);
    pics.write(0x20, 0x65);
    assert!(!pics.output());
}

#[test]
fn automatic_end_leaves_nothing_in_service() {
    let mut pics = pair(3);
    pulse(&mut pics, 1);
    pulse(&mut pics, 5);
    assert_eq!(pics.acknowledge(), Some(0x31));
    assert_eq!(pics.acknowledge(), Some(0x35));
    pics.write(0x20, 0x0B);
    assert_eq!(pics.read(0x20), 0);
}

#[test]
fn rotation_moves_the_served_input_to_the_end() {
    let mut pics = pair(1);
    pulse(&mut pics, 4);
    pics.acknowledge();
    pics.write(0x20, 0xA0);
    pulse(&mut pics, 4);
    pulse(&mut pics, 5);
    assert_eq!(pics.acknowledge(), Some(0x35));
    pics.write(0x20, 0xC6); // Input 6 has the lowest priority: 7 has the highest.
    pulse(&mut pics, 7);
    assert_eq!(pics.acknowledge(), Some(0x37));
}

#[test]
fn polling_acknowledges() {
    let mut pics = pair(1);
    pics.write(0x20, 0x0C);
    assert_eq!(pics.read(0x20), 0);
    pulse(&mut pics, 6);
    pics.write(0x20, 0x0C);
    assert_eq!(pics.read(0x20), 0x86);
    assert!(!pics.output());
}

#[test]
fn initialization_forgets_edges_and_inhibits() {
    let mut pics = pair(1);
    pulse(&mut pics, 4);
    pics.write(0x20, 0x11);
    pulse(&mut pics, 1);
    assert!(!pics.output(), "not initialized yet");
    pics.write(0x21, 0x50);
    pics.write(0x21, 4);
    pics.write(0x21, 1);
    assert_eq!(pics.acknowledge(), Some(0x51));
    assert_eq!(pics.acknowledge(), None);
}

proptest! {
    #[test]
    fn no_sequence_panics_and_every_vector_belongs_to_a_chip(
        steps: std::vec::Vec<(u8, u8, bool)>
    ) {
        let mut pics = PicPair::new();
        for (what, value, flag) in steps {
            match what % 7 {
                0 => pics.set_line(value % 20, flag),
                1 => pics.write(0x20 + u16::from(flag), value),
                2 => pics.write(0xA0 + u16::from(flag), value),
                3 => { pics.read(if flag { 0x20 } else { 0xA1 }); }
                4 => pics.write_elcr(0x4D0 + u16::from(flag), value),
                5 => { prop_assert!(pics.read_elcr(0x4D0) & 7 == 0); }
                _ => {
                    let output = pics.output();
                    let vector = pics.acknowledge();
                    prop_assert_eq!(output, vector.is_some());
                    let bases = [pics.master.base, pics.slave.base];
                    prop_assert!(vector.is_none_or(|v| bases.contains(&(v & 0xF8))));
                }
            }
        }
    }
}
