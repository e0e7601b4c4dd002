//! Time: the TSC, calibrated against the PC's interval timer.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::{port, timer};

/// Clock of the interval timer in Hz.
const PIT_HZ: u64 = 1_193_182;
/// How long a calibration takes, in the interval timer's ticks: 40 ms.
const PIT_TICKS: u16 = 47_727;

const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Gate (bit 0) and output (bit 5) of the interval timer's channel 2.
const SYSTEM_CONTROL_B: u16 = 0x61;

/// A calibration that takes longer than this in TSC ticks has no interval timer to go by.
const GIVE_UP: u64 = 1 << 37;

static TSC_HZ: AtomicU64 = AtomicU64::new(0);
static APIC_HZ: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds for a TSC tick, and APIC ticks for a TSC tick, in units of 2⁻³².
static NS_PER_TICK: AtomicU64 = AtomicU64::new(0);
static APIC_PER_TICK: AtomicU64 = AtomicU64::new(0);

/// The time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has the instruction, and the kernel mode may use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ticks of the TSC in a second.
pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Ordering::Relaxed)
}

/// Ticks of the local APIC's timer in a second, at its full rate.
pub fn apic_hz() -> u64 {
    APIC_HZ.load(Ordering::Relaxed)
}

/// Nanoseconds since the TSC was zero.
#[inline]
pub fn now_ns() -> u64 {
    tsc_to_ns(tsc())
}

/// The length of `ticks` of the TSC in nanoseconds.
#[inline]
pub fn tsc_to_ns(ticks: u64) -> u64 {
    scale(ticks, NS_PER_TICK.load(Ordering::Relaxed))
}

/// How many ticks of the TSC take `ns` nanoseconds.
#[inline]
pub fn ns_to_tsc(ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(tsc_hz()) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The first value of the TSC at which [`now_ns`] reads `ns` or more.
#[inline]
pub fn tsc_at(ns: u64) -> u64 {
    let factor = NS_PER_TICK.load(Ordering::Relaxed).max(1);
    let tsc = (u128::from(ns) << 32).div_ceil(u128::from(factor));
    u64::try_from(tsc).unwrap_or(u64::MAX)
}

pub(crate) fn tsc_to_apic(ticks: u64) -> u64 {
    scale(ticks, APIC_PER_TICK.load(Ordering::Relaxed))
}

#[inline]
fn scale(value: u64, factor: u64) -> u64 {
    ((u128::from(value) * u128::from(factor)) >> 32) as u64
}

/// Waits without interrupts.
pub fn delay_ns(ns: u64) {
    let start = tsc();
    let ticks = ns_to_tsc(ns);
    while tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Measures the TSC and the local APIC's timer.
///
/// # Panics
/// If the machine has no interval timer.
pub(crate) fn calibrate() {
    // SAFETY: the interval timer and the speaker's gate touch no memory.
    let (ticks, counted) = unsafe {
        let control = port::read_u8(SYSTEM_CONTROL_B);
        // Gate open, speaker off.
        port::write_u8(SYSTEM_CONTROL_B, control & !2 | 1);
        // Channel 2, both bytes, mode 0: the output rises when the count is over.
        port::write_u8(PIT_COMMAND, 0xb0);
        let [low, high] = PIT_TICKS.to_le_bytes();
        port::write_u8(PIT_CHANNEL_2, low);
        timer::count_freely();
        port::write_u8(PIT_CHANNEL_2, high);
        let start = tsc();
        let start_count = timer::counted();
        while port::read_u8(SYSTEM_CONTROL_B) & 1 << 5 == 0 {
            assert!(tsc() - start < GIVE_UP, "the interval timer does not count");
        }
        let ticks = tsc() - start;
        let counted = timer::counted() - start_count;
        port::write_u8(SYSTEM_CONTROL_B, control);
        timer::disarm();
        (ticks, u64::from(counted))
    };
    let hz = |count: u64| count * PIT_HZ / u64::from(PIT_TICKS);
    TSC_HZ.store(hz(ticks), Ordering::Relaxed);
    APIC_HZ.store(hz(counted), Ordering::Relaxed);
    NS_PER_TICK.store(
        ((1_000_000_000_u128 << 32) / u128::from(hz(ticks).max(1))) as u64,
        Ordering::Relaxed,
    );
    APIC_PER_TICK.store(
        ((u128::from(counted) << 32) / u128::from(ticks.max(1))) as u64,
        Ordering::Relaxed,
    );
}
