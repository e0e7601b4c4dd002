//! Starting the other processors (Intel SDM vol. 3, 10.4; AMD APM vol. 2, 16.5.1).

use core::sync::atomic::{AtomicUsize, Ordering};

use x86_64::registers::control::{Efer, EferFlags};

use crate::{apic, memory, time};

/// Where they start: a page below 1 MiB that firmware leaves alone once the loader has run. The vector
/// of the start-up message is its number.
pub(crate) const START_PAGE: u64 = 0x8000;
const STACK: u64 = 256 << 10;

/// How long a processor gets to arrive. Emulators that run all processors in turn are slow at it.
const PATIENCE_NS: u64 = 1_000_000_000;

static WORK: AtomicUsize = AtomicUsize::new(0);
/// The number of the processor that arrived last.
static ARRIVED: AtomicUsize = AtomicUsize::new(0);
static FINISHED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    static rt_ap_start: u8;
    static rt_ap_end: u8;
    static rt_ap_arguments: [u64; 4];
}

/// A processor that was asked to start and did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its number.
    pub id: usize,
    /// Its local APIC number.
    pub apic_id: u32,
}

impl core::fmt::Display for Missing {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "processor {} (APIC {}) did not start",
            self.id, self.apic_id
        )
    }
}

/// Starts every other processor and has each run `work` with its number, interrupts off, on its own stack.
///
/// Returns when all of them run it. A processor whose `work` returns halts for good; see [`finished`].
///
/// # Errors
/// Names the first processor that did not start within a second.
///
/// # Panics
/// If called twice.
pub fn start_all(work: fn(usize)) -> Result<(), Missing> {
    let before = WORK.swap(work as usize, Ordering::SeqCst);
    assert!(before == 0, "the processors have been started already");
    let length = &raw const rt_ap_end as usize - &raw const rt_ap_start as usize;
    let page = START_PAGE as *mut u8;
    // SAFETY: the page is mapped, not managed by the allocator, and large enough (see the assembly);
    // the arguments are part of what is copied.
    let arguments = unsafe {
        core::ptr::copy_nonoverlapping(&raw const rt_ap_start, page, length);
        let offset = &raw const rt_ap_arguments as usize - &raw const rt_ap_start as usize;
        page.add(offset).cast::<u64>()
    };
    for id in 1..super::count() {
        let stack =
            memory::reserve(STACK + memory::FRAME, memory::FRAME).expect("no memory for a stack");
        // SAFETY: the stack's lowest page holds nothing and never will.
        unsafe { memory::paging::guard(stack) };
        // SAFETY: see above; the previous processor has taken its copy, since it has arrived.
        unsafe {
            arguments.write_volatile(memory::paging::root());
            arguments
                .add(1)
                .write_volatile(stack + memory::FRAME + STACK);
            arguments.add(2).write_volatile(id as u64);
            // The page tables use the no-execute bit, so it must be on before paging is.
            arguments
                .add(3)
                .write_volatile(Efer::read_raw() & EferFlags::NO_EXECUTE_ENABLE.bits());
        }
        start(id)?;
    }
    Ok(())
}

fn start(id: usize) -> Result<(), Missing> {
    let apic_id = super::apic_id(id);
    apic::send_init(apic_id);
    time::delay_ns(10_000_000);
    // The second message is for processors that missed the first; a running one ignores it.
    for patience in [200_000, PATIENCE_NS] {
        apic::send_startup(apic_id, (START_PAGE >> 12) as u8);
        let deadline = time::now_ns() + patience;
        while time::now_ns() < deadline {
            if ARRIVED.load(Ordering::Acquire) == id {
                return Ok(());
            }
            core::hint::spin_loop();
        }
    }
    Err(Missing { id, apic_id })
}

/// How many processors' work has returned.
pub fn finished() -> usize {
    FINISHED.load(Ordering::Acquire)
}

/// The assembly below calls this in long mode.
#[unsafe(no_mangle)]
extern "C" fn rt_ap_main(id: usize) -> ! {
    // SAFETY: `start_all` gives each processor its number once, and this runs first.
    unsafe { super::enter(id) };
    apic::init_this_cpu();
    ARRIVED.store(id, Ordering::Release);
    let work = WORK.load(Ordering::SeqCst);
    // SAFETY: `start_all` stored a function of this type before any processor was started.
    let work: fn(usize) = unsafe { core::mem::transmute(work) };
    work(id);
    FINISHED.fetch_add(1, Ordering::AcqRel);
    super::halt();
}

#[cfg(not(test))]
core::arch::global_asm!(include_str!("smp.s"), options(att_syntax));
