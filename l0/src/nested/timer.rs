//! The VMX-preemption timer's alarm: makes the vCPU look at the deadline when it may have passed.
//!
//! Hypervisors load the timer on every entry, mostly with what is left of one same deadline. Arming the machine's clock
//! takes a lock and may wake a thread, so an alarm that rings too early is left as it is, and set anew when it rings.

use std::sync::{Arc, Mutex, Weak};

use turtles_cpu::attention::Attention;

use crate::clock::{Clock, TimerClient, TimerId};
use crate::vcpu_signal::{VcpuSignal, lock};

struct Alarm {
    /// Guest time to ring at; none while L2 does not run, or runs without the timer.
    wanted: Option<u64>,
    /// What the clock is armed for.
    armed: Option<u64>,
}

struct Shared {
    clock: Arc<Clock>,
    id: TimerId,
    signal: Arc<VcpuSignal>,
    alarm: Mutex<Alarm>,
}

impl TimerClient for Shared {
    fn fire(&self, now_ns: u64) {
        let mut alarm = lock(&self.alarm);
        alarm.armed = None;
        match alarm.wanted {
            Some(at) if at > now_ns => {
                alarm.armed = Some(at);
                self.clock.arm(self.id, at);
            }
            Some(_) => self.signal.raise(Attention::PREEMPTION),
            None => {}
        }
    }
}

/// One vCPU's alarm.
pub struct PreemptionTimer(Arc<Shared>);

impl PreemptionTimer {
    /// An alarm on `clock` that calls for `signal`'s vCPU.
    pub fn new(clock: &Arc<Clock>, signal: &Arc<VcpuSignal>) -> Self {
        Self(Arc::new_cyclic(|this: &Weak<Shared>| Shared {
            clock: Arc::clone(clock),
            id: clock.add_timer(this.clone()),
            signal: Arc::clone(signal),
            alarm: Mutex::new(Alarm { wanted: None, armed: None }),
        }))
    }

    /// Rings once the clock's TSC has reached `tsc`.
    pub fn set(&self, tsc: u64) {
        let at = self.0.clock.ns_at_tsc(tsc);
        let mut alarm = lock(&self.0.alarm);
        alarm.wanted = Some(at);
        if alarm.armed.is_none_or(|armed| armed > at) {
            alarm.armed = Some(at);
            self.0.clock.arm(self.0.id, at);
        }
    }

    /// Rings no more.
    pub fn cancel(&self) {
        lock(&self.0.alarm).wanted = None;
        self.0.signal.clear(Attention::PREEMPTION);
    }
}
