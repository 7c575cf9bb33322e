//! Trips out of long mode: memory operations under 32-bit or no paging, and changing the paging mode.
//!
//! Long mode fixes the paging mode while it is active, so both routines go through compatibility mode, switch
//! paging off, and come back. The image is identity-mapped by every table used, as the switch itself needs.

use crate::mem;
use crate::tables::{CODE32, Shared};
use core::arch::global_asm;

/// One memory operation of a trip, and what came of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Op {
    kind: u32,
    address: u32,
    /// The value to write, or the value read.
    pub value: u32,
    /// 0, or the vector of the fault.
    pub vector: u32,
    pub error: u32,
    pub cr2: u32,
}

impl Op {
    const fn new(kind: u32, address: u32, value: u32) -> Op {
        Op { kind, address, value, vector: 0, error: 0, cr2: 0 }
    }

    pub const fn read(address: u64) -> Op {
        Op::new(0, address as u32, 0)
    }

    pub const fn write(address: u64, value: u32) -> Op {
        Op::new(1, address as u32, value)
    }

    pub const fn invlpg(address: u64) -> Op {
        Op::new(2, address as u32, 0)
    }

    /// Calls code at the address.
    pub const fn call(address: u64) -> Op {
        Op::new(3, address as u32, 0)
    }

    pub const fn set_cr0(value: u32) -> Op {
        Op::new(4, 0, value)
    }

    pub const fn set_cr3(value: u64) -> Op {
        Op::new(5, 0, value as u32)
    }

    pub const fn set_cr4(value: u32) -> Op {
        Op::new(6, 0, value)
    }
}

/// The control registers of a trip.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Controls {
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
}

/// CR0 of a trip with and without paging.
pub const CR0_PAGING: u32 = 0x8001_0033;
pub const CR0_NO_PAGING: u32 = 0x0001_0033;

static IDT32: Shared<[u64; 32]> = Shared::new([0; 32]);

/// Performs the operations in 32-bit protected mode.
pub fn run(controls: &Controls, ops: &mut [Op]) {
    unsafe extern "C" {
        fn legacy_run(controls: *const Controls, ops: *mut Op, end: *const Op, idt: u64);
        static legacy_no_error: u8;
        static legacy_error: u8;
    }
    for vector in 0..32u64 {
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let entry =
            if has_error { &raw const legacy_error as u64 } else { &raw const legacy_no_error as u64 };
        let gate = entry & 0xffff | u64::from(CODE32) << 16 | 0x8e << 40 | (entry >> 16) << 48;
        mem::write(IDT32.address() + vector * 8, gate);
    }
    // The handlers tell #PF from other faults by CR2.
    crate::cpu::set_cr2(0xffff_ffff);
    let range = ops.as_mut_ptr_range();
    // SAFETY: the routine returns in the mode it was called in, with its registers saved; the operations name
    // memory that is the caller's.
    unsafe { legacy_run(controls, range.start, range.end, IDT32.address()) }
}

/// Changes CR3 and CR4 with paging off in between, as a change between 4 and 5 levels needs.
pub fn change_paging(root: u64, cr4: u64) {
    unsafe extern "C" {
        fn legacy_change_paging(root: u64, cr4: u64);
    }
    // SAFETY: the caller's tables map the image where it is.
    unsafe { legacy_change_paging(root, cr4) }
}

global_asm!(
    r#"
    .section .text.legacy
    .globl legacy_run, legacy_change_paging
    # In: EDI controls, ESI first operation, EDX end, ECX IDT.
legacy_run:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    sidt legacy_saved_idt
    movq %cr0, %rax
    movl %eax, legacy_saved_cr0
    movq %cr3, %rax
    movl %eax, legacy_saved_cr3
    movq %cr4, %rax
    movl %eax, legacy_saved_cr4
    movl %ecx, legacy_idt + 2
    movl %edx, legacy_end
    ljmpl *legacy_to_32
    .code32
legacy_32:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %esp, %ebp
    movl legacy_saved_cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl $0xC0000080, %ecx
    rdmsr
    andl $0xfffffeff, %eax
    wrmsr
    lidt legacy_idt
    movl 8(%edi), %eax
    movl %eax, %cr4
    movl 4(%edi), %eax
    movl %eax, %cr3
    movl (%edi), %eax
    movl %eax, %cr0
    movl %esi, %ebx
legacy_next:
    movl %ebp, %esp
    cmpl legacy_end, %ebx
    jae legacy_leave
    movl (%ebx), %eax
    movl 4(%ebx), %ecx
    movl 8(%ebx), %edx
    cmpl $0, %eax
    je 10f
    cmpl $1, %eax
    je 11f
    cmpl $2, %eax
    je 12f
    cmpl $3, %eax
    je 13f
    cmpl $4, %eax
    je 14f
    cmpl $5, %eax
    je 15f
    movl %edx, %cr4
    jmp 9f
10: movl (%ecx), %edx
    movl %edx, 8(%ebx)
    jmp 9f
11: movl %edx, (%ecx)
    jmp 9f
12: invlpg (%ecx)
    jmp 9f
13: call *%ecx
    jmp 9f
14: movl %edx, %cr0
    jmp 9f
15: movl %edx, %cr3
9:  addl $24, %ebx
    jmp legacy_next

    .globl legacy_no_error, legacy_error
legacy_no_error:
    pushl $0
legacy_error:
    popl 16(%ebx)
    # 14 when the processor wrote CR2, which starts each operation as all ones; else 13.
    movl %cr2, %eax
    movl %eax, 20(%ebx)
    movl $13, 12(%ebx)
    cmpl $0xffffffff, %eax
    je 1f
    movl $14, 12(%ebx)
    movl $0xffffffff, %eax
    movl %eax, %cr2
1:  addl $24, %ebx
    movl $legacy_next, (%esp)
    iretl

legacy_leave:
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl legacy_saved_cr4, %eax
    movl %eax, %cr4
    movl legacy_saved_cr3, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl legacy_saved_cr0, %eax
    movl %eax, %cr0
    ljmpl $0x08, $legacy_64
    .code64
legacy_64:
    movl %ebp, %esp
    lidt legacy_saved_idt
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

legacy_change_paging:
    pushq %rbx
    movq %cr0, %rax
    movl %eax, legacy_saved_cr0
    ljmpl *legacy_to_change
    .code32
legacy_change:
    movl %cr0, %eax
    andl $0x7fffffff, %eax
    movl %eax, %cr0
    movl %esi, %cr4
    movl %edi, %cr3
    movl legacy_saved_cr0, %eax
    movl %eax, %cr0
    ljmpl $0x08, $legacy_changed
    .code64
legacy_changed:
    movl %esp, %esp
    popq %rbx
    ret

    .section .data.legacy, "aw"
    .balign 8
legacy_to_32:
    .long legacy_32
    .word 0x18
    .balign 8
legacy_to_change:
    .long legacy_change
    .word 0x18
    .balign 8
legacy_idt:
    .word 32 * 8 - 1
    .long 0
    .balign 8
legacy_saved_idt:
    .skip 16
legacy_saved_cr0:
    .long 0
legacy_saved_cr3:
    .long 0
legacy_saved_cr4:
    .long 0
legacy_end:
    .long 0
    .text
    "#,
    options(att_syntax)
);
