# From the firmware's or loader's 32-bit state to Rust in long mode.
#
# Both entries arrive in 32-bit protected mode with flat segments, paging off and interrupts off, and
# with the address of their boot information in EBX:
#   PVH          Xen, docs/misc/pvh.pandoc: hvm_start_info
#   Multiboot 2  section 3.3 "I386 machine state": EAX holds 0x36d76289

.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18                      # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad rt_pvh_entry

.section .multiboot2, "a"
.balign 8
multiboot2_header:
    .long 0xe85250d6, 0, multiboot2_end - multiboot2_header
    .long -(0xe85250d6 + (multiboot2_end - multiboot2_header))
    # The loader must supply the memory map; it may ignore the other requests.
    .short 1, 0
    .long 12, 6
    .balign 8
    # Modules page-aligned.
    .short 6, 0
    .long 8
    .short 0, 0
    .long 8
multiboot2_end:

.section .text.rt_entry, "ax"
.code32
.global rt_pvh_entry
rt_pvh_entry:
    cli
    mov $1, %edi
    jmp enter_long_mode

.global rt_multiboot2_entry
rt_multiboot2_entry:
    cli
    mov $2, %edi
    cmp $0x36d76289, %eax
    je enter_long_mode
    xor %edi, %edi

enter_long_mode:
    cld
    mov %ebx, %esi
    mov $rt_boot_stack_top, %esp

    mov $0x80000000, %eax
    cpuid
    cmp $0x80000001, %eax
    jb no_long_mode
    mov $0x80000001, %eax
    cpuid
    bt $29, %edx
    jnc no_long_mode

    # The first 4 GiB, identity-mapped with 2 MiB pages.
    movl $rt_boot_pdpt + 3, rt_boot_pml4
    mov $rt_boot_pds + 3, %eax
    xor %ecx, %ecx
1:  mov %eax, rt_boot_pdpt(,%ecx,8)
    add $4096, %eax
    inc %ecx
    cmp $4, %ecx
    jne 1b
    mov $0x83, %eax
    xor %ecx, %ecx
2:  mov %eax, rt_boot_pds(,%ecx,8)
    add $0x200000, %eax
    inc %ecx
    cmp $2048, %ecx
    jne 2b

    mov $rt_boot_pml4, %eax
    mov %eax, %cr3
    mov $0x620, %eax                    # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $0xc0000080, %ecx               # EFER
    rdmsr
    or $0x100, %eax                     # LME
    wrmsr
    mov $0x80010033, %eax               # PG, WP, NE, ET, MP, PE: and neither EM nor TS
    mov %eax, %cr0
    lgdt rt_boot_gdtr
    ljmp $8, $long_mode

no_long_mode:
    mov $no_long_mode_text, %esi
3:  mov $0x3fd, %dx
4:  in %dx, %al
    test $0x20, %al
    jz 4b
    mov $0x3f8, %dx
    lodsb
    test %al, %al
    jz 5f
    out %al, %dx
    jmp 3b
5:  mov $1, %al
    out %al, $0xf4
6:  hlt
    jmp 6b

.code64
long_mode:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    xor %ebp, %ebp
    mov %edi, %edi
    mov %esi, %esi
    mov $rt_boot_stack_top, %rsp
    call rt_start
    ud2

.section .rodata.rt_entry, "a"
no_long_mode_text:
    .asciz "this program needs a 64-bit processor\r\n"
.balign 8
.global rt_boot_gdt
rt_boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 64-bit code
    .quad 0x00cf93000000ffff            # data
    .quad 0x00cf9b000000ffff            # 32-bit code, for the way up of the other processors
.global rt_boot_gdtr
rt_boot_gdtr:
    .short 31
    .quad rt_boot_gdt

.section .bss.rt_entry, "aw", @nobits
.balign 4096
.global rt_boot_pml4
rt_boot_pml4: .skip 4096
.global rt_boot_pdpt
rt_boot_pdpt: .skip 4096
rt_boot_pds: .skip 4 * 4096
# The page below a stack is unmapped once Rust runs, so that an overflow faults.
.global rt_boot_stack_guard
rt_boot_stack_guard: .skip 4096
.skip 256 * 1024
.global rt_boot_stack_top
rt_boot_stack_top:

# The entry points of the 256 vectors, 16 bytes each: the vector's number, below an error code that is 0
# where the processor pushes none.
.section .text.rt_vectors, "ax"
.code64
.balign 16
.global rt_vectors
rt_vectors:
.set vector, 0
.rept 256
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push $0
    .endif
    push $vector
    jmp interrupt
    .set vector, vector + 1
.endr

interrupt:
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    # Rust code uses the SSE registers; the interrupted code's go to an aligned place below the frame.
    mov %rsp, %rbp
    sub $512, %rsp
    and $-16, %rsp
    fxsave64 (%rsp)
    call rt_interrupt
    fxrstor64 (%rsp)
    mov %rbp, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    add $16, %rsp
    iretq
