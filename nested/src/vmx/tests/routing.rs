//! The routing of exits against a second, straight reading of the manual (SDM vol. 3C, 28.1 and
//! 28.2): which control, by number of word and bit, asks for which exit.

use super::*;
use crate::vmx::route::{ExitDetails, L0Windows, Route, route};
use proptest::prelude::*;
use testudo_vmx::event::InterruptionInformation;

/// The control words of L1's VMCS by their names in the table below.
const PIN: u32 = 0x4000;
const PRIMARY: u32 = 0x4002;
const SECONDARY: u32 = 0x401E;

/// (basic exit reason, control word, bit): one control decides.
const BY_CONTROL: [(u16, u32, u32); 23] = [
    (7, PRIMARY, 2),
    (8, PRIMARY, 22),
    (12, PRIMARY, 7),
    (14, PRIMARY, 9),
    (15, PRIMARY, 11),
    (16, PRIMARY, 12),
    (29, PRIMARY, 23),
    (30, PRIMARY, 24),
    (36, PRIMARY, 10),
    (37, PRIMARY, 27),
    (39, PRIMARY, 29),
    (40, PRIMARY, 30),
    (43, PRIMARY, 21),
    (44, SECONDARY, 0),
    (46, SECONDARY, 2),
    (47, SECONDARY, 2),
    (51, PRIMARY, 12),
    (52, PIN, 6),
    (54, SECONDARY, 6),
    (57, SECONDARY, 11),
    (61, SECONDARY, 16),
    (31, PRIMARY, u32::MAX),
    (32, PRIMARY, u32::MAX),
];

/// Instructions and events that exit without a control (28.1.2, 28.2), task switches and triple faults.
const ALWAYS: [u16; 22] = [
    2, 9, 10, 11, 13, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 33, 34, 50, 53, 55, 59,
];

/// The host's own business, features that L1 is not offered, and what nobody knows yet.
const NEVER: [u16; 23] = [
    1, 3, 4, 5, 6, 41, 48, 49, 60, 62, 63, 64, 65, 66, 67, 68, 74, 75, 80, 81, 84, 85, 0x7FFF,
];

fn details(reason: u16, gprs: &Gprs) -> ExitDetails<'_> {
    ExitDetails {
        reason: BasicReason::from_number(reason),
        qualification: 0,
        interruption: InterruptionInformation(0),
        error_code: 0,
        gprs,
    }
}

fn routed(exit: &ExitDetails<'_>, vmcs12: &VmcsImage) -> Route {
    route(exit, vmcs12, L0Windows::default(), &Memory::new()).unwrap()
}

fn image(words: &[(u32, u32)]) -> VmcsImage {
    let mut image = VmcsImage::new();
    for (field, value) in words {
        let old = image.read_raw(Encoding(*field)).unwrap();
        image
            .write_raw(Encoding(*field), old | u64::from(*value))
            .unwrap();
    }
    image
}

#[test]
fn each_control_asks_for_its_exits_and_no_others() {
    let gprs = Gprs::default();
    for (reason, word, bit) in BY_CONTROL {
        if bit == u32::MAX {
            continue;
        }
        let exit = details(reason, &gprs);
        let activate = 1 << 31;
        let only = image(&[(PRIMARY, activate), (word, 1 << bit)]);
        assert_eq!(routed(&exit, &only), Route::L1, "reason {reason}");
        let mut words = [(PIN, !0), (PRIMARY, !0), (SECONDARY, !0)];
        for entry in &mut words {
            if entry.0 == word {
                entry.1 &= !(1 << bit);
            }
            // The bitmaps have their own test.
            if entry.0 == PRIMARY {
                entry.1 &= !(1 << 25);
            }
        }
        assert_eq!(routed(&exit, &image(&words)), Route::L0, "reason {reason}");
        if word == SECONDARY {
            // Not activated, the word is as if it were zero.
            let off = image(&[(word, 1 << bit)]);
            assert_eq!(routed(&exit, &off), Route::L0, "reason {reason}");
        }
    }
}

#[test]
fn an_end_of_interrupt_is_asked_for_by_the_control_and_the_bit_of_its_vector() {
    const BITMAPS: [u32; 4] = [0x201C, 0x201E, 0x2020, 0x2022];
    let gprs = Gprs::default();
    for vector in 0..=0xFF_u32 {
        let exit = ExitDetails {
            qualification: vector.into(),
            ..details(45, &gprs)
        };
        for (delivers, bit, expected) in [
            (1 << 9, 1 << (vector % 64), Route::L1),
            (1 << 9, !(1 << (vector % 64)), Route::L0),
            (!(1 << 9), 1 << (vector % 64), Route::L0),
        ] {
            let mut vmcs12 = image(&[(PRIMARY, 1 << 31), (SECONDARY, delivers)]);
            for (index, field) in (0..).zip(BITMAPS) {
                // The other words say otherwise.
                let own = index == vector / 64;
                let word: u64 = if own {
                    bit
                } else {
                    !0 * u64::from(bit.count_ones() > 1)
                };
                vmcs12.write_raw(Encoding(field), word).unwrap();
            }
            assert_eq!(routed(&exit, &vmcs12), expected, "vector {vector:#x}");
        }
    }
}

#[test]
fn what_no_control_decides() {
    let gprs = Gprs::default();
    let none = VmcsImage::new();
    let all = image(&[(PIN, !0), (PRIMARY, !0), (SECONDARY, !0 - 2)]);
    for reason in ALWAYS {
        for vmcs12 in [&none, &all] {
            assert_eq!(
                routed(&details(reason, &gprs), vmcs12),
                Route::L1,
                "reason {reason}"
            );
        }
    }
    for reason in NEVER {
        for vmcs12 in [&none, &all] {
            assert_eq!(
                routed(&details(reason, &gprs), vmcs12),
                Route::L0,
                "reason {reason}"
            );
        }
    }
    // Every reason of the manual is in one of the tables, or has a test of its own.
    let own = [
        0, 28, 30, 31, 32, 45, 56, 58, 69, 70, 72, 73, 76, 77, 78, 79,
    ];
    for reason in BasicReason::ALL {
        let number = reason.number();
        let known = BY_CONTROL.iter().any(|r| r.0 == number)
            || ALWAYS.contains(&number)
            || NEVER.contains(&number)
            || own.contains(&number);
        assert!(known, "{reason}");
    }
}

#[test]
fn ept_faults_under_l1s_ept_go_through_it() {
    let gprs = Gprs::default();
    let ept = image(&[(PRIMARY, 1 << 31), (SECONDARY, 2)]);
    for reason in [48, 49] {
        assert_eq!(routed(&details(reason, &gprs), &ept), Route::SecondStage);
    }
}

#[test]
fn invpcid_needs_both_controls() {
    let gprs = Gprs::default();
    let exit = details(58, &gprs);
    let both = image(&[(PRIMARY, 1 << 31 | 1 << 9), (SECONDARY, 1 << 12)]);
    assert_eq!(routed(&exit, &both), Route::L1);
    assert_eq!(
        routed(&exit, &image(&[(PRIMARY, 1 << 31), (SECONDARY, 1 << 12)])),
        Route::L0
    );
    assert_eq!(
        routed(&exit, &image(&[(PRIMARY, 1 << 31 | 1 << 9)])),
        Route::L0
    );
}

/// A write that the processor has put into the virtual-APIC page, but not carried out (32.4.3.2, 32.5).
#[test]
fn apic_writes_exit_by_either_of_two_controls() {
    let gprs = Gprs::default();
    let exit = details(56, &gprs);
    for bit in [8, 9] {
        let only = image(&[(PRIMARY, 1 << 31), (SECONDARY, 1 << bit)]);
        assert_eq!(routed(&exit, &only), Route::L1);
    }
    let neither = image(&[(PRIMARY, !0), (SECONDARY, !0x300)]);
    assert_eq!(routed(&exit, &neither), Route::L0);
}

proptest! {
    /// 27.6.3: bit n of the bitmap, and for page faults mask and match, which invert it.
    #[test]
    fn exceptions(bitmap: u32, vector in 0u32..32, code: u32, mask: u32, matching: u32) {
        let mut vmcs12 = VmcsImage::new();
        vmcs12.set(fields::EXCEPTION_BITMAP, bitmap).unwrap();
        vmcs12.set(fields::PAGE_FAULT_ERROR_CODE_MASK, mask).unwrap();
        vmcs12.set(fields::PAGE_FAULT_ERROR_CODE_MATCH, matching).unwrap();
        let gprs = Gprs::default();
        let exit = ExitDetails {
            interruption: InterruptionInformation(1 << 31 | 3 << 8 | vector),
            error_code: code,
            ..details(0, &gprs)
        };
        let mut wanted = bitmap >> vector & 1 == 1;
        if vector == 14 && code & mask != matching {
            wanted = !wanted;
        }
        // A machine check is the host's.
        wanted &= vector != 18;
        prop_assert_eq!(routed(&exit, &vmcs12) == Route::L1, wanted);
        let nmi = ExitDetails { interruption: InterruptionInformation(0x8000_0202), ..exit };
        prop_assert_eq!(routed(&nmi, &vmcs12), Route::L0);
    }

    /// 28.1.3, "CLTS", "LMSW", "MOV from CR3", "MOV to CR0" and so on, bit by bit.
    #[test]
    fn control_registers(
        kind in 0u64..4, register in prop_oneof![Just(0u64), Just(3), Just(4), Just(8)], value: u64,
        mask: u64, shadow: u64, primary: u32, targets in prop::collection::vec(any::<u64>(), 4),
        count in 0u32..5, hit in prop::option::of(0usize..4),
    ) {
        let mut vmcs12 = VmcsImage::new();
        vmcs12.set(fields::PRIMARY_CONTROLS, primary).unwrap();
        let (mask_field, shadow_field) = if register == 4 {
            (fields::CR4_GUEST_HOST_MASK, fields::CR4_READ_SHADOW)
        } else {
            (fields::CR0_GUEST_HOST_MASK, fields::CR0_READ_SHADOW)
        };
        vmcs12.set(mask_field, mask).unwrap();
        vmcs12.set(shadow_field, shadow).unwrap();
        vmcs12.set(fields::CR3_TARGET_COUNT, count).unwrap();
        let value = hit.map_or(value, |i| targets[i]);
        for (i, target) in targets.iter().enumerate() {
            let encoding = fields::CR3_TARGET_VALUE_0.encoding().0 + 2 * i as u32;
            vmcs12.write_raw(Encoding(encoding), *target).unwrap();
        }
        let gprs = Gprs { rdx: value, ..Gprs::default() };
        let source = value & 0xFFFF;
        let qualification = register | kind << 4 | 2 << 8 | source << 16;
        let exit = ExitDetails { qualification, ..details(28, &gprs) };
        let bit = |n: u32| primary >> n & 1 == 1;
        let any_owned_bit_differs = |range: std::ops::Range<u32>, value: u64| {
            range.clone().any(|n| mask >> n & 1 == 1 && (value >> n & 1) != (shadow >> n & 1))
        };
        let wanted = match (kind, register) {
            (0, 0 | 4) => any_owned_bit_differs(0..64, value),
            (0, 3) => bit(15) && !targets[..count as usize].contains(&value),
            (0, _) => bit(19),
            (1, 3) => bit(16),
            (1, 8) => bit(20),
            (1, _) => false,
            (2, 4) => false,
            (2, _) => mask & 8 != 0 && shadow & 8 != 0,
            (_, 4) => false,
            _ => {
                let sets_pe = mask & 1 == 1 && source & 1 == 1 && shadow & 1 == 0;
                sets_pe || any_owned_bit_differs(1..4, source)
            }
        };
        // CLTS and LMSW are about CR0 whatever the qualification's register says.
        prop_assume!(!(kind >= 2 && register == 4));
        prop_assert_eq!(routed(&exit, &vmcs12) == Route::L1, wanted);
    }

    /// 27.6.4: bitmap A for ports below 0x8000, B above; wrapping accesses exit; no bitmaps: the
    /// unconditional control.
    #[test]
    fn ports(
        port: u16, size in prop_oneof![Just(0u64), Just(1), Just(3)], closed in prop::collection::vec(any::<u16>(), 0..20),
        near in -3i32..4, unconditional: bool, bitmaps: bool,
    ) {
        let memory = Memory::new();
        let mut vmcs12 = VmcsImage::new();
        vmcs12.set(fields::IO_BITMAP_A, 0x20000).unwrap();
        vmcs12.set(fields::IO_BITMAP_B, 0x30000).unwrap();
        let primary = u32::from(unconditional) << 24 | u32::from(bitmaps) << 25;
        vmcs12.set(fields::PRIMARY_CONTROLS, primary).unwrap();
        let mut closed = closed;
        closed.push((i32::from(port) + near) as u16);
        for p in &closed {
            let at = Gpa(if *p < 0x8000 { 0x20000 } else { 0x30000 } + u64::from(p & 0x7FFF) / 8);
            let mut byte = [0];
            memory.read(at, &mut byte).unwrap();
            memory.write(at, &[byte[0] | 1 << (p % 8)]).unwrap();
        }
        let gprs = Gprs::default();
        let qualification = size | u64::from(port) << 16;
        let exit = ExitDetails { qualification, ..details(30, &gprs) };
        let touched: Vec<u32> = (u32::from(port)..=u32::from(port) + size as u32).collect();
        let wanted = if bitmaps {
            touched.iter().any(|p| *p > 0xFFFF || closed.contains(&(*p as u16)))
        } else {
            unconditional
        };
        prop_assert_eq!(route(&exit, &vmcs12, L0Windows::default(), &memory).unwrap() == Route::L1, wanted);
    }

    /// 27.6.9: four kilobytes, reads before writes, low before high.
    #[test]
    fn msrs(msr: u32, write: bool, closed in prop::collection::vec(0usize..4096, 0..40), bitmaps: bool) {
        let memory = Memory::new();
        let mut vmcs12 = VmcsImage::new();
        vmcs12.set(fields::MSR_BITMAPS, 0x20000).unwrap();
        vmcs12.set(fields::PRIMARY_CONTROLS, u32::from(bitmaps) << 28).unwrap();
        for byte in closed {
            memory.write(Gpa(0x20000 + byte as u64), &[0xA5]).unwrap();
        }
        let mut page = [0; 4096];
        memory.read(Gpa(0x20000), &mut page).unwrap();
        let bitmap = MsrBitmap::from_bytes(&page);
        for msr in [msr, msr & 0x1FFF, 0xC000_0000 | msr & 0x1FFF] {
            let gprs = Gprs { rcx: u64::from(msr) | 7 << 32, ..Gprs::default() };
            let exit = details(if write { 32 } else { 31 }, &gprs);
            let told = if write { bitmap.write_exits(Msr(msr)) } else { bitmap.read_exits(Msr(msr)) };
            let wanted = !bitmaps || told;
            prop_assert_eq!(route(&exit, &vmcs12, L0Windows::default(), &memory).unwrap() == Route::L1, wanted);
        }
    }
}

#[test]
fn a_window_belongs_to_who_asked() {
    let gprs = Gprs::default();
    let memory = Memory::new();
    for (reason, control, interrupt) in [(7, 4, true), (8, 1 << 22, false)] {
        let exit = details(reason, &gprs);
        let asked = image(&[(PRIMARY, control)]);
        let windows = L0Windows {
            interrupt,
            nmi: !interrupt,
            timer: false,
        };
        let routed = |windows| route(&exit, &asked, windows, &memory).unwrap();
        assert_eq!(routed(windows), Route::L0);
        assert_eq!(routed(L0Windows::default()), Route::L1);
    }
}
