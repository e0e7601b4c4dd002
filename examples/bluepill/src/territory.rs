//! Whose memory is whose: the hypervisor's few pieces, and the rest, which is the guest's.

use alloc::vec::Vec;
use core::ops::Range;

use testudo_arch::Gpa;
use testudo_arch::memory::GuestRam;
use testudo_machine::layout::{FIRMWARE_AREA, MemoryRange, MemoryType};
use testudo_rt::{self as rt, Boot, MemoryKind};

/// Nothing is placed in or read from the first page: its address is a null pointer.
const FIRST: u64 = 0x1000;

/// The division of the machine's memory.
pub(crate) struct Territory {
    /// What belongs to the hypervisor, in order and page by page.
    pub(crate) own: Vec<Range<u64>>,
    /// The memory map that the guest is told: the firmware's, with the hypervisor's memory reserved.
    pub(crate) map: Vec<MemoryRange>,
    /// The guest's memory, where it is.
    pub(crate) ram: GuestRam,
}

impl Territory {
    /// Keeps `bytes` beside what the program has now, and gives the guest the rest. `None` if the
    /// hypervisor's memory is not to be had in a few pieces.
    pub(crate) fn divide(boot: &Boot, bytes: u64) -> Option<Self> {
        let own = rt::memory::confine(bytes)?;
        let mut map = Vec::new();
        for range in boot.memory_map() {
            let whole = range.start..range.start.saturating_add(range.len);
            let kind = match range.kind {
                MemoryKind::Usable => {
                    let parts = without(&own, whole);
                    map.extend(parts.map(|part| entry(part, MemoryType::Usable)));
                    continue;
                }
                MemoryKind::Acpi => MemoryType::Acpi,
                MemoryKind::Nvs => MemoryType::Nvs,
                MemoryKind::Bad => MemoryType::Bad,
                MemoryKind::Reserved | MemoryKind::Other(_) => MemoryType::Reserved,
            };
            map.push(entry(whole, kind));
        }
        map.extend(
            own.iter()
                .map(|range| entry(range.clone(), MemoryType::Reserved)),
        );
        map.sort_unstable_by_key(|range| range.start);
        let ram = ram(&map);
        Some(Self { own, map, ram })
    }

    /// How much the hypervisor keeps from the guest, in bytes.
    pub(crate) fn own_bytes(&self) -> u64 {
        self.own.iter().map(|range| range.end - range.start).sum()
    }
}

fn entry(range: Range<u64>, kind: MemoryType) -> MemoryRange {
    MemoryRange {
        start: Gpa(range.start),
        len: range.end - range.start,
        kind,
    }
}

/// What is left of `whole` without `holes`, which are in order.
pub(crate) fn without(holes: &[Range<u64>], whole: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let starts = core::iter::once(whole.start).chain(holes.iter().map(|hole| hole.end));
    let ends = holes
        .iter()
        .map(|hole| hole.start)
        .chain(core::iter::once(whole.end));
    starts
        .zip(ends)
        .map(move |(start, end)| start.max(whole.start)..end.min(whole.end))
        .filter(|part| part.start < part.end)
}

/// The memory that is usable by the map. There may be more pieces than fit; the largest count, since
/// in none of the others can a guest hypervisor reasonably have its control blocks.
fn ram(map: &[MemoryRange]) -> GuestRam {
    let usable = map.iter().filter(|range| range.kind == MemoryType::Usable);
    let mut pieces: Vec<Range<u64>> = usable
        .map(|range| {
            let start = range.start.0.max(FIRST).next_multiple_of(rt::memory::FRAME);
            start..range.end() & !(rt::memory::FRAME - 1)
        })
        .filter(|piece| piece.start < piece.end)
        .collect();
    pieces.sort_unstable_by_key(|piece| core::cmp::Reverse(piece.end - piece.start));
    let mut ram = GuestRam::new();
    let mut add = |piece: Range<u64>, writable| {
        let (start, len) = (piece.start, piece.end - piece.start);
        // SAFETY: the runtime has all memory mapped where it is, and its allocator has given this
        // piece up, if it ever was its own. What the loader left there is read while the kernel is
        // placed, at places that the kernel's are kept apart from, and never again.
        let added = unsafe { ram.add(Gpa(start), start as *mut u8, len, writable) };
        // A firmware whose usable ranges overlap: the second one is in the first.
        added.is_ok()
    };
    // The largest comes first: there an access is found soonest.
    for piece in pieces.into_iter().take(GuestRam::MAX_REGIONS - 1) {
        add(piece, true);
    }
    // The firmware's tables can be read.
    add(FIRMWARE_AREA, false);
    ram
}
