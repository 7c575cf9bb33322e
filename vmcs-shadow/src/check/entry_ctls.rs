//! "VM-Entry Control Fields". (The controls about system-management mode are reserved here, as there is no dual-monitor
//! treatment.)

use x86defs::vector as v;
use x86defs::vmx::{event, misc_cap, primary};
use x86defs::{cr0, vmx::basic_cap};

use super::rule::Rule;
use super::{Checked, Inputs, require};
use crate::caps::{Capabilities, Word};
use crate::event::Event;
use crate::field::{Field, Vmcs};

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    require(caps.entry().allows(vmcs.get32(Field::EntryControls)), Rule::EntryReserved)?;
    if let Some(event) = Event::injected(vmcs) {
        check_injection(vmcs, event, caps)?;
    }
    let (address, count) = (vmcs.get(Field::EntryMsrLoadAddress), vmcs.get(Field::EntryMsrLoadCount));
    require(inputs.is_msr_area(address, count), Rule::EntryMsrLoadArea)
}

fn check_injection(vmcs: &Vmcs, event: Event, caps: &Capabilities) -> Checked {
    const NOT_USED: u32 = 1;
    let (kind, vector) = (event.kind(), event.vector());
    let may_be = match kind {
        NOT_USED => false,
        event::OTHER => caps.has_primary(primary::MONITOR_TRAP_FLAG),
        _ => true,
    };
    require(may_be, Rule::InjectionType)?;
    let vector_fits = match kind {
        event::NMI => vector == v::NMI,
        event::HARDWARE_EXCEPTION => vector <= 31,
        event::OTHER => vector == 0,
        _ => true,
    };
    require(vector_fits, Rule::InjectionVector)?;
    check_error_code(vmcs, event, caps)?;
    require(!event.has_reserved(), Rule::InjectionReserved)?;
    if event.has_error_code() {
        require(vmcs.get(Field::EntryErrorCode) >> 16 == 0, Rule::InjectionErrorCode)?;
    }
    if event.is_software() {
        let shortest = if caps.has_misc(misc_cap::INJECT_ZERO_LENGTH) { 0 } else { 1 };
        let length = vmcs.get(Field::EntryInstructionLength);
        require((shortest..=15).contains(&length), Rule::InjectionInstructionLength)?;
    }
    Ok(())
}

/// The deliver-error-code bit.
fn check_error_code(vmcs: &Vmcs, event: Event, caps: &Capabilities) -> Checked {
    let exception = event.kind() == event::HARDWARE_EXCEPTION;
    let protected = vmcs.get(Field::GuestCr0) & cr0::PE != 0;
    let any = caps.has(Word::Basic, basic_cap::ANY_ERROR_CODE);
    let has_one = matches!(event.vector(), v::DF | v::TS | v::NP | v::SS | v::GP | v::PF | v::AC);
    let must = exception && protected && !any && has_one;
    let may = exception && protected && (any || has_one);
    require(event.has_error_code() || !must, Rule::InjectionErrorCodeMissing)?;
    require(may || !event.has_error_code(), Rule::InjectionErrorCodeUnexpected)
}
