//! Engines: what executes guest instructions.
//!
//! A vCPU's home is [`turtles_cpu::Cpu`]: its plain-data `state`, and the software CPU that can always finish an
//! instruction. An engine runs that vCPU until the owner must look, with `state` valid on return. Everything that can be
//! answered while an instruction is under way (I/O, MMIO, MSRs) goes through the vCPU's [`turtles_cpu::bus::Bus`], for
//! every engine alike, so engines can be changed at any return.

pub mod kvm;

use turtles_cpu::{Cpu, Exit};

/// An engine could not go on for a reason of the host's, not the guest's.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// KVM refused or failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was being done, and what to do about it.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// There is no KVM for us.
    #[error("KVM: {0}")]
    NoKvm(#[from] kvm::OpenError),
    /// KVM stopped for a reason that we cannot go on from.
    #[error("KVM stopped with {0}")]
    KvmExit(String),
}

/// Executes a vCPU.
pub trait Engine: Send {
    /// Runs until an [`Exit`], for at most about `budget` instructions (exact where the engine can count).
    fn run(&mut self, cpu: &mut Cpu, budget: u64) -> Result<Exit, EngineError>;
    /// For messages.
    fn name(&self) -> &'static str;
    /// What happened between us and KVM, if that is the engine.
    fn kvm_stats(&self) -> Option<kvm::Stats> {
        None
    }
}

/// The software CPU as an engine.
#[derive(Default)]
pub struct Soft;

impl Engine for Soft {
    fn run(&mut self, cpu: &mut Cpu, budget: u64) -> Result<Exit, EngineError> {
        Ok(cpu.run(budget))
    }

    fn name(&self) -> &'static str {
        "soft"
    }
}
