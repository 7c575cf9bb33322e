//! isa-debug-exit: a guest ends the run by writing to a port. The exit code is `(value << 1) | 1`, as QEMU's users
//! expect it, so that it is never that of a normal end.

use std::sync::{Arc, Mutex};

use super::{Bus, BusDevice, MachineControl, MachineEvent};

/// The first of four ports.
pub const DEBUG_EXIT_PORT: u64 = 0xf4;

/// The device.
pub struct DebugExit {
    machine: Arc<dyn MachineControl>,
}

impl DebugExit {
    /// A device that ends `machine`'s run.
    pub fn new(machine: Arc<dyn MachineControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { machine }))
    }

    /// Puts the ports on the bus; false if one is taken.
    pub fn attach(device: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        ports.insert(DEBUG_EXIT_PORT, 4, device.clone())
    }
}

impl BusDevice for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // A process shows the low eight bits of its exit code alone, so the lowest byte decides.
        let value = data.first().copied().unwrap_or(0);
        self.machine.request(MachineEvent::DebugExit(value.wrapping_shl(1) | 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_bench::Probe;

    #[test]
    fn exit_code_is_odd() {
        let probe = Arc::new(Probe::default());
        let device = DebugExit::new(probe.clone());
        let ports = Bus::default();
        assert!(DebugExit::attach(&device, &ports));
        ports.write(0xf4, &[0]);
        ports.write(0xf4, &0x10u32.to_le_bytes());
        ports.write(0xf7, &[0xff]);
        let codes = [1, 0x21, 0xff].map(MachineEvent::DebugExit);
        assert_eq!(probe.events(), codes);
    }
}
