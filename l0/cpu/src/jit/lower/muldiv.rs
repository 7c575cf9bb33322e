//! MUL, IMUL with one operand, DIV, IDIV, CMPXCHG8B and CMPXCHG16B: they work on RAX and RDX, which are scratch registers
//! here.

use std::mem::offset_of;
use std::sync::OnceLock;

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

use super::memory::{For, Looked, is_plain};
use super::registers::{is_high_byte, number, sized};
use super::{Lowering, Use};
use crate::Cpu;
use crate::jit::Hot;
use crate::jit::emit::{Alu, B4, B8, EQUAL, Fixup, NOT_EQUAL, RAX, RBX, RCX, RDX, RSI, Reg, Width};
use crate::jit::gate::{PINNED, field, slot};
use crate::state::reg;

/// Carry clear, as a condition code: unsigned, not below.
const NOT_BELOW: u8 = 3;

/// What an instruction of this family does with the flags; none for others, and for those that are not lowered.
pub(super) fn flag_use(insn: &Instruction) -> Option<Use> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Mul if has_source(insn) && keeps_flags() => Some(Use::Changes),
        M::Imul if insn.op_count() == 1 && has_source(insn) && keeps_flags() => Some(Use::Changes),
        M::Div | M::Idiv if has_source(insn) && matches!(size(insn), 4 | 8) => Some(Use::None),
        M::Cmpxchg8b | M::Cmpxchg16b if is_plain(insn) => Some(Use::Changes),
        _ => None,
    }
}

/// The handler may raise an exception although no memory is accessed.
pub(super) fn may_fault(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
}

fn has_source(insn: &Instruction) -> bool {
    match insn.op0_kind() {
        OpKind::Register => !is_high_byte(insn.op0_register()),
        _ => is_plain(insn),
    }
}

/// Bytes of the operand.
fn size(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    }
}

impl Lowering<'_> {
    pub(super) fn muldiv(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(used) = flag_use(insn) else { return false };
        match insn.mnemonic() {
            Mnemonic::Mul | Mnemonic::Imul => self.multiply(at, insn, used),
            Mnemonic::Div | Mnemonic::Idiv => self.divide(at, insn),
            _ => self.exchange_pair(at, insn, used),
        }
        true
    }

    /// The explicit operand in a register that is not RAX or RDX, and the lookup if it is in memory.
    fn source(&mut self, insn: &Instruction) -> (Reg, Option<Looked>) {
        if insn.op0_kind() == OpKind::Register {
            return (self.guest_in(number(insn.op0_register()), RCX), None);
        }
        let looked = self.look_up_operand(insn, For::Reading);
        let operand = self.operand();
        match size(insn) {
            1 => self.asm.load_u8(RCX, operand),
            2 => self.asm.load_u16(RCX, operand),
            4 => self.asm.load(B4, RCX, operand),
            _ => self.asm.load(B8, RCX, operand),
        }
        (RCX, Some(looked))
    }

    /// The instruction on a register, with RAX and RDX the guest's.
    fn on_register(&mut self, insn: &Instruction, source: Reg) {
        use Code::*;
        let code = match insn.code() {
            Mul_rm8 | Mul_rm16 | Mul_rm32 | Mul_rm64 | Imul_rm8 | Imul_rm16 | Imul_rm32 | Imul_rm64
            | Div_rm32 | Div_rm64 | Idiv_rm32 | Idiv_rm64 => insn.code(),
            _ => return self.asm.failed = true,
        };
        match Instruction::with1(code, sized(source, size(insn))) {
            Ok(host) => self.asm.guest(&host),
            Err(_) => self.asm.failed = true,
        }
    }

    fn multiply(&mut self, at: usize, insn: &Instruction, used: Use) {
        // To get them from where they are then takes RAX only.
        self.clobber_flags();
        let (source, looked) = self.source(insn);
        self.flags_before(at, used);
        self.read_guest(RAX, reg::RAX);
        self.read_guest(RDX, reg::RDX);
        self.on_register(insn, source);
        self.write_guest(reg::RAX, RAX);
        self.write_guest(reg::RDX, RDX);
        self.flags_after(at, used);
        if let Some(looked) = looked {
            self.looked(at, looked);
        }
    }

    /// What would fault, or might, is the handler's: divisors of 0, quotients that do not fit, and signed dividends that
    /// are not a sign-extended accumulator.
    fn divide(&mut self, at: usize, insn: &Instruction) {
        let width = if size(insn) == 8 { B8 } else { B4 };
        self.clobber_flags();
        let (source, looked) = self.source(insn);
        self.read_guest(RAX, reg::RAX);
        let refused = if insn.mnemonic() == Mnemonic::Div {
            self.read_guest(RDX, reg::RDX);
            // With a high half below the divisor the quotient fits, and the divisor is not 0.
            self.asm.alu(width, Alu::Cmp, RDX, source);
            [Some(self.asm.jcc(NOT_BELOW)), None, None]
        } else {
            self.refuse_signed(width, source)
        };
        self.on_register(insn, source);
        self.write_guest(reg::RAX, RAX);
        self.write_guest(reg::RDX, RDX);
        let [first, second, third] = refused;
        self.or_handler(at, [first, None], self.flags);
        self.or_handler(at, [second, third], self.flags);
        if let Some(looked) = looked {
            self.looked(at, looked);
        }
    }

    /// Sign-extends RAX into RDX.
    fn refuse_signed(&mut self, width: Width, source: Reg) -> [Option<Fixup>; 3] {
        // CDQ, CQO.
        self.asm.bytes(if width == B8 { &[0x48, 0x99] } else { &[0x99] });
        match PINNED[reg::RDX] {
            Some(high) => self.asm.alu(width, Alu::Cmp, RDX, high),
            None => self.asm.alu_load(width, Alu::Cmp, RDX, slot(reg::RDX)),
        }
        let wide = self.asm.jcc(NOT_EQUAL);
        self.asm.alu_imm(width, Alu::Cmp, source, 0);
        let zero = self.asm.jcc(EQUAL);
        // The quotient of the smallest number and -1 does not fit.
        self.asm.alu_imm(width, Alu::Cmp, source, -1);
        [Some(wide), Some(zero), Some(self.asm.jcc(EQUAL))]
    }

    /// CMPXCHG8B and CMPXCHG16B, locked as the interpreter's are. RSI, whatever it holds, makes room for the address.
    fn exchange_pair(&mut self, at: usize, insn: &Instruction, used: Use) {
        const { assert!(matches!(PINNED[reg::RBX], Some(RBX))) };
        let wide = insn.mnemonic() == Mnemonic::Cmpxchg16b;
        let looked = self.look_up_vector(insn, For::Writing, wide);
        self.join_address();
        self.flags_before(at, used);
        let kept = field(offset_of!(Cpu, jit) + offset_of!(Hot, target));
        self.asm.store(B8, kept, RSI);
        // The guest's registers are read before its RSI, or what is pinned there, is gone.
        self.read_guest(RAX, reg::RAX);
        self.read_guest(RCX, reg::RCX);
        self.asm.mov(B8, RSI, RDX);
        self.read_guest(RDX, reg::RDX);
        let code = if wide { Code::Cmpxchg16b_m128 } else { Code::Cmpxchg8b_m64 };
        match Instruction::with1(code, MemoryOperand::with_base(Register::RSI)) {
            Ok(mut host) => {
                host.set_has_lock_prefix(true);
                self.asm.guest(&host);
            }
            Err(_) => self.asm.failed = true,
        }
        self.asm.load(B8, RSI, kept);
        let same = self.asm.jcc(EQUAL);
        if wide {
            self.write_guest(reg::RAX, RAX);
            self.write_guest(reg::RDX, RDX);
        } else {
            self.write_guest32(reg::RAX, RAX);
            self.write_guest32(reg::RDX, RDX);
        }
        self.asm.bind(same);
        self.flags_after(at, used);
        self.looked(at, looked);
    }
}

/// On this host multiplications leave the flags that the manual leaves undefined as they were, which is what the
/// interpreter does. Elsewhere they are the handlers'.
fn keeps_flags() -> bool {
    const UNDEFINED: u16 = 0xd400;
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let keeps = |before: u16, factor: u64| {
            let (unsigned, signed): (u64, u64);
            // SAFETY: instructions on registers only; the flags and the registers are declared as changed.
            unsafe {
                std::arch::asm!("sahf", "mul {v}", "lahf",
                    inout("rax") u64::from(before) => unsigned, out("rdx") _, v = in(reg) factor,
                    options(nomem, nostack));
                std::arch::asm!("sahf", "imul {v}", "lahf",
                    inout("rax") u64::from(before) => signed, out("rdx") _, v = in(reg) factor,
                    options(nomem, nostack));
            }
            [unsigned as u16, signed as u16].into_iter().all(|after| (after ^ before) & UNDEFINED == 0)
        };
        [0, 3, 1 << 60, u64::MAX].into_iter().all(|factor| keeps(0x0200, factor) && keeps(0xd600, factor))
    })
}
