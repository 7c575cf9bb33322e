//! What VM exits say of the instruction that caused them: VM-exit instruction information and exit qualification
//! ("Information for VM Exits Due to Instruction Execution").

use iced_x86::{Instruction, OpKind, Register};

use crate::Cpu;
use crate::interp::operands::{address_bits, memory_segment};

/// Bit 10: the operand is a register.
pub(crate) const REGISTER_OPERAND: u32 = 1 << 10;
const NO_INDEX: u32 = 1 << 22;
const NO_BASE: u32 = 1 << 27;

/// Number of a general register as the formats have it.
pub(crate) fn number(register: Register) -> u32 {
    register.full_register().number() as u32 & 15
}

/// The index of the memory operand, if there is one.
pub(crate) fn memory_index(insn: &Instruction) -> Option<u32> {
    (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)
}

/// Address size: 0, 1 and 2 are 16, 32 and 64 bits.
pub(crate) fn address_size(bits: u32) -> u32 {
    match bits {
        16 => 0,
        32 => 1,
        _ => 2,
    }
}

/// The part that all formats with a memory operand share.
///
/// ```text
///  31  28 27   26  23 22   21  18 17 15   10  9   7 6    3 1   0
/// | reg2 |no b| base |no i|index | seg | 0=mem|asize| reg1 |scale|
/// ```
pub(crate) fn memory(insn: &Instruction) -> u32 {
    let scale = insn.memory_index_scale().trailing_zeros() & 3;
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let index = if index == Register::None { NO_INDEX } else { number(index) << 18 };
    let base = match base {
        Register::None | Register::RIP | Register::EIP => NO_BASE,
        base => number(base) << 23,
    };
    scale | address_size(address_bits(insn)) << 7 | (memory_segment(insn) as u32) << 15 | index | base
}

/// The operand `index`, memory or a register in bits 6:3.
pub(crate) fn operand(insn: &Instruction, index: u32) -> u32 {
    if insn.op_kind(index) == OpKind::Memory {
        memory(insn)
    } else {
        REGISTER_OPERAND | number(insn.op_register(index)) << 3
    }
}

/// A register in bits 31:28.
pub(crate) fn second(register: Register) -> u32 {
    number(register) << 28
}

impl Cpu {
    /// The exit qualification of instructions with a memory operand: the displacement, relative to RIP already added up.
    pub(crate) fn displacement(&self, insn: &Instruction) -> u64 {
        if memory_index(insn).is_none() {
            0
        } else if insn.is_ip_rel_memory_operand() {
            self.effective_address(insn)
        } else {
            insn.memory_displacement64()
        }
    }
}
