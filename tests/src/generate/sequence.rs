//! Sequences: random instructions with forward branches and bounded loops, so that decoded blocks, their chaining and
//! state that one instruction leaves to the next are executed too.

use iced_x86::Register;

use super::filler::{Filler, forms_of, load};
use super::{Name, blank, put_code};
use crate::case::{Bits, CODE, Case, HIGH, LOW, PAGE};
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
    let mut builder = Builder { rip, code: Vec::new(), in_loop: false, filler: Filler::new(name.bits) };
    let forms = forms_of(name.bits);
    let count = 2 + random.below(MOST - 1);
    let mut left = count;
    let mut first = Some(name.code);
    while left > 0 {
        let run = 1 + random.below(left);
        left -= run;
        let mut part = Vec::new();
        builder.in_loop = random.chance(20);
        builder.filler.kept = if builder.in_loop { vec![Register::RCX] } else { Vec::new() };
        for _ in 0..run {
            let code = first.take().unwrap_or_else(|| random.pick(forms));
            let at = builder.rip + (builder.code.len() + part.len()) as u64 + 24;
            builder.filler.instruction(random, code, at, &mut part);
        }
        builder.add(random, part);
    }
    put_code(&mut case, &builder.code);
    Some(case)
}

struct Builder {
    rip: u64,
    code: Vec<u8>,
    in_loop: bool,
    filler: Filler,
}

impl Builder {
    /// Appends a run of instructions: as it is, under a forward branch, or as the body of a loop.
    fn add(&mut self, random: &mut Random, part: Vec<u8>) {
        let short = part.len() < 100;
        if self.in_loop && short {
            let mut count = Vec::new();
            load(self.filler.bits, Register::RCX, 1 + random.below(6), &mut count);
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
