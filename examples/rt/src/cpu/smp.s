# The way of another processor from real mode to Rust. `start_all` copies this below 1 MiB and fills in
# the arguments; it runs at the copy, so addresses within it are computed from the segment.

.section .rodata.rt_ap, "a"
.balign 16
.global rt_ap_start
rt_ap_start:
.code16
    cli
    cld
    mov %cs, %ax
    mov %ax, %ds
    movzwl %ax, %ebp
    shl $4, %ebp                        # where the copy lies
    # The far pointer's target is absolute.
    lea (ap_protected - rt_ap_start)(%ebp), %eax
    mov %eax, ap_target - rt_ap_start
    lgdtl ap_gdtr - rt_ap_start
    mov $0x11, %eax                     # ET, PE
    mov %eax, %cr0
    ljmpl *(ap_target - rt_ap_start)

.code32
ap_protected:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x620, %eax                    # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov (rt_ap_arguments - rt_ap_start)(%ebp), %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx               # EFER
    rdmsr
    or $0x100, %eax                     # LME
    or (rt_ap_arguments - rt_ap_start + 24)(%ebp), %eax
    wrmsr
    mov $0x80010033, %eax               # PG, WP, NE, ET, MP, PE
    mov %eax, %cr0
    ljmp $8, $ap_long

.balign 8
.global rt_ap_arguments
rt_ap_arguments: .quad 0, 0, 0, 0       # page tables, stack, number, further EFER bits
ap_target:
    .long 0
    .short 0x18
ap_gdtr:
    .short 31
    .long rt_boot_gdt
.global rt_ap_end
rt_ap_end:

# From here on at the linked address.
.section .text.rt_ap, "ax"
.code64
ap_long:
    mov %ebp, %ebp
    mov (rt_ap_arguments - rt_ap_start + 8)(%rbp), %rsp
    mov (rt_ap_arguments - rt_ap_start + 16)(%rbp), %rdi
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    xor %ebp, %ebp
    call rt_ap_main
    ud2
