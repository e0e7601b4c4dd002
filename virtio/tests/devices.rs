//! Devices that move data, as far as there is no driver library for them, over both transports and both ring formats.

#[macro_use]
mod support;

use support::{Connect, MmioGuest, PciGuest, RawDriver, alloc, memory};
use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::backend::{
    EchoHost, MemoryImage, MemoryTree, NetBackend, NetHeader, Offloads, Unplugged, Wire,
};
use testudo_virtio::device::{
    Blk, BlkOptions, Console, ConsolePort, Fs, Net, NetOptions, PortOptions, Vsock,
};
use testudo_virtio::{Features, Segment};

in_all_ways! {
    blk_zeroes_discards_and_refuses
    blk_works_on_two_queues
    blk_tells_its_topology
    net_filters_as_it_is_told
    net_merges_buffers_for_long_frames
    a_queue_can_be_reset_alone
    console_ports_are_added_named_and_opened
    fs_offers_a_tree_to_read
    net_passes_only_the_offloads_that_were_agreed_on
    vsock_sends_no_more_than_there_is_room_for
}

fn request(kind: u32, sector: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes.extend_from_slice(rest);
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&sectors.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes
}

fn blk_zeroes_discards_and_refuses<T: Connect>(packed: bool) {
    let disk = Blk::new(MemoryImage(vec![0xAA; 64 << 10]), BlkOptions::default());
    let mut driver = RawDriver::<T>::new(disk, packed);
    let mut status = |bytes: Vec<u8>| driver.exchange(0, &bytes, 1).unwrap()[0];
    // Write-zeroes, with and without unmap.
    assert_eq!(status(request(13, 0, &range(2, 2, 1))), 0);
    assert_eq!(
        status(request(13, 0, &[range(8, 1, 0), range(10, 1, 0)].concat())),
        0
    );
    assert_eq!(status(request(11, 0, &range(20, 4, 0))), 0);
    // Discard has no unmap flag; unknown flags; past the end; nothing; half a range.
    assert_eq!(status(request(11, 0, &range(20, 4, 1))), 2);
    assert_eq!(status(request(13, 0, &range(0, 1, 2))), 2);
    assert_eq!(status(request(13, 0, &range(127, 2, 0))), 1);
    assert_eq!(status(request(13, 0, &range(u64::MAX / 512, 2, 0))), 1);
    assert_eq!(status(request(11, 0, &range(127, 2, 0))), 1);
    assert_eq!(status(request(11, 0, &[])), 1);
    assert_eq!(status(request(11, 0, &range(0, 1, 0)[..15])), 1);
    // A request of no known type; a write of half a sector; one past the end.
    assert_eq!(status(request(99, 0, &[])), 2);
    assert_eq!(status(request(1, 0, &[0; 100])), 1);
    assert_eq!(status(request(1, 128, &[0; 512])), 1);
    assert_eq!(status(request(1, u64::MAX, &[0; 512])), 1);
    let all = driver
        .exchange(0, &request(0, 0, &[]), 12 * 512 + 1)
        .unwrap();
    for (sector, bytes) in all[..12 * 512].chunks(512).enumerate() {
        let zero = [2, 3, 8, 10].contains(&sector);
        assert_eq!(bytes, [if zero { 0 } else { 0xAA }; 512], "sector {sector}");
    }
    assert_eq!(all.last(), Some(&0));
    assert!(!driver.needs_reset());
}

fn blk_works_on_two_queues<T: Connect>(packed: bool) {
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let disk = Blk::new(MemoryImage(vec![0; 64 << 10]), options);
    let mut driver = RawDriver::<T>::new(disk, packed);
    for i in 0..600u64 {
        let queue = (i % 2) as u16;
        let sector = i % 128;
        let data = [i as u8; 512];
        let written = driver.exchange(queue, &request(1, sector, &data), 1);
        assert_eq!(written, Some(vec![0]));
        let read = driver
            .exchange(1 - queue, &request(0, sector, &[]), 513)
            .unwrap();
        assert_eq!(&read[..512], data);
    }
}

fn blk_tells_its_topology<T: Connect>(packed: bool) {
    let options = BlkOptions {
        block_size: 2048,
        physical_block_exp: 1,
        optimal_blocks: 64,
        ..BlkOptions::default()
    };
    let disk = Blk::new(MemoryImage(vec![0; 64 << 10]), options);
    let driver = RawDriver::<T>::new(disk, packed);
    // BLK_SIZE and TOPOLOGY; their fields are at 20 to 31 (5.2.4).
    let wanted = Features::bit(6) | Features::bit(10);
    assert!(driver.features.contains(wanted));
    let word = |at| driver.guest.read_config_space::<u32>(at).unwrap();
    assert_eq!(word(20), 2048);
    // Two logical blocks to a physical one, aligned, at least one at a time, best 64.
    assert_eq!(word(24), 1 | (1 << 16));
    assert_eq!(word(28), 64);
}

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend_from_slice(&[2, 0, 0, 0, 0, 9, 0x08, 0x00]);
    bytes.resize(len, 0x5A);
    bytes
}

fn give(wire: &mut Wire, bytes: &[u8]) {
    let mut fill = |to: &mut [u8]| {
        to.copy_from_slice(bytes);
        Ok(())
    };
    wire.send(NetHeader::default(), bytes.len(), &mut fill)
        .unwrap();
}

fn net_filters_as_it_is_told<T: Connect>(packed: bool) {
    let (near, mut far) = Wire::pair(Offloads::empty());
    let options = NetOptions::default();
    let mac = options.mac;
    let mut driver = RawDriver::<T>::new(Net::new(near, options), packed);
    let buffer = |driver: &mut RawDriver<T>| {
        let gpa = alloc(2048);
        driver.offer(0, &[], &[Segment { gpa, len: 2048 }]);
        driver.guest.notify(0);
    };
    for _ in 0..8 {
        buffer(&mut driver);
    }
    let group = [0x01, 0, 0x5E, 0, 0, 1];
    let mut passes = |driver: &mut RawDriver<T>, to: [u8; 6]| {
        give(&mut far, &frame(to, 60));
        driver.guest.poll(0);
        let got = driver.take_used(0);
        if let Some((_, len)) = got {
            assert_eq!(len, 72);
            buffer(driver);
        }
        got.is_some()
    };
    let command = |driver: &mut RawDriver<T>, class: u8, number: u8, data: &[u8]| {
        let bytes = [&[class, number], data].concat();
        driver.exchange(2, &bytes, 1).unwrap() == [0]
    };
    assert!(passes(&mut driver, mac) && passes(&mut driver, [0xFF; 6]));
    assert!(!passes(&mut driver, [2, 2, 2, 2, 2, 2]) && !passes(&mut driver, group));
    // All multicast; no broadcast; promiscuous.
    assert!(command(&mut driver, 0, 1, &[1]) && passes(&mut driver, group));
    assert!(command(&mut driver, 0, 1, &[0]) && !passes(&mut driver, group));
    assert!(command(&mut driver, 0, 5, &[1]) && !passes(&mut driver, [0xFF; 6]));
    assert!(command(&mut driver, 0, 0, &[1]) && passes(&mut driver, [2, 2, 2, 2, 2, 2]));
    assert!(command(&mut driver, 0, 0, &[0]) && command(&mut driver, 0, 5, &[0]));
    // A table with one multicast address; another own address.
    let table = [&[0, 0, 0, 0][..], &[1, 0, 0, 0], &group].concat();
    assert!(command(&mut driver, 1, 0, &table) && passes(&mut driver, group));
    assert!(command(&mut driver, 1, 1, &[2, 0, 0, 0, 0, 77]));
    assert!(passes(&mut driver, [2, 0, 0, 0, 0, 77]) && !passes(&mut driver, mac));
    // A tagged frame passes when its network was added.
    let mut tagged = frame([0xFF; 6], 60);
    tagged[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
    let mut passes_tagged = |driver: &mut RawDriver<T>| {
        give(&mut far, &tagged);
        driver.guest.poll(0);
        driver.take_used(0).is_some()
    };
    assert!(!passes_tagged(&mut driver));
    assert!(command(&mut driver, 2, 0, &[5, 0]) && passes_tagged(&mut driver));
    assert!(command(&mut driver, 2, 1, &[5, 0]) && !passes_tagged(&mut driver));
    // What is too short, unknown, or was not negotiated is refused.
    for (class, number, data) in [
        (0, 0, &[][..]),
        (0, 9, &[1]),
        (1, 0, &[200, 0, 0, 0, 1]),
        (4, 0, &[2, 0]),
        (7, 0, &[]),
    ] {
        assert!(
            !command(&mut driver, class, number, data),
            "{class} {number}"
        );
    }
    assert!(!driver.needs_reset());
}

fn net_merges_buffers_for_long_frames<T: Connect>(packed: bool) {
    let (near, mut far) = Wire::pair(Offloads::empty());
    let mut driver = RawDriver::<T>::new(Net::new(near, NetOptions::default()), packed);
    let long = frame([0xFF; 6], 5000);
    give(&mut far, &long);
    let mut buffers = Vec::new();
    for i in 0..4 {
        driver.guest.notify(0);
        assert_eq!(driver.take_used(0), None, "with {i} buffers");
        // Split in two segments, the header across them.
        let gpa = alloc(1600);
        let parts = [
            Segment { gpa, len: 11 },
            Segment {
                gpa: Gpa(gpa.0 + 11),
                len: 1489,
            },
        ];
        driver.offer(0, &[], &parts);
        buffers.push(gpa);
    }
    driver.guest.notify(0);
    let mut received = Vec::new();
    for gpa in &buffers {
        let (_, len) = driver.take_used(0).unwrap();
        let mut bytes = vec![0; len as usize];
        memory().read(*gpa, &mut bytes).unwrap();
        received.extend_from_slice(&bytes);
    }
    // The header says how many buffers there are.
    assert_eq!(received[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
    assert_eq!(received[12..], long);
    // Without the feature, a frame that one buffer cannot hold is lost, the buffer is not.
    let no_merging = |offered: Features| offered - Features::bit(15);
    let (near, mut far) = Wire::pair(Offloads::empty());
    let card = Net::new(near, NetOptions::default());
    let mut driver = RawDriver::<T>::with_features(card, packed, no_merging);
    let gpa = alloc(1500);
    driver.offer(0, &[], &[Segment { gpa, len: 1500 }]);
    give(&mut far, &long);
    driver.guest.notify(0);
    assert_eq!(driver.take_used(0), None);
    give(&mut far, &frame([0xFF; 6], 100));
    driver.guest.notify(0);
    assert_eq!(driver.take_used(0).unwrap().1, 112);
}

fn a_queue_can_be_reset_alone<T: Connect>(packed: bool) {
    let options = NetOptions::default();
    let mut driver = RawDriver::<T>::new(Net::new(Unplugged, options), packed);
    let gpa = alloc(2048);
    driver.offer(0, &[], &[Segment { gpa, len: 2048 }]);
    driver.guest.notify(0);
    assert!(driver.guest.queue_used(0) && driver.guest.queue_used(1));
    driver.guest.reset_queue(0);
    assert!(!driver.guest.queue_used(0) && driver.guest.queue_used(1));
    // The other queue goes on; the one that was reset can be set up anew.
    let mut packet = vec![0; 12];
    packet.extend_from_slice(&frame([0xFF; 6], 60));
    assert_eq!(driver.exchange(1, &packet, 0), Some(vec![]));
    driver.set_up(0, packed);
    assert!(driver.guest.queue_used(0));
}

/// A port that answers each byte with the next one.
#[derive(Default)]
struct Successor(Vec<u8>);

impl ConsolePort for Successor {
    fn write(&mut self, data: &[u8]) {
        self.0.extend(data.iter().map(|b| b.wrapping_add(1)));
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.0.len());
        buf[..len].copy_from_slice(&self.0[..len]);
        self.0.drain(..len);
        len
    }
}

fn console_ports_are_added_named_and_opened<T: Connect>(packed: bool) {
    let channel = PortOptions {
        name: "org.example.agent".into(),
        console: false,
    };
    let console = Console::new(Box::new(Successor::default()))
        .with_port(channel, Box::new(Successor::default()));
    let mut driver = RawDriver::<T>::new(console, packed);
    assert_eq!(driver.guest.read_config_space::<u32>(4).unwrap(), 2);
    let mut room = Vec::new();
    for _ in 0..16 {
        let gpa = alloc(64);
        let id = driver.offer(2, &[], &[Segment { gpa, len: 64 }]);
        room.push((id, gpa));
    }
    let say = |driver: &mut RawDriver<T>, port: u32, event: u16, value: u16| {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        driver.exchange(3, &bytes, 0).unwrap();
    };
    let hear = |driver: &mut RawDriver<T>| {
        let (id, len) = driver.take_used(2)?;
        let gpa = room.iter().find(|(i, _)| *i == id).unwrap().1;
        let mut bytes = vec![0; len as usize];
        memory().read(gpa, &mut bytes).unwrap();
        Some((bytes[0], bytes[4], bytes[6], bytes[8..].to_vec()))
    };
    // DEVICE_READY brings DEVICE_ADD for each port.
    say(&mut driver, u32::MAX, 0, 1);
    assert_eq!(hear(&mut driver), Some((0, 1, 0, vec![])));
    assert_eq!(hear(&mut driver), Some((1, 1, 0, vec![])));
    // PORT_READY brings what the port is: a console with its size, or a name.
    say(&mut driver, 0, 3, 1);
    assert_eq!(hear(&mut driver), Some((0, 4, 1, vec![])));
    assert_eq!(hear(&mut driver), Some((0, 5, 0, vec![80, 0, 25, 0])));
    assert_eq!(hear(&mut driver), Some((0, 7, 1, b"console".to_vec())));
    assert_eq!(hear(&mut driver), Some((0, 6, 1, vec![])));
    say(&mut driver, 1, 3, 1);
    assert_eq!(
        hear(&mut driver),
        Some((1, 7, 1, b"org.example.agent".to_vec()))
    );
    assert_eq!(hear(&mut driver), Some((1, 6, 1, vec![])));
    // Of ports that do not exist, and of events that it does not know, the device says nothing.
    say(&mut driver, 2, 3, 1);
    say(&mut driver, 0, 77, 1);
    assert_eq!(hear(&mut driver), None);
    // Bytes come only once the guest has opened its end.
    driver.exchange(5, b"HAL", 0).unwrap();
    let gpa = alloc(64);
    driver.offer(4, &[], &[Segment { gpa, len: 64 }]);
    driver.guest.notify(4);
    assert_eq!(driver.take_used(4), None);
    say(&mut driver, 1, 6, 1);
    driver.guest.poll(0);
    assert_eq!(driver.take_used(4).map(|(_, len)| len), Some(3));
    let mut bytes = [0; 3];
    memory().read(gpa, &mut bytes).unwrap();
    assert_eq!(&bytes, b"IBM");
}

fn fs_offers_a_tree_to_read<T: Connect>(packed: bool) {
    let tree = MemoryTree::new()
        .with_file("a/b/file", vec![0x42; 10_000])
        .with_program("a/run", b"#!/bin/sh\n".to_vec())
        .with_link("a/link", "b/file")
        .with_directory("empty");
    let mut driver = RawDriver::<T>::new(Fs::new(tree, "share"), packed);
    assert_eq!(
        driver.guest.read_config_space::<[u8; 6]>(0).unwrap(),
        *b"share\0"
    );
    assert_eq!(driver.guest.read_config_space::<u32>(36).unwrap(), 1);
    let mut unique = 100u64;
    // Error and body of the answer to a request.
    let mut ask = |opcode: u32, node: u64, body: &[u8], room: u32| -> (i32, Vec<u8>) {
        unique += 1;
        let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&opcode.to_le_bytes());
        bytes.extend_from_slice(&unique.to_le_bytes());
        bytes.extend_from_slice(&node.to_le_bytes());
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(body);
        let answer = driver.exchange(1, &bytes, 16 + room).unwrap();
        let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, answer.len());
        assert_eq!(answer[8..16], unique.to_le_bytes());
        (word(4) as i32, answer[16..].to_vec())
    };
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };

    // INIT: version 7.31, and readdirplus of all flags offered.
    let mut init = Vec::new();
    for word in [7u32, 36, 131_072, u32::MAX] {
        init.extend_from_slice(&word.to_le_bytes());
    }
    let (error, out) = ask(26, 0, &init, 64);
    assert_eq!((error, out.len()), (0, 64));
    assert_eq!(number(&out), 7 | 31 << 32);
    assert_eq!(u32::from_le_bytes(out[12..16].try_into().unwrap()), 1 << 13);

    let mut look = |node: u64, name: &str| {
        let (error, out) = ask(1, node, &[name.as_bytes(), &[0]].concat(), 128);
        // The node's number, its size, and its mode.
        (error == 0).then(|| (number(&out), number(&out[48..]), out[100], out[101]))
    };
    let (a, ..) = look(1, "a").unwrap();
    let (b, ..) = look(a, "b").unwrap();
    let (file, size, ..) = look(b, "file").unwrap();
    assert_eq!(size, 10_000);
    let (run, _, low, high) = look(a, "run").unwrap();
    assert_eq!(u16::from_le_bytes([low, high]), 0o100_555);
    let (link, ..) = look(a, "link").unwrap();
    assert_eq!(
        (look(1, "none"), look(file, "x"), look(999, "a")),
        (None, None, None)
    );

    assert_eq!(ask(5, link, &[], 100), (0, b"b/file".to_vec()));
    assert_eq!(ask(14, file, &[0; 8], 16).0, 0);
    let (_, bytes) = ask(15, file, &words(&[0, 9_990, 4096, 0, 0]), 4096);
    assert_eq!(bytes, [0x42; 10]);
    let (_, bytes) = ask(15, file, &words(&[0, 100, 4096, 0, 0]), 4096);
    assert_eq!(bytes, [0x42; 4096]);
    assert_eq!(
        ask(15, file, &words(&[0, u64::MAX, 4096, 0, 0]), 4096),
        (0, vec![])
    );
    // Directories, plain and with attributes; from a place; with too little room.
    let (_, list) = ask(28, a, &words(&[0, 0, 4096, 0, 0]), 4096);
    let entry = |bytes: &[u8]| {
        let len = bytes[16] as usize;
        let name = String::from_utf8(bytes[24..24 + len].to_vec()).unwrap();
        (
            name,
            number(bytes),
            number(&bytes[8..]),
            (24 + len).next_multiple_of(8),
        )
    };
    let mut names = Vec::new();
    let mut at = 0;
    while at < list.len() {
        let (name, node, next, len) = entry(&list[at..]);
        names.push((name, node, next));
        at += len;
    }
    let named = |name: &str, node: u64, next: u64| (name.to_string(), node, next);
    let expected = [
        named(".", a, 1),
        named("..", 1, 2),
        named("b", b, 3),
        named("run", run, 4),
        named("link", link, 5),
    ];
    assert_eq!(names, expected);
    let (_, list) = ask(28, a, &words(&[0, 3, 40, 0, 0]), 4096);
    assert_eq!((list.len(), entry(&list).0), (32, "run".to_string()));
    let (_, list) = ask(44, a, &words(&[0, 2, 4096, 0, 0]), 4096);
    assert_eq!((number(&list), entry(&list[128..]).0), (b, "b".to_string()));
    assert_eq!(
        ask(28, a, &words(&[0, u64::MAX, 4096, 0, 0]), 4096),
        (0, vec![])
    );
    // What would change something is refused, what is unknown too, and what is no directory.
    assert_eq!(ask(16, file, &[0; 40], 8).0, -30);
    assert_eq!(ask(9, a, b"new\0", 128).0, -30);
    assert_eq!(ask(14, file, &[1, 0, 0, 0], 16).0, -30);
    assert_eq!(ask(34, file, &[1, 0, 0, 0], 0).0, -13);
    assert_eq!(ask(34, run, &[1, 0, 0, 0], 0).0, 0);
    assert_eq!(ask(22, file, &[0; 8], 8).0, -38);
    assert_eq!(ask(27, file, &[0; 8], 16).0, -20);
    assert_eq!(ask(14, a, &[0; 8], 16).0, -21);
    assert_eq!(ask(1, a, b"no zero", 128).0, -22);
    assert_eq!(ask(3, file, &[0; 16], 50).0, -22);
    // FORGET has no answer at all.
    let mut forget = vec![48, 0, 0, 0, 2, 0, 0, 0];
    forget.extend_from_slice(&[0; 40]);
    assert_eq!(driver.exchange(0, &forget, 0), Some(vec![]));
    assert!(!driver.needs_reset());
}

fn net_passes_only_the_offloads_that_were_agreed_on<T: Connect>(packed: bool) {
    let open = NetHeader {
        flags: NetHeader::NEEDS_CSUM | NetHeader::DATA_VALID,
        csum_start: 14,
        csum_offset: 16,
        ..NetHeader::default()
    };
    let split = NetHeader {
        gso_type: NetHeader::GSO_TCPV4,
        gso_size: 1000,
        ..open
    };
    let (checksum, no_tso) = (Features::bit(0), Features::bit(11));
    for (without, passes) in [
        (Features::empty(), [true, true]),
        (no_tso, [true, false]),
        (checksum, [false, false]),
    ] {
        let (near, mut far) = Wire::pair(Offloads::CHECKSUM | Offloads::TSO4);
        let card = Net::new(near, NetOptions::default());
        let choose = |offered: Features| offered - without;
        let mut driver = RawDriver::<T>::with_features(card, packed, choose);
        for (header, passes) in [open, split].into_iter().zip(passes) {
            let mut packet = header.to_bytes().to_vec();
            packet.extend_from_slice(&[0, 0]);
            packet.extend_from_slice(&frame([0xFF; 6], 2000));
            assert_eq!(driver.exchange(1, &packet, 0), Some(vec![]));
            // The driver's word that a checksum is right is not passed on.
            let seen = far.peek().map(|(header, frame)| (header, frame.len()));
            let expected = NetHeader {
                flags: NetHeader::NEEDS_CSUM,
                ..header
            };
            assert_eq!(seen, passes.then_some((expected, 2000)));
            far.consume();
        }
    }
    // The other way: what the driver does not take is not given to it.
    let (near, mut far) = Wire::pair(Offloads::CHECKSUM | Offloads::TSO4);
    let card = Net::new(near, NetOptions::default());
    let choose = |offered: Features| offered - Features::bit(1) - Features::bit(7);
    let mut driver = RawDriver::<T>::with_features(card, packed, choose);
    let gpa = alloc(4096);
    driver.offer(0, &[], &[Segment { gpa, len: 4096 }]);
    let verified = NetHeader {
        flags: NetHeader::DATA_VALID,
        ..NetHeader::default()
    };
    for header in [open, split, verified] {
        let mut fill = |to: &mut [u8]| {
            to.fill(0xFF);
            Ok(())
        };
        far.send(header, 100, &mut fill).unwrap();
    }
    driver.guest.poll(0);
    assert_eq!(driver.take_used(0).map(|(_, len)| len), Some(112));
    assert_eq!(driver.take_used(0), None);
    let mut header = [0xAA; 12];
    memory().read(gpa, &mut header).unwrap();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

fn vsock_sends_no_more_than_there_is_room_for<T: Connect>(packed: bool) {
    let mut driver = RawDriver::<T>::new(Vsock::new(EchoHost { port: 7 }, 3), packed);
    let mut room = Vec::new();
    for _ in 0..16 {
        let gpa = alloc(4096);
        room.push((driver.offer(0, &[], &[Segment { gpa, len: 4096 }]), gpa));
    }
    // A packet from port 1000 of the guest to port 7 of the host; the guest's buffer has 100 bytes.
    let say = |driver: &mut RawDriver<T>, op: u16, forwarded: u32, data: &[u8]| {
        let mut bytes = [3u64, 2]
            .iter()
            .flat_map(|cid| cid.to_le_bytes())
            .collect::<Vec<_>>();
        for word in [
            1000,
            7,
            data.len() as u32,
            1 | u32::from(op) << 16,
            0,
            100,
            forwarded,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(data);
        driver.exchange(1, &bytes, 0).unwrap();
    };
    // The operation and the length of each packet that came.
    let hear = |driver: &mut RawDriver<T>| {
        driver.guest.poll(0);
        let mut heard = Vec::new();
        while let Some((id, len)) = driver.take_used(0) {
            let gpa = room.iter().find(|(i, _)| *i == id).unwrap().1;
            let mut bytes = vec![0; len as usize];
            memory().read(gpa, &mut bytes).unwrap();
            assert_eq!(bytes[24..28], (len - 44).to_le_bytes());
            heard.push((bytes[30], len - 44));
        }
        heard
    };
    const RESPONSE: u8 = 2;
    const RST: u8 = 3;
    const RW: u8 = 5;
    say(&mut driver, 1, 0, &[]);
    assert_eq!(hear(&mut driver), [(RESPONSE, 0)]);
    say(&mut driver, 5, 0, &[7; 300]);
    assert_eq!(hear(&mut driver), [(RW, 100)]);
    assert_eq!(hear(&mut driver), []);
    // The guest has passed 60 bytes on; then more than it was sent, which makes no room either.
    say(&mut driver, 6, 60, &[]);
    assert_eq!(hear(&mut driver), [(RW, 60)]);
    say(&mut driver, 6, 161, &[]);
    assert_eq!(hear(&mut driver), []);
    say(&mut driver, 6, 160, &[]);
    assert_eq!(hear(&mut driver), [(RW, 100)]);
    // A packet that claims more than it holds ends the connection.
    let mut lie = vec![0; 44];
    lie[0] = 3;
    lie[8] = 2;
    lie[16..20].copy_from_slice(&1000u32.to_le_bytes());
    lie[20] = 7;
    lie[24..28].copy_from_slice(&5000u32.to_le_bytes());
    (lie[28], lie[30]) = (1, 5);
    driver.exchange(1, &lie, 0).unwrap();
    assert_eq!(hear(&mut driver), [(RST, 0)]);
    say(&mut driver, 5, 0, b"gone");
    assert_eq!(hear(&mut driver), [(RST, 0)]);
}
