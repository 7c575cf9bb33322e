//! What the architecture, or the difference between vendors, leaves open: each function says why. The software CPU follows
//! the SDM; the host may be of another make.

use iced_x86::{CpuidFeature, FlowControl, Instruction, Mnemonic, Register};
use x86defs::{pf_error, rflags, vector};

use crate::case::Final;

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

/// Saves or restores x87 or extended state: several accesses, in an order of the processor's choice.
fn is_state_area(insn: &Instruction) -> bool {
    insn.is_save_restore_instruction()
        || matches!(
            insn.mnemonic(),
            Mnemonic::Fldenv | Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Frstor
        )
}

/// True where two different ends are both right.
pub(super) fn either_fault(insn: &Instruction, native: &Final, soft: &Final) -> bool {
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
    // the processor's choice; so is whether ENTER's probe of the new top of stack is.
    let wide = insn.memory_size().size() > 8 || is_masked_move(insn) || insn.is_vsib();
    if (wide || insn.mnemonic() == Mnemonic::Enter) && (n == vector::AC || s == vector::AC) {
        return true;
    }
    // A misaligned and non-canonical address relative to SS.
    if (wide || is_state_area(insn)) && one_is(vector::GP, vector::SS) {
        return true;
    }
    // A mask of zeros: "exceptions associated with addressing memory may still be signaled".
    if is_masked_move(insn) && n == vector::PF && s == vector::BP {
        return true;
    }
    // SHA's operands need not be aligned on some processors.
    if insn.cpuid_features().contains(&CpuidFeature::SHA) && s == vector::GP {
        return true;
    }
    // State areas are several accesses, and one of them is the first to fault.
    if is_state_area(insn) && (one_is(vector::PF, vector::GP) || one_is(vector::PF, vector::SS)) {
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
    // UD0 and UD1 at the end of a page: vendors differ in whether the ModRM byte is fetched.
    insn.is_invalid() && n == vector::UD && soft.exception.error_code & pf_error::FETCH != 0
}

/// The page fault's address is known to a page only: which byte of a large or masked area is touched first is the
/// processor's choice.
pub(super) fn fault_address(insn: &Instruction) -> bool {
    is_state_area(insn) || is_masked_move(insn)
}

/// Bits of a page fault's error code that are not compared: ARPL writes only if it has something to change, and
/// whether it asks for the right to write before, the SDM does not say.
pub(super) fn error_code(insn: &Instruction, native: &Final) -> u32 {
    if insn.mnemonic() == Mnemonic::Arpl && native.exception.vector == vector::PF {
        pf_error::WRITE
    } else {
        0
    }
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
pub(super) fn mxcsr(native: &Final) -> u32 {
    const PE: u32 = 1 << 5;
    const OVERFLOW_AND_UNDERFLOW_MASKS: u32 = 3 << 10;
    let unmasked = !native.registers.fpu.mxcsr & OVERFLOW_AND_UNDERFLOW_MASKS != 0;
    if native.exception.vector == vector::XM && unmasked { PE } else { 0 }
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
