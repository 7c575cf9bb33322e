//! The x87 unit. Arithmetic runs on the host in a thunk between FXRSTOR and FXSAVE of the guest's registers; control
//! instructions are done here, environment images in [`environment`].
//!
//! Unmasked exceptions need no care on the way: the host's unit, loaded with the guest's control word, gives the
//! unmasked response and leaves the exception pending in the status word. What the host cannot know is whether a
//! store to memory took place, and where the guest's instruction and operand are.
//!
//! Last-instruction pointers as on recent Intel processors: FCS and FDS are always 0, FDP is updated only by
//! instructions that raise an unmasked exception (FDP_EXCPTN_ONLY), and so is FOP.
//!
//! DEVIATION: with CR0.NE = 0 the processor asserts FERR#, which a PC wires to IRQ 13; we raise #MF whatever CR0.NE is.

mod environment;
#[cfg(test)]
mod tests;

use iced_x86::{Encoder, Instruction, Mnemonic, OpKind};
use x86defs::{cr0, vector};

use super::vector::FSW_ES;
use crate::Cpu;
use crate::native::{Class, Frame, Handle, MemoryUse, Thunk, is_x87, prepare, with_temporary};
use crate::op::{Cold, ColdHandler};
use crate::state::{X87State, reg};
use crate::trap::{Exec, Fault};

/// FSW: busy, a copy of ES.
const FSW_BUSY: u16 = 1 << 15;
/// FSW: top of stack.
const FSW_TOP_SHIFT: u16 = 11;
const FSW_TOP: u16 = 7 << FSW_TOP_SHIFT;
/// The six exceptions, flags in FSW and masks in FCW.
const EXCEPTIONS: u16 = 0x3f;
const PRECISION: u16 = 1 << 5;
/// FCW: bits that can be set; bit 6 always is.
const FCW_WRITABLE: u16 = 0x1f3f;
const FCW_FIXED_1: u16 = 0x40;
/// FCW after FNINIT.
const FCW_INITIAL: u16 = 0x37f;

/// How to execute an x87 instruction; none for instructions of other families.
pub(crate) fn lower(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    use Mnemonic as M;
    let control: ColdHandler = match insn.mnemonic() {
        M::Wait => fwait,
        M::Fninit => fninit,
        M::Fnclex => fnclex,
        M::Fldcw => fldcw,
        M::Fnstcw => fnstcw,
        M::Fnstsw => fnstsw,
        M::Fnstenv => environment::fnstenv,
        M::Fnsave => environment::fnsave,
        M::Fldenv => environment::fldenv,
        M::Frstor => environment::frstor,
        // Of the 8087 and 80287; later units ignore them.
        M::Fneni | M::Fndisi | M::Fnsetpm => ignored,
        M::Fnop => fnop,
        _ if is_x87(insn) => return thunked(insn),
        _ => return None,
    };
    Some((control, 0))
}

fn thunked(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    match prepare(insn)? {
        Handle::Kept(thunk) if thunk.plan.class == Class::X87 => Some((run_kept, thunk.data())),
        Handle::Kept(_) => None,
        Handle::Temporary => Some((run_temporary, 0)),
    }
}

fn run_kept(cpu: &mut Cpu, cold: &Cold) -> Exec {
    run(cpu, cold, Thunk::of(cold.data))
}

fn run_temporary(cpu: &mut Cpu, cold: &Cold) -> Exec {
    match with_temporary(&cold.insn, |thunk| run(cpu, cold, thunk)) {
        Some(done) => done,
        None => Err(cpu.raise(Fault::ud())),
    }
}

fn run(cpu: &mut Cpu, cold: &Cold, thunk: &Thunk) -> Exec {
    let (insn, plan) = (&cold.insn, &thunk.plan);
    cpu.check_vector(Class::X87)?;
    let mut frame = Frame::new();
    let mut linear = 0;
    match plan.memory {
        MemoryUse::None => {}
        MemoryUse::Read => {
            linear = cpu.operand_linear(insn, plan.size, false)?;
            cpu.load_vector(linear, plan.size, &mut frame.operand)?;
        }
        MemoryUse::Write => {
            linear = cpu.operand_linear(insn, plan.size, true)?;
            if cpu.fast_write_pointer(linear, plan.size).is_none() {
                cpu.probe_write(linear, plan.size)?;
            }
        }
    }
    frame.status = u32::from(cpu.state.status);
    let mut after = X87State::default();
    thunk.run_x87(&mut cpu.state.vector, &mut frame, &mut cpu.state.x87, &mut after);
    // No exception was pending before, so those that are unmasked and flagged now are new. All but inexactness
    // keep a store from happening.
    let unmasked = after.fsw & !after.fcw & EXCEPTIONS;
    if plan.memory == MemoryUse::Write && unmasked & !PRECISION == 0 {
        cpu.store_vector(linear, plan.size, &frame.operand)?;
    }
    let x87 = &mut cpu.state.x87;
    x87.take_registers(&after);
    if plan.status {
        cpu.state.status = frame.status as u16;
    }
    cpu.note_instruction(insn, unmasked != 0);
    Ok(())
}

/// #NM for instructions of the x87 unit, and #MF for those that wait.
fn check(cpu: &mut Cpu, waiting: bool) -> Exec {
    if cpu.state.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(Fault::plain(vector::NM)));
    }
    if waiting && cpu.state.x87.fsw & FSW_ES != 0 {
        return Err(cpu.raise(Fault::plain(vector::MF)));
    }
    Ok(())
}

fn fwait(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    const BOTH: u64 = cr0::MP | cr0::TS;
    if cpu.state.cr0 & BOTH == BOTH {
        return Err(cpu.raise(Fault::plain(vector::NM)));
    }
    if cpu.state.x87.fsw & FSW_ES != 0 {
        return Err(cpu.raise(Fault::plain(vector::MF)));
    }
    Ok(())
}

fn fninit(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    check(cpu, false)?;
    cpu.state.x87.initialise();
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    const CLEARED: u16 = FSW_BUSY | FSW_ES | 1 << 6 | EXCEPTIONS;
    check(cpu, false)?;
    cpu.state.x87.fsw &= !CLEARED;
    Ok(())
}

fn fnop(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, true)?;
    cpu.note_instruction(&cold.insn, false);
    Ok(())
}

fn ignored(cpu: &mut Cpu, _cold: &Cold) -> Exec {
    check(cpu, false)
}

fn fldcw(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, true)?;
    let linear = cpu.operand_linear(&cold.insn, 2, false)?;
    let value = cpu.load::<u16>(linear)?;
    cpu.state.x87.set_control(value);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, false)?;
    let linear = cpu.operand_linear(&cold.insn, 2, true)?;
    cpu.store(linear, cpu.state.x87.fcw)
}

fn fnstsw(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, false)?;
    let fsw = cpu.state.x87.fsw;
    if cold.insn.op0_kind() == OpKind::Register {
        let rax = cpu.state.gpr.get(reg::RAX);
        cpu.state.gpr.set(reg::RAX, rax & !0xffff | u64::from(fsw));
        return Ok(());
    }
    let linear = cpu.operand_linear(&cold.insn, 2, true)?;
    cpu.store(linear, fsw)
}

impl Cpu {
    /// Updates the last-instruction pointers after a non-control instruction.
    fn note_instruction(&mut self, insn: &Instruction, raised: bool) {
        self.state.x87.fip = self.ip_of(insn);
        if !raised {
            return;
        }
        self.state.x87.fop = opcode(insn, self.code_bits).unwrap_or(0);
        if (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) {
            self.state.x87.fdp = self.effective_address(insn);
        }
    }
}

/// FOP: the low three bits of the first opcode byte, and the second byte.
fn opcode(insn: &Instruction, bits: u32) -> Option<u16> {
    let mut encoder = Encoder::new(bits);
    encoder.encode(insn, insn.ip()).ok()?;
    let bytes = encoder.take_buffer();
    let at = bytes.iter().position(|byte| byte & 0xf8 == 0xd8)?;
    Some(u16::from(bytes[at] & 7) << 8 | u16::from(*bytes.get(at + 1)?))
}

impl X87State {
    fn top(&self) -> usize {
        usize::from(self.fsw >> FSW_TOP_SHIFT & 7)
    }

    /// Changes the top of stack without moving the physical registers.
    fn set_top(&mut self, top: usize) {
        let by = (top & 7).wrapping_sub(self.top()) & 7;
        self.st.rotate_left(by);
        self.fsw = self.fsw & !FSW_TOP | ((top & 7) as u16) << FSW_TOP_SHIFT;
    }

    /// Sets the control word, which may unmask exceptions that are already flagged.
    pub(crate) fn set_control(&mut self, value: u16) {
        self.fcw = value & FCW_WRITABLE | FCW_FIXED_1;
        self.update_summary();
    }

    /// Recomputes ES and its copy B.
    pub(crate) fn update_summary(&mut self) {
        let pending = self.fsw & !self.fcw & EXCEPTIONS != 0;
        self.fsw &= !(FSW_ES | FSW_BUSY);
        if pending {
            self.fsw |= FSW_ES | FSW_BUSY;
        }
    }

    /// FNINIT: the physical registers keep their contents but count as empty.
    fn initialise(&mut self) {
        self.set_top(0);
        self.fcw = FCW_INITIAL;
        self.fsw = 0;
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
    }

    /// MMX register `number`.
    pub(crate) fn mmx(&self, number: usize) -> [u8; 8] {
        let st = &self.st[number.wrapping_sub(self.top()) & 7];
        let mut value = [0; 8];
        value.copy_from_slice(&st[..8]);
        value
    }

    /// What every MMX instruction but EMMS does: TOP = 0 and no register empty.
    pub(crate) fn enter_mmx(&mut self) {
        self.set_top(0);
        self.ftw = 0xff;
    }
}
