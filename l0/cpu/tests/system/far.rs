//! Far transfers and IRET.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, Segment, reg};
use x86defs::rflags;

use crate::machine::*;

/// Puts a far pointer with a 32-bit offset at [`DATA`].
fn pointer(m: &mut Machine, selector: u16, offset: u64) {
    m.put32(DATA, offset as u32);
    m.put16(DATA + 4, selector);
}

#[test]
fn real_mode_far_call_and_return() {
    let mut m = Machine::real();
    m.put16(0x600, 0x10);
    m.put16(0x602, 0x2000);
    // call far [0x600]; hlt
    m.bytes(&[0xff, 0x1e, 0x00, 0x06, 0xf4]);
    // inc bx; retf 4
    m.put(0x2_0010, &[0x43, 0xca, 0x04, 0x00]);
    m.run();
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RSP)), (1, 0x7004));
    assert_eq!(m.cpu.state.seg(Seg::Cs).base, CODE);
}

#[test]
fn entering_protected_mode_and_long_mode_as_a_boot_loader_does() {
    let mut m = Machine::long().with(|s| {
        s.cr0 = x86defs::cr0::ET;
        s.cr4 = 0;
        s.cr3 = 0;
        s.efer = 0;
        for seg in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
            *s.seg_mut(seg) = Segment::real(0);
        }
        *s.seg_mut(Seg::Cs) = Segment { access: 0x9b, ..Segment::real((CODE >> 4) as u16) };
        s.rip = 0;
    });
    m.gdt(0x40, descriptor(0, 0xf_ffff, CODE32));
    let start32 = CODE + 0x100;
    let start64 = CODE + 0x200;
    m.asm_at(CODE, 0, 16, |a| {
        a.mov(eax, cr0).unwrap();
        a.or(al, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0x66, 0xea]).unwrap();
        a.dd(&[start32 as u32]).unwrap();
        a.dw(&[0x40]).unwrap();
    });
    m.asm_at(start32, start32, 32, |a| {
        a.mov(eax, u32::from(KDATA)).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.mov(eax, cr4).unwrap();
        a.or(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PML4 as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x100).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[start64 as u32]).unwrap();
        a.dw(&[KCODE]).unwrap();
    });
    m.asm_at(start64, start64, 64, |a| {
        a.mov(rbx, 0x1234_5678_9abc_def0u64).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RBX), 0x1234_5678_9abc_def0);
    assert!(m.cpu.state.code64());
    assert_ne!(m.cpu.state.efer & x86defs::efer::LMA, 0);
}

#[test]
fn direct_far_jumps_are_checked() {
    let free = u64::from(FREE);
    for (value, selector, user, expected) in [
        (descriptor(0, 0xf_ffff, CODE32), FREE, false, None),
        (descriptor(0, 0xf_ffff, CODE32), FREE, true, Some((13, free))),
        (descriptor(0, 0xf_ffff, CODE32 | DPL3), FREE | 3, true, None),
        (descriptor(0, 0xf_ffff, CODE32 | DPL3), FREE | 3, false, Some((13, free))),
        (descriptor(0, 0xf_ffff, 0xc09f), FREE, true, None),
        (descriptor(0, 0xf_ffff, 0xc09f | DPL3), FREE, false, Some((13, free))),
        (descriptor(0, 0xf_ffff, CODE32 & !0x80), FREE, false, Some((11, free))),
        (descriptor(0, 0xf_ffff, DATA32), FREE, false, Some((13, free))),
        (descriptor(0, 0x0, CODE16), FREE, false, Some((13, 0))),
        (0, 0, false, Some((13, 0))),
        (0, 0x2000, false, Some((13, 0x2000))),
    ] {
        let mut m = Machine::protected();
        if user {
            m = m.user();
        }
        m.gdt(FREE, value);
        pointer(&mut m, selector, CODE + 0x100);
        // jmp far [DATA]
        m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
        match expected {
            Some(fault) => assert_eq!(m.fault(), fault, "{value:#x}"),
            None => {
                m.steps(1);
                assert_eq!(m.cpu.state.rip, CODE + 0x100, "{value:#x}");
                let cpl = if user { 3 } else { 0 };
                assert_eq!(m.cpu.state.seg(Seg::Cs).selector, FREE | cpl);
            }
        }
    }
}

#[test]
fn call_gate_copies_parameters_and_retf_returns_outwards() {
    let mut m = Machine::protected().user();
    m.gdt(FREE, gate(KCODE, CODE + 0x100, 0xec, 2));
    pointer(&mut m, FREE | 3, 0xdead);
    m.asm(|a| {
        a.push(0x11).unwrap();
        a.push(0x22).unwrap();
        a.call(fword_ptr(DATA as u32)).unwrap();
        a.ud2().unwrap();
    });
    m.asm_at(CODE + 0x100, CODE + 0x100, 32, |a| {
        a.mov(eax, dword_ptr(esp + 8)).unwrap();
        a.mov(ebx, dword_ptr(esp + 12)).unwrap();
        a.mov(ecx, esp).unwrap();
        a.retf_1(8).unwrap();
    });
    m.steps(3);
    assert_eq!(m.cpu.state.cpl, 0);
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 24);
    assert_eq!(m.stack(0), CODE + 2 + 2 + 6);
    assert_eq!(m.stack(1), u64::from(UCODE32));
    assert_eq!((m.stack(4), m.stack(5)), (USER_STACK - 8, u64::from(UDATA)));
    m.cpu.state.seg_mut(Seg::Gs).access &= !(3 << 5);
    m.steps(4);
    assert_eq!((m.reg(reg::RAX), m.reg(reg::RBX)), (0x22, 0x11));
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.rip), (3, CODE + 10));
    assert_eq!((m.reg(reg::RSP), s.seg(Seg::Ss).selector), (USER_STACK, UDATA));
    // What is too privileged for ring 3 is taken away; the rest stays.
    assert!(s.seg(Seg::Gs).unusable() && !s.seg(Seg::Ds).unusable());
}

#[test]
fn call_gate_checks() {
    let free = u64::from(FREE);
    for (value, user, expected) in [
        (gate(KCODE, CODE, 0x8c, 0), true, (13, free)),
        (gate(KCODE, CODE, 0x6c, 0), true, (11, free)),
        (gate(0, CODE, 0xec, 0), true, (13, 0)),
        (gate(KDATA, CODE, 0xec, 0), true, (13, u64::from(KDATA))),
        (gate(UCODE32, CODE, 0xec, 0), false, (13, u64::from(UCODE32 & !3))),
    ] {
        let mut m = Machine::protected();
        if user {
            m = m.user();
        }
        m.gdt(FREE, value);
        pointer(&mut m, FREE, 0);
        m.asm(|a| a.call(fword_ptr(DATA as u32)).unwrap());
        assert_eq!(m.fault(), expected, "{value:#x}");
    }
    // JMP may not change privilege.
    let mut m = Machine::protected().user();
    m.gdt(FREE, gate(KCODE, CODE, 0xec, 0));
    pointer(&mut m, FREE, 0);
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    assert_eq!(m.fault(), (13, u64::from(KCODE)));
}

#[test]
fn long_mode_call_gate_pushes_quadwords() {
    let mut m = Machine::long().user();
    m.gdt(FREE, gate(KCODE, CODE + 0x100, 0xec, 0));
    pointer(&mut m, FREE | 3, 0);
    let len = m.asm(|a| a.call(fword_ptr(DATA)).unwrap()) as u64;
    m.asm_at(CODE + 0x100, CODE + 0x100, 64, |a| a.db(&[0x48, 0xcb]).unwrap());
    m.steps(1);
    assert_eq!((m.cpu.state.cpl, m.reg(reg::RSP)), (0, KERNEL_STACK - 32));
    assert_eq!((m.stack(0), m.stack(1)), (CODE + len, u64::from(UCODE64)));
    assert_eq!((m.stack(2), m.stack(3)), (USER_STACK, u64::from(UDATA)));
    assert!(m.cpu.state.seg(Seg::Ss).unusable());
    m.steps(1);
    assert_eq!((m.cpu.state.cpl, m.cpu.state.rip, m.reg(reg::RSP)), (3, CODE + len, USER_STACK));
}

#[test]
fn task_gates_and_16_bit_gates_do_not_exist_in_long_mode() {
    for kind in [0x84, 0x85, 0x81, 0x89] {
        let mut m = Machine::long();
        m.gdt(FREE, gate(KCODE, CODE, kind, 0));
        pointer(&mut m, FREE, 0);
        m.asm(|a| a.call(fword_ptr(DATA)).unwrap());
        assert_eq!(m.fault(), (13, u64::from(FREE)), "{kind:#x}");
    }
}

/// Pushes an IRETQ frame and executes IRETQ.
fn iretq(m: &mut Machine, to: u64, code: u16, flags: u64, top: u64, stack: u16) {
    let at = KERNEL_STACK - 40;
    for (i, v) in [to, u64::from(code), flags, top, u64::from(stack)].into_iter().enumerate() {
        m.put64(at + 8 * i as u64, v);
    }
    m.set(reg::RSP, at);
    m.asm(|a| a.iretq().unwrap());
}

#[test]
fn iretq_to_user_restores_everything() {
    let mut m = Machine::long();
    let flags = rflags::IF | rflags::AC | rflags::RF | rflags::CF | rflags::IOPL;
    iretq(&mut m, 0x12345, UCODE64, flags, USER_STACK + 5, UDATA);
    m.steps(1);
    let s = &m.cpu.state;
    assert_eq!((s.cpl, s.rip, s.rflags()), (3, 0x12345, flags | 2));
    assert_eq!((m.reg(reg::RSP), s.seg(Seg::Ss).selector), (USER_STACK + 5, UDATA));
    assert_eq!(s.code_bits(), 64);
}

/// FS with descriptor privilege level 0 is nulled on the way to ring 3; its base, as a VM exit may have loaded it, is kept.
#[test]
fn iretq_to_user_keeps_the_base_of_a_segment_it_nulls() {
    let mut m = Machine::long().with(|s| {
        *s.seg_mut(Seg::Fs) = Segment { base: 0x7f12_3456_7000, limit: !0, access: 0xc093, selector: 0 };
    });
    iretq(&mut m, 0x12345, UCODE64, 2, USER_STACK, UDATA);
    m.steps(1);
    let nulled = m.cpu.state.seg(Seg::Fs);
    assert_eq!((nulled.base, nulled.unusable()), (0x7f12_3456_7000, true));
}

#[test]
fn iretq_to_compatibility_mode() {
    let mut m = Machine::long();
    iretq(&mut m, 0x1_0000_2345, UCODE32, 2, 0x5_0000_1000, UDATA);
    assert_eq!(m.fault(), (13, 0));
    let mut m = Machine::long();
    iretq(&mut m, 0x2345, UCODE32, 2, 0x5_0000_1000, UDATA);
    m.steps(1);
    assert_eq!((m.cpu.state.code_bits(), m.reg(reg::RSP)), (32, 0x1000));
}

#[test]
fn iretq_checks() {
    for (to, code, flags, stack, expected) in [
        (CODE, 0, 2, KDATA, (13, 0)),
        (1 << 55, KCODE, 2, KDATA, (13, 0)),
        (1 << 62, UCODE64, 2, UDATA, (13, 0)),
        (CODE, KDATA, 2, KDATA, (13, u64::from(KDATA))),
        (CODE, UCODE64, 2, KDATA, (13, u64::from(KDATA))),
        (CODE, UCODE64, 2, 0, (13, 0)),
        (CODE, UCODE64, 2, 3, (13, 0)),
    ] {
        let mut m = Machine::long();
        iretq(&mut m, to, code, flags, KERNEL_STACK, stack);
        assert_eq!(m.fault(), expected, "{to:#x} {code:#x} {stack:#x}");
        // The IRETQ can be executed again: the stack pointer is where it was.
        assert_eq!(m.stack(4), KERNEL_STACK - 40);
    }
    let mut m = Machine::long().with(|s| s.set_rflags(rflags::NT));
    iretq(&mut m, CODE, KCODE, 2, KERNEL_STACK, KDATA);
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn iret_at_ring_3_cannot_change_iopl_or_if() {
    let mut m = Machine::protected().user().with(|s| s.set_rflags(0));
    for (i, v) in
        [CODE + 0x100, u64::from(UCODE32), rflags::ALL & !rflags::NT & !rflags::VM].into_iter().enumerate()
    {
        m.put32(USER_STACK - 12 + 4 * i as u64, v as u32);
    }
    m.set(reg::RSP, USER_STACK - 12);
    m.asm(|a| a.iretd().unwrap());
    let _ = m.cpu.step();
    let kept = rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP | rflags::NT;
    assert_eq!(m.cpu.state.rip, CODE + 0x100);
    assert_eq!(m.cpu.state.rflags(), rflags::ALL & !kept | 2);
}
