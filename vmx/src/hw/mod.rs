//! The processor itself: turning VMX on, making a VMCS current, and entering guests.
//!
//! The states are types. A processor outside VMX operation has nothing to call here but
//! [`Vmx::enable`]; one in VMX root operation is a [`Vmx`]; and while a VMCS is current there is a
//! [`CurrentVmcs`], through which alone fields can be reached and the guest entered. None of them is
//! `Send`: they stay on their processor. A VMCS moves to another processor as a [`ClearVmcs`],
//! which [`Vmx::clear`] makes of it.
//!
//! ```no_run
//! use std::error::Error;
//! use testudo_vmx::exit::Exit;
//! use testudo_vmx::hw::{GuestRegisters, RegionFrame, Vmx, VmcsKind};
//!
//! unsafe fn run(own: RegionFrame, frame: RegionFrame) -> Result<(), Box<dyn Error>> {
//!     // Off.
//!     let caps = unsafe { Vmx::capabilities()? };
//!     let mut vmx = unsafe { Vmx::enable(&caps, own)? };
//!     // In VMX root operation.
//!     let mut guest = vmx.create_vmcs(frame, VmcsKind::Ordinary)?;
//!     let mut vmcs = vmx.load(&mut guest)?;
//!     // With a VMCS loaded: its fields, then the guest.
//!     let mut registers = GuestRegisters::default();
//!     unsafe { vmcs.enter(&mut registers)? };
//!     println!("{}", Exit::read(&vmcs)?);
//!     vmx.clear(guest)?;
//!     unsafe { vmx.disable()? };
//!     Ok(())
//! }
//! ```
//!
//! While a VMCS is loaded, the processor cannot leave VMX operation, and neither goes elsewhere:
//!
//! ```compile_fail,E0505
//! # use testudo_vmx::hw::{Vmcs, Vmx};
//! fn leave(mut vmx: Vmx, vmcs: &mut Vmcs) {
//!     let current = vmx.load(vmcs).unwrap();
//!     let _ = unsafe { vmx.disable() };
//!     drop(current);
//! }
//! ```
//!
//! ```compile_fail,E0277
//! # use testudo_vmx::hw::CurrentVmcs;
//! fn send<T: Send>(_: T) {}
//! fn elsewhere(vmcs: CurrentVmcs<'static>) {
//!     send(vmcs);
//! }
//! ```
//!
//! # What the world switch saves, and what it leaves in the registers
//!
//! VM entries and exits switch what the VMCS holds. The switch adds, for every exit: the general
//! registers but RSP; XMM0 to XMM15 and MXCSR, which are all that host code compiled for this target
//! can touch (legacy SSE, which keeps the upper halves of the YMM registers); and CR2. That is 46
//! instructions in, VMRESUME included, and 53 out.
//!
//! The rest of a guest's state *stays in the registers* while the host runs: x87, the upper halves
//! of YMM, ZMM, XCR0, PKRU, DR0 to DR3, DR6, KERNEL_GS_BASE, the SYSCALL MSRs, TSC_AUX and the
//! user-mode CET MSRs. The host must not use them; a guest that has its processor to itself never
//! pays for them. Before another guest, or the same one elsewhere, they are moved with
//! [`ResidentRegisters`].
//!
//! # Interrupts
//!
//! A guest is entered with IF = 0, and an exit leaves IF = 0. With external-interrupt exiting an
//! interrupt that becomes pending after the last check and before the entry makes the guest exit at
//! once, so no request is lost: hold interrupts back with [`Vmx::hold_interrupts`], check, enter.
#![allow(unsafe_code, reason = "privileged instructions")]

pub mod instructions;

mod guest_msrs;
mod host;
mod resident;
mod switch;

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;

use testudo_arch::cpuid::Cpuid;
use testudo_arch::{Hpa, Msr};

use crate::caps::{FEATURE_CONTROL_LOCKED, FEATURE_CONTROL_VMX, NoVmx, VmxCaps};
use crate::encoding::Encoding;
use crate::error::{AccessError, RegionError, VmFail};
use crate::exit::ExitReason;
use crate::group::FieldGroup;
use crate::vmcs::{VmcsRead, VmcsWrite};
use instructions as raw;

pub use guest_msrs::GuestMsrs;
pub use host::HostState;
pub use resident::{ResidentRegisters, ResidentUnsupported, XsaveArea};
pub use switch::{GuestRegisters, SseRegisters};

/// A 4 KiB frame of memory for the processor's own structures.
#[derive(Debug)]
pub struct RegionFrame {
    pointer: NonNull<u32>,
    address: Hpa,
}

// SAFETY: a frame is exclusive memory, reached from whichever processor has the value.
unsafe impl Send for RegionFrame {}

impl RegionFrame {
    /// Joins a frame with its physical address.
    ///
    /// # Safety
    ///
    /// `pointer` is 4 KiB of write-back memory at the physical address `address`, aligned to 4 KiB,
    /// and used by nothing else as long as the value, or one made from it, lives.
    #[inline]
    pub unsafe fn new(pointer: NonNull<u8>, address: Hpa) -> Self {
        Self {
            pointer: pointer.cast(),
            address,
        }
    }

    /// The physical address.
    #[inline]
    pub fn address(&self) -> Hpa {
        self.address
    }

    /// Writes what the processor wants to find at the start of a region (27.2): the revision, and
    /// no abort indicator.
    fn prepare(&mut self, revision: u32) {
        // SAFETY: the frame is 4 KiB of exclusive memory, aligned.
        unsafe {
            self.pointer.write_volatile(revision);
            self.pointer.add(1).write_volatile(0);
        }
    }

    /// An instruction's failure on this region.
    #[cold]
    fn error(&self, instruction: &'static str, revision: u32, fail: VmFail) -> RegionError {
        RegionError {
            instruction,
            region: self.address,
            // SAFETY: the frame is 4 KiB of exclusive memory, aligned. Of a region the first word alone
            // is software's, also while the processor uses it.
            found: unsafe { self.pointer.read_volatile() },
            revision,
            fail,
        }
    }
}

/// Why a processor could not be put into VMX operation. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// The firmware locked VMX off.
    #[error(transparent)]
    Unavailable(#[from] NoVmx),
    /// CR0 or CR4 lacks a bit that VMX operation needs, or has one that it forbids.
    #[error("{register} is {value:#x}; VMX operation does not allow its bits {wrong:#x}")]
    FixedBits {
        /// "CR0" or "CR4".
        register: &'static str,
        /// Its value.
        value: u64,
        /// The bits to be inverted.
        wrong: u64,
    },
    /// CR4.VMXE is set already: somebody else uses VMX here.
    #[error("CR4.VMXE is already set (CR4 = {cr4:#x})")]
    AlreadyEnabled {
        /// CR4.
        cr4: u64,
    },
    /// VMXON failed.
    #[error(transparent)]
    Vmxon(#[from] RegionError),
}

/// A VMCS that is active on this processor.
#[derive(Debug)]
#[must_use = "the processor may hold part of it in a cache: clear it before its memory is reused"]
pub struct Vmcs {
    frame: RegionFrame,
    launched: bool,
    host_rsp: u64,
    _processor: PhantomData<*mut ()>,
}

impl Vmcs {
    /// The physical address of the region: what a VMCS link pointer holds.
    #[inline]
    pub fn address(&self) -> Hpa {
        self.frame.address
    }

    /// Whether a guest was entered with it since it was last clear.
    #[inline]
    pub fn is_launched(&self) -> bool {
        self.launched
    }
}

/// A VMCS that is on no processor, with its contents in memory: it may be sent elsewhere.
#[derive(Debug)]
pub struct ClearVmcs {
    frame: RegionFrame,
}

impl ClearVmcs {
    /// The frame, for another use.
    pub fn into_frame(self) -> RegionFrame {
        self.frame
    }
}

/// What a VMCS region is for (27.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmcsKind {
    /// Entering guests.
    Ordinary,
    /// Being the shadow that a guest hypervisor's VMREAD and VMWRITE reach.
    Shadow,
}

/// This processor, in VMX root operation.
#[derive(Debug)]
pub struct Vmx {
    revision: u32,
    region: RegionFrame,
    current: Hpa,
    // VMX operation belongs to one processor, so the value stays there.
    _processor: PhantomData<*mut ()>,
}

const NO_VMCS: Hpa = Hpa(u64::MAX);
const CR4_VMXE: u64 = 1 << 13;

impl Vmx {
    /// The capabilities of this processor.
    ///
    /// # Errors
    ///
    /// [`NoVmx`]: it has no VMX, or the firmware locked it off.
    ///
    /// # Safety
    ///
    /// CPL 0.
    pub unsafe fn capabilities() -> Result<VmxCaps, NoVmx> {
        let table = Cpuid::of_this_processor();
        // SAFETY: CPL 0. `read_from` asks for IA32_FEATURE_CONTROL only if CPUID reports VMX, and
        // for every other MSR only if those before it announce it.
        VmxCaps::read_from(
            |msr| Some(unsafe { raw::rdmsr(msr) }),
            |leaf, sub| table.query(leaf, sub),
        )
    }

    /// Puts this processor into VMX root operation: locks IA32_FEATURE_CONTROL if the firmware left
    /// it open, sets CR4.VMXE, and executes VMXON.
    ///
    /// # Errors
    ///
    /// See [`EnableError`].
    ///
    /// # Safety
    ///
    /// - This runs at CPL 0, on a processor whose capabilities are `caps`.
    /// - The caller's thread stays on this processor as long as the value lives.
    pub unsafe fn enable(caps: &VmxCaps, mut region: RegionFrame) -> Result<Self, EnableError> {
        // SAFETY: CPL 0, and a processor with VMX has the MSR.
        let (cr0, cr4, control) =
            unsafe { (raw::cr0(), raw::cr4(), raw::rdmsr(Msr::FEATURE_CONTROL)) };
        if cr4 & CR4_VMXE != 0 {
            return Err(EnableError::AlreadyEnabled { cr4 });
        }
        let locked = control & FEATURE_CONTROL_LOCKED != 0;
        if locked && control & FEATURE_CONTROL_VMX == 0 {
            let feature_control = control;
            return Err(NoVmx::LockedOff { feature_control }.into());
        }
        let new_cr4 = cr4 | CR4_VMXE;
        let registers = [("CR0", cr0, caps.cr0), ("CR4", new_cr4, caps.cr4)];
        for (register, value, fixed) in registers {
            let wrong = fixed.violations(value, 0);
            if wrong != 0 {
                return Err(EnableError::FixedBits {
                    register,
                    value,
                    wrong,
                });
            }
        }
        let revision = caps.basic.revision();
        region.prepare(revision);
        // SAFETY: an unlocked IA32_FEATURE_CONTROL can be written. CR0 and CR4 suit, which was just
        // checked, and the region has the revision and is this value's own from here on.
        let result = unsafe {
            if !locked {
                let locked_on = control | FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX;
                raw::wrmsr(Msr::FEATURE_CONTROL, locked_on);
            }
            raw::set_cr4(new_cr4);
            raw::vmxon(region.address)
        };
        if let Err(fail) = result {
            // SAFETY: back to the value that it had.
            unsafe { raw::set_cr4(cr4) };
            return Err(region.error("VMXON", revision, fail).into());
        }
        Ok(Self {
            revision,
            region,
            current: NO_VMCS,
            _processor: PhantomData,
        })
    }

    /// Leaves VMX operation and gives the frame back.
    ///
    /// # Errors
    ///
    /// VMXOFF failed; the processor is still in VMX operation.
    ///
    /// # Safety
    ///
    /// Every VMCS that was made on this processor has been [cleared](Self::clear).
    pub unsafe fn disable(self) -> Result<RegionFrame, VmFail> {
        // SAFETY: `self` proves VMX root operation, and no VMCS is active, says the caller.
        unsafe {
            raw::vmxoff()?;
            raw::set_cr4(raw::cr4() & !CR4_VMXE);
        }
        Ok(self.region)
    }

    /// Makes a frame a VMCS, active on this processor and not launched. What its fields hold is
    /// undefined until they are written.
    ///
    /// # Errors
    ///
    /// The processor does not take the address.
    pub fn create_vmcs(
        &mut self,
        mut frame: RegionFrame,
        kind: VmcsKind,
    ) -> Result<Vmcs, RegionError> {
        let shadow = if kind == VmcsKind::Shadow { 1 << 31 } else { 0 };
        frame.prepare(self.revision | shadow);
        // SAFETY: VMX root operation; the frame is exclusive memory, active nowhere.
        if let Err(fail) = unsafe { raw::vmclear(frame.address) } {
            return Err(frame.error("VMCLEAR", self.revision, fail));
        }
        Ok(self.adopt(ClearVmcs { frame }))
    }

    /// Takes over a VMCS that came from another processor.
    pub fn adopt(&mut self, vmcs: ClearVmcs) -> Vmcs {
        Vmcs {
            frame: vmcs.frame,
            launched: false,
            // No stack is there: the first entry writes HOST_RSP.
            host_rsp: u64::MAX,
            _processor: PhantomData,
        }
    }

    /// Takes a VMCS off this processor: its contents are in memory then, and it may go elsewhere.
    ///
    /// # Errors
    ///
    /// The processor does not take the address.
    pub fn clear(&mut self, vmcs: Vmcs) -> Result<ClearVmcs, RegionError> {
        // SAFETY: VMX root operation; the VMCS is active on this processor and nowhere else.
        if let Err(fail) = unsafe { raw::vmclear(vmcs.frame.address) } {
            return Err(vmcs.frame.error("VMCLEAR", self.revision, fail));
        }
        if self.current == vmcs.frame.address {
            self.current = NO_VMCS;
        }
        Ok(ClearVmcs { frame: vmcs.frame })
    }

    /// Makes a VMCS current. If it already is, this costs a comparison.
    ///
    /// # Errors
    ///
    /// The processor does not take the address or the revision.
    #[inline]
    pub fn load<'a>(&'a mut self, vmcs: &'a mut Vmcs) -> Result<CurrentVmcs<'a>, RegionError> {
        if self.current != vmcs.frame.address {
            self.switch_to(vmcs)?;
        }
        Ok(CurrentVmcs { vmcs, vmx: self })
    }

    #[inline(never)]
    fn switch_to(&mut self, vmcs: &Vmcs) -> Result<(), RegionError> {
        // SAFETY: VMX root operation; a `Vmcs` was cleared once, and is active here or nowhere.
        if let Err(fail) = unsafe { raw::vmptrld(vmcs.frame.address) } {
            return Err(vmcs.frame.error("VMPTRLD", self.revision, fail));
        }
        self.current = vmcs.frame.address;
        Ok(())
    }

    /// Invalidates guest-physical and combined translations.
    ///
    /// # Errors
    ///
    /// The processor does not support the kind, or the EPT pointer is not valid.
    ///
    /// # Safety
    ///
    /// The processor has INVEPT ([`EptVpidCaps`](crate::caps::EptVpidCaps)).
    #[inline]
    pub unsafe fn invept(&mut self, kind: raw::InveptKind) -> Result<(), VmFail> {
        // SAFETY: VMX root operation, and the instruction exists.
        unsafe { raw::invept(kind) }
    }

    /// Invalidates linear and combined translations.
    ///
    /// # Errors
    ///
    /// The processor does not support the kind, the VPID is 0, or the address is not canonical.
    ///
    /// # Safety
    ///
    /// The processor has INVVPID ([`EptVpidCaps`](crate::caps::EptVpidCaps)).
    #[inline]
    pub unsafe fn invvpid(&mut self, kind: raw::InvvpidKind) -> Result<(), VmFail> {
        // SAFETY: VMX root operation, and the instruction exists.
        unsafe { raw::invvpid(kind) }
    }

    /// Holds back maskable interrupts until the guard is dropped.
    #[inline]
    pub fn hold_interrupts(&self) -> HeldInterrupts {
        let enabled_before = raw::interrupts_enabled();
        // SAFETY: VMX root operation is CPL 0 here.
        unsafe { raw::cli() };
        HeldInterrupts {
            enabled_before,
            _processor: PhantomData,
        }
    }
}

/// Proof that this processor takes no maskable interrupts.
///
/// Guards nest: they are dropped in the reverse order of their making, as scopes do it.
#[derive(Debug)]
pub struct HeldInterrupts {
    enabled_before: bool,
    _processor: PhantomData<*mut ()>,
}

impl HeldInterrupts {
    /// Takes what is pending through the host's IDT, then holds interrupts back again. Due after an
    /// exit by [`ExternalInterrupt`](crate::exit::Exit::ExternalInterrupt) without acknowledgement.
    #[inline]
    pub fn take_pending(&mut self) {
        // SAFETY: CPL 0, IF is 0, and the host's IDT is in place outside guests.
        unsafe { raw::open_interrupt_window() };
    }

    /// Takes, through the host's IDT, the NMI by which a guest exited. NMIs stay blocked after such
    /// an exit until the handler's IRET (SDM vol. 3C, 30.3.4).
    #[inline]
    pub fn take_nmi(&mut self) {
        // SAFETY: CPL 0, and the host's IDT is in place outside guests.
        unsafe { raw::deliver_nmi() };
    }

    /// Takes, through the host's IDT, the machine check by which a guest exited.
    #[inline]
    pub fn take_machine_check(&mut self) {
        // SAFETY: as for `take_nmi`.
        unsafe { raw::deliver_machine_check() };
    }

    /// Waits in the low-power state for an interrupt, takes it, and holds interrupts back again. One
    /// that is already pending ends the wait at once.
    #[inline]
    pub fn wait(&mut self) {
        // SAFETY: as for `take_pending`.
        unsafe { raw::wait_for_interrupt() };
    }
}

impl Drop for HeldInterrupts {
    #[inline]
    fn drop(&mut self) {
        if self.enabled_before {
            // SAFETY: CPL 0, and they were enabled before.
            unsafe { raw::sti() };
        }
    }
}

/// For the handler of an NMI that interrupted the host at `rip`: where the host is to go on, if it was about
/// to enter a guest ([`CurrentVmcs::enter_unless`]), so that it does not.
pub fn called_off(rip: u64) -> Option<u64> {
    switch::called_off(rip)
}

/// The current VMCS of this processor.
#[derive(Debug)]
pub struct CurrentVmcs<'a> {
    vmcs: &'a mut Vmcs,
    vmx: &'a mut Vmx,
}

impl<'a> CurrentVmcs<'a> {
    /// Makes another VMCS current; the two change places.
    ///
    /// # Errors
    ///
    /// The processor does not take the other one. Then no VMCS is current, so that no access reaches
    /// the wrong one: all fail, and so do entries.
    #[inline(always)]
    pub fn exchange(&mut self, other: &mut &'a mut Vmcs) -> Result<(), VmFail> {
        core::mem::swap(&mut self.vmcs, other);
        let address = self.vmcs.frame.address;
        // SAFETY: VMX root operation; a `Vmcs` was cleared once, and is active here or nowhere.
        if let Err(fail) = unsafe { raw::vmptrld(address) } {
            return self.lose_current(other, fail);
        }
        self.vmx.current = address;
        Ok(())
    }

    /// The other VMCS could not be made current.
    #[cold]
    #[inline(never)]
    fn lose_current(&mut self, old: &mut Vmcs, fail: VmFail) -> Result<(), VmFail> {
        self.vmx.current = NO_VMCS;
        // SAFETY: VMX root operation; the VMCS is active here. What was current is not current any more once it
        // is clear.
        unsafe { raw::vmclear(old.frame.address)? };
        old.launched = false;
        Err(fail)
    }

    /// Has the processor write a VMCS that is not current back to its memory: due for a shadow VMCS
    /// between its use and the entry of a guest whose VMREAD and VMWRITE are to reach it.
    ///
    /// # Errors
    ///
    /// The processor does not take the address.
    #[inline]
    pub fn write_back(&mut self, other: &mut Vmcs) -> Result<(), VmFail> {
        other.launched = false;
        // SAFETY: VMX root operation; a `Vmcs` is active on this processor or nowhere, and this one
        // is not current, since two references to one cannot be.
        unsafe { raw::vmclear(other.frame.address) }
    }
}

impl CurrentVmcs<'_> {
    /// Runs the guest until it exits. The reason is then in the VMCS:
    /// [`Exit::read`](crate::exit::Exit::read).
    ///
    /// No VMREAD, and no VMWRITE either as long as calls come from the same depth of the stack.
    ///
    /// # Errors
    ///
    /// VM entry failed before guest state was looked at: a control or the host state is not valid.
    /// [`check_entry`](crate::check::check_entry) names the rule. (Invalid guest state is an
    /// exit with its own reason.)
    ///
    /// # Safety
    ///
    /// - Host state is that of this processor ([`HostState`]), and exits restore 64-bit mode.
    /// - What the VMCS lets the guest do cannot harm the host: external interrupts and NMIs exit,
    ///   the MSR and I/O bitmaps confine it, and EPT (or the guest's page tables, if there is no
    ///   EPT) reaches only memory that the host's own references do not cover. The structures that
    ///   it points to are in place.
    /// - Its VPID is used by no other guest on this processor, or the translations are flushed.
    /// - The [`ResidentRegisters`] in this processor are this guest's.
    #[inline]
    pub unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        if !self.vmcs.launched {
            // SAFETY: as below; the caller's promise is passed on.
            return unsafe { self.launch(registers) };
        }
        // SAFETY: interrupts are off from here to the exit. This VMCS is current, its HOST_RIP is
        // the world switch's by the caller's promise, and `host_rsp` is kept with it.
        let outcome = unsafe {
            raw::cli();
            switch::resume_guest(registers, &mut self.vmcs.host_rsp)
        };
        if outcome == switch::EXITED {
            Ok(())
        } else {
            Err(raw::failure(outcome != switch::FAILED_VALID))
        }
    }

    /// As [`Self::enter`], unless `*unless` is not 0; says whether the guest ran.
    ///
    /// It is for a host whose guests take external interrupts themselves, so that other processors can call
    /// it by NMI only: the NMI's handler stores to `unless`, which the host cleared before it looked for
    /// what others want of it. An NMI that arrives between the test here and the entry comes too late for
    /// the test, and would come too early to make the guest exit; its handler has the interrupted code go
    /// on at the address that [`called_off`] gives.
    ///
    /// # Errors
    ///
    /// As for [`Self::enter`].
    ///
    /// # Safety
    ///
    /// As for [`Self::enter`], but that external interrupts need not exit if they are the guest's.
    #[inline]
    pub unsafe fn enter_unless(
        &mut self,
        registers: &mut GuestRegisters,
        unless: &AtomicU32,
    ) -> Result<bool, VmFail> {
        let launched = self.vmcs.launched;
        let (host_rsp, unless) = (&mut self.vmcs.host_rsp, unless.as_ptr());
        // SAFETY: as in `enter` and `launch`; an atomic's address is valid.
        let outcome = unsafe {
            raw::cli();
            if launched {
                switch::resume_guest_unless(registers, host_rsp, unless)
            } else {
                switch::launch_guest_unless(registers, host_rsp, unless)
            }
        };
        match outcome {
            switch::CALLED_OFF => return Ok(false),
            switch::EXITED => {}
            failed => return Err(raw::failure(failed != switch::FAILED_VALID)),
        }
        if !launched {
            self.first_exit();
        }
        Ok(true)
    }

    /// The first entry.
    ///
    /// # Safety
    ///
    /// As for [`Self::enter`].
    #[cold]
    unsafe fn launch(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        // SAFETY: as for `enter`.
        let outcome = unsafe {
            raw::cli();
            switch::launch_guest(registers, &mut self.vmcs.host_rsp)
        };
        if outcome != switch::EXITED {
            return Err(raw::failure(outcome != switch::FAILED_VALID));
        }
        self.first_exit();
        Ok(())
    }

    /// After VMLAUNCH the VMCS is launched, unless the entry failed while loading guest state (29.8).
    fn first_exit(&mut self) {
        let reason = ExitReason::read(self);
        self.vmcs.launched = reason.is_ok_and(|reason| !reason.is_entry_failure());
    }

    /// Sets XCR0 for the guest whose registers are in this processor, as its XSETBV asks.
    ///
    /// # Safety
    ///
    /// CR4.OSXSAVE of the host is set, XCR0 takes this value, and the guest may enable all its
    /// components.
    #[inline]
    pub unsafe fn set_guest_xcr0(&mut self, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { resident::xsetbv(value) };
    }

    /// PKRU of the guest whose registers are in this processor.
    ///
    /// # Safety
    ///
    /// The processor has protection keys (the guest's CR4.PKE proves it).
    pub unsafe fn guest_pkru(&self) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { resident::pkru() }
    }

    /// DR6 of the guest whose registers are in this processor.
    pub fn guest_dr6(&self) -> u64 {
        // SAFETY: VMX root operation is CPL 0 here, and exits clear DR7.GD.
        unsafe { raw::dr6() }
    }

    /// Sets DR6 of the guest whose registers are in this processor. Bits 63:32 do not exist.
    pub fn set_guest_dr6(&mut self, value: u64) {
        // SAFETY: as for `guest_dr6`; a value of 32 bits is always taken.
        unsafe { raw::set_dr6(value & 0xFFFF_FFFF) };
    }

    /// The physical address of the region.
    #[inline]
    pub fn address(&self) -> Hpa {
        self.vmcs.frame.address
    }
}

impl VmcsRead for CurrentVmcs<'_> {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        // SAFETY: VMX root operation, with this VMCS current.
        unsafe { raw::vmread(field) }
    }

    #[inline(always)]
    fn get_group<const N: usize>(&self, group: &FieldGroup<N>) -> Result<[u64; N], AccessError> {
        // SAFETY: VMX root operation, with this VMCS current.
        match unsafe { raw::vmread_group(group) } {
            Ok(values) => Ok(values),
            Err(fail) => {
                let field = group.encodings()[N - 1];
                Err(AccessError::Read { field, fail })
            }
        }
    }
}

impl VmcsWrite for CurrentVmcs<'_> {
    #[inline]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        if field == crate::fields::HOST_RSP.encoding() {
            self.vmcs.host_rsp = value;
        }
        // SAFETY: VMX root operation, with this VMCS current and borrowed exclusively. What the
        // values make the processor do at the next entry is what `enter`'s caller answers for.
        unsafe { raw::vmwrite(field, value) }
    }

    #[inline(always)]
    fn set_group<const N: usize>(
        &mut self,
        group: &FieldGroup<N>,
        values: &[u64; N],
    ) -> Result<(), AccessError> {
        let result = if group.is_guest_or_control() {
            // SAFETY: as above, and of HOST_RSP there is nothing to be noted.
            unsafe { raw::vmwrite_group(group, values) }
        } else {
            let mut fields = group.encodings().iter().zip(values);
            fields.try_for_each(|(&field, &value)| self.write_raw(field, value))
        };
        match result {
            Ok(()) => Ok(()),
            Err(fail) => {
                let (field, value) = (group.encodings()[N - 1], values[N - 1]);
                Err(AccessError::Write { field, value, fail })
            }
        }
    }
}
