//! SIMD floating-point exceptions and MXCSR ("SIMD Floating-Point Exceptions").
//!
//! With every exception masked, which is how all but a few programs run, a thunk runs under the guest's own MXCSR and
//! its sticky flags are taken over. With one unmasked, the instruction runs masked on a copy of the registers; the
//! flags it raises tell whether the processor would have stopped, and only if not is the copy kept.
//!
//! DEVIATION: an unmasked overflow or underflow leaves MXCSR.PE as the masked response sets it; the processor sets
//! it by whether the result with unbounded exponent is inexact. A handler sees PE where it might be clear.

use x86defs::{cr4, vector};

use crate::Cpu;
use crate::native::{Class, Frame, MemoryUse, Thunk};
use crate::op::Cold;
use crate::state::X87State;
use crate::trap::{Exec, Fault};

const FLAGS: u32 = 0x3f;
/// Invalid, denormal, divide by zero: found before anything is computed.
const PRE_COMPUTATION: u32 = 0x07;
const UNDERFLOW: u32 = 1 << 4;
const MASKS: u32 = FLAGS << MASK_SHIFT;
const MASK_SHIFT: u32 = 7;
const FLUSH_TO_ZERO: u32 = 1 << 15;
/// Bits of MXCSR that exist; the others are #GP in LDMXCSR.
pub(crate) const MXCSR_VALID: u32 = 0xffff;

impl Cpu {
    #[inline(always)]
    pub(super) fn simd_exceptions_unmasked(&self) -> bool {
        self.state.vector.mxcsr & MASKS != MASKS
    }

    /// Runs a floating-point thunk whose exceptions may have to be raised.
    #[cold]
    pub(super) fn run_unmasked(&mut self, thunk: &Thunk, frame: &mut Frame, linear: u64) -> Exec {
        let plan = &thunk.plan;
        let before = self.state.vector.mxcsr;
        let unmasked = !(before >> MASK_SHIFT) & FLAGS;
        let mut control = before & !FLAGS | MASKS;
        if unmasked & UNDERFLOW != 0 {
            // Flushing to zero is part of the masked response.
            control &= !FLUSH_TO_ZERO;
        }
        frame.mxcsr = control;
        let mut vector = self.state.vector;
        let mut x87 = X87State::default();
        if plan.x87 {
            thunk.run_x87(&mut vector, frame, &mut self.state.x87, &mut x87);
        } else {
            thunk.run(&mut vector, frame);
        }
        let mut raised = frame.mxcsr_after & FLAGS;
        if unmasked & UNDERFLOW != 0 {
            if let Some(results) = plan.results {
                // Unmasked, a tiny result is an underflow even if it is exact.
                let operand: &[u8] = match plan.memory {
                    MemoryUse::Write => &frame.operand,
                    _ => &vector.ymm[(plan.vector_out.trailing_zeros() & 15) as usize],
                };
                if results.has_denormal(operand) {
                    raised |= UNDERFLOW;
                }
            }
        }
        if raised & unmasked & PRE_COMPUTATION != 0 {
            return Err(self.raise_simd(raised & PRE_COMPUTATION));
        }
        if raised & unmasked != 0 {
            return Err(self.raise_simd(raised));
        }
        if plan.memory == MemoryUse::Write {
            self.store_vector(linear, plan.size, &frame.operand)?;
        }
        self.state.vector = vector;
        self.state.vector.mxcsr = before | raised;
        if plan.x87 {
            self.state.x87.take_registers(&x87);
        }
        Ok(())
    }

    fn raise_simd(&mut self, raised: u32) -> crate::trap::Trap {
        self.state.vector.mxcsr |= raised;
        let reported = self.state.cr4 & cr4::OSXMMEXCPT != 0;
        self.raise(Fault::plain(if reported { vector::XM } else { vector::UD }))
    }
}

fn check(cpu: &mut Cpu, cold: &Cold) -> Exec {
    match cold.insn.encoding() {
        iced_x86::EncodingKind::VEX => cpu.check_vector(Class::Vex),
        _ => cpu.check_vector(Class::Sse),
    }
}

pub(super) fn ldmxcsr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, cold)?;
    let linear = cpu.operand_linear(&cold.insn, 4, false)?;
    let value = cpu.load::<u32>(linear)?;
    if value & !MXCSR_VALID != 0 {
        return Err(cpu.raise(Fault::gp(0)));
    }
    cpu.state.vector.mxcsr = value;
    Ok(())
}

pub(super) fn stmxcsr(cpu: &mut Cpu, cold: &Cold) -> Exec {
    check(cpu, cold)?;
    let linear = cpu.operand_linear(&cold.insn, 4, true)?;
    cpu.store(linear, cpu.state.vector.mxcsr)
}
