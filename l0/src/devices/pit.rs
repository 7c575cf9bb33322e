//! The 8254 timer, and port 0x61 beside it, which holds the gate and shows the output of its channel 2.
//!
//! No counter counts: each is a function of guest time and of when it was loaded. Only channel 0's next
//! interrupt is armed with the clock. Its gate and channel 1's are always high.
//!
//! Invariant: the clock is armed for channel 0's next rising output if there will be one, and never for a time
//! that has passed.
//!
//! Must not know: what the interrupt goes through.
//!
//! Intel 8254 datasheet (231164).

use std::sync::{Arc, Mutex, Weak};

use super::oscillator::{MIN_SPACING_NS, Oscillator, next_after};
use super::window::{Window, read_bytes, read_locked, write_bytes, write_locked};
use super::{Bus, BusDevice, IrqLine};
use crate::clock::{Clock, TimerClient, TimerId};
use crate::vcpu_signal::lock;

/// The counters' ports (0 to 2) and the control word's (3).
pub const PIT_PORT: u64 = 0x40;
/// System control port B.
pub const PORT_B: u64 = 0x61;
/// The counters' input.
pub const PIT_HZ: u64 = 1_193_182;

const INPUT: Oscillator = Oscillator::new(PIT_HZ);

/// DRAM refresh toggles port 0x61 bit 4 at this interval.
const REFRESH_NS: u64 = 15_085;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    /// 0: interrupt on terminal count.
    TerminalCount,
    /// 1: hardware retriggerable one-shot.
    OneShot,
    /// 2: rate generator.
    Rate,
    /// 3: square wave.
    Square,
    /// 4: software triggered strobe.
    SoftStrobe,
    /// 5: hardware triggered strobe.
    HardStrobe,
}

impl Mode {
    fn from_control(control: u8) -> Self {
        match (control >> 1) & 7 {
            0 => Self::TerminalCount,
            1 => Self::OneShot,
            2 | 6 => Self::Rate,
            3 | 7 => Self::Square,
            4 => Self::SoftStrobe,
            _ => Self::HardStrobe,
        }
    }

    fn is_periodic(self) -> bool {
        matches!(self, Self::Rate | Self::Square)
    }

    /// The count starts at a rising gate, not when it is written.
    fn needs_trigger(self) -> bool {
        matches!(self, Self::OneShot | Self::HardStrobe)
    }
}

/// Which byte of the count the next access moves, for accesses of both bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Half {
    Low,
    High,
}

/// A count in progress.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Input tick at which it was loaded; while the gate stops it, moved along so that `elapsed` stands still.
    start: u64,
    /// What it counts down from: 1 to 65536 (10000 in BCD).
    count: u64,
    /// Tick at which a low gate stopped it.
    stopped: Option<u64>,
}

impl Run {
    fn elapsed(&self, tick: u64) -> u64 {
        self.stopped.unwrap_or(tick).saturating_sub(self.start)
    }
}

#[derive(Debug)]
struct Channel {
    /// Low six bits of the control word, as status shows them.
    control: u8,
    mode: Mode,
    gate: bool,
    run: Option<Run>,
    /// A count written and not yet loaded: until the end of the period, or until the trigger.
    next: Option<u64>,
    low_byte: u8,
    write_half: Half,
    read_half: Half,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            control: 0x30,
            mode: Mode::TerminalCount,
            gate,
            run: None,
            next: None,
            low_byte: 0,
            write_half: Half::Low,
            read_half: Half::Low,
            latched: None,
            latched_status: None,
        }
    }

    fn is_bcd(&self) -> bool {
        self.control & 1 != 0
    }

    /// Where the counting element wraps.
    fn modulus(&self) -> u64 {
        if self.is_bcd() { 10_000 } else { 0x1_0000 }
    }

    /// 1 low byte, 2 high byte, 3 both.
    fn access(&self) -> u8 {
        (self.control >> 4) & 3
    }

    fn write_control(&mut self, value: u8) {
        *self = Self { control: value & 0x3f, mode: Mode::from_control(value), ..Self::new(self.gate) };
    }

    /// Loads a count that waited for the end of the present period.
    fn settle(&mut self, tick: u64) {
        if !self.mode.is_periodic() {
            return;
        }
        if let (Some(run), Some(next)) = (&mut self.run, self.next) {
            let elapsed = run.elapsed(tick);
            if elapsed >= run.count && run.stopped.is_none() {
                run.start = run.start.saturating_add(run.count);
                run.count = next;
                self.next = None;
            }
        }
    }

    fn write_count(&mut self, value: u8, tick: u64) {
        let raw = match (self.access(), self.write_half) {
            (1, _) => u16::from(value),
            (2, _) => u16::from(value) << 8,
            (_, Half::Low) => {
                self.low_byte = value;
                self.write_half = Half::High;
                // The first byte stops a terminal count.
                if self.mode == Mode::TerminalCount {
                    self.run = None;
                }
                return;
            }
            (_, Half::High) => {
                self.write_half = Half::Low;
                u16::from_le_bytes([self.low_byte, value])
            }
        };
        let count = match self.to_binary(raw) {
            0 => self.modulus(),
            count => count,
        };
        self.settle(tick);
        if self.mode.needs_trigger() || (self.mode.is_periodic() && self.run.is_some()) {
            self.next = Some(count);
        } else {
            self.load(count, tick);
        }
    }

    fn load(&mut self, count: u64, tick: u64) {
        let stopped = (!self.gate && !self.mode.needs_trigger()).then_some(tick);
        self.run = Some(Run { start: tick, count, stopped });
        self.next = None;
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        let rising = gate && !self.gate;
        self.settle(tick);
        self.gate = gate;
        match self.mode {
            Mode::OneShot | Mode::HardStrobe => {
                if let Some(count) = self.next.or(self.run.map(|run| run.count)).filter(|_| rising) {
                    // The count stays for further triggers.
                    self.load(count, tick);
                }
            }
            Mode::Rate | Mode::Square if rising => {
                if let Some(count) = self.next.or(self.run.map(|run| run.count)) {
                    self.load(count, tick);
                }
            }
            _ => {
                if let Some(run) = &mut self.run {
                    match (gate, run.stopped) {
                        (false, None) => run.stopped = Some(tick),
                        (true, Some(at)) => {
                            run.start = run.start.saturating_add(tick.saturating_sub(at));
                            run.stopped = None;
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    /// The counting element.
    fn value(&mut self, tick: u64) -> u16 {
        self.settle(tick);
        let Some(run) = self.run else { return 0 };
        let elapsed = run.elapsed(tick);
        let value = match self.mode {
            Mode::Rate => run.count - elapsed % run.count,
            // Counts by two, twice in a period; an odd count is even but for its first clock.
            Mode::Square => {
                let even = (run.count & !1).max(2);
                even - (elapsed % run.count * 2) % even
            }
            _ => {
                let modulus = self.modulus();
                (run.count + modulus - elapsed % modulus) % modulus
            }
        };
        self.to_register(value % self.modulus())
    }

    fn output(&mut self, tick: u64) -> bool {
        self.settle(tick);
        let Some(run) = self.run else { return self.mode != Mode::TerminalCount };
        let elapsed = run.elapsed(tick);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => elapsed >= run.count,
            Mode::Rate => run.stopped.is_some() || elapsed % run.count != run.count - 1,
            Mode::Square => run.stopped.is_some() || elapsed % run.count < run.count.div_ceil(2),
            Mode::SoftStrobe | Mode::HardStrobe => elapsed != run.count,
        }
    }

    /// The first tick after `tick` at which the output rises.
    fn next_rise(&mut self, tick: u64) -> Option<u64> {
        self.settle(tick);
        let run = self.run.filter(|run| run.stopped.is_none())?;
        let end = run.start.saturating_add(run.count);
        match self.mode {
            Mode::TerminalCount | Mode::OneShot => (end > tick).then_some(end),
            Mode::SoftStrobe | Mode::HardStrobe => (end >= tick).then_some(end.saturating_add(1)),
            // A count that waits takes over at the end of this period, and `settle` then finds the next.
            Mode::Rate | Mode::Square => Some(next_after(end, run.count, tick)),
        }
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(tick));
            self.read_half = Half::Low;
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            let null_count = self.run.is_none() || self.next.is_some();
            self.latched_status =
                Some(u8::from(self.output(tick)) << 7 | u8::from(null_count) << 6 | self.control);
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = match self.latched {
            Some(value) => value,
            None => self.value(tick),
        };
        let [low, high] = value.to_le_bytes();
        let (byte, done) = match (self.access(), self.read_half) {
            (1, _) => (low, true),
            (2, _) => (high, true),
            (_, Half::Low) => {
                self.read_half = Half::High;
                (low, false)
            }
            (_, Half::High) => {
                self.read_half = Half::Low;
                (high, true)
            }
        };
        if done {
            self.latched = None;
        }
        byte
    }

    fn to_binary(&self, raw: u16) -> u64 {
        let raw = u64::from(raw);
        if !self.is_bcd() {
            return raw;
        }
        (0..4).rev().fold(0, |sum, digit| sum * 10 + (raw >> (4 * digit) & 15)) % 10_000
    }

    fn to_register(&self, value: u64) -> u16 {
        if !self.is_bcd() {
            return value as u16;
        }
        (0..4u32).fold(0, |sum, digit| sum | (value / 10u64.pow(digit) % 10) << (4 * digit)) as u16
    }
}

/// The timer and port 0x61.
pub struct Pit {
    channels: [Channel; 3],
    /// Port 0x61 bits 1 to 3: speaker enable and the two parity check disables; they only read back.
    port_b: u8,
    last_interrupt: u64,
    /// When the next interrupt is to be delivered; the clock is armed for it.
    due: Option<u64>,
    clock: Arc<Clock>,
    timer: TimerId,
    irq: IrqLine,
}

impl Pit {
    /// A timer whose channel 0 drives `irq`.
    pub fn new(clock: Arc<Clock>, irq: IrqLine) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = clock.add_timer(weak.clone());
            let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
            Mutex::new(Self { channels, port_b: 0, last_interrupt: 0, due: None, clock, timer, irq })
        })
    }

    /// Puts the timer's ports and port 0x61 on the bus; false if one is taken.
    pub fn attach(pit: &Arc<Mutex<Self>>, ports: &Bus) -> bool {
        let port_b = Window::shared(
            pit,
            |pit, at, data| read_locked(pit, at, data, |pit, _| pit.read_port_b()),
            |pit, at, data| write_locked(pit, at, data, |pit, _, byte| pit.write_port_b(byte)),
        );
        ports.insert(PIT_PORT, 4, pit.clone()) && ports.insert(PORT_B, 1, port_b)
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        self.channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        self.port_b = 0;
        self.arm();
    }

    fn tick(&self) -> u64 {
        INPUT.ticks_at(self.clock.now_ns())
    }

    /// Delivers an interrupt that is due; the timer's thread may be later than the guest's next access.
    fn catch_up(&mut self) {
        let now = self.clock.now_ns();
        if self.due.take_if(|due| *due <= now).is_some() {
            self.last_interrupt = now;
            self.irq.pulse();
        }
    }

    fn arm(&mut self) {
        let tick = self.tick();
        let spaced = match self.channels[0].mode.is_periodic() {
            true => self.last_interrupt.saturating_add(MIN_SPACING_NS),
            false => 0,
        };
        self.due = self.channels[0].next_rise(tick).map(|rise| INPUT.ns_at(rise).max(spaced));
        match self.due {
            Some(due) => self.clock.arm(self.timer, due),
            None => self.clock.disarm(self.timer),
        }
    }

    fn read_port(&mut self, port: u64) -> u8 {
        let tick = self.tick();
        match self.channels.get_mut(port as usize) {
            Some(channel) => channel.read(tick),
            // The control word cannot be read.
            None => 0xff,
        }
    }

    fn write_port(&mut self, port: u64, value: u8) {
        self.catch_up();
        let tick = self.tick();
        if let Some(channel) = self.channels.get_mut(port as usize) {
            channel.write_count(value, tick);
        } else if port == 3 {
            self.write_control(value, tick);
        }
        self.arm();
    }

    fn write_control(&mut self, value: u8, tick: u64) {
        match self.channels.get_mut(usize::from(value >> 6)) {
            Some(channel) if value & 0x30 == 0 => channel.latch_count(tick),
            Some(channel) => channel.write_control(value),
            // Read-back: the select bits pick channels, the latch bits are active low.
            None => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << index == 0 {
                        continue;
                    }
                    if value & 0x20 == 0 {
                        channel.latch_count(tick);
                    }
                    if value & 0x10 == 0 {
                        channel.latch_status(tick);
                    }
                }
            }
        }
    }

    fn read_port_b(&mut self) -> u8 {
        let now = self.clock.now_ns();
        let speaker = &mut self.channels[2];
        let output = speaker.output(INPUT.ticks_at(now));
        let refresh = (now / REFRESH_NS) & 1 != 0;
        self.port_b | u8::from(speaker.gate) | u8::from(refresh) << 4 | u8::from(output) << 5
    }

    fn write_port_b(&mut self, value: u8) {
        let tick = self.tick();
        self.port_b = value & 0x0e;
        self.channels[2].set_gate(value & 1 != 0, tick);
    }
}

impl TimerClient for Mutex<Pit> {
    fn fire(&self, _now_ns: u64) {
        let mut pit = lock(self);
        pit.catch_up();
        pit.arm();
    }
}

impl BusDevice for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| self.read_port(port));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, byte| self.write_port(port, byte));
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
