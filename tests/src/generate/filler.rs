//! Random instructions for code that goes on behind them: most of their addresses are made valid first, and registers
//! that the surrounding code needs are left alone.

use std::sync::OnceLock;

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, UsedMemory,
};

use super::{bytes, decode, decode_comparable, forms, values};
use crate::case::Bits;
use crate::compare::open;
use crate::random::Random;

/// Every form for code of that width.
pub(super) fn forms_of(bits: Bits) -> &'static [Code] {
    static FORMS: [OnceLock<Vec<Code>>; 2] = [const { OnceLock::new() }; 2];
    FORMS[bits as usize].get_or_init(|| forms(bits))
}

/// What the instructions between branches are made by.
pub(super) struct Filler {
    pub bits: Bits,
    /// Registers (64 bits) that keep their values, besides RSP.
    pub kept: Vec<Register>,
    /// The result is compared with the host's, which may define what the architecture does not.
    pub native: bool,
    /// Privileged instructions occur, which fault in user code.
    pub privileged: bool,
    /// Of 100 memory operands, so many that are made sure not to fault.
    pub calm: u64,
}

impl Filler {
    pub fn new(bits: Bits) -> Self {
        Self { bits, kept: Vec::new(), native: true, privileged: true, calm: 0 }
    }

    /// Appends one instruction, with instructions before it that make its addresses valid most of the time.
    pub fn instruction(&self, random: &mut Random, code: Code, at: u64, part: &mut Vec<u8>) {
        let Some(mut encoded) = bytes::encode(random, code, self.bits) else { return };
        bytes::fix(random, &mut encoded, self.bits, at);
        let insn = decode(self.bits, &encoded, at);
        if decode_comparable(self.bits, &encoded, at).is_err() || !self.fits(&insn) {
            return;
        }
        let mut factory = InstructionInfoFactory::new();
        let memory: Vec<UsedMemory> = factory.info(&insn).used_memory().to_vec();
        let calm = random.chance(self.calm);
        if calm && !memory.iter().all(|used| self.can_aim(used)) {
            return;
        }
        if calm || random.chance(75) {
            for used in &memory {
                self.aim(random, used, calm, part);
            }
        }
        if insn.is_string_instruction() && !self.keeps(Register::RCX) {
            load(self.bits, Register::RCX, random.below(40), part);
        }
        part.extend(encoded);
        if self.native && open::flags(&insn) != 0 {
            // cmp eax, eax: nothing may depend on flags that are not compared.
            part.extend([0x39, 0xc0]);
        }
    }

    fn keeps(&self, register: Register) -> bool {
        self.kept.contains(&register.full_register())
    }

    /// Whether [`Filler::aim`] decides where the operand lies.
    fn can_aim(&self, memory: &UsedMemory) -> bool {
        let (base, index) = (memory.base(), memory.index());
        let free = |r: Register| r.is_gpr() && r.full_register() != Register::RSP && !self.keeps(r);
        let stack = base == Register::RSP && index == Register::None && memory.displacement() < 64;
        let small = index == Register::None || free(index) && index.full_register() != base.full_register();
        !matches!(memory.segment(), Register::FS | Register::GS) && (stack || free(base) && small)
    }

    fn aim(&self, random: &mut Random, memory: &UsedMemory, calm: bool, part: &mut Vec<u8>) {
        let (base, index) = (memory.base(), memory.index());
        if matches!(memory.segment(), Register::FS | Register::GS) {
            return;
        }
        let reserved = |r: Register| r.full_register() == Register::RSP || self.keeps(r);
        let mut sum = memory.displacement();
        if index.is_gpr() && !reserved(index) && index.size() > 1 {
            let value = random.below(64);
            load(self.bits, index, value, part);
            sum = sum.wrapping_add(value.wrapping_mul(u64::from(memory.scale())));
        }
        if base.is_gpr() && !reserved(base) && base != index {
            let size = memory.memory_size().size() as u64;
            let low = self.bits == Bits::B32 || base.size() < 8;
            let target = if calm {
                values::calm_target(random, size, low)
            } else {
                values::target(random, size, size, low)
            };
            load(self.bits, base, target.wrapping_sub(sum), part);
        }
    }

    /// Whether an instruction may stand between branches. Branches are made elsewhere; save areas need their own set-up.
    fn fits(&self, insn: &Instruction) -> bool {
        if insn.flow_control() != FlowControl::Next || self.native && open::is_loose(insn) {
            return false;
        }
        if matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
            return false;
        }
        if !self.privileged && insn.is_privileged() {
            return false;
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(insn);
        let kept = |register: Register| {
            let full = register.full_register();
            full == Register::RSP && !insn.is_stack_instruction() || self.keeps(full)
        };
        !info.used_registers().iter().any(|used| {
            kept(used.register())
                && matches!(
                    used.access(),
                    OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
                )
        })
    }
}

/// `mov register, value`.
pub(super) fn load(bits: Bits, register: Register, value: u64, part: &mut Vec<u8>) {
    let number = register.full_register().number() as u8;
    match bits {
        Bits::B64 => {
            part.extend([0x48 | number >> 3, 0xb8 | number & 7]);
            part.extend(value.to_le_bytes());
        }
        Bits::B32 => {
            part.push(0xb8 | number & 7);
            part.extend((value as u32).to_le_bytes());
        }
    }
}
