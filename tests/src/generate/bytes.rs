//! The bytes of one instruction of a given form: prefixes and opcode from iced's table, everything behind them at
//! random, until the decoder says that it is the form wanted. So all encodings occur: redundant prefixes, long
//! displacements, indexes without base.

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, MandatoryPrefix, OpCodeInfo, OpCodeTableKind, OpKind,
    Register,
};

use super::values;
use crate::case::{Bits, CODE, LOW, PAGE};
use crate::random::Random;

const ATTEMPTS: usize = 600;
const MAX_LENGTH: usize = 15;

/// Bytes of an instruction of that form; none if chance found none.
pub fn encode(random: &mut Random, code: Code, bits: Bits) -> Option<Vec<u8>> {
    let info = code.op_code();
    for _ in 0..ATTEMPTS {
        let mut bytes = match info.encoding() {
            EncodingKind::VEX => vex(random, info, bits),
            _ => legacy(random, info, bits),
        };
        tail(random, info, &mut bytes);
        let mut decoder = Decoder::with_ip(bits.count(), &bytes, LOW + CODE, DecoderOptions::NONE);
        let insn = decoder.decode();
        if insn.code() == code && insn.len() <= MAX_LENGTH {
            bytes.truncate(insn.len());
            return Some(bytes);
        }
    }
    None
}

fn legacy(random: &mut Random, info: &OpCodeInfo, bits: Bits) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    if random.chance(6) {
        bytes.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3, 0xf0]));
    }
    if bits == Bits::B64 && random.chance(4) {
        bytes.push(random.pick(&[0x64, 0x65]));
    }
    let address = info.address_size();
    if address != 0 && address != bits.count() || address == 0 && random.chance(4) {
        bytes.push(0x67);
    }
    if info.can_use_lock_prefix() && random.chance(25) {
        bytes.push(0xf0);
    }
    if info.can_use_rep_prefix() && random.chance(50) {
        bytes.push(0xf3);
    } else if info.can_use_repne_prefix() && random.chance(40) {
        bytes.push(0xf2);
    }
    if info.operand_size() == 16 {
        bytes.push(0x66);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        MandatoryPrefix::None | MandatoryPrefix::PNP => {}
    }
    if bits == Bits::B64 {
        let wide = info.operand_size() == 64 && !info.default_op_size64() || random.chance(5);
        if wide || random.chance(50) {
            let low = if random.chance(15) { 0 } else { random.below(8) as u8 };
            bytes.push(0x40 | u8::from(wide) << 3 | low);
        }
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    opcode(random, info, &mut bytes);
    bytes
}

fn opcode(random: &mut Random, info: &OpCodeInfo, bytes: &mut Vec<u8>) {
    let opcode = info.op_code();
    if info.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    let last = opcode as u8;
    // Forms with the register in the opcode's low bits; the decoder refuses where there is none.
    use iced_x86::OpCodeOperandKind as Kind;
    let in_opcode = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode | Kind::sti_opcode
        )
    });
    bytes.push(if in_opcode { last.wrapping_add(random.below(8) as u8) } else { last });
}

fn vex(random: &mut Random, info: &OpCodeInfo, bits: Bits) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    if random.chance(3) {
        bytes.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x67]));
    }
    let map = match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
    };
    let random_bits = random.bits();
    let w = if info.is_wig() { random_bits & 1 } else { u64::from(info.w()) } as u8;
    let l = if info.is_lig() { random_bits >> 1 & 1 } else { u64::from(info.l()) } as u8;
    let vvvv = if random.chance(50) { 15 } else { random.below(16) as u8 };
    let rxb = if bits == Bits::B32 { 7 } else { random.below(8) as u8 };
    if map == 1 && w == 0 && random.chance(50) {
        let r = if bits == Bits::B32 { 0x80 } else { (rxb & 4) << 5 };
        let vvvv = if bits == Bits::B32 { vvvv | 8 } else { vvvv };
        bytes.extend([0xc5, r | vvvv << 3 | l << 2 | pp]);
    } else {
        bytes.extend([0xc4, rxb << 5 | map, w << 7 | vvvv << 3 | l << 2 | pp]);
    }
    opcode(random, info, &mut bytes);
    bytes
}

/// ModRM, SIB, displacement and immediate, whatever of them there is.
fn tail(random: &mut Random, info: &OpCodeInfo, bytes: &mut Vec<u8>) {
    let mut modrm = random.bits() as u8;
    if random.chance(25) {
        modrm |= 0xc0;
    }
    if info.group_index() >= 0 {
        modrm = modrm & 0xc7 | (info.group_index() as u8) << 3;
    }
    if info.rm_group_index() >= 0 {
        modrm = modrm & 0xf8 | info.rm_group_index() as u8;
    }
    bytes.push(modrm);
    for _ in 0..14 {
        bytes.push(random.bits() as u8);
    }
}

/// Gives the constants in the encoding values that lead somewhere: branch targets into the code, absolute and
/// RIP-relative displacements into the arena, immediates to the corners.
pub fn fix(random: &mut Random, bytes: &mut [u8], bits: Bits, ip: u64) {
    let mut decoder = Decoder::with_ip(bits.count(), bytes, ip, DecoderOptions::NONE);
    let insn = decoder.decode();
    let at = decoder.get_constant_offsets(&insn);
    let next = insn.next_ip();
    let branch = (0..insn.op_count()).any(|i| {
        matches!(insn.op_kind(i), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
    });
    if branch {
        let base = ip & !0xffff | CODE;
        let target = if random.chance(95) { base + random.below(2 * PAGE as u64) } else { random.bits() };
        let near = (next as i64 + i64::from(random.bits() as i8)) as u64;
        let target = if at.immediate_size() == 1 { near } else { target };
        put(bytes, at.immediate_offset(), at.immediate_size(), target.wrapping_sub(next));
        return;
    }
    let absolute = insn.memory_index() == Register::None
        && matches!(insn.memory_base(), Register::None | Register::RIP | Register::EIP);
    if at.has_displacement() && absolute {
        let size = insn.memory_size().size() as u64;
        let low = bits == Bits::B32
            || !insn.is_ip_rel_memory_operand() && at.displacement_size() < 8
            || ip >> 32 == 0;
        let mut target = values::target(random, size, size, low);
        if insn.is_ip_rel_memory_operand() {
            target = target & 0xffff_ffff | ip & !0xffff_ffff;
            target = target.wrapping_sub(next);
        }
        put(bytes, at.displacement_offset(), at.displacement_size(), target);
    }
    if at.has_immediate() && random.chance(40) {
        let value = values::integer(random);
        put(bytes, at.immediate_offset(), at.immediate_size(), value);
    }
}

fn put(bytes: &mut [u8], offset: usize, size: usize, value: u64) {
    bytes[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// Changes, inserts or removes some bytes.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    const PREFIXES: [u8; 16] =
        [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x40, 0x48, 0x4f, 0x0f, 0xc4];
    if random.chance(10) {
        bytes.clear();
        bytes.extend((0..16).map(|_| random.bits() as u8));
        return;
    }
    for _ in 0..1 + random.below(3) {
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(5) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.bits() as u8,
            2 => bytes.insert(0, random.pick(&PREFIXES)),
            3 => bytes.insert(at, random.pick(&PREFIXES)),
            _ => bytes.push(random.bits() as u8),
        }
    }
    if random.chance(3) {
        let prefix = random.pick(&PREFIXES);
        for _ in 0..random.below(15) {
            bytes.insert(0, prefix);
        }
    }
    bytes.truncate(20);
}
