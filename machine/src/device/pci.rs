//! The PCI host bridge: configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), the memory-mapped
//! configuration space of PCI Express (ECAM), the windows behind which base address registers
//! move, and the reset control register that shares the mechanism's ports.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use testudo_arch::pci::{BARS, PciFunction, PciSpace, PciWindow};

use super::power::{PowerEvent, PowerSignal};
use crate::bus::SharedDevice;
use crate::layout;

/// A function, as the bridge holds it.
pub type SharedFunction = Arc<spin::Mutex<dyn PciFunction>>;

/// A function that cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// The bus has 32 devices of 8 functions.
    #[error("a bus has no device {device} with a function {function}")]
    Address {
        /// The device number.
        device: u8,
        /// The function number.
        function: u8,
    },
    /// There is a function already.
    #[error("device {device} has a function {function} already")]
    Taken {
        /// The device number.
        device: u8,
        /// The function number.
        function: u8,
    },
}

const FUNCTIONS: usize = 32 * 8;

/// What a base address register decodes, and whose it is.
struct Decoded {
    window: PciWindow,
    /// The function's index on the bus.
    index: u8,
    bar: u8,
}

/// The host bridge with its one bus.
///
/// Functions are added while the machine is built. The bridge itself is device 0.
pub struct PciHost {
    functions: Box<[Option<SharedFunction>]>,
    /// Room for every register of every function is there from the beginning.
    decoded: spin::RwLock<Vec<Decoded>>,
    address: AtomicU32,
    reset: AtomicU8,
    power: Arc<PowerSignal>,
}

impl PciHost {
    /// A bridge with an empty bus; resets by [`RESET_PORT`](layout::RESET_PORT) go to `power`.
    pub fn new(power: Arc<PowerSignal>) -> Self {
        let mut functions: Vec<Option<SharedFunction>> = Vec::new();
        functions.resize_with(FUNCTIONS, || None);
        functions[0] = Some(Arc::new(spin::Mutex::new(HostBridge)));
        Self {
            functions: functions.into_boxed_slice(),
            decoded: spin::RwLock::new(Vec::new()),
            address: AtomicU32::new(0),
            reset: AtomicU8::new(0),
            power,
        }
    }

    /// Puts a function on the bus.
    ///
    /// # Errors
    ///
    /// There is no such place, or it is taken.
    pub fn add(&mut self, device: u8, function: u8, new: SharedFunction) -> Result<(), PciError> {
        if device >= 32 || function >= 8 {
            return Err(PciError::Address { device, function });
        }
        let index = device << 3 | function;
        let slot = &mut self.functions[usize::from(index)];
        if slot.is_some() {
            return Err(PciError::Taken { device, function });
        }
        let windows = new.lock().windows();
        *slot = Some(new);
        let functions = self.functions.iter().flatten().count();
        self.decoded.get_mut().reserve(functions * BARS);
        self.decode(index, &windows);
        Ok(())
    }

    /// The lowest device number that is free.
    pub fn free_device(&self) -> Option<u8> {
        (0..32u8).find(|device| self.functions[usize::from(*device) << 3].is_none())
    }

    /// The global system interrupt of a device's line INTA (0) to INTD (3): the lines rotate from
    /// device to device (PCI 3.0, 2.2.6), as the ACPI tables say.
    pub fn intx_gsi(device: u8, pin: u8) -> u32 {
        let line = usize::from(device).wrapping_add(usize::from(pin)) % layout::PCI_GSIS.len();
        u32::from(layout::PCI_GSIS[line])
    }

    /// Takes note of what a function's registers decode now.
    fn decode(&self, index: u8, windows: &[Option<PciWindow>; BARS]) {
        let mut decoded = self.decoded.write();
        decoded.retain(|d| d.index != index);
        for (bar, window) in (0..).zip(windows) {
            if let Some(window) = *window {
                let at = decoded.partition_point(|d| d.window.base <= window.base);
                decoded.insert(at, Decoded { window, index, bar });
            }
        }
    }

    fn function(&self, index: u8) -> Option<&SharedFunction> {
        self.functions[usize::from(index)].as_ref()
    }

    /// Reads an aligned part of a doubleword of a function's configuration space.
    fn config_read(&self, index: u8, offset: u16, data: &mut [u8]) {
        const HEADER_TYPE: u16 = 0x0E;
        const MULTIFUNCTION: u8 = 0x80;
        let Some(function) = self.function(index) else {
            data.fill(0xFF);
            return;
        };
        function.lock().config_read(offset, data);
        let others = || {
            self.functions[usize::from(index) + 1..usize::from(index) + 8]
                .iter()
                .any(Option::is_some)
        };
        if index & 7 == 0
            && let Some(at) = HEADER_TYPE.checked_sub(offset)
            && let Some(byte) = data.get_mut(usize::from(at))
            && others()
        {
            *byte |= MULTIFUNCTION;
        }
    }

    /// Writes an aligned part of a doubleword of a function's configuration space.
    fn config_write(&self, index: u8, offset: u16, data: &[u8]) {
        if let Some(function) = self.function(index) {
            let mut function = function.lock();
            function.config_write(offset, data);
            let windows = function.windows();
            // Still locked, so that the last of two writes has the last word here as well.
            self.decode(index, &windows);
        }
    }

    /// Who decodes an access, if one register decodes all of it: the function, the register and
    /// the offset in what it decodes.
    fn find(
        &self,
        space: PciSpace,
        address: u64,
        len: usize,
    ) -> Option<(&SharedFunction, usize, u64)> {
        let decoded = self.decoded.read();
        let found = decoded.iter().find(|d| {
            let offset = address.wrapping_sub(d.window.base);
            d.window.space == space
                && offset < d.window.size
                && d.window.size - offset >= len as u64
        })?;
        let (index, bar, base) = (found.index, found.bar, found.window.base);
        drop(decoded);
        Some((self.function(index)?, usize::from(bar), address - base))
    }

    /// The ports of the configuration mechanism, to be put on the port bus at
    /// [`PCI_CONFIG_PORTS`](layout::PCI_CONFIG_PORTS).
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn SharedDevice> {
        Arc::new(ConfigPorts(self.clone()))
    }

    /// The memory-mapped configuration space, to be put on the memory bus at
    /// [`PCI_ECAM`](layout::PCI_ECAM).
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn SharedDevice> {
        Arc::new(Ecam(self.clone()))
    }

    /// A window of the bridge, to be put on the port or memory bus at `base`: inside it, base
    /// address registers move while the machine runs.
    pub fn window(self: &Arc<Self>, space: PciSpace, base: u64) -> Arc<dyn SharedDevice> {
        Arc::new(Aperture {
            host: self.clone(),
            space,
            base,
        })
    }
}

/// The window of a bridge in the address space of a bus.
struct Aperture {
    host: Arc<PciHost>,
    space: PciSpace,
    base: u64,
}

impl SharedDevice for Aperture {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = self.base.wrapping_add(offset);
        match self.host.find(self.space, address, data.len()) {
            Some((function, bar, offset)) => function.lock().bar_read(bar, offset, data),
            None => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = self.base.wrapping_add(offset);
        if let Some((function, bar, offset)) = self.host.find(self.space, address, data.len()) {
            function.lock().bar_write(bar, offset, data);
        }
    }
}

struct ConfigPorts(Arc<PciHost>);

impl ConfigPorts {
    const RESET_OFFSET: u64 = layout::RESET_PORT as u64 - layout::PCI_CONFIG_PORTS.start as u64;
    /// "Reset CPU": the reset happens when this bit becomes one.
    const RESET_CPU: u8 = 1 << 2;
    const RESET_BITS: u8 = 0xE;
    const ENABLE: u32 = 1 << 31;
    const WRITABLE: u32 = Self::ENABLE | 0x00FF_FFFC;

    /// The function and offset that the address register and a data port select.
    fn target(&self, port: u64, len: usize) -> Option<(u8, u16)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let byte = (port - 4) as u16;
        let fits = usize::from(byte) + len <= 4 && usize::from(byte).is_multiple_of(len);
        let bus_0 = address >> 16 & 0xFF == 0;
        (address & Self::ENABLE != 0 && bus_0 && fits)
            .then_some(((address >> 8) as u8, (address & 0xFC) as u16 + byte))
    }
}

impl SharedDevice for ConfigPorts {
    /// Only a doubleword reaches the address register: other widths pass it by (PCI 3.0,
    /// 3.2.2.3.2), and the byte at 0xCF9 is the reset control register.
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => {
                let address = self.0.address.load(Ordering::Relaxed);
                data.copy_from_slice(&address.to_le_bytes());
            }
            (Self::RESET_OFFSET, 1) => data[0] = self.0.reset.load(Ordering::Relaxed),
            (4.., len) => match self.target(offset, len) {
                Some((index, register)) => self.0.config_read(index, register, data),
                None => data.fill(0xFF),
            },
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & Self::WRITABLE;
                self.0.address.store(address, Ordering::Relaxed);
            }
            (Self::RESET_OFFSET, &[value]) => {
                let old = self
                    .0
                    .reset
                    .swap(value & Self::RESET_BITS, Ordering::Relaxed);
                if value & !old & Self::RESET_CPU != 0 {
                    self.0.power.raise(PowerEvent::Reset);
                }
            }
            (4.., data) => {
                if let Some((index, register)) = self.target(offset, data.len()) {
                    self.0.config_write(index, register, data);
                }
            }
            _ => {}
        }
    }
}

/// The memory-mapped configuration space (PCI Express 5.0, 7.2.2).
struct Ecam(Arc<PciHost>);

impl Ecam {
    /// The function and register of an address, if it is on the one bus there is.
    fn target(offset: u64) -> Option<(u8, u16)> {
        (offset < 1 << 20).then_some(((offset >> 12) as u8, (offset & 0xFFF) as u16))
    }

    /// The widest naturally aligned piece at the start of an access.
    fn piece(offset: u64, len: usize) -> usize {
        [4, 2, 1]
            .into_iter()
            .find(|size| *size <= len && offset.is_multiple_of(*size as u64))
            .unwrap_or(len)
    }
}

impl SharedDevice for Ecam {
    fn read(&self, mut offset: u64, mut data: &mut [u8]) {
        while !data.is_empty() {
            let (piece, rest) = data.split_at_mut(Self::piece(offset, data.len()));
            match Self::target(offset) {
                Some((index, register)) => self.0.config_read(index, register, piece),
                None => piece.fill(0xFF),
            }
            offset += piece.len() as u64;
            data = rest;
        }
    }

    fn write(&self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let (piece, rest) = data.split_at(Self::piece(offset, data.len()));
            if let Some((index, register)) = Self::target(offset) {
                self.0.config_write(index, register, piece);
            }
            offset += piece.len() as u64;
            data = rest;
        }
    }
}

/// The bridge's own function: an identification and nothing to configure.
struct HostBridge;

impl HostBridge {
    /// The first 16 bytes of the configuration space (PCI 3.0, 6.1): Intel's 82441FX, which every
    /// system knows; class "host bridge".
    const HEADER: [u8; 16] = [
        0x86, 0x80, 0x37, 0x12, 0, 0, 0, 0, 0x02, 0x00, 0x00, 0x06, 0, 0, 0, 0,
    ];
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = Self::HEADER.get(at).copied().unwrap_or(0);
        }
    }

    fn config_write(&mut self, _: u16, _: &[u8]) {}

    fn windows(&self) -> [Option<PciWindow>; BARS] {
        [None; BARS]
    }

    fn bar_read(&mut self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn bar_write(&mut self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
