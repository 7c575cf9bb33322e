//! What an instruction is decoded to: a handler and its operands, small enough that a block of them stays in the cache.

use iced_x86::Instruction;

use crate::Cpu;
use crate::state::{SLOT_BLOCK_IP, SLOT_ZERO};
use crate::trap::Exec;

/// Executes one decoded instruction.
pub type Handler = fn(&mut Cpu, &Op) -> Exec;

/// Executes one instruction of the less frequent families, from iced's own form.
pub type ColdHandler = fn(&mut Cpu, &Cold) -> Exec;

/// A decoded instruction. Registers are byte offsets into the register file.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    pub handler: Handler,
    /// Immediate, absolute address, or index of the [`Cold`] part.
    pub imm: u64,
    pub disp: i32,
    pub dst: u8,
    pub src: u8,
    pub base: u8,
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    pub seg: u8,
    /// Offset of the instruction from the start of its block.
    pub at: u16,
    /// Offset of the next instruction.
    pub next: u16,
    /// Effective addresses are masked to this many bits (16, 32 or 64).
    pub address_bits: u8,
    pub extra: u8,
}

impl Op {
    /// An op without operands.
    pub fn new(handler: Handler) -> Self {
        Self {
            handler,
            imm: 0,
            disp: 0,
            dst: SLOT_ZERO,
            src: SLOT_ZERO,
            base: SLOT_ZERO,
            index: SLOT_ZERO,
            scale: 0,
            seg: 3,
            at: 0,
            next: 0,
            address_bits: 64,
            extra: 0,
        }
    }
}

const _: () = assert!(size_of::<Op>() == 32 && SLOT_BLOCK_IP == 136);

/// What a cold handler gets.
#[derive(Clone, Copy)]
pub struct Cold {
    /// Decoded with the start of the block as address 0: RIP-relative addresses and branch targets are relative
    /// to the block's start; see [`Cpu::effective_address`], [`Cpu::branch_target`], [`Cpu::next_ip`].
    pub insn: Instruction,
    pub handler: ColdHandler,
    /// What the family's decoder wants to find again (a thunk, a table index).
    pub data: u64,
}
