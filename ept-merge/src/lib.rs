//! Extended page tables of a guest hypervisor (L1), combined with ours.
//!
//! EPT12 maps L2-physical to L1-physical addresses and lies in L1's memory; no processor ever uses it. EPT02
//! ([`Ept02`]) is a cache of EPT12∘EPT01, filled on demand. It behaves as the processor's own cache of guest-physical
//! mappings would: it may forget anything at any time, and keeps nothing that INVEPT or an EPT violation says is gone.
//!
//! - [`entry`] and [`pointer`]: what the SDM says of one entry and of the EPT pointer
//! - [`walk`]: EPT12 in memory; [`mark`]: its accessed and dirty flags and the page-modification log
//! - [`merge`]: one walk of EPT12 and EPT01 become a page of EPT02
//! - [`shadow`]: EPT02; [`cache`]: its storage; [`invalidate`]: INVEPT
//! - [`qualification`]: how a violation is told
//!
//! Nothing in EPT12 is trusted: its addresses are only ever handed to [`Memory`], and every walk ends after four entries.
//!
//! Must not know: VMCS, engines, KVM.

#![forbid(unsafe_code)]

pub mod cache;
pub mod entry;
pub mod invalidate;
pub mod mark;
pub mod memory;
pub mod merge;
pub mod pointer;
pub mod qualification;
pub mod shadow;
pub mod tunables;
pub mod walk;

pub use entry::{Capabilities, Entry, ExecuteControl, Misconfiguration, Permissions};
pub use mark::Log;
pub use memory::{Ept01, Identity, L1Gpa, L2Gpa, Memory};
pub use merge::Page;
pub use pointer::{Root, check_eptp};
pub use shadow::{Access, Ept02, Limits};
pub use walk::Fault;

#[cfg(test)]
mod test_memory;
#[cfg(test)]
mod tests;
