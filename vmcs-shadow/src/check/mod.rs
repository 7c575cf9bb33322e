//! The checks of VM entry (SDM volume 3, "VM Entries"): on VM-execution, VM-exit and VM-entry controls, on the host's
//! state, on the guest's state, in the SDM's order. A check that fails names its rule.
//!
//! - [`check_controls`] fails: VMfailValid with error 7.
//! - [`check_host_state`] fails: VMfailValid with error 8.
//! - [`check_guest_state`] fails: VM exit with reason 33 and [`Rule::entry_failure_qualification`].
//! - [`msr_list`] fails: VM exit with reason 34 and the entry's number; or, on a VM exit, VMX abort.

mod entry_ctls;
mod exec_ctls;
mod exit_ctls;
mod guest_state;
mod host_state;
pub mod msr_list;
mod non_register;
mod rule;
mod segment;

use x86defs::{efer, paging};

pub use exec_ctls::check_ept_pointer;
pub use rule::Rule;
pub use segment::SegmentRule;

use crate::caps::Capabilities;
use crate::field::{Field, Vmcs};

/// The outcome of a check.
pub type Checked = Result<(), Rule>;

/// IA32_DEBUGCTL: last-branch records.
const DEBUGCTL_LBR: u64 = 1 << 0;
/// IA32_DEBUGCTL: single-step on branches only.
const DEBUGCTL_BTF: u64 = 1 << 1;

/// What the rules depend on that is in no field. What was to be read from memory and isn't there reads as all ones.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Width of physical addresses.
    pub physical_bits: u32,
    /// Width of linear addresses the processor supports: 48, or 57 with five-level paging (whatever CR4 says).
    pub linear_bits: u32,
    /// The hypervisor executes VMLAUNCH or VMRESUME in IA-32e mode.
    pub long_mode: bool,
    /// The current-VMCS pointer.
    pub current_pointer: u64,
    /// First four bytes at the VMCS link pointer; wanted where [`wants_link_revision`] says so.
    pub link_revision: Option<u32>,
    /// Byte 80H of the virtual-APIC page; wanted where [`wants_vtpr`] says so.
    pub vtpr: Option<u8>,
    /// Page-directory-pointer-table entries at the guest's CR3; wanted where [`wants_pdptes`] says so.
    pub pdptes: Option<[u64; 4]>,
    /// Bits of IA32_EFER the processor has.
    pub efer_allowed: u64,
    /// Bits of IA32_DEBUGCTL the processor has.
    pub debugctl_allowed: u64,
}

impl Default for Inputs {
    fn default() -> Self {
        Self {
            physical_bits: 46,
            linear_bits: 48,
            long_mode: true,
            current_pointer: u64::MAX,
            link_revision: None,
            vtpr: None,
            pdptes: None,
            efer_allowed: efer::SCE | efer::LME | efer::LMA | efer::NXE,
            debugctl_allowed: DEBUGCTL_LBR | DEBUGCTL_BTF,
        }
    }
}

impl Inputs {
    /// The address sets no bit beyond the physical-address width.
    fn is_physical(&self, address: u64) -> bool {
        address.checked_shr(self.physical_bits).unwrap_or(0) == 0
    }

    /// The address of a page.
    fn is_page(&self, address: u64) -> bool {
        address & paging::PAGE_MASK == 0 && self.is_physical(address)
    }

    fn is_canonical(&self, address: u64) -> bool {
        let unused = 64_u32.saturating_sub(self.linear_bits).min(63);
        ((address << unused) as i64 >> unused) as u64 == address
    }

    /// An MSR area: 16-byte aligned, and its last byte within the physical-address width too.
    fn is_msr_area(&self, address: u64, count: u64) -> bool {
        if count == 0 {
            return true;
        }
        let last = address.checked_add(count * 16 - 1);
        address & 15 == 0 && self.is_physical(address) && last.is_some_and(|last| self.is_physical(last))
    }
}

/// `Ok` if `holds`, else the rule.
#[inline(always)]
fn require(holds: bool, rule: Rule) -> Checked {
    if holds { Ok(()) } else { Err(rule) }
}

/// Each byte is a memory type that IA32_PAT may hold.
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|byte| matches!(byte, 0 | 1 | 4 | 5 | 6 | 7))
}

/// True if the checks will look at [`Inputs::link_revision`].
pub fn wants_link_revision(vmcs: &Vmcs, inputs: &Inputs) -> bool {
    let pointer = vmcs.get(Field::VmcsLinkPointer);
    pointer != u64::MAX && inputs.is_page(pointer)
}

/// True if the checks will look at [`Inputs::vtpr`].
pub fn wants_vtpr(vmcs: &Vmcs) -> bool {
    exec_ctls::compares_vtpr(vmcs)
}

/// True if the checks will look at [`Inputs::pdptes`].
pub fn wants_pdptes(vmcs: &Vmcs) -> bool {
    guest_state::uses_pae_paging(vmcs) && !guest_state::has_ept(vmcs)
}

/// "Checks on VMX Controls".
pub fn check_controls(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    exec_ctls::check(vmcs, caps, inputs)?;
    exit_ctls::check(vmcs, caps, inputs)?;
    entry_ctls::check(vmcs, caps, inputs)
}

/// "Checks on Host Control Registers, MSRs, and SSP" and what follows, to "Checks Related to Address-Space Size".
pub fn check_host_state(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    host_state::check(vmcs, caps, inputs)
}

/// "Checks on the Guest State Area".
pub fn check_guest_state(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    guest_state::check_registers(vmcs, caps, inputs)?;
    segment::check(vmcs, inputs)?;
    guest_state::check_tables(vmcs, inputs)?;
    guest_state::check_rip_rflags(vmcs, inputs)?;
    non_register::check(vmcs, caps, inputs)?;
    guest_state::check_pdptes(vmcs, inputs)
}

#[cfg(test)]
mod tests;
