//! Failures of other hypervisors that must not be ours, by name; more of them are with the transitions.

use super::*;
use testudo_vmx::structures::MsrEntry;

/// CVE-2021-29657 (of AMD-V): a control block was checked and read again, so that another processor
/// could change it in between. A VMCS is read when it becomes current, and no entry reads it.
#[test]
fn cve_2021_29657_an_entry_does_not_read_the_region() {
    let mut vm = Vm::ready();
    vm.memory.reads.borrow_mut().clear();
    *vm.memory.adversary.borrow_mut() = Some(Box::new(|bytes| {
        bytes[REGION.0 as usize + 64..][..4032].fill(0xFF);
    }));
    let entered = End::Other(Outcome::Entered { halted: false });
    assert_eq!(vm.run(Instruction::Vmlaunch), entered);
    let region = REGION.0..REGION.0 + 4096;
    let reads = vm.memory.reads.borrow();
    assert!(!reads.iter().any(|(at, _)| region.contains(&at.0)));
}

/// The same of an MSR area: what is loaded is what was checked, at whichever read it changes.
#[test]
fn cve_2021_29657_an_msr_is_loaded_from_the_read_that_was_checked() {
    const AREA: u64 = 0xF000;
    for parity in [0, 1] {
        let mut vm = Vm::ready();
        let good = MsrEntry::new(Msr::LSTAR, 0x1234).to_bytes();
        // An entry never loads this one (SDM vol. 3C, 29.4).
        let refused = MsrEntry::new(Msr::FS_BASE, 0x6666).to_bytes();
        for msr in [Msr::LSTAR, Msr::FS_BASE] {
            vm.msrs.0.insert(msr.0, 0);
        }
        vm.memory.write(Gpa(AREA), &good).unwrap();
        vm.set12(fields::ENTRY_MSR_LOAD_ADDRESS, AREA);
        vm.set12(fields::ENTRY_MSR_LOAD_COUNT, 1);
        let mut turn = parity;
        *vm.memory.adversary.borrow_mut() = Some(Box::new(move |bytes| {
            turn += 1;
            let now = if turn % 2 == 0 { good } else { refused };
            bytes[AREA as usize..][..16].copy_from_slice(&now);
        }));
        let loaded = match vm.run(Instruction::Vmlaunch) {
            End::Other(Outcome::Entered { .. }) => 0x1234,
            End::Other(Outcome::FailedEntry) => 0,
            other => panic!("{other:?}"),
        };
        assert_eq!(vm.msrs.0[&Msr::LSTAR.0], loaded);
        assert_eq!(vm.msrs.0[&Msr::FS_BASE.0], 0);
        assert_ne!(vm.vmcs.l2.get(fields::GUEST_FS_BASE), Ok(0x6666));
    }
}

/// CVE-2019-3887: L2 read and wrote the host's local APIC by x2APIC MSRs that its hypervisor had let through, since the
/// host took them for virtual where the controls of that entry did not make them so.
#[test]
fn cve_2019_3887_x2apic_msrs_are_l2s_only_where_the_processor_virtualizes_them() {
    const X2APIC: u32 = 1 << 31 | 1 << 4;
    const REGISTERS: u32 = 1 << 8;
    const DELIVERY: u32 = 1 << 9;
    let mut vm = Vm::ready();
    // L1 lets everything through: its bitmap is all zeros.
    let mut enter = |controls: u32| {
        vm.ask_for_apic(controls, 0);
        if vm.nested.is_guest() {
            let _ = vm.exit(BasicReason::Cpuid, 0);
        }
        for instruction in [Instruction::Vmlaunch, Instruction::Vmresume] {
            if !vm.nested.is_guest() {
                let _ = vm.run(instruction);
            }
        }
        assert!(vm.nested.is_guest());
        let bitmap = &vm.nested.msr_bitmap;
        let open = |exits: fn(&MsrBitmap, Msr) -> bool| -> Vec<u32> {
            (0x800..0x900)
                .filter(|msr| !exits(bitmap, Msr(*msr)))
                .collect()
        };
        let found = (open(MsrBitmap::read_exits), open(MsrBitmap::write_exits));
        let handled = vm.exit(BasicReason::Cpuid, 0);
        assert!(matches!(handled, Handled::L1(_)));
        found
    };
    let all: Vec<u32> = (0x800..0x900).collect();
    let none = (Vec::new(), Vec::new());
    // Without the mode an access would go to the processor's own local APIC, in whatever order L1 tries.
    assert_eq!(enter(0), none);
    assert_eq!(enter(X2APIC), (Vec::from([0x808]), Vec::from([0x808])));
    assert_eq!(enter(1 << 31), none);
    assert_eq!(enter(1 << 31 | REGISTERS | DELIVERY), none);
    assert_eq!(enter(X2APIC | REGISTERS), (all.clone(), Vec::from([0x808])));
    assert_eq!(enter(X2APIC), (Vec::from([0x808]), Vec::from([0x808])));
    let delivered = Vec::from([0x808, 0x80B, 0x83F]);
    assert_eq!(
        enter(X2APIC | DELIVERY),
        (Vec::from([0x808]), delivered.clone())
    );
    assert_eq!(enter(X2APIC | REGISTERS | DELIVERY), (all, delivered));
    assert_eq!(enter(1 << 31 | 1 | REGISTERS | DELIVERY), none);
}

/// CVE-2018-16882 (of the posted-interrupt descriptor): a page of L1's was used by its host address after L0 had let
/// it go.
#[test]
fn cve_2018_16882_no_page_is_named_after_l0_took_it_away() {
    let mut vm = Vm::ready();
    vm.ask_for_apic(1 << 31 | 1, 0);
    let entered = End::Other(Outcome::Entered { halted: false });
    assert_eq!(vm.run(Instruction::Vmlaunch), entered);
    assert!(!vm.nested.are_frames_stale());
    // While L2 runs.
    vm.stage.moved = 1 << 30;
    vm.nested.forget_frames();
    assert!(vm.nested.are_frames_stale());
    assert!(vm.renew_frames() && !vm.nested.are_frames_stale());
    let named = |vm: &Vm| {
        let get = |field| vm.vmcs.l2.get(field).unwrap();
        (
            get(fields::VIRTUAL_APIC_ADDRESS),
            get(fields::APIC_ACCESS_ADDRESS),
        )
    };
    let behind = |moved| (FRAMES + moved + VIRTUAL_APIC, FRAMES + moved + ACCESS_PAGE);
    assert_eq!(named(&vm), behind(1 << 30));
    // While L1 runs, and the entry is one that changes nothing else.
    for moved in [0, 1 << 31] {
        let _ = vm.exit(BasicReason::Cpuid, 0);
        vm.stage.moved = moved;
        vm.nested.forget_frames();
        assert_eq!(vm.run(Instruction::Vmresume), entered);
        assert!(!vm.nested.are_frames_stale());
        assert_eq!(named(&vm), behind(moved));
    }
    // The memory is not L1's any more.
    vm.set12(fields::APIC_ACCESS_ADDRESS, Memory::SIZE as u64);
    vm.nested.forget_frames();
    assert!(!vm.renew_frames() && vm.nested.are_frames_stale());
}

/// CVE-2022-2196: no branch-predictor barrier between L2 and L1.
#[test]
fn cve_2022_2196_every_way_back_to_l1_owes_a_barrier() {
    let mut vm = Vm::running();
    let reported = vm.exit(BasicReason::Cpuid, 0);
    let mut vm = Vm::running();
    let made = vm.exit_to_l1(BasicReason::ExternalInterrupt, 0x8000_0031);
    for handled in [reported, made] {
        let Handled::L1(barrier) = handled else {
            panic!("an exit to L1");
        };
        let mut paid = false;
        barrier.discharge(|| paid = true);
        assert!(paid);
    }
}
