//! VMCS contents as data, and the rules about them: fields, capability MSRs, VM-entry checks, merging, routing of exits.
//!
//! Must not know: memory, engines, KVM, devices.

#![forbid(unsafe_code)]

pub mod access;
pub mod caps;
pub mod check;
pub mod dump;
pub mod encoding;
pub mod error;
pub mod event;
pub mod exit_policy;
pub mod field;
pub mod merge;
pub mod reflect;
pub mod region;
pub mod segment;

pub use access::Access;
pub use caps::Capabilities;
pub use field::{Field, Vmcs};
