//! `--explain`: why a VMX instruction or a VM entry failed, in words.

use std::collections::HashMap;
use std::fmt::Write as _;

use turtles_cpu::Cpu;
use vmcs_shadow::check::Rule;
use vmcs_shadow::{Vmcs, error};
use x86defs::vmx::reason;

/// Each cause is told so often; guests that probe repeat themselves.
const REPEATS: u32 = 3;

/// Tells one vCPU's failures, on standard error.
#[derive(Default)]
pub struct Explainer {
    vcpu: usize,
    told: HashMap<String, u32>,
}

impl Explainer {
    /// For one vCPU.
    pub fn new(vcpu: usize) -> Self {
        Self { vcpu, told: HashMap::new() }
    }

    /// A VM entry that a rule forbids; `number` is the VM-instruction error, or none if it fails as an exit.
    pub fn entry(&mut self, cpu: &Cpu, vmcs12: &Vmcs, rule: Rule, number: Option<u32>) {
        let how = match number {
            Some(number) => format!("fails with error {number} ({})", error::meaning(number)),
            None => format!(
                "fails as an exit with reason {} and qualification {}",
                reason::ENTRY_FAILURE_GUEST_STATE,
                rule.entry_failure_qualification()
            ),
        };
        let mut fields = String::new();
        for field in rule.fields() {
            let separator = if fields.is_empty() { " Here: " } else { ", " };
            // Writing to a String cannot fail.
            let _ = write!(fields, "{separator}{} = {:#x}", field.info().name, vmcs12.get(field));
        }
        let what = reason::name(cpu.vmx.exit.reason);
        let text = format!(
            "{what} {how}. Rule {rule}: {}. (SDM volume 3, \"{}\".){fields}",
            rule.describe(),
            rule.section()
        );
        self.tell(cpu, &rule.to_string(), &text);
    }

    /// A VMX instruction that fails with a VM-instruction error, or with VMfailInvalid (none).
    pub fn instruction(&mut self, cpu: &Cpu, number: Option<u32>) {
        let exit = &cpu.vmx.exit;
        let what = reason::name(exit.reason);
        let text = match number {
            Some(number) => format!(
                "{what} (operand {:#x}) fails with error {number}: {}. {}.",
                exit.operand,
                error::meaning(number),
                error::remedy(number)
            ),
            None => format!(
                "{what} (operand {:#x}) fails with VMfailInvalid: there is no current VMCS, or the pointer is not \
                 4-KiB aligned, beyond the physical-address width, or to a region with another revision identifier.",
                exit.operand
            ),
        };
        self.tell(cpu, &format!("{what} {number:?}"), &text);
    }

    /// An MSR-load list's entry that VM entry or exit could not load.
    pub fn msr(&mut self, cpu: &Cpu, entry: u64, index: u32, value: u64) {
        let text = format!(
            "VM-entry failure: entry {entry} of the VM-entry MSR-load area (MSR {index:#x} = {value:#x}) cannot be \
             loaded. WRMSR would raise #GP for it, or it is an MSR that no such list may hold. (SDM volume 3, \"Loading \
             MSRs\".)"
        );
        self.tell(cpu, &format!("msr {index:#x}"), &text);
    }

    fn tell(&mut self, cpu: &Cpu, cause: &str, text: &str) {
        let count = self.told.entry(cause.to_owned()).or_insert(0);
        *count += 1;
        if *count > REPEATS {
            return;
        }
        let more = if *count == REPEATS { " (Not told again.)" } else { "" };
        eprintln!("turtles: explain: vCPU {} at {:#x}: {text}{more}", self.vcpu, cpu.state.rip);
    }
}
