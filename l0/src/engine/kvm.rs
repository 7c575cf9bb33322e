//! The KVM engine: guest instructions on the host's processor, through /dev/kvm.
//!
//! KVM's vCPU is a cache of [`turtles_cpu::state::CpuState`], the vCPU's home. State is moved in before the guest
//! runs and moved out before the engine returns, only as far as it differs. I/O, MMIO and MSR exits are answered
//! through [`turtles_cpu::bus::Bus`] without moving it. Whatever KVM cannot execute (its emulator has no such
//! instruction, the host kernel cannot reach the memory, the entry fails) the software CPU finishes, and KVM goes
//! on: no exit of KVM's is fatal to the guest as long as there is another way to go on.
//!
//! Interrupt controllers are ours, not KVM's: the engine asks the bus for a vector when KVM says that one can be
//! taken.
//!
//! - `host`: /dev/kvm and what it can do; `vm`: memory slots and the MSR filter
//! - `vcpu`: the run loop; `exits`: what an exit is answered with; `kick`: getting out of KVM_RUN
//! - `transfer`: moving state, with `convert` (registers, events), `xsave`, `msrs` and `tsc`
//! - `cpuid`: what the guest may see; `probe`: how fast this KVM is; `probe_exits`: what it tells us of
//! - `traps`: VMX instructions of a guest hypervisor, where KVM executes its ring 0
//! - `l2`: guests of the guest, each of their EPT roots in a KVM VM of its own
//! - `hop`: changing engines at random, for tests
//! - `user`: the share of the guest that KVM executes where it emulates ring 0; `tunables`: its sizes
//!
//! What runs where ([`Share`], decided once by the measured speed of ring 0):
//!
//! | guest code | processor virtualizes (VMX, SVM) | KVM emulates ring 0 (PVM) |
//! | --- | --- | --- |
//! | rings 0-2, real, 16-bit, 32-bit, virtual-8086, PAE | KVM | software CPU: KVM's emulator is slower and inexact |
//! | ring 3, 64-bit, long without a system call | KVM | KVM, if nothing of its state needs the kernel's registers |
//! | ring 3 otherwise | KVM | software CPU: one way to KVM and back costs as much as thousands of instructions |
//! | exceptions, interrupts, INT n, SYSCALL from ring 3 | KVM | software CPU, from the state before the instruction |
//! | a guest hypervisor's VMX instructions, and what is near them | software CPU (see `traps`) | software CPU |
//! | guests of the guest (VMX non-root operation) | ring 3: KVM, else software CPU: see `l2` | software CPU; ring 3 with `--engine kvm,l2` |
//!
//! Invariants:
//! - KICK-1: whoever sets an attention bit either is seen before KVM_RUN, or ends it.
//! - STALE-1: what the software CPU derived from guest memory is dropped before it runs after KVM, and what KVM
//!   derived from page tables is dropped after the software CPU may have changed or invalidated them.

mod convert;
mod cpuid;
mod exits;
mod hop;
mod host;
mod ioctl;
mod kick;
mod l2;
mod msrs;
mod probe;
mod probe_exits;
mod stats;
mod transfer;
mod traps;
mod tsc;
mod tunables;
mod user;
mod vcpu;
mod vm;
mod xsave;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod user_tests;

pub use cpuid::LostFeature;
pub use host::{CAPABILITIES, Capability, KvmHost, Need, OpenError, Share};
pub use l2::{L2Policy, L2Stats, Leaks};
pub use probe::{FAST_RING0, Speed};
pub use probe_exits::{Exits, VmxReach};
pub use stats::Stats;
pub use tsc::GuestTsc;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;

use super::EngineError;

/// Turns a failed ioctl into an engine error that says what was being done.
fn failed(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    let what = what.into();
    move |error| EngineError::Kvm { what, source: std::io::Error::from_raw_os_error(error.errno()) }
}
