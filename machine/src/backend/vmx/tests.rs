//! The backend over a processor that is none: a fake VMCS, exits by script, and at every entry the
//! validator in place of the processor's own checks.

use core::sync::atomic::AtomicU32;
use std::boxed::Box;
use std::collections::VecDeque;
use std::string::ToString;
use std::vec::Vec;

use proptest::prelude::*;
use testudo_arch::cpuid::{Cpuid, CpuidEntry};
use testudo_arch::memory::GuestRam;
use testudo_arch::{Exception, Gpa, Gprs, Gva, Msr};
use testudo_nested::vmx::Msrs;
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::fixtures;
use testudo_vmx::check::{Rule, check_entry, samples};
use testudo_vmx::controls::SecondaryControls;
use testudo_vmx::encoding::Area;
use testudo_vmx::fake::FakeVmcs;
use testudo_vmx::{Encoding, InstructionError, VmFail, VmcsRead, VmcsWrite};

mod apic;
mod nested;
mod nested_shadow;
mod shadow;
mod timer;

use super::mode::LME;
use super::*;
use crate::boot::BootState;
use crate::irq::fake::FakeHost;
use crate::vcpu::{MemoryAccess, PortAccess, VmExit};
use crate::{Machine, MachineConfig, StopReason, VcpuLoop};

type Script = Box<dyn FnOnce(&mut FakeVmcs, &mut GuestRegisters)>;

/// A processor that exits as the script says.
struct FakeProcessor {
    /// The VMCS that is current, whose it is, and the others.
    vmcs: FakeVmcs,
    level: Level,
    others: [FakeVmcs; 3],
    has_shadow: bool,
    caps: VmxCaps,
    exits: VecDeque<Script>,
    /// VMREADs and VMWRITEs between the last exit and each entry.
    costs: Vec<(usize, usize)>,
    /// The interruption information of each entry.
    injected: Vec<u32>,
    nmis: u32,
    machine_checks: u32,
    interrupts: u32,
    flushes: u32,
    dr6: u64,
    xcr0: u64,
    tsc: u64,
}

impl FakeProcessor {
    fn new(caps: &VmxCaps) -> Self {
        let mut vmcs = FakeVmcs::with_caps(caps);
        let model = samples::valid(caps);
        for field in fields::FIELDS {
            if field.encoding.area() == Area::Host {
                vmcs.preset(field.encoding, model.read_raw(field.encoding).unwrap());
            }
        }
        Self {
            others: core::array::from_fn(|_| vmcs.clone()),
            has_shadow: false,
            vmcs,
            level: Level::L1,
            caps: caps.clone(),
            exits: VecDeque::new(),
            costs: Vec::new(),
            injected: Vec::new(),
            nmis: 0,
            machine_checks: 0,
            interrupts: 0,
            flushes: 0,
            dr6: 0,
            xcr0: 1,
            tsc: 0,
        }
    }
}

impl VmcsRead for FakeProcessor {
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        self.vmcs.read_raw(field)
    }
}

impl VmcsWrite for FakeProcessor {
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        self.vmcs.write_raw(field, value)
    }
}

/// A processor that keeps no MSRs of the guest's.
struct NoMsrs;

impl Msrs for NoMsrs {
    fn read(&mut self, _: Msr) -> Option<u64> {
        None
    }

    fn write(&mut self, _: Msr, _: u64) -> bool {
        false
    }
}

#[allow(unsafe_code, reason = "the trait's, without hardware")]
impl Processor for FakeProcessor {
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        self.costs.push(self.vmcs.counts());
        self.vmcs.clear_trace();
        let violations = check_entry(self.vmcs.image(), &self.caps).unwrap();
        if !violations.is_empty() {
            return Err(VmFail::Valid(InstructionError::InvalidControlField));
        }
        let information = fields::ENTRY_INTERRUPTION_INFORMATION;
        let injected = self.vmcs.image().get(information).unwrap();
        self.injected.push(injected);
        // "Bit 31 is cleared on every VM exit" (SDM vol. 3C, 27.8.3).
        self.vmcs
            .preset(information, u64::from(injected & 0x7FFF_FFFF));
        self.vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0);
        let script = self.exits.pop_front().expect("an exit is scripted");
        script(&mut self.vmcs, registers);
        Ok(())
    }

    fn take_pending(&mut self) {
        self.interrupts += 1;
    }

    fn take_nmi(&mut self) {
        self.nmis += 1;
    }

    fn take_machine_check(&mut self) {
        self.machine_checks += 1;
    }

    fn forget_translations(&mut self, _: Level) -> Result<(), VmFail> {
        self.flushes += 1;
        Ok(())
    }

    fn forget_ept(&mut self) -> Result<(), VmFail> {
        self.flushes += 1;
        Ok(())
    }

    type GuestMsrs = NoMsrs;

    fn guest_msrs(&self) -> NoMsrs {
        NoMsrs
    }

    fn select(&mut self, level: Level) -> Result<(), VmFail> {
        let (from, to) = (self.level as usize, level as usize);
        core::mem::swap(&mut self.vmcs, &mut self.others[from]);
        core::mem::swap(&mut self.vmcs, &mut self.others[to]);
        self.level = level;
        Ok(())
    }

    fn has_shadow(&self) -> bool {
        self.has_shadow
    }

    unsafe fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
    }

    unsafe fn pkru(&self) -> u32 {
        0x55
    }

    fn tsc(&self) -> u64 {
        self.tsc
    }

    fn dr6(&self) -> u64 {
        self.dr6
    }

    fn set_dr6(&mut self, value: u64) {
        self.dr6 = value;
    }
}

/// Guest memory at 0.
fn ram(bytes: usize) -> GuestRam {
    let words = Box::leak(std::vec![0u64; bytes / 8].into_boxed_slice());
    let mut ram = GuestRam::new();
    // SAFETY: the words are leaked, and nobody else's.
    #[allow(unsafe_code, reason = "guest memory over the test's own")]
    unsafe { ram.add(Gpa(0), words.as_mut_ptr().cast(), bytes as u64, true) }.unwrap();
    ram
}

type Fake = VmxVcpu<'static, FakeProcessor, GuestRam>;

fn vcpu_on(caps: &VmxCaps) -> Fake {
    let caps: &'static VmxCaps = Box::leak(Box::new(caps.clone()));
    let controls = Box::leak(Box::new(Controls::choose(caps).unwrap()));
    let tables = Box::leak(Box::new(VmxTables {
        ept_pointer: 0x1000 | 3 << 3 | 6,
        msr_bitmap: Hpa(0x2000),
        apic: None,
    }));
    let parts = Parts {
        caps,
        controls,
        tables,
        apic_page: (Box::leak(Box::default()), Hpa(0x3000)),
        vpid: 1,
        xcr0_valid: 7,
        shadow: None,
        gate: None,
        switched: None,
    };
    let memory = Box::leak(Box::new(ram(0x2000)));
    VmxVcpu::on(FakeProcessor::new(caps), &parts, memory).unwrap()
}

fn vcpu() -> Fake {
    vcpu_on(&fixtures::skylake_sp())
}

impl<S: SecondStage> VmxVcpu<'static, FakeProcessor, GuestRam, S> {
    fn will(&mut self, script: impl FnOnce(&mut FakeVmcs, &mut GuestRegisters) + 'static) {
        self.processor.exits.push_back(Box::new(script));
    }

    /// Scripts an exit by an instruction of two bytes.
    fn will_exit(&mut self, reason: BasicReason, qualification: u64) {
        self.will(move |vmcs, _| exit(vmcs, reason, qualification));
    }

    fn enter_once(&mut self) -> VmExit {
        self.run(&AtomicU32::new(0)).unwrap()
    }

    /// Runs until the scripted exits are used up; the last leads to an interrupt of the host.
    fn run_out(&mut self) {
        self.will_exit(BasicReason::ExternalInterrupt, 0);
        assert_eq!(self.enter_once(), VmExit::Interrupted);
    }

    fn cost(&self) -> (usize, usize) {
        *self.processor.costs.last().unwrap()
    }

    fn last_injected(&self) -> u32 {
        *self.processor.injected.last().unwrap()
    }

    fn hardware<W: encoding::Width>(&self, field: Field<W>) -> W::Value {
        self.processor.vmcs.image().get(field).unwrap()
    }

    /// The guest executes MOV to a control register.
    fn guest_moves_to(&mut self, register: u8, value: u64) {
        self.will(move |vmcs, registers| {
            registers.gprs.rbx = value;
            exit(
                vmcs,
                BasicReason::ControlRegister,
                u64::from(register) | 3 << 8,
            );
        });
        self.run_out();
    }

    /// From reset to 64-bit mode, as kernels do it.
    fn guest_enters_long_mode(&mut self) {
        self.guest_moves_to(4, 0x20);
        assert_eq!(self.write_msr(Msr::EFER, LME), Some(true));
        self.guest_moves_to(0, 0x8000_0011);
        assert_eq!(self.system().efer, LME | LMA);
        // The far jump.
        self.will(|vmcs, _| {
            vmcs.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xA09B);
            exit(vmcs, BasicReason::Cpuid, 0);
        });
        assert_eq!(self.enter_once(), VmExit::Cpuid);
    }
}

fn exit(vmcs: &mut FakeVmcs, reason: BasicReason, qualification: u64) {
    vmcs.preset(fields::EXIT_REASON, reason.number().into());
    vmcs.preset(fields::EXIT_QUALIFICATION, qualification);
    vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 2);
}

fn exception(vmcs: &mut FakeVmcs, information: u32, qualification: u64) {
    exit(vmcs, BasicReason::ExceptionOrNmi, qualification);
    vmcs.preset(fields::EXIT_INTERRUPTION_INFORMATION, information.into());
}

#[test]
fn every_processor_that_suits_enters_the_reset_state() {
    for (name, caps) in fixtures::all() {
        match Controls::choose(&caps) {
            Ok(_) => {
                let mut vcpu = vcpu_on(&caps);
                vcpu.run_out();
                assert_eq!(vcpu.system(), SystemRegisters::reset(), "{name}");
            }
            Err(error) => assert_eq!(name, "nehalem", "{error}"),
        }
    }
}

#[test]
fn what_a_processor_lacks_is_named() {
    let error = Controls::choose(&fixtures::nehalem()).unwrap_err();
    assert!(error.to_string().contains("UNRESTRICTED_GUEST"), "{error}");
    let mut caps = fixtures::skylake_sp();
    caps.ept_vpid -= testudo_vmx::caps::EptVpidCaps::INVEPT_ALL;
    let error = Controls::choose(&caps).unwrap_err();
    assert!(error.to_string().contains("INVEPT_ALL"), "{error}");
    let mut caps = fixtures::skylake_sp();
    caps.ept_vpid -= testudo_vmx::caps::EptVpidCaps::INVVPID_ALL;
    let controls = Controls::choose(&caps).unwrap();
    assert!(!controls.secondary.contains(SecondaryControls::ENABLE_VPID));
    assert_eq!(controls.flush(&caps, 1), None);
}

/// The machine's part of a CPUID exit.
fn answer_cpuid(vcpu: &mut Fake) {
    let _ = (vcpu.gprs().rax, vcpu.cr4());
    vcpu.gprs_mut().rax = 7;
    vcpu.advance();
}

#[test]
fn cpuid_costs_three_reads_and_one_write() {
    let mut vcpu = vcpu();
    vcpu.will_exit(BasicReason::Cpuid, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    answer_cpuid(&mut vcpu);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (3, 1));
    assert_eq!(vcpu.hardware(fields::GUEST_RIP), 0xFFF2);
}

#[test]
fn what_the_other_hot_exits_cost() {
    let costs = [
        (BasicReason::Rdmsr, 0, (4, 1)),
        (BasicReason::Wrmsr, 0, (4, 1)),
        (BasicReason::Vmcall, 0, (4, 1)),
        (BasicReason::Hlt, 0, (4, 1)),
        (BasicReason::Io, 0x03F8_0000, (5, 1)),
    ];
    for (reason, qualification, cost) in costs {
        let mut vcpu = vcpu();
        vcpu.will_exit(reason, qualification);
        vcpu.enter_once();
        vcpu.advance();
        vcpu.run_out();
        assert_eq!(vcpu.cost(), cost, "{reason}");
    }
    for (reason, exit, reads) in [
        (
            BasicReason::ApicWrite,
            VmExit::ApicWrite { register: 0x380 },
            3,
        ),
        (BasicReason::VirtualizedEoi, VmExit::EndOfInterrupt(0x80), 2),
    ] {
        let mut vcpu = vcpu();
        vcpu.will_exit(reason, 0x380);
        assert_eq!(vcpu.enter_once(), exit);
        vcpu.run_out();
        assert_eq!(vcpu.cost(), (reads, 0), "{reason}");
    }
    let mut vcpu = vcpu();
    vcpu.will_exit(BasicReason::PreemptionTimer, 0);
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 1));
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 0));
    assert_eq!(vcpu.processor.interrupts, 2);
    vcpu.set_rflags(0x202);
    vcpu.run_out();
    assert!(vcpu.can_take_interrupt());
    vcpu.inject(Event::Interrupt(0x31));
    assert!(!vcpu.can_take_interrupt());
    vcpu.set_interrupt_window(None);
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (3, 1));
    assert_eq!(vcpu.last_injected(), 0x8000_0031);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() >> 31, 0, "delivered once");
}

#[test]
fn a_step_over_an_emulated_instruction_leaves_its_trap_pending() {
    let mut vcpu = vcpu();
    vcpu.set_rflags(0x102);
    vcpu.single_step();
    vcpu.will(|vmcs, _| {
        let pending = vmcs.image().get(fields::GUEST_PENDING_DEBUG).unwrap();
        assert_eq!(pending, PendingDebug::BS.bits());
        exception(vmcs, 0x8000_0301, PendingDebug::BS.bits());
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() & 0xFF, 1, "#DB");
    assert_ne!(vcpu.processor.dr6 & 1 << 14, 0, "BS");
}

#[test]
fn a_guest_reads_directly_what_the_processor_keeps_for_it() {
    let mut bitmap = MsrBitmap::all_exit();
    open_direct_msrs(&mut bitmap);
    for msr in [Msr::DEBUG_CTL, Msr::TSC] {
        assert!(!bitmap.read_exits(msr) && bitmap.write_exits(msr), "{msr}");
    }
    assert!(!bitmap.write_exits(Msr::LSTAR) && bitmap.read_exits(Msr::EFER));
    // What RDMSR finds.
    let mut vcpu = vcpu();
    vcpu.set_guest_tsc(1000, 5000);
    assert_eq!(vcpu.hardware(fields::TSC_OFFSET), 4000);
    assert_eq!(vcpu.hardware(fields::GUEST_DEBUGCTL), 0);
}

#[test]
fn requests_keep_the_guest_out() {
    let mut vcpu = vcpu();
    assert_eq!(vcpu.run(&AtomicU32::new(1)), Ok(VmExit::Interrupted));
    assert!(vcpu.processor.costs.is_empty());
}

#[test]
fn rsp_is_read_and_written_on_demand() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RSP, 0x7000);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.cost(), (1, 0));
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0x7000);
    vcpu.load_rsp();
    assert_eq!(vcpu.gprs().rsp, 0x7000);
    vcpu.gprs_mut().rsp -= 8;
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0x6FF8);
    // A reset sets it, whatever it was when somebody last looked.
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RSP, 0x9000);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.reset();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_RSP), 0);
}

#[test]
fn a_guest_reaches_64_bit_mode_and_leaves_it() {
    let mut vcpu = vcpu();
    // A 16-bit TSS, which IA-32e mode cannot be entered with by a VM entry.
    vcpu.processor
        .set(fields::GUEST_TR_ACCESS_RIGHTS, 0x83)
        .unwrap();
    vcpu.guest_enters_long_mode();
    assert_eq!(vcpu.hardware(fields::GUEST_TR_ACCESS_RIGHTS), 0x8B);
    let entry = EntryControls::from_bits_retain(vcpu.hardware(fields::ENTRY_CONTROLS));
    assert!(entry.contains(EntryControls::IA32E_MODE_GUEST));
    vcpu.advance();
    vcpu.run_out();
    // From 64-bit code paging cannot be switched off; from compatibility mode it can.
    vcpu.guest_moves_to(0, 0x11);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    vcpu.guest_moves_to(0, 0x11);
    assert_eq!((vcpu.system().efer, vcpu.system().cr0), (LME, 0x11));
    let entry = EntryControls::from_bits_retain(vcpu.hardware(fields::ENTRY_CONTROLS));
    assert!(!entry.contains(EntryControls::IA32E_MODE_GUEST));
}

#[test]
fn caching_stays_on_whatever_the_guest_says() {
    let mut vcpu = vcpu();
    let cr0 = vcpu.hardware(fields::GUEST_CR0);
    assert_eq!(cr0 & 0x6000_0020, 0x20, "NE is VMX's, CD and NW are off");
    assert_eq!(vcpu.system().cr0, 0x6000_0010);
    vcpu.guest_moves_to(0, 0x4000_0011);
    assert_eq!(vcpu.system().cr0, 0x4000_0011);
    assert_eq!(vcpu.hardware(fields::CR0_READ_SHADOW), 0x4000_0011);
    assert_eq!(vcpu.hardware(fields::GUEST_CR0), 0x31);
    vcpu.guest_moves_to(0, 0x2000_0011);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "NW without CD");
    assert_eq!(vcpu.system().cr0, 0x4000_0011);
}

#[test]
fn what_the_guest_owns_of_cr0_is_read_where_it_is() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        // The guest set TS, MP and PE by itself.
        vmcs.preset(fields::GUEST_CR0, 0x3B);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    assert_eq!(vcpu.system().cr0, 0x6000_001B);
    // EFER's change keeps them.
    assert_eq!(vcpu.write_msr(Msr::EFER, 1), Some(true));
    assert_eq!(vcpu.hardware(fields::GUEST_CR0), 0x3B);
}

#[test]
fn pae_paging_loads_the_directory_pointers() {
    let mut vcpu = vcpu();
    for (i, entry) in [0x2001u64, 0x3001, 0, 0x4001].into_iter().enumerate() {
        vcpu.memory
            .store_u64(Gpa(0x1000 + 8 * i as u64), entry)
            .unwrap();
    }
    vcpu.processor.set(fields::GUEST_CR3, 0x1000).unwrap();
    vcpu.guest_moves_to(4, 0x20);
    let before = vcpu.processor.flushes;
    vcpu.guest_moves_to(0, 0x8000_0011);
    assert_eq!(vcpu.hardware(fields::GUEST_PDPTE1), 0x3001);
    assert_eq!(vcpu.processor.flushes, before + 1);
    vcpu.memory.store_u64(Gpa(0x1008), 0x3007).unwrap();
    vcpu.guest_moves_to(4, 0xA0);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D, "reserved bits");
    assert_eq!(vcpu.hardware(fields::GUEST_PDPTE1), 0x3001);
    assert_eq!(vcpu.cr4(), 0x20);
    // Where there is no memory the pointers are all ones.
    vcpu.processor.set(fields::GUEST_CR3, 0x10_0000).unwrap();
    vcpu.guest_moves_to(4, 0xA0);
    assert_eq!(vcpu.last_injected(), 0x8000_0B0D);
}

#[test]
fn cr4_takes_what_the_guest_may_have() {
    let mut vcpu = vcpu();
    vcpu.guest_moves_to(4, 0x30_0620);
    assert_eq!(vcpu.cr4(), 0x30_0620);
    let hardware = vcpu.hardware(fields::GUEST_CR4);
    assert_eq!(hardware, 0x30_0620 | 1 << 13 | 1 << 6, "VMXE and MCE");
    for refused in [1u64 << 13, 1 << 14, 1 << 17, 1 << 23, 1 << 31] {
        vcpu.guest_moves_to(4, refused);
        assert_eq!(vcpu.last_injected(), 0x8000_030D, "{refused:#x}");
    }
    assert_eq!(vcpu.cr4(), 0x30_0620);
}

#[test]
fn the_window_follows_the_task_priority() {
    let window = |vcpu: &Fake| {
        let primary = PrimaryControls::from_bits_retain(vcpu.hardware(fields::PRIMARY_CONTROLS));
        let exiting = primary.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        (exiting, vcpu.hardware(fields::TPR_THRESHOLD))
    };
    let mut vcpu = vcpu();
    vcpu.set_task_priority(5);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x51)));
    assert_eq!(window(&vcpu), (false, 5));
    vcpu.run_out();
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x61)));
    assert_eq!(window(&vcpu), (true, 0));
    vcpu.run_out();
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::Vector(0x31)));
    assert_eq!(window(&vcpu), (false, 3));
    // A threshold above the priority would make the entry fail.
    vcpu.set_task_priority(2);
    assert_eq!(window(&vcpu), (true, 0));
    vcpu.run_out();
    vcpu.will_exit(BasicReason::InterruptWindow, 0);
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert_eq!(window(&vcpu), (false, 0));
    vcpu.set_task_priority(15);
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    assert_eq!(window(&vcpu), (true, 0));
}

#[test]
fn a_shadow_of_sti_ends_with_the_instruction() {
    let sti = |vmcs: &mut FakeVmcs| {
        vmcs.preset(fields::GUEST_RFLAGS, 0x202);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1);
        exit(vmcs, BasicReason::Hlt, 0);
    };
    let mut vcpu = vcpu();
    vcpu.will(move |vmcs, _| sti(vmcs));
    assert_eq!(vcpu.enter_once(), VmExit::Halt);
    assert!(!vcpu.can_take_interrupt(), "STI shadows HLT");
    vcpu.advance();
    assert!(vcpu.can_take_interrupt());
    vcpu.inject(Event::Interrupt(0x20));
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
    // With an open window it ends without being asked for.
    vcpu.set_interrupt_window(Some(AwaitedInterrupt::External));
    vcpu.will(move |vmcs, _| {
        sti(vmcs);
        exit(vmcs, BasicReason::Cpuid, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::Cpuid);
    answer_cpuid(&mut vcpu);
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn single_steps_and_rf_end_as_on_a_processor() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_RFLAGS, 0x1_0102);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 2);
        exit(vmcs, BasicReason::Rdmsr, 0);
    });
    vcpu.enter_once();
    vcpu.advance();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
    assert_eq!(vcpu.hardware(fields::GUEST_RFLAGS), 0x102);
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
    // Now that stepping was seen, CPUID takes part in it.
    vcpu.processor.vmcs.preset(fields::GUEST_PENDING_DEBUG, 0);
    vcpu.will_exit(BasicReason::Cpuid, 0);
    vcpu.enter_once();
    answer_cpuid(&mut vcpu);
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
    vcpu.processor.vmcs.preset(fields::GUEST_PENDING_DEBUG, 0);
    // It ends with TF.
    for cost in [(4, 1), (3, 1)] {
        vcpu.will(|vmcs, _| {
            vmcs.preset(fields::GUEST_RFLAGS, 2);
            exit(vmcs, BasicReason::Cpuid, 0);
        });
        vcpu.enter_once();
        answer_cpuid(&mut vcpu);
        vcpu.run_out();
        assert_eq!(vcpu.cost(), cost);
    }
}

#[test]
fn debug_exceptions_reach_the_guest_with_their_registers() {
    let mut vcpu = vcpu();
    vcpu.processor.dr6 = 0xFFFF_0FF1;
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_DR7, 0x2400);
        vmcs.preset(fields::GUEST_RFLAGS, 0x302);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1);
        exception(vmcs, 0x8000_0301, 1 << 14);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0301);
    assert_eq!(vcpu.processor.dr6, 0xFFFF_4FF0);
    assert_eq!(vcpu.hardware(fields::GUEST_DR7), 0x400);
    // The processor demands it in a shadow with TF.
    assert_eq!(vcpu.hardware(fields::GUEST_PENDING_DEBUG), 1 << 14);
}

#[test]
fn int1_and_alignment_checks_go_back_as_they_were() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        exception(vmcs, 0x8000_0501, 0);
        vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 1);
    });
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0501);
    assert_eq!(vcpu.hardware(fields::ENTRY_INSTRUCTION_LENGTH), 1);
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.guest_moves_to(0, 0x11);
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0B11, 0));
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0B11);
    assert_eq!(vcpu.hardware(fields::ENTRY_EXCEPTION_ERROR_CODE), 0);
}

#[test]
fn an_exception_that_meets_another_may_be_a_double_fault() {
    let meet = |first: Exception, second: u32| {
        let mut vcpu = vcpu();
        vcpu.guest_moves_to(0, 0x11);
        vcpu.will(move |vmcs, _| {
            exception(vmcs, 0x8000_0B00 | second, 0);
            let first = 0x8000_0B00 | u64::from(first.vector());
            vmcs.preset(fields::IDT_VECTORING_INFORMATION, first);
        });
        vcpu.will_exit(BasicReason::ExternalInterrupt, 0);
        let exit = vcpu.enter_once();
        (exit, *vcpu.processor.injected.last().unwrap())
    };
    use Exception as E;
    assert_eq!(meet(E::PageFault, 13), (VmExit::Interrupted, 0x8000_0B08));
    assert_eq!(meet(E::PageFault, 17), (VmExit::Interrupted, 0x8000_0B11));
    assert_eq!(meet(E::DoubleFault, 13).0, VmExit::Shutdown);
}

#[test]
fn an_interrupted_event_is_delivered_again() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        exit(vmcs, BasicReason::EptViolation, 0x181);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0xFEE0_0000);
        vmcs.preset(fields::GUEST_LINEAR_ADDRESS, 0x1234);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0480);
    });
    let read = MemoryAccess {
        gpa: Gpa(0xFEE0_0000),
        gva: Some(Gva(0x1234)),
        write: false,
        fetch: false,
        table: false,
    };
    assert_eq!(vcpu.enter_once(), VmExit::Memory(read));
    assert!(!vcpu.can_take_interrupt() && !vcpu.can_take_nmi());
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0480);
    assert_eq!(vcpu.hardware(fields::ENTRY_INSTRUCTION_LENGTH), 2);
    // An NMI blocks NMIs when its delivery begins, and must not be injected while they are.
    vcpu.will(|vmcs, _| {
        exit(vmcs, BasicReason::EptViolation, 0x181);
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 8);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0202);
    });
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_0202);
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 0);
}

#[test]
fn nmis_and_machine_checks_are_the_hosts() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0202, 0));
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    vcpu.will(|vmcs, _| exception(vmcs, 0x8000_0312, 0));
    assert_eq!(vcpu.enter_once(), VmExit::Interrupted);
    assert_eq!((vcpu.processor.nmis, vcpu.processor.machine_checks), (1, 1));
    vcpu.run_out();
    assert_eq!(vcpu.last_injected() >> 31, 0);
}

#[test]
fn guest_nmis_wait_for_the_iret() {
    let mut vcpu = vcpu();
    assert!(vcpu.can_take_nmi());
    vcpu.inject(Event::Nmi);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 8);
        exit(vmcs, BasicReason::ExternalInterrupt, 0);
    });
    vcpu.enter_once();
    assert_eq!(vcpu.last_injected(), 0x8000_0202);
    assert!(!vcpu.can_take_nmi());
    vcpu.set_nmi_window(true);
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 0);
        exit(vmcs, BasicReason::NmiWindow, 0);
    });
    assert_eq!(vcpu.enter_once(), VmExit::InterruptWindow);
    assert!(vcpu.can_take_nmi());
    vcpu.run_out();
    let primary = PrimaryControls::from_bits_retain(vcpu.hardware(fields::PRIMARY_CONTROLS));
    assert!(!primary.contains(PrimaryControls::NMI_WINDOW_EXITING));
}

#[test]
fn an_iret_that_faults_leaves_nmis_blocked() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| exit(vmcs, BasicReason::EptViolation, 0x1182));
    vcpu.enter_once();
    vcpu.run_out();
    assert_eq!(vcpu.hardware(fields::GUEST_INTERRUPTIBILITY), 8);
}

#[test]
fn real_mode_has_no_error_codes() {
    let mut vcpu = vcpu();
    vcpu.inject(Event::GP0);
    vcpu.run_out();
    assert_eq!(vcpu.last_injected(), 0x8000_030D);
}

#[test]
fn a_failed_access_keeps_the_guest_out() {
    let mut vcpu = vcpu();
    vcpu.run_out();
    vcpu.processor
        .vmcs
        .fail(fields::GUEST_CS_BASE, VmFail::Invalid);
    assert_eq!(vcpu.system(), SystemRegisters::default());
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "VMREAD of GUEST_CS_BASE: VMfailInvalid: no current VMCS, or one that this instruction cannot use"
    );
}

#[test]
fn a_refused_entry_names_the_rule() {
    let mut vcpu = vcpu();
    vcpu.set_rflags(0);
    let VcpuError::VmEntry(refusal) = vcpu.run(&AtomicU32::new(0)).unwrap_err() else {
        panic!("no refusal");
    };
    assert_eq!(refusal.violation.unwrap().rule, Rule::RflagsReserved);
    let text = refusal.to_string();
    assert!(
        text.contains("VM entry with invalid control field(s) (error 7)"),
        "{text}"
    );
    assert!(text.ends_with("but GUEST_RFLAGS is 0x0"), "{text}");
    // The processor itself finds it after the checks of controls.
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::EXIT_REASON, 0x8000_0021);
        vmcs.preset(fields::VMCS_LINK_POINTER, 1);
    });
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    assert!(error.contains("invalid guest state"), "{error}");
    assert!(error.contains("VMCS_LINK_POINTER is 0x1"), "{error}");
}

#[test]
fn exits_have_the_machines_names() {
    use BasicReason as R;
    let exit_of = |reason, qualification| {
        let mut vcpu = vcpu();
        vcpu.registers.gprs = Gprs {
            rax: 0xFFFF_FFFF_0000_0003,
            rcx: 0x1_0000_0010,
            rdx: 7,
            ..Gprs::default()
        };
        vcpu.will_exit(reason, qualification);
        vcpu.enter_once()
    };
    assert_eq!(exit_of(R::Rdmsr, 0), VmExit::ReadMsr(Msr(0x10)));
    assert_eq!(
        exit_of(R::Wrmsr, 0),
        VmExit::WriteMsr(Msr(0x10), 0x7_0000_0003)
    );
    let xcr = VmExit::SetXcr {
        index: 0x10,
        value: 0x7_0000_0003,
    };
    assert_eq!(exit_of(R::Xsetbv, 0), xcr);
    let port = PortAccess {
        port: 0x3F8,
        size: 1,
        write: false,
    };
    assert_eq!(exit_of(R::Io, 0x03F8_0008), VmExit::Port(port));
    assert_eq!(exit_of(R::Io, 0x03F8_0018), VmExit::StringPort(port));
    assert_eq!(exit_of(R::Vmcall, 0), VmExit::Hypercall);
    assert_eq!(exit_of(R::Wbinvd, 0), VmExit::CacheFlush);
    assert_eq!(exit_of(R::TripleFault, 0), VmExit::Shutdown);
    for reason in [
        R::Vmxon,
        R::Vmlaunch,
        R::Vmread,
        R::Getsec,
        R::Monitor,
        R::Invept,
        R::Rdpmc,
    ] {
        assert_eq!(exit_of(reason, 0), VmExit::Forbidden, "{reason}");
    }
}

#[test]
fn what_is_not_supported_is_said_in_words() {
    let mut vcpu = vcpu();
    vcpu.will(|vmcs, _| {
        vmcs.preset(fields::GUEST_INTERRUPTIBILITY, 1 << 3);
        vmcs.preset(fields::IDT_VECTORING_INFORMATION, 0x8000_0202);
        vmcs.preset(fields::GUEST_PHYSICAL_ADDRESS, 0x5000);
        exit(vmcs, BasicReason::EptMisconfiguration, 0);
        vmcs.preset(fields::EXIT_REASON, 1 << 26 | 49);
    });
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    for words in [
        "EPT misconfiguration on the way to 0x5000 (after a bus lock) (reason 0x4000031,",
        "while NMI was being delivered",
        "activity: active; blocking: BLOCKING_BY_NMI; pending debug exceptions: none",
    ] {
        assert!(error.contains(words), "{error}");
    }
    let mut vcpu = vcpu_on(&fixtures::skylake_sp());
    vcpu.will_exit(BasicReason::Unknown(300), 9);
    let error = vcpu.run(&AtomicU32::new(0)).unwrap_err().to_string();
    assert!(
        error.contains("0x12c") && error.contains("qualification 0x9"),
        "{error}"
    );
}

/// A task priority is one register, whether the guest reaches it as CR8 or through its local APIC.
#[test]
fn the_task_priority_is_one_in_the_processor_and_the_apic() {
    const MEMORY: usize = 16 << 20;
    let mut cpuid = Cpuid::new();
    for (leaf, eax) in [(0, 0xD), (0x8000_0000, 0x8000_0008), (0x8000_0008, 40)] {
        let entry = CpuidEntry {
            leaf,
            eax,
            ..CpuidEntry::default()
        };
        assert!(cpuid.set(entry));
    }
    let config = MachineConfig {
        vcpus: 1,
        memory: MEMORY as u64,
        nested: false,
        hyperv: false,
        time_limit: None,
        start_time: 0,
    };
    let console = Box::new(|_: u8| {});
    let made = Machine::new(config, ram(MEMORY), FakeHost::new(), &cpuid, console);
    let (machine, lapics) = made.unwrap();

    let mut vcpu = vcpu();
    let apic = vcpu.apic_page;
    let access = |write: bool, msr: Msr, value: u64| {
        move |vmcs: &mut FakeVmcs, registers: &mut GuestRegisters| {
            (registers.gprs.rcx, registers.gprs.rax) = (msr.0.into(), value);
            let reasons = [BasicReason::Rdmsr, BasicReason::Wrmsr];
            exit(vmcs, reasons[usize::from(write)], 0);
        }
    };
    vcpu.will(access(true, Msr::APIC_BASE, 0xFEE0_0D00));
    vcpu.will(access(true, Msr::X2APIC_TPR, 0x53));
    vcpu.will(move |vmcs, registers| {
        assert_eq!(apic.task_priority(), 5);
        // MOV to CR8, which does not exit, and a write to another register of the APIC.
        apic.set_task_priority(7);
        access(true, Msr::X2APIC_EOI, 0)(vmcs, registers);
    });
    vcpu.will(access(false, Msr::X2APIC_TPR, 0));
    vcpu.will(move |vmcs, registers| {
        assert_eq!(registers.gprs.rax, 0x70);
        assert_eq!(apic.task_priority(), 7);
        exit(vmcs, BasicReason::TripleFault, 0);
    });
    let start = BootState {
        system: SystemRegisters::reset(),
        gprs: Gprs::default(),
    };
    let lapic = lapics.into_iter().next().unwrap();
    let stop = VcpuLoop::new(&machine, vcpu, lapic, Some(&start)).run();
    assert_eq!(stop.reason, StopReason::TripleFault);
}

/// What a guest can do to its mode.
#[derive(Clone, Copy, Debug)]
enum Move {
    Cr0(u64),
    Cr4(u64),
    Efer(u64),
    CodeSegment(u32),
    Cr3(u64),
}

fn moves() -> impl Strategy<Value = Move> {
    let cr0 = prop::sample::subsequence(
        std::vec![0u32, 1, 2, 3, 5, 16, 18, 29, 30, 31, 31, 0, 40],
        0..8,
    );
    let cr4 = prop::sample::subsequence((0..24).collect::<Vec<u32>>(), 0..8);
    let efer = prop::sample::subsequence(std::vec![0u32, 8, 8, 10, 11, 12], 0..4);
    let set = |bits: Vec<u32>| bits.into_iter().fold(0, |all, bit| all | 1u64 << bit);
    prop_oneof![
        4 => cr0.prop_map(move |bits| Move::Cr0(set(bits))),
        4 => Just(Move::Cr0(0x8000_0011)),
        4 => cr4.prop_map(move |bits| Move::Cr4(set(bits))),
        4 => Just(Move::Cr4(0x20)),
        4 => efer.prop_map(move |bits| Move::Efer(set(bits))),
        2 => prop::sample::select(std::vec![0xA09Bu32, 0xC09B, 0x9B]).prop_map(Move::CodeSegment),
        2 => prop::sample::select(std::vec![0u64, 0x1000, 0x10_0000]).prop_map(Move::Cr3),
        1 => any::<u64>().prop_map(Move::Cr0),
        1 => any::<u64>().prop_map(Move::Cr4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The validator stands for the processor, so a refused entry would fail `run_out`.
    #[test]
    fn no_change_of_mode_makes_an_entry_fail(
        moves in prop::collection::vec(moves(), 1..40),
        pdptes: [u64; 4],
    ) {
        let mut vcpu = vcpu();
        for (i, pdpte) in pdptes.into_iter().enumerate() {
            vcpu.memory.store_u64(Gpa(0x1000 + 8 * i as u64), pdpte).unwrap();
        }
        for step in moves {
            match step {
                Move::Cr0(value) => vcpu.guest_moves_to(0, value),
                Move::Cr4(value) => vcpu.guest_moves_to(4, value),
                Move::Efer(value) => {
                    if vcpu.write_msr(Msr::EFER, value) == Some(false) {
                        vcpu.inject(Event::GP0);
                    }
                    vcpu.run_out();
                }
                // 64-bit code exists in IA-32e mode only.
                Move::CodeSegment(rights) if rights & 0x2000 == 0 || vcpu.mode.efer & LMA != 0 => {
                    vcpu.processor.set(fields::GUEST_CS_ACCESS_RIGHTS, rights).unwrap();
                    vcpu.run_out();
                }
                Move::CodeSegment(_) => {}
                // With PAE paging the processor refuses a CR3 whose pointers do not suit.
                Move::Cr3(_) if vcpu.mode.pae_paging() => {}
                Move::Cr3(value) => vcpu.processor.set(fields::GUEST_CR3, value).unwrap(),
            }
            let system = vcpu.system();
            prop_assert_eq!(system.efer & LMA != 0, system.efer & LME != 0 && system.cr0 >> 31 != 0);
            let hardware = vcpu.hardware(fields::GUEST_CR0);
            prop_assert_eq!(hardware & 0x6000_0000, 0);
        }
    }

    #[test]
    fn any_exit_is_an_answer_and_the_next_entry_succeeds(
        reason in 0u16..90,
        qualification: u64,
        information: u32,
        interrupted in prop_oneof![Just(0u32), any::<u8>().prop_map(|v| 0x8000_0000 | u32::from(v))],
    ) {
        let mut vcpu = vcpu();
        vcpu.set_rflags(0x202);
        vcpu.will(move |vmcs, _| {
            vmcs.preset(fields::EXIT_REASON, reason.into());
            vmcs.preset(fields::EXIT_QUALIFICATION, qualification);
            vmcs.preset(fields::EXIT_INSTRUCTION_LENGTH, 3);
            vmcs.preset(fields::EXIT_INTERRUPTION_INFORMATION, u64::from(information & 0x9FF | 0x8000_0300));
            vmcs.preset(fields::IDT_VECTORING_INFORMATION, interrupted.into());
        });
        vcpu.will_exit(BasicReason::ExternalInterrupt, 0);
        let exit = vcpu.run(&AtomicU32::new(0));
        let fine = matches!(exit, Ok(_) | Err(VcpuError::Unsupported { .. }));
        prop_assert!(fine, "{exit:?}");
    }
}
