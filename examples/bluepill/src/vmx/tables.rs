//! What all processors share: the tables and controls by which the guest has everything but the hypervisor.

use alloc::boxed::Box;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::mtrr::{MemoryType, Mtrrs};
use testudo_arch::{Cr0Flags, Cr4Flags, Msr, PageSize};
use testudo_ept::format::ept::{Ept, EptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_machine::backend::vmx::{
    Unsuitable, ept_format, flush, grant_secondary, offers_shadowing,
};
use testudo_nested::vmx::{Offer, offer, shadow_bitmaps};
use testudo_rt::msr;
use testudo_vmx::bitmap::{FieldBitmap, IoBitmap, MsrBitmap};
use testudo_vmx::caps::{
    EptVpidCaps, FEATURE_CONTROL_LOCKED, FEATURE_CONTROL_VMX, NoVmx, Processor,
};
use testudo_vmx::controls::{
    EntryControls, ExitControls, PinControls, PrimaryControls, SecondaryControls,
};
use testudo_vmx::hw::instructions::InvvpidKind;
use testudo_vmx::hw::{EnableError, ResidentUnsupported, Vmx};
use testudo_vmx::{AccessError, RegionError, VmFail, VmxCaps};

use crate::apic;
use crate::identity::{self, FOUR_LEVELS, MODEST, Special, Zone};
use crate::sleep::SleepControl;
use crate::territory::Territory;
use testudo_rt::memory::Frames;

/// Why there is no guest, or not any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmxError {
    #[error(transparent)]
    Unavailable(#[from] NoVmx),
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    #[error("the memory types of the firmware are not ranges")]
    MemoryTypes,
    #[error("this processor's VMX differs from the first one's")]
    Different,
    #[error(transparent)]
    Enable(#[from] EnableError),
    #[error("the VMCS cannot be used: {0}")]
    Region(#[from] RegionError),
    #[error("the VMCS cannot be made current: {0}")]
    Vmcs(VmFail),
    #[error("translations cannot be invalidated: {0}")]
    Invalidation(VmFail),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("VM entry refused: {0}")]
    Refused(VmFail),
    #[error(transparent)]
    Resident(#[from] ResidentUnsupported),
    #[error("the local APIC is not at {:#x}", apic::BASE)]
    Apic,
    #[error("the processor has no page-attribute table")]
    PageAttributes,
    #[error("no memory is left for the tables")]
    NoMemory,
}

/// What the guest runs with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Controls {
    pub(super) pin: PinControls,
    pub(super) primary: PrimaryControls,
    pub(super) secondary: SecondaryControls,
    pub(super) exit: ExitControls,
    /// For a guest outside IA-32e mode.
    pub(super) entry: EntryControls,
}

/// See the module.
pub(crate) struct Tables {
    pub(super) caps: VmxCaps,
    /// What the guest is told, if it may be a hypervisor.
    pub(super) guest_caps: Option<Box<VmxCaps>>,
    /// Which fields its VMREAD and VMWRITE reach without an exit, where the processor has that.
    pub(super) shadowing: Option<Box<(FieldBitmap, FieldBitmap)>>,
    pub(super) controls: Controls,
    pub(super) ept: PageTable<Ept, Frames>,
    pub(super) msr_bitmap: Box<MsrBitmap>,
    pub(super) io_bitmap: Box<IoBitmap>,
    /// The memory types as the firmware has set them up.
    pub(super) mtrrs: Option<Mtrrs>,
    /// IA32_FEATURE_CONTROL as the guest sees it.
    pub(super) feature_control: u64,
}

/// IA32_FEATURE_CONTROL: VMXON inside SMX operation, and the SENTER functions.
const FEATURE_CONTROL_SMX: u64 = 0xFF02;

impl Tables {
    /// The tables for a guest that has everything outside `territory`'s own memory.
    pub(crate) fn new(
        cpuid: &Cpuid,
        territory: &Territory,
        sleep: &SleepControl,
        nesting: bool,
    ) -> Result<Self, VmxError> {
        // SAFETY: CPL 0.
        let caps = unsafe { Vmx::capabilities()? };
        let controls = Controls::choose(&caps)?;
        let guest_caps = nesting.then(|| {
            let all = Offer {
                ept: true,
                vpid: true,
                apic: false,
                enlightened: false,
            };
            let l1 = Processor::read_from(|leaf, sub| cpuid.query(leaf, sub));
            let mut offered = offer(&caps, l1, all);
            offered.cr4.may &= !Cr4Flags::SAFER_MODE_EXTENSIONS.bits();
            Box::new(offered)
        });
        let shadowing = guest_caps
            .as_deref()
            .filter(|_| offers_shadowing(&caps))
            .map(|offered| Box::new(shadow_bitmaps(offered)));
        let mtrrs = Mtrrs::read_from(
            |msr| msr::try_read(msr.0),
            caps.processor.physical_address_bits,
        );
        let mut msr_bitmap = Box::new(MsrBitmap::none_exit());
        super::msr::close(&mut msr_bitmap, mtrrs.as_ref());
        let mut io_bitmap = Box::new(IoBitmap::none_exit());
        for port in sleep.ports() {
            io_bitmap.set(port, true);
        }
        let vmx = if nesting { FEATURE_CONTROL_VMX } else { 0 };
        let own = FEATURE_CONTROL_SMX | FEATURE_CONTROL_VMX;
        Ok(Self {
            ept: table(&caps, mtrrs.as_ref(), territory)?,
            feature_control: caps.feature_control & !own | FEATURE_CONTROL_LOCKED | vmx,
            shadowing,
            caps,
            guest_caps,
            controls,
            msr_bitmap,
            io_bitmap,
            mtrrs,
        })
    }

    /// The bits of CR0 that VMX operation forces; PE and PG are an unrestricted guest's own.
    pub(super) fn cr0_ones(&self) -> u64 {
        let free = Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING;
        self.caps.cr0.ones & !free.bits()
    }

    /// The bits of CR0 that the guest has in its read shadow only.
    pub(super) fn cr0_mask(&self) -> u64 {
        self.cr0_ones()
    }

    /// As [`Self::cr0_mask`], of CR4: those that VMX operation forces, and SMXE, which is not offered.
    pub(super) fn cr4_mask(&self) -> u64 {
        self.caps.cr4.ones | Cr4Flags::SAFER_MODE_EXTENSIONS.bits()
    }

    /// How the linear translations of a guest with this VPID are dropped; `None` without VPIDs.
    pub(super) fn flush(&self, vpid: u16) -> Option<InvvpidKind> {
        flush(self.controls.secondary, &self.caps, vpid)
    }

    /// A leaf of CPUID as the guest sees it: without what only a host can have, and what VMX operation takes
    /// away unless a control gives it back.
    pub(super) fn filter(&self, leaf: u32, subleaf: u32, answer: [u32; 4]) -> [u32; 4] {
        use SecondaryControls as S;
        const VMX: u32 = 1 << 5;
        const SMX: u32 = 1 << 6;
        const INVPCID: u32 = 1 << 10;
        const PROCESSOR_TRACE: u32 = 1 << 25;
        const WAIT_PACKAGE: u32 = 1 << 5;
        const PCONFIG: u32 = 1 << 18;
        const FRED: u32 = 1 << 17;
        const MSR_LIST: u32 = 1 << 27;
        const XSAVES: u32 = 1 << 3;
        const RDTSCP: u32 = 1 << 27;
        /// IA32_VMX_MISC: processor trace works in VMX operation.
        const TRACE_IN_VMX: u64 = 1 << 14;
        let unless = |given: bool, feature: u32| if given { 0 } else { feature };
        let has = |control| self.controls.secondary.contains(control);
        let hidden = match (leaf, subleaf) {
            (1, _) => [0, 0, SMX | unless(self.guest_caps.is_some(), VMX), 0],
            (7, 0) => [
                0,
                unless(has(S::ENABLE_INVPCID), INVPCID)
                    | unless(self.caps.misc.0 & TRACE_IN_VMX != 0, PROCESSOR_TRACE),
                unless(has(S::ENABLE_USER_WAIT_AND_PAUSE), WAIT_PACKAGE),
                PCONFIG,
            ],
            (7, 1) => [FRED | MSR_LIST, 0, 0, 0],
            (0xD, 1) => [unless(has(S::ENABLE_XSAVES_XRSTORS), XSAVES), 0, 0, 0],
            (0x8000_0001, _) => [0, 0, 0, unless(has(S::ENABLE_RDTSCP), RDTSCP)],
            _ => return answer,
        };
        core::array::from_fn(|word| answer[word] & !hidden[word])
    }
}

impl Controls {
    /// The controls on a processor with these capabilities: next to nothing exits.
    fn choose(caps: &VmxCaps) -> Result<Self, Unsuitable> {
        let pin = PinControls::NMI_EXITING | PinControls::VIRTUAL_NMIS;
        let window = PrimaryControls::NMI_WINDOW_EXITING;
        let primary = PrimaryControls::USE_IO_BITMAPS
            | PrimaryControls::USE_MSR_BITMAPS
            | PrimaryControls::ACTIVATE_SECONDARY_CONTROLS;
        let secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
        let secondary_if_offered = SecondaryControls::ENABLE_VPID
            | SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID
            | SecondaryControls::ENABLE_XSAVES_XRSTORS
            | SecondaryControls::ENABLE_USER_WAIT_AND_PAUSE;
        // The guest writes EFER and its page attributes without an exit, so that exits save them.
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE
            | ExitControls::SAVE_DEBUG_CONTROLS
            | ExitControls::SAVE_EFER
            | ExitControls::LOAD_EFER
            | ExitControls::SAVE_PAT
            | ExitControls::LOAD_PAT;
        let entry =
            EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::LOAD_EFER | EntryControls::LOAD_PAT;
        let forced = caps
            .primary
            .grant(primary | window, PrimaryControls::empty())?;
        let primary = forced.without(EXITS)?.controls - window;
        let secondary = grant_secondary(caps, secondary, secondary_if_offered)?;
        let exit = caps.exit.grant(exit, ExitControls::LOAD_CET_STATE)?;
        let entry = caps.entry.grant(entry, EntryControls::LOAD_CET_STATE)?;
        Ok(Self {
            pin: caps.pin.grant(pin, PinControls::empty())?.controls,
            primary,
            secondary,
            exit: exit.controls,
            entry: entry.controls,
        })
    }
}

/// What makes instructions exit that are the guest's own, and what has no meaning here.
const EXITS: PrimaryControls = PrimaryControls::INTERRUPT_WINDOW_EXITING
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
    .union(PrimaryControls::USE_TPR_SHADOW)
    .union(PrimaryControls::MOV_DR_EXITING)
    .union(PrimaryControls::MONITOR_TRAP_FLAG)
    .union(PrimaryControls::MONITOR_EXITING)
    .union(PrimaryControls::PAUSE_EXITING);

/// The EPT. The range registers do not count for a guest on EPT (SDM vol. 3C, 31.3.7): the entries have the
/// types that they give, and what the guest's page attributes make of them is as without a hypervisor.
fn table(
    caps: &VmxCaps,
    mtrrs: Option<&Mtrrs>,
    territory: &Territory,
) -> Result<PageTable<Ept, Frames>, VmxError> {
    let format = ept_format(caps);
    let mut end = (1 << caps.processor.physical_address_bits).min(FOUR_LEVELS);
    if !caps.ept_vpid.contains(EptVpidCaps::PAGE_1G) {
        end = end.min(MODEST);
    }
    let flags = |rights, kind| {
        let flags = format.flags(rights).unwrap_or(EptFlags::empty());
        flags.with_memory_type(kind)
    };
    let special = Special {
        decoy: flags(Rights::all(), MemoryType::WriteBack),
        apic: flags(Rights::READ, MemoryType::Uncacheable),
    };
    let zone = |(range, kind)| Zone {
        range,
        flags: flags(Rights::all(), kind),
        largest: PageSize::Size1G,
    };
    let table = match mtrrs {
        Some(mtrrs) => {
            let ranges = mtrrs.ranges(end).ok_or(VmxError::MemoryTypes)?;
            identity::table(format, territory, ranges.map(zone), &special)
        }
        // Without range registers, the page attributes alone count.
        None => {
            let all = [(0..end, MemoryType::WriteBack)];
            identity::table(format, territory, all.map(zone), &special)
        }
    };
    table.ok_or(VmxError::NoMemory)
}

/// Whether an MSR is the capability of VMX or its switch.
pub(super) fn is_vmx(msr: Msr) -> bool {
    msr == Msr::FEATURE_CONTROL || (Msr::VMX_BASIC..=Msr::VMX_EXIT_CTLS2).contains(&msr)
}
