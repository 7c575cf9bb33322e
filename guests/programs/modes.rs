//! Trips through real, virtual-8086, 16-bit and 32-bit protected mode, hardware tasks and compatibility mode.
#![no_std]
#![no_main]

use rt::cpu::{self, CR4_VME, VME};
use rt::mem::{self, FREE, PAGE};
use rt::protected::{self, Entry, RING0, RING3, Stop, VM};
use rt::real;
use rt::report::{equal, faulted};
use rt::tables::{self, CODE32, DATA, SPARE, USER_CODE32, USER_DATA, build_descriptor};
use rt::{check, trap, user};

/// Fragments in flat memory, and data they use.
const CODE: u64 = FREE;
const SCRATCH: u64 = FREE + PAGE;
const TSS_A: u64 = FREE + 4 * PAGE;
const TSS_B: u64 = FREE + 8 * PAGE;
const STACK0: u64 = FREE + 16 * PAGE;
const STACK_B: u64 = FREE + 20 * PAGE;
const STACK3: u64 = FREE + 24 * PAGE;

const SEL_A: u16 = SPARE;
const SEL_B: u16 = SPARE + 0x08;
const GATE: u16 = SPARE + 0x10;
const SEGMENT: u16 = SPARE + 0x18;
const OTHER: u16 = SPARE + 0x20;
const LDT: u16 = SPARE + 0x28;

const NT: u32 = 1 << 14;
const CR0_TS: u32 = 1 << 3;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    protected::reset_idt();
    real::reset_vectors();
    long_mode();
    real_mode();
    real_interrupts();
    real_limits();
    protected_basics();
    segment_limits();
    segment_types();
    sixteen_bit();
    descriptor_queries();
    local_table();
    rings();
    call_gates();
    sixteen_bit_gate();
    task_jump();
    task_call_and_return();
    task_gates();
    task_faults();
    sixteen_bit_task();
    virtual_8086();
    virtual_8086_sensitive();
    virtual_mode_extensions();
    compatibility();
}

fn long_mode() {
    let efer = cpu::rdmsr(cpu::MSR_EFER);
    check!("long mode at the start", efer & 0x500 == 0x500, "EFER {efer:#x}");
}

// --- real mode -------------------------------------------------------------------------------------------------

fn real_mode() {
    // mov ax, cs; mov bx, sp; smsw cx; int 0x20
    let stop = real::run(&[0x8c, 0xc8, 0x89, 0xe3, 0x0f, 0x01, 0xe1, 0xcd, 0x20], &real::START);
    equal("real mode: INT n reaches its vector", stop.vector, 0x20);
    equal("real mode: CS", stop.eax as u16, real::CODE_SEGMENT);
    equal("real mode: SP", stop.ebx as u16, real::START.sp);
    equal("real mode: CR0.PE is clear", stop.ecx & 1, 0);
    equal("real mode: INT pushes three words", stop.sp, real::START.sp);
    equal("real mode: saved IP", stop.ip, 9);
    // mov [2], ax with DS: the address is segment * 16 + offset
    real::run(&[0xb8, 0x34, 0x12, 0xa3, 2, 0, 0xcd, 0x20], &real::START);
    equal("real mode: segment * 16 + offset", mem::read::<u16>(0x3_0002), 0x1234);
    // mov eax, 0x12345678; mov [4], eax with 66 prefixes
    real::run(&[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0x66, 0xa3, 4, 0, 0xcd, 0x20], &real::START);
    equal("real mode: 32-bit operands by prefix", mem::read::<u32>(0x3_0004), 0x1234_5678);
    // mov ds, bx (0xffff); mov al, [0x10]: linear 0x100000 with A20 open
    mem::write(0x3_0100u64, 0u8);
    let entry = real::Entry { ebx: 0xffff, ..real::START };
    let stop = real::run(&[0x8e, 0xdb, 0xa0, 0x10, 0, 0xcd, 0x20], &entry);
    equal("real mode: beyond 1 MiB with A20 open", stop.eax as u8, mem::read::<u8>(0x10_0000));
    // A limit of protected mode stays in FS: mov eax, fs:[ebx] (67 addresses)
    mem::write(SCRATCH, 0xfeed_5eedu32);
    let entry = real::Entry { ebx: SCRATCH as u32, ..real::START };
    let stop = real::run_with_large_fs(&[0x64, 0x67, 0x66, 0x8b, 0x03, 0xcd, 0x20], &entry);
    check!("real mode: a large limit stays (unreal mode)", stop.eax == 0xfeed_5eed, "{stop}");
    // jmp far 0x1080:0002, where the code lies at 0x10802
    let mut code = [0x90u8; 0x810];
    code[..5].copy_from_slice(&[0xea, 2, 0, 0x80, 0x10]);
    code[0x802..0x806].copy_from_slice(&[0x8c, 0xc8, 0xcd, 0x21]);
    let stop = real::run(&code, &real::START);
    check!("real mode: far JMP", stop.vector == 0x21 && stop.eax as u16 == 0x1080, "{stop}");
    // call far and retf: call 0x1080:0002 -> retf; int 0x22
    code[..7].copy_from_slice(&[0x9a, 2, 0, 0x80, 0x10, 0xcd, 0x22]);
    code[0x802] = 0xcb;
    let stop = real::run(&code, &real::START);
    check!("real mode: far CALL and RET", stop.vector == 0x22 && stop.ip == 7 && stop.sp == 0x1000, "{stop}");
}

fn real_interrupts() {
    // Vector 0x60 -> 0x1000:0x100: inc ax; iret
    let mut code = [0x90u8; 0x110];
    code[..5].copy_from_slice(&[0x31, 0xc0, 0xcd, 0x60, 0xcd]);
    code[5] = 0x20;
    code[0x100..0x102].copy_from_slice(&[0x40, 0xcf]);
    real::set_vector(0x60, real::CODE_SEGMENT, 0x100);
    let stop = real::run(&code, &real::Entry { flags: 0x203, ..real::START });
    check!("real mode: a handler and IRET", stop.vector == 0x20 && stop.eax as u16 == 1, "{stop}");
    equal("real mode: IRET restores the flags", stop.flags & 0x200, 0x200);
    // xor cx, cx; div cx
    let stop = real::run(&[0x31, 0xc9, 0xf7, 0xf1], &real::START);
    check!("real mode: DE points at the instruction", stop.vector == 0 && stop.ip == 2, "{stop}");
    let stop = real::run(&[0x90, 0x0f, 0x0b], &real::START);
    check!("real mode: UD", stop.vector == 6 && stop.ip == 1, "{stop}");
    // lldt ax does not exist in real mode
    let stop = real::run(&[0x0f, 0x00, 0xd0], &real::START);
    check!("real mode: LLDT is undefined", stop.vector == 6, "{stop}");
    let stop = real::run(&[0x90, 0x90], &real::Entry { flags: 0x102, ..real::START });
    check!("real mode: single step", stop.vector == 1 && stop.ip == 1, "{stop}");
    // mov al, 0x7f; inc al; into
    let stop = real::run(&[0xb0, 0x7f, 0xfe, 0xc0, 0xce], &real::START);
    check!("real mode: INTO", stop.vector == 4 && stop.ip == 5, "{stop}");
    // bound ax, [0] with bounds 0..5 and ax = 6
    mem::write(0x3_0000, [0u16, 5]);
    let stop = real::run(&[0x62, 0x06, 0, 0], &real::Entry { eax: 6, ..real::START });
    check!("real mode: BOUND", stop.vector == 5 && stop.ip == 0, "{stop}");
}

fn real_limits() {
    // mov ax, [0xffff]
    let stop = real::run(&[0xa1, 0xff, 0xff], &real::START);
    check!(
        "real mode: GP beyond 64 KiB, no error code",
        stop.vector == 13 && stop.ip == 0 && stop.sp == 0x1000,
        "{stop}"
    );
    // mov ax, ss:[0xffff]
    let stop = real::run(&[0x36, 0xa1, 0xff, 0xff], &real::START);
    check!("real mode: SS beyond 64 KiB", stop.vector == 12 && stop.ip == 0, "{stop}");
    // mov eax, [ebx] with ebx = 0x10000
    let stop = real::run(&[0x67, 0x8b, 0x03], &real::Entry { ebx: 0x1_0000, ..real::START });
    check!("real mode: GP for a 32-bit address", stop.vector == 13, "{stop}");
    // push ax with SP = 0 wraps to 0xfffe
    let stop = real::run(&[0x50, 0xcd, 0x20], &real::Entry { sp: 0, ..real::START });
    check!("real mode: SP wraps", stop.vector == 0x20 && stop.sp == 0xfffe, "{stop} SP {:#x}", stop.sp);
}

// --- protected mode --------------------------------------------------------------------------------------------

fn ring0(code: &[u8]) -> Stop {
    ring0_with(code, &RING0)
}

fn ring0_with(code: &[u8], entry: &Entry) -> Stop {
    protected::place(CODE, code);
    protected::run(&Entry { eip: CODE as u32, ..*entry })
}

/// A 32-bit TSS with ring-0 stack and an I/O bitmap that allows nothing, for ring 3.
fn write_tss(at: u64, selector: u16, eip: u32, esp: u32) {
    mem::fill(at, 0, 104 + 32);
    mem::fill(at + 136, 0xff, 8193);
    let words = [(1, STACK0 as u32), (2, DATA.into()), (8, eip), (9, 2), (14, esp)];
    for (index, value) in words {
        mem::write(at + index * 4, value);
    }
    for (index, selector) in [(18, DATA), (19, CODE32), (20, DATA), (21, DATA), (22, 0), (23, 0)] {
        mem::write(at + index * 4, u32::from(selector));
    }
    mem::write(at + 102, 136u16);
    tables::set_descriptor(selector, build_descriptor(at as u32, 136 + 8192, 0x89, 0));
}

fn ring3_with(code: &[u8], entry: &Entry) -> Stop {
    write_tss(TSS_A, SEL_A, 0, 0);
    protected::place(CODE, code);
    let eip = if entry.eip == 0 { CODE as u32 } else { entry.eip };
    protected::run(&Entry { eip, esp: STACK3 as u32, tr: SEL_A.into(), ..*entry })
}

fn ring3(code: &[u8]) -> Stop {
    ring3_with(code, &RING3)
}

fn stopped(name: &str, stop: &Stop, vector: u8, error: u32, at: u64) {
    let held = stop.vector == u32::from(vector) && stop.error == error && stop.eip == (CODE + at) as u32;
    check!(name, held, "{stop}, wanted vector {vector} error {error:#x} at +{at:#x}");
}

fn protected_basics() {
    // mov eax, cs; mov ebx, 0x89abcdef; int 0x20
    let stop = ring0(&[0x8c, 0xc8, 0xbb, 0xef, 0xcd, 0xab, 0x89, 0xcd, 0x20]);
    stopped("32-bit: a fragment ran", &stop, 0x20, 0, 9);
    equal("32-bit: CS", stop.eax, CODE32.into());
    equal("32-bit: EBX", stop.ebx, 0x89ab_cdef);
    equal("32-bit: no paging", stop.cr0 >> 31, 0);
    // inc eax and dec eax are one byte here
    let stop = ring0(&[0x31, 0xc0, 0x40, 0x40, 0x48, 0xcd, 0x20]);
    equal("32-bit: 40 is INC EAX", stop.eax, 1);
    stopped("32-bit: UD", &ring0(&[0x0f, 0x0b]), trap::UD, 0, 0);
    // pushal; popal; pushfd; popfd
    stopped("32-bit: PUSHA, POPA, PUSHF, POPF", &ring0(&[0x60, 0x61, 0x9c, 0x9d, 0xcd, 0x20]), 0x20, 0, 6);
}

/// `mov eax, [offset]` with DS = SEGMENT; byte 2 on are the instruction.
fn read_at(offset: u32) -> Stop {
    access(0xa1, offset)
}

fn access(opcode: u8, offset: u32) -> Stop {
    let [a, b, c, d] = offset.to_le_bytes();
    ring0_with(&[opcode, a, b, c, d, 0xcd, 0x20], &Entry { ds: SEGMENT.into(), ..RING0 })
}

fn segment_limits() {
    mem::write(SCRATCH + 0xffc, 0x600d_da7au32);
    let limits = |access, flags, limit| {
        tables::set_descriptor(SEGMENT, build_descriptor(SCRATCH as u32, limit, access, flags));
    };
    limits(0x93, 0x4, 0xfff);
    let stop = read_at(0xffc);
    check!("limit: the last dword", stop.vector == 0x20 && stop.eax == 0x600d_da7a, "{stop}");
    stopped("limit: one byte beyond", &read_at(0xffd), trap::GP, 0, 0);
    stopped("limit: far beyond", &read_at(0xffff_ffff), trap::GP, 0, 0);
    limits(0x93, 0xc, 0);
    stopped("limit: page granularity, inside", &read_at(0xffc), 0x20, 0, 7);
    stopped("limit: page granularity, beyond", &read_at(0x1000), trap::GP, 0, 0);
    limits(0x97, 0x4, 0xfff);
    stopped("expand-down: below the limit", &read_at(0xffc), trap::GP, 0, 0);
    stopped("expand-down: at the limit", &read_at(0xfff), trap::GP, 0, 0);
    stopped("expand-down: above the limit", &read_at(0x1000), 0x20, 0, 7);
    stopped("expand-down, 32-bit: 64 KiB and more", &read_at(0x1_0000), 0x20, 0, 7);
    limits(0x97, 0x0, 0xfff);
    stopped("expand-down, 16-bit: below 64 KiB", &read_at(0xfffc), 0x20, 0, 7);
    stopped("expand-down, 16-bit: 64 KiB", &read_at(0x1_0000), trap::GP, 0, 0);
    stopped("expand-down, 16-bit: over 64 KiB", &read_at(0xfffd), trap::GP, 0, 0);
    // Through SS the vector is #SS. In ring 3, so that the recorder has a good stack.
    tables::set_descriptor(SEGMENT, build_descriptor(STACK3 as u32 - 0x1000, 0xfff, 0xf3, 0x4));
    protected::place(CODE, &[0x36, 0xa1, 0, 0x10, 0, 0]);
    write_tss(TSS_A, SEL_A, 0, 0);
    let entry = Entry { eip: CODE as u32, ss: u32::from(SEGMENT | 3), esp: 0x800, tr: SEL_A.into(), ..RING3 };
    stopped("limit: through SS", &protected::run(&entry), trap::SS, 0, 0);
    protected::place(CODE, &[0x50]);
    stopped(
        "limit: PUSH below a stack of size zero",
        &protected::run(&Entry { esp: 0, ..entry }),
        trap::SS,
        0,
        0,
    );
    // Code beyond the limit of CS: a jump faults at the jump.
    tables::set_descriptor(SEGMENT, build_descriptor(CODE as u32, 0xff, 0xfb, 0x4));
    protected::place(CODE, &[0xe9, 0xfb, 0, 0, 0]);
    let stop = protected::run(&Entry {
        eip: 0,
        cs: u32::from(SEGMENT | 3),
        esp: STACK3 as u32,
        tr: SEL_A.into(),
        ..RING3
    });
    check!("limit: a jump beyond CS", stop.vector == 13 && stop.error == 0 && stop.eip == 0, "{stop}");
}

fn segment_types() {
    tables::set_descriptor(SEGMENT, build_descriptor(SCRATCH as u32, 0xfff, 0x91, 0x4));
    stopped("type: read of a read-only segment", &read_at(0), 0x20, 0, 7);
    stopped("type: write to a read-only segment", &access(0xa3, 0), trap::GP, 0, 0);
    tables::set_descriptor(SEGMENT, build_descriptor(SCRATCH as u32, 0xfff, 0x9b, 0x4));
    stopped("type: read of readable code", &read_at(0), 0x20, 0, 7);
    stopped("type: write to code", &access(0xa3, 0), trap::GP, 0, 0);
    tables::set_descriptor(SEGMENT, build_descriptor(SCRATCH as u32, 0xfff, 0x92, 0x4));
    read_at(0);
    equal("type: loading sets the accessed bit", tables::descriptor(SEGMENT) >> 40 & 1, 1);
    // xor eax, eax; mov ds, eax; mov eax, [0]
    stopped("a null DS loads", &ring0(&[0x31, 0xc0, 0x8e, 0xd8, 0xcd, 0x20]), 0x20, 0, 6);
    stopped("a null DS faults on use", &ring0(&[0x31, 0xc0, 0x8e, 0xd8, 0xa1, 0, 0, 0, 0]), trap::GP, 0, 4);
    // xor eax, eax; mov ss, eax
    stopped("a null SS does not load", &ring0(&[0x31, 0xc0, 0x8e, 0xd0]), trap::GP, 0, 2);
    // mov ax, OTHER; mov ds, ax with an execute-only segment
    tables::set_descriptor(OTHER, build_descriptor(0, 0xfffff, 0x99, 0xc));
    let [low, high] = OTHER.to_le_bytes();
    stopped(
        "execute-only code does not load into DS",
        &ring0(&[0x66, 0xb8, low, high, 0x8e, 0xd8]),
        trap::GP,
        OTHER.into(),
        4,
    );
    tables::set_descriptor(OTHER, build_descriptor(0, 0xfffff, 0x13, 0xc));
    stopped(
        "absent data does not load into DS",
        &ring0(&[0x66, 0xb8, low, high, 0x8e, 0xd8]),
        trap::NP,
        OTHER.into(),
        4,
    );
    // pop ss holds interrupts and traps: push ds; pushfd; or dword [esp], 0x100; popfd; pop ss; nop; nop
    let stop = ring0(&[0x1e, 0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x17, 0x90, 0x90]);
    stopped("POP SS holds the single-step trap for one instruction", &stop, trap::DB, 0, 12);
}

fn sixteen_bit() {
    tables::set_descriptor(SEGMENT, build_descriptor(CODE as u32, 0xffff, 0xfb, 0));
    tables::set_descriptor(OTHER, build_descriptor(SCRATCH as u32, 0xffff, 0xf3, 0));
    write_tss(TSS_A, SEL_A, 0, 0);
    let entry = Entry {
        eip: 0,
        cs: u32::from(SEGMENT | 3),
        ss: u32::from(OTHER | 3),
        ds: u32::from(OTHER | 3),
        esp: 0xffff_0100,
        tr: SEL_A.into(),
        eax: 0x5555_5555,
        ..RING3
    };
    let run = |code: &[u8]| {
        protected::place(CODE, code);
        protected::run(&entry)
    };
    // mov ax, 0x1234; int 0x20: three bytes of MOV in 16-bit code
    let stop = run(&[0xb8, 0x34, 0x12, 0xcd, 0x20]);
    check!("16-bit: operand size", stop.vector == 0x20 && stop.eip == 5 && stop.eax == 0x5555_1234, "{stop}");
    // push ax; mov bx, sp; int 0x20
    let stop = run(&[0x50, 0x89, 0xe3, 0xcd, 0x20]);
    equal("16-bit: a 16-bit stack uses SP", stop.ebx as u16, 0xfe);
    equal("16-bit: the push went to SS:SP", mem::read::<u16>(SCRATCH + 0xfe), 0x5555);
    // mov eax, 0x12345678 with a prefix
    let stop = run(&[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, 0xcd, 0x20]);
    equal("16-bit: 32-bit operand by prefix", stop.eax, 0x1234_5678);
    // mov al, [bx+si] addresses wrap at 64 KiB: bx = 0xffff, si = 1 + 0x40
    mem::write(SCRATCH + 0x40, 0x77u8);
    protected::place(CODE, &[0x8a, 0x00, 0xcd, 0x20]);
    let stop = protected::run(&Entry { ebx: 0xffff, esi: 0x41, ..entry });
    equal("16-bit: addresses wrap at 64 KiB", stop.eax as u8, 0x77);
    // jmp over 64 KiB wraps IP: at 0: jmp -0x10 (to 0xfff3)
    protected::place(CODE + 0xfff2, &[0xcd, 0x21]);
    let stop = run(&[0xe9, 0xef, 0xff]);
    check!("16-bit: IP wraps", stop.vector == 0x21 && stop.eip == 0xfff4, "{stop}");
}

fn descriptor_queries() {
    tables::set_descriptor(SEGMENT, build_descriptor(0, 0x12345, 0x93, 0xc));
    let [low, high] = SEGMENT.to_le_bytes();
    // mov ecx, sel; lar eax, ecx; lsl ebx, ecx; verr cx; setz dl; verw cx; setz dh; int 0x20
    let query = |low: u8, high: u8| {
        ring0(&[
            0xb9, low, high, 0, 0, 0x31, 0xd2, 0x31, 0xdb, 0x31, 0xc0, 0x0f, 0x02, 0xc1, 0x0f, 0x03, 0xd9,
            0x0f, 0x00, 0xe1, 0x0f, 0x94, 0xc2, 0x0f, 0x00, 0xe9, 0x0f, 0x94, 0xc6, 0xcd, 0x20,
        ])
    };
    let stop = query(low, high);
    equal("LAR", stop.eax & 0x00f0_ff00, 0x00c0_9300);
    equal("LSL scales by page granularity", stop.ebx, 0x1234_5fff);
    equal("VERR and VERW of writable data", stop.edx, 0x101);
    tables::set_descriptor(SEGMENT, build_descriptor(0, 0xfff, 0x9b, 0x4));
    equal("VERR and VERW of readable code", query(low, high).edx, 0x001);
    equal("VERR and VERW of null", query(0, 0).edx, 0);
    equal("LAR of null changes nothing", query(0, 0).eax, 0);
    // mov eax, 0x10; mov ecx, 3; arpl ax, cx; setz dl; int 0x20
    let stop =
        ring0(&[0xb8, 0x10, 0, 0, 0, 0xb9, 3, 0, 0, 0, 0x31, 0xd2, 0x63, 0xc8, 0x0f, 0x94, 0xc2, 0xcd, 0x20]);
    check!("ARPL raises the RPL", stop.eax == 0x13 && stop.edx == 1, "{stop}");
}

fn local_table() {
    let table = SCRATCH + 0x800;
    mem::write(table + 8, build_descriptor(SCRATCH as u32, 0xfff, 0x93, 0x4));
    tables::set_descriptor(LDT, build_descriptor(table as u32, 15, 0x82, 0));
    mem::write(SCRATCH + 0x10, 0x1d7_5e6u32);
    // mov eax, 0xc; mov ds, eax; mov eax, [0x10]; int 0x20
    let entry = Entry { ldt: LDT.into(), ..RING0 };
    let stop = ring0_with(&[0xb8, 0xc, 0, 0, 0, 0x8e, 0xd8, 0xa1, 0x10, 0, 0, 0, 0xcd, 0x20], &entry);
    check!(
        "a segment of the LDT",
        stop.vector == 0x20 && stop.eax == 0x1d7_5e6 && stop.ds & 0xffff == 0xc,
        "{stop}"
    );
    let stop = ring0_with(&[0xb8, 0x14, 0, 0, 0, 0x8e, 0xd8], &entry);
    stopped("a selector beyond the LDT's limit", &stop, trap::GP, 0x14, 5);
    let stop = ring0(&[0xb8, 0xc, 0, 0, 0, 0x8e, 0xd8]);
    stopped("a selector without an LDT", &stop, trap::GP, 0xc, 5);
}

// --- rings, gates ----------------------------------------------------------------------------------------------

fn rings() {
    let stop = ring3(&[0xb8, 7, 0, 0, 0, 0xcd, 0x20]);
    stopped("ring 3: INT through a DPL 3 gate", &stop, 0x20, 0, 7);
    equal("ring 3: saved CS", stop.cs, USER_CODE32.into());
    check!(
        "ring 3: saved ESP and SS",
        stop.outer[..2] == [STACK3 as u32, USER_DATA.into()],
        "{:x?}",
        &stop.outer[..2]
    );
    equal("ring 3: ESP0 is taken", stop.frame_end + 8, STACK0 as u32);
    stopped("ring 3: CLI", &ring3(&[0xfa]), trap::GP, 0, 0);
    stopped("ring 3: HLT", &ring3(&[0xf4]), trap::GP, 0, 0);
    stopped("ring 3: IN", &ring3(&[0xe4, 0x80]), trap::GP, 0, 0);
    stopped("ring 3: load of a DPL 0 segment", &ring3(&[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8]), trap::GP, 0x10, 5);
    let stop = ring3_with(&[0xfa, 0xfb, 0xfa, 0xcd, 0x20], &Entry { eflags: 2 | 3 << 12, ..RING3 });
    stopped("ring 3: CLI and STI with IOPL 3", &stop, 0x20, 0, 5);
    // Conforming code keeps the ring: jmp SEGMENT:0 ; there: mov eax, cs; int 0x20
    tables::set_descriptor(SEGMENT, build_descriptor(SCRATCH as u32, 0xfff, 0x9f, 0x4));
    protected::place(SCRATCH, &[0x8c, 0xc8, 0xcd, 0x20]);
    let [low, high] = SEGMENT.to_le_bytes();
    let stop = ring3(&[0xea, 0, 0, 0, 0, low, high]);
    check!(
        "ring 3: conforming code keeps the ring",
        stop.vector == 0x20 && stop.eax == u32::from(SEGMENT | 3),
        "{stop}"
    );
    let stop = ring3(&[0xea, 0, 0, 0, 0, 0x18, 0]);
    stopped("ring 3: JMP to ring-0 code", &stop, trap::GP, CODE32.into(), 0);
    // retf to ring 0 from ring 3: push 0x18; push 0; retf
    stopped("ring 3: RETF to ring 0", &ring3(&[0x6a, 0x18, 0x6a, 0, 0xcb]), trap::GP, CODE32.into(), 4);
    // Leaving ring 0 clears segments that ring 3 may not use.
    let code = [0x6a, 0x2b, 0x68, 0, 0, 0x44, 0, 0x6a, 0x23, 0x68, 0x40, 0, 0x40, 0, 0xcb];
    protected::place(CODE + 0x40, &[0x8c, 0xd8, 0xcd, 0x20]);
    write_tss(TSS_A, SEL_A, 0, 0);
    let stop = ring0_with(&code, &Entry { tr: SEL_A.into(), ..RING0 });
    check!("RETF to ring 3 clears DS of ring 0", stop.vector == 0x20 && stop.eax == 0, "{stop}");
    ring_stack_faults();
}

fn ring_stack_faults() {
    protected::place(CODE, &[0xcd, 0x20]);
    let entry = Entry { eip: CODE as u32, esp: STACK3 as u32, tr: SEL_A.into(), ..RING3 };
    // The handler of #TS needs a stack of its own: a task gate brings one.
    let run_with_ss0 = |ss0: u16, access: u8| {
        write_tss(TSS_A, SEL_A, 0, 0);
        tables::set_descriptor(OTHER, build_descriptor(0, 0xfffff, access, 0xc));
        mem::write(TSS_A + 8, u32::from(ss0));
        with_task_gate(trap::TS, || with_task_gate(trap::SS, || protected::run(&entry)))
    };
    let (stop, error) = run_with_ss0(0, 0x93);
    check!("TS: SS0 is null", stop.vector == 0x21 && error == 0, "{stop} error {error:#x}");
    let (stop, error) = run_with_ss0(OTHER, 0xf3);
    check!(
        "TS: SS0 has another DPL",
        stop.vector == 0x21 && error == u32::from(OTHER),
        "{stop} error {error:#x}"
    );
    let (stop, error) = run_with_ss0(OTHER, 0x13);
    check!("SS: SS0 is absent", stop.vector == 0x21 && error == u32::from(OTHER), "{stop} error {error:#x}");
}

/// Runs with a task gate for a vector, whose task pops the error code into EAX and stops by INT 0x21.
fn with_task_gate<T: TaskStop>(vector: u8, run: impl FnOnce() -> T) -> (Stop, u32) {
    protected::place(CODE + 0x800, &[0x58, 0xcd, 0x21]);
    write_tss(TSS_B, SEL_B, CODE as u32 + 0x800, STACK_B as u32);
    protected::set_gate(vector, protected::gate(SEL_B, 0, 0x85));
    let stop = run().stop();
    protected::set_gate(vector, protected::gate(CODE32, protected::recorder(vector), 0xee));
    (stop, stop.eax)
}

/// What `with_task_gate` can run: a plain run, or itself.
trait TaskStop {
    fn stop(self) -> Stop;
}

impl TaskStop for Stop {
    fn stop(self) -> Stop {
        self
    }
}

impl TaskStop for (Stop, u32) {
    fn stop(self) -> Stop {
        self.0
    }
}

fn call_gates() {
    let target = CODE as u32 + 0x100;
    // A 32-bit gate with two parameters to ring-0 code.
    let gate = protected::gate(CODE32, target, 0xec) | 2 << 32;
    tables::set_descriptor(GATE, gate);
    protected::place(CODE + 0x100, &[0xcd, 0x20]);
    let [low, high] = GATE.to_le_bytes();
    // push 0x11; push 0x22; call GATE:0
    let call = [0x6a, 0x11, 0x6a, 0x22, 0x9a, 0, 0, 0, 0, low, high];
    let stop = ring3(&call);
    check!("call gate: leads to ring 0", stop.vector == 0x20 && stop.cs == u32::from(CODE32), "{stop}");
    let pushed: [u32; 6] = mem::read(stop.frame_end.into());
    let wanted = [CODE as u32 + 11, USER_CODE32.into(), 0x22, 0x11, STACK3 as u32 - 8, USER_DATA.into()];
    check!("call gate: pushes EIP, CS, parameters, ESP, SS", pushed == wanted, "{pushed:x?}");
    equal("call gate: on the stack of the TSS", stop.frame_end + 24, STACK0 as u32);
    // There and back: the target does retf 8, then ring 3 looks at ESP.
    protected::place(CODE + 0x100, &[0xca, 8, 0]);
    let mut code = [0; 15];
    code[..11].copy_from_slice(&call);
    code[11..].copy_from_slice(&[0x89, 0xe3, 0xcd, 0x20]);
    let stop = ring3(&code);
    check!("call gate: RETF n goes back", stop.vector == 0x20 && stop.cs == u32::from(USER_CODE32), "{stop}");
    equal("call gate: RETF n drops the parameters", stop.ebx, STACK3 as u32);
    tables::set_descriptor(GATE, gate & !(3 << 45));
    stopped("call gate: DPL 0 from ring 3", &ring3(&call), trap::GP, GATE.into(), 4);
    tables::set_descriptor(GATE, gate & !(1 << 47));
    stopped("call gate: absent", &ring3(&call), trap::NP, GATE.into(), 4);
    tables::set_descriptor(GATE, gate);
    let mut jump = call;
    jump[4] = 0xea;
    stopped("call gate: JMP may not change the ring", &ring3(&jump), trap::GP, CODE32.into(), 4);
    // A 16-bit gate pushes words.
    tables::set_descriptor(SEGMENT, build_descriptor(CODE as u32, 0xfff, 0x9b, 0x4));
    tables::set_descriptor(GATE, protected::gate(SEGMENT, 0x100, 0xe4));
    protected::place(CODE + 0x100, &[0xcd, 0x20]);
    let stop = ring3(&call);
    let pushed: [u16; 4] = mem::read(stop.frame_end.into());
    let wanted = [CODE as u16 + 11, USER_CODE32, (STACK3 - 8) as u16, USER_DATA];
    check!("call gate, 16-bit: pushes words", pushed == wanted, "{pushed:x?} {stop}");
}

fn sixteen_bit_gate() {
    // A 286 interrupt gate truncates what it pushes: handler at CODE + 0x100 (its low 16 bits in a based segment).
    tables::set_descriptor(SEGMENT, build_descriptor(CODE as u32, 0xfff, 0x9b, 0x4));
    protected::set_gate(0x30, protected::gate(SEGMENT, 0x100, 0xe6));
    protected::place(CODE + 0x100, &[0xcd, 0x20]);
    let stop = ring3(&[0x90, 0xcd, 0x30]);
    let pushed: [u16; 5] = mem::read(stop.frame_end.into());
    let wanted = [CODE as u16 + 3, USER_CODE32, 2, STACK3 as u16, USER_DATA];
    check!("16-bit interrupt gate: pushes words", pushed == wanted, "{pushed:x?} {stop}");
    protected::reset_idt();
}

// --- tasks -----------------------------------------------------------------------------------------------------

fn far(opcode: u8, selector: u16) -> [u8; 9] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, low, high, 0xcd, 0x20]
}

fn descriptor_type(selector: u16) -> u64 {
    tables::descriptor(selector) >> 40 & 0xf
}

fn saved(tss: u64, index: u64) -> u32 {
    mem::read(tss + index * 4)
}

/// The code of task B.
fn prepare_tasks(code_b: &[u8]) {
    write_tss(TSS_A, SEL_A, 0, 0);
    write_tss(TSS_B, SEL_B, CODE as u32 + 0x800, STACK_B as u32);
    protected::place(CODE + 0x800, code_b);
    for (index, value) in [(10, 0xaaaa_0001u32), (11, 0xcccc_0002), (16, 0x5151_0003)] {
        mem::write(TSS_B + index * 4, value);
    }
}

const IN_TASK_A: Entry = Entry { tr: SEL_A as u32, eax: 0x1111_0000, ebx: 0x2222_0000, ..RING0 };

fn task_jump() {
    prepare_tasks(&[0xcd, 0x21]);
    let stop = ring0_with(&far(0xea, SEL_B), &IN_TASK_A);
    check!("task JMP: the new task runs", stop.vector == 0x21 && stop.eip == CODE as u32 + 0x802, "{stop}");
    equal("task JMP: TR", stop.tr, SEL_B.into());
    check!(
        "task JMP: registers of the new task",
        stop.eax == 0xaaaa_0001 && stop.ecx == 0xcccc_0002 && stop.esi == 0x5151_0003,
        "{stop}"
    );
    check!("task JMP: CR0.TS is set", stop.cr0 & CR0_TS != 0, "CR0 {:#x}", stop.cr0);
    check!("task JMP: NT is clear", stop.eflags & NT == 0, "{:#x}", stop.eflags);
    equal("task JMP: EIP of the old task", saved(TSS_A, 8), CODE as u32 + 7);
    check!(
        "task JMP: registers of the old task",
        saved(TSS_A, 10) == 0x1111_0000 && saved(TSS_A, 13) == 0x2222_0000,
        "not saved"
    );
    equal("task JMP: segments of the old task", saved(TSS_A, 19) & 0xffff, CODE32.into());
    equal("task JMP: the old task is available", descriptor_type(SEL_A), 0x9);
    equal("task JMP: the new task is busy", descriptor_type(SEL_B), 0xb);
}

fn task_call_and_return() {
    prepare_tasks(&[0xcd, 0x21]);
    let stop = ring0_with(&far(0x9a, SEL_B), &IN_TASK_A);
    check!("task CALL: the new task runs", stop.vector == 0x21 && stop.tr == u32::from(SEL_B), "{stop}");
    check!("task CALL: NT is set", stop.eflags & NT != 0, "{:#x}", stop.eflags);
    equal("task CALL: back link", saved(TSS_B, 0) & 0xffff, SEL_A.into());
    equal("task CALL: the old task stays busy", descriptor_type(SEL_A), 0xb);
    equal("task CALL: the new task is busy", descriptor_type(SEL_B), 0xb);
    // inc eax; iret; then the caller stops.
    prepare_tasks(&[0x40, 0xcf, 0xcd, 0x22]);
    let stop = ring0_with(&far(0x9a, SEL_B), &IN_TASK_A);
    check!("task IRET: back in the caller", stop.vector == 0x20 && stop.tr == u32::from(SEL_A), "{stop}");
    equal("task IRET: registers of the caller", stop.eax, 0x1111_0000);
    equal("task IRET: EIP of the nested task", saved(TSS_B, 8), CODE as u32 + 0x802);
    equal("task IRET: EAX of the nested task", saved(TSS_B, 10), 0xaaaa_0002);
    check!("task IRET: NT of the nested task is clear", saved(TSS_B, 9) & NT == 0, "{:#x}", saved(TSS_B, 9));
    equal("task IRET: the nested task is available", descriptor_type(SEL_B), 0x9);
    equal("task IRET: the caller is busy", descriptor_type(SEL_A), 0xb);
}

fn task_gates() {
    prepare_tasks(&[0xcd, 0x21]);
    tables::set_descriptor(GATE, protected::gate(SEL_B, 0, 0x85));
    let stop = ring0_with(&far(0xea, GATE), &IN_TASK_A);
    check!("task gate: JMP", stop.vector == 0x21 && stop.tr == u32::from(SEL_B), "{stop}");
    protected::set_gate(0x31, protected::gate(SEL_B, 0, 0xe5));
    prepare_tasks(&[0xcd, 0x21]);
    let stop = ring0_with(&[0xcd, 0x31, 0xcd, 0x20], &IN_TASK_A);
    check!(
        "task gate: INT",
        stop.vector == 0x21 && stop.tr == u32::from(SEL_B) && stop.eflags & NT != 0,
        "{stop}"
    );
    equal("task gate: INT saves the next EIP", saved(TSS_A, 8), CODE as u32 + 2);
    prepare_tasks(&[0xcf]);
    let stop = ring0_with(&[0xcd, 0x31, 0xcd, 0x20], &IN_TASK_A);
    check!("task gate: INT and IRET", stop.vector == 0x20 && stop.tr == u32::from(SEL_A), "{stop}");
    protected::reset_idt();
    // An exception with an error code: mov ds, absent
    tables::set_descriptor(OTHER, build_descriptor(0, 0xfffff, 0x13, 0xc));
    write_tss(TSS_A, SEL_A, 0, 0);
    let [low, high] = OTHER.to_le_bytes();
    let (stop, error) =
        with_task_gate(trap::NP, || ring0_with(&[0x66, 0xb8, low, high, 0x8e, 0xd8], &IN_TASK_A));
    check!(
        "task gate: an exception pushes its error code",
        stop.vector == 0x21 && error == u32::from(OTHER),
        "{stop}"
    );
    equal("task gate: the fault's EIP is saved", saved(TSS_A, 8), CODE as u32 + 4);
    // A double fault through a task gate: the classic use. #GP gate absent, then a #GP.
    write_tss(TSS_A, SEL_A, 0, 0);
    protected::set_gate(trap::GP, 0);
    let (stop, error) = with_task_gate(trap::DF, || ring0_with(&[0x31, 0xc0, 0x8e, 0xd0], &IN_TASK_A));
    check!(
        "task gate: double fault",
        stop.vector == 0x21 && error == 0 && stop.tr == u32::from(SEL_B),
        "{stop}"
    );
    protected::reset_idt();
}

fn task_faults() {
    prepare_tasks(&[0xcd, 0x21]);
    tables::set_descriptor(SEL_B, build_descriptor(TSS_B as u32, 0x67, 0x8b, 0));
    stopped("task JMP: a busy task", &ring0_with(&far(0xea, SEL_B), &IN_TASK_A), trap::GP, SEL_B.into(), 0);
    prepare_tasks(&[0xcd, 0x21]);
    tables::set_descriptor(SEL_B, build_descriptor(TSS_B as u32, 0x67, 0x09, 0));
    stopped(
        "task JMP: an absent task",
        &ring0_with(&far(0xea, SEL_B), &IN_TASK_A),
        trap::NP,
        SEL_B.into(),
        0,
    );
    prepare_tasks(&[0xcd, 0x21]);
    tables::set_descriptor(SEL_B, build_descriptor(TSS_B as u32, 0x66, 0x89, 0));
    stopped("task JMP: a short TSS", &ring0_with(&far(0xea, SEL_B), &IN_TASK_A), trap::TS, SEL_B.into(), 0);
    equal("a refused switch leaves the task available", descriptor_type(SEL_B), 0x9);
    // iret with NT and a back link to a task that is not busy
    prepare_tasks(&[0xcd, 0x21]);
    mem::write(TSS_A, u32::from(SEL_B));
    let stop = ring0_with(&[0xcf], &Entry { eflags: 2 | NT, ..IN_TASK_A });
    stopped("task IRET: the back link is not busy", &stop, trap::TS, SEL_B.into(), 0);
    // A bad segment in the new task: the fault comes in the new task's context.
    prepare_tasks(&[0xcd, 0x21]);
    tables::set_descriptor(OTHER, build_descriptor(0, 0xfffff, 0x13, 0xc));
    mem::write(TSS_B + 21 * 4, u32::from(OTHER));
    let stop = ring0_with(&far(0xea, SEL_B), &IN_TASK_A);
    let held = stop.vector == 11 && stop.error == u32::from(OTHER) && stop.tr == u32::from(SEL_B);
    check!(
        "task JMP: an absent DS faults in the new task",
        held && stop.eip == CODE as u32 + 0x800,
        "{stop}"
    );
    // The T flag of the new task traps before its first instruction.
    prepare_tasks(&[0xcd, 0x21]);
    mem::write(TSS_B + 100, 1u16);
    cpu::set_dr6(0);
    let stop = ring0_with(&far(0xea, SEL_B), &IN_TASK_A);
    check!("task JMP: the debug trap flag", stop.vector == 1 && stop.eip == CODE as u32 + 0x800, "{stop}");
    check!("task JMP: DR6.BT", cpu::dr6() & 0x8000 != 0, "DR6 {:#x}", cpu::dr6());
}

fn sixteen_bit_task() {
    prepare_tasks(&[0xcd, 0x21]);
    // A 286 TSS: IP, FLAGS, AX.. from offset 14 as words; its code lies in a based segment.
    mem::fill(TSS_B, 0, 64);
    tables::set_descriptor(SEGMENT, build_descriptor(CODE as u32, 0xffff, 0x9b, 0x4));
    let words: [(u64, u16); 8] =
        [(14, 0x800), (16, 2), (18, 0xa16), (26, 0x4000), (34, DATA), (36, SEGMENT), (38, DATA), (40, DATA)];
    for (offset, value) in words {
        mem::write(TSS_B + offset, value);
    }
    tables::set_descriptor(OTHER, build_descriptor(STACK_B as u32 - 0x4000, 0xffff, 0x93, 0x4));
    mem::write(TSS_B + 38, OTHER);
    tables::set_descriptor(SEL_B, build_descriptor(TSS_B as u32, 43, 0x81, 0));
    // The recorder finds its frame through a flat stack alone: the task loads one first.
    // mov dx, DATA; mov ss, dx; mov esp, STACK_B; int 0x21
    let [a, b, c, d] = (STACK_B as u32).to_le_bytes();
    protected::place(CODE + 0x800, &[0x66, 0xba, 0x10, 0, 0x8e, 0xd2, 0xbc, a, b, c, d, 0xcd, 0x21]);
    let stop = ring0_with(&far(0xea, SEL_B), &IN_TASK_A);
    check!(
        "16-bit task: runs",
        stop.vector == 0x21 && stop.tr == u32::from(SEL_B) && stop.cs == u32::from(SEGMENT),
        "{stop}"
    );
    equal("16-bit task: AX", stop.eax as u16, 0xa16);
}

// --- virtual-8086 ----------------------------------------------------------------------------------------------

/// Where virtual-8086 code lies.
const VM_CODE: u64 = 0x1_0000;

const IN_VM: Entry = Entry {
    eip: 0,
    cs: 0x1000,
    ss: 0x2000,
    esp: 0x1000,
    vm_ds: 0x3000,
    vm_es: 0x3000,
    vm_fs: 0x3000,
    vm_gs: 0x3000,
    eflags: VM | 2 | 3 << 12,
    tr: SEL_A as u32,
    ..RING0
};

fn vm_with(code: &[u8], entry: &Entry) -> Stop {
    protected::place(VM_CODE, code);
    protected::run(entry)
}

fn vm(code: &[u8]) -> Stop {
    write_tss(TSS_A, SEL_A, 0, 0);
    vm_with(code, &IN_VM)
}

fn virtual_8086() {
    // mov ax, cs; mov [2], ax; int 0x20
    let stop = vm(&[0x8c, 0xc8, 0xa3, 2, 0, 0xcd, 0x20]);
    check!("V86: INT with IOPL 3 goes through the IDT", stop.vector == 0x20 && stop.eip == 7, "{stop}");
    check!("V86: the frame shows VM", stop.eflags & VM != 0, "{:#x}", stop.eflags);
    equal("V86: CS is a real-mode segment", stop.eax as u16, 0x1000);
    equal("V86: segment * 16 + offset", mem::read::<u16>(0x3_0002), 0x1000);
    check!(
        "V86: the frame has SS:ESP and four segments",
        stop.outer == [0x1000, 0x2000, 0x3000, 0x3000, 0x3000, 0x3000],
        "{:x?}",
        stop.outer
    );
    equal("V86: DS is null in the handler", stop.ds & 0xffff, 0);
    equal("V86: FS is null in the handler", stop.fs & 0xffff, 0);
    let stop = vm(&[0x90, 0x0f, 0x0b]);
    check!("V86: UD", stop.vector == 6 && stop.eip == 1, "{stop}");
    // mov ax, [0xffff]
    let stop = vm(&[0xa1, 0xff, 0xff]);
    check!("V86: GP beyond 64 KiB", stop.vector == 13 && stop.error == 0, "{stop}");
    // far jmp 0x1080:2
    let mut code = [0x90u8; 0x810];
    code[..5].copy_from_slice(&[0xea, 2, 0, 0x80, 0x10]);
    code[0x802..0x806].copy_from_slice(&[0x8c, 0xc8, 0xcd, 0x21]);
    let stop = vm(&code);
    check!("V86: far JMP", stop.vector == 0x21 && stop.eax as u16 == 0x1080, "{stop}");
    for (name, code) in [
        ("V86: HLT", &[0xf4u8] as &[u8]),
        ("V86: MOV to CR0", &[0x0f, 0x22, 0xc0]),
        ("V86: LGDT", &[0x0f, 0x01, 0x16, 0, 0]),
        ("V86: CLTS", &[0x0f, 0x06]),
    ] {
        let stop = vm(code);
        check!(name, stop.vector == 13 && stop.error == 0 && stop.eip == 0, "{stop}");
    }
    let stop = vm(&[0x0f, 0x00, 0xd8]);
    check!("V86: LTR is undefined", stop.vector == 6, "{stop}");
    // in al, 0x80: by the bitmap, whatever the IOPL
    let stop = vm(&[0xe4, 0x80]);
    check!("V86: IN without permission", stop.vector == 13 && stop.eip == 0, "{stop}");
    write_tss(TSS_A, SEL_A, 0, 0);
    mem::write(TSS_A + 136 + 0x10, 0xfeu8);
    let stop = vm_with(&[0xe4, 0x80, 0xcd, 0x20], &Entry { eflags: VM | 2, ..IN_VM });
    check!("V86: IN with permission", stop.vector == 13 && stop.eip == 2, "{stop}");
    // A gate whose DPL is 0 refuses INT 0x20; a handler in ring 3 code is refused too.
    protected::set_gate(0x33, protected::gate(CODE32, protected::recorder(0x33), 0x8e));
    let stop = vm(&[0xcd, 0x33]);
    check!("V86: INT through a DPL 0 gate", stop.vector == 13 && stop.error == 0x33 * 8 + 2, "{stop}");
    protected::reset_idt();
}

fn virtual_8086_sensitive() {
    let iopl0 = Entry { eflags: VM | 2, ..IN_VM };
    for (name, code) in [
        ("V86: CLI with IOPL 0", &[0xfau8] as &[u8]),
        ("V86: STI with IOPL 0", &[0xfb]),
        ("V86: PUSHF with IOPL 0", &[0x9c]),
        ("V86: POPF with IOPL 0", &[0x9d]),
        ("V86: INT n with IOPL 0", &[0xcd, 0x20]),
        ("V86: IRET with IOPL 0", &[0xcf]),
    ] {
        write_tss(TSS_A, SEL_A, 0, 0);
        let stop = vm_with(code, &iopl0);
        check!(name, stop.vector == 13 && stop.error == 0 && stop.eip == 0, "{stop}");
    }
    let stop = vm_with(&[0xcc], &iopl0);
    check!("V86: INT3 ignores IOPL", stop.vector == 3 && stop.eip == 1, "{stop}");
    // cli; pushf; pop ax; sti; int 0x20
    let stop = vm(&[0xfa, 0x9c, 0x58, 0xfa, 0xcd, 0x20]);
    check!("V86: CLI and PUSHF with IOPL 3", stop.vector == 0x20 && stop.eax & 0x200 == 0, "{stop}");
}

const VIF: u32 = 1 << 19;
const VIP: u32 = 1 << 20;

fn virtual_mode_extensions() {
    if !VME.or_skip("VME") {
        return;
    }
    let entry = Entry { eflags: VM | 2, cr4: CR4_VME as u32, ..IN_VM };
    write_tss(TSS_A, SEL_A, 0, 0);
    // sti; int3
    let stop = vm_with(&[0xfb, 0xcc], &entry);
    check!("VME: STI sets VIF", stop.vector == 3 && stop.eflags & (VIF | 0x200) == VIF, "{stop}");
    let stop = vm_with(&[0xfa, 0xcc], &Entry { eflags: entry.eflags | VIF, ..entry });
    check!("VME: CLI clears VIF", stop.vector == 3 && stop.eflags & VIF == 0, "{stop}");
    let stop = vm_with(&[0xfb, 0xcc], &Entry { eflags: entry.eflags | VIP, ..entry });
    check!("VME: STI with VIP pending faults", stop.vector == 13 && stop.eip == 0, "{stop}");
    // pushf; pop ax; int3: IF shows VIF, IOPL shows 3
    let stop = vm_with(&[0x9c, 0x58, 0xcc], &Entry { eflags: entry.eflags | VIF, ..entry });
    equal("VME: PUSHF shows VIF as IF and IOPL 3", stop.eax & 0x3200, 0x3200);
    // INT 0x60 redirected to the table at 0: handler at 0x1000:0x100 does int3
    real::set_vector(0x60, 0x1000, 0x100);
    let mut code = [0x90u8; 0x110];
    code[..2].copy_from_slice(&[0xcd, 0x60]);
    code[0x100] = 0xcc;
    let stop = vm_with(&code, &Entry { eflags: entry.eflags | VIF, ..entry });
    check!("VME: INT is redirected to the 8086 table", stop.vector == 3 && stop.eip == 0x101, "{stop}");
    check!("VME: redirection clears VIF", stop.eflags & VIF == 0, "{:#x}", stop.eflags);
    let frame: [u16; 3] = mem::read(0x2_0ffa);
    check!("VME: the 8086 frame", frame[..2] == [2, 0x1000] && frame[2] & 0x3200 == 0x3200, "{frame:x?}");
    // iret in the handler restores VIF
    code[2] = 0xcc;
    code[0x100] = 0xcf;
    let stop = vm_with(&code, &Entry { eflags: entry.eflags | VIF, ..entry });
    check!(
        "VME: IRET from the redirected handler",
        stop.vector == 3 && stop.eip == 3 && stop.eflags & VIF != 0,
        "{stop}"
    );
    // With its bit set in the redirection map INT faults, IOPL being below 3.
    mem::write(TSS_A + 104 + 0x60 / 8, 1u8 << (0x60 % 8));
    let stop = vm_with(&code, &entry);
    check!("VME: a set bit in the map means #GP", stop.vector == 13 && stop.eip == 0, "{stop}");
}

// --- compatibility mode ----------------------------------------------------------------------------------------

fn compatibility() {
    user::map_window();
    // mov eax, [0x10] with DS of 16 bytes: limits count in compatibility mode
    tables::set_descriptor(SEGMENT, build_descriptor(user::SCRATCH as u32, 0xf, 0xf3, 0x4));
    let [low, high] = (SEGMENT | 3).to_le_bytes();
    let code = [0x66, 0xb8, low, high, 0x8e, 0xd8, 0xa1, 0xc, 0, 0, 0, 0x0f, 0x0b];
    mem::write(user::SCRATCH + 0xc, 0xc0de_0032u32);
    let fault = user::run32(&code);
    check!(
        "compatibility: a segment base counts",
        fault.vector == trap::UD && fault.frame.rax == 0xc0de_0032,
        "{fault}"
    );
    let mut beyond = code;
    beyond[7] = 0xd;
    faulted("compatibility: a segment limit counts", &Some(user::run32(&beyond)), trap::GP, 0, 6);
    // The same data segment in 64-bit code has neither.
    // mov eax, cs; jmp far to 64-bit code; there: mov rbx, rsp (48 89 e3)
    let cs64 = tables::USER_CODE64.to_le_bytes();
    let [a, b, c, d] = (user::CODE as u32 + 16).to_le_bytes();
    let mut code = [0x90u8; 32];
    code[..7].copy_from_slice(&[0xea, a, b, c, d, cs64[0], cs64[1]]);
    code[16..21].copy_from_slice(&[0x48, 0x89, 0xe3, 0x0f, 0x0b]);
    let fault = user::run32(&code);
    check!(
        "compatibility: far JMP to 64-bit code",
        fault.vector == trap::UD && fault.frame.rbx == user::ENTRY32.rsp,
        "{fault}"
    );
    equal("compatibility: CS of the 64-bit code", fault.frame.cs, tables::USER_CODE64.into());
    // 16-bit compatibility mode
    tables::set_descriptor(OTHER, build_descriptor(user::CODE as u32, 0xffff, 0xfb, 0));
    user::load(&[0xb8, 0x34, 0x12, 0x0f, 0x0b]);
    let fault =
        user::run(&user::Entry { cs: u64::from(OTHER | 3), rip: 0, rax: 0xffff_ffff, ..user::ENTRY32 });
    check!(
        "compatibility: 16-bit code",
        fault.vector == trap::UD && fault.frame.rip == 3 && fault.frame.rax == 0xffff_1234,
        "{fault}"
    );
    // Upper halves are not visible in 32-bit code: mov eax, eax zero-extends anyway, so look at what stays.
    let fault = user::run32(&[0xff, 0xc0, 0x0f, 0x0b]);
    equal("compatibility: INC EAX", fault.frame.rax, 1);
}
