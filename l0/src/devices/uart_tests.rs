//! Tests of the serial port.

use std::io;

use super::*;
use crate::clock::ClockSource;
use crate::devices::test_bench::{Probe, run_to};

#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl Write for Tape {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    clock: Arc<Clock>,
    probe: Arc<Probe>,
    tape: Tape,
    uart: Arc<Mutex<Uart>>,
}

/// 10 bits at 115200 baud.
const CHARACTER: u64 = 10 * 1_000_000_000 / 115_200;

fn bench() -> Bench {
    let clock = Clock::new(ClockSource::Virtual, 1_000_000_000);
    let probe = Arc::new(Probe::default());
    let tape = Tape::default();
    let uart = Uart::new(clock.clone(), IrqLine::new(probe.clone(), 4), Box::new(tape.clone()));
    Bench { clock, probe, tape, uart }
}

impl Bench {
    fn get(&self, register: u64) -> u8 {
        let mut data = [0];
        lock(&self.uart).read(register, &mut data);
        data[0]
    }

    fn set(&self, register: u64, value: u8) {
        lock(&self.uart).write(register, &[value]);
    }

    fn type_in(&self, text: &[u8]) -> usize {
        lock(&self.uart).push_input(text)
    }

    fn wait(&self, ns: u64) {
        run_to(&self.clock, self.clock.now_ns() + ns);
    }

    /// OUT2 on, FIFO on with `trigger` code, interrupts `ier`.
    fn open(&self, trigger: u8, ier: u8) {
        self.set(4, 0x0b);
        self.set(2, trigger << 6 | 7);
        self.set(1, ier);
    }
}

#[test]
fn output_reaches_the_sink_by_line_by_time_and_at_the_end() {
    let bench = bench();
    for &byte in b"ab\ncd" {
        assert_eq!(bench.get(5) & 0x60, 0x60);
        bench.set(0, byte);
    }
    assert_eq!(*lock(&bench.tape.0), b"ab\n");
    bench.wait(OUTPUT_DELAY_NS);
    assert_eq!(*lock(&bench.tape.0), b"ab\ncd");
    bench.set(0, b'e');
    drop(bench.uart);
    assert_eq!(*lock(&bench.tape.0), b"ab\ncde");
}

#[test]
fn divisor_and_scratch() {
    let bench = bench();
    bench.set(7, 0xa5);
    bench.set(1, 0xff);
    assert_eq!((bench.get(7), bench.get(1)), (0xa5, 0x0f));
    bench.set(3, 0x83);
    bench.set(0, 0x80);
    bench.set(1, 0x01);
    assert_eq!((bench.get(0), bench.get(1)), (0x80, 0x01));
    bench.set(3, 0x03);
    assert_eq!(bench.get(1), 0x0f);
    assert!(lock(&bench.tape.0).is_empty());
}

#[test]
fn fifo_is_detected_as_16550a() {
    let bench = bench();
    assert_eq!(bench.get(2), 0x01);
    bench.set(2, 0x01);
    assert_eq!(bench.get(2), 0xc1);
    bench.set(2, 0x00);
    assert_eq!(bench.get(2), 0x01);
}

#[test]
fn empty_transmitter_interrupts_when_enabled_and_after_each_byte() {
    let bench = bench();
    bench.open(0, IER_EMPTY);
    assert!(bench.probe.level(4));
    assert_eq!(bench.get(2) & 0x0f, IIR_EMPTY);
    assert!(!bench.probe.level(4), "reading IIR acknowledges it");
    assert_eq!(bench.get(2) & 0x0f, IIR_NONE);
    bench.set(0, b'x');
    assert!(bench.probe.level(4));
    bench.set(1, 0);
    assert!(!bench.probe.level(4));
}

#[test]
fn out2_connects_the_interrupt() {
    let bench = bench();
    bench.set(1, IER_EMPTY);
    assert!(!bench.probe.level(4));
    bench.set(4, MCR_OUT2);
    assert!(bench.probe.level(4));
}

#[test]
fn received_byte_interrupts_until_it_is_read() {
    let bench = bench();
    bench.open(0, IER_RECEIVED);
    assert_eq!(bench.type_in(b"ab"), 2);
    assert!(bench.probe.level(4));
    assert_eq!(bench.get(2) & 0x0f, IIR_RECEIVED);
    assert_eq!(bench.get(5) & 1, 1);
    assert_eq!(bench.get(0), b'a');
    assert!(!bench.probe.level(4), "b is still on the line");
    assert_eq!(bench.get(5) & 1, 0);
    bench.wait(CHARACTER);
    assert!(bench.probe.level(4));
    assert_eq!(bench.get(0), b'b');
}

#[test]
fn trigger_level_and_timeout() {
    let bench = bench();
    bench.open(1, IER_RECEIVED);
    bench.type_in(b"abc");
    bench.wait(3 * CHARACTER);
    assert!(!bench.probe.level(4), "below the trigger level of 4");
    bench.wait(4 * CHARACTER);
    assert!(bench.probe.level(4));
    assert_eq!(bench.get(2) & 0x0f, IIR_TIMEOUT);
    assert_eq!(bench.get(0), b'a');
    assert!(!bench.probe.level(4), "a read restarts the timeout");
    bench.type_in(b"de");
    bench.wait(2 * CHARACTER);
    assert_eq!(bench.get(2) & 0x0f, IIR_RECEIVED);
}

#[test]
fn pasted_input_is_not_lost() {
    let bench = bench();
    bench.open(3, IER_RECEIVED);
    let text: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
    let mut offered = bench.type_in(&text);
    assert_eq!(offered, BACKLOG);
    let woken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = woken.clone();
    lock(&bench.uart).on_room(Box::new(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }));
    let mut got = Vec::new();
    while got.len() < text.len() {
        // A slow guest: the receiver is long full when it looks.
        bench.wait(100 * CHARACTER);
        assert_eq!(bench.get(5) & LSR_OVERRUN, 0);
        while bench.get(5) & 1 != 0 {
            got.push(bench.get(0));
        }
        offered += bench.type_in(&text[offered..]);
    }
    assert_eq!(got, text);
    assert!(woken.load(std::sync::atomic::Ordering::SeqCst) > 0);
}

#[test]
fn break_is_a_line_status_interrupt_with_a_zero_byte() {
    let bench = bench();
    bench.open(0, IER_LINE | IER_RECEIVED);
    assert!(lock(&bench.uart).push_break());
    assert_eq!(bench.get(2) & 0x0f, IIR_LINE);
    assert_eq!(bench.get(5), LSR_DATA | LSR_BREAK | LSR_EMPTY | LSR_IDLE | LSR_FIFO_ERROR);
    assert_eq!(bench.get(2) & 0x0f, IIR_RECEIVED, "told once");
    assert_eq!(bench.get(0), 0);
    assert_eq!(bench.get(5), LSR_EMPTY | LSR_IDLE);
}

#[test]
fn loopback_as_drivers_test_it() {
    let bench = bench();
    // Linux' autoconfiguration.
    bench.set(4, MCR_LOOP | 0x0a);
    assert_eq!(bench.get(6) & 0xf0, 0x90);
    bench.set(2, 0x07);
    for i in 0..20 {
        bench.set(0, i);
    }
    assert_eq!(bench.get(5) & LSR_OVERRUN, LSR_OVERRUN);
    assert_eq!(bench.get(5) & LSR_OVERRUN, 0, "cleared by the read");
    let got: Vec<u8> = std::iter::from_fn(|| (bench.get(5) & 1 != 0).then(|| bench.get(0))).collect();
    assert_eq!(got, (0..16).collect::<Vec<u8>>(), "the FIFO is 16 deep and the excess is lost");
    assert!(lock(&bench.tape.0).is_empty());
}

#[test]
fn without_fifo_an_overrun_replaces_the_byte() {
    let bench = bench();
    bench.set(4, MCR_LOOP);
    bench.set(0, 1);
    bench.set(0, 2);
    assert_eq!(bench.get(5) & (LSR_OVERRUN | LSR_DATA), LSR_OVERRUN | LSR_DATA);
    assert_eq!(bench.get(0), 2);
}

#[test]
fn modem_status_deltas() {
    let bench = bench();
    bench.set(1, IER_MODEM);
    bench.set(4, MCR_OUT2);
    assert_eq!(bench.get(6), 0xb0);
    bench.set(4, MCR_OUT2 | MCR_LOOP);
    assert!(bench.probe.level(4));
    assert_eq!(bench.get(2) & 0x0f, IIR_MODEM);
    assert_eq!(bench.get(6), 0x83, "CTS and DSR fell, DCD is OUT2");
    assert!(!bench.probe.level(4));
    assert_eq!(bench.get(6), 0x80);
}

#[test]
fn garbage_is_survived() {
    let bench = bench();
    bench.type_in(&[0; 100]);
    for value in 0..=255 {
        for register in 0..10 {
            bench.set(register, value);
            bench.get(register);
        }
        bench.wait(1000);
    }
}
