//! Segment and descriptor-table registers.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, reg};
use x86defs::{cr4, rflags, segment};

use crate::machine::*;

/// (descriptor, selector, expected fault or success)
type Load = (u64, u16, Option<(u64, u64)>);

fn load(seg: Seg, user: bool, (value, selector, expected): Load) {
    let mut m = Machine::protected();
    if user {
        m = m.user();
    }
    m.gdt(FREE, value);
    m.set(reg::RAX, u64::from(selector));
    m.asm(|a| {
        match seg {
            Seg::Ss => a.mov(ss, eax),
            _ => a.mov(ds, eax),
        }
        .unwrap();
    });
    let before = *m.cpu.state.seg(seg);
    match expected {
        None => {
            m.steps(1);
            assert_eq!(m.cpu.state.rip, CODE + 2, "{value:#x} {selector:#x}");
            assert_eq!(m.cpu.state.seg(seg).selector, selector);
            // The accessed bit is set in memory and in the register.
            if selector > 3 {
                assert_ne!(m.get(GDT + u64::from(FREE) + 5, 1) & 1, 0);
                assert_ne!(m.cpu.state.seg(seg).access & segment::ACCESSED, 0);
            }
        }
        Some(fault) => {
            assert_eq!(m.fault(), fault, "{value:#x} {selector:#x}");
            if !user {
                assert_eq!(*m.cpu.state.seg(seg), before);
            }
        }
    }
}

#[test]
fn data_segment_checks() {
    let code = u64::from(FREE);
    let d = |access| descriptor(0x1000, 0xfff, access);
    for case in [
        (d(0xc092), FREE, None),
        (d(0xc090), FREE, None),
        (d(0xc092 | DPL3), FREE, None),
        (d(0xc09a), FREE, None),
        (d(0xc098), FREE, Some((13, code))),
        (d(0xc092), FREE | 3, Some((13, code))),
        (d(0xc012), FREE, Some((11, code))),
        (d(0x82), FREE, Some((13, code))),
        (d(0xc092), 0x1000, Some((13, 0x1000))),
        (d(0xc092), FREE | 4, Some((13, code | 4))),
        (d(0xc09e), FREE | 3, None),
    ] {
        load(Seg::Ds, false, case);
    }
    load(Seg::Ds, true, (d(0xc092), FREE, Some((13, code))));
    load(Seg::Ds, true, (d(0xc092 | DPL3), FREE, None));
    load(Seg::Ds, true, (0, 3, None));
}

#[test]
fn stack_segment_checks() {
    let code = u64::from(FREE);
    let d = |access| descriptor(0, 0xf_ffff, access);
    for case in [
        (d(0xc092), FREE, None),
        (d(0xc090), FREE, Some((13, code))),
        (d(0xc09a), FREE, Some((13, code))),
        (d(0xc092), FREE | 3, Some((13, code))),
        (d(0xc092 | DPL3), FREE, Some((13, code))),
        (d(0xc012), FREE, Some((12, code))),
        (0, 0, Some((13, 0))),
    ] {
        load(Seg::Ss, false, case);
    }
}

#[test]
fn null_segment_faults_on_use() {
    let mut m = Machine::protected();
    m.asm(|a| {
        a.xor(eax, eax).unwrap();
        a.mov(es, eax).unwrap();
        a.mov(byte_ptr(0x100).es(), al).unwrap();
    });
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn null_stack_segment_is_allowed_in_64_bit_kernels_only() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.xor(eax, eax).unwrap();
        a.mov(ss, eax).unwrap();
        a.push(rax).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    let mut m = Machine::long().user();
    m.asm(|a| {
        a.mov(eax, 3).unwrap();
        a.mov(ss, eax).unwrap();
    });
    assert_eq!(m.fault(), (13, 0));
}

#[test]
fn real_mode_loads_keep_limits() {
    let mut m = Machine::real().with(|s| s.seg_mut(Seg::Ds).limit = u32::MAX);
    m.asm(|a| {
        a.mov(ax, 0x1234).unwrap();
        a.mov(ds, ax).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    let loaded = m.cpu.state.seg(Seg::Ds);
    assert_eq!((loaded.base, loaded.limit, loaded.selector), (0x12340, u32::MAX, 0x1234));
}

#[test]
fn pop_segment_leaves_the_stack_pointer_on_a_fault() {
    let mut m = Machine::protected();
    m.set(reg::RSP, KERNEL_STACK - 4);
    m.put32(KERNEL_STACK - 4, 0x1000);
    m.asm(|a| a.pop(es).unwrap());
    assert_eq!(m.fault(), (13, 0x1000));
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 4 - 16);
}

#[test]
fn push_segment_writes_a_word_of_its_slot() {
    let mut m = Machine::protected();
    m.put32(KERNEL_STACK - 4, 0xaaaa_aaaa);
    m.asm(|a| {
        a.push(ds).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 4);
    assert_eq!(m.get(KERNEL_STACK - 4, 4), 0xaaaa_0000 | u64::from(KDATA));
}

#[test]
fn far_pointer_loads() {
    let mut m = Machine::protected();
    m.put32(DATA, 0x1234_5678);
    m.put16(DATA + 4, UDATA & !3);
    m.asm(|a| {
        a.lfs(eax, ptr(DATA as u32)).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RAX), m.cpu.state.seg(Seg::Fs).selector), (0x1234_5678, UDATA & !3));
}

#[test]
fn task_register_becomes_busy() {
    for long in [false, true] {
        let mut m = if long { Machine::long() } else { Machine::protected() };
        m.gdt(FREE, descriptor(0x12_3000, 0x67, 0x89));
        m.put64(GDT + u64::from(FREE) + 8, if long { 0xffff_8000 } else { 0 });
        m.set(reg::RAX, u64::from(FREE));
        m.asm(|a| {
            a.ltr(ax).unwrap();
            a.ltr(ax).unwrap();
        });
        m.steps(1);
        let high = if long { 0xffff_8000_0000_0000 } else { 0 };
        assert_eq!(m.cpu.state.tr.base, high | 0x12_3000);
        assert_eq!(m.cpu.state.tr.access & 0xf, 11);
        assert_eq!(m.get(GDT + u64::from(FREE) + 5, 1), 0x8b);
        m.cpu.state.tr.base = TSS;
        m.cpu.state_changed();
        // A busy TSS cannot be loaded again.
        assert_eq!(m.fault(), (13, u64::from(FREE)));
    }
}

#[test]
fn local_table_is_used_after_lldt() {
    let mut m = Machine::protected();
    m.gdt(FREE, descriptor(LDT, 15, 0x82));
    m.put64(LDT + 8, descriptor(0x5000, 0xff, 0x92));
    m.set(reg::RAX, u64::from(FREE));
    m.asm(|a| {
        a.lldt(ax).unwrap();
        a.mov(eax, 0xc).unwrap();
        a.mov(gs, eax).unwrap();
        a.sldt(ebx).unwrap();
        a.mov(eax, 0x14).unwrap();
        a.mov(gs, eax).unwrap();
    });
    assert_eq!(m.fault(), (13, 0x14));
    assert_eq!(m.cpu.state.seg(Seg::Gs).base, 0x5000);
    assert_eq!(m.reg(reg::RBX), u64::from(FREE));
}

#[test]
fn umip_hides_tables_from_users() {
    for on in [false, true] {
        let mut m = Machine::long().user().with(|s| s.cr4 |= if on { cr4::UMIP } else { 0 });
        m.asm(|a| {
            a.sgdt(ptr(DATA)).unwrap();
            a.ud2().unwrap();
        });
        assert_eq!(m.vector(), if on { 13 } else { 6 });
        if !on {
            assert_eq!((m.get(DATA, 2), m.get(DATA + 2, 8)), (0xfff, GDT));
        }
    }
}

#[test]
fn lidt_takes_24_bits_with_a_16_bit_operand() {
    let mut m = Machine::real();
    m.put(0x500, &[0xff, 0x03, 1, 2, 3, 4]);
    m.bytes(&[0x0f, 0x01, 0x1e, 0x00, 0x05, 0x66, 0x0f, 0x01, 0x16, 0x00, 0x05, 0xf4]);
    m.run();
    assert_eq!((m.cpu.state.idtr.base, m.cpu.state.idtr.limit), (0x03_0201, 0x3ff));
    assert_eq!(m.cpu.state.gdtr.base, 0x0403_0201);
}

#[test]
fn lgdt_of_a_non_canonical_base_faults() {
    let mut m = Machine::long();
    m.put64(DATA + 2, 1 << 57);
    m.asm(|a| a.lgdt(ptr(DATA)).unwrap());
    assert_eq!(m.fault(), (13, 0));
    assert_eq!(m.cpu.state.gdtr.base, GDT);
}

#[test]
fn lar_lsl_verr_and_verw_look_only() {
    let mut m = Machine::protected();
    m.gdt(FREE, descriptor(0, 0x12345, 0xc09a));
    m.set(reg::RAX, u64::from(FREE));
    m.asm(|a| {
        a.lar(ebx, eax).unwrap();
        a.setz(cl).unwrap();
        a.lsl(edx, eax).unwrap();
        a.verr(ax).unwrap();
        a.setz(ch).unwrap();
        a.verw(ax).unwrap();
        a.setz(al).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!(m.reg(reg::RBX) & 0xf0_ff00, 0xc0_9a00);
    assert_eq!(m.reg(reg::RDX), 0x1234_5fff);
    assert_eq!((m.reg(reg::RCX) & 0xffff, m.reg(reg::RAX) & 0xff), (0x101, 0));

    // Less privileged code does not see it.
    let mut m = Machine::protected().user();
    m.gdt(FREE, descriptor(0, 0x12345, 0xc09a));
    m.set(reg::RAX, u64::from(FREE));
    m.set(reg::RBX, 7);
    m.asm(|a| {
        a.lar(ebx, eax).unwrap();
        a.ud2().unwrap();
    });
    assert_eq!(m.vector(), 6);
    assert_eq!(m.reg(reg::RBX), 7);
    assert_eq!(m.stack(2) & rflags::ZF, 0);
}

#[test]
fn arpl_raises_the_privilege_level() {
    let mut m = Machine::protected();
    m.set(reg::RAX, 0x10);
    m.set(reg::RBX, 0x3);
    m.asm(|a| {
        a.arpl(ax, bx).unwrap();
        a.setz(cl).unwrap();
        a.arpl(ax, bx).unwrap();
        a.setz(ch).unwrap();
        a.hlt().unwrap();
    });
    m.run();
    assert_eq!((m.reg(reg::RAX), m.reg(reg::RCX)), (0x13, 1));
}

#[test]
fn bases_of_fs_and_gs() {
    let mut m = Machine::long().with(|s| {
        s.cr4 |= cr4::FSGSBASE;
        s.msrs.kernel_gs_base = 0x5555;
    });
    m.put64(DATA + 8, 77);
    m.set(reg::RAX, DATA);
    m.asm(|a| {
        a.wrgsbase(rax).unwrap();
        a.mov(rbx, qword_ptr(8).gs()).unwrap();
        a.swapgs().unwrap();
        a.rdgsbase(rcx).unwrap();
        a.shl(rax, 45).unwrap();
        a.wrfsbase(rax).unwrap();
    });
    assert_eq!(m.fault(), (13, 0));
    assert_eq!((m.reg(reg::RBX), m.reg(reg::RCX)), (77, 0x5555));
    assert_eq!(m.cpu.state.msrs.kernel_gs_base, DATA);
    let mut m = Machine::long();
    m.asm(|a| a.rdgsbase(rcx).unwrap());
    assert_eq!(m.vector(), 6);
}
