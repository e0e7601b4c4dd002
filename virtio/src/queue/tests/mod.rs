//! Queues of both formats against a well-behaved driver, a model, and drivers that break rules.

mod hostile;
mod model;
mod near;

use std::boxed::Box;
use std::vec;
use std::vec::Vec;

use testudo_arch::memory::GuestRam;
use testudo_arch::{Gpa, GuestMemory};

use super::*;
use crate::Features;
use crate::driver::DriverQueue;

/// 64 KiB of guest memory at this address.
const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x1_0000;
/// Where tests put the ring, indirect tables and buffers.
const RING: Gpa = Gpa(BASE);
const TABLES: Gpa = Gpa(BASE + 0x8000);
const BUFFERS: u64 = BASE + 0xD000;

#[allow(unsafe_code)]
fn memory() -> GuestRam {
    let bytes: &'static mut [u64] = Box::leak(vec![0u64; (SIZE / 8) as usize].into());
    let mut ram = GuestRam::new();
    // SAFETY: leaked, and used through `ram` only.
    unsafe { ram.add(Gpa(BASE), bytes.as_mut_ptr().cast(), SIZE, true) }.unwrap();
    ram
}

fn features(packed: bool) -> Features {
    let mut features = Features::VERSION_1 | Features::INDIRECT_DESC;
    features.set(Features::RING_PACKED, packed);
    features
}

fn segment(index: u64, len: u32) -> Segment {
    Segment {
        gpa: Gpa(BUFFERS + 0x100 * index),
        len,
    }
}

/// A queue of both sides.
struct Pair {
    memory: GuestRam,
    driver: DriverQueue,
    queue: Queue,
}

impl Pair {
    fn new(size: u16, features: Features) -> Self {
        let memory = memory();
        let packed = features.contains(Features::RING_PACKED);
        let driver = DriverQueue::new(RING, size, packed);
        let bounds = Bounds::for_queue(size);
        let queue = driver.config().activate(features, bounds, &memory).unwrap();
        Self {
            memory,
            driver,
            queue,
        }
    }

    fn offer(&mut self, readable: &[Segment], writable: &[Segment]) -> Option<u16> {
        self.driver
            .offer(&self.memory, readable, writable, None)
            .unwrap()
    }

    fn pop(&mut self) -> Result<Option<Token>, QueueError> {
        Ok(self.queue.pop(&self.memory)?.map(Chain::into_token))
    }

    fn complete(&mut self, token: Token, written: u32) {
        self.queue.complete(&self.memory, token, written).unwrap();
    }
}

/// Runs a test for both formats.
fn both(test: impl Fn(bool)) {
    test(false);
    test(true);
}

#[test]
fn a_chain_arrives_and_returns() {
    both(|packed| {
        let mut pair = Pair::new(8, features(packed));
        let (readable, writable) = ([segment(0, 16), segment(1, 3)], [segment(2, 512)]);
        let id = pair.offer(&readable, &writable).unwrap();
        let chain = pair.queue.pop(&pair.memory).unwrap().unwrap();
        assert_eq!(
            (chain.readable(), chain.writable()),
            (&readable[..], &writable[..])
        );
        let token = chain.into_token();
        assert_eq!((token.id(), pair.queue.in_flight()), (id, 1));
        pair.complete(token, 77);
        // Returned, but not shown yet.
        assert_eq!(pair.driver.take_used(&pair.memory), Ok(None));
        assert_eq!(pair.queue.publish(&pair.memory), Ok(true));
        assert_eq!(pair.driver.take_used(&pair.memory), Ok(Some((id, 77))));
        assert_eq!(pair.queue.publish(&pair.memory), Ok(false));
        assert!(pair.pop().unwrap().is_none());
    });
}

#[test]
fn an_indirect_table_is_followed() {
    both(|packed| {
        let mut pair = Pair::new(8, features(packed));
        let readable: Vec<_> = (0..5).map(|i| segment(i, 10 + i as u32)).collect();
        let writable = [segment(6, 1)];
        let offered = pair
            .driver
            .offer(&pair.memory, &readable, &writable, Some(TABLES));
        assert!(offered.unwrap().is_some());
        assert_eq!(pair.driver.room(), 7);
        let chain = pair.queue.pop(&pair.memory).unwrap().unwrap();
        assert_eq!(
            (chain.readable(), chain.writable()),
            (&readable[..], &writable[..])
        );
        let _ = chain.into_token();
    });
}

#[test]
fn batches_are_shown_with_one_publish() {
    both(|packed| {
        let mut pair = Pair::new(16, features(packed));
        for i in 0..10 {
            pair.offer(&[segment(i, 8)], &[]).unwrap();
        }
        let mut batch = Batch::new(8, 64);
        let taken = pair.queue.pop_batch(&pair.memory, &mut batch).unwrap();
        // The batch stops while a chain as long as the bound, 16, would still fit.
        assert_eq!(taken, 8);
        for (i, chain) in batch.drain().enumerate() {
            assert_eq!(chain.readable(), [segment(i as u64, 8)]);
            let token = chain.into_token();
            pair.queue.complete(&pair.memory, token, 0).unwrap();
        }
        assert_eq!(pair.driver.take_used(&pair.memory), Ok(None));
        assert_eq!(pair.queue.publish(&pair.memory), Ok(true));
        let mut returned = 0;
        while pair.driver.take_used(&pair.memory).unwrap().is_some() {
            returned += 1;
        }
        assert_eq!(returned, 8);
        assert_eq!(pair.queue.pop_batch(&pair.memory, &mut batch), Ok(2));
    });
}

#[test]
fn a_chain_that_is_given_back_comes_again() {
    both(|packed| {
        let mut pair = Pair::new(4, features(packed));
        // Twice around the ring, so that going back crosses its end.
        for round in 0..9 {
            let first = pair.offer(&[segment(0, 8)], &[]).unwrap();
            let second = pair.offer(&[segment(1, 8)], &[segment(2, 8)]).unwrap();
            let a = pair.pop().unwrap().unwrap();
            let b = pair.pop().unwrap().unwrap();
            assert_eq!((a.id(), b.id()), (first, second), "round {round}");
            pair.queue.give_back(b);
            pair.queue.give_back(a);
            assert_eq!(pair.queue.in_flight(), 0);
            let a = pair.pop().unwrap().unwrap();
            let b = pair.pop().unwrap().unwrap();
            assert_eq!((a.id(), b.id()), (first, second));
            pair.complete(a, 0);
            pair.complete(b, 1);
            pair.queue.publish(&pair.memory).unwrap();
            assert_eq!(pair.driver.take_used(&pair.memory), Ok(Some((first, 0))));
            assert_eq!(pair.driver.take_used(&pair.memory), Ok(Some((second, 1))));
        }
    });
}

#[test]
fn interrupts_are_sent_as_the_driver_asks() {
    both(|packed| {
        let mut pair = Pair::new(4, features(packed));
        for on in [true, false, true] {
            pair.driver.set_interrupts(&pair.memory, on).unwrap();
            pair.offer(&[segment(0, 8)], &[]).unwrap();
            let token = pair.pop().unwrap().unwrap();
            pair.complete(token, 0);
            assert_eq!(pair.queue.publish(&pair.memory), Ok(on));
            pair.driver.take_used(&pair.memory).unwrap();
        }
    });
}

#[test]
fn the_event_index_asks_for_one_interrupt() {
    both(|packed| {
        let mut pair = Pair::new(8, features(packed) | Features::EVENT_IDX);
        // Long enough to pass the end of the ring and of 16-bit indices.
        for round in 0..30_000 {
            let after = 1 + round % 5;
            pair.driver.set_event(&pair.memory, after).unwrap();
            for i in 1..=6 {
                pair.offer(&[segment(0, 8)], &[]).unwrap();
                let token = pair.pop().unwrap().unwrap();
                pair.complete(token, 0);
                let wanted = pair.queue.publish(&pair.memory).unwrap();
                assert_eq!(
                    wanted,
                    i == after,
                    "packed {packed} round {round} chain {i}"
                );
            }
            while pair.driver.take_used(&pair.memory).unwrap().is_some() {}
        }
    });
}

#[test]
fn one_publish_past_the_event_index_interrupts() {
    both(|packed| {
        let mut pair = Pair::new(8, features(packed) | Features::EVENT_IDX);
        for round in 0..100 {
            let after = 1 + round % 8;
            pair.driver.set_event(&pair.memory, after).unwrap();
            for _ in 0..5 {
                pair.offer(&[segment(0, 8)], &[]).unwrap();
                let token = pair.pop().unwrap().unwrap();
                pair.complete(token, 0);
            }
            let wanted = pair.queue.publish(&pair.memory).unwrap();
            assert_eq!(wanted, after <= 5, "packed {packed} round {round}");
            while pair.driver.take_used(&pair.memory).unwrap().is_some() {}
        }
    });
}

#[test]
fn listening_finds_what_came_meanwhile() {
    both(|packed| {
        let mut pair = Pair::new(4, features(packed));
        assert!(pair.driver.wants_notification(&pair.memory).unwrap());
        pair.queue.mute(&pair.memory).unwrap();
        assert!(!pair.driver.wants_notification(&pair.memory).unwrap());
        assert_eq!(pair.queue.listen(&pair.memory), Ok(false));
        assert!(pair.driver.wants_notification(&pair.memory).unwrap());
        pair.queue.mute(&pair.memory).unwrap();
        pair.offer(&[segment(0, 8)], &[]).unwrap();
        assert_eq!(pair.queue.listen(&pair.memory), Ok(true));
    });
}

#[test]
fn order_that_was_promised_is_kept() {
    both(|packed| {
        let mut pair = Pair::new(4, features(packed) | Features::IN_ORDER);
        pair.offer(&[segment(0, 8)], &[]).unwrap();
        pair.offer(&[segment(1, 8)], &[]).unwrap();
        let first = pair.pop().unwrap().unwrap();
        let second = pair.pop().unwrap().unwrap();
        let early = pair.queue.complete(&pair.memory, second, 0);
        assert_eq!(early, Err(QueueError::OutOfOrder));
        assert_eq!(pair.queue.complete(&pair.memory, first, 0), Ok(()));
    });
}

#[test]
fn readers_and_writers_ignore_boundaries() {
    let mut pair = Pair::new(8, features(false));
    let readable = [segment(0, 3), segment(1, 1), segment(2, 8)];
    let writable = [segment(3, 5), segment(4, 2), segment(5, 4)];
    let data: [u8; 12] = core::array::from_fn(|i| i as u8);
    pair.memory.write(segment(0, 0).gpa, &data[..3]).unwrap();
    pair.memory.write(segment(1, 0).gpa, &data[3..4]).unwrap();
    pair.memory.write(segment(2, 0).gpa, &data[4..]).unwrap();
    pair.offer(&readable, &writable).unwrap();
    let chain = pair.queue.pop(&pair.memory).unwrap().unwrap();
    let mut reader = chain.reader(&pair.memory);
    assert_eq!(reader.remaining(), 12);
    assert_eq!(reader.read_value(), Ok([0u8, 1]));
    assert_eq!(reader.read_value(), Ok([2u8, 3, 4, 5, 6, 7, 8]));
    assert_eq!(reader.read_value::<[u8; 4]>(), Err(ReadError::Short(1)));
    reader.skip(1);
    assert_eq!(reader.read_value(), Ok([10u8, 11]));
    assert_eq!(reader.read(&mut [0; 4]), Ok(0));

    let mut writer = chain.writer(&pair.memory);
    let mut last = writer.split_last(3).unwrap();
    assert_eq!((writer.remaining(), last.remaining()), (8, 3));
    assert_eq!(writer.write_all(&[1; 9]), Err(ReadError::Short(1)));
    assert_eq!(writer.write(&[1; 6]), Ok(6));
    assert_eq!(writer.write(&[2; 6]), Ok(2));
    assert_eq!((writer.written(), writer.remaining()), (8, 0));
    last.write_value(&[7u8, 8, 9]).unwrap();
    assert!(last.split_last(1).is_none());
    let mut bytes = [0; 11];
    pair.memory.read(writable[0].gpa, &mut bytes[..5]).unwrap();
    pair.memory.read(writable[1].gpa, &mut bytes[5..7]).unwrap();
    pair.memory.read(writable[2].gpa, &mut bytes[7..]).unwrap();
    assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 2, 2, 7, 8, 9]);
    let _ = chain.into_token();
}

#[test]
fn activation_refuses_bad_rings() {
    let memory = memory();
    both(|packed| {
        let good = *DriverQueue::new(RING, 16, packed).config();
        let activate = |change: fn(&mut QueueConfig)| {
            let mut config = good;
            change(&mut config);
            let bounds = Bounds::for_queue(16);
            config.activate(features(packed), bounds, &memory).map(drop)
        };
        assert_eq!(activate(|_| {}), Ok(()));
        for size in [0, 17, 0x8000, 0xFFFF] {
            let mut config = good;
            config.size = size;
            let bounds = Bounds::for_queue(16);
            let error = config
                .activate(features(packed), bounds, &memory)
                .unwrap_err();
            assert_eq!(error, ActivateError::Size { size, max: 16 });
        }
        assert_eq!(activate(|c| c.size = 12).is_ok(), packed);
        let alignment: [fn(&mut QueueConfig); 3] = [
            |c| c.descriptors.0 += 8,
            |c| c.driver.0 += 1,
            |c| c.device.0 += 2,
        ];
        for change in alignment {
            assert!(matches!(
                activate(change),
                Err(ActivateError::Alignment { .. })
            ));
        }
        let outside: [fn(&mut QueueConfig); 5] = [
            |c| c.descriptors = Gpa(0),
            |c| c.driver = Gpa(BASE + SIZE),
            |c| c.device = Gpa((BASE + SIZE - 2) & !3),
            |c| c.device = Gpa(u64::MAX - 3),
            |c| c.descriptors = Gpa(u64::MAX - 15),
        ];
        for change in outside {
            let result = activate(change);
            let last = matches!(result, Err(ActivateError::NotMemory { .. }));
            // The four bytes of a packed event area do fit at the very end.
            assert!(last || (packed && result.is_ok()), "{result:?}");
        }
        let overlap: [fn(&mut QueueConfig); 2] = [
            |c| c.device = c.descriptors,
            |c| c.device = Gpa(c.driver.0 & !3),
        ];
        for change in overlap {
            assert!(matches!(
                activate(change),
                Err(ActivateError::Overlap { .. })
            ));
        }
    });
}
