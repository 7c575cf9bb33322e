//! Multiboot 2 (the Multiboot2 Specification, version 2.0), for the i386 architecture on a machine without firmware.
//!
//! The header is a list of requests; one we cannot meet and that is not marked optional ends the boot, with its
//! name. The boot information is a list of tags.
//!
//! Must not know: Multiboot 1.

use super::elf::Elf;
use super::error::BootError;
use super::image::Image;
use super::layout::{EXTENDED_START, Layout};
use super::multiboot::{
    AddressFields, LOADER_NAME, MAP_AVAILABLE, MAP_RESERVED, PlacedSections, basic_memory, command_line,
    page_end, place_modules, place_sections,
};
use super::state::{BootState, Protocol, gpr};
use super::{Guest, MemoryKind};
use crate::memory::LOW_RAM_END;

const HEADER_MAGIC: u32 = 0xe852_50d6;
const LOADER_MAGIC: u64 = 0x36d7_6289;
/// The whole header is in this much of the file.
const SEARCH: u64 = 32768;
const ARCHITECTURE_I386: u32 = 0;
const OPTIONAL: u16 = 1;
const CONSOLE_REQUIRED: u32 = 1;
const NO_ADDRESS: u32 = u32::MAX;

/// Tags of the header.
mod request {
    pub const END: u16 = 0;
    pub const INFORMATION: u16 = 1;
    pub const ADDRESS: u16 = 2;
    pub const ENTRY: u16 = 3;
    pub const CONSOLE_FLAGS: u16 = 4;
    pub const FRAMEBUFFER: u16 = 5;
    pub const MODULE_ALIGNMENT: u16 = 6;
    pub const EFI_BOOT_SERVICES: u16 = 7;
    pub const EFI_ENTRY_32: u16 = 8;
    pub const EFI_ENTRY_64: u16 = 9;
    pub const RELOCATABLE: u16 = 10;
}

/// Tags of the boot information.
mod tag {
    pub const END: u32 = 0;
    pub const COMMAND_LINE: u32 = 1;
    pub const LOADER_NAME: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const BASIC_MEMORY: u32 = 4;
    pub const MEMORY_MAP: u32 = 6;
    pub const ELF_SECTIONS: u32 = 9;
    pub const ACPI_OLD: u32 = 14;
    pub const ACPI_NEW: u32 = 15;
    pub const LOAD_BASE: u32 = 21;
}

/// Where a relocatable image may go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Relocatable {
    min: u32,
    max: u32,
    align: u32,
    preference: u32,
}

const PREFER_LOWEST: u32 = 1;
const PREFER_HIGHEST: u32 = 2;

/// What the header asks for.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Header {
    addresses: Option<AddressFields>,
    entry: Option<u32>,
    relocatable: Option<Relocatable>,
}

impl Header {
    /// Looks for a header; an error if it asks for what we cannot do.
    pub fn find(image: &Image) -> Result<Option<Self>, BootError> {
        (0..SEARCH).step_by(8).find_map(|at| Self::tags_at(image, at)).map_or(Ok(None), |(at, tags)| {
            let tags = Image { name: image.name, bytes: tags };
            Self::parse(image, at, &tags).map(Some)
        })
    }

    /// The tags behind a header at `at`.
    fn tags_at<'a>(image: &Image<'a>, at: u64) -> Option<(u64, &'a [u8])> {
        let (magic, architecture) = (image.u32(at)?, image.u32(at + 4)?);
        let (len, checksum) = (image.u32(at + 8)?, image.u32(at + 12)?);
        let sum = magic.wrapping_add(architecture).wrapping_add(len).wrapping_add(checksum);
        if magic != HEADER_MAGIC
            || architecture != ARCHITECTURE_I386
            || sum != 0
            || at + u64::from(len) > SEARCH
        {
            return None;
        }
        Some((at, image.slice(at + 16, u64::from(len).checked_sub(16)?)?))
    }

    fn parse(image: &Image, header_offset: u64, tags: &Image) -> Result<Self, BootError> {
        let mut header = Self::default();
        let mut at = 0;
        while at < tags.len() {
            let short = || image.damaged("a tag of its Multiboot2 header is cut off");
            let (kind, flags) = (tags.u16(at).ok_or_else(short)?, tags.u16(at + 2).ok_or_else(short)?);
            if kind == request::END {
                break;
            }
            let size = u64::from(tags.u32(at + 4).ok_or_else(short)?);
            let body = size.checked_sub(8).and_then(|len| tags.slice(at + 8, len)).ok_or_else(short)?;
            let body = Image { name: image.name, bytes: body };
            let optional = flags & OPTIONAL != 0;
            header
                .take_request(image, header_offset, kind, &body)
                .unwrap_or_else(|| Err(short()))
                .or_else(|error| if optional { Ok(()) } else { Err(error) })?;
            at += size.next_multiple_of(8);
        }
        Ok(header)
    }

    /// None if the tag is too short for its type.
    fn take_request(
        &mut self,
        image: &Image,
        header_offset: u64,
        kind: u16,
        body: &Image,
    ) -> Option<Result<(), BootError>> {
        match kind {
            request::INFORMATION => return Some(check_information(image, body)),
            request::ADDRESS => {
                let nonzero = |value: u32| (value != 0).then_some(value);
                self.addresses = Some(AddressFields {
                    header_offset,
                    header_address: body.u32(0)?,
                    load_address: Some(body.u32(4)?).filter(|&a| a != NO_ADDRESS),
                    load_end: nonzero(body.u32(8)?),
                    bss_end: nonzero(body.u32(12)?),
                });
            }
            request::ENTRY => self.entry = Some(body.u32(0)?),
            request::CONSOLE_FLAGS if body.u32(0)? & CONSOLE_REQUIRED != 0 => {
                let what = "it requires a text or graphics console, and there is only a serial port";
                return Some(Err(image.unsupported(what)));
            }
            request::RELOCATABLE => {
                let (min, max) = (body.u32(0)?, body.u32(4)?);
                let (align, preference) = (body.u32(8)?.max(1), body.u32(12)?);
                if !align.is_power_of_two() {
                    return Some(Err(
                        image.damaged(format!("its alignment {align:#x} is not a power of two"))
                    ));
                }
                self.relocatable = Some(Relocatable { min, max, align, preference });
            }
            request::EFI_BOOT_SERVICES => {
                return Some(Err(
                    image.unsupported("it requires EFI boot services, and there is no EFI here")
                ));
            }
            // Modules are always on pages; a framebuffer is a wish; EFI entry points are for EFI.
            request::CONSOLE_FLAGS
            | request::MODULE_ALIGNMENT
            | request::FRAMEBUFFER
            | request::EFI_ENTRY_32
            | request::EFI_ENTRY_64 => {}
            unknown => {
                let what = format!("its Multiboot2 header requires the unknown feature {unknown}");
                return Some(Err(image.unsupported(what)));
            }
        }
        Some(Ok(()))
    }

    /// True if this header is enough to load a file that is not ELF.
    pub fn loads_any_format(&self) -> bool {
        self.addresses.is_some() && self.entry.is_some()
    }
}

/// Information a kernel asks for must be of a type we know; it is given where it exists on this machine.
fn check_information(image: &Image, types: &Image) -> Result<(), BootError> {
    let unknown = (0..types.len()).step_by(4).filter_map(|at| types.u32(at)).find(|&t| t > tag::LOAD_BASE);
    match unknown {
        Some(kind) => Err(image
            .unsupported(format!("its Multiboot2 header requires boot information of unknown type {kind}"))),
        None => Ok(()),
    }
}

/// Where the image ended up.
struct Loaded {
    entry: u64,
    end: u64,
    base: Option<u32>,
    sections: Option<PlacedSections>,
}

/// Loads the image; `elf` unless the header has addresses of its own.
pub fn load(
    layout: &mut Layout,
    guest: &mut Guest,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<BootState, BootError> {
    let image = guest.image;
    let loaded = match (&header.addresses, elf) {
        (Some(fields), _) => {
            let entry =
                header.entry.ok_or_else(|| image.damaged("its Multiboot2 header has no entry point"))?;
            let (_, end) = fields.load(layout, &image)?;
            Loaded { entry: entry.into(), end, base: None, sections: None }
        }
        (None, Some(elf)) => load_elf(layout, header, elf)?,
        (None, None) => {
            return Err(image.unsupported("its Multiboot2 header has no addresses, and it is not ELF"));
        }
    };
    let entry =
        u32::try_from(loaded.entry).ok().filter(|_| layout.is_claimed(loaded.entry)).ok_or_else(|| {
            image.damaged(format!("its entry point {:#x} is not in what it loads", loaded.entry))
        })?;
    let info = place_info(layout, guest, &loaded)?;
    let mut state = BootState::protected32(layout, Protocol::Multiboot2, entry)?;
    state.gpr[gpr::RAX] = LOADER_MAGIC;
    state.gpr[gpr::RBX] = info;
    Ok(state)
}

fn load_elf(layout: &mut Layout, header: &Header, elf: &Elf) -> Result<Loaded, BootError> {
    let (start, end) = elf.extent();
    let base = match &header.relocatable {
        Some(wish) => Some(choose_base(layout, elf, wish, start, end - start)?),
        None => None,
    };
    let bias = base.map_or(0, |base| base.wrapping_sub(start));
    elf.load(layout, bias)?;
    let entry = elf.physical_entry(header.entry.map_or(elf.entry, u64::from))?;
    Ok(Loaded {
        entry: entry.wrapping_add(bias),
        end: end.wrapping_add(bias),
        base: base.map(|b| b as u32),
        sections: place_sections(layout, elf),
    })
}

/// An address for the image's first byte.
fn choose_base(
    layout: &Layout,
    elf: &Elf,
    wish: &Relocatable,
    start: u64,
    len: u64,
) -> Result<u64, BootError> {
    let align = u64::from(wish.align);
    let within = u64::from(wish.min).max(EXTENDED_START)..(u64::from(wish.max) + 1).min(LOW_RAM_END);
    let end = start.saturating_add(len);
    let as_linked = (within.start <= start && end <= within.end.min(layout.low_ram_end())).then_some(start);
    let found = match wish.preference {
        PREFER_HIGHEST => layout.find_high(len, align, within.clone()),
        PREFER_LOWEST => layout.find_low(len, align, within.clone()),
        _ => as_linked.or_else(|| layout.find_low(len, align, within.clone())),
    };
    found.ok_or_else(|| BootError::MemoryTooSmall {
        what: elf.image.name.to_string(),
        needs: within.start.saturating_add(len),
        has: layout.ram_size(),
    })
}

/// The boot information as it grows.
struct Tags(Vec<u8>);

impl Tags {
    fn push(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        self.0.extend(kind.to_le_bytes());
        self.0.extend((8 + len as u32).to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    fn push_words(&mut self, kind: u32, words: &[u32], rest: &[u8]) {
        let words: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.push(kind, &[&words, rest]);
    }
}

/// Builds the boot information; gives its address.
fn place_info(layout: &mut Layout, guest: &mut Guest, loaded: &Loaded) -> Result<u64, BootError> {
    // Total size, to be filled in, and a reserved word.
    let mut tags = Tags(vec![0; 8]);
    let cmdline = command_line(guest.image.name, guest.cmdline);
    tags.push(tag::COMMAND_LINE, &[cmdline.as_bytes(), &[0]]);
    tags.push(tag::LOADER_NAME, &[LOADER_NAME.as_bytes(), &[0]]);
    for module in place_modules(layout, guest, page_end(loaded.end))? {
        let text = [module.cmdline.as_bytes(), &[0]].concat();
        tags.push_words(tag::MODULE, &[module.start, module.end], &text);
    }
    let (lower, upper) = basic_memory(layout);
    tags.push_words(tag::BASIC_MEMORY, &[lower, upper], &[]);
    tags.push_words(tag::MEMORY_MAP, &[24, 0], &memory_map(guest));
    if let Some(PlacedSections { table, headers }) = &loaded.sections {
        let shape = [table.count, table.entry_size, table.names].map(u32::from);
        tags.push_words(tag::ELF_SECTIONS, &shape, headers);
    }
    let mut rsdp = [0; 36];
    layout.read(guest.rsdp, &mut rsdp, "the ACPI root pointer")?;
    tags.push(tag::ACPI_OLD, &[&rsdp[..20]]);
    tags.push(tag::ACPI_NEW, &[&rsdp]);
    if let Some(base) = loaded.base {
        tags.push_words(tag::LOAD_BASE, &[base], &[]);
    }
    tags.push(tag::END, &[]);
    let Tags(mut bytes) = tags;
    let total = bytes.len() as u32;
    bytes[..4].copy_from_slice(&total.to_le_bytes());
    layout.place_table(&bytes, 8, "the boot information")
}

fn memory_map(guest: &Guest) -> Vec<u8> {
    let mut map = Vec::new();
    for region in &guest.memory_map {
        let kind = match region.kind {
            MemoryKind::Usable => MAP_AVAILABLE,
            MemoryKind::Reserved => MAP_RESERVED,
        };
        map.extend(region.start.to_le_bytes());
        map.extend(region.len.to_le_bytes());
        map.extend(kind.to_le_bytes());
        map.extend(0u32.to_le_bytes());
    }
    map
}
