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
pub(crate) mod control;
pub(crate) mod descriptor;
pub(crate) mod far;
pub(crate) mod flags;
mod host;
#[cfg(test)]
pub(crate) mod host_compare;
pub(crate) mod io;
pub(crate) mod iret;
pub(crate) mod mov;
pub(crate) mod msr;
pub(crate) mod muldiv;
pub(crate) mod operands;
pub(crate) mod segment;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod stack_switch;
pub(crate) mod string;
pub(crate) mod syscall;
pub(crate) mod system;
pub(crate) mod task;
pub(crate) mod vector;
pub(crate) mod vmx;
pub(crate) mod x87;
pub(crate) mod xstate;

use iced_x86::Instruction;

use crate::decode::ColdLowering;
use crate::op::ColdHandler;

/// Asks the families whose instructions are executed from iced's own form.
pub(crate) fn lower_cold(insn: &Instruction) -> Option<ColdLowering> {
    type Lower = fn(&Instruction) -> Option<ColdHandler>;
    type Ends = fn(&Instruction) -> bool;
    const GOES_ON: Ends = |_| false;
    const FAMILIES: [(Lower, Ends); 13] = [
        (bits::lower_cold, GOES_ON),
        (muldiv::lower_cold, GOES_ON),
        (stack::lower_cold, GOES_ON),
        (flags::lower, flags::ends_block),
        (segment::lower, segment::ends_block),
        (control::lower, control::ends_block),
        (system::lower, system::ends_block),
        (msr::lower, msr::ends_block),
        (io::lower, io::ends_block),
        (syscall::lower, syscall::ends_block),
        (iret::lower, iret::ends_block),
        (far::lower, far::ends_block),
        (vmx::lower, vmx::ends_block),
    ];
    for (lower, ends) in FAMILIES {
        if let Some(handler) = lower(insn) {
            return Some((handler, 0, ends(insn)));
        }
    }
    let (handler, data) =
        vector::lower_cold(insn).or_else(|| x87::lower(insn)).or_else(|| xstate::lower(insn))?;
    Some((handler, data, false))
}
