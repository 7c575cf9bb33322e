//! PVH: `hvm_start_info`, and 32-bit protected mode at the address the ELF note gives (Xen's docs/misc/pvh.pandoc).
//!
//! A plain ELF or flat image has no protocol of its own; it gets the same structure, so that bare-metal code can
//! find memory map, command line, modules and ACPI without a header or a note.
//!
//! Must not know: how the image was loaded.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
};

use super::elf::Elf;
use super::error::BootError;
use super::layout::{EXTENDED_START, Layout, PAGE};
use super::state::{BootState, Protocol, gpr};
use super::{Guest, MemoryKind};
use crate::memory::LOW_RAM_END;

/// The first with a memory map.
const VERSION: u32 = 1;

/// Loads an ELF file with a PVH note.
pub fn load(layout: &mut Layout, guest: &mut Guest, elf: &Elf, entry: u32) -> Result<BootState, BootError> {
    elf.load(layout, 0)?;
    if !layout.is_claimed(entry.into()) {
        return Err(guest.image.damaged(format!("its PVH entry point {entry:#x} is in no segment")));
    }
    let start_info = place_start_info(layout, guest)?;
    let mut state = BootState::protected32(layout, Protocol::Pvh, entry)?;
    state.gpr[gpr::RBX] = start_info;
    Ok(state)
}

/// Places modules and all tables; gives the address of `hvm_start_info`. The initrd is the first module.
pub fn place_start_info(layout: &mut Layout, guest: &mut Guest) -> Result<u64, BootError> {
    let mut modules = Vec::new();
    for module in guest.initrd.take().into_iter().chain(std::mem::take(&mut guest.modules)) {
        let size = module.payload.len();
        let what = format!("the module {}", module.name);
        let at = layout
            .find_high(size, PAGE, EXTENDED_START..LOW_RAM_END)
            .ok_or_else(|| BootError::no_room_for_module(&module.name, size, layout.ram_size()))?;
        layout.claim(at, size, &what)?;
        layout.write_payload(at, &module.payload, &what)?;
        let cmdline = place_string(layout, &module.cmdline, &what)?;
        modules.extend([at, size, cmdline, 0].iter().flat_map(|w: &u64| w.to_le_bytes()));
    }
    let module_count = modules.len() / 32;
    let module_list = layout.place_table(&modules, 16, "the module list")?;
    let mut map = Vec::new();
    for region in &guest.memory_map {
        let kind = match region.kind {
            MemoryKind::Usable => XEN_HVM_MEMMAP_TYPE_RAM,
            MemoryKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
        };
        map.extend([region.start, region.len, u64::from(kind)].iter().flat_map(|w| w.to_le_bytes()));
    }
    let map = layout.place_table(&map, 16, "the memory map")?;
    let cmdline = place_string(layout, guest.cmdline, "the command line")?;
    let mut info = Vec::new();
    for word in [XEN_HVM_START_MAGIC_VALUE, VERSION, 0, module_count as u32] {
        info.extend(word.to_le_bytes());
    }
    for word in [if module_count == 0 { 0 } else { module_list }, cmdline, guest.rsdp, map] {
        info.extend(word.to_le_bytes());
    }
    info.extend((guest.memory_map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    layout.place_table(&info, 16, "the start info")
}

/// Places a string with its zero byte.
pub fn place_string(layout: &mut Layout, string: &str, what: &str) -> Result<u64, BootError> {
    let mut bytes = string.as_bytes().to_vec();
    bytes.push(0);
    layout.place_table(&bytes, 1, what)
}
