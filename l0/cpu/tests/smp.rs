//! Several vCPUs on threads of their own over one memory: atomic instructions, the memory model, code that another
//! vCPU changes, page tables that another vCPU changes, and getting a vCPU's attention.

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::{PAGE, assemble, entry_of, long_mode, read64, run_to_halt, vcpu, write_tables};
use iced_x86::code_asm::*;
use turtles_cpu::attention::Attention;
use turtles_cpu::phys::PhysMemory;
use turtles_cpu::state::reg;
use turtles_cpu::{Cpu, Exit};
use x86defs::paging;

/// Where the vCPUs' programs are, one page each.
const CODE: u64 = 0x20_0000;
/// Where data is.
const DATA: u64 = 0x40_0000;
/// Far more than any test needs, however the host shares its cores among the spinning vCPUs.
const TICKS: u64 = 1 << 40;

fn machine() -> Arc<PhysMemory> {
    let memory = guest::ram(&[(0, guest::MAPPED)]);
    write_tables(&memory);
    memory
}

/// A vCPU at the program of `index`, in 64-bit mode.
fn at_program(memory: &Arc<PhysMemory>, index: u64) -> (Cpu, Arc<Attention>) {
    let (mut cpu, attention) = vcpu(memory, index as u32);
    long_mode(&mut cpu.state, CODE + index * PAGE, 0x1_0000 + (index + 1) * PAGE);
    cpu.state.gpr.set(reg::RBP, index);
    cpu.state_changed();
    (cpu, attention)
}

/// Runs one program on each of `count` vCPUs at once, each to its HLT; gives the vCPUs back.
fn run_all(memory: &Arc<PhysMemory>, count: u64, prepare: impl Fn(u64, &mut Cpu)) -> Vec<Cpu> {
    let mut cpus: Vec<Cpu> = (0..count).map(|i| at_program(memory, i).0).collect();
    for (i, cpu) in cpus.iter_mut().enumerate() {
        prepare(i as u64, cpu);
        cpu.state_changed();
    }
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            scope.spawn(|| run_to_halt(cpu, TICKS));
        }
    });
    cpus
}

/// Everything that locks, counted in six ways.
fn count_with_everything(a: &mut CodeAssembler, rounds: u32) {
    let counter = |i: i32| qword_ptr(DATA as i32 + 64 * i);
    let mut again = a.create_label();
    a.mov(r15d, rounds).unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(eax, 1).unwrap();
    a.lock().xadd(counter(0), rax).unwrap();
    a.lock().inc(dword_ptr(DATA as i32 + 64)).unwrap();
    // CMPXCHG until it succeeds.
    let mut retry = a.create_label();
    a.mov(rax, counter(2)).unwrap();
    a.set_label(&mut retry).unwrap();
    a.lea(rcx, qword_ptr(rax + 1)).unwrap();
    a.lock().cmpxchg(counter(2), rcx).unwrap();
    a.jnz(retry).unwrap();
    // A lock of one bit around a plain counter.
    let mut taken = a.create_label();
    a.set_label(&mut taken).unwrap();
    a.lock().bts(dword_ptr(DATA as i32 + 64 * 3), 7).unwrap();
    a.jc(taken).unwrap();
    a.inc(counter(4)).unwrap();
    a.lock().btr(dword_ptr(DATA as i32 + 64 * 3), 7).unwrap();
    // A lock made of XCHG.
    let mut held = a.create_label();
    a.set_label(&mut held).unwrap();
    a.mov(eax, 1).unwrap();
    a.xchg(byte_ptr(DATA as i32 + 64 * 5), al).unwrap();
    a.test(al, al).unwrap();
    a.jnz(held).unwrap();
    a.inc(counter(6)).unwrap();
    a.mov(byte_ptr(DATA as i32 + 64 * 5), 0).unwrap();
    // CMPXCHG16B on both halves.
    let mut wide = a.create_label();
    a.mov(rax, counter(7)).unwrap();
    a.mov(rdx, qword_ptr(DATA as i32 + 64 * 7 + 8)).unwrap();
    a.set_label(&mut wide).unwrap();
    a.lea(rbx, qword_ptr(rax + 1)).unwrap();
    a.lea(rcx, qword_ptr(rdx + 2)).unwrap();
    a.lock().cmpxchg16b(xmmword_ptr(DATA as i32 + 64 * 7)).unwrap();
    a.jnz(wide).unwrap();
    a.dec(r15d).unwrap();
    a.jnz(again).unwrap();
    a.hlt().unwrap();
}

fn counts_agree(vcpus: u64, rounds: u32, prepare: impl Fn(u64, &mut Cpu)) {
    let memory = machine();
    for i in 0..vcpus {
        assemble(&memory, CODE + i * PAGE, |a| count_with_everything(a, rounds));
    }
    run_all(&memory, vcpus, prepare);
    let total = vcpus * u64::from(rounds);
    for slot in [0, 1, 2, 4, 6, 7] {
        assert_eq!(read64(&memory, DATA + 64 * slot), total, "counter {slot}");
    }
    assert_eq!(read64(&memory, DATA + 64 * 7 + 8), 2 * total);
}

#[test]
fn locked_instructions_lose_no_update() {
    counts_agree(4, 3000, |_, _| {});
}

/// With a data breakpoint somewhere, every access takes the slow path.
#[test]
fn locked_instructions_lose_no_update_under_data_breakpoints() {
    counts_agree(2, 30_000, |_, cpu| {
        cpu.state.dr[0] = 0x1000;
        cpu.state.dr7 |= 0xd_0003;
    });
}

/// One vCPU keeps executing from the page with the counters, so that no write to it is fast.
#[test]
fn locked_instructions_lose_no_update_in_a_page_with_code() {
    let memory = machine();
    let rounds = 2000;
    for i in 0..2 {
        assemble(&memory, CODE + i * PAGE, |a| count_with_everything(a, rounds));
    }
    assemble(&memory, DATA + 0xf00, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.pause().unwrap();
        a.jmp(again).unwrap();
    });
    let (mut runner, attention) = at_program(&memory, 2);
    runner.state.rip = DATA + 0xf00;
    std::thread::scope(|scope| {
        let runner = scope.spawn(move || runner.run(u64::MAX));
        run_all(&memory, 2, |_, _| {});
        attention.raise(Attention::CANCEL);
        assert_eq!(runner.join().unwrap(), Exit::Attention);
    });
    for slot in [0, 1, 2, 4, 6, 7] {
        assert_eq!(read64(&memory, DATA + 64 * slot), 2 * u64::from(rounds), "counter {slot}");
    }
}

const LITMUS: u64 = 20_000;
const X: u64 = DATA;
const Y: u64 = DATA + LITMUS * 64 + 0x840;
const RESULTS: u64 = Y + LITMUS * 64 + 0x840;

/// Repeats a test's step for each of `LITMUS` pairs of cache lines: `r8` is x's address, `r9` y's; the step leaves
/// what it read in `eax` and `ebx`.
fn litmus_thread(memory: &PhysMemory, index: u64, step: impl FnOnce(&mut CodeAssembler)) {
    assemble(memory, CODE + index * PAGE, |a| {
        let (mut wait, mut again) = (a.create_label(), a.create_label());
        a.mov(r8, X).unwrap();
        a.mov(r9, Y).unwrap();
        a.mov(r10, RESULTS + index * LITMUS * 8).unwrap();
        a.mov(r15d, LITMUS as u32).unwrap();
        // All begin together.
        a.lock().dec(dword_ptr(0x8000)).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(0x8000), 0).unwrap();
        a.jnz(wait).unwrap();
        a.set_label(&mut again).unwrap();
        step(a);
        a.mov(dword_ptr(r10), eax).unwrap();
        a.mov(dword_ptr(r10 + 4), ebx).unwrap();
        a.add(r8, 64).unwrap();
        a.add(r9, 64).unwrap();
        a.add(r10, 8).unwrap();
        a.dec(r15d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
}

/// What thread `index` read in round `round`.
fn seen(memory: &PhysMemory, index: u64, round: u64) -> (u64, u64) {
    let pair = read64(memory, RESULTS + index * LITMUS * 8 + round * 8);
    (pair & 0xffff_ffff, pair >> 32)
}

fn litmus(memory: &Arc<PhysMemory>, threads: u64, forbidden: impl Fn(&PhysMemory, u64) -> bool) {
    memory.write(0x8000, &(threads as u32).to_le_bytes());
    run_all(memory, threads, |_, _| {});
    let bad = (0..LITMUS).filter(|&round| forbidden(memory, round)).count();
    assert_eq!(bad, 0, "outcomes that x86 does not have");
}

#[test]
fn message_passing_keeps_the_order() {
    let memory = machine();
    litmus_thread(&memory, 0, |a| {
        a.mov(dword_ptr(r8), 1).unwrap();
        a.mov(dword_ptr(r9), 1).unwrap();
    });
    litmus_thread(&memory, 1, |a| {
        a.mov(eax, dword_ptr(r9)).unwrap();
        a.mov(ebx, dword_ptr(r8)).unwrap();
    });
    litmus(&memory, 2, |memory, round| seen(memory, 1, round) == (1, 0));
}

#[test]
fn loads_are_not_delayed_past_stores() {
    let memory = machine();
    litmus_thread(&memory, 0, |a| {
        a.mov(eax, dword_ptr(r8)).unwrap();
        a.mov(dword_ptr(r9), 1).unwrap();
    });
    litmus_thread(&memory, 1, |a| {
        a.mov(eax, dword_ptr(r9)).unwrap();
        a.mov(dword_ptr(r8), 1).unwrap();
    });
    litmus(&memory, 2, |memory, round| seen(memory, 0, round).0 == 1 && seen(memory, 1, round).0 == 1);
}

#[test]
fn fences_and_locks_order_a_store_before_a_load() {
    for fence in [true, false] {
        let memory = machine();
        for (index, own, other) in [(0, r8, r9), (1, r9, r8)] {
            litmus_thread(&memory, index, |a| {
                a.mov(dword_ptr(own), 1).unwrap();
                if fence {
                    a.mfence().unwrap();
                } else {
                    a.lock().or(dword_ptr(rsp), 0).unwrap();
                }
                a.mov(eax, dword_ptr(other)).unwrap();
            });
        }
        litmus(&memory, 2, |memory, round| seen(memory, 0, round).0 == 0 && seen(memory, 1, round).0 == 0);
    }
}

#[test]
fn all_agree_on_the_order_of_independent_writes() {
    let memory = machine();
    litmus_thread(&memory, 0, |a| a.mov(dword_ptr(r8), 1).unwrap());
    litmus_thread(&memory, 1, |a| a.mov(dword_ptr(r9), 1).unwrap());
    for (index, first, second) in [(2, r8, r9), (3, r9, r8)] {
        litmus_thread(&memory, index, |a| {
            a.mov(eax, dword_ptr(first)).unwrap();
            a.mov(ebx, dword_ptr(second)).unwrap();
        });
    }
    litmus(&memory, 4, |memory, round| seen(memory, 2, round) == (1, 0) && seen(memory, 3, round) == (1, 0));
}

/// A vCPU stores all zeros and all ones in turn; another must never see a mixture.
#[test]
fn aligned_accesses_are_not_torn_on_the_fast_and_the_slow_path() {
    for slow in [false, true] {
        let memory = machine();
        assemble(&memory, CODE, |a| {
            let mut again = a.create_label();
            a.mov(ecx, 100_000).unwrap();
            a.set_label(&mut again).unwrap();
            a.not(rax).unwrap();
            a.mov(qword_ptr(DATA), rax).unwrap();
            a.dec(ecx).unwrap();
            a.jnz(again).unwrap();
            a.mov(byte_ptr(0x8000), 1).unwrap();
            a.hlt().unwrap();
        });
        assemble(&memory, CODE + PAGE, |a| {
            let (mut again, mut good, mut end) = (a.create_label(), a.create_label(), a.create_label());
            a.xor(ebx, ebx).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(rax, qword_ptr(DATA)).unwrap();
            a.lea(rdx, qword_ptr(rax + 1)).unwrap();
            a.cmp(rdx, 1).unwrap();
            a.jbe(good).unwrap();
            a.inc(ebx).unwrap();
            a.jmp(end).unwrap();
            a.set_label(&mut good).unwrap();
            a.cmp(byte_ptr(0x8000), 0).unwrap();
            a.jz(again).unwrap();
            a.set_label(&mut end).unwrap();
            a.hlt().unwrap();
        });
        let cpus = run_all(&memory, 2, |_, cpu| {
            cpu.state.gpr.set(reg::RAX, 0);
            if slow {
                cpu.state.dr[0] = 0x1000;
                cpu.state.dr7 |= 0xd_0003;
            }
        });
        assert_eq!(cpus[1].state.gpr.get(reg::RBX), 0, "a torn value was seen (slow: {slow})");
    }
}

/// How one vCPU writes the other's code.
#[derive(Clone, Copy, Debug)]
enum Patch {
    Store,
    /// Through another linear address of the same page.
    Alias,
    StringMove,
}

/// vCPU 0 changes the constant that vCPU 1's function returns, round after round, and vCPU 1 must see each change
/// after it has seen the flag and serialised.
fn cross_modify(patch: Patch, function: u64) {
    const ROUNDS: u32 = 1000;
    const FLAG: i32 = 0x8000;
    const ACK: i32 = 0x8040;
    const SOURCE: i32 = 0x8080;
    const ALIAS: u64 = 0x80_0000;
    let memory = machine();
    // mov eax, imm32; ret
    memory.write(function, &[0xb8, 0, 0, 0, 0, 0xc3]);
    for page in 0..2 {
        let frame = (function & !(PAGE - 1)) + page * PAGE;
        let entry = frame | paging::PRESENT | paging::WRITE;
        memory.write(entry_of(ALIAS + page * PAGE), &entry.to_le_bytes());
    }
    let constant = match patch {
        Patch::Alias => ALIAS + (function & (PAGE - 1)) + 1,
        _ => function + 1,
    };
    assemble(&memory, CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(r15d, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rdi, constant).unwrap();
        match patch {
            Patch::Store | Patch::Alias => a.mov(dword_ptr(rdi), r15d).unwrap(),
            Patch::StringMove => {
                a.mov(dword_ptr(SOURCE), r15d).unwrap();
                a.mov(esi, SOURCE).unwrap();
                a.mov(ecx, 4).unwrap();
                a.rep().movsb().unwrap();
            }
        }
        a.mov(dword_ptr(FLAG), r15d).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(ACK), r15d).unwrap();
        a.jnz(wait).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, ROUNDS).unwrap();
        a.jb(again).unwrap();
        a.hlt().unwrap();
    });
    assemble(&memory, CODE + PAGE, |a| {
        let (mut again, mut wait, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r15d, 1).unwrap();
        a.mov(r14, function).unwrap();
        a.set_label(&mut again).unwrap();
        a.zero_bytes().unwrap();
        // Executes the function all the while, so that it is decoded at any moment.
        a.set_label(&mut wait).unwrap();
        a.call(r14).unwrap();
        a.cmp(dword_ptr(FLAG), r15d).unwrap();
        a.jnz(wait).unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.call(r14).unwrap();
        a.cmp(eax, r15d).unwrap();
        a.jnz(bad).unwrap();
        a.mov(dword_ptr(ACK), r15d).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, ROUNDS).unwrap();
        a.jb(again).unwrap();
        a.mov(ebx, 1).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut bad).unwrap();
        // Lets the other one go, and says what was seen.
        a.mov(edx, eax).unwrap();
        a.mov(ebx, 2).unwrap();
        a.hlt().unwrap();
    });
    let mut cpus: Vec<(Cpu, Arc<Attention>)> = (0..2).map(|i| at_program(&memory, i)).collect();
    std::thread::scope(|scope| {
        let (second, first) = (cpus.pop().unwrap(), cpus.pop().unwrap());
        let (mut runner, mut writer) = (second.0, first.0);
        let writer_thread = scope.spawn(move || writer.run(TICKS));
        run_to_halt(&mut runner, TICKS);
        let gpr = &runner.state.gpr;
        let verdict = gpr.get(reg::RBX);
        if verdict != 1 {
            first.1.raise(Attention::CANCEL);
        }
        let _ = writer_thread.join();
        assert_eq!(verdict, 1, "{patch:?}: saw {} in round {}", gpr.get(reg::RDX), gpr.get(15));
    });
}

#[test]
fn code_changed_by_another_vcpu_is_seen_after_serialising() {
    cross_modify(Patch::Store, 0x60_0040);
    cross_modify(Patch::Alias, 0x60_0040);
    cross_modify(Patch::StringMove, 0x60_0040);
}

#[test]
fn code_changed_where_it_crosses_a_page_is_seen_after_serialising() {
    // The opcode ends one page, the constant begins the next.
    cross_modify(Patch::Store, 0x60_0fff);
    cross_modify(Patch::Alias, 0x60_0fff);
}

/// The page holds both vCPUs' data and the code: stores to it are never fast for long.
#[test]
fn code_changed_by_locked_writes_is_seen() {
    let memory = machine();
    // add [counter], 1 by LOCK XADD on the immediate of the other's MOV: the other sees it grow only.
    memory.write(0x60_0040, &[0xb8, 0, 0, 0, 0, 0xc3]);
    assemble(&memory, CODE, |a| {
        let mut again = a.create_label();
        a.mov(r15d, 5000).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, 1).unwrap();
        a.lock().xadd(dword_ptr(0x60_0041), eax).unwrap();
        a.dec(r15d).unwrap();
        a.jnz(again).unwrap();
        a.mov(byte_ptr(0x8000), 1).unwrap();
        a.hlt().unwrap();
    });
    assemble(&memory, CODE + PAGE, |a| {
        let (mut again, mut end) = (a.create_label(), a.create_label());
        a.mov(r14, 0x60_0040_u64).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(cl, byte_ptr(0x8000)).unwrap();
        a.call(r14).unwrap();
        a.cmp(eax, ebx).unwrap();
        a.jb(end).unwrap();
        a.mov(ebx, eax).unwrap();
        a.test(cl, cl).unwrap();
        a.jz(again).unwrap();
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    });
    let cpus = run_all(&memory, 2, |_, _| {});
    assert_eq!(cpus[1].state.gpr.get(reg::RBX), 5000);
}

/// vCPU 0 moves a page between two frames and waits for vCPU 1 to flush it, as an operating system does.
#[test]
fn a_flushed_translation_is_gone() {
    const ROUNDS: u32 = 1000;
    const PAGE_AT: u64 = 0x70_0000;
    const FRAMES: [u64; 2] = [0x90_0000, 0x90_1000];
    const REQUEST: i32 = 0x8000;
    const ACK: i32 = 0x8040;
    let memory = machine();
    let flags = paging::PRESENT | paging::WRITE;
    for frame in FRAMES {
        memory.write(frame, &frame.to_le_bytes());
    }
    memory.write(entry_of(PAGE_AT), &(FRAMES[1] | flags).to_le_bytes());
    assemble(&memory, CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(r15d, 1).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, r15d).unwrap();
        a.and(eax, 1).unwrap();
        a.shl(eax, 12).unwrap();
        a.add(eax, (FRAMES[0] | flags) as i32).unwrap();
        a.mov(qword_ptr(entry_of(PAGE_AT) as i32), rax).unwrap();
        a.mov(dword_ptr(REQUEST), r15d).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(ACK), r15d).unwrap();
        a.jnz(wait).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, ROUNDS).unwrap();
        a.jb(again).unwrap();
        a.hlt().unwrap();
    });
    assemble(&memory, CODE + PAGE, |a| {
        let (mut wait, mut again) = (a.create_label(), a.create_label());
        a.mov(r15d, 1).unwrap();
        a.mov(r14, PAGE_AT).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.zero_bytes().unwrap();
        a.set_label(&mut wait).unwrap();
        // Keeps the translation in use for reading and writing.
        a.mov(rax, qword_ptr(r14)).unwrap();
        a.mov(qword_ptr(r14 + 8), rax).unwrap();
        a.cmp(dword_ptr(REQUEST), r15d).unwrap();
        a.jnz(wait).unwrap();
        a.invlpg(qword_ptr(r14)).unwrap();
        a.mov(ecx, r15d).unwrap();
        a.and(ecx, 1).unwrap();
        a.shl(ecx, 12).unwrap();
        a.add(ecx, FRAMES[0] as i32).unwrap();
        a.xor(rcx, qword_ptr(r14)).unwrap();
        a.or(rbx, rcx).unwrap();
        a.mov(dword_ptr(ACK), r15d).unwrap();
        a.inc(r15d).unwrap();
        a.cmp(r15d, ROUNDS).unwrap();
        a.jb(again).unwrap();
        a.hlt().unwrap();
    });
    let cpus = run_all(&memory, 2, |_, _| {});
    assert_eq!(cpus[1].state.gpr.get(reg::RBX), 0, "an old frame was read after INVLPG");
}

/// All vCPUs write code into fresh pages and execute it at once: everyone keeps asking everyone to forget.
#[test]
fn vcpus_that_all_write_and_execute_code_do_not_wait_for_each_other_for_ever() {
    const ROUNDS: u32 = 1500;
    let memory = machine();
    for index in 0..4u64 {
        // 64 pages for each vCPU in turn, interleaved with the others' in the same 2 MiB.
        assemble(&memory, CODE + index * PAGE, |a| {
            let (mut again, mut bad) = (a.create_label(), a.create_label());
            a.mov(r15d, 1).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(edi, r15d).unwrap();
            a.and(edi, 63).unwrap();
            a.shl(edi, 14).unwrap();
            a.add(edi, (DATA + index * PAGE) as i32).unwrap();
            // mov eax, r15d's value; ret
            a.mov(byte_ptr(rdi), 0xb8_u32 as i32).unwrap();
            a.mov(dword_ptr(rdi + 1), r15d).unwrap();
            a.mov(byte_ptr(rdi + 5), 0xc3_u32 as i32).unwrap();
            a.call(rdi).unwrap();
            a.cmp(eax, r15d).unwrap();
            a.jnz(bad).unwrap();
            a.inc(r15d).unwrap();
            a.cmp(r15d, ROUNDS).unwrap();
            a.jb(again).unwrap();
            a.mov(ebx, 1).unwrap();
            a.set_label(&mut bad).unwrap();
            a.hlt().unwrap();
        });
    }
    for cpu in run_all(&memory, 4, |_, _| {}) {
        assert_eq!(cpu.state.gpr.get(reg::RBX), 1, "stale code in round {}", cpu.state.gpr.get(15));
    }
}

/// The same page for all: each changes its own function in it.
#[test]
fn vcpus_that_change_code_in_one_page_see_their_own_changes() {
    const ROUNDS: u32 = 1000;
    let memory = machine();
    for index in 0..3u64 {
        assemble(&memory, CODE + index * PAGE, |a| {
            let (mut again, mut bad) = (a.create_label(), a.create_label());
            a.mov(r15d, 1).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.mov(rdi, DATA + index * 128).unwrap();
            a.mov(byte_ptr(rdi), 0xb8_u32 as i32).unwrap();
            a.mov(byte_ptr(rdi + 5), 0xc3_u32 as i32).unwrap();
            a.set_label(&mut again).unwrap();
            a.mov(dword_ptr(rdi + 1), r15d).unwrap();
            a.call(rdi).unwrap();
            a.cmp(eax, r15d).unwrap();
            a.jnz(bad).unwrap();
            a.call(rdi).unwrap();
            a.cmp(eax, r15d).unwrap();
            a.jnz(bad).unwrap();
            a.inc(r15d).unwrap();
            a.cmp(r15d, ROUNDS).unwrap();
            a.jb(again).unwrap();
            a.mov(ebx, 1).unwrap();
            a.set_label(&mut bad).unwrap();
            a.hlt().unwrap();
        });
    }
    for cpu in run_all(&memory, 3, |_, _| {}) {
        assert_eq!(cpu.state.gpr.get(reg::RBX), 1, "stale code in round {}", cpu.state.gpr.get(15));
    }
}

/// A device writes code while a vCPU executes it.
#[test]
fn code_written_by_a_device_is_seen() {
    let memory = machine();
    memory.write(0x60_0040, &[0xb8, 0, 0, 0, 0, 0xc3]);
    assemble(&memory, CODE, |a| {
        let (mut again, mut end) = (a.create_label(), a.create_label());
        a.mov(r14, 0x60_0040_u64).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(ecx, dword_ptr(0x8000)).unwrap();
        a.call(r14).unwrap();
        // The code is at least as new as the number read before.
        a.cmp(eax, ecx).unwrap();
        a.jb(end).unwrap();
        a.cmp(ecx, 2000).unwrap();
        a.jb(again).unwrap();
        a.mov(ebx, 1).unwrap();
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    });
    let (mut cpu, _) = at_program(&memory, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=2000u32 {
                memory.write(0x60_0041, &n.to_le_bytes());
                memory.write(0x8000, &n.to_le_bytes());
            }
        });
        run_to_halt(&mut cpu, TICKS);
    });
    assert_eq!(cpu.state.gpr.get(reg::RBX), 1, "stale code");
}

/// Runs `cpu` without limit, cancels it after a moment, and expects it back soon.
fn comes_back_when_cancelled(name: &str, mut cpu: Cpu, attention: &Attention) {
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let running = &running;
        let runner = scope.spawn(move || {
            let exit = cpu.run(u64::MAX);
            running.store(false, Ordering::SeqCst);
            exit
        });
        std::thread::sleep(Duration::from_millis(20));
        assert!(running.load(Ordering::SeqCst), "{name} ended by itself");
        let asked = Instant::now();
        attention.raise(Attention::CANCEL);
        while running.load(Ordering::SeqCst) {
            assert!(asked.elapsed() < Duration::from_secs(20), "{name} does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(runner.join().unwrap(), Exit::Attention, "{name}");
    });
}

/// An IDT whose invalid-opcode gate leads to an invalid opcode.
fn faults_for_ever(memory: &PhysMemory, cpu: &mut Cpu) {
    const IDT: u64 = 0x5000;
    const GDT: u64 = 0x6000;
    let handler = CODE + 0x800;
    let gate = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    memory.write(IDT + 6 * 16, &gate.to_le_bytes());
    memory.write(IDT + 6 * 16 + 8, &(handler >> 32).to_le_bytes());
    memory.write(GDT + 8, &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    // The handler takes its frame off the stack and faults again, so that the stack lasts.
    memory.write(handler, &[0x0f, 0x0b]);
    memory.write(CODE, &[0x0f, 0x0b]);
    cpu.state.idtr.base = IDT;
    cpu.state.idtr.limit = 0xfff;
    cpu.state.gdtr.base = GDT;
    cpu.state.gdtr.limit = 0xf;
    // An interrupt stack, so that every frame lands in the same place.
    memory.write(IDT + 6 * 16 + 4, &[1]);
    cpu.state.tr.base = 0x7000;
    cpu.state.tr.limit = 0x67;
    cpu.state.tr.access = 0x8b;
    memory.write(0x7000 + 36, &0x9000_u64.to_le_bytes());
    cpu.state_changed();
}

#[test]
fn every_endless_guest_can_be_cancelled() {
    let memory = machine();
    memory.write(CODE, &[0xeb, 0xfe]);
    let (cpu, attention) = at_program(&memory, 0);
    comes_back_when_cancelled("a loop", cpu, &attention);

    let memory = machine();
    // REP STOSB of everything, over a page of code (slow) and with address wrap (no end).
    memory.write(CODE, &[0xf3, 0x67, 0xaa, 0xeb, 0xfb]);
    let (mut cpu, attention) = at_program(&memory, 0);
    // 32-bit addresses from an MMIO address that is mapped: nothing ends it soon.
    let mmio = 0x7_0000_0000 | paging::PRESENT | paging::WRITE | paging::LARGE;
    memory.write(guest::TABLES + PAGE + 3 * 8, &mmio.to_le_bytes());
    cpu.state.gpr.set(reg::RCX, 0x3fff_ffff);
    cpu.state.gpr.set(reg::RDI, 0xc000_0000);
    comes_back_when_cancelled("REP STOSB to a device", cpu, &attention);

    let memory = machine();
    let (mut cpu, attention) = at_program(&memory, 0);
    faults_for_ever(&memory, &mut cpu);
    comes_back_when_cancelled("a faulting fault handler", cpu, &attention);
}

/// Faults and pieces of repeated instructions use up a budget, or the owner would never get the vCPU back.
#[test]
fn a_budget_ends_what_completes_no_instruction() {
    let memory = machine();
    let (mut cpu, _) = at_program(&memory, 0);
    faults_for_ever(&memory, &mut cpu);
    assert_eq!(cpu.run(10_000), Exit::Budget);
    assert_eq!(cpu.state.instructions, 0);
    assert_eq!(cpu.state.ticks(), 10_000);
}

/// While vCPU 1 writes to vCPU 0's code without a pause, vCPU 0 still makes progress.
#[test]
fn a_vcpu_whose_code_is_being_written_goes_on() {
    let memory = machine();
    assemble(&memory, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 20_000).unwrap();
        a.set_label(&mut again).unwrap();
        a.nop().unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.mov(byte_ptr(0x8000), 1).unwrap();
        a.hlt().unwrap();
        // What the other one writes to, in the same 64 bytes.
        a.db(&[0; 8]).unwrap();
    });
    assemble(&memory, CODE + PAGE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(CODE as i32 + 0x38)).unwrap();
        a.cmp(byte_ptr(0x8000), 0).unwrap();
        a.jz(again).unwrap();
        a.hlt().unwrap();
    });
    run_all(&memory, 2, |_, _| {});
}
