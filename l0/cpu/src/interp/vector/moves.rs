//! Moves and zeroing: the commonest vector instructions, done without the host's help.
//!
//! The operands are packed into the cold op's data, see [`Packed`].

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};
use x86defs::vector;

use crate::Cpu;
use crate::interp::operands::{address_bits, memory_segment, offset_of};
use crate::native::{Class, FeatureSet, Xmm};
use crate::op::{Cold, ColdHandler};
use crate::state::{SLOT_BLOCK_IP, SLOT_ZERO, Seg};
use crate::trap::{Exec, Fault};

/// A vector register and a memory operand in 64 bits:
/// ```text
/// 63      57 56   53 52    49 48  47 46   44 43   42 41   37 36  32 31          0
/// | unused  | source | vector | bits | segment| scale | index | base | displacement |
/// ```
/// `base` and `index` are slots of the register file; `bits` is 0, 1, 2 for 64, 32, 16 address bits. Moves between
/// registers use `vector` and `source`, and `base` for a general register.
#[derive(Clone, Copy)]
struct Packed(u64);

impl Packed {
    fn registers(to: usize, from: usize, gpr: u8) -> u64 {
        (to as u64 & 15) << 49 | (from as u64 & 15) << 53 | u64::from(gpr / 8) << 32
    }

    fn memory(insn: &Instruction, vector: Register) -> Option<u64> {
        let slot = |register: Register| match register {
            Register::None => Some(SLOT_ZERO / 8),
            Register::RIP | Register::EIP => Some(SLOT_BLOCK_IP / 8),
            _ => offset_of(register).map(|(offset, _)| offset / 8),
        };
        let (bits, displacement) = match address_bits(insn) {
            64 => (0, insn.memory_displacement64() as i64),
            32 => (1, i64::from(insn.memory_displacement64() as i32)),
            _ => (2, i64::from(insn.memory_displacement64() as i16)),
        };
        let displacement = i32::try_from(displacement).ok()?;
        let base = slot(insn.memory_base())?;
        let index = slot(insn.memory_index())?;
        Some(
            u64::from(displacement as u32)
                | u64::from(base) << 32
                | u64::from(index) << 37
                | u64::from(insn.memory_index_scale().trailing_zeros() & 3) << 42
                | (memory_segment(insn) as u64) << 44
                | bits << 47
                | (vector.number() as u64 & 15) << 49,
        )
    }

    #[inline(always)]
    fn vector(self) -> usize {
        (self.0 >> 49 & 15) as usize
    }

    #[inline(always)]
    fn source(self) -> usize {
        (self.0 >> 53 & 15) as usize
    }

    #[inline(always)]
    fn base(self) -> u8 {
        (self.0 >> 32 & 31) as u8 * 8
    }

    /// Linear address of `size` bytes.
    #[inline(always)]
    fn linear(self, cpu: &mut Cpu, size: usize, write: bool) -> Exec<u64> {
        let index = cpu.reg::<u64>((self.0 >> 37 & 31) as u8 * 8);
        let address = cpu
            .reg::<u64>(self.base())
            .wrapping_add(index << (self.0 >> 42 & 3))
            .wrapping_add(self.0 as i32 as u64);
        let address = match self.0 >> 47 & 3 {
            0 => address,
            1 => address & 0xffff_ffff,
            _ => address & 0xffff,
        };
        let seg = SEGMENTS[(self.0 >> 44 & 7) as usize];
        let linear = cpu.linear(seg, address, size, write)?;
        if seg == Seg::Ss && cpu.code_bits == 64 {
            let last = linear.wrapping_add(size as u64 - 1);
            if !cpu.is_canonical(linear) || !cpu.is_canonical(last) {
                return Err(cpu.raise(Fault::with_code(vector::SS, 0)));
            }
        }
        Ok(linear)
    }
}

const SEGMENTS: [Seg; 8] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs, Seg::Ds, Seg::Ds];

/// Values of the handlers' `ENCODING`.
const LEGACY: u8 = 0;
const VEX: u8 = 1;

#[inline(always)]
fn check<const ENCODING: u8>(cpu: &mut Cpu) -> Exec {
    if ENCODING == VEX {
        cpu.check_vector(Class::Vex, FeatureSet::AVX)
    } else {
        // Every x86-64 processor has both.
        cpu.check_vector(Class::Sse, FeatureSet::SSE.and(FeatureSet::SSE2))
    }
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

fn load_16<const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 16, false)?;
    require_alignment::<ALIGNED>(cpu, linear, 16)?;
    let value = cpu.load::<Xmm>(linear)?;
    set_xmm::<ENCODING>(cpu, packed.vector(), value);
    Ok(())
}

fn store_16<const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 16, true)?;
    require_alignment::<ALIGNED>(cpu, linear, 16)?;
    cpu.store(linear, xmm(cpu, packed.vector()))
}

fn load_32<const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 32, false)?;
    require_alignment::<ALIGNED>(cpu, linear, 32)?;
    let mut value = [0; 32];
    cpu.load_32(linear, &mut value)?;
    cpu.state.vector.ymm[packed.vector()] = value;
    Ok(())
}

fn store_32<const ENCODING: u8, const ALIGNED: bool>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 32, true)?;
    require_alignment::<ALIGNED>(cpu, linear, 32)?;
    let value = cpu.state.vector.ymm[packed.vector()];
    cpu.store_32(linear, &value)
}

/// MOVSS, MOVSD, MOVD, MOVQ from memory: the rest of the XMM register is cleared.
fn load_scalar<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, SIZE, false)?;
    let value = if SIZE == 4 { u64::from(cpu.load::<u32>(linear)?) } else { cpu.load(linear)? };
    set_xmm::<ENCODING>(cpu, packed.vector(), crate::phys::Word::from_u64(value));
    Ok(())
}

fn store_scalar<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, SIZE, true)?;
    let value = low_u64(cpu, packed.vector());
    if SIZE == 4 { cpu.store(linear, value as u32) } else { cpu.store(linear, value) }
}

/// MOVLPS, MOVHPS and their PD forms: 8 bytes at `AT` of the register.
fn load_half<const AT: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<LEGACY>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 8, false)?;
    let value: u64 = cpu.load(linear)?;
    cpu.state.vector.ymm[packed.vector()][AT..AT + 8].copy_from_slice(&value.to_le_bytes());
    Ok(())
}

fn store_half<const ENCODING: u8, const AT: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let linear = packed.linear(cpu, 8, true)?;
    let mut value = [0; 8];
    value.copy_from_slice(&cpu.state.vector.ymm[packed.vector()][AT..AT + 8]);
    cpu.store(linear, u64::from_le_bytes(value))
}

fn copy_16<const ENCODING: u8>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let value = xmm(cpu, packed.source());
    set_xmm::<ENCODING>(cpu, packed.vector(), value);
    Ok(())
}

fn copy_32(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<VEX>(cpu)?;
    let packed = Packed(cold.data);
    cpu.state.vector.ymm[packed.vector()] = cpu.state.vector.ymm[packed.source()];
    Ok(())
}

/// MOVQ between XMM registers.
fn copy_low<const ENCODING: u8>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let value = low_u64(cpu, packed.source());
    set_xmm::<ENCODING>(cpu, packed.vector(), crate::phys::Word::from_u64(value));
    Ok(())
}

fn from_gpr<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let value: u64 = cpu.reg(packed.base());
    let value = if SIZE == 4 { value & 0xffff_ffff } else { value };
    set_xmm::<ENCODING>(cpu, packed.vector(), crate::phys::Word::from_u64(value));
    Ok(())
}

fn to_gpr<const ENCODING: u8, const SIZE: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    let packed = Packed(cold.data);
    let value = low_u64(cpu, packed.vector());
    cpu.set_reg(packed.base(), if SIZE == 4 { value & 0xffff_ffff } else { value });
    Ok(())
}

/// PXOR and the like of a register with itself.
fn zero<const ENCODING: u8>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check::<ENCODING>(cpu)?;
    set_xmm::<ENCODING>(cpu, Packed(cold.data).vector(), Xmm::default());
    Ok(())
}

/// Outside 64-bit mode there are eight registers.
fn register_count(cpu: &Cpu) -> usize {
    if cpu.code_bits == 64 { 16 } else { 8 }
}

pub(super) fn vzeroupper(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    check::<VEX>(cpu)?;
    let count = register_count(cpu);
    for ymm in &mut cpu.state.vector.ymm[..count] {
        ymm[16..].fill(0);
    }
    Ok(())
}

pub(super) fn vzeroall(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    check::<VEX>(cpu)?;
    let count = register_count(cpu);
    cpu.state.vector.ymm[..count].fill([0; 32]);
    Ok(())
}

pub(super) fn lower(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    if insn.encoding() == EncodingKind::VEX { lower_as::<VEX>(insn) } else { lower_as::<LEGACY>(insn) }
}

fn lower_as<const E: u8>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Movaps | M::Movapd | M::Movdqa | M::Vmovaps | M::Vmovapd | M::Vmovdqa => whole::<E, true>(insn),
        M::Movups | M::Movupd | M::Movdqu | M::Vmovups | M::Vmovupd | M::Vmovdqu => whole::<E, false>(insn),
        M::Movntps | M::Movntpd | M::Movntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdq => {
            whole::<E, true>(insn)
        }
        M::Movss | M::Vmovss => scalar::<E, 4>(insn),
        M::Movsd | M::Vmovsd => scalar::<E, 8>(insn),
        M::Movd | M::Vmovd => scalar::<E, 4>(insn).or_else(|| with_gpr::<E, 4>(insn)),
        M::Movq | M::Vmovq => {
            scalar::<E, 8>(insn).or_else(|| with_gpr::<E, 8>(insn)).or_else(|| low::<E>(insn))
        }
        M::Movlps | M::Movlpd => half::<E, 0>(insn),
        M::Movhps | M::Movhpd => half::<E, 8>(insn),
        M::Vmovlps | M::Vmovlpd => half::<E, 0>(insn),
        M::Vmovhps | M::Vmovhpd => half::<E, 8>(insn),
        M::Pxor | M::Xorps | M::Xorpd | M::Vpxor | M::Vxorps | M::Vxorpd => zeroing::<E>(insn),
        _ => None,
    }
}

/// The kinds of the two operands of a move.
enum Shape {
    Registers(Register, Register),
    Load(Register),
    Store(Register),
}

fn shape(insn: &Instruction) -> Option<Shape> {
    if insn.op_count() != 2 {
        return None;
    }
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            Some(Shape::Registers(insn.op0_register(), insn.op1_register()))
        }
        (OpKind::Register, OpKind::Memory) => Some(Shape::Load(insn.op0_register())),
        (OpKind::Memory, OpKind::Register) => Some(Shape::Store(insn.op1_register())),
        _ => None,
    }
}

fn whole<const E: u8, const ALIGNED: bool>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    Some(match shape(insn)? {
        Shape::Registers(to, from) => {
            let data = Packed::registers(to.number(), from.number(), 0);
            (if to.is_ymm() { copy_32 } else { copy_16::<E> }, data)
        }
        Shape::Load(to) => {
            let handler = if to.is_ymm() { load_32::<E, ALIGNED> } else { load_16::<E, ALIGNED> };
            (handler, Packed::memory(insn, to)?)
        }
        Shape::Store(from) => {
            let handler = if from.is_ymm() { store_32::<E, ALIGNED> } else { store_16::<E, ALIGNED> };
            (handler, Packed::memory(insn, from)?)
        }
    })
}

fn scalar<const E: u8, const SIZE: usize>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    match shape(insn)? {
        Shape::Load(to) if to.is_xmm() => Some((load_scalar::<E, SIZE>, Packed::memory(insn, to)?)),
        Shape::Store(from) if from.is_xmm() => Some((store_scalar::<E, SIZE>, Packed::memory(insn, from)?)),
        _ => None,
    }
}

fn with_gpr<const E: u8, const SIZE: usize>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    let Shape::Registers(to, from) = shape(insn)? else { return None };
    match (offset_of(to), offset_of(from)) {
        (None, Some((gpr, _))) if to.is_xmm() => {
            Some((from_gpr::<E, SIZE>, Packed::registers(to.number(), 0, gpr)))
        }
        (Some((gpr, _)), None) if from.is_xmm() => {
            Some((to_gpr::<E, SIZE>, Packed::registers(from.number(), 0, gpr)))
        }
        _ => None,
    }
}

fn low<const E: u8>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    match shape(insn)? {
        Shape::Registers(to, from) if to.is_xmm() && from.is_xmm() => {
            Some((copy_low::<E>, Packed::registers(to.number(), from.number(), 0)))
        }
        _ => None,
    }
}

fn half<const E: u8, const AT: usize>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    match shape(insn)? {
        Shape::Load(to) if E == LEGACY => Some((load_half::<AT>, Packed::memory(insn, to)?)),
        Shape::Store(from) => Some((store_half::<E, AT>, Packed::memory(insn, from)?)),
        _ => None,
    }
}

fn zeroing<const E: u8>(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    let first = insn.op_count().checked_sub(2)?;
    let (a, b) = (insn.op_register(first), insn.op_register(first + 1));
    let registers = (first..insn.op_count()).all(|i| insn.op_kind(i) == OpKind::Register);
    let to = insn.op0_register();
    // VPXOR on YMM registers is AVX2's, and left to the thunk with its check.
    if !registers || a != b || !(to.is_xmm() || to.is_ymm() && insn.mnemonic() != Mnemonic::Vpxor) {
        return None;
    }
    Some((zero::<E>, Packed::registers(to.number(), 0, 0)))
}
