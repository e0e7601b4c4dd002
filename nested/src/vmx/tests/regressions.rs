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
