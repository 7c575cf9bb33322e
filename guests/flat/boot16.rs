//! A boot sector in real mode: prints through COM1 and leaves through the debug-exit port. It needs neither
//! firmware nor the runtime, so it also shows a machine whose CPU starts in real mode.
#![no_std]

core::arch::global_asm!(
    r#"
    .code16
    .section .text
    .globl flat_start
flat_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7c00, %sp
    movw $flat_text, %si
0:  lodsb
    testb %al, %al
    jz 3f
    movb %al, %bl
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %bl, %al
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 0b
3:  movb $0x10, %al
    outb %al, $0xf4
4:  hlt
    jmp 4b
flat_text:
    .asciz "PASS real mode\r\nDONE 1 0\r\n"
    .org flat_start + 510
    .byte 0x55, 0xaa
    .code64
    "#,
    options(att_syntax)
);
