//! A whole machine in miniature for the translator's oracle: a supervisor with two address spaces, handlers for every
//! vector, interrupts; the same program on an interpreting and on a translating CPU, in lockstep.
//!
//! - [`world`]: what lies where in RAM, page tables, descriptors, the state at the start
//! - [`handlers`]: the supervisor's code: what it does with exceptions, interrupts and system calls
//! - [`lockstep`]: both CPUs side by side; [`state`]: how their states differ

pub mod handlers;
pub mod lockstep;
pub mod state;
pub mod world;
