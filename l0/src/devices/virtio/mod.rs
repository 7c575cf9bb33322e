//! Virtio 1.x devices on PCI: block, net, console, entropy and memory balloon.
//!
//! Three layers. A *device* ([`VirtioDevice`]) turns descriptor chains into work on the host. The *runner*
//! decides on which thread that happens and keeps the device, its queues and its state together. The
//! *transport* ([`VirtioPci`]) is the register file a driver sees.
//!
//! Invariants:
//! - Devices reach guest memory only through [`Dma`], so every byte they write is shown to the [`DmaObserver`]
//!   (the software CPU's search for modified code) before the driver learns that the buffer is used.
//! - A queue the driver broke (its index jumped, a chain loops, a table lies outside of RAM) sets
//!   DEVICE_NEEDS_RESET and stops the device until the driver resets it. A request that is well-formed as a
//!   chain but nonsense to the device fails alone.
//! - Nothing is allocated by a length the guest gave, beyond the [`MAX_SEGMENTS`] segments of one chain.
//!
//! UNSUPPORTED: packed rings, legacy and transitional drivers, per-queue reset.
//!
//! Must not know: which engine runs the driver, and nesting.

mod balloon;
mod block;
mod console;
mod dma;
mod interrupts;
mod net;
mod queue;
mod rng;
mod runner;
mod tap;
#[cfg(test)]
mod test_driver;
mod transport;
#[cfg(test)]
mod transport_tests;

use std::os::fd::RawFd;
use std::sync::Arc;

pub use balloon::{Balloon, BalloonHandle};
pub use block::{Access, Block, BlockError};
pub use console::{Console, ConsoleInput};
pub use dma::{Dma, DmaError, Segment, Segments};
pub use net::Net;
pub use queue::{Chain, MAX_SEGMENTS, QueueError, VirtQueue};
pub use rng::{Rng, RngSource};
pub use runner::Waker;
pub use tap::{Tap, TapError};
pub use transport::VirtioPci;

/// Which thread a device works on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Processing {
    /// Its own: a slow disk does not stop the vCPU.
    Thread,
    /// The vCPU's, inside the write that notifies: a run on `--clock virtual` repeats exactly. Input from the
    /// host still arrives when it arrives.
    Inline,
}

/// Is told which guest memory devices change.
pub trait DmaObserver: Send + Sync {
    /// A device wrote (or discarded) `len` bytes from guest-physical `gpa`.
    fn wrote(&self, gpa: u64, len: u64);
}

/// For machines whose engine needs no telling (KVM).
pub struct Unobserved;

impl DmaObserver for Unobserved {
    fn wrote(&self, _gpa: u64, _len: u64) {}
}

/// Device types, as the specification numbers them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Traditional memory balloon.
    Balloon = 5,
}

/// A device's configuration registers. Apart from the device itself, so that a vCPU reading a register does not
/// wait for a disk.
pub trait DeviceConfig: Send + Sync {
    /// The driver reads. Bytes that do not exist are zero.
    fn read(&self, offset: usize, data: &mut [u8]);
    /// The driver writes. Read-only registers ignore it.
    fn write(&self, _offset: usize, _data: &[u8]) {}
}

/// Copies what `data` asks for out of `registers`; zero behind the end.
fn read_registers(registers: &[u8], offset: usize, data: &mut [u8]) {
    let registers = registers.get(offset..).unwrap_or_default();
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = registers.get(i).copied().unwrap_or(0);
    }
}

/// Registers that never change.
struct FixedConfig<const N: usize>(pub [u8; N]);

impl<const N: usize> DeviceConfig for FixedConfig<N> {
    fn read(&self, offset: usize, data: &mut [u8]) {
        read_registers(&self.0, offset, data);
    }
}

/// What a device does, without how a driver reaches it.
pub trait VirtioDevice: Send {
    /// Its type.
    fn device_type(&self) -> DeviceType;
    /// Feature bits it offers beyond those of the transport and the rings.
    fn features(&self) -> u64;
    /// The largest size of each queue; powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration registers.
    fn config(&self) -> Arc<dyn DeviceConfig>;
    /// Gets the means to ask for attention from outside (input arrived, a register changed).
    fn connect(&mut self, _waker: Waker) {}
    /// The driver is ready and has agreed to `features`.
    fn activate(&mut self, _features: u64) {}
    /// Works off `queue`, which is queue number `index`.
    fn process(&mut self, index: usize, queue: &mut VirtQueue) -> Result<(), QueueError>;
    /// A descriptor of the host, and the queue to process when it becomes readable.
    fn host_input(&self) -> Option<(RawFd, usize)> {
        None
    }
    /// Whether input could be used now.
    fn wants_host_input(&self) -> bool {
        true
    }
    /// The driver reset the device.
    fn reset(&mut self) {}
}

/// The value of feature bit number `bit`.
const fn feature(bit: u32) -> u64 {
    1 << bit
}
