//! The guest's vector registers in the host's, number for number, while translated code runs.
//!
//! Nothing is moved until a vector instruction is executed: then all registers are loaded, and stay until something
//! leaves translated code or calls Rust (JIT-6), which is free to use them. [`super::Hot::vector`] says what is there.
//! Most blocks never touch vectors, and see none of this but a compare on the way out.
//!
//! MXCSR is loaded with the first floating-point instruction, and only if the guest masks all exceptions: nothing
//! can then fault, and the sticky flags come back with the register. With one unmasked, floating point is the handlers'.
//!
//! What may execute (CR0, CR4, XCR0) is asked when the registers are loaded: only handlers change it, and after a handler
//! they are loaded anew.

use std::mem::offset_of;

use x86defs::{cr0, cr4, xcr0};

use super::Hot;
use super::emit::{Alu, Assembler, B4, EQUAL, Mem, MoveVector, NOT_EQUAL, RAX, RCX, RDX, RSP};
use super::gate::field;
use crate::Cpu;
use crate::native::FeatureSet;

/// Bits of [`Hot::vector`]. Legacy encodings may execute, on registers that are loaded.
pub(super) const SSE: u32 = 1;
/// VEX encodings may execute, on registers that are loaded.
pub(super) const VEX: u32 = 2;
/// MXCSR is the guest's.
pub(super) const FLOAT: u32 = 4;

/// MXCSR as Rust code expects it.
pub(super) const HOST_MXCSR: u32 = 0x1f80;
const MXCSR_MASKS: i32 = 0x1f80;

/// Addresses of the shared code.
pub(super) struct Vectors {
    /// Tries to get what is asked for in EAX (bits as above); equal if it is there. Clobbers RAX, RCX, RDX.
    pub get: u64,
    /// Stores what is loaded. Changes flags only.
    put: u64,
}

/// [`Hot::vector`].
pub(super) fn loaded() -> Mem {
    field(offset_of!(Cpu, jit) + offset_of!(Hot, vector))
}

/// Writes the shared code.
pub(super) fn emit(asm: &mut Assembler) -> Vectors {
    let put = asm.address(asm.here());
    emit_put(asm);
    let get = asm.address(asm.here());
    emit_get(asm);
    Vectors { get, put }
}

/// Puts vector state back, if it is in the host's registers. Changes flags only.
pub(super) fn emit_put_back(asm: &mut Assembler, vectors: &Vectors) {
    asm.alu_mem_imm(B4, Alu::Cmp, loaded(), 0);
    let none = asm.jcc(EQUAL);
    asm.call_to(vectors.put);
    asm.bind(none);
}

/// The registers are 32 bytes if the host has them; a guest on a host that has not sees no AVX.
fn move_all(asm: &mut Assembler, direction: MoveVector) {
    let wide = FeatureSet::host().contains(FeatureSet::AVX);
    for number in 0..16 {
        let at = offset_of!(Cpu, state.vector.ymm) + usize::from(number) * 32;
        asm.move_vector(number, field(at), wide, direction);
    }
    if wide && matches!(direction, MoveVector::Store) {
        // VZEROUPPER: legacy SSE code, which Rust's is, may be slow on registers with upper halves.
        asm.bytes(&[0xc5, 0xf8, 0x77]);
    }
}

fn emit_put(asm: &mut Assembler) {
    move_all(asm, MoveVector::Store);
    asm.test_mem_imm(loaded(), FLOAT);
    let integer = asm.jcc(EQUAL);
    asm.stmxcsr(field(offset_of!(Cpu, state.vector.mxcsr)));
    asm.ldmxcsr(field(offset_of!(Cpu, jit) + offset_of!(Hot, host_mxcsr)));
    asm.bind(integer);
    asm.alu_mem_imm(B4, Alu::And, loaded(), 0);
    asm.bytes(&[0xc3]);
}

fn emit_get(asm: &mut Assembler) {
    asm.push(RAX);
    asm.test_mem_imm(loaded(), SSE | VEX);
    let registers = asm.jcc(NOT_EQUAL);
    emit_usable(asm);
    asm.store(B4, loaded(), RAX);
    move_all(asm, MoveVector::Load);
    asm.bind(registers);

    // MXCSR belongs to registers that are loaded, or nobody would put it back.
    asm.test_mem_imm(Mem::at(RSP, 0), FLOAT);
    let integer = asm.jcc(EQUAL);
    asm.load(B4, RCX, loaded());
    asm.test_imm(RCX, FLOAT);
    let there = asm.jcc(NOT_EQUAL);
    asm.test_imm(RCX, SSE | VEX);
    let unusable = asm.jcc(EQUAL);
    let mxcsr = field(offset_of!(Cpu, state.vector.mxcsr));
    asm.load(B4, RAX, mxcsr);
    asm.alu_imm(B4, Alu::And, RAX, MXCSR_MASKS);
    asm.alu_imm(B4, Alu::Cmp, RAX, MXCSR_MASKS);
    let unmasked = asm.jcc(NOT_EQUAL);
    asm.ldmxcsr(mxcsr);
    asm.alu_mem_imm(B4, Alu::Or, loaded(), FLOAT as i32);
    [integer, there, unusable, unmasked].into_iter().for_each(|jump| asm.bind(jump));

    asm.pop(RAX);
    asm.load(B4, RCX, loaded());
    asm.alu(B4, Alu::And, RCX, RAX);
    asm.alu(B4, Alu::Cmp, RCX, RAX);
    asm.bytes(&[0xc3]);
}

/// [`SSE`] and [`VEX`] into EAX: [`Cpu::check_vector`] for 64-bit code.
fn emit_usable(asm: &mut Assembler) {
    const AVX: u64 = xcr0::SSE | xcr0::AVX;
    asm.load(B4, RCX, field(offset_of!(Cpu, state.cr0)));
    asm.load(B4, RDX, field(offset_of!(Cpu, state.cr4)));
    asm.set32(RAX, 0);
    asm.test_imm(RCX, (cr0::EM | cr0::TS) as u32);
    let trapped = asm.jcc(NOT_EQUAL);
    asm.test_imm(RDX, cr4::OSFXSR as u32);
    let disabled = asm.jcc(EQUAL);
    asm.alu_imm(B4, Alu::Or, RAX, SSE as i32);
    [trapped, disabled].into_iter().for_each(|jump| asm.bind(jump));
    asm.test_imm(RCX, cr0::TS as u32);
    let trapped = asm.jcc(NOT_EQUAL);
    asm.test_imm(RDX, cr4::OSXSAVE as u32);
    let disabled = asm.jcc(EQUAL);
    asm.load(B4, RCX, field(offset_of!(Cpu, state.xcr0)));
    asm.alu_imm(B4, Alu::And, RCX, AVX as i32);
    asm.alu_imm(B4, Alu::Cmp, RCX, AVX as i32);
    let without = asm.jcc(NOT_EQUAL);
    asm.alu_imm(B4, Alu::Or, RAX, VEX as i32);
    [trapped, disabled, without].into_iter().for_each(|jump| asm.bind(jump));
}
