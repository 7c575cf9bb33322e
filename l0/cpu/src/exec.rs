//! placeholder
use crate::{Cpu, Exit};
impl Cpu {
    /// Runs for at most `budget` instructions.
    pub fn run(&mut self, _budget: u64) -> Exit {
        Exit::Budget
    }
    /// Executes one instruction (and delivers what is due before it).
    pub fn step(&mut self) -> Exit {
        self.run(1)
    }
}
