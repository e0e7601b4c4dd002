//! A state as a list of changes to a valid one.

use core::fmt;

use arrayvec::ArrayVec;
use testudo_vmx::check::{EntryContext, Rule, samples};
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, Encoding, VmcsRead, VmcsWrite, VmxCaps, fields};

use crate::arena::{Arena, Frame};

/// The largest number of changes.
pub(crate) const MAX_CHANGES: usize = 24;

/// A state: what is done to the valid one, in order.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) changes: ArrayVec<Change, MAX_CHANGES>,
}

/// One change.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// The guest is in another mode.
    Mode(Mode),
    /// A feature is used, as it should be.
    Feature(Feature),
    /// A rule is violated by its sample.
    Violate(Rule),
    /// A field has this value.
    Set(Encoding, u64),
    /// These bits of a field are inverted.
    Flip(Encoding, u64),
}

/// The modes of a guest besides 64-bit mode.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    Compatibility,
    Protected,
    Pae,
    Virtual8086,
    Real,
    User,
}

/// Features with all that belongs to them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Feature {
    Ept,
    Unrestricted,
    Pml,
    ModeBasedExecute,
    SubPages,
    EptpSwitching,
    Vpid,
    TprShadow,
    X2apic,
    ApicRegisters,
    VirtualInterrupts,
    PostedInterrupts,
    ApicAccesses,
    IoBitmaps,
    MsrBitmaps,
    VmcsShadowing,
    VirtualizationException,
    TscScaling,
    VirtualNmis,
    NmiWindow,
    SaveTimer,
    Pat,
    PerfGlobalCtrl,
    DebugControls,
    StoreMsrs,
    LoadMsrsOnExit,
    LoadMsrsOnEntry,
    LoadPat,
    LoadReservedEfer,
    LoadLongEfer,
    LoadLegacyEfer,
    LinkPointer,
    UnusableSegments,
}

impl Feature {
    pub(crate) const ALL: &[Self] = &[
        Self::Ept,
        Self::Unrestricted,
        Self::Pml,
        Self::ModeBasedExecute,
        Self::SubPages,
        Self::EptpSwitching,
        Self::Vpid,
        Self::TprShadow,
        Self::X2apic,
        Self::ApicRegisters,
        Self::VirtualInterrupts,
        Self::PostedInterrupts,
        Self::ApicAccesses,
        Self::IoBitmaps,
        Self::MsrBitmaps,
        Self::VmcsShadowing,
        Self::VirtualizationException,
        Self::TscScaling,
        Self::VirtualNmis,
        Self::NmiWindow,
        Self::SaveTimer,
        Self::Pat,
        Self::PerfGlobalCtrl,
        Self::DebugControls,
        Self::StoreMsrs,
        Self::LoadMsrsOnExit,
        Self::LoadMsrsOnEntry,
        Self::LoadPat,
        Self::LoadReservedEfer,
        Self::LoadLongEfer,
        Self::LoadLegacyEfer,
        Self::LinkPointer,
        Self::UnusableSegments,
    ];
}

impl State {
    /// Makes the state of the valid one.
    pub(crate) fn apply(
        &self,
        vmcs: &mut VmcsImage,
        caps: &VmxCaps,
        arena: &Arena,
    ) -> Result<(), AccessError> {
        for change in &self.changes {
            change.apply(vmcs, caps, arena)?;
        }
        Ok(())
    }
}

impl Change {
    fn apply(self, vmcs: &mut VmcsImage, caps: &VmxCaps, arena: &Arena) -> Result<(), AccessError> {
        match self {
            Self::Mode(mode) => mode.apply(vmcs, caps),
            Self::Feature(feature) => feature.apply(vmcs, caps, arena),
            Self::Violate(rule) => violate(rule, vmcs, caps, arena),
            Self::Set(field, value) => {
                write(vmcs, field, value);
                Ok(())
            }
            Self::Flip(field, bits) => {
                let old = vmcs.read_raw(field).unwrap_or_default();
                write(vmcs, field, old ^ bits);
                Ok(())
            }
        }
    }
}

/// An image has every field of the table, and the generator takes them from there.
fn write(vmcs: &mut VmcsImage, field: Encoding, value: u64) {
    let written = vmcs.write_raw(field, value);
    debug_assert!(written.is_ok());
}

fn violate(
    rule: Rule,
    vmcs: &mut VmcsImage,
    caps: &VmxCaps,
    arena: &Arena,
) -> Result<(), AccessError> {
    match rule {
        Rule::TprThresholdAboveVtpr => {
            Feature::TprShadow.apply(vmcs, caps, arena)?;
            vmcs.set(
                fields::TPR_THRESHOLD,
                u32::from(crate::arena::PRIORITY_CLASS) + 1,
            )
        }
        Rule::LinkPointerIsCurrent => vmcs.set(fields::VMCS_LINK_POINTER, arena.at(Frame::Vmcs)),
        Rule::LinkPointerRegion => vmcs.set(fields::VMCS_LINK_POINTER, arena.at(Frame::Zero)),
        Rule::MsrLoadRefused => {
            vmcs.set(fields::ENTRY_MSR_LOAD_ADDRESS, arena.at(Frame::BadMsrs))?;
            vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 2)
        }
        Rule::MsrValueRefused => {
            vmcs.set(fields::ENTRY_MSR_LOAD_ADDRESS, arena.at(Frame::BadAddress))?;
            vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 2)
        }
        _ => samples::violate(rule, vmcs, caps).map(|_| ()),
    }
}

/// Whether this processor can show the rule violated.
pub(crate) fn is_reachable(rule: Rule, base: &VmcsImage, caps: &VmxCaps) -> bool {
    match rule {
        Rule::TprThresholdAboveVtpr
        | Rule::LinkPointerIsCurrent
        | Rule::LinkPointerRegion
        | Rule::MsrLoadRefused
        | Rule::MsrValueRefused => true,
        // This program enters from 64-bit mode, outside SMM and SEAM, and traces nothing.
        _ => {
            samples::context(rule) == EntryContext::default()
                && samples::violate(rule, &mut base.clone(), caps).unwrap_or(false)
        }
    }
}

impl Mode {
    fn apply(self, vmcs: &mut VmcsImage, caps: &VmxCaps) -> Result<(), AccessError> {
        const CR4_PAE: u64 = 1 << 5;
        match self {
            Self::Compatibility => {
                vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xC09B)?;
                vmcs.set(fields::GUEST_RIP, 0x10_0000)
            }
            Self::Protected => samples::protected_mode(vmcs, caps),
            Self::Pae => {
                samples::protected_mode(vmcs, caps)?;
                let cr4 = vmcs.get(fields::GUEST_CR4)?;
                vmcs.set(fields::GUEST_CR4, cr4 | CR4_PAE)
            }
            Self::Virtual8086 => samples::virtual_8086_mode(vmcs, caps),
            Self::Real => samples::real_mode(vmcs, caps).map(|_| ()),
            Self::User => {
                vmcs.set(fields::GUEST_CS_SELECTOR, 0x0B)?;
                vmcs.set(fields::GUEST_CS_ACCESS_RIGHTS, 0xA0FB)?;
                vmcs.set(fields::GUEST_SS_SELECTOR, 3)?;
                vmcs.set(fields::GUEST_SS_ACCESS_RIGHTS, 0xC0F3)
            }
        }
    }
}

impl Feature {
    fn apply(self, vmcs: &mut VmcsImage, caps: &VmxCaps, arena: &Arena) -> Result<(), AccessError> {
        use SecondaryControls as S;
        let mut vmcs = Words { vmcs, caps };
        match self {
            Self::Ept => vmcs.ept(S::empty()),
            Self::Unrestricted => vmcs.ept(S::UNRESTRICTED_GUEST),
            Self::Pml => vmcs.ept(S::ENABLE_PML),
            Self::ModeBasedExecute => vmcs.ept(S::MODE_BASED_EXECUTE_CONTROL),
            Self::SubPages => vmcs.ept(S::SUB_PAGE_WRITE_PERMISSIONS),
            Self::EptpSwitching => {
                vmcs.ept(S::ENABLE_VM_FUNCTIONS)?;
                vmcs.vmcs
                    .set(fields::VM_FUNCTION_CONTROLS, caps.functions.bits() & 1)
            }
            Self::Vpid => vmcs.secondary(S::ENABLE_VPID),
            Self::TprShadow => vmcs.primary(PrimaryControls::USE_TPR_SHADOW),
            Self::X2apic => {
                vmcs.primary(PrimaryControls::USE_TPR_SHADOW)?;
                vmcs.secondary(S::VIRTUALIZE_X2APIC_MODE)
            }
            Self::ApicRegisters => {
                vmcs.primary(PrimaryControls::USE_TPR_SHADOW)?;
                vmcs.secondary(S::APIC_REGISTER_VIRTUALIZATION)
            }
            Self::VirtualInterrupts => {
                vmcs.primary(PrimaryControls::USE_TPR_SHADOW)?;
                vmcs.pin(PinControls::EXTERNAL_INTERRUPT_EXITING)?;
                vmcs.secondary(S::VIRTUAL_INTERRUPT_DELIVERY)
            }
            Self::PostedInterrupts => {
                Self::VirtualInterrupts.apply(vmcs.vmcs, caps, arena)?;
                vmcs.exit(ExitControls::ACKNOWLEDGE_INTERRUPT)?;
                vmcs.pin(PinControls::PROCESS_POSTED_INTERRUPTS)
            }
            Self::ApicAccesses => vmcs.secondary(S::VIRTUALIZE_APIC_ACCESSES),
            Self::IoBitmaps => vmcs.primary(PrimaryControls::USE_IO_BITMAPS),
            Self::MsrBitmaps => vmcs.primary(PrimaryControls::USE_MSR_BITMAPS),
            Self::VmcsShadowing => vmcs.secondary(S::VMCS_SHADOWING),
            Self::VirtualizationException => vmcs.ept(S::EPT_VIOLATION_VE),
            Self::TscScaling => vmcs.secondary(S::USE_TSC_SCALING),
            Self::VirtualNmis => vmcs.pin(PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS),
            Self::NmiWindow => {
                vmcs.pin(PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS)?;
                vmcs.primary(PrimaryControls::NMI_WINDOW_EXITING)
            }
            Self::SaveTimer => vmcs.exit(ExitControls::SAVE_PREEMPTION_TIMER),
            Self::Pat => {
                vmcs.exit(ExitControls::LOAD_PAT)?;
                vmcs.entry(EntryControls::LOAD_PAT)
            }
            Self::PerfGlobalCtrl => {
                vmcs.exit(ExitControls::LOAD_PERF_GLOBAL_CTRL)?;
                vmcs.entry(EntryControls::LOAD_PERF_GLOBAL_CTRL)
            }
            Self::DebugControls => vmcs.entry(EntryControls::LOAD_DEBUG_CONTROLS),
            Self::StoreMsrs => vmcs.vmcs.set(fields::EXIT_MSR_STORE_COUNT, 2),
            Self::LoadMsrsOnExit => vmcs.vmcs.set(fields::EXIT_MSR_LOAD_COUNT, 2),
            Self::LoadMsrsOnEntry => vmcs.vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 2),
            Self::LoadPat => vmcs.load_msr(arena.at(Frame::BadPat)),
            Self::LoadReservedEfer => vmcs.load_msr(arena.at(Frame::BadEfer)),
            Self::LoadLongEfer => vmcs.load_msr(arena.at(Frame::LongEfer)),
            Self::LoadLegacyEfer => vmcs.load_msr(arena.at(Frame::LegacyEfer)),
            Self::LinkPointer => {
                let words = S::from_bits_retain(vmcs.vmcs.get(fields::SECONDARY_CONTROLS)?);
                let shadow = words.contains(S::VMCS_SHADOWING);
                let frame = if shadow {
                    Frame::ShadowLink
                } else {
                    Frame::Link
                };
                vmcs.vmcs.set(fields::VMCS_LINK_POINTER, arena.at(frame))
            }
            Self::UnusableSegments => {
                for rights in [
                    fields::GUEST_DS_ACCESS_RIGHTS,
                    fields::GUEST_ES_ACCESS_RIGHTS,
                    fields::GUEST_FS_ACCESS_RIGHTS,
                    fields::GUEST_LDTR_ACCESS_RIGHTS,
                ] {
                    vmcs.vmcs.set(rights, 1 << 16)?;
                }
                Ok(())
            }
        }
    }
}

/// Sets controls where the processor offers them.
struct Words<'a> {
    vmcs: &'a mut VmcsImage,
    caps: &'a VmxCaps,
}

impl Words<'_> {
    fn pin(&mut self, bits: PinControls) -> Result<(), AccessError> {
        let old = self.vmcs.get(fields::PIN_CONTROLS)?;
        let bits = if self.caps.pin.allows(bits) {
            bits.bits()
        } else {
            0
        };
        self.vmcs.set(fields::PIN_CONTROLS, old | bits)
    }

    fn primary(&mut self, bits: PrimaryControls) -> Result<(), AccessError> {
        let old = self.vmcs.get(fields::PRIMARY_CONTROLS)?;
        let bits = if self.caps.primary.allows(bits) {
            bits.bits()
        } else {
            0
        };
        self.vmcs.set(fields::PRIMARY_CONTROLS, old | bits)
    }

    fn secondary(&mut self, bits: SecondaryControls) -> Result<(), AccessError> {
        self.primary(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)?;
        let old = self.vmcs.get(fields::SECONDARY_CONTROLS)?;
        let bits = if self.caps.secondary.allows(bits) {
            bits.bits()
        } else {
            0
        };
        self.vmcs.set(fields::SECONDARY_CONTROLS, old | bits)
    }

    fn ept(&mut self, more: SecondaryControls) -> Result<(), AccessError> {
        samples::enable_ept(self.vmcs, self.caps)?;
        self.secondary(more)
    }

    fn exit(&mut self, bits: ExitControls) -> Result<(), AccessError> {
        let old = self.vmcs.get(fields::EXIT_CONTROLS)?;
        let bits = if self.caps.exit.allows(bits) {
            bits.bits()
        } else {
            0
        };
        self.vmcs.set(fields::EXIT_CONTROLS, old | bits)
    }

    fn load_msr(&mut self, area: u64) -> Result<(), AccessError> {
        self.vmcs.set(fields::ENTRY_MSR_LOAD_ADDRESS, area)?;
        self.vmcs.set(fields::ENTRY_MSR_LOAD_COUNT, 1)
    }

    fn entry(&mut self, bits: EntryControls) -> Result<(), AccessError> {
        let old = self.vmcs.get(fields::ENTRY_CONTROLS)?;
        let bits = if self.caps.entry.allows(bits) {
            bits.bits()
        } else {
            0
        };
        self.vmcs.set(fields::ENTRY_CONTROLS, old | bits)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.changes.is_empty() {
            return f.write_str("nothing changed");
        }
        for (i, change) in self.changes.iter().enumerate() {
            let gap = if i > 0 { ", " } else { "" };
            match change {
                Change::Mode(mode) => write!(f, "{gap}{mode:?} mode")?,
                Change::Feature(feature) => write!(f, "{gap}{feature:?}")?,
                Change::Violate(rule) => write!(f, "{gap}not {}", rule.name())?,
                Change::Set(field, value) => write!(f, "{gap}{field} = {value:#x}")?,
                Change::Flip(field, bits) => write!(f, "{gap}{field} ^ {bits:#x}")?,
            }
        }
        Ok(())
    }
}
