//! The local APIC's timer: one-shot, periodic and TSC-deadline.
//!
//! Pure arithmetic on guest time; the owner arms the machine's clock with [`ApicTimer::wake_at`] and delivers
//! the interrupt when [`ApicTimer::expire`] says so.
//!
//! SDM volume 3, "APIC Timer" and "TSC-Deadline Mode".

use crate::clock::Clock;
use crate::devices::oscillator::{MIN_SPACING_NS, Oscillator, next_after};

/// Frequency of the timer's input, before the divider. CPUID leaf 15H may state it as the crystal clock.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

const INPUT: Oscillator = Oscillator::new(APIC_TIMER_HZ);

/// What LVT timer bits 18:17 select.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The reserved encoding: the timer does not count.
    Reserved,
}

impl TimerMode {
    pub(super) fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Debug)]
pub(super) struct ApicTimer {
    mode: TimerMode,
    divide_config: u32,
    initial: u32,
    /// Next expiry, in guest time.
    due: Option<u64>,
    last_expiry: u64,
    /// IA32_TSC_DEADLINE; zero is disarmed.
    tsc_deadline: u64,
    /// What the guest's TSC is ahead of the clock's (IA32_TSC_ADJUST).
    tsc_offset: u64,
}

impl ApicTimer {
    pub(super) fn new() -> Self {
        Self {
            mode: TimerMode::OneShot,
            divide_config: 0,
            initial: 0,
            due: None,
            last_expiry: 0,
            tsc_deadline: 0,
            tsc_offset: 0,
        }
    }

    /// Back to the state after INIT; the TSC is not the APIC's and keeps its offset.
    pub(super) fn reset(&mut self) {
        *self = Self { tsc_offset: self.tsc_offset, ..Self::new() };
    }

    /// Nanoseconds that `count` takes.
    fn span(&self, count: u32) -> u64 {
        INPUT.ns_at(u64::from(count) * u64::from(self.divisor()))
    }

    fn divisor(&self) -> u32 {
        let code = (self.divide_config & 3) | ((self.divide_config >> 1) & 4);
        // 000 is divide by 2, ... 110 by 128, 111 by 1.
        if code == 7 { 1 } else { 2 << code }
    }

    pub(super) fn divide_config(&self) -> u32 {
        self.divide_config
    }

    /// A new divider changes how fast the present count goes on, not its value.
    pub(super) fn set_divide_config(&mut self, value: u32, now: u64) {
        let left = self.current_count(now);
        self.divide_config = value & 0xb;
        if self.due.is_some() && self.mode != TimerMode::TscDeadline {
            self.due = Some(now.saturating_add(self.span(left)));
        }
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.initial
    }

    /// Starts the count; zero stops it. Ignored in TSC-deadline mode.
    pub(super) fn set_initial_count(&mut self, value: u32, now: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = value;
        let counts = value != 0 && self.mode != TimerMode::Reserved;
        self.due = counts.then(|| now.saturating_add(self.span(value)));
    }

    pub(super) fn current_count(&self, now: u64) -> u32 {
        match (self.mode, self.due) {
            (TimerMode::OneShot | TimerMode::Periodic, Some(due)) => {
                let input = INPUT.ticks_at(due.saturating_sub(now));
                input.div_ceil(u64::from(self.divisor())).min(u64::from(u32::MAX)) as u32
            }
            _ => 0,
        }
    }

    /// The LVT's mode bits were written. Into and out of TSC-deadline mode the timer is disarmed.
    pub(super) fn set_mode(&mut self, mode: TimerMode) {
        let counting = |m| matches!(m, TimerMode::OneShot | TimerMode::Periodic);
        if self.mode != mode && !(counting(self.mode) && counting(mode)) {
            self.due = None;
            self.tsc_deadline = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// IA32_TSC_DEADLINE as RDMSR shows it.
    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// WRMSR to IA32_TSC_DEADLINE; without effect in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, clock: &Clock, now: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = value;
            self.find_deadline(clock, now);
        }
    }

    pub(super) fn set_tsc_offset(&mut self, offset: u64, clock: &Clock, now: u64) {
        self.tsc_offset = offset;
        if self.mode == TimerMode::TscDeadline {
            self.find_deadline(clock, now);
        }
    }

    fn find_deadline(&mut self, clock: &Clock, now: u64) {
        let base = clock.tsc_at(now);
        let tsc = base.wrapping_add(self.tsc_offset);
        self.due = match self.tsc_deadline {
            0 => None,
            at if at <= tsc => Some(now),
            at => Some(clock.ns_at_tsc(base.saturating_add(at - tsc))),
        };
    }

    /// True if the timer expired up to `now`: once, however many periods have passed.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        let Some(due) = self.due.filter(|&due| due <= now) else { return false };
        self.last_expiry = now;
        self.due = match self.mode {
            TimerMode::Periodic => Some(next_after(due, self.span(self.initial).max(1), now)),
            _ => None,
        };
        self.tsc_deadline = 0;
        true
    }

    /// When the owner should call [`Self::expire`] next.
    pub(super) fn wake_at(&self) -> Option<u64> {
        match self.mode {
            TimerMode::Periodic => {
                self.due.map(|due| due.max(self.last_expiry.saturating_add(MIN_SPACING_NS)))
            }
            _ => self.due,
        }
    }
}
