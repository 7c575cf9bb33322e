//! The I/O APIC: 24 interrupt inputs, each with an entry that says what message it sends.
//!
//! Registers as of the 82093AA, with version 0x20's EOI register. What goes out is a [`Message`]; the owner passes
//! `send`, which tells whether an APIC took it (a level-triggered input waits for its EOI only then).
//!
//! Must not know: vCPUs, the 8259s.

use super::lapic::{DeliveryMode, Destination, Message};

/// Where the registers are.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// How much of the address space they take.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Inputs.
pub const IOAPIC_PINS: usize = 24;

const VERSION: u32 = 0x20 | (IOAPIC_PINS as u32 - 1) << 16;

const REDIR_REMOTE_IRR: u64 = 1 << 14;
const REDIR_LEVEL: u64 = 1 << 15;
const REDIR_MASKED: u64 = 1 << 16;
/// Vector, modes, polarity, trigger, mask and destination; delivery status and remote IRR are the chip's.
const REDIR_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where messages go; true if an APIC took it.
pub type Deliver<'a> = &'a mut dyn FnMut(&Message) -> bool;

/// The chip.
#[derive(Debug)]
pub struct IoApic {
    id: u8,
    select: u8,
    redirection: [u64; IOAPIC_PINS],
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { id: 0, select: 0, redirection: [REDIR_MASKED; IOAPIC_PINS], lines: 0 }
    }
}

impl IoApic {
    /// Back to the state after reset; the inputs stay as the devices drive them.
    pub fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::default() };
    }

    /// Sets the level of input `pin`. Polarity is ignored: a high level is an active input. An edge on a masked
    /// input is lost, as the datasheet has it.
    pub fn set_pin(&mut self, pin: usize, level: bool, send: Deliver) {
        let Some(&entry) = self.redirection.get(pin) else { return };
        let was = self.lines & (1 << pin) != 0;
        if level {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
        }
        if level && (entry & REDIR_LEVEL != 0 || !was) {
            self.service(pin, send);
        }
    }

    /// Sends the message of an active input, unless it is masked or already sent and not yet ended.
    fn service(&mut self, pin: usize, send: Deliver) {
        let entry = &mut self.redirection[pin];
        let level_triggered = *entry & REDIR_LEVEL != 0;
        if *entry & REDIR_MASKED != 0 || (level_triggered && *entry & REDIR_REMOTE_IRR != 0) {
            return;
        }
        let Some(mode) = DeliveryMode::from_bits((*entry >> 8) as u32) else { return };
        let vectored = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let message = Message {
            destination: Destination::narrow((*entry >> 56) as u8, *entry & 1 << 11 != 0),
            mode,
            vector: *entry as u8,
            level_triggered: level_triggered && vectored,
        };
        if send(&message) && message.level_triggered {
            *entry |= REDIR_REMOTE_IRR;
        }
    }

    /// An EOI for `vector` arrives, from a local APIC or through the EOI register.
    pub fn end_of_interrupt(&mut self, vector: u8, send: Deliver) {
        for pin in 0..IOAPIC_PINS {
            let entry = &mut self.redirection[pin];
            if *entry as u8 == vector && *entry & REDIR_REMOTE_IRR != 0 {
                *entry &= !REDIR_REMOTE_IRR;
                if self.lines & (1 << pin) != 0 {
                    self.service(pin, send);
                }
            }
        }
    }

    /// A load from the register page. Registers are 32 bits wide.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            0x00 => u32::from(self.select),
            0x10 => self.indirect(),
            _ => u32::MAX,
        };
        let bytes = value.to_le_bytes();
        let start = (offset & 3) as usize;
        for (at, byte) in (start..).zip(data) {
            *byte = bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// A store to the register page; only aligned 32-bit stores are defined, but byte stores to the register
    /// select and EOI registers are common and work.
    pub fn write(&mut self, offset: u64, data: &[u8], send: Deliver) {
        match (offset, data) {
            (0x00, [value, ..]) => self.select = *value,
            (0x10, &[a, b, c, d]) => self.set_indirect(u32::from_le_bytes([a, b, c, d]), send),
            (0x40, [value, ..]) => self.end_of_interrupt(*value, send),
            _ => {}
        }
    }

    /// The redirection entry that the register select points to, and whether to its upper half.
    fn selected(&self) -> Option<(usize, bool)> {
        let index = usize::from(self.select.checked_sub(0x10)?);
        (index / 2 < IOAPIC_PINS).then_some((index / 2, index & 1 != 0))
    }

    fn indirect(&self) -> u32 {
        match self.select {
            // The arbitration ID is loaded from the ID.
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            _ => match self.selected() {
                Some((pin, true)) => (self.redirection[pin] >> 32) as u32,
                Some((pin, false)) => self.redirection[pin] as u32,
                None => u32::MAX,
            },
        }
    }

    fn set_indirect(&mut self, value: u32, send: Deliver) {
        if self.select == 0 {
            self.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let Some((pin, upper)) = self.selected() else { return };
        let old = self.redirection[pin];
        let written = if upper {
            u64::from(value) << 32 | old & 0xffff_ffff
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        let mut new = written & REDIR_WRITABLE;
        // Remote IRR means nothing for an edge-triggered input: the switch clears it.
        if new & REDIR_LEVEL != 0 {
            new |= old & REDIR_REMOTE_IRR;
        }
        self.redirection[pin] = new;
        if new & REDIR_LEVEL != 0 && self.lines & (1 << pin) != 0 {
            self.service(pin, send);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(chip: &mut IoApic, register: u8, value: u32, send: Deliver) {
        chip.write(0, &u32::from(register).to_le_bytes(), send);
        chip.write(0x10, &value.to_le_bytes(), send);
    }

    fn get(chip: &mut IoApic, register: u8) -> u32 {
        chip.write(0, &[register, 0, 0, 0], &mut |_| true);
        let mut data = [0; 4];
        chip.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identification() {
        let mut chip = IoApic::default();
        assert_eq!(get(&mut chip, 1), 0x0017_0020);
        set(&mut chip, 0, 0x0500_0000, &mut |_| true);
        assert_eq!(get(&mut chip, 0), 0x0500_0000);
        assert_eq!(get(&mut chip, 2), 0x0500_0000);
        assert_eq!(get(&mut chip, 0x10), 0x0001_0000, "masked after reset");
        assert_eq!(get(&mut chip, 0x40), u32::MAX);
    }

    #[test]
    fn edge_is_sent_once_and_lost_while_masked() {
        let mut chip = IoApic::default();
        let mut sent = Vec::new();
        let mut send = |m: &Message| {
            sent.push(*m);
            true
        };
        chip.set_pin(4, true, &mut send);
        set(&mut chip, 0x19, 0x0300_0000, &mut send);
        set(&mut chip, 0x18, 0x0000_0824, &mut send);
        chip.set_pin(4, true, &mut send);
        chip.set_pin(4, false, &mut send);
        chip.set_pin(4, true, &mut send);
        chip.set_pin(4, true, &mut send);
        let expected = Message {
            destination: Destination::Logical(3),
            mode: DeliveryMode::Fixed,
            vector: 0x24,
            level_triggered: false,
        };
        assert_eq!(sent, [expected]);
    }

    #[test]
    fn level_waits_for_eoi_and_repeats_while_high() {
        let mut chip = IoApic::default();
        let mut count = 0;
        let mut send = |_: &Message| {
            count += 1;
            true
        };
        chip.set_pin(17, true, &mut send);
        set(&mut chip, 0x32, 0x8041, &mut send);
        chip.set_pin(17, false, &mut send);
        chip.set_pin(17, true, &mut send);
        chip.end_of_interrupt(0x42, &mut send);
        chip.end_of_interrupt(0x41, &mut send);
        chip.set_pin(17, false, &mut send);
        chip.write(0x40, &0x41u32.to_le_bytes(), &mut send);
        assert_eq!(count, 2, "on unmasking, and again at the EOI with the input still high");
        assert_eq!(get(&mut chip, 0x32), 0x8041, "the EOI register cleared remote IRR");
    }

    #[test]
    fn remote_irr_is_read_only_and_cleared_by_edge_mode() {
        let mut chip = IoApic::default();
        let mut send = |_: &Message| true;
        set(&mut chip, 0x32, 0x8041, &mut send);
        chip.set_pin(17, true, &mut send);
        assert_eq!(get(&mut chip, 0x32), 0xc041);
        set(&mut chip, 0x32, 0x18041, &mut send);
        assert_eq!(get(&mut chip, 0x32), 0x1c041);
        set(&mut chip, 0x32, 0x10041, &mut send);
        set(&mut chip, 0x32, 0x18041, &mut send);
        assert_eq!(get(&mut chip, 0x32), 0x18041);
        set(&mut chip, 0x32, 0x15041, &mut send);
        assert_eq!(get(&mut chip, 0x32), 0x10041, "delivery status and remote IRR cannot be written");
    }

    #[test]
    fn refused_level_message_leaves_remote_irr_clear() {
        let mut chip = IoApic::default();
        set(&mut chip, 0x32, 0x8041, &mut |_| false);
        chip.set_pin(17, true, &mut |_| false);
        assert_eq!(get(&mut chip, 0x32), 0x8041);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let mut chip = IoApic::default();
        for offset in [0, 1, 3, 0xf, 0x10, 0x11, 0x12, 0x13, 0x40, 0x41, 0xfff] {
            for len in [1, 2, 4, 8] {
                let mut data = [0x5a; 8];
                chip.write(offset, &data[..len], &mut |_| true);
                chip.read(offset, &mut data[..len]);
            }
        }
        chip.set_pin(24, true, &mut |_| panic!("there is no such input"));
    }
}
