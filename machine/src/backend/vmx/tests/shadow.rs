//! Shadow paging on a processor that takes restricted guests only.

use testudo_arch::regs::SegmentRegister;
use testudo_arch::{FrameMem, PAGE_SIZE, Segment};
use testudo_ept::FramePool;
use testudo_ept::shadow::{Backed, Backing};
use testudo_vmx::caps::Allowed;
use testudo_vmx::controls::ExitControls;
use testudo_vmx::structures::MsrEntry;

use super::*;
use crate::backend::fake_machine::protected_mode;
use crate::paging::{ShadowPaging, allowed_cr4};

const MEMORY: usize = 0x10_0000;
pub(super) const HOST: u64 = 1 << 30;
/// A page fault of a present page's absence, by the supervisor.
pub(super) const PAGE_FAULT: u32 = 1 << 31 | 1 << 11 | 3 << 8 | 14;

pub(super) struct Contiguous;

impl Backing for Contiguous {
    fn find(&self, gpa: Gpa) -> Option<Backed> {
        (gpa.0 < MEMORY as u64).then_some(Backed {
            address: Hpa(HOST + gpa.0),
            shift: 12,
            writable: true,
        })
    }
}

/// A vCPU in reset state, its memory, and its shadow tables.
fn shadowed() -> (Fake, GuestRam, &'static FramePool) {
    shadowed_on(fixtures::skylake_sp(), None)
}

/// Where lists of MSRs are said to be.
const LISTS: Hpa = Hpa(0x5000);

fn shadowed_on(
    caps: VmxCaps,
    lists: Option<&'static SwitchedMsrs>,
) -> (Fake, GuestRam, &'static FramePool) {
    let caps: &'static VmxCaps = Box::leak(Box::new(caps));
    let controls = Box::leak(Box::new(Controls::choose_shadow(caps).unwrap()));
    assert!(!controls.has_ept());
    let tables = Box::leak(Box::new(VmxTables {
        ept_pointer: 0,
        msr_bitmap: Hpa(0x2000),
        apic: None,
    }));
    let pool: &FramePool = Box::leak(Box::new(FramePool::new(64)));
    let memory: &'static GuestRam = Box::leak(Box::new(ram(MEMORY)));
    let parts = Parts {
        switched: lists.map(|lists| (lists, LISTS)),
        ..shadow_parts(caps, controls, tables, memory, pool)
    };
    let vcpu = VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap();
    (vcpu, memory.clone(), pool)
}

/// What a vCPU on shadow paging of this memory is made of.
pub(super) fn shadow_parts<'a>(
    caps: &'a VmxCaps,
    controls: &'a Controls,
    tables: &'a VmxTables,
    memory: &'static GuestRam,
    pool: &'static FramePool,
) -> Parts<'a> {
    let paging = ShadowPaging::new(pool, 32, memory, Contiguous, FakeHost::new(), 1);
    Parts {
        shadow: Some(ShadowPlace {
            tables: Box::leak(Box::new(paging)),
            vcpu: 0,
            cr4: allowed_cr4(&Cpuid::default()),
            physical_bits: 40,
        }),
        ..parts(caps, controls, tables)
    }
}

/// Where hardware on the shadow tables goes from an address below 4 GiB, outside long mode.
fn hardware(vcpu: &Fake, pool: &FramePool, address: u64) -> Option<u64> {
    let mut table = vcpu.hardware(fields::GUEST_CR3);
    for level in [3u32, 2, 1] {
        let index = (address >> (3 + 9 * level)) & if level == 3 { 3 } else { 511 };
        let entry = pool.load(Hpa(table + index * 8));
        if entry & 1 == 0 {
            return None;
        }
        table = entry & 0x000F_FFFF_FFFF_F000;
    }
    Some(table + address % PAGE_SIZE)
}

#[test]
fn real_mode_is_emulated_until_the_processor_takes_the_guest() {
    let (mut vcpu, ..) = shadowed();
    assert_eq!(vcpu.enter_once(), VmExit::Emulate(None));
    vcpu.inject(Event::Interrupt(8));
    let event = Some(Event::Interrupt(8));
    assert_eq!(vcpu.enter_once(), VmExit::Emulate(event));
    assert!(vcpu.processor.costs.is_empty(), "it was never entered");
    assert_eq!(vcpu.system(), SystemRegisters::reset());
    // Protected mode with real mode's code segment: no entry yet, and no interrupt either.
    vcpu.set_rflags(0x202);
    assert!(vcpu.can_take_interrupt());
    assert!(vcpu.set_control_register(0, 0x11));
    let segments = SystemRegisters {
        cs: Segment::real_mode(0x1000, SegmentAttributes::DATA16),
        ..SystemRegisters::reset()
    };
    vcpu.set_segments(&segments);
    assert_eq!(vcpu.enter_once(), VmExit::Emulate(None));
    assert!(!vcpu.can_take_interrupt() && !vcpu.can_take_nmi());
    vcpu.set_segments(&protected_mode(0x1000));
    vcpu.run_out();
    assert_eq!(vcpu.system().cr0, 0x11);
    let cs = *vcpu.system().segment(SegmentRegister::Cs);
    assert_eq!(cs, protected_mode(0x1000).cs);
}

#[test]
fn an_interrupt_waits_for_the_instruction_behind_an_emulated_sti() {
    let (mut vcpu, ..) = shadowed();
    vcpu.set_rflags(0x202);
    vcpu.set_rip(0x10);
    assert!(vcpu.can_take_interrupt());
    vcpu.begin_interrupt_shadow();
    assert!(!vcpu.can_take_interrupt());
    vcpu.set_rip(0x11);
    assert!(vcpu.can_take_interrupt());
}

#[test]
fn a_guest_without_paging_runs_with_it() {
    let (mut vcpu, _, pool) = shadowed();
    vcpu.set_system(&protected_mode(0x1000));
    vcpu.will(|vmcs, _| {
        exception(vmcs, PAGE_FAULT, 0x5123);
        vmcs.preset(fields::EXIT_INTERRUPTION_ERROR_CODE, 0);
    });
    vcpu.run_out();
    assert_eq!(hardware(&vcpu, pool, 0x5123), Some(HOST + 0x5123));
    let (real, seen) = (
        vcpu.hardware(fields::GUEST_CR0),
        vcpu.hardware(fields::CR0_READ_SHADOW),
    );
    assert_eq!((real & 0x8001_0021, seen), (0x8001_0021, 0x11));
    assert_eq!(vcpu.hardware(fields::GUEST_CR4) & 0x20, 0x20);
    assert_eq!((vcpu.system().cr0, vcpu.system().cr3), (0x11, 0));
    assert_eq!(vcpu.cr4(), 0);
    // What is no memory is the machine's business.
    vcpu.will(|vmcs, _| {
        exception(vmcs, PAGE_FAULT, 0xFEE0_0020);
        vmcs.preset(fields::EXIT_INTERRUPTION_ERROR_CODE, 2);
    });
    let access = MemoryAccess {
        gpa: Gpa(0xFEE0_0020),
        gva: Some(Gva(0xFEE0_0020)),
        write: true,
        fetch: false,
        table: false,
    };
    assert_eq!(vcpu.enter_once(), VmExit::Memory(access));
}

#[test]
fn the_guests_tables_decide_once_it_has_paging() {
    let (mut vcpu, memory, pool) = shadowed();
    vcpu.set_system(&protected_mode(0x1000));
    // Legacy tables: linear page 5 is physical page 9, and page 6 is absent.
    memory.store_u32(Gpa(0x2000), 0x3007).unwrap();
    memory.store_u32(Gpa(0x3014), 0x9067).unwrap();
    vcpu.guest_moves_to(3, 0x2000);
    vcpu.guest_moves_to(0, 0x8000_0011);
    assert_eq!(
        (vcpu.system().cr3, vcpu.system().cr0),
        (0x2000, 0x8000_0011)
    );
    vcpu.will(|vmcs, _| {
        exception(vmcs, PAGE_FAULT, 0x5008);
        vmcs.preset(fields::EXIT_INTERRUPTION_ERROR_CODE, 2);
    });
    vcpu.run_out();
    assert_eq!(hardware(&vcpu, pool, 0x5008), Some(HOST + 0x9008));
    vcpu.will(|vmcs, _| {
        exception(vmcs, PAGE_FAULT, 0x6008);
        vmcs.preset(fields::EXIT_INTERRUPTION_ERROR_CODE, 2);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), PAGE_FAULT);
    assert_eq!(vcpu.registers.cr2, 0x6008);
    // MOV from CR3; INVLPG of what has changed; the page attribute table acts on nothing.
    vcpu.will_exit(BasicReason::ControlRegister, 3 | 1 << 4 | 3 << 8);
    vcpu.run_out();
    assert_eq!(vcpu.gprs().rbx, 0x2000);
    memory.store_u32(Gpa(0x3014), 0).unwrap();
    let flushes = vcpu.processor.flushes;
    vcpu.will_exit(BasicReason::Invlpg, 0x5000);
    vcpu.run_out();
    assert_eq!(hardware(&vcpu, pool, 0x5008), None);
    assert!(vcpu.processor.flushes > flushes);
    let before = vcpu.hardware(fields::GUEST_PAT);
    assert_eq!(vcpu.write_msr(Msr::PAT, 0), Some(true));
    assert_eq!(vcpu.read_msr(Msr::PAT), Some(0));
    assert_eq!(vcpu.hardware(fields::GUEST_PAT), before);
    // What the guest does to its own bits of CR0 without an exit stays when another register changes.
    const TS: u64 = 8;
    let with_ts = vcpu.hardware(fields::GUEST_CR0) | TS;
    vcpu.processor.vmcs.preset(fields::GUEST_CR0, with_ts);
    vcpu.guest_moves_to(3, 0x2000);
    assert_eq!(vcpu.system().cr0, 0x8000_0011 | TS);
    vcpu.processor.vmcs.preset(fields::GUEST_CR0, with_ts & !TS);
    vcpu.guest_moves_to(4, 0x10);
    assert_eq!(vcpu.system().cr0, 0x8000_0011);
    // Reserved bits of CR4 and CR0 are refused.
    vcpu.guest_moves_to(4, 1 << 13);
    assert_eq!(vcpu.last_injected() & 0xFF, 13);
}

/// Processors are like this that are older than EPT. The fake has no fields that they lack.
#[test]
fn without_fields_for_efer_and_pat_lists_switch_them() {
    let mut caps = fixtures::nehalem();
    let (efer, pat) = (
        ExitControls::LOAD_EFER | ExitControls::SAVE_EFER,
        ExitControls::LOAD_PAT | ExitControls::SAVE_PAT,
    );
    let exit = caps.exit.may_be_one() - efer - pat;
    caps.exit = Allowed::new(caps.exit.must_be_one(), exit);
    let entry = caps.entry.may_be_one() - EntryControls::LOAD_EFER - EntryControls::LOAD_PAT;
    caps.entry = Allowed::new(caps.entry.must_be_one(), entry);
    assert!(Controls::choose(&caps).is_err());
    assert!(Controls::choose_shadow(&caps).unwrap().switches_by_lists());

    let lists: &'static SwitchedMsrs = Box::leak(Box::default());
    lists.set_host(0xD01, 0x0706);
    let (mut vcpu, ..) = shadowed_on(caps, Some(lists));
    for (count, address, list) in [
        (
            fields::ENTRY_MSR_LOAD_COUNT,
            fields::ENTRY_MSR_LOAD_ADDRESS,
            0,
        ),
        (
            fields::EXIT_MSR_LOAD_COUNT,
            fields::EXIT_MSR_LOAD_ADDRESS,
            1,
        ),
    ] {
        assert_eq!(vcpu.hardware(count), 2);
        assert_eq!(vcpu.hardware(address), LISTS.0 + list * 32);
    }
    vcpu.set_segments(&protected_mode(0x1000));
    assert!(vcpu.set_control_register(0, 0x11));
    assert_eq!(vcpu.write_msr(Msr::EFER, 0x801), Some(true));
    vcpu.run_out();
    assert_eq!(vcpu.read_msr(Msr::EFER), Some(0x801));
    let [guest, host] = lists.lists();
    assert_eq!(guest[0].msr(), Msr::EFER);
    assert_eq!(guest[0].value() & 0xD01, 0x801);
    assert_eq!(guest[1], MsrEntry::new(Msr::PAT, setup::PAT_RESET));
    assert_eq!(host[0], MsrEntry::new(Msr::EFER, 0xD01));
    assert_eq!(host[1], MsrEntry::new(Msr::PAT, 0x0706));
}
