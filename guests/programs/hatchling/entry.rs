//! VM-entry checks: a case breaks one rule of an otherwise good VMCS. The names are those that L0 explains failures by.

use core::fmt;
use rt::cpu;
use rt::l2;
use rt::mem::{self, PAGE};
use rt::report::{fail, pass, skip};
use rt::vmx::control::{Control, PREEMPTION_TIMER};
use rt::vmx::{Exit, Failure, Vm, field as f, handler, insn, reason, vmread, vmwrite};

/// How a VM entry fails.
#[derive(Clone, Copy, PartialEq)]
pub enum Fails {
    /// VMfailValid 7.
    Controls,
    /// VMfailValid 8.
    Host,
    /// Exit reason 33 with this qualification.
    Guest(u64),
}

impl fmt::Display for Fails {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Fails::Controls => f.write_str("VMfailValid, error 7"),
            Fails::Host => f.write_str("VMfailValid, error 8"),
            Fails::Guest(qualification) => write!(f, "entry failure 33 qualification {qualification:#x}"),
        }
    }
}

/// One broken rule.
#[derive(Clone, Copy)]
pub struct Case {
    pub rule: &'static str,
    /// Controls that make the rule apply.
    pub needs: &'static [Control],
    /// Makes the rule apply in a way that is legal still.
    pub prepare: fn(),
    /// Breaks it.
    pub broken: fn(),
}

/// A free page for whatever a control points at: bitmaps, lists, the virtual-APIC page.
pub const AREA: u64 = mem::FREE + 0x70_0000;

/// A bit beyond the physical-address width.
pub fn wide() -> u64 {
    1 << cpu::physical_bits()
}

/// Changes bits of a field.
pub fn set(field: u32, bits: u64) {
    vmwrite(field, vmread(field) | bits);
}

pub fn clear(field: u32, bits: u64) {
    vmwrite(field, vmread(field) & !bits);
}

pub fn nothing() {}

/// Runs each case, and its legal neighbour before it.
pub fn check_all(cases: &[Case], fails: Fails) {
    for case in cases {
        check(case, fails);
    }
}

fn start(case: &Case) -> Option<Vm> {
    let mut vm = Vm::fresh(l2!([]));
    mem::fill(AREA, 0, 4 * PAGE);
    for control in case.needs {
        if !vm.set(core::slice::from_ref(control)) {
            skip(case.rule, control.name);
            return None;
        }
    }
    // Injected events find handlers that come back.
    handler::install();
    (case.prepare)();
    Some(vm)
}

pub fn check(case: &Case, fails: Fails) {
    let Some(mut vm) = start(case) else { return };
    // Some neighbours wait for an event: the timer brings them back.
    let timer = vm.set(&[PREEMPTION_TIMER]);
    if timer {
        vmwrite(f::PREEMPTION_TIMER_VALUE, 0);
    }
    if timer || vmread(f::GUEST_ACTIVITY) == 0 {
        match vm.enter() {
            Ok(exit) if exit.reason & reason::ENTRY_FAILURE == 0 => {}
            other => return fail(case.rule, format_args!("the legal neighbour fails: {}", Outcome(other))),
        }
    }
    let Some(mut vm) = start(case) else { return };
    if vm.set(&[PREEMPTION_TIMER]) {
        vmwrite(f::PREEMPTION_TIMER_VALUE, 0);
    }
    (case.broken)();
    let before = vmread(f::GUEST_RIP);
    let found = vm.enter();
    if as_failure(&found) != Some(fails) {
        return fail(case.rule, format_args!("{}, wanted {fails}", Outcome(found)));
    }
    // A failed VMLAUNCH leaves the state clear, and the guest state as it was.
    let again = insn::vmresume();
    if again != Err(Failure::Valid(5)) || vmread(f::GUEST_RIP) != before {
        return fail(case.rule, format_args!("the failed entry has changed the VMCS"));
    }
    pass(case.rule);
}

fn as_failure(found: &Result<Exit, Failure>) -> Option<Fails> {
    match found {
        Err(Failure::Valid(7)) => Some(Fails::Controls),
        Err(Failure::Valid(8)) => Some(Fails::Host),
        Ok(exit) if exit.reason == reason::ENTRY_FAILURE | reason::ENTRY_FAILURE_GUEST_STATE => {
            Some(Fails::Guest(exit.qualification))
        }
        _ => None,
    }
}

struct Outcome(Result<Exit, Failure>);

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.0 {
            Ok(exit) => write!(f, "{exit}"),
            Err(failure) => write!(f, "{failure}"),
        }
    }
}

/// A table of cases without clutter: `rule [controls] prepare => broken;`
#[macro_export]
macro_rules! entry_cases {
    ($($rule:ident [$($control:expr),*] $prepare:expr => $broken:expr;)*) => {
        &[$($crate::entry::Case {
            rule: stringify!($rule), needs: &[$($control),*], prepare: $prepare, broken: $broken,
        },)*]
    };
}
