//! The harness of the tests across crates: a native oracle, the software CPU set up the same way, generators of
//! cases and the comparison of what came out.
//!
//! - [`case`]: what one case is (registers, memory, code) and what may come of it
//! - [`generate`]: cases from seeds
//! - [`native`]: the host's CPU as the oracle; [`soft`]: the software CPU as the subject, interpreting or translating
//! - [`compare`]: the two finals, less what the architecture leaves open; [`campaign`]: many cases, one report

pub mod campaign;
pub mod case;
pub mod compare;
pub mod generate;
pub mod machine;
pub mod native;
pub mod random;
pub mod soft;
