//! `--trace` and `--stats` on our own hypervisor: they agree with each other, and repeat in virtual time.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use turtles::clock::ClockSource;
use turtles::config::MachineConfig;
use turtles::vm::{Machine, Outcome};

fn run(name: &str, clock: ClockSource) -> (Outcome, String) {
    let guest = turtles_guests::ALL.iter().find(|guest| guest.name == "hatchling").expect("it is embedded");
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut config = MachineConfig::for_image(guest.image);
    config.clock = clock;
    config.stats = true;
    config.trace = Some(path.clone());
    let outcome = Machine::build(&config, Box::new(std::io::sink())).and_then(Machine::run);
    let text = std::fs::read_to_string(&path).expect("the trace was written");
    (outcome.expect("the machine runs"), text)
}

#[test]
fn the_trace_has_a_line_for_everything_that_was_counted() {
    let (outcome, trace) = run("hatchling.txt", ClockSource::Host);
    let statistics = outcome.statistics.expect("they were asked for");
    // Returns have RIP in the fourth column, what happens at once has not.
    let is_return = |line: &&str| line.split_whitespace().nth(3).is_some_and(|word| word.starts_with("0x"));
    let returns = trace.lines().filter(is_return).count() as u64;
    assert!(statistics.exits() > 0, "{statistics}");
    assert_eq!(returns, statistics.exits() + statistics.instructions(), "{statistics}");
    assert_eq!(
        trace.lines().filter(|line| line.contains(" L1 ") && line.contains("→ L2 at")).count() as u64,
        statistics.entries
    );
    assert!(statistics.multiplication().is_some_and(|each| each >= 1.0));
}

#[test]
fn the_trace_of_a_run_in_virtual_time_repeats() {
    let (_, first) = run("first.txt", ClockSource::Virtual);
    let (_, second) = run("second.txt", ClockSource::Virtual);
    assert!(first.lines().count() > 100);
    assert!(first == second);
}

#[test]
fn a_name_that_ends_in_json_makes_an_array_of_events() {
    let (outcome, trace) = run("hatchling.json", ClockSource::Host);
    let mut lines = trace.lines();
    assert_eq!((lines.next(), lines.next_back()), (Some("["), Some("]")));
    let spans = lines.filter(|line| line.contains(r#""ph":"X""#)).count() as u64;
    let statistics = outcome.statistics.expect("they were asked for");
    // Each return ends one span and is one.
    assert_eq!(spans, 2 * (statistics.exits() + statistics.instructions()));
}

/// Says x on the first serial port and goes round for ever.
const ENDLESS: [u8; 8] = [0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfe];

#[test]
fn sigusr1_asks_for_the_figures_so_far() {
    let kernel = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("endless.bin");
    std::fs::write(&kernel, ENDLESS).expect("a scratch file");
    let mut turtles = Command::new(env!("CARGO_BIN_EXE_turtles"))
        .args(["run", "--engine", "soft", "--flat", "0x7c00,16", "--stats", "--kernel"])
        .arg(&kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("turtles starts");
    let mut said = [0];
    turtles.stdout.take().expect("a pipe").read_exact(&mut said).expect("the guest runs");
    let mut errors = BufReader::new(turtles.stderr.take().expect("a pipe")).lines();
    signal(&turtles, "USR1");
    assert!(errors.any(|line| line.is_ok_and(|line| line.contains("so far"))));
    let mut says = |text: &str| errors.any(|line| line.is_ok_and(|line| line.contains(text)));
    assert!(says("processor time") && says("no VMX instruction was executed"));
    signal(&turtles, "TERM");
    assert!(errors.any(|line| line.is_ok_and(|line| line.contains("what L0 saw"))));
    assert_eq!(turtles.wait().expect("it ends").code(), Some(128 + 15));
}

fn signal(process: &Child, name: &str) {
    let sent = Command::new("kill").arg(format!("-{name}")).arg(process.id().to_string()).status();
    assert!(sent.expect("kill").success());
}
