//! Processor state in memory: FXSAVE, the XSAVE family, XCR0, lazy FPU switching, MXCSR.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::*};
use rt::cpu::*;
use rt::mem::{self, FREE};
use rt::report::{equal, faulted, ran};
use rt::{Fault, check, probe, trap, user};

/// Two state areas, and a place for patterns.
const AREA: u64 = FREE;
const OTHER: u64 = FREE + 0x4000;
const PATTERN: u64 = FREE + 0x8000;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX_STATE: u64 = 4;
/// Offsets in the area.
const MXCSR: u64 = 24;
const MXCSR_MASK: u64 = 28;
const ST0: u64 = 32;
const XMM0: u64 = 160;
const HEADER: u64 = 512;
const COMPACTED: u64 = HEADER + 8;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    user::map_window();
    for i in 0..512 {
        mem::write(PATTERN + i, (i * 37 + 11) as u8);
    }
    fxsave();
    lazy_switching();
    mxcsr();
    if !XSAVE.or_skip("XSAVE") {
        return;
    }
    faulted("UD: XSAVE without CR4.OSXSAVE", &save("xsave", 7), trap::UD, 0, 0);
    set_cr4(cr4() | CR4_OSXSAVE);
    equal("CPUID shows CR4.OSXSAVE", cpuid(1, 0).ecx >> 27 & 1, 1);
    xcr0();
    xsave();
    xrstor_checks();
    avx();
    xsaveopt();
    xsavec();
    xsaves();
    task_switched();
}

/// Runs one of the saving instructions on `AREA` with a request mask, after loading a known state.
fn save(which: &str, mask: u64) -> Option<Fault> {
    save_to(which, mask, AREA)
}

macro_rules! with_state {
    ($text:literal, $mask:expr, $area:expr) => {
        probe!(
            [concat!($text, " [{p}]")],
            p = in(reg) $area, in("eax") $mask as u32, in("edx") ($mask >> 32) as u32,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _
        )
    };
}

fn save_to(which: &str, mask: u64, area: u64) -> Option<Fault> {
    match which {
        "xsave" => with_state!("xsave64", mask, area),
        "xsaveopt" => with_state!("xsaveopt64", mask, area),
        "xsavec" => with_state!("xsavec64", mask, area),
        "xsaves" => with_state!("xsaves64", mask, area),
        "xrstors" => with_state!("xrstors64", mask, area),
        _ => with_state!("xrstor64", mask, area),
    }
}

fn restore(mask: u64) -> Option<Fault> {
    save_to("xrstor", mask, AREA)
}

/// Loads the pattern into XMM registers and `1` onto the x87 stack, and saves with one instruction.
macro_rules! save_pattern {
    ($text:literal, $mask:expr, $area:expr) => {{
        let mask: u64 = $mask;
        probe!(
            [
                "fninit", "fld1", "movups xmm0, [{s}]", "movups xmm1, [{s} + 16]", "movups xmm7, [{s} + 32]",
                "movups xmm15, [{s} + 48]", concat!($text, " [{p}]"), "fninit"
            ],
            s = in(reg) PATTERN, p = in(reg) $area, in("eax") mask as u32, in("edx") (mask >> 32) as u32,
            out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm15") _
        )
    }};
}

/// Restores with one instruction and stores XMM0, XMM15 and ST(0) at `OTHER`.
macro_rules! restore_and_look {
    ($text:literal, $mask:expr, $area:expr) => {{
        let mask: u64 = $mask;
        mem::fill(OTHER, 0xcc, 64);
        probe!(
            [
                "movups xmm0, [{q}]", "movups xmm15, [{q}]", concat!($text, " [{p}]"), "movups [{q}], xmm0",
                "movups [{q} + 16], xmm15", "fstp tbyte ptr [{q} + 32]", "fninit"
            ],
            q = in(reg) OTHER, p = in(reg) $area, in("eax") mask as u32, in("edx") (mask >> 32) as u32,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _
        )
    }};
}

fn pattern(at: u64) -> u128 {
    mem::read(PATTERN + at)
}

/// 1.0 as the x87 stores it.
const ONE: u128 = 0x3fff_8000_0000_0000_0000;

fn st(at: u64) -> u128 {
    u128::from(mem::read::<u16>(at + 8)) << 64 | u128::from(mem::read::<u64>(at))
}

fn fxsave() {
    mem::fill(AREA, 0xee, 512);
    ran("FXSAVE", &save_pattern!("fxsave64", 0, AREA));
    equal("FXSAVE: control word", mem::read::<u16>(AREA), 0x37f);
    equal("FXSAVE: top of stack", mem::read::<u16>(AREA + 2) >> 11 & 7, 7);
    equal("FXSAVE: abridged tag word", mem::read::<u8>(AREA + 4), 0x80);
    equal("FXSAVE: MXCSR", mem::read::<u32>(AREA + MXCSR), 0x1f80);
    check!(
        "FXSAVE: MXCSR mask",
        mem::read::<u32>(AREA + MXCSR_MASK) & 0xffbf == 0xffbf,
        "{:#x}",
        mem::read::<u32>(AREA + MXCSR_MASK)
    );
    equal("FXSAVE: ST(0)", st(AREA + ST0), ONE);
    for (name, register, at) in
        [("FXSAVE: XMM0", 0, 0), ("FXSAVE: XMM1", 1, 16), ("FXSAVE: XMM7", 7, 32), ("FXSAVE: XMM15", 15, 48)]
    {
        equal(name, mem::read::<u128>(AREA + XMM0 + register * 16), pattern(at));
    }
    ran("FXRSTOR", &restore_and_look!("fxrstor64", 0, AREA));
    equal("FXRSTOR: XMM0", mem::read::<u128>(OTHER), pattern(0));
    equal("FXRSTOR: XMM15", mem::read::<u128>(OTHER + 16), pattern(48));
    equal("FXRSTOR: ST(0)", st(OTHER + 32), ONE);
    mem::write(AREA + MXCSR, 0x8000_1f80u32);
    faulted("FXRSTOR with a reserved bit of MXCSR", &with_state!("fxrstor64", 0u64, AREA), trap::GP, 0, 0);
    ran("FINIT", &probe!(["fninit"]));
}

/// What an OS did before XSAVE: switch x87 and SSE state at the first use.
fn lazy_switching() {
    static SWITCHES: AtomicU64 = AtomicU64::new(0);
    // The state of "another task": XMM0 holds the pattern, the x87 stack 1.0.
    save_pattern!("fxsave64", 0, AREA);
    trap::on(trap::NM, |frame| {
        SWITCHES.fetch_add(1, Relaxed);
        mem::copy(frame.fx_image, mem::bytes(AREA, 512));
        frame.cr0 &= !CR0_TS;
    });
    set_cr0(cr0() | CR0_TS);
    let fault = probe!(
        ["movups [{q}], xmm0", "fstp tbyte ptr [{q} + 16]", "mov rax, cr0", "fninit"],
        q = in(reg) OTHER, out("rax") _, out("xmm0") _, out("xmm1") _, out("xmm7") _, out("xmm15") _
    );
    trap::off(trap::NM);
    let task_switched = cr0() & CR0_TS;
    set_cr0(cr0() & !CR0_TS);
    ran("lazy FPU: the instructions go on behind the switch", &fault);
    equal("lazy FPU: one trap for all", SWITCHES.load(Relaxed), 1);
    equal("lazy FPU: XMM0 of the new task", mem::read::<u128>(OTHER), pattern(0));
    equal("lazy FPU: ST(0) of the new task", st(OTHER + 16), ONE);
    equal("lazy FPU: CR0.TS stays clear", task_switched, 0);
}

fn mxcsr() {
    let run = |control: u32| {
        mem::write(OTHER, control);
        mem::write(OTHER + 4, 0x1f80u32);
        mem::write(OTHER + 8, 2.5f32);
        mem::write(OTHER + 12, -2.5f32);
        let (up, down): (i32, i32);
        // SAFETY: MXCSR is restored at the end.
        unsafe {
            asm!("ldmxcsr [{p}]", "cvtss2si {a:e}, dword ptr [{p} + 8]", "cvtss2si {b:e}, dword ptr [{p} + 12]",
                "stmxcsr [{p} + 16]", "ldmxcsr [{p} + 4]", p = in(reg) OTHER, a = out(reg) up, b = out(reg) down);
        }
        (up, down)
    };
    for (name, rounding, wanted) in [
        ("MXCSR: round to nearest even", 0, (2, -2)),
        ("MXCSR: round down", 1, (2, -3)),
        ("MXCSR: round up", 2, (3, -2)),
        ("MXCSR: round to zero", 3, (2, -2)),
    ] {
        let found = run(0x1f80 | rounding << 13);
        check!(name, found == wanted, "{found:?}, wanted {wanted:?}");
    }
    equal("MXCSR: the precision flag sticks", mem::read::<u32>(OTHER + 16) & 0x3f, 0x20);
    // Smallest normal / 2 is denormal; with FTZ it is zero.
    let halve = |control: u32| {
        mem::write(OTHER, control);
        mem::write(OTHER + 4, 0x1f80u32);
        mem::write(OTHER + 8, [0x0080_0000u32, 0x3f00_0000]);
        let result: u32;
        // SAFETY: MXCSR is restored at the end.
        unsafe {
            asm!("ldmxcsr [{p}]", "movss xmm0, [{p} + 8]", "mulss xmm0, [{p} + 12]", "movd {r:e}, xmm0", "ldmxcsr [{p} + 4]",
                p = in(reg) OTHER, r = out(reg) result, out("xmm0") _);
        }
        result
    };
    equal("MXCSR: a denormal result", halve(0x1f80), 0x0040_0000);
    equal("MXCSR: flushed to zero", halve(0x9f80), 0);
}

fn try_xsetbv(index: u32, value: u64) -> Option<Fault> {
    probe!(["xsetbv"], in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32)
}

/// All state that this CPU offers for XCR0.
fn offered() -> u64 {
    let leaf = cpuid(0xd, 0);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

fn xcr0() {
    equal("XCR0 after reset", xgetbv(0), X87);
    check!("x87 and SSE are offered", offered() & 3 == 3, "{:#x}", offered());
    faulted("XSETBV without x87", &try_xsetbv(0, SSE), trap::GP, 0, 0);
    faulted("XSETBV with AVX and no SSE", &try_xsetbv(0, X87 | AVX_STATE), trap::GP, 0, 0);
    faulted("XSETBV with a reserved bit", &try_xsetbv(0, X87 | SSE | 1 << 62), trap::GP, 0, 0);
    faulted("XSETBV of another register", &try_xsetbv(1, X87), trap::GP, 0, 0);
    faulted(
        "XGETBV of an unknown register",
        &probe!(["xgetbv"], in("ecx") 9, out("eax") _, out("edx") _),
        trap::GP,
        0,
        0,
    );
    // xor ecx,ecx; xgetbv; xsetbv
    faulted(
        "XSETBV in ring 3, after XGETBV",
        &Some(user::run64(&[0x31, 0xc9, 0x0f, 0x01, 0xd0, 0x0f, 0x01, 0xd1])),
        trap::GP,
        0,
        5,
    );
    ran("XSETBV", &try_xsetbv(0, X87 | SSE));
    equal("XGETBV reads it back", xgetbv(0), X87 | SSE);
    equal("CPUID: size of the enabled state", cpuid(0xd, 0).ebx, 576);
    let all = offered() & 7;
    ran("XSETBV with all up to AVX", &try_xsetbv(0, all));
    if all & AVX_STATE != 0 {
        equal("CPUID: size with AVX", cpuid(0xd, 0).ebx, cpuid(0xd, 2).ebx + 256);
    }
}

fn xsave() {
    mem::fill(AREA, 0, 4096);
    ran("XSAVE", &save_pattern!("xsave64", X87 | SSE, AREA));
    equal("XSAVE: the header shows both", mem::read::<u64>(AREA + HEADER) & 3, 3);
    equal("XSAVE: the header shows the standard format", mem::read::<u64>(AREA + COMPACTED), 0);
    equal("XSAVE: XMM15", mem::read::<u128>(AREA + XMM0 + 240), pattern(48));
    equal("XSAVE: ST(0)", st(AREA + ST0), ONE);
    ran("XRSTOR", &restore_and_look!("xrstor64", X87 | SSE, AREA));
    equal("XRSTOR: XMM0", mem::read::<u128>(OTHER), pattern(0));
    equal("XRSTOR: ST(0)", st(OTHER + 32), ONE);
    // A state component whose bit is clear in the header goes to its initial state.
    mem::write(AREA + HEADER, X87);
    ran("XRSTOR without SSE in the header", &restore_and_look!("xrstor64", X87 | SSE, AREA));
    equal("XRSTOR: it resets XMM0", mem::read::<u128>(OTHER), 0);
    // A component that is not asked for stays.
    mem::write(AREA + HEADER, X87 | SSE);
    ran("XRSTOR of x87 alone", &restore_and_look!("xrstor64", X87, AREA));
    equal("XRSTOR: XMM0 stays", mem::read::<u128>(OTHER), 0xcccc_cccc_cccc_cccc_cccc_cccc_cccc_cccc);
    mem::fill(AREA + XMM0, 0x99, 256);
    mem::write(AREA + HEADER, 0u64);
    ran("XSAVE of x87 alone", &save_pattern!("xsave64", X87, AREA));
    equal("XSAVE: XMM0 in memory stays", mem::read::<u8>(AREA + XMM0), 0x99);
    equal("XSAVE: its bit in the header stays", mem::read::<u64>(AREA + HEADER), X87);
}

fn xrstor_checks() {
    mem::fill(AREA, 0, 4096);
    save_pattern!("xsave64", X87 | SSE, AREA);
    faulted("XSAVE not aligned", &save_to("xsave", 3, AREA + 32), trap::GP, 0, 0);
    faulted("XRSTOR not aligned", &save_to("xrstor", 3, AREA + 32), trap::GP, 0, 0);
    mem::write(AREA + HEADER, 3 | 1u64 << 61);
    faulted("XRSTOR: unknown state in the header", &restore(3), trap::GP, 0, 0);
    mem::write(AREA + HEADER, 3u64);
    mem::write(AREA + HEADER + 16, 1u64);
    faulted("XRSTOR: reserved bytes of the header", &restore(3), trap::GP, 0, 0);
    mem::write(AREA + HEADER + 16, 0u64);
    mem::write(AREA + COMPACTED, 1u64);
    faulted("XRSTOR: a compaction mask without its format bit", &restore(3), trap::GP, 0, 0);
    mem::write(AREA + COMPACTED, 0u64);
    mem::write(AREA + MXCSR, 0x4000_0000u32);
    faulted("XRSTOR: a reserved bit of MXCSR", &restore(3), trap::GP, 0, 0);
    mem::write(AREA + MXCSR, 0x1f80u32);
    ran("XRSTOR: all right again", &restore(3));
    ran("FINIT after the checks", &probe!(["fninit"]));
}

fn avx() {
    if !AVX.or_skip("AVX state") {
        return;
    }
    let offset = u64::from(cpuid(0xd, 2).ebx);
    equal("CPUID: AVX state is 256 bytes", cpuid(0xd, 2).eax, 256);
    mem::fill(AREA, 0, 4096);
    let mask = X87 | SSE | AVX_STATE;
    let fault = probe!(
        ["vmovups ymm3, [{s}]", "xsave64 [{p}]", "vxorps ymm3, ymm3, ymm3", "xrstor64 [{p}]", "vmovups [{q}], ymm3", "vzeroupper", "vmovups [{q} + 32], ymm3"],
        s = in(reg) PATTERN, p = in(reg) AREA, q = in(reg) OTHER, in("eax") mask as u32, in("edx") 0,
        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
        out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
        out("xmm13") _, out("xmm14") _, out("xmm15") _
    );
    ran("AVX: save, clear, restore", &fault);
    equal("AVX: upper half in memory", mem::read::<u128>(AREA + offset + 48), pattern(16));
    equal("AVX: lower half restored", mem::read::<u128>(OTHER), pattern(0));
    equal("AVX: upper half restored", mem::read::<u128>(OTHER + 16), pattern(16));
    equal("VZEROUPPER: lower half stays", mem::read::<u128>(OTHER + 32), pattern(0));
    equal("VZEROUPPER: upper half is zero", mem::read::<u128>(OTHER + 48), 0);
    ran("XSETBV without AVX", &try_xsetbv(0, X87 | SSE));
    let fault = probe!(["vxorps ymm0, ymm0, ymm0"], out("xmm0") _);
    faulted("UD: AVX without its bit in XCR0", &fault, trap::UD, 0, 0);
    try_xsetbv(0, offered() & 7);
}

fn xsaveopt() {
    if !XSAVEOPT.or_skip("XSAVEOPT") {
        return;
    }
    mem::fill(AREA, 0, 4096);
    ran("XSAVEOPT", &save_pattern!("xsaveopt64", X87 | SSE, AREA));
    equal("XSAVEOPT: XMM0", mem::read::<u128>(AREA + XMM0), pattern(0));
    ran("XRSTOR after XSAVEOPT", &restore_and_look!("xrstor64", X87 | SSE, AREA));
    equal("XSAVEOPT: XMM15 comes back", mem::read::<u128>(OTHER + 16), pattern(48));
    // Changed state must be written although the area was just restored from.
    restore(3);
    let fault = probe!(
        ["movups xmm0, [{s}]", "xsaveopt64 [{p}]"],
        s = in(reg) PATTERN + 64, p = in(reg) AREA, in("eax") 3, in("edx") 0, out("xmm0") _
    );
    ran("XSAVEOPT of changed state", &fault);
    equal("XSAVEOPT writes what changed", mem::read::<u128>(AREA + XMM0), pattern(64));
}

fn xsavec() {
    if !XSAVEC.or_skip("XSAVEC") {
        return;
    }
    mem::fill(AREA, 0xff, 4096);
    mem::write(AREA + HEADER + 16, [0u64; 6]);
    ran("XSAVEC", &save_pattern!("xsavec64", X87 | SSE, AREA));
    equal("XSAVEC: header", mem::read::<u64>(AREA + HEADER), 3);
    equal("XSAVEC: the compacted format", mem::read::<u64>(AREA + COMPACTED), 3 | 1 << 63);
    ran("XRSTOR of the compacted format", &restore_and_look!("xrstor64", X87 | SSE, AREA));
    equal("XSAVEC: XMM0 comes back", mem::read::<u128>(OTHER), pattern(0));
    // SSE in its initial state is not in use.
    let fault = probe!(
        ["xrstor64 [{p}]", "xsavec64 [{q}]"],
        p = in(reg) initial_area(), q = in(reg) AREA, in("eax") 3, in("edx") 0,
        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
        out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
        out("xmm13") _, out("xmm14") _, out("xmm15") _
    );
    ran("XSAVEC of the initial state", &fault);
    equal("XSAVEC: initial state is not saved", mem::read::<u64>(AREA + HEADER), 0);
    if XGETBV1.or_skip("XGETBV 1") {
        equal("XGETBV 1 shows no unknown state", xgetbv(1) & !xgetbv(0), 0);
    }
}

/// An area whose header says that everything is in its initial state.
fn initial_area() -> u64 {
    let area = OTHER + 0x1000;
    mem::fill(area, 0, 1024);
    mem::write(area + MXCSR, 0x1f80u32);
    area
}

fn xsaves() {
    if !XSAVES.or_skip("XSAVES") {
        return;
    }
    equal("XSS after reset", rdmsr(MSR_XSS), 0);
    mem::fill(AREA, 0, 4096);
    ran("XSAVES", &save_pattern!("xsaves64", X87 | SSE, AREA));
    equal("XSAVES: the compacted format", mem::read::<u64>(AREA + COMPACTED), 3 | 1 << 63);
    ran("XRSTORS", &restore_and_look!("xrstors64", X87 | SSE, AREA));
    equal("XRSTORS: XMM0 comes back", mem::read::<u128>(OTHER), pattern(0));
    mem::write(AREA + COMPACTED, 0u64);
    faulted("XRSTORS of the standard format", &save_to("xrstors", 3, AREA), trap::GP, 0, 0);
    let fault = probe!(["wrmsr"], in("ecx") MSR_XSS, in("eax") 1, in("edx") 0);
    faulted("XSS with a user state", &fault, trap::GP, 0, 0);
    // xsaves [rdi] in ring 3
    user::load(&[0x48, 0x0f, 0xc7, 0x2f]);
    let fault = user::run(&user::Entry { rdi: user::SCRATCH, rax: 3, ..user::ENTRY64 });
    faulted("XSAVES in ring 3", &Some(fault), trap::GP, 0, 0);
}

fn task_switched() {
    set_cr0(cr0() | CR0_TS);
    let saved = probe!(["xsave64 [{p}]"], p = in(reg) AREA, in("eax") 3, in("edx") 0);
    let fx = probe!(["fxsave64 [{p}]"], p = in(reg) AREA);
    let moved = probe!(["ldmxcsr [{p}]"], p = in(reg) AREA + MXCSR);
    let integer = probe!(["movnti [{p}], {v}"], p = in(reg) OTHER, v = in(reg) 5u64);
    set_cr0(cr0() & !CR0_TS);
    faulted("NM: XSAVE with CR0.TS", &saved, trap::NM, 0, 0);
    faulted("NM: FXSAVE with CR0.TS", &fx, trap::NM, 0, 0);
    faulted("NM: LDMXCSR with CR0.TS", &moved, trap::NM, 0, 0);
    ran("MOVNTI ignores CR0.TS", &integer);
}
