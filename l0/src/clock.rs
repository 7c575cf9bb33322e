//! Guest time: one clock that the TSC and every timer chip derive from, and the timers themselves.
//!
//! `--clock host` (default) follows the host's monotonic clock; a thread fires due timers. `--clock virtual`
//! counts executed instructions instead: the vCPU loop moves the clock and fires due timers between runs, so a
//! run of one vCPU repeats exactly.
//!
//! Invariants: `now_ns` never goes back. A timer fires on the thread that drives the clock, with no lock of
//! this module held, so a client may arm and disarm from its `fire`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::vcpu_signal::lock;

/// Where guest time comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClockSource {
    /// The host's monotonic clock.
    Host,
    /// Executed instructions.
    Virtual,
}

/// Virtual mode: nanoseconds per executed instruction, as a guest at 1 GHz and one instruction a cycle.
pub const VIRTUAL_NS_PER_INSTRUCTION: u64 = 1;

/// Gets told when its timer is due.
pub trait TimerClient: Send + Sync {
    /// The timer armed for a time at or before `now_ns` is due. It is disarmed; the client may arm it again.
    fn fire(&self, now_ns: u64);
}

/// Names one timer of a [`Clock`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub struct TimerId(usize);

#[derive(Default)]
struct Timers {
    clients: Vec<(Weak<dyn TimerClient>, Option<u64>)>,
    armed: BTreeSet<(u64, TimerId)>,
    stop: bool,
}

/// The machine's clock.
pub struct Clock {
    source: ClockSource,
    start: Instant,
    tsc_hz: u64,
    /// The TSC's value at guest time 0.
    tsc_start: u64,
    virtual_ns: AtomicU64,
    /// Virtual mode: guest time spent halted, in nanoseconds.
    idle_ns: AtomicU64,
    timers: Mutex<Timers>,
    changed: Condvar,
}

impl Clock {
    /// A clock that starts at zero now. `tsc_hz` is the guest's TSC frequency.
    pub fn new(source: ClockSource, tsc_hz: u64) -> Arc<Self> {
        Self::with_tsc_start(source, tsc_hz, 0)
    }

    /// As [`Clock::new`], with a TSC that reads `tsc_start` now: the host's own, where a KVM guest reads that.
    pub fn with_tsc_start(source: ClockSource, tsc_hz: u64, tsc_start: u64) -> Arc<Self> {
        Arc::new(Self {
            source,
            start: Instant::now(),
            tsc_hz,
            tsc_start,
            virtual_ns: AtomicU64::new(0),
            idle_ns: AtomicU64::new(0),
            timers: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Which source drives this clock.
    pub fn source(&self) -> ClockSource {
        self.source
    }

    /// The guest's TSC frequency.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Nanoseconds of guest time since the machine started.
    pub fn now_ns(&self) -> u64 {
        match self.source {
            ClockSource::Host => self.start.elapsed().as_nanos() as u64,
            ClockSource::Virtual => self.virtual_ns.load(Ordering::Relaxed),
        }
    }

    /// The TSC value at guest time `ns`.
    pub fn tsc_at(&self, ns: u64) -> u64 {
        self.tsc_start.wrapping_add((u128::from(ns) * u128::from(self.tsc_hz) / 1_000_000_000) as u64)
    }

    /// The first guest time at which the TSC is at least `tsc`.
    pub fn ns_at_tsc(&self, tsc: u64) -> u64 {
        let tsc = tsc.saturating_sub(self.tsc_start);
        (u128::from(tsc) * 1_000_000_000).div_ceil(u128::from(self.tsc_hz)).min(u128::from(u64::MAX)) as u64
    }

    /// Moves guest time to `ns` (never back). Virtual mode's driver and the tests of the chips use it.
    pub fn advance_to(&self, ns: u64) {
        self.virtual_ns.fetch_max(ns, Ordering::Relaxed);
    }

    /// Virtual mode: the vCPU has executed for `ticks` since power-on.
    pub fn executed(&self, ticks: u64) {
        if self.source == ClockSource::Virtual {
            let busy = ticks.wrapping_mul(VIRTUAL_NS_PER_INSTRUCTION);
            self.advance_to(busy.wrapping_add(self.idle_ns.load(Ordering::Relaxed)));
        }
    }

    /// Virtual mode, everything halted: lets time pass until the next timer is due. False if none is armed.
    pub fn skip_to_next_deadline(&self) -> bool {
        let Some(at) = self.next_deadline() else { return false };
        let idle = at.saturating_sub(self.now_ns());
        self.idle_ns.fetch_add(idle, Ordering::Relaxed);
        self.advance_to(at);
        true
    }

    /// Virtual mode: how many instructions may be executed before the next timer is due.
    pub fn instructions_to_deadline(&self) -> Option<u64> {
        let left = self.next_deadline()?.saturating_sub(self.now_ns());
        Some(left.div_ceil(VIRTUAL_NS_PER_INSTRUCTION))
    }

    /// Adds a timer, disarmed.
    pub fn add_timer(&self, client: Weak<dyn TimerClient>) -> TimerId {
        let mut timers = lock(&self.timers);
        timers.clients.push((client, None));
        TimerId(timers.clients.len() - 1)
    }

    /// Arms `id` for guest time `deadline_ns`, in place of what it was armed for.
    pub fn arm(&self, id: TimerId, deadline_ns: u64) {
        self.set(id, Some(deadline_ns));
    }

    /// Disarms `id`.
    pub fn disarm(&self, id: TimerId) {
        self.set(id, None);
    }

    fn set(&self, id: TimerId, deadline: Option<u64>) {
        let mut timers = lock(&self.timers);
        let before = std::mem::replace(&mut timers.clients[id.0].1, deadline);
        if before == deadline {
            return;
        }
        if let Some(at) = before {
            timers.armed.remove(&(at, id));
        }
        if let Some(at) = deadline {
            timers.armed.insert((at, id));
            if timers.armed.first() == Some(&(at, id)) {
                self.changed.notify_all();
            }
        }
    }

    /// The earliest armed deadline.
    pub fn next_deadline(&self) -> Option<u64> {
        lock(&self.timers).armed.first().map(|&(at, _)| at)
    }

    /// Fires every timer due at the present guest time; in virtual mode the vCPU loop calls this.
    pub fn fire_due(&self) {
        let now = self.now_ns();
        while let Some(client) = self.take_due(now) {
            if let Some(client) = client.upgrade() {
                client.fire(now);
            }
        }
    }

    fn take_due(&self, now: u64) -> Option<Weak<dyn TimerClient>> {
        let mut timers = lock(&self.timers);
        let (at, id) = *timers.armed.first()?;
        if at > now {
            return None;
        }
        timers.armed.pop_first();
        let slot = &mut timers.clients[id.0];
        slot.1 = None;
        Some(slot.0.clone())
    }

    /// Host mode: starts the thread that fires timers. It ends after [`Clock::stop`].
    pub fn start_thread(self: &Arc<Self>) -> std::io::Result<()> {
        let clock = Arc::clone(self);
        std::thread::Builder::new().name("timers".into()).spawn(move || clock.drive()).map(drop)
    }

    /// Ends the timer thread.
    pub fn stop(&self) {
        lock(&self.timers).stop = true;
        self.changed.notify_all();
    }

    fn drive(&self) {
        loop {
            self.fire_due();
            let timers = lock(&self.timers);
            if timers.stop {
                return;
            }
            match timers.armed.first() {
                None => drop(self.changed.wait(timers)),
                Some(&(at, _)) => {
                    let left = at.saturating_sub(self.now_ns());
                    if left > 0 {
                        drop(self.changed.wait_timeout(timers, Duration::from_nanos(left)));
                    }
                }
            }
        }
    }
}
