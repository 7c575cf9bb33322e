//! Instructions whose operands are all explicit: the guest's own instruction with its operands replaced.

use std::arch::asm;
use std::sync::OnceLock;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::memory::{For, replace_memory};
use super::{Flags, Lowering, Use, flag_use};
use crate::jit::emit::{EQUAL, RAX, RCX, RDX};

impl Lowering<'_> {
    pub(super) fn arith(&mut self, at: usize, insn: &Instruction) -> bool {
        if insn.mnemonic() == Mnemonic::Cmpxchg {
            self.cmpxchg(at, insn);
            return true;
        }
        let memory = (0..insn.op_count()).find(|&i| insn.op_kind(i) == OpKind::Memory);
        match memory {
            Some(operand) => self.with_memory(at, insn, operand),
            None => self.in_registers(at, insn),
        }
        true
    }

    fn in_registers(&mut self, at: usize, insn: &Instruction) {
        let used = flag_use(insn);
        self.flags_before(at, used);
        let mut host = plain(insn);
        // A count in CL takes RCX.
        let back = self.replace_registers(&mut host, [RDX, RAX]);
        self.asm.guest(&host);
        self.write_back(back);
        self.flags_after(at, used);
    }

    fn with_memory(&mut self, at: usize, insn: &Instruction, operand: u32) {
        let used = flag_use(insn);
        let reads_only =
            operand != 0 || matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Bt);
        let looked = self.look_up_operand(insn, if reads_only { For::Reading } else { For::Writing });
        let needs_flags = match used {
            Use::Reads | Use::ReadsAndSets => true,
            Use::Changes => self.live[at],
            Use::None | Use::Sets | Use::KeepsCarry => false,
        };
        let loads_flags = needs_flags && !matches!(self.flags, Flags::Host | Flags::Both);
        if loads_flags {
            self.join_address();
            self.load_flags();
        }
        let mut host = plain(insn);
        replace_memory(&mut host, loads_flags);
        // One register to load at most, or a count in CL.
        let back = self.replace_registers(&mut host, [RCX, RCX]);
        self.asm.guest(&host);
        self.write_back(back);
        self.flags_after(at, used);
        self.looked(at, looked);
    }

    /// The accumulator is in another register: it is compared and, if different, replaced through RAX.
    fn cmpxchg(&mut self, at: usize, insn: &Instruction) {
        let looked = self.look_up_operand(insn, For::Writing);
        self.join_address();
        self.read_guest(RAX, 0);
        let mut host = plain(insn);
        replace_memory(&mut host, true);
        let size = insn.op1_register().size();
        // Its own source is only read.
        let _ = self.replace_registers(&mut host, [RCX, RCX]);
        self.asm.guest(&host);
        let same = self.asm.jcc(EQUAL);
        match size {
            4 => self.write_guest32(0, RAX),
            // Bytes that were not compared are the guest's own.
            _ => self.write_guest(0, RAX),
        }
        self.asm.bind(same);
        self.flags_after(at, Use::Sets);
        self.looked(at, looked);
    }
}

/// Without prefixes that mean nothing here.
fn plain(insn: &Instruction) -> Instruction {
    let mut plain = *insn;
    plain.set_has_rep_prefix(false);
    plain.set_has_repne_prefix(false);
    plain.set_code(any_register(insn.code()));
    plain
}

/// The short forms that name the accumulator, in their general form.
fn any_register(code: Code) -> Code {
    use Code::*;
    match code {
        Add_AL_imm8 => Add_rm8_imm8,
        Add_AX_imm16 => Add_rm16_imm16,
        Add_EAX_imm32 => Add_rm32_imm32,
        Add_RAX_imm32 => Add_rm64_imm32,
        Or_AL_imm8 => Or_rm8_imm8,
        Or_AX_imm16 => Or_rm16_imm16,
        Or_EAX_imm32 => Or_rm32_imm32,
        Or_RAX_imm32 => Or_rm64_imm32,
        Adc_AL_imm8 => Adc_rm8_imm8,
        Adc_AX_imm16 => Adc_rm16_imm16,
        Adc_EAX_imm32 => Adc_rm32_imm32,
        Adc_RAX_imm32 => Adc_rm64_imm32,
        Sbb_AL_imm8 => Sbb_rm8_imm8,
        Sbb_AX_imm16 => Sbb_rm16_imm16,
        Sbb_EAX_imm32 => Sbb_rm32_imm32,
        Sbb_RAX_imm32 => Sbb_rm64_imm32,
        And_AL_imm8 => And_rm8_imm8,
        And_AX_imm16 => And_rm16_imm16,
        And_EAX_imm32 => And_rm32_imm32,
        And_RAX_imm32 => And_rm64_imm32,
        Sub_AL_imm8 => Sub_rm8_imm8,
        Sub_AX_imm16 => Sub_rm16_imm16,
        Sub_EAX_imm32 => Sub_rm32_imm32,
        Sub_RAX_imm32 => Sub_rm64_imm32,
        Xor_AL_imm8 => Xor_rm8_imm8,
        Xor_AX_imm16 => Xor_rm16_imm16,
        Xor_EAX_imm32 => Xor_rm32_imm32,
        Xor_RAX_imm32 => Xor_rm64_imm32,
        Cmp_AL_imm8 => Cmp_rm8_imm8,
        Cmp_AX_imm16 => Cmp_rm16_imm16,
        Cmp_EAX_imm32 => Cmp_rm32_imm32,
        Cmp_RAX_imm32 => Cmp_rm64_imm32,
        Test_AL_imm8 => Test_rm8_imm8,
        Test_AX_imm16 => Test_rm16_imm16,
        Test_EAX_imm32 => Test_rm32_imm32,
        Test_RAX_imm32 => Test_rm64_imm32,
        Xchg_r16_AX => Xchg_rm16_r16,
        Xchg_r32_EAX => Xchg_rm32_r32,
        Xchg_r64_RAX => Xchg_rm64_r64,
        Mov_AL_moffs8 => Mov_r8_rm8,
        Mov_AX_moffs16 => Mov_r16_rm16,
        Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8,
        Mov_moffs16_AX => Mov_rm16_r16,
        Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        // Ordered like any store, as the interpreter's are.
        Movnti_m32_r32 => Mov_rm32_r32,
        Movnti_m64_r64 => Mov_rm64_r64,
        other => other,
    }
}

/// On this host a shift by a constant sets all flags whatever they were (AF is undefined in the manual). Elsewhere they
/// are loaded first, as the interpreter does.
pub(super) fn shifts_set_all_flags() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let flags = |before: u16| -> [u16; 3] {
            let (left, right, signed): (u16, u16, u16);
            // SAFETY: instructions on registers only; the flags and AX are declared as changed.
            unsafe {
                asm!("sahf", "shl {v:e}, 3", "lahf", inout("ax") before => left, v = inout(reg) 0x9234_5679_u32 => _,
                    options(nomem, nostack));
                asm!("sahf", "shr {v:e}, 3", "lahf", inout("ax") before => right, v = inout(reg) 0x9234_5679_u32 => _,
                    options(nomem, nostack));
                asm!("sahf", "sar {v:e}, 3", "lahf", inout("ax") before => signed, v = inout(reg) 0x9234_5679_u32 => _,
                    options(nomem, nostack));
            }
            [left, right, signed].map(|f| f & 0xff00)
        };
        flags(0x0200) == flags(0xd700)
    })
}
