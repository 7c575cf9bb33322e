//! How devices and other vCPUs reach a vCPU: set a flag in its [`Attention`] word, wake its thread if it sleeps
//! in HLT, and knock it out of its engine if that engine does not look at the word by itself (KVM).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use turtles_cpu::attention::Attention;

/// Knocks a vCPU's thread out of an engine that cannot see the attention word (KVM_RUN).
pub type Kicker = Box<dyn Fn() + Send + Sync>;

/// One vCPU's mailbox. Shared by everyone who may disturb that vCPU.
#[derive(Default)]
pub struct VcpuSignal {
    /// The word the engines look at.
    pub attention: Arc<Attention>,
    sipi_vector: AtomicU8,
    sleep: Mutex<()>,
    wake: Condvar,
    kicker: Mutex<Option<Kicker>>,
}

impl VcpuSignal {
    /// Sets flags of [`Attention`] and makes sure that the vCPU notices.
    pub fn raise(&self, bits: u32) {
        if self.attention.raise(bits) {
            drop(lock(&self.sleep));
            self.wake.notify_all();
            if let Some(kick) = lock(&self.kicker).as_ref() {
                kick();
            }
        }
    }

    /// Clears flags that are levels (the interrupt line went away).
    pub fn clear(&self, bits: u32) {
        self.attention.clear(bits);
    }

    /// Delivers an INIT signal. A start-up IPI that came before it starts nothing any more.
    pub fn init(&self) {
        self.attention.clear(Attention::SIPI);
        self.raise(Attention::INIT);
    }

    /// Delivers a start-up IPI with its vector.
    pub fn start_up(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::SeqCst);
        self.raise(Attention::SIPI);
    }

    /// The vector of the last start-up IPI.
    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst)
    }

    /// Installs what knocks the vCPU out of its engine.
    pub fn set_kicker(&self, kicker: Option<Kicker>) {
        *lock(&self.kicker) = kicker;
    }

    /// Sleeps until one of `bits` is set, or for `at_most`.
    pub fn wait(&self, bits: u32, at_most: Option<Duration>) {
        let guard = lock(&self.sleep);
        if self.attention.get() & bits != 0 {
            return;
        }
        match at_most {
            Some(limit) => drop(self.wake.wait_timeout(guard, limit)),
            None => drop(self.wake.wait(guard)),
        }
    }
}

/// Locks, going on after another thread's panic: the data behind our locks are device registers, which are
/// valid after any prefix of an update.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
