//! Getting a vCPU out of KVM_RUN, from other threads and after a time.
//!
//! A real-time signal interrupts KVM_RUN. Its handler also sets the `immediate_exit` byte of the thread's KVM run
//! page, so that a signal that comes after the last look at the attention word but before KVM_RUN is not lost
//! (KICK-1): the vCPU clears the byte, says that it is inside, then looks at the word; the kicker sets the word,
//! then looks whether the vCPU is inside.
//!
//! The signal's only other source is a timer of the vCPU's thread, armed while the engine runs: it ends a run that
//! nothing else ends.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::engine::EngineError;
use crate::vcpu_signal::{Kicker, lock};

thread_local! {
    /// The `immediate_exit` byte of the vCPU this thread executes; null when it executes none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

fn signal_number() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN() + 1
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let at = IMMEDIATE_EXIT.get();
    if !at.is_null() {
        // SAFETY: `Running` set the pointer on this very thread, to a byte of a mapped run page, and resets it
        // before the mapping can go away.
        unsafe { at.write_volatile(1) };
    }
}

/// Installs the handler, once for the process. System calls of devices on a vCPU's thread are restarted after
/// it; KVM_RUN never is.
fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let error = *INSTALLED.get_or_init(|| {
        // SAFETY: sigaction is plain data, for which zeros are valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: `action` is initialized, and the handler does nothing but write a byte through a thread-local.
        match unsafe { libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut()) } {
            0 => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL),
        }
    });
    if error == 0 {
        return Ok(());
    }
    let source = std::io::Error::from_raw_os_error(error);
    Err(EngineError::Kvm { what: "installing the signal handler that stops a vCPU".into(), source })
}

/// Where a vCPU is, for those who kick it.
#[derive(Default)]
pub(super) struct Target {
    /// Between the last look at the attention word and the return of KVM_RUN.
    inside: AtomicBool,
    thread: Mutex<Option<libc::pthread_t>>,
}

impl Target {
    /// From here on, a kick ends KVM_RUN. Look at the attention word after this.
    pub(super) fn go_inside(&self) {
        self.inside.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// KVM_RUN has returned.
    pub(super) fn come_out(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }

    fn kick(&self) {
        fence(Ordering::SeqCst);
        if !self.inside.load(Ordering::SeqCst) {
            return;
        }
        if let Some(thread) = *lock(&self.thread) {
            // SAFETY: the thread is alive: it resets `thread`, under the lock that we hold, before it leaves the
            // engine.
            unsafe { libc::pthread_kill(thread, signal_number()) };
        }
    }

    /// What [`crate::vcpu_signal::VcpuSignal`] calls to knock the vCPU out.
    pub(super) fn kicker(self: &Arc<Self>) -> Kicker {
        let target = Arc::clone(self);
        Box::new(move || target.kick())
    }
}

/// A timer that sends the signal to one thread.
pub(super) struct SliceTimer {
    id: libc::timer_t,
    thread: libc::pid_t,
}

// SAFETY: a POSIX timer belongs to the process: any thread may arm or delete it.
unsafe impl Send for SliceTimer {}

impl SliceTimer {
    /// A timer for the present thread, disarmed.
    fn new() -> Result<Self, EngineError> {
        // SAFETY: gettid has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        // SAFETY: sigevent is plain data, for which zeros are valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal_number();
        event.sigev_notify_thread_id = thread;
        let mut id = std::ptr::null_mut();
        // SAFETY: both pointers are to locals that live through the call.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id) } != 0 {
            let source = std::io::Error::last_os_error();
            return Err(EngineError::Kvm { what: "making a vCPU's timer".into(), source });
        }
        Ok(Self { id, thread })
    }

    /// Sends the signal after `period` and every `period` from then on; zero disarms.
    fn arm(&self, period: Duration) {
        let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(period.subsec_nanos()) };
        let value = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: `id` is a timer of ours until `drop`; `value` lives through the call.
        unsafe { libc::timer_settime(self.id, 0, &raw const value, std::ptr::null_mut()) };
    }
}

impl Drop for SliceTimer {
    fn drop(&mut self) {
        // SAFETY: `id` is a timer of ours, and this is its last use.
        unsafe { libc::timer_delete(self.id) };
    }
}

/// The present thread executes a vCPU for as long as this lives.
pub(super) struct Running<'a> {
    target: &'a Target,
    timer: &'a SliceTimer,
    /// Tied to the thread.
    not_send: PhantomData<*mut u8>,
}

impl<'a> Running<'a> {
    /// Takes the vCPU onto this thread. The signal comes on kicks while inside, and every `slice`.
    ///
    /// # Safety
    /// `immediate_exit` must point to the run page's byte, mapped until the value is dropped.
    pub(super) unsafe fn new(
        target: &'a Target,
        timer: &'a mut Option<SliceTimer>,
        immediate_exit: *mut u8,
        slice: Duration,
    ) -> Result<Self, EngineError> {
        install_handler()?;
        // SAFETY: gettid has no arguments and cannot fail.
        let here = unsafe { libc::gettid() };
        if timer.as_ref().is_none_or(|t| t.thread != here) {
            *timer = Some(SliceTimer::new()?);
        }
        let Some(timer) = timer.as_ref() else {
            unreachable!("the timer was made above");
        };
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: pthread_self has no arguments and cannot fail.
        *lock(&target.thread) = Some(unsafe { libc::pthread_self() });
        timer.arm(slice);
        Ok(Self { target, timer, not_send: PhantomData })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.timer.arm(Duration::ZERO);
        self.target.come_out();
        *lock(&self.target.thread) = None;
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}
