//! The world switch.

use core::arch::asm;
use core::mem::offset_of;
use core::ops::{Deref, DerefMut};

use testudo_arch::{Gprs, Hpa};

use super::HeldInterrupts;
use crate::vmcb::{CleanBits, TlbControl, Vmcb};

/// A VMCB with its physical address, which is what VMRUN takes.
#[derive(Debug)]
pub struct VmcbFrame<'a> {
    vmcb: &'a mut Vmcb,
    address: Hpa,
}

impl<'a> VmcbFrame<'a> {
    /// Joins a VMCB with its physical address.
    ///
    /// # Safety
    ///
    /// `address` is the physical address of `vmcb`.
    #[inline]
    pub unsafe fn new(vmcb: &'a mut Vmcb, address: Hpa) -> Self {
        Self { vmcb, address }
    }

    /// The physical address.
    #[inline]
    pub fn address(&self) -> Hpa {
        self.address
    }
}

impl Deref for VmcbFrame<'_> {
    type Target = Vmcb;

    #[inline]
    fn deref(&self) -> &Vmcb {
        self.vmcb
    }
}

impl DerefMut for VmcbFrame<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Vmcb {
        self.vmcb
    }
}

/// XMM0 to XMM15 and MXCSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct SseRegisters {
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// MXCSR.
    pub mxcsr: u32,
}

impl Default for SseRegisters {
    /// The state after reset (APM vol. 2, table 14-1).
    fn default() -> Self {
        Self {
            xmm: [0; 16],
            mxcsr: MXCSR_RESET,
        }
    }
}

const MXCSR_RESET: u32 = 0x1F80;

/// What the host runs with: all exceptions masked. Whatever the guest's MXCSR unmasks must not
/// raise #XF in the host.
#[cfg(target_feature = "sse2")]
pub(super) static HOST_MXCSR: u32 = MXCSR_RESET;

/// The registers of a guest that the world switch moves and the VMCB does not hold, and RAX and
/// RSP, which it does: here they are all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct GuestRegisters {
    /// The general registers. RAX and RSP are copied to and from the VMCB by
    /// [`HeldInterrupts::enter`], so this copy is the one that counts between exits.
    pub gprs: Gprs,
    /// The SSE registers.
    pub sse: SseRegisters,
}

/// The switch itself: `$load` runs before the guest's general registers are loaded, with their
/// address in RDI; `$store` after they are stored, with it in RAX.
macro_rules! world_switch {
    ($frame:expr, $pointer:expr, $host:expr, $registers:expr,
     [$($load:literal,)*], [$($store:literal,)*], [$($operand:tt)*]) => {
        asm!(
            // What the compiler does not let asm! clobber.
            "push rbx",
            "push rbp",
            "push rsi",
            "push rdi",
            $($load,)*
            "mov rcx, [rdi + 8 * 1]",
            "mov rdx, [rdi + 8 * 2]",
            "mov rbx, [rdi + 8 * 3]",
            "mov rbp, [rdi + 8 * 5]",
            "mov rsi, [rdi + 8 * 6]",
            "mov r8, [rdi + 8 * 8]",
            "mov r9, [rdi + 8 * 9]",
            "mov r10, [rdi + 8 * 10]",
            "mov r11, [rdi + 8 * 11]",
            "mov r12, [rdi + 8 * 12]",
            "mov r13, [rdi + 8 * 13]",
            "mov r14, [rdi + 8 * 14]",
            "mov r15, [rdi + 8 * 15]",
            "mov rdi, [rdi + 8 * 7]",
            "vmload rax",
            "vmrun rax",
            // RAX and RSP are the host's again. First its TR, FS and GS, then the rest.
            "vmsave rax",
            "mov rax, [rsp + 8]",
            "vmload rax",
            "pop rax",
            "mov [rax + 8 * 1], rcx",
            "mov [rax + 8 * 2], rdx",
            "mov [rax + 8 * 3], rbx",
            "mov [rax + 8 * 5], rbp",
            "mov [rax + 8 * 6], rsi",
            "mov [rax + 8 * 7], rdi",
            "mov [rax + 8 * 8], r8",
            "mov [rax + 8 * 9], r9",
            "mov [rax + 8 * 10], r10",
            "mov [rax + 8 * 11], r11",
            "mov [rax + 8 * 12], r12",
            "mov [rax + 8 * 13], r13",
            "mov [rax + 8 * 14], r14",
            "mov [rax + 8 * 15], r15",
            $($store,)*
            "pop rsi",
            "pop rbp",
            "pop rbx",
            inout("rax") $frame => _,
            inout("rcx") $pointer => _,
            inout("rsi") $host => _,
            inout("rdi") $registers => _,
            out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
            $($operand)*
        )
    };
}

impl HeldInterrupts<'_> {
    /// Runs the guest until it exits. The reason is then in the VMCB:
    /// [`Exit::read`](crate::Exit::read).
    ///
    /// Afterwards TLB_CONTROL is 0, the flush that it asked for having been made, and the clean
    /// bits are all set, or all clear if the entry failed.
    ///
    /// # Safety
    ///
    /// What the VMCB lets the guest do cannot harm the host, whatever the guest does:
    /// - It intercepts or confines everything by which a guest reaches processor state outside the
    ///   VMCB: INTR, NMI and SHUTDOWN among the events; VMRUN, VMLOAD and VMSAVE (unless
    ///   virtualized), STGI, CLGI, INVLPGA, SKINIT, XSETBV, INVD, RSM, MSRs and ports; and it has
    ///   V_INTR_MASKING. A host that has given one of these to its guest for good, and uses it no
    ///   more, need not.
    /// - The permission maps, nested page tables and AVIC tables that it points to are in place
    ///   and reach only memory that the host's own references do not cover.
    /// - Its ASID is used by no other guest on this processor, or the translations are flushed.
    /// - The [`ResidentRegisters`](super::ResidentRegisters) in this processor are this guest's.
    #[inline]
    pub unsafe fn enter(&mut self, vmcb: &mut VmcbFrame<'_>, registers: &mut GuestRegisters) {
        vmcb.set_rax(registers.gprs.rax);
        vmcb.set_rsp(registers.gprs.rsp);
        let frame = vmcb.address.0;
        let pointer: *mut Vmcb = &mut *vmcb.vmcb;
        let all: *mut GuestRegisters = registers;
        let host = self.svm.host_vmcb.0;
        // SAFETY: SVM is enabled with a save area, so VMRUN is defined, and `frame` is the address
        // of the VMCB, which this call borrows exclusively; the pointer goes in as well, so that
        // the compiler knows that the VMCB changes. VMRUN leaves through #VMEXIT only, which
        // restores RSP, RAX and the host's control state; VMLOAD of the host's frame, which `Svm`
        // keeps up to date, restores the rest before any host code runs. Interrupts stay held back
        // throughout: GIF is 0 before VMRUN and after #VMEXIT. Every other register is saved
        // here or declared clobbered, MXCSR gets the host's value again, and `all` is valid and
        // aligned for MOVAPS.
        unsafe {
            #[cfg(target_feature = "sse2")]
            world_switch!(
                frame,
                pointer,
                host,
                all,
                [
                    "movaps xmm0, [rdi + {xmm} + 16 * 0]",
                    "movaps xmm1, [rdi + {xmm} + 16 * 1]",
                    "movaps xmm2, [rdi + {xmm} + 16 * 2]",
                    "movaps xmm3, [rdi + {xmm} + 16 * 3]",
                    "movaps xmm4, [rdi + {xmm} + 16 * 4]",
                    "movaps xmm5, [rdi + {xmm} + 16 * 5]",
                    "movaps xmm6, [rdi + {xmm} + 16 * 6]",
                    "movaps xmm7, [rdi + {xmm} + 16 * 7]",
                    "movaps xmm8, [rdi + {xmm} + 16 * 8]",
                    "movaps xmm9, [rdi + {xmm} + 16 * 9]",
                    "movaps xmm10, [rdi + {xmm} + 16 * 10]",
                    "movaps xmm11, [rdi + {xmm} + 16 * 11]",
                    "movaps xmm12, [rdi + {xmm} + 16 * 12]",
                    "movaps xmm13, [rdi + {xmm} + 16 * 13]",
                    "movaps xmm14, [rdi + {xmm} + 16 * 14]",
                    "movaps xmm15, [rdi + {xmm} + 16 * 15]",
                    "ldmxcsr [rdi + {mxcsr}]",
                ],
                [
                    "movaps [rax + {xmm} + 16 * 0], xmm0",
                    "movaps [rax + {xmm} + 16 * 1], xmm1",
                    "movaps [rax + {xmm} + 16 * 2], xmm2",
                    "movaps [rax + {xmm} + 16 * 3], xmm3",
                    "movaps [rax + {xmm} + 16 * 4], xmm4",
                    "movaps [rax + {xmm} + 16 * 5], xmm5",
                    "movaps [rax + {xmm} + 16 * 6], xmm6",
                    "movaps [rax + {xmm} + 16 * 7], xmm7",
                    "movaps [rax + {xmm} + 16 * 8], xmm8",
                    "movaps [rax + {xmm} + 16 * 9], xmm9",
                    "movaps [rax + {xmm} + 16 * 10], xmm10",
                    "movaps [rax + {xmm} + 16 * 11], xmm11",
                    "movaps [rax + {xmm} + 16 * 12], xmm12",
                    "movaps [rax + {xmm} + 16 * 13], xmm13",
                    "movaps [rax + {xmm} + 16 * 14], xmm14",
                    "movaps [rax + {xmm} + 16 * 15], xmm15",
                    "stmxcsr [rax + {mxcsr}]",
                    "ldmxcsr [rip + {host_mxcsr}]",
                ],
                [xmm = const XMM, mxcsr = const MXCSR, host_mxcsr = sym HOST_MXCSR]
            );
            // Code for a target without SSE cannot touch these registers: they stay where they are.
            #[cfg(not(target_feature = "sse2"))]
            world_switch!(frame, pointer, host, all, [], [], []);
        }
        registers.gprs.rax = vmcb.rax();
        registers.gprs.rsp = vmcb.rsp();
        vmcb.set_tlb_control(TlbControl::DoNothing);
        // The sign of the exit code, of which some implementations write 32 bits only.
        if (vmcb.exit_code() as i32) < 0 {
            vmcb.mark_dirty(CleanBits::all());
        } else {
            vmcb.mark_clean();
        }
    }
}

#[cfg(target_feature = "sse2")]
const XMM: usize = offset_of!(GuestRegisters, sse) + offset_of!(SseRegisters, xmm);
#[cfg(target_feature = "sse2")]
const MXCSR: usize = offset_of!(GuestRegisters, sse) + offset_of!(SseRegisters, mxcsr);
#[cfg(target_feature = "sse2")]
const _: () = assert!(XMM.is_multiple_of(16));
const _: () = assert!(offset_of!(GuestRegisters, gprs) == 0);
