//! LEA, sign extensions of the accumulator, moves between registers, and what does nothing.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Lowering;
use super::registers::number;
use crate::jit::emit::{B4, B8, RAX, RDX};
use crate::jit::gate::{PINNED, slot};
use crate::state::reg;

impl Lowering<'_> {
    pub(super) fn mov(&mut self, _at: usize, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Nop | Endbr64 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Lfence => {}
            Mfence | Sfence => self.asm.bytes(&[0x0f, 0xae, 0xf0]),
            Lea => self.lea(insn),
            Cdqe | Cwde | Cdq | Cqo => self.widen(insn.mnemonic()),
            Mov => return self.mov_whole(insn),
            _ => return false,
        }
        true
    }

    /// MOV between whole registers, one of which may be in the register file.
    fn mov_whole(&mut self, insn: &Instruction) -> bool {
        let register = |i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr64();
        if !register(0) || !register(1) {
            return false;
        }
        let (to, from) = (number(insn.op0_register()), number(insn.op1_register()));
        match (PINNED[to], PINNED[from]) {
            (Some(to), Some(from)) => self.asm.mov(B8, to, from),
            (Some(to), None) => self.asm.load(B8, to, slot(from)),
            (None, Some(from)) => self.asm.store(B8, slot(to), from),
            (None, None) => {
                self.asm.load(B8, RDX, slot(from));
                self.asm.store(B8, slot(to), RDX);
            }
        }
        true
    }

    fn lea(&mut self, insn: &Instruction) {
        let to = number(insn.op0_register());
        let host = PINNED[to].unwrap_or(RDX);
        if insn.op0_register().size() == 8 {
            self.operand_offset(host, insn);
        } else {
            self.operand_offset(RDX, insn);
            self.asm.mov(B4, host, RDX);
        }
        if PINNED[to].is_none() {
            self.asm.store(B8, slot(to), host);
        }
    }

    fn widen(&mut self, mnemonic: Mnemonic) {
        self.read_guest(RAX, reg::RAX);
        // The instruction itself works on RAX and RDX, which are ours to use.
        let (code, into): (&[u8], usize) = match mnemonic {
            Mnemonic::Cdqe => (&[0x48, 0x98], reg::RAX),
            Mnemonic::Cwde => (&[0x98], reg::RAX),
            Mnemonic::Cdq => (&[0x99], reg::RDX),
            _ => (&[0x48, 0x99], reg::RDX),
        };
        self.asm.bytes(code);
        self.write_guest(into, if into == reg::RAX { RAX } else { RDX });
    }
}
