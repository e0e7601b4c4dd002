//! Executables in the ELF format, both classes, as the loaders need them (System V ABI, chapters 4
//! and 5): segments by physical address, and notes.

use testudo_arch::{Gpa, GuestMemory};

use super::space::Space;
use super::{Fields, LoadError};

/// A defect of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// `EI_CLASS` is neither 32-bit nor 64-bit.
    #[error("unknown class {0}")]
    Class(u8),
    /// The data are not little-endian.
    #[error("unknown data encoding {0}")]
    Encoding(u8),
    /// `e_machine` is not an x86 processor.
    #[error("it is made for another processor (machine {0})")]
    Machine(u16),
    /// `e_type` is not an executable.
    #[error("it is not an executable (type {0})")]
    Type(u16),
    /// `e_phentsize` is too small.
    #[error("program headers of {0} bytes")]
    HeaderSize(u16),
    /// There are no loadable segments, or more than [`MAX_SEGMENTS`].
    #[error("{0} program headers, between 1 and {MAX_SEGMENTS} are accepted")]
    Segments(u16),
    /// A segment is longer in the file than in memory, or wraps around.
    #[error("a segment at {start:#x} with {file} bytes in the file and {memory} in memory")]
    Segment {
        /// The physical address.
        start: u64,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        memory: u64,
    },
    /// The entry is not in any loaded segment.
    #[error("the entry {0:#x} is in no segment")]
    Entry(u64),
    /// A note is cut off.
    #[error("a note is cut off")]
    Note,
}

/// The most program headers that are looked at.
pub const MAX_SEGMENTS: u16 = 128;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// One program header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    pub(super) physical_address: u64,
    file_size: u64,
    pub(super) memory_size: u64,
    align: u64,
}

/// An ELF file whose header has been checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elf<'a> {
    file: &'a [u8],
    wide: bool,
    entry: u64,
    headers: u64,
    header_size: u16,
    count: u16,
}

impl<'a> Elf<'a> {
    pub(super) fn is_elf(file: &[u8]) -> bool {
        file.starts_with(b"\x7FELF")
    }

    pub(super) fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        if !Self::is_elf(file) {
            return Err(LoadError::UnknownFormat);
        }
        let header = Fields::new("the ELF header", file);
        let wide = match header.u8(4)? {
            1 => false,
            2 => true,
            class => return Err(ElfError::Class(class).into()),
        };
        match header.u8(5)? {
            1 => {}
            encoding => return Err(ElfError::Encoding(encoding).into()),
        }
        match header.u16(16)? {
            ET_EXEC | ET_DYN => {}
            kind => return Err(ElfError::Type(kind).into()),
        }
        match header.u16(18)? {
            EM_386 | EM_X86_64 => {}
            machine => return Err(ElfError::Machine(machine).into()),
        }
        let (entry, headers, sizes, least) = if wide {
            (header.u64(24)?, header.u64(32)?, 54, 56)
        } else {
            (header.u32(24)?.into(), header.u32(28)?.into(), 42, 32)
        };
        let header_size = header.u16(sizes)?;
        let count = header.u16(sizes + 2)?;
        if count == 0 || count > MAX_SEGMENTS {
            return Err(ElfError::Segments(count).into());
        }
        if header_size < least {
            return Err(ElfError::HeaderSize(header_size).into());
        }
        let elf = Self {
            file,
            wide,
            entry,
            headers,
            header_size,
            count,
        };
        Fields::new("the program header table", file)
            .slice(headers, u64::from(header_size) * u64::from(count))?;
        Ok(elf)
    }

    /// The entry as the file says it: a virtual address.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    fn segments(&self) -> impl Iterator<Item = Result<Segment, LoadError>> + '_ {
        (0..u64::from(self.count)).map(|index| {
            let at = self.headers + index * u64::from(self.header_size);
            let entry = Fields::new("the program header table", self.file);
            if self.wide {
                Ok(Segment {
                    kind: entry.u32(at)?,
                    offset: entry.u64(at + 8)?,
                    virtual_address: entry.u64(at + 16)?,
                    physical_address: entry.u64(at + 24)?,
                    file_size: entry.u64(at + 32)?,
                    memory_size: entry.u64(at + 40)?,
                    align: entry.u64(at + 48)?,
                })
            } else {
                Ok(Segment {
                    kind: entry.u32(at)?,
                    offset: entry.u32(at + 4)?.into(),
                    virtual_address: entry.u32(at + 8)?.into(),
                    physical_address: entry.u32(at + 12)?.into(),
                    file_size: entry.u32(at + 16)?.into(),
                    memory_size: entry.u32(at + 20)?.into(),
                    align: entry.u32(at + 28)?.into(),
                })
            }
        })
    }

    /// The loadable segments that occupy memory, each checked to lie in the file and not to wrap.
    pub(super) fn loadable(&self) -> impl Iterator<Item = Result<Segment, LoadError>> + '_ {
        self.segments()
            .filter(|segment| !matches!(segment, Ok(s) if s.kind != PT_LOAD || s.memory_size == 0))
            .map(|segment| {
                let segment = segment?;
                self.contents(&segment)?;
                let end = segment.physical_address.checked_add(segment.memory_size);
                if segment.file_size > segment.memory_size || end.is_none() {
                    return Err(LoadError::Elf(ElfError::Segment {
                        start: segment.physical_address,
                        file: segment.file_size,
                        memory: segment.memory_size,
                    }));
                }
                Ok(segment)
            })
    }

    fn contents(&self, segment: &Segment) -> Result<&'a [u8], LoadError> {
        Fields::new("a segment", self.file).slice(segment.offset, segment.file_size)
    }

    /// The physical range that all loadable segments span.
    pub(super) fn span(&self) -> Result<core::ops::Range<u64>, LoadError> {
        let mut span: Option<core::ops::Range<u64>> = None;
        for segment in self.loadable() {
            let segment = segment?;
            let range = segment.physical_address..segment.physical_address + segment.memory_size;
            span = Some(match span {
                None => range,
                Some(span) => span.start.min(range.start)..span.end.max(range.end),
            });
        }
        span.ok_or(LoadError::Elf(ElfError::Segments(0)))
    }

    /// The entry's physical address: that of the segment whose virtual addresses hold it.
    pub(super) fn physical_entry(&self) -> Result<u64, LoadError> {
        for segment in self.loadable() {
            let segment = segment?;
            let offset = self.entry.wrapping_sub(segment.virtual_address);
            if offset < segment.memory_size {
                return Ok(segment.physical_address + offset);
            }
        }
        Err(ElfError::Entry(self.entry).into())
    }

    /// Places every loadable segment at its physical address plus `offset` (modulo 2^64).
    pub(super) fn place<M: GuestMemory + ?Sized>(
        &self,
        space: &mut Space<'_, M>,
        offset: u64,
    ) -> Result<(), LoadError> {
        for segment in self.loadable() {
            let segment = segment?;
            let start = Gpa(segment.physical_address).wrapping_add(offset);
            space.place_at("a segment", start, segment.memory_size)?;
            space.write_padded(start, self.contents(&segment)?, segment.memory_size)?;
        }
        Ok(())
    }

    /// The contents of the first note with this owner and type, where there is one.
    pub(super) fn note(&self, owner: &[u8], wanted: u32) -> Result<Option<&'a [u8]>, LoadError> {
        for segment in self.segments() {
            let segment = segment?;
            if segment.kind != PT_NOTE {
                continue;
            }
            let notes = Fields::new("a note segment", self.contents(&segment)?);
            // Entries are aligned to 4 bytes, or to 8 where the segment says so.
            let align = if segment.align == 8 { 8 } else { 4 };
            let mut at = 0;
            while at + 12 <= notes.bytes.len() as u64 {
                let name_size = u64::from(notes.u32(at)?);
                let size = u64::from(notes.u32(at + 4)?);
                let kind = notes.u32(at + 8)?;
                let name = at + 12;
                let contents = (name + name_size).next_multiple_of(align);
                let cut = |_| LoadError::Elf(ElfError::Note);
                let name = notes.slice(name, name_size).map_err(cut)?;
                let bytes = notes.slice(contents, size).map_err(cut)?;
                if kind == wanted && name.strip_suffix(b"\0").unwrap_or(name) == owner {
                    return Ok(Some(bytes));
                }
                at = (contents + size).next_multiple_of(align);
            }
        }
        Ok(None)
    }
}
