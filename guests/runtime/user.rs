//! Ring 3: a window of pages that user code may use, and trips there and back.
//!
//! The window lies below 4 GiB, so that compatibility-mode code can live in it.

use crate::mem::{self, PAGE};
use crate::paging::{self, P, U, W};
use crate::trap::{self, Fault};
use core::arch::global_asm;

/// User code goes here.
pub const CODE: u64 = 0x8000_0000;
const CODE_PAGES: u64 = 4;
/// User data goes here.
pub const SCRATCH: u64 = 0x8001_0000;
const DATA_PAGES: u64 = 4;
/// Top of the user stack.
pub const STACK_TOP: u64 = 0x8003_0000;

/// Registers for a trip to ring 3. `iret_entry` knows the layout.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
}

/// 64-bit user code at [`CODE`] with interrupts off.
pub const ENTRY64: Entry = Entry {
    rip: CODE,
    cs: crate::tables::USER_CODE64 as u64,
    rflags: 2,
    rsp: STACK_TOP - 64,
    ss: crate::tables::USER_DATA as u64,
    rax: 0,
    rbx: 0,
    rcx: 0,
    rdx: 0,
    rsi: 0,
    rdi: 0,
};

/// 32-bit user code at [`CODE`].
pub const ENTRY32: Entry = Entry { cs: crate::tables::USER_CODE32 as u64, ..ENTRY64 };

/// Maps the window. Call once.
pub fn map_window() {
    let code = mem::frames(CODE_PAGES);
    paging::map_pages(CODE, code, CODE_PAGES, P | W | U);
    paging::map_pages(SCRATCH, mem::frames(DATA_PAGES), DATA_PAGES, P | W | U);
    paging::map_pages(STACK_TOP - 2 * PAGE, mem::frames(2), 2, P | W | U);
}

/// Copies code into the window.
pub fn load(code: &[u8]) {
    mem::copy(CODE, code);
}

/// Runs ring-3 (or other) code until a vector without a handler ends it. `at` of the fault counts from the entry.
pub fn run(entry: &Entry) -> Fault {
    unsafe extern "C" {
        fn iret_entry(entry: *const Entry);
    }
    // SAFETY: the fault resumes in `iret_entry` with the stack as it was.
    unsafe { iret_entry(entry) };
    match trap::take_fault() {
        Some(fault) => fault,
        None => crate::report::abort(format_args!("user code came back without a fault")),
    }
}

/// Copies code into the window and runs it as 64-bit ring-3 code.
pub fn run64(code: &[u8]) -> Fault {
    load(code);
    run(&ENTRY64)
}

/// Copies code into the window and runs it as 32-bit ring-3 code.
pub fn run32(code: &[u8]) -> Fault {
    load(code);
    run(&ENTRY32)
}

global_asm!(
    r#"
    .section .text.user
    .globl iret_entry
iret_entry:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rax, [rdi]
    mov [rip + {probe} + 8], rax
    mov [rip + {probe} + 16], rsp
    lea rax, [rip + 2f]
    mov [rip + {probe}], rax
    mov eax, {data}     # IRET to ring 3 makes a DS of ring 0 null
    mov ds, eax
    mov es, eax
    push qword ptr [rdi + 32]
    push qword ptr [rdi + 24]
    push qword ptr [rdi + 16]
    push qword ptr [rdi + 8]
    push qword ptr [rdi]
    mov rax, [rdi + 40]
    mov rbx, [rdi + 48]
    mov rcx, [rdi + 56]
    mov rdx, [rdi + 64]
    mov rsi, [rdi + 72]
    mov rdi, [rdi + 80]
    iretq
2:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .text
    "#,
    probe = sym trap::PROBE,
    data = const crate::tables::USER_DATA,
);
