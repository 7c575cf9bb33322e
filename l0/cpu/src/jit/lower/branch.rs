//! Jumps, calls, returns, and the ends of blocks that have none.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::memory::For;
use super::registers::number;
use super::{Aside, Lowering};
use crate::Cpu;
use crate::interp::mov::condition_of;
use crate::jit::Hot;
use crate::jit::emit::{B8, Mem, RAX, RCX, RDX};
use crate::jit::gate::{emit_follow, emit_lookup, field};
use crate::jit::trace::Follow;
use crate::state::reg::RSP;

impl Lowering<'_> {
    pub(super) fn branch(&mut self, at: usize, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Jmp if insn.op0_kind() == OpKind::NearBranch64 => self.jump(at, insn),
            Mnemonic::Call if insn.op0_kind() == OpKind::NearBranch64 => self.call(at, insn),
            Mnemonic::Jmp => self.jump_indirect(at, insn),
            Mnemonic::Call => self.call_indirect(at, insn),
            Mnemonic::Ret => self.ret(at, insn),
            _ if insn.is_jcc_short_or_near() => return self.jcc(at, insn),
            _ => return false,
        }
        true
    }

    fn jump(&mut self, at: usize, insn: &Instruction) {
        if self.follow(at) == Follow::End {
            self.clobber_flags();
            self.go_to(insn.near_branch64() as i64);
        }
    }

    fn follow(&self, at: usize) -> Follow {
        self.source.trace.steps[at].follow
    }

    /// Goes to an offset from the start of the page; the flags are saved.
    pub(super) fn go_to(&mut self, target: i64) {
        if let Some(target) = in_page(target) {
            if target == self.source.trace.start() {
                return self.asm.jump_back(0);
            }
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

    fn jcc(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(condition) = condition_of(insn) else { return false };
        let (target, next) = (insn.near_branch64() as i64, i64::from(insn.next_ip() as u32));
        self.load_flags_for(condition);
        let follow = self.follow(at);
        let (condition, side) =
            if follow == Follow::Taken { (condition ^ 1, next) } else { (condition, target) };
        let jump = self.asm.jcc(condition);
        self.asides.push(Aside::Side { jump, target: side, done: at + 1, flags: self.flags });
        if follow == Follow::End {
            self.clobber_flags();
            self.go_to(next);
        }
        true
    }

    fn call(&mut self, at: usize, insn: &Instruction) {
        self.clobber_flags();
        let looked = self.look_up_push();
        self.address(RCX, insn.next_ip() as i64);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(RSP, RDX);
        self.go_to(insn.near_branch64() as i64);
        self.looked(at, looked);
    }

    /// The target of an indirect branch into RAX.
    fn indirect_target(&mut self, at: usize, insn: &Instruction) {
        self.clobber_flags();
        if insn.op0_kind() == OpKind::Register {
            return self.read_guest(RAX, number(insn.op0_register()));
        }
        let looked = self.look_up_operand(insn, For::Reading);
        self.asm.load(B8, RAX, self.operand());
        self.looked(at, looked);
    }

    /// What is not in the jump cache may not be canonical: nothing is done before it was found there.
    fn jump_indirect(&mut self, at: usize, insn: &Instruction) {
        self.indirect_target(at, insn);
        let [rip, key] = emit_lookup(self.asm);
        emit_follow(self.asm);
        self.or_handler(at, [Some(rip), Some(key)], self.flags);
    }

    /// The target is looked up before the push, so that a call that misses has done nothing, and once more after it,
    /// which takes the registers.
    fn call_indirect(&mut self, at: usize, insn: &Instruction) {
        self.indirect_target(at, insn);
        let target = field(offset_of!(Cpu, jit) + offset_of!(Hot, target));
        self.asm.store(B8, target, RAX);
        let [rip, key] = emit_lookup(self.asm);
        let looked = self.look_up_push();
        self.address(RCX, insn.next_ip() as i64);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(RSP, RDX);
        self.asm.load(B8, RAX, target);
        self.dispatch();
        self.or_handler(at, [Some(rip), Some(key)], self.flags);
        self.looked(at, looked);
    }

    fn ret(&mut self, at: usize, insn: &Instruction) {
        self.clobber_flags();
        let looked = self.look_up_pop(RSP);
        self.asm.load(B8, RAX, self.operand());
        let [rip, key] = emit_lookup(self.asm);
        let released = if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
        let rsp = self.guest_in(RSP, RDX);
        self.asm.lea(B8, RDX, Mem::at(rsp, 8 + released));
        self.write_guest(RSP, RDX);
        emit_follow(self.asm);
        self.or_handler(at, [Some(rip), Some(key)], self.flags);
        self.looked(at, looked);
    }

    /// After the last instruction, where that is not a branch with its own end.
    pub(super) fn finish(&mut self) {
        let Some(last) = self.source.trace.insns.last() else { return };
        use Mnemonic::*;
        let branches = matches!(last.mnemonic(), Jmp | Call | Ret) || last.is_jcc_short_or_near();
        // A handler at the end has returned to the run loop.
        if !self.source.is_native(last) || branches {
            return;
        }
        self.clobber_flags();
        self.go_to(last.next_ip() as i64);
    }
}

/// An offset that is in the page.
fn in_page(offset: i64) -> Option<u16> {
    u16::try_from(offset).ok().filter(|&offset| offset < 4096)
}
