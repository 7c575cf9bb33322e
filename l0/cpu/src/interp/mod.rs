//! The interpreter: one file per instruction family. Each family's `lower` says whether an instruction is its
//! own and how to execute it; [`crate::decode`] asks them in turn.
//!
//! Rules for handlers:
//! - An instruction that returns `Err` has changed nothing that the guest can see, except where the architecture
//!   says otherwise (repeated string instructions up to the fault).
//! - `state.rip` holds the next instruction's address when a block's last instruction runs; branches overwrite it.
//!   Inside a block use [`Cpu::ip_of`](crate::Cpu::ip_of) and [`Cpu::next_ip`](crate::Cpu::next_ip).
//! - What changes CPL, CR0, CR4, EFER, AC, DR7 or CS calls `refresh_mode`; what may make an interrupt deliverable
//!   or sets a shadow calls `attend`.

mod address;
pub(crate) mod arith;
pub(crate) mod bits;
pub(crate) mod branch;
mod host;
#[cfg(test)]
pub(crate) mod host_compare;
pub(crate) mod mov;
pub(crate) mod muldiv;
pub(crate) mod operands;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod vector;
pub(crate) mod x87;
pub(crate) mod xstate;

use iced_x86::Instruction;

use crate::decode::ColdLowering;

/// Asks the families whose instructions are executed from iced's own form.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<ColdLowering> {
    let integer =
        bits::lower_cold(insn).or_else(|| muldiv::lower_cold(insn)).or_else(|| stack::lower_cold(insn));
    let native = || vector::lower_cold(insn).or_else(|| x87::lower(insn)).or_else(|| xstate::lower(insn));
    integer
        .map(|handler| (handler, 0, false))
        .or_else(|| native().map(|(handler, data)| (handler, data, false)))
}
