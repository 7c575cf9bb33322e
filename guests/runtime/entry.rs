//! From a 32-bit boot protocol (PVH or Multiboot 1) to Rust in long mode.
//!
//! Both protocols enter in flat 32-bit protected mode without paging. Builds an identity map of the low 4 GiB from
//! 2 MiB pages (the last GiB, where the APICs live, uncached), switches on long mode and SSE, takes the boot stack.

core::arch::global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 4
multiboot_header:
    # Flag 16: load by the addresses here, so that a loader without 64-bit ELF still takes the image.
    .long 0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000)
    .long multiboot_header, __load_start, __load_end, __bss_end, entry32

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18          # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad entry32

    .section .boot32, "ax"
    .code32
    .globl entry32
entry32:
    cli
    cld
    movl $boot_stack_top, %esp

    movl $boot_pdpt + 7, boot_pml4
    movl $boot_pd + 7, boot_pdpt
    movl $boot_pd + 0x1007, boot_pdpt + 8
    movl $boot_pd + 0x2007, boot_pdpt + 16
    movl $boot_pd + 0x3007, boot_pdpt + 24
    movl $0, %ecx
    movl $0x83, %eax        # present, writable, 2 MiB
1:  cmpl $1536, %ecx
    jne 2f
    orl $0x18, %eax         # PWT, PCD
2:  movl %eax, boot_pd(, %ecx, 8)
    movl $0, boot_pd + 4(, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $2048, %ecx
    jb 1b

    lgdt boot_gdt_pointer
    .globl enter_long_mode
enter_long_mode:
    # Application processors come here too, with their own stack in ESP.
    movl $0x620, %eax       # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax        # LME
    wrmsr
    movl $0x80010033, %eax  # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $0x08, $entry64

    .code64
    .section .text.entry
entry64:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %esp, %esp
    fninit                  # after a reset all x87 registers are in use and all exceptions unmasked
    xorl %ebp, %ebp
    cmpl $boot_stack_top, %esp
    jne 1f
    call runtime_main
1:  movl %ebx, %edi         # the CPU's number
    shrl $14, %edi
    call smp_main
    ud2

    .section .rodata.boot
    .balign 8
    .globl boot_gdt_pointer
boot_gdt_pointer:
    .word 64 * 8 - 1
    .quad GDT

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .globl boot_pml4, boot_pdpt, boot_pd
boot_pml4:
    .skip 4096
boot_pdpt:
    .skip 4096
boot_pd:
    .skip 4 * 4096
    .balign 16
    .skip 64 * 1024
boot_stack_top:
    .text
    "#,
    options(att_syntax)
);
