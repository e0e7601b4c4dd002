//! APIC virtualization on a processor that delivers what the guest masks, against one that is as it ought to be.

use alloc::sync::Arc;
use std::cell::RefCell;
use std::rc::Rc;
use std::vec;

use testudo_arch::apic::{VectorRegister, VectorSet};
use testudo_arch::irq::{InterruptSink, Msi};
use testudo_vmx::caps::Basic;
use testudo_vmx::controls::PrimaryControls;

use super::*;
use crate::irq::Irqchip;

/// The revision by which the processor is known.
const BOCHS: u64 = 0x2B;
const IF: u64 = 1 << 9;

/// What happens in the guest's turn.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The guest sets or clears RFLAGS.IF.
    Enable(bool),
    /// It ends what it serves.
    End,
    /// It interrupts itself.
    SelfIpi(u8),
    /// The machine requests an interrupt, and interrupts the processor for it.
    Post(u8),
    /// The machine interrupts the processor for something else.
    Machine,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vector = || (2_u8..16, 0_u8..3).prop_map(|(class, low)| class << 4 | low);
    let step = prop_oneof![
        any::<bool>().prop_map(Step::Enable),
        Just(Step::End),
        vector().prop_map(Step::SelfIpi),
        vector().prop_map(Step::Post),
        Just(Step::Machine),
    ];
    proptest::collection::vec(step, 1..40)
}

/// The processor, as it goes through the steps.
struct Turns {
    steps: VecDeque<Step>,
    chip: Arc<Irqchip>,
    page: &'static ApicPage,
    /// An interrupt of the machine's has a pending one delivered first.
    defective: bool,
    delivered: Vec<u8>,
    exits_by_ends: u32,
}

impl Turns {
    fn requested(&self) -> VectorSet<'static> {
        self.page.vectors(VectorRegister::Irr)
    }

    fn serving(&self) -> VectorSet<'static> {
        self.page.vectors(VectorRegister::Isr)
    }

    /// What is recognized (SDM vol. 3C, 32.2.1).
    fn pending(vmcs: &FakeVmcs) -> Option<u8> {
        let [requesting, serving] = vmcs
            .image()
            .get(fields::GUEST_INTERRUPT_STATUS)
            .unwrap()
            .to_le_bytes();
        (requesting >> 4 > serving >> 4 && !window(vmcs)).then_some(requesting)
    }

    fn keep_status(&self, vmcs: &mut FakeVmcs) {
        // RVI and SVI are 0 where nothing is requested or in service (SDM vol. 3C, 27.4.2).
        let highest = |set: VectorSet<'_>| set.highest().map_or(0, u64::from);
        let status = highest(self.serving()) << 8 | highest(self.requested());
        vmcs.preset(fields::GUEST_INTERRUPT_STATUS, status);
    }

    fn deliver(&mut self, vector: u8, vmcs: &mut FakeVmcs) {
        self.requested().remove(vector);
        self.serving().insert(vector);
        self.keep_status(vmcs);
        self.delivered.push(vector);
        enable(vmcs, false);
    }

    /// At the boundary of an instruction: whether there is an exit.
    fn boundary(&mut self, vmcs: &mut FakeVmcs) -> bool {
        while is_enabled(vmcs) {
            if window(vmcs) {
                exit(vmcs, BasicReason::InterruptWindow, 0);
                return true;
            }
            let Some(vector) = Self::pending(vmcs) else {
                break;
            };
            self.deliver(vector, vmcs);
        }
        false
    }

    /// An external interrupt, which always exits.
    fn interrupt(&mut self, vmcs: &mut FakeVmcs) {
        if self.defective
            && let Some(vector) = Self::pending(vmcs)
        {
            assert!(is_enabled(vmcs), "{vector:#x} is delivered although masked");
            self.deliver(vector, vmcs);
        }
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    }

    /// Whether the step exits.
    fn step(&mut self, step: Step, vmcs: &mut FakeVmcs, registers: &mut GuestRegisters) -> bool {
        match step {
            Step::Enable(enabled) => enable(vmcs, enabled),
            Step::End => {
                if let Some(vector) = self.serving().highest() {
                    self.serving().remove(vector);
                    self.keep_status(vmcs);
                    let image = vmcs.image();
                    let bitmap = match vector >> 6 {
                        0 => image.get(fields::EOI_EXIT_BITMAP_0),
                        1 => image.get(fields::EOI_EXIT_BITMAP_1),
                        2 => image.get(fields::EOI_EXIT_BITMAP_2),
                        _ => image.get(fields::EOI_EXIT_BITMAP_3),
                    };
                    if bitmap.unwrap() & 1 << (vector & 63) != 0 {
                        self.exits_by_ends += 1;
                        exit(vmcs, BasicReason::VirtualizedEoi, vector.into());
                        return true;
                    }
                }
            }
            Step::SelfIpi(vector) => {
                let gprs = &mut registers.gprs;
                (gprs.rcx, gprs.rax, gprs.rdx) = (Msr::X2APIC_SELF_IPI.0.into(), vector.into(), 0);
                exit(vmcs, BasicReason::Wrmsr, 0);
                return true;
            }
            Step::Post(vector) => {
                self.chip.send_msi(Msi {
                    address: 0xFEE0_0000,
                    data: vector.into(),
                });
                self.interrupt(vmcs);
                return true;
            }
            Step::Machine => {
                self.interrupt(vmcs);
                return true;
            }
        }
        false
    }

    fn turn(&mut self, vmcs: &mut FakeVmcs, registers: &mut GuestRegisters) {
        while !self.boundary(vmcs) {
            let Some(step) = self.steps.pop_front() else {
                return exit(vmcs, BasicReason::TripleFault, 0);
            };
            if self.step(step, vmcs, registers) {
                return;
            }
        }
    }
}

fn window(vmcs: &FakeVmcs) -> bool {
    let primary = vmcs.image().get(fields::PRIMARY_CONTROLS).unwrap();
    primary & PrimaryControls::INTERRUPT_WINDOW_EXITING.bits() != 0
}

fn is_enabled(vmcs: &FakeVmcs) -> bool {
    vmcs.image().get(fields::GUEST_RFLAGS).unwrap() & IF != 0
}

fn enable(vmcs: &mut FakeVmcs, enabled: bool) {
    vmcs.preset(fields::GUEST_RFLAGS, if enabled { 2 | IF } else { 2 });
}

/// Goes through the steps on a processor with this revision: what was delivered, and the ends that exited.
fn deliver(steps: &[Step], revision: u64) -> (Vec<u8>, u32) {
    let (machine, mut lapic, _) = fake_machine::machine(ram(MEMORY));
    lapic.write_msr(Msr::APIC_BASE, 0xFEE0_0D00, || 0).unwrap();
    lapic.write_msr(Msr(0x80F), 0x1FF, || 0).unwrap();
    let mut caps = fixtures::skylake_sp();
    caps.basic = Basic(caps.basic.0 & !0x7FFF_FFFF | revision);
    let mut vcpu = apic::vcpu_with(&caps, &lapic);
    let turns = Rc::new(RefCell::new(Turns {
        steps: steps.iter().copied().collect(),
        chip: lapic.irqchip().clone(),
        page: vcpu.apic_page,
        defective: revision == BOCHS,
        delivered: Vec::new(),
        exits_by_ends: 0,
    }));
    // Its own exit, that of a window, and that of an end, for each.
    for _ in 0..=3 * steps.len() {
        let turns = turns.clone();
        vcpu.will(move |vmcs, registers| turns.borrow_mut().turn(vmcs, registers));
    }
    let start = BootState {
        system: SystemRegisters::reset(),
        gprs: Gprs::default(),
    };
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::TripleFault);
    let turns = turns.borrow();
    (turns.delivered.clone(), turns.exits_by_ends)
}

/// What a right processor delivers in the same steps.
fn right(steps: &[Step]) -> Vec<u8> {
    let (mut requested, mut serving) = (Vec::new(), Vec::new());
    let (mut delivered, mut enabled) = (Vec::new(), false);
    for step in steps {
        match *step {
            Step::Enable(now) => enabled = now,
            Step::End => {
                serving.sort_unstable();
                serving.pop();
            }
            Step::SelfIpi(vector) | Step::Post(vector) => {
                requested.push(vector);
                requested.sort_unstable();
                requested.dedup();
            }
            Step::Machine => {}
        }
        let served: u8 = serving.iter().max().map_or(0, |vector| vector >> 4);
        if enabled && requested.last().is_some_and(|vector| vector >> 4 > served) {
            let vector = requested.pop().unwrap();
            serving.push(vector);
            delivered.push(vector);
            enabled = false;
        }
    }
    delivered
}

proptest! {
    #[test]
    fn the_guest_is_delivered_what_a_right_processor_delivers(steps in steps()) {
        prop_assert_eq!(deliver(&steps, BOCHS).0, right(&steps));
        prop_assert_eq!(deliver(&steps, 1).0, right(&steps));
    }
}

#[test]
fn ends_exit_only_when_there_is_more_and_only_on_a_processor_with_the_defect() {
    use Step::*;
    let one = [Post(0x41), Enable(true), End, Enable(true)];
    assert_eq!(deliver(&one, BOCHS), (vec![0x41], 0));
    let two = [Post(0x31), Post(0x41), Enable(true), End, Enable(true)];
    assert_eq!(deliver(&two, BOCHS), (vec![0x41, 0x31], 1));
    assert_eq!(deliver(&two, 1), (vec![0x41, 0x31], 0));
}
