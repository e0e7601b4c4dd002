//! Failures of other hypervisors that must not be ours, by name.

use super::*;
use testudo_svm::vmcb::VirtualExtensions;

/// CVE-2021-29657: KVM checked vmcb12 and read it again, so that another processor could change it
/// in between and run L2 with the intercepts of its choice.
#[test]
fn cve_2021_29657_a_control_block_is_read_once() {
    let mut vm = Vm::full();
    let good = vm.vmcb12();
    vm.memory.reads.borrow_mut().clear();
    // From the second read of the page on, nothing in it is as it was.
    let mut seen = 0;
    *vm.memory.adversary.borrow_mut() = Some(Box::new(move |bytes| {
        seen += 1;
        let page = &mut bytes[VMCB12.0 as usize..][..4096];
        if seen > 100 {
            page.fill(0);
        }
    }));
    vm.gprs.rax = VMCB12.0;
    assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Entered);
    // No byte of it was read twice.
    let reads = vm.memory.reads.borrow();
    let in_page: Vec<_> = reads
        .iter()
        .filter(|(at, _)| (VMCB12.0..VMCB12.0 + 4096).contains(&at.0))
        .flat_map(|(at, len)| at.0..at.0 + *len as u64)
        .collect();
    let distinct: std::collections::BTreeSet<_> = in_page.iter().collect();
    assert_eq!(in_page.len(), distinct.len());
    assert!(in_page.len() < 512, "only what VMRUN needs");
    drop(reads);
    // And what an exit is routed by is the copy, not what L1's memory says by then.
    vm.edit12(|v| v.set_intercepts(Default::default()));
    assert_eq!(vm.nested.vmcb12().intercepts(), good.intercepts());
    assert!(matches!(vm.exit(ExitCode::VMRUN, 0, 0), Handled::L1(_)));
}

/// CVE-2021-3653: int_ctl of vmcb12 went into vmcb02 with the AVIC bit, which let L2 write into
/// host memory through an APIC page of its choice.
#[test]
fn cve_2021_3653_avic_is_not_l1s_to_enable() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_virtual_interrupts(VirtualInterrupts(u64::MAX));
        v.set_avic_backing_page(0x1000);
        v.set_avic_logical_table(0x2000);
        v.set_avic_apic_bar(0xFEE0_0000);
    });
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    let word = vmcb02.virtual_interrupts();
    let forbidden = VintrFlags::AVIC_ENABLE
        | VintrFlags::X2AVIC_ENABLE
        | VintrFlags::V_NMI_ENABLE
        | VintrFlags::V_NMI
        | VintrFlags::V_NMI_MASK;
    assert!(!word.flags().intersects(forbidden));
    assert!(word.contains(VintrFlags::V_INTR_MASKING));
    assert_eq!(
        (
            vmcb02.avic_backing_page(),
            vmcb02.avic_logical_table(),
            vmcb02.avic_apic_bar()
        ),
        (0, 0, 0)
    );
}

/// CVE-2021-3656: the VMLOAD and VMSAVE intercepts of vmcb02 were L1's to clear, which gave L2 the
/// host's physical memory.
#[test]
fn cve_2021_3656_vmload_and_vmsave_exit_whatever_l1_says() {
    let mut vm = Vm::full();
    vm.edit12(|v| {
        v.set_intercept_misc2(Misc2::VMRUN);
        v.set_virtual_extensions(VirtualExtensions::empty());
    });
    vm.enter();
    let misc2 = vm.nested.vmcb02().intercept_misc2();
    assert!(misc2.contains(Misc2::VMLOAD | Misc2::VMSAVE | Misc2::VMRUN));
    // L1 must not even leave them open by asking for a virtualization that it was not offered.
    let mut caps = full_caps();
    caps.features -= Features::V_VMSAVE_VMLOAD;
    let mut vm = Vm::new(caps);
    vm.edit12(|v| v.set_virtual_extensions(VirtualExtensions::all()));
    vm.enter();
    let vmcb02 = vm.nested.vmcb02();
    assert!(
        vmcb02
            .intercept_misc2()
            .contains(Misc2::VMLOAD | Misc2::VMSAVE)
    );
    assert!(
        !vmcb02
            .virtual_extensions()
            .contains(VirtualExtensions::VMSAVE_VMLOAD)
    );
    // Emulated for L2, they move L1's memory and nothing else.
    assert_eq!(vm.exit(ExitCode::VMLOAD, 0, 0), Handled::L0);
    vm.gprs.rax = Memory::SIZE as u64;
    assert_eq!(
        vm.execute(Instruction::Vmload),
        Outcome::Fault(testudo_arch::Event::GP0)
    );
}

/// CVE-2022-2196: no branch-predictor barrier between L2 and L1.
#[test]
fn cve_2022_2196_every_way_back_to_l1_owes_a_barrier() {
    let mut vm = Vm::full();
    vm.enter();
    let Handled::L1(barrier) = vm.exit(ExitCode::VMRUN, 0, 0) else {
        panic!("L1 asked for it");
    };
    let mut paid = false;
    barrier.discharge(|| paid = true);
    assert!(paid);
}

/// CVE-2023-30456: the checks of CR0 and CR4 were left to the hardware, which in L2's block had
/// other values than L1's.
#[test]
fn cve_2023_30456_control_registers_are_checked_against_what_l1_was_told() {
    let cases: [fn(&mut Vmcb); 4] = [
        |v| v.set_cr0(CR0_ON | 1 << 29),
        |v| v.set_cr0(CR0_ON | 1 << 40),
        // CET, which the processor has and L1 was not told of.
        |v| v.set_cr4(CR4_ON | 1 << 23),
        |v| v.set_efer(EFER64 | 1 << 40),
    ];
    for case in cases {
        let mut vm = Vm::full();
        vm.edit12(case);
        assert_eq!(vm.execute(Instruction::Vmrun), Outcome::Refused);
    }
}
