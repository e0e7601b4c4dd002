//! Which controls a vCPU runs with, and the VMCS as it is before the first entry.

use testudo_arch::{Hpa, Msr, PageSize};
use testudo_ept::format::ept::Ept;
use testudo_vmx::bitmap::MsrBitmap;
use testudo_vmx::caps::{EptVpidCaps, ForcedControls, UnsupportedControls};
use testudo_vmx::controls::{
    EntryControls, ExceptionBitmap, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::hw::instructions::InvvpidKind;
use testudo_vmx::{AccessError, VmcsWrite, VmxCaps, fields};

use super::apic::{self, ApicTables};
use super::timer;
use crate::paging::Paging;

/// The MSRs that a guest reads and writes directly: those that the VMCS holds, and those that stay
/// in the processor because the host uses none of them.
const DIRECT_MSRS: [Msr; 11] = [
    Msr::FS_BASE,
    Msr::GS_BASE,
    Msr::KERNEL_GS_BASE,
    Msr::STAR,
    Msr::LSTAR,
    Msr::CSTAR,
    Msr::SFMASK,
    Msr::SYSENTER_CS,
    Msr::SYSENTER_ESP,
    Msr::SYSENTER_EIP,
    Msr::TSC_AUX,
];

/// The page attribute table after reset (SDM vol. 3A, 12.12.4).
pub(super) const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Opens the MSRs that guests of this backend access directly, in a bitmap by which all exit.
pub fn open_direct_msrs(bitmap: &mut MsrBitmap) {
    for msr in DIRECT_MSRS {
        bitmap.pass_through(msr);
    }
    // What the guest reads is what it has: the VMCS holds the one, which is zero and stays so, and
    // the offset of the other. Hypervisors read the one before each entry.
    for msr in [Msr::DEBUG_CTL, Msr::TSC] {
        bitmap.set(msr, false, true);
    }
}

/// What vCPUs of one machine share: tables in memory that the processor reads.
#[derive(Clone, Copy, Debug)]
pub struct VmxTables {
    /// The EPT pointer.
    pub ept_pointer: u64,
    /// The MSR bitmap, made by [`open_direct_msrs`].
    pub msr_bitmap: Hpa,
    /// What APIC virtualization takes besides; it is used where these are and
    /// [`Controls::virtual_apic`].
    pub apic: Option<ApicTables>,
}

/// Why this backend cannot run guests on a processor with VMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsuitable {
    /// Pin-based controls are missing.
    #[error(transparent)]
    Pin(#[from] UnsupportedControls<PinControls>),
    /// Primary controls are missing.
    #[error(transparent)]
    Primary(#[from] UnsupportedControls<PrimaryControls>),
    /// Primary controls cannot be off.
    #[error(transparent)]
    PrimaryForced(#[from] ForcedControls<PrimaryControls>),
    /// Secondary controls are missing.
    #[error(transparent)]
    Secondary(#[from] UnsupportedControls<SecondaryControls>),
    /// Exit controls are missing.
    #[error(transparent)]
    Exit(#[from] UnsupportedControls<ExitControls>),
    /// Entry controls are missing.
    #[error(transparent)]
    Entry(#[from] UnsupportedControls<EntryControls>),
    /// A property of EPT is missing.
    #[error("the processor's EPT lacks {0:?}")]
    Ept(EptVpidCaps),
}

/// The controls that a vCPU starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: PinControls,
    /// Primary processor-based.
    pub primary: PrimaryControls,
    /// Secondary processor-based, but for those of APIC virtualization.
    pub secondary: SecondaryControls,
    /// VM-exit.
    pub exit: ExitControls,
    /// VM-entry, for a guest outside IA-32e mode.
    pub entry: EntryControls,
    /// The processor virtualizes the whole of the local APIC, so that it is worth having
    /// [`VmxTables::apic`].
    pub virtual_apic: bool,
    /// The processor ends the guest's turn at the next deadline.
    pub preemption_timer: bool,
}

/// The windows, which are opened only when an event waits.
pub(super) const WINDOWS: PrimaryControls =
    PrimaryControls::INTERRUPT_WINDOW_EXITING.union(PrimaryControls::NMI_WINDOW_EXITING);

/// What switches EFER and PAT by fields of the VMCS.
const EXIT_LOADS: ExitControls = ExitControls::LOAD_EFER.union(ExitControls::LOAD_PAT);
const ENTRY_LOADS: EntryControls = EntryControls::LOAD_EFER.union(EntryControls::LOAD_PAT);

impl Controls {
    /// The controls on a processor with these capabilities.
    ///
    /// # Errors
    ///
    /// The processor lacks something that this backend needs; the error names it.
    pub fn choose(caps: &VmxCaps) -> Result<Self, Unsuitable> {
        Self::for_paging(caps, Paging::Nested)
    }

    /// As [`choose`](Self::choose), for guests on shadow paging: without EPT and unrestricted guests.
    ///
    /// # Errors
    ///
    /// As [`choose`](Self::choose).
    pub fn choose_shadow(caps: &VmxCaps) -> Result<Self, Unsuitable> {
        Self::for_paging(caps, Paging::Shadow)
    }

    fn for_paging(caps: &VmxCaps, paging: Paging) -> Result<Self, Unsuitable> {
        let nested = paging == Paging::Nested;
        let pin = PinControls::EXTERNAL_INTERRUPT_EXITING
            | PinControls::NMI_EXITING
            | PinControls::VIRTUAL_NMIS;
        let primary = PrimaryControls::USE_TSC_OFFSETTING
            | PrimaryControls::HLT_EXITING
            | PrimaryControls::MWAIT_EXITING
            | PrimaryControls::MONITOR_EXITING
            | PrimaryControls::RDPMC_EXITING
            | PrimaryControls::USE_TPR_SHADOW
            | PrimaryControls::UNCONDITIONAL_IO_EXITING
            | PrimaryControls::USE_MSR_BITMAPS
            | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        let mut unwanted = PrimaryControls::MOV_DR_EXITING | PrimaryControls::RDTSC_EXITING;
        let mut primary = primary;
        let mut secondary = SecondaryControls::empty();
        let of_paging = PrimaryControls::CR3_LOAD_EXITING
            | PrimaryControls::CR3_STORE_EXITING
            | PrimaryControls::INVLPG_EXITING;
        if nested {
            // With EPT these are the guest's own business.
            unwanted |= of_paging;
            secondary |= SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
        } else {
            primary |= of_paging;
        }
        // What the guest's CPUID shows, and what makes a guest's use of a thing visible.
        let if_offered = SecondaryControls::ENABLE_VPID
            | SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID
            | SecondaryControls::WBINVD_EXITING
            | SecondaryControls::ENABLE_ENCLS_EXITING;
        let mut exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_DEBUG_CONTROLS;
        let mut entry = EntryControls::LOAD_DEBUG_CONTROLS;
        // Processors without EPT are older than these controls.
        if nested || caps.exit.allows(EXIT_LOADS) && caps.entry.allows(ENTRY_LOADS) {
            exit |= EXIT_LOADS;
            entry |= ENTRY_LOADS;
        }

        let primary = caps
            .primary
            .grant(primary | WINDOWS, PrimaryControls::empty())?;
        let primary = primary.without(unwanted)?.controls;
        let mut secondary = grant_secondary(caps, secondary, if_offered)?;
        if !nested {
            // INVPCID would act on translations that are not the guest's. The local APIC's page is
            // mapped by EPT where it is virtual; and an interrupt that the processor delivers itself
            // meets shadow tables that have yet to be filled, after which Bochs 2.7 reports the event
            // before it as the interrupted one.
            secondary -= SecondaryControls::ENABLE_INVPCID | apic::NEEDED;
        }
        Ok(Self {
            pin: caps.pin.grant(pin, PinControls::empty())?.controls,
            primary: primary - WINDOWS,
            secondary,
            exit: caps.exit.grant(exit, ExitControls::empty())?.controls,
            entry: caps.entry.grant(entry, EntryControls::empty())?.controls,
            virtual_apic: nested && caps.secondary.allows(apic::NEEDED),
            preemption_timer: caps.pin.allows(timer::PIN) && caps.exit.allows(timer::EXIT),
        })
    }

    /// The same without the preemption timer, by which a hypervisor's guest would not come out for what is due for the
    /// hypervisor.
    #[must_use]
    pub fn for_hypervisors(self) -> Self {
        Self {
            preemption_timer: false,
            ..self
        }
    }

    /// Whether guests run on EPT.
    pub fn has_ept(&self) -> bool {
        self.secondary.contains(SecondaryControls::ENABLE_EPT)
    }

    /// Whether EFER and PAT are switched by lists of MSRs ([`VmxPlace::switched`](super::VmxPlace::switched)),
    /// since the VMCS has no fields for them. Guests of guests are not run then.
    pub fn switches_by_lists(&self) -> bool {
        !self.entry.contains(ENTRY_LOADS)
    }

    /// How the translations of a guest with this VPID are dropped; `None` without VPIDs.
    pub(super) fn flush(&self, caps: &VmxCaps, vpid: u16) -> Option<InvvpidKind> {
        flush(self.secondary, caps, vpid)
    }
}

/// The secondary controls that a processor grants a guest: all that are `needed`, and those of `if_offered` that it
/// has.
///
/// # Errors
///
/// One that is needed is missing, or a property without which EPT is of no use.
pub fn grant_secondary(
    caps: &VmxCaps,
    needed: SecondaryControls,
    if_offered: SecondaryControls,
) -> Result<SecondaryControls, Unsuitable> {
    let mut granted = caps.secondary.grant(needed, if_offered)?.controls;
    let ept = EptVpidCaps::WALK_4
        | EptVpidCaps::WRITE_BACK
        | EptVpidCaps::INVEPT
        | EptVpidCaps::INVEPT_ALL;
    if granted.contains(SecondaryControls::ENABLE_EPT) && !caps.ept_vpid.contains(ept) {
        return Err(Unsuitable::Ept(ept - caps.ept_vpid));
    }
    // A VPID is of no use if its translations cannot be dropped.
    let both = EptVpidCaps::INVVPID | EptVpidCaps::INVVPID_ALL;
    if !caps.ept_vpid.contains(both) {
        granted -= SecondaryControls::ENABLE_VPID;
    }
    Ok(granted)
}

/// EPT in the largest pages that a processor takes, or that a guest hypervisor is told it takes.
pub fn ept_format(caps: &VmxCaps) -> Ept {
    let format = Ept::new(caps.processor.physical_address_bits);
    if caps.ept_vpid.contains(EptVpidCaps::PAGE_1G) {
        format
    } else if caps.ept_vpid.contains(EptVpidCaps::PAGE_2M) {
        format.with_largest_page(PageSize::Size2M)
    } else {
        format.with_largest_page(PageSize::Size4K)
    }
}

/// How the translations of a guest with this VPID are dropped, which runs with these controls; `None` without
/// VPIDs.
pub fn flush(secondary: SecondaryControls, caps: &VmxCaps, vpid: u16) -> Option<InvvpidKind> {
    let tagged = secondary.contains(SecondaryControls::ENABLE_VPID);
    let single = caps.ept_vpid.contains(EptVpidCaps::INVVPID_SINGLE);
    tagged.then_some(if single {
        InvvpidKind::SingleContext { vpid }
    } else {
        InvvpidKind::AllContexts
    })
}

/// Writes the controls, and the guest state that is the same for every start.
///
/// # Errors
///
/// A VMWRITE failed.
pub(super) fn write(
    vmcs: &mut impl VmcsWrite,
    controls: &Controls,
    tables: &VmxTables,
    apic_page: Hpa,
    vpid: u16,
) -> Result<(), AccessError> {
    vmcs.set(fields::PIN_CONTROLS, controls.pin.bits())?;
    vmcs.set(fields::PRIMARY_CONTROLS, controls.primary.bits())?;
    vmcs.set(fields::SECONDARY_CONTROLS, controls.secondary.bits())?;
    vmcs.set(fields::EXIT_CONTROLS, controls.exit.bits())?;
    vmcs.set(fields::ENTRY_CONTROLS, controls.entry.bits())?;
    // With the first two a guest could keep its processor busy for ever; the third is the host's.
    let mut exceptions =
        ExceptionBitmap::DEBUG | ExceptionBitmap::ALIGNMENT_CHECK | ExceptionBitmap::MACHINE_CHECK;
    if controls.has_ept() {
        vmcs.set(fields::EPT_POINTER, tables.ept_pointer)?;
        for zero in PDPTES {
            vmcs.set(zero, 0)?;
        }
    } else {
        exceptions |= ExceptionBitmap::PAGE_FAULT;
    }
    vmcs.set(fields::EXCEPTION_BITMAP, exceptions.bits())?;
    vmcs.set(fields::MSR_BITMAPS, tables.msr_bitmap.0)?;
    vmcs.set(fields::VIRTUAL_APIC_ADDRESS, apic_page.0)?;
    vmcs.set(fields::VMCS_LINK_POINTER, u64::MAX)?;
    vmcs.set(fields::TSC_OFFSET, 0)?;
    if controls.secondary.contains(SecondaryControls::ENABLE_VPID) {
        vmcs.set(fields::VPID, vpid)?;
    }
    if controls
        .secondary
        .contains(SecondaryControls::ENABLE_ENCLS_EXITING)
    {
        vmcs.set(fields::ENCLS_EXITING_BITMAP, u64::MAX)?;
    }
    for zero in [
        fields::PAGE_FAULT_ERROR_CODE_MASK,
        fields::PAGE_FAULT_ERROR_CODE_MATCH,
        fields::CR3_TARGET_COUNT,
        fields::EXIT_MSR_STORE_COUNT,
        fields::EXIT_MSR_LOAD_COUNT,
        fields::ENTRY_MSR_LOAD_COUNT,
        fields::ENTRY_INTERRUPTION_INFORMATION,
        fields::TPR_THRESHOLD,
        fields::GUEST_SYSENTER_CS,
    ] {
        vmcs.set(zero, 0)?;
    }
    for zero in [fields::GUEST_SYSENTER_ESP, fields::GUEST_SYSENTER_EIP] {
        vmcs.set(zero, 0)?;
    }
    vmcs.set(fields::GUEST_DEBUGCTL, 0)?;
    if controls.switches_by_lists() {
        return Ok(());
    }
    vmcs.set(fields::GUEST_PAT, PAT_RESET)
}

/// The entries of the guest's page-directory-pointer table.
pub(super) const PDPTES: [testudo_vmx::Field<u64>; 4] = [
    fields::GUEST_PDPTE0,
    fields::GUEST_PDPTE1,
    fields::GUEST_PDPTE2,
    fields::GUEST_PDPTE3,
];
