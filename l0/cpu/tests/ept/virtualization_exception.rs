//! "Virtualization Exceptions".

use iced_x86::code_asm::*;
use x86defs::vmx::ept_qualification::*;
use x86defs::vmx::secondary;
use x86defs::{cr0, vector};

use crate::guest::Guest;
use crate::level::{ALL, Page, R};
use crate::machine::{DATA, IDT, Machine};

const AREA: u64 = 0x30_0000;
const OPEN: u64 = LINEAR_VALID | FINAL_TRANSLATION | USER_PAGE | WRITABLE_PAGE;

fn guest(m: Machine) -> Guest {
    let g = Guest::new(m).with(|c| {
        c.secondary |= secondary::EPT_VIOLATION_VE;
        c.ve_information = AREA;
        c.eptp_index = 0x1a2;
    });
    g.map(DATA, convertible(DATA, 0));
    g
}

fn convertible(at: u64, allowed: u64) -> Page {
    Page { suppress_ve: false, ..Page::new(at & !4095, allowed) }
}

fn reads_data(a: &mut CodeAssembler) {
    a.mov(rax, qword_ptr(DATA + 0x10)).unwrap();
}

#[test]
fn the_area_tells_what_an_exit_would_have_told() {
    let mut g = guest(Machine::long()).code(reads_data);
    assert_eq!(g.m.vector(), u64::from(vector::VE));
    assert_eq!(g.m.get(AREA, 4), 48);
    assert_eq!(g.m.get(AREA + 4, 4), 0xffff_ffff);
    assert_eq!(g.m.get(AREA + 8, 8), READ | OPEN);
    assert_eq!(g.m.get(AREA + 16, 8), DATA + 0x10);
    assert_eq!(g.m.get(AREA + 24, 8), DATA + 0x10);
    assert_eq!(g.m.get(AREA + 32, 2), 0x1a2);
}

#[test]
fn it_is_an_exit_while_the_area_is_in_use() {
    let mut g = guest(Machine::long()).code(reads_data);
    g.m.put32(AREA + 4, 1);
    assert_eq!(g.violation(), (READ | OPEN, DATA + 0x10, DATA + 0x10));
    assert_eq!(g.m.get(AREA, 4), 0);
}

#[test]
fn it_is_an_exit_where_the_entry_says_so() {
    let mut g = guest(Machine::long()).code(reads_data);
    g.map(DATA, Page { suppress_ve: true, ..convertible(DATA, 0) });
    g.violation();
}

#[test]
fn it_is_an_exit_in_real_mode_and_without_the_control() {
    let mut g = guest(Machine::real()).code(|a| a.mov(ax, word_ptr(0x3000)).unwrap());
    g.map(0x3000, convertible(0x3000, 0));
    g.violation();
    let mut g = guest(Machine::long()).code(reads_data).with(|c| c.secondary &= !secondary::EPT_VIOLATION_VE);
    g.violation();
    assert_eq!(g.m.get(AREA + 4, 4), 0);
}

#[test]
fn protected_mode_without_paging_has_it() {
    let mut g = guest(Machine::protected()).code(|a| a.mov(dword_ptr(DATA), eax).unwrap());
    g.map(DATA, convertible(DATA, R));
    assert_eq!(g.m.cpu.state.cr0 & cr0::PG, 0);
    assert_eq!(g.m.vector(), u64::from(vector::VE));
    assert_eq!(g.m.get(AREA + 8, 8), WRITE | READABLE | OPEN);
}

#[test]
fn it_is_an_exit_while_an_event_is_delivered() {
    let mut g = guest(Machine::long()).code(|a| a.ud2().unwrap());
    g.map(IDT, convertible(IDT, 0));
    let gate = IDT + 16 * u64::from(vector::UD);
    assert_eq!(g.violation(), (READ | OPEN, gate, gate));
    assert_eq!(g.m.get(AREA + 4, 4), 0);
    // Afterwards it is an exception again.
    g.allow(IDT, ALL);
    g.m.put(g.m.cpu.state.rip, &[0x90; 16]);
    let rip = g.m.cpu.state.rip;
    g.m.asm_at(rip, rip, 64, reads_data);
    assert_eq!(g.m.vector(), u64::from(vector::VE));
}

#[test]
fn a_paging_structure_has_it_too() {
    let mut g = guest(Machine::long()).code(|a| {
        a.nop().unwrap();
        reads_data(a);
    });
    g.m.steps(1);
    g.map(0x1000, convertible(0x1000, 0));
    // The handler's own accesses meet the same table: the area is in use by then.
    assert_eq!(g.violation().0, READ | LINEAR_VALID);
    assert_eq!(g.m.get(AREA + 8, 8), READ | LINEAR_VALID);
    assert_eq!(g.m.get(AREA + 24, 8), 0x1000);
}
