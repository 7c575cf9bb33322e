//! Self-modifying code: patches seen after a jump, across pages, through aliases, in loops and by string moves.
#![no_std]
#![no_main]

use rt::mem::{self, PAGE};
use rt::paging::{self, P, W};
use rt::report::{equal, faulted};
use rt::{check, probe, trap};

/// Code pages: two neighbours, and a second address of the first.
const CODE: u64 = 0x80_0000_0000;
const ALIAS: u64 = 0x80_0020_0000;

#[unsafe(no_mangle)]
extern "C" fn guest_main() {
    let pages = mem::frames(4);
    paging::map_pages(CODE, pages, 4, P | W);
    paging::map_pages(ALIAS, pages, 4, P | W);
    rewritten_function();
    patch_in_the_same_block();
    patch_of_the_next_instruction();
    patch_ahead_in_a_loop();
    crossing_instruction();
    next_page();
    through_an_alias();
    moved_by_string();
    data_beside_code();
    other_frame();
    patch_by_locked_and_wide_writes();
    call_chain();
    breakpoint_patch();
}

fn call(at: u64) -> u64 {
    let value: u64;
    // SAFETY: the callers put code there that returns and changes RAX and RCX alone.
    unsafe { core::arch::asm!("call {}", in(reg) at, out("rax") value, out("rcx") _) };
    value
}

/// `mov eax, value; ret`
fn returning(value: u32) -> [u8; 6] {
    let [a, b, c, d] = value.to_le_bytes();
    [0xb8, a, b, c, d, 0xc3]
}

fn rewritten_function() {
    for round in 0..50u32 {
        mem::copy(CODE, &returning(round * 3));
        if call(CODE) != u64::from(round * 3) {
            return rt::report::fail("a rewritten function", format_args!("stale in round {round}"));
        }
    }
    rt::report::pass("a rewritten function");
    // Only the immediate changes.
    let stale = (0..50u32).find(|&round| {
        mem::write(CODE + 1, round);
        call(CODE) != u64::from(round)
    });
    check!("a rewritten immediate", stale.is_none(), "stale in round {stale:?}");
    let stale = (0..4096u64).step_by(61).find(|&offset| {
        mem::copy(CODE + offset, &returning(offset as u32));
        call(CODE + offset) != offset
    });
    check!("new code at many offsets of a page", stale.is_none(), "stale at {stale:?}");
}

/// The code patches an instruction behind a jump in the same straight run.
fn patch_in_the_same_block() {
    // mov byte [rip+d], 2; jmp +0; mov eax, 1 (whose immediate is patched); ret
    let code = [0xc6, 0x05, 0x03, 0, 0, 0, 0x02, 0xeb, 0x00, 0xb8, 0x01, 0, 0, 0, 0xc3];
    mem::copy(CODE, &code);
    equal("a patch behind a jump", call(CODE), 2);
    mem::write(CODE + 10, 1u8);
    equal("the same code again", call(CODE), 2);
}

/// Without a jump: processors since the Pentium Pro notice it too (SDM, "Handling Self- and Cross-Modifying Code").
fn patch_of_the_next_instruction() {
    // mov byte [rip+d], 7; mov eax, 1; ret
    let code = [0xc6, 0x05, 0x01, 0, 0, 0, 0x07, 0xb8, 0x01, 0, 0, 0, 0xc3];
    mem::copy(CODE, &code);
    equal("a patch of the next instruction", call(CODE), 7);
    // The patch turns the following instruction into RET.
    // mov byte [rip+0], 0xc3; (patched) nop; mov eax, 9; ret
    let code = [0xb8, 5, 0, 0, 0, 0xc6, 0x05, 0, 0, 0, 0, 0xc3, 0x90, 0xb8, 9, 0, 0, 0, 0xc3];
    mem::copy(CODE, &code);
    equal("a patch that turns the next instruction into RET", call(CODE), 5);
}

fn patch_ahead_in_a_loop() {
    // xor eax,eax; mov ecx,100; L: inc byte [rip+d]; add eax, imm8 (patched: 1..100); loop L; ret
    let code = [
        0x31, 0xc0, 0xb9, 100, 0, 0, 0, 0xfe, 0x05, 0x02, 0, 0, 0, 0x83, 0xc0, 0x00, 0x83, 0xe9, 0x01, 0x75,
        0xf2, 0xc3,
    ];
    mem::copy(CODE, &code);
    equal("a loop that patches its own immediate", call(CODE), 5050);
}

fn crossing_instruction() {
    // The immediate of mov eax, imm32 lies on the next page.
    let at = CODE + PAGE - 1;
    mem::copy(at, &returning(0x1111_1111));
    equal("an instruction over two pages", call(at), 0x1111_1111);
    mem::write(CODE + PAGE, 0x2222_2222u32);
    equal("its second half patched", call(at), 0x2222_2222);
    mem::copy(at - 2, &[0x31, 0xc0, 0xb9]); // xor eax, eax; mov ecx
    equal("its first half patched", call(at - 2), 0);
    mem::write(at, 0xb8u8); // mov eax
    mem::write(CODE + PAGE + 2, 0x33u8);
    equal("both halves patched", call(at - 2), 0x2233_2222);
}

fn next_page() {
    // Runs off the end of one page into code on the next, then the next page changes.
    mem::copy(CODE + PAGE - 5, &[0xb8, 1, 0, 0, 0]);
    mem::copy(CODE + PAGE, &[0x83, 0xc0, 0x10, 0xc3]);
    equal("code that runs into the next page", call(CODE + PAGE - 5), 0x11);
    mem::write(CODE + PAGE + 2, 0x20u8);
    equal("the next page patched", call(CODE + PAGE - 5), 0x21);
}

fn through_an_alias() {
    mem::copy(CODE, &returning(1));
    equal("before the alias patch", call(CODE), 1);
    mem::write(ALIAS + 1, 2u32);
    equal("patched through another linear address", call(CODE), 2);
    equal("seen through both", call(ALIAS), 2);
    let physical = paging::pte(CODE) & paging::ADDRESS;
    mem::write(physical + 1, 3u32);
    equal("patched through the identity map", call(CODE), 3);
}

fn moved_by_string() {
    for value in [10u32, 20, 30] {
        mem::copy(mem::FREE, &returning(value));
        let fault = probe!(["rep movsb"], inout("rcx") 6u64 => _, inout("rsi") mem::FREE => _, inout("rdi") CODE + 0x100 => _);
        check!(
            "code copied by REP MOVSB",
            fault.is_none() && call(CODE + 0x100) == u64::from(value),
            "stale at {value}"
        );
    }
    mem::copy(mem::FREE, &returning(40));
    mem::fill(mem::FREE + 6, 0x90, 2);
    probe!(["movsq"], inout("rsi") mem::FREE => _, inout("rdi") CODE + 0x100 => _);
    equal("code copied by MOVSQ", call(CODE + 0x100), 40);
    probe!(["rep stosb"], inout("rcx") 5u64 => _, inout("rdi") CODE + 0x100 => _, in("al") 0x90u8);
    check!("code overwritten by REP STOSB", call(CODE + 0x100) != 40, "stale");
    mem::copy(CODE + 0x200, &returning(50));
    probe!(["movups xmm0, [{f}]", "movups [{t}], xmm0"], f = in(reg) CODE + 0x200, t = in(reg) CODE + 0x300, out("xmm0") _);
    equal("code copied by a vector store", call(CODE + 0x300), 50);
}

fn data_beside_code() {
    // xor eax,eax; mov ecx,1000; L: add [rip+d], ecx; inc eax; dec ecx; jnz L; ret; data
    let code = [
        0x31, 0xc0, 0xb9, 0xe8, 0x03, 0, 0, 0x01, 0x0d, 0x07, 0, 0, 0, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xf4,
        0xc3, 0, 0, 0, 0,
    ];
    mem::copy(CODE + 0x400, &code);
    equal("a loop with data on its page", call(CODE + 0x400), 1000);
    equal("its data", mem::read::<u32>(CODE + 0x414), 500_500);
}

fn other_frame() {
    let (first, second) = (mem::frame(), mem::frame());
    mem::copy(first, &returning(100));
    mem::copy(second, &returning(200));
    let va = CODE + 8 * PAGE;
    for (frame, value) in [(first, 100), (second, 200), (first, 100), (second, 200)] {
        paging::set_pte(va, frame | P | W);
        check!("another frame under the same address", call(va) == value, "stale at {value}");
    }
    // A frame changes while it is mapped nowhere but in the identity map, then comes back.
    mem::copy(first, &returning(300));
    paging::set_pte(va, first | P | W);
    equal("a frame rewritten while unmapped", call(va), 300);
}

fn patch_by_locked_and_wide_writes() {
    mem::copy(CODE, &returning(1));
    call(CODE);
    probe!(["lock add dword ptr [{p}], 4"], p = in(reg) CODE + 1);
    equal("patched by a locked ADD", call(CODE), 5);
    probe!(["xchg [{p}], ecx"], p = in(reg) CODE + 1, inout("ecx") 9 => _);
    equal("patched by XCHG", call(CODE), 9);
    probe!(["btc dword ptr [{p}], 4"], p = in(reg) CODE + 1);
    equal("patched by BTC", call(CODE), 25);
    probe!(["fild dword ptr [{p}]", "fistp dword ptr [{q}]"], p = in(reg) CODE + 1, q = in(reg) CODE + 0x41);
    equal("read as data by the FPU", mem::read::<u32>(CODE + 0x41), 25);
    mem::copy(CODE + 0x40, &returning(25));
    call(CODE + 0x40);
    mem::write(mem::FREE, 77u32);
    probe!(["fild dword ptr [{p}]", "fistp dword ptr [{q}]"], p = in(reg) mem::FREE, q = in(reg) CODE + 0x41);
    equal("patched by an FPU store", call(CODE + 0x40), 77);
}

/// A patched callee, called from code that does not change.
fn call_chain() {
    // call +3 (to 8); ret; nop; nop; target: mov eax, imm; ret
    mem::copy(CODE, &[0xe8, 3, 0, 0, 0, 0xc3, 0x90, 0x90]);
    mem::copy(CODE + 8, &returning(1));
    equal("callee before", call(CODE), 1);
    mem::write(CODE + 9, 2u32);
    equal("callee patched", call(CODE), 2);
    // The call's own target changes.
    mem::copy(CODE + 0x20, &returning(3));
    mem::write(CODE + 1, 0x1bu32);
    equal("call target patched", call(CODE), 3);
    // A conditional jump becomes its opposite: xor eax,eax; jz +6 / jnz +6; mov eax,5; ret; mov eax,6; ret
    mem::copy(CODE, &[0x31, 0xc0, 0x74, 0x06, 0xb8, 5, 0, 0, 0, 0xc3, 0xb8, 6, 0, 0, 0, 0xc3]);
    equal("a taken branch", call(CODE), 6);
    mem::write(CODE + 2, 0x75u8);
    equal("the branch inverted", call(CODE), 5);
}

/// What a debugger or a tracer does: INT3 over an instruction and back.
fn breakpoint_patch() {
    mem::copy(CODE, &returning(1));
    equal("before the breakpoint", call(CODE), 1);
    mem::write(CODE, 0xccu8);
    let fault = probe!(["call {p}"], p = in(reg) CODE);
    check!(
        "INT3 over an instruction",
        fault.is_some_and(|f| f.vector == trap::BP && f.frame.rip == CODE + 1),
        "no trap"
    );
    mem::write(CODE, 0xb8u8);
    equal("the instruction is back", call(CODE), 1);
    mem::copy(CODE, &[0x0f, 0x0b]);
    let fault = probe!(["call {p}"], p = in(reg) CODE);
    let at = fault.map(|f| rt::Fault { at: f.frame.rip - CODE, ..f });
    faulted("UD2 over an instruction", &at, trap::UD, 0, 0);
}
