//! Guest registers in host registers, and which instructions are lowered natively at all.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Lowering;
use crate::interp::mov::condition_of;
use crate::interp::operands::address_bits;
use crate::jit::emit::{B4, B8, RCX, Reg};
use crate::jit::gate::{PINNED, slot};

/// Number of a general register.
pub(super) fn number(register: Register) -> usize {
    register.full_register().number()
}

/// A host register in the width of an operand.
pub(super) fn sized(host: Reg, size: usize) -> Register {
    let host = u32::from(host);
    match size {
        1 if host < 4 => Register::AL + host,
        1 => Register::SPL + (host - 4),
        2 => Register::AX + host,
        4 => Register::EAX + host,
        _ => Register::RAX + host,
    }
}

pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Whether every register operand is a general register that can be replaced, and a memory operand can be looked up.
fn has_plain_operands(insn: &Instruction) -> bool {
    (0..insn.op_count()).all(|i| match insn.op_kind(i) {
        OpKind::Register => {
            let register = insn.op_register(i);
            register.is_gpr()
        }
        OpKind::Memory => address_bits(insn) == 64 && matches!(insn.memory_size().size(), 1 | 2 | 4 | 8),
        OpKind::FarBranch16 | OpKind::FarBranch32 => false,
        OpKind::NearBranch16 | OpKind::NearBranch32 => false,
        kind => !matches!(
            kind,
            OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemorySegRDI
                | OpKind::MemoryESDI
                | OpKind::MemoryESEDI
                | OpKind::MemoryESRDI
        ),
    })
}

/// The instruction has a lowering other than a call of its handler.
pub(super) fn is_native(insn: &Instruction) -> bool {
    use Mnemonic::*;
    if insn.mnemonic() == Lea {
        return address_bits(insn) == 64 && insn.op0_register().size() >= 4;
    }
    if matches!(
        insn.mnemonic(),
        Nop | Endbr64
            | Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchw
            | Lfence
            | Mfence
            | Sfence
    ) {
        return true;
    }
    if super::use_of_families(insn).is_some() {
        return true;
    }
    if !has_plain_operands(insn) {
        return false;
    }
    let in_register = insn.op_count() > 0 && insn.op0_kind() == OpKind::Register;
    match insn.mnemonic() {
        Mov | Movzx | Movsx | Movsxd | Not | Add | Or | And | Sub | Xor | Cmp | Test | Neg | Xadd | Adc
        | Sbb | Rcl | Rcr | Inc | Dec | Rol | Ror | Shl | Sal | Shr | Sar | Tzcnt | Lzcnt | Popcnt => true,
        Movbe | Movnti | Crc32 | Adcx | Adox => host_has(insn),
        Shld | Shrd => in_register || insn.op2_kind() != OpKind::Register,
        Bswap => insn.op0_register().size() >= 4,
        Imul => insn.op_count() >= 2,
        Bt | Bts | Btr | Btc => in_register || insn.op1_kind() != OpKind::Register,
        Bsf | Bsr => insn.op0_register().size() == 8,
        Cmpxchg => !in_register,
        Xchg => true,
        Cdqe | Cwde | Cdq | Cqo => true,
        Push => insn.stack_pointer_increment() == -8,
        Pop => insn.stack_pointer_increment() == 8 && in_register && insn.op0_register() != Register::RSP,
        Leave => insn.code() == Code::Leaveq,
        Jmp | Call => {
            matches!(insn.code(), Code::Jmp_rm64 | Code::Call_rm64) || insn.op0_kind() == OpKind::NearBranch64
        }
        Ret => matches!(insn.code(), Code::Retnq | Code::Retnq_imm16),
        Jcxz | Jecxz | Jrcxz | Loop | Loope | Loopne => false,
        _ => condition_of(insn).is_some(),
    }
}

/// The host has the instruction, where not every host does.
fn host_has(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Movbe => is_x86_feature_detected!("movbe"),
        Crc32 => is_x86_feature_detected!("sse4.2"),
        Adcx | Adox => is_x86_feature_detected!("adx"),
        _ => true,
    }
}

/// Which operands an instruction writes.
fn writes(insn: &Instruction, operand: u32) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Cmp | Test | Bt => false,
        Xchg | Xadd => operand < 2,
        _ => operand == 0,
    }
}

/// An instruction that names AH, CH, DH or BH cannot name R8 to R15 as well: all its registers are replaced by scratch
/// registers.
fn has_high_byte(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && is_high_byte(insn.op_register(i)))
}

/// The first operand's former value does not matter.
fn overwrites(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let pure = matches!(insn.mnemonic(), Mov | Movzx | Movsx | Movsxd);
    pure && insn.op0_register().size() >= 4
}

/// Guest registers to be written back from scratch registers.
pub(super) type WriteBack = [Option<(usize, Reg)>; 2];

impl Lowering<'_> {
    /// Replaces the register operands by host registers, loading those that have none into the given scratch
    /// registers. A count in CL is loaded into RCX.
    pub(super) fn replace_registers(&mut self, insn: &mut Instruction, scratch: [Reg; 2]) -> WriteBack {
        let mut back: WriteBack = [None; 2];
        let mut loaded: [Option<(usize, Reg)>; 2] = [None; 2];
        let mut next = 0;
        let high_byte = has_high_byte(insn);
        for operand in 0..insn.op_count() {
            if insn.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = insn.op_register(operand);
            if operand > 0 && is_count(insn, operand) {
                self.read_guest(RCX, 1);
                continue;
            }
            let (guest, size) = (number(register), register.size());
            let pinned = PINNED[guest].filter(|_| !high_byte);
            let host = match pinned {
                Some(host) => host,
                None => match loaded.iter().flatten().find(|l| l.0 == guest) {
                    Some(&(_, host)) => host,
                    None => {
                        let host = scratch[next];
                        loaded[next] = Some((guest, host));
                        next = (next + 1) % 2;
                        if !(operand == 0 && overwrites(insn)) || reads_again(insn, guest) {
                            self.read_guest(host, guest);
                        }
                        host
                    }
                },
            };
            if pinned.is_none() && writes(insn, operand) {
                back[(operand & 1) as usize] = Some((guest, host));
            }
            let replaced =
                if is_high_byte(register) { Register::AH + u32::from(host) } else { sized(host, size) };
            insn.set_op_register(operand, replaced);
        }
        back
    }

    pub(super) fn write_back(&mut self, back: WriteBack) {
        for (guest, host) in back.into_iter().flatten() {
            self.write_guest(guest, host);
        }
    }

    /// Copies a guest register into a host register.
    pub(super) fn read_guest(&mut self, to: Reg, guest: usize) {
        match PINNED[guest] {
            Some(host) => self.asm.mov(B8, to, host),
            None => self.asm.load(B8, to, slot(guest)),
        }
    }

    /// Sets a guest register.
    pub(super) fn write_guest(&mut self, guest: usize, from: Reg) {
        match PINNED[guest] {
            Some(host) => self.asm.mov(B8, host, from),
            None => self.asm.store(B8, slot(guest), from),
        }
    }

    /// The host register of `guest`, or `scratch` with its value.
    pub(super) fn guest_in(&mut self, guest: usize, scratch: Reg) -> Reg {
        match PINNED[guest] {
            Some(host) => host,
            None => {
                self.asm.load(B8, scratch, slot(guest));
                scratch
            }
        }
    }

    /// Sets the low half of a guest register and clears the upper one.
    pub(super) fn write_guest32(&mut self, guest: usize, from: Reg) {
        self.asm.mov(B4, from, from);
        self.write_guest(guest, from);
    }
}

/// The operand is a count in CL.
fn is_count(insn: &Instruction, operand: u32) -> bool {
    use Mnemonic::*;
    insn.op_register(operand) == Register::CL
        && matches!(insn.mnemonic(), Rol | Ror | Rcl | Rcr | Shl | Sal | Shr | Sar | Shld | Shrd)
}

/// A source operand is the destination as well.
fn reads_again(insn: &Instruction, guest: usize) -> bool {
    (1..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && number(insn.op_register(i)) == guest)
}
