//! `hvm_start_info`, the boot information of the PVH entry (Xen, `public/arch-x86/hvm/start_info.h`).

use super::{Loader, MemoryRange, Module, Raw, string_at};

const MAGIC: u32 = 0x336e_c578;

#[derive(Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    // Since version 1.
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct ModuleEntry {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MemoryEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// # Safety
/// `information` is the address that a PVH loader passed; see [`Raw::read`].
pub(super) unsafe fn read(information: u32) -> Option<Raw> {
    let address = u64::from(information);
    // SAFETY: the loader put the structure there, and what it refers to likewise.
    unsafe {
        let info = (address as *const StartInfo).read_unaligned();
        if info.magic != MAGIC {
            return None;
        }
        let mut raw = Raw::new(Loader::Pvh);
        raw.occupied
            .push(address..address + size_of::<StartInfo>() as u64);
        raw.command_line = string_at(info.command_line);
        raw.occupied
            .push(info.command_line..info.command_line + raw.command_line.len() as u64 + 1);
        raw.rsdp = (info.rsdp != 0).then_some(info.rsdp);

        let modules = info.modules as *const ModuleEntry;
        for index in 0..(info.module_count as usize).min(raw.modules.capacity()) {
            let entry = modules.add(index).read_unaligned();
            let string = string_at(entry.command_line);
            let data = core::slice::from_raw_parts(entry.address as *const u8, entry.size as usize);
            raw.modules.push(Module::new(string, data));
            raw.occupied.push(entry.address..entry.address + entry.size);
            raw.occupied
                .push(entry.command_line..entry.command_line + string.len() as u64 + 1);
        }

        if info.version >= 1 {
            let map = info.memory_map as *const MemoryEntry;
            for index in 0..(info.memory_map_entries as usize).min(raw.memory_map.capacity()) {
                let entry = map.add(index).read_unaligned();
                raw.memory_map.push(MemoryRange {
                    start: entry.address,
                    len: entry.size,
                    kind: entry.kind.into(),
                });
            }
        }
        Some(raw)
    }
}
