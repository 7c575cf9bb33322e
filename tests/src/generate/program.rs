//! Programs of user code, for the host's CPU too.

use super::flow::Flow;
use super::{Name, blank};
use crate::case::{CODE, Case, Fpu, HIGH, IMAGE_CODE, LOW, PAGE, SELF, STOP, image_index};
use crate::random::Random;

/// Makes a program; it ends with [`STOP`] if nothing faults before.
pub(super) fn program(random: &mut Random, name: Name) -> Option<Case> {
    if name.bits != crate::case::Bits::B64 {
        return None;
    }
    let base = random.pick(&[LOW, HIGH]);
    let writable = random.chance(40);
    // Where the page of its own is too short, code goes on across the two pages of code.
    let (start, limit) = if writable {
        (base + SELF + random.below(64), 3000)
    } else {
        (base + CODE + random.below(0x1000), 3500)
    };
    let limit = limit.min(random.pick(&[200, 600, 1500, limit]));
    let mut case = blank(random, name.bits, start, base);
    case.start.gpr[4] = base + crate::case::DATA + 0x1000 + (random.below(0x800) & !7);
    case.start.rflags &= !(x86defs::rflags::AC | x86defs::rflags::TF);
    let mut flow = Flow::new(random, start, limit);
    flow.writable = writable;
    flow.filler.calm = flow.random.pick(&[80, 98, 100]);
    if flow.filler.calm > 80 {
        calm_exceptions(&mut case.start.fpu);
    }
    for _ in 0..flow.random.below(4) {
        flow.function();
    }
    let entry = flow.here();
    let at = flow.here() + 24;
    flow.filler.instruction(flow.random, name.code, at, &mut flow.code);
    while !flow.full() {
        flow.body(4, 3);
    }
    flow.code.push(STOP);
    let code = flow.code;
    case.start.rip = entry;
    let index = image_index(start)?;
    let room = (if writable { IMAGE_CODE + 3 * PAGE } else { IMAGE_CODE + 2 * PAGE }).checked_sub(index)?;
    if code.len() > room {
        return None;
    }
    case.image[index..index + code.len()].copy_from_slice(&code);
    case.code_len = (start + code.len() as u64 - entry) as usize;
    Some(case)
}

/// No x87 or vector instruction raises an exception, unless the program loads other control words.
fn calm_exceptions(fpu: &mut Fpu) {
    fpu.fcw |= 0x3f;
    fpu.fsw &= 0x7f00;
    fpu.mxcsr |= 0x1f80;
}
