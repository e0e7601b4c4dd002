//! The guest-physical map: where memory, windows and ports of the virtual PC are.
//!
//! The constants are what devices, ACPI tables and loaders must agree on; [`Layout`] adds what
//! depends on the amount of memory. The map is the usual one of a PC:
//!
//! ```text
//! 0            conventional memory (639 KiB), then the extended BIOS data area
//! 0x000A_0000  video memory and option ROMs: reserved
//! 0x000E_0000  firmware area: RSDP and ACPI tables
//! 0x0010_0000  memory
//! 0xC000_0000  PCI memory window, ECAM, I/O APIC, local APIC, reset vector
//! 4 GiB        the rest of memory, then the 64-bit PCI window
//! ```

use core::ops::Range;

use arrayvec::ArrayVec;
use testudo_arch::Gpa;

/// Where the extended BIOS data area begins, and usable conventional memory ends.
pub const EBDA: Gpa = Gpa(0x9_FC00);
/// The hole for video memory and option ROMs.
pub const VIDEO_HOLE: Range<u64> = 0xA_0000..0xE_0000;
/// The firmware area, where systems search the RSDP (ACPI 6.5, 5.2.5.1) and where the tables are.
pub const FIRMWARE_AREA: Range<u64> = 0xE_0000..0x10_0000;
/// The end of the firmware area holds what little code a PC without a BIOS needs, up to the reset
/// vector's sixteen bytes; the tables end before it.
pub const FIRMWARE_CODE: Gpa = Gpa(0xF_FFE0);
/// Where memory continues above the firmware area.
pub const HIGH_MEMORY: Gpa = Gpa(0x10_0000);

/// The end of memory below 4 GiB, whatever the amount: from here on are windows.
pub const LOW_RAM_LIMIT: u64 = 0xC000_0000;
/// Where memory continues above the windows.
pub const HIGH_RAM: Gpa = Gpa(1 << 32);

/// The 32-bit PCI memory window.
pub const PCI_MMIO32: Range<u64> = 0xC000_0000..0xE000_0000;
/// PCI Express configuration space (ECAM): 256 buses of 1 MiB.
pub const PCI_ECAM: Range<u64> = 0xE000_0000..0xF000_0000;
/// The size and the alignment of the 64-bit PCI memory window.
pub const PCI_MMIO64_SIZE: u64 = 32 << 30;
/// The PCI port window, behind the ports of the fixed devices.
pub const PCI_PORTS: Range<u32> = 0x1000..0x1_0000;
/// The configuration address and data ports (PCI 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_PORTS: Range<u16> = 0xCF8..0xD00;

/// Where virtio-mmio windows begin, one page each.
pub const VIRTIO_MMIO: Gpa = Gpa(0xFE00_0000);
/// The distance from one virtio-mmio window to the next.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// The I/O APIC's registers.
pub const IOAPIC: Gpa = Gpa(0xFEC0_0000);
/// The I/O APIC's identification, apart from all local APICs' in tables that share the space.
pub const IOAPIC_ID: u8 = 0;
/// The inputs of the I/O APIC.
pub const IOAPIC_PINS: u8 = 24;
/// The local APIC's registers after reset (SDM vol. 3A, 11.4.1).
pub const LAPIC: Gpa = Gpa(0xFEE0_0000);

/// PM1a event block: status, then enable (ACPI 6.5, 4.8.3.1).
pub const PM1A_EVENT: u16 = 0x600;
/// The length of the PM1a event block.
pub const PM1A_EVENT_LEN: u8 = 4;
/// PM1a control block (ACPI 6.5, 4.8.3.2).
pub const PM1A_CONTROL: u16 = 0x604;
/// The length of the PM1a control block.
pub const PM1A_CONTROL_LEN: u8 = 2;
/// The power-management timer, 32 bits wide at 3.579545 MHz (ACPI 6.5, 4.8.3.3).
pub const PM_TIMER: u16 = 0x608;
/// General-purpose event block 0: status, then enable (ACPI 6.5, 4.8.4.1).
pub const GPE0: u16 = 0x620;
/// The length of general-purpose event block 0.
pub const GPE0_LEN: u8 = 4;
/// The SCI's global system interrupt: level-triggered, active high.
pub const SCI_GSI: u8 = 9;
/// SLP_TYP of the state S5, soft off.
pub const S5_SLEEP_TYPE: u8 = 5;
/// The reset control register.
pub const RESET_PORT: u16 = 0xCF9;
/// What a write to [`RESET_PORT`] must hold to reset the machine.
pub const RESET_VALUE: u8 = 0x06;

/// COM1's eight ports.
pub const COM1: u16 = 0x3F8;
/// COM1's interrupt.
pub const COM1_GSI: u8 = 4;
/// The real-time clock's index and data ports.
pub const RTC: u16 = 0x70;
/// The real-time clock's interrupt.
pub const RTC_GSI: u8 = 8;
/// Where a write ends the run with its value as the status, as QEMU's isa-debug-exit does.
pub const DEBUG_EXIT: u16 = 0xF4;

/// The global system interrupts of the PCI lines INTA to INTD of device 0; device `n` is rotated by
/// `n`. Level-triggered; guests program them as active low, a polarity that nothing depends on.
pub const PCI_GSIS: [u8; 4] = [16, 17, 18, 19];
/// The interrupts left for virtio-mmio devices and others that ask for one.
pub const FREE_GSIS: [u8; 9] = [5, 10, 11, 20, 21, 22, 23, 6, 7];

/// The least amount of memory that a machine can have.
pub const MIN_RAM: u64 = 2 << 20;

/// The type of a range in the memory map that a guest is given (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MemoryType {
    /// Usable memory.
    Usable = 1,
    /// Not to be used.
    Reserved = 2,
    /// ACPI tables, free once they have been read.
    Acpi = 3,
    /// Firmware's, to be kept across sleep.
    Nvs = 4,
    /// Memory with errors.
    Bad = 5,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryRange {
    /// The first address.
    pub start: Gpa,
    /// The length in bytes.
    pub len: u64,
    /// What the guest may do with it.
    pub kind: MemoryType,
}

impl MemoryRange {
    /// The first address behind the range.
    pub const fn end(&self) -> u64 {
        self.start.0 + self.len
    }
}

/// The most ranges that [`Layout::memory_map`] gives.
pub const MAX_RANGES: usize = 8;

/// An amount of memory that no machine can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Less than [`MIN_RAM`].
    #[error("{ram} bytes of memory are too little: a machine needs at least {MIN_RAM}")]
    TooLittle {
        /// What was asked for.
        ram: u64,
    },
    /// Not whole pages.
    #[error("{ram} bytes of memory are not a multiple of 4096")]
    Misaligned {
        /// What was asked for.
        ram: u64,
    },
    /// Memory and the 64-bit PCI window do not fit the guest-physical address space.
    #[error("{ram} bytes of memory do not fit {address_bits} address bits")]
    TooMuch {
        /// What was asked for.
        ram: u64,
        /// The width of a guest-physical address.
        address_bits: u8,
    },
}

/// The map of a machine with a certain amount of memory.
///
/// ```
/// use testudo_machine::layout::{Layout, HIGH_RAM};
/// let layout = Layout::new(4 << 30, 40).unwrap();
/// assert_eq!(layout.ram().map(|(gpa, len)| (gpa.0, len)).collect::<Vec<_>>(),
///            [(0, 3 << 30), (HIGH_RAM.0, 1 << 30)]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    low_end: u64,
    high_end: u64,
}

impl Layout {
    /// The map for `ram` bytes of memory in a space of `address_bits`-wide addresses (CPUID
    /// 8000_0008 EAX, bits 7:0).
    ///
    /// # Errors
    ///
    /// There is too little memory, it is not whole pages, or it does not fit the addresses.
    pub fn new(ram: u64, address_bits: u8) -> Result<Self, LayoutError> {
        if ram < MIN_RAM {
            return Err(LayoutError::TooLittle { ram });
        }
        if !ram.is_multiple_of(4096) {
            return Err(LayoutError::Misaligned { ram });
        }
        let low_end = ram.min(LOW_RAM_LIMIT);
        let too_much = LayoutError::TooMuch { ram, address_bits };
        let high_end = HIGH_RAM.checked_add(ram - low_end).ok_or(too_much)?.0;
        let layout = Self { low_end, high_end };
        let limit = 1u64
            .checked_shl(u32::from(address_bits))
            .unwrap_or(u64::MAX);
        let window = high_end
            .checked_next_multiple_of(PCI_MMIO64_SIZE)
            .and_then(|start| start.checked_add(PCI_MMIO64_SIZE));
        match window {
            Some(end) if end <= limit => Ok(layout),
            _ => Err(too_much),
        }
    }

    /// The memory that backs the machine, as (first address, length): one range below 4 GiB from
    /// address zero, and one above if needed.
    ///
    /// The first range runs through the video hole and the firmware area: that memory exists, the
    /// tables are in it, and large pages can map it; the memory map reserves it.
    pub fn ram(&self) -> impl Iterator<Item = (Gpa, u64)> + use<> {
        let ranges = [
            (Gpa::ZERO, self.low_end),
            (HIGH_RAM, self.high_end - HIGH_RAM.0),
        ];
        ranges.into_iter().filter(|(_, len)| *len > 0)
    }

    /// The end of memory below 4 GiB.
    pub const fn low_ram_end(&self) -> Gpa {
        Gpa(self.low_end)
    }

    /// The end of memory above 4 GiB: [`HIGH_RAM`] if there is none.
    pub const fn high_ram_end(&self) -> Gpa {
        Gpa(self.high_end)
    }

    /// The 64-bit PCI memory window: behind all memory, aligned to its size.
    pub const fn pci_mmio64(&self) -> Range<u64> {
        let start = self.high_end.next_multiple_of(PCI_MMIO64_SIZE);
        start..start + PCI_MMIO64_SIZE
    }

    /// The memory map as a guest is told (on a PC: INT 15h, function E820h), ascending.
    pub fn memory_map(&self) -> ArrayVec<MemoryRange, MAX_RANGES> {
        use MemoryType::{Reserved, Usable};
        let ranges = [
            (0..EBDA.0, Usable),
            (EBDA.0..VIDEO_HOLE.start, Reserved),
            (FIRMWARE_AREA, Reserved),
            (HIGH_MEMORY.0..self.low_end, Usable),
            (PCI_ECAM, Reserved),
            (HIGH_RAM.0..self.high_end, Usable),
        ];
        ranges
            .into_iter()
            .filter(|(range, _)| !range.is_empty())
            .map(|(range, kind)| MemoryRange {
                start: Gpa(range.start),
                len: range.end - range.start,
                kind,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn small_machines_have_one_range() {
        let layout = Layout::new(MIN_RAM, 36).unwrap();
        assert_eq!(layout.ram().collect::<Vec<_>>(), [(Gpa(0), MIN_RAM)]);
        assert_eq!(layout.pci_mmio64(), 32 << 30..64 << 30);
        let map = layout.memory_map();
        assert_eq!(map[3].start, HIGH_MEMORY);
        assert_eq!(map[3].end(), MIN_RAM);
        assert_eq!(map.last().unwrap().start.0, PCI_ECAM.start);
    }

    #[test]
    fn impossible_amounts_are_refused() {
        assert_eq!(
            Layout::new(MIN_RAM - 4096, 40),
            Err(LayoutError::TooLittle {
                ram: MIN_RAM - 4096
            })
        );
        assert_eq!(
            Layout::new(MIN_RAM + 1, 40),
            Err(LayoutError::Misaligned { ram: MIN_RAM + 1 })
        );
        for (ram, address_bits) in [(32 << 30, 36), (!4095, 52), (MIN_RAM, 32)] {
            let error = Layout::new(ram, address_bits).unwrap_err();
            assert_eq!(error, LayoutError::TooMuch { ram, address_bits });
        }
    }

    proptest! {
        #[test]
        fn the_map_is_ascending_and_complete(pages in MIN_RAM / 4096..1 << 28) {
            let ram = pages * 4096;
            let layout = Layout::new(ram, 52).unwrap();
            let map = layout.memory_map();
            prop_assert!(map.windows(2).all(|w| w[0].end() <= w[1].start.0));
            let usable: u64 = map
                .iter()
                .filter(|r| r.kind == MemoryType::Usable)
                .map(|r| r.len)
                .sum();
            prop_assert_eq!(usable, ram - (HIGH_MEMORY.0 - EBDA.0));
            prop_assert_eq!(layout.ram().map(|r| r.1).sum::<u64>(), ram);
            prop_assert!(layout.pci_mmio64().start >= layout.high_ram_end().0);
        }
    }
}
