//! The guest's TSC in KVM follows its owner's clock.
//!
//! KVM's TSC is the host's plus an offset; the owner's clock is of its own. They run apart by parts in a million, so
//! the offset is set again now and then, and only ever forward: the guest must not see time go back when it moves
//! between engines.
//!
//! Some KVMs (PVM) give the guest the host's TSC whatever is asked of them. There the owner's clock must count the
//! host's TSC itself; [`GuestTsc`] tells.

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use turtles_cpu::Cpu;
use x86defs::msr;

use super::{KvmHost, failed, ioctl, msrs};
use crate::engine::EngineError;

/// The TSC that a guest of this host's KVM reads.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GuestTsc {
    /// Its frequency, if KVM knows it.
    pub hz: Option<u64>,
    /// KVM can run it at another frequency.
    pub scalable: bool,
    /// KVM can set it. If not, the guest reads the host's TSC, and its owner's clock must follow that.
    pub settable: bool,
}

impl GuestTsc {
    /// The host's TSC now.
    pub fn host_now() -> u64 {
        // SAFETY: RDTSC has no operands, and every x86-64 processor has it.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
}

impl KvmHost {
    /// Finds out, in a throw-away VM, what TSC a guest reads.
    pub fn guest_tsc(&self) -> Result<GuestTsc, EngineError> {
        let vm = self.kvm.create_vm().map_err(failed("creating a VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("creating a vCPU"))?;
        let hz = vcpu.get_tsc_khz().ok().filter(|&khz| khz > 0).map(|khz| u64::from(khz) * 1000);
        let before = msrs::read_one(&vcpu, msr::IA32_TSC)?.unwrap_or(0);
        let wanted = before.wrapping_add(FAR);
        set(&vcpu, ioctl::has_tsc_offset(&vcpu), FAR, wanted)?;
        let after = msrs::read_one(&vcpu, msr::IA32_TSC)?.unwrap_or(0);
        Ok(GuestTsc { hz, scalable: self.has_tsc_control, settable: after >= wanted })
    }
}

/// Hours of any TSC: further than it can move by itself between two looks.
const FAR: u64 = 1 << 46;

/// Between two corrections: at 500 parts in a million, the most the host's clock is slewed, 5 µs.
const EVERY: Duration = Duration::from_millis(10);
/// Being ahead by more than this is not drift: the guest's clock was set back.
const SET_BACK_SECONDS: u64 = 1;

/// Keeps KVM's TSC at the owner's.
pub(super) struct TscSync {
    exact: bool,
    settable: bool,
    last: Option<(Instant, u64)>,
}

impl TscSync {
    pub(super) fn new(vcpu: &VcpuFd) -> Self {
        Self { exact: ioctl::has_tsc_offset(vcpu), settable: true, last: None }
    }

    /// Corrects KVM's TSC if it is time to.
    pub(super) fn sync(&mut self, vcpu: &VcpuFd, cpu: &mut Cpu, tsc_hz: u64) -> Result<(), EngineError> {
        let adjust = cpu.state.msrs.tsc_adjust;
        let fresh = self.last.is_some_and(|(at, with)| with == adjust && at.elapsed() < EVERY);
        if fresh {
            return Ok(());
        }
        let moved = self.last.is_none_or(|(_, with)| with != adjust);
        let instructions = cpu.state.instructions;
        let kvm_now = msrs::read_one(vcpu, msr::IA32_TSC)?.unwrap_or(0);
        let owner_now = cpu.bus().tsc(instructions);
        let wanted = cpu.state.tsc(owner_now);
        let ahead = wanted.wrapping_sub(kvm_now);
        let behind = kvm_now.wrapping_sub(wanted);
        let forward = (ahead as i64) > 0;
        let set_back = behind > tsc_hz.saturating_mul(SET_BACK_SECONDS);
        if self.settable && (moved || forward || set_back) {
            set(vcpu, self.exact, ahead, wanted)?;
            let off = msrs::read_one(vcpu, msr::IA32_TSC)?.unwrap_or(0).wrapping_sub(wanted);
            if off > tsc_hz {
                self.settable = false;
                log::warn!(
                    "this KVM does not let us set the guest's TSC: it is off by {:+} cycles",
                    off as i64
                );
            }
        }
        self.last = Some((Instant::now(), adjust));
        Ok(())
    }
}

/// Moves KVM's TSC `ahead`, to `wanted`.
fn set(vcpu: &VcpuFd, exact: bool, ahead: u64, wanted: u64) -> Result<(), EngineError> {
    if exact {
        let offset = ioctl::tsc_offset(vcpu).map_err(failed("reading the TSC's offset"))?;
        return ioctl::set_tsc_offset(vcpu, offset.wrapping_add(ahead))
            .map_err(failed("setting the TSC's offset"));
    }
    // KVM takes a value near its own for an attempt to synchronize vCPUs, and keeps its own.
    msrs::write_one(vcpu, msr::IA32_TSC, wanted).map(drop)
}
