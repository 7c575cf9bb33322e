//! Lets one chip answer several ranges of a bus.
//!
//! The bus tells a device only the offset in the range that was hit, so each further range of a chip gets a
//! [`Window`] of its own. Chips with byte-wide registers use [`read_bytes`] and [`write_bytes`]: the PC's bus
//! splits a wider access into byte accesses to consecutive ports.
//!
//! Must not know: any chip.

use std::sync::{Arc, Mutex};

use super::{BusDevice, SharedDevice};
use crate::vcpu_signal::lock;

/// A range of a chip that is shared with other ranges.
pub struct Window<C> {
    chip: Arc<C>,
    read: fn(&C, u64, &mut [u8]),
    write: fn(&C, u64, &[u8]),
}

impl<C: Send + Sync + 'static> Window<C> {
    /// A range of `chip`, answered by `read` and `write`, ready for a bus.
    pub fn shared(chip: &Arc<C>, read: fn(&C, u64, &mut [u8]), write: fn(&C, u64, &[u8])) -> SharedDevice {
        Arc::new(Mutex::new(Self { chip: Arc::clone(chip), read, write }))
    }
}

impl<C: Send + Sync> BusDevice for Window<C> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        (self.read)(&self.chip, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        (self.write)(&self.chip, offset, data);
    }
}

/// Reads consecutive byte registers.
pub fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (at, byte) in (offset..).zip(data) {
        *byte = read(at);
    }
}

/// Writes consecutive byte registers.
pub fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (at, &byte) in (offset..).zip(data) {
        write(at, byte);
    }
}

/// Reads consecutive byte registers of a chip behind its lock.
pub fn read_locked<C>(chip: &Mutex<C>, offset: u64, data: &mut [u8], read: fn(&mut C, u64) -> u8) {
    let mut chip = lock(chip);
    read_bytes(offset, data, |at| read(&mut chip, at));
}

/// Writes consecutive byte registers of a chip behind its lock.
pub fn write_locked<C>(chip: &Mutex<C>, offset: u64, data: &[u8], write: fn(&mut C, u64, u8)) {
    let mut chip = lock(chip);
    write_bytes(offset, data, |at, byte| write(&mut chip, at, byte));
}
