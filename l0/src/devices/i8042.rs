//! The keyboard controller, with no keyboard on it.
//!
//! Guests probe it (Linux: flush, self test, command byte), some reset the machine through it. It answers as
//! a controller with an empty keyboard port and no auxiliary port: what is sent to the keyboard times out, and
//! the timeout comes back at once rather than after milliseconds.
//!
//! Must not know: keyboards.

use std::sync::{Arc, Mutex};

use super::window::{Window, read_bytes, write_bytes};
use super::{Bus, IrqLine, MachineControl, MachineEvent};
use crate::vcpu_signal::lock;

/// Data port.
pub const DATA_PORT: u64 = 0x60;
/// Command and status port.
pub const COMMAND_PORT: u64 = 0x64;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_TIMEOUT: u8 = 1 << 6;

const COMMAND_BYTE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const COMMAND_BYTE_SYSTEM: u8 = 1 << 2;
const COMMAND_BYTE_KEYBOARD_DISABLED: u8 = 1 << 4;
const COMMAND_BYTE_AUX_DISABLED: u8 = 1 << 5;

/// Output port: A20 gate open, system reset not asserted, lines to the keyboard idle.
const OUTPUT_PORT: u8 = 0xcf;
const OUTPUT_NOT_RESET: u8 = 1 << 0;

/// What a device that does not answer leaves in the output buffer, with the status's timeout bit.
const NO_ANSWER: u8 = 0xfe;

/// Who gets the next byte written to the data port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum DataTarget {
    Keyboard,
    Aux,
    Ram(u8),
    OutputPort,
    OutputBuffer,
}

#[derive(Debug)]
struct Registers {
    /// The controller's RAM; byte 0 is the command byte.
    ram: [u8; 32],
    output: Option<u8>,
    last_output: u8,
    timeout: bool,
    last_write_was_command: bool,
    data_target: DataTarget,
    output_port: u8,
}

impl Default for Registers {
    fn default() -> Self {
        let mut ram = [0; 32];
        ram[0] = COMMAND_BYTE_SYSTEM | COMMAND_BYTE_KEYBOARD_DISABLED | COMMAND_BYTE_AUX_DISABLED;
        Self {
            ram,
            output: None,
            last_output: 0,
            timeout: false,
            last_write_was_command: false,
            data_target: DataTarget::Keyboard,
            output_port: OUTPUT_PORT,
        }
    }
}

/// The controller.
pub struct I8042 {
    registers: Registers,
    irq: IrqLine,
    machine: Arc<dyn MachineControl>,
}

impl I8042 {
    /// A controller whose keyboard interrupt is `irq` and whose reset output resets `machine`.
    pub fn new(irq: IrqLine, machine: Arc<dyn MachineControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { registers: Registers::default(), irq, machine }))
    }

    /// Puts both ports on the bus; false if one is taken.
    pub fn attach(chip: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        let data = Window::shared(
            chip,
            |chip, at, data| read_bytes(at, data, |_| lock(chip).read_data()),
            |chip, at, data| write_bytes(at, data, |_, byte| lock(chip).write_data(byte)),
        );
        let command = Window::shared(
            chip,
            |chip, at, data| read_bytes(at, data, |_| lock(chip).read_status()),
            |chip, at, data| write_bytes(at, data, |_, byte| lock(chip).write_command(byte)),
        );
        ports.insert(DATA_PORT, 1, data) && ports.insert(COMMAND_PORT, 1, command)
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.registers = Registers::default();
        self.drive();
    }

    fn drive(&self) {
        let registers = &self.registers;
        let enabled = registers.ram[0] & COMMAND_BYTE_KEYBOARD_INTERRUPT != 0;
        self.irq.set(enabled && registers.output.is_some());
    }

    fn respond(&mut self, value: u8) {
        self.registers.output = Some(value);
        self.registers.timeout = false;
    }

    fn time_out(&mut self) {
        self.registers.output = Some(NO_ANSWER);
        self.registers.timeout = true;
    }

    fn read_data(&mut self) -> u8 {
        let registers = &mut self.registers;
        if let Some(value) = registers.output.take() {
            registers.last_output = value;
        }
        registers.timeout = false;
        let value = registers.last_output;
        self.drive();
        value
    }

    fn read_status(&self) -> u8 {
        let registers = &self.registers;
        let mut status = STATUS_UNLOCKED;
        if registers.ram[0] & COMMAND_BYTE_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if registers.output.is_some() {
            status |= STATUS_OUTPUT_FULL;
        }
        if registers.last_write_was_command {
            status |= STATUS_COMMAND;
        }
        if registers.timeout {
            status |= STATUS_TIMEOUT;
        }
        status
    }

    fn write_data(&mut self, value: u8) {
        self.registers.last_write_was_command = false;
        match std::mem::replace(&mut self.registers.data_target, DataTarget::Keyboard) {
            // Sending to the keyboard enables its port.
            DataTarget::Keyboard => {
                self.registers.ram[0] &= !COMMAND_BYTE_KEYBOARD_DISABLED;
                self.time_out();
            }
            DataTarget::Aux => self.time_out(),
            DataTarget::Ram(at) => self.registers.ram[usize::from(at & 31)] = value,
            DataTarget::OutputPort => self.write_output_port(value),
            DataTarget::OutputBuffer => self.respond(value),
        }
        self.drive();
    }

    // UNSUPPORTED: the A20 gate. A20 is always on; the bit only reads back.
    fn write_output_port(&mut self, value: u8) {
        self.registers.output_port = value | OUTPUT_NOT_RESET;
        if value & OUTPUT_NOT_RESET == 0 {
            self.machine.request(MachineEvent::Reset);
        }
    }

    fn write_command(&mut self, command: u8) {
        self.registers.last_write_was_command = true;
        self.registers.data_target = DataTarget::Keyboard;
        match command {
            0x20..=0x3f => self.respond(self.registers.ram[usize::from(command & 31)]),
            0x60..=0x7f => self.registers.data_target = DataTarget::Ram(command & 31),
            0xa7 => self.registers.ram[0] |= COMMAND_BYTE_AUX_DISABLED,
            0xa8 => self.registers.ram[0] &= !COMMAND_BYTE_AUX_DISABLED,
            // Test of the auxiliary port: its clock line is stuck low, for there is none.
            0xa9 => self.respond(0x01),
            // Self test passed.
            0xaa => {
                self.registers.ram[0] |= COMMAND_BYTE_SYSTEM;
                self.respond(0x55);
            }
            // Test of the keyboard port: no error.
            0xab => self.respond(0x00),
            0xad => self.registers.ram[0] |= COMMAND_BYTE_KEYBOARD_DISABLED,
            0xae => self.registers.ram[0] &= !COMMAND_BYTE_KEYBOARD_DISABLED,
            // Input port: keyboard not locked.
            0xc0 => self.respond(0x80),
            0xd0 => self.respond(self.registers.output_port),
            0xd1 => self.registers.data_target = DataTarget::OutputPort,
            // Without an auxiliary port the loop commands are the same: no auxiliary bit in the status.
            0xd2 | 0xd3 => self.registers.data_target = DataTarget::OutputBuffer,
            0xd4 => self.registers.data_target = DataTarget::Aux,
            0xdd => self.registers.output_port &= !2,
            0xdf => self.registers.output_port |= 2,
            // Test inputs: clock and data of the keyboard are high.
            0xe0 => self.respond(0x03),
            // Pulse the outputs whose bits are zero; output 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => self.machine.request(MachineEvent::Reset),
            _ => {}
        }
        self.drive();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_bench::Probe;

    fn machine() -> (Bus, Arc<Probe>) {
        let probe = Arc::new(Probe::default());
        let ports = Bus::default();
        let chip = I8042::new(IrqLine::new(probe.clone(), 1), probe.clone());
        assert!(I8042::attach(&chip, &ports));
        (ports, probe)
    }

    fn inb(ports: &Bus, port: u64) -> u8 {
        let mut data = [0];
        assert!(ports.read(port, &mut data));
        data[0]
    }

    #[test]
    fn self_test_passes_and_sets_the_system_flag() {
        let (ports, _) = machine();
        ports.write(0x64, &[0xaa]);
        assert_eq!(inb(&ports, 0x64) & 0x0d, 0x0d, "output full, system flag, last write a command");
        assert_eq!(inb(&ports, 0x60), 0x55);
        assert_eq!(inb(&ports, 0x64) & 1, 0);
        assert_eq!(inb(&ports, 0x60), 0x55, "the buffer keeps its last byte");
    }

    #[test]
    fn command_byte_reads_back() {
        let (ports, _) = machine();
        ports.write(0x64, &[0x60]);
        ports.write(0x60, &[0x74]);
        ports.write(0x64, &[0x20]);
        assert_eq!(inb(&ports, 0x60), 0x74);
        ports.write(0x64, &[0xae]);
        ports.write(0x64, &[0x20]);
        assert_eq!(inb(&ports, 0x60), 0x64);
    }

    #[test]
    fn absent_keyboard_times_out_with_interrupt() {
        let (ports, probe) = machine();
        ports.write(0x64, &[0x60]);
        ports.write(0x60, &[0x05]);
        ports.write(0x60, &[0xf2]);
        assert!(probe.level(1));
        assert_eq!(inb(&ports, 0x64) & 0x41, 0x41);
        assert_eq!(inb(&ports, 0x60), 0xfe);
        assert!(!probe.level(1));
        assert_eq!(inb(&ports, 0x64) & 0x41, 0);
    }

    #[test]
    fn there_is_no_auxiliary_port() {
        let (ports, _) = machine();
        ports.write(0x64, &[0xd3]);
        ports.write(0x60, &[0x5a]);
        assert_eq!(inb(&ports, 0x64) & 0x21, 0x01);
        assert_eq!(inb(&ports, 0x60), 0x5a);
        ports.write(0x64, &[0xa9]);
        assert_ne!(inb(&ports, 0x60), 0);
    }

    #[test]
    fn reset_by_pulse_and_by_output_port() {
        let (ports, probe) = machine();
        ports.write(0x64, &[0xff]);
        assert!(probe.events().is_empty());
        ports.write(0x64, &[0xfe]);
        ports.write(0x64, &[0xd1]);
        ports.write(0x60, &[0xcf]);
        assert_eq!(probe.events().len(), 1);
        ports.write(0x64, &[0xd1]);
        ports.write(0x60, &[0xce]);
        assert_eq!(probe.events(), [MachineEvent::Reset; 2]);
    }

    #[test]
    fn every_command_is_survived() {
        let (ports, _) = machine();
        for command in 0..=255 {
            ports.write(0x64, &[command]);
            ports.write(0x60, &[command ^ 0xff]);
            inb(&ports, 0x64);
            inb(&ports, 0x60);
        }
    }
}
