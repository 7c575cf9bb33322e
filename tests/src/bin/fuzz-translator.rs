//! Compares the translator with the interpreter on whole-machine programs, for as many as wanted.
//!
//! `fuzz-translator [--seed N] [--cases N] [--seconds N] [--pace whole|random|N]`. Without a pace each program runs at one that
//! its number picks. Exit code 1 if anything differs.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use turtles_tests::machine::lockstep::{Lockstep, Pace, pace_of};

struct Options {
    seed: u64,
    cases: u64,
    seconds: u64,
    pace: Option<Pace>,
}

fn parse() -> Result<Options, String> {
    let mut options = Options { seed: 0, cases: u64::MAX, seconds: 60, pace: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|e| format!("`{value}`: {e}"));
        match argument.as_str() {
            "--seed" => options.seed = number()?,
            "--cases" => options.cases = number()?,
            "--seconds" => options.seconds = number()?,
            "--pace" => {
                options.pace = Some(match value.as_str() {
                    "whole" => Pace::Whole,
                    "random" => Pace::Random,
                    _ => Pace::Every(number()?.max(1)),
                });
            }
            other => return Err(format!("`{other}` is not an option")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> bool {
    let mut lockstep = Lockstep::default();
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let (mut programs, mut instructions, mut failures) = (0u64, 0, 0);
    for seed in options.seed..options.seed.saturating_add(options.cases) {
        match lockstep.check(seed, options.pace.unwrap_or_else(|| pace_of(seed))) {
            Ok(count) => instructions += count,
            Err(report) => {
                failures += 1;
                println!("{report}\n");
            }
        }
        programs += 1;
        if Instant::now() > end || failures >= 5 {
            break;
        }
    }
    println!("{programs} programs, {instructions} instructions, {failures} differ");
    failures == 0
}

fn main() -> ExitCode {
    match parse() {
        Ok(options) => ExitCode::from(u8::from(!run(&options))),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(2)
        }
    }
}
