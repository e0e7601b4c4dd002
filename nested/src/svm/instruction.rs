//! The SVM instructions, emulated (APM vol. 3, chapter 4).

use testudo_arch::{Cr0Flags, EferFlags, Event, Gpa, GuestMemory, RFlags};
use testudo_svm::Vmcb;
use testudo_svm::exit::ExitCode;
use testudo_svm::vmcb::{InterruptState, VintrFlags};

use super::{Context, NestedSvm, SecondStage, image};

/// An SVM instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the instructions' own names")]
pub enum Instruction {
    Vmrun,
    Vmload,
    Vmsave,
    Stgi,
    Clgi,
    Invlpga,
    Skinit,
}

impl Instruction {
    /// Every SVM instruction that this layer emulates.
    pub const ALL: [Self; 7] = [
        Self::Vmrun,
        Self::Vmload,
        Self::Vmsave,
        Self::Stgi,
        Self::Clgi,
        Self::Invlpga,
        Self::Skinit,
    ];

    /// The instruction whose exit this is.
    #[inline]
    pub const fn from_exit(code: ExitCode) -> Option<Self> {
        Some(match code {
            ExitCode::VMRUN => Self::Vmrun,
            ExitCode::VMLOAD => Self::Vmload,
            ExitCode::VMSAVE => Self::Vmsave,
            ExitCode::STGI => Self::Stgi,
            ExitCode::CLGI => Self::Clgi,
            ExitCode::INVLPGA => Self::Invlpga,
            ExitCode::SKINIT => Self::Skinit,
            _ => return None,
        })
    }
}

/// What an emulated instruction led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It is done; whoever executed it goes on after it.
    Done,
    /// It is done and L1 has GIF set: what waited for that can be delivered.
    GifSet,
    /// It is not done, and whoever executed it gets this exception at it.
    Fault(Event),
    /// VMRUN: L2 runs next. Pending physical events are to be looked at once more, since other
    /// rules hold for them now.
    Entered,
    /// VMRUN: L1 goes on after it, with an exit by VMEXIT_INVALID in its control block.
    Refused,
}

impl NestedSvm {
    /// Emulates an SVM instruction of whoever runs: L1, or an L2 whose L1 does not intercept it.
    ///
    /// `next_rip` is where the instruction ends. RIP and the interrupt shadow are taken care of.
    pub fn execute<M: GuestMemory, S: SecondStage>(
        &mut self,
        instruction: Instruction,
        next_rip: u64,
        cx: &mut Context<'_, M, S>,
    ) -> Outcome {
        let runs = if self.is_guest {
            &self.pages.vmcb
        } else {
            &*cx.vmcb01
        };
        if let Err(fault) = self.check(instruction, runs) {
            return Outcome::Fault(fault);
        }
        let outcome = match instruction {
            Instruction::Vmrun => return self.vmrun(next_rip, cx),
            Instruction::Vmload | Instruction::Vmsave => {
                let address = address(cx.gprs.rax, runs);
                self.move_resident(instruction, address, cx)
            }
            Instruction::Stgi => self.write_gif(true, cx.vmcb01),
            Instruction::Clgi => self.write_gif(false, cx.vmcb01),
            Instruction::Invlpga => self.invlpga(cx.gprs.rcx as u32, cx),
            Instruction::Skinit => Outcome::Fault(Event::UD),
        };
        if !matches!(outcome, Outcome::Fault(_)) {
            let runs = if self.is_guest {
                &mut self.pages.vmcb
            } else {
                &mut *cx.vmcb01
            };
            complete(runs, next_rip);
        }
        outcome
    }

    /// What all of them check first: SVM on, protected mode, CPL 0. SKINIT is not offered at all
    /// (CPUID Fn8000_0001 ECX bit 12).
    #[inline]
    fn check(&self, instruction: Instruction, runs: &Vmcb) -> Result<(), Event> {
        let enabled = self.is_enabled || self.is_guest;
        let protected = runs.cr0() & Cr0Flags::PROTECTED_MODE_ENABLE.bits() != 0
            && runs.rflags() & RFlags::VIRTUAL_8086_MODE.bits() == 0;
        if !enabled || !protected || instruction == Instruction::Skinit {
            return Err(Event::UD);
        }
        if runs.cpl() != 0 {
            return Err(Event::GP0);
        }
        Ok(())
    }

    /// A physical address that VMRUN, VMLOAD and VMSAVE accept: "not aligned on a 4 KiB boundary"
    /// and "above the maximum supported physical address" are #GP.
    #[inline]
    pub(super) fn check_address(&self, address: Gpa) -> Result<(), Event> {
        if address.0 & 0xFFF != 0 || address.0 >= self.l1_caps.physical_limit() {
            return Err(Event::GP0);
        }
        Ok(())
    }

    /// VMLOAD and VMSAVE. Where there is no memory they fault: a processor that checks these
    /// addresses (SVME_ADDR_CHECK) refuses what is not usable memory.
    fn move_resident<M: GuestMemory, S>(
        &mut self,
        instruction: Instruction,
        address: Gpa,
        cx: &mut Context<'_, M, S>,
    ) -> Outcome {
        if let Err(fault) = self.check_address(address) {
            return Outcome::Fault(fault);
        }
        let runs = if self.is_guest {
            &mut self.pages.vmcb
        } else {
            &mut *cx.vmcb01
        };
        let moved = if instruction == Instruction::Vmload {
            image::vmload(cx.memory, address, runs)
        } else {
            image::vmsave(cx.memory, address, runs)
        };
        match moved {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Fault(Event::GP0),
        }
    }

    /// STGI and CLGI. With the virtual GIF that L1 gave it, L2's act on that one; they come here
    /// only while L0's window holds it.
    fn write_gif(&mut self, gif: bool, vmcb01: &mut Vmcb) -> Outcome {
        let theirs = self.vmcb12.virtual_interrupts();
        if self.is_guest && theirs.contains(VintrFlags::V_GIF_ENABLE) {
            let held = self.window.as_mut();
            if let Some(word) = held {
                *word = if gif {
                    word.insert(VintrFlags::V_GIF)
                } else {
                    word.remove(VintrFlags::V_GIF)
                };
            }
            return Outcome::Done;
        }
        self.set_gif(gif, vmcb01);
        if gif { Outcome::GifSet } else { Outcome::Done }
    }

    /// INVLPGA: one page of one address space. All of the address space is flushed, which is
    /// always allowed.
    fn invlpga<M, S: SecondStage>(&mut self, asid: u32, cx: &mut Context<'_, M, S>) -> Outcome {
        if asid == 0 {
            self.flush_l1 = true;
        } else {
            self.forget_l1_tables(Some(asid), cx.second_stage);
        }
        Outcome::Done
    }
}

/// rAX as an operand: all of RAX in 64-bit mode, EAX elsewhere.
#[inline]
pub(super) fn address(rax: u64, runs: &Vmcb) -> Gpa {
    use testudo_arch::regs::SegmentRegister;
    use testudo_arch::segment::SegmentAttributes;
    let cs = runs.segment(SegmentRegister::Cs).attributes;
    let long = runs.efer() & EferFlags::LONG_MODE_ACTIVE.bits() != 0;
    if long && cs.contains(SegmentAttributes::LONG) {
        Gpa(rax)
    } else {
        Gpa(rax & 0xFFFF_FFFF)
    }
}

/// Ends an instruction: RIP behind it, and the interrupt shadow over.
#[inline]
pub(super) fn complete(runs: &mut Vmcb, next_rip: u64) {
    runs.set_rip(next_rip);
    let state = runs.interrupt_state();
    runs.set_interrupt_state(state - InterruptState::INTERRUPT_SHADOW);
}
