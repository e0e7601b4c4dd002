//! The consistency checks of VMRUN as data (APM vol. 2, 15.5.1 and the sections that add to it).
//!
//! [`check_vmrun`] says of a VMCB what the processor would object to, without a processor. A host
//! asks it before an entry or after VMEXIT_INVALID, which by itself says nothing; an emulator of
//! VMRUN for a guest hypervisor asks it instead of the processor.
//!
//! What VMRUN does *not* check is not here: segment bases, SSP and ISST_ADDR are sign-extended, not
//! checked; a RIP outside CS or not canonical is a `#GP` in the guest; reserved encodings of
//! TLB_CONTROL, reserved bits of EVENTINJ and of the interrupt controls are ignored; and a feature
//! bit whose feature the processor lacks does nothing.
//!
//! ```
//! use testudo_svm::caps::SvmCaps;
//! use testudo_svm::check::{Outside, Rule, check_vmrun};
//! use testudo_svm::intercept::Misc2;
//! use testudo_svm::vmcb::Vmcb;
//!
//! let mut vmcb = Vmcb::new();
//! vmcb.set_intercept_misc2(Misc2::VMRUN);
//! vmcb.set_efer(1 << 12);
//! let violations = check_vmrun(&vmcb, &SvmCaps::ZEN2, &Outside::default());
//! assert_eq!(violations[0].rule, Rule::AsidNotZero);
//! assert_eq!(
//!     violations.to_string(),
//!     "asid = 0x0: the ASID must not be zero, which is the host's (APM vol. 2, 15.5.1)"
//! );
//! vmcb.set_asid(1);
//! assert!(check_vmrun(&vmcb, &SvmCaps::ZEN2, &Outside::default()).is_empty());
//! ```

mod rule;

use core::fmt;
use core::ops::Deref;

use arrayvec::ArrayVec;
use testudo_arch::memory::{GuestMemory, MemoryFault};
use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr0Flags, Cr4Flags, EferFlags, Gpa, RFlags};

use crate::caps::{Features, SvmCaps};
use crate::defects::Defects;
use crate::event::EventType;
use crate::intercept::{Misc1, Misc2};
use crate::permission::{IoPermissionMap, MsrPermissionMap};
use crate::vmcb::{NestedControl, VintrFlags, Vmcb};

pub use rule::Rule;

/// What VMRUN looks at beside the VMCB and the processor's features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside {
    /// CR0 of the host that executes VMRUN.
    pub host_cr0: u64,
    /// The MSR U_CET, which VMRUN does not load (for SEV-ES guests the VMCB's field counts).
    pub u_cet: u64,
}

impl Default for Outside {
    /// A host with paging and without user-mode CET.
    fn default() -> Self {
        Self {
            host_cr0: PG | PE,
            u_cet: 0,
        }
    }
}

/// A rule that a VMCB breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// The value of the field that the rule is about.
    pub value: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} = {:#x}: {}",
            self.rule.field(),
            self.value,
            self.rule
        )
    }
}

/// The rules that a VMCB breaks, each once, in the manual's order. Empty: the guest would run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations(ArrayVec<Violation, { Rule::ALL.len() }>);

impl Violations {
    #[inline]
    fn check(&mut self, rule: Rule, satisfied: bool, value: u64) {
        if !satisfied {
            self.0.push(Violation { rule, value });
        }
    }

    /// Whether this rule is broken.
    pub fn breaks(&self, rule: Rule) -> bool {
        self.0.iter().any(|violation| violation.rule == rule)
    }
}

impl Deref for Violations {
    type Target = [Violation];

    fn deref(&self) -> &[Violation] {
        &self.0
    }
}

impl fmt::Display for Violations {
    /// One violation a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            let newline = if i > 0 { "\n" } else { "" };
            write!(f, "{newline}{violation}")?;
        }
        Ok(())
    }
}

const PE: u64 = Cr0Flags::PROTECTED_MODE_ENABLE.bits();
const WP: u64 = Cr0Flags::WRITE_PROTECT.bits();
const NW: u64 = Cr0Flags::NOT_WRITE_THROUGH.bits();
const CD: u64 = Cr0Flags::CACHE_DISABLE.bits();
const PG: u64 = Cr0Flags::PAGING.bits();
const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const CET: u64 = 1 << 23;
const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();

/// The accessed bit of the entries that have one.
const ACCESSED: u64 = 1 << 5;

/// The bits that AMD defines in S_CET and U_CET: SH_STK_EN and WR_SHSTK_EN.
const CET_DEFINED: u64 = 0b11;
const SH_STK_EN: u64 = 1;
/// CPUID Fn8000_001F EAX: SEV-ES.
const SEV_ES_SUPPORTED: u32 = 1 << 3;

/// Checks a VMCB against every rule that needs no memory access.
#[inline]
pub fn check_vmrun(vmcb: &Vmcb, caps: &SvmCaps, outside: &Outside) -> Violations {
    let mut found = Violations::default();
    check_state(vmcb, caps, &mut found);
    check_controls(vmcb, caps, &mut found);
    check_cet(vmcb, caps, outside, &mut found);
    check_nested_paging(vmcb, caps, outside, &mut found);
    check_interrupts(vmcb, caps, &mut found);
    found
}

fn check_state(vmcb: &Vmcb, caps: &SvmCaps, found: &mut Violations) {
    let (cr0, cr3, cr4, efer) = (vmcb.cr0(), vmcb.cr3(), vmcb.cr4(), vmcb.efer());
    let (dr6, dr7) = (vmcb.dr6(), vmcb.dr7());
    found.check(Rule::EferSvme, efer & SVME != 0, efer);
    found.check(Rule::Cr0CacheMode, cr0 & (CD | NW) != NW, cr0);
    found.check(Rule::Cr0High, cr0 >> 32 == 0, cr0);
    found.check(Rule::Cr3Reserved, cr3 < caps.physical_limit(), cr3);
    found.check(Rule::Cr4Reserved, cr4 & !caps.cr4_valid == 0, cr4);
    found.check(Rule::Dr6High, dr6 >> 32 == 0, dr6);
    found.check(Rule::Dr7High, dr7 >> 32 == 0, dr7);
    let defined = caps.efer_valid | SVME | LME | LMA;
    found.check(Rule::EferReserved, efer & !defined == 0, efer);
    let long_mode = efer & (LME | LMA) != 0;
    found.check(Rule::LongModeSupported, !long_mode || caps.long_mode, efer);
    if efer & LME != 0 && cr0 & PG != 0 {
        found.check(Rule::LongModeNeedsPae, cr4 & PAE != 0, cr4);
        found.check(Rule::LongModeNeedsProtection, cr0 & PE != 0, cr0);
        let cs = vmcb.segment(SegmentRegister::Cs).attributes;
        let both = SegmentAttributes::LONG | SegmentAttributes::DEFAULT_BIG;
        let satisfied = cr4 & PAE == 0 || !cs.contains(both);
        found.check(Rule::CodeSegmentSize, satisfied, u64::from(cs.to_svm()));
    }
}

fn check_controls(vmcb: &Vmcb, caps: &SvmCaps, found: &mut Violations) {
    let misc2 = vmcb.intercept_misc2();
    let intercepted = misc2.contains(Misc2::VMRUN);
    found.check(Rule::VmrunIntercept, intercepted, u64::from(misc2.bits()));
    // "The VMRUN instruction ignores the lower 12 bits of the address […]. If the address of the
    // last byte […] is greater than or equal to the maximum supported physical address, this is
    // treated as illegal VMCB state". Bits above 52 make the address larger still.
    let fits = |address: u64, size: usize| {
        (address & !0xFFF)
            .checked_add(size as u64)
            .is_some_and(|end| end <= caps.physical_limit())
    };
    let (msrpm, iopm) = (vmcb.msrpm_base_pa(), vmcb.iopm_base_pa());
    found.check(
        Rule::MsrpmAddress,
        fits(msrpm, MsrPermissionMap::SIZE),
        msrpm,
    );
    found.check(Rule::IopmAddress, fits(iopm, IoPermissionMap::SIZE), iopm);
    check_event(vmcb, caps, found);
    let asid = vmcb.asid();
    found.check(Rule::AsidNotZero, asid != 0, u64::from(asid));
}

fn check_event(vmcb: &Vmcb, caps: &SvmCaps, found: &mut Violations) {
    let event = vmcb.event_inj();
    if !event.is_valid() {
        return;
    }
    let kind = event.event_type();
    let defined = !matches!(kind, EventType::Reserved(_));
    found.check(Rule::EventType, defined, event.0);
    if kind == EventType::Exception {
        let vector = event.vector();
        let exists = is_exception(vector, caps);
        found.check(Rule::EventVector, exists, event.0);
        // "If the VMM attempts to inject an event that is impossible for the guest mode (e.g., a
        // #BR exception when the guest is in 64-bit mode) […] VMRUN will immediately exit with an
        // error code of VMEXIT_INVALID."
        let impossible = matches!(vector, 4 | 5) && in_64_bit_mode(vmcb);
        found.check(Rule::EventPossible, !impossible, event.0);
    }
}

/// Whether a vector is that of an exception on a processor with these features (APM vol. 2,
/// table 8-1). Vector 2 is the NMI; 9 and 20 are exceptions elsewhere.
const fn is_exception(vector: u8, caps: &SvmCaps) -> bool {
    match vector {
        0 | 1 | 3..=8 | 10..=14 | 16..=19 | 28 | 30 => true,
        21 => caps.cr4_valid & CET != 0,
        29 => caps.encryption & SEV_ES_SUPPORTED != 0,
        _ => false,
    }
}

fn in_64_bit_mode(vmcb: &Vmcb) -> bool {
    let long = vmcb.efer() & LME != 0 && vmcb.cr0() & PG != 0;
    let cs = vmcb.segment(SegmentRegister::Cs).attributes;
    long && cs.contains(SegmentAttributes::LONG)
}

fn check_cet(vmcb: &Vmcb, caps: &SvmCaps, outside: &Outside, found: &mut Violations) {
    if caps.cr4_valid & CET == 0 {
        return;
    }
    let s_cet = vmcb.s_cet();
    found.check(Rule::SCetReserved, s_cet & !CET_DEFINED == 0, s_cet);
    let sev_es = vmcb.nested_control().contains(NestedControl::SEV_ES)
        && caps.encryption & SEV_ES_SUPPORTED != 0;
    let u_cet = if sev_es { vmcb.u_cet() } else { outside.u_cet };
    if vmcb.cr4() & CET != 0 {
        let cr0 = vmcb.cr0();
        found.check(Rule::CetNeedsWriteProtect, cr0 & WP != 0, cr0);
        let virtual_8086 = vmcb.rflags() & RFlags::VIRTUAL_8086_MODE.bits() != 0;
        let meet = virtual_8086 && u_cet & SH_STK_EN != 0;
        found.check(Rule::ShadowStackInVirtual8086, !meet, u_cet);
    }
    if sev_es {
        found.check(Rule::UCetReserved, u_cet & !CET_DEFINED == 0, u_cet);
    }
}

fn check_nested_paging(vmcb: &Vmcb, caps: &SvmCaps, outside: &Outside, found: &mut Violations) {
    let control = vmcb.nested_control();
    if !control.contains(NestedControl::NP_ENABLE) || !caps.has(Features::NP) {
        return;
    }
    let paging = outside.host_cr0 & PG != 0;
    found.check(Rule::NestedPagingNeedsPaging, paging, control.bits());
    let (n_cr3, g_pat) = (vmcb.n_cr3(), vmcb.g_pat());
    found.check(Rule::NCr3Reserved, n_cr3 < caps.physical_limit(), n_cr3);
    found.check(Rule::GPatTypes, has_defined_types(g_pat), g_pat);
}

/// Whether each byte is UC, WC, WT, WP, WB or UC-: 0, 1, or 4 to 7 (APM vol. 2, table 7-9). All eight are
/// looked at in one go: none has bits beyond the third, and where the second is, the third is too.
fn has_defined_types(pat: u64) -> bool {
    const ALL: u64 = u64::MAX / 0xFF;
    pat & (0xF8 * ALL) == 0 && (pat & (2 * ALL)) << 1 & !pat == 0
}

fn check_interrupts(vmcb: &Vmcb, caps: &SvmCaps, found: &mut Violations) {
    let interrupts = vmcb.virtual_interrupts();
    let avic = interrupts.contains(VintrFlags::AVIC_ENABLE) && caps.has(Features::AVIC);
    let x2avic = interrupts.contains(VintrFlags::X2AVIC_ENABLE) && caps.has(Features::X2AVIC);
    found.check(Rule::X2AvicNeedsAvic, avic || !x2avic, interrupts.0);
    if avic {
        let legal = |address: u64| address < caps.physical_limit();
        let (page, logical) = (vmcb.avic_backing_page(), vmcb.avic_logical_table());
        let physical = vmcb.avic_physical_table();
        found.check(Rule::AvicBackingPage, legal(page), page);
        found.check(Rule::AvicLogicalTable, legal(logical), logical);
        found.check(Rule::AvicPhysicalTable, legal(physical.0), physical.0);
        let last = match (x2avic, caps.x2avic_extended) {
            (false, _) => 255,
            (true, false) => 511,
            (true, true) => 4095,
        };
        let satisfied = physical.max_index() <= last;
        found.check(Rule::AvicMaxIndex, satisfied, physical.0);
    }
    if interrupts.contains(VintrFlags::V_NMI_ENABLE) && caps.has(Features::V_NMI) {
        let misc1 = vmcb.intercept_misc1();
        let satisfied = misc1.contains(Misc1::NMI);
        found.check(Rule::VnmiNeedsIntercept, satisfied, u64::from(misc1.bits()));
    }
}

/// Checks the four page-directory pointers that VMRUN reads for a guest in PAE paging without
/// nested paging: "setting any reserved bits in the PDPEs also causes a #VMEXIT" (APM vol. 2,
/// 15.5.1). The violation's value is the pointer. What the processor puts there itself, by one of
/// these `defects`, is none.
///
/// # Errors
///
/// CR3 points outside the memory.
pub fn check_pdpes(
    vmcb: &Vmcb,
    caps: &SvmCaps,
    defects: Defects,
    memory: &impl GuestMemory,
) -> Result<Option<Violation>, MemoryFault> {
    let paging = vmcb.cr0() & (PG | PE) == PG | PE;
    let pae = paging && vmcb.cr4() & PAE != 0 && vmcb.efer() & LME == 0;
    let nested = vmcb.nested_control().contains(NestedControl::NP_ENABLE) && caps.has(Features::NP);
    if !pae || nested {
        return Ok(None);
    }
    // Bits 2:1 and 8:5, and those beyond the physical address (APM vol. 2, figure 5-10).
    let mut reserved = 0b1_1110_0110 | !(caps.physical_limit() - 1);
    if defects.contains(Defects::MARKS_PDPES) {
        reserved &= !ACCESSED;
    }
    let table = Gpa(vmcb.cr3() & 0xFFFF_FFE0);
    for index in 0..4 {
        let value = memory.load_u64(table.wrapping_add(8 * index))?;
        if value & 1 != 0 && value & reserved != 0 {
            return Ok(Some(Violation {
                rule: Rule::PdpeReserved,
                value,
            }));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
