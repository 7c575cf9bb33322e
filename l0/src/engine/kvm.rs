//! The KVM engine.

use std::sync::Arc;

use turtles_cpu::Cpu;

use super::{Engine, EngineError, Soft};
use crate::memory::Ram;
use crate::vcpu_signal::VcpuSignal;

/// The host's KVM.
pub struct KvmHost;

impl KvmHost {
    /// UNSUPPORTED: not there yet.
    pub fn open() -> Result<Self, EngineError> {
        Err(EngineError::KvmExit("the KVM engine is not there yet; use --engine soft".into()))
    }
}

/// A VM of the host's KVM.
pub struct KvmVm;

impl KvmVm {
    /// A VM over guest RAM.
    pub fn new(_: &KvmHost, _: &Ram) -> Result<Self, EngineError> {
        Ok(Self)
    }

    /// A vCPU's engine.
    pub fn vcpu(&self, _: usize, _: Arc<VcpuSignal>, _: &Cpu) -> Result<Soft, EngineError> {
        Ok(Soft)
    }
}

const _: fn(&Soft) -> &'static str = <Soft as Engine>::name;
