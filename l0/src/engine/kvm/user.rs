//! Ring 3 on KVM, everything else on the software CPU: for a KVM that emulates ring 0 ([`super::Share::User`]).
//!
//! Such a KVM (PVM) executes ring 3 on the processor itself, at full speed, but delivers events, loads segments and
//! checks modes by its emulator, which is slow and in places wrong. So KVM gets only what needs none of that: 64-bit
//! code in ring 3, in long stretches. It is entered with registers under which nothing can leave ring 3: an IDT and a
//! GDT of limit zero, no SYSCALL, no SYSENTER, no TSS. Whatever the guest does other than compute then ends KVM_RUN
//! (KVM_EXIT_SHUTDOWN) with the state as before the instruction (SYSCALL leads nowhere, and is taken back), which the software CPU executes under the guest's
//! own system registers. INT3 and single-step are told apart (`is_trap`): they end it after the instruction.
//!
//! Only what ring 3 can change is taken back from KVM (`take_back`); the rest never was KVM's.
//!
//! - USER-1: between the end of a stretch and the next one, if the guest's privilege may have changed, KVM drops what
//!   it derived from page tables. A processor need not see a page-table edit before an INVLPG, which is ring 0's.
//! - USER-2: only a machine with one vCPU. What KVM writes reaches decoded code of this vCPU, which is forgotten
//!   after each stretch, but not that of others, which go on meanwhile. Others execute on the software CPU alone.
//!
//! UNSUPPORTED: a guest that has switched on AVX (XCR0) stays on the software CPU: such a KVM moves no upper halves of
//! YMM registers in or out. A CPU model without AVX gives its ring 3 the processor's speed.
//!
//! DEVIATION: where ring 3 is on the processor, instructions that tell about the processor without faulting tell the
//! host's truth, and nothing we are given can trap them: CPUID shows the host's leaves, RDPID, RDTSCP and LSL give
//! the host's CPU number, LAR and LSL read the host's GDT, and instructions execute that the guest's CPUID or CR4 do
//! not offer (RDFSBASE for one). Programs ask such things as they start, before a stretch is long enough for KVM.

use std::sync::atomic::Ordering;
use std::time::Instant;

use kvm_bindings as kb;
use turtles_cpu::attention::Attention;
use turtles_cpu::state::{CpuState, Msrs, Seg, Segment, Shadow, TableRegister, reg};
use turtles_cpu::{Cpu, Exit};
use x86defs::{cr0, cr4, dr, efer, rflags, segment, vector, xcr0};

use super::GuestTsc;
use super::tunables::{MOST_PATIENCE, PATIENCE, WORTH_IT};
use super::vcpu::{Ended, KvmVcpu};
use crate::engine::EngineError;

/// Selectors of the host's own ring 3 (Linux for x86-64), which the guest's ring 3 then can read from CS and SS.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;
/// What KVM has in CR0 and CR4 meanwhile. Ring 3 sees none of it.
const CR0: u64 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
const CR4: u64 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
/// RFLAGS that ring 3 cannot change.
const KERNELS_FLAGS: u64 = rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP | rflags::RF;
/// The guest's TSC may be off the host's by this fraction of a second: what reading the clocks may take.
const TSC_TOLERANCE: u64 = 1000;
const INT3: u8 = 0xcc;
/// INT n with the vector of INT3.
const INT_3: [u8; 2] = [0xcd, 3];
const INT1: u8 = 0xf1;

/// How the share goes.
pub(super) struct UserShare {
    /// Instructions to wait for before the next stretch.
    patience: u64,
    /// [`Cpu::mode_changes`] when the last stretch had ended, if KVM's shadow is of then.
    left_at: Option<u64>,
}

impl Default for UserShare {
    fn default() -> Self {
        Self { patience: PATIENCE, left_at: None }
    }
}

/// Where SYSCALL leads meanwhile, since such a KVM does not ask EFER.SCE: nobody's, and no ring 3 can execute there.
const NOWHERE: u64 = 0xffff_8000_0000_0000;
const SYSCALL_LEN: u64 = 2;
/// The register that SYSCALL saves RFLAGS in.
const R11: usize = 11;

/// True if ring 3 would behave on the processor as this state demands.
pub(super) fn suits(state: &CpuState) -> bool {
    let selector = |seg| state.seg(seg).selector;
    let data = [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs];
    let selectors = selector(Seg::Cs) == USER_CS
        && selector(Seg::Ss) == USER_SS
        && data
            .into_iter()
            .all(|seg| selector(seg) & !segment::SELECTOR_RPL == 0 || selector(seg) == USER_SS);
    let control = state.cr0 & (cr0::PG | cr0::TS | cr0::EM) == cr0::PG
        && state.cr4 & (cr4::PAE | cr4::OSFXSR) == cr4::PAE | cr4::OSFXSR
        && state.cr4 & (cr4::TSD | cr4::LA57 | cr4::PKE) == 0;
    // KVM has no room for the upper halves of YMM registers.
    let vectors = state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & !(xcr0::X87 | xcr0::SSE) == 0;
    let forbidden =
        rflags::TF | rflags::AC | rflags::RF | rflags::VM | rflags::IOPL | rflags::VIF | rflags::VIP;
    let quiet = state.injected.is_none()
        && state.pending_debug == 0
        && state.shadow == Shadow::None
        && state.dr7 & dr::DR7_ENABLES == 0
        && state.system_flag(rflags::IF)
        && !state.system_flag(forbidden);
    state.cpl == 3
        && state.code64()
        && selectors
        && control
        && vectors
        && quiet
        && state.efer & efer::SCE != 0
}

/// The state as KVM gets it: nothing leads out of ring 3.
pub(super) fn fence_in(state: &mut CpuState) {
    let nothing = Segment { base: 0, limit: 0, access: segment::UNUSABLE, selector: 0 };
    state.idtr = TableRegister { base: 0, limit: 0 };
    state.gdtr = TableRegister { base: 0, limit: 0 };
    state.ldtr = nothing;
    state.tr = Segment { base: 0, limit: 0, access: 0x8b, selector: 0 };
    state.cr0 = CR0;
    state.cr4 = CR4;
    state.cr3 &= !0xfff;
    state.efer &= efer::LME | efer::LMA | efer::NXE;
    state.dr7 = dr::DR7_FIXED_1;
    state.msrs = Msrs { lstar: NOWHERE, ..Msrs::default() };
    state.nmi_blocked = false;
}

/// Takes from `kvm` what ring 3 can change, and the rest from `before`.
pub(super) fn take_back(before: CpuState, kvm: &CpuState) -> CpuState {
    let mut state = before;
    state.gpr = kvm.gpr;
    state.rip = kvm.rip;
    state.set_rflags(kvm.rflags() & !KERNELS_FLAGS | state.rflags() & KERNELS_FLAGS);
    state.x87 = kvm.x87;
    state.vector.mxcsr = kvm.vector.mxcsr;
    for (to, from) in state.vector.ymm.iter_mut().zip(&kvm.vector.ymm) {
        to[..16].copy_from_slice(&from[..16]);
    }
    if kvm.rip == NOWHERE {
        // SYSCALL, which begins anew: it has overwritten only what it will overwrite again.
        state.rip = kvm.gpr.get(reg::RCX).wrapping_sub(SYSCALL_LEN);
        state.set_rflags(kvm.gpr.get(R11) & !KERNELS_FLAGS | state.rflags() & KERNELS_FLAGS);
        return state;
    }
    for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        let loaded = kvm.seg(seg);
        if loaded.selector != state.seg(seg).selector {
            *state.seg_mut(seg) = *loaded;
        } else if matches!(seg, Seg::Fs | Seg::Gs) {
            state.seg_mut(seg).base = loaded.base;
        }
    }
    state
}

impl KvmVcpu {
    /// The run loop: the software CPU, and KVM once ring 3 has kept it busy for long enough.
    pub(super) fn user_loop(&mut self, cpu: &mut Cpu, budget: u64) -> Result<Exit, EngineError> {
        let limit = cpu.state.ticks().saturating_add(budget);
        loop {
            let left = limit.saturating_sub(cpu.state.ticks());
            if left == 0 || Instant::now() >= self.slice_end {
                return Ok(Exit::Budget);
            }
            let burst = left.min(self.most_at_once());
            if let Some(exit) = self.execute(cpu, burst) {
                return Ok(exit);
            }
            let patience = match &mut self.hop {
                Some(hop) => hop.up_to(self.user.patience),
                None => self.user.patience,
            };
            let long = cpu.state.cpl == 3 && cpu.ticks_in_mode() >= patience;
            if long && self.may_enter(cpu) {
                self.stretch(cpu)?;
            }
        }
    }

    /// Instructions between two looks at whether KVM is to take over.
    fn most_at_once(&mut self) -> u64 {
        self.hop.as_mut().map_or(PATIENCE, |hop| hop.up_to(PATIENCE / 50))
    }

    fn may_enter(&mut self, cpu: &mut Cpu) -> bool {
        // USER-2
        self.vm.vcpus.load(Ordering::Relaxed) == 1
            && suits(&cpu.state)
            && !cpu.want_interrupt_window
            && self.signal.attention.get() == 0
            && self.reads_the_hosts_tsc(cpu)
    }

    /// RDTSC in ring 3 reads the host's TSC: only where that is the guest's.
    fn reads_the_hosts_tsc(&self, cpu: &mut Cpu) -> bool {
        let ticks = cpu.state.ticks();
        let owners = cpu.bus().tsc(ticks);
        GuestTsc::host_now().abs_diff(cpu.state.tsc(owners)) <= self.tsc_hz / TSC_TOLERANCE
    }

    /// One stretch of ring 3 on KVM. The state is at home before and after.
    fn stretch(&mut self, cpu: &mut Cpu) -> Result<(), EngineError> {
        // USER-1
        if self.user.left_at != Some(cpu.mode_changes()) {
            self.vm.drop_shadow_pages()?;
        }
        let before = cpu.state.clone();
        fence_in(&mut cpu.state);
        self.image.move_in(&mut self.fd, cpu, false)?;
        self.stats.moved_in += 1;
        let entered = progress(&before);
        let start = Instant::now();
        let ended = self.run_user(cpu);
        let took = start.elapsed();
        let shut_down = matches!(ended, Ok(Ended::Exit(kb::KVM_EXIT_SHUTDOWN)));
        let home = self.come_back(cpu, before, shut_down);
        ended?;
        home?;
        self.stats.user_stretches += 1;
        self.stats.user_micros += u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let stuck = took >= WORTH_IT && progress(&cpu.state) == entered;
        self.user.patience = if stuck {
            // Seen where KVM emulates ring 0: KVM_RUN comes back only by our signal, at the instruction it began
            // with. The software CPU takes over for long, and KVM then begins without shadow pages.
            self.stats.stuck += 1;
            self.user.left_at = None;
            MOST_PATIENCE
        } else if took < WORTH_IT {
            self.user.patience.saturating_mul(2).min(MOST_PATIENCE)
        } else {
            (self.user.patience / 2).max(PATIENCE)
        };
        Ok(())
    }

    /// KVM_RUN until something happens that is not ring 3's own.
    fn run_user(&mut self, cpu: &mut Cpu) -> Result<Ended, EngineError> {
        self.set_immediate_exit(0);
        self.target.go_inside();
        if self.signal.attention.get() != 0 {
            self.set_immediate_exit(1);
        }
        self.cr8 = cpu.bus().cr8();
        let cr8 = u64::from(self.cr8);
        let valid = if self.image.uses_run_page() { super::transfer::ALL_IN_RUN_PAGE } else { 0 };
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = 0;
        run.cr8 = cr8;
        run.kvm_valid_regs = valid;
        let ended = self.kvm_run(cpu);
        self.target.come_out();
        ended
    }

    /// Finishes what KVM has begun, and brings the state home.
    fn come_back(&mut self, cpu: &mut Cpu, before: CpuState, shut_down: bool) -> Result<(), EngineError> {
        let mut first = true;
        while std::mem::take(&mut first) && self.registers_wait() || self.unfinished {
            self.set_immediate_exit(1);
            self.kvm_run(cpu)?;
        }
        let moved = self.image.move_out(&self.fd, cpu, &Attention::default(), self.in_run_page);
        self.stats.moved_out += 1;
        let trapped = is_trap(&cpu.state, shut_down);
        cpu.state = take_back(before, &cpu.state);
        cpu.check_code();
        cpu.state_changed();
        if trapped {
            redo_trap(cpu);
        }
        self.user.left_at = Some(cpu.mode_changes());
        moved
    }
}

/// What changes when ring 3 gets on.
fn progress(state: &CpuState) -> (u64, u64, [u64; 16]) {
    (state.rip, state.rflags(), std::array::from_fn(|i| state.gpr.get(i)))
}

/// True if KVM stopped at an exception that came after its instruction: for a fault KVM sets RFLAGS.RF, or still has
/// it to deliver.
pub(super) fn is_trap(kvm: &CpuState, shut_down: bool) -> bool {
    match kvm.injected {
        Some(event) => matches!(event.vector, vector::DB | vector::BP | vector::OF),
        None => shut_down && !kvm.system_flag(rflags::RF),
    }
}

/// A trap (INT3, single-step) came after its instruction, and KVM has not delivered it.
pub(super) fn redo_trap(cpu: &mut Cpu) {
    let rip = cpu.state.rip;
    let mut bytes = [0; 3];
    let known = cpu.peek(rip.wrapping_sub(2), &mut bytes);
    if cpu.state.system_flag(rflags::TF) {
        // POPF has set TF, and one instruction has been executed since.
        cpu.state.pending_debug |= dr::DR6_BS;
    } else if known == 3 && bytes[2] == INT1 {
        // KVM leaves RIP at INT1.
    } else if known >= 2 && bytes[1] == INT3 {
        cpu.state.rip = rip.wrapping_sub(1);
    } else if known >= 2 && bytes[..2] == INT_3 {
        cpu.state.rip = rip.wrapping_sub(2);
    }
    cpu.state_changed();
}
