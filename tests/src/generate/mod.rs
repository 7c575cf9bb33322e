//! Cases from seeds: single instructions of every form, sequences with branches and loops, mutated bytes, and programs.
//!
//! A case is named by `(kind, code, number)`; the name is the seed, so a failure is made again from its name alone.

mod bytes;
mod filler;
mod filter;
mod flow;
mod operands;
mod program;
mod sequence;
pub mod system;
mod values;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use crate::case::{
    Bits, CODE, CODE_END, Case, HIGH, IMAGE_CODE, IMAGE_SIZE, Image, LOW, PAGE, Registers, STOP,
};
use crate::random::{Random, mix};
pub use filter::{decode_comparable, forms};

/// Kinds of cases.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One instruction of a given form.
    Single,
    /// Up to a dozen, with forward branches and bounded loops.
    Sequence,
    /// One instruction with some of its bytes changed.
    Mutated,
    /// Up to some hundred, with calls, loops in loops, indirect jumps, faults and changes to their own code.
    Program,
}

/// The name of a case, and all it is made from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Name {
    pub kind: Kind,
    pub bits: Bits,
    /// The form (for sequences, the first instruction's).
    pub code: Code,
    pub number: u64,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Single => "single",
            Kind::Sequence => "sequence",
            Kind::Mutated => "mutated",
            Kind::Program => "program",
        };
        write!(f, "{kind}:{}:{:?}:{}", self.bits.count(), self.code, self.number)
    }
}

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let &[kind, bits, code, number] = parts.as_slice() else {
            return Err(format!("`{text}`: a case's name is KIND:BITS:CODE:NUMBER"));
        };
        let kind = match kind {
            "single" => Kind::Single,
            "sequence" => Kind::Sequence,
            "mutated" => Kind::Mutated,
            "program" => Kind::Program,
            _ => return Err(format!("`{kind}` is not single, sequence, mutated or program")),
        };
        let bits = match bits {
            "32" => Bits::B32,
            "64" => Bits::B64,
            _ => return Err(format!("`{bits}` is not 32 or 64")),
        };
        let code = Code::values().find(|c| format!("{c:?}") == code).ok_or(format!("no form `{code}`"))?;
        let number = number.parse().map_err(|e| format!("`{number}`: {e}"))?;
        Ok(Self { kind, bits, code, number })
    }
}

/// Makes the case of that name; none if the form has no encoding that can be compared (rare, and a property of the
/// name: some seeds find none).
pub fn case(name: Name) -> Option<Case> {
    let mut random =
        Random::new(mix(&[name.kind as u64, u64::from(name.bits.count()), name.code as u64, name.number]));
    match name.kind {
        Kind::Single => single(&mut random, name, false),
        Kind::Mutated => single(&mut random, name, true),
        Kind::Sequence => sequence::sequence(&mut random, name),
        Kind::Program => program::program(&mut random, name),
    }
}

/// Decodes what stands at the start of `code`.
pub fn decode(bits: Bits, code: &[u8], ip: u64) -> Instruction {
    Decoder::with_ip(bits.count(), code, ip, DecoderOptions::NONE).decode()
}

fn single(random: &mut Random, name: Name, mutate: bool) -> Option<Case> {
    let base = match name.bits {
        Bits::B64 => random.pick(&[LOW, HIGH]),
        Bits::B32 => LOW,
    };
    let mut code = bytes::encode(random, name.code, name.bits)?;
    if mutate {
        bytes::mutate(random, &mut code);
        let insn = decode(name.bits, &code, base);
        if !insn.is_invalid() {
            code.truncate(insn.len());
        }
    }
    let (rip, visible) = place(random, base, code.len(), mutate);
    if !mutate {
        bytes::fix(random, &mut code, name.bits, rip);
    }
    let insn = decode(name.bits, &code, rip);
    if !mutate && (insn.code() != name.code || decode_comparable(name.bits, &code, rip).is_err()) {
        return None;
    }
    let mut case = blank(random, name.bits, rip, base);
    if !operands::set_up(random, &insn, &mut case) {
        return None;
    }
    put_code(&mut case, &code[..visible]);
    Some(case)
}

/// Where `len` bytes of code go: mostly inside a page, at times across the two pages, or up to and over the end of
/// the code's pages. Returns the address and how many of the bytes are mapped.
fn place(random: &mut Random, base: u64, len: usize, mutate: bool) -> (u64, usize) {
    let (boundary, end) = (base + CODE + PAGE as u64, base + CODE_END);
    let at = match random.below(if mutate { 8 } else { 20 }) {
        0 => boundary - random.below(len.max(1) as u64 + 1),
        1 => end - len as u64,
        2 => end - 1 - random.below(len.max(2) as u64 - 1),
        _ => base + CODE + 0x400 + random.below(0x800),
    };
    (at, len.min((end - at) as usize))
}

/// Random registers and memory, no code yet.
fn blank(random: &mut Random, bits: Bits, rip: u64, base: u64) -> Case {
    let mut image: Box<Image> = Box::new([0; IMAGE_SIZE]);
    values::fill(random, &mut image[..IMAGE_CODE]);
    image[IMAGE_CODE..].fill(STOP);
    let mut gpr = [0; 16];
    for reg in &mut gpr {
        *reg = values::integer(random);
    }
    gpr[4] = values::stack(random, base);
    if bits == Bits::B32 {
        gpr.iter_mut().for_each(|reg| *reg &= 0xffff_ffff);
        gpr[8..].fill(0);
    }
    let start = Registers {
        gpr,
        rip,
        rflags: values::flags(random),
        fs_base: values::segment_base(random),
        gs_base: values::segment_base(random),
        fpu: values::fpu(random),
    };
    Case { bits, start, image, code_len: 0, open: Vec::new() }
}

fn put_code(case: &mut Case, code: &[u8]) {
    if let Some(index) = crate::case::image_index(case.start.rip) {
        case.image[index..index + code.len()].copy_from_slice(code);
        case.code_len = code.len();
    }
}
