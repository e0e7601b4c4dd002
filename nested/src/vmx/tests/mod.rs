//! What the tests of this module share.

use std::boxed::Box;
use std::collections::BTreeMap;
use std::vec::Vec;

use testudo_arch::{Gpa, Gpr, Gprs, GuestMemory, Hpa, Msr};
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::fixtures;
use testudo_vmx::check::samples;
use testudo_vmx::controls::{PrimaryControls, SecondaryControls};
use testudo_vmx::encoding::Encoding;
use testudo_vmx::exit::BasicReason;
use testudo_vmx::fake::FakeVmcs;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields};

use super::{
    Context, EptFault, EptHandled, Handled, Instruction, Msrs, NestedVmx, Offer, Outcome, REVISION,
    SecondStage, VmcsPair, guest_fields, offer,
};
use crate::test_memory::Memory;

mod apic;
mod containment;
mod enlightened;
mod held_back;
mod instructions;
mod model;
mod passed_through;
mod regressions;
mod resumes;
mod routing;
mod saved;
mod shadow_paging;
mod transitions;
mod turns;

pub(super) const VMXON_REGION: Gpa = Gpa(0x8000);
pub(super) const REGION: Gpa = Gpa(0x9000);
pub(super) const OTHER: Gpa = Gpa(0xA000);
/// Where a memory operand of the tests lies.
pub(super) const OPERAND: u64 = 0x7000;
pub(super) const BITMAP_AT: Hpa = Hpa(0x7_0000_0000);
pub(super) const L0_BITMAP: u64 = 0x6_0000_0000;
pub(super) const L0_EPTP: u64 = 0x5_0000_001E;
pub(super) const COMPOSED_EPTP: u64 = 0x4_0000_001E;
pub(super) const PLAIN_EPTP: u64 = 0x6_0000_001E;
/// Pages of L1's: its MSR bitmap for L2, and L2's local APIC.
pub(super) const L1_BITMAP: u64 = 0x4_0000;
pub(super) const VIRTUAL_APIC: u64 = 0x5_0000;
pub(super) const ACCESS_PAGE: u64 = 0x6_0000;
/// Where L0 has L1's memory.
pub(super) const FRAMES: u64 = 0x3_0000_0000;

/// The two VMCSs of a processor.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) l1: FakeVmcs,
    pub(super) l2: FakeVmcs,
    /// With VMCS shadowing.
    pub(super) shadow: Option<FakeVmcs>,
}

impl VmcsPair for Pair {
    type Vmcs<'a> = &'a mut FakeVmcs;
    fn l1(&mut self) -> &mut FakeVmcs {
        &mut self.l1
    }
    fn l2(&mut self) -> &mut FakeVmcs {
        &mut self.l2
    }
    fn shadow(&mut self) -> Option<&mut FakeVmcs> {
        self.shadow.as_mut()
    }
}

/// MSRs that exist: those with a value here.
#[derive(Debug, Default)]
pub(super) struct MsrFile(pub(super) BTreeMap<u32, u64>);

impl Msrs for MsrFile {
    fn read(&mut self, msr: Msr) -> Option<u64> {
        self.0.get(&msr.0).copied()
    }
    fn write(&mut self, msr: Msr, value: u64) -> bool {
        self.0.get_mut(&msr.0).map(|v| *v = value).is_some()
    }
}

/// A second stage that remembers what it was asked.
#[derive(Debug, Default)]
pub(super) struct Stage {
    pub(super) activated: Vec<u64>,
    pub(super) flushed: Vec<Option<u64>>,
    pub(super) answer: Option<EptHandled>,
    /// It has a composition for an L2 without an EPT of L1's, and the page that was to be alone there.
    pub(super) makes_plain: bool,
    pub(super) alone: Option<Gpa>,
    /// How far L0 has moved L1's memory.
    pub(super) moved: u64,
}

impl SecondStage for Stage {
    fn activate(&mut self, eptp: u64) -> Option<u64> {
        self.activated.push(eptp);
        Some(COMPOSED_EPTP)
    }
    fn activate_plain(&mut self, page: Gpa) -> Option<u64> {
        self.alone = Some(page);
        self.makes_plain.then_some(PLAIN_EPTP)
    }
    fn flush(&mut self, eptp: Option<u64>) {
        self.flushed.push(eptp);
    }
    fn fault(&mut self, fault: EptFault) -> EptHandled {
        self.answer
            .unwrap_or(EptHandled::Violation(fault.qualification))
    }
    fn translate(&mut self, gpa: Gpa, _: bool) -> Option<Gpa> {
        Some(gpa)
    }
    fn frame(&mut self, page: Gpa) -> Option<Hpa> {
        assert_eq!(page.0 & 0xFFF, 0);
        let backed = page.0 < Memory::SIZE as u64;
        backed.then(|| Hpa(FRAMES + self.moved + page.0))
    }
}

/// One vCPU and the machine around it.
pub(super) struct Vm {
    pub(super) memory: Memory,
    pub(super) vmcs: Pair,
    pub(super) gprs: Gprs,
    pub(super) stage: Stage,
    pub(super) msrs: MsrFile,
    pub(super) nested: NestedVmx,
    pub(super) processor: VmxCaps,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Succeed,
    FailInvalid,
    Fail(u32),
    Fault(super::Fault),
    Other(Outcome),
}

fn fill(vmcs: &mut FakeVmcs, image: &VmcsImage) {
    for (field, value) in image.iter() {
        vmcs.preset(field, value);
    }
}

impl Vm {
    /// A vCPU of an L1 with CR4.VMXE set, outside VMX operation.
    pub(super) fn new() -> Self {
        Self::offered(Offer {
            ept: true,
            vpid: true,
            apic: true,
            enlightened: false,
        })
    }

    /// The same, with this offer.
    pub(super) fn offered(wanted: Offer) -> Self {
        let processor = fixtures::skylake_sp();
        let caps = offer(&processor, processor.processor, wanted);
        let mut l0 = samples::valid(&processor);
        assert!(samples::enable_ept(&mut l0, &processor).unwrap());
        l0.set(fields::EPT_POINTER, L0_EPTP).unwrap();
        let primary = PrimaryControls::from_bits_retain(l0.get(fields::PRIMARY_CONTROLS).unwrap())
            | PrimaryControls::USE_MSR_BITMAPS
            | PrimaryControls::HLT_EXITING
            | PrimaryControls::USE_TSC_OFFSETTING
            | PrimaryControls::UNCONDITIONAL_IO_EXITING;
        l0.set(fields::PRIMARY_CONTROLS, primary.bits()).unwrap();
        let secondary =
            SecondaryControls::from_bits_retain(l0.get(fields::SECONDARY_CONTROLS).unwrap())
                | SecondaryControls::ENABLE_RDTSCP;
        l0.set(fields::SECONDARY_CONTROLS, secondary.bits())
            .unwrap();
        l0.set(
            fields::PIN_CONTROLS,
            l0.get(fields::PIN_CONTROLS).unwrap() | 9,
        )
        .unwrap();
        l0.set(fields::MSR_BITMAPS, L0_BITMAP).unwrap();
        l0.set(fields::TSC_OFFSET, 0x1000).unwrap();
        l0.set(fields::EXCEPTION_BITMAP, 1 << 18).unwrap();
        l0.set(fields::CR4_GUEST_HOST_MASK, 1 << 13).unwrap();
        l0.set(fields::CR4_READ_SHADOW, 1 << 13).unwrap();
        l0.set(fields::GUEST_CR3, 0x1000).unwrap();
        l0.set(fields::GUEST_RSP, 0x6000).unwrap();
        let mut vmcs = Pair {
            l1: FakeVmcs::with_caps(&processor),
            l2: FakeVmcs::with_caps(&processor),
            shadow: None,
        };
        fill(&mut vmcs.l1, &l0);
        fill(&mut vmcs.l2, &l0);
        vmcs.l1.preset(fields::EXIT_INSTRUCTION_LENGTH, 4);
        let mut bitmap = MsrBitmap::all_exit();
        bitmap.pass_through(Msr::FS_BASE);
        bitmap.pass_through(Msr::SYSENTER_CS);
        let nested = NestedVmx::new(
            caps,
            &processor,
            &bitmap,
            Box::new(MsrBitmap::all_exit()),
            BITMAP_AT,
        );
        let nested = match wanted.enlightened {
            true => nested.with_enlightened_vmcs(),
            false => nested,
        };
        let memory = Memory::new();
        // The first 2 MiB, mapped as they are.
        memory.store_u64(Gpa(0x1000), 0x2003).unwrap();
        memory.store_u64(Gpa(0x2000), 0x3003).unwrap();
        memory.store_u64(Gpa(0x3000), 0x83).unwrap();
        for region in [VMXON_REGION, REGION, OTHER] {
            memory.store_u32(region, REVISION).unwrap();
        }
        Self {
            memory,
            vmcs,
            gprs: Gprs::default(),
            stage: Stage::default(),
            msrs: MsrFile::default(),
            nested,
            processor,
        }
    }

    /// In VMX operation, with a current VMCS that can be entered.
    pub(super) fn ready() -> Self {
        Self::ready_by(Offer {
            ept: true,
            vpid: true,
            apic: true,
            enlightened: false,
        })
    }

    /// The same, with this offer.
    pub(super) fn ready_by(wanted: Offer) -> Self {
        let mut vm = Self::offered(wanted);
        assert_eq!(vm.pointer(Instruction::Vmxon, VMXON_REGION.0), End::Succeed);
        assert_eq!(vm.pointer(Instruction::Vmclear, REGION.0), End::Succeed);
        assert_eq!(vm.pointer(Instruction::Vmptrld, REGION.0), End::Succeed);
        let sample = samples::valid(vm.nested.caps());
        for (field, value) in sample.iter() {
            vm.set12(field, value);
        }
        vm
    }

    /// With L2 running.
    pub(super) fn running() -> Self {
        let mut vm = Self::ready();
        assert_eq!(
            vm.run(Instruction::Vmlaunch),
            End::Other(Outcome::Entered { halted: false })
        );
        vm
    }

    /// L1 asks for these of the controls about L2's local APIC: by their places in the secondary controls, and bit 31
    /// for the TPR shadow. `value` are the bits of the other fields about it.
    pub(super) fn ask_for_apic(&mut self, controls: u32, value: u64) {
        const ABOUT: u32 = 0x311;
        let bits = |vm: &Self, field: Encoding| vm.get12(field) as u32;
        let primary = fields::PRIMARY_CONTROLS.encoding();
        let shadow = PrimaryControls::USE_TPR_SHADOW.bits();
        let bitmaps = PrimaryControls::USE_MSR_BITMAPS.bits();
        let activate = PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits();
        let old = bits(self, primary) & !shadow;
        let wanted = if controls >> 31 == 1 { shadow } else { 0 };
        self.set12(primary, (old | wanted | bitmaps | activate).into());
        let secondary = fields::SECONDARY_CONTROLS.encoding();
        let old = bits(self, secondary) & !ABOUT;
        self.set12(secondary, (old | controls & ABOUT).into());
        let pin = fields::PIN_CONTROLS.encoding();
        self.set12(pin, (bits(self, pin) | 1).into());
        self.set12(fields::MSR_BITMAPS, L1_BITMAP);
        self.set12(
            fields::VIRTUAL_APIC_ADDRESS,
            VIRTUAL_APIC + (value & 0xF000),
        );
        self.set12(fields::APIC_ACCESS_ADDRESS, ACCESS_PAGE + (value & 0xF000));
        self.set12(fields::TPR_THRESHOLD, value & 0xF);
        self.set12(fields::GUEST_INTERRUPT_STATUS, value >> 16 & 0xFFFF);
        self.set12(fields::EOI_EXIT_BITMAP_2, value);
    }

    pub(super) fn renew_frames(&mut self) -> bool {
        self.call(|nested, cx| nested.renew_frames(cx)).unwrap()
    }

    /// A call of the layer with all that it works on.
    pub(super) fn call<T>(
        &mut self,
        work: impl FnOnce(&mut NestedVmx, &mut Context<'_, Pair, Memory, Stage, MsrFile>) -> T,
    ) -> T {
        let mut cx = Context {
            gprs: &mut self.gprs,
            vmcs: &mut self.vmcs,
            memory: &self.memory,
            second_stage: &mut self.stage,
            msrs: &mut self.msrs,
        };
        work(&mut self.nested, &mut cx)
    }

    /// As L1's VMWRITE.
    pub(super) fn set12(&mut self, field: impl Into<Encoding>, value: u64) {
        let image = &mut self.nested.vmcs12.image;
        if core::mem::take(&mut self.nested.rare_missing) {
            guest_fields::pull(&self.vmcs.l2, image, &guest_fields::RARE).unwrap();
        }
        image.write_raw(field.into(), value).unwrap();
        self.nested.rare_dirty = true;
        self.nested.settled = None;
    }

    /// As L1's VMREAD.
    pub(super) fn get12(&self, field: impl Into<Encoding>) -> u64 {
        let field = field.into();
        if self.nested.rare_missing && guest_fields::is_rare(field) {
            return self.vmcs.l2.read_raw(field).unwrap();
        }
        self.nested.vmcs12.image.read_raw(field).unwrap()
    }

    /// An instruction with a 64-bit pointer as its memory operand.
    pub(super) fn pointer(&mut self, instruction: Instruction, value: u64) -> End {
        self.memory.store_u64(Gpa(OPERAND), value).unwrap();
        self.memory_operand(OPERAND);
        self.run(instruction)
    }

    /// DS, no base, no index, 64-bit addresses: the displacement is the address.
    pub(super) fn memory_operand(&mut self, address: u64) {
        let information = 2 << 7 | 3 << 15 | 1 << 22 | 1 << 27;
        self.vmcs
            .l1
            .preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
        self.vmcs.l1.preset(fields::EXIT_QUALIFICATION, address);
    }

    /// VMREAD or VMWRITE of the field in RAX, with RBX.
    pub(super) fn field(&mut self, instruction: Instruction, field: u64) -> End {
        self.gprs.rax = field;
        let information = 1 << 10 | (Gpr::Rbx as u64) << 3 | (Gpr::Rax as u64) << 28;
        self.vmcs
            .l1
            .preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
        self.run(instruction)
    }

    /// INVEPT or INVVPID of the type in RCX.
    pub(super) fn invalidate(
        &mut self,
        instruction: Instruction,
        kind: u64,
        descriptor: [u64; 2],
    ) -> End {
        self.gprs.rcx = kind;
        self.memory.store_u64(Gpa(OPERAND), descriptor[0]).unwrap();
        self.memory
            .store_u64(Gpa(OPERAND + 8), descriptor[1])
            .unwrap();
        self.memory_operand(OPERAND);
        let information = self
            .vmcs
            .l1
            .get(fields::EXIT_INSTRUCTION_INFORMATION)
            .unwrap();
        let information = u64::from(information) | (Gpr::Rcx as u64) << 28;
        self.vmcs
            .l1
            .preset(fields::EXIT_INSTRUCTION_INFORMATION, information);
        self.run(instruction)
    }

    pub(super) fn run(&mut self, instruction: Instruction) -> End {
        match self
            .call(|nested, cx| nested.execute(instruction, cx))
            .unwrap()
        {
            Outcome::Fault(fault) => End::Fault(fault),
            Outcome::Done => {
                let flags = self.vmcs.l1.get(fields::GUEST_RFLAGS).unwrap();
                match flags & 0x8D5 {
                    0 => End::Succeed,
                    1 => End::FailInvalid,
                    0x40 => End::Fail(self.get12(fields::VM_INSTRUCTION_ERROR) as u32),
                    other => panic!("flags {other:#x}"),
                }
            }
            other => End::Other(other),
        }
    }

    /// L2 exits as the processor reports it.
    pub(super) fn exit(&mut self, reason: BasicReason, qualification: u64) -> Handled {
        self.vmcs
            .l2
            .preset(fields::EXIT_REASON, reason.number().into());
        self.vmcs
            .l2
            .preset(fields::EXIT_QUALIFICATION, qualification);
        self.call(|nested, cx| nested.exited(cx)).unwrap()
    }

    pub(super) fn exit_to_l1(&mut self, reason: BasicReason, interruption: u32) -> Handled {
        self.call(|nested, cx| nested.exit_to_l1(reason, 0, interruption, cx))
            .unwrap()
    }
}
