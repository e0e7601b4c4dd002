//! What an exit loads: L1's host state, as `vmcs01`'s guest state (SDM vol. 3C, 30.5).
//!
//! It is made as a value, which the exits that follow load again if they find L1's VMCS the same. Of what L1 has
//! in `vmcs01` when it enters L2 nothing is needed once nothing stops the entry any more, and until the exit
//! nobody but L0 reaches its VMCS: so the value is loaded as part of the entry, while `vmcs01` is current.

use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr4Flags, EferFlags, GuestMemory, Segment};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, SecondaryControls,
};
use testudo_vmx::encoding::Width;
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, Encoding, Field, FieldGroup, VmcsRead, VmcsWrite, fields as f};

use super::{Context, ControlRegisters, L0Controls, NestedVmx, VmcsPair, pdptes, visible};

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const PCIDE: u64 = Cr4Flags::PCID.bits();
const PG: u64 = 1 << 31;

/// Bits of CR0 that an exit leaves as they are: all but PG, AM, WP, NE, TS, EM, MP and PE (30.5.1).
const CR0_KEPT: u64 = !(PG | 1 << 18 | 1 << 16 | 1 << 5 | 0xF);

macro_rules! group {
    ($($field:ident)*) => {{
        const ENCODINGS: &[Encoding] = &[$(f::$field.encoding()),*];
        const GROUP: FieldGroup<{ ENCODINGS.len() }> = FieldGroup::new([$(f::$field.encoding()),*]);
        GROUP
    }};
}

/// What is loaded always.
const LOADED: FieldGroup<COUNT> = group! {
    GUEST_CR0 CR0_READ_SHADOW GUEST_CR4 CR4_READ_SHADOW GUEST_CR3 GUEST_DR7 GUEST_DEBUGCTL
    GUEST_CS_SELECTOR GUEST_CS_BASE GUEST_CS_LIMIT GUEST_CS_ACCESS_RIGHTS
    GUEST_SS_SELECTOR GUEST_SS_BASE GUEST_SS_LIMIT GUEST_SS_ACCESS_RIGHTS
    GUEST_DS_SELECTOR GUEST_DS_BASE GUEST_DS_LIMIT GUEST_DS_ACCESS_RIGHTS
    GUEST_ES_SELECTOR GUEST_ES_BASE GUEST_ES_LIMIT GUEST_ES_ACCESS_RIGHTS
    GUEST_FS_SELECTOR GUEST_FS_BASE GUEST_FS_LIMIT GUEST_FS_ACCESS_RIGHTS
    GUEST_GS_SELECTOR GUEST_GS_BASE GUEST_GS_LIMIT GUEST_GS_ACCESS_RIGHTS
    GUEST_TR_SELECTOR GUEST_TR_BASE GUEST_TR_LIMIT GUEST_TR_ACCESS_RIGHTS
    GUEST_LDTR_SELECTOR GUEST_LDTR_BASE GUEST_LDTR_LIMIT GUEST_LDTR_ACCESS_RIGHTS
    GUEST_GDTR_BASE GUEST_GDTR_LIMIT GUEST_IDTR_BASE GUEST_IDTR_LIMIT
    GUEST_SYSENTER_CS GUEST_SYSENTER_ESP GUEST_SYSENTER_EIP
    GUEST_RSP GUEST_RIP GUEST_RFLAGS GUEST_INTERRUPTIBILITY
    GUEST_ACTIVITY_STATE GUEST_PENDING_DEBUG ENTRY_INTERRUPTION_INFORMATION
};
const COUNT: usize = 53;

/// The place of a field among them; at compile time, so that another one cannot be named.
const fn place(field: Encoding) -> usize {
    let mut i = 0;
    while i < COUNT {
        if LOADED.encodings()[i].0 == field.0 {
            return i;
        }
        i += 1;
    }
    panic!("not among the fields that are loaded")
}

/// L1's state after an exit.
#[derive(Clone, Debug)]
pub(super) struct HostLoad {
    values: [u64; COUNT],
    /// EFER and the PAT, if L1's VMCS has them.
    efer: Option<u64>,
    pat: Option<u64>,
    /// The bits of CR0 and of its read shadow in `vmcs01` that are kept.
    kept: (u64, u64),
    /// What L1 sees.
    pub(super) sees: ControlRegisters,
    /// L1 goes on in 64-bit mode, where no page-directory pointers are loaded.
    long: bool,
}

macro_rules! put {
    ($values:ident: $($field:ident <- $value:expr;)*) => {$({
        $values[const { place(f::$field.encoding()) }] = raw(f::$field, $value);
    })*};
}

fn raw<W: Width>(_: Field<W>, value: W::Value) -> u64 {
    value.into()
}

impl HostLoad {
    /// What L1's VMCS and its registers before the entry, which are in `vmcs01`, make of it.
    fn new(
        nested: &NestedVmx,
        image: &VmcsImage,
        vmcs01: &impl VmcsRead,
    ) -> Result<Self, AccessError> {
        let exit = ExitControls::from_bits_retain(image.get(f::EXIT_CONTROLS)?);
        let long = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
        let old_cr0 = vmcs01.get(f::GUEST_CR0)?;
        let old_shadow = vmcs01.get(f::CR0_READ_SHADOW)?;
        let host_cr0 = image.get(f::HOST_CR0)? & !CR0_KEPT;
        // Some of the kept bits L1 has in its read shadow only.
        let mask = vmcs01.get(f::CR0_GUEST_HOST_MASK)?;
        let seen = visible(old_cr0, mask, old_shadow);
        let mut cr4 = image.get(f::HOST_CR4)?;
        if long {
            cr4 |= PAE;
        } else {
            cr4 &= !PCIDE;
        }
        let old_efer = vmcs01.get(f::GUEST_EFER)?;
        let (loaded_efer, efer) = if exit.contains(ExitControls::LOAD_EFER) {
            let efer = image.get(f::HOST_EFER)?;
            (Some(efer), efer)
        } else {
            let efer = if long {
                old_efer | LMA | LME
            } else {
                old_efer & !(LMA | LME)
            };
            ((efer != old_efer).then_some(efer), efer)
        };
        let sees = ControlRegisters {
            cr0: host_cr0 | (seen & CR0_KEPT),
            cr4,
            efer,
        };
        let mut values = [0; COUNT];
        // L1 sees these values; the processor also gets what it and L0 insist on.
        put! { values:
            GUEST_CR0 <- nested.cr0.apply(host_cr0 | (old_cr0 & CR0_KEPT));
            CR0_READ_SHADOW <- sees.cr0;
            GUEST_CR4 <- nested.cr4.apply(cr4);
            CR4_READ_SHADOW <- cr4;
            GUEST_CR3 <- image.get(f::HOST_CR3)?;
            GUEST_DR7 <- 0x400;
            GUEST_DEBUGCTL <- 0;
            GUEST_SYSENTER_CS <- image.get(f::HOST_SYSENTER_CS)?;
            GUEST_SYSENTER_ESP <- image.get(f::HOST_SYSENTER_ESP)?;
            GUEST_SYSENTER_EIP <- image.get(f::HOST_SYSENTER_EIP)?;
            GUEST_RSP <- image.get(f::HOST_RSP)?;
            GUEST_RIP <- image.get(f::HOST_RIP)?;
            GUEST_RFLAGS <- 2;
            GUEST_ACTIVITY_STATE <- ActivityState::Active.number();
            GUEST_PENDING_DEBUG <- 0;
            ENTRY_INTERRUPTION_INFORMATION <- 0;
        }
        put_segments(image, long, &mut values)?;
        let loads_pat = exit.contains(ExitControls::LOAD_PAT);
        Ok(Self {
            values,
            efer: loaded_efer,
            pat: match loads_pat {
                true => Some(image.get(f::HOST_PAT)?),
                false => None,
            },
            kept: (old_cr0 & CR0_KEPT, old_shadow & CR0_KEPT),
            sees,
            long,
        })
    }

    /// Whether it may be loaded for another exit that finds L1's VMCS as it was, if L1's registers
    /// [contribute the same](Self::fits).
    pub(super) fn repeats(&self) -> bool {
        self.long
    }

    /// Whether what L1's CR0 and its read shadow contribute is as it was.
    #[inline(always)]
    pub(super) fn fits(&self, cr0: u64, shadow: u64) -> bool {
        let (old_cr0, old_shadow) = self.kept;
        ((cr0 ^ old_cr0) | (shadow ^ old_shadow)) & CR0_KEPT == 0
    }

    /// Loads it, with this stack pointer.
    #[inline(always)]
    pub(super) fn write(
        &mut self,
        rsp: u64,
        vmcs01: &mut impl VmcsWrite,
    ) -> Result<(), AccessError> {
        self.values[const { place(f::GUEST_RSP.encoding()) }] = rsp;
        vmcs01.set_group(&LOADED, &self.values)?;
        if let Some(efer) = self.efer {
            vmcs01.set(f::GUEST_EFER, efer)?;
        }
        if let Some(pat) = self.pat {
            vmcs01.set(f::GUEST_PAT, pat)?;
        }
        Ok(())
    }
}

impl NestedVmx {
    /// L1's host state into `vmcs01` (30.5). `false`: its page-directory pointers do not suit, and
    /// L1's processor ends in a VMX abort (30.5.4).
    pub(super) fn load_host<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        blocking: Interruptibility,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let image = &*self.vmcs12.image;
        let mut vmcs01 = cx.vmcs.l1();
        let mut load = HostLoad::new(self, image, &vmcs01)?;
        let mut entry = EntryControls::from_bits_retain(vmcs01.get(f::ENTRY_CONTROLS)?);
        if entry.contains(EntryControls::IA32E_MODE_GUEST) != load.long {
            entry.set(EntryControls::IA32E_MODE_GUEST, load.long);
            vmcs01.set(f::ENTRY_CONTROLS, entry.bits())?;
        }
        let rsp = image.get(f::HOST_RSP)?;
        load.write(rsp, &mut vmcs01)?;
        if !blocking.is_empty() {
            vmcs01.set(f::GUEST_INTERRUPTIBILITY, blocking.bits())?;
        }
        cx.gprs.rsp = rsp;
        self.l1_sees = load.sees;
        if !load.long && load.sees.cr4 & PAE != 0 {
            let cr3 = image.get(f::HOST_CR3)?;
            let Some(entries) = pdptes::read(cx.memory, cr3, &self.caps.processor) else {
                return Ok(false);
            };
            // With EPT the processor walks L1's PAE tables from the fields.
            if L0Controls::read(&vmcs01)?
                .secondary
                .contains(SecondaryControls::ENABLE_EPT)
            {
                pdptes::write(&entries, &mut vmcs01)?;
            }
        }
        drop(vmcs01);
        self.note_host_load(load)?;
        Ok(true)
    }
}

/// The segments after an exit (30.5.2).
fn put_segments(
    image: &VmcsImage,
    long: bool,
    values: &mut [u64; COUNT],
) -> Result<(), AccessError> {
    let code = if long {
        SegmentAttributes::CODE64
    } else {
        SegmentAttributes::CODE32
    };
    macro_rules! segment {
        ($selector:ident $base:ident $limit:ident $rights:ident <- $value:expr) => {{
            let segment: Segment = $value;
            put! { values:
                $selector <- segment.selector;
                $base <- segment.base;
                $limit <- segment.limit;
                $rights <- segment.attributes.bits();
            }
        }};
    }
    // A null selector makes a data segment unusable; FS and GS have a base all the same.
    let data = |selector: u16, base: u64| Segment {
        base,
        ..Segment::flat(
            selector,
            if selector == 0 {
                SegmentAttributes::DATA | SegmentAttributes::UNUSABLE
            } else {
                SegmentAttributes::DATA
            },
        )
    };
    segment!(
        GUEST_CS_SELECTOR GUEST_CS_BASE GUEST_CS_LIMIT GUEST_CS_ACCESS_RIGHTS
        <- Segment::flat(image.get(f::HOST_CS_SELECTOR)?, code)
    );
    segment!(
        GUEST_SS_SELECTOR GUEST_SS_BASE GUEST_SS_LIMIT GUEST_SS_ACCESS_RIGHTS
        <- data(image.get(f::HOST_SS_SELECTOR)?, 0)
    );
    segment!(
        GUEST_DS_SELECTOR GUEST_DS_BASE GUEST_DS_LIMIT GUEST_DS_ACCESS_RIGHTS
        <- data(image.get(f::HOST_DS_SELECTOR)?, 0)
    );
    segment!(
        GUEST_ES_SELECTOR GUEST_ES_BASE GUEST_ES_LIMIT GUEST_ES_ACCESS_RIGHTS
        <- data(image.get(f::HOST_ES_SELECTOR)?, 0)
    );
    segment!(
        GUEST_FS_SELECTOR GUEST_FS_BASE GUEST_FS_LIMIT GUEST_FS_ACCESS_RIGHTS
        <- data(image.get(f::HOST_FS_SELECTOR)?, image.get(f::HOST_FS_BASE)?)
    );
    segment!(
        GUEST_GS_SELECTOR GUEST_GS_BASE GUEST_GS_LIMIT GUEST_GS_ACCESS_RIGHTS
        <- data(image.get(f::HOST_GS_SELECTOR)?, image.get(f::HOST_GS_BASE)?)
    );
    segment!(
        GUEST_TR_SELECTOR GUEST_TR_BASE GUEST_TR_LIMIT GUEST_TR_ACCESS_RIGHTS
        <- Segment {
            selector: image.get(f::HOST_TR_SELECTOR)?,
            attributes: SegmentAttributes::TSS_BUSY,
            limit: 0x67,
            base: image.get(f::HOST_TR_BASE)?,
        }
    );
    segment!(
        GUEST_LDTR_SELECTOR GUEST_LDTR_BASE GUEST_LDTR_LIMIT GUEST_LDTR_ACCESS_RIGHTS
        <- Segment {
            attributes: SegmentAttributes::UNUSABLE,
            ..Segment::default()
        }
    );
    put! { values:
        GUEST_GDTR_BASE <- image.get(f::HOST_GDTR_BASE)?;
        GUEST_GDTR_LIMIT <- 0xFFFF;
        GUEST_IDTR_BASE <- image.get(f::HOST_IDTR_BASE)?;
        GUEST_IDTR_LIMIT <- 0xFFFF;
    }
    Ok(())
}
