//! Images built here, from the specifications' words, and what the guest finds when they start.

use std::io::Write;

use vm_memory::{Bytes, GuestAddress};

use super::elf::tests::{ElfBuilder, pvh_note};
use super::*;
use crate::memory::Ram;

const CODE: u64 = 0x20_0000;

struct Machine {
    ram: Ram,
}

impl Machine {
    fn new(size: u64) -> Self {
        Self { ram: Ram::new(size).unwrap() }
    }

    fn boot(&self, kernel: &[u8], spec: &BootSpec) -> Result<BootState, BootError> {
        load_bytes(&self.ram.memory, &self.ram.ranges, kernel, spec)
    }

    fn u32(&self, at: u64) -> u32 {
        self.ram.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn u64(&self, at: u64) -> u64 {
        self.ram.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn string(&self, at: u64) -> String {
        let bytes = (at..).map(|at| self.bytes(at, 1)[0]).take_while(|&b| b != 0).collect();
        String::from_utf8(bytes).unwrap()
    }
}

/// A file that is gone when the test is.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("turtles-boot-{}-{name}", std::process::id()));
        File::create(&path).unwrap().write_all(bytes).unwrap();
        Self(path)
    }

    fn name(&self) -> String {
        file_name(&self.0)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn spec(cmdline: &str) -> BootSpec {
    BootSpec { kernel: "kernel".into(), cmdline: cmdline.into(), cpus: 1, ..BootSpec::default() }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A bzImage of protocol 2.15 as Debian's kernel has it, with one sector of setup and `payload` behind.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &((payload.len() / 16) as u32).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    image[0x211] = 0x81;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x80_0000u32.to_le_bytes());
    image.extend_from_slice(payload);
    image
}

#[test]
fn linux_starts_at_its_64_bit_entry() {
    let machine = Machine::new(64 << 20);
    let initrd = TemporaryFile::new("initrd", &[0x5a; 5000]);
    let mut spec = spec("console=ttyS0");
    spec.initrd = Some(initrd.0.clone());
    let state = machine.boot(&bzimage(&[0x77; 4096]), &spec).unwrap();
    assert_eq!((state.protocol, state.rip), (Protocol::Linux64, 0x100_0200));
    assert_eq!(state.rflags, 2);
    assert_eq!(state.efer & 0x500, 0x500);
    assert_eq!((state.cr0 & 0x8000_0001, state.cr4), (0x8000_0001, 0x20));
    assert_eq!(state.segments.map(|s| s.selector), [0x18, 0x10, 0x18, 0x18, 0x18, 0x18]);
    assert_eq!(machine.bytes(0x100_0000, 4096), [0x77; 4096]);

    let zero_page = state.gpr[gpr::RSI];
    assert_eq!(machine.bytes(zero_page + 0x202, 4), b"HdrS");
    assert_eq!(machine.bytes(zero_page + 0x210, 2), [0xff, 0x01], "loader and flags");
    assert_eq!(machine.bytes(zero_page + 0x1ef, 1), [0], "sentinel");
    assert_eq!(machine.u64(zero_page + 0x070), state.rsdp);
    assert_eq!(machine.string(machine.u32(zero_page + 0x228).into()), "console=ttyS0");
    let (at, size) = (u64::from(machine.u32(zero_page + 0x218)), machine.u32(zero_page + 0x21c));
    assert_eq!((at, size), ((64 << 20) - 8192, 5000));
    assert_eq!(machine.bytes(at, 5000), [0x5a; 5000]);
    let e820: Vec<(u64, u64, u32)> = (0..u64::from(machine.bytes(zero_page + 0x1e8, 1)[0]))
        .map(|i| zero_page + 0x2d0 + i * 20)
        .map(|at| (machine.u64(at), machine.u64(at + 8), machine.u32(at + 16)))
        .collect();
    assert_eq!(
        e820,
        [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (0x10_0000, 63 << 20, 1), (0xe000_0000, 0x1000_0000, 2)]
    );
}

#[test]
fn linux_without_a_64_bit_entry_starts_in_protected_mode() {
    let mut image = bzimage(&[0x77; 4096]);
    image[0x236] = 0;
    let state = Machine::new(64 << 20).boot(&image, &spec("")).unwrap();
    assert_eq!((state.protocol, state.rip), (Protocol::Linux32, 0x100_0000));
    assert_eq!((state.cr0, state.cr3, state.efer), (0x11, 0, 0));
    assert_eq!(state.segments[1].access, 0xc09b);
}

#[test]
fn only_the_real_header_is_copied() {
    let mut image = bzimage(&[0x77; 4096]);
    image[0x201] = 0x62;
    image[0x264..0x290].fill(0xee);
    let machine = Machine::new(64 << 20);
    let state = machine.boot(&image, &spec("")).unwrap();
    assert_eq!(machine.bytes(state.gpr[gpr::RSI] + 0x264, 0x2c), [0; 0x2c]);
}

#[test]
fn linux_says_what_is_wrong() {
    let machine = Machine::new(64 << 20);
    let good = bzimage(&[0x77; 4096]);
    let message = |image: &[u8], spec: &BootSpec| machine.boot(image, spec).unwrap_err().to_string();
    assert!(machine.boot(&good, &spec(&"x".repeat(255))).is_ok());
    assert!(matches!(
        machine.boot(&good, &spec(&"x".repeat(256))),
        Err(BootError::CommandLineTooLong { len: 256, max: 255, .. })
    ));
    let truncated = message(&good[..5000], &spec(""));
    assert!(truncated.contains("truncated") && truncated.contains("5120"), "{truncated}");
    let mut old = good.clone();
    put(&mut old, 0x206, &0x0205u16.to_le_bytes());
    assert!(message(&old, &spec("")).contains("2.05"));
    let mut zimage = good.clone();
    zimage[0x211] = 0;
    assert!(message(&zimage, &spec("")).contains("zImage"));
    let mut nowhere = good.clone();
    put(&mut nowhere, 0x258, &u64::MAX.to_le_bytes());
    assert!(matches!(machine.boot(&nowhere, &spec("")), Err(BootError::Damaged { .. })));
    assert!(matches!(machine.boot(&good, &spec("a\0b")), Err(BootError::ZeroInCommandLine { .. })));
    let small = Machine::new(16 << 20).boot(&good, &spec("")).unwrap_err().to_string();
    assert!(small.contains("at least 24M") && small.contains("--memory"), "{small}");
}

#[test]
fn an_initrd_that_does_not_fit_says_how_much_memory_would_do() {
    let initrd = TemporaryFile::new("large", &vec![1; 16 << 20]);
    let mut spec = spec("");
    spec.initrd = Some(initrd.0.clone());
    let image = bzimage(&[0x77; 4096]);
    let error = Machine::new(32 << 20).boot(&image, &spec).unwrap_err().to_string();
    assert!(error.contains("40M"), "{error}");
    Machine::new(40 << 20).boot(&image, &spec).unwrap();
    let mut limited = image.clone();
    put(&mut limited, 0x22c, &0x17f_ffffu32.to_le_bytes());
    let error = Machine::new(64 << 20).boot(&limited, &spec).unwrap_err();
    assert!(matches!(error, BootError::InitrdAboveLimit { max: 0x180_0000, .. }), "{error}");
}

#[test]
fn pvh_gets_its_start_info() {
    let module = TemporaryFile::new("pvh-module", b"module");
    let initrd = TemporaryFile::new("pvh-initrd", &[3; 4097]);
    let mut elf = ElfBuilder::new(true, CODE, &[0x90; 64]);
    elf.note = Some(pvh_note(CODE as u32 + 0x20));
    let machine = Machine::new(16 << 20);
    let mut spec = spec("a b");
    spec.initrd = Some(initrd.0.clone());
    spec.modules = vec![(module.0.clone(), "arguments".into())];
    let state = machine.boot(&elf.build(), &spec).unwrap();
    assert_eq!((state.protocol, state.rip), (Protocol::Pvh, CODE + 0x20));
    assert_eq!((state.cr0, state.cr4, state.efer, state.rflags), (0x11, 0, 0, 2));
    assert_eq!((state.segments[1].access, state.segments[3].access), (0xc09b, 0xc093));
    assert_eq!((state.tr.limit, state.tr.access), (0x67, 0x8b));
    let info = state.gpr[gpr::RBX];
    assert_eq!([0, 4, 8, 12].map(|o| machine.u32(info + o)), [0x336e_c578, 1, 0, 2]);
    assert_eq!(machine.string(machine.u64(info + 24)), "a b");
    assert_eq!(machine.u64(info + 32), state.rsdp);
    let modules = machine.u64(info + 16);
    assert_eq!(machine.bytes(machine.u64(modules), machine.u64(modules + 8) as usize), [3; 4097]);
    assert_eq!(machine.bytes(machine.u64(modules + 32), 6), b"module");
    assert_eq!(machine.u64(modules + 40), 6);
    assert_eq!(machine.string(machine.u64(modules + 48)), "arguments");
    let (map, count) = (machine.u64(info + 40), machine.u32(info + 48));
    let last = map + u64::from(count - 2) * 24;
    assert_eq!((count, machine.u64(last), machine.u32(last + 16)), (4, 0x10_0000, 1));
}

#[test]
fn a_pvh_entry_outside_the_image_is_refused() {
    let mut elf = ElfBuilder::new(true, CODE, &[0x90; 64]);
    elf.note = Some(pvh_note(0x30_0000));
    let error = Machine::new(16 << 20).boot(&elf.build(), &spec("")).unwrap_err();
    assert!(matches!(error, BootError::Damaged { .. }), "{error}");
}

fn multiboot1_header(flags: u32) -> Vec<u8> {
    words(&[0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags)])
}

#[test]
fn multiboot1_gets_memory_modules_and_names() {
    let module = TemporaryFile::new("mb1-module", b"module");
    let machine = Machine::new(16 << 20);
    let mut code = vec![0x90; 16];
    code.extend(multiboot1_header(3));
    let mut spec = spec("arg");
    spec.modules = vec![(module.0.clone(), "x y".into()), (module.0.clone(), String::new())];
    let state = machine.boot(&ElfBuilder::new(false, CODE, &code).build(), &spec).unwrap();
    assert_eq!((state.protocol, state.rip, state.gpr[gpr::RAX]), (Protocol::Multiboot1, CODE, 0x2bad_b002));
    assert_eq!((state.cr0, state.efer), (0x11, 0));
    let info = state.gpr[gpr::RBX];
    let field = |at: u64| u64::from(machine.u32(info + at));
    assert_eq!(field(0), 0b10_0100_1101);
    assert_eq!((field(4), field(8)), (639, 15 << 10));
    assert_eq!(machine.string(field(16)), "kernel arg");
    assert_eq!(machine.string(field(64)), concat!("turtles ", env!("CARGO_PKG_VERSION")));
    assert_eq!(field(20), 2);
    let first = field(24);
    let (start, end) = (u64::from(machine.u32(first)), u64::from(machine.u32(first + 4)));
    assert_eq!((start, end), (CODE + 0x1000, CODE + 0x1006), "on a page behind the kernel");
    assert_eq!(machine.bytes(start, 6), b"module");
    assert_eq!(machine.string(machine.u32(first + 8).into()), format!("{} x y", module.name()));
    assert_eq!(machine.string(machine.u32(first + 24).into()), module.name());
    let (mut at, end) = (field(48), field(48) + field(44));
    let mut map = Vec::new();
    while at < end {
        map.push((machine.u64(at + 4), machine.u64(at + 12), machine.u32(at + 20)));
        at += u64::from(machine.u32(at)) + 4;
    }
    assert_eq!(at, end);
    assert_eq!((map[0], map[2]), ((0, 0x9_fc00, 1), (0x10_0000, 15 << 20, 1)));
}

#[test]
fn multiboot1_addresses_load_any_file() {
    let mut image = vec![0x11; 8];
    image.extend(multiboot1_header(1 << 16));
    // Header at 0x300008; load from 4 bytes before it up to 0x300024, clear to 0x300030, enter at 0x300010.
    image.extend(words(&[0x30_0008, 0x30_0004, 0x30_0024, 0x30_0030, 0x30_0010]));
    image.resize(64, 0x22);
    let machine = Machine::new(16 << 20);
    machine.ram.memory.write_slice(&[0xff; 0x80], GuestAddress(0x30_0000)).unwrap();
    let state = machine.boot(&image, &spec("")).unwrap();
    assert_eq!((state.protocol, state.rip), (Protocol::Multiboot1, 0x30_0010));
    assert_eq!(machine.bytes(0x30_0000, 4), [0xff; 4]);
    assert_eq!(machine.bytes(0x30_0004, 0x20), image[4..0x24]);
    assert_eq!(machine.bytes(0x30_0024, 0xc), [0; 0xc]);
    assert_eq!(machine.bytes(0x30_0030, 4), [0xff; 4]);
    put(&mut image, 8 + 12, &words(&[0x30_0000]));
    assert!(matches!(machine.boot(&image, &spec("")), Err(BootError::Damaged { .. })));
}

#[test]
fn multiboot1_requirements_we_do_not_know_are_refused() {
    let image = ElfBuilder::new(false, CODE, &multiboot1_header(0x13)).build();
    let error = Machine::new(16 << 20).boot(&image, &spec("")).unwrap_err().to_string();
    assert!(error.contains("0x10"), "{error}");
}

/// A Multiboot2 header with these `(type, flags, words)` tags and the end tag.
fn multiboot2_header(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, flags, content) in tags.iter().chain(&[(0, 0, &[] as &[u32])]) {
        body.extend(kind.to_le_bytes());
        body.extend(flags.to_le_bytes());
        body.extend((8 + content.len() as u32 * 4).to_le_bytes());
        body.extend(words(content));
        body.resize(body.len().next_multiple_of(8), 0);
    }
    let len = 16 + body.len() as u32;
    let checksum = 0u32.wrapping_sub(0xe852_50d6).wrapping_sub(len);
    let mut header = words(&[0xe852_50d6, 0, len, checksum]);
    header.extend(body);
    header
}

/// An ELF file whose segment begins with such a header. Its segment is 8-byte aligned in the file only in 64 bits.
fn multiboot2_elf(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    let mut code = multiboot2_header(tags);
    code.resize(0x1000, 0x90);
    ElfBuilder::new(true, CODE, &code).build()
}

/// `(type, address of contents, size of contents)` of each tag of the boot information.
fn multiboot2_tags(machine: &Machine, info: u64) -> Vec<(u32, u64, u32)> {
    let end = info + u64::from(machine.u32(info));
    let mut tags = Vec::new();
    let mut at = info + 8;
    while at < end {
        let (kind, size) = (machine.u32(at), machine.u32(at + 4));
        tags.push((kind, at + 8, size - 8));
        at += u64::from(size).next_multiple_of(8);
    }
    assert_eq!((info % 8, at), (0, end));
    assert_eq!(tags.last().map(|t| (t.0, t.2)), Some((0, 0)));
    tags
}

#[test]
fn multiboot2_gets_its_tags() {
    let module = TemporaryFile::new("mb2-module", b"module");
    let machine = Machine::new(16 << 20);
    let mut spec = spec("arg");
    spec.modules = vec![(module.0.clone(), "x".into())];
    let state = machine.boot(&multiboot2_elf(&[(1, 0, &[4, 6, 8]), (6, 0, &[])]), &spec).unwrap();
    assert_eq!((state.protocol, state.rip, state.gpr[gpr::RAX]), (Protocol::Multiboot2, CODE, 0x36d7_6289));
    let tags = multiboot2_tags(&machine, state.gpr[gpr::RBX]);
    let kinds: Vec<u32> = tags.iter().map(|t| t.0).collect();
    assert_eq!(kinds, [1, 2, 3, 4, 6, 14, 15, 0]);
    let of = |kind| tags.iter().find(|t| t.0 == kind).map(|t| t.1).unwrap();
    assert_eq!(machine.string(of(1)), "kernel arg");
    let start = u64::from(machine.u32(of(3)));
    assert_eq!((start, machine.u32(of(3) + 4)), (CODE + 0x1000, CODE as u32 + 0x1006));
    assert_eq!(machine.bytes(start, 6), b"module");
    assert_eq!(machine.string(of(3) + 8), format!("{} x", module.name()));
    assert_eq!((machine.u32(of(4)), machine.u32(of(4) + 4)), (639, 15 << 10));
    assert_eq!((machine.u32(of(6)), machine.u32(of(6) + 4)), (24, 0));
    assert_eq!((machine.u64(of(6) + 8), machine.u64(of(6) + 16), machine.u32(of(6) + 24)), (0, 0x9_fc00, 1));
    assert_eq!(machine.bytes(of(15), 36), machine.bytes(state.rsdp, 36));
}

#[test]
fn multiboot2_entry_and_relocation_are_honoured() {
    let machine = Machine::new(16 << 20);
    let relocatable =
        |preference: u32| multiboot2_elf(&[(10, 1, &[0x10_0000, u32::MAX, 0x20_0000, preference])]);
    for (preference, base) in [(0, 0x20_0000), (1, 0x20_0000), (2, 0xe0_0000)] {
        let state = machine.boot(&relocatable(preference), &spec("")).unwrap();
        assert_eq!(state.rip, base, "preference {preference}");
        assert_eq!(machine.u32(base), 0xe852_50d6);
        let tags = multiboot2_tags(&machine, state.gpr[gpr::RBX]);
        let load_base = tags.iter().find(|t| t.0 == 21).unwrap().1;
        assert_eq!(u64::from(machine.u32(load_base)), base);
    }
    let entry = multiboot2_elf(&[(3, 0, &[CODE as u32 + 0x800])]);
    assert_eq!(machine.boot(&entry, &spec("")).unwrap().rip, CODE + 0x800);
}

#[test]
fn multiboot2_addresses_load_any_file() {
    let mut image = multiboot2_header(&[(2, 0, &[0x30_0000, u32::MAX, 0, 0x30_2000]), (3, 0, &[0x30_0100])]);
    image.resize(0x1000, 0x33);
    let machine = Machine::new(16 << 20);
    let state = machine.boot(&image, &spec("")).unwrap();
    assert_eq!((state.protocol, state.rip), (Protocol::Multiboot2, 0x30_0100));
    assert_eq!(machine.bytes(0x30_0000, 0x1000), image);
}

#[test]
fn multiboot2_requests_we_cannot_meet_end_the_boot_unless_optional() {
    let machine = Machine::new(16 << 20);
    let cases: [(u16, &[u32]); 4] = [(7, &[]), (4, &[1]), (99, &[]), (1, &[77])];
    for (kind, content) in cases {
        let error = machine.boot(&multiboot2_elf(&[(kind, 0, content)]), &spec("")).unwrap_err();
        assert!(matches!(error, BootError::Unsupported { .. }), "tag {kind}: {error}");
        machine.boot(&multiboot2_elf(&[(kind, 1, content)]), &spec("")).unwrap();
    }
}

#[test]
fn sections_are_given_to_multiboot() {
    let mut image = multiboot2_elf(&[]);
    let strings = image.len() as u64;
    image.extend(b"\0.strtab\0");
    image.resize(image.len().next_multiple_of(8), 0);
    let table = image.len() as u64;
    image.resize(image.len() + 64, 0);
    let mut header = vec![0; 64];
    put(&mut header, 4, &3u32.to_le_bytes());
    put(&mut header, 24, &strings.to_le_bytes());
    put(&mut header, 32, &9u64.to_le_bytes());
    image.extend(header);
    put(&mut image, 40, &table.to_le_bytes());
    put(&mut image, 58, &[64, 0, 2, 0, 1, 0]);
    let machine = Machine::new(16 << 20);
    let state = machine.boot(&image, &spec("")).unwrap();
    let tags = multiboot2_tags(&machine, state.gpr[gpr::RBX]);
    let sections = tags.iter().find(|t| t.0 == 9).unwrap().1;
    assert_eq!([0, 4, 8].map(|o| machine.u32(sections + o)), [2, 64, 1]);
    let address = machine.u64(sections + 12 + 64 + 16);
    assert_eq!(machine.bytes(address, 9), b"\0.strtab\0");
}

#[test]
fn plain_elf_starts_at_its_entry_with_a_stack_and_start_info() {
    let machine = Machine::new(16 << 20);
    for is_64bit in [false, true] {
        let mut elf = ElfBuilder::new(is_64bit, CODE, &[0x90; 64]);
        elf.entry = CODE + 0x10;
        let state = machine.boot(&elf.build(), &spec("hello")).unwrap();
        assert_eq!(state.rip, CODE + 0x10);
        assert_eq!(state.efer != 0, is_64bit);
        let info = state.gpr[gpr::RBX];
        assert_eq!(machine.u32(info), 0x336e_c578);
        assert_eq!(machine.string(machine.u64(info + 24)), "hello");
        assert!(state.gpr[gpr::RSP] % 16 == 0 && state.gpr[gpr::RSP] >= 0x1_4000);
    }
}

#[test]
fn flat_images_start_in_the_mode_asked_for() {
    let machine = Machine::new(16 << 20);
    let boot = |address, mode| {
        let flat = Some(FlatSpec { address, mode });
        machine.boot(&[0xf4; 512], &BootSpec { flat, ..spec("") })
    };
    let state = boot(0x7c00, FlatMode::Real16).unwrap();
    assert_eq!((state.cr0, state.segments[1].base, state.rip), (0x10, 0, 0x7c00));
    assert_eq!(machine.bytes(0x7c00, 512), [0xf4; 512]);
    assert_eq!(boot(0x10_0000, FlatMode::Protected32).unwrap().cr0, 0x11);
    assert_eq!(boot(0x10_0000, FlatMode::Long64).unwrap().efer, 0x500);
    assert!(matches!(boot(0x10_0000, FlatMode::Real16), Err(BootError::Unsupported { .. })));
    assert!(matches!(boot(0xf_fff0, FlatMode::Real16), Err(BootError::Overlap { .. })));
    assert!(matches!(boot(u64::MAX - 10, FlatMode::Long64), Err(BootError::OutsideRam { .. })));
    assert!(matches!(machine.boot(&[0xf4; 512], &spec("")), Err(BootError::UnknownFormat { .. })));
}

#[test]
fn gzip_is_transparent() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bzimage(&[0x77; 4096])).unwrap();
    let state = Machine::new(64 << 20).boot(&gzip.finish().unwrap(), &spec("")).unwrap();
    assert_eq!(state.protocol, Protocol::Linux64);
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let machine = Machine::new(16 << 20);
    let load = |spec: &BootSpec| load(&machine.ram.memory, &machine.ram.ranges, spec);
    let error = load(&BootSpec { kernel: "/nonexistent/k".into(), ..spec("") }).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/k"), "{error}");
    let error = load(&BootSpec { kernel: std::env::temp_dir(), ..spec("") }).unwrap_err();
    assert!(matches!(error, BootError::Read { .. }), "{error}");
    let empty = TemporaryFile::new("empty", b"");
    let error = load(&BootSpec { kernel: empty.0.clone(), ..spec("") }).unwrap_err();
    assert!(matches!(error, BootError::Empty { .. }), "{error}");
    let large = TemporaryFile::new("sparse", b"");
    File::options().write(true).open(&large.0).unwrap().set_len(1 << 40).unwrap();
    let error = load(&BootSpec { kernel: large.0.clone(), ..spec("") }).unwrap_err();
    assert!(matches!(error, BootError::MemoryTooSmall { .. }), "{error}");
}

#[test]
fn a_guest_finds_the_tables_where_a_bios_has_them() {
    let machine = Machine::new(16 << 20);
    let state = machine.boot(&ElfBuilder::new(false, CODE, &[0x90; 64]).build(), &spec("")).unwrap();
    let found = (0xe_0000..0x10_0000).step_by(16).find(|&at| machine.bytes(at, 8) == b"RSD PTR ");
    assert_eq!(found, Some(state.rsdp));
    assert_eq!(machine.bytes(0x40e, 2), [0xc0, 0x9f]);
    assert_eq!(machine.bytes(0x413, 2), 639u16.to_le_bytes());
}

#[test]
fn memory_above_the_hole_is_in_the_map() {
    let map = memory_map(&[(0, 0xc000_0000, 0), (1 << 32, 1 << 30, 0xc000_0000)]);
    let usable: Vec<(u64, u64)> =
        map.iter().filter(|r| r.kind == MemoryKind::Usable).map(|r| (r.start, r.len)).collect();
    assert_eq!(usable, [(0, 0x9_fc00), (0x10_0000, 0xbff0_0000), (1 << 32, 1 << 30)]);
    assert!(map.windows(2).all(|w| w[0].start + w[0].len <= w[1].start));
}

/// Small steps and large jumps in every header byte, and every length: errors are fine, panics are not.
#[test]
fn damaged_images_never_panic() {
    let machine = Machine::new(8 << 20);
    let mut with_addresses = vec![0; 8];
    with_addresses.extend(multiboot1_header(1 << 16));
    with_addresses.extend(words(&[0x30_0008, 0x30_0000, 0x30_0030, 0x30_0100, 0x30_0010, 0, 0, 0]));
    let mut pvh = ElfBuilder::new(true, CODE, &[0x90; 64]);
    pvh.note = Some(pvh_note(CODE as u32));
    let images = [
        bzimage(&[0x77; 64]),
        pvh.build(),
        ElfBuilder::new(false, CODE, &multiboot1_header(3)).build(),
        multiboot2_header(&[(2, 0, &[0x30_0000, 0x30_0000, 0, 0]), (3, 0, &[0x30_0000])]),
        multiboot2_elf(&[(1, 0, &[4, 6]), (10, 1, &[0, u32::MAX, 0x1000, 2])]),
        with_addresses,
    ];
    let spec = spec("x");
    for image in &images {
        let headers = image.len().min(1200);
        for at in 0..headers {
            let _ = machine.boot(&image[..at], &spec);
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                let _ = machine.boot(&image, &spec);
                let end = (at + 8).min(image.len());
                image[at..end].fill(value);
                let _ = machine.boot(&image, &spec);
            }
        }
    }
}

#[test]
fn kernels_in_files_load_as_those_in_memory() {
    let initrd = TemporaryFile::new("file-initrd", &vec![9; 200_001]);
    let payload: Vec<u8> = (0..700_000u32).map(|i| (i >> 4) as u8).collect();
    let kernel = TemporaryFile::new("file-kernel", &bzimage(&payload));
    let elf = TemporaryFile::new("file-elf", &ElfBuilder::new(true, CODE, &payload).build());
    let machine = Machine::new(64 << 20);
    let boot = |kernel: &TemporaryFile, initrd: Option<&TemporaryFile>| {
        let initrd = initrd.map(|f| f.0.clone());
        let spec = BootSpec { kernel: kernel.0.clone(), initrd, ..spec("") };
        load(&machine.ram.memory, &machine.ram.ranges, &spec)
    };
    let state = boot(&kernel, Some(&initrd)).unwrap();
    assert_eq!(machine.bytes(0x100_0000, payload.len()), payload);
    let at = u64::from(machine.u32(state.gpr[gpr::RSI] + 0x218));
    assert_eq!(machine.bytes(at, 200_001), vec![9; 200_001]);
    boot(&elf, None).unwrap();
    assert_eq!(machine.bytes(CODE, payload.len()), payload);
    File::options().write(true).open(&kernel.0).unwrap().set_len(600_000).unwrap();
    let error = boot(&kernel, None).unwrap_err();
    assert!(matches!(error, BootError::Truncated { has: 600_000, needs: 701_024, .. }), "{error}");
}
