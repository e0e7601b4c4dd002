use super::*;
use crate::irq::fake::{FakeHost, machine};
use proptest::prelude::*;
use std::vec::Vec;

fn set_entry(chip: &Arc<Irqchip>, pin: u32, entry: u64) {
    let window = chip.ioapic_window();
    for (half, value) in [(1, entry >> 32), (0, entry)] {
        window.write(0, &(0x10 + pin * 2 + half).to_le_bytes());
        window.write(0x10, &(value as u32).to_le_bytes());
    }
}

fn next(lapic: &mut Lapic) -> Option<u8> {
    lapic.sync();
    lapic.acknowledge()
}

fn eoi(lapic: &mut Lapic) {
    lapic.write_mmio(0xB0, &[0; 4]);
}

fn init_pic(chip: &Arc<Irqchip>) {
    let [(_, master), (_, slave), _] = chip.pic_ports();
    for (pic, base, wiring) in [(master, 0x30, 4), (slave, 0x38, 2)] {
        for (port, value) in [(0, 0x11), (1, base), (1, wiring), (1, 1), (1, 0)] {
            pic.write(port, &[value]);
        }
    }
}

#[test]
fn a_line_reaches_the_vcpu_that_the_entry_names() {
    let (host, chip, mut lapics) = machine(2);
    set_entry(&chip, 4, 0x0100_0000_0000_0041);
    chip.set_level(4, true);
    assert_eq!((host.kicks(0), host.kicks(1)), (0, 1));
    assert_ne!(lapics[1].requests().load(Ordering::Relaxed), 0);
    assert_eq!(next(&mut lapics[0]), None);
    assert_eq!(next(&mut lapics[1]), Some(0x41));
    assert_eq!(lapics[1].requests().load(Ordering::Relaxed), 0);
}

#[test]
fn a_level_is_delivered_again_after_its_end_while_it_stands() {
    let (_, chip, mut lapics) = machine(1);
    set_entry(&chip, 10, 1 << 15 | 0x55);
    chip.set_level(10, true);
    assert_eq!(next(&mut lapics[0]), Some(0x55));
    assert_eq!(next(&mut lapics[0]), None);
    eoi(&mut lapics[0]);
    assert_eq!(next(&mut lapics[0]), Some(0x55));
    chip.set_level(10, false);
    eoi(&mut lapics[0]);
    assert_eq!(next(&mut lapics[0]), None);
}

#[test]
fn without_broadcasts_the_eoi_register_ends_a_level() {
    let (_, chip, mut lapics) = machine(1);
    lapics[0].write_mmio(0xF0, &0x11FFu32.to_le_bytes());
    set_entry(&chip, 10, 1 << 15 | 0x55);
    chip.set_level(10, true);
    assert_eq!(next(&mut lapics[0]), Some(0x55));
    eoi(&mut lapics[0]);
    assert_eq!(next(&mut lapics[0]), None);
    chip.ioapic_window().write(0x40, &0x55u32.to_le_bytes());
    assert_eq!(next(&mut lapics[0]), Some(0x55));
}

#[test]
fn wires_to_one_interrupt_are_ored() {
    let (_, chip, mut lapics) = machine(1);
    set_entry(&chip, 16, 1 << 15 | 0x55);
    let (a, b) = (chip.line(16).unwrap(), chip.line(16).unwrap());
    a.set(true);
    b.set(true);
    assert_eq!(next(&mut lapics[0]), Some(0x55));
    a.set(false);
    eoi(&mut lapics[0]);
    assert_eq!(next(&mut lapics[0]), Some(0x55), "b still drives it");
    b.set(false);
    eoi(&mut lapics[0]);
    assert_eq!(next(&mut lapics[0]), None);
    assert!(chip.line(24).is_none());
    assert_eq!((0..40).filter_map(|_| chip.line(17)).count(), 31);
}

#[test]
fn the_pic_reaches_the_first_vcpu_through_lint0() {
    let (host, chip, mut lapics) = machine(2);
    init_pic(&chip);
    chip.set_level(Irqchip::TIMER_GSI, true);
    assert_eq!(host.kicks(0), 1);
    lapics[0].sync();
    lapics[1].sync();
    assert!(lapics[0].has_interrupt() && !lapics[1].has_interrupt());
    assert_eq!(
        lapics[0].pending_vector(),
        None,
        "no vector before the acknowledge cycle"
    );
    assert_eq!(lapics[0].acknowledge(), Some(0x30));
    assert!(!lapics[0].has_interrupt());
    // The APIC's registers show nothing of it.
    assert_eq!(
        lapics[0].read_msr(testudo_arch::Msr::APIC_BASE),
        Ok(0xFEE0_0900)
    );
    let mut isr = [0; 4];
    lapics[0].read_mmio(0x110, &mut isr);
    assert_eq!(isr, [0; 4]);
}

#[test]
fn a_masked_lint0_keeps_the_pic_waiting() {
    let (_, chip, mut lapics) = machine(1);
    init_pic(&chip);
    lapics[0].write_mmio(0x350, &0x1_0700u32.to_le_bytes());
    chip.set_level(4, true);
    assert_eq!(next(&mut lapics[0]), None);
    lapics[0].write_mmio(0x350, &0x700u32.to_le_bytes());
    assert_eq!(next(&mut lapics[0]), Some(0x34));
}

#[test]
fn lint0_as_a_fixed_interrupt_takes_the_edge_of_the_pic() {
    let (_, chip, mut lapics) = machine(1);
    init_pic(&chip);
    lapics[0].write_mmio(0x350, &0x0_0077u32.to_le_bytes());
    chip.set_level(4, true);
    assert_eq!(next(&mut lapics[0]), Some(0x77));
    assert_eq!(next(&mut lapics[0]), None);
}

#[test]
fn without_a_local_apic_the_pic_is_wired_to_the_processor() {
    let (_, chip, mut lapics) = machine(1);
    init_pic(&chip);
    lapics[0].write_mmio(0x350, &0x1_0000u32.to_le_bytes());
    lapics[0]
        .write_msr(testudo_arch::Msr::APIC_BASE, 0xFEE0_0100, || 0)
        .unwrap();
    chip.set_level(3, true);
    assert_eq!(next(&mut lapics[0]), Some(0x33));
}

#[test]
fn an_extint_entry_brings_the_pics_interrupt_to_another_vcpu() {
    let (_, chip, mut lapics) = machine(2);
    init_pic(&chip);
    lapics[0].write_mmio(0x350, &0x1_0000u32.to_le_bytes());
    set_entry(&chip, 0, 0x0100_0000_0000_0700);
    chip.set_level(5, true);
    assert_eq!(next(&mut lapics[0]), None);
    assert_eq!(next(&mut lapics[1]), Some(0x35));
    assert_eq!(next(&mut lapics[1]), None);
}

#[test]
fn messages_follow_address_and_data() {
    let (host, chip, mut lapics) = machine(4);
    for (vcpu, lapic) in lapics.iter_mut().enumerate() {
        lapic.write_mmio(0xD0, &(1u32 << (24 + vcpu)).to_le_bytes());
    }
    let mut send = |address, data| {
        chip.send_msi(Msi { address, data });
        lapics.iter_mut().map(next).collect::<Vec<_>>()
    };
    assert_eq!(send(0xFEE0_2000, 0x61), [None, None, Some(0x61), None]);
    assert_eq!(
        send(0xFEE0_A004, 0x71),
        [None, Some(0x71), None, Some(0x71)]
    );
    // The hint chooses one of two, by the vector.
    assert_eq!(send(0xFEE0_A00C, 0x80), [None, Some(0x80), None, None]);
    assert_eq!(send(0xFEE0_A00C, 0x91), [None, None, None, Some(0x91)]);
    assert_eq!(send(0xFEEF_F000, 0xA0), [Some(0xA0); 4]);
    assert_eq!(send(0xFEE0_9000, 0xB0), [None; 4], "no such vCPU");
    assert_eq!(send(0xFEE0_2000, 0x05), [None; 4], "no such vector");
    let mut status = [0; 4];
    lapics[2].write_mmio(0x280, &[0; 4]);
    lapics[2].read_mmio(0x280, &mut status);
    assert_eq!(status[0], 1 << 6);
    assert!(host.kicks(2) >= 2);
}

#[test]
fn logical_clusters() {
    let (_, chip, mut lapics) = machine(3);
    for (lapic, logical) in lapics.iter_mut().zip([0x11u32, 0x12, 0x21]) {
        lapic.write_mmio(0xE0, &0x0FFF_FFFFu32.to_le_bytes());
        lapic.write_mmio(0xD0, &(logical << 24).to_le_bytes());
    }
    let mut send = |set| {
        let destination = Destination::Logical(set);
        let (mode, vector, level) = (DeliveryMode::Fixed, 0x44, false);
        let accepted = chip.deliver(
            Message {
                destination,
                mode,
                vector,
                level,
            },
            None,
        );
        let to: Vec<_> = lapics.iter_mut().map(|l| next(l).is_some()).collect();
        lapics.iter_mut().for_each(eoi);
        assert_eq!(accepted, to.contains(&true));
        to
    };
    assert_eq!(send(0x13), [true, true, false]);
    assert_eq!(send(0x21), [false, false, true]);
    assert_eq!(send(0xF1), [true, false, true]);
    assert_eq!(send(0x31), [false; 3]);
    assert_eq!(send(0x0001_0001), [false; 3]);
}

#[test]
fn nobody_takes_a_vector_while_software_has_disabled_him() {
    let host = FakeHost::new();
    let (chip, mut lapics) = Irqchip::new(host, 1, LapicFeatures::default());
    let msi = |data| Msi {
        address: 0xFEE0_0000,
        data,
    };
    chip.send_msi(msi(0x61));
    assert_eq!(next(&mut lapics[0]), None);
    chip.send_msi(msi(0x400));
    lapics[0].sync();
    assert!(lapics[0].take_nmi() && !lapics[0].take_nmi());
}

#[test]
fn a_second_post_before_the_first_is_taken_kicks_no_more() {
    let (host, chip, mut lapics) = machine(2);
    for vector in [0x61, 0x62, 0x61] {
        chip.send_msi(Msi {
            address: 0xFEE0_1000,
            data: vector,
        });
    }
    assert_eq!(host.kicks(1), 1);
    lapics[1].sync();
    chip.send_msi(Msi {
        address: 0xFEE0_1000,
        data: 0x63,
    });
    assert_eq!(host.kicks(1), 2);
    assert_eq!(next(&mut lapics[1]), Some(0x63));
    chip.request(1, request::MACHINE);
    lapics[1].sync();
    assert_eq!(
        lapics[1].requests().load(Ordering::Relaxed),
        request::MACHINE,
        "the loop's own bits stay"
    );
    chip.request(7, 1);
}

/// Posting while the owner takes: every vector arrives, and requests are never zero while
/// something is posted.
#[test]
fn nothing_posted_is_lost() {
    const ROUNDS: usize = 2_000;
    let (_, chip, mut lapics) = machine(1);
    let mut lapic = lapics.remove(0);
    let acknowledged = Arc::new(core::array::from_fn::<_, 3, _>(|_| AtomicU32::new(0)));
    let senders: Vec<_> = (0..3usize)
        .map(|sender| {
            let (chip, acknowledged) = (chip.clone(), acknowledged.clone());
            std::thread::spawn(move || {
                for round in 0..ROUNDS {
                    let data = 0x40 + 0x20 * sender as u32;
                    chip.send_msi(Msi {
                        address: 0xFEE0_0000,
                        data,
                    });
                    // The next one only after this one arrived: it cannot merge with it.
                    while (acknowledged[sender].load(Ordering::Acquire) as usize) <= round {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut received = 0;
    while received < 3 * ROUNDS {
        if lapic.requests().load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
            continue;
        }
        lapic.sync();
        while let Some(vector) = lapic.acknowledge() {
            eoi(&mut lapic);
            received += 1;
            acknowledged[usize::from(vector - 0x40) / 0x20].fetch_add(1, Ordering::Release);
        }
    }
    for sender in senders {
        sender.join().unwrap();
    }
    assert_eq!(next(&mut lapic), None);
}

proptest! {
    #[test]
    fn no_access_or_message_panics(steps: Vec<(u8, u16, u32, u8, bool)>) {
        let (_, chip, mut lapics) = machine(3);
        let (pics, ioapic) = (chip.pic_ports(), chip.ioapic_window());
        for (what, offset, value, log, flag) in steps {
            let len = 1usize << (log % 4);
            let bytes = (u64::from(value) * 0x1_0001).to_le_bytes();
            let mut data = [0; 8];
            let pic = &pics[usize::from(log) % 3].1;
            let address = 0xFEE0_0000 | u64::from(value) << 3 & 0xF_FFFF;
            match what % 6 {
                0 => chip.set_level(u32::from(offset) % 26, flag),
                1 => chip.send_msi(Msi { address, data: value }),
                2 if flag => ioapic.write(u64::from(offset & 0xFFF), &bytes[..len]),
                2 => ioapic.read(u64::from(offset & 0xFFF), &mut data[..len]),
                3 if flag => pic.write(u64::from(offset & 1), &bytes[..len.min(2)]),
                3 => pic.read(u64::from(offset & 1), &mut data[..len.min(2)]),
                4 => {
                    let lapic = &mut lapics[usize::from(log) % 3];
                    let _ = next(lapic);
                }
                _ => lapics[usize::from(log) % 3].write_mmio(u64::from(offset & 0xFF0), &bytes[..4]),
            }
        }
    }
}
