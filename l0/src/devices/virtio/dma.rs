//! The one way of devices into guest memory: checked against RAM, and every write is shown to the observer.
//!
//! `unsafe` here: scattered reads and writes of files go straight from and to guest memory, without a copy.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::DmaObserver;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;

/// A piece of guest memory, as a descriptor names it: not checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u32,
}

/// Pieces of guest memory that form one buffer.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    list: Vec<Segment>,
    len: u64,
}

impl Segments {
    /// Appends a piece; empty ones leave no trace.
    pub fn push(&mut self, segment: Segment) {
        if segment.len != 0 {
            self.len += u64::from(segment.len);
            self.list.push(segment);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn iter(&self) -> impl Iterator<Item = Segment> + '_ {
        self.list.iter().copied()
    }

    /// The first `at` bytes (or all, if there are fewer) and the rest.
    pub fn split_at(&self, at: u64) -> (Self, Self) {
        let (mut head, mut tail) = (Self::default(), Self::default());
        for Segment { gpa, len } in self.iter() {
            let first = u64::from(len).min(at - head.len);
            head.push(Segment { gpa, len: first as u32 });
            tail.push(Segment { gpa: gpa.wrapping_add(first), len: len - first as u32 });
        }
        (head, tail)
    }
}

/// Why a transfer did not happen, or not in full.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// The guest named memory that is not RAM, or a buffer too short for what it wants.
    #[error("guest buffer at {gpa:#x} ({len} bytes) is not in RAM or too short")]
    Buffer {
        /// Where.
        gpa: u64,
        /// How long.
        len: u64,
    },
    /// The host refused.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Guest memory as devices use it.
#[derive(Clone)]
pub struct Dma {
    memory: GuestMemory,
    observer: Arc<dyn DmaObserver>,
}

impl Dma {
    /// Memory whose changes `observer` is told.
    pub fn new(memory: GuestMemory, observer: Arc<dyn DmaObserver>) -> Self {
        Self { memory, observer }
    }

    /// For the rings, which the queue crate accesses itself.
    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Tells the observer of a write that went around this type.
    pub(super) fn wrote(&self, gpa: u64, len: u64) {
        self.observer.wrote(gpa, len);
    }

    /// Fills `data` from `offset` of a buffer.
    pub fn read(&self, from: &Segments, offset: u64, data: &mut [u8]) -> Result<(), DmaError> {
        for (gpa, at, len) in pieces(from, offset, data.len())? {
            let part = &mut data[at..at + len];
            self.memory.read_slice(part, GuestAddress(gpa)).map_err(|_| bad(gpa, len as u64))?;
        }
        Ok(())
    }

    /// Writes `data` at `offset` of a buffer.
    pub fn write(&self, to: &Segments, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        for (gpa, at, len) in pieces(to, offset, data.len())? {
            // Resolved as a whole first: a piece that is not all RAM is not written at all.
            let slice = self.memory.get_slice(GuestAddress(gpa), len).map_err(|_| bad(gpa, len as u64))?;
            slice.copy_from(&data[at..at + len]);
            self.observer.wrote(gpa, len as u64);
        }
        Ok(())
    }

    /// Fills a buffer from `file` at `position`. The whole buffer must be RAM, or nothing happens.
    pub fn read_file(&self, to: &Segments, file: &File, position: u64) -> Result<(), DmaError> {
        let result = self.transfer(to, |iov, done| {
            let at = (position.saturating_add(done)) as libc::off64_t;
            // SAFETY: the vectors point into guest RAM (`iovecs`), which `self` keeps mapped; nothing in Rust
            // refers to these bytes, they are only ever reached through volatile or atomic accesses.
            unsafe { libc::preadv64(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, at) }
        });
        if !matches!(result, Err(DmaError::Buffer { .. })) {
            to.iter().for_each(|segment| self.observer.wrote(segment.gpa, segment.len.into()));
        }
        result
    }

    /// Writes a buffer to `file` at `position`. The whole buffer must be RAM, or nothing happens.
    pub fn write_file(&self, from: &Segments, file: &File, position: u64) -> Result<(), DmaError> {
        self.transfer(from, |iov, done| {
            let at = (position.saturating_add(done)) as libc::off64_t;
            // SAFETY: as in `read_file`; the kernel only reads.
            unsafe { libc::pwritev64(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int, at) }
        })
    }

    /// Sends a buffer as one message (a packet) to `file`.
    pub fn send(&self, from: &Segments, file: &File) -> Result<(), DmaError> {
        let iov = self.iovecs(from)?;
        // SAFETY: as in `read_file`; the kernel only reads.
        let sent = unsafe { libc::writev(file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
        if sent < 0 { Err(io::Error::last_os_error().into()) } else { Ok(()) }
    }

    /// Gives whole pages of `gpa..gpa + len` back to the host; the guest reads zeroes there afterwards. All of
    /// it must be in one range of RAM that has a file.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<(), DmaError> {
        let start = gpa.checked_next_multiple_of(PAGE).ok_or(bad(gpa, len))?;
        let end = gpa.checked_add(len).ok_or(bad(gpa, len))? / PAGE * PAGE;
        let Some(len) = end.checked_sub(start).filter(|&len| len != 0) else { return Ok(()) };
        let region = self.memory.find_region(GuestAddress(start)).ok_or(bad(start, len))?;
        let MemoryRegionAddress(offset) =
            region.to_region_addr(GuestAddress(start)).ok_or(bad(start, len))?;
        if region.len() - offset < len {
            return Err(bad(start, len));
        }
        let file = region.file_offset().ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        let at = file.start().saturating_add(offset);
        fallocate(file.file(), FallocateMode::PunchHole, true, at, len)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        self.observer.wrote(start, len);
        Ok(())
    }

    fn iovecs(&self, segments: &Segments) -> Result<Vec<libc::iovec>, DmaError> {
        let resolve = |Segment { gpa, len }| {
            let slice =
                self.memory.get_slice(GuestAddress(gpa), len as usize).map_err(|_| bad(gpa, len.into()))?;
            Ok(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        };
        segments.iter().map(resolve).collect()
    }

    /// Calls `step` with what is left of the buffer and the count of bytes done, until all are.
    fn transfer(
        &self,
        segments: &Segments,
        mut step: impl FnMut(&[libc::iovec], u64) -> isize,
    ) -> Result<(), DmaError> {
        let mut iov = self.iovecs(segments)?;
        let (mut first, mut done) = (0, 0u64);
        while first < iov.len() {
            let moved = step(&iov[first..], done);
            if moved < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error.into());
            }
            if moved == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            done += moved as u64;
            first += drop_front(&mut iov[first..], moved as usize);
        }
        Ok(())
    }
}

fn bad(gpa: u64, len: u64) -> DmaError {
    DmaError::Buffer { gpa, len }
}

/// Takes `count` bytes off the front; returns how many vectors are used up.
fn drop_front(iov: &mut [libc::iovec], mut count: usize) -> usize {
    for (i, vector) in iov.iter_mut().enumerate() {
        if count < vector.iov_len {
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(count).cast();
            vector.iov_len -= count;
            return i;
        }
        count -= vector.iov_len;
    }
    iov.len()
}

/// The parts of `segments` that hold `len` bytes from `offset`: address, place in the caller's data, length.
fn pieces(
    segments: &Segments,
    offset: u64,
    len: usize,
) -> Result<impl Iterator<Item = (u64, usize, usize)> + '_, DmaError> {
    if offset.checked_add(len as u64).is_none_or(|end| end > segments.len()) {
        return Err(bad(segments.list.first().map_or(0, |segment| segment.gpa), segments.len()));
    }
    let mut skip = offset;
    let mut at = 0;
    Ok(segments.iter().filter_map(move |segment| {
        let skipped = skip.min(segment.len.into());
        skip -= skipped;
        let part = (u64::from(segment.len) - skipped).min((len - at) as u64) as usize;
        at += part;
        (part != 0).then(|| (segment.gpa.wrapping_add(skipped), at - part, part))
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::memory::Ram;
    use crate::vcpu_signal::lock;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u64)>>);

    impl DmaObserver for Recorder {
        fn wrote(&self, gpa: u64, len: u64) {
            lock(&self.0).push((gpa, len));
        }
    }

    const SIZE: u64 = 4 << 20;

    fn dma() -> (Dma, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Dma::new(Ram::new(SIZE).expect("RAM").memory, recorder.clone()), recorder)
    }

    fn segments(list: &[(u64, u32)]) -> Segments {
        let mut segments = Segments::default();
        list.iter().for_each(|&(gpa, len)| segments.push(Segment { gpa, len }));
        segments
    }

    #[test]
    fn a_buffer_in_pieces_reads_back_and_is_observed() {
        let (dma, recorder) = dma();
        let buffer = segments(&[(0x1000, 3), (0x5000, 0), (0x2000, 4), (0x3000, 8)]);
        dma.write(&buffer, 2, b"abcdefg").expect("in RAM");
        let mut data = [0; 7];
        dma.read(&buffer, 2, &mut data).expect("in RAM");
        assert_eq!(&data, b"abcdefg");
        let mut middle = [0; 4];
        dma.read(&segments(&[(0x2000, 4)]), 0, &mut middle).expect("in RAM");
        assert_eq!(&middle, b"bcde");
        assert_eq!(*lock(&recorder.0), [(0x1002, 1), (0x2000, 4), (0x3000, 2)]);
    }

    #[test]
    fn splitting_keeps_every_byte() {
        let (head, tail) = segments(&[(0x1000, 16), (0x2000, 16)]).split_at(20);
        assert_eq!((head.len(), tail.len()), (20, 12));
        assert!(head.iter().eq([Segment { gpa: 0x1000, len: 16 }, Segment { gpa: 0x2000, len: 4 }]));
        assert!(tail.iter().eq([Segment { gpa: 0x2004, len: 12 }]));
        let (head, tail) = segments(&[(0, 8)]).split_at(100);
        assert_eq!((head.len(), tail.len()), (8, 0));
    }

    #[test]
    fn buffers_outside_ram_are_refused_without_a_trace() {
        let (dma, recorder) = dma();
        let file = vmm_sys_util::tempfile::TempFile::new().expect("temporary file").into_file();
        file.set_len(0x2000).expect("length");
        for list in
            [&[(0x1000, 16), (SIZE - 8, 16)][..], &[(u64::MAX - 4, 16)], &[(0x1000, 8), (1 << 52, u32::MAX)]]
        {
            let buffer = segments(list);
            assert!(matches!(dma.read_file(&buffer, &file, 0), Err(DmaError::Buffer { .. })));
            assert!(matches!(dma.write_file(&buffer, &file, 0), Err(DmaError::Buffer { .. })));
            assert!(dma.send(&buffer, &file).is_err());
        }
        assert!(dma.write(&segments(&[(SIZE - 8, 16)]), 0, &[1; 16]).is_err());
        assert!(dma.write(&segments(&[(0x1000, 8)]), 1, &[1; 8]).is_err(), "too short");
        assert!(dma.read(&segments(&[(0x1000, 8)]), u64::MAX, &mut [0; 8]).is_err());
        assert!(lock(&recorder.0).is_empty());
        assert_eq!(file.metadata().expect("metadata").len(), 0x2000, "nothing was written");
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let (dma, recorder) = dma();
        let file = vmm_sys_util::tempfile::TempFile::new().expect("temporary file").into_file();
        let buffer = segments(&[(0x1000, 5), (0x2000, 6)]);
        dma.write(&buffer, 0, b"hello world").expect("in RAM");
        dma.write_file(&buffer, &file, 7).expect("file takes it");
        let other = segments(&[(0x8000, 11)]);
        dma.read_file(&other, &file, 7).expect("file has it");
        let mut data = [0; 11];
        dma.read(&other, 0, &mut data).expect("in RAM");
        assert_eq!(&data, b"hello world");
        assert_eq!(lock(&recorder.0).last(), Some(&(0x8000, 11)));
        let end = dma.read_file(&other, &file, 8);
        assert!(matches!(end, Err(DmaError::Host(error)) if error.kind() == io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn discarding_zeroes_whole_pages_only() {
        let (dma, recorder) = dma();
        let all = segments(&[(0x10000, 0x4000)]);
        dma.write(&all, 0, &[7; 0x4000]).expect("in RAM");
        lock(&recorder.0).clear();
        dma.discard(0x10800, 0x2900).expect("in RAM");
        let mut data = vec![0; 0x4000];
        dma.read(&all, 0, &mut data).expect("in RAM");
        let zeroes: Vec<usize> = (0..4).filter(|page| data[page * 4096] == 0).collect();
        assert_eq!(zeroes, [1, 2]);
        assert_eq!(*lock(&recorder.0), [(0x11000, 0x2000)]);
        dma.discard(0x10001, 0xfff).expect("no whole page is no error");
        assert!(dma.discard(SIZE - 0x1000, 0x2000).is_err());
        assert!(dma.discard(u64::MAX - 0xfff, 0x1000).is_err());
        assert!(dma.discard(0x1000, u64::MAX).is_err());
    }
}
