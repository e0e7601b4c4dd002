//! The guest on Intel VT-x: one processor of the machine in VMX non-root operation.
//!
//! EPT gives it all memory but the hypervisor's, with the memory types of the range registers. External
//! interrupts do not exit: its own RFLAGS.IF and task priority hold them back, and they find its IDT.
//! It runs in any mode (unrestricted guests), changes modes without an exit, and has the registers of its
//! processor to itself. What exits:
//!
//! - CPUID, XSETBV and INVD, which always do; hardware task switches likewise;
//! - the VMX instructions and the MSRs of [`msr`], for the nested layer and the hypervisor's safety;
//! - a change of CR0.NE, CR4.VMXE or CR4.SMXE, of which the guest has the first two in the read shadow;
//! - NMI, by which processors call one another out of the guest; the guest's own go back to it;
//! - INIT, which frees no processor in VMX operation;
//! - writes to the local APIC's page, by EPT, and the port that puts the machine to sleep.
//!
//! # NMIs
//!
//! Nothing holds NMIs back in the hypervisor, so one may come when the guest is about to be entered and
//! all has been looked at. Its handler calls the entry off ([`CurrentVmcs::enter_unless`]).
//!
//! [`CurrentVmcs::enter_unless`]: testudo_vmx::hw::CurrentVmcs::enter_unless

mod exit;
mod msr;
mod nested;
mod tables;
mod task;

use core::convert::Infallible;
use core::ptr::NonNull;

use testudo_arch::memory::GuestRam;
use testudo_arch::mtrr::Mtrrs;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr0Flags, EferFlags, Event, FrameAlloc, Hpa, Msr, PageSize};
use testudo_machine::backend::vmx::{Level, Processor, ThisProcessor, ept_format};
use testudo_machine::boot::BootState;
use testudo_nested::vmx::{Acceptance, ComposedStage, PhysicalEvent};
use testudo_rt as rt;
use testudo_vmx::controls::{EntryControls, Interruptibility, PrimaryControls, SecondaryControls};
use testudo_vmx::event::{Injection, InterruptionInformation};
use testudo_vmx::hw::instructions::{InveptKind, InvvpidKind};
use testudo_vmx::hw::{GuestRegisters, HostState, RegionFrame, ResidentRegisters, VmcsKind, Vmx};
use testudo_vmx::{VmcsRead, VmcsWrite, VmxCaps, fields, state};

use crate::Pill;
use crate::apic;
use crate::nesting::Flusher;
use crate::processors::{self, Nmis};
use crate::registers;
use nested::Nested;
use testudo_rt::memory::Frames;

pub(crate) use tables::{Tables, VmxError};

/// What composes the EPT of the guest's own guests.
type Stage = ComposedStage<'static, GuestRam, Frames, Frames, Flusher>;

/// The guest's VPID.
const VPID: u16 = 1;
/// That of its own guests.
const VPID_L2: u16 = 2;

/// One processor of the guest, on that of the machine.
pub(crate) struct Guest<'a> {
    id: usize,
    pill: &'static Pill,
    tables: &'static Tables,
    processor: ThisProcessor<'a>,
    /// Whose VMCS is current: the guest's, or that of a guest of its own.
    level: Level,
    registers: GuestRegisters,
    nested: Option<Nested>,
    /// The memory-type range registers as the guest has written them.
    mtrrs: Option<Mtrrs>,
    /// An NMI waits for the guest.
    nmi: bool,
    /// The guest exits as soon as it can take one.
    window: bool,
    /// An INIT waits for the guest to leave VMX operation.
    init_put_off: bool,
    has_predictor_barrier: bool,
}

/// NMIs come by themselves in VMX root operation.
struct AlwaysOpen;

impl Nmis for AlwaysOpen {
    fn take(&mut self) {}

    fn admit(&mut self, work: impl FnOnce()) {
        work();
    }
}

/// Takes this processor into the guest: see [`Pill::run`].
pub(crate) fn run(
    id: usize,
    pill: &'static Pill,
    tables: &'static Tables,
    start: Option<&BootState>,
    ready: impl FnOnce(),
) -> Result<Infallible, VmxError> {
    if !apic::is_at_base() {
        return Err(VmxError::Apic);
    }
    // SAFETY: CPL 0.
    let own = unsafe { Vmx::capabilities()? };
    let feature_control = tables.caps.feature_control;
    let comparable = VmxCaps {
        feature_control,
        ..own
    };
    if comparable != tables.caps {
        return Err(VmxError::Different);
    }
    // SAFETY: CPL 0, the capabilities are this processor's, and the program's flow stays on it.
    let mut vmx = unsafe { Vmx::enable(&tables.caps, region()?)? };
    let mut vmcs = |wanted: bool, kind| match wanted {
        true => Ok::<_, VmxError>(Some(vmx.create_vmcs(region()?, kind)?)),
        false => Ok(None),
    };
    let nesting = tables.guest_caps.is_some();
    let mut vmcs01 = vmcs(true, VmcsKind::Ordinary)?.ok_or(VmxError::NoMemory)?;
    let mut vmcs02 = vmcs(nesting, VmcsKind::Ordinary)?;
    let mut shadow = vmcs(tables.shadowing.is_some(), VmcsKind::Shadow)?;
    let resident = ResidentRegisters::reset(&pill.cpuid)?;
    let held = vmx.hold_interrupts();
    // SAFETY: the controls demand INVEPT of all contexts and, with VPIDs, INVVPID of all.
    unsafe {
        vmx.invept(InveptKind::AllContexts)
            .map_err(VmxError::Invalidation)?;
        if tables.flush(VPID).is_some() {
            vmx.invvpid(InvvpidKind::AllContexts)
                .map_err(VmxError::Invalidation)?;
        }
    }
    let current = vmx.load(&mut vmcs01)?;
    // SAFETY: the runtime uses none of these registers and has CR4.OSXSAVE and OSFXSR set.
    unsafe { resident.load() };
    // SAFETY: as above.
    let processor = unsafe { ThisProcessor::new(current, held, tables.flush(VPID)) };
    let mut guest = Guest {
        id,
        pill,
        tables,
        processor,
        level: Level::L1,
        registers: GuestRegisters::default(),
        nested: None,
        mtrrs: tables.mtrrs.clone(),
        nmi: false,
        window: false,
        init_put_off: false,
        has_predictor_barrier: pill.cpuid.query(7, 0)[3] & 1 << 26 != 0,
    };
    guest.set_up(VPID)?;
    if let (Some(caps), Some(vmcs02)) = (&tables.guest_caps, &mut vmcs02) {
        guest.nest(caps, vmcs02, shadow.as_mut())?;
    }
    // The guest goes on with the processor's page attributes.
    let pat = rt::msr::try_read(Msr::PAT.0).ok_or(VmxError::PageAttributes)?;
    guest.processor.set(fields::GUEST_PAT, pat)?;
    match start {
        Some(start) => {
            guest.registers.gprs = start.gprs;
            guest.set_system(&start.system)?;
            processors::set_running(id);
        }
        None => guest.set_system(&SystemRegisters::reset())?,
    }
    ready();
    guest.run()
}

impl Guest<'_> {
    /// Writes what stays as it is to the current VMCS.
    fn set_up(&mut self, vpid: u16) -> Result<(), VmxError> {
        let tables = self.tables;
        let controls = &tables.controls;
        let vmcs = &mut self.processor;
        state::initialize(vmcs, &tables.caps)?;
        // SAFETY: CPL 0 in 64-bit mode; the runtime has a TSS with a stack for every vector.
        unsafe { HostState::of_this_processor() }.write(vmcs)?;
        vmcs.set(fields::PIN_CONTROLS, controls.pin.bits())?;
        vmcs.set(fields::PRIMARY_CONTROLS, controls.primary.bits())?;
        vmcs.set(fields::SECONDARY_CONTROLS, controls.secondary.bits())?;
        vmcs.set(fields::EXIT_CONTROLS, controls.exit.bits())?;
        vmcs.set(fields::ENTRY_CONTROLS, controls.entry.bits())?;
        let pointer = ept_format(&tables.caps).pointer(tables.ept.root());
        vmcs.set(fields::EPT_POINTER, pointer)?;
        vmcs.set(fields::MSR_BITMAPS, address(&*tables.msr_bitmap).0)?;
        let ports = address(&*tables.io_bitmap);
        vmcs.set(fields::IO_BITMAP_A, ports.0)?;
        vmcs.set(fields::IO_BITMAP_B, ports.0 + PageSize::Size4K.bytes())?;
        if controls.secondary.contains(SecondaryControls::ENABLE_VPID) {
            vmcs.set(fields::VPID, vpid)?;
        }
        vmcs.set(fields::CR0_GUEST_HOST_MASK, tables.cr0_mask())?;
        vmcs.set(fields::CR4_GUEST_HOST_MASK, tables.cr4_mask())?;
        Ok(())
    }

    /// Gives the guest these registers, and nothing that is on its way to it.
    fn set_system(&mut self, system: &SystemRegisters) -> Result<(), VmxError> {
        let tables = self.tables;
        // Entries leave CD and NW as they are in the processor (SDM vol. 3C, 29.3.2.1), as INIT does.
        let kept = Cr0Flags::CACHE_DISABLE | Cr0Flags::NOT_WRITE_THROUGH;
        let mut hardware = SystemRegisters {
            cr0: system.cr0 & !kept.bits() | tables.cr0_ones() | Cr0Flags::EXTENSION_TYPE.bits(),
            cr4: system.cr4 | tables.caps.cr4.ones,
            ..*system
        };
        // An entry in IA-32e mode takes only the type of the 64-bit TSS (SDM vol. 3C, 29.3.1.2), and the
        // guest gets there without an exit at which the type could be changed.
        hardware.tr.attributes =
            SegmentAttributes::from_bits_retain(hardware.tr.attributes.bits() & !0xF | BUSY_TSS);
        let vmcs = &mut self.processor;
        state::write_system_registers(vmcs, &hardware)?;
        vmcs.set(fields::CR0_READ_SHADOW, system.cr0)?;
        vmcs.set(fields::CR4_READ_SHADOW, system.cr4)?;
        let mut entry = tables.controls.entry;
        let long = system.efer & EferFlags::LONG_MODE_ACTIVE.bits() != 0;
        entry.set(EntryControls::IA32E_MODE_GUEST, long);
        vmcs.set(fields::ENTRY_CONTROLS, entry.bits())?;
        vmcs.set(fields::GUEST_DEBUGCTL, 0)?;
        vmcs.set(fields::GUEST_SYSENTER_CS, 0)?;
        vmcs.set(fields::GUEST_SYSENTER_ESP, 0)?;
        vmcs.set(fields::GUEST_SYSENTER_EIP, 0)?;
        vmcs.set(fields::GUEST_INTERRUPTIBILITY, 0)?;
        vmcs.set(fields::GUEST_ACTIVITY_STATE, 0)?;
        vmcs.set(fields::GUEST_PENDING_DEBUG, 0)?;
        vmcs.set(fields::ENTRY_INTERRUPTION_INFORMATION, 0)?;
        vmcs.set(fields::GUEST_RSP, self.registers.gprs.rsp)?;
        self.registers.cr2 = system.cr2;
        self.processor.set_dr6(system.dr6);
        let forgotten = self.processor.forget_translations(Level::L1);
        forgotten.map_err(VmxError::Invalidation)
    }

    /// Runs for as long as the machine does.
    fn run(&mut self) -> ! {
        loop {
            if let Err(error) = self.turn() {
                self.end(error);
            }
        }
    }

    /// Runs the guest, or its guest, once.
    fn turn(&mut self) -> Result<(), VmxError> {
        // What comes after this keeps the guest from being entered.
        let looked_for = processors::begin_to_look(self.id);
        if processors::has_order(self.id) {
            self.obey()?;
        }
        self.nmi |= processors::take_guest_nmi(self.id);
        if self.level == Level::L2 {
            self.flush_what_the_guest_flushed()?;
        }
        if self.nmi || self.window {
            self.offer_nmi()?;
        }
        // SAFETY: what the guest reaches without an exit, the hypervisor has given to it and does not
        // use: interrupts, since it runs with IF clear and takes only NMIs; ports, XCR0 and the MSRs that
        // the bitmap opens. Its memory does not include the hypervisor's, which EPT does not map, and it
        // is alone on its processor, so that the VPIDs are its own. From its control blocks the nested layer
        // takes every exit, and its guests' tables are compositions with the guest's, or the guest's own.
        let entered = unsafe { self.processor.enter_unless(&mut self.registers, looked_for) };
        match entered {
            Ok(false) => Ok(()),
            Ok(true) if self.level == Level::L2 => self.settle_inner(),
            Ok(true) => self.settle_guest(),
            Err(fail) => Err(VmxError::Refused(fail)),
        }
    }

    /// Has whoever runs take the NMI that waits, when it can.
    #[cold]
    fn offer_nmi(&mut self) -> Result<(), VmxError> {
        if self.nmi && self.leave_inner_for(PhysicalEvent::Nmi)? {
            self.nmi = false;
        }
        if self.nmi && self.is_free()? {
            self.nmi = false;
            self.inject(Event::Nmi)?;
        }
        self.set_window(self.nmi)
    }

    /// Has whoever runs exit as soon as it can take an NMI, or not.
    fn set_window(&mut self, wanted: bool) -> Result<(), VmxError> {
        if self.level == Level::L2 {
            return self.set_inner_window(wanted);
        }
        if self.window != wanted {
            self.window = wanted;
            let primary = self.processor.get(fields::PRIMARY_CONTROLS)?;
            let mut primary = PrimaryControls::from_bits_retain(primary);
            primary.set(PrimaryControls::NMI_WINDOW_EXITING, wanted);
            self.processor
                .set(fields::PRIMARY_CONTROLS, primary.bits())?;
        }
        Ok(())
    }

    /// Whether nothing stands in the way of an NMI.
    fn is_free(&self) -> Result<bool, VmxError> {
        let state = self.processor.get(fields::GUEST_INTERRUPTIBILITY)?;
        let event = self.processor.get(fields::ENTRY_INTERRUPTION_INFORMATION)?;
        let blocked = Interruptibility::BLOCKING_BY_STI
            | Interruptibility::BLOCKING_BY_MOV_SS
            | Interruptibility::BLOCKING_BY_NMI;
        let state = Interruptibility::from_bits_retain(state);
        Ok(!state.intersects(blocked) && !InterruptionInformation(event).is_valid())
    }

    /// Begins anew, as after INIT (SDM vol. 3A, table 10-1), if the guest's processor takes it now.
    #[cold]
    fn obey(&mut self) -> Result<(), VmxError> {
        if let Some(nested) = &self.nested {
            match nested.state.interception(PhysicalEvent::Init)? {
                Some(Acceptance::Blocked) => {
                    processors::put_off(self.id);
                    self.init_put_off = true;
                    return Ok(());
                }
                Some(_) => {
                    processors::set_running(self.id);
                    self.leave_inner_for(PhysicalEvent::Init)?;
                    return Ok(());
                }
                None => {}
            }
        }
        apic::reset();
        let order = processors::wait_for_order(self.id, &mut AlwaysOpen);
        self.reset_nested()?;
        self.nmi = false;
        self.set_window(false)?;
        let (system, gprs) = order.registers(&self.pill.cpuid);
        self.registers.gprs = gprs;
        self.set_system(&system)?;
        registers::clear_breakpoints();
        Ok(())
    }

    /// Has whatever runs take this event at its next entry.
    fn inject(&mut self, mut event: Event) -> Result<(), VmxError> {
        // In real mode "no error code is delivered" (SDM vol. 3C, 29.6.1.1), and an entry that asks for it fails.
        if let Event::Exception { error_code, .. } = &mut event
            && error_code.is_some()
            && self.processor.get(fields::GUEST_CR0)? & Cr0Flags::PROTECTED_MODE_ENABLE.bits() == 0
        {
            *error_code = None;
        }
        if let Some(injection) = Injection::of(event) {
            injection.write(&mut self.processor)?;
        }
        Ok(())
    }

    /// The end of the machine: where its firmware would reset it, what brought it about is said first.
    #[cold]
    fn end(&self, why: impl core::fmt::Display) -> ! {
        let rip = self.processor.get(fields::GUEST_RIP).unwrap_or(0);
        let id = self.id;
        rt::println!("testudo: the guest's processor {id}, at {rip:#x}: {why}");
        rt::exit(GUEST_SHUT_DOWN)
    }
}

/// The status of a machine whose guest is at its end.
const GUEST_SHUT_DOWN: u8 = 103;

/// The type of a TSS of 32 or 64 bits that is in use.
const BUSY_TSS: u32 = 11;

/// A frame for the processor's use.
fn region() -> Result<RegionFrame, VmxError> {
    let address = Frames.alloc().ok_or(VmxError::NoMemory)?;
    let pointer = NonNull::new(address.0 as *mut u8).ok_or(VmxError::NoMemory)?;
    // SAFETY: the frame is this call's alone, and memory is mapped where it is.
    Ok(unsafe { RegionFrame::new(pointer, address) })
}

fn address<T>(place: &T) -> Hpa {
    let address = Hpa(core::ptr::from_ref(place) as u64);
    debug_assert!(address.is_aligned(PageSize::Size4K));
    address
}
