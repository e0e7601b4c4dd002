//! What the tests of this module share.

use std::boxed::Box;
use std::vec::Vec;

use testudo_arch::{DescriptorTable, Gpa, Gprs, GuestMemory, Hpa, Msr};
use testudo_svm::Defects;
use testudo_svm::caps::{Features, SvmCaps};
use testudo_svm::exit::{ExitCode, NestedPageFault};
use testudo_svm::intercept::{ExceptionIntercepts, Misc1, Misc2};
use testudo_svm::permission::{IoPermissionMap, MsrAccess, MsrPermissionMap};
use testudo_svm::vmcb::{
    InterruptState, NestedControl, VintrFlags, VirtualInterrupts, Vmcb, VmcbSegment,
};

pub(super) use crate::test_memory::Memory;

use super::{
    Acceptance, Context, Handled, Host, Instruction, NestedFault, NestedSvm, NestedTable, Outcome,
    Pages, PhysicalEvent, SecondStage, offer,
};

mod containment;
mod entry;
mod events;
mod instructions;
mod regressions;
mod routing;
mod saved;
mod shadow;

/// Where the tests put L1's control block and maps.
pub(super) const VMCB12: Gpa = Gpa(0x10000);
pub(super) const MSRPM12: Gpa = Gpa(0x20000);
pub(super) const IOPM12: Gpa = Gpa(0x24000);
pub(super) const PAGES_AT: Hpa = Hpa(0x7_0000_0000);
pub(super) const L0_ROOT: u64 = 0x6_0000_1000;
pub(super) const L0_MSRPM: u64 = 0x6_0000_2000;
pub(super) const L0_IOPM: u64 = 0x6_0000_4000;
pub(super) const COMPOSED_ROOT: Hpa = Hpa(0x5_0000_0000);

const SVME: u64 = 1 << 12;
/// EFER of a 64-bit system with SVM on: SCE, LME, LMA, NXE, SVME.
pub(super) const EFER64: u64 = 0x1D01;
pub(super) const CR0_ON: u64 = 0x8005_0033;
pub(super) const CR4_ON: u64 = 0x6A0;

/// A second stage that remembers what it was asked.
#[derive(Debug, Default)]
pub(super) struct Stage {
    pub(super) activated: Vec<NestedTable>,
    pub(super) flushes: usize,
    pub(super) answer: Option<NestedFault>,
    pub(super) unavailable: bool,
}

impl SecondStage for Stage {
    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }

    fn activate(&mut self, table: NestedTable) -> Option<Hpa> {
        self.activated.push(table);
        (!self.unavailable).then_some(COMPOSED_ROOT)
    }
    fn flush(&mut self, _: Option<u32>) {
        self.flushes += 1;
    }
    fn fault(&mut self, fault: NestedPageFault) -> NestedFault {
        self.answer.unwrap_or(NestedFault::Reflect(fault))
    }
}

/// One vCPU of an L1 that has SVM on, and the machine around it.
pub(super) struct Vm {
    pub(super) memory: Memory,
    pub(super) vmcb01: Box<Vmcb>,
    pub(super) gprs: Gprs,
    pub(super) stage: Stage,
    pub(super) nested: NestedSvm,
}

/// A processor with every feature that the layer passes on.
pub(super) fn full_caps() -> SvmCaps {
    SvmCaps {
        features: Features::all(),
        ..SvmCaps::ZEN2
    }
}

/// A segment that 64-bit code runs in.
pub(super) fn code64() -> VmcbSegment {
    VmcbSegment {
        selector: 0x10,
        attributes: 0xA9B,
        limit: u32::MAX,
        base: 0,
    }
}

/// Guest state of a 64-bit system, different for each `seed`.
pub(super) fn set_state(vmcb: &mut Vmcb, seed: u64) {
    vmcb.set_efer(EFER64);
    vmcb.set_cr0(CR0_ON);
    vmcb.set_cr4(CR4_ON);
    vmcb.set_cr3(0x1000 * seed);
    vmcb.set_cr2(0xC2_0000 + seed);
    vmcb.set_dr6(0xFFFF_0FF0);
    vmcb.set_dr7(0x400 | seed << 16);
    vmcb.set_rflags(0x202);
    vmcb.set_rip(0x1_0000 * seed);
    vmcb.set_rsp(0x2_0000 * seed);
    vmcb.set_rax(0xA0 + seed);
    vmcb.set_g_pat(0x0007_0406_0007_0406);
    use testudo_arch::regs::SegmentRegister as S;
    vmcb.set_raw_segment(S::Cs, code64());
    for (i, register) in [S::Es, S::Ss, S::Ds, S::Fs, S::Gs, S::Ldtr, S::Tr]
        .into_iter()
        .enumerate()
    {
        let segment = VmcbSegment {
            selector: 0x18 + i as u16 * 8,
            attributes: 0xC93,
            limit: 0xFFFF + seed as u32,
            base: seed * 0x100 + i as u64,
        };
        vmcb.set_raw_segment(register, segment);
    }
    let table = |n| DescriptorTable {
        base: 0xFE00 + seed * 16 + n,
        limit: 0x7F,
    };
    vmcb.set_gdtr(table(0));
    vmcb.set_idtr(table(1));
    vmcb.set_star(0x57A0 + seed);
    vmcb.set_kernel_gs_base(0x65BA + seed);
    vmcb.set_sysenter_eip(0x5E1 + seed);
}

impl Vm {
    /// On a processor with these capabilities, all of which L1 was told of.
    pub(super) fn new(caps: SvmCaps) -> Self {
        Self::with_defects(caps, Defects::empty())
    }

    /// The same on a processor with these defects.
    pub(super) fn with_defects(caps: SvmCaps, defects: Defects) -> Self {
        let mut msr = MsrPermissionMap::intercept_all();
        for open in [Msr::FS_BASE, Msr::STAR, Msr::SYSENTER_CS, Msr::TSC_AUX] {
            msr.set(open, MsrAccess::empty());
        }
        let io = IoPermissionMap::intercept_all();
        let l1_caps = SvmCaps {
            features: offer(&caps),
            // L1 is not told of CET, which this layer does not carry.
            cr4_valid: caps.cr4_valid & !(1 << 23),
            ..caps
        };
        let host = Host {
            caps: &caps,
            l1_caps: &l1_caps,
            msr_permissions: &msr,
            io_permissions: &io,
            defects,
        };
        let mut nested = NestedSvm::new(&host, Pages::new().unwrap(), PAGES_AT).unwrap();
        let mut vmcb01 = Box::new(Vmcb::new());
        set_state(&mut vmcb01, 1);
        vmcb01.set_intercept_exceptions(ExceptionIntercepts::DB | ExceptionIntercepts::MC);
        vmcb01.set_intercept_misc1(
            Misc1::INTR
                | Misc1::NMI
                | Misc1::CPUID
                | Misc1::INVD
                | Misc1::HLT
                | Misc1::INVLPGA
                | Misc1::IOIO
                | Misc1::MSR
                | Misc1::SHUTDOWN,
        );
        vmcb01.set_intercept_misc2(
            Misc2::VMRUN
                | Misc2::VMMCALL
                | Misc2::VMLOAD
                | Misc2::VMSAVE
                | Misc2::STGI
                | Misc2::CLGI
                | Misc2::SKINIT
                | Misc2::XSETBV,
        );
        vmcb01.set_nested_control(NestedControl::NP_ENABLE);
        vmcb01.set_n_cr3(L0_ROOT);
        vmcb01.set_msrpm_base_pa(L0_MSRPM);
        vmcb01.set_iopm_base_pa(L0_IOPM);
        vmcb01.set_tsc_offset(0x1000);
        vmcb01.set_asid(1);
        let masking = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
        vmcb01.set_virtual_interrupts(masking.with_tpr(3));
        assert!(nested.write_svme(SVME));
        assert_eq!(nested.write_msr(Msr::VM_HSAVE_PA, 0x8000), Some(true));
        nested.adjust_vmcb01(&mut vmcb01);
        let gprs = Gprs {
            rax: VMCB12.0,
            rsp: 0x5EED,
            rcx: 7,
            ..Gprs::default()
        };
        let vm = Self {
            memory: Memory::new(),
            vmcb01,
            gprs,
            stage: Stage::default(),
            nested,
        };
        let mut vmcb12 = Vmcb::new();
        set_state(&mut vmcb12, 2);
        vmcb12.set_intercept_misc1(Misc1::INTR | Misc1::MSR | Misc1::IOIO);
        vmcb12.set_intercept_misc2(Misc2::VMRUN);
        vmcb12.set_msrpm_base_pa(MSRPM12.0);
        vmcb12.set_iopm_base_pa(IOPM12.0);
        vmcb12.set_asid(5);
        vmcb12.set_tsc_offset(0x10);
        vmcb12.set_virtual_interrupts(masking.with_tpr(9));
        vm.set_vmcb12(&vmcb12);
        vm
    }

    pub(super) fn full() -> Self {
        Self::new(full_caps())
    }

    pub(super) fn vmcb12(&self) -> Vmcb {
        self.memory.read_value(VMCB12).unwrap()
    }

    pub(super) fn set_vmcb12(&self, vmcb12: &Vmcb) {
        self.memory.write_value(VMCB12, vmcb12).unwrap();
    }

    /// Changes L1's control block in memory. Setters clear the clean bits of what they change.
    pub(super) fn edit12(&self, edit: impl FnOnce(&mut Vmcb)) {
        let mut vmcb12 = self.vmcb12();
        edit(&mut vmcb12);
        self.set_vmcb12(&vmcb12);
    }

    pub(super) fn execute(&mut self, instruction: Instruction) -> Outcome {
        let mut cx = Context {
            gprs: &mut self.gprs,
            vmcb01: &mut self.vmcb01,
            memory: &self.memory,
            second_stage: &mut self.stage,
        };
        self.nested.execute(instruction, NEXT_RIP, &mut cx)
    }

    /// VMRUN that succeeds, as the processor would go on: injected events delivered, all clean.
    pub(super) fn enter(&mut self) {
        self.gprs.rax = VMCB12.0;
        assert_eq!(self.execute(Instruction::Vmrun), Outcome::Entered);
    }

    /// L2 exits as the processor reports it.
    pub(super) fn exit(&mut self, code: ExitCode, info1: u64, info2: u64) -> Handled {
        let vmcb02 = self.nested.vmcb02_mut();
        vmcb02.mark_clean();
        vmcb02.set_exit_code(code.0);
        vmcb02.set_exit_info1(info1);
        vmcb02.set_exit_info2(info2);
        self.exited()
    }

    pub(super) fn exited(&mut self) -> Handled {
        let mut cx = Context {
            gprs: &mut self.gprs,
            vmcb01: &mut self.vmcb01,
            memory: &self.memory,
            second_stage: &mut self.stage,
        };
        self.nested.exited(&mut cx)
    }

    pub(super) fn exit_to_l1(&mut self, code: ExitCode) {
        let mut cx = Context {
            gprs: &mut self.gprs,
            vmcb01: &mut self.vmcb01,
            memory: &self.memory,
            second_stage: &mut self.stage,
        };
        self.nested.exit_to_l1(code, 1, 2, &mut cx).ignore();
    }

    pub(super) fn accepts(&self, event: PhysicalEvent) -> Acceptance {
        self.nested.acceptance(event, &self.vmcb01)
    }
}

/// Where the instruction under test ends.
pub(super) const NEXT_RIP: u64 = 0x1_0003;
