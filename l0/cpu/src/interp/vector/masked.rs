//! Instructions that access memory element by element, under a mask: gathers, VMASKMOV and VPMASKMOV, MASKMOVDQU
//! and MASKMOVQ. Elements that are not selected are not accessed and do not fault.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::element_linear;
use crate::Cpu;
use crate::interp::operands::{address_bits, memory_segment, segment_of};
use crate::native::Class;
use crate::op::{Cold, ColdHandler};
use crate::state::{Seg, reg};
use crate::trap::{Exec, Fault};

pub(super) fn lower(insn: &Instruction) -> Option<ColdHandler> {
    use Mnemonic as M;
    let handler: ColdHandler = match insn.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => gather::<4, 4>,
        M::Vpgatherdq | M::Vgatherdpd => gather::<8, 4>,
        M::Vpgatherqd | M::Vgatherqps => gather::<4, 8>,
        M::Vpgatherqq | M::Vgatherqpd => gather::<8, 8>,
        M::Vmaskmovps | M::Vpmaskmovd => masked_move::<4>,
        M::Vmaskmovpd | M::Vpmaskmovq => masked_move::<8>,
        M::Maskmovdqu | M::Vmaskmovdqu => masked_bytes,
        M::Maskmovq => masked_mmx_bytes,
        _ => return None,
    };
    Some(handler)
}

fn number(register: Register) -> usize {
    register.number() & 15
}

/// Element `index` of `SIZE` bytes, zero-extended.
fn element<const SIZE: usize>(bytes: &[u8; 32], index: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(part) = bytes.get(index * SIZE..(index + 1) * SIZE) {
        value[..SIZE].copy_from_slice(part);
    }
    u64::from_le_bytes(value)
}

fn set_element<const SIZE: usize>(bytes: &mut [u8; 32], index: usize, value: u64) {
    if let Some(part) = bytes.get_mut(index * SIZE..(index + 1) * SIZE) {
        part.copy_from_slice(&value.to_le_bytes()[..SIZE]);
    }
}

fn selected<const SIZE: usize>(mask: &[u8; 32], index: usize) -> bool {
    element::<SIZE>(mask, index) >> (SIZE * 8 - 1) & 1 != 0
}

/// VGATHERxx and VPGATHERxx: elements of `SIZE` bytes at base + index * scale, indices of `INDEX` bytes.
///
/// Each element that is loaded clears its part of the mask, so that after a fault the instruction goes on where it
/// stopped.
fn gather<const SIZE: usize, const INDEX: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    cpu.check_vector(Class::Vex)?;
    let insn = &cold.insn;
    let (to, index, mask) = (insn.op0_register(), insn.memory_index(), insn.op2_register());
    let (to, at, mask) = (number(to), number(index), number(mask));
    if to == at || to == mask || at == mask {
        return Err(cpu.raise(Fault::ud()));
    }
    let indices = cpu.state.vector.ymm[at];
    let count = (vector_bytes(insn) / SIZE).min(index.size() / INDEX);
    let seg = memory_segment(insn);
    let bits = address_bits(insn);
    let base = cpu.effective_address(insn);
    // The mask is first widened from its sign bits to whole elements, and shrinks from there.
    let mut left = [0; 32];
    for i in (0..count).filter(|&i| selected::<SIZE>(&cpu.state.vector.ymm[mask], i)) {
        set_element::<SIZE>(&mut left, i, u64::MAX);
    }
    let mut result = cpu.state.vector.ymm[to];
    result[count * SIZE..].fill(0);
    for i in 0..count {
        if !selected::<SIZE>(&left, i) {
            continue;
        }
        let raw = element::<INDEX>(&indices, i);
        let offset = if INDEX == 4 { raw as i32 as u64 } else { raw };
        let address = base.wrapping_add(offset.wrapping_mul(u64::from(insn.memory_index_scale())));
        let address = if bits == 64 { address } else { address & 0xffff_ffff };
        let loaded = element_linear(cpu, seg, address, SIZE, false).and_then(|l| cpu.load_sized(l, SIZE));
        match loaded {
            Ok(value) => set_element::<SIZE>(&mut result, i, value),
            Err(trap) => {
                cpu.state.vector.ymm[to] = result;
                cpu.state.vector.ymm[mask] = left;
                return Err(trap);
            }
        }
        set_element::<SIZE>(&mut left, i, 0);
    }
    cpu.state.vector.ymm[to] = result;
    cpu.state.vector.ymm[mask] = [0; 32];
    Ok(())
}

/// Bytes of the destination register.
fn vector_bytes(insn: &Instruction) -> usize {
    insn.op0_register().size().min(32)
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q, both directions.
fn masked_move<const SIZE: usize>(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let insn = &cold.insn;
    cpu.check_vector(Class::Vex)?;
    let seg = memory_segment(insn);
    let bits = address_bits(insn);
    let base = cpu.effective_address(insn);
    let mask = cpu.state.vector.ymm[number(insn.op1_register())];
    let address = |i: usize| {
        let address = base.wrapping_add((i * SIZE) as u64);
        if bits == 64 { address } else { address & 0xffff_ffff }
    };
    if insn.op0_kind() == OpKind::Register {
        let mut result = [0; 32];
        for i in (0..vector_bytes(insn) / SIZE).filter(|&i| selected::<SIZE>(&mask, i)) {
            let linear = element_linear(cpu, seg, address(i), SIZE, false)?;
            set_element::<SIZE>(&mut result, i, cpu.load_sized(linear, SIZE)?);
        }
        cpu.state.vector.ymm[number(insn.op0_register())] = result;
        return Ok(());
    }
    let from = cpu.state.vector.ymm[number(insn.op2_register())];
    let count = insn.op2_register().size().min(32) / SIZE;
    let mut places = [0; 8];
    for i in (0..count).filter(|&i| selected::<SIZE>(&mask, i)) {
        places[i & 7] = element_linear(cpu, seg, address(i), SIZE, true)?;
        cpu.probe_write(places[i & 7], SIZE)?;
    }
    for i in (0..count).filter(|&i| selected::<SIZE>(&mask, i)) {
        cpu.store_sized(places[i & 7], SIZE, element::<SIZE>(&from, i))?;
    }
    Ok(())
}

fn masked_bytes(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let insn = &cold.insn;
    if insn.code() == Code::VEX_Vmaskmovdqu_rDI_xmm_xmm {
        cpu.check_vector(Class::Vex)?;
    } else {
        cpu.check_vector(Class::Sse)?;
    }
    let from = cpu.state.vector.ymm[number(insn.op1_register())];
    let mask = cpu.state.vector.ymm[number(insn.op2_register())];
    store_selected(cpu, insn, &from[..16], &mask[..16])
}

/// MASKMOVQ; like every instruction on MMX registers it leaves x87 state in MMX mode.
fn masked_mmx_bytes(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let insn = &cold.insn;
    cpu.check_vector(Class::Mmx)?;
    let x87 = &cpu.state.x87;
    let from = x87.mmx(insn.op1_register().number());
    let mask = x87.mmx(insn.op2_register().number());
    store_selected(cpu, insn, &from, &mask)?;
    cpu.state.x87.enter_mmx();
    Ok(())
}

/// Stores the bytes whose mask byte is negative at [rDI]: all of them or none.
fn store_selected(cpu: &mut Cpu, insn: &Instruction, from: &[u8], mask: &[u8]) -> Exec {
    let rdi = cpu.state.gpr.get(reg::RDI);
    let address_mask = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let seg = match insn.memory_segment() {
        Register::None => Seg::Ds,
        register => segment_of(register),
    };
    let mut places = [0_u64; 16];
    let chosen = |i: &usize| mask.get(*i).is_some_and(|m| m & 0x80 != 0);
    for i in (0..from.len().min(16)).filter(chosen) {
        let offset = rdi.wrapping_add(i as u64) & address_mask;
        places[i] = element_linear(cpu, seg, offset, 1, true)?;
        cpu.probe_write(places[i], 1)?;
    }
    for i in (0..from.len().min(16)).filter(chosen) {
        cpu.store(places[i], from[i])?;
    }
    Ok(())
}
