//! Multiboot 2 (specification version 2.0), the machine state for i386 without EFI.

use alloc::vec::Vec;

use testudo_arch::{Gpa, Gprs, GuestMemory};

use super::elf::{Elf, ElfError};
use super::multiboot1::{Addresses, basic_memory};
use super::space::Space;
use super::{BootImage, BootState, Fields, LoadError, flat_protected_mode, place_modules};
use crate::layout::LOW_RAM_LIMIT;

const HEADER_MAGIC: u32 = 0xE852_50D6;
const LOADER_MAGIC: u64 = 0x36D7_6289;
const ARCHITECTURE_I386: u32 = 0;
/// "It must be contained completely within the first 32768 bytes of the OS image".
const SEARCH: usize = 32768;
const HEADER_SIZE: usize = 16;
/// Kernels that know both habits (Xen) look here for the loader whose command lines do not begin
/// with the kernel's name.
const LOADER_NAME: &[u8] = b"Testudo, with the conventions of GRUB 2";
/// A tag that may be ignored when the loader does not support it.
const OPTIONAL: u16 = 1 << 0;

/// Tags of the header in the kernel (specification, 3.1.3 to 3.1.13).
mod wanted {
    pub(super) const END: u16 = 0;
    pub(super) const INFORMATION: u16 = 1;
    pub(super) const ADDRESS: u16 = 2;
    pub(super) const ENTRY: u16 = 3;
    pub(super) const CONSOLE: u16 = 4;
    pub(super) const MODULE_ALIGN: u16 = 6;
    pub(super) const EFI_BOOT_SERVICES: u16 = 7;
    pub(super) const EFI_ENTRY32: u16 = 8;
    pub(super) const EFI_ENTRY64: u16 = 9;
    pub(super) const RELOCATABLE: u16 = 10;
}

/// Tags of the information for the kernel (specification, 3.6).
mod given {
    pub(super) const END: u32 = 0;
    pub(super) const COMMAND_LINE: u32 = 1;
    pub(super) const LOADER_NAME: u32 = 2;
    pub(super) const MODULE: u32 = 3;
    pub(super) const BASIC_MEMORY: u32 = 4;
    pub(super) const MEMORY_MAP: u32 = 6;
    pub(super) const ACPI_NEW: u32 = 15;
    pub(super) const LOAD_BASE: u32 = 21;
    pub(super) const ALL: [u32; 8] = [
        END,
        COMMAND_LINE,
        LOADER_NAME,
        MODULE,
        BASIC_MEMORY,
        MEMORY_MAP,
        ACPI_NEW,
        LOAD_BASE,
    ];
}

/// The length of an RSDP of ACPI 2.0 and later.
const RSDP_SIZE: usize = 36;

/// The offset and the length of the header, if the file has one for this architecture.
pub(super) fn find_header(kernel: &[u8]) -> Option<(u64, u32)> {
    let searched = &kernel[..kernel.len().min(SEARCH)];
    let last = searched.len().checked_sub(HEADER_SIZE)?;
    (0..=last).step_by(8).find_map(|offset| {
        let word = |at: usize| {
            let bytes = searched[offset + at..offset + at + 4].try_into();
            bytes.map_or(0, u32::from_le_bytes)
        };
        let words = [word(0), word(4), word(8), word(12)];
        let sum = words.iter().fold(0u32, |sum, word| sum.wrapping_add(*word));
        let found = words[0] == HEADER_MAGIC && words[1] == ARCHITECTURE_I386 && sum == 0;
        found.then_some((offset as u64, words[2]))
    })
}

/// What the header asks for.
#[derive(Clone, Copy, Debug, Default)]
struct Wishes {
    addresses: Option<Addresses>,
    entry: Option<u32>,
    relocatable: Option<Relocatable>,
}

/// The relocatable header tag (specification, 3.1.13).
#[derive(Clone, Copy, Debug)]
struct Relocatable {
    min: u32,
    max: u32,
    align: u32,
    highest: bool,
}

impl Wishes {
    fn parse(kernel: &[u8], header: u64, header_len: u32) -> Result<Self, LoadError> {
        let what = "the Multiboot 2 header";
        let fields = Fields::new(what, kernel);
        fields.slice(header, u64::from(header_len))?;
        let end = header + u64::from(header_len);
        let mut wishes = Self::default();
        let mut at = header + HEADER_SIZE as u64;
        while at < end {
            let (kind, flags) = (fields.u16(at)?, fields.u16(at + 2)?);
            let size = fields.u32(at + 4)?;
            if size < 8 || at + u64::from(size) > end {
                return Err(LoadError::Corrupt {
                    field: "the size of a Multiboot 2 header tag",
                    value: u64::from(size),
                });
            }
            let tag = Fields::new(what, fields.slice(at, u64::from(size))?);
            match kind {
                wanted::END => break,
                wanted::INFORMATION => Self::check_information(&tag, flags)?,
                wanted::ADDRESS => {
                    wishes.addresses = Some(Addresses {
                        header: tag.u32(8)?,
                        load: tag.u32(12)?,
                        load_end: tag.u32(16)?,
                        bss_end: tag.u32(20)?,
                        entry: 0,
                    });
                }
                wanted::ENTRY => wishes.entry = Some(tag.u32(8)?),
                wanted::RELOCATABLE => {
                    wishes.relocatable = Some(Relocatable {
                        min: tag.u32(8)?,
                        max: tag.u32(12)?,
                        align: tag.u32(16)?,
                        highest: tag.u32(20)? == 2,
                    });
                }
                // Modules are always on pages, there is no EFI whose entries would be used, and
                // the console is the kernel's own affair.
                wanted::MODULE_ALIGN
                | wanted::CONSOLE
                | wanted::EFI_BOOT_SERVICES
                | wanted::EFI_ENTRY32
                | wanted::EFI_ENTRY64 => {}
                _ if flags & OPTIONAL != 0 => {}
                kind => {
                    return Err(LoadError::Unsupported {
                        what: "its Multiboot 2 header requires an unknown tag",
                        value: u64::from(kind),
                    });
                }
            }
            at += u64::from(size).next_multiple_of(8);
        }
        Ok(wishes)
    }

    /// A kernel that cannot do without some information gets it, or is not started.
    fn check_information(tag: &Fields<'_>, flags: u16) -> Result<(), LoadError> {
        let requests = &tag.bytes[8..];
        for request in requests.chunks_exact(4) {
            let kind = request.try_into().map_or(0, u32::from_le_bytes);
            if flags & OPTIONAL == 0 && !given::ALL.contains(&kind) {
                return Err(LoadError::Unsupported {
                    what: "its Multiboot 2 header requires unknown information",
                    value: u64::from(kind),
                });
            }
        }
        Ok(())
    }
}

pub(super) fn load<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    let (header, header_len) = find_header(image.kernel).ok_or(LoadError::UnknownFormat)?;
    let wishes = Wishes::parse(image.kernel, header, header_len)?;
    let (entry, load_base) = match wishes.addresses {
        Some(addresses) => {
            let entry = wishes.entry.ok_or(LoadError::Unsupported {
                what: "its Multiboot 2 header gives addresses but no entry",
                value: u64::from(addresses.load),
            })?;
            let addresses = Addresses { entry, ..addresses };
            (addresses.place(space, image.kernel, header)?, None)
        }
        None => load_elf(space, image.kernel, &wishes)?,
    };
    let info = write_info(space, image, load_base)?;
    Ok(BootState {
        system: flat_protected_mode(entry),
        gprs: Gprs {
            rax: LOADER_MAGIC,
            rbx: info.0,
            ..Gprs::default()
        },
    })
}

/// An ELF file where its headers want it, or moved if it can be and must; gives the entry and,
/// for a relocatable kernel, the base.
fn load_elf<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    kernel: &[u8],
    wishes: &Wishes,
) -> Result<(u32, Option<u32>), LoadError> {
    let elf = Elf::parse(kernel)?;
    let entry = match wishes.entry {
        Some(entry) => u64::from(entry),
        None => elf.physical_entry()?,
    };
    let span = elf.span()?;
    if !span.contains(&entry) {
        return Err(ElfError::Entry(entry).into());
    }
    let mut base = span.start;
    if let Some(relocatable) = wishes.relocatable {
        if !relocatable.align.is_power_of_two() {
            return Err(LoadError::Corrupt {
                field: "the alignment of the relocatable tag",
                value: u64::from(relocatable.align),
            });
        }
        let len = span.end - span.start;
        let align = u64::from(relocatable.align).max(4096);
        let limit = (u64::from(relocatable.max) + 1).min(LOW_RAM_LIMIT);
        let within = u64::from(relocatable.min)..limit;
        // Where it was linked is as good as any place for a kernel without a wish.
        let place = if relocatable.highest {
            space.find_high(len, align, within.clone())
        } else {
            space
                .find_low(len, align, span.start.max(within.start)..limit)
                .or_else(|| space.find_low(len, align, within.clone()))
        };
        base = place
            .ok_or_else(|| space.too_little("the relocatable kernel", len, within))?
            .0;
    }
    let offset = base.wrapping_sub(span.start);
    let entry = entry.wrapping_add(offset);
    let entry32 = u32::try_from(entry).map_err(|_| ElfError::Entry(entry))?;
    elf.place(space, offset)?;
    Ok((entry32, wishes.relocatable.map(|_| base as u32)))
}

/// The information structure while it is put together: a list of tags, each aligned to 8 bytes.
#[derive(Debug)]
struct Information(Vec<u8>);

impl Information {
    fn new() -> Self {
        Self(alloc::vec![0; 8])
    }

    fn tag(&mut self, kind: u32, parts: &[&[u8]]) {
        let size = 8 + parts.iter().map(|part| part.len()).sum::<usize>();
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(size as u32).to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.tag(given::END, &[]);
        let total = self.0.len() as u32;
        self.0[..4].copy_from_slice(&total.to_le_bytes());
        self.0
    }
}

fn write_info<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
    load_base: Option<u32>,
) -> Result<Gpa, LoadError> {
    let mut info = Information::new();
    info.tag(given::COMMAND_LINE, &[image.command_line, b"\0"]);
    info.tag(given::LOADER_NAME, &[LOADER_NAME, b"\0"]);
    let modules = place_modules(space, image.modules)?;
    for ((gpa, len), module) in modules.iter().zip(image.modules) {
        let (start, end) = (gpa.0 as u32, (gpa.0 + len) as u32);
        let range = [start.to_le_bytes(), end.to_le_bytes()];
        info.tag(
            given::MODULE,
            &[range.as_flattened(), module.arguments, b"\0"],
        );
    }
    let (lower, upper) = basic_memory(space);
    let basic = [(lower as u32).to_le_bytes(), (upper as u32).to_le_bytes()];
    info.tag(given::BASIC_MEMORY, &[basic.as_flattened()]);

    // Entries of 24 bytes, version 0.
    let mut map = Vec::from([24, 0, 0, 0, 0, 0, 0, 0]);
    for range in space.map() {
        map.extend_from_slice(&range.start.0.to_le_bytes());
        map.extend_from_slice(&range.len.to_le_bytes());
        map.extend_from_slice(&(range.kind as u64).to_le_bytes());
    }
    info.tag(given::MEMORY_MAP, &[&map]);
    if let Some(rsdp) = image.rsdp {
        let mut copy = [0; RSDP_SIZE];
        space.memory().read(rsdp, &mut copy)?;
        info.tag(given::ACPI_NEW, &[&copy]);
    }
    if let Some(base) = load_base {
        info.tag(given::LOAD_BASE, &[&base.to_le_bytes()]);
    }
    let bytes = info.finish();
    let len = bytes.len() as u64;
    let gpa = space.place_conventional("the information structure", len, 8)?;
    space.memory().write(gpa, &bytes)?;
    Ok(gpa)
}
