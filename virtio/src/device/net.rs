//! The network device (VIRTIO 1.3, 5.1): the card, its queues and its offloads.
//!
//! What the control queue changes is in `control`.

mod control;

use alloc::vec;
use alloc::vec::Vec;

use testudo_arch::{Gpa, GuestMemory};

use super::{Device, DeviceError, DeviceId, Io, Next, QueueIo, read_config_bytes};
use crate::Features;
use crate::backend::{MAX_FRAME, NetBackend, NetHeader, Offloads};
use crate::queue::{Bounds, Chain, Segment, Token};
use control::{Filter, Outcome};

/// Feature bits (5.1.3).
mod feature {
    use crate::Features;

    pub(super) const CSUM: Features = Features::bit(0);
    pub(super) const GUEST_CSUM: Features = Features::bit(1);
    pub(super) const CTRL_GUEST_OFFLOADS: Features = Features::bit(2);
    pub(super) const MTU: Features = Features::bit(3);
    pub(super) const MAC: Features = Features::bit(5);
    pub(super) const GUEST_TSO4: Features = Features::bit(7);
    pub(super) const GUEST_TSO6: Features = Features::bit(8);
    pub(super) const GUEST_ECN: Features = Features::bit(9);
    pub(super) const HOST_TSO4: Features = Features::bit(11);
    pub(super) const HOST_TSO6: Features = Features::bit(12);
    pub(super) const HOST_ECN: Features = Features::bit(13);
    pub(super) const MRG_RXBUF: Features = Features::bit(15);
    pub(super) const STATUS: Features = Features::bit(16);
    pub(super) const CTRL_VQ: Features = Features::bit(17);
    pub(super) const CTRL_RX: Features = Features::bit(18);
    pub(super) const CTRL_VLAN: Features = Features::bit(19);
    pub(super) const CTRL_RX_EXTRA: Features = Features::bit(20);
    pub(super) const MQ: Features = Features::bit(22);
    pub(super) const CTRL_MAC_ADDR: Features = Features::bit(23);
    pub(super) const HOST_USO: Features = Features::bit(56);
}

/// The feature of each offload in frames that the guest receives, and its bit in the command that
/// switches them at run time (5.1.6.5.6.1 uses the features' own numbers).
const GUEST_OFFLOADS: [(Offloads, Features); 4] = [
    (Offloads::CHECKSUM, feature::GUEST_CSUM),
    (Offloads::TSO4, feature::GUEST_TSO4),
    (Offloads::TSO6, feature::GUEST_TSO6),
    (Offloads::ECN, feature::GUEST_ECN),
];

/// The feature of each offload in frames that the guest sends.
const HOST_OFFLOADS: [(Offloads, Features); 5] = [
    (Offloads::CHECKSUM, feature::CSUM),
    (Offloads::TSO4, feature::HOST_TSO4),
    (Offloads::TSO6, feature::HOST_TSO6),
    (Offloads::ECN, feature::HOST_ECN),
    (Offloads::USO, feature::HOST_USO),
];

fn offloads_of(table: &[(Offloads, Features)], features: Features) -> Offloads {
    let set = table.iter().filter(|(_, f)| features.contains(*f));
    set.fold(Offloads::empty(), |all, (o, _)| all | *o)
}

/// `virtio_net_hdr`: always with the count of buffers since version 1.
const HEADER: usize = 12;
/// The most buffers that one frame is spread over.
const MAX_MERGED: usize = 128;
/// Frames handed to the guest in one call.
const RECEIVE_BUDGET: usize = 256;

/// What a network card tells about itself.
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// The Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet without its Ethernet header, if the driver is to be told.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub pairs: u16,
    /// The size of each queue.
    pub queue_size: u16,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            mtu: None,
            pairs: 1,
            queue_size: 256,
        }
    }
}

/// The network device.
#[derive(Debug)]
pub struct Net<B> {
    backend: B,
    options: NetOptions,
    queues: Vec<u16>,
    features: Features,
    filter: Filter,
    active_pairs: u16,
    link_up: bool,
    link_changed: bool,
    /// Chains that a frame is being spread over; empty between calls.
    merged: Vec<(Token, u32)>,
}

impl<B: NetBackend> Net<B> {
    /// A card whose wire ends at `backend`.
    pub fn new(backend: B, options: NetOptions) -> Self {
        let pairs = options.pairs.clamp(1, 64);
        let mut queues = vec![options.queue_size; 2 * usize::from(pairs)];
        queues.push(64);
        Self {
            backend,
            options: NetOptions { pairs, ..options },
            queues,
            features: Features::empty(),
            filter: Filter::new(options.mac),
            active_pairs: 1,
            link_up: true,
            link_changed: false,
            merged: Vec::with_capacity(MAX_MERGED),
        }
    }

    /// The other end of the wire.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Plugs the wire in or out; the driver learns of it at the next poll.
    pub fn set_link(&mut self, up: bool) {
        self.link_changed |= self.link_up != up;
        self.link_up = up;
    }

    /// The number of the control queue, which depends on what was negotiated (5.1.2).
    fn control_queue(&self) -> u16 {
        if self.features.contains(feature::MQ) {
            2 * self.options.pairs
        } else {
            2
        }
    }

    fn transmit<M: GuestMemory>(
        &mut self,
        queue: u16,
        io: &mut Io<'_, M>,
    ) -> Result<Next, DeviceError> {
        let may_use = offloads_of(&HOST_OFFLOADS, self.features);
        let (backend, link_up) = (&mut self.backend, self.link_up);
        io.serve(queue, |memory, chain| {
            let mut reader = chain.reader(memory);
            let header: [u8; HEADER] = reader.read_value()?;
            let mut fields = [0; 10];
            fields.copy_from_slice(&header[..10]);
            let mut header = NetHeader::from_bytes(fields);
            // That a checksum was verified is for a device to say, not for a driver (5.1.6.2).
            header.flags &= NetHeader::NEEDS_CSUM;
            let len = reader.remaining() as usize;
            // What the driver may not leave to us does not go out, and neither does what is no
            // frame at all: the chain is returned, the frame lost.
            let sane = header
                .needs(len)
                .is_some_and(|needs| may_use.contains(needs));
            if sane && link_up && (14..=MAX_FRAME).contains(&len) {
                backend.send(header, len, &mut |frame| reader.read(frame).map(drop))?;
            }
            Ok(0)
        })
    }

    /// Hands waiting frames to the guest.
    fn receive<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let features = self.features;
        let pairs = self.active_pairs;
        let merge = features.contains(feature::MRG_RXBUF);
        let takes = self.filter.offloads();
        let mut touched = 0u64;
        let mut next = Next::Again;
        for _ in 0..RECEIVE_BUDGET {
            let Some((mut header, frame)) = self.backend.peek() else {
                next = Next::Idle;
                break;
            };
            let fits = header.needs(frame.len()).is_some_and(|n| takes.contains(n));
            let wanted = self.link_up && fits && frame.len() <= MAX_FRAME;
            // A driver that knows nothing of checksums must find no flag (5.1.6.4.1).
            if !takes.contains(Offloads::CHECKSUM) {
                header.flags = 0;
            }
            if wanted && self.filter.accepts(frame) {
                let pair = flow(frame) % pairs;
                let Some(mut queue) = io.queue(2 * pair) else {
                    next = Next::Idle;
                    break;
                };
                let placed = place(&mut queue, header, frame, merge, &mut self.merged)?;
                if placed == Placed::NoBuffers {
                    next = Next::Idle;
                    break;
                }
                touched |= 1 << pair;
            }
            self.backend.consume();
        }
        for pair in (0..pairs).filter(|pair| touched & (1 << pair) != 0) {
            if let Some(mut queue) = io.queue(2 * pair) {
                queue.publish()?;
            }
        }
        Ok(next)
    }

    fn control<M: GuestMemory>(
        &mut self,
        queue: u16,
        io: &mut Io<'_, M>,
    ) -> Result<Next, DeviceError> {
        let pairs = self.options.pairs;
        let (filter, active) = (&mut self.filter, &mut self.active_pairs);
        let features = self.features;
        let next = io.serve(queue, |memory, chain| {
            let mut reader = chain.reader(memory);
            let mut writer = chain.writer(memory);
            let Some(mut ack) = writer.split_last(1) else {
                return Err(DeviceError::Malformed("no room for the acknowledgement"));
            };
            let outcome = control::command(filter, features, pairs, &mut reader)?;
            let status = match outcome {
                Outcome::Done => 0,
                Outcome::Pairs(pairs) => {
                    *active = pairs;
                    0
                }
                Outcome::Refused => 1,
            };
            ack.write(&[status])?;
            Ok(1)
        })?;
        self.backend.activate(self.filter.offloads());
        Ok(next)
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    /// It is in the guest's buffers, or cannot ever be.
    Done,
    /// It must wait for buffers.
    NoBuffers,
}

/// Spreads one frame over as many buffers as it takes, or as one buffer if they may not be merged.
fn place<M: GuestMemory>(
    queue: &mut QueueIo<'_, M>,
    header: NetHeader,
    frame: &[u8],
    merge: bool,
    merged: &mut Vec<(Token, u32)>,
) -> Result<Placed, DeviceError> {
    let memory = queue.memory();
    let mut count_at = [Gpa(0); 2];
    let mut rest = frame;
    let mut outcome = Placed::Done;
    loop {
        let Some(chain) = queue.pop()? else {
            outcome = Placed::NoBuffers;
            break;
        };
        let mut writer = chain.writer(memory);
        let mut too_small = false;
        if merged.is_empty() {
            let mut bytes = [0; HEADER];
            bytes[..10].copy_from_slice(&header.to_bytes());
            bytes[10] = 1;
            // The specification demands room for the header in the first buffer (5.1.6.3.1).
            too_small = writer.remaining() < HEADER as u64;
            writer.write(&bytes)?;
            count_at = [place_of(&chain, 10), place_of(&chain, 11)];
        }
        let written = writer.write(rest)?;
        rest = &rest[written..];
        let written = writer.written();
        merged.push((chain.into_token(), written));
        if rest.is_empty() && !too_small {
            break;
        }
        if too_small || !merge || merged.len() == MAX_MERGED {
            // No buffer of this driver can hold the frame: it is dropped.
            rest = &[0];
            break;
        }
    }
    if !rest.is_empty() {
        // The guest's buffers remain its own: they are as if never taken.
        for (token, _) in merged.drain(..).rev() {
            queue.give_back(token);
        }
        return Ok(outcome);
    }
    let count = (merged.len() as u16).to_le_bytes();
    if merged.len() > 1 {
        memory.write(count_at[0], &count[..1])?;
        memory.write(count_at[1], &count[1..])?;
    }
    for (token, written) in merged.drain(..) {
        queue.complete(token, written)?;
    }
    Ok(Placed::Done)
}

/// Where byte `offset` of the writable part of a chain is.
fn place_of(chain: &Chain<'_>, offset: u32) -> Gpa {
    let mut offset = offset;
    for &Segment { gpa, len } in chain.writable() {
        if offset < len {
            return gpa.wrapping_add(offset.into());
        }
        offset -= len;
    }
    Gpa(0)
}

/// A number that is the same for all frames of one connection, in either direction.
fn flow(frame: &[u8]) -> u16 {
    let at = |i: usize| u16::from(frame.get(i).copied().unwrap_or(0));
    let sum = |range: core::ops::Range<usize>| range.fold(0u16, |s, i| s.wrapping_add(at(i)));
    match (at(12), at(13)) {
        // IPv4 addresses, and the ports if there are no options.
        (0x08, 0x00) if at(14) == 0x45 => sum(26..38),
        (0x86, 0xDD) => sum(22..58),
        _ => 0,
    }
}

impl<M: GuestMemory, B: NetBackend> Device<M> for Net<B> {
    fn id(&self) -> DeviceId {
        DeviceId::NET
    }

    fn features(&self) -> Features {
        let mut features = feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_RX_EXTRA
            | feature::CTRL_VLAN
            | feature::CTRL_MAC_ADDR;
        features.set(feature::MTU, self.options.mtu.is_some());
        features.set(feature::MQ, self.options.pairs > 1);
        let offloads = self.backend.offloads();
        for (offload, feature) in GUEST_OFFLOADS.iter().chain(&HOST_OFFLOADS) {
            features.set(*feature, offloads.contains(*offload));
        }
        features.set(feature::CTRL_GUEST_OFFLOADS, !offloads.is_empty());
        features
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn bounds(&self, _queue: u16) -> Bounds {
        Bounds {
            segments: self.options.queue_size.max(64),
            // Several times the longest frame: receive buffers may be generous.
            bytes: 1 << 20,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.filter.mac());
        config[6] = u8::from(self.link_up);
        config[8..10].copy_from_slice(&self.options.pairs.to_le_bytes());
        config[10..12].copy_from_slice(&self.options.mtu.unwrap_or(0).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, features: Features) {
        self.features = features;
        self.filter
            .activate(offloads_of(&GUEST_OFFLOADS, features), features);
        self.backend.activate(self.filter.offloads());
    }

    fn reset(&mut self) {
        self.features = Features::empty();
        self.filter = Filter::new(self.options.mac);
        self.active_pairs = 1;
        self.backend.activate(Offloads::empty());
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if queue == self.control_queue() {
            return if self.features.contains(feature::CTRL_VQ) {
                self.control(queue, io)
            } else {
                Ok(Next::Idle)
            };
        }
        let next = if queue % 2 == 1 {
            self.transmit(queue, io)?
        } else {
            Next::Idle
        };
        // New buffers, or an answer from a backend that answers at once.
        let next = next.min(self.receive(io)?);
        Ok(next.min(self.backend.next_poll()))
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if core::mem::take(&mut self.link_changed) {
            io.config_changed();
        }
        let next = self.backend.poll(io.now());
        Ok(next.min(self.receive(io)?))
    }
}
