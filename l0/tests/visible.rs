//! `--trace` and `--stats` on our own hypervisor: they agree with each other, and repeat in virtual time.

use std::path::PathBuf;

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
