//! Guest RAM: one shared memory file, mapped once, with the PC's hole below 4 GiB.
//!
//! Another engine maps the same file (KVM slots), so every engine sees the same bytes.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::boot::Mib;

/// RAM below 4 GiB ends here at the latest; above are PCI windows, ECAM, I/O APIC, HPET and local APIC.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// The least we boot anything with.
pub const MINIMUM: u64 = 2 << 20;

/// The most: what we keep for each page (decoded code, its version) must fit the host too.
pub const MAXIMUM: u64 = 1 << 40;

/// Guest memory as devices and loaders see it.
pub type GuestMemory = Arc<GuestMemoryMmap<()>>;

/// Failure to make guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not one we can make.
    #[error("guest memory of {0} bytes: give at least 2M, in whole 4K pages")]
    Size(u64),
    /// More than we make.
    #[error("guest memory of {}: give at most {}", Mib(*.0), Mib(MAXIMUM))]
    TooLarge(u64),
    /// The memory file could not be made.
    #[error("cannot create the guest's memory of {}: {source}; give the guest less with --memory", Mib(*size))]
    Create {
        /// Bytes asked for.
        size: u64,
        /// Why.
        source: std::io::Error,
    },
    /// It could not be mapped.
    #[error("cannot map the guest's memory of {}: {source}; give the guest less with --memory", Mib(*size))]
    Map {
        /// Bytes asked for.
        size: u64,
        /// Why.
        source: vm_memory::mmap::FromRangesError,
    },
}

/// The file behind guest RAM, and its mapping.
pub struct Ram {
    /// Memory as rust-vmm crates take it.
    pub memory: GuestMemory,
    /// The shared memory file; offset 0 is guest-physical 0, RAM above 4 GiB follows RAM below directly.
    pub file: Arc<File>,
    /// `(guest-physical start, length, file offset)` of each range.
    pub ranges: Vec<(u64, u64, u64)>,
}

impl Ram {
    /// Makes `size` bytes of zeroed RAM.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        if size < MINIMUM || size % 4096 != 0 {
            return Err(MemoryError::Size(size));
        }
        if size > MAXIMUM {
            return Err(MemoryError::TooLarge(size));
        }
        let create = |source| MemoryError::Create { size, source };
        // SAFETY: memfd_create takes a valid C string and returns a new descriptor or -1; on success we own it.
        let file = unsafe {
            let fd = libc::memfd_create(c"turtles-ram".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(create(std::io::Error::last_os_error()));
            }
            Arc::new(File::from_raw_fd(fd))
        };
        file.set_len(size).map_err(create)?;
        let mut ranges = vec![(0, size.min(LOW_RAM_END), 0)];
        if size > LOW_RAM_END {
            ranges.push((HIGH_RAM_START, size - LOW_RAM_END, LOW_RAM_END));
        }
        let mappings = ranges.iter().map(|&(start, len, offset)| {
            (GuestAddress(start), len as usize, Some(FileOffset::from_arc(Arc::clone(&file), offset)))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(mappings)
            .map_err(|source| MemoryError::Map { size, source })?;
        Ok(Self { memory: Arc::new(memory), file, ranges })
    }
}
