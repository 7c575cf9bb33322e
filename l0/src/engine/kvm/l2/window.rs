//! A piece of our address space that stands for all of an L2's physical memory: KVM has it as one memory slot, and
//! what is mapped into it is what KVM lets L2 reach. An unsafe island: address-space calls.
//!
//! Why not one slot for each range: removing a slot makes KVM drop all of that VM's translations; a write to where
//! there is no slot is told only after the instruction has been executed for the rest (KVM_EXIT_MMIO); and a slot is
//! read-only or not, as a whole. A mapping that is missing or not writable ends KVM_RUN with EFAULT at the instruction,
//! before it has done anything, and KVM drops the translations of just that mapping when it goes (MMU notifiers).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::ranges::{Change, Rights};

pub(super) struct Window {
    base: *mut libc::c_void,
    len: u64,
    file: Arc<File>,
}

// SAFETY: the pointer is an address range that belongs to this value alone; nobody here reads or writes through it.
unsafe impl Send for Window {}
// SAFETY: as above; calls on it are system calls, which the kernel orders.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves `len` bytes in which nothing is mapped; mappings will be of `file`.
    pub(super) fn reserve(len: u64, file: Arc<File>) -> std::io::Result<Self> {
        let size = usize::try_from(len).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping, at an address that the kernel picks.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, NOTHING, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { base, len, file })
    }

    /// Where it is, for KVM.
    pub(super) fn address(&self) -> u64 {
        self.base as u64
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes one change.
    pub(super) fn apply(&self, change: &Change) -> std::io::Result<()> {
        let (gpa, len, protection, flags, file, offset) = match *change {
            Change::Map { gpa, len, offset, rights } => {
                let protection = match rights {
                    Rights::Read => libc::PROT_READ,
                    Rights::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
                };
                (gpa, len, protection, libc::MAP_SHARED | libc::MAP_NORESERVE, self.file.as_raw_fd(), offset)
            }
            Change::Unmap { gpa, len } => (gpa, len, libc::PROT_NONE, NOTHING, -1, 0),
        };
        let inside = gpa.0.checked_add(len).is_some_and(|end| end <= self.len);
        let offset = libc::off_t::try_from(offset).ok();
        let (true, Some(offset), true) = (inside, offset, len > 0) else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        let at = self.base.wrapping_byte_add(gpa.0 as usize);
        // SAFETY: the range was found to be inside the window, which is this value's own.
        let got = unsafe { libc::mmap(at, len as usize, protection, flags | libc::MAP_FIXED, file, offset) };
        if got == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// An address range without memory.
const NOTHING: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and this is its last use. KVM may still have it as a slot: it then
        // finds nothing there.
        unsafe { libc::munmap(self.base, self.len as usize) };
    }
}
