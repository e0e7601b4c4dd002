//! A VMCS that a processor accepts, and for every rule one that has to do with it and one that
//! violates it alone.
//!
//! For tests, fuzzers, and runs against a real implementation. Everything here is a few writes to a
//! VMCS, so that it works on any that starts out valid.
//!
//! ```
//! use testudo_vmx::caps::fixtures;
//! use testudo_vmx::check::{Rule, check_entry, samples};
//! use testudo_vmx::fake::FakeVmcs;
//!
//! let caps = fixtures::haswell();
//! let mut vmcs = FakeVmcs::with_caps(&caps);
//! for (field, value) in samples::valid(&caps).iter() {
//!     vmcs.preset(field, value);
//! }
//! assert!(samples::involve(Rule::VpidZero, &mut vmcs, &caps)?);
//! assert!(check_entry(&vmcs, &caps)?.applied(Rule::VpidZero));
//!
//! assert!(samples::violate(Rule::VpidZero, &mut vmcs, &caps)?);
//! let found: Vec<_> = check_entry(&vmcs, &caps)?.rules().collect();
//! assert_eq!(found, [Rule::VpidZero]);
//! # Ok::<(), testudo_vmx::AccessError>(())
//! ```

use testudo_arch::Hpa;

use super::{
    CR0_PE, CR0_PG, CR4_CET, CR4_FRED, CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, EntryContext, Rule,
};
use crate::caps::{EptVpidCaps, ProcessorFeatures, VmxCaps};
use crate::controls::{
    ControlWord, EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
    SecondaryExitControls, TertiaryControls,
};
use crate::encoding::{Field, Natural};
use crate::error::AccessError;
use crate::fields;
use crate::image::VmcsImage;
use crate::vmcs::{VmcsRead, VmcsWrite};

/// A VMCS that passes every check on a processor with these capabilities: a 64-bit guest and a 64-bit
/// host, no optional control but those that load and save IA32_EFER.
///
/// All addresses are 0 but the VMCS link pointer, which is all ones.
pub fn valid(caps: &VmxCaps) -> VmcsImage {
    let mut vmcs = VmcsImage::new();
    match write_valid(&mut vmcs, caps) {
        Ok(()) => vmcs,
        Err(error) => unreachable!("an image has every field: {error}"),
    }
}

fn write_valid(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), AccessError> {
    let pin = caps.pin.must_be_one();
    let primary = caps.primary.must_be_one();
    let exit = caps.exit.must_be_one()
        | ExitControls::HOST_ADDRESS_SPACE_SIZE
        | (caps.exit.may_be_one() & ExitControls::LOAD_EFER);
    let entry = caps.entry.must_be_one()
        | EntryControls::IA32E_MODE_GUEST
        | (caps.entry.may_be_one() & EntryControls::LOAD_EFER);
    vmcs.set(fields::PIN_CONTROLS, pin.bits())?;
    vmcs.set(fields::PRIMARY_CONTROLS, primary.bits())?;
    vmcs.set(fields::EXIT_CONTROLS, exit.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, entry.bits())?;

    let efer = EFER_LMA | EFER_LME;
    let cr4 = caps.cr4.ones | CR4_PAE;
    let code = 0xFFFF_8000_0010_0000;
    vmcs.set(fields::HOST_CR0, caps.cr0.ones)?;
    vmcs.set(fields::HOST_CR4, cr4)?;
    vmcs.set(fields::HOST_CS_SELECTOR, 0x08)?;
    vmcs.set(fields::HOST_TR_SELECTOR, 0x18)?;
    vmcs.set(fields::HOST_RIP, code)?;
    if caps.exit.allows(ExitControls::LOAD_EFER) {
        vmcs.set(fields::HOST_EFER, efer)?;
    }

    vmcs.set(fields::GUEST_CR0, caps.cr0.ones)?;
    vmcs.set(fields::GUEST_CR4, cr4)?;
    vmcs.set(fields::GUEST_DR7, 0x400)?;
    vmcs.set(fields::GUEST_RIP, code)?;
    vmcs.set(fields::GUEST_RFLAGS, 2)?;
    if caps.entry.allows(EntryControls::LOAD_EFER) {
        vmcs.set(fields::GUEST_EFER, efer)?;
    }
    vmcs.set(fields::GUEST_CS_SELECTOR, 0x08)?;
    vmcs.set(fields::GUEST_CS_LIMIT, u32::MAX)?;
    vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xA09B)?;
    for (limit, rights) in DATA_SEGMENTS {
        vmcs.set(limit, u32::MAX)?;
        vmcs.set(rights, 0xC093)?;
    }
    vmcs.set(fields::GUEST_TR_SELECTOR, 0x18)?;
    vmcs.set(fields::GUEST_TR_LIMIT, 0x67)?;
    vmcs.set(fields::GUEST_TR_ACCESS_RIGHTS, 0x8B)?;
    vmcs.set(fields::GUEST_LDTR_ACCESS_RIGHTS, 0x82)?;
    vmcs.set(fields::VMCS_LINK_POINTER, u64::MAX)
}

const DATA_SEGMENTS: [(Field<u32>, Field<u32>); 5] = [
    (fields::GUEST_SS_LIMIT, fields::GUEST_SS_ACCESS_RIGHTS),
    (fields::GUEST_DS_LIMIT, fields::GUEST_DS_ACCESS_RIGHTS),
    (fields::GUEST_ES_LIMIT, fields::GUEST_ES_ACCESS_RIGHTS),
    (fields::GUEST_FS_LIMIT, fields::GUEST_FS_ACCESS_RIGHTS),
    (fields::GUEST_GS_LIMIT, fields::GUEST_GS_ACCESS_RIGHTS),
];

/// An address that is not canonical, whatever the width.
const NOT_CANONICAL: u64 = 0x4000_0000_0000_0000;

const UNUSABLE: u32 = 1 << 16;

/// The page-attribute table after reset.
const GOOD_PAT: u64 = 0x0007_0406_0007_0406;

/// One with a byte that it may not hold.
const BAD_PAT: u64 = 2;

/// What a sample does to a VMCS, with the capabilities at hand.
struct Editor<'a, V> {
    vmcs: &'a mut V,
    caps: &'a VmxCaps,
}

/// `Ok(None)`: the processor has not got what the rule is about.
type Edit = Result<Option<()>, AccessError>;

/// Goes on only where the processor has what is asked for.
macro_rules! wants {
    ($condition:expr) => {
        if !$condition {
            return Ok(None);
        }
    };
}

macro_rules! enable {
    ($e:ident, $caps:ident, $field:ident, $type:ident, $($bit:ident)|+) => {{
        let bits = $($type::$bit)|+;
        wants!($e.caps.$caps.allows(bits));
        let old = $e.vmcs.get(fields::$field)?;
        $e.vmcs.set(fields::$field, old | bits.bits())?;
    }};
}

macro_rules! pin {
    ($e:ident, $($bit:ident)|+) => { enable!($e, pin, PIN_CONTROLS, PinControls, $($bit)|+) };
}

macro_rules! primary {
    ($e:ident, $($bit:ident)|+) => {
        enable!($e, primary, PRIMARY_CONTROLS, PrimaryControls, $($bit)|+)
    };
}

macro_rules! secondary {
    ($e:ident, $($bit:ident)|+) => {{
        wants!($e.activate_secondary()?.is_some());
        enable!($e, secondary, SECONDARY_CONTROLS, SecondaryControls, $($bit)|+)
    }};
}

macro_rules! tertiary {
    ($e:ident, $($bit:ident)|+) => {{
        wants!($e.activate_tertiary()?.is_some());
        enable!($e, tertiary, TERTIARY_CONTROLS, TertiaryControls, $($bit)|+)
    }};
}

macro_rules! exit {
    ($e:ident, $($bit:ident)|+) => { enable!($e, exit, EXIT_CONTROLS, ExitControls, $($bit)|+) };
}

macro_rules! exit2 {
    ($e:ident, $($bit:ident)|+) => {{
        exit!($e, ACTIVATE_SECONDARY_CONTROLS);
        enable!($e, exit2, SECONDARY_EXIT_CONTROLS, SecondaryExitControls, $($bit)|+)
    }};
}

macro_rules! entry {
    ($e:ident, $($bit:ident)|+) => {
        enable!($e, entry, ENTRY_CONTROLS, EntryControls, $($bit)|+)
    };
}

/// Clears a control.
macro_rules! disable {
    ($e:ident, $field:ident, $type:ident, $bit:ident) => {{
        let old = $e.vmcs.get(fields::$field)?;
        $e.vmcs.set(fields::$field, old & !$type::$bit.bits())?;
        Ok(Some(()))
    }};
}

// After the macros, which they use.
mod controls;
mod guest;
mod host;

/// The current VMCS in [`context`], and the executive VMCS in samples.
const OTHER_VMCS: u64 = 0x5000;

/// The context in which the samples of `rule` are to be looked at: for most rules the usual one.
///
/// The others are about entries from SMM, from SEAM, from outside IA-32e mode, of a processor that
/// traces, or about the address of the current VMCS.
pub fn context(rule: Rule) -> EntryContext {
    let usual = EntryContext::default();
    match rule {
        Rule::SeamNeedsEpt | Rule::SeamSharedEptp => EntryContext {
            in_seam: true,
            ..usual
        },
        Rule::RtitCtlWhileTracing => EntryContext {
            tracing: true,
            ..usual
        },
        Rule::EntrySmmExclusive
        | Rule::ActivitySmm
        | Rule::InterruptibilitySmmEntry
        | Rule::LinkPointerIsExecutive => EntryContext {
            in_smm: true,
            ..usual
        },
        Rule::HostSsNull
        | Rule::HostLongModeFromLegacy
        | Rule::LegacyHostLongGuest
        | Rule::LegacyHostPcide
        | Rule::LegacyHostFred
        | Rule::LegacyHostRip
        | Rule::LegacyHostCet => EntryContext {
            long_mode: false,
            ..usual
        },
        Rule::LinkPointerIsCurrent => EntryContext {
            current_vmcs: Some(Hpa(OTHER_VMCS)),
            ..usual
        },
        _ => usual,
    }
}

/// Makes a valid VMCS one that has to do with `rule` and satisfies every rule, in [`context`];
/// `Ok(false)` where the processor lacks what the rule is about.
///
/// `vmcs` holds what [`valid`] wrote, possibly with other addresses and another host state. Of rules
/// that read memory, the memory is the caller's affair.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn involve(rule: Rule, vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<bool, AccessError> {
    Ok(Editor { vmcs, caps }.involve(rule)?.is_some())
}

/// Makes a valid VMCS violate `rule` and no other, in [`context`]; `Ok(false)` where no VMCS can, on
/// a processor with these capabilities, and for rules that read memory. (On no processor can one do
/// so for [`Rule::LegacyHostLongGuest`], which two other rules imply.)
///
/// `vmcs` holds what [`valid`] wrote, possibly with other addresses and another host state.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn violate(rule: Rule, vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<bool, AccessError> {
    let mut editor = Editor { vmcs, caps };
    if editor.involve(rule)?.is_none() {
        return Ok(false);
    }
    Ok(editor.violate(rule)?.is_some())
}

/// Makes a valid VMCS one for a guest in 32-bit protected mode without paging extensions, if the
/// processor can have it without more ado: paging stays on.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn protected_mode(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), AccessError> {
    Editor { vmcs, caps }.protected_mode()
}

/// Makes a valid VMCS one for a guest in virtual-8086 mode.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn virtual_8086_mode(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<(), AccessError> {
    Editor { vmcs, caps }.virtual_8086_mode()
}

/// Makes a valid VMCS one for a guest in real mode; `Ok(false)` if the processor has no unrestricted
/// guests.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn real_mode(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<bool, AccessError> {
    Ok(Editor { vmcs, caps }.real_mode()?.is_some())
}

/// Enables EPT in a valid VMCS, with the frame that the EPT pointer already names; `Ok(false)` if
/// the processor has none.
///
/// # Errors
///
/// An access to the VMCS failed.
pub fn enable_ept(vmcs: &mut impl VmcsWrite, caps: &VmxCaps) -> Result<bool, AccessError> {
    Ok(Editor { vmcs, caps }.enable_ept()?.is_some())
}

impl<V: VmcsWrite> Editor<'_, V> {
    fn activate_secondary(&mut self) -> Edit {
        primary!(self, ACTIVATE_SECONDARY_CONTROLS);
        Ok(Some(()))
    }

    fn activate_tertiary(&mut self) -> Edit {
        primary!(self, ACTIVATE_TERTIARY_CONTROLS);
        Ok(Some(()))
    }

    fn enable_ept(&mut self) -> Edit {
        secondary!(self, ENABLE_EPT);
        let memory_type = if self.caps.ept_vpid.contains(EptVpidCaps::WRITE_BACK) {
            6
        } else {
            0
        };
        let frame = self.vmcs.get(fields::EPT_POINTER)? & !0xFFF;
        self.vmcs
            .set(fields::EPT_POINTER, frame | 3 << 3 | memory_type)?;
        Ok(Some(()))
    }

    fn set(&mut self, field: Field<u64>, value: u64) -> Edit {
        self.vmcs.set(field, value)?;
        Ok(Some(()))
    }

    fn set_natural(&mut self, field: Field<Natural>, value: u64) -> Edit {
        self.vmcs.set(field, value)?;
        Ok(Some(()))
    }

    fn set32(&mut self, field: Field<u32>, value: u32) -> Edit {
        self.vmcs.set(field, value)?;
        Ok(Some(()))
    }

    fn set16(&mut self, field: Field<u16>, value: u16) -> Edit {
        self.vmcs.set(field, value)?;
        Ok(Some(()))
    }

    fn flip32(&mut self, field: Field<u32>, bits: u32) -> Edit {
        let old = self.vmcs.get(field)?;
        self.set32(field, old ^ bits)
    }

    fn flip_natural(&mut self, field: Field<Natural>, bits: u64) -> Edit {
        let old = self.vmcs.get(field)?;
        self.set_natural(field, old ^ bits)
    }

    /// The address with its lowest bit inverted.
    fn misalign(&mut self, field: Field<u64>) -> Edit {
        let old = self.vmcs.get(field)?;
        self.set(field, old ^ 1)
    }

    fn beyond_physical(&self) -> u64 {
        1 << self.caps.processor.physical_address_bits
    }

    fn clear_entry(&mut self, bits: EntryControls) -> Result<(), AccessError> {
        let old = self.vmcs.get(fields::ENTRY_CONTROLS)?;
        self.vmcs.set(fields::ENTRY_CONTROLS, old & !bits.bits())
    }

    fn protected_mode(&mut self) -> Result<(), AccessError> {
        self.clear_entry(EntryControls::IA32E_MODE_GUEST)?;
        if self.caps.entry.allows(EntryControls::LOAD_EFER) {
            self.vmcs.set(fields::GUEST_EFER, 0)?;
        }
        let cr4 = self.vmcs.get(fields::GUEST_CR4)?;
        self.vmcs
            .set(fields::GUEST_CR4, cr4 & !(CR4_PAE | CR4_PCIDE))?;
        self.vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B)?;
        self.vmcs.set(fields::GUEST_RIP, 0x10_0000)
    }

    fn pae_paging(&mut self) -> Result<(), AccessError> {
        self.protected_mode()?;
        let cr4 = self.vmcs.get(fields::GUEST_CR4)?;
        self.vmcs.set(fields::GUEST_CR4, cr4 | CR4_PAE)
    }

    fn virtual_8086_mode(&mut self) -> Result<(), AccessError> {
        self.protected_mode()?;
        self.vmcs.set(fields::GUEST_RIP, 0x1000)?;
        self.vmcs.set(fields::GUEST_RFLAGS, 2 | 1 << 17)?;
        self.vmcs.set(fields::GUEST_CS_SELECTOR, 0)?;
        self.vmcs.set(fields::GUEST_CS_LIMIT, 0xFFFF)?;
        self.vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xF3)?;
        for (limit, rights) in DATA_SEGMENTS {
            self.vmcs.set(limit, 0xFFFF)?;
            self.vmcs.set(rights, 0xF3)?;
        }
        Ok(())
    }

    fn real_mode(&mut self) -> Edit {
        wants!(self.enable_ept()?.is_some());
        secondary!(self, UNRESTRICTED_GUEST);
        self.protected_mode()?;
        let cr0 = self.vmcs.get(fields::GUEST_CR0)?;
        self.vmcs.set(fields::GUEST_CR0, cr0 & !(CR0_PE | CR0_PG))?;
        self.vmcs.set(fields::GUEST_RIP, 0xFFF0)?;
        self.vmcs.set(fields::GUEST_CS_LIMIT, 0xFFFF)?;
        self.vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0x9B)?;
        for (limit, rights) in DATA_SEGMENTS {
            self.vmcs.set(limit, 0xFFFF)?;
            self.vmcs.set(rights, 0x93)?;
        }
        Ok(Some(()))
    }

    /// A guest that uses FRED, in 64-bit mode.
    fn fred(&mut self) -> Edit {
        wants!(self.caps.cr4.may & CR4_FRED != 0);
        let cr4 = self.vmcs.get(fields::GUEST_CR4)?;
        self.set_natural(fields::GUEST_CR4, cr4 | CR4_FRED)
    }

    /// CPL 3 everywhere, with code of these rights at DPL 3.
    fn user_mode(&mut self, code: u32) -> Result<(), AccessError> {
        self.vmcs.set(fields::GUEST_CS_SELECTOR, 0x0B)?;
        self.vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, code)?;
        self.vmcs.set(fields::GUEST_SS_SELECTOR, 3)?;
        self.vmcs.set(fields::GUEST_SS_ACCESS_RIGHTS, 0xC0F3)
    }

    /// Injects an event of this type.
    fn inject(&mut self, information: u32) -> Edit {
        self.set32(
            fields::ENTRY_INTERRUPTION_INFORMATION,
            1 << 31 | information,
        )
    }

    fn forbid<C: ControlWord>(
        &mut self,
        field: Field<u32>,
        allowed: crate::caps::Allowed<C>,
    ) -> Edit {
        // A bit that may not be 1, or else one that must be.
        let unknown = !allowed.may_be_one().to_u64() as u32;
        let required = allowed.must_be_one().to_u64() as u32;
        let bit = |bits: u32| {
            if bits == 0 {
                0
            } else {
                1 << bits.trailing_zeros()
            }
        };
        if required != 0 {
            self.flip32(field, bit(required))
        } else {
            wants!(unknown != 0);
            self.flip32(field, bit(unknown))
        }
    }

    fn involve(&mut self, rule: Rule) -> Edit {
        // Rules are ordered as in the manual.
        if rule < Rule::HostCr0Fixed {
            self.involve_controls(rule)
        } else if rule < Rule::GuestCr0Fixed {
            self.involve_host(rule)
        } else if rule < Rule::TrTi {
            self.involve_guest_registers(rule)
        } else {
            self.involve_guest_rest(rule)
        }
    }

    fn violate(&mut self, rule: Rule) -> Edit {
        if rule < Rule::HostCr0Fixed {
            self.violate_controls(rule)
        } else if rule < Rule::GuestCr0Fixed {
            self.violate_host(rule)
        } else if rule < Rule::TrTi {
            self.violate_guest_registers(rule)
        } else if rule < Rule::DescriptorTableBase {
            self.violate_segments(rule)
        } else {
            self.violate_guest_rest(rule)
        }
    }
}
