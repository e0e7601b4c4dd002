//! #VMEXIT to L1: what the processor would write, and what it would load (APM vol. 2, 15.6).

use testudo_arch::{Gpa, Gprs, GuestMemory};
use testudo_svm::Vmcb;
use testudo_svm::caps::Features;
use testudo_svm::event::RawEvent;
use testudo_svm::exit::{ExitCode, NestedFaultBits, NestedPageFault};
use testudo_svm::vmcb::{VintrFlags, VirtualExtensions, VirtualInterrupts};

use super::{Context, NestedFault, NestedSvm, RawExit, Route, SecondStage, image, route};

/// DR7 with all breakpoints off: "DR7 … disabled" after #VMEXIT.
const DR7_DISABLED: u64 = 0x400;

/// A debt of every transition from L2 to L1: to the processor's branch predictor both are guests of
/// the same kind, so what L2 taught it would guide L1 (CVE-2022-2196).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "L2 may have trained the branch predictor against L1"]
pub struct PredictorBarrier(());

impl PredictorBarrier {
    pub(crate) const fn new() -> Self {
        Self(())
    }

    /// Pays with `barrier`: IBPB, where the processor has it (CPUID Fn8000_0008 EBX bit 12).
    #[inline]
    pub fn discharge(self, barrier: impl FnOnce()) {
        barrier();
    }

    /// Pays nothing: the processor has no IBPB, or the owner of both guests trusts them alike.
    #[inline]
    pub fn ignore(self) {}
}

/// What became of an exit of L2.
#[derive(Debug, PartialEq, Eq)]
pub enum Handled {
    /// L1 runs next: it has been given the exit.
    L1(PredictorBarrier),
    /// L2 goes on.
    Resume,
    /// L0 handles the exit, which is in `vmcb02`. For all exits but intercepted exceptions, an
    /// event whose delivery was interrupted is in EVENTINJ again.
    L0,
    /// L0 handles an access of L2 to this address of L1's, which is not memory; the exit in
    /// `vmcb02` says how it was made, at which address of L2's.
    Memory(Gpa),
}

/// Whose a page fault of L2 is, as an L0 without nested paging has found out: the processor walked
/// tables of L0's, made from those that L1 gave L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFaultOf {
    /// Of L0's tables. They have the page now, or L0 makes the access itself.
    L0,
    /// Of the tables that L1 gave L2: the processor that L1 believes to have would have raised this.
    L2 {
        /// The address that could not be accessed.
        address: u64,
        /// The error code.
        code: u32,
    },
}

const PAGE_FAULT: ExitCode = ExitCode(0x40 + 14);

impl NestedSvm {
    /// As [`Self::exited`], for an intercepted page fault of L2 when L0 shadows page tables. No other
    /// exit is different there.
    ///
    /// [`Handled::L0`] says that L2 takes the fault, which `vmcb02` holds as the exit.
    pub fn exited_by_page_fault<M: GuestMemory, S>(
        &mut self,
        whose: PageFaultOf,
        cx: &mut Context<'_, M, S>,
    ) -> Handled {
        self.note_exit(cx.gprs);
        match whose {
            PageFaultOf::L0 => {
                self.redeliver();
                Handled::Resume
            }
            PageFaultOf::L2 { address, code } => {
                self.pages.vmcb.set_exit_info1(code.into());
                self.pages.vmcb.set_exit_info2(address);
                if self.vmcb12.intercepts().contains(PAGE_FAULT) {
                    Handled::L1(self.reflect(PAGE_FAULT, cx))
                } else {
                    Handled::L0
                }
            }
        }
    }

    /// Decides an exit of L2, just after the processor left it.
    pub fn exited<M: GuestMemory, S: SecondStage>(
        &mut self,
        cx: &mut Context<'_, M, S>,
    ) -> Handled {
        let exit = self.note_exit(cx.gprs);
        match self.route(&exit, cx.memory) {
            Route::L1(code) => Handled::L1(self.reflect(code, cx)),
            Route::SecondStage => self.nested_fault(&exit, cx),
            Route::L0 => {
                if !ExitCode::EXCEPTION.contains(&exit.code.0) {
                    self.redeliver();
                }
                Handled::L0
            }
        }
    }

    /// The exit, and whether the event that L1 injected is still to be delivered.
    #[inline]
    fn note_exit(&mut self, gprs: &Gprs) -> RawExit {
        let vmcb02 = &mut self.pages.vmcb;
        vmcb02.set_event_inj(RawEvent::NONE);
        if vmcb02.exit_int_info() != self.injected {
            self.injected = RawEvent::NONE;
        }
        RawExit {
            code: ExitCode::from_vmcb(vmcb02.exit_code()),
            info1: vmcb02.exit_info1(),
            rcx: gprs.rcx,
        }
    }

    /// Has the event delivered whose delivery the exit interrupted. What L1 injected goes in as L1
    /// gave it, software interrupts too: L1 has moved RIP behind them already. Those of L2 itself
    /// run again.
    #[inline]
    fn redeliver(&mut self) {
        let vmcb02 = &mut self.pages.vmcb;
        let interrupted = vmcb02.exit_int_info();
        if !interrupted.is_valid() {
            return;
        }
        let again = if interrupted == self.injected {
            if self.features.contains(Features::NRIPS) {
                vmcb02.set_n_rip(self.vmcb12.n_rip());
            }
            interrupted
        } else {
            interrupted
                .to_redeliver()
                .map_or(RawEvent::NONE, RawEvent::from)
        };
        vmcb02.set_event_inj(again);
    }

    fn nested_fault<M: GuestMemory, S: SecondStage>(
        &mut self,
        exit: &RawExit,
        cx: &mut Context<'_, M, S>,
    ) -> Handled {
        let fault = NestedPageFault {
            gpa: Gpa(self.pages.vmcb.exit_info2()),
            bits: NestedFaultBits::from_bits_retain(exit.info1),
        };
        match cx.second_stage.fault(fault) {
            NestedFault::Resolved => {
                self.redeliver();
                Handled::Resume
            }
            NestedFault::Host(gpa) => {
                self.redeliver();
                Handled::Memory(gpa)
            }
            NestedFault::Reflect(theirs) => {
                self.pages.vmcb.set_exit_info1(theirs.bits.bits());
                self.pages.vmcb.set_exit_info2(theirs.gpa.0);
                Handled::L1(self.reflect(ExitCode::NPF, cx))
            }
        }
    }

    /// Gives L1 the exit that the processor reported, under this code.
    fn reflect<M: GuestMemory, S>(
        &mut self,
        code: ExitCode,
        cx: &mut Context<'_, M, S>,
    ) -> PredictorBarrier {
        if code == ExitCode::INVALID {
            self.fail(cx);
        } else {
            self.pages.vmcb.set_exit_code(code.0);
            self.leave(cx);
        }
        PredictorBarrier::new()
    }

    /// Makes L2 exit to L1 for something that the processor did not report: a physical event that
    /// L1 intercepts, or what L0 found while it emulated an instruction of L2.
    ///
    /// An event that was on its way into L2 is told to L1 in EXITINTINFO. Nothing happens if L2
    /// does not run.
    pub fn exit_to_l1<M: GuestMemory, S>(
        &mut self,
        code: ExitCode,
        info1: u64,
        info2: u64,
        cx: &mut Context<'_, M, S>,
    ) -> PredictorBarrier {
        if self.is_guest {
            let vmcb02 = &mut self.pages.vmcb;
            let pending = vmcb02.event_inj();
            let pending = if pending.is_valid() {
                pending
            } else {
                RawEvent::NONE
            };
            vmcb02.set_exit_int_info(pending);
            vmcb02.set_exit_code(code.0);
            vmcb02.set_exit_info1(info1);
            vmcb02.set_exit_info2(info2);
            vmcb02.set_n_rip(0);
            vmcb02.set_instruction_bytes(&[]);
            self.leave(cx);
        }
        PredictorBarrier::new()
    }

    /// Everything of #VMEXIT but the reason.
    #[inline]
    fn leave<M: GuestMemory, S>(&mut self, cx: &mut Context<'_, M, S>) {
        let fields = image::ExitFields {
            assists: self
                .features
                .intersects(Features::NRIPS | Features::DECODE_ASSISTS),
            pat: route::is_nested_paging(&self.vmcb12),
            lbr: self
                .vmcb12
                .virtual_extensions()
                .contains(VirtualExtensions::LBR),
        };
        self.collect_virtual_interrupts(cx.vmcb01);
        let vmcb02 = &mut self.pages.vmcb;
        vmcb02.set_event_inj(RawEvent::NONE);
        vmcb02.set_rax(cx.gprs.rax);
        vmcb02.set_rsp(cx.gprs.rsp);
        // A write to what is not writable memory is dropped, as on the bus: L1 chose the place.
        if image::write_exit(cx.memory, self.vmcb12_at, vmcb02, fields).is_err() {
            self.is_cached = false;
        }
        let (vmcb02, l1) = (&self.pages.vmcb, &mut *cx.vmcb01);
        image::copy_resident(vmcb02, l1);
        l1.set_cr2(vmcb02.cr2());
        l1.set_dr6(vmcb02.dr6());
        if !fields.pat && l1.g_pat() != vmcb02.g_pat() {
            l1.set_g_pat(vmcb02.g_pat());
        }
        if !fields.lbr && l1.virtual_extensions().contains(VirtualExtensions::LBR) {
            image::copy_lbr(vmcb02, l1);
            l1.mark_dirty(testudo_svm::vmcb::CleanBits::LBR);
        }
        self.load_host_state(cx.gprs, cx.vmcb01);
    }

    /// V_TPR, V_IRQ and V_GIF as the processor left them, in the word that L1 gave (APM vol. 2,
    /// 15.21.4).
    #[inline]
    pub(super) fn collected_virtual_interrupts(&self) -> VirtualInterrupts {
        let live = self.pages.vmcb.virtual_interrupts();
        let theirs = self.vmcb12.virtual_interrupts();
        let mut taken = VintrFlags::V_IRQ;
        if theirs.contains(VintrFlags::V_GIF_ENABLE) {
            taken |= VintrFlags::V_GIF;
        }
        let source = self.window.unwrap_or(live);
        let word = theirs.remove(taken).insert(source.flags() & taken);
        if theirs.contains(VintrFlags::V_INTR_MASKING) {
            word.with_tpr(live.tpr())
        } else {
            word
        }
    }

    /// Puts that word where an exit writes it from, and L1's own task priority where it belongs. The
    /// next entry makes the word of `vmcb02` anew.
    #[inline]
    fn collect_virtual_interrupts(&mut self, vmcb01: &mut Vmcb) {
        let word = self.collected_virtual_interrupts();
        let live = self.pages.vmcb.virtual_interrupts();
        if !word.contains(VintrFlags::V_INTR_MASKING) {
            let ours = vmcb01.virtual_interrupts();
            if ours.tpr() != live.tpr() {
                vmcb01.set_virtual_interrupts(ours.with_tpr(live.tpr()));
            }
        }
        self.window = None;
        self.pages.vmcb.set_virtual_interrupts(word);
    }

    /// L1's own state is in `vmcb01` still; what is left is what #VMEXIT changes in it: CR0.PE set
    /// and RFLAGS.VM clear (VMRUN runs only so), CPL 0, breakpoints off, GIF clear.
    #[inline]
    fn load_host_state(&mut self, gprs: &mut Gprs, vmcb01: &mut Vmcb) {
        self.is_guest = false;
        self.injected = RawEvent::NONE;
        self.set_gif(false, vmcb01);
        vmcb01.set_dr7(DR7_DISABLED);
        vmcb01.set_event_inj(RawEvent::NONE);
        vmcb01.set_exit_int_info(RawEvent::NONE);
        gprs.rax = vmcb01.rax();
        gprs.rsp = vmcb01.rsp();
    }

    /// A failed entry: L1's control block gets the reason and nothing else, and L1 goes on as
    /// after any exit.
    #[cold]
    pub(super) fn fail<M: GuestMemory, S>(&mut self, cx: &mut Context<'_, M, S>) {
        let vmcb02 = &mut self.pages.vmcb;
        vmcb02.set_exit_code(ExitCode::INVALID.0);
        vmcb02.set_exit_info1(0);
        vmcb02.set_exit_info2(0);
        vmcb02.set_exit_int_info(RawEvent::NONE);
        vmcb02.set_event_inj(RawEvent::NONE);
        self.window = None;
        // What `vmcb02` holds is nobody's now, and a write that goes nowhere is dropped.
        self.is_cached = false;
        let _dropped = image::write_failed(cx.memory, self.vmcb12_at, vmcb02).is_err();
        self.load_host_state(cx.gprs, cx.vmcb01);
    }
}
