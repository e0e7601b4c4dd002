//! The local APIC's timer: one interrupt at a time of the TSC.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::apic::{self, Register};
use crate::cpu::{self, features};
use crate::{msr, time};

const TSC_DEADLINE: u32 = 0x6e0;

const MASKED: u32 = 1 << 16;
const MODE_DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

/// All processors use the same mode, and the same vector.
static DEADLINE: AtomicBool = AtomicBool::new(false);
static VECTOR: AtomicU8 = AtomicU8::new(0);

/// The deadline of one processor's timer; [`NEVER`] when it has none.
#[repr(align(64))]
struct Armed(AtomicU64);

const NEVER: u64 = u64::MAX;

static ARMED: [Armed; cpu::MAX] = [const { Armed(AtomicU64::new(NEVER)) }; cpu::MAX];

fn armed() -> &'static AtomicU64 {
    &ARMED[cpu::current_id()].0
}

/// Has the running processor's timer raise `vector`, in TSC-deadline mode where the processor has it.
pub fn start(vector: u8) {
    if features::has_tsc_deadline() {
        DEADLINE.store(true, Ordering::Relaxed);
        apic::write(Register::LvtTimer, MODE_DEADLINE | u32::from(vector));
        // The mode must be set before the deadline is written (SDM vol. 3, 12.5.4.1).
        // SAFETY: SSE2 is part of every 64-bit processor.
        unsafe { core::arch::x86_64::_mm_mfence() };
    } else {
        start_one_shot(vector);
    }
}

/// As [`start`], in one-shot mode whatever else the processor has.
pub fn start_one_shot(vector: u8) {
    DEADLINE.store(false, Ordering::Relaxed);
    VECTOR.store(vector, Ordering::Relaxed);
    apic::write(Register::Divide, DIVIDE_BY_1);
    apic::write(Register::LvtTimer, u32::from(vector));
}

/// Whether the timers compare the TSC themselves.
pub fn uses_deadline() -> bool {
    DEADLINE.load(Ordering::Relaxed)
}

/// Raises the interrupt when the TSC reaches `deadline`, at once if it has; replaces an earlier one.
///
/// In one-shot mode the counter's rate was measured and its range is short, so the interrupt may come
/// early: its handler asks [`is_due`].
#[inline]
pub fn arm(deadline: u64) {
    armed().store(deadline, Ordering::Relaxed);
    set(deadline);
}

#[inline]
fn set(deadline: u64) {
    if uses_deadline() {
        // Zero would disarm.
        // SAFETY: `start` found the mode, and the register only raises the timer's vector.
        unsafe { msr::write(TSC_DEADLINE, deadline.max(1)) };
    } else {
        let Some(left) = deadline.checked_sub(time::tsc()) else {
            // The counter would take a moment.
            apic::write(Register::InitialCount, 0);
            return apic::send_ipi(cpu::current_id(), VECTOR.load(Ordering::Relaxed));
        };
        let ticks = time::tsc_to_apic(left);
        apic::write(
            Register::InitialCount,
            ticks.clamp(1, u64::from(u32::MAX)) as u32,
        );
    }
}

/// For the handler of the timer's interrupt: whether the deadline that was armed has come.
///
/// It says so once. Before the deadline the timer is armed again for what is left, so that
/// whoever waits for it can rely on one interrupt that counts, and that it is not early.
#[inline]
pub fn is_due() -> bool {
    let deadline = armed().load(Ordering::Relaxed);
    if deadline == NEVER {
        return false;
    }
    if time::tsc() < deadline {
        set(deadline);
        return false;
    }
    armed().store(NEVER, Ordering::Relaxed);
    true
}

/// Takes back what [`arm`] set.
#[inline]
pub fn disarm() {
    armed().store(NEVER, Ordering::Relaxed);
    if uses_deadline() {
        // SAFETY: as in `set`; zero disarms.
        unsafe { msr::write(TSC_DEADLINE, 0) };
    } else {
        apic::write(Register::InitialCount, 0);
    }
}

/// Runs the counter from its top without interrupts, for calibration.
pub(crate) fn count_freely() {
    apic::write(Register::Divide, DIVIDE_BY_1);
    apic::write(Register::LvtTimer, MASKED);
    apic::write(Register::InitialCount, u32::MAX);
}

/// Counts since [`count_freely`].
pub(crate) fn counted() -> u32 {
    u32::MAX - apic::read(Register::CurrentCount)
}
