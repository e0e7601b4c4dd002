//! What all processors share: the tables by which the guest has everything but the hypervisor.

use alloc::boxed::Box;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{FrameAlloc, Gpa, Hpa, Msr, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_nested::svm::{leaf_8000_000a, offer};
use testudo_svm::caps::{Features, SvmCaps, SvmUnavailable};
use testudo_svm::permission::{IoPermissionMap, MsrAccess, MsrPermissionMap};

use super::msr;
use crate::apic;
use crate::frames::Frames;
use crate::sleep::SleepControl;
use crate::territory::{Territory, without};

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SvmError {
    #[error(transparent)]
    Unavailable(#[from] SvmUnavailable),
    #[error("the processor has no nested paging")]
    NoNestedPaging,
    #[error(transparent)]
    Enable(#[from] testudo_svm::hw::EnableError),
    #[error(transparent)]
    Resident(#[from] testudo_svm::hw::ResidentUnsupported),
    #[error("the local APIC is not at {:#x}", apic::BASE)]
    Apic,
    #[error("no memory is left for the tables")]
    NoMemory,
}

const GIB: u64 = 1 << 30;
/// Below this, memory and devices alternate: a larger page could be of several memory types, which has
/// no defined effect (APM vol. 2, 7.7.5).
const MIXED: u64 = 4 * GIB;
/// As above, by the fixed-range registers.
const FIXED: u64 = 0x20_0000;
/// How far memory is mapped without 1 GiB pages, whose tables would be larger than the hypervisor.
const MODEST: u64 = 1 << 40;
/// What four levels translate.
const FOUR_LEVELS: u64 = 1 << 48;

/// See the module.
pub(crate) struct Tables {
    /// What the hypervisor uses of the processor. The virtual GIF is not among it: while its GIF is clear,
    /// the guest must not get interrupts that nobody intercepts.
    pub(crate) caps: SvmCaps,
    /// What the guest is told, if it may be a hypervisor.
    pub(crate) guest_caps: Option<SvmCaps>,
    pub(crate) nested: PageTable<Npt, Frames>,
    pub(crate) msr_permissions: Box<MsrPermissionMap>,
    pub(crate) io_permissions: Box<IoPermissionMap>,
}

impl Tables {
    /// The tables for a guest that has everything outside `territory`'s own memory.
    pub(crate) fn new(
        cpuid: &Cpuid,
        territory: &Territory,
        sleep: &SleepControl,
        nesting: bool,
    ) -> Result<Self, SvmError> {
        let mut caps = SvmCaps::from_cpuid(cpuid)?;
        if !caps.has(Features::NP) {
            return Err(SvmError::NoNestedPaging);
        }
        caps.features -= Features::V_GIF;
        let mut guest_cpuid = cpuid.clone();
        guest_cpuid.set(leaf_8000_000a(offer(&caps)));
        let guest_caps = if nesting {
            Some(SvmCaps::from_cpuid(&guest_cpuid)?)
        } else {
            None
        };
        let gigabyte_pages = cpuid.query(0x8000_0001, 0)[3] & 1 << 26 != 0;
        let mut msr_permissions = Box::new(MsrPermissionMap::intercept_none());
        msr::close(&mut msr_permissions);
        let mut io_permissions = Box::new(IoPermissionMap::intercept_none());
        for port in sleep.ports() {
            io_permissions.set(port, true);
        }
        Ok(Self {
            nested: nested_table(&caps, gigabyte_pages, territory)?,
            caps,
            guest_caps,
            msr_permissions,
            io_permissions,
        })
    }

    /// CPUID leaf 8000_000Ah as the guest sees it.
    pub(crate) fn leaf(&self) -> [u32; 4] {
        match &self.guest_caps {
            Some(caps) => {
                let leaf = leaf_8000_000a(caps.features);
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
            }
            None => [0; 4],
        }
    }
}

/// Everything where it is, with three exceptions: the hypervisor's own addresses all lead to one page
/// that holds nothing, as do those at which a write of the guest's would be an interrupt message;
/// and the local APIC's page can only be read.
fn nested_table(
    caps: &SvmCaps,
    gigabyte_pages: bool,
    territory: &Territory,
) -> Result<PageTable<Npt, Frames>, SvmError> {
    let mut format = Npt::new(caps.physical_address_bits);
    let mut end = caps.physical_limit().min(FOUR_LEVELS);
    if !gigabyte_pages {
        format = format.without_gigabyte_pages();
        end = end.min(MODEST);
    }
    let all = format.flags(Rights::all()).unwrap_or(NptFlags::empty());
    let readable = all - NptFlags::WRITABLE;
    let decoy = Frames.alloc().ok_or(SvmError::NoMemory)?;
    let table = PageTable::new(format, Frames).ok_or(SvmError::NoMemory)?;
    let map = |start: u64, len: u64, to: Hpa, flags, largest| {
        let mapped = table.map_up_to(Gpa(start), len, to, flags, largest);
        mapped.map_err(|_| SvmError::NoMemory)
    };

    let mut holes = territory.own.clone();
    holes.push(apic::MESSAGES);
    for hole in &holes {
        for page in hole.clone().step_by(PageSize::Size4K.bytes() as usize) {
            if page == apic::BASE {
                map(page, 4096, Hpa(page), readable, PageSize::Size4K)?;
            } else {
                map(page, 4096, decoy, all, PageSize::Size4K)?;
            }
        }
    }
    holes.sort_unstable_by_key(|hole| hole.start);
    let zones = [
        (0..FIXED, PageSize::Size4K),
        (FIXED..MIXED.min(end), PageSize::Size2M),
        (MIXED.min(end)..end, PageSize::Size1G),
    ];
    for (zone, largest) in zones {
        for part in without(&holes, zone) {
            map(
                part.start,
                part.end - part.start,
                Hpa(part.start),
                all,
                largest,
            )?;
        }
    }
    Ok(table)
}

/// The MSRs that concern only the hypervisor, for [`msr::close`].
pub(super) fn intercept(map: &mut MsrPermissionMap, msr: Msr, access: MsrAccess) {
    let before = map.get(msr);
    map.set(msr, before | access);
}
