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

pub(crate) mod control;
pub(crate) mod descriptor;
pub(crate) mod far;
pub(crate) mod flags;
pub(crate) mod io;
pub(crate) mod iret;
pub(crate) mod msr;
pub(crate) mod operands;
pub(crate) mod segment;
pub(crate) mod stack_switch;
pub(crate) mod syscall;
pub(crate) mod system;
pub(crate) mod task;
