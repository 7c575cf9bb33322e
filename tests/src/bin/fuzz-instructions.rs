//! Compares the software CPU with the host's on random user-mode instructions, for as many cases as wanted.
//!
//! `fuzz-instructions [--kind single|sequence|mutated|program] [--bits 64|32] [--seed N] [--cases N] [--only TEXT]
//! [--reports N]`, or `fuzz-instructions KIND:BITS:CODE:NUMBER` for one case by its name, as a report gives it.
//! Exit code 1 if anything differs.

use std::process::ExitCode;

use turtles_tests::campaign::{Campaign, describe};
use turtles_tests::case::Bits;
use turtles_tests::generate::{self, Kind, Name, forms};

struct Options {
    kinds: Vec<Kind>,
    bits: Vec<Bits>,
    seed: u64,
    cases: u64,
    only: String,
    reports: usize,
    one: Option<Name>,
}

fn parse() -> Result<Options, String> {
    let mut options = Options {
        kinds: vec![Kind::Single, Kind::Sequence, Kind::Mutated, Kind::Program],
        bits: vec![Bits::B64, Bits::B32],
        seed: 0,
        cases: 100,
        only: String::new(),
        reports: 20,
        one: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        let parse = |text: String| text.parse::<u64>().map_err(|e| format!("`{text}`: {e}"));
        match argument.as_str() {
            "--kind" => {
                options.kinds = match value()?.as_str() {
                    "single" => vec![Kind::Single],
                    "sequence" => vec![Kind::Sequence],
                    "mutated" => vec![Kind::Mutated],
                    "program" => vec![Kind::Program],
                    other => return Err(format!("`{other}` is not single, sequence, mutated or program")),
                }
            }
            "--bits" => {
                options.bits = match value()?.as_str() {
                    "64" => vec![Bits::B64],
                    "32" => vec![Bits::B32],
                    other => return Err(format!("`{other}` is not 64 or 32")),
                }
            }
            "--seed" => options.seed = parse(value()?)?,
            "--cases" => options.cases = parse(value()?)?,
            "--only" => options.only = value()?,
            "--reports" => options.reports = parse(value()?)? as usize,
            name => options.one = Some(name.parse()?),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<bool, String> {
    let mut campaign = Campaign::new().map_err(|e| format!("the host's CPU cannot be the oracle: {e}"))?;
    if let Some(name) = options.one {
        let case = generate::case(name).ok_or("no such case")?;
        println!("{}", describe(name, &case));
        campaign.run([name]);
    } else {
        for &kind in &options.kinds {
            for &bits in &options.bits {
                if kind == Kind::Program && bits == Bits::B32 {
                    continue;
                }
                for code in forms(bits).into_iter().filter(|c| format!("{c:?}").contains(&options.only)) {
                    let numbers = options.seed..options.seed.saturating_add(options.cases);
                    campaign.run(numbers.map(|number| Name { kind, bits, code, number }));
                }
            }
        }
    }
    let summary = &campaign.summary;
    print!("{}", summary.report(options.reports));
    println!("{}", summary.figures());
    for (why, count) in &summary.skipped {
        println!("  skipped {count}: {why}");
    }
    Ok(summary.failures.is_empty())
}

fn main() -> ExitCode {
    match parse().and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(2)
        }
    }
}
