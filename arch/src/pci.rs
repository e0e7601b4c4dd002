//! What a PCI function looks like from its host bridge.

/// The number of base address registers of an ordinary function.
pub const BARS: usize = 6;

/// The address space that a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PciSpace {
    /// Memory-mapped I/O.
    Memory,
    /// Port I/O.
    Io,
}

/// The addresses that one base address register decodes at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciWindow {
    /// The address space.
    pub space: PciSpace,
    /// The first address.
    pub base: u64,
    /// The length in bytes, a power of two.
    pub size: u64,
}

/// One PCI function: its configuration space and what its base address registers decode.
///
/// The host bridge has already checked that an access lies inside the configuration space or
/// window; `data` is one access of 1, 2, 4 or 8 bytes in guest order (little endian), in the
/// configuration space at most 4 and naturally aligned. As with
/// [`BusDevice`](crate::bus::BusDevice), every access is answered: offsets in the configuration
/// space are below 4096, and a function without the extended part reads zeros from 256 on.
pub trait PciFunction: Send {
    /// Reads from the configuration space at `offset`.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes to the configuration space at `offset`. Afterwards the bridge asks for
    /// [`windows`](Self::windows) anew.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// What each base address register decodes now: `None` where there is none, where its space
    /// is disabled in the command register, and for the upper half of a 64-bit register.
    fn windows(&self) -> [Option<PciWindow>; BARS];

    /// Reads at `offset` from the start of what register `bar` decodes.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes at `offset` from the start of what register `bar` decodes.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
}
