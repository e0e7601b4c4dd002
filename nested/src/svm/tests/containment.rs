//! L1 as the adversary: whatever it puts into its control blocks, its maps and its instructions,
//! and whenever it changes them, L2 runs under L0's requirements.

use super::*;
use proptest::prelude::*;
use testudo_svm::asid::AsidPool;
use testudo_svm::check::{Outside, check_vmrun};
use testudo_svm::vmcb::{TlbControl, VirtualExtensions};
use zerocopy::IntoBytes;

/// What must be true of `vmcb02` at every moment.
pub(super) fn assert_contained(vm: &mut Vm) {
    let l0 = vm.vmcb01.intercepts();
    let offered = vm.nested.features;
    let maps_at = (
        vm.nested.msr_permissions_at(),
        vm.nested.io_permissions_at(),
    );
    let vmcb02 = vm.nested.vmcb02();

    // All that L0 intercepts, but what is about L1 alone.
    let (all, l0) = (vmcb02.intercepts(), l0);
    let svm = Misc2::STGI | Misc2::CLGI | Misc2::VMLOAD | Misc2::VMSAVE;
    assert!(
        all.exceptions.contains(l0.exceptions) && all.cr.contains(l0.cr) && all.dr.contains(l0.dr)
    );
    assert!(all.misc1.contains(l0.misc1 - Misc1::VINTR));
    assert!(all.misc2.contains(l0.misc2 - svm - Misc2::VMMCALL));
    assert!(all.misc3.contains(l0.misc3));
    // What would reach the processor itself.
    assert!(all.misc1.contains(
        Misc1::INTR | Misc1::NMI | Misc1::SHUTDOWN | Misc1::INVLPGA | Misc1::IOIO | Misc1::MSR
    ));
    assert!(all.misc2.contains(Misc2::VMRUN | Misc2::SKINIT));
    let extensions = vmcb02.virtual_extensions();
    if !extensions.contains(VirtualExtensions::VMSAVE_VMLOAD) {
        assert!(all.misc2.contains(Misc2::VMLOAD | Misc2::VMSAVE));
    }
    if !vmcb02
        .virtual_interrupts()
        .contains(VintrFlags::V_GIF_ENABLE)
    {
        assert!(all.misc2.contains(Misc2::STGI | Misc2::CLGI));
    }

    // No address of L1's.
    assert!([L0_MSRPM, maps_at.0].contains(&vmcb02.msrpm_base_pa()));
    assert!([L0_IOPM, maps_at.1].contains(&vmcb02.iopm_base_pa()));
    assert!([L0_ROOT, COMPOSED_ROOT.0].contains(&vmcb02.n_cr3()));
    assert_eq!(
        (
            vmcb02.avic_backing_page(),
            vmcb02.avic_logical_table(),
            vmcb02.avic_physical_table().0
        ),
        (0, 0, 0)
    );
    assert_eq!((vmcb02.vmsa_pa(), vmcb02.ghcb_pa()), (0, 0));

    // The maps intercept what L0's do.
    let mut l0_map = MsrPermissionMap::intercept_all();
    for open in [Msr::FS_BASE, Msr::STAR, Msr::SYSENTER_CS, Msr::TSC_AUX] {
        l0_map.set(open, MsrAccess::empty());
    }
    assert!(vm.nested.pages.msr.covers(&l0_map));
    assert!(vm.nested.pages.io.covers(&IoPermissionMap::intercept_all()));

    // Controls that are L0's, or not offered.
    assert!(
        vmcb02
            .virtual_interrupts()
            .contains(VintrFlags::V_INTR_MASKING)
    );
    let never = VintrFlags::AVIC_ENABLE | VintrFlags::X2AVIC_ENABLE | VintrFlags::V_NMI_ENABLE;
    assert!(!vmcb02.virtual_interrupts().flags().intersects(never));
    assert_eq!(vmcb02.nested_control(), NestedControl::NP_ENABLE);
    assert!((VirtualExtensions::LBR | VirtualExtensions::VMSAVE_VMLOAD).contains(extensions));
    assert!(
        offered.contains(Features::V_GIF)
            || !vmcb02
                .virtual_interrupts()
                .contains(VintrFlags::V_GIF_ENABLE)
    );
    assert_eq!(vmcb02.tlb_control(), TlbControl::DoNothing);
    assert_eq!(vmcb02.asid(), 0, "the backend's to choose");

    // The processor accepts it: L1 cannot make L0 fail.
    let mut pool = AsidPool::new(0, &full_caps());
    let mut ready = vmcb02.clone();
    let (asid, _) = pool.assign(vm.nested.asid_slot());
    ready.set_asid(asid.number());
    let violations = check_vmrun(&ready, &full_caps(), &Outside::default());
    assert!(violations.is_empty(), "{violations}");
}

/// What L1 never gets to decide of its own state in `vmcb01` by running L2.
fn host_state(vmcb01: &Vmcb) -> Vec<u64> {
    let skip = [
        "rip",
        "rax",
        "rsp",
        "cr2",
        "dr6",
        "dr7",
        "interrupt_state",
        "event_inj",
        "exit_int_info",
        "clean",
        "virtual_interrupts",
        "g_pat",
        "star",
        "lstar",
        "cstar",
        "sfmask",
        "kernel_gs_base",
        "sysenter_cs",
        "sysenter_esp",
        "sysenter_eip",
        "intercept_misc2",
        "virtual_extensions",
        "dbg_ctl",
        "br_from",
        "br_to",
        "last_excp_from",
        "last_excp_to",
    ];
    Vmcb::FIELDS
        .iter()
        .filter(|f| !skip.contains(&f.name))
        .map(|f| vmcb01.field(f))
        .collect()
}

/// Bytes of the control block where L1's choices lie, and any others.
fn offset() -> impl Strategy<Value = usize> {
    prop_oneof![
        0usize..0xD0,
        0x400usize..0x4A0,
        0x4C8usize..0x4D8,
        0x548usize..0x580,
        0usize..0x1000
    ]
}

#[derive(Clone, Debug)]
enum Step {
    Mutate(Vec<(usize, u8)>),
    /// Another processor of L1 changes the control block at the n-th read.
    Race(usize, Vec<(usize, u8)>),
    Map(usize, u64),
    Execute(usize, u64),
    Exit(u64, u64, u64, u64),
    Event(usize),
    Window(bool),
    Registers(u64, u64),
    Repair,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec((offset(), any::<u8>()), 1..4);
    let code = prop_oneof![
        0u64..0xA8,
        Just(0x400),
        Just(u64::MAX),
        Just(0x401),
        any::<u64>(),
        Just(0x60),
        Just(0x80)
    ];
    prop_oneof![
        3 => bytes().prop_map(Step::Mutate),
        1 => (0usize..16, bytes()).prop_map(|(n, b)| Step::Race(n, b)),
        1 => (0usize..0x5000, any::<u64>()).prop_map(|(at, v)| Step::Map(at & !7, v)),
        8 => (0usize..7, prop_oneof![4 => Just(VMCB12.0), 1 => any::<u64>(), 1 => Just(0x30000)])
            .prop_map(|(i, rax)| Step::Execute(i, rax)),
        5 => (code, any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(c, a, b, r)| Step::Exit(c, a, b, r)),
        2 => (0usize..4).prop_map(Step::Event),
        1 => any::<bool>().prop_map(Step::Window),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(a, b)| Step::Registers(a, b)),
        2 => Just(Step::Repair),
    ]
}

fn apply(bytes: &mut [u8], changes: &[(usize, u8)]) {
    for (offset, value) in changes {
        bytes[VMCB12.0 as usize + offset] = *value;
    }
}

fn run(vm: &mut Vm, good: &Vmcb, step: Step) {
    match step {
        Step::Mutate(changes) => {
            let mut block = [0; 4096];
            vm.memory.read(VMCB12, &mut block).unwrap();
            for (offset, value) in changes {
                block[offset] = value;
            }
            vm.memory.write(VMCB12, &block).unwrap();
        }
        Step::Race(when, changes) => {
            let mut seen = 0;
            *vm.memory.adversary.borrow_mut() = Some(Box::new(move |bytes| {
                if seen == when {
                    apply(bytes, &changes);
                }
                seen += 1;
            }));
        }
        Step::Map(at, value) => vm
            .memory
            .write_value(MSRPM12.wrapping_add(at as u64), &value)
            .unwrap(),
        Step::Execute(which, rax) => {
            if !vm.nested.is_guest() || Instruction::ALL[which] != Instruction::Vmrun {
                vm.gprs.rax = rax;
            }
            let _ = vm.execute(Instruction::ALL[which]);
        }
        Step::Exit(code, info1, info2, rcx) if vm.nested.is_guest() => {
            vm.gprs.rcx = rcx;
            let _ = vm.exit(ExitCode(code), info1, info2);
        }
        Step::Event(which) => {
            use PhysicalEvent as P;
            let event = [P::Interrupt, P::Nmi, P::Smi, P::Init][which];
            if let Acceptance::Exit(code) = vm.accepts(event) {
                vm.exit_to_l1(code);
            }
        }
        Step::Window(wanted) => vm.nested.set_window(wanted, &vm.vmcb01),
        Step::Registers(a, b) => {
            vm.gprs.rbx = a;
            vm.gprs.rsp = b;
        }
        Step::Repair => vm.set_vmcb12(good),
        Step::Exit(..) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn l2_runs_under_l0s_requirements(
        steps in prop::collection::vec(step(), 1..40), bare: bool, nested_paging: bool,
    ) {
        let mut vm = if bare {
            Vm::new(SvmCaps { features: Features::NP, ..SvmCaps::ZEN2 })
        } else {
            Vm::full()
        };
        let mut good = vm.vmcb12();
        if nested_paging {
            good.set_nested_control(NestedControl::NP_ENABLE);
            vm.set_vmcb12(&good);
        }
        let state = host_state(&vm.vmcb01);
        for step in steps {
            run(&mut vm, &good, step);
            if vm.nested.is_guest() {
                assert_contained(&mut vm);
            }
            prop_assert_eq!(&host_state(&vm.vmcb01), &state);
        }
        prop_assert!(vm.nested.vmcb12().as_bytes().len() == 4096);
    }
}
