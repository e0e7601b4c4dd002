//! The world switch.

use core::arch::naked_asm;
use core::mem::offset_of;

use testudo_arch::Gprs;

use crate::fields;

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
    /// The state after reset (SDM vol. 3A, table 10-1).
    fn default() -> Self {
        Self {
            xmm: [0; 16],
            mxcsr: MXCSR_RESET,
        }
    }
}

const MXCSR_RESET: u32 = 0x1F80;

/// What the host runs with: all exceptions masked. What the guest's MXCSR unmasks must not raise
/// #XM in the host.
pub(super) static HOST_MXCSR: u32 = MXCSR_RESET;

/// The registers of a guest that the world switch moves, because no VMCS holds them.
///
/// RSP is not moved: it is in the VMCS ([`GUEST_RSP`](fields::GUEST_RSP)), and `gprs.rsp` is the
/// program's own copy, to be read and written there when somebody asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct GuestRegisters {
    /// The general registers but RSP.
    pub gprs: Gprs,
    /// The SSE registers.
    pub sse: SseRegisters,
    /// CR2.
    pub cr2: u64,
}

const XMM: usize = offset_of!(GuestRegisters, sse) + offset_of!(SseRegisters, xmm);
const MXCSR: usize = offset_of!(GuestRegisters, sse) + offset_of!(SseRegisters, mxcsr);
const CR2: usize = offset_of!(GuestRegisters, cr2);
const _: () = assert!(offset_of!(GuestRegisters, gprs) == 0 && XMM.is_multiple_of(16));

/// The parts of the switch that move SSE registers. Host code for a target without SSE touches
/// none, and may not even have enabled them; the guest's then stay in the processor.
#[cfg(target_feature = "sse2")]
mod sse {
    macro_rules! load_sse {
        () => {
            concat!(
                "ldmxcsr [rdi + {mxcsr}]\n",
                "movaps xmm0, [rdi + {xmm} + 0x00]\n",
                "movaps xmm1, [rdi + {xmm} + 0x10]\n",
                "movaps xmm2, [rdi + {xmm} + 0x20]\n",
                "movaps xmm3, [rdi + {xmm} + 0x30]\n",
                "movaps xmm4, [rdi + {xmm} + 0x40]\n",
                "movaps xmm5, [rdi + {xmm} + 0x50]\n",
                "movaps xmm6, [rdi + {xmm} + 0x60]\n",
                "movaps xmm7, [rdi + {xmm} + 0x70]\n",
                "movaps xmm8, [rdi + {xmm} + 0x80]\n",
                "movaps xmm9, [rdi + {xmm} + 0x90]\n",
                "movaps xmm10, [rdi + {xmm} + 0xa0]\n",
                "movaps xmm11, [rdi + {xmm} + 0xb0]\n",
                "movaps xmm12, [rdi + {xmm} + 0xc0]\n",
                "movaps xmm13, [rdi + {xmm} + 0xd0]\n",
                "movaps xmm14, [rdi + {xmm} + 0xe0]\n",
                "movaps xmm15, [rdi + {xmm} + 0xf0]\n",
            )
        };
    }

    macro_rules! store_sse {
        () => {
            concat!(
                "stmxcsr [rdi + {mxcsr}]\n",
                "movaps [rdi + {xmm} + 0x00], xmm0\n",
                "movaps [rdi + {xmm} + 0x10], xmm1\n",
                "movaps [rdi + {xmm} + 0x20], xmm2\n",
                "movaps [rdi + {xmm} + 0x30], xmm3\n",
                "movaps [rdi + {xmm} + 0x40], xmm4\n",
                "movaps [rdi + {xmm} + 0x50], xmm5\n",
                "movaps [rdi + {xmm} + 0x60], xmm6\n",
                "movaps [rdi + {xmm} + 0x70], xmm7\n",
                "movaps [rdi + {xmm} + 0x80], xmm8\n",
                "movaps [rdi + {xmm} + 0x90], xmm9\n",
                "movaps [rdi + {xmm} + 0xa0], xmm10\n",
                "movaps [rdi + {xmm} + 0xb0], xmm11\n",
                "movaps [rdi + {xmm} + 0xc0], xmm12\n",
                "movaps [rdi + {xmm} + 0xd0], xmm13\n",
                "movaps [rdi + {xmm} + 0xe0], xmm14\n",
                "movaps [rdi + {xmm} + 0xf0], xmm15\n",
            )
        };
    }

    macro_rules! load_host_sse {
        () => {
            "ldmxcsr [rip + {host_mxcsr}]"
        };
    }

    pub(super) use {load_host_sse, load_sse, store_sse};
}

#[cfg(not(target_feature = "sse2"))]
mod sse {
    macro_rules! load_sse {
        () => {
            "/* {mxcsr} {xmm} */"
        };
    }

    macro_rules! load_host_sse {
        () => {
            "/* {host_mxcsr} */"
        };
    }

    pub(super) use {load_host_sse, load_sse, load_sse as store_sse};
}

use sse::{load_host_sse, load_sse, store_sse};

/// Undoes the pushes of [`resume_guest`], and returns to its caller.
macro_rules! restore_host {
    () => {
        "pop rdi
         pop r15
         pop r14
         pop r13
         pop r12
         pop rbx
         pop rbp
         ret"
    };
}

/// How [`resume_guest`] ended.
pub(super) const EXITED: u64 = 0;
pub(super) const FAILED_INVALID: u64 = 1;
pub(super) const FAILED_VALID: u64 = 2;

/// The entry was called off.
pub(super) const CALLED_OFF: u64 = 3;

/// The test that calls an entry off, at which its window begins.
macro_rules! test_unless {
    ($name:literal) => {
        concat!(
            ".globl testudo_vmx_",
            $name,
            "_window\n",
            ".hidden testudo_vmx_",
            $name,
            "_window\n",
            "testudo_vmx_",
            $name,
            "_window:\n",
            "cmp dword ptr [rdx], 0\n",
            "jne 7f",
        )
    };
}

/// What follows the entry of such a window.
macro_rules! end_of_window {
    ($name:literal) => {
        concat!(
            ".globl testudo_vmx_",
            $name,
            "_window_end\n",
            ".hidden testudo_vmx_",
            $name,
            "_window_end\n",
            "testudo_vmx_",
            $name,
            "_window_end:",
        )
    };
}

/// Where an entry goes on that is called off: all that counts of the host's is still on the stack.
macro_rules! call_off {
    ($name:literal) => {
        concat!(
            ".globl testudo_vmx_",
            $name,
            "_called_off\n",
            ".hidden testudo_vmx_",
            $name,
            "_called_off\n",
            "testudo_vmx_",
            $name,
            "_called_off:\n",
            "7:\n",
            "mov eax, {called_off}\n",
            "jmp {leave}",
        )
    };
}

macro_rules! no_test {
    () => {
        ""
    };
}

macro_rules! enter_function {
    (
        $(#[$doc:meta])* $name:ident($($unless:ident)?), $instruction:literal,
        $test:expr, $end:expr, $off:expr
        $(, $operand:ident = $value:expr)*
    ) => {
        $(#[$doc])*
        #[unsafe(naked)]
        pub(super) unsafe extern "sysv64" fn $name(
            registers: *mut GuestRegisters,
            host_rsp: *mut u64,
            $($unless: *const u32,)?
        ) -> u64 {
            naked_asm!(
                "push rbp",
                "push rbx",
                "push r12",
                "push r13",
                "push r14",
                "push r15",
                "push rdi",
                "cmp rsp, [rsi]",
                "jne 4f",
                "2:",
                "mov rax, [rdi + {cr2}]",
                "mov rcx, cr2",
                "cmp rax, rcx",
                "jne 5f",
                "3:",
                $test,
                load_sse!(),
                "mov rax, [rdi]",
                "mov rcx, [rdi + 0x08]",
                "mov rdx, [rdi + 0x10]",
                "mov rbx, [rdi + 0x18]",
                "mov rbp, [rdi + 0x28]",
                "mov rsi, [rdi + 0x30]",
                "mov r8, [rdi + 0x40]",
                "mov r9, [rdi + 0x48]",
                "mov r10, [rdi + 0x50]",
                "mov r11, [rdi + 0x58]",
                "mov r12, [rdi + 0x60]",
                "mov r13, [rdi + 0x68]",
                "mov r14, [rdi + 0x70]",
                "mov r15, [rdi + 0x78]",
                "mov rdi, [rdi + 0x38]",
                $instruction,
                // Only a failure comes here: CF or ZF is set, and RSP is still this function's.
                $end,
                "6:",
                "mov eax, {invalid}",
                "mov ecx, {valid}",
                "cmovz eax, ecx",
                "jmp {leave}",
                "4:",
                "mov eax, {host_rsp}",
                "vmwrite rax, rsp",
                "jbe 6b",
                "mov [rsi], rsp",
                "jmp 2b",
                "5:",
                "mov cr2, rax",
                "jmp 3b",
                $off,
                cr2 = const CR2,
                mxcsr = const MXCSR,
                xmm = const XMM,
                host_rsp = const fields::HOST_RSP.encoding().0,
                invalid = const FAILED_INVALID,
                valid = const FAILED_VALID,
                leave = sym leave_guest,
                $($operand = const $value,)*
            );
        }
    };
}

enter_function! {
    /// Loads the guest's registers and executes VMRESUME. Returns [`EXITED`] after a VM exit with the
    /// guest's registers stored, or the kind of failure.
    ///
    /// `host_rsp` is the value that the current VMCS has for HOST_RSP. It is written, here and there,
    /// only when this call's stack is elsewhere, so a loop that enters from one place writes it once.
    ///
    /// A VM exit restores RSP, RIP, segments, and control registers from the host-state area, and
    /// makes RFLAGS 2: interrupts stay off, DF is 0. The rest of the host's registers that the ABI
    /// wants kept are on the stack. Registers that the ABI lets a function change are zeroed, so that
    /// no value of the guest's is left where speculation could use it.
    ///
    /// # Safety
    ///
    /// VMX root operation with IF = 0; the current VMCS has [`exit_address`] as HOST_RIP, and
    /// `host_rsp` tells what its HOST_RSP is; `registers` is valid; and the VMCS lets the guest do no
    /// harm.
    resume_guest(), "vmresume", no_test!(), no_test!(), no_test!()
}

enter_function! {
    /// As [`resume_guest`], with VMLAUNCH.
    ///
    /// # Safety
    ///
    /// As for [`resume_guest`].
    launch_guest(), "vmlaunch", no_test!(), no_test!(), no_test!()
}

enter_function! {
    /// As [`resume_guest`], unless `*unless` is not 0: then, and if an NMI's handler so wants
    /// ([`called_off`]), it returns [`CALLED_OFF`].
    ///
    /// # Safety
    ///
    /// As for [`resume_guest`]; `unless` is valid.
    resume_guest_unless(unless), "vmresume",
    test_unless!("resume"), end_of_window!("resume"), call_off!("resume"),
    called_off = CALLED_OFF
}

enter_function! {
    /// As [`resume_guest_unless`], with VMLAUNCH.
    ///
    /// # Safety
    ///
    /// As for [`resume_guest_unless`].
    launch_guest_unless(unless), "vmlaunch",
    test_unless!("launch"), end_of_window!("launch"), call_off!("launch"),
    called_off = CALLED_OFF
}

unsafe extern "C" {
    static testudo_vmx_resume_window: u8;
    static testudo_vmx_resume_window_end: u8;
    static testudo_vmx_resume_called_off: u8;
    static testudo_vmx_launch_window: u8;
    static testudo_vmx_launch_window_end: u8;
    static testudo_vmx_launch_called_off: u8;
}

/// Where code goes on that was interrupted at `rip`, between the test and the entry of
/// [`resume_guest_unless`] or [`launch_guest_unless`], so that it does not enter; `None` elsewhere.
pub(super) fn called_off(rip: u64) -> Option<u64> {
    let windows = [
        (
            &raw const testudo_vmx_resume_window,
            &raw const testudo_vmx_resume_window_end,
            &raw const testudo_vmx_resume_called_off,
        ),
        (
            &raw const testudo_vmx_launch_window,
            &raw const testudo_vmx_launch_window_end,
            &raw const testudo_vmx_launch_called_off,
        ),
    ];
    let window = windows
        .into_iter()
        .find(|(start, end, _)| (*start as u64..*end as u64).contains(&rip));
    window.map(|(.., target)| target as u64)
}

/// Where VM exits arrive: stores the guest's registers, and returns to the caller of [`resume_guest`] or [`launch_guest`].
///
/// # Safety
///
/// To be reached by a VM exit only, with RSP where [`resume_guest`] put HOST_RSP.
#[unsafe(naked)]
unsafe extern "sysv64" fn exit_guest() {
    naked_asm!(
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax",
        "mov [rdi + 0x08], rcx",
        "mov [rdi + 0x10], rdx",
        "mov [rdi + 0x18], rbx",
        "mov [rdi + 0x28], rbp",
        "mov [rdi + 0x30], rsi",
        "pop qword ptr [rdi + 0x38]",
        "mov [rdi + 0x40], r8",
        "mov [rdi + 0x48], r9",
        "mov [rdi + 0x50], r10",
        "mov [rdi + 0x58], r11",
        "mov [rdi + 0x60], r12",
        "mov [rdi + 0x68], r13",
        "mov [rdi + 0x70], r14",
        "mov [rdi + 0x78], r15",
        "mov rax, cr2",
        "mov [rdi + {cr2}], rax",
        store_sse!(),
        "xor ecx, ecx",
        "xor edx, edx",
        "xor esi, esi",
        "xor r8d, r8d",
        "xor r9d, r9d",
        "xor r10d, r10d",
        "xor r11d, r11d",
        "xor eax, eax",
        load_host_sse!(),
        restore_host!(),
        cr2 = const CR2,
        mxcsr = const MXCSR,
        xmm = const XMM,
        host_mxcsr = sym HOST_MXCSR,
    );
}

/// How a failed entry leaves: the host's registers are still on the stack.
///
/// # Safety
///
/// To be reached from [`resume_guest`] only.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_guest() {
    naked_asm!(
        load_host_sse!(),
        restore_host!(),
        host_mxcsr = sym HOST_MXCSR,
    );
}

const _: () = assert!(EXITED == 0, "exit_guest zeroes RAX");

/// What HOST_RIP must hold.
pub(super) fn exit_address() -> u64 {
    exit_guest as *const () as u64
}
