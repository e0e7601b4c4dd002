//! The bare machine as the virtual ones' host: the vCPUs of a guest run on consecutive processors.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::Once;
use testudo_machine::Host;
use testudo_rt as rt;

/// The interrupt that a kick sends, the timer's, and the serial port's.
const KICK: u8 = 0x40;
const TIMER: u8 = 0x41;
const SERIAL: u8 = 0x42;

/// As many processors as the runtime can start.
const MAX_CPUS: usize = 64;

/// Whether a kick came since the vCPU last waited. Interrupt handlers set it too, so that a wait
/// that races with its interrupt ends.
static KICKED: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

/// The ticks of the time-stamp counter that vCPUs have waited, if they are counted.
static WAITED: AtomicU64 = AtomicU64::new(0);
static COUNT_WAITS: AtomicBool = AtomicBool::new(false);

/// Has waits counted from now on.
pub(crate) fn count_waits() {
    COUNT_WAITS.store(true, Ordering::Relaxed);
}

/// The ticks that vCPUs have waited.
pub(crate) fn waited() -> u64 {
    WAITED.load(Ordering::Relaxed)
}

fn wake() {
    KICKED[rt::cpu::current_id()].store(true, Ordering::Release);
}

/// This machine, as one guest has it.
pub(crate) struct BareMetal {
    /// The processor of the guest's first vCPU.
    first: usize,
}

impl BareMetal {
    /// Takes the interrupts that it needs.
    pub(crate) fn new(first: usize) -> Self {
        rt::irq::set_handler(KICK, |_| wake());
        rt::irq::set_handler(TIMER, |_| {
            if rt::timer::is_due() {
                wake();
            }
        });
        Self { first }
    }

    /// Prepares this processor's timer.
    pub(crate) fn start_timer() {
        rt::timer::start(TIMER);
    }
}

static CONSOLE: Once<fn(u8)> = Once::new();

/// Has what arrives at the serial port passed on, by an interrupt on this processor.
pub(crate) fn attach_console(receive: fn(u8)) {
    CONSOLE.call_once(|| receive);
    rt::irq::set_handler(SERIAL, |_| {
        while let Some(byte) = rt::serial::read_byte() {
            if let Some(receive) = CONSOLE.get() {
                receive(byte);
            }
        }
    });
    rt::serial::enable_rx_irq(SERIAL);
}

impl Host for BareMetal {
    fn now(&self) -> u64 {
        rt::time::now_ns()
    }

    fn tsc(&self) -> u64 {
        rt::time::tsc()
    }

    fn tsc_hz(&self) -> u64 {
        rt::time::tsc_hz()
    }

    fn kick(&self, vcpu: usize) {
        let processor = self.first + vcpu;
        KICKED[processor].store(true, Ordering::Release);
        if processor != rt::cpu::current_id() {
            rt::apic::send_ipi(processor, KICK);
        }
    }

    fn set_timer(&self, deadline: Option<u64>) {
        match deadline {
            Some(deadline) => rt::timer::arm(rt::time::tsc_at(deadline)),
            None => rt::timer::disarm(),
        }
    }

    fn wait(&self) {
        let kicked = &KICKED[rt::cpu::current_id()];
        rt::irq::disable();
        let start = COUNT_WAITS.load(Ordering::Relaxed).then(rt::time::tsc);
        while !kicked.swap(false, Ordering::Acquire) {
            rt::irq::wait();
        }
        if let Some(start) = start {
            let ticks = rt::time::tsc().wrapping_sub(start);
            WAITED.fetch_add(ticks, Ordering::Relaxed);
        }
    }
}
