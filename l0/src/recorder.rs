//! What a vCPU's returns to L0 were, for `--trace` and `--stats`. Without either there is no recorder, and what it would
//! cost is one branch for each return.
//!
//! Nesting calls [`Recorder::exit`] when the CPU returns with a VMX instruction of L1 or an exit of L2, and
//! [`Recorder::handled`] when it is done with that; what it did is seen from the vCPU's state.

use std::sync::{Arc, Mutex};

use turtles_cpu::Cpu;
use turtles_cpu::vmx::Operation;
use vmcs_shadow::{Field, error};
use x86defs::rflags;
use x86defs::vmx::reason;

use crate::clock::Clock;
use crate::exit_words::{details, injected, operands};
use crate::nested::second_level::CombinedTables;
use crate::stats::Statistics;
use crate::trace::{Level, Return, Trace};
use crate::vcpu_signal::lock;

/// A return to L0 that is being handled.
struct Under {
    level: Level,
    reason: u32,
    rip: u64,
    at_ns: u64,
    instructions: u64,
    /// Empty without a trace.
    details: String,
}

/// An exit of L2 that L1 is handling.
struct Reflected {
    reason: u32,
    at_ns: u64,
    instructions: u64,
    slept_ns: u64,
    returns: u64,
}

/// What nesting made of a return.
enum Outcome {
    /// L2's exit is L1's.
    Reflected,
    /// L2 goes on; L0 handled its exit.
    Handled,
    /// L1 entered L2.
    Entered,
    /// L1's VM entry failed as an exit.
    EntryFailed,
    /// L1 goes on after its instruction.
    Executed,
}

/// One vCPU's.
pub struct Recorder {
    vcpu: usize,
    clock: Arc<Clock>,
    trace: Option<Arc<Trace>>,
    stats: Option<Arc<Mutex<Statistics>>>,
    under: Option<Under>,
    reflected: Option<Reflected>,
    /// Who executes.
    level: Level,
    since_ns: u64,
    /// What L1 or L2 has been executing for since then; for the trace.
    doing: String,
    slept_ns: u64,
    asleep_since: Option<u64>,
}

impl Recorder {
    /// None if nobody wants to know.
    pub fn new(
        vcpu: usize,
        clock: Arc<Clock>,
        trace: Option<Arc<Trace>>,
        stats: Option<Arc<Mutex<Statistics>>>,
    ) -> Option<Box<Self>> {
        if trace.is_none() && stats.is_none() {
            return None;
        }
        Some(Box::new(Self {
            vcpu,
            clock,
            trace,
            stats,
            under: None,
            reflected: None,
            level: Level::L1,
            since_ns: 0,
            doing: "L1".into(),
            slept_ns: 0,
            asleep_since: None,
        }))
    }

    /// The CPU returned with a VM exit or a VMX instruction; nothing has been done about it yet.
    pub fn exit(&mut self, cpu: &Cpu) {
        let exit = &cpu.vmx.exit;
        let at_ns = self.clock.now_ns();
        let level = level_of(cpu);
        let details = match (&self.trace, level) {
            (None, _) => String::new(),
            (Some(_), Level::L2) => details(exit, &cpu.state),
            (Some(_), Level::L0 | Level::L1) => operands(exit),
        };
        if let (Level::L1, Some(reflected)) = (level, &mut self.reflected) {
            reflected.returns += 1;
        }
        self.under = Some(Under {
            level,
            reason: exit.reason,
            rip: cpu.state.rip,
            at_ns,
            instructions: cpu.state.instructions,
            details,
        });
    }

    /// Nesting is done with it; the vCPU's state is what goes on.
    pub fn handled(&mut self, cpu: &mut Cpu) {
        let Some(under) = self.under.take() else { return };
        let now = self.clock.now_ns();
        let outcome = outcome(&under, cpu);
        if let Some(stats) = &self.stats {
            count(&mut lock(stats), &under, &outcome, now, cpu);
        }
        if matches!(outcome, Outcome::Entered) {
            self.answered(&under);
        }
        if matches!(outcome, Outcome::Reflected) {
            self.reflected = Some(Reflected {
                reason: under.reason,
                at_ns: now,
                instructions: cpu.state.instructions,
                slept_ns: self.slept_ns,
                returns: 0,
            });
        }
        self.trace(&under, &outcome, now, cpu);
        self.level = level_of(cpu);
        self.since_ns = now;
    }

    /// L1 enters L2: the exit before has had its answer.
    fn answered(&mut self, under: &Under) {
        let (Some(reflected), Some(stats)) = (self.reflected.take(), &self.stats) else { return };
        let mut stats = lock(stats);
        let row = stats.l2(reflected.reason);
        let slept = self.slept_ns - reflected.slept_ns;
        row.answered += 1;
        row.l1_instructions += under.instructions.saturating_sub(reflected.instructions);
        row.l1_ns += under.at_ns.saturating_sub(reflected.at_ns).saturating_sub(slept);
        row.l1_returns += reflected.returns;
    }

    fn trace(&mut self, under: &Under, outcome: &Outcome, now: u64, cpu: &mut Cpu) {
        let Some(trace) = &self.trace else { return };
        trace.returned(&Return {
            vcpu: self.vcpu,
            level: under.level,
            rip: under.rip,
            name: name(under.reason),
            details: &under.details,
            outcome: &words(under, outcome, cpu),
            since_ns: self.since_ns,
            doing: &self.doing,
            at_ns: under.at_ns,
            handled_ns: now,
        });
        match outcome {
            Outcome::Entered => {
                self.doing = "L2".into();
                if let Some(tables) = tables(cpu) {
                    tables.trace_fills(trace, self.vcpu);
                }
            }
            Outcome::Reflected => self.doing = format!("L1 handles {}", name(under.reason)),
            Outcome::Handled | Outcome::EntryFailed | Outcome::Executed => {}
        }
    }

    /// The vCPU sleeps, in HLT or the like. (It may be told so again without having run.)
    pub fn sleep(&mut self) {
        if let (Level::L1, Some(reflected)) = (self.level, &mut self.reflected) {
            reflected.returns += 1;
        }
        self.asleep_since = Some(self.clock.now_ns());
        if let Some(stats) = &self.stats {
            lock(stats).sleeps[usize::from(self.level == Level::L2)] += 1;
        }
        if let Some(trace) = &self.trace {
            trace.happened(self.vcpu, self.level, "sleeps", "");
        }
    }

    /// It goes on.
    pub fn wake(&mut self) {
        let Some(since) = self.asleep_since.take() else { return };
        self.slept_ns += self.clock.now_ns().saturating_sub(since);
        if let Some(trace) = &self.trace {
            trace.happened(self.vcpu, self.level, "wakes", "");
        }
    }
}

fn level_of(cpu: &Cpu) -> Level {
    match cpu.vmx.operation {
        Operation::NonRoot => Level::L2,
        Operation::Off | Operation::Root => Level::L1,
    }
}

fn tables(cpu: &mut Cpu) -> Option<&mut CombinedTables> {
    cpu.vmx.second_level.as_mut()?.as_any().downcast_mut()
}

fn name(reason: u32) -> &'static str {
    reason::name(reason)
}

fn outcome(under: &Under, cpu: &Cpu) -> Outcome {
    let enters = matches!(under.reason, reason::VMLAUNCH | reason::VMRESUME);
    match (under.level, level_of(cpu)) {
        (Level::L2, Level::L2) => Outcome::Handled,
        (Level::L2, Level::L0 | Level::L1) => Outcome::Reflected,
        (Level::L0 | Level::L1, Level::L2) => Outcome::Entered,
        // An entry that fails as an exit loads RFLAGS; one that fails as an instruction sets CF or ZF.
        (Level::L0 | Level::L1, Level::L0 | Level::L1) if enters && !has_failed(cpu) => Outcome::EntryFailed,
        (Level::L0 | Level::L1, Level::L0 | Level::L1) => Outcome::Executed,
    }
}

fn has_failed(cpu: &Cpu) -> bool {
    cpu.state.rflags() & (rflags::CF | rflags::ZF) != 0
}

fn count(stats: &mut Statistics, under: &Under, outcome: &Outcome, now: u64, cpu: &mut Cpu) {
    let row = if under.level == Level::L2 { stats.l2(under.reason) } else { stats.l1(under.reason) };
    row.count += 1;
    row.l0_ns += now.saturating_sub(under.at_ns);
    row.reflected += u64::from(matches!(outcome, Outcome::Reflected));
    if matches!(outcome, Outcome::Entered) {
        stats.entries += 1;
        stats.injections += u64::from(cpu.state.injected.is_some() || cpu.vmx.controls.pending_mtf);
    }
    if let Some(tables) = tables(cpu) {
        stats.walks = tables.walks();
    }
}

/// What became of it, in words.
fn words(under: &Under, outcome: &Outcome, cpu: &Cpu) -> String {
    match outcome {
        Outcome::Reflected => format!("L1 at {:#x}", cpu.state.rip),
        Outcome::Handled => "handled by L0".into(),
        Outcome::Entered => {
            let injected = match &cpu.state.injected {
                Some(event) => format!(", injecting {}", injected(event)),
                None if cpu.vmx.controls.pending_mtf => ", injecting a monitor trap".into(),
                None => String::new(),
            };
            format!("L2 at {:#x}{injected}", cpu.state.rip)
        }
        Outcome::EntryFailed => {
            let of = |field| cpu.vmx.current.as_ref().map_or(0, |vmcs| vmcs.get(field));
            let (why, qualification) = (of(Field::ExitReason) as u32, of(Field::ExitQualification));
            format!("{}, qualification {qualification}", name(why & !reason::ENTRY_FAILURE))
        }
        Outcome::Executed => result(under, cpu),
    }
}

/// "VMsucceed" is nothing to speak of.
fn result(under: &Under, cpu: &Cpu) -> String {
    let flags = cpu.state.rflags();
    match &cpu.vmx.current {
        _ if under.reason == reason::VMXOFF && cpu.vmx.operation == Operation::Off => String::new(),
        Some(vmcs) if flags & rflags::ZF != 0 => {
            let number = vmcs.get32(Field::InstructionError);
            format!("VMfail {number}: {}", error::meaning(number))
        }
        _ if flags & rflags::CF != 0 => "VMfailInvalid".into(),
        _ => String::new(),
    }
}
