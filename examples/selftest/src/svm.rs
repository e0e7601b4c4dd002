//! Cases on the world switch of AMD-V: a guest in this program's own address space, whose every
//! register is watched across entries and exits.
#![allow(unsafe_code)]

use alloc::format;
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use testudo_arch::cpuid::Cpuid;
use testudo_arch::regs::SegmentRegister;
use testudo_arch::segment::{Segment, SegmentAttributes};
use testudo_arch::{Gpr, Gprs, Hpa, Msr};
use testudo_rt::irq::{self, TrapFrame};
use testudo_rt::{Boot, apic, cpu, memory, msr, port, time, timer};
use testudo_svm::hw::{
    EnableError, GuestRegisters, HeldInterrupts, HostFrames, ResidentRegisters, SseRegisters, Svm,
    VmcbFrame,
};
use testudo_svm::intercept::{Misc1, Misc2};
use testudo_svm::vmcb::{VintrFlags, VirtualInterrupts, Vmcb};
use testudo_svm::{Exit, SvmCaps};

use crate::case::{Case, Outcome, check, check_eq};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "svm::registers_survive",
        run: registers_survive,
    },
    Case {
        name: "svm::hidden_registers_are_switched",
        run: hidden_registers_are_switched,
    },
    Case {
        name: "svm::resident_registers_move",
        run: resident_registers_move,
    },
    Case {
        name: "svm::interrupts_are_held",
        run: interrupts_are_held,
    },
    Case {
        name: "svm::guest_cannot_mask_interrupts",
        run: guest_cannot_mask_interrupts,
    },
    Case {
        name: "svm::interrupts_end_a_guests_halt",
        run: interrupts_end_a_guests_halt,
    },
    Case {
        name: "svm::waiting_loses_no_interrupt",
        run: waiting_loses_no_interrupt,
    },
    Case {
        name: "svm::enabled_once",
        run: enabled_once,
    },
];

// The guests. None touches memory, but for the one that reads its MXCSR.
global_asm!(
    ".globl selftest_svm_step, selftest_svm_msrs, selftest_svm_avx, selftest_svm_spin",
    ".globl selftest_svm_halt",
    "selftest_svm_step:",
    "vmmcall",
    "add rax, 1",
    "add rcx, 2",
    "add rdx, 3",
    "add rbx, 4",
    "add rsp, 5",
    "add rbp, 6",
    "add rsi, 7",
    "add rdi, 8",
    "add r8, 9",
    "add r9, 10",
    "add r10, 11",
    "add r11, 12",
    "add r12, 13",
    "add r13, 14",
    "add r14, 15",
    "add r15, 16",
    ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "paddb xmm\\n, xmm\\n",
    ".endr",
    "ldmxcsr [rip + 2f]",
    "jmp selftest_svm_step",
    "2: .long 0x9FC0",
    "selftest_svm_msrs:",
    ".irp pair, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000082",
    "mov ecx, \\pair",
    "rdmsr",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r8, r9",
    "mov r9, r10",
    "mov r10, r11",
    "mov r11, rax",
    ".endr",
    "vmmcall",
    "mov ecx, 0xC0000101",
    "mov eax, 0x5000",
    "mov edx, 0",
    "wrmsr",
    "mov ecx, 0xC0000082",
    "mov eax, 0x6000",
    "wrmsr",
    "vmmcall",
    "selftest_svm_avx:",
    "vinsertf128 ymm0, ymm0, xmm1, 1",
    "vmmcall",
    "vextractf128 xmm2, ymm0, 1",
    "vmmcall",
    "selftest_svm_spin:",
    "jmp selftest_svm_spin",
    "selftest_svm_halt:",
    "hlt",
    "vmmcall",
);

unsafe extern "C" {
    static selftest_svm_step: u8;
    static selftest_svm_msrs: u8;
    static selftest_svm_avx: u8;
    static selftest_svm_spin: u8;
    static selftest_svm_halt: u8;
}

const RFLAGS_IF: u64 = 1 << 9;

/// The lengths of instructions.
const VMMCALL: u64 = 3;
const HLT: u64 = 1;

/// What a case works with.
struct Guest<'a, 's> {
    held: &'a mut HeldInterrupts<'s>,
    vmcb: &'a mut VmcbFrame<'s>,
    registers: &'a mut GuestRegisters,
}

impl Guest<'_, '_> {
    /// Runs the guest to its next exit, and past the VMMCALL if it was one.
    fn enter(&mut self) -> Exit {
        // SAFETY: the guest is the assembly above: it leaves alone what it is not given, and it is
        // the only guest on this processor.
        unsafe { self.held.enter(self.vmcb, self.registers) };
        let exit = Exit::read(self.vmcb);
        if exit == Exit::Vmmcall {
            let next = self.vmcb.rip() + VMMCALL;
            self.vmcb.set_rip(next);
        }
        exit
    }

    /// Runs the guest to its next VMMCALL; interrupts that earlier cases left behind are taken.
    fn run(&mut self) -> Exit {
        for _ in 0..100 {
            match self.enter() {
                Exit::Interrupt => self.held.take_pending(),
                exit => return exit,
            }
        }
        Exit::Interrupt
    }

    /// Starts the guest anew from this code.
    fn start(&mut self, code: *const u8) {
        self.vmcb.set_rip(code as u64);
    }
}

/// Enables SVM, runs `test` with a guest in this program's address space, and disables SVM.
fn with_guest(test: impl FnOnce(&mut Guest<'_, '_>) -> Outcome) -> Outcome {
    let Ok(caps) = SvmCaps::from_cpuid(&Cpuid::of_this_processor()) else {
        return Outcome::Skipped("no SVM");
    };
    let [Some(save_area), Some(host), Some(own)] = [(); 3].map(|()| memory::alloc_frame()) else {
        return Outcome::Failed("no memory".into());
    };
    let frames = HostFrames {
        save_area: Hpa(save_area),
        vmcb: Hpa(host),
    };
    // SAFETY: CPL 0, `caps` are this processor's, the frames are ours, and no case moves to
    // another processor or changes the host's segments.
    let mut svm = match unsafe { Svm::enable(&caps, frames) } {
        Ok(svm) => svm,
        Err(error) => return Outcome::Failed(format!("{error}")),
    };
    let outcome = {
        // SAFETY: the frame is identity-mapped, zeroed and nobody else's.
        let mut vmcb = unsafe { VmcbFrame::new(&mut *(own as *mut Vmcb), Hpa(own)) };
        build(&mut vmcb);
        let mut registers = GuestRegisters::default();
        test(&mut Guest {
            held: &mut svm.hold_interrupts(),
            vmcb: &mut vmcb,
            registers: &mut registers,
        })
    };
    svm.disable();
    for frame in [save_area, host, own] {
        // SAFETY: from `alloc_frame` above, and SVM is off.
        unsafe { memory::release(frame, 4096) };
    }
    outcome
}

/// A guest that runs with this program's page tables, at CPL 0.
fn build(vmcb: &mut Vmcb) {
    let (cr0, cr3, cr4): (u64, u64, u64);
    // SAFETY: reads control registers at CPL 0.
    unsafe {
        asm!("mov {}, cr0", "mov {}, cr3", "mov {}, cr4", out(reg) cr0, out(reg) cr3,
            out(reg) cr4, options(nomem, nostack, preserves_flags));
    }
    vmcb.set_intercept_misc1(Misc1::INTR | Misc1::NMI | Misc1::SHUTDOWN);
    vmcb.set_intercept_misc2(Misc2::VMRUN | Misc2::VMMCALL);
    vmcb.set_virtual_interrupts(VirtualInterrupts::default().insert(VintrFlags::V_INTR_MASKING));
    vmcb.set_asid(1);
    vmcb.set_tlb_control(testudo_svm::vmcb::TlbControl::FlushAll);
    vmcb.set_cr0(cr0);
    vmcb.set_cr3(cr3);
    vmcb.set_cr4(cr4);
    vmcb.set_efer(value(Msr::EFER));
    vmcb.set_rflags(RFLAGS_IF | 2);
    vmcb.set_dr6(0xFFFF_0FF0);
    vmcb.set_dr7(0x400);
    let code = Segment::flat(8, SegmentAttributes::CODE64);
    vmcb.set_segment(SegmentRegister::Cs, &code);
    let data = Segment::flat(16, SegmentAttributes::DATA);
    for register in [
        SegmentRegister::Ss,
        SegmentRegister::Ds,
        SegmentRegister::Es,
        SegmentRegister::Fs,
        SegmentRegister::Gs,
    ] {
        vmcb.set_segment(register, &data);
    }
    let task = Segment::flat(24, SegmentAttributes::TSS_BUSY);
    vmcb.set_segment(SegmentRegister::Tr, &task);
}

/// The value of a register that exists, or 0.
fn value(register: Msr) -> u64 {
    msr::try_read(register.0).unwrap_or_default()
}

fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores MXCSR into a variable.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Overwrites the registers that host code uses.
fn disturb() {
    // SAFETY: the registers are declared as changed.
    unsafe {
        asm!("pcmpeqb xmm0, xmm0", "movaps xmm7, xmm0", "movaps xmm15, xmm0", "mov r15, -1",
            out("xmm0") _, out("xmm7") _, out("xmm15") _, out("r15") _);
    }
}

fn registers_survive(_: &'static Boot) -> Outcome {
    with_guest(|guest| {
        guest.start(&raw const selftest_svm_step);
        let mut expected = Gprs::default();
        for gpr in Gpr::ALL {
            expected[gpr] = 0x0101_0101_0101_0101 * (gpr as u64 + 1);
        }
        let mut sse = SseRegisters::default();
        for (i, xmm) in sse.xmm.iter_mut().enumerate() {
            *xmm = 0x0102_0304_0506_0708_090A_0B0C_0D0E_0F10 + i as u128;
        }
        // Underflow unmasked: taken over by the host, this would bite.
        sse.mxcsr = 0x1780;
        guest.registers.gprs = expected;
        guest.registers.sse = sse;
        for round in 0..20 {
            check_eq!(guest.run(), Exit::Vmmcall);
            check!(
                guest.registers.gprs == expected,
                "round {round}: {:?}",
                guest.registers.gprs
            );
            check!(
                guest.registers.sse == sse,
                "round {round}: {:x?}",
                guest.registers.sse
            );
            check_eq!(mxcsr(), 0x1F80);
            disturb();
            for gpr in Gpr::ALL {
                expected[gpr] = expected[gpr].wrapping_add(gpr as u64 + 1);
            }
            for xmm in &mut sse.xmm {
                *xmm = u128::from_le_bytes(xmm.to_le_bytes().map(|byte| byte.wrapping_add(byte)));
            }
            sse.mxcsr = 0x9FC0;
        }
        Outcome::Passed
    })
}

fn hidden_registers_are_switched(_: &'static Boot) -> Outcome {
    let before = [Msr::GS_BASE, Msr::KERNEL_GS_BASE, Msr::LSTAR].map(value);
    let outcome = with_guest(|guest| {
        guest.start(&raw const selftest_svm_msrs);
        for (register, base) in [(SegmentRegister::Fs, 0x1000), (SegmentRegister::Gs, 0x2000)] {
            let segment = Segment {
                base,
                ..Segment::flat(16, SegmentAttributes::DATA)
            };
            guest.vmcb.set_segment(register, &segment);
        }
        guest.vmcb.set_kernel_gs_base(0x3000);
        guest.vmcb.set_lstar(0x4000);
        check_eq!(guest.run(), Exit::Vmmcall);
        let gprs = &guest.registers.gprs;
        check_eq!(
            [gprs.r8, gprs.r9, gprs.r10, gprs.r11],
            [0x1000, 0x2000, 0x3000, 0x4000]
        );
        check_eq!(cpu::current_id(), 0);
        check_eq!(guest.run(), Exit::Vmmcall);
        check_eq!(guest.vmcb.segment(SegmentRegister::Gs).base, 0x5000);
        check_eq!(guest.vmcb.lstar(), 0x6000);
        Outcome::Passed
    });
    let after = [Msr::GS_BASE, Msr::KERNEL_GS_BASE, Msr::LSTAR].map(value);
    check_eq!(before, after);
    outcome
}

fn resident_registers_move(_: &'static Boot) -> Outcome {
    let cpuid = Cpuid::of_this_processor();
    if cpuid.query(1, 0)[2] & 1 << 28 == 0 {
        return Outcome::Skipped("no AVX");
    }
    with_guest(|guest| {
        let (mut first, mut second) = match (
            ResidentRegisters::reset(&cpuid),
            ResidentRegisters::reset(&cpuid),
        ) {
            (Ok(first), Ok(second)) => (first, second),
            (Err(error), _) | (_, Err(error)) => return Outcome::Failed(format!("{error}")),
        };
        (first.xcr0, second.xcr0) = (7, 7);
        (first.dr[0], second.dr[0]) = (0x1111, 0x2222);
        let pattern = 0x1234_5678_9ABC_DEF0_0FED_CBA9_8765_4321;

        // SAFETY: what these load is what `reset` and `save` made, with XCR0 = 7 on a processor
        // with AVX; the host uses none of these registers.
        unsafe { first.load() };
        guest.start(&raw const selftest_svm_avx);
        guest.registers.sse.xmm[1] = pattern;
        check_eq!(guest.run(), Exit::Vmmcall);
        let middle = guest.vmcb.rip();
        // SAFETY: as above.
        unsafe {
            first.save();
            second.load();
        }
        guest.registers.sse.xmm[0] = pattern;
        check_eq!(guest.run(), Exit::Vmmcall);
        check_eq!(guest.registers.sse.xmm[2], 0);
        // SAFETY: as above.
        unsafe {
            second.save();
            first.load();
        }
        guest.vmcb.set_rip(middle);
        check_eq!(guest.run(), Exit::Vmmcall);
        check_eq!(guest.registers.sse.xmm[2], pattern);
        // SAFETY: as above.
        unsafe { first.save() };
        check_eq!((first.dr[0], second.dr[0]), (0x1111, 0x2222));
        check_eq!((first.xcr0, second.xcr0), (7, 7));
        check_eq!(mxcsr(), 0x1F80);
        Outcome::Passed
    })
}

const VECTOR: u8 = 0x71;
static TAKEN: AtomicU64 = AtomicU64::new(0);

fn take(_: &mut TrapFrame) {
    TAKEN.fetch_add(1, Ordering::Relaxed);
}

fn interrupts_are_held(_: &'static Boot) -> Outcome {
    TAKEN.store(0, Ordering::Relaxed);
    irq::set_handler(VECTOR, take);
    let outcome = with_guest(|guest| {
        guest.held.take_pending();
        guest.start(&raw const selftest_svm_spin);
        apic::send_ipi(cpu::current_id(), VECTOR);
        check_eq!(TAKEN.load(Ordering::Relaxed), 0);
        // The guest spins for ever; what is pending ends it, without being taken.
        check_eq!(guest.enter(), Exit::Interrupt);
        check_eq!(TAKEN.load(Ordering::Relaxed), 0);
        guest.held.take_pending();
        check_eq!(TAKEN.load(Ordering::Relaxed), 1);
        guest.held.take_pending();
        check_eq!(TAKEN.load(Ordering::Relaxed), 1);
        Outcome::Passed
    });
    irq::clear_handler(VECTOR);
    outcome
}

fn guest_cannot_mask_interrupts(_: &'static Boot) -> Outcome {
    // SAFETY: reading the debug console's port has no effect.
    let bochs = unsafe { port::read_u8(0xE9) } == 0xE9
        && Cpuid::of_this_processor().query(1, 0)[2] >> 31 == 0;
    if bochs {
        // It masks interrupts by the IF that VMRUN loads, before it knows that this is a guest;
        // with V_INTR_MASKING only the host's IF counts (APM vol. 2, 15.21.1).
        return Outcome::Skipped("Bochs 2.7 lets a guest that starts with IF = 0 mask them");
    }
    irq::set_handler(VECTOR, take);
    let outcome = with_guest(|guest| {
        guest.start(&raw const selftest_svm_spin);
        guest.vmcb.set_rflags(2);
        apic::send_ipi(cpu::current_id(), VECTOR);
        let exit = guest.enter();
        // It is not to wait for the next case.
        guest.held.take_pending();
        check_eq!(exit, Exit::Interrupt);
        check_eq!(guest.vmcb.rflags() & RFLAGS_IF, 0);
        Outcome::Passed
    });
    irq::clear_handler(VECTOR);
    outcome
}

/// HLT is not intercepted: the processor itself waits, and is the host's when an interrupt comes.
fn interrupts_end_a_guests_halt(_: &'static Boot) -> Outcome {
    const DELAY_NS: u64 = 3_000_000;
    TAKEN.store(0, Ordering::Relaxed);
    timer::start(VECTOR);
    irq::set_handler(VECTOR, take);
    let outcome = with_guest(|guest| {
        for round in 1..=3 {
            guest.held.take_pending();
            check_eq!(TAKEN.load(Ordering::Relaxed), round - 1);
            let code = &raw const selftest_svm_halt;
            guest.start(code);
            let start = time::now_ns();
            timer::arm(time::tsc_at(start + DELAY_NS));
            check_eq!(guest.enter(), Exit::Interrupt);
            check!(time::now_ns() - start >= DELAY_NS, "it did not wait");
            check_eq!(guest.vmcb.rip(), code as u64 + HLT);
            guest.held.take_pending();
            check_eq!(TAKEN.load(Ordering::Relaxed), round);
        }
        Outcome::Passed
    });
    timer::disarm();
    irq::clear_handler(VECTOR);
    outcome
}

fn waiting_loses_no_interrupt(_: &'static Boot) -> Outcome {
    TAKEN.store(0, Ordering::Relaxed);
    irq::set_handler(VECTOR, take);
    let outcome = with_guest(|guest| {
        for round in 1..=50 {
            // It comes before the wait, which must end all the same.
            apic::send_ipi(cpu::current_id(), VECTOR);
            guest.held.wait();
            check_eq!(TAKEN.load(Ordering::Relaxed), round);
        }
        Outcome::Passed
    });
    irq::clear_handler(VECTOR);
    outcome
}

fn enabled_once(_: &'static Boot) -> Outcome {
    let svme = || value(Msr::EFER) >> 12 & 1;
    check_eq!(svme(), 0);
    let outcome = with_guest(|_| {
        check_eq!(svme(), 1);
        let Ok(caps) = SvmCaps::from_cpuid(&Cpuid::of_this_processor()) else {
            return Outcome::Failed("the processor lost its SVM".into());
        };
        let frames = HostFrames {
            save_area: Hpa(0x1001),
            vmcb: Hpa(0x2000),
        };
        // SAFETY: neither call gets as far as to use the frames.
        let misaligned = unsafe { Svm::enable(&caps, frames) }.err();
        check_eq!(misaligned, Some(EnableError::BadFrame(Hpa(0x1001))));
        let frames = HostFrames {
            save_area: Hpa(0x1000),
            ..frames
        };
        // SAFETY: as above.
        let twice = unsafe { Svm::enable(&caps, frames) }.err();
        check!(
            matches!(twice, Some(EnableError::AlreadyEnabled { .. })),
            "{twice:?}"
        );
        Outcome::Passed
    });
    check_eq!(svme(), 0);
    outcome
}
