//! What an exit loads: L1's host state, as `vmcs01`'s guest state (SDM vol. 3C, 30.5).

use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr4Flags, EferFlags, GuestMemory, Segment};
use testudo_vmx::controls::{
    ActivityState, EntryControls, ExitControls, Interruptibility, SecondaryControls,
};
use testudo_vmx::image::VmcsImage;
use testudo_vmx::{AccessError, VmcsRead, VmcsWrite, fields};

use super::{Context, L0Controls, NestedVmx, VmcsPair, pdptes, visible};

const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();
const PAE: u64 = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
const PCIDE: u64 = Cr4Flags::PCID.bits();
const PG: u64 = 1 << 31;

/// Bits of CR0 that an exit leaves as they are: all but PG, AM, WP, NE, TS, EM, MP and PE (30.5.1).
const CR0_KEPT: u64 = !(PG | 1 << 18 | 1 << 16 | 1 << 5 | 0xF);

impl NestedVmx {
    /// L1's host state into `vmcs01` (30.5). `false`: its page-directory pointers do not suit, and
    /// L1's processor ends in a VMX abort (30.5.4).
    pub(super) fn load_host<P: VmcsPair, M: GuestMemory, S, R>(
        &mut self,
        nmi: bool,
        cx: &mut Context<'_, P, M, S, R>,
    ) -> Result<bool, AccessError> {
        let image = &*self.vmcs12.image;
        let exit = ExitControls::from_bits_retain(image.get(fields::EXIT_CONTROLS)?);
        let long = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
        let mut vmcs01 = cx.vmcs.l1();

        let old_cr0 = vmcs01.get(fields::GUEST_CR0)?;
        let host_cr0 = image.get(fields::HOST_CR0)? & !CR0_KEPT;
        // Some of the kept bits L1 has in its read shadow only.
        let mask = vmcs01.get(fields::CR0_GUEST_HOST_MASK)?;
        let seen = visible(old_cr0, mask, vmcs01.get(fields::CR0_READ_SHADOW)?);
        let mut cr4 = image.get(fields::HOST_CR4)?;
        if long {
            cr4 |= PAE;
        } else {
            cr4 &= !PCIDE;
        }
        // L1 sees these values; the processor also gets what it and L0 insist on.
        let cr0 = self.cr0.apply(host_cr0 | (old_cr0 & CR0_KEPT));
        vmcs01.set(fields::GUEST_CR0, cr0)?;
        vmcs01.set(fields::CR0_READ_SHADOW, host_cr0 | (seen & CR0_KEPT))?;
        vmcs01.set(fields::GUEST_CR4, self.cr4.apply(cr4))?;
        vmcs01.set(fields::CR4_READ_SHADOW, cr4)?;
        let cr3 = image.get(fields::HOST_CR3)?;
        vmcs01.set(fields::GUEST_CR3, cr3)?;
        vmcs01.set(fields::GUEST_DR7, 0x400)?;
        vmcs01.set(fields::GUEST_DEBUGCTL, 0)?;

        let efer = if exit.contains(ExitControls::LOAD_EFER) {
            image.get(fields::HOST_EFER)?
        } else {
            let old = vmcs01.get(fields::GUEST_EFER)?;
            if long {
                old | LMA | LME
            } else {
                old & !(LMA | LME)
            }
        };
        vmcs01.set(fields::GUEST_EFER, efer)?;
        let mut entry = EntryControls::from_bits_retain(vmcs01.get(fields::ENTRY_CONTROLS)?);
        if entry.contains(EntryControls::IA32E_MODE_GUEST) != long {
            entry.set(EntryControls::IA32E_MODE_GUEST, long);
            vmcs01.set(fields::ENTRY_CONTROLS, entry.bits())?;
        }
        if exit.contains(ExitControls::LOAD_PAT) {
            vmcs01.set(fields::GUEST_PAT, image.get(fields::HOST_PAT)?)?;
        }
        load_host_segments(image, long, &mut vmcs01)?;
        vmcs01.set(
            fields::GUEST_SYSENTER_CS,
            image.get(fields::HOST_SYSENTER_CS)?,
        )?;
        vmcs01.set(
            fields::GUEST_SYSENTER_ESP,
            image.get(fields::HOST_SYSENTER_ESP)?,
        )?;
        vmcs01.set(
            fields::GUEST_SYSENTER_EIP,
            image.get(fields::HOST_SYSENTER_EIP)?,
        )?;
        let rsp = image.get(fields::HOST_RSP)?;
        vmcs01.set(fields::GUEST_RSP, rsp)?;
        vmcs01.set(fields::GUEST_RIP, image.get(fields::HOST_RIP)?)?;
        vmcs01.set(fields::GUEST_RFLAGS, 2)?;
        let blocking = if nmi {
            Interruptibility::BLOCKING_BY_NMI
        } else {
            Interruptibility::empty()
        };
        vmcs01.set(fields::GUEST_INTERRUPTIBILITY, blocking.bits())?;
        vmcs01.set(fields::GUEST_ACTIVITY_STATE, ActivityState::Active.number())?;
        vmcs01.set(fields::GUEST_PENDING_DEBUG, 0)?;
        vmcs01.set(fields::ENTRY_INTERRUPTION_INFORMATION, 0)?;
        cx.gprs.rsp = rsp;
        if !long && cr4 & PAE != 0 {
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
        Ok(true)
    }
}

/// The segments after an exit (30.5.2).
#[inline]
fn load_host_segments(
    image: &VmcsImage,
    long: bool,
    vmcs01: &mut impl VmcsWrite,
) -> Result<(), AccessError> {
    let code = if long {
        SegmentAttributes::CODE64
    } else {
        SegmentAttributes::CODE32
    };
    // One after the other, each field by its name: this is most of an exit.
    macro_rules! segment {
        ($selector:ident $base:ident $limit:ident $rights:ident <- $value:expr) => {{
            let segment: Segment = $value;
            vmcs01.set(fields::$selector, segment.selector)?;
            vmcs01.set(fields::$base, segment.base)?;
            vmcs01.set(fields::$limit, segment.limit)?;
            vmcs01.set(fields::$rights, segment.attributes.bits())?;
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
        <- Segment::flat(image.get(fields::HOST_CS_SELECTOR)?, code)
    );
    segment!(
        GUEST_SS_SELECTOR GUEST_SS_BASE GUEST_SS_LIMIT GUEST_SS_ACCESS_RIGHTS
        <- data(image.get(fields::HOST_SS_SELECTOR)?, 0)
    );
    segment!(
        GUEST_DS_SELECTOR GUEST_DS_BASE GUEST_DS_LIMIT GUEST_DS_ACCESS_RIGHTS
        <- data(image.get(fields::HOST_DS_SELECTOR)?, 0)
    );
    segment!(
        GUEST_ES_SELECTOR GUEST_ES_BASE GUEST_ES_LIMIT GUEST_ES_ACCESS_RIGHTS
        <- data(image.get(fields::HOST_ES_SELECTOR)?, 0)
    );
    segment!(
        GUEST_FS_SELECTOR GUEST_FS_BASE GUEST_FS_LIMIT GUEST_FS_ACCESS_RIGHTS
        <- data(image.get(fields::HOST_FS_SELECTOR)?, image.get(fields::HOST_FS_BASE)?)
    );
    segment!(
        GUEST_GS_SELECTOR GUEST_GS_BASE GUEST_GS_LIMIT GUEST_GS_ACCESS_RIGHTS
        <- data(image.get(fields::HOST_GS_SELECTOR)?, image.get(fields::HOST_GS_BASE)?)
    );
    segment!(
        GUEST_TR_SELECTOR GUEST_TR_BASE GUEST_TR_LIMIT GUEST_TR_ACCESS_RIGHTS
        <- Segment {
            selector: image.get(fields::HOST_TR_SELECTOR)?,
            attributes: SegmentAttributes::TSS_BUSY,
            limit: 0x67,
            base: image.get(fields::HOST_TR_BASE)?,
        }
    );
    segment!(
        GUEST_LDTR_SELECTOR GUEST_LDTR_BASE GUEST_LDTR_LIMIT GUEST_LDTR_ACCESS_RIGHTS
        <- Segment {
            attributes: SegmentAttributes::UNUSABLE,
            ..Segment::default()
        }
    );
    vmcs01.set(fields::GUEST_GDTR_BASE, image.get(fields::HOST_GDTR_BASE)?)?;
    vmcs01.set(fields::GUEST_GDTR_LIMIT, 0xFFFF)?;
    vmcs01.set(fields::GUEST_IDTR_BASE, image.get(fields::HOST_IDTR_BASE)?)?;
    vmcs01.set(fields::GUEST_IDTR_LIMIT, 0xFFFF)?;
    Ok(())
}
