//! The guest's memory: reserved for good, or with a balloon or a memory device page by page.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, Hpa, PAGE_SIZE};
use testudo_machine::layout::Layout;
use testudo_machine::paged::{Managed, Shared, Shootdown};
use testudo_rt::{self as rt, Boot};

use crate::args::Args;
use crate::backend::Backend;
use crate::devices::Persistent;
use crate::frames;
use crate::sharing::Sharing;

/// What a memory device's blocks and place are multiples of: what Linux makes a memory block.
const PLUG_ALIGN: u64 = 128 << 20;

/// Memory that is there and not mapped yet.
struct Piece {
    gpa: Gpa,
    len: u64,
    place: u64,
}

/// A range of guest memory whose pages come and go.
#[derive(Clone, Copy)]
pub(crate) struct ManagedRange {
    pub(crate) gpa: Gpa,
    pub(crate) len: u64,
    pub(crate) pages: &'static dyn Managed,
}

/// The guest's memory while the guest is being built.
pub(crate) struct Memory {
    /// All of it.
    pub(crate) ram: GuestRam,
    layout: Layout,
    pieces: Vec<Piece>,
    /// Where there is room for more.
    next: u64,
    persistent: Option<Persistent>,
    /// The host's free frames before the guest had any.
    free_before: u64,
}

/// The parts of the memory that come and go.
pub(crate) struct ManagedMemory {
    /// The guest's own, which it may give back.
    pub(crate) main: Vec<ManagedRange>,
    /// What is a file as well.
    pub(crate) persistent: Option<Persistent>,
    /// What can be plugged.
    pub(crate) pluggable: Option<ManagedRange>,
    /// The host's free frames before the guest had any, and when it starts.
    pub(crate) free_before: u64,
    pub(crate) free_at_start: u64,
}

impl Memory {
    /// Takes zeroed memory for the guest, in pieces that large pages can map.
    pub(crate) fn reserve(boot: &Boot, args: &Args<'_>, cpuid: &Cpuid) -> Result<Self, String> {
        let bytes = args.memory_mib << 20;
        let width = (cpuid.query(0x8000_0008, 0)[0] as u8).clamp(36, 52);
        let layout = Layout::new(bytes, width).map_err(|e| e.to_string())?;
        let mut memory = Self {
            ram: GuestRam::new(),
            layout,
            pieces: Vec::new(),
            next: layout.high_ram_end().0,
            persistent: None,
            free_before: frames::free(),
        };
        for (gpa, len) in layout.ram() {
            let place = [30, 21]
                .into_iter()
                .find_map(|shift| rt::memory::reserve_zeroed(len, 1 << shift));
            let place = place.ok_or_else(|| {
                format!(
                    "the guest's {} MiB do not fit: {} MiB are free in one piece",
                    bytes >> 20,
                    rt::memory::largest(1 << 21) >> 20
                )
            })?;
            if args.devices.balloon_mib.is_some() || args.share_pages.is_some() {
                memory.pieces.push(Piece { gpa, len, place });
                continue;
            }
            // SAFETY: the range is the guest's for good; nothing here keeps a reference into it.
            let added = unsafe { memory.ram.add(gpa, place as *mut u8, len, true) };
            added.map_err(|e| e.to_string())?;
        }
        if let Some(file) = boot.module("pmem") {
            let gpa = memory.room(file.data.len() as u64)?;
            memory.persistent = Some(Persistent::new(file.data, gpa, &mut memory.ram)?);
        }
        Ok(memory)
    }

    /// Room for `len` bytes of memory that the map does not have: behind all memory and before the devices'
    /// windows.
    fn room(&mut self, len: u64) -> Result<Gpa, String> {
        let start = self.next.checked_next_multiple_of(PLUG_ALIGN);
        let end = start.and_then(|start| start.checked_add(len));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.layout.pci_mmio64().start => {
                self.next = end;
                Ok(Gpa(start))
            }
            _ => Err(format!("there is no room for {} MiB of memory", len >> 20)),
        }
    }

    /// Maps what comes and goes in the guest's table.
    pub(crate) fn manage(
        &mut self,
        backend: &mut Backend,
        args: &Args<'_>,
        shootdown: &Arc<Shootdown>,
        sharing: Option<&Sharing>,
    ) -> Result<ManagedMemory, String> {
        let mut add = |ram: &mut GuestRam, gpa, len, first| {
            let shared = sharing.map(|sharing| sharing.pool.clone());
            let pages = backend
                .manage((gpa, len), first, shootdown.clone(), shared)
                .map_err(|e| e.to_string())?;
            ram.add_paged(gpa, len, pages).map_err(|e| e.to_string())?;
            Ok::<_, String>(ManagedRange { gpa, len, pages })
        };
        let mut main = Vec::new();
        for Piece { gpa, len, place } in self.pieces.drain(..) {
            main.push(add(&mut self.ram, gpa, len, Some(Hpa(place)))?);
        }
        let mut pluggable = None;
        if let Some(mib) = args.devices.mem_mib {
            let len = (mib << 20).next_multiple_of(PLUG_ALIGN);
            let start = self.room(len)?;
            pluggable = Some(add(&mut self.ram, start, len, None)?);
        }
        Ok(ManagedMemory {
            main,
            persistent: self.persistent.take(),
            pluggable,
            free_before: self.free_before,
            free_at_start: frames::free(),
        })
    }
}

impl ManagedMemory {
    /// All that comes and goes.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = &ManagedRange> {
        self.main.iter().chain(&self.pluggable)
    }

    /// Says how many frames the guest and the host have.
    pub(crate) fn report(&self) -> String {
        let resident: u64 = self.ranges().map(|range| range.pages.resident()).sum();
        let waiting: u64 = self.ranges().map(|range| range.pages.in_limbo()).sum();
        let shared = self.ranges().filter_map(|range| range.pages.shared());
        let shared = shared.reduce(|sum, more| Shared {
            joined: sum.joined + more.joined,
            written: sum.written + more.written,
        });
        let shared = shared.map_or(String::new(), |Shared { joined, written }| {
            format!(
                "; {joined} times a page came to share one, and {written} times it was written then"
            )
        });
        format!(
            "memory: the guest has {} frames, {} are on their way back{shared}; the host has {} free of {}, and had {} when the guest started",
            resident / PAGE_SIZE,
            waiting / PAGE_SIZE,
            frames::free(),
            self.free_before,
            self.free_at_start,
        )
    }
}
