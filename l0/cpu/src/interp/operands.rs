//! Operands of instructions in iced's form, for the families that are not worth a handler per shape.
//!
//! Unsafe island (register file): any `u8` byte offset is in bounds of the file for eight bytes.

use iced_x86::{Instruction, OpKind, Register};
use x86defs::vector;

use crate::Cpu;
use crate::op::Cold;
use crate::phys::Word;
use crate::state::{SLOT_BLOCK_IP, Seg};
use crate::trap::{Exec, Fault};

impl Cpu {
    /// Reads the register at a byte offset of the register file.
    #[inline(always)]
    pub(crate) fn reg<T: Word>(&self, offset: u8) -> T {
        let file = (&raw const self.state.gpr.raw).cast::<u8>();
        // SAFETY: offset + 8 <= 33 * 8, the size of the file.
        unsafe { file.add(offset as usize).cast::<T>().read_unaligned() }
    }

    /// Writes the register at a byte offset; a 32-bit write clears the upper half, as the architecture has it.
    #[inline(always)]
    pub(crate) fn set_reg<T: Word>(&mut self, offset: u8, value: T) {
        let file = (&raw mut self.state.gpr.raw).cast::<u8>();
        // SAFETY: offset + 8 <= 33 * 8, the size of the file.
        unsafe {
            if T::SIZE == 4 {
                file.add(offset as usize).cast::<u64>().write_unaligned(value.to_u64());
            } else {
                file.add(offset as usize).cast::<T>().write_unaligned(value);
            }
        }
    }

    /// The instruction pointer (offset in CS) at the start of the running block.
    #[inline(always)]
    pub(crate) fn block_ip(&self) -> u64 {
        self.reg(SLOT_BLOCK_IP)
    }

    /// Truncates an instruction pointer to the code segment's width.
    #[inline(always)]
    pub(crate) fn wrap_ip(&self, ip: u64) -> u64 {
        match self.code_bits {
            64 => ip,
            32 => ip & 0xffff_ffff,
            _ => ip & 0xffff,
        }
    }

    /// The instruction pointer of an instruction decoded relative to its block.
    pub fn ip_of(&self, insn: &Instruction) -> u64 {
        self.wrap_ip(self.block_ip().wrapping_add(insn.ip()))
    }

    /// The instruction pointer past it.
    pub fn next_ip(&self, insn: &Instruction) -> u64 {
        self.wrap_ip(self.block_ip().wrapping_add(insn.next_ip()))
    }

    /// Target of a near branch, truncated by the operand size.
    pub fn branch_target(&self, insn: &Instruction) -> u64 {
        let target = self.block_ip().wrapping_add(insn.near_branch_target());
        match insn.op0_kind() {
            OpKind::NearBranch16 => target & 0xffff,
            OpKind::NearBranch32 => target & 0xffff_ffff,
            _ => target,
        }
    }

    /// A register operand's value, zero-extended (general registers, segment selectors).
    pub fn read_register(&self, register: Register) -> u64 {
        if register.is_segment_register() {
            return u64::from(self.state.segments[register.number() % 6].selector);
        }
        match offset_of(register) {
            Some((offset, 1)) => u64::from(self.reg::<u8>(offset)),
            Some((offset, 2)) => u64::from(self.reg::<u16>(offset)),
            Some((offset, 4)) => u64::from(self.reg::<u32>(offset)),
            Some((offset, _)) => self.reg::<u64>(offset),
            None => 0,
        }
    }

    /// Writes a general register with its own width (32-bit writes clear the upper half).
    pub fn write_register(&mut self, register: Register, value: u64) {
        match offset_of(register) {
            Some((offset, 1)) => self.set_reg(offset, value as u8),
            Some((offset, 2)) => self.set_reg(offset, value as u16),
            Some((offset, 4)) => self.set_reg(offset, value as u32),
            Some((offset, _)) => self.set_reg(offset, value),
            None => {}
        }
    }

    /// The effective address (offset in its segment) of the memory operand, truncated to the address size.
    pub fn effective_address(&self, insn: &Instruction) -> u64 {
        let base = insn.memory_base();
        let mut address = insn.memory_displacement64();
        let bits = address_bits(insn);
        if insn.is_ip_rel_memory_operand() {
            // iced has added the instruction's address, which is relative to the block's start.
            address = self.block_ip().wrapping_add(insn.ip_rel_memory_address());
        } else {
            address = address.wrapping_add(self.read_register(base));
            let index = insn.memory_index();
            if index != Register::None {
                let factor = u64::from(insn.memory_index_scale());
                address = address.wrapping_add(self.read_register(index).wrapping_mul(factor));
            }
        }
        match bits {
            16 => address & 0xffff,
            32 => address & 0xffff_ffff,
            _ => address,
        }
    }

    /// Linear address of the memory operand after the segment's checks for `size` bytes.
    pub fn operand_linear(&mut self, insn: &Instruction, size: usize, write: bool) -> Exec<u64> {
        let offset = self.effective_address(insn);
        let seg = memory_segment(insn);
        let linear = self.linear(seg, offset, size, write)?;
        if seg == Seg::Ss && self.code_bits == 64 {
            let last = linear.wrapping_add(size.max(1) as u64 - 1);
            if !self.is_canonical(linear) || !self.is_canonical(last) {
                return Err(self.raise(Fault::with_code(vector::SS, 0)));
            }
        }
        Ok(linear)
    }

    /// Reads operand `index`, a general register, immediate or memory, as a zero-extended value of `size` bytes.
    pub fn read_operand(&mut self, cold: &Cold, index: u32, size: usize) -> Exec<u64> {
        let insn = &cold.insn;
        match insn.op_kind(index) {
            OpKind::Register => Ok(self.read_register(insn.op_register(index))),
            OpKind::Memory => {
                let linear = self.operand_linear(insn, size, false)?;
                self.load_sized(linear, size)
            }
            _ => Ok(insn.immediate(index)),
        }
    }

    /// Writes operand `index`, a general register or memory, with `size` bytes.
    pub fn write_operand(&mut self, cold: &Cold, index: u32, size: usize, value: u64) -> Exec {
        let insn = &cold.insn;
        if insn.op_kind(index) == OpKind::Register {
            self.write_register(insn.op_register(index), value);
            return Ok(());
        }
        let linear = self.operand_linear(insn, size, true)?;
        self.store_sized(linear, size, value)
    }

    /// Reads 1, 2, 4 or 8 bytes, zero-extended.
    pub fn load_sized(&mut self, linear: u64, size: usize) -> Exec<u64> {
        Ok(match size {
            1 => u64::from(self.load::<u8>(linear)?),
            2 => u64::from(self.load::<u16>(linear)?),
            4 => u64::from(self.load::<u32>(linear)?),
            _ => self.load::<u64>(linear)?,
        })
    }

    /// Writes 1, 2, 4 or 8 bytes.
    pub fn store_sized(&mut self, linear: u64, size: usize, value: u64) -> Exec {
        match size {
            1 => self.store(linear, value as u8),
            2 => self.store(linear, value as u16),
            4 => self.store(linear, value as u32),
            _ => self.store(linear, value),
        }
    }

    /// True when the stack pointer is 64, 32 or 16 bits wide: its mask.
    #[inline(always)]
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.code_bits == 64 {
            u64::MAX
        } else if self.state.seg(Seg::Ss).access & x86defs::segment::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Pushes `size` bytes (2, 4 or 8); RSP changes only if the write succeeds.
    pub fn push_sized(&mut self, size: usize, value: u64) -> Exec {
        let mask = self.stack_mask();
        let rsp = self.state.gpr.get(crate::state::reg::RSP);
        let new = rsp.wrapping_sub(size as u64) & mask;
        let linear = self.stack_address(new, size, true)?;
        self.store_sized(linear, size, value)?;
        self.set_stack_pointer(new, mask);
        Ok(())
    }

    /// Pops `size` bytes (2, 4 or 8); RSP changes only if the read succeeds.
    pub fn pop_sized(&mut self, size: usize) -> Exec<u64> {
        let mask = self.stack_mask();
        let rsp = self.state.gpr.get(crate::state::reg::RSP) & mask;
        let linear = self.stack_address(rsp, size, false)?;
        let value = self.load_sized(linear, size)?;
        self.set_stack_pointer(rsp.wrapping_add(size as u64) & mask, mask);
        Ok(value)
    }

    /// Linear address of a stack access: SS's checks, #SS for non-canonical addresses.
    #[inline(always)]
    pub fn stack_address(&mut self, offset: u64, size: usize, write: bool) -> Exec<u64> {
        let linear = self.linear(Seg::Ss, offset, size, write)?;
        let last = linear.wrapping_add(size.max(1) as u64 - 1);
        if self.code_bits == 64 && !(self.is_canonical(linear) && self.is_canonical(last)) {
            return Err(self.raise(Fault::with_code(vector::SS, 0)));
        }
        Ok(linear)
    }

    /// Sets the part of RSP that `mask` covers.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, value: u64, mask: u64) {
        let rsp = self.state.gpr.get(crate::state::reg::RSP);
        // A 32-bit stack pointer is written as a 32-bit register is: the upper half is cleared.
        let kept = if mask == 0xffff { rsp & !mask } else { 0 };
        self.state.gpr.set(crate::state::reg::RSP, kept | value & mask);
    }
}

/// Byte offset in the register file and width of a general register.
pub(crate) fn offset_of(register: Register) -> Option<(u8, u8)> {
    if !register.is_gpr() {
        return None;
    }
    let size = register.size() as u8;
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    let number = register.full_register().number() as u8;
    Some((number * 8 + u8::from(high), size))
}

/// The segment register; DS for none.
pub(crate) fn segment_of(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

/// The segment of the memory operand. In 64-bit code CS, DS, ES and SS overrides mean nothing: what the base
/// register implies stays, which decides between #SS and #GP for a non-canonical address.
pub(crate) fn memory_segment(insn: &Instruction) -> Seg {
    let segment = segment_of(insn.memory_segment());
    if insn.code_size() != iced_x86::CodeSize::Code64 || matches!(segment, Seg::Fs | Seg::Gs) {
        return segment;
    }
    match insn.memory_base() {
        Register::RSP | Register::ESP | Register::RBP | Register::EBP => Seg::Ss,
        _ => Seg::Ds,
    }
}

/// Address size of the memory operand in bits.
pub(crate) fn address_bits(insn: &Instruction) -> u32 {
    let base = insn.memory_base();
    let index = insn.memory_index();
    for register in [base, index] {
        match register {
            Register::None => {}
            Register::EIP => return 32,
            Register::RIP => return 64,
            r if r.is_gpr16() => return 16,
            r if r.is_gpr32() => return 32,
            r if r.is_gpr64() => return 64,
            // A vector index (VSIB) says nothing.
            _ => {}
        }
    }
    match insn.memory_displ_size() {
        2 => 16,
        8 => 64,
        4 if insn.code_size() == iced_x86::CodeSize::Code64 => 32,
        4 => 32,
        _ => 64,
    }
}
