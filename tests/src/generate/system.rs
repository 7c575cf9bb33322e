//! Programs for the supervisor of [`crate::machine`]: sections of random code between which exceptions resume, with
//! page-table edits, switches of the address space, code that is changed through another address or replaced by
//! another frame, traps, breakpoints, interrupts, and stretches in ring 3.
//!
//! What the architecture leaves open is avoided by construction: whoever edits an entry invalidates it before anything
//! uses the page.

use std::sync::OnceLock;

use iced_x86::Register;
use x86defs::{cr3, cr4, paging, rflags};

use super::flow::Flow;
use super::values;
use crate::case::{CODE, DATA, Fpu, HIGH, LOW, PAGE, PAGES, READ_ONLY, SELF, STOP};
use crate::machine::handlers::variable;
use crate::machine::world::{self, CR4, KERNEL, at, entry_at, frame};
use crate::random::{Random, mix};

/// A program and all it starts from.
pub struct Program {
    pub ram: Vec<u8>,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fpu: Fpu,
}

/// Functions in the page that changes itself: how many, and how far apart.
const SLOTS: u64 = 6;
const SLOT: u64 = 0x200;
/// Frames with the same code as the arena's two pages of code.
const COPIES: u64 = 12;
/// Offset of operands of INVPCID, LGDT and LIDT from [`at::VARIABLES`].
const OPERANDS: u64 = 0x100;

/// Makes the program of that seed.
pub fn program(seed: u64) -> Program {
    static EMPTY: OnceLock<Vec<u8>> = OnceLock::new();
    let mut random = Random::new(mix(&[seed, 0x5157]));
    let random = &mut random;
    let mut ram = EMPTY.get_or_init(world::build).clone();
    for number in [0, 1, 2, 6, 7, 8, 14, 15] {
        values::fill(random, &mut ram[frame(number) as usize..][..PAGE]);
    }
    for number in [3, 4, 5, 9, 10, 11] {
        ram[frame(number) as usize..][..PAGE].fill(STOP);
    }
    operands(&mut ram);
    for table in at::TABLE.into_iter().flatten() {
        ram.copy_within(table as usize..table as usize + PAGE, (table + at::COPY) as usize);
    }
    let base = random.pick(&[LOW, HIGH]);
    let calm = random.pick(&[70, 95, 100]);
    for number in [5, 11] {
        let code = functions(random, base, calm);
        ram[frame(number) as usize..][..code.len()].copy_from_slice(&code);
    }
    let (rip, start, code) = main(random, base, calm);
    let offset = start - base - CODE;
    for number in [3, COPIES] {
        ram[(frame(number) + offset) as usize..][..code.len()].copy_from_slice(&code);
    }
    let mut gpr = [0; 16];
    gpr.iter_mut().for_each(|reg| *reg = values::integer(random));
    let mut fpu = values::fpu(random);
    fpu.fcw |= 0x3f;
    fpu.mxcsr |= 0x1f80;
    let flags = random.bits() & rflags::STATUS | rflags::FIXED_1;
    Program { ram, gpr, rip, rflags: flags, fpu }
}

fn operands(ram: &mut [u8]) {
    let mut put = |offset: u64, limit: u16, base: u64| {
        let at = (at::VARIABLES + OPERANDS + offset) as usize;
        ram[at..at + 2].copy_from_slice(&limit.to_le_bytes());
        ram[at + 2..at + 10].copy_from_slice(&base.to_le_bytes());
    };
    put(0x20, 0x7f, KERNEL + at::GDT);
    put(0x30, 0xfff, KERNEL + at::IDT);
}

/// The page that changes itself: functions, each with an immediate in its first instruction.
fn functions(random: &mut Random, base: u64, calm: u64) -> Vec<u8> {
    let mut page = vec![0xc3; PAGE];
    for slot in 0..SLOTS {
        let mut flow = Flow::new(random, base + SELF + slot * SLOT, SLOT as usize / 3);
        flow.filler.native = false;
        flow.filler.calm = calm.max(95);
        flow.writable = true;
        let opcode = flow.random.pick(&[0xb8, 0x05, 0x35, 0x3d]);
        flow.code.push(opcode);
        let immediate = flow.random.bits() as u32;
        flow.code.extend(immediate.to_le_bytes());
        flow.filler.kept = super::flow::COUNTERS.to_vec();
        flow.body(3, 1);
        flow.code.push(0xc3);
        let code = &flow.code;
        if code.len() <= SLOT as usize {
            page[(slot * SLOT) as usize..][..code.len()].copy_from_slice(code);
        }
    }
    page
}

/// The sections; where execution starts, where the code does, and the code.
fn main(random: &mut Random, base: u64, calm: u64) -> (u64, u64, Vec<u8>) {
    let limit = random.pick(&[400, 1200, 2500, 3500]);
    let start = base + CODE + random.below(0x1000);
    let mut flow = Flow::new(random, start, limit);
    flow.filler.native = false;
    flow.filler.calm = calm;
    flow.writable = true;
    for _ in 0..flow.random.below(4) {
        flow.function();
    }
    let rip = flow.here();
    let sections = 2 + flow.random.below(8);
    for number in 0..sections {
        flow.limit = flow.code.len() + limit / sections as usize;
        section(&mut flow, number + 1 == sections);
    }
    (rip, start, flow.code)
}

fn section(flow: &mut Flow, last: bool) {
    // mov rax, imm64; mov [RESUME], rax
    flow.code.extend([0x48, 0xb8]);
    let next = flow.code.len();
    flow.code.extend([0; 8]);
    flow.store_rax(KERNEL + at::VARIABLES + variable::RESUME);
    let user = flow.random.chance(30);
    flow.safe_stack = (!user).then_some(KERNEL + at::RING0_STACK);
    flow.good_stack();
    // mov rax, rsp
    flow.code.extend([0x48, 0x89, 0xe0]);
    flow.store_rax(KERNEL + at::VARIABLES + variable::STACK);
    reset_modes(flow);
    if flow.random.chance(40) {
        restore_tables(flow);
    }
    if user {
        enter_ring_3(flow);
        flow.extra = None;
    } else {
        flow.extra = Some(piece);
    }
    while !flow.full() {
        flow.body(3, 3);
    }
    if user {
        // int 0x80, syscall or ud2
        let leave: [u8; 2] = flow.random.pick(&[[0xcd, 0x80], [0x0f, 0x05], [0x0f, 0x0b]]);
        flow.code.extend(leave);
    }
    let here = flow.here();
    flow.code[next..next + 8].copy_from_slice(&here.to_le_bytes());
    if last {
        flow.code.extend([0xfa, 0xf4, 0xeb, 0xfc]);
    }
}

/// What a section before may have left.
fn reset_modes(flow: &mut Flow) {
    if flow.random.chance(60) {
        // mov rax, ..; mov cr4, rax
        let more = flow.random.pick(&[0, 0, 0, cr4::SMAP, cr4::UMIP]);
        flow.load(Register::RAX, CR4 | more);
        flow.code.extend([0x0f, 0x22, 0xe0]);
    }
    if flow.random.chance(60) {
        let changed = flow.random.pick(&[0, 0, 0, x86defs::cr0::WP, x86defs::cr0::TS]);
        flow.load(Register::RAX, 0x8005_0033 ^ changed);
        flow.code.extend([0x0f, 0x22, 0xc0]);
    }
    let interrupts = flow.random.pick(&[0xfa, 0xfb]);
    flow.code.push(interrupts);
}

/// The page tables as they were, from their copies.
fn restore_tables(flow: &mut Flow) {
    for table in at::TABLE.into_iter().flatten() {
        flow.load(Register::RSI, KERNEL + table + at::COPY);
        flow.load(Register::RDI, KERNEL + table);
        flow.load(Register::RCX, PAGES.len() as u64 * 2);
        // cld; rep movsq
        flow.code.extend([0xfc, 0xf3, 0x48, 0xa5]);
    }
    toggle_global(flow);
}

/// `mov rax, cr4; xor al, PGE; mov cr4, rax` and back: drops all translations.
fn toggle_global(flow: &mut Flow) {
    flow.code.extend([0x0f, 0x20, 0xe0]);
    for _ in 0..2 {
        flow.code.extend([0x34, 0x80, 0x0f, 0x22, 0xe0]);
    }
}

fn enter_ring_3(flow: &mut Flow) {
    let flags = rflags::FIXED_1 | flow.random.pick(&[0, rflags::IF]);
    if flow.random.chance(30) {
        // lea rcx, [rip + 13]; mov r11, flags; sysretq
        flow.code.extend([0x48, 0x8d, 0x0d, 13, 0, 0, 0]);
        flow.load(Register::R11, flags);
        flow.code.extend([0x48, 0x0f, 0x07]);
        return;
    }
    // mov rax, rsp; push SS; push rax; push flags; push CS; lea rax, [rip + 3]; push rax; iretq
    flow.code.extend([0x48, 0x89, 0xe0, 0x6a, crate::case::selector::DATA as u8, 0x50, 0x68]);
    flow.code.extend((flags as u32).to_le_bytes());
    flow.code.extend([0x6a, crate::case::selector::CODE64 as u8]);
    flow.code.extend([0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xcf]);
}

impl Flow<'_> {
    /// `mov [address], rax`.
    fn store_rax(&mut self, address: u64) {
        self.code.extend([0x48, 0xa3]);
        self.code.extend(address.to_le_bytes());
    }

    fn store(&mut self, address: u64, value: u64) {
        self.load(Register::RAX, value);
        self.store_rax(address);
    }
}

/// One piece of what only a supervisor does. Uses RAX and RDX, and RCX if no loop counts in it.
fn piece(flow: &mut Flow) {
    match flow.random.below(22) {
        0..=3 => edit_entry(flow),
        4 | 5 => switch_space(flow),
        6 | 7 => {
            let target = slot(flow);
            call_slot(flow, target);
        }
        8 | 9 => {
            let target = slot(flow);
            change_slot(flow, target);
        }
        18.. => rounds(flow),
        10 => data_beside_code(flow),
        11 => trap_flag(flow),
        12 => breakpoint(flow),
        13 => {
            // mov al, vector; out 0x10, al
            let vector = flow.random.bits() as u8;
            flow.code.extend([0xb0, vector, 0xe6, 0x10]);
        }
        14 => {
            // sti, cli, clts, stac, clac
            let pieces: [&[u8]; 6] =
                [&[0xfb], &[0xfa], &[0xfb, 0x90], &[0x0f, 0x06], &[0x0f, 1, 0xcb], &[0x0f, 1, 0xca]];
            flow.code.extend(flow.random.pick(&pieces));
        }
        15 => toggle_mode(flow),
        16 => fill_page(flow),
        _ => plain_system(flow),
    }
}

/// Changes the entry that maps a page, and sees to it that no translation made of it stays.
fn edit_entry(flow: &mut Flow) {
    let offset = flow.random.pick(&[DATA, DATA, DATA + 0x1000, READ_ONLY, SELF, SELF, CODE, CODE + 0x1000]);
    edit_entry_of(flow, offset);
}

fn edit_entry_of(flow: &mut Flow, offset: u64) {
    let (space, half) = (flow.random.below(2) as usize, flow.random.below(2) as usize);
    flow.load(Register::RDX, KERNEL + entry_at(space, half, offset));
    match flow.random.below(if offset == CODE || offset == CODE + 0x1000 { 4 } else { 8 }) {
        // and byte [rdx], ~(A | D): accessed and dirty bits are to be set again.
        0 | 1 => flow.code.extend([0x80, 0x22, 0x9f]),
        // xor byte [rdx], WRITE
        2 => flow.code.extend([0x80, 0x32, 0x02]),
        3 if (CODE..SELF).contains(&offset) => {
            // The same code from another frame.
            let page = (offset - CODE) / PAGE as u64;
            let number = page + flow.random.pick(&[3, COPIES]);
            let entry = frame(number) | paging::PRESENT | paging::WRITE | paging::USER;
            flow.load(Register::RAX, entry);
            flow.code.extend([0x48, 0x89, 0x02]);
        }
        // xor byte [rdx], USER
        3 => flow.code.extend([0x80, 0x32, 0x04]),
        _ => {
            let entry = any_entry(flow.random, offset);
            flow.load(Register::RAX, entry);
            // mov [rdx], rax or xchg [rdx], rax
            let opcode = flow.random.pick(&[0x89, 0x87]);
            flow.code.extend([0x48, opcode, 0x02]);
        }
    }
    invalidate(flow, space, half, offset);
    if flow.random.chance(50) {
        // Use it.
        let address = if half == 0 { LOW } else { HIGH } + offset + flow.random.below(0x1000 - 8);
        flow.load(Register::RDX, address);
        let opcode = flow.random.pick(&[0x8b, 0x03, 0x89, 0x01]);
        flow.code.extend([0x48, opcode, 0x02]);
    }
}

fn any_entry(random: &mut Random, offset: u64) -> u64 {
    let numbers: &[u64] = if offset == SELF { &[5, 11, 5, 11, 0] } else { &[0, 1, 2, 6, 7, 8, 14, 15, 5] };
    let mut entry = frame(random.pick(numbers));
    for (percent, bit) in [
        (92, paging::PRESENT),
        (80, paging::WRITE),
        (85, paging::USER),
        (8, paging::NX),
        (50, paging::ACCESSED),
        (50, paging::DIRTY),
    ] {
        if random.chance(percent) {
            entry |= bit;
        }
    }
    entry
}

fn invalidate(flow: &mut Flow, space: usize, half: usize, offset: u64) {
    let address = if half == 0 { LOW } else { HIGH } + offset;
    let kind = flow.random.below(6);
    match kind {
        // INVPCID: one address, one context, everything, everything but global
        0..=3 => {
            let operand = KERNEL + at::VARIABLES + OPERANDS;
            flow.store(operand, if kind < 2 { space as u64 } else { 0 });
            flow.store(operand + 8, if kind == 0 { address } else { 0 });
            flow.load(Register::RDX, operand);
            flow.load(Register::RAX, kind);
            flow.code.extend([0x66, 0x0f, 0x38, 0x82, 0x02]);
        }
        4 => toggle_global(flow),
        // There, INVLPG.
        _ => {
            flow.load(Register::RAX, at::PML4[space] | space as u64 | cr3::NO_FLUSH);
            flow.code.extend([0x0f, 0x22, 0xd8]);
            let within = address + flow.random.below(0x1000);
            flow.load(Register::RDX, within);
            flow.code.extend([0x0f, 0x01, 0x3a]);
        }
    }
}

fn switch_space(flow: &mut Flow) {
    let space = flow.random.below(2) as usize;
    let keep = flow.random.pick(&[0, cr3::NO_FLUSH]);
    flow.load(Register::RAX, at::PML4[space] | space as u64 | keep);
    flow.code.extend([0x0f, 0x22, 0xd8]);
}

/// Again and again the same function, in between what may make another one of it.
fn rounds(flow: &mut Flow) {
    let target = slot(flow);
    let turns = 2 + flow.random.below(12);
    let pieces = 2 + flow.random.below(4);
    flow.repeat(turns, |flow| {
        for _ in 0..pieces {
            match flow.random.below(12) {
                0..=3 => call_slot(flow, target),
                4 | 5 => change_slot(flow, target),
                6 | 7 => switch_space(flow),
                8 => edit_entry_of(flow, SELF),
                9 => data_beside_code(flow),
                10 => edit_entry_of(flow, DATA),
                _ => flow.quick(),
            }
        }
        call_slot(flow, target);
    });
}

fn slot(flow: &mut Flow) -> u64 {
    flow.base() + SELF + flow.random.below(SLOTS) * SLOT
}

fn call_slot(flow: &mut Flow, target: u64) {
    if flow.random.chance(60) {
        flow.good_stack();
    }
    if flow.random.chance(30) {
        // call rdx
        flow.load(Register::RDX, target);
        flow.code.extend([0xff, 0xd2]);
    } else {
        flow.relative(&[0xe8], target);
    }
}

/// Changes the immediate that a function starts with, at the address it is called at or at another one.
fn change_slot(flow: &mut Flow, target: u64) {
    let offset = target & 0xfff;
    let places = [
        target,
        LOW + SELF + offset,
        HIGH + SELF + offset,
        KERNEL + frame(5) + offset,
        KERNEL + frame(11) + offset,
    ];
    let place = flow.random.pick(&places);
    let byte = flow.random.below(4);
    flow.load(Register::RDX, place + 1 + byte);
    match flow.random.below(3) {
        // inc byte [rdx]
        0 => flow.code.extend([0xfe, 0x02]),
        // lock xor [rdx], al
        1 => flow.code.extend([0xf0, 0x30, 0x02]),
        // mov [rdx], al
        _ => flow.code.extend([0x88, 0x02]),
    }
    if flow.random.chance(70) {
        flow.relative(&[0xe8], target);
    }
}

/// Stores and loads in the page with the functions, but not over them.
fn data_beside_code(flow: &mut Flow) {
    let address = flow.base() + SELF + SLOTS * SLOT + flow.random.below(PAGE as u64 - SLOTS * SLOT - 8);
    flow.load(Register::RDX, address);
    for _ in 0..1 + flow.random.below(4) {
        let opcode = flow.random.pick(&[0x01, 0x03, 0x89, 0x8b, 0x87]);
        flow.code.extend([0x48, opcode, 0x02]);
    }
    if flow.random.chance(50) {
        let target = slot(flow);
        call_slot(flow, target);
    }
}

/// Traps after each of the next instructions.
fn trap_flag(flow: &mut Flow) {
    let steps = 1 + flow.random.below(30);
    flow.store(KERNEL + at::VARIABLES + variable::STEPS, steps);
    // pushfq; or dword [rsp], TF; popfq
    flow.code.extend([0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d]);
}

/// Breakpoints on data, and on instructions to come.
fn breakpoint(flow: &mut Flow) {
    let steps = 1 + flow.random.below(20);
    flow.store(KERNEL + at::VARIABLES + variable::STEPS, steps);
    let mut dr7 = 0x400;
    for number in 0..1 + flow.random.below(4) {
        let on_code = flow.random.chance(40);
        let (address, kind) = if on_code {
            let near = flow.here() + flow.random.below(120);
            let function = slot(flow);
            (flow.random.pick(&[near, near, function]), 0)
        } else {
            let low = flow.base() == LOW;
            let address = values::calm_target(flow.random, 8, low);
            (address, flow.random.pick(&[1, 3]) | flow.random.below(4) << 2)
        };
        dr7 |= flow.random.pick(&[1, 2]) << (2 * number) | kind << (16 + 4 * number);
        flow.load(Register::RAX, address);
        flow.code.extend([0x0f, 0x23, 0xc0 | (number as u8) << 3]);
    }
    flow.load(Register::RAX, dr7);
    flow.code.extend([0x0f, 0x23, 0xf8]);
}

/// One bit of CR0, CR4 or EFER.
fn toggle_mode(flow: &mut Flow) {
    match flow.random.below(3) {
        0 => {
            // mov rax, cr0; xor eax, bit; mov cr0, rax
            let bit = flow.random.pick(&[x86defs::cr0::WP, x86defs::cr0::TS]) as u32;
            flow.code.extend([0x0f, 0x20, 0xc0, 0x35]);
            flow.code.extend(bit.to_le_bytes());
            flow.code.extend([0x0f, 0x22, 0xc0]);
        }
        1 => {
            let bit = flow.random.pick(&[cr4::SMAP, cr4::TSD, cr4::OSFXSR, cr4::OSXSAVE, cr4::PGE]) as u32;
            flow.code.extend([0x0f, 0x20, 0xe0, 0x35]);
            flow.code.extend(bit.to_le_bytes());
            flow.code.extend([0x0f, 0x22, 0xe0]);
        }
        _ if !flow.filler.kept.contains(&Register::RCX) => {
            // mov ecx, EFER; rdmsr; xor eax, bit; wrmsr
            let bit = flow.random.pick(&[x86defs::efer::NXE, x86defs::efer::SCE]) as u32;
            flow.load(Register::RCX, 0xc000_0080);
            flow.code.extend([0x0f, 0x32, 0x35]);
            flow.code.extend(bit.to_le_bytes());
            flow.code.extend([0x0f, 0x30]);
        }
        _ => {}
    }
}

/// Overwrites part of the page with the functions, by a string instruction.
fn fill_page(flow: &mut Flow) {
    let busy = [Register::RCX, Register::RSI].iter().any(|r| flow.filler.kept.contains(r));
    if busy {
        return flow.quick();
    }
    let base = flow.random.pick(&[LOW, HIGH]);
    let place = flow.random.pick(&[base + SELF, base + DATA + 0x800, KERNEL + frame(5), KERNEL + frame(11)]);
    let within = flow.random.below(0xc00);
    flow.load(Register::RDI, place + within);
    let count = flow.random.below(0x300);
    flow.load(Register::RCX, count);
    // cld; mov al, ret; rep stosb
    flow.code.extend([0xfc, 0xb0, 0xc3, 0xf3, 0xaa]);
}

fn plain_system(flow: &mut Flow) {
    let free = !flow.filler.kept.contains(&Register::RCX);
    match flow.random.below(8) {
        // rdtsc: the count of instructions, exactly
        0 => flow.code.extend([0x0f, 0x31]),
        // mov eax, KERNEL_DATA; mov ss, eax
        1 => flow.code.extend([0xb8, 0x18, 0, 0, 0, 0x8e, 0xd0]),
        // swapgs
        2 => flow.code.extend([0x0f, 0x01, 0xf8]),
        3 | 4 if free => {
            // wrmsr of FS, GS or kernel GS base
            let msr = 0xc000_0100 + flow.random.below(3);
            flow.load(Register::RCX, msr);
            let address = values::calm_target(flow.random, 4096, false);
            flow.load(Register::RAX, address & 0xffff_ffff);
            flow.load(Register::RDX, address >> 32);
            flow.code.extend([0x0f, 0x30]);
        }
        5 => {
            flow.load(Register::RDX, KERNEL + at::VARIABLES + OPERANDS + 0x20);
            // lgdt [rdx]; lidt [rdx + 0x10]
            flow.code.extend([0x0f, 0x01, 0x12, 0x0f, 0x01, 0x5a, 0x10]);
        }
        // mov rax, cr3; mov cr3, rax
        6 => flow.code.extend([0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
        // in eax, 0x11; mov rax, cr2; mov rax, dr6
        _ => flow.code.extend([0xe5, 0x11, 0x0f, 0x20, 0xd0, 0x0f, 0x21, 0xf0]),
    }
}
