//! Hardware task switches.

use iced_x86::code_asm::*;
use turtles_cpu::state::{Seg, reg};
use x86defs::{cr0, dr, rflags};

use crate::machine::*;

const SECOND: u16 = FREE;
const SECOND_CODE: u64 = CODE + 0x800;

/// A second 32-bit task at CPL 0 that halts, with its descriptor at [`SECOND`].
fn with_second_task() -> Machine {
    let mut m = Machine::protected();
    m.gdt(SECOND, descriptor(TSS2, 0x67, 0x89));
    m.put32(TSS2 + 32, SECOND_CODE as u32);
    m.put32(TSS2 + 36, 2 | rflags::CF as u32);
    m.put32(TSS2 + 40, 0xaaaa);
    m.put32(TSS2 + 56, (KERNEL_STACK - 0x800) as u32);
    for (i, selector) in [KDATA, KCODE, KDATA, KDATA, 0, 0].into_iter().enumerate() {
        m.put32(TSS2 + 72 + 4 * i as u64, u32::from(selector));
    }
    m.put(SECOND_CODE, &[0xf4]);
    m.put32(DATA, 0);
    m.put16(DATA + 4, SECOND);
    m
}

fn access_byte(m: &Machine, selector: u16) -> u64 {
    m.get(GDT + u64::from(selector) + 5, 1)
}

#[test]
fn call_nests_and_iret_returns() {
    let mut m = with_second_task();
    m.set(reg::RAX, 0x1111);
    m.put(SECOND_CODE, &[0x40, 0xcf]); // inc eax; iretd
    let len = m.asm(|a| {
        a.call(fword_ptr(DATA as u32)).unwrap();
        a.hlt().unwrap();
    }) as u64;
    m.steps(1);
    let s = &m.cpu.state;
    assert_eq!((s.tr.selector, s.tr.base, s.rip), (SECOND, TSS2, SECOND_CODE));
    assert_eq!(s.rflags(), rflags::CF | rflags::NT | 2);
    assert_ne!(s.cr0 & cr0::TS, 0);
    assert_eq!((m.reg(reg::RAX), m.reg(reg::RSP)), (0xaaaa, KERNEL_STACK - 0x800));
    assert_eq!(m.get(TSS2, 2), u64::from(TR));
    assert_eq!((m.get(TSS + 32, 4), m.get(TSS + 40, 4)), (CODE + len - 1, 0x1111));
    assert_eq!((access_byte(&m, TR), access_byte(&m, SECOND)), (0x8b, 0x8b));
    m.run();
    let s = &m.cpu.state;
    assert_eq!((s.tr.selector, s.rip), (TR, CODE + len));
    assert_eq!(m.reg(reg::RAX), 0x1111);
    assert_eq!((access_byte(&m, TR), access_byte(&m, SECOND)), (0x8b, 0x89));
    // The second task was saved after its IRET, with NT clear.
    assert_eq!((m.get(TSS2 + 32, 4), m.get(TSS2 + 40, 4)), (SECOND_CODE + 2, 0xaaab));
    assert_eq!(m.get(TSS2 + 36, 4) & rflags::NT, 0);
}

#[test]
fn jump_frees_the_old_task() {
    let mut m = with_second_task();
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    m.run();
    assert_eq!((access_byte(&m, TR), access_byte(&m, SECOND)), (0x89, 0x8b));
    assert_eq!(m.cpu.state.rflags() & rflags::NT, 0);
    assert_eq!(m.get(TSS2, 2), 0);
}

#[test]
fn busy_and_absent_tasks_are_refused() {
    for (access, vector) in [(0x8b, 13), (0x09, 11)] {
        let mut m = with_second_task();
        m.gdt(SECOND, descriptor(TSS2, 0x67, access));
        m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
        assert_eq!(m.fault(), (vector, u64::from(SECOND)));
    }
    let mut m = with_second_task();
    m.gdt(SECOND, descriptor(TSS2, 0x66, 0x89));
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    assert_eq!(m.fault(), (10, u64::from(SECOND)));
    assert_eq!(m.cpu.state.tr.selector, TR);
}

#[test]
fn a_bad_segment_faults_in_the_new_task() {
    let mut m = with_second_task();
    m.put32(TSS2 + 84, 0x1000); // DS
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    assert_eq!(m.fault(), (10, 0x1000));
    assert_eq!(m.cpu.state.tr.selector, SECOND);
    assert_eq!(m.stack(1), SECOND_CODE);
    assert_eq!(m.reg(reg::RSP), KERNEL_STACK - 0x800 - 16);
}

#[test]
fn task_gate_takes_an_exception_with_its_error_code() {
    let mut m = with_second_task();
    m.idt(13, gate(SECOND, 0, 0x85, 0));
    m.asm(|a| {
        a.mov(eax, 0x1000).unwrap();
        a.mov(ds, eax).unwrap();
    });
    m.run();
    assert_eq!((m.cpu.state.tr.selector, m.cpu.state.rip), (SECOND, SECOND_CODE + 1));
    assert_eq!((m.reg(reg::RSP), m.stack(0)), (KERNEL_STACK - 0x800 - 4, 0x1000));
    assert_eq!(m.get(TSS + 32, 4), CODE + 5);
    assert_ne!(m.get(TSS + 36, 4) & rflags::RF, 0);
}

#[test]
fn trap_bit_raises_debug_in_the_new_task() {
    let mut m = with_second_task();
    m.put16(TSS2 + 100, 1);
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    assert_eq!(m.vector(), 1);
    assert_eq!(m.stack(0), SECOND_CODE);
    assert_eq!(m.cpu.state.dr6 & dr::DR6_BT, dr::DR6_BT);
}

#[test]
fn sixteen_bit_task() {
    let mut m = Machine::protected();
    m.gdt(SECOND, descriptor(TSS2, 0x2b, 0x81));
    m.gdt(0x50, descriptor(0, 0xf_ffff, 0x809b));
    m.put16(TSS2 + 14, 0x9100);
    m.put16(TSS2 + 16, 2);
    m.put16(TSS2 + 18, 0x7777);
    for (i, selector) in [KDATA, 0x50, KDATA, KDATA].into_iter().enumerate() {
        m.put16(TSS2 + 34 + 2 * i as u64, selector);
    }
    m.put(0x9100, &[0xf4]);
    m.put32(DATA, 0);
    m.put16(DATA + 4, SECOND);
    m.asm(|a| a.jmp(fword_ptr(DATA as u32)).unwrap());
    m.run();
    let s = &m.cpu.state;
    assert_eq!((s.rip, s.code_bits(), m.reg(reg::RAX)), (0x9101, 16, 0x7777));
    assert!(s.seg(Seg::Fs).unusable());
}
