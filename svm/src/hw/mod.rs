//! The processor itself: turning SVM on, and entering guests.
//!
//! The states are types. A processor without SVM has nothing to call here but [`Svm::enable`]; a
//! processor with SVM is an [`Svm`], which stays on its processor (it is not `Send`); one that is
//! about to enter a guest holds interrupts back with [`Svm::hold_interrupts`], and only the
//! [`HeldInterrupts`] that this gives can [`enter`](HeldInterrupts::enter).
//!
//! # What the world switch saves, and what it leaves in the registers
//!
//! VMRUN and #VMEXIT switch what the VMCB holds. The switch adds, for every exit:
//! the general registers; XMM0 to XMM15 and MXCSR, which are all that host code compiled for this
//! target can touch (legacy SSE, which keeps the upper halves of the YMM registers); and with
//! VMLOAD and VMSAVE the FS, GS, TR, LDTR, KernelGSBase, SYSCALL and SYSENTER registers of both
//! sides, because the host's interrupt stacks hang on its TR.
//!
//! The rest of a guest's state *stays in the registers* while the host runs: x87, the upper halves
//! of YMM, ZMM, XCR0, PKRU, DR0 to DR3, TSC_AUX and the CET MSRs. The host must not use them; a
//! guest that has its processor to itself never pays for them. Before another guest, or the same
//! one elsewhere, they are moved with [`ResidentRegisters`].
//!
//! Sixteen MOVAPS each way rather than FXSAVE and FXRSTOR: on every AMD processor since Zen, 32
//! plain moves take fewer cycles than the two microcoded instructions (which also move eight x87
//! registers that nobody touched), they do not depend on CR4.OSFXSR, CR0.TS or EFER.FFXSR, and
//! they leave the x87 instruction and data pointers alone, which FXRSTOR does not on AMD unless an
//! exception is pending.
//!
//! On a target without SSE (`x86_64-unknown-none`) host code touches no XMM register either: they
//! and MXCSR then stay in the registers like the rest.
//!
//! # Speculation
//!
//! The switch neither fills the return predictor nor changes SPEC_CTRL. A host that keeps secrets
//! from its guests runs on processors with automatic IBRS, or sets up what its processors need
//! before [`enter`](HeldInterrupts::enter); between guests that must not influence one another,
//! and between a guest hypervisor and its guest, [`instructions::ibpb`] is due.
//!
//! # Interrupts
//!
//! Between `hold_interrupts` and the drop of its guard GIF is 0 and IF is 1. Nothing is taken: not
//! even an NMI. So a request that arrives after the last check and before VMRUN stays pending and
//! makes the guest exit at once, provided that the VMCB has
//! [`V_INTR_MASKING`](crate::vmcb::VintrFlags::V_INTR_MASKING) and the INTR and NMI intercepts.
//! After such an exit the host takes what is pending with [`HeldInterrupts::take_pending`].
#![allow(unsafe_code, reason = "privileged instructions")]

#[cfg(all(not(doc), target_feature = "avx"))]
compile_error!(
    "the world switch of testudo-svm saves XMM registers only, so the host must not be compiled \
     to use AVX: build without -C target-cpu or -C target-feature that enable it"
);

pub mod instructions;
mod resident;
mod switch;

use core::marker::PhantomData;

use testudo_arch::{EferFlags, Hpa, Msr};

use crate::caps::{SvmCaps, SvmUnavailable, VmCr, check_vm_cr};
use instructions::{clgi, rdmsr, stgi, vmsave, wrmsr};

pub use resident::{ResidentRegisters, ResidentUnsupported, XsaveArea};
pub use switch::{GuestRegisters, SseRegisters, VmcbFrame};

/// Why SVM could not be enabled on this processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnableError {
    /// The firmware forbids it.
    #[error(transparent)]
    Unavailable(#[from] SvmUnavailable),
    /// A frame for the host's state is not a frame.
    #[error("{0} is not 4 KiB aligned or beyond the processor's physical addresses")]
    BadFrame(Hpa),
    /// EFER.SVME is set already: somebody else uses SVM here.
    #[error("EFER.SVME is already set (EFER = {efer:#x})")]
    AlreadyEnabled {
        /// EFER.
        efer: u64,
    },
}

/// The two frames in which a processor with SVM keeps host state: one each per processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFrames {
    /// For VM_HSAVE_PA: what VMRUN saves. Its format is the processor's own.
    pub save_area: Hpa,
    /// A VMCB of which only what VMSAVE writes is used.
    pub vmcb: Hpa,
}

/// This processor, with SVM enabled.
#[derive(Debug)]
pub struct Svm {
    host_vmcb: Hpa,
    save_area: Hpa,
    // SVM is enabled on one processor, so the value stays there.
    _processor: PhantomData<*mut ()>,
}

impl Svm {
    /// Enables SVM on this processor: sets EFER.SVME and VM_HSAVE_PA, and saves the host's
    /// VMLOAD state.
    ///
    /// # Errors
    ///
    /// See [`EnableError`]. Nothing has changed then.
    ///
    /// # Safety
    ///
    /// - This runs at CPL 0, on a processor whose capabilities are `caps`.
    /// - Both frames are memory of 4 KiB that nothing but this value uses until [`Self::disable`].
    /// - The caller's thread stays on this processor as long as the value lives.
    /// - The host's FS, GS, TR, LDTR, SYSCALL and SYSENTER registers do not change as long as the
    ///   value lives, except before [`Self::refresh_host_state`].
    pub unsafe fn enable(caps: &SvmCaps, frames: HostFrames) -> Result<Self, EnableError> {
        for frame in [frames.save_area, frames.vmcb] {
            if frame.0 & 0xFFF != 0 || frame.0 >= caps.physical_limit() {
                return Err(EnableError::BadFrame(frame));
            }
        }
        // SAFETY: CPL 0, and VM_CR and EFER exist on every processor with SVM, which `caps` says
        // this one is.
        let (vm_cr, efer) = unsafe { (rdmsr(Msr::VM_CR), rdmsr(Msr::EFER)) };
        check_vm_cr(VmCr::from_bits_retain(vm_cr))?;
        if efer & SVME != 0 {
            return Err(EnableError::AlreadyEnabled { efer });
        }
        let mut svm = Self {
            host_vmcb: frames.vmcb,
            save_area: frames.save_area,
            _processor: PhantomData,
        };
        // SAFETY: SVMDIS is clear, so SVME may be set; the frames are valid and the caller's to
        // give.
        unsafe {
            wrmsr(Msr::EFER, efer | SVME);
            wrmsr(Msr::VM_HSAVE_PA, svm.save_area.0);
        }
        svm.refresh_host_state();
        Ok(svm)
    }

    /// Disables SVM on this processor and gives the frames back.
    pub fn disable(self) -> HostFrames {
        // SAFETY: `self` proves that SVM is enabled here; no guest runs, since `enter` returned.
        unsafe {
            wrmsr(Msr::VM_HSAVE_PA, 0);
            let efer = rdmsr(Msr::EFER);
            wrmsr(Msr::EFER, efer & !SVME);
        }
        HostFrames {
            save_area: self.save_area,
            vmcb: self.host_vmcb,
        }
    }

    /// Saves the host's VMLOAD state (FS, GS, TR, LDTR, KernelGSBase, SYSCALL and SYSENTER
    /// registers) again, after the host changed one of them.
    pub fn refresh_host_state(&mut self) {
        // SAFETY: SVM is enabled, and the frame is this value's own.
        unsafe { vmsave(self.host_vmcb) };
    }

    /// Holds back all interrupts, NMIs too, until the guard is dropped: GIF = 0, IF = 1.
    pub fn hold_interrupts(&mut self) -> HeldInterrupts<'_> {
        let enabled = instructions::interrupts_enabled();
        // SAFETY: SVM is enabled. With GIF clear, setting IF lets nothing in.
        unsafe {
            clgi();
            instructions::sti();
        }
        HeldInterrupts {
            svm: self,
            enabled_before: enabled,
        }
    }
}

const SVME: u64 = EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE.bits();

/// Proof that this processor takes no interrupt: the state from which guests are entered.
///
/// Dropping it takes what is pending (if IF was set before) and goes on as before.
#[derive(Debug)]
pub struct HeldInterrupts<'a> {
    svm: &'a mut Svm,
    enabled_before: bool,
}

impl HeldInterrupts<'_> {
    /// Takes all pending interrupts and NMIs through the host's IDT, then holds them back again.
    /// Due after an exit by [`Interrupt`](crate::Exit::Interrupt) or [`Nmi`](crate::Exit::Nmi).
    #[inline]
    pub fn take_pending(&mut self) {
        // SAFETY: SVM is enabled, and the host's IDT is in place, since the host's TR, GDT and IDT
        // are loaded outside `enter`.
        unsafe { instructions::open_gif_window() };
    }

    /// Takes a pending NMI, and whatever else IF does not hold back, through the host's IDT; maskable
    /// interrupts stay pending, for a guest that takes them itself.
    #[inline]
    pub fn take_nmi(&mut self) {
        let enabled = instructions::interrupts_enabled();
        // SAFETY: SVM is enabled, and the host's IDT is in place, as in `take_pending`; IF is as it
        // was afterwards.
        unsafe {
            instructions::cli();
            instructions::open_gif_window();
            if enabled {
                instructions::sti();
            }
        }
    }

    /// Sets IF, by which physical interrupts are held back while a guest with
    /// [`V_INTR_MASKING`](crate::vmcb::VintrFlags::V_INTR_MASKING) runs (APM vol. 2, 15.21.1). It is
    /// set at first, as a host needs it whose guests exit for interrupts; a host that leaves them
    /// to its guest decides by it when that guest takes them.
    #[inline]
    pub fn set_interrupt_flag(&mut self, enabled: bool) {
        // SAFETY: CPL 0, since SVM is enabled here; GIF is clear, so that nothing comes in.
        unsafe {
            if enabled {
                instructions::sti();
            } else {
                instructions::cli();
            }
        }
    }

    /// Runs host code with GIF set and IF clear, as it was written for: it may let interrupts in.
    /// Then holds them back again.
    #[inline]
    pub fn release<R>(&mut self, work: impl FnOnce() -> R) -> R {
        // SAFETY: SVM is enabled. IF is clear while GIF is set, so only NMIs come in, for which the
        // host is always ready; afterwards both are as `hold_interrupts` makes them.
        unsafe {
            instructions::cli();
            stgi();
        }
        let result = work();
        // SAFETY: as above.
        unsafe {
            clgi();
            instructions::sti();
        }
        result
    }

    /// Waits for an interrupt in the low-power state, takes it, and holds them back again.
    ///
    /// No wake-up is lost: one that arrived while they were held back ends the wait at once.
    #[inline]
    pub fn wait(&mut self) {
        // SAFETY: as for `take_pending`.
        unsafe { instructions::wait_with_gif_window() };
    }
}

impl Drop for HeldInterrupts<'_> {
    fn drop(&mut self) {
        // SAFETY: SVM is enabled; IF is again what it was before.
        unsafe {
            if !self.enabled_before {
                instructions::cli();
            }
            stgi();
        }
    }
}
