//! Tests of the 8254 and of port 0x61.

use super::*;
use crate::clock::ClockSource;
use crate::devices::test_bench::{Probe, run_to};

fn pit() -> (Arc<Clock>, Arc<Probe>, Arc<Mutex<Pit>>) {
    let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
    let probe = Arc::new(Probe::default());
    let pit = Pit::new(clock.clone(), IrqLine::new(probe.clone(), 0));
    (clock, probe, pit)
}

fn out(pit: &Mutex<Pit>, port: u64, value: u8) {
    lock(pit).write(port, &[value]);
}

fn inb(pit: &Mutex<Pit>, port: u64) -> u8 {
    let mut data = [0];
    lock(pit).read(port, &mut data);
    data[0]
}

fn load(pit: &Mutex<Pit>, channel: u64, control: u8, count: u16) {
    out(pit, 3, control);
    let [low, high] = count.to_le_bytes();
    out(pit, channel, low);
    out(pit, channel, high);
}

fn at(ticks: u64) -> u64 {
    INPUT.ns_at(ticks)
}

#[test]
fn rate_generator_interrupts_every_period_and_skips_what_was_missed() {
    let (clock, probe, pit) = pit();
    load(&pit, 0, 0x34, 1193);
    run_to(&clock, at(1192));
    assert_eq!(probe.rises(0), 0);
    run_to(&clock, at(1193));
    assert_eq!(probe.rises(0), 1);
    run_to(&clock, at(1193 * 3));
    assert_eq!(probe.rises(0), 3);
    // Time jumps: one interrupt for all of it, the next in phase.
    clock.advance_to(at(1193 * 10 + 5));
    clock.fire_due();
    assert_eq!(probe.rises(0), 4);
    assert_eq!(clock.next_deadline(), Some(at(1193 * 11)));
}

#[test]
fn terminal_count_interrupts_once() {
    let (clock, probe, pit) = pit();
    load(&pit, 0, 0x30, 100);
    run_to(&clock, at(99));
    out(&pit, 3, 0xe2);
    assert_eq!(inb(&pit, 0), 0x30, "status: OUT low, count loaded, both bytes, mode 0");
    run_to(&clock, at(500_000));
    assert_eq!(probe.rises(0), 1);
    out(&pit, 3, 0xe2);
    assert_eq!(inb(&pit, 0), 0xb0);
}

#[test]
fn strobe_rises_one_clock_after_the_count() {
    let (clock, probe, pit) = pit();
    load(&pit, 0, 0x38, 100);
    run_to(&clock, at(100));
    assert_eq!(probe.rises(0), 0);
    run_to(&clock, at(101));
    assert_eq!(probe.rises(0), 1);
}

#[test]
fn a_period_no_guest_could_serve_is_thinned_out() {
    let (clock, probe, pit) = pit();
    load(&pit, 0, 0x34, 2);
    run_to(&clock, 1_000_000);
    assert!((15..=21).contains(&probe.rises(0)), "{}", probe.rises(0));
}

#[test]
fn latch_holds_until_both_bytes_are_read() {
    let (clock, _, pit) = pit();
    load(&pit, 0, 0x34, 0x1234);
    run_to(&clock, at(0x34));
    out(&pit, 3, 0x00);
    run_to(&clock, at(0x100));
    out(&pit, 3, 0x00);
    assert_eq!((inb(&pit, 0), inb(&pit, 0)), (0x00, 0x12));
    assert_eq!((inb(&pit, 0), inb(&pit, 0)), (0x34, 0x11), "unlatched again");
}

#[test]
fn read_back_gives_status_then_count() {
    let (clock, _, pit) = pit();
    load(&pit, 2, 0xb6, 1000);
    out(&pit, 3, 0xc8);
    assert_eq!(inb(&pit, 2) & 0x7f, 0x36);
    assert_eq!((inb(&pit, 2), inb(&pit, 2)), (0xe8, 0x03));
    out(&pit, 3, 0xb0);
    out(&pit, 3, 0xe8);
    assert_eq!(inb(&pit, 2), 0x70, "no count since the control word: null count, OUT low");
    run_to(&clock, at(10));
}

#[test]
fn bcd_counts_in_decimal() {
    let (clock, _, pit) = pit();
    load(&pit, 0, 0x31, 0x1000);
    run_to(&clock, at(1));
    assert_eq!((inb(&pit, 0), inb(&pit, 0)), (0x99, 0x09));
    run_to(&clock, at(1001));
    assert_eq!((inb(&pit, 0), inb(&pit, 0)), (0x99, 0x99));
    load(&pit, 0, 0x31, 0xffff);
}

#[test]
fn rate_takes_a_new_count_at_the_end_of_the_period() {
    let (clock, probe, pit) = pit();
    load(&pit, 0, 0x34, 1000);
    run_to(&clock, at(500));
    out(&pit, 0, 0xd0);
    out(&pit, 0, 0x07);
    assert_eq!((inb(&pit, 0), inb(&pit, 0)), (0xf4, 0x01));
    run_to(&clock, at(2999));
    assert_eq!(probe.rises(0), 1);
    run_to(&clock, at(3000));
    assert_eq!(probe.rises(0), 2);
}

#[test]
fn speaker_gate_starts_and_stops_channel_two() {
    let (clock, _, pit) = pit();
    let b = |pit: &Mutex<Pit>| lock(pit).read_port_b() & 0x2f;
    // As Linux calibrates its TSC: mode 0, gate on, wait for OUT2.
    lock(&pit).write_port_b(1);
    load(&pit, 2, 0xb0, 1000);
    run_to(&clock, at(400));
    lock(&pit).write_port_b(0x02);
    assert_eq!(b(&pit), 0x02);
    run_to(&clock, at(5000));
    assert_eq!(b(&pit), 0x02, "stopped");
    lock(&pit).write_port_b(0x01);
    run_to(&clock, at(5599));
    assert_eq!(b(&pit), 0x01);
    run_to(&clock, at(5600));
    assert_eq!(b(&pit), 0x21);
}

#[test]
fn one_shot_waits_for_the_gate() {
    let (clock, _, pit) = pit();
    let output = |pit: &Mutex<Pit>| lock(pit).read_port_b() & 0x20 != 0;
    load(&pit, 2, 0xb2, 100);
    run_to(&clock, at(1000));
    assert!(output(&pit));
    lock(&pit).write_port_b(1);
    assert!(!output(&pit));
    run_to(&clock, at(1050));
    lock(&pit).write_port_b(0);
    lock(&pit).write_port_b(1);
    run_to(&clock, at(1149));
    assert!(!output(&pit), "triggered again");
    run_to(&clock, at(1150));
    assert!(output(&pit));
}

#[test]
fn square_wave_is_high_for_the_first_half() {
    let (clock, _, pit) = pit();
    lock(&pit).write_port_b(1);
    load(&pit, 2, 0xb6, 100);
    let output = |pit: &Mutex<Pit>| lock(pit).read_port_b() & 0x20 != 0;
    for (tick, high) in [(0, true), (49, true), (50, false), (99, false), (100, true), (150, false)] {
        run_to(&clock, at(tick));
        assert_eq!(output(&pit), high, "tick {tick}");
    }
    assert_eq!((inb(&pit, 2), inb(&pit, 2)), (100, 0));
}

#[test]
fn refresh_bit_toggles() {
    let (clock, _, pit) = pit();
    let first = lock(&pit).read_port_b() & 0x10;
    run_to(&clock, REFRESH_NS);
    assert_ne!(lock(&pit).read_port_b() & 0x10, first);
}
