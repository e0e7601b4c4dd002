//! Linux's bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst, "The real-
//! mode kernel header" and "64-bit boot protocol").
//!
//! The kernel decompresses itself, as on any PC: the image is used as it is.

use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{DescriptorTable, Gpa, Gprs, GuestMemory};

use super::space::Space;
use super::{BootImage, BootState, CR0_ET, CR0_PE, Fields, LoadError, flat_segments};
use crate::layout::{HIGH_MEMORY, LOW_RAM_LIMIT};

/// Offsets in the file's first sectors, which are also those of `struct boot_params`.
mod offset {
    pub(super) const ACPI_RSDP_ADDR: usize = 0x070;
    pub(super) const EXT_RAMDISK_IMAGE: usize = 0x0C0;
    pub(super) const EXT_RAMDISK_SIZE: usize = 0x0C4;
    pub(super) const EXT_CMD_LINE_PTR: usize = 0x0C8;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const SETUP_HEADER: usize = 0x1F1;
    pub(super) const SYSSIZE: usize = 0x1F4;
    pub(super) const VID_MODE: usize = 0x1FA;
    pub(super) const BOOT_FLAG: usize = 0x1FE;
    pub(super) const JUMP_DISTANCE: usize = 0x201;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22C;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    pub(super) const PAYLOAD_LENGTH: usize = 0x24C;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    pub(super) const E820_TABLE: usize = 0x2D0;
}

/// The size of `struct boot_params`.
const BOOT_PARAMS_SIZE: usize = 4096;
/// How many ranges its memory map holds.
const E820_MAX: usize = 128;
/// Where the setup header may end at most: the next field of `struct boot_params`.
const HEADER_LIMIT: usize = 0x290;
/// Protocol 2.12 (Linux 3.8) is the first with `xloadflags`, which announce the 64-bit entry.
const MIN_VERSION: u16 = 0x020C;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// The 64-bit entry, from the start of the protected-mode kernel.
const ENTRY64: u64 = 0x200;

/// Whether the file begins like a bzImage.
pub(super) fn is_bzimage(kernel: &[u8]) -> bool {
    kernel.get(offset::HEADER..offset::HEADER + 4) == Some(b"HdrS")
        && kernel.get(offset::BOOT_FLAG..offset::BOOT_FLAG + 2) == Some(&[0x55, 0xAA])
}

/// What the loader needs of the setup header, checked against the file.
#[derive(Clone, Copy, Debug)]
struct Header<'a> {
    /// The header as it goes into `boot_params`.
    raw: &'a [u8],
    /// The protected-mode kernel.
    code: &'a [u8],
    xloadflags: u16,
    initrd_addr_max: u32,
    alignment: u64,
    relocatable: bool,
    command_line_max: u32,
    preferred: u64,
    init_size: u64,
}

impl<'a> Header<'a> {
    fn parse(kernel: &'a [u8]) -> Result<Self, LoadError> {
        if !is_bzimage(kernel) {
            return Err(LoadError::UnknownFormat);
        }
        let file = Fields::new("the setup header", kernel);
        let version = file.u16(offset::VERSION as u64)?;
        if version < MIN_VERSION {
            return Err(LoadError::Unsupported {
                what: "its boot protocol is older than 2.12",
                value: u64::from(version),
            });
        }
        let header_end = offset::HEADER + usize::from(file.u8(offset::JUMP_DISTANCE as u64)?);
        if !(offset::INIT_SIZE + 4..=HEADER_LIMIT).contains(&header_end) {
            return Err(LoadError::Corrupt {
                field: "the end of the setup header",
                value: header_end as u64,
            });
        }
        let raw = file.slice(
            offset::SETUP_HEADER as u64,
            (header_end - offset::SETUP_HEADER) as u64,
        )?;
        let loadflags = file.u8(offset::LOADFLAGS as u64)?;
        if loadflags & LOADED_HIGH == 0 {
            return Err(LoadError::Unsupported {
                what: "it is a zImage, not a bzImage",
                value: u64::from(loadflags),
            });
        }
        let xloadflags = file.u16(offset::XLOADFLAGS as u64)?;
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err(LoadError::Unsupported {
                what: "it has no 64-bit entry point, so it is a 32-bit kernel",
                value: u64::from(xloadflags),
            });
        }
        let code = Self::code(kernel)?;
        let alignment = file.u32(offset::KERNEL_ALIGNMENT as u64)?;
        if !alignment.is_power_of_two() {
            return Err(LoadError::Corrupt {
                field: "kernel_alignment",
                value: u64::from(alignment),
            });
        }
        let init_size = file.u32(offset::INIT_SIZE as u64)?;
        if u64::from(init_size) < code.len() as u64 {
            return Err(LoadError::Corrupt {
                field: "init_size",
                value: u64::from(init_size),
            });
        }
        Ok(Self {
            raw,
            code,
            xloadflags,
            initrd_addr_max: file.u32(offset::INITRD_ADDR_MAX as u64)?,
            alignment: u64::from(alignment).max(4096),
            relocatable: file.u8(offset::RELOCATABLE as u64)? != 0,
            command_line_max: file.u32(offset::CMDLINE_SIZE as u64)?,
            preferred: file.u64(offset::PREF_ADDRESS as u64)?,
            init_size: u64::from(init_size),
        })
    }

    /// The protected-mode kernel, with the compressed payload that it names inside.
    fn code(kernel: &'a [u8]) -> Result<&'a [u8], LoadError> {
        let file = Fields::new("the protected-mode kernel", kernel);
        // "If setup_sects is 0, the real value is 4"; the boot sector comes on top.
        let setup_sectors = match file.u8(offset::SETUP_HEADER as u64)? {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let start = (setup_sectors + 1) * 512;
        let len = u64::from(file.u32(offset::SYSSIZE as u64)?) * 16;
        if len <= ENTRY64 {
            return Err(LoadError::Corrupt {
                field: "syssize",
                value: len / 16,
            });
        }
        let code = file.slice(start, len)?;
        let payload = Fields::new("the compressed payload", code);
        payload.slice(
            u64::from(file.u32(offset::PAYLOAD_OFFSET as u64)?),
            u64::from(file.u32(offset::PAYLOAD_LENGTH as u64)?),
        )?;
        Ok(code)
    }
}

pub(super) fn load<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    let header = Header::parse(image.kernel)?;
    if image.command_line.len() as u64 > u64::from(header.command_line_max) {
        return Err(LoadError::CommandLineTooLong {
            len: image.command_line.len() as u64,
            max: u64::from(header.command_line_max),
        });
    }

    let kernel = place_kernel(space, &header)?;
    space.memory().write(kernel, header.code)?;
    let (ramdisk, ramdisk_len) = place_ramdisk(space, &header, image)?;

    let command_line_len = image.command_line.len() as u64 + 1;
    let command_line = space.place_conventional("the command line", command_line_len, 16)?;
    space.write_padded(command_line, image.command_line, command_line_len)?;

    let params = space.place_conventional("boot_params", BOOT_PARAMS_SIZE as u64, 4096)?;
    let mut bytes = [0; BOOT_PARAMS_SIZE];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(offset::SETUP_HEADER, header.raw);
    // No identifier is assigned to this loader.
    put(offset::TYPE_OF_LOADER, &[0xFF]);
    put(offset::VID_MODE, &0xFFFFu16.to_le_bytes());
    put(offset::CODE32_START, &(kernel.0 as u32).to_le_bytes());
    put_wide(
        &mut put,
        offset::CMD_LINE_PTR,
        offset::EXT_CMD_LINE_PTR,
        command_line.0,
    );
    put_wide(
        &mut put,
        offset::RAMDISK_IMAGE,
        offset::EXT_RAMDISK_IMAGE,
        ramdisk.0,
    );
    put_wide(
        &mut put,
        offset::RAMDISK_SIZE,
        offset::EXT_RAMDISK_SIZE,
        ramdisk_len,
    );
    if let Some(rsdp) = image.rsdp {
        put(offset::ACPI_RSDP_ADDR, &rsdp.0.to_le_bytes());
    }
    let map = space.map();
    if map.len() > E820_MAX {
        return Err(LoadError::MapTooLong {
            ranges: map.len(),
            max: E820_MAX,
        });
    }
    put(offset::E820_ENTRIES, &[map.len() as u8]);
    for (index, range) in map.iter().enumerate() {
        let entry = offset::E820_TABLE + index * 20;
        put(entry, &range.start.0.to_le_bytes());
        put(entry + 8, &range.len.to_le_bytes());
        put(entry + 16, &(range.kind as u32).to_le_bytes());
    }
    space.memory().write(params, &bytes)?;

    Ok(BootState {
        system: long_mode(space, kernel.wrapping_add(ENTRY64))?,
        gprs: Gprs {
            rsi: params.0,
            ..Gprs::default()
        },
    })
}

/// Stores the halves of an address where protocol 2.12 keeps them.
fn put_wide(put: &mut impl FnMut(usize, &[u8]), low: usize, high: usize, value: u64) {
    put(low, &(value as u32).to_le_bytes());
    put(high, &((value >> 32) as u32).to_le_bytes());
}

/// The kernel goes where it prefers to be, which saves it a copy, or else to the next aligned place
/// above: below, it would still decompress itself to the preferred address ("runtime_start").
/// There must be room for the decompression, `init_size`.
fn place_kernel<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    header: &Header<'_>,
) -> Result<Gpa, LoadError> {
    if !header.relocatable {
        let preferred = Gpa(header.preferred);
        space.place_at("the kernel", preferred, header.init_size)?;
        return Ok(preferred);
    }
    let within = header.preferred.max(HIGH_MEMORY.0)..LOW_RAM_LIMIT;
    space.place_from("the kernel", header.init_size, header.alignment, within)
}

/// The modules one after the other, each at a multiple of four bytes as the unpacker wants; as high
/// as the kernel takes it, so that decompression has the lower memory.
fn place_ramdisk<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    header: &Header<'_>,
    image: &BootImage<'_>,
) -> Result<(Gpa, u64), LoadError> {
    let mut len = 0u64;
    for module in image.modules {
        len = len.next_multiple_of(4) + module.data.len() as u64;
    }
    if len == 0 {
        return Ok((Gpa::ZERO, 0));
    }
    let limit = if header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
        LOW_RAM_LIMIT.max(u64::from(header.initrd_addr_max) + 1)
    } else {
        u64::from(header.initrd_addr_max) + 1
    };
    let what = "the initial RAM disk";
    let start = match space.place_high(what, len, 4096, limit) {
        Err(_) if header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 => {
            space.place_high(what, len, 4096, u64::MAX)?
        }
        placed => placed?,
    };
    let mut gpa = start;
    for module in image.modules {
        let padded = (module.data.len() as u64).next_multiple_of(4);
        let room = (start.0 + len - gpa.0).min(padded);
        space.write_padded(gpa, module.data, room)?;
        gpa = gpa.wrapping_add(padded);
    }
    Ok((start, len))
}

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
/// The loader's tables map this much, which holds all that it places below 4 GiB.
const IDENTITY_GIB: u64 = 4;

/// 64-bit mode with the first 4 GiB identity-mapped, and the segments that the protocol demands:
/// `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18.
fn long_mode<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    entry: Gpa,
) -> Result<SystemRegisters, LoadError> {
    let tables = space.place_conventional("page tables", (2 + IDENTITY_GIB) * 4096, 4096)?;
    let pdpt = tables.wrapping_add(4096);
    let directories = tables.wrapping_add(2 * 4096);
    let memory = space.memory();
    space.write_padded(
        tables,
        &(pdpt.0 | PAGE_PRESENT_WRITABLE).to_le_bytes(),
        4096,
    )?;
    space.write_padded(pdpt, &[], 4096)?;
    for gib in 0..IDENTITY_GIB {
        let directory = directories.wrapping_add(gib * 4096);
        let entry = (directory.0 | PAGE_PRESENT_WRITABLE).to_le_bytes();
        memory.write(pdpt.wrapping_add(gib * 8), &entry)?;
        let mut page = [0; 4096];
        for (index, entry) in page.chunks_exact_mut(8).enumerate() {
            let address = (gib << 30) | ((index as u64) << 21);
            let value = address | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            entry.copy_from_slice(&value.to_le_bytes());
        }
        memory.write(directory, &page)?;
    }

    const GDT: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
    let gdt = space.place_conventional("the descriptor table", 32, 16)?;
    for (index, descriptor) in GDT.iter().enumerate() {
        let at = gdt.wrapping_add(index as u64 * 8);
        memory.write(at, &descriptor.to_le_bytes())?;
    }

    Ok(SystemRegisters {
        gdtr: DescriptorTable {
            base: gdt.0,
            limit: 31,
        },
        idtr: DescriptorTable::default(),
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: tables.0,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        rip: entry.0,
        ..flat_segments(SegmentAttributes::CODE64)
    })
}

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
