//! Virtual-8086 mode and its extensions.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, Segment, reg};
use x86defs::{cr4, rflags};

use crate::machine::*;

/// A virtual-8086 program at 1000:0000 (linear [`CODE`]) with the given flags.
fn v86(flags: u64) -> Machine {
    let mut m = Machine::protected().with(|s| {
        s.set_rflags(flags | rflags::VM);
        s.cpl = 3;
        for (i, selector) in [0x4000, 0x1000, 0x3000, 0x4000, 0x4100, 0x4200].into_iter().enumerate() {
            s.segments[i] = Segment { access: 0xf3, ..Segment::real(selector) };
        }
        s.rip = 0;
        s.gpr.set(reg::RSP, 0x100);
    });
    // Interrupt redirection: all bits clear, 32 bytes below the I/O bitmap.
    m.put16(TSS + 102, 0x1000);
    m
}

#[test]
fn exceptions_leave_with_all_segments_and_iret_comes_back() {
    let mut m = v86(rflags::IF);
    m.bytes(&[0x0f, 0x0b]);
    m.asm_at(HANDLERS + 96, HANDLERS + 96, 32, |a| {
        a.nop().unwrap();
        a.add(dword_ptr(esp), 2).unwrap();
        a.iretd().unwrap();
    });
    m.step_into_handler();
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.seg(Seg::Cs).selector), (0, KCODE));
    assert!(s.seg(Seg::Ds).unusable() && s.seg(Seg::Gs).unusable());
    let slots: Vec<u64> = (0..9).map(|i| m.get(KERNEL_STACK - 36 + 4 * i, 4)).collect();
    let flags = rflags::IF | rflags::VM | rflags::RF | 2;
    assert_eq!(slots, [0, 0x1000, flags, 0x100, 0x3000, 0x4000, 0x4000, 0x4100, 0x4200]);
    m.steps(2);
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.rip, s.v86()), (3, 2, true));
    assert_eq!(s.seg(Seg::Gs), &Segment { access: 0xf3, ..Segment::real(0x4200) });
    assert_eq!((m.reg(reg::RSP), s.seg(Seg::Ss).base), (0x100, 0x3_0000));
    assert_ne!(s.rflags() & rflags::IF, 0);
}

#[test]
fn sensitive_instructions_need_iopl_3() {
    for bytes in [&[0xfa][..], &[0xfb], &[0x9c], &[0x9d], &[0xcd, 0x21], &[0xcf]] {
        let mut m = v86(0);
        m.bytes(bytes);
        m.step_into_handler();
        assert_eq!(m.get(KERNEL_STACK - 40, 4), 0, "{bytes:x?}");
        assert_eq!((m.cpu.state.cpl, m.get(KERNEL_STACK - 36, 4)), (0, 0), "{bytes:x?}");
        let mut m = v86(rflags::IOPL);
        m.bytes(bytes);
        m.step_into_handler();
        if bytes[0] != 0xcd {
            assert_eq!(m.cpu.state.cpl, 3, "{bytes:x?}");
        }
    }
}

#[test]
fn virtual_interrupt_flag() {
    let mut m = v86(0).with(|s| s.cr4 |= cr4::VME);
    // sti; pushf; pop ax; cli; pushf; pop bx
    m.bytes(&[0xfb, 0x9c, 0x58, 0xfa, 0x9c, 0x5b]);
    m.steps(3);
    assert_ne!(m.cpu.state.rflags() & rflags::VIF, 0);
    assert_eq!(m.cpu.state.rflags() & rflags::IF, 0);
    m.steps(3);
    assert_eq!(m.reg(reg::RAX) & 0xffff, rflags::IF | rflags::IOPL | 2);
    assert_eq!(m.reg(reg::RBX) & 0xffff, rflags::IOPL | 2);
    // STI with an interrupt pending is for the monitor to see.
    let mut m = v86(rflags::VIP).with(|s| s.cr4 |= cr4::VME);
    m.bytes(&[0xfb]);
    m.step_into_handler();
    assert_eq!((m.cpu.state.cpl, m.get(KERNEL_STACK - 40, 4)), (0, 0));
}

#[test]
fn software_interrupts_are_redirected_by_the_bitmap() {
    for (iopl, bit) in [(0, false), (3, false), (0, true), (3, true)] {
        let mut m = v86(iopl << 12 | rflags::VIF).with(|s| s.cr4 |= cr4::VME);
        m.put16(4 * 0x21, 0x50);
        m.put16(4 * 0x21 + 2, 0x1000);
        m.idt(0x21, gate(KCODE, HANDLERS + 16 * 0x21, 0xee, 0));
        if bit {
            m.put(TSS + 0x1000 - 32 + 4, &[1 << 1]);
        }
        m.bytes(&[0xcd, 0x21]);
        m.step_into_handler();
        let s = &m.cpu.state;
        match (bit, iopl) {
            (false, _) => {
                assert_eq!((s.v86(), s.rip, s.seg(Seg::Cs).selector), (true, 0x50, 0x1000));
                let image = if iopl == 3 { rflags::IOPL } else { rflags::IOPL | rflags::IF } | 2;
                assert_eq!(m.get(0x3_0000 + 0xfe, 2), image);
                assert_eq!((m.get(0x3_0000 + 0xfa, 2), m.get(0x3_0000 + 0xfc, 2)), (2, 0x1000));
                assert_eq!(s.rflags() & rflags::VIF != 0, iopl == 3);
            }
            (true, 3) => assert_eq!((s.cpl, s.rip & !15), (0, HANDLERS + 16 * 0x21)),
            (true, _) => assert_eq!((s.cpl, s.rip & !15), (0, HANDLERS + 16 * 13)),
        }
    }
}

#[test]
fn segment_loads_are_as_in_real_mode() {
    let mut m = v86(0);
    m.bytes(&[0xb8, 0x34, 0x12, 0x8e, 0xc0]);
    m.steps(2);
    assert_eq!(*m.cpu.state.seg(Seg::Es), Segment { access: 0xf3, ..Segment::real(0x1234) });
}

#[test]
fn protected_virtual_interrupts() {
    let mut m = Machine::protected().user().with(|s| s.cr4 |= cr4::PVI);
    m.asm(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
    });
    m.steps(2);
    assert_eq!(m.cpu.state.rflags() & (rflags::VIF | rflags::IF), rflags::VIF);
}
