//! The system half of the CPU on small assembled programs, mode by mode: what the program sees, and what the
//! processor leaves in registers and memory. Expectations are those of the SDM's instruction pages and of volume 3.

mod control;
mod events;
mod far;
mod flags;
mod machine;
mod msr;
mod ports;
mod segments;
mod syscall;
mod tasks;
mod v86;
mod vector;
