//! Where the emulators differ from the manual: each entry with the manual's sentence.
//!
//! A disagreement is explained if the entries of the emulator at hand account for all of it: for a
//! state that it entered although rules are broken, one entry for every broken rule; for a state
//! that it refused although no rule is broken, an entry for a check of its own.

use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::SegmentAttributes;
use testudo_diff::Emulator;
use testudo_svm::caps::SvmCaps;
use testudo_svm::check::{Rule, Violation};
use testudo_svm::permission::MsrPermissionMap;
use testudo_svm::vmcb::{NestedControl, Vmcb};

use crate::state::{LME, PAE, PE, PG};

/// What an emulator does otherwise than the manual says.
pub(crate) enum Kind {
    /// It does not enforce a rule, for these values of its field.
    Lenient(Rule, fn(&Vmcb, &SvmCaps, &Violation) -> bool),
    /// It refuses states that break no rule.
    Strict(fn(&Vmcb, &SvmCaps) -> bool),
    /// It stops in the middle of such an entry, so that the state is not tried. If these are all
    /// the states that break a rule, the rule cannot be seen broken there.
    Stops(Option<Rule>, fn(&Vmcb, &SvmCaps) -> bool),
}

/// A documented defect.
pub(crate) struct Defect {
    pub(crate) emulator: Emulator,
    pub(crate) name: &'static str,
    /// What the manual says (APM vol. 2, revision 3.42).
    #[expect(dead_code, reason = "the reason of the entry, for its reader")]
    pub(crate) manual: &'static str,
    pub(crate) kind: Kind,
}

/// Whether an emulator stops whenever this rule is broken.
pub(crate) fn stops_at(emulator: Emulator, rule: Rule) -> bool {
    DEFECTS.iter().any(|defect| {
        let whole = matches!(defect.kind, Kind::Stops(Some(all), _) if all == rule);
        defect.emulator == emulator && whole
    })
}

const fn always(_: &Vmcb, _: &SvmCaps, _: &Violation) -> bool {
    true
}

const EFER_LMSLE: u64 = 1 << 13;
const EFER_FFXSR: u64 = 1 << 14;
const EFER_TCE: u64 = 1 << 15;
const CR4_VME_PVI: u64 = 0b11;
const CR4_PCIDE: u64 = 1 << 17;

fn long_mode(vmcb: &Vmcb) -> bool {
    vmcb.efer() & LME != 0 && vmcb.cr0() & PG != 0
}

/// The last byte of the MSR permission map is the last that the processor can address.
fn msrpm_ends_at_the_limit(vmcb: &Vmcb, caps: &SvmCaps) -> bool {
    (vmcb.msrpm_base_pa() & !0xFFF) + MsrPermissionMap::SIZE as u64 == caps.physical_limit()
}

use Emulator::{Bochs, Qemu};
use Kind::{Lenient, Stops, Strict};

pub(crate) const DEFECTS: &[Defect] = &[
    Defect {
        emulator: Qemu,
        name: "the host's CR0 is lost after a guest with LME but neither PG nor PAE",
        manual: "15.6: on #VMEXIT, the processor reloads the host state previously saved by the VMRUN \
                 instruction",
        kind: Stops(None, |vmcb, _| {
            vmcb.efer() & LME != 0 && vmcb.cr0() & PG == 0 && vmcb.cr4() & PAE == 0
        }),
    },
    Defect {
        emulator: Qemu,
        name: "the nested CR3 is not checked",
        manual: "15.25.4: [illegal if] any MBZ bit of nCR3 is set",
        kind: Lenient(Rule::NCr3Reserved, always),
    },
    Defect {
        emulator: Qemu,
        name: "the guest's PAT is not checked",
        manual: "15.25.4: [illegal if] any G_PAT.PA field has an unsupported type encoding or any \
                 reserved field in G_PAT has a non-zero value",
        kind: Lenient(Rule::GPatTypes, always),
    },
    Defect {
        emulator: Qemu,
        name: "reserved vectors below 31 are injected as exceptions",
        manual: "15.20: VMRUN exits with VMEXIT_INVALID [if] TYPE = 3 (exception) has been specified \
                 with a vector that does not correspond to an exception",
        kind: Lenient(Rule::EventVector, |vmcb, _, _| {
            vmcb.event_inj().vector() < 31
        }),
    },
    Defect {
        emulator: Qemu,
        name: "#BR and #OF are injected in 64-bit mode",
        manual: "15.20: if the VMM attempts to inject an event that is impossible for the guest mode \
                 (e.g., a #BR exception when the guest is in 64-bit mode), […] VMRUN will \
                 immediately exit with an error code of VMEXIT_INVALID",
        kind: Lenient(Rule::EventPossible, always),
    },
    Defect {
        emulator: Qemu,
        name: "the page-directory pointers are not checked",
        manual: "15.5.1: if the guest is in PAE paging mode […] and nested paging is not enabled, the \
                 processor will also read the four PDPEs […]; setting any reserved bits in the PDPEs \
                 also causes a #VMEXIT",
        kind: Lenient(Rule::PdpeReserved, always),
    },
    Defect {
        emulator: Qemu,
        name: "the MSR permission map may not end at the limit",
        manual: "15.11: if the address of the last byte in the table is greater than or equal to the \
                 maximum supported physical address, this is treated as illegal",
        kind: Strict(msrpm_ends_at_the_limit),
    },
    Defect {
        emulator: Qemu,
        name: "CR4.VME, PVI and PCIDE are accepted on a processor without them",
        manual: "15.5.1: [illegal if] any MBZ bit of CR4 is set",
        kind: Lenient(Rule::Cr4Reserved, |_, caps, violation| {
            violation.value & !caps.cr4_valid & !(CR4_VME_PVI | CR4_PCIDE) == 0
        }),
    },
    Defect {
        emulator: Qemu,
        name: "EFER.FFXSR is accepted on a processor without it",
        manual: "15.5.1: [illegal if] any MBZ bit of EFER is set",
        kind: Lenient(Rule::EferReserved, |_, caps, violation| {
            violation.value & !caps.efer_valid & !EFER_FFXSR == 0
        }),
    },
    Defect {
        emulator: Qemu,
        name: "EFER.LMSLE is refused",
        manual: "3.1.7: LMSLE is bit 13 of EFER; CPUID Fn8000_0008_EBX[EferLmsleUnsupported] = 1 \
                 indicates that it is not supported, which this processor does not say",
        kind: Strict(|vmcb, _| vmcb.efer() & EFER_LMSLE != 0),
    },
    Defect {
        emulator: Bochs,
        name: "long mode without protection stops the emulator",
        manual: "15.5.1: [illegal if] EFER.LME and CR0.PG are both non-zero and CR0.PE is zero",
        kind: Stops(Some(Rule::LongModeNeedsProtection), |vmcb, _| {
            long_mode(vmcb) && vmcb.cr0() & PE == 0
        }),
    },
    Defect {
        emulator: Bochs,
        name: "a page table beyond the physical limit crashes the emulator",
        manual: "15.5.1: [illegal if] any MBZ bit of CR3 is set",
        kind: Stops(None, |vmcb, caps| {
            let nested = vmcb.nested_control().contains(NestedControl::NP_ENABLE);
            vmcb.cr3() >= caps.physical_limit() && vmcb.cr0() & PG != 0 && !nested
        }),
    },
    Defect {
        emulator: Bochs,
        name: "CR3 is not checked",
        manual: "15.5.1: [illegal if] any MBZ bit of CR3 is set",
        kind: Lenient(Rule::Cr3Reserved, always),
    },
    Defect {
        emulator: Bochs,
        name: "reserved vectors below 32 are injected as exceptions",
        manual: "15.20: VMRUN exits with VMEXIT_INVALID [if] TYPE = 3 (exception) has been specified \
                 with a vector that does not correspond to an exception",
        kind: Lenient(Rule::EventVector, |vmcb, _, _| {
            vmcb.event_inj().vector() < 32
        }),
    },
    Defect {
        emulator: Bochs,
        name: "#BR and #OF are injected in 64-bit mode",
        manual: "15.20: if the VMM attempts to inject an event that is impossible for the guest mode \
                 (e.g., a #BR exception when the guest is in 64-bit mode), […] VMRUN will \
                 immediately exit with an error code of VMEXIT_INVALID",
        kind: Lenient(Rule::EventPossible, always),
    },
    Defect {
        emulator: Bochs,
        name: "EFER.TCE is refused",
        manual: "3.1.7: TCE is bit 15 of EFER; support is indicated by CPUID Fn8000_0001_ECX[17] = 1, \
                 as on this processor",
        kind: Strict(|vmcb, _| vmcb.efer() & EFER_TCE != 0),
    },
    Defect {
        emulator: Bochs,
        name: "EFER.LMSLE is refused",
        manual: "3.1.7: LMSLE is bit 13 of EFER; CPUID Fn8000_0008_EBX[EferLmsleUnsupported] = 1 \
                 indicates that it is not supported, which this processor does not say",
        kind: Strict(|vmcb, _| vmcb.efer() & EFER_LMSLE != 0),
    },
    Defect {
        emulator: Bochs,
        name: "only the first byte of the MSR permission map is checked",
        manual: "15.11: if the address of the last byte in the table is greater than or equal to the \
                 maximum supported physical address, this is treated as illegal",
        kind: Lenient(Rule::MsrpmAddress, |_, caps, violation| {
            violation.value < caps.physical_limit()
        }),
    },
    Defect {
        emulator: Bochs,
        name: "only the first byte of the I/O permission map is checked",
        manual: "15.10.1: if the address of the last byte in the IOPM is greater than or equal to the \
                 maximum supported physical address, this is treated as illegal",
        kind: Lenient(Rule::IopmAddress, |_, caps, violation| {
            violation.value < caps.physical_limit()
        }),
    },
    Defect {
        emulator: Bochs,
        name: "CS.L with CS.D is refused outside long mode too",
        manual: "15.5.1: [illegal if] EFER.LME, CR0.PG, CR4.PAE, CS.L, and CS.D are all non-zero",
        kind: Strict(|vmcb, _| {
            let both = SegmentAttributes::LONG | SegmentAttributes::DEFAULT_BIG;
            vmcb.segment(SegmentRegister::Cs).attributes.contains(both)
        }),
    },
];
