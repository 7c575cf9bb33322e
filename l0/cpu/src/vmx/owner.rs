//! What the owner of a vCPU does to it between VM exit and VM entry.

use x86defs::{msr, rflags};

use crate::Cpu;
use crate::bus::MsrRefused;
use crate::trap::Fault;

impl Cpu {
    /// WRMSR as VM entry and VM exit do it for the entries of a list; false where it would raise #GP(0).
    pub fn load_msr(&mut self, index: u32, value: u64) -> bool {
        self.write_msr(index, value).is_ok()
    }

    /// RDMSR as VM exit does it for the entries of a list.
    pub fn stored_msr(&mut self, index: u32) -> Option<u64> {
        if index == msr::IA32_TSC {
            return Some(self.root_tsc());
        }
        self.read_msr(index).map_err(|MsrRefused| ()).ok()
    }

    /// The time-stamp counter of root operation.
    pub fn root_tsc(&mut self) -> u64 {
        let ticks = self.state.ticks();
        let clock = self.bus().tsc(ticks);
        self.state.tsc(clock)
    }

    /// Raises `fault` at RIP as the instruction there would have: in non-root operation it may cause a VM exit.
    pub fn inject_fault(&mut self, fault: Fault) {
        if self.non_root() {
            self.vmx.raised = Some(fault);
        } else {
            let event = self.exception(fault);
            self.state.injected = Some(event);
            self.state.rflags_system |= rflags::RF;
        }
        self.attend();
    }
}
