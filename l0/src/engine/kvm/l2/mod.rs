//! L2 on KVM: ring 3 of L1's guests, natively, under a VMCS02.
//!
//! Each root of EPT02 has a KVM VM of its own ([`guest`]), whose memory is an address range of ours ([`window`]) into
//! which what EPT02 holds is mapped ([`ranges`], [`mapped`]). L2 gets KVM's processor in ring 3, and comes back at the
//! first instruction of which anybody might want to know: KVM is entered with registers under which that cannot go
//! unnoticed ([`fence`]; [`probe`] tries whether this host's KVM keeps it). The software CPU executes that instruction,
//! from the state before it, under L1's controls. So every exit of L2, with all its information, is the software CPU's,
//! whatever engine L2 was on; nothing in here knows what a VM exit looks like.
//!
//! Ring 0 of L2 stays in the software CPU. In ring 0 KVM handles CPUID, XSETBV, INVD, WBINVD and VMCALL by itself and has
//! no way to show them, and the first of them exit always ("Instructions That Cause VM Exits Unconditionally"). Rejected:
//! giving KVM the CPUID that L1 is thought to answer (L1 would not see its exits).
//!
//! How each control of L1 is honoured while KVM executes ring 3:
//!
//! | control | how |
//! | --- | --- |
//! | external-interrupt, NMI exiting; interrupts and NMIs for L2 itself | a signal ends KVM_RUN; the software CPU exits or delivers |
//! | VMX-preemption timer, posted interrupts | the same |
//! | virtual NMIs, virtual-interrupt delivery, TPR shadow, threshold | change in ring 0 or between engines only |
//! | interrupt-window, NMI-window exiting | software CPU while asked for (the exit is due as soon as it may come) |
//! | TSC offsetting and scaling, RDTSC exiting | RDTSC, RDTSCP fault (CR4.TSD, no RDTSCP; PVM: `PR_SET_TSC`): software CPU |
//! | RDPMC, HLT, INVLPG, MWAIT, MONITOR, CR3, CR8, MOV DR, MSR, WBINVD exiting, CR0 and CR4 masks, CR3 targets | #GP or #UD in ring 3 first, in the SDM's order: software CPU |
//! | MSR bitmaps, XSS-exiting bitmap, VMCS shadowing, INVPCID, XSAVES, VMFUNC | privileged, or #UD on KVM: software CPU |
//! | I/O exiting, I/O bitmaps | no TSS, IOPL 0: #GP: software CPU |
//! | descriptor-table exiting | CR4.UMIP: #GP: software CPU; loads in ring 3 fault anyway |
//! | exception bitmap, page-fault mask and match, task switches, #VE | no IDT: software CPU |
//! | CPUID, VMCALL and other VMX instructions (always exit) | CPUID faulting, #UD (Hyper-V's rule for ring 3): software CPU |
//! | EPT, its accessed and dirty flags, PML | what is mapped was walked with its flags set; what is missing or read-only: software CPU |
//! | execute-only and non-executable pages, mode-based execute control | mapped if readable and executable in ring 3, else software CPU at each access |
//! | virtualize APIC accesses | that page is not mapped: software CPU |
//! | no EPT | software CPU |
//! | VPID; INVVPID, INVEPT | KVM's TLB is flushed if ring 0 or L1 executed since; INVEPT empties the windows |
//! | PAUSE exiting, RDRAND, RDSEED exiting, monitor trap flag | software CPU while asked for |
//! | PAUSE-loop exiting | counts in ring 0 only |
//! | EPTP switching | VMFUNC is #UD on KVM: software CPU, then the other root's window |
//! | enable RDTSCP (and RDPID), INVPCID, XSAVES | the instructions are #UD or #GP on KVM in ring 3: software CPU |
//! | MSR lists, loads and saves of PAT, EFER, DR7 | at entry and exit, which are not KVM's |
//!
//! Where the probe finds that something of ring 3 goes unnoticed (CPUID where KVM emulates ring 0), L2 stays in the software
//! CPU, unless `--engine kvm,l2` says that this is acceptable.
//!
//! - WINDOW-1: what a window maps, EPT02 gave since the last INVEPT of that root, with no more rights.
//! - CODE-4: see [`mapped`].

mod controls;
mod fence;
mod guest;
mod mapped;
mod probe;
mod ranges;
#[cfg(test)]
mod tests;
mod window;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ept_merge::entry::span_of;
use ept_merge::invalidate::Invalidation;
use ept_merge::{L1Gpa, L2Gpa, Page, Permissions, Root};
use turtles_cpu::attention::Attention;
use turtles_cpu::{Cpu, Exit};
use x86defs::vmx::{pin, primary, secondary};

use self::guest::{Guest, Left};
use self::mapped::Mapped;
use self::ranges::Rights;
use self::window::Window;
use super::kick::{Running, SliceTimer, Target};
use super::{KvmHost, tunables, user};
use crate::engine::EngineError;
use crate::nested::second_level::CombinedTables;

pub(super) use mapped::FileMap;
pub use probe::Leaks;

/// Which L2s go to KVM.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum L2Policy {
    /// Those of which everything can be seen.
    #[default]
    Exact,
    /// Those as well whose ring 3 can execute what [`Leaks`] names unseen.
    Leaky,
    /// The same, and at once rather than when it pays: for tests.
    Eager,
}

/// What happened, for `--stats` and tests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct L2Stats {
    /// Stretches of L2's ring 3 on KVM, and their host time in µs.
    pub stretches: u64,
    /// See above.
    pub micros: u64,
    /// Of them, ended by memory that the window lacked.
    pub misses: u64,
    /// KVM VMs made.
    pub guests: u64,
    /// Ranges of memory mapped at present.
    pub ranges: u64,
}

/// One vCPU's share of L2 on KVM.
pub(super) struct L2Share {
    host: KvmHost,
    policy: L2Policy,
    file: Arc<File>,
    files: FileMap,
    /// Least recently used first.
    guests: Vec<(Root, Guest)>,
    /// Instructions of ring 3 to wait for before the next stretch.
    patience: u64,
    /// What going to KVM and back costs, in the mean.
    overhead: Duration,
    /// The APIC-access page that windows leave out.
    apic_page: Option<L1Gpa>,
    /// A VM could not be made: nothing more is tried.
    given_up: bool,
    stats: L2Stats,
}

/// What a vCPU's engine lends its L2s.
pub(super) struct Lent<'a> {
    pub(super) attention: &'a Attention,
    pub(super) target: &'a Target,
    pub(super) timer: &'a mut Option<SliceTimer>,
}

impl L2Share {
    pub(super) fn new(host: &KvmHost, file: &Arc<File>, files: &FileMap) -> Self {
        Self {
            host: host.clone(),
            policy: host.l2,
            file: Arc::clone(file),
            files: files.clone(),
            guests: Vec::new(),
            patience: tunables::L2_PATIENCE,
            overhead: Duration::ZERO,
            apic_page: None,
            given_up: false,
            stats: L2Stats::default(),
        }
    }

    /// Runs L2: in the software CPU, and on KVM where that may be and pays.
    pub(super) fn run(&mut self, cpu: &mut Cpu, budget: u64, mut lent: Lent) -> Result<Exit, EngineError> {
        if !self.may_ever() {
            return Ok(cpu.run(budget));
        }
        let limit = cpu.state.ticks().saturating_add(budget);
        if self.policy == L2Policy::Eager && nothing_due_at_entry(cpu) && self.may_enter(cpu, lent.attention)
        {
            if let Some(exit) = self.visit(cpu, &mut lent)? {
                return Ok(exit);
            }
        }
        loop {
            let left = limit.saturating_sub(cpu.state.ticks());
            if left == 0 {
                return Ok(Exit::Budget);
            }
            let exit = cpu.run(left.min(self.burst()));
            if exit != Exit::Budget {
                return Ok(exit);
            }
            let long = self.policy == L2Policy::Eager || cpu.ticks_in_mode() >= self.patience;
            if long && cpu.state.cpl == 3 && self.may_enter(cpu, lent.attention) {
                if let Some(exit) = self.visit(cpu, &mut lent)? {
                    return Ok(exit);
                }
            }
        }
    }

    fn may_ever(&self) -> bool {
        !self.given_up && (self.policy != L2Policy::Exact || probe::leaks(&self.host).is_empty())
    }

    fn burst(&self) -> u64 {
        if self.policy == L2Policy::Eager { tunables::L2_EAGER_BURST } else { self.patience }
    }

    fn may_enter(&self, cpu: &Cpu, attention: &Attention) -> bool {
        let suits = if self.host.emulates_ring0 {
            user::suits(&cpu.state)
        } else {
            fence::suits(&cpu.state, &self.host)
        };
        suits
            && attention.get() & !Attention::FORGET_WRITES == 0
            && !cpu.want_interrupt_window
            && controls::forbids(&cpu.vmx.controls).is_none()
    }

    /// L2 on KVM, for as long as nothing but missing memory ends its stretches.
    fn visit(&mut self, cpu: &mut Cpu, lent: &mut Lent) -> Result<Option<Exit>, EngineError> {
        let Some(root) = self.listen(cpu) else { return Ok(None) };
        if self.given_up {
            return Ok(None);
        }
        if let Err(error) = self.bring_to_front(root, cpu) {
            log::warn!("L2 stays in the software CPU: {error}");
            self.given_up = true;
            return Ok(None);
        }
        let begun = Instant::now();
        let mut inside = Duration::ZERO;
        loop {
            let Some((_, guest)) = self.guests.last_mut() else { return Ok(None) };
            // SAFETY: the run page is mapped as long as the guest's vCPU is open, which is longer than `running` lives.
            let running =
                unsafe { Running::new(lent.target, lent.timer, guest.immediate_exit(), super::vcpu::SLICE) }?;
            let enter = || {
                lent.target.go_inside();
                lent.attention.get() & !Attention::FORGET_WRITES == 0
            };
            let left = guest.stretch(cpu, enter, || lent.target.come_out());
            drop(running);
            inside += guest.took;
            self.stats.stretches += 1;
            self.stats.micros += u64::try_from(guest.took.as_micros()).unwrap_or(u64::MAX);
            // Where KVM walks page tables in software, one that it cannot read is a page fault, and so a missing EPT02
            // page looks like any instruction.
            let missed = match left? {
                Left::Memory => true,
                Left::Instruction => self.host.shadow_paging,
                Left::Signal => false,
            };
            if !missed {
                break;
            }
            self.stats.misses += 1;
            match self.miss(cpu, root, lent.attention) {
                Miss::Filled => {}
                Miss::Stays => break,
                Miss::Exit(exit) => return Ok(Some(exit)),
            }
        }
        self.learn(begun.elapsed().saturating_sub(inside), inside);
        Ok(None)
    }

    /// The software CPU executes the instruction whose memory the window lacks, and EPT02 tells where that is.
    fn miss(&mut self, cpu: &mut Cpu, root: Root, attention: &Attention) -> Miss {
        // Translations that the CPU still has would tell nothing.
        cpu.state_changed();
        let exit = cpu.run(1);
        if exit != Exit::Budget {
            return Miss::Exit(exit);
        }
        let stays = self.may_enter(cpu, attention);
        if let (true, Some((_, guest))) = (stays, self.guests.last_mut()) {
            guest.stayed_in_ring_3(cpu);
        }
        let before = self.guests.last().map_or(0, |(_, guest)| guest.mapped.changes());
        let same_root = self.listen(cpu) == Some(root) && !self.given_up;
        let filled = self.guests.last().is_some_and(|(_, guest)| guest.mapped.changes() != before);
        if stays && same_root && filled { Miss::Filled } else { Miss::Stays }
    }

    /// What a visit's cost says about the next one: as long as it costs, the software CPU goes first.
    fn learn(&mut self, overhead: Duration, inside: Duration) {
        self.overhead = (self.overhead * 7 + overhead) / 8;
        let floor = (self.overhead.as_nanos() as u64).saturating_mul(tunables::SOFTWARE_PER_US) / 1000;
        let floor = floor.clamp(tunables::L2_LEAST_PATIENCE, tunables::MOST_PATIENCE);
        self.patience = if inside < overhead {
            self.patience.saturating_mul(2).clamp(floor, tunables::MOST_PATIENCE)
        } else {
            (self.patience / 2).max(floor)
        };
    }

    /// Takes what EPT02 has told into the windows; the root in force, if there is one.
    fn listen(&mut self, cpu: &mut Cpu) -> Option<Root> {
        let controls = &cpu.vmx.controls;
        let apic_page = controls
            .has_secondary(secondary::VIRTUALIZE_APIC_ACCESSES)
            .then_some(L1Gpa(controls.apic_access_page));
        if apic_page != self.apic_page {
            self.apic_page = apic_page;
            self.guests.iter().for_each(|(_, guest)| guest.mapped.forget_all());
        }
        let tables = cpu.vmx.second_level.as_mut()?.as_any().downcast_mut::<CombinedTables>()?;
        let (root, journal) = tables.journal();
        for what in journal.invalidated.drain(..) {
            for (of, guest) in &self.guests {
                if what == Invalidation::AllContexts || what == Invalidation::SingleContext(of.table) {
                    guest.mapped.forget_all();
                }
            }
        }
        let len = self.guests.first().map_or(u64::MAX, |(_, guest)| guest.mapped.window().len());
        let met = journal.found.iter().map(|(_, gpa, _)| gpa).chain(journal.lost.iter().map(|(_, gpa)| gpa));
        if met.into_iter().any(|gpa| gpa.0 >= len) {
            // KVM would tell of such a write only after its instruction. L2's kernel, which was here first, is in the
            // software CPU.
            log::info!("L2 has devices beyond {len:#x}: it stays in the software CPU");
            self.given_up = true;
        }
        for (of, gpa, page) in journal.found.drain(..) {
            if let Some((_, guest)) = self.guests.iter().find(|(root, _)| *root == of) {
                fill(&guest.mapped, gpa, page, self.apic_page);
            }
        }
        for (of, gpa) in journal.lost.drain(..) {
            if let Some((_, guest)) = self.guests.iter().find(|(root, _)| *root == of) {
                guest.mapped.forget(L2Gpa(gpa.0 & !4095), 4096);
            }
        }
        Some(root)
    }

    /// Makes the guest of `root` the last one.
    fn bring_to_front(&mut self, root: Root, cpu: &Cpu) -> Result<(), EngineError> {
        if self.guests.last().is_some_and(|(of, _)| *of == root) {
            return Ok(());
        }
        let found = self.guests.iter().position(|(of, _)| *of == root);
        let entry = match found {
            Some(index) => self.guests.remove(index),
            None => (root, self.make(cpu)?),
        };
        if self.guests.len() >= tunables::L2_GUESTS {
            self.guests.remove(0);
        }
        self.guests.push(entry);
        Ok(())
    }

    fn make(&mut self, cpu: &Cpu) -> Result<Guest, EngineError> {
        let len = if self.host.shadow_paging { self.files.twice_the_ram() } else { tunables::WINDOW };
        let window = Window::reserve(len, Arc::clone(&self.file)).map_err(|source| EngineError::Kvm {
            what: "reserving addresses for L2's memory".into(),
            source,
        })?;
        let mapped = Mapped::new(window, self.files.clone(), cpu.memory(), most_ranges());
        self.stats.guests += 1;
        Guest::new(&self.host, cpu.model(), mapped)
    }

    /// What happened so far.
    pub(super) fn stats(&self) -> L2Stats {
        let ranges = self.guests.iter().map(|(_, guest)| guest.mapped.ranges() as u64).sum();
        L2Stats { ranges, ..self.stats }
    }
}

/// The software CPU need not look, after VM entry, whether there is to be an exit before any instruction.
fn nothing_due_at_entry(cpu: &Cpu) -> bool {
    let controls = &cpu.vmx.controls;
    !controls.has_pin(pin::PREEMPTION_TIMER) && !controls.has_primary(primary::USE_TPR_SHADOW)
}

/// What came of a miss.
enum Miss {
    /// The window has what it lacked.
    Filled,
    /// It has not: KVM cannot go on there.
    Stays,
    Exit(Exit),
}

/// One page of EPT02 into a window: what of it ring 3 may read and execute, and is not L1's virtual APIC.
fn fill(mapped: &Mapped, gpa: L2Gpa, page: Page, except: Option<L1Gpa>) {
    // Pieces of 1-GiB pages come one by one.
    let span = span_of(page.level()).min(tunables::LARGEST_FILL);
    let ready = page.ready();
    let base = L2Gpa(gpa.0 & !(span - 1));
    if !ready.contains(Permissions::READ | Permissions::USER_EXECUTE) {
        mapped.forget(base, span);
        return;
    }
    let rights = if ready.contains(Permissions::WRITE) { Rights::ReadWrite } else { Rights::Read };
    mapped.fill(base, page.piece(base), span, rights, except);
}

/// Mappings that a window may have: the host allows a process so many, and two lie around each range.
fn most_ranges() -> usize {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    let most: usize = text.trim().parse().unwrap_or(tunables::USUAL_MAP_COUNT);
    (most.saturating_sub(tunables::OTHER_MAPPINGS) / 2 / tunables::L2_WINDOWS).max(16)
}
