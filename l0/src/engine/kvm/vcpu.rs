//! A vCPU in KVM, and its run loop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{Activity, CpuState, Event, EventKind, Shadow};
use turtles_cpu::vmx::Operation;
use turtles_cpu::{Cpu, Exit};
use x86defs::rflags;

use super::hop::Hop;
use super::kick::{Running, SliceTimer, Target};
use super::l2::{L2Share, L2Stats, Lent};
use super::transfer::{ALL_IN_RUN_PAGE, Image};
use super::traps::{Fit, Traps};
use super::tsc::TscSync;
use super::tunables::UNFIT_BURST;
use super::user::UserShare;
use super::{KvmHost, KvmVm, LostFeature, Share, Stats, convert, failed, ioctl, traps};
use crate::engine::{Engine, EngineError};
use crate::vcpu_signal::VcpuSignal;

/// KVM cannot count instructions: [`Engine::run`] ends after this time instead of its budget.
pub(super) const SLICE: Duration = Duration::from_millis(100);
/// Smaller budgets are meant exactly, and only the software CPU counts.
const EXACT_BUDGET: u64 = 1000;
/// KVM giving up again so soon after an entry means that it cannot execute what the guest does at present: about
/// what moving the vCPU to the software CPU and back costs.
const SOON: Duration = Duration::from_micros(50);
/// The most instructions the software CPU executes before KVM is tried again: about the time of one KVM entry's
/// failure a hundred times over.
const LONGEST_BURST: u64 = 4096;
/// Where KVM would not stop as soon as a waiting interrupt can be taken, the software CPU goes on to that point, for
/// this many instructions at a time.
const WINDOW_BURST: u64 = 4096;
/// CPUID.1:ECX.VMX.
const CPUID_VMX: u32 = 1 << 5;

/// What the run loop does next.
pub(super) enum Next {
    /// Enter KVM again.
    Again,
    /// Move the state home, then start again.
    Home,
    /// Move the state home and execute instructions on the software CPU.
    Software(u64),
    /// The software CPU executes the instruction that KVM has begun.
    SoftwareInstead,
    /// Return to the owner.
    Leave(Exit),
}

/// How KVM_RUN ended.
pub(super) enum Ended {
    /// With an exit reason.
    Exit(u32),
    /// By a signal.
    Interrupted,
    /// KVM could not reach memory for the guest.
    MemoryFailure,
}

/// A vCPU in KVM.
pub struct KvmVcpu {
    index: usize,
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<KvmVm>,
    pub(super) signal: Arc<VcpuSignal>,
    pub(super) target: Arc<Target>,
    timer: Option<SliceTimer>,
    pub(super) slice_end: Instant,
    pub(super) image: Image,
    tsc: TscSync,
    pub(super) tsc_hz: u64,
    /// The state is in KVM; `Cpu::state` is old.
    resident: bool,
    /// The instruction KVM exited for is finished by the next KVM_RUN.
    pub(super) unfinished: bool,
    /// An external interrupt can be queued.
    ready: bool,
    /// KVM stored registers in the run page when it returned last.
    pub(super) in_run_page: bool,
    /// The last exit that was of a kind to decide needed the whole state: ask KVM to store it.
    state_wanted: bool,
    /// CR8 as KVM was given it.
    pub(super) cr8: u8,
    /// How long the software CPU ran when KVM gave up last, and when KVM was entered after that.
    burst: u64,
    pub(super) entered: Instant,
    /// Where the last signal found the guest, if nothing has happened since.
    last_kick_at: Option<u64>,
    /// The software CPU's count when state was last moved out, or when it did nothing KVM must know of.
    instructions_seen: u64,
    warned_of_entry: bool,
    pub(super) user: UserShare,
    /// Set where the guest is shown VMX and KVM executes its ring 0.
    pub(super) traps: Option<Traps>,
    /// Guests of the guest.
    pub(super) l2: Option<Box<L2Share>>,
    lost: Vec<LostFeature>,
    /// KVM has failed: the software CPU executes from now on.
    gone: bool,
    /// Changes engines at random.
    pub(super) hop: Option<Hop>,
    pub(super) stats: Stats,
}

impl KvmVcpu {
    /// A vCPU with number `index` in `vm`, which others reach through `signal`. `cpuid` answers what the guest's
    /// CPUID shows in the state after reset, by leaf and subleaf; `tsc_hz` is the frequency of its owner's clock.
    pub(super) fn new(
        vm: &Arc<KvmVm>,
        index: usize,
        signal: Arc<VcpuSignal>,
        tsc_hz: u64,
        cpuid: &dyn Fn(u32, u32) -> [u32; 4],
    ) -> Result<Self, EngineError> {
        let fd = vm.fd.create_vcpu(index as u64).map_err(failed(format!("creating vCPU {index}")))?;
        let (entries, lost) = vm.host.cpuid_entries(cpuid)?;
        fd.set_cpuid2(&entries).map_err(failed("setting CPUID"))?;
        // Otherwise the software CPU answers CPUID, or nobody can.
        if index == 0 && !lost.is_empty() && vm.host.share == Share::All {
            let names: Vec<_> = lost.iter().map(ToString::to_string).collect();
            log::warn!(
                "this host's KVM does not give the guest all of its CPU model: no {}",
                names.join(", ")
            );
        }
        set_tsc_frequency(vm, &fd, tsc_hz);
        let target = Arc::new(Target::default());
        signal.set_kicker(Some(target.kicker()));
        let now = Instant::now();
        let traps = if cpuid(1, 0)[2] & CPUID_VMX != 0 && vm.host.share == Share::All {
            Some(traps::vmxe_bit(&fd)?)
        } else {
            None
        };
        Ok(Self {
            index,
            image: Image::new(&vm.host, &fd)?,
            tsc: TscSync::new(&fd),
            tsc_hz,
            fd,
            vm: Arc::clone(vm),
            signal,
            target,
            timer: None,
            slice_end: now,
            resident: false,
            unfinished: false,
            ready: false,
            in_run_page: false,
            state_wanted: false,
            cr8: 0,
            burst: 1,
            entered: now,
            last_kick_at: None,
            instructions_seen: 0,
            warned_of_entry: false,
            user: UserShare::default(),
            traps: traps.map(Traps::new),
            l2: None,
            lost,
            gone: false,
            hop: None,
            stats: Stats::default(),
        })
    }

    /// What has happened so far.
    pub fn stats(&self) -> Stats {
        let l2 = self.l2_stats();
        Stats {
            runs: self.stats.runs + l2.stretches,
            l2_stretches: l2.stretches,
            l2_micros: l2.micros,
            l2_misses: l2.misses,
            l2_guests: l2.guests,
            ..self.stats
        }
    }

    /// From now on, changes between KVM and the software CPU at random: a test mode.
    pub fn hop(&mut self, index: usize) {
        self.hop = Some(Hop::new(index));
    }

    /// Features of the CPU model that the guest does not see, because KVM cannot give them.
    pub fn lost_features(&self) -> &[LostFeature] {
        &self.lost
    }

    /// The KVM that it is in.
    pub fn host(&self) -> &KvmHost {
        &self.vm.host
    }

    /// What L2 did on KVM.
    pub fn l2_stats(&self) -> L2Stats {
        self.l2.as_ref().map_or_else(L2Stats::default, |l2| l2.stats())
    }

    /// L1's own KVM VM knows nothing of the controls and tables that its guests run under: they have others.
    fn run_l2(&mut self, cpu: &mut Cpu, budget: u64) -> Result<Exit, EngineError> {
        let Some(l2) = &mut self.l2 else {
            return Ok(self.execute(cpu, budget).unwrap_or(Exit::Budget));
        };
        let before = cpu.state.instructions;
        let lent = Lent { attention: &self.signal.attention, target: &self.target, timer: &mut self.timer };
        let exit = l2.run(cpu, budget, lent);
        self.stats.software_instructions += cpu.state.instructions.wrapping_sub(before);
        exit
    }

    fn run_loop(&mut self, cpu: &mut Cpu) -> Result<Exit, EngineError> {
        loop {
            let next = if self.resident { self.enter(cpu)? } else { self.start(cpu)? };
            let exit = match next {
                Next::Again if self.resident && self.is_to_leave(cpu) => self.move_home(cpu)?,
                Next::Again => None,
                Next::Home => self.move_home(cpu)?,
                Next::Software(instructions) => {
                    let exit = self.move_home(cpu)?;
                    if exit.is_some() { exit } else { self.execute(cpu, instructions) }
                }
                Next::SoftwareInstead => self.answer_in_software(cpu)?,
                Next::Leave(exit) => Some(self.move_home(cpu)?.unwrap_or(exit)),
            };
            if let Some(exit) = exit {
                return Ok(exit);
            }
        }
    }

    /// True if the state is to go home although KVM could go on.
    fn is_to_leave(&mut self, cpu: &Cpu) -> bool {
        self.hop.as_mut().is_some_and(Hop::leaves) || self.idt_changed(cpu)
    }

    /// The state is at home: decides what happens between instructions as the software CPU does, and moves it in.
    fn start(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        let attention = self.signal.attention.get();
        if attention & OWNERS != 0 {
            return Ok(Next::Leave(Exit::Attention));
        }
        let state = &mut cpu.state;
        match state.activity {
            Activity::Active => {}
            Activity::Shutdown => return Ok(Next::Leave(Exit::Shutdown)),
            Activity::Halted if wakes(state, attention) => state.activity = Activity::Active,
            Activity::Halted | Activity::WaitForSipi => return Ok(Next::Leave(Exit::Halted)),
        }
        if !convert::kvm_can_hold_events(state) {
            return Ok(Next::Software(1));
        }
        if self.may_miss_a_window(cpu, attention & Attention::INTERRUPT != 0) {
            return Ok(Next::Software(WINDOW_BURST));
        }
        if self.arm(cpu)? == Fit::Software {
            return Ok(Next::Software(UNFIT_BURST));
        }
        if let Some(burst) = self.hop.as_mut().and_then(Hop::burst) {
            return Ok(Next::Software(burst));
        }
        let state = &cpu.state;
        let open = state.injected.is_none() && can_take_interrupts(state);
        let nmi = attention & Attention::NMI != 0 && !state.nmi_blocked;
        if open && !nmi {
            if cpu.want_interrupt_window {
                return Ok(Next::Leave(Exit::InterruptWindow));
            }
            if attention & Attention::INTERRUPT != 0 {
                self.acknowledge(cpu);
            }
        }
        self.move_in(cpu)?;
        Ok(Next::Again)
    }

    /// True if KVM would not come back as soon as an interrupt can be taken: one that waits, or one that may be
    /// waiting for CR8 to be lowered (a KVM that emulates does not tell of that).
    fn may_miss_a_window(&self, cpu: &mut Cpu, interrupt_waits: bool) -> bool {
        self.vm.host.emulates_ring0 && (interrupt_waits || cpu.bus().cr8() != 0)
    }

    fn acknowledge(&mut self, cpu: &mut Cpu) {
        if let Some(vector) = cpu.bus().acknowledge_interrupt() {
            let kind = EventKind::ExternalInterrupt;
            cpu.state.injected = Some(Event { vector, kind, error_code: None, instruction_length: 0 });
            self.stats.interrupts += 1;
        }
    }

    /// The state is in KVM: gives it what is due, enters, and answers its exit.
    fn enter(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        self.set_immediate_exit(0);
        self.target.go_inside();
        let ended = self.enter_inside(cpu);
        self.target.come_out();
        match ended {
            Ok(Ok(ended)) => self.answer(cpu, ended),
            Ok(Err(next)) => Ok(next),
            Err(error) => self.give_up(cpu, error),
        }
    }

    /// KVM has failed. If it still gives the state back, the guest goes on in the software CPU.
    fn give_up(&mut self, cpu: &mut Cpu, error: EngineError) -> Result<Next, EngineError> {
        self.in_run_page = self.registers_wait();
        if self.move_out(cpu).is_err() {
            return Err(error);
        }
        log::warn!("{error}; the software CPU goes on with vCPU {}", self.index);
        self.gone = true;
        Ok(Next::Leave(Exit::Budget))
    }

    fn enter_inside(&mut self, cpu: &mut Cpu) -> Result<Result<Ended, Next>, EngineError> {
        let attention = self.signal.attention.get();
        if attention & OWNERS != 0 {
            return Ok(Err(Next::Leave(Exit::Attention)));
        }
        if attention & Attention::NMI != 0 {
            if self.registers_wait() {
                // It came since the state moved in: KVM would forget it when it takes the registers.
                return Ok(Err(Next::Home));
            }
            self.signal.attention.clear(Attention::NMI);
            self.fd.nmi().map_err(failed("delivering an NMI"))?;
        }
        if self.ready && cpu.want_interrupt_window {
            return Ok(Err(Next::Leave(Exit::InterruptWindow)));
        }
        let mut wanted = attention & Attention::INTERRUPT != 0;
        if self.ready && wanted {
            if let Some(vector) = cpu.bus().acknowledge_interrupt() {
                ioctl::queue_interrupt(&self.fd, vector).map_err(failed("delivering an interrupt"))?;
                self.stats.interrupts += 1;
            }
            wanted = self.signal.attention.get() & Attention::INTERRUPT != 0;
        }
        if self.may_miss_a_window(cpu, wanted) {
            return Ok(Err(Next::Software(WINDOW_BURST)));
        }
        self.cr8 = cpu.bus().cr8();
        let valid = match (self.image.uses_run_page(), self.state_wanted) {
            (true, true) => ALL_IN_RUN_PAGE,
            (true, false) if self.traps.is_some() => u64::from(kvm_bindings::KVM_SYNC_X86_SREGS),
            _ => 0,
        };
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = u8::from(wanted || cpu.want_interrupt_window);
        run.cr8 = u64::from(self.cr8);
        run.kvm_valid_regs = valid;
        self.kvm_run(cpu).map(Ok)
    }

    /// KVM_RUN, and what must be looked at however it ended.
    pub(super) fn kvm_run(&mut self, cpu: &mut Cpu) -> Result<Ended, EngineError> {
        self.stats.runs += 1;
        self.unfinished = false;
        let result = self.fd.run().map(|exit| matches!(exit, kvm_ioctls::VcpuExit::MemoryFault { .. }));
        let run = self.fd.get_kvm_run();
        self.ready = run.ready_for_interrupt_injection != 0 && run.if_flag != 0;
        self.in_run_page = run.kvm_valid_regs == ALL_IN_RUN_PAGE;
        let (reason, cr8) = (run.exit_reason, (run.cr8 & 15) as u8);
        if cr8 != self.cr8 {
            self.cr8 = cr8;
            cpu.bus().set_cr8(cr8);
        }
        match result.map_err(|error| (error.errno(), error)) {
            Ok(false) => Ok(Ended::Exit(reason)),
            Ok(true) | Err((libc::EFAULT, _)) => Ok(Ended::MemoryFailure),
            Err((libc::EINTR | libc::EAGAIN, _)) => Ok(Ended::Interrupted),
            Err((_, error)) => Err(failed("running the guest")(error)),
        }
    }

    pub(super) fn set_immediate_exit(&mut self, value: u8) {
        let at = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: a byte of the mapped run page; volatile, because the signal handler writes it too.
        unsafe { at.write_volatile(value) };
    }

    fn move_in(&mut self, cpu: &mut Cpu) -> Result<(), EngineError> {
        self.refresh_translations(cpu)?;
        self.tsc.sync(&self.fd, cpu, self.tsc_hz)?;
        let nmi = self.signal.attention.take(Attention::NMI) != 0;
        let cr4 = cpu.state.cr4;
        if let Some(traps) = &mut self.traps {
            cpu.state.cr4 = traps.hide_vmxe(cr4);
        }
        let moved = self.image.move_in(&mut self.fd, cpu, nmi);
        cpu.state.cr4 = cr4;
        moved?;
        cpu.state.injected = None;
        self.stats.moved_in += 1;
        self.resident = true;
        self.ready = false;
        self.entered = Instant::now();
        Ok(())
    }

    /// STALE-1: the software CPU has executed for this vCPU since KVM did.
    fn refresh_translations(&mut self, cpu: &Cpu) -> Result<(), EngineError> {
        let executed = cpu.state.instructions.wrapping_sub(self.instructions_seen);
        match (executed, self.vm.host.shadow_paging) {
            (0, _) => Ok(()),
            (_, false) => self.image.flush_tlb(&self.fd),
            // DEVIATION: a single instruction that KVM could not emulate is taken to write no page-table entry. What
            // system software writes those with (MOV, XCHG, CMPXCHG, AND, OR, BTS, STOS, MOVS) KVM emulates.
            (1, true) => Ok(()),
            (_, true) => self.vm.drop_shadow_pages(),
        }
    }

    /// Registers in the run page that KVM has not taken yet: they are nowhere else.
    pub(super) fn registers_wait(&mut self) -> bool {
        self.fd.get_kvm_run().kvm_dirty_regs != 0
    }

    /// Finishes the instruction under way and moves the state out. An exit if the guest came to an end meanwhile.
    fn move_home(&mut self, cpu: &mut Cpu) -> Result<Option<Exit>, EngineError> {
        if !self.resident {
            return Ok(None);
        }
        let mut exit = None;
        while self.unfinished || self.registers_wait() {
            self.set_immediate_exit(1);
            if self.image.uses_run_page() {
                self.fd.get_kvm_run().kvm_valid_regs = ALL_IN_RUN_PAGE;
            }
            exit = match self.kvm_run(cpu)? {
                Ended::Exit(reason) => self.answer_unfinished(cpu, reason),
                Ended::Interrupted | Ended::MemoryFailure => None,
            };
        }
        self.move_out(cpu)?;
        if exit == Some(Exit::Shutdown) {
            cpu.state.activity = Activity::Shutdown;
        }
        Ok(exit)
    }

    /// Moves the state home, where the vCPU then is in `activity`.
    pub(super) fn come_home_as(&mut self, cpu: &mut Cpu, activity: Activity) -> Result<(), EngineError> {
        self.move_out(cpu)?;
        cpu.state.activity = activity;
        Ok(())
    }

    fn move_out(&mut self, cpu: &mut Cpu) -> Result<(), EngineError> {
        self.image.move_out(&self.fd, cpu, &self.signal.attention, self.in_run_page)?;
        if let Some(traps) = &self.traps {
            cpu.state.cr4 = traps.show_vmxe(cpu.state.cr4);
            traps::drop_undelivered(cpu);
        }
        self.stats.moved_out += 1;
        self.resident = false;
        self.instructions_seen = cpu.state.instructions;
        cpu.check_code();
        cpu.state_changed();
        Ok(())
    }

    /// Executes on the software CPU, the state being at home.
    pub(super) fn execute(&mut self, cpu: &mut Cpu, instructions: u64) -> Option<Exit> {
        let before = cpu.state.instructions;
        let exit = cpu.run(instructions);
        self.stats.bursts += 1;
        self.stats.software_instructions += cpu.state.instructions.wrapping_sub(before);
        (exit != Exit::Budget).then_some(exit)
    }

    /// What the guest asks for is the software CPU's (an MSR, VMCALL): that executes the instruction. KVM finishes its
    /// own copy of it, whose effects are then replaced.
    fn answer_in_software(&mut self, cpu: &mut Cpu) -> Result<Option<Exit>, EngineError> {
        self.move_out(cpu)?;
        self.set_immediate_exit(1);
        self.kvm_run(cpu)?;
        let exit = self.execute(cpu, 1);
        // Neither MSRs nor VMCALL are in anything KVM derived from page tables.
        self.instructions_seen = cpu.state.instructions;
        Ok(exit)
    }

    /// KVM gave up at an instruction: how many the software CPU shall execute. More each time that KVM gives up
    /// right after it was entered.
    pub(super) fn next_burst(&mut self) -> u64 {
        let soon = self.entered.elapsed() < SOON;
        self.burst = if soon { (self.burst * 2).min(LONGEST_BURST) } else { 1 };
        self.burst
    }

    /// Remembers whether exits need the whole state, to have KVM store it beforehand.
    pub(super) fn expect_state(&mut self, wanted: bool) {
        self.state_wanted = wanted;
        self.last_kick_at = None;
    }

    /// A signal came: for the owner's wishes, at the end of the slice, or for nothing that is left. A guest that is
    /// found at the same instruction twice may be at one that KVM cannot get over (VMCALL where KVM is not to
    /// answer it): the software CPU executes it.
    pub(super) fn after_signal(&mut self) -> Result<Next, EngineError> {
        self.stats.kicks += 1;
        let at = self.fd.get_regs().map_err(failed("reading registers"))?.rip;
        if self.last_kick_at.replace(at) == Some(at) {
            self.last_kick_at = None;
            self.stats.stuck += 1;
            return Ok(Next::Software(1));
        }
        Ok(if Instant::now() >= self.slice_end { Next::Leave(Exit::Budget) } else { Next::Again })
    }

    /// The processor refused the guest's state.
    pub(super) fn entry_failed(&mut self, reason: u64) -> Next {
        self.stats.entry_failures += 1;
        if !std::mem::replace(&mut self.warned_of_entry, true) {
            log::warn!(
                "the processor refuses to enter the guest (reason {reason:#x}): the software CPU goes on"
            );
        }
        Next::Software(self.next_burst())
    }

    /// An external interrupt can be taken now, or could when KVM returned.
    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }
}

/// What only the vCPU's owner can act on.
const OWNERS: u32 = Attention::INIT | Attention::SIPI | Attention::CANCEL;

fn can_take_interrupts(state: &CpuState) -> bool {
    state.system_flag(rflags::IF) && state.shadow == Shadow::None
}

/// Ends HLT, as in the software CPU.
fn wakes(state: &CpuState, attention: u32) -> bool {
    attention & Attention::INTERRUPT != 0 && state.system_flag(rflags::IF)
        || attention & Attention::NMI != 0 && !state.nmi_blocked
        || state.pending_debug != 0
        || state.injected.is_some()
}

/// KVM's own tolerance between the host's and the guest's TSC: 250 parts in a million.
fn is_near(a: u64, b: u64) -> bool {
    a.abs_diff(b) <= b / 4000
}

fn set_tsc_frequency(vm: &KvmVm, fd: &VcpuFd, tsc_hz: u64) {
    let host = fd.get_tsc_khz().map_or(0, |khz| u64::from(khz) * 1000);
    if is_near(tsc_hz, host) {
        return;
    }
    let khz = u32::try_from(tsc_hz / 1000).unwrap_or(u32::MAX);
    if !vm.host.has_tsc_control || fd.set_tsc_khz(khz).is_err() {
        log::warn!(
            "the guest's TSC should run at {tsc_hz} Hz, but KVM runs it at the host's {host} Hz: its clocks disagree"
        );
    }
}

impl Engine for KvmVcpu {
    fn run(&mut self, cpu: &mut Cpu, budget: u64) -> Result<Exit, EngineError> {
        if self.gone || budget < EXACT_BUDGET {
            return Ok(self.execute(cpu, budget).unwrap_or(Exit::Budget));
        }
        if cpu.vmx.operation == Operation::NonRoot {
            return self.run_l2(cpu, budget);
        }
        if let (Operation::Root, Some(traps)) = (cpu.vmx.operation, &self.traps) {
            // What L1 does about an exit is mostly VMX instructions, each of which would be a way to KVM and back.
            let burst = traps.cluster.budget();
            // CR4 is looked at around VMX instructions.
            let hop = self.hop.as_mut().filter(|_| !traps.hides_vmxe());
            let burst = hop.map_or(burst, |hop| hop.up_to(burst)).min(budget);
            if let Some(exit) = self.execute(cpu, burst) {
                return Ok(exit);
            }
        }
        self.slice_end = Instant::now() + SLICE;
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        let target = Arc::clone(&self.target);
        let mut timer = self.timer.take();
        // SAFETY: the run page is mapped as long as `fd` is open, which is longer than this call.
        let running = unsafe { Running::new(&target, &mut timer, immediate_exit, SLICE) };
        let exit = running.and_then(|running| {
            let exit = match self.vm.host.share {
                Share::All => self.run_loop(cpu),
                Share::User => self.user_loop(cpu, budget),
            };
            drop(running);
            exit
        });
        self.timer = timer;
        exit
    }

    fn name(&self) -> &'static str {
        "kvm"
    }

    fn kvm_stats(&self) -> Option<Stats> {
        Some(self.stats())
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.signal.set_kicker(None);
    }
}
