//! The preemption timer of L2: L1's, and L0's turns (SDM vol. 3C, 28.5.1).
//!
//! The processor counts the shorter one of both. What L1's is longer waits here, and the two are L1's timer
//! together whenever it is asked for.

use core::num::NonZeroU32;

/// What is known of it while L2 runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct L2Timer {
    /// After how many units L2's turn ends for L0 at the latest, if at all.
    pub(super) turn: Option<NonZeroU32>,
    /// What L1's timer has beyond what the processor counts.
    pub(super) rest: u32,
}

impl L2Timer {
    /// Starts L1's timer; what the processor is to count of it.
    #[inline]
    pub(super) fn start(&mut self, value: u32) -> u32 {
        let now = self.turn.map_or(value, |turn| value.min(turn.get()));
        self.rest = value - now;
        now
    }

    /// Starts what L0 asks for, where L1 has no timer.
    #[inline]
    pub(super) fn start_turn(&mut self) -> Option<u32> {
        self.rest = 0;
        self.turn.map(NonZeroU32::get)
    }

    /// The processor's has expired: what it is to count next of L1's, if that has not.
    #[inline]
    pub(super) fn go_on(&mut self) -> Option<u32> {
        (self.rest != 0).then(|| self.start(self.rest))
    }
}
