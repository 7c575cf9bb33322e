//! How the first vCPU starts: the registers a boot protocol promises, as plain data.
//!
//! Registers with hidden parts are given in full, so whoever starts the vCPU copies field by field and computes
//! nothing. What the registers point at (descriptor table, page tables) is in guest memory already.
//!
//! Must not know: engines, the software CPU, image formats.

use x86defs::{cr0, cr4, efer, paging, rflags, segment};

use super::error::BootError;
use super::layout::{Layout, PAGE};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Segment {
    pub selector: u16,
    pub base: u64,
    /// In bytes.
    pub limit: u32,
    /// In the VMCS's access-rights format, see [`x86defs::segment`].
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u16,
}

/// How the guest is entered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// Linux boot protocol, 64-bit entry point.
    Linux64,
    /// Linux boot protocol, 32-bit entry point.
    Linux32,
    /// Xen's PVH: `hvm_start_info` in EBX.
    Pvh,
    /// Multiboot 1.
    Multiboot1,
    /// Multiboot 2.
    Multiboot2,
    /// ELF entered at `e_entry`, paging off.
    Elf32,
    /// ELF entered at `e_entry` in 64-bit mode.
    Elf64,
    /// Flat image entered at its first byte.
    Flat,
}

/// Registers of the first vCPU at its first instruction. Registers not named here have their values after INIT.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BootState {
    pub protocol: Protocol,
    /// In encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// In encoding order: ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    /// Where the ACPI root pointer is.
    pub rsdp: u64,
}

/// Indices into [`BootState::gpr`].
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Index of CS in [`BootState::segments`].
pub const CS: usize = 1;
/// Index of SS in [`BootState::segments`].
pub const SS: usize = 2;
/// Linux's `__BOOT_CS`, which serves everybody.
pub const CODE_SELECTOR: u16 = 0x10;
/// Linux's `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;

const CODE: u32 = segment::CODE | segment::READABLE | segment::ACCESSED | segment::S | segment::PRESENT;
const DATA: u32 = segment::WRITABLE | segment::ACCESSED | segment::S | segment::PRESENT;
const FLAT32: u32 = segment::DB | segment::G;
const FLAT64: u32 = segment::L | segment::G;
const PAGE_TABLES: u64 = 6 * PAGE;

/// The eight bytes of a flat 4 GiB segment's descriptor.
fn flat_descriptor(access: u32) -> u64 {
    u64::from(access) << 40 | 0xf << 48 | 0xffff
}

impl BootState {
    fn with_segments(protocol: Protocol, code: Segment, data: Segment) -> Self {
        let mut segments = [data; 6];
        segments[CS] = code;
        Self {
            protocol,
            gpr: [0; 16],
            rip: 0,
            rflags: rflags::FIXED_1,
            cr0: cr0::ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
            segments,
            ldtr: Segment {
                limit: 0xffff,
                access: segment::system::LDT | segment::PRESENT,
                ..Segment::default()
            },
            tr: Segment {
                limit: 0xffff,
                access: segment::system::TSS_BUSY | segment::PRESENT,
                ..Segment::default()
            },
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            rsdp: 0,
        }
    }

    /// Real mode at `address`, which is below 1 MiB: `0:address` in the first 64 KiB, as a boot sector expects,
    /// and above that a code segment that starts at the address's paragraph.
    pub fn real16(protocol: Protocol, address: u64) -> Self {
        let (selector, ip) = match address {
            0..=0xffff => (0, address),
            _ => ((address >> 4) as u16, address & 0xf),
        };
        let real = |selector: u16, access| Segment {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            access,
        };
        let mut state = Self::with_segments(protocol, real(selector, CODE), real(selector, DATA));
        state.rip = ip;
        state.idtr = TableRegister { base: 0, limit: 0x3ff };
        state.gdtr = TableRegister { base: 0, limit: 0xffff };
        state
    }

    /// Gives a real-mode state the stack of `size` bytes at `base`, which is below 1 MiB and on a paragraph.
    pub fn set_real_mode_stack(&mut self, base: u64, size: u16) {
        let stack = &mut self.segments[SS];
        stack.selector = (base >> 4) as u16;
        stack.base = u64::from(stack.selector) << 4;
        self.gpr[gpr::RSP] = size.into();
    }

    /// 32-bit protected mode at `address`, paging off, flat segments.
    pub fn protected32(layout: &mut Layout, protocol: Protocol, address: u32) -> Result<Self, BootError> {
        let mut state = Self::flat(layout, protocol, CODE | FLAT32)?;
        state.rip = u64::from(address);
        state.tr.limit = 0x67;
        Ok(state)
    }

    /// 64-bit mode at `address`, with the first 4 GiB mapped to themselves.
    pub fn long64(layout: &mut Layout, protocol: Protocol, address: u64) -> Result<Self, BootError> {
        let mut state = Self::flat(layout, protocol, CODE | FLAT64)?;
        state.rip = address;
        state.tr.limit = 0x67;
        state.cr3 = identity_page_tables(layout)?;
        state.cr0 |= cr0::PG;
        state.cr4 = cr4::PAE;
        state.efer = efer::LME | efer::LMA;
        Ok(state)
    }

    fn flat(layout: &mut Layout, protocol: Protocol, code_access: u32) -> Result<Self, BootError> {
        let data_access = DATA | FLAT32;
        let descriptors = [0, 0, flat_descriptor(code_access), flat_descriptor(data_access)];
        let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.to_le_bytes()).collect();
        let gdt = layout.place_table(&bytes, 16, "the first descriptor table")?;
        let flat = |selector, access| Segment { selector, base: 0, limit: u32::MAX, access };
        let mut state =
            Self::with_segments(protocol, flat(CODE_SELECTOR, code_access), flat(DATA_SELECTOR, data_access));
        state.gdtr = TableRegister { base: gdt, limit: (bytes.len() - 1) as u16 };
        state.cr0 |= cr0::PE;
        Ok(state)
    }
}

/// Maps the first 4 GiB to themselves in 2 MiB pages: a PML4, a PDPT, four page directories. Gives CR3.
fn identity_page_tables(layout: &mut Layout) -> Result<u64, BootError> {
    const WHAT: &str = "the first page tables";
    const LINK: u64 = paging::PRESENT | paging::WRITE;
    let at = layout.reserve_table(PAGE_TABLES, PAGE, WHAT)?;
    let mut tables = vec![0u64; (PAGE_TABLES / 8) as usize];
    tables[0] = (at + PAGE) | LINK;
    for directory in 0..4 {
        tables[512 + directory as usize] = (at + (2 + directory) * PAGE) | LINK;
    }
    for (page, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (page as u64) << 21 | LINK | paging::LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    layout.write(at, &bytes, WHAT)?;
    Ok(at)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Ram;

    #[test]
    fn descriptors_say_what_the_registers_say() {
        let ram = Ram::new(2 << 20).unwrap();
        let mut layout = Layout::new(&ram.memory, &ram.ranges);
        let state = BootState::long64(&mut layout, Protocol::Linux64, 0x10_0200).unwrap();
        let gdt: [u64; 4] = ram.memory.read_obj(GuestAddress(state.gdtr.base)).unwrap();
        assert_eq!(gdt[2], 0x00af_9b00_0000_ffff);
        assert_eq!(gdt[3], 0x00cf_9300_0000_ffff);
        assert_eq!(state.gdtr.limit, 31);
        assert_eq!(state.segments[CS].access, 0xa09b);
        assert_eq!(state.segments[3].access, 0xc093);
    }

    #[test]
    fn page_tables_map_4g_to_itself() {
        let ram = Ram::new(2 << 20).unwrap();
        let mut layout = Layout::new(&ram.memory, &ram.ranges);
        let state = BootState::long64(&mut layout, Protocol::Elf64, 0).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            ram.memory.read_obj(GuestAddress((table & paging::ADDRESS) + index * 8)).unwrap()
        };
        for address in [0u64, 0x1234_5678, 0xbfff_ffff, 0xfee0_0000] {
            let pdpt = entry(state.cr3, address >> 39);
            let directory = entry(pdpt, address >> 30 & 0x1ff);
            let page = entry(directory, address >> 21 & 0x1ff);
            assert_eq!(page & paging::ADDRESS, address & !0x1f_ffff);
            assert_eq!(page & 0xfff, 0x83);
        }
        assert_eq!(entry(state.cr3, 1), 0);
    }

    #[test]
    fn real_mode_addresses_reach_the_image() {
        for address in [0x7c00u64, 0x1_0004, 0x9_f000] {
            let state = BootState::real16(Protocol::Flat, address);
            assert_eq!(state.segments[CS].base + state.rip, address);
            assert_eq!(state.cr0 & cr0::PE, 0);
        }
        assert_eq!(BootState::real16(Protocol::Flat, 0x7c00).segments[CS].selector, 0);
    }
}
