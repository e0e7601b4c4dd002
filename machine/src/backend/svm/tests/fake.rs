//! A processor that is none, and a hypervisor as the guest on it.

use super::*;
use crate::backend::fake_machine::{protected_mode, ram};

type Script = Box<dyn FnOnce(&mut Vmcb, &mut GuestRegisters)>;

const CAPS: SvmCaps = SvmCaps::ZEN2;
/// Where L1 has the control block of its guest, and its host save area.
pub(super) const VMCB12: Gpa = Gpa(0x1_0000);
const SAVE_AREA: u64 = 0x1_1000;
const ROOT: u64 = 0x5000;

/// A processor that exits as the script says.
#[derive(Default)]
pub(super) struct FakeProcessor {
    pub(super) exits: VecDeque<Script>,
    /// What each entry delivered.
    pub(super) injected: Vec<RawEvent>,
    pub(super) interrupts: u32,
}

#[allow(unsafe_code, reason = "the trait's, without hardware")]
impl Processor for FakeProcessor {
    unsafe fn enter(&mut self, vmcb: &mut VmcbFrame<'_>, registers: &mut GuestRegisters) {
        let violations = check_vmrun(vmcb, &CAPS, &Outside::default());
        assert_eq!(violations.iter().next(), None);
        self.injected.push(vmcb.event_inj());
        vmcb.set_exit_int_info(RawEvent::NONE);
        let script = self.exits.pop_front().expect("an exit is scripted");
        script(vmcb, registers);
        vmcb.set_tlb_control(testudo_svm::vmcb::TlbControl::DoNothing);
        vmcb.mark_clean();
    }

    fn take_pending(&mut self) {
        self.interrupts += 1;
    }

    fn release<R>(&mut self, work: impl FnOnce() -> R) -> R {
        work()
    }

    unsafe fn set_guest_xcr0(&mut self, _: u64) {}

    unsafe fn guest_xcr0(&self) -> u64 {
        1
    }

    unsafe fn guest_pkru(&self) -> u32 {
        0
    }
}

/// A page of L2's that L1 does not let it write to.
pub(super) const READ_ONLY: u64 = 0x7000;

/// A second stage under which nothing of L2's memory is mapped: it is a page further in L1's.
#[derive(Debug, Default)]
pub(super) struct Shifted {
    /// What it was told to forget.
    pub(super) forgotten: Vec<(Gpa, u64)>,
    pub(super) flushes: usize,
}

impl SecondStage for Shifted {
    fn activate(&mut self, _: NestedTable) -> Option<Hpa> {
        Some(Hpa(0x6000))
    }

    fn flush(&mut self, _: Option<u32>) {
        self.flushes += 1;
    }

    fn forget(&mut self, start: Gpa, len: u64) {
        self.forgotten.push((start, len));
    }

    fn fault(&mut self, fault: NestedPageFault) -> NestedFault {
        match self.translate(fault.gpa, fault.bits.contains(NestedFaultBits::WRITE)) {
            Some(gpa) => NestedFault::Host(gpa),
            None => NestedFault::Reflect(fault),
        }
    }

    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        let allowed = !write || gpa.0 >> 12 != READ_ONLY >> 12;
        allowed.then(|| gpa.wrapping_add(0x1000))
    }
}

pub(super) type Hypervisor = SvmVcpu<'static, GuestRam, Shifted, FakeProcessor>;

/// A vCPU whose guest has SVM on.
pub(super) fn hypervisor() -> Hypervisor {
    hypervisor_in(Box::leak(Box::new(ram(0x2_0000))))
}

/// As [`hypervisor`], in this memory.
pub(super) fn hypervisor_in(memory: &'static GuestRam) -> Hypervisor {
    let place = SvmPlace {
        processor: FakeProcessor::default(),
        // SAFETY: nothing reads a physical address here.
        #[allow(unsafe_code, reason = "a frame without hardware")]
        vmcb: unsafe { VmcbFrame::new(Box::leak(Box::new(Vmcb::new())), Hpa(0x9000)) },
        caps: &CAPS,
        tables: &SvmTables {
            nested_root: Hpa(ROOT),
            msr_permissions: Hpa(0x1000),
            io_permissions: Hpa(0x2000),
        },
        number: 0,
        xcr0_valid: 7,
        has_predictor_barrier: false,
        defects: Defects::empty(),
    };
    // SAFETY: no guest is entered.
    #[allow(unsafe_code, reason = "the processor is none")]
    let vcpu = unsafe { SvmVcpu::new(place, memory) };
    let l1_caps = SvmCaps {
        features: offer(&CAPS),
        ..CAPS
    };
    let host = Host {
        caps: &CAPS,
        l1_caps: &l1_caps,
        msr_permissions: &MsrPermissionMap::intercept_all(),
        io_permissions: &IoPermissionMap::intercept_all(),
        defects: Defects::empty(),
    };
    let state = NestedSvm::new(&host, Pages::new().unwrap(), Hpa(0xA000)).unwrap();
    let mut vcpu: Hypervisor = vcpu.with_nested(NestedParts {
        state,
        stage: Shifted::default(),
        flusher: Flusher::default(),
    });
    // Nested paging can only be given by somebody who has paging (APM vol. 2, 15.25.3).
    vcpu.set_system(&SystemRegisters {
        cr0: 0x8000_0011,
        cr3: 0x8000,
        ..protected_mode(0x1000)
    });
    assert_eq!(vcpu.write_msr(Msr::EFER, SVME), Some(true));
    assert_eq!(vcpu.write_msr(Msr::VM_HSAVE_PA, SAVE_AREA), Some(true));
    vcpu
}

/// A control block that L1 may enter its guest by: on nested paging, without any intercept but the one
/// that must be.
pub(super) fn vmcb12() -> Vmcb {
    let mut vmcb = Vmcb::new();
    let mut system = protected_mode(0x2000);
    system.efer = SVME;
    vmcb.set_system_registers(&system);
    vmcb.set_intercept_misc2(Misc2::VMRUN);
    vmcb.set_nested_control(NestedControl::NP_ENABLE);
    vmcb.set_g_pat(PAT_RESET);
    vmcb.set_asid(1);
    vmcb
}

pub(super) fn exit(vmcb: &mut Vmcb, code: ExitCode, info1: u64, info2: u64) {
    vmcb.set_exit_code(code.0);
    vmcb.set_exit_info1(info1);
    vmcb.set_exit_info2(info2);
    let next = vmcb.rip() + 2;
    vmcb.set_n_rip(next);
}

impl Hypervisor {
    pub(super) fn will(&mut self, script: impl FnOnce(&mut Vmcb, &mut GuestRegisters) + 'static) {
        self.processor.exits.push_back(Box::new(script));
    }

    /// Scripts an exit by an instruction of two bytes.
    pub(super) fn will_exit(&mut self, code: ExitCode) {
        self.will(move |vmcb, _| exit(vmcb, code, 0, 0));
    }

    /// Scripts L1's VMRUN.
    pub(super) fn will_enter(&mut self) {
        self.will(|vmcb, registers| {
            registers.gprs.rax = VMCB12.0;
            exit(vmcb, ExitCode::VMRUN, 0, 0);
        });
    }

    /// Scripts a nested page fault of L2's at this address of its own, by an event's delivery if there is
    /// one.
    pub(super) fn will_miss(&mut self, gpa: u64, bits: NestedFaultBits, delivering: RawEvent) {
        self.will(move |vmcb, _| {
            exit(vmcb, ExitCode::NPF, bits.bits(), gpa);
            vmcb.set_exit_int_info(delivering);
        });
    }

    pub(super) fn enter_once(&mut self) -> VmExit {
        self.run(&AtomicU32::new(0)).unwrap()
    }

    /// Runs until the scripted exits are used up; the last leads to an interrupt of the host.
    pub(super) fn run_out(&mut self) {
        self.will_exit(ExitCode::INTR);
        assert_eq!(self.enter_once(), VmExit::Interrupted);
    }

    /// Has L2 run by a control block that L1 has made so.
    pub(super) fn running(change: impl FnOnce(&mut Vmcb)) -> Self {
        let mut vcpu = hypervisor();
        let mut block = vmcb12();
        change(&mut block);
        vcpu.memory.write_value(VMCB12, &block).unwrap();
        vcpu.will_enter();
        vcpu.run_out();
        assert!(vcpu.is_l2());
        vcpu
    }

    /// L1's control block as it is in its memory.
    pub(super) fn seen_by_l1(&self) -> Vmcb {
        assert!(!self.is_l2());
        self.memory.read_value(VMCB12).unwrap()
    }

    pub(super) fn last_injected(&self) -> RawEvent {
        *self.processor.injected.last().unwrap()
    }
}
