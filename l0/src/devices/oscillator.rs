//! The crystals that the timer chips count, and the one rule by which all their periodic interrupts are spaced.
//!
//! A guest may run slower than real time. Every periodic timer therefore fires at most once for all the
//! periods that have passed, and its next deadline always lies in the future; periods too short to be served
//! are thinned out to [`MIN_SPACING_NS`]. Counters that the guest reads are not affected by either.
//!
//! Must not know: any chip.

/// Least time between two interrupts of one periodic timer. A guest that programs a shorter period gets every
/// n-th interrupt; without this, one register write could keep the timer thread and the vCPU busy for ever.
pub const MIN_SPACING_NS: u64 = 50_000;

/// A fixed frequency, counted from guest time zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Oscillator {
    hz: u64,
}

impl Oscillator {
    /// An oscillator of `hz`, which is not zero.
    pub const fn new(hz: u64) -> Self {
        assert!(hz != 0);
        Self { hz }
    }

    /// Complete ticks at guest time `ns`.
    pub fn ticks_at(self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.hz) / 1_000_000_000) as u64
    }

    /// The first guest time at which `ticks` are complete; saturates.
    pub fn ns_at(self, ticks: u64) -> u64 {
        let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(self.hz));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// The first of `due`, `due + period`, `due + 2 * period`... that lies after `now`; `period` is not zero.
/// Works in any unit.
pub fn next_after(due: u64, period: u64, now: u64) -> u64 {
    if due > now {
        return due;
    }
    let missed = (now - due) / period.max(1);
    due.saturating_add(missed.saturating_add(1).saturating_mul(period.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_are_inverse_at_tick_boundaries() {
        let pit = Oscillator::new(1_193_182);
        for ticks in [0, 1, 2, 3, 1000, 65_536, 1_193_182, 1 << 40] {
            let ns = pit.ns_at(ticks);
            assert_eq!(pit.ticks_at(ns), ticks);
            assert!(ticks == 0 || pit.ticks_at(ns - 1) == ticks - 1);
        }
        assert_eq!(pit.ns_at(u64::MAX), u64::MAX);
    }

    #[test]
    fn missed_periods_are_skipped_and_the_phase_kept() {
        assert_eq!(next_after(100, 10, 99), 100);
        assert_eq!(next_after(100, 10, 100), 110);
        assert_eq!(next_after(100, 10, 155), 160);
        assert_eq!(next_after(100, 10, 160), 170);
        assert_eq!(next_after(u64::MAX - 1, 10, u64::MAX - 1), u64::MAX);
    }
}
