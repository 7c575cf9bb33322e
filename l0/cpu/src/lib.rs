//! The software CPU: an x86-64 system processor in software.
//!
//! [`Cpu`] executes the guest whose plain-data state is [`state::CpuState`], in the memory [`phys::PhysMemory`],
//! asking its owner through [`bus::Bus`]. It knows nothing of nesting, devices or KVM.
//!
//! - `decode`: bytes → [`op::Op`]s, once; `block`: where they are kept and when they are forgotten
//! - `interp`: one file per instruction family
//! - `jit`: the translator of hot blocks
//! - `mmu`: page walks and the software TLB
//! - `exec`: the run loop; `events`: interrupts and exceptions into the IDT

pub mod attention;
pub mod block;
pub mod bus;
pub mod cpuid;
mod decode;
mod events;
mod exec;
mod interp;
mod jit;
pub mod mmu;
pub mod native;
pub mod op;
pub mod phys;
pub mod profile;
pub mod state;
pub mod trap;
mod tunables;
pub mod vmx;

use std::sync::Arc;

use attention::Attention;
use block::BlockCache;
use bus::Bus;
use cpuid::CpuModel;
use mmu::guard::GuardedPages;
use mmu::tlb::{DataTable, Mode, Tlb};
use phys::{Peer, PhysMemory};
use state::{CpuState, Event};
use trap::Fault;
use vmx::{Controls, Operation, Vmx};

/// Why [`Cpu::run`] returned. Everything that can be answered while an instruction is under way goes through
/// [`Bus`] instead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Exit {
    /// HLT with nothing to do: `state.activity` is `Halted`.
    Halted,
    /// Triple fault: `state.activity` is `Shutdown`; RIP is at the instruction that could not be delivered from.
    Shutdown,
    /// INIT, SIPI or CANCEL is set in the attention word: the owner decides.
    Attention,
    /// The instruction budget is used up.
    Budget,
    /// Interrupts can be taken now, and the caller asked to be told.
    InterruptWindow,
    /// A VM exit from non-root operation, or a VMX instruction in root operation: details in [`vmx::Vmx::exit`].
    Vm,
}

/// One vCPU's software CPU. What translated code uses most is where one byte says how far it is from the general registers.
#[repr(C)]
pub struct Cpu {
    /// What translated code works with.
    pub(crate) jit: jit::Hot,
    /// The vCPU: plain data, valid whenever `run` is not executing. After changing it, call [`Cpu::state_changed`].
    pub state: CpuState,
    /// Its VMX side.
    pub vmx: Vmx,
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) bus: Box<dyn Bus>,
    pub(crate) model: Arc<CpuModel>,
    pub(crate) attention: Arc<Attention>,
    pub(crate) peer: Arc<Peer>,
    pub(crate) tlb: Tlb,
    pub(crate) blocks: BlockCache,
    pub(crate) translator: Option<Box<jit::Translator>>,
    pub(crate) profile: Option<Box<profile::Profiled>>,
    /// Details of the fault that a [`trap::Trap::Fault`] announced.
    pub(crate) fault: Fault,
    /// Details of a [`trap::Trap::Exit`].
    pub(crate) exit: Exit,
    /// Current data table; see `refresh_mode`.
    pub(crate) data_table: *const DataTable,
    pub(crate) data_mode: Mode,
    /// 16, 32 or 64.
    pub(crate) code_bits: u32,
    /// Segment bases as effective addresses need them (0 for ES, CS, SS, DS in 64-bit mode).
    pub(crate) linear_base: [u64; 8],
    /// Index past the last op to execute of the running block; 0 leaves it after the current instruction.
    pub(crate) block_end: usize,
    /// The run loop must look at interrupts, traps and the like before the next block.
    pub(crate) look_up: bool,
    /// The last #GP was raised for a non-canonical address.
    pub(crate) non_canonical: bool,
    /// Pages with instruction breakpoints.
    pub(crate) guarded: GuardedPages,
    /// The page that only the slow path may access (APIC-1); no page's address if there is none.
    pub(crate) apic_page: u64,
    /// An event is on its way through the IDT.
    pub(crate) delivering: bool,
    /// What was on its way into its handler when `fault` was raised.
    pub(crate) vectoring: Option<Event>,
    /// The IRET under way has unblocked NMIs.
    pub(crate) iret_unblocked: bool,
    /// The instruction under way is followed by a single-step trap.
    pub(crate) step_trap: bool,
    /// Return [`Exit::InterruptWindow`] as soon as interrupts can be taken.
    pub want_interrupt_window: bool,
    /// CPU number, for CPUID's APIC ID.
    pub(crate) apic_id: u32,
    /// PAUSEs executed, modulo 2^32.
    pub(crate) spins: u32,
    /// Times that privilege or mode may have changed, and when that was last: see [`Cpu::mode_changes`].
    pub(crate) mode_changes: u64,
    pub(crate) mode_since: u64,
}

// SAFETY: the raw pointer points into `tlb`, which moves with the CPU as boxed memory; all other fields are Send.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A vCPU after power-on.
    pub fn new(
        memory: Arc<PhysMemory>,
        bus: Box<dyn Bus>,
        model: Arc<CpuModel>,
        attention: Arc<Attention>,
        apic_id: u32,
    ) -> Self {
        let peer = memory.add_peer(Arc::clone(&attention));
        let tlb = Tlb::default();
        let data_table: *const DataTable = tlb.data(Mode::Slow);
        let jit = jit::Hot::new(Arc::as_ptr(&attention));
        let mut cpu = Self {
            state: CpuState::reset(),
            vmx: Vmx { current_pointer: u64::MAX, ..Vmx::default() },
            memory,
            bus,
            model,
            attention,
            peer,
            tlb,
            blocks: BlockCache::default(),
            jit,
            translator: None,
            profile: None,
            fault: Fault::default(),
            exit: Exit::Halted,
            data_table,
            data_mode: Mode::Slow,
            code_bits: 16,
            linear_base: [0; 8],
            block_end: 0,
            look_up: true,
            non_canonical: false,
            guarded: GuardedPages::default(),
            apic_page: u64::MAX,
            delivering: false,
            vectoring: None,
            iret_unblocked: false,
            step_trap: false,
            want_interrupt_window: false,
            apic_id,
            spins: 0,
            mode_changes: 0,
            mode_since: 0,
        };
        if let Some(threshold) = jit::threshold_from_environment() {
            cpu.translate_after(threshold);
        }
        cpu.state_changed();
        cpu
    }

    /// The owner, told how far we are.
    pub fn bus(&mut self) -> &mut dyn Bus {
        self.bus.at(self.state.ticks());
        &mut *self.bus
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<PhysMemory> {
        &self.memory
    }

    /// The CPU model.
    pub fn model(&self) -> &Arc<CpuModel> {
        &self.model
    }

    /// Call after changing [`Cpu::state`] from outside: drops everything derived from it.
    pub fn state_changed(&mut self) {
        // What the host executes for us relies on it that no x87 exception is pending unless ES says so.
        self.state.x87.update_summary();
        self.tlb.flush_all();
        self.refresh_space();
        self.attend();
    }

    /// Call after another engine has executed code in ring 3: registers have changed, and nothing that translations
    /// depend on.
    pub fn registers_changed(&mut self) {
        self.state.x87.update_summary();
        self.refresh_mode();
        self.attend();
    }

    /// Counts occasions at which the privilege level may have changed. As long as it stays the same, so does the
    /// privilege level.
    pub fn mode_changes(&self) -> u64 {
        self.mode_changes
    }

    /// Ticks since the last of these occasions, to the length of a block of instructions.
    pub fn ticks_in_mode(&self) -> u64 {
        self.state.ticks().saturating_sub(self.mode_since)
    }

    /// Reads guest memory at a linear address without any effect on the guest; returns how many bytes are mapped.
    pub fn peek(&self, linear: u64, data: &mut [u8]) -> usize {
        let second = self.vmx.second_level.as_deref().filter(|_| self.vmx.nested_paging());
        let mut done = 0;
        while done < data.len() {
            let at = self.wrap(linear.wrapping_add(done as u64));
            let Some(physical) = mmu::walk::peek(&self.state, &self.memory, second, at) else { break };
            let step = (data.len() - done).min(4096 - (at & 4095) as usize);
            self.memory.read(physical, &mut data[done..done + step]);
            done += step;
        }
        done
    }

    /// Goes on in non-root operation under `controls`; `state` is the guest's, set by the owner.
    pub fn enter_non_root(&mut self, controls: Controls) {
        self.vmx.controls = controls;
        self.vmx.pause_loop = None;
        self.vmx.check_timer = true;
        self.vmx.raised = None;
        self.vmx.operation = Operation::NonRoot;
        self.refresh_space();
        self.enter_virtual_apic();
        self.attend();
    }

    /// Goes on in root operation; `state` is the hypervisor's, set by the owner.
    pub fn leave_non_root(&mut self) {
        self.vmx.operation = Operation::Root;
        self.refresh_space();
        self.attend();
    }

    /// Ends the instruction that a [`Exit::Vm`] was about: RIP moves past it, and what one instruction's end does to
    /// shadows and traps is done.
    pub fn complete_instruction(&mut self) {
        let next = self.state.rip.wrapping_add(u64::from(self.vmx.exit.instruction_length));
        self.state.rip = self.wrap_ip(next);
        self.state.instructions += 1;
        self.state.shadow = state::Shadow::None;
        self.state.set_rflags(self.state.rflags() & !x86defs::rflags::RF);
        let steps = self.state.msrs.debugctl & exec::DEBUGCTL_BTF == 0;
        if steps && self.state.system_flag(x86defs::rflags::TF) {
            self.state.pending_debug |= x86defs::dr::DR6_BS;
        }
        self.note_monitor_trap();
        self.attend();
    }

    /// Makes the run loop look at interrupts, traps and shadows before the next instruction block.
    #[inline(always)]
    pub(crate) fn attend(&mut self) {
        self.look_up = true;
    }

    /// Leaves the running block after the current instruction.
    #[inline(always)]
    pub(crate) fn leave_block(&mut self) {
        self.block_end = 0;
    }
}
