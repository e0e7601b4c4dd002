//! The backend as the machine's loop sees it.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::regs::{SegmentRegister, SystemRegisters};
use testudo_arch::segment::SegmentAttributes;
use testudo_arch::{Cr4Flags, Event, Gpa, Gprs, GuestMemory, Gva, Msr, RFlags};
use testudo_nested::vmx::{PhysicalEvent, SecondStage};
use testudo_vmx::controls::{Interruptibility, PrimaryControls};
use testudo_vmx::{fields, state};

use super::cache::{self, Cached};
use super::mode::GUEST_EFER;
use super::{CPUID, Level, Processor, VmxVcpu};
use crate::backend::{is_valid_pat, is_valid_xcr0};
use crate::emulate::linear::StageAccess;
use crate::irq::ApicState;
use crate::paging::{Changes, Gate};
use crate::stats::Settled;
use crate::vcpu::{AwaitedInterrupt, InitSignal, NestedStateError, Vcpu, VcpuError, VmExit};

/// HV_X64_MSR_VP_ASSIST_PAGE of Hyper-V's interface.
const ASSIST_PAGE: Msr = Msr(0x4000_0073);

impl<P: Processor, M: GuestMemory, S: SecondStage> Vcpu for VmxVcpu<'_, P, M, S> {
    // The machine's loop is its only caller, and CPUID is to pass through both without a call.
    #[inline(always)]
    fn run(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        loop {
            // Interrupts are held back: what comes after this test makes the guest exit at once.
            if requests.load(Ordering::Acquire) != 0 {
                return Ok(VmExit::Interrupted);
            }
            if self.level != Level::L1 {
                match self.run_l2() {
                    Some(exit) => return exit,
                    None => continue,
                }
            }
            if self.shadow.is_some()
                && let Some(exit) = self.outside()?
            {
                return Ok(exit);
            }
            let reason = self.enter()?;
            // CPUID needs no more than this, and never interrupts an event.
            if reason == CPUID {
                return Ok(VmExit::Cpuid);
            }
            if let Some(exit) = self.settle(reason)? {
                return Ok(exit);
            }
        }
    }

    #[inline]
    fn gprs(&self) -> &Gprs {
        &self.registers.gprs
    }

    #[inline]
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.registers.gprs
    }

    fn load_rsp(&mut self) {
        if self.registers.gprs.rsp == self.rsp_agreed {
            let rsp = self.field(fields::GUEST_RSP);
            self.registers.gprs.rsp = rsp;
            self.rsp_agreed = rsp;
        }
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.cached(Cached::Rip)
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.cache.complete_to(rip);
    }

    fn system(&self) -> SystemRegisters {
        self.or_zero(self.read_system())
    }

    fn set_system(&mut self, system: &SystemRegisters) {
        if let Err(error) = self.load_system(system) {
            self.remember(error);
        }
    }

    fn reset(&mut self) {
        self.leave_vmx_operation();
        self.set_system(&SystemRegisters::reset());
        *self.gprs_mut() = Gprs::default();
    }

    fn init_signal(&mut self) -> InitSignal {
        match self.nested_init() {
            Ok(effect) => effect,
            Err(error) => {
                self.remember(error);
                InitSignal::Waits
            }
        }
    }

    #[inline]
    fn advance(&mut self) {
        let length = fields::EXIT_INSTRUCTION_LENGTH;
        let Ok(length) = self.processor.get(length) else {
            return self.remember_read(length.encoding());
        };
        let Ok(rip) = self.cache.get(&self.processor, Cached::Rip) else {
            return self.remember_read(fields::GUEST_RIP.encoding());
        };
        let mut next = rip.wrapping_add(u64::from(length));
        // Outside 64-bit mode the instruction pointer has 32 bits. It can only have left them if
        // bit 32 changed, which is worth a look at the code segment.
        if (rip ^ next) & (1 << 32) != 0 {
            next = self.wrapped(next);
        }
        self.set_rip(next);
        if self.reason != CPUID || self.watchful {
            self.complete_step();
        }
    }

    fn complete_read(&mut self, _: u64) {}

    #[inline]
    fn can_take_interrupt(&self) -> bool {
        let open = || {
            self.injection.is_none()
                && self.cached(Cached::Rflags) & RFlags::INTERRUPT_FLAG.bits() != 0
                && !self.interruptibility().intersects(cache::SHADOW)
                && !self.is_between_modes()
        };
        if self.level == Level::L1 {
            open()
        } else {
            self.l2_takes(PhysicalEvent::Interrupt, open())
        }
    }

    fn can_take_nmi(&self) -> bool {
        let blocked = cache::SHADOW | Interruptibility::BLOCKING_BY_NMI;
        let open = self.injection.is_none()
            && !self.interruptibility().intersects(blocked)
            && !self.is_between_modes();
        if self.level == Level::L1 {
            open
        } else {
            self.l2_takes(PhysicalEvent::Nmi, open)
        }
    }

    #[inline]
    fn inject(&mut self, event: Event) {
        if self.level != Level::L1 && self.l2_exits_by(event) {
            return;
        }
        self.injection = Some(event);
        self.cache.add_work();
    }

    fn raise(&mut self, event: Event, cr2: Option<u64>) -> Option<VmExit> {
        // Whether L1 wants it is asked before it combines with anything (SDM vol. 3C, 28.2).
        if self.level != Level::L1 && self.l2_exits_by_exception(event, cr2) {
            return None;
        }
        if let Some(address) = cr2 {
            self.set_cr2(address);
        }
        match self.inject_after_what_is_due(event) {
            Ok(exit) => exit,
            Err(error) => {
                self.remember(error);
                None
            }
        }
    }

    fn single_step(&mut self) {
        self.leave_step_pending();
    }

    #[inline]
    fn set_interrupt_window(&mut self, wanted: Option<AwaitedInterrupt>) {
        self.window = wanted;
        if self.level == Level::L1 {
            self.open_window();
        } else if let Err(error) = self.open_l2_window() {
            self.remember(error);
        }
    }

    fn set_nmi_window(&mut self, wanted: bool) {
        if self.level != Level::L1 {
            if let Err(error) = self.open_l2_nmi_window(wanted) {
                self.remember(error);
            }
            return;
        }
        self.set_primary(PrimaryControls::NMI_WINDOW_EXITING, wanted);
    }

    fn set_deadline(&mut self, tsc: Option<u64>) -> bool {
        let Some(timer) = &mut self.timer else {
            return false;
        };
        timer.deadline = tsc.unwrap_or(u64::MAX);
        self.until_timer = 1;
        true
    }

    fn forget_memory(&mut self) -> Result<(), VcpuError> {
        let changes = self.gate.map(Gate::take_changes);
        if let Some(nested) = &mut self.nested {
            // What L1's EPT was composed to elsewhere is as it was.
            match changes.as_ref().and_then(Changes::places) {
                Some(places) => {
                    for &(start, len) in places {
                        nested.stage.forget(start, len);
                    }
                }
                None => nested.stage.flush(None),
            }
            nested.state.forget_frames();
        }
        let forgotten = self.processor.forget_ept();
        forgotten.map_err(VcpuError::Invalidation)
    }

    #[inline]
    fn task_priority(&self) -> u8 {
        self.apic_page.task_priority()
    }

    fn set_task_priority(&mut self, cr8: u8) {
        // The sub-class, which CR8 does not show, stays if the class does.
        if cr8 != self.apic_page.task_priority() {
            self.apic_page.set_task_priority(cr8);
        }
        if self.level == Level::L1 {
            self.open_window();
        }
    }

    fn runs_nested_guest(&self) -> bool {
        self.level != Level::L1
    }

    fn translate(&mut self, gpa: Gpa, access: &StageAccess) -> Option<Gpa> {
        self.translate_nested(gpa, access)
    }

    fn settle_refusal(&mut self) {
        if let Err(error) = self.exit_by_refusal() {
            self.remember(error);
        }
    }

    fn settled(&self) -> Option<Settled> {
        self.settled_exits()
    }

    fn take_interrupted(&mut self) -> bool {
        let nested = self.nested.as_mut();
        nested.is_some_and(|nested| core::mem::take(&mut nested.interrupted))
    }

    #[inline]
    fn delivers_interrupts(&self) -> bool {
        self.apic.is_some() && self.level == Level::L1
    }

    fn take_notification(&mut self, vector: u8) -> Option<bool> {
        if self.level == Level::L1 {
            return None;
        }
        match self.try_notification(vector) {
            Ok(taken) => taken,
            Err(error) => {
                self.remember(error);
                None
            }
        }
    }

    #[inline]
    fn virtualizes_apic(&self) -> bool {
        self.apic.is_some()
    }

    fn set_apic(&mut self, state: &ApicState) {
        let secondary = self.l1_secondary();
        if let Some(apic) = &mut self.apic {
            if self.level != Level::L1 {
                return apic.put_off(state);
            }
            let state = (state, self.apic_page);
            let set = apic.set(&mut self.processor, state, secondary, self.tables);
            self.or_zero(set);
        }
    }

    fn set_segments(&mut self, system: &SystemRegisters) {
        let set = self.write_segments(system);
        self.or_zero(set);
    }

    fn begin_interrupt_shadow(&mut self) {
        self.or_zero(self.cache.begin_shadow(&self.processor));
    }

    fn memory_written(&mut self, gpa: Gpa, len: usize) {
        self.shadow_written(gpa, len);
    }

    fn stop_watching(&mut self, gpa: Gpa) -> bool {
        self.stop_watching_shadow(gpa)
    }

    fn set_control_register(&mut self, number: u8, value: u64) -> bool {
        match self.write_shadow_register(number, value) {
            Ok(done) => done,
            Err(error) => {
                self.remember(error);
                true
            }
        }
    }

    fn invalidate_page(&mut self, address: Gva) {
        if let Err(error) = self.invalidate_shadow_page(address) {
            self.remember(error);
        }
    }

    fn save_nested(&mut self) -> Result<Option<Vec<u8>>, VcpuError> {
        self.nested_bytes()
    }

    fn restore_nested(&mut self, state: &[u8]) -> Result<bool, NestedStateError> {
        self.take_nested(state)
    }

    fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        Some(match msr {
            Msr::EFER => self.mode().efer,
            Msr::PAT => match self.shadow_pat() {
                Some(pat) => *pat,
                None => self.field(fields::GUEST_PAT),
            },
            ASSIST_PAGE => self.nested.as_ref()?.state.assist_page()?,
            _ => return testudo_nested::vmx::read_msr(self.nested.as_ref()?.state.caps(), msr),
        })
    }

    fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool> {
        match msr {
            Msr::EFER => {
                if let Some(done) = self.write_shadow_efer(value) {
                    return Some(done);
                }
                let new = self.mode().with_efer(value, GUEST_EFER);
                if let Some(new) = new
                    && let Err(error) = self.set_mode(new)
                {
                    self.remember(error);
                }
                Some(new.is_some())
            }
            Msr::PAT => {
                let valid = is_valid_pat(value);
                match self.shadow_pat() {
                    _ if !valid => {}
                    Some(pat) => *pat = value,
                    None => self.set_field(fields::GUEST_PAT, value),
                }
                Some(valid)
            }
            ASSIST_PAGE => {
                let memory = &self.memory;
                self.nested.as_mut()?.state.write_assist_page(value, memory)
            }
            // FEATURE_CONTROL is locked, and the capabilities are read-only.
            _ => {
                let caps = self.nested.as_ref()?.state.caps();
                testudo_nested::vmx::read_msr(caps, msr).map(|_| false)
            }
        }
    }

    fn set_xcr(&mut self, index: u32, value: u64) -> bool {
        let valid = index == 0 && is_valid_xcr0(value) && value & !self.xcr0_valid == 0;
        if valid {
            self.xcr0 = value;
            // SAFETY: the host has CR4.OSXSAVE set, or the guest's own could not have been set and
            // XSETBV had raised #UD; the value has been checked against what the guest may have.
            #[allow(unsafe_code, reason = "XCR0 is not in the VMCS")]
            unsafe {
                self.processor.set_xcr0(value);
            }
        }
        valid
    }

    fn xcr0(&self) -> u64 {
        self.xcr0
    }

    fn pkru(&self) -> u32 {
        if self.cr4() & Cr4Flags::PROTECTION_KEY_USER.bits() == 0 {
            return 0;
        }
        // SAFETY: CR4.PKE is among the bits that the processor allows, so it has protection keys.
        #[allow(unsafe_code, reason = "PKRU is not in the VMCS")]
        unsafe {
            self.processor.pkru()
        }
    }

    #[inline]
    fn cr4(&self) -> u64 {
        match self.level {
            Level::L1 => self.mode.cr4,
            _ => self.l2_cr4(),
        }
    }

    #[inline]
    fn cpl(&self) -> u8 {
        let rights = self.field(state::segment_fields(SegmentRegister::Ss).access_rights);
        SegmentAttributes::from_bits_retain(rights).dpl()
    }

    fn set_cr2(&mut self, cr2: u64) {
        self.registers.cr2 = cr2;
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.cache.set(Cached::Rflags, rflags);
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
        host_tsc.wrapping_add(self.tsc_offset)
    }

    fn set_guest_tsc(&mut self, host_tsc: u64, guest_tsc: u64) {
        self.tsc_offset = guest_tsc.wrapping_sub(host_tsc);
        if self.level == Level::L1 {
            return self.set_field(fields::TSC_OFFSET, self.tsc_offset);
        }
        if let Err(error) = self.move_both_clocks() {
            self.remember(error);
        }
    }
}
