//! "VM-Execution Control Fields".

use x86defs::vmx::{ept_vpid_cap, exit_ctl, pin, primary, secondary, vm_function};

use super::rule::Rule;
use super::{Checked, Inputs, require};
use crate::caps::{CR3_TARGETS, Capabilities};
use crate::field::{Field, Vmcs};

/// The three words of controls, secondary ones 0 unless activated.
struct Controls {
    pin: u32,
    primary: u32,
    secondary: u32,
}

impl Controls {
    fn of(vmcs: &Vmcs) -> Self {
        Self {
            pin: vmcs.get32(Field::PinControls),
            primary: vmcs.get32(Field::PrimaryControls),
            secondary: vmcs.secondary(),
        }
    }

    fn pin(&self, bit: u32) -> bool {
        self.pin & bit != 0
    }

    fn primary(&self, bit: u32) -> bool {
        self.primary & bit != 0
    }

    fn secondary(&self, bits: u32) -> bool {
        self.secondary & bits != 0
    }
}

/// Every rule.
pub(super) fn check(vmcs: &Vmcs, caps: &Capabilities, inputs: &Inputs) -> Checked {
    let controls = Controls::of(vmcs);
    check_reserved(vmcs, &controls, caps)?;
    check_bitmaps(vmcs, &controls, inputs)?;
    check_tpr_shadow(vmcs, &controls, inputs)?;
    check_nmi(&controls)?;
    check_apic(vmcs, &controls, inputs)?;
    check_posted_interrupts(vmcs, &controls, inputs)?;
    check_ept(vmcs, &controls, caps, inputs)?;
    check_vm_functions(vmcs, &controls, caps, inputs)?;
    check_rest(vmcs, &controls, inputs)
}

fn check_reserved(vmcs: &Vmcs, controls: &Controls, caps: &Capabilities) -> Checked {
    require(caps.pin().allows(controls.pin), Rule::PinReserved)?;
    require(caps.primary().allows(controls.primary), Rule::PrimaryReserved)?;
    // Not checked, and taken for 0, unless activated.
    require(caps.secondary().allows(controls.secondary), Rule::SecondaryReserved)?;
    require(vmcs.get32(Field::Cr3TargetCount) <= CR3_TARGETS, Rule::Cr3TargetCount)
}

fn check_bitmaps(vmcs: &Vmcs, controls: &Controls, inputs: &Inputs) -> Checked {
    let is_page = |field| inputs.is_page(vmcs.get(field));
    if controls.primary(primary::USE_IO_BITMAPS) {
        require(is_page(Field::IoBitmapA) && is_page(Field::IoBitmapB), Rule::IoBitmapAddress)?;
    }
    if controls.primary(primary::USE_MSR_BITMAPS) {
        require(is_page(Field::MsrBitmap), Rule::MsrBitmapAddress)?;
    }
    Ok(())
}

/// True where the TPR threshold is compared with VTPR at VM entry.
pub(super) fn compares_vtpr(vmcs: &Vmcs) -> bool {
    let controls = Controls::of(vmcs);
    controls.primary(primary::USE_TPR_SHADOW)
        && !controls.secondary(secondary::VIRTUALIZE_APIC_ACCESSES | secondary::VIRTUAL_INTERRUPT_DELIVERY)
}

fn check_tpr_shadow(vmcs: &Vmcs, controls: &Controls, inputs: &Inputs) -> Checked {
    if !controls.primary(primary::USE_TPR_SHADOW) {
        return Ok(());
    }
    let threshold = vmcs.get32(Field::TprThreshold);
    require(inputs.is_page(vmcs.get(Field::VirtualApicAddress)), Rule::VirtualApicAddress)?;
    if !controls.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
        require(threshold >> 4 == 0, Rule::TprThresholdReserved)?;
    }
    if compares_vtpr(vmcs) {
        let vtpr = inputs.vtpr.unwrap_or(u8::MAX);
        require(threshold & 0xf <= u32::from(vtpr >> 4), Rule::TprThresholdAboveVtpr)?;
    }
    Ok(())
}

fn check_nmi(controls: &Controls) -> Checked {
    let (exiting, virtual_nmis) = (controls.pin(pin::NMI_EXITING), controls.pin(pin::VIRTUAL_NMIS));
    require(exiting || !virtual_nmis, Rule::VirtualNmisWithoutNmiExiting)?;
    let window = controls.primary(primary::NMI_WINDOW_EXITING);
    require(virtual_nmis || !window, Rule::NmiWindowWithoutVirtualNmis)
}

fn check_apic(vmcs: &Vmcs, controls: &Controls, inputs: &Inputs) -> Checked {
    const NEED_TPR_SHADOW: u32 = secondary::VIRTUALIZE_X2APIC
        | secondary::APIC_REGISTER_VIRTUALIZATION
        | secondary::VIRTUAL_INTERRUPT_DELIVERY;
    let accesses = controls.secondary(secondary::VIRTUALIZE_APIC_ACCESSES);
    if accesses {
        require(inputs.is_page(vmcs.get(Field::ApicAccessAddress)), Rule::ApicAccessAddress)?;
    }
    let shadow = controls.primary(primary::USE_TPR_SHADOW);
    require(shadow || !controls.secondary(NEED_TPR_SHADOW), Rule::ApicControlsWithoutTprShadow)?;
    let x2apic = controls.secondary(secondary::VIRTUALIZE_X2APIC);
    require(!(x2apic && accesses), Rule::X2ApicWithApicAccesses)?;
    let delivery = controls.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY);
    let exiting = controls.pin(pin::EXTERNAL_INTERRUPT_EXITING);
    require(exiting || !delivery, Rule::InterruptDeliveryWithoutExiting)
}

fn check_posted_interrupts(vmcs: &Vmcs, controls: &Controls, inputs: &Inputs) -> Checked {
    if !controls.pin(pin::POSTED_INTERRUPTS) {
        return Ok(());
    }
    let delivery = controls.secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY);
    require(delivery, Rule::PostedWithoutInterruptDelivery)?;
    let acknowledge = vmcs.get32(Field::ExitControls) & exit_ctl::ACKNOWLEDGE_INTERRUPT != 0;
    require(acknowledge, Rule::PostedWithoutAcknowledge)?;
    require(vmcs.get(Field::PostedInterruptVector) <= 0xff, Rule::PostedVector)?;
    let descriptor = vmcs.get(Field::PostedInterruptDescriptor);
    require(descriptor & 0x3f == 0 && inputs.is_physical(descriptor), Rule::PostedDescriptorAddress)
}

fn check_ept(vmcs: &Vmcs, controls: &Controls, caps: &Capabilities, inputs: &Inputs) -> Checked {
    if controls.secondary(secondary::ENABLE_VPID) {
        require(vmcs.get(Field::Vpid) != 0, Rule::VpidZero)?;
    }
    let ept = controls.secondary(secondary::ENABLE_EPT);
    if ept {
        check_ept_pointer(vmcs.get(Field::EptPointer), caps, inputs)?;
    }
    if controls.secondary(secondary::ENABLE_PML) {
        require(ept, Rule::PmlWithoutEpt)?;
        require(inputs.is_page(vmcs.get(Field::PmlAddress)), Rule::PmlAddress)?;
    }
    require(ept || !controls.secondary(secondary::UNRESTRICTED_GUEST), Rule::UnrestrictedWithoutEpt)?;
    require(ept || !controls.secondary(secondary::MODE_BASED_EXECUTE), Rule::ModeBasedExecuteWithoutEpt)
}

/// The rules of an EPT pointer; EPTP switching and INVEPT ask them too.
pub fn check_ept_pointer(pointer: u64, caps: &Capabilities, inputs: &Inputs) -> Checked {
    const UNCACHEABLE: u64 = 0;
    const WRITE_BACK: u64 = 6;
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const RESERVED: u64 = 0xf80;
    let ept = caps.ept_vpid();
    let memory_type = match pointer & 7 {
        UNCACHEABLE => ept & ept_vpid_cap::UNCACHEABLE != 0,
        WRITE_BACK => ept & ept_vpid_cap::WRITE_BACK != 0,
        _ => false,
    };
    require(memory_type, Rule::EptpMemoryType)?;
    require(pointer >> 3 & 7 == 3, Rule::EptpWalkLength)?;
    let accessed_dirty = ept & ept_vpid_cap::ACCESSED_DIRTY != 0;
    require(accessed_dirty || pointer & ACCESSED_DIRTY == 0, Rule::EptpAccessedDirty)?;
    require(pointer & RESERVED == 0 && inputs.is_physical(pointer), Rule::EptpReserved)
}

fn check_vm_functions(vmcs: &Vmcs, controls: &Controls, caps: &Capabilities, inputs: &Inputs) -> Checked {
    if !controls.secondary(secondary::ENABLE_VMFUNC) {
        return Ok(());
    }
    let functions = vmcs.get(Field::VmFunctionControls);
    require(functions & !caps.vm_functions() == 0, Rule::VmFunctionsReserved)?;
    if functions & vm_function::EPTP_SWITCHING != 0 {
        require(controls.secondary(secondary::ENABLE_EPT), Rule::EptpSwitchingWithoutEpt)?;
        require(inputs.is_page(vmcs.get(Field::EptpListAddress)), Rule::EptpListAddress)?;
    }
    Ok(())
}

fn check_rest(vmcs: &Vmcs, controls: &Controls, inputs: &Inputs) -> Checked {
    let is_page = |field| inputs.is_page(vmcs.get(field));
    if controls.secondary(secondary::VMCS_SHADOWING) {
        let bitmaps = is_page(Field::VmreadBitmap) && is_page(Field::VmwriteBitmap);
        require(bitmaps, Rule::ShadowBitmapAddress)?;
    }
    if controls.secondary(secondary::EPT_VIOLATION_VE) {
        let information = is_page(Field::VirtualizationExceptionAddress);
        require(information, Rule::VirtualizationExceptionAddress)?;
    }
    if controls.secondary(secondary::USE_TSC_SCALING) {
        require(vmcs.get(Field::TscMultiplier) != 0, Rule::TscMultiplierZero)?;
    }
    Ok(())
}
