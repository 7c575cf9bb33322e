//! The native oracle: the host's own CPU executes a case's user code in a child process.
//!
//! The parent writes a batch of cases into shared memory and wakes the child; the child enters each case with every
//! register loaded (IRETQ) and comes back through a signal handler, for every case ends with an exception.
//! A child that dies or hangs costs its case, which is reported as broken, and is replaced.
//!
//! What keeps the code under test from doing harm: a seccomp filter stops every system call that does not come from
//! the child's own loop, the child holds no files but the arena, it dies with its parent, and it is killed when it
//! makes no progress.
//!
//! Unsafe island: fork, shared memory, signal handlers.

mod child;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::case::{
    Bits, Case, Exception, FIXED_FLAGS, FLAGS, Final, Fpu, IMAGE_SIZE, Image, Outcome, Registers, XSAVE_SIZE,
    image_index, selector,
};

/// Cases that go to the child at once.
pub const BATCH: usize = 128;
/// A batch takes milliseconds; this is for machines under heavy load.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the child is told and tells; the layout is the assembly's too.
#[repr(C, align(64))]
struct Slot {
    xsave: [u8; XSAVE_SIZE],
    gpr: [u64; 16],
    /// RIP, CS, RFLAGS, RSP, SS: for IRETQ.
    frame: [u64; 5],
    fs_base: u64,
    gs_base: u64,
    out: Out,
    image: Image,
}

#[repr(C)]
struct Out {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    signal: u64,
    vector: u64,
    error_code: u64,
    address: u64,
    xsave: [u8; XSAVE_SIZE],
}

#[repr(C)]
struct Shared {
    /// Batch number the parent asks for.
    request: AtomicU32,
    /// Batch number the child completed.
    done: AtomicU32,
    first: AtomicU32,
    count: AtomicU32,
    /// Slots completed of the present batch.
    progress: AtomicU32,
    /// FS and GS bases can be set by user code.
    fsgsbase: AtomicU32,
    slots: [Slot; BATCH],
}

/// A child process that executes cases.
pub struct Native {
    shared: *mut Shared,
    arena: i32,
    window: *mut u8,
    child: libc::pid_t,
    batch: u32,
    /// Start and end of what the child has mapped beside the arena.
    own: Vec<(u64, u64)>,
}

/// Whether user code can set FS and GS bases (CR4.FSGSBASE as Linux announces it).
pub fn has_fsgsbase() -> bool {
    // SAFETY: getauxval only reads the process's auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

impl Native {
    /// Starts the oracle; an error says what the host does not allow.
    pub fn new() -> io::Result<Self> {
        if !has_fsgsbase() {
            return Err(io::Error::other("the kernel does not let user code set FS and GS bases"));
        }
        // SAFETY: memfd_create and ftruncate touch no memory of ours beyond the name.
        let arena = unsafe { libc::memfd_create(c"turtles-arena".as_ptr(), libc::MFD_CLOEXEC) };
        if arena < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::ftruncate(arena, IMAGE_SIZE as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let window = map_shared(IMAGE_SIZE, arena)?.cast::<u8>();
        let shared = map_shared(size_of::<Shared>(), -1)?.cast::<Shared>();
        let mut native = Self { shared, arena, window, child: 0, batch: 0, own: Vec::new() };
        native.shared().fsgsbase.store(u32::from(has_fsgsbase()), Ordering::SeqCst);
        native.spawn()?;
        Ok(native)
    }

    fn shared(&self) -> &Shared {
        // SAFETY: mapped by `new`, unmapped by `drop`; only atomics are read through this reference while the
        // child is at work (slots are touched through `slot`, between batches).
        unsafe { &*self.shared }
    }

    fn slot(&mut self, index: usize) -> &mut Slot {
        // SAFETY: the child is idle whenever `&mut self` methods of ours look at slots: `execute` returns from
        // `await_batch` only when the child has finished or is dead.
        unsafe { &mut (&mut (*self.shared).slots)[index] }
    }

    fn spawn(&mut self) -> io::Result<()> {
        self.shared().done.store(self.batch, Ordering::SeqCst);
        self.shared().request.store(self.batch, Ordering::SeqCst);
        // SAFETY: the child calls only `child::main`, which makes raw system calls and never returns.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => child::main(self.shared, self.arena, self.window),
            pid => {
                self.child = pid;
                // An empty batch: when it is done, the child has made its mappings.
                match self.run_slots(0, 0) {
                    None => self.read_maps(),
                    Some(why) => {
                        Err(io::Error::other(format!("{why}; it may not be allowed seccomp filters")))
                    }
                }
            }
        }
    }

    fn read_maps(&mut self) -> io::Result<()> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child))?;
        // The stack's mapping grows towards an access below it.
        const STACK_GROWS: u64 = 64 << 20;
        let parse = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            let below = if line.ends_with("[stack]") { STACK_GROWS } else { 0 };
            Some((u64::from_str_radix(start, 16).ok()? - below, u64::from_str_radix(end, 16).ok()?))
        };
        self.own =
            maps.lines().filter_map(parse).filter(|&(start, _)| image_index(start).is_none()).collect();
        Ok(())
    }

    /// True if the child has something of its own at `address`, where the case has nothing: the case must not be
    /// executed.
    pub fn occupies(&self, address: u64) -> bool {
        // An access reaches a little further than the address of its fault.
        const REACH: u64 = 4096;
        self.own.iter().any(|&(start, end)| address.saturating_add(REACH) >= start && address < end)
    }

    /// Executes up to [`BATCH`] cases.
    pub fn execute(&mut self, cases: &[&Case]) -> Vec<Outcome> {
        assert!(cases.len() <= BATCH, "a batch holds at most {BATCH} cases");
        for (index, case) in cases.iter().enumerate() {
            fill(self.slot(index), case);
        }
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let first = outcomes.len();
            let failure = self.run_slots(first, cases.len());
            let progress = (self.shared().progress.load(Ordering::SeqCst) as usize).min(cases.len());
            for index in first..progress {
                outcomes.push(take(self.slot(index)));
            }
            if let Some(why) = failure {
                if outcomes.len() < cases.len() {
                    outcomes.push(Outcome::Broken(why));
                }
                if let Err(error) = self.spawn() {
                    let lost = format!("cannot start the native child again: {error}");
                    outcomes.resize(cases.len(), Outcome::Broken(lost));
                }
            }
        }
        outcomes
    }

    /// Lets the child execute slots `first..count`; the reason if it did not get to the end.
    fn run_slots(&mut self, first: usize, count: usize) -> Option<String> {
        self.batch = self.batch.wrapping_add(1);
        let batch = self.batch;
        let shared = self.shared();
        shared.first.store(first as u32, Ordering::SeqCst);
        shared.count.store(count as u32, Ordering::SeqCst);
        shared.progress.store(first as u32, Ordering::SeqCst);
        shared.request.store(batch, Ordering::SeqCst);
        futex_wake(&shared.request);
        let mut seen = first as u32;
        let mut since = Instant::now();
        loop {
            let done = shared.done.load(Ordering::SeqCst);
            if done == batch {
                return None;
            }
            futex_wait(&shared.done, done, Duration::from_millis(50));
            let mut status = 0;
            // SAFETY: waits for our own child, status is ours.
            if unsafe { libc::waitpid(self.child, &raw mut status, libc::WNOHANG) } == self.child {
                self.child = 0;
                return Some(format!("the native child died (wait status {status:#x})"));
            }
            let progress = shared.progress.load(Ordering::SeqCst);
            if progress != seen {
                (seen, since) = (progress, Instant::now());
            } else if since.elapsed() > PATIENCE {
                self.kill();
                return Some("the code did not end natively".to_owned());
            }
        }
    }

    fn kill(&mut self) {
        if self.child > 0 {
            // SAFETY: `child` is our own child, not yet waited for.
            unsafe {
                libc::kill(self.child, libc::SIGKILL);
                libc::waitpid(self.child, std::ptr::null_mut(), 0);
            }
            self.child = 0;
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: these were mapped and opened by `new` and are not used after this.
        unsafe {
            libc::munmap(self.shared.cast(), size_of::<Shared>());
            libc::munmap(self.window.cast(), IMAGE_SIZE);
            libc::close(self.arena);
        }
    }
}

fn map_shared(size: usize, file: i32) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_SHARED | if file < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, file, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

fn fill(slot: &mut Slot, case: &Case) {
    let start = &case.start;
    start.fpu.to_xsave(&mut slot.xsave);
    slot.gpr = start.gpr;
    let code = match case.bits {
        Bits::B64 => selector::CODE64,
        Bits::B32 => selector::CODE32,
    };
    let flags = start.rflags & FLAGS | FIXED_FLAGS;
    slot.frame = [start.rip, u64::from(code), flags, start.gpr[4], u64::from(selector::DATA)];
    slot.fs_base = start.fs_base;
    slot.gs_base = start.gs_base;
    slot.image.copy_from_slice(&*case.image);
    slot.out.signal = 0;
}

fn take(slot: &Slot) -> Outcome {
    let out = &slot.out;
    if out.signal == libc::SIGSYS as u64 {
        return Outcome::Skipped("a system call".to_owned());
    }
    let page_fault = out.vector == u64::from(x86defs::vector::PF);
    Outcome::Done(Box::new(Final {
        exception: Exception {
            vector: out.vector as u8,
            error_code: out.error_code as u32,
            address: if page_fault { out.address } else { 0 },
        },
        registers: Registers {
            gpr: out.gpr,
            rip: out.rip,
            rflags: out.rflags,
            fs_base: 0,
            gs_base: 0,
            fpu: Fpu::from_xsave(&out.xsave),
        },
        image: Box::new(slot.image),
    }))
}

fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let time = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
    };
    // SAFETY: the word and the time outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time) };
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}
