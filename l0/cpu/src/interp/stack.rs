//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Addressing, Checked};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Cold, ColdHandler, Handler, Op};
use crate::state::reg::{RBP, RSP};
use crate::trap::Exec;

impl Cpu {
    /// PUSH in 64-bit code.
    #[inline(always)]
    pub(crate) fn push64(&mut self, value: u64) -> Exec {
        let new = self.state.gpr.get(RSP).wrapping_sub(8);
        let at = self.stack_address(new, 8, true)?;
        self.store(at, value)?;
        self.state.gpr.set(RSP, new);
        Ok(())
    }

    /// POP in 64-bit code.
    #[inline(always)]
    pub(crate) fn pop64(&mut self) -> Exec<u64> {
        let rsp = self.state.gpr.get(RSP);
        let at = self.stack_address(rsp, 8, false)?;
        let value = self.load::<u64>(at)?;
        self.state.gpr.set(RSP, rsp.wrapping_add(8));
        Ok(value)
    }
}

fn push_reg64(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<u64>(op.src);
    cpu.push64(value)
}

fn pop_reg64(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.pop64()?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn push_imm64(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push64(op.imm)
}

/// PUSH of a register, `op.extra` bytes.
fn push_reg(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<u64>(op.src);
    cpu.push_sized(op.extra as usize, value)
}

fn push_imm(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push_sized(op.extra as usize, op.imm)
}

fn push_mem(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = op.extra as usize;
    let linear = Checked::linear(cpu, op, size, false)?;
    let value = cpu.load_sized(linear, size)?;
    cpu.push_sized(size, value)
}

fn pop_reg(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.pop_sized(op.extra as usize)?;
    match op.extra {
        2 => cpu.set_reg(op.dst, value as u16),
        4 => cpu.set_reg(op.dst, value as u32),
        _ => cpu.set_reg(op.dst, value),
    }
    Ok(())
}

/// POP to memory: an address based on RSP uses its value after the pop.
fn pop_mem(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = op.extra as usize;
    let before = cpu.state.gpr.get(RSP);
    let value = cpu.pop_sized(size)?;
    let stored = match Checked::linear(cpu, op, size, true) {
        Ok(linear) => cpu.store_sized(linear, size, value),
        Err(trap) => Err(trap),
    };
    if stored.is_err() {
        cpu.state.gpr.set(RSP, before);
    }
    stored
}

fn leave64(cpu: &mut Cpu, _: &Op) -> Exec {
    let rbp = cpu.state.gpr.get(RBP);
    let at = cpu.stack_address(rbp, 8, false)?;
    let value = cpu.load::<u64>(at)?;
    cpu.state.gpr.set(RSP, rbp.wrapping_add(8));
    cpu.state.gpr.set(RBP, value);
    Ok(())
}

/// Bytes that a stack instruction moves.
fn operand_bytes(insn: &Instruction) -> u8 {
    insn.stack_pointer_increment().unsigned_abs() as u8
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    op.extra = operand_bytes(insn);
    match insn.mnemonic() {
        Mnemonic::Push => match insn.op0_kind() {
            OpKind::Register => {
                op.src = offset_of(insn.op0_register())?.0;
                Some(if op.extra == 8 { push_reg64 } else { push_reg })
            }
            OpKind::Memory => Some(push_mem),
            _ => {
                op.imm = insn.immediate(0);
                Some(if op.extra == 8 { push_imm64 } else { push_imm })
            }
        },
        Mnemonic::Pop => match insn.op0_kind() {
            OpKind::Register => {
                op.dst = offset_of(insn.op0_register())?.0;
                Some(if op.extra == 8 { pop_reg64 } else { pop_reg })
            }
            _ => Some(pop_mem),
        },
        Mnemonic::Leave if insn.code() == iced_x86::Code::Leaveq => Some(leave64),
        _ => None,
    }
}

fn leave(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = if cold.insn.code() == iced_x86::Code::Leavew { 2 } else { 4 };
    let size = if cpu.code_bits == 64 && size == 4 { 8 } else { size };
    let mask = cpu.stack_mask();
    let before = cpu.state.gpr.get(RSP);
    let rbp = cpu.state.gpr.get(RBP);
    cpu.set_stack_pointer(rbp & mask, mask);
    match cpu.pop_sized(size) {
        Ok(value) => {
            cpu.set_sized_rbp(size, value);
            Ok(())
        }
        Err(trap) => {
            cpu.state.gpr.set(RSP, before);
            Err(trap)
        }
    }
}

impl Cpu {
    fn set_sized_rbp(&mut self, size: usize, value: u64) {
        match size {
            2 => self.set_reg(RBP as u8 * 8, value as u16),
            4 => self.set_reg(RBP as u8 * 8, value as u32),
            _ => self.set_reg(RBP as u8 * 8, value),
        }
    }
}

fn enter(cpu: &mut Cpu, cold: &Cold) -> Exec {
    use iced_x86::Code;
    let size = match cold.insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let before = cpu.state.gpr.get(RSP);
    let result = enter_frame(cpu, cold, size);
    if result.is_err() {
        cpu.state.gpr.set(RSP, before);
    }
    result
}

fn enter_frame(cpu: &mut Cpu, cold: &Cold, size: usize) -> Exec {
    let locals = u64::from(cold.insn.immediate16());
    let level = cold.insn.immediate8_2nd() & 31;
    let mask = cpu.stack_mask();
    let rbp = cpu.state.gpr.get(RBP);
    cpu.push_sized(size, rbp)?;
    let frame = cpu.state.gpr.get(RSP);
    let mut display = rbp;
    for i in 1..=level {
        if i < level {
            display = display.wrapping_sub(size as u64) & mask;
            let at = cpu.stack_address(display, size, false)?;
            let value = cpu.load_sized(at, size)?;
            cpu.push_sized(size, value)?;
        } else {
            cpu.push_sized(size, frame)?;
        }
    }
    let new = cpu.state.gpr.get(RSP).wrapping_sub(locals) & mask;
    // The new top of stack must be writable, as if something had been pushed there.
    let at = cpu.stack_address(new, size, true)?;
    cpu.probe_write(at, 1)?;
    cpu.set_stack_pointer(new, mask);
    cpu.set_sized_rbp(size, frame);
    Ok(())
}

fn pusha(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = if cold.insn.mnemonic() == Mnemonic::Pusha { 2 } else { 4 };
    let before = cpu.state.gpr.get(RSP);
    for i in 0..8 {
        let value = if i == RSP { before } else { cpu.state.gpr.get(i) };
        if let Err(trap) = cpu.push_sized(size, value) {
            cpu.state.gpr.set(RSP, before);
            return Err(trap);
        }
    }
    Ok(())
}

fn popa(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let size = if cold.insn.mnemonic() == Mnemonic::Popa { 2 } else { 4 };
    let before = cpu.state.gpr.get(RSP);
    let mut values = [0; 8];
    for value in values.iter_mut().rev() {
        match cpu.pop_sized(size) {
            Ok(v) => *value = v,
            Err(trap) => {
                cpu.state.gpr.set(RSP, before);
                return Err(trap);
            }
        }
    }
    for (i, value) in values.into_iter().enumerate().filter(|&(i, _)| i != RSP) {
        match size {
            2 => cpu.set_reg(i as u8 * 8, value as u16),
            _ => cpu.set_reg(i as u8 * 8, value as u32),
        }
    }
    Ok(())
}

/// Handler for the less frequent instructions of this family.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Leave => leave,
        Mnemonic::Enter => enter,
        Mnemonic::Pusha | Mnemonic::Pushad => pusha,
        Mnemonic::Popa | Mnemonic::Popad => popa,
        _ => return None,
    })
}
