//! The 8259 pair and the 8254 timer, as far as cases need them, and the first I/O APIC.

use crate::cpu::{inb, outb};
use crate::mem;

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;

/// Initialises both PICs at vectors `base` and `base + 8`, everything masked.
pub fn init(base: u8) {
    for (port, vectors, cascade) in [(MASTER, base, 4), (SLAVE, base + 8, 2)] {
        outb(port, 0x11);
        outb(port + 1, vectors);
        outb(port + 1, cascade);
        outb(port + 1, 1);
    }
    set_mask(0xffff);
}

/// Sets which of the 16 lines are masked.
pub fn set_mask(mask: u16) {
    outb(MASTER + 1, mask as u8);
    outb(SLAVE + 1, (mask >> 8) as u8);
}

/// Non-specific end of interrupt for a master line.
pub fn end_of_interrupt() {
    outb(MASTER, 0x20);
}

/// In-service register of the master.
pub fn in_service() -> u8 {
    outb(MASTER, 0x0b);
    inb(MASTER)
}

/// Ticks a second of the 8254.
pub const PIT_HZ: u64 = 1_193_182;

/// Programs 8254 counter 0: mode 0 (one interrupt after `count` ticks) or mode 2 (one each `count` ticks).
pub fn start_pit(mode: u8, count: u16) {
    outb(0x43, 0x30 | mode << 1);
    outb(0x40, count as u8);
    outb(0x40, (count >> 8) as u8);
}

/// The latched count of counter 0.
pub fn pit_count() -> u16 {
    outb(0x43, 0);
    let low = inb(0x40);
    u16::from_le_bytes([low, inb(0x40)])
}

const IOAPIC: u64 = 0xfec0_0000;

/// Reads an I/O APIC register.
pub fn ioapic_read(register: u32) -> u32 {
    mem::write(IOAPIC, register);
    mem::read(IOAPIC + 0x10)
}

/// Writes an I/O APIC register.
pub fn ioapic_write(register: u32, value: u32) {
    mem::write(IOAPIC, register);
    mem::write(IOAPIC + 0x10, value);
}

/// Routes an I/O APIC pin to an APIC ID.
pub fn ioapic_route(pin: u32, low: u32, destination: u32) {
    ioapic_write(0x11 + pin * 2, destination << 24);
    ioapic_write(0x10 + pin * 2, low);
}
