use super::*;
use crate::host::Host;
use crate::irq::fake::{FakeHost, machine};
use proptest::prelude::*;
use std::vec::Vec;
use testudo_arch::Msr;
use testudo_arch::irq::InterruptSink;

fn write(lapic: &mut Lapic, register: u64, value: u32) {
    lapic.write_mmio(register, &value.to_le_bytes());
}

fn read(lapic: &mut Lapic, register: u64) -> u32 {
    let mut data = [0; 4];
    lapic.read_mmio(register, &mut data);
    u32::from_le_bytes(data)
}

fn next(lapic: &mut Lapic) -> Option<u8> {
    lapic.sync();
    lapic.acknowledge()
}

fn self_ipi(lapic: &mut Lapic, vector: u8) {
    write(lapic, 0x300, 1 << 18 | u32::from(vector));
}

fn status(lapic: &mut Lapic) -> u32 {
    write(lapic, 0x280, 0);
    read(lapic, 0x280)
}

fn to_x2apic(lapic: &mut Lapic) {
    let base = lapic.apic_base() | 1 << 10;
    lapic.write_msr(Msr::APIC_BASE, base, || 0).unwrap();
}

const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

#[test]
fn state_after_reset() {
    let (_, lapics) = Irqchip::new(FakeHost::new(), 2, LapicFeatures::default());
    let mut lapics = lapics.into_iter();
    let (mut bsp, mut ap) = (lapics.next().unwrap(), lapics.next().unwrap());
    assert_eq!(
        (bsp.apic_base(), ap.apic_base()),
        (0xFEE0_0900, 0xFEE0_0800)
    );
    assert_eq!(read(&mut ap, 0x20), 1 << 24);
    assert_eq!(read(&mut ap, 0x30), 0x0105_0014);
    assert_eq!(read(&mut ap, 0xF0), 0xFF);
    assert_eq!(read(&mut ap, 0xE0), u32::MAX);
    assert_eq!(
        (read(&mut bsp, 0x350), read(&mut bsp, 0x360)),
        (0x700, 0x400)
    );
    assert_eq!(
        (read(&mut ap, 0x350), read(&mut ap, 0x360)),
        (0x1_0000, 0x1_0000)
    );
    assert_eq!(ap.mmio_window(), Some(Gpa(0xFEE0_0000)));
}

#[test]
fn the_highest_priority_comes_first_and_holds_the_others_back() {
    let (_, _, mut l) = machine(1);
    let l = &mut l[0];
    for vector in [0x41, 0x52, 0x53, 0x91] {
        self_ipi(l, vector);
    }
    assert_eq!(l.pending_vector(), Some(0x91));
    assert_eq!(l.acknowledge(), Some(0x91));
    assert_eq!(read(l, 0xA0), 0x90);
    assert_eq!(l.acknowledge(), None);
    self_ipi(l, 0x9F);
    assert_eq!(l.acknowledge(), None, "the same class");
    write(l, 0xB0, 0);
    assert_eq!(l.acknowledge(), Some(0x9F));
    write(l, 0xB0, 0);
    assert_eq!(l.acknowledge(), Some(0x53));
    self_ipi(l, 0x61);
    assert_eq!(l.acknowledge(), Some(0x61), "nested");
    assert_eq!(read(l, 0x100 + 0x10 * 2), 1 << 0x13, "0x53 in service");
    write(l, 0xB0, 0);
    assert_eq!(l.acknowledge(), None);
    write(l, 0xB0, 0);
    assert_eq!(l.acknowledge(), Some(0x52));
}

#[test]
fn the_task_priority_holds_back_and_is_cr8() {
    let (_, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x80, 0x5F);
    assert_eq!(l.cr8(), 5);
    self_ipi(l, 0x5F);
    assert!(!l.has_interrupt());
    self_ipi(l, 0x60);
    assert_eq!(l.acknowledge(), Some(0x60));
    write(l, 0xB0, 0);
    assert_eq!(read(l, 0xA0), 0x5F, "the whole task priority shows");
    l.set_cr8(5);
    assert_eq!(read(l, 0x80), 0x5F, "CR8 does not tell the lower half");
    l.set_cr8(4);
    assert_eq!(read(l, 0x80), 0x40);
    assert_eq!(l.acknowledge(), Some(0x5F));
}

#[test]
fn an_end_without_service_changes_nothing() {
    let (_, _, mut l) = machine(1);
    write(&mut l[0], 0xB0, 0);
    self_ipi(&mut l[0], 0x41);
    assert_eq!(l[0].acknowledge(), Some(0x41));
}

#[test]
fn shorthands_and_destinations_of_ipis() {
    let (host, _, mut l) = machine(3);
    let mut send = |low: u32, high: u32| {
        write(&mut l[1], 0x310, high);
        write(&mut l[1], 0x300, low);
        let got: Vec<_> = l.iter_mut().map(|l| next(l).is_some()).collect();
        l.iter_mut().for_each(|l| write(l, 0xB0, 0));
        got
    };
    assert_eq!(send(1 << 18 | 0x41, 0), [false, true, false]);
    assert_eq!(send(2 << 18 | 0x41, 0), [true, true, true]);
    assert_eq!(send(3 << 18 | 0x41, 0), [true, false, true]);
    assert_eq!(send(0x41, 2 << 24), [false, false, true]);
    assert_eq!(send(0x41, 1 << 24), [false, true, false]);
    assert_eq!(send(0x41, 0xFF << 24), [true, true, true]);
    assert_eq!(send(0x41, 0x77 << 24), [false; 3]);
    assert_eq!(host.kicks(1), 0, "nobody kicks himself");
}

#[test]
fn init_startup_and_nmi() {
    let (_, _, mut l) = machine(2);
    write(&mut l[0], 0x310, 1 << 24);
    write(&mut l[0], 0x300, 0x691);
    write(&mut l[0], 0x300, 0xC500);
    l[1].sync();
    assert!(l[1].take_init() && !l[1].take_init());
    assert_eq!(l[1].take_startup(), None, "what came before INIT is void");
    write(&mut l[0], 0x300, 0x8500);
    l[1].sync();
    assert!(!l[1].take_init(), "level de-assert");
    l[1].init();
    assert_eq!(read(&mut l[1], 0xF0), 0xFF);
    write(&mut l[0], 0x300, 0x69A);
    l[1].sync();
    assert_eq!(
        (l[1].take_startup(), l[1].take_startup()),
        (Some(0x9A), None)
    );
    write(&mut l[0], 0x300, 0x400);
    l[1].sync();
    assert!(l[1].take_nmi() && !l[1].take_nmi());
}

#[test]
fn init_keeps_base_and_drops_what_waits() {
    let (_, chip, mut l) = machine(1);
    self_ipi(&mut l[0], 0x41);
    write(&mut l[0], 0x320, 0x42);
    write(&mut l[0], 0x380, 1000);
    chip.send_msi(testudo_arch::irq::Msi {
        address: 0xFEE0_0000,
        data: 0x43,
    });
    l[0].init();
    assert_eq!(next(&mut l[0]), None);
    assert_eq!(l[0].next_deadline(), None);
    assert_eq!(l[0].apic_base(), 0xFEE0_0900);
    assert_eq!(read(&mut l[0], 0x350), 0x1_0000);
}

#[test]
fn one_shot_counts_down_once() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x320, 0x40);
    write(l, 0x3E0, 0b0011); // By 16.
    write(l, 0x380, 1_000);
    assert_eq!(l.next_deadline(), Some(host.now() + 16_000));
    host.pass(1_600);
    assert_eq!(read(l, 0x390), 900);
    host.pass(1);
    assert_eq!(read(l, 0x390), 900, "the count falls at its end");
    host.pass(14_398);
    l.poll_timer(host.now());
    assert!(!l.has_interrupt());
    host.pass(1);
    l.poll_timer(host.now());
    assert_eq!(l.acknowledge(), Some(0x40));
    assert_eq!((l.next_deadline(), read(l, 0x390)), (None, 0));
}

#[test]
fn every_divisor() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x320, 0x40);
    let configurations = [0, 1, 2, 3, 8, 9, 10, 11];
    for (value, divisor) in configurations
        .into_iter()
        .zip([2, 4, 8, 16, 32, 64, 128, 1])
    {
        write(l, 0x3E0, value);
        write(l, 0x380, 100_000);
        assert_eq!(l.next_deadline(), Some(host.now() + 100_000 * divisor));
    }
}

#[test]
fn periodic_keeps_its_beat_and_merges_what_was_missed() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x3E0, 0b1011);
    write(l, 0x320, PERIODIC | 0x40);
    write(l, 0x380, 1_000_000);
    let start = host.now();
    host.pass(3_500_000);
    l.poll_timer(host.now());
    assert_eq!(l.acknowledge(), Some(0x40));
    assert_eq!(l.next_deadline(), Some(start + 4_000_000));
    assert_eq!(read(l, 0x390), 500_000);
    write(l, 0xB0, 0);
    assert_eq!(l.acknowledge(), None);
    write(l, 0x380, 0);
    assert_eq!(l.next_deadline(), None);
}

#[test]
fn a_masked_timer_runs_but_is_silent() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x3E0, 0b1011);
    write(l, 0x320, LVT_MASKED | 0x40);
    write(l, 0x380, 100_000);
    assert_eq!(l.next_deadline(), None);
    host.pass(40_000);
    assert_eq!(read(l, 0x390), 60_000);
    host.pass(70_000);
    write(l, 0x320, 0x40);
    assert_eq!(
        (l.acknowledge(), read(l, 0x390)),
        (None, 0),
        "it expired while masked"
    );
}

#[test]
fn changing_the_divisor_keeps_the_count() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x320, 0x40);
    write(l, 0x3E0, 0b1011);
    write(l, 0x380, 100_000);
    host.pass(50_000);
    write(l, 0x3E0, 0b0000);
    assert_eq!(read(l, 0x390), 50_000);
    assert_eq!(l.next_deadline(), Some(host.now() + 100_000));
}

#[test]
fn tsc_deadline() {
    let (host, _, mut l) = machine(1);
    let l = &mut l[0];
    l.write_msr(Msr::TSC_DEADLINE, 5_000, || 0).unwrap();
    assert_eq!(
        l.read_msr(Msr::TSC_DEADLINE),
        Ok(0),
        "another mode: ignored"
    );
    write(l, 0x320, TSC_DEADLINE | 0x40);
    write(l, 0x380, 1_000);
    assert_eq!(
        l.next_deadline(),
        None,
        "the initial count means nothing here"
    );
    let now = host.now();
    l.write_msr(Msr::TSC_DEADLINE, 5_001, || 1_000).unwrap();
    assert_eq!(l.next_deadline(), Some(now + 2_001), "2 GHz, rounded up");
    assert_eq!(
        (l.read_msr(Msr::TSC_DEADLINE), read(l, 0x390)),
        (Ok(5_001), 0)
    );
    l.tsc_changed(3_001);
    assert_eq!(l.next_deadline(), Some(now + 1_000));
    host.pass(1_000);
    l.poll_timer(host.now());
    assert_eq!(l.acknowledge(), Some(0x40));
    assert_eq!(l.read_msr(Msr::TSC_DEADLINE), Ok(0));
    write(l, 0xB0, 0);
    l.write_msr(Msr::TSC_DEADLINE, 10, || 11).unwrap();
    assert_eq!(
        l.acknowledge(),
        Some(0x40),
        "past deadlines are due at once"
    );
    l.write_msr(Msr::TSC_DEADLINE, 1 << 40, || 0).unwrap();
    write(l, 0x320, 0x40);
    assert_eq!(l.next_deadline(), None, "a change of mode disarms");
    l.write_msr(Msr::TSC_DEADLINE, u64::MAX, || 0).unwrap();
}

#[test]
fn errors_are_latched_by_a_write_and_interrupt_once() {
    let (_, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x370, 0xFE);
    write(l, 0x300, 1 << 18 | 3);
    assert_eq!(l.acknowledge(), Some(0xFE));
    assert_eq!(read(l, 0x280), 0, "not latched yet");
    write(l, 0xB0, 0);
    read(l, 0x40);
    assert_eq!(l.acknowledge(), Some(0xFE));
    assert_eq!(status(l), 1 << 5 | 1 << 7);
    assert_eq!(status(l), 0);
    write(l, 0x370, 3);
    read(l, 0x40);
    assert_eq!(l.acknowledge(), None);
}

#[test]
fn software_disabling_masks_the_table_and_refuses_vectors() {
    let (_, chip, mut l) = machine(1);
    self_ipi(&mut l[0], 0x41);
    write(&mut l[0], 0x320, 0x40);
    write(&mut l[0], 0xF0, 0xFF);
    assert_eq!(read(&mut l[0], 0x320), 0x1_0040);
    write(&mut l[0], 0x320, 0x40);
    assert_eq!(read(&mut l[0], 0x320), 0x1_0040);
    chip.send_msi(testudo_arch::irq::Msi {
        address: 0xFEE0_0000,
        data: 0x61,
    });
    assert_eq!(next(&mut l[0]), Some(0x41), "what had been accepted stays");
    assert_eq!(next(&mut l[0]), None);
}

#[test]
fn transitions_of_the_base_register() {
    const DISABLED: u64 = 0xFEE0_0100;
    const XAPIC: u64 = 0xFEE0_0900;
    const X2APIC: u64 = 0xFEE0_0D00;
    const INVALID: u64 = 0xFEE0_0500;
    let ways = |from: &[u64]| {
        [DISABLED, XAPIC, X2APIC, INVALID].map(|to| {
            let (_, _, mut l) = machine(1);
            for step in from {
                l[0].write_msr(Msr::APIC_BASE, *step, || 0).unwrap();
            }
            let result = l[0].write_msr(Msr::APIC_BASE, to, || 0);
            assert_eq!(
                l[0].apic_base() == to,
                result.is_ok(),
                "an error changes nothing"
            );
            result.is_ok()
        })
    };
    assert_eq!(ways(&[DISABLED]), [true, true, false, false]);
    assert_eq!(ways(&[]), [true, true, true, false]);
    assert_eq!(ways(&[X2APIC]), [true, false, true, false]);
    let (_, _, mut l) = machine(1);
    for value in [XAPIC | 1, XAPIC | 1 << 9, XAPIC | 1 << 40] {
        assert_eq!(
            l[0].write_msr(Msr::APIC_BASE, value, || 0),
            Err(ApicMsrError::Reserved {
                msr: Msr::APIC_BASE,
                value
            })
        );
    }
    l[0].write_msr(Msr::APIC_BASE, 0xFF_0000_0900, || 0)
        .unwrap();
    assert_eq!(l[0].mmio_window(), Some(Gpa(0xFF_0000_0000)));
    l[0].write_msr(Msr::APIC_BASE, DISABLED, || 0).unwrap();
    assert_eq!(l[0].mmio_window(), None);
    assert_eq!(read(&mut l[0], 0xF0), 0xFF, "disabling loses the state");
}

#[test]
fn without_the_features_their_bits_are_reserved() {
    let features = LapicFeatures {
        x2apic: false,
        tsc_deadline: false,
        address_bits: 36,
    };
    let (_, mut l) = Irqchip::new(FakeHost::new(), 1, features);
    let l = &mut l[0];
    assert!(l.write_msr(Msr::APIC_BASE, 0xFEE0_0D00, || 0).is_err());
    assert!(l.write_msr(Msr::APIC_BASE, 0x10_0000_0900, || 0).is_err());
    assert_eq!(
        l.read_msr(Msr::TSC_DEADLINE),
        Err(ApicMsrError::Missing(Msr::TSC_DEADLINE))
    );
    write(l, 0xF0, 0x1FF);
    write(l, 0x320, TSC_DEADLINE | 0x40);
    assert_eq!(read(l, 0x320), 0x40);
}

#[test]
fn x2apic_registers_and_their_reserved_bits() {
    let (_, _, mut l) = machine(2);
    let l = &mut l[1];
    assert!(l.read_msr(Msr(0x802)).is_err(), "not in xAPIC mode");
    to_x2apic(l);
    assert_eq!(l.read_msr(Msr(0x802)), Ok(1));
    assert_eq!(l.read_msr(Msr(0x80D)), Ok(2), "cluster 0, member 1");
    assert_eq!(l.mmio_window(), None);
    let write = |l: &mut Lapic, index, value| l.write_msr(Msr(index), value, || 0);
    assert_eq!(write(l, 0x808, 0x20), Ok(()));
    assert_eq!(
        write(l, 0x808, 0x100),
        Err(ApicMsrError::Reserved {
            msr: Msr(0x808),
            value: 0x100
        })
    );
    for (index, value) in [
        (0x80B, 1),
        (0x80F, 1 << 9),
        (0x828, 1),
        (0x832, 1 << 19),
        (0x835, 1 << 11),
        (0x837, 1 << 8),
        (0x838, 1 << 32),
        (0x83E, 4),
        (0x83F, 0x100),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
    ] {
        assert!(
            matches!(write(l, index, value), Err(ApicMsrError::Reserved { .. })),
            "{index:#x} {value:#x}"
        );
    }
    for index in [0x802, 0x803, 0x80A, 0x80D, 0x810, 0x827, 0x839] {
        assert_eq!(write(l, index, 0), Err(ApicMsrError::ReadOnly(Msr(index))));
    }
    for index in [0x800, 0x809, 0x80C, 0x80E, 0x82F, 0x831, 0x840, 0x8FF] {
        assert_eq!(write(l, index, 0), Err(ApicMsrError::Missing(Msr(index))));
        assert_eq!(
            l.read_msr(Msr(index)),
            Err(ApicMsrError::Missing(Msr(index)))
        );
    }
}

#[test]
fn x2apic_ipis() {
    let (_, _, mut l) = machine(18);
    for lapic in &mut l {
        to_x2apic(lapic);
    }
    let mut send = |value: u64| {
        l[0].write_msr(Msr(0x830), value, || 0).unwrap();
        let got: Vec<_> = (0..18).filter(|i| next(&mut l[*i]).is_some()).collect();
        l.iter_mut()
            .for_each(|l| l.write_msr(Msr(0x80B), 0, || 0).unwrap());
        got
    };
    assert_eq!(send(17 << 32 | 0x41), [17]);
    assert_eq!(
        send(0xFF << 32 | 0x41),
        [] as [usize; 0],
        "an ordinary identification here"
    );
    assert_eq!(send(0xFFFF_FFFF << 32 | 0x41), (0..18).collect::<Vec<_>>());
    assert_eq!(send(0x0001_0003 << 32 | 1 << 11 | 0x41), [16, 17]);
    assert_eq!(send(0x0000_8002 << 32 | 1 << 11 | 0x41), [1, 15]);
    l[3].write_msr(Msr(0x83F), 0x51, || 0).unwrap();
    assert_eq!(l[3].acknowledge(), Some(0x51));
}

#[test]
fn accesses_of_other_widths() {
    let (_, _, mut l) = machine(1);
    let l = &mut l[0];
    write(l, 0x80, 0x20);
    l.write_mmio(0x80, &[0x30]);
    l.write_mmio(0x80, &[0x30; 8]);
    l.write_mmio(0x84, &[0x30; 4]);
    assert_eq!(read(l, 0x80), 0x20);
    let mut two = [0xAA; 2];
    l.read_mmio(0x32, &mut two);
    assert_eq!(two, [0x05, 0x01]);
    let mut eight = [0xAA; 8];
    l.read_mmio(0x30, &mut eight);
    assert_eq!(eight, [0x14, 0, 5, 1, 0, 0, 0, 0]);
    l.read_mmio(0x3C, &mut two);
    assert_eq!(two, [0, 0]);
}

proptest! {
    /// Registers against invariants: the processor priority never falls below the task priority's
    /// class, nothing is delivered below it, and no access panics.
    #[test]
    fn priorities_hold_whatever_a_guest_does(steps: Vec<(u8, u16, u32, u8)>) {
        let (host, _, mut lapics) = machine(2);
        for (what, register, value, small) in steps {
            let l = &mut lapics[usize::from(small & 1)];
            match what % 8 {
                0 => self_ipi(l, small),
                1 => write(l, u64::from(register & 0xFF0), value),
                2 => { read(l, u64::from(register)); }
                3 => {
                    let ppr = l.ppr();
                    l.sync();
                    if !l.pic_waits()
                        && let Some(vector) = l.acknowledge()
                    {
                        prop_assert!(vector & 0xF0 > ppr & 0xF0 || ppr != l.ppr());
                        prop_assert!(l.isr().contains(vector) && !l.irr().contains(vector));
                    }
                }
                4 => write(l, 0xB0, 0),
                5 => {
                    let msr = Msr(0x800 + u32::from(register & 0xFF));
                    let _ = l.write_msr(msr, u64::from(value), || 7);
                    let _ = l.read_msr(msr);
                }
                6 => {
                    let base = 0xFEE0_0000 | u64::from(value & 0xD00);
                    let _ = l.write_msr(Msr::APIC_BASE, base, || 0);
                    let _ = l.write_msr(Msr::TSC_DEADLINE, u64::from(value) << 32, || 7);
                }
                _ => {
                    host.pass(u64::from(value));
                    l.poll_timer(host.now());
                    prop_assert!(l.next_deadline().is_none_or(|at| at > host.now()));
                }
            }
            let serving = l.isr().highest().unwrap_or(0) & 0xF0;
            prop_assert!(l.ppr() & 0xF0 == serving.max(l.tpr() & 0xF0));
        }
    }
}
