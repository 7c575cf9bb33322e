//! Writes host instructions: the few that translated code is glued together with. The guest's own instructions, with
//! their operands replaced, go through iced's encoder.

use iced_x86::{Encoder, Instruction};

/// A host register by its number.
pub(super) type Reg = u8;
pub(super) const RAX: Reg = 0;
pub(super) const RCX: Reg = 1;
pub(super) const RDX: Reg = 2;
pub(super) const RBX: Reg = 3;
pub(super) const RSP: Reg = 4;
pub(super) const RBP: Reg = 5;
pub(super) const RSI: Reg = 6;
pub(super) const RDI: Reg = 7;
pub(super) const R8: Reg = 8;
pub(super) const R9: Reg = 9;
pub(super) const R10: Reg = 10;
pub(super) const R11: Reg = 11;
pub(super) const R12: Reg = 12;
pub(super) const R13: Reg = 13;
pub(super) const R14: Reg = 14;
pub(super) const R15: Reg = 15;

/// Condition codes as encoded.
pub(super) const EQUAL: u8 = 4;
pub(super) const NOT_EQUAL: u8 = 5;
pub(super) const NEGATIVE: u8 = 8;

/// The two-operand operations by their number in the opcode.
#[derive(Clone, Copy)]
pub(super) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// MOVUPS's opcodes.
#[derive(Clone, Copy)]
pub(super) enum MoveVector {
    Load = 0x10,
    Store = 0x11,
}

/// `[base + index << scale + disp]`.
#[derive(Clone, Copy)]
pub(super) struct Mem {
    pub base: Option<Reg>,
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

impl Mem {
    pub(super) fn at(base: Reg, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
}

/// Width of a host instruction.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Width {
    B2,
    B4,
    B8,
}
pub(super) use Width::{B4, B8};

/// A 32-bit displacement to be filled in: the offset of its first byte.
#[derive(Clone, Copy)]
pub(super) struct Fixup(pub usize);

/// Offsets from here on are in the second part of the code.
const ASIDE: usize = 1 << 30;

/// Code being written: what is executed as a rule, and then what seldom is, which goes elsewhere: far apart, the former
/// takes less of the processor's caches.
pub(super) struct Assembler {
    /// The part being written.
    code: Vec<u8>,
    /// The first part while the second is written.
    finished: Vec<u8>,
    aside: bool,
    encoder: Encoder,
    /// Where the parts will be executed.
    origins: [u64; 2],
    /// Some instruction could not be encoded: the code is of no use.
    pub failed: bool,
}

impl Assembler {
    pub(super) fn new() -> Self {
        Self {
            code: Vec::with_capacity(4096),
            finished: Vec::with_capacity(4096),
            aside: false,
            encoder: Encoder::new(64),
            origins: [0; 2],
            failed: false,
        }
    }

    /// Starts anew.
    pub(super) fn start(&mut self, origins: [u64; 2]) {
        self.code.clear();
        self.finished.clear();
        self.aside = false;
        self.origins = origins;
        self.failed = false;
    }

    /// What comes now is seldom executed.
    pub(super) fn step_aside(&mut self) {
        std::mem::swap(&mut self.code, &mut self.finished);
        self.aside = true;
    }

    /// The two parts.
    pub(super) fn parts(&self) -> [&[u8]; 2] {
        if self.aside { [&self.finished, &self.code] } else { [&self.code, &[]] }
    }

    pub(super) fn here(&self) -> usize {
        self.code.len() + if self.aside { ASIDE } else { 0 }
    }

    /// Where `offset` will be executed.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.origins[usize::from(offset >= ASIDE)] + (offset % ASIDE) as u64
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// An instruction in iced's form, without position-dependent operands.
    pub(super) fn guest(&mut self, insn: &Instruction) {
        self.encoder.set_buffer(std::mem::take(&mut self.code));
        let done = self.encoder.encode(insn, 0);
        self.code = self.encoder.take_buffer();
        self.failed |= done.is_err();
    }

    fn prefix(&mut self, width: Width, reg: Reg, index: Reg, base: Reg) {
        if width == Width::B2 {
            self.code.push(0x66);
        }
        let rex = u8::from(width == B8) << 3 | (reg >> 3 & 1) << 2 | (index >> 3 & 1) << 1 | base >> 3 & 1;
        if rex != 0 {
            self.code.push(0x40 | rex);
        }
    }

    fn rr(&mut self, width: Width, opcode: &[u8], reg: Reg, rm: Reg) {
        self.prefix(width, reg, 0, rm);
        self.bytes(opcode);
        self.code.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    fn rm(&mut self, width: Width, opcode: &[u8], reg: Reg, mem: Mem) {
        let index = mem.index.map_or(0, |i| i.0);
        self.prefix(width, reg, index, mem.base.unwrap_or(0));
        self.bytes(opcode);
        self.modrm(reg, mem);
    }

    /// The same relative to GS.
    fn rm_gs(&mut self, width: Width, opcode: &[u8], reg: Reg, mem: Mem) {
        self.code.push(0x65);
        self.rm(width, opcode, reg, mem);
    }

    fn modrm(&mut self, reg: Reg, mem: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            // No base: a SIB byte with base 5, and 32 bits of displacement.
            let (index, scale) = mem.index.unwrap_or((RSP, 0));
            self.bytes(&[reg | 4, scale << 6 | (index & 7) << 3 | 5]);
            self.imm32(mem.disp);
            return;
        };
        let short = i8::try_from(mem.disp).is_ok();
        let mode = match (mem.disp, short) {
            (0, _) if base & 7 != RBP => 0x00,
            (_, true) => 0x40,
            _ => 0x80,
        };
        match mem.index {
            Some((index, scale)) => {
                self.bytes(&[mode | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
            }
            None if base & 7 == RSP => self.bytes(&[mode | reg | 4, 0x24]),
            None => self.code.push(mode | reg | base & 7),
        }
        match mode {
            0x40 => self.code.push(mem.disp as u8),
            0x80 => self.imm32(mem.disp),
            _ => {}
        }
    }

    pub(super) fn mov(&mut self, width: Width, to: Reg, from: Reg) {
        if to != from || width != B8 {
            self.rr(width, &[0x8b], to, from);
        }
    }

    pub(super) fn load(&mut self, width: Width, to: Reg, mem: Mem) {
        self.rm(width, &[0x8b], to, mem);
    }

    pub(super) fn load_gs(&mut self, to: Reg, mem: Mem) {
        self.rm_gs(B8, &[0x8b], to, mem);
    }

    pub(super) fn load_u8(&mut self, to: Reg, mem: Mem) {
        self.rm(B4, &[0x0f, 0xb6], to, mem);
    }

    pub(super) fn load_u16(&mut self, to: Reg, mem: Mem) {
        self.rm(B4, &[0x0f, 0xb7], to, mem);
    }

    /// Stores the low byte of RAX, RCX, RDX or RBX.
    pub(super) fn store_u8(&mut self, mem: Mem, from: Reg) {
        self.rm(B4, &[0x88], from, mem);
    }

    pub(super) fn store(&mut self, width: Width, mem: Mem, from: Reg) {
        self.rm(width, &[0x89], from, mem);
    }

    /// A sign-extended 32-bit value.
    pub(super) fn store_imm(&mut self, mem: Mem, value: i32) {
        self.rm(B8, &[0xc7], 0, mem);
        self.imm32(value);
    }

    pub(super) fn ldmxcsr(&mut self, mem: Mem) {
        self.rm(B4, &[0x0f, 0xae], 2, mem);
    }

    pub(super) fn stmxcsr(&mut self, mem: Mem) {
        self.rm(B4, &[0x0f, 0xae], 3, mem);
    }

    /// Moves a vector register whole (`wide`: 32 bytes) from or to memory, of any alignment.
    pub(super) fn move_vector(&mut self, number: u8, mem: Mem, wide: bool, opcode: MoveVector) {
        if !wide {
            return self.rm(B4, &[0x0f, opcode as u8], number, mem);
        }
        // VEX.256.0F.WIG: R is inverted, base and index are not extended.
        self.bytes(&[0xc5, if number < 8 { 0xfc } else { 0x7c }, opcode as u8]);
        self.modrm(number, mem);
    }

    pub(super) fn lea(&mut self, width: Width, to: Reg, mem: Mem) {
        self.rm(width, &[0x8d], to, mem);
    }

    pub(super) fn set(&mut self, to: Reg, value: u64) {
        if let Ok(short) = u32::try_from(value) {
            self.set32(to, short);
        } else {
            self.set64(to, value);
        }
    }

    /// The same in the long form, whatever the value.
    pub(super) fn set64(&mut self, to: Reg, value: u64) {
        self.prefix(B8, 0, 0, to);
        self.code.push(0xb8 | to & 7);
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn set32(&mut self, to: Reg, value: u32) {
        self.prefix(B4, 0, 0, to);
        self.code.push(0xb8 | to & 7);
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn alu(&mut self, width: Width, alu: Alu, to: Reg, from: Reg) {
        self.rr(width, &[(alu as u8) << 3 | 3], to, from);
    }

    pub(super) fn alu_load(&mut self, width: Width, alu: Alu, to: Reg, mem: Mem) {
        self.rm(width, &[(alu as u8) << 3 | 3], to, mem);
    }

    pub(super) fn add_gs(&mut self, to: Reg, mem: Mem) {
        self.rm_gs(B8, &[(Alu::Add as u8) << 3 | 3], to, mem);
    }

    pub(super) fn alu_imm(&mut self, width: Width, alu: Alu, to: Reg, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.rr(width, &[0x83], alu as u8, to);
            self.code.push(short as u8);
        } else {
            self.rr(width, &[0x81], alu as u8, to);
            self.imm32(value);
        }
    }

    pub(super) fn alu_mem_imm(&mut self, width: Width, alu: Alu, mem: Mem, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.rm(width, &[0x83], alu as u8, mem);
            self.code.push(short as u8);
        } else {
            self.alu_mem_imm32(width, alu, mem, value);
        }
    }

    /// The same in the long form, whatever the value.
    pub(super) fn alu_mem_imm32(&mut self, width: Width, alu: Alu, mem: Mem, value: i32) {
        self.rm(width, &[0x81], alu as u8, mem);
        self.imm32(value);
    }

    /// TEST of a 32-bit register.
    pub(super) fn test_imm(&mut self, reg: Reg, value: u32) {
        self.rr(B4, &[0xf7], 0, reg);
        self.imm32(value as i32);
    }

    /// TEST of 32 bits of memory.
    pub(super) fn test_mem_imm(&mut self, mem: Mem, value: u32) {
        self.rm(B4, &[0xf7], 0, mem);
        self.imm32(value as i32);
    }

    pub(super) fn shr32(&mut self, to: Reg, count: u8) {
        self.rr(B4, &[0xc1], 5, to);
        self.code.push(count);
    }

    pub(super) fn shl32(&mut self, to: Reg, count: u8) {
        self.rr(B4, &[0xc1], 4, to);
        self.code.push(count);
    }

    /// PEXT, of BMI2: the bits that `mask` selects, close together. Leaves the flags alone.
    pub(super) fn pext(&mut self, width: Width, to: Reg, from: Reg, mask: Mem) {
        let base = mask.base.unwrap_or(0);
        let extensions = (!to >> 3 & 1) << 7 | 1 << 6 | (!base >> 3 & 1) << 5;
        let wide = u8::from(width == B8) << 7;
        self.bytes(&[0xc4, extensions | 2, wide | (!from & 15) << 3 | 2, 0xf5]);
        self.modrm(to, mask);
    }

    /// Over the jump that must come next, if RCX is zero.
    pub(super) fn jrcxz_over_jump(&mut self) {
        self.bytes(&[0xe3, 5]);
    }

    /// WRGSBASE, of FSGSBASE.
    pub(super) fn write_gs_base(&mut self, from: Reg) {
        self.bytes(&[0xf3, 0x48 | from >> 3, 0x0f, 0xae, 0xc0 | 3 << 3 | from & 7]);
    }

    pub(super) fn test32(&mut self, a: Reg, b: Reg) {
        self.rr(B4, &[0x85], a, b);
    }

    pub(super) fn push(&mut self, reg: Reg) {
        self.prefix(B4, 0, 0, reg);
        self.code.push(0x50 | reg & 7);
    }

    pub(super) fn pop(&mut self, reg: Reg) {
        self.prefix(B4, 0, 0, reg);
        self.code.push(0x58 | reg & 7);
    }

    pub(super) fn jump_register(&mut self, reg: Reg) {
        self.rr(B4, &[0xff], 4, reg);
    }

    pub(super) fn jump_memory(&mut self, mem: Mem) {
        self.rm(B4, &[0xff], 4, mem);
    }

    pub(super) fn call_register(&mut self, reg: Reg) {
        self.rr(B4, &[0xff], 2, reg);
    }

    pub(super) fn jcc(&mut self, condition: u8) -> Fixup {
        self.bytes(&[0x0f, 0x80 | condition & 15]);
        self.imm32(0);
        Fixup(self.here() - 4)
    }

    pub(super) fn jmp(&mut self) -> Fixup {
        self.code.push(0xe9);
        self.imm32(0);
        Fixup(self.here() - 4)
    }

    /// Pads with NOPs until the displacement of a jump with `opcode` bytes of opcode is aligned, so that it can be
    /// changed by one store.
    pub(super) fn align_displacement(&mut self, opcode: usize) {
        const NOPS: [&[u8]; 4] = [&[], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00]];
        let short = (4 - (self.here() + opcode) % 4) % 4;
        self.bytes(NOPS[short]);
    }

    pub(super) fn bind(&mut self, fixup: Fixup) {
        let here = self.here();
        self.bind_to(fixup, here);
    }

    pub(super) fn bind_to(&mut self, fixup: Fixup, target: usize) {
        let relative = self.address(target).wrapping_sub(self.address(fixup.0) + 4) as i32;
        let in_first = fixup.0 < ASIDE;
        let code = if in_first && self.aside { &mut self.finished } else { &mut self.code };
        code[fixup.0 % ASIDE..][..4].copy_from_slice(&relative.to_le_bytes());
    }

    pub(super) fn jump_back(&mut self, target: usize) {
        let fixup = self.jmp();
        self.bind_to(fixup, target);
    }

    fn relative(&self, address: u64) -> i32 {
        address.wrapping_sub(self.address(self.here() + 4)) as i32
    }

    pub(super) fn jump_to(&mut self, address: u64) {
        self.code.push(0xe9);
        let relative = self.relative(address);
        self.imm32(relative);
    }

    pub(super) fn jcc_to(&mut self, condition: u8, address: u64) {
        self.bytes(&[0x0f, 0x80 | condition & 15]);
        let relative = self.relative(address);
        self.imm32(relative);
    }

    pub(super) fn call_to(&mut self, address: u64) {
        self.code.push(0xe8);
        let relative = self.relative(address);
        self.imm32(relative);
    }
}
