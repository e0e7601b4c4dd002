//! ELF kernels with Xen's 32-bit physical entry (Xen, docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h).

use testudo_arch::{Gpa, Gprs, GuestMemory};

use super::elf::{Elf, ElfError};
use super::space::Space;
use super::{BootImage, BootState, LoadError, flat_protected_mode, place_modules};
use crate::layout::LOW_RAM_LIMIT;

/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336E_C578;
const START_INFO_SIZE: usize = 56;
const MODULE_ENTRY_SIZE: usize = 32;
const MEMORY_ENTRY_SIZE: usize = 24;

/// The entry that the note names, if there is such a note.
pub(super) fn entry_note(elf: &Elf<'_>) -> Result<Option<u32>, LoadError> {
    let Some(note) = elf.note(b"Xen", PHYS32_ENTRY)? else {
        return Ok(None);
    };
    // Linux stores as many bytes as an address of its class has.
    let entry = match *note {
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => return Err(LoadError::Elf(ElfError::Note)),
    };
    match u32::try_from(entry) {
        Ok(entry) => Ok(Some(entry)),
        Err(_) => Err(ElfError::Entry(entry).into()),
    }
}

pub(super) fn load<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    let elf = Elf::parse(image.kernel)?;
    let entry = entry_note(&elf)?.ok_or(LoadError::Unsupported {
        what: "an ELF file without a PVH note",
        value: elf.entry(),
    })?;
    let span = elf.span()?;
    if span.end > LOW_RAM_LIMIT || !span.contains(&u64::from(entry)) {
        return Err(ElfError::Entry(u64::from(entry)).into());
    }
    elf.place(space, 0)?;
    let modules = place_modules(space, image.modules)?;

    let place_string = |space: &mut Space<'_, M>, string: &[u8]| -> Result<Gpa, LoadError> {
        let len = string.len() as u64 + 1;
        let gpa = space.place_conventional("the command line", len, 1)?;
        space.write_padded(gpa, string, len)?;
        Ok(gpa)
    };
    let command_line = place_string(space, image.command_line)?;

    let list_len = (modules.len() * MODULE_ENTRY_SIZE) as u64;
    let list = space.place_conventional("the module list", list_len, 8)?;
    for (index, ((gpa, len), module)) in modules.iter().zip(image.modules).enumerate() {
        let arguments = match module.arguments {
            [] => Gpa::ZERO,
            arguments => place_string(space, arguments)?,
        };
        let mut entry = [0; MODULE_ENTRY_SIZE];
        entry[0..8].copy_from_slice(&gpa.0.to_le_bytes());
        entry[8..16].copy_from_slice(&len.to_le_bytes());
        entry[16..24].copy_from_slice(&arguments.0.to_le_bytes());
        let at = list.wrapping_add((index * MODULE_ENTRY_SIZE) as u64);
        space.memory().write(at, &entry)?;
    }

    let map = space.map();
    let map_len = (map.len() * MEMORY_ENTRY_SIZE) as u64;
    let map_gpa = space.place_conventional("the memory map", map_len, 8)?;
    for (index, range) in map.iter().enumerate() {
        let mut entry = [0; MEMORY_ENTRY_SIZE];
        entry[0..8].copy_from_slice(&range.start.0.to_le_bytes());
        entry[8..16].copy_from_slice(&range.len.to_le_bytes());
        entry[16..20].copy_from_slice(&(range.kind as u32).to_le_bytes());
        let at = map_gpa.wrapping_add((index * MEMORY_ENTRY_SIZE) as u64);
        space.memory().write(at, &entry)?;
    }

    let info = space.place_conventional("the start info", START_INFO_SIZE as u64, 8)?;
    let mut bytes = [0; START_INFO_SIZE];
    let list = if modules.is_empty() { Gpa::ZERO } else { list };
    let rsdp = image.rsdp.unwrap_or(Gpa::ZERO);
    bytes[0..4].copy_from_slice(&START_MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&1u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&(modules.len() as u32).to_le_bytes());
    bytes[16..24].copy_from_slice(&list.0.to_le_bytes());
    bytes[24..32].copy_from_slice(&command_line.0.to_le_bytes());
    bytes[32..40].copy_from_slice(&rsdp.0.to_le_bytes());
    bytes[40..48].copy_from_slice(&map_gpa.0.to_le_bytes());
    bytes[48..52].copy_from_slice(&(map.len() as u32).to_le_bytes());
    space.memory().write(info, &bytes)?;

    Ok(BootState {
        system: flat_protected_mode(entry),
        gprs: Gprs {
            rbx: info.0,
            ..Gprs::default()
        },
    })
}
