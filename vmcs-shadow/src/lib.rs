//! VMCS contents as data: what a field's encoding says. The rules of VM entry, merging and reflection will stand
//! beside it; nothing of VMX is offered to guests yet.
//!
//! Must not know: memory, engines, KVM, devices.

#![forbid(unsafe_code)]

pub mod encoding;
