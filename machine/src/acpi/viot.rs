//! The virtual I/O translation table (ACPI 6.5, 5.2.34): which devices are behind a virtio IOMMU.

use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;
use testudo_arch::Gpa;

use super::{OEM, OEM_REVISION, OEM_TABLE};

/// Types of nodes (ACPI 6.5, table 5.156).
mod node {
    pub(super) const PCI_RANGE: u8 = 1;
    pub(super) const MMIO_ENDPOINT: u8 = 2;
    pub(super) const PCI_IOMMU: u8 = 3;
    pub(super) const MMIO_IOMMU: u8 = 4;
}

/// Where the first node begins: behind the header, the number of nodes and their offset.
const FIRST_NODE: u16 = 48;

/// Where a device is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TopologyPlace {
    /// At this number of bus 0: five bits of device, three of function.
    Pci(u16),
    /// Behind a window of registers.
    Mmio(Gpa),
}

impl TopologyPlace {
    /// The number by which the IOMMU knows the device: a function's own, and for a window that of
    /// its page, past all functions'. Windows lie below 4 GiB.
    pub const fn endpoint(self) -> u32 {
        match self {
            Self::Pci(function) => function as u32,
            Self::Mmio(base) => 0x1_0000 | (base.0 >> 12) as u32,
        }
    }
}

/// A virtio IOMMU, and the devices behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioTopology {
    /// The IOMMU's own place.
    pub iommu: TopologyPlace,
    /// The devices whose addresses it translates.
    pub endpoints: Vec<TopologyPlace>,
}

/// The table.
pub(crate) fn viot(topology: &VirtioTopology) -> Sdt {
    let mut nodes = Vec::from([iommu(topology.iommu)]);
    nodes.extend(topology.endpoints.iter().map(|place| endpoint(*place)));
    let mut table = Sdt::new(*b"VIOT", 36, 0, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&(nodes.len() as u16).to_le_bytes());
    table.append_slice(&FIRST_NODE.to_le_bytes());
    table.append_slice(&[0; 8]);
    for node in nodes {
        table.append_slice(&node);
    }
    table
}

/// The head of a node: type and length.
fn node(kind: u8, len: u8) -> Vec<u8> {
    Vec::from([kind, 0, len, 0])
}

/// 5.2.34.3 and 5.2.34.4.
fn iommu(place: TopologyPlace) -> Vec<u8> {
    match place {
        TopologyPlace::Pci(function) => {
            let mut bytes = node(node::PCI_IOMMU, 16);
            bytes.extend_from_slice(&[0, 0]); // The segment.
            bytes.extend_from_slice(&function.to_le_bytes());
            bytes.extend_from_slice(&[0; 8]);
            bytes
        }
        TopologyPlace::Mmio(base) => {
            let mut bytes = node(node::MMIO_IOMMU, 16);
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&base.0.to_le_bytes());
            bytes
        }
    }
}

/// 5.2.34.1 and 5.2.34.2. The output is always the IOMMU, which is the first node.
fn endpoint(place: TopologyPlace) -> Vec<u8> {
    let number = place.endpoint().to_le_bytes();
    let mut bytes = match place {
        TopologyPlace::Pci(function) => {
            let mut bytes = node(node::PCI_RANGE, 24);
            bytes.extend_from_slice(&number);
            bytes.extend_from_slice(&[0; 4]); // The first and the last segment.
            bytes.extend_from_slice(&function.to_le_bytes());
            bytes.extend_from_slice(&function.to_le_bytes());
            bytes
        }
        TopologyPlace::Mmio(base) => {
            let mut bytes = node(node::MMIO_ENDPOINT, 24);
            bytes.extend_from_slice(&number);
            bytes.extend_from_slice(&base.0.to_le_bytes());
            bytes
        }
    };
    bytes.extend_from_slice(&FIRST_NODE.to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes behind the header, and whether the table sums to zero.
    fn body(topology: &VirtioTopology) -> (Vec<u8>, bool) {
        let table = viot(topology);
        let bytes = table.as_slice();
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(bytes[4..8], (bytes.len() as u32).to_le_bytes());
        (bytes[36..].into(), sum == 0)
    }

    #[test]
    fn functions_are_nodes_of_one_function_each() {
        let (bytes, sums_to_zero) = body(&VirtioTopology {
            iommu: TopologyPlace::Pci(1 << 3),
            endpoints: Vec::from([TopologyPlace::Pci(2 << 3)]),
        });
        assert!(sums_to_zero);
        assert_eq!(bytes[..12], [2, 0, 48, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            bytes[12..28],
            [3, 0, 16, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        let endpoint = [
            1, 0, 24, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 16, 0, 48, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes[28..], endpoint);
    }

    #[test]
    fn windows_are_told_by_their_address() {
        let (bytes, sums_to_zero) = body(&VirtioTopology {
            iommu: TopologyPlace::Mmio(Gpa(0xFE00_0000)),
            endpoints: Vec::from([TopologyPlace::Mmio(Gpa(0xFE00_1000))]),
        });
        assert!(sums_to_zero);
        assert_eq!(
            bytes[12..28],
            [4, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0xFE, 0, 0, 0, 0]
        );
        let endpoint = [
            2, 0, 24, 0, 1, 0xE0, 0x0F, 0, 0, 0x10, 0, 0xFE, 0, 0, 0, 0, 48, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(bytes[28..], endpoint);
    }
}
