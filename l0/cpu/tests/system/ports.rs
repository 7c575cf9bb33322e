//! IN, OUT, INS and OUTS.

use iced_x86::code_asm::*;
use turtles_cpu::Exit;
use turtles_cpu::state::reg;
use x86defs::{cr4, rflags};

use crate::machine::*;

#[test]
fn values_and_widths() {
    let mut m = Machine::long();
    m.set(reg::RDX, 0x1234);
    m.set(reg::RAX, 0x8765_4321);
    m.asm(|a| {
        a.out(dx, ax).unwrap();
        a.out(0x80, al).unwrap();
        a.in_(eax, dx).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.log.lock().unwrap().written, [(0x1234, 0x4321), (0x80, 0x21)]);
    assert_eq!(m.reg(reg::RAX), 0x1234);
}

#[test]
fn users_need_iopl_or_the_bitmap() {
    // The bitmap is at TSS + 0x1000; all its bits are clear. Its end is the TSS's limit.
    for (iopl, port, bits, limit, allowed) in [
        (0u64, 0x80u64, 0u8, 0x20ff, true),
        (0, 0x80, 1, 0x20ff, false),
        (3, 0x80, 1, 0x20ff, true),
        (0, 0x80, 2, 0x20ff, true),
        (0, 0x80, 0, 0x1010, false),
        (0, 0x80, 0, 0x1011, true),
        (0, 0x80, 0, 0x66, false),
    ] {
        let mut m = Machine::long().user().with(|s| {
            s.set_rflags(iopl << 12);
            s.tr.limit = limit;
        });
        m.put(TSS + 0x1000 + port / 8, &[bits]);
        m.set(reg::RDX, port);
        m.asm(|a| {
            a.in_(al, dx).unwrap();
            a.ud2().unwrap();
        });
        assert_eq!(m.vector() == 6, allowed, "{iopl} {bits} {limit:#x}");
    }
}

#[test]
fn wide_accesses_check_every_port() {
    let mut m = Machine::long().user();
    m.put(TSS + 0x1000 + 0x10, &[0x00, 0x01]);
    m.set(reg::RDX, 0x86);
    m.asm(|a| {
        a.in_(ax, dx).unwrap();
        a.in_(eax, dx).unwrap();
    });
    assert_eq!(m.fault(), (13, 0));
    assert_eq!(m.stack(1), CODE + 2);
}

#[test]
fn strings_move_and_count() {
    let mut m = Machine::long();
    m.put(DATA, b"hello");
    m.set(reg::RDX, 0x3f8);
    m.set(reg::RSI, DATA);
    m.set(reg::RDI, DATA + 0x100);
    m.set(reg::RCX, 5);
    m.asm(|a| {
        a.rep().outsb().unwrap();
        a.mov(ecx, 3).unwrap();
        a.rep().insw().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    let text: Vec<u8> = m.log.lock().unwrap().written.iter().map(|w| w.1 as u8).collect();
    assert_eq!(text, b"hello");
    assert_eq!((m.reg(reg::RSI), m.reg(reg::RDI), m.reg(reg::RCX)), (DATA + 5, DATA + 0x106, 0));
    assert_eq!(m.get(DATA + 0x100, 8), 0x03f8_03f8_03f8);
}

#[test]
fn a_string_stops_at_a_page_fault_with_its_progress() {
    let mut m = Machine::long();
    m.put64(PDPT, 0x3003);
    m.put64(0x3000, 0x83);
    m.set(reg::RDX, 0x60);
    m.set(reg::RDI, 0x20_0000 - 3);
    m.set(reg::RCX, 8);
    m.asm(|a| a.rep().insb().unwrap());
    assert_eq!(m.fault(), (14, 2));
    assert_eq!((m.reg(reg::RDI), m.reg(reg::RCX), m.cpu.state.cr2), (0x20_0000, 5, 0x20_0000));
}

#[test]
fn long_strings_let_others_in() {
    let mut m = Machine::long();
    m.set(reg::RDX, 0x60);
    m.set(reg::RDI, DATA);
    m.set(reg::RCX, 10_000);
    m.asm(|a| {
        a.rep().insb().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.cpu.run(10), Exit::Halted);
    assert_eq!((m.reg(reg::RDI), m.reg(reg::RCX)), (DATA + 10_000, 0));
}

#[test]
fn port_breakpoints_trap_after_the_instruction() {
    let mut m = Machine::long().with(|s| {
        s.cr4 |= cr4::DE;
        s.dr[1] = 0x60;
        // L1, R/W1 = I/O, LEN1 = 1.
        s.dr7 |= 1 << 2 | 2 << 20;
    });
    m.set(reg::RDX, 0x60);
    m.asm(|a| {
        a.in_(al, dx).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), CODE + 1);
    assert_eq!(m.cpu.state.dr6 & 0xf, 2);
    assert_eq!(m.stack(2) & rflags::RF, 0);
}
