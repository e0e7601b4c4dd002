//! When guest memory is scanned for pages that hold the same.

use alloc::sync::Arc;
use alloc::vec::Vec;

use testudo_ept::sharing::Pace;

use super::Managed;
use crate::device::{Clocked, Deadline};
use crate::host::Host;
use crate::irq::Irqchip;

/// How many pages are read in one turn, and how many if they are to be very many a second.
const TURN: u64 = 64;
const LONGEST: u64 = 256;
/// The least time between two turns, in nanoseconds.
const PAUSE: u64 = 1_000_000;
/// How many times as long as a turn the vCPU is left alone after it, on a processor that is too slow for the pages a
/// second.
const REST: u64 = 4;

/// The turns of a machine's scanner, among the deadlines of its devices.
pub(crate) struct ScanClock {
    deadline: Arc<Deadline>,
    host: Arc<dyn Host>,
    pace: Pace,
    pause: u64,
    memories: Vec<&'static dyn Managed>,
    /// Whose turn it is.
    next: usize,
}

impl ScanClock {
    /// So many pages a second from now on, at most.
    pub(crate) fn new(
        chip: &Arc<Irqchip>,
        host: Arc<dyn Host>,
        memories: Vec<&'static dyn Managed>,
        per_second: u64,
    ) -> Self {
        let deadline = Deadline::new(chip);
        let (turn, pause) = turns(per_second);
        deadline.set(Some(host.now().saturating_add(pause)));
        Self {
            deadline,
            host,
            pace: Pace::new(per_second, turn),
            pause,
            memories,
            next: 0,
        }
    }
}

/// How many pages one turn has at most, and how long it is from one to the next.
fn turns(per_second: u64) -> (u64, u64) {
    let per_second = per_second.max(1);
    let turn = (per_second / (1_000_000_000 / PAUSE)).clamp(TURN, LONGEST);
    let pause = (turn.saturating_mul(1_000_000_000) / per_second).max(PAUSE);
    (turn, pause)
}

impl Clocked for ScanClock {
    fn deadline(&self) -> &Arc<Deadline> {
        &self.deadline
    }

    fn poll(&mut self, now: u64) {
        let pages = self.pace.grant(now);
        if let Some(memory) = self.memories.get(self.next) {
            memory.share(pages);
        }
        self.next += 1;
        if self.next >= self.memories.len() {
            self.next = 0;
        }
        let next = next_turn(now, self.host.now(), self.pause);
        self.deadline.set(Some(next));
    }
}

/// When the turn after the one from `start` to `end` begins.
fn next_turn(start: u64, end: u64, pause: u64) -> u64 {
    let rest = end.saturating_sub(start).saturating_mul(REST);
    let rested = end.saturating_add(rest);
    rested.max(start.saturating_add(pause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_short_and_not_too_many() {
        assert_eq!(turns(10_000), (64, 6_400_000));
        assert_eq!(turns(100_000), (100, 1_000_000));
        assert_eq!(turns(10_000_000), (256, 1_000_000));
        assert_eq!(turns(0), (64, 64_000_000_000));
    }

    #[test]
    fn a_slow_processor_is_left_to_the_guest_four_fifths_of_the_time() {
        assert_eq!(next_turn(1_000, 1_100, 5_000), 6_000);
        assert_eq!(next_turn(1_000, 4_000, 5_000), 16_000);
        assert_eq!(next_turn(1_000, u64::MAX, 5_000), u64::MAX);
    }
}
