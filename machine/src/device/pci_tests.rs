use super::*;
use crate::bus::{MmioBus, PortBus};
use proptest::prelude::*;
use std::vec::Vec;

/// A function with a 4 KiB memory register and a 16-port register, at the usual offsets.
struct Function {
    config: [u8; 256],
    cells: [u8; 4096],
}

impl Function {
    fn new() -> Self {
        let mut config = [0; 256];
        config[..4].copy_from_slice(&[0xF4, 0x1A, 0x42, 0x10]);
        Self {
            config,
            cells: [0; 4096],
        }
    }

    fn bar(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.config[at..at + 4].try_into().unwrap())
    }
}

impl PciFunction for Function {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        for (byte, at) in data.iter().zip(usize::from(offset)..) {
            if let (4..6 | 0x10..0x18, Some(cell)) = (at, self.config.get_mut(at)) {
                *cell = *byte;
            }
        }
    }

    fn windows(&self) -> [Option<PciWindow>; BARS] {
        let mut windows = [None; BARS];
        if self.config[4] & 2 != 0 {
            let base = u64::from(self.bar(0x10) & !0xFFF);
            windows[0] = Some(PciWindow {
                space: PciSpace::Memory,
                base,
                size: 4096,
            });
        }
        if self.config[4] & 1 != 0 {
            let base = u64::from(self.bar(0x14) & 0xFFF0);
            windows[1] = Some(PciWindow {
                space: PciSpace::Io,
                base,
                size: 16,
            });
        }
        windows
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= if bar == 0 { 4096 } else { 16 });
        data.copy_from_slice(&self.cells[offset as usize..][..data.len()]);
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= if bar == 0 { 4096 } else { 16 });
        self.cells[offset as usize..][..data.len()].copy_from_slice(data);
    }
}

struct Bench {
    power: Arc<PowerSignal>,
    ports: PortBus,
    memory: MmioBus,
}

fn bench() -> Bench {
    let power = Arc::new(PowerSignal::new());
    let mut host = PciHost::new(power.clone());
    for (device, function) in [(1, 0), (1, 3), (2, 0)] {
        host.add(
            device,
            function,
            Arc::new(spin::Mutex::new(Function::new())),
        )
        .unwrap();
    }
    let host = Arc::new(host);
    let (mut ports, mut memory) = (PortBus::new(), MmioBus::new());
    let config = layout::PCI_CONFIG_PORTS;
    ports
        .add(config.start.into()..config.end.into(), host.config_ports())
        .unwrap();
    let io = layout::PCI_PORTS;
    ports
        .add(io.clone(), host.window(PciSpace::Io, io.start.into()))
        .unwrap();
    let low = layout::PCI_MMIO32;
    memory
        .add(low.clone(), host.window(PciSpace::Memory, low.start))
        .unwrap();
    memory.add(layout::PCI_ECAM, host.ecam()).unwrap();
    Bench {
        power,
        ports,
        memory,
    }
}

impl Bench {
    fn select(&self, device: u32, function: u32, register: u32) {
        let address = 1 << 31 | device << 11 | function << 8 | register;
        self.ports.write(0xCF8, &address.to_le_bytes());
    }

    fn read(&self, port: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.ports.read(port, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn config(&self, device: u32, function: u32, register: u32) -> u32 {
        self.select(device, function, register);
        self.read(0xCFC, 4)
    }

    fn set_config(&self, device: u32, register: u32, value: u32) {
        self.select(device, 0, register);
        self.ports.write(0xCFC, &value.to_le_bytes());
    }

    fn memory(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(address, &mut data);
        u32::from_le_bytes(data)
    }
}

#[test]
fn functions_are_found_where_they_are() {
    let b = bench();
    assert_eq!(b.config(0, 0, 0), 0x1237_8086);
    assert_eq!(b.config(0, 0, 8) >> 16, 0x0600);
    assert_eq!(b.config(1, 0, 0), 0x1042_1AF4);
    assert_eq!(b.config(1, 3, 0), 0x1042_1AF4);
    assert_eq!(b.config(1, 1, 0), u32::MAX);
    assert_eq!(b.config(31, 7, 0), u32::MAX);
    b.ports.write(0xCF8, &(1u32 << 31 | 1 << 16).to_le_bytes());
    assert_eq!(b.read(0xCFC, 4), u32::MAX, "another bus");
    b.ports.write(0xCF8, &0u32.to_le_bytes());
    assert_eq!(b.read(0xCFC, 4), u32::MAX, "not enabled");
    assert_eq!(b.config(1, 0, 0x0C) >> 16 & 0xFF, 0x80, "several functions");
    assert_eq!(b.config(2, 0, 0x0C) >> 16 & 0xFF, 0);
}

#[test]
fn configuration_accesses_of_all_widths() {
    let b = bench();
    b.select(1, 0, 0);
    assert_eq!(b.read(0xCF8, 4), 0x8000_0800);
    assert_eq!((b.read(0xCFD, 1), b.read(0xCFE, 2)), (0x1A, 0x1042));
    assert_eq!(b.read(0xCFD, 2), 0xFFFF, "not aligned");
    assert_eq!(
        b.read(0xCFE, 4) >> 16,
        0xFFFF,
        "over the end: nobody's bytes float"
    );
    b.ports.write(0xCF8, &[0x55]);
    b.ports.write(0xCF8, &[0x55, 0x55]);
    assert_eq!(
        b.read(0xCF8, 4),
        0x8000_0800,
        "only a doubleword reaches the address"
    );
    b.ports.write(0xCF8, &u32::MAX.to_le_bytes());
    assert_eq!(b.read(0xCF8, 4), 0x80FF_FFFC);
}

#[test]
fn the_byte_between_is_the_reset_register() {
    let b = bench();
    b.ports.write(0xCF9, &[0x02]);
    assert_eq!((b.read(0xCF9, 1), b.power.get()), (2, None));
    b.ports.write(0xCF9, &[layout::RESET_VALUE]);
    assert_eq!(b.power.take(), Some(PowerEvent::Reset));
    b.ports.write(0xCF9, &[layout::RESET_VALUE]);
    assert_eq!(b.power.get(), None, "the bit must rise");
}

#[test]
fn registers_move_and_can_be_disabled() {
    let b = bench();
    let at = 0xC012_3000;
    assert_eq!(b.memory(at), u32::MAX);
    b.set_config(1, 0x10, at as u32);
    b.set_config(1, 0x14, 0xC101);
    b.set_config(1, 4, 3);
    b.memory.write(at + 4, &0x1234_5678u32.to_le_bytes());
    assert_eq!(b.memory(at + 4), 0x1234_5678);
    assert_eq!(b.read(0xC104, 2), 0x5678, "the same cells by ports");
    assert_eq!(b.memory(at + 4094), u32::MAX, "over the end");
    b.set_config(1, 0x10, 0xC999_9000);
    assert_eq!(
        (b.memory(at + 4), b.memory(0xC999_9004)),
        (u32::MAX, 0x1234_5678)
    );
    b.set_config(1, 4, 1);
    assert_eq!(b.memory(0xC999_9004), u32::MAX);
    assert_eq!(b.read(0xC104, 2), 0x5678);
}

#[test]
fn overlapping_registers_leave_one_in_charge() {
    let b = bench();
    for device in [1, 2] {
        b.set_config(device, 0x10, 0xC000_0000);
        b.set_config(device, 4, 2);
    }
    b.memory.write(0xC000_0000, &[1; 4]);
    b.set_config(1, 4, 0);
    let second = b.memory(0xC000_0000);
    b.set_config(1, 4, 2);
    b.set_config(2, 4, 0);
    let first = b.memory(0xC000_0000);
    assert_eq!(
        [first, second]
            .iter()
            .filter(|v| **v == 0x0101_0101)
            .count(),
        1
    );
}

#[test]
fn memory_mapped_configuration() {
    let b = bench();
    let of = |device: u64, function: u64, register: u64| {
        layout::PCI_ECAM.start + (device << 15 | function << 12 | register)
    };
    assert_eq!(b.memory(of(1, 3, 0)), 0x1042_1AF4);
    assert_eq!(b.memory(of(1, 3, 0x100)), 0);
    assert_eq!(b.memory(of(4, 0, 0)), u32::MAX);
    assert_eq!(b.memory(of(32, 0, 0)), u32::MAX, "another bus");
    let mut odd = [0; 4];
    b.memory.read(of(1, 0, 1), &mut odd);
    assert_eq!(odd, [0x1A, 0x42, 0x10, 0]);
    let mut wide = [0; 8];
    b.memory.read(of(0, 0, 4), &mut wide);
    assert_eq!(wide, [0, 0, 0, 0, 2, 0, 0, 6]);
    b.memory
        .write(of(2, 0, 0x10), &0xC000_0000u64.to_le_bytes());
    b.memory.write(of(2, 0, 4), &[2]);
    assert_eq!(b.memory(0xC000_0000), 0);
}

#[test]
fn places_are_checked() {
    let mut host = PciHost::new(Arc::new(PowerSignal::new()));
    let function = || Arc::new(spin::Mutex::new(Function::new()));
    assert_eq!(
        host.add(0, 0, function()),
        Err(PciError::Taken {
            device: 0,
            function: 0
        })
    );
    for (device, number) in [(32, 0), (1, 8), (255, 255)] {
        assert_eq!(
            host.add(device, number, function()),
            Err(PciError::Address {
                device,
                function: number
            })
        );
    }
    for expected in 1..32 {
        let device = host.free_device().unwrap();
        assert_eq!(device, expected);
        host.add(device, 0, function()).unwrap();
    }
    assert_eq!(host.free_device(), None);
}

#[test]
fn lines_rotate() {
    let gsi = |device, pin| PciHost::intx_gsi(device, pin);
    assert_eq!([0, 1, 2, 3].map(|pin| gsi(0, pin)), [16, 17, 18, 19]);
    assert_eq!([0, 1, 2, 3].map(|pin| gsi(5, pin)), [17, 18, 19, 16]);
}

proptest! {
    /// No access panics, and a function sees only accesses inside what it decodes (it asserts
    /// that itself).
    #[test]
    fn functions_see_only_their_own(steps: Vec<(u8, u32, u32, u8)>) {
        let b = bench();
        for (what, a, value, log) in steps {
            let mut data = [0; 8];
            let len = 1usize << (log % 4);
            let bytes = (u64::from(value) * 0x1_0000_0001).to_le_bytes();
            match what % 6 {
                0 => b.select(a % 4, a >> 8 & 7, a >> 16 & 0xFC),
                1 => b.ports.write(0xCF8 + (a % 8) as u16, &bytes[..len.min(4)]),
                2 => b.set_config(a % 3, [4, 0x10, 0x14][(a >> 8) as usize % 3], value | 3),
                3 => b.memory.read(0xC000_0000 + u64::from(a), &mut data[..len]),
                4 => b.memory.write(0xC000_0000 + u64::from(a), &bytes[..len]),
                _ => b.ports.read(a as u16, &mut data[..len.min(4)]),
            }
        }
    }
}
