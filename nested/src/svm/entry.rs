//! VMRUN: the copy, the checks, and the join of L0's control block with L1's (APM vol. 2, 15.5).

use testudo_arch::{Event, Gpa, GuestMemory};
use testudo_svm::Vmcb;
use testudo_svm::caps::Features;
use testudo_svm::check::{Outside, check_pdpes, check_vmrun};
use testudo_svm::event::RawEvent;
use testudo_svm::intercept::{Intercepts, Misc1, Misc2, Misc3};
use testudo_svm::vmcb::{
    CleanBits, InterruptState, NestedControl, TlbControl, VintrFlags, VirtualExtensions,
    VirtualInterrupts,
};

use super::instruction::{address, complete};
use super::{Context, NestedSvm, NestedTable, Outcome, SecondStage, image, route};

/// What EVENTINJ means: vector, type, error-code valid, valid, and the error code (APM vol. 2,
/// figure 15-4).
const EVENT_BITS: u64 = 0xFFFF_FFFF_8000_0FFF;

/// The virtual-interrupt controls that are L1's to give L2, beside the small numbers.
const V_INTR: VintrFlags = VintrFlags::V_IRQ.union(VintrFlags::V_IGN_TPR);
const V_GIF: VintrFlags = VintrFlags::V_GIF.union(VintrFlags::V_GIF_ENABLE);

/// V_TPR, V_INTR_PRIO and V_INTR_VECTOR.
const V_NUMBERS: u64 = 0xFF_000F_000F;

/// Intercepts of L0 that are about L1 alone: its interrupt window, its hypercalls (L2's VMMCALL is
/// #UD unless L1 wants it), and the SVM instructions, which have their own rule here.
const ABOUT_L1: (Misc1, Misc2) = (
    Misc1::VINTR,
    Misc2::VMMCALL
        .union(Misc2::STGI)
        .union(Misc2::CLGI)
        .union(Misc2::VMLOAD)
        .union(Misc2::VMSAVE),
);

/// The third word's intercepts that L1 can ask for. Bus locks and idle HLT come with features that
/// are not offered, and the rest means nothing yet.
const OFFERED_MISC3: Misc3 = Misc3::INVLPGB
    .union(Misc3::INVLPGB_ILLEGAL)
    .union(Misc3::INVPCID)
    .union(Misc3::MCOMMIT)
    .union(Misc3::TLBSYNC);

/// What must leave L2 whatever the two others say: it would reach the processor's own state.
const REQUIRED: (Misc1, Misc2) = (
    Misc1::INTR
        .union(Misc1::NMI)
        .union(Misc1::SHUTDOWN)
        .union(Misc1::INVLPGA)
        .union(Misc1::IOIO)
        .union(Misc1::MSR),
    Misc2::VMRUN.union(Misc2::SKINIT),
);

impl NestedSvm {
    /// VMRUN, after the checks that all SVM instructions share.
    pub(super) fn vmrun<M: GuestMemory, S: SecondStage>(
        &mut self,
        next_rip: u64,
        cx: &mut Context<'_, M, S>,
    ) -> Outcome {
        // L1 intercepts the VMRUN of its guests, or they would not run (`Rule::VmrunIntercept`).
        if self.is_guest {
            return Outcome::Fault(Event::UD);
        }
        let at = address(cx.gprs.rax, cx.vmcb01);
        if let Err(fault) = self.check_address(at) {
            return Outcome::Fault(fault);
        }
        // Where would the processor save L1's state? KVM's L1 sees #GP here too.
        if self.vm_hsave_pa == 0 {
            return Outcome::Fault(Event::GP0);
        }
        // The one time that L1's control block is read. If it is not memory, SVME_ADDR_CHECK's #GP.
        let lbr = self.features.contains(Features::LBR_VIRT);
        if image::read_entry(cx.memory, at, &mut self.vmcb12, lbr).is_err() {
            return Outcome::Fault(Event::GP0);
        }
        self.ignore_what_is_not_offered();
        complete(cx.vmcb01, next_rip);
        cx.vmcb01.set_rax(cx.gprs.rax);
        cx.vmcb01.set_rsp(cx.gprs.rsp);

        let unchanged = self.unchanged(at);
        self.vmcb12_at = at;
        let outside = Outside {
            host_cr0: cx.vmcb01.cr0(),
            u_cet: 0,
        };
        if !check_vmrun(&self.vmcb12, &self.l1_caps, &outside).is_empty() {
            return self.refuse(cx);
        }
        // Where no memory is, the pointers read as ones, with all reserved bits set.
        if check_pdpes(&self.vmcb12, &self.l1_caps, self.defects, cx.memory) != Ok(None) {
            return self.refuse(cx);
        }
        if !self.select_translation(unchanged, cx) {
            return self.refuse(cx);
        }
        self.join_controls(cx);
        self.join_state(unchanged, cx.vmcb01);
        cx.gprs.rax = self.vmcb12.rax();
        cx.gprs.rsp = self.vmcb12.rsp();
        self.is_guest = true;
        self.is_cached = true;
        // "VMRUN sets GIF."
        self.gif = true;
        Outcome::Entered
    }

    /// The parts that L1 says have not changed since its last exit from this same control block,
    /// and that are therefore in `vmcb02` already (APM vol. 2, 15.15).
    #[inline]
    fn unchanged(&self, at: Gpa) -> CleanBits {
        if self.is_cached && self.vmcb12_at == at {
            self.vmcb12.clean()
        } else {
            CleanBits::empty()
        }
    }

    /// Makes the copy what a processor with L1's features sees in it: bits of other features do
    /// nothing.
    #[inline]
    pub(super) fn ignore_what_is_not_offered(&mut self) {
        let features = self.features;
        let has = |feature| features.contains(feature);
        let mut nested = NestedControl::empty();
        nested.set(NestedControl::NP_ENABLE, has(Features::NP));
        let mut extensions = VirtualExtensions::empty();
        extensions.set(VirtualExtensions::LBR, has(Features::LBR_VIRT));
        extensions.set(
            VirtualExtensions::VMSAVE_VMLOAD,
            has(Features::V_VMSAVE_VMLOAD),
        );
        let mut flags = V_INTR | VintrFlags::V_INTR_MASKING;
        flags.set(V_GIF, has(Features::V_GIF));

        let copy = &mut self.vmcb12;
        // The setters below would say that something changed; L1's word is what counts.
        let clean = if has(Features::VMCB_CLEAN) {
            copy.clean()
        } else {
            CleanBits::empty()
        };
        copy.set_intercept_misc3(copy.intercept_misc3() & OFFERED_MISC3);
        copy.set_nested_control(copy.nested_control() & nested);
        copy.set_virtual_extensions(copy.virtual_extensions() & extensions);
        let word = copy.virtual_interrupts().0 & (flags.bits() | V_NUMBERS);
        copy.set_virtual_interrupts(VirtualInterrupts(word));
        copy.set_clean(clean);
    }

    /// The failed entry: L1 goes on behind its VMRUN as after any exit, and its control block says
    /// VMEXIT_INVALID.
    #[cold]
    fn refuse<M: GuestMemory, S>(&mut self, cx: &mut Context<'_, M, S>) -> Outcome {
        self.fail(cx);
        Outcome::Refused
    }

    /// The page tables and the translations that L2 uses. `false` if there is no table for it.
    #[inline]
    pub(super) fn select_translation<M, S: SecondStage>(
        &mut self,
        unchanged: CleanBits,
        cx: &mut Context<'_, M, S>,
    ) -> bool {
        match self.vmcb12.tlb_control() {
            TlbControl::DoNothing => {}
            TlbControl::FlushAsid | TlbControl::FlushAsidNonGlobal => {
                self.forget_l1_tables(Some(self.vmcb12.asid()), cx.second_stage);
            }
            // Reserved encodings: too much is always allowed.
            TlbControl::FlushAll | TlbControl::Reserved(_) => {
                self.flush_l1 = true;
                self.forget_l1_tables(None, cx.second_stage);
            }
        }
        // Under a new identifier the processor knows nothing of L1's tables, so neither may what was
        // derived from them: a new identifier is one way to flush.
        self.flush_l2 |= self.asids.activate(self.vmcb12.asid());

        let (l1, vmcb02) = (&*cx.vmcb01, &mut self.pages.vmcb);
        let (root, pat) = if route::is_nested_paging(&self.vmcb12) {
            let table = NestedTable {
                root: Gpa(self.vmcb12.n_cr3()),
                cr4: l1.cr4(),
                efer: l1.efer(),
                asid: self.vmcb12.asid(),
            };
            let Some(root) = cx.second_stage.activate(table) else {
                return false;
            };
            let kept = unchanged.contains(CleanBits::NESTED_PAGING);
            let pat = if kept {
                vmcb02.g_pat()
            } else {
                self.vmcb12.g_pat()
            };
            (root.0, pat)
        } else {
            // L1 shadows its guest's tables: what it puts in CR3 are its own physical addresses,
            // and its PAT is in force.
            (l1.n_cr3(), l1.g_pat())
        };
        if vmcb02.n_cr3() != root {
            vmcb02.set_n_cr3(root);
        }
        if vmcb02.g_pat() != pat {
            vmcb02.set_g_pat(pat);
        }
        if vmcb02.nested_control() != l1.nested_control() {
            vmcb02.set_nested_control(l1.nested_control());
        }
        true
    }

    /// What L2 must leave for: all that L0 needs, all that L1 wants.
    #[inline]
    pub(super) fn merged_intercepts(&self, vmcb01: &Vmcb) -> Intercepts {
        let mut ours = vmcb01.intercepts();
        ours.misc1 = (ours.misc1 - ABOUT_L1.0) | REQUIRED.0;
        ours.misc2 = (ours.misc2 - ABOUT_L1.1) | REQUIRED.1;
        let theirs = self.vmcb12.virtual_interrupts();
        if !theirs.contains(VintrFlags::V_GIF_ENABLE) {
            ours.misc2 |= Misc2::STGI | Misc2::CLGI;
        }
        let extensions = self.vmcb12.virtual_extensions();
        if !extensions.contains(VirtualExtensions::VMSAVE_VMLOAD) {
            ours.misc2 |= Misc2::VMLOAD | Misc2::VMSAVE;
        }
        let (misc1, misc2) = self.window_intercepts();
        ours.misc1 |= misc1;
        ours.misc2 |= misc2;
        ours | self.vmcb12.intercepts()
    }

    /// Everything of the control area.
    #[inline]
    pub(super) fn join_controls<M: GuestMemory, S>(&mut self, cx: &Context<'_, M, S>) {
        self.window = None;
        let intercepts = self.merged_intercepts(cx.vmcb01);
        let theirs_misc1 = self.vmcb12.intercept_misc1();
        let (msr_permissions, msr_changed) = if theirs_misc1.contains(Misc1::MSR) {
            let l1_map = Gpa(self.vmcb12.msrpm_base_pa() & !0xFFF);
            let map = zerocopy::IntoBytes::as_mut_bytes(&mut self.pages.msr);
            let changed = self.open_msrs.merge(map, cx.memory, l1_map);
            (self.msr_permissions_at(), changed)
        } else {
            (cx.vmcb01.msrpm_base_pa(), false)
        };
        let ports_wanted = theirs_misc1.contains(Misc1::IOIO) && !self.open_ports.is_empty();
        let (io_permissions, io_changed) = if ports_wanted {
            let l1_map = Gpa(self.vmcb12.iopm_base_pa() & !0xFFF);
            let map = zerocopy::IntoBytes::as_mut_bytes(&mut self.pages.io);
            let changed = self.open_ports.merge(map, cx.memory, l1_map);
            (self.io_permissions_at(), changed)
        } else {
            (cx.vmcb01.iopm_base_pa(), false)
        };
        let word = self.virtual_interrupts(cx.vmcb01);
        let pause = self.pause_filter(cx.vmcb01);
        self.injected = RawEvent(self.vmcb12.event_inj().0 & EVENT_BITS);

        let (l1, theirs, vmcb02) = (&*cx.vmcb01, &*self.vmcb12, &mut self.pages.vmcb);
        if vmcb02.intercepts() != intercepts {
            vmcb02.set_intercepts(intercepts);
        }
        if vmcb02.msrpm_base_pa() != msr_permissions {
            vmcb02.set_msrpm_base_pa(msr_permissions);
        }
        if vmcb02.iopm_base_pa() != io_permissions {
            vmcb02.set_iopm_base_pa(io_permissions);
        }
        if msr_changed || io_changed {
            vmcb02.mark_dirty(CleanBits::PERMISSION_MAPS);
        }
        let tsc_offset = l1.tsc_offset().wrapping_add(theirs.tsc_offset());
        if vmcb02.tsc_offset() != tsc_offset {
            vmcb02.set_tsc_offset(tsc_offset);
        }
        if (vmcb02.pause_filter_count(), vmcb02.pause_filter_threshold()) != pause {
            vmcb02.set_pause_filter_count(pause.0);
            vmcb02.set_pause_filter_threshold(pause.1);
        }
        vmcb02.set_virtual_interrupts(word);
        vmcb02.set_interrupt_state(theirs.interrupt_state() & InterruptState::INTERRUPT_SHADOW);
        vmcb02.set_event_inj(self.injected);
        vmcb02.set_exit_int_info(RawEvent::NONE);
        if self.features.contains(Features::NRIPS) {
            vmcb02.set_n_rip(theirs.n_rip());
        }
    }

    /// L1's virtual interrupt for L2, under L0's rule that physical interrupts are the host's.
    #[inline]
    fn virtual_interrupts(&self, vmcb01: &Vmcb) -> VirtualInterrupts {
        let theirs = self.vmcb12.virtual_interrupts();
        let word = theirs.insert(VintrFlags::V_INTR_MASKING);
        if theirs.contains(VintrFlags::V_INTR_MASKING) {
            word
        } else {
            // L2's CR8 is L1's own.
            word.with_tpr(vmcb01.virtual_interrupts().tpr())
        }
    }

    /// The pause filter: L1's, where L1 wants PAUSE; the shorter one, where both do. Of two
    /// filters the one that lets fewer pass serves both: an early exit is a hint like any other.
    #[inline]
    fn pause_filter(&self, vmcb01: &Vmcb) -> (u16, u16) {
        let filter = |vmcb: &Vmcb, has: bool| {
            let (count, threshold) = (vmcb.pause_filter_count(), vmcb.pause_filter_threshold());
            if has { (count, threshold) } else { (0, 0) }
        };
        let theirs = filter(&self.vmcb12, self.features.contains(Features::PAUSE_FILTER));
        let ours = filter(vmcb01, true);
        match (
            vmcb01.intercept_misc1().contains(Misc1::PAUSE),
            self.vmcb12.intercept_misc1().contains(Misc1::PAUSE),
        ) {
            (_, false) => ours,
            (false, true) => theirs,
            (true, true) => (ours.0.min(theirs.0), ours.1.min(theirs.1)),
        }
    }

    /// L2's registers, as far as they have changed.
    #[inline]
    pub(super) fn join_state(&mut self, unchanged: CleanBits, vmcb01: &Vmcb) {
        let (theirs, vmcb02) = (&*self.vmcb12, &mut self.pages.vmcb);
        let changed = |part| !unchanged.contains(part);
        if changed(CleanBits::SEGMENTS) {
            image::copy_segments(theirs, vmcb02);
            vmcb02.mark_dirty(CleanBits::SEGMENTS);
        }
        if changed(CleanBits::DESCRIPTOR_TABLES) {
            image::copy_descriptor_tables(theirs, vmcb02);
            vmcb02.mark_dirty(CleanBits::DESCRIPTOR_TABLES);
        }
        if changed(CleanBits::CONTROL_REGISTERS) {
            image::copy_control_registers(theirs, vmcb02);
            vmcb02.mark_dirty(CleanBits::CONTROL_REGISTERS);
        }
        if changed(CleanBits::DEBUG_REGISTERS) {
            image::copy_debug_registers(theirs, vmcb02);
            vmcb02.mark_dirty(CleanBits::DEBUG_REGISTERS);
        }
        if changed(CleanBits::CR2) {
            vmcb02.set_cr2(theirs.cr2());
        }
        self.join_lbr(unchanged, vmcb01);
        let (theirs, vmcb02) = (&*self.vmcb12, &mut self.pages.vmcb);
        image::copy_flow(theirs, vmcb02);
        vmcb02.set_rax(theirs.rax());
        vmcb02.set_rsp(theirs.rsp());
        image::copy_resident(vmcb01, vmcb02);
    }

    /// Last-branch records: L2's own where L1 virtualizes them, otherwise L1's go on.
    #[inline]
    fn join_lbr(&mut self, unchanged: CleanBits, vmcb01: &Vmcb) {
        let (theirs, vmcb02) = (&*self.vmcb12, &mut self.pages.vmcb);
        let lbr = VirtualExtensions::LBR;
        let extensions = theirs.virtual_extensions() | (vmcb01.virtual_extensions() & lbr);
        if vmcb02.virtual_extensions() != extensions {
            vmcb02.set_virtual_extensions(extensions);
        }
        if theirs.virtual_extensions().contains(lbr) {
            if !unchanged.contains(CleanBits::LBR) {
                image::copy_lbr(theirs, vmcb02);
                vmcb02.mark_dirty(CleanBits::LBR);
            }
        } else if extensions.contains(lbr) {
            image::copy_lbr(vmcb01, vmcb02);
            vmcb02.mark_dirty(CleanBits::LBR);
        }
    }
}
