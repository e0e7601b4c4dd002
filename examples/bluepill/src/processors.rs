//! The processors among one another: INIT and start-up messages of the guest, without the hardware's.
//!
//! A processor that the guest has not started waits in the hypervisor, as the hardware would have it wait
//! for a start-up message. One that runs the guest is called out of it by an NMI, the one event that
//! the hypervisor takes from the guest; the sender waits until it has arrived, so that it cannot
//! be taken for an NMI of the guest's own.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{Gprs, Segment};
use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::{cpu, time};
use testudo_vmx::hw::called_off;

use crate::apic::{self, Command, Target};

/// It runs the guest.
const RUNNING: u32 = 0;
/// It has been sent INIT.
const INIT: u32 = 1;
/// It waits for a start-up message.
const WAITING: u32 = 2;
/// It has been sent INIT, which does not reach it before it has left VMX operation.
const PUT_OFF: u32 = 3;
/// With the page's number: it has been sent a start-up message.
const STARTUP: u32 = 0x100;

const NMI_VECTOR: u8 = 2;
/// #SX: INIT, where VM_CR.R_INIT redirects it (APM vol. 2, 8.2.27 and 15.28).
const SECURITY_VECTOR: u8 = 30;

/// How long a processor gets to take a message. It is longer on its way only if it runs firmware (SMM), or if
/// the guest never leaves an NMI handler.
const PATIENCE_NS: u64 = 10_000_000;

/// One processor, as the others see it.
struct Processor {
    state: AtomicU32,
    /// An NMI for the hypervisor is on its way.
    called: AtomicBool,
    /// An NMI for the guest has arrived.
    nmi: AtomicBool,
    /// Not 0 since an NMI has arrived, for whomever.
    looked_for: AtomicU32,
}

static PROCESSORS: [Processor; cpu::MAX] = [const {
    Processor {
        state: AtomicU32::new(WAITING),
        called: AtomicBool::new(false),
        nmi: AtomicBool::new(false),
        looked_for: AtomicU32::new(0),
    }
}; cpu::MAX];

/// How a processor that runs the hypervisor lets NMIs in.
pub(crate) trait Nmis {
    /// Lets in those that wait.
    fn take(&mut self);

    /// Works with NMIs let in, and without interrupts.
    fn admit(&mut self, work: impl FnOnce());
}

/// What a processor is to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Begin at the reset vector: INIT on the processor that boots.
    Reset,
    /// Begin in real mode at this page.
    Start(u8),
}

impl Order {
    /// The registers with which a processor begins (APM vol. 2, table 14-1; SDM vol. 3A, table 10-1).
    pub(crate) fn registers(self, cpuid: &Cpuid) -> (SystemRegisters, Gprs) {
        let mut system = SystemRegisters::reset();
        if let Self::Start(page) = self {
            system.cs = Segment {
                selector: u16::from(page) << 8,
                base: u64::from(page) << 12,
                ..system.cs
            };
            system.rip = 0;
        }
        let [signature, ..] = cpuid.query(1, 0);
        let gprs = Gprs {
            rdx: u64::from(signature),
            ..Gprs::default()
        };
        (system, gprs)
    }
}

/// Takes over NMIs, and INIT where the processor redirects it.
pub(crate) fn prepare() {
    irq::set_handler(NMI_VECTOR, |frame| {
        let own = &PROCESSORS[cpu::current_id()];
        if !own.called.swap(false, Ordering::AcqRel) {
            own.nmi.store(true, Ordering::Relaxed);
        }
        own.looked_for.store(1, Ordering::Release);
        skip_halt(frame);
        if let Some(rip) = called_off(frame.rip) {
            frame.rip = rip;
        }
    });
    irq::set_handler(SECURITY_VECTOR, |frame| {
        init_one(cpu::current_id());
        skip_halt(frame);
    });
}

/// Says that this processor runs the guest.
pub(crate) fn set_running(id: usize) {
    PROCESSORS[id].state.store(RUNNING, Ordering::Release);
}

/// Whether somebody wants something of this processor.
#[inline]
pub(crate) fn has_order(id: usize) -> bool {
    !matches!(
        PROCESSORS[id].state.load(Ordering::Acquire),
        RUNNING | PUT_OFF
    )
}

/// The word that an NMI makes other than 0, for an entry that one may call off: cleared here, so before
/// anything is looked for.
pub(crate) fn begin_to_look(id: usize) -> &'static AtomicU32 {
    let word = &PROCESSORS[id].looked_for;
    word.store(0, Ordering::SeqCst);
    word
}

/// Puts an INIT off that the guest's processor does not take in its present state (SDM vol. 3C, 26.8), until
/// [`take_up`]; meanwhile neither another one nor a start-up message has an effect on it.
pub(crate) fn put_off(id: usize) {
    let state = &PROCESSORS[id].state;
    // Nobody else changes a state of `INIT` but by a start-up message, which is lost then.
    state.store(PUT_OFF, Ordering::Release);
}

/// Takes up an INIT that was put off.
pub(crate) fn take_up(id: usize) {
    let state = &PROCESSORS[id].state;
    let _running = state.compare_exchange(PUT_OFF, INIT, Ordering::AcqRel, Ordering::Relaxed);
}

/// Takes note of an NMI that arrived for the guest.
pub(crate) fn take_guest_nmi(id: usize) -> bool {
    PROCESSORS[id].nmi.swap(false, Ordering::Relaxed)
}

/// Waits, as after INIT, for what this processor is to do.
pub(crate) fn wait_for_order(id: usize, nmis: &mut impl Nmis) -> Order {
    let state = &PROCESSORS[id].state;
    loop {
        let now = state.load(Ordering::Acquire);
        let (next, order) = match now {
            // The processor that boots begins anew by itself; no other one is ever `RUNNING` here.
            INIT | RUNNING | PUT_OFF if id == 0 => (RUNNING, Some(Order::Reset)),
            INIT | RUNNING | PUT_OFF => (WAITING, None),
            WAITING => {
                nmis.admit(|| halt_while(state.as_ptr(), WAITING));
                continue;
            }
            page => (RUNNING, Some(Order::Start(page as u8))),
        };
        let changed = state.compare_exchange(now, next, Ordering::AcqRel, Ordering::Relaxed);
        if let (Ok(_), Some(order)) = (changed, order) {
            // What came meanwhile was for a processor that waits.
            PROCESSORS[id].nmi.store(false, Ordering::Relaxed);
            return order;
        }
    }
}

/// Carries out what a message of the guest's to its processors asks for.
pub(crate) fn carry_out(own: usize, command: Command, nmis: &mut impl Nmis) {
    match command {
        Command::Pass | Command::Drop => {}
        Command::Init(target) => init(own, target, nmis),
        Command::Startup(target, page) => start_up(own, target, page, nmis),
    }
}

/// Carries out an INIT message of the guest's.
fn init(own: usize, target: Target, nmis: &mut impl Nmis) {
    for id in chosen(own, target) {
        if init_one(id) && id != own {
            call(id, nmis);
        }
    }
}

/// Carries out a start-up message of the guest's.
fn start_up(own: usize, target: Target, page: u8, nmis: &mut impl Nmis) {
    for id in chosen(own, target) {
        let order = STARTUP | u32::from(page);
        let accept = |now| matches!(now, INIT | WAITING).then_some(order);
        let state = &PROCESSORS[id].state;
        let accepted = state.fetch_update(Ordering::AcqRel, Ordering::Acquire, accept);
        if accepted.is_ok() && id != own {
            call(id, nmis);
        }
    }
}

/// Notes INIT for a processor; whether that is news to it.
pub(crate) fn init_one(id: usize) -> bool {
    let accept = |now| (!matches!(now, WAITING | INIT | PUT_OFF)).then_some(INIT);
    let state = &PROCESSORS[id].state;
    state
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, accept)
        .is_ok()
}

fn chosen(own: usize, target: Target) -> impl Iterator<Item = usize> {
    (0..cpu::count()).filter(move |&id| match target {
        Target::One(number) => cpu::apic_id(id) == number,
        Target::All => true,
        Target::Others => id != own,
    })
}

/// Has a processor look at its state, wherever it is.
fn call(id: usize, nmis: &mut impl Nmis) {
    let called = &PROCESSORS[id].called;
    if called.swap(true, Ordering::AcqRel) {
        return;
    }
    apic::send_nmi(cpu::apic_id(id));
    let deadline = time::now_ns().saturating_add(PATIENCE_NS);
    while called.load(Ordering::Acquire) && time::now_ns() < deadline {
        // It may be calling us at the same time.
        nmis.take();
        core::hint::spin_loop();
    }
}

/// Has this processor leave its guest as soon as it has entered it. (An NMI of the guest's own that arrives at the very
/// same time is taken for it.)
pub(crate) fn call_back(own: usize) {
    if !PROCESSORS[own].called.swap(true, Ordering::AcqRel) {
        apic::send_nmi(cpu::apic_id(own));
    }
}

unsafe extern "C" {
    static pill_halt_from: u8;
    static pill_halt_to: u8;
}

/// Halts if `*state` is `value`. An NMI ends it, also one that arrives between the test and HLT
/// ([`skip_halt`]).
#[unsafe(naked)]
extern "C" fn halt_while(state: *const u32, value: u32) {
    naked_asm!(
        ".global pill_halt_from",
        "pill_halt_from:",
        "cmp dword ptr [rdi], esi",
        "jne 2f",
        "hlt",
        ".global pill_halt_to",
        "pill_halt_to:",
        "2:",
        "ret",
    )
}

/// Lets interrupted code not halt for what the interrupt has just brought.
fn skip_halt(frame: &mut TrapFrame) {
    let window = &raw const pill_halt_from as u64..&raw const pill_halt_to as u64;
    if window.contains(&frame.rip) {
        frame.rip = window.end;
    }
}
