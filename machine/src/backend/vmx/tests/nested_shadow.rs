//! A hypervisor on shadow paging as the guest: its tables for its guest are what ours are made from.

use testudo_arch::{FrameMem, Segment};
use testudo_ept::FramePool;
use testudo_nested::vmx::Offer;
use testudo_vmx::controls::ExceptionBitmap;

use super::nested::{
    HOST_RIP, Hypervisor, NE, NO_EXIT, NO_PIN, TABLES, VMXE, nested_parts, prepared_memory,
};
use super::shadow::{HOST, PAGE_FAULT, shadow_parts};
use super::*;

/// The tables that L1 has made for L2, of four levels, one page each.
const L2_TABLES: u64 = 0xC000;
const L2_ENTRIES: u64 = 0xF000;
/// Where L2's page 5 lies in L1's memory; its page 6 is nowhere.
const PAGE: u64 = 0xA000;
const NXE: u64 = 1 << 11;

/// A vCPU whose guest is in 64-bit mode on shadow paging, outside VMX operation.
fn hypervisor() -> (Hypervisor, &'static FramePool) {
    let memory = prepared_memory();
    for (at, entry) in [
        (L2_TABLES, 0xD007),
        (0xD000, 0xE007),
        (0xE000, L2_ENTRIES + 7),
        (L2_ENTRIES + 5 * 8, PAGE + 7),
    ] {
        memory.store_u64(Gpa(at), entry).unwrap();
    }
    hypervisor_in(memory)
}

/// As [`hypervisor`], in this memory.
fn hypervisor_in(memory: &'static GuestRam) -> (Hypervisor, &'static FramePool) {
    let caps: &'static VmxCaps = Box::leak(Box::new(fixtures::skylake_sp()));
    let controls = Controls::choose_shadow(caps).unwrap().for_hypervisors();
    let controls: &Controls = Box::leak(Box::new(controls));
    let tables: &VmxTables = Box::leak(Box::new(VmxTables {
        ept_pointer: 0,
        msr_bitmap: Hpa(0x2000),
        apic: None,
    }));
    let pool: &FramePool = Box::leak(Box::new(FramePool::new(64)));
    let parts = shadow_parts(caps, controls, tables, memory, pool);
    let mut vcpu: Hypervisor = VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap();
    let wanted = Offer {
        ept: false,
        vpid: true,
        apic: false,
        enlightened: false,
    };
    let parts = nested_parts(caps, wanted, controls, tables);
    vcpu.nest(parts, None).unwrap();
    let data = Segment::flat(0x18, SegmentAttributes::DATA);
    vcpu.set_system(&SystemRegisters {
        cs: Segment::flat(0x10, SegmentAttributes::CODE64),
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        cr0: 0x8000_0011 | NE,
        cr3: TABLES,
        cr4: 0x20 | VMXE,
        efer: LME | LMA,
        rip: 0x1000,
        ..SystemRegisters::reset()
    });
    (vcpu, pool)
}

/// With L2 running on its tables, whose page faults L1 wants to see or not.
fn running(wanted: bool) -> (Hypervisor, &'static FramePool) {
    let (vcpu, pool) = hypervisor();
    let mut vcpu = vcpu.with_vmcs(NO_PIN, NO_EXIT);
    vcpu.vmwrite(fields::GUEST_CR3, L2_TABLES);
    let exceptions = if wanted {
        ExceptionBitmap::PAGE_FAULT
    } else {
        ExceptionBitmap::empty()
    };
    vcpu.vmwrite(fields::EXCEPTION_BITMAP, exceptions.bits().into());
    vcpu.launch();
    (vcpu, pool)
}

/// Where hardware on the shadow tables that the last entry had goes.
fn hardware(root: u64, pool: &FramePool, address: u64) -> Option<u64> {
    let mut table = root;
    for level in [4u32, 3, 2, 1] {
        let index = (address >> (3 + 9 * level)) & 511;
        let entry = pool.load(Hpa(table + index * 8));
        if entry & 1 == 0 {
            return None;
        }
        table = entry & 0x000F_FFFF_FFFF_F000;
    }
    Some(table + address % 4096)
}

impl Hypervisor {
    /// The next entry, which an interrupt of the host's ends, is with these of the paging registers:
    /// CR0, CR3, CR4, EFER and the page attribute table.
    fn entered_with(&mut self) -> [u64; 5] {
        let seen: &'static core::cell::RefCell<[u64; 5]> = Box::leak(Box::default());
        self.will(move |vmcs, _| {
            *seen.borrow_mut() = [
                vmcs.get(fields::GUEST_CR0).unwrap(),
                vmcs.get(fields::GUEST_CR3).unwrap(),
                vmcs.get(fields::GUEST_CR4).unwrap(),
                vmcs.get(fields::GUEST_EFER).unwrap(),
                vmcs.get(fields::GUEST_PAT).unwrap(),
            ];
            exit(vmcs, BasicReason::ExternalInterrupt, 0);
        });
        assert_eq!(self.enter_once(), VmExit::Interrupted);
        *seen.borrow()
    }

    fn meets_page_fault(&mut self, address: u64, code: u32) {
        self.will(move |vmcs, _| {
            exception(vmcs, PAGE_FAULT, address);
            vmcs.preset(fields::EXIT_INTERRUPTION_ERROR_CODE, code.into());
        });
    }
}

#[test]
fn nothing_is_offered_that_shadow_paging_cannot_give() {
    let (vcpu, _) = hypervisor();
    let caps = vcpu.nested.as_ref().unwrap().state.caps();
    for missing in [
        SecondaryControls::ENABLE_EPT,
        SecondaryControls::UNRESTRICTED_GUEST,
        SecondaryControls::ENABLE_INVPCID,
    ] {
        assert!(!caps.secondary.allows(missing), "{missing:?}");
    }
    assert!(caps.secondary.allows(SecondaryControls::ENABLE_VPID));
    // What the guest cannot have in CR4 its own guest cannot either.
    let pcid = 1 << 17;
    assert_eq!(caps.cr4.may & (pcid | VMXE), VMXE);
}

#[test]
fn l2_runs_on_tables_made_from_those_that_l1_gave_it() {
    for wanted in [false, true] {
        let (mut vcpu, pool) = running(wanted);
        let (l2_efer, l2_cr4) = (vcpu.system().efer, vcpu.system().cr4);
        assert_eq!(vcpu.system().cr3, L2_TABLES);
        // The shadow tables lack the page, which is no business of L1's.
        vcpu.meets_page_fault(0x5008, 2);
        let [cr0, root, cr4, efer, pat] = vcpu.entered_with();
        assert_eq!(vcpu.level, Level::L2);
        assert_eq!(hardware(root, pool, 0x5008), Some(HOST + PAGE + 8));
        let pg_wp = 1 << 31 | 1 << 16;
        assert_eq!((cr0 & pg_wp, cr4 & 0x20), (pg_wp, 0x20));
        assert_eq!((efer & NXE, pat), (NXE, setup::PAT_RESET));
        // L2 sees its own registers, and so does L1.
        let system = vcpu.system();
        let seen = (system.cr3, system.cr4, system.efer);
        assert_eq!(seen, (L2_TABLES, l2_cr4, l2_efer));
        vcpu.will_exit(BasicReason::Cpuid, 0);
        vcpu.run_out();
        assert_eq!(vcpu.system().cr3, TABLES);
        assert_eq!(vcpu.system().efer & NXE, 0);
        vcpu.assert_exited(BasicReason::Cpuid);
        assert_eq!(vcpu.vmread(fields::GUEST_CR3), L2_TABLES);
        assert_eq!(vcpu.vmread(fields::GUEST_EFER), l2_efer);
        // L1 is back on its own.
        let [_, own, ..] = vcpu.entered_with();
        assert_ne!(own, root);
        vcpu.meets_page_fault(0x5008, 2);
        vcpu.run_out();
        assert_eq!(hardware(own, pool, 0x5008), Some(HOST + 0x5008));
    }
}

#[test]
fn a_fault_of_l2s_own_tables_goes_to_whom_l1_says() {
    let (mut vcpu, _) = running(true);
    vcpu.meets_page_fault(0x6008, 6);
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.rip()), (Level::L1, HOST_RIP));
    assert_ne!(vcpu.registers.cr2, 0x6008);
    assert_eq!(vcpu.vmread(fields::EXIT_QUALIFICATION), 0x6008);
    let information = vcpu.vmread(fields::EXIT_INTERRUPTION_INFORMATION);
    assert_eq!(information, PAGE_FAULT.into());
    assert_eq!(vcpu.vmread(fields::EXIT_INTERRUPTION_ERROR_CODE), 6);
    // By the mask and the match, only faults of present pages.
    vcpu.vmwrite(fields::PAGE_FAULT_ERROR_CODE_MASK, 1);
    vcpu.vmwrite(fields::PAGE_FAULT_ERROR_CODE_MATCH, 1);
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.meets_page_fault(0x6008, 6);
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.registers.cr2), (Level::L2, 0x6008));
    assert_eq!(vcpu.last_injected(), PAGE_FAULT);
}

#[test]
fn an_event_whose_delivery_met_a_fault_of_ours_goes_in_again() {
    let (mut vcpu, _) = running(true);
    vcpu.will(|vmcs, _| {
        exception(vmcs, PAGE_FAULT, 0x5008);
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0031);
    });
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.last_injected()), (Level::L2, 0x8000_0031));
}

#[test]
fn l2s_accesses_to_cr3_are_its_own_where_l1_does_not_want_them() {
    let (mut vcpu, pool) = running(false);
    // MOV from CR3 to RBX.
    vcpu.will_exit(BasicReason::ControlRegister, 3 | 1 << 4 | 3 << 8);
    vcpu.run_out();
    assert_eq!(vcpu.gprs().rbx, L2_TABLES);
    vcpu.meets_page_fault(0x5008, 2);
    let [_, root, ..] = vcpu.entered_with();
    assert!(hardware(root, pool, 0x5008).is_some());
    // Unmapped, and told by MOV to CR3 of the same value; and mapped again, and told by INVLPG.
    let entry = Gpa(L2_ENTRIES + 5 * 8);
    vcpu.memory.store_u64(entry, 0).unwrap();
    vcpu.will(|vmcs, registers| {
        registers.gprs.rbx = L2_TABLES;
        exit(vmcs, BasicReason::ControlRegister, 3 | 3 << 8);
    });
    vcpu.run_out();
    let [_, root, ..] = vcpu.entered_with();
    assert_eq!(hardware(root, pool, 0x5008), None);
    assert_eq!((vcpu.level, vcpu.system().cr3), (Level::L2, L2_TABLES));
    vcpu.will_exit(BasicReason::Invlpg, 0x5000);
    vcpu.run_out();
    assert_eq!(vcpu.level, Level::L2);
    // Bits that no physical address has.
    vcpu.will(|vmcs, registers| {
        registers.gprs.rbx = 1 << 60;
        exit(vmcs, BasicReason::ControlRegister, 3 | 3 << 8);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() & 0xFF, 13);
}

#[test]
fn a_change_of_the_tables_drops_the_translations_of_both() {
    let (mut vcpu, _) = running(false);
    vcpu.run_out();
    let flushes = vcpu.processor.flushes;
    vcpu.run_out();
    assert_eq!(vcpu.processor.flushes, flushes);
    vcpu.gate.unwrap().drop_translations();
    vcpu.run_out();
    assert_eq!(vcpu.processor.flushes, flushes + 2);
}

#[test]
fn what_an_instruction_of_l1s_writes_into_a_table_the_tables_know() {
    let (mut vcpu, pool) = running(false);
    vcpu.meets_page_fault(0x5008, 2);
    vcpu.run_out();
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    // VMPTRST over the entry: what it stores is no present entry.
    vcpu.will(|vmcs, _| {
        let information = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27;
        vmcs.preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
        exit(vmcs, BasicReason::Vmptrst, L2_ENTRIES + 5 * 8);
    });
    vcpu.run_out();
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    let [_, root, ..] = vcpu.entered_with();
    assert_eq!(vcpu.level, Level::L2);
    assert_eq!(hardware(root, pool, 0x5008), None);
}

#[test]
fn vmx_operation_and_exits_hold_on_shadow_paging() {
    let (mut vcpu, _) = running(false);
    // L1's host state may be another address space, without which nothing of L1's can be read.
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    let other = 0x4000;
    let memory = vcpu.memory.inner();
    memory.store_u64(Gpa(other), TABLES + 0x1003).unwrap();
    vcpu.vmwrite(fields::HOST_CR3, other);
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_eq!(vcpu.system().cr3, other);
    vcpu.assert_exited(BasicReason::Cpuid);
    // In VMX operation CR4.VMXE stays.
    vcpu.guest_moves_to(4, 0x20);
    assert_eq!(vcpu.last_injected() & 0xFF, 13);
    // A reset of L1's processor while L2 runs.
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    assert_eq!(vcpu.level, Level::L2);
    vcpu.reset();
    assert_eq!(vcpu.system(), SystemRegisters::reset());
    assert_eq!(vcpu.hardware(fields::GUEST_PAT), setup::PAT_RESET);
    assert_eq!(vcpu.enter_once(), VmExit::Emulate(None));
}

/// A guest inside the guest's guest migrates into another vCPU on the same memory, which knows none of the
/// tables that were made for it.
#[test]
fn l2_goes_on_in_another_vcpu_on_shadow_paging() {
    let (mut vcpu, _) = running(false);
    let (l2_efer, l2_cr4) = (vcpu.system().efer, vcpu.system().cr4);
    vcpu.meets_page_fault(0x5008, 2);
    vcpu.will(|vmcs, registers| {
        registers.gprs.rdx = 0x99;
        vmcs.preset(fields::GUEST_RIP, 0x1234);
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        exit(vmcs, BasicReason::InterruptWindow, 0);
    });
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    vcpu.inject(Event::Interrupt(0x77));
    let saved = vcpu.save_nested().unwrap().unwrap();
    let (memory, gprs) = (vcpu.memory.inner(), *vcpu.gprs());
    // Where it was saved it goes on as if nothing had happened.
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.last_injected()), (Level::L2, 0x8000_0077));
    drop(vcpu);

    let (mut vcpu, pool) = hypervisor_in(memory);
    assert_eq!(vcpu.restore_nested(&saved), Ok(true));
    *vcpu.gprs_mut() = gprs;
    let system = vcpu.system();
    let seen = (system.rip, system.cr3, system.cr4, system.efer);
    assert_eq!(seen, (0x1234, L2_TABLES, l2_cr4, l2_efer));
    let [_, root, _, efer, pat] = vcpu.entered_with();
    assert_eq!(vcpu.last_injected(), 0x8000_0077);
    assert_eq!((efer & NXE, pat), (NXE, setup::PAT_RESET));
    assert_eq!(hardware(root, pool, 0x5008), None);
    vcpu.meets_page_fault(0x5008, 2);
    let [_, root, ..] = vcpu.entered_with();
    assert_eq!(hardware(root, pool, 0x5008), Some(HOST + PAGE + 8));
    // L1 goes on with it on its own tables.
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_eq!(vcpu.gprs().rdx, 0x99);
    let system = vcpu.system();
    let own = (system.cr3, system.cr4, system.efer & NXE);
    assert_eq!(own, (TABLES, 0x20 | VMXE, 0));
    vcpu.assert_exited(BasicReason::Cpuid);
    assert_eq!(vcpu.vmread(fields::GUEST_CR3), L2_TABLES);
    assert_eq!(vcpu.vmread(fields::GUEST_EFER), l2_efer);
    // It moves once more while L1 runs, whose tables are shadowed anew.
    let saved = vcpu.save_nested().unwrap().unwrap();
    let (mut vcpu, pool) = hypervisor_in(memory);
    assert_eq!(vcpu.restore_nested(&saved), Ok(false));
    assert_eq!(vcpu.system().cr3, TABLES);
    vcpu.meets_page_fault(0x5008, 2);
    let [_, own, ..] = vcpu.entered_with();
    assert_eq!(hardware(own, pool, 0x5008), Some(HOST + 0x5008));
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.rip()), (Level::L2, 0x1234));
    let [_, root, ..] = vcpu.entered_with();
    assert_ne!(root, own);
    // Into a vCPU in which another L2 runs.
    assert_eq!(vcpu.restore_nested(&saved), Ok(false));
    assert_eq!((vcpu.level, vcpu.system().cr3), (Level::L1, TABLES));
    let [_, root, ..] = vcpu.entered_with();
    assert_eq!(root, own);
}

#[test]
fn a_fault_of_an_instruction_that_l0_executes_is_l1s_if_it_wants_it() {
    let (mut vcpu, _) = running(true);
    vcpu.raise(Event::fault_with(Exception::PageFault, 2), Some(0x7770));
    assert_eq!(vcpu.level, Level::L1);
    assert_ne!(vcpu.registers.cr2, 0x7770);
    vcpu.assert_exited(BasicReason::ExceptionOrNmi);
    assert_eq!(vcpu.vmread(fields::EXIT_QUALIFICATION), 0x7770);
    assert_eq!(vcpu.vmread(fields::EXIT_INTERRUPTION_ERROR_CODE), 2);
    let information = vcpu.vmread(fields::EXIT_INTERRUPTION_INFORMATION);
    assert_eq!(information, PAGE_FAULT.into());
    let (mut vcpu, _) = running(true);
    vcpu.raise(Event::GP0, None);
    assert_eq!(vcpu.level, Level::L2);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() & 0xFF, 13);
}
