//! Executable memory for thunks and translated code: one memory file mapped twice, writable here and executable there, so that no
//! address is ever both (W^X). It only grows, up to a fixed size; an address once handed out is valid until the memory
//! is reset or dropped.
//!
//! Unsafe island: the two mappings. [`CodeMemory::append`] writes through the writable mapping to bytes that were
//! not handed out before; what was handed out changes only by [`CodeMemory::link`].

use std::io;

/// Bytes of executable memory in all; a thunk takes about a hundred.
pub(super) const CAPACITY: usize = 2 << 20;

/// Thunks start at multiples of this many bytes.
const ALIGNMENT: usize = 16;

/// Append-only executable memory.
pub(crate) struct CodeMemory {
    writable: *mut u8,
    executable: *const u8,
    capacity: usize,
    used: usize,
    /// Where the part for code that is seldom executed begins, and what is used of it.
    asides: usize,
    asides_used: usize,
}

// SAFETY: the pointers name mappings of this process that are never unmapped; writing needs `&mut self`.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Maps `capacity` bytes (a multiple of the page size).
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; the call has no other preconditions.
        let file = unsafe { libc::memfd_create(c"turtles-thunks".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        let mapped = Self::map(file, capacity);
        // SAFETY: `file` is ours and not used again; the mappings keep the memory.
        unsafe { libc::close(file) };
        let (writable, executable) = mapped?;
        Ok(Self { writable, executable, capacity, used: 0, asides: capacity, asides_used: 0 })
    }

    fn map(file: libc::c_int, capacity: usize) -> io::Result<(*mut u8, *const u8)> {
        // SAFETY: `file` is an open memory file of ours.
        if unsafe { libc::ftruncate(file, capacity as libc::off_t) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let view = |protection| {
            // SAFETY: a new mapping at an address the kernel chooses disturbs nothing.
            let at =
                unsafe { libc::mmap(std::ptr::null_mut(), capacity, protection, libc::MAP_SHARED, file, 0) };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast::<u8>()) }
        };
        let executable = view(libc::PROT_READ | libc::PROT_EXEC)?;
        let writable = view(libc::PROT_READ | libc::PROT_WRITE)?;
        Ok((writable, executable))
    }

    /// The same in two parts, the second of which begins at `asides` (a multiple of 16).
    pub(crate) fn with_asides(capacity: usize, asides: usize) -> io::Result<Self> {
        let mut memory = Self::new(capacity)?;
        memory.asides = asides;
        Ok(memory)
    }

    /// Copies `code` in and returns where it can be executed; none when the memory is full.
    pub(crate) fn append(&mut self, code: &[u8]) -> Option<*const u8> {
        let start = self.used;
        let end = start.checked_add(code.len())?;
        if end > self.asides {
            return None;
        }
        self.used = end.next_multiple_of(ALIGNMENT).min(self.asides);
        Some(self.write(start, code))
    }

    /// The same for both parts; returns where the first can be executed.
    pub(crate) fn append_parts(&mut self, [code, aside]: [&[u8]; 2]) -> Option<*const u8> {
        let end = self.asides_used.checked_add(aside.len())?;
        if end > self.capacity - self.asides {
            return None;
        }
        let at = self.append(code)?;
        self.write(self.asides + self.asides_used, aside);
        self.asides_used = end.next_multiple_of(ALIGNMENT).min(self.capacity - self.asides);
        Some(at)
    }

    /// Writes to `start`, from where on enough is free.
    fn write(&mut self, start: usize, code: &[u8]) -> *const u8 {
        // SAFETY: our callers checked that the range lies inside both mappings and was never handed out before, so nobody
        // executes or reads it; `code` is not part of the mappings (they are only reached from here).
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(start), code.len());
            self.executable.add(start)
        }
    }

    /// Where the next code will be, and what goes aside.
    pub(crate) fn next(&self) -> [u64; 2] {
        [self.used, self.asides + self.asides_used].map(|at| self.executable as u64 + at as u64)
    }

    /// Makes the jump whose displacement is `site` bytes from the start go to `target`, an address in this memory.
    /// The displacement is aligned: whoever executes the jump meanwhile goes to the old or the new target.
    pub(crate) fn link(&mut self, site: usize, target: u64) {
        let aside = site >= self.asides;
        let end = if aside { self.asides + self.asides_used } else { self.used };
        assert!(site % 4 == 0 && site + 4 <= end);
        let relative = target.wrapping_sub(self.executable as u64 + site as u64 + 4) as u32;
        // SAFETY: the four bytes lie in the writable mapping and are aligned, as both mappings are.
        unsafe {
            let at = self.writable.add(site).cast::<u32>();
            std::sync::atomic::AtomicU32::from_ptr(at).store(relative, std::sync::atomic::Ordering::Release);
        }
    }

    /// Forgets everything that was appended: only for memory whose code nobody will call again.
    pub(crate) fn reset(&mut self) {
        self.used = 0;
        self.asides_used = 0;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and whoever was handed out an address does not use it any more.
        unsafe {
            libc::munmap(self.writable.cast(), self.capacity);
            libc::munmap(self.executable.cast_mut().cast(), self.capacity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appended_code_runs_and_the_memory_is_bounded() {
        let mut memory = CodeMemory::new(4096).unwrap();
        // mov eax, N; ret
        for n in 0..64_u8 {
            let at = memory.append(&[0xb8, n, 0, 0, 0, 0xc3]).unwrap();
            // SAFETY: the bytes just appended are a function of this type.
            let function: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
            assert_eq!(function(), u32::from(n));
        }
        assert!(memory.append(&[0xc3; 4096]).is_none());
        assert!(memory.append(&[0xc3; 1024]).is_some());
    }
}
