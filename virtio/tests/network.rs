//! The network card under the driver of `virtio-drivers`, with `smoltcp` as the guest's own stack,
//! against the built-in host and across the switch.

mod support;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr,
};
use support::{Connect, GuestHal, MmioGuest, PciGuest};
use testudo_virtio::backend::{NetBackend, Switch, UserHost, UserOptions};
use testudo_virtio::device::{Net, NetOptions};
use virtio_drivers::device::net::VirtIONet;

const HOST: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);

/// The guest's card with its driver.
struct Card<T: Connect> {
    guest: T,
    driver: VirtIONet<GuestHal, T, 16>,
}

impl<T: Connect> Card<T> {
    fn new(backend: impl NetBackend + 'static, mac: u8) -> Self {
        let options = NetOptions {
            mac: [2, 0, 0, 0, 0, mac],
            ..NetOptions::default()
        };
        let guest = T::connect(Net::new(backend, options));
        let driver = VirtIONet::new(guest.clone(), 2048).unwrap();
        assert_eq!(driver.mac_address(), options.mac);
        Self { guest, driver }
    }
}

struct Received(Vec<u8>);
struct Sender<'a, T: Connect>(&'a mut VirtIONet<GuestHal, T, 16>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl<T: Connect> phy::TxToken for Sender<'_, T> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buffer = self.0.new_tx_buffer(len);
        let result = f(buffer.packet_mut());
        self.0.send(buffer).unwrap();
        result
    }
}

impl<T: Connect> phy::Device for Card<T> {
    type RxToken<'a>
        = Received
    where
        T: 'a;
    type TxToken<'a>
        = Sender<'a, T>
    where
        T: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sender<'_, T>)> {
        let buffer = self.driver.receive().ok()?;
        let bytes = buffer.packet().to_vec();
        self.driver.recycle_rx_buffer(buffer).unwrap();
        Some((Received(bytes), Sender(&mut self.driver)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_, T>> {
        Some(Sender(&mut self.driver))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities.checksum = ChecksumCapabilities::default();
        capabilities
    }
}

/// A guest: its card, its stack, its clock.
struct Guest<T: Connect> {
    card: Card<T>,
    interface: Interface,
    millis: i64,
}

impl<T: Connect> Guest<T> {
    fn new(mut card: Card<T>, address: Option<[u8; 4]>) -> Self {
        let mac = EthernetAddress(card.driver.mac_address());
        let mut interface = Interface::new(Config::new(mac.into()), &mut card, Instant::ZERO);
        if let Some([a, b, c, d]) = address {
            let cidr = IpCidr::new(IpAddress::v4(a, b, c, d), 24);
            interface.update_ip_addrs(|list| list.push(cidr).unwrap());
        }
        Self {
            card,
            interface,
            millis: 0,
        }
    }

    /// One millisecond passes.
    fn step(&mut self, sockets: &mut SocketSet<'_>) {
        self.millis += 1;
        self.card.guest.poll(self.millis as u64 * 1_000_000);
        let now = Instant::from_millis(self.millis);
        self.interface.poll(now, &mut self.card, sockets);
    }
}

fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 16 << 10]);
    tcp::Socket::new(buffer(), buffer())
}

macro_rules! over_both_transports {
    ($($name:ident)*) => {
        mod mmio {
            $(#[test] fn $name() { super::$name::<super::MmioGuest>() })*
        }
        mod pci {
            $(#[test] fn $name() { super::$name::<super::PciGuest>() })*
        }
    };
}

over_both_transports! {
    dhcp_gives_an_address
    the_host_answers_pings
    the_host_echoes_over_tcp
    the_host_serves_a_page
    two_guests_talk_across_a_switch
}

fn user_host() -> UserHost {
    UserHost::new(UserOptions::default()).with_page("/big", vec![b'x'; 200_000])
}

fn dhcp_gives_an_address<T: Connect>() {
    let mut guest = Guest::new(Card::<T>::new(user_host(), 1), None);
    let mut sockets = SocketSet::new(vec![]);
    let handle = sockets.add(dhcpv4::Socket::new());
    for _ in 0..20_000 {
        guest.step(&mut sockets);
        let event = sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
        if let Some(dhcpv4::Event::Configured(config)) = event {
            let guest = Ipv4Address::new(10, 0, 2, 15);
            assert_eq!(config.address, Ipv4Cidr::new(guest, 24));
            assert_eq!(config.router, Some(HOST));
            return;
        }
    }
    panic!("no address");
}

fn the_host_answers_pings<T: Connect>() {
    let mut guest = Guest::new(Card::<T>::new(user_host(), 1), Some([10, 0, 2, 15]));
    let mut sockets = SocketSet::new(vec![]);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let handle = sockets.add(icmp::Socket::new(buffer(), buffer()));
    let checksum = ChecksumCapabilities::default();
    let socket = sockets.get_mut::<icmp::Socket<'_>>(handle);
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let echo = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data: b"are you there?",
    };
    let space = socket.send(echo.buffer_len(), HOST.into()).unwrap();
    echo.emit(&mut Icmpv4Packet::new_unchecked(space), &checksum);
    for _ in 0..1000 {
        guest.step(&mut sockets);
        let socket = sockets.get_mut::<icmp::Socket<'_>>(handle);
        if let Ok((bytes, from)) = socket.recv() {
            let packet = Icmpv4Packet::new_checked(bytes).unwrap();
            let reply = Icmpv4Repr::parse(&packet, &checksum).unwrap();
            let expected = Icmpv4Repr::EchoReply {
                ident: 7,
                seq_no: 1,
                data: b"are you there?",
            };
            assert_eq!((from, reply), (HOST.into(), expected));
            return;
        }
    }
    panic!("no answer");
}

fn the_host_echoes_over_tcp<T: Connect>() {
    let mut guest = Guest::new(Card::<T>::new(user_host(), 1), Some([10, 0, 2, 15]));
    let mut sockets = SocketSet::new(vec![]);
    let handle = sockets.add(tcp_socket());
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket
        .connect(guest.interface.context(), (HOST, 7), 49_152)
        .unwrap();
    let data: Vec<u8> = (0..100_000u32).map(|i| (i / 3) as u8).collect();
    let (mut sent, mut received) = (0, Vec::new());
    for _ in 0..20_000 {
        guest.step(&mut sockets);
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        while socket.can_recv() {
            let mut bytes = [0; 4096];
            let len = socket.recv_slice(&mut bytes).unwrap();
            received.extend_from_slice(&bytes[..len]);
        }
        if received.len() == data.len() {
            assert_eq!(received, data);
            return;
        }
    }
    panic!("{} of {} bytes", received.len(), data.len());
}

fn the_host_serves_a_page<T: Connect>() {
    let mut guest = Guest::new(Card::<T>::new(user_host(), 1), Some([10, 0, 2, 15]));
    for (request, status, len) in [
        ("GET / HTTP/1.0\r\n\r\n", "200 OK", 8),
        ("GET /big HTTP/1.1\r\nHost: h\r\n\r\n", "200 OK", 200_000),
        ("GET /none HTTP/1.1\r\n\r\n", "404 Not Found", 13),
        ("POST / HTTP/1.1\r\n\r\n", "405 Method Not Allowed", 9),
    ] {
        let mut sockets = SocketSet::new(vec![]);
        let handle = sockets.add(tcp_socket());
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        let port = 49_152 + len as u16;
        socket
            .connect(guest.interface.context(), (HOST, 80), port)
            .unwrap();
        let (mut asked, mut answer) = (false, Vec::new());
        for _ in 0..20_000 {
            guest.step(&mut sockets);
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            if socket.can_send() && !asked {
                assert_eq!(socket.send_slice(request.as_bytes()), Ok(request.len()));
                asked = true;
            }
            while socket.can_recv() {
                let mut bytes = [0; 4096];
                let len = socket.recv_slice(&mut bytes).unwrap();
                answer.extend_from_slice(&bytes[..len]);
            }
            if asked && !socket.may_recv() {
                break;
            }
        }
        let text = String::from_utf8(answer).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{head}"
        );
        assert_eq!(body.len(), len);
    }
}

fn two_guests_talk_across_a_switch<T: Connect>() {
    let mut ports = Switch::ports(3).into_iter();
    let mut server = Guest::new(
        Card::<T>::new(ports.next().unwrap(), 1),
        Some([10, 0, 2, 1]),
    );
    let mut client = Guest::new(
        Card::<T>::new(ports.next().unwrap(), 2),
        Some([10, 0, 2, 3]),
    );
    let (mut there, mut here) = (SocketSet::new(vec![]), SocketSet::new(vec![]));
    let (listener, caller) = (there.add(tcp_socket()), here.add(tcp_socket()));
    there
        .get_mut::<tcp::Socket<'_>>(listener)
        .listen(99)
        .unwrap();
    let address = Ipv4Address::new(10, 0, 2, 1);
    here.get_mut::<tcp::Socket<'_>>(caller)
        .connect(client.interface.context(), (address, 99), 50_000)
        .unwrap();
    for _ in 0..1000 {
        client.step(&mut here);
        server.step(&mut there);
        let socket = here.get_mut::<tcp::Socket<'_>>(caller);
        if socket.can_send() && socket.send_queue() == 0 {
            socket.send_slice(b"across").unwrap();
        }
        let socket = there.get_mut::<tcp::Socket<'_>>(listener);
        if socket.can_recv() {
            let mut bytes = [0; 6];
            assert_eq!(socket.recv_slice(&mut bytes), Ok(6));
            assert_eq!(&bytes, b"across");
            return;
        }
    }
    panic!("nothing came");
}
