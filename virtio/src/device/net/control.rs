//! The control queue of the network device (VIRTIO 1.3, 5.1.6.5), and what it controls.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::GuestMemory;

use super::{GUEST_OFFLOADS, feature, offloads_of};
use crate::Features;
use crate::backend::Offloads;
use crate::queue::{ReadError, Reader};

/// Commands as (class, command).
mod command {
    pub(super) const RX_PROMISC: (u8, u8) = (0, 0);
    pub(super) const RX_ALLMULTI: (u8, u8) = (0, 1);
    pub(super) const RX_ALLUNI: (u8, u8) = (0, 2);
    pub(super) const RX_NOMULTI: (u8, u8) = (0, 3);
    pub(super) const RX_NOUNI: (u8, u8) = (0, 4);
    pub(super) const RX_NOBCAST: (u8, u8) = (0, 5);
    pub(super) const MAC_TABLE_SET: (u8, u8) = (1, 0);
    pub(super) const MAC_ADDR_SET: (u8, u8) = (1, 1);
    pub(super) const VLAN_ADD: (u8, u8) = (2, 0);
    pub(super) const VLAN_DEL: (u8, u8) = (2, 1);
    pub(super) const MQ_VQ_PAIRS_SET: (u8, u8) = (4, 0);
    pub(super) const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);
}

/// Addresses of each kind that the filter holds; a driver with more gets all frames of that kind.
const MAX_ADDRESSES: usize = 64;

type Mac = [u8; 6];

/// Which received frames the guest wants.
#[derive(Debug)]
pub(super) struct Filter {
    mac: Mac,
    unicast: Vec<Mac>,
    multicast: Vec<Mac>,
    unicast_overflow: bool,
    multicast_overflow: bool,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    /// One bit for each VLAN; without the feature all pass.
    vlans: Option<Box<[u64; 64]>>,
    offloads: Offloads,
}

/// What came of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    /// As many pairs of queues are to be used.
    Pairs(u16),
}

impl Filter {
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            unicast: vec![],
            multicast: vec![],
            unicast_overflow: false,
            multicast_overflow: false,
            promiscuous: false,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            vlans: None,
            offloads: Offloads::empty(),
        }
    }

    pub(super) fn activate(&mut self, offloads: Offloads, features: Features) {
        self.offloads = offloads;
        if features.contains(feature::CTRL_VLAN) {
            self.vlans = Some(Box::new([0; 64]));
        }
        // Without the means to choose, a driver gets everything (5.1.6.5.1).
        self.promiscuous = !features.contains(feature::CTRL_RX);
    }

    pub(super) fn mac(&self) -> Mac {
        self.mac
    }

    /// What may be left to do in frames for the guest.
    pub(super) fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Whether the guest wants a frame.
    pub(super) fn accepts(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else {
            return false;
        };
        self.accepts_vlan(frame) && (self.promiscuous || self.accepts_address(*to))
    }

    fn accepts_address(&self, to: Mac) -> bool {
        if to == [0xFF; 6] {
            !self.no_broadcast
        } else if to[0] & 1 == 1 {
            let listed = self.multicast_overflow || self.multicast.contains(&to);
            !self.no_multicast && (self.all_multicast || listed)
        } else {
            let listed = self.unicast_overflow || self.unicast.contains(&to);
            !self.no_unicast && (self.all_unicast || to == self.mac || listed)
        }
    }

    fn accepts_vlan(&self, frame: &[u8]) -> bool {
        let (Some(vlans), Some([0x81, 0x00, high, low])) = (&self.vlans, frame.get(12..16)) else {
            return true;
        };
        let id = usize::from(u16::from_be_bytes([*high, *low]) & 0xFFF);
        // Tag 0 is a priority, not a network.
        id == 0 || vlans[id / 64] & (1 << (id % 64)) != 0
    }
}

/// Reads one list of addresses, and says whether it was longer than what is kept.
fn addresses<M: GuestMemory>(
    reader: &mut Reader<'_, '_, M>,
    list: &mut Vec<Mac>,
) -> Result<bool, ReadError> {
    let count = u32::from_le_bytes(reader.read_value()?);
    list.clear();
    let kept = count.min(MAX_ADDRESSES as u32);
    for _ in 0..kept {
        list.push(reader.read_value()?);
    }
    let skipped = 6 * u64::from(count - kept);
    if reader.remaining() < skipped {
        return Err(ReadError::Short(skipped - reader.remaining()));
    }
    reader.skip(skipped);
    Ok(skipped > 0)
}

/// Executes one command of the driver. Data that is too short refuses it.
pub(super) fn command<M: GuestMemory>(
    filter: &mut Filter,
    features: Features,
    max_pairs: u16,
    reader: &mut Reader<'_, '_, M>,
) -> Result<Outcome, testudo_arch::MemoryFault> {
    match execute(filter, features, max_pairs, reader) {
        Ok(outcome) => Ok(outcome),
        Err(ReadError::Memory(fault)) => Err(fault),
        Err(ReadError::Short(_)) => Ok(Outcome::Refused),
    }
}

fn execute<M: GuestMemory>(
    filter: &mut Filter,
    features: Features,
    max_pairs: u16,
    reader: &mut Reader<'_, '_, M>,
) -> Result<Outcome, ReadError> {
    let [class, number]: [u8; 2] = reader.read_value()?;
    let needed = match class {
        0 => feature::CTRL_RX,
        1 if number == command::MAC_ADDR_SET.1 => feature::CTRL_MAC_ADDR,
        1 => feature::CTRL_RX,
        2 => feature::CTRL_VLAN,
        4 => feature::MQ,
        5 => feature::CTRL_GUEST_OFFLOADS,
        _ => return Ok(Outcome::Refused),
    };
    if !features.contains(needed) {
        return Ok(Outcome::Refused);
    }
    let mut switch = |flag: fn(&mut Filter) -> &mut bool| -> Result<Outcome, ReadError> {
        let [on]: [u8; 1] = reader.read_value()?;
        *flag(filter) = on != 0;
        Ok(Outcome::Done)
    };
    match (class, number) {
        command::RX_PROMISC => switch(|f| &mut f.promiscuous),
        command::RX_ALLMULTI => switch(|f| &mut f.all_multicast),
        command::RX_ALLUNI => switch(|f| &mut f.all_unicast),
        command::RX_NOMULTI => switch(|f| &mut f.no_multicast),
        command::RX_NOUNI => switch(|f| &mut f.no_unicast),
        command::RX_NOBCAST => switch(|f| &mut f.no_broadcast),
        command::MAC_TABLE_SET => {
            filter.unicast_overflow = addresses(reader, &mut filter.unicast)?;
            filter.multicast_overflow = addresses(reader, &mut filter.multicast)?;
            Ok(Outcome::Done)
        }
        command::MAC_ADDR_SET => {
            filter.mac = reader.read_value()?;
            Ok(Outcome::Done)
        }
        command::VLAN_ADD | command::VLAN_DEL => {
            let id = usize::from(u16::from_le_bytes(reader.read_value()?));
            let Some(word) = filter.vlans.as_mut().and_then(|v| v.get_mut(id / 64)) else {
                return Ok(Outcome::Refused);
            };
            if (class, number) == command::VLAN_ADD {
                *word |= 1 << (id % 64);
            } else {
                *word &= !(1 << (id % 64));
            }
            Ok(Outcome::Done)
        }
        command::MQ_VQ_PAIRS_SET => {
            let pairs = u16::from_le_bytes(reader.read_value()?);
            Ok(if (1..=max_pairs).contains(&pairs) {
                Outcome::Pairs(pairs)
            } else {
                Outcome::Refused
            })
        }
        command::GUEST_OFFLOADS_SET => {
            let wanted = Features::from_bits_retain(u64::from_le_bytes(reader.read_value()?));
            // Only what was negotiated can be switched on again.
            let possible = GUEST_OFFLOADS
                .iter()
                .fold(Features::empty(), |all, (_, f)| all | *f);
            if !(features & possible).contains(wanted) {
                return Ok(Outcome::Refused);
            }
            filter.offloads = offloads_of(&GUEST_OFFLOADS, wanted);
            Ok(Outcome::Done)
        }
        _ => Ok(Outcome::Refused),
    }
}
