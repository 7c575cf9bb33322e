//! Vector instructions: the guest's own, on the same registers ([`crate::jit::vector`]), with their memory operand looked
//! up and their general register replaced.
//!
//! Which instructions these are, and what they need, is what the interpreter says ([`crate::native`]). Not among them, and
//! left to their handlers: MMX registers, accesses under a mask, loads and stores of MXCSR.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::memory::{For, replace_memory};
use super::registers::{number, sized};
use super::{Aside, Lowering, Use};
use crate::interp::operands::address_bits;
use crate::interp::vector::is_ours;
use crate::jit::emit::{Alu, B4, B8, EQUAL, NOT_EQUAL, RAX, RCX, RDX, Reg};
use crate::jit::gate::{PINNED, slot};
use crate::jit::vector::{FLOAT, SSE, VEX, loaded};
use crate::native::{Class, FeatureSet, is_floating, vector_class, vector_is_aligned};
use crate::state::reg;

/// The instruction is lowered here, if the model has it.
pub(super) fn is_vector(insn: &Instruction) -> bool {
    needs(insn).is_some()
}

/// What the instruction needs of [`crate::jit::Hot::vector`]; none if it is not lowered here.
fn needs(insn: &Instruction) -> Option<u32> {
    if !is_ours(insn) {
        return None;
    }
    let class = match vector_class(insn)? {
        Class::Sse => SSE,
        Class::Vex => VEX,
        Class::Mmx | Class::X87 => return None,
    };
    let features = FeatureSet::of(insn.cpuid_features())?;
    if !FeatureSet::host().contains(features) || !(0..insn.op_count()).all(|i| takes(insn, i)) {
        return None;
    }
    Some(if is_floating(insn) { class | FLOAT } else { class })
}

/// Whether an operand can be lowered. A vector index in an address, and the implied address of MASKMOVDQU, cannot.
fn takes(insn: &Instruction, operand: u32) -> bool {
    match insn.op_kind(operand) {
        OpKind::Register => {
            let register = insn.op_register(operand);
            register.is_xmm() || register.is_ymm() || register.is_gpr32() || register.is_gpr64()
        }
        OpKind::Memory => {
            let masked = matches!(
                insn.mnemonic(),
                Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
            );
            let sized = matches!(insn.memory_size().size(), 1 | 2 | 4 | 8 | 16 | 32);
            !masked && sized && !insn.memory_index().is_vector_register() && address_bits(insn) == 64
        }
        OpKind::Immediate8 | OpKind::Immediate8_2nd => true,
        _ => false,
    }
}

/// What it does with the status flags; none if it is not lowered here.
pub(super) fn flag_use(insn: &Instruction) -> Option<Use> {
    // COMISS and its like, PTEST and the string comparisons define all six.
    is_vector(insn).then(|| if insn.rflags_modified() != 0 { Use::Sets } else { Use::None })
}

/// What the string comparisons have besides their operands.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Implied {
    /// Lengths in RAX and RDX.
    lengths: bool,
    /// An index into ECX.
    index: bool,
}

fn implied(insn: &Instruction) -> Implied {
    use Mnemonic as M;
    let (lengths, index) = match insn.mnemonic() {
        M::Pcmpestri | M::Pcmpestri64 | M::Vpcmpestri | M::Vpcmpestri64 => (true, true),
        M::Pcmpestrm | M::Pcmpestrm64 | M::Vpcmpestrm | M::Vpcmpestrm64 => (true, false),
        M::Pcmpistri | M::Vpcmpistri => (false, true),
        _ => (false, false),
    };
    Implied { lengths, index }
}

impl Lowering<'_> {
    pub(super) fn vector(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(needs) = needs(insn) else { return false };
        self.make_ready(at, needs);
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        if memory {
            let to_memory = insn.op0_kind() == OpKind::Memory;
            let aligned = vector_is_aligned(insn);
            let access = if to_memory { For::Writing } else { For::Reading };
            let looked = self.look_up_vector(insn, access, aligned);
            self.execute(at, insn, true);
            self.looked(at, looked);
        } else {
            self.execute(at, insn, false);
        }
        true
    }

    /// Sees to it that vector state is in the host's registers. If it cannot be, the handler executes the instruction and
    /// the block is left.
    fn make_ready(&mut self, at: usize, needs: u32) {
        let missing = needs & !self.vector;
        if missing == 0 {
            return;
        }
        self.clobber_flags();
        let jump = if missing.is_power_of_two() {
            self.asm.test_mem_imm(loaded(), missing);
            self.asm.jcc(EQUAL)
        } else {
            self.asm.load(B4, RAX, loaded());
            self.asm.alu_imm(B4, Alu::And, RAX, missing as i32);
            self.asm.alu_imm(B4, Alu::Cmp, RAX, missing as i32);
            self.asm.jcc(NOT_EQUAL)
        };
        self.vector |= needs;
        let resume = self.asm.here();
        self.asides.push(Aside::GetVector { jump, number: at, needs, resume });
    }

    /// The instruction itself; its memory operand has been looked up.
    fn execute(&mut self, at: usize, insn: &Instruction, memory: bool) {
        let used = if insn.rflags_modified() != 0 { Use::Sets } else { Use::None };
        let mut host = plain(insn);
        let implied = implied(insn);
        if memory {
            replace_memory(&mut host, implied.lengths);
        }
        if implied.lengths {
            if memory {
                // Their registers are those of the address.
                self.join_address();
                self.asm.mov(B8, RCX, RDX);
                host.set_memory_base(Register::RCX);
            }
            self.read_guest(RAX, reg::RAX);
            self.read_guest(RDX, reg::RDX);
        }
        let written = self.replace_general(&mut host);
        self.asm.guest(&host);
        if let Some(guest) = written {
            self.asm.store(B8, slot(guest), RCX);
        }
        if implied.index {
            self.write_guest(reg::RCX, RCX);
        }
        self.flags_after(at, used);
    }

    /// Replaces the general register, if there is one, by its host register or by RCX. Gives the guest register to be
    /// written from RCX afterwards.
    fn replace_general(&mut self, insn: &mut Instruction) -> Option<usize> {
        let operand = (0..insn.op_count())
            .find(|&i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr())?;
        let register = insn.op_register(operand);
        let guest = number(register);
        let host: Reg = PINNED[guest].unwrap_or(RCX);
        insn.set_op_register(operand, sized(host, register.size()));
        if PINNED[guest].is_some() {
            return None;
        }
        // Only a first operand is written, and then whole.
        if operand == 0 {
            return Some(guest);
        }
        self.asm.load(B8, RCX, slot(guest));
        None
    }

    /// What [`Self::make_ready`] needed was not there.
    pub(super) fn write_get_vector(&mut self, number: usize, needs: u32, resume: usize) {
        self.asm.set32(RAX, needs);
        self.asm.call_to(self.gate.get_vector);
        let missing = self.asm.jcc(NOT_EQUAL);
        self.asm.jump_back(resume);
        self.asm.bind(missing);
        self.call_op(number);
        self.asm.jcc_to(NOT_EQUAL, self.gate.exit);
        self.leave_after(number);
    }

    /// After a handler, in a place where `vector` was there before.
    pub(super) fn get_vector_again(&mut self, number: usize, vector: u32) {
        if vector == 0 {
            return;
        }
        self.asm.set32(RAX, vector);
        self.asm.call_to(self.gate.get_vector);
        let there = self.asm.jcc(EQUAL);
        self.leave_after(number);
        self.asm.bind(there);
    }
}

/// Without prefixes that mean nothing here, and in the form that does not go past the caches.
fn plain(insn: &Instruction) -> Instruction {
    let mut plain = *insn;
    plain.set_segment_prefix(Register::None);
    plain.set_has_repe_prefix(false);
    plain.set_has_repne_prefix(false);
    plain.set_code(temporal(insn.code()));
    plain
}

/// Stores that go past the caches are ordered by fences only; the interpreter's are not, and neither are these.
fn temporal(code: Code) -> Code {
    use Code::*;
    match code {
        Movntps_m128_xmm => Movaps_xmmm128_xmm,
        Movntpd_m128_xmm => Movapd_xmmm128_xmm,
        Movntdq_m128_xmm => Movdqa_xmmm128_xmm,
        VEX_Vmovntps_m128_xmm => VEX_Vmovaps_xmmm128_xmm,
        VEX_Vmovntpd_m128_xmm => VEX_Vmovapd_xmmm128_xmm,
        VEX_Vmovntdq_m128_xmm => VEX_Vmovdqa_xmmm128_xmm,
        VEX_Vmovntps_m256_ymm => VEX_Vmovaps_ymmm256_ymm,
        VEX_Vmovntpd_m256_ymm => VEX_Vmovapd_ymmm256_ymm,
        VEX_Vmovntdq_m256_ymm => VEX_Vmovdqa_ymmm256_ymm,
        other => other,
    }
}
