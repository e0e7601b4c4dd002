//! Hardware task switches.

use testudo_arch::{DescriptorTable, Segment};

use super::*;

const GDT: u64 = 0x400;
const OLD: u64 = 0x600;
const NEW: u64 = 0x700;

/// A guest in 32-bit protected mode without paging, with a task that runs and one that waits.
fn guest() -> Fake {
    let mut vcpu = vcpu();
    let descriptors: [(u64, u64); 4] = [
        (0x08, 0x00CF_9B00_0000_FFFF),
        (0x10, 0x00CF_9300_0000_FFFF),
        (0x28, 0x0000_8B00_0000_0067 | OLD << 16),
        (0x30, 0x0000_8900_0000_0067 | NEW << 16),
    ];
    for (selector, raw) in descriptors {
        vcpu.memory.store_u64(Gpa(GDT + selector), raw).unwrap();
    }
    for (at, value) in [
        (0x20, 0x900u32),
        (0x24, 2),
        (0x38, 0x1000),
        (0x48, 0x10),
        (0x4C, 8),
        (0x50, 0x10),
        (0x54, 0x10),
    ] {
        vcpu.memory.store_u32(Gpa(NEW + at), value).unwrap();
    }
    let flat = Segment::flat(0x10, SegmentAttributes::DATA);
    let system = SystemRegisters {
        cr0: 0x11,
        rip: 0x123,
        cs: Segment::flat(8, SegmentAttributes::CODE32),
        ss: flat,
        ds: flat,
        es: flat,
        fs: flat,
        gs: flat,
        gdtr: DescriptorTable {
            base: GDT,
            limit: 0x37,
        },
        tr: Segment {
            selector: 0x28,
            attributes: SegmentAttributes::TSS_BUSY,
            limit: 0x67,
            base: OLD,
        },
        ..SystemRegisters::reset()
    };
    vcpu.set_system(&system);
    vcpu
}

fn saved_rip(vcpu: &Fake) -> u32 {
    let mut bytes = [0; 4];
    vcpu.memory.read(Gpa(OLD + 0x20), &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

#[test]
fn a_call_enters_the_other_task() {
    let mut vcpu = guest();
    vcpu.will_exit(BasicReason::TaskSwitch, 0x30);
    vcpu.run_out();
    assert_eq!((vcpu.rip(), vcpu.system().tr.selector), (0x900, 0x30));
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0x1000);
    assert_eq!(saved_rip(&vcpu), 0x125, "past the instruction");
}

#[test]
fn a_double_fault_has_its_task_and_its_error_code() {
    let mut vcpu = guest();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0B08);
        vmcs.preset(fields::IDT_VECTORING_ERROR_CODE, 0);
        exit(vmcs, BasicReason::TaskSwitch, 3 << 30 | 0x30);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() >> 31, 0, "the switch was the delivery");
    assert_eq!(saved_rip(&vcpu), 0x123, "of the instruction that faulted");
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0xFFC);
}

#[test]
fn an_nmi_by_a_task_gate_blocks_the_next() {
    let mut vcpu = guest();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0202);
        exit(vmcs, BasicReason::TaskSwitch, 3 << 30 | 0x30);
    });
    vcpu.run_out();
    assert!(!vcpu.can_take_nmi());
    assert_eq!(vcpu.rip(), 0x900);
}

#[test]
fn a_task_that_is_not_there_is_a_fault_and_in_a_double_fault_the_end() {
    let mut vcpu = guest();
    vcpu.will_exit(BasicReason::TaskSwitch, 0x38);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
    assert_eq!(vcpu.rip(), 0x123);
    let mut vcpu = guest();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0B08);
        exit(vmcs, BasicReason::TaskSwitch, 3 << 30 | 0x38);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Shutdown);
}
