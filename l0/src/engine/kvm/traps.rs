//! VMX instructions of a guest hypervisor (L1) where KVM executes ring 0 on the processor: they raise #UD there, and MOV
//! to CR4 with VMXE raises #GP. Breakpoints on L1's own handlers of the two, found through its IDT, bring them to us: the
//! delivery is taken back, and the software CPU executes the instruction as every other of L1's.
//!
//! What KVM shows of CR4.VMXE depends on the host ([`VmxeBit`]). Where KVM has no such bit, it is kept from KVM and put
//! back when the state comes home. L1's own breakpoints share the debug registers with ours: MOV DR exits (DR7.GD), and
//! what L1 asks for is armed beside ours; if there is no room, L1 executes on the software CPU.
//!
//! | L1's state | executes on |
//! | --- | --- |
//! | no VMX in its CPUID | KVM, nothing armed |
//! | CR4.VMXE clear | KVM; #GP watched, and #UD where KVM has the bit |
//! | CR4.VMXE set, outside VMX operation | software CPU: VMXON comes soon, and KVM would not tell of the bit's clearing |
//! | VMX root operation | software CPU after each exit, for as long as going to KVM costs (`cluster`), then KVM |
//! | #UD or #GP through a task gate, more breakpoints than debug registers, I/O breakpoints | software CPU |
//!
//! - TRAP-1: KVM is entered with the breakpoints of the IDT that L1 has, or not at all. The IDT register and the two
//!   gates are compared whenever KVM has come back.
//!
//! UNSUPPORTED: a KVM whose breakpoints do not fire at handlers (`probe_exits` finds out): its guests are shown no VMX.
//!
//! DEVIATION: an IDT that is loaded or edited without any exit before the next VMX instruction is not noticed in time,
//! and that instruction's #UD goes to L1. DEVIATION: bytes below the stack pointer change where the frame was pushed.
//! DEVIATION: in VMX root operation on a KVM without CR4.VMXE, MOV from CR4 shows the bit clear, and MOV to CR0 and CR4
//! may clear bits that VMX operation fixes. VMCALL: see `vm::take_hypercalls`.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use turtles_cpu::Cpu;
use turtles_cpu::state::{CpuState, EventKind, Seg, TableRegister};
use turtles_cpu::vmx::Operation;
use x86defs::{cr4, dr, rflags, vector};

use super::vcpu::{KvmVcpu, Next};
use super::{failed, tunables};
use crate::engine::EngineError;

/// What KVM does about CR4.VMXE.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum VmxeBit {
    /// It raises #GP (kvm_intel with nested=0, kvm_amd).
    Refused,
    /// It is there (kvm_intel with nested=1).
    Kept,
}

/// Debug registers for breakpoints.
const SLOTS: usize = 4;
/// The longest gate.
const GATE: usize = 16;
const DR7_IO: u64 = 2;

/// A handler's gate as it was found.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Gate {
    bytes: [u8; GATE],
    /// Bytes that there are; 0 if the IDT has no such gate in mapped memory.
    len: usize,
}

/// Where a handler begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Entry {
    /// Nowhere: the exception leads to another one, in the end to shutdown.
    Absent,
    At {
        linear: u64,
        /// Bytes of a word of its frame.
        size: usize,
    },
    /// A task gate.
    Task,
}

/// What a debug register stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Use {
    Free,
    /// The guest's own, with the same number.
    Guests,
    /// The handler of this vector, with frames of words of this size.
    Handler(u8, usize),
}

/// Breakpoints, as KVM takes them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Plan {
    addresses: [u64; SLOTS],
    dr7: u64,
    uses: [Use; SLOTS],
}

/// What the breakpoints were derived from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Source {
    idtr: TableRegister,
    long_mode: bool,
    protected: bool,
    gates: [Gate; 2],
}

/// The exceptions that L1's VMX instructions and MOV to CR4 raise on KVM.
const WATCHED: [u8; 2] = [vector::UD, vector::GP];

/// The breakpoints of one vCPU.
pub(super) struct Traps {
    vmxe_bit: VmxeBit,
    /// What KVM has armed.
    armed: Option<Plan>,
    source: Option<Source>,
    /// CR4.VMXE as L1 has it, while the state is in KVM.
    vmxe: bool,
    pub(super) cluster: Cluster,
}

/// How long L1 goes on in the software CPU after an exit: about as long as going to KVM and coming back takes, the least
/// that is never worse than twice the best choice; longer where KVM was not worth going to.
pub(super) struct Cluster {
    budget: u64,
}

impl Cluster {
    /// Instructions of VMX root operation on the software CPU before KVM is tried.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// KVM was left for a VMX instruction `took` after it was entered.
    fn came_back(&mut self, took: std::time::Duration) {
        self.budget = if took < tunables::CLUSTER_WORTH_IT {
            (self.budget * 2).min(tunables::LONGEST_CLUSTER)
        } else {
            (self.budget / 2).max(tunables::SHORTEST_CLUSTER)
        };
    }
}

/// Whether KVM may execute the guest as it is now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fit {
    Kvm,
    Software,
}

impl Traps {
    /// For a guest that is shown VMX.
    pub(super) fn new(vmxe_bit: VmxeBit) -> Self {
        let cluster = Cluster { budget: tunables::SHORTEST_CLUSTER };
        Self { vmxe_bit, armed: None, source: None, vmxe: false, cluster }
    }

    /// MOV from CR4 shows L1 a bit less on KVM.
    pub(super) fn hides_vmxe(&self) -> bool {
        self.vmxe_bit == VmxeBit::Refused
    }

    /// CR4 as KVM takes it.
    pub(super) fn hide_vmxe(&mut self, value: u64) -> u64 {
        self.vmxe = value & cr4::VMXE != 0;
        if self.vmxe_bit == VmxeBit::Kept { value } else { value & !cr4::VMXE }
    }

    /// CR4 as L1 has it.
    pub(super) fn show_vmxe(&self, value: u64) -> u64 {
        if self.vmxe_bit == VmxeBit::Refused && self.vmxe { value | cr4::VMXE } else { value }
    }

    /// The breakpoints that the state at home needs, or none if KVM cannot have it.
    fn plan(&mut self, cpu: &Cpu) -> Option<Plan> {
        let state = &cpu.state;
        let vmxe = state.cr4 & cr4::VMXE != 0;
        if vmxe && cpu.vmx.operation == Operation::Off {
            return None;
        }
        let gates = WATCHED.map(|vector| gate(cpu, vector));
        let (protected, long_mode) = (state.protected(), state.long_mode());
        self.source = Some(Source { idtr: state.idtr, long_mode, protected, gates });
        let mut plan = guests_own(state)?;
        for (vector, gate) in WATCHED.into_iter().zip(&gates) {
            // Where KVM has the bit, L1 may set it and execute VMXON without our seeing it.
            let raised = vector == vector::GP || vmxe || self.vmxe_bit == VmxeBit::Kept;
            if !raised {
                continue;
            }
            match entry(cpu, gate, vector) {
                Entry::Absent => {}
                Entry::Task => return None,
                Entry::At { linear, size } => plan.add(linear, Use::Handler(vector, size))?,
            }
        }
        Some(plan)
    }

    /// True if the IDT is no longer what the breakpoints were derived from (TRAP-1).
    fn is_stale(&self, cpu: &Cpu, sregs: &kb::kvm_sregs) -> bool {
        let Some(source) = &self.source else { return false };
        let long_mode = sregs.efer & x86defs::efer::LMA != 0;
        let protected = sregs.cr0 & x86defs::cr0::PE != 0;
        // The tables are looked up through the page tables of when the state was at home. An IDT is mapped in all.
        let same = (sregs.idt.base, sregs.idt.limit) == (source.idtr.base, source.idtr.limit)
            && (long_mode, protected) == (source.long_mode, source.protected);
        !same || WATCHED.iter().zip(&source.gates).any(|(&vector, known)| gate(cpu, vector) != *known)
    }
}

impl Plan {
    const NOTHING: Self = Self {
        addresses: [0; SLOTS],
        dr7: dr::DR7_FIXED_1 | dr::DR7_GE | dr::DR7_GD,
        uses: [Use::Free; SLOTS],
    };

    /// Adds an instruction breakpoint; none if there is no room.
    fn add(&mut self, linear: u64, usage: Use) -> Option<()> {
        let slot = self.uses.iter().position(|u| *u == Use::Free)?;
        self.addresses[slot] = linear;
        self.uses[slot] = usage;
        // Global enable; length and kind 0 are an instruction's.
        self.dr7 |= 2 << (2 * slot);
        Some(())
    }

    fn as_kvm_takes_it(&self) -> kb::kvm_guest_debug {
        let mut debug = kb::kvm_guest_debug {
            control: kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_USE_HW_BP,
            ..Default::default()
        };
        debug.arch.debugreg[..SLOTS].copy_from_slice(&self.addresses);
        debug.arch.debugreg[7] = self.dr7;
        debug
    }
}

/// The guest's own breakpoints, in their own registers; none if KVM cannot do what they ask for.
fn guests_own(state: &CpuState) -> Option<Plan> {
    let mut plan = Plan::NOTHING;
    for slot in 0..SLOTS {
        let enables = 3 << (2 * slot);
        if state.dr7 & enables == 0 {
            continue;
        }
        let kind = 15 << (16 + 4 * slot);
        if state.dr7 >> (16 + 4 * slot) & 3 == DR7_IO && state.cr4 & cr4::DE != 0 {
            return None;
        }
        plan.addresses[slot] = state.dr[slot];
        plan.uses[slot] = Use::Guests;
        plan.dr7 |= state.dr7 & (enables | kind);
    }
    Some(plan)
}

/// The gate of `vector` in the IDT, in real mode its vector.
fn gate(cpu: &Cpu, vector: u8) -> Gate {
    let state = &cpu.state;
    let len = match (state.protected(), state.long_mode()) {
        (false, _) => 4,
        (true, false) => 8,
        (true, true) => GATE,
    };
    let at = usize::from(vector) * len;
    let mut gate = Gate::default();
    let inside = at + len - 1 <= usize::from(state.idtr.limit);
    if inside && cpu.peek(state.idtr.base.wrapping_add(at as u64), &mut gate.bytes[..len]) == len {
        gate.len = len;
    }
    gate
}

/// Where a gate leads.
fn entry(cpu: &Cpu, gate: &Gate, vector: u8) -> Entry {
    const PRESENT: u8 = 0x80;
    let word = |at: usize| u64::from(u16::from_le_bytes([gate.bytes[at], gate.bytes[at + 1]]));
    let (low, selector) = (word(0), word(2) as u16);
    if gate.len == 0 {
        return Entry::Absent;
    }
    if gate.len == 4 {
        return Entry::At { linear: (u64::from(selector) << 4) + low, size: 2 };
    }
    let access = gate.bytes[5];
    if access & PRESENT == 0 {
        return Entry::Absent;
    }
    let wide = low | word(6) << 16;
    match (gate.len, access & 0x1f) {
        (GATE, 0xe | 0xf) => Entry::At { linear: wide | word(8) << 32 | word(10) << 48, size: 8 },
        (8, 0xe | 0xf) => {
            Entry::At { linear: base_of(cpu, selector).wrapping_add(wide) & 0xffff_ffff, size: 4 }
        }
        (8, 6 | 7) => Entry::At { linear: base_of(cpu, selector).wrapping_add(low) & 0xffff_ffff, size: 2 },
        (8, 5) => Entry::Task,
        _ => {
            log::debug!("the gate of vector {vector} is none for an exception");
            Entry::Absent
        }
    }
}

/// The base of the code segment that `selector` names.
fn base_of(cpu: &Cpu, selector: u16) -> u64 {
    const LOCAL: u16 = 4;
    let state = &cpu.state;
    let table = if selector & LOCAL == 0 { state.gdtr.base } else { state.ldtr.base };
    let mut bytes = [0; 8];
    cpu.peek(table.wrapping_add(u64::from(selector & !7)), &mut bytes);
    u64::from(u32::from_le_bytes([bytes[2], bytes[3], bytes[4], bytes[7]]))
}

/// True if the instruction at RIP is one that KVM does not execute as L1 is to see it.
pub(super) fn is_ours(cpu: &Cpu) -> bool {
    let state = &cpu.state;
    let code = state.seg(Seg::Cs);
    let (bits, base) = match (state.code64(), code.access & x86defs::segment::DB != 0) {
        (true, _) => (64, 0),
        (false, true) => (32, code.base),
        (false, false) => (16, code.base),
    };
    let mut bytes = [0; 15];
    let known = cpu.peek(base.wrapping_add(state.rip), &mut bytes);
    let insn = Decoder::with_ip(bits, &bytes[..known], state.rip, DecoderOptions::NONE).decode();
    match insn.mnemonic() {
        Mnemonic::Vmxon
        | Mnemonic::Vmxoff
        | Mnemonic::Vmclear
        | Mnemonic::Vmptrld
        | Mnemonic::Vmptrst
        | Mnemonic::Vmread
        | Mnemonic::Vmwrite
        | Mnemonic::Vmlaunch
        | Mnemonic::Vmresume
        | Mnemonic::Vmcall
        | Mnemonic::Vmfunc
        | Mnemonic::Invept
        | Mnemonic::Invvpid => true,
        Mnemonic::Mov => insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::CR4,
        _ => false,
    }
}

/// Takes back the delivery of `vector` if it was for an instruction of ours. Otherwise nothing changes.
fn undo(cpu: &mut Cpu, vector: u8, size: usize) -> bool {
    let before = cpu.state.clone();
    // Real mode pushes no error codes.
    let error_code = vector == vector::GP && before.protected();
    let undone = cpu.undo_delivery(size, error_code);
    // A fault's frame has RF set, where it has room for it; an interrupt's that came in front of the instruction has not.
    let fault = size == 2 || cpu.state.rflags() & rflags::RF != 0;
    if undone && fault && is_ours(cpu) {
        return true;
    }
    cpu.state = before;
    cpu.state_changed();
    false
}

/// An exception that KVM raised for an instruction of ours, and came back before it delivered: nothing has to be taken
/// back, the instruction is still to be executed.
pub(super) fn drop_undelivered(cpu: &mut Cpu) {
    let raised = cpu.state.injected.filter(|event| event.kind == EventKind::HardwareException);
    if raised.is_some_and(|event| WATCHED.contains(&event.vector)) && is_ours(cpu) {
        cpu.state.injected = None;
    }
}

/// What KVM does about CR4.VMXE of this vCPU, which was made just now.
pub(super) fn vmxe_bit(fd: &VcpuFd) -> Result<VmxeBit, EngineError> {
    let sregs = fd.get_sregs().map_err(failed("reading system registers"))?;
    if fd.set_sregs(&kb::kvm_sregs { cr4: sregs.cr4 | cr4::VMXE, ..sregs }).is_err() {
        return Ok(VmxeBit::Refused);
    }
    fd.set_sregs(&sregs).map_err(failed("writing system registers"))?;
    Ok(VmxeBit::Kept)
}

impl KvmVcpu {
    /// Arms the breakpoints for the state at home, which is about to move in.
    pub(super) fn arm(&mut self, cpu: &Cpu) -> Result<Fit, EngineError> {
        let Some(traps) = &mut self.traps else { return Ok(Fit::Kvm) };
        let Some(plan) = traps.plan(cpu) else { return Ok(Fit::Software) };
        if traps.armed != Some(plan) {
            self.fd.set_guest_debug(&plan.as_kvm_takes_it()).map_err(failed("setting breakpoints"))?;
            traps.armed = Some(plan);
        }
        Ok(Fit::Kvm)
    }

    /// True if the breakpoints are to be derived anew before KVM goes on.
    pub(super) fn idt_changed(&mut self, cpu: &Cpu) -> bool {
        let valid = u64::from(kb::KVM_SYNC_X86_SREGS);
        if self.fd.get_kvm_run().kvm_valid_regs & valid == 0 {
            return false;
        }
        let sregs = self.fd.sync_regs().sregs;
        self.traps.as_ref().is_some_and(|traps| traps.is_stale(cpu, &sregs))
    }

    /// KVM_EXIT_DEBUG: at a handler of L1's, or at what a breakpoint or TF of its own asked for.
    pub(super) fn debug_exit(&mut self, cpu: &mut Cpu) -> Result<Next, EngineError> {
        // SAFETY: the exit reason says which part of the union KVM filled in.
        let debug = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.debug.arch };
        let took = self.entered.elapsed();
        self.come_home_as(cpu, turtles_cpu::state::Activity::Active)?;
        let Some((traps, plan)) = self.traps.as_mut().and_then(|t| t.armed.map(|plan| (t, plan))) else {
            return Ok(Next::Software(1));
        };
        let hit = |slot: usize| debug.dr6 >> slot & 1 != 0 && debug.dr7 >> (2 * slot) & 3 != 0;
        let traps_of_l1 = (0..SLOTS)
            .filter(|&slot| {
                hit(slot) && plan.uses[slot] == Use::Guests && plan.dr7 >> (16 + 4 * slot) & 3 != 0
            })
            .fold(debug.dr6 & dr::DR6_BS, |bits, slot| bits | 1 << slot);
        if traps_of_l1 != 0 {
            cpu.state.pending_debug |= traps_of_l1;
            return Ok(Next::Software(1));
        }
        for slot in (0..SLOTS).filter(|&slot| hit(slot)) {
            let Use::Handler(vector, size) = plan.uses[slot] else { continue };
            if undo(cpu, vector, size) {
                self.stats.vmx_instructions += 1;
                traps.cluster.came_back(took);
                return Ok(Next::Software(traps.cluster.budget()));
            }
        }
        if (0..SLOTS).any(|slot| hit(slot) && matches!(plan.uses[slot], Use::Handler(..))) {
            // A fault that is L1's. RF lets its handler begin.
            self.stats.handlers_entered += 1;
            log::debug!("exception of the guest's own: its handler begins at {:#x}", cpu.state.rip);
            cpu.state.set_rflags(cpu.state.rflags() | rflags::RF);
            return Ok(Next::Again);
        }
        // An instruction breakpoint of L1's, MOV DR, INT1: as the software CPU does them.
        Ok(Next::Software(1))
    }
}
