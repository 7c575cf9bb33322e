//! VMCS02 against small models: what exits under it, and what L2 reads, is what VMCS01 and VMCS12 say.

use x86defs::vmx::{event, reason};

use super::*;
use crate::exit_policy::{Bitmaps, ExitFacts, Handler, route};

struct NoBits;

impl Bitmaps for NoBits {
    fn io(&self, _: u16) -> bool {
        false
    }
    fn msr_read(&self, _: u32) -> bool {
        false
    }
    fn msr_write(&self, _: u32) -> bool {
        false
    }
    fn vmread(&self, _: u16) -> bool {
        false
    }
    fn vmwrite(&self, _: u16) -> bool {
        false
    }
}

fn vmcs(fields: &[(Field, u64)]) -> Vmcs {
    let mut vmcs = Vmcs::default();
    for &(field, value) in fields {
        vmcs.set(field, value);
    }
    vmcs
}

/// An engine under `vmcs` exits.
fn exits(vmcs: &Vmcs, exit: &ExitFacts) -> bool {
    route(exit, vmcs, &NoBits) == Handler::L1
}

fn passive() -> Vmcs {
    passive_vmcs01(&Capabilities::default())
}

#[test]
fn every_control_field_has_its_rule() {
    let merged = [
        Field::PinControls,
        Field::PrimaryControls,
        Field::SecondaryControls,
        Field::ExitControls,
        Field::EntryControls,
        Field::IoBitmapA,
        Field::IoBitmapB,
        Field::MsrBitmap,
        Field::ExceptionBitmap,
        Field::PageFaultMask,
        Field::PageFaultMatch,
        Field::Cr0Mask,
        Field::Cr0Shadow,
        Field::Cr4Mask,
        Field::Cr4Shadow,
        Field::Cr3TargetCount,
        Field::Cr3Target0,
        Field::Cr3Target1,
        Field::Cr3Target2,
        Field::Cr3Target3,
        Field::EptPointer,
        Field::Vpid,
        Field::PleGap,
        Field::PleWindow,
        Field::TscOffset,
        Field::TscMultiplier,
        Field::XssExitingBitmap,
    ];
    for info in FIELDS.iter().filter(|info| info.field.area() == Area::Control) {
        let rules = [FROM_01, FROM_12, &merged].iter().filter(|list| list.contains(&info.field)).count();
        assert_eq!(rules, 1, "{}", info.name);
    }
    assert_eq!(FROM_01.len() + FROM_12.len() + merged.len(), {
        FIELDS.iter().filter(|info| info.field.area() == Area::Control).count()
    });
}

#[test]
fn state_is_the_guests_of_12_and_the_hosts_of_01() {
    let (mut vmcs01, mut vmcs12) = (passive(), Vmcs::default());
    for (i, info) in FIELDS.iter().enumerate() {
        let area = info.field.area();
        if matches!(area, Area::GuestState | Area::HostState | Area::ExitInformation) {
            vmcs01.set(info.field, 1000 + i as u64);
            vmcs12.set(info.field, 2000 + i as u64);
        }
    }
    // L1 loads what VM entry may leave alone.
    let loads = entry_ctl::LOAD_DEBUG_CONTROLS
        | entry_ctl::LOAD_PAT
        | entry_ctl::LOAD_EFER
        | entry_ctl::LOAD_PERF_GLOBAL_CTRL;
    vmcs12.set(Field::EntryControls, loads.into());
    vmcs12.set(Field::PinControls, pin::PREEMPTION_TIMER.into());
    let vmcs02 = merge(&vmcs01, &vmcs12);
    for (i, info) in FIELDS.iter().enumerate() {
        let expected = match info.field.area() {
            Area::GuestState => 2000 + i as u64,
            Area::HostState => 1000 + i as u64,
            Area::ExitInformation => 0,
            Area::Control => continue,
        };
        assert_eq!(vmcs02.get(info.field), expected, "{}", info.name);
    }
}

#[test]
fn a_passive_vmcs01_leaves_vmcs12s_controls() {
    let caps = Capabilities::default();
    // All that may be 1, in two sets that a VM entry would take.
    for flip in [0, !0_u32] {
        let secondary = caps.secondary().may_be_one & !secondary::USE_TSC_SCALING & (0xaaaa_aaaa ^ flip);
        let primary = caps.primary().zeros_must_be_one
            | primary::ACTIVATE_SECONDARY
            | primary::USE_IO_BITMAPS
            | primary::USE_MSR_BITMAPS
            | caps.primary().may_be_one
                & !(primary::UNCONDITIONAL_IO_EXITING | primary::USE_TSC_OFFSETTING)
                & (0x5555_5555 ^ flip);
        let pin = caps.pin().zeros_must_be_one | caps.pin().may_be_one & (0x5555_5555 ^ flip);
        let vmcs12 = vmcs(&[
            (Field::PinControls, pin.into()),
            (Field::PrimaryControls, primary.into()),
            (Field::SecondaryControls, secondary.into()),
            (Field::IoBitmapA, 0x1000),
            (Field::IoBitmapB, 0x2000),
            (Field::MsrBitmap, 0x3000),
            (Field::ExceptionBitmap, 0x6_4042),
            (Field::PageFaultMask, 5),
            (Field::PageFaultMatch, 1),
            (Field::PleGap, 41),
            (Field::PleWindow, 4096),
        ]);
        let vmcs02 = merge(&passive(), &vmcs12);
        for field in [
            Field::PinControls,
            Field::PrimaryControls,
            Field::SecondaryControls,
            Field::IoBitmapA,
            Field::IoBitmapB,
            Field::MsrBitmap,
            Field::ExceptionBitmap,
            Field::PageFaultMask,
            Field::PageFaultMatch,
            Field::PleGap,
            Field::PleWindow,
        ] {
            assert_eq!(vmcs02.get(field), vmcs12.get(field), "{field:?}");
        }
    }
}

#[test]
fn intercepts_of_either_are_intercepts() {
    let caps = Capabilities::default();
    for bit in (0..32).map(|bit| 1_u32 << bit).filter(|bit| PRIMARY_EITHER & bit != 0) {
        let one = vmcs(&[(Field::PrimaryControls, bit.into())]);
        assert_ne!(merge(&one, &Vmcs::default()).get32(Field::PrimaryControls) & bit, 0);
        assert_ne!(merge(&Vmcs::default(), &one).get32(Field::PrimaryControls) & bit, 0);
        assert_eq!(merge(&passive(), &Vmcs::default()).get32(Field::PrimaryControls) & bit, 0);
    }
    // Of L0's windows L2 knows nothing.
    let windows = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
    let vmcs01 = vmcs(&[(Field::PrimaryControls, windows.into())]);
    assert_eq!(merge(&vmcs01, &Vmcs::default()).get32(Field::PrimaryControls) & windows, 0);
    // Every control that there is has its rule.
    let ruled = PRIMARY_EITHER
        | PRIMARY_12
        | PRIMARY_ONES
        | primary::USE_IO_BITMAPS
        | primary::UNCONDITIONAL_IO_EXITING
        | primary::USE_MSR_BITMAPS
        | primary::USE_TSC_OFFSETTING
        | primary::ACTIVATE_SECONDARY;
    assert_eq!(caps.primary().may_be_one & !ruled, 0);
    let ruled = SECONDARY_EITHER | SECONDARY_BOTH | SECONDARY_12 | secondary::USE_TSC_SCALING;
    assert_eq!(caps.secondary().may_be_one & !ruled, 0);
    assert_eq!(caps.pin().may_be_one & !(0x16 | PIN_EITHER | pin::POSTED_INTERRUPTS), 0);
}

#[test]
fn l1_enables_what_it_was_given() {
    let control = |bits: u32| {
        vmcs(&[
            (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
            (Field::SecondaryControls, bits.into()),
        ])
    };
    let enabled = |of_01, of_12| merge(&control(of_01), &control(of_12)).secondary();
    for bit in [secondary::ENABLE_RDTSCP, secondary::ENABLE_INVPCID, secondary::ENABLE_XSAVES] {
        assert_eq!(enabled(bit, bit) & bit, bit);
        assert_eq!(enabled(0, bit) & bit, 0);
        assert_eq!(enabled(bit, 0) & bit, 0);
    }
    // L0's use of virtualised APICs for L1 is not L2's.
    assert_eq!(enabled(secondary::VIRTUAL_INTERRUPT_DELIVERY, 0), 0);
    // A guest without EPT of L1's runs on L0's.
    let mut vmcs01 = control(secondary::ENABLE_EPT | secondary::ENABLE_VPID);
    vmcs01.set(Field::EptPointer, 0x1_001e);
    vmcs01.set(Field::Vpid, 3);
    let vmcs02 = merge(&vmcs01, &control(0));
    assert_eq!((vmcs02.get(Field::EptPointer), vmcs02.get(Field::Vpid)), (0x1_001e, 3));
    let mut vmcs12 = control(secondary::ENABLE_EPT | secondary::ENABLE_VPID);
    vmcs12.set(Field::EptPointer, 0x2_001e);
    vmcs12.set(Field::Vpid, 4);
    let vmcs02 = merge(&vmcs01, &vmcs12);
    assert_eq!((vmcs02.get(Field::EptPointer), vmcs02.get(Field::Vpid)), (0x2_001e, 4));
}

/// Every small combination of bit, mask and match on each side: what exits for one exits under VMCS02; and nothing else
/// does, where one of them wants none, or both the same.
#[test]
fn page_faults() {
    let filters: Vec<(u64, u64, u64)> = (0..2)
        .flat_map(|bit| (0..4).flat_map(move |mask| (0..4).map(move |equal| (bit << 14, mask, equal))))
        .collect();
    let with = |&(bit, mask, equal): &(u64, u64, u64)| {
        vmcs(&[(Field::ExceptionBitmap, bit), (Field::PageFaultMask, mask), (Field::PageFaultMatch, equal)])
    };
    let interruption = event::VALID | event::ERROR_CODE_VALID | event::HARDWARE_EXCEPTION << 8 | 14;
    let set = |vmcs: &Vmcs| -> Vec<bool> {
        let fault = |code| ExitFacts { interruption, interruption_error: code, ..ExitFacts::default() };
        (0..8).map(|code| exits(vmcs, &fault(code))).collect()
    };
    for first in &filters {
        for second in &filters {
            let (vmcs01, vmcs12) = (with(first), with(second));
            let (set01, set12) = (set(&vmcs01), set(&vmcs12));
            let set02 = set(&merge(&vmcs01, &vmcs12));
            let either: Vec<bool> = set01.iter().zip(&set12).map(|(a, b)| a | b).collect();
            let covers = set02.iter().zip(&either).all(|(has, needs)| *has || !needs);
            assert!(covers, "{first:?} {second:?}");
            let none = |set: &[bool]| set.iter().all(|exits| !exits);
            if none(&set01) || none(&set12) || first == second {
                assert_eq!(set02, either, "{first:?} {second:?}");
            }
        }
    }
}

#[test]
fn other_exceptions_are_joined() {
    let vmcs02 =
        merge(&vmcs(&[(Field::ExceptionBitmap, 0x0002)]), &vmcs(&[(Field::ExceptionBitmap, 0x0040)]));
    assert_eq!(vmcs02.get(Field::ExceptionBitmap), 0x0042);
}

/// All values of three bits: L2 reads what VMCS12 shows it, MOV to CR0 exits where either owns a bit that changes, and bits
/// of L0's have L0's value.
#[test]
fn control_registers() {
    let three = 0..8_u64;
    for (mask01, mask12) in three.clone().flat_map(|a| (0..8).map(move |b| (a, b))) {
        for (guest12, shadow12) in three.clone().flat_map(|a| (0..8).map(move |b| (a, b))) {
            for register in [CR0, CR4] {
                let guest01 = 5;
                let vmcs01 = vmcs(&[(register.mask, mask01), (register.guest, guest01)]);
                let vmcs12 =
                    vmcs(&[(register.mask, mask12), (register.guest, guest12), (register.shadow, shadow12)]);
                let vmcs02 = merge(&vmcs01, &vmcs12);
                let read = |vmcs: &Vmcs| {
                    let mask = vmcs.get(register.mask);
                    vmcs.get(register.shadow) & mask | vmcs.get(register.guest) & !mask
                };
                assert_eq!(read(&vmcs02), read(&vmcs12));
                assert_eq!(vmcs02.get(register.guest) & mask01, guest01 & mask01);
                assert_eq!(vmcs02.get(register.guest) & !mask01, guest12 & !mask01);
                let number = if register.guest == Field::GuestCr0 { 0 } else { 4 };
                for operand in 0..8 {
                    let exit = ExitFacts {
                        reason: reason::CR_ACCESS,
                        qualification: number,
                        operand,
                        ..ExitFacts::default()
                    };
                    // L1 gets its exits, and L0 those that change a bit of its own.
                    let l0 = (operand ^ read(&vmcs12)) & mask01 != 0;
                    assert_eq!(exits(&vmcs02, &exit), exits(&vmcs12, &exit) || l0);
                }
            }
        }
    }
}

#[test]
fn cr3_targets() {
    let with = |exits: bool, targets: &[u64]| {
        let mut vmcs = Vmcs::default();
        vmcs.set(Field::PrimaryControls, if exits { primary::CR3_LOAD_EXITING.into() } else { 0 });
        vmcs.set(Field::Cr3TargetCount, targets.len() as u64);
        for (i, &value) in targets.iter().enumerate() {
            vmcs.set(Field::Cr3Target0.nth(i), value);
        }
        vmcs
    };
    for first in [with(false, &[9]), with(true, &[]), with(true, &[1, 2]), with(true, &[1, 2, 3, 4])] {
        for second in [with(false, &[]), with(true, &[]), with(true, &[2, 3]), with(true, &[4, 3, 2, 1])] {
            let vmcs02 = merge(&first, &second);
            for operand in 0..6 {
                let exit = ExitFacts {
                    reason: reason::CR_ACCESS,
                    qualification: 3,
                    operand,
                    ..ExitFacts::default()
                };
                assert_eq!(exits(&vmcs02, &exit), exits(&first, &exit) || exits(&second, &exit), "{operand}");
            }
        }
    }
}

#[test]
fn io_and_msr_bitmaps() {
    const BITS: u32 = primary::USE_IO_BITMAPS;
    const ALL: u32 = primary::UNCONDITIONAL_IO_EXITING;
    let io = |controls: u32, at: u64| {
        let controls = controls | primary::USE_MSR_BITMAPS;
        vmcs(&[
            (Field::PrimaryControls, controls.into()),
            (Field::IoBitmapA, at),
            (Field::IoBitmapB, at),
            (Field::MsrBitmap, at),
        ])
    };
    for (of_01, of_12, expected) in [
        (io(0, 0), io(0, 0), (0, 0)),
        (io(0, 0), io(ALL, 0), (ALL, 0)),
        (io(ALL, 0), io(0, 0), (ALL, 0)),
        (io(0, 0), io(BITS | ALL, 0x1000), (BITS, 0x1000)),
        (io(BITS, 0x2000), io(0, 0), (BITS, 0x2000)),
        (io(BITS, NO_BITS), io(BITS, 0x1000), (BITS, 0x1000)),
        (io(BITS, NO_BITS), io(0, 0), (0, 0)),
        (io(BITS, NO_BITS), io(ALL, 0), (ALL, 0)),
        (io(BITS, 0x2000), io(BITS, 0x1000), (ALL, 0)),
        (io(BITS, 0x2000), io(ALL, 0), (ALL, 0)),
    ] {
        let vmcs02 = merge(&of_01, &of_12);
        let controls = vmcs02.get32(Field::PrimaryControls) & (BITS | ALL);
        assert_eq!((controls, vmcs02.get(Field::IoBitmapA)), expected);
    }
    let msr = |use_bitmaps: bool, at: u64| {
        let controls = if use_bitmaps { primary::USE_MSR_BITMAPS } else { 0 };
        vmcs(&[(Field::PrimaryControls, controls.into()), (Field::MsrBitmap, at)])
    };
    for (of_01, of_12, expected) in [
        (msr(false, 0), msr(true, 0x1000), None),
        (msr(true, 0x2000), msr(false, 0), None),
        (msr(true, 0x2000), msr(true, 0x1000), None),
        (msr(true, NO_BITS), msr(true, 0x1000), Some(0x1000)),
        (msr(true, NO_BITS), msr(false, 0), None),
    ] {
        let vmcs02 = merge(&of_01, &of_12);
        let used = vmcs02.get32(Field::PrimaryControls) & primary::USE_MSR_BITMAPS != 0;
        assert_eq!(used.then(|| vmcs02.get(Field::MsrBitmap)), expected);
    }
}

#[test]
fn timers_and_pause_loops_of_whoever_is_sooner() {
    let timer = |value: Option<u64>| {
        let active = if value.is_some() { pin::PREEMPTION_TIMER } else { 0 };
        vmcs(&[(Field::PinControls, active.into()), (Field::PreemptionTimerValue, value.unwrap_or(1))])
    };
    for (of_01, of_12, expected) in [
        (Some(7), Some(9), 7),
        (Some(9), Some(7), 7),
        (Some(9), None, 9),
        (None, Some(9), 9),
        (None, None, 0),
    ] {
        let vmcs02 = merge(&timer(of_01), &timer(of_12));
        assert_eq!(vmcs02.get(Field::PreemptionTimerValue), expected);
        let active = vmcs02.get32(Field::PinControls) & pin::PREEMPTION_TIMER != 0;
        assert_eq!(active, of_01.or(of_12).is_some());
    }
    let loops = |on: bool, gap: u64, window: u64| {
        let control = if on { secondary::PAUSE_LOOP_EXITING } else { 0 };
        vmcs(&[
            (Field::PrimaryControls, primary::ACTIVATE_SECONDARY.into()),
            (Field::SecondaryControls, control.into()),
            (Field::PleGap, gap),
            (Field::PleWindow, window),
        ])
    };
    for (of_01, of_12, expected) in [
        (loops(true, 10, 100), loops(true, 20, 50), (20, 50)),
        (loops(true, 10, 100), loops(false, 20, 50), (10, 100)),
        (loops(false, 10, 100), loops(true, 20, 50), (20, 50)),
    ] {
        let vmcs02 = merge(&of_01, &of_12);
        assert_eq!((vmcs02.get(Field::PleGap), vmcs02.get(Field::PleWindow)), expected);
    }
}

#[test]
fn exits_go_to_l0_and_interrupts_are_acknowledged_for_their_taker() {
    const ACKNOWLEDGE: u32 = exit_ctl::ACKNOWLEDGE_INTERRUPT;
    let with = |exiting: bool, exit: u32| {
        let pin = if exiting { pin::EXTERNAL_INTERRUPT_EXITING } else { 0 };
        vmcs(&[(Field::PinControls, pin.into()), (Field::ExitControls, exit.into())])
    };
    for (of_01, of_12, expected) in [
        (with(true, ACKNOWLEDGE), with(true, 0), 0),
        (with(true, ACKNOWLEDGE), with(false, 0), ACKNOWLEDGE),
        (with(true, 0), with(true, ACKNOWLEDGE), ACKNOWLEDGE),
        (with(true, 0), with(false, ACKNOWLEDGE), 0),
    ] {
        assert_eq!(merge(&of_01, &of_12).get32(Field::ExitControls) & ACKNOWLEDGE, expected);
    }
    let host = exit_ctl::HOST_ADDRESS_SPACE_SIZE | exit_ctl::LOAD_EFER;
    let vmcs02 = merge(&with(false, host), &with(false, exit_ctl::LOAD_PAT | exit_ctl::SAVE_PAT));
    assert_eq!(vmcs02.get32(Field::ExitControls), host | exit_ctl::SAVE_PAT);
}

#[test]
fn what_vm_entry_leaves_alone_stays_l1s() {
    let mut vmcs01 = passive();
    for (field, value) in [
        (Field::GuestDebugctl, 1),
        (Field::GuestDr7, 0x401),
        (Field::GuestPat, 6),
        (Field::GuestEfer, efer::LMA | efer::LME | efer::NXE),
    ] {
        vmcs01.set(field, value);
    }
    let guest12 = [
        (Field::GuestDebugctl, 2),
        (Field::GuestDr7, 0x402),
        (Field::GuestPat, 7),
        (Field::GuestEfer, efer::SCE),
    ];
    for (control, fields) in [
        (entry_ctl::LOAD_DEBUG_CONTROLS, &[Field::GuestDebugctl, Field::GuestDr7][..]),
        (entry_ctl::LOAD_PAT, &[Field::GuestPat]),
    ] {
        for loads in [false, true] {
            let mut vmcs12 = vmcs(&guest12);
            vmcs12.set(Field::EntryControls, if loads { control.into() } else { 0 });
            let vmcs02 = merge(&vmcs01, &vmcs12);
            assert_ne!(vmcs02.get32(Field::EntryControls) & control, 0);
            for &field in fields {
                let from = if loads { &vmcs12 } else { &vmcs01 };
                assert_eq!(vmcs02.get(field), from.get(field), "{field:?}");
            }
        }
    }
}

/// LMA is the control's whether EFER is loaded or not; LME is too, with paging.
#[test]
fn efer_without_load_follows_the_guests_mode() {
    use efer::{LMA, LME, NXE};
    for (before, long, paging, after) in [
        (LMA | LME | NXE, true, true, LMA | LME | NXE),
        (NXE, true, true, LMA | LME | NXE),
        (LMA | LME | NXE, false, true, NXE),
        (LMA | LME | NXE, false, false, LME | NXE),
        (NXE, false, false, NXE),
    ] {
        let vmcs01 = vmcs(&[(Field::GuestEfer, before)]);
        let vmcs12 = vmcs(&[
            (Field::EntryControls, if long { entry_ctl::IA32E_MODE_GUEST.into() } else { 0 }),
            (Field::GuestCr0, if paging { cr0::PG } else { 0 }),
            (Field::GuestEfer, efer::SCE),
        ]);
        assert_eq!(merge(&vmcs01, &vmcs12).get(Field::GuestEfer), after, "{before:#x} {long} {paging}");
    }
    let vmcs12 = vmcs(&[(Field::EntryControls, entry_ctl::LOAD_EFER.into()), (Field::GuestEfer, efer::SCE)]);
    assert_eq!(merge(&passive(), &vmcs12).get(Field::GuestEfer), efer::SCE);
}
