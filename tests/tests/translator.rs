//! The translator against the interpreter on whole-machine programs: page-table edits, address spaces, code that changes,
//! faults, traps, breakpoints, interrupts, budgets of every size. Registers, memory, exits and counts agree to the bit.
//!
//! The programs are the same in every run. For more of them, or others: `TURTLES_FUZZ_CASES=N` programs (default: a few
//! hundred), `TURTLES_FUZZ_SEED=N` for the number of the first, or `cargo run --release -p turtles-tests --bin fuzz-translator`.

use turtles_tests::machine::lockstep::{Lockstep, Pace, pace_of};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn check(default_cases: u64, pace: impl Fn(u64) -> Pace) {
    let mut lockstep = Lockstep::default();
    let first = number("TURTLES_FUZZ_SEED", 0);
    let mut instructions = 0;
    for seed in first..first.saturating_add(number("TURTLES_FUZZ_CASES", default_cases)) {
        match lockstep.check(seed, pace(seed)) {
            Ok(count) => instructions += count,
            Err(report) => panic!("{report}"),
        }
    }
    assert!(instructions > 0);
}

#[test]
fn programs_at_any_pace() {
    check(400, pace_of);
}

#[test]
fn every_small_budget() {
    check(128, |seed| Pace::Every(1 + seed / 2));
}
