//! What the architecture, or the difference between vendors, leaves open: each function says why. The software CPU follows
//! the SDM; the host may be of another make.

use iced_x86::{CpuidFeature, FlowControl, Instruction, MemorySize, Mnemonic, OpKind, Register};
use x86defs::{pf_error, rflags, vector};

use crate::case::{Bits, Case, Final, image_index};

fn is_masked_move(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        Mnemonic::Maskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
    )
}

fn pushes_segment(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Push && insn.op0_register().is_segment_register()
}

/// Instructions about which this module has more to say than fits into a sequence, where one depends on the other.
pub fn is_loose(insn: &Instruction) -> bool {
    let sha = insn.cpuid_features().contains(&CpuidFeature::SHA);
    // One vendor's MXCSR has one more bit.
    let mxcsr = matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr);
    mxcsr || insn.is_vsib() || is_masked_move(insn) || is_state_area(insn) || sha || pushes_segment(insn)
}

/// Saves or restores x87 or extended state: several accesses, in an order of the processor's choice.
fn is_state_area(insn: &Instruction) -> bool {
    insn.is_save_restore_instruction()
        || matches!(
            insn.mnemonic(),
            Mnemonic::Fldenv | Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Frstor
        )
}

/// Prefixes of the case's first instruction.
fn prefixes(case: &Case) -> usize {
    const LEGACY: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    let code = image_index(case.start.rip).map_or(&[][..], |at| &case.image[at..]);
    let rex = |byte: &u8| case.bits == Bits::B64 && byte & 0xf0 == 0x40;
    code.iter().take_while(|byte| LEGACY.contains(byte) || rex(byte)).count()
}

/// True where two different ends are both right.
pub(super) fn either_fault(case: &Case, insn: &Instruction, native: &Final, soft: &Final) -> bool {
    let (n, s) = (native.exception.vector, soft.exception.vector);
    let one_is = |a: u8, b: u8| (n, s) == (a, b) || (n, s) == (b, a);
    // "Priority Among Concurrent Events" has both in one class.
    if one_is(vector::AC, vector::PF) {
        return true;
    }
    // A near branch to a non-canonical address, against the faults of the stack access that goes with it.
    let branch = insn.flow_control() != FlowControl::Next;
    if branch && [vector::AC, vector::PF, vector::SS].into_iter().any(|v| one_is(v, vector::GP)) {
        return true;
    }
    // Whether accesses of more than 8 bytes, masked ones and the elements of a gather are checked for #AC is
    // the processor's choice; so is it for ENTER's probe of the new top of stack, for a segment register's push, and
    // for a store that an x87 exception suppresses.
    let wide = insn.memory_size().size() > 8 || is_masked_move(insn) || insn.is_vsib();
    let x87 = insn.cpuid_features().contains(&CpuidFeature::FPU) || insn.mnemonic() == Mnemonic::Fisttp;
    let stack = insn.mnemonic() == Mnemonic::Enter || pushes_segment(insn);
    if (wide || stack || x87) && (n == vector::AC || s == vector::AC) {
        return true;
    }
    // A gather may take traps between its elements.
    if insn.is_vsib() && n == vector::DB {
        return true;
    }
    // A misaligned and non-canonical address relative to SS.
    if (wide || is_state_area(insn)) && one_is(vector::GP, vector::SS) {
        return true;
    }
    // A mask of zeros: "exceptions associated with addressing memory may still be signaled".
    if is_masked_move(insn) && (n == vector::PF || n == vector::GP) {
        return true;
    }
    // CVTPI2PS from memory: whether a pending x87 exception is raised first.
    if insn.mnemonic() == Mnemonic::Cvtpi2ps && insn.op1_kind() == OpKind::Memory && s == vector::MF {
        return true;
    }
    // SHA's operands need not be aligned on some processors.
    if insn.cpuid_features().contains(&CpuidFeature::SHA) && s == vector::GP {
        return true;
    }
    // State areas are several accesses, and one of them is the first to fault.
    if is_state_area(insn) && [vector::PF, vector::GP, vector::SS].into_iter().any(|v| one_is(vector::PF, v))
    {
        return true;
    }
    // BOUND reads two limits: the first may be fetched before the second turns out to lie beyond the segment's end.
    if insn.mnemonic() == Mnemonic::Bound && n == vector::PF && s == vector::GP {
        return true;
    }
    // An 80-bit operand is two accesses.
    let ten_bytes = matches!(insn.memory_size(), MemorySize::Float80 | MemorySize::Bcd);
    if ten_bytes && n == vector::PF && (s == vector::GP || s == vector::SS) {
        return true;
    }
    // An undefined opcode with so many prefixes that, with the operands it would have, it exceeds 15 bytes.
    if insn.is_invalid() && prefixes(case) > 4 && one_is(vector::GP, vector::UD) {
        return true;
    }
    // XSAVE may touch the areas of all enabled components, and the host has more of them.
    if insn.is_save_restore_instruction() && n == vector::PF && s != vector::PF {
        return true;
    }
    // Some processors want the offset to be canonical too, where FS or GS makes a canonical address of it.
    let based = matches!(insn.memory_segment(), Register::FS | Register::GS);
    if based && n == vector::GP && soft.exception.address >> 63 != 0 {
        return true;
    }
    // An undefined opcode at the end of a page, UD0 and UD1 among them: vendors differ in whether what would follow it
    // is fetched.
    let fetch =
        |of: &Final| of.exception.vector == vector::PF && of.exception.error_code & pf_error::FETCH != 0;
    let undefined = insn.is_invalid() || matches!(insn.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1);
    undefined && (n == vector::UD && fetch(soft) || s == vector::UD && fetch(native))
}

/// A gather that faults goes on where it stopped; what mask and destination look like until then is between the
/// processor and itself.
pub(super) fn vectors(insn: &Instruction, native: &Final) -> bool {
    insn.is_vsib() && native.exception.vector != vector::BP
}

/// Whether a conversion to or from an MMX register that raises #XM, or a masked store that faults, has switched to MMX state
/// before.
pub(super) fn x87(insn: &Instruction, native: &Final) -> bool {
    let mmx = (0..insn.op_count()).any(|i| insn.op_register(i).is_mm());
    let faults = native.exception.vector != vector::BP;
    mmx && native.exception.vector == vector::XM || insn.mnemonic() == Mnemonic::Maskmovq && faults
}

/// Bits of MXCSR that are not compared: the software CPU's stated deviation for PE beside an unmasked overflow or underflow.
pub(super) fn mxcsr(insn: &Instruction, native: &Final) -> u32 {
    const PE: u32 = 1 << 5;
    const OVERFLOW_AND_UNDERFLOW_MASKS: u32 = 3 << 10;
    const FLAGS: u32 = 0x3f;
    let unmasked = !native.registers.fpu.mxcsr & OVERFLOW_AND_UNDERFLOW_MASKS != 0;
    match insn.mnemonic() {
        _ if native.exception.vector != vector::XM => 0,
        // Several operations one after the other: the flags are those up to where it stopped.
        Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd => FLAGS,
        _ if unmasked => PE,
        _ => 0,
    }
}

/// A POPA that faults half-way is executed again whole: what it loaded so far does not matter.
pub(super) fn loaded_registers(insn: &Instruction, native: &Final) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Popa | Mnemonic::Popad) && native.exception.vector == vector::PF
}

/// Status flags that an instruction leaves undefined and that the software CPU does not take from the host's own
/// instruction: they are not compared.
pub fn flags(insn: &Instruction) -> u64 {
    const AF_PF: u64 = rflags::AF | rflags::PF;
    match insn.mnemonic() {
        // No host division is executed where it could fault.
        Mnemonic::Div | Mnemonic::Idiv => rflags::STATUS,
        Mnemonic::Andn | Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr | Mnemonic::Bzhi => AF_PF,
        Mnemonic::Bextr => AF_PF | rflags::SF,
        // Decimal adjustment does not exist in 64-bit mode, which the software CPU itself runs in.
        Mnemonic::Aaa | Mnemonic::Aas => rflags::OF | rflags::SF | rflags::ZF | rflags::PF,
        Mnemonic::Aad | Mnemonic::Aam => rflags::OF | rflags::AF | rflags::CF,
        Mnemonic::Daa | Mnemonic::Das => rflags::OF,
        _ => 0,
    }
}
