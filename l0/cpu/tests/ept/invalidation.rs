//! What the TLB may remember, by whom it is used, and what makes it forget ("Caching Translation Information").

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::cr0;

use crate::guest::{EPTP, Guest};
use crate::level::{ALL, Page, R};
use crate::machine::{CODE, DATA, Machine, PDPT};

/// Physical pages that hold their own number.
const PAGES: [u64; 3] = [0x20_0000, 0x20_1000, 0x20_2000];

fn guest() -> Guest {
    let mut g = Guest::new(Machine::long()).code(|a| a.mov(rax, qword_ptr(DATA)).unwrap());
    for page in PAGES {
        g.m.put64(page, page);
    }
    show(&g, 0);
    g
}

fn show(g: &Guest, index: usize) {
    g.map(DATA, Page::new(PAGES[index], ALL));
}

/// What the guest reads at `DATA`.
fn read(g: &mut Guest) -> usize {
    g.m.cpu.state.rip = CODE;
    g.m.steps(1);
    PAGES.iter().position(|&p| p == g.m.reg(reg::RAX)).expect("one of the pages")
}

#[test]
fn a_change_is_seen_after_invalidation() {
    let mut g = guest();
    assert_eq!(read(&mut g), 0);
    show(&g, 1);
    assert_eq!(read(&mut g), 0, "the TLB has it");
    g.m.cpu.invalidate(|tag| tag.eptp == 0x1000);
    assert_eq!(read(&mut g), 0, "another EPT pointer's");
    g.m.cpu.invalidate(|tag| tag.eptp == EPTP & !0xfff);
    assert_eq!(read(&mut g), 1);
    show(&g, 2);
    g.m.cpu.invalidate(|tag| tag.vpid == 2);
    assert_eq!(read(&mut g), 1, "another virtual processor's");
    g.m.cpu.invalidate(|tag| tag.vpid == 1);
    assert_eq!(read(&mut g), 2);
}

#[test]
fn one_address_is_invalidated() {
    let mut g = guest();
    assert_eq!(read(&mut g), 0);
    show(&g, 1);
    g.m.cpu.invalidate_page(DATA + 0x20_0000, |tag| tag.vpid == 2);
    assert_eq!(read(&mut g), 0);
    g.m.cpu.invalidate_page(DATA + 0x123, |tag| tag.vpid == 1);
    assert_eq!(read(&mut g), 1);
}

#[test]
fn global_translations_may_be_kept() {
    let mut g = guest();
    g.m.put64(PDPT, 0x187);
    g.m = g.m.with(|s| s.cr4 |= x86defs::cr4::PGE);
    assert_eq!(read(&mut g), 0);
    show(&g, 1);
    g.m.cpu.invalidate_non_global(|_| true);
    assert_eq!(read(&mut g), 0);
    g.m.cpu.invalidate(|_| true);
    assert_eq!(read(&mut g), 1);
}

#[test]
fn root_operation_and_each_guest_have_their_own() {
    let mut g = guest();
    assert_eq!(read(&mut g), 0);
    g.m.put64(DATA, PAGES[1]);
    g.m.cpu.leave_non_root();
    assert_eq!(read(&mut g), 1);
    show(&g, 2);
    g.controls.vpid_tag = 2;
    g.enter();
    assert_eq!(read(&mut g), 2, "another virtual processor");
    g.controls.vpid_tag = 1;
    g.enter();
    assert_eq!(read(&mut g), 0, "the first one's are still there");
    g.controls.ept_pointer = EPTP + 0x1000;
    g.enter();
    assert_eq!(read(&mut g), 2, "another EPT pointer");
    // Without EPT, guest-physical addresses are physical.
    g.controls.secondary = 0;
    g.enter();
    assert_eq!(read(&mut g), 1);
    let asked = g.table.lock().unwrap().asked;
    g.m.cpu.leave_non_root();
    assert_eq!(read(&mut g), 1);
    assert_eq!(g.table.lock().unwrap().asked, asked);
}

#[test]
fn going_back_and_forth_asks_nothing_anew() {
    let mut g = guest();
    read(&mut g);
    g.m.cpu.leave_non_root();
    g.m.put64(DATA, PAGES[1]);
    read(&mut g);
    let asked = g.table.lock().unwrap().asked;
    for _ in 0..10 {
        g.enter();
        assert_eq!(read(&mut g), 0);
        g.m.cpu.leave_non_root();
        assert_eq!(read(&mut g), 1);
    }
    assert_eq!(g.table.lock().unwrap().asked, asked);
}

#[test]
fn the_guests_own_invalidations_are_its_own() {
    let mut g = guest();
    g.m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| {
        a.mov(rcx, cr3).unwrap();
        a.mov(cr3, rcx).unwrap();
        a.invlpg(byte_ptr(DATA)).unwrap();
    });
    g.m.put64(DATA, PAGES[1]);
    g.m.cpu.leave_non_root();
    assert_eq!(read(&mut g), 1);
    g.controls.vpid_tag = 2;
    g.enter();
    assert_eq!(read(&mut g), 0);
    g.controls.vpid_tag = 1;
    g.enter();
    assert_eq!(read(&mut g), 0);
    show(&g, 2);
    g.m.cpu.state.rip = CODE + 0x100;
    g.m.steps(3);
    assert_eq!(read(&mut g), 2);
    g.controls.vpid_tag = 2;
    g.enter();
    assert_eq!(read(&mut g), 0);
}

#[test]
fn translations_do_not_outlive_the_control_bits_they_were_made_under() {
    // The guest may write its read-only page while CR0.WP is clear; its hypervisor sets WP between exits.
    let mut g = guest();
    g.m.put64(PDPT + 8, 0xe5);
    g.m = g.m.with(|s| s.cr0 &= !cr0::WP);
    g.m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| {
        a.mov(qword_ptr(0x4000_0000 + DATA), rax).unwrap();
    });
    for _ in 0..2 {
        g.m.cpu.state.rip = CODE + 0x100;
        g.m.steps(1);
    }
    g.m.cpu.leave_non_root();
    g.m.cpu.state.cr0 |= cr0::WP;
    g.enter();
    g.m.cpu.state.rip = CODE + 0x100;
    assert_eq!(g.m.vector(), u64::from(x86defs::vector::PF));
}

#[test]
fn write_permission_taken_away_is_asked_for_after_invalidation() {
    let mut g = guest();
    g.m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| a.mov(qword_ptr(DATA + 8), rax).unwrap());
    g.m.cpu.state.rip = CODE + 0x100;
    g.m.steps(1);
    g.map(DATA, Page::new(PAGES[0], R));
    g.m.cpu.invalidate(|_| true);
    g.m.cpu.state.rip = CODE + 0x100;
    g.violation();
}

#[test]
fn a_violation_forgets_what_translated_its_address() {
    let mut g = guest();
    g.m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| a.mov(qword_ptr(DATA + 8), rax).unwrap());
    g.map(DATA, Page::new(PAGES[0], R));
    assert_eq!(read(&mut g), 0);
    g.m.cpu.state.rip = CODE + 0x100;
    g.violation();
    // The hypervisor gives the guest a page of its own, and need not invalidate anything.
    show(&g, 1);
    assert_eq!(read(&mut g), 1);
}
