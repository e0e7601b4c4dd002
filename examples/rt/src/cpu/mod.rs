//! The processors: their identity, their descriptor tables, and starting the others.

pub mod features;
mod segments;
mod smp;

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use x86_64::VirtAddr;
use x86_64::registers::model_specific::GsBase;

use crate::apic;

pub(crate) use segments::Stack;
#[cfg(not(test))]
pub(crate) use smp::START_PAGE;
pub use smp::{Missing, finished, start_all};

/// The most processors that the runtime drives.
pub const MAX: usize = 32;

/// What belongs to one processor; its GS base points here.
#[repr(C)]
pub(crate) struct PerCpu {
    /// Read through GS; must stay first.
    id: AtomicUsize,
    apic_id: AtomicU32,
    segments: UnsafeCell<segments::Segments>,
}

// SAFETY: `segments` is touched only by `enter`, which each processor calls once with its own number;
// afterwards only the processor itself reads it.
unsafe impl Sync for PerCpu {}

/// All zero until a processor enters, so that the stacks take no room in the program's file.
static CPUS: [PerCpu; MAX] = [const {
    PerCpu {
        id: AtomicUsize::new(0),
        apic_id: AtomicU32::new(0),
        segments: UnsafeCell::new(segments::Segments::new()),
    }
}; MAX];

/// How many processors there are, the running one included.
static COUNT: AtomicUsize = AtomicUsize::new(1);

/// The running processor's number, from 0 for the one that booted.
#[inline]
pub fn current_id() -> usize {
    let id;
    // SAFETY: GS has the processor's `PerCpu` as its base since `enter`, and its first field is the number.
    unsafe {
        core::arch::asm!("mov {}, gs:[0]", out(reg) id, options(nostack, readonly, preserves_flags));
    }
    id
}

/// How many processors the firmware lists, up to [`MAX`].
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// The local APIC number of a processor.
///
/// # Panics
/// If there is no such processor.
pub fn apic_id(id: usize) -> u32 {
    assert!(id < count(), "processor {id} of {}", count());
    CPUS[id].apic_id.load(Ordering::Relaxed)
}

/// Stops this processor for good: interrupts off, halted.
pub fn halt() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// Sets up the running processor as number `id`: descriptor tables, GS, interrupt stacks.
///
/// # Safety
/// Once on each processor, each with a number of its own, before anything uses GS or an interrupt arrives.
pub(crate) unsafe fn enter(id: usize) {
    let cpu = &CPUS[id];
    cpu.id.store(id, Ordering::Relaxed);
    // SAFETY: the caller gives each processor its own number and calls once, so nobody else refers to
    // these segments.
    unsafe { (*cpu.segments.get()).load() };
    // Loading GS clears its base, so this follows.
    GsBase::write(VirtAddr::from_ptr(cpu));
    crate::irq::load();
    features::enable();
}

/// Records the processors that the firmware lists: the running one first, the others in its order.
pub(crate) fn enumerate(listed: impl Iterator<Item = u32>) {
    let own = apic::id();
    CPUS[0].apic_id.store(own, Ordering::Relaxed);
    let mut count = 1;
    for apic_id in listed.filter(|&apic_id| apic_id != own).take(MAX - 1) {
        CPUS[count].apic_id.store(apic_id, Ordering::Relaxed);
        count += 1;
    }
    COUNT.store(count, Ordering::Relaxed);
}
