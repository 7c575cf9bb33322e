//! What a BIOS leaves behind in low memory, for kernels that look there or call it in real mode.
//!
//! Xen goes back to real mode once and asks the BIOS for memory, disks and video modes; old boot sectors do too. They
//! find an interrupt vector table whose every service answers "no such function", so they fall back to what the
//! boot protocol told them. A jump to the reset vector resets the machine.
//!
//! UNSUPPORTED: BIOS services. A boot sector that loads more from disk through INT 13h gets an error from it.
//!
//! Nobody claims the vector table and the data area, so an image may be loaded over them.

use super::acpi;
use super::error::BootError;
use super::layout::{CONVENTIONAL_END, Layout};

const WHAT: &str = "the BIOS data area";
const COM1: u16 = 0x3f8;
const BDA_COM1: u64 = 0x400;
const BDA_EXTENDED_SEGMENT: u64 = 0x40e;
const BDA_MEMORY_KIB: u64 = 0x413;

/// Code is at this segment, which ends at 1 MiB.
const SEGMENT: u16 = 0xf000;
/// An IRET, where PC BIOSes have theirs.
const DUMMY: u16 = 0xff53;
const REFUSE: u16 = 0xff60;
const MEMORY_SIZE: u16 = 0xff70;
const RESET: u16 = 0xfff0;
/// Vectors of services; those below are exceptions and IRQs, those above nobody's.
const SERVICES: std::ops::RangeInclusive<u16> = 0x10..=0x1a;
const INT_MEMORY_SIZE: u16 = 0x12;

/// Sets carry ("no such function") and zero ("no key is waiting") in the flags the caller gets back:
/// `push bp; mov bp, sp; or byte [bp+6], 0x41; pop bp; iret`.
const REFUSE_CODE: [u8; 9] = [0x55, 0x89, 0xe5, 0x80, 0x4e, 0x06, 0x41, 0x5d, 0xcf];
const IRET: [u8; 1] = [0xcf];

/// Writes data area, vector table and the code it points at.
pub fn write(layout: &Layout) -> Result<(), BootError> {
    let memory_kib = ((CONVENTIONAL_END >> 10) as u16).to_le_bytes();
    layout.write(BDA_COM1, &COM1.to_le_bytes(), WHAT)?;
    layout.write(BDA_EXTENDED_SEGMENT, &((CONVENTIONAL_END >> 4) as u16).to_le_bytes(), WHAT)?;
    layout.write(BDA_MEMORY_KIB, &memory_kib, WHAT)?;
    // The extended data area begins with its size in KiB.
    layout.write(CONVENTIONAL_END, &[1], WHAT)?;

    let vectors: Vec<u8> = (0..256u16)
        .flat_map(|vector| [handler(vector).to_le_bytes(), SEGMENT.to_le_bytes()])
        .flatten()
        .collect();
    layout.write(0, &vectors, "the interrupt vector table")?;
    let [low, high] = memory_kib;
    let [port_low, port_high] = acpi::RESET_PORT.to_le_bytes();
    // mov ax, KiB; iret
    let memory_size = [0xb8, low, high, 0xcf];
    // mov al, value; mov dx, port; out dx, al; hlt; jmp to the hlt
    let reset = [0xb0, acpi::RESET_VALUE, 0xba, port_low, port_high, 0xee, 0xf4, 0xeb, 0xfd];
    let code: [(u16, &[u8]); 4] =
        [(DUMMY, &IRET), (REFUSE, &REFUSE_CODE), (MEMORY_SIZE, &memory_size), (RESET, &reset)];
    for (offset, bytes) in code {
        layout.write((u64::from(SEGMENT) << 4) + u64::from(offset), bytes, "BIOS code")?;
    }
    Ok(())
}

fn handler(vector: u16) -> u16 {
    match vector {
        INT_MEMORY_SIZE => MEMORY_SIZE,
        _ if SERVICES.contains(&vector) => REFUSE,
        _ => DUMMY,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Ram;

    /// What an interrupt executes, or what stands at the reset vector.
    fn disassemble(ram: &Ram, address: u64, count: usize) -> Vec<String> {
        let mut bytes = [0; 16];
        ram.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let mut decoder = Decoder::with_ip(16, &bytes, address & 0xffff, DecoderOptions::NONE);
        let text = |instruction| {
            let mut line = String::new();
            IntelFormatter::new().format(&instruction, &mut line);
            line
        };
        (0..count).map(|_| text(decoder.decode())).collect()
    }

    #[test]
    fn vectors_lead_to_the_code_they_should() {
        let ram = Ram::new(2 << 20).unwrap();
        write(&Layout::new(&ram.memory, &ram.ranges)).unwrap();
        let at = |vector: u64| {
            let [offset, segment]: [u16; 2] = ram.memory.read_obj(GuestAddress(vector * 4)).unwrap();
            (u64::from(segment) << 4) + u64::from(offset)
        };
        assert_eq!(disassemble(&ram, at(8), 1), ["iret"]);
        assert_eq!(disassemble(&ram, at(0xff), 1), ["iret"]);
        assert_eq!(disassemble(&ram, at(0x12), 2), ["mov ax,27Fh", "iret"]);
        let refuse = ["push bp", "mov bp,sp", "or byte ptr [bp+6],41h", "pop bp", "iret"];
        assert_eq!(disassemble(&ram, at(0x15), 5), refuse);
        let reset = ["mov al,6", "mov dx,0CF9h", "out dx,al", "hlt", "jmp short 0000FFF6h"];
        assert_eq!(disassemble(&ram, 0xf_fff0, 5)[..4], reset[..4]);
        assert!(disassemble(&ram, 0xf_fff0, 5)[4].contains("FFF6"));
    }
}
