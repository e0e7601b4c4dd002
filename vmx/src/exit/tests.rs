use super::*;
use crate::caps::fixtures;
use crate::fake::FakeVmcs;
use crate::fields;
use crate::vmcs::VmcsWrite;
use proptest::prelude::*;

fn exit_of(reason: u16, set: &[(crate::encoding::Encoding, u64)]) -> (Exit, usize) {
    let mut vmcs = FakeVmcs::new();
    vmcs.preset(fields::EXIT_REASON, reason.into());
    for &(field, value) in set {
        vmcs.preset(field, value);
    }
    let exit = Exit::read(&vmcs).unwrap();
    (exit, vmcs.counts().0)
}

#[test]
fn hot_exits_read_no_more_than_they_need() {
    let expected = [
        (BasicReason::Cpuid, 1),
        (BasicReason::Hlt, 1),
        (BasicReason::Rdmsr, 1),
        (BasicReason::Wrmsr, 1),
        (BasicReason::Vmcall, 1),
        (BasicReason::InterruptWindow, 1),
        (BasicReason::PreemptionTimer, 1),
        (BasicReason::ExternalInterrupt, 2),
        (BasicReason::Io, 2),
        (BasicReason::ControlRegister, 2),
        (BasicReason::ApicWrite, 2),
        (BasicReason::ApicAccess, 2),
        (BasicReason::EptViolation, 3),
    ];
    for (reason, reads) in expected {
        assert_eq!(exit_of(reason.number(), &[]).1, reads, "{reason}");
    }
}

#[test]
fn the_cpuid_path_has_three_reads_and_one_write() {
    let mut vmcs = FakeVmcs::new();
    vmcs.preset(fields::EXIT_REASON, 10)
        .preset(fields::EXIT_INSTRUCTION_LENGTH, 2)
        .preset(fields::GUEST_RIP, 0x1000);
    assert_eq!(Exit::read(&vmcs), Ok(Exit::Cpuid));
    advance(&mut vmcs).unwrap();
    assert_eq!(vmcs.counts(), (3, 1));
    assert_eq!(vmcs.get(fields::GUEST_RIP), Ok(0x1002));
}

#[test]
fn the_instruction_pointer_wraps_outside_64_bit_mode() {
    let mut vmcs = FakeVmcs::new();
    vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 2)
        .preset(fields::GUEST_RIP, 0xFFFF_FFFE)
        .preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
    advance(&mut vmcs).unwrap();
    assert_eq!(vmcs.get(fields::GUEST_RIP), Ok(0));
    vmcs.preset(fields::GUEST_RIP, 0xFFFF_FFFE)
        .preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xA09B);
    advance(&mut vmcs).unwrap();
    assert_eq!(vmcs.get(fields::GUEST_RIP), Ok(0x1_0000_0000));
}

#[test]
fn completion_ends_the_shadow_and_steps() {
    let mut vmcs = FakeVmcs::new();
    vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 0b1001)
        .preset(fields::GUEST_RFLAGS, 0x102);
    complete_instruction(&mut vmcs).unwrap();
    assert_eq!(vmcs.get(fields::GUEST_INTERRUPTIBILITY), Ok(0b1000));
    assert_eq!(vmcs.get(fields::GUEST_PENDING_DEBUG), Ok(1 << 14));
    vmcs.set(fields::GUEST_PENDING_DEBUG, 0).unwrap();
    vmcs.set(fields::GUEST_DEBUGCTL, 2).unwrap();
    complete_instruction(&mut vmcs).unwrap();
    assert_eq!(vmcs.get(fields::GUEST_PENDING_DEBUG), Ok(0));
    vmcs.set(fields::GUEST_RFLAGS, 2).unwrap();
    vmcs.clear_trace();
    complete_instruction(&mut vmcs).unwrap();
    assert_eq!(vmcs.counts(), (4, 1));
}

#[test]
fn every_defined_reason_is_decoded() {
    for reason in BasicReason::ALL {
        let (exit, _) = exit_of(reason.number(), &[]);
        assert!(!matches!(exit, Exit::Unknown(_)), "{reason}");
        assert_eq!(exit.reason(), *reason);
    }
}

#[test]
fn what_exits_say() {
    let qualification = fields::EXIT_QUALIFICATION.encoding();
    let linear = fields::GUEST_LINEAR_ADDRESS.encoding();
    let gpa = fields::GUEST_PHYSICAL_ADDRESS.encoding();
    let violation = [(qualification, 0x181), (gpa, 0xFEE0_0030), (linear, 0x7000)];
    let (exit, reads) = exit_of(48, &violation);
    let Exit::EptViolation(violation) = exit else {
        panic!("{exit:?}");
    };
    assert_eq!(
        (violation.gpa, violation.linear),
        (Gpa(0xFEE0_0030), Some(Gva(0x7000)))
    );
    assert!(violation.qualification.contains(EptQualification::READ));
    assert_eq!(reads, 4);

    let (exit, _) = exit_of(33, &[(qualification, 4)]);
    let failure = EntryFailure::GuestState(GuestStateFailure::LinkPointer);
    assert_eq!(exit, Exit::EntryFailure(failure));

    let information = fields::EXIT_INTERRUPTION_INFORMATION.encoding();
    let (exit, _) = exit_of(1, &[(information, 0x8000_0055)]);
    assert_eq!(exit, Exit::ExternalInterrupt { vector: Some(0x55) });

    let code = fields::EXIT_INTERRUPTION_ERROR_CODE.encoding();
    let fault = [
        (information, 0x8000_0B0E),
        (code, 2),
        (qualification, 0x1234),
    ];
    let (exit, _) = exit_of(0, &fault);
    let expected = Exit::Exception {
        information: InterruptionInformation(0x8000_0B0E),
        error_code: 2,
        qualification: 0x1234,
    };
    assert_eq!(exit, expected);

    let (exit, reads) = exit_of(30, &[(qualification, 0x03F8_0010), (linear, 0x2000)]);
    let Exit::Io(access, Some(string)) = exit else {
        panic!("{exit:?}");
    };
    assert_eq!((access.port, string.linear, reads), (0x3F8, Gva(0x2000), 4));
}

#[test]
fn no_reason_is_an_error_on_any_processor() {
    for (name, caps) in fixtures::all() {
        for reason in 0..=200 {
            let mut vmcs = FakeVmcs::with_caps(&caps);
            vmcs.preset(fields::EXIT_REASON, reason);
            let exit = Exit::read(&vmcs);
            assert!(exit.is_ok(), "{name}, {reason}: {exit:?}");
        }
    }
}

#[test]
fn what_rare_exits_say() {
    let qualification = fields::EXIT_QUALIFICATION.encoding();
    let information = fields::EXIT_INSTRUCTION_INFORMATION.encoding();
    let gpa = fields::GUEST_PHYSICAL_ADDRESS.encoding();
    let linear = fields::GUEST_LINEAR_ADDRESS.encoding();
    let data = fields::MSR_DATA.encoding();
    let text = |reason, set: &[(crate::encoding::Encoding, u64)]| {
        std::format!("{}", exit_of(reason, set).0)
    };
    assert_eq!(text(54, &[]), "WBINVD");
    assert_eq!(text(54, &[(qualification, 1)]), "WBNOINVD");
    assert_eq!(text(67, &[(information, 1 << 3)]), "UMWAIT with rcx");
    assert_eq!(text(68, &[(information, 9 << 3)]), "TPAUSE with r9");
    let keys = [(information, 2 << 3 | 11 << 28)];
    assert_eq!(text(69, &keys), "LOADIWKEY with xmm2, xmm11");
    let pasid = [(qualification, 0x8012_3456)];
    assert_eq!(text(72, &pasid), "ENQCMD, no translation of PASID 0x23456");
    assert_eq!(
        exit_of(73, &pasid).0,
        Exit::EnqcmdsPasid {
            command: 0x8012_3456
        }
    );
    assert_eq!(
        text(79, &[(qualification, 0x48), (data, 5)]),
        "WRMSRLIST, IA32_SPEC_CTRL (0x48) = 0x5"
    );
    let immediate = [(qualification, 0x48), (information, 3 << 3)];
    assert_eq!(text(84, &immediate), "rdmsr rbx, IA32_SPEC_CTRL (0x48)");
    assert_eq!(text(85, &immediate), "wrmsrns IA32_SPEC_CTRL (0x48), rbx");
    let miss = [
        (qualification, 1 << 11 | 1 << 12),
        (gpa, 0x2080),
        (linear, 0x5080),
    ];
    let expected = Exit::SppEvent {
        gpa: Gpa(0x2080),
        linear: Gva(0x5080),
        misconfiguration: false,
        nmi_unblocking_by_iret: true,
        asynchronous: false,
    };
    assert_eq!(exit_of(66, &miss).0, expected);
    assert_eq!(text(66, &miss), "SPP miss at 0x2080");
    let trace = [(qualification, 1 << 16)];
    let expected = Exit::PmlFull {
        nmi_unblocking_by_iret: false,
        asynchronous: true,
    };
    assert_eq!(exit_of(62, &trace).0, expected);
    let timeout = [(qualification, 1 << 12)];
    let expected = Exit::InstructionTimeout {
        context_invalid: false,
        nmi_unblocking_by_iret: true,
    };
    assert_eq!(exit_of(75, &timeout).0, expected);
    // [rax + rbx * 2 + 8] in DS, 64-bit addresses.
    let operand = [
        (information, 1 | 2 << 7 | 3 << 15 | 3 << 18),
        (qualification, 8),
    ];
    let (Exit::Xsaves(saved), Exit::Xrstors(restored)) =
        (exit_of(63, &operand).0, exit_of(64, &operand).0)
    else {
        panic!();
    };
    assert_eq!(saved, restored);
    assert_eq!((saved.index, saved.displacement), (Some((Gpr::Rbx, 1)), 8));
    let apic = [(qualification, 0x4010)];
    assert_eq!(text(44, &apic), "APIC access at 0x10: asynchronous access");
}

#[test]
fn a_failed_read_is_an_error_not_a_value() {
    let mut vmcs = FakeVmcs::new();
    vmcs.preset(fields::EXIT_REASON, 48);
    vmcs.fail(fields::GUEST_PHYSICAL_ADDRESS, crate::VmFail::Invalid);
    let error = AccessError::Read {
        field: fields::GUEST_PHYSICAL_ADDRESS.encoding(),
        fail: crate::VmFail::Invalid,
    };
    assert_eq!(Exit::read(&vmcs), Err(error));
}

proptest! {
    #[test]
    fn no_exit_panics(reason: u32, qualification: u64, information: u32) {
        let mut vmcs = FakeVmcs::new();
        vmcs.preset(fields::EXIT_REASON, reason.into())
            .preset(fields::EXIT_QUALIFICATION, qualification)
            .preset(fields::EXIT_INSTRUCTION_INFORMATION, information.into())
            .preset(fields::EXIT_INTERRUPTION_INFORMATION, information.into());
        let exit = Exit::read(&vmcs).unwrap();
        let unknown = matches!(ExitReason(reason).basic(), BasicReason::Unknown(_));
        prop_assert_eq!(exit == Exit::Unknown(ExitReason(reason)), unknown);
    }
}

#[test]
fn exits_read_in_words() {
    let qualification = fields::EXIT_QUALIFICATION.encoding();
    let gpa = fields::GUEST_PHYSICAL_ADDRESS.encoding();
    let linear = fields::GUEST_LINEAR_ADDRESS.encoding();
    let text = |reason, set: &[(crate::encoding::Encoding, u64)]| {
        std::format!("{}", exit_of(reason, set).0)
    };
    assert_eq!(text(10, &[]), "CPUID");
    assert_eq!(text(37, &[]), "Monitor trap flag");
    assert_eq!(text(23, &[]), "VMREAD");
    let violation = [(qualification, 0x182), (gpa, 0x2000), (linear, 0x5000)];
    assert_eq!(
        text(48, &violation),
        "EPT violation: write at 0x2000 (linear 0x5000)"
    );
    assert_eq!(
        text(30, &[(qualification, 0x03F8_0000)]),
        "OUT to port 0x03f8, 1 bytes"
    );
    assert_eq!(text(28, &[(qualification, 0x0103)]), "mov cr3, rcx");
    assert_eq!(text(33, &[]), "VM entry failed: invalid guest state");
    let information = fields::EXIT_INTERRUPTION_INFORMATION.encoding();
    let fault = [(information, 0x8000_0B0D)];
    assert_eq!(text(0, &fault), "#GP(0x0)");
    let page = [(information, 0x8000_0B0E), (qualification, 0x7000)];
    assert_eq!(text(0, &page), "#PF(0x0), at 0x7000");
    let step = [(information, 0x8000_0301), (qualification, 0x4001)];
    assert_eq!(text(0, &step), "#DB, cause: B0, BS");
    let switch = [(qualification, 1 << 30 | 0x18)];
    assert_eq!(text(9, &switch), "task switch by IRET to 0x0018");
    let apic = [(qualification, 0x1390)];
    assert_eq!(text(44, &apic), "APIC access at 0x390: write");
    assert_eq!(text(99, &[]), "unknown exit reason 99");
}
