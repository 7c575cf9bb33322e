//! What the chips' tests are wired to, and a test of all of them together under a guest that does anything.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use turtles_cpu::attention::Attention;

use super::acpi_pm::{AcpiPm, TimerWidth};
use super::debug_exit::DebugExit;
use super::hpet::{HPET_BASE, HPET_SIZE, Hpet, LegacyGate};
use super::i8042::I8042;
use super::ioapic::IOAPIC_BASE;
use super::irqchip::IrqChip;
use super::pit::Pit;
use super::rtc::{Rtc, start_time};
use super::uart::Uart;
use super::{Bus, IrqLine, IrqRouter, MachineControl, MachineEvent, MsiSink};
use crate::clock::{Clock, ClockSource};
use crate::vcpu_signal::{VcpuSignal, lock};

/// Records what happens on interrupt inputs, and requests to the machine.
#[derive(Default)]
pub struct Probe {
    lines: Mutex<BTreeMap<u32, (bool, usize)>>,
    events: Mutex<Vec<MachineEvent>>,
}

impl Probe {
    /// How often input `gsi` rose.
    pub fn rises(&self, gsi: u32) -> usize {
        lock(&self.lines).get(&gsi).map_or(0, |line| line.1)
    }

    /// The level of input `gsi`.
    pub fn level(&self, gsi: u32) -> bool {
        lock(&self.lines).get(&gsi).is_some_and(|line| line.0)
    }

    /// The requests so far.
    pub fn events(&self) -> Vec<MachineEvent> {
        lock(&self.events).clone()
    }
}

impl IrqRouter for Probe {
    fn set_irq(&self, gsi: u32, level: bool) {
        let mut lines = lock(&self.lines);
        let line = lines.entry(gsi).or_default();
        line.1 += usize::from(level && !line.0);
        line.0 = level;
    }
}

impl MachineControl for Probe {
    fn request(&self, event: MachineEvent) {
        lock(&self.events).push(event);
    }
}

/// Lets virtual time pass up to `ns`, firing each timer at its time.
pub fn run_to(clock: &Clock, ns: u64) {
    while let Some(at) = clock.next_deadline().filter(|&at| at <= ns) {
        clock.advance_to(at);
        clock.fire_due();
        assert!(clock.next_deadline().is_none_or(|next| next > at), "a timer stays due");
    }
    clock.advance_to(ns);
}

/// Numbers that look random and repeat (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    /// Mostly small or with few bits: what reaches interesting states.
    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => !(1 << self.below(64)),
            _ => self.below(256),
        }
    }
}

struct Board {
    clock: Arc<Clock>,
    chip: Arc<IrqChip>,
    signals: Vec<Arc<VcpuSignal>>,
    ports: Bus,
    mmio: Bus,
    uart: Arc<Mutex<Uart>>,
    pm: Arc<Mutex<AcpiPm>>,
}

fn board() -> Board {
    let clock = Clock::new(ClockSource::Virtual, 2_100_000_000);
    let signals: Vec<_> = (0..2).map(|_| Arc::new(VcpuSignal::default())).collect();
    let chip = IrqChip::new(&clock, &signals, 46);
    let machine = Arc::new(Probe::default());
    let (ports, mmio) = (Bus::default(), Bus::default());
    let gate = LegacyGate::new(chip.clone());
    let line = |gsi| IrqLine::new(chip.clone(), gsi);
    let old_line = |gsi| IrqLine::new(gate.clone(), gsi);
    let hpet = Hpet::new(clock.clone(), gate.clone());
    let pit = Pit::new(clock.clone(), old_line(0));
    let rtc = Rtc::new(clock.clone(), old_line(8), start_time(&clock), 1 << 30);
    let uart = Uart::new(clock.clone(), line(4), Box::new(std::io::sink()));
    let keyboard = I8042::new(line(1), machine.clone());
    let pm = AcpiPm::new(clock.clone(), line(9), machine.clone(), TimerWidth::Bits32);
    let exit = DebugExit::new(machine);
    assert!(chip.attach(&ports, &mmio) && Hpet::attach(&hpet, &mmio));
    assert!(Pit::attach(&pit, &ports) && Rtc::attach(&rtc, &ports) && Uart::attach(&uart, &ports));
    assert!(I8042::attach(&keyboard, &ports) && AcpiPm::attach(&pm, &ports));
    assert!(DebugExit::attach(&exit, &ports));
    Board { clock, chip, signals, ports, mmio, uart, pm }
}

impl Board {
    fn access(&self, numbers: &mut Numbers) {
        const PORTS: [u64; 17] = [
            0x20, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0xa0, 0xb2, 0xf4, 0x3f8, 0x3fc, 0x4d0,
            0x600, 0x608,
        ];
        let mut data = numbers.value().to_le_bytes();
        let data = &mut data[..1 << numbers.below(4)];
        let write = numbers.below(3) != 0;
        let vcpu = numbers.below(2) as usize;
        let on_bus = |bus: &Bus, address: u64, data: &mut [u8]| {
            if write {
                bus.write(address, data)
            } else {
                bus.read(address, data)
            };
        };
        match numbers.below(12) {
            0..=4 => {
                on_bus(&self.ports, PORTS[numbers.below(17) as usize] + numbers.below(4), data);
            }
            5 => on_bus(&self.mmio, HPET_BASE + numbers.below(HPET_SIZE / 2), data),
            6 => on_bus(&self.mmio, IOAPIC_BASE + numbers.below(0x50), data),
            7 if write => self.chip.apic_mmio_write(vcpu, numbers.below(0x40) * 16, data),
            7 => self.chip.apic_mmio_read(vcpu, numbers.below(0x400), data),
            8 if write => {
                let msr = 0x800 + numbers.below(0x40) as u32;
                let _ = self.chip.apic_msr_write(vcpu, msr, numbers.value());
            }
            8 => drop(self.chip.apic_msr_read(vcpu, 0x800 + numbers.below(0x40) as u32)),
            9 => drop(self.chip.acknowledge(vcpu)),
            10 => self.chip.set_irq(numbers.below(26) as u32, write),
            _ => self.disturb(vcpu, numbers),
        }
    }

    fn disturb(&self, vcpu: usize, numbers: &mut Numbers) {
        match numbers.below(8) {
            0 => drop(self.chip.set_apic_base(vcpu, 0xfee0_0000 | numbers.below(16) << 8)),
            1 => self.chip.set_tsc_deadline(vcpu, numbers.value()),
            2 => self.chip.set_tsc_offset(vcpu, numbers.value()),
            3 => self.chip.send(0xfee0_0000 | numbers.below(0x10_0000), numbers.value() as u32),
            4 => self.chip.init(vcpu),
            5 => drop(lock(&self.uart).push_input(b"typed")),
            6 => drop(lock(&self.pm).press_power_button()),
            _ => self.chip.set_tpr(vcpu, numbers.value() as u8),
        }
    }

    /// Whatever the guest did, timers end up due in the future.
    fn pass_time(&self, numbers: &mut Numbers) {
        let step = numbers.next() >> (20 + numbers.below(44));
        self.clock.advance_to(self.clock.now_ns().saturating_add(step));
        self.clock.fire_due();
        let next = self.clock.next_deadline();
        assert!(next.is_none_or(|next| next > self.clock.now_ns()), "a timer stays due");
    }
}

#[test]
fn no_guest_can_break_the_chips() {
    for seed in 1..=20 {
        let board = board();
        let mut numbers = Numbers(seed);
        for _ in 0..20_000 {
            board.access(&mut numbers);
            for (vcpu, signal) in board.signals.iter().enumerate() {
                let told = signal.attention.get() & Attention::INTERRUPT != 0;
                assert_eq!(told, board.chip.interrupt_pending(vcpu), "seed {seed}");
            }
            if numbers.below(8) == 0 {
                board.pass_time(&mut numbers);
            }
        }
    }
}
