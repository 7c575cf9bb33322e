//! String instructions: direction, address sizes, overlap, page faults in the middle and the state to restart from.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU64, Ordering};
use rt::mem::{self, FREE, PAGE};
use rt::paging::{self, P, W};
use rt::report::{equal, ran};
use rt::{check, probe, trap};

/// Two windows with a hole after the first page.
const SOURCE: u64 = 0x80_0000_0000;
const TARGET: u64 = 0x80_0020_0000;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    for i in 0..PAGE {
        mem::write(FREE + i, (i * 7 + 3) as u8);
    }
    moves();
    backwards();
    overlap();
    stores_and_loads();
    compares_and_scans();
    address_sizes();
    segments();
    zero_counts();
    faults_in_the_middle();
    fault_and_go_on();
    port_strings();
    large();
}

struct After {
    rcx: u64,
    rsi: u64,
    rdi: u64,
}

macro_rules! string {
    ($text:expr, $rcx:expr, $rsi:expr, $rdi:expr) => {{
        let (mut rcx, mut rsi, mut rdi): (u64, u64, u64) = ($rcx, $rsi, $rdi);
        let fault = probe!([$text, "cld"], inout("rcx") rcx, inout("rsi") rsi, inout("rdi") rdi, inout("rax") 0x1122_3344_5566_7788u64 => _);
        (fault, After { rcx, rsi, rdi })
    }};
}

fn registers(name: &str, after: &After, rcx: u64, rsi: u64, rdi: u64) {
    check!(
        name,
        (after.rcx, after.rsi, after.rdi) == (rcx, rsi, rdi),
        "RCX {:#x} RSI {:#x} RDI {:#x}, wanted {rcx:#x} {rsi:#x} {rdi:#x}",
        after.rcx,
        after.rsi,
        after.rdi
    );
}

/// Whether `count` bytes at two addresses are the same.
fn same(a: u64, b: u64, count: u64) -> bool {
    (0..count).all(|i| mem::read::<u8>(a + i) == mem::read::<u8>(b + i))
}

fn moves() {
    let to = FREE + 2 * PAGE;
    mem::fill(to, 0, PAGE);
    let (_, after) = string!("rep movsb", 13, FREE, to);
    registers("MOVSB: registers", &after, 0, FREE + 13, to + 13);
    check!("MOVSB: bytes", same(FREE, to, 13) && mem::read::<u8>(to + 13) == 0, "wrong bytes");
    let (_, after) = string!("rep movsw", 13, FREE + 1, to);
    registers("MOVSW: registers", &after, 0, FREE + 27, to + 26);
    check!("MOVSW: bytes", same(FREE + 1, to, 26), "wrong bytes");
    let (_, after) = string!("rep movsd", 13, FREE + 3, to + 1);
    registers("MOVSD: registers", &after, 0, FREE + 55, to + 53);
    check!("MOVSD: bytes", same(FREE + 3, to + 1, 52), "wrong bytes");
    let (_, after) = string!("rep movsq", 100, FREE, to);
    registers("MOVSQ: registers", &after, 0, FREE + 800, to + 800);
    check!("MOVSQ: bytes", same(FREE, to, 800), "wrong bytes");
    let (_, after) = string!("movsb", 5, FREE, to);
    registers("MOVSB without REP moves one", &after, 5, FREE + 1, to + 1);
    // F2 (REPNE) repeats MOVS like F3.
    let (_, after) = string!(".byte 0xf2, 0xa4", 5, FREE, to);
    registers("REPNE MOVSB repeats", &after, 0, FREE + 5, to + 5);
}

fn backwards() {
    let to = FREE + 2 * PAGE;
    mem::fill(to, 0, PAGE);
    let (_, after) = string!("std; rep movsd", 4, FREE + 12, to + 12);
    registers("DF: MOVSD goes down", &after, 0, FREE.wrapping_sub(4), to.wrapping_sub(4));
    check!("DF: MOVSD bytes", same(FREE, to, 16) && mem::read::<u8>(to + 16) == 0, "wrong bytes");
    let (_, after) = string!("std; rep stosb", 3, FREE, to + 102);
    registers("DF: STOSB goes down", &after, 0, FREE, to + 99);
    equal("DF: STOSB bytes", mem::read::<u32>(to + 99), 0x8888_8800);
}

fn overlap() {
    let base = FREE + 4 * PAGE;
    mem::fill(base, 0, 64);
    mem::write(base, 0xa5u8);
    string!("rep movsb", 40, base, base + 1);
    check!(
        "overlap: a forward move spreads the first byte",
        (0..41).all(|i| mem::read::<u8>(base + i) == 0xa5),
        "no"
    );
    for i in 0..32 {
        mem::write(base + i, i as u8);
    }
    string!("std; rep movsb", 24, base + 23, base + 31);
    check!(
        "overlap: a backward move keeps the bytes",
        (0..24).all(|i| mem::read::<u8>(base + 8 + i) == i as u8),
        "no"
    );
    for i in 0..64 {
        mem::write(base + i, i as u8);
    }
    string!("rep movsq", 5, base, base + 4);
    // The last quadword: half of it written by the one before, half untouched.
    equal("overlap: quadwords four bytes apart", mem::read::<u64>(base + 36), 0x2726_2524_1f1e_1d1c);
}

fn stores_and_loads() {
    let to = FREE + 2 * PAGE;
    mem::fill(to, 0, 128);
    let (_, after) = string!("rep stosq", 4, 0, to);
    registers("STOSQ: registers", &after, 0, 0, to + 32);
    equal("STOSQ: bytes", mem::read::<u64>(to + 24), 0x1122_3344_5566_7788);
    let (_, after) = string!("rep stosw", 3, 0, to + 40);
    registers("STOSW: registers", &after, 0, 0, to + 46);
    equal("STOSW: bytes", mem::read::<u64>(to + 40), 0x7788_7788_7788);
    let mut rax = 0xffff_ffff_ffff_ffffu64;
    let mut rsi = FREE;
    let fault = probe!(["lodsw"], inout("rax") rax, inout("rsi") rsi);
    ran("LODSW", &fault);
    equal("LODSW keeps the rest of RAX", rax, 0xffff_ffff_ffff_0000 | u64::from(mem::read::<u16>(FREE)));
    equal("LODSW: RSI", rsi, FREE + 2);
    probe!(["lodsd"], inout("rax") rax, inout("rsi") rsi);
    equal("LODSD clears the upper half of RAX", rax, u64::from(mem::read::<u32>(FREE + 2)));
    probe!(["rep lodsb"], inout("rax") rax, inout("rsi") rsi, inout("rcx") 5u64 => _);
    equal("REP LODSB loads the last", rax as u8, mem::read::<u8>(FREE + 10));
}

fn compares_and_scans() {
    let (a, b) = (FREE + 2 * PAGE, FREE + 3 * PAGE);
    mem::fill(a, 1, 64);
    mem::fill(b, 1, 64);
    mem::write(b + 20, 2u8);
    let (mut rcx, mut rsi, mut rdi) = (64u64, a, b);
    let flags: u64;
    // SAFETY: reads two buffers.
    unsafe {
        core::arch::asm!("repe cmpsb", "pushfq", "pop {f}", f = out(reg) flags,
            inout("rcx") rcx, inout("rsi") rsi, inout("rdi") rdi);
    }
    registers("CMPSB stops behind the difference", &After { rcx, rsi, rdi }, 43, a + 21, b + 21);
    check!("CMPSB: flags of 1 - 2", flags & 0x8d5 == 0x95, "{flags:#x}");
    let (_, after) = string!("repne cmpsb", 64, a, b + 15);
    registers("REPNE CMPSB stops behind the first match", &after, 63, a + 1, b + 16);
    mem::fill(a, 0, 64);
    mem::write(a + 33, 0x88u8);
    let (_, after) = string!("repne scasb", 64, 0, a);
    registers("REPNE SCASB finds a byte", &after, 30, 0, a + 34);
    let (_, after) = string!("repe scasb", 64, 0, a + 33);
    registers("REPE SCASB stops behind the first other byte", &after, 62, 0, a + 35);
    mem::write(a + 40, 0x1122_3344_5566_7788u64);
    let (_, after) = string!("repne scasq", 8, 0, a);
    registers("REPNE SCASQ finds a quadword", &after, 2, 0, a + 48);
}

fn address_sizes() {
    let to = FREE + 2 * PAGE;
    mem::fill(to, 0, 64);
    let high = 0xdead_0000_0000_0000u64;
    let (fault, after) = string!(".byte 0x67; rep movsb", high | 5, high | FREE, high | to);
    ran("32-bit addresses ignore the upper halves", &fault);
    registers("32-bit addresses clear the upper halves", &after, 0, FREE + 5, to + 5);
    check!("32-bit addresses: bytes", same(FREE, to, 5), "wrong bytes");
    let (_, after) = string!(".byte 0x67; rep movsb", high, high | FREE, high | to);
    equal("a 32-bit count of zero moves nothing", mem::read::<u8>(to + 5), 0);
    check!("a 32-bit count of zero", after.rcx as u32 == 0, "{:#x}", after.rcx);
}

fn segments() {
    let to = FREE + 2 * PAGE;
    rt::cpu::wrmsr(rt::cpu::MSR_GS_BASE, 0x100);
    string!(".byte 0x65; rep movsb", 8, FREE, to);
    rt::cpu::wrmsr(rt::cpu::MSR_GS_BASE, 0);
    check!("a segment override moves the source alone", same(FREE + 0x100, to, 8), "wrong bytes");
}

fn zero_counts() {
    // With a count of zero nothing is accessed, so nothing faults.
    let (fault, after) = string!("rep movsb", 0, 1 << 63, 1 << 63);
    ran("a count of zero touches no memory", &fault);
    registers("a count of zero changes no register", &after, 0, 1 << 63, 1 << 63);
    let flags: u64;
    // SAFETY: with RCX zero no memory is touched.
    unsafe {
        core::arch::asm!("xor eax, eax", "stc", "repe cmpsb", "pushfq", "pop {f}", f = out(reg) flags,
            in("rcx") 0u64, in("rsi") 0u64, in("rdi") 0u64, out("eax") _);
    }
    check!("a count of zero keeps the flags", flags & 0x41 == 0x41, "{flags:#x}");
}

fn map_windows() {
    for window in [SOURCE, TARGET] {
        paging::map_pages(window, mem::frame(), 1, P | W);
        paging::set_pte(window + PAGE, 0);
    }
}

fn faults_in_the_middle() {
    map_windows();
    let near_end = |base: u64, room: u64| base + PAGE - room;
    let (fault, after) = string!("rep movsb", 100, FREE, near_end(TARGET, 30));
    restart("MOVSB into a hole", &fault, &after, [70, FREE + 30, TARGET + PAGE], 2, TARGET + PAGE);
    let (fault, after) = string!("rep movsb", 100, near_end(SOURCE, 30), FREE + PAGE);
    restart("MOVSB out of a hole", &fault, &after, [70, SOURCE + PAGE, FREE + PAGE + 30], 0, SOURCE + PAGE);
    let (fault, after) = string!("rep movsq", 100, FREE, near_end(TARGET, 20));
    restart(
        "MOVSQ whose third element crosses",
        &fault,
        &after,
        [98, FREE + 16, TARGET + PAGE - 4],
        2,
        TARGET + PAGE,
    );
    let (fault, after) = string!("rep stosd", 100, 0, near_end(TARGET, 10));
    restart(
        "STOSD whose third element crosses",
        &fault,
        &after,
        [98, 0, TARGET + PAGE - 2],
        2,
        TARGET + PAGE,
    );
    mem::fill(SOURCE, 0, PAGE);
    let (fault, after) = string!("repne scasb", 100, 0, near_end(SOURCE, 10));
    restart("SCASB", &fault, &after, [90, 0, SOURCE + PAGE], 0, SOURCE + PAGE);
    mem::fill(FREE + PAGE, 0, PAGE);
    let (fault, after) = string!("repe cmpsb", 100, FREE + PAGE, near_end(SOURCE, 10));
    restart("CMPSB", &fault, &after, [90, FREE + PAGE + 10, SOURCE + PAGE], 0, SOURCE + PAGE);
    paging::set_pte(TARGET - PAGE, 0);
    let (fault, after) = string!("std; rep movsb", 100, FREE + 200, TARGET + 9);
    restart_at("MOVSB downwards", &fault, &after, [90, FREE + 190, TARGET - 1], 2, TARGET - 1, 1);
    let (fault, after) = string!("rep movsb", 100, near_end(SOURCE, 12), near_end(TARGET, 12));
    let first = fault.map_or(0, |f| f.cr2);
    check!(
        "MOVSB with both at the end",
        after.rcx == 88 && (first == SOURCE + PAGE || first == TARGET + PAGE),
        "CR2 {first:#x}"
    );
    check!(
        "the bytes before the fault are moved",
        same(near_end(SOURCE, 12), near_end(TARGET, 12), 12),
        "wrong bytes"
    );
}

fn restart(name: &str, fault: &Option<rt::Fault>, after: &After, regs: [u64; 3], error: u32, address: u64) {
    restart_at(name, fault, after, regs, error, address, 0);
}

fn restart_at(
    name: &str,
    fault: &Option<rt::Fault>,
    after: &After,
    regs: [u64; 3],
    error: u32,
    address: u64,
    at: u64,
) {
    let [rcx, rsi, rdi] = regs;
    let (vector, found) = fault.map_or((0, (0, 0, 0)), |f| (f.vector, (f.error, f.cr2, f.at)));
    check!(
        name,
        vector == trap::PF
            && found == (error, address, at)
            && (after.rcx, after.rsi, after.rdi) == (rcx, rsi, rdi),
        "vector {vector} (error, CR2, offset) {found:x?} RCX {:#x} RSI {:#x} RDI {:#x}, wanted {rcx:#x} {rsi:#x} {rdi:#x}",
        after.rcx,
        after.rsi,
        after.rdi
    );
}

/// The handler maps the missing page and the instruction goes on.
fn fault_and_go_on() {
    static FAULTS: AtomicU64 = AtomicU64::new(0);
    map_windows();
    trap::on(trap::PF, |_| {
        FAULTS.fetch_add(1, Ordering::Relaxed);
        let page = rt::cpu::cr2() & !0xfff;
        paging::map_pages(page, mem::frame(), 1, P | W);
    });
    for i in 0..3 * PAGE {
        mem::write(FREE + 8 * PAGE + i, (i * 5 + i / 256) as u8);
    }
    let (fault, after) = string!("rep movsb", 3 * PAGE, FREE + 8 * PAGE, TARGET + 16);
    ran("a copy into absent pages finishes", &fault);
    registers("its registers", &after, 0, FREE + 11 * PAGE, TARGET + 16 + 3 * PAGE);
    check!("its bytes", same(FREE + 8 * PAGE, TARGET + 16, 3 * PAGE), "wrong bytes");
    equal("one fault for each absent page", FAULTS.load(Ordering::Relaxed), 3);
    let (fault, _) = string!("rep movsq", 2 * PAGE / 8, TARGET + 16, SOURCE + 4);
    trap::off(trap::PF);
    ran("a copy of unaligned quadwords finishes", &fault);
    check!("its bytes, unaligned", same(TARGET + 16, SOURCE + 4, 2 * PAGE), "wrong bytes");
}

fn port_strings() {
    let to = FREE + 2 * PAGE;
    mem::fill(to, 0, 16);
    // The scratch register of COM1 keeps what is written to it.
    mem::write(FREE, 0x5au8);
    let fault = probe!(["rep outsb"], in("dx") 0x3ffu16, inout("rsi") FREE => _, inout("rcx") 1u64 => _);
    ran("REP OUTSB", &fault);
    let mut rdi = to;
    let fault = probe!(["rep insb"], in("dx") 0x3ffu16, inout("rdi") rdi, inout("rcx") 3u64 => _);
    ran("REP INSB", &fault);
    equal("REP INSB: bytes", mem::read::<u32>(to), 0x005a_5a5a);
    equal("REP INSB: RDI", rdi, to + 3);
    map_windows();
    let mut rcx = 5u64;
    let mut rdi = TARGET + PAGE - 2;
    let fault = probe!(["rep insb"], in("dx") 0x3ffu16, inout("rdi") rdi, inout("rcx") rcx);
    restart(
        "REP INSB into a hole",
        &fault,
        &After { rcx, rsi: 0, rdi },
        [3, 0, TARGET + PAGE],
        2,
        TARGET + PAGE,
    );
}

fn large() {
    let (from, to, size) = (FREE, FREE + (4 << 20), 3 << 20);
    for i in 0..size / 8 {
        if i % 512 < 2 {
            mem::write(from + i * 8, i ^ 0x5555);
        }
    }
    let (_, after) = string!("rep movsq", size / 8, from, to);
    registers("3 MiB: registers", &after, 0, from + size, to + size);
    let matches =
        (0..size / PAGE).all(|i| mem::read::<u64>(from + i * PAGE) == mem::read::<u64>(to + i * PAGE));
    check!("3 MiB: a quadword of each page", matches, "wrong bytes");
}
