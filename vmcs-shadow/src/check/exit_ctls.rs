//! "VM-Exit Control Fields".

use x86defs::vmx::{exit_ctl, pin};

use super::rule::Rule;
use super::{Checked, Inputs, require};
use crate::caps::Capabilities;
use crate::field::{Field, Vmcs};

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    let controls = vmcs.get32(Field::ExitControls);
    require(caps.exit().allows(controls), Rule::ExitReserved)?;
    let timer = vmcs.get32(Field::PinControls) & pin::PREEMPTION_TIMER != 0;
    let save = controls & exit_ctl::SAVE_PREEMPTION_TIMER != 0;
    require(timer || !save, Rule::SavePreemptionTimerWithoutTimer)?;
    let is_area = |address, count| inputs.is_msr_area(vmcs.get(address), vmcs.get(count));
    require(is_area(Field::ExitMsrStoreAddress, Field::ExitMsrStoreCount), Rule::ExitMsrStoreArea)?;
    require(is_area(Field::ExitMsrLoadAddress, Field::ExitMsrLoadCount), Rule::ExitMsrLoadArea)
}
