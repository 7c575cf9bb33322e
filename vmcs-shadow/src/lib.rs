//! VMCS contents as data, and the rules about them: fields, capability MSRs, VM-entry checks, merging, routing of exits.
//!
//! Must not know: memory, engines, KVM, devices.

#![forbid(unsafe_code)]

pub mod encoding;
pub mod field;

pub use field::{Field, Vmcs};
