//! Virtual interrupts on a processor that delivers them although L2 masks interrupts, against one that is as it ought
//! to be.

use proptest::prelude::*;
use testudo_vmx::Defects;

use super::*;

/// The controls, as for [`Vm::ask_for_apic`]: a TPR shadow, virtual-interrupt delivery and the x2APIC mode.
const CONTROLS: u32 = 1 << 31 | 1 << 9 | 1 << 4;
const ENTERED: End = End::Other(Outcome::Entered { halted: false });

const WINDOW: u32 = 1 << 2;
const IF: u64 = 1 << 9;
const STI: u32 = 1;

/// The registers of a virtual local APIC that count, and what L2 had delivered.
#[derive(Clone, Debug, Default, PartialEq)]
struct Apic {
    requested: Vec<u8>,
    serving: Vec<u8>,
    delivered: Vec<u8>,
}

impl Apic {
    fn due(&self) -> Option<u8> {
        let vector = *self.requested.iter().max()?;
        let served = self.serving.iter().max().map_or(0, |v| v >> 4);
        (vector >> 4 > served).then_some(vector)
    }

    fn request(&mut self, vector: u8) {
        if !self.requested.contains(&vector) {
            self.requested.push(vector);
        }
    }

    fn deliver(&mut self, vector: u8) {
        self.requested.retain(|v| *v != vector);
        self.serving.push(vector);
        self.delivered.push(vector);
    }

    fn end(&mut self) -> Option<u8> {
        let vector = *self.serving.iter().max()?;
        self.serving.retain(|v| *v != vector);
        Some(vector)
    }

    fn status(&self) -> u64 {
        // RVI and SVI are 0 where nothing is requested or in service (SDM vol. 3C, 27.4.2).
        let highest = |list: &[u8]| u64::from(list.iter().max().copied().unwrap_or(0));
        highest(&self.serving) << 8 | highest(&self.requested)
    }
}

/// What happens in L2's turn, or between two.
#[derive(Clone, Debug)]
enum Step {
    /// L2 sets or clears RFLAGS.IF.
    Enable(bool),
    /// L2 ends what it serves.
    End,
    /// L2 interrupts itself.
    SelfIpi(u8),
    /// An interrupt of the machine's comes.
    Machine,
    /// L2 exits to L1, which requests an interrupt and enters it again.
    Request(u8),
    /// The same by a posted interrupt, without an exit.
    Post(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vector = || (2_u8..16, 0_u8..3).prop_map(|(class, low)| class << 4 | low);
    let step = prop_oneof![
        any::<bool>().prop_map(Step::Enable),
        Just(Step::End),
        vector().prop_map(Step::SelfIpi),
        Just(Step::Machine),
        vector().prop_map(Step::Request),
        vector().prop_map(Step::Post),
    ];
    proptest::collection::vec(step, 1..40)
}

/// L2 on such a processor.
struct Processor {
    vm: Vm,
    apic: Apic,
}

impl Processor {
    fn get<W: testudo_vmx::encoding::Width>(&self, field: testudo_vmx::Field<W>) -> W::Value {
        self.vm.vmcs.l2.get(field).unwrap()
    }

    fn is_enabled(&self) -> bool {
        self.get(fields::GUEST_RFLAGS) & IF != 0
    }

    fn keep_status(&mut self) {
        let status = self.apic.status();
        self.vm
            .vmcs
            .l2
            .preset(fields::GUEST_INTERRUPT_STATUS, status);
    }

    /// An exit that L1 must not see.
    fn exit(&mut self, reason: BasicReason, qualification: u64, expected: Handled) {
        self.keep_status();
        assert_eq!(self.vm.exit(reason, qualification), expected, "{reason:?}");
    }

    /// What is recognized.
    fn pending(&self) -> Option<u8> {
        // What L0 entered with, the processor counts on.
        assert_eq!(
            u64::from(self.get(fields::GUEST_INTERRUPT_STATUS)),
            self.apic.status()
        );
        let window = self.get(fields::PRIMARY_CONTROLS) & WINDOW != 0;
        self.apic.due().filter(|_| !window)
    }

    /// At the boundary of an instruction.
    fn boundary(&mut self) {
        while self.is_enabled() {
            if self.get(fields::PRIMARY_CONTROLS) & WINDOW != 0 {
                self.exit(BasicReason::InterruptWindow, 0, Handled::Resume);
                // It does not exit for ever.
                assert_eq!(self.get(fields::PRIMARY_CONTROLS) & WINDOW, 0);
            } else if let Some(vector) = self.pending() {
                self.deliver(vector);
            } else {
                return;
            }
        }
    }

    fn deliver(&mut self, vector: u8) {
        self.apic.deliver(vector);
        self.keep_status();
        self.enable(false);
    }

    fn enable(&mut self, enabled: bool) {
        let rflags = if enabled { 2 | IF } else { 2 };
        self.vm.vmcs.l2.preset(fields::GUEST_RFLAGS, rflags);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Enable(enabled) => self.enable(enabled),
            Step::End => {
                if let Some(vector) = self.apic.end() {
                    self.keep_status();
                    let bitmap = [
                        self.get(fields::EOI_EXIT_BITMAP_0),
                        self.get(fields::EOI_EXIT_BITMAP_1),
                        self.get(fields::EOI_EXIT_BITMAP_2),
                        self.get(fields::EOI_EXIT_BITMAP_3),
                    ];
                    if bitmap[usize::from(vector / 64)] & 1 << (vector % 64) != 0 {
                        self.exit(BasicReason::VirtualizedEoi, vector.into(), Handled::Resume);
                    }
                }
            }
            Step::SelfIpi(vector) => {
                let bitmap = self.vm.nested.msr_bitmap.as_bytes();
                if bitmap[0x800 + 0x83F / 8] & 1 << (0x83F % 8) != 0 {
                    self.vm.gprs.rcx = 0x83F;
                    self.vm.gprs.rax = vector.into();
                    self.vm.gprs.rdx = 0;
                    let rip = self.get(fields::GUEST_RIP);
                    self.vm.vmcs.l2.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
                    self.exit(BasicReason::Wrmsr, 0, Handled::Resume);
                    // It has been done for it.
                    assert_eq!(self.get(fields::GUEST_RIP), rip + 2);
                    self.apic.request(vector);
                } else {
                    self.apic.request(vector);
                    self.keep_status();
                }
            }
            Step::Machine => match self.pending() {
                // The defect.
                Some(vector) => {
                    assert!(
                        self.is_enabled(),
                        "{vector:#x} is delivered although masked"
                    );
                    self.deliver(vector);
                }
                None => self.exit(BasicReason::ExternalInterrupt, 0, Handled::L0),
            },
            Step::Request(vector) => {
                self.keep_status();
                let handled = self.vm.exit(BasicReason::Cpuid, 0);
                assert!(matches!(handled, Handled::L1(_)));
                assert_eq!(
                    self.vm.get12(fields::GUEST_INTERRUPT_STATUS),
                    self.apic.status()
                );
                self.apic.request(vector);
                self.vm.gprs.rbx = self.apic.status();
                let field = fields::GUEST_INTERRUPT_STATUS.encoding().0;
                let end = self.vm.field(Instruction::Vmwrite, field.into());
                assert_eq!(end, End::Succeed);
                assert_eq!(self.vm.run(Instruction::Vmresume), ENTERED);
            }
            Step::Post(vector) => {
                let (index, bit) = (u64::from(vector / 64), vector % 64);
                let at = Gpa(DESCRIPTOR + 8 * index);
                self.vm.memory.store_u64(at, 1 << bit).unwrap();
                self.apic.request(vector);
                let taken = self
                    .vm
                    .call(|nested, cx| nested.take_notification(NOTIFICATION, cx));
                let due = self.is_enabled() && self.apic.due().is_some();
                assert_eq!(taken, Ok(crate::vmx::Posted::Taken { due }));
            }
        }
        self.boundary();
    }
}

const DESCRIPTOR: u64 = 0x7_0000;
const NOTIFICATION: u8 = 0xF2;

/// What a right processor does in the same steps.
fn right(steps: &[Step]) -> Apic {
    let mut apic = Apic::default();
    let mut enabled = false;
    for step in steps {
        match *step {
            Step::Enable(now) => enabled = now,
            Step::End => {
                apic.end();
            }
            Step::SelfIpi(vector) | Step::Request(vector) | Step::Post(vector) => {
                apic.request(vector);
            }
            Step::Machine => {}
        }
        if enabled && let Some(vector) = apic.due() {
            apic.deliver(vector);
            enabled = false;
        }
    }
    apic
}

/// With interrupts off, and with posted ones.
fn begin() -> Processor {
    let mut vm = Vm::ready();
    vm.nested.defects = Defects::DELIVERS_MASKED_VIRTUAL_INTERRUPTS;
    vm.ask_for_apic(CONTROLS, 0);
    let pin = testudo_vmx::controls::PinControls::PROCESS_POSTED_INTERRUPTS;
    vm.set12(
        fields::PIN_CONTROLS,
        vm.get12(fields::PIN_CONTROLS) | u64::from(pin.bits()),
    );
    let acknowledge = testudo_vmx::controls::ExitControls::ACKNOWLEDGE_INTERRUPT;
    vm.set12(
        fields::EXIT_CONTROLS,
        vm.get12(fields::EXIT_CONTROLS) | u64::from(acknowledge.bits()),
    );
    vm.set12(
        fields::POSTED_INTERRUPT_NOTIFICATION_VECTOR,
        NOTIFICATION.into(),
    );
    vm.set12(fields::POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, DESCRIPTOR);
    vm.set12(fields::GUEST_RFLAGS, 2);
    vm.memory.write(Gpa(L1_BITMAP), &[0; 4096]).unwrap();
    assert_eq!(vm.run(Instruction::Vmlaunch), ENTERED);
    Processor {
        vm,
        apic: Apic::default(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn l2_is_delivered_what_a_right_processor_delivers(steps in steps()) {
        let mut processor = begin();
        for step in &steps {
            processor.step(step);
        }
        prop_assert_eq!(processor.apic, right(&steps));
    }
}

#[test]
fn what_l2_masks_is_held_back_while_it_masks_it() {
    let mut processor = begin();
    processor.step(&Step::Request(0xF3));
    assert_eq!(processor.get(fields::PRIMARY_CONTROLS) & WINDOW, WINDOW);
    // A shadow of STI masks it too.
    processor.enable(true);
    processor
        .vm
        .vmcs
        .l2
        .preset(fields::GUEST_INTERRUPTIBILITY, STI.into());
    processor.exit(BasicReason::InterruptWindow, 0, Handled::Resume);
    assert_eq!(processor.get(fields::PRIMARY_CONTROLS) & WINDOW, WINDOW);
    processor
        .vm
        .vmcs
        .l2
        .preset(fields::GUEST_INTERRUPTIBILITY, 0);
    processor.boundary();
    assert_eq!(processor.apic.delivered, [0xF3]);
    // With nothing requested, L1's own controls are back.
    assert_eq!(processor.get(fields::PRIMARY_CONTROLS) & WINDOW, 0);
    processor.step(&Step::End);
    assert_eq!(processor.get(fields::EOI_EXIT_BITMAP_3), 0);
}

#[test]
fn a_processor_without_the_defect_holds_nothing_back() {
    let mut processor = begin();
    processor.vm.nested.defects = Defects::empty();
    processor.step(&Step::Request(0xF3));
    assert_eq!(processor.get(fields::PRIMARY_CONTROLS) & WINDOW, 0);
    assert_eq!(processor.get(fields::EOI_EXIT_BITMAP_3), 0);
    processor.step(&Step::Request(0x31));
    assert!(processor.vm.nested.settled.is_some());
}

#[test]
fn an_interrupt_to_itself_is_requested_and_what_is_none_is_left_to_the_processor() {
    let exits = |processor: &Processor| {
        let bitmap = processor.vm.nested.msr_bitmap.as_bytes();
        bitmap[0x800 + 0x83F / 8] & 1 << (0x83F % 8) != 0
    };
    let write = |value: u64, rflags: u64| {
        let mut processor = begin();
        assert!(exits(&processor));
        let gprs = &mut processor.vm.gprs;
        (gprs.rcx, gprs.rax, gprs.rdx) = (0x83F, value & 0xFFFF_FFFF, value >> 32);
        processor.vm.vmcs.l2.preset(fields::GUEST_RFLAGS, rflags);
        let rip = processor.get(fields::GUEST_RIP);
        processor
            .vm
            .vmcs
            .l2
            .preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
        processor.exit(BasicReason::Wrmsr, 0, Handled::Resume);
        (processor.get(fields::GUEST_RIP) - rip, processor)
    };
    let (moved, processor) = write(0xF3, 2);
    let page = Gpa(processor.vm.get12(fields::VIRTUAL_APIC_ADDRESS));
    let word = |offset| processor.vm.memory.load_u32(page.wrapping_add(offset));
    assert_eq!((moved, exits(&processor)), (2, true));
    assert_eq!(word(0x270), Ok(1 << 19));
    assert_eq!(word(0x3F0), Ok(0xF3));
    assert_eq!(processor.get(fields::GUEST_INTERRUPT_STATUS), 0xF3);
    for (value, rflags) in [
        (0x1F3, 2),
        (1 << 32 | 0xF3, 2),
        (0xF, 2),
        (0xF3, 2 | 1 << 8),
    ] {
        let (moved, processor) = write(value, rflags);
        assert_eq!((moved, exits(&processor)), (0, false), "{value:#x}");
        assert_eq!(processor.get(fields::GUEST_INTERRUPT_STATUS), 0);
    }
}
