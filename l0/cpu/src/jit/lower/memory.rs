//! Memory operands: the software TLB looked up inline.
//!
//! The test is the interpreter's ([`crate::mmu`]): the last byte's distance from the page of the first one's entry. On a
//! miss the whole instruction is done by its handler.
//!
//! Status flags that are in the host's flags only stay there: the lookup then uses instructions that leave them alone,
//! and it is the way to the handler that saves them. So flags that nobody asks for are never saved.

use std::mem::offset_of;

use iced_x86::{Instruction, OpKind, Register};

use super::registers::number;
use super::{Aside, Flags, Lowering};
use crate::Cpu;
use crate::interp::operands::{address_bits, memory_segment};
use crate::jit::emit::{Alu, B4, B8, Fixup, Mem, NOT_EQUAL, RAX, RCX, RDX, Reg};
use crate::jit::gate::field;
use crate::jit::{Hot, MASKS};
use crate::mmu::tlb::{DATA_ENTRIES, DataTable};
use crate::state::Seg;

/// What an access needs.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum For {
    Reading,
    Writing,
}

/// A looked-up operand: `[RDX + RAX]`, or RDX alone after [`Lowering::join_address`].
pub(super) struct Looked {
    pub miss: Fixup,
    /// Where the flags are at the miss.
    pub flags: Flags,
    second: Second,
}

/// What it takes to look in an operand's second place, and to go on from there.
#[derive(Clone, Copy)]
pub(super) struct Second {
    /// Where the code behind the lookup is.
    found: usize,
    last: i32,
    alignment: i32,
    access: For,
}

impl Lowering<'_> {
    /// Looks up the memory operand. Clobbers RAX, RCX, RDX.
    pub(super) fn look_up_operand(&mut self, insn: &Instruction, access: For) -> Looked {
        self.effective_address(insn);
        self.look_up(insn.memory_size().size() as i32, access)
    }

    /// The same for an operand of a vector instruction; `aligned` ones that are not miss.
    pub(super) fn look_up_vector(&mut self, insn: &Instruction, access: For, aligned: bool) -> Looked {
        self.effective_address(insn);
        let size = insn.memory_size().size() as i32;
        // An aligned operand crosses no page.
        if aligned { self.look_up_aligned(0, size, access) } else { self.look_up(size, access) }
    }

    /// The operand's linear address into RDX. Clobbers RAX, but not the flags.
    pub(super) fn effective_address(&mut self, insn: &Instruction) {
        self.operand_offset(RDX, insn);
        let segment = memory_segment(insn);
        if matches!(segment, Seg::Fs | Seg::Gs) {
            self.asm.load(B8, RAX, field(offset_of!(Cpu, linear_base) + segment as usize * 8));
            self.asm.lea(B8, RDX, Mem { base: Some(RDX), index: Some((RAX, 0)), disp: 0 });
        }
    }

    /// The operand's offset in its segment into `to`, RAX to spare. Leaves the flags alone.
    pub(super) fn operand_offset(&mut self, to: Reg, insn: &Instruction) {
        if insn.is_ip_rel_memory_operand() {
            return self.address(to, insn.ip_rel_memory_address() as i64);
        }
        if insn.memory_base() == Register::None && insn.memory_index() == Register::None {
            return self.asm.set(to, insn.memory_displacement64());
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

    /// Looks up the `size` bytes at RDX. Clobbers RAX and RCX.
    pub(super) fn look_up(&mut self, size: i32, access: For) -> Looked {
        self.look_up_aligned(size - 1, 1, access)
    }

    /// Looks up the page of RDX, if the byte `last` after it is in that page as well, and aligned so.
    fn look_up_aligned(&mut self, last: i32, alignment: i32, access: For) -> Looked {
        let host = self.gate.host;
        if matches!(self.flags, Flags::Host | Flags::HostButCarry) && host.pext {
            return self.look_up_keeping_flags(last, alignment, access);
        }
        self.clobber_flags();
        let asm = &mut *self.asm;
        // The index of the entry, times eight where the operand cannot be.
        if host.pext {
            asm.pext(B4, RAX, RDX, masks(0));
        } else {
            asm.mov(B4, RAX, RDX);
            asm.shr32(RAX, 12 - 3);
            asm.alu_imm(B4, Alu::And, RAX, ((DATA_ENTRIES - 1) << 3) as i32);
        }
        if last == 0 {
            asm.mov(B8, RCX, RDX);
        } else {
            asm.lea(B8, RCX, Mem::at(RDX, last));
        }
        asm.alu_imm(B8, Alu::And, RCX, -4096 | (alignment - 1));
        let (tag, addend) = (table(RAX, tags(access)), table(RAX, offset_of!(DataTable, addend)));
        if host.pext {
            asm.add_gs(RCX, tag);
        } else {
            asm.alu_load(B8, Alu::Add, RAX, field(offset_of!(Cpu, data_table)));
            asm.alu_load(B8, Alu::Add, RCX, Mem::at(RAX, tag.disp));
        }
        let miss = asm.jcc(NOT_EQUAL);
        if host.pext {
            asm.load_gs(RAX, addend);
        } else {
            asm.load(B8, RAX, Mem::at(RAX, addend.disp));
        }
        let second = Second { found: self.asm.here(), last, alignment, access };
        Looked { miss, flags: self.flags, second }
    }

    fn look_up_keeping_flags(&mut self, last: i32, alignment: i32, access: For) -> Looked {
        let asm = &mut *self.asm;
        asm.pext(B4, RAX, RDX, masks(0));
        asm.load_gs(RCX, table(RAX, tags(access)));
        asm.lea(B8, RCX, Mem { base: Some(RDX), index: Some((RCX, 0)), disp: last });
        // What is left of the distance without the bits that it may have: nothing.
        asm.pext(B8, RCX, RCX, masks(1 + alignment.trailing_zeros() as usize));
        asm.jrcxz_over_jump();
        let miss = asm.jmp();
        asm.load_gs(RAX, table(RAX, offset_of!(DataTable, addend)));
        let second = Second { found: self.asm.here(), last, alignment, access };
        Looked { miss, flags: self.flags, second }
    }

    /// After a miss, the flags saved: looks in the second place of RDX, and goes on if it is there. `flags` says where
    /// they are to be then.
    pub(super) fn look_in_second_place(&mut self, second: Second, flags: Flags) {
        let asm = &mut *self.asm;
        asm.lea(B8, RCX, Mem::at(RDX, second.last));
        asm.alu_imm(B8, Alu::And, RCX, -4096 | (second.alignment - 1));
        asm.call_to(match second.access {
            For::Reading => self.gate.second_read,
            For::Writing => self.gate.second_write,
        });
        let miss = asm.jcc(NOT_EQUAL);
        if flags.in_host() {
            asm.mov(B8, RCX, RAX);
            self.load_saved_flags();
            self.asm.mov(B8, RAX, RCX);
        }
        self.asm.jump_back(second.found);
        self.asm.bind(miss);
    }

    /// What was looked up, as an operand.
    pub(super) fn operand(&self) -> Mem {
        Mem { base: Some(RDX), index: Some((RAX, 0)), disp: 0 }
    }

    /// Makes the operand RDX alone: RAX is free.
    pub(super) fn join_address(&mut self) {
        let operand = self.operand();
        self.asm.lea(B8, RDX, operand);
    }

    /// The instruction's code is complete: after a miss its handler comes back here.
    pub(super) fn looked(&mut self, number: usize, looked: Looked) {
        self.or_handler(number, [Some(looked.miss), None], looked.flags);
        if let Some(Aside::Handler { second, .. }) = self.asides.last_mut() {
            *second = Some(looked.second);
        }
    }

    /// The same for any jumps to the handler, where the flags are in `before`.
    pub(super) fn or_handler(&mut self, number: usize, jumps: [Option<Fixup>; 2], before: Flags) {
        let resume = self.asm.here();
        let (flags, vector) = (self.flags, self.vector);
        self.asides.push(Aside::Handler { jumps, number, resume, before, flags, vector, second: None });
    }
}

/// The fields of the table entry at index RAX.
pub(in crate::jit) fn table(index: Reg, array: usize) -> Mem {
    Mem { base: None, index: Some((index, 3)), disp: array as i32 }
}

fn tags(access: For) -> usize {
    match access {
        For::Reading => offset_of!(DataTable, read),
        For::Writing => offset_of!(DataTable, write),
    }
}

/// The number-th of [`Hot::masks`], from the last.
fn masks(number: usize) -> Mem {
    field(offset_of!(Cpu, jit) + offset_of!(Hot, masks) + (MASKS - 1 - number) * 8)
}

/// The memory operand can be looked up.
pub(super) fn is_plain(insn: &Instruction) -> bool {
    let sized = matches!(insn.memory_size().size(), 1 | 2 | 4 | 8 | 16 | 32);
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) && sized && address_bits(insn) == 64
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
