//! The 256 bytes of a function's configuration space (type 0 header) and which of their bits a guest may change.
//!
//! Every register is bytes plus a mask of writable bits, so accesses of any width and alignment need no cases:
//! the size of a BAR, too, is nothing but the low bits of its register that ignore writes.

/// Offsets of registers in the header.
pub mod register {
    /// Command, 16 bits.
    pub const COMMAND: usize = 0x04;
    /// Status, 16 bits.
    pub const STATUS: usize = 0x06;
    /// The first of six BARs.
    pub const BAR0: usize = 0x10;
    /// The byte behind the last BAR.
    pub const BARS_END: usize = 0x28;
    /// Offset of the first capability.
    pub const CAPABILITIES: usize = 0x34;
    /// Interrupt line: a scratch register for system software.
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// Interrupt pin: 1 is INTA.
    pub const INTERRUPT_PIN: usize = 0x3d;
}

/// Bits of the command register.
pub mod command {
    /// Port BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The device may access memory (DMA, MSI).
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Parity error response.
    pub const PARITY: u16 = 1 << 6;
    /// SERR# enable.
    pub const SERR: u16 = 1 << 8;
    /// INTx must stay low.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Capabilities start behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, as one 24-bit number.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Which addresses a BAR decodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory, 32-bit register.
    Memory32,
    /// Memory, 64-bit register made of this BAR and the next.
    Memory64,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// Configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    bars: [Option<Bar>; 6],
    /// Where the offset of the next capability has to be stored.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A header without BARs and capabilities; nothing is decoded.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; 256],
            writable: [0; 256],
            bars: [None; 6],
            link: register::CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        let mask = command::IO
            | command::MEMORY
            | command::BUS_MASTER
            | command::PARITY
            | command::SERR
            | command::INTX_DISABLE;
        space.set_writable(register::COMMAND, &mask.to_le_bytes());
        space.set_writable(0x0c, &[0xff, 0xff]); // cache line size, latency timer
        space.set_writable(register::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets bytes that the guest reads. Panics outside configuration space.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Says which bits the guest may write. Panics outside configuration space.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Declares a BAR, at address 0. Panics if `size` or `index` cannot be: both are ours, never the guest's.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        let (minimum, maximum) = match kind {
            BarKind::Io => (4, 256),
            BarKind::Memory32 => (16, 1 << 31),
            BarKind::Memory64 => (16, 1 << 62),
        };
        assert!(size.is_power_of_two() && (minimum..=maximum).contains(&size), "BAR size {size:#x}");
        let registers = if kind == BarKind::Memory64 { 2 } else { 1 };
        assert!(index + registers <= 6, "BAR {index} has no register");
        let at = register::BAR0 + 4 * index;
        let mask = !(size - 1);
        self.set_writable(at, &mask.to_le_bytes()[..4 * registers]);
        self.bars[index] = Some(Bar { kind, size });
        self.set_bar(index, 0);
    }

    /// Puts a BAR at `base`, as firmware does.
    pub fn set_bar(&mut self, index: usize, base: u64) {
        let at = register::BAR0 + 4 * index;
        match self.bars[index].map(|bar| bar.kind) {
            Some(BarKind::Io) => self.set(at, &(base as u32 | 1).to_le_bytes()),
            Some(BarKind::Memory32) => self.set(at, &(base as u32).to_le_bytes()),
            Some(BarKind::Memory64) => self.set(at, &(base | 4).to_le_bytes()),
            None => {}
        }
    }

    /// Kind and size of a BAR.
    pub fn bar(&self, index: usize) -> Option<(BarKind, u64)> {
        self.bars.get(index).copied().flatten().map(|bar| (bar.kind, bar.size))
    }

    /// Where a BAR answers now: nowhere while the command register keeps it from decoding.
    pub fn decoded_bar(&self, index: usize) -> Option<(BarKind, u64, u64)> {
        let (kind, size) = self.bar(index)?;
        let at = register::BAR0 + 4 * index;
        let low = u64::from(u32::from_le_bytes(*self.bytes[at..].first_chunk()?));
        let (enable, base) = match kind {
            BarKind::Io => (command::IO, low & !3),
            BarKind::Memory32 => (command::MEMORY, low & !15),
            BarKind::Memory64 => {
                let high = u32::from_le_bytes(*self.bytes[at + 4..].first_chunk()?);
                (command::MEMORY, (u64::from(high) << 32 | low) & !15)
            }
        };
        (self.command() & enable != 0).then_some((kind, base, size))
    }

    /// Appends a capability and returns its offset. `body` follows the two bytes of id and link; `mask` says
    /// which of its bits the guest may write. Panics when configuration space is full: what goes in is ours.
    pub fn add_capability(&mut self, id: u8, body: &[u8], mask: &[u8]) -> usize {
        let at = self.free;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.set_writable(at + 2, mask);
        self.set(self.link, &[at as u8]);
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        let status = self.u16_at(register::STATUS) | STATUS_CAPABILITIES;
        self.set(register::STATUS, &status.to_le_bytes());
        at
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16_at(register::COMMAND)
    }

    /// A 16-bit register of ours.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// A 32-bit register of ours.
    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from(self.u16_at(offset)) | u32::from(self.u16_at(offset + 2)) << 16
    }

    /// The guest reads; outside of the 256 bytes, all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.wrapping_add(i)).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, &byte) in data.iter().enumerate() {
            let at = offset.wrapping_add(i);
            if let (Some(old), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 1,
            class: 0x01_06_02,
            subsystem_vendor: 0xaaaa,
            subsystem: 0xbbbb,
        })
    }

    fn dword(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn header_is_laid_out_as_type_0() {
        let space = space();
        assert_eq!(dword(&space, 0), 0x5678_1234);
        assert_eq!(dword(&space, 8), 0x0106_0201);
        assert_eq!(dword(&space, 0x2c), 0xbbbb_aaaa);
        assert_eq!(dword(&space, 0x100), u32::MAX, "no extended configuration space");
    }

    #[test]
    fn identity_and_reserved_bits_ignore_writes() {
        let mut space = space();
        space.write(0, &[0; 4]);
        space.write(4, &[0xff; 4]);
        assert_eq!(dword(&space, 0), 0x5678_1234);
        assert_eq!(dword(&space, 4), 0x0547, "status has no writable bits");
    }

    #[test]
    fn writing_ones_to_a_bar_reveals_its_size() {
        let mut space = space();
        space.add_bar(0, BarKind::Memory64, 0x8000);
        space.add_bar(2, BarKind::Memory32, 0x1000);
        space.add_bar(3, BarKind::Io, 0x20);
        for at in (0x10..0x28).step_by(4) {
            space.write(at, &[0xff; 4]);
        }
        assert_eq!(dword(&space, 0x10), 0xffff_8004);
        assert_eq!(dword(&space, 0x14), 0xffff_ffff);
        assert_eq!(dword(&space, 0x18), 0xffff_f000);
        assert_eq!(dword(&space, 0x1c), 0xffff_ffe1);
        assert_eq!(dword(&space, 0x20), 0, "a BAR that does not exist stays zero");
    }

    #[test]
    fn bars_are_decoded_only_while_the_command_register_says_so() {
        let mut space = space();
        space.add_bar(0, BarKind::Memory64, 0x1000);
        space.add_bar(2, BarKind::Io, 0x10);
        space.write(0x10, &0x2000_1000u32.to_le_bytes());
        space.write(0x14, &0x7fu32.to_le_bytes());
        space.write(0x18, &0xc010u32.to_le_bytes());
        assert_eq!((space.decoded_bar(0), space.decoded_bar(2)), (None, None));
        space.write(4, &[2]);
        assert_eq!(space.decoded_bar(0), Some((BarKind::Memory64, 0x7f_2000_1000, 0x1000)));
        assert_eq!(space.decoded_bar(2), None);
        space.write(4, &[1]);
        assert_eq!(space.decoded_bar(0), None);
        assert_eq!(space.decoded_bar(2), Some((BarKind::Io, 0xc010, 0x10)));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1, 2], &[0, 0, 0]);
        let second = space.add_capability(0x11, &[0, 0], &[0, 0xc0]);
        assert_eq!(dword(&space, 4) >> 16 & 0x10, 0x10);
        assert_eq!(dword(&space, 0x34) & 0xff, first as u32);
        assert_eq!(dword(&space, first) & 0xffff, (second as u32) << 8 | 9);
        assert_eq!(dword(&space, second) & 0xffff, 0x11, "the last one ends the list");
        space.write(second + 2, &[0xff, 0xff]);
        assert_eq!(space.u16_at(second + 2), 0xc000);
    }
}
