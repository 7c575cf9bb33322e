//! Registers and memory that an instruction finds something useful in: addresses that lead into the arena, counts
//! and divisors of a size that does something, memory of the operand's type.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpKind, Register, UsedMemory,
};

use super::values;
use crate::case::{Bits, CODE, Case, Fpu, HIGH, IMAGE_CODE, IMAGE_SIZE, LOW, XSAVE_SIZE, image_index};
use crate::random::Random;

/// Sets up `case` for `insn`, its first instruction; false if that cannot be done.
pub fn set_up(random: &mut Random, insn: &Instruction, case: &mut Case) -> bool {
    if insn.is_invalid() {
        return true;
    }
    set_up_registers(random, insn, case);
    let mut fixed = Fixed::default();
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(insn);
    for memory in info.used_memory() {
        aim(random, insn, memory, case, &mut fixed);
    }
    set_up_memory(random, insn, case);
    // An address in RAX or RDX, and not the mask of components that `set_up_registers` put there.
    let components = case.start.gpr[0] as u32 > 7 || case.start.gpr[2] as u32 != 0;
    !(takes_components(insn) && components)
}

/// XSAVE and its family: EDX:EAX says which components. Those beyond AVX the host may have and the virtual CPU has not.
fn takes_components(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    )
}

/// General registers that an address already depends on, one bit each.
#[derive(Default)]
struct Fixed(u32);

impl Fixed {
    /// True the first time.
    fn fix(&mut self, register: Register) -> bool {
        let bit = 1 << register.full_register().number();
        let new = self.0 & bit == 0;
        self.0 |= bit;
        new
    }
}

fn set_up_registers(random: &mut Random, insn: &Instruction, case: &mut Case) {
    let gpr = &mut case.start.gpr;
    match insn.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if random.chance(60) => {
            let small = random.below(8);
            gpr[2] = random.pick(&[0, 0, u64::MAX, small]);
        }
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if insn.op1_kind() == OpKind::Register =>
        {
            let number = insn.op1_register().full_register().number();
            if random.chance(80) {
                gpr[number] = random.below(4096).wrapping_sub(2048);
            }
        }
        _ if takes_components(insn) => {
            gpr[0] = gpr[0] & !0xffff_ffff | random.below(8);
            gpr[2] &= !0xffff_ffff;
        }
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            let number = insn.op0_register().full_register().number();
            gpr[number] = values::segment_base(random);
        }
        Mnemonic::Ret | Mnemonic::Shl | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd
            if random.chance(50) =>
        {
            gpr[1] = random.below(70);
        }
        _ if insn.is_string_instruction() && random.chance(85) => {
            let mask = if random.chance(80) { 0 } else { !0xffff_ffff };
            let count = if random.chance(10) { 0 } else { random.below(60) };
            gpr[1] = random.bits() & mask | count;
        }
        _ => {}
    }
    if insn.is_string_instruction() && case.start.gpr[1] as u32 == 0 {
        // Whether a repetition with ECX = 0 clears the upper half of RCX depends on the vendor.
        case.start.gpr[1] = 0;
    }
    if case.bits == Bits::B32 {
        case.start.gpr.iter_mut().for_each(|reg| *reg &= 0xffff_ffff);
    }
}

/// Chooses base and index of one memory operand so that it lands where [`values::target`] says.
fn aim(random: &mut Random, insn: &Instruction, memory: &UsedMemory, case: &mut Case, fixed: &mut Fixed) {
    let size = memory.memory_size().size() as u64;
    let align = if insn.is_save_restore_instruction() { 64 } else { size };
    let low = case.bits == Bits::B32 || memory.address_size() != iced_x86::CodeSize::Code64;
    let segment = match memory.segment() {
        Register::FS if case.bits == Bits::B64 => case.start.fs_base,
        Register::GS if case.bits == Bits::B64 => case.start.gs_base,
        _ => 0,
    };
    let mut sum = memory.displacement().wrapping_add(segment);
    let (base, index) = (memory.base(), memory.index());
    if index.is_gpr() {
        let number = index.full_register().number();
        if fixed.fix(index) && random.chance(70) && index.size() > 1 {
            case.start.gpr[number] = keep_width(case.bits, random.below(128).wrapping_sub(64));
        }
        let value = masked(case.start.gpr[number], index);
        sum = sum.wrapping_add(value.wrapping_mul(u64::from(memory.scale())));
    } else if index.is_vector_register() {
        small_indexes(random, index, memory.vsib_size(), &mut case.start.fpu);
    }
    if !base.is_gpr() || base == Register::RSP || base == Register::ESP || !fixed.fix(base) {
        return;
    }
    let value = values::target(random, size, align, low).wrapping_sub(sum);
    let garbage = if base.size() == 4 && random.chance(30) { random.bits() << 32 } else { 0 };
    let number = base.full_register().number();
    let value = if base == index {
        // Base and index are one register: solve for the sum of both.
        let factor = u64::from(memory.scale()) + 1;
        (value.wrapping_add(masked(case.start.gpr[number], index) * (factor - 1))) / factor
    } else {
        value
    };
    case.start.gpr[number] = keep_width(case.bits, masked(value, base) | garbage);
}

fn masked(value: u64, register: Register) -> u64 {
    match register.size() {
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

fn keep_width(bits: Bits, value: u64) -> u64 {
    if bits == Bits::B32 { value & 0xffff_ffff } else { value }
}

fn small_indexes(random: &mut Random, index: Register, size: u32, fpu: &mut Fpu) {
    let vector = &mut fpu.ymm[index.number() & 15];
    let size = if size == 8 { 8 } else { 4 };
    for element in vector.chunks_exact_mut(size) {
        if random.chance(95) {
            let value = random.below(256).wrapping_sub(128);
            element.copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
}

/// Linear address of the explicit memory operand.
fn operand_address(insn: &Instruction, case: &Case) -> Option<u64> {
    let operand = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory)?;
    insn.virtual_address(operand, 0, |register, _, _| {
        Some(match register {
            Register::FS => case.start.fs_base,
            Register::GS => case.start.gs_base,
            r if r.is_segment_register() => 0,
            r if r.is_gpr() => masked(case.start.gpr[r.full_register().number()], r),
            _ => return None,
        })
    })
}

fn set_up_memory(random: &mut Random, insn: &Instruction, case: &mut Case) {
    if matches!(insn.mnemonic(), Mnemonic::Ret) && random.chance(80) {
        let base = if case.bits == Bits::B32 { LOW } else { random.pick(&[LOW, HIGH]) };
        let target = base + CODE + random.below(0x2000);
        put(case, case.start.gpr[4], &target.to_le_bytes()[..case.bits.count() as usize / 8]);
    }
    if insn.mnemonic() == Mnemonic::Push && insn.op0_register().is_segment_register() {
        let upper = case.start.gpr[4].wrapping_sub(u64::from(case.bits.count() / 8)).wrapping_add(2);
        open(case, upper, case.bits.count() as usize / 8 - 2, "some processors write 16 bits only");
    }
    let Some(address) = operand_address(insn, case) else { return };
    match insn.mnemonic() {
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg if random.chance(50) => {
            equal_operands(insn, address, case);
        }
        Mnemonic::Call | Mnemonic::Jmp if random.chance(80) => {
            let base = if case.bits == Bits::B32 { LOW } else { random.pick(&[LOW, HIGH]) };
            let target = base + CODE + random.below(0x2000);
            put(case, address, &target.to_le_bytes()[..insn.memory_size().size().min(8)]);
        }
        _ => {}
    }
    match insn.memory_size() {
        MemorySize::Float80 => put(case, address, &values::extended(random)),
        MemorySize::Bcd => put(case, address, &values::packed_decimal(random)),
        MemorySize::Fxsave_512Byte | MemorySize::Fxsave64_512Byte => fxsave_area(random, insn, address, case),
        MemorySize::Xsave | MemorySize::Xsave64 => xsave_area(random, insn, address, case),
        MemorySize::FpuEnv14 | MemorySize::FpuState94 => open(case, address + 6, 8, LAST_INSTRUCTION),
        MemorySize::FpuEnv28 | MemorySize::FpuState108 => open(case, address + 12, 16, LAST_INSTRUCTION),
        _ if matches!(insn.code(), Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32) => {
            let value = mxcsr(random);
            put(case, address, &value.to_le_bytes());
        }
        _ => {}
    }
}

const LAST_INSTRUCTION: &str = "vendors differ in when the x87 last-instruction pointers are kept";

const MXCSR_MASK: &str = "one vendor's processors have one more bit in MXCSR";

/// Makes accumulator and memory equal.
fn equal_operands(insn: &Instruction, address: u64, case: &mut Case) {
    let size = insn.memory_size().size().min(16);
    let mut bytes = [0; 16];
    for (i, byte) in bytes[..size].iter_mut().enumerate() {
        if let Some(index) = image_index(address.wrapping_add(i as u64)) {
            *byte = case.image[index];
        }
    }
    let value = u128::from_le_bytes(bytes);
    let gpr = &mut case.start.gpr;
    match insn.mnemonic() {
        Mnemonic::Cmpxchg8b => {
            gpr[0] = value as u32 as u64;
            gpr[2] = (value >> 32) as u32 as u64;
        }
        Mnemonic::Cmpxchg16b => {
            gpr[0] = value as u64;
            gpr[2] = (value >> 64) as u64;
        }
        _ => {
            let bits = size as u32 * 8;
            let mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
            // The accumulator may be part of the address: then they stay unequal.
            gpr[0] = gpr[0] & !mask | value as u64 & mask;
        }
    }
}

/// MXCSR as memory operand. Bit 17 is a flag of one vendor's processors.
fn mxcsr(random: &mut Random) -> u32 {
    let value = random.bits() as u32;
    if random.chance(10) { value & !(1 << 17) } else { value & 0xffff }
}

fn fxsave_area(random: &mut Random, insn: &Instruction, address: u64, case: &mut Case) {
    if matches!(insn.mnemonic(), Mnemonic::Fxrstor | Mnemonic::Fxrstor64) {
        let image = restorable(random);
        put(case, address, &image[..512]);
    } else {
        open(case, address.wrapping_add(6), 18, LAST_INSTRUCTION);
        open(case, address.wrapping_add(28), 4, MXCSR_MASK);
    }
}

fn xsave_area(random: &mut Random, insn: &Instruction, address: u64, case: &mut Case) {
    match insn.mnemonic() {
        Mnemonic::Xrstor | Mnemonic::Xrstor64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
            let mut image = restorable(random);
            image[512] = random.below(8) as u8;
            put(case, address, &image);
        }
        Mnemonic::Xsave | Mnemonic::Xsave64 => {
            open(case, address.wrapping_add(6), 18, LAST_INSTRUCTION);
            open(case, address.wrapping_add(28), 4, MXCSR_MASK);
            open(
                case,
                address.wrapping_add(512),
                8,
                "which components count as initial is the processor's choice",
            );
        }
        _ => open(case, address, XSAVE_SIZE, "what the optimized forms leave out is the processor's choice"),
    }
}

fn restorable(random: &mut Random) -> [u8; XSAVE_SIZE] {
    let mut image = [0; XSAVE_SIZE];
    values::fpu(random).to_xsave(&mut image);
    if random.chance(20) {
        image[24..28].copy_from_slice(&mxcsr(random).to_le_bytes());
    }
    image
}

/// Writes initial memory, as far as it is in the arena's data.
fn put(case: &mut Case, address: u64, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        if let Some(index) = image_index(address.wrapping_add(i as u64)).filter(|&i| i < IMAGE_CODE) {
            case.image[index] = byte;
        }
    }
}

/// Leaves some final memory out of the comparison.
fn open(case: &mut Case, address: u64, len: usize, why: &'static str) {
    for i in 0..len {
        if let Some(index) = image_index(address.wrapping_add(i as u64)).filter(|&i| i < IMAGE_SIZE) {
            case.open.push((index, 1, why));
        }
    }
}
