//! From a decoded block to host code, one instruction at a time; one file per family, named as in [`crate::interp`].
//!
//! Status flags: at the start and at every end of a trace they are in `CpuState::status`. In between they stay in the
//! host's flags as long as nothing else changes those ([`Flags`]), and are saved only if something may look at them
//! before they are overwritten: an instruction that reads them, the handler of any instruction that may fault, or an
//! end of the trace.

mod arith;
mod bits;
mod branch;
mod flags;
mod memory;
mod mov;
mod muldiv;
mod registers;
mod stack;
mod string;
mod vector;

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::Hot;
use super::emit::{Alu, Assembler, B4, Fixup, Mem, NEGATIVE, NOT_EQUAL, RAX, RCX, RDX, Width};
use super::gate::{Gate, Place, field};
use super::trace::Trace;
use crate::Cpu;
use crate::cpuid::CpuModel;
use memory::Second;
pub(super) use memory::table;
use registers::is_native;

/// What is to be translated.
pub(super) struct Source<'a> {
    pub trace: &'a Trace,
    pub model: &'a CpuModel,
    /// Address of the page's record and the version it must have.
    pub version: (u64, u32),
}

/// Where the guest's status flags are.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Flags {
    /// In `CpuState::status`.
    Saved,
    /// In the host's flags only.
    Host,
    /// In the host's, but for CF, which is in `CpuState::status`.
    HostButCarry,
    /// In both.
    Both,
    /// Nobody will ask for them.
    Dead,
}

impl Flags {
    /// The host's flags have something of them.
    fn in_host(self) -> bool {
        matches!(self, Self::Host | Self::HostButCarry | Self::Both)
    }
}

/// What an instruction does with the status flags.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Use {
    /// Nothing.
    None,
    /// Sets all six, whatever they were.
    Sets,
    /// Sets some, others stay (or are undefined, and may stay).
    Changes,
    /// Sets all but CF.
    KeepsCarry,
    /// Its result depends on them; it sets all.
    ReadsAndSets,
    /// Its result depends on them; it leaves them.
    Reads,
}

/// Code that is rarely needed, after the block's own.
enum Aside {
    /// The instruction `number` by its handler; then on at `resume` unless it was the last.
    Handler {
        jumps: [Option<Fixup>; 2],
        number: usize,
        resume: usize,
        /// Where the flags are at the jumps, and where they are to be at `resume`.
        before: Flags,
        flags: Flags,
        vector: u32,
        /// The jumps are a lookup's miss: the operand may be in its second place.
        second: Option<Second>,
    },
    /// Vector state that the instruction `number` needs, and otherwise its handler; then on at `resume`.
    GetVector { jump: Fixup, number: usize, needs: u32, resume: usize },
    /// Return to the run loop at the trace's start, from before and from after it was counted.
    LookAtStart { jumps: [Fixup; 2], budget: Fixup },
    /// Return to the run loop for the address in RAX.
    LookAtRax { jumps: [Fixup; 2] },
    /// A conditional jump leaves the trace after `done` instructions for an offset from the page's start.
    Side { jump: Fixup, target: i64, done: usize, flags: Flags },
    /// A jump within the page that is to be linked.
    Link { jump: Fixup, target: u16 },
}

pub(super) struct Lowering<'a> {
    asm: &'a mut Assembler,
    gate: Gate,
    source: &'a Source<'a>,
    flags: Flags,
    /// What of the vector state is known to be in the host's registers.
    vector: u32,
    /// Whether the flags after each instruction matter.
    live: Vec<bool>,
    asides: Vec<Aside>,
}

/// Lowers a trace into `asm`; returns where it is entered without a look at its page and at the attention word
/// (JIT-5). None if it could not be lowered.
pub(super) fn lower(asm: &mut Assembler, gate: Gate, source: &Source) -> Option<usize> {
    let live = live_flags(source);
    let mut lowering =
        Lowering { asm, gate, source, flags: Flags::Saved, vector: 0, live, asides: Vec::new() };
    let forward = lowering.checks();
    for (number, insn) in source.trace.insns.iter().enumerate() {
        lowering.instruction(number, insn);
    }
    if source.trace.crosses {
        lowering.crossing();
    }
    lowering.finish();
    lowering.asm.step_aside();
    lowering.write_asides();
    (!lowering.asm.failed).then_some(forward)
}

/// Whether the flags after each instruction matter: works backwards from the end, where they do.
fn live_flags(source: &Source) -> Vec<bool> {
    let insns = &source.trace.insns;
    let mut after = vec![true; insns.len()];
    let mut live = true;
    for (number, insn) in insns.iter().enumerate().rev() {
        after[number] = live;
        let used = if source.is_native(insn) { flag_use(insn) } else { Use::Reads };
        let may_call = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
            && insn.mnemonic() != Mnemonic::Lea
            || insn.is_stack_instruction()
            || use_of_families(insn).is_some() && may_fault(insn);
        live = match used {
            _ if may_call => true,
            Use::Sets => false,
            Use::None | Use::Changes | Use::KeepsCarry => live,
            Use::ReadsAndSets | Use::Reads => true,
        };
    }
    after
}

/// The instruction has a lowering, and the model has it, so that its handler is more than #UD.
pub(super) fn has_lowering(model: &CpuModel, insn: &Instruction) -> bool {
    model.allows(insn) && !insn.is_invalid() && is_native(insn)
}

impl Source<'_> {
    fn is_native(&self, insn: &Instruction) -> bool {
        has_lowering(self.model, insn)
    }
}

/// `CpuState::status`.
fn status() -> Mem {
    field(offset_of!(Cpu, state.status))
}

/// Where SF, ZF, AF, PF and CF are in it.
fn status_high() -> Mem {
    field(offset_of!(Cpu, state.status) + 1)
}

impl Lowering<'_> {
    /// JIT-1, whether anything asks for attention, and then the budget.
    fn checks(&mut self) -> usize {
        let asm = &mut *self.asm;
        let (page, version) = self.source.version;
        asm.set64(RAX, page + crate::phys::CodePage::VERSION_OFFSET as u64);
        asm.alu_mem_imm32(B4, Alu::Cmp, Mem::at(RAX, 0), version as i32);
        let stale = asm.jcc(NOT_EQUAL);
        asm.load(Width::B8, RAX, field(offset_of!(Cpu, jit) + offset_of!(Hot, attention)));
        asm.load(B4, RAX, Mem::at(RAX, 0));
        asm.alu_load(B4, Alu::Cmp, RAX, field(offset_of!(Cpu, jit) + offset_of!(Hot, seen)));
        let attention = asm.jcc(NOT_EQUAL);
        let forward = asm.here();
        let left = field(offset_of!(Cpu, jit) + offset_of!(Hot, left));
        asm.alu_mem_imm(Width::B8, Alu::Sub, left, self.source.trace.len() as i32);
        let budget = asm.jcc(NEGATIVE);
        self.asides.push(Aside::LookAtStart { jumps: [stale, attention], budget });
        forward
    }

    fn instruction(&mut self, number: usize, insn: &Instruction) {
        if !self.source.is_native(insn) {
            return self.handler(number);
        }
        let done = self.branch(number, insn)
            || self.stack(number, insn)
            || self.vector(number, insn)
            || self.muldiv(number, insn)
            || self.bits(number, insn)
            || self.flags(number, insn)
            || self.string(number, insn)
            || self.mov(number, insn)
            || self.arith(number, insn);
        if !done {
            self.handler(number);
        }
    }

    /// The only instruction crosses into the next page.
    fn crossing(&mut self) {
        let place = Place { offset: self.source.trace.start(), len: 0 };
        self.asm.set32(RDX, place.pack());
        self.asm.call_to(self.gate.call_crossing);
        self.asm.jump_to(self.gate.exit);
    }

    /// The handler returns to the run loop.
    fn is_last(&self, number: usize) -> bool {
        self.source.trace.steps[number].last
    }

    /// Instructions of the trace from `number` on: they were counted at its start.
    fn remaining(&self, number: usize) -> i32 {
        (self.source.trace.len() - number) as i32
    }

    fn call_op(&mut self, number: usize) {
        let step = &self.source.trace.steps[number];
        self.asm.set32(RAX, step.op);
        self.asm.set32(RDX, step.place.pack());
        self.asm.set32(RCX, self.remaining(number) as u32);
        self.asm.call_to(self.gate.call_op);
    }

    /// The instruction by its handler.
    fn handler(&mut self, number: usize) {
        self.save_flags();
        self.call_op(number);
        if self.is_last(number) {
            self.asm.jump_to(self.gate.exit);
        } else {
            self.asm.jcc_to(NOT_EQUAL, self.gate.exit);
        }
        self.flags = Flags::Saved;
        self.vector = 0;
    }

    /// Leaves after the instruction `number`, which its handler has executed and which is not the last of its block.
    fn leave_after(&mut self, number: usize) {
        self.uncount(self.remaining(number + 1));
        self.address(RAX, self.source.trace.insns[number].next_ip() as i64);
        self.asm.jump_to(self.gate.look_at);
    }

    /// Sees to it that the host's flags may be clobbered. Clobbers RAX, and RCX after [`Flags::HostButCarry`].
    fn save_flags(&mut self) {
        if self.flags == Flags::HostButCarry {
            self.asm.load_u8(RCX, status_high());
            // SETO AL; LAHF; AND AH, FEH; AND CL, 1; OR AH, CL.
            self.asm.bytes(&[0x0f, 0x90, 0xc0, 0x9f, 0x80, 0xe4, 0xfe, 0x80, 0xe1, 0x01, 0x08, 0xcc]);
        } else if self.flags == Flags::Host {
            // SETO AL; LAHF: neither changes them.
            self.asm.bytes(&[0x0f, 0x90, 0xc0, 0x9f]);
        } else {
            return;
        }
        self.asm.store(Width::B2, status(), RAX);
        self.flags = if self.flags == Flags::Host { Flags::Both } else { Flags::Saved };
    }

    /// The host's flags are about to be clobbered.
    fn clobber_flags(&mut self) {
        self.save_flags();
        if self.flags == Flags::Both {
            self.flags = Flags::Saved;
        }
    }

    /// Gets the flags into the host's. Clobbers RAX, and RCX after [`Flags::HostButCarry`].
    fn load_flags(&mut self) {
        if self.flags == Flags::HostButCarry {
            self.save_flags();
        }
        if self.flags == Flags::Saved {
            self.load_saved_flags();
            self.flags = Flags::Both;
        }
    }

    /// The same as far as a condition looks at them.
    fn load_flags_for(&mut self, condition: u8) {
        // B, AE, BE and A look at CF.
        if self.flags != Flags::HostButCarry || condition & 0b1010 == 0b0010 {
            self.load_flags();
        }
    }

    fn load_saved_flags(&mut self) {
        self.asm.load_u16(RAX, status());
        // ADD AL, 127 makes OF of the low bit; SAHF.
        self.asm.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// What is to be done with the flags before an instruction that uses them so.
    fn flags_before(&mut self, number: usize, used: Use) {
        match used {
            Use::Reads | Use::ReadsAndSets => self.load_flags(),
            Use::Changes if self.live[number] => self.load_flags(),
            Use::None | Use::Sets | Use::Changes | Use::KeepsCarry => {}
        }
    }

    fn flags_after(&mut self, number: usize, used: Use) {
        if matches!(used, Use::None | Use::Reads) {
            return;
        }
        let carry_is_elsewhere = matches!(self.flags, Flags::Saved | Flags::HostButCarry);
        self.flags = match used {
            _ if !self.live[number] => Flags::Dead,
            Use::KeepsCarry if carry_is_elsewhere => Flags::HostButCarry,
            _ => Flags::Host,
        };
    }

    fn write_asides(&mut self) {
        // Asides may add asides.
        let mut next = 0;
        while next < self.asides.len() {
            let aside = std::mem::replace(&mut self.asides[next], Aside::LookAtRax { jumps: [Fixup(0); 2] });
            next += 1;
            self.write_aside(aside);
        }
    }

    fn write_aside(&mut self, aside: Aside) {
        match aside {
            Aside::GetVector { jump, number, needs, resume } => {
                self.asm.bind(jump);
                self.write_get_vector(number, needs, resume);
            }
            Aside::Handler { jumps, number, resume, before, flags, vector, second } => {
                jumps.into_iter().flatten().for_each(|jump| self.asm.bind(jump));
                self.flags = before;
                self.save_flags();
                if let Some(second) = second {
                    self.look_in_second_place(second, before);
                }
                self.call_op(number);
                if self.is_last(number) {
                    return self.asm.jump_to(self.gate.exit);
                }
                self.asm.jcc_to(NOT_EQUAL, self.gate.exit);
                self.get_vector_again(number, vector);
                if flags.in_host() {
                    self.load_saved_flags();
                }
                self.asm.jump_back(resume);
            }
            Aside::LookAtStart { jumps, budget } => {
                self.asm.bind(budget);
                self.uncount(self.remaining(0));
                jumps.into_iter().for_each(|jump| self.asm.bind(jump));
                self.address(RAX, i64::from(self.source.trace.start()));
                self.asm.jump_to(self.gate.look_at);
            }
            Aside::LookAtRax { jumps } => {
                jumps.into_iter().for_each(|jump| self.asm.bind(jump));
                self.asm.jump_to(self.gate.look_at);
            }
            Aside::Side { jump, target, done, flags } => {
                self.asm.bind(jump);
                self.flags = flags;
                self.clobber_flags();
                self.uncount(self.remaining(done));
                self.go_to(target);
            }
            Aside::Link { jump, target } => {
                self.asm.bind(jump);
                self.address(RAX, i64::from(target));
                self.asm.store(Width::B8, field(offset_of!(Cpu, state.rip)), RAX);
                let site = self.asm.address(jump.0);
                let forward = target > self.source.trace.start();
                self.asm.set(RAX, self.gate.link_code(site, forward));
                self.asm.jump_to(self.gate.exit);
            }
        }
    }

    /// That many instructions of the trace are not executed after all. Clobbers the host's flags.
    fn uncount(&mut self, instructions: i32) {
        if instructions != 0 {
            let left = field(offset_of!(Cpu, jit) + offset_of!(Hot, left));
            self.asm.alu_mem_imm(Width::B8, Alu::Add, left, instructions);
        }
    }

    /// Linear address of an offset from the page's start.
    fn address(&mut self, to: u8, offset: i64) {
        self.asm.load(Width::B8, to, field(offset_of!(Cpu, jit) + offset_of!(Hot, page_ip)));
        if offset != 0 {
            self.asm.lea(Width::B8, to, Mem::at(to, offset as i32));
        }
    }
}

/// A shift count of zero leaves the flags alone.
fn shift_use(insn: &Instruction) -> Use {
    let mask = if insn.op0_kind() == OpKind::Register && insn.op0_register().is_gpr64()
        || insn.op0_kind() == OpKind::Memory && insn.memory_size().size() == 8
    {
        63
    } else {
        31
    };
    let by_imm = insn.op1_kind() != OpKind::Register;
    if by_imm && insn.immediate(1) & mask != 0 && arith::shifts_set_all_flags() {
        Use::Sets
    } else {
        Use::Changes
    }
}

/// What a natively lowered instruction does with the status flags.
fn flag_use(insn: &Instruction) -> Use {
    use Mnemonic::*;
    if let Some(used) = use_of_families(insn) {
        return used;
    }
    match insn.mnemonic() {
        Add | Or | And | Sub | Xor | Cmp | Test | Neg | Xadd | Cmpxchg => Use::Sets,
        // RCL and RCR leave some: they have been loaded.
        Adc | Sbb | Rcl | Rcr => Use::ReadsAndSets,
        // One goes in and comes out, the others have been loaded.
        Adcx | Adox => Use::ReadsAndSets,
        Inc | Dec => Use::KeepsCarry,
        Rol | Ror | Shld | Shrd | Bt | Bts | Btr | Btc | Imul | Bsf | Bsr | Tzcnt | Lzcnt | Popcnt => {
            Use::Changes
        }
        Shl | Sal | Shr | Sar => shift_use(insn),
        _ if insn.is_jcc_short_or_near() => Use::Reads,
        _ if crate::interp::mov::condition_of(insn).is_some() => Use::Reads,
        _ => Use::None,
    }
}

/// The same for the families whose lowerings say themselves which instructions are theirs.
fn use_of_families(insn: &Instruction) -> Option<Use> {
    vector::flag_use(insn)
        .or_else(|| muldiv::flag_use(insn))
        .or_else(|| bits::flag_use(insn))
        .or_else(|| flags::flag_use(insn))
        .or_else(|| string::flag_use(insn))
}

/// An instruction of one of these whose handler may be called although it has no memory operand, and may find the
/// status flags of use.
fn may_fault(insn: &Instruction) -> bool {
    vector::is_vector(insn)
        || muldiv::may_fault(insn)
        || flags::may_fault(insn)
        || string::flag_use(insn).is_some()
}
