//! vCPUs on AMD-V.
//!
//! The guest runs on nested paging, with its own control and debug registers, segment bases and
//! SYSCALL registers in its hands. What it must not have, or what the machine emulates, is
//! intercepted: CPUID, HLT, ports, all MSRs but those the world switch carries, the SVM
//! instructions, XSETBV, and the two exceptions (#DB, #AC) with which a guest could otherwise keep
//! its processor busy for ever (CVE-2015-5307, CVE-2015-8104).

use core::sync::atomic::{AtomicU32, Ordering};

use testudo_arch::regs::{CpuMode, SegmentRegister, SystemRegisters};
use testudo_arch::{
    Cr0Flags, Cr4Flags, EferFlags, Event, Exception, Gprs, GuestMemory, Gva, Hpa, Msr, PAGE_SIZE,
    PageSize, RFlags,
};
use testudo_ept::walk::{Access, AccessKind, walk};
use testudo_svm::Exit;
use testudo_svm::caps::{Features, SvmCaps};
use testudo_svm::event::{Combined, RawEvent};
use testudo_svm::exit::{ExceptionInfo, ExitCode, NestedFaultBits, NestedPageFault};
use testudo_svm::hw::{GuestRegisters, HeldInterrupts, VmcbFrame};
use testudo_svm::intercept::{CrIntercepts, ExceptionIntercepts, Misc1, Misc2, Misc3};
use testudo_svm::permission::{MsrAccess, MsrPermissionMap};
use testudo_svm::vmcb::{InterruptState, NestedControl, VintrFlags, VirtualInterrupts, Vmcb};

use crate::code_cache::{CodeCache, FetchKey};
use crate::emulate;
use crate::guest_cpu::paging_state;
use crate::vcpu::{AwaitedInterrupt, MemoryAccess, PortAccess, Vcpu, VcpuError, VmExit};

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
pub struct SvmVcpu<'a, M> {
    processor: HeldInterrupts<'a>,
    vmcb: VmcbFrame<'a>,
    registers: GuestRegisters,
    memory: &'a M,
    saves_next_rip: bool,
    /// Behind the exiting instruction, if the processor says where that is; else zero.
    next_rip: u64,
    code_cache: CodeCache<'a>,
    physical_bits: u8,
    xcr0_valid: u64,
    /// An NMI is being handled: no other until its IRET.
    nmi_masked: bool,
    /// The IRET that ends it is at this address; the mask ends once it has been executed.
    unmasking_iret: Option<u64>,
    window: Option<AwaitedInterrupt>,
}

impl<'a, M: GuestMemory> SvmVcpu<'a, M> {
    /// A vCPU with reset state on the processor that `processor` stands for.
    ///
    /// `xcr0_valid` are the components that the guest may enable in XCR0.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::enter`] asks of the tables and the ASID, for as long as this value
    /// lives: the tables in `tables` are in place and reach only the guest's memory, and `asid` is
    /// this guest's alone on this processor. The guest's resident registers stay in this processor.
    #[allow(
        unsafe_code,
        reason = "entering a guest rests on what the caller put in memory"
    )]
    pub unsafe fn new(
        processor: HeldInterrupts<'a>,
        mut vmcb: VmcbFrame<'a>,
        caps: &SvmCaps,
        tables: &SvmTables,
        asid: u32,
        memory: &'a M,
        xcr0_valid: u64,
    ) -> Self {
        *vmcb = Vmcb::new();
        vmcb.set_intercept_exceptions(
            ExceptionIntercepts::AC | ExceptionIntercepts::DB | ExceptionIntercepts::MC,
        );
        vmcb.set_intercept_misc1(INTERCEPTS_1);
        vmcb.set_intercept_misc2(INTERCEPTS_2);
        vmcb.set_intercept_misc3(
            Misc3::INVLPGB | Misc3::INVLPGB_ILLEGAL | Misc3::TLBSYNC | Misc3::MCOMMIT,
        );
        vmcb.set_intercept_cr(CrIntercepts::empty());
        vmcb.set_msrpm_base_pa(tables.msr_permissions.0);
        vmcb.set_iopm_base_pa(tables.io_permissions.0);
        vmcb.set_asid(asid);
        vmcb.set_tlb_control(testudo_svm::vmcb::TlbControl::FlushAll);
        vmcb.set_nested_control(NestedControl::NP_ENABLE);
        vmcb.set_n_cr3(tables.nested_root.0);
        vmcb.set_g_pat(PAT_RESET);
        vmcb.set_virtual_interrupts(
            VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING),
        );
        let mut vcpu = Self {
            processor,
            vmcb,
            registers: GuestRegisters::default(),
            memory,
            saves_next_rip: caps.has(Features::NRIPS),
            next_rip: 0,
            code_cache: CodeCache::default(),
            physical_bits: caps.physical_address_bits,
            xcr0_valid,
            nmi_masked: false,
            unmasking_iret: None,
            window: None,
        };
        vcpu.set_system(&SystemRegisters::reset());
        vcpu
    }

    /// Enters the guest once.
    #[inline]
    fn enter(&mut self) {
        // SAFETY: `new` set the intercepts that `enter` lists and nothing here removes one; the
        // rest is what the caller of `new` promised.
        #[allow(unsafe_code, reason = "the one entry; see `new`")]
        unsafe {
            self.processor.enter(&mut self.vmcb, &mut self.registers);
        }
        self.vmcb.set_event_inj(RawEvent::NONE);
        self.note_progress();
        self.next_rip = if self.saves_next_rip {
            self.vmcb.n_rip()
        } else {
            0
        };
    }

    /// What the machine must decide about the exit; `None` if it is settled here.
    #[inline(never)]
    fn settle(&mut self) -> Option<VmExit> {
        let exit = Exit::read(&self.vmcb);
        if let Exit::Exception(exception) = exit {
            return self.reflect(exception);
        }
        self.take_up_interrupted_event();
        Some(match exit {
            Exit::Cpuid => VmExit::Cpuid,
            Exit::Rdmsr => VmExit::ReadMsr(Msr(self.registers.gprs.rcx as u32)),
            Exit::Wrmsr => {
                let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
                VmExit::WriteMsr(Msr(rcx as u32), rdx << 32 | rax & 0xFFFF_FFFF)
            }
            Exit::Interrupt | Exit::Nmi => {
                self.processor.take_pending();
                VmExit::Interrupted
            }
            Exit::NestedPageFault(fault) => Self::memory_exit(fault),
            Exit::Port(access) => {
                // "EXITINFO2 contains the rIP of the instruction following the IN/OUT" (APM vol. 2,
                // 15.10.2), on all processors.
                self.next_rip = access.next_rip;
                Self::string_or_port(access)
            }
            Exit::Hlt => VmExit::Halt,
            Exit::VirtualInterrupt => {
                self.set_interrupt_window(None);
                VmExit::InterruptWindow
            }
            Exit::Vmmcall => VmExit::Hypercall,
            Exit::Iret => {
                self.iret();
                return None;
            }
            Exit::Xsetbv => {
                let Gprs { rax, rcx, rdx, .. } = self.registers.gprs;
                VmExit::SetXcr {
                    index: rcx as u32,
                    value: rdx << 32 | rax & 0xFFFF_FFFF,
                }
            }
            Exit::Wbinvd | Exit::Invd => VmExit::CacheFlush,
            Exit::Shutdown => VmExit::Shutdown,
            Exit::Invalid => VmExit::InvalidState,
            Exit::Vmrun
            | Exit::Vmload
            | Exit::Vmsave
            | Exit::Stgi
            | Exit::Clgi
            | Exit::Skinit
            | Exit::Invlpga
            | Exit::Invlpgb { .. }
            | Exit::Tlbsync
            | Exit::Mcommit
            | Exit::Monitor
            | Exit::Mwait { .. }
            | Exit::Rdpmc
            | Exit::Rdpru
            | Exit::Rsm => VmExit::Forbidden,
            _ => VmExit::Unknown {
                code: self.vmcb.exit_code(),
                info: [self.vmcb.exit_info1(), self.vmcb.exit_info2()],
            },
        })
    }

    /// An event whose delivery the exit interrupted goes first at the next entry.
    #[inline]
    fn take_up_interrupted_event(&mut self) {
        let interrupted = self.vmcb.exit_int_info();
        if interrupted.is_valid() {
            let again = interrupted
                .to_redeliver()
                .map_or(RawEvent::NONE, RawEvent::from);
            self.vmcb.set_event_inj(again);
        }
    }

    /// An intercepted exception goes back to the guest, together with what it interrupted.
    fn reflect(&mut self, exception: ExceptionInfo) -> Option<VmExit> {
        let Some(known) = Exception::from_vector(exception.vector) else {
            return Some(VmExit::Exception {
                vector: exception.vector,
                error_code: exception.error_code,
            });
        };
        match self.vmcb.exit_int_info().combine(known) {
            Combined::Serial => self.vmcb.set_event_inj(exception.to_event().into()),
            Combined::DoubleFault => {
                let event = Event::fault_with(Exception::DoubleFault, 0);
                self.vmcb.set_event_inj(event.into());
            }
            Combined::Shutdown => return Some(VmExit::Shutdown),
        }
        None
    }

    /// The end of an NMI's handler is near: its IRET was intercepted.
    fn iret(&mut self) {
        let misc1 = self.vmcb.intercept_misc1() - Misc1::IRET;
        self.vmcb.set_intercept_misc1(misc1);
        self.unmasking_iret = Some(self.vmcb.rip());
    }

    /// "The IRET intercept is taken before the instruction": NMIs stay masked until the guest was
    /// seen elsewhere.
    #[inline]
    fn note_progress(&mut self) {
        if let Some(at) = self.unmasking_iret
            && self.vmcb.rip() != at
        {
            self.unmasking_iret = None;
            self.nmi_masked = false;
        }
    }

    /// The length of the instruction that exited, from its bytes.
    #[inline]
    fn instruction_length(&mut self) -> u8 {
        let key = FetchKey {
            rip: self.vmcb.rip(),
            cr3: self.vmcb.cr3(),
            cr4: self.vmcb.cr4(),
        };
        let long = self.vmcb.raw_segment(SegmentRegister::Cs).attributes & CS_LONG != 0;
        if long
            && self.vmcb.efer() & LMA != 0
            && let Some(length) = self.code_cache.length(&key)
        {
            return length;
        }
        self.measure_instruction(key)
    }

    /// As [`Self::instruction_length`], for any mode and any instruction, also across pages.
    #[inline(never)]
    fn measure_instruction(&mut self, key: FetchKey) -> u8 {
        let system = self.vmcb.system_registers();
        let mode = system.mode();
        let paging = paging_state(&system, 0, self.physical_bits);
        let linear = match mode {
            CpuMode::Long64 => system.rip,
            _ => system.cs.base.wrapping_add(system.rip) & 0xFFFF_FFFF,
        };
        let mut code = [0; emulate::MAX_LENGTH];
        let mut have = 0;
        let access = Access::at_cpl(AccessKind::Fetch, self.vmcb.cpl());
        while have < code.len() {
            let at = Gva(linear).wrapping_add(have as u64);
            let Ok(found) = walk(self.memory, &paging, at, access) else {
                break;
            };
            let room = (PAGE_SIZE - at.offset_in(PageSize::Size4K)) as usize;
            let part = room.min(code.len() - have);
            if self
                .memory
                .read(found.gpa, &mut code[have..have + part])
                .is_err()
            {
                break;
            }
            if let Some(length) = emulate::length(&code[..have + part], mode) {
                if have == 0 && mode == CpuMode::Long64 {
                    let code = &code[..usize::from(length)];
                    self.code_cache.remember(self.memory, key, &found, code);
                }
                return length;
            }
            have += part;
        }
        // The processor fetched and decoded it a moment ago: only another processor that changes
        // the code can lead here, and then the guest goes on at whatever it put there.
        0
    }

    fn string_or_port(access: testudo_svm::exit::PortAccess) -> VmExit {
        let port = PortAccess {
            port: access.port,
            size: access.size,
            write: !access.input,
        };
        if access.string {
            VmExit::StringPort(port)
        } else {
            VmExit::Port(port)
        }
    }

    fn memory_exit(fault: NestedPageFault) -> VmExit {
        VmExit::Memory(MemoryAccess {
            gpa: fault.gpa,
            gva: None,
            write: fault.bits.contains(NestedFaultBits::WRITE),
            fetch: fault.bits.contains(NestedFaultBits::FETCH),
            table: fault.bits.contains(NestedFaultBits::TABLE_WALK),
        })
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

impl<M: GuestMemory> Vcpu for SvmVcpu<'_, M> {
    #[inline]
    fn run(&mut self, requests: &AtomicU32) -> Result<VmExit, VcpuError> {
        loop {
            // Interrupts are held back: what comes after this test makes the guest exit at once.
            if requests.load(Ordering::Acquire) != 0 {
                return Ok(VmExit::Interrupted);
            }
            self.enter();
            // CPUID needs no more than this, and never interrupts an event.
            if self.vmcb.exit_code() == ExitCode::CPUID.0 {
                return Ok(VmExit::Cpuid);
            }
            if let Some(exit) = self.settle() {
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

    #[inline]
    fn rip(&self) -> u64 {
        self.vmcb.rip()
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.vmcb.set_rip(rip);
        let state = self.vmcb.interrupt_state();
        if state.contains(InterruptState::INTERRUPT_SHADOW) {
            self.vmcb
                .set_interrupt_state(state - InterruptState::INTERRUPT_SHADOW);
        }
    }

    fn system(&self) -> SystemRegisters {
        let mut system = self.vmcb.system_registers();
        system.efer &= !SVME;
        system
    }

    fn set_system(&mut self, system: &SystemRegisters) {
        let efer = system.efer | SVME;
        self.vmcb
            .set_system_registers(&SystemRegisters { efer, ..*system });
    }

    #[inline]
    fn advance(&mut self) {
        let next = match self.next_rip {
            0 => self
                .vmcb
                .rip()
                .wrapping_add(u64::from(self.instruction_length())),
            next => next,
        };
        self.set_rip(next);
    }

    fn complete_read(&mut self, _: u64) {}

    #[inline]
    fn can_take_interrupt(&self) -> bool {
        self.vmcb.rflags() & RFlags::INTERRUPT_FLAG.bits() != 0
            && !self
                .vmcb
                .interrupt_state()
                .contains(InterruptState::INTERRUPT_SHADOW)
            && !self.vmcb.event_inj().is_valid()
    }

    fn can_take_nmi(&self) -> bool {
        !self.nmi_masked
            && !self
                .vmcb
                .interrupt_state()
                .contains(InterruptState::INTERRUPT_SHADOW)
            && !self.vmcb.event_inj().is_valid()
    }

    #[inline]
    fn inject(&mut self, event: Event) {
        if event == Event::Nmi {
            self.nmi_masked = true;
            self.unmasking_iret = None;
            let misc1 = self.vmcb.intercept_misc1() | Misc1::IRET;
            self.vmcb.set_intercept_misc1(misc1);
        }
        self.vmcb.set_event_inj(event.into());
    }

    /// The window is a virtual interrupt of the same priority whose intercept comes before its
    /// delivery (APM vol. 2, 15.21.4).
    #[inline]
    fn set_interrupt_window(&mut self, wanted: Option<AwaitedInterrupt>) {
        if wanted == self.window {
            return;
        }
        self.window = wanted;
        let idle = self
            .vmcb
            .virtual_interrupts()
            .remove(VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR);
        let misc1 = self.vmcb.intercept_misc1();
        let (asked, misc1) = match wanted {
            Some(AwaitedInterrupt::Vector(vector)) => {
                let asked = idle.insert(VintrFlags::V_IRQ);
                (
                    asked.with_priority(vector >> 4).with_vector(vector),
                    misc1 | Misc1::VINTR,
                )
            }
            Some(AwaitedInterrupt::External) => (
                idle.insert(VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR),
                misc1 | Misc1::VINTR,
            ),
            None => (idle, misc1 - Misc1::VINTR),
        };
        self.vmcb.set_virtual_interrupts(asked);
        self.vmcb.set_intercept_misc1(misc1);
    }

    #[inline]
    fn task_priority(&self) -> u8 {
        self.vmcb.virtual_interrupts().tpr()
    }

    fn set_task_priority(&mut self, cr8: u8) {
        let virtual_interrupts = self.vmcb.virtual_interrupts().with_tpr(cr8);
        self.vmcb.set_virtual_interrupts(virtual_interrupts);
    }

    fn outside<R>(&mut self, work: impl FnOnce() -> R) -> R {
        self.processor.release(work)
    }

    fn read_msr(&mut self, msr: Msr) -> Option<u64> {
        Some(match msr {
            Msr::EFER => self.vmcb.efer() & !SVME,
            Msr::PAT => self.vmcb.g_pat(),
            _ => return None,
        })
    }

    fn write_msr(&mut self, msr: Msr, value: u64) -> Option<bool> {
        match msr {
            Msr::EFER => Some(self.write_efer(value)),
            Msr::PAT => {
                // Reserved types are 2, 3 and all above 7 (APM vol. 2, 7.8.1).
                let valid = value
                    .to_le_bytes()
                    .iter()
                    .all(|t| matches!(t, 0 | 1 | 4..=7));
                if valid {
                    self.vmcb.set_g_pat(value);
                }
                Some(valid)
            }
            _ => None,
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
        let keys = Cr4Flags::PROTECTION_KEY_USER.bits();
        if self.vmcb.cr4() & keys == 0 {
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
        self.vmcb.cr4()
    }

    #[inline]
    fn cpl(&self) -> u8 {
        self.vmcb.cpl()
    }

    fn set_cr2(&mut self, cr2: u64) {
        self.vmcb.set_cr2(cr2);
    }

    fn set_rflags(&mut self, rflags: u64) {
        self.vmcb.set_rflags(rflags);
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
        host_tsc.wrapping_add(self.vmcb.tsc_offset())
    }

    fn set_guest_tsc(&mut self, host_tsc: u64, guest_tsc: u64) {
        self.vmcb.set_tsc_offset(guest_tsc.wrapping_sub(host_tsc));
    }
}

impl<M> SvmVcpu<'_, M> {
    /// EFER as the guest writes it: LMA stays what the processor made it, and LME cannot change
    /// while paging is on (APM vol. 2, 3.1.7 and 14.6.1).
    fn write_efer(&mut self, value: u64) -> bool {
        let old = self.vmcb.efer();
        let paging = self.vmcb.cr0() & Cr0Flags::PAGING.bits() != 0;
        if value & !GUEST_EFER != 0 || (paging && (value ^ old) & LME != 0) {
            return false;
        }
        self.vmcb.set_efer((value & !LMA) | (old & LMA) | SVME);
        true
    }
}

/// What XSETBV demands of XCR0 (APM vol. 2, 11.5.2): x87 always, AVX with SSE only, the three
/// components of AVX-512 together and with AVX only.
fn is_valid_xcr0(value: u64) -> bool {
    const AVX512: u64 = 0xE0;
    value & 1 != 0
        && (value & 4 == 0 || value & 2 != 0)
        && (value & AVX512 == 0 || (value & AVX512 == AVX512 && value & 6 == 6))
}
