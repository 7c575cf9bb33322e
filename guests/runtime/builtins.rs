//! The memory functions that compiled code calls. A C library would bring them.
//!
//! `rep movsb` and `rep stosb`: small, and a virtual machine executes them fast.

core::arch::global_asm!(
    r#"
    .section .text.builtins
    .globl memcpy, memset, memmove, memcmp, bcmp, strlen, rust_eh_personality
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memmove:
    mov rax, rdi
    mov rcx, rdx
    sub rdi, rsi
    cmp rdi, rdx
    lea rdi, [rax]
    jb 2f
    rep movsb
    ret
2:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memcmp:
bcmp:
    xor eax, eax
    test rdx, rdx
    jz 3f
2:  movzx eax, byte ptr [rdi]
    movzx ecx, byte ptr [rsi]
    sub eax, ecx
    jnz 3f
    inc rdi
    inc rsi
    dec rdx
    jnz 2b
3:  ret
strlen:
    xor eax, eax
2:  cmp byte ptr [rdi + rax], 0
    je 3f
    inc rax
    jmp 2b
3:  ret
rust_eh_personality:
    ud2
    .text
    "#
);
