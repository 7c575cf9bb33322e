//! Control flow at random: loops in loops, branches forward, calls, returns, jumps through registers and tables, code that
//! changes itself, faults between all that. What it leads to is found out by executing it; only loops are bounded
//! by construction.

use std::sync::OnceLock;

use iced_x86::{Code, Mnemonic, Register};

use super::filler::{Filler, forms_of, load};
use super::values;
use crate::case::{Bits, CODE, CODE_END, DATA, HIGH, LOW, PAGE, READ_ONLY};
use crate::random::Random;

/// Registers that loops count in.
pub(super) const COUNTERS: [Register; 6] =
    [Register::RCX, Register::RBX, Register::R15, Register::R8, Register::R10, Register::RSI];

/// An address in the code that is not known yet: where its displacement is.
#[derive(Clone, Copy)]
pub(super) struct Forward(usize);

/// 64-bit code under construction.
pub(super) struct Flow<'a> {
    pub random: &'a mut Random,
    /// Address of the first byte.
    pub origin: u64,
    pub code: Vec<u8>,
    pub filler: Filler,
    /// What has been written so far and may be called.
    pub functions: Vec<u64>,
    /// Bytes that may be written by the code itself, as (address, how many): immediates and data in between.
    pub soft_spots: Vec<(u64, u8)>,
    /// The code lies in a page that it may write to.
    pub writable: bool,
    /// Bytes that the code should have in the end.
    pub limit: usize,
    /// Makes pieces that only occur in one kind of program.
    pub extra: Option<fn(&mut Flow)>,
    /// A stack that is there whatever becomes of the arena's pages; most calls use it if there is one.
    pub safe_stack: Option<u64>,
}

impl<'a> Flow<'a> {
    pub fn new(random: &'a mut Random, origin: u64, limit: usize) -> Self {
        let mut filler = Filler::new(Bits::B64);
        filler.privileged = false;
        Self {
            random,
            origin,
            code: Vec::new(),
            filler,
            functions: Vec::new(),
            soft_spots: Vec::new(),
            writable: false,
            limit,
            extra: None,
            safe_stack: None,
        }
    }

    pub fn here(&self) -> u64 {
        self.origin + self.code.len() as u64
    }

    pub fn full(&self) -> bool {
        self.code.len() >= self.limit
    }

    /// Where the arena that this code runs in lies.
    pub fn base(&self) -> u64 {
        if self.origin >= HIGH { HIGH } else { LOW }
    }

    pub fn load(&mut self, register: Register, value: u64) {
        load(Bits::B64, register, value, &mut self.code);
    }

    /// An opcode with a 32-bit displacement to an address further on.
    pub fn forward(&mut self, opcode: &[u8]) -> Forward {
        self.code.extend(opcode);
        self.code.extend([0; 4]);
        Forward(self.code.len() - 4)
    }

    pub fn bind(&mut self, at: Forward) {
        let distance = (self.code.len() - at.0 - 4) as u32;
        self.code[at.0..at.0 + 4].copy_from_slice(&distance.to_le_bytes());
    }

    /// An opcode with a 32-bit displacement to `target`.
    pub fn relative(&mut self, opcode: &[u8], target: u64) {
        let next = self.here() + opcode.len() as u64 + 4;
        self.code.extend(opcode);
        self.code.extend((target.wrapping_sub(next) as u32).to_le_bytes());
    }

    /// `count` pieces of code; `depth` bounds how they nest.
    pub fn body(&mut self, count: u64, depth: u32) {
        for _ in 0..count {
            if self.full() {
                return;
            }
            self.piece(depth);
        }
    }

    fn piece(&mut self, depth: u32) {
        if let Some(extra) = self.extra
            && self.random.chance(25)
        {
            return extra(self);
        }
        match self.random.below(100) {
            0..=29 => self.quick(),
            30..=44 => self.any(),
            45..=56 if depth > 0 => self.branch_over(depth),
            57..=66 if depth > 0 => self.counted_loop(depth),
            67..=72 => self.call(),
            73..=76 => self.jump_through_register(),
            77..=79 => self.jump_through_table(),
            80..=83 => self.data_in_code(),
            84..=89 => self.change_code(),
            90..=93 => self.stack_pointer(),
            94..=96 => self.return_as_jump(),
            97 if self.random.chance(100 - self.filler.calm) => self.fault(),
            _ => self.quick(),
        }
    }

    /// Instructions of any form.
    fn any(&mut self) {
        for _ in 0..1 + self.random.below(4) {
            let code = self.random.pick(forms_of(Bits::B64));
            let at = self.here() + 24;
            self.filler.instruction(self.random, code, at, &mut self.code);
        }
    }

    /// Instructions that compilers write.
    pub fn quick(&mut self) {
        for _ in 0..1 + self.random.below(6) {
            let code = self.random.pick(quick_forms());
            let at = self.here() + 24;
            self.filler.instruction(self.random, code, at, &mut self.code);
        }
    }

    fn branch_over(&mut self, depth: u32) {
        let condition = self.random.below(16) as u8;
        if self.random.chance(40) {
            // A short one, over little.
            let at = self.code.len();
            let opcode = self.random.pick(&[0x70 | condition, 0x70 | condition, 0xe3, 0xeb]);
            self.code.extend([opcode, 0]);
            self.quick();
            let distance = self.code.len() - at - 2;
            match i8::try_from(distance) {
                Ok(distance) => self.code[at + 1] = distance as u8,
                Err(_) => self.code[at..at + 2].copy_from_slice(&[0x66, 0x90]),
            }
            return;
        }
        let over = self.forward(&[0x0f, 0x80 | condition]);
        let pieces = 1 + self.random.below(3);
        self.body(pieces, depth - 1);
        if self.random.chance(30) {
            // else
            let end = self.forward(&[0xe9]);
            self.bind(over);
            self.body(1, depth - 1);
            self.bind(end);
        } else {
            self.bind(over);
        }
    }

    fn counted_loop(&mut self, depth: u32) {
        let turns = 1 + self.random.below(if depth > 1 { 8 } else { 40 });
        let pieces = 1 + self.random.below(3);
        self.repeat(turns, |flow| flow.body(pieces, depth - 1));
    }

    /// `turns` times what `body` writes, or once something else if no register is left to count in.
    pub fn repeat(&mut self, turns: u64, body: impl FnOnce(&mut Self)) {
        let free: Vec<Register> =
            COUNTERS.into_iter().filter(|counter| !self.filler.kept.contains(counter)).collect();
        if free.is_empty() {
            return self.quick();
        }
        let counter = self.random.pick(&free);
        self.load(counter, turns);
        self.filler.kept.push(counter);
        let start = self.here();
        body(self);
        self.filler.kept.pop();
        let number = counter.number() as u8;
        let rex = 0x48 | number >> 3;
        if self.random.chance(25) {
            // add counter, -1; jne
            self.code.extend([rex, 0x83, 0xc0 | number & 7, 0xff]);
        } else {
            // dec counter; jne
            self.code.extend([rex, 0xff, 0xc8 | number & 7]);
        }
        self.relative(&[0x0f, 0x85], start);
    }

    /// A stack pointer with room on both sides, most of the time.
    fn stack_pointer(&mut self) {
        let base = self.base();
        let stack = if self.random.chance(self.filler.calm) {
            base + DATA + 0x800 + (self.random.below(0x1000) & !7)
        } else {
            values::stack(self.random, base)
        };
        self.load(Register::RSP, stack);
    }

    /// One with room for certain.
    pub fn good_stack(&mut self) {
        let stack = match self.safe_stack {
            Some(stack) if self.random.chance(85) => stack,
            _ => self.base() + DATA + 0x800 + (self.random.below(0x1000) & !7),
        };
        self.load(Register::RSP, stack);
    }

    /// A free register as the target of a jump or call.
    fn target_register(&mut self) -> Option<Register> {
        let register = self.random.pick(&[
            Register::RAX,
            Register::RDX,
            Register::RDI,
            Register::R9,
            Register::R11,
            Register::R13,
            Register::RBX,
        ]);
        (!self.filler.kept.contains(&register)).then_some(register)
    }

    fn call(&mut self) {
        let Some(&function) = self.functions.get(self.random.below(8) as usize) else { return self.quick() };
        if self.random.chance(30.max(self.filler.calm)) {
            self.good_stack();
        }
        match (self.random.below(3), self.target_register()) {
            (0, Some(register)) => {
                let number = register.number() as u8;
                self.load(register, function);
                self.code.extend([0x40 | number >> 3, 0xff, 0xd0 | number & 7]);
            }
            (1, _) => {
                // call [rip + 2]; jmp over its operand
                self.relative(&[0xff, 0x15], self.here() + 8);
                self.code.extend([0xeb, 8]);
                self.code.extend(function.to_le_bytes());
            }
            _ => self.relative(&[0xe8], function),
        }
    }

    /// A function that later code may call. It leaves the counters of the loops around its callers alone.
    pub fn function(&mut self) {
        let entry = self.here();
        self.filler.kept = COUNTERS.to_vec();
        let pieces = 1 + self.random.below(3);
        self.body(pieces, 1);
        self.filler.kept.clear();
        if self.random.chance(20) {
            // ret n: the caller's stack pointer is not what it was.
            self.code.extend([0xc2, 8 * self.random.below(3) as u8, 0]);
        } else {
            self.code.push(0xc3);
        }
        self.functions.push(entry);
    }

    fn jump_through_register(&mut self) {
        let Some(register) = self.target_register() else { return self.quick() };
        let number = register.number() as u8;
        let skipped = self.random.below(4) as usize;
        // lea register, [rip + what follows]; jmp register; some bytes that are not executed
        self.code.extend([0x48 | (number >> 3) << 2, 0x8d, 0x05 | (number & 7) << 3]);
        let jump = if number >= 8 { 3 } else { 2 };
        self.code.extend((jump as u32 + skipped as u32).to_le_bytes());
        if number >= 8 {
            self.code.push(0x41);
        }
        self.code.extend([0xff, 0xe0 | number & 7]);
        let junk = self.random.bits().to_le_bytes();
        self.code.extend(&junk[..skipped]);
    }

    /// `jmp [table + index * 8]` with a table in the code, to one of a few places further on.
    fn jump_through_table(&mut self) {
        let ways = 2 + self.random.below(3) as usize;
        // lea rax, [rip + table]
        let table = self.forward(&[0x48, 0x8d, 0x05]);
        if self.filler.kept.contains(&Register::RCX) {
            self.code.extend([0xff, 0x20]);
        } else {
            // movzx ecx, dl or bl; and ecx, 1; jmp [rax + rcx * 8]
            let source = self.random.pick(&[2, 3]);
            self.code.extend([0x0f, 0xb6, 0xc8 | source, 0x83, 0xe1, 1, 0xff, 0x24, 0xc8]);
        }
        self.bind(table);
        let start = self.code.len();
        self.code.resize(start + ways * 8, 0);
        let mut ends = Vec::new();
        for way in 0..ways {
            let here = self.here();
            self.code[start + way * 8..][..8].copy_from_slice(&here.to_le_bytes());
            self.quick();
            if self.random.chance(60) {
                ends.push(self.forward(&[0xe9]));
            }
        }
        ends.into_iter().for_each(|end| self.bind(end));
    }

    /// `push target; ret`, to a place further on.
    fn return_as_jump(&mut self) {
        // lea rax, [rip + 2]; push rax; ret
        self.code.extend([0x48, 0x8d, 0x05, 2, 0, 0, 0, 0x50, 0xc3]);
    }

    /// Bytes in the code that it reads, and writes where it may.
    fn data_in_code(&mut self) {
        self.code.extend([0xeb, 8]);
        let data = self.here();
        let bytes = values::integer(self.random).to_le_bytes();
        self.code.extend(bytes);
        self.soft_spots.push((data, 8));
        for _ in 0..1 + self.random.below(3) {
            // mov, add, xor, cmp register, [data]; or to it
            let opcode = if self.writable {
                self.random.pick(&[0x8b, 0x03, 0x33, 0x3b, 0x01, 0x89, 0x31, 0x87])
            } else {
                self.random.pick(&[0x8b, 0x03, 0x33, 0x3b])
            };
            let register = self.random.pick(&[0, 2, 7]);
            self.relative(&[0x48, opcode, 0x05 | register << 3], data);
        }
    }

    /// An instruction with an immediate, and stores that change it: before, behind, in the same block or another.
    fn change_code(&mut self) {
        if self.random.chance(60) || self.soft_spots.is_empty() {
            // mov, add, xor, cmp eax, immediate
            let opcode = self.random.pick(&[0xb8, 0x05, 0x35, 0x3d]);
            self.code.push(opcode);
            self.soft_spots.push((self.here(), 4));
            let immediate = self.random.bits() as u32;
            self.code.extend(immediate.to_le_bytes());
        }
        if !self.writable {
            return;
        }
        let ahead = self.random.chance(40);
        let (spot, size) = if ahead {
            // The immediate of what comes right behind the store.
            (self.here() + 6 + 1, 4)
        } else {
            self.random.pick(&self.soft_spots)
        };
        match self.random.below(3) {
            // inc byte [rip + ..]
            0 => self.relative(&[0xfe, 0x05], spot + u64::from(size) - 1),
            // mov [rip + ..], edx
            1 => self.relative(&[0x89, 0x15], spot),
            // add [rip + ..], edi
            _ => self.relative(&[0x01, 0x3d], spot),
        }
        if ahead {
            self.code.extend([0xb8, 1, 2, 3, 4]);
        }
    }

    /// What faults, always or mostly.
    pub fn fault(&mut self) {
        let base = self.base();
        match self.random.below(8) {
            // ud2
            0 => self.code.extend([0x0f, 0x0b]),
            // xor ecx, ecx; div ecx
            1 if !self.filler.kept.contains(&Register::RCX) => {
                self.code.extend([0x31, 0xc9, 0xf7, 0xf1]);
            }
            // A load across the end of the data.
            2 => {
                let end = base + DATA + 2 * PAGE as u64;
                self.access(0x8b, |random| end - random.below(8));
            }
            3 => self.access(0x01, |random| base + READ_ONLY + random.below(PAGE as u64)),
            4 => self.access(0x8b, |random| 0x8000_0000_0000 + random.below(64)),
            // int3
            5 => self.code.push(0xcc),
            // A push that does not fit.
            6 => {
                let top = base + DATA + self.random.below(8);
                self.load(Register::RSP, top);
                self.code.push(0x53);
            }
            // A jump behind the code.
            _ => {
                let end = self.base() + CODE_END + self.random.below(16);
                if self.origin & !0xffff == (self.base() + CODE) & !0xffff {
                    let condition = self.random.below(16) as u8;
                    self.relative(&[0x0f, 0x80 | condition], end);
                }
            }
        }
    }

    /// `opcode rax, [rdx]` with an address in RDX.
    fn access(&mut self, opcode: u8, address: impl FnOnce(&mut Random) -> u64) {
        let address = address(self.random);
        self.load(Register::RDX, address);
        self.code.extend([0x48, opcode, 0x02]);
    }
}

/// The forms that most of real code consists of.
fn quick_forms() -> &'static [Code] {
    static FORMS: OnceLock<Vec<Code>> = OnceLock::new();
    FORMS.get_or_init(|| {
        forms_of(Bits::B64).iter().copied().filter(|code| is_quick(code.mnemonic())).collect()
    })
}

fn is_quick(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let name = format!("{mnemonic:?}");
    let family = ["Cmov", "Set", "Mov", "Sh", "Sa", "Ro", "Rc", "Bt", "P", "Vp", "Lod", "Sto"];
    let family = family.iter().any(|start| name.starts_with(start));
    let arithmetic = matches!(
        mnemonic,
        Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg | Not | Lea | Xchg | Xadd
    );
    let bits = matches!(mnemonic, Bsf | Bsr | Tzcnt | Lzcnt | Bswap | Imul | Mul | Div | Idiv | Cmpxchg);
    let rest = matches!(mnemonic, Cdq | Cqo | Cwde | Cdqe | Lahf | Sahf | Cmc | Clc | Stc | Nop | Xorps);
    // Integer instructions as often as the many of vectors.
    (family || arithmetic || bits || rest) && (!name.starts_with("Vp") || name.len() % 3 == 0)
}
