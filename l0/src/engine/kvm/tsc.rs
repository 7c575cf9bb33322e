//! The guest's TSC in KVM follows its owner's clock.
//!
//! KVM's TSC is the host's plus an offset; the owner's clock is of its own. They run apart by parts in a million, so
//! the offset is set again now and then, and only ever forward: the guest must not see time go back when it moves
//! between engines.

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use turtles_cpu::Cpu;
use x86defs::msr;

use super::{ioctl, msrs};
use crate::engine::EngineError;

/// Between two corrections: at 500 parts in a million, the most the host's clock is slewed, 5 µs.
const EVERY: Duration = Duration::from_millis(10);
/// Being ahead by more than this is not drift: the guest's clock was set back.
const SET_BACK_SECONDS: u64 = 1;

/// Keeps KVM's TSC at the owner's.
pub(super) struct TscSync {
    exact: bool,
    last: Option<(Instant, u64)>,
}

impl TscSync {
    pub(super) fn new(vcpu: &VcpuFd) -> Self {
        Self { exact: ioctl::has_tsc_offset(vcpu), last: None }
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
        if moved || forward || behind > tsc_hz.saturating_mul(SET_BACK_SECONDS) {
            self.set(vcpu, ahead, wanted)?;
        }
        self.last = Some((Instant::now(), adjust));
        Ok(())
    }

    fn set(&self, vcpu: &VcpuFd, ahead: u64, wanted: u64) -> Result<(), EngineError> {
        if self.exact {
            let offset = ioctl::tsc_offset(vcpu).map_err(super::failed("reading the TSC's offset"))?;
            return ioctl::set_tsc_offset(vcpu, offset.wrapping_add(ahead))
                .map_err(super::failed("setting the TSC's offset"));
        }
        // KVM takes a value near its own for an attempt to synchronize vCPUs, and keeps its own.
        msrs::write_one(vcpu, msr::IA32_TSC, wanted).map(drop)
    }
}
