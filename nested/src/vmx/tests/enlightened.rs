//! Enlightened VMCSs: what L1 puts into its page is entered with, and what an exit saves is there.

use super::*;
use crate::vmx::evmcs::{self, place};
use crate::vmx::{ENLIGHTENED_VERSION, SavedVmx};
use proptest::prelude::*;
use testudo_vmx::InstructionError as E;
use testudo_vmx::controls::PinControls;

const ASSIST: u64 = 0xC000;
const PAGE: Gpa = Gpa(0xD000);
const ANOTHER: Gpa = Gpa(0xE000);
const CLEAN: u64 = 824;
const ENTERED: End = End::Other(Outcome::Entered { halted: false });

const OFFER: Offer = Offer {
    ept: true,
    vpid: true,
    apic: true,
    enlightened: true,
};

impl Vm {
    /// In VMX operation, with an enlightened VMCS that can be entered.
    fn enlightened() -> Self {
        let mut vm = Self::offered(OFFER);
        assert_eq!(vm.pointer(Instruction::Vmxon, VMXON_REGION.0), End::Succeed);
        let written = vm.nested.write_assist_page(ASSIST | 1, &vm.memory);
        assert_eq!(written, Some(true));
        for page in [PAGE, ANOTHER] {
            vm.fill_page(page);
        }
        vm.name(PAGE);
        vm
    }

    fn fill_page(&self, at: Gpa) {
        self.memory.write(at, &[0; 4096]).unwrap();
        self.memory.store_u32(at, ENLIGHTENED_VERSION).unwrap();
        for (field, value) in samples::valid(self.nested.caps()).iter() {
            if place(field).is_some() {
                self.set_page(at, field, value);
            }
        }
    }

    /// L1 names the VMCS for its entries.
    fn name(&self, at: Gpa) {
        self.memory.write(Gpa(ASSIST + 40), &[1]).unwrap();
        self.memory.store_u64(Gpa(ASSIST + 48), at.0).unwrap();
    }

    fn set_page(&self, at: Gpa, field: impl Into<Encoding>, value: u64) {
        let field = field.into();
        let offset = place(field).unwrap().0 as u64;
        let bytes = value.to_le_bytes();
        let place = at.wrapping_add(offset);
        self.memory
            .write(place, &bytes[..field.width().bytes()])
            .unwrap();
    }

    fn get_page(&self, at: Gpa, field: impl Into<Encoding>) -> u64 {
        let field = field.into();
        let mut bytes = [0; 8];
        let place = at.wrapping_add(place(field).unwrap().0 as u64);
        self.memory
            .read(place, &mut bytes[..field.width().bytes()])
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    fn set_clean(&self, at: Gpa, groups: u32) {
        self.memory
            .store_u32(at.wrapping_add(CLEAN), groups)
            .unwrap();
    }

    fn clean(&self, at: Gpa) -> u32 {
        self.memory.load_u32(at.wrapping_add(CLEAN)).unwrap()
    }

    fn reenter(&mut self, instruction: Instruction) -> End {
        self.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
        self.run(instruction)
    }

    fn l2(&self, field: impl Into<Encoding>) -> u64 {
        self.vmcs.l2.image().read_raw(field.into()).unwrap()
    }

    /// The number of the error that L1 finds in its page.
    fn fails(&mut self, error: E) {
        let end = self.reenter(Instruction::Vmresume);
        assert_eq!(end, End::Fail(error.number()));
        let told = self.get_page(PAGE, fields::VM_INSTRUCTION_ERROR);
        assert_eq!(told, u64::from(error.number()));
    }
}

#[test]
fn entries_and_exits_go_through_the_page() {
    let mut vm = Vm::enlightened();
    vm.set_page(PAGE, fields::GUEST_RIP, 0x4444);
    let mut before = [0; 4096];
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    vm.memory.read(PAGE, &mut before).unwrap();
    assert_eq!(vm.nested.active_enlightened_vmcs(), Some(PAGE));
    assert_eq!(vm.nested.current_vmcs(), None);
    assert_eq!(vm.l2(fields::GUEST_RIP), 0x4444);
    for (field, value) in [
        (fields::GUEST_RIP.encoding(), 0x5555),
        (fields::GUEST_RSP.encoding(), 0x6666),
        (fields::GUEST_GS_BASE.encoding(), 0x7777),
        (fields::GUEST_TR_LIMIT.encoding(), 0x8888),
        (fields::EXIT_INSTRUCTION_LENGTH.encoding(), 3),
        (fields::GUEST_LINEAR_ADDRESS.encoding(), 0x9999),
    ] {
        vm.vmcs.l2.preset(field, value);
    }
    assert!(matches!(vm.exit(BasicReason::Cpuid, 5), Handled::L1(_)));
    for field in [
        fields::GUEST_RIP.encoding(),
        fields::GUEST_RSP.encoding(),
        fields::GUEST_GS_BASE.encoding(),
        fields::GUEST_TR_LIMIT.encoding(),
        fields::EXIT_INSTRUCTION_LENGTH.encoding(),
        fields::GUEST_LINEAR_ADDRESS.encoding(),
        fields::EXIT_QUALIFICATION.encoding(),
    ] {
        assert_eq!(vm.get_page(PAGE, field), vm.l2(field), "{field}");
    }
    let reason = u64::from(BasicReason::Cpuid.number());
    assert_eq!(vm.get_page(PAGE, fields::EXIT_REASON), reason);
    assert_eq!(vm.clean(PAGE), 0xFFFF);
    // Of controls and host state nothing was written, but for what an exit changes of the entry's.
    let mut after = [0; 4096];
    vm.memory.read(PAGE, &mut after).unwrap();
    for (field, _) in VmcsImage::new().iter() {
        use testudo_vmx::encoding::Area;
        let Some((at, _)) = place(field) else {
            continue;
        };
        if matches!(field.area(), Area::Control | Area::Host) {
            let range = at..at + field.width().bytes();
            assert_eq!(before[range.clone()], after[range], "{field}");
        }
    }
    // It has no launch state.
    for instruction in [Instruction::Vmresume, Instruction::Vmlaunch] {
        vm.set_page(PAGE, fields::GUEST_RIP, 0x1234);
        assert_eq!(vm.reenter(instruction), ENTERED);
        assert_eq!(vm.l2(fields::GUEST_RIP), 0x1234);
        assert!(matches!(vm.exit(BasicReason::Cpuid, 5), Handled::L1(_)));
    }
}

#[test]
fn clean_fields_say_what_is_loaded() {
    let mut vm = Vm::enlightened();
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    let field = fields::GUEST_GS_BASE;
    let group = place(field.encoding()).unwrap().1;
    let old = vm.l2(field);
    // Unchanged, L1 says.
    vm.set_page(PAGE, field, 0x1111);
    assert_eq!(vm.reenter(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.l2(field), old);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.set_page(PAGE, field, 0x2222);
    vm.set_clean(PAGE, 0xFFFF & !group);
    assert_eq!(vm.reenter(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.l2(field), 0x2222);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    // With VMLAUNCH, and after another page, they say nothing.
    vm.set_page(PAGE, field, 0x3333);
    assert_eq!(vm.reenter(Instruction::Vmlaunch), ENTERED);
    assert_eq!(vm.l2(field), 0x3333);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.set_clean(ANOTHER, 0xFFFF);
    vm.set_page(ANOTHER, field, 0x4444);
    vm.name(ANOTHER);
    assert_eq!(vm.reenter(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.l2(field), 0x4444);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(vm.nested.active_enlightened_vmcs(), Some(ANOTHER));
}

#[test]
fn pages_that_cannot_be_one_fail() {
    let width = 1 << fixtures::skylake_sp().processor.physical_address_bits;
    for at in [Gpa(PAGE.0 + 8), Gpa(width), Gpa(Memory::SIZE as u64)] {
        let mut vm = Vm::enlightened();
        vm.name(at);
        assert_eq!(vm.run(Instruction::Vmlaunch), End::FailInvalid, "{at:?}");
    }
    for (version, works) in [
        (ENLIGHTENED_VERSION, true),
        (REVISION, true),
        (0, false),
        (2, false),
    ] {
        let mut vm = Vm::enlightened();
        vm.memory.store_u32(PAGE, version).unwrap();
        let end = if works { ENTERED } else { End::FailInvalid };
        assert_eq!(vm.run(Instruction::Vmlaunch), end, "{version}");
    }
    // Not named, not enlightened, or no assist page: there is no VMCS.
    let mut vm = Vm::enlightened();
    vm.name(Gpa(u64::MAX));
    assert_eq!(vm.run(Instruction::Vmlaunch), End::FailInvalid);
    let mut vm = Vm::enlightened();
    vm.memory.write(Gpa(ASSIST + 40), &[0]).unwrap();
    assert_eq!(vm.run(Instruction::Vmlaunch), End::FailInvalid);
    let mut vm = Vm::enlightened();
    assert_eq!(vm.nested.write_assist_page(ASSIST, &vm.memory), Some(true));
    assert_eq!(vm.run(Instruction::Vmlaunch), End::FailInvalid);
}

#[test]
fn the_assist_page_is_memory_and_only_where_it_is_offered() {
    let mut vm = Vm::offered(OFFER);
    assert_eq!(vm.nested.assist_page(), Some(0));
    let nowhere = Memory::SIZE as u64 | 1;
    assert_eq!(
        vm.nested.write_assist_page(nowhere, &vm.memory),
        Some(false)
    );
    assert_eq!(vm.nested.assist_page(), Some(0));
    assert_eq!(
        vm.nested.write_assist_page(nowhere - 1, &vm.memory),
        Some(true)
    );
    vm.memory.store_u64(Gpa(ASSIST), u64::MAX).unwrap();
    assert_eq!(
        vm.nested.write_assist_page(ASSIST | 1, &vm.memory),
        Some(true)
    );
    assert_eq!(vm.nested.assist_page(), Some(ASSIST | 1));
    assert_eq!(vm.memory.load_u64(Gpa(ASSIST)), Ok(0xFFFF_FFFF_0000_0000));
    let mut plain = Vm::new();
    assert_eq!(plain.nested.assist_page(), None);
    assert_eq!(
        plain.nested.write_assist_page(ASSIST | 1, &plain.memory),
        None
    );
}

#[test]
fn errors_are_told_in_the_page() {
    let mut vm = Vm::enlightened();
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    // A control that this VMCS has no field for, which the processor would have.
    let pin = vm.get_page(PAGE, fields::PIN_CONTROLS);
    let timer = u64::from(PinControls::ACTIVATE_PREEMPTION_TIMER.bits());
    vm.set_page(PAGE, fields::PIN_CONTROLS, pin | timer);
    vm.set_clean(PAGE, 0);
    vm.fails(E::InvalidControlField);
    vm.set_page(PAGE, fields::PIN_CONTROLS, pin);
    let cr3 = vm.get_page(PAGE, fields::HOST_CR3);
    vm.set_page(PAGE, fields::HOST_CR3, u64::MAX);
    vm.fails(E::InvalidHostState);
    vm.set_page(PAGE, fields::HOST_CR3, cr3);
    vm.vmcs.l1.preset(fields::GUEST_INTERRUPTIBILITY, 2);
    vm.fails(E::EventsBlockedByMovSs);
    vm.vmcs.l1.preset(fields::GUEST_INTERRUPTIBILITY, 0);
    // And an entry that fails late is an exit.
    vm.set_page(PAGE, fields::GUEST_RFLAGS, 0);
    let end = vm.reenter(Instruction::Vmresume);
    assert_eq!(end, End::Other(Outcome::FailedEntry));
    let reason = u64::from(BasicReason::InvalidGuestState.number()) | 1 << 31;
    assert_eq!(vm.get_page(PAGE, fields::EXIT_REASON), reason);
    assert_eq!(vm.get_page(PAGE, fields::GUEST_RFLAGS), 0);
}

#[test]
fn while_it_is_active_there_is_no_other_vmcs() {
    let mut vm = Vm::enlightened();
    // What was current is written back, as if another had become current.
    assert_eq!(vm.pointer(Instruction::Vmclear, REGION.0), End::Succeed);
    assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
    let field = u64::from(fields::GUEST_CR3.encoding().0);
    vm.gprs.rbx = 0xABC_D000;
    assert_eq!(vm.field(Instruction::Vmwrite, field), End::Succeed);
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert_eq!(vm.nested.current_vmcs(), None);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
    assert_eq!(vm.field(Instruction::Vmread, field), End::FailInvalid);
    assert_eq!(vm.field(Instruction::Vmwrite, field), End::FailInvalid);
    vm.memory_operand(OPERAND);
    assert_eq!(vm.run(Instruction::Vmptrst), End::Succeed);
    assert_eq!(vm.memory.load_u64(Gpa(OPERAND)), Ok(u64::MAX));
    // VMPTRLD ends its time, and the other one is as it was.
    assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
    assert_eq!(vm.nested.active_enlightened_vmcs(), None);
    assert_eq!(vm.field(Instruction::Vmread, field), End::Succeed);
    assert_eq!(vm.gprs.rbx, 0xABC_D000);
}

#[test]
fn vmclear_ends_its_time_and_writes_into_none() {
    let mut vm = Vm::enlightened();
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    for page in [ANOTHER, PAGE] {
        let mut before = [0; 4096];
        vm.memory.read(page, &mut before).unwrap();
        vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
        assert_eq!(vm.pointer(Instruction::Vmclear, page.0), End::Succeed);
        let mut after = [0; 4096];
        vm.memory.read(page, &mut after).unwrap();
        assert_eq!(before, after);
        let active = vm.nested.active_enlightened_vmcs();
        assert_eq!(active, (page == ANOTHER).then_some(PAGE));
    }
    // Its next entry loads all of it.
    vm.set_page(PAGE, fields::GUEST_GS_BASE, 0x9_8765);
    assert_eq!(vm.reenter(Instruction::Vmresume), ENTERED);
    assert_eq!(vm.l2(fields::GUEST_GS_BASE), 0x9_8765);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    assert_eq!(vm.run(Instruction::Vmxoff), End::Succeed);
    assert_eq!(vm.nested.active_enlightened_vmcs(), None);
}

/// As CVE-2021-29657 on AMD-V: another processor of L1's rewrites the page while it is being used.
#[test]
fn cve_2021_29657_an_enlightened_vmcs_is_read_once() {
    let mut vm = Vm::enlightened();
    vm.memory.reads.borrow_mut().clear();
    // The first read is of the assist page, the second of the VMCS. From then on nothing in them is as
    // it was.
    let mut turns = 0;
    *vm.memory.adversary.borrow_mut() = Some(Box::new(move |bytes| {
        turns += 1;
        if turns > 2 {
            bytes[PAGE.0 as usize..][..4096].fill(0xFF);
            bytes[ASSIST as usize..][..4096].fill(0xFF);
        }
    }));
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    let reads = vm.memory.reads.borrow();
    let page = reads
        .iter()
        .filter(|(at, _)| (PAGE.0..PAGE.0 + 4096).contains(&at.0))
        .count();
    let assist = reads
        .iter()
        .filter(|(at, _)| (ASSIST..ASSIST + 4096).contains(&at.0))
        .count();
    assert_eq!((page, assist), (1, 1));
    drop(reads);
    // L2 runs by what was checked.
    let sample = samples::valid(vm.nested.caps());
    let rip = sample.get(fields::GUEST_RIP).unwrap();
    assert_eq!(vm.l2(fields::GUEST_RIP), rip);
    assert!(matches!(vm.exit(BasicReason::Cpuid, 0), Handled::L1(_)));
    let host = sample.get(fields::HOST_RIP).unwrap();
    assert_eq!(vm.vmcs.l1.get(fields::GUEST_RIP), Ok(host));
}

#[test]
fn its_state_is_saved_and_restored() {
    let mut running = Vm::enlightened();
    assert_eq!(running.run(Instruction::Vmlaunch), ENTERED);
    let mut between = Vm::enlightened();
    assert_eq!(between.run(Instruction::Vmlaunch), ENTERED);
    assert!(matches!(
        between.exit(BasicReason::Cpuid, 0),
        Handled::L1(_)
    ));
    let mut named = Vm::enlightened();
    for vm in [&mut running, &mut between, &mut named] {
        let saved = super::saved::save(vm);
        assert_eq!(saved.assist_page, ASSIST | 1);
        assert_eq!(SavedVmx::from_bytes(&saved.to_bytes()).as_ref(), Ok(&saved));
        let mut other = Vm::enlightened();
        super::saved::restore(&mut other, &saved).unwrap();
        assert_eq!(super::saved::save(&mut other), saved);
        // KVM's layout has neither the assist page nor the page's place.
        let mut theirs = SavedVmx::from_kvm(&saved.to_kvm()).unwrap();
        theirs.assist_page = saved.assist_page;
        let mut other = Vm::enlightened();
        super::saved::restore(&mut other, &theirs).unwrap();
        let again = super::saved::save(&mut other);
        assert_eq!((again.is_guest, again.vmxon), (saved.is_guest, saved.vmxon));
        let at = |saved: &SavedVmx| saved.current.as_ref().map(|c| (c.at, c.is_enlightened));
        assert_eq!(at(&again), at(&saved));
        // A vCPU without the interface takes none of it.
        let refused = super::saved::restore(&mut Vm::new(), &saved);
        assert_eq!(refused, Err(crate::vmx::RestoreError::Enlightened));
    }
    // L2 goes on: its exit is in the page.
    let saved = super::saved::save(&mut running);
    let mut other = Vm::enlightened();
    super::saved::restore(&mut other, &saved).unwrap();
    assert!(matches!(
        other.exit(BasicReason::Hlt, 0),
        Handled::L0 | Handled::L1(_)
    ));
    assert!(matches!(
        other.exit_to_l1(BasicReason::Cpuid, 0),
        Handled::L1(_) | Handled::Resume
    ));
    assert_eq!(other.clean(PAGE), 0xFFFF);
}

#[derive(Clone, Debug)]
enum Step {
    Page(usize, u8),
    Field(usize, u64),
    Clean(u32),
    Assist(u64, u8),
    Name(u64),
    Fill,
    Enter(bool),
    Exit(u16, u64),
    Instruction(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let pages = prop_oneof![Just(PAGE.0), Just(ANOTHER.0), Just(REGION.0), any::<u64>()];
    prop_oneof![
        2 => (0..evmcs::SIZE, any::<u8>()).prop_map(|(at, value)| Step::Page(at, value)),
        3 => (0..testudo_vmx::fields::FIELDS.len(), prop_oneof![any::<u64>(), 0u64..64, Just(u64::MAX)])
            .prop_map(|(field, value)| Step::Field(field, value)),
        2 => any::<u32>().prop_map(Step::Clean),
        1 => (0u64..64, any::<u8>()).prop_map(|(at, value)| Step::Assist(at, value)),
        1 => pages.clone().prop_map(Step::Name),
        3 => Just(Step::Fill),
        6 => any::<bool>().prop_map(Step::Enter),
        5 => (0u16..80, any::<u64>()).prop_map(|(reason, q)| Step::Exit(reason, q)),
        2 => ((0usize..13), pages).prop_map(|(which, value)| Step::Instruction(which, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Whatever L1 puts into the two pages, and whenever, L2 runs under L0's requirements.
    #[test]
    fn l2_runs_under_l0s_requirements(steps in prop::collection::vec(step(), 1..40)) {
        let mut vm = Vm::enlightened();
        let host = super::containment::untouchable(&vm);
        for step in steps {
            let guest = vm.nested.is_guest();
            match step {
                Step::Page(at, value) => vm.memory.write(Gpa(PAGE.0 + at as u64), &[value]).unwrap(),
                Step::Field(field, value) => {
                    let field = testudo_vmx::fields::FIELDS[field].encoding;
                    if place(field).is_some() {
                        vm.set_page(PAGE, field, value);
                        vm.set_clean(PAGE, 0);
                    }
                }
                Step::Clean(groups) => vm.set_clean(PAGE, groups),
                Step::Assist(at, value) => vm.memory.write(Gpa(ASSIST + at), &[value]).unwrap(),
                Step::Name(at) => vm.name(Gpa(at)),
                Step::Fill => {
                    vm.fill_page(PAGE);
                    vm.name(PAGE);
                }
                Step::Enter(launch) if !guest => {
                    vm.vmcs.l1.preset(fields::GUEST_INTERRUPTIBILITY, 0);
                    let which = if launch { Instruction::Vmlaunch } else { Instruction::Vmresume };
                    let _ = vm.reenter(which);
                }
                Step::Exit(reason, qualification) if guest => {
                    let _ = vm.exit(BasicReason::from_number(reason), qualification);
                }
                Step::Instruction(which, value) if !guest => {
                    vm.vmcs.l1.preset(fields::GUEST_CR3, 0x1000);
                    let _ = vm.pointer(Instruction::ALL[which], value);
                }
                _ => {}
            }
            if vm.nested.is_guest() {
                super::containment::assert_contained(&vm, &host);
            }
            // Two VMCSs are never there at once.
            let (current, active) = (vm.nested.current_vmcs(), vm.nested.active_enlightened_vmcs());
            prop_assert!(current.is_none() || active.is_none());
        }
    }
}
