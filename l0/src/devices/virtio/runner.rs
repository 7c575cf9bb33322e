//! Where a device works: on its own thread, or inside the driver's notification.
//!
//! The device and its queues sit behind one lock. Whoever works holds it: the worker thread, or a vCPU
//! (activation, reset, and notifications of [`Processing::Inline`]). A reset first raises `stop`, which every
//! [`VirtQueue::pop`] looks at, so that it waits for one request at most.
//!
//! Lock order: the runner's state, then a device's own locks, then interrupts.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupts::Interrupts;
use super::queue::{QueueError, VirtQueue};
use super::{Processing, VirtioDevice};
use crate::vcpu_signal::lock;

/// Device status: the driver is ready.
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Device status: the device gave up.
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// What epoll reports.
const TOKEN_KICK: u64 = 0;
const TOKEN_HOST: u64 = 1;

struct State {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Option<VirtQueue>>,
    running: bool,
}

/// A device at work.
pub(super) struct Runner {
    state: Mutex<State>,
    interrupts: Arc<Interrupts>,
    processing: Processing,
    /// Where the worker also listens, and for which queue.
    host_input: Option<(RawFd, usize)>,
    /// Device status as the driver reads it.
    status: AtomicU8,
    /// Changes with every change of configuration registers that is not the driver's own.
    generation: AtomicU8,
    /// Bus mastering is on; without it the device must not touch memory.
    may_access_memory: AtomicBool,
    /// Queues the worker has to look at, one bit each.
    kicked: AtomicU64,
    event: EventFd,
    stop: Arc<AtomicBool>,
    quit: AtomicBool,
    complained: AtomicBool,
}

impl Runner {
    /// A runner at rest, and its thread if it needs one.
    pub(super) fn start(
        device: Box<dyn VirtioDevice>,
        interrupts: Arc<Interrupts>,
        processing: Processing,
    ) -> io::Result<(Arc<Self>, Option<JoinHandle<()>>)> {
        let queues = device.queue_sizes().iter().map(|_| None).collect();
        let host_input = device.host_input();
        let name = format!("virtio-{:?}", device.device_type()).to_lowercase();
        let runner = Arc::new(Self {
            state: Mutex::new(State { device, queues, running: false }),
            interrupts,
            processing,
            host_input,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            may_access_memory: AtomicBool::new(false),
            kicked: AtomicU64::new(0),
            event: EventFd::new(EFD_NONBLOCK)?,
            stop: Arc::default(),
            quit: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        });
        lock(&runner.state).device.connect(Waker(Arc::downgrade(&runner)));
        let mut thread = None;
        if processing == Processing::Thread || host_input.is_some() {
            let worker = Worker::new(Arc::clone(&runner))?;
            thread = Some(std::thread::Builder::new().name(name).spawn(move || worker.run())?);
        }
        Ok((runner, thread))
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn stop_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// The driver sets status bits; with DRIVER_OK, the device starts with these features.
    pub(super) fn set_status(&self, bits: u8, features: u64) {
        let before = self.status.fetch_or(bits, Ordering::AcqRel);
        if bits & !before & DRIVER_OK != 0 {
            let mut state = lock(&self.state);
            state.device.activate(features);
            state.running = before & NEEDS_RESET == 0;
            drop(state);
            self.kick_all();
        }
    }

    /// The driver enabled a queue.
    pub(super) fn set_queue(&self, index: usize, queue: Result<VirtQueue, QueueError>) {
        let mut state = lock(&self.state);
        match queue {
            Ok(queue) => {
                if let Some(slot) = state.queues.get_mut(index) {
                    *slot = Some(queue);
                }
            }
            Err(error) => self.give_up(&mut state, &error),
        }
    }

    /// Bus mastering changed.
    pub(super) fn set_memory_access(&self, allowed: bool) {
        if !self.may_access_memory.swap(allowed, Ordering::AcqRel) && allowed {
            self.kick_all();
        }
    }

    /// The driver resets the device.
    pub(super) fn reset(&self) {
        self.stop.store(true, Ordering::Release);
        let mut state = lock(&self.state);
        self.stop.store(false, Ordering::Release);
        if state.running || self.status() != 0 {
            state.device.reset();
        }
        state.running = false;
        state.queues.fill_with(|| None);
        self.kicked.store(0, Ordering::Release);
        self.status.store(0, Ordering::Release);
        self.interrupts.reset();
        drop(state);
        self.wake_worker();
    }

    /// Ends the thread; it may be in the middle of a request.
    pub(super) fn quit(&self) {
        self.stop.store(true, Ordering::Release);
        self.quit.store(true, Ordering::Release);
        self.wake_worker();
    }

    /// Queue `index` has new buffers.
    pub(super) fn kick(&self, index: usize) {
        if index < 64 {
            self.kick_bits(1 << index);
        }
    }

    fn kick_all(&self) {
        self.kick_bits(u64::MAX);
    }

    fn kick_bits(&self, bits: u64) {
        match self.processing {
            Processing::Thread => {
                self.kicked.fetch_or(bits, Ordering::AcqRel);
                self.wake_worker();
            }
            Processing::Inline => {
                self.work(&mut lock(&self.state), bits);
                if self.host_input.is_some() {
                    self.wake_worker(); // it may have to listen to the host again
                }
            }
        }
    }

    fn wake_worker(&self) {
        // Fails only when the counter is full: then the worker is awake anyway.
        let _ = self.event.write(1);
    }

    /// Processes the queues in `bits`. Notifications before the driver is ready are lost, as they should be:
    /// when it becomes ready, every queue is looked at.
    fn work(&self, state: &mut State, bits: u64) {
        let State { device, queues, running } = state;
        if !*running || !self.may_access_memory.load(Ordering::Acquire) {
            return;
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue.as_mut().filter(|_| bits >> (index % 64) & 1 != 0) else { continue };
            if let Err(error) = device.process(index, queue).and_then(|()| queue.signal()) {
                self.give_up(state, &error);
                return;
            }
        }
    }

    /// Whether input from the host would be used up; listening to it otherwise would never sleep.
    fn wants_host_input(&self, state: &State) -> bool {
        let queue = self.host_input.and_then(|(_, queue)| state.queues.get(queue));
        state.running
            && self.may_access_memory.load(Ordering::Acquire)
            && queue.is_some_and(Option::is_some)
            && state.device.wants_host_input()
    }

    /// The driver broke a queue: DEVICE_NEEDS_RESET.
    fn give_up(&self, state: &mut State, error: &QueueError) {
        state.running = false;
        let before = self.status.fetch_or(NEEDS_RESET, Ordering::AcqRel);
        let kind = state.device.device_type();
        if self.complained.swap(true, Ordering::Relaxed) {
            log::debug!("virtio {kind:?}: {error}");
        } else {
            log::warn!("virtio {kind:?}: {error}; the device waits for its driver to reset it");
        }
        if before & DRIVER_OK != 0 {
            self.config_changed();
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        if self.status() & DRIVER_OK != 0 {
            self.interrupts.raise_config();
        }
    }
}

/// How the host's side of a device (console input, a new balloon size) reaches it. Outlives it harmlessly.
#[derive(Clone)]
pub struct Waker(Weak<Runner>);

impl Waker {
    /// Has queue `index` processed. Not to be called by the device itself.
    pub fn kick(&self, index: usize) {
        if let Some(runner) = self.0.upgrade() {
            runner.kick(index);
        }
    }

    /// Tells the driver that configuration registers changed.
    pub fn config_changed(&self) {
        if let Some(runner) = self.0.upgrade() {
            runner.config_changed();
        }
    }
}

/// The thread's own data.
struct Worker {
    runner: Arc<Runner>,
    epoll: Epoll,
    host_input: Option<(RawFd, usize)>,
    listening: bool,
}

impl Worker {
    fn new(runner: Arc<Runner>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            runner.event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, TOKEN_KICK),
        )?;
        let host_input = runner.host_input;
        if let Some((fd, _)) = host_input {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::empty(), TOKEN_HOST))?;
        }
        Ok(Self { runner, epoll, host_input, listening: false })
    }

    fn run(mut self) {
        let mut events = [EpollEvent::default(); 2];
        while !self.runner.quit.load(Ordering::Acquire) {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("virtio: a device's thread ends: {error}");
                    return;
                }
            };
            let mut bits = 0;
            for event in events.iter().take(count) {
                bits |= if event.data() == TOKEN_KICK { self.take_kicks() } else { self.host_event(event) };
            }
            if !self.runner.quit.load(Ordering::Acquire) {
                let mut state = lock(&self.runner.state);
                self.runner.work(&mut state, bits);
                let listen = self.runner.wants_host_input(&state);
                drop(state);
                self.listen(listen);
            }
        }
    }

    fn take_kicks(&self) -> u64 {
        let _ = self.runner.event.read(); // to silence it; the bits are what counts
        self.runner.kicked.swap(0, Ordering::AcqRel)
    }

    fn host_event(&mut self, event: &EpollEvent) -> u64 {
        let Some((fd, queue)) = self.host_input else { return 0 };
        if event.event_set().contains(EventSet::IN) {
            return 1 << (queue % 64);
        }
        // An error is reported again and again, whatever we listen for: stop listening for good.
        log::warn!("virtio: the host's end of a device is gone; no more input will come");
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        self.host_input = None;
        0
    }

    fn listen(&mut self, listen: bool) {
        let Some((fd, _)) = self.host_input.filter(|_| listen != self.listening) else { return };
        let set = if listen { EventSet::IN } else { EventSet::empty() };
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(set, TOKEN_HOST)) {
            log::warn!("virtio: cannot listen to the host: {error}");
        }
        self.listening = listen;
    }
}
