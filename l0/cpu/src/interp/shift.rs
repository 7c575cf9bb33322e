//! Shifts, rotates, double shifts.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Addressing, Checked, Flat};
use super::arith::{by_width, width};
use super::host::{Int, Status, WideInt};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Handler, Op};
use crate::trap::Exec;

/// One of the shifts and rotates by a count.
trait Shift: 'static {
    fn run<T: Int>(s: &mut Status, a: T, count: u8) -> T;
}

macro_rules! shifts {
    ($($name:ident $f:ident),+) => {$(
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Int>(s: &mut Status, a: T, count: u8) -> T {
                T::$f(s, a, count)
            }
        }
    )+};
}
shifts!(Rol rol, Ror ror, Rcl rcl, Rcr rcr, Shl shl, Shr shr, Sar sar);

/// The count of a shift is masked to 5 bits, 6 for 64-bit operands.
#[inline(always)]
fn mask(count: u8, size: usize) -> u8 {
    count & if size == 8 { 63 } else { 31 }
}

fn reg_imm<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let r = O::run(&mut cpu.state.status, a, mask(op.imm as u8, T::SIZE));
    cpu.set_reg(op.dst, r);
    Ok(())
}

fn reg_cl<O: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.reg::<T>(op.dst);
    let count = mask(cpu.reg::<u8>(8), T::SIZE);
    let r = O::run(&mut cpu.state.status, a, count);
    cpu.set_reg(op.dst, r);
    Ok(())
}

fn mem_imm<O: Shift, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, true)?;
    let count = mask(op.imm as u8, T::SIZE);
    cpu.modify::<T>(linear, |s, a| O::run(s, a, count))
}

fn mem_cl<O: Shift, T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, true)?;
    let count = mask(cpu.reg::<u8>(8), T::SIZE);
    cpu.modify::<T>(linear, |s, a| O::run(s, a, count))
}

fn single<O: Shift>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    let bits = width(insn, 0);
    let by_cl = insn.op1_kind() == OpKind::Register;
    if !by_cl {
        op.imm = insn.immediate(1);
    }
    if insn.op0_kind() == OpKind::Register {
        op.dst = offset_of(insn.op0_register())?.0;
        return Some(if by_cl { by_width!(bits, reg_cl, O) } else { by_width!(bits, reg_imm, O) });
    }
    Some(if by_cl {
        by_width!(bits, mem_cl, O; addressing flat)
    } else {
        by_width!(bits, mem_imm, O; addressing flat)
    })
}

#[inline(always)]
fn double_shift<const LEFT: bool, T: WideInt>(s: &mut Status, a: T, b: T, count: u8) -> T {
    if LEFT { T::shld(s, a, b, count) } else { T::shrd(s, a, b, count) }
}

/// The count: CL when `op.extra` is set, else the immediate.
fn double_count<T: Int>(cpu: &Cpu, op: &Op) -> u8 {
    mask(if op.extra != 0 { cpu.reg::<u8>(8) } else { op.imm as u8 }, T::SIZE)
}

fn double_reg<const LEFT: bool, T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b, count) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src), double_count::<T>(cpu, op));
    let r = double_shift::<LEFT, T>(&mut cpu.state.status, a, b, count);
    cpu.set_reg(op.dst, r);
    Ok(())
}

fn double_mem<const LEFT: bool, T: WideInt>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    let (b, count) = (cpu.reg::<T>(op.src), double_count::<T>(cpu, op));
    cpu.modify::<T>(linear, |s, a| double_shift::<LEFT, T>(s, a, b, count))
}

fn double<const LEFT: bool>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    op.src = offset_of(insn.op1_register())?.0;
    op.extra = u8::from(insn.op2_kind() == OpKind::Register);
    if op.extra == 0 {
        op.imm = insn.immediate(2);
    }
    let bits = width(insn, 0);
    if insn.op0_kind() == OpKind::Register {
        op.dst = offset_of(insn.op0_register())?.0;
        return Some(match bits {
            16 => double_reg::<LEFT, u16>,
            32 => double_reg::<LEFT, u32>,
            _ => double_reg::<LEFT, u64>,
        });
    }
    Some(match bits {
        16 => double_mem::<LEFT, u16>,
        32 => double_mem::<LEFT, u32>,
        _ => double_mem::<LEFT, u64>,
    })
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Rol => single::<Rol>(insn, op, flat),
        Mnemonic::Ror => single::<Ror>(insn, op, flat),
        Mnemonic::Rcl => single::<Rcl>(insn, op, flat),
        Mnemonic::Rcr => single::<Rcr>(insn, op, flat),
        Mnemonic::Shl | Mnemonic::Sal => single::<Shl>(insn, op, flat),
        Mnemonic::Shr => single::<Shr>(insn, op, flat),
        Mnemonic::Sar => single::<Sar>(insn, op, flat),
        Mnemonic::Shld => double::<true>(insn, op),
        Mnemonic::Shrd => double::<false>(insn, op),
        _ => None,
    }
}
