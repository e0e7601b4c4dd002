use super::*;
use proptest::prelude::*;
use std::string::{String, ToString};
use testudo_arch::Gpr;
use testudo_arch::regs::SegmentRegister;

fn exit(code: u64, info1: u64, info2: u64) -> Exit {
    let mut vmcb = Vmcb::new();
    vmcb.set_exit_code(code);
    vmcb.set_exit_info1(info1);
    vmcb.set_exit_info2(info2);
    Exit::read(&vmcb)
}

#[test]
fn every_named_code_decodes_to_itself() {
    for &code in ExitCode::NAMED {
        let exit = exit(code.0, 0, 0);
        assert_eq!(exit.code(), code);
        let unknown = matches!(exit, Exit::Unknown { .. });
        assert_eq!(unknown, code == ExitCode::UNUSED, "{code:?}");
    }
}

#[test]
fn port_accesses() {
    // OUT DX, AL to 0x3F8 with 64-bit addresses, as QEMU reports it.
    let Exit::Port(access) = exit(0x7B, 0x03F8_0210, 0x1002) else {
        panic!("not a port");
    };
    assert_eq!((access.port, access.size, access.input), (0x3F8, 1, false));
    assert_eq!(
        (access.string, access.rep, access.next_rip),
        (false, false, 0x1002)
    );
    assert_eq!(access.to_string(), "OUT, port 0x3f8, 1 byte");
    // REP INSW from 0x1F0 to ES:DI with 16-bit addresses.
    let Exit::Port(access) = exit(0x7B, 0x01F0_00AD, 0) else {
        panic!("not a port");
    };
    assert_eq!((access.size, access.address_size), (2, 2));
    assert!(access.input && access.string && access.rep);
    assert_eq!(access.segment(), Some(SegmentRegister::Es));
    assert_eq!(access.to_string(), "REP INS, port 0x1f0, 2 bytes");
}

#[test]
fn control_and_debug_registers() {
    // MOV CR3, RBX with decode assists.
    let expected = CrAccess {
        register: 3,
        write: true,
        gpr: Some(Gpr::Rbx),
    };
    let mov = exit(0x13, 1 << 63 | 3, 0);
    assert_eq!(mov, Exit::Cr(expected));
    assert_eq!(mov.to_string(), "write of CR3 with rbx");
    // CLTS, or anything without decode assists.
    assert!(matches!(
        exit(0x10, 0, 0),
        Exit::Cr(CrAccess {
            gpr: None,
            register: 0,
            ..
        })
    ));
    assert_eq!(exit(0x10, 0, 0).to_string(), "write of CR0");
    let Exit::Dr(dr) = exit(0x27, 9, 0) else {
        panic!("not a debug register");
    };
    assert_eq!(
        (dr.register, dr.write, dr.assisted_gpr),
        (7, false, Gpr::R9)
    );
    assert_eq!(exit(0x94, 0x20, 0).to_string(), "CR4 written: 0x20");
}

#[test]
fn exceptions() {
    let pf = exit(0x4E, 0x6, 0xFFFF_8000_0000_1000);
    assert_eq!(pf.to_string(), "#PF(0x6) at 0xffff800000001000");
    let ud = exit(0x46, 0xDEAD, 0xBEEF);
    let Exit::Exception(info) = ud else {
        panic!("not an exception");
    };
    assert_eq!(info.to_event(), testudo_arch::Event::UD);
    assert_eq!(exit(0x5F, 0, 0).to_string(), "exception 31");
    // EXITINFO1 is undefined for a double fault, whose error code is always zero.
    assert_eq!(exit(0x48, 0xDEAD, 0).to_string(), "#DF(0x0)");
    assert_eq!(exit(0x4D, 0x18, 0).to_string(), "#GP(0x18)");
}

#[test]
fn nested_page_faults() {
    let fault = exit(0x400, 1 << 32 | 0b110, 0xFEE0_0080);
    assert_eq!(
        fault.to_string(),
        "nested page fault: write of 0xfee00080: not present"
    );
    let walk = exit(0x400, 1 << 33 | 0b101, 0x1000);
    assert_eq!(
        walk.to_string(),
        "nested page fault: read of 0x1000 in the guest's page table: not allowed"
    );
}

#[test]
fn task_switches() {
    let Exit::TaskSwitch(switch) = exit(0x7D, 0x28, 1 << 44 | 1 << 38 | 0x18) else {
        panic!("not a task switch");
    };
    assert_eq!(switch.reason, TaskSwitchReason::Jump);
    assert_eq!((switch.selector, switch.error_code), (0x28, Some(0x18)));
    assert!(!switch.resume_flag);
}

#[test]
fn avic() {
    let ipi = exit(0x401, 0x0200_0000_0000_0031, 1 << 32 | 2);
    let expected = IncompleteIpi {
        icr: 0x0200_0000_0000_0031,
        reason: IncompleteIpiReason::TargetNotRunning,
        index: 2,
    };
    assert_eq!(ipi, Exit::IncompleteIpi(expected));
    let access = exit(0x402, 1 << 32 | 0xB0, 0x31);
    assert_eq!(access.to_string(), "AVIC: write of APIC register 0xb0");
}

#[test]
fn failed_entries_keep_their_sign() {
    assert_eq!(exit(u64::MAX, 0, 0), Exit::Invalid);
    // Implementations that write 32 bits only.
    assert_eq!(exit(0xFFFF_FFFF, 0, 0), Exit::Invalid);
    assert_eq!(exit(0xFFFF_FFFC, 0, 0), Exit::InvalidPmc);
    assert!(ExitCode::from_vmcb(0xFFFF_FFFE).is_failed_entry());
    assert!(!ExitCode::CPUID.is_failed_entry() && !ExitCode::UNUSED.is_failed_entry());
}

#[test]
fn words() {
    let text: [String; 4] = [
        exit(0x72, 0, 0).to_string(),
        exit(0x7C, 1, 0).to_string(),
        exit(0x60, 0, 0).to_string(),
        exit(0x3FF, 1, 2).to_string(),
    ];
    assert_eq!(
        text,
        [
            "CPUID",
            "WRMSR",
            "physical interrupt",
            "unknown exit 0x3ff (0x1, 0x2)"
        ]
    );
}

proptest! {
    #[test]
    fn whatever_the_processor_says_decodes_and_prints(
        code in prop_oneof![any::<u64>(), 0u64..0x500, (0u64..8).prop_map(|n| n.wrapping_neg())],
        info1: u64,
        info2: u64,
    ) {
        let exit = exit(code, info1, info2);
        prop_assert_eq!(exit.code(), ExitCode::from_vmcb(code));
        prop_assert!(!exit.to_string().is_empty());
    }

    #[test]
    fn port_accesses_round_trip(
        port: u16, size in 0u32..3, address in 0u32..3, segment in 0u8..6,
        input: bool, string: bool, rep: bool, next_rip: u64,
    ) {
        let access = PortAccess {
            port, size: 1 << size, input, string, rep, address_size: 2 << address,
            raw_segment: segment, next_rip,
        };
        prop_assert_eq!(exit(0x7B, access.to_info1(), next_rip), Exit::Port(access));
    }
}
