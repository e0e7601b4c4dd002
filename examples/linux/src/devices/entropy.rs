//! Random bytes for guests.

use core::arch::x86_64::_rdrand64_step;

use testudo_rt as rt;
use testudo_virtio::device::Entropy;

/// How often RDRAND is asked before it counts as out of numbers: ten times (SDM vol. 1, 7.3.17.1).
const TRIES: usize = 10;

/// Where random bytes come from on the bare machine.
#[derive(Debug)]
pub(crate) enum Source {
    /// RDRAND.
    Processor,
    /// The time-stamp counter, mixed. Somebody who knows when this ran can guess it: a guest must
    /// not take its keys from here alone, and Linux, which credits what it gets, has its own timing
    /// besides.
    Clock(u64),
}

impl Source {
    /// The best that this processor has.
    pub(crate) fn of_this_processor() -> Self {
        const RDRAND: u32 = 1 << 30;
        if rt::cpu::features::cpuid(1).ecx & RDRAND != 0 {
            Self::Processor
        } else {
            Self::Clock(rt::time::tsc())
        }
    }

    fn word(&mut self) -> Option<u64> {
        match self {
            Self::Processor => (0..TRIES).find_map(|_| {
                let mut word = 0;
                // SAFETY: the processor has the instruction, by CPUID.
                (unsafe { _rdrand64_step(&mut word) } == 1).then_some(word)
            }),
            Self::Clock(state) => {
                // SplitMix64, disturbed by how long the step before took.
                *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15) ^ rt::time::tsc();
                let mut word = *state;
                word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
                Some(word ^ word >> 31)
            }
        }
    }
}

impl Entropy for Source {
    fn fill(&mut self, buf: &mut [u8]) -> usize {
        let mut filled = 0;
        for piece in buf.chunks_mut(8) {
            let Some(word) = self.word() else {
                break;
            };
            piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
            filled += piece.len();
        }
        filled
    }
}
