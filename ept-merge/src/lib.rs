//! Extended page tables as data: entries and what they allow. Walking, merging and invalidation will stand beside it.
//!
//! Must not know: VMCS, engines, KVM.

#![forbid(unsafe_code)]

pub mod entry;
