//! What a device looks like from its bus.

/// A device behind port I/O or memory-mapped I/O.
///
/// The bus has already checked that the access lies inside the device's window; `data` is one
/// access of 1, 2, 4 or 8 bytes in guest order (little endian). A device answers every access:
/// what it does not implement reads as its bus floats (usually all ones) and ignores writes.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` from the start of the device's window.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` from the start of the device's window.
    fn write(&mut self, offset: u64, data: &[u8]);
}
