//! RAM at the start: tables, handlers, and the arena's pages ([`crate::case`]) in two address spaces.
//!
//! Space A maps the arena's pages to frames 0 to 5, space B the data and the page that changes itself to frames of its own:
//! the same address has other bytes there, other code as well. Each maps them twice, at [`LOW`] and [`HIGH`].

use turtles_cpu::state::{Activity, CpuState, Seg, Segment, Shadow, TableRegister};
use x86defs::{cr0, cr4, efer, paging, segment, xcr0};

use super::handlers;
use crate::case::{CODE, DATA, HIGH, LOW, PAGE, PAGES, SELF, selector};

/// Bytes of RAM.
pub const RAM: usize = 1 << 20;
/// The supervisor's half: all of RAM, linearly.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Frames that page-table entries of the arena may name.
pub const FRAMES: u64 = 16;

/// Guest-physical addresses.
pub mod at {
    /// One for each space.
    pub const PML4: [u64; 2] = [0x1000, 0x2000];
    pub const PDPT: [u64; 2] = [0x3000, 0x4000];
    /// Page directories: low arena, then high arena.
    pub const DIRECTORY: [[u64; 2]; 2] = [[0x5000, 0x6000], [0x7000, 0x8000]];
    /// Page tables, in the same order.
    pub const TABLE: [[u64; 2]; 2] = [[0x9000, 0xa000], [0xb000, 0xc000]];
    /// How far from the tables the program finds copies of them.
    pub const COPY: u64 = 0x1_0000;
    pub const KERNEL_PDPT: u64 = 0xd000;
    pub const KERNEL_DIRECTORY: u64 = 0xe000;
    pub const KERNEL_TABLE: u64 = 0xf000;
    pub const IDT: u64 = 0x4_0000;
    pub const GDT: u64 = 0x4_1000;
    pub const TSS: u64 = 0x4_2000;
    pub const STUBS: u64 = 0x4_3000;
    pub const HANDLERS: u64 = 0x4_4000;
    /// What the handlers and the program know of each other; see [`super::super::handlers::variable`].
    pub const VARIABLES: u64 = 0x4_5000;
    pub const HANDLER_STACK: u64 = 0x4_8000;
    pub const RING0_STACK: u64 = 0x4_a000;
    pub const FRAMES: u64 = 0x8_0000;
}

/// Selectors.
pub const KERNEL_CODE: u16 = 0x10;
pub const KERNEL_DATA: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x40;

/// Physical address of a frame.
pub fn frame(number: u64) -> u64 {
    at::FRAMES + (number % FRAMES) * PAGE as u64
}

/// Physical address of the entry that maps the arena's page at `offset` in a space, low (0) or high (1).
pub fn entry_at(space: usize, half: usize, offset: u64) -> u64 {
    at::TABLE[space][half] + offset / PAGE as u64 * 8
}

fn put(ram: &mut [u8], address: u64, value: u64) {
    ram[address as usize..][..8].copy_from_slice(&value.to_le_bytes());
}

/// RAM with everything but the program.
pub fn build() -> Vec<u8> {
    let mut ram = vec![0; RAM];
    let upper = paging::PRESENT | paging::WRITE | paging::USER;
    let leaf = upper | paging::ACCESSED;
    for space in 0..2 {
        put(&mut ram, at::PML4[space], at::PDPT[space] | upper);
        put(&mut ram, at::PML4[space] + 256 * 8, at::KERNEL_PDPT | upper);
        for (half, base) in [LOW, HIGH].into_iter().enumerate() {
            let directory = at::DIRECTORY[space][half];
            put(&mut ram, at::PDPT[space] + (base >> 30 & 511) * 8, directory | upper);
            put(&mut ram, directory + (base >> 21 & 511) * 8, at::TABLE[space][half] | upper);
            for (index, &(offset, _)) in PAGES.iter().enumerate() {
                let own = space == 1 && ((DATA..CODE).contains(&offset) || offset == SELF);
                let number = index as u64 + if own { PAGES.len() as u64 } else { 0 };
                put(&mut ram, entry_at(space, half, offset), frame(number) | leaf);
            }
            let read_only = entry_at(space, half, crate::case::READ_ONLY);
            ram[read_only as usize] &= !(paging::WRITE as u8);
        }
    }
    put(&mut ram, at::KERNEL_PDPT, at::KERNEL_DIRECTORY | upper);
    put(&mut ram, at::KERNEL_DIRECTORY, at::KERNEL_TABLE | upper);
    for page in 0..(RAM / PAGE) as u64 {
        let entry = (page * PAGE as u64) | paging::PRESENT | paging::WRITE | paging::GLOBAL;
        put(&mut ram, at::KERNEL_TABLE + page * 8, entry | paging::ACCESSED | paging::DIRTY);
    }
    descriptors(&mut ram);
    handlers::write(&mut ram);
    ram
}

fn descriptors(ram: &mut [u8]) {
    for (selector, descriptor) in [
        (KERNEL_CODE, 0x00af_9b00_0000_ffff),
        (KERNEL_DATA, 0x00cf_9300_0000_ffff),
        (selector::CODE32, 0x00cf_fb00_0000_ffff),
        (selector::DATA, 0x00cf_f300_0000_ffff),
        (selector::CODE64, 0x00af_fb00_0000_ffff),
    ] {
        put(ram, at::GDT + u64::from(selector & !7), descriptor);
    }
    for vector in 0..=255 {
        let stub = KERNEL + handlers::stub(vector);
        // The handler's stack is always the same one, so that a bad stack pointer is no double fault.
        let low = stub & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | 1 << 32
            | (if matches!(vector, 3 | 4 | 0x80) { 0xee } else { 0x8e }) << 40
            | (stub >> 16 & 0xffff) << 48;
        put(ram, at::IDT + u64::from(vector) * 16, low);
        put(ram, at::IDT + u64::from(vector) * 16 + 8, stub >> 32);
    }
    put(ram, at::TSS + 4, KERNEL + at::RING0_STACK);
    put(ram, at::TSS + 36, KERNEL + at::HANDLER_STACK);
    ram[at::TSS as usize + 102..][..2].copy_from_slice(&[0xff, 0xff]);
}

fn flat(selector: u16, access: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, access, selector }
}

/// The supervisor in 64-bit mode, in space A.
pub fn start(reset: &CpuState) -> CpuState {
    let mut state = reset.clone();
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    state.cr3 = at::PML4[0];
    state.cr4 = CR4;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    *state.seg_mut(Seg::Cs) = flat(KERNEL_CODE, 0x9b | segment::L | segment::G);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es] {
        *state.seg_mut(seg) = flat(KERNEL_DATA, 0x93 | segment::DB | segment::G);
    }
    for seg in [Seg::Fs, Seg::Gs] {
        *state.seg_mut(seg) = Segment { base: 0, limit: 0xffff_ffff, access: segment::UNUSABLE, selector: 0 };
    }
    state.ldtr = Segment { base: 0, limit: 0, access: segment::UNUSABLE, selector: 0 };
    state.tr = Segment { base: KERNEL + at::TSS, limit: 0x67, access: 0x8b, selector: TSS_SELECTOR };
    state.gdtr = TableRegister { base: KERNEL + at::GDT, limit: 0x7f };
    state.idtr = TableRegister { base: KERNEL + at::IDT, limit: 0xfff };
    state.msrs.star = u64::from(KERNEL_CODE) << 32 | u64::from(selector::CODE32) << 48;
    state.msrs.lstar = KERNEL + handlers::system_call();
    state.msrs.fmask = x86defs::rflags::IF | x86defs::rflags::TF | x86defs::rflags::DF;
    state.cpl = 0;
    state.activity = Activity::Active;
    state.shadow = Shadow::None;
    state
}

/// CR4 at the start.
pub const CR4: u64 =
    cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::PGE | cr4::PCIDE;
