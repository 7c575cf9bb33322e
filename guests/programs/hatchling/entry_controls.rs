//! Checks on VM-execution, VM-exit and VM-entry control fields: error 7.

use crate::entry::{AREA, Case, Fails, check, check_all, clear, nothing, set, wide};
use crate::entry_cases;
use crate::instructions::bad_pointers;
use rt::cpu::rdmsr;
use rt::mem::{self, PAGE};
use rt::report::{fail, pass, skip};
use rt::vmx::capability::{self as cap};
use rt::vmx::control::*;
use rt::vmx::ept::POINTER_AD;
use rt::vmx::exit::event::*;
use rt::vmx::{Failure, Vm, control, field as f, vmread, vmwrite};
use rt::{l2, trap};

pub fn all() {
    reserved_controls();
    check_all(ADDRESSES, Fails::Controls);
    check_all(DEPENDENCIES, Fails::Controls);
    check_all(APIC, Fails::Controls);
    check_all(MSR_AREAS, Fails::Controls);
    ept_pointers();
    check_all(EPT_FEATURES, Fails::Controls);
    check_all(INJECTION, Fails::Controls);
    error_codes();
    injection_by_capability();
    cr3_targets();
}

/// Bits of each group that must be 0 and that must be 1.
fn reserved_controls() {
    for (group, rule) in [
        (Group::Pin, "PinReserved"),
        (Group::Primary, "PrimaryReserved"),
        (Group::Secondary, "SecondaryReserved"),
        (Group::Exit, "ExitReserved"),
        (Group::Entry, "EntryReserved"),
    ] {
        let allowed = group.allowed();
        let mut broken = 0;
        for bit in (0..32).map(|n| 1u32 << n) {
            let (must_be_zero, must_be_one) = (allowed.one & bit == 0, allowed.zero & bit != 0);
            if !must_be_zero && !must_be_one {
                continue;
            }
            let mut vm = Vm::fresh(l2!([]));
            if group == Group::Secondary && !vm.set(&[ACTIVATE_SECONDARY]) {
                break;
            }
            vmwrite(group.field(), vmread(group.field()) ^ u64::from(bit));
            broken += 1;
            let found = vm.enter().map(drop);
            if found != Err(Failure::Valid(7)) {
                fail(rule, format_args!("bit {bit:#x}: {found:?}, wanted error 7"));
                broken = 0;
                break;
            }
        }
        if broken > 0 {
            pass(rule);
        }
    }
    // Without the activation the secondary controls do not matter.
    let mut vm = Vm::fresh(l2!([]));
    if ACTIVATE_SECONDARY.clearable() {
        vm.unset(&[ACTIVATE_SECONDARY]);
        vmwrite(f::SECONDARY_CONTROLS, 0xffff_ffff);
        crate::want::to_end("secondary controls that are not activated do not matter", &mut vm);
    }
}

fn bitmaps() {
    for field in [
        f::IO_BITMAP_A,
        f::IO_BITMAP_B,
        f::MSR_BITMAP,
        f::VMREAD_BITMAP,
        f::VMWRITE_BITMAP,
        f::EPTP_LIST_ADDRESS,
    ] {
        vmwrite(field, AREA);
    }
}

const ADDRESSES: &[Case] = entry_cases! {
    IoBitmapAddress [USE_IO_BITMAPS] bitmaps => || vmwrite(f::IO_BITMAP_A, AREA + 8);
    IoBitmapAddress [USE_IO_BITMAPS] bitmaps => || vmwrite(f::IO_BITMAP_B, AREA + 0x800);
    IoBitmapAddress [USE_IO_BITMAPS] bitmaps => || vmwrite(f::IO_BITMAP_A, AREA | wide());
    IoBitmapAddress [USE_IO_BITMAPS] bitmaps => || vmwrite(f::IO_BITMAP_B, AREA | 1 << 63);
    MsrBitmapAddress [USE_MSR_BITMAPS] bitmaps => || vmwrite(f::MSR_BITMAP, AREA + 1);
    MsrBitmapAddress [USE_MSR_BITMAPS] bitmaps => || vmwrite(f::MSR_BITMAP, AREA | wide());
    ShadowBitmapAddress [VMCS_SHADOWING] bitmaps => || vmwrite(f::VMREAD_BITMAP, AREA + 4);
    ShadowBitmapAddress [VMCS_SHADOWING] bitmaps => || vmwrite(f::VMWRITE_BITMAP, AREA | wide());
    EptpListAddress [ENABLE_VMFUNC, ENABLE_EPT] functions => || vmwrite(f::EPTP_LIST_ADDRESS, AREA + 8);
    EptpListAddress [ENABLE_VMFUNC, ENABLE_EPT] functions => || vmwrite(f::EPTP_LIST_ADDRESS, AREA | wide());
    VirtualizationExceptionAddress [ENABLE_EPT, EPT_VIOLATION_VE] ept => || vmwrite(f::VE_INFORMATION_ADDRESS, 0x10);
    VirtualizationExceptionAddress [ENABLE_EPT, EPT_VIOLATION_VE] ept => || vmwrite(f::VE_INFORMATION_ADDRESS, wide());
    PmlAddress [ENABLE_EPT, ENABLE_PML] ept => || vmwrite(f::PML_ADDRESS, AREA + 8);
    PmlAddress [ENABLE_EPT, ENABLE_PML] ept => || vmwrite(f::PML_ADDRESS, AREA | wide());
};

fn ept() {
    // PML wants accessed and dirty flags where it is.
    let flags = if ENABLE_PML.available() { POINTER_AD } else { 0 };
    vmwrite(f::EPT_POINTER, crate::ept_faults::shared_ept().pointer() | flags);
}

fn functions() {
    ept();
    bitmaps();
    vmwrite(f::VM_FUNCTION_CONTROLS, cap::vm_functions() & 1);
}

fn set_control(control: Control) {
    set(control.group.field(), control.mask.into());
}

fn clear_control(control: Control) {
    clear(control.group.field(), control.mask.into());
}

const DEPENDENCIES: &[Case] = entry_cases! {
    VirtualNmisWithoutNmiExiting [NMI_EXITING, VIRTUAL_NMIS] nothing => || clear_control(NMI_EXITING);
    NmiWindowWithoutVirtualNmis [NMI_EXITING, VIRTUAL_NMIS, NMI_WINDOW_EXITING] nothing => || clear_control(VIRTUAL_NMIS);
    SavePreemptionTimerWithoutTimer [PREEMPTION_TIMER, SAVE_PREEMPTION_TIMER] nothing => || clear_control(PREEMPTION_TIMER);
    VpidZero [ENABLE_VPID] || vmwrite(f::VPID, 1) => || vmwrite(f::VPID, 0);
    PmlWithoutEpt [ENABLE_EPT, ENABLE_PML] ept => || clear_control(ENABLE_EPT);
    UnrestrictedWithoutEpt [ENABLE_EPT, UNRESTRICTED_GUEST] ept => || clear_control(ENABLE_EPT);
    ModeBasedExecuteWithoutEpt [ENABLE_EPT, MODE_BASED_EXECUTE] ept => || clear_control(ENABLE_EPT);
    TscMultiplierZero [USE_TSC_SCALING] || vmwrite(f::TSC_MULTIPLIER, 1) => || vmwrite(f::TSC_MULTIPLIER, 0);
};

fn shadow() {
    vmwrite(f::VIRTUAL_APIC_ADDRESS, AREA);
    vmwrite(f::APIC_ACCESS_ADDRESS, AREA + PAGE);
    mem::write(AREA + 0x80, 0x75u32);
    vmwrite(f::TPR_THRESHOLD, 7);
}

fn delivery() {
    shadow();
    vmwrite(f::TPR_THRESHOLD, 0);
    vmwrite(f::POSTED_INTERRUPT_DESCRIPTOR, AREA + 2 * PAGE);
    vmwrite(f::POSTED_INTERRUPT_VECTOR, 0xff);
}

const APIC: &[Case] = entry_cases! {
    VirtualApicAddress [USE_TPR_SHADOW] shadow => || vmwrite(f::VIRTUAL_APIC_ADDRESS, AREA + 16);
    VirtualApicAddress [USE_TPR_SHADOW] shadow => || vmwrite(f::VIRTUAL_APIC_ADDRESS, AREA | wide());
    TprThresholdReserved [USE_TPR_SHADOW] shadow => || vmwrite(f::TPR_THRESHOLD, 0x10);
    TprThresholdReserved [USE_TPR_SHADOW] shadow => || vmwrite(f::TPR_THRESHOLD, 1 << 31);
    TprThresholdAboveVtpr [USE_TPR_SHADOW] shadow => || vmwrite(f::TPR_THRESHOLD, 8);
    ApicAccessAddress [USE_TPR_SHADOW, VIRTUALIZE_APIC_ACCESSES] shadow => || vmwrite(f::APIC_ACCESS_ADDRESS, AREA + 8);
    ApicAccessAddress [USE_TPR_SHADOW, VIRTUALIZE_APIC_ACCESSES] shadow => || vmwrite(f::APIC_ACCESS_ADDRESS, wide());
    ApicControlsWithoutTprShadow [USE_TPR_SHADOW, VIRTUALIZE_X2APIC] shadow => without_shadow;
    ApicControlsWithoutTprShadow [USE_TPR_SHADOW, APIC_REGISTER_VIRTUALIZATION] shadow => without_shadow;
    ApicControlsWithoutTprShadow [USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY] delivery
        => without_shadow;
    X2ApicWithApicAccesses [USE_TPR_SHADOW, VIRTUALIZE_X2APIC] shadow => || set_control(VIRTUALIZE_APIC_ACCESSES);
    InterruptDeliveryWithoutExiting [USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY] delivery
        => || clear_control(EXTERNAL_INTERRUPT_EXITING);
    PostedWithoutInterruptDelivery [
        USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY, ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS
    ] delivery => || clear_control(VIRTUAL_INTERRUPT_DELIVERY);
    PostedWithoutAcknowledge [
        USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY, ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS
    ] delivery => || clear_control(ACKNOWLEDGE_INTERRUPT);
    PostedVector [
        USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY, ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS
    ] delivery => || vmwrite(f::POSTED_INTERRUPT_VECTOR, 0x100);
    PostedDescriptorAddress [
        USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY, ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS
    ] delivery => || vmwrite(f::POSTED_INTERRUPT_DESCRIPTOR, AREA + 2 * PAGE + 0x20);
    PostedDescriptorAddress [
        USE_TPR_SHADOW, EXTERNAL_INTERRUPT_EXITING, VIRTUAL_INTERRUPT_DELIVERY, ACKNOWLEDGE_INTERRUPT, POSTED_INTERRUPTS
    ] delivery => || vmwrite(f::POSTED_INTERRUPT_DESCRIPTOR, AREA | wide());
};

fn without_shadow() {
    clear_control(USE_TPR_SHADOW);
    // These two must be 1 on some processors where the shadow is off; here they only must not matter.
    vmwrite(f::TPR_THRESHOLD, 0);
}

fn lists() {
    // An empty list's address does not matter: these have one entry, which names the TSC auxiliary MSR.
    for (address, count) in [
        (f::EXIT_MSR_STORE_ADDRESS, f::EXIT_MSR_STORE_COUNT),
        (f::EXIT_MSR_LOAD_ADDRESS, f::EXIT_MSR_LOAD_COUNT),
        (f::ENTRY_MSR_LOAD_ADDRESS, f::ENTRY_MSR_LOAD_COUNT),
    ] {
        mem::write(AREA, [u64::from(rt::cpu::MSR_CSTAR), 0]);
        vmwrite(address, AREA);
        vmwrite(count, 1);
    }
}

fn empty_lists() {
    vmwrite(f::EXIT_MSR_STORE_ADDRESS, wide() | 1);
}

const MSR_AREAS: &[Case] = entry_cases! {
    ExitMsrStoreArea [] lists => || vmwrite(f::EXIT_MSR_STORE_ADDRESS, AREA + 8);
    ExitMsrStoreArea [] lists => || vmwrite(f::EXIT_MSR_STORE_ADDRESS, AREA | wide());
    ExitMsrStoreArea [] empty_lists => || vmwrite(f::EXIT_MSR_STORE_COUNT, 1);
    ExitMsrLoadArea [] lists => || vmwrite(f::EXIT_MSR_LOAD_ADDRESS, AREA + 1);
    ExitMsrLoadArea [] lists => || vmwrite(f::EXIT_MSR_LOAD_ADDRESS, AREA | wide());
    ExitMsrLoadArea [] lists => || {
        vmwrite(f::EXIT_MSR_LOAD_ADDRESS, wide() - 16);
        vmwrite(f::EXIT_MSR_LOAD_COUNT, 2);
    };
    EntryMsrLoadArea [] lists => || vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, AREA + 4);
    EntryMsrLoadArea [] lists => || vmwrite(f::ENTRY_MSR_LOAD_ADDRESS, AREA | wide());
};

fn ept_pointers() {
    let name = "EptPointer";
    if !ENABLE_EPT.available() {
        return skip(name, ENABLE_EPT.name);
    }
    let mut vm = Vm::fresh(l2!([]));
    vm.set(&[ENABLE_EPT]);
    ept();
    for (rule, pointer) in bad_pointers(vmread(f::EPT_POINTER)) {
        vmwrite(f::EPT_POINTER, pointer);
        let found = vm.enter().map(drop);
        rt::check!(rule, found == Err(Failure::Valid(7)), "{found:?}, wanted error 7");
    }
}

const EPT_FEATURES: &[Case] = entry_cases! {
    VmFunctionsReserved [ENABLE_VMFUNC, ENABLE_EPT] functions => || set(f::VM_FUNCTION_CONTROLS, 2);
    VmFunctionsReserved [ENABLE_VMFUNC, ENABLE_EPT] functions => || set(f::VM_FUNCTION_CONTROLS, 1 << 63);
    EptpSwitchingWithoutEpt [ENABLE_VMFUNC, ENABLE_EPT] functions => || clear_control(ENABLE_EPT);
};

fn inject(information: u32) {
    vmwrite(f::ENTRY_INTERRUPTION, (information | VALID).into());
}

/// INT n, two bytes.
fn software_interrupt() {
    inject(SOFTWARE_INTERRUPT | 0x60);
    vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 2);
}

fn general_protection() {
    inject(HARDWARE_EXCEPTION | ERROR_CODE | u32::from(trap::GP));
}

const INJECTION: &[Case] = entry_cases! {
    InjectionType [] software_interrupt => || inject(1 << 8 | 0x60);
    InjectionVector [] || inject(NMI | 2) => || inject(NMI | 3);
    InjectionVector [] || inject(HARDWARE_EXCEPTION | 6) => || inject(HARDWARE_EXCEPTION | 32);
    InjectionVector [MONITOR_TRAP_FLAG] || inject(OTHER) => || inject(OTHER | 1);
    InjectionErrorCodeUnexpected [] software_interrupt => || inject(SOFTWARE_INTERRUPT | ERROR_CODE | 0x60);
    InjectionErrorCodeUnexpected [] || inject(NMI | 2) => || inject(NMI | ERROR_CODE | 2);
    InjectionReserved [] general_protection => || set(f::ENTRY_INTERRUPTION, 1 << 12);
    InjectionReserved [] general_protection => || set(f::ENTRY_INTERRUPTION, 1 << 30);
    InjectionErrorCode [] general_protection => || vmwrite(f::ENTRY_ERROR_CODE, 1 << 16);
    InjectionErrorCode [] general_protection => || vmwrite(f::ENTRY_ERROR_CODE, 1 << 31);
    InjectionInstructionLength [] software_interrupt => || vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 16);
    InjectionInstructionLength [] || {
        inject(SOFTWARE_EXCEPTION | 3);
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 15);
    } => || vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 0xffff_ffff);
    InjectionInstructionLength [] || {
        inject(PRIVILEGED_SOFTWARE_EXCEPTION | 1);
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 1);
    } => || vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 17);
};

/// Which exceptions have an error code matters where IA32_VMX_BASIC[56] is 0.
fn error_codes() {
    let any = cap::basic(cap::BASIC_ANY_ERROR_CODE);
    for vector in 0..32u32 {
        let has_error = matches!(vector, 8 | 10..=14 | 17) || vector == 21 && shadow_stacks();
        for with_error in [false, true] {
            let rule = if with_error { "InjectionErrorCodeUnexpected" } else { "InjectionErrorCodeMissing" };
            let mut vm = Vm::fresh(l2!([]));
            inject(HARDWARE_EXCEPTION | vector | if with_error { ERROR_CODE } else { 0 });
            rt::vmx::handler::install();
            let wanted = any || has_error == with_error;
            match vm.enter() {
                Ok(_) if wanted => {}
                Err(Failure::Valid(7)) if !wanted => {}
                Ok(exit) => fail(rule, format_args!("vector {vector}: {exit}, wanted error 7")),
                Err(failure) => fail(rule, format_args!("vector {vector}: {failure}")),
            }
        }
    }
    pass("InjectionErrorCodeMissing");
}

/// #CP exists where CR4.CET may be set.
fn shadow_stacks() -> bool {
    rdmsr(cap::CR4_FIXED1) >> 23 & 1 != 0
}

fn injection_by_capability() {
    if !MONITOR_TRAP_FLAG.available() {
        let case = Case { rule: "InjectionType", needs: &[], prepare: nothing, broken: || inject(OTHER) };
        check(&case, Fails::Controls);
    }
    if !cap::misc(cap::MISC_ZERO_LENGTH_INJECTION) {
        let broken = || vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 0);
        let case =
            Case { rule: "InjectionInstructionLength", needs: &[], prepare: software_interrupt, broken };
        check(&case, Fails::Controls);
    }
    // SMM is another matter.
    for control in [control::ENTRY_TO_SMM, control::DEACTIVATE_DUAL_MONITOR] {
        if control.available() {
            let mut vm = Vm::fresh(l2!([]));
            vm.set(&[control]);
            let found = vm.enter().map(drop);
            rt::check!("EntrySmm", found == Err(Failure::Valid(7)), "{}: {found:?}", control.name);
        }
    }
}

fn cr3_targets() {
    let targets = rdmsr(cap::MISC) >> 16 & 0x1ff;
    let mut vm = Vm::fresh(l2!([]));
    vmwrite(f::CR3_TARGET_COUNT, targets);
    crate::want::to_end("Cr3TargetCount", &mut vm);
    vm.clear();
    vmwrite(f::CR3_TARGET_COUNT, targets + 1);
    let found = vm.enter().map(drop);
    rt::check!("Cr3TargetCount", found == Err(Failure::Valid(7)), "{found:?}, wanted error 7");
}
