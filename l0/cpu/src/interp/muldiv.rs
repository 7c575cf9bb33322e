//! MUL, IMUL, DIV, IDIV, and the decimal adjustments.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86defs::vector;

use super::address::{Addressing, Checked};
use super::arith::width;
use super::host::{CF, Int, OF, Status, WideInt, ZF};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Cold, ColdHandler, Handler, Op};
use crate::state::reg;
use crate::trap::{Exec, Fault};

const AF: Status = 1 << 12;

fn source<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec<T> {
    if op.extra != 0 {
        return Ok(cpu.reg::<T>(op.src));
    }
    let linear = Checked::linear(cpu, op, T::SIZE, false)?;
    cpu.load::<T>(linear)
}

/// `high:low` is AX for bytes, else DX:AX and so on.
fn set_pair<T: Int>(cpu: &mut Cpu, low: T, high: T) {
    if T::SIZE == 1 {
        cpu.set_reg(0, (high.to_u64() << 8 | low.to_u64()) as u16);
    } else {
        cpu.set_reg(0, low);
        cpu.set_reg(2 * 8, high);
    }
}

fn multiply<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = source::<T>(cpu, op)?;
    let a = cpu.reg::<T>(0);
    let status = &mut cpu.state.status;
    let (low, high) = if SIGNED { T::imul(status, a, b) } else { T::mul(status, a, b) };
    set_pair(cpu, low, high);
    Ok(())
}

fn divide<T: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = source::<T>(cpu, op)?;
    let low = cpu.reg::<T>(0);
    let high = if T::SIZE == 1 { cpu.reg::<T>(1) } else { cpu.reg::<T>(2 * 8) };
    let status = &mut cpu.state.status;
    let result = if SIGNED { T::idiv(status, low, high, b) } else { T::div(status, low, high, b) };
    let Some((quotient, remainder)) = result else {
        return Err(cpu.raise(Fault::plain(vector::DE)));
    };
    set_pair(cpu, quotient, remainder);
    Ok(())
}

fn imul3<T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = source::<T>(cpu, op)?;
    let r = T::imul2(&mut cpu.state.status, a, T::from_u64(op.imm));
    cpu.set_reg(op.dst, r);
    Ok(())
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    if !matches!(mnemonic, Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Div | Mnemonic::Idiv) {
        return None;
    }
    let operand = if insn.op_count() == 3 { 1 } else { 0 };
    if insn.op_kind(operand) == OpKind::Register {
        op.src = offset_of(insn.op_register(operand))?.0;
        op.extra = 1;
    }
    let bits = width(insn, operand);
    if operand == 1 {
        op.dst = offset_of(insn.op0_register())?.0;
        op.imm = insn.immediate(2);
        return Some(match bits {
            16 => imul3::<u16>,
            32 => imul3::<u32>,
            _ => imul3::<u64>,
        });
    }
    macro_rules! pick {
        ($f:ident, $signed:literal) => {
            match bits {
                8 => $f::<u8, $signed>,
                16 => $f::<u16, $signed>,
                32 => $f::<u32, $signed>,
                _ => $f::<u64, $signed>,
            }
        };
    }
    Some(match mnemonic {
        Mnemonic::Mul => pick!(multiply, false),
        Mnemonic::Imul => pick!(multiply, true),
        Mnemonic::Div => pick!(divide, false),
        _ => pick!(divide, true),
    })
}

/// SF, ZF and PF from AL, as the host's ALU gives them.
fn flags_of_al(cpu: &mut Cpu, al: u8, carry: bool, adjust: bool) {
    let mut status = 0;
    u8::or(&mut status, al, 0);
    status &= !(CF | AF | OF);
    cpu.state.status = status | if carry { CF } else { 0 } | if adjust { AF } else { 0 };
}

fn daa_das(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let subtract = cold.insn.mnemonic() == Mnemonic::Das;
    let old = cpu.reg::<u8>(0);
    let old_carry = cpu.state.status & CF != 0;
    let adjust = old & 15 > 9 || cpu.state.status & AF != 0;
    let (mut al, mut carry) = (old, false);
    let step = |al: u8, by: u8| if subtract { al.overflowing_sub(by) } else { al.overflowing_add(by) };
    if adjust {
        let (next, over) = step(al, 6);
        al = next;
        carry = old_carry || over;
    }
    if old > 0x99 || old_carry {
        al = step(al, 0x60).0;
        carry = true;
    } else if !subtract {
        carry = false;
    }
    cpu.set_reg(0, al);
    flags_of_al(cpu, al, carry, adjust);
    Ok(())
}

fn aaa_aas(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let adjust = ax & 15 > 9 || cpu.state.status & AF != 0;
    let mut new = ax;
    if adjust {
        new = if cold.insn.mnemonic() == Mnemonic::Aaa {
            ax.wrapping_add(0x106)
        } else {
            ax.wrapping_sub(6).wrapping_sub(0x100)
        };
    }
    cpu.set_reg(0, new & 0xff0f);
    // OF, SF, ZF and PF are undefined: kept.
    cpu.state.status = cpu.state.status & !(CF | AF) | if adjust { CF | AF } else { 0 };
    Ok(())
}

fn aam(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let base = cold.insn.immediate8();
    if base == 0 {
        return Err(cpu.raise(Fault::plain(vector::DE)));
    }
    let al = cpu.reg::<u8>(0);
    cpu.set_reg(0, u16::from(al / base) << 8 | u16::from(al % base));
    flags_of_al(cpu, al % base, false, false);
    Ok(())
}

fn aad(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(cold.insn.immediate8()));
    cpu.set_reg(0, u16::from(al));
    flags_of_al(cpu, al, false, false);
    Ok(())
}

/// SALC (undocumented, on every processor): AL = CF ? 0xff : 0.
fn salc(cpu: &mut Cpu, _: &Cold) -> Exec {
    let value = if cpu.state.status & CF != 0 { 0xffu8 } else { 0 };
    cpu.set_reg(0, value);
    Ok(())
}

/// CMPXCHG8B and CMPXCHG16B.
fn cmpxchg_pair(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let wide = cold.insn.mnemonic() == Mnemonic::Cmpxchg16b;
    let size = if wide { 16 } else { 8 };
    let linear = cpu.operand_linear(&cold.insn, size, true)?;
    let pair = |cpu: &Cpu, high: usize, low: usize| -> u128 {
        let (high, low) = (cpu.state.gpr.get(high), cpu.state.gpr.get(low));
        if wide {
            u128::from(high) << 64 | u128::from(low)
        } else {
            u128::from(high as u32) << 32 | u128::from(low as u32)
        }
    };
    let expected = pair(cpu, reg::RDX, reg::RAX);
    let new = pair(cpu, reg::RCX, reg::RBX);
    let seen = if wide {
        if linear & 15 != 0 {
            return Err(cpu.raise(Fault::gp(0)));
        }
        cpu.exchange16(linear, expected, new)?
    } else {
        let mut seen = 0;
        cpu.locked::<u64>(linear, |_, old| {
            seen = u128::from(old);
            if seen == expected { new as u64 } else { old }
        })?;
        seen
    };
    if seen == expected {
        cpu.state.status |= ZF;
    } else {
        cpu.state.status &= !ZF;
        if wide {
            cpu.state.gpr.set(reg::RDX, (seen >> 64) as u64);
            cpu.state.gpr.set(reg::RAX, seen as u64);
        } else {
            cpu.state.gpr.set(reg::RDX, (seen >> 32) as u64);
            cpu.state.gpr.set(reg::RAX, u64::from(seen as u32));
        }
    }
    Ok(())
}

/// Handler for the less frequent instructions of this family.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<ColdHandler> {
    Some(match insn.mnemonic() {
        Mnemonic::Daa | Mnemonic::Das => daa_das,
        Mnemonic::Aaa | Mnemonic::Aas => aaa_aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Salc => salc,
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => cmpxchg_pair,
        _ => return None,
    })
}
