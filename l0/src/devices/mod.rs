//! The PC's chips. Every device is a register file behind [`BusDevice`]; it reaches the rest of the machine only
//! through what it was built with: an [`IrqLine`], an [`MsiSink`], the [`crate::clock::Clock`], guest memory.
//!
//! Must not know: engines, vCPUs (beyond [`crate::vcpu_signal::VcpuSignal`]), nesting.

pub mod acpi_pm;
pub mod debug_exit;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod irqchip;
pub mod lapic;
pub mod oscillator;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod rtc;
#[cfg(test)]
mod test_bench;
pub mod uart;
pub mod virtio;
pub mod window;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use crate::vcpu_signal::lock;

/// A range of ports or of physical addresses that a device answers.
///
/// `offset` counts from the start of the range the access fell in. Accesses are 1, 2, 4 or 8 bytes; a device
/// ignores writes and returns all ones for accesses that its datasheet does not define.
pub trait BusDevice: Send {
    /// The guest reads.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as buses hold it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// One address space: ports, or physical addresses outside RAM.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, (u64, SharedDevice)>>,
}

impl Bus {
    /// Lets `device` answer `base..base + len`; false (and no change) if the range is taken or wraps.
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> bool {
        let Some(end) = base.checked_add(len) else { return false };
        let mut ranges = self.ranges.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let taken = ranges.range(..end).next_back().is_some_and(|(&b, &(l, _))| b + l > base);
        if taken || len == 0 {
            return false;
        }
        ranges.insert(base, (len, device));
        true
    }

    /// Takes back the range that starts at `base`.
    pub fn remove(&self, base: u64) {
        self.ranges.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&base);
    }

    /// The device at `address` and the offset in its range. The bus is not locked while a device works, so a
    /// device may move its own ranges.
    fn find(&self, address: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (&base, (size, device)) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len as u64)? <= *size).then(|| (offset, Arc::clone(device)))
    }

    /// Reads; where nobody answers, all ones as on a PC. True if a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; where nobody answers, nothing happens. True if a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(&device).write(offset, data);
                true
            }
            None => false,
        }
    }
}

/// Routes interrupt inputs (GSIs: ISA IRQs 0 to 15, then PCI) to the interrupt controllers.
pub trait IrqRouter: Send + Sync {
    /// Sets the level of input `gsi`. An edge-triggered input is pulsed by setting it high and low again.
    fn set_irq(&self, gsi: u32, level: bool);
}

/// One interrupt output of a device, wired to an input of the interrupt controllers.
#[derive(Clone)]
pub struct IrqLine {
    router: Arc<dyn IrqRouter>,
    gsi: u32,
}

impl IrqLine {
    /// Wires a line to input `gsi`.
    pub fn new(router: Arc<dyn IrqRouter>, gsi: u32) -> Self {
        Self { router, gsi }
    }

    /// Drives the line.
    pub fn set(&self, level: bool) {
        self.router.set_irq(self.gsi, level);
    }

    /// A short pulse, for edge-triggered inputs.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// Takes message-signalled interrupts: a write of `data` to `address` in 0xFEEx_xxxx.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn send(&self, address: u64, data: u32);
}

/// What a device may ask of the machine as a whole.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MachineEvent {
    /// ACPI S5: the run ends with exit code 0.
    PowerOff,
    /// Reset (i8042, port CF9, ACPI reset register, triple fault).
    Reset,
    /// isa-debug-exit: the run ends with this exit code.
    DebugExit(u8),
    /// The person at the console asked to leave (Ctrl-A x).
    Quit,
}

/// Takes such requests; called from device code, so it only records and wakes.
pub trait MachineControl: Send + Sync {
    /// Records the request and stops the vCPUs.
    fn request(&self, event: MachineEvent);

    /// Ends the run because of the host; `why` is for the person who runs us, with what to do about it.
    fn fail(&self, why: String) {
        log::error!("{why}");
        self.request(MachineEvent::Quit);
    }
}
