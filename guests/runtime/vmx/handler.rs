//! An IDT for L2 whose handlers report to L1: each pushes its vector and does VMCALL. L1 finds the frame on L2's stack.
//! After VMRESUME behind the VMCALL the handler returns with IRET.

use super::exit::{Exit, reason};
use super::field as f;
use super::insn::vmwrite;
use crate::mem;
use crate::tables::{CODE64, Shared};
use core::arch::global_asm;

static IDT: Shared<[[u64; 2]; 256]> = Shared::new([[0; 2]; 256]);

/// What a handler of L2 found on its stack.
#[derive(Clone, Copy, Default)]
pub struct Delivered {
    pub vector: u64,
    /// 0 where the vector has no error code.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    /// RFLAGS in the handler.
    pub handler_rflags: u64,
}

fn stub(vector: u8) -> u64 {
    unsafe extern "C" {
        static l2_stubs: u8;
    }
    &raw const l2_stubs as u64 + u64::from(vector) * 16
}

/// Where L2's IDT lies.
pub fn idt() -> u64 {
    IDT.address()
}

/// Gives the current virtual machine the reporting IDT and lets exceptions go there.
pub fn install() {
    for vector in 0..=255 {
        set_gate(vector, 0x8e);
    }
    vmwrite(f::GUEST_IDTR_BASE, IDT.address());
    vmwrite(f::GUEST_IDTR_LIMIT, 256 * 16 - 1);
    vmwrite(f::EXCEPTION_BITMAP, 0);
}

/// Gives a vector its handler, with this type and DPL (0x8e an interrupt gate, 0xee for ring 3 too; 0 is not present).
pub fn set_gate(vector: u8, access: u8) {
    let entry = stub(vector);
    let low =
        entry & 0xffff | u64::from(CODE64) << 16 | u64::from(access) << 40 | (entry >> 16 & 0xffff) << 48;
    mem::write(IDT.address() + u64::from(vector) * 16, [low, entry >> 32]);
}

/// The frame, if the exit is the VMCALL of a handler.
pub fn delivered(exit: &Exit) -> Option<Delivered> {
    if exit.reason != reason::VMCALL || !(stub(0)..stub(255) + 16).contains(&exit.rip) {
        return None;
    }
    let at = |index: u64| mem::read::<u64>(exit.rsp + index * 8);
    let vector = at(0);
    let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
    let next = if has_error { 2 } else { 1 };
    Some(Delivered {
        vector,
        error: if has_error { at(1) } else { 0 },
        rip: at(next),
        cs: at(next + 1),
        rflags: at(next + 2),
        rsp: at(next + 3),
        ss: at(next + 4),
        handler_rflags: exit.rflags,
    })
}

global_asm!(
    r#"
    .section .text.l2
    .balign 16
l2_stubs:
    .globl l2_stubs
    .set vector, 0
    .rept 256
    .balign 16
    .byte 0x68
    .long vector
    vmcall
    .if (vector > 31) || (((1 << vector) & 0x00227d00) == 0)
    jmp l2_return
    .else
    jmp l2_return_error
    .endif
    .set vector, vector + 1
    .endr
l2_return_error:
    add rsp, 8
l2_return:
    add rsp, 8
    iretq
    .text
    "#
);
