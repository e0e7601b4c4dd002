//! How the guest can know: a CPUID leaf that no processor has.
//!
//! | sub-leaf | EAX | EBX | ECX | EDX |
//! | --- | --- | --- | --- | --- |
//! | 0 | the last sub-leaf | "Test" | "udo " | "pill" |
//! | 1 | processors under the hypervisor | its memory in KiB | 0 | 0 |
//! | 2 and on | how often the guest was interrupted (a [`Reason`] each), low half | high half | 0 | 0 |

use crate::counts::{self, Reason};

/// The leaf, among those that are software's (APM vol. 3, CPUID Fn4000_0000 to Fn4000_00FF are
/// hypervisors'; this one is behind those that known hypervisors use).
pub(crate) const LEAF: u32 = 0x4000_7000;

const NAME: [u32; 3] = [
    u32::from_le_bytes(*b"Test"),
    u32::from_le_bytes(*b"udo "),
    u32::from_le_bytes(*b"pill"),
];

/// The answer to a sub-leaf.
pub(crate) fn answer(subleaf: u32, processors: usize, own_bytes: u64) -> [u32; 4] {
    match subleaf {
        0 => [Reason::COUNT as u32 + 1, NAME[0], NAME[1], NAME[2]],
        1 => [processors as u32, (own_bytes >> 10) as u32, 0, 0],
        reason => match counts::total(reason as usize - 2) {
            Some(count) => [count as u32, (count >> 32) as u32, 0, 0],
            None => [0; 4],
        },
    }
}
