//! "Checks on Guest Non-Register State".

use x86defs::rflags;
use x86defs::segment::DPL_SHIFT;
use x86defs::vector as v;
use x86defs::vmx::{activity, event, interruptibility, misc_cap, pending_debug, pin, secondary};

use super::rule::Rule;
use super::{Checked, DEBUGCTL_BTF, Inputs, require};
use crate::caps::{Capabilities, REVISION};
use crate::event::Event;
use crate::field::{Field, Vmcs};
use crate::region::SHADOW_INDICATOR;

const STI_OR_MOV_SS: u32 = interruptibility::STI | interruptibility::MOV_SS;

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    check_activity(vmcs, caps)?;
    check_interruptibility(vmcs)?;
    check_pending_debug(vmcs)?;
    check_link_pointer(vmcs, inputs)
}

fn check_activity(vmcs: &Vmcs, caps: &Capabilities) -> Checked {
    let state = vmcs.get32(Field::GuestActivity);
    let supported = match state {
        activity::ACTIVE => true,
        activity::HLT => caps.has_misc(misc_cap::ACTIVITY_HLT),
        activity::SHUTDOWN => caps.has_misc(misc_cap::ACTIVITY_SHUTDOWN),
        activity::WAIT_FOR_SIPI => caps.has_misc(misc_cap::ACTIVITY_WAIT_FOR_SIPI),
        _ => false,
    };
    require(supported, Rule::ActivityState)?;
    let privilege = vmcs.get32(Field::GuestSsAccess) >> DPL_SHIFT & 3;
    require(state != activity::HLT || privilege == 0, Rule::ActivityHltUser)?;
    let blocked = vmcs.get32(Field::GuestInterruptibility) & STI_OR_MOV_SS != 0;
    require(state == activity::ACTIVE || !blocked, Rule::ActivityBlocked)?;
    let taken = Event::injected(vmcs).is_none_or(|event| is_taken(state, event));
    require(taken, Rule::ActivityInjection)
}

/// A processor in this activity state takes the event.
fn is_taken(state: u32, event: Event) -> bool {
    let is_exception = |vector| event.kind() == event::HARDWARE_EXCEPTION && event.vector() == vector;
    match state {
        activity::HLT => {
            matches!(event.kind(), event::EXTERNAL_INTERRUPT | event::NMI | event::OTHER)
                || is_exception(v::DB)
                || is_exception(v::MC)
        }
        activity::SHUTDOWN => event.kind() == event::NMI || is_exception(v::MC),
        activity::WAIT_FOR_SIPI => false,
        _ => true,
    }
}

fn check_interruptibility(vmcs: &Vmcs) -> Checked {
    const RESERVED: u32 = !0x1f;
    let state = vmcs.get32(Field::GuestInterruptibility);
    let has = |bit| state & bit != 0;
    let injected = |kind| Event::injected(vmcs).is_some_and(|event| event.kind() == kind);
    let (sti, mov_ss) = (has(interruptibility::STI), has(interruptibility::MOV_SS));
    require(!has(RESERVED), Rule::InterruptibilityReserved)?;
    require(!(sti && mov_ss), Rule::InterruptibilityStiAndMovSs)?;
    let enabled = vmcs.get(Field::GuestRflags) & rflags::IF != 0;
    require(enabled || !sti, Rule::InterruptibilityStiWithoutIf)?;
    let external = injected(event::EXTERNAL_INTERRUPT);
    require(!(external && (sti || mov_ss)), Rule::InterruptibilityExternal)?;
    require(!(injected(event::NMI) && mov_ss), Rule::InterruptibilityNmiMovSs)?;
    require(!has(interruptibility::SMI), Rule::InterruptibilitySmi)?;
    let virtual_nmis = vmcs.get32(Field::PinControls) & pin::VIRTUAL_NMIS != 0;
    let blocked = virtual_nmis && has(interruptibility::NMI);
    require(!(injected(event::NMI) && blocked), Rule::InterruptibilityVirtualNmi)?;
    require(!has(interruptibility::ENCLAVE), Rule::InterruptibilityEnclave)
}

fn check_pending_debug(vmcs: &Vmcs) -> Checked {
    const DEFINED: u64 =
        pending_debug::B0_B3 | pending_debug::ENABLED_BREAKPOINT | pending_debug::BS | pending_debug::RTM;
    let pending = vmcs.get(Field::GuestPendingDebug);
    require(pending & !DEFINED == 0, Rule::PendingDebugReserved)?;
    require(pending & pending_debug::RTM == 0, Rule::PendingDebugRtm)?;
    let blocked = vmcs.get32(Field::GuestInterruptibility) & STI_OR_MOV_SS != 0;
    if blocked || vmcs.get32(Field::GuestActivity) == activity::HLT {
        let trap = vmcs.get(Field::GuestRflags) & rflags::TF != 0;
        let branches_only = vmcs.get(Field::GuestDebugctl) & DEBUGCTL_BTF != 0;
        let steps = trap && !branches_only;
        let step = pending & pending_debug::BS != 0;
        require(step || !steps, Rule::PendingDebugStepMissing)?;
        require(steps || !step, Rule::PendingDebugStepUnexpected)?;
    }
    Ok(())
}

fn check_link_pointer(vmcs: &Vmcs, inputs: &Inputs) -> Checked {
    let pointer = vmcs.get(Field::VmcsLinkPointer);
    if pointer == u64::MAX {
        return Ok(());
    }
    require(inputs.is_page(pointer), Rule::LinkPointerAddress)?;
    let word = inputs.link_revision.unwrap_or(u32::MAX);
    require(word & !SHADOW_INDICATOR == REVISION, Rule::LinkPointerRevision)?;
    let shadowing = vmcs.secondary() & secondary::VMCS_SHADOWING != 0;
    require((word & SHADOW_INDICATOR != 0) == shadowing, Rule::LinkPointerShadow)?;
    require(pointer != inputs.current_pointer, Rule::LinkPointerCurrent)
}
