//! Vector instructions: MMX, SSE to SSE4.2, AVX, AVX2, FMA, F16C, AES, SHA and what else works on those registers.
//!
//! Whether CPUID shows the instruction's extension at all was asked when it was decoded.
//!
//! The arithmetic is the host's (see [`crate::native`]); here is what surrounds it: whether the instruction may
//! execute, the memory operand with its alignment and faults, and floating-point exceptions. Plain moves, the
//! commonest of all, need no host instruction and are in [`moves`]; instructions that access memory element by
//! element under a mask are in [`masked`].
//!
//! UNSUPPORTED: AVX-512 and AMD's own extensions (SSE4A, XOP, FMA4, 3DNow!): CPUID never shows them, they are #UD.

pub(crate) mod exceptions;
mod masked;
mod moves;
#[cfg(test)]
mod tests;

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};
use x86defs::{cr0, cr4, vector, xcr0};

use crate::Cpu;
use crate::interp::address::Addressing;
use crate::native::{
    Class, Frame, Handle, MemoryUse, Plan, RAX, RCX, RDX, Thunk, Xmm, prepare, with_temporary,
};
use crate::op::{Cold, ColdHandler, Handler, Op};
use crate::state::{Seg, X87State, reg};
use crate::trap::{Exec, Fault, Trap};

/// FSW: an unmasked x87 exception is pending.
pub(crate) const FSW_ES: u16 = 1 << 7;

/// Picks a handler's form for the kind of address: see [`crate::interp::address`].
macro_rules! by_address {
    ($flat:expr, $name:ident $(, $argument:expr)*) => {
        if $flat {
            $name::<$crate::interp::address::Flat $(, { $argument })*> as $crate::op::Handler
        } else {
            $name::<$crate::interp::address::Checked $(, { $argument })*>
        }
    };
}
use by_address;

/// How to execute a vector instruction from its decoded form; none for other families' instructions and for those that
/// [`lower_cold`] knows. `flat` says how memory is addressed.
pub(crate) fn lower(insn: &Instruction, op: &mut Op, flat: bool) -> Option<Handler> {
    if !is_ours(insn) || masked::lower(insn).is_some() {
        return None;
    }
    if let Some(handler) = moves::lower(insn, op, flat) {
        return Some(handler);
    }
    let Handle::Kept(thunk) = prepare(insn)? else { return None };
    op.imm = thunk.data();
    Some(match thunk.plan.memory {
        MemoryUse::None if thunk.plan.is_registers_only() => run_registers,
        MemoryUse::Read if thunk.plan.is_plain_load() => by_address!(flat, run_load),
        _ => by_address!(flat, run_kept),
    })
}

/// How to execute a vector instruction from iced's form: the few that need it.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<(ColdHandler, u64)> {
    use Mnemonic as M;
    let handler: ColdHandler = match insn.mnemonic() {
        M::Ldmxcsr | M::Vldmxcsr => exceptions::ldmxcsr,
        M::Stmxcsr | M::Vstmxcsr => exceptions::stmxcsr,
        _ if !is_ours(insn) => return None,
        _ => match masked::lower(insn) {
            Some(handler) => handler,
            None => match prepare(insn)? {
                Handle::Temporary => run_temporary,
                Handle::Kept(_) => return None,
            },
        },
    };
    Some((handler, 0))
}

/// An instruction on vector or MMX registers.
pub(crate) fn is_ours(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let vectors = (0..insn.op_count()).any(|i| {
        let register = if insn.op_kind(i) == OpKind::Register { insn.op_register(i) } else { Register::None };
        register.is_mm() || register.is_vector_register()
    });
    let implicit = matches!(
        insn.mnemonic(),
        M::Emms | M::Vzeroupper | M::Vzeroall
            // From memory to a general register.
            | M::Cvtss2si | M::Cvtsd2si | M::Cvttss2si | M::Cvttsd2si
            | M::Vcvtss2si | M::Vcvtsd2si | M::Vcvttss2si | M::Vcvttsd2si
    );
    (vectors || implicit) && matches!(insn.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
}

fn run_registers(cpu: &mut Cpu, op: &Op) -> Exec {
    let thunk = Thunk::of(op.imm);
    cpu.check_vector(thunk.plan.class)?;
    thunk.run_registers(&mut cpu.state.vector);
    Ok(())
}

fn run_load<A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let thunk = Thunk::of(op.imm);
    cpu.check_vector(thunk.plan.class)?;
    let linear = A::linear(cpu, op, thunk.plan.size, false)?;
    cpu.check_operand_alignment(&thunk.plan, linear)?;
    cpu.run_load(thunk, linear)
}

fn run_kept<A: Addressing>(cpu: &mut Cpu, op: &Op) -> Exec {
    let thunk = Thunk::of(op.imm);
    let plan = &thunk.plan;
    cpu.check_vector(plan.class)?;
    let linear = match plan.memory {
        MemoryUse::None => 0,
        access => A::linear(cpu, op, plan.size, access == MemoryUse::Write)?,
    };
    run(cpu, thunk, linear)
}

fn run_temporary(cpu: &mut Cpu, cold: &Cold) -> Exec {
    let done = with_temporary(&cold.insn, |thunk| {
        let plan = &thunk.plan;
        cpu.check_vector(plan.class)?;
        let linear = match plan.memory {
            MemoryUse::None => 0,
            access => cpu.operand_linear(&cold.insn, plan.size, access == MemoryUse::Write)?,
        };
        run(cpu, thunk, linear)
    });
    done.unwrap_or_else(|| Err(cpu.raise(Fault::ud())))
}

/// Any instruction with a thunk, its memory operand at `linear`.
fn run(cpu: &mut Cpu, thunk: &Thunk, linear: u64) -> Exec {
    let plan = &thunk.plan;
    cpu.check_operand_alignment(plan, linear)?;
    let mut frame = Frame::new();
    if plan.memory == MemoryUse::Read {
        cpu.load_vector(linear, plan.size, &mut frame.operand)?;
    }
    cpu.fill_frame(plan, &mut frame);
    if plan.mxcsr && cpu.simd_exceptions_unmasked() {
        if plan.memory == MemoryUse::Write {
            // The destination's page fault comes before #XM.
            cpu.probe_write(linear, plan.size)?;
        }
        cpu.run_unmasked(thunk, &mut frame, linear)?;
    } else if plan.x87 {
        cpu.run_mmx(thunk, &mut frame, linear)?;
    } else {
        // A memory destination has no other destination beside it, so that nothing is lost if the write faults.
        thunk.run(&mut cpu.state.vector, &mut frame);
        cpu.store_result(plan, &frame, linear)?;
        if plan.mxcsr {
            cpu.state.vector.mxcsr = frame.mxcsr_after;
        }
    }
    cpu.take_results(plan, &frame);
    Ok(())
}

impl Cpu {
    /// #UD and #NM, and #MF for instructions on MMX registers.
    #[inline(always)]
    pub(crate) fn check_vector(&mut self, class: Class) -> Exec {
        let state = &self.state;
        let allowed = match class {
            Class::Sse => state.cr0 & (cr0::EM | cr0::TS) == 0 && state.cr4 & cr4::OSFXSR != 0,
            Class::Vex => {
                const AVX: u64 = xcr0::SSE | xcr0::AVX;
                state.cr4 & cr4::OSXSAVE != 0
                    && state.xcr0 & AVX == AVX
                    && state.cr0 & (cr0::TS | cr0::PE) == cr0::PE
                    && !state.v86()
            }
            Class::Mmx | Class::X87 => state.cr0 & (cr0::EM | cr0::TS) == 0 && state.x87.fsw & FSW_ES == 0,
        };
        if allowed {
            return Ok(());
        }
        Err(self.refuse_vector(class))
    }

    #[cold]
    fn refuse_vector(&mut self, class: Class) -> Trap {
        const AVX: u64 = xcr0::SSE | xcr0::AVX;
        let state = &self.state;
        let undefined = match class {
            Class::Sse => state.cr0 & cr0::EM != 0 || state.cr4 & cr4::OSFXSR == 0,
            Class::Vex => {
                !state.protected() || state.v86() || state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & AVX != AVX
            }
            Class::Mmx => state.cr0 & cr0::EM != 0,
            Class::X87 => false,
        };
        let fault = if undefined {
            vector::UD
        } else if self.state.cr0 & (cr0::TS | cr0::EM) != 0 {
            vector::NM
        } else {
            vector::MF
        };
        self.raise(Fault::plain(fault))
    }

    #[inline(always)]
    fn check_operand_alignment(&mut self, plan: &Plan, linear: u64) -> Exec {
        if plan.aligned && linear & (plan.size as u64 - 1) != 0 {
            return Err(self.raise(Fault::gp(0)));
        }
        Ok(())
    }

    /// Reads a memory operand of any size up to 32 bytes.
    #[inline(always)]
    pub(crate) fn load_vector(&mut self, linear: u64, size: usize, to: &mut [u8; 64]) -> Exec {
        match size {
            16 => self.load::<Xmm>(linear)?.put(to.first_chunk_mut().unwrap_or(&mut [0; 16])),
            32 => self.load_32(linear, to.first_chunk_mut().unwrap_or(&mut [0; 32]))?,
            8 => to[..8].copy_from_slice(&self.load::<u64>(linear)?.to_le_bytes()),
            1 | 2 | 4 => to[..8].copy_from_slice(&self.load_sized(linear, size)?.to_le_bytes()),
            _ => {
                let size = size.min(to.len());
                self.read_bytes(linear, &mut to[..size])?;
            }
        }
        Ok(())
    }

    /// Writes a memory operand of any size up to 32 bytes.
    #[inline(always)]
    pub(crate) fn store_vector(&mut self, linear: u64, size: usize, from: &[u8; 64]) -> Exec {
        match size {
            16 => self.store(linear, Xmm::new(from.first_chunk().unwrap_or(&[0; 16]))),
            32 => self.store_32(linear, from.first_chunk().unwrap_or(&[0; 32])),
            1 | 2 | 4 | 8 => {
                let value = u64::from_le_bytes(*from.first_chunk().unwrap_or(&[0; 8]));
                self.store_sized(linear, size, value)
            }
            _ => self.write_bytes(linear, &from[..size.min(from.len())]),
        }
    }

    fn store_result(&mut self, plan: &Plan, frame: &Frame, linear: u64) -> Exec {
        match plan.memory {
            MemoryUse::Write => self.store_vector(linear, plan.size, &frame.operand),
            MemoryUse::None | MemoryUse::Read => Ok(()),
        }
    }

    /// General registers, status flags and MXCSR for the thunk.
    fn fill_frame(&self, plan: &Plan, frame: &mut Frame) {
        frame.rax = match plan.gpr {
            Register::None => self.state.gpr.get(reg::RAX),
            gpr => self.read_register(gpr),
        };
        frame.rdx = self.state.gpr.get(reg::RDX);
        frame.status = u32::from(self.state.status);
        frame.mxcsr = self.state.vector.mxcsr;
    }

    /// General registers and status flags from the thunk.
    fn take_results(&mut self, plan: &Plan, frame: &Frame) {
        debug_assert!(plan.gpr_in & RCX == 0 && plan.gpr_out & RDX == 0);
        if plan.gpr_out & RAX != 0 {
            self.write_register(plan.gpr, frame.rax);
        }
        if plan.gpr_out & RCX != 0 {
            self.write_register(Register::ECX, frame.rcx);
        }
        if plan.status {
            self.state.status = frame.status as u16;
        }
    }

    /// Executes an instruction on MMX registers.
    fn run_mmx(&mut self, thunk: &Thunk, frame: &mut Frame, linear: u64) -> Exec {
        let mut after = X87State::default();
        thunk.run_x87(&mut self.state.vector, frame, &mut self.state.x87, &mut after);
        self.store_result(&thunk.plan, frame, linear)?;
        self.state.x87.take_registers(&after);
        if thunk.plan.mxcsr {
            self.state.vector.mxcsr = frame.mxcsr_after;
        }
        Ok(())
    }
}

impl X87State {
    /// Takes all but the last-instruction pointers, which hosts treat in different ways, from an image that a
    /// thunk stored.
    pub(crate) fn take_registers(&mut self, from: &X87State) {
        self.fcw = from.fcw;
        self.fsw = from.fsw;
        self.ftw = from.ftw;
        self.st = from.st;
    }
}

/// Segment and canonical check of an address that an instruction computed itself.
fn element_linear(cpu: &mut Cpu, seg: Seg, offset: u64, size: usize, write: bool) -> Exec<u64> {
    let linear = cpu.linear(seg, offset, size, write)?;
    if seg == Seg::Ss && cpu.code_bits == 64 {
        let last = linear.wrapping_add(size as u64 - 1);
        if !cpu.is_canonical(linear) || !cpu.is_canonical(last) {
            return Err(cpu.raise(Fault::with_code(vector::SS, 0)));
        }
    }
    Ok(linear)
}
