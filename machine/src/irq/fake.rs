//! A host for tests: time stands still until it is moved, kicks are counted.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::vec::Vec;

use super::{Irqchip, Lapic, LapicFeatures};
use crate::host::Host;

pub(crate) struct FakeHost {
    now: AtomicU64,
    kicks: [AtomicUsize; 64],
}

impl FakeHost {
    pub(crate) const TSC_HZ: u64 = 2_000_000_000;

    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            now: AtomicU64::new(1_000_000_000),
            kicks: [const { AtomicUsize::new(0) }; 64],
        })
    }

    pub(crate) fn pass(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::Relaxed);
    }

    pub(crate) fn kicks(&self, vcpu: usize) -> usize {
        self.kicks[vcpu].load(Ordering::Relaxed)
    }
}

impl Host for FakeHost {
    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn tsc(&self) -> u64 {
        self.now() * 2
    }

    fn tsc_hz(&self) -> u64 {
        Self::TSC_HZ
    }

    fn kick(&self, vcpu: usize) {
        self.kicks[vcpu].fetch_add(1, Ordering::Relaxed);
        // Whoever waits for it may have no processor.
        std::thread::yield_now();
    }

    fn set_timer(&self, _: Option<u64>) {}

    fn wait(&self) {}
}

/// Interrupt controllers for `vcpus` vCPUs, whose local APICs software has enabled.
pub(crate) fn machine(vcpus: usize) -> (Arc<FakeHost>, Arc<Irqchip>, Vec<Lapic>) {
    let host = FakeHost::new();
    let (chip, mut lapics) = Irqchip::new(host.clone(), vcpus, LapicFeatures::default());
    for lapic in &mut lapics {
        lapic.write_mmio(0xF0, &0x1FFu32.to_le_bytes());
    }
    (host, chip, lapics)
}
