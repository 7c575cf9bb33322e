//! The run loop: looks up at interrupts, traps and the owner's wishes where the architecture has them, and executes
//! blocks in between.
//!
//! `instructions` counts completed instructions exactly: at any return and at the start of every block. Events
//! delivered and pieces of repeated instructions take time as well (`stalls`): without them a guest that faults at
//! its fault handler, or repeats MOVS for ever, would never use up a budget, and virtual time would stand still.

use x86defs::vmx::{pin, primary};
use x86defs::{dr, rflags, vector};

use crate::attention::Attention;
use crate::block::{MAX_BLOCK, Run, key};
use crate::op::Op;
use crate::phys::Inside;
use crate::profile::{Count, Doing};
use crate::state::{Activity, Event, EventKind, SLOT_BLOCK_IP, Seg, Shadow};
use crate::trap::{Exec, Fault, Trap};
use crate::{Cpu, Exit};

/// IA32_DEBUGCTL.BTF: TF traps after taken branches only.
pub(crate) const DEBUGCTL_BTF: u64 = 2;

/// What is due between two instructions.
pub(crate) enum Due {
    Nothing,
    /// [`crate::state::CpuState::injected`].
    Injected,
    /// A fault from the owner.
    Raised,
    /// A VM exit for this reason.
    Exit(u32),
    /// Pending debug exceptions.
    Debug,
    Nmi,
    /// The owner wants to know that interrupts can be taken.
    Window,
    VirtualInterrupt,
    Interrupt,
}

/// What the run loop does next.
enum Next {
    /// Whole blocks until something asks to look up.
    Blocks,
    /// Look up again.
    Again,
    /// One instruction, then look up again.
    One,
    Leave(Exit),
}

impl Cpu {
    /// Executes for at most `budget` ticks ([`crate::state::CpuState::ticks`]: instructions, and what else takes
    /// time), or until the owner must look.
    pub fn run(&mut self, budget: u64) -> Exit {
        let limit = self.state.ticks().saturating_add(budget);
        let _inside = Inside::enter(&self.peer);
        self.attend();
        let before = self.begin(Doing::RunLoop);
        let exit = self.run_until(limit);
        self.resume(before);
        exit
    }

    /// Executes one instruction, or delivers one event: an interrupt due before it or a fault that it raises.
    pub fn step(&mut self) -> Exit {
        self.run(1)
    }

    fn run_until(&mut self, limit: u64) -> Exit {
        loop {
            let attention = self.attention.get();
            if self.look_up || attention != 0 {
                let before = self.begin(Doing::Events);
                let next = self.between_instructions(limit);
                self.resume(before);
                match next {
                    Next::Blocks => {}
                    Next::Again => continue,
                    Next::One => {
                        if let Some(exit) = self.one_instruction() {
                            return exit;
                        }
                        continue;
                    }
                    Next::Leave(exit) => return exit,
                }
            }
            // GUARD-1
            if self.guarded.has(self.linear_rip()) && self.has_code_breakpoints() {
                if self.state.ticks() >= limit {
                    return Exit::Budget;
                }
                if let Some(exit) = self.one_instruction() {
                    return exit;
                }
                continue;
            }
            // Translated code does not look again at flags that were seen. An interrupt that could have been taken but had
            // gone may come back: until its flag is down, blocks are interpreted one by one.
            let settled = attention & Attention::INTERRUPT == 0 || !self.state.system_flag(rflags::IF);
            let translation = if settled { self.find_translation(limit) } else { None };
            if let Some(translation) = translation {
                if let Err(trap) = self.run_translated(translation, limit, attention) {
                    if let Some(exit) = self.take_trap(trap) {
                        return exit;
                    }
                }
                continue;
            }
            let unknown = settled && !self.knows_page();
            let block = match self.find_block() {
                // Its page was looked up just now, after a flush most often: its translation may have been there all along.
                Ok(_) if unknown && self.knows_page() => continue,
                Ok(block) => block,
                // The fault belongs to the next instruction.
                Err(_) if self.state.ticks() >= limit => return Exit::Budget,
                Err(trap) => {
                    if let Some(exit) = self.take_trap(trap) {
                        return exit;
                    }
                    continue;
                }
            };
            if self.state.ticks() + u64::from(block.count) > limit {
                if self.state.ticks() >= limit {
                    return Exit::Budget;
                }
                if let Some(exit) = self.one_instruction() {
                    return exit;
                }
                continue;
            }
            self.count(Count::Interpreted);
            let before = self.begin(Doing::Interpreter);
            let result = self.execute(block, block.count as usize);
            self.resume(before);
            if let Err(trap) = result {
                if let Some(exit) = self.take_trap(trap) {
                    return exit;
                }
            }
        }
    }

    /// False if 64-bit code at RIP could not be found, nor its translation, before its page is looked up.
    fn knows_page(&self) -> bool {
        let linear = self.linear_base[Seg::Cs as usize].wrapping_add(self.state.rip);
        self.code_bits != 64 || self.tlb.fetch(self.state.cpl == 3, linear).page == linear & !4095
    }

    /// Everything that happens between instructions, in the order of "Priority Among Concurrent Events".
    fn between_instructions(&mut self, limit: u64) -> Next {
        let attention = self.attention.get();
        if attention & Attention::FORGET_WRITES != 0 {
            self.tlb.forget_writes();
            self.attention.clear(Attention::FORGET_WRITES);
        }
        if attention & Attention::PREEMPTION != 0 && !self.under_pin(pin::PREEMPTION_TIMER) {
            self.attention.clear(Attention::PREEMPTION);
        }
        if let Some(trap) = self.finish_apic_operation() {
            if let Some(exit) = self.take_trap(trap) {
                return Next::Leave(exit);
            }
        }
        if attention & (Attention::CANCEL | Attention::INIT | Attention::SIPI) != 0 {
            return Next::Leave(Exit::Attention);
        }
        let before = self.state.activity;
        if before != Activity::Active && !self.would_wake(attention) {
            return Next::Leave(self.idle());
        }
        let ticks = self.state.ticks();
        if ticks >= limit {
            return Next::Leave(Exit::Budget);
        }
        // In non-root operation an event that causes a VM exit leaves the guest in its inactive state.
        if !self.non_root() {
            self.state.activity = Activity::Active;
        }
        if let Some(exit) = self.deliver_due(attention) {
            return Next::Leave(exit);
        }
        if before != Activity::Active && self.state.ticks() == ticks {
            // The interrupt has gone since it asked for attention: HLT goes on.
            self.state.activity = before;
            return Next::Leave(self.idle());
        }
        if self.state.ticks() != ticks {
            // What was delivered may have made something else due.
            self.attend();
            return Next::Again;
        }
        let flags = rflags::TF | rflags::RF;
        let code_breakpoints = self.guarded.has(self.linear_rip()) && self.has_code_breakpoints();
        let careful = self.state.system_flag(flags)
            || self.state.shadow != Shadow::None
            || code_breakpoints
            || self.under_primary(primary::MONITOR_TRAP_FLAG);
        self.look_up = careful;
        if careful { Next::One } else { Next::Blocks }
    }

    /// How an inactive state is told to the owner.
    fn idle(&self) -> Exit {
        let stopped = self.state.activity == Activity::Shutdown && !self.non_root();
        if stopped { Exit::Shutdown } else { Exit::Halted }
    }

    /// True if something would end the inactive state.
    fn would_wake(&mut self, attention: u32) -> bool {
        if self.non_root() {
            return !matches!(self.due_in_non_root(attention), Due::Nothing);
        }
        let interrupt = attention & Attention::INTERRUPT != 0 && self.state.system_flag(rflags::IF);
        let nmi = attention & Attention::NMI != 0 && !self.state.nmi_blocked;
        let debug = self.state.pending_debug != 0;
        self.state.activity == Activity::Halted
            && (interrupt || nmi || debug || self.state.injected.is_some())
    }

    /// What is due before the next instruction.
    fn due(&self, attention: u32) -> Due {
        let open = self.state.shadow == Shadow::None;
        if self.state.injected.is_some() {
            Due::Injected
        } else if self.state.pending_debug != 0 && self.state.shadow != Shadow::MovSs {
            Due::Debug
        } else if attention & Attention::NMI != 0 && !self.state.nmi_blocked && open {
            Due::Nmi
        } else if !open || !self.state.system_flag(rflags::IF) {
            Due::Nothing
        } else if self.want_interrupt_window {
            Due::Window
        } else if attention & Attention::INTERRUPT != 0 {
            Due::Interrupt
        } else {
            Due::Nothing
        }
    }

    /// Delivers one event if one is due.
    fn deliver_due(&mut self, attention: u32) -> Option<Exit> {
        let due = if self.non_root() { self.due_in_non_root(attention) } else { self.due(attention) };
        let event = match due {
            Due::Nothing => return None,
            Due::Window => return Some(Exit::InterruptWindow),
            Due::Exit(reason) => {
                let trap = self.exit_between_instructions(reason);
                return self.take_trap(trap);
            }
            Due::Debug => {
                let hits = std::mem::take(&mut self.state.pending_debug);
                self.raise_debug(hits);
                return self.finish_fault();
            }
            Due::Raised => {
                self.fault = self.vmx.raised.take()?;
                return self.finish_fault();
            }
            Due::Injected => {
                let event = self.state.injected.take()?;
                return self.deliver_injected(event);
            }
            Due::Nmi => {
                self.attention.clear(Attention::NMI);
                if let Err(trap) = self.exit_on_nmi() {
                    return self.take_trap(trap);
                }
                Event::new(vector::NMI, EventKind::Nmi)
            }
            Due::Interrupt => {
                match self.exit_on_interrupt() {
                    Ok(()) => {}
                    // It has gone, or was the notification of posted interrupts.
                    Err(Trap::Again) => return None,
                    Err(trap) => return self.take_trap(trap),
                }
                Event::new(self.bus().acknowledge_interrupt()?, EventKind::ExternalInterrupt)
            }
            Due::VirtualInterrupt => self.take_virtual_interrupt()?,
        };
        self.deliver_event(event)
    }

    fn deliver_event(&mut self, event: Event) -> Option<Exit> {
        self.state.shadow = Shadow::None;
        self.attend();
        match self.deliver(event) {
            Ok(()) => {
                self.state.stalls += 1;
                self.note_monitor_trap();
                None
            }
            Err(trap) => self.take_trap(trap),
        }
    }

    /// An event that the owner has set, on VM entry or for another engine. Software events save RIP past the instruction
    /// they stand for; if they cannot be delivered, RIP is at it.
    fn deliver_injected(&mut self, event: Event) -> Option<Exit> {
        let rip = self.state.rip;
        self.drop_pending_debug(event);
        if event.kind.has_length() {
            self.state.rip = self.wrap_ip(rip.wrapping_add(u64::from(event.instruction_length)));
        }
        self.state.shadow = Shadow::None;
        self.attend();
        match self.deliver(event) {
            Ok(()) => {
                self.state.stalls += 1;
                self.note_monitor_trap();
                None
            }
            Err(trap) => {
                self.state.rip = rip;
                self.take_trap(trap)
            }
        }
    }

    /// Delivers `fault`, or causes the VM exit it calls for.
    fn finish_fault(&mut self) -> Option<Exit> {
        self.attend();
        self.state.stalls += 1;
        let before = self.begin(Doing::Events);
        let done = self.deliver_fault();
        self.resume(before);
        match done {
            Ok(true) => {
                self.iret_unblocked = false;
                self.note_monitor_trap();
                None
            }
            Ok(false) => {
                self.state.shadow = Shadow::None;
                self.state.activity = Activity::Shutdown;
                Some(Exit::Shutdown)
            }
            Err(trap) => self.take_trap(trap),
        }
    }

    /// Acts on an instruction that did not complete; RIP is at it.
    fn take_trap(&mut self, trap: Trap) -> Option<Exit> {
        match trap {
            Trap::Fault => self.finish_fault(),
            Trap::Again => {
                self.attend();
                self.state.stalls += 1;
                self.note_monitor_trap();
                None
            }
            Trap::Exit => {
                if self.non_root() {
                    self.settle_exit();
                }
                Some(self.exit)
            }
        }
    }

    /// True when repeated string instructions must stop after each element.
    pub(crate) fn single_stepping(&self) -> bool {
        self.state.system_flag(rflags::TF) || self.under_primary(primary::MONITOR_TRAP_FLAG)
    }

    fn linear_rip(&self) -> u64 {
        self.wrap(self.linear_base[Seg::Cs as usize].wrapping_add(self.state.rip))
    }

    fn has_code_breakpoints(&self) -> bool {
        self.state.dr7 & dr::DR7_ENABLES != 0
            && (0..4).any(|i| self.state.dr7 & 3 << (2 * i) != 0 && self.breakpoint(i).0 == 0)
    }

    /// Executes one instruction with everything that needs looking at per instruction: TF, RF, shadows,
    /// instruction breakpoints.
    fn one_instruction(&mut self) -> Option<Exit> {
        self.attend();
        if self.hits_code_breakpoint() {
            return self.finish_fault();
        }
        let trap_flag = self.state.system_flag(rflags::TF);
        let block = match self.find_block() {
            Ok(block) => block,
            Err(trap) => return self.take_trap(trap),
        };
        let shadow = std::mem::replace(&mut self.state.shadow, Shadow::None);
        let had_rf = self.state.system_flag(rflags::RF);
        self.state.rflags_system &= !rflags::RF;
        self.step_trap = trap_flag;
        let sequential = self.wrap_ip(self.state.rip.wrapping_add(u64::from(block.len)));
        self.count(Count::Stepped);
        let before = self.begin(Doing::Interpreter);
        let result = self.execute(block, 1);
        self.resume(before);
        match result {
            Ok(()) => {
                let branched = block.count == 1 && self.state.rip != sequential;
                if self.step_trap && (branched || self.state.msrs.debugctl & DEBUGCTL_BTF == 0) {
                    self.state.pending_debug |= dr::DR6_BS;
                }
                self.note_monitor_trap();
                None
            }
            Err(Trap::Again) => {
                if trap_flag {
                    self.state.pending_debug |= dr::DR6_BS;
                }
                if had_rf {
                    self.state.rflags_system |= rflags::RF;
                }
                self.take_trap(Trap::Again)
            }
            Err(trap) => {
                // A VM exit decides by itself what RF becomes.
                if had_rf && trap == Trap::Fault {
                    self.state.rflags_system |= rflags::RF;
                }
                self.state.shadow = shadow;
                self.take_trap(trap)
            }
        }
    }

    /// Instruction breakpoints are faults, before the instruction, unless RF is set.
    fn hits_code_breakpoint(&mut self) -> bool {
        if self.state.dr7 & dr::DR7_ENABLES == 0
            || self.state.system_flag(rflags::RF)
            || self.state.shadow == Shadow::MovSs
        {
            return false;
        }
        let linear = self.linear_rip();
        let mut hits = 0;
        for i in 0..4 {
            let enabled = self.state.dr7 & 3 << (2 * i) != 0;
            if enabled && self.breakpoint(i).0 == 0 && self.state.dr[i] == linear {
                hits |= 1 << i;
            }
        }
        if hits != 0 {
            self.raise_debug(hits);
        }
        hits != 0
    }

    /// The block at RIP, decoded if need be; raises fetch faults.
    #[inline(always)]
    pub(crate) fn find_block(&mut self) -> Exec<Run> {
        let rip = self.state.rip;
        let linear = self.linear_base[Seg::Cs as usize].wrapping_add(rip);
        let user = self.state.cpl == 3;
        if self.code_bits == 64 {
            let entry = self.tlb.fetch(user, linear);
            if entry.page == linear & !4095 {
                if let Some(block) = self.blocks.find(key(entry.physical | linear & 4095, 64)) {
                    if !block.crosses() {
                        return Ok(block.run());
                    }
                }
            }
        }
        self.find_block_slow(rip, linear)
    }

    #[inline(never)]
    fn find_block_slow(&mut self, rip: u64, linear: u64) -> Exec<Run> {
        if self.code_bits == 64 {
            if !self.is_canonical(linear) {
                return Err(self.raise(Fault::gp(0)));
            }
        } else if rip > u64::from(self.state.seg(Seg::Cs).limit) {
            return Err(self.raise(Fault::gp(0)));
        }
        let linear = self.wrap(linear);
        let physical = self.fetch_physical(linear)?;
        let found = match self.blocks.find(key(physical, self.code_bits)) {
            Some(block) if !block.crosses() => Some(block.run()),
            Some(&block) => {
                let next_page = self.wrap((linear | 4095).wrapping_add(1));
                let second = self.fetch_physical(next_page)?;
                (second == block.second_physical && block.second_is_fresh()).then_some(block.run())
            }
            None => None,
        };
        let block = match found {
            Some(block) => block,
            None => self.decode_block(linear, physical)?.run(),
        };
        self.clip_to_segment(rip, block)
    }

    /// Outside 64-bit mode a block may reach past the code segment's limit: only what lies before it is executed;
    /// an instruction that itself crosses the limit faults.
    fn clip_to_segment(&mut self, rip: u64, mut block: Run) -> Exec<Run> {
        if self.code_bits == 64 {
            return Ok(block);
        }
        let limit = u64::from(self.state.seg(Seg::Cs).limit);
        while rip + u64::from(block.len) - 1 > limit {
            if block.count == 1 {
                return Err(self.raise(Fault::gp(0)));
            }
            block.count -= 1;
            // SAFETY: the op past the shortened block is one of the block's own ops in the arena.
            block.len =
                unsafe { (*self.blocks.ops().add((block.first + u32::from(block.count)) as usize)).at };
        }
        Ok(block)
    }

    /// Executes the first `most` instructions of a block. On return RIP is at the next instruction, or at the one
    /// that trapped, and completed instructions are counted.
    #[inline(always)]
    fn execute(&mut self, block: Run, most: usize) -> Exec {
        debug_assert!(most <= MAX_BLOCK);
        let base = self.state.rip;
        self.state.gpr.raw[(SLOT_BLOCK_IP / 8) as usize] = base;
        self.state.rip = self.wrap_ip(base.wrapping_add(u64::from(block.len)));
        let ops = self.blocks.ops();
        let first = block.first as usize;
        let end = first + most;
        self.block_end = end;
        let mut i = first;
        loop {
            // SAFETY: `i` is within the block's ops in the arena, which is emptied only between blocks and never
            // freed while the CPU lives; handlers get a shared reference to an op that nobody writes.
            let op: &Op = unsafe { &*ops.add(i) };
            if let Err(trap) = (op.handler)(self, op) {
                self.state.rip = self.wrap_ip(base.wrapping_add(u64::from(op.at)));
                self.state.instructions += (i - first) as u64;
                match trap {
                    Trap::Fault if self.fault_is_on_stack(op) => self.fault.vector = vector::SS,
                    Trap::Exit => self.vmx.exit.instruction_length = u32::from(op.next.wrapping_sub(op.at)),
                    Trap::Fault | Trap::Again => {}
                }
                return Err(trap);
            }
            i += 1;
            if i >= self.block_end {
                break;
            }
        }
        self.state.instructions += (i - first) as u64;
        if i != first + block.count as usize {
            // SAFETY: the op before `i` was just executed.
            let next = unsafe { (*ops.add(i - 1)).next };
            self.state.rip = self.wrap_ip(base.wrapping_add(u64::from(next)));
        }
        Ok(())
    }

    /// A non-canonical address relative to SS is #SS(0); the memory path, which does not know the segment, has
    /// raised #GP(0).
    #[cold]
    pub(crate) fn fault_is_on_stack(&mut self, op: &Op) -> bool {
        let non_canonical = std::mem::take(&mut self.non_canonical);
        non_canonical && self.fault.vector == vector::GP && op.seg == Seg::Ss as u8
    }

    /// Guest memory will be changed behind our back, by another engine: [`Cpu::check_code`] is called when it may have been.
    pub fn expect_foreign_writes(&mut self) {
        self.blocks.keep_sources();
    }

    /// Guest memory may have been changed behind our back: forgets decoded code whose bytes are others now.
    pub fn check_code(&mut self) {
        let memory = std::sync::Arc::clone(&self.memory);
        if !self.blocks.find_changes(&memory) {
            self.forget_code();
        }
    }

    /// Forgets all decoded code.
    pub fn forget_code(&mut self) {
        self.blocks.clear();
    }
}
