//! The same chains from tables that are found once and from those that are looked up at each access.

use proptest::prelude::*;
use testudo_arch::MemoryFault;

use super::*;

/// Memory of which nothing is near, as behind an IOMMU.
struct Distant<'m>(&'m GuestRam);

impl GuestMemory for Distant<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryFault> {
        self.0.read(gpa, buf)
    }
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryFault> {
        self.0.write(gpa, data)
    }
    fn load_u16(&self, gpa: Gpa) -> Result<u16, MemoryFault> {
        self.0.load_u16(gpa)
    }
    fn store_u16(&self, gpa: Gpa, value: u16) -> Result<(), MemoryFault> {
        self.0.store_u16(gpa, value)
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, MemoryFault> {
        self.0.load_u32(gpa)
    }
    fn store_u32(&self, gpa: Gpa, value: u32) -> Result<(), MemoryFault> {
        self.0.store_u32(gpa, value)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, MemoryFault> {
        self.0.load_u64(gpa)
    }
    fn store_u64(&self, gpa: Gpa, value: u64) -> Result<(), MemoryFault> {
        self.0.store_u64(gpa, value)
    }
    fn compare_exchange_u32(
        &self,
        gpa: Gpa,
        current: u32,
        new: u32,
    ) -> Result<Result<u32, u32>, MemoryFault> {
        self.0.compare_exchange_u32(gpa, current, new)
    }
    fn compare_exchange_u64(
        &self,
        gpa: Gpa,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemoryFault> {
        self.0.compare_exchange_u64(gpa, current, new)
    }
    fn contains(&self, gpa: Gpa, len: u64) -> bool {
        self.0.contains(gpa, len)
    }
}

/// What a queue gives, until it gives no more.
type Taken = Vec<Result<(u16, Vec<Segment>, Vec<Segment>), QueueError>>;

const SIZE_OF_RING: u16 = 8;

/// Takes all chains one by one, or in a batch; then returns them, and gives what is in memory.
fn take<M: GuestMemory>(pair: &Pair, memory: &M, packed: bool, batched: bool) -> (Taken, Vec<u8>) {
    let config = pair.driver.config();
    let mut features = features(packed);
    features.set(Features::EVENT_IDX, batched);
    let bounds = Bounds {
        segments: 6,
        bytes: 0x1_0000,
    };
    let mut queue = config.activate(features, bounds, memory).unwrap();
    let (mut taken, mut tokens) = (Taken::new(), Vec::new());
    let mut note = |chain: Chain<'_>| {
        let (readable, writable) = (chain.readable().to_vec(), chain.writable().to_vec());
        let token = chain.into_token();
        taken.push(Ok((token.id(), readable, writable)));
        tokens.push(token);
    };
    let end = if batched {
        let mut batch = Batch::new(32, 256);
        let end = queue.pop_batch(memory, &mut batch);
        batch.drain().for_each(&mut note);
        end.err()
    } else {
        loop {
            match queue.pop(memory) {
                Ok(Some(chain)) => note(chain),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        }
    };
    taken.extend(end.map(Err));
    for token in tokens {
        queue.complete(memory, token, 5).unwrap();
    }
    let _ = queue.publish(memory);
    let mut bytes = vec![0; ring_bytes(SIZE_OF_RING)];
    pair.memory.read(RING, &mut bytes).unwrap();
    (taken, bytes)
}

fn ring_bytes(size: u16) -> usize {
    crate::driver::ring_bytes(size) as usize
}

/// A descriptor near the border of validity: where its flags and the rest of its tail are, a format
/// decides.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let gpa = prop_oneof![
        8 => (0..64u64).prop_map(|place| BUFFERS + 0x40 * place),
        3 => (0..4u64).prop_map(|place| TABLES.0 + 0x20 * place),
        1 => Just(TABLES.0 + 4),
        1 => Just(BASE + SIZE - 0x20),
        1 => Just(u64::MAX - 15),
    ];
    let len = prop_oneof![
        6 => 0..64u32,
        3 => (0..5u32).prop_map(|count| 16 * count),
        1 => Just(0x8000_u32),
        1 => Just(u32::MAX),
    ];
    // NEXT, WRITE and INDIRECT, the last seldom; and in a packed ring whether it is available.
    let flags = (
        0..4u16,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(flags, indirect, available)| {
            flags | (u16::from(indirect) << 2) | (u16::from(available) << 7)
        });
    (gpa, len, flags, 0..9u16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn near_and_far_tables_give_the_same(
        ring in proptest::collection::vec(descriptor(), SIZE_OF_RING as usize),
        tables in proptest::collection::vec(descriptor(), 12),
        heads in proptest::collection::vec(0..9u16, SIZE_OF_RING as usize),
        count in 0..10u16,
        packed: bool,
        batched: bool,
    ) {
        let pair = Pair::new(SIZE_OF_RING, features(packed));
        let fill = || {
            let places = ring.iter().enumerate().map(|(i, d)| (RING, i, d));
            for (table, index, &(gpa, len, flags, other)) in
                places.chain(tables.iter().enumerate().map(|(i, d)| (TABLES, i, d)))
            {
                let (flags, other) = (u64::from(flags), u64::from(other));
                let tail = if packed { other | flags << 16 } else { flags & 7 | other << 16 };
                let at = table.wrapping_add(16 * index as u64);
                pair.memory.store_u64(at, gpa).unwrap();
                pair.memory.store_u64(at.wrapping_add(8), u64::from(len) | tail << 32).unwrap();
            }
            if !packed {
                let available = pair.driver.config().driver;
                pair.memory.store_u16(available.wrapping_add(2), count).unwrap();
                for (index, &head) in heads.iter().enumerate() {
                    let at = available.wrapping_add(4 + 2 * index as u64);
                    pair.memory.store_u16(at, head).unwrap();
                }
                pair.memory.write(pair.driver.config().device, &[0; 70]).unwrap();
            }
        };
        fill();
        let near = take(&pair, &pair.memory, packed, batched);
        fill();
        let far = take(&pair, &Distant(&pair.memory), packed, batched);
        prop_assert_eq!(near, far);
    }
}
