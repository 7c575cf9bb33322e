//! Linux's boot protocol (the kernel's Documentation/arch/x86/boot.rst), from its 64-bit or its 32-bit entry point.
//!
//! The kernel goes to its preferred address and keeps `init_size` bytes there to itself: it decompresses in place.
//! The initrd goes as high as the kernel allows; the zero page, the command line and the first tables go to low
//! memory. The real-mode part of the image is not used.
//!
//! Must not know: other boot protocols.

use std::ops::Range;

use linux_loader::loader::bootparam::{E820_MAX_ENTRIES_ZEROPAGE, boot_e820_entry, boot_params};
use vm_memory::ByteValued;

use super::error::BootError;
use super::image::Image;
use super::layout::{EXTENDED_START, Layout, PAGE, align_up};
use super::state::{BootState, Protocol, gpr};
use super::{Guest, MemoryKind};
use crate::memory::LOW_RAM_END;

/// This much of a file has the whole setup header, and tells Linux from other formats.
pub const HEAD: u64 = 4096;
const HEADER_START: u64 = 0x1f1;
const JUMP_OFFSET: u64 = 0x201;
const HEADER_MAGIC: u64 = 0x202;
/// Header fields end here at the latest; behind it the zero page has other things.
const HEADER_LIMIT: u64 = 0x290;
const SECTOR: u64 = 512;
/// The first with `cmdline_size`.
const OLDEST: u16 = 0x0206;
/// The first with `pref_address` and `init_size`.
const HAS_PREFERRED_ADDRESS: u16 = 0x020a;
/// The first with `xloadflags`.
const HAS_XLOADFLAGS: u16 = 0x020c;
const LOADED_HIGH: u8 = 1 << 0;
const QUIET: u8 = 1 << 5;
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
const LOADER_UNDEFINED: u8 = 0xff;
const NORMAL_VIDEO_MODE: u16 = 0xffff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// What an old kernel that does not say needs to decompress: a few times its size.
const GUESSED_EXPANSION: u64 = 5;

/// The fields of the setup header that decide where things go.
#[derive(Clone, Copy, Debug)]
pub struct SetupHeader {
    header_end: u64,
    payload_start: u64,
    payload_len: u64,
    initrd_max: u64,
    cmdline_max: u64,
    alignment: u64,
    relocatable: bool,
    is_64bit: bool,
    load_address: u64,
    init_size: u64,
}

/// True if this has the marks of a Linux kernel with a setup header.
pub fn is_linux(image: &Image) -> bool {
    image.slice(HEADER_MAGIC, 4) == Some(b"HdrS") && image.u16(0x1fe) == Some(0xaa55)
}

impl SetupHeader {
    /// Reads and checks the header of a file that [`is_linux`]; of the file's `len` bytes, the image has at least
    /// the header.
    pub fn parse(image: &Image, len: u64) -> Result<Self, BootError> {
        let short = || image.truncated("the setup header", HEADER_LIMIT);
        let version = image.u16(0x206).ok_or_else(short)?;
        if version < OLDEST {
            return Err(BootError::OldProtocol { name: image.name.to_string(), version });
        }
        if image.len() < HEADER_LIMIT {
            return Err(short());
        }
        Self::fields(image, version).ok_or_else(short)?.checked(image, len)
    }

    /// None if the file is too short.
    fn fields(image: &Image, version: u16) -> Option<Self> {
        let payload_start = match image.u8(HEADER_START)? {
            0 => 5,
            sectors => u64::from(sectors) + 1,
        } * SECTOR;
        let payload_len = u64::from(image.u32(0x1f4)?) * 16;
        let (load_address, init_size) = match version {
            HAS_PREFERRED_ADDRESS.. => (image.u64(0x258)?, u64::from(image.u32(0x260)?)),
            _ => (EXTENDED_START, payload_len.saturating_mul(GUESSED_EXPANSION)),
        };
        Some(Self {
            header_end: (HEADER_MAGIC + u64::from(image.u8(JUMP_OFFSET)?)).min(HEADER_LIMIT),
            payload_start,
            payload_len,
            initrd_max: image.u32(0x22c)?.into(),
            cmdline_max: image.u32(0x238)?.into(),
            alignment: image.u32(0x230)?.into(),
            relocatable: image.u8(0x234)? != 0,
            is_64bit: version >= HAS_XLOADFLAGS && image.u16(0x236)? & XLF_KERNEL_64 != 0,
            load_address,
            init_size,
        })
    }

    fn checked(self, image: &Image, len: u64) -> Result<Self, BootError> {
        if image.u8(0x211).is_none_or(|flags| flags & LOADED_HIGH == 0) {
            return Err(image.unsupported("it is a zImage, which loads below 1M: build a bzImage"));
        }
        let end = self.payload_start + self.payload_len;
        // The size is in whole paragraphs; the last may be cut.
        if end >= len + 16 {
            let name = image.name.to_string();
            return Err(BootError::Truncated { name, what: "the kernel", needs: end, has: len });
        }
        if self.payload_len == 0 {
            return Err(image.damaged("its header says the kernel has no bytes"));
        }
        if self.header_end < HEADER_LIMIT.min(0x23c) {
            return Err(image.damaged("its setup header is shorter than its version says"));
        }
        if self.relocatable && !self.alignment.is_power_of_two() {
            return Err(image.damaged(format!("its alignment {:#x} is not a power of two", self.alignment)));
        }
        Ok(self)
    }

    /// Where in a file of `len` bytes the kernel is, from its 32-bit entry point on.
    fn payload(&self, len: u64) -> Range<u64> {
        self.payload_start..(self.payload_start + self.payload_len).min(len)
    }

    /// Where the kernel goes, and the end of what it uses while it decompresses.
    ///
    /// A relocatable kernel that finds itself below its preferred address moves up to it, so there is no use in
    /// trying lower ones, and in the one piece of RAM that starts at zero no higher address is easier.
    fn place(&self, image: &Image) -> Result<(u64, u64), BootError> {
        let wanted = self.load_address;
        let aligned = if self.relocatable { align_up(wanted, self.alignment) } else { Some(wanted) };
        let size = self.init_size.max(self.payload_len);
        let start = aligned.filter(|&a| (EXTENDED_START..LOW_RAM_END).contains(&a));
        match start.and_then(|start| Some((start, start.checked_add(size)?))) {
            Some(place) => Ok(place),
            None => {
                Err(image.damaged(format!("it asks to be loaded at {wanted:#x}, where no kernel can be")))
            }
        }
    }
}

/// Loads the kernel and all that belongs to it.
pub fn load(layout: &mut Layout, guest: &Guest, header: &SetupHeader) -> Result<BootState, BootError> {
    let image = guest.image;
    if !guest.modules.is_empty() {
        return Err(image.unsupported("Linux takes no modules, only one initrd: use --initrd"));
    }
    let max = usize::try_from(header.cmdline_max).unwrap_or(usize::MAX);
    if guest.cmdline.len() > max {
        let (name, len) = (image.name.to_string(), guest.cmdline.len());
        return Err(BootError::CommandLineTooLong { name, len, max });
    }
    let (start, end) = header.place(&image)?;
    let what = format!("the kernel {}", image.name);
    layout.claim(start, end - start, &what)?;
    match &guest.kernel_file {
        Some(file) => layout.write_file(start, file, header.payload(file.len), &what)?,
        None => {
            let part = header.payload(image.len());
            let needs = part.end;
            let bytes = image.slice(part.start, part.end - part.start);
            layout.write(start, bytes.ok_or_else(|| image.truncated("the kernel", needs))?, &what)?;
        }
    }
    let initrd = load_initrd(layout, guest, header, end)?;
    let mut cmdline = guest.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    let zero_page = layout.reserve_table(PAGE, PAGE, "the zero page")?;
    let cmdline = layout.place_table(&cmdline, 16, "the command line")?;
    let params = zero_page_contents(guest, header, start, cmdline, initrd)?;
    layout.write(zero_page, params.as_slice(), "the zero page")?;
    let mut state = if header.is_64bit {
        BootState::long64(layout, Protocol::Linux64, start + ENTRY_64)?
    } else {
        BootState::protected32(layout, Protocol::Linux32, start as u32)?
    };
    state.gpr[gpr::RSI] = zero_page;
    Ok(state)
}

/// Address and size of the initrd; zeroes without one.
fn load_initrd(
    layout: &mut Layout,
    guest: &Guest,
    header: &SetupHeader,
    kernel_end: u64,
) -> Result<(u64, u64), BootError> {
    let Some(initrd) = &guest.initrd else { return Ok((0, 0)) };
    let size = initrd.payload.len();
    let limit = (header.initrd_max + 1).min(layout.low_ram_end());
    let at = layout.find_high(size, PAGE, EXTENDED_START..limit).ok_or_else(|| {
        let needs = kernel_end.saturating_add(size).saturating_add(PAGE - 1) & !(PAGE - 1);
        let (name, has) = (initrd.name.clone(), layout.ram_size());
        match needs > header.initrd_max {
            true => BootError::InitrdAboveLimit {
                name,
                size,
                kernel: guest.image.name.to_string(),
                max: header.initrd_max + 1,
            },
            false => BootError::ModuleTooLarge { name, size, has, needs },
        }
    })?;
    layout.claim(at, size, "the initrd")?;
    layout.write_payload(at, &initrd.payload, "the initrd")?;
    Ok((at, size))
}

/// The zero page: the kernel's own header, completed, and what firmware would have found out.
fn zero_page_contents(
    guest: &Guest,
    header: &SetupHeader,
    start: u64,
    cmdline: u64,
    (initrd, initrd_size): (u64, u64),
) -> Result<boot_params, BootError> {
    let mut params = boot_params::default();
    let own = guest.image.slice(HEADER_START, header.header_end - HEADER_START);
    let fields = params.as_mut_slice().get_mut(HEADER_START as usize..header.header_end as usize);
    if let (Some(own), Some(fields)) = (own, fields) {
        fields.copy_from_slice(own);
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.vid_mode = NORMAL_VIDEO_MODE;
    params.hdr.loadflags &= LOADED_HIGH | QUIET;
    params.hdr.code32_start = start as u32;
    params.hdr.ramdisk_image = initrd as u32;
    params.hdr.ramdisk_size = initrd_size as u32;
    params.hdr.cmd_line_ptr = cmdline as u32;
    params.hdr.setup_data = 0;
    params.acpi_rsdp_addr = guest.rsdp;
    if guest.memory_map.len() > E820_MAX_ENTRIES_ZEROPAGE {
        return Err(guest.image.unsupported("the memory map has more entries than the zero page holds"));
    }
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    for (entry, region) in table.iter_mut().zip(&guest.memory_map) {
        let kind = match region.kind {
            MemoryKind::Usable => E820_RAM,
            MemoryKind::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry { addr: region.start, size: region.len, r#type: kind };
    }
    params.e820_table = table;
    params.e820_entries = guest.memory_map.len() as u8;
    Ok(params)
}
