//! Tests of the controllers' wiring.

use turtles_cpu::attention::Attention;

use super::*;
use crate::clock::ClockSource;

struct Bench {
    chip: Arc<IrqChip>,
    signals: Vec<Arc<VcpuSignal>>,
    ports: Bus,
    mmio: Bus,
}

fn bench(count: usize) -> Bench {
    let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
    let signals: Vec<_> = (0..count).map(|_| Arc::new(VcpuSignal::default())).collect();
    let chip = IrqChip::new(&clock, &signals, 46);
    let (ports, mmio) = (Bus::default(), Bus::default());
    assert!(chip.attach(&ports, &mmio));
    Bench { chip, signals, ports, mmio }
}

impl Bench {
    fn outb(&self, port: u64, value: u8) {
        assert!(self.ports.write(port, &[value]));
    }

    /// Vectors 0x20 and 0x28, nothing masked.
    fn init_pic(&self) {
        for (port, base, cascade) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            self.outb(port, 0x11);
            for word in [base, cascade, 1, 0] {
                self.outb(port + 1, word);
            }
        }
    }

    fn redirect(&self, pin: u32, low: u32, high: u32) {
        for (register, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
            self.mmio.write(IOAPIC_BASE, &register.to_le_bytes());
            self.mmio.write(IOAPIC_BASE + 0x10, &value.to_le_bytes());
        }
    }

    fn enable(&self, vcpu: usize) {
        self.chip.apic_mmio_write(vcpu, 0xf0, &0x1ffu32.to_le_bytes());
    }

    fn eoi(&self, vcpu: usize) {
        self.chip.apic_mmio_write(vcpu, 0xb0, &0u32.to_le_bytes());
    }

    fn pulse(&self, gsi: u32) {
        self.chip.set_irq(gsi, true);
        self.chip.set_irq(gsi, false);
    }
}

#[test]
fn virtual_wire_from_the_8259s_to_the_bootstrap_processor() {
    let bench = bench(2);
    bench.init_pic();
    bench.pulse(0);
    assert!(bench.chip.interrupt_pending(0));
    assert!(!bench.chip.interrupt_pending(1));
    assert_ne!(bench.signals[0].attention.get() & Attention::INTERRUPT, 0);
    assert_eq!(bench.chip.acknowledge(0), Some(0x20));
    assert_eq!(bench.signals[0].attention.get() & Attention::INTERRUPT, 0);
    assert_eq!(bench.chip.acknowledge(0), None);
    bench.outb(0x20, 0x20);
    bench.pulse(12);
    assert_eq!(bench.chip.acknowledge(0), Some(0x2c));
}

#[test]
fn disabled_apic_is_the_intr_pin_and_masked_lint0_is_not() {
    let bench = bench(1);
    bench.init_pic();
    bench.enable(0);
    bench.chip.apic_mmio_write(0, 0x350, &0x1_0700u32.to_le_bytes());
    bench.pulse(1);
    assert!(!bench.chip.interrupt_pending(0));
    bench.chip.set_apic_base(0, 0xfee0_0100).unwrap();
    assert_eq!(bench.chip.apic_page(0), None);
    assert_eq!(bench.chip.acknowledge(0), Some(0x21));
}

#[test]
fn timer_interrupt_is_pin_two() {
    let bench = bench(1);
    bench.enable(0);
    bench.redirect(0, 0x40, 0);
    bench.redirect(2, 0x42, 0);
    bench.redirect(20, 0x54, 0);
    bench.pulse(0);
    assert_eq!(bench.chip.acknowledge(0), Some(0x42));
    bench.eoi(0);
    bench.pulse(2);
    bench.pulse(24);
    bench.pulse(u32::MAX);
    assert_eq!(bench.chip.acknowledge(0), None);
    bench.pulse(20);
    assert_eq!(bench.chip.acknowledge(0), Some(0x54));
}

#[test]
fn level_interrupt_comes_again_after_eoi() {
    let bench = bench(2);
    bench.enable(1);
    bench.redirect(9, 0x8059, 0x0100_0000);
    bench.chip.set_irq(9, true);
    assert_eq!(bench.chip.acknowledge(1), Some(0x59));
    assert!(!bench.chip.interrupt_pending(1));
    bench.eoi(1);
    assert_eq!(bench.chip.acknowledge(1), Some(0x59));
    bench.chip.set_irq(9, false);
    bench.eoi(1);
    assert!(!bench.chip.interrupt_pending(1));
    bench.chip.set_irq(9, true);
    assert!(bench.chip.interrupt_pending(1));
}

#[test]
fn directed_eoi_with_broadcast_suppressed() {
    let bench = bench(1);
    bench.chip.apic_mmio_write(0, 0xf0, &0x11ffu32.to_le_bytes());
    bench.redirect(17, 0x8061, 0);
    bench.chip.set_irq(17, true);
    assert_eq!(bench.chip.acknowledge(0), Some(0x61));
    bench.eoi(0);
    assert!(!bench.chip.interrupt_pending(0));
    bench.mmio.write(IOAPIC_BASE + 0x40, &0x61u32.to_le_bytes());
    assert!(bench.chip.interrupt_pending(0));
}

#[test]
fn messages() {
    let bench = bench(3);
    (0..3).for_each(|vcpu| bench.enable(vcpu));
    bench.chip.send(0xfee0_2000, 0x4071);
    assert_eq!(bench.chip.acknowledge(2), Some(0x71));
    bench.chip.send(0xfee0_1000, 0x0400);
    assert_ne!(bench.signals[1].attention.get() & Attention::NMI, 0);
    bench.chip.send(0xfed0_0000, 0x4071);
    bench.chip.send(0x1_fee0_0000, 0x4071);
    assert!((0..3).all(|vcpu| !bench.chip.interrupt_pending(vcpu)));
    bench.chip.send(0xfeef_f008, 0x72);
    assert_eq!((0..3).filter(|&vcpu| bench.chip.acknowledge(vcpu).is_some()).count(), 1, "redirected to one");
}

#[test]
fn local_apic_goes_before_the_8259s() {
    let bench = bench(1);
    bench.init_pic();
    bench.enable(0);
    bench.pulse(4);
    bench.chip.send(0xfee0_0000, 0x35);
    assert_eq!(bench.chip.acknowledge(0), Some(0x35));
    assert_eq!(bench.chip.acknowledge(0), Some(0x24));
}

#[test]
fn cr8_is_the_upper_half_of_tpr() {
    let bench = bench(1);
    bench.chip.set_cr8(0, 0xb);
    assert_eq!(bench.chip.tpr(0), 0xb0);
    bench.chip.set_tpr(0, 0x4f);
    assert_eq!(bench.chip.cr8(0), 4);
}

#[test]
fn reset_forgets() {
    let bench = bench(1);
    bench.init_pic();
    bench.enable(0);
    bench.redirect(20, 0x54, 0);
    bench.pulse(4);
    bench.pulse(20);
    bench.chip.reset();
    assert!(!bench.chip.interrupt_pending(0));
    bench.enable(0);
    bench.pulse(20);
    assert!(!bench.chip.interrupt_pending(0));
}

#[test]
fn nmi_button_needs_lint1() {
    let bench = bench(2);
    bench.enable(1);
    bench.chip.apic_mmio_write(1, 0x360, &0x400u32.to_le_bytes());
    bench.chip.inject_nmi();
    assert_eq!(bench.signals[0].attention.get() & Attention::NMI, 0, "masked after reset");
    assert_ne!(bench.signals[1].attention.get() & Attention::NMI, 0);
}

#[test]
fn interrupts_from_many_threads_all_arrive() {
    let bench = bench(2);
    bench.enable(0);
    bench.enable(1);
    bench.redirect(16, 0x8070, 0x0100_0000);
    std::thread::scope(|scope| {
        for vector in [0x40u32, 0x50, 0x60] {
            let chip = &bench.chip;
            scope.spawn(move || (0..1000).for_each(|i| chip.send(0xfee0_0000 | (i & 1) << 12, vector)));
        }
        let chip = &bench.chip;
        scope.spawn(move || (0..1000).for_each(|i| chip.set_irq(16, i & 1 == 0)));
        for vcpu in 0..2 {
            let bench = &bench;
            scope.spawn(move || {
                for _ in 0..2000 {
                    if bench.chip.acknowledge(vcpu).is_some() {
                        bench.eoi(vcpu);
                    }
                }
            });
        }
    });
    for vcpu in 0..2 {
        while bench.chip.acknowledge(vcpu).is_some() {
            bench.eoi(vcpu);
        }
        assert_eq!(bench.signals[vcpu].attention.get() & Attention::INTERRUPT, 0);
    }
}
