//! What can be wrong with an image, or with the machine it is to run on: one line each, saying what to do.

use std::fmt;
use std::path::PathBuf;

/// A size as people read it: whole MiB, rounded up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mib(pub u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0.div_ceil(1 << 20))
    }
}

fn read_hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => "; check the path",
        std::io::ErrorKind::IsADirectory => "; give a file",
        std::io::ErrorKind::PermissionDenied => "; change its permissions, or run as a user who may read it",
        _ => "",
    }
}

/// Failure to load a guest.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot read {}: {source}{}", path.display(), read_hint(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file has no bytes.
    #[error("{name} is empty: check that its download or build finished")]
    Empty {
        /// The image.
        name: String,
    },
    /// An image ends too early.
    #[error(
        "{name} is truncated: {what} needs {needs} bytes and the file has {has}; fetch or build it again"
    )]
    Truncated {
        /// The image.
        name: String,
        /// The part that is cut off.
        what: &'static str,
        /// The file size this part asks for.
        needs: u64,
        /// The real size.
        has: u64,
    },
    /// An image contradicts itself.
    #[error("{name} is damaged: {what}; fetch or build it again")]
    Damaged {
        /// The image.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// No format we load.
    #[error(
        "{name} is {found}: give a Linux bzImage, an ELF file (PVH, Multiboot or plain), or say where to load \
         a flat image with --flat"
    )]
    UnknownFormat {
        /// The image.
        name: String,
        /// What it seems to be.
        found: &'static str,
    },
    /// A known format that asks for something this machine does not have.
    #[error("{name} cannot be booted here: {what}")]
    Unsupported {
        /// The image.
        name: String,
        /// What is missing, and what to do.
        what: String,
    },
    /// A bzImage from before boot protocol 2.06.
    #[error(
        "{name} speaks Linux boot protocol {}.{:02}, older than 2.06: use a kernel from 2.6.22 on",
        version >> 8, version & 0xff
    )]
    OldProtocol {
        /// The image.
        name: String,
        /// The version field.
        version: u16,
    },
    /// Guest RAM cannot hold something.
    #[error("{what} needs guest memory of at least {}, and it has {}: raise --memory", Mib(*needs), Mib(*has))]
    MemoryTooSmall {
        /// What does not fit.
        what: String,
        /// RAM size that would do.
        needs: u64,
        /// RAM there is.
        has: u64,
    },
    /// An image wants addresses where this machine has no RAM, however much it is given.
    #[error(
        "{what} wants addresses {start:#x} to {last:#x}, which are not RAM: RAM is below 3G and above 4G; link \
         the image elsewhere"
    )]
    OutsideRam {
        /// What was to be placed.
        what: String,
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
    },
    /// Two things want the same addresses.
    #[error("{what} ({start:#x} to {last:#x}) overlaps {other}: link the image elsewhere")]
    Overlap {
        /// What was to be placed.
        what: String,
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
        /// What is there.
        other: String,
    },
    /// An initrd or module and the rest together do not fit.
    #[error("{name} ({}) does not fit beside the rest in {} of memory: raise --memory to {}, or make it smaller",
        Mib(*size), Mib(*has), Mib(*needs))]
    ModuleTooLarge {
        /// The initrd or module.
        name: String,
        /// Its size.
        size: u64,
        /// RAM there is.
        has: u64,
        /// RAM size that would do.
        needs: u64,
    },
    /// The kernel takes no initrd as large, whatever the memory.
    #[error("{name} ({}) does not fit below the {} that {kernel} takes an initrd at: make it smaller",
        Mib(*size), Mib(*max))]
    InitrdAboveLimit {
        /// The initrd.
        name: String,
        /// Its size.
        size: u64,
        /// The kernel.
        kernel: String,
        /// Where the initrd must end.
        max: u64,
    },
    /// The command line is longer than the guest takes.
    #[error("the command line has {len} bytes and {name} takes at most {max}: shorten --cmdline")]
    CommandLineTooLong {
        /// The image.
        name: String,
        /// Its length.
        len: usize,
        /// What the guest takes.
        max: usize,
    },
    /// A string with a zero byte in it.
    #[error("the command line of {name} contains a zero byte: the guest would see it cut off there")]
    ZeroInCommandLine {
        /// Whose.
        name: String,
    },
    /// More vCPUs than the tables can name.
    #[error(
        "ACPI tables for {cpus} vCPUs take {len} bytes, more than the {max} of the BIOS area: use fewer --cpus"
    )]
    TooManyCpus {
        /// vCPUs asked for.
        cpus: u32,
        /// Size of the tables.
        len: u64,
        /// Room for them.
        max: u64,
    },
    /// gzip could not be undone.
    #[error("cannot decompress {name}: {source}; fetch or build it again")]
    Decompress {
        /// The image.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// Guest memory could not be written.
    #[error("cannot write {what} to guest memory: {source}")]
    GuestMemory {
        /// What was written.
        what: String,
        /// Why.
        source: vm_memory::GuestMemoryError,
    },
}

impl BootError {
    /// The error for a module that found no free range: with as much memory again as it is large, it would.
    pub(super) fn no_room_for_module(name: &str, size: u64, has: u64) -> Self {
        Self::ModuleTooLarge { name: name.to_string(), size, has, needs: has.saturating_add(size) }
    }
}
