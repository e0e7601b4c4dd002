//! The exit loop of one vCPU.
//!
//! Everything a vCPU owns is here and needs no lock: its registers, its half of the local APIC,
//! its model-specific registers. Before each entry the loop looks at one atomic word; if it is
//! zero and nothing happened that could matter, it enters at once.

mod instructions;

use core::num::NonZeroU32;

use testudo_arch::memory::BroughtIn;
use testudo_arch::regs::{Gprs, SystemRegisters};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Event, Exception, Gpa, GuestMemory, Msr, Segment};

use crate::boot::BootState;
use crate::device::PowerEvent;
use crate::emulate::{self, EmulateError, Intercept, Outcome};
use crate::guest_cpu::GuestCpu;
use crate::host::Host;
use crate::irq::{Lapic, request};
use crate::machine::Machine;
use crate::paged::FORGET;
use crate::policy::msr::MsrPolicy;
use crate::stats::ExitStats;
use crate::stop::{Stop, StopReason};
use crate::vcpu::{InitSignal, MemoryAccess, Vcpu, VmExit};

/// What a vCPU does at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// It executes.
    Running,
    /// It has halted and waits for an interrupt.
    Halted,
    /// It waits for a start-up IPI, as application processors do after reset and INIT.
    WaitsForStartup,
}

/// How often nested state was saved and restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Renewals {
    /// In all.
    pub all: u64,
    /// While the guest's own guest ran.
    pub within_guest: u64,
}

#[derive(Clone, Copy)]
struct Renewal {
    every: NonZeroU32,
    left: u32,
    renewals: Renewals,
}

/// A vCPU and everything that it alone uses.
pub struct VcpuLoop<'m, V, M> {
    machine: &'m Machine<M>,
    vcpu: V,
    lapic: Lapic,
    msrs: MsrPolicy,
    index: usize,
    activity: Activity,
    /// Something happened that may need an interrupt delivered or a timer set.
    attention: bool,
    /// An NMI was sent and the vCPU could not take it yet.
    nmi: bool,
    /// An INIT was sent and has done nothing yet.
    init: bool,
    /// The guest's IA32_TSC_ADJUST.
    tsc_adjust: u64,
    /// When something is due next, in the host's nanoseconds.
    deadline: Option<u64>,
    /// What the host's timer was last set to.
    timer: Option<u64>,
    /// What the vCPU's own timer was last set to, and what the host's TSC is then.
    turn: (Option<u64>, Option<u64>),
    stats: Option<ExitStats>,
    renewal: Option<Renewal>,
    /// `stats` or `renewal` want to know of every exit.
    watched: bool,
    /// Where an instruction ends that the emulator left to the machine.
    emulated_next: Option<u64>,
}

impl<'m, V: Vcpu, M: GuestMemory> VcpuLoop<'m, V, M> {
    /// The loop of the vCPU that `lapic` belongs to. vCPU 0 starts in `boot`; the others wait for
    /// a start-up IPI.
    pub fn new(
        machine: &'m Machine<M>,
        mut vcpu: V,
        lapic: Lapic,
        boot: Option<&BootState>,
    ) -> Self {
        let activity = match boot {
            Some(boot) => {
                vcpu.set_system(&boot.system);
                *vcpu.gprs_mut() = boot.gprs;
                Activity::Running
            }
            None => Activity::WaitsForStartup,
        };
        let mut msrs = MsrPolicy::new(u32::from(machine.physical_bits));
        if machine.pschange_mc_no {
            msrs = msrs.with_pschange_mc_no();
        }
        Self {
            index: lapic.id() as usize,
            machine,
            vcpu,
            lapic,
            msrs,
            activity,
            attention: true,
            nmi: false,
            init: false,
            tsc_adjust: 0,
            deadline: None,
            timer: None,
            turn: (None, None),
            stats: None,
            renewal: None,
            watched: false,
            emulated_next: None,
        }
    }

    /// Has what the exits cost counted.
    #[must_use]
    pub fn with_stats(mut self) -> Self {
        self.stats = Some(ExitStats::default());
        self.watched = true;
        self
    }

    /// Has the nested state saved and restored every so many times that the host or an open window ended
    /// the guest's turn: as a migration would, but that the vCPU stays. For tests of that.
    #[must_use]
    pub fn with_renewal(mut self, turns: NonZeroU32) -> Self {
        self.renewal = Some(Renewal {
            every: turns,
            left: turns.get(),
            renewals: Renewals::default(),
        });
        self.watched = true;
        self
    }

    /// How often that happened.
    pub fn renewals(&self) -> Renewals {
        self.renewal
            .map_or(Renewals::default(), |renewal| renewal.renewals)
    }

    /// What the exits cost, if it was counted.
    pub fn stats(&self) -> Option<ExitStats> {
        let mut stats = self.stats?;
        if let Some(settled) = self.vcpu.settled() {
            stats.add_settled(&settled);
        }
        Some(stats)
    }

    /// Runs until the machine stops.
    pub fn run(&mut self) -> Stop {
        loop {
            if self.attention
                && let Some(stop) = self.attend()
            {
                return stop;
            }
            match self.vcpu.run(self.lapic.requests()) {
                Ok(exit) if self.watched => self.handle_watched(exit),
                Ok(VmExit::Cpuid) => self.cpuid(),
                Ok(exit) => self.handle(exit),
                Err(error) => return self.stop(StopReason::Backend(error)),
            }
        }
    }

    /// Looks at everything that happened meanwhile; waits if the vCPU has nothing to execute.
    fn attend(&mut self) -> Option<Stop> {
        loop {
            if let Some(stop) = self.machine.stopped() {
                return Some(stop);
            }
            self.service();
            if self.activity == Activity::Running {
                return None;
            }
            let host = &self.machine.host;
            self.vcpu.outside(|| host.wait());
        }
    }

    #[cold]
    fn handle_watched(&mut self, exit: VmExit) {
        let start = self.machine.host.tsc();
        self.handle(exit);
        let ticks = self.machine.host.tsc().wrapping_sub(start);
        if let Some(stats) = &mut self.stats {
            stats.record(&exit, ticks);
        }
        let Some(renewal) = &mut self.renewal else {
            return;
        };
        // At other exits than these it is rarely the guest's own guest that runs.
        if !matches!(exit, VmExit::Interrupted | VmExit::InterruptWindow) {
            return;
        }
        renewal.left -= 1;
        if renewal.left == 0 {
            renewal.left = renewal.every.get();
            self.renew_nested();
        }
    }

    /// The nested state goes through its bytes.
    fn renew_nested(&mut self) {
        let saved = match self.vcpu.save_nested() {
            Ok(Some(saved)) => saved,
            Ok(None) => return,
            Err(error) => return self.fail(StopReason::Backend(error)),
        };
        self.attention = true;
        match self.vcpu.restore_nested(&saved) {
            Ok(within_guest) => {
                if let Some(Renewal { renewals, .. }) = &mut self.renewal {
                    renewals.all += 1;
                    renewals.within_guest += u64::from(within_guest);
                }
            }
            Err(error) => self.fail(StopReason::NestedState(error)),
        }
    }

    /// Stops the machine, unless somebody else did first; gives the stop that counts.
    fn stop(&mut self, reason: StopReason) -> Stop {
        self.vcpu.load_rsp();
        let (gprs, system) = (*self.vcpu.gprs(), self.vcpu.system());
        self.machine.stop(Stop {
            reason,
            vcpu: self.index,
            gprs,
            system,
        })
    }

    /// Looks at requests, timers and interrupts before an entry.
    fn service(&mut self) {
        self.attention = false;
        self.lapic.sync();
        let handled = request::DEVICE_TIMERS | FORGET;
        let requests = self.lapic.requests();
        let requests = requests.fetch_and(!handled, core::sync::atomic::Ordering::Acquire);
        if requests & FORGET != 0 {
            self.forget_memory();
        }
        self.poll_timers();
        self.init |= self.lapic.take_init();
        if self.init {
            self.init_signal();
        }
        if let Some(page) = self.lapic.take_startup()
            && self.activity == Activity::WaitsForStartup
        {
            self.start_up(page);
        }
        self.nmi |= self.lapic.take_nmi();
        if self.activity != Activity::WaitsForStartup {
            self.deliver();
        }
        self.set_timer();
    }

    /// Memory was taken from the guest: neither this vCPU nor its processor knows it any more.
    #[cold]
    fn forget_memory(&mut self) {
        let Some(shootdown) = &self.machine.shootdown else {
            return;
        };
        if let Some(page) = shootdown.exhausted() {
            return self.fail(StopReason::OutOfMemory(page));
        }
        // What is forgotten is everything from before this number.
        let last = shootdown.last();
        match self.vcpu.forget_memory() {
            Ok(()) => shootdown.acknowledge(self.index, last),
            Err(error) => self.fail(StopReason::Backend(error)),
        }
    }

    /// When something is due next: vCPU 0 watches the devices, and the time that the machine has.
    #[inline]
    fn next_deadline(&self) -> Option<u64> {
        let own = self.lapic.next_deadline();
        if self.index != 0 {
            return own;
        }
        let devices = self.machine.timers.next_deadline();
        earlier(earlier(own, devices), self.machine.end)
    }

    /// Lets due timers fire, and finds out when the next is due.
    fn poll_timers(&mut self) {
        let mut deadline = self.next_deadline();
        if deadline.is_some() {
            let now = self.machine.host.now();
            if deadline.is_some_and(|at| at <= now) {
                self.lapic.poll_timer(now);
                if self.index == 0 {
                    self.machine.timers.poll(now);
                    self.lapic.sync();
                    if self.machine.end.is_some_and(|end| end <= now) {
                        self.fail(StopReason::TimeIsUp);
                    }
                }
                deadline = self.next_deadline();
                // The host's timer has fired or is about to: it must be set again.
                self.timer = None;
            }
        }
        self.deadline = deadline;
    }

    /// Has the guest's turn, or the wait for something to do, end when the next timer is due.
    fn set_timer(&mut self) {
        let (deadline, host) = (self.deadline, &self.machine.host);
        if self.activity == Activity::Running {
            if deadline != self.turn.0 {
                let at = deadline.map(|at| host.tsc().saturating_add(ticks_until(at, &**host)));
                self.turn = (deadline, at);
            }
            if self.vcpu.set_deadline(self.turn.1) {
                return;
            }
        }
        if deadline != self.timer {
            host.set_timer(deadline);
            self.timer = deadline;
        }
    }

    #[cold]
    fn init_signal(&mut self) {
        match self.vcpu.init_signal() {
            InitSignal::Resets => self.init(),
            InitSignal::Waits => return,
            InitSignal::Exits | InitSignal::Redirected => self.activity = Activity::Running,
        }
        self.init = false;
    }

    /// INIT: the processor as after reset, but for what INIT leaves (SDM vol. 3A, 10.1.1).
    fn init(&mut self) {
        self.lapic.init();
        self.nmi = false;
        self.vcpu.reset();
        // The boot processor starts again at the reset vector, where no firmware is: it would
        // fetch from outside memory. Nobody sends it INIT but to reset the machine.
        if self.index == 0 {
            self.machine.power.raise(PowerEvent::Reset);
            self.check_power();
        }
        self.activity = Activity::WaitsForStartup;
    }

    /// The start-up IPI: real mode at the page it names (SDM vol. 3A, 9.4.4).
    fn start_up(&mut self, page: u8) {
        let selector = u16::from(page) << 8;
        let system = SystemRegisters {
            cs: Segment::real_mode(selector, SegmentAttributes::CODE16),
            rip: 0,
            ..SystemRegisters::reset()
        };
        self.vcpu.set_system(&system);
        self.activity = Activity::Running;
    }

    /// Injects what can be taken now, and asks for a window for what cannot.
    fn deliver(&mut self) {
        self.lapic.set_cr8(self.vcpu.task_priority());
        if self.nmi && self.vcpu.can_take_nmi() {
            self.nmi = false;
            self.activity = Activity::Running;
            self.vcpu.inject(Event::Nmi);
        }
        self.vcpu.set_nmi_window(self.nmi);
        if self.vcpu.delivers_interrupts() {
            // An NMI can have ended a turn of the guest's guest; it has woken it too.
            self.vcpu.take_interrupted();
            return self.let_deliver();
        }
        // A notification that asks anew, as a level does at its end, is only seen by the next `sync`: this has an end.
        while self.lapic.has_interrupt() && self.vcpu.can_take_interrupt() {
            // What is acknowledged for a notification is the local APIC's (SDM vol. 3C, 32.6).
            let of_pic = self.lapic.pic_waits();
            let Some(vector) = self.lapic.acknowledge() else {
                break;
            };
            let notified = match of_pic {
                true => None,
                false => self.vcpu.take_notification(vector),
            };
            let Some(wakes) = notified else {
                self.activity = Activity::Running;
                self.vcpu.inject(Event::Interrupt(vector));
                break;
            };
            self.lapic.end_of_interrupt();
            if wakes && self.activity == Activity::Halted {
                self.activity = Activity::Running;
            }
        }
        self.vcpu.set_interrupt_window(self.lapic.awaited());
        if self.vcpu.take_interrupted() && self.activity == Activity::Halted {
            self.activity = Activity::Running;
        }
        if self.vcpu.virtualizes_apic()
            && let Some(state) = self.lapic.take_state()
        {
            self.vcpu.set_apic(&state);
        }
    }

    /// As [`deliver`](Self::deliver), for a processor that delivers the local APIC's interrupts itself:
    /// only the PIC's are injected, and a halted vCPU runs on.
    fn let_deliver(&mut self) {
        if let Some(state) = self.lapic.take_state() {
            self.vcpu.set_apic(&state);
        }
        let external = self.lapic.pic_waits();
        if (external || self.activity == Activity::Halted) && self.vcpu.can_take_interrupt() {
            if let Some(vector) = self.lapic.acknowledge_pic() {
                self.activity = Activity::Running;
                self.vcpu.inject(Event::Interrupt(vector));
            } else if self.lapic.pending_vector().is_some() {
                self.activity = Activity::Running;
            }
        }
        self.vcpu.set_interrupt_window(self.lapic.awaited());
    }

    #[inline(never)]
    fn handle(&mut self, exit: VmExit) {
        match exit {
            VmExit::Cpuid => self.cpuid(),
            VmExit::Interrupted | VmExit::InterruptWindow => self.attention = true,
            VmExit::DeliveryDue => {
                self.machine.host.set_timer(Some(0));
                // It must be set again for what it was set to before.
                self.timer = None;
            }
            VmExit::EnteredHalted => {
                self.activity = Activity::Halted;
                self.attention = true;
            }
            VmExit::Halt => {
                self.advance();
                self.activity = Activity::Halted;
                self.attention = true;
            }
            VmExit::Idle => self.vcpu.advance(),
            VmExit::ReadMsr(msr) => self.read_msr(msr),
            VmExit::WriteMsr(msr, value) => self.write_msr(msr, value),
            VmExit::SetXcr { index, value } => {
                let done = self.vcpu.system().cpl() == 0 && self.vcpu.set_xcr(index, value);
                self.complete(done);
            }
            VmExit::Port(access) => self.port(access),
            VmExit::StringPort(_) | VmExit::ControlRegister => self.emulate(None),
            VmExit::Emulate(event) => self.emulate_whole(event),
            VmExit::Memory(access) => self.memory(access),
            VmExit::Mmio {
                gpa,
                data,
                size,
                write,
            } => self.mmio(gpa, data, size, write),
            VmExit::ApicWrite { register } => {
                self.lapic.written(register);
                self.attention = true;
            }
            VmExit::EndOfInterrupt(vector) => {
                self.lapic.ended(vector);
                self.attention = true;
            }
            VmExit::Hypercall => self.hypercall(),
            VmExit::CacheFlush => self.vcpu.advance(),
            VmExit::Forbidden => self.raise(Event::UD, None),
            VmExit::Exception { vector, error_code } => {
                self.vcpu.inject(Event::Exception { vector, error_code });
            }
            VmExit::Shutdown => self.fail(StopReason::TripleFault),
            VmExit::InvalidState => self.fail(StopReason::InvalidState),
            VmExit::Unknown { code, info } => self.fail(StopReason::UnknownExit { code, info }),
        }
    }

    #[cold]
    fn fail(&mut self, reason: StopReason) {
        self.stop(reason);
        self.attention = true;
    }

    /// Raises an exception of whoever runs.
    #[cold]
    fn raise(&mut self, event: Event, cr2: Option<u64>) {
        if let Some(exit) = self.vcpu.raise(event, cr2) {
            self.handle(exit);
        }
    }

    /// Whether whoever runs has somebody above it within the machine, who is to hear of what it does
    /// rather than that the machine ends by it: a program its system, and a guest of the guest's its
    /// hypervisor.
    fn is_subordinate(&self) -> bool {
        self.vcpu.runs_nested_guest() || self.vcpu.cpl() == 3
    }

    fn memory(&mut self, access: MemoryAccess) {
        match self.machine.memory.bring_in(access.gpa, access.write) {
            BroughtIn::NothingAway => {}
            BroughtIn::Present => return,
            BroughtIn::NoneLeft => return self.fail(StopReason::OutOfMemory(access.gpa)),
        }
        // What nobody drives reads as ones, and FF FF is no instruction: #UD. A system that gets there
        // by itself has lost its way, and most often has no handler yet either.
        if access.fetch && !self.machine.mmio.claims(access.gpa.0) && !self.is_subordinate() {
            return self.fail(StopReason::FetchOutsideMemory(access.gpa));
        }
        self.emulate(Some(access.gpa));
    }

    /// An access that the backend took apart.
    fn mmio(&mut self, gpa: Gpa, data: u64, size: u8, write: bool) {
        let size = usize::from(size).min(8);
        let mut bytes = data.to_le_bytes();
        let offset = gpa.0 & 0xFFF;
        let is_lapic = self
            .lapic
            .mmio_window()
            .is_some_and(|page| page.0 == gpa.0 - offset);
        match (is_lapic, write) {
            (true, true) => self.lapic.write_mmio(offset, &bytes[..size]),
            (true, false) => self.lapic.read_mmio(offset, &mut bytes[..size]),
            (false, true) => self.machine.mmio.write(gpa.0, &bytes[..size]),
            (false, false) => self.machine.mmio.read(gpa.0, &mut bytes[..size]),
        }
        if !write {
            bytes[size..].fill(0);
            self.vcpu.complete_read(u64::from_le_bytes(bytes));
        }
        self.attention = true;
        self.check_power();
    }

    /// Executes the instruction at RIP by software: because it accesses memory at `gpa`, or for
    /// another reason.
    fn emulate(&mut self, gpa: Option<Gpa>) {
        let machine = self.machine;
        let mut cpu = GuestCpu::new(
            &mut self.vcpu,
            &machine.memory,
            (&machine.mmio, &machine.ports),
            &mut self.lapic,
            machine.physical_bits,
        )
        .accessing(gpa);
        let result = emulate::step(&mut cpu);
        self.attention = true;
        if !cpu.finish() {
            return;
        }
        match result {
            // Only a processor that is emulated as a whole leaves instructions to the machine.
            Ok(Outcome::Done | Outcome::Continue | Outcome::Intercepted { .. }) => {}
            Ok(Outcome::SingleStep) => self.vcpu.single_step(),
            Err(EmulateError::Fault(fault)) => self.raise(fault.event, fault.cr2),
            Err(EmulateError::Unsupported { bytes, .. }) => {
                if gpa.is_some_and(|gpa| self.vcpu.stop_watching(gpa)) {
                    return;
                }
                if self.is_subordinate() {
                    return self.raise(Event::UD, None);
                }
                self.fail(StopReason::Unemulated { bytes });
            }
        }
        self.check_power();
    }

    /// Executes the instruction at RIP, or delivers an event, for a processor that cannot run the
    /// guest as it is.
    fn emulate_whole(&mut self, event: Option<Event>) {
        let machine = self.machine;
        let mut cpu = GuestCpu::new(
            &mut self.vcpu,
            &machine.memory,
            (&machine.mmio, &machine.ports),
            &mut self.lapic,
            machine.physical_bits,
        )
        .whole();
        let result = match event {
            Some(event) => emulate::deliver(&mut cpu, event)
                .map(|()| Outcome::Done)
                .map_err(EmulateError::from),
            None => emulate::step(&mut cpu),
        };
        self.attention = true;
        if !cpu.finish() {
            return;
        }
        match result {
            Ok(Outcome::Done | Outcome::Continue) => self.check_power(),
            Ok(Outcome::SingleStep) => self.vcpu.inject(Event::fault(Exception::Debug)),
            Ok(Outcome::Intercepted { what, next }) => self.intercepted(what, next),
            // A fault in the delivery of an event, where there is nothing to fall back on.
            Err(EmulateError::Fault(_)) if event.is_some() => self.fail(StopReason::TripleFault),
            Err(EmulateError::Fault(fault)) => self.raise(fault.event, fault.cr2),
            Err(EmulateError::Unsupported { bytes, .. }) => {
                self.fail(StopReason::Unemulated { bytes });
            }
        }
    }

    /// An instruction that the emulator leaves to the machine; it ends at `next`.
    fn intercepted(&mut self, what: Intercept, next: u64) {
        self.emulated_next = Some(next);
        match what {
            Intercept::Cpuid => {
                self.answer_cpuid();
                self.advance();
            }
            Intercept::Halt => self.handle(VmExit::Halt),
            Intercept::CacheFlush => self.advance(),
            Intercept::ReadMsr => {
                let msr = Msr(self.vcpu.gprs().rcx as u32);
                self.read_msr(msr);
            }
            Intercept::WriteMsr => {
                let Gprs { rax, rcx, rdx, .. } = *self.vcpu.gprs();
                self.write_msr(Msr(rcx as u32), rdx << 32 | rax & 0xFFFF_FFFF);
            }
            Intercept::ReadTsc => {
                let tsc = self.vcpu.guest_tsc(self.machine.host.tsc());
                let gprs = self.vcpu.gprs_mut();
                (gprs.rax, gprs.rdx) = (tsc & 0xFFFF_FFFF, tsc >> 32);
                self.advance();
            }
        }
        self.emulated_next = None;
    }

    /// Ends the instruction that exited, or that the emulator left to the machine.
    #[inline]
    fn advance(&mut self) {
        match self.emulated_next {
            None => self.vcpu.advance(),
            Some(next) => self.vcpu.set_rip(next),
        }
    }

    /// Whether a device was told to end the run.
    #[inline]
    fn check_power(&mut self) {
        let reason = match self.machine.power.get() {
            None => return,
            Some(PowerEvent::PowerOff) => StopReason::PowerOff,
            Some(PowerEvent::Reset) => StopReason::Reset,
            Some(PowerEvent::Exit(status)) => StopReason::Exit(status),
        };
        self.fail(reason);
    }
}

/// The earlier of two times, as far as there are any. (An iterator over an array of them takes a
/// thousand instructions.)
#[inline]
fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, None) => one,
        (None, other) => other,
    }
}

/// How many ticks of the host's TSC there are until `at`, rounded up.
fn ticks_until(at: u64, host: &dyn Host) -> u64 {
    let left = u128::from(at.saturating_sub(host.now()));
    let ticks = (left * u128::from(host.tsc_hz())).div_ceil(1_000_000_000);
    u64::try_from(ticks).unwrap_or(u64::MAX)
}
