//! A guest that measures what its exits cost.
//!
//! It prints one `NAME TICKS` line for each kind of exit: the TSC ticks that one execution of the
//! instruction takes, exit and resume included, with the cost of the loop and of reading the TSC taken
//! off. Where the TSC counts instructions (QEMU's `-icount shift=0`, Bochs) the figures are exact. It
//! asks nothing of its hypervisor that another guest would not, so the figures of different hypervisors
//! can be compared.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::{Boot, msr, println, time, timer};

testudo_rt::entry!(main);

/// Executions in one measurement.
const TIMES: u64 = 1000;
/// Measurements, of which the lowest counts: interrupts of the host only ever add.
const ROUNDS: usize = 5;

const IA32_TSC_ADJUST: u32 = 0x3b;
/// COM1's scratch register, which every PC's UART has and which does nothing.
const SCRATCH_PORT: u16 = 0x3ff;
const TIMER: u8 = 0x40;
const SOFTWARE: u8 = 0x41;

fn main(_: &'static Boot) -> u8 {
    let mut status = 0;
    report("cpuid", Some(cost(cpuid)));
    let hypercall = hypercall();
    let adjust = msr::try_read(IA32_TSC_ADJUST);
    for (name, ticks) in [
        ("hypercall", hypercall.map(cost)),
        ("msr", adjust.map(|_| cost(write_msr))),
        ("pio", Some(cost(read_port))),
        ("hlt_wake", Some(hlt_wake())),
    ] {
        if ticks.is_none() {
            status = 1;
        }
        report(name, ticks);
    }
    status
}

fn report(name: &str, ticks: Option<u64>) {
    match ticks {
        Some(ticks) => println!("{name} {ticks}"),
        None => println!("{name} is refused here"),
    }
}

/// The ticks that one call takes beyond a call of nothing.
fn cost(work: fn()) -> u64 {
    fn nothing() {}
    let empty = total(nothing);
    (total(work).saturating_sub(empty) + TIMES / 2) / TIMES
}

#[inline(never)]
fn total(work: fn()) -> u64 {
    let work = core::hint::black_box(work);
    let round = || {
        let start = time::tsc();
        for _ in 0..TIMES {
            work();
        }
        time::tsc() - start
    };
    (0..ROUNDS).map(|_| round()).min().unwrap_or(0)
}

fn cpuid() {
    // SAFETY: CPUID changes the registers that are declared, and RBX is put back.
    unsafe {
        asm!(
            "mov {rbx}, rbx", "xor eax, eax", "cpuid", "mov rbx, {rbx}",
            rbx = out(reg) _, out("eax") _, out("ecx") _, out("edx") _,
            options(nomem, nostack),
        );
    }
}

/// A hypercall that no hypervisor knows, in the processor's dialect.
macro_rules! hypercall {
    ($instruction:literal) => {{
        fn call() {
            // SAFETY: an unknown hypercall is answered with an error in RAX.
            unsafe { asm!($instruction, inout("rax") 0xffff_u64 => _, options(nomem, nostack)) };
        }
        call as fn()
    }};
}

/// The hypercall instruction, if the hypervisor takes it.
fn hypercall() -> Option<fn()> {
    static REFUSED: AtomicU64 = AtomicU64::new(0);
    fn refused(frame: &mut TrapFrame) {
        REFUSED.store(1, Ordering::SeqCst);
        // Both instructions have three bytes.
        frame.rip += 3;
    }
    let call = match __cpuid(0).ebx.to_le_bytes() {
        // "GenuineIntel" begins so.
        [b'G', b'e', b'n', b'u'] => hypercall!("vmcall"),
        _ => hypercall!("vmmcall"),
    };
    irq::set_handler(6, refused);
    call();
    irq::clear_handler(6);
    (REFUSED.load(Ordering::SeqCst) == 0).then_some(call)
}

fn write_msr() {
    // SAFETY: `main` has read the register, so it exists; zero leaves the TSC as it is.
    unsafe { msr::write(IA32_TSC_ADJUST, 0) };
}

fn read_port() {
    // SAFETY: the UART's scratch register does nothing.
    core::hint::black_box(unsafe { testudo_rt::port::read_u8(SCRATCH_PORT) });
}

static ARRIVED: AtomicU64 = AtomicU64::new(0);

fn arrived(_: &mut TrapFrame) {
    ARRIVED.store(time::tsc(), Ordering::Relaxed);
}

/// The ticks from a timer's deadline to its handler in a halted guest, beyond what the way into a
/// handler costs by itself.
fn hlt_wake() -> u64 {
    const DELAY: u64 = 2_000_000;
    irq::set_handler(TIMER, arrived);
    irq::set_handler(SOFTWARE, arrived);
    let own = || {
        let start = time::tsc();
        // SAFETY: the vector has a handler that returns.
        unsafe { asm!("int {}", const SOFTWARE) };
        ARRIVED.load(Ordering::Relaxed) - start
    };
    let own = (0..ROUNDS).map(|_| own()).min().unwrap_or(0);
    timer::start(TIMER);
    let wake = || {
        let deadline = time::tsc() + DELAY;
        timer::arm(deadline);
        ARRIVED.store(0, Ordering::Relaxed);
        while ARRIVED.load(Ordering::Relaxed) == 0 {
            irq::wait();
        }
        ARRIVED.load(Ordering::Relaxed).saturating_sub(deadline)
    };
    let wake = (0..ROUNDS * 4).map(|_| wake()).min().unwrap_or(0);
    timer::disarm();
    wake.saturating_sub(own)
}
