//! PCI: the host bridge with its two ways into configuration space, the devices behind it, and what a device
//! needs to be one (header, BARs, capabilities, MSI-X, INTx).
//!
//! One bus, bus 0, conventional PCI, one function in each slot. There is no firmware, so we do its part: every
//! BAR has an address and is decoded when the guest starts; the guest may move them.
//!
//! Lock order: the host's list of slots, then a device, then whatever that device holds inside. A bus is never
//! locked while a device works.
//!
//! Must not know: virtio, or any other kind of device.

mod config_space;
mod host;
mod intx;
mod msix;

use std::ops::Range;

pub use config_space::{BarKind, ConfigSpace, Identity, command, register};
pub use host::{PciError, PciHost};
pub use intx::intx_gsi;
pub use msix::{MSIX_ENTRY_SIZE, Msix};

/// Where ECAM (MCFG) lies: one MiB for each of 256 buses, of which only bus 0 has devices.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of ECAM.
pub const ECAM_SIZE: u64 = 256 << 20;
/// The last bus of ECAM.
pub const ECAM_LAST_BUS: u8 = 255;
/// Addresses below 4 GiB that the host bridge forwards to PCI.
pub const LOW_WINDOW: Range<u64> = 0xc000_0000..ECAM_BASE;
/// Ports that BARs may use.
pub const IO_WINDOW: Range<u64> = 0xc000..0x1_0000;
/// Slots of bus 0; slot 0 is the host bridge.
pub const SLOTS: u8 = 32;
/// The first interrupt input of PCI's INTx lines.
pub const INTX_FIRST_GSI: u32 = 16;
/// How many interrupt inputs INTx lines share.
pub const INTX_GSIS: u32 = 8;

/// One PCI function, always function 0 of its slot.
pub trait PciDevice: Send {
    /// Its configuration space.
    fn config(&mut self) -> &mut ConfigSpace;

    /// The guest reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// The guest reads `offset` of a BAR.
    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// The guest writes `offset` of a BAR.
    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}

    /// Back to the state after power-on. The host puts configuration space back itself.
    fn reset(&mut self) {}
}
