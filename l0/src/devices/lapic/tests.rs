//! Tests of the local APICs, through their message bus.

use std::sync::MutexGuard;

use super::*;
use crate::clock::ClockSource;
use crate::devices::test_bench::run_to;

struct Bench {
    clock: Arc<Clock>,
    signals: Vec<Arc<VcpuSignal>>,
    apics: Apics,
}

fn bench(count: usize) -> Bench {
    let clock = Clock::new(ClockSource::Virtual, 2_000_000_000);
    let signals: Vec<_> = (0..count).map(|_| Arc::new(VcpuSignal::default())).collect();
    let apics = Apics::new(&clock, &signals, 46);
    Bench { clock, signals, apics }
}

impl Bench {
    fn apic(&self, vcpu: usize) -> MutexGuard<'_, Lapic> {
        self.apics.apic(vcpu)
    }

    fn get(&self, vcpu: usize, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.apic(vcpu).read_mmio(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, vcpu: usize, offset: u64, value: u32) -> Option<u8> {
        self.apics.write_mmio(vcpu, offset, &value.to_le_bytes())
    }

    /// Software-enabled in xAPIC mode.
    fn enabled(count: usize) -> Self {
        let bench = bench(count);
        for vcpu in 0..count {
            bench.set(vcpu, 0xf0, 0x1ff);
        }
        bench
    }

    /// Software-enabled in x2APIC mode.
    fn x2apic(count: usize) -> Self {
        let bench = Self::enabled(count);
        for vcpu in 0..count {
            let base = bench.apic(vcpu).base();
            bench.apic(vcpu).set_base(base | BASE_EXTD).unwrap();
        }
        bench
    }

    fn rdmsr(&self, vcpu: usize, msr: u32) -> Result<u64, GeneralProtection> {
        self.apic(vcpu).read_msr(msr)
    }

    fn wrmsr(&self, vcpu: usize, msr: u32, value: u64) -> Result<Option<u8>, GeneralProtection> {
        self.apics.write_msr(vcpu, msr, value)
    }

    fn send(&self, destination: Destination, vector: u8, level_triggered: bool) -> bool {
        self.apics.deliver(&Message { destination, mode: DeliveryMode::Fixed, vector, level_triggered })
    }

    fn signalled(&self, vcpu: usize) -> bool {
        self.signals[vcpu].attention.get() & Attention::INTERRUPT != 0
    }

    /// The vCPUs that take an interrupt with `vector` now, as a bit mask.
    fn takers(&self, vector: u8) -> u32 {
        let takes = |vcpu: &usize| self.apic(*vcpu).acknowledge() == Some(vector);
        let mask = (0..self.apics.count()).filter(takes).fold(0, |mask, vcpu| mask | 1 << vcpu);
        for vcpu in 0..self.apics.count() {
            let _ = self.apic(vcpu).end_of_interrupt();
        }
        mask
    }
}

#[test]
fn state_after_reset() {
    let bench = bench(2);
    assert_eq!(bench.apic(0).base(), 0xfee0_0900);
    assert_eq!(bench.apic(1).base(), 0xfee0_0800);
    assert_eq!(bench.get(1, 0x20), 0x0100_0000);
    assert_eq!(bench.get(0, 0x30), 0x0106_0014);
    assert_eq!(bench.get(0, 0xe0), 0xffff_ffff);
    assert_eq!(bench.get(0, 0xf0), 0xff);
    assert_eq!(bench.get(0, 0x350), 0x700, "virtual wire");
    assert_eq!(bench.get(1, 0x350), 0x1_0000);
    assert!(!bench.send(Destination::Only(0), 0x30, false), "software-disabled APICs refuse");
    bench.set(0, 0x320, 0x30);
    assert_eq!(bench.get(0, 0x320), 0x1_0030, "and keep their table masked");
}

#[test]
fn priorities_nest_and_the_signal_follows() {
    let bench = Bench::enabled(1);
    assert!(bench.send(Destination::Only(0), 0x41, false));
    assert!(bench.signalled(0));
    assert_eq!(bench.apic(0).pending_vector(), Some(0x41));
    assert_eq!(bench.apic(0).acknowledge(), Some(0x41));
    assert!(!bench.signalled(0));
    assert_eq!(bench.get(0, 0xa0), 0x40, "PPR");
    assert_eq!(bench.get(0, 0x120), 1 << 1, "ISR");
    bench.send(Destination::Only(0), 0x4f, false);
    assert!(!bench.signalled(0), "same priority class");
    assert_eq!(bench.get(0, 0x220), 1 << 15, "IRR");
    bench.send(Destination::Only(0), 0x51, false);
    assert_eq!(bench.apic(0).acknowledge(), Some(0x51));
    bench.set(0, 0xb0, 0);
    assert!(!bench.signalled(0));
    bench.set(0, 0xb0, 0);
    assert_eq!(bench.apic(0).acknowledge(), Some(0x4f));
    bench.set(0, 0xb0, 0);
    assert_eq!(bench.apic(0).acknowledge(), None);
}

#[test]
fn task_priority_holds_interrupts_back() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x80, 0x45);
    assert_eq!(bench.get(0, 0xa0), 0x45);
    bench.send(Destination::Only(0), 0x4f, false);
    assert!(!bench.signalled(0));
    bench.apic(0).set_tpr(0x3f);
    assert!(bench.signalled(0));
    bench.apic(0).set_tpr(0xf0);
    assert!(!bench.signalled(0));
}

#[test]
fn eoi_is_broadcast_for_level_unless_suppressed() {
    let bench = Bench::enabled(1);
    for (svr, level, expected) in [(0x1ff, false, None), (0x1ff, true, Some(0x61)), (0x11ff, true, None)] {
        bench.set(0, 0xf0, svr);
        bench.send(Destination::Only(0), 0x61, level);
        assert_eq!(bench.get(0, 0x1b0) != 0, level, "TMR");
        bench.apic(0).acknowledge();
        assert_eq!(bench.set(0, 0xb0, 0), expected);
    }
    assert_eq!(bench.set(0, 0xb0, 0), None, "nothing in service");
}

#[test]
fn logical_destinations() {
    let bench = Bench::enabled(4);
    for vcpu in 0..4 {
        bench.set(vcpu, 0xd0, 1 << (24 + vcpu));
    }
    bench.send(Destination::narrow(0b1010, true), 0x40, false);
    assert_eq!(bench.takers(0x40), 0b1010);
    bench.send(Destination::narrow(0xff, true), 0x40, false);
    assert_eq!(bench.takers(0x40), 0b1111);
    // Cluster model: vCPUs 0, 1 in cluster 1 and 2, 3 in cluster 2.
    for (vcpu, ldr) in [0x11u32, 0x12, 0x21, 0x22].into_iter().enumerate() {
        bench.set(vcpu, 0xe0, 0x0fff_ffff);
        bench.set(vcpu, 0xd0, ldr << 24);
    }
    assert_eq!(bench.get(0, 0xe0), 0x0fff_ffff);
    bench.send(Destination::narrow(0x23, true), 0x40, false);
    assert_eq!(bench.takers(0x40), 0b1100);
    bench.send(Destination::narrow(0x01, true), 0x40, false);
    assert_eq!(bench.takers(0x40), 0);
    bench.send(Destination::narrow(0xff, false), 0x40, false);
    assert_eq!(bench.takers(0x40), 0b1111, "physical broadcast");
    assert!(!bench.send(Destination::narrow(9, false), 0x40, false));
}

#[test]
fn x2apic_logical_ids_are_derived() {
    let bench = Bench::x2apic(18);
    assert_eq!(bench.rdmsr(17, 0x80d), Ok(1 << 16 | 1 << 1));
    assert_eq!(bench.rdmsr(17, 0x802), Ok(17));
    // From vCPU 0: fixed, logical, cluster 1, both of its members.
    bench.wrmsr(0, 0x830, (1 << 16 | 0b11) << 32 | 1 << 11 | 0x40).unwrap();
    assert_eq!(bench.takers(0x40), 0b11 << 16);
    bench.wrmsr(0, 0x830, 0xffff_ffff << 32 | 0x40).unwrap();
    assert_eq!(bench.takers(0x40), 0x3_ffff);
    bench.wrmsr(0, 0x830, 0xff << 32 | 0x40).unwrap();
    assert_eq!(bench.takers(0x40), 0, "0xff is an ID like any other");
}

#[test]
fn shorthands() {
    let bench = Bench::enabled(3);
    for (shorthand, expected) in [(1, 0b010), (2, 0b111), (3, 0b101)] {
        bench.set(1, 0x300, shorthand << 18 | 0x50);
        assert_eq!(bench.takers(0x50), expected);
    }
    assert_eq!(bench.get(1, 0x300), 3 << 18 | 0x50, "never busy");
}

#[test]
fn init_sipi_and_nmi_reach_the_vcpu() {
    let bench = Bench::enabled(2);
    let edges = Attention::INIT | Attention::SIPI | Attention::NMI;
    bench.set(0, 0x310, 1 << 24);
    bench.set(0, 0x300, 0x0000_8500);
    assert_eq!(bench.signals[1].attention.take(edges), 0, "INIT level de-assert is nothing");
    bench.set(0, 0x300, 0x0000_c500);
    assert_eq!(bench.signals[1].attention.take(edges), Attention::INIT);
    bench.set(0, 0x300, 0x0000_4699);
    assert_eq!(bench.signals[1].attention.take(edges), Attention::SIPI);
    assert_eq!(bench.signals[1].sipi_vector(), 0x99);
    bench.set(0, 0x300, 0x0000_4400);
    assert_eq!(bench.signals[1].attention.take(edges), Attention::NMI);
    assert_eq!(bench.signals[0].attention.take(edges), 0);
}

#[test]
fn lowest_priority_prefers_the_idle() {
    let bench = Bench::enabled(3);
    bench.apic(0).set_tpr(0x20);
    bench.apic(2).set_tpr(0x20);
    let message = Message {
        destination: Destination::All,
        mode: DeliveryMode::LowestPriority,
        vector: 0x70,
        level_triggered: false,
    };
    assert!(bench.apics.deliver(&message));
    assert_eq!(bench.takers(0x70), 0b010);
    bench.apic(1).set_tpr(0x20);
    let mut seen = 0;
    for _ in 0..3 {
        bench.apics.deliver(&message);
        seen |= bench.takers(0x70);
    }
    assert_eq!(seen, 0b111, "equals take turns");
}

#[test]
fn errors_are_latched_by_a_write_to_esr() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x370, 0x33);
    bench.set(0, 0x300, 1 << 18 | 0x0f);
    assert_eq!(bench.get(0, 0x280), 0);
    bench.set(0, 0x280, 0);
    assert_eq!(bench.get(0, 0x280), 1 << 5, "send illegal vector");
    assert_eq!(bench.apic(0).acknowledge(), Some(0x33));
    bench.set(0, 0xb0, 0);
    bench.send(Destination::Only(0), 3, false);
    bench.get(0, 0x40);
    bench.set(0, 0x280, 0);
    assert_eq!(bench.get(0, 0x280), 1 << 6 | 1 << 7, "receive illegal vector, illegal register");
    bench.set(0, 0x280, 0);
    assert_eq!(bench.get(0, 0x280), 0);
}

#[test]
fn apic_base_transitions() {
    let bench = bench(1);
    let mut apic = bench.apic(0);
    let set = |apic: &mut Lapic, bits: u64| apic.set_base(0xfee0_0000 | BASE_BSP | bits);
    assert_eq!(set(&mut apic, BASE_EXTD), Err(GeneralProtection), "EXTD without EN");
    assert_eq!(set(&mut apic, BASE_ENABLE | 1 << 9), Err(GeneralProtection), "reserved bit");
    assert_eq!(apic.set_base(1 << 46 | BASE_ENABLE), Err(GeneralProtection), "beyond MAXPHYADDR");
    set(&mut apic, BASE_ENABLE | BASE_EXTD).unwrap();
    assert_eq!(apic.mode(), ApicMode::X2apic);
    assert_eq!(set(&mut apic, BASE_ENABLE), Err(GeneralProtection), "x2APIC to xAPIC");
    set(&mut apic, 0).unwrap();
    assert_eq!(apic.mode(), ApicMode::Disabled);
    assert_eq!(set(&mut apic, BASE_ENABLE | BASE_EXTD), Err(GeneralProtection), "disabled to x2APIC");
    set(&mut apic, BASE_ENABLE).unwrap();
    assert_eq!(apic.base(), 0xfee0_0900);
}

#[test]
fn mode_decides_the_interface() {
    let bench = Bench::enabled(1);
    assert_eq!(bench.rdmsr(0, 0x802), Err(GeneralProtection));
    let bench = Bench::x2apic(1);
    assert_eq!(bench.get(0, 0x30), u32::MAX);
    assert_eq!(bench.rdmsr(0, 0x803), Ok(0x0106_0014));
}

#[test]
fn x2apic_rules() {
    let bench = Bench::x2apic(1);
    let gp = Err(GeneralProtection);
    for msr in [0x800, 0x801, 0x809, 0x80b, 0x80c, 0x80e, 0x829, 0x831, 0x83a, 0x83f, 0x840, 0x8ff] {
        assert_eq!(bench.rdmsr(0, msr), gp, "reading {msr:#x}");
    }
    for msr in [0x802, 0x803, 0x80a, 0x80d, 0x80e, 0x810, 0x827, 0x831, 0x839, 0x840] {
        assert_eq!(bench.wrmsr(0, msr, 0), Err(GeneralProtection), "writing {msr:#x}");
    }
    for (msr, value) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 0x2ff),
        (0x828, 1),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert_eq!(bench.wrmsr(0, msr, value), Err(GeneralProtection), "writing {value:#x} to {msr:#x}");
    }
    assert_eq!(bench.wrmsr(0, 0x83f, 0x44), Ok(None));
    assert_eq!(bench.takers(0x44), 1, "self IPI");
    bench.wrmsr(0, 0x830, 7 << 32 | 0x44).unwrap();
    assert_eq!(bench.rdmsr(0, 0x830), Ok(7 << 32 | 0x44));
}

#[test]
fn one_shot_counts_down_and_fires_once() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x3e0, 0xb);
    bench.set(0, 0x320, 0x40);
    bench.set(0, 0x380, 1000);
    run_to(&bench.clock, 400);
    assert_eq!(bench.get(0, 0x390), 600);
    run_to(&bench.clock, 999);
    assert!(!bench.signalled(0));
    run_to(&bench.clock, 1000);
    assert!(bench.signalled(0));
    assert_eq!(bench.get(0, 0x390), 0);
    assert_eq!(bench.clock.next_deadline(), None);
}

#[test]
fn divider_codes() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x320, 0x1_0000);
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        bench.set(0, 0x3e0, code);
        bench.set(0, 0x380, 1000);
        bench.clock.advance_to(bench.clock.now_ns() + 100 * divisor);
        assert_eq!(bench.get(0, 0x390), 900, "divide by {divisor}");
    }
}

#[test]
fn periodic_keeps_phase_and_does_not_drown() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x3e0, 0xb);
    bench.set(0, 0x320, 1 << 17 | 0x40);
    bench.set(0, 0x380, 1_000_000);
    let mut taken = 0;
    for ms in 1..=10 {
        run_to(&bench.clock, ms * 1_000_000);
        taken += bench.takers(0x40);
    }
    assert_eq!(taken, 10);
    bench.clock.advance_to(57_300_000);
    bench.clock.fire_due();
    assert_eq!(bench.takers(0x40), 1, "one for all that were missed");
    assert_eq!(bench.takers(0x40), 0);
    assert_eq!(bench.clock.next_deadline(), Some(58_000_000));
    assert_eq!(bench.get(0, 0x390), 700_000);
    // One tick: served at the minimum spacing, and never due in the past.
    bench.set(0, 0x380, 1);
    run_to(&bench.clock, 60_000_000);
    bench.set(0, 0x380, 0);
    assert_eq!(bench.clock.next_deadline(), None);
}

#[test]
fn tsc_deadline() {
    let bench = Bench::enabled(1);
    bench.apic(0).set_tsc_deadline(5000);
    assert_eq!(bench.apic(0).tsc_deadline(), 0, "ignored in the other modes");
    bench.set(0, 0x320, 2 << 17 | 0x40);
    bench.apic(0).set_tsc_deadline(5001);
    bench.set(0, 0x380, 77);
    assert_eq!(bench.get(0, 0x390), 0);
    assert_eq!(bench.clock.next_deadline(), Some(2501), "the TSC runs at 2 GHz here");
    run_to(&bench.clock, 2500);
    assert_eq!(bench.apic(0).tsc_deadline(), 5001);
    run_to(&bench.clock, 2501);
    assert!(bench.signalled(0));
    assert_eq!(bench.apic(0).tsc_deadline(), 0);
    bench.takers(0x40);
    bench.apic(0).set_tsc_deadline(1);
    assert!(bench.signalled(0), "a deadline in the past fires at once");
    bench.takers(0x40);
    bench.apic(0).set_tsc_deadline(1_000_000);
    bench.apic(0).set_tsc_offset(900_000);
    assert_eq!(bench.clock.next_deadline(), Some(50_000));
    bench.set(0, 0x320, 0x40);
    assert_eq!(bench.clock.next_deadline(), None, "leaving the mode disarms");
    assert_eq!(bench.apic(0).tsc_deadline(), 0);
}

#[test]
fn masked_timer_runs_silently() {
    let bench = Bench::enabled(1);
    bench.set(0, 0x320, 1 << 16 | 1 << 17 | 0x40);
    bench.set(0, 0x3e0, 0xb);
    bench.set(0, 0x380, 1000);
    assert_eq!(bench.clock.next_deadline(), None);
    bench.clock.advance_to(12_300);
    assert_eq!(bench.get(0, 0x390), 700);
    bench.set(0, 0x320, 1 << 17 | 0x40);
    assert!(!bench.signalled(0));
    run_to(&bench.clock, 62_300);
    assert!(bench.signalled(0));
}

#[test]
fn local_pins() {
    let bench = Bench::enabled(1);
    bench.apic(0).set_lint(0, true);
    assert!(bench.signalled(0), "ExtINT passes through");
    assert_eq!(bench.apic(0).acknowledge(), None, "but has no vector here");
    assert!(bench.apic(0).external_interrupt());
    bench.set(0, 0x350, 0x1_0700);
    assert!(!bench.signalled(0));
    // Fixed, level-triggered: remote IRR until EOI, then again while the pin is high.
    bench.set(0, 0x350, 0x8055);
    assert_eq!(bench.get(0, 0x350), 0xc055);
    assert_eq!(bench.apic(0).acknowledge(), Some(0x55));
    bench.set(0, 0xb0, 0);
    assert_eq!(bench.apic(0).acknowledge(), Some(0x55));
    bench.apic(0).set_lint(0, false);
    bench.set(0, 0xb0, 0);
    assert_eq!(bench.get(0, 0x350), 0x8055);
    // LINT1 as NMI.
    bench.set(0, 0x360, 0x400);
    bench.apic(0).set_lint(1, true);
    assert_eq!(bench.signals[0].attention.take(Attention::NMI), Attention::NMI);
    bench.apic(0).set_lint(7, true);
}

#[test]
fn init_keeps_id_and_base() {
    let bench = Bench::x2apic(2);
    bench.send(Destination::Only(1), 0x40, false);
    bench.apic(1).init();
    assert!(!bench.signalled(1));
    assert_eq!(bench.apic(1).mode(), ApicMode::X2apic);
    assert_eq!(bench.rdmsr(1, 0x802), Ok(1));
    assert_eq!(bench.rdmsr(1, 0x80f), Ok(0xff));
    assert_eq!(bench.rdmsr(1, 0x832), Ok(0x1_0000));
}

#[test]
fn odd_accesses_are_harmless() {
    let bench = Bench::enabled(1);
    for offset in 0..0x1100 {
        for len in [1, 2, 4, 8] {
            let mut data = [0xff; 8];
            bench.apics.write_mmio(0, offset, &data[..len]);
            bench.apic(0).read_mmio(offset, &mut data[..len]);
        }
    }
    let mut byte = [0];
    bench.apic(0).read_mmio(0x31, &mut byte);
    assert_eq!(byte, [0x00]);
    bench.apic(0).read_mmio(0x32, &mut byte);
    assert_eq!(byte, [0x06], "parts of a register can be read");
}
