//! The join of L0's controls with L1's: a list of what L1 may decide, as a value.

use testudo_vmx::clock::GuestTsc;
use testudo_vmx::controls::{
    EntryControls, ExceptionBitmap, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::{apic, visible};

/// What L0 itself needs, as it stands in `vmcs01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields' own names")]
pub struct L0Controls {
    pub pin: PinControls,
    pub primary: PrimaryControls,
    pub secondary: SecondaryControls,
    pub exit: ExitControls,
    pub entry: EntryControls,
    pub exceptions: u32,
    pub msr_bitmap: u64,
    pub tsc: GuestTsc,
    pub ept_pointer: u64,
    pub cr0_mask: u64,
    pub cr4_mask: u64,
    /// L1's own state, which L2 gets where L1's VMCS does not say otherwise.
    pub dr7: u64,
    pub debugctl: u64,
    pub pat: u64,
    pub efer: u64,
}

impl L0Controls {
    /// Reads them.
    pub(super) fn read(vmcs01: &impl VmcsRead) -> Result<Self, AccessError> {
        let exit = ExitControls::from_bits_retain(vmcs01.get(fields::EXIT_CONTROLS)?);
        let entry = EntryControls::from_bits_retain(vmcs01.get(fields::ENTRY_CONTROLS)?);
        let primary = PrimaryControls::from_bits_retain(vmcs01.get(fields::PRIMARY_CONTROLS)?);
        let mut secondary = SecondaryControls::empty();
        if primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            secondary =
                SecondaryControls::from_bits_retain(vmcs01.get(fields::SECONDARY_CONTROLS)?);
        }
        let if_set = |set, field| if set { vmcs01.get(field) } else { Ok(0) };
        Ok(Self {
            pin: PinControls::from_bits_retain(vmcs01.get(fields::PIN_CONTROLS)?),
            primary,
            secondary,
            exit,
            entry,
            exceptions: vmcs01.get(fields::EXCEPTION_BITMAP)?,
            msr_bitmap: if_set(
                primary.contains(PrimaryControls::USE_MSR_BITMAPS),
                fields::MSR_BITMAPS,
            )?,
            tsc: read_clock(vmcs01, primary, secondary)?,
            ept_pointer: if_set(
                secondary.contains(SecondaryControls::ENABLE_EPT),
                fields::EPT_POINTER,
            )?,
            cr0_mask: vmcs01.get(fields::CR0_GUEST_HOST_MASK)?,
            cr4_mask: vmcs01.get(fields::CR4_GUEST_HOST_MASK)?,
            dr7: vmcs01.get(fields::GUEST_DR7)?,
            debugctl: vmcs01.get(fields::GUEST_DEBUGCTL)?,
            pat: if_set(entry.contains(EntryControls::LOAD_PAT), fields::GUEST_PAT)?,
            efer: if_set(entry.contains(EntryControls::LOAD_EFER), fields::GUEST_EFER)?,
        })
    }
}

/// The control words of L1's VMCS, as far as they count: without the secondary controls being
/// activated, those are zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Controls {
    pub(super) pin: PinControls,
    pub(super) primary: PrimaryControls,
    pub(super) secondary: SecondaryControls,
    pub(super) exit: ExitControls,
    pub(super) entry: EntryControls,
}

impl L1Controls {
    #[inline]
    pub(super) fn read(vmcs12: &VmcsImage) -> Result<Self, AccessError> {
        let primary = PrimaryControls::from_bits_retain(vmcs12.get(fields::PRIMARY_CONTROLS)?);
        let mut secondary = SecondaryControls::empty();
        if primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            secondary =
                SecondaryControls::from_bits_retain(vmcs12.get(fields::SECONDARY_CONTROLS)?);
        }
        Ok(Self {
            pin: PinControls::from_bits_retain(vmcs12.get(fields::PIN_CONTROLS)?),
            primary,
            secondary,
            exit: ExitControls::from_bits_retain(vmcs12.get(fields::EXIT_CONTROLS)?),
            entry: EntryControls::from_bits_retain(vmcs12.get(fields::ENTRY_CONTROLS)?),
        })
    }

    /// Whether L1's VMCS has a primary control, for who looks at nothing else.
    #[inline(always)]
    pub(super) fn has_primary(
        vmcs12: &VmcsImage,
        control: PrimaryControls,
    ) -> Result<bool, AccessError> {
        let primary = vmcs12.get(fields::PRIMARY_CONTROLS)?;
        Ok(PrimaryControls::from_bits_retain(primary).contains(control))
    }

    /// The same of a secondary control.
    #[inline(always)]
    pub(super) fn has_secondary(
        vmcs12: &VmcsImage,
        control: SecondaryControls,
    ) -> Result<bool, AccessError> {
        let secondary = vmcs12.get(fields::SECONDARY_CONTROLS)?;
        Ok(
            Self::has_primary(vmcs12, PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)?
                && SecondaryControls::from_bits_retain(secondary).contains(control),
        )
    }
}

/// Pin-based controls that L1 decides. NMI exiting is L0's always, and so is external-interrupt exiting,
/// unless L0 leaves the machine's interrupts to L1: then L1's guest exits for them if L1 wants it.
const PIN: PinControls = PinControls::EXTERNAL_INTERRUPT_EXITING
    .union(PinControls::VIRTUAL_NMIS)
    .union(PinControls::ACTIVATE_PREEMPTION_TIMER);

/// Primary controls that only ask for more exits, or are about L2 alone.
const PRIMARY: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING
    .union(PrimaryControls::USE_TSC_OFFSETTING)
    .union(PrimaryControls::HLT_EXITING)
    .union(PrimaryControls::INVLPG_EXITING)
    .union(PrimaryControls::MWAIT_EXITING)
    .union(PrimaryControls::RDPMC_EXITING)
    .union(PrimaryControls::RDTSC_EXITING)
    .union(PrimaryControls::CR3_LOAD_EXITING)
    .union(PrimaryControls::CR3_STORE_EXITING)
    .union(PrimaryControls::CR8_LOAD_EXITING)
    .union(PrimaryControls::CR8_STORE_EXITING)
    .union(PrimaryControls::NMI_WINDOW_EXITING)
    .union(PrimaryControls::MOV_DR_EXITING)
    .union(PrimaryControls::MONITOR_TRAP_FLAG)
    .union(PrimaryControls::MONITOR_EXITING)
    .union(PrimaryControls::PAUSE_EXITING);

/// Primary controls of L0's that are about L1's own run: its windows, and the bitmaps, which have
/// their own rule.
const ABOUT_L1: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING
    .union(PrimaryControls::NMI_WINDOW_EXITING)
    .union(PrimaryControls::USE_TPR_SHADOW)
    .union(PrimaryControls::MONITOR_TRAP_FLAG)
    .union(PrimaryControls::USE_IO_BITMAPS)
    .union(PrimaryControls::USE_MSR_BITMAPS);

/// Secondary controls that only ask for more exits.
const SECONDARY_EXITS: SecondaryControls = SecondaryControls::DESCRIPTOR_TABLE_EXITING
    .union(SecondaryControls::WBINVD_EXITING)
    .union(SecondaryControls::RDRAND_EXITING)
    .union(SecondaryControls::RDSEED_EXITING);

/// Secondary controls that give L2 an instruction or a mode, which it has if both allow it.
const SECONDARY_GRANTS: SecondaryControls =
    SecondaryControls::ENABLE_RDTSCP.union(SecondaryControls::ENABLE_INVPCID);

/// Secondary controls of L0's that stay as they are.
const SECONDARY_L0: SecondaryControls = SecondaryControls::ENABLE_EPT
    .union(SecondaryControls::ENABLE_VPID)
    .union(SecondaryControls::DESCRIPTOR_TABLE_EXITING)
    .union(SecondaryControls::WBINVD_EXITING)
    .union(SecondaryControls::RDRAND_EXITING)
    .union(SecondaryControls::RDSEED_EXITING)
    .union(SecondaryControls::ENABLE_ENCLS_EXITING)
    .union(SecondaryControls::CONCEAL_VMX_FROM_PT)
    .union(SecondaryControls::VMM_BUS_LOCK_DETECTION)
    .union(SecondaryControls::INSTRUCTION_TIMEOUT);

/// Every control field of `vmcs02` that L1 has a say in, and the guest fields that depend on controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields' own names")]
pub struct Joined {
    pub pin: PinControls,
    pub primary: PrimaryControls,
    pub secondary: SecondaryControls,
    pub exit: ExitControls,
    pub entry: EntryControls,
    pub exceptions: u32,
    pub page_fault_mask: u32,
    pub page_fault_match: u32,
    pub tsc_offset: u64,
    pub tsc_multiplier: u64,
    pub ept_pointer: u64,
    /// The EPT is a composition of L1's with L0's.
    pub is_composed: bool,
    pub msr_bitmap: u64,
    pub virtual_apic: u64,
    pub apic_access: u64,
    pub tpr_threshold: u32,
    pub eoi_exits: [u64; 4],
    pub cr0_mask: u64,
    pub cr4_mask: u64,
    pub cr0_shadow: u64,
    pub cr4_shadow: u64,
    pub cr0: u64,
    pub cr4: u64,
    pub dr7: u64,
    pub debugctl: u64,
    pub pat: u64,
    pub efer: u64,
}

/// What the join needs besides the two sets of controls.
pub(super) struct Fixed {
    pub(super) cr0: testudo_vmx::caps::FixedBits,
    pub(super) cr4: testudo_vmx::caps::FixedBits,
    /// The EPT pointer of the composition, if L1 uses EPT.
    pub(super) composed: Option<u64>,
    pub(super) msr_bitmap: u64,
    pub(super) frames: apic::Frames,
    /// The processor can save L2's preemption timer at each exit, so that it goes on after one that
    /// L0 handles, whether or not L1 wants to see what is left.
    pub(super) saves_timer: bool,
    /// What L0 asks of L2 alone.
    pub(super) pin: PinControls,
}

const PE_PG: u64 = 1 | 1 << 31;
const PAGE_FAULT: u32 = ExceptionBitmap::PAGE_FAULT.bits();
const LMA: u64 = 1 << 10;
const LME: u64 = 1 << 8;
const PG: u64 = 1 << 31;

impl Joined {
    pub(super) fn new(
        l0: &L0Controls,
        vmcs12: &VmcsImage,
        l1: &L1Controls,
        fixed: &Fixed,
    ) -> Result<Self, AccessError> {
        let pin = (l0.pin - PinControls::PROCESS_POSTED_INTERRUPTS)
            | PinControls::NMI_EXITING
            | (l1.pin & PIN)
            | fixed.pin;

        let mut primary = (l0.primary - ABOUT_L1) | (l1.primary & PRIMARY);
        if l1.primary.contains(PrimaryControls::USE_TPR_SHADOW) {
            primary |= PrimaryControls::USE_TPR_SHADOW;
        } else {
            // L2 has no task-priority register but L1's, so its CR8 always exits.
            primary |= PrimaryControls::CR8_LOAD_EXITING | PrimaryControls::CR8_STORE_EXITING;
        }
        // Every port exits: L0 leaves none to its guests, and routing asks L1's bitmaps.
        primary |= PrimaryControls::UNCONDITIONAL_IO_EXITING;
        let bitmaps = PrimaryControls::USE_MSR_BITMAPS;
        primary.set(bitmaps, (l0.primary & l1.primary).contains(bitmaps));

        let mut secondary = (l0.secondary & SECONDARY_L0)
            | (l1.secondary & (SECONDARY_EXITS | apic::CONTROLS))
            | (l0.secondary & l1.secondary & SECONDARY_GRANTS);
        // L2 may be unpaged only if L1 says so; what L1 itself may does not matter.
        let unrestricted = SecondaryControls::UNRESTRICTED_GUEST;
        secondary.set(unrestricted, l1.secondary.contains(unrestricted));
        let scaling = SecondaryControls::USE_TSC_SCALING;
        secondary.set(scaling, (l0.secondary | l1.secondary).contains(scaling));
        if !secondary.is_empty() {
            primary |= PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        }

        let mut exit = l0.exit;
        exit.set(
            ExitControls::SAVE_PREEMPTION_TIMER,
            fixed.saves_timer && l1.pin.contains(PinControls::ACTIVATE_PREEMPTION_TIMER),
        );
        // Where the interrupts are L1's, it also says whether an exit acknowledges them.
        if !l0.pin.contains(PinControls::EXTERNAL_INTERRUPT_EXITING) {
            let acknowledge = ExitControls::ACKNOWLEDGE_INTERRUPT;
            exit.set(acknowledge, l1.exit.contains(acknowledge));
        }
        let long = EntryControls::IA32E_MODE_GUEST;
        let entry = (l0.entry - long) | (l1.entry & long);

        let (exceptions, page_fault_mask, page_fault_match) = join_exceptions(l0, vmcs12)?;

        // L2's clock is made from L1's, and that from the processor's.
        let clock = l0.tsc.nested(read_clock(vmcs12, l1.primary, l1.secondary)?);
        // Two small factors can make a product of 0, which the processor refuses.
        let tsc_multiplier = clock.multiplier.max(1);
        let tsc_offset = clock.offset;

        let (cr0, cr4) = (
            vmcs12.get(fields::GUEST_CR0)?,
            vmcs12.get(fields::GUEST_CR4)?,
        );
        let cr0_mask12 = vmcs12.get(fields::CR0_GUEST_HOST_MASK)?;
        let cr4_mask12 = vmcs12.get(fields::CR4_GUEST_HOST_MASK)?;
        let cr0_shadow12 = vmcs12.get(fields::CR0_READ_SHADOW)?;
        let cr4_shadow12 = vmcs12.get(fields::CR4_READ_SHADOW)?;
        let except = if l1.secondary.contains(unrestricted) {
            PE_PG
        } else {
            0
        };
        let fixed_cr0 = fixed.cr0.apply(cr0);

        let keep = |own: bool, field| {
            if own {
                vmcs12.get(field).map(Some)
            } else {
                Ok(None)
            }
        };
        let debug = l1.entry.contains(EntryControls::LOAD_DEBUG_CONTROLS);
        let pat = keep(
            l1.entry.contains(EntryControls::LOAD_PAT),
            fields::GUEST_PAT,
        )?;
        let efer = keep(
            l1.entry.contains(EntryControls::LOAD_EFER),
            fields::GUEST_EFER,
        )?;
        Ok(Self {
            pin,
            primary,
            secondary,
            exit,
            entry,
            exceptions,
            page_fault_mask,
            page_fault_match,
            tsc_offset,
            tsc_multiplier,
            ept_pointer: fixed.composed.unwrap_or(l0.ept_pointer),
            is_composed: fixed.composed.is_some(),
            msr_bitmap: if primary.contains(bitmaps) {
                fixed.msr_bitmap
            } else {
                l0.msr_bitmap
            },
            virtual_apic: fixed.frames.virtual_apic,
            apic_access: fixed.frames.apic_access,
            tpr_threshold: vmcs12.get(fields::TPR_THRESHOLD)?,
            eoi_exits: if apic::delivers_interrupts(l1) {
                [
                    vmcs12.get(fields::EOI_EXIT_BITMAP_0)?,
                    vmcs12.get(fields::EOI_EXIT_BITMAP_1)?,
                    vmcs12.get(fields::EOI_EXIT_BITMAP_2)?,
                    vmcs12.get(fields::EOI_EXIT_BITMAP_3)?,
                ]
            } else {
                [0; 4]
            },
            cr0_mask: l0.cr0_mask | cr0_mask12,
            cr4_mask: l0.cr4_mask | cr4_mask12,
            cr0_shadow: visible(cr0, cr0_mask12, cr0_shadow12),
            cr4_shadow: visible(cr4, cr4_mask12, cr4_shadow12),
            cr0: (fixed_cr0 & !except) | (cr0 & except),
            cr4: fixed.cr4.apply(cr4),
            dr7: if debug {
                vmcs12.get(fields::GUEST_DR7)?
            } else {
                l0.dr7
            },
            debugctl: keep(debug, fields::GUEST_DEBUGCTL)?.unwrap_or(l0.debugctl),
            pat: pat.unwrap_or(l0.pat),
            efer: efer.unwrap_or_else(|| inherited_efer(l0.efer, l1.entry, cr0)),
        })
    }

    /// Writes to `vmcs02` what differs from `last`.
    pub(super) fn write(
        &self,
        last: Option<&Self>,
        vmcs02: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        macro_rules! put {
            ($($field:ident <- $value:ident $(. $bits:ident())?;)*) => {$(
                if last.is_none_or(|last| last.$value != self.$value) {
                    vmcs02.set(fields::$field, self.$value $(.$bits())?)?;
                }
            )*};
        }
        put! {
            PIN_CONTROLS <- pin.bits();
            PRIMARY_CONTROLS <- primary.bits();
            EXIT_CONTROLS <- exit.bits();
            ENTRY_CONTROLS <- entry.bits();
            EXCEPTION_BITMAP <- exceptions;
            PAGE_FAULT_ERROR_CODE_MASK <- page_fault_mask;
            PAGE_FAULT_ERROR_CODE_MATCH <- page_fault_match;
            TSC_OFFSET <- tsc_offset;
            CR0_GUEST_HOST_MASK <- cr0_mask;
            CR4_GUEST_HOST_MASK <- cr4_mask;
            CR0_READ_SHADOW <- cr0_shadow;
            CR4_READ_SHADOW <- cr4_shadow;
        }
        // Fields that count only under a control are written only under it, so what the last entry
        // has here may never have been written: a change of the controls writes them too.
        let switched =
            last.is_none_or(|l| l.primary != self.primary || l.secondary != self.secondary);
        macro_rules! put_under {
            ($($condition:expr => $field:ident <- $value:ident $(. $bits:ident())?;)*) => {$(
                if $condition && (switched || last.is_none_or(|l| l.$value != self.$value)) {
                    vmcs02.set(fields::$field, self.$value $(.$bits())?)?;
                }
            )*};
        }
        let (primary, secondary) = (self.primary, self.secondary);
        put_under! {
            primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS)
                => SECONDARY_CONTROLS <- secondary.bits();
            primary.contains(PrimaryControls::USE_MSR_BITMAPS) => MSR_BITMAPS <- msr_bitmap;
            secondary.contains(SecondaryControls::ENABLE_EPT) => EPT_POINTER <- ept_pointer;
            secondary.contains(SecondaryControls::USE_TSC_SCALING)
                => TSC_MULTIPLIER <- tsc_multiplier;
        }
        if self.has_frames() {
            self.write_apic(last, vmcs02)?;
        }
        // L2 changes these by itself, so the last entry's say nothing.
        vmcs02.set(fields::GUEST_CR0, self.cr0)?;
        vmcs02.set(fields::GUEST_CR4, self.cr4)?;
        vmcs02.set(fields::GUEST_DR7, self.dr7)?;
        vmcs02.set(fields::GUEST_DEBUGCTL, self.debugctl)?;
        if self.entry.contains(EntryControls::LOAD_PAT) {
            vmcs02.set(fields::GUEST_PAT, self.pat)?;
        }
        if self.entry.contains(EntryControls::LOAD_EFER) {
            vmcs02.set(fields::GUEST_EFER, self.efer)?;
        }
        Ok(())
    }
}

impl Joined {
    /// Whether `vmcs02` names frames of L1's memory.
    pub(super) fn has_frames(&self) -> bool {
        self.virtual_apic != 0 || self.apic_access != 0
    }

    /// As [`Self::write`], for the fields about L2's local APIC.
    #[cold]
    pub(super) fn write_apic(
        &self,
        last: Option<&Self>,
        vmcs02: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        let switched =
            last.is_none_or(|l| l.primary != self.primary || l.secondary != self.secondary);
        macro_rules! put_under {
            ($condition:expr; $($field:ident <- $value:ident $([$index:literal])?;)*) => {
                if $condition {$(
                    if switched || last.is_none_or(|l| l.$value $([$index])? != self.$value $([$index])?) {
                        vmcs02.set(fields::$field, self.$value $([$index])?)?;
                    }
                )*}
            };
        }
        let has = |control| self.secondary.contains(control);
        let delivers = has(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);
        let shadow = self.primary.contains(PrimaryControls::USE_TPR_SHADOW);
        put_under! { shadow; VIRTUAL_APIC_ADDRESS <- virtual_apic; }
        put_under! { shadow && !delivers; TPR_THRESHOLD <- tpr_threshold; }
        put_under! { has(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
            APIC_ACCESS_ADDRESS <- apic_access;
        }
        put_under! { delivers;
            EOI_EXIT_BITMAP_0 <- eoi_exits[0];
            EOI_EXIT_BITMAP_1 <- eoi_exits[1];
            EOI_EXIT_BITMAP_2 <- eoi_exits[2];
            EOI_EXIT_BITMAP_3 <- eoi_exits[3];
        }
        Ok(())
    }
}

/// How a guest's time-stamp counter follows its host's: multiplied, if both controls say so, and
/// offset (27.6.5).
pub(super) fn read_clock(
    vmcs: &impl VmcsRead,
    primary: PrimaryControls,
    secondary: SecondaryControls,
) -> Result<GuestTsc, AccessError> {
    if !primary.contains(PrimaryControls::USE_TSC_OFFSETTING) {
        return Ok(GuestTsc::HOST);
    }
    let multiplier = if secondary.contains(SecondaryControls::USE_TSC_SCALING) {
        vmcs.get(fields::TSC_MULTIPLIER)?
    } else {
        GuestTsc::UNITY
    };
    Ok(GuestTsc {
        multiplier,
        offset: vmcs.get(fields::TSC_OFFSET)?,
    })
}

/// The exception bitmap, with the page-fault filter: L1's, unless L0 itself wants page faults, which
/// then exit all.
fn join_exceptions(l0: &L0Controls, vmcs12: &VmcsImage) -> Result<(u32, u32, u32), AccessError> {
    let theirs = vmcs12.get(fields::EXCEPTION_BITMAP)?;
    if l0.exceptions & PAGE_FAULT != 0 {
        return Ok((l0.exceptions | theirs, 0, 0));
    }
    Ok((
        l0.exceptions | theirs,
        vmcs12.get(fields::PAGE_FAULT_ERROR_CODE_MASK)?,
        vmcs12.get(fields::PAGE_FAULT_ERROR_CODE_MATCH)?,
    ))
}

/// Without "load IA32_EFER", an entry changes LMA and LME of the EFER that is there
/// (SDM vol. 3C, 29.3.2.1).
pub(super) fn inherited_efer(efer: u64, entry: EntryControls, cr0: u64) -> u64 {
    let long = entry.contains(EntryControls::IA32E_MODE_GUEST);
    let with_lma = if long { efer | LMA } else { efer & !LMA };
    match (cr0 & PG != 0, long) {
        (true, true) => with_lma | LME,
        (true, false) => with_lma & !LME,
        (false, _) => with_lma,
    }
}

/// Whether the processor can be asked for all of this; if not, L0 set up `vmcs01` in a way that no L2
/// can run with.
#[cfg(test)]
pub(super) fn accepted(joined: &Joined, processor: &testudo_vmx::VmxCaps) -> bool {
    processor.pin.accepts(joined.pin)
        && processor.primary.accepts(joined.primary)
        && processor.secondary.accepts(joined.secondary)
        && processor.exit.accepts(joined.exit)
        && processor.entry.accepts(joined.entry)
}
