//! ELF executables: reading headers nobody has checked, and putting segments where their physical addresses say.
//!
//! An entry point may be given as a virtual address of a kernel linked high; it is translated through the segment
//! it lies in, since the guest starts with physical addresses.
//!
//! Must not know: boot protocols (it offers their notes and headers a look at the file).

use super::error::BootError;
use super::image::Image;
use super::layout::Layout;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The count is elsewhere; no kernel has so many program headers.
const PN_XNUM: u16 = 0xffff;
/// The entry point that PVH starts at.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// One loadable segment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    pub offset: u64,
    pub virtual_address: u64,
    pub physical_address: u64,
    pub file_size: u64,
    pub memory_size: u64,
}

/// Where the section header table is; an image without one has `count` 0.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SectionTable {
    pub offset: u64,
    pub entry_size: u16,
    pub count: u16,
    pub names: u16,
}

/// An ELF file whose headers hold together.
pub struct Elf<'a> {
    pub image: Image<'a>,
    pub is_64bit: bool,
    pub entry: u64,
    pub segments: Vec<Segment>,
    pub sections: SectionTable,
    notes: Vec<(u64, u64)>,
}

/// One program header, whatever the class.
struct ProgramHeader {
    kind: u32,
    segment: Segment,
}

impl<'a> Elf<'a> {
    /// Reads the headers; none if this is not ELF at all.
    pub fn parse(image: Image<'a>) -> Result<Option<Self>, BootError> {
        if !image.bytes.starts_with(MAGIC) {
            return Ok(None);
        }
        let is_64bit = image.u8(4) == Some(CLASS_64);
        let header_size = if is_64bit { 64 } else { 52 };
        if image.len() < header_size {
            return Err(image.truncated("the ELF header", header_size));
        }
        check_machine(&image)?;
        let mut elf =
            Self { image, is_64bit, entry: 0, segments: vec![], sections: Default::default(), notes: vec![] };
        elf.read_headers().ok_or_else(|| image.damaged("its ELF headers point outside the file"))??;
        if elf.segments.is_empty() {
            return Err(image.unsupported("it has nothing to load; give an executable, not an object file"));
        }
        Ok(Some(elf))
    }

    /// None if a header lies outside the file.
    fn read_headers(&mut self) -> Option<Result<(), BootError>> {
        let image = self.image;
        let (table, entry_size, count) = if self.is_64bit {
            self.entry = image.u64(24)?;
            self.sections = SectionTable {
                offset: image.u64(40)?,
                entry_size: image.u16(58)?,
                count: image.u16(60)?,
                names: image.u16(62)?,
            };
            (image.u64(32)?, image.u16(54)?, image.u16(56)?)
        } else {
            self.entry = image.u32(24)?.into();
            self.sections = SectionTable {
                offset: image.u32(32)?.into(),
                entry_size: image.u16(46)?,
                count: image.u16(48)?,
                names: image.u16(50)?,
            };
            (image.u32(28)?.into(), image.u16(42)?, image.u16(44)?)
        };
        let least = if self.is_64bit { 56 } else { 32 };
        if count != 0 && (entry_size < least || count == PN_XNUM) {
            return Some(Err(image.damaged("its program header table has an impossible shape")));
        }
        for index in 0..u64::from(count) {
            let at = table.checked_add(index * u64::from(entry_size))?;
            let header = self.program_header(at)?;
            match header.kind {
                PT_LOAD if header.segment.memory_size != 0 => {
                    if let Err(error) = self.check_segment(&header.segment) {
                        return Some(Err(error));
                    }
                    self.segments.push(header.segment);
                }
                PT_NOTE => self.notes.push((header.segment.offset, header.segment.file_size)),
                _ => {}
            }
        }
        Some(Ok(()))
    }

    fn program_header(&self, at: u64) -> Option<ProgramHeader> {
        let image = self.image;
        image.slice(at, if self.is_64bit { 56 } else { 32 })?;
        let word = |offset| image.u32(at + offset).map(u64::from);
        let long = |offset| image.u64(at + offset);
        let kind = image.u32(at)?;
        let segment = if self.is_64bit {
            Segment {
                offset: long(8)?,
                virtual_address: long(16)?,
                physical_address: long(24)?,
                file_size: long(32)?,
                memory_size: long(40)?,
            }
        } else {
            Segment {
                offset: word(4)?,
                virtual_address: word(8)?,
                physical_address: word(12)?,
                file_size: word(16)?,
                memory_size: word(20)?,
            }
        };
        Some(ProgramHeader { kind, segment })
    }

    fn check_segment(&self, segment: &Segment) -> Result<(), BootError> {
        if segment.file_size > segment.memory_size {
            return Err(self.image.damaged("a segment is larger in the file than in memory"));
        }
        let end = segment.offset.saturating_add(segment.file_size);
        if end > self.image.len() {
            return Err(self.image.truncated("a segment", end));
        }
        Ok(())
    }

    /// Physical start and end of all segments together.
    pub fn extent(&self) -> (u64, u64) {
        let end = |s: &Segment| s.physical_address.saturating_add(s.memory_size);
        let start = self.segments.iter().map(|s| s.physical_address).min().unwrap_or(0);
        (start, self.segments.iter().map(end).max().unwrap_or(0))
    }

    /// Puts every segment at its physical address plus `bias` (modulo 2^64).
    pub fn load(&self, layout: &mut Layout, bias: u64) -> Result<(), BootError> {
        for (index, segment) in self.segments.iter().enumerate() {
            let what = format!("segment {index} of {}", self.image.name);
            let at = segment.physical_address.wrapping_add(bias);
            let bytes = self
                .image
                .slice(segment.offset, segment.file_size)
                .ok_or_else(|| self.image.truncated("a segment", segment.offset))?;
            layout.claim(at, segment.memory_size, &what)?;
            layout.write(at, bytes, &what)?;
            layout.zero(at + segment.file_size, segment.memory_size - segment.file_size, &what)?;
        }
        Ok(())
    }

    /// The physical address of an entry point given as a physical or as a virtual address.
    pub fn physical_entry(&self, entry: u64) -> Result<u64, BootError> {
        let within = |start: u64, s: &Segment| entry.checked_sub(start).is_some_and(|o| o < s.memory_size);
        if self.segments.iter().any(|s| within(s.physical_address, s)) {
            return Ok(entry);
        }
        self.segments
            .iter()
            .find(|s| within(s.virtual_address, s))
            .map(|s| entry.wrapping_sub(s.virtual_address).wrapping_add(s.physical_address))
            .ok_or_else(|| self.image.damaged(format!("its entry point {entry:#x} is in no segment")))
    }

    /// The PVH entry point, if a note gives one.
    pub fn pvh_entry(&self) -> Result<Option<u32>, BootError> {
        let total = self.notes.iter().fold(0u64, |sum, (_, len)| sum.saturating_add(*len));
        if total > self.image.len() {
            return Err(self.image.truncated("the ELF notes", total));
        }
        for &(start, len) in &self.notes {
            let Some(notes) = self.image.slice(start, len) else {
                return Err(self.image.truncated("an ELF note", start.saturating_add(len)));
            };
            if let Some(entry) = pvh_entry_in(Image { name: self.image.name, bytes: notes }) {
                return match u32::try_from(entry) {
                    Ok(entry) => Ok(Some(entry)),
                    Err(_) => Err(self.image.damaged(format!("its PVH entry point {entry:#x} is above 4G"))),
                };
            }
        }
        Ok(None)
    }
}

/// Walks a note segment. Names and descriptors are padded to 4 bytes; a note that runs out of the segment ends it.
fn pvh_entry_in(notes: Image) -> Option<u64> {
    let padded = |len: u32| u64::from(len).next_multiple_of(4);
    let mut at = 0;
    loop {
        let (name_len, len, kind) = (notes.u32(at)?, notes.u32(at + 4)?, notes.u32(at + 8)?);
        let name = at + 12;
        let descriptor = name + padded(name_len);
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.slice(name, name_len.into())? == b"Xen\0" {
            return match len {
                4 => notes.u32(descriptor).map(u64::from),
                _ => notes.u64(descriptor),
            };
        }
        at = descriptor + padded(len);
    }
}

fn check_machine(image: &Image) -> Result<(), BootError> {
    if image.u8(5) != Some(LITTLE_ENDIAN) {
        return Err(image.unsupported("it is a big-endian ELF file; give one for x86"));
    }
    let (kind, machine) = (image.u16(16), image.u16(18));
    if !matches!(machine, Some(MACHINE_386 | MACHINE_X86_64)) {
        let machine = machine.unwrap_or(0);
        return Err(image
            .unsupported(format!("it is for another processor (ELF machine {machine}); give one for x86")));
    }
    if !matches!(kind, Some(TYPE_EXECUTABLE | TYPE_SHARED)) {
        return Err(image.unsupported("it is not an executable: link it first"));
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Ram;

    /// Builds ELF files: `(physical address, virtual address, file bytes, memory size)` for each segment.
    pub struct ElfBuilder {
        pub is_64bit: bool,
        pub entry: u64,
        pub segments: Vec<(u64, u64, Vec<u8>, u64)>,
        pub note: Option<Vec<u8>>,
    }

    impl ElfBuilder {
        pub fn new(is_64bit: bool, address: u64, code: &[u8]) -> Self {
            let segments = vec![(address, address, code.to_vec(), code.len() as u64)];
            Self { is_64bit, entry: address, segments, note: None }
        }

        pub fn build(&self) -> Vec<u8> {
            let (header, entry) = if self.is_64bit { (64u64, 56u64) } else { (52, 32) };
            let count = self.segments.len() as u64 + u64::from(self.note.is_some());
            let mut file = self.header(header, entry, count);
            let mut data = header + entry * count;
            let mut contents = Vec::new();
            let note = self.note.iter().map(|n| (PT_NOTE, 0, 0, n, n.len() as u64));
            let loads = self.segments.iter().map(|(p, v, bytes, size)| (PT_LOAD, *p, *v, bytes, *size));
            for (kind, physical, virtual_, bytes, size) in loads.chain(note) {
                let len = bytes.len() as u64;
                if self.is_64bit {
                    file.extend([kind, 7].iter().flat_map(|w| w.to_le_bytes()));
                    let fields = [data, virtual_, physical, len, size, 4];
                    file.extend(fields.iter().flat_map(|w: &u64| w.to_le_bytes()));
                } else {
                    let fields =
                        [kind, data as u32, virtual_ as u32, physical as u32, len as u32, size as u32, 7, 4];
                    file.extend(fields.iter().flat_map(|w| w.to_le_bytes()));
                }
                contents.extend_from_slice(bytes);
                data += len;
            }
            file.extend(contents);
            file
        }

        fn header(&self, header: u64, entry: u64, count: u64) -> Vec<u8> {
            let mut file = b"\x7fELF".to_vec();
            file.extend([if self.is_64bit { 2 } else { 1 }, 1, 1, 0]);
            file.resize(16, 0);
            file.extend(2u16.to_le_bytes());
            file.extend(if self.is_64bit { 62u16 } else { 3 }.to_le_bytes());
            file.extend(1u32.to_le_bytes());
            for word in [self.entry, header, 0] {
                match self.is_64bit {
                    true => file.extend(word.to_le_bytes()),
                    false => file.extend((word as u32).to_le_bytes()),
                }
            }
            file.extend(0u32.to_le_bytes());
            for half in [header, entry, count, 0, 0, 0] {
                file.extend((half as u16).to_le_bytes());
            }
            file
        }
    }

    /// A PVH note with `entry`, behind a note of somebody else.
    pub fn pvh_note(entry: u32) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 6, 3] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"GNU\0abcdef\0\0");
        for word in [4, 4, XEN_ELFNOTE_PHYS32_ENTRY] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
        note
    }

    fn parse(bytes: &[u8]) -> Result<Option<Elf<'_>>, BootError> {
        Elf::parse(Image { name: "test", bytes })
    }

    #[test]
    fn segments_land_at_their_physical_addresses() {
        for is_64bit in [false, true] {
            let mut builder = ElfBuilder::new(is_64bit, 0x20_0000, b"code");
            builder.segments.push((0x30_0000, 0xc030_0000, b"data".to_vec(), 0x1_2345));
            let file = builder.build();
            let elf = parse(&file).unwrap().unwrap();
            assert_eq!(elf.extent(), (0x20_0000, 0x31_2345));
            let ram = Ram::new(4 << 20).unwrap();
            ram.memory.write_slice(&[0xff; 0x2_0000], GuestAddress(0x30_0000)).unwrap();
            let mut layout = Layout::new(&ram.memory, &ram.ranges);
            elf.load(&mut layout, 0).unwrap();
            let mut bytes = [0; 4];
            ram.memory.read_slice(&mut bytes, GuestAddress(0x20_0000)).unwrap();
            assert_eq!(&bytes, b"code");
            let mut bytes = vec![0xaa; 0x1_2346];
            ram.memory.read_slice(&mut bytes, GuestAddress(0x30_0000)).unwrap();
            assert_eq!(&bytes[..4], b"data");
            assert!(bytes[4..0x1_2345].iter().all(|&b| b == 0), "bss is cleared");
            assert_eq!(bytes[0x1_2345], 0xff, "and nothing behind it");
        }
    }

    #[test]
    fn entry_points_become_physical() {
        let mut builder = ElfBuilder::new(true, 0x20_0000, &[0; 64]);
        builder.segments[0].1 = 0xffff_ffff_8020_0000;
        let file = builder.build();
        let elf = parse(&file).unwrap().unwrap();
        assert_eq!(elf.physical_entry(0x20_0010).unwrap(), 0x20_0010);
        assert_eq!(elf.physical_entry(0xffff_ffff_8020_0010).unwrap(), 0x20_0010);
        assert!(matches!(elf.physical_entry(0x20_0040), Err(BootError::Damaged { .. })));
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let mut builder = ElfBuilder::new(true, 0x20_0000, &[0; 64]);
        assert_eq!(parse(&builder.build()).unwrap().unwrap().pvh_entry().unwrap(), None);
        builder.note = Some(pvh_note(0x20_0020));
        assert_eq!(parse(&builder.build()).unwrap().unwrap().pvh_entry().unwrap(), Some(0x20_0020));
        let mut cut = pvh_note(0x20_0020);
        cut.truncate(cut.len() - 1);
        builder.note = Some(cut);
        assert_eq!(parse(&builder.build()).unwrap().unwrap().pvh_entry().unwrap(), None);
    }

    #[test]
    fn overlapping_segments_are_refused() {
        let mut builder = ElfBuilder::new(false, 0x20_0000, &[0; 64]);
        builder.segments.push((0x20_003f, 0, vec![1], 1));
        let file = builder.build();
        let ram = Ram::new(4 << 20).unwrap();
        let mut layout = Layout::new(&ram.memory, &ram.ranges);
        let result = parse(&file).unwrap().unwrap().load(&mut layout, 0);
        assert!(matches!(result, Err(BootError::Overlap { .. })), "{result:?}");
    }

    #[test]
    fn strange_files_are_refused() {
        let good = ElfBuilder::new(true, 0x20_0000, &[0; 64]).build();
        assert!(parse(b"none").unwrap().is_none());
        assert!(matches!(parse(&good[..40]), Err(BootError::Truncated { .. })));
        assert!(matches!(parse(&good[..100]), Err(BootError::Damaged { .. })));
        assert!(matches!(parse(&good[..130]), Err(BootError::Truncated { .. })));
        let mut arm = good.clone();
        arm[18] = 183;
        assert!(matches!(parse(&arm), Err(BootError::Unsupported { .. })));
        let mut object = good.clone();
        object[16] = 1;
        assert!(matches!(parse(&object), Err(BootError::Unsupported { .. })));
        let mut wrap = good;
        wrap[64 + 40..64 + 48].fill(0xff);
        let ram = Ram::new(4 << 20).unwrap();
        let mut layout = Layout::new(&ram.memory, &ram.ranges);
        let result = parse(&wrap).unwrap().unwrap().load(&mut layout, 0);
        assert!(matches!(result, Err(BootError::OutsideRam { .. })), "{result:?}");
    }
}
