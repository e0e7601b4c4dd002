//! Multiboot (specification version 0.6.96): ELF kernels of both classes, and any file whose header
//! gives its addresses ("a.out kludge").

use testudo_arch::{Gpa, Gprs, GuestMemory};

use super::elf::{Elf, ElfError};
use super::space::Space;
use super::{BootImage, BootState, Fields, LoadError, flat_protected_mode, place_modules};
use crate::layout::{EBDA, HIGH_MEMORY};

const HEADER_MAGIC: u32 = 0x1BAD_B002;
const LOADER_MAGIC: u64 = 0x2BAD_B002;
/// "The Multiboot header must be contained completely within the first 8192 bytes".
const SEARCH: usize = 8192;
const HEADER_SIZE: usize = 12;
const LOADER_NAME: &[u8] = b"Testudo";
/// The first word of a command line names the kernel, as with every loader of this version but
/// GRUB 2; Xen takes the word away unless that is the loader's name.
const KERNEL_NAME: &[u8] = b"kernel ";

/// Header flags that this loader satisfies: modules on pages, memory information, addresses given.
const WANT_ALIGNED: u32 = 1 << 0;
const WANT_MEMORY: u32 = 1 << 1;
const HAS_ADDRESSES: u32 = 1 << 16;
/// "If bits 0-15 hold a requirement that the boot loader does not know, it must fail".
const REQUIREMENTS: u32 = 0xFFFF;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: usize = 116;
const MAP_ENTRY_SIZE: usize = 24;

/// The offset and the flags of the header, if the file has one.
pub(super) fn find_header(kernel: &[u8]) -> Option<(u64, u32)> {
    let searched = &kernel[..kernel.len().min(SEARCH)];
    let last = searched.len().checked_sub(HEADER_SIZE)?;
    (0..=last).step_by(4).find_map(|offset| {
        let word = |at: usize| {
            let bytes = searched[offset + at..offset + at + 4].try_into();
            bytes.map_or(0, u32::from_le_bytes)
        };
        let sum = word(0).wrapping_add(word(4)).wrapping_add(word(8));
        (word(0) == HEADER_MAGIC && sum == 0).then(|| (offset as u64, word(4)))
    })
}

pub(super) fn load<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    let (header, flags) = find_header(image.kernel).ok_or(LoadError::UnknownFormat)?;
    let unknown = flags & REQUIREMENTS & !(WANT_ALIGNED | WANT_MEMORY);
    if unknown != 0 {
        return Err(LoadError::Unsupported {
            what: "its Multiboot header requires something unknown",
            value: u64::from(unknown),
        });
    }
    let entry = if flags & HAS_ADDRESSES != 0 {
        load_by_addresses(space, image.kernel, header)?
    } else {
        load_elf(space, image.kernel)?
    };
    let info = write_info(space, image)?;
    Ok(BootState {
        system: flat_protected_mode(entry),
        gprs: Gprs {
            rax: LOADER_MAGIC,
            rbx: info.0,
            ..Gprs::default()
        },
    })
}

/// An ELF file at its own addresses; gives the physical entry.
fn load_elf<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    kernel: &[u8],
) -> Result<u32, LoadError> {
    let elf = Elf::parse(kernel)?;
    let entry = elf.physical_entry()?;
    let entry32 = u32::try_from(entry).map_err(|_| ElfError::Entry(entry))?;
    elf.place(space, 0)?;
    Ok(entry32)
}

/// A file by the address fields of its header (specification, 3.1.3); gives the entry.
fn load_by_addresses<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    kernel: &[u8],
    header: u64,
) -> Result<u32, LoadError> {
    let fields = Fields::new("the Multiboot header", kernel);
    let [header_address, load_address, load_end, bss_end, entry] =
        [12, 16, 20, 24, 28].map(|offset| fields.u32(header + offset));
    let addresses = Addresses {
        header: header_address?,
        load: load_address?,
        load_end: load_end?,
        bss_end: bss_end?,
        entry: entry?,
    };
    addresses.place(space, kernel, header)
}

/// The address fields of a header, which both versions of Multiboot have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) header: u32,
    pub(super) load: u32,
    pub(super) load_end: u32,
    pub(super) bss_end: u32,
    pub(super) entry: u32,
}

impl Addresses {
    pub(super) fn place<M: GuestMemory + ?Sized>(
        &self,
        space: &mut Space<'_, M>,
        kernel: &[u8],
        header: u64,
    ) -> Result<u32, LoadError> {
        let corrupt = |field, value: u32| LoadError::Corrupt {
            field,
            value: u64::from(value),
        };
        let before = self
            .header
            .checked_sub(self.load)
            .ok_or(corrupt("load_addr", self.load))?;
        let from = header
            .checked_sub(u64::from(before))
            .ok_or(corrupt("header_addr", self.header))?;
        // "If this field is zero, the text and data segments occupy the whole file."
        let data_len = match self.load_end {
            0 => kernel.len() as u64 - from,
            end => u64::from(
                end.checked_sub(self.load)
                    .ok_or(corrupt("load_end_addr", end))?,
            ),
        };
        let data = Fields::new("the image", kernel).slice(from, data_len)?;
        let len = match self.bss_end {
            0 => data_len,
            end => u64::from(
                end.checked_sub(self.load)
                    .ok_or(corrupt("bss_end_addr", end))?,
            )
            .max(data_len),
        };
        let start = Gpa(u64::from(self.load));
        if u64::from(self.entry).wrapping_sub(start.0) >= len {
            return Err(corrupt("entry_addr", self.entry));
        }
        space.place_at("the image", start, len)?;
        space.write_padded(start, data, len)?;
        Ok(self.entry)
    }
}

/// Writes the information structure (specification, 3.3) and everything it points to.
fn write_info<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
) -> Result<Gpa, LoadError> {
    let memory = space.memory();
    let string = |space: &mut Space<'_, M>, bytes: &[u8]| -> Result<Gpa, LoadError> {
        let len = bytes.len() as u64 + 1;
        let gpa = space.place_conventional("a string", len, 1)?;
        space.write_padded(gpa, bytes, len)?;
        Ok(gpa)
    };
    let modules = place_modules(space, image.modules)?;
    let list = space.place_conventional("the module list", modules.len() as u64 * 16, 4)?;
    for (index, ((gpa, len), module)) in modules.iter().zip(image.modules).enumerate() {
        let name = string(space, module.arguments)?;
        let mut entry = [0; 16];
        entry[0..4].copy_from_slice(&(gpa.0 as u32).to_le_bytes());
        entry[4..8].copy_from_slice(&((gpa.0 + len) as u32).to_le_bytes());
        entry[8..12].copy_from_slice(&(name.0 as u32).to_le_bytes());
        memory.write(list.wrapping_add(index as u64 * 16), &entry)?;
    }
    let command_line = string(space, &[KERNEL_NAME, image.command_line].concat())?;
    let loader_name = string(space, LOADER_NAME)?;

    let map = space.map();
    let map_len = (map.len() * MAP_ENTRY_SIZE) as u64;
    let map_gpa = space.place_conventional("the memory map", map_len, 4)?;
    for (index, range) in map.iter().enumerate() {
        let mut entry = [0; MAP_ENTRY_SIZE];
        // The size does not count itself.
        entry[0..4].copy_from_slice(&(MAP_ENTRY_SIZE as u32 - 4).to_le_bytes());
        entry[4..12].copy_from_slice(&range.start.0.to_le_bytes());
        entry[12..20].copy_from_slice(&range.len.to_le_bytes());
        entry[20..24].copy_from_slice(&(range.kind as u32).to_le_bytes());
        let at = map_gpa.wrapping_add((index * MAP_ENTRY_SIZE) as u64);
        memory.write(at, &entry)?;
    }

    let (lower, upper) = basic_memory(space);
    let flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    let mut info = [0; INFO_SIZE];
    let mut put = |offset: usize, value: u64| {
        info[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    put(0, u64::from(flags));
    put(4, lower);
    put(8, upper);
    put(16, command_line.0);
    put(20, modules.len() as u64);
    put(24, list.0);
    put(44, map_len);
    put(48, map_gpa.0);
    put(64, loader_name.0);
    let gpa = space.place_conventional("the information structure", INFO_SIZE as u64, 8)?;
    memory.write(gpa, &info)?;
    Ok(gpa)
}

/// Conventional memory, and memory from 1 MiB to the first hole, in KiB.
pub(super) fn basic_memory<M: GuestMemory + ?Sized>(space: &Space<'_, M>) -> (u64, u64) {
    let end = space.low_ram_end().max(HIGH_MEMORY.0);
    (EBDA.0 >> 10, (end - HIGH_MEMORY.0) >> 10)
}
