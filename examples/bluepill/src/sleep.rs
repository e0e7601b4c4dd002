//! The sleep states. From S2 and S3 a processor wakes up by a reset, and so without a hypervisor, while memory
//! keeps all that is in it: the guest would find the hypervisor's. Of the ways to begin them, the register of
//! ACPI's fixed hardware is watched (ACPI 6.5, 4.8.3.2.1): only soft off, S5, passes.

use core::ops::Range;

use testudo_rt::acpi::Tables;
use testudo_rt::memory::paging;

/// Where the FADT has the DSDT and the two control blocks (ACPI 6.5, table 5.9).
const DSDT: usize = 40;
const CONTROL_BLOCKS: [usize; 2] = [64, 68];
const CONTROL_LENGTH: usize = 89;

/// In the register's second byte: SLP_EN, and SLP_TYP.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u32 = 2;

/// AML (ACPI 6.5, 20.2): the prefix of a byte, and what begins a package.
const BYTE_PREFIX: u8 = 0x0A;
const PACKAGE: u8 = 0x12;

/// The registers that put the machine to sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SleepControl {
    /// The second byte of each, by its port; 0 where there is none.
    ports: [u16; 2],
    /// SLP_TYP of soft off, if the firmware says it.
    soft_off: Option<u8>,
}

impl SleepControl {
    /// As the firmware describes it.
    pub(crate) fn of(tables: &Tables) -> Self {
        let Some(fadt) = tables.table(b"FACP") else {
            return Self::default();
        };
        let length = fadt.get(CONTROL_LENGTH).copied().unwrap_or(0);
        let ports = CONTROL_BLOCKS.map(|offset| match u32_at(fadt, offset) {
            Some(block) if block != 0 && length >= 2 => (block as u16).wrapping_add(1),
            _ => 0,
        });
        let dsdt = u32_at(fadt, DSDT).and_then(definition_block);
        Self {
            ports,
            soft_off: dsdt.and_then(soft_off),
        }
    }

    /// The ports that are watched.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> {
        self.ports.into_iter().filter(|&port| port != 0)
    }

    /// What a write of `value` to `size` bytes of ports from `port` on may write.
    pub(crate) fn filter(&self, port: u16, size: u8, value: u32) -> u32 {
        let mut bytes = value.to_le_bytes();
        let written: Range<usize> = 0..usize::from(size);
        for watched in self.ports() {
            let Some(offset) = watched.checked_sub(port).map(usize::from) else {
                continue;
            };
            if !written.contains(&offset) {
                continue;
            }
            let byte = &mut bytes[offset];
            let kind = *byte >> SLEEP_TYPE & 7;
            if *byte & SLEEP_ENABLE != 0 && self.soft_off != Some(kind) {
                *byte &= !SLEEP_ENABLE;
            }
        }
        u32::from_le_bytes(bytes)
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// The DSDT, which no root table lists.
fn definition_block(address: u32) -> Option<&'static [u8]> {
    const HEADER: usize = 36;
    let address = u64::from(address);
    if address == 0 || address + HEADER as u64 > paging::mapped() {
        return None;
    }
    // SAFETY: firmware's tables are mapped and nobody writes them before the guest runs; a table begins with a
    // header.
    let header = unsafe { core::slice::from_raw_parts(address as *const u8, HEADER) };
    let length = u32_at(header, 4)? as usize;
    if !header.starts_with(b"DSDT") || address + length as u64 > paging::mapped() {
        return None;
    }
    // SAFETY: as above; the header states the length.
    Some(unsafe { core::slice::from_raw_parts(address as *const u8, length) })
}

/// SLP_TYP of the first control register in the package `_S5_`, which needs no interpreter: all its elements are
/// constants.
fn soft_off(aml: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"_S5_";
    let at = aml.windows(NAME.len()).position(|bytes| bytes == NAME)?;
    let [PACKAGE, rest @ ..] = aml.get(at + NAME.len()..)? else {
        return None;
    };
    // The length's first byte says how many follow it; after the length comes the number of elements.
    let more = usize::from(rest.first()? >> 6);
    match rest.get(more + 2..)? {
        [BYTE_PREFIX, value, ..] | [value @ (0 | 1), ..] => Some(*value),
        _ => None,
    }
}
