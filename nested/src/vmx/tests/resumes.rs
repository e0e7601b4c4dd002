//! An entry that looks only at what L1 has changed comes to what a complete one does.

use super::*;
use crate::vmx::shadow::ALL_SHADOWED;
use proptest::prelude::*;
use std::vec;
use testudo_vmx::controls::{EntryControls, ExitControls, PinControls};

/// What happens between two entries.
#[derive(Clone, Debug)]
enum Step {
    /// L1 writes a field without an exit.
    Shadowed(usize, u64),
    /// L1 writes a field with an exit.
    Vmwrite(usize, u64),
    /// L1 reads a field with an exit.
    Vmread(usize),
    /// L1's own registers change.
    Own(usize, u64),
    /// L0 moves L1's clock.
    Clock(u64),
    /// L1 changes its MSR bitmap.
    Bitmap(u64, u64),
    /// L1 changes L2's task priority in memory.
    Priority(u64),
    /// L0 moves L1's memory.
    Move,
    /// L1 enters L2, which changes these of its own fields, and exits like this; or the entry fails.
    Run(Vec<(usize, u64)>, Way),
}

/// How L2 exits.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// By an instruction.
    Instruction,
    /// By an exception, with what the processor tells of another event's delivery.
    Exception(u32),
    /// For an NMI that L0 has for L1.
    Nmi,
    /// By an instruction, after the nested state was saved.
    Saved,
}

const WRITABLE: [Encoding; 18] = [
    fields::GUEST_RIP.encoding(),
    fields::GUEST_RSP.encoding(),
    fields::GUEST_RFLAGS.encoding(),
    fields::GUEST_INTERRUPTIBILITY.encoding(),
    fields::HOST_RSP.encoding(),
    fields::GUEST_INTERRUPT_STATUS.encoding(),
    fields::EOI_EXIT_BITMAP_1.encoding(),
    fields::GUEST_CR3.encoding(),
    fields::GUEST_CR0.encoding(),
    fields::GUEST_CR4.encoding(),
    fields::GUEST_SS_ACCESS_RIGHTS.encoding(),
    fields::CR0_READ_SHADOW.encoding(),
    fields::PRIMARY_CONTROLS.encoding(),
    fields::ENTRY_INTERRUPTION_INFORMATION.encoding(),
    fields::ENTRY_INSTRUCTION_LENGTH.encoding(),
    fields::PREEMPTION_TIMER_VALUE.encoding(),
    fields::HOST_GS_BASE.encoding(),
    fields::EXCEPTION_BITMAP.encoding(),
];

const TRAPPING: [Encoding; 14] = [
    fields::GUEST_FS_BASE.encoding(),
    fields::GUEST_GDTR_LIMIT.encoding(),
    fields::GUEST_DR7.encoding(),
    fields::TSC_OFFSET.encoding(),
    fields::EXIT_CONTROLS.encoding(),
    fields::ENTRY_CONTROLS.encoding(),
    fields::PIN_CONTROLS.encoding(),
    fields::GUEST_ACTIVITY_STATE.encoding(),
    fields::HOST_RIP.encoding(),
    fields::HOST_SYSENTER_EIP.encoding(),
    fields::EXIT_MSR_LOAD_COUNT.encoding(),
    fields::TPR_THRESHOLD.encoding(),
    fields::SECONDARY_CONTROLS.encoding(),
    fields::VIRTUAL_APIC_ADDRESS.encoding(),
];

/// What L2 changes by running, and the processor saves.
const OWN_OF_L2: [Encoding; 11] = [
    fields::GUEST_RIP.encoding(),
    fields::GUEST_RSP.encoding(),
    fields::GUEST_CR3.encoding(),
    fields::GUEST_FS_BASE.encoding(),
    fields::GUEST_GDTR_BASE.encoding(),
    fields::GUEST_DR7.encoding(),
    fields::GUEST_SYSENTER_EIP.encoding(),
    fields::EXIT_INSTRUCTION_LENGTH.encoding(),
    fields::GUEST_LINEAR_ADDRESS.encoding(),
    fields::GUEST_CR0.encoding(),
    fields::GUEST_INTERRUPT_STATUS.encoding(),
];

const OWN_OF_L1: [Encoding; 5] = [
    fields::GUEST_DR7.encoding(),
    fields::GUEST_DEBUGCTL.encoding(),
    fields::GUEST_PAT.encoding(),
    fields::GUEST_INTERRUPTIBILITY.encoding(),
    fields::CR0_READ_SHADOW.encoding(),
];

/// Values at the border of validity.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..0x1000,
        2 => (0u32..64).prop_map(|bit| 1 << bit),
        2 => prop::sample::select(vec![
            2, 0x202, 0x102, 0x8000_0031, 0x8000_0202, 0xFFFF_8000_0000_1000, 0x0000_8000_0000_0000,
            0x1_0000_0000, 0x0007_0406_0007_0406, 0x400, 0x2_0002,
        ]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    // Whatever of these a processor saves is valid.
    let changes = prop::collection::vec((0..OWN_OF_L2.len(), 0u64..0x1000), 0..4);
    prop_oneof![
        // The first six are those that a complete entry is not due for.
        4 => (0usize..6, value()).prop_map(|(i, v)| Step::Shadowed(i, v)),
        1 => (0..WRITABLE.len(), value()).prop_map(|(i, v)| Step::Shadowed(i, v)),
        1 => (0..TRAPPING.len(), value()).prop_map(|(i, v)| Step::Vmwrite(i, v)),
        1 => (0..TRAPPING.len()).prop_map(Step::Vmread),
        1 => (0..OWN_OF_L1.len(), value()).prop_map(|(i, v)| Step::Own(i, v)),
        1 => value().prop_map(Step::Clock),
        1 => (prop::sample::select(vec![0x100, 0x420, 0x900]), any::<u64>())
            .prop_map(|(at, v)| Step::Bitmap(at, v)),
        1 => any::<u64>().prop_map(Step::Priority),
        1 => Just(Step::Move),
        6 => (changes, way()).prop_map(|(changes, way)| Step::Run(changes, way)),
    ]
}

fn way() -> impl Strategy<Value = Way> {
    // #GP, alone or while an interrupt or a page fault was delivered.
    let delivered = prop::sample::select(vec![0, 0x8000_0030, 0x8000_0B0E]);
    prop_oneof![
        4 => Just(Way::Instruction),
        1 => delivered.prop_map(Way::Exception),
        1 => Just(Way::Nmi),
        1 => Just(Way::Saved),
    ]
}

/// Controls in which L1s differ.
#[derive(Clone, Copy, Debug)]
struct Kind {
    debug: [bool; 2],
    pat: [bool; 2],
    efer: [bool; 2],
    timer: bool,
    ept: bool,
    vpid: bool,
    bitmap: bool,
    /// As for [`Vm::ask_for_apic`].
    apic: Option<(u32, u64)>,
}

fn kind() -> impl Strategy<Value = Kind> {
    let pair = any::<[bool; 2]>;
    let rest = any::<[bool; 4]>();
    let apic = prop::option::of((any::<u32>(), any::<u64>()));
    (pair(), pair(), pair(), rest, apic).prop_map(
        |(debug, pat, efer, [timer, ept, vpid, bitmap], apic)| Kind {
            debug,
            pat,
            // Mostly both, as hypervisors have it.
            efer: if efer[0] { [true; 2] } else { efer },
            timer,
            ept,
            vpid,
            bitmap,
            apic,
        },
    )
}

const BITMAP: u64 = 0x1_0000;

fn vm(kind: Kind) -> Vm {
    let mut vm = Vm::ready();
    let set = |vm: &mut Vm, field: Encoding, bits: u32, on: bool| {
        let old = vm.get12(field) & !u64::from(bits);
        vm.set12(field, old | if on { bits.into() } else { 0 });
    };
    let (exit, entry) = (
        fields::EXIT_CONTROLS.encoding(),
        fields::ENTRY_CONTROLS.encoding(),
    );
    for ([load, save], loads, saves) in [
        (
            kind.debug,
            EntryControls::LOAD_DEBUG_CONTROLS,
            ExitControls::SAVE_DEBUG_CONTROLS,
        ),
        (kind.pat, EntryControls::LOAD_PAT, ExitControls::SAVE_PAT),
        (kind.efer, EntryControls::LOAD_EFER, ExitControls::SAVE_EFER),
    ] {
        set(&mut vm, entry, loads.bits(), load);
        set(&mut vm, exit, saves.bits(), save);
    }
    let pin = fields::PIN_CONTROLS.encoding();
    set(
        &mut vm,
        pin,
        PinControls::ACTIVATE_PREEMPTION_TIMER.bits(),
        kind.timer,
    );
    set(
        &mut vm,
        exit,
        ExitControls::SAVE_PREEMPTION_TIMER.bits(),
        kind.timer,
    );
    let primary = fields::PRIMARY_CONTROLS.encoding();
    let activate = PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits();
    set(&mut vm, primary, activate, kind.ept || kind.vpid);
    set(
        &mut vm,
        primary,
        PrimaryControls::USE_MSR_BITMAPS.bits(),
        kind.bitmap,
    );
    if let Some((controls, value)) = kind.apic {
        vm.ask_for_apic(controls, value);
        set(&mut vm, primary, activate, true);
    }
    vm.set12(fields::MSR_BITMAPS, BITMAP);
    let secondary = fields::SECONDARY_CONTROLS.encoding();
    set(
        &mut vm,
        secondary,
        SecondaryControls::ENABLE_EPT.bits(),
        kind.ept,
    );
    set(
        &mut vm,
        secondary,
        SecondaryControls::ENABLE_VPID.bits(),
        kind.vpid,
    );
    vm.set12(fields::EPT_POINTER, 0x5000 | 3 << 3 | 6);
    vm.set12(fields::VPID, u64::from(kind.vpid));
    let mut shadow = FakeVmcs::with_caps(&vm.processor);
    let image = vm.nested.vmcs12.image.clone();
    fill(&mut shadow, &image);
    vm.vmcs.shadow = Some(shadow);
    vm.nested.shadow_misses = 0;
    vm
}

/// Takes the step; what came of an entry, if it was one.
fn take(vm: &mut Vm, step: &Step, launched: &mut bool) -> Option<(End, Option<Handled>)> {
    match step {
        Step::Shadowed(index, value) => {
            let shadow = vm.vmcs.shadow.as_mut().unwrap();
            shadow.write_raw(WRITABLE[*index], *value).unwrap();
        }
        Step::Vmwrite(index, value) => {
            vm.gprs.rbx = *value;
            assert_eq!(
                vm.field(Instruction::Vmwrite, TRAPPING[*index].0.into()),
                End::Succeed
            );
        }
        Step::Vmread(index) => {
            assert_eq!(
                vm.field(Instruction::Vmread, TRAPPING[*index].0.into()),
                End::Succeed
            );
        }
        Step::Own(index, value) => {
            vm.vmcs.l1.preset(OWN_OF_L1[*index], *value);
        }
        Step::Clock(value) => {
            vm.vmcs.l1.preset(fields::TSC_OFFSET, *value);
        }
        Step::Bitmap(at, value) => vm.memory.store_u64(Gpa(BITMAP + at), *value).unwrap(),
        Step::Priority(value) => {
            let page = vm.get12(fields::VIRTUAL_APIC_ADDRESS);
            let _ = vm
                .memory
                .store_u64(Gpa(page & !7).wrapping_add(0x80), *value);
        }
        Step::Move => {
            vm.stage.moved ^= 1 << 30;
            vm.nested.forget_frames();
        }
        Step::Run(changes, way) => {
            let instruction = if *launched {
                Instruction::Vmresume
            } else {
                Instruction::Vmlaunch
            };
            let end = vm.run(instruction);
            if end != End::Other(Outcome::Entered { halted: false })
                && end != End::Other(Outcome::Entered { halted: true })
            {
                return Some((end, None));
            }
            *launched = true;
            let information = fields::ENTRY_INTERRUPTION_INFORMATION;
            let delivered = vm.vmcs.l2.get(information).unwrap() & !(1 << 31);
            vm.vmcs.l2.preset(information, delivered.into());
            // L2 has got beyond a shadow of STI or MOV SS, with which a pending single step would have to agree.
            let state = vm.vmcs.l2.get(fields::GUEST_INTERRUPTIBILITY).unwrap();
            vm.vmcs
                .l2
                .preset(fields::GUEST_INTERRUPTIBILITY, u64::from(state & !3));
            for (index, value) in changes {
                let field = OWN_OF_L2[*index];
                let mut value = *value;
                if field == fields::GUEST_CR0.encoding() {
                    // TS, which L2 sets and clears by itself.
                    value = vm.vmcs.l2.get(fields::GUEST_CR0).unwrap() ^ (value & 8);
                }
                vm.vmcs.l2.preset(field, value);
            }
            let information = |vm: &mut Vm, interruption: u32, vectoring: u32| {
                let l2 = &mut vm.vmcs.l2;
                l2.preset(fields::EXIT_INTERRUPTION_INFORMATION, interruption.into());
                l2.preset(
                    fields::EXIT_INTERRUPTION_ERROR_CODE,
                    u64::from(interruption >> 8 & 0xF),
                );
                l2.preset(fields::IDT_VECTORING_INFORMATION, vectoring.into());
                l2.preset(
                    fields::IDT_VECTORING_ERROR_CODE,
                    u64::from(vectoring >> 8 & 0xF),
                );
            };
            let handled = match *way {
                Way::Instruction => {
                    information(vm, 0, 0);
                    vm.exit(BasicReason::Cpuid, 7)
                }
                Way::Saved => {
                    saved::save(vm);
                    information(vm, 0, 0);
                    vm.exit(BasicReason::Cpuid, 7)
                }
                Way::Exception(vectoring) => {
                    information(vm, 0x8000_0B0D, vectoring);
                    vm.exit(BasicReason::ExceptionOrNmi, 0)
                }
                Way::Nmi => vm.exit_to_l1(BasicReason::ExceptionOrNmi, 0x8000_0202),
            };
            if handled == Handled::L0 {
                // L1 does not want the exception.
                vm.exit(BasicReason::Cpuid, 7);
            }
            // What L1's instructions need of it.
            vm.vmcs.l1.preset(fields::EXIT_INSTRUCTION_LENGTH, 4);
            vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
            return Some((end, Some(handled)));
        }
    }
    None
}

/// A VMCS without the bits of CR0's read shadow that nobody sees.
fn as_it_counts(vmcs: &FakeVmcs) -> VmcsImage {
    let mut image = vmcs.image().clone();
    let mask = image.get(fields::CR0_GUEST_HOST_MASK).unwrap();
    let shadow = image.get(fields::CR0_READ_SHADOW).unwrap();
    image.set(fields::CR0_READ_SHADOW, shadow & mask).unwrap();
    image
}

proptest! {
    #[test]
    fn an_entry_after_small_changes_is_a_complete_one(
        kind in kind(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let (mut quick, mut complete) = (vm(kind), vm(kind));
        let mut launched = [false; 2];
        for step in &steps {
            // Nothing is known to be as before.
            complete.nested.settled = None;
            complete.nested.joined = complete.nested.joined.filter(|_| complete.nested.is_guest);
            complete.nested.rare_dirty = true;
            let ends = (
                take(&mut quick, step, &mut launched[0]),
                take(&mut complete, step, &mut launched[1]),
            );
            prop_assert_eq!(&ends.0, &ends.1);
            prop_assert_eq!(quick.nested.take_flush(), complete.nested.take_flush());
            prop_assert_eq!(quick.vmcs.l1.image(), complete.vmcs.l1.image());
            prop_assert_eq!(as_it_counts(&quick.vmcs.l2), as_it_counts(&complete.vmcs.l2));
            prop_assert_eq!(
                quick.vmcs.shadow.as_ref().map(FakeVmcs::image),
                complete.vmcs.shadow.as_ref().map(FakeVmcs::image)
            );
            prop_assert_eq!(quick.nested.msr_bitmap.as_bytes(), complete.nested.msr_bitmap.as_bytes());
            for slot in guest_fields::RARE {
                prop_assert_eq!(quick.get12(slot.field), complete.get12(slot.field));
            }
        }
        // And nothing is lost of what L1 wrote, whatever was left where it was.
        prop_assert_eq!(saved::save(&mut quick), saved::save(&mut complete));
        for field in WRITABLE {
            let shadow = quick.vmcs.shadow.as_ref().unwrap();
            prop_assert_eq!(
                shadow.read_raw(field),
                quick.nested.vmcs12.image.read_raw(field),
                "{}", field
            );
        }
    }
}

/// The shadow has after each exit what L1's VMCS has.
#[test]
fn an_exit_leaves_no_difference_between_the_shadow_and_the_copy() {
    let mut vm = vm(Kind {
        debug: [true; 2],
        pat: [true; 2],
        efer: [true; 2],
        timer: true,
        ept: true,
        vpid: true,
        bitmap: false,
        apic: None,
    });
    let mut launched = false;
    for round in 0..3 {
        vm.nested.shadow_misses |= if round == 0 { ALL_SHADOWED } else { 0 };
        let change = vec![(0, 0x4321 + round), (2, 0x7000 + round), (7, 3)];
        let run = take(&mut vm, &Step::Run(change, Way::Instruction), &mut launched).unwrap();
        assert!(matches!(run.1, Some(Handled::L1(_))), "{run:?}");
        let shadow = vm.vmcs.shadow.as_ref().unwrap();
        for field in WRITABLE {
            assert_eq!(
                shadow.read_raw(field),
                vm.nested.vmcs12.image.read_raw(field),
                "{field}"
            );
        }
        assert_eq!(shadow.get(fields::EXIT_INSTRUCTION_LENGTH).unwrap(), 3);
        assert_eq!(shadow.get(fields::GUEST_RIP).unwrap(), 0x4321 + round);
        assert!(vm.nested.settled.is_some());
    }
}
