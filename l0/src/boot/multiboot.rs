//! What both versions of Multiboot have in common: images loaded by address fields, modules, command lines, and
//! ELF sections for kernels that want their own symbols.
//!
//! Command lines begin with the image's file name, as with GRUB Legacy and QEMU; Xen drops the first word of a
//! loader that is not GRUB 2.
//!
//! Must not know: the layout of either version's information.

use super::Guest;
use super::elf::{Elf, SectionTable};
use super::error::BootError;
use super::image::Image;
use super::layout::{EXTENDED_START, Layout, PAGE, align_up};
use super::pvh::place_string;
use crate::memory::LOW_RAM_END;

/// What the boot information calls us.
pub const LOADER_NAME: &str = concat!("turtles ", env!("CARGO_PKG_VERSION"));
/// Memory map types.
pub const MAP_AVAILABLE: u32 = 1;
pub const MAP_RESERVED: u32 = 2;
const SECTION_NOBITS: u32 = 8;

/// Address fields of a header: they replace the headers of the executable's own format.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AddressFields {
    /// Where the header is in the file.
    pub header_offset: u64,
    /// Where it is to be in memory.
    pub header_address: u32,
    /// First byte to load; none: the file's first.
    pub load_address: Option<u32>,
    /// End of what to load; none: the file's end.
    pub load_end: Option<u32>,
    /// End of what to clear behind it; none: nothing.
    pub bss_end: Option<u32>,
}

impl AddressFields {
    /// Loads the image; gives its start and end.
    pub fn load(&self, layout: &mut Layout, image: &Image) -> Result<(u64, u64), BootError> {
        let wrong = || image.damaged("the addresses in its Multiboot header contradict each other");
        let header_address = u64::from(self.header_address);
        let start = match self.load_address {
            Some(address) => u64::from(address),
            None => header_address.checked_sub(self.header_offset).ok_or_else(wrong)?,
        };
        let before_header = header_address.checked_sub(start).ok_or_else(wrong)?;
        let offset = self.header_offset.checked_sub(before_header).ok_or_else(wrong)?;
        let len = match self.load_end {
            Some(end) => u64::from(end).checked_sub(start).ok_or_else(wrong)?,
            None => image.len().saturating_sub(offset),
        };
        let bytes = image
            .slice(offset, len)
            .ok_or_else(|| image.truncated("what its header says to load", offset + len))?;
        let end = start + len;
        let bss_end = self.bss_end.map_or(end, u64::from);
        let bss_len = bss_end.checked_sub(end).ok_or_else(wrong)?;
        layout.claim(start, bss_end - start, image.name)?;
        layout.write(start, bytes, image.name)?;
        layout.zero(end, bss_len, image.name)?;
        Ok((start, bss_end))
    }
}

/// A module in guest memory.
pub struct PlacedModule {
    pub start: u32,
    pub end: u32,
    pub cmdline: String,
}

/// Puts the initrd, if any, and the modules on pages behind `kernel_end`, or where else there is room.
pub fn place_modules(
    layout: &mut Layout,
    guest: &mut Guest,
    kernel_end: u64,
) -> Result<Vec<PlacedModule>, BootError> {
    let mut placed = Vec::new();
    for module in guest.initrd.take().into_iter().chain(std::mem::take(&mut guest.modules)) {
        let size = module.payload.len();
        let what = format!("the module {}", module.name);
        let behind = kernel_end.max(EXTENDED_START)..LOW_RAM_END;
        let at = layout
            .find_low(size, PAGE, behind)
            .or_else(|| layout.find_low(size, PAGE, EXTENDED_START..LOW_RAM_END))
            .ok_or_else(|| BootError::no_room_for_module(&module.name, size, layout.ram_size()))?;
        layout.claim(at, size, &what)?;
        layout.write_payload(at, &module.payload, &what)?;
        let cmdline = command_line(&module.name, &module.cmdline);
        placed.push(PlacedModule { start: at as u32, end: (at + size) as u32, cmdline });
    }
    Ok(placed)
}

/// The file name, then the arguments.
pub fn command_line(name: &str, arguments: &str) -> String {
    match arguments {
        "" => name.to_string(),
        _ => format!("{name} {arguments}"),
    }
}

/// Places a string, whose address fits because low memory does.
pub fn place_string32(layout: &mut Layout, string: &str, what: &str) -> Result<u32, BootError> {
    Ok(place_string(layout, string, what)? as u32)
}

/// KiB below 640K, and from 1M to the first hole, as the BIOS would tell.
pub fn basic_memory(layout: &Layout) -> (u32, u32) {
    let lower = super::layout::CONVENTIONAL_END >> 10;
    let upper = layout.low_ram_end().saturating_sub(EXTENDED_START) >> 10;
    (lower as u32, upper as u32)
}

/// The section header table for the guest, with addresses for the sections that no segment loaded.
pub struct PlacedSections {
    pub table: SectionTable,
    pub headers: Vec<u8>,
}

/// Loads symbol tables, strings and debug information. None if there are none, or no room: they are a courtesy.
pub fn place_sections(layout: &mut Layout, elf: &Elf) -> Option<PlacedSections> {
    let table = elf.sections;
    let least = if elf.is_64bit { 64 } else { 40 };
    if table.count == 0 || table.entry_size < least {
        return None;
    }
    let len = u64::from(table.count) * u64::from(table.entry_size);
    let mut headers = elf.image.slice(table.offset, len)?.to_vec();
    let mut contents = Vec::new();
    // Sections do not overlap in a file that a linker made, so together they are no larger than it.
    let limit = elf.image.len() + 16 * u64::from(table.count);
    let mut pending = Vec::new();
    for (index, header) in headers.chunks_exact(table.entry_size.into()).enumerate() {
        let Some((offset, size)) = unloaded_section(elf, header) else { continue };
        let bytes = elf.image.slice(offset, size)?;
        contents.resize(contents.len().next_multiple_of(16), 0);
        if contents.len() as u64 + size > limit {
            return None;
        }
        pending.push((index, contents.len() as u64));
        contents.extend_from_slice(bytes);
    }
    let at = layout.find_high(contents.len() as u64, PAGE, EXTENDED_START..LOW_RAM_END)?;
    layout.claim(at, contents.len() as u64, "ELF sections").ok()?;
    layout.write(at, &contents, "ELF sections").ok()?;
    for (index, offset) in pending {
        let header = headers.get_mut(index * usize::from(table.entry_size)..)?;
        let address = at + offset;
        match elf.is_64bit {
            true => header.get_mut(16..24)?.copy_from_slice(&address.to_le_bytes()),
            false => header.get_mut(12..16)?.copy_from_slice(&(address as u32).to_le_bytes()),
        }
    }
    Some(PlacedSections { table, headers })
}

/// File offset and size of a section with contents and without an address.
fn unloaded_section(elf: &Elf, header: &[u8]) -> Option<(u64, u64)> {
    let header = Image { name: elf.image.name, bytes: header };
    let (address, offset, size) = match elf.is_64bit {
        true => (header.u64(16)?, header.u64(24)?, header.u64(32)?),
        false => (header.u32(12)?.into(), header.u32(16)?.into(), header.u32(20)?.into()),
    };
    (address == 0 && size != 0 && header.u32(4)? != SECTION_NOBITS).then_some((offset, size))
}

/// `end`, rounded up so that what follows starts on a page.
pub fn page_end(end: u64) -> u64 {
    align_up(end, PAGE).unwrap_or(end)
}
