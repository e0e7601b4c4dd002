//! How often the guest was interrupted, by reason, on each processor.

use core::sync::atomic::{AtomicU64, Ordering};

use testudo_rt::cpu;

/// Why the guest was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Reason {
    /// CPUID.
    Cpuid,
    /// An MSR.
    Msr,
    /// A write to the local APIC.
    Apic,
    /// An instruction of the virtualization extension.
    Virtualization,
    /// A guest of the guest left.
    Nested,
    /// INIT or NMI, or one of the hypervisor's own messages.
    Event,
    /// Something else.
    Other,
}

impl Reason {
    /// How many reasons there are.
    pub(crate) const COUNT: usize = Self::Other as usize + 1;
}

/// Each processor writes its own row.
static COUNTS: [[AtomicU64; Reason::COUNT]; cpu::MAX] =
    [const { [const { AtomicU64::new(0) }; Reason::COUNT] }; cpu::MAX];

/// Counts one interruption on a processor.
#[inline]
pub(crate) fn count(processor: usize, reason: Reason) {
    let count = &COUNTS[processor][reason as usize];
    count.store(
        count.load(Ordering::Relaxed).wrapping_add(1),
        Ordering::Relaxed,
    );
}

/// The number of interruptions for a reason, on all processors.
pub(crate) fn total(reason: usize) -> Option<u64> {
    if reason >= Reason::COUNT {
        return None;
    }
    let of = |row: &[AtomicU64; Reason::COUNT]| row[reason].load(Ordering::Relaxed);
    Some(COUNTS.iter().map(of).fold(0, u64::wrapping_add))
}
