//! Bit tests whose bit number reaches beyond the operand, and the instructions on general registers with VEX encodings.

use std::arch::asm;
use std::sync::OnceLock;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::memory::{For, is_plain, replace_memory};
use super::registers::{number, sized};
use super::{Lowering, Use};
use crate::jit::emit::{Alu, B4, B8, Mem, RAX, RCX, RDX, Reg};
use crate::jit::gate::{PINNED, slot};
use crate::state::reg;

/// What an instruction of this family does with the flags; none for others, and for those that are not lowered.
pub(super) fn flag_use(insn: &Instruction) -> Option<Use> {
    use Mnemonic as M;
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let used = match insn.mnemonic() {
        M::Bt | M::Bts | M::Btr | M::Btc => {
            let beyond = insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register;
            return (beyond && is_plain(insn)).then_some(Use::Changes);
        }
        M::Sarx | M::Shlx | M::Shrx | M::Rorx | M::Pdep | M::Pext | M::Mulx => Use::None,
        M::Andn | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi | M::Bextr if keeps_flags() => Use::Changes,
        _ => return None,
    };
    let host = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2");
    (host && (!memory || is_plain(insn)) && unpinned(insn) <= scratch(insn).len()).then_some(used)
}

/// Scratch registers that are left for operands.
fn scratch(insn: &Instruction) -> &'static [Reg] {
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    match (memory, insn.mnemonic() == Mnemonic::Mulx) {
        (false, false) => &[RCX, RAX, RDX],
        (false, true) => &[RCX, RAX],
        // RDX is the address.
        (true, false) => &[RCX, RAX],
        // RAX is the address, RDX a factor.
        (true, true) => &[RCX],
    }
}

/// Different registers among the operands that have no host register.
fn unpinned(insn: &Instruction) -> usize {
    let mut seen = Vec::new();
    for i in (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register) {
        let guest = number(insn.op_register(i));
        if PINNED[guest].is_none() && !seen.contains(&guest) {
            seen.push(guest);
        }
    }
    seen.len()
}

impl Lowering<'_> {
    pub(super) fn bits(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(used) = flag_use(insn) else { return false };
        match insn.mnemonic() {
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => self.bit_beyond(at, insn, used),
            _ => self.vex(at, insn, used),
        }
        true
    }

    /// The word that holds the bit is looked up, and the bit tested there by its number in the word.
    fn bit_beyond(&mut self, at: usize, insn: &Instruction, used: Use) {
        let size = insn.op1_register().size();
        let bit = number(insn.op1_register());
        self.effective_address(insn);
        self.clobber_flags();
        self.read_guest(RCX, bit);
        match size {
            // MOVSX RCX, CX; MOVSXD RCX, ECX.
            2 => self.asm.bytes(&[0x48, 0x0f, 0xbf, 0xc9]),
            4 => self.asm.bytes(&[0x48, 0x63, 0xc9]),
            _ => {}
        }
        let shift = (size * 8).trailing_zeros() as u8;
        // SAR RCX, shift.
        self.asm.bytes(&[0x48, 0xc1, 0xf9, shift]);
        let scale = size.trailing_zeros() as u8;
        self.asm.lea(B8, RDX, Mem { base: Some(RDX), index: Some((RCX, scale)), disp: 0 });
        let reads_only = insn.mnemonic() == Mnemonic::Bt;
        let looked = self.look_up(size as i32, if reads_only { For::Reading } else { For::Writing });
        self.join_address();
        self.read_guest(RCX, bit);
        self.asm.alu_imm(B4, Alu::And, RCX, size as i32 * 8 - 1);
        self.flags_before(at, used);
        let mut host = *insn;
        host.set_has_repe_prefix(false);
        host.set_has_repne_prefix(false);
        replace_memory(&mut host, true);
        host.set_op_register(1, sized(RCX, size));
        self.asm.guest(&host);
        self.flags_after(at, used);
        self.looked(at, looked);
    }

    fn vex(&mut self, at: usize, insn: &Instruction, used: Use) {
        let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        let looked = memory.then(|| self.look_up_operand(insn, For::Reading));
        if memory {
            self.join_address();
        }
        self.flags_before(at, used);
        let mut host = *insn;
        if memory {
            replace_memory(&mut host, true);
        }
        let multiplies = insn.mnemonic() == Mnemonic::Mulx;
        if multiplies {
            if memory {
                self.asm.mov(B8, RAX, RDX);
                host.set_memory_base(Register::RAX);
            }
            self.read_guest(RDX, reg::RDX);
        }
        let mut scratch = scratch(insn).iter();
        let mut loaded: Vec<(usize, Reg)> = Vec::new();
        for i in (0..insn.op_count()).filter(|&i| insn.op_kind(i) == OpKind::Register) {
            let register = insn.op_register(i);
            let guest = number(register);
            let known = PINNED[guest].or_else(|| loaded.iter().find(|l| l.0 == guest).map(|l| l.1));
            let host_register = match known {
                Some(known) => known,
                None => {
                    let &next = scratch.next().unwrap_or(&RCX);
                    self.asm.load(B8, next, slot(guest));
                    loaded.push((guest, next));
                    next
                }
            };
            host.set_op_register(i, sized(host_register, register.size()));
        }
        self.asm.guest(&host);
        let written = if multiplies { 2 } else { 1 };
        for (guest, from) in loaded {
            if (0..written).any(|i| number(insn.op_register(i)) == guest) {
                self.asm.store(B8, slot(guest), from);
            }
        }
        self.flags_after(at, used);
        if let Some(looked) = looked {
            self.looked(at, looked);
        }
    }
}

/// On this host BMI1's instructions, and BZHI, leave AF and PF, which the manual leaves undefined, as they were, and BEXTR
/// clears SF, which is what the interpreter does. Elsewhere they are the handlers'.
fn keeps_flags() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let host = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2");
        const AF_PF: u16 = 0x1400;
        const SF: u16 = 0x8000;
        macro_rules! after {
            ($before:expr, $value:expr, $text:literal) => {{
                let flags: u16;
                // SAFETY: an instruction on registers only that the host has; flags and AX are declared as changed.
                unsafe {
                    asm!("sahf", $text, "lahf", inout("ax") $before => flags, v = in(reg) $value, c = in(reg) 0x4000_u64,
                        r = out(reg) _, options(nomem, nostack));
                }
                flags
            }};
        }
        let keeps = |before: u16, value: u64| {
            let all = [
                after!(before, value, "andn {r}, {c}, {v}"),
                after!(before, value, "blsi {r}, {v} /* {c} */"),
                after!(before, value, "blsmsk {r}, {v} /* {c} */"),
                after!(before, value, "blsr {r}, {v} /* {c} */"),
                after!(before, value, "bzhi {r}, {v}, {c}"),
            ];
            let extracted = after!(before, value, "bextr {r}, {v}, {c}");
            all.into_iter().chain([extracted]).all(|flags| (flags ^ before) & AF_PF == 0) && extracted & SF == 0
        };
        host && [0, 1, 3, 1 << 63, u64::MAX].into_iter().all(|v| keeps(0x0200, v) && keeps(0xd700, v))
    })
}
