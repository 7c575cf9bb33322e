//! Moves and zeroing: the commonest vector instructions, done without the host's help.
//!
//! In their ops `dst` and `src` are numbers of vector registers, or offsets in the register file for the general
//! register of a MOVD or MOVQ.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::by_address;
use crate::Cpu;
use crate::interp::address::Addressing;
use crate::interp::operands::offset_of;
use crate::native::{Class, Xmm};
use crate::op::{Handler, Op};
use crate::phys::Word;
use crate::trap::{Exec, Fault};

/// Values of the handlers' `ENCODING`.
const LEGACY: u8 = 0;
const VEX: u8 = 1;

#[inline(always)]
fn check<const ENCODING: u8>(cpu: &mut Cpu) -> Exec {
    if ENCODING == VEX { cpu.check_vector(Class::Vex) } else { cpu.check_vector(Class::Sse) }
}

#[inline(always)]
fn number(operand: u8) -> usize {
    usize::from(operand & 15)
}

/// Writes an XMM register: the upper half is kept by legacy instructions and cleared by VEX ones.
#[inline(always)]
fn set_xmm<const ENCODING: u8>(cpu: &mut Cpu, to: usize, value: Xmm) {
    let (low, high) = cpu.state.vector.ymm[to & 15].split_at_mut(16);
    value.put(low.first_chunk_mut().unwrap_or(&mut [0; 16]));
    if ENCODING == VEX {
        high.fill(0);
    }
}

#[inline(always)]
fn xmm(cpu: &Cpu, from: usize) -> Xmm {
    Xmm::new(cpu.state.vector.ymm[from & 15].first_chunk().unwrap_or(&[0; 16]))
}

#[inline(always)]
fn low_u64(cpu: &Cpu, from: usize) -> u64 {
    u64::from_le_bytes(*cpu.state.vector.ymm[from & 15].first_chunk().unwrap_or(&[0; 8]))
}

#[inline(always)]
fn require_alignment<const ALIGNED: bool>(cpu: &mut Cpu, linear: u64, size: u64) -> Exec {
    if ALIGNED && linear & (size - 1) != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    Ok(())
}

fn load_16<A: Addressing, const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, 16, false)?;
    require_alignment::<ALIGNED>(cpu, linear, 16)?;
    let value = cpu.load::<Xmm>(linear)?;
    set_xmm::<ENCODING>(cpu, number(op.dst), value);
    Ok(())
}

fn store_16<A: Addressing, const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, 16, true)?;
    require_alignment::<ALIGNED>(cpu, linear, 16)?;
    cpu.store(linear, xmm(cpu, number(op.src)))
}

fn load_32<A: Addressing, const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, 32, false)?;
    require_alignment::<ALIGNED>(cpu, linear, 32)?;
    let mut value = [0; 32];
    cpu.load_32(linear, &mut value)?;
    cpu.state.vector.ymm[number(op.dst)] = value;
    Ok(())
}

fn store_32<A: Addressing, const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, 32, true)?;
    require_alignment::<ALIGNED>(cpu, linear, 32)?;
    let value = cpu.state.vector.ymm[number(op.src)];
    cpu.store_32(linear, &value)
}

/// MOVSS, MOVSD, MOVD, MOVQ from memory: the rest of the XMM register is cleared.
fn load_scalar<A: Addressing, const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, SIZE, false)?;
    let value = if SIZE == 4 { u64::from(cpu.load::<u32>(linear)?) } else { cpu.load(linear)? };
    set_xmm::<ENCODING>(cpu, number(op.dst), Word::from_u64(value));
    Ok(())
}

fn store_scalar<A: Addressing, const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, SIZE, true)?;
    let value = low_u64(cpu, number(op.src));
    if SIZE == 4 { cpu.store(linear, value as u32) } else { cpu.store(linear, value) }
}

/// MOVLPS, MOVHPS and their PD forms: 8 bytes at `AT` of the register.
fn load_half<A: Addressing, const AT: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<LEGACY>(cpu)?;
    let linear = A::linear(cpu, op, 8, false)?;
    let value: u64 = cpu.load(linear)?;
    cpu.state.vector.ymm[number(op.dst)][AT..AT + 8].copy_from_slice(&value.to_le_bytes());
    Ok(())
}

fn store_half<A: Addressing, const ENCODING: u8, const AT: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let linear = A::linear(cpu, op, 8, true)?;
    let mut value = [0; 8];
    value.copy_from_slice(&cpu.state.vector.ymm[number(op.src)][AT..AT + 8]);
    cpu.store(linear, u64::from_le_bytes(value))
}

fn copy_16<const ENCODING: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let value = xmm(cpu, number(op.src));
    set_xmm::<ENCODING>(cpu, number(op.dst), value);
    Ok(())
}

fn copy_32(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    cpu.state.vector.ymm[number(op.dst)] = cpu.state.vector.ymm[number(op.src)];
    Ok(())
}

/// MOVQ between XMM registers.
fn copy_low<const ENCODING: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let value = low_u64(cpu, number(op.src));
    set_xmm::<ENCODING>(cpu, number(op.dst), Word::from_u64(value));
    Ok(())
}

fn from_gpr<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let value: u64 = cpu.reg(op.src);
    let value = if SIZE == 4 { value & 0xffff_ffff } else { value };
    set_xmm::<ENCODING>(cpu, number(op.dst), Word::from_u64(value));
    Ok(())
}

fn to_gpr<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    let value = low_u64(cpu, number(op.src));
    cpu.set_reg(op.dst, if SIZE == 4 { value & 0xffff_ffff } else { value });
    Ok(())
}

/// PXOR and the like of a register with itself.
fn zero<const ENCODING: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    check::<ENCODING>(cpu)?;
    set_xmm::<ENCODING>(cpu, number(op.dst), Xmm::default());
    Ok(())
}

/// Outside 64-bit mode there are eight registers.
fn register_count(cpu: &Cpu) -> usize {
    if cpu.code_bits == 64 { 16 } else { 8 }
}

pub(super) fn vzeroupper(cpu: &mut Cpu, _op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let count = register_count(cpu);
    for ymm in &mut cpu.state.vector.ymm[..count] {
        ymm[16..].fill(0);
    }
    Ok(())
}

pub(super) fn vzeroall(cpu: &mut Cpu, _op: &Op) -> Exec {
    check::<VEX>(cpu)?;
    let count = register_count(cpu);
    cpu.state.vector.ymm[..count].fill([0; 32]);
    Ok(())
}

pub(super) fn lower(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Vzeroupper => Some(vzeroupper),
        Mnemonic::Vzeroall => Some(vzeroall),
        _ if insn.encoding() == EncodingKind::VEX => lower_as::<VEX>(insn, op, flat),
        _ => lower_as::<LEGACY>(insn, op, flat),
    }
}

fn lower_as<const E: u8>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Vmovaps | M::Vmovapd | M::Vmovdqa => {
            whole::<E, true>(insn, op, flat)
        }
        M::Movups | M::Movupd | M::Movdqu | M::Vmovups | M::Vmovupd | M::Vmovdqu => {
            whole::<E, false>(insn, op, flat)
        }
        M::Movntps | M::Movntpd | M::Movntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdq => {
            whole::<E, true>(insn, op, flat)
        }
        M::Movss | M::Vmovss => scalar::<E, 4>(insn, op, flat),
        M::Movsd | M::Vmovsd => scalar::<E, 8>(insn, op, flat),
        M::Movd | M::Vmovd => scalar::<E, 4>(insn, op, flat).or_else(|| with_gpr::<E, 4>(insn, op)),
        M::Movq | M::Vmovq => scalar::<E, 8>(insn, op, flat)
            .or_else(|| with_gpr::<E, 8>(insn, op))
            .or_else(|| low::<E>(insn, op)),
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd => half::<E, 0>(insn, op, flat),
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => half::<E, 8>(insn, op, flat),
        M::Pxor | M::Xorps | M::Xorpd | M::Vpxor | M::Vxorps | M::Vxorpd => zeroing::<E>(insn, op),
        _ => None,
    }
}

/// The kinds of the two operands of a move.
enum Shape {
    Registers(Register, Register),
    Load(Register),
    Store(Register),
}

/// The shape of an instruction with two operands; their numbers go into the op.
fn shape(insn: &Instruction, op: &mut Op) -> Option<Shape> {
    if insn.op_count() != 2 {
        return None;
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let place = |register: Register| match offset_of(register) {
        Some((offset, _)) => offset,
        None => (register.number() & 15) as u8,
    };
    let shape = match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Shape::Registers(to, from),
        (OpKind::Register, OpKind::Memory) => Shape::Load(to),
        (OpKind::Memory, OpKind::Register) => Shape::Store(from),
        _ => return None,
    };
    (op.dst, op.src) = (place(to), place(from));
    Some(shape)
}

fn whole<const E: u8, const ALIGNED: bool>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    Some(match shape(insn, op)? {
        Shape::Registers(to, _) if to.is_ymm() => copy_32,
        Shape::Registers(..) => copy_16::<E>,
        Shape::Load(to) if to.is_ymm() => by_address!(flat, load_32, E, ALIGNED),
        Shape::Load(_) => by_address!(flat, load_16, E, ALIGNED),
        Shape::Store(from) if from.is_ymm() => by_address!(flat, store_32, E, ALIGNED),
        Shape::Store(_) => by_address!(flat, store_16, E, ALIGNED),
    })
}

fn scalar<const E: u8, const SIZE: usize>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    match shape(insn, op)? {
        Shape::Load(to) if to.is_xmm() => Some(by_address!(flat, load_scalar, E, SIZE)),
        Shape::Store(from) if from.is_xmm() => Some(by_address!(flat, store_scalar, E, SIZE)),
        _ => None,
    }
}

fn with_gpr<const E: u8, const SIZE: usize>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    match shape(insn, op)? {
        Shape::Registers(to, from) if to.is_xmm() && from.is_gpr() => Some(from_gpr::<E, SIZE>),
        Shape::Registers(to, from) if to.is_gpr() && from.is_xmm() => Some(to_gpr::<E, SIZE>),
        _ => None,
    }
}

fn low<const E: u8>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    match shape(insn, op)? {
        Shape::Registers(to, from) if to.is_xmm() && from.is_xmm() => Some(copy_low::<E>),
        _ => None,
    }
}

fn half<const E: u8, const AT: usize>(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    match shape(insn, op)? {
        Shape::Load(_) if E == LEGACY => Some(by_address!(flat, load_half, AT)),
        Shape::Store(_) => Some(by_address!(flat, store_half, E, AT)),
        _ => None,
    }
}

fn zeroing<const E: u8>(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let first = insn.op_count().checked_sub(2)?;
    let registers = (first..insn.op_count()).all(|i| insn.op_kind(i) == OpKind::Register);
    let same = insn.op_register(first) == insn.op_register(first + 1);
    let to = insn.op0_register();
    if !registers || !same || !(to.is_xmm() || to.is_ymm()) {
        return None;
    }
    op.dst = (to.number() & 15) as u8;
    Some(zero::<E>)
}
