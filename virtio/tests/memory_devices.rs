//! Devices that are about the guest's memory, over both transports and both ring formats.

#[macro_use]
mod support;

use std::sync::{Arc, Mutex};

use support::{Connect, MmioGuest, PciGuest, RAM_BASE, RAM_SIZE, RawDriver, alloc, memory};
use testudo_arch::{Gpa, GuestMemory};
use testudo_virtio::device::{
    Balloon, BalloonBackend, Iommu, IommuMemory, IommuState, Mem, MemBackend, MemOptions, Pmem,
    Stat,
};
use testudo_virtio::queue::{ActivateError, Bounds, QueueConfig};
use testudo_virtio::{Features, Segment};

in_all_ways! {
    pmem_flushes
    balloon_moves_whole_ranges
    balloon_asks_for_statistics
    balloon_takes_hints_of_its_round_only
    mem_plugs_within_what_was_asked
    iommu_maps_translates_and_reports
    a_queue_may_end_with_the_address_space
}

fn pmem_flushes<T: Connect>(packed: bool) {
    let flushes = Arc::new(Mutex::new(0));
    let counter = flushes.clone();
    let backend = move || {
        let mut count = counter.lock().unwrap();
        *count += 1;
        *count < 3
    };
    let mut driver = RawDriver::<T>::new(Pmem::new(backend, Gpa(1 << 32), 1 << 30), packed);
    let start: u32 = driver.guest.read_config_space(4).unwrap();
    let size: u32 = driver.guest.read_config_space(8).unwrap();
    assert_eq!((start, size), (1, 1 << 30));
    assert_eq!(driver.exchange(0, &[0; 4], 4), Some(vec![0; 4]));
    assert_eq!(driver.exchange(0, &[9, 0, 0, 0], 4), Some(vec![0xFF; 4]));
    assert_eq!(*flushes.lock().unwrap(), 1);
    assert_eq!(driver.exchange(0, &[0; 4], 4), Some(vec![0; 4]));
    assert_eq!(driver.exchange(0, &[0; 4], 4), Some(vec![0xFF; 4]));
}

/// What was asked of a backend: the call, address, length.
type Call = (&'static str, u64, u64);

#[derive(Clone, Debug, Default)]
struct Pages(Arc<Mutex<Vec<Call>>>);

impl Pages {
    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn add(&self, what: &'static str, gpa: Gpa, len: u64) {
        self.0.lock().unwrap().push((what, gpa.0, len));
    }
}

impl BalloonBackend for Pages {
    fn reclaim(&mut self, gpa: Gpa, len: u64) {
        self.add("reclaim", gpa, len);
    }
    fn restore(&mut self, gpa: Gpa, len: u64) {
        self.add("restore", gpa, len);
    }
    fn report_free(&mut self, gpa: Gpa, len: u64) {
        self.add("free", gpa, len);
    }
    fn hint_free(&mut self, gpa: Gpa, len: u64) {
        self.add("hint", gpa, len);
    }
}

fn pages(numbers: &[u64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|&n| (n as u32).to_le_bytes())
        .collect()
}

fn balloon_moves_whole_ranges<T: Connect>(packed: bool) {
    let backend = Pages::default();
    let (balloon, control) = Balloon::new(backend.clone());
    let mut driver = RawDriver::<T>::new(balloon, packed);
    control.set_target(3 << 12);
    let before = driver.guest.read_config_generation();
    driver.guest.poll(0);
    assert_ne!(driver.guest.read_config_generation(), before);
    assert_eq!(driver.guest.read_config_space::<u32>(0).unwrap(), 3);

    let first = RAM_BASE >> 12;
    // Two neighbours, one apart, and three that are not memory.
    let outside = [0, (RAM_BASE + RAM_SIZE) >> 12, 0xFFFF_FFFF];
    let list = [&[first + 1, first + 2, first + 9][..], &outside].concat();
    driver.exchange(0, &pages(&list), 0).unwrap();
    let at = |n: u64| (first + n) << 12;
    assert_eq!(
        backend.take(),
        [("reclaim", at(1), 0x2000), ("reclaim", at(9), 0x1000)]
    );
    driver.guest.write_config_space(4, 3u32).unwrap();
    assert_eq!(control.actual(), 3 << 12);
    driver.exchange(1, &pages(&[first + 9]), 0).unwrap();
    assert_eq!(backend.take(), [("restore", at(9), 0x1000)]);
    // Reports: only whole pages count.
    let parts = [
        Segment {
            gpa: Gpa(at(3) + 1),
            len: 0x1FFF,
        },
        Segment {
            gpa: Gpa(at(6)),
            len: 0x3001,
        },
        Segment {
            gpa: Gpa(0x1000),
            len: 0x1000,
        },
    ];
    driver.offer(4, &[], &parts);
    driver.guest.notify(4);
    assert!(driver.take_used(4).is_some());
    assert_eq!(
        backend.take(),
        [("free", at(4), 0x1000), ("free", at(6), 0x3000)]
    );
}

fn balloon_asks_for_statistics<T: Connect>(packed: bool) {
    let (balloon, control) = Balloon::new(Pages::default());
    let mut driver = RawDriver::<T>::new(balloon, packed);
    let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let gpa = alloc(4096);
    memory().write(gpa, &stat(4, 1000)).unwrap();
    driver.offer(2, &[Segment { gpa, len: 10 }], &[]);
    driver.guest.notify(2);
    assert_eq!(
        control.stats(),
        [Stat {
            tag: 4,
            value: 1000
        }]
    );
    // The buffer stays with the device until new ones are wanted.
    driver.guest.poll(0);
    assert_eq!(driver.take_used(2), None);
    control.request_stats();
    driver.guest.poll(1);
    assert!(driver.take_used(2).is_some());
    memory()
        .write(gpa, &[stat(4, 900), stat(5, 4096)].concat())
        .unwrap();
    driver.offer(2, &[Segment { gpa, len: 20 }], &[]);
    driver.guest.notify(2);
    assert_eq!(
        control.stats()[1],
        Stat {
            tag: 5,
            value: 4096
        }
    );
}

fn balloon_takes_hints_of_its_round_only<T: Connect>(packed: bool) {
    let backend = Pages::default();
    let (balloon, control) = Balloon::new(backend.clone());
    let mut driver = RawDriver::<T>::new(balloon, packed);
    control.start_hinting();
    driver.guest.poll(0);
    let round: u32 = driver.guest.read_config_space(8).unwrap();
    assert!(round >= 2);
    let hint = |driver: &mut RawDriver<T>| {
        let gpa = Gpa(RAM_BASE + 0x10_0000);
        driver.offer(3, &[], &[Segment { gpa, len: 0x4000 }]);
        driver.guest.notify(3);
        assert!(driver.take_used(3).is_some());
    };
    hint(&mut driver);
    driver.exchange(3, &(round + 1).to_le_bytes(), 0).unwrap();
    hint(&mut driver);
    assert_eq!(backend.take(), []);
    driver.exchange(3, &round.to_le_bytes(), 0).unwrap();
    hint(&mut driver);
    assert_eq!(backend.take(), [("hint", RAM_BASE + 0x10_0000, 0x4000)]);
    assert!(!control.hinting_done());
    driver.exchange(3, &0u32.to_le_bytes(), 0).unwrap();
    assert!(control.hinting_done());
    driver.guest.poll(1);
    assert_eq!(driver.guest.read_config_space::<u32>(8).unwrap(), 1);
}

impl MemBackend for Pages {
    fn plug(&mut self, gpa: Gpa, len: u64) -> bool {
        self.add("plug", gpa, len);
        true
    }
    fn unplug(&mut self, gpa: Gpa, len: u64) -> bool {
        self.add("unplug", gpa, len);
        true
    }
}

fn mem_plugs_within_what_was_asked<T: Connect>(packed: bool) {
    let backend = Pages::default();
    let options = MemOptions {
        start: Gpa(1 << 32),
        size: 64 << 20,
        block: 2 << 20,
    };
    let (device, control) = Mem::new(backend.clone(), options).unwrap();
    let mut driver = RawDriver::<T>::new(device, packed);
    let mut ask = |kind: u16, block: u64, count: u16| {
        let gpa = (1u64 << 32).wrapping_add(block << 21);
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&gpa.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        let answer = driver.exchange(0, &bytes, 10).unwrap();
        (answer[0], answer[8])
    };
    const ACK: (u8, u8) = (0, 0);
    const NACK: (u8, u8) = (1, 0);
    const ERROR: (u8, u8) = (3, 0);
    assert_eq!(ask(0, 0, 1), NACK);
    control.request(8 << 20);
    assert_eq!(ask(0, 1, 3), ACK);
    assert_eq!(
        (ask(0, 1, 1), ask(0, 8, 2), ask(0, 8, 1)),
        (ERROR, NACK, ACK)
    );
    assert_eq!(control.plugged(), 8 << 20);
    assert_eq!(
        (ask(3, 1, 3), ask(3, 4, 4), ask(3, 0, 3)),
        ((0, 0), (0, 1), (0, 2))
    );
    // Outside, nothing, unplugging what is not plugged, unknown.
    assert_eq!(
        (ask(0, 32, 1), ask(0, 31, 2), ask(0, 0, 0)),
        (ERROR, ERROR, ERROR)
    );
    assert_eq!(
        (ask(0, u64::MAX >> 21, 1), ask(1, 3, 2), ask(7, 0, 1)),
        (ERROR, ERROR, ERROR)
    );
    assert_eq!(ask(1, 2, 1), ACK);
    assert_eq!(ask(2, 0, 0), ACK);
    assert_eq!(control.plugged(), 0);
    let at = |block: u64| (1 << 32) + (block << 21);
    let expected = [
        ("plug", at(1), 6 << 20),
        ("plug", at(8), 2 << 20),
        ("unplug", at(2), 2 << 20),
        ("unplug", at(1), 2 << 20),
        ("unplug", at(3), 2 << 20),
        ("unplug", at(8), 2 << 20),
    ];
    assert_eq!(backend.take(), expected);
}

/// Linux gives devices behind an IOMMU the last pages of 64 bits first.
fn a_queue_may_end_with_the_address_space<T: Connect>(packed: bool) {
    const LAST_PAGE: u64 = !0xFFF;
    const RINGS: u64 = 0x4000;
    let state = IommuState::new([8]);
    let mut driver = RawDriver::<T>::new(Iommu::new(state.clone()), packed);
    let (last, rings) = (alloc(0x1000), alloc(0x2000));
    let mut ask = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        driver.exchange(0, &bytes, 4).unwrap()[0]
    };
    let long = |value: u64| [value as u32, (value >> 32) as u32];
    let map =
        |start: u64, end: u64, to: u64| [[3, 1], long(start), long(end), long(to), [3, 0]].concat();
    assert_eq!(ask(&[1, 1, 8, 0, 0]), 0);
    assert_eq!(ask(&map(LAST_PAGE, u64::MAX, last.0)[..9]), 0);
    assert_eq!(ask(&map(RINGS, RINGS + 0x1FFF, rings.0)[..9]), 0);
    let memory = IommuMemory::new(memory(), state, 8);
    let mut config = QueueConfig::new(256);
    config.descriptors = Gpa(LAST_PAGE);
    (config.driver, config.device) = (Gpa(RINGS), Gpa(RINGS + 0x1000));
    let features = Features::VERSION_1;
    let bounds = Bounds::for_queue(256);
    let mut queue = config.activate(features, bounds, &memory).unwrap();
    // A buffer that is the last descriptor, which nothing else uses.
    memory.store_u64(Gpa(LAST_PAGE), u64::MAX - 15).unwrap();
    memory.store_u64(Gpa(LAST_PAGE + 8), 16).unwrap();
    memory.store_u64(Gpa(u64::MAX - 15), 0x1234).unwrap();
    memory.store_u16(Gpa(RINGS + 2), 1).unwrap();
    let chain = queue.pop(&memory).unwrap().unwrap();
    let word: [u8; 8] = chain.reader(&memory).read_value().unwrap();
    assert_eq!(u64::from_le_bytes(word), 0x1234);
    // One byte more, and it is none.
    config.size = 255;
    config.descriptors = Gpa(LAST_PAGE + 32);
    let refused = config.activate(features | Features::RING_PACKED, bounds, &memory);
    assert!(matches!(refused, Err(ActivateError::NotMemory { .. })));
}

fn iommu_maps_translates_and_reports<T: Connect>(packed: bool) {
    let state = IommuState::new([8, 9]);
    let mut driver = RawDriver::<T>::new(Iommu::new(state.clone()), packed);
    let device = IommuMemory::new(memory(), state.clone(), 8);
    let words = |kind: u32, words: &[u64]| -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        bytes
    };
    // Two 32-bit values as one word.
    let two = |a: u64, b: u64| a | (b << 32);
    let mut ask = |bytes: Vec<u8>| driver.exchange(0, &bytes, 4).unwrap()[0];
    let map = |domain: u32, start: u64, end: u64, to: u64, flags: u32| {
        let mut bytes = words(3, &[]);
        bytes.extend_from_slice(&domain.to_le_bytes());
        bytes.extend([start, end, to].iter().flat_map(|w| w.to_le_bytes()));
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes
    };
    let unmap = |domain: u32, start: u64, end: u64| {
        let mut bytes = words(4, &[]);
        bytes.extend_from_slice(&domain.to_le_bytes());
        bytes.extend([start, end].iter().flat_map(|w| w.to_le_bytes()));
        bytes.extend_from_slice(&[0; 4]);
        bytes
    };
    // Until the driver attaches an endpoint, it passes.
    device.write(Gpa(RAM_BASE + 0x10_0000), b"direct").unwrap();
    assert_eq!(ask(words(1, &[two(1, 8), 0])), 0);
    assert_eq!(ask(words(1, &[two(1, 77), 0])), 6);
    assert!(device.load_u32(Gpa(RAM_BASE + 0x10_0000)).is_err());
    let to = RAM_BASE + 0x10_0000;
    assert_eq!(ask(map(1, 0x4000, 0x4FFF, to, 1)), 0);
    assert_eq!(ask(map(1, 0x5000, 0x6FFF, to + 0x8000, 3)), 0);
    let mut bytes = [0; 6];
    device.read(Gpa(0x4000), &mut bytes).unwrap();
    assert_eq!(&bytes, b"direct");
    // Across both mappings; not writable in the first: nothing is written.
    assert!(device.contains(Gpa(0x4FFC), 8) && !device.contains(Gpa(0x6FFC), 8));
    assert!(device.write(Gpa(0x4FFC), &[1; 8]).is_err());
    assert_eq!(memory().load_u32(Gpa(to + 0x8000)), Ok(0));
    device.write(Gpa(0x5FFC), &[7; 8]).unwrap();
    assert_eq!(
        memory().load_u64(Gpa(to + 0x8FFC)).map_err(|e| e.len),
        Err(8)
    );
    assert_eq!(memory().load_u32(Gpa(to + 0x9000)), Ok(0x0707_0707));
    // Overlap, misalignment, no domain, unknown flags, the wrong way round.
    assert_eq!(ask(map(1, 0x3000, 0x4FFF, to, 1)), 4);
    assert_eq!(ask(map(1, 0x6000, 0x6FFF, to, 1)), 4);
    assert_eq!(ask(map(1, 0x8001, 0x8FFF, to, 1)), 5);
    assert_eq!(ask(map(1, 0x8000, 0x8FFF, !0xFFF, 1)), 0);
    assert_eq!(ask(map(1, 0x9000, 0xAFFF, !0xFFF, 1)), 5);
    assert_eq!(ask(map(5, 0x8000, 0x8FFF, to, 1)), 6);
    assert_eq!(ask(map(1, 0xA000, 0xAFFF, to, 0x80)), 4);
    assert_eq!(ask(map(1, 0xAFFF, 0xA000, to, 1)), 4);
    // A mapping goes whole or not at all.
    assert_eq!(ask(unmap(1, 0x5000, 0x5FFF)), 5);
    assert_eq!(ask(unmap(1, 0x6000, 0x6FFF)), 5);
    assert_eq!(ask(unmap(1, 0x0, u64::MAX)), 0);
    assert!(device.load_u32(Gpa(0x5000)).is_err());
    // Probing says where interrupt messages go.
    let mut probe = words(5, &[]);
    probe.extend_from_slice(&8u32.to_le_bytes());
    probe.extend_from_slice(&[0; 64]);
    let answer = driver.exchange(0, &probe, 512 + 4).unwrap();
    assert_eq!(
        (answer[0], answer[8..12].to_vec()),
        (1, vec![0, 0, 0xE0, 0xFE])
    );
    assert_eq!(answer[512], 0);
    // The faults so far, the oldest first: a read at an address that was not mapped.
    let gpa = alloc(64);
    driver.offer(1, &[], &[Segment { gpa, len: 24 }]);
    driver.guest.poll(0);
    assert_eq!(driver.take_used(1).map(|(_, len)| len), Some(24));
    let mut fault = [0; 24];
    memory().read(gpa, &mut fault).unwrap();
    assert_eq!((fault[0], fault[4], fault[5], fault[8]), (2, 1, 1, 8));
    assert_eq!(fault[16..], (RAM_BASE + 0x10_0000).to_le_bytes());
    // Detached, and no longer in any domain: with bypass off, nothing passes.
    assert_eq!(
        driver.exchange(0, &words(2, &[two(1, 8), 0]), 4).unwrap()[0],
        0
    );
    assert!(device.load_u32(Gpa(RAM_BASE)).is_ok());
    driver.guest.write_config_space(36, 0u8).unwrap();
    assert!(device.load_u32(Gpa(RAM_BASE)).is_err());
}
