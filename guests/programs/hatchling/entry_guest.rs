//! Checks on the guest-state area but for its segment registers: exit reason 33.

use crate::entry::{AREA, Case, Fails, check_all, clear, nothing, set, wide};
use crate::entry_cases;
use crate::interrupts::{BLOCKED_BY_NMI, BLOCKED_BY_STI, IF};
use crate::modes;
use rt::cpu;
use rt::mem;
use rt::tables::CODE32;
use rt::trap;
use rt::vmx::capability as cap;
use rt::vmx::control::*;
use rt::vmx::exit::event;
use rt::vmx::vm::{CODE32_RIGHTS, Segment};
use rt::vmx::{CR4_VMXE, field as f, insn, vmwrite};

const WILD: u64 = 0x8000_0000_0000;
const TF: u64 = 1 << 8;
const BLOCKED_BY_MOV_SS: u64 = 1 << 1;
const BS: u64 = 1 << 14;

pub fn all() {
    check_all(CONTROL_REGISTERS, Fails::Guest(0));
    check_all(MSRS, Fails::Guest(0));
    check_all(TABLES, Fails::Guest(0));
    check_all(INSTRUCTION_POINTER, Fails::Guest(0));
    check_all(INTERRUPTIBILITY, Fails::Guest(0));
    check_all(PENDING_DEBUG, Fails::Guest(0));
    if cap::misc(cap::MISC_ACTIVITY_HLT) {
        check_all(HALTED, Fails::Guest(0));
    }
    if cap::misc(cap::MISC_ACTIVITY_SHUTDOWN) {
        check_all(SHUTDOWN, Fails::Guest(0));
    }
    check_all(ACTIVITY, Fails::Guest(0));
    check_all(LINK_POINTER, Fails::Guest(4));
    if !cpu::SGX.present() {
        check_all(WITHOUT_SGX, Fails::Guest(0));
    }
    if !cpu::RTM.present() {
        check_all(WITHOUT_RTM, Fails::Guest(0));
    }
}

const WITHOUT_SGX: &[Case] = entry_cases! {
    InterruptibilityEnclave [] nothing => || interruptibility(1 << 4);
};

const WITHOUT_RTM: &[Case] = entry_cases! {
    PendingDebugRtm [] nothing => || vmwrite(f::GUEST_PENDING_DEBUG, 1 << 16 | 1 << 12);
};

const CONTROL_REGISTERS: &[Case] = entry_cases! {
    GuestCr0 [] nothing => || clear(f::GUEST_CR0, cpu::CR0_NE);
    GuestCr0 [] nothing => || set(f::GUEST_CR0, 1 << 32);
    GuestCr0 [] nothing => || clear(f::GUEST_CR0, 1);
    GuestCr0 [] nothing => || clear(f::GUEST_CR0, 1 << 31);
    GuestCr4 [] nothing => || clear(f::GUEST_CR4, CR4_VMXE);
    GuestCr4 [] nothing => || set(f::GUEST_CR4, 1 << 15);
    GuestCr4 [] nothing => || set(f::GUEST_CR4, 1 << 63);
    GuestCr3 [] nothing => || set(f::GUEST_CR3, wide());
    GuestCr3 [] nothing => || set(f::GUEST_CR3, 1 << 62);
    GuestLongModePaging [] nothing => || clear(f::GUEST_CR4, cpu::CR4_PAE);
    GuestDr7 [LOAD_DEBUG_CONTROLS] nothing => || set(f::GUEST_DR7, 1 << 32);
    GuestDebugctl [LOAD_DEBUG_CONTROLS] nothing => || vmwrite(f::GUEST_DEBUGCTL, 1 << 63);
    GuestDebugctl [LOAD_DEBUG_CONTROLS] nothing => || vmwrite(f::GUEST_DEBUGCTL, 1 << 5);
    GuestSysenter [] nothing => || vmwrite(f::GUEST_SYSENTER_ESP, WILD);
    GuestSysenter [] nothing => || vmwrite(f::GUEST_SYSENTER_EIP, WILD);
};

const MSRS: &[Case] = entry_cases! {
    GuestPat [ENTRY_LOAD_PAT] nothing => || vmwrite(f::GUEST_PAT, 2);
    GuestPat [ENTRY_LOAD_PAT] nothing => || vmwrite(f::GUEST_PAT, 3 << 40);
    GuestPat [ENTRY_LOAD_PAT] nothing => || vmwrite(f::GUEST_PAT, 8 << 56);
    GuestPerfGlobalCtrl [ENTRY_LOAD_PERF_GLOBAL_CTRL] nothing => || vmwrite(f::GUEST_PERF_GLOBAL_CTRL, 1 << 63);
    GuestEferReserved [ENTRY_LOAD_EFER] nothing => || set(f::GUEST_EFER, 2);
    GuestEferReserved [ENTRY_LOAD_EFER] nothing => || set(f::GUEST_EFER, 1 << 63);
    GuestEferLma [ENTRY_LOAD_EFER] nothing => || clear(f::GUEST_EFER, 1 << 10);
    GuestEferLme [ENTRY_LOAD_EFER] nothing => || clear(f::GUEST_EFER, 1 << 8);
    GuestEferLma [ENTRY_LOAD_EFER] modes::protected_mode => || set(f::GUEST_EFER, 1 << 10);
    GuestEferLme [ENTRY_LOAD_EFER] modes::protected_mode => || set(f::GUEST_EFER, 1 << 8);
    GuestPcidWithoutLongMode [] modes::protected_mode => || set(f::GUEST_CR4, cpu::CR4_PCIDE);
};

const TABLES: &[Case] = entry_cases! {
    GuestTableBase [] nothing => || vmwrite(f::GUEST_GDTR_BASE, WILD);
    GuestTableBase [] nothing => || vmwrite(f::GUEST_IDTR_BASE, WILD);
    GuestTableLimit [] nothing => || vmwrite(f::GUEST_GDTR_LIMIT, 0x1_0000);
    GuestTableLimit [] nothing => || vmwrite(f::GUEST_IDTR_LIMIT, 0x8000_ffff);
};

const INSTRUCTION_POINTER: &[Case] = entry_cases! {
    GuestRipCanonical [] nothing => || vmwrite(f::GUEST_RIP, 1 << 63);
    GuestRipHigh [] modes::protected_mode => || set(f::GUEST_RIP, 1 << 32);
    GuestRipHigh [] compatibility_mode => || set(f::GUEST_RIP, 1 << 63);
    GuestRflagsReserved [] nothing => || set(f::GUEST_RFLAGS, 1 << 22);
    GuestRflagsReserved [] nothing => || set(f::GUEST_RFLAGS, 1 << 63);
    GuestRflagsReserved [] nothing => || set(f::GUEST_RFLAGS, 1 << 15);
    GuestRflagsReserved [] nothing => || set(f::GUEST_RFLAGS, 1 << 5);
    GuestRflagsReserved [] nothing => || set(f::GUEST_RFLAGS, 1 << 3);
    GuestRflagsReserved [] nothing => || clear(f::GUEST_RFLAGS, 2);
    GuestRflagsVm [] nothing => || set(f::GUEST_RFLAGS, 1 << 17);
    GuestRflagsIf [] external_interrupt => || clear(f::GUEST_RFLAGS, IF);
};

fn compatibility_mode() {
    Segment::Cs.write(CODE32, 0, 0xffff_ffff, CODE32_RIGHTS);
}

fn inject(information: u32) {
    vmwrite(f::ENTRY_INTERRUPTION, (information | event::VALID).into());
    rt::vmx::handler::install();
}

fn external_interrupt() {
    set(f::GUEST_RFLAGS, IF);
    inject(event::EXTERNAL_INTERRUPT | 0x60);
}

fn non_maskable() {
    inject(event::NMI | 2);
}

fn interrupts_open() {
    set(f::GUEST_RFLAGS, IF);
}

fn interruptibility(state: u64) {
    vmwrite(f::GUEST_INTERRUPTIBILITY, state);
}

const INTERRUPTIBILITY: &[Case] = entry_cases! {
    InterruptibilityReserved [] nothing => || interruptibility(1 << 5);
    InterruptibilityReserved [] nothing => || interruptibility(1 << 31);
    InterruptibilityStiAndMovSs [] interrupts_open => || interruptibility(BLOCKED_BY_STI | BLOCKED_BY_MOV_SS);
    InterruptibilityStiWithoutIf [] nothing => || interruptibility(BLOCKED_BY_STI);
    InterruptibilityExternal [] external_interrupt => || interruptibility(BLOCKED_BY_STI);
    InterruptibilityExternal [] external_interrupt => || interruptibility(BLOCKED_BY_MOV_SS);
    InterruptibilityNmiMovSs [] non_maskable => || interruptibility(BLOCKED_BY_MOV_SS);
    InterruptibilitySmi [] nothing => || interruptibility(1 << 2);
    InterruptibilityVirtualNmi [NMI_EXITING, VIRTUAL_NMIS] non_maskable => || interruptibility(BLOCKED_BY_NMI);
};

/// A single step is pending behind STI.
fn stepping() {
    vmwrite(f::GUEST_RFLAGS, 2 | IF | TF);
    interruptibility(BLOCKED_BY_STI);
    vmwrite(f::GUEST_PENDING_DEBUG, BS);
}

fn blocked() {
    vmwrite(f::GUEST_RFLAGS, 2 | IF);
    interruptibility(BLOCKED_BY_STI);
}

const PENDING_DEBUG: &[Case] = entry_cases! {
    PendingDebugReserved [] nothing => || vmwrite(f::GUEST_PENDING_DEBUG, 1 << 4);
    PendingDebugReserved [] nothing => || vmwrite(f::GUEST_PENDING_DEBUG, 1 << 13);
    PendingDebugReserved [] nothing => || vmwrite(f::GUEST_PENDING_DEBUG, 1 << 15);
    PendingDebugReserved [] nothing => || vmwrite(f::GUEST_PENDING_DEBUG, 1 << 63);
    PendingDebugStepMissing [] stepping => || vmwrite(f::GUEST_PENDING_DEBUG, 0);
    PendingDebugStepUnexpected [] blocked => || vmwrite(f::GUEST_PENDING_DEBUG, BS);
    PendingDebugStepUnexpected [] || interruptibility(BLOCKED_BY_MOV_SS) => || vmwrite(f::GUEST_PENDING_DEBUG, BS);
};

fn halted() {
    vmwrite(f::GUEST_ACTIVITY, 1);
}

const HALTED: &[Case] = entry_cases! {
    ActivityHltUser [] halted => || {
        Segment::Cs.write(rt::tables::USER_CODE64, 0, 0xffff_ffff, 0xa0fb);
        Segment::Ss.write(rt::tables::USER_DATA, 0, 0xffff_ffff, 0xc0f3);
    };
    ActivityBlocked [] halted => || {
        interrupts_open();
        interruptibility(BLOCKED_BY_STI);
    };
    ActivityBlocked [] halted => || interruptibility(BLOCKED_BY_MOV_SS);
    ActivityInjection [] || {
        halted();
        inject(event::HARDWARE_EXCEPTION | u32::from(trap::DB));
    } => || inject(event::HARDWARE_EXCEPTION | u32::from(trap::UD));
    ActivityInjection [] || {
        halted();
        external_interrupt();
    } => || {
        inject(event::SOFTWARE_INTERRUPT | 0x60);
        vmwrite(f::ENTRY_INSTRUCTION_LENGTH, 2);
    };
    PendingDebugStepMissing [] || {
        halted();
        vmwrite(f::GUEST_RFLAGS, 2 | TF);
        vmwrite(f::GUEST_PENDING_DEBUG, BS);
    } => || vmwrite(f::GUEST_PENDING_DEBUG, 0);
};

fn shut_down() {
    vmwrite(f::GUEST_ACTIVITY, 2);
}

const SHUTDOWN: &[Case] = entry_cases! {
    ActivityBlocked [] shut_down => || interruptibility(BLOCKED_BY_MOV_SS);
    ActivityInjection [] || {
        shut_down();
        non_maskable();
    } => external_interrupt;
    ActivityInjection [] || {
        shut_down();
        non_maskable();
    } => || inject(event::HARDWARE_EXCEPTION | u32::from(trap::DB));
};

const ACTIVITY: &[Case] = entry_cases! {
    ActivityState [] nothing => || vmwrite(f::GUEST_ACTIVITY, 4);
    ActivityState [] nothing => || vmwrite(f::GUEST_ACTIVITY, 1 << 31);
    ActivityInjection [] non_maskable => || vmwrite(f::GUEST_ACTIVITY, 3);
};

/// A region that may be linked: with the shadow indicator if "VMCS shadowing" is 1.
fn linked_shadow() {
    mem::write(AREA, cap::revision() | 1 << 31);
    vmwrite(f::VMCS_LINK_POINTER, AREA);
    vmwrite(f::VMREAD_BITMAP, AREA + 0x1000);
    vmwrite(f::VMWRITE_BITMAP, AREA + 0x1000);
}

fn linked() {
    mem::write(AREA, cap::revision());
    vmwrite(f::VMCS_LINK_POINTER, AREA);
}

const LINK_POINTER: &[Case] = entry_cases! {
    LinkPointerAddress [] linked => || vmwrite(f::VMCS_LINK_POINTER, AREA + 8);
    LinkPointerAddress [] linked => || vmwrite(f::VMCS_LINK_POINTER, AREA | wide());
    LinkPointerAddress [] linked => || vmwrite(f::VMCS_LINK_POINTER, 0xffff_ffff);
    LinkPointerRevision [] linked => || mem::write(AREA, cap::revision() ^ 1);
    LinkPointerShadow [] linked => || mem::write(AREA, cap::revision() | 1 << 31);
    LinkPointerShadow [VMCS_SHADOWING] linked_shadow => || mem::write(AREA, cap::revision());
    LinkPointerCurrent [] linked => || vmwrite(f::VMCS_LINK_POINTER, insn::vmptrst());
};
