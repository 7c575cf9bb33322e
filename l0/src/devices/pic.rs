//! The pair of 8259A interrupt controllers, with the edge/level control registers of PC chipsets.
//!
//! Ports 0x20/0x21 (master), 0xa0/0xa1 (slave, cascaded on the master's input 2), 0x4d0/0x4d1 (ELCR).
//!
//! The pair only computes: whoever changes an input or a register looks at [`PicPair::intr`] afterwards and passes
//! it on. An edge-triggered request stays latched until it is acknowledged, as if the input were held high.
//!
//! Must not know: APICs, processors.
//!
//! Intel 8259A datasheet (231468).

/// Ports of the master; two of them.
pub const MASTER_PORT: u64 = 0x20;
/// Ports of the slave; two of them.
pub const SLAVE_PORT: u64 = 0xa0;
/// ELCR ports, one for each controller.
pub const ELCR_PORT: u64 = 0x4d0;

const CASCADE: u8 = 2;

/// Where the controller is in its initialization sequence: which word the next write to the odd port is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Expects {
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Select {
    Irr,
    Isr,
}

/// One 8259A.
#[derive(Debug)]
struct Pic {
    irr: u8,
    isr: u8,
    imr: u8,
    lines: u8,
    elcr: u8,
    /// Inputs of the ELCR that the chipset lets software make level-triggered.
    elcr_writable: u8,
    vector_base: u8,
    /// The input with the highest priority.
    first: u8,
    expects: Expects,
    single: bool,
    wants_icw4: bool,
    all_level: bool,
    select: Select,
    poll: bool,
    special_mask: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    is_master: bool,
}

impl Pic {
    fn new(is_master: bool) -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            elcr: 0,
            // Timer, keyboard, cascade, RTC and coprocessor stay edge-triggered.
            elcr_writable: if is_master { 0xf8 } else { 0xde },
            vector_base: 0,
            first: 0,
            expects: Expects::Mask,
            single: false,
            wants_icw4: false,
            all_level: false,
            select: Select::Irr,
            poll: false,
            special_mask: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            is_master,
        }
    }

    fn is_level(&self, mask: u8) -> bool {
        self.all_level || self.elcr & mask != 0
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let mask = 1 << (input & 7);
        let was = self.lines & mask != 0;
        if level {
            self.lines |= mask;
        } else {
            self.lines &= !mask;
        }
        if self.is_level(mask) {
            self.irr = if level { self.irr | mask } else { self.irr & !mask };
        } else if level && !was {
            self.irr |= mask;
        }
    }

    /// The member of `set` with the highest priority, as (distance from the first, input).
    fn highest(&self, set: u8) -> Option<(u8, u8)> {
        let rotated = set.rotate_right(self.first.into());
        (rotated != 0).then(|| {
            let distance = rotated.trailing_zeros() as u8;
            (distance, (distance + self.first) & 7)
        })
    }

    /// The input the controller would interrupt for now.
    fn request(&self) -> Option<u8> {
        let (distance, input) = self.highest(self.irr & !self.imr)?;
        let mut blocking = self.isr;
        // In special mask mode a masked level in service blocks nobody.
        if self.special_mask {
            blocking &= !self.imr;
        }
        if self.special_fully_nested && self.is_master {
            blocking &= !(1 << CASCADE);
        }
        self.highest(blocking).is_none_or(|(served, _)| distance < served).then_some(input)
    }

    /// The end of the interrupt acknowledge sequence for `input`.
    fn acknowledge(&mut self, input: u8) {
        let mask = 1 << input;
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.first = (input + 1) & 7;
            }
        } else {
            self.isr |= mask;
        }
        if !self.is_level(mask) {
            self.irr &= !mask;
        }
    }

    fn read(&mut self, odd: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.request() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 7,
            };
        }
        match (odd, self.select) {
            (true, _) => self.imr,
            (false, Select::Irr) => self.irr,
            (false, Select::Isr) => self.isr,
        }
    }

    fn write(&mut self, odd: bool, value: u8) {
        if odd {
            self.write_odd(value);
        } else if value & 0x10 != 0 {
            self.write_icw1(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_icw1(&mut self, value: u8) {
        let keep = Self { lines: self.lines, elcr: self.elcr, ..Self::new(self.is_master) };
        *self = Self {
            imr: 0,
            single: value & 2 != 0,
            all_level: value & 8 != 0,
            wants_icw4: value & 1 != 0,
            expects: Expects::Icw2,
            ..keep
        };
        // The edge detectors are cleared: only level-triggered inputs request at once.
        let level = if self.all_level { 0xff } else { self.elcr };
        self.irr = self.lines & level;
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            // Rotate in automatic EOI mode: clear, set.
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // Non-specific EOI, without and with rotation. In special mask mode masked levels do not count.
            command @ (1 | 5) => {
                let served = if self.special_mask { self.isr & !self.imr } else { self.isr };
                if let Some((_, input)) = self.highest(served) {
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.first = (input + 1) & 7;
                    }
                }
            }
            // Specific EOI, without and with rotation.
            3 => self.isr &= !(1 << named),
            7 => {
                self.isr &= !(1 << named);
                self.first = (named + 1) & 7;
            }
            // Set priority: the named level becomes the lowest.
            6 => self.first = (named + 1) & 7,
            // No operation.
            _ => {}
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        self.poll = value & 4 != 0;
        match value & 3 {
            2 => self.select = Select::Irr,
            3 => self.select = Select::Isr,
            _ => {}
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_odd(&mut self, value: u8) {
        match self.expects {
            Expects::Mask => self.imr = value,
            Expects::Icw2 => {
                self.vector_base = value & 0xf8;
                self.expects = match (self.single, self.wants_icw4) {
                    (false, _) => Expects::Icw3,
                    (true, true) => Expects::Icw4,
                    (true, false) => Expects::Mask,
                };
            }
            // The cascade is wired as on every PC, whatever ICW3 says.
            Expects::Icw3 => self.expects = if self.wants_icw4 { Expects::Icw4 } else { Expects::Mask },
            Expects::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.expects = Expects::Mask;
            }
        }
    }

    fn write_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_writable;
        // What is now level-triggered follows its line; what is now edge-triggered keeps what it has.
        self.irr = (self.irr & !self.elcr) | (self.lines & self.elcr);
    }
}

/// Master and slave.
#[derive(Debug)]
pub struct PicPair {
    master: Pic,
    slave: Pic,
}

impl Default for PicPair {
    fn default() -> Self {
        Self { master: Pic::new(true), slave: Pic::new(false) }
    }
}

impl PicPair {
    /// Back to the state after power-up; the inputs stay as the devices drive them.
    pub fn reset(&mut self) {
        let lines = (self.master.lines, self.slave.lines);
        *self = Self::default();
        (self.master.lines, self.slave.lines) = lines;
    }

    /// Sets the level of ISA interrupt `irq`; input 2 is the cascade's and not a device's.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => return,
            0..=7 => self.master.set_line(irq, level),
            8..=15 => self.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.cascade();
    }

    /// The master's input 2 follows the slave's output.
    fn cascade(&mut self) {
        let request = self.slave.request().is_some();
        let mask = 1 << CASCADE;
        self.master.lines = self.master.lines & !mask | if request { mask } else { 0 };
        self.master.irr = self.master.irr & !mask | if request { mask } else { 0 };
    }

    /// The master's INTR output.
    pub fn intr(&self) -> bool {
        self.master.request().is_some()
    }

    /// The processor's acknowledge cycles: the vector. If the request went away since INTR, the spurious one
    /// (input 7 of the master or of the slave), with nothing in service for it.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.request() else { return self.master.vector_base | 7 };
        self.master.acknowledge(input);
        if input != CASCADE {
            return self.master.vector_base | input;
        }
        let slave_input = self.slave.request();
        if let Some(input) = slave_input {
            self.slave.acknowledge(input);
        }
        self.cascade();
        self.slave.vector_base | slave_input.unwrap_or(7)
    }

    /// Port of the master (0 and 1) or of the slave (2 and 3).
    pub fn read(&mut self, register: u64) -> u8 {
        let value = match register {
            0 | 1 => self.master.read(register == 1),
            2 | 3 => self.slave.read(register == 3),
            _ => return 0xff,
        };
        self.cascade();
        value
    }

    /// Port of the master (0 and 1) or of the slave (2 and 3).
    pub fn write(&mut self, register: u64, value: u8) {
        match register {
            0 | 1 => self.master.write(register == 1, value),
            2 | 3 => self.slave.write(register == 3, value),
            _ => return,
        }
        self.cascade();
    }

    /// ELCR of the master (0) or of the slave (1).
    pub fn read_elcr(&self, register: u64) -> u8 {
        match register {
            0 => self.master.elcr,
            1 => self.slave.elcr,
            _ => 0xff,
        }
    }

    /// ELCR of the master (0) or of the slave (1).
    pub fn write_elcr(&mut self, register: u64, value: u8) {
        match register {
            0 => self.master.write_elcr(value),
            1 => self.slave.write_elcr(value),
            _ => return,
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialized as Linux does it: vectors 0x30 and 0x38, 8086 mode, nothing masked.
    fn pair() -> PicPair {
        let mut pic = PicPair::default();
        for (base, icw2, icw3) in [(0, 0x30, 4), (2, 0x38, 2)] {
            pic.write(base, 0x11);
            pic.write(base + 1, icw2);
            pic.write(base + 1, icw3);
            pic.write(base + 1, 1);
            pic.write(base + 1, 0);
        }
        pic
    }

    fn pulse(pic: &mut PicPair, irq: u8) {
        pic.set_irq(irq, true);
        pic.set_irq(irq, false);
    }

    #[test]
    fn lower_input_has_priority_and_blocks_the_higher() {
        let mut pic = pair();
        pulse(&mut pic, 4);
        pulse(&mut pic, 1);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x31);
        assert!(!pic.intr(), "4 must wait for the EOI of 1");
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x30, "0 nests into 1");
        pic.write(0, 0x20);
        assert!(!pic.intr());
        pic.write(0, 0x20);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0, 0x0b);
        assert_eq!(pic.read(0), 0x10, "ISR shows 4");
        pic.write(0, 0x64);
        assert_eq!(pic.read(0), 0, "specific EOI ends 4");
    }

    #[test]
    fn slave_goes_through_the_cascade() {
        let mut pic = pair();
        pulse(&mut pic, 14);
        assert_eq!(pic.acknowledge(), 0x3e);
        pulse(&mut pic, 9);
        assert!(!pic.intr(), "without special fully nested mode the master blocks its input 2");
        pic.write(2, 0x20);
        assert!(!pic.intr());
        pic.write(0, 0x20);
        assert_eq!(pic.acknowledge(), 0x39);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_nest() {
        let mut pic = pair();
        pic.write(0, 0x11);
        for word in [0x30, 4, 0x11, 0] {
            pic.write(1, word);
        }
        pulse(&mut pic, 14);
        assert_eq!(pic.acknowledge(), 0x3e);
        pulse(&mut pic, 9);
        assert!(pic.intr());
        assert_eq!(pic.acknowledge(), 0x39);
    }

    #[test]
    fn level_input_requests_again_until_it_falls() {
        let mut pic = pair();
        pic.write_elcr(1, 0xff);
        assert_eq!(pic.read_elcr(1), 0xde, "8 and 13 stay edge-triggered");
        pic.set_irq(11, true);
        assert_eq!(pic.acknowledge(), 0x3b);
        pic.write(2, 0x20);
        pic.write(0, 0x20);
        assert!(pic.intr(), "the line is still high");
        pic.set_irq(11, false);
        assert!(!pic.intr());
    }

    #[test]
    fn edge_input_needs_a_new_edge() {
        let mut pic = pair();
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0, 0x20);
        pic.set_irq(4, true);
        assert!(!pic.intr());
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert!(pic.intr());
    }

    #[test]
    fn masked_request_is_remembered() {
        let mut pic = pair();
        pic.write(1, 0x10);
        pulse(&mut pic, 4);
        assert!(!pic.intr());
        pic.write(0, 0x0a);
        assert_eq!(pic.read(0), 0x10);
        pic.write(1, 0);
        assert!(pic.intr());
    }

    #[test]
    fn acknowledge_without_request_is_spurious() {
        let mut pic = pair();
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0, 0x0b);
        assert_eq!(pic.read(0), 0, "nothing is in service for it");
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service_and_may_rotate() {
        let mut pic = pair();
        pic.write(0, 0x11);
        for word in [0x30, 4, 3, 0] {
            pic.write(1, word);
        }
        pic.write(0, 0x80);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(0, 0x0b);
        assert_eq!(pic.read(0), 0);
        pulse(&mut pic, 3);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34, "after the rotation 4 is the highest");
    }

    #[test]
    fn rotation_and_set_priority() {
        let mut pic = pair();
        pic.write(0, 0xc4);
        pulse(&mut pic, 4);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35, "4 is the lowest now");
        pic.write(0, 0xa0);
        pulse(&mut pic, 5);
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36, "EOI with rotation made 5 the lowest");
    }

    #[test]
    fn special_mask_mode_lets_lower_levels_through() {
        let mut pic = pair();
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        pulse(&mut pic, 6);
        assert!(!pic.intr());
        pic.write(1, 0x02);
        pic.write(0, 0x68);
        assert_eq!(pic.acknowledge(), 0x36);
        pic.write(0, 0x48);
        assert!(!pic.intr());
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = pair();
        pic.write(0, 0x0c);
        assert_eq!(pic.read(0) & 0x80, 0);
        pulse(&mut pic, 3);
        pic.write(0, 0x0c);
        assert_eq!(pic.read(0), 0x83);
        pic.write(0, 0x0b);
        assert_eq!(pic.read(0), 0x08);
    }

    #[test]
    fn initialization_clears_mask_and_state() {
        let mut pic = pair();
        pic.write(1, 0xff);
        pulse(&mut pic, 3);
        pic.write(0, 0x13);
        pic.write(1, 0x43);
        pic.write(1, 1);
        assert_eq!(pic.read(1), 0, "single mode takes no ICW3");
        assert!(!pic.intr());
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x43);
    }
}
