//! Jumps, calls, returns, and the ends of blocks that have none.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::memory::For;
use super::registers::number;
use super::{Aside, Flags, Lowering};
use crate::Cpu;
use crate::interp::mov::condition_of;
use crate::jit::Hot;
use crate::jit::emit::{Alu, B8, Mem, RAX, RCX, RDX};
use crate::jit::gate::{emit_follow, emit_lookup, field};
use crate::state::reg::RSP;

impl Lowering<'_> {
    pub(super) fn branch(&mut self, at: usize, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Jmp if insn.op0_kind() == OpKind::NearBranch64 => self.jump(insn),
            Mnemonic::Call if insn.op0_kind() == OpKind::NearBranch64 => self.call(at, insn),
            Mnemonic::Jmp => self.jump_indirect(at, insn),
            Mnemonic::Call => self.call_indirect(at, insn),
            Mnemonic::Ret => self.ret(at, insn),
            _ if insn.is_jcc_short_or_near() => return self.jcc(insn),
            _ => return false,
        }
        true
    }

    /// The block has run whole.
    fn count_block(&mut self) {
        let left = field(offset_of!(Cpu, jit) + offset_of!(Hot, left));
        self.asm.alu_mem_imm(B8, Alu::Sub, left, i32::from(self.source.block.count));
    }

    fn jump(&mut self, insn: &Instruction) {
        self.clobber_flags();
        self.count_block();
        self.go_to(insn.near_branch64() as i64);
    }

    /// Goes to an offset from the start of the page; the flags are saved.
    pub(super) fn go_to(&mut self, target: i64) {
        if let Some(target) = in_page(target) {
            self.asm.align_displacement(1);
            let jump = self.asm.jmp();
            self.asides.push(Aside::Link { jump, target });
        } else {
            self.address(RAX, target);
            self.dispatch();
        }
    }

    /// Goes to the address in RAX; nothing of the instruction is left to do.
    fn dispatch(&mut self) {
        let jumps = emit_lookup(self.asm);
        emit_follow(self.asm);
        self.asides.push(Aside::LookAtRax { jumps });
    }

    fn jcc(&mut self, insn: &Instruction) -> bool {
        let Some(condition) = condition_of(insn) else { return false };
        self.load_flags();
        self.save_flags();
        // Counting must leave the flags alone.
        let left = field(offset_of!(Cpu, jit) + offset_of!(Hot, left));
        self.asm.load(B8, RCX, left);
        self.asm.lea(B8, RCX, Mem::at(RCX, -i32::from(self.source.block.count)));
        self.asm.store(B8, left, RCX);
        let target = insn.near_branch64() as i64;
        if let Some(target) = in_page(target) {
            self.asm.align_displacement(2);
            let jump = self.asm.jcc(condition);
            self.asides.push(Aside::Link { jump, target });
        } else {
            let jump = self.asm.jcc(condition);
            self.asides.push(Aside::Far { jump, target });
        }
        self.flags = Flags::Saved;
        self.go_to(i64::from(insn.next_ip() as u32));
        true
    }

    fn call(&mut self, at: usize, insn: &Instruction) {
        let looked = self.look_up_push();
        self.address(RCX, insn.next_ip() as i64);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(RSP, RDX);
        self.count_block();
        self.go_to(insn.near_branch64() as i64);
        self.looked(at, looked);
    }

    /// The target of an indirect branch into RAX, and the jump to its handler if that was not possible.
    fn indirect_target(&mut self, insn: &Instruction) -> Option<super::Fixup> {
        if insn.op0_kind() == OpKind::Register {
            self.clobber_flags();
            self.read_guest(RAX, number(insn.op0_register()));
            return None;
        }
        let looked = self.look_up_operand(insn, For::Reading);
        self.asm.load(B8, RAX, self.operand());
        Some(Self::miss(&looked))
    }

    /// What is not in the jump cache may not be canonical: nothing is done before it was found there.
    fn jump_indirect(&mut self, at: usize, insn: &Instruction) {
        let miss = self.indirect_target(insn);
        let [rip, key] = emit_lookup(self.asm);
        self.count_block();
        emit_follow(self.asm);
        self.or_handler(at, [Some(rip), Some(key)]);
        self.or_handler(at, [miss, None]);
    }

    /// The target is looked up before the push, so that a call that misses has done nothing, and once more after it,
    /// which takes the registers.
    fn call_indirect(&mut self, at: usize, insn: &Instruction) {
        let miss = self.indirect_target(insn);
        let target = field(offset_of!(Cpu, jit) + offset_of!(Hot, target));
        self.asm.store(B8, target, RAX);
        let [rip, key] = emit_lookup(self.asm);
        let looked = self.look_up_push();
        self.address(RCX, insn.next_ip() as i64);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(RSP, RDX);
        self.count_block();
        self.asm.load(B8, RAX, target);
        self.dispatch();
        self.or_handler(at, [Some(rip), Some(key)]);
        self.or_handler(at, [miss, Some(Self::miss(&looked))]);
    }

    fn ret(&mut self, at: usize, insn: &Instruction) {
        let looked = self.look_up_pop(RSP);
        self.asm.load(B8, RAX, self.operand());
        let [rip, key] = emit_lookup(self.asm);
        let released = if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
        let rsp = self.guest_in(RSP, RDX);
        self.asm.lea(B8, RDX, Mem::at(rsp, 8 + released));
        self.write_guest(RSP, RDX);
        self.count_block();
        emit_follow(self.asm);
        self.or_handler(at, [Some(rip), Some(key)]);
        self.looked(at, looked);
    }

    /// After the last instruction, where that is not a branch with its own end.
    pub(super) fn finish(&mut self, insns: &[Instruction]) {
        let Some(last) = insns.last() else { return };
        use Mnemonic::*;
        let branches = matches!(last.mnemonic(), Jmp | Call | Ret) || last.is_jcc_short_or_near();
        // A handler at the end has returned to the run loop.
        if !self.is_native(last) || branches {
            return;
        }
        self.clobber_flags();
        self.count_block();
        self.go_to(last.next_ip() as i64);
    }
}

/// An offset that is in the page.
fn in_page(offset: i64) -> Option<u16> {
    u16::try_from(offset).ok().filter(|&offset| offset < 4096)
}
