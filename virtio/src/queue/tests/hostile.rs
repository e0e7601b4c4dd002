//! Drivers that break the rules, one rule each.

use proptest::prelude::*;

use super::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A queue with one chain whose descriptors the test writes itself: (address, length, flags, next).
/// In the packed format the flags get their AVAIL bit, and `next` has no meaning.
fn forged(packed: bool, descriptors: &[(u64, u32, u16, u16)], table: bool) -> Pair {
    let mut pair = Pair::new(8, features(packed));
    let at = if table { TABLES } else { RING };
    for (i, &(gpa, len, flags, next)) in descriptors.iter().enumerate() {
        put(&pair.memory, packed, at, i, (gpa, len, flags, next));
    }
    if table {
        let len = 16 * descriptors.len() as u32;
        put(&pair.memory, packed, RING, 0, (TABLES.0, len, INDIRECT, 0));
    }
    publish(&mut pair, packed, 1);
    pair
}

fn put(
    memory: &GuestRam,
    packed: bool,
    table: Gpa,
    index: usize,
    (gpa, len, flags, next): (u64, u32, u16, u16),
) {
    let tail = if packed {
        u64::from(index as u16) << 32 | u64::from(flags | 1 << 7) << 48
    } else {
        u64::from(flags) << 32 | u64::from(next) << 48
    };
    let at = table.wrapping_add(16 * index as u64);
    memory.store_u64(at, gpa).unwrap();
    memory
        .store_u64(at.wrapping_add(8), u64::from(len) | tail)
        .unwrap();
}

/// Makes the chain at descriptor 0 available (packed ones are so already), `index` in all.
fn publish(pair: &mut Pair, packed: bool, index: u16) {
    if !packed {
        let at = pair.driver.config().driver.wrapping_add(2);
        pair.memory.store_u16(at, index).unwrap();
    }
}

fn error(packed: bool, descriptors: &[(u64, u32, u16, u16)], table: bool) -> QueueError {
    forged(packed, descriptors, table).pop().unwrap_err()
}

#[test]
fn a_chain_that_loops_is_refused() {
    let looping = [(BUFFERS, 8, NEXT, 1), (BUFFERS, 8, NEXT, 0)];
    assert_eq!(
        error(false, &looping, false),
        QueueError::TooManySegments(8)
    );
    assert_eq!(error(false, &looping, true), QueueError::TooManySegments(8));
    let itself = [(BUFFERS, 0, NEXT, 0)];
    assert_eq!(error(false, &itself, false), QueueError::TooManySegments(8));
    // A packed chain ends with the ring at the latest.
    let endless = [(BUFFERS, 8, NEXT, 0); 8];
    assert_eq!(error(true, &endless, false), QueueError::TooManyInFlight(8));
}

#[test]
fn empty_buffers_are_counted_but_not_shown() {
    both(|packed| {
        let chain = [
            (BUFFERS, 0, NEXT, 1),
            (BUFFERS, 8, NEXT, 2),
            (0, 0, WRITE, 0),
        ];
        let mut pair = forged(packed, &chain, false);
        let chain = pair.queue.pop(&pair.memory).unwrap().unwrap();
        assert_eq!(chain.readable(), [segment(0, 8)]);
        assert_eq!(chain.writable(), []);
        let _ = chain.into_token();
        let many = [(BUFFERS, 0, NEXT, 1); 9];
        let error = error(packed, &many, true);
        // Split: entry 1 continues at itself.
        assert_eq!(error, QueueError::TooManySegments(8));
    });
}

#[test]
fn more_bytes_than_a_chain_may_have_are_refused() {
    both(|packed| {
        let huge = [(0, u32::MAX, NEXT, 1), (0, 1, 0, 0)];
        assert_eq!(
            error(packed, &huge, false),
            QueueError::TooManyBytes(u32::MAX)
        );
    });
}

#[test]
fn descriptors_that_do_not_exist_are_refused() {
    let beyond = QueueError::DescriptorIndex { index: 8, size: 8 };
    assert_eq!(error(false, &[(BUFFERS, 8, NEXT, 8)], false), beyond);
    let beyond = QueueError::DescriptorIndex { index: 1, size: 1 };
    assert_eq!(error(false, &[(BUFFERS, 8, NEXT, 1)], true), beyond);
    let mut pair = forged(false, &[(BUFFERS, 8, 0, 0)], false);
    let at = pair.driver.config().driver.wrapping_add(4);
    pair.memory.store_u16(at, 0xFFFF).unwrap();
    let beyond = QueueError::DescriptorIndex {
        index: 0xFFFF,
        size: 8,
    };
    assert_eq!(pair.pop().unwrap_err(), beyond);
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    both(|packed| {
        let mixed = [(BUFFERS, 8, NEXT | WRITE, 1), (BUFFERS, 8, 0, 0)];
        for table in [false, true] {
            assert_eq!(
                error(packed, &mixed, table),
                QueueError::ReadableAfterWritable
            );
        }
    });
}

#[test]
fn a_buffer_that_wraps_is_refused() {
    both(|packed| {
        let wraps = QueueError::Wraps {
            gpa: Gpa(u64::MAX),
            len: 2,
        };
        assert_eq!(error(packed, &[(u64::MAX, 2, 0, 0)], false), wraps);
        assert_eq!(
            error(packed, &[(u64::MAX - 30, 32, INDIRECT, 0)], false),
            QueueError::Wraps {
                gpa: Gpa(u64::MAX - 30),
                len: 32,
            }
        );
    });
}

#[test]
fn indirect_tables_obey_their_rules() {
    both(|packed| {
        let nested = [(TABLES.0, 16, INDIRECT, 0)];
        assert_eq!(error(packed, &nested, true), QueueError::NestedIndirect);
        for len in [0, 8, 17, 16 * 65536] {
            let chain = [(TABLES.0, len, INDIRECT, 0)];
            assert_eq!(
                error(packed, &chain, false),
                QueueError::IndirectLength(len)
            );
        }
        let continues = [(TABLES.0, 16, INDIRECT | NEXT, 1)];
        assert_eq!(
            error(packed, &continues, false),
            QueueError::IndirectWithNext
        );
        let outside = [(0x1000, 32, INDIRECT, 0)];
        assert!(matches!(
            error(packed, &outside, false),
            QueueError::Memory(_)
        ));
        // Longer than the ring, though within the table.
        let long: Vec<_> = (1..=9).map(|i| (BUFFERS, 8, NEXT, i)).collect();
        assert_eq!(error(packed, &long, true), QueueError::TooManySegments(8));

        let memory = memory();
        let driver = DriverQueue::new(RING, 8, packed);
        let without = features(packed) - Features::INDIRECT_DESC;
        let bounds = Bounds::for_queue(8);
        let mut queue = driver.config().activate(without, bounds, &memory).unwrap();
        put(&memory, packed, RING, 0, (TABLES.0, 16, INDIRECT, 0));
        if !packed {
            let at = driver.config().driver.wrapping_add(2);
            memory.store_u16(at, 1).unwrap();
        }
        let error = queue.pop(&memory).unwrap_err();
        assert_eq!(error, QueueError::IndirectNotNegotiated);
    });
}

#[test]
fn a_direct_part_may_end_in_an_indirect_table() {
    let mut pair = forged(false, &[(BUFFERS + 0x100, 8, WRITE, 0)], true);
    put(&pair.memory, false, RING, 0, (BUFFERS, 8, NEXT, 5));
    // WRITE has no meaning on the descriptor that refers to a table (2.7.5.3.2).
    put(
        &pair.memory,
        false,
        RING,
        5,
        (TABLES.0, 16, INDIRECT | WRITE, 0),
    );
    let chain = pair.queue.pop(&pair.memory).unwrap().unwrap();
    assert_eq!(chain.readable(), [segment(0, 8)]);
    assert_eq!(chain.writable(), [segment(1, 8)]);
    let _ = chain.into_token();
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    for index in [9, 0x8000, 0xFFFF] {
        let mut pair = forged(false, &[(BUFFERS, 8, 0, 0)], false);
        publish(&mut pair, false, index);
        let jumped = QueueError::AvailableIndex {
            index,
            next: 0,
            size: 8,
        };
        assert_eq!(pair.pop().unwrap_err(), jumped);
        assert_eq!(pair.queue.listen(&pair.memory), Err(jumped));
    }
    // Eight entries of the same head: the second is with the device already.
    let mut pair = forged(false, &[(BUFFERS, 8, 0, 0)], false);
    publish(&mut pair, false, 8);
    let token = pair.pop().unwrap().unwrap();
    assert_eq!(pair.pop().unwrap_err(), QueueError::InFlight(0));
    pair.complete(token, 0);
}

#[test]
fn a_buffer_number_that_is_in_use_is_refused() {
    let mut pair = Pair::new(8, features(true));
    put(&pair.memory, true, RING, 0, (BUFFERS, 8, 0, 0));
    put(&pair.memory, true, RING, 1, (BUFFERS, 8, 0, 0));
    // Both have number 0.
    pair.memory.store_u16(Gpa(RING.0 + 16 + 12), 0).unwrap();
    let token = pair.pop().unwrap().unwrap();
    assert_eq!(pair.pop().unwrap_err(), QueueError::InFlight(0));
    pair.complete(token, 0);
}

#[test]
fn a_packed_ring_never_gives_more_than_it_has() {
    let mut pair = Pair::new(8, features(true));
    for i in 0..8 {
        put(&pair.memory, true, RING, i, (BUFFERS, 8, 0, 0));
    }
    for _ in 0..8 {
        let _ = pair.pop().unwrap().unwrap();
    }
    // The next lap, although nothing was returned.
    for i in 0..8 {
        let at = Gpa(RING.0 + 16 * i + 12);
        pair.memory
            .store_u32(at, 0x8000_0000 | (100 + i as u32))
            .unwrap();
    }
    assert_eq!(pair.pop().unwrap(), None);
    assert_eq!(pair.queue.listen(&pair.memory), Ok(false));
}

#[test]
fn a_ring_that_vanishes_is_a_fault() {
    both(|packed| {
        let mut pair = Pair::new(8, features(packed));
        pair.offer(&[segment(0, 8)], &[]).unwrap();
        let gone = GuestRam::new();
        assert!(matches!(pair.queue.pop(&gone), Err(QueueError::Memory(_))));
        assert!(matches!(
            pair.queue.listen(&gone),
            Err(QueueError::Memory(_))
        ));
        let token = pair.pop().unwrap().unwrap();
        let completed = pair.queue.complete(&gone, token, 0);
        let published = pair.queue.publish(&gone);
        assert!(completed.is_err() || published.is_err());
    });
}

proptest! {
    /// Whatever the ring holds: chains within the bounds or an error, and never more chains than
    /// the queue has places.
    #[test]
    fn any_ring_at_all_is_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0x300),
        index in 0u16..9,
        table in proptest::collection::vec(any::<u8>(), 0x100),
        packed: bool,
    ) {
        let mut pair = Pair::new(8, features(packed) | Features::EVENT_IDX);
        // Addresses that lie in memory make for deeper walks.
        let near: Vec<u8> = bytes
            .iter()
            .enumerate()
            .map(|(i, &b)| match i % 16 {
                2 => 0x10 + (b & 1),
                3..=7 => 0,
                9..12 => b & 1,
                _ => b,
            })
            .collect();
        pair.memory.write(RING, &near).unwrap();
        pair.memory.write(TABLES, &table).unwrap();
        publish(&mut pair, packed, index);
        let memory = pair.memory.clone();
        let mut taken = Vec::new();
        for _ in 0..20 {
            match pair.queue.pop(&memory) {
                Ok(Some(chain)) => {
                    let segments = chain.readable().len() + chain.writable().len();
                    prop_assert!(segments <= 8);
                    for s in chain.readable().iter().chain(chain.writable()) {
                        prop_assert!(s.len > 0);
                        prop_assert!(s.gpa.checked_add(u64::from(s.len) - 1).is_some());
                    }
                    taken.push(chain.into_token());
                }
                Ok(None) => break,
                Err(_) => break,
            }
        }
        prop_assert!(taken.len() <= 8);
        for token in taken {
            pair.queue.complete(&memory, token, 1).unwrap();
        }
        pair.queue.publish(&memory).unwrap();
        let _ = pair.queue.listen(&memory);
    }
}
