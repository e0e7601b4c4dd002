//! The checks that a VM entry makes (SDM vol. 3C, chapter 29), without a VM entry.
//!
//! [`check_entry`] looks at a VMCS as the processor would and reports every violated [`Rule`], in the
//! manual's order, with the field, its value, and what the processor would do. The same code
//! explains a failed entry to a person, guards one before it is tried, and decides for a guest
//! hypervisor's VMLAUNCH.
//!
//! The processor may make the checks of controls and host state (29.2) in any order, and those of
//! guest state (29.3) too; it reports one violation. [`Violations::outcomes`] has all that it may
//! report.
//!
//! An SMM-transfer monitor's entries have checks of their own where they return from SMM (34.15.4.1 to
//! 34.15.4.4). Of these only the one of the link pointer is here: no other software can make such an entry.
//!
//! ```
//! use testudo_vmx::caps::fixtures;
//! use testudo_vmx::check::{Rule, check_entry, samples};
//! use testudo_vmx::{VmcsWrite, fields};
//!
//! let caps = fixtures::skylake_sp();
//! let mut vmcs = samples::valid(&caps);
//! assert!(check_entry(&vmcs, &caps)?.is_empty());
//!
//! vmcs.set(fields::GUEST_RFLAGS, 0)?;
//! let violations = check_entry(&vmcs, &caps)?;
//! assert_eq!(violations[0].rule, Rule::RflagsReserved);
//! assert_eq!(
//!     violations[0].to_string(),
//!     "The reserved bits of guest RFLAGS are 0, and bit 1 is 1. (SDM vol. 3C, 29.3.1.4), \
//!      but GUEST_RFLAGS is 0x0"
//! );
//! # Ok::<(), testudo_vmx::AccessError>(())
//! ```

use core::fmt;
use core::ops::Deref;

use arrayvec::ArrayVec;
use testudo_arch::Hpa;

use crate::caps::{Processor, VmxCaps};
use crate::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    SecondaryExitControls, TertiaryControls,
};
use crate::encoding::{Access, Encoding, Field, Width};
use crate::error::AccessError;
use crate::fields;
use crate::vmcs::VmcsRead;

mod controls;
mod guest;
mod host;
mod memory;
mod msr;
mod rules;
pub mod samples;
mod segments;
#[cfg(test)]
mod tests;

pub use memory::check_memory;
pub use rules::{Outcome, Rule};

/// A violated rule, and the field that violates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// The field whose value is wrong; where a rule relates several, the one to change first.
    pub field: Encoding,
    /// Its value.
    pub value: u64,
    /// For a refused MSR, its entry in the area.
    entry: u32,
}

impl Violation {
    /// What the processor does.
    #[inline]
    pub fn outcome(&self) -> Outcome {
        match self.rule.outcome() {
            Outcome::MsrLoading { .. } => Outcome::MsrLoading { entry: self.entry },
            outcome => outcome,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, but {} is {:#x}", self.rule, self.field, self.value)
    }
}

/// The violated rules of one VMCS, in the manual's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    found: ArrayVec<Violation, { Violations::MAX }>,
    applied: [u64; Rule::ALL.len().div_ceil(64)],
}

impl Violations {
    /// The largest number that is listed: the first ones, each rule once.
    pub const MAX: usize = 64;

    /// Whether the processor may react to these violations in this way. Controls and host state
    /// are checked before guest state, and guest state before MSRs are loaded.
    pub fn outcomes(&self) -> impl Iterator<Item = Outcome> + '_ {
        let stage = |outcome: Outcome| match outcome {
            Outcome::VmFail(_) => 0,
            Outcome::GuestState(_) => 1,
            Outcome::MsrLoading { .. } => 2,
        };
        let first = self.found.iter().map(|v| stage(v.outcome())).min();
        let outcomes = self.found.iter().map(Violation::outcome);
        outcomes.filter(move |outcome| Some(stage(*outcome)) == first)
    }

    /// The violated rules.
    pub fn rules(&self) -> impl Iterator<Item = Rule> + '_ {
        self.found.iter().map(|v| v.rule)
    }

    /// Whether the rule applied: its condition was met, and its fields were looked at.
    pub fn applied(&self, rule: Rule) -> bool {
        let index = rule as usize;
        self.applied[index / 64] & (1 << (index % 64)) != 0
    }

    fn apply(&mut self, rule: Rule) {
        let index = rule as usize;
        self.applied[index / 64] |= 1 << (index % 64);
    }

    /// Lists the violation at its rule's place, unless the rule is listed already.
    fn push(&mut self, violation: Violation) {
        self.apply(violation.rule);
        let Err(place) = self.found.binary_search_by_key(&violation.rule, |v| v.rule) else {
            return;
        };
        if self.found.is_full() {
            // The last ones in the manual's order go without mention.
            if place == self.found.len() {
                return;
            }
            self.found.pop();
        }
        self.found.insert(place, violation);
    }
}

impl Deref for Violations {
    type Target = [Violation];

    fn deref(&self) -> &[Violation] {
        &self.found
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("no rule is violated");
        }
        for (i, violation) in self.iter().enumerate() {
            let gap = if i > 0 { "\n" } else { "" };
            write!(f, "{gap}{violation}")?;
        }
        Ok(())
    }
}

/// What a VM entry depends on besides the VMCS and the processor's capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryContext {
    /// Whether the processor is in IA-32e mode when it executes VMLAUNCH or VMRESUME.
    pub long_mode: bool,
    /// Whether it is in system-management mode.
    pub in_smm: bool,
    /// The physical address of the VMCS, where it is known.
    pub current_vmcs: Option<Hpa>,
    /// Whether it traces (IA32_RTIT_CTL.TraceEn).
    pub tracing: bool,
    /// Whether it is in secure-arbitration mode.
    pub in_seam: bool,
}

impl Default for EntryContext {
    /// In IA-32e mode, outside SMM and SEAM, without a trace.
    fn default() -> Self {
        Self {
            long_mode: true,
            in_smm: false,
            current_vmcs: None,
            tracing: false,
            in_seam: false,
        }
    }
}

/// Checks everything that a VM entry from IA-32e mode checks and that can be told without reading
/// memory.
///
/// # Errors
///
/// A VMREAD failed of a field that a processor with these capabilities has.
pub fn check_entry(vmcs: &impl VmcsRead, caps: &VmxCaps) -> Result<Violations, AccessError> {
    check_entry_from(vmcs, caps, &EntryContext::default())
}

/// As [`check_entry`], for an entry from the given context.
///
/// # Errors
///
/// A VMREAD failed of a field that a processor with these capabilities has.
pub fn check_entry_from(
    vmcs: &impl VmcsRead,
    caps: &VmxCaps,
    context: &EntryContext,
) -> Result<Violations, AccessError> {
    let mut checker = Checker::new(vmcs, caps, context)?;
    controls::check(&mut checker)?;
    host::check(&mut checker)?;
    guest::check_registers(&mut checker)?;
    segments::check(&mut checker)?;
    guest::check_rest(&mut checker)?;
    Ok(checker.found)
}

/// One run of the checks.
struct Checker<'a, V> {
    vmcs: &'a V,
    caps: &'a VmxCaps,
    context: &'a EntryContext,
    words: Words,
    found: Violations,
}

/// The control words. Bits that the processor does not allow are left out once they are reported,
/// so that no check reads a field that the processor does not have.
#[derive(Clone, Copy)]
struct Words {
    pin: PinControls,
    primary: PrimaryControls,
    secondary: SecondaryControls,
    tertiary: TertiaryControls,
    exit: ExitControls,
    exit2: SecondaryExitControls,
    entry: EntryControls,
}

impl<'a, V: VmcsRead> Checker<'a, V> {
    fn new(vmcs: &'a V, caps: &'a VmxCaps, context: &'a EntryContext) -> Result<Self, AccessError> {
        let words = Words {
            pin: PinControls::from_bits_retain(vmcs.get(fields::PIN_CONTROLS)?),
            primary: PrimaryControls::from_bits_retain(vmcs.get(fields::PRIMARY_CONTROLS)?),
            secondary: SecondaryControls::empty(),
            tertiary: TertiaryControls::empty(),
            exit: ExitControls::from_bits_retain(vmcs.get(fields::EXIT_CONTROLS)?),
            exit2: SecondaryExitControls::empty(),
            entry: EntryControls::from_bits_retain(vmcs.get(fields::ENTRY_CONTROLS)?),
        };
        Ok(Self {
            vmcs,
            caps,
            context,
            words,
            found: Violations::default(),
        })
    }

    // Inlined, so that the place of a field named by a constant is a constant.
    #[inline(always)]
    fn get<W: Width, A: Access>(&self, field: Field<W, A>) -> Result<W::Value, AccessError> {
        self.vmcs.get(field)
    }

    /// Reports `rule` unless `ok`.
    #[inline(always)]
    fn require(&mut self, ok: bool, rule: Rule, field: impl Into<Encoding>, value: u64) {
        self.found.apply(rule);
        if !ok {
            self.violated(rule, field.into(), value);
        }
    }

    #[cold]
    fn violated(&mut self, rule: Rule, field: Encoding, value: u64) {
        self.found.push(Violation {
            rule,
            field,
            value,
            entry: 0,
        });
    }

    /// Checks an address of a structure: its low `zeros` bits, and the physical-address width.
    fn require_address(
        &mut self,
        rule: Rule,
        field: Field<u64>,
        zeros: u64,
    ) -> Result<(), AccessError> {
        let address = self.get(field)?;
        let ok = address & zeros == 0 && !self.exceeds_physical(address);
        self.require(ok, rule, field, address);
        Ok(())
    }

    /// Checks an MSR area: 16-byte aligned, and its last byte within the physical-address width.
    fn require_msr_area(
        &mut self,
        rule: Rule,
        count: Field<u32>,
        address: Field<u64>,
    ) -> Result<(), AccessError> {
        let count = u64::from(self.get(count)?);
        if count == 0 {
            return Ok(());
        }
        let start = self.get(address)?;
        let last = start.checked_add(count * 16 - 1);
        let inside = last.is_some_and(|last| !self.exceeds_physical(last));
        let ok = start & 0xF == 0 && inside && !self.exceeds_physical(start);
        self.require(ok, rule, address, start);
        Ok(())
    }

    /// Whether an address of a VMX structure has bits that it must not have.
    fn exceeds_physical(&self, address: u64) -> bool {
        let narrow = self.caps.basic.addresses_are_32_bit() && address >> 32 != 0;
        narrow || self.caps.processor.exceeds_physical(address)
    }

    /// Whether an address that is loaded into an MSR or a base register is canonical. What counts
    /// is the width that the processor supports, whatever the paging mode.
    fn is_canonical(&self, address: u64) -> bool {
        Processor::is_canonical(address, self.caps.processor.linear_address_bits)
    }

    fn require_canonical(
        &mut self,
        rule: Rule,
        field: Field<crate::encoding::Natural>,
    ) -> Result<(), AccessError> {
        let address = self.get(field)?;
        self.require(self.is_canonical(address), rule, field, address);
        Ok(())
    }

    /// Checks the FRED MSRs: configuration, stack pointers of levels 1 to 3, shadow-stack pointers of
    /// levels 1 to 3. Their addresses are canonical.
    fn require_fred(&mut self, rule: Rule, fields: [Field<u64>; 7]) -> Result<(), AccessError> {
        const RESERVED: [u64; 7] = [
            FRED_CONFIG_RESERVED,
            FRED_RSP_RESERVED,
            FRED_RSP_RESERVED,
            FRED_RSP_RESERVED,
            FRED_SSP_RESERVED,
            FRED_SSP_RESERVED,
            FRED_SSP_RESERVED,
        ];
        for (field, reserved) in fields.into_iter().zip(RESERVED) {
            let value = self.get(field)?;
            let ok = value & reserved == 0 && self.is_canonical(value);
            self.require(ok, rule, field, value);
        }
        Ok(())
    }

    fn unrestricted(&self) -> bool {
        self.words
            .secondary
            .contains(SecondaryControls::UNRESTRICTED_GUEST)
    }

    fn long_mode_guest(&self) -> bool {
        self.words.entry.contains(EntryControls::IA32E_MODE_GUEST)
    }
}

/// Whether each byte is a memory type that IA32_PAT may hold (SDM vol. 3A, table 12-10).
const fn is_valid_pat(pat: u64) -> bool {
    let bytes = pat.to_le_bytes();
    let mut i = 0;
    while i < 8 {
        if !matches!(bytes[i], 0 | 1 | 4 | 5 | 6 | 7) {
            return false;
        }
        i += 1;
    }
    true
}

/// Whether the reserved bits 9:6 of IA32_S_CET are 0, and not both SUPPRESS and TRACKER are 1.
const fn is_valid_cet(value: u64) -> bool {
    value & 0x3C0 == 0 && value & 0xC00 != 0xC00
}

/// The bits of IA32_EFER that the processor has: SCE, LME, LMA and NXE (SDM vol. 3A, 2.2.1).
fn efer_bits(caps: &VmxCaps) -> u64 {
    use crate::caps::ProcessorFeatures as F;
    let features = caps.processor.features;
    let long = if features.contains(F::LONG_MODE) {
        0x500
    } else {
        0
    };
    let syscall = u64::from(features.contains(F::SYSCALL));
    let execute_disable = if features.contains(F::EXECUTE_DISABLE) {
        1 << 11
    } else {
        0
    };
    long | syscall | execute_disable
}

const CR0_PE: u64 = 1 << 0;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_CET: u64 = 1 << 23;
const CR4_FRED: u64 = 1 << 32;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Bits 2, 5:4 and 11 of IA32_FRED_CONFIG.
const FRED_CONFIG_RESERVED: u64 = 0x834;
/// The stacks of FRED are 64-byte aligned.
const FRED_RSP_RESERVED: u64 = 0x3F;
/// Its shadow stacks are 8-byte aligned.
const FRED_SSP_RESERVED: u64 = 7;

/// Bits 62:61 of CR3, which select linear-address masking on processors that have it.
fn cr3_lam_bits(caps: &VmxCaps) -> u64 {
    let lam = caps
        .processor
        .features
        .contains(crate::caps::ProcessorFeatures::LAM);
    if lam { 3 << 61 } else { 0 }
}
