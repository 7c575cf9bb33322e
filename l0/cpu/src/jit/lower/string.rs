//! MOVS, STOS and LODS forwards, and MOVS and STOS repeated within one page of each operand: the host's own, on the host's
//! addresses. Everything else is the handlers'.
//!
//! A page holds no more elements than the interpreter handles in one piece, so that a repetition here is one whole
//! instruction there as well.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic};
use x86defs::rflags;

use super::flags::system_flags;
use super::memory::For;
use super::{Fixup, Lowering, Use};
use crate::Cpu;
use crate::interp::operands::memory_segment;
use crate::interp::string::index_bits;
use crate::jit::Hot;
use crate::jit::emit::{Alu, B4, B8, EQUAL, Mem, NOT_EQUAL, RAX, RCX, RDI, RDX, RSI, Width};
use crate::jit::gate::{PINNED, field};
use crate::state::{Seg, reg};

/// Unsigned, as condition codes.
const ABOVE: u8 = 7;
const PAGE: i32 = 4096;

#[derive(Clone, Copy, Eq, PartialEq)]
enum Kind {
    Move,
    Store,
    Load,
}

fn kind(insn: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    if !insn.is_string_instruction() || index_bits(insn) != 64 {
        return None;
    }
    Some(match insn.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => Kind::Move,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => Kind::Store,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq if !repeats(insn) => Kind::Load,
        _ => return None,
    })
}

fn repeats(insn: &Instruction) -> bool {
    insn.has_rep_prefix() || insn.has_repne_prefix()
}

/// What an instruction of this family does with the flags; none for others, and for those that are not lowered.
pub(super) fn flag_use(insn: &Instruction) -> Option<Use> {
    let kind = kind(insn)?;
    let based = kind != Kind::Store && matches!(memory_segment(insn), Seg::Fs | Seg::Gs);
    (!based).then_some(Use::None)
}

impl Lowering<'_> {
    pub(super) fn string(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(kind) = kind(insn).filter(|_| flag_use(insn).is_some()) else { return false };
        let size = insn.memory_size().size();
        self.clobber_flags();
        self.asm.test_mem_imm(system_flags(), rflags::DF as u32);
        let backwards = self.asm.jcc(NOT_EQUAL);
        match (repeats(insn), kind) {
            (true, Kind::Move) => self.move_many(at, size),
            (true, _) => self.store_many(at, size),
            (false, Kind::Move) => self.move_one(at, size),
            (false, Kind::Store) => self.store_one(at, size),
            (false, Kind::Load) => self.load_one(at, size),
        }
        self.or_handler(at, [Some(backwards), None], self.flags);
        true
    }

    /// Where a host address waits.
    fn kept() -> Mem {
        field(offset_of!(Cpu, jit) + offset_of!(Hot, target))
    }

    /// The count into RCX; jumps if it is zero, and if more elements from `index` on than are left in its page.
    fn check_room(&mut self, index: usize, size: usize) -> Fixup {
        self.read_guest(RDX, index);
        self.asm.alu_imm(B4, Alu::And, RDX, PAGE - 1);
        let scale = size.trailing_zeros() as u8;
        self.asm.lea(B8, RDX, Mem { base: Some(RDX), index: Some((RCX, scale)), disp: 0 });
        self.asm.alu_imm(B8, Alu::Cmp, RDX, PAGE);
        self.asm.jcc(ABOVE)
    }

    /// The count into RCX: jumps if there is nothing to do, and if it is too much.
    fn check_count(&mut self, size: usize) -> [Fixup; 2] {
        self.read_guest(RCX, reg::RCX);
        self.asm.alu_imm(B8, Alu::Cmp, RCX, 0);
        let nothing = self.asm.jcc(EQUAL);
        self.asm.alu_imm(B8, Alu::Cmp, RCX, PAGE / size as i32);
        [nothing, self.asm.jcc(ABOVE)]
    }

    /// Puts REP and the instruction; RCX, RSI and RDI are the host's.
    fn repeat(&mut self, opcode: u8, size: usize) {
        self.asm.bytes(&[0xf3]);
        self.put_string(opcode, size);
    }

    fn put_string(&mut self, opcode: u8, size: usize) {
        match size {
            1 => self.asm.bytes(&[opcode]),
            2 => self.asm.bytes(&[0x66, opcode | 1]),
            4 => self.asm.bytes(&[opcode | 1]),
            _ => self.asm.bytes(&[0x48, opcode | 1]),
        }
    }

    /// The guest's count is zero now; before, it was as many elements as `index`, whose value is `from`, moves by.
    fn advance_by_count(&mut self, index: usize, from: u8, size: usize) {
        let scale = size.trailing_zeros() as u8;
        let count = self.guest_in(reg::RCX, RCX);
        self.asm.lea(B8, RAX, Mem { base: Some(from), index: Some((count, scale)), disp: 0 });
        self.write_guest(index, RAX);
    }

    fn clear_count(&mut self) {
        self.asm.set32(RCX, 0);
        self.write_guest(reg::RCX, RCX);
    }

    fn move_many(&mut self, at: usize, size: usize) {
        const { assert!(matches!((PINNED[reg::RSI], PINNED[reg::RDI]), (Some(RSI), Some(RDI)))) };
        let [nothing, many] = self.check_count(size);
        let source = self.check_room(reg::RSI, size);
        let destination = self.check_room(reg::RDI, size);
        self.read_guest(RDX, reg::RSI);
        let from = self.look_up(1, For::Reading);
        self.join_address();
        self.asm.store(B8, Self::kept(), RDX);
        self.read_guest(RDX, reg::RDI);
        let to = self.look_up(1, For::Writing);
        self.join_address();
        self.read_guest(RCX, reg::RCX);
        // The guest's indices wait in RAX and RDX.
        self.asm.mov(B8, RAX, RDI);
        self.asm.mov(B8, RDI, RDX);
        self.asm.mov(B8, RDX, RSI);
        self.asm.load(B8, RSI, Self::kept());
        self.repeat(0xa4, size);
        self.asm.mov(B8, RDI, RAX);
        self.advance_by_count(reg::RSI, RDX, size);
        self.advance_by_count(reg::RDI, RDI, size);
        self.clear_count();
        self.asm.bind(nothing);
        self.or_handler(at, [Some(many), Some(source)], self.flags);
        self.or_handler(at, [Some(destination), Some(from.miss)], self.flags);
        self.looked(at, to);
    }

    fn store_many(&mut self, at: usize, size: usize) {
        let [nothing, many] = self.check_count(size);
        let destination = self.check_room(reg::RDI, size);
        self.read_guest(RDX, reg::RDI);
        let to = self.look_up(1, For::Writing);
        self.join_address();
        self.read_guest(RCX, reg::RCX);
        self.read_guest(RAX, reg::RAX);
        // XCHG RDX, RDI.
        self.asm.bytes(&[0x48, 0x87, 0xfa]);
        self.repeat(0xaa, size);
        self.advance_by_count(reg::RDI, RDX, size);
        self.clear_count();
        self.asm.bind(nothing);
        self.or_handler(at, [Some(many), Some(destination)], self.flags);
        self.looked(at, to);
    }

    /// Moves an index past one element.
    fn advance(&mut self, index: usize, size: usize) {
        let host = self.guest_in(index, RDX);
        self.asm.lea(B8, host, Mem::at(host, size as i32));
        self.write_guest(index, host);
    }

    /// Loads an element into RCX, zero-extended.
    fn load_element(&mut self, size: usize) {
        let operand = self.operand();
        match size {
            1 => self.asm.load_u8(RCX, operand),
            2 => self.asm.load_u16(RCX, operand),
            4 => self.asm.load(B4, RCX, operand),
            _ => self.asm.load(B8, RCX, operand),
        }
    }

    fn store_element(&mut self, size: usize) {
        let operand = self.operand();
        match size {
            1 => self.asm.store_u8(operand, RCX),
            2 => self.asm.store(Width::B2, operand, RCX),
            4 => self.asm.store(B4, operand, RCX),
            _ => self.asm.store(B8, operand, RCX),
        }
    }

    fn move_one(&mut self, at: usize, size: usize) {
        self.read_guest(RDX, reg::RSI);
        let from = self.look_up(size as i32, For::Reading);
        self.load_element(size);
        self.asm.store(B8, Self::kept(), RCX);
        self.read_guest(RDX, reg::RDI);
        let to = self.look_up(size as i32, For::Writing);
        self.asm.load(B8, RCX, Self::kept());
        self.store_element(size);
        self.advance(reg::RSI, size);
        self.advance(reg::RDI, size);
        self.or_handler(at, [Some(from.miss), None], self.flags);
        self.looked(at, to);
    }

    fn store_one(&mut self, at: usize, size: usize) {
        self.read_guest(RDX, reg::RDI);
        let to = self.look_up(size as i32, For::Writing);
        self.read_guest(RCX, reg::RAX);
        self.store_element(size);
        self.advance(reg::RDI, size);
        self.looked(at, to);
    }

    fn load_one(&mut self, at: usize, size: usize) {
        self.read_guest(RDX, reg::RSI);
        let from = self.look_up(size as i32, For::Reading);
        self.load_element(size);
        if size < 4 {
            // The rest of RAX stays.
            self.read_guest(RAX, reg::RAX);
            // MOV AL, CL; MOV AX, CX.
            self.asm.bytes(if size == 1 { &[0x88, 0xc8] } else { &[0x66, 0x89, 0xc8] });
            self.write_guest(reg::RAX, RAX);
        } else {
            self.write_guest(reg::RAX, RCX);
        }
        self.advance(reg::RSI, size);
        self.looked(at, from);
    }
}
