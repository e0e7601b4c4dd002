//! Physical events while L1 or L2 runs: GIF, who takes them, and when (APM vol. 2, 15.13, 15.17 and
//! 15.21).
//!
//! "Physical" is L1's word: its virtual processor's interrupt controller, NMI line and so on, which
//! are L0's machine.

use testudo_arch::RFlags;
use testudo_svm::Vmcb;
use testudo_svm::caps::Features;
use testudo_svm::exit::ExitCode;
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::vmcb::{InterruptState, VintrFlags, VirtualExtensions};

use super::NestedSvm;

/// A physical event of L1's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PhysicalEvent {
    /// A maskable interrupt, which the interrupt controller holds until it is acknowledged.
    Interrupt,
    /// A non-maskable interrupt. That a handler for one runs already is the caller's to know.
    Nmi,
    /// A system-management interrupt.
    Smi,
    /// INIT.
    Init,
}

/// What becomes of a physical event now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// It stays pending.
    Blocked,
    /// L1 intercepts it: L2 exits with this code, and the event stays pending for L1.
    Exit(ExitCode),
    /// Whoever runs takes it.
    Deliver,
}

const IF: u64 = RFlags::INTERRUPT_FLAG.bits();

impl NestedSvm {
    /// What becomes of this event now. Nothing is lost by asking.
    #[inline]
    pub fn acceptance(&self, event: PhysicalEvent, vmcb01: &Vmcb) -> Acceptance {
        if !self.gif(vmcb01) {
            return Acceptance::Blocked;
        }
        let runs = if self.is_guest {
            &self.pages.vmcb
        } else {
            vmcb01
        };
        if event == PhysicalEvent::Interrupt && !self.interrupts_enabled(runs, vmcb01) {
            return Acceptance::Blocked;
        }
        if let Some(code) = self.intercepted(event) {
            // An exit needs neither the end of a shadow nor a free EVENTINJ: what is in there goes
            // to EXITINTINFO.
            return Acceptance::Exit(code);
        }
        let shadow = runs
            .interrupt_state()
            .contains(InterruptState::INTERRUPT_SHADOW);
        if event != PhysicalEvent::Init && (shadow || runs.event_inj().is_valid()) {
            return Acceptance::Blocked;
        }
        Acceptance::Deliver
    }

    /// "V_INTR_MASKING … 1: the host's RFLAGS.IF at VMRUN governs physical interrupts; 0: the
    /// guest's" (APM vol. 2, 15.21.1).
    #[inline]
    fn interrupts_enabled(&self, runs: &Vmcb, vmcb01: &Vmcb) -> bool {
        let masking = self.vmcb12.virtual_interrupts();
        let rflags = if self.is_guest && masking.contains(VintrFlags::V_INTR_MASKING) {
            vmcb01.rflags()
        } else {
            runs.rflags()
        };
        rflags & IF != 0
    }

    #[inline]
    fn intercepted(&self, event: PhysicalEvent) -> Option<ExitCode> {
        let code = match event {
            PhysicalEvent::Interrupt => ExitCode::INTR,
            PhysicalEvent::Nmi => ExitCode::NMI,
            PhysicalEvent::Smi => ExitCode::SMI,
            PhysicalEvent::Init => ExitCode::INIT,
        };
        (self.is_guest && self.vmcb12.intercepts().contains(code)).then_some(code)
    }

    /// Whether L1 has a virtual interrupt pending for L2 that L2 takes at its next instruction
    /// boundary without an interrupt shadow (APM vol. 2, 15.21.4).
    pub fn takes_virtual_interrupt(&self) -> bool {
        let vmcb02 = &self.pages.vmcb;
        let word = self.window.unwrap_or(vmcb02.virtual_interrupts());
        let flags = word.flags();
        let closed = flags.contains(VintrFlags::V_GIF_ENABLE) && !flags.contains(VintrFlags::V_GIF);
        // The task priority is the live one: the window leaves it to L2.
        let tpr = vmcb02.virtual_interrupts().tpr();
        self.is_guest
            && flags.contains(VintrFlags::V_IRQ)
            && !closed
            && (flags.contains(VintrFlags::V_IGN_TPR) || word.priority() > tpr)
            && vmcb02.rflags() & IF != 0
    }

    /// L1's global interrupt flag. While it is clear, no physical event is accepted.
    #[inline]
    pub fn gif(&self, vmcb01: &Vmcb) -> bool {
        if self.has_virtual_gif && !self.is_guest {
            vmcb01.virtual_interrupts().contains(VintrFlags::V_GIF)
        } else {
            self.gif
        }
    }

    #[inline]
    pub(super) fn set_gif(&mut self, gif: bool, vmcb01: &mut Vmcb) {
        self.gif = gif;
        if self.has_virtual_gif && !self.is_guest {
            let word = vmcb01.virtual_interrupts();
            let word = if gif {
                word.insert(VintrFlags::V_GIF)
            } else {
                word.remove(VintrFlags::V_GIF)
            };
            vmcb01.set_virtual_interrupts(word);
        }
    }

    /// Sets in `vmcb01` what depends on whether L1 has enabled SVM: the processor's own GIF and
    /// VMLOAD virtualization where it has them, and the intercepts that they make needless. Due
    /// after L1's EFER.SVME changed, and before the first entry.
    pub fn adjust_vmcb01(&self, vmcb01: &mut Vmcb) {
        let direct = self.direct_instructions(self.is_enabled);
        let all = Misc2::STGI | Misc2::CLGI | Misc2::VMLOAD | Misc2::VMSAVE;
        vmcb01.set_intercept_misc2((vmcb01.intercept_misc2() | all) - direct);
        if self.has_virtual_gif {
            let mut word = vmcb01.virtual_interrupts();
            let is_new = !word.contains(VintrFlags::V_GIF_ENABLE);
            // Nobody could set it again while SVM is off.
            if !self.is_enabled || (is_new && self.gif) {
                word = word.insert(VintrFlags::V_GIF);
            }
            vmcb01.set_virtual_interrupts(word.insert(VintrFlags::V_GIF_ENABLE));
        }
        let vmload = VirtualExtensions::VMSAVE_VMLOAD;
        let mut extensions = vmcb01.virtual_extensions();
        extensions.set(vmload, direct.contains(Misc2::VMLOAD));
        vmcb01.set_virtual_extensions(extensions);
    }

    /// The SVM instructions that L1 may execute without an exit.
    fn direct_instructions(&self, enabled: bool) -> Misc2 {
        let mut direct = Misc2::empty();
        if enabled && self.has_virtual_gif {
            direct |= Misc2::STGI | Misc2::CLGI;
        }
        if enabled && self.features.contains(Features::V_VMSAVE_VMLOAD) {
            direct |= Misc2::VMLOAD | Misc2::VMSAVE;
        }
        direct
    }

    /// Asks for an exit when L1 sets GIF, for an NMI, SMI or INIT that waits for it, or stops
    /// asking. A maskable interrupt needs only its own window, which waits for GIF too.
    pub fn set_gif_window(&mut self, wanted: bool, vmcb01: &mut Vmcb) {
        if self.has_virtual_gif && self.is_enabled {
            let mut misc2 = vmcb01.intercept_misc2();
            misc2.set(Misc2::STGI, wanted);
            vmcb01.set_intercept_misc2(misc2);
        }
    }

    /// Asks for an exit as soon as L2 can take an interrupt, or stops asking. While L1 itself
    /// runs, the window is `vmcb01`'s own.
    ///
    /// A virtual interrupt of the highest priority asks for it, so L1's own virtual interrupt
    /// steps aside, as does the virtual GIF of L2, which physical interrupts do not heed.
    pub fn set_window(&mut self, wanted: bool, vmcb01: &Vmcb) {
        if wanted == self.window.is_some() || !self.is_guest {
            return;
        }
        let live = self.pages.vmcb.virtual_interrupts();
        if wanted {
            self.window = Some(live);
            let theirs = VintrFlags::V_GIF_ENABLE | VintrFlags::V_GIF;
            let asking = VintrFlags::V_IRQ | VintrFlags::V_IGN_TPR;
            let word = live.remove(theirs).insert(asking).with_priority(0xF);
            self.pages.vmcb.set_virtual_interrupts(word);
        } else if let Some(held) = self.window.take() {
            self.pages
                .vmcb
                .set_virtual_interrupts(held.with_tpr(live.tpr()));
        }
        let intercepts = self.merged_intercepts(vmcb01);
        self.pages.vmcb.set_intercepts(intercepts);
    }

    /// What the window adds to the intercepts of L2.
    #[inline]
    pub(super) fn window_intercepts(&self) -> (Misc1, Misc2) {
        if self.window.is_some() {
            (Misc1::VINTR, Misc2::STGI | Misc2::CLGI)
        } else {
            (Misc1::empty(), Misc2::empty())
        }
    }
}
