//! What a vCPU needs of the processor: its VMCS, the entry, and the few registers that no VMCS holds.

use testudo_vmx::hw::instructions::{self, InvvpidKind};
use testudo_vmx::hw::{CurrentVmcs, GuestRegisters, HeldInterrupts};
use testudo_vmx::{Encoding, VmFail, VmcsRead, VmcsWrite};

/// A processor with the vCPU's VMCS current. Tests have another than the real one.
#[allow(
    unsafe_code,
    reason = "what the hardware does is the caller's to answer for"
)]
pub trait Processor: VmcsWrite {
    /// Runs the guest until it exits.
    ///
    /// # Errors
    ///
    /// VM entry refused a control or the host state.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::enter`] asks.
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail>;

    /// Takes the host's interrupts that are pending.
    fn take_pending(&mut self);

    /// Takes the host's NMI by which the guest exited.
    fn take_nmi(&mut self);

    /// Takes the host's machine check by which the guest exited.
    fn take_machine_check(&mut self);

    /// Drops the guest's cached linear translations, as the guest's own instruction would have.
    ///
    /// # Errors
    ///
    /// INVVPID failed.
    fn forget_translations(&mut self) -> Result<(), VmFail>;

    /// Sets the guest's XCR0.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::set_guest_xcr0`] asks.
    unsafe fn set_xcr0(&mut self, value: u64);

    /// The guest's PKRU.
    ///
    /// # Safety
    ///
    /// What [`CurrentVmcs::guest_pkru`] asks.
    unsafe fn pkru(&self) -> u32;

    /// The time-stamp counter.
    fn tsc(&self) -> u64;

    /// The guest's DR6.
    fn dr6(&self) -> u64;

    /// Sets the guest's DR6.
    fn set_dr6(&mut self, value: u64);
}

/// The processor that this code runs on.
pub struct ThisProcessor<'a> {
    vmcs: CurrentVmcs<'a>,
    held: HeldInterrupts,
    /// What drops the translations with the guest's VPID; `None` if it has none, and each entry
    /// and exit drops them.
    flush: Option<InvvpidKind>,
}

impl<'a> ThisProcessor<'a> {
    pub(super) fn new(
        vmcs: CurrentVmcs<'a>,
        held: HeldInterrupts,
        flush: Option<InvvpidKind>,
    ) -> Self {
        Self { vmcs, held, flush }
    }
}

impl VmcsRead for ThisProcessor<'_> {
    #[inline]
    fn read_raw(&self, field: Encoding) -> Result<u64, VmFail> {
        self.vmcs.read_raw(field)
    }
}

impl VmcsWrite for ThisProcessor<'_> {
    #[inline]
    fn write_raw(&mut self, field: Encoding, value: u64) -> Result<(), VmFail> {
        self.vmcs.write_raw(field, value)
    }
}

#[allow(unsafe_code, reason = "the hardware itself")]
impl Processor for ThisProcessor<'_> {
    #[inline]
    unsafe fn enter(&mut self, registers: &mut GuestRegisters) -> Result<(), VmFail> {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.enter(registers) }
    }

    fn take_pending(&mut self) {
        self.held.take_pending();
    }

    fn take_nmi(&mut self) {
        self.held.take_nmi();
    }

    fn take_machine_check(&mut self) {
        self.held.take_machine_check();
    }

    fn forget_translations(&mut self) -> Result<(), VmFail> {
        match self.flush {
            // SAFETY: a current VMCS is in VMX root operation, and the kind was chosen from the
            // processor's capabilities.
            Some(kind) => unsafe { instructions::invvpid(kind) },
            None => Ok(()),
        }
    }

    unsafe fn set_xcr0(&mut self, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.set_guest_xcr0(value) };
    }

    unsafe fn pkru(&self) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { self.vmcs.guest_pkru() }
    }

    #[inline]
    fn tsc(&self) -> u64 {
        // SAFETY: every 64-bit processor has the instruction, and CPL 0 may use it.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    fn dr6(&self) -> u64 {
        self.vmcs.guest_dr6()
    }

    fn set_dr6(&mut self, value: u64) {
        self.vmcs.set_guest_dr6(value);
    }
}
