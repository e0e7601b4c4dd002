//! A hypervisor as the guest, over the processor that is none. The validator looks at every entry of
//! its guest, too.

use testudo_arch::{Gpr, Msr};
use testudo_nested::vmx::{EptFault, EptHandled, Offer, REVISION, enlightened_vmcs, offer};
use testudo_vmx::caps::Basic;
use testudo_vmx::controls::{ExitControls, PinControls};

use super::*;
use crate::emulate::linear::StageAccess;
use crate::vcpu::NestedStateError;

pub(super) const TABLES: u64 = 0x1000;
const OPERAND: u64 = 0x7000;
const VMXON_REGION: u64 = 0x8000;
const REGION: u64 = 0x9000;
const SHADOW: u64 = 0xB000;
pub(super) const VMXE: u64 = 1 << 13;
pub(super) const NE: u64 = 1 << 5;
/// Where L1 goes on when its guest has exited.
pub(super) const HOST_RIP: u64 = 0xFFFF_8000_0000_1000;
/// What every script ends with: an interrupt of the host's.
const HOST: VmExit = VmExit::Interrupted;

/// A page of L2's that L1 does not let it write to.
pub(super) const READ_ONLY: u64 = 0xD000;

/// A second stage under which nothing of L2's memory is mapped: it is a page further in L1's.
#[derive(Debug, Default)]
pub(super) struct Shifted {
    /// Where L1's memory lies; `None` if it has none.
    pub(super) frames: Option<u64>,
}

impl SecondStage for Shifted {
    fn activate(&mut self, _: u64) -> Option<u64> {
        Some(0x4000 | 3 << 3 | 6)
    }

    fn flush(&mut self, _: Option<u64>) {}

    fn fault(&mut self, fault: EptFault) -> EptHandled {
        match self.translate(fault.gpa, fault.qualification & 2 != 0) {
            Some(gpa) => EptHandled::Host(gpa),
            None => EptHandled::Violation(fault.qualification),
        }
    }

    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        let allowed = !write || gpa.0 >> 12 != READ_ONLY >> 12;
        allowed.then(|| gpa.wrapping_add(0x1000))
    }

    fn frame(&mut self, page: Gpa) -> Option<Hpa> {
        Some(Hpa(self.frames? + page.0))
    }
}

pub(super) type Hypervisor = VmxVcpu<'static, FakeProcessor, GuestRam, Shifted>;

/// A vCPU whose guest is in 64-bit mode, outside VMX operation.
pub(super) fn hypervisor() -> Hypervisor {
    hypervisor_with(false)
}

/// As [`hypervisor`], with a shadow VMCS or without.
fn hypervisor_with(shadow: bool) -> Hypervisor {
    hypervisor_in(prepared_memory(), shadow, false)
}

/// L1's memory, with its page tables and regions in it.
pub(super) fn prepared_memory() -> &'static GuestRam {
    let memory: &GuestRam = Box::leak(Box::new(ram(0x1_0000)));
    prepare_memory(memory);
    memory
}

/// Puts them there.
pub(super) fn prepare_memory(memory: &GuestRam) {
    for (at, entry) in [
        (TABLES, TABLES + 0x1003),
        (TABLES + 0x1000, TABLES + 0x2003),
        (TABLES + 0x2000, 0x83),
    ] {
        memory.store_u64(Gpa(at), entry).unwrap();
    }
    for region in [VMXON_REGION, REGION] {
        memory.store_u32(Gpa(region), REVISION).unwrap();
    }
}

/// As [`hypervisor_with`], in this memory, and with enlightened VMCSs or without.
fn hypervisor_in(memory: &'static GuestRam, shadow: bool, enlightened: bool) -> Hypervisor {
    hypervisor_on(fixtures::skylake_sp(), memory, shadow, enlightened)
}

/// As [`hypervisor_in`], on a processor with these capabilities.
pub(super) fn hypervisor_on(
    caps: VmxCaps,
    memory: &'static GuestRam,
    shadow: bool,
    enlightened: bool,
) -> Hypervisor {
    hypervisor_by(caps, memory, (shadow, enlightened), None)
}

/// As [`hypervisor_on`], with its own local APIC virtualized by these tables or not.
pub(super) fn hypervisor_by(
    caps: VmxCaps,
    memory: &'static GuestRam,
    (shadow, enlightened): (bool, bool),
    apic: Option<ApicTables>,
) -> Hypervisor {
    let caps: &'static VmxCaps = Box::leak(Box::new(caps));
    let controls: &Controls =
        Box::leak(Box::new(Controls::choose(caps).unwrap().for_hypervisors()));
    let tables: &VmxTables = Box::leak(Box::new(tables_with(apic)));
    let parts = parts(caps, controls, tables);
    let mut vcpu: Hypervisor = VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap();
    vcpu.processor.has_shadow = shadow;
    let all = Offer {
        ept: true,
        vpid: true,
        apic: true,
        enlightened,
    };
    let parts = nested_parts(caps, all, controls, tables);
    vcpu.nest(parts, shadow.then_some(Hpa(SHADOW))).unwrap();
    let mut system = SystemRegisters::reset();
    system.cr3 = TABLES;
    vcpu.set_system(&system);
    vcpu.guest_enters_long_mode();
    vcpu.advance();
    vcpu.guest_moves_to(0, 0x8000_0011 | NE);
    vcpu.guest_moves_to(4, 0x20 | VMXE);
    vcpu
}

/// What makes a vCPU a hypervisor's that is offered this.
pub(super) fn nested_parts(
    caps: &VmxCaps,
    wanted: Offer,
    controls: &'static Controls,
    tables: &'static VmxTables,
) -> NestedParts<'static, Shifted> {
    NestedParts {
        caps: offer(caps, caps.processor, wanted),
        enlightened: wanted.enlightened,
        vpid: 2,
        controls,
        tables,
        l1_msr_bitmap: Box::leak(Box::new(MsrBitmap::all_exit())),
        msr_bitmap: (Box::new(MsrBitmap::all_exit()), Hpa(0x5000)),
        shadowing: Some(ShadowBitmaps {
            reads: Hpa(0x6000),
            writes: Hpa(0x7000),
        }),
        stage: Shifted::default(),
        flusher: Flusher::default(),
        has_predictor_barrier: false,
    }
}

impl Hypervisor {
    /// L1 executes a VMX instruction whose operand is a pointer in memory.
    pub(super) fn l1_points(&mut self, reason: BasicReason, pointer: u64) {
        self.memory.store_u64(Gpa(OPERAND), pointer).unwrap();
        self.will(move |vmcs, _| {
            // DS, no base, no index, 64-bit addresses: the displacement is the address.
            let information = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27;
            vmcs.preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
            exit(vmcs, reason, OPERAND);
        });
        self.run_out();
    }

    /// L1 executes VMREAD or VMWRITE of the field in RAX, with RBX.
    fn l1_accesses(&mut self, reason: BasicReason, field: Encoding, value: u64) -> u64 {
        self.will(move |vmcs, registers| {
            registers.gprs.rax = field.0.into();
            registers.gprs.rbx = value;
            let information = 1 << 10 | (Gpr::Rbx as u64) << 3 | (Gpr::Rax as u64) << 28;
            vmcs.preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
            exit(vmcs, reason, 0);
        });
        self.run_out();
        assert_eq!(self.cached(Cached::Rflags) & 0x8D5, 0, "{field}");
        self.gprs().rbx
    }

    pub(super) fn vmwrite(&mut self, field: impl Into<Encoding>, value: u64) {
        self.l1_accesses(BasicReason::Vmwrite, field.into(), value);
    }

    pub(super) fn vmread(&mut self, field: impl Into<Encoding>) -> u64 {
        self.l1_accesses(BasicReason::Vmread, field.into(), 0)
    }

    /// In VMX operation, with a current VMCS that can be entered, by these additional controls.
    fn prepared(pin: PinControls, exit: ExitControls) -> Self {
        hypervisor().with_vmcs(pin, exit)
    }

    /// As [`Self::prepared`].
    pub(super) fn with_vmcs(self, pin: PinControls, exit: ExitControls) -> Self {
        let mut vcpu = self;
        vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
        vcpu.l1_points(BasicReason::Vmclear, REGION);
        vcpu.l1_points(BasicReason::Vmptrld, REGION);
        let caps = vcpu.nested.as_ref().unwrap().state.caps().clone();
        let model = samples::valid(&caps);
        for (field, value) in model.iter() {
            let exists = field.info().is_some_and(|info| info.exists(&caps));
            if exists && field.area() != Area::ExitInformation {
                vcpu.vmwrite(field, value);
            }
        }
        vcpu.vmwrite(fields::HOST_RIP, HOST_RIP);
        vcpu.vmwrite(fields::HOST_CR3, TABLES);
        let words = [
            (fields::PIN_CONTROLS, pin.bits()),
            (fields::EXIT_CONTROLS, exit.bits()),
        ];
        for (field, bits) in words {
            let old = model.get(field).unwrap();
            vcpu.vmwrite(field, u64::from(old | bits));
        }
        vcpu
    }

    /// Has L2 run on EPT of L1's.
    pub(super) fn gives_ept(&mut self) {
        let caps = self.nested.as_ref().unwrap().state.caps().clone();
        let mut model = samples::valid(&caps);
        assert!(samples::enable_ept(&mut model, &caps).unwrap());
        for field in [
            fields::PRIMARY_CONTROLS.encoding(),
            fields::SECONDARY_CONTROLS.encoding(),
            fields::EPT_POINTER.encoding(),
        ] {
            self.vmwrite(field, model.read_raw(field).unwrap());
        }
    }

    pub(super) fn launch(&mut self) {
        self.will_exit(BasicReason::Vmlaunch, 0);
        self.run_out();
        assert_eq!(self.level, Level::L2);
        assert_eq!(self.processor.level, Level::L2);
    }

    fn running(pin: PinControls, exit: ExitControls) -> Self {
        let mut vcpu = Self::prepared(pin, exit);
        vcpu.launch();
        vcpu
    }

    /// L1 runs, after its guest exited for this reason.
    pub(super) fn assert_exited(&mut self, reason: BasicReason) {
        assert_eq!((self.level, self.processor.level), (Level::L1, Level::L1));
        assert_eq!(self.rip(), HOST_RIP);
        self.run_out();
        assert_eq!(self.vmread(fields::EXIT_REASON), u64::from(reason.number()));
    }
}

pub(super) const NO_PIN: PinControls = PinControls::empty();
pub(super) const NO_EXIT: ExitControls = ExitControls::empty();

#[test]
fn a_guest_of_the_guest_runs_and_exits_to_it() {
    let mut vcpu = Hypervisor::prepared(NO_PIN, NO_EXIT);
    vcpu.vmwrite(fields::GUEST_RSP, 0x6000);
    vcpu.vmwrite(fields::HOST_RSP, 0x5000);
    vcpu.launch();
    vcpu.load_rsp();
    assert_eq!(vcpu.gprs().rsp, 0x6000);
    // CPUID is L1's affair, though L0 answers it for L1.
    vcpu.will(|vmcs, registers| {
        registers.gprs.rcx = 7;
        vmcs.preset(fields::GUEST_RIP, 0x1234);
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    vcpu.run_out();
    vcpu.assert_exited(BasicReason::Cpuid);
    assert_eq!((vcpu.gprs().rcx, vcpu.gprs().rsp), (7, 0x5000));
    assert_eq!(vcpu.vmread(fields::GUEST_RIP), 0x1234);
    assert_eq!(vcpu.vmread(fields::EXIT_INSTRUCTION_LENGTH), 2);
    // L1's own CPUID is its own.
    vcpu.will_exit(BasicReason::Cpuid, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    // An MSR that L1 leaves to L2 without a bitmap exits to it all the same, and HLT does not.
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    vcpu.will_exit(BasicReason::Hlt, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Halt);
    vcpu.advance();
    assert_eq!((vcpu.level, vcpu.rip()), (Level::L2, 0x1236));
    vcpu.will_exit(BasicReason::Rdmsr, 0);
    vcpu.run_out();
    vcpu.assert_exited(BasicReason::Rdmsr);
}

#[test]
fn interrupts_end_the_turn_of_a_guest_whose_hypervisor_wants_them() {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING | PinControls::NMI_EXITING;
    // Acknowledged: the machine takes the vector from its local APIC, and L1 finds it in its VMCS.
    let mut vcpu = Hypervisor::running(pin, ExitControls::ACKNOWLEDGE_INTERRUPT);
    assert!(vcpu.can_take_interrupt(), "whatever L2's IF is");
    vcpu.inject(Event::Interrupt(0x31));
    assert!(vcpu.take_interrupted());
    assert!(!vcpu.can_take_interrupt(), "L1's IF is clear");
    vcpu.assert_exited(BasicReason::ExternalInterrupt);
    let information = fields::EXIT_INTERRUPTION_INFORMATION;
    assert_eq!(vcpu.vmread(information), 0x8000_0031);
    // Not acknowledged: it stays pending, and L1 is told without a vector.
    let mut vcpu = Hypervisor::running(pin, NO_EXIT);
    assert!(!vcpu.can_take_interrupt());
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert!(vcpu.take_interrupted());
    let windows = PrimaryControls::from_bits_retain(vcpu.hardware(fields::PRIMARY_CONTROLS));
    assert!(windows.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING));
    vcpu.assert_exited(BasicReason::ExternalInterrupt);
    assert_eq!(vcpu.vmread(information), 0);
    // One that the task priority holds back does not end the turn.
    let mut vcpu = Hypervisor::running(pin, NO_EXIT);
    vcpu.set_task_priority(4);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x41)));
    assert_eq!(vcpu.level, Level::L2);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x51)));
    assert_eq!(vcpu.level, Level::L1);
    // NMIs.
    let mut vcpu = Hypervisor::running(pin, NO_EXIT);
    assert!(vcpu.can_take_nmi());
    vcpu.inject(Event::Nmi);
    assert!(!vcpu.can_take_nmi(), "L1 handles one");
    vcpu.assert_exited(BasicReason::ExceptionOrNmi);
    assert_eq!(vcpu.vmread(information), 0x8000_0202);
}

/// Bochs masks them by the RFLAGS.IF of an entry: a guest of L1's that waited with interrupts off kept its
/// processor for ever, and L1 waited for its answer to an IPI.
#[test]
fn where_interrupts_do_not_end_l2s_turn_the_timer_does() {
    let mut caps = fixtures::skylake_sp();
    caps.basic = Basic((caps.basic.0 & !0x7FFF_FFFF) | 0x2B);
    let vcpu = hypervisor_on(caps, prepared_memory(), false, false);
    let mut vcpu = vcpu.with_vmcs(NO_PIN, NO_EXIT);
    vcpu.launch();
    for _ in 0..2 {
        let pin = PinControls::from_bits_retain(vcpu.hardware(fields::PIN_CONTROLS));
        assert!(pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER));
        assert_ne!(vcpu.hardware(fields::PREEMPTION_TIMER_VALUE), 0);
        vcpu.will_exit(BasicReason::PreemptionTimer, 0);
        assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
        assert_eq!(vcpu.level, Level::L2);
    }
    // Other processors do without.
    let vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    let pin = PinControls::from_bits_retain(vcpu.hardware(fields::PIN_CONTROLS));
    assert!(!pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER));
}

#[test]
fn interrupts_that_the_hypervisor_leaves_to_its_guest_are_delivered_there() {
    let mut vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    assert!(!vcpu.can_take_interrupt(), "L2's IF is clear");
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        exit(vmcs, BasicReason::InterruptWindow, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert!(vcpu.can_take_interrupt());
    vcpu.inject(Event::Interrupt(0x77));
    assert_eq!(vcpu.level, Level::L2);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0077);
}

#[test]
fn an_init_waits_for_a_hypervisor_and_ends_its_guests_turn() {
    use crate::vcpu::InitSignal;
    let mut vcpu = hypervisor();
    assert_eq!(vcpu.init_signal(), InitSignal::Resets);
    // In root operation it waits: for VMXOFF,
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    assert_eq!(vcpu.init_signal(), InitSignal::Waits);
    vcpu.will_exit(BasicReason::Vmxoff, 0);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(vcpu.init_signal(), InitSignal::Resets);
    // or for an entry, whose event is delivered first.
    let mut vcpu = Hypervisor::prepared(NO_PIN, NO_EXIT);
    vcpu.vmwrite(fields::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0306);
    assert_eq!(vcpu.init_signal(), InitSignal::Waits);
    vcpu.will_exit(BasicReason::Vmlaunch, 0);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(vcpu.init_signal(), InitSignal::Waits);
    assert_eq!(vcpu.enter_once(), VmExit::DeliveryDue);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0306);
    assert_eq!(vcpu.init_signal(), InitSignal::Exits);
    assert!(vcpu.take_interrupted());
    vcpu.assert_exited(BasicReason::Init);
    // It is over with the exit; nothing waits any more.
    vcpu.will_exit(BasicReason::Vmxoff, 0);
    vcpu.run_out();
    assert_eq!(vcpu.init_signal(), InitSignal::Resets);
}

#[test]
fn a_halted_guest_is_halted_still_when_an_interrupt_ends_its_turn() {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING;
    let mut vcpu = Hypervisor::running(pin, NO_EXIT);
    vcpu.will_exit(BasicReason::Hlt, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Halt);
    vcpu.advance();
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert!(vcpu.take_interrupted());
    vcpu.assert_exited(BasicReason::ExternalInterrupt);
    assert_eq!(vcpu.vmread(fields::GUEST_ACTIVITY_STATE), 1);
    // It goes on waiting.
    vcpu.set_interrupt_window(None);
    vcpu.will_exit(BasicReason::Vmresume, 0);
    assert_eq!(vcpu.enter_once(), VmExit::EnteredHalted);
}

/// An event that L1 injects is delivered before an interrupt ends L2's turn.
#[test]
fn what_l1_injects_is_delivered_first() {
    let pin = PinControls::EXTERNAL_INTERRUPT_EXITING;
    let mut vcpu = Hypervisor::prepared(pin, ExitControls::ACKNOWLEDGE_INTERRUPT);
    vcpu.vmwrite(fields::ENTRY_INTERRUPTION_INFORMATION, 0x8000_0306);
    // The interrupt came while L1 had interrupts off.
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    vcpu.will_exit(BasicReason::Vmlaunch, 0);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert!(!vcpu.can_take_interrupt());
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert_eq!(vcpu.enter_once(), VmExit::DeliveryDue);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0306);
    assert_eq!(vcpu.level, Level::L2);
    assert!(vcpu.can_take_interrupt(), "now it may");
    vcpu.inject(Event::Interrupt(0x31));
    vcpu.assert_exited(BasicReason::ExternalInterrupt);
    assert_eq!(vcpu.vmread(fields::IDT_VECTORING_INFORMATION), 0);
}

#[test]
fn a_guest_may_change_the_control_registers_that_its_hypervisor_leaves_to_it() {
    const PGE: u64 = 1 << 7;
    const DE: u64 = 1 << 3;
    let mut vcpu = Hypervisor::prepared(NO_PIN, NO_EXIT);
    let cr4 = vcpu.vmread(fields::GUEST_CR4);
    // L1 owns DE, and shows it set.
    vcpu.vmwrite(fields::CR4_GUEST_HOST_MASK, DE);
    vcpu.vmwrite(fields::CR4_READ_SHADOW, DE);
    vcpu.launch();
    assert_eq!(vcpu.cr4(), cr4);
    vcpu.guest_moves_to(4, cr4 | DE | PGE);
    assert_eq!(vcpu.level, Level::L2);
    assert_eq!(vcpu.cr4(), cr4 | PGE);
    assert_eq!(
        vcpu.hardware(fields::CR4_READ_SHADOW) & (DE | PGE),
        DE | PGE
    );
    assert_eq!(vcpu.hardware(fields::GUEST_CR4) & (DE | PGE), PGE);
    // Clearing what VMX fixes, or setting what does not exist, is refused.
    for bad in [cr4 & !VMXE | DE, cr4 | DE | 1 << 62] {
        vcpu.guest_moves_to(4, bad);
        assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "{bad:#x}");
    }
    vcpu.guest_moves_to(0, vcpu.system().cr0 & !NE);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
    // A change of DE is L1's to see.
    vcpu.will(move |vmcs, registers| {
        registers.gprs.rbx = cr4;
        exit(vmcs, BasicReason::ControlRegister, 4 | 3 << 8);
    });
    vcpu.run_out();
    vcpu.assert_exited(BasicReason::ControlRegister);
    assert_eq!(vcpu.vmread(fields::GUEST_CR4), cr4 | PGE);
}

#[test]
fn the_task_priority_of_a_guest_without_one_is_its_hypervisors() {
    let mut vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    for (value, taken) in [(9, true), (16, false)] {
        vcpu.will(move |vmcs, registers| {
            registers.gprs.rbx = value;
            exit(vmcs, BasicReason::ControlRegister, 8 | 3 << 8);
        });
        if taken {
            assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
        } else {
            vcpu.run_out();
            assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
        }
        assert_eq!(vcpu.task_priority(), 9);
    }
    vcpu.will_exit(BasicReason::ControlRegister, 8 | 1 << 4 | 3 << 8);
    vcpu.run_out();
    assert_eq!(vcpu.gprs().rbx, 9);
}

#[test]
fn vmx_operation_holds_l1s_control_registers() {
    let mut vcpu = hypervisor();
    // Outside, CR4.VMXE comes and goes, and without it VMXON does not exist.
    vcpu.guest_moves_to(4, 0x20);
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    assert_eq!(vcpu.last_injected(), 0x8000_0306);
    vcpu.guest_moves_to(4, 0x20 | VMXE);
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    for (register, value) in [(4, 0x20), (0, 0x8000_0011)] {
        vcpu.guest_moves_to(register, value);
        assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "CR{register}");
    }
    assert_eq!(vcpu.cr4(), 0x20 | VMXE);
    vcpu.will_exit(BasicReason::Vmxoff, 0);
    vcpu.run_out();
    vcpu.guest_moves_to(4, 0x20);
    assert_eq!(vcpu.cr4(), 0x20);
}

#[test]
fn the_capabilities_can_be_read_and_not_written() {
    let mut vcpu = hypervisor();
    assert_eq!(vcpu.read_msr(Msr::FEATURE_CONTROL), Some(5));
    assert_eq!(
        vcpu.read_msr(Msr::VMX_BASIC).map(|basic| basic as u32),
        Some(REVISION)
    );
    for msr in [Msr::FEATURE_CONTROL, Msr::VMX_BASIC] {
        assert_eq!(vcpu.write_msr(msr, 5), Some(false), "{msr}");
    }
    let may = vcpu.read_msr(Msr::VMX_CR4_FIXED1).unwrap();
    assert_eq!(
        may & (VMXE | 1 << 23),
        VMXE,
        "what L1 is not shown stays off"
    );
}

#[test]
fn a_machine_check_ends_l2s_run_whatever_l1_put_into_cr4() {
    const MCE: u64 = 1 << 6;
    let mut vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    assert_ne!(vcpu.hardware(fields::GUEST_CR4) & MCE, 0);
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_ne!(vcpu.hardware(fields::GUEST_CR4) & MCE, 0);
    assert_eq!(vcpu.cr4() & MCE, 0);
}

#[test]
fn a_device_that_l2_reaches_is_named_by_l1s_address() {
    let mut vcpu = Hypervisor::prepared(NO_PIN, NO_EXIT);
    vcpu.gives_ept();
    vcpu.launch();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0xFEE0_0010);
        exit(vmcs, BasicReason::EptViolation, 2);
    });
    assert_eq!(
        vcpu.enter_once(),
        VmExit::Memory(MemoryAccess {
            gpa: Gpa(0xFEE0_1010),
            gva: None,
            write: true,
            fetch: false,
            table: false,
        })
    );
    let read = StageAccess {
        linear: Gva(0),
        write: false,
        fetch: false,
        table: false,
    };
    assert_eq!(vcpu.translate(Gpa(0x4000), &read), Some(Gpa(0x5000)));
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_eq!(vcpu.translate(Gpa(0x4000), &read), Some(Gpa(0x4000)));
}

/// The bitmaps name what L1 reads and writes; the rest still exits.
#[test]
fn vmread_and_vmwrite_reach_a_shadow_while_a_vmcs_is_current() {
    let shadowing = SecondaryControls::VMCS_SHADOWING.bits();
    let state = |vcpu: &Hypervisor| {
        let on = vcpu.hardware(fields::SECONDARY_CONTROLS) & shadowing != 0;
        (on, vcpu.hardware(fields::VMCS_LINK_POINTER))
    };
    let mut vcpu = hypervisor_with(true);
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    assert_eq!(state(&vcpu), (false, u64::MAX));
    vcpu.l1_points(BasicReason::Vmclear, REGION);
    vcpu.l1_points(BasicReason::Vmptrld, REGION);
    assert_eq!(state(&vcpu), (true, SHADOW));
    assert_eq!(vcpu.hardware(fields::VMREAD_BITMAP_ADDRESS), 0x6000);
    assert_eq!(vcpu.hardware(fields::VMWRITE_BITMAP_ADDRESS), 0x7000);
    // The processor writes a field into the shadow, and others by exits; both are in the region after
    // VMCLEAR, and come back.
    vcpu.processor.select(Level::Shadow).unwrap();
    vcpu.processor.set(fields::GUEST_RIP, 0x1234_5678).unwrap();
    vcpu.processor.select(Level::L1).unwrap();
    vcpu.vmwrite(fields::GUEST_DS_BASE, 0x77);
    vcpu.l1_points(BasicReason::Vmclear, REGION);
    assert_eq!(state(&vcpu), (false, u64::MAX));
    vcpu.l1_points(BasicReason::Vmptrld, REGION);
    assert_eq!(vcpu.vmread(fields::GUEST_DS_BASE), 0x77);
    vcpu.processor.select(Level::Shadow).unwrap();
    assert_eq!(vcpu.processor.get(fields::GUEST_RIP), Ok(0x1234_5678));
    vcpu.processor.select(Level::L1).unwrap();
    vcpu.will_exit(BasicReason::Vmxoff, 0);
    vcpu.run_out();
    assert_eq!(state(&vcpu), (false, u64::MAX));
    // A processor without it runs L1 as before.
    let mut vcpu = hypervisor();
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    vcpu.l1_points(BasicReason::Vmclear, REGION);
    vcpu.l1_points(BasicReason::Vmptrld, REGION);
    assert_eq!(state(&vcpu), (false, u64::MAX));
}

/// A guest inside the guest's guest migrates: what the nested layer has of it goes as bytes into another
/// vCPU on the same memory, which has only ever been at its reset.
#[test]
fn l2_goes_on_in_another_vcpu() {
    let mut vcpu = Hypervisor::prepared(NO_PIN, NO_EXIT);
    vcpu.vmwrite(fields::HOST_RSP, 0x5000);
    vcpu.vmwrite(fields::GUEST_GS_BASE, 0x4_0000);
    vcpu.launch();
    // L2 has come on, and an event is on its way into it.
    vcpu.will(|vmcs, registers| {
        registers.gprs.rdx = 0x99;
        vmcs.preset(fields::GUEST_RIP, 0x1234);
        vmcs.preset(fields::GUEST_RSP, 0x6780);
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        exit(vmcs, BasicReason::InterruptWindow, 0);
    });
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    vcpu.inject(Event::Interrupt(0x77));
    let saved = vcpu.save_nested().unwrap().unwrap();
    let memory = vcpu.memory.inner();
    let gprs = *vcpu.gprs();
    drop(vcpu);

    let mut vcpu = hypervisor_in(memory, false, false);
    assert_eq!(vcpu.restore_nested(&saved), Ok(true));
    *vcpu.gprs_mut() = gprs;
    assert_eq!((vcpu.level, vcpu.processor.level), (Level::L2, Level::L2));
    assert_eq!((vcpu.rip(), vcpu.system().gs.base), (0x1234, 0x4_0000));
    vcpu.load_rsp();
    assert_eq!(vcpu.gprs().rsp, 0x6780);
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    // The last entry was L1's, the one before it L2's.
    let [.., injected, _] = *vcpu.processor.injected else {
        panic!("two entries");
    };
    assert_eq!(injected, 0x8000_0077);
    vcpu.assert_exited(BasicReason::Cpuid);
    assert_eq!((vcpu.gprs().rdx, vcpu.gprs().rsp), (0x99, 0x5000));
    assert_eq!(vcpu.vmread(fields::GUEST_RIP), 0x1234);
    assert_eq!(vcpu.vmread(fields::GUEST_RSP), 0x6780);
    // L1 goes on with it, and it moves once more while L1 runs.
    let saved = vcpu.save_nested().unwrap().unwrap();
    let mut vcpu = hypervisor_in(memory, false, false);
    assert_eq!(vcpu.restore_nested(&saved), Ok(false));
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.rip()), (Level::L2, 0x1234));
    // No such state for a vCPU that is no hypervisor's, and none that is damaged.
    let mut bad = saved.clone();
    bad[8] = 0xFF;
    let refused = vcpu.restore_nested(&bad);
    assert!(matches!(refused, Err(NestedStateError::Vmx(_))));
}

#[test]
fn an_enlightened_entry_ends_shadowing() {
    const ASSIST: u64 = 0xC000;
    const PAGE: u64 = 0xD000;
    let assist_page = Msr(0x4000_0073);
    assert_eq!(hypervisor().read_msr(assist_page), None);
    let mut vcpu = hypervisor_in(prepared_memory(), true, true);
    let shadowing = SecondaryControls::VMCS_SHADOWING.bits();
    vcpu.l1_points(BasicReason::Vmxon, VMXON_REGION);
    vcpu.l1_points(BasicReason::Vmclear, REGION);
    vcpu.l1_points(BasicReason::Vmptrld, REGION);
    assert_ne!(vcpu.hardware(fields::SECONDARY_CONTROLS) & shadowing, 0);
    assert_eq!(vcpu.write_msr(assist_page, ASSIST | 1), Some(true));
    assert_eq!(vcpu.read_msr(assist_page), Some(ASSIST | 1));
    assert_eq!(vcpu.write_msr(assist_page, 1 << 40 | 1), Some(false));
    let caps = vcpu.nested.as_ref().unwrap().state.caps().clone();
    let mut image = samples::valid(&caps);
    image.set(fields::HOST_RIP, HOST_RIP).unwrap();
    image.set(fields::HOST_CR3, TABLES).unwrap();
    let memory = vcpu.memory.inner();
    memory.write(Gpa(PAGE), &enlightened_vmcs(&image)).unwrap();
    memory.write(Gpa(ASSIST + 40), &[1]).unwrap();
    memory.store_u64(Gpa(ASSIST + 48), PAGE).unwrap();
    vcpu.launch();
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.run_out();
    assert_eq!((vcpu.level, vcpu.rip()), (Level::L1, HOST_RIP));
    assert_eq!(vcpu.hardware(fields::SECONDARY_CONTROLS) & shadowing, 0);
    assert_eq!(vcpu.hardware(fields::VMCS_LINK_POINTER), u64::MAX);
    // The reason is in the page.
    let reason = memory.load_u32(Gpa(PAGE + 692)).unwrap();
    assert_eq!(reason, u32::from(BasicReason::Cpuid.number()));
    vcpu.l1_points(BasicReason::Vmptrld, REGION);
    assert_ne!(vcpu.hardware(fields::SECONDARY_CONTROLS) & shadowing, 0);
}

#[test]
fn a_reset_ends_it_all() {
    let mut vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    vcpu.reset();
    assert_eq!((vcpu.level, vcpu.processor.level), (Level::L1, Level::L1));
    vcpu.run_out();
    assert_eq!(vcpu.system(), SystemRegisters::reset());
    // VMRESUME is #UD outside VMX operation.
    vcpu.will_exit(BasicReason::Vmresume, 0);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0306);
}

#[test]
fn requests_keep_l2_out_as_well() {
    let mut vcpu = Hypervisor::running(NO_PIN, NO_EXIT);
    let entries = vcpu.processor.vmcs.counts();
    assert_eq!(vcpu.run(&AtomicU32::new(1)), Ok(HOST));
    assert_eq!(vcpu.processor.vmcs.counts(), entries);
}
