//! The configuration space of an ordinary function (PCI 3.0, 6.1 and 6.2): bytes, and a mask that
//! says which bits software may change.

/// Offsets in the header.
pub(super) mod header {
    pub(in super::super) const VENDOR: usize = 0x00;
    pub(in super::super) const DEVICE: usize = 0x02;
    pub(in super::super) const COMMAND: usize = 0x04;
    pub(in super::super) const STATUS: usize = 0x06;
    pub(in super::super) const REVISION: usize = 0x08;
    pub(in super::super) const CLASS: usize = 0x09;
    pub(in super::super) const CACHE_LINE: usize = 0x0C;
    pub(in super::super) const BAR0: usize = 0x10;
    pub(in super::super) const SUBSYSTEM_VENDOR: usize = 0x2C;
    pub(in super::super) const SUBSYSTEM: usize = 0x2E;
    pub(in super::super) const CAPABILITIES: usize = 0x34;
    pub(in super::super) const INTERRUPT_LINE: usize = 0x3C;
    pub(in super::super) const INTERRUPT_PIN: usize = 0x3D;
}

/// Command: the function answers memory accesses, masters the bus, keeps its line low.
pub(super) const MEMORY_SPACE: u16 = 1 << 1;
pub(super) const BUS_MASTER: u16 = 1 << 2;
pub(super) const INTX_DISABLE: u16 = 1 << 10;
/// Status: the function wants an interrupt; it has a capability list.
const INTERRUPT_STATUS: u16 = 1 << 3;
const CAPABILITY_LIST: u16 = 1 << 4;

/// A base address register for 64-bit memory, not prefetchable.
const MEMORY_64: u64 = 0b100;

/// 256 bytes and their masks; what is past them reads as zero (no extended capabilities).
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A function with one 64-bit memory register of `bar_size` bytes, a power of two.
    pub(super) fn new(vendor: u16, device: u16, class: u32, bar_size: u64) -> Self {
        let mut config = Self {
            bytes: [0; 256],
            writable: [0; 256],
            next_capability: 0x40,
            last_link: header::CAPABILITIES,
        };
        config.set(header::VENDOR, &vendor.to_le_bytes());
        config.set(header::DEVICE, &device.to_le_bytes());
        config.set(header::STATUS, &CAPABILITY_LIST.to_le_bytes());
        config.set(header::CLASS, &class.to_le_bytes()[..3]);
        config.set(header::BAR0, &MEMORY_64.to_le_bytes());
        config.allow(header::BAR0, &(!(bar_size - 1)).to_le_bytes());
        let command = MEMORY_SPACE | BUS_MASTER | INTX_DISABLE;
        config.allow(header::COMMAND, &command.to_le_bytes());
        config.allow(header::CACHE_LINE, &[0xFF]);
        config.allow(header::INTERRUPT_LINE, &[0xFF]);
        config
    }

    /// Sets bytes, whatever software may change.
    pub(super) fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Says which bits software may change.
    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Appends a capability, whose first two bytes (number and link) are written here, and says
    /// where it is.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_capability;
        self.set(self.last_link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::from(offset) + i;
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, &new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        bytes.copy_from_slice(&self.bytes[at..at + 2]);
        u16::from_le_bytes(bytes)
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn command(&self) -> u16 {
        self.u16(header::COMMAND)
    }

    /// The address in the base address register.
    pub(super) fn bar_address(&self) -> u64 {
        let low = u64::from(self.u32(header::BAR0)) & !0xF;
        low | (u64::from(self.u32(header::BAR0 + 4)) << 32)
    }

    /// Shows in the status register whether the function wants an interrupt.
    pub(super) fn set_interrupt_status(&mut self, wanted: bool) {
        let status = if wanted { INTERRUPT_STATUS } else { 0 } | CAPABILITY_LIST;
        self.set(header::STATUS, &status.to_le_bytes());
    }
}
