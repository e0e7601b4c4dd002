//! Symbols that the compiler's output refers to and that libc would define.

use core::arch::naked_asm;

// The string instructions are at their best on large copies on real processors (ERMS) and cost one
// instruction for each element on emulators, so all of these move quadwords while they can.

/// C's `memcpy`.
///
/// # Safety
/// As in C: `length` bytes at `source` readable, at `target` writable, and the two apart.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn memcpy(
    target: *mut u8,
    source: *const u8,
    length: usize,
) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep movsb",
        "ret",
    )
}

/// C's `memmove`.
///
/// # Safety
/// As in C: `length` bytes at `source` readable and at `target` writable.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn memmove(
    target: *mut u8,
    source: *const u8,
    length: usize,
) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        // Backwards only where a forward copy would overwrite what it has yet to read.
        "sub rax, rsi",
        "cmp rax, rdx",
        "mov rax, rdi",
        "jae {forward}",
        "std",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "mov ecx, edx",
        "and ecx, 7",
        "rep movsb",
        "sub rdi, 7",
        "sub rsi, 7",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep movsq",
        "cld",
        "ret",
        forward = sym memcpy,
    )
}

/// C's `memset`.
///
/// # Safety
/// As in C: `length` bytes at `target` writable.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn memset(target: *mut u8, byte: i32, length: usize) -> *mut u8 {
    naked_asm!(
        "mov r8, rdi",
        "movzx eax, sil",
        "movabs rcx, 0x0101010101010101",
        "imul rax, rcx",
        "mov rcx, rdx",
        "shr rcx, 3",
        "rep stosq",
        "mov ecx, edx",
        "and ecx, 7",
        "rep stosb",
        "mov rax, r8",
        "ret",
    )
}

/// C's `memcmp`.
///
/// # Safety
/// As in C: `length` bytes at `left` and at `right` readable.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    naked_asm!(
        "xor r8d, r8d",
        // Quadwords while they are equal; the first that differs is compared in byte order.
        "2:",
        "lea r9, [r8 + 8]",
        "cmp r9, rdx",
        "ja 3f",
        "mov rax, [rdi + r8]",
        "mov rcx, [rsi + r8]",
        "mov r8, r9",
        "cmp rax, rcx",
        "je 2b",
        "bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
        "3:",
        "cmp r8, rdx",
        "je 4f",
        "movzx eax, byte ptr [rdi + r8]",
        "movzx ecx, byte ptr [rsi + r8]",
        "inc r8",
        "sub eax, ecx",
        "je 3b",
        "ret",
        "4:",
        "xor eax, eax",
        "ret",
    )
}

/// The BSD `bcmp`: zero if equal.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    naked_asm!("jmp {memcmp}", memcmp = sym memcmp)
}

/// C's `strlen`.
///
/// # Safety
/// As in C: a terminated string, readable to its end.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn strlen(text: *const u8) -> usize {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "cmp byte ptr [rdi + rax], 0",
        "je 3f",
        "inc rax",
        "jmp 2b",
        "3:",
        "ret"
    )
}

/// `core` was compiled to unwind and refers to this; with `panic = "abort"` nobody calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crate::exit(crate::exit::PANICKED)
}
