//! The host's page tables: an identity map of physical memory, in which only the program's code and the
//! start code of the other processors can be executed, and neither the code nor the constants be written.

use x86_64::instructions::tlb;
use x86_64::registers::control::Cr3;

use super::FRAME;
use crate::boot::Raw;
use crate::cpu::features::{has_1g_pages, has_nx};
use crate::lock::Lock;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const GIB: u64 = 1 << 30;
const LARGE_2M: u64 = 2 << 20;
/// What the entry code maps.
const BOOT_MAPPED: u64 = 4 * GIB;
/// What one entry of the top table spans.
const PML4_SPAN: u64 = 512 * GIB;

/// The end of the mapped addresses, all of which are mapped from zero on.
static MAPPED_END: Lock<u64> = Lock::new(BOOT_MAPPED);

unsafe extern "C" {
    static mut rt_boot_pml4: [u64; 512];
    static mut rt_boot_pdpt: [u64; 512];
    static rt_image_start: u8;
    static rt_text_end: u8;
    static rt_rodata_end: u8;
}

/// What a page of plain memory is mapped with.
fn memory_flags() -> u64 {
    if has_nx() {
        NO_EXECUTE | WRITABLE | PRESENT
    } else {
        WRITABLE | PRESENT
    }
}

pub(crate) fn mapped_end() -> u64 {
    *MAPPED_END.lock()
}

/// The end of the physical addresses that are mapped, all from zero on.
pub fn mapped() -> u64 {
    mapped_end()
}

/// Maps the first 512 GiB where the processor has 1 GiB pages, and otherwise all that the memory map
/// mentions.
///
/// Tables for 2 MiB pages need frames, and the frame allocator hands out only what is mapped; so
/// this runs twice there, before and after the memory is known.
pub(crate) fn init() {
    if !has_1g_pages() {
        return;
    }
    for index in BOOT_MAPPED / GIB..512 {
        // SAFETY: the table is ours, and nothing yet uses the addresses it starts to map.
        unsafe {
            (&raw mut rt_boot_pdpt)
                .cast::<u64>()
                .add(index as usize)
                .write_volatile((index * GIB) | LARGE | memory_flags());
        }
    }
    *MAPPED_END.lock() = PML4_SPAN;
}

/// Extends the map to the end of usable memory; returns the old and new end.
pub(crate) fn extend(raw: &Raw) -> (u64, u64) {
    let old = mapped_end();
    let end = raw
        .memory_map
        .iter()
        .filter(|range| range.kind == crate::MemoryKind::Usable)
        .map(|range| range.start.saturating_add(range.len))
        .max()
        .unwrap_or(0);
    map(end.min(1 << 46));
    (old, mapped_end())
}

/// Makes sure that physical addresses up to `end` are mapped, for devices above memory.
pub fn map(end: u64) {
    let mut mapped = MAPPED_END.lock();
    while *mapped < end {
        let at = *mapped;
        let pml4 = (&raw mut rt_boot_pml4).cast::<u64>();
        // SAFETY: the tables are ours or fresh, and nothing yet uses the addresses they start to map.
        unsafe {
            let pdpt = next_table(pml4.add((at / PML4_SPAN) as usize));
            let entry = pdpt.add((at / GIB % 512) as usize);
            if has_1g_pages() {
                entry.write_volatile(at | LARGE | memory_flags());
            } else {
                let directory = next_table(entry);
                for index in 0..512 {
                    let page = at + index as u64 * LARGE_2M;
                    directory
                        .add(index)
                        .write_volatile(page | LARGE | memory_flags());
                }
            }
        }
        *mapped += GIB;
    }
}

/// The table that an entry refers to, made if there is none.
///
/// # Safety
/// The entry belongs to our tables and maps no large page.
unsafe fn next_table(entry: *mut u64) -> *mut u64 {
    // SAFETY: the caller vouches for the entry.
    unsafe {
        let value = entry.read_volatile();
        if value & PRESENT != 0 {
            return (value & ADDRESS) as *mut u64;
        }
        let table = super::alloc_frame().expect("no memory for the page tables");
        entry.write_volatile(table | WRITABLE | PRESENT);
        table as *mut u64
    }
}

/// As [`next_table`], turning a large page into a table of pages of `size` with the same translations
/// and rights.
///
/// # Safety
/// The entry belongs to our tables.
unsafe fn split(entry: *mut u64, size: u64, flags: u64) -> *mut u64 {
    // SAFETY: the caller vouches for the entry; the fresh table translates as the page did.
    unsafe {
        let value = entry.read_volatile();
        if value & PRESENT == 0 || value & LARGE == 0 {
            return next_table(entry);
        }
        let table = super::alloc_frame().expect("no memory for the page tables") as *mut u64;
        let rights = value & (NO_EXECUTE | WRITABLE | PRESENT);
        for index in 0..512 {
            let page = (value & ADDRESS) + index as u64 * size;
            table.add(index).write_volatile(page | flags | rights);
        }
        entry.write_volatile(table as u64 | WRITABLE | PRESENT);
        table
    }
}

/// The entry that maps the 4 KiB page at `address`, made so if a larger page does.
///
/// # Safety
/// The lock of the tables is held, and the address is mapped.
unsafe fn small_page(address: u64) -> *mut u64 {
    let pml4 = (&raw mut rt_boot_pml4).cast::<u64>();
    // SAFETY: the walk meets only tables that this module or the entry code built, and splitting keeps every
    // translation.
    unsafe {
        let pdpt = next_table(pml4.add((address / PML4_SPAN) as usize));
        let directory = split(pdpt.add((address / GIB % 512) as usize), LARGE_2M, LARGE);
        let table = split(directory.add((address / LARGE_2M % 512) as usize), FRAME, 0);
        table.add((address / FRAME % 512) as usize)
    }
}

/// Takes the right to execute from all that the entry code mapped except code, and the right to write from
/// code and constants. `start_page` is where the other processors start.
pub(crate) fn protect(start_page: u64) {
    let _tables = MAPPED_END.lock();
    let (code, constants, variables) = (
        &raw const rt_image_start as u64,
        &raw const rt_text_end as u64,
        &raw const rt_rodata_end as u64,
    );
    let rights = |page: u64| match page {
        _ if page == start_page => WRITABLE | PRESENT,
        _ if (code..constants).contains(&page) => PRESENT,
        _ if (constants..variables).contains(&page) => memory_flags() & !WRITABLE,
        _ => memory_flags(),
    };
    // SAFETY: the loop sees the directories of the entry code, whose entries map 2 MiB pages; a page is split
    // before its parts lose rights, and none loses one that is used there.
    unsafe {
        let pdpt = (&raw mut rt_boot_pdpt).cast::<u64>();
        for address in (0..BOOT_MAPPED).step_by(LARGE_2M as usize) {
            let here = address..address + LARGE_2M;
            if here.contains(&start_page) || (here.start < variables && code < here.end) {
                for page in here.step_by(FRAME as usize) {
                    small_page(page).write_volatile(page | rights(page));
                }
            } else {
                let directory = next_table(pdpt.add((address / GIB) as usize));
                let entry = directory.add((address / LARGE_2M % 512) as usize);
                entry.write_volatile(address | LARGE | memory_flags());
            }
        }
    }
    tlb::flush_all();
}

/// Unmaps the 4 KiB page at `address`, so that a stack that grows into it faults.
///
/// # Safety
/// Nothing may be kept in the page.
pub(crate) unsafe fn guard(address: u64) {
    let _tables = MAPPED_END.lock();
    // SAFETY: the lock is held, and the caller gives the page up.
    unsafe { small_page(address).write_volatile(0) };
    tlb::flush(x86_64::VirtAddr::new(address));
}

/// The page tables' root, for the other processors and for a world switch.
pub fn root() -> u64 {
    Cr3::read().0.start_address().as_u64()
}
