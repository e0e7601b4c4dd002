//! L1 as the adversary: whatever it puts into its VMCS and its memory, L2 runs under L0's
//! requirements.

use super::*;
use crate::vmx::join::accepted;
use proptest::prelude::*;
use testudo_vmx::check::check_entry;
use testudo_vmx::controls::{EntryControls, ExitControls, PinControls};
use testudo_vmx::encoding::Area;
use testudo_vmx::fields::FIELDS;

fn get(vm: &Vm, field: impl Into<Encoding>) -> u64 {
    vm.vmcs.l2.image().read_raw(field.into()).unwrap()
}

pub(super) fn assert_contained(vm: &Vm, host: &[(Encoding, u64)]) {
    let l0 = vm.vmcs.l1.image();
    let bits = |field: Encoding| (get(vm, field), l0.read_raw(field).unwrap());
    // Everything that L0 wants to see.
    let (pin, pin0) = bits(fields::PIN_CONTROLS.encoding());
    assert_eq!(pin0 & !pin, 0);
    assert_eq!(pin & 9, 9);
    assert_eq!(
        pin & u64::from(PinControls::PROCESS_POSTED_INTERRUPTS.bits()),
        0
    );
    let (primary, primary0) = bits(fields::PRIMARY_CONTROLS.encoding());
    let not_exits = PrimaryControls::USE_MSR_BITMAPS
        | PrimaryControls::USE_IO_BITMAPS
        | PrimaryControls::INTERRUPT_WINDOW_EXITING;
    assert_eq!(primary0 & !primary & !u64::from(not_exits.bits()), 0);
    let primary = PrimaryControls::from_bits_retain(primary as u32);
    assert!(
        primary.contains(PrimaryControls::UNCONDITIONAL_IO_EXITING | PrimaryControls::HLT_EXITING)
    );
    let never = PrimaryControls::USE_IO_BITMAPS | PrimaryControls::ACTIVATE_TERTIARY_CONTROLS;
    assert!(!primary.intersects(never));
    // CR8 is never the processor's own task priority, nor L1's.
    let cr8 = PrimaryControls::CR8_LOAD_EXITING | PrimaryControls::CR8_STORE_EXITING;
    assert!(primary.contains(cr8) || primary.contains(PrimaryControls::USE_TPR_SHADOW));
    let secondary = SecondaryControls::from_bits_retain(get(vm, fields::SECONDARY_CONTROLS) as u32);
    let allowed = SecondaryControls::ENABLE_EPT
        | SecondaryControls::ENABLE_VPID
        | SecondaryControls::UNRESTRICTED_GUEST
        | SecondaryControls::ENABLE_RDTSCP
        | SecondaryControls::ENABLE_INVPCID
        | SecondaryControls::DESCRIPTOR_TABLE_EXITING
        | SecondaryControls::WBINVD_EXITING
        | SecondaryControls::RDRAND_EXITING
        | SecondaryControls::RDSEED_EXITING
        | SecondaryControls::USE_TSC_SCALING
        | SecondaryControls::VIRTUALIZE_APIC_ACCESSES
        | SecondaryControls::VIRTUALIZE_X2APIC_MODE
        | SecondaryControls::APIC_REGISTER_VIRTUALIZATION
        | SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY;
    assert!(secondary.contains(SecondaryControls::ENABLE_EPT));
    assert!((secondary - allowed).is_empty(), "{secondary}");
    let (exceptions, exceptions0) = bits(fields::EXCEPTION_BITMAP.encoding());
    assert_eq!(exceptions0 & !exceptions, 0);
    for mask in [fields::CR0_GUEST_HOST_MASK, fields::CR4_GUEST_HOST_MASK] {
        let (mask02, mask01) = bits(mask.encoding());
        assert_eq!(mask01 & !mask02, 0);
    }
    // Exit and entry controls are L0's, but for the preemption timer and IA-32e mode.
    let (exit, exit0) = bits(fields::EXIT_CONTROLS.encoding());
    assert_eq!(
        (exit ^ exit0) & !u64::from(ExitControls::SAVE_PREEMPTION_TIMER.bits()),
        0
    );
    let (entry, entry0) = bits(fields::ENTRY_CONTROLS.encoding());
    assert_eq!(
        (entry ^ entry0) & !u64::from(EntryControls::IA32E_MODE_GUEST.bits()),
        0
    );
    // No address of L1's, but frames of its memory, as L0 has it now.
    let frames = FRAMES + vm.stage.moved..FRAMES + vm.stage.moved + Memory::SIZE as u64;
    let mut named = Vec::new();
    if primary.contains(PrimaryControls::USE_TPR_SHADOW) {
        named.push(get(vm, fields::VIRTUAL_APIC_ADDRESS));
    }
    if secondary.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES) {
        named.push(get(vm, fields::APIC_ACCESS_ADDRESS));
    }
    assert!(
        named
            .iter()
            .all(|at| frames.contains(at) && at & 0xFFF == 0),
        "{named:x?}"
    );
    assert!([L0_EPTP, COMPOSED_EPTP, PLAIN_EPTP].contains(&get(vm, fields::EPT_POINTER)));
    assert!([L0_BITMAP, BITMAP_AT.0].contains(&get(vm, fields::MSR_BITMAPS)));
    assert_eq!(get(vm, fields::VMCS_LINK_POINTER), u64::MAX);
    assert_eq!(get(vm, fields::GUEST_ACTIVITY_STATE), 0);
    let mut l0_bitmap = MsrBitmap::all_exit();
    l0_bitmap.pass_through(Msr::FS_BASE);
    l0_bitmap.pass_through(Msr::SYSENTER_CS);
    let mine = &vm.nested.msr_bitmap;
    for msr in (0..0x2000).chain(0xC000_0000..0xC000_2000).map(Msr) {
        let reads = !l0_bitmap.read_exits(msr) || reads_are_virtual(msr, secondary);
        let writes = !l0_bitmap.write_exits(msr) || writes_are_virtual(msr, secondary);
        assert!(reads || mine.read_exits(msr), "{msr}");
        assert!(writes || mine.write_exits(msr), "{msr}");
    }
    // Host state, and every control that the join does not know, as the backend left them.
    for (field, value) in host {
        assert_eq!(get(vm, *field), *value, "{field}");
    }
    // The processor accepts it: L1 cannot make L0's entry fail.
    assert!(accepted(&vm.nested.joined.unwrap(), &vm.processor));
    let violations = check_entry(vm.vmcs.l2.image(), &vm.processor).unwrap();
    assert!(violations.is_empty(), "{violations}");
}

/// Whether RDMSR of it does not reach the processor's local APIC (SDM vol. 3C, 32.5).
fn reads_are_virtual(msr: Msr, controls: SecondaryControls) -> bool {
    let all = controls.contains(SecondaryControls::APIC_REGISTER_VIRTUALIZATION);
    let any = controls.contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE);
    any && (msr == Msr::X2APIC_TPR || all && (0x800..=0x8FF).contains(&msr.0))
}

/// The same of WRMSR.
fn writes_are_virtual(msr: Msr, controls: SecondaryControls) -> bool {
    let delivery = controls.contains(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);
    let any = controls.contains(SecondaryControls::VIRTUALIZE_X2APIC_MODE);
    let delivered = [Msr::X2APIC_EOI, Msr::X2APIC_SELF_IPI].contains(&msr);
    any && (msr == Msr::X2APIC_TPR || delivery && delivered)
}

/// The fields of `vmcs02` that no L1 may change.
pub(super) fn untouchable(vm: &Vm) -> Vec<(Encoding, u64)> {
    let mine = [
        fields::PIN_CONTROLS.encoding(),
        fields::PRIMARY_CONTROLS.encoding(),
        fields::SECONDARY_CONTROLS.encoding(),
        fields::EXIT_CONTROLS.encoding(),
        fields::ENTRY_CONTROLS.encoding(),
        fields::EXCEPTION_BITMAP.encoding(),
        fields::PAGE_FAULT_ERROR_CODE_MASK.encoding(),
        fields::PAGE_FAULT_ERROR_CODE_MATCH.encoding(),
        fields::TSC_OFFSET.encoding(),
        fields::TSC_MULTIPLIER.encoding(),
        fields::EPT_POINTER.encoding(),
        fields::MSR_BITMAPS.encoding(),
        fields::VIRTUAL_APIC_ADDRESS.encoding(),
        fields::APIC_ACCESS_ADDRESS.encoding(),
        fields::TPR_THRESHOLD.encoding(),
        fields::EOI_EXIT_BITMAP_0.encoding(),
        fields::EOI_EXIT_BITMAP_1.encoding(),
        fields::EOI_EXIT_BITMAP_2.encoding(),
        fields::EOI_EXIT_BITMAP_3.encoding(),
        fields::CR0_GUEST_HOST_MASK.encoding(),
        fields::CR4_GUEST_HOST_MASK.encoding(),
        fields::CR0_READ_SHADOW.encoding(),
        fields::CR4_READ_SHADOW.encoding(),
        fields::ENTRY_INTERRUPTION_INFORMATION.encoding(),
        fields::ENTRY_EXCEPTION_ERROR_CODE.encoding(),
        fields::ENTRY_INSTRUCTION_LENGTH.encoding(),
    ];
    let kept = |f: &Encoding| match f.area() {
        Area::Host => true,
        Area::Control => !mine.contains(f),
        _ => false,
    };
    vm.vmcs.l2.image().iter().filter(|(f, _)| kept(f)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Set(usize, u64),
    Flip(usize, u32),
    Reset,
    Enter,
    Exit(u16, u64),
    Memory(u64, u64),
    Instruction(usize, u64),
    /// L1 asks for these controls about L2's local APIC.
    Apic(u32, u64),
    /// L0 moves L1's memory.
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..FIELDS.len(), prop_oneof![any::<u64>(), 0u64..64, Just(u64::MAX)])
            .prop_map(|(f, v)| Step::Set(f, v)),
        3 => (0..FIELDS.len(), 0u32..64).prop_map(|(f, b)| Step::Flip(f, b)),
        2 => Just(Step::Reset),
        6 => Just(Step::Enter),
        4 => (0u16..80, any::<u64>()).prop_map(|(r, q)| Step::Exit(r, q)),
        1 => (0x8000u64..0x30000, any::<u64>()).prop_map(|(a, v)| Step::Memory(a & !7, v)),
        2 => (0usize..13, any::<u64>()).prop_map(|(i, v)| Step::Instruction(i, v)),
        3 => (any::<u32>(), any::<u64>()).prop_map(|(c, v)| Step::Apic(c, v)),
        1 => Just(Step::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn l2_runs_under_l0s_requirements(steps in prop::collection::vec(step(), 1..40)) {
        let mut vm = Vm::ready();
        let sample = vm.nested.vmcs12.image.clone();
        let host = untouchable(&vm);
        for step in steps {
            match step {
                // While L2 runs, L1 reaches none of L0's copy of its VMCS.
                Step::Set(..) | Step::Flip(..) | Step::Reset | Step::Apic(..)
                    if vm.nested.is_guest() => {}
                Step::Set(field, value) => vm.set12(FIELDS[field].encoding, value),
                Step::Flip(field, bit) => {
                    let field = FIELDS[field].encoding;
                    let value = vm.get12(field) ^ 1 << bit;
                    vm.set12(field, value);
                }
                Step::Reset => {
                    vm.nested.vmcs12.image.clone_from(&sample);
                    vm.nested.rare_dirty = true;
                    vm.nested.settled = None;
                }
                Step::Enter if !vm.nested.is_guest() => {
                    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
                    vm.vmcs.l1.preset(fields::GUEST_INTERRUPTIBILITY, 0);
                    for instruction in [Instruction::Vmlaunch, Instruction::Vmresume] {
                        if !vm.nested.is_guest() {
                            let _ = vm.run(instruction);
                        }
                    }
                }
                Step::Exit(reason, qualification) if vm.nested.is_guest() => {
                    let _ = vm.exit(BasicReason::from_number(reason), qualification);
                }
                Step::Memory(address, value) => vm.memory.store_u64(Gpa(address), value).unwrap(),
                Step::Instruction(which, value) if !vm.nested.is_guest() => {
                    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
                    vm.gprs.rcx = value & 7;
                    let _ = vm.pointer(Instruction::ALL[which], value);
                }
                Step::Apic(controls, value) => vm.ask_for_apic(controls, value),
                Step::Move => {
                    vm.stage.moved ^= 1 << 30;
                    vm.nested.forget_frames();
                }
                _ => {}
            }
            if vm.nested.are_frames_stale() {
                assert!(vm.renew_frames());
            }
            if vm.nested.is_guest() {
                assert_contained(&vm, &host);
            }
        }
    }
}
