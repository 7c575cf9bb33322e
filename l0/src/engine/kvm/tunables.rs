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

/// Instructions that the software CPU executes in a microsecond, for weighing its time against that of going to KVM: what
/// it does in straight integer code, a little rounded down.
pub(super) const SOFTWARE_PER_US: u64 = 200;

/// Patience with L2's ring 3 before its first stretch has shown what one costs here.
pub(super) const L2_PATIENCE: u64 = PATIENCE;

/// The least patience: ten microseconds of the software CPU, about what two exits of a native KVM cost.
pub(super) const L2_LEAST_PATIENCE: u64 = 2000;

/// Instructions of L2 between two stretches where tests want it on KVM whatever it costs: enough to get past an
/// instruction that KVM gives back.
pub(super) const L2_EAGER_BURST: u64 = 8;

/// KVM VMs of a vCPU for L2s. A hypervisor changes its root when it drops all its tables; old ones do not come back.
pub(super) const L2_GUESTS: usize = 4;

/// Bytes of L2's physical addresses that KVM is given: a terabyte. KVM keeps 4 bytes for each 2 MiB of it.
pub(super) const WINDOW: u64 = 1 << 40;

/// With shadow paging KVM keeps 8 bytes for each 4 KiB: no more than twice L1's memory, but at least this.
pub(super) const SMALLEST_WINDOW: u64 = 1 << 33;

/// The most of a page that is mapped at once: all pages but those of 1 GiB, of which each page must be looked at.
pub(super) const LARGEST_FILL: u64 = 2 << 20;

/// Windows that may be there at once without the host's limit of mappings getting in the way.
pub(super) const L2_WINDOWS: usize = 8;

/// Mappings left to everybody else in the process.
pub(super) const OTHER_MAPPINGS: usize = 4096;

/// vm.max_map_count where it cannot be read.
pub(super) const USUAL_MAP_COUNT: usize = 65_530;
