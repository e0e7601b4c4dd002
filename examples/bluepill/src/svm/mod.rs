//! The guest on AMD-V: one processor of the machine in guest mode.
//!
//! Nested paging gives it all memory but the hypervisor's, its own devices interrupt it without an exit
//! (INTR is not intercepted, and without V_INTR_MASKING its own RFLAGS.IF and CR8 hold
//! interrupts back), and it has the registers of its processor to itself. What is intercepted:
//!
//! - CPUID, which always could be, for the signature;
//! - the SVM instructions and the MSRs of [`msr`], for the nested layer and the hypervisor's safety;
//! - NMI, by which processors call one another out of the guest; the guest's own go back to it;
//! - INIT, SHUTDOWN, and INVD, which would throw away what the hypervisor has not yet written to memory;
//! - writes to the local APIC's page, by the nested page table, and the port that puts the machine to sleep.
//!
//! While the guest's own GIF is clear it must not be interrupted whatever its RFLAGS say: then
//! V_INTR_MASKING is set, and the hypervisor's IF, which is clear, holds interrupts back.

mod exit;
mod msr;
mod tables;

use alloc::boxed::Box;
use core::convert::Infallible;

use testudo_arch::cpuid::hypervisor_signature;
use testudo_arch::memory::GuestRam;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::{EferFlags, Event, FrameAlloc, Gpa, Hpa, Msr, PAGE_SIZE, RFlags};
use testudo_ept::format::npt::Npt;
use testudo_machine::boot::BootState;
use testudo_nested::svm::{
    ComposedParts, ComposedStage, Context, Host, NestedSvm, Pages, SecondStage,
};
use testudo_rt as rt;
use testudo_svm::asid::{AsidPool, AsidSlot};
use testudo_svm::caps::VmCr;
use testudo_svm::exit::ExitCode;
use testudo_svm::hw::{
    GuestRegisters, HeldInterrupts, HostFrames, ResidentRegisters, Svm, VmcbFrame,
};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::vmcb::{InterruptState, NestedControl, VintrFlags};
use testudo_svm::{Defects, Vmcb};

use crate::Pill;
use crate::apic;
use crate::nesting::{Flusher, PAGE_LIMIT};
use crate::processors::{self, Nmis};
use crate::registers;
use crate::view::Translate;
use testudo_rt::memory::Frames;

pub(crate) use tables::{SvmError, Tables};

/// What composes the nested page tables of the guest's own guests.
type Stage = ComposedStage<'static, GuestRam, Frames, Frames, Flusher>;

const INTERCEPTS_1: Misc1 = Misc1::NMI
    .union(Misc1::INIT)
    .union(Misc1::CPUID)
    .union(Misc1::INVD)
    .union(Misc1::INVLPGA)
    .union(Misc1::IOIO)
    .union(Misc1::MSR)
    .union(Misc1::SHUTDOWN);
const INTERCEPTS_2: Misc2 = Misc2::VMRUN
    .union(Misc2::VMLOAD)
    .union(Misc2::VMSAVE)
    .union(Misc2::STGI)
    .union(Misc2::CLGI)
    .union(Misc2::SKINIT);

const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();

/// One processor of the guest, on that of the machine.
pub(crate) struct Guest<'a> {
    id: usize,
    pill: &'static Pill,
    tables: &'static Tables,
    held: HeldInterrupts<'a>,
    vmcb01: VmcbFrame<'a>,
    registers: GuestRegisters,
    nested: NestedSvm,
    stage: Stage,
    flusher: Flusher,
    asids: AsidPool,
    own_asid: AsidSlot,
    /// The guest's GIF is clear, and V_INTR_MASKING holds its interrupts back.
    holds: bool,
    /// An NMI waits for the guest.
    nmi: bool,
    has_predictor_barrier: bool,
    /// Every entry that delivers an interrupt ends with that ([`Defects::REPEATS_INTERRUPTS`]).
    ends_deliveries: bool,
}

impl Translate for Stage {
    fn translate(&mut self, gpa: Gpa, write: bool) -> Option<Gpa> {
        SecondStage::translate(self, gpa, write)
    }
}

impl Nmis for HeldInterrupts<'_> {
    fn take(&mut self) {
        self.take_nmi();
    }

    fn admit(&mut self, work: impl FnOnce()) {
        self.release(work);
        self.set_interrupt_flag(false);
    }
}

/// Takes this processor into the guest: at `start`, or where another processor's start-up message
/// says. `ready` is called when nothing can go wrong any more.
pub(crate) fn run(
    id: usize,
    pill: &'static Pill,
    tables: &'static Tables,
    start: Option<&BootState>,
    ready: impl FnOnce(),
) -> Result<Infallible, SvmError> {
    if !apic::is_at_base() {
        return Err(SvmError::Apic);
    }
    let frame = || Frames.alloc().ok_or(SvmError::NoMemory);
    let frames = HostFrames {
        save_area: frame()?,
        vmcb: frame()?,
    };
    // SAFETY: CPL 0, the capabilities are this processor's, the frames are fresh, the program's flow
    // stays on its processor, and the runtime sets the host's segments up once.
    let mut svm = unsafe { Svm::enable(&tables.caps, frames)? };
    let resident = ResidentRegisters::reset(&pill.cpuid)?;
    let mut vmcb = Box::new(Vmcb::new());
    let at = address(&*vmcb);
    // SAFETY: memory is mapped where it is.
    let vmcb01 = unsafe { VmcbFrame::new(&mut vmcb, at) };
    let pages = Pages::new().ok_or(SvmError::NoMemory)?;
    let pages_at = address(&*pages);
    let defects = Defects::of(hypervisor_signature().as_ref());
    let host = Host {
        caps: &tables.caps,
        l1_caps: tables.guest_caps.as_ref().unwrap_or(&tables.caps),
        msr_permissions: &tables.msr_permissions,
        io_permissions: &tables.io_permissions,
        defects,
    };
    let nested = NestedSvm::new(&host, pages, pages_at).ok_or(SvmError::NoMemory)?;
    let flusher = Flusher::default();
    let parts = ComposedParts {
        memory: &pill.territory.ram,
        inner: &tables.nested,
        frames: Frames,
        format: *tables.nested.format(),
        l1_format: Npt::new(host.l1_caps.physical_address_bits),
        page_limit: PAGE_LIMIT,
    };
    let stage = ComposedStage::new(parts, flusher.clone());

    let mut held = svm.hold_interrupts();
    held.set_interrupt_flag(false);
    redirect_init();
    // SAFETY: the runtime uses none of these registers and has CR4.OSXSAVE and OSFXSR set.
    unsafe { resident.load() };
    let mut guest = Guest {
        id,
        pill,
        tables,
        held,
        vmcb01,
        registers: GuestRegisters::default(),
        nested,
        stage,
        flusher,
        asids: AsidPool::new(id as u32, &tables.caps),
        own_asid: AsidSlot::new(),
        holds: false,
        nmi: false,
        has_predictor_barrier: pill.cpuid.query(0x8000_0008, 0)[1] & 1 << 12 != 0,
        ends_deliveries: defects.contains(Defects::REPEATS_INTERRUPTS),
    };
    guest.set_controls();
    match start {
        Some(start) => {
            guest.registers.gprs = start.gprs;
            guest.set_system(&start.system);
            processors::set_running(id);
        }
        None => guest.set_system(&SystemRegisters::reset()),
    }
    ready();
    guest.run()
}

/// Has INIT raise #SX when the hypervisor lets it in, instead of resetting the processor under it
/// (APM vol. 2, 15.30.1: VM_CR.R_INIT). A processor or emulator without that keeps it off.
fn redirect_init() {
    if let Some(vm_cr) = rt::msr::try_read(Msr::VM_CR.0) {
        // SAFETY: the vector has a handler.
        unsafe { rt::msr::try_write(Msr::VM_CR.0, vm_cr | VmCr::R_INIT.bits()) };
    }
}

impl<'a> Guest<'a> {
    /// What stays as it is.
    fn set_controls(&mut self) {
        let tables = &self.tables;
        let vmcb = &mut self.vmcb01;
        vmcb.set_intercept_misc1(INTERCEPTS_1);
        vmcb.set_intercept_misc2(INTERCEPTS_2);
        vmcb.set_msrpm_base_pa(address(&*tables.msr_permissions).0);
        vmcb.set_iopm_base_pa(address(&*tables.io_permissions).0);
        vmcb.set_nested_control(NestedControl::NP_ENABLE);
        vmcb.set_n_cr3(tables.nested.root().0);
        // The guest goes on with the processor's page attributes.
        if let Some(pat) = rt::msr::try_read(Msr::PAT.0) {
            vmcb.set_g_pat(pat);
        }
        self.nested.adjust_vmcb01(vmcb);
    }

    fn set_system(&mut self, system: &SystemRegisters) {
        self.vmcb01.set_system_registers(system);
        self.vmcb01.set_efer(system.efer | SVME);
    }

    /// Runs for as long as the machine does.
    fn run(&mut self) -> ! {
        loop {
            if processors::has_order(self.id) {
                self.obey();
            }
            if self.nested.is_guest() {
                self.run_inner();
            } else {
                self.run_guest();
            }
        }
    }

    /// Begins anew, as after INIT (APM vol. 2, table 14-1).
    #[cold]
    fn obey(&mut self) {
        apic::reset();
        let order = processors::wait_for_order(self.id, &mut self.held);
        self.nested.reset();
        self.nmi = false;
        self.holds = false;
        let (system, gprs) = order.registers(&self.pill.cpuid);
        self.registers.gprs = gprs;
        let pat = self.vmcb01.g_pat();
        *self.vmcb01 = Vmcb::new();
        self.set_controls();
        self.vmcb01.set_g_pat(pat);
        self.set_system(&system);
        self.own_asid.flush();
        registers::clear_breakpoints();
    }

    /// The control block of whatever runs.
    fn vmcb(&self) -> &Vmcb {
        if self.nested.is_guest() {
            self.nested.vmcb02()
        } else {
            &self.vmcb01
        }
    }

    /// As [`Self::vmcb`], to be changed.
    fn vmcb_mut(&mut self) -> &mut Vmcb {
        if self.nested.is_guest() {
            self.nested.vmcb02_mut()
        } else {
            &mut self.vmcb01
        }
    }

    fn has_svm(&self) -> bool {
        self.tables.guest_caps.is_some()
    }

    /// Has whatever runs take this event at its next entry.
    fn inject(&mut self, event: Event) {
        self.vmcb_mut().set_event_inj(event.into());
    }

    /// Before an entry: has one that delivers an interrupt end with that, where it could be delivered again.
    fn end_delivery(&self) {
        if self.ends_deliveries && self.vmcb().event_inj().is_interrupt() {
            processors::call_back(self.id);
        }
    }

    /// Runs the guest once.
    fn run_guest(&mut self) {
        self.hold_by_gif(!self.nested.gif(&self.vmcb01));
        self.held.set_interrupt_flag(false);
        if self.nested.take_l1_flush() {
            self.own_asid.flush();
        }
        self.asids.prepare(&mut self.own_asid, &mut self.vmcb01);
        if self.nmi && !self.holds && is_free(&self.vmcb01) {
            self.nmi = false;
            self.inject(Event::Nmi);
        }
        self.end_delivery();
        // SAFETY: what the guest reaches without an exit, the hypervisor has given to it and does not
        // use: interrupts, since it runs with GIF or IF clear and takes only NMIs; ports, XCR0 and the
        // MSRs that the map opens. Its memory does not include the hypervisor's, which the nested
        // table does not map, and it is alone on its processor.
        unsafe { self.held.enter(&mut self.vmcb01, &mut self.registers) };
        self.settle_guest();
    }

    /// Holds interrupts back while the guest's GIF is clear. Then CR8 is V_TPR, and otherwise the
    /// processor's own.
    fn hold_by_gif(&mut self, hold: bool) {
        if hold == self.holds {
            return;
        }
        self.holds = hold;
        let word = self.vmcb01.virtual_interrupts();
        let word = if hold {
            word.insert(VintrFlags::V_INTR_MASKING)
                .with_tpr(registers::cr8())
        } else {
            registers::set_cr8(word.tpr());
            word.remove(VintrFlags::V_INTR_MASKING)
        };
        self.vmcb01.set_virtual_interrupts(word);
    }

    /// Before the first entry of a guest of the guest, at its VMRUN.
    ///
    /// The nested layer makes a control block for a host that takes the interrupts of its machine itself.
    /// Here they are the guest's: whether they make its guest exit, and what holds them back, is as it
    /// says.
    fn pass_interrupts(&mut self) {
        self.hold_by_gif(false);
        let theirs = self.nested.vmcb12();
        let wanted = theirs.intercept_misc1().contains(Misc1::INTR);
        let masks = theirs
            .virtual_interrupts()
            .contains(VintrFlags::V_INTR_MASKING);
        let vmcb02 = self.nested.vmcb02_mut();
        let mut misc1 = vmcb02.intercept_misc1();
        misc1.set(Misc1::INTR, wanted);
        vmcb02.set_intercept_misc1(misc1);
        if !masks {
            let word = vmcb02.virtual_interrupts();
            vmcb02.set_virtual_interrupts(word.remove(VintrFlags::V_INTR_MASKING));
        }
    }

    /// Runs the guest of the guest once.
    fn run_inner(&mut self) {
        if self.nmi {
            let vmcb12 = self.nested.vmcb12();
            if vmcb12.intercept_misc1().contains(Misc1::NMI) {
                // It stays pending: the guest takes it when it sets its GIF.
                return self.leave_inner(ExitCode::NMI, 0, 0);
            }
            if is_free(self.nested.vmcb02()) {
                self.nmi = false;
                self.inject(Event::Nmi);
            }
        }
        self.end_delivery();
        if self.flusher.take() {
            self.nested.flush_translations();
        }
        let (asid, control) = self.asids.assign(self.nested.asid_slot());
        let at = self.nested.vmcb02_address();
        // "The host's RFLAGS.IF at VMRUN", where V_INTR_MASKING is set: the guest's is what counts.
        let enabled = self.vmcb01.rflags() & RFlags::INTERRUPT_FLAG.bits() != 0;
        self.held.set_interrupt_flag(enabled);
        let vmcb02 = self.nested.vmcb02_mut();
        if vmcb02.asid() != asid.number() {
            vmcb02.set_asid(asid.number());
        }
        vmcb02.set_tlb_control(control);
        // SAFETY: the layer's pages are where its maker said they are.
        let mut frame = unsafe { VmcbFrame::new(vmcb02, at) };
        // SAFETY: as for the guest itself, from whose control block the layer takes every intercept; the
        // tables are compositions with the guest's, or the guest's own.
        unsafe { self.held.enter(&mut frame, &mut self.registers) };
        self.settle_inner();
    }

    /// What the nested layer works on.
    fn with_nested<R>(
        &mut self,
        work: impl FnOnce(&mut NestedSvm, &mut Context<'_, GuestRam, Stage>) -> R,
    ) -> R {
        let mut context = Context {
            gprs: &mut self.registers.gprs,
            vmcb01: &mut self.vmcb01,
            memory: &self.pill.territory.ram,
            second_stage: &mut self.stage,
        };
        work(&mut self.nested, &mut context)
    }
}

/// Whether nothing stands in the way of an event.
fn is_free(vmcb: &Vmcb) -> bool {
    let shadow = vmcb
        .interrupt_state()
        .contains(InterruptState::INTERRUPT_SHADOW);
    !shadow && !vmcb.event_inj().is_valid()
}

fn address<T>(place: &T) -> Hpa {
    let address = Hpa(core::ptr::from_ref(place) as u64);
    debug_assert!(address.0.is_multiple_of(PAGE_SIZE));
    address
}
