//! What a device may ask of the interrupt controllers.

/// A message-signalled interrupt: the address and data that the device would write
/// (SDM vol. 3A, 11.11; PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msi {
    /// The address, 0xFEEx_xxxx without interrupt remapping.
    pub address: u64,
    /// The data: vector and delivery mode, or a remapping sub-handle.
    pub data: u32,
}

/// The interrupt controllers of a machine, as its devices see them.
///
/// Both calls may come from any processor and never block on a device.
pub trait InterruptSink: Send + Sync {
    /// Drives the level of the global system interrupt `gsi` (ACPI 6.5, 5.2.13).
    fn set_level(&self, gsi: u32, high: bool);

    /// Delivers a message-signalled interrupt.
    fn send_msi(&self, msi: Msi);
}
