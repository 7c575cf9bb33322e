//! An image as a file has it: bytes nobody has checked. Reads that cannot go outside, decompression that cannot
//! grow without bound, and a name for what the file seems to be.
//!
//! Must not know: guest memory, what the formats mean.

use std::borrow::Cow;
use std::io::Read;

use super::error::BootError;

const GZIP: [u8; 3] = [0x1f, 0x8b, 8];
/// Beginnings of files that people hand to a VMM by mistake.
const STRANGERS: [(&[u8], &str); 8] = [
    (b"\xfd7zXZ\0", "xz-compressed (unpack it with unxz first)"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed (unpack it with unzstd first)"),
    (b"BZh", "bzip2-compressed (unpack it with bunzip2 first)"),
    (b"QFI\xfb", "a qcow2 disk image (pass raw disk images with --disk)"),
    (b"070701", "a cpio archive (pass it with --initrd)"),
    (b"#!", "a script"),
    (b"!<arch>\n", "an ar archive or a Debian package (unpack it first)"),
    (b"MZ", "a program for EFI, and there is no EFI here"),
];

/// The bytes of an image, and what to call it in messages.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    pub name: &'a str,
    pub bytes: &'a [u8],
}

impl<'a> Image<'a> {
    /// `len` bytes at `at`, if the file has them.
    pub fn slice(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(at).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.bytes.get(start..end)
    }

    fn array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.slice(at, N as u64)?.try_into().ok()
    }

    pub fn u8(&self, at: u64) -> Option<u8> {
        self.array(at).map(u8::from_le_bytes)
    }

    pub fn u16(&self, at: u64) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub fn u32(&self, at: u64) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub fn u64(&self, at: u64) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The error for a part that lies, or ends, beyond the file.
    pub fn truncated(&self, what: &'static str, needs: u64) -> BootError {
        BootError::Truncated { name: self.name.to_string(), what, needs, has: self.len() }
    }

    /// The error for contradictions.
    pub fn damaged(&self, what: impl Into<String>) -> BootError {
        BootError::Damaged { name: self.name.to_string(), what: what.into() }
    }

    /// The error for what this machine cannot do.
    pub fn unsupported(&self, what: impl Into<String>) -> BootError {
        BootError::Unsupported { name: self.name.to_string(), what: what.into() }
    }

    /// The error for a file of no known format.
    pub fn unknown(&self) -> BootError {
        let found = STRANGERS
            .iter()
            .find(|(magic, _)| self.bytes.starts_with(magic))
            .map_or("not an image that can be recognized", |&(_, found)| found);
        BootError::UnknownFormat { name: self.name.to_string(), found }
    }
}

/// Undoes gzip, if it is gzip. More than `limit` bytes cannot be of use: the guest has no more memory.
pub fn decompress<'a>(name: &str, bytes: &'a [u8], limit: u64) -> Result<Cow<'a, [u8]>, BootError> {
    if !bytes.starts_with(&GZIP) {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut plain = Vec::new();
    flate2::read::MultiGzDecoder::new(bytes)
        .take(limit.saturating_add(1))
        .read_to_end(&mut plain)
        .map_err(|source| BootError::Decompress { name: name.to_string(), source })?;
    if plain.len() as u64 > limit {
        let what = format!("{name}, decompressed,");
        return Err(BootError::MemoryTooSmall { what, needs: plain.len() as u64, has: limit });
    }
    Ok(Cow::Owned(plain))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn reads_end_with_the_file() {
        let image = Image { name: "x", bytes: &[1, 2, 3, 4, 5] };
        assert_eq!(image.u32(1), Some(0x0504_0302));
        assert_eq!(image.u32(2), None);
        assert_eq!(image.u8(u64::MAX), None);
        assert_eq!(image.slice(5, 0), Some(&[][..]));
        assert_eq!(image.slice(1, u64::MAX), None);
    }

    #[test]
    fn gzip_is_undone_and_bounded() {
        let packed = gzip(&[7; 100_000]);
        assert_eq!(&*decompress("x", &packed, 100_000).unwrap(), &[7; 100_000]);
        assert!(matches!(decompress("x", &packed, 99_999), Err(BootError::MemoryTooSmall { .. })));
        assert!(matches!(decompress("x", &packed[..50], 100_000), Err(BootError::Decompress { .. })));
        assert!(matches!(decompress("x", b"plain", 2), Ok(Cow::Borrowed(b"plain"))));
    }

    #[test]
    fn strangers_are_named() {
        let message = Image { name: "x", bytes: b"\xfd7zXZ\0..." }.unknown().to_string();
        assert!(message.contains("unxz"), "{message}");
    }
}
