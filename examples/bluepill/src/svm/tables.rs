//! What all processors share: the tables by which the guest has everything but the hypervisor.

use alloc::boxed::Box;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{Msr, PageSize};
use testudo_ept::format::npt::{Npt, NptFlags};
use testudo_ept::{Format, PageTable, Rights};
use testudo_nested::svm::{leaf_8000_000a, offer};
use testudo_svm::caps::{Features, SvmCaps, SvmUnavailable};
use testudo_svm::permission::{IoPermissionMap, MsrAccess, MsrPermissionMap};

use super::msr;
use crate::apic;
use crate::identity::{self, FOUR_LEVELS, MODEST, Special, Zone};
use crate::sleep::SleepControl;
use crate::territory::Territory;
use testudo_rt::memory::Frames;

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

/// The nested table, in zones that no two memory types share a large page of.
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
    let zones = [
        (0..FIXED, PageSize::Size4K),
        (FIXED..MIXED.min(end), PageSize::Size2M),
        (MIXED.min(end)..end, PageSize::Size1G),
    ];
    let zones = zones.map(|(range, largest)| Zone {
        range,
        flags: all,
        largest,
    });
    let special = Special {
        decoy: all,
        apic: all - NptFlags::WRITABLE,
    };
    identity::table(format, territory, zones, &special).ok_or(SvmError::NoMemory)
}

/// The MSRs that concern only the hypervisor, for [`msr::close`].
pub(super) fn intercept(map: &mut MsrPermissionMap, msr: Msr, access: MsrAccess) {
    let before = map.get(msr);
    map.set(msr, before | access);
}
