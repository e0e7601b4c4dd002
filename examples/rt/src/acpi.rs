//! The ACPI tables, as far as it takes to find processors and interrupt controllers (ACPI 6.5, 5.2).

use alloc::vec::Vec;

const RSDP_SIGNATURE: &[u8; 8] = b"RSD PTR ";
/// Where a PC's firmware may put the root pointer: on a 16-byte boundary in here (ACPI 6.5, 5.2.5.1).
const BIOS_AREA: core::ops::Range<usize> = 0xe_0000..0x10_0000;
/// Holds the segment of the extended BIOS data area, the other place.
const EBDA_SEGMENT: *const u16 = 0x40e as *const u16;

/// Header of every table.
const HEADER: usize = 36;

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)) == 0
}

/// The machine's tables.
pub struct Tables {
    addresses: Vec<u64>,
}

impl Tables {
    /// Reads the list of tables, from the root pointer that the loader gave or that a search finds.
    ///
    /// # Safety
    /// Firmware memory is intact and identity-mapped; `rsdp` is what the loader gave.
    pub(crate) unsafe fn find(rsdp: Option<u64>) -> Self {
        // SAFETY: passed on from the caller.
        let addresses = unsafe { rsdp.or_else(|| search()).and_then(|rsdp| list(rsdp)) };
        Self {
            addresses: addresses.unwrap_or_default(),
        }
    }

    /// The tables of the machine that booted the program.
    #[cfg(not(test))]
    pub fn of(boot: &crate::Boot) -> Self {
        // SAFETY: firmware memory is not among what the allocator hands out, and the pointer is the loader's.
        unsafe { Self::find(boot.rsdp()) }
    }

    /// The first table of a signature whose checksum is right.
    pub fn table(&self, signature: &[u8; 4]) -> Option<&'static [u8]> {
        // SAFETY: `find`'s caller vouches for firmware memory, which nobody writes.
        self.addresses
            .iter()
            .find_map(|&address| unsafe { table(address, signature) })
    }
}

/// # Safety
/// As for [`Tables::find`].
unsafe fn search() -> Option<u64> {
    // SAFETY: the first megabyte is mapped, and the caller vouches for its contents.
    let ebda = unsafe { usize::from(EBDA_SEGMENT.read_volatile()) << 4 };
    [ebda..ebda + 1024, BIOS_AREA]
        .into_iter()
        .filter(|area| area.start >= 0x400)
        .find_map(|area| {
            area.step_by(16)
                .map(|address| address as u64)
                .find(|&address| {
                    // SAFETY: as above; 20 bytes from any of these addresses are still in the first megabyte.
                    let pointer = unsafe { core::slice::from_raw_parts(address as *const u8, 20) };
                    pointer.starts_with(RSDP_SIGNATURE) && sums_to_zero(pointer)
                })
        })
}

/// The addresses that the root table lists.
///
/// # Safety
/// As for [`Tables::find`].
unsafe fn list(rsdp: u64) -> Option<Vec<u64>> {
    // SAFETY: the caller vouches for the root pointer, which has 36 bytes from revision 2 on.
    let pointer = unsafe { core::slice::from_raw_parts(rsdp as *const u8, 20) };
    if !pointer.starts_with(RSDP_SIGNATURE) {
        return None;
    }
    if pointer[15] >= 2 {
        // SAFETY: as above.
        let pointer = unsafe { core::slice::from_raw_parts(rsdp as *const u8, 36) };
        // SAFETY: passed on from the caller.
        let xsdt = u64_at(pointer, 24).and_then(|address| unsafe { table(address, b"XSDT") });
        if let Some(xsdt) = xsdt {
            return Some(
                xsdt[HEADER..]
                    .chunks_exact(8)
                    .filter_map(|entry| u64_at(entry, 0))
                    .collect(),
            );
        }
    }
    // SAFETY: passed on from the caller.
    let rsdt = unsafe { table(u64::from(u32_at(pointer, 16)?), b"RSDT") }?;
    let entries = rsdt[HEADER..].chunks_exact(4);
    Some(
        entries
            .filter_map(|entry| u32_at(entry, 0).map(u64::from))
            .collect(),
    )
}

/// A table, if there is one of this signature with a right checksum.
///
/// # Safety
/// As for [`Tables::find`]; the address is one that firmware gave.
unsafe fn table(address: u64, signature: &[u8; 4]) -> Option<&'static [u8]> {
    if address == 0 || address >= crate::memory::paging::mapped_end() {
        return None;
    }
    // SAFETY: the caller vouches for the address; every table begins with a header.
    let header = unsafe { core::slice::from_raw_parts(address as *const u8, HEADER) };
    let length = u32_at(header, 4)? as usize;
    if !header.starts_with(signature) || length < HEADER {
        return None;
    }
    // SAFETY: the header states the length.
    let table = unsafe { core::slice::from_raw_parts(address as *const u8, length) };
    sums_to_zero(table).then_some(table)
}

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoApic {
    pub(crate) address: u32,
    /// The global number of its first input.
    pub(crate) first_input: u32,
}

/// How an ISA interrupt is wired, where it is not the plain way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Override {
    pub(crate) irq: u8,
    pub(crate) input: u32,
    pub(crate) active_low: bool,
    pub(crate) level: bool,
}

/// The multiple APIC description table (ACPI 6.5, 5.2.12).
#[derive(Debug, Default)]
pub(crate) struct Madt {
    /// Local APIC numbers of the processors that can be started.
    pub(crate) processors: Vec<u32>,
    pub(crate) io_apics: Vec<IoApic>,
    pub(crate) overrides: Vec<Override>,
}

impl Madt {
    /// Reads the table; entries that are cut short end it.
    pub(crate) fn parse(table: &[u8]) -> Self {
        const ENABLED: u32 = 1;
        let mut madt = Self::default();
        let mut rest = table.get(HEADER + 8..).unwrap_or(&[]);
        while let Some((&[kind, length], _)) = rest.split_first_chunk() {
            let Some(entry) = rest
                .get(..usize::from(length))
                .filter(|entry| entry.len() >= 2)
            else {
                break;
            };
            rest = &rest[entry.len()..];
            madt.add(kind, entry, ENABLED);
        }
        madt
    }

    /// Takes in one entry; `None` where it is too short for its kind.
    fn add(&mut self, kind: u8, entry: &[u8], enabled: u32) -> Option<()> {
        match kind {
            0 if u32_at(entry, 4)? & enabled != 0 => self.processors.push(u32::from(entry[3])),
            1 => self.io_apics.push(IoApic {
                address: u32_at(entry, 4)?,
                first_input: u32_at(entry, 8)?,
            }),
            2 => {
                let input = u32_at(entry, 4)?;
                let flags = *entry.get(8)?;
                self.overrides.push(Override {
                    irq: entry[3],
                    input,
                    active_low: flags & 0b11 == 0b11,
                    level: flags >> 2 & 0b11 == 0b11,
                });
            }
            9 if u32_at(entry, 8)? & enabled != 0 => self.processors.push(u32_at(entry, 4)?),
            _ => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;

    fn table(entries: &[&[u8]]) -> Vec<u8> {
        let mut table = vec![0; HEADER + 8];
        entries
            .iter()
            .for_each(|entry| table.extend_from_slice(entry));
        table
    }

    #[test]
    fn processors_controllers_and_overrides_are_found() {
        let madt = Madt::parse(&table(&[
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[0, 8, 1, 1, 0, 0, 0, 0],
            &[0, 8, 2, 2, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[2, 10, 0, 9, 9, 0, 0, 0, 0x0f, 0],
            &[9, 16, 0, 0, 0x2c, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        ]));
        assert_eq!(madt.processors, [0, 2, 0x12c]);
        assert_eq!(
            madt.io_apics,
            [IoApic {
                address: 0xfec0_0000,
                first_input: 0
            }]
        );
        assert_eq!(
            madt.overrides,
            [Override {
                irq: 9,
                input: 9,
                active_low: true,
                level: true
            }]
        );
    }

    #[test]
    fn a_damaged_table_ends_without_a_panic() {
        assert!(Madt::parse(&[]).processors.is_empty());
        let whole = table(&[
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        ]);
        for length in 0..whole.len() {
            assert!(Madt::parse(&whole[..length]).io_apics.is_empty());
        }
        assert!(Madt::parse(&table(&[&[0, 0, 1, 1]])).processors.is_empty());
        assert!(
            Madt::parse(&table(&[&[0, 3, 1], &[9, 4, 1, 1]]))
                .processors
                .is_empty()
        );
    }
}
