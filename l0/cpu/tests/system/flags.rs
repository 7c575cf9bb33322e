//! PUSHF and POPF, and the flags that need privilege.

use iced_x86::code_asm::*;
use turtles_cpu::state::reg;
use x86defs::rflags;

use crate::machine::*;

/// RFLAGS after POPFQ of `value` with `before` set, at CPL 0 or 3.
fn popfq(before: u64, value: u64, user: bool) -> u64 {
    let mut m = Machine::long();
    if user {
        m = m.user();
    }
    m = m.with(|s| s.set_rflags(before));
    let top = m.reg(reg::RSP) - 8;
    m.set(reg::RSP, top);
    m.put64(top, value);
    m.asm(|a| a.popfq().unwrap());
    m.steps(1);
    assert_eq!(m.reg(reg::RSP), top + 8);
    m.cpu.state.rflags()
}

#[test]
fn popf_by_privilege() {
    let all = !rflags::TF;
    let never = rflags::RF | rflags::VM | rflags::VIF | rflags::VIP;
    assert_eq!(popfq(0, all, false), rflags::ALL & !never & !rflags::TF | 2);
    assert_eq!(popfq(0, all, true), rflags::ALL & !never & !rflags::TF & !rflags::IF & !rflags::IOPL | 2);
    assert_eq!(popfq(rflags::IOPL, rflags::IF, true), rflags::IOPL | rflags::IF | 2);
    assert_eq!(popfq(rflags::VIP | rflags::VIF | rflags::RF, 0, false), rflags::VIP | rflags::VIF | 2);
}

#[test]
fn pushf_hides_rf() {
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::AC | rflags::ID | rflags::CF));
    m.asm(|a| {
        a.pushfq().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.stack(0), rflags::AC | rflags::ID | rflags::CF | 2);
}

#[test]
fn lahf_and_sahf() {
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::OF));
    m.set(reg::RAX, 0xff00);
    m.asm(|a| {
        a.sahf().unwrap();
        a.xor(eax, 0xff00).unwrap();
        a.hlt().unwrap();
    });
    m.steps(1);
    assert_eq!(m.cpu.state.rflags(), 0xd7 | rflags::OF);
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::CF | rflags::SF | rflags::OF));
    m.asm(|a| {
        a.lahf().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RAX), 0x8300);
}

#[test]
fn single_flags() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.stc().unwrap();
        a.std().unwrap();
        a.cmc().unwrap();
        a.cmc().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.cpu.state.rflags(), rflags::CF | rflags::DF | 2);
}

#[test]
fn ac_is_for_supervisors() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.stac().unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_ne!(m.cpu.state.rflags() & rflags::AC, 0);
    let mut m = Machine::long().user();
    m.asm(|a| a.stac().unwrap());
    assert_eq!(m.vector(), 6);
}
