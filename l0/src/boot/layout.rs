//! Who owns which guest-physical bytes before the guest starts, and the writing of them.
//!
//! Every piece (segment, module, table) claims its range first; a claim succeeds only inside RAM and on bytes
//! nobody else claimed. So a hostile image can neither reach outside RAM nor lay one piece over another, and the
//! work an image can cause is bounded by the size of RAM.
//!
//! Must not know: image formats, boot protocols.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::error::BootError;
use crate::memory::{HIGH_RAM_START, LOW_RAM_END};

/// Conventional memory ends here; the extended BIOS data area and the BIOS area follow, up to 1 MiB.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where what the loader makes for itself starts: above the pages that kernels like for their CPU trampolines.
pub const TABLES_START: u64 = 0x1_0000;
/// RAM for everyone starts again here.
pub const EXTENDED_START: u64 = 0x10_0000;
pub const PAGE: u64 = 4096;
/// From this size on, guest memory is written through its file.
const BULK: usize = 64 << 10;

/// A regular file of known length.
pub struct FileSource {
    pub file: File,
    pub path: PathBuf,
    pub len: u64,
}

/// Bytes to put into the guest, wherever they are.
pub enum Payload {
    /// In our memory.
    Bytes(Vec<u8>),
    /// In a file; goes to guest memory without a copy of the whole in ours.
    File(FileSource),
}

impl Payload {
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(source) => source.len,
        }
    }
}

/// Guest memory with its claims.
pub struct Layout<'m> {
    memory: &'m GuestMemoryMmap<()>,
    ram: Vec<Range<u64>>,
    /// Start → (end, what).
    claims: BTreeMap<u64, (u64, String)>,
}

/// `value` up to the next multiple of `align`, a power of two.
pub fn align_up(value: u64, align: u64) -> Option<u64> {
    Some(value.checked_add(align.wrapping_sub(1))? & !(align.wrapping_sub(1)))
}

impl<'m> Layout<'m> {
    /// RAM as `ranges` of `(guest-physical start, length, file offset)`, all unclaimed but the BIOS areas.
    pub fn new(memory: &'m GuestMemoryMmap<()>, ranges: &[(u64, u64, u64)]) -> Self {
        let ram = ranges.iter().map(|&(start, len, _)| start..start.saturating_add(len)).collect();
        let bios = (EXTENDED_START, "the BIOS area below 1M".to_string());
        Self { memory, ram, claims: BTreeMap::from([(CONVENTIONAL_END, bios)]) }
    }

    /// Bytes of RAM in all.
    pub fn ram_size(&self) -> u64 {
        self.ram.iter().map(|r| r.end - r.start).sum()
    }

    /// End of the RAM that starts at zero.
    pub fn low_ram_end(&self) -> u64 {
        self.ram.iter().find(|r| r.start == 0).map_or(0, |r| r.end)
    }

    /// True if something that was claimed covers `address`.
    pub fn is_claimed(&self, address: u64) -> bool {
        self.claims.range(..=address).next_back().is_some_and(|(_, &(end, _))| address < end)
    }

    fn overlapping(&self, start: u64, end: u64) -> Option<(u64, u64, &str)> {
        let (&s, (e, what)) = self.claims.range(..end).next_back()?;
        (*e > start).then_some((s, *e, what.as_str()))
    }

    /// Takes `len` bytes at `start` for `what`.
    pub fn claim(&mut self, start: u64, len: u64, what: &str) -> Result<(), BootError> {
        if len == 0 {
            return Ok(());
        }
        let last = start.saturating_add(len - 1);
        let outside = || BootError::OutsideRam { what: what.to_string(), start, last };
        let end = start.checked_add(len).ok_or_else(outside)?;
        if !self.ram.iter().any(|r| r.start <= start && end <= r.end) {
            let possible = end <= LOW_RAM_END || start >= HIGH_RAM_START;
            return Err(match possible {
                true => BootError::MemoryTooSmall {
                    what: what.to_string(),
                    needs: if end <= LOW_RAM_END { end } else { end - HIGH_RAM_START + LOW_RAM_END },
                    has: self.ram_size(),
                },
                false => outside(),
            });
        }
        if let Some((_, _, other)) = self.overlapping(start, end) {
            return Err(BootError::Overlap { what: what.to_string(), start, last, other: other.to_string() });
        }
        self.claims.insert(start, (end, what.to_string()));
        Ok(())
    }

    /// The lowest place for `len` bytes within `within`; `align` is a power of two.
    pub fn find_low(&self, len: u64, align: u64, within: Range<u64>) -> Option<u64> {
        self.ram.iter().find_map(|ram| {
            let limit = within.end.min(ram.end);
            let mut at = align_up(within.start.max(ram.start), align)?;
            loop {
                let end = at.checked_add(len.max(1)).filter(|&end| end <= limit)?;
                match self.overlapping(at, end) {
                    Some((_, taken_to, _)) => at = align_up(taken_to, align)?,
                    None => return Some(at),
                }
            }
        })
    }

    /// The highest place for `len` bytes within `within`; `align` is a power of two.
    pub fn find_high(&self, len: u64, align: u64, within: Range<u64>) -> Option<u64> {
        self.ram.iter().rev().find_map(|ram| {
            let start = within.start.max(ram.start);
            let mut limit = within.end.min(ram.end);
            loop {
                let at = limit.checked_sub(len.max(1))? & !(align.wrapping_sub(1));
                if at < start {
                    return None;
                }
                match self.overlapping(at, at.checked_add(len.max(1))?) {
                    Some((taken_from, _, _)) => limit = taken_from,
                    None => return Some(at),
                }
            }
        })
    }

    /// Takes and fills the lowest place in conventional memory for `bytes` that the loader made.
    pub fn place_table(&mut self, bytes: &[u8], align: u64, what: &str) -> Result<u64, BootError> {
        let len = bytes.len() as u64;
        let at = self.reserve_table(len, align, what)?;
        self.write(at, bytes, what)?;
        Ok(at)
    }

    /// Takes the lowest place in conventional memory for `len` bytes.
    pub fn reserve_table(&mut self, len: u64, align: u64, what: &str) -> Result<u64, BootError> {
        let at = self.find_low(len, align, TABLES_START..CONVENTIONAL_END).ok_or_else(|| {
            let room = (CONVENTIONAL_END - TABLES_START) >> 10;
            BootError::Unsupported {
                name: what.to_string(),
                what: format!(
                    "its {len} bytes do not fit in the {room}K of free low memory; pass fewer or shorter \
                     modules and command lines"
                ),
            }
        })?;
        self.claim(at, len, what)?;
        Ok(at)
    }

    /// Writes bytes; the caller claimed them.
    ///
    /// Much goes through the memory file: a page that is written there is made without a page fault of ours, and
    /// those are most of the time it takes to load a kernel.
    pub fn write(&self, at: u64, bytes: &[u8], what: &str) -> Result<(), BootError> {
        let error = |source| BootError::GuestMemory { what: what.to_string(), source };
        if bytes.len() >= BULK {
            if let Some((file, offset)) = self.file_at(at, bytes.len() as u64) {
                return file.write_all_at(bytes, offset).map_err(|e| error(GuestMemoryError::IOError(e)));
            }
        }
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(error)
    }

    /// The memory file, if there is one, and where in it the `len` bytes at `at` are.
    fn file_at(&self, at: u64, len: u64) -> Option<(&File, u64)> {
        let (region, offset) = self.memory.to_region_addr(GuestAddress(at))?;
        region.len().checked_sub(offset.0).filter(|&rest| len <= rest)?;
        let file = region.file_offset()?;
        Some((file.file(), file.start().checked_add(offset.0)?))
    }

    /// Reads back what was written.
    pub fn read(&self, at: u64, bytes: &mut [u8], what: &str) -> Result<(), BootError> {
        self.memory
            .read_slice(bytes, GuestAddress(at))
            .map_err(|source| BootError::GuestMemory { what: what.to_string(), source })
    }

    /// Writes zeroes; the caller claimed them. In a memory file this costs nothing however much it is.
    pub fn zero(&self, at: u64, len: u64, what: &str) -> Result<(), BootError> {
        static ZEROES: [u8; BULK] = [0; BULK];
        if let Some((file, offset)) = self.file_at(at, len).filter(|_| len != 0) {
            if fallocate(file, FallocateMode::PunchHole, true, offset, len).is_ok() {
                return Ok(());
            }
        }
        let mut done = 0;
        while done < len {
            let step = (len - done).min(BULK as u64);
            self.write(at + done, &ZEROES[..step as usize], what)?;
            done += step;
        }
        Ok(())
    }

    /// Writes a payload; the caller claimed its range.
    pub fn write_payload(&self, at: u64, payload: &Payload, what: &str) -> Result<(), BootError> {
        match payload {
            Payload::Bytes(bytes) => self.write(at, bytes, what),
            Payload::File(source) => self.write_file(at, source, 0..source.len, what),
        }
    }

    /// Writes a part of a file; the caller claimed its range.
    pub fn write_file(
        &self,
        at: u64,
        source: &FileSource,
        part: Range<u64>,
        what: &str,
    ) -> Result<(), BootError> {
        let mut buffer = vec![0; 4 * BULK];
        let mut from = part.start;
        while from < part.end {
            let step = (part.end - from).min(buffer.len() as u64);
            let chunk = &mut buffer[..step as usize];
            source
                .file
                .read_exact_at(chunk, from)
                .map_err(|error| BootError::Read { path: source.path.clone(), source: error })?;
            self.write(at + (from - part.start), chunk, what)?;
            from += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;

    fn with_layout(test: impl FnOnce(&mut Layout)) {
        let ram = Ram::new(16 << 20).unwrap();
        test(&mut Layout::new(&ram.memory, &ram.ranges));
    }

    #[test]
    fn claims_exclude_each_other() {
        with_layout(|layout| {
            layout.claim(0x10_0000, 0x1000, "a").unwrap();
            assert!(matches!(layout.claim(0x10_0fff, 1, "b"), Err(BootError::Overlap { .. })));
            assert!(matches!(layout.claim(0xf_ffff, 2, "b"), Err(BootError::Overlap { .. })));
            layout.claim(0x10_1000, 1, "b").unwrap();
            assert!(matches!(layout.claim(0xa_0000, 1, "c"), Err(BootError::Overlap { .. })));
        });
    }

    #[test]
    fn claims_stay_in_ram() {
        with_layout(|layout| {
            assert!(matches!(
                layout.claim(0xff_f000, 0x1001, "a"),
                Err(BootError::MemoryTooSmall { needs: 0x100_0001, .. })
            ));
            assert!(matches!(layout.claim(0xd000_0000, 1, "a"), Err(BootError::OutsideRam { .. })));
            assert!(matches!(layout.claim(u64::MAX, 2, "a"), Err(BootError::OutsideRam { .. })));
            assert!(matches!(
                layout.claim(HIGH_RAM_START, 0x1000, "a"),
                Err(BootError::MemoryTooSmall { needs: 0xc000_1000, .. })
            ));
        });
    }

    #[test]
    fn searches_step_over_claims() {
        with_layout(|layout| {
            layout.claim(0x10_0000, 0x1800, "a").unwrap();
            let all = EXTENDED_START..u64::MAX;
            assert_eq!(layout.find_low(0x1000, PAGE, all.clone()), Some(0x10_2000));
            layout.claim(0xff_f000, 0x800, "b").unwrap();
            assert_eq!(layout.find_high(0x1000, PAGE, all.clone()), Some(0xff_e000));
            assert_eq!(layout.find_high(0x400, 0x400, all.clone()), Some(0xff_fc00));
            assert_eq!(layout.find_low(16 << 20, PAGE, all.clone()), None);
            assert_eq!(layout.find_high(u64::MAX, PAGE, all), None);
        });
    }
}
