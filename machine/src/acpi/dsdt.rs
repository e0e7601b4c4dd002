//! The differentiated system description table: the devices that cannot be probed.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use alloc::format;
use alloc::vec::Vec;

use super::{Description, OEM, OEM_REVISION, OEM_TABLE, VirtioMmio};
use crate::layout::{self, Layout};

pub(super) fn build(layout: &Layout, description: &Description<'_>) -> Sdt {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    for id in 0..description.processors {
        processor(&mut aml, id);
    }
    pci_root(&mut aml, layout, description.ecam);
    fixed_devices(&mut aml);
    for (index, device) in description.virtio.iter().enumerate() {
        virtio(&mut aml, index, device);
    }
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// `\_S5`: SLP_TYP for both control registers (ACPI 6.5, 7.4.2.6).
fn sleep_states(aml: &mut Vec<u8>) {
    let kind = layout::S5_SLEEP_TYPE;
    let package = Package::new(Vec::from([&kind as &dyn Aml, &kind, &0u8, &0u8]));
    Name::new(Path::new("\\_S5_"), &package).to_aml_bytes(aml);
}

/// A device under `\_SB` with the given objects.
fn system_device(aml: &mut Vec<u8>, name: &str, objects: Vec<&dyn Aml>) {
    let device = Device::new(Path::new(name), objects);
    Scope::new(Path::new("\\_SB_"), Vec::from([&device as &dyn Aml])).to_aml_bytes(aml);
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

fn processor(aml: &mut Vec<u8>, id: u32) {
    let hid = name("_HID", &"ACPI0007");
    let uid = name("_UID", &id);
    let path = format!("C{id:03X}");
    system_device(aml, &path, Vec::from([&hid as &dyn Aml, &uid]));
}

/// The host bridge with its windows and interrupt routing (ACPI 6.5, 6.2.13 and 6.4.3.5).
fn pci_root(aml: &mut Vec<u8>, layout: &Layout, ecam: bool) {
    let (express, bridge) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let hid = name("_HID", if ecam { &express } else { &bridge });
    let cid = name("_CID", &bridge);
    let uid = name("_UID", &0u8);
    let segment = name("_SEG", &0u8);
    let bus = name("_BBN", &0u8);

    let config = &layout::PCI_CONFIG_PORTS;
    let config_ports = IO::new(
        config.start,
        config.start,
        1,
        (config.end - config.start) as u8,
    );
    let buses = AddressSpace::new_bus_number(0u16, 255);
    let ports = AddressSpace::new_io(
        layout::PCI_PORTS.start as u16,
        (layout::PCI_PORTS.end - 1) as u16,
        None,
    );
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = &layout::PCI_MMIO32;
    let memory32 =
        AddressSpace::new_memory(uncached, true, low.start as u32, (low.end - 1) as u32, None);
    let high = layout.pci_mmio64();
    let memory64 = AddressSpace::new_memory(uncached, true, high.start, high.end - 1, None);
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(Vec::from([
            &buses as &dyn Aml,
            &config_ports,
            &ports,
            &memory32,
            &memory64,
        ])),
    );

    let mut routes = PackageBuilder::new();
    for device in 0..32u32 {
        for pin in 0..4u8 {
            let line = (device as usize + usize::from(pin)) % layout::PCI_GSIS.len();
            let address = (device << 16) | 0xFFFF;
            let gsi = layout::PCI_GSIS[line];
            let route = Package::new(Vec::from([&address as &dyn Aml, &pin, &0u8, &gsi]));
            routes.add_element(&route);
        }
    }
    let routing = name("_PRT", &routes);
    let objects: [&dyn Aml; 7] = [&hid, &cid, &uid, &segment, &bus, &resources, &routing];
    system_device(aml, "PCI0", Vec::from(objects));
}

/// COM1 and the real-time clock.
fn fixed_devices(aml: &mut Vec<u8>) {
    let devices = [
        ("COM1", "PNP0501", layout::COM1, 8, layout::COM1_GSI),
        ("RTC0", "PNP0B00", layout::RTC, 2, layout::RTC_GSI),
    ];
    for (path, id, port, len, gsi) in devices {
        let hid = name("_HID", &EISAName::new(id));
        let uid = name("_UID", &1u8);
        let ports = IO::new(port, port, 1, len);
        let interrupt = Interrupt::new(true, true, false, false, u32::from(gsi));
        let resources = ResourceTemplate::new(Vec::from([&ports as &dyn Aml, &interrupt]));
        let resources = name("_CRS", &resources);
        system_device(aml, path, Vec::from([&hid as &dyn Aml, &uid, &resources]));
    }
}

fn virtio(aml: &mut Vec<u8>, index: usize, device: &VirtioMmio) {
    let hid = name("_HID", &"LNRO0005");
    let uid = name("_UID", &(index as u32));
    let window = Memory32Fixed::new(
        true,
        device.base.0 as u32,
        layout::VIRTIO_MMIO_STRIDE as u32,
    );
    let interrupt = Interrupt::new(true, false, false, false, u32::from(device.gsi));
    let resources = ResourceTemplate::new(Vec::from([&window as &dyn Aml, &interrupt]));
    let resources = name("_CRS", &resources);
    let path = format!("V{index:03X}");
    system_device(aml, &path, Vec::from([&hid as &dyn Aml, &uid, &resources]));
}
