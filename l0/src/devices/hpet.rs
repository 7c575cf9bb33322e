//! The high precision event timer: a 64-bit counter of 100 MHz and three comparators, each one-shot or periodic.
//!
//! With legacy replacement on, comparator 0 takes the 8254's interrupt and comparator 1 the RTC's. Those two
//! chips are wired through a [`LegacyGate`], which cuts their lines off meanwhile.
//!
//! UNSUPPORTED: FSB (message-signalled) delivery; the capability bits say so.
//!
//! Must not know: the 8254, the RTC.
//!
//! IA-PC HPET specification 1.0a.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::oscillator::{MIN_SPACING_NS, Oscillator, next_after};
use super::{Bus, BusDevice, IrqRouter};
use crate::clock::{Clock, TimerClient, TimerId};
use crate::vcpu_signal::lock;

/// Where the registers are.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// How much of the address space they take.
pub const HPET_SIZE: u64 = 0x400;
/// The counter's frequency.
pub const HPET_HZ: u64 = 100_000_000;
/// Low half of the capabilities, which the ACPI table repeats: vendor, legacy replacement, 64 bits, three
/// comparators, revision 1.
pub const HPET_BLOCK_ID: u32 = 0x8086_0000 | 1 << 15 | 1 << 13 | (COMPARATORS as u32 - 1) << 8 | 1;

const COUNTER: Oscillator = Oscillator::new(HPET_HZ);
const COMPARATORS: usize = 3;
const PERIOD_FEMTOSECONDS: u64 = 1_000_000_000_000_000 / HPET_HZ;

const CONFIG_ENABLE: u64 = 1 << 0;
const CONFIG_LEGACY: u64 = 1 << 1;

const TIMER_LEVEL: u64 = 1 << 1;
const TIMER_INTERRUPT: u64 = 1 << 2;
const TIMER_PERIODIC: u64 = 1 << 3;
const TIMER_CAN_PERIODIC: u64 = 1 << 4;
const TIMER_CAN_64: u64 = 1 << 5;
const TIMER_SET_VALUE: u64 = 1 << 6;
const TIMER_32BIT: u64 = 1 << 8;
const TIMER_ROUTE: u64 = 0x1f << 9;
const TIMER_WRITABLE: u64 =
    TIMER_LEVEL | TIMER_INTERRUPT | TIMER_PERIODIC | TIMER_SET_VALUE | TIMER_32BIT | TIMER_ROUTE;
/// I/O APIC inputs that a comparator may use: 5, 10 and 11, which no other device has. PCI's inputs would not
/// do, they are shared.
const ROUTES: u64 = 1 << 5 | 1 << 10 | 1 << 11;

/// Lets a chip's interrupts through unless the HPET has taken its place.
pub struct LegacyGate {
    router: Arc<dyn IrqRouter>,
    replaced: AtomicBool,
}

impl LegacyGate {
    /// A gate in front of `router`, for the lines of the 8254 and the RTC.
    pub fn new(router: Arc<dyn IrqRouter>) -> Arc<Self> {
        Arc::new(Self { router, replaced: AtomicBool::new(false) })
    }
}

impl IrqRouter for LegacyGate {
    fn set_irq(&self, gsi: u32, level: bool) {
        if !self.replaced.load(Ordering::SeqCst) {
            self.router.set_irq(gsi, level);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Comparator {
    config: u64,
    /// Next match.
    value: u64,
    period: u64,
    /// Counter value up to which matches have been told.
    seen: u64,
    /// The line it holds high, if any.
    asserted: Option<u32>,
    last_interrupt: u64,
}

impl Comparator {
    fn new() -> Self {
        Self {
            config: TIMER_CAN_PERIODIC | TIMER_CAN_64 | ROUTES << 32,
            value: u64::MAX,
            period: 0,
            seen: 0,
            asserted: None,
            last_interrupt: 0,
        }
    }

    fn mask(&self) -> u64 {
        if self.config & TIMER_32BIT != 0 { 0xffff_ffff } else { u64::MAX }
    }

    fn is_periodic(&self) -> bool {
        self.config & TIMER_PERIODIC != 0
    }

    /// Ticks from counter value `from` (exclusive) to the next match.
    fn distance(&self, from: u64) -> u64 {
        let mask = self.mask();
        match self.value.wrapping_sub(from) & mask {
            // One whole turn of the counter.
            0 => mask.saturating_add(1),
            ticks => ticks,
        }
    }

    /// True if there was a match since the last look, up to counter value `counter`. A periodic comparator moves
    /// on to its first match after `counter`.
    fn look(&mut self, counter: u64) -> bool {
        let passed = counter.wrapping_sub(self.seen);
        let due = self.distance(self.seen);
        self.seen = counter;
        if passed < due {
            return false;
        }
        if self.is_periodic() && self.period != 0 {
            let beyond = passed - due;
            let steps = next_after(0, self.period, beyond);
            self.value = self.value.wrapping_add(steps) & self.mask();
        }
        true
    }

    fn will_match_again(&self) -> bool {
        !self.is_periodic() || self.period != 0
    }
}

/// The timer block.
pub struct Hpet {
    config: u64,
    status: u64,
    /// What the counter shows at guest time zero while it runs, or all the time while it is halted.
    counter_base: u64,
    comparators: [Comparator; COMPARATORS],
    clock: Arc<Clock>,
    timer: TimerId,
    router: Arc<dyn IrqRouter>,
    gate: Arc<LegacyGate>,
}

impl Hpet {
    /// A timer block whose interrupts go to the router behind `gate`.
    pub fn new(clock: Arc<Clock>, gate: Arc<LegacyGate>) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            Mutex::new(Self {
                config: 0,
                status: 0,
                counter_base: 0,
                comparators: [Comparator::new(); COMPARATORS],
                timer: clock.add_timer(weak.clone()),
                clock,
                router: Arc::clone(&gate.router),
                gate,
            })
        })
    }

    /// Puts the registers on the bus; false if their place is taken.
    pub fn attach(hpet: &Arc<Mutex<Self>>, mmio: &Bus) -> bool {
        mmio.insert(HPET_BASE, HPET_SIZE, hpet.clone())
    }

    /// Back to the state after power-up.
    pub fn reset(&mut self) {
        for index in 0..COMPARATORS {
            self.lower(index);
        }
        self.config = 0;
        self.status = 0;
        self.counter_base = 0;
        self.comparators = [Comparator::new(); COMPARATORS];
        self.gate.replaced.store(false, Ordering::SeqCst);
        self.arm();
    }

    fn enabled(&self) -> bool {
        self.config & CONFIG_ENABLE != 0
    }

    fn counter(&self) -> u64 {
        match self.enabled() {
            true => self.counter_base.wrapping_add(COUNTER.ticks_at(self.clock.now_ns())),
            false => self.counter_base,
        }
    }

    /// Makes the counter show `value` now.
    fn set_counter(&mut self, value: u64) {
        self.counter_base = match self.enabled() {
            true => value.wrapping_sub(COUNTER.ticks_at(self.clock.now_ns())),
            false => value,
        };
        for comparator in &mut self.comparators {
            comparator.seen = value;
        }
    }

    /// The interrupt input that a comparator drives, and whether as a level.
    fn route(&self, index: usize) -> (u32, bool) {
        let config = self.comparators[index].config;
        match (self.config & CONFIG_LEGACY != 0, index) {
            (true, 0) => (0, false),
            (true, 1) => (8, false),
            _ => (((config & TIMER_ROUTE) >> 9) as u32, config & TIMER_LEVEL != 0),
        }
    }

    fn lower(&mut self, index: usize) {
        if let Some(gsi) = self.comparators[index].asserted.take() {
            self.router.set_irq(gsi, false);
        }
    }

    /// Drives the line of a level-triggered comparator as its status and configuration say.
    fn drive_level(&mut self, index: usize) {
        let (gsi, level) = self.route(index);
        let enabled = self.comparators[index].config & TIMER_INTERRUPT != 0;
        let wanted = (level && enabled && self.status & 1 << index != 0 && self.routable(gsi)).then_some(gsi);
        if self.comparators[index].asserted != wanted {
            self.lower(index);
            self.comparators[index].asserted = wanted;
            if let Some(gsi) = wanted {
                self.router.set_irq(gsi, true);
            }
        }
    }

    /// A route the comparator is not wired to leads nowhere.
    fn routable(&self, gsi: u32) -> bool {
        gsi < 32 && ROUTES & 1 << gsi != 0
    }

    fn matched(&mut self, index: usize, now: u64) {
        let (gsi, level) = self.route(index);
        let comparator = &mut self.comparators[index];
        comparator.last_interrupt = now;
        if level {
            // The status bit is set whether or not the interrupt is enabled.
            self.status |= 1 << index;
            self.drive_level(index);
        } else if comparator.config & TIMER_INTERRUPT != 0 {
            let legacy = self.config & CONFIG_LEGACY != 0 && index < 2;
            if legacy || self.routable(gsi) {
                self.router.set_irq(gsi, true);
                self.router.set_irq(gsi, false);
            }
        }
    }

    /// Tells the matches up to now.
    fn catch_up(&mut self) {
        if !self.enabled() {
            return;
        }
        let now = self.clock.now_ns();
        let counter = self.counter();
        for index in 0..COMPARATORS {
            if self.comparators[index].look(counter) {
                self.matched(index, now);
            }
        }
    }

    /// Arms the clock for the next match that someone will see.
    fn arm(&mut self) {
        let base = self.counter_base;
        let next = self
            .comparators
            .iter()
            .filter(|comparator| comparator.config & TIMER_INTERRUPT != 0 && comparator.will_match_again())
            .map(|comparator| {
                let ticks =
                    comparator.seen.wrapping_sub(base).saturating_add(comparator.distance(comparator.seen));
                let due = COUNTER.ns_at(ticks);
                match comparator.is_periodic() {
                    true => due.max(comparator.last_interrupt.saturating_add(MIN_SPACING_NS)),
                    false => due,
                }
            })
            .min();
        match next {
            Some(due) if self.enabled() => self.clock.arm(self.timer, due),
            _ => self.clock.disarm(self.timer),
        }
    }

    fn read_register(&mut self, offset: u64) -> u64 {
        match offset {
            0x00 => PERIOD_FEMTOSECONDS << 32 | u64::from(HPET_BLOCK_ID),
            0x10 => self.config,
            0x20 => {
                self.catch_up();
                self.arm();
                self.status
            }
            0xf0 => self.counter(),
            0x100..=0x15f => {
                let index = (offset - 0x100) as usize / 0x20;
                match offset & 0x18 {
                    0x00 => self.comparators[index].config,
                    0x08 => {
                        self.catch_up();
                        self.arm();
                        self.comparators[index].value
                    }
                    // The FSB route register is not there.
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes the bits of `mask` of a register.
    fn write_register(&mut self, offset: u64, value: u64, mask: u64) {
        self.catch_up();
        match offset {
            0x10 => self.write_config((self.config & !mask) | (value & mask)),
            0x20 => {
                self.status &= !(value & mask);
                for index in 0..COMPARATORS {
                    self.drive_level(index);
                }
            }
            0xf0 => {
                let counter = self.counter();
                self.set_counter((counter & !mask) | (value & mask));
            }
            0x100..=0x15f => {
                let index = (offset - 0x100) as usize / 0x20;
                match offset & 0x18 {
                    0x00 => self.write_timer_config(index, value, mask),
                    0x08 => self.write_comparator(index, value, mask),
                    _ => {}
                }
            }
            _ => {}
        }
        self.arm();
    }

    fn write_config(&mut self, value: u64) {
        let counter = self.counter();
        self.config = value & (CONFIG_ENABLE | CONFIG_LEGACY);
        self.set_counter(counter);
        self.gate.replaced.store(self.config & CONFIG_LEGACY != 0, Ordering::SeqCst);
        for index in 0..COMPARATORS {
            self.drive_level(index);
        }
    }

    fn write_timer_config(&mut self, index: usize, value: u64, mask: u64) {
        let comparator = &mut self.comparators[index];
        let bits = TIMER_WRITABLE & mask;
        comparator.config = (comparator.config & !bits) | (value & bits);
        comparator.value &= comparator.mask();
        comparator.period &= comparator.mask();
        if comparator.config & TIMER_LEVEL == 0 {
            self.status &= !(1 << index);
        }
        self.drive_level(index);
    }

    /// In periodic mode a write sets the period; with TIMER_SET_VALUE it also sets the next match, and the bit
    /// clears itself.
    fn write_comparator(&mut self, index: usize, value: u64, mask: u64) {
        let counter = self.counter();
        let comparator = &mut self.comparators[index];
        let merge = |old: u64| ((old & !mask) | (value & mask)) & comparator.mask();
        let (next, period) = (merge(comparator.value), merge(comparator.period));
        let periodic = comparator.is_periodic();
        if !periodic || comparator.config & TIMER_SET_VALUE != 0 {
            comparator.value = next;
            comparator.seen = counter;
        }
        if periodic {
            comparator.period = period;
            // Written in two halves, the bit holds until the upper one.
            if mask >> 32 != 0 || comparator.mask() >> 32 == 0 {
                comparator.config &= !TIMER_SET_VALUE;
            }
        }
    }
}

impl TimerClient for Mutex<Hpet> {
    fn fire(&self, _now_ns: u64) {
        let mut hpet = lock(self);
        hpet.catch_up();
        hpet.arm();
    }
}

impl BusDevice for Hpet {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (data.len(), offset & 7) {
            (8, 0) => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            (4, 0) => data.copy_from_slice(&(self.read_register(offset) as u32).to_le_bytes()),
            (4, 4) => data.copy_from_slice(&((self.read_register(offset - 4) >> 32) as u32).to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(bytes) = <[u8; 8]>::try_from(data) {
            if offset & 7 == 0 {
                self.write_register(offset, u64::from_le_bytes(bytes), u64::MAX);
            }
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            let value = u64::from(u32::from_le_bytes(bytes));
            match offset & 7 {
                0 => self.write_register(offset, value, 0xffff_ffff),
                4 => self.write_register(offset - 4, value << 32, 0xffff_ffff << 32),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ClockSource;
    use crate::devices::IrqLine;
    use crate::devices::test_bench::{Probe, run_to};

    struct Bench {
        clock: Arc<Clock>,
        probe: Arc<Probe>,
        gate: Arc<LegacyGate>,
        hpet: Arc<Mutex<Hpet>>,
    }

    fn bench() -> Bench {
        let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
        let probe = Arc::new(Probe::default());
        let gate = LegacyGate::new(probe.clone());
        let hpet = Hpet::new(clock.clone(), gate.clone());
        Bench { clock, probe, gate, hpet }
    }

    impl Bench {
        fn read(&self, offset: u64) -> u64 {
            let mut data = [0; 8];
            lock(&self.hpet).read(offset, &mut data);
            u64::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u64) {
            lock(&self.hpet).write(offset, &value.to_le_bytes());
        }
    }

    const US: u64 = 1000;

    #[test]
    fn capabilities() {
        let bench = bench();
        assert_eq!(bench.read(0), 10_000_000 << 32 | 0x8086_a201);
        let mut data = [0; 4];
        lock(&bench.hpet).read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 10_000_000);
        assert_eq!(bench.read(0x100), 0x0000_0c20_0000_0030);
    }

    #[test]
    fn counter_runs_only_while_enabled() {
        let bench = bench();
        run_to(&bench.clock, 1000 * US);
        assert_eq!(bench.read(0xf0), 0);
        bench.write(0xf0, 5000);
        bench.write(0x10, 1);
        run_to(&bench.clock, 1010 * US);
        assert_eq!(bench.read(0xf0), 6000);
        bench.write(0x10, 0);
        run_to(&bench.clock, 2000 * US);
        assert_eq!(bench.read(0xf0), 6000);
        lock(&bench.hpet).write(0xf4, &1u32.to_le_bytes());
        assert_eq!(bench.read(0xf0), 1 << 32 | 6000);
    }

    #[test]
    fn one_shot_edge_fires_at_its_match_once() {
        let bench = bench();
        bench.write(0x10, 1);
        bench.write(0x100, 10 << 9 | 4);
        bench.write(0x108, 10_000);
        run_to(&bench.clock, 100 * US - 1);
        assert_eq!(bench.probe.rises(10), 0);
        run_to(&bench.clock, 10_000 * US);
        assert_eq!(bench.probe.rises(10), 1);
        assert_eq!(bench.read(0x20), 0, "edge-triggered: no status");
        bench.write(0x108, 5);
        run_to(&bench.clock, 20_000 * US);
        assert_eq!(bench.probe.rises(10), 1, "a match in the past is a turn of the counter away");
    }

    #[test]
    fn level_holds_its_line_until_the_status_is_cleared() {
        let bench = bench();
        bench.write(0x10, 1);
        bench.write(0x120, 11 << 9 | 6);
        bench.write(0x128, 1000);
        run_to(&bench.clock, 10 * US);
        assert!(bench.probe.level(11));
        assert_eq!(bench.read(0x20), 2);
        bench.write(0x20, 1);
        assert!(bench.probe.level(11));
        bench.write(0x20, 2);
        assert!(!bench.probe.level(11));
    }

    #[test]
    fn periodic_as_linux_sets_it_up_and_without_drowning() {
        let bench = bench();
        bench.write(0x10, 1);
        bench.write(0x100, 5 << 9 | 0x4c);
        bench.write(0x108, 100_000);
        bench.write(0x108, 50_000);
        run_to(&bench.clock, 999 * US);
        assert_eq!(bench.probe.rises(5), 0);
        run_to(&bench.clock, 1000 * US);
        assert_eq!(bench.probe.rises(5), 1);
        run_to(&bench.clock, 2000 * US);
        assert_eq!(bench.probe.rises(5), 3);
        assert_eq!(bench.read(0x108), 250_000);
        bench.clock.advance_to(10_100 * US);
        bench.clock.fire_due();
        assert_eq!(bench.probe.rises(5), 4);
        assert_eq!(bench.clock.next_deadline(), Some(10_500 * US));
        // A period of one tick is thinned out.
        bench.write(0x108, 1);
        let before = bench.probe.rises(5);
        run_to(&bench.clock, 11_500 * US);
        assert!((15..=25).contains(&(bench.probe.rises(5) - before)));
    }

    #[test]
    fn narrow_comparator_wraps() {
        let bench = bench();
        bench.write(0xf0, 0xffff_ff00);
        bench.write(0x10, 1);
        bench.write(0x140, 11 << 9 | 0x104);
        bench.write(0x148, 0x1_0000_0100);
        assert_eq!(bench.read(0x148), 0x100);
        run_to(&bench.clock, 0x1ff * 10);
        assert_eq!(bench.probe.rises(11), 0);
        run_to(&bench.clock, 0x200 * 10);
        assert_eq!(bench.probe.rises(11), 1);
    }

    #[test]
    fn legacy_replacement_takes_the_old_timers_lines() {
        let bench = bench();
        let old = IrqLine::new(bench.gate.clone(), 0);
        old.pulse();
        assert_eq!(bench.probe.rises(0), 1);
        bench.write(0x100, 4);
        bench.write(0x108, 1000);
        bench.write(0x120, 4);
        bench.write(0x128, 2000);
        bench.write(0x10, 3);
        old.pulse();
        assert_eq!(bench.probe.rises(0), 1);
        run_to(&bench.clock, 100 * US);
        assert_eq!((bench.probe.rises(0), bench.probe.rises(8)), (2, 1));
        bench.write(0x10, 1);
        old.pulse();
        assert_eq!(bench.probe.rises(0), 3);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let bench = bench();
        for offset in 0..0x400u64 {
            for len in [1usize, 2, 4, 8] {
                let mut data = [0xff; 8];
                lock(&bench.hpet).write(offset, &data[..len]);
                lock(&bench.hpet).read(offset, &mut data[..len]);
            }
        }
        run_to(&bench.clock, 1_000_000);
    }
}
