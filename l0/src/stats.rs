//! `--stats`: how often the levels returned to L0, why, who handled it, and what that cost.

use std::fmt;
use std::sync::{Arc, Mutex};

use x86defs::vmx::reason;

use crate::vcpu_signal::lock;

/// Basic exit reasons, of which the last stands for those beyond.
const REASONS: usize = reason::LAST as usize + 2;

/// One reason's figures.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Row {
    pub count: u64,
    /// Of them, handed to L1.
    pub reflected: u64,
    /// Time that L0 took.
    pub l0_ns: u64,
    /// Handlings by L1 that have ended, with the next entry.
    pub answered: u64,
    /// L1's instructions and time from reflection to the next entry, but for its sleep.
    pub l1_instructions: u64,
    pub l1_ns: u64,
    /// Times that L1 itself returned to L0 meanwhile.
    pub l1_returns: u64,
}

/// One vCPU's figures, or all of theirs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Statistics {
    /// L1's VMX instructions.
    l1: [Row; REASONS],
    /// L2's exits.
    l2: [Row; REASONS],
    /// Times that L1 and L2 slept.
    pub sleeps: [u64; 2],
    pub entries: u64,
    /// VM entries with an event to inject.
    pub injections: u64,
    /// Walks of EPT12, for pages that EPT02 did not have.
    pub walks: u64,
}

impl Default for Statistics {
    fn default() -> Self {
        let none = [Row::default(); REASONS];
        Self { l1: none, l2: none, sleeps: [0; 2], entries: 0, injections: 0, walks: 0 }
    }
}

impl Statistics {
    /// Figures of L1's VMX instruction `reason`.
    pub fn l1(&mut self, reason: u32) -> &mut Row {
        &mut self.l1[index(reason)]
    }

    /// Figures of L2's exits for `reason`.
    pub fn l2(&mut self, reason: u32) -> &mut Row {
        &mut self.l2[index(reason)]
    }

    /// Exits of L2.
    pub fn exits(&self) -> u64 {
        self.l2.iter().map(|row| row.count).sum()
    }

    /// VMX instructions of L1 that L0 executed.
    pub fn instructions(&self) -> u64 {
        self.l1.iter().map(|row| row.count).sum()
    }

    /// How many times L0 is entered for one exit of L2: for the exit itself, and for what L1 does until the next entry.
    /// None without exits.
    pub fn multiplication(&self) -> Option<f64> {
        let exits = self.exits();
        let more: u64 = self.l2.iter().map(|row| row.l1_returns).sum();
        (exits > 0).then(|| (exits + more) as f64 / exits as f64)
    }

    fn add(&mut self, other: &Self) {
        let (l1, l2) = (self.l1.iter_mut().zip(&other.l1), self.l2.iter_mut().zip(&other.l2));
        for (to, from) in l1.chain(l2) {
            to.count += from.count;
            to.reflected += from.reflected;
            to.l0_ns += from.l0_ns;
            to.answered += from.answered;
            to.l1_instructions += from.l1_instructions;
            to.l1_ns += from.l1_ns;
            to.l1_returns += from.l1_returns;
        }
        for (to, from) in self.sleeps.iter_mut().zip(&other.sleeps) {
            *to += from;
        }
        self.entries += other.entries;
        self.injections += other.injections;
        self.walks += other.walks;
    }
}

fn index(reason: u32) -> usize {
    (reason as usize).min(REASONS - 1)
}

/// Every vCPU's figures, while they are counted.
#[derive(Clone, Default)]
pub struct AllStatistics(Vec<Arc<Mutex<Statistics>>>);

impl AllStatistics {
    /// Figures of one more vCPU.
    pub fn add_vcpu(&mut self) -> Arc<Mutex<Statistics>> {
        let statistics = Arc::new(Mutex::default());
        self.0.push(Arc::clone(&statistics));
        statistics
    }

    /// All of them together, as they are now.
    pub fn sum(&self) -> Statistics {
        self.0.iter().fold(Statistics::default(), |mut sum, one| {
            sum.add(&lock(one));
            sum
        })
    }
}

/// The table.
impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.exits() == 0 && self.instructions() == 0 {
            return f.write_str("no VMX instruction was executed");
        }
        writeln!(
            f,
            "{:<36} {:>10} {:>10} {:>10} {:>9} {:>9} {:>10} {:>8}",
            "", "", "handled by", "reflected", "ns in L0", "instr. in", "ns in L1", "entries"
        )?;
        writeln!(
            f,
            "{:<36} {:>10} {:>10} {:>10} {:>9} {:>9} {:>10} {:>8}",
            "exits of L2", "count", "L0", "to L1", "each", "L1 each", "each", "to L0"
        )?;
        for (reason, row) in by_count(&self.l2) {
            write_l2(f, reason, row)?;
        }
        writeln!(f, "VMX instructions of L1")?;
        for (reason, row) in by_count(&self.l1) {
            let each = average(row.l0_ns, row.count);
            writeln!(f, "  {:<34} {:>10} {:>10} {:>10} {each:>9}", name(reason), row.count, row.count, "-")?;
        }
        let [l1, l2] = self.sleeps;
        writeln!(
            f,
            "VM entries {}, with an event injected {}; walks of EPT12 {}; L1 slept {l1} times, L2 {l2} times",
            self.entries, self.injections, self.walks
        )?;
        match self.multiplication() {
            Some(each) => write!(f, "entries to L0 for one exit of L2 (multiplication): {each:.2}"),
            None => f.write_str("L2 had no exit"),
        }
    }
}

fn write_l2(f: &mut fmt::Formatter<'_>, reason: u32, row: &Row) -> fmt::Result {
    let handled = row.count - row.reflected;
    let entries = (row.count + row.l1_returns) as f64 / row.count.max(1) as f64;
    writeln!(
        f,
        "  {:<34} {:>10} {:>10} {:>10} {:>9} {:>9} {:>10} {entries:>8.2}",
        name(reason),
        row.count,
        handled,
        row.reflected,
        average(row.l0_ns, row.count),
        average(row.l1_instructions, row.answered),
        average(row.l1_ns, row.answered),
    )
}

fn name(reason: u32) -> &'static str {
    if reason > reason::LAST { "others" } else { reason::name(reason) }
}

fn average(sum: u64, count: u64) -> String {
    sum.checked_div(count).map_or_else(|| "-".into(), |each| each.to_string())
}

/// The rows in use, the most frequent one first.
fn by_count(rows: &[Row]) -> Vec<(u32, &Row)> {
    let mut used: Vec<_> = (0..).zip(rows).filter(|(_, row)| row.count > 0).collect();
    used.sort_by_key(|(reason, row)| (std::cmp::Reverse(row.count), *reason));
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_add_up_to_one_table() {
        let mut all = AllStatistics::default();
        for _ in 0..2 {
            let one = all.add_vcpu();
            let mut one = lock(&one);
            *one.l2(reason::CPUID) = Row {
                count: 10,
                reflected: 10,
                l0_ns: 3000,
                answered: 9,
                l1_instructions: 9000,
                l1_ns: 18000,
                l1_returns: 10,
            };
            *one.l2(reason::EXTERNAL_INTERRUPT) = Row { count: 5, l0_ns: 50, ..Row::default() };
            *one.l1(reason::VMRESUME) = Row { count: 10, l0_ns: 2000, ..Row::default() };
            one.entries = 10;
        }
        let sum = all.sum();
        assert_eq!(sum.exits(), 30);
        assert_eq!(sum.multiplication(), Some(50.0 / 30.0));
        let table = sum.to_string();
        let line = |start: &str| {
            let line = table.lines().find(|line| line.trim_start().starts_with(start));
            line.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(line("CPUID"), ["CPUID", "20", "0", "20", "300", "1000", "2000", "2.00"]);
        assert_eq!(line("external"), ["external", "interrupt", "10", "10", "0", "10", "-", "-", "1.00"]);
        assert_eq!(line("VMRESUME"), ["VMRESUME", "20", "20", "-", "200"]);
        assert!(table.ends_with("(multiplication): 1.67"), "{table}");
    }

    #[test]
    fn nothing_is_a_line_as_well() {
        assert_eq!(Statistics::default().to_string(), "no VMX instruction was executed");
        assert_eq!(Statistics::default().multiplication(), None);
    }

    #[test]
    fn reasons_beyond_the_table_are_counted_together() {
        let mut statistics = Statistics::default();
        statistics.l2(1000).count += 1;
        statistics.l2(u32::MAX).count += 1;
        assert!(statistics.to_string().contains("others"));
        assert_eq!(statistics.exits(), 2);
    }
}
