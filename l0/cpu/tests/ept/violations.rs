//! EPT violations and their qualifications ("Exit Qualification for EPT Violations"), misconfigurations, a full log.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::vmx::ept_qualification::*;
use x86defs::vmx::reason;
use x86defs::{cr0, cr4, efer, vector};

use crate::guest::Guest;
use crate::level::{ALL, Page, R, W, X, XU};
use crate::machine::{CODE, DATA, HANDLERS, IDT, KERNEL_STACK, Machine, PDPT, PML4};

/// What the machine's page tables say of every page: user, writable, executable.
const OPEN: u64 = LINEAR_VALID | FINAL_TRANSLATION | USER_PAGE | WRITABLE_PAGE;
/// A page table that a test may use, mapped from `PDPT`.
const PD: u64 = 0x10_0000;
const PT: u64 = 0x10_1000;

fn long() -> Guest {
    Guest::new(Machine::long())
}

/// Small pages: linear = physical for the first 2 MiB, all entries `flags`.
fn small_pages(flags: u64) -> Guest {
    let mut m = Machine::long();
    m.put64(PDPT, PD | 7);
    m.put64(PD, PT | 7);
    for i in 0..512 {
        m.put64(PT + 8 * i, i << 12 | flags);
    }
    Guest::new(m.with(|_| {}))
}

#[test]
fn each_access_names_itself_and_what_was_allowed() {
    type Program = fn(&mut CodeAssembler);
    let read: Program = |a| a.mov(rax, qword_ptr(DATA + 0x18)).unwrap();
    let write: Program = |a| a.mov(qword_ptr(DATA + 0x18), rcx).unwrap();
    let modify: Program = |a| a.inc(qword_ptr(DATA + 0x18)).unwrap();
    let locked: Program = |a| a.lock().xadd(qword_ptr(DATA + 0x18), rdx).unwrap();
    let cases: &[(Program, u64, &[u64])] = &[
        (read, READ, &[0, X]),
        (write, WRITE, &[0, R, R | X, X]),
        (modify, WRITE, &[0, R, R | X, X]),
        (locked, WRITE, &[0, R, R | X, X]),
    ];
    for &(program, access, forbidding) in cases {
        for &allowed in forbidding {
            let mut g = long().code(program);
            g.allow(DATA, allowed);
            g.m.set(reg::RCX, 5);
            assert_eq!(g.violation(), (access | allowed << 3 | OPEN, DATA + 0x18, DATA + 0x18));
            assert_eq!((g.m.cpu.state.rip, g.m.cpu.state.instructions), (CODE, 0));
            // Once it is allowed, the instruction is executed as if nothing had been.
            g.allow(DATA, ALL);
            g.m.cpu.invalidate(|_| true);
            g.m.steps(1);
        }
    }
}

#[test]
fn fetches_name_themselves_and_what_was_allowed() {
    for allowed in [0, R, R | W] {
        let mut g = long().code(|a| a.nop().unwrap());
        g.allow(CODE, allowed);
        assert_eq!(g.violation(), (FETCH | allowed << 3 | OPEN, CODE, CODE));
        g.allow(CODE, X);
        g.m.cpu.invalidate(|_| true);
        g.m.steps(1);
    }
}

#[test]
fn an_execute_only_page_is_executed_and_not_read() {
    let mut g = long().code(|a| {
        a.nop().unwrap();
        a.mov(eax, dword_ptr(CODE)).unwrap();
    });
    g.allow(CODE, X);
    assert_eq!(g.violation(), (READ | EXECUTABLE | OPEN, CODE, CODE));
    assert_eq!(g.m.cpu.state.instructions, 1);
}

#[test]
fn a_readable_page_is_not_written_through_what_a_read_left() {
    let mut g = long().code(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
    });
    g.allow(DATA, R);
    assert_eq!(g.violation(), (WRITE | READABLE | OPEN, DATA, DATA));
    assert_eq!(g.m.cpu.state.instructions, 1);
}

#[test]
fn advanced_information_is_the_guests_own_translation() {
    let present = 1;
    let nx = 1 << 63;
    let cases = [
        (present, 0),
        (present | 2, WRITABLE_PAGE),
        (present | 4, USER_PAGE),
        (present | nx, NX_PAGE),
        (present | nx | 6, USER_PAGE | WRITABLE_PAGE | NX_PAGE),
    ];
    for (flags, advanced) in cases {
        let mut g = small_pages(0x67).code(|a| a.mov(rax, qword_ptr(DATA)).unwrap());
        g.m = g.m.with(|s| s.efer |= efer::NXE);
        g.m.put64(PT + 8 * (DATA >> 12), DATA | flags);
        g.allow(DATA, 0);
        let last = LINEAR_VALID | FINAL_TRANSLATION;
        assert_eq!(g.violation(), (READ | last | advanced, DATA, DATA), "{flags:#x}");
    }
}

#[test]
fn a_paging_structure_entry_is_read() {
    for (table, entry) in [(PML4, PML4), (PDPT, PDPT), (PD, PD), (PT, PT + 8 * (DATA >> 12))] {
        for allowed in [0, X] {
            // The code is in the TLB before the table goes.
            let mut g = small_pages(0x67).code(|a| {
                a.nop().unwrap();
                a.mov(rax, qword_ptr(DATA + 8)).unwrap();
            });
            g.m.steps(1);
            g.allow(table, allowed);
            assert_eq!(g.violation(), (READ | allowed << 3 | LINEAR_VALID, DATA + 8, entry));
        }
    }
}

#[test]
fn an_accessed_flag_is_set_by_a_write() {
    let mut g = small_pages(7).code(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(DATA + 8)).unwrap();
    });
    g.m.steps(1);
    g.allow(PT, R);
    let entry = PT + 8 * (DATA >> 12);
    assert_eq!(g.violation(), (READ | WRITE | READABLE | LINEAR_VALID, DATA + 8, entry));
    assert_eq!(g.m.get(entry, 8), DATA | 7);
    // With the flag set there is nothing to write.
    g.m.put64(entry, DATA | 0x27);
    g.m.steps(1);
}

#[test]
fn a_dirty_flag_is_set_by_a_write() {
    let mut g = small_pages(0x27).code(|a| {
        a.mov(rax, qword_ptr(DATA + 8)).unwrap();
        a.mov(qword_ptr(DATA + 8), rax).unwrap();
    });
    let entry = PT + 8 * (DATA >> 12);
    g.m.steps(1);
    g.allow(PT, R);
    assert_eq!(g.violation(), (READ | WRITE | READABLE | LINEAR_VALID, DATA + 8, entry));
    assert_eq!(g.m.cpu.state.instructions, 1);
    g.allow(PT, R | W);
    g.m.cpu.invalidate(|_| true);
    g.m.steps(1);
    assert_eq!(g.m.get(entry, 8), DATA | 0x67);
}

#[test]
fn with_ept_flags_reading_an_entry_is_a_write() {
    let mut g = small_pages(0x67).code(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(DATA + 8)).unwrap();
    });
    g = g.with_flags();
    g.m.steps(1);
    g.allow(PT, R);
    let entry = PT + 8 * (DATA >> 12);
    assert_eq!(g.violation(), (READ | WRITE | READABLE | LINEAR_VALID, DATA + 8, entry));
    assert!(g.page(PD).dirty && g.page(PML4).dirty && !g.page(CODE).dirty && g.page(CODE).accessed);
}

#[test]
fn the_final_access_comes_after_the_guests_dirty_flag() {
    let mut g = small_pages(0x27).code(|a| a.mov(qword_ptr(DATA), rax).unwrap());
    g.allow(DATA, R);
    g.violation();
    assert_eq!(g.m.get(PT + 8 * (DATA >> 12), 8), DATA | 0x67);
}

#[test]
fn a_write_that_crosses_pages_writes_nothing() {
    let mut g = long().code(|a| a.mov(qword_ptr(DATA + 0xffc), rcx).unwrap());
    g.m.set(reg::RCX, u64::MAX);
    g.allow(DATA + 0x1000, R);
    assert_eq!(g.violation(), (WRITE | READABLE | OPEN, DATA + 0x1000, DATA + 0x1000));
    assert_eq!(g.m.get(DATA + 0xffc, 4), 0);
}

#[test]
fn an_instruction_that_crosses_pages_is_fetched_from_both() {
    let mut g = long();
    g.m = g.m.with(|s| s.rip = CODE + 0xfff);
    g.m.bytes(&[0x48, 0x90]);
    g.allow(CODE + 0x1000, R);
    assert_eq!(g.violation(), (FETCH | READABLE | OPEN, CODE + 0x1000, CODE + 0x1000));
    // The second page of a block that is known is looked up anew as well.
    g.allow(CODE + 0x1000, X);
    g.m.steps(1);
    g.m.cpu.state.rip = CODE + 0xfff;
    g.allow(CODE + 0x1000, W | R);
    g.m.cpu.invalidate(|_| true);
    assert_eq!(g.violation(), (FETCH | READABLE | WRITABLE | OPEN, CODE + 0x1000, CODE + 0x1000));
}

#[test]
fn the_guests_page_fault_comes_before_the_page() {
    let mut g = small_pages(0x67).code(|a| a.mov(qword_ptr(DATA), rax).unwrap());
    g.m.put64(PT + 8 * (DATA >> 12), DATA | 0x65);
    g.allow(DATA, 0);
    assert_eq!(g.m.fault(), (u64::from(vector::PF), 3));
    assert_eq!(g.m.cpu.state.cr2, DATA);
}

#[test]
fn a_structure_that_cannot_be_read_comes_before_the_page_fault() {
    let mut g = small_pages(0x67).code(|a| {
        a.nop().unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
    });
    g.m.steps(1);
    g.m.put64(PT + 8 * (DATA >> 12), 0);
    g.allow(PT, 0);
    assert_eq!(g.violation().0, READ | LINEAR_VALID);
    g.allow(PT, R);
    assert_eq!(g.m.fault(), (u64::from(vector::PF), 2));
}

#[test]
fn without_paging_every_address_is_open_to_users() {
    let mut g = Guest::new(Machine::protected()).code(|a| a.mov(eax, dword_ptr(DATA + 1)).unwrap());
    g.allow(DATA, W);
    assert_eq!(g.violation(), (READ | WRITABLE | OPEN, DATA + 1, DATA + 1));
    let mut g = Guest::new(Machine::real()).code(|a| a.mov(word_ptr(0x1234), ax).unwrap());
    g.allow(0x1000, R);
    assert_eq!(g.violation(), (WRITE | READABLE | OPEN, 0x1234, 0x1234));
}

#[test]
fn mode_based_execute_control_asks_whose_the_page_is() {
    // User and supervisor pages, with each of the two permissions.
    for (flags, user) in [(0x67, true), (0x63, false)] {
        for allowed in [X, XU, X | XU, 0] {
            let mut g = small_pages(0x67).code(|a| a.nop().unwrap());
            g.m.put64(PT + 8 * (CODE >> 12), CODE | flags);
            g.table.lock().unwrap().mode_based = true;
            g.allow(CODE, R | allowed);
            if allowed & if user { XU } else { X } != 0 {
                g.m.steps(1);
                continue;
            }
            let (qualification, ..) = g.violation();
            let page = if user { USER_PAGE } else { 0 };
            let shown = (R | allowed) << 3;
            assert_eq!(
                qualification,
                FETCH | shown | LINEAR_VALID | FINAL_TRANSLATION | WRITABLE_PAGE | page
            );
        }
    }
}

#[test]
fn misconfigurations_of_pages_and_of_paging_structures() {
    let bad = |at| Page { malformed: true, ..Page::new(at, ALL) };
    let mut g = small_pages(0x67).code(|a| a.mov(rax, qword_ptr(DATA + 8)).unwrap());
    g.map(DATA, bad(DATA));
    let exit = g.exit();
    assert_eq!((exit.reason, exit.guest_physical), (reason::EPT_MISCONFIGURATION, DATA + 8));
    g.map(PT, bad(PT));
    g.m.cpu.invalidate(|_| true);
    let exit = g.exit();
    let entry = PT + 8 * (CODE >> 12);
    assert_eq!((exit.reason, exit.guest_physical), (reason::EPT_MISCONFIGURATION, entry));
}

#[test]
fn a_full_log_stops_the_write_before_anything_is_done() {
    let mut g = long().with_flags().code(|a| {
        a.nop().unwrap();
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA), rcx).unwrap();
        a.mov(qword_ptr(DATA + 8), rcx).unwrap();
        a.mov(qword_ptr(DATA + 0x1000), rcx).unwrap();
    });
    g.m.set(reg::RCX, 7);
    g.m.steps(2);
    g.table.lock().unwrap().room = Some(0);
    assert_eq!(g.exit().reason, reason::PML_FULL);
    assert_eq!((g.m.cpu.state.instructions, g.m.get(DATA, 8)), (2, 0));
    g.table.lock().unwrap().room = Some(1);
    assert_eq!(g.exit().reason, reason::PML_FULL);
    assert_eq!((g.m.cpu.state.instructions, g.m.get(DATA + 8, 8)), (4, 7));
    assert_eq!(g.table.lock().unwrap().log, [DATA]);
}

#[test]
fn supervisor_write_protection_is_the_guests_own() {
    // A page that CR0.WP = 0 lets the supervisor write is still read-only in the second level.
    let mut g = small_pages(0x67).code(|a| {
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.mov(qword_ptr(DATA + 0x1000), rax).unwrap();
    });
    g.m = g.m.with(|s| s.cr0 &= !cr0::WP);
    for page in [DATA, DATA + 0x1000] {
        g.m.put64(PT + 8 * (page >> 12), page | 0x65);
    }
    g.allow(DATA + 0x1000, R);
    let last = LINEAR_VALID | FINAL_TRANSLATION | USER_PAGE;
    assert_eq!(g.violation(), (WRITE | READABLE | last, DATA + 0x1000, DATA + 0x1000));
    assert_eq!(g.m.cpu.state.cr4 & cr4::SMAP, 0);
}

#[test]
fn what_event_delivery_needs_is_refused_too() {
    let mut g = long().code(|a| a.ud2().unwrap());
    g.allow(IDT, 0);
    let gate = IDT + 16 * u64::from(vector::UD);
    assert_eq!(g.violation(), (READ | OPEN, gate, gate));
    assert_eq!(g.m.cpu.state.rip, CODE);
    g.allow(IDT, R);
    g.allow(KERNEL_STACK - 0x1000, R);
    let (qualification, linear, _) = g.violation();
    assert_eq!((qualification, linear & !4095), (WRITE | READABLE | OPEN, KERNEL_STACK - 0x1000));
    assert_eq!((g.m.cpu.state.rip, g.m.reg(reg::RSP)), (CODE, KERNEL_STACK));
    g.allow(KERNEL_STACK - 0x1000, R | W);
    g.allow(HANDLERS, R);
    assert_eq!(g.violation().0, FETCH | READABLE | OPEN);
    assert_eq!(g.m.cpu.state.rip, HANDLERS + 16 * u64::from(vector::UD));
}
