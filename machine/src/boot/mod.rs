//! Boot protocols: an unmodified kernel image is placed in guest memory, and the boot processor
//! gets the state in which the kernel expects to be entered.
//!
//! [`detect`] tells which protocol an image speaks and [`load`] places it. The image is a slice of
//! the host's memory that nobody has checked: whatever is wrong with it is a [`LoadError`] that
//! names the defect, and nothing is ever written outside the memory that [`Layout::memory_map`]
//! declares usable, but for the few bytes by which a BIOS would be known: its data area, and
//! interrupt services that all answer "not supported".

mod bzimage;
mod elf;
mod firmware;
mod multiboot1;
mod multiboot2;
mod pvh;
mod space;

use core::ops::Range;

use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Gpa, Gprs, GuestMemory, MemoryFault, Segment};

use crate::layout::{LOW_RAM_LIMIT, Layout, MemoryRange, MemoryType};
use elf::Elf;
pub use elf::{ElfError, MAX_SEGMENTS};
use space::Space;

/// How a kernel image wants to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Linux's own: a bzImage, entered in 64-bit mode (Linux, Documentation/arch/x86/boot.rst).
    Linux64,
    /// Multiboot (specification 0.6.96, its own header in the first 8 KiB).
    Multiboot1,
    /// Multiboot 2 (specification 2.0, its own header in the first 32 KiB).
    Multiboot2,
    /// An ELF file with Xen's note for a 32-bit physical entry (Xen, docs/misc/pvh.pandoc).
    Pvh,
}

/// A module: for Linux a part of the initial RAM disk, for the others a file with arguments.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// The contents.
    pub data: &'a [u8],
    /// The string that goes with it (not for Linux).
    pub arguments: &'a [u8],
}

/// What is to be started.
#[derive(Clone, Copy, Debug)]
pub struct BootImage<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The kernel's command line, without a terminating zero.
    pub command_line: &'a [u8],
    /// The modules, in order. Linux gets them as one RAM disk.
    pub modules: &'a [Module<'a>],
    /// Where the ACPI tables begin, if there are any.
    pub rsdp: Option<Gpa>,
}

/// The state in which the boot processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    /// Everything but the general registers.
    pub system: SystemRegisters,
    /// The general registers.
    pub gprs: Gprs,
}

/// Why a kernel cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file is empty.
    #[error("the kernel is empty")]
    Empty,
    /// The file is compressed as a whole.
    #[error("the kernel file is compressed ({0}): decompress it first")]
    Compressed(&'static str),
    /// No boot protocol is recognized.
    #[error(
        "the file is no x86 kernel: neither a bzImage, nor Multiboot, nor an ELF file with a PVH note"
    )]
    UnknownFormat,
    /// The file lacks something that its headers promise.
    #[error("the kernel is truncated or corrupt: {what} ends at byte {end}, the file at {len}")]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where it should end in the file.
        end: u64,
        /// Where the file ends.
        len: u64,
    },
    /// A header holds what no intact kernel holds.
    #[error("the kernel is corrupt: {field} is {value:#x}")]
    Corrupt {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The kernel is intact but wants what this loader does not do.
    #[error("the kernel cannot be started here: {what} ({value:#x})")]
    Unsupported {
        /// What it wants or lacks.
        what: &'static str,
        /// The field's value.
        value: u64,
    },
    /// The ELF structure is defective.
    #[error("the kernel's ELF structure is defective: {0}")]
    Elf(#[from] ElfError),
    /// The command line is longer than the kernel accepts.
    #[error("the command line is {len} bytes long, the kernel accepts {max}")]
    CommandLineTooLong {
        /// Its length.
        len: u64,
        /// What is accepted.
        max: u64,
    },
    /// A string for the guest has a zero byte in it.
    #[error("{what} has a zero byte at position {position}")]
    ZeroByte {
        /// The string.
        what: &'static str,
        /// Where.
        position: usize,
    },
    /// There is no room for something.
    #[error(
        "too little memory: {what} needs {len} free bytes between {start} and {end}, \
         and the machine has {ram} bytes in all"
    )]
    TooLittleMemory {
        /// What does not fit.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The lowest address that would do.
        start: Gpa,
        /// The end of the addresses that would do.
        end: Gpa,
        /// All memory of the machine.
        ram: u64,
    },
    /// A part with a fixed address does not fit there.
    #[error("{what} must be at {start} + {len:#x}, where there is no usable memory")]
    NotMemory {
        /// What does not fit.
        what: &'static str,
        /// Where it must begin.
        start: Gpa,
        /// Its length.
        len: u64,
    },
    /// Two parts of the kernel claim the same memory.
    #[error("{what} at {start} + {len:#x} overlaps another part of the kernel")]
    Overlap {
        /// The later part.
        what: &'static str,
        /// Where it must begin.
        start: Gpa,
        /// Its length.
        len: u64,
    },
    /// More modules than can be described.
    #[error("{0} modules are too many: at most {MAX_MODULES} can be passed")]
    TooManyModules(usize),
    /// The memory map has more ranges than the protocol can pass.
    #[error("the memory map has {ranges} ranges, the kernel takes {max}")]
    MapTooLong {
        /// How many ranges.
        ranges: usize,
        /// How many are accepted.
        max: usize,
    },
    /// The memory itself refused: the machine's memory is not what the layout says.
    #[error("guest memory does not match the layout: {0}")]
    Memory(#[from] MemoryFault),
}

/// The most modules that are passed.
pub const MAX_MODULES: usize = 128;
/// The longest command line that is passed where the protocol sets no limit.
pub const MAX_COMMAND_LINE: usize = 64 << 10;

/// Which protocol an image speaks; the first of [`Protocol`]'s order that it qualifies for.
///
/// # Errors
///
/// The image is empty, compressed as a whole, made for another processor, or of no known kind.
pub fn detect(kernel: &[u8]) -> Result<Protocol, LoadError> {
    if kernel.is_empty() {
        return Err(LoadError::Empty);
    }
    if bzimage::is_bzimage(kernel) {
        return Ok(Protocol::Linux64);
    }
    if multiboot1::find_header(kernel).is_some() {
        return Ok(Protocol::Multiboot1);
    }
    if multiboot2::find_header(kernel).is_some() {
        return Ok(Protocol::Multiboot2);
    }
    if Elf::is_elf(kernel) {
        let elf = Elf::parse(kernel)?;
        if pvh::entry_note(&elf)?.is_some() {
            return Ok(Protocol::Pvh);
        }
        return Err(LoadError::Unsupported {
            what: "an ELF file without a PVH note or a Multiboot header",
            value: elf.entry(),
        });
    }
    const PACKED: [(&[u8], &str); 5] = [
        (b"\x1F\x8B", "gzip"),
        (b"\xFD7zXZ\0", "xz"),
        (b"\x28\xB5\x2F\xFD", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x04\x22\x4D\x18", "lz4"),
    ];
    match PACKED.iter().find(|(magic, _)| kernel.starts_with(magic)) {
        Some((_, name)) => Err(LoadError::Compressed(name)),
        None => Err(LoadError::UnknownFormat),
    }
}

/// Places the image in the memory of a machine and gives the boot processor's first state.
///
/// The ACPI tables, if any, are in memory already (see [`crate::acpi`]); they lie in the firmware
/// area, which no loader touches.
///
/// # Errors
///
/// Whatever is wrong with the image, or does not fit the memory. Guest memory may have been written
/// by then.
pub fn load<M: GuestMemory + ?Sized>(
    memory: &M,
    layout: &Layout,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    load_as(detect(image.kernel)?, memory, layout, image)
}

/// As [`load`], by a protocol that the caller has chosen among those an image offers.
///
/// # Errors
///
/// As [`load`]; also when the image does not offer this protocol.
pub fn load_as<M: GuestMemory + ?Sized>(
    protocol: Protocol,
    memory: &M,
    layout: &Layout,
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    firmware::write(memory)?;
    let ram = layout.ram().map(|(_, len)| len).sum();
    place(protocol, memory, (&layout.memory_map(), ram), &[], image)
}

/// Places the image in the memory of a machine that has its own firmware, whose memory map the
/// kernel is told as it is: for a hypervisor that passes a real machine on.
///
/// Nothing is written but to usable memory of the map, and there not to the ranges `taken`, in
/// which the image itself may be.
///
/// # Errors
///
/// As [`load`].
pub fn load_beside_firmware<M: GuestMemory + ?Sized>(
    memory: &M,
    map: &[MemoryRange],
    taken: &[Range<u64>],
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    let usable = map.iter().filter(|range| range.kind == MemoryType::Usable);
    let ram = usable.map(|range| range.len).sum();
    place(detect(image.kernel)?, memory, (map, ram), taken, image)
}

fn place<M: GuestMemory + ?Sized>(
    protocol: Protocol,
    memory: &M,
    map: (&[MemoryRange], u64),
    taken: &[Range<u64>],
    image: &BootImage<'_>,
) -> Result<BootState, LoadError> {
    if image.modules.len() > MAX_MODULES {
        return Err(LoadError::TooManyModules(image.modules.len()));
    }
    check_string("the command line", image.command_line, MAX_COMMAND_LINE)?;
    for module in image.modules {
        check_string("a module's string", module.arguments, MAX_COMMAND_LINE)?;
    }
    let mut space = Space::new(memory, map, taken);
    match protocol {
        Protocol::Linux64 => bzimage::load(&mut space, image),
        Protocol::Multiboot2 => multiboot2::load(&mut space, image),
        Protocol::Multiboot1 => multiboot1::load(&mut space, image),
        Protocol::Pvh => pvh::load(&mut space, image),
    }
}

fn check_string(what: &'static str, bytes: &[u8], max: usize) -> Result<(), LoadError> {
    if let Some(position) = bytes.iter().position(|byte| *byte == 0) {
        return Err(LoadError::ZeroByte { what, position });
    }
    if bytes.len() > max {
        return Err(LoadError::CommandLineTooLong {
            len: bytes.len() as u64,
            max: max as u64,
        });
    }
    Ok(())
}

/// The modules, each at a page of its own, as high below 4 GiB as there is room.
fn place_modules<M: GuestMemory + ?Sized>(
    space: &mut Space<'_, M>,
    modules: &[Module<'_>],
) -> Result<alloc::vec::Vec<(Gpa, u64)>, LoadError> {
    let mut placed = alloc::vec::Vec::with_capacity(modules.len());
    for module in modules {
        let len = module.data.len() as u64;
        let gpa = space.place_high("a module", len, 4096, LOW_RAM_LIMIT)?;
        space.memory().write(gpa, module.data)?;
        placed.push((gpa, len));
    }
    Ok(placed)
}

/// 32-bit protected mode without paging, flat segments, interrupts off: the state that PVH and both
/// Multiboot specifications ask for.
fn flat_protected_mode(entry: u32) -> SystemRegisters {
    SystemRegisters {
        cr0: CR0_PE | CR0_ET,
        rip: u64::from(entry),
        ..flat_segments(SegmentAttributes::CODE32)
    }
}

/// All segments flat, the code with selector 0x10 and the data with 0x18, and interrupts off.
fn flat_segments(code: SegmentAttributes) -> SystemRegisters {
    let data = Segment::flat(0x18, SegmentAttributes::DATA);
    SystemRegisters {
        cs: Segment::flat(0x10, code),
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        tr: Segment {
            selector: 0,
            attributes: SegmentAttributes::TSS_BUSY,
            limit: 0x67,
            base: 0,
        },
        ..SystemRegisters::reset()
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;

/// Reads little-endian fields of a header that is known to be long enough, or says it is not.
#[derive(Clone, Copy)]
struct Fields<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    const fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    fn slice(&self, offset: u64, len: u64) -> Result<&'a [u8], LoadError> {
        let end = offset.saturating_add(len);
        let truncated = LoadError::Truncated {
            what: self.what,
            end,
            len: self.bytes.len() as u64,
        };
        let (Ok(from), Ok(to)) = (usize::try_from(offset), usize::try_from(end)) else {
            return Err(truncated);
        };
        self.bytes.get(from..to).ok_or(truncated)
    }

    fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], LoadError> {
        let mut array = [0; N];
        array.copy_from_slice(self.slice(offset, N as u64)?);
        Ok(array)
    }

    fn u8(&self, offset: u64) -> Result<u8, LoadError> {
        self.array::<1>(offset).map(u8::from_le_bytes)
    }

    fn u16(&self, offset: u64) -> Result<u16, LoadError> {
        self.array(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: u64) -> Result<u32, LoadError> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: u64) -> Result<u64, LoadError> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
