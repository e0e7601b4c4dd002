//! What the loader left behind, in one shape whichever loader it was.

mod container;
mod multiboot2;
mod pvh;

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use arrayvec::ArrayVec;

/// The loader that started the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// Xen's PVH entry, as `qemu -kernel` uses it.
    Pvh,
    /// Multiboot 2, as GRUB uses it.
    Multiboot2,
}

/// What the firmware says of a range of physical addresses (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Memory free to use.
    Usable,
    /// Not to be used.
    Reserved,
    /// ACPI tables, free once they have been read.
    Acpi,
    /// Firmware memory to be kept across sleep.
    Nvs,
    /// Memory with errors.
    Bad,
    /// A type that the specification gained later.
    Other(u32),
}

impl From<u32> for MemoryKind {
    fn from(number: u32) -> Self {
        match number {
            1 => Self::Usable,
            2 => Self::Reserved,
            3 => Self::Acpi,
            4 => Self::Nvs,
            5 => Self::Bad,
            other => Self::Other(other),
        }
    }
}

/// One entry of the firmware's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// A file that the loader brought with the program.
///
/// Loaders give each module one string: the first word is taken as its name, the rest as its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// What the module is, such as `kernel`.
    pub name: &'static str,
    /// The rest of the module's string.
    pub args: &'static str,
    /// The module's bytes, in memory that is never handed out.
    pub data: &'static [u8],
}

impl Module {
    fn new(string: &'static str, data: &'static [u8]) -> Self {
        let (name, args) = string.split_once(' ').unwrap_or((string, ""));
        Self {
            name,
            args: args.trim_start(),
            data,
        }
    }
}

/// What the loader told the program.
#[derive(Debug)]
pub struct Boot {
    loader: Loader,
    command_line: String,
    modules: Vec<Module>,
    memory_map: Vec<MemoryRange>,
    rsdp: Option<u64>,
}

impl Boot {
    /// Who started the program.
    pub fn loader(&self) -> Loader {
        self.loader
    }

    /// The program's arguments.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// The files that came with the program, in the loader's order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The first module of a name.
    pub fn module(&self, name: &str) -> Option<&Module> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// The firmware's memory map, as it came.
    pub fn memory_map(&self) -> &[MemoryRange] {
        &self.memory_map
    }

    /// The physical address of the ACPI root pointer, if the loader named one.
    pub fn rsdp(&self) -> Option<u64> {
        self.rsdp
    }

    pub(crate) fn from_raw(raw: &Raw) -> Self {
        let mut boot = Self {
            loader: raw.loader,
            command_line: raw.command_line.into(),
            modules: Vec::new(),
            memory_map: raw.memory_map.iter().copied().collect(),
            rsdp: raw.rsdp,
        };
        for &module in &raw.modules {
            match container::entries(module.data) {
                Some(entries) => {
                    for (name, data) in entries {
                        if name == container::COMMAND_LINE {
                            boot.command_line = String::from_utf8_lossy(data).into_owned();
                        } else {
                            boot.modules.push(Module::new(name, data));
                        }
                    }
                }
                None => boot.modules.push(module),
            }
        }
        boot
    }
}

/// The boot information where the loader put it, before there is a heap to copy it to.
pub(crate) struct Raw {
    pub(crate) loader: Loader,
    pub(crate) command_line: &'static str,
    pub(crate) modules: ArrayVec<Module, 64>,
    pub(crate) memory_map: ArrayVec<MemoryRange, 256>,
    pub(crate) rsdp: Option<u64>,
    /// Physical addresses that hold what the fields above refer to.
    pub(crate) occupied: ArrayVec<Range<u64>, 136>,
}

impl Raw {
    fn new(loader: Loader) -> Self {
        Self {
            loader,
            command_line: "",
            modules: ArrayVec::new(),
            memory_map: ArrayVec::new(),
            rsdp: None,
            occupied: ArrayVec::new(),
        }
    }

    /// Reads what the entry code was given: which entry ran, and the address it had in EBX.
    ///
    /// # Safety
    /// Both must be what the loader passed, and its structures must be intact and identity-mapped.
    pub(crate) unsafe fn read(entry: u32, information: u32) -> Option<Self> {
        match entry {
            // SAFETY: passed on from the caller.
            1 => unsafe { pvh::read(information) },
            // SAFETY: passed on from the caller.
            2 => unsafe { multiboot2::read(information) },
            _ => None,
        }
    }
}

/// A zero-terminated string at a physical address, empty if there is none or it is no UTF-8.
///
/// # Safety
/// The address is zero or that of a terminated string which stays intact and identity-mapped.
unsafe fn string_at(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the caller vouches for a terminated string that stays.
    let text = unsafe { core::ffi::CStr::from_ptr(address as *const core::ffi::c_char) };
    text.to_str().unwrap_or("")
}
