//! ACPI tables: what the machine tells a guest about its hardware (ACPI specification 6.5).
//!
//! The machine is a classical PC, not a hardware-reduced one: it has both legacy interrupt
//! controllers and timers, the fixed power-management registers, and no SMI, so that it is in ACPI
//! mode from the start (SCI_EN always reads as set). Addresses and ports come from
//! [`crate::layout`], which the devices use too.

mod dsdt;
mod viot;

use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, mcfg::MCFG};
use alloc::vec::Vec;
use testudo_arch::{Gpa, GuestMemory, MemoryFault};

pub(crate) use viot::viot;
pub use viot::{TopologyPlace, VirtioTopology};

use crate::layout::{self, FIRMWARE_AREA, FIRMWARE_CODE, Layout};

const OEM: [u8; 6] = *b"TSTUDO";
const OEM_TABLE: [u8; 8] = *b"TESTUDO ";
const OEM_REVISION: u32 = 1;

/// A virtio device behind a window of its own, announced as `LNRO0005`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VirtioMmio {
    /// The window: [`layout::VIRTIO_MMIO_STRIDE`] bytes below 4 GiB.
    pub base: Gpa,
    /// The interrupt, level-triggered and active high.
    pub gsi: u8,
}

/// What the tables describe beyond the machine's fixed parts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Description<'a> {
    /// The number of processors; processor `n` has the local APIC number `n`.
    pub processors: u32,
    /// The virtio devices behind windows.
    pub virtio: &'a [VirtioMmio],
    /// Whether PCI configuration space is also at [`layout::PCI_ECAM`].
    pub ecam: bool,
    /// Further tables, complete with header and checksum (DMAR, IVRS, VIOT, …).
    pub tables: &'a [&'a [u8]],
}

/// The most processors, and the most virtio windows: three hexadecimal digits name them.
pub const MAX_DEVICES: u64 = 0x1000;

/// Why the tables could not be put into guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// They are too long for the firmware area.
    #[error("the ACPI tables need {0:#x} bytes, the firmware area has fewer")]
    TooLong(u64),
    /// More devices of one kind than can be named.
    #[error("{0} are more than the {MAX_DEVICES} processors or virtio windows that can be named")]
    TooMany(u64),
    /// A virtio window does not lie below 4 GiB.
    #[error("the virtio window at {0} is not below 4 GiB")]
    Window(Gpa),
    /// The firmware area is not memory.
    #[error("the firmware area is not memory: {0}")]
    Memory(#[from] MemoryFault),
}

/// Writes all tables into the firmware area and returns the address of the RSDP, which is the
/// area's first byte and so also where a search finds it.
///
/// # Errors
///
/// The tables do not fit, or the memory is not what the layout says.
pub fn install<M: GuestMemory + ?Sized>(
    memory: &M,
    layout: &Layout,
    description: &Description<'_>,
) -> Result<Gpa, AcpiError> {
    let counts = [
        u64::from(description.processors),
        description.virtio.len() as u64,
    ];
    if let Some(count) = counts.into_iter().find(|count| *count > MAX_DEVICES) {
        return Err(AcpiError::TooMany(count));
    }
    for device in description.virtio {
        if device.base.0 > u64::from(u32::MAX) - layout::VIRTIO_MMIO_STRIDE {
            return Err(AcpiError::Window(device.base));
        }
    }
    let rsdp = Gpa(FIRMWARE_AREA.start);
    let mut writer = Writer {
        memory,
        next: FIRMWARE_AREA.start + 64,
    };
    let facs = writer.put(&bytes_of(&FACS::new()))?;
    let dsdt = writer.put(dsdt::build(layout, description).as_slice())?;
    let mut tables = Vec::from([
        writer.put(fadt(facs, dsdt).as_slice())?,
        writer.put(madt(description.processors).as_slice())?,
    ]);
    if description.ecam {
        let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, 255);
        tables.push(writer.put(&bytes_of(&mcfg))?);
    }
    for table in description.tables {
        tables.push(writer.put(table)?);
    }
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table.0);
    }
    let xsdt = writer.put(&bytes_of(&xsdt))?;
    memory.write(rsdp, &bytes_of(&Rsdp::new(OEM, xsdt.0)))?;
    Ok(rsdp)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Puts one table after the other, each at a multiple of 64 bytes as the FACS demands.
struct Writer<'m, M: ?Sized> {
    memory: &'m M,
    next: u64,
}

impl<M: GuestMemory + ?Sized> Writer<'_, M> {
    fn put(&mut self, table: &[u8]) -> Result<Gpa, AcpiError> {
        let start = Gpa(self.next);
        let end = start.0 + table.len() as u64;
        if end > FIRMWARE_CODE.0 {
            return Err(AcpiError::TooLong(end - FIRMWARE_AREA.start));
        }
        self.memory.write(start, table)?;
        self.next = end.next_multiple_of(64);
        Ok(start)
    }
}

/// The fixed description table (ACPI 6.5, 5.2.9).
fn fadt(facs: Gpa, dsdt: Gpa) -> Sdt {
    const LENGTH: u32 = 276;
    // WBINVD works; C1 on all processors; no sleep button; no wake-up by the clock; the timer has
    // 32 bits; there is a reset register.
    const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;
    // Legacy devices (serial port); no VGA. No keyboard controller is announced.
    const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 2;

    let mut table = Sdt::new(*b"FACP", LENGTH, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.write_u32(36, facs.0 as u32);
    table.write_u32(40, dsdt.0 as u32);
    table.write_u16(46, u16::from(layout::SCI_GSI));
    // Each block twice: its port, and its generic address.
    let blocks = [
        (56, 88, 148, layout::PM1A_EVENT, layout::PM1A_EVENT_LEN),
        (64, 89, 172, layout::PM1A_CONTROL, layout::PM1A_CONTROL_LEN),
        (76, 91, 208, layout::PM_TIMER, 4),
        (80, 92, 220, layout::GPE0, layout::GPE0_LEN),
    ];
    for (port_at, len_at, address_at, port, len) in blocks {
        table.write_u32(port_at, u32::from(port));
        table.write_u8(len_at, len);
        table.write_bytes(address_at, &io_address(port, len * 8));
    }
    // Latencies over these limits say that C2 and C3 do not exist.
    table.write_u16(96, 101);
    table.write_u16(98, 1001);
    table.write_u16(109, BOOT_ARCHITECTURE);
    table.write_u32(112, FLAGS);
    table.write_bytes(116, &io_address(layout::RESET_PORT, 8));
    table.write_u8(128, layout::RESET_VALUE);
    table.write_u8(131, 5);
    table.write_u64(140, dsdt.0);
    table.write_u64(268, u64::from_le_bytes(*b"Testudo\0"));
    table
}

/// A generic address structure for a port (ACPI 6.5, 5.2.3.2).
fn io_address(port: u16, bits: u8) -> [u8; 12] {
    const SYSTEM_IO: u8 = 1;
    let access_size = match bits {
        8 => 1,
        16 => 2,
        _ => 3,
    };
    let mut address = [0; 12];
    address[..4].copy_from_slice(&[SYSTEM_IO, bits, 0, access_size]);
    address[4..6].copy_from_slice(&port.to_le_bytes());
    address
}

/// The interrupt controllers (ACPI 6.5, 5.2.12).
fn madt(processors: u32) -> Sdt {
    const ENABLED: u32 = 1;
    /// The PC has two 8259s besides.
    const PCAT_COMPATIBLE: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 0b11_01;

    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LAPIC.0 as u32).to_le_bytes());
    body.extend_from_slice(&PCAT_COMPATIBLE.to_le_bytes());
    for id in 0..processors {
        // Number 255 is the broadcast of the xAPIC: from there on only x2APIC entries will do.
        match u8::try_from(id) {
            Ok(id) if id < 255 => {
                body.extend_from_slice(&[0, 8, id, id]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
            }
            _ => {
                body.extend_from_slice(&[9, 16, 0, 0]);
                for word in [id, ENABLED, id] {
                    body.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
    body.extend_from_slice(&[1, 12, layout::IOAPIC_ID, 0]);
    body.extend_from_slice(&(layout::IOAPIC.0 as u32).to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    // The PIT is wired to input 2; the SCI is level-triggered.
    let overrides = [
        (0, 2, 0),
        (layout::SCI_GSI, layout::SCI_GSI, ACTIVE_HIGH_LEVEL),
    ];
    for (irq, gsi, flags) in overrides {
        body.extend_from_slice(&[2, 10, 0, irq]);
        body.extend_from_slice(&u32::from(gsi).to_le_bytes());
        body.extend_from_slice(&flags.to_le_bytes());
    }
    // NMI on LINT1 of all processors, in both numberings.
    body.extend_from_slice(&[4, 6, 0xFF, 0, 0, 1]);
    if processors > 255 {
        body.extend_from_slice(&[10, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
    }
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

#[cfg(test)]
mod tests;
