//! Memory operands: the software TLB looked up inline.
//!
//! The compare is the interpreter's ([`crate::mmu`]): the tag of the entry for the first byte against the page of the
//! last one. On a miss the whole instruction is done by its handler.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::registers::number;
use super::{Aside, Lowering};
use crate::Cpu;
use crate::interp::operands::memory_segment;
use crate::jit::emit::{Alu, B4, B8, Fixup, Mem, NOT_EQUAL, RAX, RCX, RDX, Reg};
use crate::jit::gate::field;
use crate::mmu::tlb::{DATA_ENTRIES, DataEntry};
use crate::state::Seg;

/// What an access needs.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum For {
    Reading,
    Writing,
}

/// A looked-up operand: `[RDX + RAX]`, or RDX alone after [`Lowering::join_address`].
pub(super) struct Looked {
    miss: Fixup,
}

impl Lowering<'_> {
    /// Looks up the memory operand. Clobbers RAX, RCX, RDX and the host's flags, which were saved.
    pub(super) fn look_up_operand(&mut self, insn: &Instruction, access: For) -> Looked {
        self.clobber_flags();
        self.effective_address(insn);
        self.look_up(insn.memory_size().size() as i32, access)
    }

    /// The same for an operand of a vector instruction; `aligned` ones that are not miss.
    pub(super) fn look_up_vector(&mut self, insn: &Instruction, access: For, aligned: bool) -> Looked {
        self.clobber_flags();
        self.effective_address(insn);
        let size = insn.memory_size().size() as i32;
        // The low bits stay in what is compared with a page's address, and an aligned operand crosses no page.
        if aligned { self.look_up_masked(0, -4096 | (size - 1), access) } else { self.look_up(size, access) }
    }

    /// The operand's linear address into RDX. Clobbers RAX and the host's flags.
    fn effective_address(&mut self, insn: &Instruction) {
        self.operand_offset(RDX, insn);
        let segment = memory_segment(insn);
        if matches!(segment, Seg::Fs | Seg::Gs) {
            let base = field(offset_of!(Cpu, linear_base) + segment as usize * 8);
            self.asm.alu_load(B8, Alu::Add, RDX, base);
        }
    }

    /// The operand's offset in its segment into `to`, RAX to spare. Leaves the flags alone.
    pub(super) fn operand_offset(&mut self, to: Reg, insn: &Instruction) {
        if insn.is_ip_rel_memory_operand() {
            return self.address(to, insn.ip_rel_memory_address() as i64);
        }
        let disp = insn.memory_displacement64() as i32;
        let base = match insn.memory_base() {
            Register::None => None,
            register => Some(self.guest_in(number(register), RDX)),
        };
        let index = match insn.memory_index() {
            Register::None => None,
            register => {
                let scale = insn.memory_index_scale().trailing_zeros() as u8;
                Some((self.guest_in(number(register), RAX), scale))
            }
        };
        match (base, index) {
            (Some(base), None) if disp == 0 => self.asm.mov(B8, to, base),
            _ => self.asm.lea(B8, to, Mem { base, index, disp }),
        }
    }

    /// Looks up the `size` bytes at RDX.
    pub(super) fn look_up(&mut self, size: i32, access: For) -> Looked {
        self.look_up_masked(size - 1, -4096, access)
    }

    /// Looks up the page of RDX if the byte `last` after it, under `mask`, is that page's address.
    fn look_up_masked(&mut self, last: i32, mask: i32, access: For) -> Looked {
        const { assert!(size_of::<DataEntry>() == 32) };
        let asm = &mut *self.asm;
        // Index times size of an entry in one go: bits 12 and up of the address, moved down to bit 5.
        asm.mov(B4, RAX, RDX);
        asm.shr32(RAX, 12 - 5);
        asm.alu_imm(B4, Alu::And, RAX, ((DATA_ENTRIES - 1) << 5) as i32);
        asm.alu_load(B8, Alu::Add, RAX, field(offset_of!(Cpu, data_table)));
        if last == 0 {
            asm.mov(B8, RCX, RDX);
        } else {
            asm.lea(B8, RCX, Mem::at(RDX, last));
        }
        asm.alu_imm(B8, Alu::And, RCX, mask);
        let tag = match access {
            For::Reading => offset_of!(DataEntry, read),
            For::Writing => offset_of!(DataEntry, write),
        };
        asm.alu_load(B8, Alu::Cmp, RCX, Mem::at(RAX, tag as i32));
        let miss = asm.jcc(NOT_EQUAL);
        asm.load(B8, RAX, Mem::at(RAX, offset_of!(DataEntry, addend) as i32));
        Looked { miss }
    }

    /// What was looked up, as an operand.
    pub(super) fn operand(&self) -> Mem {
        Mem { base: Some(RDX), index: Some((RAX, 0)), disp: 0 }
    }

    /// Makes the operand RDX alone: RAX is free.
    pub(super) fn join_address(&mut self) {
        self.asm.alu(B8, Alu::Add, RDX, RAX);
    }

    /// The instruction's code is complete: after a miss its handler comes back here.
    pub(super) fn looked(&mut self, number: usize, looked: Looked) {
        self.or_handler(number, [Some(looked.miss), None]);
    }

    /// The same for any jumps to the handler.
    pub(super) fn or_handler(&mut self, number: usize, jumps: [Option<Fixup>; 2]) {
        let resume = self.asm.here();
        let (flags, vector) = (self.flags, self.vector);
        self.asides.push(Aside::Handler { jumps, number, resume, flags, vector });
    }

    pub(super) fn miss(looked: &Looked) -> Fixup {
        looked.miss
    }
}

/// Replaces the memory operand by what was looked up.
pub(super) fn replace_memory(insn: &mut Instruction, joined: bool) {
    insn.set_memory_base(Register::RDX);
    insn.set_memory_index(if joined { Register::None } else { Register::RAX });
    insn.set_memory_index_scale(1);
    insn.set_memory_displacement64(0);
    insn.set_memory_displ_size(0);
    insn.set_segment_prefix(Register::None);
}
