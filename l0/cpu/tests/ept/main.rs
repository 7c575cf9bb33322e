//! Non-root operation's memory: the second level of translation under a guest, and APIC virtualization. Small assembled
//! programs, as in the system tests; expectations are those of the SDM's VMX chapters.

mod apic_access;
mod apic_interrupts;
mod apic_registers;
mod guest;
mod invalidation;
mod level;
#[allow(dead_code)] // The system tests use the rest of it.
#[path = "../system/machine.rs"]
mod machine;
mod modes;
mod violations;
mod virtualization_exception;
