//! Where packets go: pairs of queues, a learning switch, and what a network card asks of either.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use bitflags::bitflags;
use spin::Mutex;
use testudo_arch::MemoryFault;

use crate::device::Next;

/// The longest frame that passes: a segment of 64 KiB to be split by the receiver, with its
/// Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65_535 + 18;

/// Frames waiting for one receiver; what comes when it is full is dropped, as on a wire.
const MAX_WAITING: usize = 512;

bitflags! {
    /// Work that a sender leaves to whoever receives the frame.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// The transport checksum is not filled in, or has been verified.
        const CHECKSUM = 1;
        /// TCP over IPv4 comes in pieces longer than the link takes.
        const TSO4 = 2;
        /// TCP over IPv6 likewise.
        const TSO6 = 4;
        /// Such pieces may carry explicit congestion notification.
        const ECN = 8;
        /// UDP over IPv4 and IPv6 comes in such pieces.
        const USO = 16;
    }
}

/// What is left to be done with a frame (VIRTIO 1.3, 5.1.6; `virtio_net_hdr` without the count of
/// buffers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// Bit 0: the checksum is to be computed. Bit 1: it has been verified.
    pub flags: u8,
    /// How the frame is to be split, 0 for not at all; bit 7: with ECN.
    pub gso_type: u8,
    /// The length of all headers, a hint.
    pub hdr_len: u16,
    /// The length of the pieces without headers.
    pub gso_size: u16,
    /// From where on the checksum is computed.
    pub csum_start: u16,
    /// Where it goes, from there.
    pub csum_offset: u16,
}

impl NetHeader {
    /// In `flags`: the checksum is to be computed.
    pub const NEEDS_CSUM: u8 = 1;
    /// In `flags`: the checksum has been verified.
    pub const DATA_VALID: u8 = 2;
    /// In `gso_type`: not to be split.
    pub const GSO_NONE: u8 = 0;
    /// In `gso_type`: TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// In `gso_type`: TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// In `gso_type`: UDP.
    pub const GSO_UDP_L4: u8 = 5;
    /// In `gso_type`, besides: with ECN.
    pub const GSO_ECN: u8 = 0x80;

    /// From the first ten bytes of a packet.
    pub fn from_bytes(b: [u8; 10]) -> Self {
        let half = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: half(2),
            gso_size: half(4),
            csum_start: half(6),
            csum_offset: half(8),
        }
    }

    /// The first ten bytes of a packet.
    pub fn to_bytes(self) -> [u8; 10] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h]
    }

    /// What a receiver must be able to do to take the frame; `None` for a header that makes no
    /// sense for a frame of `len` bytes.
    pub fn needs(self, len: usize) -> Option<Offloads> {
        let mut needs = Offloads::empty();
        if self.flags & Self::NEEDS_CSUM != 0 {
            let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
            if end > len {
                return None;
            }
            needs |= Offloads::CHECKSUM;
        }
        needs |= match self.gso_type & !Self::GSO_ECN {
            Self::GSO_NONE if self.gso_type == 0 => return Some(needs),
            Self::GSO_TCPV4 => Offloads::TSO4,
            Self::GSO_TCPV6 => Offloads::TSO6,
            Self::GSO_UDP_L4 => Offloads::USO,
            _ => return None,
        };
        if self.gso_type & Self::GSO_ECN != 0 {
            needs |= Offloads::ECN;
        }
        // A piece whose checksum is not to be computed cannot be split (5.1.6.2.1).
        let splits = self.gso_size > 0 && needs.contains(Offloads::CHECKSUM);
        splits.then_some(needs)
    }
}

/// What fills a frame with the bytes that the guest sends.
pub type Fill<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<(), MemoryFault>;

/// The other end of a network card's wire.
///
/// A frame begins with its Ethernet header. Sent frames are written into the backend's own
/// storage, and received ones lent from it: each byte is copied once between it and the guest.
pub trait NetBackend: Send {
    /// What a guest may leave undone in frames that it sends, and be told to do in those it
    /// receives.
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    /// The driver is ready, and takes frames with these things left to do.
    fn activate(&mut self, _receives: Offloads) {}

    /// Takes a frame of `len` bytes, which `fill` writes.
    ///
    /// # Errors
    ///
    /// Those of `fill`; the frame is lost.
    fn send(&mut self, header: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault>;

    /// The next frame for the guest.
    fn peek(&mut self) -> Option<(NetHeader, &[u8])>;

    /// Removes the frame that [`peek`](Self::peek) showed.
    fn consume(&mut self);

    /// Lets time pass: `now` is in nanoseconds.
    fn poll(&mut self, _now: u64) -> Next {
        Next::Idle
    }

    /// When [`poll`](Self::poll) is wanted, after what the guest has sent since the last one.
    fn next_poll(&mut self) -> Next {
        Next::Idle
    }
}

/// A frame in storage that is used again.
#[derive(Clone, Debug, Default)]
struct Frame {
    header: NetHeader,
    bytes: Vec<u8>,
}

/// Frames on their way in one direction.
#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Frame>,
    spare: Vec<Frame>,
}

impl Lane {
    /// Storage for a frame; `None` when too many wait.
    fn frame(&mut self, header: NetHeader, len: usize) -> Option<Frame> {
        if self.waiting.len() >= MAX_WAITING {
            return None;
        }
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.header = header;
        frame.bytes.resize(len, 0);
        Some(frame)
    }

    fn recycle(&mut self, frame: Frame) {
        if self.spare.len() < MAX_WAITING {
            self.spare.push(frame);
        }
    }
}

/// One end of a wire between two cards, or between a card and a program.
///
/// Offloads pass as they are: whoever sits at the other end must be able to do what is left.
#[derive(Debug)]
pub struct Wire {
    out: Arc<Mutex<Lane>>,
    input: Arc<Mutex<Lane>>,
    shown: Option<Frame>,
    offloads: Offloads,
}

impl Wire {
    /// Both ends of a wire whose ends can do `offloads`.
    pub fn pair(offloads: Offloads) -> (Self, Self) {
        let (a, b) = (Arc::default(), Arc::default());
        let end = |out: &Arc<_>, input: &Arc<_>| Self {
            out: Arc::clone(out),
            input: Arc::clone(input),
            shown: None,
            offloads,
        };
        (end(&a, &b), end(&b, &a))
    }
}

impl NetBackend for Wire {
    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn send(&mut self, header: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        let mut lane = self.out.lock();
        let Some(mut frame) = lane.frame(header, len) else {
            return Ok(());
        };
        fill(&mut frame.bytes)?;
        lane.waiting.push_back(frame);
        Ok(())
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        if self.shown.is_none() {
            self.shown = self.input.lock().waiting.pop_front();
        }
        let frame = self.shown.as_ref()?;
        Some((frame.header, &frame.bytes))
    }

    fn consume(&mut self) {
        if let Some(frame) = self.shown.take() {
            self.input.lock().recycle(frame);
        }
    }
}

/// An Ethernet address.
type Mac = [u8; 6];

/// The most addresses that a switch remembers.
const MAX_ADDRESSES: usize = 1024;

#[derive(Debug)]
struct SwitchState {
    ports: Vec<SwitchPortState>,
    addresses: BTreeMap<Mac, usize>,
}

#[derive(Debug, Default)]
struct SwitchPortState {
    lane: Lane,
    receives: Offloads,
}

/// One port of a learning switch between guests.
///
/// Frames go to the port where their destination was last seen as a source, and to all others
/// when it was not seen or is a group address. A checksum that the sender left open is filled in
/// for a receiver that cannot do it.
#[derive(Debug)]
pub struct SwitchPort {
    state: Arc<Mutex<SwitchState>>,
    index: usize,
    shown: Option<Frame>,
}

/// A learning switch: see [`SwitchPort`].
#[derive(Clone, Copy, Debug)]
pub struct Switch;

impl Switch {
    /// The ports of a new switch.
    pub fn ports(count: usize) -> Vec<SwitchPort> {
        let mut ports = Vec::new();
        ports.resize_with(count, SwitchPortState::default);
        let state = Arc::new(Mutex::new(SwitchState {
            ports,
            addresses: BTreeMap::new(),
        }));
        let port = |index| SwitchPort {
            state: Arc::clone(&state),
            index,
            shown: None,
        };
        (0..count).map(port).collect()
    }
}

/// The first six bytes from `at` on.
fn address(bytes: &[u8], at: usize) -> Option<Mac> {
    bytes.get(at..at + 6)?.try_into().ok()
}

impl SwitchState {
    /// Passes a frame on to where it belongs.
    fn forward(&mut self, from: usize, frame: Frame) {
        let (Some(to), Some(source)) = (address(&frame.bytes, 0), address(&frame.bytes, 6)) else {
            return self.ports[from].lane.recycle(frame);
        };
        // A group address is no source.
        let known = self.addresses.contains_key(&source);
        if source[0] & 1 == 0 && (known || self.addresses.len() < MAX_ADDRESSES) {
            self.addresses.insert(source, from);
        }
        match self.addresses.get(&to) {
            Some(&port) if to[0] & 1 == 0 => {
                if port != from {
                    self.deliver(port, &frame);
                }
            }
            _ => {
                for port in (0..self.ports.len()).filter(|&port| port != from) {
                    self.deliver(port, &frame);
                }
            }
        }
        self.ports[from].lane.recycle(frame);
    }

    fn deliver(&mut self, port: usize, frame: &Frame) {
        let port = &mut self.ports[port];
        let Some(mut copy) = port.lane.frame(frame.header, frame.bytes.len()) else {
            return;
        };
        copy.bytes.copy_from_slice(&frame.bytes);
        if copy.header.flags & NetHeader::NEEDS_CSUM != 0
            && !port.receives.contains(Offloads::CHECKSUM)
        {
            fill_checksum(&mut copy);
        }
        port.lane.waiting.push_back(copy);
    }
}

/// Computes the checksum that the sender left open: the ones' complement sum from `csum_start` on,
/// where the field already holds the pseudo header's part (VIRTIO 1.3, 5.1.6.2).
fn fill_checksum(frame: &mut Frame) {
    let start = usize::from(frame.header.csum_start);
    let at = start + usize::from(frame.header.csum_offset);
    let Some(covered) = frame.bytes.get(start..) else {
        return;
    };
    let mut sum = 0u64;
    for pair in covered.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    let checksum = match !(sum as u16) {
        // For UDP, zero means that there is none.
        0 => 0xFFFF,
        other => other,
    };
    if let Some(field) = frame.bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&checksum.to_be_bytes());
        frame.header = NetHeader::default();
    }
}

impl NetBackend for SwitchPort {
    fn offloads(&self) -> Offloads {
        Offloads::CHECKSUM
    }

    fn activate(&mut self, receives: Offloads) {
        self.state.lock().ports[self.index].receives = receives;
    }

    fn send(&mut self, header: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        let mut state = self.state.lock();
        let lane = &mut state.ports[self.index].lane;
        let mut frame = lane.spare.pop().unwrap_or_default();
        frame.header = header;
        frame.bytes.clear();
        frame.bytes.resize(len, 0);
        fill(&mut frame.bytes)?;
        state.forward(self.index, frame);
        Ok(())
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        if self.shown.is_none() {
            self.shown = self.state.lock().ports[self.index].lane.waiting.pop_front();
        }
        let frame = self.shown.as_ref()?;
        Some((frame.header, &frame.bytes))
    }

    fn consume(&mut self) {
        if let Some(frame) = self.shown.take() {
            self.state.lock().ports[self.index].lane.recycle(frame);
        }
    }
}

/// A wire that ends nowhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unplugged;

impl NetBackend for Unplugged {
    fn send(&mut self, _: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        fill(&mut vec![0; len])
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        None
    }

    fn consume(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8, tail: &[u8]) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
        if to == 0xFF {
            bytes[..6].fill(0xFF);
        }
        bytes.extend_from_slice(tail);
        bytes
    }

    fn send(port: &mut SwitchPort, header: NetHeader, bytes: &[u8]) {
        let mut fill = |to: &mut [u8]| {
            to.copy_from_slice(bytes);
            Ok(())
        };
        port.send(header, bytes.len(), &mut fill).unwrap();
    }

    fn receive(port: &mut SwitchPort) -> Option<Vec<u8>> {
        let bytes = port.peek()?.1.to_vec();
        port.consume();
        Some(bytes)
    }

    #[test]
    fn a_switch_floods_until_it_has_learned() {
        let mut ports = Switch::ports(3);
        let none = NetHeader::default();
        send(&mut ports[0], none, &frame(2, 1, b"who"));
        assert!(receive(&mut ports[1]).is_some() && receive(&mut ports[2]).is_some());
        assert!(receive(&mut ports[0]).is_none());
        send(&mut ports[1], none, &frame(1, 2, b"me"));
        assert_eq!(receive(&mut ports[0]), Some(frame(1, 2, b"me")));
        assert!(receive(&mut ports[2]).is_none());
        send(&mut ports[0], none, &frame(2, 1, b"you"));
        assert!(receive(&mut ports[1]).is_some() && receive(&mut ports[2]).is_none());
        send(&mut ports[2], none, &frame(0xFF, 3, b"all"));
        assert!(receive(&mut ports[0]).is_some() && receive(&mut ports[1]).is_some());
    }

    #[test]
    fn an_open_checksum_is_filled_in_for_who_cannot() {
        let mut ports = Switch::ports(3);
        ports[1].activate(Offloads::CHECKSUM);
        let header = NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            csum_start: 14,
            csum_offset: 2,
            ..NetHeader::default()
        };
        let open = frame(0xFF, 1, &[0x12, 0x34, 0, 1, 0x56]);
        send(&mut ports[0], header, &open);
        assert_eq!(ports[1].peek(), Some((header, &open[..])));
        // 0x1234 + 0x0001 + 0x5600 = 0x6835
        let (header, bytes) = ports[2].peek().unwrap();
        assert_eq!(
            (header.flags, &bytes[14..18]),
            (0, &[0x12, 0x34, 0x97, 0xCA][..])
        );
    }

    #[test]
    fn a_full_wire_drops() {
        let (mut a, mut b) = Wire::pair(Offloads::empty());
        for i in 0..MAX_WAITING + 10 {
            let mut fill = |to: &mut [u8]| {
                to.fill(i as u8);
                Ok(())
            };
            a.send(NetHeader::default(), 60, &mut fill).unwrap();
        }
        let mut received = 0;
        while let Some((_, bytes)) = b.peek() {
            assert_eq!(bytes, [received as u8; 60]);
            received += 1;
            b.consume();
        }
        assert_eq!(received, MAX_WAITING);
    }

    #[test]
    fn headers_that_make_no_sense_are_found() {
        let csum = NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..NetHeader::default()
        };
        assert_eq!(csum.needs(52), Some(Offloads::CHECKSUM));
        assert_eq!(csum.needs(51), None);
        let tso = NetHeader {
            gso_type: NetHeader::GSO_TCPV4 | NetHeader::GSO_ECN,
            gso_size: 1400,
            ..csum
        };
        assert_eq!(
            tso.needs(60),
            Some(Offloads::CHECKSUM | Offloads::TSO4 | Offloads::ECN)
        );
        assert_eq!(NetHeader { gso_size: 0, ..tso }.needs(60), None);
        assert_eq!(NetHeader { flags: 0, ..tso }.needs(60), None);
        assert_eq!(NetHeader { gso_type: 2, ..tso }.needs(60), None);
        assert_eq!(NetHeader::from_bytes(tso.to_bytes()), tso);
    }
}
