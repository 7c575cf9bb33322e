//! Puts a guest into memory and says how to start it. There is no firmware: what a BIOS and a boot loader would
//! have done before the kernel's first instruction is done here; what runs of it in the guest is a BIOS that refuses
//! every call.
//!
//! [`load`] looks at the image's contents, not at its name, and takes in this order: a Linux bzImage; ELF with a
//! PVH note, with a Multiboot2 header, with a Multiboot1 header, without any; a file of any format with a Multiboot
//! header that carries addresses. A flat image cannot be recognized and must be asked for ([`BootSpec::flat`]).
//! Any of them may be gzip-compressed.
//!
//! Invariants: images are hostile. Every byte goes through [`layout::Layout`], which allows RAM only and each byte
//! once; every number from a file is checked before it is used.
//!
//! Must not know: engines, vCPUs, devices (they take their addresses from [`acpi`]).

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use vm_memory::GuestMemoryMmap;

pub mod acpi;
mod bios;
mod dsdt;
mod elf;
mod error;
mod flat;
mod image;
mod layout;
mod linux;
mod multiboot;
mod multiboot1;
mod multiboot2;
mod pvh;
mod state;
#[cfg(test)]
mod tests;

pub use error::{BootError, Mib};
pub use flat::{FlatMode, FlatSpec};
pub use state::{BootState, Protocol, Segment, TableRegister, gpr};

use elf::Elf;
use image::{Image, decompress};
use layout::{CONVENTIONAL_END, EXTENDED_START, FileSource, Layout, Payload};
use linux::SetupHeader;

/// What to boot.
#[derive(Clone, Debug, Default)]
pub struct BootSpec {
    /// The image; for [`load_bytes`] only its name.
    pub kernel: PathBuf,
    /// Linux's initial RAM disk; for other protocols the first module.
    pub initrd: Option<PathBuf>,
    /// Arguments for the kernel. Multiboot guests find the image's name in front of them.
    pub cmdline: String,
    /// Modules with their arguments, for PVH and Multiboot.
    pub modules: Vec<(PathBuf, String)>,
    /// vCPUs of the machine, for its ACPI tables.
    pub cpus: u32,
    /// Take the image as flat, whatever it looks like.
    pub flat: Option<FlatSpec>,
}

/// Who may use a piece of guest-physical memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MemoryKind {
    Usable,
    Reserved,
}

/// One piece of the memory map ("e820").
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemoryRegion {
    pub start: u64,
    pub len: u64,
    pub kind: MemoryKind,
}

/// The memory map of a machine with this RAM, in ascending order.
pub fn memory_map(ranges: &[(u64, u64, u64)]) -> Vec<MemoryRegion> {
    let region = |start, end: u64, kind| MemoryRegion { start, len: end - start, kind };
    let mut map = vec![
        region(0, CONVENTIONAL_END, MemoryKind::Usable),
        region(CONVENTIONAL_END, EXTENDED_START, MemoryKind::Reserved),
        region(acpi::ECAM_BASE, acpi::ECAM_BASE + acpi::ECAM_SIZE, MemoryKind::Reserved),
    ];
    for &(start, len, _) in ranges {
        let (start, end) = (start.max(EXTENDED_START), start.saturating_add(len));
        if start < end {
            map.push(region(start, end, MemoryKind::Usable));
        }
    }
    map.sort_by_key(|r| r.start);
    map
}

/// A file for the guest beside its kernel.
struct Module {
    name: String,
    cmdline: String,
    payload: Payload,
}

/// What loaders of all protocols are given.
struct Guest<'a> {
    /// The image, or its beginning if there is a [`Guest::kernel_file`].
    image: Image<'a>,
    /// Of a Linux kernel in a regular file, all of it.
    kernel_file: Option<FileSource>,
    cmdline: &'a str,
    initrd: Option<Module>,
    modules: Vec<Module>,
    memory_map: Vec<MemoryRegion>,
    rsdp: u64,
}

/// Loads the files that `spec` names into `memory`, whose `ranges` are `(guest-physical start, length, file
/// offset)`. Memory that nothing is loaded to is left as it is.
pub fn load(
    memory: &GuestMemoryMmap<()>,
    ranges: &[(u64, u64, u64)],
    spec: &BootSpec,
) -> Result<BootState, BootError> {
    let limit = Layout::new(memory, ranges).ram_size();
    let (path, error) = (&spec.kernel, read_error(&spec.kernel));
    let mut file = File::open(path).map_err(&error)?;
    let metadata = file.metadata().map_err(&error)?;
    let mut bytes = Vec::new();
    (&mut file).take(linux::HEAD).read_to_end(&mut bytes).map_err(&error)?;
    if metadata.is_file() && linux::is_linux(&Image { name: "", bytes: &bytes }) {
        let source = FileSource { file, path: path.clone(), len: metadata.len() };
        return load_guest(memory, ranges, &bytes, Some(source), spec);
    }
    let bytes = read_bounded(path, file, bytes, limit)?;
    load_guest(memory, ranges, &bytes, None, spec)
}

/// As [`load`], with the kernel's image given as bytes.
pub fn load_bytes(
    memory: &GuestMemoryMmap<()>,
    ranges: &[(u64, u64, u64)],
    kernel: &[u8],
    spec: &BootSpec,
) -> Result<BootState, BootError> {
    load_guest(memory, ranges, kernel, None, spec)
}

fn load_guest(
    memory: &GuestMemoryMmap<()>,
    ranges: &[(u64, u64, u64)],
    kernel: &[u8],
    kernel_file: Option<FileSource>,
    spec: &BootSpec,
) -> Result<BootState, BootError> {
    let mut layout = Layout::new(memory, ranges);
    let (has, needs) = (layout.low_ram_end(), crate::memory::MINIMUM);
    if has < needs {
        return Err(BootError::MemoryTooSmall { what: "a guest".to_string(), needs, has });
    }
    let name = file_name(&spec.kernel);
    if kernel.is_empty() {
        return Err(BootError::Empty { name });
    }
    check_strings(&name, spec)?;
    let bytes = decompress(&name, kernel, layout.ram_size())?;
    let image = Image { name: &name, bytes: &bytes };
    let modules = spec.modules.iter().map(|(path, cmdline)| open_module(path, cmdline, layout.ram_size()));
    let mut guest = Guest {
        image,
        kernel_file,
        cmdline: &spec.cmdline,
        initrd: spec.initrd.as_ref().map(|path| open_module(path, "", layout.ram_size())).transpose()?,
        modules: modules.collect::<Result<_, _>>()?,
        memory_map: memory_map(ranges),
        rsdp: acpi::write_tables(&layout, spec.cpus, acpi::pci_mmio64(ranges))?,
    };
    bios::write(&layout)?;
    let mut state = load_image(&mut layout, &mut guest, spec.flat.as_ref())?;
    state.rsdp = guest.rsdp;
    log::debug!("{} entered as {:?} at {:#x}", image.name, state.protocol, state.rip);
    Ok(state)
}

/// Finds out what the image is, and loads it.
fn load_image(
    layout: &mut Layout,
    guest: &mut Guest,
    flat: Option<&FlatSpec>,
) -> Result<BootState, BootError> {
    let image = guest.image;
    if let Some(flat) = flat {
        return flat::load(layout, guest, flat);
    }
    let elf = Elf::parse(image)?;
    if elf.is_none() && linux::is_linux(&image) {
        let len = guest.kernel_file.as_ref().map_or(image.len(), |file| file.len);
        return linux::load(layout, guest, &SetupHeader::parse(&image, len)?);
    }
    if let Some(elf) = &elf {
        if let Some(entry) = elf.pvh_entry()? {
            return pvh::load(layout, guest, elf, entry);
        }
    }
    // Only a header with addresses makes anything of a file that is not ELF.
    if let Some(header) = multiboot2::Header::find(&image)?.filter(|h| elf.is_some() || h.loads_any_format())
    {
        return multiboot2::load(layout, guest, &header, elf.as_ref());
    }
    if let Some(header) = multiboot1::Header::find(&image).filter(|h| elf.is_some() || h.loads_any_format()) {
        return multiboot1::load(layout, guest, &header, elf.as_ref());
    }
    match &elf {
        Some(elf) => flat::load_elf(layout, guest, elf),
        None => Err(image.unknown()),
    }
}

/// Guests end their strings with a zero byte.
fn check_strings(name: &str, spec: &BootSpec) -> Result<(), BootError> {
    let of_modules = spec.modules.iter().map(|(path, cmdline)| (file_name(path), cmdline));
    std::iter::once((name.to_string(), &spec.cmdline))
        .chain(of_modules)
        .find(|(_, cmdline)| cmdline.contains('\0'))
        .map_or(Ok(()), |(name, _)| Err(BootError::ZeroInCommandLine { name }))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn read_error(path: &Path) -> impl Fn(std::io::Error) -> BootError {
    move |source| BootError::Read { path: path.to_path_buf(), source }
}

/// Reads the rest of a file, or refuses one that is larger than the guest's memory.
fn read_bounded(path: &Path, file: File, mut bytes: Vec<u8>, limit: u64) -> Result<Vec<u8>, BootError> {
    let size = file.metadata().map_or(0, |m| m.len());
    let too_large = |needs| BootError::MemoryTooSmall { what: path.display().to_string(), needs, has: limit };
    if size > limit {
        return Err(too_large(size));
    }
    bytes.reserve((size as usize).saturating_sub(bytes.len()));
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(read_error(path))?;
    match bytes.len() as u64 {
        len if len > limit => Err(too_large(len)),
        _ => Ok(bytes),
    }
}

/// Opens a file for the guest. Its size must be known before it is placed, so a pipe is read to memory first.
fn open_module(path: &Path, cmdline: &str, limit: u64) -> Result<Module, BootError> {
    let file = File::open(path).map_err(read_error(path))?;
    let metadata = file.metadata().map_err(read_error(path))?;
    let payload = match metadata.is_file() {
        true => Payload::File(FileSource { file, path: path.to_path_buf(), len: metadata.len() }),
        false => Payload::Bytes(read_bounded(path, file, Vec::new(), limit)?),
    };
    let name = file_name(path);
    match payload.len() {
        0 => Err(BootError::Empty { name }),
        _ => Ok(Module { name, cmdline: cmdline.to_string(), payload }),
    }
}
