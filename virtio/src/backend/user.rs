//! A host made of software at the other end of the wire, so that a guest has a network at once.
//!
//! It answers ARP and pings, gives out one address by DHCP, echoes TCP on port 7, and serves pages
//! by HTTP on port 80. TCP/IP is `smoltcp`'s.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, IpAddress, IpCidr, Ipv4Address,
};
use testudo_arch::MemoryFault;

use super::net::{Fill, NetBackend, NetHeader};
use crate::device::Next;

/// The addresses of the little network.
#[derive(Clone, Copy, Debug)]
pub struct UserOptions {
    /// The host's Ethernet address.
    pub mac: [u8; 6],
    /// The host's IPv4 address.
    pub host: [u8; 4],
    /// The address that DHCP gives to the guest.
    pub guest: [u8; 4],
    /// The length of the network's prefix.
    pub prefix: u8,
}

impl Default for UserOptions {
    fn default() -> Self {
        Self {
            mac: [0x52, 0x55, 10, 0, 2, 2],
            host: [10, 0, 2, 2],
            guest: [10, 0, 2, 15],
            prefix: 24,
        }
    }
}

/// The largest packet on the wire, with its Ethernet header.
const MTU: usize = 1514;
/// Frames waiting in either direction.
const MAX_WAITING: usize = 256;
/// Connections that can be open at once, for each service.
const CONNECTIONS: usize = 8;
const TCP_BUFFER: usize = 32 << 10;
const ECHO_PORT: u16 = 7;
const HTTP_PORT: u16 = 80;
const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const LEASE_SECONDS: u32 = 86_400;
/// The longest request that the HTTP server reads.
const MAX_REQUEST: usize = 4096;

/// The two directions of the wire, as smoltcp's device.
#[derive(Default)]
struct Wire {
    from_guest: VecDeque<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
}

struct Receive(Vec<u8>);
struct Transmit<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::RxToken for Receive {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.push_back(bytes);
        result
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Receive;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Receive, Transmit<'_>)> {
        if self.to_guest.len() >= MAX_WAITING {
            return None;
        }
        let bytes = self.from_guest.pop_front()?;
        Some((Receive(bytes), Transmit(&mut self.to_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_>> {
        (self.to_guest.len() < MAX_WAITING).then_some(Transmit(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// A page of the HTTP server.
#[derive(Clone, Debug)]
struct Page {
    path: String,
    body: Vec<u8>,
}

/// One connection to the HTTP server: what was asked so far, then what is left to answer.
struct Http {
    socket: SocketHandle,
    request: Vec<u8>,
    answer: Option<(Vec<u8>, usize)>,
}

/// The built-in host.
pub struct UserHost {
    options: UserOptions,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: SocketHandle,
    echo: Vec<SocketHandle>,
    http: Vec<Http>,
    pages: Vec<Page>,
    now: u64,
}

impl core::fmt::Debug for UserHost {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("UserHost")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; TCP_BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    // A peer that vanished does not hold a connection for ever.
    socket.set_timeout(Some(Duration::from_secs(60)));
    socket
}

fn udp_socket() -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8 << 10]);
    udp::Socket::new(buffer(), buffer())
}

impl UserHost {
    /// A host with these addresses and one page, `/`.
    pub fn new(options: UserOptions) -> Self {
        let mut wire = Wire::default();
        let hardware = EthernetAddress(options.mac).into();
        let mut interface = Interface::new(Config::new(hardware), &mut wire, Instant::ZERO);
        let [a, b, c, d] = options.host;
        let prefix = options.prefix.min(32);
        interface.update_ip_addrs(|addresses| {
            // The list holds at least one, and is empty.
            let _ = addresses.push(IpCidr::new(IpAddress::v4(a, b, c, d), prefix));
        });
        let mut sockets = SocketSet::new(vec![]);
        let dhcp = sockets.add(udp_socket());
        let echo = (0..CONNECTIONS)
            .map(|_| sockets.add(tcp_socket()))
            .collect();
        let http = (0..CONNECTIONS)
            .map(|_| Http {
                socket: sockets.add(tcp_socket()),
                request: Vec::new(),
                answer: None,
            })
            .collect();
        Self {
            options,
            wire,
            interface,
            sockets,
            dhcp,
            echo,
            http,
            pages: Vec::new(),
            now: 0,
        }
        .with_page("/", b"testudo\n".to_vec())
    }

    /// Adds a page to the HTTP server, or replaces it.
    #[must_use]
    pub fn with_page(mut self, path: &str, body: Vec<u8>) -> Self {
        self.pages.retain(|page| page.path != path);
        self.pages.push(Page {
            path: path.into(),
            body,
        });
        self
    }

    /// Moves packets and bytes as far as they go.
    fn advance(&mut self) {
        let now = Instant::from_micros((self.now / 1000) as i64);
        // Each round answers what the round before has brought; a bound, since the guest is at
        // the other end.
        for _ in 0..16 {
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            let mut moved = self.serve_dhcp();
            moved |= self.serve_echo();
            moved |= self.serve_http();
            if !moved && self.wire.from_guest.is_empty() {
                break;
            }
        }
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    fn serve_dhcp(&mut self) -> bool {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.dhcp);
        if !socket.is_open() {
            return socket.bind(DHCP_SERVER).is_ok();
        }
        let Ok((bytes, _)) = socket.recv() else {
            return false;
        };
        let Some(answer) = dhcp_answer(&self.options, bytes) else {
            return true;
        };
        let everyone = (IpAddress::from(Ipv4Address::BROADCAST), DHCP_CLIENT);
        // A full send buffer loses the answer, and the client asks again.
        let _ = socket.send_slice(&answer, everyone);
        true
    }

    fn serve_echo(&mut self) -> bool {
        let mut moved = false;
        for &handle in &self.echo {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
            if !socket.is_open() {
                moved |= socket.listen(ECHO_PORT).is_ok();
                continue;
            }
            let mut bytes = [0; 2048];
            while socket.can_recv() && socket.can_send() {
                let room = (socket.send_capacity() - socket.send_queue()).min(bytes.len());
                let Ok(len) = socket.recv_slice(&mut bytes[..room]) else {
                    break;
                };
                if len == 0 || socket.send_slice(&bytes[..len]).is_err() {
                    break;
                }
                moved = true;
            }
            if socket.state() == tcp::State::CloseWait && socket.recv_queue() == 0 {
                socket.close();
            }
        }
        moved
    }

    fn serve_http(&mut self) -> bool {
        let mut moved = false;
        for http in &mut self.http {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(http.socket);
            if !socket.is_open() {
                http.request.clear();
                http.answer = None;
                moved |= socket.listen(HTTP_PORT).is_ok();
                continue;
            }
            if http.answer.is_none() && socket.can_recv() {
                let room = MAX_REQUEST - http.request.len();
                let taken = socket.recv(|bytes| {
                    let len = bytes.len().min(room);
                    http.request.extend_from_slice(&bytes[..len]);
                    (len, len)
                });
                moved |= taken.is_ok_and(|len| len > 0);
                let complete = http.request.windows(4).any(|w| w == b"\r\n\r\n");
                if complete || http.request.len() >= MAX_REQUEST {
                    http.answer = Some((http_answer(&self.pages, &http.request), 0));
                }
            }
            if let Some((bytes, sent)) = &mut http.answer {
                if let Ok(len) = socket.send_slice(&bytes[*sent..]) {
                    *sent += len;
                    moved |= len > 0;
                }
                if *sent == bytes.len() {
                    socket.close();
                }
            } else if socket.state() == tcp::State::CloseWait && !socket.can_recv() {
                socket.close();
            }
        }
        moved
    }
}

/// What the DHCP server says to a message, if it says anything.
fn dhcp_answer(options: &UserOptions, bytes: &[u8]) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(bytes).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let host = Ipv4Address::from(options.host);
    let guest = Ipv4Address::from(options.guest);
    let message_type = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            // A request for another server's offer is none of our business.
            if request
                .server_identifier
                .is_some_and(|server| server != host)
            {
                return None;
            }
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == guest {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            }
        }
        _ => return None,
    };
    let mask = u32::MAX.checked_shl(32 - u32::from(options.prefix.min(32)));
    let given = message_type != DhcpMessageType::Nak;
    let answer = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: Ipv4Address::UNSPECIFIED,
        your_ip: if given {
            guest
        } else {
            Ipv4Address::UNSPECIFIED
        },
        server_ip: host,
        router: given.then_some(host),
        subnet_mask: given.then(|| Ipv4Address::from(mask.unwrap_or(0))),
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: true,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(host),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: given.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; answer.buffer_len()];
    answer
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
        .ok()?;
    Some(bytes)
}

/// The whole answer to an HTTP request.
fn http_answer(pages: &[Page], request: &[u8]) -> Vec<u8> {
    let line = request.split(|&b| b == b'\r').next().unwrap_or(&[]);
    let line = core::str::from_utf8(line).unwrap_or("");
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let page = pages.iter().find(|page| page.path == path);
    let (status, body) = match (method, page) {
        ("GET" | "HEAD", Some(page)) => ("200 OK", &page.body[..]),
        ("GET" | "HEAD", None) => ("404 Not Found", &b"no such page\n"[..]),
        _ => ("405 Method Not Allowed", &b"only GET\n"[..]),
    };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    if method != "HEAD" {
        answer.extend_from_slice(body);
    }
    answer
}

impl NetBackend for UserHost {
    fn send(&mut self, _: NetHeader, len: usize, fill: Fill<'_>) -> Result<(), MemoryFault> {
        if self.wire.from_guest.len() >= MAX_WAITING || len > MTU {
            return Ok(());
        }
        let mut bytes = vec![0; len];
        fill(&mut bytes)?;
        self.wire.from_guest.push_back(bytes);
        Ok(())
    }

    fn peek(&mut self) -> Option<(NetHeader, &[u8])> {
        if self.wire.to_guest.is_empty() && !self.wire.from_guest.is_empty() {
            self.advance();
        }
        let frame = self.wire.to_guest.front()?;
        Some((NetHeader::default(), frame))
    }

    fn consume(&mut self) {
        self.wire.to_guest.pop_front();
    }

    fn poll(&mut self, now: u64) -> Next {
        self.now = self.now.max(now);
        self.advance();
        self.next_poll()
    }

    fn next_poll(&mut self) -> Next {
        let instant = Instant::from_micros((self.now / 1000) as i64);
        match self.interface.poll_at(instant, &self.sockets) {
            Some(at) => Next::At((at.total_micros().max(0) as u64).saturating_mul(1000)),
            None => Next::Idle,
        }
    }
}
