//! `--explain`: why a VMX instruction or a VM entry failed, in words.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;

use turtles_cpu::Cpu;
use turtles_cpu::vmx::FailedAccess;
use vmcs_shadow::check::Rule;
use vmcs_shadow::encoding::Encoding;
use vmcs_shadow::{Field, Vmcs, error};
use x86defs::vmx::reason;

use super::msr_lists::BadEntry;

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
        self.tell(cpu.state.rip, &rule.to_string(), &text);
    }

    /// A VMX instruction that fails with a VM-instruction error, or with VMfailInvalid (none).
    pub fn instruction(&mut self, cpu: &Cpu, number: Option<u32>) {
        let exit = &cpu.vmx.exit;
        let what = reason::name(exit.reason);
        let text = match number {
            Some(number) => format!(
                "{what} (operand {:#x}) fails with error {number} ({}): {}.",
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
        self.tell(cpu.state.rip, &format!("{what} {number:?}"), &text);
    }

    /// An entry of an MSR list that VM entry or VM exit could not process.
    pub fn msr(&mut self, cpu: &Cpu, list: &str, bad: &BadEntry) {
        let (number, index, value) = (bad.number, bad.entry.index, bad.entry.value);
        let text = format!(
            "entry {number} of the {list} area (MSR {index:#x}, value {value:#x}) is refused. Rule {}: {}. (SDM volume 3, \
             \"Loading MSRs\", \"Saving MSRs\".)",
            bad.rule.name(),
            bad.rule.describe()
        );
        self.tell(cpu.state.rip, &format!("{list} {index:#x}"), &text);
    }

    /// A VMREAD or VMWRITE that the CPU refused.
    pub fn field_access(&mut self, access: &FailedAccess) {
        let what = reason::name(access.reason);
        let field = Encoding::new(access.encoding).ok().and_then(Field::from_encoding);
        let name = field.map_or("no field", |field| field.info().name);
        let text = format!(
            "{what} of encoding {:#x} ({name}) fails with error {} ({}): {}.",
            access.encoding,
            access.error,
            error::meaning(access.error),
            error::remedy(access.error)
        );
        self.tell(access.rip, &format!("{what} {:#x}", access.encoding), &text);
    }

    fn tell(&mut self, rip: u64, cause: &str, text: &str) {
        let count = self.told.entry(cause.to_owned()).or_insert(0);
        *count += 1;
        if *count > REPEATS {
            return;
        }
        let more = if *count == REPEATS { " (Not told again.)" } else { "" };
        let line = format!("turtles: explain: vCPU {} at {rip:#x}: {text}{more}\n", self.vcpu);
        // One write, so that the guest's own output does not come in between. If nobody listens, nobody is told.
        drop(std::io::stderr().write_all(line.as_bytes()));
    }
}
