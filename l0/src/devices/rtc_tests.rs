//! Tests of the real-time clock.

use super::*;
use crate::devices::test_bench::{Probe, run_to};

struct Bench {
    clock: Arc<Clock>,
    probe: Arc<Probe>,
    rtc: Arc<Mutex<Rtc>>,
}

const S: u64 = 1_000_000_000;

/// Shows 2024-01-01 00:00:00, a Monday.
fn bench() -> Bench {
    let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
    let probe = Arc::new(Probe::default());
    let rtc = Rtc::new(clock.clone(), IrqLine::new(probe.clone(), 8), start_time(&clock), 5 << 30);
    Bench { clock, probe, rtc }
}

impl Bench {
    fn get(&self, register: usize) -> u8 {
        let mut rtc = lock(&self.rtc);
        rtc.write(0, &[register as u8 | 0x80]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(&self, register: usize, value: u8) {
        let mut rtc = lock(&self.rtc);
        rtc.write(0, &[register as u8]);
        rtc.write(1, &[value]);
    }

    fn date(&self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY].map(|register| self.get(register))
    }
}

#[test]
fn dates_convert_both_ways() {
    for (seconds, date) in [
        (0, [1970, 1, 1, 0, 0, 0]),
        (951_782_399, [2000, 2, 28, 23, 59, 59]),
        (951_782_400, [2000, 2, 29, 0, 0, 0]),
        (4_107_542_400, [2100, 3, 1, 0, 0, 0]),
        (-1, [1969, 12, 31, 23, 59, 59]),
    ] {
        let found = Date::from_unix(seconds);
        let parts = [found.year, found.month, found.day, found.hour, found.minute, found.second];
        assert_eq!(parts, date);
        assert_eq!(found.to_unix(), seconds);
    }
}

#[test]
fn shows_the_date_in_bcd_and_counts() {
    let bench = bench();
    assert_eq!(bench.date(), [0x20, 0x24, 0x01, 0x01, 0, 0, 0, 2]);
    run_to(&bench.clock, (58 * 86_400 + 23 * 3600 + 59 * 60 + 59) * S);
    assert_eq!(bench.date(), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x59, 4]);
    run_to(&bench.clock, 59 * 86_400 * S);
    assert_eq!(bench.date(), [0x20, 0x24, 0x02, 0x29, 0, 0, 0, 5]);
}

#[test]
fn binary_and_twelve_hour_formats() {
    let bench = bench();
    run_to(&bench.clock, 12 * 3600 * S);
    bench.set(B, B_BINARY);
    assert_eq!(bench.get(HOURS), 12 | 0x80);
    assert_eq!(bench.get(YEAR), 24);
    run_to(&bench.clock, 24 * 3600 * S);
    assert_eq!(bench.get(HOURS), 12);
    bench.set(B, 0);
    run_to(&bench.clock, (24 + 23) * 3600 * S);
    assert_eq!(bench.get(HOURS), 0x11 | 0x80);
}

#[test]
fn setting_the_date_under_set() {
    let bench = bench();
    bench.set(B, B_SET | B_24H);
    for (register, value) in [
        (CENTURY, 0x19),
        (YEAR, 0x99),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x58),
    ] {
        bench.set(register, value);
    }
    bench.set(WEEKDAY, 6);
    run_to(&bench.clock, 10 * S);
    assert_eq!(bench.get(SECONDS), 0x58, "held");
    bench.set(B, B_24H);
    run_to(&bench.clock, 12 * S);
    assert_eq!(bench.date(), [0x20, 0, 1, 1, 0, 0, 0, 7]);
}

#[test]
fn divider_reset_gives_half_a_second() {
    let bench = bench();
    bench.set(A, 0x76);
    run_to(&bench.clock, 5 * S);
    bench.set(SECONDS, 0x10);
    bench.set(A, 0x26);
    run_to(&bench.clock, 5 * S + S / 2 - 1);
    assert_eq!(bench.get(SECONDS), 0x10);
    run_to(&bench.clock, 5 * S + S / 2);
    assert_eq!(bench.get(SECONDS), 0x11);
}

#[test]
fn update_in_progress_precedes_the_change() {
    let bench = bench();
    for (ns, uip) in [(0, false), (S - 2_300_000, false), (S - 200_000, true), (S - 1, true), (S, false)] {
        run_to(&bench.clock, ns);
        assert_eq!(bench.get(A) & A_UIP != 0, uip, "at {ns}");
    }
}

#[test]
fn periodic_interrupt_waits_for_register_c() {
    let bench = bench();
    bench.set(B, B_PERIODIC | B_24H);
    run_to(&bench.clock, S / 2);
    assert_eq!(bench.probe.rises(8), 1, "the line stays high until C is read");
    assert_eq!(bench.get(C), C_IRQ | B_PERIODIC);
    assert!(!bench.probe.level(8));
    assert_eq!(bench.get(C), 0);
    run_to(&bench.clock, S / 2 + (S / 1024) + 1);
    assert!(bench.probe.level(8), "1024 Hz after reset");
    bench.get(C);
    bench.set(A, 0x2f);
    run_to(&bench.clock, S - 1);
    bench.get(C);
    run_to(&bench.clock, S);
    assert!(bench.probe.level(8), "2 Hz");
}

#[test]
fn update_ended_interrupt_comes_each_second() {
    let bench = bench();
    run_to(&bench.clock, S + 5);
    bench.get(C);
    bench.set(B, B_UPDATE | B_24H);
    run_to(&bench.clock, 2 * S - 1);
    assert!(!bench.probe.level(8));
    run_to(&bench.clock, 2 * S);
    assert!(bench.probe.level(8));
    assert_eq!(bench.get(C) & (C_IRQ | B_UPDATE), C_IRQ | B_UPDATE);
    run_to(&bench.clock, 3 * S);
    assert_eq!(bench.probe.rises(8), 2);
}

#[test]
fn alarm_matches_fields_and_wildcards() {
    let bench = bench();
    for (register, value) in [(SECONDS_ALARM, 0x05), (MINUTES_ALARM, 0x01), (HOURS_ALARM, 0xff)] {
        bench.set(register, value);
    }
    bench.set(B, B_ALARM | B_24H);
    run_to(&bench.clock, 65 * S - 1);
    assert!(!bench.probe.level(8));
    run_to(&bench.clock, 65 * S);
    assert!(bench.probe.level(8));
    assert_ne!(bench.get(C) & B_ALARM, 0);
    assert_eq!(bench.clock.next_deadline(), Some(3665 * S), "every hour");
    bench.set(SECONDS_ALARM, 0x77);
    assert_eq!(bench.clock.next_deadline(), None, "a time that never comes");
}

#[test]
fn flags_are_set_without_interrupts() {
    let bench = bench();
    run_to(&bench.clock, 2 * S);
    assert_eq!(bench.clock.next_deadline(), None, "and without the clock's help");
    assert_eq!(bench.get(C) & (C_IRQ | B_UPDATE | B_PERIODIC), B_UPDATE | B_PERIODIC);
}

#[test]
fn memory_sizes() {
    let bench = bench();
    let word = |at| u16::from_le_bytes([bench.get(at), bench.get(at + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(word(0x34), ((LOW_RAM_END - (16 << 20)) >> 16) as u16);
    assert_eq!(word(0x5b), 0x8000, "2 GiB above 4 GiB, in 64 KiB");
    assert_eq!(bench.get(D), 0x80);
}

#[test]
fn garbage_is_survived() {
    let bench = bench();
    for value in [0, 0x0d, 0x7f, 0x80, 0xc0, 0xff] {
        for register in 0..128 {
            bench.set(register, value);
            bench.get(register);
        }
        bench.set(B, value);
        bench.clock.advance_to(bench.clock.now_ns() + 3 * S);
        bench.clock.fire_due();
    }
}
