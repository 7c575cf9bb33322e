//! Cases of the rules about controls.

use x86defs::cr0;
use x86defs::vmx::{event, exit_ctl, pin, primary, secondary};

use super::good::{self, Entry};
use super::{Case, Rule, case};
use crate::field::Field;

/// Just beyond 46 bits.
const TOO_FAR: u64 = 1 << 46;
const LAST_PAGE: u64 = TOO_FAR - 0x1000;

const NEEDS_EPT: u32 = secondary::UNRESTRICTED_GUEST | secondary::ENABLE_PML | secondary::MODE_BASED_EXECUTE;

pub fn cases() -> Vec<Case> {
    let mut cases = reserved();
    cases.extend(addresses());
    cases.extend(interrupts());
    cases.extend(ept());
    cases.extend(exit_and_entry());
    cases.extend(injection());
    cases
}

fn reserved() -> Vec<Case> {
    vec![
        case(Rule::PinReserved, |e| e.clear(Field::PinControls, 1 << 1), |_| ()),
        case(
            Rule::PinReserved,
            |e| {
                e.flag("vmx-preemption-timer", false);
                e.clear(Field::ExitControls, exit_ctl::SAVE_PREEMPTION_TIMER.into());
            },
            |e| {
                e.flag("vmx-preemption-timer", false);
                e.clear(Field::ExitControls, exit_ctl::SAVE_PREEMPTION_TIMER.into());
                e.clear(Field::PinControls, pin::PREEMPTION_TIMER.into());
            },
        ),
        case(Rule::PrimaryReserved, |e| e.or(Field::PrimaryControls, 1), |_| ()),
        case(
            Rule::PrimaryReserved,
            |e| e.flag("vmx-true-ctls", false),
            |e| e.or(Field::PrimaryControls, (primary::CR3_LOAD_EXITING | primary::CR3_STORE_EXITING).into()),
        ),
        case(
            Rule::SecondaryReserved,
            |e| e.with(1 << 15),
            |e| {
                e.with(1 << 15);
                e.clear(Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into());
            },
        ),
        case(Rule::Cr3TargetCount, |e| e.set(Field::Cr3TargetCount, 5), |e| e.set(Field::Cr3TargetCount, 4)),
        case(Rule::ExitReserved, |e| e.or(Field::ExitControls, 1 << 23), |_| ()),
        case(
            Rule::EntryReserved,
            |e| e.or(Field::EntryControls, x86defs::vmx::entry_ctl::ENTRY_TO_SMM.into()),
            |_| (),
        ),
    ]
}

/// A page's address: neither between pages nor beyond the width.
fn page(rule: Rule, field: Field) -> [Case; 2] {
    [
        case(rule, move |e| e.or(field, 0x800), move |e| e.set(field, 0)),
        case(rule, move |e| e.set(field, TOO_FAR), move |e| e.set(field, LAST_PAGE)),
    ]
}

fn addresses() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rule, field) in [
        (Rule::IoBitmapAddress, Field::IoBitmapA),
        (Rule::IoBitmapAddress, Field::IoBitmapB),
        (Rule::MsrBitmapAddress, Field::MsrBitmap),
        (Rule::VirtualApicAddress, Field::VirtualApicAddress),
        (Rule::ApicAccessAddress, Field::ApicAccessAddress),
        (Rule::PmlAddress, Field::PmlAddress),
        (Rule::EptpListAddress, Field::EptpListAddress),
        (Rule::ShadowBitmapAddress, Field::VmreadBitmap),
        (Rule::ShadowBitmapAddress, Field::VmwriteBitmap),
        (Rule::VirtualizationExceptionAddress, Field::VirtualizationExceptionAddress),
    ] {
        cases.extend(page(rule, field));
    }
    // Without its control, an address may be anything.
    for (rule, field, control, bits) in [
        (Rule::IoBitmapAddress, Field::IoBitmapA, Field::PrimaryControls, primary::USE_IO_BITMAPS),
        (Rule::MsrBitmapAddress, Field::MsrBitmap, Field::PrimaryControls, primary::USE_MSR_BITMAPS),
        (
            Rule::VirtualApicAddress,
            Field::VirtualApicAddress,
            Field::PrimaryControls,
            primary::USE_TPR_SHADOW,
        ),
        (
            Rule::ApicAccessAddress,
            Field::ApicAccessAddress,
            Field::SecondaryControls,
            secondary::VIRTUALIZE_APIC_ACCESSES,
        ),
        (Rule::PmlAddress, Field::PmlAddress, Field::SecondaryControls, secondary::ENABLE_PML),
        (Rule::EptpListAddress, Field::EptpListAddress, Field::VmFunctionControls, 1),
        (
            Rule::ShadowBitmapAddress,
            Field::VmwriteBitmap,
            Field::SecondaryControls,
            secondary::VMCS_SHADOWING,
        ),
        (
            Rule::VirtualizationExceptionAddress,
            Field::VirtualizationExceptionAddress,
            Field::SecondaryControls,
            secondary::EPT_VIOLATION_VE,
        ),
    ] {
        cases.push(case(
            rule,
            move |e| e.set(field, u64::MAX),
            move |e| {
                e.set(field, u64::MAX);
                e.clear(control, bits.into());
            },
        ));
    }
    cases
}

/// Posted interrupts and what they need.
fn post(e: &mut Entry) {
    e.or(Field::PinControls, pin::POSTED_INTERRUPTS.into());
    e.with(secondary::VIRTUAL_INTERRUPT_DELIVERY);
    e.set(Field::PostedInterruptVector, 0xf2);
    e.set(Field::PostedInterruptDescriptor, 0xe040);
}

/// The comparison with VTPR takes place.
fn compare(e: &mut Entry, threshold: u64, vtpr: Option<u8>) {
    e.without(secondary::VIRTUALIZE_APIC_ACCESSES);
    e.set(Field::TprThreshold, threshold);
    e.inputs.vtpr = vtpr;
}

fn interrupts() -> Vec<Case> {
    vec![
        case(
            Rule::TprThresholdReserved,
            |e| e.set(Field::TprThreshold, 0x10),
            |e| e.set(Field::TprThreshold, 0xf),
        ),
        case(
            Rule::TprThresholdReserved,
            |e| e.set(Field::TprThreshold, 0x10),
            |e| {
                e.set(Field::TprThreshold, 0x10);
                e.with(secondary::VIRTUAL_INTERRUPT_DELIVERY);
            },
        ),
        case(Rule::TprThresholdAboveVtpr, |e| compare(e, 5, Some(0x4f)), |e| compare(e, 5, Some(0x50))),
        case(
            Rule::TprThresholdAboveVtpr,
            |e| compare(e, 1, Some(0)),
            // Where there is no memory.
            |e| compare(e, 15, None),
        ),
        case(
            Rule::VirtualNmisWithoutNmiExiting,
            |e| e.clear(Field::PinControls, pin::NMI_EXITING.into()),
            |e| e.clear(Field::PinControls, (pin::NMI_EXITING | pin::VIRTUAL_NMIS).into()),
        ),
        case(
            Rule::NmiWindowWithoutVirtualNmis,
            |e| {
                e.or(Field::PrimaryControls, primary::NMI_WINDOW_EXITING.into());
                e.clear(Field::PinControls, pin::VIRTUAL_NMIS.into());
            },
            |e| e.or(Field::PrimaryControls, primary::NMI_WINDOW_EXITING.into()),
        ),
        needs_tpr_shadow(secondary::VIRTUALIZE_X2APIC),
        needs_tpr_shadow(secondary::APIC_REGISTER_VIRTUALIZATION),
        needs_tpr_shadow(secondary::VIRTUAL_INTERRUPT_DELIVERY),
        case(
            Rule::X2ApicWithApicAccesses,
            |e| e.with(secondary::VIRTUALIZE_X2APIC),
            |e| {
                e.with(secondary::VIRTUALIZE_X2APIC);
                e.without(secondary::VIRTUALIZE_APIC_ACCESSES);
            },
        ),
        case(
            Rule::InterruptDeliveryWithoutExiting,
            |e| {
                e.with(secondary::VIRTUAL_INTERRUPT_DELIVERY);
                e.clear(Field::PinControls, pin::EXTERNAL_INTERRUPT_EXITING.into());
            },
            |e| e.with(secondary::VIRTUAL_INTERRUPT_DELIVERY),
        ),
        case(
            Rule::PostedWithoutInterruptDelivery,
            |e| {
                post(e);
                e.without(secondary::VIRTUAL_INTERRUPT_DELIVERY);
            },
            post,
        ),
        case(
            Rule::PostedWithoutAcknowledge,
            |e| {
                post(e);
                e.clear(Field::ExitControls, exit_ctl::ACKNOWLEDGE_INTERRUPT.into());
            },
            |e| e.clear(Field::ExitControls, exit_ctl::ACKNOWLEDGE_INTERRUPT.into()),
        ),
        case(
            Rule::PostedVector,
            |e| {
                post(e);
                e.set(Field::PostedInterruptVector, 0x100);
            },
            |e| {
                post(e);
                e.set(Field::PostedInterruptVector, 0xff);
            },
        ),
        posted_descriptor(0xe020, 0xe080),
        posted_descriptor(TOO_FAR, TOO_FAR - 0x40),
    ]
}

fn needs_tpr_shadow(control: u32) -> Case {
    let prepare = move |e: &mut Entry| {
        e.with(control);
        e.without(secondary::VIRTUALIZE_APIC_ACCESSES);
    };
    case(
        Rule::ApicControlsWithoutTprShadow,
        move |e| {
            prepare(e);
            e.clear(Field::PrimaryControls, primary::USE_TPR_SHADOW.into());
        },
        prepare,
    )
}

fn posted_descriptor(bad: u64, good: u64) -> Case {
    let with = |address| {
        move |e: &mut Entry| {
            post(e);
            e.set(Field::PostedInterruptDescriptor, address);
        }
    };
    case(Rule::PostedDescriptorAddress, with(bad), with(good))
}

fn ept() -> Vec<Case> {
    let eptp = |rule, bad: u64, good: u64| {
        case(rule, move |e| e.set(Field::EptPointer, bad), move |e| e.set(Field::EptPointer, good))
    };
    vec![
        case(
            Rule::VpidZero,
            |e| e.set(Field::Vpid, 0),
            |e| {
                e.set(Field::Vpid, 0);
                e.without(secondary::ENABLE_VPID);
            },
        ),
        eptp(Rule::EptpMemoryType, 0x605c, 0x6058),
        eptp(Rule::EptpMemoryType, 0x6059, 0x605e),
        eptp(Rule::EptpWalkLength, 0x6066, 0x605e),
        eptp(Rule::EptpWalkLength, 0x6056, 0x601e),
        eptp(Rule::EptpReserved, 0x60de, 0x605e),
        eptp(Rule::EptpReserved, 0x685e, 0x705e),
        eptp(Rule::EptpReserved, TOO_FAR | 0x5e, LAST_PAGE | 0x5e),
        case(
            Rule::EptpAccessedDirty,
            |e| {
                e.flag("vmx-eptad", false);
                e.without(secondary::ENABLE_PML);
            },
            |e| {
                e.flag("vmx-eptad", false);
                e.without(secondary::ENABLE_PML);
                e.set(Field::EptPointer, 0x601e);
            },
        ),
        case(
            Rule::PmlWithoutEpt,
            |e| {
                e.without(secondary::ENABLE_EPT | NEEDS_EPT);
                e.with(secondary::ENABLE_PML);
                e.set(Field::VmFunctionControls, 0);
            },
            without_ept,
        ),
        case(
            Rule::UnrestrictedWithoutEpt,
            |e| {
                without_ept(e);
                e.with(secondary::UNRESTRICTED_GUEST);
            },
            without_ept,
        ),
        case(
            Rule::ModeBasedExecuteWithoutEpt,
            |e| {
                without_ept(e);
                e.with(secondary::MODE_BASED_EXECUTE);
            },
            without_ept,
        ),
        case(
            Rule::VmFunctionsReserved,
            |e| e.set(Field::VmFunctionControls, 2),
            |e| {
                e.set(Field::VmFunctionControls, 2);
                e.without(secondary::ENABLE_VMFUNC);
            },
        ),
        case(
            Rule::EptpSwitchingWithoutEpt,
            |e| {
                without_ept(e);
                e.set(Field::VmFunctionControls, 1);
            },
            without_ept,
        ),
        case(Rule::TscMultiplierZero, |e| e.set(Field::TscMultiplier, 0), |e| e.set(Field::TscMultiplier, 1)),
    ]
}

fn without_ept(e: &mut Entry) {
    e.without(secondary::ENABLE_EPT | NEEDS_EPT);
    e.set(Field::VmFunctionControls, 0);
    e.set(Field::EptPointer, u64::MAX);
}

/// An MSR area: aligned, and its last byte within the width.
fn area(rule: Rule, address: Field, count: Field) -> [Case; 4] {
    let with = move |at: u64, entries: u64| {
        move |e: &mut Entry| {
            e.set(address, at);
            e.set(count, entries);
        }
    };
    [
        case(rule, with(0xc008, 1), with(0xc008, 0)),
        case(rule, with(TOO_FAR, 1), with(TOO_FAR - 16, 1)),
        case(rule, with(TOO_FAR - 16, 2), with(TOO_FAR - 32, 2)),
        case(rule, with(u64::MAX - 15, 0xffff_ffff), with(u64::MAX - 15, 0)),
    ]
}

fn exit_and_entry() -> Vec<Case> {
    let mut cases = vec![case(
        Rule::SavePreemptionTimerWithoutTimer,
        |e| e.clear(Field::PinControls, pin::PREEMPTION_TIMER.into()),
        |e| e.clear(Field::ExitControls, exit_ctl::SAVE_PREEMPTION_TIMER.into()),
    )];
    cases.extend(area(Rule::ExitMsrStoreArea, Field::ExitMsrStoreAddress, Field::ExitMsrStoreCount));
    cases.extend(area(Rule::ExitMsrLoadArea, Field::ExitMsrLoadAddress, Field::ExitMsrLoadCount));
    cases.extend(area(Rule::EntryMsrLoadArea, Field::EntryMsrLoadAddress, Field::EntryMsrLoadCount));
    cases
}

const ERROR_CODE: u64 = event::ERROR_CODE_VALID as u64;

/// Injects a hardware exception, with an error code or without.
fn exception(vector: u8, error_code: bool) -> impl Fn(&mut Entry) {
    move |e| {
        e.inject(event::HARDWARE_EXCEPTION, vector);
        if error_code {
            e.or(Field::EntryInterruption, ERROR_CODE);
        }
    }
}

/// The same where IA32_VMX_BASIC bit 56 is 0.
fn strict_exception(vector: u8, error_code: bool) -> impl Fn(&mut Entry) {
    move |e| {
        e.flag("vmx-any-errcode", false);
        exception(vector, error_code)(e);
    }
}

fn injection() -> Vec<Case> {
    let inject = |kind, vector| move |e: &mut Entry| e.inject(kind, vector);
    let mut cases = vec![
        case(Rule::InjectionType, inject(1, 0), inject(event::OTHER, 0)),
        case(
            Rule::InjectionType,
            |e| {
                e.flag("vmx-mtf", false);
                e.inject(event::OTHER, 0);
            },
            |e| e.set(Field::EntryInterruption, 1 << 8),
        ),
        case(Rule::InjectionVector, inject(event::NMI, 3), inject(event::NMI, 2)),
        case(
            Rule::InjectionVector,
            inject(event::HARDWARE_EXCEPTION, 32),
            inject(event::HARDWARE_EXCEPTION, 31),
        ),
        case(Rule::InjectionVector, inject(event::OTHER, 1), inject(event::OTHER, 0)),
        case(
            Rule::InjectionErrorCodeUnexpected,
            |e| {
                e.inject(event::SOFTWARE_EXCEPTION, 3);
                e.or(Field::EntryInterruption, ERROR_CODE);
            },
            inject(event::SOFTWARE_EXCEPTION, 3),
        ),
        case(Rule::InjectionErrorCodeUnexpected, exception(13, true), exception(13, false))
            .on(good::real_mode),
        case(Rule::InjectionErrorCodeUnexpected, exception(13, true), |e| {
            exception(13, true)(e);
            e.or(Field::GuestCr0, cr0::PE);
        })
        .on(good::real_mode),
        case(
            Rule::InjectionReserved,
            |e| {
                e.inject(event::NMI, 2);
                e.or(Field::EntryInterruption, 1 << 12);
            },
            |e| e.set(Field::EntryInterruption, 1 << 12),
        ),
        case(
            Rule::InjectionReserved,
            |e| {
                e.inject(event::NMI, 2);
                e.or(Field::EntryInterruption, 1 << 30);
            },
            inject(event::NMI, 2),
        ),
        case(
            Rule::InjectionErrorCode,
            |e| {
                exception(14, true)(e);
                e.set(Field::EntryErrorCode, 0x1_0000);
            },
            |e| {
                exception(14, true)(e);
                e.set(Field::EntryErrorCode, 0xffff);
            },
        ),
    ];
    // 0 to 31 but for NMI: which vectors have an error code.
    for vector in (0..32).filter(|&vector| vector != 2) {
        if matches!(vector, 8 | 10 | 11 | 12 | 13 | 14 | 17) {
            let rule = Rule::InjectionErrorCodeMissing;
            cases.push(case(rule, strict_exception(vector, false), strict_exception(vector, true)));
            cases.push(case(rule, strict_exception(vector, false), exception(vector, false)));
        } else {
            let rule = Rule::InjectionErrorCodeUnexpected;
            cases.push(case(rule, strict_exception(vector, true), strict_exception(vector, false)));
            cases.push(case(rule, strict_exception(vector, true), exception(vector, true)));
        }
    }
    for kind in [event::SOFTWARE_INTERRUPT, event::PRIVILEGED_SOFTWARE_EXCEPTION, event::SOFTWARE_EXCEPTION] {
        let long = move |kind, length| {
            move |e: &mut Entry| {
                e.inject(kind, 2);
                e.set(Field::EntryInstructionLength, length);
            }
        };
        let rule = Rule::InjectionInstructionLength;
        cases.push(case(rule, long(kind, 16), long(kind, 15)));
        cases.push(case(rule, long(kind, 16), long(event::NMI, 16)));
        cases.push(case(
            rule,
            move |e| {
                e.flag("vmx-zero-len-inject", false);
                long(kind, 0)(e);
            },
            long(kind, 0),
        ));
    }
    cases
}
