//! User-mode instructions on the software CPU against the host's own CPU: registers, flags, vector and x87 state,
//! memory, and the exception with its error code and address. Sequences and programs go three ways: host, interpreter,
//! translator, with their instructions counted.
//!
//! The cases are the same in every run. For more of them, or others:
//!
//! - `TURTLES_FUZZ_CASES=N`: N cases of each form (default: a few)
//! - `TURTLES_FUZZ_SEED=N`: number of the first (default 0)
//!
//! `cargo run --release -p turtles-tests --bin fuzz-instructions` runs millions, or one by its name.

use turtles_tests::campaign::Campaign;
use turtles_tests::case::Bits;
use turtles_tests::generate::{Kind, Name, forms};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn check(kind: Kind, bits: Bits, default_cases: u64) {
    let mut campaign = match Campaign::new() {
        Ok(campaign) => campaign,
        Err(why) => {
            println!("SKIP user_instructions: {why}");
            return;
        }
    };
    let first = number("TURTLES_FUZZ_SEED", 0);
    let cases = number("TURTLES_FUZZ_CASES", default_cases);
    for code in forms(bits) {
        campaign.run((first..first.saturating_add(cases)).map(|number| Name { kind, bits, code, number }));
    }
    let summary = &campaign.summary;
    println!("{kind:?}, {} bits: {}", bits.count(), summary.figures());
    assert!(summary.compared > 0, "nothing was compared: {:?}", summary.skipped);
    assert!(summary.failures.is_empty(), "{}", summary.report(20));
}

#[test]
fn single_instructions_64() {
    check(Kind::Single, Bits::B64, 24);
}

#[test]
fn sequences_64() {
    check(Kind::Sequence, Bits::B64, 12);
}

#[test]
fn mutated_instructions_64() {
    check(Kind::Mutated, Bits::B64, 24);
}

#[test]
fn programs_64() {
    check(Kind::Program, Bits::B64, 2);
}

#[test]
fn single_instructions_32() {
    check(Kind::Single, Bits::B32, 16);
}

#[test]
fn sequences_32() {
    check(Kind::Sequence, Bits::B32, 8);
}

#[test]
fn mutated_instructions_32() {
    check(Kind::Mutated, Bits::B32, 16);
}
