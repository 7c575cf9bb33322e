//! Instructions on RFLAGS, and the moves of system state that are as simple: CLI, SWAPGS, segment selectors.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86defs::rflags;

use super::registers::number;
use super::{Lowering, Use, status};
use crate::Cpu;
use crate::cpuid::Feature;
use crate::jit::Hot;
use crate::jit::emit::{Alu, B4, B8, Mem, NOT_EQUAL, RAX, RCX, RDX, Width};
use crate::jit::gate::{PINNED, field};
use crate::state::{Seg, Segment, reg};

/// What an instruction of this family does with the flags; none for others.
pub(super) fn flag_use(insn: &Instruction) -> Option<Use> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Pushfq | M::Cli | M::Cld | M::Std | M::Swapgs => Some(Use::None),
        M::Mov if is_from_selector(insn) => Some(Use::None),
        M::Lahf => Some(Use::Reads),
        M::Sahf | M::Clc | M::Stc | M::Cmc => Some(Use::Changes),
        _ => None,
    }
}

/// The handler may raise an exception although no memory is accessed, or looks at the flags.
pub(super) fn may_fault(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Cli | Mnemonic::Swapgs | Mnemonic::Pushfq)
}

/// MOV from a segment register to a general one.
fn is_from_selector(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_gpr()
        && insn.op1_kind() == OpKind::Register
        && insn.op1_register().is_segment_register()
}

/// RFLAGS without the status flags.
pub(super) fn system_flags() -> Mem {
    field(offset_of!(Cpu, state.rflags_system))
}

impl Lowering<'_> {
    pub(super) fn flags(&mut self, at: usize, insn: &Instruction) -> bool {
        let Some(used) = flag_use(insn) else { return false };
        if matches!(insn.mnemonic(), Mnemonic::Lahf | Mnemonic::Sahf)
            && !self.source.model.has(Feature::LahfLm)
        {
            self.handler(at);
            return true;
        }
        self.flags_before(at, used);
        match insn.mnemonic() {
            Mnemonic::Pushfq => self.pushfq(at),
            Mnemonic::Cli => self.cli(at),
            Mnemonic::Swapgs => self.swapgs(at),
            Mnemonic::Cld => self.change_system(Alu::And, !(rflags::DF as i32)),
            Mnemonic::Std => self.change_system(Alu::Or, rflags::DF as i32),
            Mnemonic::Mov => self.read_selector(insn),
            Mnemonic::Lahf => self.lahf(),
            Mnemonic::Sahf => {
                self.read_guest(RAX, reg::RAX);
                self.asm.bytes(&[0x9e]);
            }
            Mnemonic::Clc => self.asm.bytes(&[0xf8]),
            Mnemonic::Stc => self.asm.bytes(&[0xf9]),
            _ => self.asm.bytes(&[0xf5]),
        }
        self.flags_after(at, used);
        true
    }

    fn change_system(&mut self, alu: Alu, mask: i32) {
        self.clobber_flags();
        self.asm.alu_mem_imm(B8, alu, system_flags(), mask);
    }

    /// Jumps if the privilege level is not 0.
    fn unless_privileged(&mut self) -> super::Fixup {
        self.clobber_flags();
        self.asm.load_u8(RAX, field(offset_of!(Cpu, state.cpl)));
        self.asm.test32(RAX, RAX);
        self.asm.jcc(NOT_EQUAL)
    }

    /// Nothing becomes due with IF clear.
    fn cli(&mut self, at: usize) {
        let refused = self.unless_privileged();
        self.asm.alu_mem_imm(B8, Alu::And, system_flags(), !(rflags::IF as i32));
        self.or_handler(at, [Some(refused), None], self.flags);
    }

    fn swapgs(&mut self, at: usize) {
        let refused = self.unless_privileged();
        let base = offset_of!(Cpu, state.segments)
            + Seg::Gs as usize * size_of::<Segment>()
            + offset_of!(Segment, base);
        let other = field(offset_of!(Cpu, state.msrs.kernel_gs_base));
        self.asm.load(B8, RCX, other);
        self.asm.load(B8, RAX, field(base));
        self.asm.store(B8, other, RAX);
        self.asm.store(B8, field(base), RCX);
        self.asm.store(B8, field(offset_of!(Cpu, linear_base) + Seg::Gs as usize * 8), RCX);
        self.or_handler(at, [Some(refused), None], self.flags);
    }

    /// RFLAGS is put together before the stack is looked up, which takes the registers.
    fn pushfq(&mut self, at: usize) {
        const NEVER_PUSHED: u64 = rflags::VM | rflags::RF;
        self.clobber_flags();
        self.asm.load_u16(RAX, status());
        self.asm.mov(B4, RCX, RAX);
        self.asm.shr32(RAX, 8);
        self.asm.alu_imm(B4, Alu::And, RAX, (rflags::STATUS & 0xff) as i32);
        self.asm.alu_imm(B4, Alu::And, RCX, 1);
        self.asm.shl32(RCX, 11);
        self.asm.alu(B4, Alu::Or, RAX, RCX);
        self.asm.alu_load(B8, Alu::Or, RAX, system_flags());
        self.asm.alu_imm(B8, Alu::And, RAX, !(NEVER_PUSHED as i32));
        let image = field(offset_of!(Cpu, jit) + offset_of!(Hot, target));
        self.asm.store(B8, image, RAX);
        let looked = self.look_up_push();
        self.asm.load(B8, RCX, image);
        self.asm.store(B8, self.operand(), RCX);
        self.write_guest(reg::RSP, RDX);
        self.looked(at, looked);
    }

    /// AH from the host's flags, which are the guest's.
    fn lahf(&mut self) {
        self.asm.bytes(&[0x9f]);
        self.read_guest(RCX, reg::RAX);
        // MOV CH, AH.
        self.asm.bytes(&[0x88, 0xe5]);
        self.write_guest(reg::RAX, RCX);
    }

    fn read_selector(&mut self, insn: &Instruction) {
        let segment = insn.op1_register().number() % 6;
        let at =
            offset_of!(Cpu, state.segments) + segment * size_of::<Segment>() + offset_of!(Segment, selector);
        let to = number(insn.op0_register());
        if insn.op0_register().size() == 2 {
            // The rest of the register stays.
            self.read_guest(RCX, to);
            self.asm.load(Width::B2, RCX, field(at));
            return self.write_guest(to, RCX);
        }
        let host = PINNED[to].unwrap_or(RCX);
        self.asm.load_u16(host, field(at));
        if PINNED[to].is_none() {
            self.write_guest(to, RCX);
        }
    }
}
