//! The interrupt message: what travels between I/O APIC, devices and local APICs.

use testudo_arch::irq::Msi;

/// How a message is to be delivered (SDM vol. 3A, 11.5.1, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DeliveryMode {
    /// The vector, to every destination.
    Fixed = 0,
    /// The vector, to one of the destinations.
    LowestPriority = 1,
    /// A system-management interrupt.
    Smi = 2,
    /// A mode that the manual reserves: delivered to nobody.
    Reserved = 3,
    /// A non-maskable interrupt.
    Nmi = 4,
    /// The INIT reset.
    Init = 5,
    /// The start-up IPI; the vector is the page to start at.
    StartUp = 6,
    /// The vector is to be asked of the PIC.
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the three bits of a register; higher bits are ignored.
    #[inline]
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// Whom a message is for (SDM vol. 3A, 11.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The local APIC with this identification.
    Physical(u32),
    /// The local APICs whose logical destination register matches.
    Logical(u32),
    /// All.
    All,
    /// All but the sender, whose number is given.
    AllBut(u32),
}

impl Destination {
    /// The destination that an 8-bit field names, where 0xFF is everybody.
    #[inline]
    pub const fn from_field8(field: u8, logical: bool) -> Self {
        match (field, logical) {
            (0xFF, _) => Self::All,
            (id, false) => Self::Physical(id as u32),
            (set, true) => Self::Logical(set as u32),
        }
    }

    /// The destination that the 32-bit field of an x2APIC names, where all ones is everybody.
    #[inline]
    pub const fn from_field32(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (u32::MAX, _) => Self::All,
            (id, false) => Self::Physical(id),
            (set, true) => Self::Logical(set),
        }
    }
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does there.
    pub mode: DeliveryMode,
    /// The vector, where the mode has one.
    pub vector: u8,
    /// Whether it stands for a level, so that its end must be told to the I/O APIC.
    pub level: bool,
}

impl Message {
    /// The message that a device sends by writing `data` to `address` in the compatibility format
    /// (SDM vol. 3A, 11.11), or `None` if the address is not in 0xFEEx_xxxx.
    ///
    /// The destination mode bit counts whether or not the redirection hint is set; the hint makes
    /// a fixed interrupt go to one of the destinations.
    pub const fn from_msi(msi: Msi) -> Option<Self> {
        if msi.address >> 20 != 0xFEE {
            return None;
        }
        let address = msi.address as u32;
        let redirect = address & 1 << 3 != 0;
        let logical = address & 1 << 2 != 0;
        let mode = match DeliveryMode::from_bits(msi.data >> 8) {
            DeliveryMode::Fixed if redirect => DeliveryMode::LowestPriority,
            mode => mode,
        };
        Some(Self {
            destination: Destination::from_field8((address >> 12) as u8, logical),
            mode,
            vector: msi.data as u8,
            level: msi.data & 1 << 15 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_decodes_as_the_manual_draws_it() {
        let decode = |address, data| Message::from_msi(Msi { address, data });
        assert_eq!(
            decode(0xFEE0_3000, 0x41),
            Some(Message {
                destination: Destination::Physical(3),
                mode: DeliveryMode::Fixed,
                vector: 0x41,
                level: false
            })
        );
        assert_eq!(
            decode(0xFEE0_500C, 0xC0_41),
            Some(Message {
                destination: Destination::Logical(5),
                mode: DeliveryMode::LowestPriority,
                vector: 0x41,
                level: true
            })
        );
        assert_eq!(
            decode(0xFEEF_F000, 0x400).map(|m| (m.destination, m.mode)),
            Some((Destination::All, DeliveryMode::Nmi))
        );
        assert_eq!(decode(0xFED0_3000, 0x41), None);
        assert_eq!(decode(0x1_FEE0_3000, 0x41), None);
    }
}
