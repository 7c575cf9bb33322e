//! The checks on the guest-state area, but for segment registers and non-register state, which have files of their own.

use x86defs::vmx::{entry_ctl, event, secondary};
use x86defs::{cr0, cr4, efer, paging, rflags, segment};

use super::rule::Rule;
use super::{Checked, Inputs, is_pat, require};
use crate::caps::Capabilities;
use crate::event::Event;
use crate::field::{Field, Vmcs};

fn is_long(vmcs: &Vmcs) -> bool {
    vmcs.get32(Field::EntryControls) & entry_ctl::IA32E_MODE_GUEST != 0
}

/// "enable EPT" is 1.
pub(super) fn has_ept(vmcs: &Vmcs) -> bool {
    vmcs.secondary() & secondary::ENABLE_EPT != 0
}

/// The guest will use PAE paging.
pub(super) fn uses_pae_paging(vmcs: &Vmcs) -> bool {
    let (cr0, cr4) = (vmcs.get(Field::GuestCr0), vmcs.get(Field::GuestCr4));
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && !is_long(vmcs)
}

/// "Checks on Guest Control Registers, Debug Registers, and MSRs".
pub(super) fn check_registers(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    let entry = vmcs.get32(Field::EntryControls);
    let debug_controls = entry & entry_ctl::LOAD_DEBUG_CONTROLS != 0;
    let (cr0, cr4) = (vmcs.get(Field::GuestCr0), vmcs.get(Field::GuestCr4));
    let unrestricted = vmcs.secondary() & secondary::UNRESTRICTED_GUEST != 0;
    let free = if unrestricted { cr0::PE | cr0::PG } else { 0 };
    let supported = |value: u64, fixed0: u64, fixed1: u64| value & fixed0 == fixed0 && value & !fixed1 == 0;
    require(supported(cr0, caps.cr0_fixed0() & !free, caps.cr0_fixed1()), Rule::GuestCr0)?;
    require(cr0 & cr0::PG == 0 || cr0 & cr0::PE != 0, Rule::GuestPagingWithoutProtection)?;
    require(supported(cr4, caps.cr4_fixed0(), caps.cr4_fixed1()), Rule::GuestCr4)?;
    if debug_controls {
        let value = vmcs.get(Field::GuestDebugctl);
        require(value & !inputs.debugctl_allowed == 0, Rule::GuestDebugctl)?;
    }
    if is_long(vmcs) {
        let paging = cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0;
        require(paging, Rule::GuestLongModePaging)?;
    } else {
        require(cr4 & cr4::PCIDE == 0, Rule::GuestPcidWithoutLongMode)?;
    }
    require(inputs.is_physical(vmcs.get(Field::GuestCr3)), Rule::GuestCr3)?;
    require(!debug_controls || vmcs.get(Field::GuestDr7) >> 32 == 0, Rule::GuestDr7)?;
    let (esp, eip) = (vmcs.get(Field::GuestSysenterEsp), vmcs.get(Field::GuestSysenterEip));
    require(inputs.is_canonical(esp) && inputs.is_canonical(eip), Rule::GuestSysenter)?;
    check_msrs(vmcs, entry, inputs)
}

/// The same section: MSRs that VM entry loads from fields.
fn check_msrs(vmcs: &Vmcs, entry: u32, inputs: &Inputs) -> Checked {
    if entry & entry_ctl::LOAD_PERF_GLOBAL_CTRL != 0 {
        // No bit of the MSR is there, as there is no PMU.
        require(vmcs.get(Field::GuestPerfGlobalCtrl) == 0, Rule::GuestPerfGlobalCtrl)?;
    }
    if entry & entry_ctl::LOAD_PAT != 0 {
        require(is_pat(vmcs.get(Field::GuestPat)), Rule::GuestPat)?;
    }
    if entry & entry_ctl::LOAD_EFER != 0 {
        let value = vmcs.get(Field::GuestEfer);
        let (lma, lme) = (value & efer::LMA != 0, value & efer::LME != 0);
        require(value & !inputs.efer_allowed == 0, Rule::GuestEferReserved)?;
        require(lma == is_long(vmcs), Rule::GuestEferLma)?;
        let paging = vmcs.get(Field::GuestCr0) & cr0::PG != 0;
        require(!paging || lma == lme, Rule::GuestEferLme)?;
    }
    Ok(())
}

/// "Checks on Guest Descriptor-Table Registers".
pub(super) fn check_tables(vmcs: &Vmcs, inputs: &Inputs) -> Checked {
    let (gdtr, idtr) = (vmcs.get(Field::GuestGdtrBase), vmcs.get(Field::GuestIdtrBase));
    require(inputs.is_canonical(gdtr) && inputs.is_canonical(idtr), Rule::GuestTableBase)?;
    let limits = vmcs.get(Field::GuestGdtrLimit) | vmcs.get(Field::GuestIdtrLimit);
    require(limits >> 16 == 0, Rule::GuestTableLimit)
}

/// "Checks on Guest RIP, RFLAGS, and SSP".
pub(super) fn check_rip_rflags(vmcs: &Vmcs, inputs: &Inputs) -> Checked {
    let (rip, flags) = (vmcs.get(Field::GuestRip), vmcs.get(Field::GuestRflags));
    if is_long(vmcs) && vmcs.get32(Field::GuestCsAccess) & segment::L != 0 {
        require(inputs.is_canonical(rip), Rule::GuestRipCanonical)?;
    } else {
        require(rip >> 32 == 0, Rule::GuestRipHigh)?;
    }
    let good = flags & !(rflags::ALL | rflags::FIXED_1) == 0 && flags & rflags::FIXED_1 != 0;
    require(good, Rule::GuestRflagsReserved)?;
    let may_be_v86 = !is_long(vmcs) && vmcs.get(Field::GuestCr0) & cr0::PE != 0;
    require(may_be_v86 || flags & rflags::VM == 0, Rule::GuestRflagsVm)?;
    let external = Event::injected(vmcs).is_some_and(|event| event.kind() == event::EXTERNAL_INTERRUPT);
    require(!external || flags & rflags::IF != 0, Rule::GuestRflagsIf)
}

/// "Checks on Guest Page-Directory-Pointer-Table Entries".
pub(super) fn check_pdptes(vmcs: &Vmcs, inputs: &Inputs) -> Checked {
    const RESERVED: u64 = 0x1e6;
    if !uses_pae_paging(vmcs) {
        return Ok(());
    }
    let entries = if has_ept(vmcs) {
        std::array::from_fn(|i| vmcs.get(Field::GuestPdpte0.nth(i)))
    } else {
        inputs.pdptes.unwrap_or([u64::MAX; 4])
    };
    let good = |entry: u64| entry & RESERVED == 0 && inputs.is_physical(entry);
    let all = entries.iter().all(|&entry| entry & paging::PRESENT == 0 || good(entry));
    require(all, Rule::GuestPdpte)
}
