//! The checks on the host-state area.

use x86defs::vmx::{entry_ctl, exit_ctl};
use x86defs::{cr4, efer};

use super::rule::Rule;
use super::{Checked, Inputs, is_pat, require};
use crate::caps::Capabilities;
use crate::field::{Field, Vmcs};

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    let exit = vmcs.get32(Field::ExitControls);
    check_registers(vmcs, exit, caps, inputs)?;
    check_msrs(vmcs, exit, inputs)?;
    check_segments(vmcs, exit, inputs)?;
    check_address_space(vmcs, exit, inputs)
}

/// "Checks on Host Control Registers, MSRs, and SSP": the registers.
fn check_registers(vmcs: &Vmcs, exit: u32, caps: &Capabilities, inputs: &Inputs) -> Checked {
    let supported = |value: u64, fixed0: u64, fixed1: u64| value & fixed0 == fixed0 && value & !fixed1 == 0;
    let cr0 = vmcs.get(Field::HostCr0);
    require(supported(cr0, caps.cr0_fixed0(), caps.cr0_fixed1()), Rule::HostCr0)?;
    let cr4 = vmcs.get(Field::HostCr4);
    require(supported(cr4, caps.cr4_fixed0(), caps.cr4_fixed1()), Rule::HostCr4)?;
    require(inputs.is_physical(vmcs.get(Field::HostCr3)), Rule::HostCr3)?;
    let (esp, eip) = (vmcs.get(Field::HostSysenterEsp), vmcs.get(Field::HostSysenterEip));
    require(inputs.is_canonical(esp) && inputs.is_canonical(eip), Rule::HostSysenter)?;
    // No bit of the MSR is there, as there is no PMU.
    let performance = exit & exit_ctl::LOAD_PERF_GLOBAL_CTRL != 0;
    require(!performance || vmcs.get(Field::HostPerfGlobalCtrl) == 0, Rule::HostPerfGlobalCtrl)
}

/// The same section: the MSRs.
fn check_msrs(vmcs: &Vmcs, exit: u32, inputs: &Inputs) -> Checked {
    if exit & exit_ctl::LOAD_PAT != 0 {
        require(is_pat(vmcs.get(Field::HostPat)), Rule::HostPat)?;
    }
    if exit & exit_ctl::LOAD_EFER != 0 {
        const MODE: u64 = efer::LMA | efer::LME;
        let value = vmcs.get(Field::HostEfer);
        require(value & !inputs.efer_allowed == 0, Rule::HostEferReserved)?;
        let long = exit & exit_ctl::HOST_ADDRESS_SPACE_SIZE != 0;
        require(value & MODE == if long { MODE } else { 0 }, Rule::HostEferMode)?;
    }
    Ok(())
}

/// "Checks on Host Segment and Descriptor-Table Registers".
fn check_segments(vmcs: &Vmcs, exit: u32, inputs: &Inputs) -> Checked {
    const RPL_AND_TI: u64 = 7;
    let selectors = (0..7).map(|i| vmcs.get(Field::HostEsSelector.nth(i)));
    require(selectors.fold(0, |all, one| all | one) & RPL_AND_TI == 0, Rule::HostSelector)?;
    let is_null = |field| vmcs.get(field) == 0;
    require(!is_null(Field::HostCsSelector) && !is_null(Field::HostTrSelector), Rule::HostCsTrNull)?;
    let long = exit & exit_ctl::HOST_ADDRESS_SPACE_SIZE != 0;
    require(long || !is_null(Field::HostSsSelector), Rule::HostSsNull)?;
    let canonical = (0..5).all(|i| inputs.is_canonical(vmcs.get(Field::HostFsBase.nth(i))));
    require(canonical, Rule::HostBaseCanonical)
}

/// "Checks Related to Address-Space Size".
fn check_address_space(vmcs: &Vmcs, exit: u32, inputs: &Inputs) -> Checked {
    let host_long = exit & exit_ctl::HOST_ADDRESS_SPACE_SIZE != 0;
    let guest_long = vmcs.get32(Field::EntryControls) & entry_ctl::IA32E_MODE_GUEST != 0;
    let (cr4, rip) = (vmcs.get(Field::HostCr4), vmcs.get(Field::HostRip));
    if inputs.long_mode {
        require(host_long, Rule::HostModeInLongMode)?;
    } else {
        require(!guest_long, Rule::GuestModeOutsideLongMode)?;
        require(!host_long, Rule::HostModeOutsideLongMode)?;
    }
    if host_long {
        require(cr4 & cr4::PAE != 0, Rule::HostPae)?;
        require(inputs.is_canonical(rip), Rule::HostRipCanonical)
    } else {
        // That "IA-32e mode guest" is 0 then follows from the above.
        require(cr4 & cr4::PCIDE == 0, Rule::HostPcidWithoutLongMode)?;
        require(rip >> 32 == 0, Rule::HostRipHigh)
    }
}
