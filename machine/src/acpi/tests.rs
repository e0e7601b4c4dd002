use super::*;
use crate::layout::MIN_RAM;
use std::vec;
use testudo_arch::memory::GuestRam;

/// Guest memory of the least size, alive as long as the value.
struct Ram {
    _bytes: Vec<u64>,
    memory: GuestRam,
    layout: Layout,
}

#[allow(unsafe_code)]
fn ram() -> Ram {
    let mut bytes = vec![0u64; MIN_RAM as usize / 8];
    let mut memory = GuestRam::new();
    // SAFETY: the vector is kept beside the memory, never reallocated, and not used otherwise.
    unsafe { memory.add(Gpa(0), bytes.as_mut_ptr().cast(), MIN_RAM, true) }.unwrap();
    let layout = Layout::new(MIN_RAM, 40).unwrap();
    Ram {
        _bytes: bytes,
        memory,
        layout,
    }
}

impl Ram {
    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(Gpa(gpa), &mut bytes).unwrap();
        bytes
    }

    fn u32(&self, gpa: u64) -> u32 {
        self.memory.read_value(Gpa(gpa)).unwrap()
    }

    fn u64(&self, gpa: u64) -> u64 {
        self.memory.read_value(Gpa(gpa)).unwrap()
    }

    /// Walks from the RSDP as a system does: every table by signature, checksums verified.
    fn tables(&self, rsdp: Gpa) -> Vec<(Vec<u8>, Gpa)> {
        assert_eq!(self.read(rsdp.0, 8), b"RSD PTR ");
        assert_eq!(sum(&self.read(rsdp.0, 20)), 0);
        assert_eq!(sum(&self.read(rsdp.0, 36)), 0);
        let xsdt = self.table(Gpa(self.u64(rsdp.0 + 24)));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..]
            .chunks_exact(8)
            .map(|entry| Gpa(u64::from_le_bytes(entry.try_into().unwrap())))
            .map(|gpa| (self.table(gpa), gpa))
            .collect()
    }

    fn table(&self, gpa: Gpa) -> Vec<u8> {
        let table = self.read(gpa.0, self.u32(gpa.0 + 4) as usize);
        assert_eq!(sum(&table), 0, "checksum of {:?}", &table[..4]);
        table
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn find<'a>(tables: &'a [(Vec<u8>, Gpa)], signature: &[u8]) -> &'a [u8] {
    let found = tables.iter().find(|(table, _)| &table[..4] == signature);
    &found.expect("the table exists").0
}

#[test]
fn every_table_is_reachable_and_sums_to_zero() {
    let ram = ram();
    let virtio = [VirtioMmio {
        base: layout::VIRTIO_MMIO,
        gsi: 20,
    }];
    let mut extra = Sdt::new(*b"DMAR", 48, 1, OEM, OEM_TABLE, 1);
    extra.write_u8(36, 39);
    let description = Description {
        processors: 2,
        virtio: &virtio,
        ecam: true,
        tables: &[extra.as_slice()],
    };
    let rsdp = install(&ram.memory, &ram.layout, &description).unwrap();
    assert_eq!(rsdp.0, FIRMWARE_AREA.start);
    let tables = ram.tables(rsdp);
    let names: Vec<_> = tables
        .iter()
        .map(|(table, _)| table[..4].to_vec())
        .collect();
    assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"DMAR"]);

    let fadt = find(&tables, b"FACP");
    let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
    let dsdt = u64::from(u32::from_le_bytes(fadt[40..44].try_into().unwrap()));
    assert_eq!(facs % 64, 0);
    assert_eq!(ram.read(facs, 4), b"FACS");
    assert_eq!(fadt[140..148], dsdt.to_le_bytes());
    let dsdt = ram.table(Gpa(dsdt));
    assert_eq!(&dsdt[..4], b"DSDT");
    // Name (\_S5_, Package (4) { 5, 5, 0, 0 }).
    assert_eq!(dsdt[36..50], *b"\x08\\_S5_\x12\x08\x04\x0A\x05\x0A\x05\0");
    for text in [&b"LNRO0005"[..], b"PCI0", b"COM1", b"_PRT", b"ACPI0007"] {
        assert!(dsdt.windows(text.len()).any(|window| window == text));
    }
}

#[test]
fn fixed_registers_are_said_twice_and_alike() {
    let fadt = fadt(Gpa(0xE_0040), Gpa(0xE_0080));
    let bytes = fadt.as_slice();
    assert_eq!(bytes.len(), 276);
    for (port_at, address_at, port) in [
        (56, 148, 0x600u32),
        (64, 172, 0x604),
        (76, 208, 0x608),
        (80, 220, 0x620),
    ] {
        assert_eq!(bytes[port_at..port_at + 4], port.to_le_bytes());
        assert_eq!(bytes[address_at + 4..address_at + 8], port.to_le_bytes());
        assert_eq!(bytes[address_at], 1);
    }
    assert_eq!(
        bytes[116..129],
        [1, 8, 0, 1, 0xF9, 0x0C, 0, 0, 0, 0, 0, 0, 6]
    );
}

#[test]
fn processors_past_the_xapic_are_x2apic_entries() {
    for (processors, len) in [(2, 36 + 8 + 16), (255, 36 + 8 + 255 * 8)] {
        let table = madt(processors);
        assert_eq!(table.len(), len + 12 + 20 + 6);
    }
    let table = madt(257);
    let second = 36 + 8 + 255 * 8 + 16;
    assert_eq!(
        table.as_slice()[second..second + 16],
        [9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    );
    assert_eq!(table.len(), second + 16 + 12 + 20 + 6 + 12);
}

#[test]
fn what_does_not_fit_is_refused() {
    let ram = ram();
    let long = vec![0; 0x2_0000];
    let description = Description {
        processors: 1,
        tables: &[&long],
        ..Description::default()
    };
    let error = install(&ram.memory, &ram.layout, &description).unwrap_err();
    assert!(matches!(error, AcpiError::TooLong(len) if len > 0x2_0000));
    let virtio = [VirtioMmio {
        base: Gpa(1 << 32),
        gsi: 5,
    }];
    let description = Description {
        virtio: &virtio,
        ..Description::default()
    };
    let error = install(&ram.memory, &ram.layout, &description).unwrap_err();
    assert_eq!(error, AcpiError::Window(Gpa(1 << 32)));
    let description = Description {
        processors: 4097,
        ..Description::default()
    };
    let error = install(&ram.memory, &ram.layout, &description).unwrap_err();
    assert_eq!(error, AcpiError::TooMany(4097));
    let nothing = GuestRam::new();
    let error = install(&nothing, &ram.layout, &Description::default()).unwrap_err();
    assert!(matches!(error, AcpiError::Memory(_)));
}
