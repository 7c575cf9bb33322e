//! Sequences: random instructions with forward branches and bounded loops, so that decoded blocks, their chaining and
//! state that one instruction leaves to the next are executed too.

use std::sync::OnceLock;

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, UsedMemory,
};

use super::{Name, blank, bytes, decode, decode_comparable, forms, put_code, values};
use crate::case::{Bits, CODE, Case, HIGH, LOW, PAGE};
use crate::compare::open;
use crate::random::Random;

const MOST: u64 = 12;

/// Makes a sequence that starts with `name.code`.
pub(super) fn sequence(random: &mut Random, name: Name) -> Option<Case> {
    let base = match name.bits {
        Bits::B64 => random.pick(&[LOW, HIGH]),
        Bits::B32 => LOW,
    };
    let offset = if random.chance(20) { PAGE as u64 - random.below(100) } else { random.below(0x600) };
    let rip = base + CODE + offset;
    let mut case = blank(random, name.bits, rip, base);
    // What may and what must be #AC is compared with single instructions only; so are flags in between.
    case.start.rflags &= !(x86defs::rflags::AC | x86defs::rflags::TF);
    let mut builder = Builder { bits: name.bits, rip, code: Vec::new(), in_loop: false };
    let forms = forms_of(name.bits);
    let count = 2 + random.below(MOST - 1);
    let mut left = count;
    let mut first = Some(name.code);
    while left > 0 {
        let run = 1 + random.below(left);
        left -= run;
        let mut part = Vec::new();
        builder.in_loop = random.chance(20);
        for _ in 0..run {
            let code = first.take().unwrap_or_else(|| random.pick(forms));
            let at = builder.rip + (builder.code.len() + part.len()) as u64 + 24;
            builder.instruction(random, code, at, &mut part);
        }
        builder.add(random, part);
    }
    put_code(&mut case, &builder.code);
    Some(case)
}

fn forms_of(bits: Bits) -> &'static [Code] {
    static FORMS: [OnceLock<Vec<Code>>; 2] = [const { OnceLock::new() }; 2];
    FORMS[bits as usize].get_or_init(|| forms(bits))
}

struct Builder {
    bits: Bits,
    rip: u64,
    code: Vec<u8>,
    in_loop: bool,
}

impl Builder {
    /// Appends one instruction, with instructions before it that make its addresses valid most of the time.
    fn instruction(&self, random: &mut Random, code: Code, at: u64, part: &mut Vec<u8>) {
        let Some(mut encoded) = bytes::encode(random, code, self.bits) else { return };
        bytes::fix(random, &mut encoded, self.bits, at);
        let insn = decode(self.bits, &encoded, at);
        if decode_comparable(self.bits, &encoded, at).is_err() || !fits(&insn, self.in_loop) {
            return;
        }
        let mut factory = InstructionInfoFactory::new();
        let memory: Vec<UsedMemory> = factory.info(&insn).used_memory().to_vec();
        if random.chance(75) {
            for used in &memory {
                self.aim(random, used, part);
            }
        }
        if insn.is_string_instruction() && !self.in_loop {
            self.load(Register::RCX, random.below(40), part);
        }
        part.extend(encoded);
        if open::flags(&insn) != 0 {
            // cmp eax, eax: nothing may depend on flags that are not compared.
            part.extend([0x39, 0xc0]);
        }
    }

    fn aim(&self, random: &mut Random, memory: &UsedMemory, part: &mut Vec<u8>) {
        let (base, index) = (memory.base(), memory.index());
        if matches!(memory.segment(), Register::FS | Register::GS) {
            return;
        }
        let reserved = |r: Register| {
            let full = r.full_register();
            full == Register::RSP || self.in_loop && full == Register::RCX
        };
        let mut sum = memory.displacement();
        if index.is_gpr() && !reserved(index) && index.size() > 1 {
            let value = random.below(64);
            self.load(index.full_register(), value, part);
            sum = sum.wrapping_add(value.wrapping_mul(u64::from(memory.scale())));
        }
        if base.is_gpr() && !reserved(base) && base != index {
            let size = memory.memory_size().size() as u64;
            let low = self.bits == Bits::B32 || base.size() < 8;
            let target = values::target(random, size, size, low);
            self.load(base.full_register(), target.wrapping_sub(sum), part);
        }
    }

    /// `mov register, value`.
    fn load(&self, register: Register, value: u64, part: &mut Vec<u8>) {
        let number = register.full_register().number() as u8;
        match self.bits {
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

    /// Appends a run of instructions: as it is, under a forward branch, or as the body of a loop.
    fn add(&mut self, random: &mut Random, part: Vec<u8>) {
        let short = part.len() < 100;
        if self.in_loop && short {
            let mut count = Vec::new();
            self.load(Register::RCX, 1 + random.below(6), &mut count);
            self.code.extend(count);
            self.code.extend(&part);
            // loop, loopne or loope back to the first instruction of the run
            let back = -(part.len() as i64 + 2);
            self.code.extend([random.pick(&[0xe2, 0xe2, 0xe0, 0xe1]), back as i8 as u8]);
        } else if random.chance(40) && short {
            let conditional = 0x70 + random.below(16) as u8;
            let jump = random.pick(&[0xeb, 0xe3, conditional, conditional]);
            self.code.extend([jump, part.len() as u8]);
            self.code.extend(part);
        } else {
            self.code.extend(part);
        }
    }
}

/// Whether an instruction may stand in a sequence. Branches are the builder's; save areas need their own set-up.
fn fits(insn: &Instruction, in_loop: bool) -> bool {
    if insn.flow_control() != FlowControl::Next || open::is_loose(insn) {
        return false;
    }
    if matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
        return false;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    let kept = |register: Register| {
        let full = register.full_register();
        full == Register::RSP && !insn.is_stack_instruction() || in_loop && full == Register::RCX
    };
    !info.used_registers().iter().any(|used| {
        kept(used.register())
            && matches!(
                used.access(),
                OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
            )
    })
}
