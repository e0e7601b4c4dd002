//! Random work of a driver and a device, on both formats and on a model that has neither.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// The driver offers a chain of so many readable and writable buffers.
    Offer {
        readable: u8,
        writable: u8,
        indirect: bool,
    },
    /// The device takes up to so many chains.
    Pop(u8),
    /// The device returns one of those it has.
    Complete { which: u8, written: u16 },
    /// The device shows what it has returned.
    Publish,
    /// The driver takes back what it is shown.
    TakeUsed,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4, 0u8..4, any::<bool>()).prop_map(|(readable, writable, indirect)| {
            Step::Offer { readable, writable, indirect }
        }),
        3 => (1u8..6).prop_map(Step::Pop),
        4 => (any::<u8>(), any::<u16>())
            .prop_map(|(which, written)| Step::Complete { which, written }),
        2 => Just(Step::Publish),
        2 => Just(Step::TakeUsed),
    ]
}

/// The readable and the writable buffers of a chain.
type Buffers = (Vec<Segment>, Vec<Segment>);

#[derive(Default)]
struct Model {
    available: VecDeque<(u16, Buffers)>,
    returned: VecDeque<(u16, u32)>,
    shown: VecDeque<(u16, u32)>,
}

/// What can be observed from outside: the buffers that arrived and the lengths that returned, in
/// order.
#[derive(Debug, Default, PartialEq)]
struct Observed {
    arrived: Vec<Buffers>,
    came_back: Vec<u32>,
}

fn run(packed: bool, in_order: bool, size: u16, steps: &[Step]) -> Observed {
    let mut features = features(packed) | Features::EVENT_IDX;
    features.set(Features::IN_ORDER, in_order);
    let mut pair = Pair::new(size, features);
    let mut model = Model::default();
    let mut observed = Observed::default();
    let mut taken: Vec<Token> = Vec::new();
    let (mut buffers, mut tables) = (0, 0);
    for step in steps {
        match *step {
            Step::Offer {
                readable,
                writable,
                indirect,
            } => {
                // Both formats must have room for the same chains.
                if pair.driver.room() < 6 {
                    continue;
                }
                let mut make = |count: u8| -> Vec<_> {
                    (0..count)
                        .map(|_| {
                            buffers += 1;
                            segment(buffers % 100, 1 + buffers as u32 % 200)
                        })
                        .collect()
                };
                let chain = (make(readable), make(writable));
                // A table of its own for each: six descriptors at most.
                let at = Gpa(TABLES.0 + 0x60 * tables);
                tables += 1;
                let table = indirect.then_some(at);
                let offered = pair.driver.offer(&pair.memory, &chain.0, &chain.1, table);
                if let Some(id) = offered.unwrap() {
                    model.available.push_back((id, chain));
                }
            }
            Step::Pop(count) => {
                for _ in 0..count {
                    let popped = pair.queue.pop(&pair.memory).unwrap();
                    let Some((id, expected)) = model.available.pop_front() else {
                        assert!(popped.is_none());
                        break;
                    };
                    let chain = popped.expect("the model has one");
                    let buffers = (chain.readable().to_vec(), chain.writable().to_vec());
                    assert_eq!(buffers, expected);
                    observed.arrived.push(buffers);
                    let token = chain.into_token();
                    assert_eq!(token.id(), id);
                    taken.push(token);
                }
            }
            Step::Complete { which, written } => {
                if taken.is_empty() {
                    continue;
                }
                let index = if in_order {
                    0
                } else {
                    usize::from(which) % taken.len()
                };
                let token = taken.remove(index);
                model.returned.push_back((token.id(), written.into()));
                pair.complete(token, written.into());
            }
            Step::Publish => {
                pair.queue.publish(&pair.memory).unwrap();
                model.shown.append(&mut model.returned);
            }
            Step::TakeUsed => {
                while let Some(used) = pair.driver.take_used(&pair.memory).unwrap() {
                    assert_eq!(Some(used), model.shown.pop_front());
                    observed.came_back.push(used.1);
                }
                assert!(model.shown.is_empty());
            }
        }
        assert_eq!(usize::from(pair.queue.in_flight()), taken.len());
    }
    observed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn both_formats_agree_with_the_model(
        steps in proptest::collection::vec(step(), 1..200),
        order in 3u32..6,
        in_order: bool,
    ) {
        let size = 1 << order;
        run(true, in_order, size, &steps);
        run(false, in_order, size, &steps);
        // A packed ring need not be a power of two.
        run(true, in_order, size + 5, &steps);
    }

    #[test]
    fn both_formats_show_the_same(steps in proptest::collection::vec(step(), 1..100)) {
        // Large enough that neither format runs out of room before the other.
        prop_assert_eq!(run(true, true, 1024, &steps), run(false, true, 1024, &steps));
    }
}
