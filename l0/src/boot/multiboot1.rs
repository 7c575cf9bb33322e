//! Multiboot 1 (the Multiboot Specification, version 0.6.96).
//!
//! Must not know: Multiboot 2.

use super::elf::Elf;
use super::error::BootError;
use super::image::Image;
use super::layout::Layout;
use super::multiboot::{
    AddressFields, LOADER_NAME, MAP_AVAILABLE, MAP_RESERVED, PlacedSections, basic_memory, command_line,
    page_end, place_modules, place_sections, place_string32,
};
use super::state::{BootState, Protocol, gpr};
use super::{Guest, MemoryKind};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header is in this much of the file.
const SEARCH: u64 = 8192;
/// Modules on pages; memory information. Both are always given.
const WANTS_ALIGNED_MODULES: u32 = 1 << 0;
const WANTS_MEMORY: u32 = 1 << 1;
const WANTS_VIDEO: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
/// What a loader must refuse if it does not know it.
const REQUIREMENTS: u32 = 0xffff;

const INFO_SIZE: usize = 120;
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_SECTIONS: u32 = 1 << 5;
const HAS_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

/// What the header asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header {
    flags: u32,
    /// Address fields and entry point.
    addresses: Option<(AddressFields, u32)>,
}

impl Header {
    /// Looks for a header.
    pub fn find(image: &Image) -> Option<Self> {
        (0..SEARCH).step_by(4).find_map(|at| Self::at(image, at))
    }

    fn at(image: &Image, at: u64) -> Option<Self> {
        let (magic, flags, checksum) = (image.u32(at)?, image.u32(at + 4)?, image.u32(at + 8)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = if flags & HAS_ADDRESSES != 0 {
            let nonzero = |value: u32| (value != 0).then_some(value);
            let fields = AddressFields {
                header_offset: at,
                header_address: image.u32(at + 12)?,
                load_address: Some(image.u32(at + 16)?),
                load_end: nonzero(image.u32(at + 20)?),
                bss_end: nonzero(image.u32(at + 24)?),
            };
            Some((fields, image.u32(at + 28)?))
        } else {
            None
        };
        Some(Self { flags, addresses })
    }

    /// True if this header is enough to load a file that is not ELF.
    pub fn loads_any_format(&self) -> bool {
        self.addresses.is_some()
    }

    fn check_requirements(&self, image: &Image) -> Result<(), BootError> {
        let known = WANTS_ALIGNED_MODULES | WANTS_MEMORY | WANTS_VIDEO;
        let unknown = self.flags & REQUIREMENTS & !known;
        if unknown != 0 {
            return Err(
                image.unsupported(format!("its Multiboot header requires unknown features {unknown:#x}"))
            );
        }
        if self.flags & WANTS_VIDEO != 0 {
            // DEVIATION: the specification has us refuse. Kernels that set this bit mostly check the answer's
            // flags and go on with a serial port, and there is no display to offer.
            log::warn!("{} asks for a video mode: there is no display, and it is told so", image.name);
        }
        Ok(())
    }
}

/// Loads the image; `elf` unless the header has addresses of its own.
pub fn load(
    layout: &mut Layout,
    guest: &mut Guest,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<BootState, BootError> {
    let image = guest.image;
    header.check_requirements(&image)?;
    let (entry, end, sections) = match (&header.addresses, elf) {
        (Some((fields, entry)), _) => (u64::from(*entry), fields.load(layout, &image)?.1, None),
        (None, Some(elf)) => {
            elf.load(layout, 0)?;
            let sections = place_sections(layout, elf);
            (elf.physical_entry(elf.entry)?, elf.extent().1, sections)
        }
        (None, None) => {
            return Err(image.unsupported("its Multiboot header has no addresses, and it is not ELF"));
        }
    };
    let entry32 = u32::try_from(entry).ok().filter(|_| layout.is_claimed(entry));
    let entry = entry32
        .ok_or_else(|| image.damaged(format!("its entry point {entry:#x} is not in what it loads")))?;
    let info = place_info(layout, guest, page_end(end), sections)?;
    let mut state = BootState::protected32(layout, Protocol::Multiboot1, entry)?;
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = info;
    Ok(state)
}

/// Builds the boot information; gives its address.
fn place_info(
    layout: &mut Layout,
    guest: &mut Guest,
    kernel_end: u64,
    sections: Option<PlacedSections>,
) -> Result<u64, BootError> {
    let mut info = [0u8; INFO_SIZE];
    let mut set = |at: usize, value: u32| info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let mut flags = HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MAP | HAS_LOADER_NAME;
    let (lower, upper) = basic_memory(layout);
    set(4, lower);
    set(8, upper);
    let cmdline = command_line(guest.image.name, guest.cmdline);
    set(16, place_string32(layout, &cmdline, "the command line")?);
    let (count, modules) = place_module_list(layout, guest, kernel_end)?;
    set(20, count);
    set(24, modules);
    if let Some(sections) = sections {
        flags |= HAS_SECTIONS;
        set(28, sections.table.count.into());
        set(32, sections.table.entry_size.into());
        set(36, layout.place_table(&sections.headers, 16, "ELF section headers")? as u32);
        set(40, sections.table.names.into());
    }
    let map = memory_map(guest);
    set(44, map.len() as u32);
    set(48, layout.place_table(&map, 4, "the memory map")? as u32);
    set(64, place_string32(layout, LOADER_NAME, "the boot loader's name")?);
    set(0, flags);
    layout.place_table(&info, 8, "the boot information")
}

fn place_module_list(
    layout: &mut Layout,
    guest: &mut Guest,
    kernel_end: u64,
) -> Result<(u32, u32), BootError> {
    let modules = place_modules(layout, guest, kernel_end)?;
    let mut list = Vec::new();
    for module in &modules {
        let cmdline = place_string32(layout, &module.cmdline, "a module's command line")?;
        list.extend([module.start, module.end, cmdline, 0].iter().flat_map(|w| w.to_le_bytes()));
    }
    let at = layout.place_table(&list, 16, "the module list")?;
    Ok((modules.len() as u32, at as u32))
}

/// Entries that begin with their own size, which does not count itself.
fn memory_map(guest: &Guest) -> Vec<u8> {
    let mut map = Vec::new();
    for region in &guest.memory_map {
        let kind = match region.kind {
            MemoryKind::Usable => MAP_AVAILABLE,
            MemoryKind::Reserved => MAP_RESERVED,
        };
        map.extend(20u32.to_le_bytes());
        map.extend(region.start.to_le_bytes());
        map.extend(region.len.to_le_bytes());
        map.extend(kind.to_le_bytes());
    }
    map
}
