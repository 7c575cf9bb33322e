//! The block device: a raw image file, or a block device of the host.
//!
//! A request is checked as a whole, its place on the disk and its place in RAM, before the first byte moves: a
//! request that fails for what the driver said leaves the image as it was. Write-back caching: what a FLUSH
//! confirmed is on the host's disk (fdatasync); a driver without FLUSH gets write-through.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::devices::MachineControl;

use super::dma::{Dma, DmaError, Segments};
use super::queue::{Chain, QueueError, VirtQueue};
use super::{DeviceConfig, DeviceType, FixedConfig, VirtioDevice, feature};

/// Bytes of a sector; virtio counts in these whatever the disk's blocks are.
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// A request's header and status take two descriptors of a chain as long as the queue.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Type, reserved, sector.
const HEADER: u64 = 16;
/// Length of what GET_ID returns.
const ID_LEN: usize = 20;
/// Ranges of one discard or write-zeroes request: sector, count, flags.
const RANGE: u64 = 16;
const MAX_RANGES: u32 = 32;
/// Sectors of one such range (128 MiB): where the file system cannot do it, we write that much.
const MAX_RANGE_SECTORS: u32 = 1 << 18;
/// Write-zeroes: the device may deallocate.
const FLAG_UNMAP: u32 = 1;
/// Zeroes written at once where the file system cannot make them.
const ZEROES: usize = 64 << 10;

/// Whether the guest may write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// It may.
    ReadWrite,
    /// The image stays as it is.
    ReadOnly,
}

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It does not open.
    #[error("cannot open disk image {path}: {source}{hint}")]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// It is a directory, a pipe or the like.
    #[error("disk image {0} is neither a file nor a block device; give a raw image file")]
    Kind(PathBuf),
    /// Its size is no whole number of sectors.
    #[error(
        "disk image {path} has {size} bytes, which is not a whole number of 512-byte sectors: truncated, or not \
         a raw image? To use it anyway, extend it: truncate -s %512 {path}"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// It has no bytes.
    #[error("disk image {0} is empty; give it a size first, for example: truncate -s 1G {0}")]
    Empty(PathBuf),
    /// Another process has it.
    #[error(
        "disk image {0} is in use by another process; stop that one, or open the image read-only in both"
    )]
    InUse(PathBuf),
}

/// A virtio block device.
pub struct Block {
    image: File,
    path: PathBuf,
    access: Access,
    sectors: u64,
    id: [u8; ID_LEN],
    /// The driver cannot flush, so every write must be on the disk before it is confirmed.
    write_through: bool,
    complained: bool,
    /// Whom to ask to stop when the host has no room for a write.
    control: Option<Arc<dyn MachineControl>>,
    /// There was no room for a write: nothing more is written, so that the image stays as a power failure would have
    /// left it then, which file systems recover from.
    frozen: bool,
}

/// How a request ends, beside success.
enum Failure {
    Io,
    Unsupported,
}

impl From<DmaError> for Failure {
    fn from(_: DmaError) -> Self {
        Failure::Io
    }
}

impl Block {
    /// Opens `path` as a disk. It is locked against other processes, ours or whoever else locks (flock).
    /// `serial` (20 bytes of it) is what the guest sees as the disk's serial number.
    pub fn open(path: &Path, access: Access, serial: &str) -> Result<Self, BlockError> {
        let open_error = |source: io::Error| {
            let hint = match source.kind() {
                io::ErrorKind::NotFound => "; create it first, for example with truncate -s 1G",
                io::ErrorKind::PermissionDenied if access == Access::ReadWrite => {
                    "; change its permissions, or open it read-only (,ro)"
                }
                io::ErrorKind::ReadOnlyFilesystem => "; open it read-only (,ro)",
                _ => "",
            };
            BlockError::Open { path: path.to_owned(), source, hint }
        };
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(open_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::Kind(path.to_owned()));
        }
        let write = access == Access::ReadWrite;
        let mut image = OpenOptions::new().read(true).write(write).open(path).map_err(open_error)?;
        lock_image(&image, access).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => BlockError::InUse(path.to_owned()),
            _ => open_error(source),
        })?;
        let size = image.seek(SeekFrom::End(0)).map_err(open_error)?;
        if size == 0 {
            return Err(BlockError::Empty(path.to_owned()));
        }
        if size % SECTOR != 0 {
            return Err(BlockError::Size { path: path.to_owned(), size });
        }
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self {
            image,
            path: path.to_owned(),
            access,
            sectors: size / SECTOR,
            id,
            write_through: true,
            complained: false,
            control: None,
            frozen: false,
        })
    }

    /// A host without room for a write ends the run through `control`, rather than giving the guest an I/O error.
    #[must_use]
    pub fn stopping(self, control: Arc<dyn MachineControl>) -> Self {
        Self { control: Some(control), ..self }
    }

    /// Serves one request; returns how many bytes of the writable part are the answer.
    fn serve(&mut self, chain: &Chain, dma: &Dma) -> Result<u32, QueueError> {
        let Some(data_len) = chain.writable.len().checked_sub(1) else {
            return Err(QueueError::Chain("a block request without room for its status"));
        };
        let (data, status) = chain.writable.split_at(data_len);
        let result = self.execute(chain, &data, dma);
        let code = match result {
            Ok(_) => VIRTIO_BLK_S_OK,
            Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        if dma.write(&status, 0, &[code as u8]).is_err() {
            return Ok(0); // nowhere to say so
        }
        // The length counts from the front without gaps, so the status counts only behind complete data.
        let complete = result.is_ok_and(|written| written == data_len) || data_len == 0;
        Ok(if complete { u32::try_from(chain.writable.len()).unwrap_or(u32::MAX) } else { 0 })
    }

    /// Does what the header says; returns how many bytes it put into `data`.
    fn execute(&mut self, chain: &Chain, data: &Segments, dma: &Dma) -> Result<u64, Failure> {
        let mut header = [0; HEADER as usize];
        dma.read(&chain.readable, 0, &mut header)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (_, payload) = chain.readable.split_at(HEADER);
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                let position = self.position(sector, data.len())?;
                let result = dma.read_file(data, &self.image, position);
                self.report(result).map(|()| data.len())
            }
            VIRTIO_BLK_T_OUT => {
                let position = self.position(sector, payload.len())?;
                self.check_writable()?;
                let result = dma.write_file(&payload, &self.image, position);
                self.report(result)?;
                self.after_write()
            }
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => {
                let len = data.len().min(ID_LEN as u64);
                dma.write(data, 0, &self.id[..len as usize])?;
                Ok(len)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.check_writable()?;
                self.ranges(kind, &payload, dma)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.access == Access::ReadWrite && !self.frozen { Ok(()) } else { Err(Failure::Io) }
    }

    /// The place of `len` bytes from `sector`, if the disk has it.
    fn position(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len / SECTOR).filter(|&end| end <= self.sectors);
        if len % SECTOR != 0 || end.is_none() { Err(Failure::Io) } else { Ok(sector * SECTOR) }
    }

    /// Discard and write-zeroes. All ranges are checked before the first is touched.
    fn ranges(&mut self, kind: u32, payload: &Segments, dma: &Dma) -> Result<u64, Failure> {
        if payload.is_empty() || payload.len() % RANGE != 0 || payload.len() > RANGE * u64::from(MAX_RANGES) {
            return Err(Failure::Io);
        }
        let mut bytes = vec![0; payload.len() as usize];
        dma.read(payload, 0, &mut bytes)?;
        let mut ranges = Vec::new();
        for range in bytes.chunks_exact(RANGE as usize) {
            let word =
                |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
            let (sector, count, flags) = (u64::from(word(4)) << 32 | u64::from(word(0)), word(8), word(12));
            let known = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            if count > MAX_RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let len = u64::from(count) * SECTOR;
            ranges.push((self.position(sector, len)?, len, flags));
        }
        for (position, len, flags) in ranges.into_iter().filter(|&(_, len, _)| len != 0) {
            let result = if kind == VIRTIO_BLK_T_DISCARD {
                self.discard(position, len)
            } else {
                self.write_zeroes(position, len, flags)
            };
            self.report(result.map_err(DmaError::Host))?;
        }
        self.after_write()
    }

    /// A hint: where the file system cannot, nothing happens.
    fn discard(&self, position: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.image, FallocateMode::PunchHole, true, position, len) {
            Err(error) if error.errno() != libc::EOPNOTSUPP => {
                Err(io::Error::from_raw_os_error(error.errno()))
            }
            _ => Ok(()),
        }
    }

    fn write_zeroes(&self, position: u64, len: u64, flags: u32) -> io::Result<()> {
        let mode = if flags & FLAG_UNMAP != 0 { FallocateMode::PunchHole } else { FallocateMode::ZeroRange };
        match fallocate(&self.image, mode, true, position, len) {
            Ok(()) => return Ok(()),
            Err(error) if error.errno() == libc::EOPNOTSUPP => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
        let zeroes = [0; ZEROES];
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROES as u64);
            self.image.write_all_at(&zeroes[..part as usize], position + done)?;
            done += part;
        }
        Ok(())
    }

    fn after_write(&mut self) -> Result<u64, Failure> {
        if self.write_through { self.flush() } else { Ok(0) }
    }

    fn flush(&mut self) -> Result<u64, Failure> {
        if self.frozen {
            return Err(Failure::Io);
        }
        let result = if self.access == Access::ReadWrite { self.image.sync_data() } else { Ok(()) };
        self.report(result.map_err(DmaError::Host)).map(|()| 0)
    }

    /// The host's reason is lost to the guest, so the first one goes to the person who runs us.
    fn report(&mut self, result: Result<(), DmaError>) -> Result<(), Failure> {
        if let Err(DmaError::Host(error)) = &result {
            if let (io::ErrorKind::StorageFull, Some(control)) = (error.kind(), &self.control) {
                self.frozen = true;
                let path = self.path.display();
                control.fail(format!(
                    "disk image {path}: {error}: the guest was stopped at the first write that found no room, the \
                     image is as after a power failure; make room on the host and start it again"
                ));
                return Err(Failure::Io);
            }
            let hint = match error.kind() {
                io::ErrorKind::StorageFull => "; make room on the host, the guest's writes fail until then",
                io::ErrorKind::UnexpectedEof => "; something made the file shorter while it was in use",
                _ => "",
            };
            if !std::mem::replace(&mut self.complained, true) {
                log::error!("disk image {}: {error}{hint}", self.path.display());
            }
        }
        result.map_err(Failure::from)
    }
}

/// Takes the advisory lock: shared for readers.
fn lock_image(image: &File, access: Access) -> io::Result<()> {
    let mode = if access == Access::ReadOnly { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: flock takes no pointers; the descriptor is open as long as `image` is borrowed.
    let result = unsafe { libc::flock(image.as_raw_fd(), mode | libc::LOCK_NB) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always =
            feature(VIRTIO_BLK_F_SEG_MAX) | feature(VIRTIO_BLK_F_BLK_SIZE) | feature(VIRTIO_BLK_F_FLUSH);
        always
            | match self.access {
                Access::ReadOnly => feature(VIRTIO_BLK_F_RO),
                Access::ReadWrite => feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES),
            }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn DeviceConfig> {
        let mut registers = [0; 60];
        registers[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        let mut put = |at: usize, value: u32| registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(12, SEG_MAX);
        put(20, SECTOR as u32); // blk_size
        put(36, MAX_RANGE_SECTORS); // discard: sectors, ranges, alignment
        put(40, MAX_RANGES);
        put(44, 1);
        put(48, MAX_RANGE_SECTORS); // write zeroes: sectors, ranges, may unmap
        put(52, MAX_RANGES);
        put(56, 1);
        Arc::new(FixedConfig(registers))
    }

    fn activate(&mut self, features: u64) {
        self.write_through = features & feature(VIRTIO_BLK_F_FLUSH) == 0;
    }

    fn process(&mut self, _index: usize, queue: &mut VirtQueue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop()? {
            let written = self.serve(&chain, queue.dma())?;
            queue.complete(&chain, written)?;
            // At once: the next request may take long.
            queue.signal()?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.write_through = true;
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;
    use vmm_sys_util::tempfile::TempFile;

    use super::super::test_driver::*;
    use super::*;

    const HEADER_AT: u64 = BUFFERS;
    const DATA_AT: u64 = BUFFERS + 0x1000;
    const STATUS_AT: u64 = BUFFERS + 0x800;
    const SECTORS: u64 = 64;
    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

    /// An image whose sectors are filled with their numbers.
    fn image() -> TempFile {
        let file = TempFile::new().expect("temporary file");
        for sector in 0..SECTORS {
            file.as_file().write_all_at(&[sector as u8; 512], sector * SECTOR).expect("image");
        }
        file
    }

    fn driver(file: &TempFile, access: Access) -> Driver {
        let block =
            Block::open(file.as_path(), access, "serial-number-longer-than-20").expect("a good image");
        Driver::ready(block, FLUSH, 1)
    }

    fn header(driver: &Driver, kind: u32, sector: u64) {
        driver.put(HEADER_AT, &kind.to_le_bytes());
        driver.put(HEADER_AT + 8, &sector.to_le_bytes());
        driver.put(STATUS_AT, &[0xee]);
    }

    /// Runs a request with `data` in the middle; returns status and used length.
    fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u32, u32) {
        header(driver, kind, sector);
        let mut parts = vec![(HEADER_AT, 16, 0)];
        parts.extend(data);
        parts.push((STATUS_AT, 1, WRITE));
        let head = driver.submit(0, &parts);
        let (id, len) = driver.take_used(0).expect("the request is answered");
        assert_eq!(id, head);
        (driver.get(STATUS_AT, 1)[0].into(), len)
    }

    #[test]
    fn reads_writes_and_flushes() {
        let file = image();
        let mut driver = driver(&file, Access::ReadWrite);
        let parts = [(DATA_AT, 512, WRITE), (DATA_AT + 0x1000, 1024, WRITE)];
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 3, &parts), (VIRTIO_BLK_S_OK, 1537));
        assert_eq!(driver.get(DATA_AT, 512), [3; 512]);
        assert_eq!(driver.get(DATA_AT + 0x1000, 1024)[512..], [5; 512]);
        driver.put(DATA_AT, &[0xab; 1024]);
        let written =
            request(&mut driver, VIRTIO_BLK_T_OUT, SECTORS - 2, &[(DATA_AT, 1000, 0), (DATA_AT, 24, 0)]);
        assert_eq!(written, (VIRTIO_BLK_S_OK, 1));
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), (VIRTIO_BLK_S_OK, 1));
        let content = std::fs::read(file.as_path()).expect("image");
        assert_eq!(content.len() as u64, SECTORS * SECTOR);
        assert_eq!(content[content.len() - 1024..], [0xab; 1024]);
        assert_eq!(content[content.len() - 1025], 61);
    }

    #[test]
    fn headers_may_come_in_pieces_and_in_indirect_tables() {
        let file = image();
        let mut driver = driver(&file, Access::ReadWrite);
        header(&driver, VIRTIO_BLK_T_IN, 7);
        let table = BUFFERS + 0x4000;
        driver.put_descriptor(table, 0, HEADER_AT, 5, NEXT, 2);
        driver.put_descriptor(table, 2, HEADER_AT + 5, 11, NEXT, 1);
        driver.put_descriptor(table, 1, DATA_AT, 511, NEXT | WRITE, 3);
        driver.put_descriptor(table, 3, DATA_AT + 511, 2, WRITE, 0);
        driver.submit(0, &[(table, 64, INDIRECT)]);
        assert_eq!(driver.take_used(0).map(|used| used.1), Some(513));
        assert_eq!(driver.get(DATA_AT, 513), [&[7; 512][..], &[0]].concat());
    }

    #[test]
    fn identifies_itself() {
        let mut driver = driver(&image(), Access::ReadWrite);
        let answer = request(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[(DATA_AT, 20, WRITE)]);
        assert_eq!(answer, (VIRTIO_BLK_S_OK, 21));
        assert_eq!(driver.get(DATA_AT, 20), b"serial-number-longer");
        assert_eq!(u64::from_le_bytes(driver.read(DEVICE)), SECTORS);
        assert_eq!(u32::from_le_bytes(driver.read(DEVICE + 12)), 254);
    }

    #[test]
    fn nonsense_fails_alone_and_changes_nothing() {
        let file = image();
        let before = std::fs::read(file.as_path()).expect("image");
        let mut driver = driver(&file, Access::ReadWrite);
        let out = VIRTIO_BLK_T_OUT;
        for (sector, parts) in [
            (SECTORS, &[(DATA_AT, 512, 0)][..]),
            (SECTORS - 1, &[(DATA_AT, 1024, 0)]),
            (u64::MAX, &[(DATA_AT, 512, 0)]),
            (u64::MAX / 512, &[(DATA_AT, 512, 0)]),
            (0, &[(DATA_AT, 511, 0)]),
            (0, &[(DATA_AT, 512, 0), (RAM - 256, 512, 0)]),
            (0, &[(DATA_AT, 512, 0), (u64::MAX - 100, 512, 0)]),
            (0, &[(0, 0xffff_fe00, 0)]),
        ] {
            assert_eq!(request(&mut driver, out, sector, parts).0, VIRTIO_BLK_S_IOERR, "{sector} {parts:?}");
        }
        let read = request(&mut driver, VIRTIO_BLK_T_IN, 0, &[(DATA_AT, 512, WRITE), (RAM, 512, WRITE)]);
        assert_eq!(read, (VIRTIO_BLK_S_IOERR, 0), "no length: the data in front of the status is missing");
        assert_eq!(request(&mut driver, 0x1234, 0, &[]).0, VIRTIO_BLK_S_UNSUPP);
        driver.submit(0, &[(HEADER_AT, 15, 0), (STATUS_AT, 1, WRITE)]);
        assert_eq!((driver.take_used(0).map(|used| used.1), driver.get(STATUS_AT, 1)[0]), (Some(1), 1));
        driver.submit(0, &[(HEADER_AT, 16, 0), (RAM, 1, WRITE)]);
        assert_eq!(driver.take_used(0).map(|used| used.1), Some(0), "not even the status has a place");
        assert_eq!(std::fs::read(file.as_path()).expect("image"), before);
        assert_eq!(driver.status(), 15, "the device goes on");
        driver.submit(0, &[(HEADER_AT, 16, 0)]);
        assert_eq!(driver.status(), 15 | NEEDS_RESET, "no status at all is a broken request");
    }

    #[test]
    fn a_read_only_disk_stays_as_it_is() {
        let file = image();
        let mut driver = driver(&file, Access::ReadOnly);
        assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
        for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(request(&mut driver, kind, 0, &[(DATA_AT, 512, 0)]).0, VIRTIO_BLK_S_IOERR);
        }
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 9, &[(DATA_AT, 512, WRITE)]).0, VIRTIO_BLK_S_OK);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]).0, VIRTIO_BLK_S_OK);
        assert_eq!(driver.get(DATA_AT, 512), [9; 512]);
    }

    fn range(driver: &Driver, index: u64, sector: u64, count: u32, flags: u32) {
        let at = DATA_AT + 16 * index;
        driver.put(at, &sector.to_le_bytes());
        driver.put(at + 8, &count.to_le_bytes());
        driver.put(at + 12, &flags.to_le_bytes());
    }

    #[test]
    fn write_zeroes_and_discard_work_on_ranges() {
        let file = image();
        let mut driver = driver(&file, Access::ReadWrite);
        range(&driver, 0, 1, 2, 0);
        range(&driver, 1, 8, 8, FLAG_UNMAP);
        let kind = VIRTIO_BLK_T_WRITE_ZEROES;
        assert_eq!(request(&mut driver, kind, 0, &[(DATA_AT, 32, 0)]).0, VIRTIO_BLK_S_OK);
        range(&driver, 0, 32, 8, 0);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &[(DATA_AT, 16, 0)]).0, VIRTIO_BLK_S_OK);
        let content = std::fs::read(file.as_path()).expect("image");
        for (sector, bytes) in
            content.chunks(512).enumerate().filter(|(sector, _)| !(32..40).contains(sector))
        {
            let zeroed = (1..3).contains(&sector) || (8..16).contains(&sector);
            assert_eq!(bytes, [if zeroed { 0 } else { sector as u8 }; 512], "sector {sector}");
        }
        assert_eq!(content.len() as u64, SECTORS * SECTOR);
    }

    #[test]
    fn bad_ranges_are_refused_before_the_first_is_touched() {
        let file = image();
        let before = std::fs::read(file.as_path()).expect("image");
        let mut driver = driver(&file, Access::ReadWrite);
        let kind = VIRTIO_BLK_T_WRITE_ZEROES;
        range(&driver, 0, 1, 2, 0);
        for (sector, count, flags, status) in [
            (SECTORS, 1, 0, VIRTIO_BLK_S_IOERR),
            (u64::MAX, u32::MAX, 0, VIRTIO_BLK_S_IOERR),
            (0, MAX_RANGE_SECTORS + 1, 0, VIRTIO_BLK_S_IOERR),
            (0, 1, 2, VIRTIO_BLK_S_UNSUPP),
        ] {
            range(&driver, 1, sector, count, flags);
            assert_eq!(request(&mut driver, kind, 0, &[(DATA_AT, 32, 0)]).0, status);
        }
        for len in [0, 15, 17, 16 * (MAX_RANGES + 1)] {
            assert_eq!(request(&mut driver, kind, 0, &[(DATA_AT, len, 0)]).0, VIRTIO_BLK_S_IOERR, "{len}");
        }
        range(&driver, 0, 1, 2, FLAG_UNMAP);
        let discard = request(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &[(DATA_AT, 16, 0)]);
        assert_eq!(discard.0, VIRTIO_BLK_S_UNSUPP, "discard has no flags");
        assert_eq!(std::fs::read(file.as_path()).expect("image"), before);
    }

    #[test]
    fn a_full_disk_is_an_io_error() {
        let image = OpenOptions::new().read(true).write(true).open("/dev/full").expect("/dev/full");
        let path = PathBuf::from("/dev/full");
        let access = Access::ReadWrite;
        let (id, write_through, complained) = ([0; ID_LEN], true, false);
        let (control, frozen) = (None, false);
        let block =
            Block { image, path, access, sectors: SECTORS, id, write_through, complained, control, frozen };
        let mut driver = Driver::ready(block, FLUSH, 1);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 0, &[(DATA_AT, 512, 0)]).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, &[(DATA_AT, 512, WRITE)]).0, VIRTIO_BLK_S_OK);
        assert_eq!(driver.status(), 15);
    }

    #[test]
    fn an_image_that_shrank_gives_io_errors() {
        let file = image();
        let mut driver = driver(&file, Access::ReadWrite);
        file.as_file().set_len(512).expect("truncate");
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 0, &[(DATA_AT, 1024, WRITE)]).0, VIRTIO_BLK_S_IOERR);
    }

    #[test]
    fn what_cannot_be_a_disk_is_explained() {
        let open = |path: &Path, access| match Block::open(path, access, "") {
            Ok(_) => panic!("{} opened", path.display()),
            Err(error) => error.to_string(),
        };
        let dir = TempDir::new().expect("temporary directory");
        let path = dir.as_path().join("disk.img");
        assert!(open(&path, Access::ReadWrite).contains("truncate -s 1G"));
        assert!(open(dir.as_path(), Access::ReadOnly).contains("neither a file nor a block device"));
        std::fs::write(&path, []).expect("file");
        assert!(open(&path, Access::ReadOnly).contains("is empty"));
        std::fs::write(&path, [0; 1000]).expect("file");
        assert!(open(&path, Access::ReadOnly).contains("1000 bytes"));
        std::fs::write(&path, [0; 1024]).expect("file");
        let first = Block::open(&path, Access::ReadOnly, "").expect("a good image");
        let second = Block::open(&path, Access::ReadOnly, "").expect("readers share");
        assert!(open(&path, Access::ReadWrite).contains("in use"));
        drop((first, second));
        let _writer = Block::open(&path, Access::ReadWrite, "").expect("free again");
        assert!(open(&path, Access::ReadOnly).contains("in use"));
    }
}
