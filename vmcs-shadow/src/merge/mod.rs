//! VMCS02: what L2 really runs under, made of VMCS01 (what L0 asks for while L1 or its guests run) and VMCS12 (what L1 asks
//! for while L2 runs). One rule for each group of fields:
//!
//! - an intercept is set if either hypervisor sets it, and where two conditions cannot be joined into one, L2 exits
//!   always: [`crate::exit_policy`] finds out afterwards who wants the exit;
//! - what a control enables is enabled if L1 enables it and L0 lets L1 have it;
//! - the guest's state is VMCS12's, the host's VMCS01's: L2's exits go to L0;
//! - what L1 leaves unchanged on VM entry is taken over from L1's own state, VMCS01's guest-state area.
//!
//! Addresses are taken over as they are: to the engine, L1's physical memory is physical memory.

mod tsc;

use x86defs::vmx::{entry_ctl, exit_ctl, pin, primary, secondary};
use x86defs::{cr0, efer};

use crate::caps::Capabilities;
use crate::encoding::Area;
use crate::field::{FIELDS, Field, Vmcs};

/// In VMCS01, the address of bitmaps with no bit set: L0 wants none of these exits.
pub const NO_BITS: u64 = u64::MAX;

/// Control fields that are VMCS12's as they stand.
const FROM_12: &[Field] = &[
    // Events to inject, and the interrupts and APIC that L1 shows L2.
    Field::EntryInterruption,
    Field::EntryErrorCode,
    Field::EntryInstructionLength,
    Field::PostedInterruptVector,
    Field::PostedInterruptDescriptor,
    Field::VirtualApicAddress,
    Field::ApicAccessAddress,
    Field::TprThreshold,
    Field::EoiExitBitmap0,
    Field::EoiExitBitmap1,
    Field::EoiExitBitmap2,
    Field::EoiExitBitmap3,
    // What L1 alone may enable.
    Field::VmFunctionControls,
    Field::EptpListAddress,
    Field::EptpIndex,
    Field::VirtualizationExceptionAddress,
    Field::VmreadBitmap,
    Field::VmwriteBitmap,
    Field::PmlAddress,
];

/// Control fields that are VMCS01's as they stand. L1's MSR areas are not here: L0 goes through them itself, as L1's
/// memory may change under the processor.
const FROM_01: &[Field] = &[
    Field::ExitMsrStoreAddress,
    Field::ExitMsrStoreCount,
    Field::ExitMsrLoadAddress,
    Field::ExitMsrLoadCount,
    Field::EntryMsrLoadAddress,
    Field::EntryMsrLoadCount,
    Field::ExecutiveVmcsPointer,
];

/// Intercepts among the pin-based controls, and what comes with them.
const PIN_EITHER: u32 =
    pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS | pin::PREEMPTION_TIMER;

/// Intercepts among the primary controls.
const PRIMARY_EITHER: u32 = primary::HLT_EXITING
    | primary::INVLPG_EXITING
    | primary::MWAIT_EXITING
    | primary::RDPMC_EXITING
    | primary::RDTSC_EXITING
    | primary::CR3_LOAD_EXITING
    | primary::CR3_STORE_EXITING
    | primary::CR8_LOAD_EXITING
    | primary::CR8_STORE_EXITING
    | primary::MOV_DR_EXITING
    | primary::MONITOR_TRAP_FLAG
    | primary::MONITOR_EXITING
    | primary::PAUSE_EXITING;
/// VMCS01's windows are about events for L1, which are no business of L2's.
const PRIMARY_12: u32 =
    primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING | primary::USE_TPR_SHADOW;
/// Reserved to 1.
const PRIMARY_ONES: u32 = 0x0400_6172;

/// Intercepts among the secondary controls, and what either hypervisor may use for itself.
const SECONDARY_EITHER: u32 = secondary::DESCRIPTOR_TABLE_EXITING
    | secondary::WBINVD_EXITING
    | secondary::RDRAND_EXITING
    | secondary::RDSEED_EXITING
    | secondary::PAUSE_LOOP_EXITING
    | secondary::ENABLE_EPT
    | secondary::ENABLE_VPID;
/// Instructions that are #UD unless enabled: L1 cannot give what it was not given.
const SECONDARY_BOTH: u32 = secondary::ENABLE_RDTSCP | secondary::ENABLE_INVPCID | secondary::ENABLE_XSAVES;
/// L1's to decide about L2, whatever L0 uses for L1.
const SECONDARY_12: u32 = secondary::VIRTUALIZE_APIC_ACCESSES
    | secondary::VIRTUALIZE_X2APIC
    | secondary::APIC_REGISTER_VIRTUALIZATION
    | secondary::VIRTUAL_INTERRUPT_DELIVERY
    | secondary::UNRESTRICTED_GUEST
    | secondary::ENABLE_VMFUNC
    | secondary::VMCS_SHADOWING
    | secondary::ENABLE_PML
    | secondary::EPT_VIOLATION_VE
    | secondary::MODE_BASED_EXECUTE;

/// A VMCS01 for an engine on which L1 runs without one: L0 asks for no exit of L1's guests, and lets L1 have what
/// `caps` offers. Its guest-state area is to hold L1's state by the time of a merge.
pub fn passive_vmcs01(caps: &Capabilities) -> Vmcs {
    let mut vmcs = Vmcs::default();
    let primary =
        PRIMARY_ONES | primary::USE_IO_BITMAPS | primary::USE_MSR_BITMAPS | primary::ACTIVATE_SECONDARY;
    for (field, value) in [
        (Field::PinControls, caps.pin().zeros_must_be_one),
        (Field::PrimaryControls, primary),
        (Field::SecondaryControls, caps.secondary().may_be_one & SECONDARY_BOTH),
        (Field::ExitControls, caps.exit().zeros_must_be_one | exit_ctl::HOST_ADDRESS_SPACE_SIZE),
        (Field::EntryControls, caps.entry().zeros_must_be_one),
    ] {
        vmcs.set(field, value.into());
    }
    for field in [Field::IoBitmapA, Field::IoBitmapB, Field::MsrBitmap] {
        vmcs.set(field, NO_BITS);
    }
    vmcs.set(Field::VmcsLinkPointer, u64::MAX);
    vmcs
}

/// The two VMCSs that are merged.
struct Pair<'a> {
    vmcs01: &'a Vmcs,
    vmcs12: &'a Vmcs,
}

/// Makes VMCS02 for an entry from L1 to L2.
pub fn merge(vmcs01: &Vmcs, vmcs12: &Vmcs) -> Vmcs {
    let pair = Pair { vmcs01, vmcs12 };
    let mut vmcs02 = Vmcs::default();
    take_over(&mut vmcs02, &pair);
    merge_pin(&mut vmcs02, &pair);
    merge_primary(&mut vmcs02, &pair);
    merge_secondary(&mut vmcs02, &pair);
    merge_io(&mut vmcs02, &pair);
    merge_msr_bitmaps(&mut vmcs02, &pair);
    merge_exceptions(&mut vmcs02, &pair);
    merge_control_register(&mut vmcs02, &pair, CR0);
    merge_control_register(&mut vmcs02, &pair, CR4);
    merge_cr3_targets(&mut vmcs02, &pair);
    merge_second_level(&mut vmcs02, &pair);
    merge_pause_loop(&mut vmcs02, &pair);
    merge_timer(&mut vmcs02, &pair);
    tsc::merge(&mut vmcs02, &pair);
    merge_exit_controls(&mut vmcs02, &pair);
    merge_entry_controls(&mut vmcs02, &pair);
    vmcs02
}

impl Pair<'_> {
    fn either(&self, field: Field) -> u64 {
        self.vmcs01.get(field) | self.vmcs12.get(field)
    }

    fn both_secondary(&self) -> [u32; 2] {
        [self.vmcs01.secondary(), self.vmcs12.secondary()]
    }
}

/// Fields that come from one of the two as they stand.
fn take_over(vmcs02: &mut Vmcs, pair: &Pair) {
    for info in FIELDS {
        let value = match info.field.area() {
            Area::GuestState => pair.vmcs12.get(info.field),
            Area::HostState => pair.vmcs01.get(info.field),
            Area::Control | Area::ExitInformation => continue,
        };
        vmcs02.set(info.field, value);
    }
    for &field in FROM_12 {
        vmcs02.set(field, pair.vmcs12.get(field));
    }
    for &field in FROM_01 {
        vmcs02.set(field, pair.vmcs01.get(field));
    }
}

fn merge_pin(vmcs02: &mut Vmcs, pair: &Pair) {
    const ONES: u32 = 0x16;
    let either = pair.either(Field::PinControls) as u32 & PIN_EITHER;
    let own = pair.vmcs12.get32(Field::PinControls) & pin::POSTED_INTERRUPTS;
    vmcs02.set(Field::PinControls, (ONES | either | own).into());
}

/// Primary controls but for those about I/O, MSRs and the TSC.
fn merge_primary(vmcs02: &mut Vmcs, pair: &Pair) {
    let either = pair.either(Field::PrimaryControls) as u32 & PRIMARY_EITHER;
    let own = pair.vmcs12.get32(Field::PrimaryControls) & PRIMARY_12;
    vmcs02.set(Field::PrimaryControls, (PRIMARY_ONES | primary::ACTIVATE_SECONDARY | either | own).into());
}

fn merge_secondary(vmcs02: &mut Vmcs, pair: &Pair) {
    let [of_01, of_12] = pair.both_secondary();
    let value = (of_01 | of_12) & SECONDARY_EITHER | of_01 & of_12 & SECONDARY_BOTH | of_12 & SECONDARY_12;
    vmcs02.set(Field::SecondaryControls, value.into());
    vmcs02.set(Field::XssExitingBitmap, pair.either(Field::XssExitingBitmap));
}

/// Which accesses of a kind exit, as one VMCS has it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Filter<T> {
    None,
    /// Those whose bit is set.
    Bits(T),
    All,
}

impl<T: Copy> Filter<T> {
    /// Those that exit in one or the other; all where that is no bitmap of either's.
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, filter) | (filter, Self::None) => filter,
            _ => Self::All,
        }
    }
}

/// I/O instructions.
fn merge_io(vmcs02: &mut Vmcs, pair: &Pair) {
    let filter = |vmcs: &Vmcs| {
        let controls = vmcs.get32(Field::PrimaryControls);
        let addresses = [vmcs.get(Field::IoBitmapA), vmcs.get(Field::IoBitmapB)];
        if controls & primary::USE_IO_BITMAPS != 0 {
            if addresses == [NO_BITS; 2] { Filter::None } else { Filter::Bits(addresses) }
        } else if controls & primary::UNCONDITIONAL_IO_EXITING != 0 {
            Filter::All
        } else {
            Filter::None
        }
    };
    match filter(pair.vmcs01).or(filter(pair.vmcs12)) {
        Filter::None => {}
        Filter::All => set_bits(vmcs02, Field::PrimaryControls, primary::UNCONDITIONAL_IO_EXITING),
        Filter::Bits([a, b]) => {
            set_bits(vmcs02, Field::PrimaryControls, primary::USE_IO_BITMAPS);
            vmcs02.set(Field::IoBitmapA, a);
            vmcs02.set(Field::IoBitmapB, b);
        }
    }
}

/// RDMSR and WRMSR: all exit unless bitmaps are in use.
fn merge_msr_bitmaps(vmcs02: &mut Vmcs, pair: &Pair) {
    let filter = |vmcs: &Vmcs| match vmcs.get(Field::MsrBitmap) {
        _ if vmcs.get32(Field::PrimaryControls) & primary::USE_MSR_BITMAPS == 0 => Filter::All,
        NO_BITS => Filter::None,
        address => Filter::Bits(address),
    };
    let address = match filter(pair.vmcs01).or(filter(pair.vmcs12)) {
        Filter::All => return,
        Filter::None => NO_BITS,
        Filter::Bits(address) => address,
    };
    set_bits(vmcs02, Field::PrimaryControls, primary::USE_MSR_BITMAPS);
    vmcs02.set(Field::MsrBitmap, address);
}

/// Exceptions: bitmaps are joined. Page faults that exit are `bit == (code & mask == match)`.
fn merge_exceptions(vmcs02: &mut Vmcs, pair: &Pair) {
    const PAGE_FAULT: u64 = 1 << x86defs::vector::PF;
    let filter = |vmcs: &Vmcs| {
        let bit = vmcs.get(Field::ExceptionBitmap) & PAGE_FAULT;
        let (mask, equal) = (vmcs.get32(Field::PageFaultMask), vmcs.get32(Field::PageFaultMatch));
        let (always_equal, never_equal) = (mask == 0 && equal == 0, equal & !mask != 0);
        match (bit != 0, always_equal, never_equal) {
            (true, true, _) | (false, _, true) => Filter::All,
            (true, _, true) | (false, true, _) => Filter::None,
            _ => Filter::Bits((bit, mask, equal)),
        }
    };
    let (first, second) = (filter(pair.vmcs01), filter(pair.vmcs12));
    let (bit, mask, equal) = match if first == second { first } else { first.or(second) } {
        Filter::None => (0, 0, 0),
        Filter::All => (PAGE_FAULT, 0, 0),
        Filter::Bits(bits) => bits,
    };
    let others = pair.either(Field::ExceptionBitmap) & !PAGE_FAULT;
    vmcs02.set(Field::ExceptionBitmap, others | bit);
    vmcs02.set(Field::PageFaultMask, mask.into());
    vmcs02.set(Field::PageFaultMatch, equal.into());
}

/// A control register's fields.
#[derive(Clone, Copy)]
struct ControlRegister {
    guest: Field,
    mask: Field,
    shadow: Field,
}

const CR0: ControlRegister =
    ControlRegister { guest: Field::GuestCr0, mask: Field::Cr0Mask, shadow: Field::Cr0Shadow };
const CR4: ControlRegister =
    ControlRegister { guest: Field::GuestCr4, mask: Field::Cr4Mask, shadow: Field::Cr4Shadow };

/// A bit that either owns is not L2's. Bits of L0's have L0's value; L2 reads what it would read under VMCS12.
fn merge_control_register(vmcs02: &mut Vmcs, pair: &Pair, register: ControlRegister) {
    let (mask01, mask12) = (pair.vmcs01.get(register.mask), pair.vmcs12.get(register.mask));
    let (guest01, guest12) = (pair.vmcs01.get(register.guest), pair.vmcs12.get(register.guest));
    let read = pair.vmcs12.get(register.shadow) & mask12 | guest12 & !mask12;
    vmcs02.set(register.mask, mask01 | mask12);
    vmcs02.set(register.shadow, read);
    vmcs02.set(register.guest, guest01 & mask01 | guest12 & !mask01);
}

/// Values of CR3 that may be loaded without an exit: for both, if both intercept loads.
fn merge_cr3_targets(vmcs02: &mut Vmcs, pair: &Pair) {
    let targets = |vmcs: &Vmcs| -> Option<Vec<u64>> {
        let exits = vmcs.get32(Field::PrimaryControls) & primary::CR3_LOAD_EXITING != 0;
        let count = vmcs.get(Field::Cr3TargetCount).min(4) as usize;
        exits.then(|| (0..count).map(|i| vmcs.get(Field::Cr3Target0.nth(i))).collect())
    };
    let free = match (targets(pair.vmcs01), targets(pair.vmcs12)) {
        (Some(first), Some(second)) => first.into_iter().filter(|value| second.contains(value)).collect(),
        (first, second) => first.or(second).unwrap_or_default(),
    };
    vmcs02.set(Field::Cr3TargetCount, free.len() as u64);
    for (i, value) in free.into_iter().enumerate() {
        vmcs02.set(Field::Cr3Target0.nth(i), value);
    }
}

/// EPT pointer and VPID: L1's names, for which L0 has tables and tags of its own; without L1's, L0's.
fn merge_second_level(vmcs02: &mut Vmcs, pair: &Pair) {
    for (field, control) in
        [(Field::EptPointer, secondary::ENABLE_EPT), (Field::Vpid, secondary::ENABLE_VPID)]
    {
        let [of_01, of_12] = pair.both_secondary().map(|controls| controls & control != 0);
        let value = match (of_01, of_12) {
            (_, true) => pair.vmcs12.get(field),
            (true, false) => pair.vmcs01.get(field),
            (false, false) => 0,
        };
        vmcs02.set(field, value);
    }
}

/// The pause loop that exits sooner: the wider gap and the narrower window.
fn merge_pause_loop(vmcs02: &mut Vmcs, pair: &Pair) {
    let [of_01, of_12] = pair.both_secondary().map(|controls| controls & secondary::PAUSE_LOOP_EXITING != 0);
    let values = |field| (pair.vmcs01.get(field), pair.vmcs12.get(field));
    let (gaps, windows) = (values(Field::PleGap), values(Field::PleWindow));
    let (gap, window) = match (of_01, of_12) {
        (true, true) => (gaps.0.max(gaps.1), windows.0.min(windows.1)),
        (true, false) => (gaps.0, windows.0),
        (false, _) => (gaps.1, windows.1),
    };
    vmcs02.set(Field::PleGap, gap);
    vmcs02.set(Field::PleWindow, window);
}

/// The VMX-preemption timer that runs out sooner.
fn merge_timer(vmcs02: &mut Vmcs, pair: &Pair) {
    let value = |vmcs: &Vmcs| {
        let active = vmcs.get32(Field::PinControls) & pin::PREEMPTION_TIMER != 0;
        active.then(|| vmcs.get(Field::PreemptionTimerValue))
    };
    let values = [value(pair.vmcs01), value(pair.vmcs12)];
    let soonest = values.into_iter().flatten().min();
    vmcs02.set(Field::PreemptionTimerValue, soonest.unwrap_or_default());
}

/// VM exits of L2 go to L0, with L0's controls. What L1 wants saved is saved. An external interrupt is acknowledged as the
/// hypervisor wants that will get the exit.
fn merge_exit_controls(vmcs02: &mut Vmcs, pair: &Pair) {
    const SAVE: u32 = exit_ctl::SAVE_DEBUG_CONTROLS
        | exit_ctl::SAVE_PAT
        | exit_ctl::SAVE_EFER
        | exit_ctl::SAVE_PREEMPTION_TIMER;
    let (of_01, of_12) = (pair.vmcs01.get32(Field::ExitControls), pair.vmcs12.get32(Field::ExitControls));
    let l1_interrupts = pair.vmcs12.get32(Field::PinControls) & pin::EXTERNAL_INTERRUPT_EXITING != 0;
    let acknowledge = if l1_interrupts { of_12 } else { of_01 } & exit_ctl::ACKNOWLEDGE_INTERRUPT;
    let value = of_01 & !exit_ctl::ACKNOWLEDGE_INTERRUPT | of_12 & SAVE | acknowledge;
    vmcs02.set(Field::ExitControls, value.into());
}

/// MSRs that VM entry loads or leaves alone: VMCS02 always loads them, L1's value where L1 leaves them alone.
fn merge_entry_controls(vmcs02: &mut Vmcs, pair: &Pair) {
    const LOADS: [(u32, &[Field]); 4] = [
        (entry_ctl::LOAD_DEBUG_CONTROLS, &[Field::GuestDebugctl, Field::GuestDr7]),
        (entry_ctl::LOAD_PAT, &[Field::GuestPat]),
        (entry_ctl::LOAD_EFER, &[Field::GuestEfer]),
        (entry_ctl::LOAD_PERF_GLOBAL_CTRL, &[Field::GuestPerfGlobalCtrl]),
    ];
    let (of_01, of_12) = (pair.vmcs01.get32(Field::EntryControls), pair.vmcs12.get32(Field::EntryControls));
    let mode = of_12 & entry_ctl::IA32E_MODE_GUEST;
    let mut value = of_01 & !entry_ctl::IA32E_MODE_GUEST | mode;
    for (control, fields) in LOADS {
        value |= control;
        for &field in fields.iter().filter(|_| of_12 & control == 0) {
            vmcs02.set(field, pair.vmcs01.get(field));
        }
    }
    vmcs02.set(Field::EntryControls, value.into());
    if of_12 & entry_ctl::LOAD_EFER == 0 {
        let paging = pair.vmcs12.get(Field::GuestCr0) & cr0::PG != 0;
        vmcs02.set(Field::GuestEfer, efer_without_load(pair.vmcs01.get(Field::GuestEfer), mode != 0, paging));
    }
}

/// IA32_EFER after a VM entry that does not load it ("Loading Guest Control Registers, Debug Registers, and MSRs"): LMA
/// follows "IA-32e mode guest" all the same, and LME too if there is paging.
fn efer_without_load(value: u64, long_mode: bool, paging: bool) -> u64 {
    let follows = if paging { efer::LMA | efer::LME } else { efer::LMA };
    if long_mode { value | follows } else { value & !follows }
}

fn set_bits(vmcs: &mut Vmcs, field: Field, bits: u32) {
    vmcs.set(field, vmcs.get(field) | u64::from(bits));
}

#[cfg(test)]
mod tests;
