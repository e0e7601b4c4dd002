//! What a vCPU needs of the processor: the entry, and the few registers that no VMCB holds.

use testudo_svm::hw::{GuestRegisters, HeldInterrupts, VmcbFrame};

/// A processor that holds its interrupts back. Tests have another than the real one.
#[allow(
    unsafe_code,
    reason = "what the hardware does is the caller's to answer for"
)]
pub trait Processor {
    /// Runs the guest until it exits.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::enter`] asks.
    unsafe fn enter(&mut self, vmcb: &mut VmcbFrame<'_>, registers: &mut GuestRegisters);

    /// Takes the host's interrupts that are pending.
    fn take_pending(&mut self);

    /// Runs host code as it was written for: it may let interrupts in.
    fn release<R>(&mut self, work: impl FnOnce() -> R) -> R;

    /// Sets the guest's XCR0.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::set_guest_xcr0`] asks.
    unsafe fn set_guest_xcr0(&mut self, value: u64);

    /// The guest's XCR0.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::guest_xcr0`] asks.
    unsafe fn guest_xcr0(&self) -> u64;

    /// The guest's PKRU.
    ///
    /// # Safety
    ///
    /// What [`HeldInterrupts::guest_pkru`] asks.
    unsafe fn guest_pkru(&self) -> u32;
}

#[allow(
    unsafe_code,
    reason = "what the hardware does is the caller's to answer for"
)]
impl Processor for HeldInterrupts<'_> {
    #[inline(always)]
    unsafe fn enter(&mut self, vmcb: &mut VmcbFrame<'_>, registers: &mut GuestRegisters) {
        // SAFETY: the caller's promise.
        unsafe { HeldInterrupts::enter(self, vmcb, registers) }
    }

    #[inline]
    fn take_pending(&mut self) {
        HeldInterrupts::take_pending(self);
    }

    #[inline]
    fn release<R>(&mut self, work: impl FnOnce() -> R) -> R {
        HeldInterrupts::release(self, work)
    }

    unsafe fn set_guest_xcr0(&mut self, value: u64) {
        // SAFETY: the caller's promise.
        unsafe { HeldInterrupts::set_guest_xcr0(self, value) }
    }

    unsafe fn guest_xcr0(&self) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { HeldInterrupts::guest_xcr0(self) }
    }

    unsafe fn guest_pkru(&self) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { HeldInterrupts::guest_pkru(self) }
    }
}
