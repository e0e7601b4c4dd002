//! The Multiboot 2 information: a list of tags (Multiboot 2 specification, section 3.6).

use super::{Loader, MemoryRange, Module, Raw, string_at};

const END: u32 = 0;
const COMMAND_LINE: u32 = 1;
const MODULE: u32 = 3;
const MEMORY_MAP: u32 = 6;
const RSDP_V1: u32 = 14;
const RSDP_V2: u32 = 15;

/// # Safety
/// `information` is the address that a Multiboot 2 loader passed; see [`Raw::read`].
pub(super) unsafe fn read(information: u32) -> Option<Raw> {
    let start = u64::from(information);
    // SAFETY: the loader put the tags there, each with its length, and what they refer to likewise.
    unsafe {
        let field = |address: u64| (address as *const u32).read_unaligned();
        let wide = |address: u64| (address as *const u64).read_unaligned();

        let end = start + u64::from(field(start));
        let mut raw = Raw::new(Loader::Multiboot2);
        raw.occupied.push(start..end);

        let mut tag = start + 8;
        while tag + 8 <= end {
            let size = u64::from(field(tag + 4));
            match field(tag) {
                END => break,
                COMMAND_LINE => raw.command_line = string_at(tag + 8),
                MODULE if !raw.modules.is_full() => {
                    let (first, last) = (field(tag + 8), field(tag + 12));
                    let data = core::slice::from_raw_parts(
                        first as *const u8,
                        last.saturating_sub(first) as usize,
                    );
                    raw.modules.push(Module::new(string_at(tag + 16), data));
                    raw.occupied.push(u64::from(first)..u64::from(last));
                }
                MEMORY_MAP => {
                    let entry_size = u64::from(field(tag + 8)).max(24);
                    let mut entry = tag + 16;
                    while entry + entry_size <= tag + size && !raw.memory_map.is_full() {
                        raw.memory_map.push(MemoryRange {
                            start: wide(entry),
                            len: wide(entry + 8),
                            kind: field(entry + 16).into(),
                        });
                        entry += entry_size;
                    }
                }
                // The tag holds a copy of the root pointer; the newer one wins.
                RSDP_V1 if raw.rsdp.is_none() => raw.rsdp = Some(tag + 8),
                RSDP_V2 => raw.rsdp = Some(tag + 8),
                _ => {}
            }
            tag += size.max(8).next_multiple_of(8);
        }
        Some(raw)
    }
}
