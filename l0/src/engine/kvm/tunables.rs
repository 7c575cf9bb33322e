//! Sizes chosen by measurement, with their units and reasons.

use std::time::Duration;

/// Instructions that ring 3 executes on the software CPU, without leaving ring 3, before KVM is given the rest. Going
/// to KVM and back costs about half a millisecond where KVM emulates ring 0 (the way, dropping what it derived from
/// page tables, and what both sides then derive anew): as long as the software CPU takes for this many. Waiting just
/// as long as the thing waited for costs is never worse than twice the best choice.
pub(super) const PATIENCE: u64 = 100_000;

/// The most patience after stretches on KVM that did not pay: about a tenth of a second on the software CPU.
pub(super) const MOST_PATIENCE: u64 = 12_800_000;

/// A stretch on KVM that paid: longer than going there and back costs.
pub(super) const WORTH_IT: Duration = Duration::from_millis(1);

/// Instructions that a guest hypervisor executes on the software CPU after each exit, before KVM is given the rest, at
/// least and at most. A way to KVM and back costs tens of microseconds, in which the software CPU executes about as many
/// as the former; the latter takes it about a millisecond.
pub(super) const SHORTEST_CLUSTER: u64 = 8_192;
pub(super) const LONGEST_CLUSTER: u64 = 524_288;

/// Time of a guest hypervisor on KVM that paid for the way.
pub(super) const CLUSTER_WORTH_IT: Duration = Duration::from_micros(200);

/// Instructions the software CPU executes at a time where KVM may not have the guest.
pub(super) const UNFIT_BURST: u64 = 65_536;
