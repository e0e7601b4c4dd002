//! vCPUs on AMD-V.
//!
//! The guest runs on nested paging, with its own control and debug registers, segment bases and
//! SYSCALL registers in its hands. What it must not have, or what the machine emulates, is
//! intercepted: CPUID, HLT, ports, all MSRs but those the world switch carries, the SVM
//! instructions, XSETBV, and the two exceptions (#DB, #AC) with which a guest could otherwise keep
//! its processor busy for ever (CVE-2015-5307, CVE-2015-8104).
//!
//! With [`SvmVcpu::with_shadow_paging`] it runs without nested paging.
//!
//! With [`SvmVcpu::with_nested`] the guest is offered SVM itself. Whatever runs, the guest (L1) or
//! a guest of its own (L2), has one VMCB that the processor runs it with; everything here is about
//! that one.

mod exit;
mod nested;
mod processor;
mod shadow;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::regs::{SegmentRegister, SystemRegisters};
use testudo_arch::{
    Cr0Flags, EferFlags, Event, Exception, Gpa, Gprs, GuestMemory, Gva, Hpa, Msr, RFlags,
};
use testudo_nested::svm::{NoSecondStage, PhysicalEvent, SecondStage};
use testudo_svm::Vmcb;
use testudo_svm::asid::{AsidPool, AsidSlot};
use testudo_svm::caps::{Features, SvmCaps};
use testudo_svm::defects::Defects;
use testudo_svm::exit::ExitCode;
use testudo_svm::hw::{GuestRegisters, HeldInterrupts, VmcbFrame};
use testudo_svm::intercept::{CrIntercepts, ExceptionIntercepts, Misc1, Misc2, Misc3};
use testudo_svm::permission::{MsrAccess, MsrPermissionMap};
use testudo_svm::vmcb::{InterruptState, NestedControl, VintrFlags, VirtualInterrupts};

use super::mode::Mode;
use super::{is_valid_pat, is_valid_xcr0};
use crate::code_cache::CodeCache;
use crate::emulate::linear::StageAccess;
use crate::paging::{Changes, Gate};
use crate::stats::Settled;
use crate::vcpu::{AwaitedInterrupt, InitSignal, NestedStateError, Vcpu, VcpuError, VmExit};

use nested::Nested;
pub use nested::{Flusher, NestedParts};
pub use processor::Processor;
use shadow::Shadow;

/// The MSRs that a guest reads and writes directly, because VMLOAD and VMSAVE switch them.
const DIRECT_MSRS: [Msr; 11] = [
    Msr::FS_BASE,
    Msr::GS_BASE,
    Msr::KERNEL_GS_BASE,
    Msr::STAR,
    Msr::LSTAR,
    Msr::CSTAR,
    Msr::SFMASK,
    Msr::SYSENTER_CS,
    Msr::SYSENTER_ESP,
    Msr::SYSENTER_EIP,
    Msr::TSC_AUX,
];

/// The bits of EFER that a guest may set: SCE, LME, LMA (which it cannot change), NXE, FFXSR.
const GUEST_EFER: u64 = EferFlags::SYSTEM_CALL_EXTENSIONS.bits()
    | EferFlags::LONG_MODE_ENABLE.bits()
    | EferFlags::LONG_MODE_ACTIVE.bits()
    | EferFlags::NO_EXECUTE_ENABLE.bits()
    | EferFlags::FAST_FXSAVE_FXRSTOR.bits();
const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();
const LMA: u64 = EferFlags::LONG_MODE_ACTIVE.bits();
/// DR6: a single step (APM vol. 2, 13.1.1.3).
const DR6_BS: u64 = 1 << 14;
/// DR7: the next access to a debug register raises #DB.
const DR7_GD: u64 = 1 << 13;
const LME: u64 = EferFlags::LONG_MODE_ENABLE.bits();

/// The L bit in the VMCB's form of segment attributes (APM vol. 2, 15.5.1).
const CS_LONG: u16 = 1 << 9;

/// The page attribute table after reset (APM vol. 2, 7.8.2).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// What vCPUs of one machine share: tables in memory that the processor reads.
#[derive(Clone, Copy, Debug)]
pub struct SvmTables {
    /// The root of the nested page table.
    pub nested_root: Hpa,
    /// The MSR permission map, made by [`open_direct_msrs`].
    pub msr_permissions: Hpa,
    /// The I/O permission map: all ports intercepted.
    pub io_permissions: Hpa,
}

/// Opens the MSRs that guests of this backend access directly, in a map that denies all.
pub fn open_direct_msrs(map: &mut MsrPermissionMap) {
    for msr in DIRECT_MSRS {
        map.set(msr, MsrAccess::empty());
    }
}

/// A vCPU on the processor that holds its interrupts back for it.
///
/// `S` is what composes the nested page tables of the guest's own guests, and `P` the processor.
pub struct SvmVcpu<'a, M, S = NoSecondStage, P = HeldInterrupts<'a>> {
    processor: P,
    vmcb01: VmcbFrame<'a>,
    nested: Option<Nested<S>>,
    shadow: Option<Shadow<'a>>,
    /// What it goes through into the guest and back, if others wait for it to be out.
    gate: Option<&'a Gate>,
    asids: AsidPool,
    l1_asid: AsidSlot,
    registers: GuestRegisters,
    memory: &'a M,
    saves_next_rip: bool,
    /// Behind the exiting instruction, if the processor says where that is; else zero.
    next_rip: u64,
    code_cache: CodeCache<'a>,
    physical_bits: u8,
    xcr0_valid: u64,
    has_predictor_barrier: bool,
    /// An NMI is being handled: no other until its IRET.
    nmi_masked: bool,
    /// The IRET that ends it is at this address; the mask ends once it has been executed.
    unmasking_iret: Option<u64>,
    /// The interrupt that the machine wants a window for.
    window: Option<AwaitedInterrupt>,
    /// The next entry delivers an event, and is to end right after it.
    delivery_due: bool,
    /// The machine has been told so, and an interrupt of the host's waits for the entry.
    ends_next: bool,
    /// Every entry that delivers an interrupt is such a one
    /// ([`Defects::REPEATS_INTERRUPTS`]).
    ends_deliveries: bool,
    /// EFER.LME is kept from the processor while paging is off ([`Defects::LOSES_CR0`]).
    hides_lme: bool,
    /// Nothing has happened since the last exit that the next entry would have to look at: there is
    /// no event to deliver and no flush to ask for. Whatever brings such a thing clears it; a
    /// guest that is a hypervisor, or that runs on shadow paging, is never quiet.
    is_quiet: bool,
}

/// The processor that a vCPU runs on, and what it may use there.
pub struct SvmPlace<'a, P = HeldInterrupts<'a>> {
    /// The processor.
    pub processor: P,
    /// The control block.
    pub vmcb: VmcbFrame<'a>,
    /// What the processor offers.
    pub caps: &'a SvmCaps,
    /// The shared tables.
    pub tables: &'a SvmTables,
    /// The number of the processor.
    pub number: u32,
    /// The components that the guest may enable in XCR0.
    pub xcr0_valid: u64,
    /// Whether the processor has IBPB (CPUID 8000_0008h EBX bit 12).
    pub has_predictor_barrier: bool,
    /// What the processor does wrong.
    pub defects: Defects,
}

impl<'a, M: GuestMemory, S: SecondStage, P: Processor> SvmVcpu<'a, M, S, P> {
    /// A vCPU with reset state.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::enter`] asks of the tables, for as long as this value lives: the
    /// tables are in place and reach only the guest's memory. No other guest runs on this
    /// processor, so that all its ASIDs are this vCPU's, and the guest's resident registers stay
    /// in it.
    #[allow(
        unsafe_code,
        reason = "entering a guest rests on what the caller put in memory"
    )]
    pub unsafe fn new(place: SvmPlace<'a, P>, memory: &'a M) -> Self {
        let SvmPlace {
            processor,
            vmcb: mut vmcb01,
            caps,
            tables,
            ..
        } = place;
        *vmcb01 = Vmcb::new();
        vmcb01.set_intercept_exceptions(
            ExceptionIntercepts::AC | ExceptionIntercepts::DB | ExceptionIntercepts::MC,
        );
        vmcb01.set_intercept_misc1(INTERCEPTS_1);
        vmcb01.set_intercept_misc2(INTERCEPTS_2);
        vmcb01.set_intercept_misc3(INTERCEPTS_3);
        vmcb01.set_intercept_cr(CrIntercepts::empty());
        vmcb01.set_msrpm_base_pa(tables.msr_permissions.0);
        vmcb01.set_iopm_base_pa(tables.io_permissions.0);
        vmcb01.set_nested_control(NestedControl::NP_ENABLE);
        vmcb01.set_n_cr3(tables.nested_root.0);
        vmcb01.set_g_pat(PAT_RESET);
        let virtual_interrupts = VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING);
        vmcb01.set_virtual_interrupts(virtual_interrupts);
        let mut asids = AsidPool::new(place.number, caps);
        let mut l1_asid = AsidSlot::new();
        asids.prepare(&mut l1_asid, &mut vmcb01);
        let mut vcpu = Self {
            processor,
            vmcb01,
            nested: None,
            shadow: None,
            gate: None,
            asids,
            l1_asid,
            registers: GuestRegisters::default(),
            memory,
            saves_next_rip: caps.has(Features::NRIPS),
            next_rip: 0,
            code_cache: CodeCache::default(),
            physical_bits: caps.physical_address_bits,
            xcr0_valid: place.xcr0_valid,
            has_predictor_barrier: place.has_predictor_barrier,
            nmi_masked: false,
            unmasking_iret: None,
            window: None,
            delivery_due: false,
            ends_next: false,
            ends_deliveries: place.defects.contains(Defects::REPEATS_INTERRUPTS),
            hides_lme: place.defects.contains(Defects::LOSES_CR0),
            is_quiet: false,
        };
        if vcpu.hides_lme {
            // CR0.PG must not change without EFER.LME's coming or going with it.
            vcpu.vmcb01.set_intercept_cr(CrIntercepts::WRITE_CR0);
        }
        vcpu.set_system(&SystemRegisters::reset());
        vcpu
    }

    /// Has the vCPU go through its [gate](crate::paged::Shootdown::gate), as sharing of the guest's
    /// pages wants it.
    #[must_use]
    pub fn with_gate(mut self, gate: &'a Gate) -> Self {
        self.gate = Some(gate);
        self.is_quiet = false;
        self
    }

    /// The VMCB that the processor runs: the guest's, or that of a guest of its own.
    #[inline]
    fn vmcb(&self) -> &Vmcb {
        match &self.nested {
            Some(nested) if nested.state.is_guest() => nested.state.vmcb02(),
            _ => &self.vmcb01,
        }
    }

    /// As [`Self::vmcb`], to be changed.
    #[inline]
    fn vmcb_mut(&mut self) -> &mut Vmcb {
        match &mut self.nested {
            Some(nested) if nested.state.is_guest() => nested.state.vmcb02_mut(),
            _ => &mut self.vmcb01,
        }
    }

    /// Nothing that was derived from tables is used for the guest, or a guest of its own, any more.
    fn drop_translations(&mut self) {
        self.is_quiet = false;
        self.l1_asid.flush();
        let changes = self.gate.map(Gate::take_changes);
        if let Some(nested) = &mut self.nested {
            // What L1's tables were composed to elsewhere is as it was.
            match changes.as_ref().and_then(Changes::places) {
                Some(places) => {
                    for &(start, len) in places {
                        nested.stage.forget(start, len);
                    }
                }
                None => nested.stage.flush(None),
            }
            nested.state.flush_translations();
        }
    }

    /// MOV to CR0 of whatever runs on nested paging, where the processor must not execute it.
    fn write_cr0(&mut self, value: u64) -> bool {
        let vmcb = self.vmcb();
        let old = Mode {
            cr0: vmcb.cr0(),
            cr4: vmcb.cr4(),
            efer: vmcb.efer(),
        };
        let code = vmcb.raw_segment(SegmentRegister::Cs).attributes;
        let cs_long = code & CS_LONG != 0 && old.efer & LMA != 0;
        let Some(new) = old.with_cr0(value, cs_long) else {
            return false;
        };
        let vmcb = self.vmcb_mut();
        vmcb.set_cr0(new.cr0);
        vmcb.set_efer(new.efer);
        if new.drops_translations(&old) {
            self.l1_asid.flush();
            if let Some(nested) = &mut self.nested {
                nested.state.flush_translations();
            }
        }
        true
    }

    /// EFER as the guest writes it: LMA stays what the processor made it, and LME cannot change
    /// while paging is on (APM vol. 2, 3.1.7 and 14.6.1).
    fn write_efer(&mut self, value: u64) -> bool {
        self.is_quiet = false;
        if let Some(done) = self.write_shadow_efer(value) {
            return done;
        }
        let vmcb = self.vmcb();
        let old = vmcb.efer();
        let paging = vmcb.cr0() & Cr0Flags::PAGING.bits() != 0;
        let allowed = if self.nested.is_some() {
            GUEST_EFER | SVME
        } else {
            GUEST_EFER
        };
        if value & !allowed != 0 || (paging && (value ^ old) & LME != 0) {
            return false;
        }
        if let Some(nested) = &mut self.nested {
            if !nested.state.write_svme(value) {
                return false;
            }
            nested.state.adjust_vmcb01(&mut self.vmcb01);
        }
        self.vmcb_mut()
            .set_efer((value & !LMA) | (old & LMA) | SVME);
        true
    }
}

/// The first word of intercepts.
const INTERCEPTS_1: Misc1 = Misc1::INTR
    .union(Misc1::NMI)
    .union(Misc1::CPUID)
    .union(Misc1::INVD)
    .union(Misc1::HLT)
    .union(Misc1::INVLPGA)
    .union(Misc1::IOIO)
    .union(Misc1::MSR)
    .union(Misc1::RDPMC)
    .union(Misc1::RSM)
    .union(Misc1::FERR_FREEZE)
    .union(Misc1::SHUTDOWN);

/// The second word of intercepts.
const INTERCEPTS_2: Misc2 = Misc2::VMRUN
    .union(Misc2::VMMCALL)
    .union(Misc2::VMLOAD)
    .union(Misc2::VMSAVE)
    .union(Misc2::STGI)
    .union(Misc2::CLGI)
    .union(Misc2::SKINIT)
    .union(Misc2::WBINVD)
    .union(Misc2::MONITOR)
    .union(Misc2::MWAIT)
    .union(Misc2::XSETBV)
    .union(Misc2::RDPRU);

/// The third word of intercepts.
const INTERCEPTS_3: Misc3 = Misc3::INVLPGB
    .union(Misc3::INVLPGB_ILLEGAL)
    .union(Misc3::TLBSYNC)
    .union(Misc3::MCOMMIT);

/// Moves RIP and ends an interrupt shadow, as a completed instruction does.
#[inline]
fn set_rip(vmcb: &mut Vmcb, rip: u64) {
    vmcb.set_rip(rip);
    let state = vmcb.interrupt_state();
    if state.contains(InterruptState::INTERRUPT_SHADOW) {
        vmcb.set_interrupt_state(state - InterruptState::INTERRUPT_SHADOW);
    }
}

impl<M: GuestMemory, S: SecondStage, P: Processor> Vcpu for SvmVcpu<'_, M, S, P> {
    #[inline]
    fn run(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        if !self.is_quiet {
            return self.run_watchfully(requests);
        }
        // Interrupts are held back: what comes after this test makes the guest exit at once.
        if requests.load(Ordering::Acquire) != 0 {
            return Ok(VmExit::Interrupted);
        }
        self.enter_vmcb01();
        // CPUID needs no more than this, and never interrupts an event.
        if self.vmcb01.exit_code() == ExitCode::CPUID.0 {
            return Ok(VmExit::Cpuid);
        }
        self.run_on(requests)
    }

    fn save_nested(&mut self) -> Result<Option<Vec<u8>>, VcpuError> {
        Ok(self.nested_bytes())
    }

    fn restore_nested(&mut self, state: &[u8]) -> Result<bool, NestedStateError> {
        self.take_nested(state)
    }

    #[inline]
    fn gprs(&self) -> &Gprs {
        &self.registers.gprs
    }

    #[inline]
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.registers.gprs
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.vmcb().rip()
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        set_rip(self.vmcb_mut(), rip);
    }

    fn system(&self) -> SystemRegisters {
        let mut system = self.vmcb().system_registers();
        system.efer = self.visible_efer();
        if let Some(paging) = self.l1_paging() {
            (system.cr0, system.cr3, system.cr4) =
                (paging.mode().cr0, paging.cr3(), paging.mode().cr4);
        }
        system
    }

    fn set_system(&mut self, system: &SystemRegisters) {
        self.is_quiet = false;
        let efer = system.efer | SVME;
        self.vmcb_mut()
            .set_system_registers(&SystemRegisters { efer, ..*system });
        if self.shadow.is_some() {
            self.set_shadow_system(system);
        }
    }

    fn reset(&mut self) {
        if let Some(nested) = &mut self.nested {
            nested.state.reset();
            nested.interrupted = false;
            nested.init_waits = false;
            nested.nmi_waits = false;
            nested.state.adjust_vmcb01(&mut self.vmcb01);
        }
        self.nmi_masked = false;
        self.unmasking_iret = None;
        self.registers.gprs = Gprs::default();
        self.set_system(&SystemRegisters::reset());
    }

    fn init_signal(&mut self) -> InitSignal {
        self.nested_init()
    }

    #[inline]
    fn advance(&mut self) {
        if self.is_quiet
            && let Some(next) = self.quiet_next_instruction()
        {
            return set_rip(&mut self.vmcb01, next);
        }
        self.advance_any();
    }

    fn complete_read(&mut self, _: u64) {}

    fn settled(&self) -> Option<Settled> {
        self.settled_exits()
    }

    #[inline]
    fn can_take_interrupt(&self) -> bool {
        if let Some(nested) = &self.nested {
            return nested.delivers(PhysicalEvent::Interrupt, &self.vmcb01);
        }
        self.vmcb01.rflags() & RFlags::INTERRUPT_FLAG.bits() != 0 && is_free(&self.vmcb01)
    }

    fn can_take_nmi(&self) -> bool {
        let free = match &self.nested {
            Some(nested) => nested.delivers(PhysicalEvent::Nmi, &self.vmcb01),
            None => is_free(&self.vmcb01),
        };
        free && !self.nmi_masked
    }

    #[inline]
    fn inject(&mut self, event: Event) {
        self.is_quiet = false;
        if event == Event::Nmi {
            self.nmi_masked = true;
            self.unmasking_iret = None;
            let vmcb = self.vmcb_mut();
            let misc1 = vmcb.intercept_misc1() | Misc1::IRET;
            vmcb.set_intercept_misc1(misc1);
        }
        self.vmcb_mut().set_event_inj(event.into());
    }

    fn raise(&mut self, event: Event, cr2: Option<u64>) -> Option<VmExit> {
        // Whether L1 intercepts it is asked before it combines with anything (APM vol. 2, 15.12).
        if self.l2_exits_by(event, cr2) {
            return None;
        }
        if let Some(address) = cr2 {
            self.set_cr2(address);
        }
        self.is_quiet = false;
        let interrupted = self.vmcb().event_inj();
        match Exception::from_vector(event.vector()) {
            Some(exception) => self.inject_after(event, exception, interrupted),
            None => {
                self.inject(event);
                None
            }
        }
    }

    fn single_step(&mut self) {
        // What EVENTINJ delivers changes no register, and a #DB clears GD (APM vol. 2, 13.1.1). Who
        // intercepts it sees them so too (15.12.2).
        let vmcb = self.vmcb_mut();
        vmcb.set_dr6(vmcb.dr6() | DR6_BS);
        vmcb.set_dr7(vmcb.dr7() & !DR7_GD);
        let trap = Event::fault(Exception::Debug);
        if !self.l2_exits_by(trap, None) {
            self.inject(trap);
        }
    }

    #[inline]
    fn set_interrupt_window(&mut self, wanted: Option<AwaitedInterrupt>) {
        // While L2 runs, what held the interrupt back the last time may be over.
        let is_l2 = self
            .nested
            .as_ref()
            .is_some_and(|nested| nested.state.is_guest());
        if wanted != self.window || is_l2 {
            self.window = wanted;
            self.apply_window();
        }
    }

    fn set_nmi_window(&mut self, wanted: bool) {
        self.apply_nmi_window(wanted);
    }

    #[inline]
    fn task_priority(&self) -> u8 {
        self.vmcb01.virtual_interrupts().tpr()
    }

    fn set_task_priority(&mut self, cr8: u8) {
        let virtual_interrupts = self.vmcb01.virtual_interrupts().with_tpr(cr8);
        self.vmcb01.set_virtual_interrupts(virtual_interrupts);
    }

    fn outside<R>(&mut self, work: impl FnOnce() -> R) -> R {
        self.processor.release(work)
    }

    fn forget_memory(&mut self) -> Result<(), VcpuError> {
        self.drop_translations();
        Ok(())
    }

    fn take_interrupted(&mut self) -> bool {
        let nested = self.nested.as_mut();
        nested.is_some_and(|nested| core::mem::take(&mut nested.interrupted))
    }

    fn runs_nested_guest(&self) -> bool {
        self.is_l2()
    }

    fn translate(&mut self, gpa: Gpa, access: &StageAccess) -> Option<Gpa> {
        self.translate_nested(gpa, access)
    }

    fn settle_refusal(&mut self) {
        self.exit_by_refusal();
    }

    fn memory_written(&mut self, gpa: Gpa, len: usize) {
        if let Some(shadow) = &self.shadow {
            shadow.l1.written(gpa, len);
        }
    }

    fn stop_watching(&mut self, gpa: Gpa) -> bool {
        self.stop_watching_shadow(gpa)
    }

    fn set_control_register(&mut self, number: u8, value: u64) -> bool {
        self.is_quiet = false;
        if self.shadow.is_some() {
            return self.write_shadow_register(number, value);
        }
        number == 0 && self.write_cr0(value)
    }

    fn invalidate_page(&mut self, address: Gva) {
        self.invalidate_shadow_page(address);
    }

    fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        match msr {
            Msr::EFER => Some(self.visible_efer()),
            Msr::PAT => Some(self.vmcb().g_pat()),
            _ => self.nested.as_ref()?.state.read_msr(msr),
        }
    }

    fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool> {
        match msr {
            Msr::EFER => Some(self.write_efer(value)),
            Msr::PAT => {
                let valid = is_valid_pat(value);
                if valid {
                    self.vmcb_mut().set_g_pat(value);
                }
                Some(valid)
            }
            _ => self.nested.as_mut()?.state.write_msr(msr, value),
        }
    }

    fn set_xcr(&mut self, index: u32, value: u64) -> bool {
        let valid = index == 0 && is_valid_xcr0(value) && value & !self.xcr0_valid == 0;
        if valid {
            // SAFETY: the host has CR4.OSXSAVE set, or the guest's own could not have been set and
            // XSETBV had raised #UD; the value has been checked against what the guest may have.
            #[allow(unsafe_code, reason = "XCR0 is not in the VMCB")]
            unsafe {
                self.processor.set_guest_xcr0(value);
            }
        }
        valid
    }

    /// Read anew each time: QEMU 7.2 does not know the intercept of XSETBV, so a guest there
    /// changes the register without an exit.
    fn xcr0(&self) -> u64 {
        if self.xcr0_valid == 0 {
            return 1;
        }
        // SAFETY: `xcr0_valid` comes from CPUID leaf 0xD of a processor with XSAVE, whose host has
        // CR4.OSXSAVE set.
        #[allow(unsafe_code, reason = "XCR0 is not in the VMCB")]
        unsafe {
            self.processor.guest_xcr0()
        }
    }

    fn pkru(&self) -> u32 {
        if !self.uses_keys() {
            return 0;
        }
        // SAFETY: VMRUN refuses CR4.PKE on a processor without protection keys.
        #[allow(unsafe_code, reason = "PKRU is not in the VMCB")]
        unsafe {
            self.processor.guest_pkru()
        }
    }

    #[inline]
    fn cr4(&self) -> u64 {
        self.visible_cr3_and_cr4().1
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.vmcb().cpl()
    }

    fn set_cr2(&mut self, cr2: u64) {
        self.vmcb_mut().set_cr2(cr2);
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.vmcb_mut().set_rflags(rflags);
    }

    fn xmm(&self, number: u8) -> Option<u128> {
        self.registers.sse.xmm.get(usize::from(number)).copied()
    }

    fn set_xmm(&mut self, number: u8, value: u128) {
        if let Some(register) = self.registers.sse.xmm.get_mut(usize::from(number)) {
            *register = value;
        }
    }

    #[inline]
    fn guest_tsc(&self, host_tsc: u64) -> u64 {
        host_tsc.wrapping_add(self.vmcb01.tsc_offset())
    }

    fn set_guest_tsc(&mut self, host_tsc: u64, guest_tsc: u64) {
        let offset = guest_tsc.wrapping_sub(host_tsc);
        let moved = offset.wrapping_sub(self.vmcb01.tsc_offset());
        self.vmcb01.set_tsc_offset(offset);
        if let Some(nested) = &mut self.nested
            && nested.state.is_guest()
        {
            let vmcb02 = nested.state.vmcb02_mut();
            vmcb02.set_tsc_offset(vmcb02.tsc_offset().wrapping_add(moved));
        }
    }
}

/// Whether nothing stands in the way of an event: no shadow, and no other event.
#[inline]
fn is_free(vmcb: &Vmcb) -> bool {
    !vmcb
        .interrupt_state()
        .contains(InterruptState::INTERRUPT_SHADOW)
        && !vmcb.event_inj().is_valid()
}
