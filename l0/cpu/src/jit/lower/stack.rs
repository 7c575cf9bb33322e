//! PUSH, POP, LEAVE.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Lowering;
use super::memory::{For, Looked};
use super::registers::number;
use crate::Cpu;
use crate::jit::Hot;
use crate::jit::emit::{B8, Mem, RAX, RCX, RDX};
use crate::jit::gate::field;
use crate::state::reg::{RBP, RSP};

impl Lowering<'_> {
    pub(super) fn stack(&mut self, at: usize, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Push => self.push(at, insn),
            Mnemonic::Pop => self.pop(at, insn),
            Mnemonic::Leave => self.leave(at),
            _ => return false,
        }
        true
    }

    /// Looks up where a push goes: RDX becomes the new stack pointer.
    pub(super) fn look_up_push(&mut self) -> Looked {
        let rsp = self.guest_in(RSP, RDX);
        self.asm.lea(B8, RDX, Mem::at(rsp, -8));
        self.look_up(8, For::Writing)
    }

    /// Looks up the top of the stack: RDX is the stack pointer.
    pub(super) fn look_up_pop(&mut self, from: usize) -> Looked {
        self.read_guest(RDX, from);
        self.look_up(8, For::Reading)
    }

    /// The value waits in memory while the stack is looked up.
    fn push_memory(&mut self, at: usize, insn: &Instruction) {
        let source = self.look_up_operand(insn, For::Reading);
        self.asm.load(B8, RCX, self.operand());
        let value = field(offset_of!(Cpu, jit) + offset_of!(Hot, target));
        self.asm.store(B8, value, RCX);
        let looked = self.look_up_push();
        self.asm.load(B8, RCX, value);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(RSP, RDX);
        self.or_handler(at, [Some(source.miss), Some(looked.miss)], looked.flags);
    }

    fn push(&mut self, at: usize, insn: &Instruction) {
        if insn.op0_kind() == OpKind::Memory {
            return self.push_memory(at, insn);
        }
        let looked = self.look_up_push();
        if insn.op0_kind() == OpKind::Register {
            let from = self.guest_in(number(insn.op0_register()), RCX);
            self.asm.store(B8, self.operand(), from);
        } else {
            self.asm.store_imm(self.operand(), insn.immediate(0) as i32);
        }
        self.write_guest(RSP, RDX);
        self.looked(at, looked);
    }

    fn pop(&mut self, at: usize, insn: &Instruction) {
        let looked = self.look_up_pop(RSP);
        self.asm.load(B8, RAX, self.operand());
        self.asm.lea(B8, RDX, Mem::at(RDX, 8));
        self.write_guest(RSP, RDX);
        self.write_guest(number(insn.op0_register()), RAX);
        self.looked(at, looked);
    }

    fn leave(&mut self, at: usize) {
        let looked = self.look_up_pop(RBP);
        self.asm.load(B8, RAX, self.operand());
        self.asm.lea(B8, RDX, Mem::at(RDX, 8));
        self.write_guest(RSP, RDX);
        self.write_guest(RBP, RAX);
        self.looked(at, looked);
    }
}
