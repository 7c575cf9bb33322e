//! SYSCALL, SYSENTER and their returns.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, reg};
use x86defs::{efer, rflags};

use crate::machine::*;

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::long().user().with(|s| {
        s.msrs.star = 0x001b_0008 << 32;
        s.msrs.lstar = CODE + 0x100;
        s.msrs.fmask = rflags::IF | rflags::TF | rflags::DF;
        s.set_rflags(rflags::IF | rflags::CF | rflags::DF);
    });
    m.asm(|a| {
        a.syscall().unwrap();
        a.ud2().unwrap();
    });
    m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| a.sysretq().unwrap());
    m.steps(1);
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.rip, s.seg(Seg::Cs).selector, s.seg(Seg::Ss).selector), (0, CODE + 0x100, 8, 0x10));
    assert_eq!(m.reg(reg::RCX), CODE + 2);
    assert_eq!(m.reg(11), rflags::IF | rflags::CF | rflags::DF | 2);
    assert_eq!(s.rflags(), rflags::CF | 2);
    assert_eq!(m.reg(reg::RSP), USER_STACK);
    m.steps(1);
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.rip, s.seg(Seg::Cs).selector, s.seg(Seg::Ss).selector), (3, CODE + 2, 0x2b, 0x23));
    assert_eq!(s.rflags(), rflags::IF | rflags::CF | rflags::DF | 2);
}

#[test]
fn syscall_needs_sce_and_64_bit_code() {
    let mut m = Machine::long().user().with(|s| s.efer &= !efer::SCE);
    m.asm(|a| a.syscall().unwrap());
    assert_eq!(m.vector(), 6);
    let mut m = Machine::long();
    m.enter(UCODE32, CODE32, UDATA, 3);
    m.bytes(&[0x0f, 0x05]);
    assert_eq!(m.vector(), 6);
}

#[test]
fn sysret_to_a_non_canonical_address_faults_in_the_kernel() {
    let mut m = Machine::long();
    m.set(reg::RCX, 1 << 63);
    m.asm(|a| a.sysretq().unwrap());
    assert_eq!(m.fault(), (13, 0));
    assert_eq!(m.stack(2), u64::from(KCODE));
}

#[test]
fn sysenter_and_sysexit() {
    for long in [false, true] {
        let mut m = if long { Machine::long() } else { Machine::protected() };
        m = m.user().with(|s| {
            s.msrs.sysenter_cs = u64::from(KCODE);
            s.msrs.sysenter_esp = KERNEL_STACK;
            s.msrs.sysenter_eip = CODE + 0x100;
            s.set_rflags(rflags::IF);
        });
        m.asm(|a| a.sysenter().unwrap());
        let bits = if long { 64 } else { 32 };
        m.asm_at(CODE + 0x100, CODE + 0x100, bits, |a| {
            if long { a.sysexitq() } else { a.sysexit() }.unwrap();
        });
        m.steps(1);
        let s = &m.cpu.state;
        assert_eq!((s.cpl, s.rip, s.code_bits()), (0, CODE + 0x100, bits));
        assert_eq!((m.reg(reg::RSP), s.rflags()), (KERNEL_STACK, 2));
        assert_eq!((s.seg(Seg::Cs).selector, s.seg(Seg::Ss).selector), (8, 0x10));
        m.set(reg::RCX, USER_STACK);
        m.set(reg::RDX, CODE + 0x40);
        m.steps(1);
        let s = &m.cpu.state;
        let code = if long { 8 + 32 + 3 } else { 8 + 16 + 3 };
        assert_eq!((s.cpl, s.rip, s.seg(Seg::Cs).selector), (3, CODE + 0x40, code));
        assert_eq!((m.reg(reg::RSP), s.seg(Seg::Ss).selector), (USER_STACK, code + 8));
    }
}

#[test]
fn sysenter_without_a_segment_faults() {
    let mut m = Machine::protected().user();
    m.asm(|a| a.sysenter().unwrap());
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn bound_and_undefined() {
    let mut m = Machine::protected();
    m.put32(DATA, 5u32.wrapping_neg());
    m.put32(DATA + 4, 10);
    m.set(reg::RAX, 3u64.wrapping_neg() & 0xffff_ffff);
    m.asm(|a| {
        a.bound(eax, dword_ptr(DATA as u32)).unwrap();
        a.mov(eax, 11).unwrap();
        a.bound(eax, dword_ptr(DATA as u32)).unwrap();
    });
    assert_eq!(m.vector(), 5);
    for bytes in
        [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0], &[0x0f, 0x01, 0xc1], &[0x0f, 0xaa]]
    {
        let mut m = Machine::protected();
        m.bytes(bytes);
        assert_eq!(m.vector(), 6, "{bytes:x?}");
    }
}
