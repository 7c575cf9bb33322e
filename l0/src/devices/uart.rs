//! The 16550A serial port.
//!
//! Output leaves at once and is collected for the sink until a line ends, enough has come together or a little
//! time has passed: one host call per byte would cost more than everything else about a console. Input
//! arrives at the speed of the line that the guest has set up and only while there is room in the receiver, so that
//! nothing pasted into a terminal is lost; what has not arrived yet waits in a bounded backlog, and
//! [`Uart::push_input`] refuses what does not fit there.
//!
//! Must not know: terminals, files; they are behind the sink.
//!
//! National Semiconductor PC16550D datasheet.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, Weak};

use super::window::{read_bytes, write_bytes};
use super::{Bus, BusDevice, IrqLine};
use crate::clock::{Clock, TimerClient, TimerId};
use crate::vcpu_signal::lock;

/// COM1's ports; eight of them.
pub const COM1_PORT: u64 = 0x3f8;
/// COM1's interrupt.
pub const COM1_IRQ: u32 = 4;

/// The chip's clock, which the divisor divides, times sixteen.
const CLOCK_HZ: u64 = 1_843_200;
const FIFO_SIZE: usize = 16;
/// Input that waits for the line, in bytes: a screenful.
const BACKLOG: usize = 4096;
/// Output is handed to the sink in pieces of at most this, in bytes: one page.
const OUTPUT_PIECE: usize = 4096;
/// Output waits at most this long in guest time; a person does not see it.
const OUTPUT_DELAY_NS: u64 = 2_000_000;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const LCR_DLAB: u8 = 1 << 7;
const LCR_PARITY: u8 = 1 << 3;
const LCR_TWO_STOP: u8 = 1 << 2;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_BREAK: u8 = 1 << 4;
const LSR_EMPTY: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;
const LSR_FIFO_ERROR: u8 = 1 << 7;
/// Errors that belong to the byte at the top of the FIFO.
const LSR_OF_BYTE: u8 = 0x1c;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// A received byte with the line status bits that came with it.
#[derive(Clone, Copy, Debug)]
struct Received {
    byte: u8,
    errors: u8,
}

#[derive(Debug)]
struct Registers {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    /// The errors of the FIFO's top byte were read, so they interrupt no more.
    errors_read: bool,
    /// The transmitter became empty and nobody was told yet.
    empty_pending: bool,
    receiver: VecDeque<Received>,
    /// When the receiver times out: four characters after the last arrival or read.
    timeout_at: Option<u64>,
    timed_out: bool,
    /// When the next byte can have come over the line.
    next_arrival: u64,
}

impl Registers {
    fn new() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0x03,
            mcr: 0,
            // The other side is there and ready.
            msr: MSR_CTS | MSR_DSR | MSR_DCD,
            scratch: 0,
            divisor: 1,
            overrun: false,
            errors_read: false,
            empty_pending: false,
            receiver: VecDeque::with_capacity(FIFO_SIZE),
            timeout_at: None,
            timed_out: false,
            next_arrival: 0,
        }
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & 1 != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO_SIZE } else { 1 }
    }

    /// How many bytes make the received-data interrupt.
    fn trigger(&self) -> usize {
        match (self.fifo_enabled(), self.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    fn character_ns(&self) -> u64 {
        let data = 5 + u64::from(self.lcr & 3);
        let bits = 2 + data + u64::from(self.lcr & LCR_PARITY != 0) + u64::from(self.lcr & LCR_TWO_STOP != 0);
        bits * 16 * u64::from(self.divisor.max(1)) * 1_000_000_000 / CLOCK_HZ
    }

    fn errors_at_top(&self) -> u8 {
        match self.receiver.front() {
            Some(received) if !self.errors_read => received.errors & LSR_OF_BYTE,
            _ => 0,
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = LSR_EMPTY | LSR_IDLE | self.errors_at_top();
        if !self.receiver.is_empty() {
            status |= LSR_DATA;
        }
        if self.overrun {
            status |= LSR_OVERRUN;
        }
        if self.fifo_enabled() && self.receiver.iter().any(|received| received.errors != 0) {
            status |= LSR_FIFO_ERROR;
        }
        status
    }

    /// The interrupt with the highest priority, as IIR's low four bits.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_LINE != 0 && (self.overrun || self.errors_at_top() != 0) {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.receiver.len() >= self.trigger() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && self.timed_out && !self.receiver.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_EMPTY != 0 && self.empty_pending {
            IIR_EMPTY
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn receive(&mut self, received: Received, now: u64) {
        if self.receiver.len() >= self.capacity() {
            self.overrun = true;
            if !self.fifo_enabled() {
                self.receiver.clear();
                self.receiver.push_back(received);
            }
            return;
        }
        if self.receiver.is_empty() {
            self.errors_read = false;
        }
        self.receiver.push_back(received);
        self.restart_timeout(now);
    }

    fn restart_timeout(&mut self, now: u64) {
        self.timed_out = false;
        let running = self.fifo_enabled() && !self.receiver.is_empty();
        self.timeout_at = running.then(|| now.saturating_add(4 * self.character_ns()));
    }

    fn take_received(&mut self, now: u64) -> u8 {
        let byte = self.receiver.pop_front().map_or(0, |received| received.byte);
        self.errors_read = false;
        self.restart_timeout(now);
        byte
    }

    fn clear_receiver(&mut self) {
        self.receiver.clear();
        self.timeout_at = None;
        self.timed_out = false;
        self.errors_read = false;
    }

    /// The modem inputs changed: the deltas record how; the ring indicator only its falling edge.
    fn set_modem_inputs(&mut self, inputs: u8) {
        let changed = (self.msr ^ inputs) & 0xf0;
        let ring_ended = changed & MSR_RI != 0 && inputs & MSR_RI == 0;
        let mut delta = (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4;
        if ring_ended {
            delta |= MSR_RI >> 4;
        }
        self.msr = inputs & 0xf0 | self.msr & 0x0f | delta;
    }

    /// In loopback the modem inputs are the modem outputs.
    fn follow_modem_control(&mut self) {
        if self.mcr & MCR_LOOP == 0 {
            return self.set_modem_inputs(MSR_CTS | MSR_DSR | MSR_DCD);
        }
        let wires = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        let inputs = wires.iter().filter(|(from, _)| self.mcr & from != 0).fold(0, |sum, (_, to)| sum | to);
        self.set_modem_inputs(inputs);
    }
}

/// The serial port.
pub struct Uart {
    registers: Registers,
    backlog: VecDeque<Received>,
    output: Vec<u8>,
    output_at: Option<u64>,
    sink: Box<dyn Write + Send>,
    room: Option<Box<dyn Fn() + Send>>,
    clock: Arc<Clock>,
    timer: TimerId,
    irq: IrqLine,
}

impl Uart {
    /// A port that writes to `sink`. What the sink refuses is lost, as on a line nobody listens to.
    pub fn new(clock: Arc<Clock>, irq: IrqLine, sink: Box<dyn Write + Send>) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = clock.add_timer(weak.clone());
            Mutex::new(Self {
                registers: Registers::new(),
                backlog: VecDeque::new(),
                output: Vec::new(),
                output_at: None,
                sink,
                room: None,
                clock,
                timer,
                irq,
            })
        })
    }

    /// Puts the port on the bus as COM1; false if its place is taken.
    pub fn attach(uart: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        ports.insert(COM1_PORT, 8, uart.clone())
    }

    /// Back to the state after power-up. Input that has not arrived yet still will.
    pub fn reset(&mut self) {
        self.flush();
        self.registers = Registers::new();
        self.update();
    }

    /// Someone types. Takes as much as there is room for and says how much that is; the rest is to be offered
    /// again, for instance when the function given to [`Self::on_room`] is called.
    pub fn push_input(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(BACKLOG.saturating_sub(self.backlog.len()));
        self.backlog.extend(input[..taken].iter().map(|&byte| Received { byte, errors: 0 }));
        self.update();
        taken
    }

    /// Someone sends a break (Linux: the magic SysRq key). False if the backlog is full.
    pub fn push_break(&mut self) -> bool {
        let room = self.backlog.len() < BACKLOG;
        if room {
            self.backlog.push_back(Received { byte: 0, errors: LSR_BREAK });
            self.update();
        }
        room
    }

    /// Calls `room` whenever the backlog has run empty after input. It is called with the port locked: it must
    /// only wake somebody.
    pub fn on_room(&mut self, room: Box<dyn Fn() + Send>) {
        self.room = Some(room);
    }

    /// Hands the sink what was collected for it.
    pub fn flush(&mut self) {
        self.output_at = None;
        if !self.output.is_empty() {
            // A sink that fails has nobody to tell: the guest's line has no such error.
            let _ = self.sink.write_all(&self.output).and_then(|()| self.sink.flush());
            self.output.clear();
        }
    }

    /// Lets time take effect, then drives the interrupt line and arms the clock.
    fn update(&mut self) {
        let now = self.clock.now_ns();
        self.pass_time(now);
        let registers = &self.registers;
        // On a PC, OUT2 connects the interrupt to its line.
        let connected = registers.mcr & MCR_OUT2 != 0;
        self.irq.set(connected && registers.interrupt() != IIR_NONE);
        let arrives = !self.backlog.is_empty() && self.can_receive();
        let arrival = arrives.then_some(registers.next_arrival.max(now + 1));
        match [arrival, registers.timeout_at, self.output_at].into_iter().flatten().min() {
            Some(at) => self.clock.arm(self.timer, at),
            None => self.clock.disarm(self.timer),
        }
    }

    fn can_receive(&self) -> bool {
        let registers = &self.registers;
        registers.mcr & MCR_LOOP == 0 && registers.receiver.len() < registers.capacity()
    }

    fn pass_time(&mut self, now: u64) {
        if self.output_at.is_some_and(|at| at <= now) {
            self.flush();
        }
        let had_input = !self.backlog.is_empty();
        let step = self.registers.character_ns().max(1);
        while self.can_receive() && self.registers.next_arrival <= now {
            let Some(received) = self.backlog.pop_front() else { break };
            let arrival = self.registers.next_arrival;
            self.registers.receive(received, now);
            // A line that was idle starts now; one that was busy has delivered while nobody looked, but at most
            // what fits the FIFO.
            let oldest = now.saturating_sub(step * FIFO_SIZE as u64);
            self.registers.next_arrival = arrival.max(oldest).saturating_add(step);
        }
        if self.backlog.is_empty() {
            self.registers.next_arrival = self.registers.next_arrival.max(now);
            if let Some(room) = self.room.as_ref().filter(|_| had_input) {
                room();
            }
        }
        if self.registers.timeout_at.is_some_and(|at| at <= now) {
            self.registers.timeout_at = None;
            self.registers.timed_out = true;
        }
    }

    fn read_register(&mut self, at: u64) -> u8 {
        let now = self.clock.now_ns();
        self.pass_time(now);
        let registers = &mut self.registers;
        let dlab = registers.lcr & LCR_DLAB != 0;
        let value = match at {
            0 if dlab => registers.divisor as u8,
            0 => registers.take_received(now),
            1 if dlab => (registers.divisor >> 8) as u8,
            1 => registers.ier,
            2 => {
                let interrupt = registers.interrupt();
                // Reading IIR acknowledges the empty transmitter if that is what it shows.
                if interrupt == IIR_EMPTY {
                    registers.empty_pending = false;
                }
                interrupt | if registers.fifo_enabled() { IIR_FIFO } else { 0 }
            }
            3 => registers.lcr,
            4 => registers.mcr,
            5 => {
                let status = registers.line_status();
                registers.overrun = false;
                registers.errors_read = true;
                status
            }
            6 => {
                let status = registers.msr;
                registers.msr &= 0xf0;
                status
            }
            7 => registers.scratch,
            _ => 0xff,
        };
        self.update();
        value
    }

    fn write_register(&mut self, at: u64, value: u8) {
        let now = self.clock.now_ns();
        self.pass_time(now);
        let registers = &mut self.registers;
        let dlab = registers.lcr & LCR_DLAB != 0;
        match at {
            0 if dlab => registers.divisor = registers.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value, now),
            1 if dlab => registers.divisor = registers.divisor & 0x00ff | u16::from(value) << 8,
            1 => {
                // Enabled while the transmitter is empty, which it always is, its interrupt comes at once.
                if value & IER_EMPTY != 0 && registers.ier & IER_EMPTY == 0 {
                    registers.empty_pending = true;
                }
                registers.ier = value & 0x0f;
            }
            2 => Self::write_fifo_control(registers, value),
            3 => registers.lcr = value,
            4 => {
                registers.mcr = value & 0x1f;
                registers.follow_modem_control();
            }
            // LSR and MSR are read-only but for factory tests.
            7 => registers.scratch = value,
            _ => {}
        }
        self.update();
    }

    fn write_fifo_control(registers: &mut Registers, value: u8) {
        // Other bits count only together with the enable bit, and a change of that one clears both FIFOs.
        let switched = (registers.fcr ^ value) & 1 != 0;
        if switched || value & 3 == 3 {
            registers.clear_receiver();
        }
        registers.fcr = if value & 1 != 0 { value & 0xc9 } else { 0 };
    }

    fn transmit(&mut self, byte: u8, now: u64) {
        let registers = &mut self.registers;
        registers.empty_pending = true;
        if registers.mcr & MCR_LOOP != 0 {
            return registers.receive(Received { byte, errors: 0 }, now);
        }
        self.output.push(byte);
        if byte == b'\n' || self.output.len() >= OUTPUT_PIECE {
            self.flush();
        } else {
            self.output_at.get_or_insert(now.saturating_add(OUTPUT_DELAY_NS));
        }
    }
}

impl Drop for Uart {
    fn drop(&mut self) {
        self.flush();
    }
}

impl TimerClient for Mutex<Uart> {
    fn fire(&self, _now_ns: u64) {
        lock(self).update();
    }
}

impl BusDevice for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |at| self.read_register(at));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |at, byte| self.write_register(at, byte));
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
