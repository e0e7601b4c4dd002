//! The second stage: everything where it is, with three exceptions. The hypervisor's own addresses all lead to
//! one page that holds nothing, as do those at which a write of the guest's would be an interrupt message; and
//! the local APIC's page can only be read.

use core::ops::Range;

use testudo_arch::{FrameAlloc, Gpa, Hpa, PageSize};
use testudo_ept::{Format, PageTable};

use crate::apic;
use crate::territory::{Territory, without};
use testudo_rt::memory::Frames;

/// How far memory is mapped without 1 GiB pages, whose tables would be larger than the hypervisor.
pub(crate) const MODEST: u64 = 1 << 40;
/// What four levels translate.
pub(crate) const FOUR_LEVELS: u64 = 1 << 48;

/// Addresses that are mapped alike.
pub(crate) struct Zone<Flags> {
    pub(crate) range: Range<u64>,
    pub(crate) flags: Flags,
    pub(crate) largest: PageSize,
}

/// The flags of the two kinds of pages that are not where they are, or not to be written.
pub(crate) struct Special<Flags> {
    /// The page that holds nothing.
    pub(crate) decoy: Flags,
    /// The local APIC's.
    pub(crate) apic: Flags,
}

/// Builds the table of these zones; `None` if no memory is left for it.
pub(crate) fn table<F: Format<Input = Gpa>>(
    format: F,
    territory: &Territory,
    zones: impl IntoIterator<Item = Zone<F::Flags>>,
    special: &Special<F::Flags>,
) -> Option<PageTable<F, Frames>> {
    const PAGE: PageSize = PageSize::Size4K;
    let decoy = Frames.alloc()?;
    let table = PageTable::new(format, Frames)?;
    let map = |start: u64, len: u64, to: Hpa, flags, largest| {
        table.map_up_to(Gpa(start), len, to, flags, largest).ok()
    };
    let mut holes = territory.own.clone();
    holes.push(apic::MESSAGES);
    for page in holes
        .iter()
        .flat_map(|hole| hole.clone().step_by(PAGE.bytes() as usize))
    {
        let (to, flags) = if page == apic::BASE {
            (Hpa(page), special.apic)
        } else {
            (decoy, special.decoy)
        };
        map(page, PAGE.bytes(), to, flags, PAGE)?;
    }
    holes.sort_unstable_by_key(|hole| hole.start);
    for zone in zones {
        for part in without(&holes, zone.range) {
            let (start, len) = (part.start, part.end - part.start);
            map(start, len, Hpa(start), zone.flags, zone.largest)?;
        }
    }
    Some(table)
}
