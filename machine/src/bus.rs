//! The port and the memory bus: which device answers an address.
//!
//! A bus is built once, and from then on only read: looking a device up takes no lock. Ports are
//! found by a table of 64 Ki bytes, memory windows by binary search. What moves at run time (the
//! windows of PCI base address registers) moves inside a window of its bridge
//! ([`PciHost`](crate::device::pci::PciHost)).
//!
//! # What happens to an access
//!
//! * It lies inside one device's window: the device gets it whole.
//! * It lies across the edge of a window: it is taken apart into bytes, and each byte goes where
//!   it belongs, as a chipset splits a cycle.
//! * Nobody claims it: reads give all ones, writes are ignored, and the bus counts it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::bus::BusDevice;

/// A device that several vCPUs may address at once.
///
/// A [`BusDevice`] in a lock is one; a device with its own idea of concurrency implements this
/// directly.
pub trait SharedDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's window.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the device's window.
    fn write(&self, offset: u64, data: &[u8]);
}

impl<D: BusDevice + ?Sized> SharedDevice for spin::Mutex<D> {
    #[inline]
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    #[inline]
    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

/// A bus that cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// Two windows overlap.
    #[error("the window {new:#x?} overlaps {old:#x?}")]
    Overlap {
        /// The window that was to be added.
        new: Range<u64>,
        /// The one that is there.
        old: Range<u64>,
    },
    /// A window is empty or ends behind the bus's last address.
    #[error("the window {0:#x?} is empty or does not lie on the bus")]
    Range(Range<u64>),
    /// More windows than the bus can tell apart.
    #[error("a port bus has at most {} windows", PortBus::MAX_WINDOWS)]
    Full,
}

struct Window {
    range: Range<u64>,
    device: Arc<dyn SharedDevice>,
}

impl Window {
    #[inline]
    fn contains(&self, start: u64, len: usize) -> bool {
        start >= self.range.start && start < self.range.end && self.range.end - start >= len as u64
    }
}

fn check_overlap(windows: &[Window], range: &Range<u64>) -> Result<(), BusError> {
    match windows
        .iter()
        .find(|w| w.range.start < range.end && range.start < w.range.end)
    {
        Some(old) => Err(BusError::Overlap {
            new: range.clone(),
            old: old.range.clone(),
        }),
        None => Ok(()),
    }
}

/// The bus of the 65,536 I/O ports.
///
/// ```
/// use std::sync::Arc;
/// use testudo_arch::bus::BusDevice;
/// use testudo_machine::bus::PortBus;
///
/// struct Latch(u8);
/// impl BusDevice for Latch {
///     fn read(&mut self, _: u64, data: &mut [u8]) { data.fill(self.0) }
///     fn write(&mut self, _: u64, data: &[u8]) { self.0 = data[0] }
/// }
///
/// let mut bus = PortBus::new();
/// bus.add(0x80..0x81, Arc::new(spin::Mutex::new(Latch(0))))?;
/// bus.write(0x80, &[7]);
/// let mut two = [0; 2];
/// bus.read(0x80, &mut two); // The second byte is nobody's.
/// assert_eq!(two, [7, 0xFF]);
/// # Ok::<(), testudo_machine::bus::BusError>(())
/// ```
pub struct PortBus {
    windows: Vec<Window>,
    /// For each port, one more than the index of its window; zero for none.
    index: Box<[u8]>,
    unclaimed: AtomicU64,
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PortBus {
    /// The most windows that a port bus holds.
    pub const MAX_WINDOWS: usize = u8::MAX as usize;
    const PORTS: usize = 0x1_0000;

    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self {
            windows: Vec::new(),
            index: alloc::vec![0; Self::PORTS].into_boxed_slice(),
            unclaimed: AtomicU64::new(0),
        }
    }

    /// Gives `ports` to `device`.
    ///
    /// # Errors
    ///
    /// The window is empty, ends behind port 0xFFFF or overlaps another; or the bus is full.
    pub fn add(
        &mut self,
        ports: Range<u32>,
        device: Arc<dyn SharedDevice>,
    ) -> Result<(), BusError> {
        let range = u64::from(ports.start)..u64::from(ports.end);
        if range.is_empty() || range.end > Self::PORTS as u64 {
            return Err(BusError::Range(range));
        }
        check_overlap(&self.windows, &range)?;
        let number = u8::try_from(self.windows.len() + 1).map_err(|_| BusError::Full)?;
        self.index[ports.start as usize..ports.end as usize].fill(number);
        self.windows.push(Window { range, device });
        Ok(())
    }

    /// How many accesses, or bytes of split accesses, nobody claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    #[inline]
    fn window(&self, port: u16) -> Option<&Window> {
        let number = self.index[usize::from(port)];
        self.windows.get(usize::from(number).wrapping_sub(1))
    }

    /// Reads from `port`. Bytes behind port 0xFFFF are nobody's.
    #[inline]
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.window(port) {
            Some(window) if window.contains(u64::from(port), data.len()) => {
                window
                    .device
                    .read(u64::from(port) - window.range.start, data);
            }
            _ => self.read_split(port, data),
        }
    }

    /// Writes to `port`. Bytes behind port 0xFFFF are nobody's.
    #[inline]
    pub fn write(&self, port: u16, data: &[u8]) {
        match self.window(port) {
            Some(window) if window.contains(u64::from(port), data.len()) => {
                window
                    .device
                    .write(u64::from(port) - window.range.start, data);
            }
            _ => self.write_split(port, data),
        }
    }

    #[cold]
    fn read_split(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if self.nobody(port, data.len()) {
            return;
        }
        for (byte, port) in data.iter_mut().zip(port..=u16::MAX) {
            match self.window(port) {
                Some(w) => w
                    .device
                    .read(u64::from(port) - w.range.start, core::slice::from_mut(byte)),
                None => count(&self.unclaimed),
            }
        }
    }

    #[cold]
    fn write_split(&self, port: u16, data: &[u8]) {
        if self.nobody(port, data.len()) {
            return;
        }
        for (byte, port) in data.iter().zip(port..=u16::MAX) {
            match self.window(port) {
                Some(w) => w
                    .device
                    .write(u64::from(port) - w.range.start, core::slice::from_ref(byte)),
                None => count(&self.unclaimed),
            }
        }
    }

    /// Whether no byte of the access is claimed, in which case it is counted as one.
    fn nobody(&self, port: u16, len: usize) -> bool {
        let nobody = (port..=u16::MAX)
            .take(len)
            .all(|port| self.window(port).is_none());
        if nobody {
            count(&self.unclaimed);
        }
        nobody
    }
}

/// The bus of guest-physical addresses that are not memory.
///
/// Windows and accesses are as with [`PortBus`].
#[derive(Default)]
pub struct MmioBus {
    /// Ascending.
    windows: Vec<Window>,
    unclaimed: AtomicU64,
}

impl MmioBus {
    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the guest-physical addresses `range` to `device`.
    ///
    /// # Errors
    ///
    /// The window is empty or overlaps another.
    pub fn add(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn SharedDevice>,
    ) -> Result<(), BusError> {
        if range.is_empty() {
            return Err(BusError::Range(range));
        }
        check_overlap(&self.windows, &range)?;
        let at = self
            .windows
            .partition_point(|w| w.range.start < range.start);
        self.windows.insert(at, Window { range, device });
        Ok(())
    }

    /// How many accesses, or bytes of split accesses, nobody claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// Whether a device claims the address.
    pub fn claims(&self, address: u64) -> bool {
        self.window(address).is_some()
    }

    #[inline]
    fn window(&self, address: u64) -> Option<&Window> {
        let after = self.windows.partition_point(|w| w.range.start <= address);
        self.windows
            .get(after.wrapping_sub(1))
            .filter(|w| address < w.range.end)
    }

    /// Reads from `address`. Bytes behind the last address are nobody's.
    #[inline]
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some(window) if window.contains(address, data.len()) => {
                window.device.read(address - window.range.start, data);
            }
            _ => self.read_split(address, data),
        }
    }

    /// Writes to `address`. Bytes behind the last address are nobody's.
    #[inline]
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.window(address) {
            Some(window) if window.contains(address, data.len()) => {
                window.device.write(address - window.range.start, data);
            }
            _ => self.write_split(address, data),
        }
    }

    #[cold]
    fn read_split(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if self.nobody(address, data.len()) {
            return;
        }
        for (byte, address) in data.iter_mut().zip(address..=u64::MAX) {
            match self.window(address) {
                Some(w) => w
                    .device
                    .read(address - w.range.start, core::slice::from_mut(byte)),
                None => count(&self.unclaimed),
            }
        }
    }

    #[cold]
    fn write_split(&self, address: u64, data: &[u8]) {
        if self.nobody(address, data.len()) {
            return;
        }
        for (byte, address) in data.iter().zip(address..=u64::MAX) {
            match self.window(address) {
                Some(w) => w
                    .device
                    .write(address - w.range.start, core::slice::from_ref(byte)),
                None => count(&self.unclaimed),
            }
        }
    }

    /// Whether no byte of the access is claimed, in which case it is counted as one.
    fn nobody(&self, address: u64, len: usize) -> bool {
        let nobody = (address..=u64::MAX)
            .take(len)
            .all(|address| self.window(address).is_none());
        if nobody {
            count(&self.unclaimed);
        }
        nobody
    }
}

#[inline]
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    /// Memory that notes the width of its last access.
    struct Cells {
        bytes: Vec<u8>,
        width: usize,
    }

    impl BusDevice for Cells {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.width = data.len();
            data.copy_from_slice(&self.bytes[offset as usize..][..data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.width = data.len();
            self.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn cells(fill: u8, len: usize) -> Arc<spin::Mutex<Cells>> {
        Arc::new(spin::Mutex::new(Cells {
            bytes: vec![fill; len],
            width: 0,
        }))
    }

    #[test]
    fn a_whole_access_reaches_its_device_whole() {
        let device = cells(0x11, 8);
        let mut bus = PortBus::new();
        bus.add(0x100..0x108, device.clone()).unwrap();
        bus.write(0x104, &[1, 2, 3, 4]);
        assert_eq!(device.lock().width, 4);
        let mut data = [0; 2];
        bus.read(0x105, &mut data);
        assert_eq!(data, [2, 3]);
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn an_access_across_windows_is_split_and_the_rest_floats() {
        let (low, high) = (cells(0xAA, 2), cells(0xBB, 1));
        let mut bus = MmioBus::new();
        bus.add(0x1002..0x1003, high.clone()).unwrap();
        bus.add(0x1000..0x1002, low.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x1001, &mut data);
        assert_eq!(data, [0xAA, 0xBB, 0xFF, 0xFF]);
        assert_eq!(bus.unclaimed(), 2);
        bus.write(0xFFF, &[9, 8, 7, 6]);
        assert_eq!(
            (low.lock().bytes.clone(), high.lock().bytes[0]),
            (vec![8, 7], 6)
        );
        assert_eq!(bus.unclaimed(), 3);
    }

    #[test]
    fn nobodys_addresses_float_and_are_counted_once() {
        let bus = PortBus::new();
        let mut data = [0; 4];
        bus.read(0xFFFE, &mut data);
        assert_eq!(data, [0xFF; 4]);
        bus.write(0xFFFF, &[0; 4]);
        assert_eq!(bus.unclaimed(), 2);
        let bus = MmioBus::new();
        bus.read(u64::MAX, &mut data);
        assert_eq!(bus.unclaimed(), 1);
    }

    #[test]
    fn bad_windows_are_refused() {
        let mut bus = PortBus::new();
        bus.add(0x60..0x61, cells(0, 1)).unwrap();
        assert_eq!(
            bus.add(0x5E..0x64, cells(0, 6)),
            Err(BusError::Overlap {
                new: 0x5E..0x64,
                old: 0x60..0x61
            })
        );
        assert_eq!(
            bus.add(0xFFFF..0x1_0001, cells(0, 2)),
            Err(BusError::Range(0xFFFF..0x1_0001))
        );
        assert_eq!(bus.add(5..5, cells(0, 1)), Err(BusError::Range(5..5)));
        for port in 0..254 {
            bus.add(0x1000 + port..0x1001 + port, cells(0, 1)).unwrap();
        }
        assert_eq!(bus.add(0x2000..0x2001, cells(0, 1)), Err(BusError::Full));
        let mut bus = MmioBus::new();
        bus.add(0x1000..0x2000, cells(0, 1)).unwrap();
        for range in [0..0x1001, 0x1FFF..0x3000, 0x1100..0x1200, 0..u64::MAX] {
            assert!(matches!(
                bus.add(range, cells(0, 1)),
                Err(BusError::Overlap { .. })
            ));
        }
        assert!(bus.claims(0x1FFF) && !bus.claims(0x2000) && !bus.claims(0xFFF));
    }

    proptest! {
        /// Whatever the widths and edges, a byte reads as a byte of its owner or as 0xFF.
        #[test]
        fn every_byte_has_one_owner(port: u16, log in 0usize..4) {
            let mut bus = PortBus::new();
            bus.add(0x7FFC..0x8001, cells(1, 5)).unwrap();
            bus.add(0x8001..0x8002, cells(2, 1)).unwrap();
            bus.add(0xFFF0..0x1_0000, cells(3, 16)).unwrap();
            for port in [port, 0x7FF8 + port % 16, 0xFFF8 | (port % 8)] {
                let mut data = vec![0; 1 << log];
                bus.read(port, &mut data);
                for (i, byte) in data.iter().enumerate() {
                    let owner = match usize::from(port) + i {
                        0x7FFC..0x8001 => 1,
                        0x8001 => 2,
                        0xFFF0..0x1_0000 => 3,
                        _ => 0xFF,
                    };
                    prop_assert_eq!(*byte, owner);
                }
                bus.write(port, &data);
            }
        }
    }
}
