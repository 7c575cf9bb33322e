//! FNSTENV, FLDENV, FNSAVE and FRSTOR: images of the x87 state in 16- and 32-bit, protected- and real-mode formats
//! ("x87 FPU State Image in Memory").
//!
//! FCS and FDS are deprecated, that is 0, so real-mode images hold the offsets where older processors put linear
//! addresses.

use iced_x86::MemorySize;

use super::{EXCEPTIONS, FCW_FIXED_1, FCW_WRITABLE, FSW_TOP, FSW_TOP_SHIFT, check};
use crate::Cpu;
use crate::op::Cold;
use crate::state::X87State;
use crate::trap::Exec;

/// Layout of an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Format {
    /// 32-bit fields, otherwise 16-bit ones.
    wide: bool,
    /// Real or virtual-8086 mode.
    real: bool,
}

/// Bytes of the largest image: seven fields of four bytes.
const MOST: usize = 28;
const REGISTERS: usize = 80;

impl Format {
    fn of(cpu: &Cpu, cold: &Cold) -> Self {
        let wide = matches!(cold.insn.memory_size(), MemorySize::FpuEnv28 | MemorySize::FpuState108);
        Self { wide, real: !cpu.state.protected() || cpu.state.v86() }
    }

    fn width(self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// Bytes of the environment.
    fn size(self) -> usize {
        7 * self.width()
    }

    fn write(self, x87: &X87State, out: &mut [u8]) {
        let (fip, fdp) = (x87.fip as u32, x87.fdp as u32);
        let fop = u32::from(x87.fop & 0x7ff);
        let pointers = match (self.real, self.wide) {
            (false, true) => [fip, fop << 16, fdp, 0xffff_0000],
            (false, false) => [fip, 0, fdp, 0],
            (true, true) => [fip & 0xffff, fip >> 16 << 12 | fop, fdp & 0xffff, fdp >> 16 << 12],
            (true, false) => [fip, fip >> 4 & 0xf000 | fop, fdp, fdp >> 4 & 0xf000],
        };
        let words = [u32::from(x87.fcw), u32::from(x87.fsw), u32::from(full_tags(x87))];
        let words = words.map(|word| word | 0xffff_0000);
        for (field, value) in out.chunks_exact_mut(self.width()).zip(words.into_iter().chain(pointers)) {
            field.copy_from_slice(&value.to_le_bytes()[..self.width()]);
        }
    }

    fn read(self, image: &[u8], x87: &mut X87State) {
        let mut fields = [0_u32; 7];
        for (field, bytes) in fields.iter_mut().zip(image.chunks_exact(self.width())) {
            *field = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
        }
        let [fcw, fsw, tags, fip, second, fdp, fourth] = fields;
        x87.fcw = fcw as u16 & FCW_WRITABLE | FCW_FIXED_1;
        x87.set_top(usize::from(fsw as u16 >> FSW_TOP_SHIFT & 7));
        x87.fsw = x87.fsw & FSW_TOP | fsw as u16 & !FSW_TOP;
        x87.update_summary();
        x87.ftw = (0..8).filter(|i| tags >> (2 * i) & 3 != 3).fold(0_u8, |ftw, i| ftw | 1 << i);
        let (fip, fdp, fop) = match (self.real, self.wide) {
            (false, true) => (fip, fdp, second >> 16),
            // The 16-bit protected-mode format has no opcode.
            (false, false) => (fip, fdp, 0),
            (true, true) => (fip & 0xffff | second >> 12 << 16, fdp & 0xffff | fourth >> 12 << 16, second),
            (true, false) => (fip | (second & 0xf000) << 4, fdp | (fourth & 0xf000) << 4, second),
        };
        x87.fip = u64::from(fip);
        x87.fdp = u64::from(fdp);
        x87.fop = fop as u16 & 0x7ff;
    }
}

/// The full tag word: valid 0, zero 1, special 2, empty 3, two bits for each physical register.
fn full_tags(x87: &X87State) -> u16 {
    (0..8_u8).fold(0, |tags, register| {
        let tag = if x87.ftw >> register & 1 == 0 {
            3
        } else {
            tag_of(&x87.st[usize::from(register).wrapping_sub(x87.top()) & 7])
        };
        tags | tag << (2 * register)
    })
}

fn tag_of(value: &[u8; 16]) -> u16 {
    let fraction = u64::from_le_bytes(*value.first_chunk().unwrap_or(&[0; 8]));
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    match (exponent, fraction) {
        (0, 0) => 1,
        (1..0x7fff, _) if fraction >> 63 != 0 => 0,
        _ => 2,
    }
}

pub(super) fn fnstenv(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, false)?;
    let format = Format::of(cpu, cold);
    let mut image = [0; MOST];
    let image = &mut image[..format.size()];
    format.write(&cpu.state.x87, image);
    let linear = cpu.operand_linear(&cold.insn, image.len(), true)?;
    cpu.write_bytes(linear, image)?;
    let fcw = cpu.state.x87.fcw | EXCEPTIONS;
    cpu.state.x87.set_control(fcw);
    Ok(())
}

pub(super) fn fldenv(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, true)?;
    let format = Format::of(cpu, cold);
    let mut image = [0; MOST];
    let image = &mut image[..format.size()];
    let linear = cpu.operand_linear(&cold.insn, image.len(), false)?;
    cpu.read_bytes(linear, image)?;
    format.read(image, &mut cpu.state.x87);
    Ok(())
}

pub(super) fn fnsave(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, false)?;
    let format = Format::of(cpu, cold);
    let mut image = [0; MOST + REGISTERS];
    let image = &mut image[..format.size() + REGISTERS];
    let (environment, registers) = image.split_at_mut(format.size());
    format.write(&cpu.state.x87, environment);
    for (to, from) in registers.chunks_exact_mut(10).zip(&cpu.state.x87.st) {
        to.copy_from_slice(&from[..10]);
    }
    let linear = cpu.operand_linear(&cold.insn, image.len(), true)?;
    cpu.write_bytes(linear, image)?;
    cpu.state.x87.initialise();
    Ok(())
}

pub(super) fn frstor(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, true)?;
    let format = Format::of(cpu, cold);
    let mut image = [0; MOST + REGISTERS];
    let image = &mut image[..format.size() + REGISTERS];
    let linear = cpu.operand_linear(&cold.insn, image.len(), false)?;
    cpu.read_bytes(linear, image)?;
    let (environment, registers) = image.split_at(format.size());
    format.read(environment, &mut cpu.state.x87);
    for (to, from) in cpu.state.x87.st.iter_mut().zip(registers.chunks_exact(10)) {
        to[..10].copy_from_slice(from);
        to[10..].fill(0);
    }
    Ok(())
}
