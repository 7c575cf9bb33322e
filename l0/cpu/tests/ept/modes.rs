//! The second level under each paging mode.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::vmx::ept_qualification::*;
use x86defs::{cr0, cr4, vector};

use crate::guest::Guest;
use crate::level::{ALL, Page, R};
use crate::machine::{CODE, DATA, Machine};

/// Of PAE paging: the table of the PDPTEs, and a page directory.
const PDPTES: u64 = 0x10_0020;
const PD: u64 = 0x10_1000;
/// L1 keeps every guest page below 1 MiB this much higher.
const MOVED: u64 = 0x20_0000;

/// A machine whose whole memory below 1 MiB and page tables the second level has elsewhere.
fn moved(mut m: Machine, pages: impl Iterator<Item = u64>) -> Guest {
    for page in pages {
        let mut bytes = vec![0; 4096];
        m.cpu.memory().read(page, &mut bytes);
        m.put(page + MOVED, &bytes);
        m.put(page, &[0xcc; 4096]);
    }
    let g = Guest::new(m);
    for page in (0..0x20_0000).step_by(4096) {
        g.map(page, Page::new(page + MOVED, ALL));
    }
    g
}

fn below(limit: u64) -> impl Iterator<Item = u64> {
    (0..limit).step_by(4096)
}

#[test]
fn real_mode_lives_in_guest_physical_memory() {
    let mut m = Machine::real();
    m.asm(|a| {
        a.mov(ax, word_ptr(0x3000)).unwrap();
        a.mov(word_ptr(0x3002), ax).unwrap();
        a.int(0x21).unwrap();
    });
    m.put16(0x3000, 0xbeef);
    let mut g = moved(m, below(0x10_0000));
    assert_eq!(g.m.vector(), 0x21);
    assert_eq!(g.m.get(MOVED + 0x3002, 2), 0xbeef);
    assert_eq!(g.m.get(0x3002, 2), 0xcccc);
}

#[test]
fn two_level_paging_lives_in_guest_physical_memory() {
    let mut m = Machine::protected();
    let (directory, table) = (PD, PD + 0x1000);
    m.put32(directory, (table | 7) as u32);
    m.put32(directory + 4, 0x87);
    for i in 0..512 {
        m.put32(table + 4 * i, (i << 12 | 7) as u32);
    }
    m.asm(|a| {
        a.mov(eax, dword_ptr(DATA)).unwrap();
        a.mov(dword_ptr(DATA + 4), eax).unwrap();
        a.mov(dword_ptr(0x40_0000 + DATA + 8), eax).unwrap();
        a.int3().unwrap();
    });
    m.put32(DATA, 0x1234_5678);
    let m = m.with(|s| {
        s.cr0 |= cr0::PG;
        s.cr3 = directory;
        s.cr4 |= cr4::PSE;
    });
    let mut g = moved(m, below(0x20_0000));
    assert_eq!(g.m.vector(), u64::from(vector::BP));
    assert_eq!(g.m.get(MOVED + DATA + 4, 8), 0x1234_5678_1234_5678);
    assert_eq!(g.m.get(MOVED + table + 4 * (DATA >> 12), 4), DATA | 0x67);
    assert_eq!(g.m.get(directory, 4), 0xcccc_cccc);
}

fn pae() -> Machine {
    let mut m = Machine::protected();
    m.put64(PDPTES, PD | 1);
    m.put64(PD, 0x87);
    m.with(|s| {
        s.cr0 |= cr0::PG;
        s.cr4 |= cr4::PAE;
        s.cr3 = PDPTES;
        s.pdptes = [PD | 1, 0, 0, 0];
    })
}

#[test]
fn mov_cr3_reads_the_pdptes_through_the_second_level() {
    let mut m = pae();
    m.asm(|a| {
        a.mov(cr3, eax).unwrap();
        a.mov(eax, dword_ptr(0x4000_0000 + DATA as u32)).unwrap();
        a.int3().unwrap();
    });
    let other = 0x10_2fe0;
    m.put64(other, PD | 1);
    m.put64(other + 8, PD | 1);
    m.put32(DATA, 77);
    m.set(reg::RAX, other);
    let mut g = moved(m, below(0x20_0000));
    assert_eq!(g.m.vector(), u64::from(vector::BP));
    assert_eq!(g.m.reg(reg::RAX), 77);
    assert_eq!(g.m.cpu.state.pdptes, [PD | 1, PD | 1, 0, 0]);
}

#[test]
fn pdptes_that_cannot_be_read_leave_cr3_as_it_was() {
    let mut m = pae();
    m.asm(|a| a.mov(cr3, eax).unwrap());
    m.set(reg::RAX, 0x10_2020);
    let mut g = Guest::new(m);
    g.allow(0x10_2000, 0);
    // No linear address belongs to it.
    assert_eq!(g.violation(), (READ, 0, 0x10_2020));
    assert_eq!((g.m.cpu.state.cr3, g.m.cpu.state.pdptes[0], g.m.cpu.state.rip), (PDPTES, PD | 1, CODE));
    // Loads of the PDPTE registers are reads even where accesses to paging structures count as writes.
    g = g.with_flags();
    g.allow(0x10_2000, R);
    g.m.steps(1);
    assert_eq!(g.m.cpu.state.cr3, 0x10_2020);
    assert!(!g.page(0x10_2000).dirty);
}

#[test]
fn turning_paging_on_reads_the_pdptes_through_the_second_level() {
    let mut m = pae().with(|s| {
        s.cr0 &= !cr0::PG;
        s.pdptes = [0; 4];
    });
    m.asm(|a| a.mov(cr0, eax).unwrap());
    m.set(reg::RAX, cr0::PG | cr0::PE | cr0::ET | cr0::NE);
    let mut g = Guest::new(m);
    g.allow(PDPTES, 0);
    assert_eq!(g.violation(), (READ, 0, PDPTES));
    assert_eq!(g.m.cpu.state.cr0 & cr0::PG, 0);
    g.allow(PDPTES, R);
    g.m.steps(1);
    assert_eq!(g.m.cpu.state.pdptes[0], PD | 1);
}

#[test]
fn four_level_paging_lives_in_guest_physical_memory() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA + 8), rax).unwrap();
        a.int3().unwrap();
    });
    m.put64(DATA, 0x1122_3344_5566_7788);
    let mut g = moved(m, below(0x20_0000));
    assert_eq!(g.m.vector(), u64::from(vector::BP));
    assert_eq!(g.m.get(MOVED + DATA + 8, 8), 0x1122_3344_5566_7788);
    // A debugger sees the guest's memory too, and changes nothing.
    let (mut bytes, asked) = ([0; 8], g.table.lock().unwrap().asked);
    assert_eq!(g.m.cpu.peek(DATA, &mut bytes), 8);
    assert_eq!(u64::from_le_bytes(bytes), 0x1122_3344_5566_7788);
    g.allow(DATA + 0x1000, 0);
    assert_eq!(g.m.cpu.peek(DATA + 0xffc, &mut bytes), 4);
    assert_eq!(g.table.lock().unwrap().asked, asked);
}
