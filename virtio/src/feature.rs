//! Feature bits that belong to the rings and transports, not to one device (VIRTIO 1.3, 6).

use bitflags::bitflags;

bitflags! {
    /// A set of feature bits: those that every device shares by name, a device's own as numbers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// A chain may continue in a table of its own (2.7.5.3, 2.8.7).
        const INDIRECT_DESC = 1 << 28;
        /// Each side names the index at which it wants the next notification (2.7.7, 2.8.10).
        const EVENT_IDX = 1 << 29;
        /// The driver knows VIRTIO 1.0 or later. Without it there is no agreement: the legacy
        /// interface is not implemented.
        const VERSION_1 = 1 << 32;
        /// Addresses go through the platform's IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// The packed ring format (2.8).
        const RING_PACKED = 1 << 34;
        /// The device uses buffers in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// The platform's own memory ordering rules apply.
        const ORDER_PLATFORM = 1 << 36;
        /// Single-root I/O virtualization.
        const SR_IOV = 1 << 37;
        /// A notification carries the ring position besides the queue's number (2.9.1).
        const NOTIFICATION_DATA = 1 << 38;
        /// A single queue can be reset (2.6.1).
        const RING_RESET = 1 << 40;
        const _ = !0;
    }
}

impl Features {
    /// What the rings and transports of this crate implement, whatever the device.
    pub const RINGS: Self = Self::INDIRECT_DESC
        .union(Self::EVENT_IDX)
        .union(Self::VERSION_1)
        .union(Self::RING_PACKED)
        .union(Self::IN_ORDER)
        .union(Self::NOTIFICATION_DATA)
        .union(Self::RING_RESET);

    /// The single feature with this number.
    #[inline]
    pub const fn bit(number: u32) -> Self {
        Self::from_bits_retain(1 << number)
    }

    /// The 32 bits that a transport's select register `window` shows: 0 the low, 1 the high ones.
    #[inline]
    pub const fn window(self, window: u32) -> u32 {
        match window {
            0 => self.bits() as u32,
            1 => (self.bits() >> 32) as u32,
            _ => 0,
        }
    }

    /// This set with the 32 bits of a window replaced; windows past the second hold nothing.
    #[inline]
    pub const fn with_window(self, window: u32, bits: u32) -> Self {
        let all = self.bits();
        Self::from_bits_retain(match window {
            0 => (all & !0xFFFF_FFFF) | bits as u64,
            1 => (all & 0xFFFF_FFFF) | ((bits as u64) << 32),
            _ => all,
        })
    }
}
