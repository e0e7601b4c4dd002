//! vCPUs on Intel VT-x.
//!
//! The guest runs on EPT, unrestricted (so in any mode), with a VPID where there are any, and with
//! its own debug registers, segment bases, CR3 and SYSCALL registers in its hands. CR4, and PG, NE, CD
//! and NW of CR0, are the hypervisor's: a change exits, and is executed as the processor would have.
//! CLTS and LMSW never exit. What a guest must not have, or what the machine emulates, exits:
//! CPUID, HLT, ports, all MSRs but a few, the VMX instructions, XSETBV, and the two exceptions (#DB,
//! #AC) with which a guest could otherwise keep its processor busy for ever (CVE-2015-5307,
//! CVE-2015-8104). The task priority lives in the virtual-APIC page, so that MOV CR8 does not exit.
//! Where the processor has all of APIC virtualization, so do the other registers of the local APIC,
//! and the processor delivers its interrupts; one that another vCPU or a device requests reaches a
//! running guest by a kick.
//!
//! # What an exit costs
//!
//! VMREAD and VMWRITE are counted, because on real processors they are what an exit costs beyond
//! the exit itself. Registers are read when a handler asks and written when one changed them:
//!
//! | exit | VMREADs | VMWRITEs | which |
//! | --- | --- | --- | --- |
//! | CPUID | 3 | 1 | reason, length, RIP; RIP |
//! | RDMSR, WRMSR, VMCALL, HLT | 4 | 1 | and RFLAGS, for TF and RF |
//! | IN, OUT | 5 | 1 | and the qualification |
//! | interrupt of the host | 1 | 0 | reason |
//! | interrupt delivered | 3 | 1 | reason, RFLAGS, interruptibility; the event |
//! | write to the APIC, virtualized | 3 | 0 | reason, qualification, IDT vectoring |
//! | end of a level-triggered interrupt | 2 | 0 | reason, qualification |
//! | deadline | 1 | 1 | reason; the preemption timer |
//!
//! Every sixteenth entry, and each after the machine looked for interrupts, sets the preemption timer:
//! one VMWRITE more. Between, the timer lags behind the clock by what the exits take.
//!
//! CPUID does without RFLAGS at a price: a debugger in the guest that begins to single-step right at
//! a CPUID sees its first trap one instruction late. Once a single step was seen, RFLAGS is read.
//!
//! On shadow paging ([`Controls::choose_shadow`]) the guest runs without EPT, and so restricted to
//! protected mode with paging, which it need not see; in real mode it is emulated.
//!
//! Hardware task switches always exit on VT-x, and are made by software.

mod apic;
mod cache;
mod exit;
mod mode;
mod nested;
mod nested_events;
mod nested_registers;
mod nested_shadow;
mod nested_state;
mod processor;
mod refusal;
mod setup;
mod shadow;
mod switched;
mod task;
#[cfg(test)]
mod tests;
mod timer;
mod unsupported;
mod vcpu;

use core::cell::Cell;

use testudo_arch::apic::ApicPage;
use testudo_arch::regs::SystemRegisters;
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Event, Gpa, GuestMemory, Hpa, RFlags};
use testudo_nested::vmx::{NoSecondStage, SecondStage};
use testudo_vmx::controls::{EntryControls, Interruptibility, PendingDebug, PrimaryControls};
use testudo_vmx::event::Injection;
use testudo_vmx::exit::{BasicReason, ExitReason};
use testudo_vmx::hw::instructions::{self, InveptKind, InvvpidKind};
use testudo_vmx::hw::{CurrentVmcs, GuestRegisters, HeldInterrupts, HostState};
use testudo_vmx::{
    AccessError, Defects, Encoding, Field, VmFail, VmxCaps, encoding, fields, state,
};

use super::paging::ShadowPlace;
use super::watched::Watched;
use crate::paging::Gate;
use crate::vcpu::{AwaitedInterrupt, Vcpu, VcpuError};
use apic::VirtualApic;
pub use apic::{APIC_PAGE, ApicTables, open_x2apic_msrs};
use cache::{Cache, Cached};
use mode::{Imposed, LMA, Mode, PE, read_pdptes};
use nested::Nested;
use timer::PreemptionTimer;
pub use unsupported::UnsupportedExit;

pub use nested::{Flusher, NestedParts, ShadowBitmaps, longest_turn, offers_shadowing};
pub use processor::{Level, Pair, Processor, ResidentMsrs, ThisProcessor};
pub use refusal::{Refusal, RefusalCause};
pub use setup::{
    Controls, Unsuitable, VmxTables, ept_format, flush, grant_secondary, open_direct_msrs,
};
use shadow::Shadow;
pub use switched::SwitchedMsrs;
pub use task::{Switched, switch_tasks};

/// The flags that completing an instruction by software must look at.
const STEP_FLAGS: u64 = RFlags::TRAP_FLAG.bits() | RFlags::RESUME_FLAG.bits();

/// A vCPU on a processor in VMX root operation.
///
/// `S` is what composes the EPT of the guest's own guests.
pub struct VmxVcpu<'a, P, M, S = NoSecondStage> {
    processor: P,
    /// Who runs, and whose VMCS is current: the guest, or a guest of its own.
    level: Level,
    nested: Option<Nested<S>>,
    registers: GuestRegisters,
    cache: Cache,
    memory: Watched<'a, M>,
    caps: &'a VmxCaps,
    controls: &'a Controls,
    tables: &'a VmxTables,
    /// The page of the local APIC's registers.
    apic_page: &'a ApicPage,
    /// The rest of the local APIC, where the processor virtualizes it.
    apic: Option<VirtualApic>,
    /// The end of the guest's turn, where the processor counts it.
    timer: Option<PreemptionTimer>,
    /// How many entries there are until the timer is set anew.
    until_timer: u32,
    shadow: Option<Shadow<'a>>,
    /// What it goes through into the guest and back, if others wait for it to be out.
    gate: Option<&'a Gate>,
    /// What EFER is switched by, if the VMCS has no field for it.
    switched: Option<&'a SwitchedMsrs>,
    imposed: Imposed,
    xcr0_valid: u64,
    /// Why the guest came out last.
    reason: ExitReason,
    /// The event for the next entry.
    injection: Option<Event>,
    /// RSP as `registers` and the VMCS last agreed on.
    rsp_agreed: u64,
    /// The guest's CR4, EFER, and those bits of CR0 that belong to the hypervisor.
    mode: Mode,
    xcr0: u64,
    tsc_offset: u64,
    primary: PrimaryControls,
    entry: EntryControls,
    tpr_threshold: u8,
    /// The interrupt that the machine wants a window for.
    window: Option<AwaitedInterrupt>,
    /// A window is open, or the guest was seen single-stepping: what else completing an instruction
    /// does cannot wait.
    watchful: bool,
    /// An access that failed where no error can be returned; the guest is not entered after it.
    failure: Cell<Option<VcpuError>>,
}

/// The processor that a vCPU runs on, and what it may use there.
pub struct VmxPlace<'a> {
    /// The VMCS, current.
    pub vmcs: CurrentVmcs<'a>,
    /// The processor's interrupts.
    pub held: HeldInterrupts,
    /// What the processor offers.
    pub caps: &'a VmxCaps,
    /// What [`Controls::choose`] gave for them.
    pub controls: &'a Controls,
    /// The tables that the machine's vCPUs share.
    pub tables: &'a VmxTables,
    /// The page of the vCPU's local APIC ([`Lapic::page`](crate::irq::Lapic::page)), and its
    /// physical address.
    pub apic_page: (&'a ApicPage, Hpa),
    /// The VPID: not 0.
    pub vpid: u16,
    /// The components that the guest may enable in XCR0.
    pub xcr0_valid: u64,
    /// Shadow paging, if the controls are for that.
    pub shadow: Option<ShadowPlace<'a>>,
    /// The vCPU's [gate](crate::paged::Shootdown::gate), if pages of its guest are shared.
    pub gate: Option<&'a Gate>,
    /// The lists of MSRs and their physical address, if the controls
    /// [switch by lists](Controls::switches_by_lists).
    pub switched: Option<(&'a SwitchedMsrs, Hpa)>,
}

impl<'a, M: GuestMemory, S: SecondStage> VmxVcpu<'a, ThisProcessor<'a>, M, S> {
    /// A vCPU with reset state.
    ///
    /// # Errors
    ///
    /// An access to the VMCS failed.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::enter`] and [`HostState::of_this_processor`] ask, for as long as this
    /// value lives: the tables are in place and reach only the guest's memory, the page of the local
    /// APIC is at its address and this vCPU's alone, and no other guest uses the VPID on this
    /// processor. The guest's resident registers stay in this processor. The capabilities are this
    /// processor's. If the controls are without EPT, there is shadow paging, and if they switch by lists,
    /// those are at their address and this vCPU's alone.
    #[allow(
        unsafe_code,
        reason = "entering a guest rests on what the caller put in memory"
    )]
    pub unsafe fn new(place: VmxPlace<'a>, memory: &'a M) -> Result<Self, VcpuError> {
        let VmxPlace { mut vmcs, held, .. } = place;
        let (caps, controls) = (place.caps, place.controls);
        let flush = controls.flush(caps, place.vpid);
        // SAFETY: the caller's promise.
        let host = unsafe { HostState::of_this_processor() };
        host.write(&mut vmcs)?;
        if let Some((lists, _)) = place.switched {
            lists.set_host(host.efer(), host.pat());
        }
        // SAFETY: a current VMCS is in VMX root operation, and `Controls::choose` demands INVEPT of
        // all contexts with EPT and, with VPIDs, INVVPID of all.
        unsafe {
            if controls.has_ept() {
                instructions::invept(InveptKind::AllContexts).map_err(VcpuError::Invalidation)?;
            }
            if flush.is_some() {
                instructions::invvpid(InvvpidKind::AllContexts).map_err(VcpuError::Invalidation)?;
            }
        }
        // SAFETY: `Controls::choose` demands INVEPT of all contexts with EPT, without which nothing is
        // to be forgotten by it, and the kind was chosen from the processor's capabilities.
        let processor = unsafe { ThisProcessor::new(vmcs, held, flush) };
        let parts = Parts {
            caps,
            controls,
            tables: place.tables,
            apic_page: place.apic_page,
            vpid: place.vpid,
            xcr0_valid: place.xcr0_valid,
            shadow: place.shadow,
            gate: place.gate,
            switched: place.switched,
        };
        Self::on(processor, &parts, memory)
    }
}

/// What a vCPU is made of, apart from the processor.
struct Parts<'a> {
    caps: &'a VmxCaps,
    controls: &'a Controls,
    tables: &'a VmxTables,
    apic_page: (&'a ApicPage, Hpa),
    vpid: u16,
    xcr0_valid: u64,
    shadow: Option<ShadowPlace<'a>>,
    gate: Option<&'a Gate>,
    switched: Option<(&'a SwitchedMsrs, Hpa)>,
}

impl<'a, P: Processor, M: GuestMemory, S: SecondStage> VmxVcpu<'a, P, M, S> {
    fn on(mut processor: P, parts: &Parts<'a>, memory: &'a M) -> Result<Self, VcpuError> {
        let (apic_page, at) = parts.apic_page;
        setup::write(&mut processor, parts.controls, parts.tables, at, parts.vpid)?;
        if let Some((lists, at)) = parts.switched {
            lists.write(&mut processor, at, setup::PAT_RESET)?;
        }
        let apic_tables = parts.tables.apic.filter(|_| parts.controls.virtual_apic);
        let apic = match apic_tables {
            Some(tables) => {
                let (secondary, defects) = (parts.controls.secondary, Defects::of(parts.caps));
                let apic = VirtualApic::new(&mut processor, tables, secondary, defects)?;
                Some(apic)
            }
            None => None,
        };
        let timer = match parts.controls.preemption_timer {
            true => Some(PreemptionTimer::new(
                &mut processor,
                parts.caps,
                parts.controls,
            )?),
            false => None,
        };
        let imposed = match parts.shadow {
            None => Imposed::new(parts.caps),
            Some(_) => Imposed::on_shadow_paging(parts.caps),
        };
        processor.set(fields::CR0_GUEST_HOST_MASK, imposed.cr0_mask())?;
        processor.set(fields::CR4_GUEST_HOST_MASK, u64::MAX)?;
        let mut vcpu = Self {
            processor,
            level: Level::L1,
            nested: None,
            registers: GuestRegisters::default(),
            cache: Cache::default(),
            memory: Watched::new(memory, parts.shadow.map(|place| (place.tables, place.vcpu))),
            caps: parts.caps,
            controls: parts.controls,
            tables: parts.tables,
            apic_page,
            apic,
            timer,
            until_timer: 1,
            gate: parts.gate.or(parts.shadow.map(|place| place.gate())),
            shadow: parts.shadow.map(Shadow::new),
            switched: parts.switched.map(|(lists, _)| lists),
            imposed,
            xcr0_valid: parts.xcr0_valid,
            reason: ExitReason(0),
            injection: None,
            // No value that a guest's can be confused with matters here: the field is written below.
            rsp_agreed: 0,
            mode: Mode::default(),
            xcr0: 1,
            tsc_offset: 0,
            primary: parts.controls.primary,
            entry: parts.controls.entry,
            tpr_threshold: 0,
            window: None,
            watchful: false,
            failure: Cell::new(None),
        };
        vcpu.processor.set(fields::GUEST_RSP, 0)?;
        vcpu.load_system(&SystemRegisters::reset())?;
        Ok(vcpu)
    }

    /// Remembers a failed access; the guest will not be entered.
    #[cold]
    #[inline(never)]
    fn remember(&self, error: VcpuError) {
        self.failure.set(self.failure.get().or(Some(error)));
        self.cache.add_work();
    }

    #[cold]
    #[inline(never)]
    fn remember_access(&self, error: AccessError) {
        self.remember(error.into());
    }

    /// Remembers that a field could not be read. Why is found out by reading it once more, so that
    /// the hot path that failed carries no reasons.
    #[cold]
    #[inline(never)]
    fn remember_read(&self, field: Encoding) {
        let again = self.processor.read_raw(field);
        let fail = again.err().unwrap_or(VmFail::Invalid);
        self.remember(AccessError::Read { field, fail }.into());
    }

    /// The value, or zero together with a failure that the next entry reports.
    #[inline]
    fn or_zero<T: Default>(&self, result: Result<T, AccessError>) -> T {
        match result {
            Ok(value) => value,
            Err(error) => {
                self.remember_access(error);
                T::default()
            }
        }
    }

    #[inline]
    fn cached(&self, register: Cached) -> u64 {
        self.or_zero(self.cache.get(&self.processor, register))
    }

    #[inline]
    fn interruptibility(&self) -> Interruptibility {
        self.or_zero(self.cache.interruptibility(&self.processor))
    }

    fn field<W: encoding::Width, A: encoding::Access>(&self, field: Field<W, A>) -> W::Value
    where
        W::Value: Default,
    {
        self.or_zero(self.processor.get(field))
    }

    fn set_field<W: encoding::Width>(&mut self, field: Field<W>, value: W::Value) {
        let result = self.processor.set(field, value);
        self.or_zero(result);
    }

    /// Writes what handlers have changed, so that the guest can be entered.
    #[inline(always)]
    fn prepare(&mut self) -> Result<(), VcpuError> {
        self.until_timer = self.until_timer.wrapping_sub(1);
        if self.until_timer == 0 {
            self.set_timer()?;
        }
        if self.registers.gprs.rsp != self.rsp_agreed {
            self.rsp_agreed = self.registers.gprs.rsp;
            self.processor.set(fields::GUEST_RSP, self.rsp_agreed)?;
        }
        if self.cache.write_rip(&mut self.processor)? {
            self.prepare_rest()?;
        }
        Ok(())
    }

    /// The entry through the gate.
    #[inline(never)]
    fn enter_by_gate(&mut self) -> Result<Result<(), VmFail>, VcpuError> {
        self.enter_gate()?;
        // SAFETY: as in `enter`.
        #[allow(unsafe_code, reason = "the entry; see `new`")]
        let entered = unsafe { self.processor.enter(&mut self.registers) };
        self.leave_gate();
        Ok(entered)
    }

    /// CR4 of a guest of the guest's.
    #[cold]
    #[inline(never)]
    fn l2_cr4(&self) -> u64 {
        self.mode().cr4
    }

    /// Sets the timer by the clock: it lags behind by what exits have cost.
    #[cold]
    #[inline(never)]
    fn set_timer(&mut self) -> Result<(), VcpuError> {
        self.until_timer = u32::MAX;
        if let Some(timer) = self.timer {
            self.until_timer = timer.lag();
            let now = self.processor.tsc();
            timer.set(&mut self.processor, now)?;
        }
        Ok(())
    }

    #[inline(never)]
    fn prepare_rest(&mut self) -> Result<(), VcpuError> {
        if let Some(failure) = self.failure.get() {
            return Err(failure);
        }
        self.cache.write_all(&mut self.processor)?;
        let Some(mut event) = self.injection.take() else {
            return Ok(());
        };
        // "If ... the logical processor is in real mode, no error code is delivered" (SDM vol. 3C,
        // 29.6.1.1), and an entry that asks for it fails.
        if let Event::Exception { error_code, .. } = &mut event
            && error_code.is_some()
            && self.processor.get(fields::GUEST_CR0)? & PE == 0
        {
            *error_code = None;
        }
        if let Some(injection) = Injection::of(event) {
            injection.write(&mut self.processor)?;
        }
        Ok(())
    }

    /// Runs the guest once.
    #[inline(always)]
    fn enter(&mut self) -> Result<ExitReason, VcpuError> {
        self.enter_unread()?;
        self.read_reason()
    }

    /// Why the guest exited that ran last.
    #[inline(always)]
    fn read_reason(&mut self) -> Result<ExitReason, VcpuError> {
        self.reason = ExitReason::read(&self.processor)?;
        Ok(self.reason)
    }

    /// Runs the guest once, and leaves it to the caller to ask why it exited.
    #[inline(always)]
    fn enter_unread(&mut self) -> Result<(), VcpuError> {
        self.prepare()?;
        let entered = if self.gate.is_none() {
            // SAFETY: the controls that `new` wrote confine the guest, and nothing removes one but
            // the windows; the rest is what the caller of `new` promised.
            #[allow(unsafe_code, reason = "the entry; see `new`")]
            unsafe {
                self.processor.enter(&mut self.registers)
            }
        } else {
            self.enter_by_gate()?
        };
        self.cache.forget();
        if let Err(fail) = entered {
            let refusal = Refusal::of_fail(fail, &self.processor, self.caps);
            return Err(VcpuError::VmEntry(refusal));
        }
        Ok(())
    }

    /// CR0, CR4 and EFER by which whoever runs does so.
    fn mode(&self) -> Mode {
        if self.level != Level::L1 {
            return self.or_zero(self.l2_mode());
        }
        let mask = self.imposed.cr0_mask();
        let cr0 = (self.field(fields::GUEST_CR0) & !mask) | (self.mode.cr0 & mask);
        Mode { cr0, ..self.mode }
    }

    /// Takes up another mode: the registers that make it, and what follows from it.
    fn set_mode(&mut self, new: Mode) -> Result<(), VcpuError> {
        if self.level != Level::L1 {
            return self.set_l2_mode(new);
        }
        let old = self.mode;
        self.write_mode(new, new)?;
        if new.drops_translations(&old) {
            self.forget_translations()?;
        }
        Ok(())
    }

    /// Writes the registers of a mode: as the guest sees them, and as the processor runs.
    fn write_mode(&mut self, new: Mode, real: Mode) -> Result<(), VcpuError> {
        self.mode = new;
        self.processor
            .set(fields::GUEST_CR0, self.imposed.real_cr0(real.cr0))?;
        self.processor.set(fields::CR0_READ_SHADOW, new.cr0)?;
        self.processor
            .set(fields::GUEST_CR4, self.imposed.real_cr4(real.cr4))?;
        self.processor.set(fields::CR4_READ_SHADOW, new.cr4)?;
        match self.switched {
            Some(lists) => lists.set_guest_efer(real.efer),
            None => self.processor.set(fields::GUEST_EFER, real.efer)?,
        }
        let entry = if real.efer & LMA != 0 {
            self.entry | EntryControls::IA32E_MODE_GUEST
        } else {
            self.entry - EntryControls::IA32E_MODE_GUEST
        };
        if entry != self.entry {
            self.entry = entry;
            self.processor.set(fields::ENTRY_CONTROLS, entry.bits())?;
        }
        Ok(())
    }

    fn forget_translations(&mut self) -> Result<(), VcpuError> {
        self.forget_l2_shadow();
        let forgotten = self.processor.forget_translations(self.level);
        forgotten.map_err(VcpuError::Invalidation)
    }

    fn load_system(&mut self, system: &SystemRegisters) -> Result<(), VcpuError> {
        // RSP is a general register: what the caller does to it afterwards must be seen.
        self.load_rsp();
        let mode = Mode {
            cr0: system.cr0,
            cr4: system.cr4,
            efer: system.efer,
        };
        let hardware = SystemRegisters {
            cr0: self.imposed.real_cr0(mode.cr0),
            cr4: self.imposed.real_cr4(mode.cr4),
            ..*system
        };
        state::write_system_registers(&mut self.processor, &hardware)?;
        if self.shadow.is_some() {
            self.set_shadow_system(system)?;
        } else {
            self.set_mode(mode)?;
        }
        if mode.pae_paging() {
            let pdptes = read_pdptes(&self.memory, system.cr3);
            self.write_pdptes(&pdptes)?;
        }
        self.forget_translations()?;
        self.cache.set(Cached::Rip, system.rip);
        self.cache.set(Cached::Rflags, system.rflags);
        self.cache.set_interruptibility(Interruptibility::empty());
        self.processor.set(fields::GUEST_ACTIVITY_STATE, 0)?;
        self.processor.set(fields::GUEST_PENDING_DEBUG, 0)?;
        self.injection = None;
        self.registers.cr2 = system.cr2;
        self.processor.set_dr6(system.dr6);
        self.set_task_priority(system.cr8 as u8);
        Ok(())
    }

    /// Sets the segment registers and descriptor tables.
    fn write_segments(&mut self, system: &SystemRegisters) -> Result<(), AccessError> {
        use testudo_arch::regs::SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};
        for register in [Es, Cs, Ss, Ds, Fs, Gs, Ldtr, Tr] {
            state::write_segment(&mut self.processor, register, system.segment(register))?;
        }
        for (base, limit, table) in [
            (
                fields::GUEST_GDTR_BASE,
                fields::GUEST_GDTR_LIMIT,
                system.gdtr,
            ),
            (
                fields::GUEST_IDTR_BASE,
                fields::GUEST_IDTR_LIMIT,
                system.idtr,
            ),
        ] {
            self.processor.set(base, table.base)?;
            self.processor.set(limit, table.limit.into())?;
        }
        Ok(())
    }

    fn read_system(&self) -> Result<SystemRegisters, AccessError> {
        let hardware = state::read_system_registers(&self.processor)?;
        let Mode { cr0, cr4, efer } = self.mode();
        Ok(SystemRegisters {
            cr0,
            cr2: self.registers.cr2,
            cr3: self.shadow_cr3().unwrap_or(hardware.cr3),
            cr4,
            cr8: u64::from(self.task_priority()),
            efer,
            rip: self.rip(),
            rflags: self.cached(Cached::Rflags),
            dr6: self.processor.dr6(),
            ..hardware
        })
    }

    /// The four page-directory pointers at CR3; where no memory is, ones.
    fn page_directory_pointers(&mut self, cr3: u64) -> [u64; 4] {
        if self.level == Level::L1 {
            return read_pdptes(&self.memory, cr3);
        }
        let table = self.find_nested(Gpa(cr3 & 0xFFFF_FFE0));
        core::array::from_fn(|i| {
            let at = table.map(|table| table.wrapping_add(8 * i as u64));
            at.and_then(|at| self.memory.load_u64(at).ok())
                .unwrap_or(u64::MAX)
        })
    }

    /// The processor looks for them where it uses EPT.
    fn write_pdptes(&mut self, pdptes: &[u64; 4]) -> Result<(), VcpuError> {
        if !self.controls.has_ept() {
            return Ok(());
        }
        for (field, value) in setup::PDPTES.into_iter().zip(*pdptes) {
            self.processor.set(field, value)?;
        }
        Ok(())
    }

    fn is_long_code(&self) -> bool {
        let rights = self.field(fields::GUEST_CS_ACCESS_RIGHTS);
        let efer = match self.level {
            Level::L1 => self.mode.efer,
            _ => self.field(fields::GUEST_EFER),
        };
        efer & LMA != 0 && rights & SegmentAttributes::LONG.bits() != 0
    }

    /// An instruction pointer that has just left or entered the low 4 GiB.
    #[cold]
    #[inline(never)]
    fn wrapped(&self, rip: u64) -> u64 {
        if self.is_long_code() {
            rip
        } else {
            rip & 0xFFFF_FFFF
        }
    }

    /// Opens the windows that fit the interrupt awaited and the task priority.
    #[inline]
    fn open_window(&mut self) {
        let (exiting, threshold) = match (self.window, &self.apic) {
            (None, _) => (false, 0),
            (Some(AwaitedInterrupt::External), _) => (true, 0),
            // The processor delivers it.
            (Some(AwaitedInterrupt::Vector(_)), Some(apic)) => {
                (apic.holds_back() && !self.can_take_interrupt(), 0)
            }
            (Some(AwaitedInterrupt::Vector(vector)), None) => {
                // An entry with a threshold above the priority fails (SDM vol. 3C, 29.2.1.1).
                let class = vector >> 4;
                if class > self.task_priority() {
                    (true, 0)
                } else {
                    (false, class)
                }
            }
        };
        self.set_primary(PrimaryControls::INTERRUPT_WINDOW_EXITING, exiting);
        if threshold != self.tpr_threshold {
            self.tpr_threshold = threshold;
            self.set_field(fields::TPR_THRESHOLD, u32::from(threshold));
        }
    }

    #[inline]
    fn set_primary(&mut self, control: PrimaryControls, on: bool) {
        if self.primary.contains(control) != on {
            self.primary.set(control, on);
            self.watchful |= on;
            self.set_field(fields::PRIMARY_CONTROLS, self.primary.bits());
        }
    }

    /// What completing an instruction does beyond moving RIP: RF ends, a window looks for its
    /// moment, and a single step leaves its #DB pending.
    #[inline(never)]
    fn complete_step(&mut self) {
        self.watchful = self.primary.intersects(setup::WINDOWS);
        if self.watchful {
            self.interruptibility();
        }
        let rflags = self.cached(Cached::Rflags);
        if rflags & STEP_FLAGS == 0 {
            return;
        }
        let resume = RFlags::RESUME_FLAG.bits();
        if rflags & resume != 0 {
            self.cache.set(Cached::Rflags, rflags & !resume);
        }
        if rflags & RFlags::TRAP_FLAG.bits() != 0 {
            self.leave_step_pending();
        }
    }

    /// The next entry raises the #DB of a single step, with DR6.BS.
    fn leave_step_pending(&mut self) {
        self.watchful = true;
        // A shadow of MOV SS would hold the trap back.
        self.interruptibility();
        let pending = self.field(fields::GUEST_PENDING_DEBUG);
        self.set_field(
            fields::GUEST_PENDING_DEBUG,
            pending | PendingDebug::BS.bits(),
        );
    }
}

/// The reason of an exit by CPUID, with none of its flags set.
const CPUID: ExitReason = ExitReason(BasicReason::Cpuid.number() as u32);
