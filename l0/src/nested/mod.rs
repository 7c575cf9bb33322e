//! Virtual VMX: what a guest hypervisor (L1) and its guests (L2) need of us (L0).

pub mod second_level;
