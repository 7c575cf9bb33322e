//! Near branches: JMP, Jcc, CALL, RET, LOOP, JCXZ. Each is the last instruction of its block.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86defs::vector;

use super::address::{Addressing, Checked};
use super::host::{ZF, condition};
use super::mov::{by_condition, condition_of};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Handler, Op};
use crate::state::{Seg, reg};
use crate::trap::{Exec, Fault};

impl Cpu {
    /// Checks a branch target: the code segment's limit, or canonical form in 64-bit code.
    #[inline(always)]
    pub(crate) fn check_target(&mut self, target: u64) -> Exec {
        let fine = if self.code_bits == 64 {
            self.is_canonical(target)
        } else {
            target <= u64::from(self.state.seg(Seg::Cs).limit)
        };
        if fine { Ok(()) } else { Err(self.raise(Fault::with_code(vector::GP, 0))) }
    }

    /// Target of a direct branch, truncated by its operand size.
    #[inline(always)]
    fn direct_target(&mut self, op: &Op) -> Exec<u64> {
        let target = self.block_ip().wrapping_add(op.imm);
        if op.extra == 8 {
            return Ok(target);
        }
        let target = target & if op.extra == 4 { 0xffff_ffff } else { 0xffff };
        self.check_target(target)?;
        Ok(target)
    }
}

fn jmp(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.state.rip = cpu.direct_target(op)?;
    Ok(())
}

fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if condition::<CC>(cpu.state.status) {
        cpu.state.rip = cpu.direct_target(op)?;
    }
    Ok(())
}

fn call(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = cpu.direct_target(op)?;
    let back = cpu.wrap_ip(cpu.block_ip().wrapping_add(u64::from(op.next)));
    if op.extra == 8 {
        cpu.push64(back)?
    } else {
        cpu.push_sized(op.extra as usize, back)?
    }
    cpu.state.rip = target;
    Ok(())
}

/// Target of an indirect branch: a register, or memory when `op.dst` says so.
#[inline(always)]
fn indirect_target<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    let size = op.extra as usize;
    let target = if MEMORY {
        let linear = Checked::linear(cpu, op, size, false)?;
        cpu.load_sized(linear, size)?
    } else {
        cpu.reg::<u64>(op.src)
    };
    let target = match size {
        2 => target & 0xffff,
        4 => target & 0xffff_ffff,
        _ => target,
    };
    cpu.check_target(target)?;
    Ok(target)
}

fn jmp_indirect<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.state.rip = indirect_target::<MEMORY>(cpu, op)?;
    Ok(())
}

fn call_indirect<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = indirect_target::<MEMORY>(cpu, op)?;
    let back = cpu.wrap_ip(cpu.block_ip().wrapping_add(u64::from(op.next)));
    cpu.push_sized(op.extra as usize, back)?;
    cpu.state.rip = target;
    Ok(())
}

/// RET, with `op.imm` more bytes to release.
fn ret(cpu: &mut Cpu, op: &Op) -> Exec {
    let before = cpu.state.gpr.get(reg::RSP);
    let target = if op.extra == 8 { cpu.pop64()? } else { cpu.pop_sized(op.extra as usize)? };
    if let Err(trap) = cpu.check_target(target) {
        cpu.state.gpr.set(reg::RSP, before);
        return Err(trap);
    }
    if op.imm != 0 {
        let mask = cpu.stack_mask();
        let rsp = cpu.state.gpr.get(reg::RSP).wrapping_add(op.imm);
        cpu.set_stack_pointer(rsp & mask, mask);
    }
    cpu.state.rip = target;
    Ok(())
}

/// RCX, ECX or CX by the address size.
fn count(cpu: &Cpu, op: &Op) -> u64 {
    match op.address_bits {
        16 => u64::from(cpu.reg::<u16>(8)),
        32 => u64::from(cpu.reg::<u32>(8)),
        _ => cpu.reg::<u64>(8),
    }
}

/// LOOP, LOOPE, LOOPNE (`op.dst` 0, 1, 2).
fn loop_(cpu: &mut Cpu, op: &Op) -> Exec {
    let left = count(cpu, op).wrapping_sub(1);
    let left = if op.address_bits == 64 { left } else { left & ((1 << op.address_bits) - 1) };
    let zero = cpu.state.status & ZF != 0;
    let wanted = match op.dst {
        1 => zero,
        2 => !zero,
        _ => true,
    };
    if left != 0 && wanted {
        cpu.state.rip = cpu.direct_target(op)?;
    }
    match op.address_bits {
        16 => cpu.set_reg(8, left as u16),
        32 => cpu.set_reg(8, left as u32),
        _ => cpu.set_reg(8, left),
    }
    Ok(())
}

fn jcxz(cpu: &mut Cpu, op: &Op) -> Exec {
    if count(cpu, op) == 0 {
        cpu.state.rip = cpu.direct_target(op)?;
    }
    Ok(())
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 if insn.op_count() == 1 => {
            op.extra = match insn.op0_kind() {
                OpKind::NearBranch16 => 2,
                OpKind::NearBranch32 => 4,
                _ => 8,
            };
            op.imm = insn.near_branch_target();
            if op.extra == 4 {
                op.imm = op.imm as i32 as u64;
            }
            op.address_bits = counter_bits(insn);
        }
        _ => {}
    }
    Some(match insn.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => return jump_or_call(insn, op),
        Mnemonic::Ret => {
            op.extra = match insn.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            op.imm = if insn.op_count() > 0 { u64::from(insn.immediate16()) } else { 0 };
            ret
        }
        Mnemonic::Loop => loop_,
        Mnemonic::Loope => {
            op.dst = 1;
            loop_
        }
        Mnemonic::Loopne => {
            op.dst = 2;
            loop_
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => jcxz,
        _ if insn.is_jcc_short_or_near() => {
            let cc = condition_of(insn)?;
            by_condition!(cc, jcc)
        }
        _ => return None,
    })
}

fn jump_or_call(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let jump = insn.mnemonic() == Mnemonic::Jmp;
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Some(if jump { jmp } else { call })
        }
        OpKind::Register => {
            let (offset, size) = offset_of(insn.op0_register())?;
            op.src = offset;
            op.extra = size;
            Some(if jump { jmp_indirect::<false> } else { call_indirect::<false> })
        }
        OpKind::Memory if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() => {
            op.extra = insn.memory_size().size() as u8;
            Some(if jump { jmp_indirect::<true> } else { call_indirect::<true> })
        }
        _ => None,
    }
}

/// Width of the counter that LOOP and JCXZ use: the address size.
fn counter_bits(insn: &Instruction) -> u8 {
    use Code::*;
    match insn.code() {
        Jcxz_rel8_16 | Jcxz_rel8_32 | Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX
        | Loope_rel8_32_CX | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 16,
        Jecxz_rel8_16 | Jecxz_rel8_32 | Jecxz_rel8_64 | Loop_rel8_16_ECX | Loop_rel8_32_ECX
        | Loop_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX | Loope_rel8_64_ECX
        | Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX => 32,
        _ => 64,
    }
}
