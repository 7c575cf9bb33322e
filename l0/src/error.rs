//! Everything that can go wrong before or while a guest runs, as one line that says what to do.

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::cpu_option::CpuOptionError;
use crate::devices::pci::PciError;
use crate::devices::virtio::{BlockError, TapError};
use crate::engine::EngineError;
use crate::memory::MemoryError;

/// A run that could not be started, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Wrong words on the command line.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Unknown CPU model or flag.
    #[error(transparent)]
    Cpu(#[from] CpuOptionError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The images.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] TapError),
    /// PCI slots or windows.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A console.
    #[error("cannot send the serial port's output to {what}: {source}; see --serial in turtles run --help")]
    Console {
        /// Which.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// Output of the guest could not be written.
    #[error("the guest's output is incomplete: cannot write to {what}: {source}; make room and run it again")]
    Output {
        /// Where to.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// `--trace`.
    #[error("cannot write the trace to {}: {source}; make room, or give --trace another file", .path.display())]
    Trace {
        /// Where to.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A device could not go on.
    #[error("{0}")]
    Device(String),
    /// The images need a CPU that `--cpu` does not give.
    #[error(
        "this kernel starts in 64-bit mode, which the CPU that --cpu asks for does not have: leave it its flag lm"
    )]
    NoLongMode,
    /// A thread.
    #[error("cannot start a thread: {0}; raise the limit on processes (ulimit -u)")]
    Thread(std::io::Error),
    /// Deterministic time with more than one vCPU.
    #[error("--clock virtual makes a run repeat exactly, which needs --cpus 1")]
    VirtualClockCpus,
    /// Deterministic time on KVM.
    #[error("--clock virtual counts instructions, which KVM cannot; use --engine soft")]
    VirtualClockKvm,
    /// A bug of ours.
    #[error("a vCPU thread panicked: this is a bug in turtles; the message above says where")]
    Internal,
}
