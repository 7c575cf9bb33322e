//! VMX of the software CPU on small assembled programs: what causes VM exits, and what they say. Expectations are those
//! of the SDM's VMX chapters.

mod access;
mod events;
mod guest;
mod injection;
mod instructions;
#[path = "../system/machine.rs"]
#[allow(dead_code)]
mod machine;
mod root;
mod second_level;
