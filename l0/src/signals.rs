//! SIGINT, SIGTERM and SIGHUP end a run in order: disks are flushed, the terminal gets its old mode back. A second
//! one ends the process at once. SIGUSR1 asks for a report, where there is something to report.
//!
//! The signals are blocked in every thread and taken by one thread of their own, so no handler runs anywhere.
//!
//! `unsafe` here: signal sets and masks.

use std::io;
use std::process::exit;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use crate::devices::{MachineControl, MachineEvent};
use crate::vcpu_signal::lock;

const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

#[derive(Default)]
struct Shared {
    control: Mutex<Option<Arc<dyn MachineControl>>>,
    caught: AtomicI32,
    report: Mutex<Option<Report>>,
}

/// Says how things stand.
pub type Report = Box<dyn Fn() + Send>;

/// The signals that end a run, in our hands.
pub struct EndingSignals(Arc<Shared>);

impl EndingSignals {
    /// Takes the signals over from the system's default, SIGUSR1 only if there will be `reports`. Must come before other threads are started: they inherit
    /// the mask.
    pub fn take(reports: bool) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        // SAFETY: sigset_t is plain data that sigemptyset initializes; every pointer is to a local.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in SIGNALS.into_iter().filter(|&signal| !is_ignored(signal)) {
                libc::sigaddset(&raw mut set, signal);
            }
            if reports {
                libc::sigaddset(&raw mut set, libc::SIGUSR1);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) {
                0 => set,
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        };
        let body = {
            let shared = Arc::clone(&shared);
            move || wait_for(&set, &shared)
        };
        std::thread::Builder::new().name("signals".into()).spawn(body)?;
        Ok(Self(shared))
    }

    /// From now on the first signal ends this machine's run; until now it ended the process.
    pub fn watch(&self, control: Arc<dyn MachineControl>) {
        *lock(&self.0.control) = Some(control);
    }

    /// From now on SIGUSR1 has this called; until now it did nothing.
    pub fn report(&self, report: Report) {
        *lock(&self.0.report) = Some(report);
    }

    /// The exit code by which a shell knows that a signal ended the run, if one did.
    pub fn exit_code(&self) -> Option<u8> {
        match self.0.caught.load(Ordering::Acquire) {
            0 => None,
            signal => Some(code_of(signal)),
        }
    }
}

fn code_of(signal: libc::c_int) -> u8 {
    128 + signal as u8
}

/// What started us wants the signal to do nothing (nohup): so it stays.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: sigaction is plain data that the call fills; it changes nothing without a new action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

fn wait_for(set: &libc::sigset_t, shared: &Shared) {
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to initialized data that lives through the call.
        if unsafe { libc::sigwait(set, &raw mut signal) } != 0 {
            return;
        }
        if signal == libc::SIGUSR1 {
            if let Some(report) = lock(&shared.report).as_ref() {
                report();
            }
            continue;
        }
        let first = shared.caught.swap(signal, Ordering::AcqRel) == 0;
        match lock(&shared.control).as_ref() {
            Some(control) if first => control.request(MachineEvent::Quit),
            _ => exit(i32::from(code_of(signal))),
        }
    }
}
