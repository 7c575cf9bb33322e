//! MOV, MOVZX, MOVSX, MOVSXD, LEA, CMOVcc, SETcc, BSWAP, MOVBE, XLAT, and the sign extensions of the accumulator.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::address::{Addressing, Checked, Flat};
use super::arith::{by_width, width};
use super::host::{Int, condition};
use super::operands::offset_of;
use crate::Cpu;
use crate::op::{Handler, Op};
use crate::trap::Exec;

fn reg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.src);
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn reg_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.set_reg(op.dst, T::from_u64(op.imm));
    Ok(())
}

fn reg_mem<T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, false)?;
    let value = cpu.load::<T>(linear)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn mem_reg<T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.src);
    let linear = A::linear(cpu, op, T::SIZE, true)?;
    cpu.store(linear, value)
}

fn mem_imm<T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, T::SIZE, true)?;
    cpu.store(linear, T::from_u64(op.imm))
}

/// MOV between the accumulator and an absolute 64-bit address.
fn acc_absolute<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(super::address::seg_of(op), op.imm, T::SIZE, false)?;
    let value = cpu.load::<T>(linear)?;
    cpu.set_reg(0, value);
    Ok(())
}

fn absolute_acc<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.linear(super::address::seg_of(op), op.imm, T::SIZE, true)?;
    let value = cpu.reg::<T>(0);
    cpu.store(linear, value)
}

/// Moves with extension: source type, destination type, signed or not.
fn extend_reg<const SIGNED: bool, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<S>(op.src).to_u64();
    cpu.set_reg(op.dst, D::from_u64(sign::<SIGNED, S>(value)));
    Ok(())
}

fn extend_mem<const SIGNED: bool, S: Int, D: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = A::linear(cpu, op, S::SIZE, false)?;
    let value = cpu.load::<S>(linear)?.to_u64();
    cpu.set_reg(op.dst, D::from_u64(sign::<SIGNED, S>(value)));
    Ok(())
}

#[inline(always)]
fn sign<const SIGNED: bool, S: Int>(value: u64) -> u64 {
    let unused = 64 - S::BITS;
    if SIGNED { ((value << unused) as i64 >> unused) as u64 } else { value }
}

fn lea<T: Int, A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = A::offset(cpu, op);
    cpu.set_reg(op.dst, T::from_u64(offset));
    Ok(())
}

fn cmov_reg<const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // A 32-bit destination's upper half is cleared even if nothing is moved.
    let from = if condition::<CC>(cpu.state.status) { op.src } else { op.dst };
    let value = cpu.reg::<T>(from);
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn cmov_mem<const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // The source is read whatever the condition.
    let linear = Checked::linear(cpu, op, T::SIZE, false)?;
    let loaded = cpu.load::<T>(linear)?;
    let value = if condition::<CC>(cpu.state.status) { loaded } else { cpu.reg::<T>(op.dst) };
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn set_reg<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = u8::from(condition::<CC>(cpu.state.status));
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn set_mem<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, 1, true)?;
    cpu.store(linear, u8::from(condition::<CC>(cpu.state.status)))
}

fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<u64>(op.dst).swap_bytes() >> (64 - T::BITS);
    // With a 16-bit operand the result is undefined; zero is what processors give.
    let value = if T::SIZE == 2 { 0 } else { value };
    cpu.set_reg(op.dst, T::from_u64(value));
    Ok(())
}

fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = Checked::linear(cpu, op, T::SIZE, false)?;
    let value = cpu.load::<T>(linear)?.to_u64().swap_bytes() >> (64 - T::BITS);
    cpu.set_reg(op.dst, T::from_u64(value));
    Ok(())
}

fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.src).to_u64().swap_bytes() >> (64 - T::BITS);
    let linear = Checked::linear(cpu, op, T::SIZE, true)?;
    cpu.store(linear, T::from_u64(value))
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Exec {
    // The base is (E/R)BX, the index AL.
    let offset = cpu.reg::<u64>(3 * 8).wrapping_add(u64::from(cpu.reg::<u8>(0)));
    let offset = match op.address_bits {
        16 => offset & 0xffff,
        32 => offset & 0xffff_ffff,
        _ => offset,
    };
    let linear = cpu.linear(super::address::seg_of(op), offset, 1, false)?;
    let value = cpu.load::<u8>(linear)?;
    cpu.set_reg(0, value);
    Ok(())
}

/// CBW, CWDE, CDQE: AL/AX/EAX sign-extended into the double width.
fn widen<S: Int, D: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = cpu.reg::<S>(0).to_u64();
    cpu.set_reg(0, D::from_u64(sign::<true, S>(value)));
    Ok(())
}

/// CWD, CDQ, CQO: the sign of the accumulator into DX/EDX/RDX.
fn sign_into_dx<T: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = sign::<true, T>(cpu.reg::<T>(0).to_u64()) as i64 >> 63;
    cpu.set_reg(2 * 8, T::from_u64(value as u64));
    Ok(())
}

macro_rules! by_condition {
    ($cc:expr, $f:ident $(, $extra:ty)*) => {
        match $cc & 15 {
            0 => $f::<0 $(, $extra)*>, 1 => $f::<1 $(, $extra)*>, 2 => $f::<2 $(, $extra)*>,
            3 => $f::<3 $(, $extra)*>, 4 => $f::<4 $(, $extra)*>, 5 => $f::<5 $(, $extra)*>,
            6 => $f::<6 $(, $extra)*>, 7 => $f::<7 $(, $extra)*>, 8 => $f::<8 $(, $extra)*>,
            9 => $f::<9 $(, $extra)*>, 10 => $f::<10 $(, $extra)*>, 11 => $f::<11 $(, $extra)*>,
            12 => $f::<12 $(, $extra)*>, 13 => $f::<13 $(, $extra)*>, 14 => $f::<14 $(, $extra)*>,
            _ => $f::<15 $(, $extra)*>,
        }
    };
}
pub(crate) use by_condition;

/// The condition code of Jcc, SETcc and CMOVcc, as encoded.
pub(crate) fn condition_of(insn: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        _ => return None,
    })
}

fn mov(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    let bits = width(insn, 0);
    Some(match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            op.dst = offset_of(insn.op0_register())?.0;
            op.src = offset_of(insn.op1_register())?.0;
            by_width!(bits, reg_reg)
        }
        (OpKind::Register, OpKind::Memory) => {
            op.dst = offset_of(insn.op0_register())?.0;
            if is_absolute(insn) {
                op.imm = insn.memory_displacement64();
                return Some(by_width!(bits, acc_absolute));
            }
            by_width!(bits, reg_mem; addressing flat)
        }
        (OpKind::Memory, OpKind::Register) => {
            op.src = offset_of(insn.op1_register())?.0;
            if is_absolute(insn) {
                op.imm = insn.memory_displacement64();
                return Some(by_width!(bits, absolute_acc));
            }
            by_width!(bits, mem_reg; addressing flat)
        }
        (OpKind::Register, _) => {
            op.dst = offset_of(insn.op0_register())?.0;
            op.imm = insn.immediate(1);
            by_width!(bits, reg_imm)
        }
        _ => {
            op.imm = insn.immediate(1);
            by_width!(bits, mem_imm; addressing flat)
        }
    })
}

/// The forms with an address of the full address size and no ModR/M byte.
fn is_absolute(insn: &Instruction) -> bool {
    use iced_x86::Code::*;
    matches!(
        insn.code(),
        Mov_AL_moffs8
            | Mov_AX_moffs16
            | Mov_EAX_moffs32
            | Mov_RAX_moffs64
            | Mov_moffs8_AL
            | Mov_moffs16_AX
            | Mov_moffs32_EAX
            | Mov_moffs64_RAX
    )
}

fn extension<const SIGNED: bool>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    op.dst = offset_of(insn.op0_register())?.0;
    let register = insn.op1_kind() == OpKind::Register;
    if register {
        op.src = offset_of(insn.op1_register())?.0;
    }
    macro_rules! pick {
        ($s:ty, $d:ty) => {
            match (register, flat) {
                (true, _) => extend_reg::<SIGNED, $s, $d>,
                (false, true) => extend_mem::<SIGNED, $s, $d, Flat>,
                (false, false) => extend_mem::<SIGNED, $s, $d, Checked>,
            }
        };
    }
    Some(match (width(insn, 1), width(insn, 0)) {
        (8, 16) => pick!(u8, u16),
        (8, 32) => pick!(u8, u32),
        (8, _) => pick!(u8, u64),
        (16, 16) => pick!(u16, u16),
        (16, 32) => pick!(u16, u32),
        (16, _) => pick!(u16, u64),
        (_, 16) => pick!(u32, u16),
        (_, 32) => pick!(u32, u32),
        _ => pick!(u32, u64),
    })
}

/// Handler for an instruction of this family.
pub(crate) fn lower(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    let bits = if insn.op_count() > 0 { width(insn, 0) } else { 0 };
    let handler: Handler = match insn.mnemonic() {
        Mnemonic::Mov => {
            let special = |i| insn.op_kind(i) == OpKind::Register && !insn.op_register(i).is_gpr();
            if special(0) || special(1) {
                return None;
            }
            return mov(insn, op, flat);
        }
        // Weakly ordered stores may be ordered strongly.
        Mnemonic::Movnti => return mov(insn, op, flat),
        Mnemonic::Movzx => return extension::<false>(insn, op, flat),
        Mnemonic::Movsx | Mnemonic::Movsxd => return extension::<true>(insn, op, flat),
        Mnemonic::Lea => {
            op.dst = offset_of(insn.op0_register())?.0;
            match (bits, flat) {
                (16, true) => lea::<u16, Flat>,
                (32, true) => lea::<u32, Flat>,
                (_, true) => lea::<u64, Flat>,
                (16, false) => lea::<u16, Checked>,
                (32, false) => lea::<u32, Checked>,
                (_, false) => lea::<u64, Checked>,
            }
        }
        Mnemonic::Bswap => {
            op.dst = offset_of(insn.op0_register())?.0;
            by_width!(bits, bswap)
        }
        Mnemonic::Movbe => {
            if insn.op0_kind() == OpKind::Register {
                op.dst = offset_of(insn.op0_register())?.0;
                by_width!(bits, movbe_load)
            } else {
                op.src = offset_of(insn.op1_register())?.0;
                by_width!(bits, movbe_store)
            }
        }
        Mnemonic::Xlatb => xlat,
        Mnemonic::Cbw => widen::<u8, u16>,
        Mnemonic::Cwde => widen::<u16, u32>,
        Mnemonic::Cdqe => widen::<u32, u64>,
        Mnemonic::Cwd => sign_into_dx::<u16>,
        Mnemonic::Cdq => sign_into_dx::<u32>,
        Mnemonic::Cqo => sign_into_dx::<u64>,
        _ => return conditional(insn, op, bits),
    };
    Some(handler)
}

fn conditional(insn: &Instruction, op: &mut Op, bits: usize) -> Option<Handler> {
    if insn.is_jcc_short_or_near() {
        return None;
    }
    let cc = condition_of(insn)?;
    let register = |i| offset_of(insn.op_register(i)).map(|r| r.0);
    if bits == 8 {
        return Some(if insn.op0_kind() == OpKind::Register {
            op.dst = register(0)?;
            by_condition!(cc, set_reg)
        } else {
            by_condition!(cc, set_mem)
        });
    }
    op.dst = register(0)?;
    if insn.op1_kind() == OpKind::Register {
        op.src = register(1)?;
        return Some(match bits {
            16 => by_condition!(cc, cmov_reg, u16),
            32 => by_condition!(cc, cmov_reg, u32),
            _ => by_condition!(cc, cmov_reg, u64),
        });
    }
    Some(match bits {
        16 => by_condition!(cc, cmov_mem, u16),
        32 => by_condition!(cc, cmov_mem, u32),
        _ => by_condition!(cc, cmov_mem, u64),
    })
}
