//! Nesting: one vCPU's virtual VMX. L1 executes VMX instructions; here they act on VMCS12 (`vmx_insn`), enter L2
//! (`enter`), and L2's exits are handled or reflected to L1 (`leave`).
//!
//! The loop reads like the paper: run → exit → [`Nested::handle`] → route → handle or reflect → run. The engine
//! executes one level of VMX under VMCS01 (L1) or VMCS02 (L2); nothing below this module knows of nesting.
//!
//! Where VMCS12 is: while L1 runs, in the CPU ([`turtles_cpu::vmx::Vmx::current`]), where VMREAD and VMWRITE reach it
//! without an exit, as hardware's VMCS shadowing does; while L2 runs, in [`Nested::vmcs12`]; when it is not current, in
//! L1's memory.

mod controls;
mod enter;
mod explain;
mod guest_state;
mod host_state;
mod leave;
mod msr_lists;
mod route;
pub mod second_level;
mod timer;
mod vmx_insn;

use std::sync::Arc;

use turtles_cpu::Cpu;
use turtles_cpu::vmx::{Operation, VmExit};
use vmcs_shadow::caps::Capabilities;
use vmcs_shadow::exit_policy::Handler;
use vmcs_shadow::{Vmcs, merge};
use x86defs::vmx::reason;

use crate::recorder::Recorder;

pub use explain::Explainer;
pub use timer::PreemptionTimer;

/// Marks "no VMCS" where a VMCS address is kept.
const NO_POINTER: u64 = u64::MAX;

/// One vCPU's virtual VMX.
pub struct Nested {
    capabilities: Arc<Capabilities>,
    /// The VMXON region, in VMX operation.
    vmxon_pointer: u64,
    /// Launch state of the current VMCS12.
    launched: bool,
    /// The current VMCS is a shadow VMCS: not for VM entry.
    current_is_shadow: bool,
    /// Launch state of the VMCS that L2 sees as its own (VMCS shadowing).
    shadow_launched: bool,
    /// VMCS12 while L2 runs.
    vmcs12: Option<Box<Vmcs>>,
    /// What L0 itself asks for.
    vmcs01: Vmcs,
    timer: PreemptionTimer,
    /// `--explain`.
    explainer: Option<Explainer>,
    /// `--trace` and `--stats`.
    pub recorder: Option<Box<Recorder>>,
}

/// What the vCPU loop does after an exit was handled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum After {
    GoOn,
    /// The logical processor has shut down (VMX abort).
    Shutdown,
}

impl Nested {
    /// Virtual VMX as `capabilities` has it.
    pub fn new(capabilities: Arc<Capabilities>, timer: PreemptionTimer) -> Self {
        let vmcs01 = merge::passive_vmcs01(&capabilities);
        Self {
            capabilities,
            vmxon_pointer: NO_POINTER,
            launched: false,
            current_is_shadow: false,
            shadow_launched: false,
            vmcs12: None,
            vmcs01,
            timer,
            explainer: None,
            recorder: None,
        }
    }

    /// Tells from now on why VMX instructions and VM entries fail.
    pub fn explain(&mut self, explainer: Explainer) {
        self.explainer = Some(explainer);
    }

    /// Handles a [`turtles_cpu::Exit::Vm`].
    pub fn handle(&mut self, cpu: &mut Cpu) -> After {
        if let (Some(explainer), Some(access)) = (&mut self.explainer, cpu.vmx.failed_access.take()) {
            explainer.field_access(&access);
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.exit(cpu);
        }
        let after = match cpu.vmx.operation {
            Operation::NonRoot => self.exit_of_l2(cpu),
            Operation::Off | Operation::Root => self.instruction_of_l1(cpu),
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.handled(cpu);
        }
        after
    }

    /// An INIT signal or start-up IPI that arrives while L2 runs.
    pub fn signal_exit(&mut self, cpu: &mut Cpu, reason: u32, qualification: u64) {
        cpu.vmx.exit = VmExit { reason, qualification, ..VmExit::default() };
        self.handle(cpu);
    }

    fn exit_of_l2(&mut self, cpu: &mut Cpu) -> After {
        match self.vmcs12.as_ref().map(|vmcs12| route::handler(cpu, vmcs12)) {
            Some(Handler::L1) => self.reflect(cpu),
            // Nothing that L0 itself asked for has effects on the software CPU: what is to be done between two
            // instructions of L2 was done on the way here.
            Some(Handler::L0) | None => After::GoOn,
        }
    }

    fn instruction_of_l1(&mut self, cpu: &mut Cpu) -> After {
        match cpu.vmx.exit.reason {
            reason::VMXON => self.vmxon(cpu),
            reason::VMXOFF => self.vmxoff(cpu),
            reason::VMCLEAR => self.vmclear(cpu),
            reason::VMPTRLD => self.vmptrld(cpu),
            reason::VMLAUNCH | reason::VMRESUME => return self.enter(cpu),
            reason::INVEPT => self.invept(cpu),
            reason::INVVPID => self.invvpid(cpu),
            _ => self.vmcall(cpu),
        }
        After::GoOn
    }
}
