//! Our devices under the drivers of the crate `virtio-drivers`, through the registers of both
//! transports, without a VM.

mod support;

use std::sync::{Arc, Mutex};

use support::{Connect, GSI, GuestHal, MmioGuest, PciGuest};
use testudo_virtio::backend::{
    EchoHost, MemoryImage, Overlay, ReadOnlyImage, VsockConnect, VsockHost, VsockStream,
};
use testudo_virtio::device::{Blk, BlkOptions, Console, ConsolePort, Rng, Vsock};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    DisconnectReason, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};

/// Each test, once for each transport.
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
    blk_reads_writes_flushes_and_identifies
    a_read_only_disk_refuses_to_write
    an_interrupt_line_stays_up_until_it_is_acknowledged
    console_carries_bytes_both_ways
    rng_fills_what_it_is_asked_for
    vsock_echoes_with_credit
    vsock_refuses_and_closes
    vsock_connects_into_the_guest
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn blk_reads_writes_flushes_and_identifies<T: Connect>() {
    let image = pattern(1 << 20);
    let options = BlkOptions {
        id: *b"a disk of some name\0",
        ..BlkOptions::default()
    };
    let device = Blk::new(Overlay::new(ReadOnlyImage(image.clone()), 1 << 20), options);
    let mut disk = VirtIOBlk::<GuestHal, _>::new(T::connect(device)).unwrap();
    assert_eq!(disk.capacity(), 2048);
    assert!(!disk.readonly());
    let mut id = [0; 20];
    assert_eq!(disk.device_id(&mut id).unwrap(), 19);
    assert_eq!(&id, b"a disk of some name\0");
    let mut all = vec![0; 1 << 20];
    for (i, chunk) in all.chunks_mut(64 << 10).enumerate() {
        disk.read_blocks(i * 128, chunk).unwrap();
    }
    assert_eq!(all, image);
    let data = pattern(4096 + 512);
    disk.write_blocks(2047 - 8, &data).unwrap();
    disk.flush().unwrap();
    let mut back = vec![0; 4096 + 512];
    disk.read_blocks(2047 - 8, &mut back).unwrap();
    assert_eq!(back, data);
    // One sector past the end: an error for the driver, and the device goes on.
    assert!(disk.read_blocks(2047, &mut [0; 1024]).is_err());
    disk.read_blocks(0, &mut back).unwrap();
    assert_eq!(back, image[..back.len()]);
}

fn a_read_only_disk_refuses_to_write<T: Connect>() {
    let device = Blk::new(ReadOnlyImage(pattern(4096)), BlkOptions::default());
    let mut disk = VirtIOBlk::<GuestHal, _>::new(T::connect(device)).unwrap();
    assert!(disk.readonly());
    assert!(disk.write_blocks(0, &[1; 512]).is_err());
    let mut back = [0; 512];
    disk.read_blocks(0, &mut back).unwrap();
    assert_eq!(back[..], pattern(512));
}

fn an_interrupt_line_stays_up_until_it_is_acknowledged<T: Connect>() {
    let device = Blk::new(MemoryImage(pattern(4096)), BlkOptions::default());
    let guest = T::connect(device);
    let mut disk = VirtIOBlk::<GuestHal, _>::new(guest.clone()).unwrap();
    assert!(!guest.interrupts().level(GSI));
    disk.read_blocks(0, &mut [0; 512]).unwrap();
    assert!(guest.interrupts().level(GSI));
    assert!(!disk.ack_interrupt().is_empty());
    assert!(!guest.interrupts().level(GSI));
    assert_eq!(guest.interrupts().count(GSI), 1);
}

#[derive(Clone, Default)]
struct Pipe {
    from_guest: Arc<Mutex<Vec<u8>>>,
    to_guest: Arc<Mutex<Vec<u8>>>,
}

impl ConsolePort for Pipe {
    fn write(&mut self, data: &[u8]) {
        self.from_guest.lock().unwrap().extend_from_slice(data);
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut input = self.to_guest.lock().unwrap();
        let len = input.len().min(buf.len());
        buf[..len].copy_from_slice(&input[..len]);
        input.drain(..len);
        len
    }
}

fn console_carries_bytes_both_ways<T: Connect>() {
    let pipe = Pipe::default();
    let guest = T::connect(Console::new(Box::new(pipe.clone())));
    let mut console = VirtIOConsole::<GuestHal, _>::new(guest.clone()).unwrap();
    let size = console.size().unwrap().unwrap();
    assert_eq!((size.columns, size.rows), (80, 25));
    console.send_bytes(b"hello ").unwrap();
    console.send(b'w').unwrap();
    assert_eq!(&*pipe.from_guest.lock().unwrap(), b"hello w");
    console.emergency_write(b'!').unwrap();
    assert_eq!(pipe.from_guest.lock().unwrap().last(), Some(&b'!'));
    let input = pattern(10_000);
    pipe.to_guest.lock().unwrap().extend_from_slice(&input);
    let mut received = Vec::new();
    while received.len() < input.len() {
        guest.poll(0);
        let _ = console.ack_interrupt().unwrap();
        while let Some(byte) = console.recv(true).unwrap() {
            received.push(byte);
        }
    }
    assert_eq!(received, input);
}

fn rng_fills_what_it_is_asked_for<T: Connect>() {
    let mut next = 0u8;
    let source = move |buf: &mut [u8]| {
        for byte in buf.iter_mut() {
            next = next.wrapping_add(1);
            *byte = next;
        }
        buf.len()
    };
    let mut rng = VirtIORng::<GuestHal, _>::new(T::connect(Rng::new(source))).unwrap();
    let mut bytes = [0; 1000];
    assert_eq!(rng.request_entropy(&mut bytes).unwrap(), 1000);
    assert!(bytes.iter().enumerate().all(|(i, &b)| b == (i + 1) as u8));
    assert_eq!(rng.request_entropy(&mut [0; 16]).unwrap(), 16);
}

const HOST_ECHO: VsockAddr = VsockAddr { cid: 2, port: 7 };

fn vsock_echoes_with_credit<T: Connect>() {
    let guest = T::connect(Vsock::new(EchoHost { port: 7 }, 3));
    let driver = VirtIOSocket::<GuestHal, _>::new(guest.clone()).unwrap();
    let mut sockets = VsockConnectionManager::new(driver);
    assert_eq!(sockets.guest_cid(), 3);
    sockets.connect(HOST_ECHO, 1000).unwrap();
    let connected = sockets.poll().unwrap().unwrap();
    assert_eq!(connected.event_type, VsockEventType::Connected);
    let data = pattern(300_000);
    let (mut sent, mut received) = (0, Vec::new());
    for _ in 0..10_000 {
        // The driver refuses what the host has no room for.
        let part = &data[sent..data.len().min(sent + 700)];
        if !part.is_empty() && sockets.send(HOST_ECHO, 1000, part).is_ok() {
            sent += part.len();
        }
        guest.poll(0);
        while let Some(event) = sockets.poll().unwrap() {
            let ours = matches!(
                event.event_type,
                VsockEventType::Received { .. } | VsockEventType::CreditUpdate
            );
            assert!(ours, "{event:?}");
        }
        let mut bytes = [0; 2048];
        let len = sockets.recv(HOST_ECHO, 1000, &mut bytes).unwrap();
        received.extend_from_slice(&bytes[..len]);
        sockets.update_credit(HOST_ECHO, 1000).unwrap();
        if received.len() == data.len() {
            break;
        }
    }
    assert_eq!(received, data);
}

fn vsock_refuses_and_closes<T: Connect>() {
    let guest = T::connect(Vsock::new(EchoHost { port: 7 }, 3));
    let driver = VirtIOSocket::<GuestHal, _>::new(guest.clone()).unwrap();
    let mut sockets = VsockConnectionManager::new(driver);
    let nobody = VsockAddr { cid: 2, port: 8 };
    sockets.connect(nobody, 1000).unwrap();
    let reset = VsockEventType::Disconnected {
        reason: DisconnectReason::Reset,
    };
    assert_eq!(sockets.poll().unwrap().unwrap().event_type, reset);
    sockets.connect(HOST_ECHO, 1001).unwrap();
    assert_eq!(
        sockets.poll().unwrap().unwrap().event_type,
        VsockEventType::Connected
    );
    sockets.shutdown(HOST_ECHO, 1001).unwrap();
    assert_eq!(sockets.poll().unwrap().unwrap().event_type, reset);
    // The ports are free again.
    sockets.connect(HOST_ECHO, 1001).unwrap();
    assert_eq!(
        sockets.poll().unwrap().unwrap().event_type,
        VsockEventType::Connected
    );
    sockets.force_close(HOST_ECHO, 1001).unwrap();
    guest.poll(0);
    assert_eq!(sockets.poll().unwrap(), None);
}

/// A host that calls the guest once, says a word and hangs up.
struct Caller(bool);

struct Word(&'static [u8]);

impl VsockHost for Caller {
    fn accept(&mut self, _: u32, _: u32) -> Option<Box<dyn VsockStream>> {
        None
    }

    fn connect(&mut self) -> Option<VsockConnect> {
        let first = !std::mem::replace(&mut self.0, true);
        first.then(|| VsockConnect {
            host_port: 5000,
            guest_port: 22,
            stream: Box::new(Word(b"knock knock")),
        })
    }
}

impl VsockStream for Word {
    fn write(&mut self, data: &[u8]) -> usize {
        data.len()
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.0.len());
        buf[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        len
    }

    fn finished(&self) -> bool {
        self.0.is_empty()
    }
}

fn vsock_connects_into_the_guest<T: Connect>() {
    let guest = T::connect(Vsock::new(Caller(false), 3));
    let driver = VirtIOSocket::<GuestHal, _>::new(guest.clone()).unwrap();
    let mut sockets = VsockConnectionManager::new(driver);
    sockets.listen(22);
    let host = VsockAddr { cid: 2, port: 5000 };
    let mut events = Vec::new();
    for _ in 0..10 {
        guest.poll(0);
        while let Some(event) = sockets.poll().unwrap() {
            assert_eq!((event.source, event.destination.port), (host, 22));
            events.push(event.event_type);
        }
    }
    let hung_up = VsockEventType::Disconnected {
        reason: DisconnectReason::Shutdown,
    };
    let word = VsockEventType::Received { length: 11 };
    assert_eq!(events, [VsockEventType::ConnectionRequest, word, hung_up]);
    let mut bytes = [0; 11];
    assert_eq!(sockets.recv(host, 22, &mut bytes).unwrap(), 11);
    assert_eq!(&bytes, b"knock knock");
}
