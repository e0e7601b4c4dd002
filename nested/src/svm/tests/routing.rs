//! The routing of exits against a second, straight reading of the manual: APM vol. 2, table B-1
//! (which bit of which offset asks for an exit) and appendix C (the exit codes), written out by
//! hand and compared over every bit.

use super::*;
use crate::svm::{RawExit, Route, route};
use testudo_svm::exit::NestedFaultBits;
use zerocopy::IntoBytes;

/// (exit code, offset in the VMCB, bit).
fn table() -> Vec<(u64, usize, u32)> {
    let mut rows = Vec::new();
    for n in 0..16 {
        rows.push((u64::from(n), 0x000, n));
        rows.push((0x10 + u64::from(n), 0x000, 16 + n));
        rows.push((0x20 + u64::from(n), 0x004, n));
        rows.push((0x30 + u64::from(n), 0x004, 16 + n));
        // CR0 to CR15 written, as traps.
        rows.push((0x90 + u64::from(n), 0x010, 16 + n));
    }
    for vector in 0..32 {
        rows.push((0x40 + u64::from(vector), 0x008, vector));
    }
    // Offset 00Ch, from INTR on bit 0 to the shutdown on bit 31.
    for bit in 0..32 {
        rows.push((0x60 + u64::from(bit), 0x00C, bit));
    }
    // Offset 010h: VMRUN on bit 0 to the EFER write trap on bit 15.
    for bit in 0..16 {
        rows.push((0x80 + u64::from(bit), 0x010, bit));
    }
    // Offset 014h: INVLPGB, illegal INVLPGB, INVPCID, MCOMMIT, TLBSYNC, bus lock, idle HLT.
    for bit in 0..7 {
        rows.push((0xA0 + u64::from(bit), 0x014, bit));
    }
    rows
}

/// What the bits alone do not decide.
const SPECIAL: [u64; 9] = [
    0x10, 0x65, // CR0 writes: all, and the selective ones
    0x52, // #MC is the host's
    0x60, 0x61, 0x62, 0x63, // INTR, NMI, SMI, INIT are the host's
    0x7B, 0x7C, // ports and MSRs have their maps
];

fn with_bit(offset: usize, bit: u32, others: bool) -> Vmcb {
    let mut vmcb = Vmcb::new();
    let bytes = vmcb.as_mut_bytes();
    if others {
        bytes[..0x18].fill(0xFF);
    }
    let word = &mut bytes[offset..offset + 4];
    let value = u32::from_le_bytes(word.try_into().unwrap()) ^ (1 << bit);
    word.copy_from_slice(&value.to_le_bytes());
    vmcb
}

fn routed(code: u64, vmcb12: &Vmcb) -> Route {
    let exit = RawExit {
        code: ExitCode(code),
        info1: 0,
        rcx: 0,
    };
    route(&exit, vmcb12, false, &Memory::new())
}

#[test]
fn every_bit_asks_for_its_exit_and_for_no_other() {
    let rows = table();
    assert_eq!(rows.len(), 5 * 16 + 32 + 32 + 16 + 7);
    for &(code, offset, bit) in &rows {
        if SPECIAL.contains(&code) {
            continue;
        }
        let only = routed(code, &with_bit(offset, bit, false));
        assert_eq!(only, Route::L1(ExitCode(code)), "{code:#x} asked for");
        let all_but = routed(code, &with_bit(offset, bit, true));
        assert_eq!(all_but, Route::L0, "{code:#x} not asked for");
    }
}

#[test]
fn what_is_the_hosts_never_goes_to_l1_directly() {
    let mut all = Vmcb::new();
    all.as_mut_bytes()[..0x18].fill(0xFF);
    for code in [0x52, 0x60, 0x61, 0x62, 0x63] {
        assert_eq!(routed(code, &all), Route::L0, "{code:#x}");
    }
    // No intercept asks for these: L0's own nested page faults, AVIC, VMGEXIT, the unknown.
    for code in [
        0x400,
        0x401,
        0x402,
        0x403,
        0xC0,
        0x3FF,
        0xF000_0000,
        0x7FFF_FFFF,
    ] {
        assert_eq!(routed(code, &all), Route::L0, "{code:#x}");
    }
}

#[test]
fn a_failed_entry_is_l1s() {
    for code in [u64::MAX, u64::MAX - 1, u64::MAX - 3] {
        let route = routed(code, &Vmcb::new());
        assert_eq!(route, Route::L1(ExitCode::INVALID));
    }
}

#[test]
fn cr0_writes_are_seen_by_whoever_asked_in_either_way() {
    let plain = with_bit(0x000, 16, false);
    let selective = with_bit(0x00C, 5, false);
    let write = Route::L1(ExitCode(0x10));
    let sel = Route::L1(ExitCode::CR0_SEL_WRITE);
    assert_eq!(routed(0x10, &plain), write);
    assert_eq!(routed(0x65, &plain), write);
    assert_eq!(routed(0x10, &selective), sel);
    assert_eq!(routed(0x65, &selective), sel);
    assert_eq!(routed(0x10, &Vmcb::new()), Route::L0);
    assert_eq!(routed(0x65, &Vmcb::new()), Route::L0);
    let mut both = plain;
    both.set_intercept_misc1(Misc1::CR0_SELECTIVE_WRITE);
    // The processor's own choice between the two stands.
    assert_eq!(routed(0x10, &both), write);
    assert_eq!(routed(0x65, &both), sel);
}

#[test]
fn the_interrupt_window_belongs_to_who_asked() {
    let exit = RawExit {
        code: ExitCode::VINTR,
        info1: 0,
        rcx: 0,
    };
    let asked = with_bit(0x00C, 4, false);
    let memory = Memory::new();
    assert_eq!(
        route(&exit, &asked, false, &memory),
        Route::L1(ExitCode::VINTR)
    );
    assert_eq!(route(&exit, &asked, true, &memory), Route::L0);
    assert_eq!(route(&exit, &Vmcb::new(), true, &memory), Route::L0);
}

#[test]
fn nested_page_faults_under_l1s_table_go_through_it() {
    let mut vmcb12 = Vmcb::new();
    assert_eq!(routed(0x400, &vmcb12), Route::L0);
    vmcb12.set_nested_control(NestedControl::NP_ENABLE);
    assert_eq!(routed(0x400, &vmcb12), Route::SecondStage);
}

#[test]
fn ports_and_msrs_are_l1s_as_its_maps_say() {
    let memory = Memory::new();
    let mut vmcb12 = with_bit(0x00C, 27, false);
    vmcb12.set_intercept_misc1(Misc1::IOIO | Misc1::MSR);
    // The low bits of the addresses do not count.
    vmcb12.set_iopm_base_pa(IOPM12.0 | 0xFFF);
    vmcb12.set_msrpm_base_pa(MSRPM12.0 | 0x123);
    let mut ports = IoPermissionMap::intercept_none();
    ports.set(0x3FB, true);
    memory.write(IOPM12, ports.as_bytes()).unwrap();
    let mut msrs = MsrPermissionMap::intercept_none();
    msrs.set(Msr::STAR, MsrAccess::WRITE);
    memory.write(MSRPM12, msrs.as_bytes()).unwrap();

    let port = |port: u64, size: u64| {
        let info1 = port << 16 | size << 4 | 1;
        let exit = RawExit {
            code: ExitCode::IOIO,
            info1,
            rcx: 0,
        };
        route(&exit, &vmcb12, false, &memory) != Route::L0
    };
    assert!(!port(0x3F8, 1) && !port(0x3F8, 2) && port(0x3F8, 4));
    assert!(port(0x3FB, 1) && port(0x3FA, 2) && !port(0x3FC, 4));

    let msr = |msr: u64, write: u64| {
        let exit = RawExit {
            code: ExitCode::MSR,
            info1: write,
            rcx: msr,
        };
        route(&exit, &vmcb12, false, &memory) != Route::L0
    };
    assert!(msr(0xC000_0081, 1) && !msr(0xC000_0081, 0) && !msr(0xC000_0082, 1));
    // ECX counts, not RCX; and what is outside the map exits always.
    assert!(msr(0xFFFF_0000_C000_0081, 1) && msr(0x4000_0000, 0));
    let without = Vmcb::new();
    assert_eq!(routed(0x7B, &without), Route::L0);
    assert_eq!(routed(0x7C, &without), Route::L0);
}

#[test]
fn the_second_stage_decides_what_l1_sees() {
    let fault = NestedPageFault {
        gpa: Gpa(0x1234_5678),
        bits: NestedFaultBits::WRITE | NestedFaultBits::USER | NestedFaultBits::FINAL,
    };
    let reflected = NestedPageFault {
        bits: fault.bits | NestedFaultBits::PRESENT,
        ..fault
    };
    for (answer, expected) in [
        (NestedFault::Resolved, Some(Handled::Resume)),
        (
            NestedFault::Host(Gpa(0xFEC0_0000)),
            Some(Handled::Memory(Gpa(0xFEC0_0000))),
        ),
        (NestedFault::Reflect(reflected), None),
    ] {
        let mut vm = Vm::full();
        vm.edit12(|v| {
            v.set_nested_control(NestedControl::NP_ENABLE);
            v.set_n_cr3(0x4000);
        });
        vm.enter();
        assert_eq!(vm.nested.vmcb02().n_cr3(), COMPOSED_ROOT.0);
        assert_eq!(vm.stage.activated[0].root, Gpa(0x4000));
        vm.stage.answer = Some(answer);
        let handled = vm.exit(ExitCode::NPF, fault.bits.bits(), fault.gpa.0);
        match expected {
            Some(expected) => assert_eq!(handled, expected),
            None => {
                assert!(matches!(handled, Handled::L1(_)));
                let vmcb12 = vm.vmcb12();
                assert_eq!(vmcb12.exit_code(), 0x400);
                assert_eq!(vmcb12.exit_info1(), reflected.bits.bits());
                assert_eq!(vmcb12.exit_info2(), fault.gpa.0);
            }
        }
    }
}
