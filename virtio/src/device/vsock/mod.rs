//! The socket device: streams between guest and host, with credit (VIRTIO 1.3, 5.10).

mod packet;

use alloc::boxed::Box;
use alloc::collections::btree_map::Entry;
use alloc::collections::{BTreeMap, VecDeque};

use testudo_arch::GuestMemory;

use super::{Device, DeviceError, DeviceId, Io, Next, read_config_bytes};
use crate::Features;
use crate::backend::{VsockHost, VsockStream};
use crate::queue::{Bounds, Reader};
use packet::{Header, NO_RECEIVE, NO_SEND, STREAM, op};

/// Feature bit (5.10.3).
const FEATURE_STREAM: Features = Features::bit(0);

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// The host's context number (5.10.4).
const HOST_CID: u64 = 2;
/// What each connection may have sent to us without our having passed it on.
const BUFFER: u32 = 256 << 10;
/// Connections at once, and answers waiting for the guest to take them: a guest that does not
/// take answers is not listened to.
const MAX_CONNECTIONS: usize = 1024;
const MAX_ANSWERS: usize = 256;
/// Packets handed to the guest in one call.
const RECEIVE_BUDGET: usize = 256;

/// The ports of a connection: host's, guest's.
type Ports = (u32, u32);

struct Connection {
    stream: Box<dyn VsockStream>,
    /// The guest has accepted, if we asked; or we have, if it did.
    established: bool,
    /// Bytes from the guest that the stream has not taken yet.
    kept: VecDeque<u8>,
    /// The bytes that we passed on, and that figure as the guest last heard it.
    forwarded: u32,
    announced: u32,
    /// The bytes that we sent; the guest's buffer, and what it passed on.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    /// The guest will not send, not receive any more.
    peer_no_send: bool,
    peer_no_receive: bool,
    /// We have said that we are finished.
    closing: bool,
}

impl Connection {
    fn new(stream: Box<dyn VsockStream>, established: bool) -> Self {
        Self {
            stream,
            established,
            kept: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            peer_no_send: false,
            peer_no_receive: false,
            closing: false,
        }
    }

    /// The bytes that the guest has room for (5.10.6.3).
    fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(on_the_way)
    }

    /// Passes kept bytes on.
    fn pass_on(&mut self) {
        while !self.kept.is_empty() {
            let (front, _) = self.kept.as_slices();
            let taken = self.stream.write(front).min(front.len());
            if taken == 0 {
                break;
            }
            self.kept.drain(..taken);
            self.forwarded = self.forwarded.wrapping_add(taken as u32);
        }
        if self.peer_no_send && self.kept.is_empty() {
            self.stream.peer_finished();
        }
    }

    /// Whether the guest should hear that there is room again.
    fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= BUFFER / 2
    }
}

/// The socket device.
pub struct Vsock<H> {
    host: H,
    guest_cid: u64,
    connections: BTreeMap<Ports, Connection>,
    answers: VecDeque<Header>,
    /// The connection that was served last: the others are served before it again.
    last: Ports,
}

impl<H> core::fmt::Debug for Vsock<H> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Vsock")
            .field("guest_cid", &self.guest_cid)
            .field("connections", &self.connections.len())
            .finish_non_exhaustive()
    }
}

impl<H: VsockHost> Vsock<H> {
    /// A device for the guest with this context number (3 or more).
    pub fn new(host: H, guest_cid: u64) -> Self {
        Self {
            host,
            guest_cid,
            connections: BTreeMap::new(),
            answers: VecDeque::new(),
            last: (0, 0),
        }
    }

    /// The host's services.
    pub fn host(&mut self) -> &mut H {
        &mut self.host
    }

    fn header(&self, (host_port, guest_port): Ports, op: u16) -> Header {
        let connection = self.connections.get(&(host_port, guest_port));
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            kind: STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: connection.map_or(0, |c| c.forwarded),
            ..Header::default()
        }
    }

    fn answer(&mut self, ports: Ports, op: u16) {
        let header = self.header(ports, op);
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.announced = connection.forwarded;
        }
        self.answers.push_back(header);
    }

    fn reset_connection(&mut self, ports: Ports) {
        self.connections.remove(&ports);
        self.answer(ports, op::RST);
    }

    /// Takes one packet from the guest; `reader` stands behind the header.
    fn packet<M: GuestMemory>(
        &mut self,
        header: Header,
        reader: &mut Reader<'_, '_, M>,
    ) -> Result<(), DeviceError> {
        let ports = (header.dst_port, header.src_port);
        let ours = header.dst_cid == HOST_CID && header.src_cid == self.guest_cid;
        if !ours || header.kind != STREAM {
            // Never an answer to a reset, or two ends could go on for ever.
            if header.op != op::RST {
                let mut answer = self.header(ports, op::RST);
                (answer.src_cid, answer.dst_cid) = (header.dst_cid, header.src_cid);
                answer.kind = header.kind;
                self.answers.push_back(answer);
            }
            return Ok(());
        }
        if let Some(connection) = self.connections.get_mut(&ports) {
            connection.peer_buffer = header.buf_alloc;
            connection.peer_forwarded = header.fwd_cnt;
        }
        if header.op == op::REQUEST {
            self.request(ports, &header);
            return Ok(());
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            if header.op != op::RST {
                self.answer(ports, op::RST);
            }
            return Ok(());
        };
        match header.op {
            op::RESPONSE if !connection.established => connection.established = true,
            op::RST => {
                self.connections.remove(&ports);
            }
            op::SHUTDOWN => {
                connection.peer_no_send |= header.flags & NO_SEND != 0;
                connection.peer_no_receive |= header.flags & NO_RECEIVE != 0;
                connection.pass_on();
                if connection.peer_no_send && connection.peer_no_receive {
                    self.reset_connection(ports);
                }
            }
            op::RW if connection.established && !connection.peer_no_send => {
                let room = BUFFER as usize - connection.kept.len().min(BUFFER as usize);
                let len = u64::from(header.len);
                // More than the credit, or than the packet holds, breaks the connection.
                if len > room as u64 || len > reader.remaining() {
                    self.reset_connection(ports);
                    return Ok(());
                }
                let mut left = header.len as usize;
                let mut bytes = [0; 1024];
                while left > 0 {
                    let part = left.min(bytes.len());
                    let got = reader.read(&mut bytes[..part])?;
                    connection.kept.extend(&bytes[..got]);
                    connection.pass_on();
                    left -= part;
                }
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.answer(ports, op::CREDIT_UPDATE),
            _ => self.reset_connection(ports),
        }
        Ok(())
    }

    fn request(&mut self, ports: Ports, header: &Header) {
        let (host_port, guest_port) = ports;
        if self.connections.contains_key(&ports) || self.connections.len() >= MAX_CONNECTIONS {
            return self.reset_connection(ports);
        }
        let Some(stream) = self.host.accept(host_port, guest_port) else {
            return self.answer(ports, op::RST);
        };
        let mut connection = Connection::new(stream, true);
        connection.peer_buffer = header.buf_alloc;
        connection.peer_forwarded = header.fwd_cnt;
        self.connections.insert(ports, connection);
        self.answer(ports, op::RESPONSE);
    }

    /// Takes packets from the guest, while there is room for the answers.
    fn transmit<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let memory = io.memory();
        let Some(mut queue) = io.queue(TRANSMIT) else {
            return Ok(Next::Idle);
        };
        let mut budget = queue.size();
        while self.answers.len() < MAX_ANSWERS {
            if budget == 0 {
                queue.publish()?;
                return Ok(Next::Again);
            }
            budget -= 1;
            let Some(chain) = queue.pop()? else {
                break;
            };
            let mut reader = chain.reader(memory);
            let header = Header::from_bytes(reader.read_value()?);
            self.packet(header, &mut reader)?;
            let token = chain.into_token();
            queue.complete(token, 0)?;
        }
        queue.publish()?;
        Ok(Next::Idle)
    }

    /// Hands answers, then data, to the guest.
    fn receive<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        let memory = io.memory();
        let Some(mut queue) = io.queue(RECEIVE) else {
            return Ok(Next::Idle);
        };
        let mut next = Next::Again;
        for _ in 0..RECEIVE_BUDGET {
            let Some(chain) = queue.pop()? else {
                next = Next::Idle;
                break;
            };
            let mut writer = chain.writer(memory);
            if writer.remaining() < Header::LEN as u64 {
                return Err(DeviceError::Malformed("no room for a packet's header"));
            }
            let room = (writer.remaining() - Header::LEN as u64).min(64 << 10) as u32;
            let Some(mut data) = writer.split_last(writer.remaining() - Header::LEN as u64) else {
                return Err(DeviceError::Malformed("no room for a packet's header"));
            };
            let header = match self.answers.pop_front() {
                Some(answer) => Some(answer),
                None => self.next_packet(room, |bytes| data.write(bytes).map(drop))?,
            };
            let Some(header) = header else {
                let token = chain.into_token();
                queue.give_back(token);
                next = Next::Idle;
                break;
            };
            writer.write(&header.to_bytes())?;
            let written = writer.written() + data.written();
            let token = chain.into_token();
            queue.complete(token, written)?;
        }
        queue.publish()?;
        Ok(next)
    }

    /// The next packet of a connection that has something to say, in turn. Its data goes to
    /// `sink`.
    fn next_packet(
        &mut self,
        room: u32,
        mut sink: impl FnMut(&[u8]) -> Result<(), testudo_arch::MemoryFault>,
    ) -> Result<Option<Header>, testudo_arch::MemoryFault> {
        for _ in 0..self.connections.len() {
            let after = (
                core::ops::Bound::Excluded(self.last),
                core::ops::Bound::Unbounded,
            );
            let turn = self.connections.range(after).next();
            let Some(ports) = turn
                .or_else(|| self.connections.iter().next())
                .map(|(p, _)| *p)
            else {
                break;
            };
            self.last = ports;
            let mut len = 0;
            let mut kind = None;
            if let Some(connection) = self.connections.get_mut(&ports) {
                connection.pass_on();
                if connection.established && !connection.closing {
                    let may = if connection.peer_no_receive {
                        0
                    } else {
                        connection.credit()
                    };
                    let may = may.min(room);
                    let mut bytes = [0; 2048];
                    while len < may {
                        let part = (may - len).min(bytes.len() as u32) as usize;
                        let got = connection.stream.read(&mut bytes[..part]).min(part);
                        if got == 0 {
                            break;
                        }
                        sink(&bytes[..got])?;
                        len += got as u32;
                    }
                    connection.sent = connection.sent.wrapping_add(len);
                    kind = if len > 0 {
                        Some(op::RW)
                    } else if connection.stream.finished() {
                        connection.closing = true;
                        Some(op::SHUTDOWN)
                    } else if connection.owes_credit() {
                        Some(op::CREDIT_UPDATE)
                    } else {
                        None
                    };
                }
                if kind.is_some() {
                    connection.announced = connection.forwarded;
                }
            }
            if let Some(kind) = kind {
                let mut header = self.header(ports, kind);
                header.len = len;
                if kind == op::SHUTDOWN {
                    header.flags = NO_RECEIVE | NO_SEND;
                }
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// Asks the guest for the connections that the host wants.
    fn connect(&mut self) {
        while self.answers.len() < MAX_ANSWERS && self.connections.len() < MAX_CONNECTIONS {
            let Some(wanted) = self.host.connect() else {
                break;
            };
            let ports = (wanted.host_port, wanted.guest_port);
            if let Entry::Vacant(place) = self.connections.entry(ports) {
                place.insert(Connection::new(wanted.stream, false));
                self.answer(ports, op::REQUEST);
            }
        }
    }
}

impl<M: GuestMemory, H: VsockHost> Device<M> for Vsock<H> {
    fn id(&self) -> DeviceId {
        DeviceId::VSOCK
    }

    fn features(&self) -> Features {
        FEATURE_STREAM
    }

    fn queues(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn bounds(&self, _queue: u16) -> Bounds {
        Bounds {
            segments: 256,
            bytes: 1 << 20,
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.answers.clear();
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        if queue == EVENT {
            // Buffers for events, of which there is none: the context number never changes.
            return Ok(Next::Idle);
        }
        // Room for answers first, then packets, then what they brought about.
        let before = self.receive(io)?;
        let next = self.transmit(io)?;
        Ok(before.min(next).min(self.receive(io)?))
    }

    fn poll(&mut self, io: &mut Io<'_, M>) -> Result<Next, DeviceError> {
        self.connect();
        self.receive(io)
    }
}
