//! VMCS02's controls in the form the software CPU executes under.

use turtles_cpu::vmx::Controls;
use vmcs_shadow::{Field, Vmcs};
use x86defs::vmx::secondary;

/// Names the translations of guests without a VPID of their own. They are dropped on every entry and exit.
pub const NO_VPID: u32 = 1 << 16;

/// Names the translations of L1's `vpid`.
pub fn vpid_tag(vpid: u16) -> u32 {
    if vpid == 0 { NO_VPID } else { u32::from(vpid) }
}

/// TSC ratio 1 in the format of the TSC multiplier.
const UNSCALED: u64 = 1 << 48;

/// Takes the controls out of a VMCS that VM entry has checked.
pub fn controls(vmcs: &Vmcs) -> Controls {
    let secondary = vmcs.secondary();
    let has = |bits: u32| secondary & bits != 0;
    Controls {
        pin: vmcs.get32(Field::PinControls),
        primary: vmcs.get32(Field::PrimaryControls),
        secondary,
        exit: vmcs.get32(Field::ExitControls),
        exception_bitmap: vmcs.get32(Field::ExceptionBitmap),
        page_fault_mask: vmcs.get32(Field::PageFaultMask),
        page_fault_match: vmcs.get32(Field::PageFaultMatch),
        cr0_mask: vmcs.get(Field::Cr0Mask),
        cr0_shadow: vmcs.get(Field::Cr0Shadow),
        cr4_mask: vmcs.get(Field::Cr4Mask),
        cr4_shadow: vmcs.get(Field::Cr4Shadow),
        cr3_targets: std::array::from_fn(|n| vmcs.get(Field::Cr3Target0.nth(n))),
        cr3_target_count: vmcs.get32(Field::Cr3TargetCount).min(4),
        io_bitmaps: [vmcs.get(Field::IoBitmapA), vmcs.get(Field::IoBitmapB)],
        msr_bitmap: vmcs.get(Field::MsrBitmap),
        vmread_bitmap: vmcs.get(Field::VmreadBitmap),
        vmwrite_bitmap: vmcs.get(Field::VmwriteBitmap),
        xss_exiting_bitmap: vmcs.get(Field::XssExitingBitmap),
        tsc_offset: tsc_offset(vmcs),
        tsc_multiplier: if has(secondary::USE_TSC_SCALING) {
            vmcs.get(Field::TscMultiplier)
        } else {
            UNSCALED
        },
        apic_access_page: vmcs.get(Field::ApicAccessAddress),
        virtual_apic_page: vmcs.get(Field::VirtualApicAddress),
        tpr_threshold: vmcs.get32(Field::TprThreshold),
        eoi_exit_bitmap: std::array::from_fn(|n| vmcs.get(Field::EoiExitBitmap0.nth(n))),
        interrupt_status: vmcs.get(Field::GuestInterruptStatus) as u16,
        posted_interrupt_vector: vmcs.get(Field::PostedInterruptVector) as u8,
        posted_interrupt_descriptor: vmcs.get(Field::PostedInterruptDescriptor),
        ept_pointer: vmcs.get(Field::EptPointer),
        vpid_tag: if has(secondary::ENABLE_VPID) { vpid_tag(vmcs.get(Field::Vpid) as u16) } else { NO_VPID },
        ple_gap: vmcs.get32(Field::PleGap),
        ple_window: vmcs.get32(Field::PleWindow),
        vm_function_controls: vmcs.get(Field::VmFunctionControls),
        eptp_list: vmcs.get(Field::EptpListAddress),
        eptp_index: vmcs.get(Field::EptpIndex) as u16,
        ve_information: vmcs.get(Field::VirtualizationExceptionAddress),
        preemption_deadline: 0,
        pending_mtf: false,
    }
}

/// The offset counts only where TSC offsetting is in use.
fn tsc_offset(vmcs: &Vmcs) -> u64 {
    let used = vmcs.get32(Field::PrimaryControls) & x86defs::vmx::primary::USE_TSC_OFFSETTING != 0;
    if used { vmcs.get(Field::TscOffset) } else { 0 }
}
