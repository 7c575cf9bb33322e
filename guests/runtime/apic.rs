//! The local APIC, through memory (xAPIC) or MSRs (x2APIC), whichever mode it is in.

use crate::cpu::{MSR_APIC_BASE, rdmsr, wrmsr};
use crate::mem;

/// Where the local APIC's page lies unless moved.
pub const BASE: u64 = 0xfee0_0000;
pub const ENABLE: u64 = 1 << 11;
pub const X2APIC_ENABLE: u64 = 1 << 10;
pub const BSP: u64 = 1 << 8;

/// Register offsets in the xAPIC page; the x2APIC MSR is 0x800 + offset / 16.
pub const ID: u32 = 0x20;
pub const VERSION: u32 = 0x30;
pub const TPR: u32 = 0x80;
pub const PPR: u32 = 0xa0;
pub const EOI: u32 = 0xb0;
pub const LDR: u32 = 0xd0;
pub const DFR: u32 = 0xe0;
pub const SPURIOUS: u32 = 0xf0;
pub const ISR: u32 = 0x100;
pub const IRR: u32 = 0x200;
pub const ERROR_STATUS: u32 = 0x280;
pub const ICR: u32 = 0x300;
pub const ICR_HIGH: u32 = 0x310;
pub const LVT_TIMER: u32 = 0x320;
pub const LVT_LINT0: u32 = 0x350;
pub const LVT_LINT1: u32 = 0x360;
pub const LVT_ERROR: u32 = 0x370;
pub const TIMER_INITIAL: u32 = 0x380;
pub const TIMER_CURRENT: u32 = 0x390;
pub const TIMER_DIVIDE: u32 = 0x3e0;

/// ICR and LVT fields.
pub const FIXED: u32 = 0 << 8;
pub const NMI: u32 = 4 << 8;
pub const INIT: u32 = 5 << 8;
pub const STARTUP: u32 = 6 << 8;
pub const EXTINT: u32 = 7 << 8;
pub const LOGICAL: u32 = 1 << 11;
pub const PENDING: u32 = 1 << 12;
pub const ASSERT: u32 = 1 << 14;
pub const MASKED: u32 = 1 << 16;
pub const PERIODIC: u32 = 1 << 17;
pub const TSC_DEADLINE: u32 = 2 << 17;
pub const TO_SELF: u32 = 1 << 18;
pub const TO_ALL: u32 = 2 << 18;
pub const TO_OTHERS: u32 = 3 << 18;

/// The vector that spurious interrupts get.
pub const SPURIOUS_VECTOR: u8 = 0xff;

pub fn is_x2apic() -> bool {
    rdmsr(MSR_APIC_BASE) & X2APIC_ENABLE != 0
}

/// The MSR of a register in x2APIC mode.
pub const fn msr(register: u32) -> u32 {
    0x800 + register / 16
}

pub fn read(register: u32) -> u32 {
    if is_x2apic() { rdmsr(msr(register)) as u32 } else { mem::read(BASE + u64::from(register)) }
}

pub fn write(register: u32, value: u32) {
    if is_x2apic() {
        wrmsr(msr(register), value.into())
    } else {
        mem::write(BASE + u64::from(register), value)
    }
}

/// Switches the APIC on in software, with every local source masked.
pub fn enable() {
    for lvt in [LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        write(lvt, MASKED);
    }
    write(TPR, 0);
    write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
}

/// This CPU's APIC ID.
pub fn id() -> u32 {
    let id = read(ID);
    if is_x2apic() { id } else { id >> 24 }
}

pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Sends an interrupt command to an APIC ID (which shorthands ignore).
pub fn send(destination: u32, command: u32) {
    if is_x2apic() {
        wrmsr(msr(ICR), u64::from(destination) << 32 | u64::from(command));
        return;
    }
    while read(ICR) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(ICR_HIGH, destination << 24);
    write(ICR, command);
    while read(ICR) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Sends a vector to this CPU.
pub fn send_self(vector: u8) {
    send(0, TO_SELF | ASSERT | FIXED | u32::from(vector));
}

/// Whether a vector is set in ISR or IRR (named by its first register).
pub fn bit(registers: u32, vector: u8) -> bool {
    read(registers + u32::from(vector / 32) * 16) >> (vector % 32) & 1 != 0
}
