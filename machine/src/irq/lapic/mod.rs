//! The half of a local APIC that the vCPU's loop owns (SDM vol. 3A, chapter 11; APM vol. 2,
//! chapter 16).

mod msr;
mod registers;
#[cfg(test)]
mod tests;
mod timer;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::Gpa;
use testudo_arch::apic::{ApicPage, VectorRegister, VectorSet};

use super::irqchip::Irqchip;
use super::message::{DeliveryMode, Destination, Message};
use super::port::{ApicMode, LapicPort, Routing, request};
use crate::layout;
use crate::vcpu::AwaitedInterrupt;
pub use msr::ApicMsrError;
use registers::register;
use timer::Timer;

/// What the local APICs of a machine offer; CPUID must say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicFeatures {
    /// x2APIC mode (CPUID 1 ECX bit 21).
    pub x2apic: bool,
    /// The TSC-deadline mode of the timer (CPUID 1 ECX bit 24).
    pub tsc_deadline: bool,
    /// The width of a guest-physical address, at most 52 (CPUID 8000_0008 EAX bits 7:0).
    pub address_bits: u8,
}

impl Default for LapicFeatures {
    /// Everything, and 40 address bits.
    fn default() -> Self {
        Self {
            x2apic: true,
            tsc_deadline: true,
            address_bits: 40,
        }
    }
}

/// Entries of the local vector table that have a cause here (SDM vol. 3A, 11.5.1), in the order of
/// their registers. The others, thermal (1) and performance (2), are registers only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lvt {
    Timer = 0,
    Lint0 = 3,
    Lint1 = 4,
    Error = 5,
}

const LVT_ENTRIES: usize = 6;
const LVT_MASKED: u32 = 1 << 16;

/// Bits of the error status register (SDM vol. 3A, 11.5.3).
mod error {
    pub(super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Bits of the spurious-interrupt vector register (SDM vol. 3A, 11.9).
mod spurious {
    pub(super) const ENABLED: u32 = 1 << 8;
    pub(super) const NO_EOI_BROADCAST: u32 = 1 << 12;
    pub(super) const RESET: u32 = 0xFF;
}

/// IA32_APIC_BASE (SDM vol. 3A, 11.4.4).
mod base {
    pub(super) const BSP: u64 = 1 << 8;
    pub(super) const X2APIC: u64 = 1 << 10;
    pub(super) const ENABLED: u64 = 1 << 11;
}

/// What a processor that virtualizes a local APIC must know of it besides the page of its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicState {
    /// How the guest reaches the registers.
    pub mode: ApicMode,
    /// Where they are in guest-physical memory, in xAPIC mode.
    pub page: Option<Gpa>,
    /// The highest vector requested, or 0.
    pub requesting: u8,
    /// The highest vector in service, or 0.
    pub serving: u8,
    /// The vectors of whose end [`Lapic::ended`] must hear: those that stand for a level.
    pub level: [u64; 4],
}

/// One vCPU's local APIC: registers, timer, and what is pending and in service.
///
/// Made by [`Irqchip::new`]. Everything here is called by the vCPU's own loop.
pub struct Lapic {
    chip: Arc<Irqchip>,
    /// What others reach of this one, also found through `chip`.
    port: Arc<LapicPort>,
    index: usize,
    features: LapicFeatures,
    base: u64,
    /// The registers, which a processor that virtualizes the APIC reads and writes as well while its
    /// guest runs. What it may have changed is looked up there: IRR, ISR, and the task priority.
    page: Arc<ApicPage>,
    /// Such a processor must be told of what changed.
    changed: bool,
    /// The logical destination of xAPIC mode.
    logical: u8,
    /// The model bits of the destination format register.
    cluster: bool,
    /// Errors since the last write to the error status register.
    errors: u32,
    timer: Timer,
    /// A message asked to take the PIC's interrupt.
    extint: bool,
    nmi: bool,
    init: bool,
    startup: Option<u8>,
}

impl Lapic {
    pub(super) fn new(chip: Arc<Irqchip>, index: usize, features: LapicFeatures) -> Self {
        let page = Arc::new(ApicPage::new());
        let lapic = Self::with_page(chip, index, features, page);
        if index == 0 {
            // Virtual-wire mode, as firmware leaves it to an operating system
            // (MultiProcessor Specification 1.4, 3.6.2.2).
            lapic.set_lvt(Lvt::Lint0, (DeliveryMode::ExtInt as u32) << 8);
            lapic.set_lvt(Lvt::Lint1, (DeliveryMode::Nmi as u32) << 8);
        }
        lapic
    }

    /// A local APIC as after power-up, with its registers in `page`.
    fn with_page(
        chip: Arc<Irqchip>,
        index: usize,
        features: LapicFeatures,
        page: Arc<ApicPage>,
    ) -> Self {
        let bsp = if index == 0 { base::BSP } else { 0 };
        let lapic = Self {
            port: chip.port(index).clone(),
            chip,
            index,
            features,
            base: layout::LAPIC.0 | base::ENABLED | bsp,
            page,
            changed: true,
            logical: 0,
            cluster: false,
            errors: 0,
            timer: Timer::default(),
            extint: false,
            nmi: false,
            init: false,
            startup: None,
        };
        lapic.page.clear();
        lapic.page.set(register::SPURIOUS, spurious::RESET);
        for entry in 0..LVT_ENTRIES {
            lapic.page.set(register::lvt(entry), LVT_MASKED);
        }
        lapic.show();
        lapic
    }

    #[inline]
    fn port(&self) -> &LapicPort {
        &self.port
    }

    /// The page of the registers: for a processor that virtualizes the local APIC to use while this
    /// vCPU's guest runs on it.
    pub fn page(&self) -> &Arc<ApicPage> {
        &self.page
    }

    #[inline]
    fn irr(&self) -> VectorSet<'_> {
        self.page.vectors(VectorRegister::Irr)
    }

    #[inline]
    fn isr(&self) -> VectorSet<'_> {
        self.page.vectors(VectorRegister::Isr)
    }

    #[inline]
    fn tmr(&self) -> VectorSet<'_> {
        self.page.vectors(VectorRegister::Tmr)
    }

    #[inline]
    fn tpr(&self) -> u8 {
        self.page.get(register::TPR) as u8
    }

    #[inline]
    fn spurious(&self) -> u32 {
        self.page.get(register::SPURIOUS)
    }

    #[inline]
    fn lvt(&self, entry: Lvt) -> u32 {
        self.page.get(register::lvt(entry as usize))
    }

    fn set_lvt(&self, entry: Lvt, value: u32) {
        self.page.set(register::lvt(entry as usize), value);
    }

    /// The APIC identification, which is the vCPU's number.
    pub fn id(&self) -> u32 {
        self.index as u32
    }

    /// The controllers that this one belongs to.
    pub fn irqchip(&self) -> &Arc<Irqchip> {
        &self.chip
    }

    /// Not zero exactly when something was posted that [`sync`](Self::sync), or the exit loop
    /// itself ([`request::MACHINE`]), has not taken yet.
    #[inline]
    pub fn requests(&self) -> &AtomicU32 {
        &self.port().requests
    }

    /// Takes what others posted. To be called before a guest entry when
    /// [`requests`](Self::requests) is not zero.
    #[inline]
    pub fn sync(&mut self) {
        if self.requests().load(Ordering::Relaxed) & request::LAPIC != 0 {
            self.take_requests();
        }
    }

    fn take_requests(&mut self) {
        let taken = self
            .requests()
            .fetch_and(!request::LAPIC, Ordering::Acquire);
        if taken & request::INIT != 0 {
            self.init = true;
            // One that came before is void; one that was posted since is taken below.
            self.startup = None;
        }
        if taken & request::STARTUP != 0 {
            self.startup = Some(self.port().startup());
        }
        if taken & request::NMI != 0 {
            self.nmi = true;
        }
        if taken & request::EXTINT != 0 {
            self.extint = true;
        }
        if taken & request::LINT0 != 0 && self.mode() != ApicMode::Disabled {
            self.lint0_edge();
        }
        if taken & request::VECTORS != 0 {
            for word in 0..8 {
                let (vectors, level) = self.port().take(word);
                if vectors != 0 {
                    self.irr().insert_word(word, vectors);
                    self.tmr().replace_word(word, vectors, level);
                    self.changed = true;
                }
            }
        }
        if taken & request::ILLEGAL_VECTOR != 0 {
            self.report(error::RECEIVE_ILLEGAL_VECTOR);
        }
    }

    /// The PIC's output rose. As ExtINT it is a level, and looked at when it matters; for other
    /// delivery modes LINT0 is an edge.
    fn lint0_edge(&mut self) {
        if !self.lint0_takes_pic() {
            self.fire(Lvt::Lint0);
        }
    }

    /// Takes an NMI that was sent. The loop holds it until the vCPU can take it.
    #[inline]
    pub fn take_nmi(&mut self) -> bool {
        core::mem::take(&mut self.nmi)
    }

    /// Takes an INIT that was sent: the vCPU is then to be reset, [`init`](Self::init) to be
    /// called, and an application processor waits for a start-up IPI.
    #[inline]
    pub fn take_init(&mut self) -> bool {
        core::mem::take(&mut self.init)
    }

    /// Takes a start-up IPI: the vector, that is the page at which execution starts. The loop
    /// asks after [`take_init`](Self::take_init), and ignores it unless the vCPU waits for one.
    #[inline]
    pub fn take_startup(&mut self) -> Option<u8> {
        self.startup.take()
    }

    /// What INIT does to a local APIC (SDM vol. 3A, 11.4.7.3): all registers as after power-up
    /// but for the identification and IA32_APIC_BASE.
    pub fn init(&mut self) {
        let (chip, page) = (self.chip.clone(), self.page.clone());
        *self = Self {
            base: self.base,
            init: self.init,
            startup: self.startup,
            ..Self::with_page(chip, self.index, self.features, page)
        };
        self.port().drop_posted();
        self.publish();
    }

    /// How the registers are reached: by memory, by MSRs, or not at all.
    pub fn mode(&self) -> ApicMode {
        match (
            self.base & base::ENABLED != 0,
            self.base & base::X2APIC != 0,
        ) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    /// Tells senders where this one listens, and the page what follows from it.
    fn publish(&mut self) {
        self.port().publish(Routing {
            mode: self.mode(),
            enabled: self.spurious() & spurious::ENABLED != 0,
            cluster: self.cluster,
            logical: self.logical,
        });
        self.show();
        self.changed = true;
    }

    /// What a processor that virtualizes the APIC must know besides the page; `None` if nothing of
    /// it changed since this was asked last but by the processor itself.
    #[inline]
    pub fn take_state(&mut self) -> Option<ApicState> {
        core::mem::take(&mut self.changed).then(|| self.state())
    }

    fn state(&self) -> ApicState {
        let broadcasts = self.spurious() & spurious::NO_EOI_BROADCAST == 0;
        ApicState {
            mode: self.mode(),
            page: self.mmio_window(),
            requesting: self.irr().highest().unwrap_or(0),
            serving: self.isr().highest().unwrap_or(0),
            level: if broadcasts {
                self.tmr().words()
            } else {
                [0; 4]
            },
        }
    }

    /// Where the registers are in guest-physical memory: one page, or none unless the mode is
    /// xAPIC.
    pub fn mmio_window(&self) -> Option<Gpa> {
        (self.mode() == ApicMode::XApic).then_some(Gpa(self.base & !0xFFF))
    }

    /// The highest vector that waits and that priorities let through (SDM vol. 3A, 11.8.3). The
    /// PIC's interrupts are not among them.
    #[inline]
    pub fn pending_vector(&self) -> Option<u8> {
        let vector = self.irr().highest()?;
        (vector & 0xF0 > self.ppr() & 0xF0).then_some(vector)
    }

    /// Whether an interrupt waits that the vCPU shall take as soon as it can.
    #[inline]
    pub fn has_interrupt(&self) -> bool {
        self.pending_vector().is_some() || self.pic_waits()
    }

    /// What waits for the vCPU to become able to take it: also a vector that only the task
    /// priority holds back, which the guest may lower without an exit.
    #[inline]
    pub fn awaited(&self) -> Option<AwaitedInterrupt> {
        if self.pic_waits() {
            return Some(AwaitedInterrupt::External);
        }
        let vector = self.irr().highest()?;
        let serving = self.isr().highest().unwrap_or(0) & 0xF0;
        (vector & 0xF0 > serving).then_some(AwaitedInterrupt::Vector(vector))
    }

    /// Whether the PIC's interrupt waits and comes through here.
    #[inline]
    pub fn pic_waits(&self) -> bool {
        let asserted = self.chip.port(0).lint0.load(Ordering::Acquire);
        asserted && (self.extint || self.index == 0 && self.lint0_takes_pic())
    }

    /// Whether LINT0 passes the PIC's output to the processor; without a local APIC it always
    /// does (SDM vol. 3A, 11.4.3).
    fn lint0_takes_pic(&self) -> bool {
        let entry = self.lvt(Lvt::Lint0);
        self.mode() == ApicMode::Disabled
            || entry & LVT_MASKED == 0
                && DeliveryMode::from_bits(entry >> 8) == DeliveryMode::ExtInt
    }

    /// Acknowledges the interrupt that [`has_interrupt`](Self::has_interrupt) told of: its vector
    /// is in service from now on and is to be injected. `None` if it went away meanwhile.
    #[inline]
    pub fn acknowledge(&mut self) -> Option<u8> {
        if let Some(vector) = self.acknowledge_pic() {
            return Some(vector);
        }
        let vector = self.pending_vector()?;
        self.irr().remove(vector);
        self.isr().insert(vector);
        self.changed = true;
        Some(vector)
    }

    /// As [`acknowledge`](Self::acknowledge), of the PIC's interrupt alone.
    #[inline]
    pub fn acknowledge_pic(&mut self) -> Option<u8> {
        if !self.pic_waits() {
            return None;
        }
        self.extint = false;
        self.chip.acknowledge_pic()
    }

    /// The processor priority (SDM vol. 3A, 11.8.3.1).
    #[inline]
    fn ppr(&self) -> u8 {
        let serving = self.isr().highest().unwrap_or(0) & 0xF0;
        let tpr = self.tpr();
        if tpr & 0xF0 >= serving { tpr } else { serving }
    }

    /// The task priority as CR8 shows it.
    #[inline]
    pub fn cr8(&self) -> u8 {
        self.page.task_priority()
    }

    /// Takes note that CR8 holds `value`, at most 15 (SDM vol. 3A, 11.8.6). The lower half of the
    /// task priority, which CR8 does not show, stays if the upper half does.
    #[inline]
    pub fn set_cr8(&mut self, value: u8) {
        if value != self.cr8() {
            self.page.set_task_priority(value);
        }
    }

    /// The end of the interrupt in service with the highest priority (SDM vol. 3A, 11.8.5).
    #[inline]
    pub(crate) fn end_of_interrupt(&mut self) {
        let Some(vector) = self.isr().highest() else {
            return;
        };
        self.isr().remove(vector);
        self.changed = true;
        self.ended(vector);
    }

    /// Takes note that this interrupt's service is over: the I/O APIC hears of a level's.
    #[inline]
    pub fn ended(&self, vector: u8) {
        if self.tmr().contains(vector) && self.spurious() & spurious::NO_EOI_BROADCAST == 0 {
            self.chip.end_of_interrupt(vector);
        }
    }

    /// Accepts an edge-triggered vector that arises here.
    #[inline]
    fn post_local(&mut self, vector: u8) {
        if vector < 16 {
            self.report(error::RECEIVE_ILLEGAL_VECTOR);
        } else if self.spurious() & spurious::ENABLED != 0 {
            self.irr().insert(vector);
            self.tmr().remove(vector);
            self.changed = true;
        }
    }

    /// Delivers what an entry of the local vector table says.
    fn fire(&mut self, entry: Lvt) {
        let value = self.lvt(entry);
        if value & LVT_MASKED != 0 {
            return;
        }
        let mode = match entry {
            // These two have no delivery mode: always fixed.
            Lvt::Timer | Lvt::Error => DeliveryMode::Fixed,
            _ => DeliveryMode::from_bits(value >> 8),
        };
        match mode {
            DeliveryMode::Fixed => self.post_local(value as u8),
            DeliveryMode::Nmi => self.nmi = true,
            DeliveryMode::Init => self.init = true,
            _ => {}
        }
    }

    /// Notes an error, and interrupts for it when it is the first since the status was read.
    #[cold]
    fn report(&mut self, error: u32) {
        let news = self.errors & error == 0;
        self.errors |= error;
        // An illegal vector in the error entry itself must not report itself for ever.
        if news && self.lvt(Lvt::Error) & 0xFF >= 16 {
            self.fire(Lvt::Error);
        }
    }

    /// The vector goes to this one itself (SDM vol. 3A, 11.12.11).
    pub(super) fn send_self_ipi(&mut self, vector: u32) {
        self.send_ipi(u64::from(vector & 0xFF) | 1 << 18);
    }

    /// Sends what the interrupt command register says (SDM vol. 3A, 11.6.1).
    fn send_ipi(&mut self, icr: u64) {
        const LEVEL_ASSERT: u64 = 1 << 14;
        const LEVEL_TRIGGERED: u64 = 1 << 15;
        let mode = DeliveryMode::from_bits((icr >> 8) as u32);
        let vector = icr as u8;
        let has_vector = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if has_vector && vector < 16 {
            self.report(error::SEND_ILLEGAL_VECTOR);
            return;
        }
        // INIT level de-assert: no processor since the Pentium 4 does anything.
        if mode == DeliveryMode::Init && icr & (LEVEL_ASSERT | LEVEL_TRIGGERED) == LEVEL_TRIGGERED {
            return;
        }
        let logical = icr & 1 << 11 != 0;
        let own = self.id();
        let destination = match (icr >> 18 & 3, self.mode()) {
            (1, _) => Destination::Physical(own),
            (2, _) => Destination::All,
            (3, _) => Destination::AllBut(own),
            (_, ApicMode::X2Apic) => Destination::from_field32((icr >> 32) as u32, logical),
            _ => Destination::from_field8((icr >> 56) as u8, logical),
        };
        if has_vector && destination == Destination::Physical(own) {
            self.post_local(vector);
            return;
        }
        let message = Message {
            destination,
            mode,
            vector,
            // IPIs are edges whatever the trigger mode says (SDM vol. 3A, 11.6.1).
            level: false,
        };
        self.chip.deliver(message, Some(self.index));
    }
}
